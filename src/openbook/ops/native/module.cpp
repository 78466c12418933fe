// `openbook.ops._native`: the kernels of the exact profile.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "isa.h"
#include "thread_pool.h"

NB_MODULE(_native, m) {
  namespace nb = nanobind;
  using namespace openbook;
  m.doc() = "Kernels of the exact profile: the same bits on every CPU, thread count and batch.";
  m.def("isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, nb::arg("name"), "Use another instruction set; ValueError if this CPU lacks it.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Those that this CPU has, the preferred one last.");
  m.def("num_threads", &num_threads, "Threads in use.");
  m.def("set_num_threads", &set_num_threads, nb::arg("count"), "Use 1 to 256 threads; ValueError otherwise.");
  bind_norm(m);
  bind_elementwise(m);
  bind_softmax(m);
  bind_optim(m);
  bind_gemm(m);
  bind_decoder(m);
  bind_attention(m);
  bind_paged_attention(m);
  bind_quant(m);
}
