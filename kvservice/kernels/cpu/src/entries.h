// The kernels of this unit's instruction set: chooses by number type. Each unit includes it once, with its own vectors
// and products, and names the table.
#pragma once

#include <new>

#include "fold_decode.h"
#include "fold_row.h"
#include "fold_vec.h"
#include "held.h"
#include "kernels.h"
#include "layer.h"
#include "product_vec.h"
#include "recall.h"
#include "sampling.h"
#ifdef __AMX_BF16__
#include "fold_amx.h"
#include "fold_few_amx.h"
#include "product_amx.h"
#endif

namespace kv {
namespace {

#ifdef __AMX_BF16__
using Bf16Product = AmxProduct;
#else
using Bf16Product = VecProduct<bf16>;
#endif
using F32Product = VecProduct<float>;

void linear(const KvLinear* linear, const void* x, int64_t x_stride, int32_t rows, void* y, int64_t y_stride,
            int32_t y_dtype) {
  if (linear->dtype == KV_BF16) {
    linear_rows<Bf16Product>(*linear, static_cast<const bf16*>(x), x_stride, rows, y, y_stride, y_dtype);
  } else {
    linear_rows<F32Product>(*linear, static_cast<const float*>(x), x_stride, rows, y, y_stride, y_dtype);
  }
}

void norm_linear(const KvLinear* linear, const float* norm, float eps, const float* x, const int64_t* row_ids,
                 int32_t rows, float* y) {
  if (linear->dtype == KV_BF16) {
    norm_linear_rows<Bf16Product>(*linear, norm, eps, x, row_ids, rows, y);
  } else {
    norm_linear_rows<F32Product>(*linear, norm, eps, x, row_ids, rows, y);
  }
}

void rms_norm_rows(const float* x, const float* norm, float eps, int32_t rows, int32_t hidden, void* y,
                   int32_t dtype) {
  parallel([&](Team& team, int thread) {
    const Share share(rows, thread, team.size());
    for (int64_t row = share.begin; row < share.end; ++row) {
      const int64_t offset = row * hidden;
      if (dtype == KV_BF16) {
        rms_norm(x + offset, norm, eps, hidden, static_cast<bf16*>(y) + offset);
      } else {
        rms_norm(x + offset, norm, eps, hidden, static_cast<float*>(y) + offset);
      }
    }
  });
}

void pre(const KvLayer* layer, int32_t layer_idx, const KvStep* step) {
  if (layer->qkv.dtype == KV_BF16) {
    layer_pre<Bf16Product>(*layer, layer_idx, *step);
  } else {
    layer_pre<F32Product>(*layer, layer_idx, *step);
  }
}

void post(const KvLayer* layer, const KvStep* step) {
  if (layer->qkv.dtype == KV_BF16) {
    layer_post<Bf16Product>(*layer, *step);
  } else {
    layer_post<F32Product>(*layer, *step);
  }
}

// An array of Tokens, made in place: the library keeps its own memory.
template <class Tokens, class Make>
Tokens* token_array(int count, Make&& make) {
  auto* tokens = static_cast<Tokens*>(shared_buffer(Buffer::kTokens, (count + 1) * sizeof(Tokens)));
  for (int i = 0; i < count; ++i) new (tokens + i) Tokens(make(i));
  return tokens;
}

// Calls `attend` with the fastest folds of the type and head_dim: for many rows, and for few.
template <class T, class Attend>
void with_fold([[maybe_unused]] int head_dim, Attend&& attend) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == sizeof(bf16)) {
    if (head_dim % 32 == 0) return attend(static_cast<AmxFold*>(nullptr), static_cast<FewRowsFold*>(nullptr));
  }
#endif
  attend(static_cast<VecFold<T>*>(nullptr), static_cast<RowFold*>(nullptr));
}

template <class T, class Tokens>
void attend_tokens(const KvLayer& layer, const KvStep& step, const Tokens* tokens, int count, int64_t stride) {
  with_fold<T>(layer.head_dim, [&](auto* many, [[maybe_unused]] auto* few) {
    using Many = std::remove_pointer_t<decltype(many)>;
    if constexpr (sizeof(T) == sizeof(bf16)) {
      using Few = std::remove_pointer_t<decltype(few)>;
      if (!step.is_uniform) return attend_all<DecodeFold<Many, Few>>(layer, step, tokens, count, stride);
    }
    attend_all<Many>(layer, step, tokens, count, stride);
  });
}

template <class T>
void attend_paged(const KvLayer& layer, int layer_idx, const KvStep& step) {
  using Tokens = PagedTokens<T>;
  const auto* tokens = token_array<Tokens>(
      step.num_sequences, [&](int i) { return Tokens(layer, layer_idx, step, step.sequences[i]); });
  attend_tokens<T>(layer, step, tokens, step.num_sequences, layer.head_dim);
}

void attend(const KvLayer* layer, int32_t layer_idx, const KvStep* step) {
  if (layer->qkv.dtype == KV_BF16) {
    attend_paged<bf16>(*layer, layer_idx, *step);
  } else {
    attend_paged<float>(*layer, layer_idx, *step);
  }
}

void recall(const KvLayer* layer, int32_t layer_idx, const KvStep* step) {
  if (layer->qkv.dtype == KV_BF16) {
    recall_all<bf16>(*layer, layer_idx, *step);
  } else {
    recall_all<float>(*layer, layer_idx, *step);
  }
}

template <class T>
void attend_contiguous(const KvLayer& layer, const KvPart* parts, int num_parts, const KvStep& step) {
  using Tokens = PartTokens<T>;
  const auto* tokens = token_array<Tokens>(num_parts, [&](int i) { return Tokens(layer, parts[i]); });
  int64_t stride = layer.head_dim;
  for (int i = 0; i < num_parts; ++i) stride = parts[i].token_stride > stride ? parts[i].token_stride : stride;
  attend_tokens<T>(layer, step, tokens, num_parts, stride);
}

void attend_parts(const KvLayer* layer, const KvPart* parts, int32_t num_parts, const KvStep* step) {
  if (layer->qkv.dtype == KV_BF16) {
    attend_contiguous<bf16>(*layer, parts, num_parts, *step);
  } else {
    attend_contiguous<float>(*layer, parts, num_parts, *step);
  }
}

void merge(void* const* outs, float* const* lses, int32_t num_parts, int64_t heads, int32_t head_dim, int32_t dtype) {
  if (dtype == KV_BF16) {
    merge_parts<bf16>(outs, lses, num_parts, heads, head_dim);
  } else {
    merge_parts<float>(outs, lses, num_parts, heads, head_dim);
  }
}

void encode_keys(const void* keys, int64_t stride, int64_t count, int32_t head_dim, int32_t bits, int32_t dtype, uint8_t* codes,
                 void* params) {
  if (dtype == KV_BF16) {
    encode_groups(static_cast<const bf16*>(keys), stride, count, head_dim, bits, codes, static_cast<bf16*>(params));
  } else {
    encode_groups(static_cast<const float*>(keys), stride, count, head_dim, bits, codes, static_cast<float*>(params));
  }
}

void attend_held(const KvHeld* held) {
  if (held->dtype == KV_BF16) {
    attend_held_heads<bf16>(*held);
  } else {
    attend_held_heads<float>(*held);
  }
}

constexpr Kernels kKernels = {linear, norm_linear, rms_norm_rows, pre, attend, recall, post, attend_parts, merge,
                              encode_keys, highest_rows, draw_rows, attend_held};

}  // namespace
}  // namespace kv
