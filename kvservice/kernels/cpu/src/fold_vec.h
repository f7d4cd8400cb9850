// Folds a tile of KV into running states with fp32 vectors, for any head_dim. KV of either type is widened first.
#pragma once

#include "attention.h"

namespace kv {
namespace {

template <class T>
class VecFold {
 public:
  using Element = T;

  static int64_t bytes(int head_dim, int padded_rows) {
    const int64_t rows = padded_rows + 2 * kTileTokens + kTurnedTogether;
    return (rows * round_up(head_dim, 16) + kRowsTogether * kTileTokens) * static_cast<int64_t>(sizeof(float));
  }

  VecFold(int head_dim, int padded_rows, float scale, char* memory)
      : head_dim_(head_dim), stride_(round_up(head_dim, 16)), scale_(scale * kLog2E) {
    queries_ = reinterpret_cast<float*>(memory);
    keys_ = queries_ + padded_rows * stride_;
    values_ = keys_ + kTileTokens * stride_;
    unturned_ = values_ + kTileTokens * stride_;
    weights_ = unturned_ + kTurnedTogether * stride_;
  }

  template <class QueryOf>
  void set_queries(int rows, QueryOf&& query_of) {
    rows_ = rows;
    for (int row = 0; row < rows; ++row) widen_row(query_of(row), queries_ + row * stride_);
  }

  // Row r sees tokens [0, visible[r]) of those that the tile's first is number `first` of.
  void fold(const Tile<T>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) {
    const int num_tokens = tile.num_blocks() * kBlockTokens;
    for (int t = 0; t < num_tokens; t += kTurnedTogether) {
      for (int i = 0; i < kTurnedTogether; ++i) {
        const int64_t offset = (t + i) % kBlockTokens * tile.stride;
        widen_row(tile.keys[t / kBlockTokens] + offset, unturned_ + i * stride_);
        widen_row(tile.values[t / kBlockTokens] + offset, values_ + (t + i) * stride_);
        ahead.fetch(static_cast<int>(2 * head_dim_ * sizeof(T) / 64 + 1));
      }
      turn_keys(t);
    }
    fold_widened<true>(num_tokens, [&](int row) { return visible[row] - first; }, state);
  }

  // Sums are in order as they are.
  void settle(State&) const {}

  // Nothing is pending when queries change.
  void flush(State&) const {}

  // Up to a tile of tokens that lie anywhere; all rows see them all.
  void fold_scattered(const T* const* keys, const T* const* values, int num_tokens, State& state) {
    for (int t = 0; t < num_tokens; ++t) {
      widen_row(keys[t], keys_ + t * stride_);
      widen_row(values[t], values_ + t * stride_);
    }
    const int padded = static_cast<int>(round_up(num_tokens, kBlockTokens));
    std::memset(keys_ + num_tokens * stride_, 0, (padded - num_tokens) * stride_ * sizeof(float));
    std::memset(values_ + num_tokens * stride_, 0, (padded - num_tokens) * stride_ * sizeof(float));
    fold_widened<false>(padded, [&](int) { return num_tokens; }, state);
  }

 private:
  // Registers hold the sums of so many rows times vectors, and what is multiplied.
  static constexpr int kRowsTogether = 4;
  static constexpr int kVectorsTogether = Vec::width == 16 ? 4 : 2;
  static constexpr int kScoreVectors = 2;
  static constexpr int kTurnedTogether = 4;

  void widen_row(const T* from, float* to) const {
    copy_row(from, head_dim_, to);
    for (int64_t i = head_dim_; i < stride_; ++i) to[i] = 0;
  }

  // From [token][dim] to keys_ [dim][token]: the scores of many rows then need no sums across a vector's lanes.
  void turn_keys(int first_token) {
    for (int64_t i = 0; i < stride_; i += kTurnedTogether) {
      __m128 a = _mm_loadu_ps(unturned_ + i), b = _mm_loadu_ps(unturned_ + stride_ + i);
      __m128 c = _mm_loadu_ps(unturned_ + 2 * stride_ + i), d = _mm_loadu_ps(unturned_ + 3 * stride_ + i);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* to = keys_ + i * kTileTokens + first_token;
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + kTileTokens, b);
      _mm_storeu_ps(to + 2 * kTileTokens, c);
      _mm_storeu_ps(to + 3 * kTileTokens, d);
    }
  }

  template <bool Turned, class NumVisible>
  void fold_widened(int num_tokens, NumVisible&& num_visible, State& state) {
    int row = 0;
    for (; row + kRowsTogether <= rows_; row += kRowsTogether) {
      fold_rows<Turned, kRowsTogether>(row, num_tokens, num_visible, state);
    }
    switch (rows_ - row) {
      case 3: return fold_rows<Turned, 3>(row, num_tokens, num_visible, state);
      case 2: return fold_rows<Turned, 2>(row, num_tokens, num_visible, state);
      case 1: return fold_rows<Turned, 1>(row, num_tokens, num_visible, state);
    }
  }

  template <bool Turned, int R, class NumVisible>
  void fold_rows(int row, int num_tokens, NumVisible&& num_visible, State& state) {
    if constexpr (Turned) {
      score_turned<R>(row, num_tokens);
    } else {
      for (int r = 0; r < R; ++r) score_rows(row + r, num_tokens, weights_ + r * kTileTokens);
    }
    float factors[R];
    for (int r = 0; r < R; ++r) {
      factors[r] = weigh(row + r, num_tokens, num_visible(row + r), weights_ + r * kTileTokens, state);
    }
    for (int64_t i = 0; i < stride_; i += kVectorsTogether * Vec::width) {
      const int vectors = smaller(kVectorsTogether, static_cast<int>((stride_ - i) / Vec::width));
      if (vectors == kVectorsTogether) {
        add_values<R, kVectorsTogether>(row, i, num_tokens, factors, state);
      } else {
        for (int v = 0; v < vectors; ++v) add_values<R, 1>(row, i + v * Vec::width, num_tokens, factors, state);
      }
    }
  }

  // Products of R queries with the keys of a tile that lie [dim][token], added up dimension by dimension.
  template <int R>
  void score_turned(int row, int num_tokens) {
    for (int t = 0; t < num_tokens; t += kScoreVectors * Vec::width) {
      Vec sums[R][kScoreVectors];
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = zero();
      }
      for (int64_t i = 0; i < stride_; ++i) {
        const float* key = keys_ + i * kTileTokens + t;
        Vec keys[kScoreVectors];
        for (int v = 0; v < kScoreVectors; ++v) keys[v] = load(key + v * Vec::width);
        for (int r = 0; r < R; ++r) {
          const Vec query = broadcast(queries_[(row + r) * stride_ + i]);
          for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = fma(query, keys[v], sums[r][v]);
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kScoreVectors; ++v) store(weights_ + r * kTileTokens + t + v * Vec::width, sums[r][v]);
      }
    }
  }

  // The same for one query and keys that lie [token][dim]: for few rows, turning them doesn't pay.
  void score_rows(int row, int num_tokens, float* products) const {
    const float* query = queries_ + row * stride_;
    for (int t = 0; t < num_tokens; t += Vec::width) {
      Vec partial[Vec::width];
      for (int lane = 0; lane < Vec::width; ++lane) {
        const float* key = keys_ + (t + lane) * stride_;
        Vec sum = zero();
        for (int64_t i = 0; i < stride_; i += Vec::width) sum = fma(load(query + i), load(key + i), sum);
        partial[lane] = sum;
      }
      store(products + t, sums_of_each(partial));
    }
  }

  // Turns a row's products with the tile's keys into weights; returns the factor by which its earlier sums shrink.
  float weigh(int row, int num_tokens, int num_visible, float* weights, State& state) const {
    const Vec scale = broadcast(scale_), hidden = broadcast(kHidden);
    Vec highest = hidden;
    for (int t = 0; t < num_tokens; t += Vec::width) {
      const Vec scores = keep_first(load(weights + t) * scale, num_visible - t, hidden);
      highest = max(highest, scores);
      store(weights + t, scores);
    }
    const float before = state.peak[row];
    const float tile_peak = max_of_lanes(highest);
    const float peak = before > tile_peak ? before : tile_peak;
    Vec mass = zero();
    for (int t = 0; t < num_tokens; t += Vec::width) {
      const Vec weight = exp2(load(weights + t) - broadcast(peak));
      mass = mass + weight;
      store(weights + t, weight);
    }
    float factor[Vec::width];
    store(factor, exp2(broadcast(before - peak)));
    state.peak[row] = peak;
    state.mass[row] = state.mass[row] * factor[0] + sum_of_lanes(mass);
    return factor[0];
  }

  template <int R, int V>
  void add_values(int row, int64_t i, int num_tokens, const float* factors, State& state) const {
    Vec sums[R][V];
    for (int r = 0; r < R; ++r) {
      const float* from = state.sums + (row + r) * state.stride + i;
      for (int v = 0; v < V; ++v) sums[r][v] = load(from + v * Vec::width) * broadcast(factors[r]);
    }
    for (int t = 0; t < num_tokens; ++t) {
      for (int v = 0; v < V; ++v) {
        const Vec value = load(values_ + t * stride_ + i + v * Vec::width);
        for (int r = 0; r < R; ++r) sums[r][v] = fma(broadcast(weights_[r * kTileTokens + t]), value, sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float* to = state.sums + (row + r) * state.stride + i;
      for (int v = 0; v < V; ++v) store(to + v * Vec::width, sums[r][v]);
    }
  }

  int head_dim_;
  int64_t stride_;
  float scale_;
  int rows_ = 0;
  float* queries_;
  float* keys_;
  float* values_;
  float* unturned_;
  float* weights_;
};

}  // namespace
}  // namespace kv
