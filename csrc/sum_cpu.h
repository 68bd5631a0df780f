// Weighted sums in float64, for merges of checkpoints.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_ema {

// total <- weight * part, or total + weight * part. Product and sum are rounded one by one. `total` is float64; `part`
// is float64, float32, bfloat16 or float16; both are contiguous, on the CPU, and as long as each other.
void add_weighted(const at::Tensor& total, const at::Tensor& part, double weight, bool first);

// out <- total, rounded once to nearest even. Returns whether all of `out` is finite. Types and places as above.
bool round_sum(const at::Tensor& total, const at::Tensor& out);

}  // namespace fused_ema
