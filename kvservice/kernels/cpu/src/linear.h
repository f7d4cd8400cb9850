// Packed linears: rows in, rows out, with what happens to a result on its way out.
#pragma once

#include "packing.h"
#include "parallel.h"
#include "rows.h"

namespace kv {
namespace {

// Rows that are worked on at a time, so that activations stay in the second-level cache.
constexpr int kRowsAtOnce = 256;
// Up to here the time is that of reading weights, so each thread reads long stretches.
constexpr int kFewRows = 32;

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
template <class Product, class Emit>
void multiply(Team& team, const KvLinear& linear, ActivationRows<typename Product::Activation> a, int rows,
              Emit&& emit) {
  const PackedShape shape(linear);
  const auto* packed = static_cast<const typename Product::Weight*>(linear.packed);
  const int panels_per_part = rows > kFewRows ? 1 : larger(1, shape.num_panels / (4 * team.size()));
  alignas(64) float c[Product::row_block * kPanelColumns];
  Product product;
  for (int part = team.next(); part * panels_per_part < shape.num_panels; part = team.next()) {
    const int end = smaller((part + 1) * panels_per_part, shape.num_panels);
    for (int panel = part * panels_per_part; panel < end; ++panel) {
      const int column = panel * shape.columns_per_panel;
      const int num_columns = smaller(shape.columns_per_panel, linear.out - column);
      for (int row = 0; row < rows; row += Product::row_block) {
        const int count = smaller(Product::row_block, rows - row);
        product.compute(a.row(row), a.stride, count, packed + panel * shape.panel_elements(), shape.num_blocks, c);
        for (int r = 0; r < count; ++r) emit(row + r, column, num_columns, c + r * kPanelColumns);
      }
    }
  }
}

// Calls f(i, n) for stretches of up to a vector's width that make up [0, count).
template <class F>
void by_vector(int count, F&& f) {
  for (int i = 0; i < count; i += Vec::width) f(i, smaller(Vec::width, count - i));
}

inline Vec with_bias(const float* c, const KvLinear& linear, int column, int i, int n) {
  const Vec x = load_n(c + i, n);
  return linear.bias ? x + load_n(linear.bias + column + i, n) : x;
}

// What multiply's results become.
template <class Out>
auto emit_to(const KvLinear& linear, Out* y, ptrdiff_t y_stride) {
  return [&linear, y, y_stride](int row, int column, int num_columns, const float* c) {
    Out* to = y + row * y_stride + column;
    by_vector(num_columns, [&](int i, int n) { store_n(to + i, with_bias(c, linear, column, i, n), n); });
  };
}

inline auto emit_added(const KvLinear& linear, float* x, ptrdiff_t x_stride) {
  return [&linear, x, x_stride](int row, int column, int num_columns, const float* c) {
    float* to = x + row * x_stride + column;
    by_vector(num_columns, [&](int i, int n) {
      store_n(to + i, load_n(to + i, n) + with_bias(c, linear, column, i, n), n);
    });
  };
}

template <class Out>
auto emit_gated(Out* y, ptrdiff_t y_stride) {
  return [y, y_stride](int row, int column, int num_columns, const float* c) {
    Out* to = y + row * y_stride + column;
    by_vector(num_columns,
              [&](int i, int n) { store_n(to + i, silu(load(c + i)) * load(c + kHalfColumns + i), n); });
  };
}

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
      if (linear.is_gated) {
        if (y_dtype == KV_F32) {
          multiply<Product>(team, linear, a, count, emit_gated(static_cast<float*>(y) + first * y_stride, y_stride));
        } else {
          multiply<Product>(team, linear, a, count, emit_gated(static_cast<bf16*>(y) + first * y_stride, y_stride));
        }
      } else if (y_dtype == KV_F32) {
        multiply<Product>(team, linear, a, count, emit_to(linear, static_cast<float*>(y) + first * y_stride, y_stride));
      } else {
        multiply<Product>(team, linear, a, count, emit_to(linear, static_cast<bf16*>(y) + first * y_stride, y_stride));
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
      multiply<Product>(team, linear, a, count, emit_to(linear, y + first * y_stride, y_stride));
      team.barrier();
    }
  });
}

}  // namespace
}  // namespace kv
