// The 16-bit number type: the upper half of an fp32. Included by each instruction set's unit, so everything is local.
#pragma once

#include <cstdint>

namespace kv {

struct bf16 {
  uint16_t bits;
};

}  // namespace kv
