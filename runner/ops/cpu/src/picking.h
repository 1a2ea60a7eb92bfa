// Passes over a row of logits, for picking.cpp. Included inside an ISA namespace.

inline float peak(const float* x, int64_t n, float* most, int64_t* groups) {
  constexpr int64_t kChunk = W * kLogitsPerPeak;
  VF odd = zero(), best = set1(kMinusInf);
  int64_t i = 0, count = 0;
  for (; i + kChunk <= n; i += kChunk, count += W) {
    VF m = set1(kMinusInf);
    for (int64_t j = 0; j < kChunk; j += W) {
      VF v = load(x + i + j);
      odd = odd + unusable(v);
      m = vmax(v, m);
    }
    store(most + count, m);  // lane l: the greatest of every W-th logit from l on
    best = vmax(m, best);
  }
  float top = hmax(best), rest = hsum(odd);
  for (; i < n; ++i) {
    rest += x[i] < __builtin_inff() ? 0.0f : x[i];
    top = x[i] > top ? x[i] : top;
    most[count++] = x[i];
  }
  *groups = count;
  return top + rest;
}

inline double weigh(const float* x, int64_t n, float peak, float temperature, float floor, float* weights, float* sums) {
  const VF p = set1(peak), t = set1(temperature), f = set1(floor);
  double total = 0;
  for (int64_t i = 0; i < n; i += kWeightsPerSum) {
    int64_t size = n - i < kWeightsPerSum ? n - i : kWeightsPerSum, j = 0;
    VF sum = zero();
    auto weight = [&](VF v) {
      VF y = (v - p) / t;
      return select_lt(y, f, zero(), vexp(y));
    };
    for (; j + W <= size; j += W) {
      VF v = weight(load(x + i + j));
      store(weights + i + j, v);
      sum = sum + v;
    }
    float piece = hsum(sum);
    if (j < size) {
      float line[W];
      store(line, p);
      for (int64_t k = j; k < size; ++k) line[k - j] = x[i + k];
      store(line, weight(load(line)));
      for (int64_t k = j; k < size; ++k) piece += weights[i + k] = line[k - j];
    }
    sums[i / kWeightsPerSum] = piece;
    total += piece;
  }
  return total;
}

inline void keep(const float* x, int64_t n, float bound, int64_t split, float* weights, float* sums) {
  for (int64_t i = 0; i < n; i += kWeightsPerSum) {
    int64_t end = i + kWeightsPerSum;
    float piece = 0.0f;
    if (end > n || (i < split && split < end)) {
      for (int64_t j = i; j < end && j < n; ++j) {
        bool stays = x[j] > bound || (x[j] == bound && j < split);
        piece += weights[j] = stays ? weights[j] : 0.0f;
      }
    } else {
      const VF b = set1(bound);
      VF sum = zero();
      for (int64_t j = i; j < end; j += W) {
        VF v = load(x + j), w = load(weights + j);
        w = i < split ? select_lt(v, b, zero(), w) : select_lt(b, v, w, zero());
        store(weights + j, w);
        sum = sum + w;
      }
      piece = hsum(sum);
    }
    sums[i / kWeightsPerSum] = piece;
  }
}

inline void weights_from(const float* x, const float* weights, int64_t n, const float* bounds, double* sums) {
  constexpr int64_t kChunk = 1024;  // to add up in float32
  for (int b = 0; b < kBounds; ++b) sums[b] = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    int64_t end = i + kChunk < n ? i + kChunk : n, j = i;
    VF sum[kBounds];
#pragma GCC unroll 8
    for (int b = 0; b < kBounds; ++b) sum[b] = zero();
    for (; j + W <= end; j += W) {
      VF v = load(x + j), w = load(weights + j);
#pragma GCC unroll 8
      for (int b = 0; b < kBounds; ++b) sum[b] = sum[b] + select_lt(v, set1(bounds[b]), zero(), w);
    }
    for (int b = 0; b < kBounds; ++b) {
      float rest = hsum(sum[b]);
      for (int64_t k = j; k < end; ++k) rest += x[k] < bounds[b] ? 0.0f : weights[k];
      sums[b] += rest;
    }
  }
}

inline int64_t between(const float* x, int64_t n, float low, float high, uint32_t* ids) {
  int64_t i = 0, count = 0;
  const VF l = set1(low), h = set1(high);
  for (; i + W <= n; i += W) {
    for (uint32_t lanes = lanes_between(load(x + i), l, h); lanes; lanes &= lanes - 1) {
      ids[count++] = (uint32_t)(i + __builtin_ctz(lanes));
    }
  }
  for (; i < n; ++i) {
    if (x[i] >= low && x[i] < high) ids[count++] = (uint32_t)i;
  }
  return count;
}
