#include <atomic>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "huge_pages.h"
#include "kernels.h"
#include "mlx/version.h"
#include "pool.h"
#include "primitives.h"
#include "program.h"
#include "read_memory.h"
#include "tiles.h"

namespace nb = nanobind;
using namespace nb::literals;

#define RUNNER_TEXT2(x) #x
#define RUNNER_TEXT(x) RUNNER_TEXT2(x)

// The version of MLX's headers, as text in the binary: read before any MLX symbol is called.
constexpr const char* kBuiltFor =
    RUNNER_TEXT(MLX_VERSION_MAJOR) "." RUNNER_TEXT(MLX_VERSION_MINOR) "." RUNNER_TEXT(MLX_VERSION_PATCH);

// Runs `rounds` jobs on the pool and says whether every piece ran exactly once.
bool self_test(int rounds) {
  constexpr int kPieces = 37;
  std::atomic<int> seen[kPieces] = {};
  for (int i = 0; i < rounds; ++i) runner::Pool::get().parallel_for(kPieces, [&](int piece) { ++seen[piece]; });
  for (auto& count : seen) {
    if (count != rounds) return false;
  }
  return true;
}

NB_MODULE(_C, m) {
  m.attr("built_for_mlx") = kBuiltFor;
  // Raises TypeError where this module and mlx.core do not share nanobind's type tables.
  m.def("accepts_array", [](const mlx::core::array&) { return true; }, "x"_a);
  m.def("num_threads", [] { return runner::Pool::get().size(); });
  m.def("set_num_threads", [](int n) { runner::Pool::get().resize(n); }, "n"_a);
  m.def("self_test", &self_test, "rounds"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("read_seconds", &runner::read_seconds, "size"_a, "passes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("isa", [] { return runner::kernels().name; });
  m.def("why_no_tiles", [] { return runner::why_no_tiles(); });  // None where there are some
  m.def("set_isa", [](const std::string& name) { return runner::select_isa(name.c_str()); }, "name"_a);

  m.def("linear", &runner::linear_op, "x"_a, "weight"_a, "bias"_a = nb::none());
  m.def("linear_each", &runner::linear_each_op, "x"_a, "weight"_a);
  m.def("quantized_linear", &runner::quantized_linear_op, "x"_a, "weight"_a, "scales"_a, "biases"_a,
        "bias"_a = nb::none(), "group_size"_a, "bits"_a, "int8"_a = false);
  m.def("small_float_linear", &runner::small_float_linear_op, "x"_a, "weight"_a, "scales"_a, "bias"_a.none(), "mode"_a,
        "int8"_a = false);
  m.def("gather_linear", &runner::gather_linear_op, "x"_a, "weight"_a, "experts"_a, "bias"_a.none() = nb::none());
  m.def("gather_quantized_linear", &runner::gather_quantized_linear_op, "x"_a, "weight"_a, "scales"_a, "biases"_a.none(),
        "experts"_a, "bias"_a.none(), "group_size"_a, "bits"_a, "mode"_a, "int8"_a = false);
  m.def("route", &runner::route_op, "logits"_a, "correction"_a.none(), "count"_a, "sigmoid"_a, "groups"_a, "kept"_a,
        "members"_a, "normalized"_a, "eps"_a, "factor"_a);
  m.def("mixture", &runner::mixture_op, "outputs"_a, "weights"_a);
  m.def("embed", &runner::embed_op, "ids"_a, "weight"_a, "dtype"_a);
  m.def("quantized_embed", &runner::quantized_embed_op, "ids"_a, "weight"_a, "scales"_a, "biases"_a, "group_size"_a,
        "bits"_a, "dtype"_a);
  m.def(
      "rms_norm",
      [](const mlx::core::array& x, const runner::MaybeArray& weight, float eps) {
        return runner::norm_op(x, weight, std::nullopt, eps, false);
      },
      "x"_a, "weight"_a.none(), "eps"_a);
  m.def(
      "layer_norm",
      [](const mlx::core::array& x, const runner::MaybeArray& weight, const runner::MaybeArray& bias, float eps) {
        return runner::norm_op(x, weight, bias, eps, true);
      },
      "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);
  m.def("add_rms_norm", &runner::add_rms_norm_op, "x"_a, "residual"_a, "weight"_a.none(), "eps"_a);
  m.def("rope", &runner::rope_op, "x"_a, "offset"_a, nb::kw_only(), "dims"_a, "traditional"_a, "base"_a.none(), "scale"_a,
        "freqs"_a.none());
  m.def("attention", &runner::attention_op, "query"_a, "key"_a, "value"_a, "mask"_a.none(), nb::kw_only(), "scale"_a,
        "window"_a.none(), "sinks"_a.none(), "length"_a.none() = nb::none(), "softcap"_a.none() = nb::none(), "start"_a = 0);
  m.def("attention_rows", &runner::attention_rows_op, "query"_a, "histories"_a, "counts"_a, nb::kw_only(), "scale"_a,
        "sinks"_a.none(), "softcap"_a.none());
  m.def("empty", &runner::empty_op, "shape"_a, "dtype"_a, "powers"_a.none() = nb::none());
  m.def(
      "append",
      [](const mlx::core::array& keys, const mlx::core::array& values, const mlx::core::array& k,
         const mlx::core::array& v, int at) {
        auto found = runner::append_op({{keys, values}}, k, v, {at}, {k.ndim() == 4 ? k.shape(2) : 0});
        return std::pair{found[0], found[1]};
      },
      "keys"_a, "values"_a, "k"_a, "v"_a, "at"_a);
  m.def(
      "append_rows",
      [](const std::vector<std::pair<mlx::core::array, mlx::core::array>>& buffers, const mlx::core::array& k,
         const mlx::core::array& v, const std::vector<int>& at, const std::vector<int>& counts) {
        auto found = runner::append_op(buffers, k, v, at, counts);
        std::vector<std::pair<mlx::core::array, mlx::core::array>> pairs;
        for (size_t i = 0; i < found.size(); i += 2) pairs.emplace_back(found[i], found[i + 1]);
        return pairs;
      },
      "buffers"_a, "keys"_a, "values"_a, "at"_a, "counts"_a);
  m.def("glu", &runner::glu_op, "gate_up"_a, "activation"_a);
  m.def("clamped_glu", &runner::clamped_glu_op, "gate_up"_a, "alpha"_a, "limit"_a);
  m.def("activate", &runner::activate_op, "x"_a, "activation"_a);
  m.def("short_conv", &runner::short_conv_op, "x"_a, "rows"_a, "weight"_a, "bias"_a.none(), "activation"_a.none());
  m.def("gated_delta", &runner::gated_delta_op, "q"_a, "k"_a, "v"_a, "a"_a, "b"_a, "a_log"_a, "dt_bias"_a, "state"_a);
  m.def("state_space", &runner::state_space_op, "mixed"_a, "dt"_a, "a_log"_a, "d"_a, "dt_bias"_a, "state"_a, "groups"_a,
        "least"_a, "most"_a);
  m.def("selective_scan", &runner::selective_scan_op, "x"_a, "steps"_a, "b"_a, "c"_a, "rates"_a, "skip"_a, "state"_a);
  m.def("selective_step", &runner::selective_step_op, "states"_a, "at"_a, "x"_a, "steps"_a, "b"_a, "c"_a, "rates"_a,
        "skip"_a);
  m.def("conv_step", &runner::conv_step_op, "rows"_a, "at"_a, "x"_a, "weight"_a, "bias"_a.none(), "activation"_a.none());
  m.def("recurrent_step", &runner::recurrent_step_op, "rows"_a, "states"_a, "at"_a, "mixed"_a, "weight"_a,
        "bias"_a.none(), "activation"_a.none(), "a"_a, "b"_a.none(), "a_log"_a, "dt_bias"_a, "d"_a.none(), "groups"_a,
        "least"_a, "most"_a);
  m.def("gated_norm", &runner::gated_norm_op, "x"_a, "gate"_a, "weight"_a, "eps"_a, "groups"_a, "gate_first"_a);
  m.def("gate", &runner::gate_op, "x"_a, "gate"_a);
  m.def("argmax", &runner::argmax_op, "x"_a);
  m.def("greatest", &runner::greatest_op, "x"_a);
  m.def("draw", &runner::draw_op, "logits"_a, "rows"_a);
  m.def("log_probabilities", &runner::log_probabilities_op, "logits"_a, "tokens"_a, "tops"_a);
  m.def("masked", &runner::masked_op, "logits"_a, "bits"_a);
  m.def("slot", &runner::slot_op, "shape"_a);
  m.def("record", &runner::Program::record, "slot"_a, "outputs"_a, "ahead"_a, "caches"_a);
  nb::class_<runner::Outline>(m, "Outline")
      .def("record", &runner::Outline::record, "slot"_a, "output"_a, "caches"_a, "count"_a)
      .def("same_as", &runner::Outline::same_as, "other"_a);
  nb::class_<runner::Program>(m, "Program")
      .def_prop_ro("outline", [](const runner::Program& program) { return program.outline(); })
      .def("run", &runner::Program::run, "token"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("pages", &runner::pages_op, "size"_a);
  m.def("move_into", &runner::move_into, "array"_a, "pages"_a, "at"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("schedule", &runner::schedule, "arrays"_a, nb::call_guard<nb::gil_scoped_release>());
}
