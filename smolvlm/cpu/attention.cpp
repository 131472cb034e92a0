// Attention on a CPU: one query a sequence over paged keys and values, and whole tiles in bfloat16.
//
// Plain C functions over raw pointers, called through ctypes. Scores and sums are float32 whatever the dtype.

#include <vector>

#include "simd.h"

constexpr int HEAD_DIM = 64, VECS = HEAD_DIM / WIDTH;

// One group of query heads that share a key head, over one sequence. The softmax is online: 16 tokens at a time.
template <int GROUP>
struct Group {
  Vec q[GROUP][VECS], acc[GROUP][VECS];  // acc: values, weighted by 2^(score - highest)
  float highest[GROUP], total[GROUP];

  template <class T>
  void start(const T* from) {
    const float scale = LOG2E / std::sqrt(float(HEAD_DIM));
    for (int g = 0; g < GROUP; g++) {
      highest[g] = LOWEST, total[g] = 0;
      for (int i = 0; i < VECS; i++) q[g][i] = load(from + g * HEAD_DIM + i * WIDTH) * scale, acc[g][i] = Vec{};
    }
  }

  template <class T>
  void attend(const T* k, const T* v, int count, int64_t stride) {
    Vec products[GROUP][WIDTH] = {}, weights[GROUP];
    for (int t = 0; t < count; t++)
      for (int i = 0; i < VECS; i++) {
        Vec key = load(k + t * stride + i * WIDTH);
        for (int g = 0; g < GROUP; g++) products[g][t] += q[g][i] * key;
      }
    for (int g = 0; g < GROUP; g++) weights[g] = weigh(g, sums<1>(products[g]), count);
    Vec added[GROUP][VECS] = {};
    for (int t = 0; t < count; t++)
      for (int i = 0; i < VECS; i++) {
        Vec value = load(v + t * stride + i * WIDTH);
        for (int g = 0; g < GROUP; g++) added[g][i] += weights[g][t] * value;
      }
    for (int g = 0; g < GROUP; g++)
      for (int i = 0; i < VECS; i++) acc[g][i] += added[g][i];
  }

  Vec weigh(int g, Vec scores, int count) {
    scores = LANES < count ? scores : Vec{} + LOWEST;
    const float high = largest(scores);
    if (high > highest[g]) {
      const float shrink = std::exp2(highest[g] - high);
      for (int i = 0; i < VECS; i++) acc[g][i] *= shrink;
      total[g] *= shrink, highest[g] = high;
    }
    const Vec weights = exp2_of(scores - highest[g]);
    total[g] += sum(weights);
    return weights;
  }

  template <class T>
  void finish(T* to) {
    for (int g = 0; g < GROUP; g++)
      for (int i = 0; i < VECS; i++) store(to + g * HEAD_DIM + i * WIDTH, acc[g][i] / total[g]);
  }
};

struct Decode {
  const void *q, *cache;
  const int64_t *table, *positions;
  void* out;
  int64_t batch, q_stride, table_stride, kv_heads, group, block_size, threads;
};

// Key heads first..first + count of one sequence; each page is read once, from its beginning to its end.
template <class T, class Page, int GROUP>
static void decode_sequence(const Decode& job, int64_t row, int64_t first, int64_t count) {
  const int64_t token = 2 * job.kv_heads * HEAD_DIM, length = job.positions[row] + 1, span = GROUP * HEAD_DIM;
  std::vector<Group<GROUP>> groups(count);
  for (int64_t h = 0; h < count; h++) groups[h].start((const T*)job.q + row * job.q_stride + (first + h) * span);
  for (int64_t begin = 0; begin < length; begin += job.block_size) {
    const int64_t block = job.table[row * job.table_stride + begin / job.block_size];
    const int64_t end = std::min(job.block_size, length - begin);
    for (int64_t t = 0; t < end; t += WIDTH)
      for (int64_t h = 0; h < count; h++) {
        const Page* k = (const Page*)job.cache + (block * job.block_size + t) * token + (first + h) * HEAD_DIM;
        groups[h].attend(k, k + job.kv_heads * HEAD_DIM, std::min<int64_t>(WIDTH, end - t), token);
      }
  }
  T* out = (T*)job.out + row * job.kv_heads * span + first * span;
  for (int64_t h = 0; h < count; h++) groups[h].finish(out + h * span);
}

template <class T, class Page, int GROUP>
static void decode_batch(const Decode& job) {
  const int64_t parts = job.batch >= job.threads ? 1 : job.kv_heads, count = job.kv_heads / parts;
#pragma omp parallel for num_threads(job.threads) schedule(dynamic)
  for (int64_t item = 0; item < job.batch * parts; item++)
    decode_sequence<T, Page, GROUP>(job, item / parts, item % parts * count, count);
}

template <class T, class Page>
static bool decode_grouped(const Decode& job) {
  switch (job.group) {
    case 1: decode_batch<T, Page, 1>(job); return true;
    case 2: decode_batch<T, Page, 2>(job); return true;
    case 3: decode_batch<T, Page, 3>(job); return true;
    case 4: decode_batch<T, Page, 4>(job); return true;
    default: return false;
  }
}

template <class T>
static bool decode(const Decode& job, bool has_float8_pages) {
  return has_float8_pages ? decode_grouped<T, Float8>(job) : decode_grouped<T, T>(job);
}

extern "C" bool paged_decode(const Decode* job, bool is_bfloat16, bool has_float8_pages) {
  return is_bfloat16 ? decode<BFloat16>(*job, has_float8_pages) : decode<float>(*job, has_float8_pages);
}

struct Dense {
  const uint16_t *q, *k, *v;
  uint16_t* out;
  int64_t batch, heads, length, strides[9], threads;  // strides of q, k and v: of batch, head and row
};

#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)  // torch's own operator uses AMX

constexpr int ROWS = 6, KEYS = 64, PAIRS = HEAD_DIM / 2;

// c [ROWS, 64] = a [ROWS, 2 * pairs] · b, b as [pairs, 64, 2]: the layout that the instruction wants.
static inline void multiply(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t pairs, Vec (&c)[ROWS][VECS]) {
  __m512 acc[ROWS][VECS] = {};
  for (int64_t p = 0; p < pairs; p++) {
    __m512bh columns[VECS];
    for (int i = 0; i < VECS; i++) columns[i] = (__m512bh)_mm512_loadu_si512(b + p * KEYS + i * WIDTH);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      __m512bh row = (__m512bh)_mm512_set1_epi32(a[r * stride + p]);
#pragma GCC unroll 4
      for (int i = 0; i < VECS; i++) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], row, columns[i]);
    }
  }
  std::memcpy(c, acc, sizeof acc);
}

struct Head {
  int64_t length, padded;
  std::vector<uint32_t> keys, values, weights;  // [padded / 64, PAIRS, 64], [padded / 2, 64], [ROWS, padded / 2]
  std::vector<float> scores;                    // [ROWS, padded]

  explicit Head(int64_t length)
      : length(length), padded((length + KEYS - 1) / KEYS * KEYS), keys(padded * PAIRS), values(padded * PAIRS),
        weights(ROWS * padded / 2), scores(ROWS * padded) {}

  void pack(const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride) {
    for (int64_t t = 0; t < length; t++) {
      uint32_t* to = &keys[t / KEYS * PAIRS * KEYS + t % KEYS];
      for (int p = 0; p < PAIRS; p++) std::memcpy(to + p * KEYS, k + t * k_stride + 2 * p, 4);
      uint16_t* column = (uint16_t*)&values[t / 2 * HEAD_DIM] + t % 2;
      for (int d = 0; d < HEAD_DIM; d++) column[2 * d] = v[t * v_stride + d];
    }
  }

  // Attend with `count` rows of queries, padded to ROWS.
  void attend(const uint32_t* q, int count, uint16_t* out, int64_t out_stride) {
    Vec tile[ROWS][VECS];
    for (int64_t c = 0; c < padded / KEYS; c++) {
      multiply(q, PAIRS, &keys[c * PAIRS * KEYS], PAIRS, tile);
      for (int r = 0; r < ROWS; r++) std::memcpy(&scores[r * padded + c * KEYS], tile[r], sizeof tile[r]);
    }
    float totals[ROWS];
    for (int r = 0; r < ROWS; r++) totals[r] = softmax(&scores[r * padded], &weights[r * padded / 2]);
    multiply(weights.data(), padded / 2, values.data(), padded / 2, tile);
    for (int r = 0; r < count; r++)
      for (int i = 0; i < VECS; i++) store((BFloat16*)out + r * out_stride + i * WIDTH, tile[r][i] / totals[r]);
  }

  // Weights in bfloat16, not yet divided by their sum, which is the result.
  float softmax(float* row, uint32_t* to) {
    std::fill(row + length, row + padded, LOWEST);
    Vec highest = load(row), total = {};
    for (int64_t t = WIDTH; t < padded; t += WIDTH) highest = load(row + t) > highest ? load(row + t) : highest;
    const float high = largest(highest);
    const float scale = LOG2E / std::sqrt(float(HEAD_DIM));
    for (int64_t t = 0; t < padded; t += 2 * WIDTH) {
      Vec low = exp2_of((load(row + t) - high) * scale), next = exp2_of((load(row + t + WIDTH) - high) * scale);
      total += low + next;
      _mm512_storeu_si512(to + t / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)low));
    }
    return sum(total);
  }
};

extern "C" bool dense_attention(const Dense* job) {
  const int64_t num_heads = job->batch * job->heads, row_stride = job->heads * HEAD_DIM, *s = job->strides;
  const int64_t parts = std::max<int64_t>(1, 4 * job->threads / num_heads);  // enough work for every thread
  const int64_t rows = (job->length / parts + ROWS) / ROWS * ROWS;
#pragma omp parallel num_threads(job->threads)
  {
    Head head(job->length);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_heads * parts; item++) {
      const int64_t b = item / parts / job->heads, h = item / parts % job->heads, first = item % parts * rows;
      head.pack(job->k + b * s[3] + h * s[4], s[5], job->v + b * s[6] + h * s[7], s[8]);
      for (int64_t t = first; t < std::min(first + rows, job->length); t += ROWS) {
        const int count = std::min<int64_t>(ROWS, job->length - t);
        uint32_t q[ROWS][PAIRS] = {};
        for (int r = 0; r < count; r++) std::memcpy(q[r], job->q + b * s[0] + h * s[1] + (t + r) * s[2], sizeof q[r]);
        head.attend(q[0], count, job->out + (b * job->length + t) * row_stride + h * HEAD_DIM, row_stride);
      }
    }
  }
  return true;
}

extern "C" bool has_dense_attention() { return true; }
#else
extern "C" bool dense_attention(const Dense*) { return false; }
extern "C" bool has_dense_attention() { return false; }
#endif
