// One thread pool for all kernels: fork-join with a very short latency.
//
// run() publishes a job of `chunks` numbered pieces. Every thread has a consecutive range of them (so it reads memory
// in one stream) and claims one piece at a time, then helps with the others' ranges: a worker that is late, asleep or
// preempted costs nothing but its share, the caller finishes the job alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace runner {

class Pool {
 public:
  static constexpr int kMostThreads = 64;
  using Body = void (*)(void* context, int chunk);

  // The process's pool; a forked child gets a fresh one (threads do not survive a fork).
  static Pool& get();

  // Number of threads that take part, the caller included.
  int size() const { return limit_.load(std::memory_order_relaxed); }
  void resize(int threads);

  // Calls body(context, i) for i in [0, chunks). Nested calls run inline; concurrent callers take turns.
  // The body must not throw.
  void run(int chunks, Body body, void* context);

  template <class F>
  void parallel_for(int chunks, F&& f) {
    using Fn = std::remove_reference_t<F>;
    run(chunks, [](void* context, int chunk) { (*static_cast<Fn*>(context))(chunk); }, (void*)&f);
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

 private:
  explicit Pool(int threads) : limit_(threads) {}
  void start_workers(int count);
  void work(int id);
  bool has_work(int id) const;
  bool claim_and_run(int id);

  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};     // epoch << 32 | end << 16 | next piece
  };

  std::mutex run_mutex_;                 // one job at a time
  uint64_t epoch_ = 0;                   // under run_mutex_
  Range ranges_[kMostThreads];
  std::atomic<int> parts_{1};            // ranges in use
  alignas(64) std::atomic<int> done_{0};  // pieces finished
  Body body_ = nullptr;                  // written only while no piece is claimable, read only after a claim
  void* context_ = nullptr;
  std::atomic<int> limit_;
  int started_ = 0;                      // workers running, under run_mutex_
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
};

// RUNNER_NUM_THREADS, or the cores this process may really use (affinity mask, cgroup quota, one per SMT pair).
int default_num_threads();

}  // namespace runner
