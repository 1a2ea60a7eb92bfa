// Picking a token from logits: a draw after top-k, top-p and min-p, and the log-probabilities of the most likely tokens.
//
// Nothing here sorts a vocabulary. A filter keeps a token and all that precede it, so it is enough to find the last that
// stays: passes over all logits narrow down where it lies, and the few tokens left there are put in order. All of it
// runs on one thread, so a result depends on neither the number of threads nor their timing.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "checks.h"
#include "kernels.h"
#include "primitive_base.h"
#include "primitives.h"
#include "scratch.h"

namespace runner {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kLeastExponent = -87.3f;  // below it a weight is 0

struct Token {
  float logit;
  uint32_t id;
};

// The order of all filters: the most likely first, of equally likely ones the lowest id.
bool precedes(const Token& a, const Token& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

// One row of logits, what was computed of it, and working memory.
struct Row {
  const float* x;
  int64_t n;
  float peak = 0;
  int64_t groups = 0;
  double total = 0;  // of the weights
  // Disjoint parts of the logits each have their greatest in `most`.
  float* most = (float*)scratch(Slot::partial, peak_groups(n) * 4 + weight_sums(n) * 4);
  float* sums = most + peak_groups(n);  // of each kWeightsPerSum weights
  float* weights = (float*)scratch(Slot::packed, n * 4);
  uint32_t* ids = (uint32_t*)scratch(Slot::tile, n * 4);
  Token* tokens = (Token*)scratch(Slot::row, n * sizeof(Token));

  Row(const float* logits, int64_t size) : x(logits), n(size) { peak = kernels().peak(x, n, most, &groups); }

  // weight = exp((logit - peak) / temperature), or 0 where the exponent is below `floor`
  void weigh(float temperature, float floor) {
    total = kernels().weigh(x, n, peak, temperature, floor, weights, sums);
  }

  // Lists the tokens with low <= logit < high; returns how many.
  int64_t list(float low, float high) {
    int64_t count = kernels().between(x, n, low, high, ids);
    for (int64_t i = 0; i < count; ++i) tokens[i] = {x[ids[i]], ids[i]};
    return count;
  }

  // Lists at least the k most likely tokens: where k disjoint parts reach a bound, so do k tokens. Returns how many.
  int64_t list_top(int64_t k) {
    float bound = -kInf;
    if (k <= groups) {
      std::nth_element(most, most + k - 1, most + groups, std::greater<float>());
      bound = most[k - 1];
    }
    return list(bound, kInf);
  }
};

// The last of `count` tokens that stays: those before it weigh less than `goal`. `before`: the weight of others that
// precede all of them.
Token last_in_list(Token* tokens, int64_t count, const float* weights, double before, double goal) {
  int64_t low = 0, high = count;  // it is in [low, high), and [0, low) all precede those
  while (high - low > 32) {
    int64_t middle = low + (high - low) / 2;
    std::nth_element(tokens + low, tokens + middle, tokens + high, precedes);
    double sum = before;
    for (int64_t i = low; i < middle; ++i) sum += weights[tokens[i].id];
    if (sum < goal) {
      before = sum, low = middle;
    } else {
      high = middle;
    }
  }
  std::sort(tokens + low, tokens + high, precedes);
  int64_t last = low;
  for (; last + 1 < high; ++last) {
    before += weights[tokens[last].id];
    if (before >= goal) break;
  }
  return tokens[last];
}

// The last of all tokens that stays under top-p.
Token last_of_nucleus(Row& row, float temperature, double top_p) {
  // Tokens that weigh less than this weigh at most half of 1 - top_p together: the last that stays weighs more.
  double goal = top_p * row.total, least = std::log(row.total * (1 - top_p) / 2 / (double)row.n);
  least = row.peak + temperature * std::max(least, kLeastExponent);
  float low = (float)std::max(least, -(double)std::numeric_limits<float>::max()), high = kInf;
  double before = 0;  // the weight from `high` on, less than the goal; that from `low` on is not
  for (int pass = 0; pass < 3; ++pass) {
    float bounds[kBounds];
    double sums[kBounds], width = (double)std::min(high, row.peak) - low;
    for (int i = 0; i < kBounds; ++i) bounds[i] = (float)(low + width * i / kBounds);
    kernels().weights_from(row.x, row.weights, row.n, bounds, sums);
    int next = 0;
    while (next < kBounds && sums[next] >= goal) ++next;
    if (next < kBounds) high = bounds[next], before = sums[next];
    low = next ? bounds[next - 1] : -kInf;
    if (next == 0) break;  // rounding: the sum from `low` on falls short of the goal
  }
  return last_in_list(row.tokens, row.list(low, high), row.weights, before, goal);
}

struct DrawSpec {
  double chance;  // in [0, 1): where in the cumulated weights, in the order of the ids, the token lies
  float temperature;
  int64_t top_k;
  double top_p;
  float floor;  // of (logit - peak) / temperature

  bool operator==(const DrawSpec&) const = default;
};

// The first token at which the weights, added up in the order of the ids, exceed a share of their sum.
uint32_t token_at(const Row& row, double share) {
  double sum = 0, reached = 0, before = 0;  // `before`: of the pieces before `piece`
  int64_t pieces = weight_sums(row.n), piece = 0;
  for (int64_t i = 0; i < pieces; ++i) sum += row.sums[i];
  // Skip whole pieces, then walk; where rounding leaves no such token, take the last that has any weight.
  const double goal = share * sum;
  for (int64_t i = 0; i < pieces && !(reached > goal); ++i) {
    if (row.sums[i] > 0) piece = i, before = reached, reached += row.sums[i];
  }
  reached = before;
  int64_t first = piece * kWeightsPerSum, last = std::min(first + kWeightsPerSum, row.n), found = first;
  for (int64_t i = first; i < last && !(reached > goal); ++i) {
    if (row.weights[i] > 0) reached += row.weights[i], found = i;
  }
  return (uint32_t)found;
}

void draw(const float* x, int64_t n, const DrawSpec& spec, uint32_t* token, float* peak) {
  Row row(x, n);
  *peak = row.peak;
  *token = 0;
  if (!std::isfinite(row.peak)) return;  // the caller reads that in the peak
  bool few = spec.top_k > 0 && spec.top_k < n, nucleus = spec.top_p < 1;
  // Top-p looks at weights that min-p would leave out, so min-p comes after it.
  row.weigh(spec.temperature, few || nucleus ? -kInf : spec.floor);
  if (few || nucleus) {
    Token last;
    if (few) {
      int64_t count = row.list_top(spec.top_k);
      std::nth_element(row.tokens, row.tokens + spec.top_k - 1, row.tokens + count, precedes);
      last = row.tokens[spec.top_k - 1];
      double total = 0;
      for (int64_t i = 0; i < spec.top_k; ++i) total += row.weights[row.tokens[i].id];
      if (nucleus) last = last_in_list(row.tokens, spec.top_k, row.weights, 0, spec.top_p * total);
    } else {
      last = last_of_nucleus(row, spec.temperature, spec.top_p);
    }
    if (spec.floor > -kInf) row.weigh(spec.temperature, spec.floor);
    kernels().keep(x, n, last.logit, last.id + 1, row.weights, row.sums);
  }
  *token = token_at(row, spec.chance);
}

void log_probabilities(const float* x, int64_t n, uint32_t token, int64_t top, float* logprob, uint32_t* ids,
                       float* logprobs) {
  Row row(x, n);
  bool usable = std::isfinite(row.peak);
  if (usable) row.weigh(1.0f, -kInf);
  double whole = usable ? row.peak + std::log(row.total) : std::numeric_limits<double>::quiet_NaN();
  *logprob = token < n ? (float)(x[token] - whole) : std::numeric_limits<float>::quiet_NaN();
  if (top == 0) return;
  if (usable) {
    int64_t count = row.list_top(top);
    std::partial_sort(row.tokens, row.tokens + top, row.tokens + count, precedes);
  }
  for (int64_t i = 0; i < top; ++i) {
    ids[i] = usable ? row.tokens[i].id : (uint32_t)i;
    logprobs[i] = (float)(x[ids[i]] - whole);
  }
}

class Draw : public CpuPrimitive {
 public:
  Draw(mx::Stream stream, const DrawSpec& spec) : CpuPrimitive(stream), spec_(spec) {}
  const char* name() const override { return "runner::Draw"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return spec_ == static_cast<const Draw&>(other).spec_;
  }
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto* x = (const float*)d.contiguous(inputs[0]);
    auto* token = d.allocate(outputs[0]).data<uint32_t>();
    auto* peak = d.allocate(outputs[1]).data<float>();
    d.run([x, n = (int64_t)inputs[0].size(), spec = spec_, token, peak] { draw(x, n, spec, token, peak); });
  }

 private:
  DrawSpec spec_;
};

class LogProbabilities : public CpuPrimitive {
 public:
  LogProbabilities(mx::Stream stream, int64_t top) : CpuPrimitive(stream), top_(top) {}
  const char* name() const override { return "runner::LogProbabilities"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return top_ == static_cast<const LogProbabilities&>(other).top_;
  }
  // outputs: the token's, (the ids and log-probabilities of the most likely)
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto* x = (const float*)d.contiguous(inputs[0]);
    auto* token = inputs[1].data<uint32_t>();
    auto* logprob = d.allocate(outputs[0]).data<float>();
    uint32_t* ids = top_ ? d.allocate(outputs[1]).data<uint32_t>() : nullptr;
    float* logprobs = top_ ? d.allocate(outputs[2]).data<float>() : nullptr;
    d.run([x, n = (int64_t)inputs[0].size(), token, top = top_, logprob, ids, logprobs] {
      log_probabilities(x, n, *token, top, logprob, ids, logprobs);
    });
  }

 private:
  int64_t top_;
};

void need_logits(const char* op, const mx::array& x) {
  if (x.dtype() != mx::float32 || x.ndim() != 1 || x.size() == 0) {
    refuse(op, ": logits are ", x.dtype(), x.shape(), "; expected float32 [V]");
  }
}

}  // namespace

std::pair<mx::array, mx::array> draw_op(const mx::array& logits, double chance, double temperature, int top_k,
                                        double top_p, double min_p) {
  need_logits("draw", logits);
  DrawSpec spec{chance, (float)temperature, top_k, top_p, min_p > 0 ? (float)std::log(min_p) : -kInf};
  bool fits = chance >= 0 && chance < 1 && spec.temperature > 0 && top_k >= 0 && top_p >= 0 && min_p >= 0 && min_p <= 1;
  if (!fits) {
    refuse("draw: chance is ", chance, ", temperature ", temperature, ", top_k ", top_k, ", top_p ", top_p, ", min_p ",
           min_p, "; expected a chance in [0, 1), a positive temperature, and filters that are not negative");
  }
  auto primitive = std::make_shared<Draw>(cpu_stream(), spec);
  auto out = mx::array::make_arrays({{}, {}}, {mx::uint32, mx::float32}, primitive, {logits});
  return {out[0], out[1]};
}

std::vector<mx::array> log_probabilities_op(const mx::array& logits, const mx::array& token, int top) {
  need_logits("log_probabilities", logits);
  if (token.dtype() != mx::uint32 || token.size() != 1 || top < 0) {
    refuse("log_probabilities: token is ", token.dtype(), token.shape(), ", top ", top,
           "; expected one uint32, and a number that is not negative");
  }
  top = std::min(top, (int)logits.size());
  auto primitive = std::make_shared<LogProbabilities>(cpu_stream(), top);
  if (top == 0) return {mx::array(mx::Shape{}, mx::float32, primitive, {logits, token})};
  return mx::array::make_arrays({{}, {top}, {top}}, {mx::float32, mx::uint32, mx::float32}, primitive, {logits, token});
}

}  // namespace runner
