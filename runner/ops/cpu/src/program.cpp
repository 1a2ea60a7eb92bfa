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

using Number = int64_t;
constexpr Number kFixed = Number(1) << 40;  // of the first array that is no result and no cache

}  // namespace

struct Outline::Operation {
  std::shared_ptr<mx::Primitive> primitive;  // none: the slot
  std::vector<Number> inputs;
  std::vector<std::pair<mx::Shape, mx::Dtype>> results;  // without those that are written, whose size is the caches'
  int64_t position, pace;  // pace: by how many positions it advances with a token, 0 or 1
};

struct Outline::Content {
  std::vector<Operation> operations;
  std::vector<mx::array> fixed;
};

namespace {

// Numbers for the arrays of a graph: caches by their order, results by theirs, others when they are first met.
class Numbers {
 public:
  explicit Numbers(const std::vector<mx::array>& caches) {
    for (size_t i = 0; i < caches.size(); ++i) numbers_.emplace(caches[i].id(), -1 - Number(i));
  }
  void add(const std::vector<mx::array>& results) {
    for (auto& a : results) numbers_.emplace(a.id(), results_++);
  }
  std::optional<Number> find(const mx::array& a) const {
    auto found = numbers_.find(a.id());
    return found == numbers_.end() ? std::nullopt : std::optional(found->second);
  }
  Number fix(const mx::array& a, std::vector<mx::array>& fixed) {
    fixed.push_back(a);
    return numbers_.emplace(a.id(), kFixed + Number(fixed.size()) - 1).first->second;
  }

 private:
  std::unordered_map<std::uintptr_t, Number> numbers_;
  Number results_ = 0;
};

std::vector<std::pair<mx::Shape, mx::Dtype>> kinds(const std::vector<mx::array>& results, size_t written) {
  std::vector<std::pair<mx::Shape, mx::Dtype>> found;
  for (size_t i = written; i < results.size(); ++i) found.emplace_back(results[i].shape(), results[i].dtype());
  return found;
}

std::shared_ptr<Outline::Content> outlined(const Operations& operations, const mx::array& slot,
                                           const std::vector<mx::array>& caches) {
  auto content = std::make_shared<Outline::Content>();
  Numbers numbers(caches);
  for (const mx::array& a : operations) {
    auto results = a.outputs();
    bool is_slot = a.id() == slot.id();
    Outline::Operation one{is_slot ? nullptr : a.primitive_ptr(), {}, kinds(results, written_by(a)), position_of(a), 0};
    for (auto& x : a.inputs()) {
      auto found = numbers.find(x);
      one.inputs.push_back(found ? *found : numbers.fix(x, content->fixed));
    }
    numbers.add(results);
    content->operations.push_back(std::move(one));
  }
  return content;
}

// Whether a graph is the outlined one but for caches and positions; `apart`: also where its sequences are at places that
// differ from each other in another way.
bool fits(const Outline::Content& content, const Operations& operations, const mx::array& slot,
          const std::vector<mx::array>& caches, bool apart) {
  if (operations.size() != content.operations.size()) return false;
  Numbers numbers(caches);
  for (size_t k = 0; k < operations.size(); ++k) {
    const Outline::Operation& one = content.operations[k];
    const mx::array& a = operations[k];
    auto results = a.outputs();
    if ((a.id() == slot.id()) != (one.primitive == nullptr) || a.inputs().size() != one.inputs.size()) return false;
    if (one.primitive && !same_operation(*one.primitive, a.primitive(), apart)) return false;
    for (size_t i = 0; i < one.inputs.size(); ++i) {
      const mx::array& x = a.inputs()[i];
      const Number wanted = one.inputs[i];
      auto found = numbers.find(x);
      if (found ? *found != wanted : wanted < kFixed || !same_input(content.fixed[wanted - kFixed], x)) return false;
    }
    if (kinds(results, written_by(a)) != one.results) return false;
    numbers.add(results);
  }
  return true;
}

}  // namespace

mx::array slot_op(const std::vector<int>& shape) {
  return mx::array(mx::Shape(shape.begin(), shape.end()), mx::int32, std::make_shared<SlotPrimitive>(cpu_stream()), {});
}

std::optional<Program> Program::record(const mx::array& slot, const std::vector<mx::array>& outputs,
                                       const std::vector<int64_t>& ahead, const std::vector<mx::array>& caches) {
  auto stream = cpu_stream();
  if (outputs.size() != ahead.size() || ahead.size() < 2 || ahead[0] != 0 || ahead[1] != 1) {
    refuse("record: ", outputs.size(), " outputs and ", ahead.size(), " positions; expected as many, 0 and 1 first");
  }
  Graph graph = walk({outputs[0]}, stream);
  if (!graph.one_stream || graph.bytes > kMostBytes) return std::nullopt;
  auto content = outlined(*graph.operations, slot, caches);
  for (size_t i = 1; i < outputs.size(); ++i) {
    auto later = walk({outputs[i]}, stream).operations;
    if (!fits(*content, *later, slot, caches, false)) return std::nullopt;
    for (size_t k = 0; k < later->size(); ++k) {
      auto& one = content->operations[k];
      const int64_t moved = position_of((*later)[k]) - one.position;
      if (i == 1) one.pace = moved;
      if ((i == 1 && moved != 0 && moved != 1) || moved != one.pace * ahead[i]) return std::nullopt;
    }
  }
  return planned(Outline(std::move(content)), std::move(graph), slot, outputs[0],
                 *std::max_element(ahead.begin(), ahead.end()) + 1);
}

std::optional<Program> Outline::record(const mx::array& slot, const mx::array& output,
                                       const std::vector<mx::array>& caches, int64_t count) const {
  Graph graph = walk({output}, cpu_stream());
  if (!graph.one_stream || !fits(*content_, *graph.operations, slot, caches, true)) return std::nullopt;
  return Program::planned(*this, std::move(graph), slot, output, count);
}

bool Outline::same_as(const Outline& other) const {
  const Content &mine = *content_, &its = *other.content_;
  auto same = [](const Operation& a, const Operation& b) {
    if (a.pace != b.pace || a.inputs != b.inputs || a.results != b.results || !a.primitive != !b.primitive) return false;
    return !a.primitive || same_operation(*a.primitive, *b.primitive, true);
  };
  return std::equal(mine.operations.begin(), mine.operations.end(), its.operations.begin(), its.operations.end(), same) &&
         std::equal(mine.fixed.begin(), mine.fixed.end(), its.fixed.begin(), its.fixed.end(), same_input);
}

std::optional<Program> Program::planned(Outline outline, Graph graph, const mx::array& slot, const mx::array& output,
                                        int64_t count) {
  Program program(std::move(outline));
  auto recorded = std::make_shared<Recorded>(Recorded{{}, {}, {}, slot, output, {}});
  Listing listing;
  auto stream = cpu_stream();
  Dispatcher list(stream, listing), own(stream);
  size_t k = 0;
  for (auto& operation : *graph.operations) {
    mx::array a = std::move(operation);
    const Outline::Operation& one = program.outline_.content_->operations[k++];
    program.written_.insert(program.written_.end(), a.inputs().begin(), a.inputs().begin() + written_by(a));
    if (!one.primitive) {
      own.allocate(a);  // written before the first task, which may use whatever the arena gives
    } else if (!plan_operation(a, list)) {
      return std::nullopt;
    }
    recorded->pace.resize(listing.tasks.size(), one.pace);
    // Its inputs' memory is free from here on, for the operations that follow, unless these need them, too.
    a.detach();
    listing.copies.clear();
  }
  if (!output.flags().row_contiguous || listing.arena->bytes() > kMostRecorded) return std::nullopt;
  recorded->tasks = std::move(listing.tasks);
  recorded->arena = std::move(listing.arena);
  recorded->held = std::move(graph.held);
  recorded->held.insert(recorded->held.end(), graph.pending.begin(), graph.pending.end());
  program.before_ = std::move(graph.pending);
  program.recorded_ = std::move(recorded);
  program.count_ = count;
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
