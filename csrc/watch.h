// What modules, dicts and lists held when a plan was made, and whether they still do. Any tensor that was added,
// removed, replaced, reordered or tied since is noticed, by a look at each slot that does not call into Python.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "plan.h"

namespace fused_ema {

namespace py = pybind11;

class CompiledWatch {
 public:
  // Neither modules nor their tensors are kept alive, since a cached plan may outlive them; DTensors are the exception.
  // Lists and dicts are kept alive, with what they hold.
  CompiledWatch(const std::vector<py::object>& modules, const std::vector<py::object>& containers);

  bool current() const;

  // A list of what the slots hold, in one fixed order; None if that has changed.
  py::object values() const;

  // Slots by number, with what they hold.
  using Slots = std::vector<std::pair<size_t, py::object>>;
  // The slots that hold other tensors than before, of the same types; nullopt if something else has changed, or if one
  // of them is a DTensor.
  std::optional<Slots> changed() const;
  // The same, behind a list of what all slots hold now.
  std::optional<std::pair<py::list, Slots>> changed_values() const;
  // Expects from now on what changed() found. Throws nothing.
  void adopt(const Slots& changed);
  // The tensor in each slot, which may no longer be alive; null if it holds something else.
  std::vector<at::TensorImpl*> tensors() const;

  // Whether slots hold all of these tensors, or the DTensors that they are the local shards of, and so keep them alive.
  // They do not if another thread replaced one while Python was pairing.
  bool holds(const Tensors& tensors) const;

  // The DTensors whose local shards are among these tensors.
  std::vector<at::TensorImpl*> dtensors_of(const Tensors& tensors) const;

 private:
  // One value of a container. Another object of its type may have its address by now. If it is a module, what it holds
  // is compared too. If it is a tensor, the plan compares all it knows of tensors; it knows nothing of a DTensor's
  // layout, so DTensors are kept alive instead, and keep their addresses.
  struct Slot {
    PyObject* key;                // in a dict
    PyObject* value;              // compared by identity
    PyTypeObject* type;           // of the value
    at::TensorImpl* tensor;       // if the value is a tensor; torch.utils.swap_tensors changes it
    const at::TensorImpl* shard;  // if the value is a DTensor
  };
  static constexpr size_t kRegistries = 3;
  // Registries are looked up in the module's __dict__ at each call, because there is code that replaces them.
  struct Module {
    PyObject* object;               // alive when it is compared: its parent, which was compared before, holds it
    py::object weak;                // a weak reference, if it has no parent
    PyObject* key[kRegistries];     // the names in its __dict__; those of an unpickled module are objects of their own
    Py_ssize_t place[kRegistries];  // positions in __dict__ from which PyDict_Next() reaches them
    size_t end[kRegistries];        // index of the first slot after each registry
    size_t lines;                   // index of the first of lines_ after this module's
  };
  struct Container {
    py::object object;
    size_t end;
  };

  void add_module(const py::object& object, std::unordered_set<const PyObject*>& added, bool outermost);
  std::vector<py::object> add_slots(const py::object& container);
  void add_lines(const void* address, size_t bytes);
  void add_dict_lines(PyObject* dict, size_t entries);
  // Walks over the slots; asks `allowed` about each that holds something else than before. False if that says no, or
  // keys, modules or counts have changed.
  template <class F>
  bool walk(const F& allowed) const;
  template <class F>
  bool same_registries(const Module& module, size_t& slot, const F& allowed) const;
  template <class F>
  bool same_items(PyObject* container, size_t& slot, size_t end, const F& allowed) const;
  bool same_value(size_t number, PyObject* found) const;

  std::vector<Slot> slots_;
  std::vector<py::object> held_;  // keys, types and DTensors, so that no other object gets their addresses
  std::vector<Module> modules_;
  std::vector<Container> containers_;
  std::vector<const void*> lines_;  // cache lines that current() will touch, to prefetch them
};

}  // namespace fused_ema
