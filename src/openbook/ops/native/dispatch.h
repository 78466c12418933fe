// From the instruction set in use to a table of kernels.
//
// A kernel source K.cpp (listed in CMakeLists.txt) is compiled once for each instruction set. It defines its table
//
//     namespace openbook::OPENBOOK_ISA { extern const NormKernels norm_kernels = {rms_norm_forward, ...}; }
//
// and a header declares all of them with OPENBOOK_KERNELS(NormKernels, norm_kernels): after that `norm_kernels()` is the
// table in use. Kernel sources include nothing of the standard library but <cstdint>, <cstddef> and <cstring>: an inline
// function of the library compiled for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include "isa.h"

#define OPENBOOK_DECLARE(Table, name, isa) \
  namespace isa {                          \
  extern const Table name;                 \
  }

#if defined(__x86_64__)
#define OPENBOOK_KERNELS(Table, name)      \
  OPENBOOK_DECLARE(Table, name, scalar)    \
  OPENBOOK_DECLARE(Table, name, avx2)      \
  OPENBOOK_DECLARE(Table, name, avx512)    \
  inline const Table& name() {             \
    switch (current_isa()) {               \
      case Isa::avx512:                    \
      case Isa::avx512vnni:                \
        return avx512::name;               \
      case Isa::avx2:                      \
      case Isa::avxvnni:                   \
        return avx2::name;                 \
      default:                             \
        return scalar::name;               \
    }                                      \
  }
// The same for sources that multiply int8 (DOT_SOURCES).
#define OPENBOOK_DOT_KERNELS(Table, name)  \
  OPENBOOK_DECLARE(Table, name, scalar)    \
  OPENBOOK_DECLARE(Table, name, avx2)      \
  OPENBOOK_DECLARE(Table, name, avxvnni)   \
  OPENBOOK_DECLARE(Table, name, avx512)    \
  OPENBOOK_DECLARE(Table, name, avx512vnni)\
  inline const Table& name() {             \
    switch (current_isa()) {               \
      case Isa::avx512vnni:                \
        return avx512vnni::name;           \
      case Isa::avx512:                    \
        return avx512::name;               \
      case Isa::avxvnni:                   \
        return avxvnni::name;              \
      case Isa::avx2:                      \
        return avx2::name;                 \
      default:                             \
        return scalar::name;               \
    }                                      \
  }
#else
#define OPENBOOK_KERNELS(Table, name)   \
  OPENBOOK_DECLARE(Table, name, scalar) \
  OPENBOOK_DECLARE(Table, name, neon)   \
  inline const Table& name() { return current_isa() == Isa::scalar ? scalar::name : neon::name; }
#define OPENBOOK_DOT_KERNELS(Table, name) \
  OPENBOOK_DECLARE(Table, name, scalar)   \
  OPENBOOK_DECLARE(Table, name, neon)     \
  OPENBOOK_DECLARE(Table, name, neondot)  \
  inline const Table& name() {            \
    switch (current_isa()) {              \
      case Isa::neondot:                  \
        return neondot::name;             \
      case Isa::neon:                     \
        return neon::name;                \
      default:                            \
        return scalar::name;              \
    }                                     \
  }
#endif
