// Products over open blocks on a CPU. `compecon.kernels` says what they compute; this file says how fast.
//
// Weights are packed in panels of 16 columns, so that a block is one contiguous stream: what is closed is never read,
// and nothing is copied per call. A panel is made of lines of 64 bytes: 16 columns of one input (float32), of two
// (bfloat16) or of four (int8), side by side as one instruction wants them.
//   up    (blocks, width/16, lines of inputs, 16, UNIT)   a block makes `width` features of all inputs
//   down  (blocks, outputs/16, lines of width, 16, UNIT)  a block adds what its `width` features say to all outputs
// A tile is some rows times one panel or two. Its sums stay in registers while lines stream by.
//
// Products are in the type that weights are kept in. float32: as they are. bfloat16: inputs are rounded to it, sums are
// float32. int8: each row of inputs is scaled to -127..127 by its largest number, sums are exact integers, and are
// scaled back at the end. Every variant of this file gives the same integers; they differ in the instructions that they
// have.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using torch::stable::Tensor;
using Type = torch::headeronly::ScalarType;
using Maybe = std::optional<Tensor>;

// ---- Vectors: 16 columns, in as many registers as they take

constexpr int64_t PANEL = 16, LINE = 64;
#if defined(__AMX_INT8__) || defined(COMPECON_EMULATE_AMX)
#define MATRIX_UNIT
#endif
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12, TOGETHER = 2;  // columns of a register; rows and panels of a tile
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6, TOGETHER = 1;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 6, TOGETHER = 1;
#else
constexpr int LANES = 4, ROWS = 2, TOGETHER = 1;
#endif
constexpr int PARTS = PANEL / LANES;
constexpr int64_t CHUNK = 96;  // rows whose features stay in the second-level cache

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float LooseFloats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
struct bfloat16 {
  uint16_t bits;
};

#define INLINE inline __attribute__((always_inline))

template<class To, class From> INLINE To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template<class To> INLINE To read(const void* p) {
  To to;
  std::memcpy(&to, p, sizeof to);
  return to;
}
template<class From> INLINE void write(void* p, From from) { std::memcpy(p, &from, sizeof from); }

INLINE Lanes load(const float* p) { return *(const LooseFloats*)p; }
INLINE void store(float* p, Lanes v) { *(LooseFloats*)p = v; }
INLINE Lanes floats_of(Ints v) { return __builtin_convertvector(v, Lanes); }

INLINE Ints nearest(Lanes v) {  // ties to even; never fused with a product before it, so that all variants agree
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32((__m256)v);
#elif defined(__aarch64__)
  return (Ints)vcvtnq_s32_f32((float32x4_t)v);
#else
  Ints n;
  for (int i = 0; i < LANES; i++) n[i] = std::abs(v[i]) < 2e9f ? (int32_t)__builtin_rintf(v[i]) : 0;  // not NaN
  return n;
#endif
}

// Halves of float32, rounded to even
INLINE Ints rounded_to_bfloat16(Lanes v) {
  Ints u = bits<Ints>(v), up = u + 0x7fff + ((u >> 16) & 1);
  return (v == v ? up : (u | 0x400000)) & (int32_t)0xffff0000;
}

// ---- Kinds of weights. A line has UNIT inputs of 16 columns; `add` multiplies it with UNIT inputs of one row

template<class W> struct Kind;

template<> struct Kind<float> {
  using In = float;
  using Sum = Lanes;
  using Weight = Lanes;
  using Input = float;
  static constexpr int UNIT = 1;
  static INLINE Weight weight(const float* line, int part) { return load(line + part * LANES); }
  static INLINE Input input(const In* x, int64_t line) { return x[line]; }
  static INLINE void add(Sum& sum, Weight w, Input x) { sum += x * w; }
  static INLINE Lanes total(Sum sum) { return sum; }
};

#if defined(__AVX512BF16__)
template<> struct Kind<bfloat16> {
  using In = bfloat16;
  using Sum = Lanes;
  using Weight = __m512i;
  using Input = __m512i;
  static constexpr int UNIT = 2;
  static INLINE Weight weight(const bfloat16* line, int) { return _mm512_loadu_si512(line); }
  static INLINE Input input(const In* x, int64_t line) { return _mm512_set1_epi32(read<int32_t>(x + 2 * line)); }
  static INLINE void add(Sum& sum, Weight w, Input x) {
    sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  static INLINE Lanes total(Sum sum) { return sum; }
  static INLINE void narrow(In* to, Lanes v) { write(to, _mm512_cvtneps_pbh((__m512)v)); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template<> struct Kind<bfloat16> {
  using In = bfloat16;
  using Sum = Lanes;
  using Weight = bfloat16x8_t;
  using Input = bfloat16x8_t;
  static constexpr int UNIT = 2;
  static INLINE Weight weight(const bfloat16* line, int part) { return vld1q_bf16((const bfloat16_t*)line + part * 8); }
  static INLINE Input input(const In* x, int64_t line) {
    return vreinterpretq_bf16_s32(vdupq_n_s32(read<int32_t>(x + 2 * line)));
  }
  static INLINE void add(Sum& sum, Weight w, Input x) { sum = (Lanes)vbfdotq_f32((float32x4_t)sum, w, x); }
  static INLINE Lanes total(Sum sum) { return sum; }
  static INLINE void narrow(In* to, Lanes v) {
    write(to, __builtin_convertvector(rounded_to_bfloat16(v) >> 16, Shorts));
  }
};
#else  // no products of bfloat16: two of float32
template<> struct Kind<bfloat16> {
  struct Weight {
    Lanes first, second;
  };
  struct Input {
    float first, second;
  };
  using In = float;
  using Sum = Lanes;
  static constexpr int UNIT = 2;
  static INLINE Weight weight(const bfloat16* line, int part) {
    Ints both = read<Ints>(line + part * LANES * 2);
    return {bits<Lanes>(both << 16), bits<Lanes>(both & (int32_t)0xffff0000)};
  }
  static INLINE Input input(const In* x, int64_t line) { return {x[2 * line], x[2 * line + 1]}; }
  static INLINE void add(Sum& sum, Weight w, Input x) {
    sum += x.first * w.first;
    sum += x.second * w.second;
  }
  static INLINE Lanes total(Sum sum) { return sum; }
  static INLINE void narrow(In* to, Lanes v) { store(to, bits<Lanes>(rounded_to_bfloat16(v))); }
};
#endif

// int8. Instructions that want one factor without a sign get the weight plus OFFSET; `start` of a row takes it back
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template<> struct Kind<int8_t> {
#if defined(__AVX512VNNI__)
  using Register = __m512i;
  static INLINE Register flipped(const void* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  static INLINE Register all(int32_t x) { return _mm512_set1_epi32(x); }
  static INLINE void add(Ints& sum, Register w, Register x) { sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, w, x); }
#else
  using Register = __m256i;
  static INLINE Register flipped(const void* p) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(-128));
  }
  static INLINE Register all(int32_t x) { return _mm256_set1_epi32(x); }
  static INLINE void add(Ints& sum, Register w, Register x) { sum = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, w, x); }
#endif
  using In = int8_t;
  using Sum = Ints;
  using Weight = Register;
  using Input = Register;
  static constexpr int UNIT = 4, OFFSET = 128;
  static INLINE Weight weight(const int8_t* line, int part) { return flipped(line + part * LANES * 4); }
  static INLINE Input input(const In* x, int64_t line) { return all(read<int32_t>(x + 4 * line)); }
  static INLINE Ints total(Sum sum) { return sum; }
};
#elif defined(__AVX2__)  // no products of bytes: pairs of 16 bits
template<> struct Kind<int8_t> {
#if defined(__AVX512BW__)
  using Register = __m512i;
  static INLINE Register wide(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static INLINE Register all(int64_t x) { return _mm512_set1_epi64(x); }
  static INLINE Register times(Register w, Register x) { return _mm512_madd_epi16(w, x); }
  static INLINE Register added(Register a, Register b) { return _mm512_add_epi32(a, b); }
#else
  using Register = __m256i;
  static INLINE Register wide(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static INLINE Register all(int64_t x) { return _mm256_set1_epi64x(x); }
  static INLINE Register times(Register w, Register x) { return _mm256_madd_epi16(w, x); }
  static INLINE Register added(Register a, Register b) { return _mm256_add_epi32(a, b); }
#endif
  struct Pair {  // of half the columns each, of a column two sums
    Register low, high;
    INLINE void operator+=(Pair more) { low = added(low, more.low), high = added(high, more.high); }
  };
  using In = int16_t;
  using Sum = Pair;
  using Weight = Pair;
  using Input = Register;
  static constexpr int UNIT = 4, OFFSET = 0;
  static INLINE Weight weight(const int8_t* line, int part) {
    const int8_t* p = line + part * LANES * 4;
    return {wide(p), wide(p + LANES * 2)};
  }
  static INLINE Input input(const In* x, int64_t line) { return all(read<int64_t>(x + 4 * line)); }
  static INLINE void add(Sum& sum, Weight w, Input x) { sum += {times(w.low, x), times(w.high, x)}; }
  static INLINE Ints total(Sum sum) {
#if defined(__AVX512BW__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    return (Ints)_mm512_permutex2var_epi32(sum.low, even, sum.high) +
           (Ints)_mm512_permutex2var_epi32(sum.low, odd, sum.high);
#else
    return (Ints)_mm256_permute4x64_epi64(_mm256_hadd_epi32(sum.low, sum.high), 0b11011000);
#endif
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
template<> struct Kind<int8_t> {
  using In = int8_t;
  using Sum = Ints;
  using Weight = int8x16_t;
  using Input = int8x16_t;
  static constexpr int UNIT = 4, OFFSET = 0;
  static INLINE Weight weight(const int8_t* line, int part) { return vld1q_s8(line + part * 16); }
  static INLINE Input input(const In* x, int64_t line) {
    return vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(x + 4 * line)));
  }
  static INLINE void add(Sum& sum, Weight w, Input x) { sum = (Ints)vdotq_s32((int32x4_t)sum, w, x); }
  static INLINE Ints total(Sum sum) { return sum; }
};
#else
template<> struct Kind<int8_t> {
  struct Weight {
    Ints of[4];
  };  // the four bytes of each column
  using In = int32_t;
  using Sum = Ints;
  using Input = const int32_t*;
  static constexpr int UNIT = 4, OFFSET = 0;
  static INLINE Weight weight(const int8_t* line, int part) {
    Ints v = read<Ints>(line + part * LANES * 4);
    return {{(v << 24) >> 24, (v << 16) >> 24, (v << 8) >> 24, v >> 24}};
  }
  static INLINE Input input(const In* x, int64_t line) { return x + 4 * line; }
  static INLINE void add(Sum& sum, Weight w, Input x) {
    for (int j = 0; j < 4; j++) sum += w.of[j] * x[j];
  }
  static INLINE Ints total(Sum sum) { return sum; }
};
#endif
template<class W> using In = typename Kind<W>::In;
template<class W> constexpr bool SCALED = std::is_same_v<W, int8_t>;
template<class W> constexpr int64_t STEP = PANEL * Kind<W>::UNIT;  // weights of a line

// ---- Activations, as compecon.kernels.ACTIVATIONS numbers them

INLINE Lanes exponential(Lanes x) {  // Cephes' expf, to 2e-7
  x = x > -87.3f ? x : Lanes{} - 87.3f;
  x = x < 88.3f ? x : Lanes{} + 88.3f;
  Ints n = __builtin_convertvector(x * 1.44269504f + 0.5f, Ints);
  n += __builtin_convertvector(n, Lanes) > x * 1.44269504f + 0.5f;  // floor
  Lanes whole = __builtin_convertvector(n, Lanes);
  x -= whole * 0.693359375f;
  x -= whole * -2.12194440e-4f;
  Lanes p = x * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  return (p * x * x + x + 1.f) * bits<Lanes>((n + 127) << 23);
}

INLINE Lanes normal_cdf(Lanes x) {  // Abramowitz and Stegun 7.1.26, to 1e-7
  Lanes a = bits<Lanes>(bits<Ints>(x) & 0x7fffffff) * 0.70710678f, t = 1.f / (a * 0.3275911f + 1.f);
  Lanes p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Lanes tail = 0.5f * p * t * exponential(-a * a);
  return x < 0.f ? tail : 1.f - tail;
}

INLINE Lanes activate(Lanes x, int64_t activation) {
  switch (activation) {
    case 1:
      return x < 0.f ? Lanes{} : x;
    case 2:
      return x * normal_cdf(x);
    case 3:
      return x / (exponential(-1.5957691216f * (x + 0.044715f * x * x * x)) + 1.f);
    case 4:
      return x / (exponential(-x) + 1.f);
    default:
      return x;
  }
}

// ---- Open sets: pairs of a group and a block, in rising order

struct Open {
  const int64_t *group, *block;
  int64_t pairs, groups;
  std::vector<int64_t> first;  // group g has the pairs from first[g] to first[g + 1]
  std::vector<int64_t> memory;

  Open(const Tensor& group_, const Tensor& block_, int64_t groups, int64_t blocks)
      : group((const int64_t*)group_.data_ptr()),
        block((const int64_t*)block_.data_ptr()),
        pairs(group_.numel()),
        groups(groups),
        first(groups + 1) {
    for (int64_t i = 0; i < pairs; i++) {
      STD_TORCH_CHECK(group[i] >= 0 && group[i] < groups && block[i] >= 0 && block[i] < blocks, "open set: pair (",
                      group[i], ", ", block[i], ") is not one of ", groups, " groups and ", blocks, " blocks");
      STD_TORCH_CHECK(!i || group[i - 1] < group[i] || (group[i - 1] == group[i] && block[i - 1] < block[i]),
                      "open set: pairs must rise, and (", group[i], ", ", block[i], ") does not");
      first[group[i] + 1] = i + 1;
    }
    for (int64_t g = 0; g < groups; g++) first[g + 1] = std::max(first[g], first[g + 1]);
  }

  // From a mask, row g at mask + g*stride
  Open(const bool* mask, int64_t stride, int64_t groups, int64_t blocks)
      : pairs(0), groups(groups), first(groups + 1), memory(2 * groups * blocks) {
    int64_t *groups_of = memory.data(), *blocks_of = groups_of + groups * blocks;
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t b = 0; b < blocks; b++)
        if (mask[g * stride + b]) groups_of[pairs] = g, blocks_of[pairs++] = b;
      first[g + 1] = pairs;
    }
    group = groups_of, block = blocks_of;
  }
  Open(const Open&) = delete;
};

struct ByBlock {
  std::vector<int64_t> pairs, first;
};  // block b is open in pairs[first[b]..first[b + 1])

ByBlock by_block(const Open& open, int64_t blocks) {
  ByBlock by{std::vector<int64_t>(open.pairs), std::vector<int64_t>(blocks + 1)};
  for (int64_t i = 0; i < open.pairs; i++) by.first[open.block[i] + 1]++;
  for (int64_t b = 0; b < blocks; b++) by.first[b + 1] += by.first[b];
  std::vector<int64_t> next(by.first.begin(), by.first.end() - 1);
  for (int64_t i = 0; i < open.pairs; i++) by.pairs[next[open.block[i]]++] = i;
  return by;
}

// ---- One tile

// What to fetch meanwhile. Many rows: pieces of the panels that follow, some with every fourth line. One row waits for
// memory alone, and a processor reads ahead by itself as long as addresses rise; so there it is the start of what
// follows a gap, and for narrow weights, which are used up more slowly than they are asked for, everything
struct Ahead {
  const char* from = nullptr;
  int64_t each = 0;
  const char* end = nullptr;
  int64_t gap = 0;
};
template<class W> constexpr int64_t DISTANCE = sizeof(W) < 4 ? 8192 : 4096;

template<class W, int M, int P> struct Sums {
  typename Kind<W>::Sum of[M][P * PARTS] = {};
};

template<class W, int M, int P>
INLINE void step(Sums<W, M, P>& sums, const In<W>* const (&x)[M], int64_t line, const W* w, int64_t panel) {
  typename Kind<W>::Weight weights[P * PARTS];
  for (int p = 0; p < P; p++)
    for (int q = 0; q < PARTS; q++) weights[p * PARTS + q] = Kind<W>::weight(w + p * panel + line * STEP<W>, q);
  for (int i = 0; i < M; i++) {
    const typename Kind<W>::Input input = Kind<W>::input(x[i], line);
    for (int q = 0; q < P * PARTS; q++) Kind<W>::add(sums.of[i][q], weights[q], input);
  }
}

template<class W, int M> INLINE void fetch(Ahead& ahead, const W* line) {
  if constexpr (M == 1) {
    const char* p = (const char*)line + DISTANCE<W>;
    const bool over = p >= ahead.end;
    if (over || sizeof(W) < 4)
      for (int64_t b = 0; b < 4 * LINE; b += LINE) __builtin_prefetch(p + (over ? ahead.gap : 0) + b, 0, 2);
  } else {
    for (int64_t i = 0; i < ahead.each; i++) __builtin_prefetch(ahead.from + i * LINE, 0, 2);
    ahead.from += ahead.each * LINE;
  }
}

// sums += rows of x times P panels. With few rows several sums run beside each other, for one addition waits for the
// last
template<class W, int M, int P> INLINE void product(Sums<W, M, P>& sums, const In<W>* const (&x)[M], int64_t lines,
                                                    const W* w, int64_t panel, Ahead ahead) {
  constexpr int TILE = M * P * PARTS, CHAINS = TILE >= 6 ? 1 : TILE >= 3 ? 2 : 4;
  Sums<W, M, P> more[CHAINS];
  int64_t k = 0;
  for (; k + 4 <= lines; k += 4) {
    fetch<W, M>(ahead, w + k * STEP<W>);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) step<W, M, P>(j % CHAINS ? more[j % CHAINS] : sums, x, k + j, w, panel);
  }
  for (; k < lines; k++) step<W, M, P>(sums, x, k, w, panel);
  for (int c = 1; c < CHAINS; c++)
    for (int i = 0; i < M; i++)
      for (int q = 0; q < P * PARTS; q++) sums.of[i][q] += more[c].of[i][q];
}

// Calls f<M>(first row, rows, tiles) for tiles of nearly the same height, of which M is at least the rows
template<class F, int... M> INLINE void of_height(int64_t rows, F&& f, std::integer_sequence<int, M...>) {
  (void)((rows <= M && (f.template operator()<M>(), true)) || ...);
}

#if defined(MATRIX_UNIT)
template<class W> constexpr int HEIGHT = std::is_same_v<W, float> ? ROWS : 16;
#else
template<class W> constexpr int HEIGHT = ROWS;
#endif

template<class W, class F> INLINE void tiles(int64_t rows, F&& f) {
  constexpr int most = HEIGHT<W>;
  const int64_t n = (rows + most - 1) / most;
  for (int64_t i = 0, r = 0; i < n; i++) {
    const int64_t m = n < 3 ? rows / n + (i < rows % n) : std::min<int64_t>(most, rows - r);
#if defined(__AVX512F__)
    using Heights = std::integer_sequence<int, 1, 2, 4, 6, 8, 10, 12, most>;
#else
    using Heights = std::integer_sequence<int, 1, 2, 3, 4, 5, 6>;
#endif
    of_height(m, [&]<int M>() { f.template operator()<M>(r, m, n); }, Heights());
    r += m;
  }
}

// Calls f<P>() for as many panels side by side
template<class F> INLINE void of_panels(int64_t panels, F&& f) {
  if constexpr (TOGETHER > 1)
    if (panels == 2) return f.template operator()<2>();
  f.template operator()<1>();
}

INLINE int64_t panels_at(int64_t p, int64_t end, int64_t rows) {
  return rows > 1 && p + TOGETHER <= end ? TOGETHER : 1;
}

// ---- Matrix units (AMX). One instruction multiplies 16 rows of 64 bytes with 16 lines of a panel, as they lie in
// memory

#if defined(MATRIX_UNIT)
struct Settings {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
#if defined(COMPECON_EMULATE_AMX)  // for tests: what the instructions do, in plain C++
struct Emulated {
  uint8_t rows[8] = {};
  uint16_t bytes[8] = {};
  uint8_t data[8][16][64] = {};
};
static thread_local Emulated emulated;
template<int T> void tile_zero() { std::memset(emulated.data[T], 0, sizeof emulated.data[T]); }
template<int T> void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < emulated.rows[T]; r++)
    std::memcpy(emulated.data[T][r], (const char*)from + r * stride, emulated.bytes[T]);
}
template<int T> void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < emulated.rows[T]; r++)
    std::memcpy((char*)to + r * stride, emulated.data[T][r], emulated.bytes[T]);
}
template<class W, int C, int A, int B> void tile_product() {
  constexpr int UNIT = Kind<W>::UNIT;
  using Sum = std::conditional_t<UNIT == 4, int32_t, float>;
  for (int r = 0; r < emulated.rows[A]; r++)
    for (int c = 0; c < 16; c++) {
      Sum sum = read<Sum>(emulated.data[C][r] + 4 * c);
      for (int k = 0; k < emulated.bytes[A] / 4; k++)
        for (int j = 0; j < UNIT; j++) {
          const uint8_t *a = emulated.data[A][r] + 4 * k + j * (4 / UNIT),
                        *b = emulated.data[B][k] + 4 * c + j * (4 / UNIT);
          if constexpr (UNIT == 4) sum += (int8_t)*a * (int8_t)*b;
          else sum += bits<float>(read<uint16_t>(a) << 16) * bits<float>(read<uint16_t>(b) << 16);
        }
      write(emulated.data[C][r] + 4 * c, sum);
    }
}
void tile_configure(const Settings& s) {
  for (int t = 0; t < 8; t++) emulated.rows[t] = s.rows[t], emulated.bytes[t] = s.bytes[t];
}
void tile_release() {}
const bool matrix_allowed = true;
#else
// Written out: the compiler's own names for these take no template's numbers, and do not say what memory they read
template<int T> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template<int T> INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template<int T> INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template<class W, int C, int A, int B> INLINE void tile_product() {
  if constexpr (SCALED<W>) asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
INLINE void tile_configure(const Settings& s) { asm volatile("ldtilecfg %0" ::"m"(s) : "memory"); }
INLINE void tile_release() { asm volatile("tilerelease"); }
const bool matrix_allowed = syscall(SYS_arch_prctl, 0x1023 /* ask for permission */, 18 /* to use tile data */) == 0;
#endif
#endif

// Sums of a tile in the matrix unit: `begin`, any number of `add`, `end`
template<class W> struct MatrixUnit {
#if defined(MATRIX_UNIT)
  int64_t rows = 0, depth = 0, stride = 0;
  ~MatrixUnit() {
    if (rows) tile_release();
  }

  // Does it take so many rows? They must lie at equal distances, and lines must make whole steps
  bool begin(const In<W>* const* x, int64_t m, int64_t lines) {
    if constexpr (std::is_same_v<W, float>) return false;
    if (!matrix_allowed || m < 4 || lines % 4 || !lines) return false;
    for (int64_t i = 2; i < m; i++)
      if (x[i] - x[i - 1] != x[1] - x[0]) return false;
    stride = (const char*)x[1] - (const char*)x[0];
    const int64_t step = lines % 16 == 0 ? 16 : lines % 8 == 0 ? 8 : 4;
    if (rows != m || depth != step) {
      rows = m, depth = step;
      Settings settings;
      for (int t : {0, 1}) settings.rows[t] = m, settings.bytes[t] = 64;     // sums
      settings.rows[2] = m, settings.bytes[2] = 4 * step;                    // inputs
      for (int t : {3, 4}) settings.rows[t] = step, settings.bytes[t] = 64;  // lines
      tile_configure(settings);
    }
    tile_zero<0>(), tile_zero<1>();
    return true;
  }

  template<int P> void add(const In<W>* x, int64_t lines, const W* w, int64_t panel, Ahead ahead) {
    if constexpr (!std::is_same_v<W, float>)
      for (int64_t k = 0; k < lines; k += depth) {
        for (int64_t j = 0; j < depth; j += 4) fetch<W, 2>(ahead, w);
        tile_load<2>((const char*)x + 4 * k, stride);
        tile_load<3>(w + k * STEP<W>, LINE);
        tile_product<W, 0, 2, 3>();
        if constexpr (P == 2) tile_load<4>(w + panel + k * STEP<W>, LINE), tile_product<W, 1, 2, 4>();
      }
  }

  template<int M, int P> void end(Sums<W, M, P>& sums) {
    if constexpr (!std::is_same_v<W, float>) {
      alignas(64) float memory[2][16][16];
      tile_store<0>(memory[0], 64), tile_store<1>(memory[1], 64);
      for (int i = 0; i < std::min<int64_t>(M, rows); i++)
        for (int p = 0; p < P; p++) sums.of[i][p] = read<typename Kind<W>::Sum>(memory[p][i]);
    }
  }
#else
  bool begin(const In<W>* const*, int64_t, int64_t) { return false; }
  template<int P> void add(const In<W>*, int64_t, const W*, int64_t, Ahead) {}
  template<int M, int P> void end(Sums<W, M, P>&) {}
#endif
};

// ---- Inputs as a kind wants them: rows in a type of its own, and for int8 each with a scale and a start for its sums

template<class W> struct Inputs {
  const In<W>* data;
  int64_t pair, row;  // row r of pair i is at data + i*pair + r*row
  std::unique_ptr<In<W>[]> memory;
  std::vector<float> scale;  // of each row of each group
  std::vector<int32_t> start;
  const In<W>* at(int64_t i, int64_t r) const { return data + i * pair + r * row; }
};

struct Scale {
  float by, back;
};  // what a row is multiplied by, and its product after that

INLINE Scale scale_of(float largest, bool finite) {
  if (!finite) return {0.f, NAN};
  return largest < 1e-30f ? Scale{0.f, 0.f} : Scale{127.f / largest, largest / 127.f};
}

// The largest number of a stretch of `n`, and nothing but zero in `odd` while all are finite
INLINE void largest_of(const float* x, int64_t n, float& largest, float& odd) {
  Lanes most{}, zero{};
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) {
    const Lanes v = load(x + c), a = bits<Lanes>(bits<Ints>(v) & 0x7fffffff);
    most = a > most ? a : most;
    zero += v * 0.f;
  }
  for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]), odd += zero[i];
  for (; c < n; c++) largest = std::max(largest, std::abs(x[c])), odd += x[c] * 0.f;
}

// Writes `n` numbers in the kind's type; of int8 gives their sum. `by` is 0 for rows that are not finite, too
template<class W> INLINE int32_t narrow(const float* x, int64_t n, float by, In<W>* to) {
  if (SCALED<W> && by == 0) return std::fill(to, to + n, In<W>()), 0;
  Ints sum{};
  auto lanes = [&](Lanes v, In<W>* at) {
    if constexpr (SCALED<W>) {
      typedef In<W> Narrow __attribute__((vector_size(LANES * sizeof(In<W>))));
      const Ints n = nearest(v * by);
      sum += n;
      write(at, __builtin_convertvector(n, Narrow));
    } else Kind<W>::narrow(at, v);
  };
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) lanes(load(x + c), to + c);
  if (c < n) {
    float rest[LANES] = {};
    In<W> narrowed[LANES];
    std::copy(x + c, x + n, rest);
    lanes(load(rest), narrowed);
    std::copy(narrowed, narrowed + (n - c), to + c);
  }
  int32_t total = 0;
  for (int i = 0; i < LANES; i++) total += sum[i];
  return total;
}

template<class F> void for_rows(int64_t rows, int64_t width, F&& f) {
  if (rows * width < 1 << 16) return f(0, rows);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t a, int64_t b) { f(a, b); });
}

struct Rows {
  float* data;
  int64_t rows, width;
};  // row r of group g is at data + (g*rows + r)*width
struct Features {
  float* data;
  int64_t pair, row;
};  // row r of pair i is at data + i*pair + r*row

// Rows of x
template<class W> Inputs<W> inputs_of(Rows x, int64_t groups) {
  if constexpr (std::is_same_v<W, float>) return {x.data, x.rows * x.width, x.width, {}, {}, {}};
  else {
    const int64_t rows = groups * x.rows;
    std::unique_ptr<In<W>[]> memory(new In<W>[rows * x.width]);
    std::vector<float> scale(SCALED<W> ? rows : 0);
    std::vector<int32_t> start(scale.size());
    for_rows(rows, x.width, [&](int64_t a, int64_t b) {
      for (int64_t r = a; r < b; r++) {
        const float* row = x.data + r * x.width;
        Scale by{1.f, 1.f};
        if constexpr (SCALED<W>) {
          float largest = 0, odd = 0;
          largest_of(row, x.width, largest, odd);
          by = scale_of(largest, odd == 0);
        }
        const int32_t sum = narrow<W>(row, x.width, by.by, memory.get() + r * x.width);
        if constexpr (SCALED<W>) scale[r] = by.back, start[r] = -Kind<W>::OFFSET * sum;
      }
    });
    const In<W>* data = memory.get();
    return {data, x.rows * x.width, x.width, std::move(memory), std::move(scale), std::move(start)};
  }
}

// Features of pairs; a row is scaled over all that its group has open
template<class W> Inputs<W> inputs_of(Features h, const Open& open, int64_t rows, int64_t width) {
  if constexpr (std::is_same_v<W, float>) return {h.data, h.pair, h.row, {}, {}, {}};
  else {
    std::unique_ptr<In<W>[]> memory(new In<W>[open.pairs * rows * width]);
    std::vector<float> scale(SCALED<W> ? open.groups * rows : 0);
    std::vector<int32_t> start(scale.size());
    for_rows(open.groups * rows, open.pairs * width / std::max<int64_t>(1, open.groups), [&](int64_t a, int64_t b) {
      for (int64_t n = a; n < b; n++) {
        const int64_t g = n / rows, r = n % rows;
        Scale by{1.f, 1.f};
        if constexpr (SCALED<W>) {
          float largest = 0, odd = 0;
          for (int64_t i = open.first[g]; i < open.first[g + 1]; i++)
            largest_of(h.data + i * h.pair + r * h.row, width, largest, odd);
          by = scale_of(largest, odd == 0);
        }
        int32_t sum = 0;
        for (int64_t i = open.first[g]; i < open.first[g + 1]; i++)
          sum += narrow<W>(h.data + i * h.pair + r * h.row, width, by.by, memory.get() + (i * rows + r) * width);
        if constexpr (SCALED<W>) scale[n] = by.back, start[n] = -Kind<W>::OFFSET * sum;
      }
    });
    const In<W>* data = memory.get();
    return {data, rows * width, width, std::move(memory), std::move(scale), std::move(start)};
  }
}

// ---- Panels for many rows; `at(r)` says where row r is read and written

template<class W> struct Row {
  const In<W>* x;
  float* y;
  float scale;
  int32_t start;
};

template<class W> Row<W> row_of(const Inputs<W>& x, int64_t pair, int64_t r, int64_t number, float* y) {
  if constexpr (SCALED<W>) return {x.at(pair, r), y, x.scale[number], x.start[number]};
  else return {x.at(pair, r), y, 1.f, 0};
}

template<class W> struct Weights {
  const W* w;
  const float *scale, *bias;
  int64_t blocks, panels, lines;                    // (blocks, panels, lines, 16, UNIT)
  int64_t size() const { return lines * STEP<W>; }  // of a panel
  const W* panel(int64_t block, int64_t p) const { return w + (block * panels + p) * size(); }
};

enum class Write { FIRST, TIMES, SUM };  // set; set to the product with what is there; add sums as they are

// Columns of LANES: a sum as a number, with its scales and bias
template<class W>
INLINE Lanes value(typename Kind<W>::Sum sum, const Row<W>& row, const float* scale, const float* bias) {
  Lanes v;
  if constexpr (SCALED<W>) v = floats_of(Kind<W>::total(sum) + row.start) * (load(scale) * row.scale);
  else v = Kind<W>::total(sum);
  return bias ? v + load(bias) : v;
}

template<class W, int M, int P> INLINE void put(const Sums<W, M, P>& sums, const Row<W> (&rows)[M], int64_t m,
                                                const float* scale, const float* bias, int64_t activation,
                                                Write write) {
  for (int i = 0; i < M; i++)
    if (i < m)
      for (int q = 0; q < P * PARTS; q++) {
        float* out = rows[i].y + q * LANES;
        if (write == Write::SUM) {
          if constexpr (SCALED<W>) *(LooseInts*)out += Kind<W>::total(sums.of[i][q]);
          else store(out, load(out) + Kind<W>::total(sums.of[i][q]));
          continue;
        }
        Lanes v = activate(value<W>(sums.of[i][q], rows[i], scale + q * LANES, bias ? bias + q * LANES : nullptr),
                           activation);
        store(out, write == Write::FIRST ? v : v * load(out));
      }
}

// `next` follows these panels, and weights are read without a gap up to `end`
template<class W, class At> void panel_rows(const W* w, int64_t panels, int64_t lines, const float* scale,
                                            const float* bias, int64_t rows, At at, int64_t activation, Write write,
                                            const W* next, const W* end) {
  MatrixUnit<W> unit;
  of_panels(panels, [&]<int P>() {
    tiles<W>(rows, [&]<int M>(int64_t first, int64_t m, int64_t n) {
      Row<W> row[M];
      const In<W>* x[M];
      for (int i = 0; i < M; i++) row[i] = at(first + std::min<int64_t>(i, m - 1)), x[i] = row[i].x;
      Ahead ahead{nullptr, 0, (const char*)end, next ? (const char*)next - (const char*)end : 0};
      if (M > 1 && next) {  // a share of it for each tile
        ahead.each = (4 * P + n - 1) / n;
        ahead.from = (const char*)next + first * P * lines / rows * LINE;
      }
      Sums<W, M, P> sums;
      if (write != Write::SUM && unit.begin(x, m, lines)) {  // sums that are to be added have the offset of all others
        unit.template add<P>(x[0], lines, w, lines * STEP<W>, ahead);
        unit.template end<M, P>(sums);
        for (Row<W>& r : row) r.start = 0;  // its weights have no offset
      } else product<W, M, P>(sums, x, lines, w, lines * STEP<W>, ahead);
      put<W, M, P>(sums, row, m, scale, bias, activation, write);
    });
  });
}

// ---- Up

INLINE const float* at_or_null(const float* p, int64_t i) { return p ? p + i : nullptr; }

// Panels q0 to q1 of all pairs of a group, for rows r0 to r0 + rows of it
template<class W> void up_group(const Weights<W>& w, const Open& open, int64_t g, const Inputs<W>& x,
                                int64_t group_rows, int64_t r0, int64_t rows, int64_t q0, int64_t q1, Features h,
                                int64_t activation, Write write) {
  for (int64_t q = q0, together; q < q1; q += together) {
    const int64_t i = open.first[g] + q / w.panels, p = q % w.panels, b = open.block[i];
    together = panels_at(p, std::min(w.panels, p + q1 - q), rows);
    const int64_t after = q + together, j = open.first[g] + after / w.panels;
    const W* next = after == q1 ? nullptr : w.panel(open.block[j], after % w.panels);
    const int64_t column = (b * w.panels + p) * PANEL;
    auto at = [&](int64_t r) {
      return row_of(x, g, r0 + r, g * group_rows + r0 + r, h.data + i * h.pair + (r0 + r) * h.row + p * PANEL);
    };
    panel_rows(w.panel(b, p), together, w.lines, at_or_null(w.scale, column), at_or_null(w.bias, column), rows, at,
               activation, write, next, w.panel(b, p + together));
  }
}

// A set for each token: block by block, for the tokens that have it open
template<class W>
void up_tokens(const Weights<W>& w, const Open& open, const Inputs<W>& x, Features h, int64_t activation, Write write) {
  const ByBlock by = by_block(open, w.blocks);
  torch::stable::parallel_for(0, w.blocks, 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; b++) {
      const int64_t *pairs = by.pairs.data() + by.first[b], rows = by.first[b + 1] - by.first[b];
      for (int64_t p = 0, together; p < w.panels; p += together) {
        together = panels_at(p, w.panels, rows);
        auto at = [&](int64_t r) {
          const int64_t i = pairs[r], g = open.group[i];
          return row_of(x, g, 0, g, h.data + i * h.pair + p * PANEL);
        };
        const int64_t column = (b * w.panels + p) * PANEL;
        if (rows)
          panel_rows(w.panel(b, p), together, w.lines, at_or_null(w.scale, column), at_or_null(w.bias, column), rows,
                     at, activation, write, (const W*)nullptr, w.panel(b, p + together));
      }
    }
  });
}

struct Chunks {  // of rows, of nearly the same height
  int64_t rows, number, height;
  explicit Chunks(int64_t rows)
      : rows(rows),
        number(std::max<int64_t>(1, (rows + CHUNK - 1) / CHUNK)),
        height(((rows + number - 1) / number + ROWS - 1) / ROWS * ROWS) {}
  int64_t first(int64_t c) const { return std::min(rows, c * height); }
  int64_t size(int64_t c) const { return first(c + 1) - first(c); }
};

// Calls f(group, chunk, first panel, end) so that all threads have work: chunks of rows if there are many, else panels
template<class Count, class F> void share_out(int64_t groups, const Chunks& chunks, Count panels_of, F f) {
  using torch::stable::parallel_for;
  if (groups * chunks.number >= torch::stable::get_num_threads())
    parallel_for(0, groups * chunks.number, 1, [&](int64_t a, int64_t b) {
      for (; a < b; a++) f(a / chunks.number, a % chunks.number, 0, panels_of(a / chunks.number));
    });
  else
    for (int64_t g = 0; g < groups; g++)
      parallel_for(0, panels_of(g), 1, [&](int64_t p0, int64_t p1) {
        for (int64_t c = 0; c < chunks.number; c++) f(g, c, p0, p1);
      });
}

template<class W> void up(const Weights<W>& w, const Open& open, const Inputs<W>& x, int64_t rows, Features h,
                          int64_t activation, Write write) {
  if (rows == 1 && open.groups > 1) return up_tokens(w, open, x, h, activation, write);
  const Chunks chunks(rows);
  auto panels_of = [&](int64_t g) { return (open.first[g + 1] - open.first[g]) * w.panels; };
  share_out(open.groups, chunks, panels_of, [&](int64_t g, int64_t c, int64_t q0, int64_t q1) {
    if (chunks.size(c)) up_group(w, open, g, x, rows, chunks.first(c), chunks.size(c), q0, q1, h, activation, write);
  });
}

// ---- Down

// Panels p0 to p1, for some rows of a group: sums stay in registers for all of its blocks
template<class W> void down_panels(const Weights<W>& w, const Open& open, int64_t g, const Inputs<W>& h, Rows y,
                                   int64_t r0, int64_t rows, int64_t p0, int64_t p1) {
  const int64_t i0 = open.first[g], i1 = open.first[g + 1];
  MatrixUnit<W> unit;
  for (int64_t p = p0, together; p < p1; p += together) {
    together = panels_at(p, p1, rows);
    of_panels(together, [&]<int P>() {
      tiles<W>(rows, [&]<int M>(int64_t first, int64_t m, int64_t n) {
        const int64_t every = std::min<int64_t>(n, 8);
        const int64_t mine = first * n / rows % every;  // of so many blocks this tile fetches the next panels
        Sums<W, M, P> sums;
        bool whole = false;  // in the matrix unit
        for (int64_t i = i0; i < i1; i++) {
          const In<W>* x[M];
          for (int r = 0; r < M; r++) x[r] = h.at(i, r0 + first + std::min<int64_t>(r, m - 1));
          const W* panel = w.panel(open.block[i], p);
          Ahead ahead{nullptr, 0, nullptr, 0};
          if (M > 1 && p + P < p1 && (i - i0) % every == mine)
            ahead = {(const char*)(panel + P * w.size()), 4 * P, nullptr, 0};
          if (i == i0) whole = unit.begin(x, m, w.lines);
          if (whole) unit.template add<P>(x[0], w.lines, panel, w.size(), ahead);
          else product<W, M, P>(sums, x, w.lines, panel, w.size(), ahead);
        }
        if (whole) unit.template end<M, P>(sums);
        Row<W> row[M];
        for (int r = 0; r < M; r++) {
          const int64_t here = r0 + first + std::min<int64_t>(r, m - 1), n = g * y.rows + here;
          row[r] = row_of(h, i0, here, n, y.data + n * y.width + p * PANEL);
          if (whole) row[r].start = 0;  // its weights have no offset
        }
        put<W, M, P>(sums, row, m, at_or_null(w.scale, p * PANEL), at_or_null(w.bias, p * PANEL), 0, Write::FIRST);
      });
    });
  }
}

// Block by block, so that each is read as one stream; for few rows, and for those that have sets of their own. Sums lie
// in y, integers too, and become numbers at the end
template<class W> void down_blocks(const Weights<W>& w, const Open& open, const ByBlock& by, const Inputs<W>& h, Rows y,
                                   int64_t p0, int64_t p1) {
  const int64_t all = open.groups * y.rows, columns = (p1 - p0) * PANEL;
  const bool one = y.rows == 1;  // row of each group; otherwise there is one group
  for (int64_t n = 0; n < all; n++) std::memset(y.data + n * y.width + p0 * PANEL, 0, columns * sizeof(float));
  for (int64_t b = 0; b < w.blocks; b++) {
    const int64_t *pairs = by.pairs.data() + by.first[b], rows = (by.first[b + 1] - by.first[b]) * y.rows;
    if (!rows) continue;
    int64_t later = b + 1;
    while (later < w.blocks && by.first[later] == by.first[later + 1]) later++;
    const W* after = later < w.blocks ? w.panel(later, p0) : nullptr;
    for (int64_t p = p0, together; p < p1; p += together) {
      together = panels_at(p, p1, rows);
      auto at = [&](int64_t r) {
        const int64_t i = pairs[one ? r : 0], row = one ? 0 : r, n = open.group[i] * y.rows + row;
        return row_of(h, i, row, n, y.data + n * y.width + p * PANEL);
      };
      const W* next = rows > 1 && p + together < p1 ? w.panel(b, p + together) : after;
      panel_rows(w.panel(b, p), together, w.lines, nullptr, nullptr, rows, at, 0, Write::SUM, next, w.panel(b, p1));
    }
  }
  for (int64_t n = 0; n < all; n++)
    for (int64_t c = p0 * PANEL; c < p1 * PANEL; c += LANES) {
      float* at = y.data + n * y.width + c;
      Lanes v = load(at);
      if constexpr (SCALED<W>) v = floats_of(bits<Ints>(v) + h.start[n]) * (load(w.scale + c) * h.scale[n]);
      store(at, w.bias ? v + load(w.bias + c) : v);
    }
}

template<class W> void down(const Weights<W>& w, const Open& open, const Inputs<W>& h, Rows y) {
  constexpr int64_t FEW = sizeof(W) < 4 ? 1 : 8;
  if (y.rows * (open.groups == 1 ? 1 : FEW) <= FEW) {
    const ByBlock by = by_block(open, w.blocks);
    torch::stable::parallel_for(0, w.panels, 1,
                                [&](int64_t p0, int64_t p1) { down_blocks(w, open, by, h, y, p0, p1); });
    return;
  }
  const Chunks chunks(y.rows);
  share_out(
      open.groups, chunks, [&](int64_t) { return w.panels; },
      [&](int64_t g, int64_t c, int64_t p0, int64_t p1) {
        if (chunks.size(c)) down_panels(w, open, g, h, y, chunks.first(c), chunks.size(c), p0, p1);
      });
}

// ---- The operators

float* floats(const Tensor& t) { return (float*)t.data_ptr(); }
bool is(const Tensor& t, Type type) { return t.scalar_type() == type; }

template<class W> Weights<W> weights(const Tensor& w, const Maybe& scale, const Maybe& bias) {
  return {(const W*)w.data_ptr(),
          scale ? floats(*scale) : nullptr,
          bias ? floats(*bias) : nullptr,
          w.size(0),
          w.size(1),
          w.size(2)};
}

template<class F> void with_weights(const Tensor& w, const Maybe& scale, const Maybe& bias, F f) {
  switch (w.scalar_type()) {
    case Type::Float:
      return f(weights<float>(w, scale, bias));
    case Type::BFloat16:
      return f(weights<bfloat16>(w, scale, bias));
    default:
      return f(weights<int8_t>(w, scale, bias));
  }
}

int64_t unit(const Tensor& w) { return is(w, Type::Char) ? 4 : is(w, Type::BFloat16) ? 2 : 1; }

void check(const char* name, const Tensor& w, const Maybe& scale, const Maybe& bias, int64_t inputs, bool wide) {
  const int64_t outputs = w.size(1) * PANEL * (wide ? w.size(0) : 1);
  STD_TORCH_CHECK(w.size(3) == PANEL && w.is_contiguous(), name,
                  ": weights must be packed, (blocks, panels, lines, 16, unit)");
  STD_TORCH_CHECK(!is(w, Type::Char) || inputs * (wide ? 1 : w.size(0)) <= 131072, name,
                  ": sums of int8 hold 131072 inputs, and there are more");
  STD_TORCH_CHECK(w.size(2) * unit(w) == inputs, name, ": weights for ", w.size(2) * unit(w), " inputs, and there are ",
                  inputs);
  for (const Maybe* t : {&scale, &bias})
    STD_TORCH_CHECK(!*t || (is(**t, Type::Float) && (*t)->numel() == outputs && (*t)->is_contiguous()), name,
                    ": bias and scale must be ", outputs, " numbers of float32");
}

// float32 inputs with weights in lines of their type; others are left to the reference
bool served(const Tensor& x, const Tensor& w, const Maybe& scale, const Maybe& bias) {
  STD_TORCH_CHECK(is(w, Type::Char) == scale.has_value(), "int8 weights need a scale, and others have none");
  const bool narrow = is(w, Type::BFloat16) || is(w, Type::Char),
             lines = narrow ? w.dim() == 5 && w.size(4) == unit(w) : w.dim() == 4;
  return is(x, Type::Float) && (narrow || is(w, Type::Float)) && lines && (!bias || is(*bias, Type::Float));
}

void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation ", activation, " is none of 0 to 4");
}

void check_open(const Tensor& group, const Tensor& block) {
  for (const Tensor* t : {&group, &block})
    STD_TORCH_CHECK(t->dim() == 1 && is(*t, Type::Long) && t->is_contiguous(),
                    "open set: groups and blocks must be vectors of int64");
  STD_TORCH_CHECK(group.numel() == block.numel(), "open set: ", group.numel(), " groups and ", block.numel(),
                  " blocks");
}

// The dispatcher knows the reference under another name
template<class... A> Tensor reference(const char* name, const A&... a) {
  std::array<StableIValue, sizeof...(A)> stack{torch::stable::detail::from(a)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor features(const Tensor& x, int64_t pairs, int64_t rows, int64_t width, bool rows_first) {
  if (!rows_first) return torch::stable::new_empty(x, {pairs, rows, width});
  Tensor h = torch::stable::new_empty(x, {rows, pairs, width});
  return torch::stable::transpose(h, 0, 1);
}

Tensor op_up(const Tensor& x_, const Tensor& w, const Maybe& scale, const Maybe& bias, const Tensor& group,
             const Tensor& block, int64_t activation, bool rows_first) {
  check_activation(activation);
  if (!served(x_, w, scale, bias))
    return reference("compecon::up_reference", x_, w, scale, bias, group, block, activation, rows_first);
  STD_TORCH_CHECK(x_.dim() == 3, "up: x must be (groups, rows, inputs)");
  check("up", w, scale, bias, x_.size(2), true);
  check_open(group, block);
  Tensor x = torch::stable::contiguous(x_), h = features(x, group.numel(), x.size(1), w.size(1) * PANEL, rows_first);
  Open open(group, block, x.size(0), w.size(0));
  with_weights(w, scale, bias, [&]<class W>(Weights<W> weights) {
    const Inputs<W> inputs = inputs_of<W>(Rows{floats(x), x.size(1), x.size(2)}, x.size(0));
    up(weights, open, inputs, x.size(1), Features{floats(h), h.stride(0), h.stride(1)}, activation, Write::FIRST);
  });
  return h;
}

Tensor op_down(const Tensor& h_, const Tensor& w, const Maybe& scale, const Maybe& bias, const Tensor& group,
               const Tensor& block, int64_t groups) {
  if (!served(h_, w, scale, bias))
    return reference("compecon::down_reference", h_, w, scale, bias, group, block, groups);
  STD_TORCH_CHECK(h_.dim() == 3, "down: features must be (pairs, rows, width)");
  check("down", w, scale, bias, h_.size(2), false);
  check_open(group, block);
  STD_TORCH_CHECK(h_.size(0) == group.numel(), "down: features of ", h_.size(0), " pairs, and ", group.numel(),
                  " are open");
  STD_TORCH_CHECK(h_.size(2) % PANEL == 0, "down: features of ", h_.size(2), ", and a block has a multiple of 16");
  Tensor h = h_.size(2) > 0 && h_.stride(2) == 1 ? h_ : torch::stable::contiguous(h_),
         y = torch::stable::new_empty(h, {groups, h.size(1), w.size(1) * PANEL});
  Open open(group, block, groups, w.size(0));
  with_weights(w, scale, bias, [&]<class W>(Weights<W> weights) {
    const Inputs<W> inputs = inputs_of<W>(Features{floats(h), h.stride(0), h.stride(1)}, open, h.size(1), h.size(2));
    down(weights, open, inputs, Rows{floats(y), h.size(1), y.size(2)});
  });
  return y;
}

struct Projection {
  const Tensor& w;
  const Maybe &scale, &bias;
};

// A feed-forward network for rows that lie together
void ffn_rows(const Projection& first, const Projection* gate, const Projection& second, const Open& open, Rows x,
              Rows y, int64_t width, int64_t activation) {
  std::unique_ptr<float[]> memory(new float[open.pairs * x.rows * width]);
  const Features h{memory.get(), x.rows * width, width};
  auto project = [&](const Projection& p, int64_t act, Write write) {
    with_weights(p.w, p.scale, p.bias,
                 [&]<class W>(Weights<W> w) { up(w, open, inputs_of<W>(x, open.groups), x.rows, h, act, write); });
  };
  project(first, gate ? 0 : activation, Write::FIRST);
  if (gate) project(*gate, activation, Write::TIMES);
  with_weights(second.w, second.scale, second.bias,
               [&]<class W>(Weights<W> w) { down(w, open, inputs_of<W>(h, open, x.rows, width), y); });
}

// Chunks of rows one after the other, if there is one set for all: their features stay in the cache between up and down
void ffn(const Projection& first, const Projection* gate, const Projection& second, const Open& open, Rows x, Rows y,
         int64_t width, int64_t activation) {
  const int64_t threads = torch::stable::get_num_threads();
  if (open.groups > 1 || x.rows < threads * CHUNK / 2)
    return ffn_rows(first, gate, second, open, x, y, width, activation);
  const int64_t chunks = std::max(threads, (x.rows + CHUNK - 1) / CHUNK);
  const int64_t height = ((x.rows + chunks - 1) / chunks + ROWS - 1) / ROWS * ROWS;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t a, int64_t b) {
    for (; a < b; a++)
      if (const int64_t r = a * height, rows = std::min(height, x.rows - r); rows > 0)
        ffn_rows(first, gate, second, open, Rows{x.data + r * x.width, rows, x.width},
                 Rows{y.data + r * y.width, rows, y.width}, width, activation);
  });
}

Tensor op_ffn(const Tensor& x_, const Tensor& up_w, const Maybe& up_scale, const Maybe& up_bias, const Maybe& gate_w,
              const Maybe& gate_scale, const Maybe& gate_bias, const Tensor& down_w, const Maybe& down_scale,
              const Maybe& down_bias, const Tensor& group, const Tensor& block, int64_t activation) {
  check_activation(activation);
  if (!served(x_, up_w, up_scale, up_bias) || !served(x_, down_w, down_scale, down_bias) ||
      (gate_w && !served(x_, *gate_w, gate_scale, gate_bias)))
    return reference("compecon::ffn_reference", x_, up_w, up_scale, up_bias, gate_w, gate_scale, gate_bias, down_w,
                     down_scale, down_bias, group, block, activation);
  STD_TORCH_CHECK(x_.dim() == 3, "ffn: x must be (groups, rows, inputs)");
  const int64_t width = up_w.size(1) * PANEL;
  check("ffn, up", up_w, up_scale, up_bias, x_.size(2), true);
  check("ffn, down", down_w, down_scale, down_bias, width, false);
  check_open(group, block);
  if (gate_w) {
    check("ffn, gate", *gate_w, gate_scale, gate_bias, x_.size(2), true);
    STD_TORCH_CHECK(gate_w->size(0) == up_w.size(0) && gate_w->size(1) == up_w.size(1),
                    "ffn: gate and up must have the same shape");
  }
  STD_TORCH_CHECK(down_w.size(0) == up_w.size(0), "ffn: ", up_w.size(0), " blocks up and ", down_w.size(0), " down");
  Tensor x = torch::stable::contiguous(x_),
         y = torch::stable::new_empty(x, {x.size(0), x.size(1), down_w.size(1) * PANEL});
  Open open(group, block, x.size(0), up_w.size(0));
  const Projection first{up_w, up_scale, up_bias}, second{down_w, down_scale, down_bias};
  std::optional<Projection> gate;
  if (gate_w) gate.emplace(Projection{*gate_w, gate_scale, gate_bias});
  ffn(first, gate ? &*gate : nullptr, second, open, Rows{floats(x), x.size(1), x.size(2)},
      Rows{floats(y), x.size(1), y.size(2)}, width, activation);
  return y;
}

// ---- Whole sub-layers: what a sub-layer writes is added to its input, and normed

struct Norm {
  const float *weight, *bias;
  float eps;
};

// y = norm(x + y), for rows of `width`, a multiple of 16
void add_and_norm(const float* x, float* y, int64_t rows, int64_t width, Norm norm) {
  auto sum_of = [](Lanes v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
  };
  for (int64_t r = 0; r < rows; r++, x += width, y += width) {
    Lanes sum{}, squares{};
    for (int64_t c = 0; c < width; c += LANES) {
      const Lanes v = load(x + c) + load(y + c);
      store(y + c, v);
      sum += v;
    }
    const float mean = sum_of(sum) / width;
    for (int64_t c = 0; c < width; c += LANES) {
      const Lanes v = load(y + c) - mean;
      squares += v * v;
    }
    const float by = 1 / std::sqrt(sum_of(squares) / width + norm.eps);
    for (int64_t c = 0; c < width; c += LANES)
      store(y + c, (load(y + c) - mean) * by * load(norm.weight + c) + load(norm.bias + c));
  }
}

// What is added to the scores of a sequence: rows of `keys`, a multiple of 16; closed keys, and those beyond the last
// token, are minus infinity. One row serves all where the mask has no other
struct Mask {
  const char* data = nullptr;
  bool boolean = false;
  int64_t sequence = 0, query = 0, key = 0;  // strides
  void fill(int64_t s, int64_t tokens, int64_t keys, std::vector<float>& rows) const {
    const int64_t n = query ? tokens : 1;
    rows.assign(n * keys, -INFINITY);
    for (int64_t q = 0; q < n; q++)
      for (int64_t k = 0; k < tokens; k++) {
        const int64_t i = s * sequence + q * query + k * key;
        float value = 0;
        if (data && boolean) value = data[i] ? 0 : -INFINITY;
        else if (data) value = ((const float*)data)[i];
        rows[q * keys + k] = value;
      }
  }
};

// Attention of one head in one sequence. A row of `qkv` is query, key and value, `dim` of each
struct Attention {
  int64_t tokens, dim, keys;                  // keys: tokens up to whole panels
  std::vector<float> by_key, by_value, mask;  // panels of 16 keys (dim lines), and of 16 outputs (a line for each key)
  std::unique_ptr<float[]> scores;            // of the rows of a tile

  Attention(int64_t tokens, int64_t dim)
      : tokens(tokens),
        dim(dim),
        keys((tokens + PANEL - 1) / PANEL * PANEL),
        by_key(keys * dim),
        by_value(keys * dim),
        scores(new float[ROWS * keys]) {}

  void pack(const float* qkv) {
    for (int64_t t = 0; t < tokens; t++, qkv += 3 * dim) {
      float* key = by_key.data() + t / PANEL * dim * PANEL + t % PANEL;
      for (int64_t c = 0; c < dim; c++) key[c * PANEL] = qkv[dim + c];
      for (int64_t c = 0; c < dim; c++) by_value[(c / PANEL * keys + t) * PANEL + c % PANEL] = qkv[2 * dim + c];
    }
  }

  // Scores of a row become weights; gives one over their sum, and 0 where every key is closed
  static float softmax(float* row, int64_t keys) {
    Lanes most = load(row), sum{};
    Ints odd{};
    for (int64_t k = 0; k < keys; k += LANES) {
      const Lanes v = load(row + k);
      most = v > most ? v : most;
      odd |= v != v;
    }
    for (int i = 0; i < LANES; i++)
      if (odd[i]) return NAN;
    float largest = most[0], total = 0;
    for (int i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
    if (largest == INFINITY) return NAN;
    if (largest == -INFINITY) largest = 0;
    for (int64_t k = 0; k < keys; k += LANES) {
      const Lanes v = load(row + k), e = v == -INFINITY ? Lanes{} : exponential(v - largest);
      store(row + k, e);
      sum += e;
    }
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total == 0 ? 0 : 1 / total;
  }

  void run(const float* qkv, float* out) {
    pack(qkv);
    const float scale = 1 / std::sqrt((float)dim);
    const int64_t row = mask.size() > (size_t)keys ? keys : 0;
    tiles<float>(tokens, [&]<int M>(int64_t first, int64_t m, int64_t) {
      const float* x[M];
      for (int i = 0; i < M; i++) x[i] = qkv + (first + std::min<int64_t>(i, m - 1)) * 3 * dim;
      each_panel(keys / PANEL, m, [&]<int P>(int64_t p) {
        Sums<float, M, P> sums;
        product<float, M, P>(sums, x, dim, by_key.data() + p * dim * PANEL, dim * PANEL, Ahead{});
        for (int i = 0; i < m; i++)
          for (int q = 0; q < P * PARTS; q++) {
            const int64_t at = p * PANEL + q * LANES;
            store(scores.get() + i * keys + at, sums.of[i][q] * scale + load(mask.data() + (first + i) * row + at));
          }
      });
      float by[M] = {};
      for (int i = 0; i < m; i++) by[i] = softmax(scores.get() + i * keys, keys);
      for (int i = 0; i < M; i++) x[i] = scores.get() + std::min<int64_t>(i, m - 1) * keys;
      each_panel(dim / PANEL, m, [&]<int P>(int64_t p) {
        Sums<float, M, P> sums;
        product<float, M, P>(sums, x, keys, by_value.data() + p * keys * PANEL, keys * PANEL, Ahead{});
        for (int i = 0; i < m; i++)
          for (int q = 0; q < P * PARTS; q++)
            store(out + (first + i) * dim + p * PANEL + q * LANES, sums.of[i][q] * by[i]);
      });
    });
  }

  template<class F> static void each_panel(int64_t panels, int64_t rows, F&& f) {
    for (int64_t p = 0, together; p < panels; p += together) {
      together = panels_at(p, panels, rows);
      of_panels(together, [&]<int P>() { f.template operator()<P>(p); });
    }
  }
};

Norm norm_of(const Tensor& weight, const Tensor& bias, double eps, int64_t width) {
  for (const Tensor* t : {&weight, &bias})
    STD_TORCH_CHECK(is(*t, Type::Float) && t->is_contiguous() && t->numel() == width, "norm: weight and bias must be ",
                    width, " numbers of float32");
  return {floats(weight), floats(bias), (float)eps};
}

Mask mask_of(const Maybe& mask, int64_t sequences, int64_t tokens) {
  if (!mask) return {};
  STD_TORCH_CHECK(mask->dim() == 4 && (mask->size(0) == sequences || mask->size(0) == 1) && mask->size(1) == 1 &&
                      (mask->size(2) == tokens || mask->size(2) == 1) && mask->size(3) == tokens,
                  "attention: the mask must be (", sequences, ", 1, ", tokens, ", ", tokens, ")");
  auto stride = [&](int d) { return mask->size(d) > 1 ? mask->stride(d) : 0; };
  return {(const char*)mask->data_ptr(), is(*mask, Type::Bool), stride(0), stride(2), stride(3)};
}

// Attention of all sequences: projections, heads, and what these write
void attention(const Projection& first, const Projection& second, const Open& open, Rows x, Rows y, const Mask& mask,
               int64_t tokens, int64_t dim) {
  const int64_t sequences = x.rows / tokens, width = 3 * dim;
  std::unique_ptr<float[]> read(new float[open.pairs * x.rows * width]), heads(new float[open.pairs * x.rows * dim]);
  with_weights(first.w, first.scale, first.bias, [&]<class W>(Weights<W> w) {
    up(w, open, inputs_of<W>(x, open.groups), x.rows, Features{read.get(), x.rows * width, width}, 0, Write::FIRST);
  });
  const int64_t grain = 1 + 4096 / (tokens * tokens);
  torch::stable::parallel_for(0, open.pairs * sequences, grain, [&](int64_t a, int64_t b) {
    Attention one(tokens, dim);
    for (int64_t g = 0, at = -1; a < b; a++) {  // the open heads of a sequence follow each other
      while (open.first[g + 1] * sequences <= a) g++;
      const int64_t n = open.first[g + 1] - open.first[g], i = a - open.first[g] * sequences;
      const int64_t s = i / n, pair = open.first[g] + i % n;
      if (at != g * sequences + s) mask.fill(at = g * sequences + s, tokens, one.keys, one.mask);
      const int64_t row = pair * x.rows + s * tokens;
      one.run(read.get() + row * width, heads.get() + row * dim);
    }
  });
  with_weights(second.w, second.scale, second.bias, [&]<class W>(Weights<W> w) {
    down(w, open, inputs_of<W>(Features{heads.get(), x.rows * dim, dim}, open, x.rows, dim), y);
  });
}

// The tensors of a sub-layer; an empty one stands for none
struct Sublayer {
  const Tensor &up, &down;
  Maybe up_scale, up_bias, down_scale, down_bias;
  const Tensor &norm_weight, &norm_bias;
  static constexpr int64_t TENSORS = 8;

  static Maybe some(const Tensor& t) { return t.numel() ? Maybe(t) : Maybe(); }
  explicit Sublayer(const Tensor* t)
      : up(t[0]),
        down(t[3]),
        up_scale(some(t[1])),
        up_bias(some(t[2])),
        down_scale(some(t[4])),
        down_bias(some(t[5])),
        norm_weight(t[6]),
        norm_bias(t[7]) {}

  bool served_for(const Tensor& x) const {
    return served(x, up, up_scale, up_bias) && served(x, down, down_scale, down_bias) && is(norm_weight, Type::Float);
  }
  void check_for(int64_t width, bool heads) const {
    const int64_t reads = up.size(1) * PANEL, writes = down.size(2) * unit(down);
    check("up", up, up_scale, up_bias, width, true);
    check("down", down, down_scale, down_bias, writes, false);
    STD_TORCH_CHECK(reads == (heads ? 3 : 1) * writes, "an agent computes ", reads, " features, and writes from ",
                    writes);
    STD_TORCH_CHECK(down.size(1) * PANEL == width && down.size(0) == up.size(0),
                    "what is written must fit what is read");
  }
};

constexpr int64_t HEADS = -1;  // a kind; others are the activation of an FFN

Tensor op_sublayers(const Tensor& x_, const Maybe& mask_, const Tensor& opened, std::vector<int64_t> kinds,
                    std::vector<Tensor> weights, double eps) {
  STD_TORCH_CHECK(x_.dim() == 3 && !kinds.empty() && weights.size() == kinds.size() * Sublayer::TENSORS,
                  "sublayers: x must be (sequences, tokens, inputs), and each kind has ", Sublayer::TENSORS,
                  " weights");
  std::vector<Sublayer> sublayers;
  for (size_t i = 0; i < kinds.size(); i++) sublayers.emplace_back(weights.data() + i * Sublayer::TENSORS);
  bool all = !mask_ || is(*mask_, Type::Bool) || is(*mask_, Type::Float);
  for (const Sublayer& s : sublayers) all = all && s.served_for(x_);
  if (!all) return reference("compecon::sublayers_reference", x_, mask_, opened, kinds, weights, eps);
  STD_TORCH_CHECK(opened.dim() == 2 && is(opened, Type::Bool) && opened.size(0) > 0 && x_.size(0) % opened.size(0) == 0,
                  "sublayers: open agents must be a mask of bool, (groups, agents), with groups that divide ",
                  x_.size(0), " sequences");
  const Tensor x = torch::stable::contiguous(x_), sets = torch::stable::contiguous(opened);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const int64_t tokens = x.size(1), width = x.size(2), groups = sets.size(0), rows = x.size(0) / groups * tokens;
  if (!x.size(0) || !tokens) return y;
  const Mask mask = mask_of(mask_, x.size(0), tokens);
  std::unique_ptr<float[]> memory(new float[kinds.size() > 1 ? groups * rows * width : 0]);
  Rows from{floats(x), rows, width};
  int64_t agents = 0;
  for (size_t i = 0; i < kinds.size(); i++) {
    const Sublayer& s = sublayers[i];
    const int64_t n = s.up.size(0), features = s.down.size(2) * unit(s.down);
    STD_TORCH_CHECK(agents + n <= sets.size(1), "sublayers: a mask of ", sets.size(1), " agents, and there are more");
    if (kinds[i] != HEADS) check_activation(kinds[i]);
    s.check_for(width, kinds[i] == HEADS);
    const Norm norm = norm_of(s.norm_weight, s.norm_bias, eps, width);
    const Open open((const bool*)sets.data_ptr() + agents, sets.size(1), groups, n);
    const Rows to{(kinds.size() - i) % 2 ? floats(y) : memory.get(), rows, width};  // the last one writes to y
    const Projection first{s.up, s.up_scale, s.up_bias}, second{s.down, s.down_scale, s.down_bias};
    if (kinds[i] == HEADS) attention(first, second, open, from, to, mask, tokens, features);
    else ffn(first, nullptr, second, open, from, to, features, kinds[i]);
    for_rows(groups * rows, width, [&](int64_t a, int64_t b) {
      add_and_norm(from.data + a * width, to.data + a * width, b - a, width, norm);
    });
    from = to;
    agents += n;
  }
  STD_TORCH_CHECK(agents == sets.size(1), "sublayers: a mask of ", sets.size(1), " agents, and there are ", agents);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compecon, CPU, m) {
  m.impl("up", TORCH_BOX(&op_up));
  m.impl("down", TORCH_BOX(&op_down));
  m.impl("ffn", TORCH_BOX(&op_ffn));
  m.impl("sublayers", TORCH_BOX(&op_sublayers));
}
