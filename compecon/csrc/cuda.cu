// Block-sparse projections on CUDA: compecon::up, compecon::down, compecon::ffn.
//
// An open set is n pairs (group[i], block[i]), sorted by group, then by block: block[i] is open for the rows of
// group[i]. One group: one set for every row; as many groups as sequences, or as tokens: a set for each.
//
// Weights are packed in panels of 16 output features, so that an open block is one stream and a closed one is never read:
//   up    x (groups, rows, H)  weight (blocks, width/16, H, 16)   ->  h[i] = act(x[group[i]] @ W[block[i]] + bias)
//   down  h (n, rows, width)   weight (blocks, O/16, width, 16)   ->  y[g] = bias + sum over i, group[i] == g, of h[i] @ V[block[i]]
// Both are one problem: each output matrix is a sum of products over a range of pairs. up has one pair to an output,
// down all pairs of a group. So each kernel below serves both (`Problem::down`), and `inner` is H or width.
//
//   gemv          few rows, any type: streams the weights once, 16 bytes a load
//   tile_mma      many rows, bfloat16 or float16: tensor cores, four cp.async stages
//   tile_simt     many rows, float32: registers, no TF32
//   finish        adds up what the parts of a split down product left in float32
//   find_starts   where the pairs of each group begin, for down
//
// Types: x, weights and bias in float32, bfloat16 or float16; weights also int8 with a float32 scale for each output
// feature, and bfloat16 with float32 x; bias also float32. Sums are float32, in an order that depends on
// shapes and chip alone: no atomics, the same result every time. Nothing is read back on the host, so all of it can be
// captured in a CUDA graph.
//
// Only torch's stable ABI of 2.11 is used:
//   nvcc -O3 -std=c++20 -shared -Xcompiler -fPIC -gencode arch=compute_90,code=sm_90 -DTORCH_TARGET_VERSION=0x020b000000000000
//        -I<torch>/include cuda.cu -L<torch>/lib -ltorch_cpu -o <library>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- machine: what only a GPU has (a test harness may put its own here) ----
// Torch's current stream. The function lives in libtorch_cuda, which the CPU's torch lacks: so it is looked up when
// first needed, in the libraries already loaded, and this library links to libtorch_cpu alone.
static cudaStream_t current_stream(int32_t device) {
  static const auto get = [] {
    void* lib = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return (AOTITorchError(*)(int32_t, void**))(lib ? dlsym(lib, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get, "compecon: no CUDA streams: libtorch_cuda is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "compecon: torch gave no CUDA stream");
  return (cudaStream_t)stream;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory in the background, or 16 zero bytes
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
#define LOAD_MATRICES(name, how)                                                                            \
  __device__ __forceinline__ void name(uint32_t (&r)[4], const void* row) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" how ".shared.b16 {%0,%1,%2,%3}, [%4];"                     \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");    \
  }
LOAD_MATRICES(load_matrices, "")
LOAD_MATRICES(load_matrices_transposed, ".trans")

// c (16 x 8, float32) += a (16 x 16) @ b (16 x 8)
#define MMA(type)                                                                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class X> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<X, bf16>) MMA("bf16");
  else MMA("f16");
}
// ---- end machine ----

namespace {

// ============================================================ device ============================================================

__device__ __forceinline__ float f32(float v) { return v; }
__device__ __forceinline__ float f32(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float f32(f16 v) { return __half2float(v); }
__device__ __forceinline__ float f32(int8_t v) { return (float)v; }
template <class X> __device__ __forceinline__ X from(float v) {
  if constexpr (std::is_same_v<X, bf16>) return __float2bfloat16(v);
  else if constexpr (std::is_same_v<X, f16>) return __float2half(v);
  else return v;
}

enum Act { NONE, RELU, GELU, GELU_TANH, SILU, ACTS };
__device__ __forceinline__ float activate(float x, int act) {
  switch (act) {
    case RELU: return x < 0.f ? 0.f : x;  // keeps NaN, as torch does
    case GELU: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case SILU: return x / (1.f + expf(-x));
    default: return x;
  }
}

#define UNROLL _Pragma("unroll")

constexpr int PANEL = 16;  // output features of a panel
constexpr int SLOTS = 4;   // panels of a tile
constexpr int STAGES = 4;  // steps of K that tile_mma holds in shared memory

struct Problem {
  const void *a, *weight, *bias, *mul;  // mul: a factor for each output, or null
  const float* scale;
  void* out;
  float* partial;  // (splits, groups, rows, panels * 16): where the sums go if splits > 1, else null
  const int64_t *group, *block, *starts;  // starts: null if all pairs are of one group
  int64_t n, groups;                      // pairs, groups
  int rows, inner, panels, splits, act;
  bool down, bias32;  // bias32: bias is float32 although a is not
};

// Scale, bias, activation and factor for four neighbouring outputs.
template <class X> __device__ __forceinline__ void apply(const Problem& q, int64_t place, int64_t feature, float4 sum) {
  const float v[4] = {sum.x, sum.y, sum.z, sum.w};
  struct alignas(4 * sizeof(X)) Four { X v[4]; } out;
  UNROLL for (int i = 0; i < 4; i++) {
    float y = v[i];
    if (q.scale) y *= q.scale[feature + i];
    if (q.bias) y += q.bias32 ? ((const float*)q.bias)[feature + i] : f32(((const X*)q.bias)[feature + i]);
    y = activate(y, q.act);
    if (q.mul) y *= f32(((const X*)q.mul)[place + i]);
    out.v[i] = from<X>(y);
  }
  *(Four*)((X*)q.out + place) = out;
}

// Four neighbouring sums of output matrix `set`, a pair (up) or a group (down): finished, or left as part of a split.
template <class X> __device__ __forceinline__ void emit(const Problem& q, int64_t set, int split, int row, int col, float4 sum) {
  const int64_t width = q.panels * PANEL, place = (set * q.rows + row) * width + col;
  if (q.partial) *(float4*)(q.partial + split * (q.groups * q.rows * width) + place) = sum;
  else apply<X>(q, place, q.down ? col : q.block[set] * width + col, sum);
}

template <class X> __global__ void finish(const Problem q) {
  const int64_t width = q.panels * PANEL, total = q.groups * q.rows * width;
  const int64_t place = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (place >= total) return;
  float4 sum = {};
  for (int s = 0; s < q.splits; s++) {
    const float4 part = *(const float4*)(q.partial + s * total + place);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  apply<X>(q, place, place % width, sum);
}

// starts[g]: the first pair whose group is g or more, for g from 0 to `groups`. A binary search a thread.
__global__ void find_starts(const int64_t* group, int64_t n, int64_t groups, int64_t* starts) {
  const int64_t g = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  int64_t low = 0, high = n;
  if (g > groups) return;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (group[middle] < g) low = middle + 1; else high = middle;
  }
  starts[g] = low;
}

// The pairs [first, last) that add up to one output matrix, and whose rows they read.
struct Span { int64_t set, group, first, last; int split; };

__device__ __forceinline__ Span span_of(const Problem& q, int64_t id) {
  if (!q.down) return {id, q.group[id], id, id + 1, 0};
  Span s = {id % q.groups, id % q.groups, 0, q.n, (int)(id / q.groups)};
  if (q.starts) s.first = q.starts[s.group], s.last = q.starts[s.group + 1];
  const int64_t part = (s.last - s.first + q.splits - 1) / q.splits;
  s.first = min(s.first + s.split * part, s.last), s.last = min(s.first + part, s.last);
  return s;
}

// Rows of the left operand that pair i multiplies.
template <class X> __device__ __forceinline__ const X* rows_of(const Problem& q, const Span& s, int64_t i) {
  return (const X*)q.a + (q.down ? i : s.group) * q.rows * q.inner;
}

// ---- few rows: one thread block for a panel and R rows --------------------------------------------------------------------------
// A warp reads 512 neighbouring bytes of the panel at once: 32 / LANES of its rows, V columns a lane. The eight warps
// take turns along K, four loads in flight each, and add up their lanes, then each other, at the end.
constexpr int GEMV_WARPS = 8;

template <class X, class W, int R> __global__ void __launch_bounds__(GEMV_WARPS * 32, 2) gemv(const Problem q) {
  constexpr int V = 16 / sizeof(W), LANES = PANEL / V, STEP = GEMV_WARPS * 32 / LANES, LOADS = 4, N = R * V;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES;
  const int chunks = (q.rows + R - 1) / R;
  int64_t id = blockIdx.x;
  const int row0 = id % chunks * R, panel = (id /= chunks) % q.panels;
  const Span s = span_of(q, id / q.panels);

  // place of this thread in K: row j of pair i
  const int total = (int)(s.last - s.first) * q.inner, start = threadIdx.x / LANES;
  int64_t i = s.first + start / q.inner;
  int j = start % q.inner;
  const int pairs = STEP / q.inner, rest = STEP % q.inner;

  const int64_t stride = (int64_t)q.panels * q.inner * PANEL;  // of a block
  const W* weight = (const W*)q.weight + (int64_t)panel * q.inner * PANEL + part * V;

  float acc[N] = {};
  for (int k = start; k < total; k += LOADS * STEP) {
    uint4 raw[LOADS];
    float x[LOADS][R];
    UNROLL for (int u = 0; u < LOADS; u++) {
      const bool in = k + u * STEP < total;
      raw[u] = in ? __ldg((const uint4*)(weight + q.block[i] * stride + j * PANEL)) : uint4{};
      UNROLL for (int r = 0; r < R; r++) x[u][r] = in && row0 + r < q.rows ? f32(rows_of<X>(q, s, i)[(int64_t)(row0 + r) * q.inner + j]) : 0.f;
      i += pairs, j += rest;
      if (j >= q.inner) j -= q.inner, i++;
    }
    UNROLL for (int u = 0; u < LOADS; u++) {
      W w[V];
      memcpy(w, &raw[u], 16);
      UNROLL for (int v = 0; v < V; v++) {
        const float f = f32(w[v]);
        UNROLL for (int r = 0; r < R; r++) acc[r * V + v] += x[u][r] * f;
      }
    }
  }

  // Add up the lanes of a column. In each step a lane keeps half of its sums and hands the other half to its partner, so
  // that the steps cost N/2 + N/4 + ... shuffles; in the end it holds the sums from `base` on.
  int base = 0;
  UNROLL for (int bit = LANES, held = N; bit < 32; bit *= 2, held = held > 1 ? held / 2 : 1) {
    const bool upper = lane & bit;
    if (held == 1) acc[0] += __shfl_xor_sync(~0u, acc[0], bit);
    if (upper) base += held / 2;
    UNROLL for (int v = 0; v < N / 2; v++) {
      if (v >= held / 2) continue;
      const float give = upper ? acc[v] : acc[v + held / 2], keep = upper ? acc[v + held / 2] : acc[v];
      acc[v] = keep + __shfl_xor_sync(~0u, give, bit);
    }
  }
  constexpr int HELD = N * LANES / 32 > 1 ? N * LANES / 32 : 1;
  __shared__ __align__(16) float sums[GEMV_WARPS][R * PANEL];
  UNROLL for (int v = 0; v < HELD; v++) sums[warp][(base + v) / V * PANEL + part * V + (base + v) % V] = acc[v];
  __syncthreads();
  const int row = threadIdx.x / (PANEL / 4), col = threadIdx.x % (PANEL / 4) * 4;
  if (row >= R || row0 + row >= q.rows) return;
  float4 sum = {};
  UNROLL for (int w = 0; w < GEMV_WARPS; w++) {
    const float4 one = *(const float4*)&sums[w][row * PANEL + col];
    sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
  }
  emit<X>(q, s.set, s.split, row0 + row, panel * PANEL + col, sum);
}

// ---- many rows: tiles of `height` rows and four panels --------------------------------------------------------------------------
// The panels of up are counted through all pairs, so that a tile is full whatever the width of a block. Should its
// panels belong to several groups, `segment` walks through them: the same tile once for the rows of each group.
struct Tile : Span {
  int row0, slots;
  int64_t panel0;

  __device__ Tile(const Problem& q, int height) {
    const int heights = (q.rows + height - 1) / height, widths = (q.panels + SLOTS - 1) / SLOTS;
    int64_t id = blockIdx.x;
    row0 = id % heights * height, id /= heights;
    if (q.down) (Span&)*this = span_of(q, id / widths);
    else split = 0;
    panel0 = (q.down ? id % widths : id) * SLOTS;
    slots = (int)min((int64_t)SLOTS, (q.down ? q.panels : q.n * q.panels) - panel0);
  }
  __device__ int64_t pair(const Problem& q, int slot) const { return (panel0 + slot) / q.panels; }  // of up
  __device__ int panel(const Problem& q, int slot) const { return (panel0 + slot) % q.panels; }
  __device__ int segment(const Problem& q, int slot) {  // the slots [slot, result) share a group
    if (q.down) return slots;
    first = pair(q, slot), last = first + 1, group = q.group[first];
    while (++slot < slots && q.group[pair(q, slot)] == group) {}
    return slot;
  }
  // Where the panel of a slot starts: in the weights (up), in a block of them (down).
  __device__ int64_t offset(const Problem& q, int slot) const {
    const int64_t block = q.down ? 0 : q.block[pair(q, slot)];
    return (block * q.panels + panel(q, slot)) * q.inner * PANEL;
  }
  // Writes the slots [slot, end) out of a tile of sums in shared memory. `at`: the place of an output in that tile, where
  // eight rows of eight columns lie in different banks.
  static __device__ int at(int row, int col) { return row * (SLOTS * PANEL) + (col ^ row % 8 * 8); }
  template <class X> __device__ void write(const Problem& q, const float* tile, int height, int slot, int end) const {
    const int col = threadIdx.x % (SLOTS * PANEL / 4) * 4, here = col / PANEL;
    if (here < slot || here >= end) return;
    const int64_t out = q.down ? set : pair(q, here);
    const int feature = panel(q, here) * PANEL + col % PANEL;
#pragma unroll 1
    for (int row = threadIdx.x / (SLOTS * PANEL / 4); row < min(height, q.rows - row0); row += blockDim.x / (SLOTS * PANEL / 4))
      emit<X>(q, out, split, row0 + row, feature, *(const float4*)(tile + at(row, col)));
  }
};

// A place in K, counted in slabs of 16: every slab lies within one pair.
struct Cursor {
  int64_t pair;
  int slab;
  __device__ void advance(const Problem& q, int by) {
    for (slab += by; slab >= q.inner / PANEL; pair++) slab -= q.inner / PANEL;
  }
};

// Four warps, two over the rows and two over the panels; a step is two slabs, 32 of K. In shared memory 16-byte chunks
// are exchanged so that the eight rows of an ldmatrix lie in different banks: see at_a and at_b.
template <class X, class W, int HEIGHT> __global__ void __launch_bounds__(128) tile_mma(const Problem q) {
  constexpr int M = HEIGHT / 32, C = sizeof(W), V = 16 / C;  // M: 16-row tiles of a warp; C: chunks in a row of a panel
  __shared__ __align__(16) unsigned char memory[STAGES * HEIGHT * 32 * sizeof(X)];  // left operand, then the tile of sums
  __shared__ __align__(16) W sb[STAGES][SLOTS * 32 * PANEL];
  X* const sa = (X*)memory;
  float* const sums = (float*)memory;
  static_assert(sizeof(memory) == HEIGHT * SLOTS * PANEL * sizeof(float));
  const auto at_a = [](int row, int chunk) { return (row * 4 + (chunk ^ (row / 2 % 4))) * 8; };
  const auto at_b = [](int slot, int k, int chunk) { return ((slot * 32 + k) * C + (C == 2 ? chunk ^ (k / 4 % 2) : chunk)) * V; };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % 2 * (HEIGHT / 2), warp_slot = warp / 2 * 2;
  // what this thread copies: chunk a_chunk of rows a_row, a_row + 32, ...; chunk b_chunk of row b_k of C panels
  const int a_row = threadIdx.x / 4, a_chunk = threadIdx.x % 4;
  const int b_slot = threadIdx.x / (32 * C), b_k = threadIdx.x / C % 32, b_chunk = threadIdx.x % C;
  Tile t(q, HEIGHT);

  for (int slot0 = 0, slot1; slot0 < t.slots; slot0 = slot1) {
    slot1 = t.segment(q, slot0);
    const int steps = ((int)(t.last - t.first) * (q.inner / PANEL) + 1) / 2;
    Cursor ca = {t.first, 0}, cb = {t.first, 0};
    ca.advance(q, a_chunk / 2), cb.advance(q, b_k / PANEL);
    const W* b[C];
    UNROLL for (int c = 0; c < C; c++) {
      const int slot = b_slot + c * (SLOTS / C);
      const bool ours = slot >= slot0 && slot < slot1;
      b[c] = ours ? (const W*)q.weight + t.offset(q, slot) + b_k % PANEL * PANEL + b_chunk * V : nullptr;
    }

    const auto load = [&](int stage) {
      const X* a = rows_of<X>(q, t, ca.pair) + ca.slab * PANEL + a_chunk % 2 * 8;
      UNROLL for (int m = 0; m < M; m++) {
        const int row = a_row + 32 * m;
        const bool real = ca.pair < t.last && t.row0 + row < q.rows;
        copy_async(sa + stage * HEIGHT * 32 + at_a(row, a_chunk), real ? a + (int64_t)(t.row0 + row) * q.inner : q.a, real);
      }
      const bool real = cb.pair < t.last;
      const int64_t at = (q.down && real ? q.block[cb.pair] * q.panels * q.inner * PANEL : 0) + cb.slab * PANEL * PANEL;
      UNROLL for (int c = 0; c < C; c++)
        copy_async(&sb[stage][at_b(b_slot + c * (SLOTS / C), b_k, b_chunk)], real && b[c] ? b[c] + at : q.weight, real && b[c]);
      ca.advance(q, 2), cb.advance(q, 2);
    };

    float acc[M][4][4] = {};
    for (int s = 0; s < STAGES - 1; s++) {
      if (s < steps) load(s);
      copy_commit();
    }
    for (int s = 0; s < steps; s++) {
      copy_wait<STAGES - 2>();
      __syncthreads();  // step s has arrived, and nobody reads step s - 1 any more: its stage is free
      if (s + STAGES - 1 < steps) load((s + STAGES - 1) % STAGES);
      copy_commit();
      const X* pa = sa + s % STAGES * HEIGHT * 32;
      const W* pb = sb[s % STAGES];
      UNROLL for (int half = 0; half < 2; half++) {
        uint32_t fa[M][4], fb[4];
        UNROLL for (int m = 0; m < M; m++) load_matrices(fa[m], pa + at_a(warp_row + m * 16 + lane % 16, half * 2 + lane / 16));
        UNROLL for (int p = 0; p < 2; p++) {
          if constexpr (C == 2) {
            load_matrices_transposed(fb, pb + at_b(warp_slot + p, half * 16 + lane % 16, lane / 16));
          } else {  // int8: every value is exact in bfloat16 and in float16
            UNROLL for (int r = 0; r < 4; r++) {  // r: columns 0 or 8 on, and of those K 0 or 8 on
              const W* w = pb + at_b(warp_slot + p, half * 16 + r % 2 * 8 + lane % 4 * 2, 0) + r / 2 * 8 + lane / 4;
              const X two[2] = {from<X>(f32(w[0])), from<X>(f32(w[PANEL]))};
              memcpy(&fb[r], two, 4);
            }
          }
          UNROLL for (int m = 0; m < M; m++) {
            mma<X>(acc[m][p * 2], fa[m], fb[0], fb[1]);
            mma<X>(acc[m][p * 2 + 1], fa[m], fb[2], fb[3]);
          }
        }
      }
    }
    __syncthreads();  // the operands give their place to the sums
    UNROLL for (int c = 0; c < 4; c++)
      UNROLL for (int r = 0; r < M * 2; r++)
        *(float2*)(sums + t.at(warp_row + r * 8 + lane / 4, warp_slot * PANEL + c * 8 + lane % 4 * 2)) =
            float2{acc[r / 2][c][r % 2 * 2], acc[r / 2][c][r % 2 * 2 + 1]};
    __syncthreads();
    t.write<X>(q, sums, HEIGHT, slot0, slot1);
    __syncthreads();
  }
}

// 64 x 64 outputs, 8 x 4 to a thread. The next slab travels in registers while this one is multiplied.
template <class W> __global__ void __launch_bounds__(128) tile_simt(const Problem q) {
  constexpr int HEIGHT = 64, V = 16 / sizeof(W), LOADS = V < 8 ? 8 / V : 1, CHUNKS = PANEL * PANEL / V;  // CHUNKS: of a slab of a panel
  struct Operands {
    float a[2][PANEL][HEIGHT + 4];                 // transposed
    float b[2][SLOTS][PANEL * PANEL + PANEL];      // padded: two panels fill the 32 banks
  };
  __shared__ __align__(16) unsigned char memory[sizeof(Operands)];  // operands, then the tile of sums
  auto& sa = ((Operands*)memory)->a;
  auto& sb = ((Operands*)memory)->b;
  static_assert(sizeof(Operands) >= HEIGHT * SLOTS * PANEL * sizeof(float));
  const int tid = threadIdx.x, row = tid / 16 * 8, slot = tid % 16 / 4, col = tid % 4 * 4;
  Tile t(q, HEIGHT);

  for (int slot0 = 0, slot1; slot0 < t.slots; slot0 = slot1) {
    slot1 = t.segment(q, slot0);
    const int steps = (int)(t.last - t.first) * (q.inner / PANEL);
    Cursor at = {t.first, 0};
    float4 a[2];
    uint4 b[LOADS];
    const W* from[LOADS];
    UNROLL for (int l = 0; l < LOADS; l++) {
      const int s = (tid + 128 * l) / CHUNKS, chunk = (tid + 128 * l) % CHUNKS;
      from[l] = s >= slot0 && s < slot1 ? (const W*)q.weight + t.offset(q, s) + chunk * V : nullptr;
    }

    const auto load = [&] {
      UNROLL for (int l = 0; l < 2; l++) {
        const int r = tid / 4 + 32 * l;
        const float* p = rows_of<float>(q, t, at.pair) + (int64_t)(t.row0 + r) * q.inner + at.slab * PANEL + tid % 4 * 4;
        a[l] = t.row0 + r < q.rows ? *(const float4*)p : float4{};
      }
      const int64_t here = (q.down ? q.block[at.pair] * q.panels * q.inner * PANEL : 0) + at.slab * PANEL * PANEL;
      UNROLL for (int l = 0; l < LOADS; l++) b[l] = from[l] ? __ldg((const uint4*)(from[l] + here)) : uint4{};
      at.advance(q, 1);
    };
    const auto store = [&](int buffer) {
      UNROLL for (int l = 0; l < 2; l++) {
        const float v[4] = {a[l].x, a[l].y, a[l].z, a[l].w};
        UNROLL for (int i = 0; i < 4; i++) sa[buffer][tid % 4 * 4 + i][tid / 4 + 32 * l] = v[i];
      }
      UNROLL for (int l = 0; l < LOADS; l++) {
        const int s = (tid + 128 * l) / CHUNKS, chunk = (tid + 128 * l) % CHUNKS;
        if (s >= SLOTS) continue;  // int8 has work for half of the threads
        W w[V];
        memcpy(w, &b[l], 16);
        UNROLL for (int i = 0; i < V; i += 4)
          *(float4*)&sb[buffer][s][chunk * V + i] = float4{f32(w[i]), f32(w[i + 1]), f32(w[i + 2]), f32(w[i + 3])};
      }
    };

    float acc[8][4] = {};
    if (steps) load(), store(0);
    __syncthreads();
    for (int s = 0; s < steps; s++) {
      if (s + 1 < steps) load();
      UNROLL for (int k = 0; k < PANEL; k++) {
        const float4 a0 = *(const float4*)&sa[s % 2][k][row], a1 = *(const float4*)&sa[s % 2][k][row + 4];
        const float4 b0 = *(const float4*)&sb[s % 2][slot][k * PANEL + col];
        const float x[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w}, w[4] = {b0.x, b0.y, b0.z, b0.w};
        UNROLL for (int r = 0; r < 8; r++)
          UNROLL for (int c = 0; c < 4; c++) acc[r][c] += x[r] * w[c];
      }
      if (s + 1 < steps) store((s + 1) % 2);
      __syncthreads();
    }
    UNROLL for (int r = 0; r < 8; r++)
      *(float4*)((float*)memory + t.at(row + r, slot * PANEL + col)) = float4{acc[r][0], acc[r][1], acc[r][2], acc[r][3]};
    __syncthreads();
    t.write<float>(q, (float*)memory, HEIGHT, slot0, slot1);
    __syncthreads();
  }
}

// ============================================================= host =============================================================

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

struct Names { const char *op, *input, *weight, *scale, *bias; };  // for messages

std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); d++) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + ")";
}

#define REQUIRE(condition, name, ...) STD_TORCH_CHECK(condition, "compecon::", is.op, ": ", name, " must ", __VA_ARGS__)

void check(const Names& is, const Tensor& t, const char* name, const Tensor& like, int dim) {
  REQUIRE(t.dim() == dim, name, "have ", dim, " dimensions, got shape ", shape(t));
  REQUIRE(t.device() == like.device(), name, "be on the device of ", is.input);
  REQUIRE(t.is_contiguous(), name, "be contiguous");
  REQUIRE(dim == 1 || (uintptr_t)t.data_ptr() % 16 == 0, name, "start at a multiple of 16 bytes");  // what is read 16 bytes at once
}

// Checks everything and gathers all but the output. `per_block`: scale and bias have an entry for each feature of each
// block (up), not one for each output feature (down).
Problem describe(const Names& is, const Tensor& a, const Tensor& weight, const Maybe& scale, const Maybe& bias, const Tensor& group,
                 const Tensor& block, bool per_block) {
  const ScalarType x = a.scalar_type(), w = weight.scalar_type();
  check(is, a, is.input, a, 3);
  REQUIRE(x == ScalarType::Float || x == ScalarType::BFloat16 || x == ScalarType::Half, is.input, "be float32, bfloat16 or float16, got ", x);
  check(is, weight, is.weight, a, 4);
  REQUIRE(w == x || w == ScalarType::Char || (w == ScalarType::BFloat16 && x == ScalarType::Float), is.weight, "have the type of ", is.input,
          ", or be int8, or bfloat16 if ", is.input, " is float32; got ", w, " for ", x);
  REQUIRE(weight.size(3) == PANEL && weight.size(2) == a.size(2) && a.size(2) % PANEL == 0 && a.size(2) > 0, is.weight,
          "be (blocks, panels, k, 16), where k is the last size of ", is.input, " and a multiple of 16; got ", shape(weight), " for ", shape(a));
  const int64_t features = (per_block ? weight.size(0) : 1) * weight.size(1) * PANEL;
  REQUIRE(scale || w != ScalarType::Char, is.scale, "be given for int8 weights");
  if (scale) {
    check(is, *scale, is.scale, a, 1);
    REQUIRE(scale->scalar_type() == ScalarType::Float, is.scale, "be float32, got ", scale->scalar_type());
    REQUIRE(scale->size(0) == features, is.scale, "have ", features, " entries, got ", scale->size(0));
  }
  if (bias) {
    check(is, *bias, is.bias, a, 1);
    REQUIRE(bias->scalar_type() == x || bias->scalar_type() == ScalarType::Float, is.bias, "have the type of ", is.input, " or be float32, got ",
            bias->scalar_type());
    REQUIRE(bias->size(0) == features, is.bias, "have ", features, " entries, got ", bias->size(0));
  }
  for (const auto& [t, name] : {std::pair{&group, "group"}, std::pair{&block, "block"}}) {
    check(is, *t, name, a, 1);
    REQUIRE(t->scalar_type() == ScalarType::Long, name, "be int64, got ", t->scalar_type());
  }
  REQUIRE(group.size(0) == block.size(0), "group", "be as long as block, got ", group.size(0), " and ", block.size(0));
  REQUIRE(std::max({a.size(1), weight.size(1) * PANEL, per_block ? a.size(2) : group.size(0) * a.size(2)}) < (int64_t{1} << 31), is.input, "stay below 2^31 rows and columns");
  Problem q = {};
  q.a = a.data_ptr(), q.weight = weight.data_ptr(), q.bias = bias ? bias->data_ptr() : nullptr;
  q.scale = scale ? (const float*)scale->data_ptr() : nullptr;
  q.group = (const int64_t*)group.data_ptr(), q.block = (const int64_t*)block.data_ptr();
  q.n = group.size(0), q.rows = (int)a.size(1), q.inner = (int)a.size(2), q.panels = (int)weight.size(1), q.splits = 1;
  q.bias32 = bias && bias->scalar_type() == ScalarType::Float;
  return q;
}

template <int D> Tensor allocate(const Tensor& like, const std::array<int64_t, D>& size, ScalarType type) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, type);
}

constexpr int64_t parts(int64_t total, int64_t each) { return (total + each - 1) / each; }

template <class X, class W> void launch(Problem q, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const cudaStream_t stream = current_stream(device);
  int cores = 132;
  cudaSetDevice(device);  // this library has a CUDA runtime of its own, which DeviceGuard need not reach
  cudaDeviceGetAttribute(&cores, cudaDevAttrMultiProcessorCount, device);

  const auto run = [&](auto kernel, int threads, int64_t blocks, int64_t least) {  // least: K worth a thread block of its own
    Maybe partial, starts;
    if (q.down && q.groups > 1) {
      starts = allocate<1>(like, {q.groups + 1}, ScalarType::Long);
      q.starts = (const int64_t*)starts->data_ptr();
      find_starts<<<(unsigned)parts(q.groups + 1, 256), 256, 0, stream>>>(q.group, q.n, q.groups, (int64_t*)starts->data_ptr());
    }
    if (q.down) {  // too few outputs to fill the chip: cut the sum over pairs into parts
      const int64_t pairs = parts(q.n, q.groups);
      q.splits = (int)std::clamp<int64_t>(std::min({parts(2 * cores, blocks), pairs, pairs * q.inner / least}), 1, 64);
    }
    if (q.splits > 1) {
      partial = allocate<4>(like, {q.splits, q.groups, q.rows, q.panels * PANEL}, ScalarType::Float);
      q.partial = (float*)partial->data_ptr();
    }
    blocks *= q.splits;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "compecon: too many pairs and rows for one launch");
    kernel<<<(unsigned)blocks, threads, 0, stream>>>(q);
    if (q.splits > 1) finish<X><<<(unsigned)parts(q.groups * q.rows * q.panels * PANEL, 4 * 256), 256, 0, stream>>>(q);
  };

  constexpr bool simt = std::is_same_v<X, float>;
  if (q.rows <= (simt ? 16 : 8)) {
    const int64_t panels = (q.down ? q.groups : q.n) * q.panels;
    if (q.rows == 1) run(gemv<X, W, 1>, GEMV_WARPS * 32, panels, 128);
    else run(gemv<X, W, 4>, GEMV_WARPS * 32, panels * parts(q.rows, 4), 128);
  } else {
    const int64_t across = q.down ? q.groups * parts(q.panels, SLOTS) : parts(q.n * q.panels, SLOTS);
    if constexpr (simt) run(tile_simt<W>, 128, across * parts(q.rows, 64), 256);
    else if (across * parts(q.rows, 128) >= cores) run(tile_mma<X, W, 128>, 128, across * parts(q.rows, 128), 256);
    else run(tile_mma<X, W, 64>, 128, across * parts(q.rows, 64), 256);
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "compecon: CUDA launch failed: ", cudaGetErrorString(error));
}

void dispatch(const Problem& q, const Tensor& a, const Tensor& weight) {
  const ScalarType w = weight.scalar_type();
  switch (a.scalar_type()) {
    case ScalarType::BFloat16: return w == ScalarType::Char ? launch<bf16, int8_t>(q, a) : launch<bf16, bf16>(q, a);
    case ScalarType::Half: return w == ScalarType::Char ? launch<f16, int8_t>(q, a) : launch<f16, f16>(q, a);
    default:
      return w == ScalarType::Char ? launch<float, int8_t>(q, a) : w == ScalarType::BFloat16 ? launch<float, bf16>(q, a) : launch<float, float>(q, a);
  }
}

// `into`: multiply the result into this tensor, in place.
Tensor project_up(const Names& is, const Tensor& x, const Tensor& weight, const Maybe& scale, const Maybe& bias, const Tensor& group,
                  const Tensor& block, int64_t act, const Maybe& into = {}) {
  REQUIRE(act >= 0 && act < ACTS, "act", "be 0 (none), 1 (relu), 2 (gelu), 3 (gelu, tanh) or 4 (silu), got ", act);
  Problem q = describe(is, x, weight, scale, bias, group, block, true);
  REQUIRE(x.size(0) > 0 || q.n == 0, is.input, "have a group for every pair, got shape ", shape(x));
  Tensor h = into ? *into : allocate<3>(x, {q.n, q.rows, q.panels * PANEL}, x.scalar_type());
  q.groups = x.size(0), q.act = (int)act, q.out = h.data_ptr(), q.mul = into ? q.out : nullptr;
  if (h.numel()) dispatch(q, x, weight);
  return h;
}

Tensor project_down(const Names& is, const Tensor& h, const Tensor& weight, const Maybe& scale, const Maybe& bias, const Tensor& group,
                    const Tensor& block, int64_t groups) {
  REQUIRE(groups >= 0, "groups", "not be negative, got ", groups);
  Problem q = describe(is, h, weight, scale, bias, group, block, false);
  REQUIRE(h.size(0) == q.n, is.input, "have an entry for each of the ", q.n, " pairs, got shape ", shape(h));
  Tensor y = allocate<3>(h, {groups, q.rows, q.panels * PANEL}, h.scalar_type());
  q.down = true, q.groups = groups, q.out = y.data_ptr();
  if (y.numel()) dispatch(q, h, weight);
  return y;
}

using torch::stable::accelerator::DeviceGuard;
using torch::stable::contiguous;
using torch::stable::transpose;

bool served(const Tensor& x, const Tensor& weight) {
  const ScalarType t = x.scalar_type(), w = weight.scalar_type();
  return (t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half) && (w == t || w == ScalarType::Char || (w == ScalarType::BFloat16 && t == ScalarType::Float));
}

// Other types are left to the reference, which the dispatcher knows under another name
template <class... A> Tensor reference(const char* name, const A&... a) {
  std::array<StableIValue, sizeof...(A)> stack{torch::stable::detail::from(a)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor up(const Tensor& x, const Tensor& weight, const Maybe& scale, const Maybe& bias, const Tensor& group, const Tensor& block, int64_t act, bool rows_first) {
  if (!served(x, weight)) return reference("compecon::up_reference", x, weight, scale, bias, group, block, act, rows_first);
  const DeviceGuard guard(x.get_device_index());
  Tensor h = project_up({"up", "x", "weight", "scale", "bias"}, contiguous(x), weight, scale, bias, group, block, act);
  return rows_first ? transpose(contiguous(transpose(h, 0, 1)), 0, 1) : h;
}

Tensor down(const Tensor& h, const Tensor& weight, const Maybe& scale, const Maybe& bias, const Tensor& group, const Tensor& block, int64_t groups) {
  if (!served(h, weight)) return reference("compecon::down_reference", h, weight, scale, bias, group, block, groups);
  const DeviceGuard guard(h.get_device_index());
  return project_down({"down", "h", "weight", "scale", "bias"}, contiguous(h), weight, scale, bias, group, block, groups);
}

Tensor ffn(const Tensor& x, const Tensor& up, const Maybe& up_scale, const Maybe& up_bias, const Maybe& gate, const Maybe& gate_scale,
           const Maybe& gate_bias, const Tensor& down, const Maybe& down_scale, const Maybe& down_bias, const Tensor& group, const Tensor& block,
           int64_t act) {
  if (!served(x, up) || !served(x, down) || (gate && !served(x, *gate)))
    return reference("compecon::ffn_reference", x, up, up_scale, up_bias, gate, gate_scale, gate_bias, down, down_scale, down_bias, group, block, act);
  const DeviceGuard guard(x.get_device_index());
  const Names is_up = {"ffn", "x", "up", "up_scale", "up_bias"}, is_gate = {"ffn", "x", "gate", "gate_scale", "gate_bias"};
  const Names& is = is_gate;
  if (gate) REQUIRE(gate->dim() == 4 && up.dim() == 4 && gate->size(0) == up.size(0) && gate->size(1) == up.size(1), "gate",
                    "have the shape of up, ", shape(up), ", got ", shape(*gate));
  REQUIRE(down.dim() == 4 && up.dim() == 4 && down.size(0) == up.size(0), "down", "have the blocks of up, ", shape(up), ", got ", shape(down));
  const Tensor rows = contiguous(x);
  Maybe h;
  if (gate) h = project_up(is_gate, rows, *gate, gate_scale, gate_bias, group, block, act);
  h = project_up(is_up, rows, up, up_scale, up_bias, group, block, gate ? NONE : act, h);
  return project_down({"ffn", "hidden", "down", "down_scale", "down_bias"}, *h, down, down_scale, down_bias, group, block, x.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compecon, CUDA, m) {
  m.impl("up", TORCH_BOX(&up));
  m.impl("down", TORCH_BOX(&down));
  m.impl("ffn", TORCH_BOX(&ffn));
}
