// The register-blocked product every float GEMM and the tiled attention run on. Included inside an ISA namespace.
//
// Lanes are columns of a packed panel x[k][kPanel]; rows come from w, one broadcast value each:
//   t[n][m] (+)= sum_k w[n * rs + k * ks] * x[k][m]

constexpr int kPanel = 2 * W;                                          // columns of a packed panel
constexpr int kRows = RUNNER_ISA == 512 ? 12 : RUNNER_ISA == 2 ? 6 : 4;  // rows x 2 accumulators, all in registers

template <int NR, int MV>
RUNNER_INLINE void micro(const float* w, int64_t rs, int64_t ks, const float* x, int64_t k, float* t, int64_t ldt,
                         bool accumulate) {
  VF acc[NR][MV];
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n) {
#pragma GCC unroll 2
    for (int j = 0; j < MV; ++j) acc[n][j] = accumulate ? load(t + n * ldt + j * W) : zero();
  }
  for (int64_t i = 0; i < k; ++i) {
    VF xv[MV];
#pragma GCC unroll 2
    for (int j = 0; j < MV; ++j) xv[j] = load(x + i * kPanel + j * W);
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n) {
      VF b = set1(w[n * rs + i * ks]);
#pragma GCC unroll 2
      for (int j = 0; j < MV; ++j) acc[n][j] = fma(b, xv[j], acc[n][j]);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n) {
#pragma GCC unroll 2
    for (int j = 0; j < MV; ++j) store(t + n * ldt + j * W, acc[n][j]);
  }
}

// micro() for any number of rows and, in the last panel, half the columns.
RUNNER_INLINE void panel_product(const float* w, int64_t rs, int64_t ks, int64_t rows, const float* x, int64_t k,
                                 int columns, float* t, int64_t ldt, bool accumulate) {
  int64_t n = 0;
  auto step = [&](auto nr) {
    constexpr int NR = decltype(nr)::value;
    for (; n + NR <= rows; n += NR) {
      if (columns > W) {
        micro<NR, 2>(w + n * rs, rs, ks, x, k, t + n * ldt, ldt, accumulate);
      } else {
        micro<NR, 1>(w + n * rs, rs, ks, x, k, t + n * ldt, ldt, accumulate);
      }
    }
  };
  step(Int<kRows>{});
  if (kRows > 4) step(Int<4>{});
  step(Int<1>{});
}
