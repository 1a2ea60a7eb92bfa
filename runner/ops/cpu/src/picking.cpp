// Picking a token from logits: a draw after top-k, top-p and min-p, and the log-probabilities of the most likely tokens.
//
// Nothing here sorts a vocabulary. A filter keeps a token and all that precede it, so it is enough to find the last that
// stays: passes over all logits narrow down where it lies, and the few tokens left there are put in order. A row runs on
// one thread, so a result depends on neither the other rows nor the number of threads nor their timing.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "checks.h"
#include "kernels.h"
#include "pool.h"
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
  double chance;      // in [0, 1): where in the cumulated weights, in the order of the ids, the token lies
  float temperature;  // 0: the greatest
  int64_t top_k;
  double top_p;
  float floor;  // of (logit - peak) / temperature

  bool operator==(const DrawSpec&) const = default;
};

// Calls f(row) for each of them, on several threads where there are several.
template <class F>
void for_rows(int64_t rows, F&& f) {
  if (rows == 1) return f(0);
  Pool::get().parallel_for((int)rows, std::forward<F>(f));
}

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
  if (spec.temperature == 0) {
    row.list(row.peak, kInf);  // in the order of the ids
    *token = row.tokens[0].id;
    return;
  }
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
  Draw(mx::Stream stream, std::vector<DrawSpec> specs) : CpuPrimitive(stream), specs_(std::move(specs)) {}
  const char* name() const override { return "runner::Draw"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return specs_ == static_cast<const Draw&>(other).specs_;
  }
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto* x = (const float*)d.contiguous(inputs[0]);
    auto* token = d.allocate(outputs[0]).data<uint32_t>();
    auto* peak = d.allocate(outputs[1]).data<float>();
    d.run([x, n = (int64_t)inputs[0].shape(1), specs = specs_, token, peak] {
      for_rows((int64_t)specs.size(), [&](int i) { draw(x + i * n, n, specs[i], token + i, peak + i); });
    });
  }

 private:
  std::vector<DrawSpec> specs_;
};

class LogProbabilities : public CpuPrimitive {
 public:
  LogProbabilities(mx::Stream stream, std::vector<int> tops, int most)
      : CpuPrimitive(stream), tops_(std::move(tops)), most_(most) {}
  const char* name() const override { return "runner::LogProbabilities"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return tops_ == static_cast<const LogProbabilities&>(other).tops_;
  }
  // outputs: the tokens', (the ids and log-probabilities of the most likely)
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto* x = (const float*)d.contiguous(inputs[0]);
    auto* token = (const uint32_t*)d.contiguous(inputs[1]);
    auto* logprob = d.allocate(outputs[0]).data<float>();
    uint32_t* ids = most_ ? d.allocate(outputs[1]).data<uint32_t>() : nullptr;
    float* logprobs = most_ ? d.allocate(outputs[2]).data<float>() : nullptr;
    d.run([x, n = (int64_t)inputs[0].shape(1), tops = tops_, token, logprob, ids, logprobs, most = most_] {
      for_rows((int64_t)tops.size(), [&](int i) {
        // What nobody asked for is not computed, but is no garbage either.
        logprob[i] = 0.0f;
        std::fill_n(ids + i * most, most, 0u);
        std::fill_n(logprobs + i * most, most, 0.0f);
        if (tops[i] < 0) return;
        log_probabilities(x + i * n, n, token[i], std::min(tops[i], most), logprob + i, ids + i * most,
                          logprobs + i * most);
      });
    });
  }

 private:
  std::vector<int> tops_;
  int most_;
};

class Masked : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Masked"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto* x = (const float*)d.contiguous(inputs[0]);
    auto* bits = (const uint32_t*)d.contiguous(inputs[1]);
    auto* out = d.allocate(outputs[0]).data<float>();
    d.run([x, bits, out, rows = (int64_t)inputs[0].shape(0), n = (int64_t)inputs[0].shape(1),
           words = (int64_t)inputs[1].shape(1)] {
      for_rows(rows, [&](int row) {
        for (int64_t w = 0; w < words; ++w) {
          int64_t first = row * n + w * 32, count = std::min<int64_t>(32, n - w * 32);
          uint32_t word = bits[row * words + w];
          if (word == 0) {
            std::fill_n(out + first, count, -kInf);
          } else {
            for (int64_t i = 0; i < count; ++i) out[first + i] = word >> i & 1 ? x[first + i] : -kInf;
          }
        }
      });
    });
  }
};

void need_logits(const char* op, const mx::array& x) {
  if (x.dtype() != mx::float32 || x.ndim() != 2 || x.shape(0) == 0 || x.shape(1) == 0) {
    refuse(op, ": logits are ", x.dtype(), x.shape(), "; expected float32 [R, V]");
  }
}

}  // namespace

std::pair<mx::array, mx::array> draw_op(const mx::array& logits, const std::vector<Drawn>& rows) {
  need_logits("draw", logits);
  int count = logits.shape(0);
  if ((int)rows.size() != count) refuse("draw: ", rows.size(), " settings; expected one for each of ", count, " rows");
  std::vector<DrawSpec> specs;
  for (auto& [chance, temperature, top_k, top_p, min_p] : rows) {
    specs.push_back({chance, (float)temperature, top_k, top_p, min_p > 0 ? (float)std::log(min_p) : -kInf});
    bool fits = chance >= 0 && chance < 1 && temperature >= 0 && (temperature == 0 || specs.back().temperature > 0) &&
                top_k >= 0 && top_p >= 0 && min_p >= 0 && min_p <= 1;
    if (!fits) {
      refuse("draw: chance is ", chance, ", temperature ", temperature, ", top_k ", top_k, ", top_p ", top_p, ", min_p ",
             min_p, "; expected a chance in [0, 1), and a temperature and filters that are not negative");
    }
  }
  mx::Shape shape{count};
  std::shared_ptr<mx::Primitive> primitive = std::make_shared<Draw>(cpu_stream(), std::move(specs));
  auto out = mx::array::make_arrays({shape, shape}, {mx::uint32, mx::float32}, primitive, {logits});
  return {out[0], out[1]};
}

std::vector<mx::array> log_probabilities_op(const mx::array& logits, const mx::array& tokens,
                                            const std::vector<int>& tops) {
  need_logits("log_probabilities", logits);
  int count = logits.shape(0);
  bool fits = tokens.dtype() == mx::uint32 && tokens.ndim() == 1 && tokens.shape(0) == count;
  if (!fits || (int)tops.size() != count) {
    refuse("log_probabilities: tokens are ", tokens.dtype(), tokens.shape(), ", with ", tops.size(),
           " numbers of others; expected uint32 and as many numbers as the ", count, " rows");
  }
  int most = std::clamp(*std::max_element(tops.begin(), tops.end()), 0, logits.shape(1));
  auto primitive = std::make_shared<LogProbabilities>(cpu_stream(), tops, most);
  mx::Shape one{count}, several{count, most};
  if (most == 0) return {mx::array(one, mx::float32, primitive, {logits, tokens})};
  return mx::array::make_arrays({one, several, several}, {mx::float32, mx::uint32, mx::float32}, primitive,
                                {logits, tokens});
}

mx::array masked_op(const mx::array& logits, const mx::array& bits) {
  need_logits("masked", logits);
  mx::Shape expected{logits.shape(0), (logits.shape(1) + 31) / 32};
  if (bits.dtype() != mx::uint32 || bits.shape() != expected) {
    refuse("masked: bits are ", bits.dtype(), bits.shape(), "; expected uint32 ", expected);
  }
  return mx::array(logits.shape(), mx::float32, std::make_shared<Masked>(cpu_stream()), {logits, bits});
}

}  // namespace runner
