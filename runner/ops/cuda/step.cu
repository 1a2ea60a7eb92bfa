// Whole decode steps of a decoder as one persistent kernel: see docs/cuda.md. The planner puts its constants and
// `forms.cu` before this text, and the table PRODUCTS into it.
//
// One block an SM: 16 consumer warps, and a producer warp that streams all that comes from memory through a ring in
// shared memory, in the order of its use, and waits for nobody but the ring. Blocks exchange a value together with its
// epoch in one 8-byte word; who needs it reads until the epoch is right. There is no barrier over the grid.
constexpr int SLOT = 20;  // floats from one row's partial sums to the next: rows' 16-byte reads lie in banks of their own
#define NOINLINE __device__ __noinline__
#ifndef TICK
#define TICK(place)  // where whoever measures notes the time
#endif

struct Layer { u64 w[4], s[4], z[4], bias[4], n1, n2, qn, kn, kc, vc; int cap, window, shift, rope; };
struct Launch {
  int steps, pos, token, mode, top_k, penalised, biased, want_logits, fault, first, serial, reserved;
  u64 limit_ns;
  unsigned epoch, reserved2;
  float inv_t, top_p, log_min_p, repetition, presence, frequency, reserved3, reserved4;
  float chance[STEPS];
  float rope[STEPS * NROPE * RD];  // cosine and sine of each plane, for each position of the launch and kind of RoPE
};
struct State { int token, stop, error, reserved; };
struct Said { int token; float peak; int status; unsigned seq; };  // status 0: a token; 1: the host draws it; 2: an error

extern __shared__ __align__(1024) char sm[];

// The consumers' barrier: the producer takes no part. A diverged warp would count twice without __syncwarp.
DI void meet() { __syncwarp(); asm volatile("barrier.sync 1, 512;" ::: "memory"); }
DI unsigned sa(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
DI u64 now() { u64 t; asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t)); return t; }

template <int T> DI void store_one(void* p, long i, float v) {
  if (T == 0) { ((float*)p)[i] = v; return; }
  unsigned short u;
  if (T == 1) u = to_half(v);
  else asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(u) : "f"(v));
  ((unsigned short*)p)[i] = u;
}
// 8 numbers from shared memory, 16 bytes (32 in float32) from `at`.
template <int T> DI void eight(const char* at, float (&v)[8]) {
  if (T == 0) {
    float4 a = ((const float4*)at)[0], b = ((const float4*)at)[1];
    v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
  } else {
    uint4 u = *(const uint4*)at;
    two<T>(u.x, v[0], v[1]); two<T>(u.y, v[2], v[3]); two<T>(u.z, v[4], v[5]); two<T>(u.w, v[6], v[7]);
  }
}

// What a block shares besides the ring.
struct Shared {
  float red[16], own[OWN], qn[HD], kn[HD], maxima[NB > 16 ? NB : 16];
  float cv[CAND]; int ci[CAND]; float sv[CAND]; int si[CAND];
  int bad, over, written, ordered, ordered_st, ordered_ph, count, picked, id; float threshold, mass, goal;
  u64 keys[16];
  u64 limit;
  State* state;
  __align__(8) u64 full[NST], empty[NST];
};
__shared__ Shared sh;

// A wait that has gone on for too long, or that another block has given up: the block stops waiting and publishing, and
// runs to its end, which the host sees as an error. A trap would take the whole context along.
struct Patience { int turns; u64 since; };
NOINLINE bool give_up(Patience& p) {
  if (*(volatile int*)&sh.bad || *(volatile int*)&sh.over) return true;
  u64 t = now();
  if (!p.since) p.since = t;
  int error; asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(error) : "l"(&sh.state->error) : "memory");
  if (!error && t - p.since < sh.limit) return false;
  *(volatile int*)&sh.bad = 1;
  asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(&sh.state->error), "r"(1) : "memory");
  return true;
}
DI bool tired(Patience& p) { return (++p.turns & 127) == 0 && give_up(p); }

DI void publish(uint2* p, float v, unsigned ep) {
  if (*(volatile int*)&sh.bad) return;
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0],{%1,%2};" ::"l"(p), "r"(__float_as_uint(v)), "r"(ep) : "memory");
}
// Two values in one word: 16 bits of mantissa each, and the epoch's lowest 16 bits in the place of the rest.
DI unsigned cut(float v) {
  const unsigned u = __float_as_uint(v);
  return (u & 0x7f800000u) == 0x7f800000u ? u & ~255u : (u + 127u + ((u >> 8) & 1u)) & ~255u;
}
DI void publish2(uint2* p, float a, float b, unsigned ep) {
  if (*(volatile int*)&sh.bad) return;
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0],{%1,%2};" ::"l"(p), "r"(cut(a) | (ep & 255u)), "r"(cut(b) | ((ep >> 8) & 255u)) : "memory");
}
DI bool fresh(unsigned a, unsigned b, unsigned ep) { return ((a ^ ep) & 255u) == 0 && ((b ^ (ep >> 8)) & 255u) == 0; }
DI float value(unsigned u) { return __uint_as_float(u & ~255u); }
DI uint2 peek(const uint2* p) {
  uint2 u;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1},[%2];" : "=r"(u.x), "=r"(u.y) : "l"(p) : "memory");
  return u;
}
DI void look(const uint2* p, uint4& u) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "l"(p) : "memory");
}
template <int N> DI void fetch(const uint2* const (&p)[N], unsigned ep, float (&v)[N]) {
  Patience w{0, 0};
  for (;;) {
    bool ok = true;
    uint2 u[N];
#pragma unroll
    for (int i = 0; i < N; i++) { u[i] = make_uint2(0, ep); if (p[i]) u[i] = peek(p[i]); }
#pragma unroll
    for (int i = 0; i < N; i++) { ok = ok && u[i].y == ep; v[i] = __uint_as_float(u[i].x); }
    if (ok || tired(w)) return;
  }
}
DI float fetch1(const uint2* p, unsigned ep) { const uint2* q[1] = {p}; float v[1]; fetch<1>(q, ep, v); return v[0]; }

// Before compute capability 9.0 (COPIES), the producer's lanes copy 16 bytes each, and arrive when theirs have come.
#if COPIES
#define WAIT "test_wait"
#else
#define WAIT "try_wait"
#endif
DI unsigned tried(unsigned m, unsigned par) {
  unsigned ok;
  asm volatile("{.reg .pred p; mbarrier." WAIT ".parity.shared::cta.b64 p,[%1],%2; selp.u32 %0,1,0,p;}" : "=r"(ok) : "r"(m), "r"(par) : "memory");
  return ok;
}
NOINLINE void wait_long(unsigned m, unsigned par) { Patience w{0, 0}; while (!tried(m, par) && !tired(w)); }
DI void mwait(unsigned m, unsigned par) { if (!tried(m, par)) wait_long(m, par); }

struct Ring { unsigned data, full, empty; int st; unsigned ph; };
DI void advance(Ring& r) { if (++r.st == NST) { r.st = 0; r.ph ^= 1; } }
DI void arrived(const Ring& r) { mwait(r.full + 8 * r.st, r.ph); }
DI void release(const Ring& r, int lane) {
  __syncwarp();
  if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(r.empty + 8 * r.st) : "memory");
}
// Writes before this are seen by copies after it.
DI void behind() {
#if !COPIES
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
// What the producer orders: `bulk` copies n bytes, `box` rows of a matrix of bytes, whose rows have `pitch`: all from `row`
// on, of each `lines` of `width` bytes from `line` on, as line after line of the rows; of 128 bytes with its units of 16
// exchanged by the row's lowest three bits. What lies beyond the matrix is zero. `done` says that a stage is complete.
// Where there are bulk copies, the calling lane alone starts one; else all lanes call.
#if COPIES
DI void unit(unsigned d, u64 p, int n, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0],[%1],16,%2,%3;" ::"r"(d), "l"(p), "r"(n), "l"(policy) : "memory");
}
DI void bulk(unsigned d, u64 p, int n, unsigned m, u64 policy) {
#pragma unroll 2
  for (int i = (threadIdx.x & 31) * 16; i < n; i += 512) unit(d + i, p + i, 16, policy);
}
DI void box(unsigned d, u64 map, u64 matrix, int pitch, int all, int row, int rows, int line, int lines, int width, unsigned m, u64 policy) {
  const int units = width >> 4, count = lines * units, from = line * width, swap = units > 1 ? 7 : 0;
#pragma unroll 1
  for (int r = 0; r < rows; r++) {
    const u64 p = matrix + (u64)min(row + r, all - 1) * pitch + from;
    const int n = row + r < all ? pitch - from : 0;
#pragma unroll 2
    for (int i = threadIdx.x & 31; i < count; i += 32) {
      const int l = units > 1 ? i >> 3 : i, u = units > 1 ? i & 7 : 0;
      unit(d + (l * rows + r) * width + ((u ^ (r & swap)) << 4), i * 16 < n ? p + i * 16 : matrix, i * 16 < n ? 16 : 0, policy);
    }
  }
}
DI void done(unsigned m) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(m) : "memory"); }
#else
DI void bulk(unsigned d, u64 p, int n, unsigned m, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(d), "l"(p), "r"(n), "r"(m), "l"(policy) : "memory");
}
DI void box(unsigned d, u64 map, u64 matrix, int pitch, int all, int row, int rows, int line, int lines, int width, unsigned m, u64 policy) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1,{%2,%3,%4}],[%5],%6;" ::"r"(d), "l"(map), "r"(0), "r"(row), "r"(line), "r"(m), "l"(policy) : "memory");
}
DI void done(unsigned m) {}
#endif
// The producer's side of a stage: waits until it is free, says how many bytes are to come, and returns its number, or -1
// where the block gives up or has ended. No more than FLIGHT stages are on order at once, or what blocks exchange waits
// behind them. Its state is in shared memory, so that there is one copy of this: code that does not fit the instruction
// caches comes the way of the weights.
NOINLINE int order(int bytes) {
  int st = 0, quit = 0;
  if ((threadIdx.x & 31) == 0) {
    st = sh.ordered_st;
    const unsigned ph = sh.ordered_ph, full = sa(sh.full), empty = sa(sh.empty);
    mwait(empty + 8 * st, ph ^ 1);
    if (sh.ordered >= FLIGHT) {
      int j = st - FLIGHT; unsigned pj = ph;
      if (j < 0) { j += NST; pj ^= 1; }
      mwait(full + 8 * j, pj);
    }
    quit = *(volatile int*)&sh.bad | *(volatile int*)&sh.over;
#if !COPIES
    if (!quit) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(full + 8 * st), "r"(bytes) : "memory");
#endif
    sh.ordered++;
    if (st + 1 == NST) { sh.ordered_st = 0; sh.ordered_ph = ph ^ 1; } else sh.ordered_st = st + 1;
  }
  st = __shfl_sync(ALL, quit ? -1 : st, 0);
  return st;
}

DI float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
  return v;
}

// Products: 0 q, k, v; 1 output; 2 gate and up; 3 down; 4 head. Rows are owned in units, by blocks in order.
struct Product {
  int rows, columns, bits, group, scaled;  // bits 0: plain numbers; `scaled`: see forms.cu
  int unit;                            // rows of a unit: 16 where rows are packed, and where others own the same rows
  int piece;                           // columns of a stage's rows
  int pieces;                          // of a row
  int tiles;                           // tiles of 16 rows (plain: rows) in a stage
  int shares;                          // warps that share a row
  int pitch, scale_at, scale_pitch, bias_at, bytes;  // in a stage, of which `bytes` is the size
  int chunk;                           // rows whose partial sums are held at once
  int norm, biased, mapped;
  int recip;                           // to divide a warp's number by `shares`; of plain rows, the logarithm of `shares`
};
DI void owned(int n, int unit, int b, int& r0, int& r1) {
  // Units are powers of two, and their number times that of blocks stays below 2^32.
  const int shift = __ffs(unit) - 1;
  const unsigned u = (unsigned)(n + unit - 1) >> shift;
  r0 = (int)(u * (unsigned)b / NB) << shift;
  r1 = min(n, (int)(u * (unsigned)(b + 1) / NB) << shift);
}

// The columns of a published vector, 4 to a lane, of which a lane has up to 16 on the way at once. Whole warps call
// `put(column, whether there is such a column, values)`.
template <class Put> DI void gather(const uint2* src, unsigned ep, int K, Put put) {
  const int lane4 = (threadIdx.x & 31) * 4, start = (threadIdx.x >> 5) * 128;
  uint4 a0 = make_uint4(0, 0, 0, 0), a1 = a0, a2 = a0, a3 = a0;
  const uint2* p = src + (start + lane4) / 2;
  if (start + lane4 < K) look(p, a0);
  if (start + lane4 + 2048 < K) look(p + 1024, a1);
  if (start + lane4 + 4096 < K) look(p + 2048, a2);
  if (start + lane4 + 6144 < K) look(p + 3072, a3);
#pragma unroll 1
  for (int k = start; k < K; k += 2048, p += 1024) {
    const int c = k + lane4;
    const bool in = c < K;
    Patience w{0, 0};
    if (in) while (!fresh(a0.x, a0.y, ep) || !fresh(a0.z, a0.w, ep)) {
      look(p, a0);
      if (tired(w)) break;
    }
    __syncwarp();
    const float4 v = in ? make_float4(value(a0.x), value(a0.y), value(a0.z), value(a0.w)) : make_float4(0, 0, 0, 0);
    a0 = a1; a1 = a2; a2 = a3;
    if (c + 8192 < K) look(p + 4096, a3);
    put(c, in, v);
  }
}

DI void mma(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DI void lds128(unsigned at, unsigned& a, unsigned& b, unsigned& c, unsigned& d) { asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(at)); }
DI void lds64(unsigned at, unsigned& a, unsigned& b) { asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(a), "=r"(b) : "r"(at)); }
DI unsigned lds32(unsigned at) { unsigned a; asm volatile("ld.shared.u32 %0,[%1];" : "=r"(a) : "r"(at)); return a; }
DI unsigned lds16(unsigned at) { unsigned short a; asm volatile("ld.shared.u16 %0,[%1];" : "=h"(a) : "r"(at)); return a; }
DI unsigned lds8(unsigned at) { unsigned short a; asm volatile("ld.shared.u8 %0,[%1];" : "=h"(a) : "r"(at)); return a; }
DI void core16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The vector for packed weights, which share a scale in groups of columns: G, or 64 of G = 64 and more. Its words lie as
// a lane of the tensor core multiplies them with the words of a row, as MLX packs them. Returns the group's greatest
// number; lanes that share it have it all.
template <int G> DI float greatest(float4 a, float& total) {
  float m = fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(a.z), fabsf(a.w)));
  total = a.x + a.y + a.z + a.w;
#pragma unroll
  for (int o = G < 64 ? G / 8 : 8; o; o >>= 1) { m = fmaxf(m, __shfl_xor_sync(ALL, m, o)); total += __shfl_xor_sync(ALL, total, o); }
  return m;
}
template <int G> DI void store_group(float2* xn, int c, float scale, float total) {
  constexpr int W = G < 64 ? G : 64;
  if (c % W == 0) xn[c / W] = make_float2(scale, total);
}
// Integers of 24 bits, in three planes of signed bytes, y = 0 the highest: columns of the tensor core's B. It is read as
// ((block of 64 * 3 + y) * 4 + t) * 16 bytes. Columns of affine 4 bits come in the order of their nibbles, low ones first.
template <int BITS, int G, int S> DI void store_planes(char* xs, float2* xn, int c, bool in, float4 a) {
  float total;
  const float m = greatest<G>(a, total);
  if (!in) return;
  const float inv = m > 1e-30f ? 8323072.f / m : 0.f;
  int q[4] = {__float2int_rn(a.x * inv), __float2int_rn(a.y * inv), __float2int_rn(a.z * inv), __float2int_rn(a.w * inv)};
  const int block = c >> 6, t = G <= 32 ? (c >> 3) & 3 : (c >> 4) & 3, j = G <= 32 ? (c >> 5) & 1 : (c >> 3) & 1, h = (c >> 2) & 1;
#pragma unroll
  for (int y = 2; y >= 0; y--) {
    unsigned d[4];
#pragma unroll
    for (int i = 0; i < 4; i++) { int lo = y ? (int)(signed char)(q[i] & 255) : q[i]; d[i] = lo & 255; q[i] = (q[i] - lo) >> 8; }
    char* at = xs + ((block * 3 + y) * 4 + t) * 16 + j * 8;
    if (BITS == 4 && S == AFFINE) {
      *(unsigned short*)(at + h * 2) = (unsigned short)(d[0] | d[2] << 8);
      *(unsigned short*)(at + 4 + h * 2) = (unsigned short)(d[1] | d[3] << 8);
    } else *(unsigned*)(at + h * 4) = d[0] | d[1] << 8 | d[2] << 16 | d[3] << 24;
  }
  store_group<G>(xn, c, m * (1.f / 8323072.f), total);
}
// For numbers of E4M3: shares of the group's greatest number as sums of two float16, planes y = 0 and 1 of B, read as
// ((block of 64 * 2 + y) * 4 + t) * 32 bytes.
template <int G> DI void store_halves(char* xs, float2* xn, int c, bool in, float4 a) {
  float total;
  const float m = greatest<G>(a, total);
  if (!in) return;
  const float inv = m > 1e-30f ? 1.f / m : 0.f, v[4] = {a.x * inv, a.y * inv, a.z * inv, a.w * inv};
  unsigned hi[4], lo[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    hi[e] = to_half(v[e]);
    lo[e] = to_half(v[e] - half_of((unsigned short)hi[e]));
  }
  char* at = xs + ((c >> 6) * 8 + ((c >> 3) & 3)) * 32 + ((c >> 5) & 1) * 16 + ((c >> 2) & 1) * 8;
  *(uint2*)at = make_uint2(hi[0] | hi[1] << 16, hi[2] | hi[3] << 16);
  *(uint2*)(at + 128) = make_uint2(lo[0] | lo[1] << 16, lo[2] | lo[3] << 16);
  store_group<G>(xn, c, m * 256.f, total);  // 2^8 is what E4M3 as float16 lacks
}

// Scale `i` of those that a lane has read, of S or as float16.
constexpr int AS_HALF = -1;
template <int S, int N> DI float scale_in(const unsigned (&s)[N], int i) {
  if (S == AS_HALF) return half_of((unsigned short)(i & 1 ? s[i >> 1] >> 16 : s[i >> 1]));
  if (S != AFFINE) return scale_of<S>(s[i >> 2] >> (8 * (i & 3)));
  const unsigned u = s[i >> 1];
  return ST == 1 ? half_of((unsigned short)(i & 1 ? u >> 16 : u)) : i & 1 ? highf(u) : lowf(u);
}

// Rows of packed numbers: a warp takes 256 columns (128 of 8 bits) of 16 rows at once. Sums of a group are exact integers,
// but of E4M3. Groups of 16 are two for each product: the second has planes of its own, columns 4 to 6 of B, and each
// group's are zero where a lane's weights are the other's.
// MAPPED: a tensor map has brought the rows of a stage in lines of 128 bytes, whose units of 16 bytes are exchanged by
// the row's lowest three bits; a lane's row is then chosen so that no two lanes read the same bank.
template <int BITS, int G, int S, bool MAPPED> DI void packed_product(Ring& r, const Product& p, int rows, const char* xs, const float2* xn, float* slots, const int warp, const int lane) {
  constexpr bool E2M1 = S != AFFINE && BITS == 4, HALVES = S != AFFINE && BITS == 8;
  constexpr int SPAN = BITS == 4 ? 4 : 2;                                 // blocks of 64 columns that a warp takes at once
  constexpr int WORD = BITS == 4 ? (G <= 32 ? 4 : 8) : (G == 32 ? 8 : 16);  // bytes of a lane in one load
  constexpr int TILE = BITS * 8;                                          // bytes of 64 columns
  constexpr int GROUPS = SPAN * 64 / G, PER = G <= 32 ? 2 : 1;            // groups of the span; products of a block of 64
  constexpr int SB = Scale<S>::B, SPANNED = GROUPS * SB, NS = (SPANNED + 3) / 4, NZ = S == AFFINE ? NS : 1;  // scales: bytes, words
  constexpr int EACH = G < 32 ? 2 : 1, XB = HALVES ? 256 : 192;           // groups of a product; bytes of the vector's block
  const int g = lane >> 2, t = lane & 3, tile = warp * p.recip >> 8, share = warp - tile * p.shares, half = EACH == 2 ? t >> 1 : 0;
  const int column = EACH == 2 ? g & 3 : g, y = HALVES ? g & 1 : column < 2 ? column : 2;
  const bool mine = EACH == 1 || g >> 2 == half;
  const int rho = !MAPPED ? g : WORD == 16 ? (g >> 1) | ((g & 1) << 2) : g < 4 ? 2 * g : 2 * g - 7;
  // A lane holds columns 2 t and 2 t + 1 of the core's result: an even one of those that count has the higher planes of
  // its group, or both halves; an odd one the lowest plane.
  const bool high = t == 0 || (EACH == 2 && t == 2), low = t == 1 || (EACH == 2 && t == 3);
  const int ma = high ? 256 : 0;
  constexpr float lacks = EACH == 2 ? 256.f : 1.f;  // what scales as float16 lack
  const float fs = HALVES ? (high ? 1.f : 0.f) : (high ? 256.f : low ? 1.f : 0.f) * (E2M1 ? 0.5f : 1.f) * lacks, fb = high ? (E2M1 ? -6.f : 1.f) * lacks : 0.f;
  const int line = tile * 16 + rho, lines = p.tiles * 16;
  const unsigned row0 = MAPPED ? (share * lines + line) * 128 : line * p.pitch + share * SPAN * TILE + t * WORD;
  const unsigned sr0 = p.scale_at + (MAPPED ? ((share * SPANNED >> 4) * lines + line) * 16 + (share * SPANNED & 15)
                                            : line * p.scale_pitch + share * SPANNED + ((g * (p.columns / G * SB)) & 15));
  const unsigned down = MAPPED ? 8 * 128 : 8 * p.pitch, sdown = MAPPED ? 8 * 16 : 8 * p.scale_pitch, zoff = p.bias_at - p.scale_at;
  const int per_piece = p.piece >> 6;
#pragma unroll 1
  for (int base = 0; base < rows; base += 16 * p.tiles) {
    float A0 = 0, A1 = 0, B0 = 0, B1 = 0;
    const bool live = tile < p.tiles && base + tile * 16 < rows;
    int first = share * SPAN, last = min(p.columns >> 6, per_piece);
#pragma unroll 1
    for (int ch = 0; ch < p.pieces; ch++, first += per_piece, last = min(p.columns >> 6, last + per_piece)) {
      const int nt = live ? min(SPAN, last - first) : 0;
      const char* xf = xs + first * XB + (HALVES ? (y * 4 + t) * 32 : (y * 4 + t) * 16);
      const unsigned row = r.data + r.st * STAGE + row0, sr = r.data + r.st * STAGE + sr0;
      unsigned a[SPAN][BITS], s[2][NS], z[2][NZ];
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int i = 0; i < NS; i++) s[e][i] = 0;
#pragma unroll
        for (int i = 0; i < NZ; i++) z[e][i] = 0;
      }
#pragma unroll
      for (int j = 0; j < SPAN; j++)
#pragma unroll
        for (int i = 0; i < BITS; i++) a[j][i] = 0;
      arrived(r);
      if (nt > 0) {
        const auto read = [&](unsigned q, auto& to) {
          if (MAPPED && SPANNED == 16) lds128(q, to[0], to[NS / 4], to[NS / 2], to[NS - 1]);
          else if (MAPPED && SPANNED == 8) lds64(q, to[0], to[NS - 1]);
          else if (MAPPED && SPANNED == 4) to[0] = lds32(q);
          else
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
              if (i * G < nt * 64) to[i * SB / 4] |= (SB == 2 ? lds16(q + 2 * i) : lds8(q + i)) << (8 * SB * (i % (4 / SB)));
        };
#pragma unroll
        for (int e = 0; e < 2; e++) {
          read(sr + e * sdown, s[e]);
          if (S == AFFINE) read(sr + e * sdown + zoff, z[e]);
        }
#pragma unroll
        for (int j = 0; j < SPAN; j++)
          if (j < nt)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              if (MAPPED) {
                const unsigned q = row + e * down, x = rho & 7, u = j * TILE / 16;
                if (WORD == 4) { a[j][e] = lds32(q + ((u ^ x) << 4) + t * 4); a[j][2 + e] = lds32(q + (((u + 1) ^ x) << 4) + t * 4); }
                else if (WORD == 8) {
                  lds64(q + (((u + (t >> 1)) ^ x) << 4) + (t & 1) * 8, a[j][e], a[j][2 + e]);
                  if (BITS == 8) lds64(q + (((u + 2 + (t >> 1)) ^ x) << 4) + (t & 1) * 8, a[j][BITS - 4 + e], a[j][BITS - 2 + e]);
                } else lds128(q + (((u + t) ^ x) << 4), a[j][e], a[j][2 + e], a[j][BITS - 4 + e], a[j][BITS - 2 + e]);
              } else {
                const unsigned q = row + e * down + j * TILE;
                if (WORD == 4) { a[j][e] = lds32(q); a[j][2 + e] = lds32(q + 16); }
                else if (WORD == 8) { lds64(q, a[j][e], a[j][2 + e]); if (BITS == 8) lds64(q + 32, a[j][BITS - 4 + e], a[j][BITS - 2 + e]); }
                else lds128(q, a[j][e], a[j][2 + e], a[j][BITS - 4 + e], a[j][BITS - 2 + e]);
              }
            }
      }
      release(r, lane);
      // Of groups of 16, the two of a word's four scales that this lane's weights have, as float16 but for a factor 2^8.
      if (EACH == 2)
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int i = 0; i < NS; i++) s[e][i] = halves_of(s[e][i] >> (8 * half));
#pragma unroll
      for (int j = 0; j < SPAN; j++) {
        if (j >= nt) break;
        if (HALVES) {
#pragma unroll
          for (int q = 0; q < 2; q++) {
            const uint4 f = *(const uint4*)(xf + j * XB + q * 16);
            float c[4] = {0, 0, 0, 0};
            constexpr int Q = BITS == 8 ? 4 : 0;
            const unsigned *v = &a[j][q * Q], *w = &a[j][q * Q + 2];
            core16(c, pair_of<8, 1>(v[0], 0), pair_of<8, 1>(v[1], 0), pair_of<8, 1>(v[0], 1), pair_of<8, 1>(v[1], 1), f.x, f.y);
            core16(c, pair_of<8, 1>(w[0], 0), pair_of<8, 1>(w[1], 0), pair_of<8, 1>(w[0], 1), pair_of<8, 1>(w[1], 1), f.z, f.w);
            const float n = xn[(first + j) * 2 + q].x;
            A0 += scale_in<S>(s[0], 2 * j + q) * n * (c[0] + c[1]);
            A1 += scale_in<S>(s[1], 2 * j + q) * n * (c[2] + c[3]);
          }
          continue;
        }
        uint4 f = make_uint4(0, 0, 0, 0);
        if (mine) f = *(const uint4*)(xf + j * XB);
        int c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        constexpr unsigned N = 0x0f0f0f0fu;
        if (E2M1) {
          unsigned u[4], v[4];
#pragma unroll
          for (int i = 0; i < 4; i++) bytes_of(a[j][i], u[i], v[i]);
          mma(c[0], u[0], u[1], v[0], v[1], f.x, f.y);
          mma(c[PER - 1], u[2], u[3], v[2], v[3], f.z, f.w);
        } else if (BITS == 4) {
          mma(c[0], a[j][0] & N, a[j][1] & N, (a[j][0] >> 4) & N, (a[j][1] >> 4) & N, f.x, f.y);
          mma(c[PER - 1], a[j][2] & N, a[j][3] & N, (a[j][2] >> 4) & N, (a[j][3] >> 4) & N, f.z, f.w);
        } else {
          mma(c[0], a[j][0], a[j][1], a[j][2], a[j][3], f.x, f.y);
          mma(c[PER - 1], a[j][BITS - 4], a[j][BITS - 3], a[j][BITS - 2], a[j][BITS - 1], f.z, f.w);
        }
#pragma unroll
        for (int q = 0; q < PER; q++) {
          const float2 n = xn[((first + j) * PER + q) * EACH + half];
          const int i = G <= 32 ? 2 * j + q : j * 64 / G;
          const float s0 = EACH == 2 ? scale_in<AS_HALF>(s[0], i) : scale_in<S>(s[0], i), s1 = EACH == 2 ? scale_in<AS_HALF>(s[1], i) : scale_in<S>(s[1], i);
          A0 += s0 * n.x * (float)(c[q][0] * ma + c[q][1]);
          A1 += s1 * n.x * (float)(c[q][2] * ma + c[q][3]);
          B0 += (S == AFFINE ? scale_in<S>(z[0], i) : s0) * n.y;
          B1 += (S == AFFINE ? scale_in<S>(z[1], i) : s1) * n.y;
        }
      }
      advance(r);
    }
    A0 = A0 * fs + B0 * fb; A1 = A1 * fs + B1 * fb;
    A0 += __shfl_xor_sync(ALL, A0, 1); A1 += __shfl_xor_sync(ALL, A1, 1);
    if (EACH == 2) { A0 += __shfl_xor_sync(ALL, A0, 2); A1 += __shfl_xor_sync(ALL, A1, 2); }
    if (t == 0 && live) {
      float* o = slots + (base + line) * SLOT + share;
      o[0] = A0; o[8 * SLOT] = A1;
    }
  }
}

// bfloat16 rows on the tensor core: a warp takes 64 columns of 16 rows at once, brought in lines of 128 bytes as above. The
// vector is two planes of bfloat16, columns 0 and 1 of the core's B, stored as ((block of 64 * 2 + y) * 4 + t) * 32 bytes.
DI void store_pairs(char* xs, int c, bool in, float4 a) {
  if (!in) return;
  const int block = c >> 6, s = (c >> 4) & 3, i = c & 15, t = (i >> 1) & 3;
  const float v[4] = {a.x, a.y, a.z, a.w};
  unsigned hi[4], lo[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    unsigned short h, l;
    asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(h) : "f"(v[e]));
    asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(l) : "f"(v[e] - __uint_as_float((unsigned)h << 16)));
    hi[e] = h; lo[e] = l;
  }
  char* at = xs + (block * 8 + t) * 32 + s * 8 + (i >> 3) * 4;
  *(unsigned*)at = hi[0] | hi[1] << 16; *(unsigned*)(at + 32) = hi[2] | hi[3] << 16;
  *(unsigned*)(at + 128) = lo[0] | lo[1] << 16; *(unsigned*)(at + 160) = lo[2] | lo[3] << 16;
}
DI void core(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DI void dense_product(Ring& r, const Product& p, int rows, const char* xs, float* slots, const int warp, const int lane) {
  const int g = lane >> 2, t = lane & 3, y = g < 1 ? 0 : 1, tile = warp / p.shares, share = warp - tile * p.shares, lines = p.tiles * 16;
  const int line = tile * 16 + (lane & 7) + ((lane >> 3) & 1) * 8;   // whose address this lane gives, for a half of 16 columns
  const unsigned row0 = (share * lines + line) * 128, x = line & 7, half = lane >> 4;
  const int per_piece = p.piece >> 6;
#pragma unroll 1
  for (int base = 0; base < rows; base += 16 * p.tiles) {
    float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    const bool live = tile < p.tiles && base + tile * 16 < rows;
    int block = share;
#pragma unroll 1
    for (int ch = 0; ch < p.pieces; ch++, block += per_piece) {
      const bool in = live && share < per_piece && block * 64 < p.columns;
      uint4 f[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
      unsigned a[4][4];
      if (in) { const uint4* xf = (const uint4*)(xs + ((block * 2 + y) * 4 + t) * 32); f[0] = xf[0]; f[1] = xf[1]; }
      arrived(r);
      const unsigned at = r.data + r.st * STAGE + row0;
      if (in)
#pragma unroll
        for (int s = 0; s < 4; s++)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(a[s][0]), "=r"(a[s][1]), "=r"(a[s][2]), "=r"(a[s][3]) : "r"(at + (((s * 2 + half) ^ x) << 4)) : "memory");
      release(r, lane);
      advance(r);
      if (in) { core(c[0], a[0], f[0].x, f[0].y); core(c[1], a[1], f[0].z, f[0].w); core(c[0], a[2], f[1].x, f[1].y); core(c[1], a[3], f[1].z, f[1].w); }
    }
    if (t == 0 && live) {
      float* o = slots + (base + tile * 16 + g) * SLOT + share;
      o[0] = (c[0][0] + c[1][0]) + (c[0][1] + c[1][1]); o[8 * SLOT] = (c[0][2] + c[1][2]) + (c[0][3] + c[1][3]);
    }
  }
}

template <int T> DI float plain_piece(const char* w, const float* xs, int from, int columns, int step) {
  float a = 0, b = 0;
#pragma unroll 2
  for (int c = from; c < columns; c += step) {
    float v[8]; eight<T>(w + c * Size<T>::B, v);
    float4 x0 = *(const float4*)(xs + c), x1 = *(const float4*)(xs + c + 4);
    a += v[0] * x0.x; b += v[1] * x0.y; a += v[2] * x0.z; b += v[3] * x0.w;
    a += v[4] * x1.x; b += v[5] * x1.y; a += v[6] * x1.z; b += v[7] * x1.w;
  }
  return a + b;
}
// Rows of plain numbers: `shares` warps to a row, each 256 columns at a time, 8 to a lane. A stage holds rows, or a piece
// of one, which all warps share.
template <int T> DI void plain_product(Ring& r, const Product& p, int rows, const float* xs, float* slots, const int warp, const int lane) {
#pragma unroll 1
  for (int base = 0; base < rows; base += p.tiles) {
    const int n = min(p.tiles, rows - base) * p.shares;
    if (p.pieces > 1) {
      float a = 0;
#pragma unroll 1
      for (int k0 = 0; k0 < p.columns; k0 += p.piece) {
        arrived(r);
        a += plain_piece<T>(sm + r.st * STAGE, xs + k0, warp * 256 + lane * 8, min(p.piece, p.columns - k0), 4096);
        release(r, lane);
        advance(r);
      }
      a = warp_sum(a);
      if (lane == 0) slots[base * SLOT + warp] = a;
      continue;
    }
    const char* data = sm + r.st * STAGE;
    arrived(r);
#pragma unroll 1
    for (int u = warp; u < n; u += 16) {
      const int row = u >> p.recip, share = u & (p.shares - 1);
      const float a = warp_sum(plain_piece<T>(data + row * p.columns * Size<T>::B, xs, share * 256 + lane * 8, p.columns, p.shares * 256));
      if (lane == 0) slots[(base + row) * SLOT + share] = a;
    }
    release(r, lane);
    advance(r);
  }
}

// The sum of the first n of a row's partial sums.
DI float sum_of(const float* q, int n) {
  float a = 0, b = 0;
#pragma unroll
  for (int i = 0; i < 16; i += 4)
    if (i < n) {
      const float4 v = *(const float4*)(q + i);
      a += v.x + (i + 1 < n ? v.y : 0.f); b += (i + 2 < n ? v.z : 0.f) + (i + 3 < n ? v.w : 0.f);
    }
  return a + b;
}
DI float activation(float v) {
  if (ACT == 0) return v / (1.f + __expf(-v));
  if (ACT == 1) return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
  if (ACT == 2) { float u = 1.5957691216057308f * (v + 0.044715f * v * v * v); return v / (1.f + __expf(-u)); }
  v = fmaxf(v, 0.f);
  return ACT == 3 ? v : v * v;
}
DI u64 key_of(float v, int id) {
  unsigned u = __float_as_uint(v);
  u = v != v ? 0xffffffffu : (u & 0x80000000u) ? ~u : (u | 0x80000000u);
  return ((u64)u << 32) | (0xffffffffu - (unsigned)id);
}
DI float peak_of(u64 k) {
  unsigned u = (unsigned)(k >> 32);
  return __uint_as_float((u & 0x80000000u) ? (u & 0x7fffffffu) : ~u);
}
DI u64 warp_max(u64 k) {
#pragma unroll
  for (int o = 16; o; o >>= 1) { u64 x = __shfl_xor_sync(ALL, k, o); k = x > k ? x : k; }
  return k;
}
DI float block_sum(float v) {  // the same for all consumers, in a fixed order
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) sh.red[threadIdx.x >> 5] = v;
  meet();
  float s = 0;
  _Pragma("unroll 1") for (int i = 0; i < 16; i++) s += sh.red[i];
  meet();
  return s;
}

// Where what blocks exchange lies, in words: vectors two values to a word; a part of the attention as its values, the
// greatest score and the sum; the others one value to a word.
constexpr int X_IN = 0, X_MID = X_IN + D / 2, X_QKV = X_MID + D / 2, X_OUT = X_QKV + QR / 2, X_ACT = X_OUT + H * HD / 2;
constexpr int HALF = HD / 2, PART = GH * (HALF + 2), X_PART = X_ACT + F / 2, X_TOP = X_PART + NB * PART, X_MASS = X_TOP + 2 * NB, X_PICK = X_MASS + 2 * NB, X_CAND = X_PICK + 2;

// A token from the filtered distribution; the same in every block but where `owner` says so. Twin: ops/picking.py.
NOINLINE int draw(const Launch* ln, uint2* x, unsigned ep, int step, float peak, const float* lg, int r0, int r1, bool& unresolved) {
  const int t = threadIdx.x, b = blockIdx.x;
  const float it = ln->inv_t, least = ln->log_min_p, chance = fminf(ln->chance[step], 1.f - 5.9604645e-8f), top_p = ln->top_p;
  const int n = r1 - r0;
  const bool filtered = ln->top_k > 0 || top_p < 1.f;
  float mass = 0;
  _Pragma("unroll 1") for (int i = t; i < n; i += 512) { float s = (lg[i] - peak) * it; if (filtered || s >= least) mass += __expf(s); }
  mass = block_sum(mass);
  if (t == 0) publish(x + X_MASS + 2 * b, mass, ep);
  unresolved = false;
  if (!filtered) {
    if (t < NB) sh.maxima[t] = fetch1(x + X_MASS + 2 * t, ep);
    meet();
    if (t == 0) {
      float total = 0;
      _Pragma("unroll 1") for (int i = 0; i < NB; i++) total += sh.maxima[i];
      float goal = chance * total, before = 0;
      int at = -1;
      _Pragma("unroll 1") for (int i = 0; i < NB; i++) {
        float w = sh.maxima[i];
        if (w > 0.f && (at < 0 || before <= goal)) { at = i; sh.goal = goal - before; }
        before += w;
        if (before > goal && at >= 0) break;
      }
      sh.picked = at;
    }
    meet();
    if (sh.picked == b) {
      float* part = sh.cv;  // the sums of 512 runs of rows
      const int run = (n + 511) / 512, i0 = min(n, t * run), i1 = min(n, i0 + run);
      float s = 0;
      _Pragma("unroll 1") for (int i = i0; i < i1; i++) { float e = (lg[i] - peak) * it; if (e >= least) s += __expf(e); }
      part[t] = s;
      meet();
      if (t == 0) {
        float before = 0; int at = -1; float start = 0;
        _Pragma("unroll 1") for (int i = 0; i < 512; i++) { if (part[i] > 0.f) { at = i; start = before; } before += part[i]; if (before > sh.goal && at >= 0) break; }
        float sum = start; int id = 0;
        _Pragma("unroll 1") for (int i = at * run; i < min(n, at * run + run); i++) {
          float e = (lg[i] - peak) * it;
          if (e < least) continue;
          id = i; sum += __expf(e);
          if (sum > sh.goal) break;
        }
        publish(x + X_PICK, __int_as_float(r0 + id), ep);
      }
    }
    if (t == 0) sh.id = __float_as_int(fetch1(x + X_PICK, ep));
    meet();
    return sh.id;
  }
  // The k-th largest of the blocks' maxima is a lower bound of the k-th largest logit: few others are above it.
  const int want = ln->top_k > 0 ? min(ln->top_k, NB) : min(NB, 64);
  if (t < NB) {
    float m = sh.maxima[t]; int rank = 0;
    _Pragma("unroll 1") for (int i = 0; i < NB; i++) { float o = sh.maxima[i]; rank += o > m || (o == m && i < t); }
    if (rank == want - 1) sh.threshold = m;
  }
  if (t == 0) sh.count = 0;
  meet();
  uint2* mine = x + X_CAND + b * (2 * EACH);
  _Pragma("unroll 1") for (int i = t; i < n; i += 512)
    if (lg[i] >= sh.threshold) {
      int at = atomicAdd(&sh.count, 1);
      if (at < EACH) { publish(mine + 2 * at, lg[i], ep); publish(mine + 2 * at + 1, __int_as_float(r0 + i), ep); }
    }
  meet();
  if (t == 0) publish(x + X_MASS + 2 * b + 1, __int_as_float(sh.count), ep);
  meet();
  if (t == 0) { sh.count = 0; sh.picked = 0; }
  meet();
  float part = 0;
  if (t < NB) {
    const uint2* q[2] = {x + X_MASS + 2 * t, x + X_MASS + 2 * t + 1};
    float v[2]; fetch<2>(q, ep, v);
    part = v[0];
    int c = __float_as_int(v[1]);
    if (c > EACH || c < 0) { sh.picked = 1; c = 0; }
    int at = atomicAdd(&sh.count, c);
    _Pragma("unroll 1") for (int i = 0; i < c; i++) {
      const uint2* e = x + X_CAND + t * (2 * EACH) + 2 * i;
      const uint2* q2[2] = {e, e + 1};
      float w[2]; fetch<2>(q2, ep, w);
      if (at + i < CAND) { sh.cv[at + i] = w[0]; sh.ci[at + i] = __float_as_int(w[1]); }
    }
  }
  const float all = block_sum(part);
  const int m = sh.count;
  if (sh.picked || m > CAND || m < 1) { unresolved = true; return 0; }
  if (t < m) {
    float v = sh.cv[t]; int id = sh.ci[t], rank = 0;
    _Pragma("unroll 1") for (int i = 0; i < m; i++) { float o = sh.cv[i]; rank += o > v || (o == v && sh.ci[i] < id); }
    sh.sv[rank] = v; sh.si[rank] = id;
  }
  meet();
  const int kept = ln->top_k > 0 ? min(m, ln->top_k) : m;
  if (t < kept) sh.cv[t] = __expf((sh.sv[t] - peak) * it);
  meet();
  float total = 0, before = 0;
  _Pragma("unroll 1") for (int i = 0; i < kept; i++) { if (i < t) before += sh.cv[i]; total += sh.cv[i]; }
  if (ln->top_k == 0 && total < top_p * all * 1.000001f) { unresolved = true; meet(); return 0; }
  const float goal = top_p * (ln->top_k > 0 ? total : all);
  bool stays = t < kept && (t == 0 || top_p >= 1.f || before < goal) && (sh.sv[t] - peak) * it >= least;
  float w = t < kept ? sh.cv[t] : 0.f;
  meet();
  if (t < kept) sh.cv[t] = stays ? w : 0.f;
  if (t == 0) sh.id = 0x7fffffff;
  meet();
  float sum = 0, upto = 0;
  if (t < kept) {
    const int id = sh.si[t];
    _Pragma("unroll 1") for (int i = 0; i < kept; i++) { float e = sh.cv[i]; sum += e; if (sh.si[i] <= id) upto += e; }
    if (stays && upto > chance * sum) atomicMin(&sh.id, id);
  }
  meet();
  int id = sh.id;
  if (id == 0x7fffffff) id = sh.si[0];
  meet();
  return id;
}

extern "C" __global__ void __launch_bounds__(544, 1) decode_steps(
    const Layer* table, const Launch* launch, State* state, uint2* x, const void* emb, const void* emb_scales, const void* emb_biases,
    float* counts, const float* __restrict__ logit_bias, float* logits, Said* said, const int* host_stop, u64 maps) {
  char* xs = sm + NST * STAGE;                                    // what a product multiplies
  float2* xn = (float2*)(xs + PLANES);                            // scales and sums of its blocks
  float* slots = (float*)(xs + XBYTES);                           // partial sums
  float* qs = (float*)xs;                                         // attention: queries,
  float* att = qs + GH * HD;                                      // and the partial results of warps
  float* recent = (float*)(xs + WORK);                            // the key and the value of this step, as the cache has them
  float* fresh_rows = att + 16 * (HD + 2);                        // the same before they are rounded
  float* bias = recent + 2 * HD;
  float* lg = bias + BIASES;                                      // this block's logits
  Layer* layers = (Layer*)(lg + LOGITS);
  Launch* ln = (Launch*)(layers + L + 1);                         // a plain load would queue behind the weights
  Ring rg{sa(sm), sa(sh.full), sa(sh.empty), 0, 0};
  asm volatile("" : "+r"(rg.data), "+r"(rg.full), "+r"(rg.empty));  // or the compiler finds them anew each time
  if (rg.data & 1023) { state->error = 1; if (blockIdx.x == 0 && threadIdx.x == 0) said[launch->serial % SAID] = {0, 0, 2, (unsigned)launch->serial + 1}; return; }  // what tensor maps exchange would not be where it is read
  if (state->stop || state->error) return;  // all blocks alike: nothing writes it while they start
  if (threadIdx.x == 0) {
    _Pragma("unroll 1") for (int i = 0; i < NST; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(rg.full + 8 * i), "r"(COPIES ? 32 : 1));
      asm volatile("mbarrier.init.shared::cta.b64 [%0],16;" ::"r"(rg.empty + 8 * i));
    }
#if !COPIES
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    sh.bad = sh.over = sh.written = sh.ordered = sh.ordered_st = sh.ordered_ph = 0; sh.limit = launch->limit_ns; sh.state = state;
  }
  _Pragma("unroll 1") for (int i = threadIdx.x; i < (L + 1) * (int)sizeof(Layer) / 4; i += blockDim.x) ((int*)layers)[i] = ((const int*)table)[i];
  _Pragma("unroll 1") for (int i = threadIdx.x; i < (int)sizeof(Launch) / 4; i += blockDim.x) ((int*)ln)[i] = ((const int*)launch)[i];
  __syncthreads();
  const int b = blockIdx.x; int t = threadIdx.x; asm volatile("" : "+r"(t)); const int lane = t & 31, warp = t >> 5;
  const int steps = ln->steps, pos0 = ln->pos, kh = b / PARTS, sp = b % PARTS;
  const bool attends = b < KV * PARTS;
  // Rows of the cache that part `sp` reads: its share of those that were there before this launch and that the window
  // shows; the last part also those of this launch's earlier steps, which it has written itself.
#define ROWS(y) \
  const int n0 = pos0 - y.shift, w_ = y.window, lo_ = w_ > 0 ? max(0, n0 + step + 1 - w_) : 0, old_ = min(lo_, n0); \
  const bool newest = sp == PARTS - 1; \
  const int j0 = max(old_ + (int)((unsigned)(n0 - old_) * sp / PARTS), newest ? lo_ : 0), j1 = newest ? n0 + step : old_ + (int)((unsigned)(n0 - old_) * (sp + 1) / PARTS);
#define WORK(op) \
  const int l = (op) >> 2, ph = (op) == 4 * L ? 4 : (op) & 3; const Product& p = PRODUCTS[ph]; const Layer& y = layers[l]; \
  const bool pair = GATED && ph == 2; const int n_ = pair ? F : p.rows; int r0, r1; owned(n_, p.unit, b, r0, r1);
  constexpr int KROWS = STAGE / (2 * HD * Size<CT>::B), AB = Size<AT>::B;
  if (warp == 16) {
    int st = 0;  // of the stage that was ordered last; -1: no more are wanted
    const bool sends = COPIES || lane == 0;
    u64 policy, keep;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(keep));
#pragma unroll 1
    for (int step = 0; step < steps && st >= 0; step++)
#pragma unroll 1
      for (int op = 0; op <= 4 * L && st >= 0; op++) {
        WORK(op)
        const int w_i = ph == 4 ? 0 : ph;
        if (r1 > r0 && (p.norm || p.biased)) {
          // The norm's weights, this block's biases (rounded out to 16 bytes), and the norms of heads.
          const u64 nw = ph == 2 ? y.n2 : y.n1;
          const int a0 = r0 & ~7, an = ((r1 + 7) & ~7) - a0, nb = p.norm ? D * AB : 0, bb = HAS_BIAS && p.biased ? an * AB : 0, hb = QKN && ph == 0 ? HD * AB : 0;
          st = order(nb + bb * (pair ? 2 : 1) + 2 * hb);
          const unsigned f = rg.full + 8 * st, d = rg.data + st * STAGE;
          if (sends && st >= 0) {
            if (nb) bulk(d, nw, nb, f, keep);
            if (bb) { bulk(d + nb, y.bias[w_i] + (u64)a0 * AB, bb, f, keep); if (pair) bulk(d + nb + bb, y.bias[w_i] + (u64)(F + a0) * AB, bb, f, keep); }
            if (hb) { bulk(d + nb + bb * (pair ? 2 : 1), y.qn, hb, f, keep); bulk(d + nb + bb * (pair ? 2 : 1) + hb, y.kn, hb, f, keep); }
            done(f);
          }
        }
        const int chunk = pair ? p.chunk / 2 : p.chunk;
#pragma unroll 1
        for (int c0 = r0; c0 < r1 && st >= 0; c0 += chunk)
#pragma unroll 1
          for (int part = 0; part <= (int)pair; part++) {
            const int c1 = min(r1, c0 + chunk);
            if (HAS_PLAIN && p.bits == 0 && !p.mapped) {
#pragma unroll 1
              for (int s = c0; s < c1; s += p.tiles)
#pragma unroll 1
                for (int k0 = 0; k0 < p.columns; k0 += p.piece) {
                  const int bytes = p.pieces > 1 ? min(p.piece, p.columns - k0) * Size<WT>::B : min(p.tiles, c1 - s) * p.columns * Size<WT>::B;
                  st = order(bytes);
                  if (sends && st >= 0) {
                    bulk(rg.data + st * STAGE, y.w[w_i] + ((u64)(s + part * F) * p.columns + k0) * Size<WT>::B, bytes, rg.full + 8 * st, policy);
                    done(rg.full + 8 * st);
                  }
                }
            } else if (HAS_MAPPED && p.mapped) {
              const u64 map = maps + (u64)((l * 4 + w_i) * 3) * 128;
#pragma unroll 1
              for (int s = c0; s < c1; s += 16 * p.tiles)
#pragma unroll 1
                for (int ch = 0; ch < p.pieces; ch++) {
                  st = order(p.bytes);
                  const unsigned f = rg.full + 8 * st, d = rg.data + st * STAGE;
                  if (sends && st >= 0) {
                    const int at = s + part * F, bits = p.bits ? p.bits : 16, lines = p.piece * bits / 1024;
                    box(d, map, y.w[w_i], p.columns * bits / 8, p.rows, at, 16 * p.tiles, ch * lines, lines, 128, f, policy);
                    if (p.bits) {
                      const int each = p.scaled ? 1 : 2, all = p.columns / p.group * each, units = p.piece / p.group * each / 16;
                      box(d + p.scale_at, map + 128, y.s[w_i], all, p.rows, at, 16 * p.tiles, ch * units, units, 16, f, policy);
                      if (!p.scaled) box(d + p.bias_at, map + 256, y.z[w_i], all, p.rows, at, 16 * p.tiles, ch * units, units, 16, f, policy);
                    }
                    done(f);
                  }
                }
            } else if (HAS_LOOSE) {
              // Bytes of a row's scales, from anywhere within 16 bytes, and whether there are biases behind them.
              const int each = p.scaled ? 1 : 2, arrays = p.scaled ? 1 : 2, line = p.columns / p.group * each;
#pragma unroll 1
              for (int s = c0; s < c1; s += 16 * p.tiles) {
                const int n = min(16 * p.tiles, c1 - s);
                const u64 row = s + part * F;
#pragma unroll 1
                for (int ch = 0; ch < p.pieces; ch++) {
                  const int k0 = ch * p.piece, kn = min(p.piece, p.columns - k0), wb = kn * p.bits / 8, sb = kn / p.group * each;
                  unsigned bytes = 0;
                  _Pragma("unroll 1") for (int i = lane; i < n; i += 32) bytes += wb + arrays * ((((i * line) & 15) + sb + 15) & ~15);
                  st = order(__reduce_add_sync(ALL, bytes));
                  const unsigned f = rg.full + 8 * st, d = rg.data + st * STAGE;
                  if (st >= 0) {
                    const u64 w = y.w[w_i] + row * (p.columns * p.bits / 8) + k0 * p.bits / 8, at = row * line + k0 / p.group * each;
                    _Pragma("unroll 1") for (int i = COPIES ? 0 : lane; i < n; i += COPIES ? 1 : 32) bulk(d + i * p.pitch, w + (u64)i * (p.columns * p.bits / 8), wb, f, policy);
                    _Pragma("unroll 1") for (int i = COPIES ? 0 : lane; i < arrays * n; i += COPIES ? 1 : 32) {
                      const int z = i >= n, q = i - z * n, off = (q * line) & 15;
                      bulk(d + (z ? p.bias_at : p.scale_at) + q * p.scale_pitch, (z ? y.z[w_i] : y.s[w_i]) + at + (u64)q * line - off, (off + sb + 15) & ~15, f, policy);
                    }
                    done(f);
                  }
                  __syncwarp();
                }
              }
            }
          }
        if (ph == 0 && attends) {
          ROWS(y)
          if (newest && step > 0 && lane == 0) { Patience w{0, 0}; while (*(volatile int*)&sh.written < (step - 1) * L + l + 1 && !tired(w)); behind(); }
          __syncwarp();
#pragma unroll 1
          for (int j = j0; j < j1 && st >= 0; j += KROWS) {
            const int n = min(KROWS, j1 - j) * HD * Size<CT>::B;
            const u64 at = (((u64)kh * y.cap) + j) * (HD * Size<CT>::B);
            st = order(2 * n);
            const unsigned f = rg.full + 8 * st, d = rg.data + st * STAGE;
            if (sends && st >= 0) { bulk(d, y.kc + at, n, f, keep); bulk(d + n, y.vc + at, n, f, keep); done(f); }
          }
        }
      }
    // Nothing may be on its way into the shared memory of a block that has ended.
#if COPIES
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    if (st < 0) { u64 since = now(); while (now() - since < 2000000ull); }
#endif
    return;
  }
  int tok = ln->first ? ln->token : state->token;
  bool finished = false;
#pragma unroll 1
  for (int step = 0; step < steps && !finished; step++) {
    const unsigned e0 = ln->epoch + (unsigned)step * (L + 1);
    const float* rope = ln->rope + step * NROPE * RD;
    {
      int r0, r1; owned(D, PRODUCTS[1].unit, b, r0, r1);
      _Pragma("unroll 1") for (int i = 2 * t; i < r1 - r0; i += 1024) {
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int c = r0 + i + e;
          if (EMB_BITS == 0) v[e] = one<EMB_T>((const char*)emb + (u64)tok * D * Size<EMB_T>::B, c);
          else v[e] = element<EMB_BITS ? EMB_BITS : 4, EMB_G ? EMB_G : 64, EMB_S, ST>(emb, emb_scales, emb_biases, (u64)tok * D + c);
          v[e] *= EMB_SCALE; sh.own[i + e] = v[e];
        }
        publish2(x + X_IN + (r0 + i) / 2, v[0], v[1], e0);
      }
    }
    meet();
    u64 best = (u64)0x007fffffu << 32;  // minus infinity, of blocks without rows of the head
    int h0 = 0, h1 = 0;
#pragma unroll 1
    for (int op = 0; op <= 4 * L; op++) {
      WORK(op)
      const unsigned ep = e0 + l;
      if (ph == 4) { h0 = r0; h1 = r1; }
      if (r1 > r0) {
        TICK(0)
        float ss = 0;
        const char* aux = sm + rg.st * STAGE;
        const bool auxiliary = p.norm || p.biased;
        if (auxiliary) arrived(rg);
        const int src = ph == 0 || ph == 4 ? X_IN : ph == 1 ? X_OUT : ph == 2 ? X_MID : X_ACT;
        gather(x + src, ep, p.columns, [&](int c, bool in, float4 a) {
          if (p.norm && in) {
            ss += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
            a.x *= one<AT>(aux, c); a.y *= one<AT>(aux, c + 1); a.z *= one<AT>(aux, c + 2); a.w *= one<AT>(aux, c + 3);
          }
          STORE_X
        });
        TICK(1)
        if (auxiliary) {
          const int a0 = r0 & ~7, an = ((r1 + 7) & ~7) - a0, nb = p.norm ? D * AB : 0, bb = HAS_BIAS && p.biased ? an * AB : 0;
          if (HAS_BIAS && p.biased) _Pragma("unroll 1") for (int i = t; i < (r1 - r0) * (pair ? 2 : 1); i += 512) {
            const int second = i >= r1 - r0, k = i - second * (r1 - r0);
            bias[i] = one<AT>(aux + nb + second * bb, r0 - a0 + k);
          }
          if (QKN && ph == 0) _Pragma("unroll 1") for (int i = t; i < HD; i += 512) { const char* q = aux + nb + bb; sh.qn[i] = one<AT>(q, i); sh.kn[i] = one<AT>(q + HD * AB, i); }
          ss = warp_sum(ss);
          if (lane == 0) sh.red[warp] = ss;
          release(rg, lane); advance(rg);
        }
        meet();
        TICK(2)
        float rs = 1;
        if (p.norm) { float q = 0; _Pragma("unroll") for (int i = 0; i < 16; i++) q += sh.red[i]; rs = rsqrtf(q / D + (ph == 4 ? EPS_LAST : EPS)); }
        const int chunk = pair ? p.chunk / 2 : p.chunk;
#pragma unroll 1
        for (int c0 = r0; c0 < r1; c0 += chunk) {
          const int rows = min(chunk, r1 - c0);
          if (c0 > r0) meet();
#pragma unroll 1
          for (int part = 0; part <= (int)pair; part++) {
            float* out = slots + part * chunk * SLOT;
            PRODUCT
          }
          TICK(3)
          meet();
#pragma unroll 1
          for (int r = t; r - lane < rows; r += 512) {
            float a = 0;
            if (r < rows) {
              const float* q = slots + r * SLOT;
              a = rs * sum_of(q, p.shares);
              if (HAS_BIAS && p.biased) a += bias[c0 - r0 + r];
              if (ph == 2) {
                a = activation(a);
                if (GATED) {
                  float u = rs * sum_of(q + chunk * SLOT, p.shares);
                  if (HAS_BIAS && p.biased) u += bias[r1 - r0 + c0 - r0 + r];
                  a *= u;
                }
              } else if (ph == 1 || ph == 3) { a = a * RES_SCALE + sh.own[c0 - r0 + r]; sh.own[c0 - r0 + r] = a; }
              else if (ph == 4) {
                const int id = c0 + r;
                a *= LOGIT_SCALE;
                if (LOGIT_CAP > 0.f) a = LOGIT_CAP * tanhf(a * (1.f / (LOGIT_CAP > 0.f ? LOGIT_CAP : 1.f)));
                if (ln->want_logits) logits[id] = a;
                if (ln->biased) a += logit_bias[id];
                if (ln->penalised) {
                  const float c = counts[id];
                  if (c > 0.f) { if (ln->repetition != 1.f) a = a > 0.f ? a / ln->repetition : a * ln->repetition; a -= ln->presence + c * ln->frequency; }
                }
                lg[id - r0] = a;
                const u64 k = key_of(a, id); best = k > best ? k : best;
              }
            }
            // Neighbours share a word; there is an even number of rows, but of the head's.
            const float next = __shfl_down_sync(ALL, a, 1);
            if (r < rows && ph < 4 && !(lane & 1) && !(ln->fault && step == 1 && l == 0 && ph == 3 && c0 + r == 0))
              publish2(x + (ph == 0 ? X_QKV : ph == 1 ? X_MID : ph == 2 ? X_ACT : X_IN) + (c0 + r) / 2, a, next, ep + (ph == 3));
          }
        }
        meet();
        TICK(4)
      }
      if (ph == 0 && attends) {  // key-value head kh, part sp of its keys, GH heads of queries
        ROWS(y)
        const int row = n0 + step;
        constexpr int EH = (HALF + 31) / 32;
#pragma unroll 1
        for (int h = warp; h < (newest ? GH + 2 : GH); h += 16) {
          const uint2* src = x + X_QKV + (h < GH ? kh * GH + h : h == GH ? H + kh : H + KV + kh) * HALF;
          float* o = h < GH ? qs + h * HD : fresh_rows + (h - GH) * HD;
          uint2 u[EH]; float e[2 * EH];
          Patience w{0, 0};
          for (;;) {
            bool ok = true;
#pragma unroll
            for (int i = 0; i < EH; i++) { u[i] = make_uint2(ep & 255u, (ep >> 8) & 255u); if (lane + 32 * i < HALF) u[i] = peek(src + lane + 32 * i); }
#pragma unroll
            for (int i = 0; i < EH; i++) ok = ok && fresh(u[i].x, u[i].y, ep);
            if (ok || tired(w)) break;
          }
          __syncwarp();
          float ssh = 0;
#pragma unroll
          for (int i = 0; i < EH; i++) { e[2 * i] = value(u[i].x); e[2 * i + 1] = value(u[i].y); if (lane + 32 * i >= HALF) e[2 * i] = e[2 * i + 1] = 0; ssh += e[2 * i] * e[2 * i] + e[2 * i + 1] * e[2 * i + 1]; }
          if (QKN && h <= GH) ssh = rsqrtf(warp_sum(ssh) / HD + EPS_HEAD);
#pragma unroll
          for (int i = 0; i < EH; i++) {
            const int d = 2 * (lane + 32 * i);
            if (d < HD) {
              if (QKN && h <= GH) { const float* n = h < GH ? sh.qn : sh.kn; e[2 * i] *= ssh * n[d]; e[2 * i + 1] *= ssh * n[d + 1]; }
              *(float2*)(o + d) = make_float2(e[2 * i], e[2 * i + 1]);
            }
          }
          __syncwarp();
          if (h <= GH && y.rope >= 0) {
            const float* cs = rope + y.rope * RD;
            _Pragma("unroll 1") for (int i = lane; i < RD / 2; i += 32) {
              const int a = TRADITIONAL ? 2 * i : i, z = TRADITIONAL ? 2 * i + 1 : i + RD / 2;
              const float p0 = o[a], p1 = o[z], c = cs[2 * i], sn = cs[2 * i + 1];
              o[a] = p0 * c - p1 * sn; o[z] = p0 * sn + p1 * c;
            }
            __syncwarp();
          }
          if (h >= GH) {
            _Pragma("unroll 1") for (int d = lane; d < HD; d += 32) {
              store_one<CT>((void*)(h == GH ? y.kc : y.vc), ((long)kh * y.cap + row) * HD + d, o[d]);
              store_one<CT>(recent, (h - GH) * HD + d, o[d]);
            }
            // The next step's copy, by this block's own producer, must find it.
            behind(); __threadfence();
          }
        }
        meet();
        if (newest && t == 0) *(volatile int*)&sh.written = step * L + l + 1;
        TICK(5)
        constexpr int NC = HD / 8, LK = NC % 8 == 0 ? 8 : NC % 4 == 0 ? 4 : NC % 2 == 0 ? 2 : 1, KW = 32 / LK, CL = NC / LK, WK = 16 / GH;
        const int g = warp % GH, w0 = warp / GH, sl = lane % LK, kk = lane / LK;
        float q[CL * 8], o[CL * 8], m = -1e30f, s = 0;
#pragma unroll
        for (int i = 0; i < CL; i++)
#pragma unroll
          for (int e = 0; e < 8; e++) { o[i * 8 + e] = 0; q[i * 8 + e] = qs[g * HD + (sl + LK * i) * 8 + e] * ATT_SCALE; }
        // One key for each group of LK lanes. Groups keep maxima and sums of their own, which are joined at the end.
#define SCORE(T, kp, vp, ok) { \
          float d = 0, v8[8]; \
          _Pragma("unroll") for (int c = 0; c < CL; c++) { eight<T>(kp + (sl + LK * c) * 8 * Size<T>::B, v8); _Pragma("unroll") for (int e = 0; e < 8; e++) d += q[c * 8 + e] * v8[e]; } \
          _Pragma("unroll") for (int w = LK / 2; w; w >>= 1) d += __shfl_xor_sync(ALL, d, w); \
          if (ATT_CAP > 0.f) d = ATT_CAP * tanhf(d * (1.f / (ATT_CAP > 0.f ? ATT_CAP : 1.f))); \
          if (!(ok)) d = -1e30f; \
          const float mn = fmaxf(m, d); \
          if (__any_sync(ALL, mn > m)) { const float a = __expf(m - mn); s *= a; _Pragma("unroll") for (int e = 0; e < CL * 8; e++) o[e] *= a; m = mn; } \
          const float pr = (ok) ? __expf(d - m) : 0.f; s += pr; \
          _Pragma("unroll") for (int c = 0; c < CL; c++) { eight<T>(vp + (sl + LK * c) * 8 * Size<T>::B, v8); _Pragma("unroll") for (int e = 0; e < 8; e++) o[c * 8 + e] += pr * v8[e]; } }
bool own = newest;  // whether the row of this step, which lies in `recent`, is still to be looked at
#pragma unroll 1
        for (int j = j0; j < j1 || own;) {
          const bool old = j < j1;
          const int n = old ? min(KROWS, j1 - j) : 1;
          const char *kp = old ? sm + rg.st * STAGE : (const char*)recent, *vp = kp + n * HD * Size<CT>::B;
          if (old) arrived(rg);
          if (warp < GH * WK)
#pragma unroll 1
            for (int i = w0 * KW; i < n; i += WK * KW) { const int r = min(i + kk, n - 1) * HD * Size<CT>::B; SCORE(CT, kp + r, vp + r, i + kk < n) }
          if (old) { release(rg, lane); advance(rg); j += KROWS; } else own = false;
        }
        if (warp < GH * WK) {
          float M = m;
#pragma unroll
          for (int w = LK; w < 32; w <<= 1) M = fmaxf(M, __shfl_xor_sync(ALL, M, w));
          const float a = __expf(m - M); s *= a;
#pragma unroll
          for (int w = LK; w < 32; w <<= 1) s += __shfl_xor_sync(ALL, s, w);
          float* w = att + (w0 * GH + g) * (HD + 2);
#pragma unroll
          for (int e = 0; e < CL * 8; e++) {
            float v = o[e] * a;
#pragma unroll
            for (int k = LK; k < 32; k <<= 1) v += __shfl_xor_sync(ALL, v, k);
            if (kk == 0) w[(sl + LK * (e / 8)) * 8 + e % 8] = v;
          }
          if (lane == 0) { w[HD] = M; w[HD + 1] = s; }
        }
        meet();
        TICK(6)
        _Pragma("unroll 1") for (int i = t; i < GH * HALF; i += 512) {
          const int g2 = i / HALF, d = i % HALF; float M = -1e30f, A0 = 0, A1 = 0, B = 0;
          _Pragma("unroll 1") for (int w = 0; w < WK; w++) M = fmaxf(M, att[(w * GH + g2) * (HD + 2) + HD]);
          _Pragma("unroll 1") for (int w = 0; w < WK; w++) { const float* a = att + (w * GH + g2) * (HD + 2); const float f = __expf(a[HD] - M); A0 += f * a[2 * d]; A1 += f * a[2 * d + 1]; B += f * a[HD + 1]; }
          uint2* pp = x + X_PART + b * PART + g2 * (HALF + 2);
          publish2(pp + d, A0, A1, ep); if (d == 0) { publish(pp + HALF, M, ep); publish(pp + HALF + 1, B, ep); }
        }
        // Each part merges its share of the dims over all parts: lane w of a group of PARTS holds part w.
        constexpr int DIMS = (GH * HALF + PARTS - 1) / PARTS, ALLD = (DIMS * PARTS + 31) / 32 * 32;
#pragma unroll 1
        for (int i = t; i < ALLD; i += 512) {
          const int w = i % PARTS, dd = sp + PARTS * (i / PARTS); const bool in = dd < GH * HALF; const int g3 = in ? dd / HALF : 0, d = dd % HALF;
          const uint2* pp = x + X_PART + (kh * PARTS + w) * PART + g3 * (HALF + 2);
          uint2 um, ub, ua;
          Patience pt{0, 0};
          if (in) for (;;) {
            um = peek(pp + HALF); ub = peek(pp + HALF + 1); ua = peek(pp + d);
            if ((um.y == ep && ub.y == ep && fresh(ua.x, ua.y, ep)) || tired(pt)) break;
          }
          __syncwarp();
          float M = in ? __uint_as_float(um.x) : -1e30f; const float m0 = M;
#pragma unroll
          for (int k = PARTS / 2; k; k >>= 1) M = fmaxf(M, __shfl_xor_sync(ALL, M, k));
          const float f = in ? __expf(m0 - M) : 0.f; float A0 = in ? value(ua.x) * f : 0.f, A1 = in ? value(ua.y) * f : 0.f, B = in ? __uint_as_float(ub.x) * f : 0.f;
#pragma unroll
          for (int k = PARTS / 2; k; k >>= 1) { A0 += __shfl_xor_sync(ALL, A0, k); A1 += __shfl_xor_sync(ALL, A1, k); B += __shfl_xor_sync(ALL, B, k); }
          if (w == 0 && in) publish2(x + X_OUT + kh * GH * HALF + dd, A0 / B, A1 / B, ep);
        }
        meet();
        TICK(7)
      }
    }
    // The greatest logit of all, and the token.
    const unsigned ep = e0 + L;
    best = warp_max(best);
    if (lane == 0) sh.keys[warp] = best;
    meet();
    if (warp == 0) {
      best = warp_max(lane < 16 ? sh.keys[lane] : 0);
      if (lane < 2) publish(x + X_TOP + 2 * b + lane, __uint_as_float(lane ? (unsigned)best : (unsigned)(best >> 32)), ep);
      best = 0;
      _Pragma("unroll 1") for (int i = lane; i < NB; i += 32) {
        const uint2* q[2] = {x + X_TOP + 2 * i, x + X_TOP + 2 * i + 1}; float v[2]; fetch<2>(q, ep, v);
        const u64 k = ((u64)__float_as_uint(v[0]) << 32) | __float_as_uint(v[1]);
        sh.maxima[i] = peak_of(k); best = k > best ? k : best;
      }
      __syncwarp();
      best = warp_max(best);
      if (lane == 0) sh.keys[0] = best;
    }
    meet();
    const float peak = peak_of(sh.keys[0]);
    tok = (int)(0xffffffffu - (unsigned)sh.keys[0]);
    bool unresolved = false;
    if (ln->mode == 1 && fabsf(peak) < 3e38f) tok = draw(ln, x, ep, step, peak, lg, h0, h1, unresolved);
    if (tok < 0 || tok >= V) tok = 0;  // of NaN, or of a block that has given up: never an index
    if (ln->penalised && !unresolved && t == 0 && tok >= h0 && tok < h1) counts[tok] += 1.f;
    meet();
    const bool over = unresolved || *(volatile int*)&sh.bad;
    // Only the host's own wish may differ between blocks: block 0 reads it, and it counts from the next launch on.
    if (b == 0 && t == 0) {
      const int status = *(volatile int*)&sh.bad ? 2 : unresolved ? 1 : 0;
      volatile Said* out = (volatile Said*)said + (ln->serial + step) % SAID;
      out->token = tok; out->peak = peak; out->status = status;
      __threadfence_system();
      out->seq = (unsigned)(ln->serial + step + 1);
      if (step == steps - 1 || over) { state->token = tok; if (over || *(volatile const int*)host_stop) state->stop = 1; }
    }
    finished = over;
  }
  if (finished && t == 0) *(volatile int*)&sh.over = 1;  // the producer is ahead
}
