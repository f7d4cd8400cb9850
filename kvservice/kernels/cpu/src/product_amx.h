// Products of bf16 rows with a packed panel by AMX tiles: 32 rows x 16 columns at a time, with few tiles in use (see
// tiles_amx.h): 2 x 2 tiles of results would need fewer loads, and be no faster at best and half as fast at worst.
#pragma once

#include <immintrin.h>

#include "packing.h"
#include "tiles_amx.h"

namespace kv {
namespace {

struct AmxProduct {
  using Weight = bf16;
  using Activation = bf16;
  static constexpr int row_block = 32;

  // c[rows][32] = a[rows][k] x panel; rows <= 32.
  void compute(const bf16* a, ptrdiff_t a_stride, int rows, const bf16* panel, int num_blocks, PanelAhead ahead,
               float* c) {
    session_.use(shapes_of(rows));
    if (rows <= 16) {
      compute_one(a, a_stride, panel, num_blocks, c);
    } else {
      compute_two(a, a_stride, panel, num_blocks, ahead, c);
    }
  }

 private:
  static constexpr int kBlockBytes = kBlockElements * 2;
  // With few rows the time is that of reading the weights, and the processor's own prefetching reaches too short.
  static constexpr int kPrefetchBytes = 12 * 1024;
  static constexpr int kResultStride = kPanelColumns * 4;

  // Result 0 is of operand 4, the first 16 rows; result 1 of operand 5, the rest. Of 16 rows or fewer, both are of 4.
  static TileShapes shapes_of(int rows) {
    TileShapes shapes;
    const auto first = static_cast<uint8_t>(rows < 16 ? rows : 16);
    const auto second = static_cast<uint8_t>(rows <= 16 ? 16 : rows - 16);
    shapes.rows[0] = shapes.rows[4] = first;
    shapes.rows[5] = second;
    shapes.rows[1] = rows <= 16 ? first : second;
    return shapes;
  }

  static void compute_one(const bf16* a, ptrdiff_t a_stride, const bf16* panel, int num_blocks, float* c) {
    tile::clear<0>();
    tile::clear<1>();
    for (int block = 0; block < num_blocks; ++block, panel += 2 * kBlockElements, a += kBlockDepth) {
      const char* ahead = reinterpret_cast<const char*>(panel) + kPrefetchBytes;
      for (int line = 0; line < 2 * kBlockBytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
      tile::load<4>(a, a_stride * 2);
      tile::load<6>(panel, 64);
      tile::multiply<0, 4, 6>();
      tile::clear<6>();
      tile::load<7>(panel + kBlockElements, 64);
      tile::multiply<1, 4, 7>();
      tile::clear<7>();
      tile::clear<4>();
    }
    tile::store<0>(c, kResultStride);
    tile::store<1>(c + kHalfColumns, kResultStride);
  }

  static void compute_two(const bf16* a, ptrdiff_t a_stride, const bf16* panel, int num_blocks, PanelAhead ahead,
                          float* c) {
    const int lines = (kBlockBytes / 64 + ahead.parts - 1) / ahead.parts;
    const char* fetched = static_cast<const char*>(ahead.panel) + ahead.part * lines * 64;
    for (int half = 0; half < 2; ++half, panel += kBlockElements, fetched += kBlockBytes, c += kHalfColumns) {
      tile::clear<0>();
      tile::clear<1>();
      for (int block = 0; block < num_blocks; ++block) {
        for (int line = 0; line < lines; ++line) {
          _mm_prefetch(fetched + block * 2 * kBlockBytes + line * 64, _MM_HINT_T1);
        }
        const bf16* rows = a + block * kBlockDepth;
        tile::load_passing<6>(panel + block * 2 * kBlockElements, 64);
        tile::load<4>(rows, a_stride * 2);
        tile::multiply<0, 4, 6>();
        tile::clear<4>();
        tile::load<5>(rows + 16 * a_stride, a_stride * 2);
        tile::multiply<1, 5, 6>();
        tile::clear<5>();
        tile::clear<6>();
      }
      tile::store<0>(c, kResultStride);
      tile::store<1>(c + 16 * kPanelColumns, kResultStride);
    }
  }

  TileSession session_;
};

}  // namespace
}  // namespace kv
