// Low-bit codes of keys: per channel, asymmetric, in groups of 64 tokens. Equals `methods.key_index` bit for bit.
//
// Codes of a group are vectors of 64 bytes, each of 8 / bits fields, the first in the bytes' low bits. Fields are counted
// through all vectors: for each four channels, for each of the group's four runs of 16 tokens, one; in it, byte 4 i + j is
// token i of the run in channel j of the four.
#pragma once

#include "parallel.h"
#include "rows.h"

namespace kv {
namespace {

constexpr int kGroupTokens = 64;
constexpr int kRunTokens = 16;
constexpr int kRuns = kGroupTokens / kRunTokens;
constexpr float kLeastStep = 1e-6f;

// A channel's quantiser, as stored: the step, and the middle of the range. Tokens are `stride` numbers apart.
template <class T>
void find_ranges(const T* keys, int64_t stride, int head_dim, int bits, T* steps, T* middles) {
  for (int i = 0; i < head_dim; i += Vec::width) {
    const int n = smaller(Vec::width, head_dim - i);
    Vec lowest = load_n(keys + i, n), highest = lowest;
    for (int t = 1; t < kGroupTokens; ++t) {
      const Vec key = load_n(keys + t * stride + i, n);
      lowest = min(key, lowest);
      highest = max(key, highest);
    }
    const Vec step = (highest - lowest) / broadcast(static_cast<float>((1 << bits) - 1));
    store_n(steps + i, max(step, broadcast(kLeastStep)), n);
    store_n(middles + i, (highest + lowest) / broadcast(2.0f), n);
  }
}

// Levels of a token lie so far apart that whole vectors of them can be written.
inline int64_t level_stride(int head_dim) { return round_up(head_dim, 16); }

// Each number's level, less 128 so that it fits a signed byte. Levels are counted from below, and the middle of the range
// lies between two of them, so that the level is found by rounding down.
template <class T>
void find_levels(const T* keys, int64_t stride, int head_dim, int bits, const T* steps, const T* middles,
                 int8_t* levels) {
  const Vec last = broadcast(static_cast<float>((1 << bits) - 1)), above = broadcast(static_cast<float>(1 << (bits - 1)));
  for (int i = 0; i < head_dim; i += Vec::width) {
    const int n = smaller(Vec::width, head_dim - i);
    const Vec middle = load_n(middles + i, n), per_step = broadcast(1.0f) / load_n(steps + i, n);
    for (int t = 0; t < kGroupTokens; ++t) {
      const Vec level = floor((load_n(keys + t * stride + i, n) - middle) * per_step) + above;
      store_rounded(levels + t * level_stride(head_dim) + i, max(min(level, last), zero()) - broadcast(128.0f));
    }
  }
}

// A vector of codes from the fields that it has, each from four channels of a run's tokens.
inline void pack_levels(const int8_t* levels, int head_dim, int bits, uint8_t* codes) {
  const int fields = 8 / bits;
  const int64_t stride = level_stride(head_dim);
  for (int vector = 0; vector < head_dim / fields; ++vector) {
    for (int byte = 0; byte < kGroupTokens; byte += Bytes::width) {
      Bytes packed = all_bytes(0);
      for (int field = 0; field < fields; ++field) {
        const int number = vector * fields + field;
        const int64_t token = number % kRuns * kRunTokens + byte / 4;
        const Bytes four = every_four(levels + token * stride + number / kRuns * 4, static_cast<int>(stride));
        packed = joined(packed, raised(flipped(four, all_bytes(-128)), field * bits));
      }
      store_bytes(codes + vector * kGroupTokens + byte, packed);
    }
  }
}

// `count` groups of keys, [count, 64, head_dim] with tokens `stride` numbers apart, to codes [count, 64 * head_dim * bits / 8], params [count, 2, head_dim].
template <class T>
void encode_groups(const T* keys, int64_t stride, int64_t count, int head_dim, int bits, uint8_t* codes, T* params) {
  const int64_t group_elements = kGroupTokens * static_cast<int64_t>(head_dim);
  parallel([&](Team& team, int thread) {
    const Share share(count, thread, team.size());
    auto* levels = static_cast<int8_t*>(thread_buffer(thread, kGroupTokens * level_stride(head_dim)));
    for (int64_t group = share.begin; group < share.end; ++group) {
      const T* from = keys + group * kGroupTokens * stride;
      T* steps = params + group * 2 * head_dim;
      find_ranges(from, stride, head_dim, bits, steps, steps + head_dim);
      find_levels(from, stride, head_dim, bits, steps, steps + head_dim, levels);
      pack_levels(levels, head_dim, bits, codes + group * group_elements * bits / 8);
    }
  });
}

}  // namespace
}  // namespace kv
