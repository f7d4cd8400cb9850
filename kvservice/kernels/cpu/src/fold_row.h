// Folds a tile of bf16 KV into the states of a few rows with vectors, straight from where it lies: for decoding, where
// the tile is read once and little is computed with it. Sums are fp32 throughout.
//
// A vector of 32 bf16 becomes two of fp32 without moving any: the even numbers and the odd ones. Sums are kept likewise,
// until `settle` puts them in order.
#pragma once

#include "attention.h"

namespace kv {
namespace {

class RowFold {
 public:
  using Element = bf16;
  static constexpr int kMostRows = 4;

  static int64_t bytes(int head_dim) {
    return kMostRows * (kTileTokens * static_cast<int64_t>(sizeof(float)) + round_up(head_dim * sizeof(bf16), 64));
  }

  // head_dim is a multiple of the 32 or, with vectors of eight, 16 numbers that are taken apart at once.
  RowFold(int head_dim, float scale, char* memory) : head_dim_(head_dim), scale_(scale * kLog2E) {
    weights_ = reinterpret_cast<float*>(memory);
    queries_ = reinterpret_cast<bf16*>(weights_ + kMostRows * kTileTokens);
  }

  static bool takes(int head_dim, int rows) { return rows <= kMostRows && head_dim % kPair == 0; }

  template <class QueryOf>
  void set_queries(int rows, QueryOf&& query_of) {
    rows_ = rows;
    for (int row = 0; row < rows; ++row) {
      std::memcpy(static_cast<void*>(queries_ + row * head_dim_), query_of(row), head_dim_ * sizeof(bf16));
    }
  }

  // Row r sees tokens [0, visible[r]) of those that the tile's first is number `first` of.
  void fold(const Tile<bf16>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) {
    switch (rows_) {
      case 1: return fold_rows<1>(tile, first, visible, ahead, state);
      case 2: return fold_rows<2>(tile, first, visible, ahead, state);
      case 3: return fold_rows<3>(tile, first, visible, ahead, state);
      default: return fold_rows<4>(tile, first, visible, ahead, state);
    }
  }

  // Puts the sums of folded tiles in order.
  void settle(State& state) const {
    for (int row = 0; row < rows_; ++row) {
      float* sums = state.sums + row * state.stride;
      for (int d = 0; d < head_dim_; d += kPair) {
        const Vec even = load(sums + d), odd = load(sums + d + Vec::width);
        store(sums + d, first_pairs(even, odd));
        store(sums + d + Vec::width, last_pairs(even, odd));
      }
    }
  }

 private:
  static constexpr int kPair = 2 * Vec::width;
  // Numbers of d whose sums are in registers at a time.
  static constexpr int kStripe = Vec::width == 16 ? 2 * kPair : kPair;

  template <int R>
  void fold_rows(const Tile<bf16>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) const {
    const int lines = static_cast<int>(head_dim_ * sizeof(bf16) / 64 + 1);
    const int num_blocks = tile.num_blocks();
    for (int b = 0; b < num_blocks; ++b) {
      for (int t = 0; t < kBlockTokens; t += Vec::width) {
        const bf16* keys = tile.keys[b] + t * tile.stride;
        float* scores = weights_ + b * kBlockTokens + t;
        switch (head_dim_ / kPair) {
          case 2: score<R, 2>(keys, tile.stride, scores, lines, ahead); break;
          case 4: score<R, 4>(keys, tile.stride, scores, lines, ahead); break;
          default: score<R, 0>(keys, tile.stride, scores, lines, ahead); break;
        }
      }
    }
    float factors[R];
    for (int r = 0; r < R; ++r) factors[r] = weigh(r, num_blocks * kBlockTokens, visible[r] - first, state);
    int d = 0;
    for (; d + kStripe <= head_dim_; d += kStripe) {
      add_values<R, kStripe / kPair>(tile, d, factors, d == 0 ? lines : 0, ahead, state);
    }
    for (; d < head_dim_; d += kPair) add_values<R, 1>(tile, d, factors, d == 0 ? lines : 0, ahead, state);
  }

  // A vector of tokens' products with each row; C: pairs of vectors in head_dim, or 0 for any number.
  template <int R, int C>
  void score(const bf16* keys, ptrdiff_t stride, float* scores, int lines, Ahead& ahead) const {
    constexpr int kQuads = Vec::width / 4;
    const int num_pairs = C ? C : head_dim_ / kPair;
    Vec quads[R][kQuads];
    for (int q = 0; q < kQuads; ++q) {
      Vec sums[R][4];
      for (int t = 0; t < 4; ++t) {
        const bf16* key = keys + (q * 4 + t) * stride;
        ahead.fetch(lines);
        for (int r = 0; r < R; ++r) sums[r][t] = zero();
        for (int i = 0; i < num_pairs; ++i) {
          const Pairs pairs = load_pairs(key + i * kPair);
          for (int r = 0; r < R; ++r) {
            sums[r][t] = add_products(sums[r][t], pairs, load_pairs(queries_ + r * head_dim_ + i * kPair));
          }
        }
      }
      for (int r = 0; r < R; ++r) quads[r][q] = sums_of_quad(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
    for (int r = 0; r < R; ++r) store(scores + r * kTileTokens, join_quads(quads[r]) * broadcast(scale_));
  }

  // A row's scores to weights; returns the factor by which its earlier sums shrink.
  float weigh(int row, int num_tokens, int num_visible, State& state) const {
    float* weights = weights_ + row * kTileTokens;
    const Vec hidden = broadcast(kHidden);
    Vec highest = hidden;
    for (int t = 0; t < num_tokens; t += Vec::width) {
      const Vec scores = keep_first(load(weights + t), num_visible - t, hidden);
      highest = max(highest, scores);
      store(weights + t, scores);
    }
    const float before = state.peak[row];
    const float tile_peak = max_of_lanes(highest);
    const float peak = before > tile_peak ? before : tile_peak;
    Vec mass = zero();
    for (int t = 0; t < num_tokens; t += Vec::width) {
      const Vec weight = rough_exp2(load(weights + t) - broadcast(peak));
      mass = mass + weight;
      store(weights + t, weight);
    }
    const float factor = before == peak ? 1.0f : std::exp2(before - peak);
    state.peak[row] = peak;
    state.mass[row] = state.mass[row] * factor + sum_of_lanes(mass);
    return factor;
  }

  // V pairs of vectors of the rows' sums, from number d on.
  template <int R, int V>
  void add_values(const Tile<bf16>& tile, int d, const float* factors, int lines, Ahead& ahead, State& state) const {
    Vec even[R][V], odd[R][V];
    for (int r = 0; r < R; ++r) {
      const float* from = state.sums + r * state.stride + d;
      for (int v = 0; v < V; ++v) {
        even[r][v] = load(from + v * kPair) * broadcast(factors[r]);
        odd[r][v] = load(from + v * kPair + Vec::width) * broadcast(factors[r]);
      }
    }
    for (int b = 0; b < tile.num_blocks(); ++b) {
      const bf16* values = tile.values[b] + d;
      for (int t = 0; t < kBlockTokens; ++t, values += tile.stride) {
        ahead.fetch(lines);
        for (int v = 0; v < V; ++v) {
          Vec value_even, value_odd;
          load_pairs(values + v * kPair, value_even, value_odd);
          for (int r = 0; r < R; ++r) {
            const Vec weight = broadcast(weights_[r * kTileTokens + b * kBlockTokens + t]);
            even[r][v] = fma(weight, value_even, even[r][v]);
            odd[r][v] = fma(weight, value_odd, odd[r][v]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      float* to = state.sums + r * state.stride + d;
      for (int v = 0; v < V; ++v) {
        store(to + v * kPair, even[r][v]);
        store(to + v * kPair + Vec::width, odd[r][v]);
      }
    }
  }

  int head_dim_;
  float scale_;
  int rows_ = 0;
  float* weights_;
  bf16* queries_;
};

}  // namespace
}  // namespace kv
