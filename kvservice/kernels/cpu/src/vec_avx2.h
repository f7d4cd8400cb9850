// Eight fp32 lanes: the vector that the kernels are written in, on AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace kv {
namespace {

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps()}; }

inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

inline __m128i narrow(__m256 x) {
  // Round to nearest, ties to even; a NaN stays one.
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline Vec load_n(const bf16* p, int n) {
  alignas(16) bf16 lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x.v)); }
inline void store_n(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }
inline void store_n(bf16* p, Vec x, int n) {
  alignas(16) bf16 lanes[8];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// Pairs (even k, odd k) of eight columns, as weights are packed.
inline void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The same, not taken apart yet.
struct Pairs {
  __m256i v;
};
inline Pairs load_pairs(const bf16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// To each lane of sum, the products of a pair.
inline Vec add_products(Vec sum, Pairs a, Pairs b) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256 even = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16)),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(b.v, 16)));
  return {_mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a.v, upper)),
                          _mm256_castsi256_ps(_mm256_and_si256(b.v, upper)), _mm256_add_ps(sum.v, even))};
}
// Of a number and a NaN: b.
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec round(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec floor(Vec x) { return {_mm256_floor_ps(x.v)}; }
// x * 2^n for whole n; 0 where n is far below. The exponent is raised by integer addition, in two halves, so that
// neither leaves its field.
inline Vec scale_by_power(Vec x, Vec n) {
  const __m256 inside = _mm256_max_ps(_mm256_min_ps(n.v, _mm256_set1_ps(252)), _mm256_set1_ps(-252));
  const __m256i whole = _mm256_cvtps_epi32(inside);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 rest =
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, first), rest)};
}

inline float sum_of_lanes(Vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float max_of_lanes(Vec x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The first n lanes of x, `other` in the rest.
inline Vec keep_first(Vec x, int n, Vec other) {
  return {_mm256_blendv_ps(other.v, x.v, _mm256_castsi256_ps(first_lanes(n)))};
}

// Each half's lane i holds a part of the sum of the lanes of vector i of four.
inline Vec sums_of_quad(Vec a, Vec b, Vec c, Vec d) {
  return {_mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v))};
}

// Of two such: the sums of the eight vectors in order.
inline Vec join_quads(const Vec* quads) {
  return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0].v, quads[1].v, 0x20),
                        _mm256_permute2f128_ps(quads[0].v, quads[1].v, 0x31))};
}

// Lane i is the sum of the lanes of x[i].
inline Vec sums_of_each(const Vec* x) {
  const Vec quads[2] = {sums_of_quad(x[0], x[1], x[2], x[3]), sums_of_quad(x[4], x[5], x[6], x[7])};
  return join_quads(quads);
}

// Of even and odd numbers, those of the first four pairs in order, and those of the last.
inline Vec first_pairs(Vec even, Vec odd) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(even.v, odd.v), _mm256_unpackhi_ps(even.v, odd.v), 0x20)};
}
inline Vec last_pairs(Vec even, Vec odd) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(even.v, odd.v), _mm256_unpackhi_ps(even.v, odd.v), 0x31)};
}

// Bit i: whether lane i of x is at least that of y.
inline uint32_t lanes_at_least(Vec x, Vec y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.v, y.v, _CMP_GE_OQ)));
}

// Bytes, and 32-bit lanes that take products of four neighbouring ones each.
struct Bytes {
  static constexpr int width = 32;
  __m256i v;
};
struct Ints {
  __m256i v;
};

inline Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Bytes all_bytes(int x) { return {_mm256_set1_epi8(static_cast<char>(x))}; }
inline Bytes four_bytes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
// Four bytes from every `stride`.
inline Bytes every_four(const int8_t* p, int stride) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), _mm256_mullo_epi32(lanes, _mm256_set1_epi32(stride)), 1)};
}
inline void store_bytes(uint8_t* p, Bytes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
inline Bytes joined(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Bytes flipped(Bytes x, Bytes mask) { return {_mm256_xor_si256(x.v, mask.v)}; }
// Bits move up within each four bytes.
inline Bytes raised(Bytes x, int count) { return {_mm256_slli_epi32(x.v, count)}; }
inline Bytes shifted(Bytes x, int count) { return {_mm256_srli_epi16(x.v, count)}; }
inline Bytes masked(Bytes x, Bytes mask) { return {_mm256_and_si256(x.v, mask.v)}; }
inline Ints no_ints() { return {_mm256_setzero_si256()}; }
// a has no sign, b has. Two neighbouring products must fit into 16 bits, unless any bytes do.
constexpr bool kProductsHoldBytes = false;
inline Ints add_products(Ints sum, Bytes a, Bytes b) {
  const __m256i pairs = _mm256_maddubs_epi16(a.v, b.v);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline Vec to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.v)}; }
// To the nearest whole number.
inline void store_rounded(int8_t* p, Vec x) {
  const __m256i whole = _mm256_cvtps_epi32(x.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

}  // namespace
}  // namespace kv
