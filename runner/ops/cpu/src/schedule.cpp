// mx.async_eval for graphs of this extension's primitives: all of them run as one task of the CPU's stream.
//
// MLX hands each operation to the stream's thread by itself: a lock, a wake-up and several allocations, some 7 us for
// operations that take as long themselves. A step that decodes one token has about 500. Here the graph is walked in the
// same order, each primitive says what it would do, and the whole list is handed over once. MLX's own primitives may
// stand between: what was listed is handed over first, so that the order stays. The memory of their results is taken
// before the first task runs and kept until the last is done, so that graphs in which they make much go MLX's way.
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
    const mx::Event& event = outputs[0].event();
    if (!event.valid()) throw std::runtime_error("schedule: MLX has not attached the event of what it evaluates");
    Listing listing;
    Dispatcher list(stream(), listing);
    std::vector<mx::array> made;  // by MLX's primitives, whose tasks hold no memory
    for (auto& operation : *operations_) {
      mx::array a = std::move(operation);
      auto results = a.outputs();
      if (!plan_operation(a, list)) {
        hand_over(listing, d);
        a.primitive().eval_cpu(a.inputs(), results);
        made.insert(made.end(), results.begin(), results.end());
      }
      for (auto& result : results) {
        result.set_status(mx::array::Status::evaluated);
        result.attach_event(event);
      }
      // Now the array lets go of its inputs, and at the end of this round is let go of, unless others still need it.
      a.detach();
      listing.copies.clear();
    }
    hand_over(listing, d);
    // Everything that the tasks point at must live until they are done.
    d.run([made = std::move(made), held = std::move(held_), arena = std::move(listing.arena)]() mutable {
      made.clear();
      held.clear();
      arena.reset();
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
  if (!graph.one_stream || graph.bytes > kMostBytes || graph.operations->empty()) {
    graph = {};  // or MLX could not let go of any result before the last
    return mx::async_eval(outputs);
  }
  auto primitive = std::make_shared<AsOne>(stream, std::move(graph.operations), std::move(graph.held));
  mx::array whole({1}, mx::uint8, std::move(primitive), std::move(graph.pending));
  mx::async_eval({whole});
}

}  // namespace runner
