// The least an update can do: a loop over the tensors' memory that reads average and model once, writes the average
// once, and checks nothing. It shows what the machine's memory allows; bench_update.py compares with it.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

static float widen(float value) { return value; }

static float widen(uint16_t bits) {  // bfloat16: the upper half of a float32
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

static void narrow(float value, float* out) { *out = value; }

static void narrow(float value, uint16_t* out) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *out = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <typename E, typename P>
static void lerp(E* __restrict ema, const P* __restrict model, int64_t n, float weight) {
  for (int64_t i = 0; i < n; ++i) {
    const float e = widen(ema[i]);
    narrow(e + weight * (widen(model[i]) - e), ema + i);
  }
}

template <typename E, typename P>
static void stream(void* const* ema, void* const* model, const int64_t* sizes, int64_t tensors, float weight,
                   int threads) {
  int64_t elements = 0;
  for (int64_t t = 0; t < tensors; ++t) elements += sizes[t];
#pragma omp parallel num_threads(threads)
  {
    const int64_t begin = elements * omp_get_thread_num() / omp_get_num_threads();
    const int64_t end = elements * (omp_get_thread_num() + 1) / omp_get_num_threads();
    int64_t first = 0;  // of this tensor among all
    for (int64_t t = 0; t < tensors && first < end; first += sizes[t++]) {
      const int64_t low = std::max<int64_t>(begin - first, 0), high = std::min(end - first, sizes[t]);
      if (low < high) lerp(static_cast<E*>(ema[t]) + low, static_cast<const P*>(model[t]) + low, high - low, weight);
    }
  }
}

#define STREAM(NAME, E, P)                                                                                        \
  extern "C" void NAME(void* const* ema, void* const* model, const int64_t* sizes, int64_t tensors, float weight, \
                       int threads) {                                                                             \
    stream<E, P>(ema, model, sizes, tensors, weight, threads);                                                    \
  }
STREAM(float32_float32, float, float)
STREAM(float32_bfloat16, float, uint16_t)
STREAM(bfloat16_bfloat16, uint16_t, uint16_t)
