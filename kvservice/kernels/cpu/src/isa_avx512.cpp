// The kernels compiled for AVX-512 (F, BW, DQ, VL). Only called where the machine has them.
#include "vec_avx512.h"

#include "entries.h"

namespace kv {

const Kernels kAvx512Kernels = kKernels;

}  // namespace kv
