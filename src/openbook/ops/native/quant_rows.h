// What the quantiser of activations needs of each instruction set: one block of 32 floats at a time.
//
// Included by kernel sources only, after simd.h.
#pragma once

#include "quant.h"
#include "simd.h"

namespace openbook::OPENBOOK_ISA {

// largest_bits: the largest |x| of 32 floats, as the bits of a float; those of NaN are above those of infinity, and
// those above all others, so that one comparison finds both.
// round_codes: x * inverse rounded to whole numbers from -127 to 127, halves to even; returns their sum.

#if defined(OPENBOOK_ISA_avx512) || defined(OPENBOOK_ISA_avx512vnni)

OPENBOOK_INLINE std::uint32_t largest_bits(const float* x) {
  const __m512i mask = _mm512_set1_epi32(INT32_MAX);
  const __m512i low = _mm512_and_si512(_mm512_loadu_si512(x), mask);
  const __m512i high = _mm512_and_si512(_mm512_loadu_si512(x + 16), mask);
  return static_cast<std::uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(low, high)));
}
OPENBOOK_INLINE std::int32_t round_codes(const float* x, float inverse, std::int8_t* out) {
  const __m512 scale = _mm512_set1_ps(inverse);
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), scale), mode);
  const __m512i high = _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale), mode);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm512_cvtepi32_epi8(high));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
}

#elif defined(OPENBOOK_ISA_avx2) || defined(OPENBOOK_ISA_avxvnni)

OPENBOOK_INLINE __m256i magnitude_bits(const float* x) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi32(INT32_MAX));
}
OPENBOOK_INLINE std::uint32_t largest_bits(const float* x) {
  const __m256i all = _mm256_max_epi32(_mm256_max_epi32(magnitude_bits(x), magnitude_bits(x + 8)),
                                       _mm256_max_epi32(magnitude_bits(x + 16), magnitude_bits(x + 24)));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(four));
}
OPENBOOK_INLINE std::int32_t round_codes(const float* x, float inverse, std::int8_t* out) {
  const __m256 scale = _mm256_set1_ps(inverse);
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m256i q[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_cvtps_epi32(_mm256_round_ps(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), scale), mode));
  }
  // Packing works within halves of a register: the last step puts groups of four back in order.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(bytes, order));
  const __m256i all = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtsi128_si32(four);
}

#elif defined(OPENBOOK_ISA_neon) || defined(OPENBOOK_ISA_neondot)

OPENBOOK_INLINE std::uint32_t largest_bits(const float* x) {
  uint32x4_t all = vdupq_n_u32(0);
  for (int i = 0; i < 8; ++i) {
    all = vmaxq_u32(all, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + 4 * i)), vdupq_n_u32(0x7fffffffu)));
  }
  return vmaxvq_u32(all);
}
OPENBOOK_INLINE std::int32_t round_codes(const float* x, float inverse, std::int8_t* out) {
  int32x4_t all = vdupq_n_s32(0);
  for (int i = 0; i < 4; ++i) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * i), inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * i + 4), inverse));
    vst1_s8(out + 8 * i, vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high))));
    all = vaddq_s32(all, vaddq_s32(low, high));
  }
  return vaddvq_s32(all);
}

#else  // scalar: the specification of the others

OPENBOOK_INLINE std::uint32_t largest_bits(const float* x) {
  std::uint32_t largest = 0;
  for (int i = 0; i < 32; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}
OPENBOOK_INLINE std::int32_t round_codes(const float* x, float inverse, std::int8_t* out) {
  std::int32_t sum = 0;
  for (int i = 0; i < 32; ++i) {
    const std::int32_t q = static_cast<std::int32_t>(__builtin_rintf(x[i] * inverse));
    out[i] = static_cast<std::int8_t>(q);
    sum += q;
  }
  return sum;
}

#endif

// Asks for the line of memory at p in order to write it: another core may have read it last.
OPENBOOK_INLINE void prefetch_to_write(void* p) {
#if defined(__x86_64__)
  __asm__ volatile("prefetchw %0" : : "m"(*static_cast<char*>(p)));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// The nearest half float, halves to even, as a float.
OPENBOOK_INLINE float round_to_half(float x) {
#if defined(__x86_64__)
  return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  return vgetq_lane_f32(vcvt_f32_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
#endif
}

// x = scale * q by the rules of quant.h, with the scale not yet rounded. If an x is infinite or NaN, so is the scale NaN,
// and every q is 0.
struct BlockScale {
  float scale, inverse;
  bool is_finite;
};

// Of the floats from x to before x + size, a multiple of 32.
OPENBOOK_INLINE BlockScale scale_of(const float* x, std::int64_t size) {
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  std::uint32_t bits = largest_bits(x);
  for (std::int64_t first = kQuantBlock; first < size; first += kQuantBlock) {
    const std::uint32_t others = largest_bits(x + first);
    bits = others > bits ? others : bits;
  }
  if (bits >= kInfinity) return {__builtin_nanf(""), 0.0f, false};
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float inverse = 127.0f / largest;
  return {largest / 127.0f, inverse > 3.402823466e38f ? 0.0f : inverse, true};
}

struct RoundedBlock {
  float scale;
  std::int32_t sum;  // of the whole numbers
};

OPENBOOK_INLINE RoundedBlock round_block(const float* x, std::int8_t* codes) {
  const BlockScale block = scale_of(x, kQuantBlock);
  if (!block.is_finite) {
    std::memset(codes, 0, kQuantBlock);
    return {block.scale, 0};
  }
  return {block.scale, round_codes(x, block.inverse, codes)};
}

}  // namespace openbook::OPENBOOK_ISA
