// Pairs of torch tensors → tables, kept for as long as the tensors stay what they were. Knows torch, not Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/UndefinedTensorImpl.h>

#include <memory>
#include <string>
#include <vector>

#include "table.h"

namespace fused_ema {

enum class Action : uint8_t { none, copy, average };  // none: an empty pair, or a repeated one

using Tensors = std::vector<at::Tensor>;
inline at::Tensor reference(at::TensorImpl* tensor) {
  return at::Tensor(c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>::reclaim_copy(tensor));
}

struct Entry {
  std::string name;
  at::Tensor ema;
  at::Tensor model;
  Action action;
  int64_t next_average = 0;  // elements from one average to the next, where `ema` is the first of several
};

// What tensors were when the plan was made, in order. Compared at each call: as long as all match, the plan's raw
// pointers are theirs. Packed, since this is most of what an update of many small tensors costs.
struct Seen {
  const void* storage;  // to prefetch it, no more
  const void* data;
  size_t storage_bytes;
  c10::DispatchKeySet keys;  // device type, layout, conj and neg bits, subclasses
  at::ScalarType dtype;
  uint32_t dims;
  size_t shape;  // where its sizes and strides begin
};
class Snapshot {
 public:
  void add(const at::TensorImpl* tensor, bool written);

  // Compares tensors one by one, in the order in which they were added.
  class Cursor {
   public:
    Cursor(const Snapshot& snapshot, size_t first)
        : seen_(snapshot.seen_.data() + first), shape_(snapshot.shapes_.data() + snapshot.seen_[first].shape) {}
    bool next_matches(const at::TensorImpl* tensor, bool written);
    void prefetch_storages(size_t pairs) const {  // of the pair that is so many pairs ahead
      prefetch(seen_[2 * pairs].storage, sizeof(c10::StorageImpl));
      prefetch(seen_[2 * pairs + 1].storage, sizeof(c10::StorageImpl));
    }

   private:
    const Seen* seen_;
    const int64_t* shape_;
  };

 private:
  std::vector<Seen> seen_;
  std::vector<int64_t> shapes_;  // sizes and strides of all tensors, one after the other
};

struct DeviceTables;  // the tables of one device, and their copy on it

class Plan {
 public:
  // The caller has checked the pairs (fused_ema/checks.py); what would corrupt memory is checked here again.
  Plan(std::vector<Entry> entries, int averages);
  ~Plan();

  bool forked() const;  // made by a parent process: must not be touched
  // Every tensor still is what it was, and may be written. The plan holds no references to tensors, so that they can be
  // freed and swapped: the caller has made sure that they are alive.
  bool current(Op op) const;
  // The same for other tensor objects, which then take the place of the plan's own.
  bool adopt(const Tensors& ema, const Tensors& model, Op op);

  // One launch per CUDA device, one parallel loop for the CPU. `device_decay` (one for each average, on the model's
  // device) takes the place of the call's decays where it is defined. `aside` is needed by an exchange between types:
  // bytes, for each device as many as `aside_bytes` says.
  void run(Op op, Call call, const at::Tensor& device_decay, const Tensors& aside);
  void bump_versions(Op op) const;

  bool large() const;       // worth giving other threads the interpreter meanwhile
  Tensors tensors() const;  // references, for as long as other threads run
  std::vector<c10::Storage> storages() const;
  std::vector<std::pair<c10::Device, int64_t>> aside_bytes() const;
  int averages() const { return averages_; }
  int64_t launches() const { return static_cast<int64_t>(devices_.size()); }

 private:
  struct Watched {
    at::TensorImpl* ema;
    at::TensorImpl* model;
    bool active;
  };
  bool writable(Op op) const;
  bool current(Op op, size_t begin, size_t end) const;
  std::vector<Watched> entries_;
  int averages_;
  bool inference_ema_ = false, inference_model_ = false;
  Snapshot snapshot_;
  std::vector<std::unique_ptr<DeviceTables>> devices_;
  uint64_t fork_generation_;
};

bool cuda_built();

}  // namespace fused_ema
