// Attention of one new token of each of several sequences, whose key and value are written into the sequence's buffers
// on the way. A block has a sequence and a head of keys; its warps share out the tokens behind, eight at a time, and add
// up what they found. Behind forms.cu, with constants from several.py: XT (type of numbers), D and DV (numbers of a key
// and of a value), G (heads of queries for each head of keys), N (buffers that the kernel is given), WINDOW (tokens that
// a query sees, 0: all), SINKS (whether each head has one), SCALE and CAP (of scores; CAP 0: none).
constexpr int WARPS = 8, AHEAD = 4, E = (D + 31) / 32, EV = (DV + 31) / 32;
constexpr float NEVER = -3.0e38f;

#if XT == 0
typedef unsigned Number;
DI unsigned stored(float f) { return __float_as_uint(f); }
#elif XT == 1
typedef unsigned short Number;
DI unsigned short stored(float f) { return to_half(f); }
#else
typedef unsigned short Number;
DI unsigned short stored(float f) {  // to the nearest, or the even one of two
  const unsigned u = __float_as_uint(f);
  return f != f ? 0x7fc0 : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
#endif

// q [rows, KV * G, D], keys [rows, KV, D], values [rows, KV, DV]; places [rows, 3]: the row of each buffer that the new
// token goes to, the rows that the buffer has, and the first one that is seen; buffers [KV, rows of the buffer, D or DV].
extern "C" __global__ void __launch_bounds__(WARPS * 32) ATTEND(
    const Number* q, const Number* keys, const Number* values, const int* places, const Number* sinks, BUFFERS,
    Number* out, int rows) {
  __shared__ float most[WARPS], sums[WARPS], found[WARPS][DV];
  const int r = blockIdx.x, h = blockIdx.y, heads = gridDim.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  Number *K = 0, *V = 0;
  switch (r) { CHOOSE }
  const int at = places[3 * r], held = places[3 * r + 1], first = places[3 * r + 2];
  K += (u64)h * held * D;
  V += (u64)h * held * DV;
  const Number* key = keys + ((u64)r * heads + h) * D;
  const Number* value = values + ((u64)r * heads + h) * DV;

  float x[G][E], sum[G][EV], top[G], total[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    top[g] = NEVER;
    total[g] = 0;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int d = lane + 32 * e;
      x[g][e] = d < D ? one<XT>(q, (((u64)r * heads + h) * G + g) * D + d) * (SCALE) : 0;
    }
#pragma unroll
    for (int e = 0; e < EV; e++) sum[g][e] = 0;
  }
  for (int start = first + warp; start <= at; start += WARPS * AHEAD) {
    float k[AHEAD][E], v[AHEAD][EV];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const int t = start + a * WARPS;
      const Number* of_k = t < at ? K + (u64)t * D : key;  // the new one is not read from where it is written
      const Number* of_v = t < at ? V + (u64)t * DV : value;
#pragma unroll
      for (int e = 0; e < E; e++) {
        const int d = lane + 32 * e;
        k[a][e] = t <= at && d < D ? one<XT>(of_k, d) : 0;
      }
#pragma unroll
      for (int e = 0; e < EV; e++) {
        const int d = lane + 32 * e;
        v[a][e] = t <= at && d < DV ? one<XT>(of_v, d) : 0;
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float score[AHEAD], high = top[g];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        float s = 0;
#pragma unroll
        for (int e = 0; e < E; e++) s += x[g][e] * k[a][e];
#pragma unroll
        for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(ALL, s, o);
        if (CAP > 0) s = (CAP) * tanhf(s / (CAP > 0 ? CAP : 1.0f));
        score[a] = start + a * WARPS <= at ? s : NEVER;
        high = fmaxf(high, score[a]);
      }
      const float kept = __expf(top[g] - high);
      top[g] = high;
      total[g] *= kept;
#pragma unroll
      for (int e = 0; e < EV; e++) sum[g][e] *= kept;
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const float p = __expf(score[a] - high);
        total[g] += p;
#pragma unroll
        for (int e = 0; e < EV; e++) sum[g][e] += p * v[a][e];
      }
    }
  }
#pragma unroll
  for (int g = 0; g < G; g++) {
    if (!lane) { most[warp] = top[g]; sums[warp] = total[g]; }
#pragma unroll
    for (int e = 0; e < EV; e++)
      if (lane + 32 * e < DV) found[warp][lane + 32 * e] = sum[g][e];
    __syncthreads();
    for (int d = threadIdx.x; d < DV; d += WARPS * 32) {
      const float sink = SINKS ? one<XT>(sinks, h * G + g) : NEVER;
      float high = sink, all = 0, y = 0;
      for (int w = 0; w < WARPS; w++) high = fmaxf(high, most[w]);
      for (int w = 0; w < WARPS; w++) {
        const float share = __expf(most[w] - high);
        all += sums[w] * share;
        y += found[w][d] * share;
      }
      if (SINKS) all += __expf(sink - high);
      out[(((u64)r * heads + h) * G + g) * DV + d] = stored(y / all);
    }
    __syncthreads();
  }
  for (int d = threadIdx.x; d < D; d += WARPS * 32) K[(u64)at * D + d] = key[d];
  for (int d = threadIdx.x; d < DV; d += WARPS * 32) V[(u64)at * DV + d] = value[d];
}
