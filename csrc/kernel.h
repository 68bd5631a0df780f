// The CUDA kernel: one grid, with a block for each tile and average. Short blocks, balanced by the hardware's
// scheduler, stream faster than a persistent grid or a grid-stride loop; CUB's DeviceTransform found the same. nvcc
// compiles it as a part of ema_cuda.cu; NVRTC compiles this file, behind nvrtc.h.
#pragma once

#include "tiles.h"

namespace fused_ema {

template <Op kOp>
__global__ void __launch_bounds__(kThreads, FUSED_EMA_RESIDENT / kThreads)
    ema_kernel(const __grid_constant__ Launch launch) {
  run_block<kOp>(launch, blockIdx.x, threadIdx.x);
}

}  // namespace fused_ema
