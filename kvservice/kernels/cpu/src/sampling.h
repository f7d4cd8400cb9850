// Choosing tokens from logits: the likeliest, or one drawn after top-k, typical-p, top-p and min-p, in this order. The
// same as `engine.sampler` does in torch, which says where each comes from.
//
// A row is one thread's work. Weights are whole multiples of 2^-40 of the likeliest token's, so that sums of them are
// exact; of equal tokens all stay or none. Where a cut lies is found without sorting: by counting weights into bins of
// eleven, eleven and ten bits of the numbers that decide.
#pragma once

#include "parallel.h"
#include "rows.h"

namespace kv {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Numbers of either sign in the order of whole ones.
inline uint32_t ordered_bits(float x) {
  const uint32_t bits = bits_of(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline uint64_t weight_of(float share) { return static_cast<uint64_t>(share * 0x1p40f); }

class Draw {
 public:
  // Scratch of a thread, for `vocab` tokens.
  static size_t bytes(int vocab) { return kBins * sizeof(uint64_t) + (sizeof(float) + sizeof(int32_t)) * padded(vocab); }

  Draw(const float* logits, const KvDraw& how, int vocab, void* scratch)
      : logits_(logits),
        how_(how),
        vocab_(vocab),
        bins_(static_cast<uint64_t*>(scratch)),
        shares_(reinterpret_cast<float*>(bins_ + kBins)),
        found_(reinterpret_cast<int32_t*>(shares_ + padded(vocab))) {}

  int64_t token() {
    weigh();
    if (how_.top_k > 0 && how_.top_k < vocab_) keep_top_k();
    if (how_.typical_p < 1.0) keep_typical();
    if (how_.top_p < 1.0) keep_top_p();
    if (how_.min_p > 0.0) keep_min_p();
    return drawn();
  }

 private:
  static constexpr int kBinBits = 11;
  static constexpr int kBins = 1 << kBinBits;
  static int64_t padded(int vocab) { return round_up(vocab, 16); }

  // Each token's probability as a share of the likeliest one's.
  void weigh() {
    Vec highest = broadcast(-INFINITY);
    for (int i = 0; i < vocab_; i += Vec::width) {
      const int n = smaller(Vec::width, vocab_ - i);
      highest = max(highest, keep_first(load_n(logits_ + i, n), n, highest));
    }
    peak_ = max_of_lanes(highest);
    per_unit_ = kLog2E / how_.temperature;
    const Vec least = broadcast(-200.0f);
    for (int i = 0; i < vocab_; i += Vec::width) {
      const int n = smaller(Vec::width, vocab_ - i);
      const Vec power = (load_n(logits_ + i, n) - broadcast(peak_)) * broadcast(per_unit_);
      // What is far below is nothing; minus infinity is no number to compute with.
      store_n(shares_ + i, exp2(max(power, least)), n);
    }
  }

  void keep_top_k() {
    const auto key = [&](int i) { return ordered_bits(logits_[i]); };
    const uint32_t least = cut(key, [](int) { return uint64_t{1}; }, static_cast<uint64_t>(how_.top_k));
    keep([&](int i) { return key(i) >= least; });
  }

  // Those whose surprise is nearest to the entropy.
  void keep_typical() {
    double sum = 0.0, weighted = 0.0;
    for (int i = 0; i < vocab_; ++i) {
      if (shares_[i] == 0.0f) continue;
      sum += shares_[i];
      weighted += static_cast<double>(shares_[i]) * power(i);
    }
    // In powers of two: log2 of the sum is what turns shares into probabilities, and adds to every surprise alike.
    const double mean = weighted / sum;
    const auto key = [&](int i) { return ~bits_of(static_cast<float>(std::fabs(power(i) - mean))); };
    const uint32_t least = cut(key, [&](int i) { return weight_of(shares_[i]); }, needed(how_.typical_p));
    keep([&](int i) { return key(i) >= least; });
  }

  void keep_top_p() {
    const auto key = [&](int i) { return bits_of(shares_[i]); };
    const uint32_t least = cut(key, [&](int i) { return weight_of(shares_[i]); }, needed(how_.top_p));
    keep([&](int i) { return key(i) >= least; });
  }

  void keep_min_p() {
    float highest = 0.0f;
    for (int i = 0; i < vocab_; ++i) highest = shares_[i] > highest ? shares_[i] : highest;
    const double least = how_.min_p * highest;
    keep([&](int i) { return shares_[i] >= least; });
  }

  int64_t drawn() {
    const auto target = static_cast<uint64_t>(static_cast<unsigned __int128>(how_.draw) * total() >> 53);
    uint64_t sum = 0;
    int64_t last = 0;
    for (int i = 0; i < vocab_; ++i) {
      const uint64_t weight = weight_of(shares_[i]);
      sum += weight;
      if (weight) last = i;
      if (sum > target) break;
    }
    return last;
  }

  // log2 of a token's share.
  double power(int i) const { return static_cast<double>((logits_[i] - peak_) * per_unit_); }

  uint64_t total() const {
    uint64_t sum = 0;
    for (int i = 0; i < vocab_; ++i) sum += weight_of(shares_[i]);
    return sum;
  }

  uint64_t needed(double mass) const {
    const double least = std::ceil(mass * static_cast<double>(total()));
    return least < 1.0 ? 1 : static_cast<uint64_t>(least);
  }

  template <class Stays>
  void keep(Stays&& stays) {
    for (int i = 0; i < vocab_; ++i) {
      if (!stays(i)) shares_[i] = 0.0f;
    }
  }

  // The greatest key such that tokens that have at least it weigh `needed` together; 0 if all of them don't.
  template <class Key, class Weight>
  uint32_t cut(Key&& key, Weight&& weight, uint64_t needed) {
    uint32_t prefix = 0;
    int shift = 32 - kBinBits, bits = kBinBits, count = vocab_;
    for (int pass = 0; pass < 3; ++pass) {
      const uint32_t mask = (1u << bits) - 1;
      std::memset(bins_, 0, kBins * sizeof(uint64_t));
      for (int j = 0; j < count; ++j) {
        const int i = pass ? found_[j] : j;
        bins_[key(i) >> shift & mask] += weight(i);
      }
      uint32_t bin = mask;
      while (bin > 0 && bins_[bin] < needed) needed -= bins_[bin--];
      if (bins_[bin] < needed) return 0;
      prefix |= bin << shift;
      if (shift == 0) break;
      int num_found = 0;
      for (int j = 0; j < count; ++j) {
        const int i = pass ? found_[j] : j;
        if ((key(i) >> shift & mask) == bin) found_[num_found++] = i;
      }
      count = num_found;
      bits = pass ? 10 : kBinBits;
      shift = pass ? 0 : 10;
    }
    return prefix;
  }

  const float* logits_;
  const KvDraw& how_;
  int vocab_;
  uint64_t* bins_;
  float* shares_;
  int32_t* found_;
  float peak_ = 0.0f;
  float per_unit_ = 0.0f;
};

// One row each: a part of the work is a row, as rows take unequal time.
inline void draw_rows(const float* logits, int64_t stride, const KvDraw* how, int32_t rows, int32_t vocab,
                      int64_t* tokens) {
  parallel([&](Team& team, int thread) {
    void* scratch = thread_buffer(thread, Draw::bytes(vocab));
    for (int row = team.next(); row < rows; row = team.next()) {
      tokens[row] = Draw(logits + row * stride, how[row], vocab, scratch).token();
    }
  });
}

// The first of the highest logits of a row; NaN if there is one.
inline void highest_of_row(const float* logits, int32_t vocab, float* value, int64_t* token) {
  Vec highest = broadcast(-INFINITY);
  bool is_sound = true;
  for (int i = 0; i < vocab; i += Vec::width) {
    const int n = smaller(Vec::width, vocab - i);
    const Vec x = keep_first(load_n(logits + i, n), n, broadcast(-INFINITY));
    // Only a NaN isn't at least itself.
    is_sound &= lanes_at_least(x, x) == (1u << Vec::width) - 1;
    highest = max(highest, x);
  }
  *value = is_sound ? max_of_lanes(highest) : NAN;
  *token = 0;
  for (int i = 0; is_sound && i < vocab; ++i) {
    if (logits[i] == *value) {
      *token = i;
      break;
    }
  }
}

inline void highest_rows(const float* logits, int64_t stride, int32_t rows, int32_t vocab, float* values,
                         int64_t* tokens) {
  parallel([&](Team& team, int thread) {
    const Share share(rows, thread, team.size());
    for (int64_t row = share.begin; row < share.end; ++row) {
      highest_of_row(logits + row * stride, vocab, values + row, tokens + row);
    }
  });
}

}  // namespace
}  // namespace kv
