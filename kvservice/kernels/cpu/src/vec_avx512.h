// Sixteen fp32 lanes: the vector that the kernels are written in, on AVX-512.
#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace kv {
namespace {

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  // Round to nearest, ties to even; a NaN stays one.
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load_n(const bf16* p, int n) { return {widen(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x.v)); }
inline void store_n(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
inline void store_n(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x.v)); }

// Pairs (even k, odd k) of sixteen columns, as weights are packed.
inline void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The same, not taken apart yet.
struct Pairs {
  __m512i v;
};
inline Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// To each lane of sum, the products of a pair.
inline Vec add_products(Vec sum, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#else
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)),
                                    _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)));
  return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, upper)),
                          _mm512_castsi512_ps(_mm512_and_si512(b.v, upper)), _mm512_add_ps(sum.v, even))};
#endif
}
// Of a number and a NaN: b.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec round(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec floor(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// x * 2^n for whole n; 0 where n is far below.
inline Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline float sum_of_lanes(Vec x) { return _mm512_reduce_add_ps(x.v); }
inline float max_of_lanes(Vec x) { return _mm512_reduce_max_ps(x.v); }

// The first n lanes of x, `other` in the rest.
inline Vec keep_first(Vec x, int n, Vec other) {
  const int kept = n < 0 ? 0 : n > 16 ? 16 : n;
  return {_mm512_mask_mov_ps(other.v, first_lanes(kept), x.v)};
}

// Each quarter's lane i holds a part of the sum of the lanes of vector i of four.
inline Vec sums_of_quad(Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))))};
}

// Of four such: the sums of the sixteen vectors in order.
inline Vec join_quads(const Vec* quads) {
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0].v, quads[1].v, 0x88),
                                   _mm512_shuffle_f32x4(quads[0].v, quads[1].v, 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2].v, quads[3].v, 0x88),
                                    _mm512_shuffle_f32x4(quads[2].v, quads[3].v, 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}

// Lane i is the sum of the lanes of x[i].
inline Vec sums_of_each(const Vec* x) {
  Vec quads[4];
  for (int i = 0; i < 4; ++i) quads[i] = sums_of_quad(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  return join_quads(quads);
}

// Of even and odd numbers, those of the first eight pairs in order, and those of the last.
inline Vec first_pairs(Vec even, Vec odd) {
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(even.v, order, odd.v)};
}
inline Vec last_pairs(Vec even, Vec odd) {
  const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(even.v, order, odd.v)};
}

// Bit i: whether lane i of x is at least that of y.
inline uint32_t lanes_at_least(Vec x, Vec y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ); }

// Bytes, and 32-bit lanes that take products of four neighbouring ones each.
struct Bytes {
  static constexpr int width = 64;
  __m512i v;
};
struct Ints {
  __m512i v;
};

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes all_bytes(int x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
inline Bytes four_bytes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
// Four bytes from every `stride`.
inline Bytes every_four(const int8_t* p, int stride) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_i32gather_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride)), p, 1)};
}
inline void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x.v); }
inline Bytes joined(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Bytes flipped(Bytes x, Bytes mask) { return {_mm512_xor_si512(x.v, mask.v)}; }
// Bits move up within each four bytes.
inline Bytes raised(Bytes x, int count) { return {_mm512_slli_epi32(x.v, static_cast<unsigned>(count))}; }
inline Bytes shifted(Bytes x, int count) { return {_mm512_srli_epi16(x.v, static_cast<unsigned>(count))}; }
inline Bytes masked(Bytes x, Bytes mask) { return {_mm512_and_si512(x.v, mask.v)}; }
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
// a has no sign, b has. Two neighbouring products must fit into 16 bits, unless any bytes do.
#ifdef __AVX512VNNI__
constexpr bool kProductsHoldBytes = true;
#else
constexpr bool kProductsHoldBytes = false;
#endif
inline Ints add_products(Ints sum, Bytes a, Bytes b) {
#ifdef __AVX512VNNI__
  return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
#else
  const __m512i pairs = _mm512_maddubs_epi16(a.v, b.v);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
inline Vec to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
// To the nearest whole number.
inline void store_rounded(int8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

}  // namespace
}  // namespace kv
