#pragma once

#include <cstdint>

#include "mlx/array.h"

namespace runner {

// Asks for pages of 2 MiB for memory that nobody has touched yet, as far as the system has them.
void expect_huge_pages(void* memory, int64_t size);

// Memory of `size` bytes, a multiple of 64, for arrays to be moved into: uint8, of any content.
mlx::core::array pages_op(int64_t size);

// Moves the numbers of an evaluated array behind the first `at` bytes of such memory, which lives as long as the array
// does. False, and nothing is done, where others share its numbers, or they do not lie one behind the other.
bool move_into(mlx::core::array array, const mlx::core::array& pages, int64_t at);

}  // namespace runner
