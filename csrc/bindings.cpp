// The classes `PreparedPairs` and `CompiledWatch` of fused_ema._C.
#include <pthread.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>

#include "ema_cpu.h"
#include "plan.h"
#include "watch.h"

namespace fused_ema {
namespace {

// One lock for all plans, since two of them may share tensors. A forked child gets a lock of its own, because a thread
// of its parent may have held this one.
std::mutex& one_at_a_time() {
  static std::atomic<std::mutex*> lock{new std::mutex};
  [[maybe_unused]] static const int handler = pthread_atfork(nullptr, nullptr, [] { lock = new std::mutex; });
  return *lock;
}

std::vector<Entry> make_entries(const std::vector<std::string>& names, const Tensors& ema, const Tensors& model,
                                const std::vector<int>& actions, const std::vector<int64_t>& strides) {
  if (names.size() != ema.size() || names.size() != model.size() || names.size() != actions.size() ||
      names.size() != strides.size())
    throw py::value_error("expected names, ema, model, actions and strides of equal lengths");
  std::vector<Entry> entries;
  entries.reserve(names.size());
  for (size_t i = 0; i < names.size(); ++i)
    entries.push_back(Entry{names[i], ema[i], model[i], static_cast<Action>(actions[i]), strides[i]});
  return entries;
}

class PyPreparedPairs {
 public:
  PyPreparedPairs(const std::vector<std::string>& names, const Tensors& ema, const Tensors& model,
                  const std::vector<int>& actions, std::shared_ptr<const CompiledWatch> watch, int averages,
                  const std::vector<int64_t>& strides)
      : prepared_(make_entries(names, ema, model, actions, strides), averages), watch_(std::move(watch)) {
    if (!watch_) return;
    complete_ = watch_->holds(ema) && watch_->holds(model);
    ema_dtensors_ = watch_->dtensors_of(ema), model_dtensors_ = watch_->dtensors_of(model);
  }

  // Both return false, with nothing written, if something changed since the plan was made.
  bool run(Op op, const std::vector<double>& decays, const std::optional<at::Tensor>& device_decays,
           const std::vector<uint64_t>& keys, int average, const Tensors& scratch) {
    return run_if([&] { return watched_current(op); }, op, make_call(decays, keys, average), device_decays, scratch);
  }
  // For callers whose tensor objects are new at each call. No reference to them is kept.
  bool run_with(const Tensors& ema, const Tensors& model, Op op, const std::vector<double>& decays,
                const std::optional<at::Tensor>& device_decays) {
    return run_if([&] { return prepared_.adopt(ema, model, op); }, op, make_call(decays, {}, -1), device_decays, {});
  }

  bool current() const { return !prepared_.forked() && watched_current(Op::update); }
  int64_t launches() const { return prepared_.launches(); }
  // Whether the model holds an average. The flag is set here, since in Python an interrupt could come between the
  // exchange and setting it.
  bool exchanged() const { return exchanged_; }
  void mark_exchanged() { exchanged_ = true; }
  // The devices on which an exchange needs scratch memory, with the bytes.
  std::vector<std::pair<py::object, int64_t>> scratch_bytes() const {
    std::vector<std::pair<py::object, int64_t>> bytes;
    for (const auto& [device, count] : prepared_.scratch_bytes()) bytes.emplace_back(py::cast(device), count);
    return bytes;
  }

 private:
  bool watched_current(Op op) const { return complete_ && watch_->current() && prepared_.current(op); }

  // A negative `average` means all of them.
  Call make_call(const std::vector<double>& decays, const std::vector<uint64_t>& keys, int average) const {
    Call call;
    call.first = std::max(average, 0);
    call.last = average < 0 ? prepared_.averages() : average + 1;
    const auto wanted = static_cast<size_t>(call.last - call.first);
    if (call.last > prepared_.averages() || decays.size() != wanted || (!keys.empty() && keys.size() != wanted))
      throw py::value_error("expected one decay, and one key or none, for each average that takes part");
    std::copy(decays.begin(), decays.end(), call.decay + call.first);
    std::copy(keys.begin(), keys.end(), call.key + call.first);
    return call;
  }

  // One thread at a time. The interpreter lock is released while waiting for ours, so the two can't deadlock.
  template <class Fits>
  bool run_if(const Fits& fits, Op op, const Call& call, const std::optional<at::Tensor>& device_decays,
              const Tensors& scratch) {
    if (prepared_.forked()) return false;
    // These references keep alive what other threads may replace during the update. They are declared before the lock,
    // so that they end after it: Python may run when a tensor is destroyed.
    Tensors alive;
    std::vector<c10::Storage> storages;
    std::unique_lock<std::mutex> lock(one_at_a_time(), std::try_to_lock);
    if (!lock.owns_lock()) {
      const py::gil_scoped_release unlocked;
      lock.lock();
    }
    if (!fits()) return false;
    const auto stays = [](double decay) { return decay == 1.0; };
    if (is_update(op) && !device_decays && std::all_of(call.decay + call.first, call.decay + call.last, stays))
      return true;
    if (writes_model(op)) check_scratch(scratch);
    if (device_decays && device_decays->numel() < call.last)
      throw py::value_error("device_decays: expected one for each average");
    const at::Tensor on_device = device_decays.value_or(at::Tensor());
    if (prepared_.large()) {
      alive = prepared_.tensors();
      for (auto* dtensors : {&ema_dtensors_, &model_dtensors_})
        for (auto* tensor : *dtensors) alive.push_back(reference(tensor));
      storages = prepared_.storages();
      const py::gil_scoped_release unlocked;
      prepared_.run(op, call, on_device, scratch);
    } else {
      prepared_.run(op, call, on_device, scratch);
    }
    prepared_.bump_versions(op);
    bump_versions(ema_dtensors_);
    if (writes_model(op)) bump_versions(model_dtensors_);
    if (writes_model(op)) exchanged_ = op == Op::swap;
    return true;
  }

  static void bump_versions(const std::vector<at::TensorImpl*>& tensors) {
    for (auto* tensor : tensors)
      if (!tensor->is_inference()) tensor->bump_version();
  }

  void check_scratch(const Tensors& scratch) const {
    for (const auto& [device, bytes] : prepared_.scratch_bytes()) {
      const auto fits = [&, on = device, needed = bytes](const at::Tensor& memory) {
        return memory.device() == on && memory.scalar_type() == at::kByte && memory.numel() >= needed &&
               memory.is_contiguous() && reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % kVectorBytes == 0;
      };
      if (std::none_of(scratch.begin(), scratch.end(), fits))
        throw py::value_error(
            "scratch: expected a contiguous uint8 tensor, aligned to 16 bytes, for each device in scratch_bytes()");
    }
  }

  PreparedPairs prepared_;
  std::shared_ptr<const CompiledWatch> watch_;
  bool complete_ = false;                                       // the watched sources hold every tensor of the plan
  std::vector<at::TensorImpl*> ema_dtensors_, model_dtensors_;  // the tables have their local shards
  bool exchanged_ = false;
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
      .value("update_stochastic", Op::update_stochastic)
      .value("update_finite", Op::update_finite)
      .value("update_stochastic_finite", Op::update_stochastic_finite);
  py::class_<CompiledWatch, std::shared_ptr<CompiledWatch>>(m, "CompiledWatch")
      .def(py::init<const std::vector<py::object>&, const std::vector<py::object>&>(), py::arg("modules"),
           py::arg("containers"))
      .def("current", &CompiledWatch::current)
      .def("values", &CompiledWatch::values);
  py::class_<PyPreparedPairs>(m, "PreparedPairs")
      .def(py::init<const std::vector<std::string>&, const Tensors&, const Tensors&, const std::vector<int>&,
                    std::shared_ptr<const CompiledWatch>, int, const std::vector<int64_t>&>(),
           py::arg("names"), py::arg("ema"), py::arg("model"), py::arg("actions"), py::arg("watch").none(true),
           py::arg("averages"), py::arg("strides"))
      .def("run", &PyPreparedPairs::run, py::arg("op"), py::arg("decays"), py::arg("device_decays") = py::none(),
           py::arg("keys") = std::vector<uint64_t>(), py::arg("average") = -1, py::arg("scratch") = Tensors())
      .def("run_with", &PyPreparedPairs::run_with, py::arg("ema"), py::arg("model"), py::arg("op"), py::arg("decays"),
           py::arg("device_decays") = py::none())
      .def("scratch_bytes", &PyPreparedPairs::scratch_bytes)
      .def("current", &PyPreparedPairs::current)
      .def("exchanged", &PyPreparedPairs::exchanged)
      .def("mark_exchanged", &PyPreparedPairs::mark_exchanged)
      .def("launches", &PyPreparedPairs::launches);
}

}  // namespace
}  // namespace fused_ema
