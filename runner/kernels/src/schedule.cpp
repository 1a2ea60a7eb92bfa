// mx.async_eval for graphs of this extension's primitives: all of them run as one task of the CPU's stream.
//
// MLX hands each operation to the stream's thread by itself: a lock, a wake-up and several allocations, some 7 us for
// operations that take as long themselves. A step that decodes one token has about 500. Here the graph is walked in the
// same order, each primitive says what it would do, and the whole list is handed over once. MLX's own primitives may
// stand between: what was listed is handed over first, so that the order stays. All memory is taken before the first
// task runs, so that graphs of many rows, whose intermediate results are large, go MLX's way.
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "mlx/transforms.h"
#include "primitive_base.h"
#include "primitives.h"

namespace runner {
namespace {

// The ids of arrays that were met.
class Met {
 public:
  Met() : slots_(1024, 0) {}
  // False where it was met before.
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

using Operations = std::vector<mx::array>;

constexpr size_t kMostBytes = 64 << 20;  // of the results of one task's operations

bool is_reshape(std::string_view name) { return name == "Reshape" || name == "Flatten" || name == "Unflatten"; }

bool shares_memory(const mx::Primitive& primitive) {
  if (auto* ours = dynamic_cast<const CpuPrimitive*>(&primitive)) return ours->in_place();
  std::string_view is = primitive.name();
  return is_reshape(is) || is == "Transpose" || is == "Split" || is == "Slice" || is == "Squeeze" || is == "ExpandDims";
}

// Unscheduled arrays, inputs before what is made of them, one for each operation; what they wait for.
struct Graph {
  std::shared_ptr<Operations> operations = std::make_shared<Operations>();
  std::vector<mx::array> pending;
  std::vector<mx::array> ready;  // what else they read
  size_t bytes = 0;  // of their results
  bool one_stream = true;
};

Graph walk(const std::vector<mx::array>& outputs, const mx::Stream& stream) {
  Graph graph;
  Met met;
  std::vector<std::pair<const mx::array*, size_t>> stack;  // an array and how many of its inputs were looked at
  auto enter = [&](const mx::array& a) {
    if (a.status() != mx::array::Status::unscheduled || !a.has_primitive()) {
      if (a.is_available()) {
        graph.ready.push_back(a);
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
        if (!shares_memory(a->primitive())) {
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

// Whether MLX's primitive only looks at the same memory in another way, and gives the stream nothing to do.
bool is_view(const mx::Primitive& primitive, const mx::array& in) {
  return shares_memory(primitive) && (!is_reshape(primitive.name()) || in.flags().row_contiguous);
}

// x + y of equal shapes, the one operation of MLX's that stands in every layer
bool plain_sum(const char* name, const std::vector<mx::array>& inputs) {
  if (std::string_view(name) != "Add") return false;
  const mx::array &x = inputs[0], &y = inputs[1];
  bool is_float = x.dtype() == mx::float32 || x.dtype() == mx::bfloat16 || x.dtype() == mx::float16;
  return is_float && x.dtype() == y.dtype() && x.shape() == y.shape() && x.flags().row_contiguous &&
         y.flags().row_contiguous;
}

class AsOne : public CpuPrimitive {
 public:
  AsOne(mx::Stream stream, std::shared_ptr<Operations> operations, std::vector<mx::array> ready)
      : CpuPrimitive(stream), operations_(std::move(operations)), ready_(std::move(ready)) {}
  const char* name() const override { return "runner::AsOne"; }

  void plan(const std::vector<mx::array>&, std::vector<mx::array>& outputs, Dispatcher& d) override {
    d.allocate(outputs[0]);
    Tasks tasks;
    Dispatcher listing(stream(), tasks);
    for (auto& a : *operations_) {
      auto results = a.outputs();
      auto& primitive = a.primitive();
      if (auto* ours = dynamic_cast<CpuPrimitive*>(&primitive)) {
        ours->plan(a.inputs(), results, listing);
      } else if (plain_sum(primitive.name(), a.inputs())) {
        add(a.inputs(), results[0], listing);
      } else {
        if (a.inputs().empty() || !is_view(primitive, a.inputs()[0])) hand_over(tasks, d);
        primitive.eval_cpu(a.inputs(), results);
      }
    }
    hand_over(tasks, d);
    // Nothing that the tasks point at may go before they are done.
    d.run([made = std::move(operations_), read = std::move(ready_)]() mutable {
      made.reset();
      read.clear();
    });
  }

 private:
  static void add(const std::vector<mx::array>& inputs, mx::array& out, Dispatcher& d) {
    AddArgs a{};
    a.type = type_of(inputs[0]);
    a.x = inputs[0].data<void>();
    a.y = inputs[1].data<void>();
    a.out = d.allocate(out).data<void>();
    a.size = static_cast<int64_t>(out.size());
    d.run([a] { kernels().add(a); });
  }

  static void hand_over(Tasks& tasks, Dispatcher& d) {
    if (tasks.empty()) return;
    auto list = std::make_shared<Tasks>(std::move(tasks));
    tasks = {};
    d.run([list] {
      for (auto& task : *list) task();
    });
  }

  std::shared_ptr<Operations> operations_;
  std::vector<mx::array> ready_;
};

}  // namespace

void schedule(const std::vector<mx::array>& outputs) {
  auto stream = cpu_stream();
  Graph graph = walk(outputs, stream);
  auto operations = graph.operations;
  if (!graph.one_stream || graph.bytes > kMostBytes || operations->empty()) return mx::async_eval(outputs);
  auto primitive = std::make_shared<AsOne>(stream, operations, std::move(graph.ready));
  mx::array whole({1}, mx::uint8, std::move(primitive), std::move(graph.pending));
  mx::async_eval({whole});
  auto done = [&](const mx::array& a) {
    a.set_status(mx::array::Status::evaluated);
    a.attach_event(whole.event());
  };
  for (auto& a : *operations) {
    done(a);
    for (auto& sibling : a.siblings()) done(sibling);
    a.detach();
  }
}

}  // namespace runner
