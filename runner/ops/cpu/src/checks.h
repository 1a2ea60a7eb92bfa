// Argument checks of the graph-building functions; an error names the op, the argument and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>

#include "primitive_base.h"

namespace runner {

template <class... Parts>
[[noreturn]] inline void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline void need_float(const char* op, const char* what, const mx::array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::bfloat16 && a.dtype() != mx::float16) {
    refuse(op, ": ", what, " is ", a.dtype(), "; expected float32, bfloat16 or float16");
  }
}

inline void need_dims(const char* op, const char* what, const mx::array& a, size_t ndim) {
  if (a.ndim() != ndim) refuse(op, ": ", what, " has shape ", a.shape(), "; expected ", ndim, " dimensions");
}

inline void need_vector(const char* op, const char* what, const mx::array& a, int size) {
  need_float(op, what, a);
  if (a.ndim() != 1 || a.shape(0) != size) refuse(op, ": ", what, " has shape ", a.shape(), "; expected [", size, "]");
}

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

inline mx::Shape with_last(const mx::array& x, int last) {
  mx::Shape shape = x.shape();
  shape.back() = last;
  return shape;
}

}  // namespace runner
