// Products of bf16 rows with a packed panel by AMX tiles: 32 rows x 32 columns at a time.
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

  // Results 0, 1 are of operand 4, the first 16 rows; results 2, 3 of operand 5, the rest.
  static TileShapes shapes_of(int rows) {
    TileShapes shapes;
    const auto first = static_cast<uint8_t>(rows < 16 ? rows : 16);
    const auto second = static_cast<uint8_t>(rows <= 16 ? 16 : rows - 16);
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = first;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = second;
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
      tile::load<7>(panel + kBlockElements, 64);
      tile::multiply<1, 4, 7>();
    }
    tile::store<0>(c, kResultStride);
    tile::store<1>(c + kHalfColumns, kResultStride);
  }

  static void compute_two(const bf16* a, ptrdiff_t a_stride, const bf16* panel, int num_blocks, PanelAhead ahead,
                          float* c) {
    const int lines = (2 * kBlockBytes / 64 + ahead.parts - 1) / ahead.parts;
    const char* fetched = static_cast<const char*>(ahead.panel) + ahead.part * lines * 64;
    const bf16* lower = a + 16 * a_stride;
    tile::clear<0>();
    tile::clear<1>();
    tile::clear<2>();
    tile::clear<3>();
    for (int block = 0; block < num_blocks; ++block, panel += 2 * kBlockElements, fetched += 2 * kBlockBytes) {
      for (int line = 0; line < lines; ++line) _mm_prefetch(fetched + line * 64, _MM_HINT_T1);
      tile::load_passing<6>(panel, 64);
      tile::load<4>(a + block * kBlockDepth, a_stride * 2);
      tile::load_passing<7>(panel + kBlockElements, 64);
      tile::load<5>(lower + block * kBlockDepth, a_stride * 2);
      tile::multiply<0, 4, 6>();
      tile::multiply<1, 4, 7>();
      tile::multiply<2, 5, 6>();
      tile::multiply<3, 5, 7>();
    }
    tile::store<0>(c, kResultStride);
    tile::store<1>(c + kHalfColumns, kResultStride);
    tile::store<2>(c + 16 * kPanelColumns, kResultStride);
    tile::store<3>(c + 16 * kPanelColumns + kHalfColumns, kResultStride);
  }

  TileSession session_;
};

}  // namespace
}  // namespace kv
