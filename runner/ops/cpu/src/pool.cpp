#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <system_error>
#include <thread>

namespace runner {
namespace {

constexpr int kMaxChunks = 0xffff;
// How long a worker looks for the next job before it sleeps: longer than the gaps within a decode step, as waking takes
// a system call and some 50 us. It yields all the while but for the first microseconds, in which most gaps end: who
// yields on a busy machine is back after another's time slice of some milliseconds, and half of the cores are missing
// until then. A thread with real work waits no longer than that for it.
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr auto kFirst = std::chrono::microseconds(20);

thread_local bool inside_pool = false;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr uint64_t pack(uint64_t epoch, uint64_t first, uint64_t end) { return epoch << 32 | end << 16 | first; }
constexpr uint64_t end_of(uint64_t ticket) { return ticket >> 16 & 0xffff; }
constexpr uint64_t next_of(uint64_t ticket) { return ticket & 0xffff; }

std::atomic<Pool*> instance{nullptr};

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// cgroup v2 then v1; infinity when there is no quota.
double cgroup_quota() {
  std::string line = read_line("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (std::sscanf(line.c_str(), "%lf %lf", &quota, &period) == 2 && period > 0) return quota / period;
  quota = std::atof(read_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str());
  period = std::atof(read_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str());
  return quota > 0 && period > 0 ? quota / period : INFINITY;
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) {
    std::set<std::string> cores;  // SMT siblings share one list, so a core counts once
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &mask)) continue;
      std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      std::string siblings = read_line(base + "thread_siblings_list");
      cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
    }
    if (!cores.empty()) return static_cast<int>(cores.size());
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int default_num_threads() {
  if (const char* text = std::getenv("RUNNER_NUM_THREADS")) {
    int n = std::atoi(text);
    if (n > 0) return std::min(n, Pool::kMostThreads);
  }
  double quota = std::max(1.0, std::floor(cgroup_quota() + 0.5));
  return static_cast<int>(std::min({double(usable_cores()), quota, double(Pool::kMostThreads)}));
}

Pool& Pool::get() {
  Pool* pool = instance.load(std::memory_order_acquire);
  if (pool) return *pool;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  pool = instance.load(std::memory_order_acquire);
  if (!pool) {
    // Never destroyed: workers may be asleep in it while the process exits.
    pool = new Pool(default_num_threads());
    instance.store(pool, std::memory_order_release);
    static bool registered = false;
    if (!registered) {
      registered = true;
      // Only a store in the child: allocating there could wait for a lock that another thread held at the fork.
      pthread_atfork(nullptr, nullptr, [] {
        instance.store(nullptr, std::memory_order_release);
        inside_pool = false;
      });
    }
  }
  return *pool;
}

void Pool::resize(int threads) {
  std::lock_guard<std::mutex> lock(run_mutex_);
  limit_.store(std::clamp(threads, 1, kMostThreads));
}

void Pool::start_workers(int count) {
  while (started_ < count) {
    try {
      std::thread(&Pool::work, this, started_ + 1).detach();
    } catch (const std::system_error&) {
      limit_.store(started_ + 1);  // the system gives no more threads: go on with those there are
      return;
    }
    ++started_;
  }
}

// Claims one piece of the current job, first of the thread's own range, and runs it; false when there is none left.
// A successful exchange proves that the job of `ticket` is unfinished, so body_ and context_ belong to it and stay put
// until done_ is counted up. A used-up ticket is never exchanged, so run() may overwrite it.
bool Pool::claim_and_run(int id) {
  int parts = parts_.load(std::memory_order_acquire);
  for (int i = 0; i < parts; ++i) {
    auto& range = ranges_[(id + i) % parts].ticket;
    uint64_t ticket = range.load(std::memory_order_acquire);
    while (next_of(ticket) < end_of(ticket)) {
      if (!range.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      body_(context_, static_cast<int>(next_of(ticket)));
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }
  return false;
}

bool Pool::has_work(int id) const {
  if (id >= size()) return false;
  for (int i = 0, parts = parts_.load(std::memory_order_acquire); i < parts; ++i) {
    uint64_t ticket = ranges_[i].ticket.load(std::memory_order_seq_cst);
    if (next_of(ticket) < end_of(ticket)) return true;
  }
  return false;
}

void Pool::run(int chunks, Body body, void* context) {
  if (chunks <= 1 || inside_pool || size() == 1) {
    for (int i = 0; i < chunks; ++i) body(context, i);
    return;
  }
  if (chunks > kMaxChunks) {  // more than a ticket can count: several to a piece
    int per = chunks / kMaxChunks + 1;
    return parallel_for((chunks + per - 1) / per, [=](int piece) {
      for (int i = piece * per; i < chunks && i < (piece + 1) * per; ++i) body(context, i);
    });
  }
  std::lock_guard<std::mutex> lock(run_mutex_);
  inside_pool = true;
  int workers = size() - 1;
  if (started_ < workers) start_workers(workers);
  body_ = body;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  int parts = size();
  parts_.store(parts, std::memory_order_release);
  epoch_ = (epoch_ + 1) & 0xffffffff;
  for (int i = 0; i < parts; ++i) {
    uint64_t first = static_cast<uint64_t>(chunks) * i / parts, end = static_cast<uint64_t>(chunks) * (i + 1) / parts;
    ranges_[i].ticket.store(pack(epoch_, first, end), std::memory_order_seq_cst);
  }
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
    wake_.notify_all();
  }
  while (claim_and_run(0)) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) {
    if (spins < 4096) {
      pause_cpu();
    } else {
      sched_yield();  // the last piece's owner was preempted: let it have this core
    }
  }
  inside_pool = false;
}

void Pool::work(int id) {
  inside_pool = true;
  for (;;) {
    if (id < size() && claim_and_run(id)) continue;
    const auto began = std::chrono::steady_clock::now();
    auto now = began;
    bool found = false;
    do {
      for (int i = 0; i < 32 && !found; ++i) {
        pause_cpu();
        found = has_work(id);
      }
      now = std::chrono::steady_clock::now();
      if (!found && now >= began + kFirst) sched_yield();
    } while (!found && now < began + kSpin);
    if (found) continue;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return has_work(id); });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace runner
