// What all loops on the CPU need.
#pragma once

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

// The compiler builds a loop for several instruction sets, and one is chosen at load time: x86-64-v4 is AVX-512, v3 is
// AVX2 with FMA.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSED_EMA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FUSED_EMA_CLONES
#endif

namespace fused_ema {

// Keeps subnormals, whatever torch.set_flush_denormal() set on this thread.
class KeepSubnormals {
 public:
#ifdef __SSE2__
  KeepSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }  // flush to zero, denormals are zero
  ~KeepSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace fused_ema
