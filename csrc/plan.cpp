// Torch tensors → tables, whether the tensors still are what they were, and the launches.
#include "plan.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COW.h>
#include <pthread.h>

#include <atomic>
#include <optional>

#include "ema_cpu.h"

#ifdef FUSED_EMA_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ema_cuda.h"
#endif

namespace fused_ema {
namespace {

constexpr int64_t kGrain = 4096;  // pairs: fewer are not worth waking a second thread, which may be busy

// Counts forks, so that a child never touches the locks and device memory of its parent's plans.
std::atomic<uint64_t> fork_count{0};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++fork_count; });

// The address of the first element. As the tensor's own accessors, it makes a copy-on-write storage its own where the
// tensor will be written; unlike them it takes no branch for tensors without elements.
C10_ALWAYS_INLINE const void* data_of(const at::TensorImpl* impl, bool written) {
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const void* base = written ? storage->mutable_data() : storage->data();
  return static_cast<const char*>(base) + impl->storage_offset() * static_cast<int64_t>(impl->itemsize());
}

Type float_type(const Entry& entry, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
    case at::kComplexFloat: return Type::f32;
    case at::kDouble:
    case at::kComplexDouble: return Type::f64;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: TORCH_CHECK(false, "'", entry.name, "': no kernel for ", dtype);
  }
}

Type raw_type(size_t itemsize) {
  return itemsize == 1 ? Type::raw1 : itemsize == 2 ? Type::raw2 : itemsize == 4 ? Type::raw4 : Type::raw8;
}

// Adds an entry to the tables of its device. A complex tensor, and any of 16-byte elements, gets a last dimension of 2.
void add_entry(Tables& tables, const Entry& entry, int averages, int64_t number, bool with_tiles) {
  const at::Tensor &ema = entry.ema, &model = entry.model;
  const bool in_reach = ema.device() == model.device() || (model.is_cuda() && ema.device().is_cpu() && ema.is_pinned());
  TORCH_CHECK(ema.sizes() == model.sizes() && in_reach && ema.is_complex() == model.is_complex(), "'", entry.name,
              "': sizes, devices and kinds must agree");
  Pair pair{};
  pair.ema = ema.mutable_data_ptr();
  pair.model = const_cast<void*>(model.const_data_ptr());
  pair.average = entry.action == Action::average;
  const bool doubled = ema.is_complex();
  if (!pair.average && ema.scalar_type() == model.scalar_type()) {
    pair.ema_type = pair.model_type = raw_type(ema.element_size() / (doubled ? 2 : 1));
  } else {
    pair.ema_type = float_type(entry, ema.scalar_type());
    pair.model_type = float_type(entry, model.scalar_type());
  }
  std::vector<int64_t> sizes(ema.sizes().begin(), ema.sizes().end());
  std::vector<int64_t> ema_strides(ema.strides().begin(), ema.strides().end());
  std::vector<int64_t> model_strides(model.strides().begin(), model.strides().end());
  if (doubled) {
    for (auto& stride : ema_strides) stride *= 2;
    for (auto& stride : model_strides) stride *= 2;
    sizes.push_back(2);
    ema_strides.push_back(1);
    model_strides.push_back(1);
  }
  pair.dims = static_cast<int>(sizes.size());
  pair.sizes = sizes.data();
  pair.ema_strides = ema_strides.data();
  pair.model_strides = model_strides.data();
  pair.next_average = entry.next_average * (doubled ? 2 : 1);
  pair.number = number * 2;
  if (averages > 1) {
    int64_t extent = 1;
    for (int64_t d = 0; d < ema.dim(); ++d) extent += (ema.size(d) - 1) * ema.stride(d);
    const int64_t last = ema.storage_offset() + (averages - 1) * entry.next_average + extent;
    TORCH_CHECK(entry.next_average >= extent && entry.next_average * ema.element_size() % kVectorBytes == 0 &&
                    last * static_cast<int64_t>(ema.element_size()) <= static_cast<int64_t>(ema.storage().nbytes()),
                "'", entry.name, "': no room for ", averages, " averages ", entry.next_average, " elements apart");
  }
  TORCH_CHECK(add_pair(tables, pair, with_tiles), "ema", entry.name, ": expected at most ", kMaxDims,
              " dimensions that cannot be merged, found more");
}

}  // namespace

struct DeviceTables {
  explicit DeviceTables(c10::Device on) : device(on) {}

  c10::Device device;
  Tables tables;

#ifdef FUSED_EMA_CUDA
  c10::DataPtr memory;
  std::optional<c10::cuda::CUDAStream> owner;  // whose order the memory's reuse follows
  Launch launch{};
  bool captured = false;

  // A graph reads the tables at each replay, and nothing says when it ends: what was captured stays for good.
  ~DeviceTables() {
    if (captured) (void)memory.release_context();
  }

  static bool capturing() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  // One allocation, one copy. Waiting for the copy here, where plans are made, is what lets every later launch, on any
  // stream and inside a graph capture, read the tables without an event.
  void upload(int averages) {
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    TORCH_CHECK(
        !capturing(),
        "fused_ema: expected the tensors that were bound or updated before this CUDA graph capture began, found "
        "new or moved ones on ",
        device, ", whose addresses can't be uploaded during a capture");
    owner = stream;
    const size_t rows = tables.rows.size() * sizeof(Row), layouts = tables.layouts.size() * sizeof(Layout),
                 tiles = tables.tiles.size() * sizeof(Tile);
    std::vector<char> staging(rows + layouts + tiles);
    std::memcpy(staging.data(), tables.rows.data(), rows);
    if (layouts) std::memcpy(staging.data() + rows, tables.layouts.data(), layouts);
    std::memcpy(staging.data() + rows + layouts, tables.tiles.data(), tiles);
    memory = c10::cuda::CUDACachingAllocator::get()->allocate(staging.size());
    C10_CUDA_CHECK(cudaMemcpyAsync(memory.get(), staging.data(), staging.size(), cudaMemcpyHostToDevice, stream));
    c10::cuda::stream_synchronize(stream);
    C10_CUDA_CHECK(load_cuda_kernels());
    const char* base = static_cast<const char*>(memory.get());
    launch.rows = reinterpret_cast<const Row*>(base);
    launch.layouts = reinterpret_cast<const Layout*>(base + rows);
    launch.tiles = reinterpret_cast<const Tile*>(base + rows + layouts);
    launch.tile_count = static_cast<int64_t>(tables.tiles.size());
    TORCH_CHECK(launch.tile_count * averages < (int64_t(1) << 31), "too many elements for one launch on ", device);
    tables.tiles = {};
  }

  void run(Op op, const Call& call) {
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    captured |= capturing();
    if (stream != *owner) c10::cuda::CUDACachingAllocator::recordStream(memory, stream);
    Launch now = launch;
    now.call = call;
    C10_CUDA_CHECK(launch_cuda(op, now, stream));
  }
#else
  void upload(int) { TORCH_CHECK(false, "this build of fused_ema has no CUDA kernels"); }
  void run(Op, const Call&) {}
#endif
};

void Snapshot::add(const at::TensorImpl* impl, bool written) {
  const auto sizes = impl->sizes(), strides = impl->strides();
  seen_.push_back(Seen{impl->unsafe_storage().unsafeGetStorageImpl(), data_of(impl, written), impl->storage().nbytes(),
                       impl->key_set(), c10::typeMetaToScalarType(impl->dtype()), static_cast<uint32_t>(sizes.size()),
                       shapes_.size()});
  shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
  shapes_.insert(shapes_.end(), strides.begin(), strides.end());
}

C10_ALWAYS_INLINE bool Snapshot::Cursor::next_matches(const at::TensorImpl* impl, bool written) {
  const Seen& seen = *seen_++;
  if (impl->key_set() != seen.keys) return false;  // first: other kinds of tensors may have no storage to look at
  // data_of() would make a copy, here on one of several threads that may share the storage: a new plan does it on one.
  if (written && c10::impl::cow::is_cow_data_ptr(impl->unsafe_storage().data_ptr())) return false;
  const auto sizes = impl->sizes(), strides = impl->strides();
  if (impl->dtype() != seen.dtype || sizes.size() != seen.dims || data_of(impl, written) != seen.data ||
      impl->unsafe_storage().unsafeGetStorageImpl()->nbytes() != seen.storage_bytes)
    return false;
  for (uint32_t d = 0; d < seen.dims; ++d)
    if (sizes[d] != shape_[d] || strides[d] != shape_[seen.dims + d]) return false;
  shape_ += 2 * seen.dims;
  return true;
}

Plan::Plan(std::vector<Entry> entries, int averages) : averages_(averages), fork_generation_(fork_count) {
  TORCH_CHECK(averages >= 1 && averages <= kMaxAverages, "expected 1 to ", kMaxAverages, " averages, found ", averages);
  int64_t number = 0;
  for (const auto& entry : entries) {
    entries_.push_back(
        {entry.ema.unsafeGetTensorImpl(), entry.model.unsafeGetTensorImpl(), entry.action != Action::none});
    snapshot_.add(entries_.back().ema, true);
    snapshot_.add(entries_.back().model, false);
    inference_ema_ |= entry.ema.is_inference();
    inference_model_ |= entry.model.is_inference();
    if (entry.action == Action::none) continue;
    const auto device = entry.model.device();  // which reaches into pinned averages of the host
    auto found = std::find_if(devices_.begin(), devices_.end(), [&](auto& d) { return d->device == device; });
    if (found == devices_.end()) {
      devices_.push_back(std::make_unique<DeviceTables>(device));
      found = devices_.end() - 1;
    }
    add_entry((*found)->tables, entry, averages, number, !device.is_cpu());
    number += entry.ema.numel();
  }
  // Launches are asynchronous: they go out before the CPU's share is worked off.
  std::stable_partition(devices_.begin(), devices_.end(), [](auto& d) { return !d->device.is_cpu(); });
  for (auto& device : devices_)
    if (!device->device.is_cpu()) device->upload(averages);
}

// In a forked child the memory of the tables is not ours to free: that would call CUDA, which is not there.
Plan::~Plan() {
  if (forked())
    for (auto& device : devices_) (void)device.release();
}

bool Plan::forked() const { return fork_generation_ != fork_count; }

bool Plan::writable(Op op) const {
  return c10::InferenceMode::is_enabled() || !(inference_ema_ || (writes_model(op) && inference_model_));
}

bool Plan::current(Op op) const {
  std::atomic<bool> same{true};
  at::parallel_for(0, static_cast<int64_t>(entries_.size()), kGrain, [&](int64_t begin, int64_t end) {
    if (!current(op, static_cast<size_t>(begin), static_cast<size_t>(end))) same = false;
  });
  return same && writable(op);
}

bool Plan::current(Op op, size_t begin, size_t end) const {
  constexpr size_t kAhead = 12;
  Snapshot::Cursor at(snapshot_, 2 * begin);
  for (size_t i = begin; i < end; ++i) {
    const Watched& entry = entries_[i];
    if (i + kAhead < end) {
      prefetch(entries_[i + kAhead].ema, sizeof(at::TensorImpl));
      prefetch(entries_[i + kAhead].model, sizeof(at::TensorImpl));
      at.prefetch_storages(kAhead);
    }
    if (!at.next_matches(entry.ema, true) || !at.next_matches(entry.model, writes_model(op))) return false;
    // The counter that bump_versions() will raise: this class holds nothing but the pointer to it.
    static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
    prefetch(*reinterpret_cast<void* const*>(&entry.ema->version_counter()), 1);
  }
  return true;
}

bool Plan::adopt(const Tensors& ema, const Tensors& model, Op op) {
  if (ema.size() != entries_.size() || model.size() != entries_.size()) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {
    entries_[i].ema = ema[i].unsafeGetTensorImpl();
    entries_[i].model = model[i].unsafeGetTensorImpl();
  }
  return current(op);
}

void Plan::run(Op op, Call call, const at::Tensor& device_decay, const Tensors& aside) {
  if (device_decay.defined()) {
    call.device_decay = device_decay.const_data_ptr();
    call.device_decay_is_f64 = device_decay.scalar_type() == at::kDouble;
  }
  for (auto& device : devices_) {
    call.aside = nullptr;
    for (const auto& memory : aside)
      if (memory.device() == device->device) call.aside = static_cast<char*>(memory.mutable_data_ptr());
    if (device->device.is_cpu()) {
      run_cpu(op, device->tables, call);
    } else {
      device->run(op, call);
    }
  }
}

std::vector<std::pair<c10::Device, int64_t>> Plan::aside_bytes() const {
  std::vector<std::pair<c10::Device, int64_t>> bytes;
  for (const auto& device : devices_)
    if (device->tables.aside_bytes) bytes.emplace_back(device->device, device->tables.aside_bytes);
  return bytes;
}

void Plan::bump_versions(Op op) const {
  const auto bump = [](at::TensorImpl* tensor) {
    if (!tensor->is_inference()) tensor->bump_version();
  };
  at::parallel_for(0, static_cast<int64_t>(entries_.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& entry = entries_[static_cast<size_t>(i)];
      if (!entry.active) continue;
      bump(entry.ema);
      if (writes_model(op)) bump(entry.model);
    }
  });
}

bool Plan::large() const {
  constexpr int64_t kLarge = int64_t(1) << 20;  // elements: about a millisecond
  return !devices_.empty() && devices_.back()->device.is_cpu() && devices_.back()->tables.elements >= kLarge;
}

Tensors Plan::tensors() const {
  Tensors tensors;
  tensors.reserve(2 * entries_.size());
  for (const auto& entry : entries_)
    for (auto* impl : {entry.ema, entry.model}) tensors.push_back(reference(impl));
  return tensors;
}

std::vector<c10::Storage> Plan::storages() const {
  std::vector<c10::Storage> storages;
  storages.reserve(2 * entries_.size());
  for (const auto& entry : entries_) {
    storages.push_back(entry.ema->storage());
    storages.push_back(entry.model->storage());
  }
  return storages;
}

bool cuda_built() {
#ifdef FUSED_EMA_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace fused_ema
