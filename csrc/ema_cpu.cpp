// The CPU runner: all elements of all tensors split evenly over the threads, one plain loop per pair of types.
//
// The loops are built once per instruction set and chosen at load time (target_clones: x86-64-v4 is AVX-512, v3 is
// AVX2 with FMA). They stream at memory speed; FMA, conversions and bits are those of lerp.h on every set.
#include "ema_cpu.h"

#include <ATen/Parallel.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSED_EMA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FUSED_EMA_CLONES
#endif

namespace fused_ema {
namespace {

constexpr int64_t kGrain = int64_t(1) << 17;  // elements: fewer are not worth a second thread's wake-up

#define FUSED_EMA_LERP_LOOP(E, P)                                                                               \
  FUSED_EMA_CLONES void lerp_##E##_##P(E* __restrict ema, const P* __restrict model, int64_t n, double decay) { \
    using C = Compute<E, P>;                                                                                    \
    const C factor = factor_of<C>(decay);                                                                       \
    for (int64_t i = 0; i < n; ++i) ema[i] = cast<E>(lerp(cast<C>(ema[i]), cast<C>(model[i]), factor));         \
  }
FUSED_EMA_LERP_PAIRS(FUSED_EMA_LERP_LOOP)
#undef FUSED_EMA_LERP_LOOP

#define FUSED_EMA_CAST_LOOP(E, P)                                                                 \
  FUSED_EMA_CLONES void cast_##E##_##P(E* __restrict ema, const P* __restrict model, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) ema[i] = cast<E>(model[i]);                                   \
  }
FUSED_EMA_CAST_PAIRS(FUSED_EMA_CAST_LOOP)
#undef FUSED_EMA_CAST_LOOP

// Elements [begin, end) of a flat row.
void flat_lerp(const Row& row, int64_t begin, int64_t end, double decay) {
  switch (pair_of(row.ema_type, row.model_type)) {
#define FUSED_EMA_CASE(E, P)                                                                                       \
  case pair_of(Type::E, Type::P):                                                                                  \
    return lerp_##E##_##P(static_cast<E*>(row.ema) + begin, static_cast<const P*>(row.model) + begin, end - begin, \
                          decay);
    FUSED_EMA_LERP_PAIRS(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
}

void flat_copy(const Row& row, int64_t begin, int64_t end) {
  if (row.ema_type == row.model_type) {
    const int64_t size = size_of(row.ema_type);
    std::memcpy(static_cast<char*>(row.ema) + begin * size, static_cast<const char*>(row.model) + begin * size,
                size_t((end - begin) * size));
    return;
  }
  switch (pair_of(row.ema_type, row.model_type)) {
#define FUSED_EMA_CASE(E, P)      \
  case pair_of(Type::E, Type::P): \
    return cast_##E##_##P(static_cast<E*>(row.ema) + begin, static_cast<const P*>(row.model) + begin, end - begin);
    FUSED_EMA_CAST_PAIRS(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
}

void flat_swap(const Row& row, int64_t begin, int64_t end) {
  const int64_t size = size_of(row.ema_type);
  char* const ema = static_cast<char*>(row.ema);
  std::swap_ranges(ema + begin * size, ema + end * size, static_cast<char*>(row.model) + begin * size);
}

// Elements [begin, end) of a strided row: the tile code's own path, as one thread.
void strided(Op op, const Tables& tables, const Row& row, int64_t begin, int64_t end, double decay) {
  const Layout& layout = tables.layouts[size_t(row.layout)];
  if (op == Op::swap) return with_raw<Swap>(row, decay, StridedRun{layout, begin, end, 1});
  if (op == Op::update && row.average) return with_lerp(row, decay, StridedRun{layout, begin, end, 1});
  with_copy(row, decay, StridedRun{layout, begin, end, 1});
}

// Subnormals are kept on every thread, whatever torch.set_flush_denormal() did to the calling one.
class KeepSubnormals {
 public:
#ifdef __SSE2__
  KeepSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }  // flush to zero, denormals are zero
  ~KeepSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace

void run_cpu(Op op, const Tables& tables, double decay) {
  if (op == Op::update && decay == 0.0) op = Op::copy;
  at::parallel_for(0, tables.elements, kGrain, [&](int64_t begin, int64_t end) {
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
      if (row->layout >= 0) {
        strided(op, tables, *row, low, high, decay);
      } else if (op == Op::swap) {
        flat_swap(*row, low, high);
      } else if (op == Op::update && row->average) {
        flat_lerp(*row, low, high, decay);
      } else {
        flat_copy(*row, low, high);
      }
    }
  });
}

}  // namespace fused_ema
