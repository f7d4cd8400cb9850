// The kernels of one instruction set, as the C interface calls them.
#pragma once

#include "abi.h"

namespace kv {

struct Kernels {
  decltype(&::kv_linear) linear;
  decltype(&::kv_norm_linear) norm_linear;
  decltype(&::kv_rms_norm) rms_norm;
  decltype(&::kv_layer_pre) layer_pre;
  decltype(&::kv_attend) attend;
  decltype(&::kv_recall) recall;
  decltype(&::kv_layer_post) layer_post;
  decltype(&::kv_attend_parts) attend_parts;
  decltype(&::kv_merge) merge;
  decltype(&::kv_encode_groups) encode_keys;
  decltype(&::kv_highest) highest;
  decltype(&::kv_draw) draw;
  decltype(&::kv_attend_held) attend_held;
};

extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;

}  // namespace kv
