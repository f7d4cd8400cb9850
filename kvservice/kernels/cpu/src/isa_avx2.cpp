// The kernels compiled for AVX2 and FMA. Only called where the machine has them.
#include "vec_avx2.h"

#include "entries.h"

namespace kv {

const Kernels kAvx2Kernels = kKernels;

}  // namespace kv
