// Packed linear layers in integer arithmetic. Included inside an x86 ISA namespace, after quantised_rows.h; what a result
// is stands in quantised_tiles.h. `By` says what many rows are multiplied by: `Vectors`, or a kind of tile registers.

// How rows of x are divided into panels: evenly, none of more than kPanelRows or, for tile registers, kTileRows.
struct Panels {
  int64_t count, rows, bytes;
  bool tiled;
  RUNNER_INLINE int64_t first(int64_t p) const { return p * rows / count; }
  RUNNER_INLINE int width(int64_t p) const { return (int)(first(p + 1) - first(p)); }
  RUNNER_INLINE int widest() const { return (int)((rows + count - 1) / count); }
  RUNNER_INLINE Panel at(const LinearArgs& a, char* packed, int64_t p) const {
    return panel_at(a, packed + p * bytes, width(p), tiled);
  }
};

template <class By>
RUNNER_INLINE Panels panels_of(const LinearArgs& a, int64_t rows) {
  Panels p;
  p.rows = rows;
  p.tiled = By::kTiles && rows >= kLeastTiled;
  const int most = p.tiled ? kTileRows : kPanelRows;
  p.count = (rows + most - 1) / most;
  p.bytes = (panel_bytes(a, p.widest()) + 63) / 64 * 64;
  return p;
}

// Rows [n, n + kStrips * W) of the matrix against the panels [p, end), which `add` multiplies with a tile as `add_tile_of`;
// `paired`: a tile whose lanes hold two steps each.
template <class Add>
RUNNER_INLINE void strips_by(const LinearArgs& a, const Panels& panels, char* packed, int64_t n, int64_t p, int64_t end,
                             bool paired, const Add& add) {
  const int64_t first = panels.first(p), rows = panels.first(end) - first;
  const int strips = a.n - n > W ? kStrips : 1;
  constexpr int64_t kSums = kRunning * kStrips * W;
  float* t = (float*)scratch(Slot::partial, rows * kSums * 4);
  if (groups_of(a) < kRunning) memset(t, 0, (size_t)(rows * kSums * 4));  // sums that nothing is added to
  Tile w = tile_at(scratch(Slot::tile, kTileBytes));
  for (int64_t k = 0; k < a.k; k += kTileValues) {
    const int64_t depth = a.k - k < kTileValues ? a.k - k : kTileValues;
    // Asked for at once, or when it is wanted, the next tile would come at memory's pace while nothing is computed.
    Ahead ahead;
    const int64_t next = k + depth < a.k ? k + depth : 0, left = a.k - next;
    add_tile_memory(a, next ? n : n + kStrips * W, next, left < kTileValues ? left : kTileValues, ahead);
    const int groups = (int)(depth / a.group);
    ahead.divide(groups + depth * (a.bits == 4 ? 4 : 8) / 8 / (16 * kPiecesAhead));
    unpack_tile(a, n, k, depth, paired, ahead, w);
    for (int64_t i = p; i < end; ++i) {
      const Panel x = from_column(a, panels.at(a, packed, i), k);
      add(w, x, groups, strips, k == 0, ahead, t + (panels.first(i) - first) * kSums);
    }
  }
  const int64_t wide = a.n - n < kStrips * W ? a.n - n : kStrips * W;
  float bias[kStrips * W] = {};
  for (int64_t j = 0; j < wide && a.bias; ++j) bias[j] = bias_at(a, n + j);
  with_type(a.xt, [&](auto type) {
    using T = decltype(type);
    for (int64_t m = 0; m < rows; ++m) {
      float* line = t + m * kSums;
      for (int j = 0; j < kStrips * W; j += W) {
        const float* s = line + j;
        VF sum = (load(s) + load(s + 2 * kStrips * W)) + (load(s + kStrips * W) + load(s + 3 * kStrips * W));
        store(line + j, sum + load(bias + j));
      }
      from_float<T>(line, (typename T::S*)a.out + (first + m) * a.n + n, wide);
    }
  });
}

template <class By>
void quantised_strips(const LinearArgs& a, const Panels& panels, char* packed, int64_t n, int64_t p, int64_t end) {
  if constexpr (By::kTiles) {
    if (panels.tiled) {
      By registers(panels.widest(), a.group);
      return strips_by(a, panels, packed, n, p, end, false, [&](const Tile& w, const Panel& x, int groups, int strips,
                                                                bool first, Ahead& ahead, float* t) {
        add_tile_of(registers, w, x, groups, a.group, strips, first, ahead, t);
      });
    }
  }
  auto by_vectors = [&](auto paired) {
    constexpr bool kPaired = decltype(paired)::value;
    strips_by(a, panels, packed, n, p, end, kPaired, [&](const Tile& w, const Panel& x, int groups, int strips, bool first,
                                                         Ahead& ahead, float* t) {
      add_tile_of<kPaired>(w, x, groups, a.group, strips, first, ahead, t);
    });
  };
  if constexpr (RUNNER_ISA == 512) {
    // Drawn apart once more for each panel, they would cost many panels more than unpacking them.
    if (end - p == 1 && paired_steps(a)) return by_vectors(Int<1>{});
  }
  by_vectors(Int<0>{});
}

constexpr int64_t kShared = 2048;      // values of x from which threads share the work of rounding them
constexpr int64_t kRowsPacked = 384;   // of x: bounds what is packed of it, so that it stays in the second cache
constexpr int64_t kPanelsEach = 16;    // of a task of many rows

template <class By>
void quantised_rows(const LinearArgs& a, const Panels& panels, char* packed) {
  Pool& pool = Pool::get();
  constexpr int64_t across = kStrips * W;
  if (a.m <= kRowsApart) {
    const Panel x = panels.at(a, packed, 0);
    const int64_t per = rows_per_chunk(a.n, a.k * a.bits / 8, W);
    pool.parallel_for((int)((a.n + per - 1) / per), [&](int chunk) {
      const int64_t n = chunk * per, end = n + per < a.n ? n + per : a.n;
      if (a.m == 1) return rows_dots<1>(a, x, n, end);
      rows_dots<2>(a, x, n, end);
    });
  } else if (panels.count == 1) {
    // Each row of x makes as much work of a piece, which is then worth its claim sooner.
    const int64_t per = rows_per_chunk(a.n, a.m * a.k * a.bits / 8, across);
    pool.parallel_for((int)((a.n + per - 1) / per), [&](int chunk) {
      const int64_t end = (chunk + 1) * per < a.n ? (chunk + 1) * per : a.n;
      for (int64_t n = chunk * per; n < end; n += across) quantised_strips<By>(a, panels, packed, n, 0, 1);
    });
  } else {
    const int64_t columns = (a.n + across - 1) / across, parts = (panels.count + kPanelsEach - 1) / kPanelsEach;
    pool.parallel_for((int)(columns * parts), [&](int i) {
      const int64_t p = i / columns * kPanelsEach, end = p + kPanelsEach;
      quantised_strips<By>(a, panels, packed, i % columns * across, p, end < panels.count ? end : panels.count);
    });
  }
}

template <class By>
void quantised_linear(const LinearArgs& all) {
  for (int64_t m = 0; m < all.m; m += kRowsPacked) {
    const LinearArgs a = row_slice(all, m, all.m - m < kRowsPacked ? all.m - m : kRowsPacked);
    const Panels panels = panels_of<By>(a, a.m);
    char* packed = (char*)scratch(Slot::packed, panels.count * panels.bytes);
    auto pack = [&](int p) { quantise_panel(a, panels.first(p), panels.at(a, packed, p)); };
    Pool& pool = Pool::get();
    const int64_t blocks = blocks_of(a), per = (blocks + pool.size() - 1) / pool.size();
    if (panels.count == 1 && a.m > kRowsApart && a.m * a.k >= kShared) {
      const Panel to = panels.at(a, packed, 0);
      clear_fine(to);
      pool.parallel_for((int)((blocks + per - 1) / per), [&](int i) {
        quantise_blocks(a, 0, i * per, (i + 1) * per < blocks ? (i + 1) * per : blocks, to);
      });
    } else {
      pool.parallel_for((int)panels.count, pack);
    }
    // Rows that integers cannot carry have floats' results, whatever stands beside them.
    int64_t odd[kRowsPacked], count = 0;
    for (int64_t p = 0; p < panels.count; ++p) {
      const Panel x = panels.at(a, packed, p);
      for (unsigned bits = x.fine[x.groups + 1]; bits; bits &= bits - 1) odd[count++] = panels.first(p) + __builtin_ctz(bits);
    }
    quantised_rows<By>(a, panels, packed);
    for (int64_t i = 0; i < count; ++i) linear_float(row_slice(a, odd[i], 1));
  }
}
