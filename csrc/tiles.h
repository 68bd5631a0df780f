// The plan as plain data, and how one block of threads runs one tile of it. No torch headers: the CUDA kernel is
// run_block over a grid, and the tests build the same function with g++ and run it over an emulated grid.
#pragma once

#include "lerp.h"

namespace fused_ema {

enum class Type : uint8_t { f32, f64, bf16, f16, raw1, raw2, raw4, raw8 };  // rawN: N bytes, only ever copied
// What a call does to the average and the model: averages, with nearest or with stochastic rounding of what is stored
// in 16 bits; copies; exchanges, or, where the types differ, keeps the model's values aside and gives it the average's;
// and undoes the exchange.
enum class Op : uint8_t { update, copy, swap, restore, update_stochastic };
FUSED_EMA_HD constexpr bool is_update(Op op) { return op == Op::update || op == Op::update_stochastic; }
FUSED_EMA_HD constexpr bool writes_model(Op op) { return op == Op::swap || op == Op::restore; }

constexpr int kMaxAverages = 8;  // of one model, updated by one launch

constexpr int kMaxDims = 12;  // of a strided tensor, after neighbouring dimensions were merged

// Offsets of a pair whose two sides do not walk through memory alike; dimensions ordered by the average's strides.
struct Layout {
  int32_t dims;
  int64_t size[kMaxDims];
  int64_t ema_stride[kMaxDims];  // elements
  int64_t model_stride[kMaxDims];
};

// One pair of tensors. The tensor table is an array of these, 72 bytes each.
struct Row {
  void* ema;  // the first of the averages
  void* model;
  int64_t next_average;  // elements from one average of the model's tensor to the next, whole vectors
  int64_t numel;
  int64_t aside;   // bytes from the start of the memory for values set aside to this pair's; -1: none needed
  int64_t number;  // of the first element among those of all devices, for random bits
  int64_t first;   // elements of all rows before this one: the CPU splits the work over threads by it
  int32_t layout;  // index of its Layout, or -1: both sides dense with equal strides, so flat
  Type ema_type;
  Type model_type;
  bool average;        // else copied
  uint8_t misaligned;  // elements from the last 16-byte boundary to the average's first element
  bool model_aligned;  // flat, and the model's vectors are aligned wherever the average's are
};

// One block's work: elements [index * tile - misaligned, (index + 1) * tile - misaligned) of a row.
struct Tile {
  uint32_t row;
  uint32_t index;
};

// What is asked of a launch, on any device.
struct Call {
  int32_t first = 0, last = 0;  // averages [first, last) take part
  double decay[kMaxAverages] = {};
  uint64_t key[kMaxAverages] = {};     // of the random bits
  const void* device_decay = nullptr;  // where not null, the decays are read from here: float32, or
  bool device_decay_is_f64 = false;    // float64
  char* aside = nullptr;               // memory for values set aside, on the launch's device
};

// Everything a launch reads. Small, since it travels as a kernel argument; the tables stay on the device.
struct Launch {
  const Row* rows;
  const Layout* layouts;
  const Tile* tiles;
  int64_t tile_count;
  Call call;
};

// A call as one average of one pair sees it.
struct Step {
  int64_t shift;  // elements to the average from the first one
  double decay;
  uint64_t key;
  char* aside;
};
FUSED_EMA_HD Step step_of(const Call& call, const Row& row, int average) {
  double decay = call.decay[average];
  if (call.device_decay) {
    decay = call.device_decay_is_f64 ? static_cast<const double*>(call.device_decay)[average]
                                     : double(static_cast<const float*>(call.device_decay)[average]);
  }
  return {average * row.next_average, decay, call.key[average], call.aside};
}

// Compile-time parameters of the kernel, to be tuned by compiling it with others.
#ifndef FUSED_EMA_THREADS
#define FUSED_EMA_THREADS 64
#endif
#ifndef FUSED_EMA_UNROLL
#define FUSED_EMA_UNROLL 2  // vectors a thread loads before its first arithmetic
#endif
#ifndef FUSED_EMA_STEPS
#define FUSED_EMA_STEPS 2  // such rounds per tile
#endif
#ifndef FUSED_EMA_RESIDENT
#define FUSED_EMA_RESIDENT 1024  // threads on one multiprocessor at least: bounds the registers of each
#endif
#ifndef FUSED_EMA_ON_STORE
#define FUSED_EMA_ON_STORE(pointer, bytes)  // the tests count writes here
#endif
constexpr int kThreads = FUSED_EMA_THREADS;
constexpr int kUnroll = FUSED_EMA_UNROLL;
constexpr int kSteps = FUSED_EMA_STEPS;
constexpr int kVectorBytes = 16;  // of the average; the model's vector has as many elements

FUSED_EMA_HD constexpr int size_of(Type type) {
  return type == Type::raw1                                              ? 1
         : type == Type::bf16 || type == Type::f16 || type == Type::raw2 ? 2
         : type == Type::f32 || type == Type::raw4                       ? 4
                                                                         : 8;
}
FUSED_EMA_HD constexpr int64_t tile_elements(int ema_size) {
  return int64_t(kThreads) * kUnroll * kSteps * (kVectorBytes / ema_size);
}

template <class T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T lane[N];
};

// How vectors are loaded and all is stored, in words of 1 to 16 bytes; a sweep compiles them with cache hints.
#ifndef FUSED_EMA_LOAD
#define FUSED_EMA_LOAD(word_pointer) (*(word_pointer))
#endif
#ifndef FUSED_EMA_LOAD_READ_ONLY
#define FUSED_EMA_LOAD_READ_ONLY(word_pointer) __ldg(word_pointer)
#endif
#ifndef FUSED_EMA_STORE
#define FUSED_EMA_STORE(word_pointer, word) (*(word_pointer) = (word))
#endif
#ifdef __CUDACC__
template <class V>  // clang-format off
using Word = std::conditional_t<sizeof(V) % 16 == 0, uint4, std::conditional_t<sizeof(V) == 8, uint2,
             std::conditional_t<sizeof(V) == 4, uint32_t, std::conditional_t<sizeof(V) == 2, uint16_t, uint8_t>>>>;
// clang-format on
template <class V>
struct Words {
  Word<V> word[sizeof(V) / sizeof(Word<V>)];
};
template <class V, bool kReadOnly>
__device__ V load_words(const void* pointer) {
  Words<V> words;
  FUSED_EMA_UNROLL_LOOP
  for (int i = 0; i < int(sizeof(V) / sizeof(Word<V>)); ++i) {
    const Word<V>* const word = static_cast<const Word<V>*>(pointer) + i;
    words.word[i] = kReadOnly ? FUSED_EMA_LOAD_READ_ONLY(word) : FUSED_EMA_LOAD(word);
  }
  V value;
  memcpy(&value, &words, sizeof(V));
  return value;
}
#endif

template <class V>
FUSED_EMA_HD V load(const void* pointer) {
#ifdef __CUDA_ARCH__
  return load_words<V, false>(pointer);
#else
  return *reinterpret_cast<const V*>(pointer);
#endif
}
// Parameters are only read by the launch, so they may come through the read-only path; an average never may.
template <class V>
FUSED_EMA_HD V load_read_only(const void* pointer) {
#ifdef __CUDA_ARCH__
  return load_words<V, true>(pointer);
#else
  return load<V>(pointer);
#endif
}
template <class V>
FUSED_EMA_HD void store(void* pointer, const V& value) {
  FUSED_EMA_ON_STORE(pointer, sizeof(V));
#ifdef __CUDA_ARCH__
  Words<V> words;
  memcpy(&words, &value, sizeof(V));
  FUSED_EMA_UNROLL_LOOP
  for (int i = 0; i < int(sizeof(V) / sizeof(Word<V>)); ++i) {
    FUSED_EMA_STORE(static_cast<Word<V>*>(pointer) + i, words.word[i]);
  }
#else
  *reinterpret_cast<V*>(pointer) = value;
#endif
}

// What happens to N neighbouring elements, the first of which is element `at` of its pair. Four flags spare the traffic
// that is not needed; `vectors` says whether whole tiles go by vectors, which for the rarer kinds would take more
// registers than there are.
template <class E, class P>
struct Lerp {
  using C = Compute<E, P>;
  static constexpr bool reads_ema = true, writes_ema = true, reads_model = true, writes_model = false;
  static constexpr bool vectors = sizeof(P) <= sizeof(E);
  C factor;
  FUSED_EMA_HD Lerp(const Row&, const Step& step) : factor(factor_of<C>(step.decay)) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t) const {
    FUSED_EMA_UNROLL_LOOP
    for (int i = 0; i < N; ++i) {
      e.lane[i] = cast<E>(lerp(cast<C>(e.lane[i]), cast<C>(p.lane[i]), factor));
    }
  }
};
template <class E, class P>
struct LerpStochastic {
  using C = Compute<E, P>;
  static constexpr bool reads_ema = true, writes_ema = true, reads_model = true, writes_model = false;
  static constexpr bool vectors = false;
  C factor;
  uint64_t key, number;
  FUSED_EMA_HD LerpStochastic(const Row& row, const Step& step)
      : factor(factor_of<C>(step.decay)), key(step.key), number(uint64_t(row.number)) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t at) const {
    FUSED_EMA_UNROLL_LOOP
    for (int i = 0; i < N; ++i) {
      const C moved = lerp(cast<C>(e.lane[i]), cast<C>(p.lane[i]), factor);
      e.lane[i] = from_float<E>(float(moved), random_bits(key, number + uint64_t(at + i)));
    }
  }
};
template <class E, class P>
struct Copy {
  static constexpr bool reads_ema = false, writes_ema = true, reads_model = true, writes_model = false;
  static constexpr bool vectors = true;
  FUSED_EMA_HD Copy(const Row&, const Step&) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t) const {
    FUSED_EMA_UNROLL_LOOP
    for (int i = 0; i < N; ++i) e.lane[i] = cast<E>(p.lane[i]);
  }
};
template <class E, class P>
struct Swap {
  static constexpr bool reads_ema = true, writes_ema = true, reads_model = true, writes_model = true;
  static constexpr bool vectors = true;
  FUSED_EMA_HD Swap(const Row&, const Step&) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t) const {
    const Vector<E, N> old = e;
    e = p;
    p = old;
  }
};
// The two ways of an exchange between types: the model's values are kept aside, as they are, and the average stays.
template <class E, class P>
struct SetAside {
  static constexpr bool reads_ema = true, writes_ema = false, reads_model = true, writes_model = true;
  static constexpr bool vectors = false;
  P* aside;
  FUSED_EMA_HD SetAside(const Row& row, const Step& step) : aside(reinterpret_cast<P*>(step.aside + row.aside)) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t at) const {
    store(aside + at, p);
    FUSED_EMA_UNROLL_LOOP
    for (int i = 0; i < N; ++i) p.lane[i] = cast<P>(e.lane[i]);
  }
};
template <class E, class P>
struct TakeBack {
  static constexpr bool reads_ema = false, writes_ema = false, reads_model = false, writes_model = true;
  static constexpr bool vectors = false;
  const P* aside;
  FUSED_EMA_HD TakeBack(const Row& row, const Step& step) : aside(reinterpret_cast<const P*>(step.aside + row.aside)) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>&, Vector<P, N>& p, int64_t at) const {
    p = load<Vector<P, N>>(aside + at);
  }
};

// Offsets, in elements, of element i of a strided pair.
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

// A whole, aligned tile of a flat pair: vectors, no guards, every load of a step before its first arithmetic.
template <class E, class P, class F>
FUSED_EMA_HD void run_vectors(E* ema, P* model, int64_t low, int thread, const F& f) {  // both at element `low`
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

// Any other range of a flat pair: a tensor's head and tail, a model misaligned against its average. Neighbouring
// threads take neighbouring elements.
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

// A visitor of with_lerp, with_copy and with_raw below: elements begin, begin + step, ... of a strided pair.
struct StridedRun {
  const Layout& layout;
  int64_t begin, end;
  int step;
  int64_t shift;  // to the average from the first one
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

// Another: one thread's part of one tile.
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
    __builtin_assume(__isGlobal(ema));  // from a table, so the compiler would emit generic loads and stores
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

// The pairs of types. F(E, P) is expanded once for each.
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

constexpr int pair_of(Type ema, Type model) { return int(ema) * 16 + int(model); }
FUSED_EMA_HD constexpr bool is_narrow(Type type) { return type == Type::bf16 || type == Type::f16; }

// Exact copies and exchanges move bits: the types are told apart by size alone.
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

// One average of one pair.
template <Op kOp, class Run>
FUSED_EMA_HD void run_step(const Row& row, const Step& step, const Run& run) {
  if (is_update(kOp) && step.decay == 1.0) return;
  const bool same = row.ema_type == row.model_type;
  if (kOp == Op::swap) return same ? with_raw<Swap>(row, step, run) : with_cast<SetAside>(row, step, run);
  if (kOp == Op::restore) return same ? with_raw<Swap>(row, step, run) : with_cast<TakeBack>(row, step, run);
  if (is_update(kOp) && row.average && step.decay != 0.0) {
    if (kOp == Op::update_stochastic && is_narrow(row.ema_type)) return with_narrow<LerpStochastic>(row, step, run);
    return with_lerp<Lerp>(row, step, run);
  }
  return same ? with_raw<Copy>(row, step, run) : with_cast<Copy>(row, step, run);
}

// Blocks of a launch: one for each tile and each average that takes part. Those of one tile are neighbours, so that all
// but the first find the model's values in the cache.
FUSED_EMA_HD int64_t blocks(const Launch& launch) { return launch.tile_count * (launch.call.last - launch.call.first); }

// Thread `thread` of block `block`.
template <Op kOp>
FUSED_EMA_HD void run_block(const Launch& launch, uint32_t block, int thread) {
  const uint32_t averages = uint32_t(launch.call.last - launch.call.first);
  const Tile at = launch.tiles[block / averages];
  const Row& row = launch.rows[at.row];
  const Step step = step_of(launch.call, row, launch.call.first + int(block % averages));
  run_step<kOp>(row, step, TileRun{launch, at.index, thread, step.shift});
}

}  // namespace fused_ema
