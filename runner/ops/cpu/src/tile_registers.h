// Products of packed weights with many rows of x in tile registers (AMX): the integers of quantised_tiles.h, sixteen rows by
// sixteen by 64 values an instruction. Included inside an x86 ISA namespace, after quantised_tiles.h.
//
// A tile register holds up to 16 rows of up to 64 bytes. A strip of unpacked weights (weight_tile.h) is what the instruction
// takes as its second factor, four values of each of sixteen rows of the matrix in a row of the register; x lies as the
// first factor (Panel::tiled). Sums of bytes are exact in 32 bits, so they are those that vectors give, in any order; what
// follows is done by vectors, as ever. tdpbf16ps has no such twin: it adds pairs of products, and flushes what is small to
// zero, so that floats are not multiplied here.

// Rows of x for which tile registers are used: those of prompts, which was measured. Panels then have 12 rows at least.
constexpr int64_t kLeastTiled = 48;

#if RUNNER_ISA == 512

// Registers: the sums of two planes of x and two strips, the planes, the strips.
constexpr int kSumTiles = 0, kXTiles = 4, kWeightTiles = 6, kAllTiles = 8;
constexpr int64_t kTileRowBytes = 4 * kTileSteps;  // also how far apart the rows are, in memory, of all that is loaded

// Rows and bytes of a row of each register, for `rows` rows of x and steps that begin and end with a group.
template <class F>
RUNNER_INLINE void each_shape(int rows, int group, F&& shape) {
  const int bytes = group < kTileRowBytes ? group : (int)kTileRowBytes;
  for (int i = kSumTiles; i < kXTiles; ++i) shape(i, rows, (int)kTileRowBytes);
  for (int i = kXTiles; i < kWeightTiles; ++i) shape(i, rows, bytes);
  for (int i = kWeightTiles; i < kAllTiles; ++i) shape(i, bytes / 4, (int)kTileRowBytes);
}

#if RUNNER_TILES
// The registers of this thread, which are its own from here to the end of the object's life. Instructions are in assembler,
// as the rest of the file may not be compiled for them: the compiler knows of no register that they touch.
class TileRegisters {
 public:
  static constexpr bool kTiles = true;
  TileRegisters(int rows, int group) {
    alignas(64) uint8_t config[64] = {1};  // the palette: eight registers of 1 KiB
    each_shape(rows, group, [&](int i, int count, int bytes) {
      config[16 + 2 * i] = (uint8_t)bytes;
      config[48 + i] = (uint8_t)count;
    });
    asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  template <int T>
  RUNNER_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  RUNNER_INLINE void load(const int32_t* p) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(kTileRowBytes), "i"(T) : "memory");
  }
  template <int T>
  RUNNER_INLINE void store(int32_t* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(kTileRowBytes), "i"(T) : "memory");
  }
  // to[m][n] += sum over k of x[m][k] * w[k / 4][4 n + k % 4], bytes of x with signs and of w without.
  template <int TO, int X, int W>
  RUNNER_INLINE void multiply_add() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(X), "i"(W));
  }
};

#endif

// The same without the registers, one number after the other and with the faults of the instructions: for tests, and for
// whoever wants to know what they do.
class EmulatedTileRegisters {
 public:
  static constexpr bool kTiles = true;
  EmulatedTileRegisters(int rows, int group) {
    each_shape(rows, group, [&](int i, int count, int bytes) {
      rows_[i] = count, bytes_[i] = bytes;
      if (count < 1 || count > kTileRows || bytes < 1 || bytes > kTileRowBytes) __builtin_trap();
    });
    memset(data_, 0, sizeof data_);
  }
  template <int T>
  void clear() {
    memset(data_[T], 0, sizeof data_[T]);
  }
  template <int T>
  void load(const int32_t* p) {
    clear<T>();
    for (int i = 0; i < rows_[T]; ++i) memcpy(data_[T][i], (const char*)p + i * kTileRowBytes, (size_t)bytes_[T]);
  }
  template <int T>
  void store(int32_t* p) {
    for (int i = 0; i < rows_[T]; ++i) memcpy((char*)p + i * kTileRowBytes, data_[T][i], (size_t)bytes_[T]);
  }
  template <int TO, int X, int W>
  void multiply_add() {
    if (rows_[TO] != rows_[X] || bytes_[TO] != bytes_[W] || bytes_[X] != 4 * rows_[W]) __builtin_trap();
    for (int m = 0; m < rows_[TO]; ++m) {
      for (int n = 0; n < bytes_[TO] / 4; ++n) {
        uint32_t sum;
        memcpy(&sum, data_[TO][m] + 4 * n, 4);
        for (int k = 0; k < bytes_[X]; ++k) {
          sum += (uint32_t)((int8_t)data_[X][m][k] * data_[W][k / 4][4 * n + k % 4]);
        }
        memcpy(data_[TO][m] + 4 * n, &sum, 4);
      }
    }
  }

 private:
  uint8_t data_[kAllTiles][kTileRows][kTileRowBytes];
  int rows_[kAllTiles], bytes_[kAllTiles];
};

// `add_tile` of quantised_tiles.h for a tiled panel, of whose code P planes are multiplied.
template <int N, int P, class By>
void add_tile_in_registers(By& registers, const Tile& tile, const Panel& panel, int groups, int group, bool first,
                           Ahead& ahead, float* t) {
  // Copies: what is stored below could change the arguments, for all that the compiler knows.
  const Tile w = tile;
  const Panel x = panel;
  const int steps = group / kStep, pieces = steps > kTileSteps ? steps / kTileSteps : 1;
  // Where step i of the panel's first row is: a group begins with a block, or within one.
  auto place = [&](int64_t i) { return i / kTileSteps * kTileSteps * x.rows + i % kTileSteps; };
  alignas(64) int32_t sums[2][P][N][kTileRows][W];
  // Sums of a group are stored while vectors take those of the one before.
  auto multiply = [&](int g) {
    auto each = [&](auto f) {
      f(Int<0>{}, Int<0>{});
      if constexpr (N > 1) f(Int<0>{}, Int<1>{});
      if constexpr (P > 1) f(Int<1>{}, Int<0>{});
      if constexpr (N > 1 && P > 1) f(Int<1>{}, Int<1>{});
    };
    each([&](auto p, auto s) { registers.template clear<kSumTiles + 2 * p.value + s.value>(); });
    for (int piece = 0; piece < pieces; ++piece) {
      const int64_t step = g * steps + piece * kTileSteps;
      const int32_t *wq = w.q + step * W, *xq = x.q + place(step);
      registers.template load<kWeightTiles>(wq);
      if constexpr (N > 1) registers.template load<kWeightTiles + 1>(wq + kTileValues / kStep * W);
      registers.template load<kXTiles>(xq);
      if constexpr (P > 1) registers.template load<kXTiles + 1>(xq + x.steps * x.rows);
      each([&](auto p, auto s) {
        registers.template multiply_add<kSumTiles + 2 * p.value + s.value, kXTiles + p.value, kWeightTiles + s.value>();
      });
    }
    each([&](auto p, auto s) {
      registers.template store<kSumTiles + 2 * p.value + s.value>(sums[g % 2][p.value][s.value][0]);
    });
  };
  multiply(0);
  for (int g = 0; g < groups; ++g) {
    ahead.some();
    if (g + 1 < groups) multiply(g + 1);
    VF scale[N], shift[N];
#pragma GCC unroll 2
    for (int s = 0; s < N; ++s) {
      scale[s] = load(w.scale + (s * kTileGroups + g) * W);
      shift[s] = load(w.shift + (s * kTileGroups + g) * W);
    }
    float* to = t + g % kRunning * (kStrips * W);
    const float *scales = x.scale + (int64_t)g * x.rows, *sums_x = x.sum + (int64_t)g * x.rows;
    auto add = [&](auto begin) {
#pragma GCC unroll 4
      for (int m = 0; m < x.rows; ++m) {
        VI32 of_row[N];
#pragma GCC unroll 2
        for (int s = 0; s < N; ++s) {
          of_row[s] = load_step(sums[g % 2][0][s][m]);
          if constexpr (P > 1) of_row[s] = plus(next_plane(of_row[s]), load_step(sums[g % 2][1][s][m]));
        }
        add_sums<N, decltype(begin)::value>(of_row, scale, shift, scales[m], sums_x[m], to + m * kRunning * kStrips * W);
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
#pragma GCC unroll 2
      for (int s = 0; s < N; ++s) rest[s][0] = no_sum();
      for (int piece = 0; piece < pieces; ++piece) {
        const int64_t step = g * steps + piece * kTileSteps;
        const int32_t* of_row = x.rest + place(step) + m * kTileSteps;
        add_steps<N, 1>(w.q + step * W, of_row, 1, steps < kTileSteps ? steps : kTileSteps, rest);
      }
      add_rests<N>(rest, scale, scales[m], to + m * kRunning * kStrips * W);
    }
  }
}

template <class By>
RUNNER_INLINE void add_tile_of(By& registers, const Tile& w, const Panel& x, int groups, int group, int strips, bool first,
                               Ahead& ahead, float* t) {
  auto add = [&](auto n, auto p) {
    add_tile_in_registers<n.value, p.value>(registers, w, x, groups, group, first, ahead, t);
  };
  auto of_strips = [&](auto n) {
    if (x.coarse) return add(n, Int<1>{});
    add(n, Int<kPlanes>{});
  };
  if (strips == 1) return of_strips(Int<1>{});
  of_strips(Int<kStrips>{});
}

#endif
