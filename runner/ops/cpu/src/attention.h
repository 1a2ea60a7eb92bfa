// Softmax attention in float32 over a key/value cache that is read where it lies. Included inside an ISA namespace.
//
// The query heads that share a key/value head are handled together: row r = l * G + g of a (batch, kv head) pair is
// position l of head kv * G + g. Few rows (decode): keys are split over pieces, each leaves (max, sum, sum of p v), and
// the pieces are merged. Many rows (prefill): kPanel rows at a time against blocks of keys, online softmax, no L x S.

constexpr int kFewQueries = 8;
constexpr int kKeyBlock = 64;
constexpr int kMaxSplit = 256;
constexpr float kMinusInf = -__builtin_inff();

struct KeyRange {
  int64_t first, last;  // visible keys are [first, last)
};

RUNNER_INLINE KeyRange visible(const AttentionArgs& a, int64_t l) {
  int64_t here = a.s - a.l + l, last = a.causal ? here + 1 : a.s;
  int64_t first = a.window > 0 && here + 1 > a.window ? here + 1 - a.window : 0;
  if (last > a.s) last = a.s;
  if (last < 0) last = 0;
  return {first < last ? first : last, last};
}

template <class F>
RUNNER_INLINE auto with_cache_type(DType t, F&& f) {
  if (t == DType::i16) return f(I16{});
  return with_type(t, f);
}

// The scale of a row of d codes; 1 where the rows are plain numbers.
template <class T>
RUNNER_INLINE float row_scale(const typename T::S* row, int64_t d) {
  float scale = 1.0f;
  if constexpr (T::kCodes) memcpy(&scale, row + d, 4);
  return scale;
}

// p[r * kMaxSplit + i] *= scale of row i
template <class T, int R>
RUNNER_INLINE void apply_scales(const typename T::S* rows, int64_t stride, int64_t d, int64_t n, float* p) {
  if constexpr (T::kCodes) {
    for (int64_t i = 0; i < n; ++i) {
      float scale = row_scale<T>(rows + i * stride, d);
      for (int r = 0; r < R; ++r) p[r * kMaxSplit + i] *= scale;
    }
  }
}

// What the mask adds to the score of (b, h, l, s).
RUNNER_INLINE float mask_at(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, int64_t s) {
  int64_t i = b * a.mb + h * a.mh + l * a.ml + s * a.ms;
  if (a.mask_kind == 1) return ((const uint8_t*)a.mask)[i] ? 0.0f : kMinusInf;
  return load_one(a.mask, a.mt, i);
}

// A masked key has no part in the result, even where its score is NaN.
RUNNER_INLINE float masked(float score, float mask) { return mask == kMinusInf ? kMinusInf : score + mask; }

template <class T>
RUNNER_INLINE const typename T::S* key_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t s) {
  return (const typename T::S*)a.k + b * a.kb + h * a.kh + s * a.ks;
}
template <class T>
RUNNER_INLINE const typename T::S* value_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t s) {
  return (const typename T::S*)a.v + b * a.vb + h * a.vh + s * a.vs;
}

// x[i] *= 2^powers[i]
RUNNER_INLINE void times_powers(const int16_t* powers, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= bits_to_float((uint32_t)(127 + powers[i]) << 23);
}

inline void load_query(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, float* dst) {
  with_type(a.qt, [&](auto t) {
    using T = decltype(t);
    to_float<T>((const typename T::S*)a.q + b * a.qb + h * a.qh + l * a.ql, dst, a.d);
  });
  for (int64_t i = 0; i < a.d; ++i) dst[i] *= a.scale;
  // A channel's power belongs to all its codes, so that it can be applied to what they are multiplied with.
  if (a.kt == DType::i16) times_powers(key_row<I16>(a, b, h / (a.h / a.kv), a.header), a.d, dst);
}

inline void store_result(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, float* src) {
  if (a.kt == DType::i16) times_powers(value_row<I16>(a, b, h / (a.h / a.kv), a.header), a.dv, src);
  with_type(a.qt, [&](auto t) {
    using T = decltype(t);
    from_float<T>(src, (typename T::S*)a.out + ((b * a.h + h) * a.l + l) * a.dv, a.dv);
  });
}

// Rows of keys or values to prefetch ahead, `stride` items apart: some 12 KiB of one stream.
template <class T>
RUNNER_INLINE int64_t rows_ahead(int64_t stride) {
  return 12288 / (stride * (int64_t)sizeof(typename T::S) + 1) + 1;
}

// Keys whose sums with R rows of q fit the registers beside a vector of each row and of one key.
template <int R>
constexpr int keys_at_once() {
  if (kRegisters == 32 || R < 3) return W / (R == 3 ? 4 : R);
  return (kRegisters - R - 1) / R;
}

// score[r * kMaxSplit + i] = q row r . key i, for R rows and keys [i, i + N); d a multiple of W.
template <class T, int R, int N>
RUNNER_INLINE void score_block(const AttentionArgs& a, const float* q, const typename T::S* k, float* score) {
  constexpr int64_t kItem = sizeof(typename T::S);
  constexpr int kBlocks = (R * N + W - 1) / W;
  const int64_t next = rows_ahead<T>(a.ks);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    for (int64_t d = 0; d < a.d; d += 64 / kItem) prefetch(k + (i + next) * a.ks + d);
  }
  VF acc[kBlocks * W];
#pragma GCC unroll 16
  for (int i = 0; i < kBlocks * W; ++i) acc[i] = zero();
  for (int64_t d = 0; d < a.d; d += W) {
    VF qv[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) qv[r] = load(q + r * a.d + d);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      VF kv = T::load_v(k + i * a.ks + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * N + i] = fma(kv, qv[r], acc[r * N + i]);
    }
  }
  float out[kBlocks * W];
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) store(out + b * W, sums(acc + b * W));
  for (int r = 0; r < R; ++r) memcpy(score + r * kMaxSplit, out + r * N, N * 4);
}

template <class T, int R>
RUNNER_INLINE void few_scores(const AttentionArgs& a, const float* q, const typename T::S* k, int64_t n, float* score) {
  constexpr int N = keys_at_once<R>();
  int64_t i = 0;
  if (a.d % W == 0) {
    for (; i + N <= n; i += N) score_block<T, R, N>(a, q, k + i * a.ks, score + i);
  }
  for (; i < n; ++i) {
    for (int r = 0; r < R; ++r) {
      VF acc = zero();
      int64_t d = 0;
      for (; d + W <= a.d; d += W) acc = fma(T::load_v(k + i * a.ks + d), load(q + r * a.d + d), acc);
      float sum = hsum(acc);
      for (; d < a.d; ++d) sum += T::to(k[i * a.ks + d]) * q[r * a.d + d];
      score[r * kMaxSplit + i] = sum;
    }
  }
}

// out[r * stride + d] = sum_i p[r * kMaxSplit + i] v[i][d]. A few rows of v at a time meet all columns, so that rows come
// from memory at an even pace: with all rows at a time, the first columns waited for memory and the others for nothing.
template <class T, int R>
RUNNER_INLINE void few_values(const AttentionArgs& a, const float* p, const typename T::S* v, int64_t n, float* out,
                              int64_t stride) {
  constexpr int C = kRegisters == 32 ? 4 : 2;  // vectors of d at a time
  constexpr int64_t kSome = 16;
  constexpr int64_t kItem = sizeof(typename T::S);
  const int64_t next = rows_ahead<T>(a.vs);
  for (int64_t first = 0; first < n; first += kSome) {
    const int64_t last = first + kSome < n ? first + kSome : n;
    for (int64_t i = first; i < last; ++i) {
      for (int64_t d = 0; d < a.dv; d += 64 / kItem) prefetch(v + (i + next) * a.vs + d);
    }
    int64_t d = 0;
    auto step = [&](auto count) {
      constexpr int N = decltype(count)::value;
      for (; d + N * W <= a.dv; d += N * W) {
        VF acc[R][N];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) acc[r][j] = first ? load(out + r * stride + d + j * W) : zero();
        }
        for (int64_t i = first; i < last; ++i) {
          VF vv[N];
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) vv[j] = T::load_v(v + i * a.vs + d + j * W);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            VF w = set1(p[r * kMaxSplit + i]);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) acc[r][j] = fma(w, vv[j], acc[r][j]);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) store(out + r * stride + d + j * W, acc[r][j]);
        }
      }
    };
    step(Int<C>{});
    step(Int<1>{});
    for (; d < a.dv; ++d) {
      for (int r = 0; r < R; ++r) {
        float sum = first ? out[r * stride + d] : 0.0f;
        for (int64_t i = first; i < last; ++i) sum += p[r * kMaxSplit + i] * T::to(v[i * a.vs + d]);
        out[r * stride + d] = sum;
      }
    }
  }
  if (n <= 0) {
    for (int r = 0; r < R; ++r) memset(out + r * stride, 0, (size_t)a.dv * 4);
  }
}

// Scores to weights e^(score - max) in place; returns max and sum. All -inf: weights 0.
RUNNER_INLINE void softmax_piece(float* p, int64_t n, float* most, float* total) {
  VF m = set1(kMinusInf);
  int64_t padded = (n + W - 1) / W * W;
  for (int64_t i = n; i < padded; ++i) p[i] = kMinusInf;
  for (int64_t i = 0; i < n; i += W) m = vmax(load(p + i), m);
  *most = hmax(m);
  float base = *most == kMinusInf ? 0.0f : *most;
  VF sum = zero();
  for (int64_t i = 0; i < n; i += W) {
    VF e = vexp(load(p + i) - set1(base));
    store(p + i, e);
    sum = sum + e;
  }
  *total = hsum(sum);
}

struct FewPlan {
  int64_t group, rows, split, first, pieces, stride;  // stride: floats a row of a piece leaves: max, sum, d values
};

inline FewPlan plan_few(const AttentionArgs& a) {
  FewPlan p;
  p.group = a.h / a.kv;
  p.rows = p.group * a.l;
  p.split = a.s <= 1024 ? 64 : kMaxSplit;
  p.first = visible(a, 0).first / p.split;
  p.pieces = (a.s + p.split - 1) / p.split - p.first;
  p.stride = a.dv + 2;
  return p;
}

// One piece of keys for one (batch, kv head): parts[row] = max, sum, values.
template <class T>
void few_piece(const AttentionArgs& a, const FewPlan& plan, int64_t b, int64_t kv, int64_t s0, float* parts) {
  int64_t n = a.s - s0 < plan.split ? a.s - s0 : plan.split;
  alignas(64) float score[4 * kMaxSplit];
  float* q = (float*)scratch(Slot::tile, 4 * a.d * 4);
  auto rows_from = [&](auto count, int64_t r) {
    constexpr int R = decltype(count)::value;
    for (int i = 0; i < R; ++i) {
      load_query(a, b, kv * plan.group + (r + i) % plan.group, (r + i) / plan.group, q + i * a.d);
    }
    const auto *k = key_row<T>(a, b, kv, s0), *v = value_row<T>(a, b, kv, s0);
    few_scores<T, R>(a, q, k, n, score);
    apply_scales<T, R>(k, a.ks, a.d, n, score);
    for (int i = 0; i < R; ++i) {
      int64_t l = (r + i) / plan.group, h = kv * plan.group + (r + i) % plan.group;
      float *p = score + i * kMaxSplit, *part = parts + (r + i) * plan.stride;
      KeyRange keys = visible(a, l);
      for (int64_t s = s0; s < keys.first && s < s0 + n; ++s) p[s - s0] = kMinusInf;
      for (int64_t s = keys.last > s0 ? keys.last : s0; s < s0 + n; ++s) p[s - s0] = kMinusInf;
      if (a.mask) {
        for (int64_t j = 0; j < n; ++j) p[j] = masked(p[j], mask_at(a, b, h, l, s0 + j));
      }
      softmax_piece(p, n, part, part + 1);
    }
    apply_scales<T, R>(v, a.vs, a.dv, n, score);
    few_values<T, R>(a, score, v, n, parts + r * plan.stride + 2, plan.stride);
  };
  int64_t r = 0;
  for (; r + 4 <= plan.rows; r += 4) rows_from(Int<4>{}, r);
  if (plan.rows - r == 3) rows_from(Int<3>{}, r), r += 3;
  if (plan.rows - r == 2) rows_from(Int<2>{}, r), r += 2;
  if (plan.rows - r == 1) rows_from(Int<1>{}, r);
}

inline float sink_of(const AttentionArgs& a, int64_t h) {
  return a.sinks ? load_one(a.sinks, a.sinkt, h) : kMinusInf;
}

// Merges the pieces of one row: every piece weighs e^(its max - the greatest max).
inline void few_merge(const AttentionArgs& a, const FewPlan& plan, int64_t b, int64_t h, int64_t l, const float* part) {
  int64_t step = plan.rows * plan.stride;
  float most = sink_of(a, h);
  for (int64_t i = 0; i < plan.pieces; ++i) most = part[i * step] > most ? part[i * step] : most;
  float base = most == kMinusInf ? 0.0f : most;
  float total = __builtin_expf(sink_of(a, h) - base);
  float* out = (float*)scratch(Slot::tile, a.dv * 4);
  for (int64_t d = 0; d < a.dv; ++d) out[d] = 0;
  for (int64_t i = 0; i < plan.pieces; ++i) {
    const float* p = part + i * step;
    if (p[1] == 0) continue;  // nothing visible in this piece
    float weight = __builtin_expf(p[0] - base);
    total += weight * p[1];
    for (int64_t d = 0; d < a.dv; ++d) out[d] += weight * p[2 + d];
  }
  float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < a.dv; ++d) out[d] *= inverse;
  store_result(a, b, h, l, out);
}

inline void few_queries(const AttentionArgs& a) {
  FewPlan plan = plan_few(a);
  int64_t pairs = a.b * a.kv, piece_floats = plan.rows * plan.stride;
  float* parts = (float*)scratch(Slot::packed, pairs * plan.pieces * piece_floats * 4);
  Pool& pool = Pool::get();
  pool.parallel_for((int)(pairs * plan.pieces), [&](int i) {
    int64_t pair = i / plan.pieces, piece = i % plan.pieces;
    with_cache_type(a.kt, [&](auto t) {
      few_piece<decltype(t)>(a, plan, pair / a.kv, pair % a.kv, (plan.first + piece) * plan.split,
                             parts + i * piece_floats);
    });
  });
  auto merge_pair = [&](int pair) {
    for (int64_t r = 0; r < plan.rows; ++r) {
      int64_t b = pair / a.kv, h = pair % a.kv * plan.group + r % plan.group;
      few_merge(a, plan, b, h, r / plan.group, parts + pair * plan.pieces * piece_floats + r * plan.stride);
    }
  };
  if (pairs * plan.pieces * piece_floats > 65536) {
    pool.parallel_for((int)pairs, merge_pair);
  } else {
    for (int pair = 0; pair < pairs; ++pair) merge_pair(pair);
  }
}
