// The operations that MLX would run to compute some arrays from what is computed already, in its order.
#pragma once

#include <memory>
#include <vector>

#include "primitive_base.h"

namespace runner {

using Operations = std::vector<mx::array>;

// Unscheduled arrays, one for each operation, inputs before what is made of them.
struct Graph {
  std::shared_ptr<Operations> operations = std::make_shared<Operations>();
  std::vector<mx::array> pending;  // what they read that is being computed
  std::vector<mx::array> held;     // what else they read
  size_t bytes = 0;                // of the results of MLX's own operations, whose memory does not come from an arena
  bool one_stream = true;
};

// Bytes of such results at most, as their memory is taken all at once.
constexpr size_t kMostBytes = 16 << 20;

Graph walk(const std::vector<mx::array>& outputs, const mx::Stream& stream);

// Plans the operation of `a`, whose inputs have been planned: what it does at run time goes to `list`. False, and nothing
// done, where MLX's primitive would give work to the stream by itself.
bool plan_operation(mx::array& a, Dispatcher& list);

// Whether two primitives do the same, whatever their positions, which advance together; `apart`: or each by itself.
bool same_operation(const mx::Primitive& one, const mx::Primitive& other, bool apart);

}  // namespace runner
