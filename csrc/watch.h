// What modules, dicts and lists held when a plan was made, and whether they still do: any tensor that was added,
// removed, replaced, reordered or tied since shows, by a look at each slot that needs no call into Python.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <unordered_set>
#include <vector>

#include "plan.h"

namespace fused_ema {

namespace py = pybind11;

// The part of a DTensor that lies on this rank. A reference that is held elsewhere.
inline const at::TensorImpl* shard_of(PyObject* tensor) {
  static PyObject* const attribute = PyUnicode_InternFromString("_local_tensor");
  const auto shard = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, attribute));
  if (!shard) PyErr_Clear();
  return shard && THPVariable_Check(shard.ptr()) ? THPVariable_Unpack(shard.ptr()).unsafeGetTensorImpl() : nullptr;
}

// Whether its class has a slot for that, or C++ behind it, so that no Python runs where it is asked for.
inline bool has_shard(PyObject* tensor) {
  const auto type = py::type::handle_of(tensor);
  if (!py::hasattr(type, "_local_tensor")) return false;
  const PyTypeObject* const kind = Py_TYPE(type.attr("_local_tensor").ptr());
  return kind == &PyMemberDescr_Type || kind == &PyGetSetDescr_Type;
}

// Python 3.11 may collect garbage, and run whatever that runs, where it is asked for a __dict__.
struct NoCollection {
  const bool on = PyGC_Disable() != 0;
  ~NoCollection() {
    if (on) PyGC_Enable();
  }
};

class Watch {
 public:
  // Neither modules, with those inside of them, nor their tensors are held: a plan that outlives them, in a cache, must
  // not keep them alive. (But for DTensors; and a list or dict is held, with what is in it.)
  Watch(const std::vector<py::object>& modules, const std::vector<py::object>& containers) {
    std::unordered_set<const PyObject*> added{Py_None};
    for (const auto& module : modules) add_module(module, added, /*outermost=*/true);
    for (const auto& container : containers) {
      add_slots(container);
      containers_.push_back({container, slots_.size()});
    }
  }

  bool current() const {
    constexpr size_t kAhead = 4;  // modules
    const NoCollection meanwhile;
    size_t line = 0, slot = 0;
    for (size_t i = 0; i < modules_.size(); ++i) {
      const size_t lines = modules_[std::min(i + kAhead, modules_.size() - 1)].lines;
      for (; line < lines; ++line) prefetch(lines_[line], 1);
      if (!same_registries(modules_[i], slot)) return false;
    }
    return std::all_of(containers_.begin(), containers_.end(),
                       [&](auto& container) { return same_items(container.object.ptr(), slot, container.end); });
  }

  // Whether these tensors, or those whose shards they are, are in slots, which keep them alive. Not so where another
  // thread put something else there while Python was pairing.
  bool holds(const Tensors& tensors) const {
    std::unordered_set<const at::TensorImpl*> held;
    for (const auto& slot : slots_) held.insert(slot.shard ? slot.shard : slot.tensor);
    return std::all_of(tensors.begin(), tensors.end(),
                       [&](auto& tensor) { return held.count(tensor.unsafeGetTensorImpl()) != 0; });
  }

  // The DTensors whose shards are among these tensors.
  std::vector<at::TensorImpl*> whole_of(const Tensors& tensors) const {
    std::unordered_set<const at::TensorImpl*> shards;
    for (const auto& tensor : tensors) shards.insert(tensor.unsafeGetTensorImpl());
    std::vector<at::TensorImpl*> found;
    for (const auto& slot : slots_)
      if (slot.shard && shards.count(slot.shard)) found.push_back(slot.tensor);
    return found;
  }

 private:
  // One value of a container. Another of its type may have its address by then: a module, then what it holds is
  // compared too; a tensor, then the plan compares all that it knows of one. The layout of a DTensor it does not know:
  // those are held, so that no other gets the address.
  struct Slot {
    PyObject* key;                // of a dict
    PyObject* value;              // compared by identity
    PyTypeObject* type;           // of the value
    at::TensorImpl* tensor;       // what it held, if a tensor: torch.utils.swap_tensors changes that
    const at::TensorImpl* shard;  // of a DTensor
  };
  static constexpr size_t kRegistries = 3;
  // Its registries are found through its __dict__ at each call, since code in the wild replaces them.
  struct Module {
    PyObject* object;               // alive where it is asked for: one that holds it comes before, and no Python runs
    py::object weak;                // to an outermost one, which none holds
    PyObject* key[kRegistries];     // names as they are in its __dict__, where those of unpickled ones are others
    Py_ssize_t place[kRegistries];  // from where PyDict_Next() finds them there
    size_t end[kRegistries];        // of its slots
    size_t lines;                   // to prefetch up to here
  };
  struct Container {
    py::object object;
    size_t end;
  };

  static PyObject* name(size_t registry) {
    static PyObject* const names[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
                                      PyUnicode_InternFromString("_modules")};
    return names[registry];
  }

  static bool equal(PyObject* key, PyObject* name) {
    return key == name || (PyUnicode_Check(key) && PyUnicode_Compare(key, name) == 0);
  }

  void add_module(const py::object& object, std::unordered_set<const PyObject*>& added, bool outermost) {
    if (!added.insert(object.ptr()).second) return;
    const py::dict attributes = object.attr("__dict__");
    Module module{object.ptr(), {}, {}, {}, {}, 0};
    if (outermost) module.weak = py::weakref(object);
    add_lines(reinterpret_cast<const char*>(object.ptr()) - 32, 64);  // where its __dict__ is lies before or behind it
    add_lines(attributes.ptr(), 17);                                  // entries, up to the last registry
    std::vector<py::object> children;
    for (size_t i = 0; i < kRegistries; ++i) {
      Py_ssize_t next = 0;
      const py::object registry = attributes[name(i)];
      if (!PyDict_Check(registry.ptr())) throw py::type_error("expected registries that are dicts");
      for (PyObject* value;
           PyDict_Next(attributes.ptr(), &next, &module.key[i], &value) && !equal(module.key[i], name(i));)
        module.place[i] = next;
      held_.push_back(py::reinterpret_borrow<py::object>(module.key[i]));
      children = add_slots(registry);  // in the end, those of the last registry
      module.end[i] = slots_.size();
      add_lines(registry.ptr(), children.size());
    }
    module.lines = lines_.size();
    modules_.push_back(std::move(module));
    for (const auto& child : children) add_module(child, added, /*outermost=*/false);
  }

  // Returns the values, held: Python may run where one is asked whether it is a tensor.
  std::vector<py::object> add_slots(const py::object& container) {
    std::vector<py::object> keys, values;
    if (PyDict_Check(container.ptr())) {
      for (auto item : py::reinterpret_borrow<py::dict>(container)) {
        keys.push_back(py::reinterpret_borrow<py::object>(item.first));
        values.push_back(py::reinterpret_borrow<py::object>(item.second));
      }
    } else {
      for (auto item : container) values.push_back(py::reinterpret_borrow<py::object>(item));
    }
    for (size_t i = 0; i < values.size(); ++i) {
      PyObject* const value = values[i].ptr();
      Slot slot{keys.empty() ? nullptr : keys[i].ptr(), value, Py_TYPE(value), nullptr, nullptr};
      if (slots_.empty() || slots_.back().type != slot.type) held_.push_back(py::type::of(values[i]));
      if (THPVariable_Check(value)) {
        slot.tensor = THPVariable_Unpack(value).unsafeGetTensorImpl();
        if (slot.tensor->key_set().has(c10::DispatchKey::Python)) {
          held_.push_back(values[i]);
          if (has_shard(value)) slot.shard = shard_of(value);
        }
      }
      slots_.push_back(slot);
    }
    held_.insert(held_.end(), keys.begin(), keys.end());
    return values;
  }

  bool same_registries(const Module& module, size_t& slot) const {
    if (module.weak && PyWeakref_GET_OBJECT(module.weak.ptr()) == Py_None) return false;
    PyObject** const attributes = _PyObject_GetDictPtr(module.object);
    if (!attributes || !*attributes) return false;
    for (size_t i = 0; i < kRegistries; ++i) {
      PyObject *key, *registry;
      Py_ssize_t at = module.place[i];  // quicker than to look it up
      if (!PyDict_Next(*attributes, &at, &key, &registry) || key != module.key[i])
        registry = PyDict_GetItemWithError(*attributes, name(i));
      if (!registry || !PyDict_Check(registry) || !same_items(registry, slot, module.end[i])) return false;
    }
    return true;
  }

  bool same_items(PyObject* container, size_t& slot, size_t end) const {
    if (PyDict_Check(container)) {
      if (static_cast<size_t>(PyDict_GET_SIZE(container)) != end - slot) return false;
      PyObject *key, *value;
      for (Py_ssize_t at = 0; slot < end; ++slot)
        if (!PyDict_Next(container, &at, &key, &value) || key != slots_[slot].key || !same_value(slot, value))
          return false;
      return true;
    }
    if (static_cast<size_t>(PySequence_Fast_GET_SIZE(container)) != end - slot) return false;
    for (PyObject* const* value = PySequence_Fast_ITEMS(container); slot < end; ++slot, ++value)
      if (!same_value(slot, *value)) return false;
    return true;
  }

  bool same_value(size_t number, PyObject* found) const {
    constexpr size_t kAhead = 16;
    if (number + kAhead < slots_.size())
      prefetch(slots_[number + kAhead].value + 1, 1);  // what it holds lies behind it
    const Slot& slot = slots_[number];
    return found == slot.value && Py_TYPE(found) == slot.type &&
           (!slot.tensor || THPVariable_Unpack(found).unsafeGetTensorImpl() == slot.tensor) &&
           (!slot.shard || shard_of(found) == slot.shard);
  }

  // Where a look at the modules goes, to prefetch it: between two updates the caches go cold, and each step of a walk
  // over modules would wait for memory. Addresses that went stale cost nothing but their prefetch.
  void add_lines(const void* address, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) lines_.push_back(static_cast<const char*>(address) + at);
  }
  // Of a dict: its table has a header, about a byte per entry, and entries of 16 bytes. Objects of one class may share
  // theirs, beside which each has its values.
  void add_lines(PyObject* dict, size_t entries) {
    const auto* const fields = reinterpret_cast<const PyDictObject*>(dict);
    add_lines(static_cast<const void*>(fields), sizeof(PyDictObject));
    if (fields->ma_used == 0) return;
    if (fields->ma_values) {
      add_lines(static_cast<const void*>(fields->ma_values), 8 * entries);
    } else {
      add_lines(static_cast<const void*>(fields->ma_keys), 32 + 17 * entries);
    }
  }

  std::vector<Slot> slots_;
  std::vector<py::object> held_;  // keys, types and DTensors, so that no other gets the address
  std::vector<Module> modules_;
  std::vector<Container> containers_;
  std::vector<const void*> lines_;
};

}  // namespace fused_ema
