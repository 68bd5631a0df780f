// What the CUDA runner offers to the plan. No torch headers on either side of it but the plan's.
#pragma once

#include <cuda_runtime_api.h>

#include "tiles.h"

namespace fused_ema {

cudaError_t launch_cuda(Op op, const Launch& launch, cudaStream_t stream);  // one kernel launch, asynchronous
cudaError_t load_cuda_kernels();  // on the current device, so that a first launch may happen inside a graph capture

}  // namespace fused_ema
