// A step that is the same for each token, recorded once: what it does, with the memory it does it in.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "graph.h"

namespace runner {

// An array without values, int32, to build graphs over that are recorded. Computing it is an error.
mx::array slot_op(const std::vector<int>& shape);

class Program;

// What a recorded step does, whatever caches it does it over, and how its positions advance.
class Outline {
 public:
  // The same step over other caches: the graph of `output` over `slot` and the arrays `caches`, in the order of those
  // that were recorded, to be run for `count` tokens. None where it differs in more than caches and positions. That its
  // positions advance as the first one's did, over all of `count`, is for the caller to know.
  std::optional<Program> record(const mx::array& slot, const mx::array& output, const std::vector<mx::array>& caches,
                                int64_t count) const;

  // Whether both are of the same step, but for caches and positions, and these advance alike.
  bool same_as(const Outline& other) const;

  struct Operation;
  struct Content;

 private:
  friend class Program;
  explicit Outline(std::shared_ptr<const Content> content) : content_(std::move(content)) {}

  std::shared_ptr<const Content> content_;
};

class Program {
 public:
  // The graph of outputs[0] over `slot` and the arrays `caches`, to be run for one token after another. outputs[i] is the
  // same result ahead[i] positions later: ahead is 0, 1 and others, up to the last that it may be run for. None where the
  // graphs differ in more than positions that advance with the token, or hold an operation of MLX's that computes.
  static std::optional<Program> record(const mx::array& slot, const std::vector<mx::array>& outputs,
                                       const std::vector<int64_t>& ahead, const std::vector<mx::array>& caches);

  // Starts to compute the next position's result, with the 32-bit integers `token` in the place of the slot.
  mx::array run(const mx::array& token);

  const Outline& outline() const { return outline_; }

  struct Recorded;

 private:
  friend class Outline;
  explicit Program(Outline outline) : outline_(std::move(outline)) {}
  static std::optional<Program> planned(Outline outline, Graph graph, const mx::array& slot, const mx::array& output,
                                        int64_t count);

  Outline outline_;
  std::shared_ptr<const Recorded> recorded_;
  std::vector<mx::array> before_;   // what the next run waits for
  std::vector<mx::array> written_;  // the caches' buffers, which whoever reads them later waits for
  int64_t next_ = 0, count_ = 0;
};

}  // namespace runner
