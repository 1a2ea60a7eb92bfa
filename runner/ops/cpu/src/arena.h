// Memory for a list of operations that run one after another: what one no longer needs, a later one gets.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "mlx/allocator.h"

namespace runner {

namespace mx = mlx::core;

// Bytes come back when the last array over them goes, which is while the list is made: the work itself is done later, in
// the same order. So all blocks stay until the arena goes, which must outlive the work; a block that an array still has
// then, a result for instance, stays with that.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  mx::allocator::Data take(size_t bytes);
  // Of all blocks: as much as the work needs at a time, about, not the sum over its operations.
  size_t bytes() const { return bytes_; }

 private:
  struct Block;
  void put(const std::shared_ptr<Block>& block);

  std::mutex mutex_;  // arrays go on any thread
  std::vector<std::shared_ptr<Block>> all_;
  std::multimap<size_t, std::shared_ptr<Block>> free_;
  size_t bytes_ = 0;
};

}  // namespace runner
