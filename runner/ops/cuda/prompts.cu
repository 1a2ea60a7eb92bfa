// Keys and values of several prompts' first tokens, each prompt's into new buffers: `first` is where its tokens begin
// in what the pass computed, `count` how many they are, `capacity` the rows of its buffers, zero behind the tokens.
struct Prompt { int first, count, capacity; };

static __device__ void fill(const uint4* from, uint4* to, int tokens, int heads, int units, const Prompt& one) {
  const long all = (long)heads * one.capacity * units;
  for (long i = blockIdx.x * (long)blockDim.x + threadIdx.x; i < all; i += (long)gridDim.x * blockDim.x) {
    const long row = i / units % one.capacity, head = i / units / one.capacity;
    to[i] = row < one.count ? from[(head * tokens + one.first + row) * units + i % units] : make_uint4(0, 0, 0, 0);
  }
}

// k `[1, heads, tokens, D]` in `ku` units of 16 bytes a row, v in `vu`; a block's y is the prompt.
extern "C" __global__ void __launch_bounds__(256) runner_prompts(
    const uint4* k, const uint4* v, uint4* k0, uint4* v0, uint4* k1, uint4* v1, uint4* k2, uint4* v2, uint4* k3,
    uint4* v3, uint4* k4, uint4* v4, uint4* k5, uint4* v5, uint4* k6, uint4* v6, uint4* k7, uint4* v7, int tokens,
    int heads, int ku, int vu, int f0, int c0, int n0, int f1, int c1, int n1, int f2, int c2, int n2, int f3, int c3,
    int n3, int f4, int c4, int n4, int f5, int c5, int n5, int f6, int c6, int n6, int f7, int c7, int n7) {
  uint4 *const keys[8] = {k0, k1, k2, k3, k4, k5, k6, k7}, *const values[8] = {v0, v1, v2, v3, v4, v5, v6, v7};
  const Prompt all[8] = {{f0, c0, n0}, {f1, c1, n1}, {f2, c2, n2}, {f3, c3, n3}, {f4, c4, n4}, {f5, c5, n5}, {f6, c6, n6}, {f7, c7, n7}};
  const Prompt one = all[blockIdx.y];
  fill(k, keys[blockIdx.y], tokens, heads, ku, one);
  fill(v, values[blockIdx.y], tokens, heads, vu, one);
}
