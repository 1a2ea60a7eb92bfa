// Attention over a cache, and the rows that are appended to it.
#include "checks.h"
#include "kernels.h"
#include "mlx/ops.h"
#include "primitive_base.h"
#include "primitives.h"

namespace runner {
namespace {

// ---- attention

class Attention : public CpuPrimitive {
 public:
  Attention(mx::Stream stream, float scale, bool causal, int64_t window, int mask_kind, bool sinks, int64_t length)
      : CpuPrimitive(stream),
        scale_(scale),
        causal_(causal),
        window_(window),
        mask_kind_(mask_kind),
        sinks_(sinks),
        length_(length) {}
  const char* name() const override { return "runner::Attention"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return same_but_position(other) && length_ == static_cast<const Attention&>(other).length_;
  }
  int64_t position() const override { return length_; }
  bool same_but_position(const mx::Primitive& other) const override {
    auto& o = static_cast<const Attention&>(other);
    return scale_ == o.scale_ && causal_ == o.causal_ && window_ == o.window_ && mask_kind_ == o.mask_kind_ &&
           sinks_ == o.sinks_;
  }

  // inputs: q, k, v, (mask [B, H, L, S]), (sinks [H])
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    AttentionArgs a{};
    a.qt = type_of(inputs[0]);
    a.kt = type_of(inputs[1]);
    auto& shape = inputs[0].shape();
    a.b = shape[0], a.h = shape[1], a.l = shape[2], a.d = shape[3];
    a.kv = inputs[1].shape(1), a.s = length_, a.dv = outputs[0].shape(3);
    a.out = d.allocate(outputs[0]).data<void>();
    mx::Strides sq, sk, sv;
    a.q = d.last_contiguous(inputs[0], sq);
    a.k = d.last_contiguous(inputs[1], sk);
    a.v = d.last_contiguous(inputs[2], sv);
    a.qb = sq[0], a.qh = sq[1], a.ql = sq[2];
    a.kb = sk[0], a.kh = sk[1], a.ks = sk[2];
    a.vb = sv[0], a.vh = sv[1], a.vs = sv[2];
    a.header = inputs[1].shape(2) - 1;
    a.scale = scale_;
    a.causal = causal_;
    a.window = window_;
    a.mask_kind = mask_kind_;
    size_t next = 3;
    if (mask_kind_) {
      const mx::array& mask = inputs[next++];
      a.mask = mask.data<void>();
      if (mask_kind_ == 2) a.mt = type_of(mask);
      a.mb = mask.strides(0), a.mh = mask.strides(1), a.ml = mask.strides(2), a.ms = mask.strides(3);
    }
    if (sinks_) {
      a.sinkt = type_of(inputs[next]);
      a.sinks = d.contiguous(inputs[next]);
    }
    if (outputs[0].size() == 0) return;
    d.run([a](int64_t ahead) {
      AttentionArgs here = a;
      here.s += ahead;
      kernels().attention(here);
    });
  }

 private:
  float scale_;
  bool causal_;
  int64_t window_;
  int mask_kind_;
  bool sinks_;
  int64_t length_;
};

// ---- rows into a cache

class Empty : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Empty"; }
  void plan(const std::vector<mx::array>&, std::vector<mx::array>& outputs, Dispatcher& d) override {
    d.allocate(outputs[0]);
  }
};

class Append : public CpuPrimitive {
 public:
  Append(mx::Stream stream, int64_t at) : CpuPrimitive(stream), at_(at) {}
  const char* name() const override { return "runner::Append"; }
  size_t written() const override { return 2; }
  int64_t position() const override { return at_; }
  bool same_but_position(const mx::Primitive&) const override { return true; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return at_ == static_cast<const Append&>(other).at_;
  }

  // inputs: keys, values, k, v; outputs: the buffers again
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    for (int i = 0; i < 2; ++i) {
      const mx::array &buffer = inputs[i], &x = inputs[2 + i];
      // MLX would copy the buffer while an earlier step's attention is still queued to read it. That one reads rows
      // before `at_` only, and the queue keeps the order, so writing in place is safe.
      if (buffer.flags().row_contiguous) {
        outputs[i].copy_shared_buffer(buffer);
      } else {
        d.copy(buffer, outputs[i]);
      }
      AppendArgs a{};
      mx::Strides strides;
      a.x = d.last_contiguous(x, strides);
      a.to = outputs[i].data<void>();
      a.xt = type_of(x);
      a.type = type_of(buffer);
      a.b = x.shape(0), a.h = x.shape(1), a.l = x.shape(2), a.d = x.shape(3);
      a.sb = strides[0], a.sh = strides[1], a.sl = strides[2];
      a.at = at_, a.capacity = buffer.shape(2);
      a.paired = i == 0;
      if (x.size() == 0) continue;
      d.run([a](int64_t ahead) {
        AppendArgs here = a;
        here.at += ahead;
        kernels().append(here);
      });
    }
  }

 private:
  int64_t at_;
};

}  // namespace

mx::array attention_op(const mx::array& q, const mx::array& k, const mx::array& v,
                       const std::variant<std::monostate, std::string, mx::array>& mask, float scale,
                       const std::optional<int>& window, const MaybeArray& sinks, const std::optional<int>& length) {
  const char* op = "attention";
  need_dims(op, "q", q, 4);
  need_float(op, "q", q);
  need_dims(op, "k", k, 4);
  if (k.dtype() != mx::int16) need_float(op, "k", k);
  need_dims(op, "v", v, 4);
  // Rows of codes end with a scale, and the last of them is a header.
  int scale_columns = k.dtype() == mx::int16 ? 2 : 0, rows = k.shape(2) - (k.dtype() == mx::int16 ? 1 : 0);
  int heads = q.shape(1), kv = k.shape(1), keys = length.value_or(rows);
  if (keys < 0 || keys > rows) {
    refuse(op, ": length is ", keys, "; expected at most the keys of k ", k.dtype(), k.shape(), ", ", rows);
  }
  bool same = k.dtype() == v.dtype() && k.shape(0) == v.shape(0) && kv == v.shape(1) && k.shape(2) == v.shape(2);
  if (!same) {
    refuse(op, ": k is ", k.dtype(), k.shape(), ", v ", v.dtype(), v.shape(),
           "; expected one type, and shapes that differ in the last dimension only");
  }
  if (q.shape(0) != k.shape(0) || q.shape(3) != k.shape(3) - scale_columns || kv == 0 || heads % kv) {
    refuse(op, ": q has shape ", q.shape(), ", k ", k.shape(),
           "; expected equal batch and head size, and query heads a multiple of key heads");
  }
  if (window && *window < 1) refuse(op, ": window is ", *window, "; expected a positive number of keys");
  auto stream = cpu_stream();
  std::vector<mx::array> inputs{q, k, v};
  int kind = 0;
  bool causal = window.has_value();
  if (auto* word = std::get_if<std::string>(&mask)) {
    if (*word != "causal") refuse(op, ": mask is '", *word, "'; expected None, 'causal' or an array");
    causal = true;
  } else if (auto* array = std::get_if<mx::array>(&mask)) {
    kind = array->dtype() == mx::bool_ ? 1 : 2;
    if (kind == 2) need_float(op, "mask", *array);
    inputs.push_back(mx::broadcast_to(*array, {q.shape(0), heads, q.shape(2), keys}, stream));
  }
  if (sinks) {
    need_vector(op, "sinks", *sinks, heads);
    inputs.push_back(*sinks);
  }
  auto primitive =
      std::make_shared<Attention>(stream, scale, causal, window.value_or(0), kind, sinks.has_value(), keys);
  return mx::array(with_last(q, v.shape(3) - scale_columns), q.dtype(), std::move(primitive), std::move(inputs));
}

mx::array empty_op(const std::vector<int>& shape, mx::Dtype dtype) {
  for (int size : shape) {
    if (size < 0) refuse("empty", ": shape is ", mx::Shape(shape.begin(), shape.end()), "; expected no negative size");
  }
  return mx::array(mx::Shape(shape.begin(), shape.end()), dtype, std::make_shared<Empty>(cpu_stream()), {});
}

std::pair<mx::array, mx::array> append_op(const mx::array& keys, const mx::array& values, const mx::array& k,
                                          const mx::array& v, int at) {
  const char* op = "append";
  for (auto& [buffer, x] : {std::pair{keys, k}, std::pair{values, v}}) {
    need_dims(op, "a buffer", buffer, 4);
    need_dims(op, "k or v", x, 4);
    need_float(op, "k or v", x);
    int columns = buffer.dtype() == mx::int16 ? 2 : 0, rows = buffer.shape(2) - (buffer.dtype() == mx::int16 ? 1 : 0);
    if (columns == 0) need_float(op, "a buffer", buffer);
    bool fits = buffer.shape(0) == x.shape(0) && buffer.shape(1) == x.shape(1) && at >= 0 &&
                x.shape(2) <= rows - at && buffer.shape(3) == x.shape(3) + columns;
    if (!fits) {
      refuse(op, ": rows of shape ", x.shape(), " at ", at, " do not fit ", buffer.dtype(), buffer.shape(),
             "; expected equal batch, heads and width (int16: two more columns and one more row), and room");
    }
  }
  auto primitive = std::make_shared<Append>(cpu_stream(), at);
  auto out = mx::array::make_arrays({keys.shape(), values.shape()}, {keys.dtype(), values.dtype()}, primitive,
                                    {keys, values, k, v});
  return {out[0], out[1]};
}

}  // namespace runner
