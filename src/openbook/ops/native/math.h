// Elementary functions of the exact profile: polynomials in fma, no libm, so that every instruction set gives the same bits.
//
// The functions of Vec are defined by their operations below, in their order: that is the specification. Coefficients
// are our own: Remez exchange in 60 digits (mpmath) for the least greatest relative error of the result, then rounded.
// Largest errors in units of the last place (ulp), measured against float64 by tests/ops/test_exact_math.py:
//
//   exp 1.1   tanh 1.4   erf 1.2   sigmoid 2.5   log 0.501   sin, cos 0.501
//
// NaN gives NaN; subnormal arguments and results are kept.
//
// Included by kernel sources only, inside their namespace OPENBOOK_ISA (see dispatch.h).
#pragma once

#include "simd.h"

namespace openbook::OPENBOOK_ISA {

// True in the first n lanes.
OPENBOOK_INLINE Mask first_mask(int n) {
  alignas(64) static constexpr float kIndices[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return less(load(kIndices), splat(static_cast<float>(n)));
}

// The first n floats, `rest` in the other lanes.
OPENBOOK_INLINE Vec load_first_or(const float* p, int n, float rest) {
  return select(first_mask(n), load_first(p, n), splat(rest));
}

// e^x. x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 P(r), P of degree 4 (error 3.1e-9). n ln 2 is taken off
// in two parts; the first subtraction is exact. 2^n is multiplied in as two factors, so that only the last of all
// operations can round to a subnormal. Overflow is infinity.
OPENBOOK_INLINE Vec exp(Vec x) {
  const Vec bounded = min(max(x, splat(-104.0f)), splat(89.0f));  // beyond: 0 and infinity; NaN becomes -104
  const Vec n = round(mul(bounded, splat(0x1.715476p+0f)));
  Vec r = fma(n, splat(-0x1.62e430p-1f), bounded);
  r = fma(n, splat(0x1.05c610p-29f), r);
  Vec p = splat(0x1.6a244ap-10f);
  p = fma(p, r, splat(0x1.1239e2p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = add(fma(mul(r, r), p, r), splat(1.0f));
  const Vec half = round(mul(n, splat(0.5f)));
  const Vec scaled = mul(mul(p, exp2_whole(half)), exp2_whole(sub(n, half)));
  return select(is_nan(x), x, scaled);
}

// 1 / (1 + e^-x), with e^-|x| only, so that no sum rounds away a small result.
OPENBOOK_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp(neg(abs(x)));
  return div(select(less(x, splat(0.0f)), e, splat(1.0f)), add(e, splat(1.0f)));
}

// a with the sign of b, which may be zero; a must not be negative.
OPENBOOK_INLINE Vec with_sign(Vec a, Vec b) { return select(less(b, splat(0.0f)), neg(a), a); }

// tanh x. Below 0.625: x + x^3 P(x^2), P of degree 5 (error 1.6e-10); from there: 1 - 2 / (e^(2|x|) + 1).
OPENBOOK_INLINE Vec tanh(Vec x) {
  const Vec t = mul(x, x);
  Vec p = splat(0x1.18e1b8p-9f);
  p = fma(p, t, splat(-0x1.0bf4f0p-7f));
  p = fma(p, t, splat(0x1.638b56p-6f));
  p = fma(p, t, splat(-0x1.b9ee90p-5f));
  p = fma(p, t, splat(0x1.111066p-3f));
  p = fma(p, t, splat(-0x1.555554p-2f));
  const Vec small = fma(mul(x, t), p, x);
  const Vec size = abs(x);
  const Vec large = sub(splat(1.0f), div(splat(2.0f), add(exp(add(size, size)), splat(1.0f))));
  return select(less(size, splat(0.625f)), small, with_sign(large, x));
}

// erf x. Below 0.92: x + x P(x^2), P of degree 6 (error 3.9e-10); from there: 1 - e^Q(|x|), Q of degree 7 fitted to
// ln erfc up to 4 (error 6.0e-11), beyond which the result is 1.
OPENBOOK_INLINE Vec erf(Vec x) {
  const Vec t = mul(x, x);
  Vec p = splat(0x1.5f9544p-14f);
  p = fma(p, t, splat(-0x1.ab105ep-11f));
  p = fma(p, t, splat(0x1.54df1ap-8f));
  p = fma(p, t, splat(-0x1.b810e8p-6f));
  p = fma(p, t, splat(0x1.ce2e24p-4f));
  p = fma(p, t, splat(-0x1.812744p-2f));
  p = fma(p, t, splat(0x1.06eba8p-3f));
  const Vec small = fma(x, p, x);
  const Vec size = min(splat(4.0f), abs(x));  // NaN stays NaN
  Vec q = splat(-0x1.5d72e8p-16f);
  q = fma(q, size, splat(0x1.c459cep-12f));
  q = fma(q, size, splat(-0x1.106288p-8f));
  q = fma(q, size, splat(0x1.9aebd2p-6f));
  q = fma(q, size, splat(-0x1.bb4554p-4f));
  q = fma(q, size, splat(-0x1.444d1cp-1f));
  q = fma(q, size, splat(-0x1.212628p+0f));
  q = fma(q, size, splat(0x1.62dad0p-13f));
  const Vec large = sub(splat(1.0f), exp(q));
  return select(less(size, splat(0.92f)), small, with_sign(large, x));
}

// For what a row needs once, or a table: one float in, float64 inside, rounded to float32 at the end.

OPENBOOK_INLINE float nan_float() { return __builtin_nanf(""); }

// ln x. x = 2^e m with m within sqrt(1/2) and sqrt(2); with s = (m - 1) / (m + 1), ln m = 2 s (1 + s^2 P(s^2)), P of
// degree 4 (error 3.0e-14). ln 0 is minus infinity, of what is negative NaN.
OPENBOOK_INLINE float log(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? -__builtin_inff() : nan_float();
  if (x == __builtin_inff()) return x;
  double wide = static_cast<double>(x);  // normal, also where x is not
  std::uint64_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  // The exponent grows by one where the mantissa's bits reach those of sqrt(2).
  const std::uint64_t above = bits + (0x3ff0000000000000ull - 0x3fe6a09e667f3bcdull);
  const int exponent = static_cast<int>(above >> 52) - 1023;
  bits -= static_cast<std::uint64_t>(static_cast<std::int64_t>(exponent)) << 52;
  std::memcpy(&wide, &bits, sizeof wide);
  const double s = (wide - 1.0) / (wide + 1.0), t = s * s;
  double p = 0x1.91159ec48cdebp-4;
  p = __builtin_fma(p, t, 0x1.c62b1389d495dp-4);
  p = __builtin_fma(p, t, 0x1.249411f18f444p-3);
  p = __builtin_fma(p, t, 0x1.999996a9426bdp-3);
  p = __builtin_fma(p, t, 0x1.555555561e45cp-2);
  const double log_m = 2.0 * __builtin_fma(s * t, p, s);
  return static_cast<float>(__builtin_fma(static_cast<double>(exponent), 0x1.62e42fefa39efp-1, log_m));
}

// cos x and sin x for |x| up to 1e9; NaN beyond. x = k pi/2 + r with |r| <= pi/4, pi/2 in two parts of 53 bits;
// sin r = r + r^3 P(r^2), cos r = 1 - r^2/2 + r^4 Q(r^2), each of degree 4 (errors 4.7e-15 and 7.7e-17).
OPENBOOK_INLINE void cos_sin(float x, float* cos_x, float* sin_x) {
  if (!(__builtin_fabsf(x) <= 1e9f)) {
    *cos_x = *sin_x = nan_float();
    return;
  }
  const double wide = static_cast<double>(x);
  const double k = __builtin_rint(wide * 0x1.45f306dc9c883p-1);
  double r = __builtin_fma(k, -0x1.921fb54442d18p+0, wide);
  r = __builtin_fma(k, -0x1.1a62633145c07p-54, r);
  const double t = r * r;
  double p = -0x1.a966d621351dbp-26;
  p = __builtin_fma(p, t, 0x1.71d77cdb30d2ep-19);
  p = __builtin_fma(p, t, -0x1.a019f95a5d52ap-13);
  p = __builtin_fma(p, t, 0x1.1111110ca2608p-7);
  p = __builtin_fma(p, t, -0x1.55555555523f8p-3);
  const double sin_r = __builtin_fma(r * t, p, r);
  double q = 0x1.1bc79bfaf13a9p-29;
  q = __builtin_fma(q, t, -0x1.27e02a0ce0fc3p-22);
  q = __builtin_fma(q, t, 0x1.a019faa9525e2p-16);
  q = __builtin_fma(q, t, -0x1.6c16c1676ab48p-10);
  q = __builtin_fma(q, t, 0x1.555555555310ap-5);
  const double cos_r = __builtin_fma(t * t, q, __builtin_fma(t, -0.5, 1.0));
  const int quadrant = static_cast<int>(static_cast<std::int64_t>(k) & 3);
  const double c = (quadrant & 1) != 0 ? sin_r : cos_r, s = (quadrant & 1) != 0 ? cos_r : sin_r;
  *cos_x = static_cast<float>(quadrant == 1 || quadrant == 2 ? -c : c);
  *sin_x = static_cast<float>((quadrant & 2) != 0 ? -s : s);
}

}  // namespace openbook::OPENBOOK_ISA
