// The types of elements, the operations, and the pairs of types that there is code for.
#pragma once

#include "lerp.h"

namespace fused_ema {

// rawN is any type of N bytes; its values are copied and exchanged, never computed with.
enum class Type : uint8_t { f32, f64, bf16, f16, raw1, raw2, raw4, raw8 };
FUSED_EMA_HD constexpr int size_of(Type type) {
  return type == Type::raw1                                              ? 1
         : type == Type::bf16 || type == Type::f16 || type == Type::raw2 ? 2
         : type == Type::f32 || type == Type::raw4                       ? 4
                                                                         : 8;
}
FUSED_EMA_HD constexpr bool is_narrow(Type type) { return type == Type::bf16 || type == Type::f16; }

enum class Op : uint8_t {
  update,                    // ema <- lerp, rounded to nearest
  copy,                      // ema <- model
  swap,                      // ema <-> model; between two types: scratch <- model, model <- ema
  restore,                   // undoes swap; between two types: model <- scratch
  update_stochastic,         // ema <- lerp, rounded stochastically where the average has 16 bits
  update_finite,             // update; but where the model is not finite, an average stays as it is
  update_stochastic_finite,  // update_stochastic; but where the model is not finite, an average stays as it is
};
FUSED_EMA_HD constexpr bool skips_nonfinite(Op op) { return op >= Op::update_finite; }
FUSED_EMA_HD constexpr bool is_stochastic(Op op) {
  return op == Op::update_stochastic || op == Op::update_stochastic_finite;
}
FUSED_EMA_HD constexpr bool is_update(Op op) { return op == Op::update || is_stochastic(op) || skips_nonfinite(op); }
FUSED_EMA_HD constexpr bool writes_model(Op op) { return op == Op::swap || op == Op::restore; }

// The pairs of types, as F(average, model): all that can be averaged; those that a copy has to cast; and those whose
// average has 16 bits, which can be rounded stochastically.
#define FUSED_EMA_LERP_PAIRS(F) F(f32, f32) F(f64, f64) F(bf16, bf16) F(f16, f16) FUSED_EMA_CAST_PAIRS(F)
#define FUSED_EMA_CAST_PAIRS(F) \
  F(f32, bf16)                  \
  F(f32, f16)                   \
  F(f32, f64)                   \
  F(f64, f32) F(f64, bf16) F(f64, f16) F(bf16, f32) F(bf16, f64) F(bf16, f16) F(f16, f32) F(f16, f64) F(f16, bf16)
#define FUSED_EMA_NARROW_PAIRS(F) \
  F(bf16, bf16)                   \
  F(bf16, f16)                    \
  F(bf16, f32) F(bf16, f64) F(f16, f16) F(f16, bf16) F(f16, f32) F(f16, f64)

FUSED_EMA_HD constexpr int pair_of(Type ema, Type model) { return int(ema) * 16 + int(model); }

}  // namespace fused_ema
