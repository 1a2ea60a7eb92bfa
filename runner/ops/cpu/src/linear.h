// Float linear layers: row by row for few rows of x, packed panels for more. Included inside an
// ISA namespace. Weights become float32 a tile at a time; nothing of the size of the weights is ever allocated.

constexpr int kFewRows = RUNNER_ISA == 2 ? 8 : 16;  // up to here each weight is read once, for all rows of x in registers
constexpr int kTileRows = 48;   // rows of w in a tile
constexpr int kTileDepth = 512;
constexpr int kTileCols = 64;   // rows of x of a tile
constexpr int64_t kChunkBytes = 16 << 10;  // weight bytes below which a piece is not worth its claim

// Pieces for n rows of `row_bytes` each; depends on the shape alone, so results do not depend on the thread count.
RUNNER_INLINE int64_t rows_per_chunk(int64_t n, int64_t row_bytes, int64_t multiple) {
  int64_t rows = kChunkBytes / (row_bytes + 1) + 1;
  int64_t most = (n + 63) / 64;  // 64 pieces share the work well enough
  rows = rows > most ? rows : most;
  return (rows + multiple - 1) / multiple * multiple;
}

RUNNER_INLINE float bias_at(const LinearArgs& a, int64_t n) { return a.bias ? load_one(a.bias, a.bt, n) : 0.0f; }

RUNNER_INLINE int64_t groups_of(const LinearArgs& a) { return a.k / a.group; }

// Eight codes of BITS bits, the lowest bits first, as bytes: a word whose halves are drawn apart three times, to 32 bits,
// 16 and 8 for each code.
template <int BITS>
RUNNER_INLINE void eight_codes(const uint8_t* from, uint8_t* to) {
  constexpr uint64_t four = (1ull << (4 * BITS)) - 1;
  constexpr uint64_t two = ((1ull << (2 * BITS)) - 1) * 0x0000000100000001ull;
  constexpr uint64_t one = ((1ull << BITS) - 1) * 0x0001000100010001ull;
  uint64_t word = 0;
  memcpy(&word, from, BITS);
  word = (word & four) | (word << (32 - 4 * BITS) & four << 32);
  word = (word & two) | (word << (16 - 2 * BITS) & two << 16);
  word = (word & one) | (word << (8 - BITS) & one << 8);
  memcpy(to, &word, 8);
}

#if RUNNER_ISA > 0
// Sixteen codes as 16-bit lanes, their low bytes: the two bytes that hold code i, times a power of two that moves it to
// the upper byte.
template <int BITS>
struct Spread {
  alignas(32) uint8_t byte[32];
  alignas(32) uint16_t times[16];
  constexpr Spread() : byte{}, times{} {
    for (int i = 0; i < 16; ++i) {
      byte[2 * i] = (uint8_t)(i * BITS / 8);
      byte[2 * i + 1] = (uint8_t)(i * BITS / 8 + 1);
      times[i] = (uint16_t)(1 << (8 - i * BITS % 8));
    }
  }
};

template <int BITS>
RUNNER_INLINE __m256i sixteen_codes(const uint8_t* from) {
  static constexpr Spread<BITS> spread;
  __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
  __m256i words = _mm256_shuffle_epi8(both, _mm256_load_si256((const __m256i*)spread.byte));
  return _mm256_srli_epi16(_mm256_mullo_epi16(words, _mm256_load_si256((const __m256i*)spread.times)), 8);
}
#endif

// `count` codes of BITS bits as bytes; count is a multiple of 8.
template <int BITS>
RUNNER_INLINE void codes_to_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
  const uint8_t* end = to + count;
#if RUNNER_ISA > 0
  const uint8_t* last = from + count * BITS / 8 - (16 + 2 * BITS);  // 32 codes are read as two times 16 bytes
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
  for (; from <= last; from += 4 * BITS, to += 32) {
    __m256i codes = _mm256_packus_epi16(sixteen_codes<BITS>(from), sixteen_codes<BITS>(from + 2 * BITS));
    _mm256_storeu_si256((__m256i*)to, _mm256_and_si256(_mm256_permute4x64_epi64(codes, 0xd8), mask));
  }
#endif
  for (; to < end; from += BITS, to += 8) eight_codes<BITS>(from, to);
}

// Nibbles as bytes; count is a multiple of 32.
RUNNER_INLINE void nibbles_to_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
#if RUNNER_ISA > 0
  const __m128i nibble = _mm_set1_epi8(15);
  for (const uint8_t* end = to + count; to < end; from += 16, to += 32) {
    __m128i both = _mm_loadu_si128((const __m128i*)from);
    __m128i even = _mm_and_si128(both, nibble), odd = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi8(even, odd));
  }
#else
  for (int64_t i = 0; i < count / 2; ++i) to[2 * i] = from[i] & 15, to[2 * i + 1] = from[i] >> 4;
#endif
}

inline void codes_to_bytes(const uint8_t* from, int bits, int64_t count, uint8_t* to) {
  if (bits == 4) return nibbles_to_bytes(from, count, to);
  if (bits == 2) return codes_to_bytes<2>(from, count, to);
  if (bits == 3) return codes_to_bytes<3>(from, count, to);
  if (bits == 5) return codes_to_bytes<5>(from, count, to);
  codes_to_bytes<6>(from, count, to);
}

// dst[0, count) = row n of w from column k0 on, dequantised; k0 is a multiple of the group.
template <class T>
void dequantise_row(const LinearArgs& a, int64_t n, int64_t k0, int64_t count, float* dst) {
  const uint8_t* q = (const uint8_t*)a.w + (n * a.k + k0) * a.bits / 8;
  const auto* s = (const typename T::S*)a.scales + n * groups_of(a) + k0 / a.group;
  const auto* b = (const typename T::S*)a.shifts + n * groups_of(a) + k0 / a.group;
  for (int64_t g = 0; g < count; g += a.group, ++s, ++b) {
    float scale = T::to(*s), shift = T::to(*b);
    uint8_t bytes[128];  // the largest group
    const uint8_t* code = q;
    if (a.bits != 8) {
      codes_to_bytes(q, a.bits, a.group, bytes);
      code = bytes;
    }
    for (int i = 0; i < a.group; i += W) store(dst + i, fma(load_u8(code + i), set1(scale), set1(shift)));
    q += a.group * a.bits / 8;
    dst += a.group;
  }
}

// Codes of e2m1 doubled are the integers 0 1 2 3 4 6 8 12 and their negatives: plus 12, bytes without a sign.
constexpr int kFp4Zero = 12;
alignas(16) constexpr uint8_t kFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Writes those bytes for `count` codes, a multiple of 16.
RUNNER_INLINE void fp4_to_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
#if RUNNER_ISA > 0
  const __m128i nibble = _mm_set1_epi8(15), value = _mm_load_si128((const __m128i*)kFp4);
  for (const uint8_t* end = to + count; to < end; from += 8, to += 16) {
    __m128i both = _mm_loadl_epi64((const __m128i*)from);
    __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(both, nibble), _mm_and_si128(_mm_srli_epi16(both, 4), nibble));
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(value, codes));
  }
#else
  for (int64_t i = 0; i < count / 2; ++i) to[2 * i] = kFp4[from[i] & 15], to[2 * i + 1] = kFp4[from[i] >> 4];
#endif
}

// As dequantise_row, for a layer of small floats: exact, as a code times a scale always fits float32.
inline void dequantise_floats(const LinearArgs& a, int64_t n, int64_t k0, int64_t count, float* dst) {
  const uint8_t* q = (const uint8_t*)a.w + (n * a.k + k0) * a.bits / 8;
  const uint8_t* s = (const uint8_t*)a.scales + n * groups_of(a) + k0 / a.group;
  for (int64_t g = 0; g < count; g += a.group, ++s, q += a.group * a.bits / 8, dst += a.group) {
    float scale = a.format == Format::nvfp4 ? e4m3_to_float(*s) : E8M0::to(*s);
    if (a.bits == 4) {
      uint8_t bytes[32];
      fp4_to_bytes(q, a.group, bytes);
      VF half = set1(0.5f * scale);
      for (int i = 0; i < a.group; i += W) store(dst + i, (load_u8(bytes + i) - set1(kFp4Zero)) * half);
    } else {
      for (int i = 0; i < a.group; ++i) dst[i] = e4m3_to_float(q[i]) * scale;
    }
  }
}

inline void weight_row(const LinearArgs& a, int64_t n, int64_t k0, int64_t count, float* dst) {
  if (a.format != Format::affine) {
    dequantise_floats(a, n, k0, count, dst);
  } else if (a.bits) {
    with_type(a.st, [&](auto t) { dequantise_row<decltype(t)>(a, n, k0, count, dst); });
  } else {
    with_type(a.wt, [&](auto t) {
      using T = decltype(t);
      to_float<T>((const typename T::S*)a.w + n * a.k + k0, dst, count);
    });
  }
}

// Where to prefetch while line `c` of row r (of R side by side) is read. The hardware follows one stream within a
// page, R rows at once defeat it. Short rows: the next rows follow in memory; long ones: each row is a stream.
constexpr int64_t kAhead = 8192;  // bytes in flight that hide a trip to memory at full bandwidth
template <int R>
RUNNER_INLINE const char* ahead(const void* w, int64_t row_bytes, int r, int64_t line) {
  if (R * row_bytes <= 2 * kAhead) return (const char*)w + (line * R + r) * 64 + kAhead;
  return (const char*)w + r * row_bytes + line * 64 + kAhead / R;
}

// A result is W sums that run beside each other, value k in sum k % W, and then `sums`: for any number of rows.
constexpr int kDotRows = 4;             // rows of w whose products are computed together,
constexpr int kDotColumns = W / 4;      // with so many rows of x

// acc[r * kDotColumns + m] += over k values of R rows of w and M of x, `ldw` and `ldx` apart.
template <class T, int R, int M>
RUNNER_INLINE void add_dots(const typename T::S* w, int64_t ldw, const float* x, int64_t ldx, int64_t k, bool far, VF acc[W]) {
  constexpr int64_t kItem = sizeof(typename T::S);
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    VF wv[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      wv[r] = T::load_v(w + r * ldw + i);
      if (far && i * kItem % 64 == 0) prefetch(ahead<R>(w, ldw * kItem, r, i * kItem / 64));
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      VF xv = load(x + m * ldx + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * kDotColumns + m] = fma(wv[r], xv, acc[r * kDotColumns + m]);
    }
  }
  if (i == k) return;
  alignas(64) float wt[R][W] = {}, xt[M][W] = {};  // zeros fill up the last values
  for (int64_t j = i; j < k; ++j) {
    for (int r = 0; r < R; ++r) wt[r][j - i] = T::to(w[r * ldw + j]);
    for (int m = 0; m < M; ++m) xt[m][j - i] = x[m * ldx + j];
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r * kDotColumns + m] = fma(load(wt[r]), load(xt[m]), acc[r * kDotColumns + m]);
  }
}

template <class T>
void store_out(const LinearArgs& a, int64_t m, int64_t n, float value) {
  ((typename T::S*)a.out)[m * a.n + n] = T::from(value);
}
RUNNER_INLINE void store_out(const LinearArgs& a, int64_t m, int64_t n, float value) {
  value += bias_at(a, n);
  with_type(a.xt, [&](auto t) { store_out<decltype(t)>(a, m, n, value); });
}

// Rows [n, n + R) of w against all of x: few rows, float32, contiguous.
template <class T, int R>
RUNNER_INLINE void few_rows(const LinearArgs& a, const typename T::S* w, const float* x, int64_t n, bool far) {
  int64_t m = 0;
  auto step = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (; m + M <= a.m; m += M) {
      VF acc[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) acc[i] = zero();
      add_dots<T, R, M>(w, a.k, x + m * a.k, a.k, a.k, far && m == 0, acc);
      alignas(64) float out[W];
      store(out, sums(acc));
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < M; ++j) store_out(a, m + j, n + r, out[r * kDotColumns + j]);
      }
    }
  };
  step(Int<kDotColumns>{});
  if (kDotColumns > 2) step(Int<2>{});
  if (kDotColumns > 1) step(Int<1>{});
}

// x as float32 rows: itself, or a converted copy in this thread's scratch.
inline const float* float_rows(const LinearArgs& a) {
  if (a.xt == DType::f32) return (const float*)a.x;
  float* x = (float*)scratch(Slot::row, a.m * a.k * 4);
  with_type(a.xt, [&](auto t) {
    using T = decltype(t);
    to_float<T>((const typename T::S*)a.x, x, a.m * a.k);
  });
  return x;
}

// Rows of w by the ids in x; a negative id counts from the end.
inline void embed(const LinearArgs& a) {
  constexpr int64_t kRowsEach = 16;
  Pool::get().parallel_for((int)((a.m + kRowsEach - 1) / kRowsEach), [&](int chunk) {
    float* row = (float*)scratch(Slot::row, a.k * 4);
    for (int64_t m = chunk * kRowsEach; m < a.m && m < (chunk + 1) * kRowsEach; ++m) {
      int64_t id = ((const int32_t*)a.x)[m];
      if (id < 0) id += a.n;
      if (id >= 0 && id < a.n) {
        weight_row(a, id, 0, a.k, row);
      } else {
        for (int64_t i = 0; i < a.k; ++i) row[i] = __builtin_nanf("");
      }
      with_type(a.xt, [&](auto t) {
        using T = decltype(t);
        from_float<T>(row, (typename T::S*)a.out + m * a.k, a.k);
      });
    }
  });
}

inline void gemv(const LinearArgs& a) {
  const float* x = float_rows(a);
  int64_t row_bytes = a.bits ? a.k * a.bits / 8 * 4 : a.k * size_of(a.wt);
  int64_t per = rows_per_chunk(a.n, row_bytes, 4);
  Pool::get().parallel_for((int)((a.n + per - 1) / per), [&](int chunk) {
    int64_t n = chunk * per, end = n + per < a.n ? n + per : a.n;
    if (a.bits) {
      float* w = (float*)scratch(Slot::tile, 4 * a.k * 4);
      auto rows = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; n + R <= end; n += R) {
          for (int r = 0; r < R; ++r) weight_row(a, n + r, 0, a.k, w + r * a.k);
          few_rows<F32, R>(a, w, x, n, false);
        }
      };
      rows(Int<4>{});
      rows(Int<1>{});
      return;
    }
    with_type(a.wt, [&](auto t) {
      using T = decltype(t);
      const auto* w = (const typename T::S*)a.w;
      for (; n + 4 <= end; n += 4) few_rows<T, 4>(a, w + n * a.k, x, n, true);
      for (; n < end; ++n) few_rows<T, 1>(a, w + n * a.k, x, n, true);
    });
  });
}

// Rows [n, n + rows) of w against rows [m, m + cols) of x, float32 at `x`. The sums of all of them, W each, wait for the
// next piece of k: so the weights are unpacked once for all the rows of a tile.
inline void dot_tile(const LinearArgs& a, const float* x, int64_t n, int64_t rows, int64_t m, int64_t cols) {
  float* t = (float*)scratch(Slot::partial, kTileRows * kTileCols * W * 4);
  float* w = (float*)scratch(Slot::tile, kTileRows * kTileDepth * 4);
  constexpr int64_t kBlock = W;  // vectors of sums of kDotRows rows and kDotColumns columns
  memset(t, 0, kTileRows * kTileCols * W * 4);
  for (int64_t k = 0; k < a.k; k += kTileDepth) {
    const int64_t depth = a.k - k < kTileDepth ? a.k - k : kTileDepth;
    for (int64_t r = 0; r < kTileRows; ++r) {  // what there is not repeats the last row, and is not stored
      weight_row(a, n + (r < rows ? r : rows - 1), k, depth, w + r * kTileDepth);
    }
    for (int64_t i = 0; i < cols; i += kDotColumns) {
      for (int64_t r = 0; r < rows; r += kDotRows) {
        float* at = t + (i / kDotColumns * (kTileRows / kDotRows) + r / kDotRows) * kBlock * W;
        VF acc[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) acc[j] = load(at + j * W);
        const float *wk = w + r * kTileDepth, *xk = x + (m + i) * a.k + k;
        if (i + kDotColumns <= cols) {
          add_dots<F32, kDotRows, kDotColumns>(wk, kTileDepth, xk, a.k, depth, false, acc);
        } else if constexpr (kDotColumns > 1) {
          for (int64_t j = 0; j < cols - i; ++j) {
            VF one[W];
#pragma GCC unroll 4
            for (int s = 0; s < kDotRows; ++s) one[s * kDotColumns] = load(at + (s * kDotColumns + j) * W);
            add_dots<F32, kDotRows, 1>(wk, kTileDepth, xk + j * a.k, a.k, depth, false, one);
#pragma GCC unroll 4
            for (int s = 0; s < kDotRows; ++s) store(at + (s * kDotColumns + j) * W, one[s * kDotColumns]);
          }
          continue;
        }
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) store(at + j * W, acc[j]);
      }
    }
  }
  for (int64_t i = 0; i < cols; ++i) {
    alignas(64) float line[kTileRows];
    for (int64_t r = 0; r < rows; r += kDotRows) {
      const float* at = t + (i / kDotColumns * (kTileRows / kDotRows) + r / kDotRows) * kBlock * W;
      VF acc[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) acc[j] = load(at + j * W);
      alignas(64) float out[W];
      store(out, sums(acc));
      for (int s = 0; s < kDotRows; ++s) line[r + s] = out[s * kDotColumns + i % kDotColumns];
    }
    for (int64_t r = 0; r < rows; ++r) line[r] += bias_at(a, n + r);
    with_type(a.xt, [&](auto type) {
      using T = decltype(type);
      from_float<T>(line, (typename T::S*)a.out + (m + i) * a.n + n, rows);
    });
  }
}

inline void gemm(const LinearArgs& a) {
  const float* x = (const float*)a.x;
  Pool& pool = Pool::get();
  if (a.xt != DType::f32) {
    float* copy = (float*)scratch(Slot::packed, a.m * a.k * 4);
    pool.parallel_for((int)a.m, [&](int m) {
      with_type(a.xt, [&](auto t) {
        using T = decltype(t);
        to_float<T>((const typename T::S*)a.x + m * a.k, copy + m * a.k, a.k);
      });
    });
    x = copy;
  }
  const int64_t across = (a.n + kTileRows - 1) / kTileRows, down = (a.m + kTileCols - 1) / kTileCols;
  pool.parallel_for((int)(across * down), [&](int i) {
    const int64_t n = i % across * kTileRows, m = i / across * kTileCols;
    dot_tile(a, x, n, a.n - n < kTileRows ? a.n - n : kTileRows, m, a.m - m < kTileCols ? a.m - m : kTileCols);
  });
}

constexpr int64_t kMostRows = 1024;  // of x at a time: bounds the packed copy

// The rows [first, first + count) of x as a problem of its own.
RUNNER_INLINE LinearArgs row_slice(const LinearArgs& a, int64_t first, int64_t count) {
  LinearArgs part = a;
  part.x = (const char*)a.x + first * a.k * size_of(a.xt);
  part.out = (char*)a.out + first * a.n * size_of(a.xt);
  part.m = count;
  return part;
}

inline void linear_float(const LinearArgs& a) {
  if (a.m <= kFewRows) return gemv(a);
  for (int64_t m = 0; m < a.m; m += kMostRows) gemm(row_slice(a, m, a.m - m < kMostRows ? a.m - m : kMostRows));
}
