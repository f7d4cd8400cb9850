// The eight AMX tile registers. A tile is 16 rows of 64 bytes here; left operands may have fewer rows.
//
//   multiply<c, a, b>:  C[m][n] += sum over 16 pairs p of  A[m][2p] * B[p][2n] + A[m][2p + 1] * B[p][2n + 1]
//
// A tile that holds anything takes a register of the core's, which are few: every load and every product takes one more
// until those before it are done. Where the core's other thread computes with tiles too, or all eight hold something, none
// is left, and a product waits for the one before it: 30 ns instead of 8 were measured. So tiles are cleared as soon as
// what they hold isn't needed, which gives the register back, and loops keep to four.
//
// Not the compiler's intrinsics: those don't tell it which memory a tile is loaded from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kv {
namespace {

namespace tile {

template <int T>
inline void load(const void* rows, ptrdiff_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(T) : "memory");
}

// For what is read once: leaves what else is in the first-level cache alone.
template <int T>
inline void load_passing(const void* rows, ptrdiff_t stride_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(T) : "memory");
}

template <int T>
inline void store(void* rows, ptrdiff_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride_bytes), "i"(T) : "memory");
}

template <int T>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int C, int A, int B>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace tile

// Rows and bytes a row of the eight tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The configuration of this thread's tiles, for as long as the object lives.
class TileSession {
 public:
  TileSession() { configure(); }
  ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

  // Changes the shapes; clears all tiles if that changes any.
  void use(const TileShapes& shapes) {
    if (std::memcmp(&shapes, &shapes_, sizeof(shapes)) != 0) set(shapes);
  }

  // The same where another object may have changed them meanwhile; always clears.
  void set(const TileShapes& shapes) {
    shapes_ = shapes;
    configure();
  }

 private:
  void configure() { asm volatile("ldtilecfg %0" : : "m"(shapes_) : "memory"); }

  TileShapes shapes_;
};

}  // namespace
}  // namespace kv
