// Short convolutions, recurrences and their gates; and a token's step of both, in the memory where the states lie.
#include <limits>

#include "checks.h"
#include "kernels.h"
#include "primitive_base.h"
#include "primitives.h"
#include "scratch.h"

namespace runner {
namespace {

using Arrays = std::vector<mx::array>;

const float* floats(const void* p) { return static_cast<const float*>(p); }

// What a convolution is, besides its arrays: inputs x, rows, weight, (bias).
struct ConvForm {
  bool biased, activated;
  Activation act;
  bool operator==(const ConvForm& o) const {
    return biased == o.biased && activated == o.activated && (!activated || act == o.act);
  }

  // `next` is the weight's place among the inputs, and comes back behind the bias.
  ConvArgs args(const mx::array& x, const Arrays& inputs, size_t& next, Dispatcher& d) const {
    ConvArgs a{};
    mx::Strides strides;
    a.x = floats(d.last_contiguous(x, strides));
    a.xb = strides[0], a.xl = strides[1];
    a.b = x.shape(0), a.l = x.shape(1), a.c = x.shape(2);
    a.taps = inputs[next].shape(0);
    a.wt = type_of(inputs[next]);
    a.weight = d.contiguous(inputs[next++]);
    if (biased) {
      a.bt = type_of(inputs[next]);
      a.bias = d.contiguous(inputs[next++]);
    }
    a.activated = activated, a.act = act;
    return a;
  }
};

// What a recurrence is, besides its arrays: inputs a, (b), a_log, dt_bias, (skip).
struct RecurrenceForm {
  bool delta;
  int groups;
  float least, most;
  bool operator==(const RecurrenceForm& o) const {
    return delta == o.delta && groups == o.groups && least == o.least && most == o.most;
  }

  RecurrenceArgs args(const mx::array& state, const Arrays& inputs, size_t& next, Dispatcher& d) const {
    RecurrenceArgs r{};
    const size_t first = state.ndim() - 4;  // of slots, behind their number
    r.delta = delta, r.groups = groups, r.least = least, r.most = most;
    r.batch = state.shape(first), r.heads = state.shape(first + 1);
    r.dv = state.shape(first + 2), r.dk = state.shape(first + 3);
    const mx::array& a = inputs[next++];
    mx::Strides strides;
    r.l = a.shape(1);
    r.channels = a.ndim() == 4;
    r.a = floats(d.last_contiguous(a, strides));
    r.ab = strides[0], r.al = strides[1], r.ah = r.channels ? strides[2] : 1;
    if (delta) {
      r.b = floats(d.last_contiguous(inputs[next++], strides));
      r.bb = strides[0], r.bl = strides[1];
    }
    r.lt = type_of(inputs[next]);
    r.a_log = d.contiguous(inputs[next++]);
    r.bt = type_of(inputs[next]);
    r.bias = d.contiguous(inputs[next++]);
    if (!delta) {
      r.st = type_of(inputs[next]);
      r.skip = d.contiguous(inputs[next++]);
    }
    return r;
  }

  // Queries, keys and values that lie side by side, [B, L, ..] with these strides: q, k, v, or for a state space v, k, q.
  void from_mixed(RecurrenceArgs& r, const float* mixed, int64_t sb, int64_t sl) const {
    const int64_t keys = r.groups * r.dk, values = r.heads * r.dv;
    r.q = mixed + (delta ? 0 : values + keys);
    r.k = mixed + (delta ? keys : values);
    r.v = mixed + (delta ? 2 * keys : 0);
    r.qb = r.kb = r.vb = sb;
    r.ql = r.kl = r.vl = sl;
    r.qg = r.kg = r.dk;
    r.vh = r.dv;
  }
};

class Conv : public CpuPrimitive {
 public:
  Conv(mx::Stream stream, ConvForm form) : CpuPrimitive(stream), form_(form) {}
  const char* name() const override { return "runner::Conv"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return form_ == static_cast<const Conv&>(other).form_;
  }
  // inputs: x, rows, weight, (bias)
  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    size_t next = 2;
    ConvArgs a = form_.args(inputs[0], inputs, next, d);
    a.before = floats(d.contiguous(inputs[1]));
    a.out = d.allocate(outputs[0]).data<float>();
    if (outputs[0].size()) d.run([a] { kernels().conv(a); });
  }

 private:
  ConvForm form_;
};

class Recurrence : public CpuPrimitive {
 public:
  Recurrence(mx::Stream stream, RecurrenceForm form) : CpuPrimitive(stream), form_(form) {}
  const char* name() const override { return "runner::Recurrence"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return form_ == static_cast<const Recurrence&>(other).form_;
  }
  // inputs: state, a, .., then q, k, v, or what has all three side by side; outputs: out, the new state
  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    size_t next = 1;
    RecurrenceArgs r = form_.args(inputs[0], inputs, next, d);
    r.from = floats(d.contiguous(inputs[0]));
    mx::Strides s;
    if (form_.delta) {
      r.q = floats(d.last_contiguous(inputs[next], s));
      r.qb = s[0], r.ql = s[1], r.qg = s[2];
      r.k = floats(d.last_contiguous(inputs[next + 1], s));
      r.kb = s[0], r.kl = s[1], r.kg = s[2];
      r.v = floats(d.last_contiguous(inputs[next + 2], s));
      r.vb = s[0], r.vl = s[1], r.vh = s[2];
    } else {
      auto mixed = floats(d.last_contiguous(inputs[next], s));
      form_.from_mixed(r, mixed, s[0], s[1]);
    }
    r.out = d.allocate(outputs[0]).data<float>();
    r.to = d.allocate(outputs[1]).data<float>();
    if (outputs[0].size()) d.run([r] { kernels().recurrence(r); });
  }

 private:
  RecurrenceForm form_;
};

// A buffer [2, B, ..] of each of several sequences, or of B in step.
struct Slots {
  std::vector<float*> buffers;
  int64_t size;  // of a slot

  // `count` outputs from `first` on.
  static Slots of(Arrays& outputs, size_t first, size_t count) {
    Slots found{{}, static_cast<int64_t>(outputs[first].size()) / 2};
    for (size_t i = 0; i < count; ++i) found.buffers.push_back(outputs[first + i].data<float>());
    return found;
  }

  // Where the states of each of `each` rows lie before a token, and where they go: the i-th buffer's is the token at[i].
  std::vector<Moved> moved(const std::vector<int>& at, int64_t ahead, int64_t each) const {
    std::vector<Moved> found;
    for (size_t i = 0; i < buffers.size(); ++i) {
      const int64_t slot = (at[i] + ahead) & 1;
      for (int64_t b = 0; b < each; ++b) {
        const int64_t row = b * (size / each);
        found.push_back({buffers[i] + slot * size + row, buffers[i] + (1 - slot) * size + row});
      }
    }
    return found;
  }
};

// The first `count` outputs are the memory of as many inputs.
void take_over(const Arrays& inputs, Arrays& outputs, size_t count, Dispatcher& d) {
  for (size_t i = 0; i < count; ++i) {
    // As in Append: whoever reads the slot that is not written now is queued before whoever writes it.
    if (inputs[i].flags().row_contiguous) {
      outputs[i].copy_shared_buffer(inputs[i]);
    } else {
      d.copy(inputs[i], outputs[i]);
    }
  }
}

// One token of each sequence. Buffers [2, B, ..] hold the state behind a token in the slot of its parity, so that the
// state before the last token stays until the next one. inputs: the buffers of the convolution and (with a recurrence)
// of the states, of each sequence one; mixed, [B, 1, C] of one buffer or [1, N, C] of N, weight, (bias), (a, ..);
// outputs: the buffers, in place, and the result.
class Step : public CpuPrimitive {
 public:
  Step(mx::Stream stream, ConvForm conv, std::optional<RecurrenceForm> form, std::vector<int> at)
      : CpuPrimitive(stream), conv_(conv), form_(form), at_(std::move(at)) {}
  const char* name() const override { return "runner::Step"; }
  size_t written() const override { return (form_ ? 2 : 1) * at_.size(); }
  int64_t position() const override { return at_[0]; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return same_but_position(other) && at_ == static_cast<const Step&>(other).at_;
  }
  bool same_but_position(const mx::Primitive& other) const override {
    auto& o = static_cast<const Step&>(other);
    return same_but_places(other) && same_steps(at_, o.at_);
  }
  bool same_but_places(const mx::Primitive& other) const override {
    auto& o = static_cast<const Step&>(other);
    return conv_ == o.conv_ && form_ == o.form_ && at_.size() == o.at_.size();
  }

  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    take_over(inputs, outputs, written(), d);
    size_t next = written() + 1;
    ConvArgs a = conv_.args(inputs[written()], inputs, next, d);
    if (at_.size() > 1) a.b = a.l, a.l = 1, a.xb = a.xl;
    const int64_t each = inputs[0].shape(1);
    const Slots rows = Slots::of(outputs, 0, at_.size());
    float* out = d.allocate(outputs[written()]).data<float>();
    if (!form_) {
      a.out = out;
      d.run([a, rows, each, at = at_](int64_t ahead) mutable {
        const std::vector<Moved> moved = rows.moved(at, ahead, each);
        a.each = moved.data();
        kernels().conv(a);
      });
      return;
    }
    RecurrenceArgs r = form_->args(inputs[at_.size()], inputs, next, d);
    if (at_.size() > 1) r.batch = r.l, r.l = 1, r.ab = r.al, r.bb = r.bl;
    const Slots states = Slots::of(outputs, at_.size(), at_.size());
    r.out = out;
    d.run([a, r, rows, states, each, form = *form_, at = at_](int64_t ahead) mutable {
      const std::vector<Moved> moved = rows.moved(at, ahead, each), stirred = states.moved(at, ahead, each);
      a.each = moved.data();
      a.out = static_cast<float*>(scratch(Slot::partial, a.b * a.c * 4));
      kernels().conv(a);
      form.from_mixed(r, a.out, a.c, a.c);
      r.each = stirred.data();
      kernels().recurrence(r);
    });
  }

 private:
  ConvForm conv_;
  std::optional<RecurrenceForm> form_;
  std::vector<int> at_;
};

// What a selective scan reads: inputs x, steps, b, c, rates, skip from the `next` one on.
SelectiveArgs selective_args(const Arrays& inputs, size_t next, const mx::Shape& state, Dispatcher& d) {
  SelectiveArgs a{};
  mx::Strides s;
  const mx::array &x = inputs[next], &steps = inputs[next + 1], &b = inputs[next + 2], &c = inputs[next + 3];
  a.x = floats(d.last_contiguous(x, s)), a.xb = s[0], a.xl = s[1];
  a.steps = floats(d.last_contiguous(steps, s)), a.sb = s[0], a.sl = s[1];
  a.b = floats(d.last_contiguous(b, s)), a.bb = s[0], a.bl = s[1];
  a.c = floats(d.last_contiguous(c, s)), a.cb = s[0], a.cl = s[1];
  a.rates = floats(d.contiguous(inputs[next + 4]));
  a.skip = floats(d.contiguous(inputs[next + 5]));
  a.batch = x.shape(0), a.l = x.shape(1), a.channels = state[0], a.states = state[1];
  return a;
}

class Selective : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Selective"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  // inputs: state, x, steps, b, c, rates, skip; outputs: out, the new state
  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    const mx::Shape& state = inputs[0].shape();
    SelectiveArgs a = selective_args(inputs, 1, {state[1], state[2]}, d);
    a.from = floats(d.contiguous(inputs[0]));
    a.out = d.allocate(outputs[0]).data<float>();
    a.to = d.allocate(outputs[1]).data<float>();
    if (outputs[0].size()) d.run([a] { kernels().selective(a); });
  }
};

// One token of each sequence, in buffers [2, B, C, N] as those of Step. inputs: the buffers, x, ..; outputs: the
// buffers, in place, and the result.
class SelectiveStep : public CpuPrimitive {
 public:
  SelectiveStep(mx::Stream stream, std::vector<int> at) : CpuPrimitive(stream), at_(std::move(at)) {}
  const char* name() const override { return "runner::SelectiveStep"; }
  size_t written() const override { return at_.size(); }
  int64_t position() const override { return at_[0]; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return at_ == static_cast<const SelectiveStep&>(other).at_;
  }
  bool same_but_position(const mx::Primitive& other) const override {
    return same_steps(at_, static_cast<const SelectiveStep&>(other).at_);
  }
  bool same_but_places(const mx::Primitive& other) const override {
    return at_.size() == static_cast<const SelectiveStep&>(other).at_.size();
  }

  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    take_over(inputs, outputs, at_.size(), d);
    const mx::Shape& buffer = inputs[0].shape();
    SelectiveArgs a = selective_args(inputs, at_.size(), {buffer[2], buffer[3]}, d);
    if (at_.size() > 1) a.batch = a.l, a.l = 1, a.xb = a.xl, a.sb = a.sl, a.bb = a.bl, a.cb = a.cl;
    const int64_t each = buffer[1];
    const Slots states = Slots::of(outputs, 0, at_.size());
    a.out = d.allocate(outputs.back()).data<float>();
    d.run([a, states, each, at = at_](int64_t ahead) mutable {
      const std::vector<Moved> moved = states.moved(at, ahead, each);
      a.each = moved.data();
      kernels().selective(a);
    });
  }

 private:
  std::vector<int> at_;
};

class GatedNorm : public CpuPrimitive {
 public:
  GatedNorm(mx::Stream stream, float eps, int groups, bool gate_first)
      : CpuPrimitive(stream), eps_(eps), groups_(groups), gate_first_(gate_first) {}
  const char* name() const override { return "runner::GatedNorm"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const GatedNorm&>(other);
    return eps_ == o.eps_ && groups_ == o.groups_ && gate_first_ == o.gate_first_;
  }
  // inputs: x, gate [B, L, C], weight
  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    GatedNormArgs a{};
    const mx::array &gate = inputs[1], &weight = inputs[2];
    mx::Strides strides;
    a.x = floats(d.contiguous(inputs[0]));
    // Lines of the gate must lie equally far apart: those of several sequences, cut from wider lines, do as well.
    const bool even = gate.shape(0) == 1 || gate.strides(0) == gate.shape(1) * gate.strides(1);
    if (even) {
      a.gate = floats(d.last_contiguous(gate, strides));
      a.line = gate.shape(1) == 1 ? strides[0] : strides[1];
    } else {
      a.gate = floats(d.contiguous(gate));
      a.line = gate.shape(2);
    }
    a.wt = type_of(weight);
    a.weight = d.contiguous(weight);
    a.out = d.allocate(outputs[0]).data<float>();
    a.dim = gate.shape(2) / groups_;
    a.per = groups_;
    a.rows = a.dim ? static_cast<int64_t>(gate.size()) / a.dim : 0;
    a.eps = eps_;
    a.gate_first = gate_first_;
    a.weight_by_row = weight.shape(0) != a.dim;
    if (a.rows) d.run([a] { kernels().gated_norm(a); });
  }

 private:
  float eps_;
  int groups_;
  bool gate_first_;
};

class Gate : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Gate"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  // inputs: x, gate [B, H, L, D]
  void plan(const Arrays& inputs, Arrays& outputs, Dispatcher& d) override {
    GateArgs a{};
    mx::Strides strides;
    a.x = floats(d.contiguous(inputs[0]));
    a.gate = floats(d.last_contiguous(inputs[1], strides));
    a.gb = strides[0], a.gh = strides[1], a.gl = strides[2];
    auto& shape = inputs[1].shape();
    a.b = shape[0], a.h = shape[1], a.l = shape[2], a.d = shape[3];
    a.out = d.allocate(outputs[0]).data<float>();
    if (outputs[0].size()) d.run([a] { kernels().gate(a); });
  }
};

void need_float32(const char* op, const char* what, const mx::array& a) {
  if (a.dtype() != mx::float32) refuse(op, ": ", what, " is ", a.dtype(), "; expected float32");
}

void need_shape(const char* op, const char* what, const mx::array& a, const mx::Shape& shape) {
  if (a.shape() != shape) refuse(op, ": ", what, " has shape ", a.shape(), "; expected ", shape);
}

ConvForm conv_form(const char* op, const mx::array& x, const mx::array& weight, const MaybeArray& bias,
                   const std::optional<std::string>& activation) {
  need_float32(op, "x", x);
  need_dims(op, "x", x, 3);
  need_float(op, "weight", weight);
  need_dims(op, "weight", weight, 2);
  if (weight.shape(0) < 1 || weight.shape(1) != x.shape(2)) {
    refuse(op, ": weight has shape ", weight.shape(), "; expected [taps, ", x.shape(2), "]");
  }
  if (bias) need_vector(op, "bias", *bias, x.shape(2));
  if (activation && *activation != "silu") refuse(op, ": no activation '", *activation, "'; expected silu or none");
  return {bias.has_value(), activation.has_value(), Activation::silu};
}

// Adds the weight, and the bias if there is one.
void add_conv(Arrays& inputs, const mx::array& weight, const MaybeArray& bias) {
  inputs.push_back(weight);
  if (bias) inputs.push_back(*bias);
}

// Adds a, (b), a_log, dt_bias, (skip), checked for `batch` rows and a state [B, H, dv, dk].
void add_gates(const char* op, Arrays& inputs, int batch, const mx::Shape& state, const mx::array& a,
               const MaybeArray& b, const mx::array& a_log, const mx::array& dt_bias, const MaybeArray& skip) {
  const int heads = state[1], dk = state[3];
  need_float32(op, "a", a);
  const bool channels = a.ndim() == 4 && b;
  if (!channels) need_dims(op, "a", a, 3);
  const int length = a.shape(1);
  need_shape(op, "a", a, channels ? mx::Shape{batch, length, heads, dk} : mx::Shape{batch, length, heads});
  inputs.push_back(a);
  if (b) {
    need_float32(op, "b", *b);
    need_shape(op, "b", *b, {batch, length, heads});
    inputs.push_back(*b);
  }
  need_vector(op, "a_log", a_log, heads);
  need_float(op, "dt_bias", dt_bias);
  need_shape(op, "dt_bias", dt_bias, channels ? mx::Shape{heads, dk} : mx::Shape{heads});
  inputs.insert(inputs.end(), {a_log, dt_bias});
  if (skip) {
    need_vector(op, "d", *skip, heads);
    inputs.push_back(*skip);
  }
}

// Buffers [2, B, ..] in which a token moves states of a `shape`: one for B rows x [B, 1, C], or one for each token of
// x [1, N, C], with the number of the token in `at`.
void need_slots(const char* op, const char* what, const Arrays& slots, const std::vector<int>& at, const mx::array& x,
                const mx::Shape& shape) {
  const int tokens = static_cast<int>(at.size());
  if (at.empty() || slots.size() != at.size() || x.shape(1) != tokens || (tokens > 1 && x.shape(0) != 1)) {
    refuse(op, ": ", slots.size(), " buffers of ", what, " and ", tokens, " positions for x ", x.shape(),
           "; expected [B, 1, C] and one, or [1, N, C] and N");
  }
  mx::Shape buffer{2, x.shape(0)};
  buffer.insert(buffer.end(), shape.begin(), shape.end());
  for (const mx::array& slot : slots) {
    need_float32(op, what, slot);
    need_shape(op, what, slot, buffer);
  }
}

// The first `written` inputs again, moved in place, and what is put out.
Arrays stepped(std::shared_ptr<mx::Primitive> primitive, const Arrays& inputs, size_t written, const mx::Shape& out) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i < written; ++i) shapes.push_back(inputs[i].shape());
  shapes.push_back(out);
  return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32), primitive, inputs);
}

void need_state(const char* op, const mx::array& state, int groups) {
  need_float32(op, "state", state);
  need_dims(op, "state", state, 4);
  if (groups < 1 || state.shape(1) % groups) {
    refuse(op, ": state has ", state.shape(1), " heads; expected a multiple of ", groups);
  }
}

std::pair<mx::array, mx::array> recurrence(const char* op, RecurrenceForm form, Arrays inputs, int length) {
  const mx::Shape& state = inputs[0].shape();
  if (length < 1) refuse(op, ": no tokens");
  auto primitive = std::make_shared<Recurrence>(cpu_stream(), form);
  auto out = mx::array::make_arrays({{state[0], length, state[1], state[2]}, state}, {mx::float32, mx::float32},
                                    primitive, inputs);
  return {out[0], out[1]};
}

}  // namespace

mx::array short_conv_op(const mx::array& x, const mx::array& rows, const mx::array& weight, const MaybeArray& bias,
                        const std::optional<std::string>& activation) {
  const char* op = "short_conv";
  auto form = conv_form(op, x, weight, bias, activation);
  need_float32(op, "rows", rows);
  need_shape(op, "rows", rows, {x.shape(0), weight.shape(0) - 1, x.shape(2)});
  Arrays inputs{x, rows};
  add_conv(inputs, weight, bias);
  return mx::array(x.shape(), mx::float32, std::make_shared<Conv>(cpu_stream(), form), std::move(inputs));
}

std::pair<mx::array, mx::array> gated_delta_op(const mx::array& q, const mx::array& k, const mx::array& v,
                                               const mx::array& a, const mx::array& b, const mx::array& a_log,
                                               const mx::array& dt_bias, const mx::array& state) {
  const char* op = "gated_delta";
  need_dims(op, "q", q, 4);
  const int groups = q.shape(2), length = q.shape(1);
  need_state(op, state, groups);
  const mx::Shape keys{state.shape(0), length, groups, state.shape(3)};
  for (auto& [what, x] : {std::pair{"q", q}, std::pair{"k", k}}) {
    need_float32(op, what, x);
    need_shape(op, what, x, keys);
  }
  need_float32(op, "v", v);
  need_shape(op, "v", v, {state.shape(0), length, state.shape(1), state.shape(2)});
  Arrays inputs{state};
  add_gates(op, inputs, state.shape(0), state.shape(), a, b, a_log, dt_bias, std::nullopt);
  if (a.shape(1) != length) refuse(op, ": a has ", a.shape(1), " tokens, q has ", length);
  inputs.insert(inputs.end(), {q, k, v});
  return recurrence(op, {true, groups, 0.0f, 0.0f}, std::move(inputs), length);
}

std::pair<mx::array, mx::array> state_space_op(const mx::array& mixed, const mx::array& dt, const mx::array& a_log,
                                               const mx::array& skip, const mx::array& dt_bias,
                                               const mx::array& state, int groups, float least, float most) {
  const char* op = "state_space";
  need_state(op, state, groups);
  need_float32(op, "mixed", mixed);
  need_dims(op, "mixed", mixed, 3);
  const int length = mixed.shape(1), width = state.shape(1) * state.shape(2) + 2 * groups * state.shape(3);
  need_shape(op, "mixed", mixed, {state.shape(0), length, width});
  Arrays inputs{state};
  add_gates(op, inputs, state.shape(0), state.shape(), dt, std::nullopt, a_log, dt_bias, skip);
  if (dt.shape(1) != length) refuse(op, ": dt has ", dt.shape(1), " tokens, mixed has ", length);
  inputs.push_back(mixed);
  return recurrence(op, {false, groups, least, most}, std::move(inputs), length);
}

std::vector<mx::array> conv_step_op(const Arrays& rows, const std::vector<int>& at, const mx::array& x,
                                    const mx::array& weight, const MaybeArray& bias,
                                    const std::optional<std::string>& activation) {
  const char* op = "conv_step";
  auto form = conv_form(op, x, weight, bias, activation);
  need_slots(op, "rows", rows, at, x, {weight.shape(0) - 1, x.shape(2)});
  Arrays inputs = rows;
  inputs.push_back(x);
  add_conv(inputs, weight, bias);
  return stepped(std::make_shared<Step>(cpu_stream(), form, std::nullopt, at), inputs, rows.size(), x.shape());
}

std::vector<mx::array> recurrent_step_op(const Arrays& rows, const Arrays& states, const std::vector<int>& at,
                                         const mx::array& mixed, const mx::array& weight, const MaybeArray& bias,
                                         const std::optional<std::string>& activation, const mx::array& a,
                                         const MaybeArray& b, const mx::array& a_log, const mx::array& dt_bias,
                                         const MaybeArray& skip, int groups, float least, float most) {
  const char* op = "recurrent_step";
  auto form = conv_form(op, mixed, weight, bias, activation);
  need_slots(op, "rows", rows, at, mixed, {weight.shape(0) - 1, mixed.shape(2)});
  if (b.has_value() == skip.has_value()) refuse(op, ": expected either b or d");
  if (states.empty()) refuse(op, ": no states");
  need_dims(op, "states", states[0], 5);
  const mx::Shape state(states[0].shape().begin() + 2, states[0].shape().end());
  need_slots(op, "states", states, at, mixed, state);
  if (groups < 1 || state[0] % groups) {
    refuse(op, ": states have shape ", states[0].shape(), "; expected a multiple of ", groups, " heads");
  }
  const int batch = mixed.shape(0), length = mixed.shape(1);
  need_shape(op, "mixed", mixed, {batch, length, state[0] * state[1] + 2 * groups * state[2]});
  Arrays inputs = rows;
  inputs.insert(inputs.end(), states.begin(), states.end());
  inputs.push_back(mixed);
  add_conv(inputs, weight, bias);
  add_gates(op, inputs, batch, {batch, state[0], state[1], state[2]}, a, b, a_log, dt_bias, skip);
  if (a.shape(1) != length) refuse(op, ": a has ", a.shape(1), " tokens; expected ", length);
  RecurrenceForm recurrence{b.has_value(), groups, least, most};
  auto primitive = std::make_shared<Step>(cpu_stream(), form, recurrence, at);
  return stepped(std::move(primitive), inputs, 2 * rows.size(), {batch, length, state[0], state[1]});
}

namespace {

// Adds x, steps, b, c, rates, skip, checked for states [C, N].
void add_selective(const char* op, Arrays& inputs, const mx::array& x, const mx::array& steps, const mx::array& b,
                   const mx::array& c, const mx::array& rates, const mx::array& skip, const mx::Shape& state) {
  need_dims(op, "x", x, 3);
  if (x.shape(1) < 1) refuse(op, ": no tokens");
  const mx::Shape line{x.shape(0), x.shape(1), state[0]}, keys{x.shape(0), x.shape(1), state[1]};
  auto add = [&](const char* what, const mx::array& array, const mx::Shape& shape) {
    need_float32(op, what, array);
    need_shape(op, what, array, shape);
    inputs.push_back(array);
  };
  add("x", x, line), add("steps", steps, line), add("b", b, keys), add("c", c, keys);
  add("rates", rates, state), add("skip", skip, {state[0]});
}

}  // namespace

std::pair<mx::array, mx::array> selective_scan_op(const mx::array& x, const mx::array& steps, const mx::array& b,
                                                  const mx::array& c, const mx::array& rates, const mx::array& skip,
                                                  const mx::array& state) {
  const char* op = "selective_scan";
  need_float32(op, "state", state);
  need_dims(op, "state", state, 3);
  need_dims(op, "x", x, 3);
  if (state.shape(0) != x.shape(0)) refuse(op, ": state has shape ", state.shape(), " for ", x.shape(0), " rows");
  Arrays inputs{state};
  add_selective(op, inputs, x, steps, b, c, rates, skip, {state.shape(1), state.shape(2)});
  auto out = mx::array::make_arrays({x.shape(), state.shape()}, {mx::float32, mx::float32},
                                    std::make_shared<Selective>(cpu_stream()), inputs);
  return {out[0], out[1]};
}

std::vector<mx::array> selective_step_op(const Arrays& states, const std::vector<int>& at, const mx::array& x,
                                         const mx::array& steps, const mx::array& b, const mx::array& c,
                                         const mx::array& rates, const mx::array& skip) {
  const char* op = "selective_step";
  need_dims(op, "rates", rates, 2);
  need_dims(op, "x", x, 3);
  need_slots(op, "states", states, at, x, rates.shape());
  Arrays inputs = states;
  add_selective(op, inputs, x, steps, b, c, rates, skip, rates.shape());
  return stepped(std::make_shared<SelectiveStep>(cpu_stream(), at), inputs, states.size(), x.shape());
}

mx::array gated_norm_op(const mx::array& x, const mx::array& gate, const mx::array& weight, float eps, int groups,
                        bool gate_first) {
  const char* op = "gated_norm";
  need_float32(op, "x", x);
  need_float32(op, "gate", gate);
  need_dims(op, "gate", gate, 3);
  need_shape(op, "x", x, gate.shape());
  if (groups < 1 || gate.shape(2) % groups) {
    refuse(op, ": x has shape ", x.shape(), "; its last dimension is no multiple of ", groups);
  }
  const int dim = gate.shape(2) / groups;
  need_vector(op, "weight", weight, weight.ndim() == 1 && weight.shape(0) == dim ? dim : gate.shape(2));
  auto primitive = std::make_shared<GatedNorm>(cpu_stream(), eps, groups, gate_first);
  return mx::array(x.shape(), mx::float32, std::move(primitive), {x, gate, weight});
}

mx::array gate_op(const mx::array& x, const mx::array& gate) {
  const char* op = "gate";
  need_float32(op, "x", x);
  need_float32(op, "gate", gate);
  need_dims(op, "gate", gate, 4);
  need_shape(op, "x", x, gate.shape());
  return mx::array(x.shape(), mx::float32, std::make_shared<Gate>(cpu_stream()), {x, gate});
}

}  // namespace runner
