// Records what modules, dicts and lists hold, and compares it with what they hold later.
#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace fused_ema {
namespace {

// The local shard of a DTensor. The reference is borrowed.
const at::TensorImpl* shard_of(PyObject* tensor) {
  static PyObject* const attribute = PyUnicode_InternFromString("_local_tensor");
  const auto shard = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, attribute));
  if (!shard) PyErr_Clear();
  return shard && THPVariable_Check(shard.ptr()) ? THPVariable_Unpack(shard.ptr()).unsafeGetTensorImpl() : nullptr;
}

// Whether the class has a slot, or a C getter, for the shard: then reading it runs no Python code.
bool has_shard(PyObject* tensor) {
  const auto type = py::type::handle_of(tensor);
  if (!py::hasattr(type, "_local_tensor")) return false;
  const PyTypeObject* const kind = Py_TYPE(type.attr("_local_tensor").ptr());
  return kind == &PyMemberDescr_Type || kind == &PyGetSetDescr_Type;
}

// Python 3.11 may create a __dict__ when asked for its address, and collect garbage then, which can run any code.
struct NoCollection {
  const bool on = PyGC_Disable() != 0;
  ~NoCollection() {
    if (on) PyGC_Enable();
  }
};

PyObject* registry_name(size_t registry) {
  static PyObject* const names[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
                                    PyUnicode_InternFromString("_modules")};
  return names[registry];
}

bool equal(PyObject* key, PyObject* name) {
  return key == name || (PyUnicode_Check(key) && PyUnicode_Compare(key, name) == 0);
}

}  // namespace

CompiledWatch::CompiledWatch(const std::vector<py::object>& modules, const std::vector<py::object>& containers) {
  std::unordered_set<const PyObject*> added{Py_None};
  for (const auto& module : modules) add_module(module, added, /*outermost=*/true);
  for (const auto& container : containers) {
    add_slots(container);
    containers_.push_back({container, slots_.size()});
  }
}

void CompiledWatch::add_module(const py::object& object, std::unordered_set<const PyObject*>& added, bool outermost) {
  if (!added.insert(object.ptr()).second) return;
  const py::dict attributes = object.attr("__dict__");
  Module module{object.ptr(), {}, {}, {}, {}, 0};
  if (outermost) module.weak = py::weakref(object);
  add_lines(reinterpret_cast<const char*>(object.ptr()) - 32, 64);  // the pointer to its __dict__ is before or after it
  add_dict_lines(attributes.ptr(), 17);                             // entries, up to the last registry
  std::vector<py::object> children;
  for (size_t i = 0; i < kRegistries; ++i) {
    const py::object registry = attributes[registry_name(i)];
    if (!PyDict_Check(registry.ptr())) throw py::type_error("expected _parameters, _buffers and _modules to be dicts");
    Py_ssize_t next = 0;
    for (PyObject* value;
         PyDict_Next(attributes.ptr(), &next, &module.key[i], &value) && !equal(module.key[i], registry_name(i));)
      module.place[i] = next;
    held_.push_back(py::reinterpret_borrow<py::object>(module.key[i]));
    children = add_slots(registry);  // the last registry is _modules
    module.end[i] = slots_.size();
    add_dict_lines(registry.ptr(), children.size());
  }
  module.lines = lines_.size();
  modules_.push_back(std::move(module));
  for (const auto& child : children) add_module(child, added, /*outermost=*/false);
}

// Returns the values, and holds them while it works: asking whether one is a tensor may run Python code.
std::vector<py::object> CompiledWatch::add_slots(const py::object& container) {
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

// The caches go cold between two updates of a training loop, and each step of a walk over modules would wait for
// memory, so current() prefetches what it will read. An address that has become stale does no harm. Reading CPython's
// layout of dicts pays: without add_dict_lines() an update takes 1.5 to 2.6 times the host time
// (benchmarks/bench_prefetch.py, on 2 cores of an AMD EPYC with 32 MiB of L3 cache).
void CompiledWatch::add_lines(const void* address, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) lines_.push_back(static_cast<const char*>(address) + at);
}

// The table of a dict has a header, about a byte per entry, and entries of 16 bytes. Instances of a class may share it,
// and then have their values in an array of their own.
void CompiledWatch::add_dict_lines(PyObject* dict, size_t entries) {
  const auto* const fields = reinterpret_cast<const PyDictObject*>(dict);
  add_lines(fields, sizeof(PyDictObject));
  if (fields->ma_used == 0) return;
  if (fields->ma_values) {
    add_lines(fields->ma_values, 8 * entries);
  } else {
    add_lines(fields->ma_keys, 32 + 17 * entries);
  }
}

// Inlined by request: a call per slot would add a tenth to the host time of an update.
C10_ALWAYS_INLINE bool CompiledWatch::same_value(size_t number, PyObject* found) const {
  constexpr size_t kAhead = 16;
  if (number + kAhead < slots_.size()) prefetch(slots_[number + kAhead].value + 1, 1);  // what it holds lies behind it
  const Slot& slot = slots_[number];
  return found == slot.value && Py_TYPE(found) == slot.type &&
         (!slot.tensor || THPVariable_Unpack(found).unsafeGetTensorImpl() == slot.tensor) &&
         (!slot.shard || shard_of(found) == slot.shard);
}

template <class F>
C10_ALWAYS_INLINE bool CompiledWatch::same_items(PyObject* container, size_t& slot, size_t end,
                                                 const F& allowed) const {
  if (PyDict_Check(container)) {
    if (static_cast<size_t>(PyDict_GET_SIZE(container)) != end - slot) return false;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; slot < end; ++slot)
      if (!PyDict_Next(container, &at, &key, &value) || key != slots_[slot].key ||
          !(same_value(slot, value) || allowed(slot, value)))
        return false;
    return true;
  }
  if (static_cast<size_t>(PySequence_Fast_GET_SIZE(container)) != end - slot) return false;
  for (PyObject* const* value = PySequence_Fast_ITEMS(container); slot < end; ++slot, ++value)
    if (!(same_value(slot, *value) || allowed(slot, *value))) return false;
  return true;
}

template <class F>
C10_ALWAYS_INLINE bool CompiledWatch::same_registries(const Module& module, size_t& slot, const F& allowed) const {
  if (module.weak && PyWeakref_GET_OBJECT(module.weak.ptr()) == Py_None) return false;
  PyObject** const attributes = _PyObject_GetDictPtr(module.object);
  if (!attributes || !*attributes) return false;
  for (size_t i = 0; i < kRegistries; ++i) {
    PyObject *key, *registry;
    Py_ssize_t at = module.place[i];  // where it was last, which is quicker than looking it up
    if (!PyDict_Next(*attributes, &at, &key, &registry) || key != module.key[i])
      registry = PyDict_GetItemWithError(*attributes, registry_name(i));
    if (!registry || !PyDict_Check(registry) || !same_items(registry, slot, module.end[i], allowed)) return false;
  }
  return true;
}

template <class F>
C10_ALWAYS_INLINE bool CompiledWatch::walk(const F& allowed) const {
  constexpr size_t kAhead = 4;  // modules
  const NoCollection guard;
  size_t line = 0, slot = 0;
  for (size_t i = 0; i < modules_.size(); ++i) {
    const size_t lines = modules_[std::min(i + kAhead, modules_.size() - 1)].lines;
    for (; line < lines; ++line) prefetch(lines_[line], 1);
    if (!same_registries(modules_[i], slot, allowed)) return false;
  }
  return std::all_of(containers_.begin(), containers_.end(),
                     [&](auto& container) { return same_items(container.object.ptr(), slot, container.end, allowed); });
}

bool CompiledWatch::current() const {
  return walk([](size_t, PyObject*) { return false; });
}

std::optional<CompiledWatch::Slots> CompiledWatch::changed() const {
  Slots found;
  const auto add = [&](size_t number, PyObject* value) {
    const Slot& slot = slots_[number];
    if (!slot.tensor || slot.type != Py_TYPE(value)) return false;
    if (THPVariable_Unpack(value).key_set().has(c10::DispatchKey::Python)) return false;
    found.emplace_back(number, py::reinterpret_borrow<py::object>(value));
    return true;
  };
  return walk(add) ? std::make_optional(std::move(found)) : std::nullopt;
}

std::optional<std::pair<py::list, CompiledWatch::Slots>> CompiledWatch::changed_values() const {
  auto values = py::list(slots_.size());  // as in values()
  auto found = changed();
  if (!found) return std::nullopt;
  auto next = found->begin();
  for (size_t i = 0; i < slots_.size(); ++i) {
    const bool other = next != found->end() && next->first == i;
    PyList_SET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i),
                    Py_NewRef(other ? next++->second.ptr() : slots_[i].value));
  }
  return std::make_pair(std::move(values), std::move(*found));
}

void CompiledWatch::adopt(const Slots& changed) {
  for (const auto& [number, value] : changed) {
    slots_[number].value = value.ptr();
    slots_[number].tensor = THPVariable_Unpack(value.ptr()).unsafeGetTensorImpl();
  }
}

std::vector<at::TensorImpl*> CompiledWatch::tensors() const {
  std::vector<at::TensorImpl*> tensors;
  tensors.reserve(slots_.size());
  for (const auto& slot : slots_) tensors.push_back(slot.tensor);
  return tensors;
}

py::object CompiledWatch::values() const {
  auto values = py::list(slots_.size());  // before the look: to allocate it may run code that changes something
  if (!current()) return py::none();
  for (size_t i = 0; i < slots_.size(); ++i)
    PyList_SET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(slots_[i].value));
  return values;
}

bool CompiledWatch::holds(const Tensors& tensors) const {
  std::unordered_set<const at::TensorImpl*> held;
  for (const auto& slot : slots_) held.insert(slot.shard ? slot.shard : slot.tensor);
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](auto& tensor) { return held.count(tensor.unsafeGetTensorImpl()) != 0; });
}

std::vector<at::TensorImpl*> CompiledWatch::dtensors_of(const Tensors& tensors) const {
  std::unordered_set<const at::TensorImpl*> shards;
  for (const auto& tensor : tensors) shards.insert(tensor.unsafeGetTensorImpl());
  std::vector<at::TensorImpl*> found;
  for (const auto& slot : slots_)
    if (slot.shard && shards.count(slot.shard)) found.push_back(slot.tensor);
  return found;
}

}  // namespace fused_ema
