// Pillow's LANCZOS resize of 8-bit images, byte by byte, many values at a time.
//
// Same filter, same 22-bit coefficients, same rounding to 8 bits after the horizontal pass: integer sums have one value
// in any order. Source of the arithmetic: Pillow's Resample.c. Plain C functions, called through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int LANES = 16, PRECISION = 32 - 8 - 2, SUPPORT = 3;
using Bytes = uint8_t __attribute__((vector_size(LANES)));

// One register of sums, its instructions by name: g++ 12 makes slow scalar code of wider vectors and of conversions.
#if defined __AVX512F__
constexpr int PART = 16;
using Ints = int32_t __attribute__((vector_size(4 * PART)));
static inline Ints widen(const uint8_t* from) {
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
static inline void store_clipped(Ints values, uint8_t* to) {
  const __m512i clipped = _mm512_min_epi32(_mm512_max_epi32((__m512i)values, __m512i{}), _mm512_set1_epi32(255));
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(clipped));
}
#elif defined __AVX2__
constexpr int PART = 8;
using Ints = int32_t __attribute__((vector_size(4 * PART)));
static inline Ints widen(const uint8_t* from) {
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
static inline void store_clipped(Ints values, uint8_t* to) {
  const __m256i sums = (__m256i)values;
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(shorts, shorts));
}
#else
constexpr int PART = 4;
using Ints = int32_t __attribute__((vector_size(4 * PART)));
static inline Ints widen(const uint8_t* from) { return Ints{from[0], from[1], from[2], from[3]}; }
static inline void store_clipped(Ints values, uint8_t* to) {
  for (int i = 0; i < PART; i++) to[i] = uint8_t(std::min(std::max(values[i], 0), 255));
}
#endif

static double lanczos(double x) {
  auto sinc = [](double value) { return value == 0 ? 1 : std::sin(value * M_PI) / (value * M_PI); };
  return -SUPPORT <= x && x < SUPPORT ? sinc(x) * sinc(x / SUPPORT) : 0;
}

// One side of the image: its length before and after, and the part of it, of whole pixels or not, that is resized.
struct Side {
  int from, to;
  float start, stop;  // as Pillow takes them

  bool stays() const { return from == to && start == 0 && stop == from; }
};

// For each output position the first input position and the fixed-point weights of as many as count.
struct Taps {
  std::vector<int> first, count, weights;
  int most;

  explicit Taps(const Side& side) : first(side.to), count(side.to) {
    const double scale = double(side.stop - side.start) / side.to, stretch = std::max(scale, 1.0);
    const double support = SUPPORT * stretch;
    most = int(std::ceil(support)) * 2 + 1;
    weights.resize(size_t(side.to) * most);
    std::vector<double> exact(most);
    for (int x = 0; x < side.to; x++) {
      const double center = side.start + (x + 0.5) * scale;
      first[x] = std::max(int(center - support + 0.5), 0);
      count[x] = std::min(int(center + support + 0.5), side.from) - first[x];
      double total = 0;
      for (int i = 0; i < count[x]; i++)
        total += exact[i] = lanczos((i + first[x] - center + 0.5) * (1.0 / stretch));
      for (int i = 0; i < count[x]; i++) {
        const double weight = (total != 0 ? exact[i] / total : exact[i]) * (1 << PRECISION);
        weights[size_t(x) * most + i] = int(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
    }
  }

  // Weighted sums of `WIDTH` neighbouring values, rounded and clipped to 8 bits, over what is `stride` bytes apart.
  template <int WIDTH>
  void apply(int x, const uint8_t* from, size_t stride, uint8_t* to) const {
    Ints totals[WIDTH / PART];
    for (Ints& total : totals) total = Ints{} + (1 << (PRECISION - 1));
    const int* weight = &weights[size_t(x) * most];
    for (int i = 0; i < count[x]; i++)
      for (int part = 0; part < WIDTH / PART; part++)
        totals[part] += widen(from + i * stride + part * PART) * weight[i];
    for (int part = 0; part < WIDTH / PART; part++) store_clipped(totals[part] >> PRECISION, to + part * PART);
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

template <int CHANNELS>
static void resize_rows(const uint8_t* from, int height, const Side& width, uint8_t* to) {
  constexpr int PIXEL = CHANNELS * LANES;
  const Taps taps(width);
  const size_t line = size_t(width.from) * CHANNELS, to_line = size_t(width.to) * CHANNELS;
  std::vector<uint8_t> columns(line * LANES), resized(to_line * LANES);
  for (int y = 0; y < height; y += LANES) {
    const int rows = std::min(LANES, height - y);
    to_columns(from + y * line, line, rows, columns.data());
    for (int x = 0; x < width.to; x++)
      taps.apply<PIXEL>(x, &columns[size_t(taps.first[x]) * PIXEL], PIXEL, &resized[size_t(x) * PIXEL]);
    to_rows(resized.data(), to_line, rows, to + y * to_line);
  }
}

static void resize_columns(const uint8_t* from, const Side& height, size_t line, uint8_t* to) {
  constexpr int SPAN = 4 * LANES;
  const Taps taps(height);
  std::vector<uint8_t> last(size_t(taps.most) * SPAN);
  for (int y = 0; y < height.to; y++) {
    const uint8_t* start = from + taps.first[y] * line;
    size_t x = 0;
    for (; x + SPAN <= line; x += SPAN) taps.apply<SPAN>(y, start + x, line, to + y * line + x);
    if (x == line) continue;
    for (int i = 0; i < taps.count[y]; i++) std::memcpy(&last[size_t(i) * SPAN], start + i * line + x, line - x);
    uint8_t end[SPAN];
    taps.apply<SPAN>(y, last.data(), SPAN, end);
    std::memcpy(to + y * line + x, end, line - x);
  }
}

static void resize_height(const uint8_t* from, const Side& height, size_t line, uint8_t* to) {
  if (height.stays()) std::memcpy(to, from, height.from * line);
  else resize_columns(from, height, line, to);
}

static void resize_width(const uint8_t* from, int height, const Side& width, int channels, uint8_t* to) {
  if (width.stays()) std::memcpy(to, from, size_t(height) * width.from * channels);
  else if (channels == 1) resize_rows<1>(from, height, width, to);
  else resize_rows<3>(from, height, width, to);
}

// Which pass comes first is Pillow's rule since version 13.
static bool height_first(const Side& height, const Side& width) {
  return height.to < height.from && 2 * (int64_t(width.from) - width.to) < int64_t(height.from) - height.to;
}

// [height, width, channels], of it the part from (left, top) to (right, bottom), to [to_height, to_width, channels];
// sides are at least 1. False: out of memory.
extern "C" bool resize(
    const uint8_t* from, int height, int width, int channels, uint8_t* to, int to_height, int to_width,
    float left, float top, float right, float bottom) try {
  const Side down{height, to_height, top, bottom}, across{width, to_width, left, right};
  const size_t line = size_t(width) * channels, to_line = size_t(to_width) * channels;
  if (height_first(down, across)) {
    std::vector<uint8_t> between(to_height * line);
    resize_height(from, down, line, between.data());
    resize_width(between.data(), to_height, across, channels, to);
  } else {
    std::vector<uint8_t> between(height * to_line);
    resize_width(from, height, across, channels, between.data());
    resize_height(between.data(), down, to_line, to);
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
