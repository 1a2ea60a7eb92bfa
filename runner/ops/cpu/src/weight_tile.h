// Packed weights unpacked for integer products. Included inside an x86 ISA namespace, after activations.h.
//
// W rows of a matrix, a strip, are turned around: a vector holds one step of each, so that a lane sums up one row's
// products, exactly and in the order of the groups, and nothing has to be added across lanes. Codes become bytes
// (AVX-512) or words (AVX2), groups of W scales and shifts likewise one vector each. Codes of four bits stay as they are
// with AVX-512's products by vectors, which leave ports free that draw them apart: half the stores, half the cache.

constexpr int kStrips = 2;                                 // of a tile
constexpr int kTileValues = RUNNER_ISA == 512 ? 1024 : 512;  // of a row, at most

constexpr int kTileGroups = kTileValues / 32 + W;           // whole vectors of scales are written

struct Tile {
  int32_t* q;            // [kStrips][kTileValues / kStep][W], or of two steps in each lane [kStrips][kTileValues / kStep / 2][W]
  float *scale, *shift;  // [kStrips][kTileGroups][W]
};

constexpr int64_t kTileBytes = kStrips * W * 4 * (kTileValues / kStep + 2 * kTileGroups);

RUNNER_INLINE Tile tile_at(void* block) {
  Tile t;
  t.q = (int32_t*)block;
  t.scale = (float*)(t.q + kStrips * W * (kTileValues / kStep));
  t.shift = t.scale + kStrips * W * kTileGroups;
  return t;
}

#if RUNNER_ISA == 512
using VI32 = __m512i;
RUNNER_INLINE VI32 as_integers(VF v) { return _mm512_castps_si512(v); }
#else
using VI32 = __m256i;
RUNNER_INLINE VI32 as_integers(VF v) { return _mm256_castps_si256(v); }
#endif
constexpr int kVectorBytes = 4 * W;

// Steps that a lane of packed weights holds: eight nibbles, or four codes of a byte each.
template <int BITS>
constexpr int kLaneSteps = (BITS == 4 ? 8 : 4) / kStep;

// Whether a tile's lanes hold two steps each, for products by vectors.
RUNNER_INLINE bool paired_steps(const LinearArgs& a) {
  return RUNNER_ISA == 512 && a.bits == 4 && a.format == Format::affine;
}

// Vectors of single steps from one with four bytes in each lane.
template <int BITS, bool FP4>
RUNNER_INLINE void spread(VI32 v, VI32 to[kLaneSteps<BITS>]) {
#if RUNNER_ISA == 512
  if constexpr (BITS == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    to[0] = _mm512_and_si512(v, nibble);
    to[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    if constexpr (FP4) {
      const __m512i value = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kFp4));
      to[0] = _mm512_shuffle_epi8(value, to[0]);
      to[1] = _mm512_shuffle_epi8(value, to[1]);
    }
  } else {
    to[0] = v;
  }
#else
  if constexpr (BITS == 4) {
    const __m256i nibble = _mm256_set1_epi16(15);
    to[0] = _mm256_and_si256(v, nibble);
    to[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    to[2] = _mm256_and_si256(_mm256_srli_epi16(v, 8), nibble);
    to[3] = _mm256_srli_epi16(v, 12);
    if constexpr (FP4) {
      // The upper byte of a word, zero, would become the value of code 0.
      const __m256i value = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kFp4));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) to[i] = _mm256_and_si256(_mm256_shuffle_epi8(value, to[i]), _mm256_set1_epi16(255));
    }
  } else {
    to[0] = _mm256_and_si256(v, _mm256_set1_epi16(255));
    to[1] = _mm256_srli_epi16(v, 8);
  }
#endif
}

// Rows of one array, `stride` bytes apart.
struct Rows {
  const uint8_t* first;
  int64_t stride;
};

// Copies of the first `bytes` bytes of `count` rows that are there only up to row `last`, which stands for those behind it.
// Past each copy there is memory to read over.
inline Rows copied_rows(const Rows& rows, int count, int last, int64_t bytes) {
  const int64_t stride = (bytes + 15) / 16 * 16;
  uint8_t* copy = (uint8_t*)scratch(Slot::codes, (size_t)(count * stride));
  for (int i = 0; i < count; ++i) {
    memcpy(copy + i * stride, rows.first + (i < last ? i : last) * rows.stride, (size_t)bytes);
  }
  return {copy, stride};
}

// Calls f(s, i, r) for each 16 bytes of N strips' rows: r[j] holds the j-th lane of piece i of each row of strip s. Reads
// whole pieces, alone or in pairs, which never lie in two lines of the cache where rows begin at multiples of as much.
template <int N, class F>
RUNNER_INLINE void by_columns(const Rows& rows, int64_t bytes, F&& f) {
  const int64_t stride = rows.stride;
  const uint8_t* four[N * W / 4];
  for (int i = 0; i < N * W / 4; ++i) four[i] = rows.first + 4 * i * stride;
  int64_t i = 0;
#if RUNNER_ISA == 512
  for (; (i + 2) * 16 <= bytes; i += 2) {
#pragma GCC unroll 2
    for (int s = 0; s < N; ++s) {
      VF r[8];
      turn_eight_columns([&](int j) {
        return _mm256_loadu_ps((const float*)(four[s * (W / 4) + j / 4] + j % 4 * stride + i * 16));
      }, r);
      f(s, i, r);
      f(s, i + 1, r + 4);
    }
  }
#endif
  for (; i * 16 < bytes; ++i) {
#pragma GCC unroll 2
    for (int s = 0; s < N; ++s) {
      VF r[4];
      turn_columns([&](int j) {
        return _mm_loadu_ps((const float*)(four[s * (W / 4) + j / 4] + j % 4 * stride + i * 16));
      }, r);
      f(s, i, r);
    }
  }
}

// Memory that is wanted soon, asked for a few lines at a time while something else is computed.
class Ahead {
 public:
  // `rows` pieces of `bytes` bytes, `stride` apart; at most three times.
  RUNNER_INLINE void add(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
    if (bytes == stride) bytes *= rows, rows = 1;
    streams_[count_++] = {(const char*)first, rows, bytes, stride, 0};
    lines_ += rows * ((bytes + 63) / 64);
  }
  // Divides all among so many calls of `some`.
  RUNNER_INLINE void divide(int64_t calls) { each_ = (lines_ + calls - 1) / calls; }
  RUNNER_INLINE void some() {
    for (int64_t wanted = each_; wanted > 0 && at_ < count_;) {
      Stream& s = streams_[at_];
      const int64_t left = (s.bytes - s.at + 63) / 64, now = wanted < left ? wanted : left;
      for (const char *p = s.row + s.at, *end = p + now * 64; p < end; p += 64) prefetch(p);
      wanted -= now;
      s.at += now * 64;
      if (now < left) return;
      s.at = 0, s.row += s.stride;
      if (--s.rows == 0) ++at_;
    }
  }

 private:
  struct Stream {
    const char* row;
    int64_t rows, bytes, stride, at;
  };
  Stream streams_[3];
  int count_ = 0, at_ = 0;
  int64_t lines_ = 0, each_ = 0;
};

constexpr int kPiecesAhead = 4;  // 16 bytes of each row: unpacked in about the time that a group is multiplied in

// The codes of N strips' rows, `bytes` bytes of each; PAIRED: two steps in each lane.
template <int N, int BITS, bool FP4, bool PAIRED = false>
RUNNER_INLINE void unpack_codes(const Rows& rows, int64_t bytes, Ahead& ahead, int32_t* to) {
  constexpr int S = PAIRED ? 1 : kLaneSteps<BITS>;
  constexpr int kStrip = kTileValues / kStep * S / kLaneSteps<BITS>;
  by_columns<N>(rows, bytes, [&](int s, int64_t piece, const VF r[4]) {
    if (s == 0 && piece % kPiecesAhead == 0) ahead.some();
    int32_t* at = to + (s * kStrip + piece * 4 * S) * W;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      VI32 steps[S];
      if constexpr (PAIRED) {
        steps[0] = as_integers(r[i]);
      } else {
        spread<BITS, FP4>(as_integers(r[i]), steps);
      }
#pragma GCC unroll 4
      for (int j = 0; j < S; ++j) memcpy(at + (i * S + j) * W, &steps[j], sizeof steps[j]);
    }
  });
}

// `count` scales of N strips' rows; those of the last 16 bytes are all written.
template <int N, class T>
RUNNER_INLINE void unpack_scales(const Rows& rows, int64_t count, float* to) {
  constexpr int kItem = sizeof(typename T::S), kLane = 4 / kItem;  // numbers of a lane
  by_columns<N>(rows, count * kItem, [&](int s, int64_t piece, const VF r[4]) {
    float* at = to + (s * kTileGroups + piece * 4 * kLane) * W;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (kLane == 2) {
        store(at + 2 * i * W, T::low(r[i]));
        store(at + (2 * i + 1) * W, T::high(r[i]));
      } else {
        store(at + i * W, r[i]);
      }
    }
  });
}

// N strips of rows [first, ...) of the matrix, the last of which is number `last` of them, from column k0 on, `depth`
// values of each.
template <int N>
void unpack_strips(const LinearArgs& a, int64_t first, int last, int64_t k0, int64_t depth, bool paired, Ahead& ahead,
                   const Tile& to) {
  constexpr int kRows = N * W;
  const int64_t row_bytes = a.k * a.bits / 8, groups = groups_of(a), bytes = depth * a.bits / 8;
  Rows rows{(const uint8_t*)a.w + first * row_bytes + k0 * a.bits / 8, row_bytes};
  if (last < kRows - 1) rows = copied_rows(rows, kRows, last, bytes);
  if (a.bits == 8) {
    unpack_codes<N, 8, false>(rows, bytes, ahead, to.q);
  } else if (paired) {
    unpack_codes<N, 4, false, true>(rows, bytes, ahead, to.q);
  } else if (a.bits == 4 && a.format == Format::affine) {
    unpack_codes<N, 4, false>(rows, bytes, ahead, to.q);
  } else if (a.bits == 4) {
    unpack_codes<N, 4, true>(rows, bytes, ahead, to.q);
  } else {
    uint8_t* codes = (uint8_t*)scratch(Slot::spread, kRows * kTileValues);
    for (int i = 0; i < kRows; ++i) codes_to_bytes(rows.first + i * rows.stride, a.bits, depth, codes + i * depth);
    unpack_codes<N, 8, false>(Rows{codes, depth}, depth, ahead, to.q);
  }
  const int64_t at = first * groups + k0 / a.group, count = depth / a.group;
  if (a.format == Format::mxfp4) {
    float* halves = (float*)scratch(Slot::spread, kRows * kTileGroups * 4);
    for (int i = 0; i < kRows; ++i) {
      const uint8_t* scales = (const uint8_t*)a.scales + at + (i < last ? i : last) * groups;
      for (int64_t g = 0; g < count; ++g) halves[i * kTileGroups + g] = 0.5f * E8M0::to(scales[g]);
    }
    unpack_scales<N, F32>(Rows{(const uint8_t*)halves, kTileGroups * 4}, count, to.scale);
    for (int64_t i = 0; i < N * kTileGroups * W; i += W) store(to.shift + i, load(to.scale + i) * set1(-kFp4Zero));
    return;
  }
  with_type(a.st, [&](auto t) {
    using T = decltype(t);
    constexpr int64_t kItem = sizeof(typename T::S);
    // Behind the last row of the matrix there may be nothing to read over.
    const bool near_end = (a.n - first - kRows) * groups * kItem < 16;
    auto unpack = [&](const void* from, float* numbers) {
      Rows of{(const uint8_t*)from + at * kItem, groups * kItem};
      if (near_end) of = copied_rows(of, kRows, last, count * kItem);
      unpack_scales<N, T>(of, count, numbers);
    };
    unpack(a.scales, to.scale);
    unpack(a.shifts, to.shift);
  });
}

// Rows [n, n + kStrips * W) of the matrix from column k0 on, `depth` values of each; `paired`: two steps in each lane.
inline void unpack_tile(const LinearArgs& a, int64_t n, int64_t k0, int64_t depth, bool paired, Ahead& ahead, const Tile& to) {
  const int64_t rows = a.n - n;
  if (rows <= W) return unpack_strips<1>(a, n, (int)rows - 1, k0, depth, paired, ahead, to);
  unpack_strips<kStrips>(a, n, (int)(rows < kStrips * W ? rows : kStrips * W) - 1, k0, depth, paired, ahead, to);
}

// The memory of what `unpack_tile` reads.
RUNNER_INLINE void add_tile_memory(const LinearArgs& a, int64_t n, int64_t k0, int64_t depth, Ahead& ahead) {
  const int64_t rows = a.n - n < kStrips * W ? a.n - n : kStrips * W, row_bytes = a.k * a.bits / 8;
  if (rows <= 0) return;
  ahead.add((const char*)a.w + n * row_bytes + k0 * a.bits / 8, rows, depth * a.bits / 8, row_bytes);
  if (k0 > 0) return;  // scales are there with those of the first columns
  const int64_t numbers = groups_of(a) * (a.format == Format::mxfp4 ? 1 : size_of(a.st));
  ahead.add((const char*)a.scales + n * numbers, rows, numbers, numbers);
  if (a.format == Format::affine) ahead.add((const char*)a.shifts + n * numbers, rows, numbers, numbers);
}
