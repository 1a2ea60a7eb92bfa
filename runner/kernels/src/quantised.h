// Quantised linear layers in integer arithmetic with 24-bit activations. Included inside an x86 ISA namespace.
//
// Each group of x becomes x = scale * (65536 * high + 256 * mid + low) with the three in int8: an error of at most 2^-24
// of the group's largest value, float32's own. (With two bytes a value beside a large one lost so much that logits were
// off by 1.6e-3 of their deviation.) Then, per group,
//   sum w x = s_w s_x sum q (65536 high + 256 mid + low) + shift sum x
// with exact integer sums; the last sum is float32.

// How the bytes of x lie: one chunk meets 64 bytes of weights. Four bits: 128 values as
// [even high][odd high][even mid][odd mid][even low][odd low], as the two nibbles of a byte are neighbours; eight bits:
// [high][mid][low] of 64 values.
RUNNER_INLINE int64_t chunk_values(int bits) { return bits == 4 ? 128 : 64; }
RUNNER_INLINE int64_t chunk_stride(int bits) { return 3 * chunk_values(bits); }

struct QuantX {
  int8_t* q;      // [m][chunks][chunk_stride]
  float* scale;   // [m][padded groups], zeros past the last
  float* sum;     // likewise: sum of the group's rounded values
  int64_t chunks, padded, stride;
  bool finite;
};

// Largest magnitude and sum of a group; a NaN or infinity shows in the sum.
RUNNER_INLINE void group_range(const float* x, int group, float* most, float* total) {
  VF m = zero(), s = zero();
  for (int i = 0; i < group; i += W) {
    VF v = load(x + i);
    m = vmax(vabs(v), m);
    s = s + v;
  }
  *most = hmax(m);
  *total = hsum(s);
}

constexpr float kMostByteCode = 8323072.0f;  // 127 * 65536: the high byte stays in int8

// 32 values of x as codes, 16 bytes each of even and odd high, mid and low (four bits), or 32 bytes each. Returns the
// codes' sum: the shift then meets the same rounded x as the weights, and the rounding error is multiplied by w, which
// is centred, not by q, which is not (three times less error).
RUNNER_INLINE int32_t quantise_32(const float* x, float inverse, int bits, int8_t* to) {
  int step = bits == 4 ? 64 : 16;  // distance from even to odd values, or from the first 16 to the next
  int piece = bits == 4 ? 128 : 64;  // from high to mid to low
#if RUNNER_ISA == 512
  __m512i a = _mm512_cvtps_epi32(load(x) * set1(inverse)), b = _mm512_cvtps_epi32(load(x + 16) * set1(inverse));
  int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  if (bits == 4) {
    __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512i e = _mm512_permutex2var_epi32(a, even, b);
    b = _mm512_permutex2var_epi32(a, odd, b);
    a = e;
  }
  auto split = [&](__m512i code, int8_t* at) {
    __m512i half = _mm512_set1_epi32(128);
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(code, half), 8);
    __m512i high = _mm512_srai_epi32(_mm512_add_epi32(upper, half), 8);
    _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)(at + piece), _mm512_cvtepi32_epi8(upper));  // modulo 256: what `high` leaves
    _mm_storeu_si128((__m128i*)(at + 2 * piece), _mm512_cvtepi32_epi8(code));
  };
  split(a, to);
  split(b, to + step);
#else
  int32_t sum = 0;
  alignas(32) int32_t code[32];
  for (int i = 0; i < 32; i += 8) {
    _mm256_store_si256((__m256i*)(code + i), _mm256_cvtps_epi32(load(x + i) * set1(inverse)));
  }
  auto split = [&](int32_t c, int8_t* at) {
    int32_t upper = (c + 128) >> 8;
    at[0] = (int8_t)((upper + 128) >> 8);
    at[piece] = (int8_t)upper;  // modulo 256: what the high byte leaves
    at[2 * piece] = (int8_t)c;
    sum += c;
  };
  for (int i = 0; i < 16; ++i) {
    split(bits == 4 ? code[2 * i] : code[i], to + i);
    split(bits == 4 ? code[2 * i + 1] : code[i + 16], to + i + step);
  }
#endif
  return sum;
}

template <class T>
RUNNER_INLINE void quantise_row(const LinearArgs& a, int64_t m, const QuantX& to, float* line, bool* finite) {
  const float* x = (const float*)a.x + m * a.k;
  if (a.xt != DType::f32) {
    to_float<T>((const typename T::S*)a.x + m * a.k, line, a.k);
    x = line;
  }
  int64_t groups = groups_of(a), values = chunk_values(a.bits);
  int8_t* q = to.q + m * to.stride;
  float *scale = to.scale + m * to.padded, *sum = to.sum + m * to.padded;
  for (int64_t g = 0; g < to.padded; ++g) scale[g] = sum[g] = 0;
  if (a.k % values) memset(q + (to.chunks - 1) * chunk_stride(a.bits), 0, (size_t)chunk_stride(a.bits));
  for (int64_t g = 0; g < groups; ++g) {
    float most, total;
    group_range(x + g * a.group, a.group, &most, &total);
    if (!(total - total == 0.0f)) {
      *finite = false;
      return;
    }
    scale[g] = most / kMostByteCode;
    int32_t codes = 0;
    float inverse = most > 1e-30f ? kMostByteCode / most : 0.0f;
    for (int64_t i = g * a.group; i < (g + 1) * a.group; i += 32) {
      int64_t in = i % values;
      codes += quantise_32(x + i, inverse, a.bits, q + i / values * chunk_stride(a.bits) + (a.bits == 4 ? in / 2 : in));
    }
    sum[g] = scale[g] * (float)codes;
  }
}

inline QuantX quantise_x(const LinearArgs& a) {
  QuantX to;
  to.chunks = (a.k + chunk_values(a.bits) - 1) / chunk_values(a.bits);
  to.padded = (groups_of(a) + 15) / 16 * 16;
  to.stride = to.chunks * chunk_stride(a.bits);
  int64_t bytes = a.m * (to.stride + 8 * to.padded);
  char* block = (char*)scratch(Slot::packed, bytes);
  float* line = (float*)scratch(Slot::row, a.k * 4);
  to.q = (int8_t*)block;
  to.scale = (float*)(block + a.m * to.stride);
  to.sum = to.scale + a.m * to.padded;
  to.finite = true;
  with_type(a.xt, [&](auto t) {
    for (int64_t m = 0; m < a.m; ++m) quantise_row<decltype(t)>(a, m, to, line, &to.finite);
  });
  return to;
}

#if RUNNER_ISA == 512

template <class T>
RUNNER_INLINE VF load_some(const typename T::S* p, int64_t n) {
  if constexpr (sizeof(typename T::S) == 4) {
    return _mm512_maskz_loadu_ps((__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1), p);
  } else {
    if (n >= 16) return T::load_v(p);
    alignas(32) uint16_t part[16];
    _mm256_store_si256((__m256i*)part, _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
    return T::load_v(part);
  }
}

// R rows of weights against M rows of x.
template <int BITS, int G, class T, int R, int M>
RUNNER_INLINE void quant_rows(const LinearArgs& a, const QuantX& x, int64_t n, int64_t m0, float out[R][M]) {
  constexpr int kValues = BITS == 4 ? 128 : 64, kStride = 3 * kValues;
  constexpr int kLane = kValues / 16;                  // values of one int32 lane
  constexpr int kChunks = 16 * G / kValues;            // chunks of 16 groups
  int64_t groups = a.k / G, row_bytes = a.k * BITS / 8;
  const uint8_t* w = (const uint8_t*)a.w + n * row_bytes;
  const auto* scales = (const typename T::S*)a.scales + n * groups;
  const auto* shifts = (const typename T::S*)a.shifts + n * groups;
  const int8_t* q = x.q + m0 * x.stride;
  const float *sx = x.scale + m0 * x.padded, *xs = x.sum + m0 * x.padded;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i group_of_lane = _mm512_srli_epi32(lanes, G / kLane >= 16 ? 31 : __builtin_ctz(G / kLane));
  const __m512i nibble = _mm512_set1_epi8(15);
  prefetch((const char*)scales + kAhead / 8);
  prefetch((const char*)shifts + kAhead / 8);
  VF acc[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[r][m] = zero();
  }
  for (int64_t g = 0; g < groups; g += 16) {
    VF s[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      VF sw = load_some<T>(scales + r * groups + g, groups - g), bw = load_some<T>(shifts + r * groups + g, groups - g);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        s[r][m] = sw * load(sx + m * x.padded + g);
        acc[r][m] = fma(bw, load(xs + m * x.padded + g), acc[r][m]);
      }
    }
    int64_t first = g * G / kValues, last = first + kChunks < x.chunks ? first + kChunks : x.chunks;
    for (int64_t c = first; c < last; ++c) {
      __m512i index = _mm512_add_epi32(group_of_lane, _mm512_set1_epi32((int)((c - first) * kValues / G)));
      int64_t left = row_bytes - c * 64;
      __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i w0[R], w1[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        w0[r] = _mm512_maskz_loadu_epi8(mask, w + r * row_bytes + c * 64);
        prefetch(ahead<R>(w, row_bytes, r, c));
        if constexpr (BITS == 4) {
          w1[r] = _mm512_and_si512(_mm512_srli_epi16(w0[r], 4), nibble);
          w0[r] = _mm512_and_si512(w0[r], nibble);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int8_t* p = q + m * x.stride + c * kStride;
        __m512i x0[3], x1[3];  // high, mid, low of even and odd values, or of all
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          x0[i] = _mm512_loadu_si512(p + i * kValues);
          x1[i] = BITS == 4 ? _mm512_loadu_si512(p + i * kValues + 64) : x0[i];
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          auto product = [&](__m512i sum, int i) {
            sum = _mm512_dpbusd_epi32(sum, w0[r], x0[i]);
            return BITS == 4 ? _mm512_dpbusd_epi32(sum, w1[r], x1[i]) : sum;
          };
          __m512i upper = product(_mm512_slli_epi32(product(_mm512_setzero_si512(), 0), 8), 1);
          VF whole;
          if constexpr (BITS == 4) {
            whole = _mm512_cvtepi32_ps(product(_mm512_slli_epi32(upper, 8), 2));
          } else {  // eight bits times 24 do not fit 32
            VF low = _mm512_cvtepi32_ps(product(_mm512_setzero_si512(), 2));
            whole = fma(_mm512_cvtepi32_ps(upper), set1(256.0f), low);
          }
          acc[r][m] = fma(whole, _mm512_permutexvar_ps(index, s[r][m]), acc[r][m]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[r][m] = hsum(acc[r][m]);
  }
}
constexpr int kQuantRows = 4, kQuantM = 4;

#else  // AVX2

RUNNER_INLINE __m256i pairs(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }

// 32 bytes of weights against one half chunk of x: sums of q (65536 high + 256 mid + low) per lane of 4 bytes.
template <int BITS>
RUNNER_INLINE VF half_chunk(__m256i w, const int8_t* p) {
  const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), byte = _mm256_set1_epi16(256);
  __m256i w0 = _mm256_and_si256(w, nibble), w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
  auto x = [&](int at) { return _mm256_loadu_si256((const __m256i*)(p + at)); };
  if constexpr (BITS == 4) {
    auto both = [&](int at) { return _mm256_add_epi16(pairs(w0, x(at)), pairs(w1, x(at + 64))); };
    __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(both(0), byte), _mm256_madd_epi16(both(128), one));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(upper, 8), _mm256_madd_epi16(both(256), one)));
  } else {  // the two nibbles of a byte apart: a full byte times int8 would saturate 16 bits
    auto both = [&](int at, int by) {
      __m256i low = _mm256_madd_epi16(pairs(w0, x(at)), _mm256_set1_epi16((int16_t)by));
      return _mm256_add_epi32(low, _mm256_madd_epi16(pairs(w1, x(at)), _mm256_set1_epi16((int16_t)(16 * by))));
    };
    __m256i upper = _mm256_add_epi32(both(0, 256), both(64, 1));
    return fma(_mm256_cvtepi32_ps(upper), set1(256.0f), _mm256_cvtepi32_ps(both(128, 1)));
  }
}

template <int BITS, int G, class T, int R, int M>
RUNNER_INLINE void quant_rows(const LinearArgs& a, const QuantX& x, int64_t n, int64_t m0, float out[R][M]) {
  constexpr int kStride = BITS == 4 ? 384 : 192, kHalf = BITS == 4 ? 64 : 32;  // values of half a chunk
  int64_t groups = a.k / G, row_bytes = a.k * BITS / 8;
  const uint8_t* w = (const uint8_t*)a.w + n * row_bytes;
  const int8_t* q = x.q + m0 * x.stride;
  const float *sx = x.scale + m0 * x.padded, *xs = x.sum + m0 * x.padded;
  const auto* scales = (const typename T::S*)a.scales + n * groups;
  const auto* shifts = (const typename T::S*)a.shifts + n * groups;
  VF acc[R][M];
  float tail[R][M];  // the shift's share of the last few groups
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      acc[r][m] = zero();
      tail[r][m] = 0;
      int64_t g = 0;
      for (; g + W <= groups; g += W) {
        acc[r][m] = fma(T::load_v(shifts + r * groups + g), load(xs + m * x.padded + g), acc[r][m]);
      }
      for (; g < groups; ++g) tail[r][m] += T::to(shifts[r * groups + g]) * xs[m * x.padded + g];
    }
  }
  for (int64_t c = 0; c * 32 < row_bytes; ++c) {  // half chunks
    int64_t g = c * kHalf / G;
    alignas(32) uint8_t part[32] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = w + r * row_bytes + c * 32;
      if (row_bytes - c * 32 < 32) {
        memcpy(part, from, (size_t)(row_bytes - c * 32));
        from = part;
      }
      __m256i wv = _mm256_loadu_si256((const __m256i*)from);
      if (c % 2 == 0) prefetch(ahead<R>(w, row_bytes, r, c / 2));
      float s0 = T::to(scales[r * groups + g]);
      float s1 = kHalf > G && g + 1 < groups ? T::to(scales[r * groups + g + 1]) : s0;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const float* sm = sx + m * x.padded + g;
        VF s = set1(s0 * sm[0]);
        if constexpr (kHalf > G) s = _mm256_insertf128_ps(s, _mm_set1_ps(s1 * sm[1]), 1);
        acc[r][m] = fma(half_chunk<BITS>(wv, q + m * x.stride + c / 2 * kStride + c % 2 * 32), s, acc[r][m]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[r][m] = hsum(acc[r][m]) + tail[r][m];
  }
}
constexpr int kQuantRows = 4, kQuantM = 2;

#endif

constexpr int64_t kLongRow = 512;  // bytes from which one row alone is long enough a stream

template <int BITS, int G, class T>
void quant_gemv_rows(const LinearArgs& a, const QuantX& x, int64_t n, int64_t end) {
  auto rows = [&](auto count, auto ms, int64_t m) {
    constexpr int R = decltype(count)::value, M = decltype(ms)::value;
    float out[R][M];
    quant_rows<BITS, G, T, R, M>(a, x, n, m, out);
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) store_out(a, m + j, n + r, out[r][j]);
    }
  };
  if (a.m == 1) {
    if (a.k * BITS / 8 <= kLongRow) {
      for (; n + kQuantRows <= end; n += kQuantRows) rows(Int<kQuantRows>{}, Int<1>{}, 0);
    }
    for (; n < end; ++n) rows(Int<1>{}, Int<1>{}, 0);
    return;
  }
  auto all_rows_of_x = [&](auto count) {
    int64_t m = 0;
    for (; m + kQuantM <= a.m; m += kQuantM) rows(count, Int<kQuantM>{}, m);
    for (; m < a.m; ++m) rows(count, Int<1>{}, m);
  };
  for (; n + 2 <= end; n += 2) all_rows_of_x(Int<2>{});
  for (; n < end; ++n) all_rows_of_x(Int<1>{});
}

template <class F>
RUNNER_INLINE void with_layout(const LinearArgs& a, F&& f) {
  if (a.bits == 4) {
    if (a.group == 32) return f(Int<4>{}, Int<32>{});
    if (a.group == 64) return f(Int<4>{}, Int<64>{});
    return f(Int<4>{}, Int<128>{});
  }
  if (a.group == 32) return f(Int<8>{}, Int<32>{});
  if (a.group == 64) return f(Int<8>{}, Int<64>{});
  return f(Int<8>{}, Int<128>{});
}

// Rows [n, n + rows) of a layer whose codes are not of 4 or 8 bits, as a layer of their own with 8.
inline LinearArgs widened(const LinearArgs& a, int64_t n, int64_t rows) {
  uint8_t* bytes = (uint8_t*)scratch(Slot::tile, rows * a.k);
  codes_to_bytes((const uint8_t*)a.w + n * a.k * a.bits / 8, a.bits, rows * a.k, bytes);
  LinearArgs part = a;
  part.w = bytes;
  part.bits = 8;
  part.scales = (const char*)a.scales + n * groups_of(a) * size_of(a.st);
  part.shifts = (const char*)a.shifts + n * groups_of(a) * size_of(a.st);
  part.out = (char*)a.out + n * size_of(a.xt);
  if (a.bias) part.bias = (const char*)a.bias + n * size_of(a.bt);
  return part;
}

inline bool quant_gemv_widened(const LinearArgs& a) {
  LinearArgs wide = a;
  wide.bits = 8;
  QuantX x = quantise_x(wide);
  if (!x.finite) return false;
  int64_t per = rows_per_chunk(a.n, a.k, 4);
  with_layout(wide, [&](auto bits, auto group) {
    with_type(a.st, [&](auto t) {
      Pool::get().parallel_for((int)((a.n + per - 1) / per), [&](int chunk) {
        int64_t end = (chunk + 1) * per < a.n ? (chunk + 1) * per : a.n;
        for (int64_t n = chunk * per; n < end; n += kQuantRows) {
          int64_t rows = end - n < kQuantRows ? end - n : kQuantRows;
          quant_gemv_rows<decltype(bits)::value, decltype(group)::value, decltype(t)>(widened(a, n, rows), x, 0, rows);
        }
      });
    });
  });
  return true;
}

// False when x holds a NaN or an infinity, which integers cannot carry.
inline bool quant_gemv(const LinearArgs& a) {
  if (a.bits != 4 && a.bits != 8) return quant_gemv_widened(a);
  QuantX x = quantise_x(a);
  if (!x.finite) return false;
  int64_t per = rows_per_chunk(a.n, a.k * a.bits / 8, 4);
  with_layout(a, [&](auto bits, auto group) {
    with_type(a.st, [&](auto t) {
      Pool::get().parallel_for((int)((a.n + per - 1) / per), [&](int chunk) {
        int64_t n = chunk * per, end = n + per < a.n ? n + per : a.n;
        quant_gemv_rows<decltype(bits)::value, decltype(group)::value, decltype(t)>(a, x, n, end);
      });
    });
  });
  return true;
}
