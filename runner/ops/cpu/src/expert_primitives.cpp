// Primitives of mixtures of experts: products with an expert's matrix for each row, the choice of experts, and their sum.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "mlx/ops.h"
#include "primitive_base.h"
#include "primitives.h"

namespace runner {
namespace {

// How a stack of matrices is stored; bits 0: as floats.
struct Stored {
  int group, bits;
  Format format;
  bool coarse;  // what it is multiplied with, see LinearArgs
  bool operator==(const Stored& o) const {
    return group == o.group && bits == o.bits && format == o.format && coarse == o.coarse;
  }
};

class Gather : public CpuPrimitive {
 public:
  Gather(mx::Stream stream, Stored stored, int64_t per, bool has_bias)
      : CpuPrimitive(stream), stored_(stored), per_(per), has_bias_(has_bias) {}
  const char* name() const override { return "runner::Gather"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const Gather&>(other);
    return stored_ == o.stored_ && per_ == o.per_ && has_bias_ == o.has_bias_;
  }

  // inputs: x, experts, weight, (scales, (shifts)), (bias)
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto& out = d.allocate(outputs[0]);
    GatherArgs g{};
    LinearArgs& a = g.matrix;
    a.xt = type_of(inputs[0]);
    a.k = inputs[0].shape(-1);
    a.n = out.shape(-1);
    a.out = out.data<void>();
    a.x = d.contiguous(inputs[0]);
    g.experts = static_cast<const int32_t*>(d.contiguous(inputs[1]));
    g.pairs = static_cast<int64_t>(inputs[1].size());
    g.per = per_;
    g.count = inputs[2].shape(0);
    a.w = d.contiguous(inputs[2]);
    a.bits = stored_.bits, a.group = stored_.group, a.format = stored_.format, a.coarse = stored_.coarse;
    size_t next = 3;
    if (a.bits) {
      a.st = type_of(inputs[next]);
      a.scales = d.contiguous(inputs[next++]);
      if (a.format == Format::affine) a.shifts = d.contiguous(inputs[next++]);
    } else {
      a.wt = type_of(inputs[2]);
    }
    if (has_bias_) {
      a.bias = d.contiguous(inputs[next]);
      a.bt = type_of(inputs[next]);
    }
    if (out.size()) d.run([g] { kernels().gather(g); });
  }

 private:
  Stored stored_;
  int64_t per_;
  bool has_bias_;
};

// outputs: the experts, their weights
class Route : public CpuPrimitive {
 public:
  // `how` has all but the arrays and the number of rows.
  Route(mx::Stream stream, const RouteArgs& how) : CpuPrimitive(stream), how_(how) {}
  const char* name() const override { return "runner::Route"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto &a = how_, &b = static_cast<const Route&>(other).how_;
    return a.count == b.count && a.groups == b.groups && a.kept == b.kept && a.members == b.members &&
           a.sigmoid == b.sigmoid && a.normalized == b.normalized && a.eps == b.eps && a.factor == b.factor;
  }

  // inputs: logits, (correction)
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    RouteArgs a = how_;
    a.logits = static_cast<const float*>(d.contiguous(inputs[0]));
    if (inputs.size() > 1) {
      a.correction = d.contiguous(inputs[1]);
      a.ct = type_of(inputs[1]);
    }
    a.experts = inputs[0].shape(-1);
    a.rows = static_cast<int64_t>(inputs[0].size()) / a.experts;
    a.chosen = d.allocate(outputs[0]).data<uint32_t>();
    a.weights = d.allocate(outputs[1]).data<float>();
    if (a.rows) d.run([a] { kernels().route(a); });
  }

 private:
  RouteArgs how_;
};

class Mixture : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Mixture"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }

  // inputs: outputs [..., count, dim], weights [..., count]
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    MixtureArgs a{};
    a.xt = type_of(inputs[0]);
    a.count = inputs[0].shape(-2), a.dim = inputs[0].shape(-1);
    a.x = d.contiguous(inputs[0]);
    a.weights = static_cast<const float*>(d.contiguous(inputs[1]));
    auto& out = d.allocate(outputs[0]);
    a.out = out.data<void>();
    a.rows = out.size() ? static_cast<int64_t>(out.size()) / a.dim : 0;
    if (a.rows) d.run([a] { kernels().mixture(a); });
  }
};

// Adds the bias, and broadcasts x where the kernel could not: it takes rows that `per` experts one after the other share.
mx::array gathered(const char* op, mx::array x, const mx::array& experts, std::vector<mx::array> stack, Stored stored,
                   const MaybeArray& bias, int64_t in) {
  need_float(op, "x", x);
  if (experts.dtype() != mx::int32 && experts.dtype() != mx::uint32) {
    refuse(op, ": experts are ", experts.dtype(), "; expected int32 or uint32");
  }
  if (x.ndim() < 2 || x.shape(-2) != 1 || x.shape(-1) != in || x.ndim() > experts.ndim() + 2) {
    refuse(op, ": x has shape ", x.shape(), " for experts ", experts.shape(), "; expected [..., 1, ", in,
           "], whose leading dimensions broadcast to those of the experts");
  }
  auto stream = cpu_stream();
  const mx::Shape& wanted = experts.shape();
  size_t same = 0;
  if (x.ndim() == experts.ndim() + 2) {
    while (same < wanted.size() && x.shape(same) == wanted[same]) ++same;
  }
  int64_t per = 1;
  bool ones = x.ndim() == experts.ndim() + 2;
  for (size_t i = same; i < wanted.size(); ++i) {
    per *= wanted[i];
    ones = ones && x.shape(i) == 1;
  }
  if (!ones) {
    mx::Shape whole = wanted;
    whole.insert(whole.end(), {1, static_cast<int>(in)});
    x = mx::broadcast_to(x, whole, stream);
    per = 1;
  }
  mx::Shape shape = wanted;
  shape.insert(shape.end(), {1, stack[0].shape(1)});
  std::vector<mx::array> inputs{x, experts};
  inputs.insert(inputs.end(), stack.begin(), stack.end());
  if (bias) {
    need_float(op, "bias", *bias);
    if (bias->shape() != mx::Shape{stack[0].shape(0), stack[0].shape(1)}) {
      refuse(op, ": bias has shape ", bias->shape(), "; expected one for each row of weight ", stack[0].shape());
    }
    inputs.push_back(*bias);
  }
  auto primitive = std::make_shared<Gather>(stream, stored, std::max<int64_t>(per, 1), bias.has_value());
  return mx::array(shape, x.dtype(), std::move(primitive), std::move(inputs));
}

}  // namespace

mx::array gather_linear_op(const mx::array& x, const mx::array& weight, const mx::array& experts,
                           const MaybeArray& bias) {
  const char* op = "gather_linear";
  need_float(op, "weight", weight);
  need_dims(op, "weight", weight, 3);
  return gathered(op, x, experts, {weight}, {0, 0, Format::affine, false}, bias, weight.shape(2));
}

mx::array gather_quantized_linear_op(const mx::array& x, const mx::array& weight, const mx::array& scales,
                                     const MaybeArray& biases, const mx::array& experts, const MaybeArray& bias,
                                     int group_size, int bits, const std::string& mode, bool int8) {
  const char* op = "gather_quantized_linear";
  need_dims(op, "weight", weight, 3);
  if (weight.dtype() != mx::uint32) refuse(op, ": weight is ", weight.dtype(), "; expected uint32");
  Format format = Format::affine;
  bool known = (bits >= 2 && bits <= 6) || bits == 8;
  known = known && (group_size == 32 || group_size == 64 || group_size == 128);
  if (mode != "affine") {
    format = mode == "mxfp4" ? Format::mxfp4 : mode == "mxfp8" ? Format::mxfp8 : Format::nvfp4;
    known = (mode == "nvfp4" || mode == "mxfp4" || mode == "mxfp8") && bits == (mode == "mxfp8" ? 8 : 4) &&
            group_size == (mode == "nvfp4" ? 16 : 32);
  }
  if (!known) refuse(op, ": no kernel for ", bits, " bits in groups of ", group_size, " in mode '", mode, "'");
  const int64_t in = int64_t(weight.shape(2)) * 32 / bits;
  if (in % group_size) refuse(op, ": weight ", weight.shape(), " of ", bits, " bits is no multiple of ", group_size);
  mx::Shape expected{weight.shape(0), weight.shape(1), static_cast<int>(in / group_size)};
  std::vector<mx::array> stack{weight, scales};
  if (scales.shape() != expected) refuse(op, ": scales have shape ", scales.shape(), "; expected ", expected);
  if (format == Format::affine) {
    need_float(op, "scales", scales);
    if (!biases || biases->shape() != expected || biases->dtype() != scales.dtype()) {
      refuse(op, ": biases must be ", scales.dtype(), expected, " as the scales are");
    }
    stack.push_back(*biases);
  } else if (scales.dtype() != mx::uint8 || biases) {
    refuse(op, ": scales are ", scales.dtype(), "; expected uint8, and no biases, in mode '", mode, "'");
  }
  return gathered(op, x, experts, std::move(stack), {group_size, bits, format, int8}, bias, in);
}

std::pair<mx::array, mx::array> route_op(const mx::array& logits, const MaybeArray& correction, int count, bool sigmoid,
                                         int groups, int kept, int members, bool normalized, float eps, float factor) {
  const char* op = "route";
  if (logits.dtype() != mx::float32 || logits.ndim() < 1 || logits.shape(-1) < 1) {
    refuse(op, ": logits are ", logits.dtype(), logits.shape(), "; expected float32 [..., experts]");
  }
  const int experts = logits.shape(-1), size = groups > 0 ? experts / groups : 0;
  if (groups < 1 || experts % groups || kept < 1 || kept > groups || members < 1 || members > size) {
    refuse(op, ": ", kept, " of ", groups, " groups by ", members, " members cannot be kept of ", experts, " experts");
  }
  if (count < 1 || count > kept * size) refuse(op, ": ", count, " experts cannot be chosen of ", kept * size);
  std::vector<mx::array> inputs{logits};
  if (correction) {
    need_vector(op, "correction", *correction, experts);
    inputs.push_back(*correction);
  }
  RouteArgs how{};
  how.count = count, how.groups = groups, how.kept = kept, how.members = members;
  how.sigmoid = sigmoid, how.normalized = normalized, how.eps = eps, how.factor = factor;
  mx::Shape shape = with_last(logits, count);
  auto primitive = std::make_shared<Route>(cpu_stream(), how);
  auto out = mx::array::make_arrays({shape, shape}, {mx::uint32, mx::float32}, primitive, inputs);
  return {out[0], out[1]};
}

mx::array mixture_op(const mx::array& outputs, const mx::array& weights) {
  need_float("mixture", "outputs", outputs);
  const bool fits = outputs.ndim() >= 2 && weights.dtype() == mx::float32 && outputs.shape(-2) > 0 &&
                    weights.shape() == mx::Shape(outputs.shape().begin(), outputs.shape().end() - 1);
  if (!fits) {
    refuse("mixture: weights are ", weights.dtype(), weights.shape(), " for outputs ", outputs.shape(),
           "; expected float32, and outputs [..., count, dim]");
  }
  mx::Shape shape(outputs.shape().begin(), outputs.shape().end() - 2);
  shape.push_back(outputs.shape(-1));
  return mx::array(shape, outputs.dtype(), std::make_shared<Mixture>(cpu_stream()), {outputs, weights});
}

}  // namespace runner
