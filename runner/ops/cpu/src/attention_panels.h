// Attention of many queries, and the entry point. Included inside an ISA namespace, after attention.h.

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
