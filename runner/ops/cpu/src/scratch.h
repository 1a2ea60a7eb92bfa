// Grow-only, 64-byte aligned working memory of the calling thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace runner {

// Slots let one operation hold several blocks at a time; a block is valid until the same thread asks for the same slot.
enum class Slot { packed, partial, tile, row, codes, pairs, gathered, products, spread, count };
void* scratch(Slot slot, size_t bytes);

}  // namespace runner
