// Recall: which distant tokens matter to a query, and attention to exactly those.
//
// One work item is a query in one KV head:
//   score   every distant token's low-bit key, in each query head of the group
//   weigh   a token's attention mass over those heads, each head measured against what it attends to nearby
//   choose  the tokens of most mass, in order of position
//   fetch   from host memory, into recall slots in the arena, those that aren't there yet
//   attend  to them, and merge with what is near
// Where layers share distant keys, only anchors score and choose. A follower takes their choice, the slots of their keys
// and, if it is to, their queries; its values it fetches by itself.
//
// A query's choice depends on that query alone, and tokens are added in order of position, not of slot: what was
// recalled before never shows in a result.
#pragma once

#include "fold_vec.h"
#include "key_codes.h"

namespace kv {
namespace {

// What free slots hold; above every token.
constexpr int32_t kNoToken = INT32_MAX;

// Levels of a query's numbers. Two products of such a number with a code must fit into 16 bits.
constexpr float query_levels(int bits) { return bits == 8 ? 64.0f : 127.0f; }

// Entries of one row of an index: each in one piece of a block, or in several whole blocks.
class Entries {
 public:
  Entries(const void* arena, int64_t block_bytes, const int32_t* blocks, int64_t entry_bytes)
      : arena_(static_cast<const char*>(arena)),
        block_bytes_(block_bytes),
        blocks_(blocks),
        entry_bytes_(entry_bytes),
        per_block_(entry_bytes < block_bytes ? static_cast<int>(block_bytes / entry_bytes) : 1),
        blocks_per_entry_(entry_bytes < block_bytes ? 1 : static_cast<int>(entry_bytes / block_bytes)) {}

  // Where an entry lies, of which only the first block's worth follows.
  const char* at(int entry) const {
    return arena_ + blocks_[entry / per_block_ * blocks_per_entry_] * block_bytes_ + entry % per_block_ * entry_bytes_;
  }

  // The whole entry; copied to `spare` if it takes several blocks.
  const char* whole(int entry, char* spare) const {
    if (blocks_per_entry_ == 1) return at(entry);
    for (int i = 0; i < blocks_per_entry_; ++i) {
      std::memcpy(spare + i * block_bytes_, arena_ + blocks_[entry * blocks_per_entry_ + i] * block_bytes_,
                  block_bytes_);
    }
    return spare;
  }

  void prefetch(int entry) const {
    const int64_t bytes = entry_bytes_ < block_bytes_ ? entry_bytes_ : block_bytes_;
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(at(entry) + i, _MM_HINT_T0);
  }

 private:
  const char* arena_;
  int64_t block_bytes_;
  const int32_t* blocks_;
  int64_t entry_bytes_;
  int per_block_;
  int blocks_per_entry_;
};

// A query head, folded into a group's quantiser: score = factor * (numbers . codes) + constant.
struct FoldedQuery {
  const int8_t* numbers;  // padded with zeros
  float factor;
  float constant;
};

// Scores of a group's 64 tokens in R heads.
template <int kBits, int R>
void score_group(const uint8_t* codes, int head_dim, const FoldedQuery* queries, float* scores, int64_t stride,
                 Vec* highest) {
  constexpr int kFields = 8 / kBits;
  constexpr int kParts = 64 / Bytes::width;  // of a vector
  // So many channels at a time that whole vectors are used up.
  constexpr int kQuads = kFields > kRuns ? kFields / kRuns : 1;
  // A run always lies in the same field, which can then be left where it is in its bytes: its products come out as many
  // times larger.
  constexpr bool kStayInPlace = kProductsHoldBytes && kQuads == 1;
  Bytes masks[kFields];
  for (int i = 0; i < kFields; ++i) masks[i] = all_bytes(((1 << kBits) - 1) << (kStayInPlace ? i * kBits : 0));
  for (int part = 0; part < kParts; ++part) {
    Ints sums[R][kRuns];
    for (int r = 0; r < R; ++r) {
      for (int run = 0; run < kRuns; ++run) sums[r][run] = no_ints();
    }
#pragma GCC unroll 4
    for (int quad = 0; quad < head_dim / 4; quad += kQuads) {
#pragma GCC unroll 2
      for (int q = 0; q < kQuads; ++q) {
        Bytes levels[kRuns];
#pragma GCC unroll 4
        for (int run = 0; run < kRuns; ++run) {
          const int at = q * kRuns + run, field = at % kFields;
          const uint8_t* vector = codes + (quad * kRuns / kFields + at / kFields) * 64 + part * Bytes::width;
          const Bytes bytes = load_bytes(vector);
          levels[run] = masked(kStayInPlace ? bytes : shifted(bytes, field * kBits), masks[field]);
        }
        for (int r = 0; r < R; ++r) {
          const Bytes numbers = four_bytes(queries[r].numbers + (quad + q) * 4);
          for (int run = 0; run < kRuns; ++run) sums[r][run] = add_products(sums[r][run], levels[run], numbers);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const Vec constant = broadcast(queries[r].constant);
      for (int run = 0; run < kRuns; ++run) {
        const float unit = kStayInPlace ? 1.0f / (1 << run % kFields * kBits) : 1.0f;
        const Vec score = fma(to_floats(sums[r][run]), broadcast(queries[r].factor * unit), constant);
        highest[r] = max(score, highest[r]);
        store(scores + r * stride + run * kRunTokens + part * Vec::width, score);
      }
    }
  }
}

// A number that at least n of some, all from 0 up, reach: the n-th greatest, with its bits below `last_bit` cleared.
// `count` is a multiple of the vector's width. Of numbers that are none, 0.
inline float nth_greatest(const float* x, int count, int n, int last_bit) {
  constexpr uint32_t kInfinity = 0x7f800000;
  uint32_t found = 0;
  for (int bit = 30; bit >= last_bit; --bit) {
    const uint32_t wish = found | 1u << bit;
    if (wish > kInfinity) continue;
    float bound;
    std::memcpy(&bound, &wish, sizeof bound);
    int reached = 0;
    for (int i = 0; i < count; i += Vec::width) {
      reached += __builtin_popcount(lanes_at_least(load(x + i), broadcast(bound)));
    }
    if (reached >= n) found = wish;
  }
  float result;
  std::memcpy(&result, &found, sizeof result);
  return result;
}

// One thread at work on queries.
template <class T>
class Recaller {
 public:
  // Of a thread's memory, for groups of `group` heads, up to `num_tokens` distant ones and budgets up to `budget`.
  static int64_t bytes(int head_dim, int group, int64_t num_tokens, int64_t budget) {
    return layout(nullptr, head_dim, group, num_tokens, budget).bytes;
  }

  Recaller(const KvLayer& layer, int layer_idx, const KvStep& step, int64_t num_tokens, int64_t budget, char* memory)
      : layer_(layer),
        step_(step),
        layer_idx_(layer_idx),
        group_(layer.num_heads / layer.num_kv),
        m_(layout(memory, layer.head_dim, group_, num_tokens, budget)),
        now_(m_.works[0]),
        before_(m_.works[1]),
        state_(m_.state, padded(group_), layer.head_dim),
        fold_(layer.head_dim, padded(group_), step.scale, m_.fold) {}

  // Goes through items in two halves: an item's rows come in from host memory while the next one's tokens are chosen.
  // No two items at work may share slots: a sequence of several queries has none.
  void begin(const KvSequence& sequence, int kv_head, int query) {
    std::swap(now_, before_);
    now_.sequence = &sequence;
    now_.kv_head = kv_head;
    now_.query = query;
    choose_tokens();
    locate();
    if (before_.sequence) finish(before_);
  }

  void end() {
    if (now_.sequence) finish(now_);
  }

 private:
  // An item, and what has been found out about it.
  struct Work {
    const KvSequence* sequence;  // null: there is none
    int kv_head;
    int query;
    int count;         // of the chosen
    int num_missing;
    int32_t* chosen;   // [budget]
    int32_t* missing;  // likewise; which of the chosen are to be copied
    const T** keys;    // likewise
    const T** values;  // likewise
  };

  HeadRows<T> heads_of(const Work& work) const {
    return {layer_, step_, work.kv_head, work.sequence->first_row + work.query};
  }

  void choose_tokens() {
    const KvSequence& sequence = *now_.sequence;
    const int num_tokens = sequence.recall->num_groups * kGroupTokens;
    const HeadRows<T> heads = heads_of(now_);
    now_.count = smaller(sequence.recall->budget, num_tokens);
    if (follows(sequence, now_.kv_head)) {
      std::memcpy(now_.chosen, shared_choice(now_), now_.count * sizeof(int32_t));
      return;
    }
    score(sequence, now_.kv_head, heads);
    weigh(heads, num_tokens);
    choose(num_tokens, now_.count);
    if (sequence.sharing) std::memcpy(shared_choice(now_), now_.chosen, now_.count * sizeof(int32_t));
  }

  void finish(Work& work) {
    const HeadRows<T> heads = heads_of(work);
    fetch(work);
    ask(work, heads);
    state_.clear(padded(group_));
    for (int t = 0; t < work.count; t += kTileTokens) {
      fold_.fold_scattered(work.keys + t, work.values + t, smaller(kTileTokens, work.count - t), state_);
    }
    merge(heads);
    work.sequence = nullptr;
  }

  static int padded(int rows) { return static_cast<int>(round_up(rows, 16)); }
  static int64_t padded_dim(int head_dim) { return round_up(head_dim, 64); }

  struct Memory {
    float* state;
    char* fold;
    float* queries;      // [group][padded_dim], widened
    int8_t* numbers;     // [group][padded_dim]
    char* spare;         // an entry's codes
    float* peaks;        // [group], the highest scores
    float* factors;      // [group], of the weights that they scale
    float* scores;       // [group][stride]
    float* mass;         // [num_tokens]
    float* some;         // likewise
    int32_t* candidates;  // likewise
    int32_t* where;      // [budget]
    int32_t* unused;     // likewise
    Work works[2];
    int64_t stride;
    int64_t bytes;
  };

  static Memory layout(char* memory, int head_dim, int group, int64_t num_tokens, int64_t budget) {
    Memory m = {};
    int64_t used = 0;
    const auto take = [&](auto*& field, int64_t count) {
      field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(memory + used);
      used += round_up(count * static_cast<int64_t>(sizeof(*field)), 64);
    };
    take(m.state, padded(group) * State::row_floats(head_dim));
    take(m.fold, VecFold<T>::bytes(head_dim, padded(group)));
    take(m.queries, group * padded_dim(head_dim));
    take(m.numbers, group * padded_dim(head_dim));
    take(m.spare, kGroupTokens * static_cast<int64_t>(head_dim));
    take(m.peaks, group);
    take(m.factors, group);
    // Not a power of two, or the heads' scores of a token would compete for the same cache lines.
    m.stride = num_tokens + 16;
    take(m.scores, group * m.stride);
    take(m.mass, num_tokens);
    take(m.some, num_tokens);
    take(m.candidates, num_tokens);
    take(m.where, budget);
    take(m.unused, budget);
    for (Work& work : m.works) {
      take(work.chosen, budget);
      take(work.missing, budget);
      take(work.keys, budget);
      take(work.values, budget);
    }
    m.bytes = used;
    return m;
  }

  // -- share ----------------------------------------------------------------------------------------------------------

  const KvCell& cell(const KvSequence& sequence, int kv_head) const {
    return sequence.sharing->cells[layer_idx_ * layer_.num_kv + kv_head];
  }

  bool follows(const KvSequence& sequence, int kv_head) const {
    return sequence.sharing && cell(sequence, kv_head).key_layer != layer_idx_;
  }

  int32_t* shared_choice(const Work& work) const {
    const int64_t place = static_cast<int64_t>(work.query) * layer_.num_kv + work.kv_head;
    return work.sequence->sharing->chosen + place * work.sequence->recall->budget;
  }

  // Sets what the chosen tokens are scored by.
  void ask(const Work& work, const HeadRows<T>& heads) {
    if (!follows(*work.sequence, work.kv_head) || !work.sequence->sharing->far_queries) {
      fold_.set_queries(group_, [&](int row) { return heads.query(row); });
      return;
    }
    const HeadRows<T> own{layer_, step_, work.kv_head, work.query};
    const T* queries = static_cast<const T*>(work.sequence->sharing->far_queries);
    fold_.set_queries(group_, [&](int row) { return queries + own.head(row) * layer_.head_dim; });
  }

  // -- score ----------------------------------------------------------------------------------------------------------

  void score(const KvSequence& sequence, int kv_head, const HeadRows<T>& heads) {
    const KvRecall& recall = *sequence.recall;
    const int64_t row = sequence.sharing ? cell(sequence, kv_head).index_row
                                         : static_cast<int64_t>(layer_idx_) * layer_.num_kv + kv_head;
    const int dim = layer_.head_dim;
    for (int h = 0; h < group_; ++h) {
      float* query = m_.queries + h * padded_dim(dim);
      copy_row(heads.query(h), dim, query);
      for (int64_t i = dim; i < padded_dim(dim); ++i) query[i] = 0;
    }
    std::memset(m_.numbers, 0, group_ * padded_dim(dim));
    for (int h = 0; h < group_; h += kHeadsTogether) {
      const int count = smaller(kHeadsTogether, group_ - h);
      switch (recall.bits) {
        case 1: score_heads<1>(recall, row, h, count); break;
        case 2: score_heads<2>(recall, row, h, count); break;
        case 4: score_heads<4>(recall, row, h, count); break;
        default: score_heads<8>(recall, row, h, count); break;
      }
    }
  }

  static constexpr int kHeadsTogether = Vec::width == 16 ? 4 : 1;
  static constexpr int kGroupsAhead = 4;

  template <int kBits>
  void score_heads(const KvRecall& recall, int64_t row, int head, int count) {
    switch (count) {
      case 1: return score_groups<kBits, 1>(recall, row, head);
      case 2: return score_groups<kBits, smaller(2, kHeadsTogether)>(recall, row, head);
      case 3: return score_groups<kBits, smaller(3, kHeadsTogether)>(recall, row, head);
      default: return score_groups<kBits, kHeadsTogether>(recall, row, head);
    }
  }

  template <int kBits, int R>
  void score_groups(const KvRecall& recall, int64_t row, int head) {
    const int dim = layer_.head_dim;
    const int64_t block_bytes = kBlockTokens * dim * static_cast<int64_t>(sizeof(T));
    const Entries codes(step_.arena, block_bytes, recall.codes + row * recall.codes_stride,
                        kGroupTokens * static_cast<int64_t>(dim) * kBits / 8);
    const Entries params(step_.arena, block_bytes, recall.params + row * recall.params_stride,
                         2 * dim * static_cast<int64_t>(sizeof(T)));
    Vec highest[R];
    for (int r = 0; r < R; ++r) highest[r] = broadcast(kHidden);
    FoldedQuery folded[R];
    for (int g = 0; g < recall.num_groups; ++g) {
      if (g + kGroupsAhead < recall.num_groups) {
        codes.prefetch(g + kGroupsAhead);
        params.prefetch(g + kGroupsAhead);
      }
      const T* param = reinterpret_cast<const T*>(params.at(g));
      fold_queries<kBits, R>(head, param, folded);
      score_group<kBits, R>(reinterpret_cast<const uint8_t*>(codes.whole(g, m_.spare)), dim, folded,
                            m_.scores + head * m_.stride + g * kGroupTokens, m_.stride, highest);
    }
    for (int r = 0; r < R; ++r) m_.peaks[head + r] = max_of_lanes(highest[r]);
  }

  // Takes a group's quantiser into queries: q . key = q . (middle - levels / 2 * step) + (q * step) . code.
  // Scores come out in powers of two, as exp2 takes them.
  template <int kBits, int R>
  void fold_queries(int head, const T* param, FoldedQuery* folded) {
    const int dim = layer_.head_dim;
    const Vec half = broadcast(((1 << kBits) - 1) / -2.0f);
    const int vectors = static_cast<int>(divide_up(dim, Vec::width));
    Vec stepped[R][kMostVectors], constant[R], largest[R];
    for (int r = 0; r < R; ++r) constant[r] = largest[r] = zero();
    for (int i = 0; i < vectors; ++i) {
      const int at = i * Vec::width, n = smaller(Vec::width, dim - at);
      const Vec step = load_n(param + at, n);
      const Vec lowest = fma(step, half, load_n(param + dim + at, n));
      for (int r = 0; r < R; ++r) {
        const Vec q = load(m_.queries + (head + r) * padded_dim(dim) + at);
        stepped[r][i] = q * step;
        constant[r] = fma(q, lowest, constant[r]);
        largest[r] = max(largest[r], max(stepped[r][i], zero() - stepped[r][i]));
      }
    }
    const float scale = step_.scale * kLog2E;
    for (int r = 0; r < R; ++r) {
      const float most = max_of_lanes(largest[r]) + 1e-30f;
      const Vec to_levels = broadcast(query_levels(kBits) / most);
      int8_t* numbers = m_.numbers + (head + r) * padded_dim(dim);
      for (int i = 0; i < vectors; ++i) store_rounded(numbers + i * Vec::width, stepped[r][i] * to_levels);
      folded[r] = {numbers, most / query_levels(kBits) * scale, sum_of_lanes(constant[r]) * scale};
    }
  }

  static constexpr int kMostVectors = 1024 / Vec::width;

  // -- weigh ----------------------------------------------------------------------------------------------------------

  // A head's weight is e^(lse of the distant) / (e^(lse of the distant) + e^(lse of the near)), spread over tokens by
  // softmax.
  void weigh(const HeadRows<T>& heads, int num_tokens) {
    for (int h = 0; h < group_; ++h) {
      float* scores = m_.scores + h * m_.stride;
      const Vec peak = broadcast(m_.peaks[h]);
      Vec total = zero();
      for (int t = 0; t < num_tokens; t += Vec::width) {
        const Vec weight = rough_exp2(load(scores + t) - peak);
        total = total + weight;
        store(scores + t, weight);
      }
      const float near = step_.lse[heads.head(h)] * kLog2E;
      const float highest = near > m_.peaks[h] ? near : m_.peaks[h];
      const float own = std::exp2(m_.peaks[h] - highest);
      m_.factors[h] = own / (sum_of_lanes(total) * own + std::exp2(near - highest));
    }
    for (int t = 0; t < num_tokens; t += Vec::width) {
      Vec mass = load(m_.scores + t) * broadcast(m_.factors[0]);
      for (int h = 1; h < group_; ++h) {
        mass = fma(load(m_.scores + h * m_.stride + t), broadcast(m_.factors[h]), mass);
      }
      store(m_.mass + t, mass);
    }
  }

  // -- choose ---------------------------------------------------------------------------------------------------------

  // The tokens of most mass, rising; of equals, the first.
  void choose(int num_tokens, int budget) {
    if (budget == num_tokens) return choose_first(budget);
    const int count = find_candidates(num_tokens, lower_bound(num_tokens, budget));
    // Where scores are no numbers.
    if (count < budget) return choose_first(budget);
    for (int i = 0; i < count; ++i) m_.some[i] = m_.mass[m_.candidates[i]];
    const int padded_count = static_cast<int>(round_up(count, Vec::width));
    for (int i = count; i < padded_count; ++i) m_.some[i] = -1;
    const float least = nth_greatest(m_.some, padded_count, budget, 0);
    int equals = budget;
    for (int i = 0; i < count; ++i) equals -= m_.some[i] > least;
    int taken = 0;
    for (int i = 0; i < count && taken < budget; ++i) {
      if (m_.some[i] > least || (m_.some[i] == least && equals-- > 0)) now_.chosen[taken++] = m_.candidates[i];
    }
  }

  void choose_first(int budget) {
    for (int i = 0; i < budget; ++i) now_.chosen[i] = i;
  }

  // A mass that at least `budget` tokens reach: the budget-th of the greatest masses of a few times as many buckets.
  float lower_bound(int num_tokens, int budget) {
    const int buckets = static_cast<int>(round_up(4 * budget, Vec::width));
    if (num_tokens < 2 * buckets) return 0;
    std::memcpy(m_.some, m_.mass, buckets * sizeof(float));
    int t = buckets;
    for (; t + buckets <= num_tokens; t += buckets) {
      for (int i = 0; i < buckets; i += Vec::width) {
        store(m_.some + i, max(load(m_.some + i), load(m_.mass + t + i)));
      }
    }
    for (int i = 0; t + i < num_tokens; i += Vec::width) {
      store(m_.some + i, max(load(m_.some + i), load(m_.mass + t + i)));
    }
    // The last bits would hardly leave out a candidate more.
    return nth_greatest(m_.some, buckets, budget, 14);
  }

  int find_candidates(int num_tokens, float least) {
    const Vec bound = broadcast(least);
    int count = 0;
    for (int t = 0; t < num_tokens; t += Vec::width) {
      for (uint32_t lanes = lanes_at_least(load(m_.mass + t), bound); lanes; lanes &= lanes - 1) {
        m_.candidates[count++] = t + __builtin_ctz(lanes);
      }
    }
    return count;
  }

  // -- fetch ----------------------------------------------------------------------------------------------------------

  // Where the chosen tokens' keys and values are read: in recall slots if the sequence has some, else in host memory.
  void locate() {
    const KvSequence& sequence = *now_.sequence;
    const KvRecall& recall = *sequence.recall;
    const GroupRows rows(layer_, layer_idx_, sequence, now_.kv_head);
    if (!recall.slots) {
      now_.num_missing = 0;
      for (int i = 0; i < now_.count; ++i) {
        const T* token = host_token(recall, now_.chosen[i]);
        now_.keys[i] = token + rows.key;
        now_.values[i] = token + rows.value;
        prefetch_row(now_.keys[i]);
        prefetch_row(now_.values[i]);
      }
      tally(recall, now_.count, 0, now_.count, 2);
      return;
    }
    const bool needs_keys = !follows(sequence, now_.kv_head);
    admit(recall);
    for (int i = 0; i < now_.num_missing; ++i) {
      const T* token = host_token(recall, now_.chosen[now_.missing[i]]);
      if (needs_keys) prefetch_row(token + rows.key);
      prefetch_row(token + rows.value);
    }
    const int32_t* key_slots = m_.where;
    if (sequence.sharing) {
      int32_t* kept = sequence.sharing->key_slots + static_cast<int64_t>(now_.kv_head) * recall.budget;
      if (needs_keys) std::memcpy(kept, m_.where, now_.count * sizeof(int32_t));
      key_slots = kept;
    }
    for (int i = 0; i < now_.count; ++i) {
      now_.keys[i] = slot_row(recall, 0, now_.kv_head, key_slots[i]);
      now_.values[i] = slot_row(recall, 1, now_.kv_head, m_.where[i]);
      prefetch_row(now_.keys[i]);
      prefetch_row(now_.values[i]);
    }
    tally(recall, now_.count, now_.count - now_.num_missing, now_.num_missing, needs_keys ? 2 : 1);
  }

  // Copies what is missing into its slots.
  void fetch(const Work& work) const {
    const KvSequence& sequence = *work.sequence;
    const int64_t row_bytes = layer_.head_dim * static_cast<int64_t>(sizeof(T));
    const GroupRows rows(layer_, layer_idx_, sequence, work.kv_head);
    const bool needs_keys = !follows(sequence, work.kv_head);
    for (int i = 0; i < work.num_missing; ++i) {
      const int place = work.missing[i];
      const T* token = host_token(*sequence.recall, work.chosen[place]);
      if (needs_keys) std::memcpy(const_cast<T*>(work.keys[place]), token + rows.key, row_bytes);
      std::memcpy(const_cast<T*>(work.values[place]), token + rows.value, row_bytes);
    }
    if (!needs_keys) __atomic_fetch_add(sequence.sharing->fetched, work.num_missing * row_bytes, __ATOMIC_RELAXED);
  }

  // Finds the chosen tokens' slots, and gives those that have none the slots of tokens that weren't chosen.
  void admit(const KvRecall& recall) {
    const int64_t head = static_cast<int64_t>(layer_idx_) * layer_.num_kv + now_.kv_head;
    int32_t* tokens = recall.resident + head * 2 * recall.budget;
    int32_t* slots = tokens + recall.budget;
    const int count = now_.count;
    int num_missing = 0, num_unused = 0, at = 0;
    for (int i = 0; i < count; ++i) {
      for (; at < recall.budget && tokens[at] < now_.chosen[i]; ++at) m_.unused[num_unused++] = slots[at];
      if (at < recall.budget && tokens[at] == now_.chosen[i]) {
        m_.where[i] = slots[at++];
      } else {
        now_.missing[num_missing++] = i;
      }
    }
    for (; at < recall.budget; ++at) m_.unused[num_unused++] = slots[at];
    for (int i = 0; i < num_missing; ++i) m_.where[now_.missing[i]] = m_.unused[i];
    for (int i = 0; i < count; ++i) {
      tokens[i] = now_.chosen[i];
      slots[i] = m_.where[i];
    }
    for (int i = count; i < recall.budget; ++i) {
      tokens[i] = kNoToken;
      slots[i] = m_.unused[num_missing + i - count];
    }
    now_.num_missing = num_missing;
  }

  // A token's place in its group, before the (layer, KV head)'s.
  const T* host_token(const KvRecall& recall, int token) const {
    return reinterpret_cast<const T*>(recall.groups[token / kGroupTokens]) + token % kGroupTokens * 2 * layer_.head_dim;
  }

  T* slot_row(const KvRecall& recall, int kind, int kv_head, int slot) const {
    const int64_t cell = (layer_idx_ * 2 + kind) * layer_.num_kv + kv_head;
    const int64_t block = recall.slots[cell * recall.slots_stride + slot / kBlockTokens];
    return static_cast<T*>(step_.arena) + (block * kBlockTokens + slot % kBlockTokens) * layer_.head_dim;
  }

  void prefetch_row(const T* row) const {
    const char* bytes = reinterpret_cast<const char*>(row);
    const int64_t count = layer_.head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < count; i += 64) _mm_prefetch(bytes + i, _MM_HINT_T0);
  }

  // A sequence's items run on several threads.
  void tally(const KvRecall& recall, int num_chosen, int num_found, int num_fetched, int rows_of_each) const {
    const int64_t bytes = num_fetched * rows_of_each * layer_.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t added[] = {recall.slots ? num_chosen : 0, num_found, bytes};
    for (int i = 0; i < 3; ++i) __atomic_fetch_add(recall.counters + i, added[i], __ATOMIC_RELAXED);
  }

  // -- attend ---------------------------------------------------------------------------------------------------------

  void merge(const HeadRows<T>& heads) {
    const int dim = layer_.head_dim;
    for (int h = 0; h < group_; ++h) {
      float& near = step_.lse[heads.head(h)];
      const float distant = state_.peak[h] * kLn2 + std::log(state_.mass[h]);
      const float highest = near > distant ? near : distant;
      const float near_weight = std::exp(near - highest), distant_weight = std::exp(distant - highest);
      const float total = near_weight + distant_weight;
      const Vec of_near = broadcast(near_weight / total);
      const Vec of_distant = broadcast(distant_weight / total / state_.mass[h]);
      T* out = static_cast<T*>(step_.attended) + heads.head(h) * dim;
      const float* sums = state_.sums + h * state_.stride;
      for (int i = 0; i < dim; i += Vec::width) {
        const int n = smaller(Vec::width, dim - i);
        store_n(out + i, fma(load_n(out + i, n), of_near, load_n(sums + i, n) * of_distant), n);
      }
      near = highest + std::log(total);
    }
  }

  const KvLayer& layer_;
  const KvStep& step_;
  int layer_idx_;
  int group_;
  Memory m_;
  Work now_;
  Work before_;
  State state_;
  VecFold<T> fold_;
};

// All queries of all sequences that recall.
template <class T>
void recall_all(const KvLayer& layer, int layer_idx, const KvStep& step) {
  int count = 0, num_tokens = 0, budget = 0;
  for (int s = 0; s < step.num_sequences; ++s) {
    const KvSequence& sequence = step.sequences[s];
    if (!sequence.recall) continue;
    count += sequence.num_queries * layer.num_kv;
    num_tokens = larger(num_tokens, sequence.recall->num_groups * kGroupTokens);
    budget = larger(budget, sequence.recall->budget);
  }
  if (count == 0) return;
  auto* items = static_cast<Item*>(shared_buffer(Buffer::kItems, count * sizeof(Item)));
  int planned = 0;
  for (int s = 0; s < step.num_sequences; ++s) {
    if (!step.sequences[s].recall) continue;
    for (int query = 0; query < step.sequences[s].num_queries; ++query) {
      for (int kv_head = 0; kv_head < layer.num_kv; ++kv_head) items[planned++] = {s, kv_head, query, 1, kAllSplits, 0};
    }
  }
  const int64_t bytes = Recaller<T>::bytes(layer.head_dim, layer.num_heads / layer.num_kv, num_tokens, budget);
  parallel([&](Team& team, int thread) {
    Recaller<T> recaller(layer, layer_idx, step, num_tokens, budget, static_cast<char*>(thread_buffer(thread, bytes)));
    for (int i = team.next(); i < count; i = team.next()) {
      recaller.begin(step.sequences[items[i].sequence], items[i].kv_head, items[i].first_query);
    }
    recaller.end();
  });
}

}  // namespace
}  // namespace kv
