#pragma once

#include <cstdint>

namespace runner {

// Seconds of the fastest of `passes` readings of a fresh buffer of `size` bytes by all threads of the pool.
double read_seconds(int64_t size, int passes);

}  // namespace runner
