// What stands between some arrays and what is computed already: the operations MLX would run, in its order.
#pragma once

#include <memory>
#include <vector>

#include "primitive_base.h"

namespace runner {

using Operations = std::vector<mx::array>;

// Unscheduled arrays, inputs before what is made of them, one for each operation.
struct Graph {
  std::shared_ptr<Operations> operations = std::make_shared<Operations>();
  std::vector<mx::array> pending;  // what they read that is being computed
  std::vector<mx::array> held;     // what else they read, and all that those of several results make
  size_t bytes = 0;                // of their results
  bool one_stream = true;
};

Graph walk(const std::vector<mx::array>& outputs, const mx::Stream& stream);

// Plans the operation of `a`, whose inputs have been planned: what it does at run time goes to `list`. False, and nothing
// done, where MLX's primitive would give work to the stream by itself.
bool plan_operation(mx::array& a, Dispatcher& list);

// The two arrays' primitives do the same, at whatever position.
bool same_operation(const mx::array& a, const mx::array& b);

}  // namespace runner
