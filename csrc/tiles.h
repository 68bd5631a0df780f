// How one block of threads runs one tile. The CUDA kernel is run_block over a grid; the tests compile the same function
// with g++ and run it over an emulated grid.
#pragma once

#include "ops.h"

namespace fused_ema {

// The parameters of the kernel; benchmarks/bench_sweep.py compiles it with others and times them.
#ifndef FUSED_EMA_THREADS
#define FUSED_EMA_THREADS 64
#endif
#ifndef FUSED_EMA_UNROLL
#define FUSED_EMA_UNROLL 2  // vectors that a thread loads before its first arithmetic
#endif
#ifndef FUSED_EMA_STEPS
#define FUSED_EMA_STEPS 2  // times that a thread does so in a tile
#endif
#ifndef FUSED_EMA_RESIDENT
#define FUSED_EMA_RESIDENT 1024  // threads that must fit a multiprocessor, which bounds the registers of each
#endif
constexpr int kThreads = FUSED_EMA_THREADS;
constexpr int kUnroll = FUSED_EMA_UNROLL;
constexpr int kSteps = FUSED_EMA_STEPS;

FUSED_EMA_HD constexpr int64_t tile_elements(int ema_size) {
  return int64_t(kThreads) * kUnroll * kSteps * (kVectorBytes / ema_size);
}

// Where element i of a strided pair lies on each side, in elements.
struct Offsets {
  int64_t ema;
  int64_t model;
};
FUSED_EMA_HD Offsets offsets_of(const Layout& layout, int64_t i) {
  Offsets at{0, 0};
  FUSED_EMA_KEEP_LOOP
  for (int d = layout.dims - 1; d >= 0; --d) {
    const int64_t index = i % layout.size[d];
    i /= layout.size[d];
    at.ema += index * layout.ema_stride[d];
    at.model += index * layout.model_stride[d];
  }
  return at;
}

// Runs a whole, aligned tile of a flat pair by vectors, without guards: `ema` and `model` point to element `low`. All
// loads of a step come before its first arithmetic, since the bytes in flight are what fills the memory bus.
template <class E, class P, class F>
FUSED_EMA_HD void run_vectors(E* ema, P* model, int64_t low, int thread, const F& f) {
  constexpr int kLanes = kVectorBytes / int(sizeof(E));
  using VE = Vector<E, kLanes>;
  using VP = Vector<P, kLanes>;
  FUSED_EMA_KEEP_LOOP
  for (int step = 0; step < kSteps; ++step) {
    VE e[kUnroll];
    VP p[kUnroll];
    FUSED_EMA_UNROLL_LOOP
    for (int u = 0; u < kUnroll; ++u) {
      const int at = ((step * kUnroll + u) * kThreads + thread) * kLanes;
      if (F::reads_ema) e[u] = load<VE>(ema + at);
      p[u] = F::writes_model ? load<VP>(model + at) : load_read_only<VP>(model + at);
    }
    FUSED_EMA_UNROLL_LOOP
    for (int u = 0; u < kUnroll; ++u) {
      const int at = ((step * kUnroll + u) * kThreads + thread) * kLanes;
      f(e[u], p[u], low + at);
      store(ema + at, e[u]);
      if (F::writes_model) store(model + at, p[u]);
    }
  }
}

// Runs any other range of a flat pair element by element: the head and the tail of a tensor, and pairs whose model is
// misaligned against the average. Neighbouring threads take neighbouring elements.
template <class E, class P, class F>
FUSED_EMA_HD void run_elements(E* ema, P* model, int64_t begin, int64_t end, int thread, const F& f) {
  constexpr int kBatch = 4;
  FUSED_EMA_KEEP_LOOP
  for (int64_t first = begin + thread; first < end; first += kBatch * kThreads) {
    Vector<E, 1> e[kBatch];
    Vector<P, 1> p[kBatch];
    FUSED_EMA_UNROLL_LOOP
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kThreads >= end) continue;
      if (F::reads_ema) e[b].lane[0] = ema[first + b * kThreads];
      if (F::reads_model) p[b].lane[0] = model[first + b * kThreads];
    }
    FUSED_EMA_UNROLL_LOOP
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kThreads >= end) continue;
      f(e[b], p[b], first + b * kThreads);
      if (F::writes_ema) store(ema + first + b * kThreads, e[b].lane[0]);
      if (F::writes_model) store(model + first + b * kThreads, p[b].lane[0]);
    }
  }
}

// Runs elements begin, begin + step, ... of a strided pair. This struct and TileRun are what run_step() below calls
// once it knows the types.
struct StridedRun {
  const Layout& layout;
  int64_t begin, end;
  int step;
  int64_t shift;  // elements from the first average to this one
  template <class E, class P, class F>
  FUSED_EMA_HD void run(const Row& row, const F& f) const {
    E* const ema = static_cast<E*>(row.ema) + shift;
    P* const model = static_cast<P*>(row.model);
    FUSED_EMA_KEEP_LOOP
    for (int64_t i = begin; i < end; i += step) {
      const Offsets at = offsets_of(layout, i);
      Vector<E, 1> e{{ema[at.ema]}};
      Vector<P, 1> p{{model[at.model]}};
      f(e, p, i);
      if (F::writes_ema) store(ema + at.ema, e.lane[0]);
      if (F::writes_model) store(model + at.model, p.lane[0]);
    }
  }
};

// Runs one thread's share of one tile.
struct TileRun {
  const Launch& launch;
  uint32_t index;
  int thread;
  int64_t shift;
  template <class E, class P, class F>
  FUSED_EMA_HD void run(const Row& row, const F& f) const {
    constexpr int64_t kTile = tile_elements(sizeof(E));
    E* const ema = static_cast<E*>(row.ema) + shift;
    P* const model = static_cast<P*>(row.model);
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(ema));  // else generic accesses: they come from a table
    __builtin_assume(__isGlobal(model));
#endif
    const int64_t begin = int64_t(index) * kTile - row.misaligned;
    const int64_t low = begin > 0 ? begin : 0;
    const int64_t high = begin + kTile < row.numel ? begin + kTile : row.numel;
    if (row.layout >= 0) {
      StridedRun{launch.layouts[row.layout], low + thread, high, kThreads, shift}.run<E, P>(row, f);
      return;
    }
    if constexpr (F::vectors) {
      if (high - low == kTile && row.model_aligned) {
        run_vectors(ema + low, model + low, low, thread, f);
        return;
      }
    }
    run_elements(ema, model, low, high, thread, f);
  }
};

// Copies and exchanges between equal types move bits, so only the size of the type counts.
template <template <class, class> class F, class Run>
FUSED_EMA_HD void with_raw(const Row& row, const Step& step, const Run& run) {
  switch (size_of(row.ema_type)) {
    case 1: return run.template run<uint8_t, uint8_t>(row, F<uint8_t, uint8_t>(row, step));
    case 2: return run.template run<uint16_t, uint16_t>(row, F<uint16_t, uint16_t>(row, step));
    case 4: return run.template run<uint32_t, uint32_t>(row, F<uint32_t, uint32_t>(row, step));
    default: return run.template run<uint64_t, uint64_t>(row, F<uint64_t, uint64_t>(row, step));
  }
}

#define FUSED_EMA_CASE(E, P) \
  case pair_of(Type::E, Type::P): return run.template run<E, P>(row, F<E, P>(row, step));
template <template <class, class> class F, class Run>
FUSED_EMA_HD void with_lerp(const Row& row, const Step& step, const Run& run) {
  switch (pair_of(row.ema_type, row.model_type)) { FUSED_EMA_LERP_PAIRS(FUSED_EMA_CASE) }
}
template <template <class, class> class F, class Run>
FUSED_EMA_HD void with_narrow(const Row& row, const Step& step, const Run& run) {
  switch (pair_of(row.ema_type, row.model_type)) { FUSED_EMA_NARROW_PAIRS(FUSED_EMA_CASE) }
}
template <template <class, class> class F, class Run>
FUSED_EMA_HD void with_cast(const Row& row, const Step& step, const Run& run) {
  switch (pair_of(row.ema_type, row.model_type)) { FUSED_EMA_CAST_PAIRS(FUSED_EMA_CASE) }
}
#undef FUSED_EMA_CASE

// Runs one average of one pair.
template <Op kOp, class Run>
FUSED_EMA_HD void run_step(const Row& row, const Step& step, const Run& run) {
  if (is_update(kOp) && step.decay == 1.0) return;
  const bool same = row.ema_type == row.model_type;
  if (kOp == Op::swap) return same ? with_raw<Swap>(row, step, run) : with_cast<SaveModel>(row, step, run);
  if (kOp == Op::restore) return same ? with_raw<Swap>(row, step, run) : with_cast<RestoreModel>(row, step, run);
  if constexpr (skips_nonfinite(kOp)) {
    if (row.average) {
      if (step.decay == 0.0) return with_lerp<Finite<Copy>::Of>(row, step, run);
      if (is_stochastic(kOp) && is_narrow(row.ema_type)) {
        return with_narrow<Finite<LerpStochastic>::Of>(row, step, run);
      }
      return with_lerp<Finite<Lerp>::Of>(row, step, run);
    }
  } else if (is_update(kOp) && row.average && step.decay != 0.0) {
    if (is_stochastic(kOp) && is_narrow(row.ema_type)) return with_narrow<LerpStochastic>(row, step, run);
    return with_lerp<Lerp>(row, step, run);
  }
  return same ? with_raw<Copy>(row, step, run) : with_cast<Copy>(row, step, run);
}

// The blocks of a launch: one for each tile and each average that takes part. The averages of one tile are neighbouring
// blocks, so that only the first of them reads the model's values from memory; the others find them in the L2 cache.
FUSED_EMA_HD int64_t blocks(const Launch& launch) { return launch.tile_count * (launch.call.last - launch.call.first); }

// Runs thread `thread` of block `block`.
template <Op kOp>
FUSED_EMA_HD void run_block(const Launch& launch, uint32_t block, int thread) {
  const uint32_t averages = uint32_t(launch.call.last - launch.call.first);
  const Tile at = launch.tiles[block / averages];
  const Row& row = launch.rows[at.row];
  const Step step = step_of(launch.call, row, launch.call.first + int(block % averages));
  run_step<kOp>(row, step, TileRun{launch, at.index, thread, step.shift});
}

}  // namespace fused_ema
