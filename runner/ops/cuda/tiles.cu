// Tiles of the tensor core: packed or plain rows of weights, 16 at a time, times up to 32 vectors of 16-bit numbers. The
// planner puts its constants and `forms.cu` before this text.
#pragma nv_diag_suppress 177
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// What came before must have ended, and be seen, before anything of it is read or overwritten. Weights may be read
// before: the next kernel is started early.
#if __CUDA_ARCH__ >= 900
DI void join() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DI void next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DI void join() {}
DI void next() {}
#endif

#ifdef __CUDACC__  // as in forms.cu
// Two numbers of 16 bits in a word, the first in the lower half.
DI unsigned pack(float a, float b) {
  unsigned u;
  if (XT == 1) asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(u) : "f"(b), "f"(a));
  else asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(u) : "f"(b), "f"(a));
  return u;
}
DI void core(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  if (XT == 1) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DI unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  if (XT == 1) asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DI uint4 stream(const char* p) {
  uint4 u;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "l"(p));
  return u;
}
#endif
DI unsigned short narrow(float a) { return (unsigned short)pack(a, 0.f); }
DI float rounded(float a) { float v, w; two<XT>(pack(a, 0.f), v, w); return v; }
DI float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
  return v;
}
// ---- What products multiply: 16-bit vectors in the order in which a lane of the tensor core reads them.
//
// A lane holds 16 bytes of a row's weights: 32 columns of 4 bits, 16 of 8, or 8 plain ones. Four lanes share a row, so
// that a block has KB columns. Units of 8 columns lie as (block of KB, unit of the lane, row within the tile, lane).
template <int BITS> struct Form { static constexpr int KB = BITS == 4 ? 128 : BITS == 8 ? 64 : 32, J = KB / 32; };
template <int BITS, int K> DI long unit_at(int row, int unit, int width) {  // `width`: rows of a tile, 8 or 1
  typedef Form<BITS> F;
  constexpr int PER = F::KB / 8;
  const int kb = unit / PER, t = unit % PER / F::J, j = unit % F::J;
  return ((((long)(row / width) * (K / F::KB) + kb) * F::J + j) * width + row % width) * 4 + t;
}
// The place of a column within its unit: nibbles of a word come in pairs (0, 4), (1, 5), (2, 6), (3, 7).
template <int BITS> DI int place(int i) { return BITS == 4 ? (i & 3) * 2 + (i >> 2) : i; }
template <int BITS, int K> DI void put(char* x, int row, int column, float v, int width) {
  ((unsigned short*)x)[unit_at<BITS, K>(row, column >> 3, width) * 8 + place<BITS>(column & 7)] = narrow(v);
}
template <int BITS> DI uint4 unit_of(const float (&v)[8]) {
  if (BITS == 4) return make_uint4(pack(v[0], v[4]), pack(v[1], v[5]), pack(v[2], v[6]), pack(v[3], v[7]));
  return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

DI unsigned word_of(const uint4& u, int i) { return i == 0 ? u.x : i == 1 ? u.y : i == 2 ? u.z : u.w; }

// 16 bytes of two rows' weights, 8 rows apart, and their group's scale and bias.
struct Piece { uint4 w[2]; unsigned short s[2], z[2]; };  // scales of 8 bits: of 32 columns, or of twice 16

// A tile of 16 rows of weights, as a lane sees it. `row` is clamped: what is read beyond the matrix is not written.
template <int BITS, int G, int S, int K> struct Tile {
  static constexpr int PER_ROW = BITS ? K / G * Scale<S>::B : 0;  // bytes of a row's scales
  const char *w[2], *s[2], *z[2];
  DI void begin(const void* weight, const void* scales, const void* biases, long row, long rows, int t) {
    constexpr int BYTES = K * (BITS ? BITS : 16) / 8;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const long r = min(row + 8 * e, rows - 1);
      w[e] = (const char*)weight + r * BYTES + t * 16;
      if (BITS) { s[e] = (const char*)scales + r * PER_ROW; z[e] = (const char*)biases + r * PER_ROW; }
    }
  }
  DI void load(Piece& p, int kb, int t) const {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      p.w[e] = stream(w[e] + (long)kb * 64);
      if (!BITS) continue;
      const int g = (kb * Form<BITS>::KB + t * (Form<BITS>::KB / 4)) / (BITS ? G : 1);
      if (S == AFFINE) { p.s[e] = __ldg((const unsigned short*)s[e] + g); p.z[e] = __ldg((const unsigned short*)z[e] + g); }
      else if (G < Form<BITS>::KB / 4) p.s[e] = __ldg((const unsigned short*)(s[e] + g));
      else p.s[e] = __ldg((const unsigned char*)s[e] + g);
    }
  }
};
// The 8 columns of unit j, as four pairs.
template <int BITS, int G, int S> DI void pairs(const Piece& p, int e, int j, unsigned (&a)[4]) {
  if (BITS == 0) { a[0] = p.w[e].x; a[1] = p.w[e].y; a[2] = p.w[e].z; a[3] = p.w[e].w; }
  else if (S != AFFINE) {
    // Numbers and their products with scales are exact in bfloat16; in float16 too, unless they are too small for it.
    constexpr int B = BITS ? BITS : 4;
    constexpr unsigned none = 0x80008000u;  // minus zero: fma2 is in all architectures
    const float scale = scale_of<S>(G < Form<BITS>::KB / 4 ? p.s[e] >> (j * 8 / G * 8) : p.s[e]);
    const unsigned s = pack(scale, scale);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = fma2(fma2(pair_of<B, XT>(word_of(p.w[e], BITS == 4 ? j : 2 * j + (i >> 1)), BITS == 4 ? i : i & 1), missing<B, XT>(), none), s, none);
  } else if (BITS == 4) {
    // A number's lowest four bits of mantissa, behind 128 or 1024, which is taken off again: both are exact.
    constexpr unsigned magic = XT == 1 ? 0x64006400u : 0x43004300u, one2 = XT == 1 ? 0x3c003c00u : 0x3f803f80u;
    const unsigned s = p.s[e] * 0x10001u, z = p.z[e] * 0x10001u, w = word_of(p.w[e], j);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = fma2(fma2(((w >> (4 * i)) & 0x000f000fu) | magic, one2, magic | 0x80008000u), s, z);
  } else {
    const float s = one<XT>(&p.s[e], 0), z = one<XT>(&p.z[e], 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const unsigned w = word_of(p.w[e], 2 * j + (i >> 1));
      // 2^23 + a byte, as float32
      const unsigned lo = permuted(w, 0x4b000000u, 0x7440u + 2 * (i & 1)), hi = permuted(w, 0x4b000000u, 0x7441u + 2 * (i & 1));
      a[i] = pack((as_float(lo) - 8388608.f) * s + z, (as_float(hi) - 8388608.f) * s + z);
    }
  }
}

// Where a lane finds 8 columns of its row of vectors: in the order above; the same of one vector, which is the core's
// column 0; and in rows of numbers, one behind the other, of which `at` has the lane's of each tile.
template <int BITS, int K> struct Ordered {
  const char* x; int lane;
  DI uint4 operator()(int k, int j, int r) const { return ((const uint4*)x)[(((long)r * (K / Form<BITS>::KB) + k) * Form<BITS>::J + j) * 32 + lane]; }
};
template <int BITS, int K> struct Single {
  const char* x; int lane;
  DI uint4 operator()(int k, int j, int r) const { return lane < 4 ? ((const uint4*)x)[(k * Form<BITS>::J + j) * 4 + lane] : make_uint4(0, 0, 0, 0); }
};
template <int BITS, int RT> struct Lines {
  const char* at[RT];
  DI uint4 operator()(int k, int j, int r) const {
    const uint4 u = *(const uint4*)(at[r] + k * (Form<BITS>::KB * 2) + j * 16);
    if (BITS != 4) return u;
    return make_uint4(permuted(u.x, u.z, 0x5410), permuted(u.x, u.z, 0x7632), permuted(u.y, u.w, 0x5410), permuted(u.y, u.w, 0x7632));
  }
};

// c[tile of 8 vectors][tile of weights]: products of the blocks `from`, `from + BY`, .., of KB columns.
template <int BITS, int G, int S, int K, int RT, int MT, int BY, class Look> DI void multiply(const Tile<BITS, G, S, K> (&tile)[MT], const Look& look, int from, int lane, float (&c)[RT][MT][4]) {
  typedef Form<BITS> F;
  constexpr int NKB = K / F::KB, DEPTH = MT == 1 && RT < 4 && NKB > 4 * BY ? 3 : 2;
  const int t = lane & 3;
  Piece buffer[DEPTH][MT];
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (from + d * BY < NKB)
#pragma unroll
      for (int m = 0; m < MT; m++) tile[m].load(buffer[d][m], from + d * BY, t);
  join();
  const auto take = [&](int k, uint4 (&b)[F::J][RT]) {
#pragma unroll
    for (int j = 0; j < F::J; j++)
#pragma unroll
      for (int r = 0; r < RT; r++) b[j][r] = look(k, j, r);
  };
  constexpr bool AHEAD = DEPTH > 2 && F::J * RT <= 4;  // whether there are registers for the next block's vector
  uint4 ahead[F::J][RT];
  if (AHEAD && from < NKB) take(from, ahead);
#pragma unroll 1
  for (int kb = from; kb < NKB; kb += DEPTH * BY)
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int k = kb + d * BY;
      if (k < NKB) {
        Piece now[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) now[m] = buffer[d][m];
        if (k + DEPTH * BY < NKB)
#pragma unroll
          for (int m = 0; m < MT; m++) tile[m].load(buffer[d][m], k + DEPTH * BY, t);
        uint4 found[F::J][RT];
        if (AHEAD) {
#pragma unroll
          for (int j = 0; j < F::J; j++)
#pragma unroll
            for (int r = 0; r < RT; r++) found[j][r] = ahead[j][r];
          if (k + BY < NKB) take(k + BY, ahead);
        }
#pragma unroll
        for (int j = 0; j < F::J; j++) {
          uint4 b[RT];
#pragma unroll
          for (int r = 0; r < RT; r++) b[r] = AHEAD ? found[j][r] : look(k, j, r);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            unsigned a[2][4];
            pairs<BITS, G, S>(now[m], 0, j, a[0]); pairs<BITS, G, S>(now[m], 1, j, a[1]);
#pragma unroll
            for (int r = 0; r < RT; r++) {
              core(c[r][m], a[0][0], a[1][0], a[0][1], a[1][1], b[r].x, b[r].y);
              core(c[r][m], a[0][2], a[1][2], a[0][3], a[1][3], b[r].z, b[r].w);
            }
          }
        }
      }
    }
}

