// Pixels that lie anywhere, brought side by side: block by block, so that what is read down a column comes from the cache.
// A plain C function, called through ctypes.

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr int BLOCK = 64;

template <int CHANNELS>
static void pack_block(
    const uint8_t* from, int64_t row, int64_t pixel, int top, int bottom, int left, int right, int width, uint8_t* to) {
  for (int y = top; y < bottom; y++)
    for (int x = left; x < right; x++)
      std::memcpy(to + (int64_t(y) * width + x) * CHANNELS, from + y * row + x * pixel, CHANNELS);
}

// [height, width, channels], channels 1 or 3, of which a step down is `row` bytes and one to the right `pixel`, either
// of them negative or not, to dense memory.
extern "C" void pack(
    const uint8_t* from, int64_t row, int64_t pixel, int height, int width, int channels, uint8_t* to) {
  const auto block = channels == 1 ? pack_block<1> : pack_block<3>;
  for (int y = 0; y < height; y += BLOCK)
    for (int x = 0; x < width; x += BLOCK)
      block(from, row, pixel, y, std::min(y + BLOCK, height), x, std::min(x + BLOCK, width), width, to);
}
