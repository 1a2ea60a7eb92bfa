// Quantised linear layers for many rows: 16-bit integer products (vpdpwssd), twice the rate of float FMA. Included
// inside the AVX-512 namespace. Each group of x becomes x = scale * (code + rest / kMostRest), code and rest int16. A
// group without large values drops the rest: its error is then 2^-16 of its largest value, at most kLarge times the
// row's root mean square. In a group with a large one that would show (logits off by 1.6e-3 of their deviation, against
// 4e-4 now); few have one, and these are multiplied twice.

struct QuantPanel {
  int32_t* q;      // [k / 2][kPanel]: two neighbouring int16 of one row of x
  int32_t* rest;   // likewise, filled where `large` says so
  float* scale;    // [groups][kPanel]
  float* sum;      // [groups][kPanel]: of the codes as numbers
  float* rest_sum;
  uint8_t* large;  // [groups]: some row of x has a large value in the group
};

constexpr float kMostCode = 32767.0f, kMostRest = 65534.0f;
constexpr int kQuantDepth = 1024;  // columns of a weight tile

RUNNER_INLINE int64_t quant_panel_bytes(const LinearArgs& a) {
  return kPanel * (a.k * 4 + groups_of(a) * 12) + (groups_of(a) + 63) / 64 * 64;
}

RUNNER_INLINE QuantPanel quant_panel(const LinearArgs& a, void* block, int64_t p) {
  char* base = (char*)block + p * quant_panel_bytes(a);
  float* scale = (float*)(base + a.k * 4 * kPanel);
  int64_t step = groups_of(a) * kPanel;
  int32_t* q = (int32_t*)base;
  return {q, q + a.k / 2 * kPanel, scale, scale + step, scale + 2 * step, (uint8_t*)(scale + 3 * step)};
}

// One row of x as codes and rests, and its scales and sums into column `column` of the panel. False: not finite.
inline bool quantise_column(const LinearArgs& a, const float* x, int16_t* q, int16_t* rest, const QuantPanel& to,
                            int64_t column) {
  float limit = kLarge * kLarge * mean_square(x, a.k);
  for (int64_t g = 0; g < groups_of(a); ++g) {
    float most, total;
    group_range(x + g * a.group, a.group, &most, &total);
    if (!(total - total == 0.0f)) return false;
    float scale = most / kMostCode;
    VF inverse = set1(most > 1e-30f ? kMostCode / most : 0.0f);
    if (most * most > limit) to.large[g] = 1;
    __m512i codes = _mm512_setzero_si512(), rests = codes;
    for (int64_t i = g * a.group; i < (g + 1) * a.group; i += 16) {
      VF v = load(x + i) * inverse;
      __m512i code = _mm512_cvtps_epi32(v);
      __m512i left = _mm512_cvtps_epi32((v - _mm512_cvtepi32_ps(code)) * set1(kMostRest));
      _mm256_storeu_si256((__m256i*)(q + i), _mm512_cvtepi32_epi16(code));
      _mm256_storeu_si256((__m256i*)(rest + i), _mm512_cvtsepi32_epi16(left));
      codes = _mm512_add_epi32(codes, code);
      rests = _mm512_add_epi32(rests, left);
    }
    to.scale[g * kPanel + column] = scale;
    to.sum[g * kPanel + column] = scale * (float)_mm512_reduce_add_epi32(codes);
    to.rest_sum[g * kPanel + column] = scale / kMostRest * (float)_mm512_reduce_add_epi32(rests);
  }
  return true;
}

inline bool pack_quant_panel(const LinearArgs& a, void* block, int64_t p) {
  QuantPanel to = quant_panel(a, block, p);
  int64_t first = p * kPanel, rows = a.m - first < kPanel ? a.m - first : kPanel;
  if (rows < kPanel) memset((void*)to.q, 0, (size_t)quant_panel_bytes(a));
  memset(to.large, 0, (size_t)groups_of(a));
  int16_t* q = (int16_t*)scratch(Slot::tile, 32 * a.k * 2);
  int16_t* rest = q + 16 * a.k;
  float* line = (float*)scratch(Slot::row, a.k * 4);
  bool finite = true;
  for (int64_t r = 0; r < rows; r += 16) {
    int64_t some = rows - r < 16 ? rows - r : 16;
    for (int64_t i = 0; i < some; ++i) {
      with_type(a.xt, [&](auto t) {
        using T = decltype(t);
        to_float<T>((const typename T::S*)a.x + (first + r + i) * a.k, line, a.k);
      });
      finite &= quantise_column(a, line, q + i * a.k, rest + i * a.k, to, r + i);
    }
    transpose((const float*)q, a.k / 2, some, a.k / 2, (float*)(to.q + r), kPanel);
    transpose((const float*)rest, a.k / 2, some, a.k / 2, (float*)(to.rest + r), kPanel);
  }
  return finite;
}

// Row n of w from column k0 on as int16, and its scales and shifts.
template <class T>
RUNNER_INLINE void unpack_row(const LinearArgs& a, int64_t n, int64_t k0, int64_t depth, int16_t* q, float* scale,
                              float* shift) {
  const uint8_t* w = (const uint8_t*)a.w + (n * a.k + k0) * a.bits / 8;
  if (a.bits == 4) {
    const __m512i low = _mm512_set1_epi32(0xf), high = _mm512_set1_epi32(0xf0);
    for (int64_t i = 0; i < depth; i += 32) {
      __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w + i / 2)));
      v = _mm512_or_si512(_mm512_and_si512(v, low), _mm512_slli_epi32(_mm512_and_si512(v, high), 12));
      _mm512_storeu_si512(q + i, v);
    }
  } else {
    for (int64_t i = 0; i < depth; i += 32) {
      _mm512_storeu_si512(q + i, _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(w + i))));
    }
  }
  int64_t at = n * groups_of(a) + k0 / a.group, count = depth / a.group;
  to_float<T>((const typename T::S*)a.scales + at, scale, count);
  to_float<T>((const typename T::S*)a.shifts + at, shift, count);
}

struct QuantTile {
  int16_t* q;     // [kTileRows][kQuantDepth]
  float* scale;   // [kTileRows][kQuantDepth / 32]
  float* shift;
};

// acc + pairs of a times pairs of b. In assembler, because GCC 12 surrounds the intrinsic with copies and spills.
RUNNER_INLINE __m512i multiply_add(__m512i acc, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

// t[n][m] += scale_n * factor * scale_m sum(q_n q_m) + shift_n sum_m for one group
template <int NR, int MV>
RUNNER_INLINE void quant_group(const int16_t* wq, const float* scale, const float* shift, const int32_t* xq,
                               const float* sx, const float* xs, float factor, int group, float* t) {
  constexpr int kGroups = kQuantDepth / 32;
  __m512i acc[NR][MV];
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n) {
#pragma GCC unroll 2
    for (int j = 0; j < MV; ++j) acc[n][j] = _mm512_setzero_si512();
  }
  for (int i = 0; i < group / 2; ++i) {
    __m512i xv[MV];
#pragma GCC unroll 2
    for (int j = 0; j < MV; ++j) xv[j] = _mm512_loadu_si512(xq + i * kPanel + j * W);
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n) {
      int32_t pair;
      memcpy(&pair, wq + n * kQuantDepth + 2 * i, 4);
      __m512i b = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int j = 0; j < MV; ++j) acc[n][j] = multiply_add(acc[n][j], b, xv[j]);
    }
  }
  VF sxv[MV], xsv[MV];
#pragma GCC unroll 2
  for (int j = 0; j < MV; ++j) sxv[j] = load(sx + j * W) * set1(factor), xsv[j] = load(xs + j * W);
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n) {
    VF s = set1(scale[n * kGroups]), b = set1(shift[n * kGroups]);
#pragma GCC unroll 2
    for (int j = 0; j < MV; ++j) {
      float* at = t + n * kTileCols + j * W;
      VF v = fma(b, xsv[j], load(at));
      store(at, fma(_mm512_cvtepi32_ps(acc[n][j]) * sxv[j], s, v));
    }
  }
}

// t[n][m] += over the groups of a tile
template <int NR, int MV>
RUNNER_INLINE void quant_micro(const int16_t* w, const float* scale, const float* shift, const QuantPanel& x,
                               int64_t groups, int group, float* t) {
  for (int64_t g = 0; g < groups; ++g) {
    int64_t at = g * (group / 2) * kPanel, c = g * kPanel;
    const int16_t* wq = w + g * group;
    quant_group<NR, MV>(wq, scale + g, shift + g, x.q + at, x.scale + c, x.sum + c, 1.0f, group, t);
    if (!x.large[g]) continue;
    quant_group<NR, MV>(wq, scale + g, shift + g, x.rest + at, x.scale + c, x.rest_sum + c, 1.0f / kMostRest, group, t);
  }
}

RUNNER_INLINE void quant_panel_product(const QuantTile& w, int64_t rows, const QuantPanel& x, int64_t groups, int group,
                                       int64_t cols, float* t) {
  constexpr int kGroups = kQuantDepth / 32;
  int64_t n = 0;
  auto step = [&](auto nr) {
    constexpr int NR = decltype(nr)::value;
    for (; n + NR <= rows; n += NR) {
      const int16_t* q = w.q + n * kQuantDepth;
      const float *scale = w.scale + n * kGroups, *shift = w.shift + n * kGroups;
      if (cols > W) {
        quant_micro<NR, 2>(q, scale, shift, x, groups, group, t + n * kTileCols);
      } else {
        quant_micro<NR, 1>(q, scale, shift, x, groups, group, t + n * kTileCols);
      }
    }
  };
  step(Int<kRows>{});
  step(Int<4>{});
  step(Int<1>{});
}

inline void quant_gemm_tile(const LinearArgs& a, void* packed, int64_t n0, int64_t m0) {
  constexpr int kGroups = kQuantDepth / 32;
  int64_t rows = a.n - n0 < kTileRows ? a.n - n0 : kTileRows;
  int64_t cols = a.m - m0 < kTileCols ? a.m - m0 : kTileCols;
  float* t = (float*)scratch(Slot::partial, kTileRows * kTileCols * 4);
  QuantTile w;
  w.q = (int16_t*)scratch(Slot::tile, kTileRows * (kQuantDepth * 2 + kGroups * 8));
  w.scale = (float*)(w.q + kTileRows * kQuantDepth);
  w.shift = w.scale + kTileRows * kGroups;
  memset(t, 0, kTileRows * kTileCols * 4);
  for (int64_t k0 = 0; k0 < a.k; k0 += kQuantDepth) {
    int64_t depth = a.k - k0 < kQuantDepth ? a.k - k0 : kQuantDepth;
    with_type(a.st, [&](auto type) {
      for (int64_t r = 0; r < rows; ++r) {
        unpack_row<decltype(type)>(a, n0 + r, k0, depth, w.q + r * kQuantDepth, w.scale + r * kGroups,
                                   w.shift + r * kGroups);
      }
    });
    for (int64_t m = 0; m < cols; m += kPanel) {
      QuantPanel x = quant_panel(a, packed, (m0 + m) / kPanel);
      x.q += k0 / 2 * kPanel;
      x.rest += k0 / 2 * kPanel;
      x.scale += k0 / a.group * kPanel;
      x.sum += k0 / a.group * kPanel;
      x.rest_sum += k0 / a.group * kPanel;
      x.large += k0 / a.group;
      quant_panel_product(w, rows, x, depth / a.group, a.group, cols - m, t + m);
    }
  }
  store_tile(a, t, n0, rows, m0, cols);
}

// False when x holds a NaN or an infinity.
inline bool quant_gemm_rows(const LinearArgs& a) {
  int64_t panels = (a.m + kPanel - 1) / kPanel;
  void* packed = scratch(Slot::packed, panels * quant_panel_bytes(a));
  Pool& pool = Pool::get();
  int bad = 0;
  pool.parallel_for((int)panels, [&](int p) {
    if (!pack_quant_panel(a, packed, p)) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  if (bad) return false;
  int64_t across = (a.n + kTileRows - 1) / kTileRows, down = (a.m + kTileCols - 1) / kTileCols;
  pool.parallel_for((int)(across * down), [&](int i) {
    quant_gemm_tile(a, packed, i % across * kTileRows, i / across * kTileCols);
  });
  return true;
}

inline bool quant_gemm(const LinearArgs& a) {
  for (int64_t m = 0; m < a.m; m += kMostRows) {
    if (!quant_gemm_rows(row_slice(a, m, a.m - m < kMostRows ? a.m - m : kMostRows))) return false;
  }
  return true;
}
