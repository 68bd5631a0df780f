// The only file that knows Python: the class `Plan` of fused_ema._C, and the slots it watches.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>

#include "plan.h"

namespace py = pybind11;

namespace fused_ema {
namespace {

using Tensors = std::vector<at::Tensor>;

// The content of a dict, list or tuple as it was: any added, removed, replaced or reordered item shows. Compared by
// object identity, which needs no call into Python; references are held, so an address cannot come to mean another
// object.
class Container {
 public:
  explicit Container(py::object container) : container_(std::move(container)) {
    if (PyDict_Check(container_.ptr())) {
      for (auto item : py::reinterpret_borrow<py::dict>(container_)) push(item.first), push(item.second);
    } else {
      for (auto item : container_) push(item);
    }
  }

  PyObject* object() const { return container_.ptr(); }

  bool current() const {
    PyObject* const object = container_.ptr();
    size_t i = 0;
    if (PyDict_Check(object)) {
      if (static_cast<size_t>(PyDict_GET_SIZE(object)) * 2 != items_.size()) return false;
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(object, &at, &key, &value); i += 2)
        if (i + 1 >= items_.size() || items_[i].ptr() != key || items_[i + 1].ptr() != value) return false;
      return true;
    }
    if (static_cast<size_t>(PySequence_Fast_GET_SIZE(object)) != items_.size()) return false;
    PyObject* const* const found = PySequence_Fast_ITEMS(object);
    for (; i < items_.size(); ++i)
      if (items_[i].ptr() != found[i]) return false;
    return true;
  }

 private:
  void push(py::handle item) { items_.push_back(py::reinterpret_borrow<py::object>(item)); }
  py::object container_;
  std::vector<py::object> items_;
};

// A module's three registries, found through its __dict__ at each call since code in the wild replaces them.
class Module {
 public:
  explicit Module(py::dict attributes) : attributes_(std::move(attributes)) {
    for (size_t i = 0; i < 3; ++i) registries_.emplace_back(attributes_[name(i)]);
  }

  bool current() const {
    for (size_t i = 0; i < 3; ++i)
      if (PyDict_GetItemWithError(attributes_.ptr(), name(i).ptr()) != registries_[i].object() ||
          !registries_[i].current())
        return false;
    return true;
  }

 private:
  static py::handle name(size_t i) {
    static PyObject* const names[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
                                      PyUnicode_InternFromString("_modules")};
    return names[i];
  }
  py::dict attributes_;
  std::vector<Container> registries_;
};

std::vector<Entry> make_entries(const std::vector<std::string>& names, const Tensors& ema, const Tensors& model,
                                const std::vector<int>& actions) {
  if (names.size() != ema.size() || names.size() != model.size() || names.size() != actions.size())
    throw py::value_error("names, ema, model and actions must have one length");
  std::vector<Entry> entries;
  entries.reserve(names.size());
  for (size_t i = 0; i < names.size(); ++i)
    entries.push_back(Entry{names[i], ema[i], model[i], static_cast<Action>(actions[i])});
  return entries;
}

class PyPlan {
 public:
  PyPlan(const std::vector<std::string>& names, const Tensors& ema, const Tensors& model,
         const std::vector<int>& actions, const std::vector<py::dict>& modules,
         const std::vector<py::object>& containers)
      : plan_(make_entries(names, ema, model, actions)) {
    for (const auto& attributes : modules) modules_.emplace_back(attributes);
    for (const auto& container : containers) containers_.emplace_back(container);
  }

  // Both return false, and have written nothing, where the plan no longer fits what it was made from.
  bool run(Op op, double decay, const std::optional<at::Tensor>& device_decay) {
    const auto current = [](const auto& watched) { return watched.current(); };
    return run_if(
        [&] {
          return std::all_of(modules_.begin(), modules_.end(), current) &&
                 std::all_of(containers_.begin(), containers_.end(), current) && plan_.current();
        },
        op, decay, device_decay);
  }
  // For tensor objects that are new at each call; no reference to them is kept.
  bool run_with(const Tensors& ema, const Tensors& model, Op op, double decay,
                const std::optional<at::Tensor>& device_decay) {
    return run_if([&] { return plan_.adopt(ema, model); }, op, decay, device_decay, /*release=*/true);
  }

  int64_t launches() const { return plan_.launches(); }

 private:
  // One thread at a time. The interpreter lock is never held while waiting for the plan's, so the two can't deadlock.
  template <class Fits>
  bool run_if(const Fits& fits, Op op, double decay, const std::optional<at::Tensor>& device_decay,
              bool release = false) {
    if (plan_.forked()) return false;
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      const py::gil_scoped_release unlocked;
      lock.lock();
    }
    if (!fits()) return false;
    struct Release {
      Plan* plan;
      ~Release() {
        if (plan) plan->release();
      }
    } const at_exit{release ? &plan_ : nullptr};
    if (op == Op::update && !device_decay && decay == 1.0) return true;
    const at::Tensor device = device_decay.value_or(at::Tensor());
    if (plan_.large()) {
      const auto held = plan_.storages();  // other threads may replace what the tensors hold meanwhile
      const py::gil_scoped_release unlocked;
      plan_.run(op, decay, device);
    } else {
      plan_.run(op, decay, device);
    }
    plan_.bump_versions(op);
    return true;
  }

  Plan plan_;
  std::vector<Module> modules_;
  std::vector<Container> containers_;
  std::mutex mutex_;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of fused_ema: see csrc/.";
  m.attr("cuda_built") = cuda_built();
  m.attr("max_dims") = kMaxDims;
  py::enum_<Op>(m, "Op").value("update", Op::update).value("copy", Op::copy).value("swap", Op::swap);
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<const std::vector<std::string>&, const Tensors&, const Tensors&, const std::vector<int>&,
                    const std::vector<py::dict>&, const std::vector<py::object>&>(),
           py::arg("names"), py::arg("ema"), py::arg("model"), py::arg("actions"), py::arg("modules"),
           py::arg("containers"))
      .def("run", &PyPlan::run, py::arg("op"), py::arg("decay"), py::arg("device_decay"))
      .def("run_with", &PyPlan::run_with, py::arg("ema"), py::arg("model"), py::arg("op"), py::arg("decay"),
           py::arg("device_decay"))
      .def("launches", &PyPlan::launches);
}

}  // namespace
}  // namespace fused_ema
