// Attention over a cache, and the rows that are appended to it.
#include <algorithm>

#include "checks.h"
#include "kernels.h"
#include "mlx/ops.h"
#include "primitive_base.h"
#include "primitives.h"

namespace runner {
namespace {

// ---- attention

struct Settings {
  float scale, softcap;
  bool causal, sinks;
  int64_t window, chunk, start;
  int mask_kind;
  bool operator==(const Settings&) const = default;
  bool same_but_start(Settings other) const {
    other.start = start;
    return *this == other;
  }
};

// All of a call's arguments but its mask and sinks.
AttentionArgs attention_args(const mx::array& q, const mx::array& k, const mx::array& v, mx::array& out,
                             const Settings& is, int64_t length, Dispatcher& d) {
  AttentionArgs a{};
  a.qt = type_of(q);
  a.kt = type_of(k);
  a.b = q.shape(0), a.h = q.shape(1), a.l = q.shape(2), a.d = q.shape(3);
  a.kv = k.shape(1), a.s = length, a.dv = out.shape(3);
  a.out = out.data<void>();
  mx::Strides sq, sk, sv;
  a.q = d.last_contiguous(q, sq);
  a.k = d.last_contiguous(k, sk);
  a.v = d.last_contiguous(v, sv);
  a.qb = sq[0], a.qh = sq[1], a.ql = sq[2];
  a.kb = sk[0], a.kh = sk[1], a.ks = sk[2];
  a.vb = sv[0], a.vh = sv[1], a.vs = sv[2];
  a.ob = out.strides(0), a.oh = out.strides(1), a.ol = out.strides(2);
  a.header = k.shape(2) - 1;
  a.start = is.start;
  a.scale = is.scale, a.softcap = is.softcap;
  a.causal = is.causal;
  a.window = is.window, a.chunk = is.chunk;
  a.mask_kind = is.mask_kind;
  return a;
}

class Attention : public CpuPrimitive {
 public:
  Attention(mx::Stream stream, const Settings& settings, int64_t length)
      : CpuPrimitive(stream), is_(settings), length_(length) {}
  const char* name() const override { return "runner::Attention"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return same_but_position(other) && length_ == static_cast<const Attention&>(other).length_;
  }
  int64_t position() const override { return length_; }
  bool same_but_position(const mx::Primitive& other) const override {
    return is_ == static_cast<const Attention&>(other).is_;
  }
  bool same_but_places(const mx::Primitive& other) const override {
    return is_.same_but_start(static_cast<const Attention&>(other).is_);
  }

  // inputs: q, k, v, (mask [B, H, L, S]), (sinks [H])
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    mx::array& out = d.allocate_by_position(outputs[0]);
    AttentionArgs a = attention_args(inputs[0], inputs[1], inputs[2], out, is_, length_, d);
    size_t next = 3;
    if (is_.mask_kind) {
      const mx::array& mask = inputs[next++];
      a.mask = mask.data<void>();
      if (is_.mask_kind == 2) a.mt = type_of(mask);
      a.mb = mask.strides(0), a.mh = mask.strides(1), a.ml = mask.strides(2), a.ms = mask.strides(3);
    }
    if (is_.sinks) {
      a.sinkt = type_of(inputs[next]);
      a.sinks = d.contiguous(inputs[next]);
    }
    if (outputs[0].size() == 0) return;
    d.run([a](int64_t ahead) {
      AttentionArgs here = a;
      here.s += ahead;
      kernels().attention(&here, 1);
    });
  }

 private:
  Settings is_;
  int64_t length_;
};

// The last positions of several sequences: segment i of the queries [1, H, T, D], whose keys and values are a pair of
// inputs, of which it sees the first `length`.
struct Segment {
  int64_t count, length;
  Settings is;
};

class AttentionRows : public CpuPrimitive {
 public:
  AttentionRows(mx::Stream stream, std::vector<Segment> segments) : CpuPrimitive(stream), segments_(std::move(segments)) {}
  const char* name() const override { return "runner::AttentionRows"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return same_but_position(other) && position() == static_cast<const AttentionRows&>(other).position();
  }
  int64_t position() const override { return segments_[0].length; }
  bool same_but_position(const mx::Primitive& other) const override {
    auto& o = static_cast<const AttentionRows&>(other);
    if (segments_.size() != o.segments_.size()) return false;
    for (size_t i = 0; i < segments_.size(); ++i) {
      const Segment &mine = segments_[i], &its = o.segments_[i];
      if (mine.count != its.count || mine.length - position() != its.length - o.position() || !(mine.is == its.is)) {
        return false;
      }
    }
    return true;
  }
  bool same_but_places(const mx::Primitive& other) const override {
    auto& o = static_cast<const AttentionRows&>(other);
    return std::equal(segments_.begin(), segments_.end(), o.segments_.begin(), o.segments_.end(),
                      [](auto& mine, auto& its) { return mine.count == its.count && mine.is.same_but_start(its.is); });
  }

  // inputs: q, (sinks [H]), keys and values of each segment
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    mx::array& out = d.allocate_by_position(outputs[0]);
    std::vector<AttentionArgs> list;
    const void* sinks = segments_[0].is.sinks ? d.contiguous(inputs[1]) : nullptr;
    int64_t first = 0;
    size_t next = sinks ? 2 : 1;
    for (const Segment& segment : segments_) {
      const mx::array &k = inputs[next], &v = inputs[next + 1];
      AttentionArgs a = attention_args(inputs[0], k, v, out, segment.is, segment.length, d);
      a.l = segment.count;
      a.q = static_cast<const char*>(a.q) + first * a.ql * size_of(a.qt);
      a.out = static_cast<char*>(a.out) + first * a.ol * size_of(a.qt);
      if (sinks) a.sinks = sinks, a.sinkt = type_of(inputs[1]);
      list.push_back(a);
      first += segment.count;
      next += 2;
    }
    if (out.size() == 0) return;
    d.run([list](int64_t ahead) {
      std::vector<AttentionArgs> here = list;
      for (AttentionArgs& a : here) a.s += ahead;
      kernels().attention(here.data(), static_cast<int>(here.size()));
    });
  }

 private:
  std::vector<Segment> segments_;
};

// ---- rows into a cache

class Empty : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "runner::Empty"; }
  // inputs: none, or the powers int16 [KV, D] for the last row of a buffer [B, KV, rows, D + 2]
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    mx::array& out = d.allocate(outputs[0]);
    if (inputs.empty() || out.size() == 0) return;
    auto powers = static_cast<const int16_t*>(d.contiguous(inputs[0]));
    auto to = out.data<int16_t>();
    const int64_t heads = out.shape(0) * out.shape(1), kv = out.shape(1), width = out.shape(3), rows = out.shape(2);
    d.run([=] {
      for (int64_t i = 0; i < heads; ++i) {
        int16_t* header = to + ((i + 1) * rows - 1) * width;
        std::memcpy(header, powers + i % kv * (width - 2), (width - 2) * 2);
        std::memset(header + width - 2, 0, 4);
      }
    });
  }
};

// Segments of keys and values into several pairs of buffers, the i-th from row at[i] on.
class Append : public CpuPrimitive {
 public:
  Append(mx::Stream stream, std::vector<int> at, std::vector<int> counts)
      : CpuPrimitive(stream), at_(std::move(at)), counts_(std::move(counts)) {}
  const char* name() const override { return "runner::Append"; }
  size_t written() const override { return 2 * at_.size(); }
  int64_t position() const override { return at_[0]; }
  bool same_but_position(const mx::Primitive& other) const override {
    auto& o = static_cast<const Append&>(other);
    return counts_ == o.counts_ && same_steps(at_, o.at_);
  }
  bool same_but_places(const mx::Primitive& other) const override {
    return counts_ == static_cast<const Append&>(other).counts_;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const Append&>(other);
    return counts_ == o.counts_ && at_ == o.at_;
  }

  // inputs: keys and values of each sequence, k, v; outputs: the buffers again
  void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) override {
    std::vector<AppendArgs> list;
    for (size_t i = 0; i < 2; ++i) {
      const mx::array& x = inputs[2 * at_.size() + i];
      mx::Strides strides;
      const void* from = d.last_contiguous(x, strides);
      int64_t first = 0;
      for (size_t j = 0; j < at_.size(); ++j) {
        const mx::array& buffer = inputs[2 * j + i];
        mx::array& out = outputs[2 * j + i];
        // MLX would copy the buffer while an earlier step's attention is still queued to read it. That one reads rows
        // before `at` only, and the queue keeps the order, so writing in place is safe.
        if (buffer.flags().row_contiguous) {
          out.copy_shared_buffer(buffer);
        } else {
          d.copy(buffer, out);
        }
        AppendArgs a{};
        a.xt = type_of(x);
        a.type = type_of(buffer);
        a.x = static_cast<const char*>(from) + first * strides[2] * size_of(a.xt);
        a.to = out.data<void>();
        a.b = x.shape(0), a.h = x.shape(1), a.l = counts_[j], a.d = x.shape(3);
        a.sb = strides[0], a.sh = strides[1], a.sl = strides[2];
        a.at = at_[j], a.capacity = buffer.shape(2);
        first += counts_[j];
        if (x.size()) list.push_back(a);
      }
    }
    d.run([list](int64_t ahead) { kernels().append(list.data(), static_cast<int>(list.size()), ahead); });
  }

 private:
  std::vector<int> at_, counts_;
};

// Keys and values of a type and shape that queries [B, H, L, D] can attend to. Returns how many tokens' rows there are.
int check_keys(const char* op, const mx::array& q, const mx::array& k, const mx::array& v) {
  need_dims(op, "k", k, 4);
  if (k.dtype() != mx::int16) need_float(op, "k", k);
  need_dims(op, "v", v, 4);
  // Rows of codes end with a scale, and the last of them is a header.
  const int codes = k.dtype() == mx::int16, heads = q.shape(1), kv = k.shape(1);
  bool same = k.dtype() == v.dtype() && k.shape(0) == v.shape(0) && kv == v.shape(1) && k.shape(2) == v.shape(2);
  if (!same) {
    refuse(op, ": k is ", k.dtype(), k.shape(), ", v ", v.dtype(), v.shape(),
           "; expected one type, and shapes that differ in the last dimension only");
  }
  if (q.shape(0) != k.shape(0) || q.shape(3) != k.shape(3) - 2 * codes || kv == 0 || heads % kv) {
    refuse(op, ": q has shape ", q.shape(), ", k ", k.shape(),
           "; expected equal batch and head size, and query heads a multiple of key heads");
  }
  return k.shape(2) - codes;
}

int width_of(const mx::array& v) { return v.shape(3) - (v.dtype() == mx::int16 ? 2 : 0); }

float checked_cap(const char* op, const std::optional<float>& softcap) {
  if (softcap && !(*softcap > 0)) refuse(op, ": softcap is ", *softcap, "; expected a positive number");
  return softcap.value_or(0.0f);
}

void check_counts(const char* op, const mx::array& x, const std::vector<int>& counts, size_t sequences) {
  int sum = 0;
  bool fits = counts.size() == sequences && sequences > 0;
  for (int count : counts) fits &= count > 0 && count <= x.shape(2) - sum, sum += fits ? count : 0;
  if (!fits || sum != x.shape(2)) {
    refuse(op, ": ", counts.size(), " segments do not divide ", x.shape(2), " tokens among ", sequences, " sequences");
  }
}

}  // namespace

mx::array attention_op(const mx::array& q, const mx::array& k, const mx::array& v,
                       const std::variant<std::monostate, std::string, mx::array>& mask, float scale,
                       const std::optional<int>& window, const MaybeArray& sinks, const std::optional<int>& length,
                       const std::optional<float>& softcap, int start) {
  const char* op = "attention";
  need_dims(op, "q", q, 4);
  need_float(op, "q", q);
  int rows = check_keys(op, q, k, v), heads = q.shape(1), keys = length.value_or(rows);
  if (keys < 0 || keys > rows) {
    refuse(op, ": length is ", keys, "; expected at most the keys of k ", k.dtype(), k.shape(), ", ", rows);
  }
  const float cap = checked_cap(op, softcap);
  if (start < 0) refuse(op, ": start is ", start, "; expected the position of the first key");
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
  Settings settings{scale, cap, causal, sinks.has_value(), window.value_or(0), 0, start, kind};
  auto primitive = std::make_shared<Attention>(stream, settings, keys);
  return mx::array(with_last(q, width_of(v)), q.dtype(), std::move(primitive), std::move(inputs));
}

mx::array attention_rows_op(const mx::array& q, const std::vector<KeysAndValues>& histories,
                            const std::vector<int>& counts, float scale, const MaybeArray& sinks,
                            const std::optional<float>& softcap) {
  const char* op = "attention_rows";
  need_dims(op, "q", q, 4);
  need_float(op, "q", q);
  check_counts(op, q, counts, histories.size());
  const float cap = checked_cap(op, softcap);
  std::vector<mx::array> inputs{q};
  if (sinks) {
    need_vector(op, "sinks", *sinks, q.shape(1));
    inputs.push_back(*sinks);
  }
  std::vector<Segment> segments;
  for (size_t i = 0; i < histories.size(); ++i) {
    const auto& [k, v, length, window, chunk, start] = histories[i];
    int rows = check_keys(op, q, k, v);
    if (q.shape(0) != 1 || length > rows || counts[i] > length || start < 0 || window < 0 || chunk < 0 ||
        width_of(v) != width_of(std::get<1>(histories[0]))) {
      refuse(op, ": ", counts[i], " queries at the end of a history of ", length, " tokens in ", rows, " rows, q ",
             q.shape(), ", v ", v.shape(), "; expected at most as many, a batch of 1 and values of one size");
    }
    segments.push_back({counts[i], length, Settings{scale, cap, true, sinks.has_value(), window, chunk, start, 0}});
    inputs.push_back(k);
    inputs.push_back(v);
  }
  mx::Shape shape = with_last(q, width_of(std::get<1>(histories[0])));
  auto primitive = std::make_shared<AttentionRows>(cpu_stream(), std::move(segments));
  return mx::array(shape, q.dtype(), std::move(primitive), std::move(inputs));
}

mx::array empty_op(const std::vector<int>& shape, mx::Dtype dtype, const MaybeArray& powers) {
  for (int size : shape) {
    if (size < 0) refuse("empty", ": shape is ", mx::Shape(shape.begin(), shape.end()), "; expected no negative size");
  }
  std::vector<mx::array> inputs;
  if (powers) {
    bool fits = dtype == mx::int16 && powers->dtype() == mx::int16 && shape.size() == 4 && powers->ndim() == 2 &&
                powers->shape(0) == shape[1] && powers->shape(1) + 2 == shape[3] && shape[2] > 0;
    if (!fits) {
      refuse("empty", ": powers are ", powers->dtype(), powers->shape(), " for ", dtype,
             mx::Shape(shape.begin(), shape.end()), "; expected int16 [KV, D] for int16 [B, KV, rows, D + 2]");
    }
    inputs.push_back(*powers);
  }
  return mx::array(mx::Shape(shape.begin(), shape.end()), dtype, std::make_shared<Empty>(cpu_stream()), inputs);
}

std::vector<mx::array> append_op(const std::vector<std::pair<mx::array, mx::array>>& buffers, const mx::array& k,
                                 const mx::array& v, const std::vector<int>& at, const std::vector<int>& counts) {
  const char* op = "append";
  for (const mx::array& x : {k, v}) {
    need_dims(op, "k or v", x, 4);
    need_float(op, "k or v", x);
    check_counts(op, x, counts, buffers.size());
  }
  if (at.size() != buffers.size()) {
    refuse(op, ": ", at.size(), " rows to write at, for ", buffers.size(), " sequences");
  }
  std::vector<mx::array> inputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  for (size_t i = 0; i < buffers.size(); ++i) {
    for (auto& [buffer, x] : {std::pair{buffers[i].first, k}, std::pair{buffers[i].second, v}}) {
      need_dims(op, "a buffer", buffer, 4);
      const int codes = buffer.dtype() == mx::int16;
      if (!codes) need_float(op, "a buffer", buffer);
      bool fits = buffer.shape(0) == x.shape(0) && buffer.shape(1) == x.shape(1) && at[i] >= 0 &&
                  counts[i] <= buffer.shape(2) - codes - at[i] && buffer.shape(3) == x.shape(3) + 2 * codes;
      if (!fits) {
        refuse(op, ": ", counts[i], " rows of ", x.shape(), " at ", at[i], " do not fit ", buffer.dtype(), buffer.shape(),
               "; expected equal batch, heads and width (int16: two more columns and one more row), and room");
      }
      inputs.push_back(buffer);
      shapes.push_back(buffer.shape());
      types.push_back(buffer.dtype());
    }
  }
  inputs.push_back(k);
  inputs.push_back(v);
  return mx::array::make_arrays(shapes, types, std::make_shared<Append>(cpu_stream(), at, counts), inputs);
}

}  // namespace runner
