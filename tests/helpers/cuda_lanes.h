// What texts of runner/ops/cuda need to be run on a CPU, warp after warp: lanes take turns, and give up their turn where
// they do something together, through arrays. Slow, and meant to be read: the tensor core is three loops.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }

inline float as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline float half_of(unsigned short h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
inline unsigned short to_half(float f) { _Float16 h = (_Float16)f; unsigned short u; memcpy(&u, &h, 2); return u; }
inline unsigned short to_bfloat(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline unsigned permuted(unsigned a, unsigned b, unsigned s) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned digit = s >> (4 * i) & 15, byte = both >> (8 * (digit & 7)) & 255;
    r |= (digit < 8 ? byte : byte & 128 ? 255u : 0u) << (8 * i);
  }
  return r;
}
inline int __float2int_rn(float f) { return (int)nearbyintf(f); }
template <class T> T __ldg(const T* p) { return *p; }

inline unsigned words[32][8];  // what the lanes of a warp show each other
inline struct { int x; } threadIdx;
inline int lane_of() { return threadIdx.x & 31; }
inline ucontext_t others, lanes[32];
inline std::function<void()> job;
inline bool ended[32];
inline void run_lane() {
  job();
  ended[lane_of()] = true;
}
// All lanes come here equally often: when a lane goes on, all others have come, or are ahead of nothing they share.
inline void together() { swapcontext(&lanes[lane_of()], &others); }
template <class Work> void in_warps(int count, Work work) {
  static std::vector<char> stacks(32 << 18);
  for (int warp = 0; warp < count; warp++) {
    job = [&] { work(warp, lane_of()); };
    for (int lane = 0; lane < 32; lane++) {
      getcontext(&lanes[lane]);
      lanes[lane].uc_stack.ss_sp = stacks.data() + ((size_t)lane << 18);
      lanes[lane].uc_stack.ss_size = 1 << 18;
      lanes[lane].uc_link = &others;
      makecontext(&lanes[lane], run_lane, 0);
      ended[lane] = false;
    }
    for (bool more = true; more;) {
      more = false;
      for (int lane = 0; lane < 32; lane++) {
        if (ended[lane]) continue;
        threadIdx.x = warp * 32 + lane;
        swapcontext(&others, &lanes[lane]);
        more = more || !ended[lane];
      }
    }
  }
}
template <class T> T __shfl_xor_sync(unsigned, T mine, int other) {
  memcpy(&words[lane_of()][0], &mine, 4);
  together();
  T theirs;
  memcpy(&theirs, &words[lane_of() ^ other][0], 4);
  together();
  return theirs;
}

// m16n8kK, K numbers of 256 / K bits: a lane (g, t) holds rows g and g + 8 of A in turn, column g of B, and of both the
// numbers of word t of each half of K.
template <int K, class Sum, class NumberA, class NumberB>
void multiplied(Sum (&c)[4], const unsigned (&mine)[6], NumberA a_of, NumberB b_of) {
  memcpy(words[lane_of()], mine, sizeof(mine));
  together();
  constexpr int EACH = K / 8, BITS = 32 / EACH;
  const int g = lane_of() >> 2, t = lane_of() & 3;
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    double sum = 0;
    for (int k = 0; k < K; k++) {
      const int half = k / (K / 2), word = k % (K / 2) / EACH, shift = k % EACH * BITS;
      const unsigned a = words[(row & 7) * 4 + word][(row >> 3) + 2 * half] >> shift;
      const unsigned b = words[column * 4 + word][4 + half] >> shift;
      sum += (double)a_of(a) * (double)b_of(b);
    }
    c[i] += (Sum)sum;
  }
  together();
}
inline void mma(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const auto byte = [](unsigned u) { return (int)(u & 255); };
  const auto signed_byte = [](unsigned u) { return (int)(signed char)(u & 255); };
  multiplied<32>(c, {a0, a1, a2, a3, b0, b1}, byte, signed_byte);
}
inline void core16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const auto number = [](unsigned u) { return half_of((unsigned short)u); };
  multiplied<16>(c, {a0, a1, a2, a3, b0, b1}, number, number);
}

// Shared memory: a stage of the ring behind the other.
alignas(1024) inline char sm[1 << 20];
template <class T> T shared(unsigned at) {
  if (at % sizeof(T) || at + sizeof(T) > sizeof(sm)) abort();
  T value;
  memcpy(&value, sm + at, sizeof(T));
  return value;
}
inline void lds128(unsigned at, unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
  const uint4 u = shared<uint4>(at);
  a = u.x, b = u.y, c = u.z, d = u.w;
}
inline void lds64(unsigned at, unsigned& a, unsigned& b) {
  const uint64_t u = shared<uint64_t>(at);
  a = (unsigned)u, b = (unsigned)(u >> 32);
}
inline unsigned lds32(unsigned at) { return shared<unsigned>(at); }
inline unsigned lds16(unsigned at) { return shared<unsigned short>(at); }
inline unsigned lds8(unsigned at) { return shared<unsigned char>(at); }
struct Ring { unsigned data; int st; };
inline void arrived(const Ring&) {}
inline void release(const Ring&, int) {}
inline void advance(Ring& r) { r.st++; }
