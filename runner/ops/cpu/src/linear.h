// Float linear layers. Included inside an ISA namespace. Weights that are not float32 become it in registers for few rows
// of x, else a tile at a time; nothing of the size of the weights is ever allocated.

constexpr int kFewRows = RUNNER_ISA == 2 ? 8 : 16;  // up to here weights are converted for each kDotColumns rows anew
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

// add_dots for `cols` rows of x, at most M.
template <class T, int R, int M = kDotColumns>
RUNNER_INLINE void add_dots_of(const typename T::S* w, int64_t ldw, const float* x, int64_t ldx, int64_t k, int64_t cols,
                               bool far, VF acc[W]) {
  if constexpr (M > 1) {
    if (cols < M) return add_dots_of<T, R, M - 1>(w, ldw, x, ldx, k, cols, far, acc);
  }
  add_dots<T, R, M>(w, ldw, x, ldx, k, far, acc);
}

// Rows [n, n + R) of w against all of x: few rows, float32, contiguous.
template <class T, int R>
RUNNER_INLINE void few_rows(const LinearArgs& a, const typename T::S* w, const float* x, int64_t n, bool far) {
  for (int64_t m = 0; m < a.m; m += kDotColumns) {
    const int64_t cols = a.m - m < kDotColumns ? a.m - m : kDotColumns;
    VF acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) acc[i] = zero();
    add_dots_of<T, R>(w, a.k, x + m * a.k, a.k, a.k, cols, far && m == 0, acc);
    alignas(64) float out[W];
    store(out, sums(acc));
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < cols; ++j) store_out(a, m + j, n + r, out[r * kDotColumns + j]);
    }
  }
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

// ---- many rows of x: panels of kPanelWidth of them, turned around, so that a lane is a row of x

constexpr int kPanelWidth = 2 * W;
constexpr int kMicroRows = RUNNER_ISA == 512 ? 12 : RUNNER_ISA == 2 ? 6 : 4;  // of w: two vectors of results each, in registers
constexpr int64_t kPieceDepth = 768;  // values of k that are added up at a time, at most: rows of w then fit the first cache
constexpr int64_t kPanelsAtOnce = 16;  // that share unpacked rows of w

// How k is divided: into equal pieces, whose lines of a panel lie in the order of their use, which is not that of k: those
// of sum 0 one after the other, then those of sum 1, ...
struct Pieces {
  int64_t depth, all;  // of a piece, and of k filled up with zeros: multiples of W
  RUNNER_INLINE explicit Pieces(int64_t k) : all((k + W - 1) / W * W) {
    const int64_t count = (all + kPieceDepth - 1) / kPieceDepth;
    depth = (all / W + count - 1) / count * W;
  }
  RUNNER_INLINE int64_t at(int64_t k) const { return all - k < depth ? all - k : depth; }
};

// Rows [p * kPanelWidth, ...) of x into panel p, as float32, zeros past the last row and the last value.
inline void pack_panel(const LinearArgs& a, int64_t p, float* dst) {
  const Pieces pieces(a.k);
  const int64_t first = p * kPanelWidth, rows = a.m - first < kPanelWidth ? a.m - first : kPanelWidth;
  if (rows < kPanelWidth || a.k % W) memset(dst, 0, (size_t)(pieces.all * kPanelWidth * 4));
  float* copy = a.xt == DType::f32 ? nullptr : (float*)scratch(Slot::row, W * a.k * 4);
  with_type(a.xt, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t some = rows - r < W ? rows - r : W;
      const auto* x = (const typename T::S*)a.x + (first + r) * a.k;
      if (copy) to_float<T>(x, copy, some * a.k);
      const float* from = copy ? copy : (const float*)x;
      for (int64_t k = 0; k < a.k; k += W) {
        const int64_t piece = k / pieces.depth * pieces.depth;
        float* to = dst + (piece + (k - piece) / W) * kPanelWidth + r;
        transpose(from + k, a.k, some, a.k - k < W ? a.k - k : W, to, pieces.at(piece) / W * kPanelWidth);
      }
    }
  });
}

// t[lane][row][kPanelWidth] += what sum `lane` of each result gets of `depth` values of k, or = that with FIRST; rows of w
// are `ldw` apart.
template <bool FIRST>
RUNNER_INLINE void add_lanes(const float* w, int64_t ldw, const float* x, int64_t depth, float* t) {
  for (int lane = 0; lane < W; ++lane, t += kMicroRows * kPanelWidth) {
    VF acc[kMicroRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) acc[r][j] = FIRST ? zero() : load(t + r * kPanelWidth + j * W);
    }
    for (int64_t i = lane; i < depth; i += W, x += kPanelWidth) {
      VF x0 = load(x), x1 = load(x + W);
#pragma GCC unroll 12
      for (int r = 0; r < kMicroRows; ++r) {
        VF b = set1(w[r * ldw + i]);
        acc[r][0] = fma(b, x0, acc[r][0]);
        acc[r][1] = fma(b, x1, acc[r][1]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) store(t + r * kPanelWidth + j * W, acc[r][j]);
    }
  }
}

// The W sums of each result, `stride` apart, added up in the order of `sums`.
RUNNER_INLINE VF sum_of_lanes(const float* t, int64_t stride) {
  VF quarter[W / 4];
#pragma GCC unroll 4
  for (int q = 0; q < W / 4; ++q, t += 4 * stride) {
    quarter[q] = (load(t) + load(t + 2 * stride)) + (load(t + stride) + load(t + 3 * stride));
  }
  if constexpr (W == 4) return quarter[0];
  if constexpr (W == 8) return quarter[0] + quarter[W / 8];
  return (quarter[0] + quarter[1 % (W / 4)]) + (quarter[2 % (W / 4)] + quarter[3 % (W / 4)]);
}

// Rows [n, n + rows) of w, at most kMicroRows, against the panels [p, end) of x.
inline void panel_dots(const LinearArgs& a, const float* packed, int64_t n, int64_t rows, int64_t p, int64_t end) {
  const Pieces pieces(a.k);
  constexpr int64_t kStride = kMicroRows * kPanelWidth;
  const int64_t ldw = pieces.all + W;  // not a power of two: or all rows' lines would have the same place in the cache
  float* t = (float*)scratch(Slot::partial, W * kStride * 4);
  float* w = (float*)scratch(Slot::tile, kMicroRows * ldw * 4);
  float bias[kMicroRows];
  for (int64_t r = 0; r < kMicroRows; ++r) {  // what there is not repeats the last row, and is not stored
    const int64_t row = n + (r < rows ? r : rows - 1);
    weight_row(a, row, 0, a.k, w + r * ldw);
    for (int64_t i = a.k; i < pieces.all; ++i) w[r * ldw + i] = 0.0f;
    bias[r] = bias_at(a, row);
  }
  for (; p < end; ++p) {
    const int64_t m = p * kPanelWidth, cols = a.m - m < kPanelWidth ? a.m - m : kPanelWidth;
    const float* x = packed + m * pieces.all;
    add_lanes<true>(w, ldw, x, pieces.at(0), t);
    for (int64_t k = pieces.depth; k < pieces.all; k += pieces.depth) {
      add_lanes<false>(w + k, ldw, x + k * kPanelWidth, pieces.at(k), t);
    }
    float total[kStride], line[kStride];
    for (int64_t i = 0; i < kStride; i += W) {
      store(total + i, sum_of_lanes(t + i, kStride) + set1(bias[i / kPanelWidth]));
    }
    transpose(total, kPanelWidth, rows, cols, line, kMicroRows);
    with_type(a.xt, [&](auto type) {
      using T = decltype(type);
      for (int64_t j = 0; j < cols; ++j) {
        from_float<T>(line + j * kMicroRows, (typename T::S*)a.out + (m + j) * a.n + n, rows);
      }
    });
  }
}

inline void gemm(const LinearArgs& a) {
  const int64_t panels = (a.m + kPanelWidth - 1) / kPanelWidth, across = (a.n + kMicroRows - 1) / kMicroRows;
  const int64_t parts = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce, size = kPanelWidth * Pieces(a.k).all;
  float* packed = (float*)scratch(Slot::packed, panels * size * 4);
  Pool& pool = Pool::get();
  pool.parallel_for((int)panels, [&](int p) { pack_panel(a, p, packed + p * size); });
  pool.parallel_for((int)(across * parts), [&](int i) {
    const int64_t n = i % across * kMicroRows, p = i / across * kPanelsAtOnce;
    const int64_t rows = a.n - n < kMicroRows ? a.n - n : kMicroRows;
    panel_dots(a, packed, n, rows, p, p + kPanelsAtOnce < panels ? p + kPanelsAtOnce : panels);
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

#if RUNNER_ISA == 0
// A coarse layer where there are no integer products: x is rounded as those would, and multiplied in floats.
inline void linear_coarse(const LinearArgs& all) {
  for (int64_t m = 0; m < all.m; m += kMostRows) {
    const LinearArgs a = row_slice(all, m, all.m - m < kMostRows ? all.m - m : kMostRows);
    const bool floats = a.xt == DType::f32;
    float* x = (float*)scratch(Slot::codes, (a.m * a.k + (floats ? 0 : a.m * a.n)) * 4);
    with_type(a.xt, [&](auto t) {
      using T = decltype(t);
      to_float<T>((const typename T::S*)a.x, x, a.m * a.k);
    });
    for (int64_t r = 0; r < a.m; ++r) {
      float* row = x + r * a.k;
      VF odd = zero();
      for (int64_t i = 0; i < a.k; i += W) odd = odd + (load(row + i) - load(row + i));
      if (hsum(odd) != 0.0f) continue;  // not finite: such a row is not rounded
      for (int64_t g = 0; g < a.k; g += a.group) {
        VF most = zero();
        for (int i = 0; i < a.group; i += W) most = vmax(vabs(load(row + g + i)), most);
        const float range = hmax(most), inverse = range > 1e-30f ? 127.0f / range : 0.0f;
        for (int i = 0; i < a.group; i += W) {
          store(row + g + i, vround(load(row + g + i) * set1(inverse)) * set1(range / 127.0f));
        }
      }
    }
    LinearArgs rounded = a;
    rounded.x = x;
    rounded.xt = DType::f32;
    rounded.out = floats ? a.out : x + a.m * a.k;
    linear_float(rounded);
    if (floats) continue;
    with_type(a.xt, [&](auto t) {
      using T = decltype(t);
      from_float<T>((const float*)rounded.out, (typename T::S*)a.out, a.m * a.n);
    });
  }
}
#endif
