// Packed rows of weights times up to 64 vectors, or packed or plain ones times those of each expert: y[i] = W x[i]. Before this come constants,
// `forms.cu`, `tiles.cu` and `parts.cu`: BITS, G (numbers of a group), S (what they share), K columns, N rows, EXPERTS (0: one matrix), RT tiles of 8 vectors a
// block, WM warps of MT tiles along the rows, WK warps along the columns, and the kernels' names.
extern __shared__ __align__(16) float sm[];
extern "C" __global__ void __launch_bounds__(WM * WK * 32) PRODUCT(
    const char* x, const void* weight, const void* scales, const void* biases,
#if EXPERTS
    const Part* parts,
#endif
    unsigned short* y, int rows) {
  constexpr int BLOCK = WM * MT * 16, LD = RT * 8 + 1, THREADS = WM * WK * 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wm = warp % WM, wk = warp / WM, g = lane >> 2, t = lane & 3;
  const int first = blockIdx.x * BLOCK + wm * MT * 16, from = blockIdx.y * RT * 8;
#if EXPERTS
  const Part part = parts[blockIdx.y];
#else
  const Part part = {0, from, min(RT * 8, rows - from)};
#endif
  if (part.count <= 0) return;
  const long base = (long)part.expert * N;
  Tile<BITS, G, S, K> tile[MT];
#pragma unroll
  for (int m = 0; m < MT; m++) tile[m].begin(weight, scales, biases, base + first + m * 16 + g, base + N, t);
  Lines<BITS, RT> look;
#pragma unroll
  for (int r = 0; r < RT; r++) look.at[r] = x + ((long)(part.first + min(r * 8 + g, part.count - 1)) * K + t * (Form<BITS>::KB / 4)) * 2;
  float c[RT][MT][4];
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[r][m][i] = 0;
  multiply<BITS, G, S, K, RT, MT, WK>(tile, look, wk, lane, c);
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) sm[(wk * BLOCK + (wm * MT + m) * 16 + g + 8 * (i >> 1)) * LD + r * 8 + 2 * t + (i & 1)] = c[r][m][i];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < BLOCK * part.count; i += THREADS) {
    const int line = i % BLOCK, n = i / BLOCK, column = blockIdx.x * BLOCK + line;
    if (column >= N) continue;
    float v = 0;
#pragma unroll
    for (int w = 0; w < WK; w++) v += sm[(w * BLOCK + line) * LD + n];
    y[(long)(part.first + n) * N + column] = narrow(v);
  }
}
