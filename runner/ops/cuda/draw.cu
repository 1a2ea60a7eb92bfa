// Draws a token from each row of logits, as `runner.ops.picking.draw` says: a block for a row.
//
// Weights are integers, parts of 2^-44 of the greatest token's, so that no order of sums makes a difference. What the
// filters leave is found from the top bits of logits to the lowest, three at a time, and not by sorting them.
typedef unsigned long long u64;
constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 16, THREADS = 32 * WARPS, LIST = 4096, DIGITS = 8, AT_ONCE = 16;
struct Options { unsigned chance; float temperature; int top_k; float top_p, log_min_p; };  // chance: parts of 2^-32

// Its order among numbers; NaN is the greatest, and zeros are equal.
static __device__ unsigned key_of(float v) {
  const unsigned u = __float_as_uint(v + 0.f);
  return v != v ? ALL : u & 0x80000000u ? ~u : u | 0x80000000u;
}
static __device__ float value_of(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

template <class T> static __device__ T warp_sum(T v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
  return v;
}

struct Row {
  const float* x;
  int size;
  float peak, temperature, log_min_p;
  __device__ float scaled(unsigned key) const { return (value_of(key) - peak) / temperature; }
  __device__ u64 weight(unsigned key) const { return __float2ull_rn(expf(scaled(key)) * 17592186044416.f); }
};

// The keys of every `step`-th logit, with their ids. Many are on their way at once: a block has a multiprocessor to itself.
template <class Use> static __device__ void over(const float* x, int from, int to, int step, Use use) {
  int i = from;
#pragma unroll 1
  for (; i + (AT_ONCE - 1) * step < to; i += AT_ONCE * step) {
    float v[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) v[u] = x[i + u * step];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) use(key_of(v[u]), i + u * step);
  }
#pragma unroll 1
  for (; i < to; i += step) use(key_of(x[i]), i);
}

struct Shared {
  u64 sums[WARPS][DIGITS], all[DIGITS];
  unsigned counts[WARPS][DIGITS], in_digit[DIGITS];
  unsigned list[LIST];
  unsigned listed;
};

// The sums over the block of each digit's and all higher digits' weights, and how many keys have each.
static __device__ void add_up(Shared& sh, u64 (&sums)[DIGITS], unsigned (&counts)[DIGITS]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int d = 0; d < DIGITS; d++) {
    const u64 s = warp_sum(sums[d]);
    const unsigned c = warp_sum(counts[d]);
    if (lane == 0) { sh.sums[warp][d] = s; sh.counts[warp][d] = c; }
  }
  __syncthreads();
  if (threadIdx.x < DIGITS) {
    u64 s = 0;
    unsigned c = 0;
    for (int w = 0; w < WARPS; w++) { s += sh.sums[w][threadIdx.x]; c += sh.counts[w][threadIdx.x]; }
    sh.all[threadIdx.x] = s;
    sh.in_digit[threadIdx.x] = c;
  }
  __syncthreads();
}

// The greatest key at and above which there is as much as `wanted`, counted in tokens or weight; `above`: what is above.
template <bool WEIGHT> static __device__ unsigned lowest(Shared& sh, const Row& row, u64 wanted, u64& above) {
  unsigned found = 0;
  bool listed = false;
  above = 0;
#pragma unroll 1
  for (int shift = 30; shift >= 0; shift -= 3) {
    // Bits that are decided: none at first, as 32 is no multiple of 3.
    const unsigned decided = shift >= 29 ? 0 : ALL << (shift + 3);
    u64 sums[DIGITS];
    unsigned counts[DIGITS];
#pragma unroll
    for (int d = 0; d < DIGITS; d++) { sums[d] = 0; counts[d] = 0; }
    const auto count = [&](unsigned key, int) {
      if ((key ^ found) & decided) return;
      const unsigned digit = (key >> shift) & 7;
      const u64 w = WEIGHT ? row.weight(key) : 1;
#pragma unroll
      for (unsigned d = 0; d < DIGITS; d++) { sums[d] += digit >= d ? w : 0; counts[d] += digit == d; }
    };
    if (!listed) over(row.x, threadIdx.x, row.size, THREADS, count);
    else
#pragma unroll 1
      for (int i = threadIdx.x; i < (int)sh.listed; i += THREADS) count(sh.list[i], i);
    add_up(sh, sums, counts);
    int digit = 0;
    for (int d = 1; d < DIGITS; d++)
      if (above + sh.all[d] >= wanted) digit = d;
    if (digit + 1 < DIGITS) above += sh.all[digit + 1];
    found |= (unsigned)digit << shift;
    const unsigned left = sh.in_digit[digit];
    if (!listed && left <= LIST && shift > 0) {  // few are left: those are looked at from here on
      if (threadIdx.x == 0) sh.listed = 0;
      __syncthreads();
      const unsigned same = ALL << shift;
      over(row.x, threadIdx.x, row.size, THREADS, [&](unsigned key, int) {
        if (((key ^ found) & same) == 0) sh.list[atomicAdd(&sh.listed, 1u)] = key;
      });
      listed = true;
    }
    __syncthreads();
  }
  return found;
}

// The weight of all keys above one.
static __device__ u64 weight_above(Shared& sh, const Row& row, unsigned key, bool all) {
  u64 sums[DIGITS] = {0, 0, 0, 0, 0, 0, 0, 0};
  unsigned counts[DIGITS] = {0, 0, 0, 0, 0, 0, 0, 0};
  over(row.x, threadIdx.x, row.size, THREADS, [&](unsigned k, int) {
    if (all || k > key) sums[0] += row.weight(k);
  });
  add_up(sh, sums, counts);
  const u64 found = sh.all[0];
  __syncthreads();
  return found;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) runner_draw(const float* logits, const Options* options, unsigned* tokens, float* peaks, int size) {
  __shared__ Shared sh;
  __shared__ u64 best[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Options how = options[blockIdx.x];
  Row row = {logits + (long)blockIdx.x * size, size, 0.f, how.temperature, how.log_min_p};
  // The greatest, of equal ones the lowest id.
  u64 most = 0;
  over(row.x, threadIdx.x, size, THREADS, [&](unsigned key, int i) {
    const u64 k = ((u64)key << 32) | (ALL - (unsigned)i);
    most = k > most ? k : most;
  });
#pragma unroll
  for (int o = 16; o; o >>= 1) { const u64 other = __shfl_xor_sync(ALL, most, o); most = other > most ? other : most; }
  if (lane == 0) best[warp] = most;
  __syncthreads();
  for (int w = 0; w < WARPS; w++) most = best[w] > most ? best[w] : most;
  row.peak = value_of((unsigned)(most >> 32));
  if (threadIdx.x == 0) { peaks[blockIdx.x] = row.peak; tokens[blockIdx.x] = ALL - (unsigned)most; }
  if (how.temperature == 0.f || !(fabsf(row.peak) <= 3.4028235e38f)) return;
  // What stays: keys above `bound`, and the first `ties` of those that equal it.
  bool all = true;
  unsigned bound = 0;
  u64 ties = 0;
  if (how.top_k > 0 && how.top_k < size) {
    u64 above;
    bound = lowest<false>(sh, row, (u64)how.top_k, above);
    ties = (u64)how.top_k - above;
    all = false;
  }
  if (how.top_p < 1.f) {
    u64 above = weight_above(sh, row, bound, all);
    const u64 whole = above + (all ? 0 : ties * row.weight(bound));
    const float share = how.top_p * ((float)whole * 5.6843418860808015e-14f);
    const u64 wanted = max((u64)1, min(whole, __float2ull_ru(share * 17592186044416.f)));
    if (all || wanted <= above) {
      bound = lowest<true>(sh, row, wanted, above);
      ties = ~(u64)0;
    }
    const u64 each = row.weight(bound);
    if (each) ties = min(ties, (wanted - above + each - 1) / each);
    all = false;
  }
  // A warp has neighbours: what weighs more than its sum before the others' lies in a later one.
  const int share = (size + WARPS - 1) / WARPS, from = min(size, warp * share), to = min(size, from + share);
  const u64 tied = !all && row.scaled(bound) >= how.log_min_p ? row.weight(bound) : 0;
  u64 mine = 0, equal = 0;
  over(row.x, from + lane, to, 32, [&](unsigned k, int) {
    if ((all || k > bound) && row.scaled(k) >= how.log_min_p) mine += row.weight(k);
    equal += !all && k == bound;
  });
  mine = warp_sum(mine); equal = warp_sum(equal);
  if (lane == 0) { sh.sums[warp][0] = mine; sh.sums[warp][1] = equal; }
  __syncthreads();
  u64 total = 0, before = 0, seen = 0, equals = 0;
  for (int w = 0; w < WARPS; w++) {
    const u64 stay = equals >= ties ? 0 : min(ties - equals, sh.sums[w][1]);
    if (w == warp) { before = total; seen = equals; mine = sh.sums[w][0] + stay * tied; }
    total += sh.sums[w][0] + stay * tied;
    equals += sh.sums[w][1];
  }
  const u64 goal = __umul64hi(total, (u64)how.chance << 32);
  if (!(before <= goal && goal < before + mine)) return;
#pragma unroll 1
  for (int start = from; start < to; start += 32) {
    const int i = start + lane;
    const unsigned k = i < to ? key_of(row.x[i]) : 0;
    const bool is = i < to && !all && k == bound;
    const unsigned alike = __ballot_sync(ALL, is);
    u64 sum = 0;
    if (is) sum = seen + __popc(alike & ((1u << lane) - 1)) < ties ? tied : 0;
    else if (i < to && (all || k > bound) && row.scaled(k) >= how.log_min_p) sum = row.weight(k);
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) { const u64 other = __shfl_up_sync(ALL, sum, o); if (lane >= o) sum += other; }
    const unsigned over = __ballot_sync(ALL, before + sum > goal);
    if (over) {
      if (lane == 0) tokens[blockIdx.x] = start + __ffs(over) - 1;
      return;
    }
    before += __shfl_sync(ALL, sum, 31);
    seen += __popc(alike);
  }
}
