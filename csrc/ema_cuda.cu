// The CUDA runner.
#include <initializer_list>

#include "ema_cuda.h"
#include "kernel.h"

namespace fused_ema {

cudaError_t launch_cuda(Op op, const Launch& launch, cudaStream_t stream) {
  if (blocks(launch) == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks(launch)));
  switch (op) {
    case Op::update: ema_kernel<Op::update><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::copy: ema_kernel<Op::copy><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::swap: ema_kernel<Op::swap><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::restore: ema_kernel<Op::restore><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::update_stochastic: ema_kernel<Op::update_stochastic><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::update_finite: ema_kernel<Op::update_finite><<<grid, kThreads, 0, stream>>>(launch); break;
    case Op::update_stochastic_finite:
      ema_kernel<Op::update_stochastic_finite><<<grid, kThreads, 0, stream>>>(launch);
      break;
  }
  return cudaGetLastError();
}

cudaError_t load_cuda_kernels() {
  cudaFuncAttributes attributes;
  for (auto kernel :
       {ema_kernel<Op::update>, ema_kernel<Op::copy>, ema_kernel<Op::swap>, ema_kernel<Op::restore>,
        ema_kernel<Op::update_stochastic>, ema_kernel<Op::update_finite>, ema_kernel<Op::update_stochastic_finite>}) {
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  }
  return cudaSuccess;
}

}  // namespace fused_ema
