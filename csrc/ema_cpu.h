// The interface of the CPU runner.
#pragma once

#include "table.h"

namespace fused_ema {

// Runs one operation over all rows, on the threads of at::parallel_for. 0 <= decay <= 1.
void run_cpu(Op op, const Tables& tables, const Call& call);

// Sets how many elements are worth a thread of their own, and returns the previous number. Tests split small tensors.
int64_t set_grain(int64_t elements);

}  // namespace fused_ema
