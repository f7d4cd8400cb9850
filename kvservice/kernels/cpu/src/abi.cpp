// The exported functions: one call at a time, by the kernels that this machine runs best.
#include "abi.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "isa.h"
#include "kernels.h"
#include "packing.h"
#include "parallel.h"

namespace kv {
namespace {

#if defined(KV_WITH_AMX)
constexpr Isa kBuilt = Isa::kAmx;
#elif defined(KV_WITH_AVX512)
constexpr Isa kBuilt = Isa::kAvx512;
#else
constexpr Isa kBuilt = Isa::kAvx2;
#endif

Isa& isa() {
  static Isa in_use = detect_isa(kBuilt);
  return in_use;
}

const Kernels& kernels() {
  switch (isa()) {
#ifdef KV_WITH_AMX
    case Isa::kAmx: return kAmxKernels;
#endif
#ifdef KV_WITH_AVX512
    case Isa::kAvx512: return kAvx512Kernels;
#endif
    case Isa::kAvx2: return kAvx2Kernels;
    default: std::abort();  // Python asks kv_isa first
  }
}

// Buffers and threads are the library's, so calls queue up.
std::mutex& call_mutex() {
  static std::mutex mutex;
  return mutex;
}

template <class F>
void call(F&& f) {
  std::lock_guard<std::mutex> lock(call_mutex());
  f(kernels());
}

// The matrix row that lies in a packed column, or -1 for padding.
int64_t source_row(int panel, int column, int out, bool is_gated) {
  if (!is_gated) {
    const int row = panel * kPanelColumns + column;
    return row < out ? row : -1;
  }
  const int row = panel * kHalfColumns + column % kHalfColumns;
  if (row >= out) return -1;
  return column < kHalfColumns ? row : static_cast<int64_t>(out) + row;
}

// Offset within a block of number k of a column.
int offset_in_block(int k, int column, int dtype) {
  return dtype == KV_BF16 ? (k / 2 * kHalfColumns + column) * 2 + k % 2 : k * kHalfColumns + column;
}

template <class T>
void pack(const T* weight, const PackedShape& shape, int out, int in, int dtype, bool is_gated, T* packed) {
  parallel([&](Team& team, int thread) {
    const Share share(shape.num_panels, thread, team.size());
    for (int64_t panel = share.begin; panel < share.end; ++panel) {
      T* to = packed + panel * shape.panel_elements();
      for (int column = 0; column < kPanelColumns; ++column) {
        const int64_t row = source_row(static_cast<int>(panel), column, out, is_gated);
        for (int k = 0; k < shape.padded_in(); ++k) {
          T* block = to + (k / kBlockDepth * 2 + column / kHalfColumns) * kBlockElements;
          block[offset_in_block(k % kBlockDepth, column % kHalfColumns, dtype)] =
              row >= 0 && k < in ? weight[row * in + k] : T{0};
        }
      }
    }
  });
}

}  // namespace
}  // namespace kv

using kv::call;
using kv::Kernels;

const char* kv_isa() { return kv::name_of(kv::isa()); }

void kv_limit_isa(const char* most) {
  std::lock_guard<std::mutex> lock(kv::call_mutex());
  for (kv::Isa isa = kv::kBuilt; isa > kv::Isa::kNone; isa = static_cast<kv::Isa>(static_cast<int>(isa) - 1)) {
    if (std::strcmp(most, kv::name_of(isa)) == 0) {
      kv::isa() = kv::detect_isa(isa);
      return;
    }
  }
  kv::isa() = std::strcmp(most, "none") == 0 ? kv::Isa::kNone : kv::detect_isa(kv::kBuilt);
}

int32_t kv_num_threads() {
  std::lock_guard<std::mutex> lock(kv::call_mutex());
  return kv::num_threads();
}

void kv_set_threads(int32_t num_threads) {
  std::lock_guard<std::mutex> lock(kv::call_mutex());
  if (num_threads != kv::num_threads()) kv::set_threads(num_threads);
}

void kv_set_waiting(int32_t spin_turns, int32_t yield_turns) { kv::set_waiting(spin_turns, yield_turns); }

void kv_advise_huge(void* memory, int64_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  // Only advice: a system without such pages stays as it is.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

int64_t kv_packed_bytes(int32_t out, int32_t in, int32_t dtype, int32_t is_gated) {
  const kv::PackedShape shape(out, in, is_gated != 0);
  return static_cast<int64_t>(shape.num_panels * shape.panel_elements()) * (dtype == KV_BF16 ? 2 : 4);
}

void kv_pack(const void* weight, int32_t out, int32_t in, int32_t dtype, int32_t is_gated, void* packed) {
  std::lock_guard<std::mutex> lock(kv::call_mutex());
  const kv::PackedShape shape(out, in, is_gated != 0);
  if (dtype == KV_BF16) {
    kv::pack(static_cast<const uint16_t*>(weight), shape, out, in, dtype, is_gated, static_cast<uint16_t*>(packed));
  } else {
    kv::pack(static_cast<const float*>(weight), shape, out, in, dtype, is_gated, static_cast<float*>(packed));
  }
}

void kv_linear(const KvLinear* linear, const void* x, int64_t x_stride, int32_t rows, void* y, int64_t y_stride,
               int32_t y_dtype) {
  call([&](const Kernels& k) { k.linear(linear, x, x_stride, rows, y, y_stride, y_dtype); });
}

void kv_norm_linear(const KvLinear* linear, const float* norm, float eps, const float* x, const int64_t* row_ids,
                    int32_t rows, float* y) {
  call([&](const Kernels& k) { k.norm_linear(linear, norm, eps, x, row_ids, rows, y); });
}

void kv_rms_norm(const float* x, const float* norm, float eps, int32_t rows, int32_t hidden, void* y, int32_t dtype) {
  call([&](const Kernels& k) { k.rms_norm(x, norm, eps, rows, hidden, y, dtype); });
}

void kv_layer_pre(const KvLayer* layer, int32_t layer_idx, const KvStep* step) {
  call([&](const Kernels& k) { k.layer_pre(layer, layer_idx, step); });
}

void kv_attend(const KvLayer* layer, int32_t layer_idx, const KvStep* step) {
  call([&](const Kernels& k) { k.attend(layer, layer_idx, step); });
}

void kv_recall(const KvLayer* layer, int32_t layer_idx, const KvStep* step) {
  call([&](const Kernels& k) { k.recall(layer, layer_idx, step); });
}

void kv_layer_post(const KvLayer* layer, const KvStep* step) {
  call([&](const Kernels& k) { k.layer_post(layer, step); });
}

void kv_layers(const KvLayer* layers, int32_t begin, int32_t end, const KvStep* step) {
  call([&](const Kernels& k) {
    for (int32_t i = begin; i < end; ++i) {
      k.layer_pre(layers + i, i, step);
      k.attend(layers + i, i, step);
      k.recall(layers + i, i, step);
      k.layer_post(layers + i, step);
    }
  });
}

void kv_encode_groups(const void* keys, int64_t stride, int64_t count, int32_t head_dim, int32_t bits, int32_t dtype, uint8_t* codes,
                    void* params) {
  call([&](const Kernels& k) { k.encode_keys(keys, stride, count, head_dim, bits, dtype, codes, params); });
}

void kv_highest(const float* logits, int64_t stride, int32_t rows, int32_t vocab, float* values, int64_t* tokens) {
  call([&](const Kernels& k) { k.highest(logits, stride, rows, vocab, values, tokens); });
}

void kv_draw(const float* logits, int64_t stride, const KvDraw* how, int32_t rows, int32_t vocab, int64_t* tokens) {
  call([&](const Kernels& k) { k.draw(logits, stride, how, rows, vocab, tokens); });
}

void kv_attend_parts(const KvLayer* layer, const KvPart* parts, int32_t num_parts, const KvStep* step) {
  call([&](const Kernels& k) { k.attend_parts(layer, parts, num_parts, step); });
}

void kv_attend_held(const KvHeld* held) {
  call([&](const Kernels& k) { k.attend_held(held); });
}

void kv_merge(void* const* outs, float* const* lses, int32_t num_parts, int64_t heads, int32_t head_dim,
              int32_t dtype) {
  call([&](const Kernels& k) { k.merge(outs, lses, num_parts, heads, head_dim, dtype); });
}
