// Regions as lambdas. Local to each unit, so that no instruction set's code leaks into another's.
#pragma once

#include <type_traits>

#include "threads.h"

namespace kv {
namespace {

template <class Body>
void parallel(Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run([](Team& team, int thread, void* context) { (*static_cast<Plain*>(context))(team, thread); }, &body);
}

// Thread's share of [0, count), as equal as can be.
struct Share {
  int64_t begin;
  int64_t end;

  Share(int64_t count, int thread, int num_threads)
      : begin(count * thread / num_threads), end(count * (thread + 1) / num_threads) {}
};

}  // namespace
}  // namespace kv
