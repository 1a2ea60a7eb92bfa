// cos and sin of RoPE's angles, kept for the next call: all layers of a decode step ask for the same ones.
#pragma once

#include <cstdint>
#include <vector>

namespace runner {

struct RopeSpec {
  int dims;
  bool traditional;
  float base, scale;
  bool operator==(const RopeSpec&) const = default;
};

struct RopeTable {
  std::vector<float> cos, sin;  // [offsets, length, dims / 2]
};

// angle(i, l) = (offset + l) * scale / freqs[i], with freqs[i] = base^(2 i / dims) where none are given.
// Valid until the thread's next call.
const RopeTable& rope_table(const RopeSpec& spec, const int32_t* offsets, int64_t count, int64_t length,
                            const float* freqs);

}  // namespace runner
