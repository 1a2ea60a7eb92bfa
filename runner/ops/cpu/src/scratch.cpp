#include "scratch.h"

#include <cstdlib>
#include <new>

namespace runner {
namespace {

struct Arena {
  void* block[static_cast<int>(Slot::count)] = {};
  size_t size[static_cast<int>(Slot::count)] = {};
  ~Arena() {
    for (void* p : block) std::free(p);
  }
};
thread_local Arena arena;

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  int i = static_cast<int>(slot);
  if (arena.size[i] < bytes) {
    std::free(arena.block[i]);
    arena.size[i] = (bytes + 65535) / 65536 * 65536;
    arena.block[i] = std::aligned_alloc(64, arena.size[i]);
    if (!arena.block[i]) {
      arena.size[i] = 0;
      throw std::bad_alloc();
    }
  }
  return arena.block[i];
}

}  // namespace runner
