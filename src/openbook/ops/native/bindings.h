// What the binding files share. Arrays come as numpy arrays or torch tensors on the CPU, through DLPack, never copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace openbook {

namespace nb = nanobind;

template <typename T, int Rank>
using Array = nb::ndarray<T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;
using Floats1 = Array<float, 1>;
using Floats2 = Array<float, 2>;
using Floats3 = Array<float, 3>;
using Floats4 = Array<float, 4>;
using ConstFloats1 = Array<const float, 1>;
using ConstFloats2 = Array<const float, 2>;
using ConstFloats3 = Array<const float, 3>;
using ConstFloats4 = Array<const float, 4>;

// One for each bind_*.cpp; called by module.cpp.
void bind_norm(nb::module_& m);
void bind_elementwise(nb::module_& m);
void bind_softmax(nb::module_& m);
void bind_optim(nb::module_& m);
void bind_gemm(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_paged_attention(nb::module_& m);
void bind_quant(nb::module_& m);

}  // namespace openbook
