// What the machine can do. Knows nothing of kernels.
#pragma once

namespace kv {

enum class Isa { kNone, kAvx2, kAvx512, kAmx };

// The best instruction set of processor and system, at most `most`. Asks the system for AMX where it is there, since
// Linux gives its registers only to processes that ask.
Isa detect_isa(Isa most);

const char* name_of(Isa isa);

}  // namespace kv
