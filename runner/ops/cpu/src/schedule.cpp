// mx.async_eval for graphs of this extension's primitives: all of them run as one task of the CPU's stream.
//
// MLX hands each operation to the stream's thread by itself: a lock, a wake-up and several allocations, some 7 us for
// operations that take as long themselves. A step that decodes one token has about 500. Here the graph is walked in the
// same order, each primitive says what it would do, and the whole list is handed over once. MLX's own primitives may
// stand between: what was listed is handed over first, so that the order stays. All memory is taken before the first
// task runs, so that graphs of many rows, whose intermediate results are large, go MLX's way.
#include "checks.h"
#include "graph.h"
#include "mlx/transforms.h"
#include "primitives.h"

namespace runner {
namespace {

class AsOne : public CpuPrimitive {
 public:
  AsOne(mx::Stream stream, std::shared_ptr<Operations> operations, std::vector<mx::array> held)
      : CpuPrimitive(stream), operations_(std::move(operations)), held_(std::move(held)) {}
  const char* name() const override { return "runner::AsOne"; }

  void plan(const std::vector<mx::array>&, std::vector<mx::array>& outputs, Dispatcher& d) override {
    d.allocate(outputs[0]);
    Listing listing;
    Dispatcher list(stream(), listing);
    for (auto& a : *operations_) {
      if (plan_operation(a, list)) continue;
      hand_over(listing, d);
      auto results = a.outputs();
      a.primitive().eval_cpu(a.inputs(), results);
    }
    hand_over(listing, d);
    // Everything that the tasks point at must live until they are done.
    d.run([made = std::move(operations_), held = std::move(held_), copies = std::move(listing.held)]() mutable {
      made.reset();
      held.clear();
      copies.clear();
    });
  }

 private:
  static void hand_over(Listing& listing, Dispatcher& d) {
    if (listing.tasks.empty()) return;
    auto list = std::make_shared<std::vector<Task>>(std::move(listing.tasks));
    listing.tasks = {};
    d.run([list] {
      for (auto& task : *list) task(0);
    });
  }

  std::shared_ptr<Operations> operations_;
  std::vector<mx::array> held_;
};

}  // namespace

void schedule(const std::vector<mx::array>& outputs) {
  auto stream = cpu_stream();
  Graph graph = walk(outputs, stream);
  auto operations = graph.operations;
  if (!graph.one_stream || graph.bytes > kMostBytes || operations->empty()) {
    operations.reset();
    graph = {};  // or MLX could not let go of any result before the last
    return mx::async_eval(outputs);
  }
  auto primitive = std::make_shared<AsOne>(stream, operations, std::move(graph.held));
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
