// What a launch reads, as plain data: the tables of a plan, and what one call asks for. The tables lie in device memory
// as they are declared here.
#pragma once

#include "types.h"

namespace fused_ema {

constexpr int kMaxAverages = 8;  // of one model, updated by one launch
constexpr int kMaxDims = 12;     // of a strided tensor, after neighbouring dimensions were merged

// The dimensions of a pair whose two sides lie in memory in different orders, sorted by the average's strides, the
// largest first. Strides are in elements.
struct Layout {
  int32_t dims;
  int64_t size[kMaxDims];
  int64_t ema_stride[kMaxDims];
  int64_t model_stride[kMaxDims];
};

// One pair of tensors.
struct Row {
  void* ema;  // the first of the averages
  void* model;
  int64_t stride;  // elements from one average of the tensor to the next, a multiple of 16 bytes
  int64_t numel;
  int64_t scratch;  // byte offset of this pair's part of the scratch memory; -1: the pair needs none
  int64_t number;   // of the first element, counted over all devices: what its random bits depend on
  int64_t first;    // elements of all rows before this one, by which the CPU runner splits the work over threads
  int32_t layout;   // index of its Layout; -1: flat, both sides are dense and have equal strides
  Type ema_type;
  Type model_type;
  bool average;        // else the pair is copied
  uint8_t misaligned;  // elements from the last 16-byte boundary to the average's first element
  bool model_aligned;  // the row is flat, and the model's vectors are aligned wherever the average's are
};
static_assert(sizeof(Row) == 72, "a row is small: each block reads one");

// One block's work: elements [index * tile - misaligned, (index + 1) * tile - misaligned) of a row.
struct Tile {
  uint32_t row;
  uint32_t index;
};

// What a caller asks for, on any device.
struct Call {
  int32_t first = 0, last = 0;  // averages [first, last) take part
  double decay[kMaxAverages] = {};
  uint64_t key[kMaxAverages] = {};     // of the random bits
  const void* device_decay = nullptr;  // one float32 or float64 for each average; replaces `decay` unless null
  bool device_decay_is_f64 = false;
  char* scratch = nullptr;  // on the launch's device, for exchanges between two types
};

// The argument of the kernel.
struct Launch {
  const Row* rows;
  const Layout* layouts;
  const Tile* tiles;
  int64_t tile_count;
  Call call;
};

// What a call asks for one average of one pair.
struct Step {
  int64_t shift;  // elements from the first average to this one
  double decay;
  uint64_t key;
  char* scratch;
};
FUSED_EMA_HD Step step_of(const Call& call, const Row& row, int average) {
  double decay = call.decay[average];
  if (call.device_decay) {
    decay = call.device_decay_is_f64 ? static_cast<const double*>(call.device_decay)[average]
                                     : double(static_cast<const float*>(call.device_decay)[average]);
  }
  return {average * row.stride, decay, call.key[average], call.scratch};
}

}  // namespace fused_ema
