// The interface of the CUDA runner.
#pragma once

#include <cuda_runtime_api.h>

#include "tiles.h"

namespace fused_ema {

cudaError_t launch_cuda(Op op, const Launch& launch, cudaStream_t stream);  // asynchronous
// Loads the kernels on the current device. Without it, a first launch inside a graph capture would fail.
cudaError_t load_cuda_kernels();

}  // namespace fused_ema
