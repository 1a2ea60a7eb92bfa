// For ThreadSanitizer (scripts/sanitize): several threads run kernels over the one pool, with pauses in which its
// workers fall asleep and with changing thread counts. Every result must equal the one of a single thread, bit for bit.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels.h"
#include "pool.h"

using namespace runner;

namespace {

constexpr int kIn = 256, kOut = 600, kRows[] = {1, 5, 40}, kHeads = 6, kKv = 2, kKeys = 700, kDim = 64;

std::vector<float> values(size_t n, unsigned seed) {
  std::vector<float> v(n);
  for (auto& x : v) x = static_cast<float>(static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) - 32768) / 32768;
  return v;
}

// Every kind of kernel once; the outputs in one row.
std::vector<float> everything() {
  std::vector<float> all;
  auto x = values(40 * kIn, 1), w = values(kOut * kIn, 2), scales = values(kOut * kIn / 64, 3);
  std::vector<uint8_t> q(kOut * kIn / 2);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(i * 37 >> 2);
  for (int rows : kRows) {
    for (int bits : {0, 4}) {
      std::vector<float> out(rows * kOut);
      LinearArgs a{};
      a.x = x.data(), a.out = out.data(), a.m = rows, a.n = kOut, a.k = kIn, a.bits = bits, a.group = 64;
      a.w = bits ? static_cast<const void*>(q.data()) : w.data();
      a.scales = a.shifts = scales.data();
      kernels().linear(a);
      all.insert(all.end(), out.begin(), out.end());
    }
  }
  auto k = values(kKv * kKeys * kDim, 4);
  for (int l : {1, 30}) {
    auto query = values(kHeads * l * kDim, 5);
    std::vector<float> out(query.size()), alone(query.size());
    AttentionArgs a{};
    a.q = query.data(), a.k = a.v = k.data(), a.out = out.data();
    a.b = 1, a.h = kHeads, a.kv = kKv, a.l = l, a.s = kKeys, a.d = a.dv = kDim;
    a.qh = l * kDim, a.ql = kDim, a.kh = a.vh = kKeys * kDim, a.ks = a.vs = kDim;
    a.oh = l * kDim, a.ol = kDim;
    a.scale = 0.1f, a.causal = true;
    AttentionArgs two[] = {a, a};  // as two sequences side by side
    two[1].out = alone.data(), two[1].s = kKeys / 2 + l;
    kernels().attention(two, 2);
    all.insert(all.end(), out.begin(), out.end());
    all.insert(all.end(), alone.begin(), alone.end());
  }
  std::vector<int16_t> rows(kKv * (kKeys + 1) * (kDim + 2));
  AppendArgs append{};
  append.x = k.data(), append.to = rows.data(), append.type = DType::i16;
  append.b = 1, append.h = kKv, append.l = kKeys, append.capacity = kKeys + 1, append.d = kDim;
  append.sh = kKeys * kDim, append.sl = kDim;
  kernels().append(&append, 1, 0);
  all.insert(all.end(), rows.begin(), rows.end());
  auto wide = values(60000, 6);
  std::vector<float> out(60000);
  NormArgs norm{};
  norm.x = wide.data(), norm.out = out.data(), norm.rows = 200, norm.dim = 300, norm.eps = 1e-5f;
  kernels().norm(norm);
  all.insert(all.end(), out.begin(), out.end());
  GluArgs glu{};
  glu.x = wide.data(), glu.out = out.data(), glu.rows = 10, glu.dim = 3000, glu.gated = true;
  kernels().glu(glu);
  all.insert(all.end(), out.begin(), out.begin() + 30000);
  uint32_t best;
  float peak;
  ArgmaxArgs arg{wide.data(), &best, &peak, DType::f32, 1, 60000};
  kernels().argmax(arg);
  all.insert(all.end(), {static_cast<float>(best), peak});
  return all;
}

}  // namespace

int main() {
  int failures = 0;
  for (const char* isa : {"scalar", "avx2", "avx512", "amx", "amx_emulated"}) {
    if (!select_isa(isa)) continue;
    Pool::get().resize(1);
    auto expected = everything();
    Pool::get().resize(4);
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 6; ++i) {
          if (everything() != expected) ++wrong;
          if (i % 2 == t % 2) usleep(300);  // longer than the workers spin
        }
      });
    }
    threads.emplace_back([] {
      for (int i = 0; i < 20; ++i) {
        Pool::get().resize(1 + i % 5);
        usleep(2000);
      }
    });
    for (auto& thread : threads) thread.join();
    std::printf("%s: %s\n", isa, wrong ? "DIFFERENT RESULTS" : "equal results");
    failures += wrong;
  }
  return failures != 0;
}
