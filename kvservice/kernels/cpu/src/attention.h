// Attention over paged or contiguous KV, for the queries of many sequences at once.
//
// Online softmax, arranged so that a query's result depends on nothing but its own positions:
//   tile    up to 64 tokens: positions 0 .. 15, then 16 + 64 k ..; folded into a running state one after the other
//   split   8 tiles, at fixed positions; each starts a state of its own, and states are merged in order
// Splits let several threads share one long sequence; many queries run all their splits on one thread. Both do the same
// arithmetic. What a query may not see adds exact zeros.
//
// A row is a query in one query head; the rows of a KV head's group run together: row = query * group + head in group.
#pragma once


#include <immintrin.h>

#include <climits>
#include <cmath>

#include "parallel.h"
#include "rows.h"

namespace kv {
namespace {

constexpr int kBlockTokens = 16;
constexpr int kTileTokens = 64;
constexpr int kTileBlocks = kTileTokens / kBlockTokens;
constexpr int kTilesPerSplit = 8;
constexpr int kSinkTokens = 16;
// Of one work item. More rows share the preparation of a tile; fewer stay in the first-level cache.
constexpr int kRowsPerItem = 192;

// Below any score, so that the first tile's rescaling gives 0, and above what hides a token.
constexpr float kLowestPeak = -1e20f;
constexpr float kHidden = -1e30f;
// Sums shrink only when a score rises above the state's peak by more: rarely, then. Powers of two of it are far from
// where fp32 and bf16 end.
constexpr float kSlack = 8.0f;

// Keys and values of a tile: whole blocks of 16 tokens, of which those from `count` on hold zeros.
template <class T>
struct Tile {
  const T* keys[kTileBlocks];
  const T* values[kTileBlocks];
  ptrdiff_t stride;  // between tokens
  int count;

  int num_blocks() const { return (count + kBlockTokens - 1) / kBlockTokens; }
};

// Replaces a half-filled last block by a copy with zeros at its end: what lies there may be anything, or not be ours.
template <class T>
void complete_last_block(Tile<T>& tile, int head_dim, T* spare) {
  const int filled = tile.count % kBlockTokens;
  if (filled == 0) return;
  const int last = tile.num_blocks() - 1;
  T* copies[2] = {spare, spare + kBlockTokens * tile.stride};
  const T* sources[2] = {tile.keys[last], tile.values[last]};
  for (int i = 0; i < 2; ++i) {
    for (int t = 0; t < kBlockTokens; ++t) {
      T* to = copies[i] + t * tile.stride;
      if (t < filled) {
        std::memcpy(static_cast<void*>(to), sources[i] + t * tile.stride, head_dim * sizeof(T));
      } else {
        std::memset(static_cast<void*>(to), 0, head_dim * sizeof(T));
      }
    }
  }
  tile.keys[last] = copies[0];
  tile.values[last] = copies[1];
}

// Fetches the next tile's blocks into the cache bit by bit, between the work on this one: blocks lie anywhere in the
// arena, so the processor can't guess where, and only so many cache lines can be under way at a time.
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(int64_t block_bytes) : lines_per_block_(static_cast<int>(block_bytes / 64)) {}

  void add(const void* block) { blocks_[num_blocks_++] = static_cast<const char*>(block); }

  void fetch(int num_lines) {
    for (; num_lines > 0 && block_ < num_blocks_; --num_lines) {
      _mm_prefetch(blocks_[block_] + line_ * 64, _MM_HINT_T0);
      if (++line_ == lines_per_block_) {
        line_ = 0;
        ++block_;
      }
    }
  }

 private:
  const char* blocks_[2 * kTileBlocks] = {};
  int lines_per_block_ = 0;
  unsigned num_blocks_ = 0;
  unsigned block_ = 0;
  int line_ = 0;
};

// Running softmax of `rows` rows: sums of values and of weights, both divided by 2^peak. Scores are kept times log2(e),
// so that powers of two do.
struct State {
  float* sums;  // [rows][stride]
  float* peak;
  float* mass;
  ptrdiff_t stride;

  static int64_t row_floats(int head_dim) { return round_up(head_dim, 16) + 2; }

  State(float* memory, int padded_rows, int head_dim) : stride(round_up(head_dim, 16)) {
    sums = memory;
    peak = sums + padded_rows * stride;
    mass = peak + padded_rows;
  }

  void clear(int rows) {
    std::memset(sums, 0, rows * stride * sizeof(float));
    for (int r = 0; r < rows; ++r) {
      peak[r] = kLowestPeak;
      mass[r] = 0;
    }
  }

  // Adds another state of the same rows, over later tokens.
  void merge(const State& other, int rows) {
    for (int r = 0; r < rows; ++r) {
      const float highest = peak[r] > other.peak[r] ? peak[r] : other.peak[r];
      const Vec mine = exp2(broadcast(peak[r] - highest)), theirs = exp2(broadcast(other.peak[r] - highest));
      float* to = sums + r * stride;
      const float* from = other.sums + r * stride;
      for (int i = 0; i < stride; i += Vec::width) store(to + i, fma(load(to + i), mine, load(from + i) * theirs));
      float both[Vec::width];
      store(both, fma(broadcast(mass[r]), mine, broadcast(other.mass[r]) * theirs));
      mass[r] = both[0];
      peak[r] = highest;
    }
  }
};

// Where rows lie in the step's tensors.
template <class T>
struct HeadRows {
  const KvLayer& layer;
  const KvStep& step;
  int kv_head;
  int first_row;  // of the first query

  int group() const { return layer.num_heads / layer.num_kv; }
  int64_t head(int row) const {
    const int g = group();
    return static_cast<int64_t>(first_row + row / g) * layer.num_heads + kv_head * g + row % g;
  }
  const T* query(int row) const { return static_cast<const T*>(step.q) + head(row) * layer.head_dim; }

  void finish(const State& state, int rows) const {
    for (int row = 0; row < rows; ++row) {
      const float mass = state.mass[row];
      const Vec factor = broadcast(mass > 0 ? 1.0f / mass : 0.0f);
      T* out = static_cast<T*>(step.attended) + head(row) * layer.head_dim;
      const float* sums = state.sums + row * state.stride;
      for (int i = 0; i < layer.head_dim; i += Vec::width) {
        const int n = smaller(Vec::width, layer.head_dim - i);
        store_n(out + i, load_n(sums + i, n) * factor, n);
      }
      if (step.lse) step.lse[head(row)] = mass > 0 ? state.peak[row] * kLn2 + std::log(mass) : -INFINITY;
    }
  }
};

// Where token 0 of a (layer, KV head) lies in a group in host memory, in numbers from its start; tokens are 2 * head_dim
// apart.
struct GroupRows {
  int64_t key;
  int64_t value;

  GroupRows(const KvLayer& layer, int layer_idx, const KvSequence& sequence, int kv_head) {
    const int64_t head = static_cast<int64_t>(layer_idx) * layer.num_kv + kv_head;
    key = head * kTileTokens * 2 * layer.head_dim;
    value = key + layer.head_dim;
    if (sequence.sharing) {
      key = sequence.sharing->cells[head].key_row * layer.head_dim;
      value = sequence.sharing->cells[head].value_row * layer.head_dim;
    }
  }
};

// One sequence's tokens: sinks in the arena, groups in host memory if its queries see them, window in the arena.
template <class T>
class PagedTokens {
 public:
  PagedTokens(const KvLayer& layer, int layer_idx, const KvStep& step, const KvSequence& sequence)
      : layer_(layer), layer_idx_(layer_idx), arena_(static_cast<const T*>(step.arena)), sequence_(sequence) {
    if (!sequence.sharing) return;
    for (int head = 0; head < layer.num_kv; ++head) {
      if (follows(head)) until_slide_ = sequence.sharing->until_slide;
    }
  }

  int num_queries() const { return sequence_.num_queries; }
  int first_row() const { return sequence_.first_row; }

  // Where layers share distant keys, which tiles are distant depends on the query: it sees the window that it would see
  // if it came alone.
  int until_slide() const { return until_slide_; }
  // Tiles 1 to this one are distant to a query.
  int last_far(int query) const {
    return sequence_.num_groups + (query < until_slide_ ? 0 : 1 + (query - until_slide_) / kTileTokens);
  }
  // What rows score distant tiles by, as the step's queries but from the sequence's first on; null: by their own.
  const T* far_queries(int kv_head) const {
    return follows(kv_head) ? static_cast<const T*>(sequence_.sharing->far_queries) : nullptr;
  }
  // Where queries are to be left for followers; null: nowhere.
  T* kept_queries(int kv_head) const {
    return sequence_.sharing && cell(kv_head).is_followed ? static_cast<T*>(sequence_.sharing->far_queries) : nullptr;
  }

  // How many tokens query i sees.
  int visible(int query) const { return grouped_tokens() + sequence_.num_resident + query + 1; }

  // Tile 0 holds the sinks; the next ones the groups; the others the window. Tokens count through all of them.
  static int first_token(int tile) { return tile == 0 ? 0 : kSinkTokens + (tile - 1) * kTileTokens; }
  static int num_tiles(int tokens) {
    return tokens <= kSinkTokens ? (tokens > 0) : 1 + (tokens - kSinkTokens + kTileTokens - 1) / kTileTokens;
  }
  // Splits lie at fixed positions, however much of the window has left the arena; the first always holds the sinks.
  int split_of(int tile) const { return tile == 0 ? 0 : (tiles_gone() + tile) / kTilesPerSplit; }
  int first_tile(int split) const { return split == 0 ? 0 : larger(1, split * kTilesPerSplit - tiles_gone()); }
  // The next that holds anything.
  int split_after(int split) const { return larger(split + 1, split_of(1)); }

  // Of a distant tile, tile <= last_far, the keys are the anchor's.
  Tile<T> tile(int index, int kv_head, int tokens, int last_far, T* spare) const {
    if (is_group(index)) return group_tile(index - 1, kv_head);
    Tile<T> tile;
    tile.stride = layer_.head_dim;
    tile.count = smaller(tokens, first_token(index + 1)) - first_token(index);
    const int column = first_column(index);
    const int32_t* keys = key_blocks(index, kv_head, last_far) + column;
    const int32_t* values = row(1, kv_head) + column;
    const int64_t block_elements = kBlockTokens * static_cast<int64_t>(layer_.head_dim);
    for (int b = 0; b < tile.num_blocks(); ++b) {
      tile.keys[b] = arena_ + keys[b] * block_elements;
      tile.values[b] = arena_ + values[b] * block_elements;
    }
    complete_last_block(tile, layer_.head_dim, spare);
    return tile;
  }

  // What of a tile is worth fetching ahead. Not a group: there the processor itself runs ahead.
  Ahead ahead(int index, int kv_head, int tokens, int last_far) const {
    if (is_group(index)) return Ahead();
    const int64_t block_elements = kBlockTokens * static_cast<int64_t>(layer_.head_dim);
    Ahead ahead(block_elements * static_cast<int64_t>(sizeof(T)));
    const int column = first_column(index);
    const int count = smaller(tokens, first_token(index + 1)) - first_token(index);
    for (int kind = 1; kind >= 0; --kind) {
      const int32_t* blocks = (kind ? row(kind, kv_head) : key_blocks(index, kv_head, last_far)) + column;
      for (int b = 0; b * kBlockTokens < count; ++b) ahead.add(arena_ + blocks[b] * block_elements);
    }
    return ahead;
  }

 private:
  int grouped_tokens() const { return sequence_.num_groups * kTileTokens; }
  bool is_group(int tile) const { return tile >= 1 && tile <= sequence_.num_groups; }
  // Of a tile that is in the arena.
  int first_column(int tile) const {
    return (tile == 0 ? 0 : first_token(tile) - grouped_tokens()) / kBlockTokens;
  }
  int tiles_gone() const {
    return (sequence_.window_start - kSinkTokens) / kTileTokens - static_cast<int>(sequence_.num_groups);
  }

  Tile<T> group_tile(int group, int kv_head) const {
    const T* start = reinterpret_cast<const T*>(sequence_.groups[group]);
    const GroupRows rows(layer_, layer_idx_, sequence_, kv_head);
    Tile<T> tile;
    tile.stride = 2 * layer_.head_dim;
    tile.count = kTileTokens;
    for (int b = 0; b < kTileBlocks; ++b) {
      tile.keys[b] = start + rows.key + b * kBlockTokens * tile.stride;
      tile.values[b] = start + rows.value + b * kBlockTokens * tile.stride;
    }
    return tile;
  }

  const KvCell& cell(int kv_head) const { return sequence_.sharing->cells[layer_idx_ * layer_.num_kv + kv_head]; }
  bool follows(int kv_head) const { return sequence_.sharing && cell(kv_head).key_layer != layer_idx_; }

  const int32_t* row(int kind, int kv_head) const { return row_of(layer_idx_, kind, kv_head); }
  const int32_t* row_of(int64_t layer_idx, int kind, int kv_head) const {
    return sequence_.table + ((layer_idx * 2 + kind) * layer_.num_kv + kv_head) * sequence_.table_stride;
  }
  // Of a tile in the arena.
  const int32_t* key_blocks(int tile, int kv_head, int last_far) const {
    const bool is_shared = tile >= 1 && tile <= last_far && follows(kv_head);
    return is_shared ? row_of(cell(kv_head).key_layer, 0, kv_head) : row(0, kv_head);
  }

  const KvLayer& layer_;
  int layer_idx_;
  const T* arena_;
  const KvSequence& sequence_;
  int until_slide_ = INT_MAX;  // where layers don't share keys it doesn't matter
};

// A part that lies contiguous outside the arena; all queries see all of it.
template <class T>
class PartTokens {
 public:
  PartTokens(const KvLayer& layer, const KvPart& part) : layer_(layer), part_(part) {}

  int num_queries() const { return part_.num_queries; }
  int first_row() const { return part_.first_row; }
  int visible(int) const { return part_.num_tokens; }
  static int first_token(int tile) { return tile * kTileTokens; }
  static int num_tiles(int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }
  static int split_of(int tile) { return tile / kTilesPerSplit; }
  static int first_tile(int split) { return split * kTilesPerSplit; }
  static int split_after(int split) { return split + 1; }
  static int until_slide() { return INT_MAX; }
  static int last_far(int) { return 0; }
  static const T* far_queries(int) { return nullptr; }
  static T* kept_queries(int) { return nullptr; }

  Tile<T> tile(int index, int kv_head, int tokens, int, T* spare) const {
    const int64_t start = kv_head * part_.head_stride + first_token(index) * part_.token_stride;
    Tile<T> tile;
    tile.stride = part_.token_stride;
    tile.count = smaller(tokens - first_token(index), kTileTokens);
    for (int b = 0; b < tile.num_blocks(); ++b) {
      const int64_t offset = start + b * kBlockTokens * part_.token_stride;
      tile.keys[b] = static_cast<const T*>(part_.keys) + offset;
      tile.values[b] = static_cast<const T*>(part_.values) + offset;
    }
    complete_last_block(tile, layer_.head_dim, spare);
    return tile;
  }

  // Nothing: the processor itself runs ahead in contiguous memory.
  Ahead ahead(int, int, int, int) const { return Ahead(); }

 private:
  const KvLayer& layer_;
  const KvPart& part_;
};

// One thread's share of the work: some queries of one sequence in one KV head, over all splits or one.
struct Item {
  int sequence;
  int kv_head;
  int first_query;
  int num_queries;
  int split;     // or kAllSplits
  int state_idx;  // of a single split: where its state is kept until all are done
};
constexpr int kAllSplits = -1;

// Cuts the step into items. Sequences with few queries are cut by splits, those with many by queries.
template <class Tokens>
class Plan {
 public:
  Plan(const Tokens* all_tokens, int num_sequences, int num_kv, int group)
      : tokens_(all_tokens), queries_per_item_(larger(1, kRowsPerItem / group)) {
    int count = 0;
    for (int s = 0; s < num_sequences; ++s) count += num_kv * num_items(tokens_[s]);
    items = static_cast<Item*>(shared_buffer(Buffer::kItems, (count + 1) * sizeof(Item)));
    for (int s = 0; s < num_sequences; ++s) {
      for (int kv_head = 0; kv_head < num_kv; ++kv_head) add(s, kv_head);
    }
  }

  // How many items a thread takes at a time. Of a decode step several, if there are enough: then what a thread fetches
  // ahead at the end of a split is for itself.
  int items_per_run(int num_threads) const {
    constexpr int kMost = 4, kRunsPerThread = 8;
    if (num_states < num_planned) return 1;
    return larger(1, smaller(kMost, num_planned / (kRunsPerThread * num_threads)));
  }

  Item* items;
  int num_planned = 0;
  int num_states = 0;
  int most_queries_kept = 0;  // of an item that leaves a state

 private:
  static int last_split(const Tokens& tokens) {
    const int tiles = Tokens::num_tiles(tokens.visible(tokens.num_queries() - 1));
    return tiles == 0 ? 0 : tokens.split_of(tiles - 1);
  }
  bool is_cut_by_split(const Tokens& tokens) const {
    return tokens.num_queries() > 0 && tokens.num_queries() <= queries_per_item_ && last_split(tokens) > 0 &&
           tokens.num_queries() <= tokens.until_slide();
  }

  // Calls visit(first, count) with queries that one item takes. Those of one item see the same window.
  template <class Visit>
  void each_run(const Tokens& tokens, Visit&& visit) const {
    int end_of_window = tokens.until_slide();
    for (int first = 0; first < tokens.num_queries();) {
      if (first >= end_of_window) end_of_window += kTileTokens;
      const int end = smaller(smaller(first + queries_per_item_, end_of_window), tokens.num_queries());
      visit(first, end - first);
      first = end;
    }
  }

  int num_items(const Tokens& tokens) const {
    // Splits that hold nothing get no item.
    if (is_cut_by_split(tokens)) return last_split(tokens) - tokens.split_after(0) + 2;
    int count = 0;
    each_run(tokens, [&](int, int) { ++count; });
    return count;
  }

  void add(int s, int kv_head) {
    const Tokens& tokens = tokens_[s];
    if (is_cut_by_split(tokens)) {
      most_queries_kept = larger(most_queries_kept, tokens.num_queries());
      for (int split = 0; split <= last_split(tokens); split = tokens.split_after(split)) {
        items[num_planned++] = {s, kv_head, 0, tokens.num_queries(), split, num_states++};
      }
      return;
    }
    // The last queries see most, so they go first.
    num_planned += num_items(tokens);
    int place = num_planned;
    each_run(tokens, [&](int first, int count) { items[--place] = {s, kv_head, first, count, kAllSplits, 0}; });
  }

  const Tokens* tokens_;
  int queries_per_item_;
};

// One thread at work on items.
template <class Fold, class Tokens>
class Attender {
  using T = typename Fold::Element;

 public:
  static int64_t bytes(int head_dim, int rows, int64_t stride) {
    return states_bytes(head_dim, rows) + visible_bytes(rows) + spare_bytes(stride) +
           Fold::bytes(head_dim, padded(rows));
  }
  static int padded(int rows) { return static_cast<int>(round_up(rows, 16)); }

  Attender(const KvLayer& layer, const KvStep& step, int rows, int64_t stride, char* memory)
      : layer_(layer),
        step_(step),
        total_(reinterpret_cast<float*>(memory), padded(rows), layer.head_dim),
        part_(reinterpret_cast<float*>(memory) + padded(rows) * State::row_floats(layer.head_dim), padded(rows),
              layer.head_dim),
        visible_(reinterpret_cast<int32_t*>(memory + states_bytes(layer.head_dim, rows))),
        spare_(reinterpret_cast<T*>(memory + states_bytes(layer.head_dim, rows) + visible_bytes(rows))),
        fold_(layer.head_dim, padded(rows), step.scale, reinterpret_cast<char*>(spare_) + spare_bytes(stride)) {}

  // Attends and writes the result, or, for a single split, leaves its state in `kept`. Fetches the start of the next
  // item, if there is one.
  void work(const Tokens* all_tokens, const Item& item, const Item* next, float* kept) {
    const Tokens& tokens = all_tokens[item.sequence];
    const int group = layer_.num_heads / layer_.num_kv;
    const int rows = item.num_queries * group;
    const HeadRows<T> heads{layer_, step_, item.kv_head, tokens.first_row() + item.first_query};
    fold_.set_queries(rows, [&](int row) { return heads.query(row); });
    far_.last_tile = tokens.last_far(item.first_query);
    far_.queries = tokens.far_queries(item.kv_head);
    far_.is_asked = false;
    if (T* kept_queries = tokens.kept_queries(item.kv_head); kept_queries && item.split <= 0) {
      for (int row = 0; row < rows; ++row) {
        std::memcpy(static_cast<void*>(kept_queries + far_row(item, row)), heads.query(row), layer_.head_dim * sizeof(T));
      }
    }
    // Rows of padding repeat the last row's, so that they never ask for a mask of their own.
    for (int row = 0; row < padded(rows); ++row) {
      visible_[row] = tokens.visible(item.first_query + smaller(row / group, item.num_queries - 1));
    }
    const int seen = visible_[rows - 1];
    const int num_tiles = Tokens::num_tiles(seen);
    const Ahead after = next ? first_ahead(all_tokens[next->sequence], *next) : Ahead();
    if (item.split != kAllSplits) {
      State state(kept, padded(rows), layer_.head_dim);
      const int end = smaller(num_tiles, tokens.first_tile(tokens.split_after(item.split)));
      fold_tiles(tokens, item, tokens.first_tile(item.split), end, seen, after, state);
      return;
    }
    total_.clear(padded(rows));
    for (int tile = 0; tile < num_tiles;) {
      const int end = smaller(num_tiles, tokens.first_tile(tokens.split_after(tokens.split_of(tile))));
      fold_tiles(tokens, item, tile, end, seen,
                 end < num_tiles ? tokens.ahead(end, item.kv_head, seen, far_.last_tile) : after, part_);
      total_.merge(part_, rows);
      tile = end;
    }
    heads.finish(total_, rows);
  }

 private:
  static int64_t states_bytes(int head_dim, int rows) {
    return round_up(2 * padded(rows) * State::row_floats(head_dim) * sizeof(float), 64);
  }
  static int64_t visible_bytes(int rows) { return padded(rows) * sizeof(int32_t); }
  static int64_t spare_bytes(int64_t stride) { return round_up(2 * kBlockTokens * stride * sizeof(T), 64); }

  // Folds tiles of one split; `after` is what follows them.
  void fold_tiles(const Tokens& tokens, const Item& item, int begin, int end, int seen, const Ahead& after,
                  State& state) {
    state.clear(padded(item.num_queries * layer_.num_heads / layer_.num_kv));
    for (int index = begin; index < end; ++index) {
      if (far_.queries) ask(tokens, item, index >= 1 && index <= far_.last_tile, state);
      const Tile<T> tile = tokens.tile(index, item.kv_head, seen, far_.last_tile, spare_);
      Ahead ahead = index + 1 < end ? tokens.ahead(index + 1, item.kv_head, seen, far_.last_tile) : after;
      fold_.fold(tile, Tokens::first_token(index), visible_, ahead, state);
    }
    fold_.settle(state);
  }

  static Ahead first_ahead(const Tokens& tokens, const Item& item) {
    const int seen = tokens.visible(item.first_query + item.num_queries - 1);
    const int tile = item.split == kAllSplits ? 0 : tokens.first_tile(item.split);
    return tokens.ahead(tile, item.kv_head, seen, tokens.last_far(item.first_query));
  }

  // From here on tiles are scored by the anchor's queries, or by the rows' own.
  void ask(const Tokens& tokens, const Item& item, bool is_far, State& state) {
    if (is_far == far_.is_asked) return;
    far_.is_asked = is_far;
    fold_.flush(state);
    const int rows = item.num_queries * (layer_.num_heads / layer_.num_kv);
    const HeadRows<T> heads{layer_, step_, item.kv_head, tokens.first_row() + item.first_query};
    fold_.set_queries(rows, [&](int row) { return is_far ? far_.queries + far_row(item, row) : heads.query(row); });
  }

  // Of a row among the sequence's queries.
  int64_t far_row(const Item& item, int row) const {
    return HeadRows<T>{layer_, step_, item.kv_head, item.first_query}.head(row) * layer_.head_dim;
  }

  // Of the item in work: its last distant tile, what those are scored by, and whether they are now.
  struct Far {
    int last_tile = 0;
    const T* queries = nullptr;
    bool is_asked = false;
  };

  const KvLayer& layer_;
  const KvStep& step_;
  State total_;
  State part_;
  int32_t* visible_;  // of each row: how many tokens it sees
  T* spare_;
  Far far_;
  Fold fold_;
};

template <class Fold, class Tokens>
void attend_all(const KvLayer& layer, const KvStep& step, const Tokens* tokens, int num_sequences, int64_t stride) {
  using T = typename Fold::Element;
  const int group = layer.num_heads / layer.num_kv;
  const Plan<Tokens> plan(tokens, num_sequences, layer.num_kv, group);
  const int most_rows = group * larger(1, kRowsPerItem / group);
  const int kept_rows = Attender<Fold, Tokens>::padded(plan.most_queries_kept * group);
  const int64_t state_floats = kept_rows * State::row_floats(layer.head_dim);
  auto* states = static_cast<float*>(shared_buffer(Buffer::kStates, plan.num_states * state_floats * sizeof(float)));
  parallel([&](Team& team, int thread) {
    {
      const int64_t bytes = Attender<Fold, Tokens>::bytes(layer.head_dim, most_rows, stride);
      Attender<Fold, Tokens> attender(layer, step, most_rows, stride,
                                      static_cast<char*>(thread_buffer(thread, bytes)));
      const int per_run = plan.items_per_run(team.size());
      for (int run = team.next(); run * per_run < plan.num_planned; run = team.next()) {
        const int end = smaller((run + 1) * per_run, plan.num_planned);
        for (int i = run * per_run; i < end; ++i) {
          const Item& item = plan.items[i];
          attender.work(tokens, item, i + 1 < end ? &item + 1 : nullptr, states + item.state_idx * state_floats);
        }
      }
    }
    if (plan.num_states == 0) return;
    team.barrier();
    for (int i = team.next(); i < plan.num_planned; i = team.next()) {
      const Item& item = plan.items[i];
      if (item.split != 0) continue;
      // A sequence's splits in one KV head follow one another; the first takes in the rest.
      const int rows = item.num_queries * group;
      const int padded = Attender<Fold, Tokens>::padded(rows);
      State total(states + item.state_idx * state_floats, padded, layer.head_dim);
      for (int j = i + 1; j < plan.num_planned && plan.items[j].split > 0; ++j) {
        total.merge(State(states + plan.items[j].state_idx * state_floats, padded, layer.head_dim), rows);
      }
      HeadRows<T>{layer, step, item.kv_head, tokens[item.sequence].first_row()}.finish(total, rows);
    }
  });
}

// Merges parts by log-sum-exp into the first.
template <class T>
void merge_parts(void* const* outs, float* const* lses, int num_parts, int64_t heads, int head_dim) {
  parallel([&](Team& team, int thread) {
    const Share share(heads, thread, team.size());
    auto* weights = static_cast<float*>(thread_buffer(thread, num_parts * sizeof(float)));
    for (int64_t head = share.begin; head < share.end; ++head) {
      float highest = -INFINITY;
      for (int p = 0; p < num_parts; ++p) highest = lses[p][head] > highest ? lses[p][head] : highest;
      float total = 0;
      for (int p = 0; p < num_parts; ++p) {
        weights[p] = lses[p][head] == -INFINITY ? 0.0f : std::exp(lses[p][head] - highest);
        total += weights[p];
      }
      for (int i = 0; i < head_dim; i += Vec::width) {
        const int n = smaller(Vec::width, head_dim - i);
        Vec sum = zero();
        for (int p = 0; p < num_parts; ++p) {
          // What a part that saw nothing has written as its output, if anything, doesn't matter.
          if (weights[p] == 0) continue;
          const T* part = static_cast<const T*>(outs[p]) + head * head_dim + i;
          sum = fma(load_n(part, n), broadcast(weights[p] / total), sum);
        }
        store_n(static_cast<T*>(outs[0]) + head * head_dim + i, sum, n);
      }
      lses[0][head] = total > 0 ? highest + std::log(total) : -INFINITY;
    }
  });
}

}  // namespace
}  // namespace kv
