// Graph-building functions: each checks its arguments and returns lazy arrays of a primitive for the CPU backend.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace runner {

namespace mx = mlx::core;
using MaybeArray = std::optional<mx::array>;

mx::array linear_op(const mx::array& x, const mx::array& weight, const MaybeArray& bias);
mx::array linear_each_op(const mx::array& x, const mx::array& weight);
mx::array quantized_linear_op(const mx::array& x, const mx::array& weight, const mx::array& scales,
                              const mx::array& biases, const MaybeArray& bias, int group_size, int bits, bool int8);
mx::array small_float_linear_op(const mx::array& x, const mx::array& weight, const mx::array& scales,
                                const MaybeArray& bias, const std::string& mode, bool int8);
mx::array gather_linear_op(const mx::array& x, const mx::array& weight, const mx::array& experts, const MaybeArray& bias);
// biases: the shifts of affine weights; mode: "affine", or one of small_float_linear's.
mx::array gather_quantized_linear_op(const mx::array& x, const mx::array& weight, const mx::array& scales,
                                     const MaybeArray& biases, const mx::array& experts, const MaybeArray& bias,
                                     int group_size, int bits, const std::string& mode, bool int8);
std::pair<mx::array, mx::array> route_op(const mx::array& logits, const MaybeArray& correction, int count, bool sigmoid,
                                         int groups, int kept, int members, bool normalized, float eps, float factor);
mx::array mixture_op(const mx::array& outputs, const mx::array& weights);
mx::array embed_op(const mx::array& ids, const mx::array& weight, mx::Dtype dtype);
mx::array quantized_embed_op(const mx::array& ids, const mx::array& weight, const mx::array& scales,
                             const mx::array& biases, int group_size, int bits, mx::Dtype dtype);
mx::array norm_op(const mx::array& x, const MaybeArray& weight, const MaybeArray& shift, float eps, bool mean);
std::pair<mx::array, mx::array> add_rms_norm_op(const mx::array& x, const mx::array& residual,
                                                const MaybeArray& weight, float eps);
mx::array rope_op(const mx::array& x, const std::variant<int, mx::array, std::vector<int>>& offset, int dims, bool traditional,
                  const std::optional<float>& base, float scale, const MaybeArray& freqs);
mx::array attention_op(const mx::array& q, const mx::array& k, const mx::array& v,
                       const std::variant<std::monostate, std::string, mx::array>& mask, float scale,
                       const std::optional<int>& window, const MaybeArray& sinks, const std::optional<int>& length,
                       const std::optional<float>& softcap, int start);
// Keys and values, how many rows of them are there, the window and the chunk (0: none), and the first row's position.
using KeysAndValues = std::tuple<mx::array, mx::array, int, int, int, int>;
mx::array attention_rows_op(const mx::array& q, const std::vector<KeysAndValues>& histories,
                            const std::vector<int>& counts, float scale, const MaybeArray& sinks,
                            const std::optional<float>& softcap);
mx::array empty_op(const std::vector<int>& shape, mx::Dtype dtype, const MaybeArray& powers);
std::vector<mx::array> append_op(const std::vector<std::pair<mx::array, mx::array>>& buffers, const mx::array& k,
                                 const mx::array& v, const std::vector<int>& at, const std::vector<int>& counts);
mx::array glu_op(const mx::array& gate_up, const std::string& activation);
mx::array clamped_glu_op(const mx::array& gate_up, float alpha, float limit);
mx::array activate_op(const mx::array& x, const std::string& activation);
mx::array short_conv_op(const mx::array& x, const mx::array& rows, const mx::array& weight, const MaybeArray& bias,
                        const std::optional<std::string>& activation);
std::pair<mx::array, mx::array> gated_delta_op(const mx::array& q, const mx::array& k, const mx::array& v,
                                               const mx::array& a, const mx::array& b, const mx::array& a_log,
                                               const mx::array& dt_bias, const mx::array& state);
std::pair<mx::array, mx::array> state_space_op(const mx::array& mixed, const mx::array& dt, const mx::array& a_log,
                                               const mx::array& skip, const mx::array& dt_bias,
                                               const mx::array& state, int groups, float least, float most);
std::pair<mx::array, mx::array> selective_scan_op(const mx::array& x, const mx::array& steps, const mx::array& b,
                                                  const mx::array& c, const mx::array& rates, const mx::array& skip,
                                                  const mx::array& state);
std::vector<mx::array> selective_step_op(const std::vector<mx::array>& states, const std::vector<int>& at,
                                         const mx::array& x, const mx::array& steps, const mx::array& b,
                                         const mx::array& c, const mx::array& rates, const mx::array& skip);
std::vector<mx::array> conv_step_op(const std::vector<mx::array>& rows, const std::vector<int>& at, const mx::array& x,
                                    const mx::array& weight, const MaybeArray& bias,
                                    const std::optional<std::string>& activation);
std::vector<mx::array> recurrent_step_op(const std::vector<mx::array>& rows, const std::vector<mx::array>& states,
                                         const std::vector<int>& at, const mx::array& mixed, const mx::array& weight,
                                         const MaybeArray& bias,
                                         const std::optional<std::string>& activation, const mx::array& a,
                                         const MaybeArray& b, const mx::array& a_log, const mx::array& dt_bias,
                                         const MaybeArray& skip, int groups, float least, float most);
mx::array gated_norm_op(const mx::array& x, const mx::array& gate, const mx::array& weight, float eps, int groups,
                        bool gate_first);
mx::array gate_op(const mx::array& x, const mx::array& gate);
mx::array argmax_op(const mx::array& x);
std::pair<mx::array, mx::array> greatest_op(const mx::array& x);
// How a row's token is drawn: chance, temperature (0: the greatest), top_k, top_p, min_p.
using Drawn = std::tuple<double, double, int, double, double>;
std::pair<mx::array, mx::array> draw_op(const mx::array& logits, const std::vector<Drawn>& rows);
std::vector<mx::array> log_probabilities_op(const mx::array& logits, const mx::array& tokens,
                                            const std::vector<int>& tops);
mx::array masked_op(const mx::array& logits, const mx::array& bits);

// mx::async_eval, cheaper; see schedule.cpp.
void schedule(const std::vector<mx::array>& outputs);

}  // namespace runner
