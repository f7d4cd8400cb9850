// Attention of one query over what each KV head of a sequence holds, which also tells the weights. Heads hold different
// tokens, in slots of no order: first those that are packed in few bits, then those in blocks of the arena.
//
// A slot's score depends on the slot alone, and sums are over slots in order: a result has the same bits whatever is
// computed beside it.
#pragma once

#include "parallel.h"
#include "rows.h"

namespace kv {
namespace {

constexpr int kHeldGroup = 32;

// Rows of a group's codes, [32, head_dim]: field f of byte i of a token is number f * row_bytes + i. `along` says whether
// step and middle are each number's (of keys) or each token's (of values).
template <bool Along, class T>
void decode_group(const uint8_t* codes, const T* params, int bits, int head_dim, T* rows) {
  const int row_bytes = head_dim * bits / 8, fields = 8 / bits, mask = (1 << bits) - 1;
  const int width = Along ? head_dim : kHeldGroup;
  const float half = static_cast<float>(mask) / 2.0f;
  float steps[1024], middles[1024], row[1024];
  for (int i = 0; i < width; ++i) {
    steps[i] = to_float(params[i]);
    middles[i] = to_float(params[width + i]);
  }
  for (int t = 0; t < kHeldGroup; ++t) {
    const uint8_t* from = codes + t * row_bytes;
    for (int f = 0; f < fields; ++f) {
      const int first = f * row_bytes;
      for (int i = 0; i < row_bytes; ++i) {
        const float level = static_cast<float>((from[i] >> (f * bits)) & mask) - half;
        const int at = Along ? first + i : t;
        row[first + i] = level * steps[at] + middles[at];
      }
    }
    copy_row(row, head_dim, rows + t * head_dim);
  }
}

template <class T>
class HeldHead {
 public:
  HeldHead(const KvHeld& held, int head, int thread)
      : held_(held), head_(head), dim_(held.head_dim), padded_(round_up(dim_, 16)), num_(held.visible[head]) {
    const int64_t packed = static_cast<int64_t>(held.num_groups) * kHeldGroup * dim_ * sizeof(T);
    const int64_t floats = (2 * held.group + 1) * padded_;
    auto* memory = static_cast<char*>(
        thread_buffer(thread, num_ * sizeof(T*) + round_up(packed, 64) + (floats + 64) * sizeof(float)));
    rows_ = reinterpret_cast<const T**>(memory);
    unpacked_ = reinterpret_cast<T*>(memory + round_up(num_ * static_cast<int64_t>(sizeof(T*)), 64));
    queries_ = reinterpret_cast<float*>(reinterpret_cast<char*>(unpacked_) + round_up(packed, 64));
    sums_ = queries_ + held.group * padded_;
    turned_ = sums_ + held.group * padded_;
  }

  void attend() {
    const auto* queries = static_cast<const T*>(held_.queries) + static_cast<int64_t>(head_) * held_.group * dim_;
    for (int g = 0; g < held_.group; ++g) widen(queries + g * dim_, queries_ + g * padded_);
    find_rows<true>(0);
    score();
    for (int g = 0; g < held_.group; ++g) weigh(g);
    find_rows<false>(1);
    add_values();
    auto* out = static_cast<T*>(held_.out) + static_cast<int64_t>(head_) * held_.group * dim_;
    for (int g = 0; g < held_.group; ++g) copy_row(sums_ + g * padded_, dim_, out + g * dim_);
  }

 private:
  float* row_of(float* all, int g) const {
    return all + (static_cast<int64_t>(head_) * held_.group + g) * held_.width;
  }

  void widen(const T* from, float* to) const {
    copy_row(from, dim_, to);
    for (int64_t i = dim_; i < padded_; ++i) to[i] = 0;
  }

  // Where the keys (side 0) or values (1) of all slots lie.
  template <bool Keys>
  void find_rows(int side) {
    const int packed = held_.num_groups * kHeldGroup;
    const int code_bytes = kHeldGroup * dim_ * held_.bits / 8;
    for (int n = 0; n < held_.num_groups; ++n) {
      const int64_t at = static_cast<int64_t>(head_) * held_.num_groups + n;
      const uint8_t* codes = static_cast<const uint8_t*>(held_.codes) + (2 * at + side) * code_bytes;
      const auto* params = static_cast<const T*>(Keys ? held_.key_params : held_.value_params);
      T* rows = unpacked_ + static_cast<int64_t>(n) * kHeldGroup * dim_;
      decode_group<Keys>(codes, params + at * 2 * (Keys ? dim_ : kHeldGroup), held_.bits, dim_, rows);
    }
    for (int t = 0; t < packed; ++t) rows_[t] = unpacked_ + static_cast<int64_t>(t) * dim_;
    const int32_t* blocks = held_.table + (side * held_.num_kv + head_) * held_.table_stride;
    const auto* arena = static_cast<const T*>(held_.arena);
    for (int t = packed; t < num_; ++t) {
      const int local = t - packed;
      rows_[t] = arena + (static_cast<int64_t>(blocks[local / 16]) * 16 + local % 16) * dim_;
    }
  }

  void score() {
    const int64_t* moves = held_.moves ? held_.moves + static_cast<int64_t>(head_) * held_.width : nullptr;
    const int half = dim_ / 2;
    for (int t = 0; t < num_; ++t) {
      widen(rows_[t], turned_);
      if (moves && moves[t]) rotate(turned_, held_.cos + moves[t] * half, held_.sin + moves[t] * half, half);
      for (int g = 0; g < held_.group; ++g) {
        const float* query = queries_ + g * padded_;
        Vec sum = zero();
        for (int64_t i = 0; i < padded_; i += Vec::width) sum = fma(load(query + i), load(turned_ + i), sum);
        row_of(held_.logits, g)[t] = sum_of_lanes(sum) * held_.scale;
      }
    }
  }

  // Logits to weights; slots that the query doesn't see get minus infinity, and no weight.
  void weigh(int g) const {
    float* logits = row_of(held_.logits, g);
    float* weights = row_of(held_.weights, g);
    float highest = -INFINITY;
    for (int t = 0; t < num_; ++t) highest = logits[t] > highest ? logits[t] : highest;
    const Vec peak = broadcast(highest * kLog2E), factor = broadcast(kLog2E);
    Vec mass = zero();
    for (int t = 0; t < num_; t += Vec::width) {
      const int n = smaller(Vec::width, num_ - t);
      const Vec weight = keep_first(exp2(fma(load_n(logits + t, n), factor, zero() - peak)), n, zero());
      mass = mass + weight;
      store_n(weights + t, weight, n);
    }
    const Vec share = broadcast(1.0f / sum_of_lanes(mass));
    for (int t = 0; t < num_; t += Vec::width) {
      const int n = smaller(Vec::width, num_ - t);
      store_n(weights + t, load_n(weights + t, n) * share, n);
    }
    for (int t = num_; t < held_.width; ++t) {
      logits[t] = -INFINITY;
      weights[t] = 0;
    }
  }

  void add_values() const {
    for (int g = 0; g < held_.group; ++g) {
      const float* weights = row_of(held_.weights, g);
      float* sums = sums_ + g * padded_;
      for (int i = 0; i < dim_; i += Vec::width) {
        const int n = smaller(Vec::width, dim_ - i);
        Vec sum = zero();
        if (n == Vec::width) {
          for (int t = 0; t < num_; ++t) sum = fma(broadcast(weights[t]), load(rows_[t] + i), sum);
        } else {
          for (int t = 0; t < num_; ++t) sum = fma(broadcast(weights[t]), load_n(rows_[t] + i, n), sum);
        }
        store(sums + i, sum);
      }
    }
  }

  const KvHeld& held_;
  int head_;
  int dim_;
  int64_t padded_;
  int num_;
  const T** rows_;
  T* unpacked_;
  float* queries_;
  float* sums_;
  float* turned_;
};

template <class T>
void attend_held_heads(const KvHeld& held) {
  parallel([&](Team& team, int thread) {
    for (int head = team.next(); head < held.num_kv; head = team.next()) HeldHead<T>(held, head, thread).attend();
  });
}

}  // namespace
}  // namespace kv
