#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace runner {
namespace {

std::atomic<const Kernels*> current{nullptr};

const Kernels* by_name(const char* name) {
  for (const Kernels* table : {avx512_kernels(), avx2_kernels(), scalar_kernels()}) {
    if (table && std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

const Kernels* best() {
  if (const char* forced = std::getenv("RUNNER_KERNELS_ISA")) {
    if (const Kernels* table = by_name(forced)) return table;
  }
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
