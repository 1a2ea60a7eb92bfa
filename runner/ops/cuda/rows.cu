// Decode steps of several sequences at once, as a graph of kernels: see docs/cuda.md. The planner puts its constants,
// `forms.cu` and `tiles.cu` before this text, and one kernel for each product behind it.
//
// A step's rows (one token of each sequence) are the columns of the tensor cores' results, eight to a tile. What a row
// gets depends on nothing but itself: sums are taken in an order that the product alone decides, and the attention's
// parts begin at positions that are multiples of PART.
struct Cache { u64 keys, values; int capacity, start; };  // start: position of the buffers' first row
struct Step {  // position -1: the row is not used
  int token[ROWS], position[ROWS];  // token ~p: the likeliest one of row p of the step before
  float rope[ROWS * NROPE * RD];  // cosine and sine of each plane, for each row and kind of RoPE
};
struct Choice { int expert; float weight; };

template <int WARPS> DI float block_sum(float v, float* red) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = v;
  __syncthreads();
  float s = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) s += red[i];
  return s;
}
DI float activation(float v) {
  if (ACT == 0) return v / (1.f + __expf(-v));
  if (ACT == 1) return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
  if (ACT == 2) { const float u = 1.5957691216057308f * (v + 0.044715f * v * v * v); return v / (1.f + __expf(-u)); }
  v = fmaxf(v, 0.f);
  return ACT == 3 ? v : v * v;
}

DI u64 key_of(float v, int id) {
  unsigned u = __float_as_uint(v);
  u = v != v ? 0xffffffffu : (u & 0x80000000u) ? ~u : (u | 0x80000000u);
  return ((u64)u << 32) | (0xffffffffu - (unsigned)id);
}
DI int id_of(u64 key) { return (int)(0xffffffffu - (unsigned)key); }
extern __shared__ __align__(16) float sm[];

// What becomes of a product: 0 a vector in float32, 1 added to the residual stream, 2 the input of the next product, 3
// logits, and the greatest of each row: its order as a number, then the lowest id. `id` is that of the first logit.
// A bias may be another rank's to add: then it is not there.
// N rows of weights; PAIR: row i goes with row i + N / 2, gate and up. A block has WM x WK warps: WM of them take MT tiles
// of weights each, and WK divide the columns. Grid: groups of RT tiles x blocks of weights' rows, so that all groups read
// the same weights at about the same time: more than the cache holds would come from memory for each.
template <int BITS, int G, int S, int K, int N, int MT, int WM, int WK, int MODE, bool PAIR, int NEXT_BITS, int NEXT_K, bool BIAS, int RT>
DI void product(const void* weight, const void* scales, const void* biases, const void* bias, const char* x, void* out, u64* best, int id) {
  constexpr int OUT = PAIR ? N / 2 : N, BLOCK = WM * (PAIR ? 16 : 16 * MT), LINES = WM * 16 * MT, LD = RT * 8 + 1, THREADS = WM * WK * 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wm = warp % WM, wk = warp / WM, g = lane >> 2, t = lane & 3;
  const int block = blockIdx.y * BLOCK, first = block + wm * (PAIR ? 16 : 16 * MT), row0 = blockIdx.x * RT * 8;
  next();
  Tile<BITS, G, S, K> tile[MT];
#pragma unroll
  for (int m = 0; m < MT; m++) tile[m].begin(weight, scales, biases, (PAIR ? OUT : 16) * m + first + g, PAIR && m == 0 ? OUT : N, t);
  float c[RT][MT][4];
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[r][m][i] = 0;
  multiply<BITS, G, S, K, RT, MT, WK>(tile, Ordered<BITS, K>{x + (long)blockIdx.x * RT * K * 16, lane}, wk, lane, c);
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) sm[((wk * LINES) + (wm * MT + m) * 16 + g + 8 * (i >> 1)) * LD + r * 8 + 2 * t + (i & 1)] = c[r][m][i];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < BLOCK * RT * 8; i += THREADS) {
    const int line = i % BLOCK, n = i / BLOCK, column = block + line, row = row0 + n;
    const int at = PAIR ? (line >> 4) * 32 + (line & 15) : line;
    if (MODE != 3 && column >= OUT) continue;
    float v = 0, up = 0;
#pragma unroll
    for (int w = 0; w < WK; w++) { v += sm[(w * LINES + at) * LD + n]; if (PAIR) up += sm[(w * LINES + at + 16) * LD + n]; }
    if (BIAS && bias && column < OUT) { v += one<AT>(bias, column); if (PAIR) up += one<AT>(bias, OUT + column); }
    if (MODE == 0) ((float*)out)[(long)row * N + column] = v;
    if (MODE == 1) { float* h = (float*)out + (long)row * N + column; *h = v * RES_SCALE + *h; }
    if (MODE == 2) { v = activation(v); if (PAIR) v *= up; put<NEXT_BITS, NEXT_K>((char*)out, row, column, v, 8); }
    if (MODE == 3) {
      v *= LOGIT_SCALE;
      if (LOGIT_CAP > 0.f) v = LOGIT_CAP * tanhf(v * (1.f / (LOGIT_CAP > 0.f ? LOGIT_CAP : 1.f)));
      u64 key = 0;
      if (column < OUT) { ((float*)out)[(long)row * N + column] = v; key = key_of(v, id + column); }
      // Lines of a row lie side by side.
#pragma unroll
      for (int o = (BLOCK < 32 ? BLOCK : 32) / 2; o; o >>= 1) { const u64 other = __shfl_xor_sync(ALL, key, o); key = other > key ? other : key; }
      if (lane % BLOCK == 0) atomicMax(best + row, key);
    }
  }
}

// ---- Embeddings and norms: a block for each row.
KERNEL(256) embed(const Step* step, const void* table, const void* scales, const void* biases, float* h, u64* best, const u64* before) {
  const int row = blockIdx.x;
  next(); join();
  if (threadIdx.x == 0) best[row] = 0;
  const int given = step->token[row];
  const int token = max(0, min(V - 1, given < 0 ? id_of(before[~given]) : given));
  for (int c = threadIdx.x; c < D; c += 256) {
    float v;
    if (EMB_BITS == 0) v = one<EMB_T>(table, (long)token * D + c);
    else v = element<EMB_BITS ? EMB_BITS : 4, EMB_G ? EMB_G : 64, EMB_S, ST>(table, scales, biases, (u64)token * D + c);
    h[(long)row * D + c] = v * EMB_SCALE;
  }
}
// `sum`, where there is one, is what all ranks have added up: it goes into the residual stream first.
template <int BITS> DI void normed(float* h, const void* weight, char* x, float* plain, const float* sum, float eps) {
  __shared__ float red[8];
  const int row = blockIdx.x;
  next(); join();
  float4* from = (float4*)(h + (long)row * D);
  float ss = 0;
  for (int u = threadIdx.x; u < D / 4; u += 256) {
    float4 a = from[u];
    if (sum) {
      const float4 b = ((const float4*)(sum + (long)row * D))[u];
      a.x += b.x * RES_SCALE; a.y += b.y * RES_SCALE; a.z += b.z * RES_SCALE; a.w += b.w * RES_SCALE;
      from[u] = a;
    }
    ss += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
  }
  const float rs = rsqrtf(block_sum<8>(ss, red) / D + eps);
  for (int u = threadIdx.x; u < D / 8; u += 256) {
    const float4 a = from[2 * u], b = from[2 * u + 1];
    float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= rs * one<AT>(weight, u * 8 + i);
    if (plain) { _Pragma("unroll") for (int i = 0; i < 8; i++) plain[(long)row * D + u * 8 + i] = rounded(v[i]); }
    ((uint4*)x)[unit_at<BITS, D>(row, u, 8)] = unit_of<BITS>(v);
  }
}

// ---- Attention: a block for `each` parts of PART positions of a row, of HG heads that share keys; the last block of a
// row's joins the parts.
// LK lanes share a key, each CL times 8 of its numbers.
constexpr int NC = HD / 8, LK = NC % 32 == 0 ? 32 : NC % 16 == 0 ? 16 : NC % 8 == 0 ? 8 : NC % 4 == 0 ? 4 : NC % 2 == 0 ? 2 : 1, CL = NC / LK, KW = 32 / LK;
constexpr int HG = GH % 4 == 0 && CL == 1 ? 4 : GH % 3 == 0 && CL == 1 ? 3 : GH % 2 == 0 && CL <= 2 ? 2 : 1, NHG = GH / HG, PART = 128, AW = 8;
struct Heads { float q[HG][CL * 8], o[HG][CL * 8], m[HG], s[HG]; };
// U keys for each group of lanes. Groups keep maxima and sums of their own, which are joined at the end.
template <int U> DI void scores(Heads& a, const uint4 (&k)[U][CL], const uint4 (&v)[U][CL], const bool (&in)[U]) {
  float d[U][HG];
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int g = 0; g < HG; g++) d[u][g] = 0;
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int c = 0; c < CL; c++) {
      float e[8];
      two<XT>(k[u][c].x, e[0], e[1]); two<XT>(k[u][c].y, e[2], e[3]); two<XT>(k[u][c].z, e[4], e[5]); two<XT>(k[u][c].w, e[6], e[7]);
#pragma unroll
      for (int g = 0; g < HG; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) d[u][g] += a.q[g][c * 8 + i] * e[i];
    }
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int g = 0; g < HG; g++) {
#pragma unroll
      for (int w = LK / 2; w; w >>= 1) d[u][g] += __shfl_xor_sync(ALL, d[u][g], w);
      if (ATT_CAP > 0.f) d[u][g] = ATT_CAP * tanhf(d[u][g] * (1.f / (ATT_CAP > 0.f ? ATT_CAP : 1.f)));
      if (!in[u]) d[u][g] = -1e30f;
    }
#pragma unroll
  for (int g = 0; g < HG; g++) {
    float m = a.m[g];
#pragma unroll
    for (int u = 0; u < U; u++) m = fmaxf(m, d[u][g]);
    const float f = __expf(a.m[g] - m);
    a.m[g] = m; a.s[g] *= f;
#pragma unroll
    for (int i = 0; i < CL * 8; i++) a.o[g][i] *= f;
#pragma unroll
    for (int u = 0; u < U; u++) { d[u][g] = in[u] ? __expf(d[u][g] - m) : 0.f; a.s[g] += d[u][g]; }
  }
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int c = 0; c < CL; c++) {
      float e[8];
      two<XT>(v[u][c].x, e[0], e[1]); two<XT>(v[u][c].y, e[2], e[3]); two<XT>(v[u][c].z, e[4], e[5]); two<XT>(v[u][c].w, e[6], e[7]);
#pragma unroll
      for (int g = 0; g < HG; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) a.o[g][c * 8 + i] += d[u][g] * e[i];
    }
}
extern "C" __global__ void __launch_bounds__(256, 2) attend(const Cache* caches, const Step* step, const float* qkv, const void* qn, const void* kn, char* x, float* partial, unsigned* counters, int window, int kind, int most, int each) {
  __shared__ float qs[HG * HD], fresh_rows[2 * HD], att[AW * HG * (HD + 2)];
  __shared__ __align__(16) unsigned short recent[2 * HD];
  __shared__ unsigned arrived;
  const int row = blockIdx.z, kh = blockIdx.y / NHG, hg = blockIdx.y % NHG, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  next();
  // Rows of the cache, and where they are, depend on nothing in this step: the first are on their way before `join`.
  const int at = step->position[row];
  if (at < 0) return;
  const Cache y = caches[row];
  const int lowest = max(y.start, window > 0 ? at + 1 - window : 0), p0 = lowest / PART, parts = at / PART - p0 + 1;
  const int first = blockIdx.x * each, last = min(parts, first + each), blocks = (parts + each - 1) / each;
  if (first >= parts) return;
  const auto begins = [&](int part) { return max(lowest, (p0 + part) * PART); };
  const auto ends = [&](int part) { return part == parts - 1 ? at : (p0 + part + 1) * PART; };
  int j1 = ends(first);
  const int sl = lane % LK, kk = lane / LK;
  constexpr int U = CL == 1 ? 2 : 1;
  const uint4 *keys = (const uint4*)y.keys + ((long)kh * y.capacity - y.start) * NC, *values = (const uint4*)y.values + ((long)kh * y.capacity - y.start) * NC;
  uint4 k[U][CL], v[U][CL];
  const auto load = [&](int j) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const long r = (long)min(j + u * KW + kk, j1 - 1) * NC + sl;
#pragma unroll
      for (int c = 0; c < CL; c++) { k[u][c] = keys[r + LK * c]; v[u][c] = values[r + LK * c]; }
    }
  };
  int j = begins(first) + warp * (KW * U);
  if (j < j1) load(j);
  join();
  const float* mine = qkv + (long)row * QR;
  for (int h = warp; h < HG + (last == parts ? 2 : 0); h += AW) {
    const float* from = mine + (h < HG ? kh * GH + hg * HG + h : h == HG ? H + kh : H + KV + kh) * HD;
    float* o = h < HG ? qs + h * HD : fresh_rows + (h - HG) * HD;
    float ss = 0;
    for (int d = lane; d < HD; d += 32) { const float v = from[d]; o[d] = v; ss += v * v; }
    if (QKN && h <= HG) {
      ss = rsqrtf(warp_sum(ss) / HD + EPS_HEAD);
      for (int d = lane; d < HD; d += 32) o[d] *= ss * one<AT>(h < HG ? qn : kn, d);
    }
    __syncwarp();
    if (h <= HG && kind >= 0) {
      const float* cs = step->rope + ((long)row * NROPE + kind) * RD;
      for (int i = lane; i < RD / 2; i += 32) {
        const int a = TRADITIONAL ? 2 * i : i, z = TRADITIONAL ? 2 * i + 1 : i + RD / 2;
        const float u = o[a], v = o[z], c = cs[2 * i], s = cs[2 * i + 1];
        o[a] = u * c - v * s; o[z] = u * s + v * c;
      }
      __syncwarp();
    }
    if (h >= HG)
      for (int d = lane; d < HD; d += 32) {
        const unsigned short v = narrow(o[d]);
        recent[(h - HG) * HD + d] = v;
        if (hg == 0) ((unsigned short*)(h == HG ? y.keys : y.values))[((long)kh * y.capacity + at - y.start) * HD + d] = v;
      }
  }
  __syncthreads();
  Heads a;
#pragma unroll
  for (int g = 0; g < HG; g++)
#pragma unroll
    for (int c = 0; c < CL; c++)
#pragma unroll
      for (int i = 0; i < 8; i++) a.q[g][c * 8 + i] = qs[g * HD + (sl + LK * c) * 8 + i] * ATT_SCALE;
  const int head0 = kh * GH + hg * HG;
  float* sums = partial + ((long)row * H + head0) * most * (HD + 2);  // [HG, most, HD + 2]
#pragma unroll 1
  for (int part = first; part < last; part++) {
#pragma unroll
    for (int g = 0; g < HG; g++) {
      a.m[g] = -1e30f; a.s[g] = 0;
#pragma unroll
      for (int i = 0; i < CL * 8; i++) a.o[g][i] = 0;
    }
#pragma unroll 1
    while (j < j1) {
      bool in[U];
#pragma unroll
      for (int u = 0; u < U; u++) in[u] = j + u * KW + kk < j1;
      scores<U>(a, k, v, in);
      j += AW * KW * U;
      if (j < j1) load(j);
    }
    if (part + 1 < last) {  // the next part's first keys are on their way while this one's sums are taken
      j = begins(part + 1) + warp * (KW * U); j1 = ends(part + 1);
      if (j < j1) load(j);
    }
    if (part == parts - 1 && warp == 0) {
      uint4 own_k[1][CL], own_v[1][CL];
#pragma unroll
      for (int c = 0; c < CL; c++) { own_k[0][c] = ((const uint4*)recent)[sl + LK * c]; own_v[0][c] = ((const uint4*)recent)[NC + sl + LK * c]; }
      const bool in[1] = {kk == 0};
      scores<1>(a, own_k, own_v, in);
    }
#pragma unroll
    for (int g = 0; g < HG; g++) {
      float M = a.m[g];
#pragma unroll
      for (int w = LK; w < 32; w <<= 1) M = fmaxf(M, __shfl_xor_sync(ALL, M, w));
      const float f = __expf(a.m[g] - M);
      float s = a.s[g] * f;
#pragma unroll
      for (int w = LK; w < 32; w <<= 1) s += __shfl_xor_sync(ALL, s, w);
      float* w = att + (warp * HG + g) * (HD + 2);
#pragma unroll
      for (int e = 0; e < CL * 8; e++) {
        float v = a.o[g][e] * f;
#pragma unroll
        for (int k = LK; k < 32; k <<= 1) v += __shfl_xor_sync(ALL, v, k);
        if (kk == 0) w[(sl + LK * (e / 8)) * 8 + e % 8] = v;
      }
      if (lane == 0) { w[HD] = M; w[HD + 1] = s; }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HG * HD; i += 32 * AW) {
      const int g = i / HD, d = i % HD;
      float M = -1e30f, A = 0, B = 0;
#pragma unroll
      for (int w = 0; w < AW; w++) M = fmaxf(M, att[(w * HG + g) * (HD + 2) + HD]);
#pragma unroll
      for (int w = 0; w < AW; w++) { const float* q = att + (w * HG + g) * (HD + 2); const float f = __expf(q[HD] - M); A += f * q[d]; B += f * q[HD + 1]; }
      if (parts == 1) put<OUT_BITS, H * HD>(x, row, (head0 + g) * HD + d, A / B, 8);
      else {
        float* to = sums + ((long)g * most + part) * (HD + 2);
        to[d] = A;
        if (d == 0) { to[HD] = M; to[HD + 1] = B; }
      }
    }
    __syncthreads();
  }
  if (parts == 1) return;
  __threadfence();
  __syncthreads();
  // The counter is zero again when all blocks have come.
  if (threadIdx.x == 0) asm volatile("atom.acq_rel.gpu.global.inc.u32 %0,[%1],%2;" : "=r"(arrived) : "l"(counters + ((long)row * KV + kh) * NHG + hg), "r"(blocks - 1) : "memory");
  __syncthreads();
  if (arrived != blocks - 1) return;
  __threadfence();
  // A warp for each head finds the greatest score of all parts and the sum, in the order of lanes and then of parts.
  if (warp < HG) {
    const float* from = sums + (long)warp * most * (HD + 2) + HD;
    float M = -1e30f, B = 0;
    for (int p = lane; p < parts; p += 32) M = fmaxf(M, __ldcg(from + (long)p * (HD + 2)));
#pragma unroll
    for (int o = 16; o; o >>= 1) M = fmaxf(M, __shfl_xor_sync(ALL, M, o));
    for (int p = lane; p < parts; p += 32) B += __expf(__ldcg(from + (long)p * (HD + 2)) - M) * __ldcg(from + (long)p * (HD + 2) + 1);
    B = warp_sum(B);
    if (lane == 0) { att[2 * warp] = M; att[2 * warp + 1] = 1.f / B; }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < HG * HD; i += 32 * AW) {
    const int g = i / HD, d = i % HD;
    const float* from = sums + (long)g * most * (HD + 2);
    const float M = att[2 * g];
    float A = 0;
#pragma unroll 8
    for (int p = 0; p < parts; p++) A += __expf(__ldcg(from + (long)p * (HD + 2) + HD) - M) * __ldcg(from + (long)p * (HD + 2) + d);
    put<OUT_BITS, H * HD>(x, row, (head0 + g) * HD + d, A * att[2 * g + 1], 8);
  }
}

// ---- Mixtures: a router in float32, the CHOSEN best of EXPERTS with the softmax of their scores as weights, and their
// products, each for one row.
#if EXPERTS
template <int T> DI float4 four(const void* p, long i) {
  if (T == 0) return *(const float4*)((const float*)p + i);
  const uint2 u = *(const uint2*)((const unsigned short*)p + i);
  float4 v; two<T>(u.x, v.x, v.y); two<T>(u.y, v.z, v.w);
  return v;
}
KERNEL(256) route(const Step* step, const float* x, const void* weight, float* logits, unsigned* counters, Choice* choices) {
  __shared__ unsigned arrived;
  __shared__ float all[EXPERTS], picked[CHOSEN], red[8];
  const int row = blockIdx.y, lane = threadIdx.x & 31, e = blockIdx.x * 8 + (threadIdx.x >> 5);
  next();
  constexpr int AT_ONCE = D / 128 < 16 ? D / 128 : 16;
  float4 w[AT_ONCE];
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) w[i] = four<ROUTER_T>(weight, (long)min(e, EXPERTS - 1) * D + lane * 4 + i * 128);
  join();
  if (step->position[row] < 0) return;
  if (e < EXPERTS) {
    float a = 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float4 v = *(const float4*)(x + (long)row * D + lane * 4 + i * 128);
      a += v.x * w[i].x + v.y * w[i].y + v.z * w[i].z + v.w * w[i].w;
    }
#pragma unroll 4
    for (int c = lane * 4 + AT_ONCE * 128; c < D; c += 128) {
      const float4 v = *(const float4*)(x + (long)row * D + c), u = four<ROUTER_T>(weight, (long)e * D + c);
      a += v.x * u.x + v.y * u.y + v.z * u.z + v.w * u.w;
    }
    a = warp_sum(a);
    if (lane == 0) logits[row * EXPERTS + e] = a;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("atom.acq_rel.gpu.global.inc.u32 %0,[%1],%2;" : "=r"(arrived) : "l"(counters + row), "r"(gridDim.x - 1) : "memory");
  __syncthreads();
  if (arrived != gridDim.x - 1) return;
  __threadfence();
  float M = -3e38f, sum = 0;
  for (int i = threadIdx.x; i < EXPERTS; i += 256) all[i] = __ldcg(logits + row * EXPERTS + i);
  __syncthreads();
  for (int i = lane; i < EXPERTS; i += 32) M = fmaxf(M, all[i]);
#pragma unroll
  for (int o = 16; o; o >>= 1) M = fmaxf(M, __shfl_xor_sync(ALL, M, o));
  // An expert's rank is how many have greater scores, or equal ones and come before.
  for (int i = threadIdx.x; i < EXPERTS; i += 256) {
    const float mine = all[i];
    int rank = 0;
#pragma unroll 8
    for (int k = 0; k < EXPERTS; k++) rank += all[k] > mine || (all[k] == mine && k < i);
    sum += __expf(mine - M);
    if (rank < CHOSEN) { choices[row * CHOSEN + rank].expert = i; picked[rank] = __expf(mine - M); }
  }
  sum = block_sum<8>(sum, red);
  float total = 0;
  for (int k = 0; k < CHOSEN; k++) total += picked[k];
  if (threadIdx.x < CHOSEN) choices[row * CHOSEN + threadIdx.x].weight = picked[threadIdx.x] / (CHOSEN_NORM ? total : sum) * CHOSEN_SCALE;
}
// Gate and up of a row's experts: blocks of F x (row, expert). A block has WM x WK warps, as above.
template <int BITS, int G, int S, int WM, int WK> DI void opened(const Step* step, const Choice* choices, const void* weight, const void* scales, const void* biases, const char* x, char* out) {
  constexpr int BLOCK = WM * 16, LINES = WM * 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wm = warp % WM, wk = warp / WM, g = lane >> 2, t = lane & 3;
  const int pair = blockIdx.y, row = pair / CHOSEN, first = blockIdx.x * BLOCK + wm * 16;
  next(); join();
  if (step->position[row] < 0) return;
  const long base = (long)choices[pair].expert * (2 * F);
  Tile<BITS, G, S, D> tile[2];
  tile[0].begin(weight, scales, biases, base + first + g, base + F, t);
  tile[1].begin(weight, scales, biases, base + F + first + g, base + 2 * F, t);
  float c[1][2][4] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}};
  // The row is a column of the core: those beside it are other rows, which go nowhere.
  multiply<BITS, G, S, D, 1, 2, WK>(tile, Ordered<BITS, D>{x + (long)(row >> 3) * D * 16, lane}, wk, lane, c);
  const int n = row & 7;
  if (t == n >> 1)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int e = 0; e < 2; e++) sm[wk * LINES + wm * 32 + m * 16 + g + 8 * e] = n & 1 ? c[0][m][2 * e + 1] : c[0][m][2 * e];
  __syncthreads();
  const int line = threadIdx.x, column = blockIdx.x * BLOCK + line, at = (line >> 4) * 32 + (line & 15);
  if (line >= BLOCK || column >= F) return;
  float v = 0, up = 0;
#pragma unroll
  for (int w = 0; w < WK; w++) { v += sm[w * LINES + at]; up += sm[w * LINES + at + 16]; }
  put<BITS_DOWN, F>(out, pair, column, activation(v) * up, 1);
}
// Down of all experts of a row, weighed and added: WK warps of a block for each expert. Where ranks add theirs up, `h` is
// not the residual stream, but where that begins.
template <int BITS, int G, int S, int WK> DI void closed(const Step* step, const Choice* choices, const void* weight, const void* scales, const void* biases, const char* x, float* h) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, k = warp / WK, g = lane >> 2, t = lane & 3, row = blockIdx.y, first = blockIdx.x * 16;
  next(); join();
  if (step->position[row] < 0) return;
  const Choice choice = choices[row * CHOSEN + k];
  const long base = (long)choice.expert * D;
  Tile<BITS, G, S, F> tile[1];
  tile[0].begin(weight, scales, biases, base + first + g, base + D, t);
  float c[1][1][4] = {{{0, 0, 0, 0}}};
  multiply<BITS, G, S, F, 1, 1, WK>(tile, Single<BITS, F>{x + (long)(row * CHOSEN + k) * F * 2, lane}, warp % WK, lane, c);
  if (t == 0)
#pragma unroll
    for (int e = 0; e < 2; e++) sm[warp * 16 + g + 8 * e] = c[0][0][2 * e] * choice.weight;
  __syncthreads();
  const int column = first + threadIdx.x;
  if (threadIdx.x >= 16 || column >= D) return;
  float v = 0;
  for (int w = 0; w < CHOSEN * WK; w++) v += sm[w * 16 + threadIdx.x];
  float* to = h + (long)row * D + column;
  *to = DOWN_SUMMED ? v : v * RES_SCALE + *to;
}
#endif
