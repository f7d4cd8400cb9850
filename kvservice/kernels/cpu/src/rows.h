// Work on single rows: powers, norms, rotation. A row's result depends on that row alone.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>

#include "abi.h"

namespace kv {
namespace {

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// 2^x by a polynomial of the fraction, interpolated at Chebyshev's points. Exactly 1 at 0, exactly 0 far below.
// Good to fp32's last place.
inline Vec exp2(Vec x) {
  const Vec n = round(x), f = x - n;
  Vec p = broadcast(1.545316294e-4f);
  p = fma(p, f, broadcast(1.339086336e-3f));
  p = fma(p, f, broadcast(9.618082557e-3f));
  p = fma(p, f, broadcast(5.550357114e-2f));
  p = fma(p, f, broadcast(2.402265076e-1f));
  p = fma(p, f, broadcast(6.931471880e-1f));
  return scale_by_power(fma(p, f, broadcast(1.0f)), n);
}

// The same to 7e-6, far below what rounding to bf16 then takes away.
inline Vec rough_exp2(Vec x) {
  const Vec n = round(x), f = x - n;
  Vec p = broadcast(9.656710289e-3f);
  p = fma(p, f, broadcast(5.583828295e-2f));
  p = fma(p, f, broadcast(2.402253010e-1f));
  p = fma(p, f, broadcast(6.931367339e-1f));
  return scale_by_power(fma(p, f, broadcast(1.0f)), n);
}

inline Vec silu(Vec x) { return x / (broadcast(1.0f) + exp2(x * broadcast(-kLog2E))); }

template <class In, class Out>
void copy_row(const In* x, int count, Out* y) {
  int i = 0;
  for (; i + Vec::width <= count; i += Vec::width) store(y + i, load(x + i));
  if (i < count) store_n(y + i, load_n(x + i, count - i), count - i);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// y = x / rms(x) * weight.
template <class Out>
void rms_norm(const float* x, const float* weight, float eps, int count, Out* y) {
  Vec squares = zero();
  int i = 0;
  for (; i + Vec::width <= count; i += Vec::width) squares = fma(load(x + i), load(x + i), squares);
  if (i < count) {
    const Vec rest = load_n(x + i, count - i);
    squares = fma(rest, rest, squares);
  }
  const Vec factor = broadcast(1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(count) + eps));
  for (i = 0; i + Vec::width <= count; i += Vec::width) store(y + i, load(x + i) * factor * load(weight + i));
  if (i < count) {
    const int n = count - i;
    store_n(y + i, load_n(x + i, n) * factor * load_n(weight + i, n), n);
  }
}

// Rotates number i of a head with number i + half, in place; `half` cosines and sines.
inline void rotate(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i += Vec::width) {
    const int n = smaller(Vec::width, half - i);
    const Vec a = load_n(head + i, n), b = load_n(head + half + i, n);
    const Vec c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(head + i, fma(a, c, zero() - b * s), n);
    store_n(head + half + i, fma(b, c, a * s), n);
  }
}

}  // namespace
}  // namespace kv
