// Chooses the fold by the number of rows.
#pragma once

#include "attention.h"

namespace kv {
namespace {

// Few rows straight from the tile by `Few`; more by `Many`.
template <class Many, class Few>
class DecodeFold {
 public:
  using Element = bf16;

  static int64_t bytes(int head_dim, int padded_rows) {
    return round_up(Many::bytes(head_dim, padded_rows), 64) + Few::bytes(head_dim);
  }

  DecodeFold(int head_dim, int padded_rows, float scale, char* memory)
      : head_dim_(head_dim),
        many_(head_dim, padded_rows, scale, memory),
        few_(head_dim, scale, memory + round_up(Many::bytes(head_dim, padded_rows), 64)) {}

  template <class QueryOf>
  void set_queries(int rows, QueryOf&& query_of) {
    is_few_ = Few::takes(head_dim_, rows);
    if (is_few_) {
      few_.set_queries(rows, query_of);
    } else {
      many_.set_queries(rows, query_of);
    }
  }

  void fold(const Tile<bf16>& tile, int first, const int32_t* visible, Ahead& ahead, State& state) {
    if (is_few_) {
      few_.fold(tile, first, visible, ahead, state);
    } else {
      many_.fold(tile, first, visible, ahead, state);
    }
  }

  void flush(State& state) {
    if (!is_few_) many_.flush(state);
  }

  void settle(State& state) {
    if (is_few_) {
      few_.settle(state);
    } else {
      many_.settle(state);
    }
  }

 private:
  int head_dim_;
  bool is_few_ = false;
  Many many_;
  Few few_;
};

}  // namespace
}  // namespace kv
