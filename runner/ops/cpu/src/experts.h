// Products of rows of x with a matrix each, of a stack of them: the experts of a mixture. Included inside an ISA namespace,
// after linear.h and, on x86, quantised.h.
//
// Rows with the same expert are brought together, so that its matrix is read once. What comes out of a row are the sums that
// `linear` makes of it, whose bits depend on that row alone: they are the same however rows are brought together.

constexpr int64_t kPairsAtOnce = 384;  // bounds what is copied and packed at a time
constexpr int64_t kPieces = 128;       // of a stack's rows that are read for single rows of x

// Pairs order[first, first + rows) of a row of x and an expert, which is the same for all of them.
struct Run {
  int64_t first, rows;
  int32_t expert;
  const char* x;  // the rows of x one behind the other, and of the results
  char* out;
#if RUNNER_ISA > 0
  Panels panels;
  char* packed;
  int64_t step, columns, task;  // rows of the matrix in a task, how many tasks that makes, and the first one's number
#endif
};

// What is to be done, and what is known of it while it is.
struct Gathering {
  const GatherArgs& g;
  int64_t k_bytes, n_bytes;  // of a row of x and of a result
  int32_t* order;            // pairs by expert, those of an expert in their order
  int64_t pairs;             // that have an expert
  Run* runs;
  int count;                 // of runs at a time

  RUNNER_INLINE const char* x_of(int64_t at) const { return (const char*)g.matrix.x + order[at] / g.per * k_bytes; }
  RUNNER_INLINE char* out_of(int64_t at) const { return (char*)g.matrix.out + order[at] * n_bytes; }
};

// The rows [n, end) of a's matrix, which is the whole problem where there is one row of x.
RUNNER_INLINE LinearArgs some_columns(LinearArgs a, int64_t n, int64_t end) {
  a.w = (const char*)a.w + n * (a.bits ? a.k * a.bits / 8 : a.k * size_of(a.wt));
  if (a.bits) {
    const int64_t numbers = n * groups_of(a) * (a.format == Format::affine ? size_of(a.st) : 1);
    a.scales = (const char*)a.scales + numbers;
    if (a.shifts) a.shifts = (const char*)a.shifts + numbers;
  }
  if (a.bias) a.bias = (const char*)a.bias + n * size_of(a.bt);
  a.out = (char*)a.out + n * size_of(a.xt);
  a.n = end - n;
  return a;
}

RUNNER_INLINE LinearArgs product_of(const GatherArgs& g, const Run& run) {
  LinearArgs a = some_columns(g.matrix, g.matrix.n * run.expert, g.matrix.n * (run.expert + 1));
  a.x = run.x, a.out = run.out, a.m = run.rows;
  return a;
}

// Pairs in the order of their experts; without those that have none, whose results are NaN.
inline void sort_pairs(Gathering& all, int32_t* ends) {
  const GatherArgs& g = all.g;
  memset(ends, 0, (size_t)(g.count + 1) * 4);
  auto known = [&](int64_t p) { return g.experts[p] >= 0 && g.experts[p] < g.count; };
  for (int64_t p = 0; p < g.pairs; ++p) {
    if (known(p)) {
      ++ends[g.experts[p] + 1];
      continue;
    }
    with_type(g.matrix.xt, [&](auto t) {
      using T = decltype(t);
      auto* out = (typename T::S*)g.matrix.out + p * g.matrix.n;
      for (int64_t i = 0; i < g.matrix.n; ++i) out[i] = T::from(__builtin_nanf(""));
    });
  }
  for (int64_t e = 0; e < g.count; ++e) ends[e + 1] += ends[e];
  all.pairs = ends[g.count];
  for (int64_t p = 0; p < g.pairs; ++p) {
    if (known(p)) all.order[ends[g.experts[p]]++] = (int32_t)p;
  }
}

// Runs from pair `at` on, as many as are worked on at a time; returns the first pair behind them.
inline int64_t find_runs(Gathering& all, int64_t at) {
  int64_t rows = 0;
  for (all.count = 0; at < all.pairs && rows < kPairsAtOnce; ++all.count) {
    Run run{};
    run.first = at, run.expert = all.g.experts[all.order[at]];
    auto same = [&](int64_t p) { return p < all.pairs && all.g.experts[all.order[p]] == run.expert; };
    while (run.rows < kPairsAtOnce && same(at + run.rows)) ++run.rows;
    if (rows && rows + run.rows > kPairsAtOnce) break;  // its matrix would be read twice
    rows += run.rows, at += run.rows;
    all.runs[all.count] = run;
  }
  return at;
}

// Single rows of x are read, and their results written, where they lie; several are copied.
inline bool bring_together(Gathering& all) {
  int64_t several = 0;
  for (int i = 0; i < all.count; ++i) several += all.runs[i].rows > 1 ? all.runs[i].rows : 0;
  char* x = (char*)scratch(Slot::gathered, several * all.k_bytes);
  char* out = (char*)scratch(Slot::products, several * all.n_bytes);
  for (int i = 0; i < all.count; ++i) {
    Run& run = all.runs[i];
    run.x = run.rows > 1 ? x : all.x_of(run.first);
    run.out = run.rows > 1 ? out : all.out_of(run.first);
    if (run.rows > 1) x += run.rows * all.k_bytes, out += run.rows * all.n_bytes;
  }
  if (several) {
    Pool::get().parallel_for(all.count, [&](int i) {
      const Run& run = all.runs[i];
      for (int64_t r = 0; r < run.rows && run.rows > 1; ++r) {
        memcpy((char*)run.x + r * all.k_bytes, all.x_of(run.first + r), (size_t)all.k_bytes);
      }
    });
  }
  return several > 0;
}

inline void put_back(const Gathering& all) {
  Pool::get().parallel_for(all.count, [&](int i) {
    const Run& run = all.runs[i];
    for (int64_t r = 0; r < run.rows && run.rows > 1; ++r) {
      memcpy(all.out_of(run.first + r), run.out + r * all.n_bytes, (size_t)all.n_bytes);
    }
  });
}

// Rows of the matrix in a task of single rows of x, `matrices` of which are read.
RUNNER_INLINE int64_t rows_per_piece(const LinearArgs& a, int64_t row_bytes, int64_t matrices, int64_t multiple) {
  const int64_t least = rows_per_chunk(a.n, row_bytes, multiple);
  const int64_t rows = (a.n * matrices / kPieces + multiple) / multiple * multiple;
  return rows > least ? rows : least;
}

inline void multiply_floats(const Gathering& all) {
  const LinearArgs& one = all.g.matrix;
  int single[kPairsAtOnce], singles = 0;
  for (int i = 0; i < all.count; ++i) {
    if (all.runs[i].rows == 1) single[singles++] = i;
  }
  const int64_t row_bytes = one.bits ? one.k * one.bits / 8 : one.k * size_of(one.wt);
  const int64_t per = rows_per_piece(one, row_bytes, singles, 4), columns = (one.n + per - 1) / per;
  Pool::get().parallel_for((int)(singles * columns), [&](int task) {
    const int64_t n = task % columns * per, end = n + per < one.n ? n + per : one.n;
    linear_floats(some_columns(product_of(all.g, all.runs[single[task / columns]]), n, end));
  });
  for (int i = 0; i < all.count; ++i) {
    if (all.runs[i].rows > 1) linear_floats(product_of(all.g, all.runs[i]));
  }
}

#if RUNNER_ISA > 0
// Packs all rows of x. A row that several runs of one row share is packed by the first of them, which packed_by[row] names;
// what it says of rows that no such run has does not matter.
template <class By>
void pack_runs(const Gathering& all, int32_t* packed_by) {
  const LinearArgs& one = all.g.matrix;
  auto row_of = [&](const Run& run) { return all.order[run.first] / all.g.per; };
  auto packs = [&](int i) {
    const Run& run = all.runs[i];
    return run.rows > 1 || packed_by[row_of(run)] == i;
  };
  int64_t bytes = 0;
  for (int i = 0; i < all.count; ++i) {
    Run& run = all.runs[i];
    run.panels = panels_of<By>(one, run.rows);
    if (run.rows == 1) {
      int32_t& by = packed_by[row_of(run)];
      const bool known = by < i && all.runs[by].rows == 1 && row_of(all.runs[by]) == row_of(run);
      if (!known) by = i;
    }
    if (packs(i)) bytes += run.panels.count * run.panels.bytes;
  }
  char* packed = (char*)scratch(Slot::packed, bytes);
  struct Job {
    int run, panel;
  } jobs[kPairsAtOnce];
  int count = 0;
  for (int i = 0; i < all.count; ++i) {
    Run& run = all.runs[i];
    if (!packs(i)) {
      run.packed = all.runs[packed_by[row_of(run)]].packed;
      continue;
    }
    run.packed = packed;
    packed += run.panels.count * run.panels.bytes;
    for (int p = 0; p < run.panels.count; ++p) jobs[count++] = {i, p};
  }
  Pool::get().parallel_for(count, [&](int i) {
    const Run& run = all.runs[jobs[i].run];
    const int p = jobs[i].panel;
    const LinearArgs a = product_of(all.g, run);
    quantise_panel(a, run.panels.first(p), run.panels.at(a, run.packed, p));
  });
}

template <class By>
void multiply_integers(const Gathering& all, int32_t* packed_by) {
  pack_runs<By>(all, packed_by);
  const LinearArgs& one = all.g.matrix;
  constexpr int64_t across = kStrips * W;
  int64_t singles = 0, tasks = 0;
  for (int i = 0; i < all.count; ++i) singles += all.runs[i].rows <= kRowsApart;
  for (int i = 0; i < all.count; ++i) {
    Run& run = all.runs[i];
    run.step = run.rows <= kRowsApart    ? rows_per_piece(one, one.k * one.bits / 8, singles, W)
               : run.panels.count == 1 ? rows_per_chunk(one.n, one.k * one.bits / 8, across)
                                       : across;
    run.columns = (one.n + run.step - 1) / run.step;
    run.task = tasks;
    tasks += run.columns * ((run.panels.count + kPanelsEach - 1) / kPanelsEach);
  }
  Pool::get().parallel_for((int)tasks, [&](int task) {
    int low = 0, high = all.count;  // the last run that begins at or before this task
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (all.runs[middle].task <= task ? low : high) = middle;
    }
    const Run& run = all.runs[low];
    const LinearArgs a = product_of(all.g, run);
    const int64_t i = task - run.task, n = i % run.columns * run.step;
    const int64_t end = n + run.step < a.n ? n + run.step : a.n;
    if (run.rows <= kRowsApart) {
      const Panel x = run.panels.at(a, run.packed, 0);
      if (run.rows == 1) return rows_dots<1>(a, x, n, end);
      return rows_dots<2>(a, x, n, end);
    }
    const int64_t p = i / run.columns * kPanelsEach, behind = p + kPanelsEach;
    const int64_t last = behind < run.panels.count ? behind : run.panels.count;
    for (int64_t m = n; m < end; m += across) quantised_strips<By>(a, run.panels, run.packed, m, p, last);
  });
  // Rows that integers cannot carry have floats' results, as in `quantised_linear`.
  for (int i = 0; i < all.count; ++i) {
    const Run& run = all.runs[i];
    const LinearArgs a = product_of(all.g, run);
    for (int64_t p = 0; p < run.panels.count; ++p) {
      const Panel x = run.panels.at(a, run.packed, p);
      for (unsigned bits = x.fine[x.groups + 1]; bits; bits &= bits - 1) {
        linear_float(row_slice(a, run.panels.first(p) + __builtin_ctz(bits), 1));
      }
    }
  }
}
#endif

template <class By>
void gather(const GatherArgs& g) {
  const LinearArgs& one = g.matrix;
  if (g.pairs == 0 || one.n == 0) return;
  Gathering all{g, one.k * size_of(one.xt), one.n * size_of(one.xt), nullptr, 0, nullptr, 0};
  const int64_t rows = (g.pairs + g.per - 1) / g.per;
  const size_t numbers = (size_t)(g.pairs + rows + g.count + 1) * 4;
  all.runs = (Run*)scratch(Slot::pairs, sizeof(Run) * kPairsAtOnce + numbers);
  all.order = (int32_t*)(all.runs + kPairsAtOnce);
  int32_t *packed_by = all.order + g.pairs, *ends = packed_by + rows;
  memset(packed_by, 0, (size_t)rows * 4);
  sort_pairs(all, ends);
  for (int64_t at = 0; at < all.pairs;) {
    at = find_runs(all, at);
    const bool several = bring_together(all);
#if RUNNER_ISA > 0
    if (in_integers(one)) {
      multiply_integers<By>(all, packed_by);
    } else {
      multiply_floats(all);
    }
#else
    multiply_floats(all);
#endif
    if (several) put_back(all);
  }
}
