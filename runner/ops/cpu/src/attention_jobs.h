// Attention of one sequence, or of several side by side, divided among threads. Included inside an ISA namespace, after
// attention.h.
//
// A job has up to kRowsAtOnce rows of one (batch, kv head) pair. It goes through all their keys and stores the result;
// or, where that would leave threads without work, a pair's keys are divided into units, of a stretch or a block each:
// every unit leaves its Softmax, and those of a row are merged at the end, in the order in which one job would.

// How one sequence's attention is divided.
struct Plan {
  int64_t pairs, rows, panels;  // panels: of kRowsAtOnce rows
  int64_t first, last;          // blocks with keys that some row sees
  int64_t per, units;           // blocks of a unit and units of a pair; 0: not divided
  int64_t jobs, before;         // before: jobs of the sequences before this one
  int64_t rows_kept, part;      // whole vectors of rows, and the floats that a unit leaves
  float* parts;
};

RUNNER_INLINE int64_t row_of(const AttentionArgs& a, int64_t block) { return block * kLanes - skipped(a); }

inline Plan plan_of(const AttentionArgs& a) {
  Plan p{};
  p.pairs = a.b * a.kv;
  p.rows = a.h / a.kv * a.l;
  p.panels = (p.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t first = visible(a, 0).first, last = visible(a, a.l - 1).last;
  p.first = (first + skipped(a)) / kLanes;
  p.last = last > first ? (last - 1 + skipped(a)) / kLanes + 1 : p.first;
  p.jobs = p.pairs * p.panels;
  p.rows_kept = whole_vectors(p.rows);
  p.part = 2 * p.rows_kept + p.rows * whole_vectors(a.dv);
  return p;
}

// Divides the keys of a sequence with a single panel of rows, where a job of `share` blocks is a fair one.
inline void divide(Plan& p, int64_t share) {
  const int64_t blocks = p.last - p.first;
  if (p.panels != 1 || blocks <= 1 || blocks <= share) return;
  p.per = share >= kBlocks ? kBlocks : 1;
  p.units = (p.last - 1) / p.per - p.first / p.per + 1;
  p.jobs = p.pairs * p.units;
}

inline Work work_for(const AttentionArgs& a, int64_t n) {
  const int64_t d = whole_vectors(a.d), dv = whole_vectors(a.dv);
  const int64_t floats = n * (d + kLanes + 3 * dv) + kLanes * (d + dv) + 6 * kRowsAtOnce;
  float* at = (float*)scratch(Slot::tile, (floats + 16 * 16) * 4);
  auto take = [&](int64_t count) {  // on cache lines
    float* here = at;
    at += (count + 15) / 16 * 16;
    return here;
  };
  Work w;
  w.q = take(n * d);
  w.score = take(n * kLanes);
  w.keys = take(kLanes * d);
  w.values = take(kLanes * dv);
  for (Softmax* s : {&w.block, &w.stretch, &w.all}) *s = {take(kRowsAtOnce), take(kRowsAtOnce), take(n * dv)};
  clear(w.block, (int)n, dv);
  return w;
}

inline void load_queries(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int n, float* q) {
  const int64_t group = a.h / a.kv;
  for (int r = 0; r < n; ++r) {
    load_query(a, b, kv * group + (r0 + r) % group, (r0 + r) / group, q + r * whole_vectors(a.d));
  }
}

// A sink is one more key, without a value, before all others.
inline void begin(const AttentionArgs& a, int64_t kv, int64_t r0, int n, const Softmax& all) {
  const int64_t group = a.h / a.kv;
  clear(all, n, whole_vectors(a.dv));
  for (int r = 0; r < n && a.sinks; ++r) {
    all.most[r] = load_one(a.sinks, a.sinkt, kv * group + (r0 + r) % group);
    all.total[r] = 1.0f;
  }
}

inline void finish(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int n, const Softmax& all) {
  const int64_t group = a.h / a.kv, width = whole_vectors(a.dv);
  for (int r = 0; r < n; ++r) {
    const float total = all.total[r];
    const VF inverse = set1(total == 0.0f ? 0.0f : 1.0f / total);
    float* out = all.out + r * width;
    for (int64_t d = 0; d < width; d += W) store(out + d, load(out + d) * inverse);
    store_result(a, b, kv * group + (r0 + r) % group, (r0 + r) / group, out);
  }
}

// Blocks [first, last) of one stretch, to w.stretch; false: no row sees any of their keys.
template <class T>
bool attend_stretch(const AttentionArgs& a, int64_t b, int64_t kv, int64_t r0, int n, int64_t first, int64_t last,
                    Work& w) {
  const int64_t width = whole_vectors(a.dv);
  bool any = false;
  for (int64_t block = first; block < last; ++block) {
    if (!attend_block<T>(a, b, kv, r0, n, row_of(a, block), w)) continue;
    if (!any) clear(w.stretch, n, width);
    any = true;
    merge(w.stretch, w.block, n, width);
  }
  return any;
}

// A job of a sequence: the pair of a panel.
struct Job {
  const AttentionArgs* a;
  const Plan* plan;
  int64_t pair, panel;
  RUNNER_INLINE int64_t first_row() const { return panel * kRowsAtOnce; }
  RUNNER_INLINE int64_t first_key() const { return visible(*a, first_row() / (a->h / a->kv)).first; }
};

// Rows of a panel over all their keys. In its last blocks it asks for the keys and values that `next` begins with: short
// histories would be waited for again and again.
inline void whole_job(const Job& here, const Job* next) {
  const AttentionArgs& a = *here.a;
  const Plan& p = *here.plan;
  const int64_t b = here.pair / a.kv, kv = here.pair % a.kv, r0 = here.first_row(), group = a.h / a.kv;
  const int n = (int)(p.rows - r0 < kRowsAtOnce ? p.rows - r0 : kRowsAtOnce);
  const int64_t from = here.first_key(), to = visible(a, (r0 + n - 1) / group).last;
  const int64_t first = (from + skipped(a)) / kLanes, last = to > from ? (to - 1 + skipped(a)) / kLanes + 1 : first;
  Work w = work_for(a, n);
  if (next && next->a->kt == a.kt) {
    const AttentionArgs& other = *next->a;
    const int64_t batch = next->pair / other.kv, head = next->pair % other.kv, row = next->first_key();
    with_cache_type(a.kt, [&](auto t) {
      w.end = to;
      w.other_keys = key_row<decltype(t)>(other, batch, head, row);
      w.other_values = value_row<decltype(t)>(other, batch, head, row);
    });
  }
  load_queries(a, b, kv, r0, n, w.q);
  begin(a, kv, r0, n, w.all);
  with_cache_type(a.kt, [&](auto t) {
    for (int64_t block = first; block < last;) {
      int64_t end = (block / kBlocks + 1) * kBlocks;
      end = end < last ? end : last;
      if (attend_stretch<decltype(t)>(a, b, kv, r0, n, block, end, w)) {
        merge(w.all, w.stretch, n, whole_vectors(a.dv));
      }
      block = end;
    }
  });
  finish(a, b, kv, r0, n, w.all);
}

RUNNER_INLINE Softmax part_of(const Plan& p, int64_t pair, int64_t unit) {
  float* at = p.parts + (pair * p.units + unit) * p.part;
  return {at, at + p.rows_kept, at + 2 * p.rows_kept};
}

// One unit of a pair's keys.
inline void unit_job(const AttentionArgs& a, const Plan& p, int64_t pair, int64_t unit) {
  const int64_t b = pair / a.kv, kv = pair % a.kv, at = (p.first / p.per + unit) * p.per, end = at + p.per;
  const int n = (int)p.rows;
  Work w = work_for(a, n);
  load_queries(a, b, kv, 0, n, w.q);
  const Softmax part = part_of(p, pair, unit);
  bool any = false;
  with_cache_type(a.kt, [&](auto t) {
    using T = decltype(t);
    if (p.per == 1) {
      any = attend_block<T>(a, b, kv, 0, n, row_of(a, at), w);
    } else {
      any = attend_stretch<T>(a, b, kv, 0, n, at > p.first ? at : p.first, end < p.last ? end : p.last, w);
    }
  });
  const Softmax& found = p.per == 1 ? w.block : w.stretch;
  for (int64_t r = 0; r < p.rows_kept; ++r) {
    const bool is = any && r < n;
    part.most[r] = is ? found.most[r] : kMinusInf;
    part.total[r] = is ? found.total[r] : 0.0f;
  }
  if (any) memcpy(part.out, found.out, (size_t)(n * whole_vectors(a.dv) * 4));
}

RUNNER_INLINE bool empty(const Softmax& s, int64_t n) {
  for (int64_t r = 0; r < n; ++r) {
    if (s.most[r] != kMinusInf || s.total[r] != 0.0f) return false;
  }
  return true;
}

// What the units of a pair left becomes the result.
inline void merge_job(const AttentionArgs& a, const Plan& p, int64_t pair) {
  const int64_t b = pair / a.kv, kv = pair % a.kv, width = whole_vectors(a.dv);
  const int n = (int)p.rows;
  Work w = work_for(a, n);
  begin(a, kv, 0, n, w.all);
  for (int64_t unit = 0; unit < p.units;) {
    if (p.per == kBlocks) {
      merge(w.all, part_of(p, pair, unit++), n, width);
      continue;
    }
    const int64_t end = ((p.first + unit) / kBlocks + 1) * kBlocks - p.first;
    clear(w.stretch, n, width);
    for (; unit < p.units && unit < end; ++unit) {
      const Softmax part = part_of(p, pair, unit);
      if (!empty(part, n)) merge(w.stretch, part, n, width);
    }
    merge(w.all, w.stretch, n, width);
  }
  finish(a, b, kv, 0, n, w.all);
}

inline void attention(const AttentionArgs* list, int count) {
  constexpr int64_t kJobs = 6;  // for each thread, so that they end together
  Pool& pool = Pool::get();
  Plan* plans = (Plan*)scratch(Slot::partial, count * sizeof(Plan));
  int64_t blocks = 0, floats = 0, jobs = 0;
  for (int i = 0; i < count; ++i) {
    plans[i] = plan_of(list[i]);
    blocks += plans[i].jobs * (plans[i].last - plans[i].first);
  }
  for (int i = 0; i < count; ++i) {
    Plan& p = plans[i];
    if (pool.size() > 1) divide(p, blocks / (kJobs * pool.size()));
    p.before = jobs;
    jobs += p.jobs;
    floats += p.pairs * p.units * p.part;
  }
  float* parts = (float*)scratch(Slot::packed, floats * 4);
  for (int i = 0; i < count; ++i) {
    plans[i].parts = parts;
    parts += plans[i].pairs * plans[i].units * plans[i].part;
  }
  auto plan_with = [&](int64_t job) {
    int i = 0;
    while (i + 1 < count && plans[i + 1].before <= job) ++i;
    return i;
  };
  // Last rows first: under a causal mask they have the most keys, and the short ones then even out the end.
  auto job_at = [&](int i, int64_t at) {
    return Job{list + i, plans + i, at % plans[i].pairs, plans[i].panels - 1 - at / plans[i].pairs};
  };
  pool.parallel_for((int)jobs, [&](int job) {
    const int i = plan_with(job);
    const Plan& p = plans[i];
    const int64_t at = job - p.before;
    if (p.units) return unit_job(list[i], p, at / p.units, at % p.units);
    const int then = job + 1 < jobs ? plan_with(job + 1) : -1;
    if (then < 0 || plans[then].units) return whole_job(job_at(i, at), nullptr);
    const Job next = job_at(then, job + 1 - plans[then].before);
    whole_job(job_at(i, at), &next);
  });
  auto merge_of = [&](int i) {
    for (int64_t pair = 0; plans[i].units && pair < plans[i].pairs; ++pair) merge_job(list[i], plans[i], pair);
  };
  if (count == 1 && plans[0].units * plans[0].part > 16384) {
    pool.parallel_for((int)plans[0].pairs, [&](int pair) { merge_job(list[0], plans[0], pair); });
  } else if (floats > 65536) {
    pool.parallel_for(count, merge_of);
  } else {
    for (int i = 0; i < count; ++i) merge_of(i);
  }
}
