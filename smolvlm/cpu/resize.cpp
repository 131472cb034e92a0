// Pillow's LANCZOS resize of 8-bit images, byte by byte, sixteen values at a time.
//
// Same filter, same 22-bit coefficients, same rounding to 8 bits after the horizontal pass: integer sums have one value
// in any order. Source of the arithmetic: Pillow's Resample.c. Plain C functions, called through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int LANES = 16, PRECISION = 32 - 8 - 2, SUPPORT = 3;
using Bytes = uint8_t __attribute__((vector_size(LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));

#ifdef __AVX512F__  // g++ 12 takes a detour
static inline Ints widen(Bytes values) { return (Ints)_mm512_cvtepu8_epi32((__m128i)values); }
static inline Bytes narrow(Ints values) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)values); }
#else
static inline Ints widen(Bytes values) { return __builtin_convertvector(__builtin_convertvector(values, Shorts), Ints); }
static inline Bytes narrow(Ints values) { return __builtin_convertvector(__builtin_convertvector(values, Shorts), Bytes); }
#endif

static double lanczos(double x) {
  auto sinc = [](double value) { return value == 0 ? 1 : std::sin(value * M_PI) / (value * M_PI); };
  return -SUPPORT <= x && x < SUPPORT ? sinc(x) * sinc(x / SUPPORT) : 0;
}

// For each output position the first input position and the fixed-point weights of as many as count.
struct Taps {
  std::vector<int> first, count, weights;
  int most;

  Taps(int from, int to) : first(to), count(to) {
    const double scale = double(from) / to, stretch = std::max(scale, 1.0), support = SUPPORT * stretch;
    most = int(std::ceil(support)) * 2 + 1;
    weights.resize(size_t(to) * most);
    std::vector<double> exact(most);
    for (int x = 0; x < to; x++) {
      const double center = (x + 0.5) * scale;
      first[x] = std::max(int(center - support + 0.5), 0);
      count[x] = std::min(int(center + support + 0.5), from) - first[x];
      double total = 0;
      for (int i = 0; i < count[x]; i++)
        total += exact[i] = lanczos((i + first[x] - center + 0.5) * (1.0 / stretch));
      for (int i = 0; i < count[x]; i++) {
        const double weight = (total != 0 ? exact[i] / total : exact[i]) * (1 << PRECISION);
        weights[size_t(x) * most + i] = int(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
    }
  }

  // Weighted sum of vectors `stride` bytes apart, rounded and clipped to 8 bits.
  Bytes apply(int x, const uint8_t* from, size_t stride) const {
    Ints total = Ints{} + (1 << (PRECISION - 1));
    const int* weight = &weights[size_t(x) * most];
    for (int i = 0; i < count[x]; i++) {
      Bytes values;
      std::memcpy(&values, from + i * stride, sizeof values);
      total += widen(values) * weight[i];
    }
    total >>= PRECISION;
    total = total < 0 ? Ints{} : total;
    total = total > 255 ? Ints{} + 255 : total;
    return narrow(total);
  }
};

// 16 × 16 bytes, rows become columns: four rounds that interleave the first half of the rows with the second.
static void transpose(Bytes (&rows)[LANES]) {
  for (int round = 0; round < 4; round++) {
    Bytes next[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      const Bytes a = rows[i], b = rows[i + LANES / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(rows, next, sizeof next);
  }
}

// [rows, width] to columns [width, 16], where rows beyond `rows` are left as they were, or back.
static void to_columns(const uint8_t* from, size_t width, int rows, uint8_t* to) {
  for (size_t x = 0; x < width; x += LANES) {
    const size_t span = std::min<size_t>(LANES, width - x);
    Bytes block[LANES] = {};
    for (int r = 0; r < rows; r++) std::memcpy(&block[r], from + r * width + x, span);
    transpose(block);
    std::memcpy(to + x * LANES, block, span * LANES);
  }
}

static void to_rows(const uint8_t* from, size_t width, int rows, uint8_t* to) {
  for (size_t x = 0; x < width; x += LANES) {
    const size_t span = std::min<size_t>(LANES, width - x);
    Bytes block[LANES] = {};
    std::memcpy(block, from + x * LANES, span * LANES);
    transpose(block);
    for (int r = 0; r < rows; r++) std::memcpy(to + r * width + x, &block[r], span);
  }
}

static void resize_rows(const uint8_t* from, int height, int width, int to_width, int channels, uint8_t* to) {
  const Taps taps(width, to_width);
  const size_t line = size_t(width) * channels, to_line = size_t(to_width) * channels;
  std::vector<uint8_t> columns(line * LANES), resized(to_line * LANES);
  for (int y = 0; y < height; y += LANES) {
    const int rows = std::min(LANES, height - y);
    to_columns(from + y * line, line, rows, columns.data());
    for (int x = 0; x < to_width; x++)
      for (int c = 0; c < channels; c++) {
        const uint8_t* start = &columns[(size_t(taps.first[x]) * channels + c) * LANES];
        const Bytes values = taps.apply(x, start, size_t(channels) * LANES);
        std::memcpy(&resized[(size_t(x) * channels + c) * LANES], &values, sizeof values);
      }
    to_rows(resized.data(), to_line, rows, to + y * to_line);
  }
}

static void resize_columns(const uint8_t* from, int height, size_t line, int to_height, uint8_t* to) {
  const Taps taps(height, to_height);
  std::vector<uint8_t> last(size_t(taps.most) * LANES);
  for (int y = 0; y < to_height; y++) {
    const uint8_t* start = from + taps.first[y] * line;
    size_t x = 0;
    for (; x + LANES <= line; x += LANES) {
      const Bytes values = taps.apply(y, start + x, line);
      std::memcpy(to + y * line + x, &values, sizeof values);
    }
    if (x == line) continue;
    for (int i = 0; i < taps.count[y]; i++) std::memcpy(&last[size_t(i) * LANES], start + i * line + x, line - x);
    const Bytes values = taps.apply(y, last.data(), LANES);
    std::memcpy(to + y * line + x, &values, line - x);
  }
}

static void resize_height(const uint8_t* from, int height, size_t line, int to_height, uint8_t* to) {
  if (height == to_height) std::memcpy(to, from, height * line);
  else resize_columns(from, height, line, to_height, to);
}

static void resize_width(const uint8_t* from, int height, int width, int to_width, int channels, uint8_t* to) {
  if (width == to_width) std::memcpy(to, from, size_t(height) * width * channels);
  else resize_rows(from, height, width, to_width, channels, to);
}

// Which pass comes first is Pillow's rule since version 13.
static bool height_first(int height, int width, int to_height, int to_width) {
  return to_height < height && 2 * (int64_t(width) - to_width) < int64_t(height) - to_height;
}

// [height, width, channels] to [to_height, to_width, channels]; sides are at least 1. False: out of memory.
extern "C" bool resize(
    const uint8_t* from, int height, int width, int channels, uint8_t* to, int to_height, int to_width) try {
  const size_t line = size_t(width) * channels, to_line = size_t(to_width) * channels;
  if (height_first(height, width, to_height, to_width)) {
    std::vector<uint8_t> between(to_height * line);
    resize_height(from, height, line, to_height, between.data());
    resize_width(between.data(), to_height, width, to_width, channels, to);
  } else {
    std::vector<uint8_t> between(height * to_line);
    resize_width(from, height, width, to_width, channels, between.data());
    resize_height(between.data(), height, to_line, to_height, to);
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
