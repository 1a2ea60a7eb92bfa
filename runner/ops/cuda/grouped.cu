// Matrices of experts times many vectors of each: y[i] = W x[i], both of 16-bit numbers, K columns, N rows of weights. Before
// this come constants, `forms.cu`, `tiles.cu` and `parts.cu`.
//
// A block takes 128 vectors of an expert, or what there is left of them, and 128 rows of weights, in steps of 64 columns: a
// tile of 16 KB of each, of which STAGES are on their way at once. A row of a tile has eight units of 16 bytes, which change
// places by the row's number, so that the eight rows that lanes read together lie in different banks. Eight warps, four
// down the vectors and two along the weights, take 32 x 64 results each. A result's products are added in the order of the
// columns, whatever stands beside it.
constexpr int UNITS = STEP / 8, TILE_BYTES = BLOCK * STEP * 2;
extern __shared__ __align__(128) char sm[];

DI unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
// 16 bytes from memory, or zeros.
DI void copy(unsigned to, const char* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DI void four(unsigned (&v)[4], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
DI unsigned unit(int row, int u) { return (row * UNITS + (u ^ (row & 7))) * 16; }

extern "C" __global__ void __launch_bounds__(256, 2) PRODUCT(
    const char* x, const char* weight, const void* scales, const void* biases, const Part* parts, unsigned short* y, int rows) {
  const Part part = parts[blockIdx.y];
  if (part.count <= 0) return;
  constexpr int NK = (K + STEP - 1) / STEP;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, down = warp & 3, along = warp >> 2, first = blockIdx.x * BLOCK;
  const char *from = x + (long)part.first * K * 2, *matrix = weight + ((long)part.expert * N + first) * K * 2;
  const unsigned base = address(sm);
  const auto load = [&](int step) {
    const unsigned to = base + step % STAGES * (2 * TILE_BYTES);
#pragma unroll
    for (int i = 0; i < BLOCK * UNITS / 256; i++) {
      const int at = i * 256 + threadIdx.x, row = at / UNITS, u = at % UNITS, column = step * STEP + u * 8;
      const long place = (long)row * K + column;
      const bool there = column < K;
      copy(to + unit(row, u), from + (row < part.count && there ? place * 2 : 0), row < part.count && there);
      copy(to + TILE_BYTES + unit(row, u), matrix + (first + row < N && there ? place * 2 : 0), first + row < N && there);
    }
  };
  const bool idle = down * 32 >= part.count;
  float c[2][8][4];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[m][n][i] = 0;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < NK) load(s);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
#pragma unroll 1
  for (int step = 0; step < NK; step++) {
    // This step's tiles have come, and all have done with those of the last one, whose place is filled next.
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
    __syncthreads();
    if (step + STAGES - 1 < NK) load(step + STAGES - 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (idle) continue;
    const unsigned a0 = base + step % STAGES * (2 * TILE_BYTES), b0 = a0 + TILE_BYTES;
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
      unsigned a[2][4], b[4][4];
#pragma unroll
      for (int m = 0; m < 2; m++) four(a[m], a0 + unit(down * 32 + m * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < 4; n++) four(b[n], b0 + unit(along * 64 + n * 16 + (lane & 7) + (lane >> 4) * 8, k * 2 + (lane >> 3 & 1)));
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++) core(c[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[n >> 1][(n & 1) * 2], b[n >> 1][(n & 1) * 2 + 1]);
    }
  }
  if (idle) return;
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = down * 32 + m * 16 + e * 8 + g;
      if (row >= part.count) continue;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const int column = first + along * 64 + n * 8 + t * 2;
        if (column < N) *(unsigned*)(y + (long)(part.first + row) * N + column) = pack(c[m][n][2 * e], c[m][n][2 * e + 1]);
      }
    }
}
