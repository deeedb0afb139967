// Products over open blocks on a CPU. `compecon.kernels` says what they compute; this file says how fast.
//
// Weights are packed in panels of 16 columns, so that a block is one contiguous stream: what is closed is never read, and nothing is copied.
//   up    (blocks, width/16, inputs, 16)     a block makes `width` features of all inputs
//   down  (blocks, outputs/16, width, 16)    a block adds what its `width` features say to all outputs
// A tile is some rows times one panel. Its sums stay in registers: 12 rows of one AVX-512 register, 6 of two AVX ones, and so on.
// All arithmetic is float32; weights may also be bfloat16, or int8 with a scale for each output.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace {

using torch::stable::Tensor;
using Type = torch::headeronly::ScalarType;
using Maybe = std::optional<Tensor>;

// ---- A panel: 16 columns, in as many registers as they take

constexpr int64_t PANEL = 16;
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 2;
#endif
constexpr int PARTS = PANEL/LANES;
constexpr int64_t CHUNK = 96;  // rows whose features stay in the second-level cache

typedef float Lanes __attribute__((vector_size(LANES*4)));
typedef int32_t Ints __attribute__((vector_size(LANES*4)));
typedef float LooseFloats __attribute__((vector_size(LANES*4), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(LANES*2), aligned(2), may_alias));
typedef int8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t bfloat16;

#define INLINE inline __attribute__((always_inline))

template<class To, class From> INLINE To bits(From from) { To to; static_assert(sizeof to == sizeof from); std::memcpy(&to, &from, sizeof to); return to; }

INLINE Lanes load(const float* p) { return *(const LooseFloats*)p; }
INLINE Lanes load(const bfloat16* p) { return bits<Lanes>(__builtin_convertvector(*(const LooseHalves*)p, Ints) << 16); }
#if defined(__AVX512F__)  // one instruction, which the compiler does not find
INLINE Lanes load(const int8_t* p) { return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
#elif defined(__AVX2__)
INLINE Lanes load(const int8_t* p) { return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
#else
INLINE Lanes load(const int8_t* p) { return __builtin_convertvector(__builtin_convertvector(*(const LooseBytes*)p, Ints), Lanes); }
#endif
INLINE void store(float* p, Lanes v) { *(LooseFloats*)p = v; }

struct Panel { Lanes part[PARTS]; };

// ---- Activations, as compecon.kernels.ACTIVATIONS numbers them

INLINE Lanes exponential(Lanes x) {  // Cephes' expf, to 2e-7
  x = x > -87.3f ? x : Lanes{} - 87.3f;
  x = x < 88.3f ? x : Lanes{} + 88.3f;
  Ints n = __builtin_convertvector(x*1.44269504f + 0.5f, Ints);
  n += __builtin_convertvector(n, Lanes) > x*1.44269504f + 0.5f;  // floor
  Lanes whole = __builtin_convertvector(n, Lanes);
  x -= whole*0.693359375f; x -= whole*-2.12194440e-4f;
  Lanes p = x*1.9875691500e-4f + 1.3981999507e-3f;
  p = p*x + 8.3334519073e-3f; p = p*x + 4.1665795894e-2f; p = p*x + 1.6666665459e-1f; p = p*x + 5.0000001201e-1f;
  return (p*x*x + x + 1.f)*bits<Lanes>((n + 127) << 23);
}

INLINE Lanes normal_cdf(Lanes x) {  // Abramowitz and Stegun 7.1.26, to 1e-7
  Lanes a = bits<Lanes>(bits<Ints>(x) & 0x7fffffff)*0.70710678f, t = 1.f/(a*0.3275911f + 1.f);
  Lanes p = t*1.061405429f - 1.453152027f; p = p*t + 1.421413741f; p = p*t - 0.284496736f; p = p*t + 0.254829592f;
  Lanes tail = 0.5f*p*t*exponential(-a*a);
  return x < 0.f ? tail : 1.f - tail;
}

INLINE Lanes activate(Lanes x, int64_t activation) {
  switch (activation) {
    case 1: return x < 0.f ? Lanes{} : x;
    case 2: return x*normal_cdf(x);
    case 3: return x/(exponential(-1.5957691216f*(x + 0.044715f*x*x*x)) + 1.f);
    case 4: return x/(exponential(-x) + 1.f);
    default: return x;
  }
}

// ---- One tile

// What to fetch meanwhile, in every eight steps. Many rows: a piece of another panel. One row waits for memory alone, and a processor reads ahead by itself as long as
// addresses rise; so there it is the start of what follows a gap, and for narrow weights, which are used up more slowly than they are asked for, everything
struct Ahead { const char* line = nullptr; int64_t bytes = 0; const char* end = nullptr; int64_t gap = 0; };
template<class W> constexpr int64_t DISTANCE = sizeof(W) < 4 ? 8192 : 4096;

template<int M, class W> INLINE void step(Panel (&sum)[M], const float* const (&x)[M], int64_t k, const W* w) {
  Panel weights;
  for (int q = 0; q < PARTS; q++) weights.part[q] = load(w + q*LANES);
  for (int i = 0; i < M; i++) for (int q = 0; q < PARTS; q++) sum[i].part[q] += x[i][k]*weights.part[q];
}

// sum[i] += x[i][0..steps) times a panel. With few rows several sums run beside each other, for one addition must wait for the last
template<int M, class W> INLINE void product(Panel (&sum)[M], const float* const (&x)[M], int64_t steps, const W* w, Ahead ahead) {
  constexpr int CHAINS = M*PARTS >= 6 ? 1 : M*PARTS >= 3 ? 2 : 4;
  Panel more[CHAINS][M] = {};
  int64_t k = 0;
  for (; k + 8 <= steps; k += 8, w += 8*PANEL) {
    if constexpr (M == 1) {
      const char* p = (const char*)w + DISTANCE<W>;
      const bool over = p >= ahead.end;
      if (over || sizeof(W) < 4) for (int64_t b = 0; b < 8*PANEL*(int64_t)sizeof(W); b += 64) __builtin_prefetch(p + (over ? ahead.gap : 0) + b, 0, 2);
    }
    for (int64_t b = 0; b < ahead.bytes; b += 64) __builtin_prefetch(ahead.line + b, 0, 2);
    ahead.line += ahead.bytes;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) step<M>(j % CHAINS ? more[j % CHAINS] : sum, x, k + j, w + j*PANEL);
  }
  for (; k < steps; k++, w += PANEL) step<M>(sum, x, k, w);
  for (int c = 1; c < CHAINS; c++) for (int i = 0; i < M; i++) for (int q = 0; q < PARTS; q++) sum[i].part[q] += more[c][i].part[q];
}

// Calls f<M>(first row, rows, what to fetch) for tiles of nearly the same height, of which M is at least the rows
template<class F, int... M> INLINE void dispatch(int64_t rows, F&& f, std::integer_sequence<int, M...>) { (void)((rows <= M && (f.template operator()<M>(), true)) || ...); }

template<class F> INLINE void tiles(int64_t rows, const void* next, int64_t bytes, F&& f) {
  if (!rows) return;
  const int64_t n = (rows + ROWS - 1)/ROWS, share = next ? (bytes/n + 63)/64*64 : 0;
  for (int64_t i = 0, r = 0; i < n; i++) {
    const int64_t m = rows/n + (i < rows % n);
    dispatch(m, [&]<int M>() { f.template operator()<M>(r, m, (const char*)next + i*share, share); },
#if defined(__AVX512F__)
             std::integer_sequence<int, 1, 2, 4, 6, 8, 12, 16>());
#else
             std::integer_sequence<int, 1, 2, 3, 4, 5, 6>());
#endif
    r += m;
  }
}

// ---- One panel for many rows; `at(r)` says where row r is read and written

struct Row { const float* x; float* y; };

enum class Write { FIRST, TIMES, ADD };  // set; set to the product with what is there; add to what is there

template<class W> struct Weights {
  const W* w; const float *scale, *bias;
  int64_t blocks, panels, steps;  // (blocks, panels, steps, 16)
  const W* panel(int64_t block, int64_t p) const { return w + (block*panels + p)*steps*PANEL; }
};

INLINE const float* at_or_null(const float* p, int64_t i) { return p ? p + i : nullptr; }

// `next` follows this panel, and weights are read without a gap up to `end`
template<class W, class At> void panel_rows(const W* w, const float* scale, const float* bias, int64_t steps, int64_t rows, At at, int64_t activation, Write write, const W* next, const W* end) {
  tiles(rows, rows > 1 ? next : nullptr, steps*PANEL*sizeof(W), [&]<int M>(int64_t first, int64_t m, const char* line, int64_t share) {
    const float* x[M]; float* y[M];
    for (int i = 0; i < M; i++) { Row row = at(first + std::min<int64_t>(i, m - 1)); x[i] = row.x; y[i] = row.y; }
    Panel sum[M] = {};
    product<M>(sum, x, steps, w, Ahead{line, (share*8/std::max<int64_t>(steps, 1) + 63)/64*64, (const char*)end, next ? (const char*)next - (const char*)end : 0});
    for (int i = 0; i < M; i++) if (i < m) for (int q = 0; q < PARTS; q++) {
      Lanes v = sum[i].part[q];
      if (scale) v *= load(scale + q*LANES);
      if (bias) v += load(bias + q*LANES);
      v = activate(v, activation);
      float* out = y[i] + q*LANES;
      store(out, write == Write::FIRST ? v : write == Write::TIMES ? v*load(out) : v + load(out));
    }
  });
}

// ---- Open sets: pairs of a group and a block, in rising order

struct Open {
  const int64_t *group, *block;
  int64_t pairs, groups;
  std::vector<int64_t> first;  // group g has the pairs from first[g] to first[g + 1]

  Open(const Tensor& group_, const Tensor& block_, int64_t groups, int64_t blocks) : group((const int64_t*)group_.data_ptr()), block((const int64_t*)block_.data_ptr()), pairs(group_.numel()), groups(groups), first(groups + 1) {
    for (int64_t i = 0; i < pairs; i++) {
      STD_TORCH_CHECK(group[i] >= 0 && group[i] < groups && block[i] >= 0 && block[i] < blocks, "open set: pair (", group[i], ", ", block[i], ") is not one of ", groups, " groups and ", blocks, " blocks");
      STD_TORCH_CHECK(!i || group[i - 1] < group[i] || (group[i - 1] == group[i] && block[i - 1] < block[i]), "open set: pairs must rise, and (", group[i], ", ", block[i], ") does not");
      first[group[i] + 1] = i + 1;
    }
    for (int64_t g = 0; g < groups; g++) first[g + 1] = std::max(first[g], first[g + 1]);
  }
};

struct ByBlock { std::vector<int64_t> pairs, first; };  // block b is open in pairs[first[b]..first[b + 1])

ByBlock by_block(const Open& open, int64_t blocks) {
  ByBlock by{std::vector<int64_t>(open.pairs), std::vector<int64_t>(blocks + 1)};
  for (int64_t i = 0; i < open.pairs; i++) by.first[open.block[i] + 1]++;
  for (int64_t b = 0; b < blocks; b++) by.first[b + 1] += by.first[b];
  std::vector<int64_t> next(by.first.begin(), by.first.end() - 1);
  for (int64_t i = 0; i < open.pairs; i++) by.pairs[next[open.block[i]]++] = i;
  return by;
}

// Features of pair i, row r at data + i*pair + r*row; inputs and outputs of group g, row r at data + (g*rows + r)*width
struct Features { float* data; int64_t pair, row; };
struct Rows { float* data; int64_t rows, width; };

// ---- Up

template<class W> void up_group(const Weights<W>& w, const Open& open, int64_t g, const float* x, int64_t width, int64_t rows, int64_t q0, int64_t q1, Features h, int64_t activation, Write write) {
  for (int64_t q = q0; q < q1; q++) {  // panels of all pairs of the group
    const int64_t i = open.first[g] + q/w.panels, p = q % w.panels, b = open.block[i];
    const W* next = q + 1 == q1 ? nullptr : w.panel(open.block[open.first[g] + (q + 1)/w.panels], (q + 1) % w.panels);
    const int64_t column = (b*w.panels + p)*PANEL;
    panel_rows(w.panel(b, p), at_or_null(w.scale, column), at_or_null(w.bias, column), w.steps, rows,
               [&](int64_t r) { return Row{x + r*width, h.data + i*h.pair + r*h.row + p*PANEL}; }, activation, write, next, w.panel(b, p + 1));
  }
}

template<class W> void up(const Weights<W>& w, const Open& open, Rows x, Features h, int64_t activation, Write write) {
  using torch::stable::parallel_for;
  const int64_t threads = torch::stable::get_num_threads();
  if (x.rows == 1 && x.width && open.groups > 1) {  // a set for each token: block by block, for the tokens that have it open
    const ByBlock by = by_block(open, w.blocks);
    parallel_for(0, w.blocks*w.panels, 1, [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; q++) {
        const int64_t b = q/w.panels, p = q % w.panels, *pairs = by.pairs.data() + by.first[b];
        panel_rows(w.panel(b, p), at_or_null(w.scale, q*PANEL), at_or_null(w.bias, q*PANEL), w.steps, by.first[b + 1] - by.first[b],
                   [&](int64_t r) { return Row{x.data + open.group[pairs[r]]*x.width, h.data + pairs[r]*h.pair + p*PANEL}; }, activation, write, (const W*)nullptr, w.panel(b, p + 1));
      }
    });
    return;
  }
  const int64_t chunks = std::max<int64_t>(1, (x.rows + CHUNK - 1)/CHUNK), height = (x.rows + chunks - 1)/chunks;
  auto chunk = [&](int64_t g, int64_t c, int64_t q0, int64_t q1) {
    const int64_t r0 = c*height, rows = std::min(x.rows, r0 + height) - r0;
    if (rows > 0) up_group(w, open, g, x.data + (g*x.rows + r0)*x.width, x.width, rows, q0, q1, Features{h.data + r0*h.row, h.pair, h.row}, activation, write);
  };
  auto panels = [&](int64_t g) { return (open.first[g + 1] - open.first[g])*w.panels; };
  if (open.groups*chunks >= threads) parallel_for(0, open.groups*chunks, 1, [&](int64_t a, int64_t b) { for (; a < b; a++) chunk(a/chunks, a % chunks, 0, panels(a/chunks)); });
  else for (int64_t g = 0; g < open.groups; g++) parallel_for(0, panels(g), 1, [&](int64_t q0, int64_t q1) { for (int64_t c = 0; c < chunks; c++) chunk(g, c, q0, q1); });
}

// ---- Down

template<class W> void down_panels(const Weights<W>& w, const Open& open, int64_t g, Features h, int64_t rows, int64_t p0, int64_t p1, float* y, int64_t width) {
  const int64_t i0 = open.first[g], i1 = open.first[g + 1];
  for (int64_t p = p0; p < p1; p++) tiles(rows, nullptr, 0, [&]<int M>(int64_t first, int64_t m, const char*, int64_t) {
    const int64_t mine = first/ROWS % 8;  // this tile fetches the next panel's part of every eighth block
    Panel sum[M] = {};
    for (int64_t i = i0; i < i1; i++) {
      const float* x[M];
      for (int r = 0; r < M; r++) x[r] = h.data + i*h.pair + (first + std::min<int64_t>(r, m - 1))*h.row;
      const W* panel = w.panel(open.block[i], p);
      product<M>(sum, x, w.steps, panel, p + 1 < p1 && i % 8 == mine ? Ahead{(const char*)(panel + w.steps*PANEL), 8*PANEL*(int64_t)sizeof(W)} : Ahead{nullptr, 0});
    }
    for (int r = 0; r < M; r++) if (r < m) for (int q = 0; q < PARTS; q++) {
      Lanes v = sum[r].part[q];
      if (w.scale) v *= load(w.scale + p*PANEL + q*LANES);
      if (w.bias) v += load(w.bias + p*PANEL + q*LANES);
      store(y + (first + r)*width + p*PANEL + q*LANES, v);
    }
  });
}

// Block by block, so that each is read as one stream; for few rows, and for those that have sets of their own
template<class W> void down_blocks(const Weights<W>& w, const Open& open, const ByBlock& by, Features h, Rows y, int64_t p0, int64_t p1) {
  for (int64_t r = 0; r < open.groups*y.rows; r++) for (int64_t c = p0*PANEL; c < p1*PANEL; c++) y.data[r*y.width + c] = w.bias ? w.bias[c] : 0.f;
  for (int64_t b = 0; b < w.blocks; b++) {
    const int64_t *pairs = by.pairs.data() + by.first[b], rows = (by.first[b + 1] - by.first[b])*y.rows;
    int64_t later = b + 1;
    while (later < w.blocks && by.first[later] == by.first[later + 1]) later++;
    const W* after = later < w.blocks ? w.panel(later, p0) : nullptr;
    if (rows) for (int64_t p = p0; p < p1; p++)
      panel_rows(w.panel(b, p), at_or_null(w.scale, p*PANEL), nullptr, w.steps, rows, [&](int64_t r) {
        const int64_t i = pairs[r/y.rows], row = r % y.rows;
        return Row{h.data + i*h.pair + row*h.row, y.data + (open.group[i]*y.rows + row)*y.width + p*PANEL};
      }, 0, Write::ADD, rows > 1 ? (p + 1 < p1 ? w.panel(b, p + 1) : nullptr) : after, w.panel(b, p1));
  }
}

template<class W> void down(const Weights<W>& w, const Open& open, Features h, Rows y) {
  using torch::stable::parallel_for;
  const int64_t threads = torch::stable::get_num_threads();
  if (y.rows*(open.groups == 1 ? 1 : ROWS) <= ROWS) {
    const ByBlock by = by_block(open, w.blocks);
    parallel_for(0, w.panels, 1, [&](int64_t p0, int64_t p1) { down_blocks(w, open, by, h, y, p0, p1); });
    return;
  }
  const int64_t chunks = std::max<int64_t>(1, (y.rows + CHUNK - 1)/CHUNK), height = (y.rows + chunks - 1)/chunks;
  auto chunk = [&](int64_t g, int64_t c, int64_t p0, int64_t p1) {
    const int64_t r0 = c*height, rows = std::min(y.rows, r0 + height) - r0;
    if (rows > 0) down_panels(w, open, g, Features{h.data + r0*h.row, h.pair, h.row}, rows, p0, p1, y.data + (g*y.rows + r0)*y.width, y.width);
  };
  if (open.groups*chunks >= threads) parallel_for(0, open.groups*chunks, 1, [&](int64_t a, int64_t b) { for (; a < b; a++) chunk(a/chunks, a % chunks, 0, w.panels); });
  else for (int64_t g = 0; g < open.groups; g++) parallel_for(0, w.panels, 1, [&](int64_t p0, int64_t p1) { for (int64_t c = 0; c < chunks; c++) chunk(g, c, p0, p1); });
}

// ---- The operators

float* floats(const Tensor& t) { return (float*)t.data_ptr(); }
bool is(const Tensor& t, Type type) { return t.scalar_type() == type; }

template<class W> Weights<W> weights(const Tensor& w, const Maybe& scale, const Maybe& bias) {
  return {(const W*)w.data_ptr(), scale ? floats(*scale) : nullptr, bias ? floats(*bias) : nullptr, w.size(0), w.size(1), w.size(2)};
}

template<class F> void with_weights(const Tensor& w, const Maybe& scale, const Maybe& bias, F f) {
  switch (w.scalar_type()) {
    case Type::Float: return f(weights<float>(w, scale, bias));
    case Type::BFloat16: return f(weights<bfloat16>(w, scale, bias));
    default: return f(weights<int8_t>(w, scale, bias));
  }
}

void check(const char* name, const Tensor& w, const Maybe& scale, const Maybe& bias, int64_t steps, bool wide) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(3) == PANEL && w.is_contiguous(), name, ": weights must be packed, (blocks, panels, inputs, 16)");
  STD_TORCH_CHECK(w.size(2) == steps, name, ": weights for ", w.size(2), " inputs, and there are ", steps);
  const int64_t outputs = w.size(1)*PANEL*(wide ? w.size(0) : 1);
  STD_TORCH_CHECK(is(w, Type::Char) == scale.has_value(), name, ": int8 weights need a scale, and others have none");
  for (const Maybe* t : {&scale, &bias}) STD_TORCH_CHECK(!*t || (is(**t, Type::Float) && (*t)->numel() == outputs && (*t)->is_contiguous()), name, ": bias and scale must be ", outputs, " numbers of float32");
}

bool served(const Tensor& x, const Tensor& w, const Maybe& bias) { return is(x, Type::Float) && (is(w, Type::Float) || is(w, Type::BFloat16) || is(w, Type::Char)) && (!bias || is(*bias, Type::Float)); }

void check_activation(int64_t activation) { STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation ", activation, " is none of 0 to 4"); }

void check_open(const Tensor& group, const Tensor& block) {
  for (const Tensor* t : {&group, &block}) STD_TORCH_CHECK(t->dim() == 1 && is(*t, Type::Long) && t->is_contiguous(), "open set: groups and blocks must be vectors of int64");
  STD_TORCH_CHECK(group.numel() == block.numel(), "open set: ", group.numel(), " groups and ", block.numel(), " blocks");
}

// Other types are left to the reference, which the dispatcher knows under another name
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

Tensor op_up(const Tensor& x_, const Tensor& w, const Maybe& scale, const Maybe& bias, const Tensor& group, const Tensor& block, int64_t activation, bool rows_first) {
  check_activation(activation);
  if (!served(x_, w, bias)) return reference("compecon::up_reference", x_, w, scale, bias, group, block, activation, rows_first);
  STD_TORCH_CHECK(x_.dim() == 3, "up: x must be (groups, rows, inputs)");
  check("up", w, scale, bias, x_.size(2), true); check_open(group, block);
  Tensor x = torch::stable::contiguous(x_), h = features(x, group.numel(), x.size(1), w.size(1)*PANEL, rows_first);
  Open open(group, block, x.size(0), w.size(0));
  with_weights(w, scale, bias, [&](auto weights) { up(weights, open, Rows{floats(x), x.size(1), x.size(2)}, Features{floats(h), h.stride(0), h.stride(1)}, activation, Write::FIRST); });
  return h;
}

Tensor op_down(const Tensor& h_, const Tensor& w, const Maybe& scale, const Maybe& bias, const Tensor& group, const Tensor& block, int64_t groups) {
  if (!served(h_, w, bias)) return reference("compecon::down_reference", h_, w, scale, bias, group, block, groups);
  STD_TORCH_CHECK(h_.dim() == 3, "down: features must be (pairs, rows, width)");
  check("down", w, scale, bias, h_.size(2), false); check_open(group, block);
  STD_TORCH_CHECK(h_.size(0) == group.numel(), "down: features of ", h_.size(0), " pairs, and ", group.numel(), " are open");
  Tensor h = h_.size(2) > 0 && h_.stride(2) == 1 ? h_ : torch::stable::contiguous(h_), y = torch::stable::new_empty(h, {groups, h.size(1), w.size(1)*PANEL});
  Open open(group, block, groups, w.size(0));
  with_weights(w, scale, bias, [&](auto weights) { down(weights, open, Features{floats(h), h.stride(0), h.stride(1)}, Rows{floats(y), h.size(1), y.size(2)}); });
  return y;
}

Tensor op_ffn(const Tensor& x_, const Tensor& up_w, const Maybe& up_scale, const Maybe& up_bias, const Maybe& gate_w, const Maybe& gate_scale, const Maybe& gate_bias,
              const Tensor& down_w, const Maybe& down_scale, const Maybe& down_bias, const Tensor& group, const Tensor& block, int64_t activation) {
  check_activation(activation);
  if (!served(x_, up_w, up_bias) || !served(x_, down_w, down_bias) || (gate_w && !served(x_, *gate_w, gate_bias)))
    return reference("compecon::ffn_reference", x_, up_w, up_scale, up_bias, gate_w, gate_scale, gate_bias, down_w, down_scale, down_bias, group, block, activation);
  STD_TORCH_CHECK(x_.dim() == 3, "ffn: x must be (groups, rows, inputs)");
  const int64_t width = up_w.size(1)*PANEL;
  check("ffn, up", up_w, up_scale, up_bias, x_.size(2), true); check("ffn, down", down_w, down_scale, down_bias, width, false); check_open(group, block);
  if (gate_w) { check("ffn, gate", *gate_w, gate_scale, gate_bias, x_.size(2), true); STD_TORCH_CHECK(gate_w->size(0) == up_w.size(0) && gate_w->size(1) == up_w.size(1), "ffn: gate and up must have the same shape"); }
  STD_TORCH_CHECK(down_w.size(0) == up_w.size(0), "ffn: ", up_w.size(0), " blocks up and ", down_w.size(0), " down");
  Tensor x = torch::stable::contiguous(x_), y = torch::stable::new_empty(x, {x.size(0), x.size(1), down_w.size(1)*PANEL});
  Open open(group, block, x.size(0), up_w.size(0));
  // Chunks of rows one after the other, if there is one set for all: their features stay in the cache between up and down
  const int64_t threads = torch::stable::get_num_threads(), all = x.size(1), chunks = open.groups == 1 ? std::max(all ? threads : 1, (all + CHUNK - 1)/CHUNK) : 1;
  auto run = [&](float* from, int64_t rows, float* to) {
    std::vector<float> memory(open.pairs*rows*width);
    Features h{memory.data(), rows*width, width};
    Rows in{from, rows, x.size(2)};
    with_weights(up_w, up_scale, up_bias, [&](auto w) { up(w, open, in, h, gate_w ? 0 : activation, Write::FIRST); });
    if (gate_w) with_weights(*gate_w, gate_scale, gate_bias, [&](auto w) { up(w, open, in, h, activation, Write::TIMES); });
    with_weights(down_w, down_scale, down_bias, [&](auto w) { down(w, open, h, Rows{to, rows, y.size(2)}); });
  };
  if (chunks == 1 || all < threads*CHUNK/2) run(floats(x), all, floats(y));
  else {
    const int64_t height = (all + chunks - 1)/chunks;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t a, int64_t b) {
      for (; a < b; a++) if (const int64_t r = a*height; r < all) run(floats(x) + r*x.size(2), std::min(height, all - r), floats(y) + r*y.size(2));
    });
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compecon, CPU, m) {
  m.impl("up", TORCH_BOX(&op_up));
  m.impl("down", TORCH_BOX(&op_down));
  m.impl("ffn", TORCH_BOX(&op_ffn));
}
