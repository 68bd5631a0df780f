// Vectors of elements, and how they are loaded and stored.
#pragma once

#include "lerp.h"

namespace fused_ema {

constexpr int kVectorBytes = 16;  // of the average; the model's vector has as many elements

template <class T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T lane[N];
};

// A word is what one instruction loads or stores, 1 to 16 bytes. benchmarks/sweep.cu defines the first three of these
// with cache hints; the tests' emulated grid defines the fourth to record every write.
#ifndef FUSED_EMA_LOAD
#define FUSED_EMA_LOAD(word_pointer) (*(word_pointer))
#endif
#ifndef FUSED_EMA_LOAD_READ_ONLY
#define FUSED_EMA_LOAD_READ_ONLY(word_pointer) __ldg(word_pointer)
#endif
#ifndef FUSED_EMA_STORE
#define FUSED_EMA_STORE(word_pointer, word) (*(word_pointer) = (word))
#endif
#ifndef FUSED_EMA_ON_STORE
#define FUSED_EMA_ON_STORE(pointer, bytes)
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
// Through the read-only path: for the model's values in launches that do not write them, never for an average.
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

}  // namespace fused_ema
