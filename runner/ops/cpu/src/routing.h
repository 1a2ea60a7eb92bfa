// How a mixture's experts are chosen and weighed, and their outputs added. Included inside an ISA namespace.

// x[0, n) as scores: softmax or sigmoid, in place; the padding up to a whole vector is written, too.
RUNNER_INLINE void to_scores(float* x, int64_t n, bool sigmoid) {
  const int64_t whole = (n + W - 1) / W * W;
  float most = -__builtin_inff();
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (int64_t i = n; i < whole; ++i) x[i] = -__builtin_inff();
  if (sigmoid) {
    for (int64_t i = 0; i < whole; i += W) store(x + i, sigmoid_times(set1(1.0f), load(x + i)));
    return;
  }
  VF sums = zero();
  for (int64_t i = 0; i < whole; i += W) {
    VF e = vexp(load(x + i) - set1(most));
    if (i + W > n) {
      alignas(64) float line[W];
      store(line, e);
      for (int64_t j = n - i; j < W; ++j) line[j] = 0.0f;
      e = load(line);
    }
    store(x + i, e);
    sums = sums + e;
  }
  const VF over = set1(1.0f / hsum(sums));
  for (int64_t i = 0; i < whole; i += W) store(x + i, load(x + i) * over);
}

// What is not a number counts as the most, so that it shows.
RUNNER_INLINE float rank_of(float x) { return x == x ? x : __builtin_inff(); }

// Indices of the `count` largest of x[0, n), the largest first and of equals the first; those where `left` is 0 are not
// considered, of which at least `count` must be left.
RUNNER_INLINE void largest(const float* x, const uint8_t* left, int64_t n, int64_t count, uint32_t* found) {
  int64_t have = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (left && !left[i]) continue;
    const float rank = rank_of(x[i]);
    if (have == count && !(rank > rank_of(x[found[have - 1]]))) continue;
    int64_t at = have < count ? have++ : count - 1;
    for (; at > 0 && rank > rank_of(x[found[at - 1]]); --at) found[at] = found[at - 1];
    found[at] = (uint32_t)i;
  }
}

// left[i] = 1 for the experts of the `kept` groups whose best `members` ranks have the largest sums.
RUNNER_INLINE void best_groups(const RouteArgs& a, const float* ranks, uint8_t* left, float* sums, uint32_t* some) {
  const int64_t size = a.experts / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    largest(ranks + g * size, nullptr, size, a.members, some);
    sums[g] = 0.0f;
    for (int64_t i = 0; i < a.members; ++i) sums[g] += ranks[g * size + some[i]];
  }
  largest(sums, nullptr, a.groups, a.kept, some);
  memset(left, 0, (size_t)a.experts);
  for (int64_t i = 0; i < a.kept; ++i) memset(left + some[i] * size, 1, (size_t)size);
}

inline void route(const RouteArgs& a) {
  const int64_t whole = (a.experts + W - 1) / W * W;
  over_rows(a.rows, 8 * a.experts, [&](int64_t first, int64_t last) {
    float* scores = (float*)scratch(Slot::row, 4 * (size_t)whole * 4 + (size_t)whole);
    float *ranks = scores + whole, *sums = ranks + whole;
    uint32_t* some = (uint32_t*)(sums + whole);
    uint8_t* left = (uint8_t*)(some + whole);
    for (int64_t r = first; r < last; ++r) {
      memcpy(scores, a.logits + r * a.experts, (size_t)a.experts * 4);
      to_scores(scores, a.experts, a.sigmoid);
      for (int64_t i = 0; i < a.experts; ++i) ranks[i] = scores[i] + (a.correction ? load_one(a.correction, a.ct, i) : 0.0f);
      const bool grouped = a.kept < a.groups;
      if (grouped) best_groups(a, ranks, left, sums, some);
      uint32_t* chosen = a.chosen + r * a.count;
      float *weights = a.weights + r * a.count, total = 0.0f;
      largest(ranks, grouped ? left : nullptr, a.experts, a.count, chosen);
      for (int64_t i = 0; i < a.count; ++i) total += weights[i] = scores[chosen[i]];
      for (int64_t i = 0; i < a.count; ++i) {
        weights[i] = (a.normalized ? weights[i] / (total + a.eps) : weights[i]) * a.factor;
      }
    }
  });
}

// Weighed outputs are added in the order of the choices.
inline void mixture(const MixtureArgs& a) {
  over_rows(a.rows, a.count * a.dim, [&](int64_t first, int64_t last) {
    with_type(a.xt, [&](auto t) {
      using T = decltype(t);
      for (int64_t r = first; r < last; ++r) {
        const auto* x = (const typename T::S*)a.x + r * a.count * a.dim;
        const float* weights = a.weights + r * a.count;
        auto* out = (typename T::S*)a.out + r * a.dim;
        int64_t i = 0;
        for (; i + W <= a.dim; i += W) {
          VF sum = T::load_v(x + i) * set1(weights[0]);
          for (int64_t k = 1; k < a.count; ++k) sum = fma(T::load_v(x + k * a.dim + i), set1(weights[k]), sum);
          T::store_v(out + i, sum);
        }
        for (; i < a.dim; ++i) {
          float sum = T::to(x[i]) * weights[0];
          for (int64_t k = 1; k < a.count; ++k) sum = __builtin_fmaf(T::to(x[k * a.dim + i]), weights[k], sum);
          out[i] = T::from(sum);
        }
      }
    });
  });
}
