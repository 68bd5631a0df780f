// The classes `PreparedPairs` and `CompiledWatch` of fused_ema._C.
#include <pthread.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "ema_cpu.h"
#include "plan.h"
#include "sum_cpu.h"
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
                  const std::vector<int>& actions, std::shared_ptr<CompiledWatch> watch, int averages,
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

  // The pairs that others have replaced or moved since, in kind, shape and strides what they were: numbers, averages,
  // tensors of the model; the slots that hold other tensors; whether some of these belong to no pair. Nullopt if
  // anything else has changed. `ema` and `model` are given if the sources are not watched.
  using Changed = std::tuple<std::vector<size_t>, Tensors, Tensors, CompiledWatch::Slots, bool>;
  std::optional<Changed> changed(const std::optional<Tensors>& ema, const std::optional<Tensors>& model) {
    if (prepared_.forked() || !ema_dtensors_.empty() || !model_dtensors_.empty()) return std::nullopt;
    CompiledWatch::Slots slots;
    std::vector<at::TensorImpl*> now = prepared_.objects();
    bool others = false;
    if (ema && model) {
      if (ema->size() != model->size()) return std::nullopt;
      now.clear();
      for (size_t i = 0; i < ema->size(); ++i)
        for (auto* side : {&*ema, &*model}) now.push_back((*side)[i].unsafeGetTensorImpl());
    } else {
      auto found = complete_ ? watch_->changed() : std::nullopt;
      if (!found) return std::nullopt;
      slots = std::move(*found);
      for (const auto& [slot, value] : slots) {
        const int64_t place = place_of(slot);
        if (place == kTied) return std::nullopt;
        if (place == kNoPair) others = true;
        if (place >= 0) now[static_cast<size_t>(place)] = THPVariable_Unpack(value.ptr()).unsafeGetTensorImpl();
      }
    }
    auto numbers = prepared_.changed(now);
    if (!numbers) return std::nullopt;
    Tensors averages, tensors;
    for (size_t i : *numbers) {
      averages.push_back(reference(now[2 * i]));
      tensors.push_back(reference(now[2 * i + 1]));
    }
    return Changed(std::move(*numbers), std::move(averages), std::move(tensors), std::move(slots), others);
  }
  // Takes in what changed() found. Returns false, with nothing changed, if that needs other tables.
  bool patch(const std::vector<size_t>& numbers, const Tensors& ema, const Tensors& model,
             const CompiledWatch::Slots& slots) {
    const auto lock = lock_all();
    if (prepared_.forked() || !prepared_.patch(numbers, ema, model)) return false;
    if (watch_) watch_->adopt(slots);
    return true;
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

  // The interpreter lock is released while waiting for ours, so the two can't deadlock.
  static std::unique_lock<std::mutex> lock_all() {
    std::unique_lock<std::mutex> lock(one_at_a_time(), std::try_to_lock);
    if (!lock.owns_lock()) {
      const py::gil_scoped_release unlocked;
      lock.lock();
    }
    return lock;
  }

  // Which object of the pairs a slot holds, as objects() counts them. It is worked out when the first slot has changed.
  int64_t place_of(size_t slot) {
    if (places_.empty()) {
      std::unordered_map<const at::TensorImpl*, int64_t> numbers, slots;
      const auto objects = prepared_.objects(), held = watch_->tensors();
      for (size_t i = 0; i < objects.size(); ++i)
        if (!numbers.emplace(objects[i], i).second) numbers[objects[i]] = kTied;
      for (auto* tensor : held) ++slots[tensor];
      std::vector<int64_t> places;
      for (auto* tensor : held) {
        const auto found = tensor ? numbers.find(tensor) : numbers.end();
        places.push_back(found == numbers.end() ? kNoPair : slots[tensor] > 1 ? kTied : found->second);
      }
      places_ = std::move(places);
    }
    return places_[slot];
  }

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

  // One thread at a time.
  template <class Fits>
  bool run_if(const Fits& fits, Op op, const Call& call, const std::optional<at::Tensor>& device_decays,
              const Tensors& scratch) {
    if (prepared_.forked()) return false;
    // These references keep alive what other threads may replace during the update. They are declared before the lock,
    // so that they end after it: Python may run when a tensor is destroyed.
    Tensors alive;
    std::vector<c10::Storage> storages;
    const auto lock = lock_all();
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
    const auto fits = [](const at::Tensor& memory, const std::pair<c10::Device, int64_t>& needed) {
      const auto& [device, bytes] = needed;
      return (memory.device() == device || (device.is_cuda() && memory.is_cpu() && memory.is_pinned())) &&
             memory.scalar_type() == at::kByte && memory.numel() >= bytes && memory.is_contiguous() &&
             reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % kVectorBytes == 0;
    };
    const auto needed = prepared_.scratch_bytes();
    if (!std::equal(scratch.begin(), scratch.end(), needed.begin(), needed.end(), fits))
      throw py::value_error(
          "scratch: expected a contiguous uint8 tensor, aligned to 16 bytes, for each device in scratch_bytes()");
  }

  PreparedPairs prepared_;
  std::shared_ptr<CompiledWatch> watch_;
  static constexpr int64_t kNoPair = -1, kTied = -2;
  std::vector<int64_t> places_;                                 // of each slot; see place_of()
  bool complete_ = false;                                       // the watched sources hold every tensor of the plan
  std::vector<at::TensorImpl*> ema_dtensors_, model_dtensors_;  // the tables have their local shards
  bool exchanged_ = false;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of fused_ema: see csrc/.";
  m.attr("cuda_built") = cuda_built();
  m.def("_set_grain", &set_grain, py::arg("elements"));
  m.def("add_weighted", &add_weighted, py::arg("total"), py::arg("part"), py::arg("weight"), py::arg("first"),
        py::call_guard<py::gil_scoped_release>());
  m.def("round_sum", &round_sum, py::arg("total"), py::arg("out"), py::call_guard<py::gil_scoped_release>());
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
      .def("values", &CompiledWatch::values)
      .def("changed", &CompiledWatch::changed_values)
      .def("adopt", &CompiledWatch::adopt, py::arg("changed"));
  py::class_<PyPreparedPairs>(m, "PreparedPairs")
      .def(py::init<const std::vector<std::string>&, const Tensors&, const Tensors&, const std::vector<int>&,
                    std::shared_ptr<CompiledWatch>, int, const std::vector<int64_t>&>(),
           py::arg("names"), py::arg("ema"), py::arg("model"), py::arg("actions"), py::arg("watch").none(true),
           py::arg("averages"), py::arg("strides"))
      .def("run", &PyPreparedPairs::run, py::arg("op"), py::arg("decays"), py::arg("device_decays") = py::none(),
           py::arg("keys") = std::vector<uint64_t>(), py::arg("average") = -1, py::arg("scratch") = Tensors())
      .def("run_with", &PyPreparedPairs::run_with, py::arg("ema"), py::arg("model"), py::arg("op"), py::arg("decays"),
           py::arg("device_decays") = py::none())
      .def("changed", &PyPreparedPairs::changed, py::arg("ema") = py::none(), py::arg("model") = py::none())
      .def("patch", &PyPreparedPairs::patch, py::arg("numbers"), py::arg("ema"), py::arg("model"), py::arg("slots"))
      .def("scratch_bytes", &PyPreparedPairs::scratch_bytes)
      .def("current", &PyPreparedPairs::current)
      .def("exchanged", &PyPreparedPairs::exchanged)
      .def("mark_exchanged", &PyPreparedPairs::mark_exchanged)
      .def("launches", &PyPreparedPairs::launches);
}

}  // namespace
}  // namespace fused_ema
