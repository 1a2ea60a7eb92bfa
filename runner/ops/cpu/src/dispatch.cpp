#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace runner {
namespace {

std::atomic<const Kernels*> current{nullptr};

struct Level {
  const char* name;
  const Kernels* (*find)();
};
constexpr Level kLevels[] = {
    {"scalar", scalar_kernels}, {"avx2", avx2_kernels}, {"avx512", avx512_kernels},
    {"amx", amx_kernels},       {"amx_emulated", amx_emulated_kernels},
};

const Kernels* by_name(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(level.name, name) == 0) return level.find();
  }
  return nullptr;
}

const Kernels* best() {
  if (const char* forced = std::getenv("RUNNER_KERNELS_ISA")) {
    if (const Kernels* table = by_name(forced)) return table;
  }
  if (const Kernels* table = amx_kernels()) return table;
  if (const Kernels* table = avx512_kernels()) return table;
  if (const Kernels* table = avx2_kernels()) return table;
  return scalar_kernels();
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    table = best();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

bool select_isa(const char* name) {
  const Kernels* table = by_name(name);
  if (table) current.store(table, std::memory_order_release);
  return table != nullptr;
}

}  // namespace runner
