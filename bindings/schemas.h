#pragma once
// The operators' schemas, for programs without Python. Where there is Python, its
// vstar_kernels/attention/native.py defines them, also for installations without this library;
// tests/attention/test_native.py holds both to each other.

#define VSTAR_INPUTS                                                                          \
  "Tensor query, Tensor key, Tensor value, Tensor? delta, Tensor? stat_tensor, int form, "    \
  "float strength, int stat, bool clamp_negative"
#define VSTAR_FRAME_INPUTS                                                                    \
  "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? stat_tensor, "        \
  "Tensor query_runs, Tensor key_runs, Tensor? delta, Tensor? offset, Tensor? factor, "       \
  "Tensor? factor_span, Tensor? band, int stat, bool clamp_negative, float scale, "           \
  "bool map_by_head"
#define VSTAR_COLUMN_INPUTS "Tensor query, Tensor key, Tensor? value, Tensor columns, float scale"

namespace vstar {

constexpr const char* schemas[] = {
    "cpu_forward(Tensor(a!) out, Tensor(b!)? map, " VSTAR_INPUTS
    ", float scale, int map_block, bool map_by_head) -> ()",
    "cpu_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
    "Tensor(d!)? grad_delta, Tensor(e!)? grad_stat, Tensor grad_out, Tensor? grad_map, "
    VSTAR_INPUTS ", bool detach_stat, float scale, int map_block, bool map_by_head) -> ()",
    "cpu_frames_forward(Tensor(a!) out, Tensor(b!)? map, " VSTAR_FRAME_INPUTS ") -> ()",
    "cpu_frames_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
    "Tensor grad_out, Tensor? grad_map, " VSTAR_FRAME_INPUTS ") -> ()",
    "cpu_columns_forward(Tensor(a!)? out, Tensor(b!)? maps, " VSTAR_COLUMN_INPUTS ") -> ()",
    "cpu_columns_backward(Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
    "Tensor? grad_out, Tensor? grad_maps, " VSTAR_COLUMN_INPUTS ") -> ()",
};

}  // namespace vstar
