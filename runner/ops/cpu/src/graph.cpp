#include "graph.h"

#include <string_view>

#include "kernels.h"

namespace runner {
namespace {

// The ids of the arrays visited so far.
class Met {
 public:
  Met() : slots_(1024, 0) {}
  // False if the id was inserted before.
  bool insert(std::uintptr_t id) {
    if (2 * ++count_ > slots_.size()) grow();
    return place(id);
  }

 private:
  bool place(std::uintptr_t id) {
    size_t at = id * 0x9e3779b97f4a7c15ull >> 32;
    for (;; ++at) {
      auto& slot = slots_[at & (slots_.size() - 1)];
      if (slot == id) return false;
      if (slot == 0) {
        slot = id;
        return true;
      }
    }
  }
  void grow() {
    auto old = std::move(slots_);
    slots_.assign(2 * old.size(), 0);
    for (auto id : old) {
      if (id) place(id);
    }
  }

  std::vector<std::uintptr_t> slots_;
  size_t count_ = 0;
};

bool is_reshape(std::string_view name) { return name == "Reshape" || name == "Flatten" || name == "Unflatten"; }

bool shares_memory(const mx::Primitive& primitive) {
  if (auto* ours = dynamic_cast<const CpuPrimitive*>(&primitive)) return ours->written() > 0;
  std::string_view is = primitive.name();
  return is_reshape(is) || is == "Transpose" || is == "Split" || is == "Slice" || is == "Squeeze" ||
         is == "ExpandDims" || is == "Broadcast";
}

// Whether MLX's primitive only looks at the same memory in another way, and gives the stream nothing to do.
bool is_view(const mx::Primitive& primitive, const std::vector<mx::array>& inputs) {
  if (inputs.empty() || !shares_memory(primitive)) return false;
  return !is_reshape(primitive.name()) || inputs[0].flags().row_contiguous;
}

bool one_value(const mx::array& a) {
  if (a.size() == 0) return false;
  for (size_t i = 0; i < a.ndim(); ++i) {
    if (a.shape(i) > 1 && a.strides(i) != 0) return false;
  }
  return true;
}

// MLX's own operators in most layers: x + y and x * y of equal shapes, x times or divided by a number. False for others.
bool plan_simple(const mx::Primitive& primitive, const std::vector<mx::array>& inputs, mx::array& out, Dispatcher& d) {
  std::string_view is = primitive.name();
  if (is != "Add" && is != "Multiply" && is != "Divide") return false;
  const bool numbers = is == "Multiply" && (one_value(inputs[0]) || one_value(inputs[1]));
  const Simple op = is == "Add" ? Simple::plus
      : is == "Divide"          ? Simple::over
      : numbers                 ? Simple::times
                                : Simple::product;
  const bool swapped = op == Simple::times && one_value(inputs[0]);
  const mx::array &x = inputs[swapped], &y = inputs[!swapped];
  bool is_float = x.dtype() == mx::float32 || x.dtype() == mx::bfloat16 || x.dtype() == mx::float16;
  if (!is_float || x.dtype() != y.dtype() || x.shape() != y.shape()) return false;
  const bool each = op == Simple::plus || op == Simple::product;
  if (!each && !one_value(y)) return false;
  SimpleArgs a{};
  a.type = type_of(x);
  a.x = d.contiguous(x);
  a.y = each ? d.contiguous(y) : y.data<void>();
  a.out = d.allocate(out).data<void>();
  a.size = static_cast<int64_t>(out.size());
  a.op = op;
  d.run([a] { kernels().simple(a); });
  return true;
}

}  // namespace

Graph walk(const std::vector<mx::array>& outputs, const mx::Stream& stream) {
  Graph graph;
  Met met;
  std::vector<std::pair<const mx::array*, size_t>> stack;  // an array and how many of its inputs were looked at
  auto enter = [&](const mx::array& a) {
    if (a.status() != mx::array::Status::unscheduled || !a.has_primitive()) {
      if (a.is_available()) {
        graph.held.push_back(a);
      } else if (met.insert(a.id())) {
        graph.pending.push_back(a);
      }
      return;
    }
    if (!met.insert(a.id())) return;
    for (auto& sibling : a.siblings()) met.insert(sibling.id());
    graph.one_stream &= a.primitive().stream() == stream && !a.is_tracer();
    stack.emplace_back(&a, 0);
  };
  for (auto& output : outputs) {
    enter(output);
    while (!stack.empty()) {
      auto& [a, next] = stack.back();
      if (next < a->inputs().size()) {
        enter(a->inputs()[next++]);
      } else {
        if (!dynamic_cast<const CpuPrimitive*>(&a->primitive()) && !shares_memory(a->primitive())) {
          graph.bytes += a->nbytes();
          for (auto& sibling : a->siblings()) graph.bytes += sibling.nbytes();
        }
        graph.operations->push_back(*a);
        stack.pop_back();
      }
    }
  }
  return graph;
}

bool plan_operation(mx::array& a, Dispatcher& list) {
  auto& primitive = a.primitive();
  auto results = a.outputs();
  if (auto* ours = dynamic_cast<CpuPrimitive*>(&primitive)) {
    ours->plan(a.inputs(), results, list);
    return true;
  }
  if (is_view(primitive, a.inputs())) {
    primitive.eval_cpu(a.inputs(), results);
    return true;
  }
  if (!a.inputs().empty() && is_reshape(primitive.name())) {
    list.copy(a.inputs()[0], results[0]);  // of lines that lie apart
    return true;
  }
  return plan_simple(primitive, a.inputs(), results[0], list);
}

bool same_operation(const mx::Primitive& one, const mx::Primitive& other, bool apart) {
  if (std::string_view(one.name()) != other.name()) return false;
  auto* ours = dynamic_cast<const CpuPrimitive*>(&one);
  if (!ours) return one.is_equivalent(other);
  return apart ? ours->same_but_places(other) : ours->same_but_position(other);
}

}  // namespace runner
