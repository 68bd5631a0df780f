// The least an update can do, as a loop over two plain arrays: average and model are read once, the average is
// written once. What the machine's memory allows, for bench_update.py to compare with.
#include <cstdint>
#include <cstring>

static float widen(float value) { return value; }

static float widen(uint16_t bits) {  // bfloat16: the upper half of a float32
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

template <typename P>
static void stream(float* __restrict ema, const P* __restrict model, int64_t n, float weight, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) ema[i] += weight * (widen(model[i]) - ema[i]);
}

extern "C" void stream_float32(float* ema, const float* model, int64_t n, float weight, int threads) {
  stream(ema, model, n, weight, threads);
}

extern "C" void stream_bfloat16(float* ema, const uint16_t* model, int64_t n, float weight, int threads) {
  stream(ema, model, n, weight, threads);
}
