// Products of packed weights, unpacked into tiles, with several rows of x. Included inside an x86 ISA namespace, after
// weight_tile.h.
//
// One definition for any number of rows: with I = sum(code of w * code of x) of a group, an exact integer,
//   s[g % 4] = s[g % 4] + shift * sum + I * scale_w * scale_x + (rest, where the row's group has one)
// group by group in float32, and (s[0] + s[2]) + (s[1] + s[3]) is the result. How many rows of x there are, and how the
// matrix is cut, changes only what is computed when. Two ways lead there:
// - tiles: a lane is a row of the matrix (weight_tile.h), so that sums of a group need no adding across lanes. To turn
//   weights around costs as much as to multiply them with two rows of x.
//   Where there are tile registers they do this for many rows (tile_registers.h): their integers are the same.
// - one row of the matrix after the other, for one row of x or two: a lane is a group, whose sum is added up across the
//   lanes of several vectors at once. Weights are read as they lie, which is what memory is fastest at.

// In assembler, because GCC 12 surrounds the one intrinsic with copies and spills, and makes all products of a step before
// it adds the first, with which half of the sums do not stay in registers.
RUNNER_INLINE VI32 multiply_add(VI32 acc, VI32 w, VI32 x) {
#if RUNNER_ISA == 512
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
  VI32 product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w), "x"(x));
#endif
  return acc;
}

#if RUNNER_ISA == 512
RUNNER_INLINE VI32 no_sum() { return _mm512_setzero_si512(); }
RUNNER_INLINE VI32 repeated(const int32_t* p) { return _mm512_set1_epi32(*p); }
RUNNER_INLINE VI32 load_step(const int32_t* p) { return _mm512_load_si512(p); }
RUNNER_INLINE VI32 next_plane(VI32 v) { return _mm512_slli_epi32(v, 8); }
RUNNER_INLINE VI32 plus(VI32 a, VI32 b) { return _mm512_add_epi32(a, b); }
RUNNER_INLINE VF as_float(VI32 v) { return _mm512_cvtepi32_ps(v); }
#else
RUNNER_INLINE VI32 no_sum() { return _mm256_setzero_si256(); }
RUNNER_INLINE VI32 repeated(const int32_t* p) { return _mm256_set1_epi32(*p); }
RUNNER_INLINE VI32 load_step(const int32_t* p) { return _mm256_load_si256((const __m256i*)p); }
RUNNER_INLINE VI32 next_plane(VI32 v) { return v; }
RUNNER_INLINE VI32 plus(VI32 a, VI32 b) { return _mm256_add_epi32(a, b); }
RUNNER_INLINE VF as_float(VI32 v) { return _mm256_cvtepi32_ps(v); }
#endif

// Sums of one row that are added to in turns, so that few rows do not wait for each multiply_add before the next.
template <int N, int M>
constexpr int kTurns = RUNNER_ISA != 512 || N * M >= 12 ? 1 : N * M >= 4 ? 2 : 4;

// acc[s][m] += over `steps` of a plane, for N strips and M of x's rows, which are `width` side by side. PAIRED: a lane of w
// holds two steps.
template <int N, int M, bool PAIRED = false>
RUNNER_INLINE void add_steps(const int32_t* w, const int32_t* x, int width, int steps, VI32 acc[N][M]) {
  constexpr int T = kTurns<N, M>;
  VI32 more[T][N][M];
#pragma GCC unroll 4
  for (int t = 1; t < T; ++t) {
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) more[t][s][m] = no_sum();
    }
  }
  constexpr int L = PAIRED ? 2 : 1, kStrip = kTileValues / kStep / L * W;
  for (const int32_t* end = w + steps / L * W; w < end;) {
    VI32 lanes[N][kLaneSteps<4>];
#pragma GCC unroll 4
    for (int i = 0; i < (T > L ? T : L); ++i, x += width) {
      const int t = i % T;
      VI32 wv[N];
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) {
        if constexpr (PAIRED) {
          if (i % 2 == 0) spread<4, false>(load_step(w + s * kStrip), lanes[s]);
          wv[s] = lanes[s][i % 2];
        } else {
          wv[s] = load_step(w + s * kStrip);
        }
      }
      if (i % L == L - 1) w += W;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        VI32 xv = repeated(x + m);
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) {
          VI32& sum = t ? more[t][s][m] : acc[s][m];
          sum = multiply_add(sum, wv[s], xv);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 1; t < T; ++t) {
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[s][m] = plus(acc[s][m], more[t][s][m]);
    }
  }
}

// The exact sums of a group, of N strips and a row of x, into s[g % 4] of the row, which is `at`; with BEGIN it was 0.
template <int N, bool BEGIN>
RUNNER_INLINE void add_sums(const VI32 sums[N], const VF scale[N], const VF shift[N], float scale_x, float sum_x, float* at) {
  VF sx = set1(scale_x), sum = set1(sum_x);
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) {
    VF before = BEGIN ? zero() : load(at + s * W);
    store(at + s * W, fma(as_float(sums[s]), scale[s] * sx, fma(shift[s], sum, before)));
  }
}

// Likewise the sums over the rests of a row's group.
template <int N>
RUNNER_INLINE void add_rests(const VI32 rests[N][1], const VF scale[N], float scale_x, float* at) {
  VF sx = set1(scale_x * (1.0f / 256.0f));
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) store(at + s * W, fma(as_float(rests[s][0]), scale[s] * sx, load(at + s * W)));
}

// t[m][g % 4][s] += over the groups of a tile, for N strips and the M rows of a panel; x begins at the tile's first
// column, whose group's number is a multiple of four. With `first`, t is filled and not added to.
template <int N, int M, bool PAIRED>
void add_tile(const Tile& tile, const Panel& panel, int groups, int group, bool first, Ahead& ahead, float* t) {
  // Copies: what is stored below could change the arguments, for all that the compiler knows.
  const Tile w = tile;
  const Panel x = panel;
  const int steps = group / kStep;
  for (int g = 0; g < groups; ++g) {
    ahead.some();
    const int32_t *wq = w.q + g * (PAIRED ? steps / 2 : steps) * W, *xq = x.q + g * steps * M;
    VI32 acc[N][M];
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[s][m] = no_sum();
    }
    add_steps<N, M, PAIRED>(wq, xq, M, steps, acc);
    if (kPlanes == 2 && !x.coarse) {
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[s][m] = next_plane(acc[s][m]);
      }
      add_steps<N, M, PAIRED>(wq, xq + x.steps * M, M, steps, acc);
    }
    VF scale[N], shift[N];
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
      scale[s] = load(w.scale + (s * kTileGroups + g) * W);
      shift[s] = load(w.shift + (s * kTileGroups + g) * W);
    }
    float* to = t + g % kRunning * (kStrips * W);
    const float *scales = x.scale + (int64_t)g * M, *sums = x.sum + (int64_t)g * M;
    auto add = [&](auto begin) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        VI32 of_row[N];
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) of_row[s] = acc[s][m];
        add_sums<N, decltype(begin)::value>(of_row, scale, shift, scales[m], sums[m], to + m * kRunning * kStrips * W);
      }
    };
    if (first && g < kRunning) {
      add(Int<1>{});
    } else {
      add(Int<0>{});
    }
    for (unsigned fine = x.fine[g]; fine; fine &= fine - 1) {
      const int m = __builtin_ctz(fine);
      VI32 rest[N][1];
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) rest[s][0] = no_sum();
      add_steps<N, 1, PAIRED>(wq, x.rest + g * steps * M + m, M, steps, rest);
      add_rests<N>(rest, scale, scales[m], to + m * kRunning * kStrips * W);
    }
  }
}

template <bool PAIRED, int M = kPanelRows>
RUNNER_INLINE void add_tile_of(const Tile& w, const Panel& x, int groups, int group, int strips, bool first, Ahead& ahead,
                               float* t) {
  if constexpr (M > kRowsApart) {
    if (x.rows < M) return add_tile_of<PAIRED, M - 1>(w, x, groups, group, strips, first, ahead, t);
    if (strips == 1) return add_tile<1, M, PAIRED>(w, x, groups, group, first, ahead, t);
    add_tile<kStrips, M, PAIRED>(w, x, groups, group, first, ahead, t);
  }
}

RUNNER_INLINE Panel from_column(const LinearArgs& a, Panel x, int64_t k) {
  x.q += k / kStep * x.rows;
  x.rest += k / kStep * x.rows;
  x.scale += k / a.group * x.rows;
  x.sum += k / a.group * x.rows;
  x.fine += k / a.group;
  return x;
}
