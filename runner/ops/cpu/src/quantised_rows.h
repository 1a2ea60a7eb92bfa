// Products of packed weights with one row of x or two: four rows of the matrix after the other, read as they lie. Included
// inside an x86 ISA namespace, after quantised_tiles.h, whose definition of a result this has too.

// Lanes that the values of a group take in vectors of weights, and vectors where it is more than a vector's lanes.
template <int BITS, int G>
struct Layout {
  static constexpr int kLaneValues = BITS == 4 ? 8 : 4;
  static constexpr int kGroupVectors = G / kLaneValues > W ? G / kLaneValues / W : 1;
  static constexpr int kGroupLanes = G / kLaneValues / kGroupVectors;
};

// Sums over each four lanes of four vectors; lane 4 i + j of the result is that of lanes 4 i to 4 i + 3 of v[j].
RUNNER_INLINE VI32 sums_of_four(const VI32 v[4]) {
#if RUNNER_ISA == 512
  VI32 a = plus(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  VI32 b = plus(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  return plus(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
#else
  VI32 a = plus(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
  VI32 b = plus(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
  return plus(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
#endif
}

// Four rows' sums of four groups each are kSumVectors vectors: lane 4 i + j of them is group i of row j.
constexpr int kSumVectors = 16 / W;

#if RUNNER_ISA == 512
// [a0 + a1 | a2 + a3 | b0 + b1 | b2 + b3], of quarters
RUNNER_INLINE VI32 half_sums(VI32 a, VI32 b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
#endif

// They are made of parts[l] = sums_of_four of the l-th vectors of lanes of four rows, a group having L lanes.
template <int L>
RUNNER_INLINE void group_sums(const VI32 parts[L * 4 / W], VI32 sums[kSumVectors]) {
#if RUNNER_ISA == 512
  if constexpr (L == 4) {
    sums[0] = parts[0];
  } else if constexpr (L == 8) {
    sums[0] = half_sums(parts[0], parts[1]);
  } else {
    static_assert(L == 16);
    sums[0] = half_sums(half_sums(parts[0], parts[1]), half_sums(parts[2], parts[3]));
  }
#else
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    if constexpr (L == 4) {
      sums[i] = parts[i];
    } else {
      static_assert(L == 8);
      const VI32 a = parts[2 * i], b = parts[2 * i + 1];
      sums[i] = plus(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }
  }
#endif
}

// The sums of four rows from their running sums, whose lanes are as above: (s[0] + s[2]) + (s[1] + s[3]).
RUNNER_INLINE __m128 running_total(const VF acc[kSumVectors]) {
#if RUNNER_ISA == 512
  __m128 s0 = _mm512_castps512_ps128(acc[0]), s1 = _mm512_extractf32x4_ps(acc[0], 1);
  __m128 s2 = _mm512_extractf32x4_ps(acc[0], 2), s3 = _mm512_extractf32x4_ps(acc[0], 3);
#else
  __m128 s0 = _mm256_castps256_ps128(acc[0]), s1 = _mm256_extractf128_ps(acc[0], 1);
  __m128 s2 = _mm256_castps256_ps128(acc[1]), s3 = _mm256_extractf128_ps(acc[1], 1);
#endif
  return _mm_add_ps(_mm_add_ps(s0, s2), _mm_add_ps(s1, s3));
}

// Numbers [i, i + 4) of four rows, lane 4 g + j number i + g of row j; past `count` of them there are zeros. With `careful`
// nothing is read there.
template <class T>
RUNNER_INLINE void four_by_four(const void* const rows[4], int64_t i, int64_t count, bool careful, VF to[kSumVectors]) {
  using S = typename T::S;
  S some[4][4];
  const S* p[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    p[j] = (const S*)rows[j] + i;
    if (__builtin_expect(careful, 0) && count < 4) {
      for (int k = 0; k < 4; ++k) some[j][k] = k < count ? p[j][k] : (S)0;
      p[j] = some[j];
    }
  }
  if constexpr (sizeof(S) == 2) {
#if RUNNER_ISA == 512
    auto pair = [](const S* low, const S* high) {
      return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)low), _mm_loadl_epi64((const __m128i*)high));
    };
    __m256i rows_of_four = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(p[0], p[1])), pair(p[2], p[3]), 1);
    const __m256i turned = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i all = _mm256_permutexvar_epi16(turned, rows_of_four);
    to[0] = T::load_v((const uint16_t*)&all);
#else
    __m128i a = _mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p[0]), _mm_loadl_epi64((const __m128i*)p[1]));
    __m128i b = _mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p[2]), _mm_loadl_epi64((const __m128i*)p[3]));
    __m128i low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
    to[0] = T::load_v((const uint16_t*)&low);
    to[1] = T::load_v((const uint16_t*)&high);
#endif
  } else {
    alignas(64) float all[16];
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 4; ++k) all[4 * k + j] = T::to(p[j][k]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kSumVectors; ++v) to[v] = load(all + v * W);
  }
  if (count < 4) {
#if RUNNER_ISA == 512
    to[0] = _mm512_maskz_mov_ps((__mmask16)((1u << 4 * count) - 1), to[0]);
#else
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int v = 0; v < 2; ++v) {
      to[v] = _mm256_and_ps(to[v], _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)(4 * count - 8 * v)), lane)));
    }
#endif
  }
}

template <bool FP4>
RUNNER_INLINE void scales_of(DType t, const void* const rows[4], int64_t i, int64_t count, bool careful, VF to[kSumVectors]) {
  if constexpr (FP4) return four_by_four<E8M0>(rows, i, count, careful, to);
  if (t == DType::bf16) return four_by_four<BF16>(rows, i, count, careful, to);
  if (t == DType::f16) return four_by_four<F16>(rows, i, count, careful, to);
  four_by_four<F32>(rows, i, count, careful, to);
}

// Four rows of the matrix against M rows of x: w[j] are the rows' codes, of which whole vectors can be read, or the
// first `left` bytes of each. P: planes of x that there are products with; one where it is coarse.
// ONCE: the matrix is larger than the caches, so that nothing of it is kept there until the next token.
template <int BITS, int G, bool FP4, int M, int P, bool NEAR_END, bool ONCE>
RUNNER_INLINE void four_rows(const LinearArgs& a, const Panel& x, bool any_fine, const uint8_t* const w[4], int64_t left,
                             const void* const scales[4], const void* const shifts[4], int64_t ahead,
                             __m128 out[M]) {
  using L = Layout<BITS, G>;
  constexpr int U = L::kGroupVectors, S = kLaneSteps<BITS>, V = L::kGroupLanes * 4 / W;
  const int64_t groups = a.k / G, row_bytes = a.k * BITS / 8, length = (kPlanes + 1) * x.steps;
  VF acc[M][kSumVectors];
#pragma GCC unroll 2
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int k = 0; k < kSumVectors; ++k) acc[m][k] = zero();
  }
  for (int64_t g = 0, c = 0; g < groups; g += 4, c += V * U * kVectorBytes) {
    // Sums over `planes` of x's planes, from the first one on.
    auto sums_over = [&](int64_t first, auto planes, VI32 sums[M][kSumVectors]) {
      VI32 parts[M][V];
#pragma GCC unroll 4
      for (int l = 0; l < V; ++l) {
        const int64_t at = c + l * U * kVectorBytes;
        if (l && at >= row_bytes) {  // there are not four more groups
#pragma GCC unroll 2
          for (int m = 0; m < M; ++m) parts[m][l] = no_sum();
          continue;
        }
        VI32 v[M][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          VI32 wv[U][S];
#pragma GCC unroll 2
          for (int u = 0; u < U; ++u) {
            const uint8_t* from = w[j] + at + u * kVectorBytes;
            if (kVectorBytes == 64 || (l * U + u) % 2 == 0) {
              if constexpr (ONCE) {
                prefetch_once(from + ahead);
              } else {
                prefetch(from + ahead);
              }
            }
            if (NEAR_END && at + (u + 1) * kVectorBytes > left) {
              alignas(64) uint8_t some[kVectorBytes] = {};
              for (int64_t i = 0; i < left - at - u * kVectorBytes; ++i) some[i] = from[i];
              spread<BITS, FP4>(as_integers(load((const float*)some)), wv[u]);
            } else {
              spread<BITS, FP4>(as_integers(load((const float*)from)), wv[u]);
            }
          }
#pragma GCC unroll 2
          for (int m = 0; m < M; ++m) {
            const int32_t* q = x.q + m * length + first * x.steps + at / 4 * S;
            VI32 sum = no_sum();
#pragma GCC unroll 2
            for (int p = 0; p < decltype(planes)::value; ++p) {
              if (p) sum = next_plane(sum);
#pragma GCC unroll 8
              for (int i = 0; i < U * S; ++i) {
                sum = multiply_add(sum, wv[i / S][i % S], as_integers(load((const float*)(q + p * x.steps + i * W))));
              }
            }
            v[m][j] = sum;
          }
        }
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) parts[m][l] = sums_of_four(v[m]);
      }
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) group_sums<L::kGroupLanes>(parts[m], sums[m]);
    };
    VI32 sums[M][kSumVectors], rests[M][kSumVectors];
    sums_over(0, Int<P>{}, sums);
    const bool fine = any_fine && (x.fine[g] | x.fine[g + 1] | x.fine[g + 2] | x.fine[g + 3]);
    if (__builtin_expect(fine, 0)) sums_over(kPlanes, Int<1>{}, rests);
    VF scale[kSumVectors], shift[kSumVectors];
    scales_of<FP4>(a.st, scales, g, groups - g, NEAR_END, scale);
    if constexpr (!FP4) scales_of<false>(a.st, shifts, g, groups - g, NEAR_END, shift);
#pragma GCC unroll 2
    for (int k = 0; k < kSumVectors; ++k) {
      if constexpr (FP4) {
        shift[k] = scale[k] * set1(-0.5f * kFp4Zero);
        scale[k] = scale[k] * set1(0.5f);
      }
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) {
        const int64_t at = (m * x.groups + g) * kRowsEach + k * W;
        VF sx = load(x.scale + at), sum = load(x.sum + at);
        acc[m][k] = fma(as_float(sums[m][k]), scale[k] * sx, fma(shift[k], sum, acc[m][k]));
        if (__builtin_expect(fine, 0)) {
          acc[m][k] = fma(as_float(rests[m][k]), scale[k] * (sx * set1(1.0f / 256.0f)), acc[m][k]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < M; ++m) out[m] = running_total(acc[m]);
}

constexpr int64_t kSmallMatrix = 500000;  // bytes

// Rows [n, end) of the matrix against the M rows of a panel.
template <int BITS, int G, bool FP4, int M, int P>
void rows_dots(const LinearArgs& args, const Panel& panel, int64_t n, int64_t end) {
  // Copies: what is stored below could change the arguments, for all that the compiler knows.
  const LinearArgs a = args;
  const Panel x = panel;
  const bool any_fine = x.fine[x.groups];
  const int64_t row_bytes = a.k * a.bits / 8, numbers = a.k / G * (FP4 ? 1 : size_of(a.st));
  uint8_t* codes = a.bits == BITS ? nullptr : (uint8_t*)scratch(Slot::codes, 4 * a.k + 64);
  // Four short rows lie one behind the other, long ones are a stream each. At its end a matrix wastes what it asked for.
  const bool small = a.n * row_bytes < kSmallMatrix;
  const int64_t distance = small ? kAhead : 2 * kAhead;
  const int64_t ahead = 4 * row_bytes <= 2 * distance ? distance : distance / 4;
  const int64_t further = (ahead / row_bytes + 16) * numbers;
  for (; n < end; n += 4) {
    const uint8_t* w[4];
    const void *scales[4], *shifts[4];
    const int last = (int)(end - n < 4 ? end - n : 4) - 1;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t row = n + (j < last ? j : last);
      w[j] = (const uint8_t*)a.w + row * row_bytes;
      scales[j] = (const char*)a.scales + row * numbers;
      shifts[j] = FP4 ? nullptr : (const char*)a.shifts + row * numbers;
      if (codes) {
        codes_to_bytes(w[j], a.bits, a.k, codes + j * a.k);
        w[j] = codes + j * a.k;
      }
    }
    // Scales are streams beside that of the codes, and too slow for the hardware to be ahead of.
    for (int64_t i = 0; i < 4 * numbers; i += 64) {
      prefetch((const char*)scales[0] + further + i);
      if (!FP4) prefetch((const char*)shifts[0] + further + i);
    }
    // Past the end of one row there are others, but for the last ones.
    const int64_t behind = a.n - n - 4;
    const bool near_end = behind * row_bytes < 64 || behind * numbers < 16;
    __m128 out[M];
    if (near_end) {
      const int64_t left = codes ? INT64_MAX : row_bytes;
      four_rows<BITS, G, FP4, M, P, true, false>(a, x, any_fine, w, left, scales, shifts, ahead, out);
    } else if (small) {
      four_rows<BITS, G, FP4, M, P, false, false>(a, x, any_fine, w, 0, scales, shifts, ahead, out);
    } else {
      four_rows<BITS, G, FP4, M, P, false, true>(a, x, any_fine, w, 0, scales, shifts, ahead, out);
    }
    alignas(16) float line[4];
    for (int m = 0; m < M; ++m) {
      _mm_store_ps(line, out[m]);
      for (int j = 0; j <= last; ++j) line[j] += bias_at(a, n + j);
      with_type(a.xt, [&](auto type) {
        using O = decltype(type);
        for (int j = 0; j <= last; ++j) ((typename O::S*)a.out)[m * a.n + n + j] = O::from(line[j]);
      });
    }
  }
}

template <int M, int P = kPlanes>
RUNNER_INLINE void rows_dots(const LinearArgs& a, const Panel& x, int64_t n, int64_t end) {
  if constexpr (P > 1) {
    if (x.coarse) return rows_dots<M, 1>(a, x, n, end);
  }
  if (a.format == Format::mxfp4) return rows_dots<4, 32, true, M, P>(a, x, n, end);
  auto of_group = [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    if (a.group == 32) return rows_dots<B, 32, false, M, P>(a, x, n, end);
    if (a.group == 64) return rows_dots<B, 64, false, M, P>(a, x, n, end);
    rows_dots<B, 128, false, M, P>(a, x, n, end);
  };
  if (a.bits == 4) return of_group(Int<4>{});
  of_group(Int<8>{});
}
