#include "rope_table.h"

#include <array>
#include <cmath>

namespace runner {
namespace {

// The key is every input; frequencies by value, as their buffer may be reused.
struct Entry {
  RopeSpec spec{0, false, 0, 0};
  std::vector<int32_t> offsets;
  std::vector<float> freqs;
  int64_t length = 0;
  RopeTable table;

  bool matches(const RopeSpec& s, const int32_t* o, int64_t count, int64_t l, const float* f) const {
    if (!(spec == s) || length != l || static_cast<int64_t>(offsets.size()) != count) return false;
    if (freqs.size() != (f ? static_cast<size_t>(s.dims / 2) : 0)) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (offsets[i] != o[i]) return false;
    }
    for (size_t i = 0; i < freqs.size(); ++i) {
      if (freqs[i] != f[i]) return false;
    }
    return true;
  }
};

void fill(Entry& e) {
  int half = e.spec.dims / 2;
  std::vector<float> inverse(half);
  for (int i = 0; i < half; ++i) {
    inverse[i] = e.freqs.empty() ? static_cast<float>(std::pow(double(e.spec.base), -2.0 * i / e.spec.dims))
                                 : 1.0f / e.freqs[i];
  }
  size_t size = e.offsets.size() * e.length * half, at = 0;
  e.table.cos.resize(size);
  e.table.sin.resize(size);
  for (int32_t offset : e.offsets) {
    for (int64_t l = 0; l < e.length; ++l) {
      float position = static_cast<float>(offset + l) * e.spec.scale;
      for (int i = 0; i < half; ++i, ++at) {
        float angle = position * inverse[i];
        e.table.cos[at] = std::cos(angle);
        e.table.sin[at] = std::sin(angle);
      }
    }
  }
}

}  // namespace

const RopeTable& rope_table(const RopeSpec& spec, const int32_t* offsets, int64_t count, int64_t length,
                            const float* freqs) {
  // Two entries: models with sliding layers alternate between two sets of frequencies.
  static thread_local std::array<Entry, 2> entries;
  static thread_local int oldest = 0;
  for (int i = 0; i < 2; ++i) {
    if (entries[i].matches(spec, offsets, count, length, freqs)) {
      oldest = 1 - i;
      return entries[i].table;
    }
  }
  Entry& e = entries[oldest];
  oldest = 1 - oldest;
  e.spec = spec;
  e.offsets.assign(offsets, offsets + count);
  e.freqs.assign(freqs, freqs ? freqs + spec.dims / 2 : freqs);
  e.length = length;
  fill(e);
  return e.table;
}

}  // namespace runner
