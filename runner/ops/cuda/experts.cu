// Rows of a mixture's tokens, taken to their experts and brought back. Before this come XT, `forms.cu` and `tiles.cu`.

// y[i] = x[ids[i]]; `back`: y[ids[i]] = x[i]. A block for each i; a row has so many units of 16 bytes.
extern "C" __global__ void __launch_bounds__(256) runner_rows(const uint4* x, const unsigned* ids, uint4* y, int units, int back) {
  const long here = (long)blockIdx.x * units, there = (long)ids[blockIdx.x] * units;
  for (int u = threadIdx.x; u < units; u += 256) y[(back ? there : here) + u] = x[(back ? here : there) + u];
}

// y[t] = sum of weights[t, k] x[t, k] over `count` k. A block for each t; a row has so many units of 8 numbers.
extern "C" __global__ void __launch_bounds__(256) runner_mixture(const uint4* x, const float* weights, uint4* y, int count, int units) {
  const uint4* from = x + (long)blockIdx.x * count * units;
  const float* w = weights + (long)blockIdx.x * count;
  for (int u = threadIdx.x; u < units; u += 256) {
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
    for (int k = 0; k < count; k++) {
      const uint4 v = from[(long)k * units + u];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float a, b;
        two<XT>(word_of(v, i), a, b);
        sum[2 * i] += w[k] * a;
        sum[2 * i + 1] += w[k] * b;
      }
    }
    y[(long)blockIdx.x * units + u] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
  }
}
