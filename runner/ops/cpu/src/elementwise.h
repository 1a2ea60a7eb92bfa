// Norms, RoPE, gated activations and argmax. Included inside an ISA namespace.

constexpr int64_t kSerialSize = 16384;  // values below which a fork and a join cost more than they save

// body(first, last) over [0, rows), in pieces of about kSerialSize values
template <class F>
RUNNER_INLINE void over_rows(int64_t rows, int64_t values_per_row, F&& body) {
  int64_t per = kSerialSize / (values_per_row + 1) + 1;
  int64_t least = (rows + 63) / 64;
  per = per > least ? per : least;
  Pool::get().parallel_for((int)((rows + per - 1) / per), [&](int chunk) {
    int64_t first = chunk * per, last = first + per < rows ? first + per : rows;
    body(first, last);
  });
}

RUNNER_INLINE float sum_of(const float* x, int64_t n, float shift, bool squares) {
  VF acc = zero(), acc2 = zero(), c = set1(shift);
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    VF a = load(x + i) - c, b = load(x + i + W) - c;
    acc = squares ? fma(a, a, acc) : acc + a;
    acc2 = squares ? fma(b, b, acc2) : acc2 + b;
  }
  float sum = hsum(acc + acc2);
  for (; i < n; ++i) sum += squares ? (x[i] - shift) * (x[i] - shift) : x[i] - shift;
  return sum;
}

// line = x row (+ residual, rounded to the type it is stored in) as float32
template <class T>
RUNNER_INLINE void norm_input(const NormArgs& a, int64_t r, float* line) {
  using S = typename T::S;
  const S* x = (const S*)a.x + r * a.dim;
  if (!a.residual) return to_float<T>(x, line, a.dim);
  const S* y = (const S*)a.residual + r * a.dim;
  S* sum = (S*)a.sum + r * a.dim;
  int64_t i = 0;
  for (; i + W <= a.dim; i += W) {
    T::store_v(sum + i, T::load_v(x + i) + T::load_v(y + i));
    store(line + i, T::load_v(sum + i));
  }
  for (; i < a.dim; ++i) line[i] = T::to(sum[i] = T::from(T::to(x[i]) + T::to(y[i])));
}

template <class T>
void norm_row(const NormArgs& a, int64_t r, const float* weight, const float* shift, float* line) {
  norm_input<T>(a, r, line);
  float mean = a.mean ? sum_of(line, a.dim, 0.0f, false) / (float)a.dim : 0.0f;
  float scale = 1.0f / __builtin_sqrtf(sum_of(line, a.dim, mean, true) / (float)a.dim + a.eps);
  int64_t i = 0;
  auto* out = (typename T::S*)a.out + r * a.dim;
  for (; i + W <= a.dim; i += W) {
    VF v = (load(line + i) - set1(mean)) * set1(scale);
    if (weight) v = v * load(weight + i);
    if (shift) v = v + load(shift + i);
    T::store_v(out + i, v);
  }
  for (; i < a.dim; ++i) {
    float v = (line[i] - mean) * scale * (weight ? weight[i] : 1.0f) + (shift ? shift[i] : 0.0f);
    out[i] = T::from(v);
  }
}

inline const float* vector_as_float(const void* v, DType t, int64_t n, float* copy) {
  if (!v || t == DType::f32) return (const float*)v;
  with_type(t, [&](auto type) {
    using T = decltype(type);
    to_float<T>((const typename T::S*)v, copy, n);
  });
  return copy;
}

inline void norm(const NormArgs& a) {
  float* copies = (float*)scratch(Slot::packed, 2 * a.dim * 4);
  const float* weight = vector_as_float(a.weight, a.wt, a.dim, copies);
  const float* shift = vector_as_float(a.shift, a.ht, a.dim, copies + a.dim);
  over_rows(a.rows, a.dim, [&](int64_t first, int64_t last) {
    float* line = (float*)scratch(Slot::row, a.dim * 4);
    with_type(a.xt, [&](auto t) {
      for (int64_t r = first; r < last; ++r) norm_row<decltype(t)>(a, r, weight, shift, line);
    });
  });
}

// (x1, x2) turned by the angle: halves of the rotated part (HF), or neighbours (traditional).
template <class T>
void rope_row(const RopeArgs& a, const typename T::S* x, typename T::S* out, const float* cos, const float* sin) {
  int64_t half = a.dims / 2, i = 0;
  if (a.traditional) {
    for (; i < half; ++i) {
      float x1 = T::to(x[2 * i * a.sd]), x2 = T::to(x[(2 * i + 1) * a.sd]);
      out[2 * i] = T::from(x1 * cos[i] - x2 * sin[i]);
      out[2 * i + 1] = T::from(x1 * sin[i] + x2 * cos[i]);
    }
  } else {
    if (a.sd == 1) {
      for (; i + W <= half; i += W) {
        VF x1 = T::load_v(x + i), x2 = T::load_v(x + half + i), c = load(cos + i), s = load(sin + i);
        T::store_v(out + i, x1 * c - x2 * s);
        T::store_v(out + half + i, fma(x1, s, x2 * c));
      }
    }
    for (; i < half; ++i) {
      float x1 = T::to(x[i * a.sd]), x2 = T::to(x[(half + i) * a.sd]);
      out[i] = T::from(x1 * cos[i] - x2 * sin[i]);
      out[half + i] = T::from(x1 * sin[i] + x2 * cos[i]);
    }
  }
  for (int64_t j = a.dims; j < a.d; ++j) out[j] = x[j * a.sd];
}

inline void rope(const RopeArgs& a) {
  over_rows(a.b * a.h * a.l, a.d, [&](int64_t first, int64_t last) {
    with_type(a.xt, [&](auto t) {
      using S = typename decltype(t)::S;
      for (int64_t r = first; r < last; ++r) {
        int64_t l = r % a.l, h = r / a.l % a.h, b = r / (a.l * a.h);
        int64_t table = ((a.table_per_batch ? b * a.l : 0) + l) * (a.dims / 2);
        const S* x = (const S*)a.x + b * a.sb + h * a.sh + l * a.sl;
        rope_row<decltype(t)>(a, x, (S*)a.out + r * a.d, a.cos + table, a.sin + table);
      }
    });
  });
}

RUNNER_INLINE VF sigmoid_times(VF x, VF z) { return x / (set1(1.0f) + vexp(zero() - z)); }

// x Phi(x); 1 + erf(z) for z < 0 is taken from the complement, so no digits cancel. Erf: Abramowitz & Stegun 7.1.26.
RUNNER_INLINE VF gelu(VF x) {
  VF z = vabs(x) * set1(0.70710678118654752f);
  VF t = set1(1.0f) / fma(z, set1(0.3275911f), set1(1.0f));
  VF p = fma(t, set1(1.061405429f), set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f)) * t;
  VF tail = p * vexp(zero() - z * z) * set1(0.5f);  // Phi(-|x|)
  return x * select_lt(x, zero(), tail, set1(1.0f) - tail);
}

RUNNER_INLINE VF activate(Activation act, VF x) {
  if (act == Activation::silu) return sigmoid_times(x, x);
  if (act == Activation::gelu) return gelu(x);
  if (act == Activation::relu) return select_lt(x, zero(), zero(), x);
  if (act == Activation::relu2) return select_lt(x, zero(), zero(), x * x);
  VF inner = x * fma(x * x, set1(0.044715f), set1(1.0f)) * set1(0.79788456080286536f);
  return sigmoid_times(x, inner + inner);
}

RUNNER_INLINE VF gated(const GluArgs& a, VF gate, VF up) {
  if (a.act != Activation::clamped) return activate(a.act, gate) * up;
  const VF most = set1(a.limit), least = set1(-a.limit);
  const VF g = select_lt(most, gate, most, gate);
  const VF u = select_lt(up, least, least, select_lt(most, up, most, up));
  return sigmoid_times(g, g * set1(a.alpha)) * (u + set1(1.0f));
}

// `up` is null where there is no gate.
template <class T>
void glu_span(const GluArgs& a, const typename T::S* gate, const typename T::S* up, typename T::S* out, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    VF x = T::load_v(gate + i);
    T::store_v(out + i, up ? gated(a, x, T::load_v(up + i)) : activate(a.act, x));
  }
  if (i == n) return;
  float line[2 * W] = {};
  for (int64_t j = i; j < n; ++j) line[j - i] = T::to(gate[j]), line[W + j - i] = up ? T::to(up[j]) : 1.0f;
  store(line, gated(a, load(line), load(line + W)));
  for (int64_t j = i; j < n; ++j) out[j] = T::from(line[j - i]);
}

inline void glu(const GluArgs& a) {
  constexpr int64_t kSpan = 4096;
  int64_t spans = (a.dim + kSpan - 1) / kSpan;
  over_rows(a.rows * spans, (a.dim < kSpan ? a.dim : kSpan) * 3, [&](int64_t first, int64_t last) {
    with_type(a.xt, [&](auto t) {
      using S = typename decltype(t)::S;
      for (int64_t i = first; i < last; ++i) {
        int64_t r = i / spans, at = i % spans * kSpan, n = a.dim - at < kSpan ? a.dim - at : kSpan;
        const S* gate = (const S*)a.x + r * (a.gated ? 2 : 1) * a.dim + at;
        glu_span<decltype(t)>(a, gate, a.gated ? gate + a.dim : nullptr, (S*)a.out + r * a.dim + at, n);
      }
    });
  });
}

inline void simple(const SimpleArgs& a) {
  over_rows((a.size + kSerialSize - 1) / kSerialSize, kSerialSize, [&](int64_t first, int64_t last) {
    with_type(a.type, [&](auto t) {
      using T = decltype(t);
      using S = typename T::S;
      int64_t i = first * kSerialSize, end = last * kSerialSize < a.size ? last * kSerialSize : a.size;
      const S *x = (const S*)a.x, *y = (const S*)a.y;
      S* out = (S*)a.out;
      const float number = a.op == Simple::plus || a.op == Simple::product ? 0.0f : T::to(*y);
      auto each = [&](auto&& f, auto&& g) {
        for (; i + W <= end; i += W) T::store_v(out + i, f(T::load_v(x + i), i));
        for (; i < end; ++i) out[i] = T::from(g(T::to(x[i]), i));
      };
      if (a.op == Simple::plus) {
        each([&](VF v, int64_t at) { return v + T::load_v(y + at); },
             [&](float v, int64_t at) { return v + T::to(y[at]); });
      } else if (a.op == Simple::product) {
        each([&](VF v, int64_t at) { return v * T::load_v(y + at); },
             [&](float v, int64_t at) { return v * T::to(y[at]); });
      } else if (a.op == Simple::times) {
        each([&](VF v, int64_t) { return v * set1(number); }, [&](float v, int64_t) { return v * number; });
      } else {
        each([&](VF v, int64_t) { return v / set1(number); }, [&](float v, int64_t) { return v / number; });
      }
    });
  });
}

// NaN where v is NaN, plus infinity where it is that, else 0: what makes a row of logits unusable.
RUNNER_INLINE VF unusable(VF v) { return select_lt(v, set1(__builtin_inff()), zero(), v); }

struct Greatest {
  float value;  // NaN never wins
  float odd;    // 0, or NaN or infinity where there is any
  int64_t at;   // the first index
};

template <class T>
RUNNER_INLINE Greatest greatest_of_span(const typename T::S* x, int64_t n) {
  VF m = set1(kMinusInf), odd = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    VF v = T::load_v(x + i);
    m = vmax(v, m);
    odd = odd + unusable(v);
  }
  Greatest best{hmax(m), hsum(odd), 0};
  for (; i < n; ++i) {
    float v = T::to(x[i]);
    best.value = v > best.value ? v : best.value;
    best.odd += v < __builtin_inff() ? 0.0f : v;
  }
  for (int64_t j = 0; j < n; ++j) {
    if (T::to(x[j]) == best.value) {
      best.at = j;
      break;
    }
  }
  return best;
}

inline void argmax(const ArgmaxArgs& a) {
  constexpr int64_t kSpan = 8192;
  int64_t spans = (a.dim + kSpan - 1) / kSpan;
  auto* found = (Greatest*)scratch(Slot::packed, a.rows * spans * sizeof(Greatest));
  over_rows(a.rows * spans, kSpan, [&](int64_t first, int64_t last) {
    with_type(a.xt, [&](auto t) {
      using T = decltype(t);
      for (int64_t i = first; i < last; ++i) {
        int64_t from = i % spans * kSpan, n = a.dim - from < kSpan ? a.dim - from : kSpan;
        found[i] = greatest_of_span<T>((const typename T::S*)a.x + i / spans * a.dim + from, n);
        found[i].at += from;
      }
    });
  });
  for (int64_t r = 0; r < a.rows; ++r) {
    const Greatest *span = found + r * spans, *best = span;
    float odd = 0.0f;
    for (int64_t i = 0; i < spans; ++i) {
      best = span[i].value > best->value ? span + i : best;
      odd += span[i].odd;
    }
    a.out[r] = (uint32_t)best->at;
    if (a.peak) a.peak[r] = best->value + odd;
  }
}
