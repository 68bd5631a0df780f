#include "sum_cpu.h"

#include <c10/util/Exception.h>

#include "cpu.h"
#include "lerp.h"

namespace fused_ema {
namespace {

// float64 to float32 by "rounding to odd": towards zero, with the last bit set where anything is cut off. A second
// rounding to 16 bits then gives what a single one would, since the result never seems to lie halfway.
inline float to_odd(double x) {
  const float nearest = float(x);
  const uint32_t bits = bit_cast<uint32_t>(nearest) - uint32_t(std::fabs(double(nearest)) > std::fabs(x));
  return bit_cast<float>(double(nearest) == x ? bit_cast<uint32_t>(nearest) : bits | 1u);
}

#define FUSED_EMA_SUM_LOOPS(T)                                                                               \
  FUSED_EMA_CLONES void first_##T(double* __restrict total, const T* __restrict part, int64_t n, double w) { \
    for (int64_t i = 0; i < n; ++i) total[i] = w * cast<double>(part[i]);                                    \
  }                                                                                                          \
  FUSED_EMA_CLONES void add_##T(double* __restrict total, const T* __restrict part, int64_t n, double w) {   \
    for (int64_t i = 0; i < n; ++i) total[i] += w * cast<double>(part[i]);                                   \
  }                                                                                                          \
  FUSED_EMA_CLONES bool round_##T(const double* __restrict total, T* __restrict out, int64_t n) {            \
    for (int64_t i = 0; i < n; ++i) out[i] = sizeof(T) == 2 ? cast<T>(to_odd(total[i])) : cast<T>(total[i]); \
    bool finite = true;                                                                                      \
    for (int64_t i = 0; i < n; ++i) finite &= is_finite(cast<double>(out[i]));                               \
    return finite;                                                                                           \
  }
FUSED_EMA_SUM_LOOPS(f32)
FUSED_EMA_SUM_LOOPS(f64)
FUSED_EMA_SUM_LOOPS(bf16)
FUSED_EMA_SUM_LOOPS(f16)
#undef FUSED_EMA_SUM_LOOPS

void check(const at::Tensor& total, const at::Tensor& other) {
  TORCH_CHECK_VALUE(total.is_cpu() && other.is_cpu() && total.scalar_type() == at::kDouble && total.is_contiguous() &&
                        other.is_contiguous() && total.numel() == other.numel(),
                    "expected a float64 total and a tensor of its size, both contiguous and on the CPU");
}

}  // namespace

#define FUSED_EMA_TYPES(F) F(at::kFloat, f32) F(at::kDouble, f64) F(at::kBFloat16, bf16) F(at::kHalf, f16)

void add_weighted(const at::Tensor& total, const at::Tensor& part, double weight, bool first) {
  check(total, part);
  const KeepSubnormals keep;
  const auto to = static_cast<double*>(total.mutable_data_ptr());
  const int64_t n = total.numel();
  switch (part.scalar_type()) {
#define FUSED_EMA_CASE(type, T)                                                   \
  case type: {                                                                    \
    const auto from = static_cast<const T*>(part.const_data_ptr());               \
    return first ? first_##T(to, from, n, weight) : add_##T(to, from, n, weight); \
  }
    FUSED_EMA_TYPES(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
    default: TORCH_CHECK_TYPE(false, "expected a floating type of 16, 32 or 64 bits, found ", part.scalar_type());
  }
}

bool round_sum(const at::Tensor& total, const at::Tensor& out) {
  check(total, out);
  const KeepSubnormals keep;
  const auto from = static_cast<const double*>(total.const_data_ptr());
  const int64_t n = total.numel();
  switch (out.scalar_type()) {
#define FUSED_EMA_CASE(type, T) \
  case type: return round_##T(from, static_cast<T*>(out.mutable_data_ptr()), n);
    FUSED_EMA_TYPES(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
    default: TORCH_CHECK_TYPE(false, "expected a floating type of 16, 32 or 64 bits, found ", out.scalar_type());
  }
}

}  // namespace fused_ema
