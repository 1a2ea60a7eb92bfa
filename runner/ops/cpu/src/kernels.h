// The interface between primitives and kernels: plain structs, and a table of entry points per instruction set.
#pragma once

#include <cstdint>

namespace runner {

enum class DType : uint8_t { f32, bf16, f16, i16 };  // i16: rows of a cache only, see AppendArgs
inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// The meaning of packed codes and their scales, in MLX's layouts. affine: w = scale * q + shift. The others
// have no shifts and scales of one byte: mxfp4 and mxfp8 (OCP Microscaling 1.0) an e2m1 or e4m3 code times a power of
// two (e8m0), nvfp4 an e2m1 code times an e4m3 number.
enum class Format : uint8_t { affine, mxfp4, mxfp8, nvfp4 };

// out[M, N] = x[M, K] @ w[N, K]^T + bias[N]; rows contiguous. bits == 0: w is plain of type wt;
// else w is packed, `bits` a code, with a scale for each `group` values of a row.
struct LinearArgs {
  const void* x;
  void* out;  // dtype xt
  DType xt;
  int64_t m, n, k;
  const void* w;
  DType wt;
  const void* scales;
  const void* shifts;
  DType st;  // of an affine layer's scales and shifts
  int group, bits;
  Format format;
  bool coarse;       // packed in affine or mxfp4: x is rounded to 8 bits with a scale for each group
  const void* bias;  // may be null
  DType bt;
};

// out[p] = x[p / per] @ w^T + bias for `pairs` of a row of x and an expert, experts[p], whose w and bias they are: one of
// `count` that lie one behind the other, from those of `matrix` on (whose x and out are all rows). NaN where there is none.
struct GatherArgs {
  LinearArgs matrix;
  const int32_t* experts;
  int64_t pairs, per, count;
};

// The `count` experts of each row of logits[rows, experts] with the largest scores (+ correction), the largest first, and
// their scores as weights, or these divided by their sum + eps; times `factor`. With kept < groups, only experts of the
// `kept` groups with the largest sums of `members` best scores are chosen from.
struct RouteArgs {
  const float* logits;
  const void* correction;            // null, or [experts]
  DType ct;
  uint32_t* chosen;                  // [rows, count]
  float* weights;                    // [rows, count]
  int64_t rows, experts, count, groups, kept, members;
  bool sigmoid, normalized;  // scores: sigmoid, or softmax
  float eps, factor;
};

// out[rows, dim] = sum over k of x[rows, count, dim] * weights[rows, count]
struct MixtureArgs {
  const void* x;
  const float* weights;
  void* out;
  DType xt;
  int64_t rows, count, dim;
};

// out[r, :] = normalise(x[r, :] (+ residual[r, :])) * weight (+ shift). mean == true: layer norm.
struct NormArgs {
  const void* x;
  const void* residual;  // may be null
  void* sum;             // x + residual, with residual only
  void* out;
  DType xt;
  const void* weight;  // may be null
  const void* shift;   // may be null
  DType wt, ht;
  int64_t rows, dim;
  float eps;
  bool mean;
};

// x[B, H, L, D] with any strides (elements), out contiguous.
struct RopeArgs {
  const void* x;
  void* out;
  DType xt;
  int64_t b, h, l, d;
  int64_t sb, sh, sl, sd;
  const float* cos;  // [B or 1, L, dims / 2]
  const float* sin;
  bool table_per_batch;
  int64_t dims;
  bool traditional;
};

// q[B, H, L, D], k[B, KV, S, D], v[B, KV, S, DV], out [B, H, L, DV]: last dimension contiguous, other strides free.
// Query l has the position of key S - L + l; key 0 has position `start` in its sequence. Type i16: row `header` of k and v holds the powers of their channels, see AppendArgs.
struct AttentionArgs {
  const void *q, *k, *v;
  void* out;
  DType qt, kt;
  int64_t b, h, kv, l, s, d, dv;
  int64_t qb, qh, ql;
  int64_t kb, kh, ks;
  int64_t vb, vh, vs;
  int64_t ob, oh, ol;
  int64_t header, start;
  float scale, softcap;    // softcap 0: none; else score = softcap * tanh(score / softcap)
  bool causal;
  int64_t chunk;           // 0: none; else only keys of the query's own chunk of so many positions
  int64_t window;          // 0: none; else the last `window` keys up to the query's own position
  const void* mask;        // null, or bool (mask_kind 1) / additive of type mt (mask_kind 2)
  int mask_kind;
  DType mt;
  int64_t mb, mh, ml, ms;  // mask strides
  const void* sinks;       // null, or [H]
  DType sinkt;
};

// Rows of k or v [B, KV, L, D], any strides but the last, into a cache's buffer [B, KV, capacity, width] from row `at`.
// Type i16: width D + 2, D codes and then a float32 scale in the bytes of the last two. The last row of the capacity is
// no token's: its first D numbers are the powers of the channels, read here; value = code * scale * 2^power.
struct AppendArgs {
  const void* x;
  void* to;
  DType xt, type;
  int64_t b, h, l, d;
  int64_t sb, sh, sl;
  int64_t at, capacity;
};

enum class Activation : uint8_t { silu, gelu, gelu_approx, relu, relu2, clamped };  // clamped: of a GLU only

struct GluArgs {
  const void* x;  // [rows, 2 * dim]: gate then up; without a gate [rows, dim]
  void* out;      // [rows, dim]
  DType xt;
  int64_t rows, dim;
  Activation act;
  bool gated;
  float alpha, limit;  // clamped: g sigmoid(alpha g) (u + 1), with g = min(gate, limit) and u = up within +- limit
};

enum class Simple : uint8_t { plus, product, times, over };

// out = x + y or x * y, `size` values each; or, with y one value, x * y (times) or x / y
struct SimpleArgs {
  const void *x, *y;
  void* out;
  DType type;
  int64_t size;
  Simple op;
};

struct ArgmaxArgs {
  const void* x;
  uint32_t* out;
  float* peak;  // null, or [rows]: the greatest, but NaN where the row holds NaN
  DType xt;
  int64_t rows, dim;
};

// What a sequence carries from token to token, where its memory is its own: it is read, and written, here.
struct Moved {
  const float* from;
  float* to;
};

// A convolution of each of C channels with its last `taps` inputs, the oldest first: x[B, L, C] follows the inputs
// before[B, taps - 1, C]. All float32; x's last dimension contiguous, its other strides free, the rest contiguous.
struct ConvArgs {
  const float *x, *before;
  float* out;          // [B, L, C]
  float* after;        // null, or [B, taps - 1, C]: the last inputs; apart from `before`
  const Moved* each;   // null, or [B] in the places of `before` and `after`
  const void* weight;  // [taps, C]
  const void* bias;    // null, or [C]
  DType wt, bt;
  int64_t b, l, c, taps;
  int64_t xb, xl;
  bool activated;
  Activation act;
};

// A state S[dv, dk] for each of H heads that each of L tokens lets decay and adds to, S = S decay + d k^T, and reads,
// out = S q (+ skip v); `groups` of heads share their q and k. Two forms of d and of the decay:
// delta rule: d = sigmoid(b) (v - S decay k), q and k of length 1, q by 1 / sqrt(dk) after it,
//   decay = exp(-exp(a_log) softplus(a + bias)); with `channels` a decay for each of dk;
// state space: d = dt v, decay = exp(-exp(a_log) dt), with dt = softplus(a + bias) held to [least, most].
// All float32; last dimensions contiguous, other strides free; a_log, bias, skip, states and out contiguous.
struct RecurrenceArgs {
  const float *q, *k, *v, *a, *b;
  int64_t qb, ql, qg, kb, kl, kg, vb, vl, vh, ab, al, ah, bb, bl;
  const void *a_log, *bias, *skip;  // [H], [H] or [H, dk], null or [H]
  DType lt, bt, st;
  const float* from;  // [B, H, dv, dk]
  float* to;          // the same shape; it may be `from`
  const Moved* each;  // null, or [B] in the places of both
  float* out;         // [B, L, H, dv]
  int64_t batch, l, heads, groups, dk, dv;
  bool delta, channels;
  float least, most;
};

// States S[C, N] that each of L tokens lets decay and adds to, S = S exp(dt rates) + dt x B, and reads,
// out = S C + skip x, with dt = softplus(steps). All float32; last dimensions contiguous, other strides free; rates,
// skip, states and out contiguous.
struct SelectiveArgs {
  const float *x, *steps, *b, *c;  // [B, L, C] twice, [B, L, N] twice
  int64_t xb, xl, sb, sl, bb, bl, cb, cl;
  const float *rates, *skip;  // [C, N], [C]
  const float* from;          // [B, C, N]
  float* to;                  // the same shape; it may be `from`
  const Moved* each;          // null, or [B] in the places of both
  float* out;                 // [B, L, C]
  int64_t batch, l, channels, states;
};

// out[r, :] = normalise(x[r, :] (* silu(gate))) * weight (* silu(gate)), the gate before or after; float32. Row r has
// the gate's row r % per of the line r / per, whose lines lie `line` apart, and the weight's row r % per if it has them.
struct GatedNormArgs {
  const float *x, *gate;
  float* out;
  const void* weight;
  DType wt;
  int64_t rows, dim, per, line;
  float eps;
  bool gate_first, weight_by_row;
};

// out = x * sigmoid(gate), float32 [B, H, L, D]: x and out contiguous, the gate with any strides but the last
struct GateArgs {
  const float *x, *gate;
  float* out;
  int64_t b, h, l, d, gb, gh, gl;
};

// What picking.h makes of a row of n logits: the greatest of each group of so many, and the sums of so many weights.
constexpr int64_t kLogitsPerPeak = 16, kWeightsPerSum = 64;
constexpr int kBounds = 8;
inline int64_t peak_groups(int64_t n) { return n / kLogitsPerPeak + 16 * kLogitsPerPeak; }  // at most
inline int64_t weight_sums(int64_t n) { return (n + kWeightsPerSum - 1) / kWeightsPerSum; }

struct Kernels {
  const char* name;
  void (*linear)(const LinearArgs&);
  void (*embed)(const LinearArgs&);  // out[m, k] = rows of w by the numbers x, int32; NaN where there is no such row
  void (*gather)(const GatherArgs&);
  void (*route)(const RouteArgs&);
  void (*mixture)(const MixtureArgs&);
  void (*norm)(const NormArgs&);
  void (*rope)(const RopeArgs&);
  void (*attention)(const AttentionArgs* list, int count);  // of several sequences
  void (*append)(const AppendArgs* list, int count, int64_t ahead);  // so many rows behind `at`
  void (*glu)(const GluArgs&);
  void (*argmax)(const ArgmaxArgs&);
  void (*simple)(const SimpleArgs&);
  void (*conv)(const ConvArgs&);
  void (*recurrence)(const RecurrenceArgs&);
  void (*selective)(const SelectiveArgs&);
  void (*gated_norm)(const GatedNormArgs&);
  void (*gate)(const GateArgs&);
  // The greatest of x[0, n); NaN where x holds NaN. The greatest of each of *groups disjoint parts goes to `most`.
  float (*peak)(const float* x, int64_t n, float* most, int64_t* groups);
  // weights[i] = exp(y), y = (x[i] - peak) / temperature, or 0 where y < floor. Returns their sum; sums[j]: of piece j.
  double (*weigh)(const float* x, int64_t n, float peak, float temperature, float floor, float* weights, float* sums);
  // Leaves the weights where x[i] > bound, or x[i] == bound and i < split, and makes the others 0; sums as above.
  void (*keep)(const float* x, int64_t n, float bound, int64_t split, float* weights, float* sums);
  // sums[b]: the weights where x[i] >= bounds[b], for kBounds of them
  void (*weights_from)(const float* x, const float* weights, int64_t n, const float* bounds, double* sums);
  // Writes all i with low <= x[i] < high, ascending, to `ids`, which has room for n; returns how many.
  int64_t (*between)(const float* x, int64_t n, float low, float high, uint32_t* ids);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();    // null where the compiler or the CPU has none
const Kernels* avx512_kernels();  // AVX-512 F, BW, DQ, VL and VNNI
const Kernels* amx_kernels();     // those, and AMX for products of packed weights with many rows; the same bits
const Kernels* amx_emulated_kernels();  // its twin where there is AVX-512, many times slower: for tests

// The table in use: the best this CPU has, or RUNNER_KERNELS_ISA.
const Kernels& kernels();
// Chooses a table by name; false when this CPU cannot run it.
bool select_isa(const char* name);

}  // namespace runner
