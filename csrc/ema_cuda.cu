// The CUDA runner: one grid, with a block for each tile and average. Short blocks, balanced by the hardware's
// scheduler, stream faster than a persistent grid or a grid-stride loop; CUB's DeviceTransform found the same.
#include <initializer_list>

#include "ema_cuda.h"

namespace fused_ema {
namespace {

template <Op kOp>
__global__ void __launch_bounds__(kThreads, FUSED_EMA_RESIDENT / kThreads)
    ema_kernel(const __grid_constant__ Launch launch) {
  run_block<kOp>(launch, blockIdx.x, threadIdx.x);
}

}  // namespace

cudaError_t launch_cuda(Op op, const Launch& launch, cudaStream_t stream) {
  if (blocks(launch) == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks(launch)));
  switch (op) {
    case Op::update: ema_kernel<Op::update><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::copy: ema_kernel<Op::copy><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::swap: ema_kernel<Op::swap><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::restore: ema_kernel<Op::restore><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::update_stochastic: ema_kernel<Op::update_stochastic><<<grid, kThreads, 0, stream>>>(launch); break;
  }
  return cudaGetLastError();
}

cudaError_t load_cuda_kernels() {
  cudaFuncAttributes attributes;
  for (auto kernel : {ema_kernel<Op::update>, ema_kernel<Op::copy>, ema_kernel<Op::swap>, ema_kernel<Op::restore>,
                      ema_kernel<Op::update_stochastic>}) {
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  }
  return cudaSuccess;
}

}  // namespace fused_ema
