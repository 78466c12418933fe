// Integer vectors beside simd.h: 16 lanes of int32, and what adds to each lane the products of 4 bytes of weights by 4
// bytes of activations. Exact on every instruction set: no step saturates for codes within the bounds of quant.h.
//
// Included by kernel sources only, after simd.h.
#pragma once

#include "simd.h"

namespace openbook::OPENBOOK_ISA {

// Rows of activations that share a load of weights, and vectors of 16 outputs beside each other: what registers hold.
#if defined(OPENBOOK_ISA_avx512vnni)
constexpr int kProductRows = 6, kProductVecs = 2;
#elif defined(OPENBOOK_ISA_avx512)
constexpr int kProductRows = 4, kProductVecs = 1;
#elif defined(OPENBOOK_ISA_avxvnni)
constexpr int kProductRows = 4, kProductVecs = 1;
#elif defined(OPENBOOK_ISA_avx2)
constexpr int kProductRows = 3, kProductVecs = 1;
#elif defined(OPENBOOK_ISA_scalar)
constexpr int kProductRows = 1, kProductVecs = 1;
#else
constexpr int kProductRows = 3, kProductVecs = 1;
#endif

// Codes4 holds 16 times 4 weights from 0 to 15, Codes8 16 times 4 weights of Q8_0. If kHasOffset, Codes8 keeps them as
// q + 128 and sums start from QuantBlock::start_q8; otherwise they are q and sums start from 0.

#if defined(OPENBOOK_ISA_avx512vnni) || defined(OPENBOOK_ISA_avx512)

struct Ints { __m512i v; };
struct Fours { __m512i v; };
struct Codes4 { __m512i v; };
struct Nibbles { Codes4 low, high; };

OPENBOOK_INLINE Ints zero_ints() { return {_mm512_setzero_si512()}; }
OPENBOOK_INLINE Ints splat_int(const std::int32_t* p) { return {_mm512_set1_epi32(*p)}; }
OPENBOOK_INLINE Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
OPENBOOK_INLINE Fours splat_four(const std::int8_t* p) {
  std::int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
OPENBOOK_INLINE Nibbles load_nibbles(const std::uint8_t* p) {
  const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  return {{_mm512_and_si512(both, mask)}, {_mm512_and_si512(_mm512_srli_epi16(both, 4), mask)}};
}
#if defined(OPENBOOK_ISA_avx512vnni)
constexpr bool kHasOffset = true;
struct Codes8 { __m512i v; };
OPENBOOK_INLINE Codes8 load_codes8(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
OPENBOOK_INLINE Ints dot(Ints sum, Codes8 w, Fours x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
OPENBOOK_INLINE Ints dot(Ints sum, Codes4 w, Fours x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
#else
constexpr bool kHasOffset = false;
struct Codes8 { __m512i magnitude; __mmask64 is_negative; };
// The sign goes to the activation: then pairs of products stay within 2 * 128 * 127, and 16 bits do not saturate.
OPENBOOK_INLINE Codes8 load_codes8(const std::uint8_t* p) {
  const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}
OPENBOOK_INLINE Ints add_pairs(Ints sum, __m512i pairs) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes8 w, Fours x) {
  const __m512i signed_x = _mm512_mask_sub_epi8(x.v, w.is_negative, _mm512_setzero_si512(), x.v);
  return add_pairs(sum, _mm512_maddubs_epi16(w.magnitude, signed_x));
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes4 w, Fours x) { return add_pairs(sum, _mm512_maddubs_epi16(w.v, x.v)); }
#endif

#elif defined(OPENBOOK_ISA_avx2) || defined(OPENBOOK_ISA_avxvnni)

struct Ints { __m256i lo, hi; };
struct Fours { __m256i v; };
struct Codes4 { __m256i lo, hi; };
struct Nibbles { Codes4 low, high; };

OPENBOOK_INLINE Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
OPENBOOK_INLINE Ints splat_int(const std::int32_t* p) { return {_mm256_set1_epi32(*p), _mm256_set1_epi32(*p)}; }
OPENBOOK_INLINE Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
OPENBOOK_INLINE Fours splat_four(const std::int8_t* p) {
  std::int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
OPENBOOK_INLINE __m256i load_bytes(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
OPENBOOK_INLINE Nibbles load_nibbles(const std::uint8_t* p) {
  const __m256i lo = load_bytes(p), hi = load_bytes(p + 32), mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(lo, mask), _mm256_and_si256(hi, mask)},
          {_mm256_and_si256(_mm256_srli_epi16(lo, 4), mask), _mm256_and_si256(_mm256_srli_epi16(hi, 4), mask)}};
}
#if defined(OPENBOOK_ISA_avxvnni)
constexpr bool kHasOffset = true;
struct Codes8 { __m256i lo, hi; };
OPENBOOK_INLINE Codes8 load_codes8(const std::uint8_t* p) { return {load_bytes(p), load_bytes(p + 32)}; }
OPENBOOK_INLINE Ints dot(Ints sum, Codes8 w, Fours x) {
  return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x.v), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x.v)};
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes4 w, Fours x) {
  return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x.v), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x.v)};
}
#else
constexpr bool kHasOffset = false;
struct Codes8 { __m256i lo, hi; };
OPENBOOK_INLINE Codes8 load_codes8(const std::uint8_t* p) {
  const __m256i flip = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(load_bytes(p), flip), _mm256_xor_si256(load_bytes(p + 32), flip)};
}
OPENBOOK_INLINE __m256i add_pairs(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// The sign goes to the activation: then pairs of products stay within 2 * 128 * 127, and 16 bits do not saturate.
OPENBOOK_INLINE __m256i signed_dot(__m256i sum, __m256i w, __m256i x) {
  return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes8 w, Fours x) {
  return {signed_dot(sum.lo, w.lo, x.v), signed_dot(sum.hi, w.hi, x.v)};
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes4 w, Fours x) {
  return {add_pairs(sum.lo, _mm256_maddubs_epi16(w.lo, x.v)), add_pairs(sum.hi, _mm256_maddubs_epi16(w.hi, x.v))};
}
#endif

#elif defined(OPENBOOK_ISA_neon) || defined(OPENBOOK_ISA_neondot)

constexpr bool kHasOffset = false;
struct Ints { int32x4_t q[4]; };
struct Fours { int8x16_t v; };
struct Codes8 { int8x16_t q[4]; };
struct Codes4 { int8x16_t q[4]; };
struct Nibbles { Codes4 low, high; };

OPENBOOK_INLINE Ints zero_ints() {
  const int32x4_t zero = vdupq_n_s32(0);
  return {{zero, zero, zero, zero}};
}
OPENBOOK_INLINE Ints splat_int(const std::int32_t* p) {
  const int32x4_t all = vld1q_dup_s32(p);
  return {{all, all, all, all}};
}
OPENBOOK_INLINE Vec to_floats(Ints a) {
  Vec out;
  for (int i = 0; i < 4; ++i) out.q[i] = vcvtq_f32_s32(a.q[i]);
  return out;
}
OPENBOOK_INLINE Fours splat_four(const std::int8_t* p) {
  std::int32_t four;
  std::memcpy(&four, p, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}
OPENBOOK_INLINE Codes8 load_codes8(const std::uint8_t* p) {
  Codes8 out;
  for (int i = 0; i < 4; ++i) out.q[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(128)));
  return out;
}
OPENBOOK_INLINE Nibbles load_nibbles(const std::uint8_t* p) {
  Nibbles out;
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t both = vld1q_u8(p + 16 * i);
    out.low.q[i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
    out.high.q[i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
  }
  return out;
}
OPENBOOK_INLINE int32x4_t dot_bytes(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(OPENBOOK_ISA_neondot)
  return vdotq_s32(sum, w, x);
#else
  // Pairs of products stay within 2 * 128 * 127: 16 bits hold them.
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes8 w, Fours x) {
  for (int i = 0; i < 4; ++i) sum.q[i] = dot_bytes(sum.q[i], w.q[i], x.v);
  return sum;
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes4 w, Fours x) {
  for (int i = 0; i < 4; ++i) sum.q[i] = dot_bytes(sum.q[i], w.q[i], x.v);
  return sum;
}

#else  // scalar: the specification of the others

constexpr bool kHasOffset = true;
struct Ints { std::int32_t x[kLanes]; };
struct Fours { std::int8_t x[4]; };
struct Codes8 { const std::uint8_t* p; };
struct Codes4 { std::uint8_t x[4 * kLanes]; };
struct Nibbles { Codes4 low, high; };

OPENBOOK_INLINE Ints zero_ints() { return {}; }
OPENBOOK_INLINE Ints splat_int(const std::int32_t* p) {
  Ints out;
  for (int i = 0; i < kLanes; ++i) out.x[i] = *p;
  return out;
}
OPENBOOK_INLINE Vec to_floats(Ints a) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.x[i] = static_cast<float>(a.x[i]);
  return out;
}
OPENBOOK_INLINE Fours splat_four(const std::int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
OPENBOOK_INLINE Codes8 load_codes8(const std::uint8_t* p) { return {p}; }
OPENBOOK_INLINE Nibbles load_nibbles(const std::uint8_t* p) {
  Nibbles out;
  for (int i = 0; i < 4 * kLanes; ++i) {
    out.low.x[i] = p[i] & 15;
    out.high.x[i] = p[i] >> 4;
  }
  return out;
}
OPENBOOK_INLINE Ints dot_bytes(Ints sum, const std::uint8_t* w, const std::int8_t* x) {
  for (int i = 0; i < 4 * kLanes; ++i) sum.x[i / 4] += w[i] * x[i % 4];
  return sum;
}
OPENBOOK_INLINE Ints dot(Ints sum, Codes8 w, Fours x) { return dot_bytes(sum, w.p, x.x); }
OPENBOOK_INLINE Ints dot(Ints sum, const Codes4& w, Fours x) { return dot_bytes(sum, w.x, x.x); }

#endif

}  // namespace openbook::OPENBOOK_ISA
