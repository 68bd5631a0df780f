// What lerp.h needs of five headers that NVRTC does not bring and that a machine without a CUDA toolkit does not have:
// <cstdint>, <cstring>, <type_traits>, <cuda_fp16.h> and <cuda_bf16.h>. fused_ema/_build/nvrtc.py includes this first
// and lets those be empty. A conversion is the one instruction that CUDA's own header has for it.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;

namespace std {
template <bool, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool kCondition, class T, class F>
using conditional_t = typename conditional<kCondition, T, F>::type;

template <class, class>
inline constexpr bool is_same_v = false;
template <class T>
inline constexpr bool is_same_v<T, T> = true;
}  // namespace std

struct __half {
  unsigned short bits;
};
__device__ inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
__device__ inline unsigned short __half_as_ushort(__half half) { return half.bits; }
__device__ inline float __half2float(__half half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half.bits));
  return value;
}
__device__ inline __half __float2half_rn(float value) {
  __half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
}

struct __nv_bfloat16 {
  unsigned short bits;
};
__device__ inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 narrow) { return narrow.bits; }
__device__ inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}
