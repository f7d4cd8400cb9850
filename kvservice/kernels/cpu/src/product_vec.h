// Products of rows with a packed panel by fused multiply-adds. Activations are fp32 rows, padded with zeros to whole
// blocks of k. Each number of the result is one chain of additions over k, whatever the number of rows.
#pragma once

#include "packing.h"

namespace kv {
namespace {

template <class T>
struct VecProduct {
  using Weight = T;
  using Activation = float;
  static constexpr int row_block = 24;

  // c[rows][32] = a[rows][k] x panel.
  void compute(const float* a, ptrdiff_t a_stride, int rows, const T* panel, int num_blocks, PanelAhead,
               float* c) const {
    int row = 0;
    row = compute_by<kMostRows>(a, a_stride, row, rows, panel, num_blocks, c);
    row = compute_by<kMostRows / 3>(a, a_stride, row, rows, panel, num_blocks, c);
    compute_by<1>(a, a_stride, row, rows, panel, num_blocks, c);
  }

 private:
  // As many accumulators as leave registers for the weights.
  static constexpr int kVectors = kPanelColumns / Vec::width;
  static constexpr int kMostRows = Vec::width == 16 ? 12 : 3;

  template <int R>
  static int compute_by(const float* a, ptrdiff_t a_stride, int row, int rows, const T* panel, int num_blocks,
                        float* c) {
    for (; row + R <= rows; row += R) {
      compute_rows<R>(a + row * a_stride, a_stride, panel, num_blocks, c + row * kPanelColumns);
    }
    return row;
  }

  template <int R>
  static void compute_rows(const float* a, ptrdiff_t a_stride, const T* panel, int num_blocks, float* c) {
    Vec sums[R][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
    }
    for (int block = 0; block < num_blocks; ++block, panel += 2 * kBlockElements, a += kBlockDepth) {
      for (int pair = 0; pair < kBlockDepth / 2; ++pair) {
        for (int v = 0; v < kVectors; ++v) {
          Vec even, odd;
          load_weights(panel, pair, v, even, odd);
          for (int r = 0; r < R; ++r) {
            const float* x = a + r * a_stride + 2 * pair;
            sums[r][v] = fma(broadcast(x[1]), odd, fma(broadcast(x[0]), even, sums[r][v]));
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) store(c + r * kPanelColumns + v * Vec::width, sums[r][v]);
    }
  }

  // The weights of columns v * width .. for k = 2 * pair and 2 * pair + 1.
  static void load_weights(const bf16* block, int pair, int v, Vec& even, Vec& odd) {
    const int column = v * Vec::width;
    const bf16* half = block + column / kHalfColumns * kBlockElements;
    load_pairs(half + (pair * kHalfColumns + column % kHalfColumns) * 2, even, odd);
  }
  static void load_weights(const float* block, int pair, int v, Vec& even, Vec& odd) {
    const int column = v * Vec::width;
    const float* half = block + column / kHalfColumns * kBlockElements + column % kHalfColumns;
    even = load(half + 2 * pair * kHalfColumns);
    odd = load(half + (2 * pair + 1) * kHalfColumns);
  }
};

}  // namespace
}  // namespace kv
