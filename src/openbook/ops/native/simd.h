// One vector of 16 float32 lanes, the same on every instruction set: one AVX-512 register, two of AVX2, four of NEON, or an
// array. Kernels are written once against it; as every operation below is exact or correctly rounded, they give the same
// bits everywhere. (Which of several NaNs comes out is left open: all NaNs count as one.)
//
// Included by kernel sources only, inside their namespace OPENBOOK_ISA (see dispatch.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 takes the registers that AVX-512 intrinsics leave undefined on purpose for a mistake (its bug 105593).
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define OPENBOOK_INLINE inline __attribute__((always_inline))

namespace openbook::OPENBOOK_ISA {

constexpr int kLanes = 16;

#if defined(OPENBOOK_ISA_avx512) || defined(OPENBOOK_ISA_avx512vnni)

struct Vec { __m512 v; };
struct Mask { __mmask16 m; };

OPENBOOK_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
OPENBOOK_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
OPENBOOK_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
OPENBOOK_INLINE Vec load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
OPENBOOK_INLINE void store_first(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
OPENBOOK_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
OPENBOOK_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
OPENBOOK_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
OPENBOOK_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
OPENBOOK_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OPENBOOK_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
OPENBOOK_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
OPENBOOK_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
OPENBOOK_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
OPENBOOK_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
OPENBOOK_INLINE Vec neg(Vec a) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
OPENBOOK_INLINE Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
OPENBOOK_INLINE Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
OPENBOOK_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
// 2^n for lanes that hold whole numbers from -126 to 127.
OPENBOOK_INLINE Vec exp2_whole(Vec n) {
  const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_castsi512_ps(bits)};
}
OPENBOOK_INLINE Vec load_bf16(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
OPENBOOK_INLINE Vec load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(OPENBOOK_ISA_avx2) || defined(OPENBOOK_ISA_avxvnni)

struct Vec { __m256 lo, hi; };
struct Mask { __m256 lo, hi; };

OPENBOOK_INLINE Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OPENBOOK_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OPENBOOK_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
OPENBOOK_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
OPENBOOK_INLINE Vec load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8))};
}
OPENBOOK_INLINE void store_first(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_lanes(n - 8), a.hi);
}
OPENBOOK_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
OPENBOOK_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
OPENBOOK_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
OPENBOOK_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
OPENBOOK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
OPENBOOK_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
OPENBOOK_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
OPENBOOK_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
OPENBOOK_INLINE Vec round(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
OPENBOOK_INLINE Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
OPENBOOK_INLINE Vec neg(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(sign, a.lo), _mm256_xor_ps(sign, a.hi)};
}
OPENBOOK_INLINE Mask less(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
OPENBOOK_INLINE Mask is_nan(Vec a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
OPENBOOK_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
OPENBOOK_INLINE Vec exp2_whole(Vec n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lo), bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.hi), bias), 23))};
}
OPENBOOK_INLINE Vec load_bf16(const std::uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
OPENBOOK_INLINE Vec load_f16(const std::uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

#elif defined(OPENBOOK_ISA_neon) || defined(OPENBOOK_ISA_neondot)

struct Vec { float32x4_t q[4]; };
struct Mask { uint32x4_t q[4]; };

#define OPENBOOK_EACH(expression)             \
  {                                           \
    Vec out;                                  \
    for (int i = 0; i < 4; ++i) out.q[i] = (expression); \
    return out;                               \
  }
OPENBOOK_INLINE Vec splat(float x) OPENBOOK_EACH(vdupq_n_f32(x))
OPENBOOK_INLINE Vec load(const float* p) OPENBOOK_EACH(vld1q_f32(p + 4 * i))
OPENBOOK_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
OPENBOOK_INLINE Vec load_first(const float* p, int n) {
  float all[kLanes] = {};
  std::memcpy(all, p, sizeof(float) * static_cast<std::size_t>(n));
  return load(all);
}
OPENBOOK_INLINE void store_first(float* p, Vec a, int n) {
  float all[kLanes];
  store(all, a);
  std::memcpy(p, all, sizeof(float) * static_cast<std::size_t>(n));
}
OPENBOOK_INLINE Vec add(Vec a, Vec b) OPENBOOK_EACH(vaddq_f32(a.q[i], b.q[i]))
OPENBOOK_INLINE Vec sub(Vec a, Vec b) OPENBOOK_EACH(vsubq_f32(a.q[i], b.q[i]))
OPENBOOK_INLINE Vec mul(Vec a, Vec b) OPENBOOK_EACH(vmulq_f32(a.q[i], b.q[i]))
OPENBOOK_INLINE Vec div(Vec a, Vec b) OPENBOOK_EACH(vdivq_f32(a.q[i], b.q[i]))
OPENBOOK_INLINE Vec fma(Vec a, Vec b, Vec c) OPENBOOK_EACH(vfmaq_f32(c.q[i], a.q[i], b.q[i]))
OPENBOOK_INLINE Vec sqrt(Vec a) OPENBOOK_EACH(vsqrtq_f32(a.q[i]))
// As on x86: the second operand if either is NaN.
OPENBOOK_INLINE Vec max(Vec a, Vec b) OPENBOOK_EACH(vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]))
OPENBOOK_INLINE Vec min(Vec a, Vec b) OPENBOOK_EACH(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]))
OPENBOOK_INLINE Vec round(Vec a) OPENBOOK_EACH(vrndnq_f32(a.q[i]))
OPENBOOK_INLINE Vec abs(Vec a) OPENBOOK_EACH(vabsq_f32(a.q[i]))
OPENBOOK_INLINE Vec neg(Vec a) OPENBOOK_EACH(vnegq_f32(a.q[i]))
OPENBOOK_INLINE Mask less(Vec a, Vec b) {
  Mask out;
  for (int i = 0; i < 4; ++i) out.q[i] = vcltq_f32(a.q[i], b.q[i]);
  return out;
}
OPENBOOK_INLINE Mask is_nan(Vec a) {
  Mask out;
  for (int i = 0; i < 4; ++i) out.q[i] = vmvnq_u32(vceqq_f32(a.q[i], a.q[i]));
  return out;
}
OPENBOOK_INLINE Vec select(Mask m, Vec yes, Vec no) OPENBOOK_EACH(vbslq_f32(m.q[i], yes.q[i], no.q[i]))
OPENBOOK_INLINE Vec exp2_whole(Vec n)
    OPENBOOK_EACH(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23)))
OPENBOOK_INLINE Vec load_bf16(const std::uint16_t* p)
    OPENBOOK_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)))
OPENBOOK_INLINE Vec load_f16(const std::uint16_t* p)
    OPENBOOK_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))))
#undef OPENBOOK_EACH

#else  // scalar: the specification of the others

struct Vec { float x[kLanes]; };
struct Mask { bool x[kLanes]; };

#define OPENBOOK_EACH(expression)                            \
  {                                                          \
    Vec out;                                                 \
    for (int i = 0; i < kLanes; ++i) out.x[i] = (expression); \
    return out;                                              \
  }
OPENBOOK_INLINE Vec splat(float x) OPENBOOK_EACH(x)
OPENBOOK_INLINE Vec load(const float* p) OPENBOOK_EACH(p[i])
OPENBOOK_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.x[i];
}
OPENBOOK_INLINE Vec load_first(const float* p, int n) OPENBOOK_EACH(i < n ? p[i] : 0.0f)
OPENBOOK_INLINE void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.x[i];
}
OPENBOOK_INLINE Vec add(Vec a, Vec b) OPENBOOK_EACH(a.x[i] + b.x[i])
OPENBOOK_INLINE Vec sub(Vec a, Vec b) OPENBOOK_EACH(a.x[i] - b.x[i])
OPENBOOK_INLINE Vec mul(Vec a, Vec b) OPENBOOK_EACH(a.x[i] * b.x[i])
OPENBOOK_INLINE Vec div(Vec a, Vec b) OPENBOOK_EACH(a.x[i] / b.x[i])
OPENBOOK_INLINE Vec fma(Vec a, Vec b, Vec c) OPENBOOK_EACH(__builtin_fmaf(a.x[i], b.x[i], c.x[i]))
OPENBOOK_INLINE Vec sqrt(Vec a) OPENBOOK_EACH(__builtin_sqrtf(a.x[i]))
OPENBOOK_INLINE Vec max(Vec a, Vec b) OPENBOOK_EACH(a.x[i] > b.x[i] ? a.x[i] : b.x[i])
OPENBOOK_INLINE Vec min(Vec a, Vec b) OPENBOOK_EACH(a.x[i] < b.x[i] ? a.x[i] : b.x[i])
OPENBOOK_INLINE Vec round(Vec a) OPENBOOK_EACH(__builtin_rintf(a.x[i]))
OPENBOOK_INLINE Vec abs(Vec a) OPENBOOK_EACH(__builtin_fabsf(a.x[i]))
OPENBOOK_INLINE Vec neg(Vec a) OPENBOOK_EACH(-a.x[i])
OPENBOOK_INLINE Mask less(Vec a, Vec b) {
  Mask out;
  for (int i = 0; i < kLanes; ++i) out.x[i] = a.x[i] < b.x[i];
  return out;
}
OPENBOOK_INLINE Mask is_nan(Vec a) {
  Mask out;
  for (int i = 0; i < kLanes; ++i) out.x[i] = a.x[i] != a.x[i];
  return out;
}
OPENBOOK_INLINE Vec select(Mask m, Vec yes, Vec no) OPENBOOK_EACH(m.x[i] ? yes.x[i] : no.x[i])
OPENBOOK_INLINE float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
OPENBOOK_INLINE Vec exp2_whole(Vec n)
    OPENBOOK_EACH(from_bits(static_cast<std::uint32_t>(static_cast<std::int32_t>(n.x[i]) + 127) << 23))
OPENBOOK_INLINE Vec load_bf16(const std::uint16_t* p) OPENBOOK_EACH(from_bits(static_cast<std::uint32_t>(p[i]) << 16))
#if defined(__x86_64__)
OPENBOOK_INLINE Vec load_f16(const std::uint16_t* p) OPENBOOK_EACH(_cvtsh_ss(p[i]))
#else
OPENBOOK_INLINE Vec load_f16(const std::uint16_t* p)
    OPENBOOK_EACH(vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(p[i]))), 0))
#endif
#undef OPENBOOK_EACH

#endif

#if defined(OPENBOOK_ISA_avx512) || defined(OPENBOOK_ISA_avx512vnni)
OPENBOOK_INLINE __m256 lower_half(Vec a) { return _mm512_castps512_ps256(a.v); }
OPENBOOK_INLINE __m256 upper_half(Vec a) { return _mm512_extractf32x8_ps(a.v, 1); }
#elif defined(OPENBOOK_ISA_avx2) || defined(OPENBOOK_ISA_avxvnni)
OPENBOOK_INLINE __m256 lower_half(Vec a) { return a.lo; }
OPENBOOK_INLINE __m256 upper_half(Vec a) { return a.hi; }
#endif

// The one order in which lanes are added up: halves onto each other, 16 to 8 to 4 to 2 to 1.
#if defined(__x86_64__) && !defined(OPENBOOK_ISA_scalar)
OPENBOOK_INLINE float sum_lanes(Vec a) {
  const __m256 eight = _mm256_add_ps(lower_half(a), upper_half(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
OPENBOOK_INLINE float sum_lanes(Vec a) {
  float x[kLanes];
  store(x, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
#endif

// The largest lane; lanes must not be NaN. Which of two zeros comes out is left open.
#if defined(__x86_64__) && !defined(OPENBOOK_ISA_scalar)
OPENBOOK_INLINE float max_lanes(Vec a) {
  const __m256 eight = _mm256_max_ps(lower_half(a), upper_half(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
OPENBOOK_INLINE float max_lanes(Vec a) {
  float x[kLanes];
  store(x, a);
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}
#endif

}  // namespace openbook::OPENBOOK_ISA
