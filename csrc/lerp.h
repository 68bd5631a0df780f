// One element of an exponential moving average: the numeric contract, on host and device.
//
//     e' = e + (1 - decay) * (p - e)
//
// as one subtraction, one fused multiply-add and one store that rounds to nearest even. The CUDA kernel, the CPU loops
// and the emulated grid of the tests compile this same source, and give the same bits, since
//   - every fused multiply-add is explicit, and the build turns contraction off;
//   - the decay is rounded once, in `factor_of`, never per element.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FUSED_EMA_HD __host__ __device__ __forceinline__
#define FUSED_EMA_UNROLL_LOOP _Pragma("unroll")
#define FUSED_EMA_KEEP_LOOP _Pragma("unroll 1")
#else
#ifdef __GNUC__
#define FUSED_EMA_HD inline __attribute__((always_inline))
#else
#define FUSED_EMA_HD inline
#endif
#define FUSED_EMA_UNROLL_LOOP
#define FUSED_EMA_KEEP_LOOP
#endif

#ifndef __CUDA_ARCH__
#include <cmath>
#endif

namespace fused_ema {

// Storage types. bf16 and f16 are plain bits, which are converted but never computed with.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
using f32 = float;
using f64 = double;

template <class To, class From>
FUSED_EMA_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FUSED_EMA_HD float to_float(float x) { return x; }

FUSED_EMA_HD float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FUSED_EMA_HD float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Integer operations and one subtraction of normal numbers: every instruction set can vectorise them, and no
  // flush-to-zero mode changes the result.
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t special = magnitude >= 0x7c00u ? 112u << 23 : 0u;  // Inf and NaN
  const uint32_t normal = (magnitude << 13) + (112u << 23) + special;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(0x3f000000u | magnitude) - 0.5f);
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  return bit_cast<float>((magnitude < 0x400u ? subnormal : normal) | sign);
#endif
}

// Rounds a float32 to nearest even. NaN stays NaN.
template <class To>
FUSED_EMA_HD To from_float(float x);

template <>
FUSED_EMA_HD float from_float<float>(float x) {
  return x;
}

template <>
FUSED_EMA_HD bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return bf16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded)};
#endif
}

template <>
FUSED_EMA_HD f16 from_float<f16>(float x) {
#ifdef __CUDA_ARCH__
  return f16{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent and round in integers; a carry out of the mantissa gives the right answer, Inf
  // included. Subnormal results: adding 0.5 lets the float adder round.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;  // 2^16 and above: Inf
  half = magnitude > 0x7f800000u ? 0x7fffu : half;    // NaN
  return f16{uint16_t(half | (magnitude > 0x7f800000u ? 0u : bits >> 16 & 0x8000u))};
#endif
}

// ---- Stochastic rounding: up or down at random, so that the mean is the unrounded value --------------------------

// A hash of a counter: an element gets the same bits whatever the device, the threads or the order.
FUSED_EMA_HD uint32_t mix(uint32_t x) {  // Wellons' "lowbias32"
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
FUSED_EMA_HD uint32_t random_bits(uint64_t key, uint64_t counter) {
  return mix(mix(uint32_t(counter) ^ uint32_t(key)) + uint32_t(key >> 32) + uint32_t(counter >> 32) * 0x9e3779b9u);
}

// Adds a random share of one unit in the last place and truncates. A value that To can represent stays as it is.
template <class To>
FUSED_EMA_HD To from_float(float x, uint32_t random);

template <>
FUSED_EMA_HD bf16 from_float<bf16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bf16 special = from_float<bf16>(x);  // Inf and NaN
  return (bits & 0x7f800000u) == 0x7f800000u ? special : bf16{uint16_t((bits + (random >> 16)) >> 16)};
}

template <>
FUSED_EMA_HD f16 from_float<f16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t share = random >> 19;
  const uint32_t normal = (magnitude - (112u << 23) + share) >> 13;
  // In units of the smallest subnormal; below 1024, so that the sum keeps the 13 bits of the share.
  const bool small = magnitude < (113u << 23);
  const float units = bit_cast<float>(small ? magnitude : 0u) * 16777216.0f + float(int32_t(share)) * (1.0f / 8192.0f);
  uint32_t half = small ? uint32_t(int32_t(units)) : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;  // 2^16 and above: Inf
  half = magnitude > 0x7f800000u ? 0x7fffu : half;    // NaN
  return f16{uint16_t(half | (magnitude > 0x7f800000u ? 0u : bits >> 16 & 0x8000u))};
}

// The type of the arithmetic: float64 if either side is float64, else float32.
template <class E, class P>
using Compute = std::conditional_t<std::is_same_v<E, double> || std::is_same_v<P, double>, double, float>;

// Converts between storage types: exactly to a wider one, through float32 to a narrower one, as PyTorch does.
template <class To, class From>
FUSED_EMA_HD To cast(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, double>) {
    return double(to_float(x));
  } else if constexpr (std::is_same_v<From, double>) {
    return from_float<To>(float(x));
  } else {
    return from_float<To>(to_float(x));
  }
}

FUSED_EMA_HD float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
FUSED_EMA_HD double fused_multiply_add(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Whether x is neither infinite nor NaN.
FUSED_EMA_HD bool is_finite(float x) { return x >= -3.4028234663852886e38f && x <= 3.4028234663852886e38f; }
FUSED_EMA_HD bool is_finite(double x) { return x >= -1.7976931348623157e308 && x <= 1.7976931348623157e308; }

// The smaller of the two weights, with the sign that lerp() below needs: 1 - decay, or -decay. 1 - decay is computed in
// double and rounded once: 1 - float(decay) has a relative error of 1.7e-4 at decay 0.9999.
template <class T>
FUSED_EMA_HD T factor_of(double decay) {
  return 1.0 - decay < 0.5 ? T(1.0 - decay) : T(-decay);
}

// e' for 0 < decay < 1. The select keeps the bits of an average that equals the model: without it -0 would become +0,
// and Inf would become NaN.
template <class T>
FUSED_EMA_HD T lerp(T e, T p, T factor) {
  const T t = p - e;
  const T result = fused_multiply_add(factor, t, factor > T(0) ? e : p);
  return e == p ? e : result;
}

}  // namespace fused_ema
