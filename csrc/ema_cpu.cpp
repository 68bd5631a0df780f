// The CPU runner: the elements of all tensors are split evenly over the threads, and each pair of types has a plain
// loop.
//
// All instruction sets that it is built for give the bits that lerp.h promises.
#include "ema_cpu.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>

#include "cpu.h"

namespace fused_ema {
namespace {

std::atomic<int64_t> grain{int64_t(1) << 17};  // elements; fewer are not worth waking a second thread
// Where other programs keep the cores busy, the threads of a parallel loop wait for one another, spinning: 10 to 40 ms,
// even for a loop of 0.3 ms (OMP_WAIT_POLICY=PASSIVE avoids that). After such a delay small loops stay on one thread
// for some calls.
std::atomic<int> calls_alone{0};
constexpr int kCallsAlone = 32;
constexpr int64_t kSmall = int64_t(1) << 22;  // elements, which one thread updates in about 1 to 4 ms
constexpr std::chrono::milliseconds kDelay{8};
constexpr int64_t kPiece = 1024;  // elements of the model, few enough to stay in the L1 cache for all averages

#define FUSED_EMA_LERP_LOOP(E, P)                                                                               \
  FUSED_EMA_CLONES void lerp_##E##_##P(E* __restrict ema, const P* __restrict model, int64_t n, double decay) { \
    using C = Compute<E, P>;                                                                                    \
    const C factor = factor_of<C>(decay);                                                                       \
    for (int64_t i = 0; i < n; ++i) ema[i] = cast<E>(lerp(cast<C>(ema[i]), cast<C>(model[i]), factor));         \
  }
FUSED_EMA_LERP_PAIRS(FUSED_EMA_LERP_LOOP)
#undef FUSED_EMA_LERP_LOOP

#define FUSED_EMA_STOCHASTIC_LOOP(E, P)                                                                             \
  FUSED_EMA_CLONES void stochastic_##E##_##P(E* __restrict ema, const P* __restrict model, int64_t n, double decay, \
                                             uint64_t key, uint64_t number) {                                       \
    using C = Compute<E, P>;                                                                                        \
    const C factor = factor_of<C>(decay);                                                                           \
    for (int64_t i = 0; i < n; ++i) {                                                                               \
      const C moved = lerp(cast<C>(ema[i]), cast<C>(model[i]), factor);                                             \
      ema[i] = from_float<E>(float(moved), random_bits(key, number + uint64_t(i)));                                 \
    }                                                                                                               \
  }
FUSED_EMA_NARROW_PAIRS(FUSED_EMA_STOCHASTIC_LOOP)
#undef FUSED_EMA_STOCHASTIC_LOOP

#define FUSED_EMA_CAST_LOOP(E, P)                                                                 \
  FUSED_EMA_CLONES void cast_##E##_##P(E* __restrict ema, const P* __restrict model, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) ema[i] = cast<E>(model[i]);                                   \
  }
FUSED_EMA_CAST_PAIRS(FUSED_EMA_CAST_LOOP)
#undef FUSED_EMA_CAST_LOOP

// Whether all of n elements are finite: the exponent of NaN and of infinity is the largest there is.
#define FUSED_EMA_FINITE_LOOP(T, Bits, exponent)                                                            \
  FUSED_EMA_CLONES bool all_finite_##T(const T* model, int64_t n) {                                         \
    Bits largest = 0;                                                                                       \
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, Bits(bit_cast<Bits>(model[i]) & exponent)); \
    return largest != exponent;                                                                             \
  }
FUSED_EMA_FINITE_LOOP(f32, uint32_t, 0x7f800000u)
FUSED_EMA_FINITE_LOOP(f64, uint64_t, 0x7ff0000000000000u)
FUSED_EMA_FINITE_LOOP(bf16, uint16_t, 0x7f80u)
FUSED_EMA_FINITE_LOOP(f16, uint16_t, 0x7c00u)
#undef FUSED_EMA_FINITE_LOOP

// The address of one element of an array of T.
template <class T>
T* at(void* base, int64_t element) {
  return static_cast<T*>(base) + element;
}

// The functions named flat_... run elements [begin, end) of one average of a flat row.
void flat_lerp(const Row& row, const Step& step, int64_t begin, int64_t end) {
  switch (pair_of(row.ema_type, row.model_type)) {
#define FUSED_EMA_CASE(E, P)      \
  case pair_of(Type::E, Type::P): \
    return lerp_##E##_##P(at<E>(row.ema, step.shift + begin), at<P>(row.model, begin), end - begin, step.decay);
    FUSED_EMA_LERP_PAIRS(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
}

void flat_stochastic(const Row& row, const Step& step, int64_t begin, int64_t end) {
  switch (pair_of(row.ema_type, row.model_type)) {
#define FUSED_EMA_CASE(E, P)                                                                                          \
  case pair_of(Type::E, Type::P):                                                                                     \
    return stochastic_##E##_##P(at<E>(row.ema, step.shift + begin), at<P>(row.model, begin), end - begin, step.decay, \
                                step.key, uint64_t(row.number + begin));
    FUSED_EMA_NARROW_PAIRS(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
}

// Copies n elements, with the cast that the types need.
void flat_cast(Type to_type, void* to, Type from_type, const void* from, int64_t n) {
  if (to_type == from_type) {
    std::memcpy(to, from, size_t(n * size_of(to_type)));
    return;
  }
  switch (pair_of(to_type, from_type)) {
#define FUSED_EMA_CASE(E, P) \
  case pair_of(Type::E, Type::P): return cast_##E##_##P(static_cast<E*>(to), static_cast<const P*>(from), n);
    FUSED_EMA_CAST_PAIRS(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
}

void flat_exchange(Op op, const Row& row, const Step& step, int64_t begin, int64_t end) {
  const int64_t size = size_of(row.ema_type), model_size = size_of(row.model_type), n = end - begin;
  char* const ema = at<char>(row.ema, (step.shift + begin) * size);
  char* const model = at<char>(row.model, begin * model_size);
  if (row.ema_type == row.model_type) {
    std::swap_ranges(ema, ema + n * size, model);
    return;
  }
  char* const scratch = step.scratch + row.scratch + begin * model_size;
  if (op == Op::restore) {
    std::memcpy(model, scratch, size_t(n * model_size));
  } else {
    std::memcpy(scratch, model, size_t(n * model_size));
    flat_cast(row.model_type, model, row.ema_type, ema, n);
  }
}

void flat(Op op, const Row& row, const Step& step, int64_t begin, int64_t end) {
  if (writes_model(op)) return flat_exchange(op, row, step, begin, end);
  if (is_update(op) && row.average && step.decay != 0.0) {
    if (is_stochastic(op) && is_narrow(row.ema_type)) return flat_stochastic(row, step, begin, end);
    return flat_lerp(row, step, begin, end);
  }
  flat_cast(row.ema_type, at<char>(row.ema, (step.shift + begin) * size_of(row.ema_type)), row.model_type,
            at<char>(row.model, begin * size_of(row.model_type)), end - begin);
}

bool all_finite(const Row& row, int64_t begin, int64_t end) {
  switch (row.model_type) {
    case Type::f32: return all_finite_f32(at<f32>(row.model, begin), end - begin);
    case Type::f64: return all_finite_f64(at<f64>(row.model, begin), end - begin);
    case Type::bf16: return all_finite_bf16(at<bf16>(row.model, begin), end - begin);
    case Type::f16: return all_finite_f16(at<f16>(row.model, begin), end - begin);
    default: return true;
  }
}

// Restores the averages whose elements of the model are not finite.
template <class E, class P>
void put_back(E* ema, const E* old, const P* model, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!is_finite(cast<Compute<E, P>>(model[i]))) ema[i] = old[i];
}

// Runs at most kPiece elements, some of which are not finite in the model.
void flat_finite(Op op, const Row& row, const Step& step, int64_t begin, int64_t end) {
  alignas(kVectorBytes) char old[kPiece * sizeof(double)];
  const int64_t size = size_of(row.ema_type), n = end - begin;
  std::memcpy(old, at<char>(row.ema, (step.shift + begin) * size), size_t(n * size));
  flat(op, row, step, begin, end);
  switch (pair_of(row.ema_type, row.model_type)) {
#define FUSED_EMA_CASE(E, P)      \
  case pair_of(Type::E, Type::P): \
    return put_back(at<E>(row.ema, step.shift + begin), at<E>(old, 0), at<P>(row.model, begin), n);
    FUSED_EMA_LERP_PAIRS(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
}

// Runs one average of a strided row, with the code of the tiles.
void strided(Op op, const Row& row, const Step& step, const StridedRun& run) {
  switch (op) {
    case Op::update: return run_step<Op::update>(row, step, run);
    case Op::copy: return run_step<Op::copy>(row, step, run);
    case Op::swap: return run_step<Op::swap>(row, step, run);
    case Op::restore: return run_step<Op::restore>(row, step, run);
    case Op::update_stochastic: return run_step<Op::update_stochastic>(row, step, run);
    case Op::update_finite: return run_step<Op::update_finite>(row, step, run);
    case Op::update_stochastic_finite: return run_step<Op::update_stochastic_finite>(row, step, run);
  }
}

// Runs elements [begin, end) of a row for all averages that take part, piece by piece, so that the model is read from
// memory only once.
void run_row(Op op, const Tables& tables, const Row& row, const Call& call, int64_t begin, int64_t end) {
  const bool skips = skips_nonfinite(op) && row.average;
  const int64_t piece = skips || call.last - call.first > 1 ? kPiece : end - begin;
  for (; begin < end; begin += piece) {
    const int64_t stop = std::min(begin + piece, end);
    const bool patched = skips && row.layout < 0 && !all_finite(row, begin, stop);
    for (int average = call.first; average < call.last; ++average) {
      const Step step = step_of(call, row, average);
      if (is_update(op) && step.decay == 1.0) continue;
      if (patched) {
        flat_finite(op, row, step, begin, stop);
      } else if (row.layout < 0) {
        flat(op, row, step, begin, stop);
      } else {
        strided(op, row, step, StridedRun{tables.layouts[size_t(row.layout)], begin, stop, 1, step.shift});
      }
    }
  }
}

}  // namespace

int64_t set_grain(int64_t elements) { return grain.exchange(elements); }

void run_cpu(Op op, const Tables& tables, const Call& call) {
  const auto run_part = [&](int64_t begin, int64_t end) {
    const KeepSubnormals keep;
    auto row = std::upper_bound(tables.rows.begin(), tables.rows.end(), begin,
                                [](int64_t element, const Row& r) { return element < r.first; }) -
               1;
    for (; row != tables.rows.end() && row->first < end; ++row) {
      if (tables.rows.end() - row > 4) {
        prefetch(row[4].ema, 512);
        prefetch(row[4].model, 512);
      }
      const int64_t low = std::max<int64_t>(begin - row->first, 0), high = std::min(end - row->first, row->numel);
      run_row(op, tables, *row, call, low, high);
    }
  };
  const int64_t least = grain.load(std::memory_order_relaxed), work = tables.elements * (call.last - call.first);
  if (tables.elements <= least || work > kSmall) {
    at::parallel_for(0, tables.elements, least, run_part);
  } else if (calls_alone.load(std::memory_order_relaxed) > 0) {
    calls_alone.fetch_sub(1, std::memory_order_relaxed);
    run_part(0, tables.elements);
  } else {
    const auto start = std::chrono::steady_clock::now();
    at::parallel_for(0, tables.elements, least, run_part);
    if (std::chrono::steady_clock::now() - start > kDelay) calls_alone.store(kCallsAlone, std::memory_order_relaxed);
  }
}

}  // namespace fused_ema
