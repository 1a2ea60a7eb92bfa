// Softmax attention in float32 over key/value caches that are read where they lie: what one block of keys gives to some
// rows. Included inside an ISA namespace; attention_jobs.h divides the work.
//
// A row is one query of one head; the heads that share a key/value head are handled together: row r = l * G + g of a
// (batch, kv head) pair is position l of head kv * G + g. What a row gets is a function of that row, of the keys and
// values that it sees and of their positions alone: neither other rows nor the division into calls and threads has a
// part in it. So all sums have one order. Keys come in blocks of kLanes, whose borders are multiples of that in the
// *sequence*, wherever a buffer begins. A score is W sums over every W-th number of a head, which are added up as `sums`
// does: few rows have these numbers in the lanes of vectors, as they lie in memory; many rows have keys there, turned
// around, and go through the same sums one after the other. In a block, weights are added up in W lanes and then as `hsum`
// does, values from the first key to the last. Blocks are merged in order of position, kBlocks of them to a stretch, and
// then stretches. A key that a row does not see adds nothing at all, whatever numbers lie there.

constexpr int kLanes = 64;      // keys of a block
constexpr int kBlocks = 8;      // blocks of a stretch
constexpr int kRowsAtOnce = 48;  // rows that share the copy of a block
constexpr int kInPlace = 7;     // rows up to which a block is read where it lies, whatever its type
constexpr int kCacheLines = 16;  // rows of values that are summed between prefetches
constexpr float kMinusInf = -__builtin_inff();

template <class F>
RUNNER_INLINE auto with_cache_type(DType t, F&& f) {
  if (t == DType::i16) return f(I16{});
  return with_type(t, f);
}

RUNNER_INLINE int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

// Rows of the buffer before the first of its first block: how far the buffer's row 0 is into that block's stretch.
RUNNER_INLINE int64_t skipped(const AttentionArgs& a) { return a.start % (kLanes * kBlocks); }

struct KeyRange {
  int64_t first, last;  // rows [first, last) of the buffer
};

RUNNER_INLINE KeyRange visible(const AttentionArgs& a, int64_t l) {
  int64_t here = a.s - a.l + l, last = a.causal ? here + 1 : a.s;
  int64_t first = a.window > 0 && here + 1 > a.window ? here + 1 - a.window : 0;
  if (a.chunk > 0) {
    int64_t begin = (a.start + here) / a.chunk * a.chunk - a.start;
    first = begin > first ? begin : first;
  }
  if (last > a.s) last = a.s;
  if (last < 0) last = 0;
  return {first < last ? first : last, last};
}

// Bits [first, last) of 64.
RUNNER_INLINE uint64_t bits_between(int64_t first, int64_t last) {
  if (first < 0) first = 0;
  if (last > 64) last = 64;
  if (first >= last) return 0;
  return (~uint64_t(0) >> (64 - (last - first))) << first;
}

// What the mask adds to the score of (b, h, l, s); minus infinity hides the key.
RUNNER_INLINE float mask_at(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, int64_t s) {
  int64_t i = b * a.mb + h * a.mh + l * a.ml + s * a.ms;
  if (a.mask_kind == 1) return ((const uint8_t*)a.mask)[i] ? 0.0f : kMinusInf;
  return load_one(a.mask, a.mt, i);
}

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
  for (int64_t i = a.d; i < whole_vectors(a.d); ++i) dst[i] = 0.0f;
}

inline void store_result(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, float* src) {
  if (a.kt == DType::i16) times_powers(value_row<I16>(a, b, h / (a.h / a.kv), a.header), a.dv, src);
  with_type(a.qt, [&](auto t) {
    using T = decltype(t);
    from_float<T>(src, (typename T::S*)a.out + b * a.ob + h * a.oh + l * a.ol, a.dv);
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

// Rows of a block's keys or values: `stride` items apart, `width` numbers each.
template <class T>
struct Lines {
  using S = typename T::S;
  const S* at;  // of lane 0
  int64_t stride, width;
  bool far;  // in memory, to be prefetched
  int64_t end = INT64_MAX;    // the lane behind the last row that the job reads
  const S* others = nullptr;  // where the rows of the thread's next job begin
  // The row to be asked for while that of lane i is read.
  RUNNER_INLINE const S* ahead(int64_t i) const {
    const int64_t row = i + rows_ahead<T>(stride);
    return row < end ? at + row * stride : others + (row - end) * stride;
  }
};

constexpr int kTile = 6;                             // rows of a product at a time
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;  // and vectors of columns

// out[r * ldo + c] = the sum over i in [first, last) of a[r * lda + i] b[i][c], in their order, for R rows and whole
// vectors of columns. Where b is far away, a few of its rows at a time meet all columns, so that they come from memory at
// an even pace: with all rows at a time, the first columns waited for memory and the others for nothing.
template <class T, int R>
RUNNER_INLINE void product(const float* a, int64_t lda, const Lines<T>& b, int64_t first, int64_t last, float* out,
                           int64_t ldo) {
  constexpr int64_t kItem = sizeof(typename T::S);
  const int64_t some = b.far ? kCacheLines : last - first;
  for (int64_t from = first; from < last; from += some) {
    const int64_t to = from + some < last ? from + some : last;
    if (b.far) {
      for (int64_t i = from; i < to; ++i) {
        const typename T::S* row = b.ahead(i);
        for (int64_t c = 0; c < b.width; c += 64 / kItem) prefetch(row + c);
      }
    }
    int64_t c = 0;
    auto step = [&](auto count) {
      constexpr int N = decltype(count)::value;
      for (; c + N * W <= b.width; c += N * W) {
        VF acc[R][N];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) acc[r][j] = from > first ? load(out + r * ldo + c + j * W) : zero();
        }
        const typename T::S* v = b.at + from * b.stride + c;
        for (int64_t i = from; i < to; ++i, v += b.stride) {
          VF vv[N];
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) vv[j] = T::load_v(v + j * W);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            VF w = set1(a[r * lda + i]);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) acc[r][j] = fma(w, vv[j], acc[r][j]);
          }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) store(out + r * ldo + c + j * W, acc[r][j]);
        }
      }
    };
    step(Int<kTileVectors>{});
    step(Int<1>{});
  }
  if (first >= last) {
    for (int r = 0; r < R; ++r) memset(out + r * ldo, 0, (size_t)(b.width * 4));
  }
}

// score[r * kLanes + i] = q row r . key i, for R rows and keys [i, i + N), none of them behind `end`; whole vectors.
template <class T, int R, int N>
RUNNER_INLINE void score_few(const float* q, const Lines<T>& keys, int64_t i, int64_t end, float* score) {
  constexpr int64_t kItem = sizeof(typename T::S);
  constexpr int kSums = (R * N + W - 1) / W;
  const typename T::S* k[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) k[j] = keys.at + (i + j < end ? i + j : end - 1) * keys.stride;
  if (keys.far) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const typename T::S* row = keys.ahead(i + j);
      for (int64_t d = 0; d < keys.width; d += 64 / kItem) prefetch(row + d);
    }
  }
  VF acc[kSums * W];
#pragma GCC unroll 16
  for (int j = 0; j < kSums * W; ++j) acc[j] = zero();
  for (int64_t d = 0; d < keys.width; d += W) {
    VF qv[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) qv[r] = load(q + r * keys.width + d);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      VF kv = T::load_v(k[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * N + j] = fma(kv, qv[r], acc[r * N + j]);
    }
  }
  float out[kSums * W];
#pragma GCC unroll 2
  for (int b = 0; b < kSums; ++b) store(out + b * W, sums(acc + b * W));
  for (int r = 0; r < R; ++r) memcpy(score + r * kLanes + i, out + r * N, N * 4);
}

// The same for R rows and N vectors of keys whose numbers are columns[d * kLanes + key]: the sums over every W-th number
// one after another, each of which is added to what it belongs to.
template <int R, int N>
RUNNER_INLINE void score_many(const float* q, int64_t width, const float* columns, int64_t d, float* score) {
  alignas(64) float kept[4][R * N * W];  // sums of one lane, of two, four and eight
  for (int step = 0; step < W; ++step) {
    VF acc[R][N];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[r][j] = zero();
    }
    // `sums` adds the first and the third of four, then the second and the fourth.
    for (int64_t i = (step & ~3) + (step & 1) * 2 + (step >> 1 & 1); i < d; i += W) {
      VF k[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) k[j] = load(columns + i * kLanes + j * W);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        VF b = set1(q[r * width + i]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = fma(k[j], b, acc[r][j]);
      }
    }
    int level = 0;
    for (; step >> level & 1; ++level) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = acc[r][j] + load(kept[level] + (r * N + j) * W);
      }
    }
    float* to = step + 1 < W ? kept[level] : score;
    const int64_t stride = step + 1 < W ? N * W : kLanes;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) store(to + r * stride + j * W, acc[r][j]);
    }
  }
}

// Calls f(Int<R>, first row) for all rows, up to kTile at a time.
template <class F>
RUNNER_INLINE void by_tiles(int n, F&& f) {
  int r = 0;
  for (; r + kTile <= n; r += kTile) f(Int<kTile>{}, r);
  if (n - r >= 4) f(Int<4>{}, r), r += 4;
  if (n - r >= 3) return f(Int<3>{}, r);
  if (n - r == 2) return f(Int<2>{}, r);
  if (n - r == 1) return f(Int<1>{}, r);
}

// The same, up to four at a time.
template <class F>
RUNNER_INLINE void by_fours(int n, F&& f) {
  int r = 0;
  for (; r + 4 <= n; r += 4) f(Int<4>{}, r);
  if (n - r == 3) return f(Int<3>{}, r);
  if (n - r == 2) return f(Int<2>{}, r);
  if (n - r == 1) return f(Int<1>{}, r);
}

// Lanes [i, i + W) of keys as float32 columns, codes without their scales: to[c * kLanes + lane]. Outside of
// [first, last), where there may be no keys, the nearest takes their place.
template <class T>
RUNNER_INLINE void turn_keys(const Lines<T>& keys, int64_t i, int64_t first, int64_t last, float* to) {
  constexpr int64_t kItem = sizeof(typename T::S);
  const typename T::S* k[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) {
    const int64_t lane = i + j < first ? first : i + j < last ? i + j : last - 1;
    k[j] = keys.at + lane * keys.stride;
  }
  const int64_t next = rows_ahead<T>(keys.stride) * keys.stride;
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) {
    for (int64_t c = 0; c < keys.width; c += 64 / kItem) prefetch(k[j] + next + c);
  }
  VF r[W];
  int64_t c = 0;
  if constexpr (T::kPairs) {
    for (; c + 2 * W <= keys.width; c += 2 * W) {
      turn_rows(k, c, r);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        store(to + (c + 2 * j) * kLanes + i, T::low(r[j]));
        store(to + (c + 2 * j + 1) * kLanes + i, T::high(r[j]));
      }
    }
  }
  for (; c + W <= keys.width; c += W) {
    if constexpr (kItem == 4) {
      turn_rows(k, c, r);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) r[j] = T::load_v(k[j] + c);
      turn(r);
    }
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) store(to + (c + j) * kLanes + i, r[j]);
  }
  for (; c < keys.width; ++c) {
    for (int j = 0; j < W; ++j) to[c * kLanes + i + j] = T::to(k[j][c]);
  }
}

// A product for one row that does not see all lanes between its first and its last: as if the others were not there.
template <class T>
void values_seen(const float* p, uint64_t seen, const Lines<T>& values, float* out) {
  memset(out, 0, (size_t)values.width * 4);
  for (; seen; seen &= seen - 1) {
    const int64_t i = __builtin_ctzll(seen);
    for (int64_t d = 0; d < values.width; d += W) {
      store(out + d, fma(set1(p[i]), T::load_v(values.at + i * values.stride + d), load(out + d)));
    }
  }
}

template <class T>
bool all_finite(const Lines<T>& rows, int64_t first, int64_t last) {
  VF odd = zero();
  for (int64_t i = first; i < last; ++i) {
    for (int64_t d = 0; d < rows.width; d += W) {
      VF v = T::load_v(rows.at + i * rows.stride + d);
      odd = odd + (v - v);  // NaN unless finite
    }
  }
  return hsum(odd) == 0.0f;
}

// tanh to about 1e-7 of its largest value: near zero the Taylor series, else by e^x.
RUNNER_INLINE VF vtanh(VF x) {
  VF size = vabs(x), square = x * x;
  VF p = set1(21844.0f / 6081075);
  p = fma(p, square, set1(-1382.0f / 155925));
  p = fma(p, square, set1(62.0f / 2835));
  p = fma(p, square, set1(-17.0f / 315));
  p = fma(p, square, set1(2.0f / 15));
  p = fma(p, square, set1(-1.0f / 3));
  VF small = fma(p * square, x, x);
  VF large = set1(1.0f) - set1(2.0f) / (vexp(size + size) + set1(1.0f));
  large = select_lt(x, zero(), zero() - large, large);
  return select_lt(size, set1(0.35f), small, large);
}

// Softmax of some rows over the keys so far: the greatest score, the sum of e^(score - greatest), and the values
// weighed so. Nothing was seen where most is minus infinity and total 0.
struct Softmax {
  float *most, *total;  // [kRowsAtOnce]
  float* out;           // [rows][width]
};

// What a job works in.
struct Work {
  float *q, *score;      // [rows][d], [rows][kLanes]
  float *keys, *values;   // copies of a block: [d][kLanes] or [kLanes][d], and [kLanes][dv]
  Softmax block, stretch, all;
  uint64_t seen[kRowsAtOnce];  // lanes of the block that a row sees
  // The row of the buffer behind the last one that the job reads. A block may begin before the buffer: the difference
  // must be a number.
  int64_t end = INT64_MAX / 2;
  const void *other_keys = nullptr, *other_values = nullptr;  // rows of the thread's next job
  float added[kLanes], key_scale[kLanes], value_scale[kLanes];
};

// Those of the lanes `seen` that the mask leaves to position l of head h; lane 0 is row `row` of the buffer.
RUNNER_INLINE uint64_t unmasked(const AttentionArgs& a, int64_t b, int64_t h, int64_t l, int64_t row, uint64_t seen) {
  for (uint64_t left = seen; left; left &= left - 1) {
    const int64_t i = __builtin_ctzll(left);
    if (mask_at(a, b, h, l, row + i) == kMinusInf) seen &= ~(uint64_t(1) << i);
  }
  return seen;
}

// w.seen: the lanes of a block, whose lane 0 is row `row` of the buffer (perhaps before its first), that each of n rows
// sees. Returns those that any of them sees.
RUNNER_INLINE uint64_t see(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int n, int64_t row, Work& w) {
  const int64_t group = a.h / a.kv;
  int64_t l = r0 / group, g = r0 % group;
  uint64_t any = 0;
  for (int r = 0; r < n; ++l, g = 0) {
    const KeyRange keys = visible(a, l);
    const uint64_t seen = bits_between(keys.first - row, keys.last - row);
    for (; g < group && r < n; ++g, ++r) {
      any |= w.seen[r] = a.mask ? unmasked(a, b, kv * group + g, l, row, seen) : seen;
    }
  }
  return any;
}

// Lane i: x where bit i is set, else y.
RUNNER_INLINE VF select_bits(uint64_t bits, VF x, VF y) {
#if RUNNER_ISA == 512
  return _mm512_mask_blend_ps((__mmask16)bits, y, x);
#elif RUNNER_ISA == 2
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)(bits & 255)), places);
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, places)));
#else
  const int one = (int)bits;
  const VI set = VI{one, one, one, one} & VI{1, 2, 4, 8};
  return set != 0 ? x : y;
#endif
}

// e^x for x <= 0, to about 1 ulp: as vexp, with fewer steps. NaN stays, minus infinity gives 0.
RUNNER_INLINE VF vexp_falling(VF x) {
  VF c = vmax(set1(-87.3f), x), n = vround(c * set1(1.44269504088896341f));
  VF r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), c));
  VF p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return select_lt(x, set1(-87.3f), zero(), p * pow2(n));
}

// Products of a row become its scores, minus infinity where it sees no key. Returns the greatest.
RUNNER_INLINE float score_row(const AttentionArgs& a, bool codes, const Work& w, bool added, uint64_t seen, float* p) {
  if (codes || a.softcap != 0.0f || added) {
    const VF cap = set1(a.softcap), inverse = set1(a.softcap == 0.0f ? 0.0f : 1.0f / a.softcap);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += W) {
      VF s = load(p + i);
      if (codes) s = s * load(w.key_scale + i);
      if (a.softcap != 0.0f) s = vtanh(s * inverse) * cap;
      if (added) s = s + load(w.added + i);
      store(p + i, s);
    }
  }
  VF m = set1(kMinusInf);
  if (~seen) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += W) store(p + i, select_bits(seen >> i, load(p + i), set1(kMinusInf)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += W) m = vmax(load(p + i), m);
  return hmax(m);
}

// Scores of a row become weights, e^(score - most), for codes times the scales of their values. Returns the weights' sum.
RUNNER_INLINE float weigh_row(bool codes, const Work& w, uint64_t seen, float most, float* p) {
  const VF base = set1(most == kMinusInf ? 0.0f : most);
  VF sum = zero();
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += W) {
    VF e = vexp_falling(load(p + i) - base);
    sum = sum + e;
    store(p + i, codes ? e * load(w.value_scale + i) : e);
  }
  if (codes && ~seen) {  // a scale that is NaN must not reach those who do not see its row
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += W) store(p + i, select_bits(seen >> i, load(p + i), zero()));
  }
  return hsum(sum);
}

// Sums of the weighed values of a block; a row's part in them depends on nothing but what it sees.
template <class T>
void block_values(const Work& w, int n, const Lines<T>& values, bool finite, float* out) {
  by_tiles(n, [&](auto count, int r) {
    constexpr int R = decltype(count)::value;
    uint64_t any = 0, all = ~uint64_t(0);
    for (int i = 0; i < R; ++i) any |= w.seen[r + i], all &= w.seen[r + i];
    const int64_t first = any ? __builtin_ctzll(any) : 0, last = any ? 64 - __builtin_clzll(any) : 0;
    if (finite || all == bits_between(first, last)) {
      product<T, R>(w.score + r * kLanes, kLanes, values, first, last, out + r * values.width, values.width);
      return;
    }
    for (int i = 0; i < R; ++i) {
      values_seen(w.score + (r + i) * kLanes, w.seen[r + i], values, out + (r + i) * values.width);
    }
  });
}

// float32 copies of lanes [first, last) in whole vectors, codes without their scales
template <class T>
Lines<F32> copied(const typename T::S* rows, int64_t stride, int64_t d, int64_t first, int64_t last, float* copy) {
  const int64_t width = whole_vectors(d);
  for (int64_t i = first; i < last; ++i) {
    to_float<T>(rows + i * stride, copy + i * width, d);
    for (int64_t j = d; j < width; ++j) copy[i * width + j] = 0.0f;
  }
  return {copy, width, width, false};
}

// Softmax over the block whose lane 0 is row `row`, for rows [r0, r0 + n) of a pair, to w.block; false: none sees any.
template <class T>
bool attend_block(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int n, int64_t row, Work& w) {
  const uint64_t any = see(a, b, kv, r0, n, row, w);
  if (!any) return false;
  const int64_t first = __builtin_ctzll(any), last = 64 - __builtin_clzll(any), group = a.h / a.kv;
  const auto *k = key_row<T>(a, b, kv, row), *v = value_row<T>(a, b, kv, row);
  if constexpr (T::kCodes) {
    for (float* scales : {w.key_scale, w.value_scale}) {
      for (int64_t i = 0; i < first; ++i) scales[i] = 0.0f;
      for (int64_t i = last; i < kLanes; ++i) scales[i] = 0.0f;
    }
    for (int64_t i = first; i < last; ++i) memcpy(w.key_scale + i, k + i * a.ks + a.d, 4);
    for (int64_t i = first; i < last; ++i) memcpy(w.value_scale + i, v + i * a.vs + a.dv, 4);
  }
  constexpr bool kFloats = sizeof(typename T::S) == 4;
  const int64_t width = whole_vectors(a.d);
  if (n <= kInPlace) {
    auto score = [&]<class U>(const Lines<U>& keys) {
      by_fours(n, [&](auto count, int r) {
        constexpr int R = decltype(count)::value, N = keys_at_once<R>();
        const float* q = w.q + r * width;
        for (int64_t i = first; i < last; i += N) score_few<U, R, N>(q, keys, i, last, w.score + r * kLanes);
      });
    };
    if (a.d % W == 0) {
      score(Lines<T>{k, a.ks, a.d, true, w.end - row, (const typename T::S*)w.other_keys});
    } else {
      score(copied<T>(k, a.ks, a.d, first, last, w.keys));
    }
  } else {
    const int64_t from = first / W * W, end = (last + W - 1) / W * W;
    for (int64_t i = from; i < last; i += W) turn_keys(Lines<T>{k, a.ks, a.d, true}, i, first, last, w.keys);
    by_tiles(n, [&](auto count, int r) {
      constexpr int R = decltype(count)::value;
      const float* q = w.q + r * width;
      int64_t i = from;
      for (; i + kTileVectors * W <= end; i += kTileVectors * W) {
        score_many<R, kTileVectors>(q, width, w.keys + i, a.d, w.score + r * kLanes + i);
      }
      for (; i < end; i += W) score_many<R, 1>(q, width, w.keys + i, a.d, w.score + r * kLanes + i);
    });
  }
  const bool added = a.mask_kind == 2;
  for (int r = 0; r < n; ++r) {
    if (added) {
      const int64_t l = (r0 + r) / group, h = kv * group + (r0 + r) % group;
      for (int i = 0; i < kLanes; ++i) w.added[i] = w.seen[r] >> i & 1 ? mask_at(a, b, h, l, row + i) : 0.0f;
    }
    w.block.most[r] = score_row(a, T::kCodes, w, added, w.seen[r], w.score + r * kLanes);
  }
  for (int r = 0; r < n; ++r) {
    w.block.total[r] = weigh_row(T::kCodes, w, w.seen[r], w.block.most[r], w.score + r * kLanes);
  }
  // Whether 0 times any number of the block is 0; asked where some row sees less than another beside it.
  auto weigh = [&]<class U>(const Lines<U>& values) {
    bool same = true;
    for (int r = 0; r < n; ++r) same = same && w.seen[r] == any;
    const bool finite = T::kCodes || (!same && all_finite(values, first, last));
    block_values(w, n, values, finite, w.block.out);
  };
  if ((kFloats || n <= kInPlace) && a.dv % W == 0) {
    weigh(Lines<T>{v, a.vs, a.dv, true, w.end - row, (const typename T::S*)w.other_values});
  } else {
    weigh(copied<T>(v, a.vs, a.dv, first, last, w.values));
  }
  return true;
}

// What came later joins what came before, row by row: both weigh e^(their greatest score - the greater of the two).
inline void merge(const Softmax& to, const Softmax& from, int n, int64_t width) {
  float before[kRowsAtOnce], after[kRowsAtOnce];
  for (int r = 0; r < n; r += W) {
    const VF old = load(to.most + r), late = load(from.most + r), most = vmax(late, old);
    const VF base = select_lt(set1(kMinusInf), most, most, zero());
    const VF a = vexp_falling(old - base), b = vexp_falling(late - base);
    store(before + r, a);
    store(after + r, b);
    store(to.most + r, most);
    store(to.total + r, fma(load(from.total + r), b, load(to.total + r) * a));
  }
  for (int r = 0; r < n; ++r) {
    if (from.most[r] == kMinusInf && from.total[r] == 0.0f) continue;
    float *x = to.out + r * width, *y = from.out + r * width;
    const VF a = set1(before[r]), b = set1(after[r]);
    for (int64_t d = 0; d < width; d += W) store(x + d, fma(load(y + d), b, load(x + d) * a));
  }
}

inline void clear(const Softmax& s, int n, int64_t width) {
  for (int r = 0; r < kRowsAtOnce; ++r) s.most[r] = kMinusInf, s.total[r] = 0.0f;
  memset(s.out, 0, (size_t)(n * width * 4));
}
