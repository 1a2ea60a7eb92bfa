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
// the end of what is wanted, unless `near_end`: then memory may end there.
template <class S>
struct Rows {
  const S* first;
  int64_t stride;
  int last;
  bool near_end;
  RUNNER_INLINE const S* at(int i) const { return first + (i < last ? i : last) * stride; }
};

// Asks for the lines of coming rows one after the other, as they lie: the hardware follows a stream, not W of them.
struct Ahead {
  const uint8_t* row;
  int64_t stride, bytes, at;
  RUNNER_INLINE void next() {
    prefetch(row + at);
    at += 64;
    if (at >= bytes) at = 0, row += stride;
  }
};

// The codes of W rows, `bytes` bytes of each.
template <int BITS, bool FP4, bool NEAR_END>
RUNNER_INLINE void unpack_codes(const Rows<uint8_t>& w, int64_t bytes, Ahead& ahead, int32_t* to) {
  for (int64_t c = 0; c < bytes; c += kVectorBytes) {
    VF r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const uint8_t* p = (NEAR_END ? w.at(i) : w.first + i * w.stride) + c;
      if (NEAR_END && bytes - c < kVectorBytes) {
        alignas(64) uint8_t some[kVectorBytes] = {};
        for (int64_t j = 0; j < bytes - c; ++j) some[j] = p[j];
        r[i] = load((const float*)some);
      } else {
        r[i] = load((const float*)p);
      }
      if (c % 64 == 0) ahead.next();
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

template <int BITS, bool FP4>
RUNNER_INLINE void unpack_codes(const Rows<uint8_t>& w, int64_t bytes, Ahead& ahead, int32_t* to) {
  if (w.near_end) return unpack_codes<BITS, FP4, true>(w, bytes, ahead, to);
  unpack_codes<BITS, FP4, false>(w, bytes, ahead, to);
}

// Scales of W rows, [groups][W], from `count` of each row; times `factor`.
template <class T>
RUNNER_INLINE void unpack_scales(const Rows<typename T::S>& s, int64_t count, float factor, float* to) {
  for (int64_t g = 0; g < count; g += W) {
    VF r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const auto* p = s.at(i) + g;
      if (s.near_end) {
        alignas(64) typename T::S some[W] = {};
        for (int64_t j = 0; j < W && j < count - g; ++j) some[j] = p[j];
        r[i] = T::load_v(some) * set1(factor);
      } else {
        r[i] = T::load_v(p) * set1(factor);
      }
    }
    turn(r);
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) store(to + (g + i) * W, r[i]);
  }
}

// Rows [n, n + kStrips * W) of the matrix from column k0 on, `depth` values of each.
inline void unpack_tile(const LinearArgs& a, int64_t n, int64_t k0, int64_t depth, const Tile& to) {
  const int64_t row_bytes = a.k * a.bits / 8, groups = groups_of(a);
  for (int s = 0; s < kStrips && n + s * W < a.n; ++s) {
    const int64_t first = n + s * W;
    const int last = (int)(a.n - first < W ? a.n - first : W) - 1;
    // Past the last row of a strip there are others to read over, but for the matrix's last strips.
    const bool near_end = (a.n - first - W) * row_bytes < 64 || (a.n - first - W) * groups < W;
    const uint8_t* w = (const uint8_t*)a.w + first * row_bytes + k0 * a.bits / 8;
    int32_t* q = to.q + s * (kTileValues / kStep) * W;
    // The rows go on, or end with this tile: then the next strips follow.
    const bool ends = k0 + depth == a.k;
    const int64_t bytes = depth * a.bits / 8;
    Ahead ahead{ends ? (const uint8_t*)a.w + (first + kStrips * W) * row_bytes : w + bytes, row_bytes, bytes, 0};
    if (ends && k0 == 0) ahead.bytes = INT64_MAX;  // whole rows, one after the other
    const Rows<uint8_t> rows{w, row_bytes, last, near_end};
    if (a.bits == 8) {
      unpack_codes<8, false>(rows, bytes, ahead, q);
    } else if (a.bits == 4 && a.format == Format::affine) {
      unpack_codes<4, false>(rows, bytes, ahead, q);
    } else if (a.bits == 4) {
      unpack_codes<4, true>(rows, bytes, ahead, q);
    } else {
      uint8_t* codes = (uint8_t*)scratch(Slot::codes, W * kTileValues + 64);
      for (int i = 0; i < W; ++i) codes_to_bytes(rows.at(i), a.bits, depth, codes + i * depth);
      unpack_codes<8, false>(Rows<uint8_t>{codes, depth, W - 1, false}, depth, ahead, q);
    }
    const int64_t at = first * groups + k0 / a.group, count = depth / a.group;
    float *scale = to.scale + s * kTileGroups * W, *shift = to.shift + s * kTileGroups * W;
    if (a.format == Format::mxfp4) {
      const Rows<uint8_t> scales{(const uint8_t*)a.scales + at, groups, last, near_end};
      unpack_scales<E8M0>(scales, count, 0.5f, scale);
      unpack_scales<E8M0>(scales, count, -0.5f * kFp4Zero, shift);
    } else {
      with_type(a.st, [&](auto t) {
        using T = decltype(t);
        using S = typename T::S;
        unpack_scales<T>(Rows<S>{(const S*)a.scales + at, groups, last, near_end}, count, 1.0f, scale);
        unpack_scales<T>(Rows<S>{(const S*)a.shifts + at, groups, last, near_end}, count, 1.0f, shift);
      });
    }
  }
}
