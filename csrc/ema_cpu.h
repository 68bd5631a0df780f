// What the CPU runner offers to the plan.
#pragma once

#include "table.h"

namespace fused_ema {

// Runs one operation over all rows, on the threads of at::parallel_for. 0 <= decay <= 1.
void run_cpu(Op op, const Tables& tables, const Call& call);

// From how many elements on a thread more takes part: tests set it, to split small tensors. Returns the one of before.
int64_t set_grain(int64_t elements);

}  // namespace fused_ema
