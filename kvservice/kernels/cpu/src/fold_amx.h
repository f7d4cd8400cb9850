// Folds a tile of bf16 KV into running states with AMX, for head_dim in multiples of 32.
//
//   scores   [tokens][16 rows] = K [16 tokens][d] x Q^T      K straight from its blocks; lanes are rows, so that the
//                                                            softmax needs no sums across lanes
//   sums     [16 rows][d] += P [16 rows][tokens] x V         V interleaved by pairs of tokens once a tile
#pragma once

#include <immintrin.h>

#include "attention.h"
#include "tiles_amx.h"

namespace kv {
namespace {

// Transposes 16 x 16 words.
inline void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c);
    y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d);
    y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// The 16 words (low[i], high[i]) of two vectors of 32 half-words: of their first 16, or of their last 16.
inline __m512i interleave_order(bool last) {
  alignas(64) int16_t order[32];
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = static_cast<int16_t>(i + (last ? 16 : 0));
    order[2 * i + 1] = static_cast<int16_t>(32 + i + (last ? 16 : 0));
  }
  return _mm512_load_si512(order);
}

class AmxFold {
 public:
  using Element = bf16;

  static int64_t bytes(int head_dim, int padded_rows) {
    return padded_rows * head_dim * 2 + kTileTokens * head_dim * 2 + kTileTokens * 16 * 4 + kTileTokens * 16 * 2;
  }

  AmxFold(int head_dim, int padded_rows, float scale, char* memory) : head_dim_(head_dim), scale_(scale) {
    queries_ = reinterpret_cast<bf16*>(memory);
    values_ = queries_ + padded_rows * head_dim;
    scores_ = reinterpret_cast<float*>(values_ + kTileTokens * head_dim);
    weights_ = reinterpret_cast<bf16*>(scores_ + kTileTokens * 16);
  }

  // Q^T of each 16 rows as right operands: [row tile][d / 32][16 pairs of d][16 rows][2].
  template <class QueryOf>
  void set_queries(int rows, QueryOf&& query_of) {
    num_row_tiles_ = static_cast<int>(divide_up(rows, 16));
    for (int row_tile = 0; row_tile < num_row_tiles_; ++row_tile) {
      for (int d = 0; d < head_dim_; d += 32) {
        __m512i words[16];
        for (int r = 0; r < 16; ++r) {
          const int row = row_tile * 16 + r;
          words[r] = row < rows ? _mm512_loadu_si512(query_of(row) + d) : _mm512_setzero_si512();
        }
        transpose(words);
        for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(query_tile(row_tile, d) + pair * 32, words[pair]);
      }
    }
  }

  // Row r sees tokens [0, visible[r]) of those that the tile's first is number `first` of.
  void fold(const Tile<bf16>& tile, int first, const int32_t* visible, State& state) {
    interleave_values(tile);
    const int num_tokens = tile.num_blocks() * kBlockTokens;
    for (int row_tile = 0; row_tile < num_row_tiles_; ++row_tile) {
      const int32_t* seen = visible + row_tile * 16;
      if (seen[15] <= first) continue;
      score(tile, row_tile);
      weigh(num_tokens, first, seen, row_tile, state);
      add_values(num_tokens, state.sums + row_tile * 16 * state.stride, state.stride);
    }
  }

 private:
  static constexpr int kTileElements = 512;
  static constexpr int kScoreStride = 16;

  bf16* query_tile(int row_tile, int d) const {
    return queries_ + (row_tile * (head_dim_ / 32) + d / 32) * kTileElements;
  }
  // Right operand of 32 tokens and 16 numbers of d: [16 pairs of tokens][16][2].
  bf16* value_tile(int half, int d) const { return values_ + (half * (head_dim_ / 16) + d / 16) * kTileElements; }

  void interleave_values(const Tile<bf16>& tile) const {
    const __m512i first_order = interleave_order(false), last_order = interleave_order(true);
    const int num_tokens = static_cast<int>(round_up(tile.num_blocks(), 2)) * kBlockTokens;
    for (int t = 0; t < num_tokens; t += 2) {
      const bool is_there = t < tile.num_blocks() * kBlockTokens;
      const bf16* even = tile.values[is_there ? t / kBlockTokens : 0] + t % kBlockTokens * tile.stride;
      const int row = t % 32 / 2 * 32;
      for (int d = 0; d < head_dim_; d += 32) {
        const __m512i a = is_there ? _mm512_loadu_si512(even + d) : _mm512_setzero_si512();
        const __m512i b = is_there ? _mm512_loadu_si512(even + tile.stride + d) : _mm512_setzero_si512();
        _mm512_store_si512(value_tile(t / 32, d) + row, _mm512_permutex2var_epi16(a, first_order, b));
        _mm512_store_si512(value_tile(t / 32, d + 16) + row, _mm512_permutex2var_epi16(a, last_order, b));
      }
    }
  }

  void score(const Tile<bf16>& tile, int row_tile) const {
    // Blocks that aren't there repeat the first: their scores are never read.
    const bf16* keys[kTileBlocks];
    for (int b = 0; b < kTileBlocks; ++b) keys[b] = tile.keys[b < tile.num_blocks() ? b : 0];
    const ptrdiff_t stride = tile.stride * 2;
    tile::clear<0>();
    tile::clear<1>();
    tile::clear<2>();
    tile::clear<3>();
    for (int d = 0; d < head_dim_; d += 32) {
      tile::load<6>(query_tile(row_tile, d), 64);
      tile::load<4>(keys[0] + d, stride);
      tile::multiply<0, 4, 6>();
      tile::load<5>(keys[1] + d, stride);
      tile::multiply<1, 5, 6>();
      tile::load<4>(keys[2] + d, stride);
      tile::multiply<2, 4, 6>();
      tile::load<5>(keys[3] + d, stride);
      tile::multiply<3, 5, 6>();
    }
    tile::store<0>(scores_, kScoreStride * 4);
    tile::store<1>(scores_ + 16 * kScoreStride, kScoreStride * 4);
    tile::store<2>(scores_ + 32 * kScoreStride, kScoreStride * 4);
    tile::store<3>(scores_ + 48 * kScoreStride, kScoreStride * 4);
  }

  // Scores to weights, as left operands [half][16 rows][32 tokens]; shrinks the rows' earlier sums.
  void weigh(int num_tokens, int first, const int32_t* seen, int row_tile, State& state) const {
    const Vec scale = broadcast(scale_);
    const __m512i limit = _mm512_sub_epi32(_mm512_loadu_si512(seen), _mm512_set1_epi32(first));
    // Rows are in the order of queries, so the first sees least.
    const bool all_seen = seen[0] - first >= num_tokens;
    Vec highest[2] = {broadcast(kHidden), broadcast(kHidden)};
    for (int t = 0; t < num_tokens; ++t) {
      Vec score = load(scores_ + t * kScoreStride) * scale;
      if (!all_seen) {
        const __mmask16 is_seen = _mm512_cmplt_epi32_mask(_mm512_set1_epi32(t), limit);
        score.v = _mm512_mask_mov_ps(broadcast(kHidden).v, is_seen, score.v);
      }
      store(scores_ + t * kScoreStride, score);
      highest[t % 2] = max(highest[t % 2], score);
    }
    float* peaks = state.peak + row_tile * 16;
    float* masses = state.mass + row_tile * 16;
    const Vec before = load(peaks);
    const Vec peak = max(before, max(highest[0], highest[1]));
    const Vec factor = exp(before - peak);
    store(peaks, peak);

    const __m512i order = interleave_order(false);
    Vec mass[2] = {zero(), zero()};
    for (int half = 0; half * 32 < num_tokens; ++half) {
      __m512i words[16];
      for (int pair = 0; pair < 16; ++pair) {
        const int t = half * 32 + pair * 2;
        if (t >= num_tokens) {
          words[pair] = _mm512_setzero_si512();
          continue;
        }
        const Vec even = exp(load(scores_ + t * kScoreStride) - peak);
        const Vec odd = exp(load(scores_ + (t + 1) * kScoreStride) - peak);
        mass[0] = mass[0] + even;
        mass[1] = mass[1] + odd;
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
        words[pair] = _mm512_permutex2var_epi16(both, order, _mm512_shuffle_i64x2(both, both, 0xee));
      }
      transpose(words);
      for (int r = 0; r < 16; ++r) _mm512_store_si512(weights_ + half * kTileElements + r * 32, words[r]);
    }
    store(masses, fma(load(masses), factor, mass[0] + mass[1]));

    const __mmask16 shrinks = _mm512_cmp_ps_mask(factor.v, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
    if (shrinks == 0) return;
    alignas(64) float factors[16];
    store(factors, factor);
    for (int r = 0; r < 16; ++r) {
      float* sums = state.sums + (row_tile * 16 + r) * state.stride;
      for (int d = 0; d < head_dim_; d += Vec::width) store(sums + d, load(sums + d) * broadcast(factors[r]));
    }
  }

  void add_values(int num_tokens, float* sums, ptrdiff_t stride) const {
    const bool has_both = num_tokens > 32;
    tile::load<6>(weights_, 64);
    if (has_both) tile::load<7>(weights_ + kTileElements, 64);
    for (int d = 0; d < head_dim_; d += 32) {
      // Every other time another pair of registers, so that one pair's latency hides behind the other's.
      if (d / 32 % 2 == 0) {
        add_to<0, 1>(d, has_both, sums + d, stride * 4);
      } else {
        add_to<2, 3>(d, has_both, sums + d, stride * 4);
      }
    }
  }

  template <int First, int Second>
  void add_to(int d, bool has_both, float* sums, ptrdiff_t stride_bytes) const {
    tile::load<First>(sums, stride_bytes);
    tile::load<Second>(sums + 16, stride_bytes);
    tile::load<4>(value_tile(0, d), 64);
    tile::multiply<First, 6, 4>();
    tile::load<5>(value_tile(0, d + 16), 64);
    tile::multiply<Second, 6, 5>();
    if (has_both) {
      tile::load<4>(value_tile(1, d), 64);
      tile::multiply<First, 7, 4>();
      tile::load<5>(value_tile(1, d + 16), 64);
      tile::multiply<Second, 7, 5>();
    }
    tile::store<First>(sums, stride_bytes);
    tile::store<Second>(sums + 16, stride_bytes);
  }

  int head_dim_;
  float scale_;
  int num_row_tiles_ = 0;
  bf16* queries_;
  bf16* values_;
  float* scores_;
  bf16* weights_;
  TileSession session_;
};

}  // namespace
}  // namespace kv
