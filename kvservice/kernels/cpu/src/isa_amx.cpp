// The kernels compiled for AVX-512 with bf16, and AMX with bf16. Only called where the machine has them.
#include "vec_avx512.h"

#include "entries.h"

namespace kv {

const Kernels kAmxKernels = kKernels;

}  // namespace kv
