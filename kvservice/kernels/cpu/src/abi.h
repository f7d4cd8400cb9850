// The C interface of the library: what Python calls, and the records it passes. Knows nothing of torch.
//
// Pointers are borrowed for the call. Strides and counts are in elements. `dtype` is that of weights, keys, values,
// queries and outputs alike; the residual stream, norms, biases and log-sum-exps are always fp32.
// One call runs at a time: a second caller waits.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)

extern "C" {

enum KvDtype : int32_t { KV_BF16 = 0, KV_F32 = 1 };

// A matrix [out, in], packed by kv_pack.
struct KvLinear {
  const void* packed;
  const float* bias;  // [out] or null
  int32_t in;
  int32_t out;      // of a gated pair: the width after gating, half the rows of the matrix
  int32_t dtype;    // KvDtype
  int32_t is_gated;  // rows are [gate; up]: the product is silu(gate) * up
};

// One decoder layer's weights.
struct KvLayer {
  KvLinear qkv;
  KvLinear o;
  KvLinear gate_up;
  KvLinear down;
  const float* norm1;   // [hidden]
  const float* norm2;   // [hidden]
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;  // [head_dim] or null
  float eps;
  int32_t num_heads;
  int32_t num_kv;
  int32_t head_dim;
};

// Where one (layer, KV head) of a sequence that shares distant keys between layers finds them. A group is rows of
// head_dim numbers; a token's rows lie two after those of the token before.
struct KvCell {
  int64_t key_layer;    // whose keys: its own layer, or, of a follower, an earlier one, its anchor
  int64_t index_row;    // of those keys, in the tables of the index
  int64_t key_row;      // of token 0 in a group
  int64_t value_row;    // likewise
  int64_t is_followed;  // it is the anchor of others
};

// How a sequence shares distant keys between layers. Anchors write what their followers read in later layers.
struct KvSharing {
  const KvCell* cells;   // [layers, num_kv]
  void* far_queries;     // [num_queries, num_heads, head_dim], of anchors: followers score by them; null: by their own
  int32_t* chosen;       // [num_queries, num_kv, budget], tokens that were recalled; null where nothing is
  int32_t* key_slots;    // [num_kv, budget], the slots of their keys; null: recall into no slots
  int64_t* fetched;      // added to: bytes that followers fetched into slots
  int32_t until_slide;   // queries before the window slides; it does so again after each 64 more
};

// What a sequence recalls from: low-bit keys of its distant tokens in arena blocks, their keys and values in host memory,
// and slots in the arena for those recalled last. A group is 64 tokens.
//   codes    of a group: vectors of 64 bytes, see key_codes.h
//   params   of a group: for each channel the quantiser's step, then the middle of its range, [2, head_dim]
struct KvRecall {
  const int32_t* codes;    // [layers * num_kv, or as KvCell, columns], blocks of the arena
  int64_t codes_stride;    // between rows
  const int32_t* params;   // as codes
  int64_t params_stride;
  const int64_t* groups;   // addresses, as in KvSequence
  const int32_t* slots;    // [cells, budget / 16], blocks of the arena, as KvSequence.table; null: recall into no slots
  int64_t slots_stride;
  int32_t* resident;       // [layers, num_kv, 2, budget]: tokens in the slots, rising, and the slot of each
  int64_t* counters;       // added to: tokens looked up in slots, tokens found there, bytes fetched
  int32_t num_groups;
  int32_t bits;            // 1, 2, 4 or 8
  int32_t budget;          // tokens that a query recalls in a KV head
};

// One sequence's share of a step: its queries' rows, its tokens in the arena, and, where queries see them all, those in
// host memory between its sinks and its window.
//   local token    0 .. 15     16 ..
//   position       0 .. 15     window_start ..
struct KvSequence {
  const int32_t* table;   // [cells, columns], arena blocks of 16 tokens; cell = (layer * 2 + K or V) * num_kv + head
  int64_t table_stride;   // between the table's rows
  int32_t num_resident;   // tokens in the arena before the step
  int32_t num_queries;    // tokens of the step, already counted in neither
  int32_t first_row;      // of its queries among the step's rows
  int32_t window_start;   // 16 + a multiple of 64
  const int64_t* groups;  // addresses of groups of 64 tokens, [layers, num_kv, 64, K or V, head_dim] each, or as KvCell
  int32_t num_groups;     // 0, or all before window_start
  const KvRecall* recall;  // or null
  const KvSharing* sharing;  // or null
};

// Keys and values of one part of one sequence outside the arena, seen by all its queries.
struct KvPart {
  const void* keys;      // [num_kv, t, d], d contiguous
  const void* values;    // as keys
  int64_t head_stride;
  int64_t token_stride;
  int32_t num_tokens;
  int32_t num_queries;
  int32_t first_row;
};

// What all layers of one step share.
struct KvStep {
  float* x;                  // [rows, hidden], the residual stream, updated in place
  void* q;                   // [rows, num_heads, head_dim]
  void* attended;            // as q
  float* lse;                // [rows, num_heads] or null
  void* arena;               // [blocks, 16, head_dim]
  const KvSequence* sequences;
  const int64_t* positions;  // [rows]
  const float* cos;          // [max_positions, rotary_dim / 2]
  const float* sin;          // as cos
  float scale;               // of the scores
  int32_t rows;
  int32_t num_sequences;
  int32_t rotary_dim;        // leading numbers of a head that rotate; the rest pass
  int32_t is_uniform;        // a row's bits don't depend on how many queries its sequence has in the step; slower
};

// What each KV head of a sequence holds in one layer, and a query of it. A head's slots are first those of its packed
// groups of 32 tokens, see held.h, then those in the arena; a query sees the first `visible` of them.
struct KvHeld {
  const void* queries;       // [num_kv, group, head_dim]
  const void* arena;         // [blocks, 16, head_dim]
  const int32_t* table;      // [2 * num_kv, columns], blocks of keys, then of values
  int64_t table_stride;
  const int32_t* visible;    // [num_kv]
  const int64_t* moves;      // [num_kv, width], positions that a slot's key is rotated on before it is used; or null
  const float* cos;          // [positions, head_dim / 2]; there if moves are
  const float* sin;
  const void* codes;         // [num_kv, num_groups, 2, 32 * head_dim * bits / 8], of keys, then of values
  const void* key_params;    // [num_kv, num_groups, 2, head_dim], step and middle of each number
  const void* value_params;  // [num_kv, num_groups, 2, 32], step and middle of each token
  float* logits;             // [num_kv, group, width], scaled; minus infinity where the query sees nothing
  float* weights;            // likewise, their softmax
  void* out;                 // as queries
  float scale;
  int32_t num_kv;
  int32_t group;
  int32_t head_dim;
  int32_t width;             // at least the most that a head holds
  int32_t num_groups;
  int32_t bits;              // 2, 4 or 8
  int32_t dtype;             // KvDtype
};

// "amx", "avx512", "avx2" or "none": the best that machine, build and limit allow.
const char* kv_isa();
// Packed matrices stay valid. A name that this build doesn't have limits nothing but to what is built.
void kv_limit_isa(const char* most);
int32_t kv_num_threads();
void kv_set_threads(int32_t num_threads);
// How long idle threads wait for the next call: turns of spinning, then turns of yielding, then they sleep.
void kv_set_waiting(int32_t spin_turns, int32_t yield_turns);

// Asks the system to back memory by 2 MiB pages where whole ones fit. Reading scattered blocks needs them.
void kv_advise_huge(void* memory, int64_t bytes);

int64_t kv_packed_bytes(int32_t out, int32_t in, int32_t dtype, int32_t is_gated);
// weight: [out, in], or [2 * out, in] when gated.
void kv_pack(const void* weight, int32_t out, int32_t in, int32_t dtype, int32_t is_gated, void* packed);

// y = x @ W^T (+ bias). x is in the matrix's dtype; y in `y_dtype`.
void kv_linear(const KvLinear* linear, const void* x, int64_t x_stride, int32_t rows, void* y, int64_t y_stride,
               int32_t y_dtype);
// y = rms_norm(x) @ W^T in fp32, of the rows named by `row_ids` ([rows], or null for the first): the head of a model.
void kv_norm_linear(const KvLinear* linear, const float* norm, float eps, const float* x, const int64_t* row_ids,
                    int32_t rows, float* y);
// y = rms_norm(x), in `dtype`.
void kv_rms_norm(const float* x, const float* norm, float eps, int32_t rows, int32_t hidden, void* y, int32_t dtype);

// Norm, q/k/v, q/k norms, rotation; K and V of the step's tokens into the arena, queries into step->q.
void kv_layer_pre(const KvLayer* layer, int32_t layer_idx, const KvStep* step);
// Causal attention of step->q over the arena into step->attended and step->lse.
void kv_attend(const KvLayer* layer, int32_t layer_idx, const KvStep* step);
// Adds to step->attended and step->lse what sequences recall.
void kv_recall(const KvLayer* layer, int32_t layer_idx, const KvStep* step);
// o + residual, norm, gate/up, down + residual, from step->attended.
void kv_layer_post(const KvLayer* layer, const KvStep* step);
// The four above over the layers [begin, end) of a model.
void kv_layers(const KvLayer* layers, int32_t begin, int32_t end, const KvStep* step);

// Low-bit codes of `count` groups of keys, [count, 64, head_dim] with tokens `stride` numbers apart, to [count, 64 * head_dim * bits / 8], and what decodes
// them, [count, 2, head_dim].
void kv_encode_groups(const void* keys, int64_t stride, int64_t count, int32_t head_dim, int32_t bits, int32_t dtype, uint8_t* codes,
                    void* params);

// How a row's token is drawn. See sampling.h.
struct KvDraw {
  uint64_t draw;      // below 2^53: how far into the weights, in the order of token ids
  double typical_p;   // from 1 on: not used
  double top_p;       // from 1 on: not used
  double min_p;       // 0: not used
  float temperature;  // above 0
  int32_t top_k;      // 0: not used
};

// The highest logit of each row, [rows, vocab], and the first token that has it. A row with a NaN gives NaN.
void kv_highest(const float* logits, int64_t stride, int32_t rows, int32_t vocab, float* values, int64_t* tokens);
// A token drawn for each row. A logit of minus infinity is never drawn; each row has a finite one, and no NaN.
void kv_draw(const float* logits, int64_t stride, const struct KvDraw* how, int32_t rows, int32_t vocab,
             int64_t* tokens);

// Attention of step->q over one part of each of some sequences into step->attended and step->lse.
void kv_attend_parts(const KvLayer* layer, const KvPart* parts, int32_t num_parts, const KvStep* step);
// Attention of one query over what its KV heads hold, with its weights.
void kv_attend_held(const KvHeld* held);
// Merges (out, lse) of disjoint parts by log-sum-exp into the first. heads = rows * num_heads; a part that a row saw
// nothing of has lse minus infinity.
void kv_merge(void* const* outs, float* const* lses, int32_t num_parts, int64_t heads, int32_t head_dim,
              int32_t dtype);
}

#pragma GCC visibility pop
