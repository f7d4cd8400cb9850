// Folds a tile of bf16 KV into the states of a few rows with AMX, straight from where it lies: for decoding, where the
// tile is read once. head_dim is a multiple of 32.
//
//   scores   [tokens][4 rows] = K [16 tokens][d] x Q^T
//   sums     [2 x rows][d / 2] += P [2 x rows][tokens] x V
//
// A right operand holds pairs of numbers, which neighbouring numbers of the left one are multiplied by and added up.
// Values have pairs of d there, not pairs of tokens. So the left operand has each row's weights twice, each time with
// a zero beside it: the first half of its rows takes the even numbers of d, the other half the odd ones. The matrix
// unit has rows to spare, and values stay where they are. `settle` puts the sums in order.
#pragma once

#include <immintrin.h>

#include <initializer_list>

#include "attention.h"
#include "tiles_amx.h"

namespace kv {
namespace {

class FewRowsFold {
 public:
  using Element = bf16;
  static constexpr int kMostRows = 8;

  static int64_t bytes(int head_dim) {
    return kMostQuads * (head_dim * 8 + kTileTokens * 16) + kTileBlocks * kWeightWords * 4 + kMostRows * 64;
  }

  FewRowsFold(int head_dim, float scale, char* memory) : head_dim_(head_dim), scale_(scale * kLog2E) {
    weights_ = reinterpret_cast<uint32_t*>(memory);
    masses_ = reinterpret_cast<float*>(weights_ + kTileBlocks * kWeightWords);
    scores_ = masses_ + kMostRows * Vec::width;
    queries_ = reinterpret_cast<uint32_t*>(scores_ + kMostQuads * kTileTokens * 4);
    std::memset(masses_, 0, kMostRows * Vec::width * sizeof(float));
  }

  static bool takes(int /*head_dim*/, int rows) { return rows <= kMostRows; }

  // Q^T of each 4 rows as right operands: [quad][d / 2][4 rows][2].
  template <class QueryOf>
  void set_queries(int rows, QueryOf&& query_of) {
    rows_ = rows;
    for (int row = 0; row < kMostRows; ++row) {
      uint32_t* to = queries_ + row / 4 * (head_dim_ / 2 * 4) + row % 4;
      // Rows that aren't there repeat the last.
      const bf16* query = query_of(smaller(row, rows - 1));
      for (int pair = 0; pair < head_dim_ / 2; ++pair) std::memcpy(to + pair * 4, query + 2 * pair, 4);
    }
    session_.set(shapes_for(rows));
  }

  // Row r sees tokens [0, visible[r]) of those that the tile's first is number `first` of.
  void fold(const Tile<bf16>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) {
    const int num_blocks = tile.num_blocks();
    for (int row = 0; row < rows_; row += 4) {
      for (int b = 0; b < num_blocks; b += 2) score(tile, b, row / 4, ahead);
    }
    for (int row = 0; row < rows_; row += 4) {
      switch (smaller(rows_ - row, 4)) {
        case 1: weigh<1>(row, num_blocks, first, visible, state); break;
        case 2: weigh<2>(row, num_blocks, first, visible, state); break;
        case 3: weigh<3>(row, num_blocks, first, visible, state); break;
        default: weigh<4>(row, num_blocks, first, visible, state); break;
      }
    }
    for (int d = 0; d < head_dim_; d += 64) {
      if (d + 64 <= head_dim_) {
        add_values<2>(tile, d, ahead, state);
      } else {
        add_values<1>(tile, d, ahead, state);
      }
    }
  }

  // Puts the sums of folded tiles in order.
  void settle(State& state) {
    for (int row = 0; row < rows_; ++row) {
      float* sums = state.sums + row * state.stride;
      const float* odd_sums = state.sums + (rows_ + row) * state.stride;
      // From the end, so that nothing is overwritten that is still to be read.
      for (int d = head_dim_ - 32; d >= 0; d -= 32) {
        const Vec even = load(sums + d / 2), odd = load(odd_sums + d / 2);
        store(sums + d, first_pairs(even, odd));
        store(sums + d + 16, last_pairs(even, odd));
      }
      state.mass[row] += sum_of_lanes(load(masses_ + row * Vec::width));
    }
    std::memset(masses_, 0, kMostRows * Vec::width * sizeof(float));
  }

 private:
  static constexpr int kMostQuads = kMostRows / 4;
  static constexpr int kWeightWords = 2 * kMostRows * kBlockTokens;  // of a block
  // Fetched ahead at each use of a block: makes up a tile.
  static constexpr int kLinesAtOnce = 16;

  // Tiles 0, 1: scores. 2: queries. 3, 4: keys, or values. 5: weights. 6, 7: sums.
  static TileShapes shapes_for(int rows) {
    TileShapes shapes;
    shapes.row_bytes[0] = shapes.row_bytes[1] = shapes.row_bytes[2] = 16;
    shapes.rows[5] = shapes.rows[6] = shapes.rows[7] = static_cast<uint8_t>(2 * rows);
    return shapes;
  }

  // Scores of two blocks and a quad of rows, [token][4 rows].
  void score(const Tile<bf16>& tile, int block, int quad, Ahead& ahead) const {
    const bf16* first = tile.keys[block];
    // A second block that isn't there repeats the first: its scores are never read.
    const bf16* second = tile.keys[block + 1 < tile.num_blocks() ? block + 1 : block];
    const uint32_t* queries = queries_ + quad * (head_dim_ / 2 * 4);
    tile::clear<0>();
    tile::clear<1>();
    for (int d = 0; d < head_dim_; d += 32) {
      tile::load<2>(queries + d / 2 * 4, 16);
      tile::load<3>(first + d, tile.stride * 2);
      tile::multiply<0, 3, 2>();
      tile::clear<3>();
      ahead.fetch(kLinesAtOnce);
      tile::load<4>(second + d, tile.stride * 2);
      tile::multiply<1, 4, 2>();
      tile::clear<4>();
      tile::clear<2>();
      ahead.fetch(kLinesAtOnce);
    }
    float* scores = scores_ + (quad * kTileTokens + block * kBlockTokens) * 4;
    tile::store<0>(scores, 16);
    tile::store<1>(scores + kBlockTokens * 4, 16);
    tile::clear<0>();
    tile::clear<1>();
  }

  // Scores of R rows to weights, as left operands [block][2 x rows][16 tokens].
  template <int R>
  void weigh(int row, int num_blocks, int first, const int32_t* visible, State& state) const {
    const Vec scale = broadcast(scale_), hidden = broadcast(kHidden);
    // Rows are in the order of queries, so the first sees least.
    const bool hides = visible[row] - first < num_blocks * kBlockTokens;
    Vec scores[kTileBlocks][4];
    Vec highest[R];
    for (int r = 0; r < R; ++r) highest[r] = hidden;
    // The bound is a constant for the compiler, so that all scores stay in registers.
    for (int b = 0; b < kTileBlocks && b < num_blocks; ++b) {
      by_row(scores_ + row * kTileTokens + b * kBlockTokens * 4, scores[b]);
      for (int r = 0; r < R; ++r) {
        scores[b][r] = scores[b][r] * scale;
        if (hides) scores[b][r] = keep_first(scores[b][r], visible[row + r] - first - b * kBlockTokens, hidden);
        highest[r] = max(highest[r], scores[b][r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      if (lanes_at_least(highest[r], broadcast(state.peak[row + r] + kSlack))) {
        raise_peak(row + r, max_of_lanes(highest[r]), state);
      }
      const Vec peak = broadcast(state.peak[row + r]);
      float* masses = masses_ + (row + r) * Vec::width;
      Vec mass = load(masses);
      for (int b = 0; b < kTileBlocks && b < num_blocks; ++b) {
        const Vec weight = rough_exp2(scores[b][r] - peak);
        mass = mass + weight;
        store_weights(weight, weights_ + b * kWeightWords + (row + r) * kBlockTokens);
      }
      store(masses, mass);
    }
  }

  // Four rows' scores of a block, each in a vector.
  static void by_row(const float* scores, Vec* rows) {
    __m512i x[4], y[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(scores + i * 16);
    for (int i = 0; i < 2; ++i) {
      y[i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
      y[2 + i] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < 2; ++i) {
      const __m512i even = _mm512_unpacklo_epi64(y[2 * i], y[2 * i + 1]);
      const __m512i odd = _mm512_unpackhi_epi64(y[2 * i], y[2 * i + 1]);
      rows[2 * i].v = _mm512_castsi512_ps(_mm512_permutexvar_epi32(in_order, even));
      rows[2 * i + 1].v = _mm512_castsi512_ps(_mm512_permutexvar_epi32(in_order, odd));
    }
  }

  // Rounded to bf16: beside a zero for the even numbers of d, and the other way round for the odd ones.
  void store_weights(Vec weights, uint32_t* even) const {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(weights.v), _mm512_set1_epi32(0x8000));
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    _mm512_store_si512(even, _mm512_srli_epi32(rounded, 16));
    _mm512_store_si512(even + rows_ * kBlockTokens, _mm512_and_si512(rounded, upper));
  }

  void raise_peak(int row, float peak, State& state) const {
    const Vec factor = rough_exp2(broadcast(state.peak[row] - peak));
    state.peak[row] = peak;
    float* masses = masses_ + row * Vec::width;
    store(masses, load(masses) * factor);
    for (float* sums : {state.sums + row * state.stride, state.sums + (rows_ + row) * state.stride}) {
      for (int i = 0; i < head_dim_ / 2; i += Vec::width) store(sums + i, load(sums + i) * factor);
    }
  }

  // 32 C numbers of d of the sums.
  template <int C>
  void add_values(const Tile<bf16>& tile, int d, Ahead& ahead, State& state) const {
    float* sums = state.sums + d / 2;
    tile::load<6>(sums, state.stride * 4);
    if (C == 2) tile::load<7>(sums + 16, state.stride * 4);
    for (int b = 0; b < tile.num_blocks(); ++b) {
      const bf16* values = tile.values[b] + d;
      tile::load<5>(weights_ + b * kWeightWords, 64);
      tile::load<3>(values, tile.stride * 2);
      tile::multiply<6, 5, 3>();
      tile::clear<3>();
      ahead.fetch(kLinesAtOnce);
      if (C == 2) {
        tile::load<4>(values + 32, tile.stride * 2);
        tile::multiply<7, 5, 4>();
        tile::clear<4>();
        ahead.fetch(kLinesAtOnce);
      }
      tile::clear<5>();
    }
    tile::store<6>(sums, state.stride * 4);
    tile::clear<6>();
    if (C == 2) {
      tile::store<7>(sums + 16, state.stride * 4);
      tile::clear<7>();
    }
  }

  int head_dim_;
  float scale_;
  int rows_ = 0;
  uint32_t* weights_;  // pairs of bf16
  float* masses_;      // of each row, a vector's lanes still apart
  float* scores_;
  uint32_t* queries_;  // pairs of bf16
  TileSession session_;
};

}  // namespace
}  // namespace kv
