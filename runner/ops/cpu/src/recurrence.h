// Short convolutions, recurrences and their gates. Included inside an ISA namespace. No sum depends on how many tokens
// come at once: tokens are taken one after the other.

inline void conv(const ConvArgs& a) {
  float* copies = (float*)scratch(Slot::packed, (a.taps + 1) * a.c * 4);
  const float* weight = vector_as_float(a.weight, a.wt, a.taps * a.c, copies);
  const float* bias = vector_as_float(a.bias, a.bt, a.c, copies + a.taps * a.c);
  const int64_t kept = a.taps - 1;
  auto before = [&](int64_t b) { return a.each ? a.each[b].from : a.before + b * kept * a.c; };
  // The input `back` tokens before token t.
  auto input = [&](int64_t b, int64_t t, int64_t back) {
    return t < back ? before(b) + (kept + t - back) * a.c : a.x + b * a.xb + (t - back) * a.xl;
  };
  over_rows(a.b * a.l, a.c * a.taps, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t b = r / a.l, t = r % a.l;
      float* out = a.out + r * a.c;
      int64_t i = 0;
      for (; i + W <= a.c; i += W) {
        VF sum = zero();
        for (int64_t tap = 0; tap < a.taps; ++tap) {
          sum = fma(load(input(b, t, kept - tap) + i), load(weight + tap * a.c + i), sum);
        }
        if (bias) sum = sum + load(bias + i);
        store(out + i, a.activated ? activate(a.act, sum) : sum);
      }
      if (i == a.c) continue;
      float line[W] = {};
      for (int64_t j = i; j < a.c; ++j) {
        float sum = 0.0f;
        for (int64_t tap = 0; tap < a.taps; ++tap) sum += input(b, t, kept - tap)[j] * weight[tap * a.c + j];
        line[j - i] = bias ? sum + bias[j] : sum;
      }
      if (a.activated) store(line, activate(a.act, load(line)));
      for (int64_t j = i; j < a.c; ++j) out[j] = line[j - i];
    }
  });
  if (!a.after && !a.each) return;
  for (int64_t b = 0; b < a.b; ++b) {
    float* after = a.each ? a.each[b].to : a.after + b * kept * a.c;
    for (int64_t i = 0; i < kept; ++i) memcpy(after + i * a.c, input(b, a.l - 1, kept - 1 - i), (size_t)a.c * 4);
  }
}

RUNNER_INLINE float dot(const float* x, const float* y, int64_t n) {
  VF sum = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) sum = fma(load(x + i), load(y + i), sum);
  float rest = 0.0f;
  for (; i < n; ++i) rest += x[i] * y[i];
  return hsum(sum) + rest;
}

RUNNER_INLINE float softplus(float x) { return x > 20.0f ? x : __builtin_log1pf(__builtin_expf(x)); }

// What a token asks of the states, made before they are moved: see RecurrenceArgs.
struct Asked {
  float *q, *k;    // [B, L, groups, dk]
  float* qk;       // [B, L, groups]: their products
  float* decay;    // [B, L, H], or [B, L, H, dk]
  float* share;    // [B, L, H]
};

RUNNER_INLINE void ask(const RecurrenceArgs& a, const float* a_log, const float* bias, const Asked& to, int64_t r) {
  const int64_t b = r / a.l, t = r % a.l, wide = a.channels ? a.dk : 1;
  for (int64_t g = 0; g < a.groups; ++g) {
    const float *q = a.q + b * a.qb + t * a.ql + g * a.qg, *k = a.k + b * a.kb + t * a.kl + g * a.kg;
    float *q2 = to.q + (r * a.groups + g) * a.dk, *k2 = to.k + (r * a.groups + g) * a.dk;
    // The same constant as in runner/ops/delta_rule.py
    const float by = a.delta ? 1.0f / __builtin_sqrtf(dot(k, k, a.dk) + 1e-6f) : 1.0f;
    const float root = __builtin_sqrtf((float)a.dk);
    const float bq = a.delta ? 1.0f / (__builtin_sqrtf(dot(q, q, a.dk) + 1e-6f) * root) : 1.0f;
    for (int64_t i = 0; i < a.dk; ++i) q2[i] = q[i] * bq, k2[i] = k[i] * by;
    to.qk[r * a.groups + g] = dot(q2, k2, a.dk);
  }
  for (int64_t h = 0; h < a.heads; ++h) {
    const float rate = __builtin_expf(a_log[h]);
    const float* raw = a.a + b * a.ab + t * a.al + h * a.ah;
    float* decay = to.decay + (r * a.heads + h) * wide;
    float step = 0.0f;
    for (int64_t i = 0; i < wide; ++i) {
      step = softplus(raw[i] + bias[h * wide + i]);
      if (!a.delta) step = step < a.least ? a.least : step > a.most ? a.most : step;
      decay[i] = __builtin_expf(-rate * step);
    }
    to.share[r * a.heads + h] = a.delta ? 1.0f / (1.0f + __builtin_expf(-a.b[b * a.bb + t * a.bl + h])) : step;
  }
}

// One token for R rows of a state: `to` may be `from`. Each row's sums are the same whatever R is.
template <int R>
RUNNER_INLINE void move_rows(const float* from, float* to, const float* q, const float* k, const float* decay,
                             bool channels, int64_t dk, bool delta, float share, float qk, const float* v, float skip,
                             float* out) {
  VF said[R], read[R];
  for (int r = 0; r < R; ++r) said[r] = read[r] = zero();
  const VF one = set1(*decay);
  int64_t i = 0;
  for (; i + W <= dk; i += W) {
    const VF left = channels ? load(decay + i) : one, key = load(k + i), query = load(q + i);
    for (int r = 0; r < R; ++r) {
      VF s = load(from + r * dk + i) * left;
      said[r] = fma(s, key, said[r]);
      read[r] = fma(s, query, read[r]);
    }
  }
  VF change[R];
  float changes[R];
  for (int r = 0; r < R; ++r) {
    float said_rest = 0.0f, read_rest = 0.0f;
    for (int64_t j = i; j < dk; ++j) {
      float s = from[r * dk + j] * decay[channels ? j : 0];
      said_rest += s * k[j];
      read_rest += s * q[j];
    }
    const float d = delta ? share * (v[r] - (hsum(said[r]) + said_rest)) : share * v[r];
    out[r] = hsum(read[r]) + read_rest + d * qk + skip * v[r];
    changes[r] = d;
    change[r] = set1(d);
  }
  for (i = 0; i + W <= dk; i += W) {
    const VF left = channels ? load(decay + i) : one, key = load(k + i);
    for (int r = 0; r < R; ++r) store(to + r * dk + i, fma(change[r], key, load(from + r * dk + i) * left));
  }
  for (; i < dk; ++i) {
    for (int r = 0; r < R; ++r) to[r * dk + i] = from[r * dk + i] * decay[channels ? i : 0] + changes[r] * k[i];
  }
}

constexpr int64_t kStateRows = 32;  // of a state that a thread moves through all tokens: they stay in its first cache

inline void recurrence(const RecurrenceArgs& a) {
  const int64_t rows = a.batch * a.l, wide = a.channels ? a.dk : 1, keys = rows * a.groups * a.dk;
  float* memory = (float*)scratch(
      Slot::packed,
      (2 * keys + rows * a.groups + rows * a.heads * (wide + 1) + a.heads * (wide + 2)) * 4);
  Asked asked{memory, memory + keys, memory + 2 * keys, nullptr, nullptr};
  asked.decay = asked.qk + rows * a.groups;
  asked.share = asked.decay + rows * a.heads * wide;
  float* copies = asked.share + rows * a.heads;
  const float* a_log = vector_as_float(a.a_log, a.lt, a.heads, copies);
  const float* skip = vector_as_float(a.skip, a.st, a.heads, copies + a.heads);
  const float* bias = vector_as_float(a.bias, a.bt, a.heads * wide, copies + 2 * a.heads);
  over_rows(rows, 4 * a.groups * a.dk + 64 * a.heads * wide, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) ask(a, a_log, bias, asked, r);
  });
  const int64_t blocks = (a.dv + kStateRows - 1) / kStateRows, share = a.heads / a.groups;
  Pool::get().parallel_for((int)(a.batch * a.heads * blocks), [&](int piece) {
    const int64_t block = piece % blocks, head = piece / blocks % a.heads, b = piece / (blocks * a.heads);
    const int64_t first = block * kStateRows, last = first + kStateRows < a.dv ? first + kStateRows : a.dv;
    const int64_t at = head * a.dv * a.dk, all = b * a.heads * a.dv * a.dk, g = head / share;
    const float* from = (a.each ? a.each[b].from : a.from + all) + at;
    float* to = (a.each ? a.each[b].to : a.to + all) + at;
    for (int64_t t = 0; t < a.l; ++t) {
      const int64_t r = b * a.l + t;
      const float *q = asked.q + (r * a.groups + g) * a.dk, *k = asked.k + (r * a.groups + g) * a.dk;
      const float* decay = asked.decay + (r * a.heads + head) * wide;
      const float qk = asked.qk[r * a.groups + g], part = asked.share[r * a.heads + head];
      const float* v = a.v + b * a.vb + t * a.vl + head * a.vh;
      float *out = a.out + (r * a.heads + head) * a.dv, past = skip ? skip[head] : 0.0f;
      int64_t j = first;
      for (; j + 4 <= last; j += 4) {
        move_rows<4>(from + j * a.dk, to + j * a.dk, q, k, decay, a.channels, a.dk, a.delta, part, qk, v + j, past,
                     out + j);
      }
      for (; j < last; ++j) {
        move_rows<1>(from + j * a.dk, to + j * a.dk, q, k, decay, a.channels, a.dk, a.delta, part, qk, v + j, past,
                     out + j);
      }
      from = to;
    }
  });
}

constexpr int64_t kChannels = 64;  // that a thread moves through all tokens: their states stay in its first cache

inline void selective(const SelectiveArgs& a) {
  const int64_t n = a.states, whole = n / W * W, blocks = (a.channels + kChannels - 1) / kChannels;
  Pool::get().parallel_for((int)(a.batch * blocks), [&](int piece) {
    const int64_t i = piece / blocks, first = piece % blocks * kChannels;
    const int64_t last = first + kChannels < a.channels ? first + kChannels : a.channels;
    const int64_t all = i * a.channels * n;
    const float* from = a.each ? a.each[i].from : a.from + all;
    float* to = a.each ? a.each[i].to : a.to + all;
    for (int64_t t = 0; t < a.l; ++t) {
      const float *x = a.x + i * a.xb + t * a.xl, *steps = a.steps + i * a.sb + t * a.sl;
      const float *b = a.b + i * a.bb + t * a.bl, *c = a.c + i * a.cb + t * a.cl;
      float* out = a.out + (i * a.l + t) * a.channels;
      float rest_b[W] = {}, rest_c[W] = {};
      for (int64_t j = whole; j < n; ++j) rest_b[j - whole] = b[j], rest_c[j - whole] = c[j];
      for (int64_t k = first; k < last; ++k) {
        const float step = softplus(steps[k]);
        const float *rates = a.rates + k * n, *old = from + k * n;
        const VF wide = set1(step), taken = set1(step * x[k]);
        VF sum = zero();
        for (int64_t j = 0; j < whole; j += W) {
          const VF s = fma(taken, load(b + j), load(old + j) * vexp(wide * load(rates + j)));
          store(to + k * n + j, s);
          sum = fma(s, load(c + j), sum);
        }
        if (whole < n) {
          float line[W] = {}, by[W] = {};
          for (int64_t j = whole; j < n; ++j) line[j - whole] = old[j], by[j - whole] = rates[j];
          const VF s = fma(taken, load(rest_b), load(line) * vexp(wide * load(by)));
          store(line, s);
          for (int64_t j = whole; j < n; ++j) to[k * n + j] = line[j - whole];
          sum = fma(s, load(rest_c), sum);
        }
        out[k] = hsum(sum) + a.skip[k] * x[k];
      }
      from = to;
    }
  });
}

inline void gated_norm(const GatedNormArgs& a) {
  const int64_t size = a.weight_by_row ? a.per * a.dim : a.dim;
  const float* weight = vector_as_float(a.weight, a.wt, size, (float*)scratch(Slot::packed, size * 4));
  over_rows(a.rows, 4 * a.dim, [&](int64_t first, int64_t last) {
    float* open = (float*)scratch(Slot::row, 2 * (a.dim + W) * 4);
    float* line = open + a.dim + W;
    for (int64_t r = first; r < last; ++r) {
      const float *x = a.x + r * a.dim, *gate = a.gate + r / a.per * a.line + r % a.per * a.dim;
      const float* by = weight + (a.weight_by_row ? r % a.per * a.dim : 0);
      float* out = a.out + r * a.dim;
      memcpy(open, gate, (size_t)a.dim * 4);
      for (int64_t i = 0; i < a.dim; i += W) store(open + i, activate(Activation::silu, load(open + i)));
      for (int64_t i = 0; i < a.dim; ++i) line[i] = a.gate_first ? x[i] * open[i] : x[i];
      const float scale = 1.0f / __builtin_sqrtf(sum_of(line, a.dim, 0.0f, true) / (float)a.dim + a.eps);
      for (int64_t i = 0; i < a.dim; ++i) {
        const float v = line[i] * scale * by[i];
        out[i] = a.gate_first ? v : v * open[i];
      }
    }
  });
}

inline void gate(const GateArgs& a) {
  over_rows(a.b * a.h * a.l, 4 * a.d, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t l = r % a.l, h = r / a.l % a.h, b = r / (a.l * a.h);
      const float *x = a.x + r * a.d, *g = a.gate + b * a.gb + h * a.gh + l * a.gl;
      float* out = a.out + r * a.d;
      int64_t i = 0;
      for (; i + W <= a.d; i += W) store(out + i, sigmoid_times(load(x + i), load(g + i)));
      for (; i < a.d; ++i) out[i] = x[i] / (1.0f + __builtin_expf(-g[i]));
    }
  });
}
