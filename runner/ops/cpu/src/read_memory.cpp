// The read bandwidth that decoding is held against: every thread adds up the words of its own consecutive ranges.
#include "read_memory.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <stdexcept>

#include "huge_pages.h"
#include "pool.h"

namespace runner {

double read_seconds(int64_t size, int passes) {
  constexpr int64_t kPiece = 1 << 20;  // bytes claimed at a time: consecutive for each thread, so one long stream
  constexpr int64_t kLanes = 16;       // independent sums, so that no addition waits for the one before
  int64_t pieces = size / kPiece;
  if (pieces < 1 || passes < 1) throw std::invalid_argument("read_seconds: needs at least 1 MiB and one pass");
  constexpr int64_t kWords = kPiece / 8;
  std::unique_ptr<uint64_t[]> words(new uint64_t[pieces * kWords]);
  expect_huge_pages(words.get(), pieces * kPiece);  // as weights are held
  Pool& pool = Pool::get();
  pool.parallel_for((int)pieces, [&](int p) { std::fill_n(words.get() + p * kWords, kWords, uint64_t(p)); });
  std::atomic<uint64_t> total{0};
  double best = 1e30;
  for (int pass = 0; pass < passes; ++pass) {
    auto start = std::chrono::steady_clock::now();
    pool.parallel_for((int)pieces, [&](int p) {
      const uint64_t* from = words.get() + p * kWords;
      uint64_t lane[kLanes] = {};
      for (int64_t i = 0; i < kWords; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) lane[j] += from[i + j];
      }
      uint64_t sum = 0;
      for (uint64_t each : lane) sum += each;
      total.fetch_add(sum, std::memory_order_relaxed);  // keeps the compiler from leaving the reading out
    });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace runner
