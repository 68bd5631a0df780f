// The only file that knows Python: the class `Plan` of fused_ema._C, and the slots it watches.
#include <pthread.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <unordered_set>

#include "ema_cpu.h"
#include "plan.h"

namespace py = pybind11;

namespace fused_ema {
namespace {

using Tensors = std::vector<at::Tensor>;

using Addresses = std::unordered_set<const void*>;

// The part of a DTensor that lies on this rank, null for other tensors. A reference that is held elsewhere.
const at::TensorImpl* shard_of(PyObject* tensor) {
  static PyObject* const attribute = PyUnicode_InternFromString("_local_tensor");
  const auto shard = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, attribute));
  if (!shard) PyErr_Clear();
  return shard && THPVariable_Check(shard.ptr()) ? THPVariable_Unpack(shard.ptr()).unsafeGetTensorImpl() : nullptr;
}

// One value of a container, without a reference to what it means: tensors can be freed and swapped, modules die.
struct Slot {
  py::object key;                         // of a dict
  py::object held;                        // the value, unless it is a module
  const PyObject* value;                  // compared by identity, which needs no call into Python
  at::TensorImpl* tensor = nullptr;       // what it held, if a tensor: torch.utils.swap_tensors changes that
  const at::TensorImpl* shard = nullptr;  // of a DTensor

  bool current(PyObject* found) const {
    return found == value && (!tensor || THPVariable_Unpack(found).unsafeGetTensorImpl() == tensor) &&
           (!shard || shard_of(found) == shard);
  }
};

// Where a look at what is watched goes, line by line, to prefetch it: between two updates the caches go cold, and each
// step of a walk over modules would wait for memory. Addresses that went stale cost nothing but their prefetch.
class Trail {
 public:
  void add(const void* address, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) lines_.push_back(static_cast<const char*>(address) + at);
  }
  // A dict of so many entries: its table has a header, about a byte per entry, and the entries.
  void add_dict(PyObject* dict, size_t entries) {
    const auto* const fields = reinterpret_cast<const PyDictObject*>(dict);
    add(fields, sizeof(PyDictObject));
    if (fields->ma_used == 0) return;
    add(fields->ma_keys, 32 + 25 * entries);
    if (fields->ma_values) add(fields->ma_values, 8 * entries);  // which a module's __dict__ can have beside its keys
  }
  size_t size() const { return lines_.size(); }
  void prefetch_to(size_t end, size_t& at) const {
    for (; at < end; ++at) prefetch(lines_[at], 1);
  }

 private:
  std::vector<const void*> lines_;
};

// The content of a dict, list or tuple as it was: any added, removed, replaced or reordered item shows.
class Content {
 public:
  // `weak`: no reference to the values is kept; someone else sees to it that they are the same objects.
  explicit Content(py::handle container, bool weak = false) {
    if (PyDict_Check(container.ptr())) {
      for (auto item : py::reinterpret_borrow<py::dict>(container)) push(item.first, item.second, weak);
    } else {
      for (auto item : container) push({}, item, weak);
    }
  }

  bool current(PyObject* const container) const {
    size_t i = 0;
    if (PyDict_Check(container)) {
      if (static_cast<size_t>(PyDict_GET_SIZE(container)) != slots_.size()) return false;
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(container, &at, &key, &value); ++i) {
        prefetch_slot(i + 16);
        if (i >= slots_.size() || slots_[i].key.ptr() != key || !slots_[i].current(value)) return false;
      }
      return true;
    }
    if (static_cast<size_t>(PySequence_Fast_GET_SIZE(container)) != slots_.size()) return false;
    PyObject* const* const found = PySequence_Fast_ITEMS(container);
    for (; i < slots_.size(); ++i) {
      prefetch_slot(i + 16);
      if (!slots_[i].current(found[i])) return false;
    }
    return true;
  }

  void add_tensors(std::vector<Slot>& tensors) const {
    for (const auto& slot : slots_)
      if (slot.tensor) tensors.push_back(slot);
  }
  void add_to(Trail& trail) const {
    if (slots_.empty()) return;
    trail.add(slots_.data(), slots_.size() * sizeof(Slot));
    for (const auto& slot : slots_) trail.add(slot.value, 64);
  }
  bool all_in(const Addresses& addresses) const {
    return std::all_of(slots_.begin(), slots_.end(),
                       [&](const Slot& slot) { return slot.value == Py_None || addresses.count(slot.value); });
  }

 private:
  void prefetch_slot(size_t i) const {
    if (i < slots_.size()) prefetch(slots_[i].value, 64);
  }
  void push(py::handle key, py::handle value, bool weak) {
    Slot slot{py::reinterpret_borrow<py::object>(key), {}, value.ptr()};
    if (!weak) slot.held = py::reinterpret_borrow<py::object>(value);
    if (THPVariable_Check(value.ptr())) {
      slot.tensor = THPVariable_Unpack(value.ptr()).unsafeGetTensorImpl();
      if (slot.tensor->key_set().has(c10::DispatchKey::Python)) slot.shard = shard_of(value.ptr());
    }
    slots_.push_back(std::move(slot));
  }
  std::vector<Slot> slots_;
};

class Container {
 public:
  explicit Container(py::object container) : container_(std::move(container)), content_(container_) {}
  bool current() const { return content_.current(container_.ptr()); }
  void add_tensors(std::vector<Slot>& tensors) const { content_.add_tensors(tensors); }

 private:
  py::object container_;
  Content content_;
};

// A module's three registries, found through its __dict__ at each call since code in the wild replaces them. The module
// is held weakly: a plan that outlives it, in a cache, must not keep it alive.
class Module {
 public:
  Module(const py::object& module, Trail& trail) : module_(module) {
    const py::dict attributes = module.attr("__dict__");
    trail.add(reinterpret_cast<const char*>(module.ptr()) - 64, 128);  // its __dict__ is found before or behind it
    trail.add_dict(attributes.ptr(), 10);                              // up to the registries, the first that it gets
    for (size_t i = 0; i < kRegistries; ++i) {
      const py::object registry = attributes[name(i)];
      registries_.push_back({Content(registry, /*weak=*/i == 2), place(attributes.ptr(), name(i).ptr())});
      if (PyDict_Check(registry.ptr())) trail.add_dict(registry.ptr(), PyDict_Size(registry.ptr()));
      registries_.back().content.add_to(trail);
    }
    trail_end_ = trail.size();
  }

  bool current() const {
    PyObject* const module = PyWeakref_GET_OBJECT(module_.ptr());
    if (module == Py_None) return false;
    PyObject** const attributes = _PyObject_GetDictPtr(module);
    if (!attributes || !*attributes) return false;
    for (size_t i = 0; i < kRegistries; ++i) {
      PyObject *key, *registry;
      Py_ssize_t at = registries_[i].place;  // quicker than to look it up
      if (!PyDict_Next(*attributes, &at, &key, &registry) || key != name(i).ptr())
        registry = PyDict_GetItemWithError(*attributes, name(i).ptr());
      if (!registry || !PyDict_Check(registry) || !registries_[i].content.current(registry)) return false;
    }
    return true;
  }
  void add_tensors(std::vector<Slot>& tensors) const {
    for (const auto& registry : registries_) registry.content.add_tensors(tensors);
  }
  bool children_in(const Addresses& addresses) const { return registries_[2].content.all_in(addresses); }
  size_t trail_end() const { return trail_end_; }

 private:
  struct Registry {
    Content content;
    Py_ssize_t place;  // from where PyDict_Next() found it next
  };
  static constexpr size_t kRegistries = 3;
  static py::handle name(size_t i) {
    static PyObject* const names[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
                                      PyUnicode_InternFromString("_modules")};
    return names[i];
  }
  static Py_ssize_t place(PyObject* dict, PyObject* wanted) {
    Py_ssize_t before = 0, at = 0;
    for (PyObject *key, *value; PyDict_Next(dict, &at, &key, &value) && key != wanted;) before = at;
    return before;
  }
  py::weakref module_;
  std::vector<Registry> registries_;
  size_t trail_end_;  // in the plan's, behind this module's part
};

// CPU work of one thread at a time, whatever the plans: two may share tensors. A forked child gets a lock of its own.
std::mutex& one_at_a_time() {
  static std::atomic<std::mutex*> lock{new std::mutex};
  static const int handler = pthread_atfork(nullptr, nullptr, [] { lock = new std::mutex; });
  (void)handler;
  return *lock;
}

std::vector<Entry> make_entries(const std::vector<std::string>& names, const Tensors& ema, const Tensors& model,
                                const std::vector<int>& actions, const std::vector<int64_t>& next_averages) {
  if (names.size() != ema.size() || names.size() != model.size() || names.size() != actions.size() ||
      names.size() != next_averages.size())
    throw py::value_error("names, ema, model, actions and next_averages must have one length");
  std::vector<Entry> entries;
  entries.reserve(names.size());
  for (size_t i = 0; i < names.size(); ++i)
    entries.push_back(Entry{names[i], ema[i], model[i], static_cast<Action>(actions[i]), next_averages[i]});
  return entries;
}

class PyPlan {
 public:
  PyPlan(const std::vector<std::string>& names, const Tensors& ema, const Tensors& model,
         const std::vector<int>& actions, const std::vector<py::object>& modules,
         const std::vector<py::object>& containers, int averages, const std::vector<int64_t>& next_averages)
      : plan_(make_entries(names, ema, model, actions, next_averages), averages) {
    Addresses watched;
    for (const auto& module : modules) modules_.emplace_back(module, trail_), watched.insert(module.ptr());
    for (const auto& container : containers) containers_.emplace_back(container);
    std::vector<Slot> slots;
    for (const auto& module : modules_) module.add_tensors(slots);
    for (const auto& container : containers_) container.add_tensors(slots);
    for (const auto& slot : slots) watched.insert(slot.shard ? slot.shard : slot.tensor);
    const auto in_slot = [&](const at::Tensor& tensor) { return watched.count(tensor.unsafeGetTensorImpl()) != 0; };
    sharded_ema_ = whole_of(ema, slots), sharded_model_ = whole_of(model, slots);
    complete_ = std::all_of(ema.begin(), ema.end(), in_slot) && std::all_of(model.begin(), model.end(), in_slot) &&
                std::all_of(modules_.begin(), modules_.end(), [&](auto& m) { return m.children_in(watched); });
  }

  // Both return false, and have written nothing, where the plan no longer fits what it was made from.
  bool run(Op op, const std::vector<double>& decay, const std::optional<at::Tensor>& device_decay,
           const std::vector<uint64_t>& keys, int average, const Tensors& aside) {
    return run_if([&] { return watched_current(op); }, op, make_call(decay, keys, average), device_decay, aside);
  }
  // For tensor objects that are new at each call; no reference to them is kept.
  bool run_with(const Tensors& ema, const Tensors& model, Op op, const std::vector<double>& decay,
                const std::optional<at::Tensor>& device_decay) {
    return run_if([&] { return plan_.adopt(ema, model, op); }, op, make_call(decay, {}, -1), device_decay, {});
  }

  bool current() const { return !plan_.forked() && watched_current(Op::update); }
  int64_t launches() const { return plan_.launches(); }
  // Whether the model holds an average. Kept here, where an interrupt can't come between the exchange and the note of
  // it.
  bool exchanged() const { return exchanged_; }
  void mark_exchanged() { exchanged_ = true; }
  // (device, bytes) that an exchange needs to set values aside.
  std::vector<std::pair<py::object, int64_t>> aside_bytes() const {
    std::vector<std::pair<py::object, int64_t>> bytes;
    for (const auto& [device, count] : plan_.aside_bytes()) bytes.emplace_back(py::cast(device), count);
    return bytes;
  }

 private:
  bool watched_current(Op op) const {
    if (!complete_) return false;
    constexpr size_t kAhead = 4;  // modules
    size_t at = 0;
    for (size_t i = 0; i < modules_.size(); ++i) {
      trail_.prefetch_to(modules_[std::min(i + kAhead, modules_.size() - 1)].trail_end(), at);
      if (!modules_[i].current()) return false;
    }
    const auto current = [](const auto& container) { return container.current(); };
    return std::all_of(containers_.begin(), containers_.end(), current) && plan_.current(op);
  }

  // Of all averages, or, where it is not negative, of one.
  Call make_call(const std::vector<double>& decay, const std::vector<uint64_t>& keys, int average) const {
    Call call;
    call.first = std::max(average, 0);
    call.last = average < 0 ? plan_.averages() : average + 1;
    const auto wanted = static_cast<size_t>(call.last - call.first);
    if (call.last > plan_.averages() || decay.size() != wanted || (!keys.empty() && keys.size() != wanted))
      throw py::value_error("expected one decay, and one key, for each average that takes part");
    std::copy(decay.begin(), decay.end(), call.decay + call.first);
    std::copy(keys.begin(), keys.end(), call.key + call.first);
    return call;
  }

  // One thread at a time. The interpreter lock is never held while waiting for the plan's, so the two can't deadlock.
  template <class Fits>
  bool run_if(const Fits& fits, Op op, const Call& call, const std::optional<at::Tensor>& device_decay,
              const Tensors& aside) {
    if (plan_.forked()) return false;
    std::unique_lock<std::mutex> lock(one_at_a_time(), std::try_to_lock);
    if (!lock.owns_lock()) {
      const py::gil_scoped_release unlocked;
      lock.lock();
    }
    if (!fits()) return false;
    const auto stays = [](double decay) { return decay == 1.0; };
    if (is_update(op) && !device_decay && std::all_of(call.decay + call.first, call.decay + call.last, stays))
      return true;
    if (writes_model(op)) check_aside(aside);
    if (device_decay && device_decay->numel() < call.last)
      throw py::value_error("expected a decay on the device for each average");
    const at::Tensor device = device_decay.value_or(at::Tensor());
    if (plan_.large()) {
      const auto tensors = plan_.tensors();
      const auto storages = plan_.storages();  // other threads may replace what the tensors hold meanwhile
      const py::gil_scoped_release unlocked;
      plan_.run(op, call, device, aside);
    } else {
      plan_.run(op, call, device, aside);
    }
    plan_.bump_versions(op);
    bump_versions(sharded_ema_);
    if (writes_model(op)) bump_versions(sharded_model_);
    if (writes_model(op)) exchanged_ = op == Op::swap;
    return true;
  }

  // The DTensors whose shards are among `tensors`.
  static std::vector<at::TensorImpl*> whole_of(const Tensors& tensors, const std::vector<Slot>& slots) {
    Addresses shards;
    for (const auto& tensor : tensors) shards.insert(tensor.unsafeGetTensorImpl());
    std::vector<at::TensorImpl*> found;
    for (const auto& slot : slots)
      if (slot.shard && shards.count(slot.shard)) found.push_back(slot.tensor);
    return found;
  }
  static void bump_versions(const std::vector<at::TensorImpl*>& tensors) {
    for (auto* tensor : tensors)
      if (!tensor->is_inference()) tensor->bump_version();
  }

  void check_aside(const Tensors& aside) const {
    for (const auto& [device, bytes] : plan_.aside_bytes()) {
      const auto fits = [&, on = device, needed = bytes](const at::Tensor& memory) {
        return memory.device() == on && memory.scalar_type() == at::kByte && memory.numel() >= needed &&
               memory.is_contiguous() && reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % kVectorBytes == 0;
      };
      if (std::none_of(aside.begin(), aside.end(), fits))
        throw py::value_error("expected memory for the values that an exchange between types sets aside");
    }
  }

  Plan plan_;
  bool exchanged_ = false;
  std::vector<at::TensorImpl*> sharded_ema_, sharded_model_;  // the tables know their shards
  Trail trail_;
  std::vector<Module> modules_;
  std::vector<Container> containers_;
  // Whether what is watched holds every tensor of the plan, and so keeps it alive. Not so where another thread put
  // something else there while Python was pairing.
  bool complete_;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of fused_ema: see csrc/.";
  m.attr("cuda_built") = cuda_built();
  m.def("_set_grain", &set_grain, py::arg("elements"));
  py::enum_<Op>(m, "Op")
      .value("update", Op::update)
      .value("copy", Op::copy)
      .value("swap", Op::swap)
      .value("restore", Op::restore)
      .value("update_stochastic", Op::update_stochastic);
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<const std::vector<std::string>&, const Tensors&, const Tensors&, const std::vector<int>&,
                    const std::vector<py::object>&, const std::vector<py::object>&, int, const std::vector<int64_t>&>(),
           py::arg("names"), py::arg("ema"), py::arg("model"), py::arg("actions"), py::arg("modules"),
           py::arg("containers"), py::arg("averages"), py::arg("next_averages"))
      .def("run", &PyPlan::run, py::arg("op"), py::arg("decay"), py::arg("device_decay") = py::none(),
           py::arg("keys") = std::vector<uint64_t>(), py::arg("average") = -1, py::arg("aside") = Tensors())
      .def("run_with", &PyPlan::run_with, py::arg("ema"), py::arg("model"), py::arg("op"), py::arg("decay"),
           py::arg("device_decay"))
      .def("aside_bytes", &PyPlan::aside_bytes)
      .def("current", &PyPlan::current)
      .def("exchanged", &PyPlan::exchanged)
      .def("mark_exchanged", &PyPlan::mark_exchanged)
      .def("launches", &PyPlan::launches);
}

}  // namespace
}  // namespace fused_ema
