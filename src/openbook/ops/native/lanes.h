// A row taken 16 floats at a time, and what is left over as the first lanes of a vector.
//
// Included by kernel sources only, inside their namespace OPENBOOK_ISA (see dispatch.h).
#pragma once

#include "math.h"

namespace openbook::OPENBOOK_ISA {

struct AllLanes {
  OPENBOOK_INLINE Vec load(const float* p) const { return OPENBOOK_ISA::load(p); }
  OPENBOOK_INLINE Vec load_or(const float* p, float) const { return OPENBOOK_ISA::load(p); }
  OPENBOOK_INLINE Vec keep(Vec a, float) const { return a; }
  OPENBOOK_INLINE void store(float* p, Vec a) const { OPENBOOK_ISA::store(p, a); }
};

struct FirstLanes {
  int n;
  // 0 in the other lanes.
  OPENBOOK_INLINE Vec load(const float* p) const { return load_first(p, n); }
  OPENBOOK_INLINE Vec load_or(const float* p, float rest) const { return load_first_or(p, n, rest); }
  OPENBOOK_INLINE Vec keep(Vec a, float rest) const { return select(first_mask(n), a, splat(rest)); }
  OPENBOOK_INLINE void store(float* p, Vec a) const { store_first(p, a, n); }
};

// Calls body(i, lanes) for i = 0, 16, 32, ... below size; lanes is AllLanes, or at the end FirstLanes.
template <typename Body>
OPENBOOK_INLINE void for_lanes(std::int64_t size, Body body) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, AllLanes{});
  if (i < size) body(i, FirstLanes{static_cast<int>(size - i)});
}

}  // namespace openbook::OPENBOOK_ISA
