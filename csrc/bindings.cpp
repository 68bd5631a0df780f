// The classes `Plan` and `Watch` of fused_ema._C.
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
         const std::vector<int>& actions, std::shared_ptr<const Watch> watch, int averages,
         const std::vector<int64_t>& next_averages)
      : plan_(make_entries(names, ema, model, actions, next_averages), averages), watch_(std::move(watch)) {
    if (!watch_) return;
    complete_ = watch_->holds(ema) && watch_->holds(model);
    sharded_ema_ = watch_->whole_of(ema), sharded_model_ = watch_->whole_of(model);
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
  bool watched_current(Op op) const { return complete_ && watch_->current() && plan_.current(op); }

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
    // Of what other threads may replace meanwhile. They end after the lock, since Python may run where they do.
    Tensors alive;
    std::vector<c10::Storage> storages;
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
      alive = plan_.tensors();
      for (auto* whole : {&sharded_ema_, &sharded_model_})
        for (auto* tensor : *whole) alive.push_back(reference(tensor));
      storages = plan_.storages();
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
  std::shared_ptr<const Watch> watch_;
  bool complete_ = false;                                     // what is watched holds every tensor of the plan
  std::vector<at::TensorImpl*> sharded_ema_, sharded_model_;  // the tables know their shards
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
      .value("update_stochastic", Op::update_stochastic);
  py::class_<Watch, std::shared_ptr<Watch>>(m, "Watch")
      .def(py::init<const std::vector<py::object>&, const std::vector<py::object>&>(), py::arg("modules"),
           py::arg("containers"));
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<const std::vector<std::string>&, const Tensors&, const Tensors&, const std::vector<int>&,
                    std::shared_ptr<const Watch>, int, const std::vector<int64_t>&>(),
           py::arg("names"), py::arg("ema"), py::arg("model"), py::arg("actions"), py::arg("watch").none(true),
           py::arg("averages"), py::arg("next_averages"))
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
