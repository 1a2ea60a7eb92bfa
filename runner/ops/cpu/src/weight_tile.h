// Packed weights unpacked for integer products. Included inside an x86 ISA namespace, after activations.h.
//
// W rows of a matrix, a strip, are turned around: a vector holds one step of each, so that a lane sums up one row's
// products, exactly and in the order of the groups, and nothing has to be added across lanes. Codes become bytes
// (AVX-512) or words (AVX2), groups of W scales and shifts likewise one vector each.

constexpr int kStrips = 2;                                 // of a tile
constexpr int kTileValues = RUNNER_ISA == 512 ? 1024 : 512;  // of a row, at most

constexpr int kTileGroups = kTileValues / 32 + W;           // whole vectors of scales are written

struct Tile {
  int32_t* q;            // [kStrips][kTileValues / kStep][W]
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

// Rows of one array, `stride` items apart; a strip's rows behind the last one repeat it. Whole vectors are read, past
// the end of what is wanted, unless NEAR_END: then memory may end there.
template <class S>
struct Rows {
  const S* first;
  int64_t stride;
  int last;
  template <bool NEAR_END>
  RUNNER_INLINE const S* at(int i) const { return first + (!NEAR_END || i < last ? i : last) * stride; }
};

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

// The codes of W rows, `bytes` bytes of each.
template <int BITS, bool FP4, bool NEAR_END>
RUNNER_INLINE void unpack_codes(const Rows<uint8_t>& w, int64_t bytes, int32_t* to) {
  for (int64_t c = 0; c < bytes; c += kVectorBytes) {
    VF r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const uint8_t* p = w.at<NEAR_END>(i) + c;
      if (NEAR_END && bytes - c < kVectorBytes) {
        alignas(64) uint8_t some[kVectorBytes] = {};
        for (int64_t j = 0; j < bytes - c; ++j) some[j] = p[j];
        r[i] = load((const float*)some);
      } else {
        r[i] = load((const float*)p);
      }
    }
    turn(r);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      VI32 steps[kLaneSteps<BITS>];
      spread<BITS, FP4>(as_integers(r[i]), steps);
#pragma GCC unroll 4
      for (int j = 0; j < kLaneSteps<BITS>; ++j, to += W) memcpy(to, &steps[j], sizeof steps[j]);
    }
  }
}

// Groups of a row that a vector of scales holds: two in a lane where they are numbers of 16 bits.
template <class T>
constexpr int kScalesAtOnce = W * (sizeof(typename T::S) == 2 ? 2 : 1);

// Scales of W rows, [groups][W], from `count` of each row; times `factor`, which is 1 for numbers of 16 bits.
template <class T, bool NEAR_END>
RUNNER_INLINE void unpack_scales(const Rows<typename T::S>& s, int64_t count, float factor, float* to) {
  constexpr int kEach = kScalesAtOnce<T>;
  using S = typename T::S;
  for (int64_t g = 0; g < count; g += kEach) {
    VF r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      auto read = [&](const S* p) {
        if constexpr (kEach > W) return load((const float*)p);
        return T::load_v(p) * set1(factor);
      };
      const S* p = s.template at<NEAR_END>(i) + g;
      if constexpr (NEAR_END) {
        alignas(64) S some[kEach] = {};
        for (int64_t j = 0; j < kEach && j < count - g; ++j) some[j] = p[j];
        r[i] = read(some);
      } else {
        r[i] = read(p);
      }
    }
    turn(r);
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) {
      if constexpr (kEach > W) {
        if (g + 2 * i >= count) break;
        store(to + (g + 2 * i) * W, T::low(r[i]));
        store(to + (g + 2 * i + 1) * W, T::high(r[i]));
      } else {
        store(to + (g + i) * W, r[i]);
      }
    }
  }
}

// Rows [first, first + W) of the matrix, the last of which is number `last` of them, from column k0 on, `depth` values of
// each, to strip `s`. Not inlined: what one way of reading needs would be computed for the other, too.
template <bool NEAR_END>
__attribute__((noinline)) void unpack_strip(const LinearArgs& a, int64_t first, int last, int64_t k0, int64_t depth, int s,
                                            const Tile& to) {
  const int64_t row_bytes = a.k * a.bits / 8, groups = groups_of(a), bytes = depth * a.bits / 8;
  int32_t* q = to.q + s * (kTileValues / kStep) * W;
  const Rows<uint8_t> rows{(const uint8_t*)a.w + first * row_bytes + k0 * a.bits / 8, row_bytes, last};
  if (a.bits == 8) {
    unpack_codes<8, false, NEAR_END>(rows, bytes, q);
  } else if (a.bits == 4 && a.format == Format::affine) {
    unpack_codes<4, false, NEAR_END>(rows, bytes, q);
  } else if (a.bits == 4) {
    unpack_codes<4, true, NEAR_END>(rows, bytes, q);
  } else {
    uint8_t* codes = (uint8_t*)scratch(Slot::codes, W * kTileValues + 64);
    for (int i = 0; i < W; ++i) codes_to_bytes(rows.at<true>(i), a.bits, depth, codes + i * depth);
    unpack_codes<8, false, false>(Rows<uint8_t>{codes, depth, W - 1}, depth, q);
  }
  const int64_t at = first * groups + k0 / a.group, count = depth / a.group;
  float *scale = to.scale + s * kTileGroups * W, *shift = to.shift + s * kTileGroups * W;
  if (a.format == Format::mxfp4) {
    const Rows<uint8_t> scales{(const uint8_t*)a.scales + at, groups, last};
    unpack_scales<E8M0, NEAR_END>(scales, count, 0.5f, scale);
    unpack_scales<E8M0, NEAR_END>(scales, count, -0.5f * kFp4Zero, shift);
  } else {
    with_type(a.st, [&](auto t) {
      using T = decltype(t);
      using S = typename T::S;
      unpack_scales<T, NEAR_END>(Rows<S>{(const S*)a.scales + at, groups, last}, count, 1.0f, scale);
      unpack_scales<T, NEAR_END>(Rows<S>{(const S*)a.shifts + at, groups, last}, count, 1.0f, shift);
    });
  }
}

// Rows [n, n + kStrips * W) of the matrix from column k0 on, `depth` values of each.
inline void unpack_tile(const LinearArgs& a, int64_t n, int64_t k0, int64_t depth, const Tile& to) {
  for (int s = 0; s < kStrips && n + s * W < a.n; ++s) {
    const int64_t first = n + s * W, behind = a.n - first - W;
    const int last = (int)(behind < 0 ? a.n - first : W) - 1;
    // Past the last row of a strip there are others to read over, but for the matrix's last strips.
    if (behind * (a.k * a.bits / 8) < 64 || behind * groups_of(a) < 2 * W) {
      unpack_strip<true>(a, first, last, k0, depth, s, to);
    } else {
      unpack_strip<false>(a, first, last, k0, depth, s, to);
    }
  }
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
