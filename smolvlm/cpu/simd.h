// Vectors of 16 floats, as the compiler's own vector types: it splits them where registers are narrower.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

using Vec = float __attribute__((vector_size(64)));
using IntVec = int32_t __attribute__((vector_size(64)));
struct BFloat16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3: sign, 4 bits of exponent, 3 of mantissa

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float LOG2E = 1.44269504088896341f;
constexpr int WIDTH = 16;
constexpr IntVec LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Vec load(const float* from) {
  Vec values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

static inline Vec load(const BFloat16* from) {
  uint16_t __attribute__((vector_size(32))) half;
  std::memcpy(&half, from, sizeof half);
  return (Vec)(__builtin_convertvector(half, IntVec) << 16);
}

// Exponent and mantissa, moved to where a float has its own, are 2^-120 of the value: also where it is subnormal.
static inline Vec load(const Float8* from) {
  uint8_t __attribute__((vector_size(16))) bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const IntVec bits = __builtin_convertvector(bytes, IntVec);
  return (Vec)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f;
}

static inline void store(float* to, Vec values) { std::memcpy(to, &values, sizeof values); }

// Rounds to nearest even; the values are finite.
static inline void store(BFloat16* to, Vec values) {
  IntVec bits = (IntVec)values;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  auto half = __builtin_convertvector(bits, uint16_t __attribute__((vector_size(32))));
  std::memcpy(to, &half, sizeof half);
}

// [a of even, b of even runs of RUN values] + [those of odd runs]: 16 sums are halved alongside each other.
template <int RUN, size_t... I>
static inline Vec fold(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I / RUN * 2 * RUN + I % RUN)...) +
         __builtin_shufflevector(a, b, int(I / RUN * 2 * RUN + I % RUN + RUN)...);
}

// Sums of RUN / 2, .. 1 neighbouring values of `count` vectors, in the order of the vectors.
template <int RUN>
static inline Vec sums(const Vec* rows) {
  constexpr auto all = std::make_index_sequence<WIDTH>();
  if constexpr (RUN == WIDTH) return rows[0];
  else return fold<RUN>(sums<2 * RUN>(rows), sums<2 * RUN>(rows + WIDTH / RUN / 2), all);
}

static inline float sum(Vec values) {
  constexpr auto all = std::make_index_sequence<WIDTH>();
  values = fold<8>(values, values, all), values = fold<4>(values, values, all);
  return fold<1>(fold<2>(values, values, all), values, all)[0];
}

static inline float largest(Vec values) {
  float high = values[0];
  for (int i = 1; i < WIDTH; i++) high = std::max(high, values[i]);
  return high;
}

// 2^x for x <= 0 within 2e-7; 0 below 2^-126. The coefficients are ln(2)^n / n!, centred by rounding x.
static inline Vec exp2_of(Vec x) {
  x = x < -126.0f ? Vec{} - 127.0f : x;
  IntVec whole = __builtin_convertvector(x - 0.5f, IntVec);  // truncation towards 0 rounds a negative number to nearest
  Vec rest = x - __builtin_convertvector(whole, Vec);
  Vec power = Vec{} + 1.54035304e-4f;
  for (float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    power = power * rest + factor;
  return power * (Vec)((whole + 127) << 23);
}
