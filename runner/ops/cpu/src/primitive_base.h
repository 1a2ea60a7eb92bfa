// What all primitives share: memory for outputs, row-contiguous views of inputs, and the way onto the CPU stream.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace runner {

namespace mx = mlx::core;

inline DType type_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return DType::f32;
  if (a.dtype() == mx::int16) return DType::i16;
  return a.dtype() == mx::bfloat16 ? DType::bf16 : DType::f16;
}

// dst = src in row-major order, for any strides
inline void copy_strided(const char* src, char* dst, size_t item, const mx::Shape& shape, const mx::Strides& strides,
                         size_t axis = 0) {
  if (axis + 1 >= shape.size()) {
    int64_t n = shape.empty() ? 1 : shape[axis], stride = shape.empty() ? 1 : strides[axis];
    for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * item, src + i * stride * int64_t(item), item);
    return;
  }
  size_t inner = item;
  for (size_t i = axis + 1; i < shape.size(); ++i) inner *= shape[i];
  for (int64_t i = 0; i < shape[axis]; ++i) {
    copy_strided(src + i * strides[axis] * int64_t(item), dst + i * inner, item, shape, strides, axis + 1);
  }
}

// Work for the stream's thread, which is told how many positions ahead of the planned one it is done.
using Task = std::function<void(int64_t ahead)>;

// Work in order, and the memory that it is done in. An operation's copies of inputs may go when it is listed.
struct Listing {
  std::vector<Task> tasks;
  std::vector<mx::array> copies;
  std::shared_ptr<Arena> arena = std::make_shared<Arena>();
};

// One evaluation: pointers are taken now, while MLX holds the arrays; the work runs later on the stream's thread, and
// MLX keeps the buffers of inputs, outputs and temporaries alive until then. With a list the work goes there instead of
// to the stream, memory comes from the list's arena, and whoever runs the list keeps both.
class Dispatcher {
 public:
  explicit Dispatcher(const mx::Stream& stream) : encoder_(mx::cpu::get_command_encoder(stream)) {}
  Dispatcher(const mx::Stream& stream, Listing& list)
      : encoder_(mx::cpu::get_command_encoder(stream)), list_(&list) {}

  mx::array& allocate(mx::array& out) {
    out.set_data(memory(out.nbytes()));
    return out;
  }

  // As allocate(), of [B, H, L, D]: in memory a position's heads lie side by side, as the next layer's matrix reads them.
  mx::array& allocate_by_position(mx::array& out) {
    const int64_t h = out.shape(1), l = out.shape(2), d = out.shape(3);
    if (h == 1 || l == 1 || out.size() == 0) return allocate(out);
    mx::Strides strides{h * l * d, d, h * d, 1};
    out.set_data(memory(out.nbytes()), out.size(), strides, {true, false, false});
    return out;
  }

  const void* contiguous(const mx::array& a) {
    if (a.flags().row_contiguous) return a.data<void>();
    return copied(a);
  }

  // As contiguous(), but any strides will do as long as the last one is 1.
  const void* last_contiguous(const mx::array& a, mx::Strides& strides) {
    strides = a.strides();
    if (a.shape().back() <= 1 || strides.back() == 1) return a.data<void>();
    strides.back() = 1;
    for (size_t i = a.ndim() - 1; i > 0; --i) strides[i - 1] = strides[i] * a.shape()[i];
    return copied(a);
  }

  // out = a, row-contiguous, in memory of its own
  void copy(const mx::array& a, mx::array& out) {
    allocate(out);
    copy_later(a, out);
  }

  // f() or f(ahead)
  template <class F>
  void run(F&& f) {
    if constexpr (std::is_invocable_v<std::decay_t<F>&, int64_t>) {
      if (list_) return (void)list_->tasks.emplace_back(std::forward<F>(f));
      encoder_.dispatch(std::forward<F>(f), int64_t(0));
    } else {
      if (list_) return (void)list_->tasks.emplace_back([f = std::forward<F>(f)](int64_t) mutable { f(); });
      encoder_.dispatch(std::forward<F>(f));
    }
  }

 private:
  mx::allocator::Data memory(size_t bytes) { return list_ ? list_->arena->take(bytes) : mx::allocator::malloc(bytes); }

  const void* copied(const mx::array& a) {
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    copy.set_data(memory(a.nbytes()));
    if (list_) {
      list_->copies.push_back(copy);
    } else {
      encoder_.add_temporary(copy);
    }
    copy_later(a, copy);
    return copy.data<void>();
  }

  void copy_later(const mx::array& a, mx::array& copy) {
    run([src = a.data<char>(), dst = copy.data<char>(), item = a.itemsize(), shape = a.shape(), strides = a.strides(),
         empty = a.size() == 0] {
      if (!empty) copy_strided(src, dst, item, shape, strides);
    });
  }

  mx::cpu::CommandEncoder& encoder_;
  Listing* list_ = nullptr;
};

// Inference on the CPU only: no gradients, no vmap (the base class throws for both).
class CpuPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  // How many of the outputs are the memory of as many inputs, the first of each.
  virtual size_t written() const { return 0; }
  // Where in a sequence it works, for those that depend on it: the task takes how far ahead of that it is.
  virtual int64_t position() const { return 0; }
  virtual bool same_but_position(const mx::Primitive& other) const { return is_equivalent(other); }
  // The same where it works on several sequences, whose places may differ from each other in another way.
  virtual bool same_but_places(const mx::Primitive& other) const { return same_but_position(other); }
  // Allocates `outputs` and gives the dispatcher what fills them.
  virtual void plan(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Dispatcher& d) = 0;
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) final {
    Dispatcher d(stream());
    plan(inputs, outputs, d);
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + " runs on the CPU only; build the graph with plain MLX ops there");
  }
};

// Whether places of several sequences differ by the same number: all are as far behind the others' as the first is.
inline bool same_steps(const std::vector<int>& a, const std::vector<int>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 1; i < a.size(); ++i) {
    if (a[i] - a[0] != b[i] - b[0]) return false;
  }
  return true;
}

inline int64_t position_of(const mx::array& a) {
  auto* ours = dynamic_cast<const CpuPrimitive*>(&a.primitive());
  return ours ? ours->position() : 0;
}

inline size_t written_by(const mx::array& a) {
  auto* ours = dynamic_cast<const CpuPrimitive*>(&a.primitive());
  return ours ? ours->written() : 0;
}

}  // namespace runner
