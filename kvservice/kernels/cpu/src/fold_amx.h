// Folds a tile of bf16 KV into running states with AMX, for head_dim in multiples of 32.
//
//   scores   [tokens][rows] = K [16 tokens][d] x Q^T      K straight from its blocks; lanes are rows, so that the
//                                                         softmax needs few sums across lanes
//   sums     [rows][d] += P [rows][tokens] x V            V interleaved by pairs of tokens once a tile
//
// Tiles of KV are gathered up to the end of a split, with their values put in order. Then two row tiles of 16 rows pass
// through all of them: what they need for themselves stays in the first-level cache, and keys and values, which come from
// the second, are loaded once for both. Where there are no more than 4 rows, a vector holds 4 tokens x 4 rows, and a tile
// is folded at once. Both add up a row's weights in the same order, by the token's number modulo 4.
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

// Transposes 4 x 4 quarters of vectors.
inline void transpose_quarters(__m512i* x) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x88), b = _mm512_shuffle_i32x4(x[0], x[1], 0xdd);
  const __m512i c = _mm512_shuffle_i32x4(x[2], x[3], 0x88), d = _mm512_shuffle_i32x4(x[2], x[3], 0xdd);
  x[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  x[1] = _mm512_shuffle_i32x4(b, d, 0x88);
  x[2] = _mm512_shuffle_i32x4(a, c, 0xdd);
  x[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// Orders of 32 half-words for permutations: half-word i comes from place of(i).
template <class Of>
__m512i half_word_order(Of&& of) {
  alignas(64) int16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(of(i));
  return _mm512_load_si512(order);
}

// Where the lanes of a vector of scores lie, and how weights become left operands; by rows at a time.
template <int Rows>
struct Lanes;

// One token a vector.
template <>
struct Lanes<16> {
  static constexpr int tokens = 1;

  static __m512i of_rows(const int32_t* rows) { return _mm512_loadu_si512(rows); }
  static Vec of_rows(const float* rows) { return load(rows); }
  static void keep(float* rows, Vec x) { store(rows, x); }
  static __m512i token_of_lane() { return _mm512_setzero_si512(); }
  static Vec max_over_tokens(const Vec* by_token) {
    return max(max(by_token[0], by_token[1]), max(by_token[2], by_token[3]));
  }
  static Vec sum_over_tokens(const Vec* by_token) {
    return (by_token[0] + by_token[1]) + (by_token[2] + by_token[3]);
  }

  // 32 tokens' weights, from `weight(token)`, to [16 rows][32 tokens].
  template <class Weight>
  static void to_operand(Weight&& weight, bf16* operand) {
    const __m512i interleave = half_word_order([](int i) { return i / 2 + i % 2 * 16; });
    __m512i words[16];
    // Unrolled, so that `weight` knows at compile time where its token stands.
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
      const Vec even = weight(2 * pair), odd = weight(2 * pair + 1);
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
      words[pair] = _mm512_permutexvar_epi16(interleave, both);
    }
    transpose(words);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(operand + r * 32, words[r]);
  }
};

// Four tokens a vector: lane = token * 4 + row.
template <>
struct Lanes<4> {
  static constexpr int tokens = 4;

  static __m512i of_rows(const int32_t* rows) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows)));
  }
  static Vec of_rows(const float* rows) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(rows))}; }
  static void keep(float* rows, Vec x) { _mm_storeu_ps(rows, _mm512_castps512_ps128(x.v)); }
  static __m512i token_of_lane() { return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3); }
  static Vec max_over_tokens(const Vec* by_token) {
    const Vec x = max(max(by_token[0], by_token[1]), max(by_token[2], by_token[3]));
    const Vec pairs = max(x, {_mm512_shuffle_f32x4(x.v, x.v, 0xb1)});
    return max(pairs, {_mm512_shuffle_f32x4(pairs.v, pairs.v, 0x4e)});
  }
  static Vec sum_over_tokens(const Vec* by_token) {
    const Vec x = by_token[0];
    const Vec pairs = x + Vec{_mm512_shuffle_f32x4(x.v, x.v, 0xb1)};
    return pairs + Vec{_mm512_shuffle_f32x4(pairs.v, pairs.v, 0x4e)};
  }

  // 32 tokens' weights, from `weight(token / 4)`, to [4 rows][32 tokens].
  template <class Weight>
  static void to_operand(Weight&& weight, bf16* operand) {
    const __m512i by_row = half_word_order([](int i) { return i % 8 * 4 + i / 8; });
    __m512i words[4];
    for (int i = 0; i < 4; ++i) {
      const Vec first = weight(2 * i), second = weight(2 * i + 1);
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
      words[i] = _mm512_permutexvar_epi16(by_row, both);
    }
    transpose_quarters(words);
    for (int r = 0; r < 4; ++r) _mm512_store_si512(operand + r * 32, words[r]);
  }
};

class AmxFold {
 public:
  using Element = bf16;

  static int64_t bytes(int head_dim, int padded_rows) {
    return padded_rows * head_dim * 2 + kTilesPerSplit * kTileTokens * head_dim * 2 + 2 * kTileTokens * 16 * (4 + 2);
  }

  AmxFold(int head_dim, int padded_rows, float scale, char* memory)
      : head_dim_(head_dim), scale_(scale * kLog2E), lines_at_once_(head_dim / 16) {
    queries_ = reinterpret_cast<bf16*>(memory);
    values_ = queries_ + padded_rows * head_dim;
    scores_ = reinterpret_cast<float*>(values_ + kTilesPerSplit * kTileTokens * head_dim);
    weights_ = reinterpret_cast<bf16*>(scores_ + 2 * kTileTokens * 16);
  }

  // Q^T of each 16 rows as right operands: [row tile][d / 32][16 pairs of d][16 rows][2].
  template <class QueryOf>
  void set_queries(int rows, QueryOf&& query_of) {
    rows_ = rows;
    num_tiles_ = 0;
    session_.set(shapes_for(rows <= 4 ? 4 : 16));
    for (int row_tile = 0; row_tile * 16 < rows; ++row_tile) {
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

  // Row r sees tokens [0, visible[r]) of those that the tile's first is number `first` of. Where the tile lies, and
  // `visible`, must stay as they are until `settle`.
  void fold(const Tile<bf16>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) {
    if (rows_ <= 4) {
      interleave_values(tile, values_, ahead);
      fold_few(tile, first, visible, ahead, state);
      return;
    }
    interleave_values(tile, values_of(num_tiles_), ahead);
    tiles_[num_tiles_] = tile;
    firsts_[num_tiles_++] = first;
    visible_ = visible;
  }

  // Before queries change within a split.
  void flush(State& state) { settle(state); }

  // At the end of a split.
  void settle(State& state) {
    if (num_tiles_ == 0) return;
    for (int row_tile = 0; row_tile * 16 < rows_; row_tile += 2) {
      if ((row_tile + 1) * 16 < rows_) {
        fold_rows<2>(row_tile, state);
      } else {
        fold_rows<1>(row_tile, state);
      }
    }
    num_tiles_ = 0;
  }

 private:
  static constexpr int kTileElements = 512;

  // With few rows, tiles 0, 1: scores. 2, 3: keys, or values. 4: queries. 5, 6: sums. 7: weights.
  static TileShapes shapes_for(int rows) {
    TileShapes shapes;
    shapes.row_bytes[0] = shapes.row_bytes[1] = shapes.row_bytes[4] = static_cast<uint16_t>(rows * 4);
    shapes.rows[5] = shapes.rows[6] = shapes.rows[7] = static_cast<uint8_t>(rows);
    return shapes;
  }

  bf16* query_tile(int row_tile, int d) const {
    return queries_ + (row_tile * (head_dim_ / 32) + d / 32) * kTileElements;
  }
  // Of two row tiles that go together.
  float* scores_of(int row_tile) const { return scores_ + row_tile % 2 * kTileTokens * 16; }
  bf16* weights_of(int row_tile) const { return weights_ + row_tile % 2 * kTileTokens * 16; }
  bf16* values_of(int tile) const { return values_ + tile * kTileTokens * head_dim_; }
  // Of a tile's, the right operand of 32 tokens and 16 numbers of d: [16 pairs of tokens][16][2].
  bf16* value_tile(bf16* values, int half, int d) const {
    return values + (half * (head_dim_ / 16) + d / 16) * kTileElements;
  }

  void interleave_values(const Tile<bf16>& tile, bf16* values, Ahead& ahead) const {
    const __m512i first_half = half_word_order([](int i) { return i / 2 + i % 2 * 32; });
    const __m512i last_half = half_word_order([](int i) { return i / 2 + 16 + i % 2 * 32; });
    const int num_blocks = tile.num_blocks();
    for (int b = 0; b < num_blocks; ++b) {
      for (int t = 0; t < kBlockTokens; t += 2) {
        const bf16* even = tile.values[b] + t * tile.stride;
        bf16* to = value_tile(values, b / 2, 0) + (b % 2 * 8 + t / 2) * 32;
        ahead.fetch(2 * lines_at_once_);
        for (int d = 0; d < head_dim_; d += 32, to += 2 * kTileElements) {
          const __m512i x = _mm512_loadu_si512(even + d), y = _mm512_loadu_si512(even + tile.stride + d);
          _mm512_store_si512(to, _mm512_permutex2var_epi16(x, first_half, y));
          _mm512_store_si512(to + kTileElements, _mm512_permutex2var_epi16(x, last_half, y));
        }
      }
    }
    if (num_blocks % 2 == 0) return;
    for (int d = 0; d < head_dim_; d += 16) {
      std::memset(static_cast<void*>(value_tile(values, num_blocks / 2, d) + 8 * 32), 0, kTileElements);
    }
  }

  void fold_few(const Tile<bf16>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) const {
    if (visible[15] <= first) return;
    for (int b = 0; b < tile.num_blocks(); b += 2) score_few(tile, b);
    const int num_tokens = tile.num_blocks() * kBlockTokens;
    weigh<4>(num_tokens, first, visible, 0, ahead, state);
    for (int d = 0; d < head_dim_; d += 32) add_values_few(num_tokens > 32, d, state);
  }

  // Two blocks' scores, [token][4].
  void score_few(const Tile<bf16>& tile, int block) const {
    const bf16* first = tile.keys[block];
    const bf16* second = tile.keys[second_block(tile, block)];
    const ptrdiff_t stride = tile.stride * 2;
    tile::clear<0>();
    tile::clear<1>();
    for (int d = 0; d < head_dim_; d += 32) {
      tile::load<4>(query_tile(0, d), 64);
      tile::load<2>(first + d, stride);
      tile::multiply<0, 2, 4>();
      tile::load<3>(second + d, stride);
      tile::multiply<1, 3, 4>();
    }
    float* scores = scores_ + block * kBlockTokens * 4;
    tile::store<0>(scores, 4 * 4);
    tile::store<1>(scores + kBlockTokens * 4, 4 * 4);
  }

  // A second block that isn't there repeats the first: its scores are never read.
  static int second_block(const Tile<bf16>& tile, int block) { return block + (block + 1 < tile.num_blocks()); }

  // N row tiles through all tiles of KV, with few AMX tiles in use (see tiles_amx.h). The next tile's scores come between weights and their products with values: a
  // tile load can't take from a store under way.
  template <int N>
  void fold_rows(int row_tile, State& state) const {
    int seen = 0;
    while (seen < num_tiles_ && visible_[(row_tile + N) * 16 - 1] > firsts_[seen]) ++seen;
    if (seen == 0) return;
    Ahead nothing;
    score<N>(tiles_[0], row_tile);
    for (int i = 0; i < seen; ++i) {
      const int num_tokens = tiles_[i].num_blocks() * kBlockTokens;
      for (int n = 0; n < N; ++n) weigh<16>(num_tokens, firsts_[i], visible_, row_tile + n, nothing, state);
      if (i + 1 < seen) score<N>(tiles_[i + 1], row_tile);
      for (int d = 0; d < head_dim_; d += 16) add_values<N>(values_of(i), num_tokens > 32, d, row_tile, state);
    }
  }

  // A tile's scores, [token][16 rows], of N row tiles.
  template <int N>
  void score(const Tile<bf16>& tile, int row_tile) const {
    const ptrdiff_t stride = tile.stride * 2;
    for (int block = 0; block < tile.num_blocks(); ++block) {
      tile::clear<0>();
      if (N > 1) tile::clear<1>();
      for (int d = 0; d < head_dim_; d += 32) {
        tile::load<2>(tile.keys[block] + d, stride);
        tile::load<3>(query_tile(row_tile, d), 64);
        tile::multiply<0, 2, 3>();
        tile::clear<3>();
        if (N > 1) {
          tile::load<4>(query_tile(row_tile + 1, d), 64);
          tile::multiply<1, 2, 4>();
          tile::clear<4>();
        }
        tile::clear<2>();
      }
      tile::store<0>(scores_of(row_tile) + block * kBlockTokens * 16, 64);
      if (N > 1) tile::store<1>(scores_of(row_tile + 1) + block * kBlockTokens * 16, 64);
    }
  }

  // Scores to weights, as left operands [half][Rows][32 tokens]; shrinks the rows' earlier sums.
  template <int Rows>
  void weigh(int num_tokens, int first, const int32_t* visible, int row_tile, Ahead& ahead, State& state) const {
    using In = Lanes<Rows>;
    float* scores = scores_of(row_tile);
    visible += row_tile * 16;
    constexpr int kAtOnce = 16;  // tokens, a block's
    constexpr int kVectors = kAtOnce / In::tokens;
    const Vec scale = broadcast(scale_), hidden = broadcast(kHidden);
    // Rows are in the order of queries, so the first sees least.
    if (visible[0] - first < num_tokens) hide<Rows>(num_tokens, first, visible, scores);
    Vec highest[4] = {hidden, hidden, hidden, hidden};
    for (int t = 0; t < num_tokens; t += kAtOnce) {
      for (int v = 0; v < kVectors; ++v) highest[v % 4] = max(highest[v % 4], load(scores + t * Rows + v * 16));
    }
    float* peaks = state.peak + row_tile * 16;
    float* masses = state.mass + row_tile * 16;
    const Vec before = In::of_rows(peaks);
    const Vec found = In::max_over_tokens(highest) * scale;
    const __mmask16 rises = _mm512_cmp_ps_mask(found.v, (before + broadcast(kSlack)).v, _CMP_GT_OQ);
    const Vec peak{_mm512_mask_mov_ps(before.v, rises, found.v)};
    const Vec factor = rough_exp2(before - peak);
    In::keep(peaks, peak);

    const Vec below = zero() - peak;
    Vec mass[4] = {zero(), zero(), zero(), zero()};
    for (int half = 0; half * 32 < num_tokens; ++half) {
      const float* of_half = scores + half * 32 * Rows;
      const int num_vectors = smaller(32, num_tokens - half * 32) / In::tokens;
      In::to_operand(
          [&](int v) {
            if (v >= num_vectors) return zero();
            if (In::tokens > 1) ahead.fetch(lines_at_once_);
            const Vec weight = rough_exp2(fma(load(of_half + v * 16), scale, below));
            Vec& sum = mass[In::tokens == 1 ? v % 4 : 0];
            sum = sum + weight;
            return weight;
          },
          weights_of(row_tile) + half * kTileElements);
    }
    In::keep(masses, fma(In::of_rows(masses), factor, In::sum_over_tokens(mass)));

    if (rises == 0) return;
    alignas(64) float factors[16];
    store(factors, factor);
    for (int r = 0; r < Rows; ++r) {
      float* sums = state.sums + (row_tile * 16 + r) * state.stride;
      for (int d = 0; d < head_dim_; d += Vec::width) store(sums + d, load(sums + d) * broadcast(factors[r]));
    }
  }

  // Scores of tokens that a row doesn't see become ones whose weight is exactly 0.
  template <int Rows>
  void hide(int num_tokens, int first, const int32_t* visible, float* scores) const {
    using In = Lanes<Rows>;
    const __m512i limit = _mm512_sub_epi32(In::of_rows(visible), _mm512_set1_epi32(first));
    // Far enough down, whatever the scale.
    const __m512 hidden = _mm512_set1_ps(kHidden / scale_);
    for (int t = 0; t < num_tokens; t += In::tokens) {
      const __m512i token = _mm512_add_epi32(In::token_of_lane(), _mm512_set1_epi32(t));
      float* at = scores + t * Rows;
      const __mmask16 is_seen = _mm512_cmplt_epi32_mask(token, limit);
      _mm512_storeu_ps(at, _mm512_mask_mov_ps(hidden, is_seen, _mm512_loadu_ps(at)));
    }
  }

  // 32 numbers of d of the sums.
  void add_values_few(bool has_both, int d, State& state) const {
    float* sums = state.sums + d;
    const ptrdiff_t stride_bytes = state.stride * 4;
    tile::load<5>(sums, stride_bytes);
    tile::load<6>(sums + 16, stride_bytes);
    for (int half = 0; half < (has_both ? 2 : 1); ++half) {
      tile::load<7>(weights_ + half * kTileElements, 64);
      tile::load<2>(value_tile(values_, half, d), 64);
      tile::multiply<5, 7, 2>();
      tile::load<3>(value_tile(values_, half, d + 16), 64);
      tile::multiply<6, 7, 3>();
    }
    tile::store<5>(sums, stride_bytes);
    tile::store<6>(sums + 16, stride_bytes);
  }

  // Of N row tiles, 16 numbers of d.
  template <int N>
  void add_values(bf16* values, bool has_both, int d, int row_tile, State& state) const {
    float* sums = state.sums + row_tile * 16 * state.stride + d;
    float* more = sums + 16 * state.stride;
    const ptrdiff_t stride_bytes = state.stride * 4;
    tile::load<0>(sums, stride_bytes);
    if (N > 1) tile::load<1>(more, stride_bytes);
    for (int half = 0; half < (has_both ? 2 : 1); ++half) {
      tile::load<2>(value_tile(values, half, d), 64);
      tile::load<3>(weights_of(row_tile) + half * kTileElements, 64);
      tile::multiply<0, 3, 2>();
      tile::clear<3>();
      if (N > 1) {
        tile::load<4>(weights_of(row_tile + 1) + half * kTileElements, 64);
        tile::multiply<1, 4, 2>();
        tile::clear<4>();
      }
      tile::clear<2>();
    }
    tile::store<0>(sums, stride_bytes);
    tile::clear<0>();
    if (N > 1) {
      tile::store<1>(more, stride_bytes);
      tile::clear<1>();
    }
  }

  int head_dim_;
  float scale_;
  int lines_at_once_;  // fetched ahead: a part of a tile's 4 * head_dim
  int rows_ = 0;
  bf16* queries_;
  bf16* values_;
  float* scores_;
  bf16* weights_;
  const int32_t* visible_ = nullptr;
  int num_tiles_ = 0;
  Tile<bf16> tiles_[kTilesPerSplit];  // gathered
  int firsts_[kTilesPerSplit];
  TileSession session_;
};

}  // namespace
}  // namespace kv
