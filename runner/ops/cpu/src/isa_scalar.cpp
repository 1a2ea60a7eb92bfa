// Portable kernels: vectors of four floats, which SSE2 and NEON have; also the twin the others are tested against.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"

#define RUNNER_INLINE inline __attribute__((always_inline))
#define RUNNER_ISA 0
#define RUNNER_ISA_NAME "scalar"
#define RUNNER_NS isa_scalar
#include "isa.h"

namespace runner {
const Kernels* scalar_kernels() { return &isa_scalar::kTable; }
}  // namespace runner
