// The body of every isa_*.cpp: the kernels once more, for RUNNER_ISA, in the namespace RUNNER_NS.
// No standard headers below this point: their inline functions would be compiled for this instruction set, and the
// linker might keep that copy for everyone.

namespace runner {
namespace RUNNER_NS {

template <int N>
struct Int {
  static constexpr int value = N;
};

#include "simd.h"
#include "linear.h"
#if RUNNER_ISA > 0
#include "activations.h"
#include "weight_tile.h"
#include "quantised_tiles.h"
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

inline void linear(const LinearArgs& a) {
  if (a.m == 0 || a.n == 0) return;
#if RUNNER_ISA > 0
  if (in_integers(a)) return quantised_linear(a);
#endif
  linear_floats(a);
}

const Kernels kTable = {RUNNER_ISA_NAME, linear, embed, gather, route, mixture, norm, rope, attention, append,
                         glu, argmax, simple, conv, recurrence, gated_norm, gate, peak, weigh, keep, weights_from, between};

}  // namespace RUNNER_NS
}  // namespace runner
