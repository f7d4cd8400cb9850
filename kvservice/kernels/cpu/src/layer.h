// The two halves of a decoder layer around attention, each one region of the threads.
#pragma once

#include "linear.h"

namespace kv {
namespace {

// Where K and V of the step's rows go.
template <class T>
class ArenaRows {
 public:
  ArenaRows(const KvLayer& layer, int layer_idx, const KvStep& step)
      : layer_(layer), layer_idx_(layer_idx), step_(step) {}

  // kind: 0 for K, 1 for V. Rows must be asked for in rising order, since the sequence is looked for from the last on.
  T* at(int row, int kind, int kv_head) {
    while (row >= sequence().first_row + sequence().num_queries) ++sequence_idx_;
    const int token = sequence().num_resident + row - sequence().first_row;
    const int64_t cell = (layer_idx_ * 2 + kind) * layer_.num_kv + kv_head;
    const int64_t block = sequence().table[cell * sequence().table_stride + token / 16];
    return static_cast<T*>(step_.arena) + (block * 16 + token % 16) * layer_.head_dim;
  }

 private:
  const KvSequence& sequence() const { return step_.sequences[sequence_idx_]; }

  const KvLayer& layer_;
  int layer_idx_;
  const KvStep& step_;
  int sequence_idx_ = 0;
};

// Rows of projected heads to queries, keys and values where they belong: normed, rotated, rounded once.
template <class T>
void place_heads(const KvLayer& layer, int layer_idx, const KvStep& step, const float* projected, int first_row,
                 Share share) {
  const int num_heads = layer.num_heads + 2 * layer.num_kv;
  const int half = step.rotary_dim / 2;
  ArenaRows<T> arena(layer, layer_idx, step);
  constexpr int kMostHeadDim = 1024;
  alignas(64) float head[kMostHeadDim];
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int row = first_row + static_cast<int>(i / num_heads), h = static_cast<int>(i % num_heads);
    const float* from = projected + i * layer.head_dim;
    const int kv_head = h - layer.num_heads;
    if (kv_head >= layer.num_kv) {
      copy_row(from, layer.head_dim, arena.at(row, 1, kv_head - layer.num_kv));
      continue;
    }
    const bool is_query = kv_head < 0;
    const float* norm = is_query ? layer.q_norm : layer.k_norm;
    if (norm) {
      rms_norm(from, norm, layer.eps, layer.head_dim, head);
    } else {
      copy_row(from, layer.head_dim, head);
    }
    rotate(head, step.cos + step.positions[row] * half, step.sin + step.positions[row] * half, half);
    T* to = is_query ? static_cast<T*>(step.q) + (static_cast<int64_t>(row) * layer.num_heads + h) * layer.head_dim
                     : arena.at(row, 0, kv_head);
    copy_row(head, layer.head_dim, to);
  }
}

template <class Product>
void layer_pre(const KvLayer& layer, int layer_idx, const KvStep& step) {
  using Activation = typename Product::Activation;
  const int hidden = layer.qkv.in, rows_at_once = smaller(step.rows, kRowsAtOnce);
  const int num_heads = layer.num_heads + 2 * layer.num_kv;
  const int64_t width = static_cast<int64_t>(num_heads) * layer.head_dim;
  const auto normed = activation_rows<Activation>(Buffer::kActivations, rows_at_once, hidden);
  auto* projected = static_cast<float*>(shared_buffer(Buffer::kProjected, rows_at_once * width * sizeof(float)));
  parallel([&](Team& team, int thread) {
    for (int first = 0; first < step.rows; first += kRowsAtOnce) {
      const int rows = smaller(kRowsAtOnce, step.rows - first);
      for (int r = thread; r < rows; r += team.size()) {
        rms_norm(step.x + static_cast<int64_t>(first + r) * hidden, layer.norm1, layer.eps, hidden, normed.row(r));
        clear_padding(normed.row(r), hidden);
      }
      team.barrier();
      multiply<Product>(team, layer.qkv, normed, rows, EmitTo<float>{layer.qkv, projected, width});
      team.barrier();
      const Share share(static_cast<int64_t>(rows) * num_heads, thread, team.size());
      place_heads<typename Product::Weight>(layer, layer_idx, step, projected, first, share);
      team.barrier();
    }
  });
}

template <class Product>
void layer_post(const KvLayer& layer, const KvStep& step) {
  using Activation = typename Product::Activation;
  using T = typename Product::Weight;
  const int hidden = layer.o.out, width = layer.o.in, rows_at_once = smaller(step.rows, kRowsAtOnce);
  const auto narrow = activation_rows<Activation>(Buffer::kActivations, rows_at_once, larger(hidden, width));
  const auto gated = activation_rows<Activation>(Buffer::kGated, rows_at_once, layer.gate_up.out);
  parallel([&](Team& team, int thread) {
    for (int first = 0; first < step.rows; first += kRowsAtOnce) {
      const int rows = smaller(kRowsAtOnce, step.rows - first);
      float* x = step.x + static_cast<int64_t>(first) * hidden;
      const T* attended = static_cast<const T*>(step.attended) + static_cast<int64_t>(first) * width;
      for (int r = thread; r < rows; r += team.size()) {
        copy_row(attended + static_cast<int64_t>(r) * width, width, narrow.row(r));
        clear_padding(narrow.row(r), width);
        clear_padding(gated.row(r), layer.gate_up.out);
      }
      team.barrier();
      multiply<Product>(team, layer.o, narrow, rows, EmitAdded{layer.o, x, hidden});
      team.barrier();
      for (int r = thread; r < rows; r += team.size()) {
        rms_norm(x + static_cast<int64_t>(r) * hidden, layer.norm2, layer.eps, hidden, narrow.row(r));
        clear_padding(narrow.row(r), hidden);
      }
      team.barrier();
      multiply<Product>(team, layer.gate_up, narrow, rows, EmitGated<Activation>{gated.data, gated.stride});
      team.barrier();
      multiply<Product>(team, layer.down, gated, rows, EmitAdded{layer.down, x, hidden});
      team.barrier();
    }
  });
}

}  // namespace
}  // namespace kv
