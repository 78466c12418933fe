// Which instruction set the kernels run with.
#pragma once

#include <string>
#include <vector>

namespace openbook {

// In the order of preference: a later one is taken before an earlier one. The names are those of the namespaces.
enum class Isa { scalar, avx2, avxvnni, avx512, avx512vnni, neon, neondot };

// The one in use. The first call reads OPENBOOK_ISA from the environment, or takes the best of this CPU.
// Throws std::runtime_error with a line for the user if the CPU has no fused multiply-add, or the name is none.
Isa current_isa();

// Use another one from now on; not while a kernel runs. Throws std::invalid_argument for what this CPU lacks.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

// Those that this CPU and this build have, in the order of preference.
std::vector<Isa> available_isas();

}  // namespace openbook
