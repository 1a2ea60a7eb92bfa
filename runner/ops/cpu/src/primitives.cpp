#include "primitives.h"

#include "checks.h"
#include "kernels.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "pool.h"
#include "primitive_base.h"
#include "rope_table.h"

namespace runner {
namespace {

// ---- linear

class Linear : public CpuPrimitive {
 public:
  Linear(mx::Stream stream, int group, int bits, Format format, bool has_bias, bool coarse = false)
      : CpuPrimitive(stream), group_(group), bits_(bits), format_(format), has_bias_(has_bias), coarse_(coarse) {}
  const char* name() const override { return "runner::Linear"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const Linear&>(other);
    return group_ == o.group_ && bits_ == o.bits_ && format_ == o.format_ && has_bias_ == o.has_bias_ &&
           coarse_ == o.coarse_;
  }

  // inputs: x, weight, (scales, shifts), (bias)
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto& out = d.allocate(outputs[0]);
    LinearArgs a{};
    a.xt = type_of(inputs[0]);
    a.k = inputs[0].shape(-1);
    a.n = out.shape(-1);
    a.m = a.n ? static_cast<int64_t>(out.size()) / a.n : 0;
    a.out = out.data<void>();
    a.x = d.contiguous(inputs[0]);
    a.w = d.contiguous(inputs[1]);
    a.bits = bits_;
    a.group = group_;
    size_t next = 2;
    a.format = format_;
    a.coarse = coarse_;
    if (bits_) {
      a.st = type_of(inputs[2]);
      a.scales = d.contiguous(inputs[2]);
      if (format_ == Format::affine) a.shifts = d.contiguous(inputs[3]);
      next = format_ == Format::affine ? 4 : 3;
    } else {
      a.wt = type_of(inputs[1]);
    }
    if (has_bias_) {
      a.bias = d.contiguous(inputs[next]);
      a.bt = type_of(inputs[next]);
    }
    d.run([a] { kernels().linear(a); });
  }

 private:
  int group_, bits_;
  Format format_;
  bool has_bias_, coarse_;
};

// A product with a matrix of its own for each of several groups of rows.
class LinearEach : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::LinearEach"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }

  // inputs: x [G, M, K], weight [G, N, K]
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    auto& out = d.allocate(outputs[0]);
    LinearArgs a{};
    a.xt = type_of(inputs[0]);
    a.wt = type_of(inputs[1]);
    a.m = inputs[0].shape(1), a.k = inputs[0].shape(2), a.n = inputs[1].shape(1);
    a.x = d.contiguous(inputs[0]);
    a.w = d.contiguous(inputs[1]);
    a.out = out.data<void>();
    if (out.size() == 0) return;
    d.run([a, groups = inputs[0].shape(0)] {
      auto one = [&](int g) {
        LinearArgs own = a;
        own.x = static_cast<const char*>(a.x) + g * a.m * a.k * size_of(a.xt);
        own.w = static_cast<const char*>(a.w) + g * a.n * a.k * size_of(a.wt);
        own.out = static_cast<char*>(a.out) + g * a.m * a.n * size_of(a.xt);
        kernels().linear(own);
      };
      // Few products are divided among the threads each by itself, many as they are.
      if (groups >= 2 * Pool::get().size()) return Pool::get().parallel_for(groups, one);
      for (int g = 0; g < groups; ++g) one(g);
    });
  }
};

// ---- embedding

class Embed : public CpuPrimitive {
 public:
  Embed(mx::Stream stream, int group, int bits, Format format)
      : CpuPrimitive(stream), group_(group), bits_(bits), format_(format) {}
  const char* name() const override { return "runner::Embed"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const Embed&>(other);
    return group_ == o.group_ && bits_ == o.bits_ && format_ == o.format_;
  }

  // inputs: ids, weight, (scales, (shifts))
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    LinearArgs a{};
    auto& out = d.allocate(outputs[0]);
    a.xt = type_of(out);
    a.x = d.contiguous(inputs[0]);
    a.m = static_cast<int64_t>(inputs[0].size());
    a.n = inputs[1].shape(0);
    a.k = out.shape(-1);
    a.out = out.data<void>();
    a.w = d.contiguous(inputs[1]);
    a.bits = bits_, a.group = group_, a.format = format_;
    if (bits_) {
      a.st = type_of(inputs[2]);
      a.scales = d.contiguous(inputs[2]);
      if (format_ == Format::affine) a.shifts = d.contiguous(inputs[3]);
    } else {
      a.wt = type_of(inputs[1]);
    }
    if (out.size()) d.run([a] { kernels().embed(a); });
  }

 private:
  int group_, bits_;
  Format format_;
};

// ---- norms

class Norm : public CpuPrimitive {
 public:
  Norm(mx::Stream stream, float eps, bool mean, bool residual, bool weight, bool shift)
      : CpuPrimitive(stream), eps_(eps), mean_(mean), residual_(residual), weight_(weight), shift_(shift) {}
  const char* name() const override { return "runner::Norm"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const Norm&>(other);
    return eps_ == o.eps_ && mean_ == o.mean_ && residual_ == o.residual_ && weight_ == o.weight_ &&
           shift_ == o.shift_;
  }

  // inputs: x, (residual), (weight), (shift); outputs: (x + residual), normed
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    NormArgs a{};
    size_t next = 1;
    a.xt = type_of(inputs[0]);
    a.eps = eps_;
    a.mean = mean_;
    a.dim = inputs[0].shape(-1);
    a.rows = a.dim ? static_cast<int64_t>(inputs[0].size()) / a.dim : 0;
    a.x = d.contiguous(inputs[0]);
    if (residual_) {
      a.residual = d.contiguous(inputs[next++]);
      a.sum = d.allocate(outputs[0]).data<void>();
    }
    if (weight_) {
      a.wt = type_of(inputs[next]);
      a.weight = d.contiguous(inputs[next++]);
    }
    if (shift_) {
      a.ht = type_of(inputs[next]);
      a.shift = d.contiguous(inputs[next++]);
    }
    a.out = d.allocate(outputs.back()).data<void>();
    if (a.rows) d.run([a] { kernels().norm(a); });
  }

 private:
  float eps_;
  bool mean_, residual_, weight_, shift_;
};

// ---- rope

class Rope : public CpuPrimitive {
 public:
  // places: the position of the first of the L tokens, or one for each of them; none where they are an input
  Rope(mx::Stream stream, const RopeSpec& spec, bool has_freqs, std::vector<int> places)
      : CpuPrimitive(stream), spec_(spec), has_freqs_(has_freqs), places_(std::move(places)) {}
  const char* name() const override { return "runner::Rope"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return same_but_position(other) && places_ == static_cast<const Rope&>(other).places_;
  }
  int64_t position() const override { return places_.empty() ? 0 : places_[0]; }
  bool same_but_position(const mx::Primitive& other) const override {
    auto& o = static_cast<const Rope&>(other);
    return same_but_places(other) && same_steps(places_, o.places_);
  }
  bool same_but_places(const mx::Primitive& other) const override {
    auto& o = static_cast<const Rope&>(other);
    return spec_ == o.spec_ && has_freqs_ == o.has_freqs_ && places_.size() == o.places_.size();
  }

  // inputs: x [B, H, L, D], (offset int32, one or B, where it is no number), (freqs float32 [dims / 2])
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    const mx::array& x = inputs[0];
    RopeArgs a{};
    a.xt = type_of(x);
    a.b = x.shape(0), a.h = x.shape(1), a.l = x.shape(2), a.d = x.shape(3);
    a.sb = x.strides(0), a.sh = x.strides(1), a.sl = x.strides(2), a.sd = x.strides(3);
    a.x = x.data<void>();
    a.out = d.allocate(outputs[0]).data<void>();
    a.dims = spec_.dims;
    a.traditional = spec_.traditional;
    if (outputs[0].size() == 0) return;
    auto offsets = places_.empty() ? static_cast<const int32_t*>(d.contiguous(inputs[1])) : nullptr;
    const int64_t count = offsets ? static_cast<int64_t>(inputs[1].size()) : static_cast<int64_t>(places_.size());
    auto freqs = has_freqs_ ? static_cast<const float*>(d.contiguous(inputs.back())) : nullptr;
    a.table_per_batch = offsets && count > 1;
    const int64_t run = count == 1 || offsets ? a.l : 1;  // tokens behind each place
    d.run([a, spec = spec_, offsets, places = places_, count, run, freqs](int64_t ahead) mutable {
      std::vector<int32_t> here(places.begin(), places.end());
      for (int32_t& place : here) place += static_cast<int32_t>(ahead);
      const RopeTable& table = rope_table(spec, offsets ? offsets : here.data(), count, run, freqs);
      a.cos = table.cos.data();
      a.sin = table.sin.data();
      kernels().rope(a);
    });
  }

 private:
  RopeSpec spec_;
  bool has_freqs_;
  std::vector<int> places_;
};

// ---- gated activation and argmax

class Glu : public CpuPrimitive {
 public:
  Glu(mx::Stream stream, Activation activation, bool gated, float alpha = 0.0f, float limit = 0.0f)
      : CpuPrimitive(stream), activation_(activation), gated_(gated), alpha_(alpha), limit_(limit) {}
  const char* name() const override { return "runner::Glu"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const Glu&>(other);
    return activation_ == o.activation_ && gated_ == o.gated_ && alpha_ == o.alpha_ && limit_ == o.limit_;
  }
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    GluArgs a{};
    a.xt = type_of(inputs[0]);
    a.dim = outputs[0].shape(-1);
    a.rows = a.dim ? static_cast<int64_t>(outputs[0].size()) / a.dim : 0;
    a.x = d.contiguous(inputs[0]);
    a.out = d.allocate(outputs[0]).data<void>();
    a.act = activation_;
    a.gated = gated_;
    a.alpha = alpha_, a.limit = limit_;
    if (a.rows) d.run([a] { kernels().glu(a); });
  }

 private:
  Activation activation_;
  bool gated_;
  float alpha_, limit_;
};

// outputs: the indices, (the maxima)
class Argmax : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Argmax"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    ArgmaxArgs a{};
    a.xt = type_of(inputs[0]);
    a.dim = inputs[0].shape(-1);
    a.rows = static_cast<int64_t>(outputs[0].size());
    a.x = d.contiguous(inputs[0]);
    a.out = d.allocate(outputs[0]).data<uint32_t>();
    a.peak = outputs.size() > 1 ? d.allocate(outputs[1]).data<float>() : nullptr;
    if (a.rows) d.run([a] { kernels().argmax(a); });
  }
};

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_approx") return Activation::gelu_approx;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  refuse("glu: no activation '", name, "'; expected silu, gelu, gelu_approx or relu");
}

}  // namespace

mx::array linear_op(const mx::array& x, const mx::array& weight, const MaybeArray& bias) {
  need_float("linear", "x", x);
  need_float("linear", "weight", weight);
  need_dims("linear", "weight", weight, 2);
  if (x.ndim() < 1 || x.shape(-1) != weight.shape(1)) {
    refuse("linear: x has shape ", x.shape(), ", weight ", weight.shape(), "; the last dimensions must be equal");
  }
  std::vector<mx::array> inputs{x, weight};
  if (bias) {
    need_vector("linear", "bias", *bias, weight.shape(0));
    inputs.push_back(*bias);
  }
  auto primitive = std::make_shared<Linear>(cpu_stream(), 0, 0, Format::affine, bias.has_value());
  return mx::array(with_last(x, weight.shape(0)), x.dtype(), std::move(primitive), std::move(inputs));
}

// Refuses a matrix that is not in MLX's affine layout; returns the number of its inputs.
int64_t need_affine(const char* op, const mx::array& weight, const mx::array& scales, const mx::array& biases,
                    int group_size, int bits) {
  need_dims(op, "weight", weight, 2);
  if (weight.dtype() != mx::uint32) refuse(op, ": weight is ", weight.dtype(), "; expected uint32");
  if (bits < 2 || bits > 8 || bits == 7) refuse(op, ": bits is ", bits, "; expected 2, 3, 4, 5, 6 or 8");
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    refuse(op, ": group_size is ", group_size, "; expected 32, 64 or 128");
  }
  int64_t in = int64_t(weight.shape(1)) * 32 / bits;
  if (in % group_size) refuse(op, ": weight ", weight.shape(), " of ", bits, " bits is no multiple of ", group_size);
  need_float(op, "scales", scales);
  mx::Shape expected{weight.shape(0), static_cast<int>(in / group_size)};
  if (scales.shape() != expected || biases.shape() != expected || biases.dtype() != scales.dtype()) {
    refuse(op, ": scales are ", scales.dtype(), scales.shape(), ", biases ", biases.dtype(), biases.shape(),
           "; expected one type and shape ", expected);
  }
  return in;
}

mx::array linear_each_op(const mx::array& x, const mx::array& weight) {
  for (auto& [what, array] : {std::pair{"x", x}, std::pair{"weight", weight}}) {
    need_float("linear_each", what, array);
    need_dims("linear_each", what, array, 3);
  }
  if (x.shape(0) != weight.shape(0) || x.shape(2) != weight.shape(2)) {
    refuse("linear_each: x has shape ", x.shape(), ", weight ", weight.shape(),
           "; expected [G, M, K] and [G, N, K]");
  }
  return mx::array(with_last(x, weight.shape(1)), x.dtype(), std::make_shared<LinearEach>(cpu_stream()), {x, weight});
}

mx::array quantized_linear_op(const mx::array& x, const mx::array& weight, const mx::array& scales,
                              const mx::array& biases, const MaybeArray& bias, int group_size, int bits, bool int8) {
  const char* op = "quantized_linear";
  need_float(op, "x", x);
  int64_t in = need_affine(op, weight, scales, biases, group_size, bits);
  if (x.ndim() < 1 || x.shape(-1) != in) {
    refuse(op, ": x has shape ", x.shape(), ", weight ", weight.shape(), " of ", bits,
           " bits; the last dimension of x must be ", in);
  }
  std::vector<mx::array> inputs{x, weight, scales, biases};
  if (bias) {
    need_vector(op, "bias", *bias, weight.shape(0));
    inputs.push_back(*bias);
  }
  auto primitive = std::make_shared<Linear>(cpu_stream(), group_size, bits, Format::affine, bias.has_value(), int8);
  return mx::array(with_last(x, weight.shape(0)), x.dtype(), std::move(primitive), std::move(inputs));
}

mx::array small_float_linear_op(const mx::array& x, const mx::array& weight, const mx::array& scales,
                                const MaybeArray& bias, const std::string& mode, bool int8) {
  const char* op = "small_float_linear";
  if (mode != "mxfp4" && mode != "mxfp8" && mode != "nvfp4") {
    refuse(op, ": mode is '", mode, "'; expected mxfp4, mxfp8 or nvfp4");
  }
  Format format = mode == "mxfp4" ? Format::mxfp4 : mode == "mxfp8" ? Format::mxfp8 : Format::nvfp4;
  int bits = format == Format::mxfp8 ? 8 : 4, group = format == Format::nvfp4 ? 16 : 32;
  need_float(op, "x", x);
  need_dims(op, "weight", weight, 2);
  if (weight.dtype() != mx::uint32) refuse(op, ": weight is ", weight.dtype(), "; expected uint32");
  int64_t in = int64_t(weight.shape(1)) * 32 / bits;
  if (x.ndim() < 1 || x.shape(-1) != in || in % group) {
    refuse(op, ": x has shape ", x.shape(), ", weight ", weight.shape(), " of ", mode,
           "; the last dimension of x must be ", in, ", a multiple of ", group);
  }
  mx::Shape expected{weight.shape(0), static_cast<int>(in / group)};
  if (scales.dtype() != mx::uint8 || scales.shape() != expected) {
    refuse(op, ": scales are ", scales.dtype(), scales.shape(), "; expected uint8 ", expected);
  }
  std::vector<mx::array> inputs{x, weight, scales};
  if (bias) {
    need_vector(op, "bias", *bias, weight.shape(0));
    inputs.push_back(*bias);
  }
  auto primitive = std::make_shared<Linear>(cpu_stream(), group, bits, format, bias.has_value(), int8);
  return mx::array(with_last(x, weight.shape(0)), x.dtype(), std::move(primitive), std::move(inputs));
}

mx::array embed_op(const mx::array& ids, const mx::array& weight, mx::Dtype dtype) {
  if (ids.dtype() != mx::int32 && ids.dtype() != mx::uint32) refuse("embed: ids are ", ids.dtype(), "; expected int32");
  need_float("embed", "weight", weight);
  need_dims("embed", "weight", weight, 2);
  mx::Shape shape = ids.shape();
  shape.push_back(weight.shape(1));
  return mx::array(shape, dtype, std::make_shared<Embed>(cpu_stream(), 0, 0, Format::affine), {ids, weight});
}

mx::array quantized_embed_op(const mx::array& ids, const mx::array& weight, const mx::array& scales,
                             const mx::array& biases, int group_size, int bits, mx::Dtype dtype) {
  const char* op = "quantized_embed";
  if (ids.dtype() != mx::int32 && ids.dtype() != mx::uint32) refuse(op, ": ids are ", ids.dtype(), "; expected int32");
  need_affine(op, weight, scales, biases, group_size, bits);
  mx::Shape shape = ids.shape();
  shape.push_back(weight.shape(1) * 32 / bits);
  auto primitive = std::make_shared<Embed>(cpu_stream(), group_size, bits, Format::affine);
  return mx::array(shape, dtype, std::move(primitive), {ids, weight, scales, biases});
}

mx::array norm_op(const mx::array& x, const MaybeArray& weight, const MaybeArray& shift, float eps, bool mean) {
  const char* op = mean ? "layer_norm" : "rms_norm";
  need_float(op, "x", x);
  if (x.ndim() < 1) refuse(op, ": x is a scalar; expected at least one dimension");
  std::vector<mx::array> inputs{x};
  if (weight) {
    need_vector(op, "weight", *weight, x.shape(-1));
    inputs.push_back(*weight);
  }
  if (shift) {
    need_vector(op, "bias", *shift, x.shape(-1));
    inputs.push_back(*shift);
  }
  auto primitive =
      std::make_shared<Norm>(cpu_stream(), eps, mean, false, weight.has_value(), shift.has_value());
  return mx::array(x.shape(), x.dtype(), std::move(primitive), std::move(inputs));
}

std::pair<mx::array, mx::array> add_rms_norm_op(const mx::array& x, const mx::array& residual,
                                                const MaybeArray& weight, float eps) {
  const char* op = "add_rms_norm";
  need_float(op, "x", x);
  if (x.ndim() < 1 || x.shape() != residual.shape() || x.dtype() != residual.dtype()) {
    refuse(op, ": x is ", x.dtype(), x.shape(), ", residual ", residual.dtype(), residual.shape(),
           "; expected the same type and shape");
  }
  std::vector<mx::array> inputs{x, residual};
  if (weight) {
    need_vector(op, "weight", *weight, x.shape(-1));
    inputs.push_back(*weight);
  }
  auto primitive = std::make_shared<Norm>(cpu_stream(), eps, false, true, weight.has_value(), false);
  auto out = mx::array::make_arrays({x.shape(), x.shape()}, {x.dtype(), x.dtype()}, primitive, inputs);
  return {out[0], out[1]};
}

mx::array rope_op(const mx::array& x, const std::variant<int, mx::array, std::vector<int>>& offset, int dims, bool traditional,
                  const std::optional<float>& base, float scale, const MaybeArray& freqs) {
  need_float("rope", "x", x);
  need_dims("rope", "x", x, 4);
  if (dims < 2 || dims % 2 || dims > x.shape(3)) {
    refuse("rope: dims is ", dims, "; expected an even number from 2 to the last dimension of x, ", x.shape());
  }
  if (freqs.has_value() == base.has_value()) refuse("rope: give either freqs or base");
  auto stream = cpu_stream();
  std::vector<mx::array> inputs{x};
  std::vector<int> places;
  if (auto* start = std::get_if<mx::array>(&offset)) {
    if (start->ndim() > 1 || (start->ndim() == 1 && start->shape(0) != 1 && start->shape(0) != x.shape(0))) {
      refuse("rope: offset has shape ", start->shape(), "; expected one number or one for each of ", x.shape(0),
             " rows");
    }
    inputs.push_back(start->dtype() == mx::int32 ? *start : mx::astype(*start, mx::int32, stream));
  } else if (auto* each = std::get_if<std::vector<int>>(&offset)) {
    if (x.shape(0) != 1 || static_cast<size_t>(x.shape(2)) != each->size() || each->empty()) {
      refuse("rope: ", each->size(), " positions, one for each token of a single row, for x ", x.shape());
    }
    places = *each;
  } else {
    places = {std::get<int>(offset)};
  }
  if (freqs) {
    need_vector("rope", "freqs", *freqs, dims / 2);
    inputs.push_back(freqs->dtype() == mx::float32 ? *freqs : mx::astype(*freqs, mx::float32, stream));
  }
  RopeSpec spec{dims, traditional, base.value_or(0.0f), scale};
  auto primitive = std::make_shared<Rope>(stream, spec, freqs.has_value(), std::move(places));
  return mx::array(x.shape(), x.dtype(), std::move(primitive), std::move(inputs));
}

namespace {

mx::array gated(const mx::array& gate_up, std::shared_ptr<Glu> primitive) {
  need_float("glu", "gate_up", gate_up);
  if (gate_up.ndim() < 1 || gate_up.shape(-1) % 2) {
    refuse("glu: gate_up has shape ", gate_up.shape(), "; expected an even last dimension");
  }
  return mx::array(with_last(gate_up, gate_up.shape(-1) / 2), gate_up.dtype(), std::move(primitive), {gate_up});
}

}  // namespace

mx::array glu_op(const mx::array& gate_up, const std::string& activation) {
  return gated(gate_up, std::make_shared<Glu>(cpu_stream(), activation_named(activation), true));
}

mx::array clamped_glu_op(const mx::array& gate_up, float alpha, float limit) {
  return gated(gate_up, std::make_shared<Glu>(cpu_stream(), Activation::clamped, true, alpha, limit));
}

mx::array activate_op(const mx::array& x, const std::string& activation) {
  need_float("activate", "x", x);
  if (x.ndim() < 1) refuse("activate: x is a scalar; expected at least one dimension");
  auto primitive = std::make_shared<Glu>(cpu_stream(), activation_named(activation), false);
  return mx::array(x.shape(), x.dtype(), std::move(primitive), {x});
}

namespace {

mx::Shape shape_of_rows(const char* op, const mx::array& x) {
  need_float(op, "x", x);
  if (x.ndim() < 1 || x.shape(-1) == 0) refuse(op, ": x has shape ", x.shape(), "; expected a last dimension of >= 1");
  return mx::Shape(x.shape().begin(), x.shape().end() - 1);
}

}  // namespace

mx::array argmax_op(const mx::array& x) {
  return mx::array(shape_of_rows("argmax", x), mx::uint32, std::make_shared<Argmax>(cpu_stream()), {x});
}

std::pair<mx::array, mx::array> greatest_op(const mx::array& x) {
  mx::Shape shape = shape_of_rows("greatest", x);
  auto primitive = std::make_shared<Argmax>(cpu_stream());
  auto out = mx::array::make_arrays({shape, shape}, {mx::uint32, mx::float32}, primitive, {x});
  return {out[0], out[1]};
}

}  // namespace runner
