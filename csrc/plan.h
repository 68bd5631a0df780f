// Pairs of torch tensors, prepared for updates: their tables, and records that tell whether the tensors are still what
// they were. Knows torch, not Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/UndefinedTensorImpl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "table.h"

namespace fused_ema {

enum class Action : uint8_t { none, copy, average };  // none: the pair is empty, or repeats another one

using Tensors = std::vector<at::Tensor>;
inline at::Tensor reference(at::TensorImpl* tensor) {
  return at::Tensor(c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>::reclaim_copy(tensor));
}

struct Entry {
  std::string name;
  at::Tensor ema;
  at::Tensor model;
  Action action;
  int64_t stride = 0;  // elements from one average to the next, if `ema` is the first of several
};

// What a tensor was when the plan was made. As long as every tensor matches its record, the pointers in the tables are
// valid. Records are small, since comparing them is most of what an update of many small tensors costs.
struct TensorRecord {
  const void* storage;  // only to prefetch it
  const void* data;
  size_t storage_bytes;
  c10::DispatchKeySet keys;  // device type, layout, conj and neg bits, subclasses
  at::ScalarType dtype;
  uint32_t dims;
  size_t shape;  // index of its first size in `shapes_`; its strides follow its sizes
};
class TensorRecords {
 public:
  void add(const at::TensorImpl* tensor, bool written);
  // Whether a tensor differs from record `number` at most in its memory.
  bool alike(size_t number, const at::TensorImpl* tensor) const;
  // Records the memory of such a tensor. Throws nothing for one that data_of() has seen.
  void replace(size_t number, const at::TensorImpl* tensor, bool written);

  // Compares tensors one by one, in the order in which they were added.
  class Cursor {
   public:
    Cursor(const TensorRecords& all, size_t first)
        : record_(all.records_.data() + first), shape_(all.shapes_.data() + all.records_[first].shape) {}
    bool next_matches(const at::TensorImpl* tensor, bool written);
    void prefetch_storages(size_t pairs) const {  // of the pair that is this many pairs ahead
      prefetch(record_[2 * pairs].storage, sizeof(c10::StorageImpl));
      prefetch(record_[2 * pairs + 1].storage, sizeof(c10::StorageImpl));
    }

   private:
    const TensorRecord* record_;
    const int64_t* shape_;
  };

 private:
  static bool alike(const TensorRecord& record, const int64_t* shape, const at::TensorImpl* tensor);
  std::vector<TensorRecord> records_;
  std::vector<int64_t> shapes_;
};

struct DeviceTables;  // the tables of one device, and the copy of them that lies on it

class PreparedPairs {
 public:
  // fused_ema/pairs has checked the pairs. What would corrupt memory is checked here again.
  PreparedPairs(std::vector<Entry> entries, int averages);
  ~PreparedPairs();

  bool forked() const;  // made by a parent process, whose device memory this process must not touch
  // Whether every tensor is still what it was, and may be written. No references to tensors are held, so that they can
  // be freed and swapped: the caller makes sure that they are alive.
  bool current(Op op) const;
  // The same for other tensor objects, which then replace the recorded ones.
  bool adopt(const Tensors& ema, const Tensors& model, Op op);

  // The objects that were compared last: average and model of each pair in turn. Some may no longer be alive.
  std::vector<at::TensorImpl*> objects() const;
  // The pairs that have other objects than before, or other memory; nullopt if they differ in more than that.
  std::optional<std::vector<size_t>> changed(const std::vector<at::TensorImpl*>& now) const;
  // Takes these objects into these pairs, with their memory. Returns false, with nothing changed, where other tables
  // are needed. The caller has checked the pairs, as for a new plan.
  bool patch(const std::vector<size_t>& numbers, const Tensors& ema, const Tensors& model);

  // One launch per CUDA device, one parallel loop for the CPU. `device_decays`, if defined, replaces the call's decays:
  // one for each average, on the model's device. `scratch`, for an exchange between two types, has a tensor for each
  // device that scratch_bytes() lists, in that order: on the device, or in pinned host memory.
  void run(Op op, Call call, const at::Tensor& device_decays, const Tensors& scratch);
  void bump_versions(Op op) const;

  bool large() const;       // takes long enough on the CPU to let other threads have the interpreter
  Tensors tensors() const;  // references, to keep them alive while other threads run
  std::vector<c10::Storage> storages() const;
  std::vector<std::pair<c10::Device, int64_t>> scratch_bytes() const;
  int averages() const { return averages_; }
  int64_t launches() const { return static_cast<int64_t>(devices_.size()); }

 private:
  struct TensorPair {
    at::TensorImpl* ema;
    at::TensorImpl* model;
    bool active;      // the action is not `none`
    uint16_t device;  // index in devices_
    int32_t row;      // in the tables of that device; -1: the pair has none
  };
  bool writable(Op op) const;
  bool current(Op op, size_t begin, size_t end) const;
  std::vector<TensorPair> pairs_;
  int averages_;
  bool inference_ema_ = false, inference_model_ = false;
  TensorRecords records_;
  std::vector<std::unique_ptr<DeviceTables>> devices_;
  uint64_t fork_generation_;
};

bool cuda_built();

}  // namespace fused_ema
