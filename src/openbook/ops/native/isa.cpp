#include "isa.h"

#include <array>
#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace openbook {
namespace {

constexpr std::array<const char*, 7> kNames = {"scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondot"};

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return __builtin_cpu_supports("avx2") && (eax & (1u << 4)) != 0;
}

bool has(Isa isa) {
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  switch (isa) {
    case Isa::scalar:
    case Isa::avx2:
      return has_v3;
    case Isa::avxvnni:
      return has_v3 && has_avx_vnni();
    case Isa::avx512:
      return has_v4;
    case Isa::avx512vnni:
      return has_v4 && __builtin_cpu_supports("avx512vnni");
    default:
      return false;
  }
}
constexpr const char* kBaseline =
    "this CPU has no AVX2 with FMA (x86-64-v3), which the exact profile needs: use another machine, or profile fast";
#else
bool has(Isa isa) {
  switch (isa) {
    case Isa::scalar:
    case Isa::neon:
      return true;
    case Isa::neondot:
#if defined(__linux__)
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
      return true;  // every Apple CPU of this architecture
#endif
    default:
      return false;
  }
}
constexpr const char* kBaseline = "this CPU has no fused multiply-add: use another machine, or profile fast";
#endif

std::string joined(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

Isa find(const std::string& name, const std::string& given_as) {
  const std::vector<Isa> available = available_isas();
  if (available.empty()) throw std::runtime_error(kBaseline);
  for (Isa isa : available) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(given_as + " is \"" + name + "\", expected one that this CPU has: " + joined(available) +
                              "; correct it");
}

Isa& chosen() {
  static Isa isa = [] {
    const char* name = std::getenv("OPENBOOK_ISA");
    if (name != nullptr && *name != '\0') return find(name, "the environment variable OPENBOOK_ISA");
    const std::vector<Isa> available = available_isas();
    if (available.empty()) throw std::runtime_error(kBaseline);
    return available.back();
  }();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<std::size_t>(isa)]; }

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (std::size_t index = 0; index < kNames.size(); ++index) {
    if (has(static_cast<Isa>(index))) found.push_back(static_cast<Isa>(index));
  }
  return found;
}

Isa current_isa() { return chosen(); }

void set_isa(const std::string& name) {
  const Isa isa = find(name, "the instruction set");
  chosen() = isa;
}

}  // namespace openbook
