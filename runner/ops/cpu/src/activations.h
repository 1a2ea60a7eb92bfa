// Rows of x as integers, for products with packed weights. Included inside an x86 ISA namespace.
//
// Each group of a row becomes x = scale * code with codes of 16 bits: an error of 2^-16 of the group's largest value.
// In a group with a value of over kLarge times the row's root mean square that would show (logits off by 1.6e-3 of their
// deviation): it gets 8 bits more, the rest: x = scale * (code + rest / 256). Few groups of a row have such a value.
// Where a layer is `coarse`, codes have 8 bits, x = scale * code, and there are no rests: one product instead of two.
// What a row becomes depends on that row alone. One with a NaN or an infinity is noted, and computed in floats.
//
// A step is the values of one row that a 32-bit lane holds: four bytes (AVX-512: a plane of high bytes, one of low
// ones), or two words (AVX2). Rows that are multiplied together, at most kPanelRows, stand side by side, q[step][row];
// of kRowsApart or fewer each stands by itself, with the steps in the order in which a vector of weights has them; and for
// tile registers rows stand below each other in blocks of kTileSteps steps, as a register has them: q[block][row][step].

constexpr int kPanelRows = RUNNER_ISA == 512 ? 12 : 5;
constexpr int kTileRows = 16, kTileSteps = 16;        // what a tile register holds: rows, and steps of each
constexpr int kMostPanelRows = RUNNER_ISA == 512 ? kTileRows : kPanelRows;
constexpr int kStep = RUNNER_ISA == 512 ? 4 : 2;     // values of a row in a 32-bit lane
constexpr int kPlanes = RUNNER_ISA == 512 ? 2 : 1;   // lanes that a code of 16 bits takes
constexpr int kBlock = 128;                          // values that a row's length is filled up to: the largest group
constexpr int kRowsApart = 2;
static_assert(kPanelRows > 2 * kRowsApart);  // or rows that are divided evenly could stand apart
constexpr int kRowsEach = 4;  // rows of weights that few rows of x are multiplied with at a time
constexpr int kRunning = 4;  // sums of a result that run beside each other: group g is added to number g % 4

constexpr float kMostCode = 127.0f * 256.0f;  // so that the high byte fits, rounded
constexpr float kCoarseCode = 127.0f;
constexpr float kLarge = 4.0f;

struct Panel {
  int32_t* q;       // [kPlanes][steps][rows]
  int32_t* rest;    // [steps][rows], filled where `fine` says so
  float* scale;     // [groups][rows]
  float* sum;       // [groups][rows]: of the group's values as they are rounded
  uint16_t* fine;   // [groups + 2]: a bit for each row that has a rest; then in any group; then what is not finite
  int64_t steps, groups;  // as they are filled up, with zeros
  int rows;
  bool coarse;      // codes are the first plane alone
  bool tiled;       // q and rest are [steps / kTileSteps][rows][kTileSteps]
  // Of few rows: q and rest [row][kPlanes + 1][steps], scale and sum [row][groups][kRowsEach], each number repeated.
  RUNNER_INLINE bool apart() const { return rows <= kRowsApart; }
};

RUNNER_INLINE int64_t filled_up(int64_t k) { return (k + kBlock - 1) / kBlock * kBlock; }

RUNNER_INLINE int64_t panel_bytes(const LinearArgs& a, int rows) {
  const int64_t steps = filled_up(a.k) / kStep, groups = (groups_of(a) + 3) / 4 * 4;
  const int64_t numbers = 2 * groups * (rows <= kRowsApart ? kRowsEach : 1);
  return ((kPlanes + 1) * steps + numbers) * rows * 4 + (groups + 2) * 2 / 64 * 64 + 64;
}

RUNNER_INLINE Panel panel_at(const LinearArgs& a, void* block, int rows, bool tiled) {
  Panel p;
  p.groups = (groups_of(a) + 3) / 4 * 4;
  p.steps = filled_up(a.k) / kStep;
  p.rows = rows;
  p.coarse = a.coarse;
  p.tiled = tiled;
  p.q = (int32_t*)block;
  p.rest = p.q + kPlanes * p.steps * (p.apart() ? 1 : rows);
  p.scale = (float*)(p.q + (kPlanes + 1) * p.steps * rows);
  p.sum = p.scale + p.groups * rows * (p.apart() ? kRowsEach : 1);
  p.fine = (uint16_t*)(p.sum + p.groups * rows * (p.apart() ? kRowsEach : 1));
  return p;
}

// Largest magnitude of a group; NaN or infinity where a value is that: magnitudes have the order of their bits.
RUNNER_INLINE float group_range(const float* x, int group) {
#if RUNNER_ISA == 512
  __m512i m = _mm512_setzero_si512();
  for (int i = 0; i < group; i += W) m = _mm512_max_epu32(_mm512_castps_si512(vabs(load(x + i))), m);
  return bits_to_float(_mm512_reduce_max_epu32(m));
#else
  __m256i m = _mm256_setzero_si256();
  for (int i = 0; i < group; i += W) m = _mm256_max_epu32(_mm256_castps_si256(vabs(load(x + i))), m);
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return bits_to_float((uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
#endif
}

RUNNER_INLINE float mean_square(const float* x, int64_t n) {
  VF acc = zero();
  for (int64_t i = 0; i < n; i += W) acc = fma(load(x + i), load(x + i), acc);
  return hsum(acc) / (float)n;
}

// Places the steps of 16 values (AVX-512) or eight: behind each other, or, where the row stands by itself, as a vector of
// weights has them: kVectorBytes of a row, and of each of its lanes the first step, then of each the second, ...
struct Place {
  int32_t* row;
  int steps;   // of a lane of weights
  bool apart;
  RUNNER_INLINE int32_t* operator()(int64_t lane, int step) const {
    return row + (apart ? (lane / W * steps + step) * W + lane % W : lane * steps + step);
  }
};

#if RUNNER_ISA == 512
// Bytes of 16 codes. Four bits: of eight values the even ones, then the odd ones, as the two nibbles of a byte lie.
RUNNER_INLINE void place(__m512i codes, const Place& to, int64_t i) {
  __m128i b = _mm512_cvtepi32_epi8(codes);
  if (to.steps == 1) {
    _mm_storeu_si128((__m128i*)to(i / 4, 0), b);
  } else if (to.apart) {
    b = _mm_shuffle_epi8(b, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    _mm_storel_epi64((__m128i*)to(i / 8, 0), b);
    _mm_storeh_pd((double*)to(i / 8, 1), _mm_castsi128_pd(b));
  } else {
    b = _mm_shuffle_epi8(b, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm_storeu_si128((__m128i*)to(i / 8, 0), b);
  }
}
#else
// Words of eight codes. Four bits: pairs of values four apart; eight bits: two apart, as shifts and masks leave them.
RUNNER_INLINE void place(__m256i codes, const Place& to, int64_t i) {
  __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
  if (to.steps == 2) {
    __m128i l = _mm_unpacklo_epi64(low, high);
    high = _mm_unpackhi_epi64(low, high);
    low = l;
  }
  __m128i pairs = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi32(0xffff)), _mm_slli_epi32(high, 16));
  if (!to.apart) {
    _mm_storeu_si128((__m128i*)to(i / 2 / to.steps, 0), pairs);
    return;
  }
  alignas(16) int32_t four[4];
  _mm_store_si128((__m128i*)four, pairs);
  for (int j = 0; j < 4; ++j) *to(i / 2 / to.steps + j / to.steps, j % to.steps) = four[j];
}
#endif

// 32 values as codes, those from `at` on of a row: to[p] gets plane p; with FINE codes of 24 bits, of which `rest` gets the last 8.
// Returns the codes' sum, in units of the rest with FINE: shifts then meet the same rounded x as the weights do, and the
// rounding error is multiplied by w, which is centred, not by q, which is not: a third of the error.
template <bool FINE>
RUNNER_INLINE int64_t quantise_32(const float* x, int64_t at, float inverse, const Place to[kPlanes], const Place& rest) {
#if RUNNER_ISA == 512
  __m512i total = _mm512_setzero_si512();
  const __m512i half = _mm512_set1_epi32(128);
#pragma GCC unroll 2
  for (int j = 0; j < 32; j += 16) {
    __m512i code = _mm512_cvtps_epi32(load(x + j) * set1(inverse));
    total = _mm512_add_epi32(total, code);
    if (FINE) {
      place(code, rest, at + j);  // modulo 256: what the others leave
      code = _mm512_srai_epi32(_mm512_add_epi32(code, half), 8);
    }
    place(_mm512_srai_epi32(_mm512_add_epi32(code, half), 8), to[0], at + j);
    place(code, to[kPlanes - 1], at + j);
  }
  return _mm512_reduce_add_epi32(total);
#else
  __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int j = 0; j < 32; j += 8) {
    __m256i code = _mm256_cvtps_epi32(load(x + j) * set1(inverse));
    total = _mm256_add_epi32(total, code);
    if (FINE) {
      __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(code, _mm256_set1_epi32(128)), 8);
      place(_mm256_sub_epi32(code, _mm256_slli_epi32(upper, 8)), rest, at + j);
      code = upper;
    }
    place(code, to[0], at + j);
  }
  __m128i pair = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  pair = _mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
#endif
}

// 32 values as codes of 8 bits, likewise, to the first plane. Returns the codes' sum.
RUNNER_INLINE int64_t quantise_32_coarsely(const float* x, int64_t at, float inverse, const Place& to) {
#if RUNNER_ISA == 512
  __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int j = 0; j < 32; j += 16) {
    __m512i code = _mm512_cvtps_epi32(load(x + j) * set1(inverse));
    total = _mm512_add_epi32(total, code);
    place(code, to, at + j);
  }
  return _mm512_reduce_add_epi32(total);
#else
  return quantise_32<false>(x, at, inverse, &to, to);  // a code has a word of its own, of whatever size
#endif
}

// Sets a row's bit, which other threads may do for other groups.
RUNNER_INLINE void note_row(uint16_t& bits, int row) { __atomic_fetch_or(&bits, (uint16_t)(1u << row), __ATOMIC_RELAXED); }

// Of row x of a.k values those of blocks [first, last): their scales and sums into the panel, their codes to `line`,
// [kPlanes + 1][steps].
inline void quantise_row(const LinearArgs& a, const float* x, int64_t first, int64_t last, const Panel& to, int row,
                         int32_t* line) {
  const float limit = kLarge * kLarge * mean_square(x, a.k);
  const int64_t all = groups_of(a), each = kBlock / a.group, behind = last * each;
  const int64_t groups = behind < all ? behind : all;
  auto note = [&](int64_t g, float scale, float sum) {
    if (to.apart()) {
      for (int i = 0; i < kRowsEach; ++i) {
        to.scale[(row * to.groups + g) * kRowsEach + i] = scale;
        to.sum[(row * to.groups + g) * kRowsEach + i] = sum;
      }
    } else {
      to.scale[g * to.rows + row] = scale;
      to.sum[g * to.rows + row] = sum;
    }
  };
  const int steps = (a.bits == 4 ? 8 : 4) / kStep;
  Place places[kPlanes];
  for (int p = 0; p < kPlanes; ++p) places[p] = {line + p * to.steps, steps, to.apart()};
  const Place rest{line + kPlanes * to.steps, steps, to.apart()};
  if (last * kBlock > a.k) {
    for (int p = 0; p < kPlanes; ++p) memset(line + (p + 1) * to.steps - kBlock / kStep, 0, kBlock / kStep * 4);
  }
  // By itself a row's rests are added for groups that have none, too.
  if (to.apart()) memset(line + kPlanes * to.steps, 0, (size_t)(to.steps * 4));
  constexpr int kAtOnce = 16;  // groups whose divisions fill vectors
  for (int64_t from = first * each; from < groups; from += kAtOnce) {
    const int count = (int)(groups - from < kAtOnce ? groups - from : kAtOnce);
    alignas(64) float most[kAtOnce] = {}, codes_of[kAtOnce], inverse[kAtOnce], unit[kAtOnce];
    for (int j = 0; j < count; ++j) {
      most[j] = group_range(x + (from + j) * a.group, a.group);
      if (!(most[j] <= 3.4028235e38f)) {
        note_row(to.fine[to.groups + 1], row);
        return;
      }
    }
    for (int j = 0; j < kAtOnce; ++j) {
      codes_of[j] = most[j] * most[j] > limit ? kMostCode * 256.0f : kMostCode;
      if (a.coarse) codes_of[j] = kCoarseCode;
      const float quotient = codes_of[j] / most[j];
      inverse[j] = most[j] > 1e-30f ? quotient : 0.0f;
      unit[j] = most[j] / codes_of[j];
    }
    for (int j = 0; j < count; ++j) {
      const int64_t g = from + j;
      const bool fine = codes_of[j] > kMostCode;
      int64_t codes = 0;
      for (int64_t at = g * a.group; at < (g + 1) * a.group; at += 32) {
        codes += a.coarse ? quantise_32_coarsely(x + at, at, inverse[j], places[0])
                 : fine   ? quantise_32<true>(x + at, at, inverse[j], places, rest)
                          : quantise_32<false>(x + at, at, inverse[j], places, rest);
      }
      note(g, most[j] / (a.coarse ? kCoarseCode : kMostCode), unit[j] * (float)codes);
      if (fine) to.fine[g] |= (uint16_t)(1u << row), note_row(to.fine[to.groups], row);
    }
  }
  for (int64_t g = groups; groups == all && g < to.groups; ++g) note(g, 0.0f, 0.0f);
}

// to[j * rows + i * kTileSteps + s] = from[i * length + j + s] for j in [first, last), multiples of kTileSteps.
RUNNER_INLINE void in_blocks(const int32_t* from, int64_t length, int64_t first, int64_t last, int rows, int32_t* to) {
  for (int64_t j = first; j < last; j += kTileSteps) {
    for (int i = 0; i < rows; ++i) memcpy(to + j * rows + i * kTileSteps, from + i * length + j, kTileSteps * 4);
  }
}

// to[j * rows + i] = from[i * length + j] for j in [first, last), multiples of W, and at most kPanelRows rows.
RUNNER_INLINE void side_by_side(const int32_t* from, int64_t length, int64_t first, int64_t last, int rows, int32_t* to) {
#if RUNNER_ISA == 512
  const __mmask16 some = (__mmask16)((1u << rows) - 1);
  for (int64_t j = first; j < last; j += 16) {
    VF r[16];  // rows that there are not repeat the last one; their lanes are not stored
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load((const float*)from + (i < rows ? i : rows - 1) * length + j);
    turn(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_mask_storeu_ps(to + (j + i) * rows, some, r[i]);
  }
#else
  for (int64_t j = first; j < last; ++j) {
    for (int i = 0; i < rows; ++i) to[j * rows + i] = from[i * length + j];
  }
#endif
}

// Blocks [begin, end) of the rows [first, first + to.rows) of x, into a panel whose `fine` is cleared.
inline void quantise_blocks(const LinearArgs& a, int64_t first, int64_t begin, int64_t end, const Panel& to) {
  const int64_t length = (kPlanes + 1) * to.steps;
  int32_t* lines = to.apart() ? to.q : (int32_t*)scratch(Slot::tile, kMostPanelRows * length * 4);
  for (int r = 0; r < to.rows; ++r) {
    const float* x = (const float*)a.x + (first + r) * a.k;
    if (a.xt != DType::f32) {
      float* line = (float*)scratch(Slot::row, a.k * 4);
      with_type(a.xt, [&](auto t) {
        using T = decltype(t);
        to_float<T>((const typename T::S*)a.x + (first + r) * a.k, line, a.k);
      });
      x = line;
    }
    quantise_row(a, x, begin, end, to, r, lines + r * length);
  }
  if (to.apart()) return;
  constexpr int64_t kSteps = kBlock / kStep;
  for (int p = 0; p <= kPlanes; ++p) {
    if (p && a.coarse) break;
    // Few rows have rests.
    if (p == kPlanes && !__atomic_load_n(to.fine + to.groups, __ATOMIC_RELAXED)) break;
    const int64_t from = p * to.steps + begin * kSteps, behind = p * to.steps + end * kSteps;
    if (to.tiled) {
      in_blocks(lines, length, from, behind, to.rows, to.q);
    } else {
      side_by_side(lines, length, from, behind, to.rows, to.q);
    }
  }
}

RUNNER_INLINE int64_t blocks_of(const LinearArgs& a) { return filled_up(a.k) / kBlock; }

inline void clear_fine(const Panel& to) { memset(to.fine, 0, (size_t)(to.groups + 2) * 2); }

inline void quantise_panel(const LinearArgs& a, int64_t first, const Panel& to) {
  clear_fine(to);
  quantise_blocks(a, first, 0, blocks_of(a), to);
}
