// How a matrix lies in memory once packed; the same for every instruction set.
//
//   panel   32 columns of the product, that is 32 rows of the matrix. Of a gated pair, 16 gates and their 16 ups.
//   block   16 columns x 32 k, 512 numbers:   bf16  [16 pairs of k][16 columns][2]     fp32  [32 k][16 columns]
//   order   [panel][k / 32][half of the panel][block]; columns and k beyond the matrix are zero
//
// A bf16 block is what an AMX tile wants and, read by rows of 64 bytes, what AVX wants. A panel is read front to back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace kv {
namespace {

constexpr int kPanelColumns = 32;
constexpr int kHalfColumns = 16;
constexpr int kBlockDepth = 32;
constexpr int kBlockElements = kHalfColumns * kBlockDepth;

struct PackedShape {
  int num_panels;
  int num_blocks;  // along k
  int columns_per_panel;  // of the result

  PackedShape(int out, int in, bool is_gated)
      : columns_per_panel(is_gated ? kHalfColumns : kPanelColumns) {
    num_panels = (out + columns_per_panel - 1) / columns_per_panel;
    num_blocks = (in + kBlockDepth - 1) / kBlockDepth;
  }
  explicit PackedShape(const KvLinear& linear) : PackedShape(linear.out, linear.in, linear.is_gated != 0) {}

  size_t panel_elements() const { return static_cast<size_t>(num_blocks) * 2 * kBlockElements; }
  int padded_in() const { return num_blocks * kBlockDepth; }
};

// A panel that is needed later, of which one of `parts` equal parts is to be fetched now.
struct PanelAhead {
  const void* panel;
  int part;
  int parts;
};

}  // namespace
}  // namespace kv
