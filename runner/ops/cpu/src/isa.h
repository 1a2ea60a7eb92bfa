// The body of every isa_*.cpp: the kernels once more, for RUNNER_ISA, in the namespace RUNNER_NS.
// No standard headers below this point: their inline functions would be compiled for this instruction set, and the
// linker might keep that copy for everyone.

namespace runner {
namespace RUNNER_NS {

template <int N>
struct Int {
  static constexpr int value = N;
};

// What products of integers with many rows are computed by, in kernels that are templates over it (see tile_registers.h).
struct Vectors {
  static constexpr bool kTiles = false;
};

#include "simd.h"
#include "linear.h"
#if RUNNER_ISA > 0
#include "activations.h"
#include "weight_tile.h"
#include "quantised_tiles.h"
#include "tile_registers.h"
#include "quantised_rows.h"
#include "quantised.h"
#endif

// Whether a layer's weights are integers, whose products with those of x are exact.
inline bool has_integers(const LinearArgs& a) {
  const bool integers = a.format == Format::affine || a.format == Format::mxfp4;
  return a.bits && integers && (a.group == 32 || a.group == 64 || a.group == 128);
}

// Whether they are multiplied as such.
inline bool in_integers(const LinearArgs& a) { return RUNNER_ISA > 0 && has_integers(a); }

inline void linear_floats(const LinearArgs& a) {
#if RUNNER_ISA == 0
  if (a.coarse && has_integers(a)) return linear_coarse(a);
#endif
  linear_float(a);
}

#include "experts.h"
#include "attention.h"
#include "attention_jobs.h"
#include "elementwise.h"
#include "routing.h"
#include "picking.h"
#include "cache_rows.h"
#include "recurrence.h"

template <class By>
void linear(const LinearArgs& a) {
  if (a.m == 0 || a.n == 0) return;
#if RUNNER_ISA > 0
  if (in_integers(a)) return quantised_linear<By>(a);
#endif
  linear_floats(a);
}

template <class By>
constexpr Kernels table_of(const char* name) {
  return {name, linear<By>, embed, gather<By>, route, mixture, norm, rope, attention, append,
          glu, argmax, simple, conv, recurrence, selective, gated_norm, gate, peak, weigh, keep, weights_from, between};
}

constexpr Kernels kTable = table_of<Vectors>(RUNNER_ISA_NAME);
#if RUNNER_ISA == 512
#if RUNNER_TILES
constexpr Kernels kTiles = table_of<TileRegisters>("amx");
#endif
constexpr Kernels kEmulatedTiles = table_of<EmulatedTileRegisters>("amx_emulated");
#endif

}  // namespace RUNNER_NS
}  // namespace runner
