// What each operation does to N neighbouring elements of a pair.
//
// A functor gets the elements of both sides in registers, and the index of the first one within the pair. Its flags say
// which sides are loaded before it and stored after it, and whether whole tiles go by vectors: where `vectors` is
// false, that would take more registers than a thread has, for an operation that is rare.
#pragma once

#include "launch.h"
#include "vectors.h"

namespace fused_ema {

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

// One of the three above; but where the model's element is not finite, the average's stays as it is.
template <template <class, class> class F>
struct Finite {
  template <class E, class P>
  struct Of {
    using C = Compute<E, P>;
    static constexpr bool reads_ema = true, writes_ema = true, reads_model = true, writes_model = false;
    static constexpr bool vectors = F<E, P>::vectors && sizeof(P) <= sizeof(E);
    F<E, P> f;
    FUSED_EMA_HD Of(const Row& row, const Step& step) : f(row, step) {}
    template <int N>
    FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t at) const {
      const Vector<E, N> old = e;
      f(e, p, at);
      FUSED_EMA_UNROLL_LOOP
      for (int i = 0; i < N; ++i) e.lane[i] = is_finite(cast<C>(p.lane[i])) ? e.lane[i] : old.lane[i];
    }
  };
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

// An exchange between two types would round one side. Instead the model's values are saved in scratch memory, the model
// gets the average's, and the average stays as it is.
template <class E, class P>
struct SaveModel {
  static constexpr bool reads_ema = true, writes_ema = false, reads_model = true, writes_model = true;
  static constexpr bool vectors = false;
  P* scratch;
  FUSED_EMA_HD SaveModel(const Row& row, const Step& step)
      : scratch(reinterpret_cast<P*>(step.scratch + row.scratch)) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>& e, Vector<P, N>& p, int64_t at) const {
    store(scratch + at, p);
    FUSED_EMA_UNROLL_LOOP
    for (int i = 0; i < N; ++i) p.lane[i] = cast<P>(e.lane[i]);
  }
};

template <class E, class P>
struct RestoreModel {
  static constexpr bool reads_ema = false, writes_ema = false, reads_model = false, writes_model = true;
  static constexpr bool vectors = false;
  const P* scratch;
  FUSED_EMA_HD RestoreModel(const Row& row, const Step& step)
      : scratch(reinterpret_cast<const P*>(step.scratch + row.scratch)) {}
  template <int N>
  FUSED_EMA_HD void operator()(Vector<E, N>&, Vector<P, N>& p, int64_t at) const {
    p = load<Vector<P, N>>(scratch + at);
  }
};

}  // namespace fused_ema
