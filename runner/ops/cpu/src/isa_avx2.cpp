// Kernels for AVX2, FMA and F16C (Haswell, Zen and later).
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define RUNNER_INLINE inline __attribute__((always_inline))
#define RUNNER_ISA 2
#define RUNNER_ISA_NAME "avx2"
#define RUNNER_NS isa_avx2
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace runner {
const Kernels* avx2_kernels() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (supported) return &isa_avx2::kTable;
#endif
  return nullptr;
}
}  // namespace runner
