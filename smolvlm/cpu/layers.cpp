// The linear layers of transformer blocks in 8-bit integers, with all that stands between two of them, on a CPU.
//
// Weights have a scale per output column, inputs a scale and an offset per row, chosen when the row comes:
// x = offset + scale * byte. Sums of products are exact, and a row's result does not depend on the rows beside it. Norms,
// biases, activations, rotary positions and residuals are computed in float32 while a row or a tile of results is at
// hand. Plain C functions over raw pointers, called through ctypes.

#include <vector>

#include "simd.h"

struct Linear {  // as smolvlm/cpu/linear.py packs it
  const int8_t* weight;              // [outputs / columns, inputs / word, columns, word], outputs padded to 64
  const float *scale, *sums, *bias;  // of a column: what 1 counts, what its sum counts; bias or null
  int64_t inputs, outputs;
};

struct Norm {
  const void *weight, *bias;  // no weight: no norm; no bias: RMSNorm
  double eps;
};

struct Product {  // rows [rows, inputs] → norm → linear → rotary positions → out
  const void* x;
  void* out;
  Norm norm;
  Linear linear;
  const void *cos, *sin;  // [rows, 64] of the rows' positions, if the first `rotated` blocks of 64 columns are turned
  int64_t rows, rotated, threads;
};

struct Tail {  // what follows attention: out = h + mlp(norm(h)), h = hidden + output(attended)
  const void *attended, *hidden;
  void* out;
  Linear output, up, down;
  Norm norm;
  int64_t rows, gated, threads;
};

#if defined(__AVX512VNNI__)

using Register = __m512i;
using Input = uint8_t;
constexpr int WORD = 4, REGISTERS = 4, ROWS = 6;  // inputs multiplied at once; registers and rows of a tile of sums

static inline Register weights(const int8_t* from) { return _mm512_loadu_si512(from); }
static inline Register broadcast(int word) { return _mm512_set1_epi32(word); }
static inline Register products_added(Register sums, Register row, Register columns) {
  return _mm512_dpbusd_epi32(sums, row, columns);
}

#elif defined(__AVX2__)

using Register = __m256i;
using Input = int16_t;  // products of bytes would overflow 16 bits
constexpr int WORD = 2, REGISTERS = 2, ROWS = 6;

static inline Register weights(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
}
static inline Register broadcast(int word) { return _mm256_set1_epi32(word); }
static inline Register products_added(Register sums, Register row, Register columns) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(row, columns));
}

#endif
#if defined(__AVX512VNNI__) || defined(__AVX2__)

constexpr int LANES_EACH = sizeof(Register) / 4, TILE = REGISTERS * LANES_EACH, BLOCK = 64, VECS = BLOCK / WIDTH;
constexpr int CHUNK_BYTES = 1 << 18;  // of rows that stay in cache while one block of columns after another is multiplied

// Rows as the products read them.
struct Rows {
  Input* values;  // [rows, inputs]
  float *scale, *offset;
};

// Memory that grows to what is needed and stays: fresh pages cost more than what is done in them.
struct Scratch {
  std::vector<Input> values;
  std::vector<float> scale, offset, middle;

  Rows rows(int64_t count, int64_t inputs) {
    return {grown(values, count * inputs), grown(scale, count), grown(offset, count)};
  }

  template <class T>
  static T* grown(std::vector<T>& all, int64_t size) {
    if (int64_t(all.size()) < size) all.resize(size);
    return all.data();
  }
};
static thread_local Scratch scratch;  // of the calling thread; its helpers get pointers

static inline Vec sigmoid(Vec x) {
  const Vec power = exp2_of((x < 0.0f ? x : -x) * LOG2E);
  return (x < 0.0f ? power : Vec{} + 1.0f) / (1.0f + power);
}

// tanh-GELU: x * (1 + tanh(u)) / 2 = x * sigmoid(2u)
static inline Vec gelu(Vec x) { return x * sigmoid(x * (1.5957691216f + 0.0713548162726f * x * x)); }

// Keeps the order: g++ brings loads forward, or reads columns again, until registers run out; that takes 2.6 times as long.
static inline Register add_products(Register sums, Register row, Register columns) {
  sums = products_added(sums, row, columns);
  __asm__("" : "+v"(sums));
  return sums;
}

// c [R, TILE of 64] = a [R, inputs] · b [inputs / WORD, TILE, WORD]
template <int R>
static void multiply(const Input* a, const int8_t* b, int64_t inputs, int32_t* c) {
  Register sums[R][REGISTERS] = {};
  for (int64_t p = 0; p < inputs; p += WORD) {
    Register columns[REGISTERS];
#pragma GCC unroll 4
    for (int i = 0; i < REGISTERS; i++) columns[i] = weights(b + p * TILE + i * LANES_EACH * WORD);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int word;
      std::memcpy(&word, a + r * inputs + p, sizeof word);
      const Register row = broadcast(word);
#pragma GCC unroll 4
      for (int i = 0; i < REGISTERS; i++) sums[r][i] = add_products(sums[r][i], row, columns[i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) std::memcpy(c + r * BLOCK, sums[r], sizeof sums[r]);
}

// A block of 64 columns of up to ROWS rows.
static void multiply(int rows, const Input* a, const int8_t* b, int64_t inputs, int32_t* c) {
  for (int column = 0; column < BLOCK; column += TILE, b += TILE * inputs, c += TILE) switch (rows) {
      case 1: multiply<1>(a, b, inputs, c); break;
      case 2: multiply<2>(a, b, inputs, c); break;
      case 3: multiply<3>(a, b, inputs, c); break;
      case 4: multiply<4>(a, b, inputs, c); break;
      case 5: multiply<5>(a, b, inputs, c); break;
      default: multiply<6>(a, b, inputs, c);
    }
}

// Sums of a block of columns of one row, after scale and bias.
static inline void scale(
    const Linear& linear, float factor, float offset, int64_t first, const int32_t* sums, Vec (&c)[VECS]) {
  for (int i = 0; i < VECS; i++) {
    IntVec whole;
    std::memcpy(&whole, sums + i * WIDTH, sizeof whole);
    const int64_t column = first + i * WIDTH;
    c[i] = __builtin_convertvector(whole, Vec) * (factor * load(linear.scale + column));
    c[i] += offset * load(linear.sums + column);
    if (linear.bias) c[i] += load(linear.bias + column);
  }
}

enum Finish { PLAIN, GELU, GATED, ROTATED, ADDED };

template <class T>
struct Finishing {
  Finish kind;
  T* out;
  const T *residual = nullptr, *cos = nullptr, *sin = nullptr;
  int64_t rotated = 0;

  void operator()(int64_t outputs, int64_t row, int64_t first, Vec (&c)[VECS]) const {
    if (kind == GATED) return open(out + (row * outputs + first) / 2, c);
    if (kind == ROTATED && first < rotated * BLOCK) rotate(cos + row * BLOCK, sin + row * BLOCK, c);
    for (int i = 0; i < VECS && first + i * WIDTH < outputs; i++) {
      const int64_t place = row * outputs + first + i * WIDTH;
      store(out + place, kind == GELU ? gelu(c[i]) : kind == ADDED ? c[i] + load(residual + place) : c[i]);
    }
  }

  // A block has 32 gates and the 32 values that they open.
  static void open(T* to, const Vec (&c)[VECS]) {
    for (int i = 0; i < 2; i++) store(to + i * WIDTH, c[i] * sigmoid(c[i]) * c[i + 2]);
  }

  // Turn a head of 64: the first half of sin is negated, so that the halves only swap.
  static void rotate(const T* cos, const T* sin, Vec (&c)[VECS]) {
    const Vec head[VECS] = {c[0], c[1], c[2], c[3]};
    for (int i = 0; i < VECS; i++) c[i] = head[i] * load(cos + i * WIDTH) + head[i ^ 2] * load(sin + i * WIDTH);
  }
};

// Shared out among the threads of the region that calls it, which meet at its end.
template <class T>
static void multiply_all(const Linear& linear, const Rows& from, int64_t rows, const Finishing<T>& finish) {
  const int64_t chunk = std::max<int64_t>(1, CHUNK_BYTES / (linear.inputs * sizeof(Input) * ROWS)) * ROWS;
  const int64_t blocks = (linear.outputs + BLOCK - 1) / BLOCK, chunks = (rows + chunk - 1) / chunk;
#pragma omp for schedule(dynamic)
  for (int64_t item = 0; item < chunks * blocks; item++) {
    const int64_t first = item % blocks * BLOCK, begin = item / blocks * chunk;
    const int64_t end = std::min<int64_t>(begin + chunk, rows);
    for (int64_t t = begin; t < end; t += ROWS) {
      int32_t sums[ROWS * BLOCK];
      const int count = std::min<int64_t>(ROWS, end - t);
      multiply(count, from.values + t * linear.inputs, linear.weight + first * linear.inputs, linear.inputs, sums);
      for (int r = 0; r < count; r++) {
        Vec c[VECS];
        scale(linear, from.scale[t + r], from.offset[t + r], first, sums + r * BLOCK, c);
        finish(linear.outputs, t + r, first, c);
      }
    }
  }
}

// The values of one row, normed if there is a norm.
template <class T>
static void normed(const T* x, int64_t size, const Norm& norm, float* to) {
  const T *weight = (const T*)norm.weight, *bias = (const T*)norm.bias;
  Vec total = {}, squares = {};
  for (int64_t i = 0; i < size; i += WIDTH) total += load(x + i), store(to + i, load(x + i));
  if (!weight) return;
  const float mean = bias ? sum(total) / size : 0.0f;
  for (int64_t i = 0; i < size; i += WIDTH) squares += (load(to + i) - mean) * (load(to + i) - mean);
  const float factor = 1.0f / std::sqrt(sum(squares) / size + float(norm.eps));
  for (int64_t i = 0; i < size; i += WIDTH) {
    const Vec value = (load(to + i) - mean) * factor * load(weight + i);
    store(to + i, bias ? value + load(bias + i) : value);
  }
}

static void quantize(const float* x, int64_t size, Input* to, float* scale, float* offset) {
  Vec low = load(x), high = low;
  for (int64_t i = WIDTH; i < size; i += WIDTH) {
    const Vec value = load(x + i);
    low = value < low ? value : low, high = value > high ? value : high;
  }
  const float smallest = -largest(-low), range = largest(high) - smallest, factor = range > 0 ? 255.0f / range : 0.0f;
  for (int64_t i = 0; i < size; i += WIDTH) {
    const IntVec steps = __builtin_convertvector((load(x + i) - smallest) * factor + 0.5f, IntVec);
    const auto narrow = __builtin_convertvector(steps, Input __attribute__((vector_size(WIDTH * sizeof(Input)))));
    std::memcpy(to + i, &narrow, sizeof narrow);
  }
  *scale = range / 255.0f, *offset = smallest;
}

// norm → linear → finish; called by all threads of a region.
template <class T>
static void run(const T* x, const Norm& norm, const Linear& linear, int64_t rows, Rows to, const Finishing<T>& finish) {
  const int64_t size = linear.inputs;
  std::vector<float> values(size);
#pragma omp for schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    normed(x + t * size, size, norm, values.data());
    quantize(values.data(), size, to.values + t * size, to.scale + t, to.offset + t);
  }
  multiply_all(linear, to, rows, finish);
}

template <class T>
static void run_product(const Product& job) {
  const Rows between = scratch.rows(job.rows, job.linear.inputs);
  const Finish kind = job.cos ? ROTATED : PLAIN;
  const Finishing<T> finish = {kind, (T*)job.out, nullptr, (const T*)job.cos, (const T*)job.sin, job.rotated};
#pragma omp parallel num_threads(job.threads)
  run((const T*)job.x, job.norm, job.linear, job.rows, between, finish);
}

template <class T>
static void run_tail(const Tail& job) {
  const int64_t rows = job.rows;
  const Rows between = scratch.rows(rows, std::max({job.output.inputs, job.up.inputs, job.down.inputs}));
  T *out = (T*)job.out, *middle = (T*)Scratch::grown(scratch.middle, rows * job.down.inputs);
#pragma omp parallel num_threads(job.threads)
  {
    run((const T*)job.attended, Norm{}, job.output, rows, between, {ADDED, out, (const T*)job.hidden});
    run<T>(out, job.norm, job.up, rows, between, {job.gated ? GATED : GELU, middle});
    run<T>(middle, Norm{}, job.down, rows, between, {ADDED, out, out});
  }
}

extern "C" void product(const Product* job, bool is_bfloat16) {
  is_bfloat16 ? run_product<BFloat16>(*job) : run_product<float>(*job);
}

extern "C" void tail(const Tail* job, bool is_bfloat16) {
  is_bfloat16 ? run_tail<BFloat16>(*job) : run_tail<float>(*job);
}

extern "C" int columns_of_tile() { return TILE; }
extern "C" int inputs_of_word() { return WORD; }
#else
extern "C" int columns_of_tile() { return 0; }  // no such instructions
#endif
