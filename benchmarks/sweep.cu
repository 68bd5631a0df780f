// One variant of the kernel, with plans over plain arrays. bench_sweep.py compiles it with -D flags: the parameters in
// csrc/tiles.h, and SWEEP_LOAD, SWEEP_MODEL and SWEEP_STORE, the functions that load and store words.
#include <cuda_runtime.h>

#include <cstdint>

template <class T>
__device__ T plain(const T* pointer) {
  return *pointer;
}
template <class T>
__device__ T no_allocate(const T* pointer) {
  return *pointer;
}
template <>
__device__ uint4 no_allocate(const uint4* pointer) {
  uint4 word;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(pointer));
  return word;
}
template <>
__device__ uint2 no_allocate(const uint2* pointer) {
  uint2 word;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(pointer));
  return word;
}

#ifdef SWEEP_LOAD
#define FUSED_EMA_LOAD(pointer) SWEEP_LOAD(pointer)
#endif
#ifdef SWEEP_MODEL
#define FUSED_EMA_LOAD_READ_ONLY(pointer) SWEEP_MODEL(pointer)
#endif
#ifdef SWEEP_STORE
#define FUSED_EMA_STORE(pointer, word) SWEEP_STORE(pointer, word)
#endif

#include "../csrc/ema_cuda.cu"
#include "../csrc/table.h"

using namespace fused_ema;

namespace {
template <class T>
const T* uploaded(const std::vector<T>& values) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, values.size() * sizeof(T)) != cudaSuccess) return nullptr;
  cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return static_cast<const T*>(memory);
}
}  // namespace

extern "C" {

void free_plan(Launch* launch) {
  cudaFree(const_cast<Row*>(launch->rows));
  cudaFree(const_cast<Tile*>(launch->tiles));
  delete launch;
}

// Flat pairs; all averages have one type, and so do all models (enum Type). Returns null if there is no memory.
Launch* make_plan(int64_t pairs, void** ema, void** model, const int64_t* numel, int ema_type, int model_type) {
  Tables tables;
  const int64_t stride = 1;
  for (int64_t i = 0; i < pairs; ++i) {
    add_pair(tables, {ema[i], model[i], Type(ema_type), Type(model_type), true, 1, numel + i, &stride, &stride}, true);
  }
  auto* launch = new Launch{uploaded(tables.rows), nullptr, uploaded(tables.tiles), int64_t(tables.tiles.size()), {}};
  launch->call.last = 1;
  if (launch->rows && launch->tiles) return launch;
  free_plan(launch);
  return nullptr;
}

int update(Launch* launch, double decay, cudaStream_t stream) {
  launch->call.decay[0] = decay;
  return launch_cuda(Op::update, *launch, stream);
}

int registers() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ema_kernel<Op::update>) == cudaSuccess ? attributes.numRegs : -1;
}
int local_bytes() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ema_kernel<Op::update>) == cudaSuccess ? int(attributes.localSizeBytes)
                                                                                   : -1;
}
}
