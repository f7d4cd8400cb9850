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
    row = compute_by<kMostRows, 2>(a, a_stride, row, rows, panel, num_blocks, c);
    row = compute_by<kMostRows / 3, 2>(a, a_stride, row, rows, panel, num_blocks, c);
    compute_by<1, kPanelColumns / Vec::width>(a, a_stride, row, rows, panel, num_blocks, c);
  }

 private:
  // As many sums as leave registers for two vectors of weights and a number of the activations.
  static constexpr int kMostRows = Vec::width == 16 ? 12 : 6;

  template <int R, int V>
  static int compute_by(const float* a, ptrdiff_t a_stride, int row, int rows, const T* panel, int num_blocks,
                        float* c) {
    for (; row + R <= rows; row += R) {
      for (int v = 0; v < kPanelColumns / Vec::width; v += V) {
        float* to = c + row * kPanelColumns + v * Vec::width;
        compute_rows<R, V>(a + row * a_stride, a_stride, panel, v, num_blocks, to);
      }
    }
    return row;
  }

  // Of the panel's vectors of columns, V from `first` on.
  template <int R, int V>
  static void compute_rows(const float* a, ptrdiff_t a_stride, const T* panel, int first, int num_blocks, float* c) {
    Vec sums[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] = zero();
    }
    for (int block = 0; block < num_blocks; ++block, panel += 2 * kBlockElements, a += kBlockDepth) {
      for (int pair = 0; pair < kBlockDepth / 2; ++pair) {
        Vec even[V], odd[V];
        for (int v = 0; v < V; ++v) load_weights(panel, pair, first + v, even[v], odd[v]);
        for (int r = 0; r < R; ++r) {
          const Vec x = broadcast(a[r * a_stride + 2 * pair]);
          for (int v = 0; v < V; ++v) sums[r][v] = fma(x, even[v], sums[r][v]);
        }
        for (int r = 0; r < R; ++r) {
          const Vec x = broadcast(a[r * a_stride + 2 * pair + 1]);
          for (int v = 0; v < V; ++v) sums[r][v] = fma(x, odd[v], sums[r][v]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) store(c + r * kPanelColumns + v * Vec::width, sums[r][v]);
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
