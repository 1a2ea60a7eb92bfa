#include "arena.h"

namespace runner {

struct Arena::Block {
  explicit Block(size_t bytes) : buffer(mx::allocator::allocator().malloc(bytes)), size(bytes) {}
  Block(const Block&) = delete;
  ~Block() { mx::allocator::allocator().free(buffer); }

  mx::allocator::Buffer buffer;
  const size_t size;
};

mx::allocator::Data Arena::take(size_t bytes) {
  std::shared_ptr<Block> block;
  std::lock_guard lock(mutex_);
  // A block may stay with a result for long, so that little of it may be left over.
  if (auto found = free_.lower_bound(bytes); found != free_.end() && found->first - bytes <= bytes / 8) {
    block = std::move(found->second);
    free_.erase(found);
  } else {
    block = all_.emplace_back(std::make_shared<Block>(bytes));
    bytes_ += bytes;
  }
  auto buffer = block->buffer;
  return mx::allocator::Data(buffer, [block, arena = weak_from_this()](mx::allocator::Buffer) {
    if (auto open = arena.lock()) open->put(block);
  });
}

void Arena::put(const std::shared_ptr<Block>& block) {
  std::lock_guard lock(mutex_);
  // In front of those of its size: what was used last is in the CPU's caches.
  free_.emplace_hint(free_.lower_bound(block->size), block->size, block);
}

}  // namespace runner
