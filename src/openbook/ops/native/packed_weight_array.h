// A `PackedWeight` and its memory, as Python holds it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "gemm.h"
#include "scratch.h"

namespace openbook {

using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline Element element_of(const std::string& name) {
  if (name == "float32") return Element::f32;
  if (name == "bfloat16") return Element::bf16;
  if (name == "float16") return Element::f16;
  throw std::invalid_argument("the element type is \"" + name + "\", expected float32, bfloat16 or float16; convert it");
}

inline const char* element_name(Element element) {
  return element == Element::f32 ? "float32" : element == Element::bf16 ? "bfloat16" : "float16";
}

// Owns the panels, or keeps the array alive that holds them.
class PackedWeightArray {
 public:
  PackedWeightArray(const ConstBytes& weight, std::int64_t n, std::int64_t k, const std::string& element, bool is_packed)
      : weight_{nullptr, n, k, element_of(element)} {
    const std::size_t packed = n < 0 || k < 0 ? 0 : packed_bytes(n, k, weight_.element);
    const std::size_t plain = static_cast<std::size_t>(n * k) * (weight_.element == Element::f32 ? 4 : 2);
    if (n < 1 || k < 1 || weight.size() != (is_packed ? packed : plain)) {
      throw std::invalid_argument("the weight has " + std::to_string(weight.size()) + " bytes, expected " +
                                  std::to_string(is_packed ? packed : plain) + " for " + std::to_string(n) + " x " +
                                  std::to_string(k) + " of " + element + "; correct the shape");
    }
    if (is_packed) {
      if (reinterpret_cast<std::uintptr_t>(weight.data()) % 64 != 0) {
        throw std::invalid_argument("the packed weight does not begin at a multiple of 64 bytes; align it");
      }
      source_ = weight;
      weight_.data = weight.data();
      return;
    }
    owned_ = allocate_matrix(static_cast<std::int64_t>(packed));
    weight_.data = owned_.get();
    const nb::gil_scoped_release release;
    pack_weight(weight.data(), n, k, weight_.element, owned_.get());
  }
  PackedWeightArray(const PackedWeightArray&) = delete;
  PackedWeightArray& operator=(const PackedWeightArray&) = delete;

  const PackedWeight& weight() const { return weight_; }
  std::size_t num_bytes() const { return packed_bytes(weight_.n, weight_.k, weight_.element); }

 private:
  PackedWeight weight_;
  std::shared_ptr<void> owned_;
  std::optional<ConstBytes> source_;
};

}  // namespace openbook
