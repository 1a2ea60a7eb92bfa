#include "program.h"

#include <algorithm>
#include <unordered_map>

#include "checks.h"
#include "mlx/transforms.h"

namespace runner {

struct Program::Recorded {
  std::vector<Task> tasks;
  std::vector<int64_t> pace;     // by how many positions each task advances with a token: 0 or 1
  std::vector<mx::array> held;   // what they read and write, besides the arena
  mx::array slot, result;
  std::shared_ptr<Arena> arena;
};

namespace {

class SlotPrimitive : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Slot"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  void plan(const std::vector<mx::array>&, std::vector<mx::array>&, Dispatcher&) override {
    throw std::runtime_error("a step that reads its token cannot be recorded");
  }
};

class Run : public CpuPrimitive {
 public:
  Run(mx::Stream stream, std::shared_ptr<const Program::Recorded> recorded, int64_t ahead)
      : CpuPrimitive(stream), recorded_(std::move(recorded)), ahead_(ahead) {}
  const char* name() const override { return "runner::Run"; }

  // inputs: the token, what must have been computed before; output: the result
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto from = static_cast<const char*>(d.contiguous(inputs[0]));
    auto to = d.allocate(outputs[0]).data<char>();
    d.run([r = recorded_, ahead = ahead_, from, to] {
      mx::array slot = r->slot;
      std::memcpy(slot.data<char>(), from, slot.nbytes());
      for (size_t i = 0; i < r->tasks.size(); ++i) r->tasks[i](ahead * r->pace[i]);
      std::memcpy(to, r->result.data<char>(), r->result.nbytes());
    });
  }

 private:
  std::shared_ptr<const Program::Recorded> recorded_;
  int64_t ahead_;
};

constexpr size_t kMostRecorded = 64 << 20;  // bytes that a recorded step works in: kept as long as it is

constexpr size_t kConstant = 64;  // bytes up to which arrays may be constants that Python made anew

// Whether both are the same array, or small arrays with equal contents.
bool same_input(const mx::array& a, const mx::array& b) {
  if (a.id() == b.id()) return true;
  bool small = a.is_available() && b.is_available() && a.dtype() == b.dtype() && a.shape() == b.shape() &&
               a.nbytes() <= kConstant && a.flags().row_contiguous && b.flags().row_contiguous;
  return small && std::memcmp(a.data<char>(), b.data<char>(), a.nbytes()) == 0;
}

// Whether two graphs are equal but for positions, and each operation's position is `pace` times `ahead` further in the
// second; an empty `pace` is filled in instead.
bool follows(const Operations& first, const Operations& second, int64_t ahead, std::vector<int64_t>& pace) {
  if (first.size() != second.size()) return false;
  std::unordered_map<std::uintptr_t, std::uintptr_t> twin;  // of an array of `second` in `first`
  bool fill = pace.empty();
  for (size_t k = 0; k < first.size(); ++k) {
    const mx::array &a = first[k], &b = second[k];
    if (a.id() == b.id()) {  // the slot
      if (fill) pace.push_back(0);
      continue;
    }
    if (!same_operation(a, b) || a.inputs().size() != b.inputs().size()) return false;
    for (size_t i = 0; i < a.inputs().size(); ++i) {
      const mx::array &x = a.inputs()[i], &y = b.inputs()[i];
      auto found = twin.find(y.id());
      if (found == twin.end() ? !same_input(x, y) : found->second != x.id()) return false;
    }
    auto results = a.outputs(), later = b.outputs();
    if (results.size() != later.size()) return false;
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].shape() != later[i].shape() || results[i].dtype() != later[i].dtype()) return false;
      twin.emplace(later[i].id(), results[i].id());
    }
    int64_t moved = position_of(b) - position_of(a);
    if (fill && moved != 0 && moved != ahead) return false;
    if (fill) pace.push_back(moved / ahead);
    if (moved != pace[k] * ahead) return false;
  }
  return true;
}

}  // namespace

mx::array slot_op(const std::vector<int>& shape) {
  return mx::array(mx::Shape(shape.begin(), shape.end()), mx::int32, std::make_shared<SlotPrimitive>(cpu_stream()), {});
}

std::optional<Program> Program::record(const mx::array& slot, const std::vector<mx::array>& outputs,
                                       const std::vector<int64_t>& ahead) {
  auto stream = cpu_stream();
  if (outputs.size() != ahead.size() || ahead.size() < 2 || ahead[0] != 0 || ahead[1] != 1) {
    refuse("record: ", outputs.size(), " outputs and ", ahead.size(), " positions; expected as many, 0 and 1 first");
  }
  Graph graph = walk({outputs[0]}, stream);
  if (!graph.one_stream || graph.bytes > kMostBytes) return std::nullopt;
  std::vector<int64_t> pace;
  for (size_t i = 1; i < outputs.size(); ++i) {
    if (!follows(*graph.operations, *walk({outputs[i]}, stream).operations, ahead[i], pace)) return std::nullopt;
  }
  Program program;
  auto recorded = std::make_shared<Recorded>(Recorded{{}, {}, {}, slot, outputs[0], {}});
  Listing listing;
  Dispatcher list(stream, listing), own(stream);
  size_t k = 0;
  for (auto& operation : *graph.operations) {
    mx::array a = std::move(operation);
    if (a.id() == slot.id()) {
      own.allocate(a);  // written before the first task, which may use whatever the arena gives
    } else if (!plan_operation(a, list)) {
      return std::nullopt;
    }
    recorded->pace.resize(listing.tasks.size(), pace[k++]);
    program.written_.insert(program.written_.end(), a.inputs().begin(), a.inputs().begin() + written_by(a));
    // Its inputs' memory is free from here on, for the operations that follow, unless these need them, too.
    a.detach();
    listing.copies.clear();
  }
  if (!outputs[0].flags().row_contiguous || listing.arena->bytes() > kMostRecorded) return std::nullopt;
  recorded->tasks = std::move(listing.tasks);
  recorded->arena = std::move(listing.arena);
  recorded->held = std::move(graph.held);
  recorded->held.insert(recorded->held.end(), graph.pending.begin(), graph.pending.end());
  program.before_ = std::move(graph.pending);
  program.recorded_ = std::move(recorded);
  program.count_ = *std::max_element(ahead.begin(), ahead.end()) + 1;
  return program;
}

mx::array Program::run(const mx::array& token) {
  const auto& slot = recorded_->slot;
  if (token.size() != slot.size() || token.itemsize() != slot.itemsize()) {
    refuse("run: token is ", token.dtype(), token.shape(), "; expected 32-bit integers ", slot.shape());
  }
  if (next_ == count_) refuse("run: recorded for ", count_, " positions, which have all been run");
  const auto& result = recorded_->result;
  // On this thread's stream, which need not be the one of the run before: that one is waited for.
  auto primitive = std::make_shared<Run>(cpu_stream(), recorded_, next_);
  std::vector<mx::array> inputs{token};
  inputs.insert(inputs.end(), before_.begin(), before_.end());
  mx::array out(result.shape(), result.dtype(), std::move(primitive), std::move(inputs));
  mx::async_eval({out});
  ++next_;
  before_ = {out};
  for (auto& buffer : written_) {
    buffer.set_status(mx::array::Status::evaluated);
    buffer.attach_event(out.event());
  }
  return out;
}

}  // namespace runner
