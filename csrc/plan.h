// Pairs of torch tensors → tables, kept for as long as the tensors stay what they were. Knows torch, not Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "table.h"

namespace fused_ema {

enum class Action : uint8_t { none, copy, average };  // none: an empty pair, or a repeated one

// What a tensor was when the plan was made. Compared at each call: a tensor that matches may be used through the
// plan's raw pointers.
class Seen {
 public:
  Seen() = default;
  Seen(const at::Tensor& tensor, bool written);
  bool matches(const at::Tensor& tensor, bool written) const;

 private:
  const void* data_ = nullptr;
  size_t storage_bytes_ = 0;
  c10::DispatchKeySet keys_;  // device type, layout, conj and neg bits, subclasses
  at::ScalarType dtype_ = at::ScalarType::Undefined;
  c10::SmallVector<int64_t, 8> sizes_and_strides_;
};

struct Entry {
  std::string name;
  at::Tensor ema;
  at::Tensor model;
  Action action;
  Seen ema_seen;
  Seen model_seen;
};

struct DeviceTables;  // the tables of one device, and their copy on it

class Plan {
 public:
  // The caller has checked the pairs (fused_ema/checks.py); what would corrupt memory is checked here again.
  explicit Plan(std::vector<Entry> entries);
  ~Plan();

  bool forked() const;   // made by a parent process: must not be touched
  bool current() const;  // every tensor still is what it was
  // The same for other tensor objects, which then take the place of the plan's own.
  bool adopt(const std::vector<at::Tensor>& ema, const std::vector<at::Tensor>& model);
  void release();  // drops the references to tensors, until adopt() sets them again

  // One launch per CUDA device, one parallel loop for the CPU. `device_decay` (0-d, on the averages' device) takes
  // the place of `decay` where it is defined.
  void run(Op op, double decay, const at::Tensor& device_decay);
  void bump_versions(Op op) const;

  bool large() const;  // worth giving other threads the interpreter meanwhile
  std::vector<c10::Storage> storages() const;
  int64_t launches() const { return static_cast<int64_t>(devices_.size()); }

 private:
  std::vector<Entry> entries_;
  std::vector<std::unique_ptr<DeviceTables>> devices_;
  uint64_t fork_generation_;
};

bool cuda_built();

}  // namespace fused_ema
