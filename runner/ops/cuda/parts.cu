// Which vectors of an expert a block takes, RT * 8 at most; their `chosen` experts are in ascending order.
struct Part { int expert, first, count; };

#if EXPERTS
// One block of 1024 threads assigns them.
extern "C" __global__ void __launch_bounds__(1024) PARTS(const unsigned* chosen, Part* parts, int rows, int most) {
  __shared__ int sums[1024];
  const int e = threadIdx.x;
  int bound[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {  // the first vector of expert e, and of the next
    int low = 0, high = rows;
    while (low < high) { const int mid = (low + high) >> 1; if (chosen[mid] < (unsigned)(e + i)) low = mid + 1; else high = mid; }
    bound[i] = low;
  }
  const int count = e < EXPERTS ? bound[1] - bound[0] : 0, mine = (count + RT * 8 - 1) / (RT * 8);
  sums[e] = mine;
  __syncthreads();
  for (int o = 1; o < 1024; o <<= 1) {
    const int v = e >= o ? sums[e - o] : 0;
    __syncthreads();
    sums[e] += v;
    __syncthreads();
  }
  for (int i = 0; i < mine; i++) parts[sums[e] - mine + i] = {e, bound[0] + i * RT * 8, min(RT * 8, count - i * RT * 8)};
  for (int i = sums[1023] + e; i < most; i += 1024) parts[i] = {0, 0, 0};
}
#endif
