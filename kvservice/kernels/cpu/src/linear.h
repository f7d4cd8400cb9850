// Packed linears: rows in, rows out, with what happens to a result on its way out.
#pragma once

#include <immintrin.h>

#include "packing.h"
#include "parallel.h"
#include "rows.h"

namespace kv {
namespace {

// Rows that are worked on at a time, so that activations stay in the second-level cache.
constexpr int kRowsAtOnce = 256;
// Up to here the time is that of reading weights, so each thread reads long stretches.
constexpr int kFewRows = 32;

// Panels that a thread takes at a time.
inline int panels_of_part(const PackedShape& shape, size_t element_bytes, int rows, int num_threads) {
  const int share = shape.num_panels / (3 * num_threads);
  if (rows <= kFewRows) return larger(1, share);
  constexpr size_t kMostBytes = 256 << 10;
  const int most = static_cast<int>(kMostBytes / (shape.panel_elements() * element_bytes));
  return larger(1, smaller(share, smaller(most, 4)));
}

// Rows of activations in the form that a product takes: its number type, zeros up to a whole block.
template <class Activation>
struct ActivationRows {
  Activation* data;
  ptrdiff_t stride;

  Activation* row(int r) const { return data + r * stride; }
};

template <class Activation>
ActivationRows<Activation> activation_rows(Buffer buffer, int rows, int count) {
  // An odd number of cache lines, or else equal columns of all rows compete for the same few places in the cache.
  constexpr int kLine = 64 / sizeof(Activation);
  const int64_t lines = divide_up(round_up(count, kBlockDepth), kLine);
  const int64_t stride = (lines | 1) * kLine;
  const int64_t bytes = rows * stride * static_cast<int64_t>(sizeof(Activation));
  return {static_cast<Activation*>(shared_buffer(buffer, bytes)), stride};
}

template <class Activation>
void clear_padding(Activation* row, int count) {
  const int64_t padding = round_up(count, kBlockDepth) - count;
  std::memset(static_cast<void*>(row + count), 0, padding * sizeof(Activation));
}

// Computes all rows and columns, shared among the team, and hands them to `emit(row, first_column, num_columns, c)`
// with c of 32 numbers: the columns, or 16 gates and 16 ups. No barrier at the end.
//
// A part is a few neighbouring panels. A block of rows meets them all while it is in the first-level cache, and they
// meet all blocks of rows while they are in the second, where what comes next is fetched bit by bit meanwhile.
template <class Product, class Emit>
void multiply(Team& team, const KvLinear& linear, ActivationRows<typename Product::Activation> a, int rows,
              const Emit& emit) {
  const PackedShape shape(linear);
  const auto* packed = static_cast<const typename Product::Weight*>(linear.packed);
  const int panels_per_part = panels_of_part(shape, sizeof(*packed), rows, team.size());
  const int row_blocks = (rows + Product::row_block - 1) / Product::row_block;
  alignas(64) float c[Product::row_block * kPanelColumns];
  Product product;
  for (int part = team.next(); part * panels_per_part < shape.num_panels; part = team.next()) {
    const int begin = part * panels_per_part, end = smaller(begin + panels_per_part, shape.num_panels);
    for (int block = 0; block < row_blocks; ++block) {
      const int row = block * Product::row_block, count = smaller(Product::row_block, rows - row);
      for (int panel = begin; panel < end; ++panel) {
        const auto* weights = packed + panel * shape.panel_elements();
        const int column = panel * shape.columns_per_panel;
        // With one block of rows it is the next panel. Past the end, something that is there already.
        const int distance = row_blocks > 1 ? team.size() * panels_per_part : 1;
        const auto* ahead = panel + distance < shape.num_panels ? weights + distance * shape.panel_elements() : weights;
        for (int r = 0; r < count; ++r) emit.fetch(row + r, column);
        product.compute(a.row(row), a.stride, count, weights, shape.num_blocks, {ahead, block, row_blocks}, c);
        const int num_columns = smaller(shape.columns_per_panel, linear.out - column);
        for (int r = 0; r < count; ++r) emit(row + r, column, num_columns, c + r * kPanelColumns);
      }
    }
  }
}

// Calls f(i, n) for stretches of up to a vector's width that make up [0, count). The compiler sees whole ones apart:
// storing under a mask is slow even if the mask is full.
template <class F>
void by_vector(int count, F&& f) {
  int i = 0;
  for (; i + Vec::width <= count; i += Vec::width) f(i, Vec::width);
  if (i < count) f(i, count - i);
}

inline Vec with_bias(const float* c, const KvLinear& linear, int column, int i, int n) {
  const Vec x = load(c + i);
  return linear.bias ? x + load_n(linear.bias + column + i, n) : x;
}

// Gets a panel's place in a row of results into the cache before it is written.
template <class Out>
void fetch_columns(const Out* y) {
  _mm_prefetch(y, _MM_HINT_T0);
  if (sizeof(Out) == 4) _mm_prefetch(y + kHalfColumns, _MM_HINT_T0);
}

// What multiply's results become.
template <class Out>
struct EmitTo {
  const KvLinear& linear;
  Out* y;
  ptrdiff_t stride;

  void fetch(int row, int column) const { fetch_columns(y + row * stride + column); }
  void operator()(int row, int column, int num_columns, const float* c) const {
    Out* to = y + row * stride + column;
    by_vector(num_columns, [&](int i, int n) { store_n(to + i, with_bias(c, linear, column, i, n), n); });
  }
};

struct EmitAdded {
  const KvLinear& linear;
  float* x;
  ptrdiff_t stride;

  void fetch(int row, int column) const { fetch_columns(x + row * stride + column); }
  void operator()(int row, int column, int num_columns, const float* c) const {
    float* to = x + row * stride + column;
    by_vector(num_columns, [&](int i, int n) {
      store_n(to + i, load_n(to + i, n) + with_bias(c, linear, column, i, n), n);
    });
  }
};

template <class Out>
struct EmitGated {
  Out* y;
  ptrdiff_t stride;

  void fetch(int row, int column) const { fetch_columns(y + row * stride + column); }
  void operator()(int row, int column, int num_columns, const float* c) const {
    Out* to = y + row * stride + column;
    by_vector(num_columns,
              [&](int i, int n) { store_n(to + i, silu(load(c + i)) * load(c + kHalfColumns + i), n); });
  }
};

template <class Product>
void linear_rows(const KvLinear& linear, const typename Product::Weight* x, int64_t x_stride, int rows, void* y,
                 int64_t y_stride, int y_dtype) {
  using Activation = typename Product::Activation;
  const auto a = activation_rows<Activation>(Buffer::kActivations, smaller(rows, kRowsAtOnce), linear.in);
  parallel([&](Team& team, int thread) {
    for (int first = 0; first < rows; first += kRowsAtOnce) {
      const int count = smaller(kRowsAtOnce, rows - first);
      for (int r = thread; r < count; r += team.size()) {
        copy_row(x + (first + r) * x_stride, linear.in, a.row(r));
        clear_padding(a.row(r), linear.in);
      }
      team.barrier();
      const auto multiply_into = [&](auto* to) {
        using Out = std::remove_pointer_t<decltype(to)>;
        to += first * y_stride;
        if (linear.is_gated) {
          multiply<Product>(team, linear, a, count, EmitGated<Out>{to, y_stride});
        } else {
          multiply<Product>(team, linear, a, count, EmitTo<Out>{linear, to, y_stride});
        }
      };
      if (y_dtype == KV_F32) {
        multiply_into(static_cast<float*>(y));
      } else {
        multiply_into(static_cast<bf16*>(y));
      }
      team.barrier();
    }
  });
}

template <class Product>
void norm_linear_rows(const KvLinear& linear, const float* norm, float eps, const float* x, const int64_t* row_ids,
                      int rows, float* y) {
  using Activation = typename Product::Activation;
  const auto a = activation_rows<Activation>(Buffer::kActivations, smaller(rows, kRowsAtOnce), linear.in);
  parallel([&](Team& team, int thread) {
    for (int first = 0; first < rows; first += kRowsAtOnce) {
      const int count = smaller(kRowsAtOnce, rows - first);
      for (int r = thread; r < count; r += team.size()) {
        const int64_t row = row_ids ? row_ids[first + r] : first + r;
        rms_norm(x + row * linear.in, norm, eps, linear.in, a.row(r));
        clear_padding(a.row(r), linear.in);
      }
      team.barrier();
      const int64_t y_stride = linear.out;
      multiply<Product>(team, linear, a, count, EmitTo<float>{linear, y + first * y_stride, y_stride});
      team.barrier();
    }
  });
}

}  // namespace
}  // namespace kv
