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

// A key that is masked away is away even where its score is NaN.
RUNNER_INLINE float masked(float score, float mask) { return mask == kMinusInf ? kMinusInf : score + mask; }

template <class T>
RUNNER_INLINE const typename T::S* key_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t s) {
  return (const typename T::S*)a.k + b * a.kb + h * a.kh + s * a.ks;
}
template <class T>
RUNNER_INLINE const typename T::S* value_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t s) {
  return (const typename T::S*)a.v + b * a.vb + h * a.vh + s * a.vs;
}

inline void load_query(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, float* dst) {
  with_type(a.qt, [&](auto t) {
    using T = decltype(t);
    to_float<T>((const typename T::S*)a.q + b * a.qb + h * a.qh + l * a.ql, dst, a.d);
  });
  for (int64_t i = 0; i < a.d; ++i) dst[i] *= a.scale;
}

inline void store_result(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, const float* src) {
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

// score[r * kMaxSplit + i] = q row r . key i, for R rows and keys [i, i + N); d a multiple of W, R * N at most W.
template <class T, int R, int N>
RUNNER_INLINE void score_block(const AttentionArgs& a, const float* q, const typename T::S* k, float* score) {
  constexpr int64_t kItem = sizeof(typename T::S);
  const int64_t next = rows_ahead<T>(a.ks);
  VF acc[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) acc[i] = zero();
  for (int64_t d = 0; d < a.d; d += W) {
    VF kv[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      kv[i] = T::load_v(k + i * a.ks + d);
      if (d * kItem % 64 == 0) prefetch(k + (i + next) * a.ks + d);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      VF qv = load(q + r * a.d + d);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) acc[r * N + i] = fma(kv[i], qv, acc[r * N + i]);
    }
  }
  float out[W];
  store(out, sums(acc));
  for (int r = 0; r < R; ++r) memcpy(score + r * kMaxSplit, out + r * N, N * 4);
}

template <class T, int R>
RUNNER_INLINE void few_scores(const AttentionArgs& a, const float* q, const typename T::S* k, int64_t n, float* score) {
  constexpr int N = W / (R == 3 ? 4 : R);
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

// out[r * stride + d] = sum_i p[r * kMaxSplit + i] v[i][d]
template <class T, int R>
RUNNER_INLINE void few_values(const AttentionArgs& a, const float* p, const typename T::S* v, int64_t n, float* out,
                              int64_t stride) {
  constexpr int C = kRegisters == 32 ? 4 : 2;  // vectors of d at a time
  constexpr int64_t kItem = sizeof(typename T::S);
  const int64_t next = rows_ahead<T>(a.vs);
  int64_t d = 0;
  auto step = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (; d + N * W <= a.dv; d += N * W) {
      VF acc[R][N];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = zero();
      }
      for (int64_t i = 0; i < n; ++i) {
        VF vv[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
          vv[j] = T::load_v(v + i * a.vs + d + j * W);
          if (j * W * kItem % 64 == 0) prefetch(v + (i + next) * a.vs + d + j * W);
        }
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
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += p[r * kMaxSplit + i] * T::to(v[i * a.vs + d]);
      out[r * stride + d] = sum;
    }
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

// ---- many queries

// A panel's state, lanes are rows: running max and sum, results transposed.
struct PanelState {
  float *q, *score, *out;      // [d][kPanel], [kKeyBlock][kPanel], [dv][kPanel]
  float *keys, *values;        // float32 copies of a block where the cache is 16-bit
  float most[kPanel], total[kPanel];
};

// Masks scores of keys [s0, s0 + n) for `cols` rows that start at row r0; nothing to do when all are visible to all.
inline void mask_block(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int64_t cols, int64_t s0, int64_t n,
                       float* score) {
  int64_t group = a.h / a.kv;
  for (int64_t c = 0; c < cols; ++c) {
    int64_t l = (r0 + c) / group;
    KeyRange keys = visible(a, l);
    for (int64_t i = 0; i < n && s0 + i < keys.first; ++i) score[i * kPanel + c] = kMinusInf;
    for (int64_t i = keys.last > s0 ? keys.last - s0 : 0; i < n; ++i) score[i * kPanel + c] = kMinusInf;
    if (!a.mask) continue;
    int64_t h = kv * group + (r0 + c) % group;
    for (int64_t i = 0; i < n; ++i) {
      float* at = score + i * kPanel + c;
      *at = masked(*at, mask_at(a, b, h, l, s0 + i));
    }
  }
}

// One step of the online softmax over n keys; scores become weights, the results so far are rescaled.
RUNNER_INLINE void online_softmax(PanelState& st, int64_t n, int64_t d, int cols) {
  for (int j = 0; j < kPanel && j < cols; j += W) {
    VF old = load(st.most + j), most = old;
    for (int64_t i = 0; i < n; ++i) most = vmax(load(st.score + i * kPanel + j), most);
    VF base = select_lt(set1(kMinusInf), most, most, zero());
    VF sum = zero();
    for (int64_t i = 0; i < n; ++i) {
      VF e = vexp(load(st.score + i * kPanel + j) - base);
      store(st.score + i * kPanel + j, e);
      sum = sum + e;
    }
    VF keep = vexp(old - base);
    store(st.total + j, fma(load(st.total + j), keep, sum));
    store(st.most + j, most);
    for (int64_t i = 0; i < d; ++i) store(st.out + i * kPanel + j, load(st.out + i * kPanel + j) * keep);
  }
}

template <class T>
RUNNER_INLINE const float* block_as_float(const typename T::S* rows, int64_t stride, int64_t n, int64_t d, float* copy,
                                          int64_t* out_stride) {
  if constexpr (sizeof(typename T::S) == 4) {
    *out_stride = stride;
    return rows;
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to_float<T>(rows + i * stride, copy + i * d, d);
      if constexpr (T::kCodes) {
        float scale = row_scale<T>(rows + i * stride, d);
        for (int64_t j = 0; j < d; ++j) copy[i * d + j] *= scale;
      }
    }
    *out_stride = d;
    return copy;
  }
}

template <class T>
void panel_keys(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int cols, PanelState& st) {
  int64_t group = a.h / a.kv;
  int64_t begin = visible(a, r0 / group).first, end = visible(a, (r0 + cols - 1) / group).last;
  KeyRange common = {visible(a, (r0 + cols - 1) / group).first, visible(a, r0 / group).last};  // visible to all rows
  for (int64_t s = begin; s < end; s += kKeyBlock) {
    int64_t n = end - s < kKeyBlock ? end - s : kKeyBlock, stride;
    const float* k = block_as_float<T>(key_row<T>(a, b, kv, s), a.ks, n, a.d, st.keys, &stride);
    panel_product(k, stride, 1, n, st.q, a.d, cols, st.score, kPanel, false);
    if (a.mask || s < common.first || s + n > common.last) mask_block(a, b, kv, r0, cols, s, n, st.score);
    online_softmax(st, n, a.dv, cols);
    const float* v = block_as_float<T>(value_row<T>(a, b, kv, s), a.vs, n, a.dv, st.values, &stride);
    panel_product(v, 1, stride, a.dv, st.score, n, cols, st.out, kPanel, true);
  }
}

inline void attention_panel(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0) {
  int64_t group = a.h / a.kv, rows = group * a.l;
  int cols = (int)(rows - r0 < kPanel ? rows - r0 : kPanel);
  PanelState st;
  int64_t line = a.d > a.dv ? a.d : a.dv;
  int64_t floats = (a.d + a.dv + kKeyBlock) * kPanel + kKeyBlock * (a.d + a.dv) + kPanel * line;
  st.q = (float*)scratch(Slot::tile, floats * 4);
  st.out = st.q + a.d * kPanel;
  st.score = st.out + a.dv * kPanel;
  st.keys = st.score + kKeyBlock * kPanel;
  st.values = st.keys + kKeyBlock * a.d;
  float* lines = st.values + kKeyBlock * a.dv;  // [kPanel][d], later [kPanel][dv]
  memset(st.q, 0, (size_t)((a.d + a.dv) * kPanel * 4));
  for (int c = 0; c < cols; ++c) load_query(a, b, kv * group + (r0 + c) % group, (r0 + c) / group, lines + c * a.d);
  transpose(lines, a.d, cols, a.d, st.q, kPanel);
  for (int c = 0; c < kPanel; ++c) {
    float sink = c < cols ? sink_of(a, kv * group + (r0 + c) % group) : kMinusInf;
    st.most[c] = sink;  // a sink is one more key, without a value
    st.total[c] = sink == kMinusInf ? 0.0f : 1.0f;
  }
  with_cache_type(a.kt, [&](auto t) { panel_keys<decltype(t)>(a, b, kv, r0, cols, st); });
  for (int c = 0; c < kPanel; ++c) st.total[c] = st.total[c] == 0 ? 0.0f : 1.0f / st.total[c];
  for (int64_t i = 0; i < a.dv; ++i) {
    for (int j = 0; j < kPanel; j += W) store(st.out + i * kPanel + j, load(st.out + i * kPanel + j) * load(st.total + j));
  }
  transpose(st.out, kPanel, a.dv, cols, lines, a.dv);
  for (int c = 0; c < cols; ++c) store_result(a, b, kv * group + (r0 + c) % group, (r0 + c) / group, lines + c * a.dv);
}

inline void attention(const AttentionArgs& a) {
  int64_t rows = a.h / a.kv * a.l;
  if (rows <= kFewQueries) return few_queries(a);
  int64_t panels = (rows + kPanel - 1) / kPanel, pairs = a.b * a.kv;
  // Last rows first: under a causal mask they have the most keys, and the short ones then even out the end.
  Pool::get().parallel_for((int)(panels * pairs), [&](int i) {
    int64_t panel = panels - 1 - i / pairs, pair = i % pairs;
    attention_panel(a, pair / a.kv, pair % a.kv, panel * kPanel);
  });
}
