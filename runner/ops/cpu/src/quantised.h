// Quantised linear layers in integer arithmetic with 24-bit activations. Included inside an x86 ISA namespace.
//
// Each group of x becomes x = scale * (65536 * high + 256 * mid + low) with the three in int8: an error of at most 2^-24
// of the group's largest value, float32's own. (With two bytes a value beside a large one lost so much that logits were
// off by 1.6e-3 of their deviation.) Then, per group,
//   sum w x = s_w s_x sum q (65536 high + 256 mid + low) + shift sum x
// with exact integer sums; the last sum is float32. Weights in mxfp4 are of that kind too: q = 2 w / s + 12, from 0 to 24.
//
// AVX2, where products of bytes are what a token waits for, leaves `low` out where no value is over kLarge times the
// row's root mean square: the error is then 2^-16 of at most that. Few groups of a row have such a value.

// How the bytes of x lie: one chunk meets 64 bytes of weights. Four bits: 128 values as
// [even high][odd high][even mid][odd mid][even low][odd low], as the two nibbles of a byte are neighbours; eight bits:
// [high][mid][low] of 64 values. AVX2 has no product of bytes that would not saturate there: 16-bit lanes, a chunk as
// [even upper][odd upper][even low][odd low] of 32 values twice, upper = 256 * high + mid.
RUNNER_INLINE int64_t chunk_values(int bits) { return bits == 4 ? 128 : 64; }
RUNNER_INLINE int64_t chunk_stride(int bits) { return bits == 4 || RUNNER_ISA == 512 ? 3 * chunk_values(bits) : 256; }

struct QuantX {
  int8_t* q;      // [m][chunks][chunk_stride]
  float* scale;   // [m][padded groups], zeros past the last
  float* sum;     // likewise: sum of the group's rounded values
  uint8_t* fine;  // AVX2: [m][2 * chunks], whether half a chunk has low bytes; where not, its scales are 256 times more
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

RUNNER_INLINE float mean_square(const float* x, int64_t n) {
  VF acc = zero();
  for (int64_t i = 0; i < n; i += W) acc = fma(load(x + i), load(x + i), acc);
  return hsum(acc) / (float)n;
}

constexpr float kMostByteCode = 8323072.0f;  // 127 * 65536: the high byte stays in int8
constexpr float kLarge = 4.0f;

#if RUNNER_ISA == 2
// The low bytes of 32 integers, those of even places to one address and those of odd ones to another.
RUNNER_INLINE void store_even_odd_bytes(const __m256i v[4], int8_t* even, int8_t* odd) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  __m256i first = _mm256_packus_epi32(_mm256_and_si256(v[0], byte), _mm256_and_si256(v[1], byte));
  __m256i second = _mm256_packus_epi32(_mm256_and_si256(v[2], byte), _mm256_and_si256(v[3], byte));
  __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
  bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, apart), 0xd8);
  _mm_storeu_si128((__m128i*)even, _mm256_castsi256_si128(bytes));
  _mm_storeu_si128((__m128i*)odd, _mm256_extracti128_si256(bytes, 1));
}

// 32 integers of 16 bits: the even ones, then the odd ones.
RUNNER_INLINE void store_even_odd_words(const __m256i v[4], int8_t* to) {
  const __m256i word = _mm256_set1_epi32(0xffff);
  __m256i a = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8);
  __m256i b = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[2], v[3]), 0xd8);
  __m256i even = _mm256_packus_epi32(_mm256_and_si256(a, word), _mm256_and_si256(b, word));
  __m256i odd = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(even, 0xd8));
  _mm256_storeu_si256((__m256i*)(to + 32), _mm256_permute4x64_epi64(odd, 0xd8));
}
#endif

// 32 values of x as codes, 16 bytes each of even and odd high, mid and low (four bits), or 32 bytes each; `shift` is 8
// where low is 0 (AVX2), else 0. Returns the codes' sum: the shift of weights then meets the same rounded x as the
// weights, and the rounding error is multiplied by w, which is centred, not by q, which is not: a third of the error.
RUNNER_INLINE int32_t quantise_32(const float* x, float inverse, [[maybe_unused]] int shift, int bits, int8_t* to) {
  [[maybe_unused]] int step = bits == 4 ? 64 : 16;  // from even to odd values, or from the first 16 to the next
  [[maybe_unused]] int piece = bits == 4 ? 128 : 64;  // from high to mid to low
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
  const __m256i half = _mm256_set1_epi32(128);
  __m256i code[4], upper[4], high[4], total = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    code[i] = _mm256_slli_epi32(_mm256_cvtps_epi32(load(x + 8 * i) * set1(inverse)), shift);
    total = _mm256_add_epi32(total, code[i]);
    upper[i] = _mm256_srai_epi32(_mm256_add_epi32(code[i], half), 8);
    high[i] = _mm256_srai_epi32(_mm256_add_epi32(upper[i], half), 8);
  }
  __m128i pair = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  pair = _mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0x4e));
  int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
  if (bits == 4) {
    store_even_odd_bytes(high, to, to + step);
    store_even_odd_bytes(upper, to + piece, to + piece + step);  // modulo 256: what `high` leaves
    store_even_odd_bytes(code, to + 2 * piece, to + 2 * piece + step);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) code[i] = _mm256_sub_epi32(code[i], _mm256_slli_epi32(upper[i], 8));
    store_even_odd_words(upper, to);
    store_even_odd_words(code, to + 64);
  }
#endif
  return sum;
}

// Which halves of chunks get low bytes, all those that a group with a large value is in; `most` holds each group's.
RUNNER_INLINE const uint8_t* large_halves(const LinearArgs& a, const float* x, const float* most, uint8_t* to,
                                          int64_t halves) {
  if (RUNNER_ISA != 2) return to;
  memset(to, 0, (size_t)halves);
  const float limit = kLarge * kLarge * mean_square(x, a.k);
  const int64_t values = chunk_values(a.bits) / 2;
  for (int64_t g = 0; g < groups_of(a); ++g) {
    if (most[g] * most[g] <= limit) continue;
    for (int64_t h = g * a.group / values; h * values < (g + 1) * a.group; ++h) to[h] = 1;
  }
  return to;
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
    float total;
    group_range(x + g * a.group, a.group, &scale[g], &total);
    if (!(total - total == 0.0f)) {
      *finite = false;
      return;
    }
  }
  const uint8_t* fine = large_halves(a, x, scale, to.fine + 2 * m * to.chunks, 2 * to.chunks);
  for (int64_t g = 0; g < groups; ++g) {
    const float most = scale[g];
    const int shift = RUNNER_ISA == 2 && !fine[2 * g * a.group / values] ? 8 : 0;
    const float most_code = shift ? kMostByteCode / 256.0f : kMostByteCode;
    int32_t codes = 0;
    float inverse = most > 1e-30f ? most_code / most : 0.0f;
    for (int64_t i = g * a.group; i < (g + 1) * a.group; i += 32) {
      int64_t in = i % values;
      int64_t at = a.bits == 4 ? in / 2 : RUNNER_ISA == 512 ? in : 4 * in;
      codes += quantise_32(x + i, inverse, shift, a.bits, q + i / values * chunk_stride(a.bits) + at);
    }
    scale[g] = most / most_code;
    sum[g] = most / kMostByteCode * (float)codes;
  }
}

inline QuantX quantise_x(const LinearArgs& a) {
  QuantX to;
  to.chunks = (a.k + chunk_values(a.bits) - 1) / chunk_values(a.bits);
  to.padded = (groups_of(a) + 15) / 16 * 16;
  to.stride = to.chunks * chunk_stride(a.bits);
  int64_t bytes = a.m * (to.stride + 8 * to.padded + 2 * to.chunks);
  char* block = (char*)scratch(Slot::packed, bytes);
  float* line = (float*)scratch(Slot::row, a.k * 4);
  to.q = (int8_t*)block;
  to.scale = (float*)(block + a.m * to.stride);
  to.sum = to.scale + a.m * to.padded;
  to.fine = (uint8_t*)(to.sum + a.m * to.padded);
  to.finite = true;
  with_type(a.xt, [&](auto t) {
    for (int64_t m = 0; m < a.m; ++m) quantise_row<decltype(t)>(a, m, to, line, &to.finite);
  });
  return to;
}

// Whether scales of type T are mxfp4's, which has no shifts: they follow from the scales.
template <class T>
constexpr bool is_fp4() {
  return sizeof(typename T::S) == 1;
}

#if RUNNER_ISA == 512

template <class T>
RUNNER_INLINE VF load_some(const typename T::S* p, int64_t n) {
  if constexpr (sizeof(typename T::S) == 4) {
    return _mm512_maskz_loadu_ps((__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1), p);
  } else if constexpr (sizeof(typename T::S) == 1) {
    typename T::S part[16] = {};
    for (int64_t i = 0; i < 16 && i < n; ++i) part[i] = p[i];
    return T::load_v(part);
  } else {
    if (n >= 16) return T::load_v(p);
    alignas(32) uint16_t part[16];
    _mm256_store_si256((__m256i*)part, _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
    return T::load_v(part);
  }
}

// R rows of weights against M rows of x.
template <int BITS, int G, class T, int R, int M>
RUNNER_INLINE void quant_rows(const LinearArgs& a, const QuantX& x, int64_t n, int64_t, int64_t m0, float out[R][M]) {
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
      VF sw = load_some<T>(scales + r * groups + g, groups - g), bw;
      if constexpr (is_fp4<T>()) {
        sw = sw * set1(0.5f);
        bw = sw * set1(-kFp4Zero);
      } else {
        bw = load_some<T>(shifts + r * groups + g, groups - g);
      }
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
          if constexpr (is_fp4<T>()) {
            const __m512i value = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kFp4));
            w0[r] = _mm512_shuffle_epi8(value, w0[r]);
            w1[r] = _mm512_shuffle_epi8(value, w1[r]);
          }
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

// 32 bytes of weights as the operands of half_product: nibbles, or bytes in 16-bit lanes, of even and of odd places.
template <int BITS, class T>
RUNNER_INLINE void even_odd(__m256i w, __m256i* even, __m256i* odd) {
  if constexpr (BITS == 4) {
    const __m256i nibble = _mm256_set1_epi8(15);
    *even = _mm256_and_si256(w, nibble);
    *odd = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
    if constexpr (is_fp4<T>()) {
      const __m256i value = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kFp4));
      *even = _mm256_shuffle_epi8(value, *even);
      *odd = _mm256_shuffle_epi8(value, *odd);
    }
  } else {
    *even = _mm256_and_si256(w, _mm256_set1_epi16(255));
    *odd = _mm256_srli_epi16(w, 8);
  }
}

// Products of those operands with half a chunk of x: sums of q (65536 high + 256 mid + low) per lane of 4 bytes, or of
// q (256 high + mid) where it is not fine.
template <int BITS>
RUNNER_INLINE VF half_product(__m256i even, __m256i odd, const int8_t* p, bool fine) {
  auto x = [&](int at) { return _mm256_loadu_si256((const __m256i*)(p + at)); };
  if constexpr (BITS == 4) {
    const __m256i one = _mm256_set1_epi16(1), byte = _mm256_set1_epi16(256);
    auto both = [&](int at) {
      return _mm256_add_epi16(_mm256_maddubs_epi16(even, x(at)), _mm256_maddubs_epi16(odd, x(at + 64)));
    };
    __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(both(0), byte), _mm256_madd_epi16(both(128), one));
    if (!fine) return _mm256_cvtepi32_ps(upper);
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(upper, 8), _mm256_madd_epi16(both(256), one)));
  } else {  // eight bits times 24 do not fit 32
    auto both = [&](int at) {
      return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(even, x(at)), _mm256_madd_epi16(odd, x(at + 32))));
    };
    VF upper = both(0);
    return fine ? fma(upper, set1(256.0f), both(64)) : upper;
  }
}

// The last chunk of the last row, with zeros after it.
inline const uint8_t* padded_chunk(const uint8_t* from, int64_t bytes, uint8_t* to) {
  memset(to, 0, 64);
  memcpy(to, from, (size_t)bytes);
  return to;
}

// The first `count` values from p on, zeros after them.
template <class T>
RUNNER_INLINE VF load_some(const typename T::S* p, int64_t count) {
  alignas(32) typename T::S part[W] = {};
  for (int64_t i = 0; i < W && i < count; ++i) part[i] = p[i];
  return T::load_v(part);
}

// R rows of weights against M rows of x. Whole vectors are read past the end of a row, which meets zeros of x; the last
// row of the matrix is for R = 1, which reads no further.
template <int BITS, int G, class T, int R, int M>
RUNNER_INLINE void quant_rows(const LinearArgs& a, const QuantX& x, int64_t n, int64_t rows, int64_t m0,
                              float out[R][M]) {
  constexpr int kHalf = BITS == 4 ? 64 : 32;  // values of half a chunk, 32 bytes of weights
  constexpr int kHalves = W * G / kHalf;      // half chunks of W groups, an even number
  constexpr int kPiece = BITS == 4 ? 32 : 128;  // from the first half of a chunk of x to the second
  const int64_t groups = a.k / G, row_bytes = a.k * BITS / 8;
  const uint8_t* w = (const uint8_t*)a.w + n * row_bytes;
  const int8_t* q = x.q + m0 * x.stride;
  const float *sx = x.scale + m0 * x.padded, *xs = x.sum + m0 * x.padded;
  const auto* scales = (const typename T::S*)a.scales + n * groups;
  const auto* shifts = (const typename T::S*)a.shifts + n * groups;
  const __m256i second = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);  // lanes of the second group, where two meet
  alignas(32) static constexpr int32_t mask[2 * W] = {-1, -1, -1, -1, -1, -1, -1, -1};
  prefetch((const char*)scales + kAhead / 8);
  prefetch((const char*)shifts + kAhead / 8);
  VF acc[R][M], s[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[r][m] = zero();
  }
  // Half a chunk at p against 32 bytes at `from`; `h` is its number among those of W groups.
  auto half = [&](const uint8_t* from, const int8_t* p, const uint8_t* fine, int h, int r)
                  __attribute__((always_inline)) {
    __m256i even, odd, index = _mm256_set1_epi32(h * kHalf / G);
    if constexpr (kHalf > G) index = _mm256_add_epi32(index, second);
    even_odd<BITS, T>(_mm256_loadu_si256((const __m256i*)from), &even, &odd);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      VF whole = half_product<BITS>(even, odd, p + m * x.stride, fine[2 * m * x.chunks]);
      acc[r][m] = fma(whole, _mm256_permutevar8x32_ps(s[r][m], index), acc[r][m]);
    }
  };
  const int64_t chunks = x.chunks, near = rows * row_bytes - 64;  // `near`: last place from which 64 bytes may be read
  for (int64_t g = 0, line = 0; g < groups; g += W) {
    const VF some = load((const float*)mask + (groups - g < W ? W - (groups - g) : 0));
    const bool whole = R > 1 || rows * groups - g >= W;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto* sp = scales + r * groups + g;
      [[maybe_unused]] const auto* bp = shifts + r * groups + g;
      VF sw = _mm256_and_ps(whole ? T::load_v(sp) : load_some<T>(sp, groups - g), some), bw;
      if constexpr (is_fp4<T>()) {
        sw = sw * set1(0.5f);
        bw = sw * set1(-kFp4Zero);
      } else {
        bw = _mm256_and_ps(whole ? T::load_v(bp) : load_some<T>(bp, groups - g), some);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        s[r][m] = sw * load(sx + m * x.padded + g);
        acc[r][m] = fma(bw, load(xs + m * x.padded + g), acc[r][m]);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < kHalves && line < chunks; h += 2, ++line) {
      const int8_t* p = q + line * (BITS == 4 ? 384 : 256);
      const uint8_t* fine = x.fine + 2 * (m0 * x.chunks + line);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int64_t at = r * row_bytes + line * 64;
        const uint8_t* from = w + at;
        alignas(32) uint8_t part[64];
        if (R == 1 && at > near) from = padded_chunk(from, near + 64 - at, part);
        prefetch(ahead<R>(w, row_bytes, r, line));
        half(from, p, fine, h, r);
        half(from + 32, p + kPiece, fine + 1, h + 1, r);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[r][m] = hsum(acc[r][m]);
  }
}
constexpr int kQuantRows = W, kQuantM = 2;

// Constants of half_sums, which the compiler would otherwise build anew at each use.
struct HalfConstants {
  __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), byte = _mm256_set1_epi16(256);
  RUNNER_INLINE HalfConstants() { asm("" : "+x"(nibble), "+x"(one), "+x"(byte)); }
};

// 32 bytes of weights against half a chunk at p that is not fine: sums of q (256 high + mid), as half_product's.
template <int BITS, class T>
RUNNER_INLINE __m256i half_sums(const HalfConstants& c, const uint8_t* from, const int8_t* p) {
  auto x = [&](int at) { return _mm256_load_si256((const __m256i*)(p + at)); };
  __m256i w = _mm256_loadu_si256((const __m256i*)from);
  asm("" : "+x"(w));  // loaded once: two loads a cycle are what this waits for
  if constexpr (BITS == 4) {
    __m256i even = _mm256_and_si256(w, c.nibble), odd = _mm256_and_si256(_mm256_srli_epi16(w, 4), c.nibble);
    if constexpr (is_fp4<T>()) {
      const __m256i value = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kFp4));
      even = _mm256_shuffle_epi8(value, even);
      odd = _mm256_shuffle_epi8(value, odd);
    }
    __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(even, x(0)), _mm256_maddubs_epi16(odd, x(64)));
    __m256i mid = _mm256_add_epi16(_mm256_maddubs_epi16(even, x(128)), _mm256_maddubs_epi16(odd, x(192)));
    return _mm256_add_epi32(_mm256_madd_epi16(high, c.byte), _mm256_madd_epi16(mid, c.one));
  } else {
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    return _mm256_add_epi32(_mm256_madd_epi16(even, x(0)), _mm256_madd_epi16(odd, x(32)));
  }
}

// Lane i of the lower half: the sum over the lower half of u[i]; of the upper half likewise.
RUNNER_INLINE __m256i sums_by_half(const __m256i u[4]) {
  __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(u[0], u[1]), _mm256_unpackhi_epi32(u[0], u[1]));
  __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(u[2], u[3]), _mm256_unpackhi_epi32(u[2], u[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// W rows of weights from n on against one row of x: results [n, n + W). Four halves of chunks meet their scales at once.
// Up to 32 bytes and W scales past the last of the rows are read.
template <int BITS, int G, class T>
RUNNER_INLINE VF quant_block(const LinearArgs& a, const QuantX& x, int64_t n) {
  constexpr int kHalf = BITS == 4 ? 64 : 32;    // values of half a chunk, 32 bytes of weights
  constexpr int kPiece = BITS == 4 ? 32 : 128;  // from the first half of a chunk of x to the second
  constexpr int kChunk = BITS == 4 ? 384 : 256;
  constexpr int kFours = W * G / (4 * kHalf);   // fours of halves that W groups are
  const int64_t groups = a.k / G, row_bytes = a.k * BITS / 8, halves = (a.k + kHalf - 1) / kHalf;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), low = _mm256_and_si256(lane, _mm256_set1_epi32(3));
  // Lanes of W scales that lanes of sums_by_half belong to.
  const __m256i at = kHalf > G ? _mm256_add_epi32(_mm256_add_epi32(low, low), _mm256_srli_epi32(lane, 2))
                               : _mm256_srli_epi32(low, G / kHalf == 4 ? 2 : G / kHalf == 2 ? 1 : 0);
  alignas(32) static constexpr int32_t mask[2 * W] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const uint8_t* w = (const uint8_t*)a.w + n * row_bytes;
  const auto* scales = (const typename T::S*)a.scales + n * groups;
  [[maybe_unused]] const auto* shifts = (const typename T::S*)a.shifts + n * groups;
  const int8_t* const xq = x.q;
  const uint8_t* const xfine = x.fine;
  const float *const xscale = x.scale, *const xsum = x.sum;
  const HalfConstants c;
  VF out[W];
  for (int r = 0; r < W; ++r) {
    VF acc = zero(), s = zero();
    prefetch((const char*)scales + kAhead / 8);
    prefetch((const char*)shifts + kAhead / 8);
    // W scales and shifts, of which `some` belong to the row: what follows it may be NaN.
    auto load_scales = [&](int64_t g, auto all) __attribute__((always_inline)) {
      s = T::load_v(scales + g);
      VF shift;
      if constexpr (is_fp4<T>()) {
        s = s * set1(0.5f);
        shift = s * set1(-kFp4Zero);
      } else {
        shift = T::load_v(shifts + g);
      }
      if constexpr (!decltype(all)::value) {
        const VF some = load((const float*)mask + W - (groups - g));
        s = _mm256_and_ps(s, some);
        shift = _mm256_and_ps(shift, some);
      }
      s = s * load(xscale + g);
      acc = fma(shift, load(xsum + g), acc);
    };
    // Half a chunk, `h` of the row and `i` of those that s has the scales of.
    auto one = [&](int64_t h, int i) __attribute__((always_inline)) {
      const uint8_t* from = w + 32 * h;
      const int8_t* p = xq + h / 2 * kChunk + h % 2 * kPiece;
      __m256i index = _mm256_set1_epi32(i * kHalf / G);
      if (kHalf > G) index = _mm256_add_epi32(index, _mm256_srli_epi32(lane, 2));
      VF whole;
      if (xfine[h]) {
        __m256i even, odd;
        even_odd<BITS, T>(_mm256_loadu_si256((const __m256i*)from), &even, &odd);
        whole = half_product<BITS>(even, odd, p, true);
      } else {
        whole = _mm256_cvtepi32_ps(half_sums<BITS, T>(c, from, p));
      }
      acc = fma(whole, _mm256_permutevar8x32_ps(s, index), acc);
    };
    int64_t h = 0;
    for (; h + 4 * kFours <= halves && h * kHalf / G + W <= groups; h += 4 * kFours) {
      load_scales(h * kHalf / G, Int<1>{});
#pragma GCC unroll 2
      for (int part = 0; part < kFours; ++part) {
        const uint8_t* from = w + 32 * (h + 4 * part);
        const int8_t* p = xq + (h / 2 + 2 * part) * kChunk;
        prefetch(from + kAhead);
        prefetch(from + kAhead + 64);
        uint32_t fine = 0;
        memcpy(&fine, xfine + h + 4 * part, 4);
        if (fine == 0) [[likely]] {
          const __m256i u[4] = {half_sums<BITS, T>(c, from, p), half_sums<BITS, T>(c, from + 32, p + kPiece),
                                half_sums<BITS, T>(c, from + 64, p + kChunk),
                                half_sums<BITS, T>(c, from + 96, p + kChunk + kPiece)};
          const __m256i index = _mm256_add_epi32(at, _mm256_set1_epi32(part * 4 * kHalf / G));
          acc = fma(_mm256_cvtepi32_ps(sums_by_half(u)), _mm256_permutevar8x32_ps(s, index), acc);
        } else {
          for (int i = 4 * part; i < 4 * part + 4; ++i) one(h + i, i);
        }
      }
    }
    if (h < halves) load_scales(h * kHalf / G, Int<0>{});
    for (int i = 0; h < halves; ++h, ++i) one(h, i);
    out[r] = acc;
    w += row_bytes, scales += groups, shifts += groups;
  }
  return sums(out);
}

#endif

[[maybe_unused]] constexpr int64_t kLongRow = 512;  // bytes from which one row alone is long enough a stream

// Rows [n, end) of w, which holds `all` rows.
template <int BITS, int G, class T>
void quant_gemv_rows(const LinearArgs& a, const QuantX& x, int64_t n, int64_t end, int64_t all) {
  auto rows = [&](auto count, auto ms, int64_t m) {
    constexpr int R = decltype(count)::value, M = decltype(ms)::value;
    float out[R][M];
    quant_rows<BITS, G, T, R, M>(a, x, n, all - n, m, out);
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) store_out(a, m + j, n + r, out[r][j]);
    }
  };
  const int64_t many = all - 8 < end ? all - 8 : end;  // eight more rows are enough to read past the end of one
  if (a.m == 1) {
#if RUNNER_ISA == 2
    for (; n + W <= many; n += W) store_outs(a, n, quant_block<BITS, G, T>(a, x, n));
#else
    if (a.k * BITS / 8 <= kLongRow) {
      for (; n + kQuantRows <= many; n += kQuantRows) rows(Int<kQuantRows>{}, Int<1>{}, 0);
    }
#endif
    for (; n < end; ++n) rows(Int<1>{}, Int<1>{}, 0);
    return;
  }
  auto all_rows_of_x = [&](auto count) {
    int64_t m = 0;
    for (; m + kQuantM <= a.m; m += kQuantM) rows(count, Int<kQuantM>{}, m);
    for (; m < a.m; ++m) rows(count, Int<1>{}, m);
  };
  for (; n + 2 <= many; n += 2) all_rows_of_x(Int<2>{});
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
  uint8_t* bytes = (uint8_t*)scratch(Slot::tile, rows * a.k + 64);  // vectors are read past the end
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
          constexpr int B = decltype(bits)::value, G = decltype(group)::value;
          quant_gemv_rows<B, G, decltype(t)>(widened(a, n, rows), x, 0, rows, a.n - n);
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
  auto run = [&](auto bits, auto group, auto t) {
    Pool::get().parallel_for((int)((a.n + per - 1) / per), [&](int chunk) {
      int64_t n = chunk * per, end = n + per < a.n ? n + per : a.n;
      quant_gemv_rows<decltype(bits)::value, decltype(group)::value, decltype(t)>(a, x, n, end, a.n);
    });
  };
  if (a.format == Format::mxfp4) {
    run(Int<4>{}, Int<32>{}, E8M0{});
  } else {
    with_layout(a, [&](auto bits, auto group) { with_type(a.st, [&](auto t) { run(bits, group, t); }); });
  }
  return true;
}
