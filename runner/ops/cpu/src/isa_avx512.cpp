// Kernels for AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Zen 4 and later), and those beside which AMX has tile registers
// for products of bytes (Sapphire Rapids and later).
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#include "tiles.h"

#if defined(__x86_64__)
// GCC 12 takes the intrinsics' own deliberately undefined registers for a mistake (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
// Whether the assembler knows the instructions of tile registers, as it does where the compiler does.
#define RUNNER_TILES __has_include(<amxint8intrin.h>)
#define RUNNER_INLINE inline __attribute__((always_inline))
#define RUNNER_ISA 512
#define RUNNER_ISA_NAME "avx512"
#define RUNNER_NS isa_avx512
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace runner {
const Kernels* avx512_kernels() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("f16c");
  if (supported) return &isa_avx512::kTable;
#endif
  return nullptr;
}

const Kernels* amx_kernels() {
#if defined(__x86_64__) && RUNNER_TILES
  if (avx512_kernels() && !why_no_tiles()) return &isa_avx512::kTiles;
#endif
  return nullptr;
}

const Kernels* amx_emulated_kernels() {
#if defined(__x86_64__)
  if (avx512_kernels()) return &isa_avx512::kEmulatedTiles;
#endif
  return nullptr;
}
}  // namespace runner
