// Builds tables from torch tensors, compares the tensors with their records, and launches.
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

constexpr int64_t kGrain = 4096;  // pairs; fewer are not worth waking a second thread

// Counts forks, so that a child process never touches the device memory of its parent.
std::atomic<uint64_t> fork_count{0};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++fork_count; });

// The address of the first element. Like the tensor's own accessors it copies a copy-on-write storage before the tensor
// is written; unlike them it has no branch for tensors without elements.
C10_ALWAYS_INLINE const void* data_of(const at::TensorImpl* tensor, bool written) {
  auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  const void* base = written ? storage->mutable_data() : storage->data();
  return static_cast<const char*>(base) + tensor->storage_offset() * static_cast<int64_t>(tensor->itemsize());
}

Type float_type(const Entry& entry, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
    case at::kComplexFloat: return Type::f32;
    case at::kDouble:
    case at::kComplexDouble: return Type::f64;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: TORCH_CHECK(false, "ema", entry.name, ": there is no kernel for ", dtype);
  }
}

Type raw_type(size_t itemsize) {
  return itemsize == 1 ? Type::raw1 : itemsize == 2 ? Type::raw2 : itemsize == 4 ? Type::raw4 : Type::raw8;
}

// Whether a kernel on the model's device can use the average.
bool reachable(const at::Tensor& ema, const at::Tensor& model) {
  return ema.device() == model.device() || (model.is_cuda() && ema.device().is_cpu() && ema.is_pinned());
}

// Adds an entry to the tables of its device. A complex tensor becomes a real one with a last dimension of 2.
void add_entry(Tables& tables, const Entry& entry, int averages, int64_t number, bool with_tiles) {
  const at::Tensor &ema = entry.ema, &model = entry.model;
  TORCH_CHECK(ema.sizes() == model.sizes() && reachable(ema, model) && ema.is_complex() == model.is_complex(), "ema",
              entry.name, ": expected the shape, the device and the kind (real or complex) of model, ", model.sizes(),
              " on ", model.device(), " in ", model.scalar_type(), ", found ", ema.sizes(), " on ", ema.device(),
              " in ", ema.scalar_type());
  Pair pair{};
  pair.ema = ema.mutable_data_ptr();
  pair.model = const_cast<void*>(model.const_data_ptr());
  pair.average = entry.action == Action::average;
  const bool complex = ema.is_complex();
  if (!pair.average && ema.scalar_type() == model.scalar_type()) {
    pair.ema_type = pair.model_type = raw_type(ema.element_size() / (complex ? 2 : 1));
  } else {
    pair.ema_type = float_type(entry, ema.scalar_type());
    pair.model_type = float_type(entry, model.scalar_type());
  }
  std::vector<int64_t> sizes(ema.sizes().begin(), ema.sizes().end());
  std::vector<int64_t> ema_strides(ema.strides().begin(), ema.strides().end());
  std::vector<int64_t> model_strides(model.strides().begin(), model.strides().end());
  if (complex) {
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
  pair.stride = entry.stride * (complex ? 2 : 1);
  pair.number = number * 2;
  if (averages > 1) {
    int64_t extent = 1;
    for (int64_t d = 0; d < ema.dim(); ++d) extent += (ema.size(d) - 1) * ema.stride(d);
    const int64_t last = ema.storage_offset() + (averages - 1) * entry.stride + extent;
    TORCH_CHECK(entry.stride >= extent && entry.stride * ema.element_size() % kVectorBytes == 0 &&
                    last * static_cast<int64_t>(ema.element_size()) <= static_cast<int64_t>(ema.storage().nbytes()),
                "ema", entry.name, ": ", averages, " averages with a stride of ", entry.stride,
                " elements do not fit a storage of ", ema.storage().nbytes(), " bytes");
  }
  TORCH_CHECK(add_pair(tables, pair, with_tiles), "ema", entry.name, ": expected at most ", kMaxDims,
              " dimensions after merging those without gaps, found more");
}

}  // namespace

struct DeviceTables {
  explicit DeviceTables(c10::Device on) : device(on) {}

  c10::Device device;
  Tables tables;

#ifdef FUSED_EMA_CUDA
  c10::DataPtr memory;
  std::optional<c10::cuda::CUDAStream> owner;  // the stream that `memory` was allocated on
  Launch launch{};
  bool captured = false;

  // A captured graph reads the tables at each replay, and nothing tells when it is destroyed, so they are never freed.
  ~DeviceTables() {
    if (captured) (void)memory.release_context();
  }

  static bool capturing() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  // One allocation, one copy. It waits for the copy, so that every later launch, on any stream and inside a graph
  // capture, can read the tables without an event.
  void upload(int averages) {
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    TORCH_CHECK(
        !capturing(), "fused_ema: the addresses of new or replaced tensors on ", device,
        " can't be uploaded during a CUDA graph capture. Update them once before the capture, or call prepare() "
        "on what bind() returned");
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
    point();
    launch.tile_count = static_cast<int64_t>(tables.tiles.size());
    TORCH_CHECK(launch.tile_count * averages < (int64_t(1) << 31), "fused_ema: expected fewer than 2^31 blocks on ",
                device, ", found ", launch.tile_count * averages);
    tables.tiles = {};
  }

  void point() {
    const char* base = static_cast<const char*>(memory.get());
    const size_t rows = tables.rows.size() * sizeof(Row), layouts = tables.layouts.size() * sizeof(Layout);
    launch.rows = reinterpret_cast<const Row*>(base);
    launch.layouts = reinterpret_cast<const Layout*>(base + rows);
    launch.tiles = reinterpret_cast<const Tile*>(base + rows + layouts);
  }

  // Goes on with a copy in which some rows are others, since launches under way and captured graphs read the present
  // tables. It waits as upload() does. Returns false during a capture: a new plan says what to do.
  bool replace(const std::vector<std::pair<size_t, Row>>& changed) {
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    if (capturing()) return false;
    const size_t bytes = tables.rows.size() * sizeof(Row) + tables.layouts.size() * sizeof(Layout) +
                         static_cast<size_t>(launch.tile_count) * sizeof(Tile);
    c10::DataPtr copy = c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
    if (stream != *owner) c10::cuda::CUDACachingAllocator::recordStream(memory, stream);
    C10_CUDA_CHECK(cudaMemcpyAsync(copy.get(), memory.get(), bytes, cudaMemcpyDeviceToDevice, stream));
    for (const auto& [number, row] : changed)
      C10_CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(copy.get()) + number * sizeof(Row), &row, sizeof(Row),
                                     cudaMemcpyHostToDevice, stream));
    c10::cuda::stream_synchronize(stream);
    if (captured) (void)memory.release_context();
    captured = false;
    memory = std::move(copy);
    owner = stream;
    point();
    return true;
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
  bool replace(const std::vector<std::pair<size_t, Row>>&) { return false; }
  void run(Op, const Call&) {}
#endif
};

void TensorRecords::add(const at::TensorImpl* tensor, bool written) {
  const auto sizes = tensor->sizes(), strides = tensor->strides();
  records_.push_back(TensorRecord{tensor->unsafe_storage().unsafeGetStorageImpl(), data_of(tensor, written),
                                  tensor->storage().nbytes(), tensor->key_set(),
                                  c10::typeMetaToScalarType(tensor->dtype()), static_cast<uint32_t>(sizes.size()),
                                  shapes_.size()});
  shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
  shapes_.insert(shapes_.end(), strides.begin(), strides.end());
}

C10_ALWAYS_INLINE bool TensorRecords::alike(const TensorRecord& record, const int64_t* shape,
                                            const at::TensorImpl* tensor) {
  if (tensor->key_set() != record.keys) return false;  // compared first: other kinds of tensors may have no storage
  const auto sizes = tensor->sizes(), strides = tensor->strides();
  if (tensor->dtype() != record.dtype || sizes.size() != record.dims) return false;
  for (uint32_t d = 0; d < record.dims; ++d)
    if (sizes[d] != shape[d] || strides[d] != shape[record.dims + d]) return false;
  return true;
}

C10_ALWAYS_INLINE bool TensorRecords::Cursor::next_matches(const at::TensorImpl* tensor, bool written) {
  const TensorRecord& record = *record_++;
  if (!alike(record, shape_, tensor)) return false;
  // data_of() would copy the storage, and several threads may be here with tensors that share it. A new plan copies it
  // on one thread.
  if (written && c10::impl::cow::is_cow_data_ptr(tensor->unsafe_storage().data_ptr())) return false;
  if (data_of(tensor, written) != record.data ||
      tensor->unsafe_storage().unsafeGetStorageImpl()->nbytes() != record.storage_bytes)
    return false;
  shape_ += 2 * record.dims;
  return true;
}

bool TensorRecords::alike(size_t number, const at::TensorImpl* tensor) const {
  return alike(records_[number], shapes_.data() + records_[number].shape, tensor);
}

void TensorRecords::replace(size_t number, const at::TensorImpl* tensor, bool written) {
  TensorRecord& record = records_[number];
  record.storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  record.data = data_of(tensor, written);
  record.storage_bytes = tensor->unsafe_storage().unsafeGetStorageImpl()->nbytes();
}

PreparedPairs::PreparedPairs(std::vector<Entry> entries, int averages)
    : averages_(averages), fork_generation_(fork_count) {
  TORCH_CHECK(averages >= 1 && averages <= kMaxAverages, "fused_ema: expected 1 to ", kMaxAverages, " averages, found ",
              averages);
  int64_t number = 0;
  for (const auto& entry : entries) {
    pairs_.push_back(
        {entry.ema.unsafeGetTensorImpl(), entry.model.unsafeGetTensorImpl(), entry.action != Action::none, 0, -1});
    records_.add(pairs_.back().ema, true);
    records_.add(pairs_.back().model, false);
    inference_ema_ |= entry.ema.is_inference();
    inference_model_ |= entry.model.is_inference();
    if (entry.action == Action::none) continue;
    const auto device = entry.model.device();  // the average may be in pinned host memory, which the device can reach
    auto found = std::find_if(devices_.begin(), devices_.end(), [&](auto& d) { return d->device == device; });
    if (found == devices_.end()) {
      devices_.push_back(std::make_unique<DeviceTables>(device));
      found = devices_.end() - 1;
    }
    add_entry((*found)->tables, entry, averages, number, !device.is_cpu());
    number += entry.ema.numel();
    if (entry.ema.numel()) pairs_.back().row = static_cast<int32_t>((*found)->tables.rows.size()) - 1;
  }
  // Launches are asynchronous, so they come before the CPU's part.
  std::stable_partition(devices_.begin(), devices_.end(), [](auto& d) { return !d->device.is_cpu(); });
  for (size_t i = 0; i < entries.size(); ++i)
    while (pairs_[i].row >= 0 && devices_[pairs_[i].device]->device != entries[i].model.device()) ++pairs_[i].device;
  for (auto& device : devices_)
    if (!device->device.is_cpu()) device->upload(averages);
}

// A forked child does not free the tables: that would call CUDA, which does not work there.
PreparedPairs::~PreparedPairs() {
  if (forked())
    for (auto& device : devices_) (void)device.release();
}

bool PreparedPairs::forked() const { return fork_generation_ != fork_count; }

bool PreparedPairs::writable(Op op) const {
  return c10::InferenceMode::is_enabled() || !(inference_ema_ || (writes_model(op) && inference_model_));
}

bool PreparedPairs::current(Op op) const {
  std::atomic<bool> same{true};
  at::parallel_for(0, static_cast<int64_t>(pairs_.size()), kGrain, [&](int64_t begin, int64_t end) {
    if (!current(op, static_cast<size_t>(begin), static_cast<size_t>(end))) same = false;
  });
  return same && writable(op);
}

bool PreparedPairs::current(Op op, size_t begin, size_t end) const {
  constexpr size_t kAhead = 12;
  TensorRecords::Cursor at(records_, 2 * begin);
  for (size_t i = begin; i < end; ++i) {
    const TensorPair& pair = pairs_[i];
    if (i + kAhead < end) {
      prefetch(pairs_[i + kAhead].ema, sizeof(at::TensorImpl));
      prefetch(pairs_[i + kAhead].model, sizeof(at::TensorImpl));
      at.prefetch_storages(kAhead);
    }
    if (!at.next_matches(pair.ema, true) || !at.next_matches(pair.model, writes_model(op))) return false;
  }
  return true;
}

bool PreparedPairs::adopt(const Tensors& ema, const Tensors& model, Op op) {
  if (ema.size() != pairs_.size() || model.size() != pairs_.size()) return false;
  for (size_t i = 0; i < pairs_.size(); ++i) {
    pairs_[i].ema = ema[i].unsafeGetTensorImpl();
    pairs_[i].model = model[i].unsafeGetTensorImpl();
  }
  return current(op);
}

std::vector<at::TensorImpl*> PreparedPairs::objects() const {
  std::vector<at::TensorImpl*> objects;
  objects.reserve(2 * pairs_.size());
  for (const auto& pair : pairs_) objects.insert(objects.end(), {pair.ema, pair.model});
  return objects;
}

std::optional<std::vector<size_t>> PreparedPairs::changed(const std::vector<at::TensorImpl*>& now) const {
  if (pairs_.empty() || now.size() != 2 * pairs_.size()) return std::nullopt;
  std::vector<size_t> found;
  TensorRecords::Cursor at(records_, 0);
  for (size_t i = 0; i < pairs_.size(); ++i) {
    const bool same = at.next_matches(now[2 * i], true) && at.next_matches(now[2 * i + 1], false);
    if (!same && i + 1 < pairs_.size()) at = TensorRecords::Cursor(records_, 2 * (i + 1));
    if (same && now[2 * i] == pairs_[i].ema && now[2 * i + 1] == pairs_[i].model) continue;
    if (!records_.alike(2 * i, now[2 * i]) || !records_.alike(2 * i + 1, now[2 * i + 1])) return std::nullopt;
    found.push_back(i);
  }
  return found;
}

bool PreparedPairs::patch(const std::vector<size_t>& numbers, const Tensors& ema, const Tensors& model) {
  if (ema.size() != numbers.size() || model.size() != numbers.size()) return false;
  std::vector<Row> rows;
  DeviceTables* uploaded = nullptr;
  for (size_t k = 0; k < numbers.size(); ++k) {
    const size_t i = numbers[k];
    if (i >= pairs_.size() || pairs_[i].row < 0 || !reachable(ema[k], model[k])) return false;
    const auto *e = ema[k].unsafeGetTensorImpl(), *p = model[k].unsafeGetTensorImpl();
    if (!records_.alike(2 * i, e) || !records_.alike(2 * i + 1, p)) return false;
    if (averages_ > 1 && !TensorRecords::Cursor(records_, 2 * i).next_matches(e, true)) return false;
    DeviceTables& device = *devices_[pairs_[i].device];
    if (model[k].device() != device.device) return false;
    const Row& before = device.tables.rows[static_cast<size_t>(pairs_[i].row)];
    rows.push_back(before);
    set_addresses(rows.back(), const_cast<void*>(data_of(e, true)), const_cast<void*>(data_of(p, false)));
    if (rows.back().misaligned != before.misaligned) return false;  // it would have other tiles
    if (device.device.is_cpu()) continue;
    if (uploaded && uploaded != &device) return false;  // one upload could fail after another
    uploaded = &device;
  }
  if (uploaded) {
    std::vector<std::pair<size_t, Row>> changed;
    for (size_t k = 0; k < numbers.size(); ++k)
      if (devices_[pairs_[numbers[k]].device].get() == uploaded) changed.emplace_back(pairs_[numbers[k]].row, rows[k]);
    if (!uploaded->replace(changed)) return false;
  }
  for (size_t k = 0; k < numbers.size(); ++k) {  // nothing from here on throws
    TensorPair& pair = pairs_[numbers[k]];
    pair.ema = ema[k].unsafeGetTensorImpl();
    pair.model = model[k].unsafeGetTensorImpl();
    records_.replace(2 * numbers[k], pair.ema, true);
    records_.replace(2 * numbers[k] + 1, pair.model, false);
    devices_[pair.device]->tables.rows[static_cast<size_t>(pair.row)] = rows[k];
  }
  return true;
}

void PreparedPairs::run(Op op, Call call, const at::Tensor& device_decays, const Tensors& scratch) {
  if (device_decays.defined()) {
    call.device_decay = device_decays.const_data_ptr();
    call.device_decay_is_f64 = device_decays.scalar_type() == at::kDouble;
  }
  auto memory = scratch.begin();
  for (auto& device : devices_) {
    const bool waits = device->tables.scratch_bytes && memory != scratch.end();
    call.scratch = waits ? static_cast<char*>((memory++)->mutable_data_ptr()) : nullptr;
    if (device->device.is_cpu()) {
      run_cpu(op, device->tables, call);
    } else {
      device->run(op, call);
    }
  }
}

std::vector<std::pair<c10::Device, int64_t>> PreparedPairs::scratch_bytes() const {
  std::vector<std::pair<c10::Device, int64_t>> bytes;
  for (const auto& device : devices_)
    if (device->tables.scratch_bytes) bytes.emplace_back(device->device, device->tables.scratch_bytes);
  return bytes;
}

void PreparedPairs::bump_versions(Op op) const {
  const auto bump = [](at::TensorImpl* tensor) {
    if (!tensor->is_inference()) tensor->bump_version();
  };
  at::parallel_for(0, static_cast<int64_t>(pairs_.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& pair = pairs_[static_cast<size_t>(i)];
      if (!pair.active) continue;
      bump(pair.ema);
      if (writes_model(op)) bump(pair.model);
    }
  });
}

bool PreparedPairs::large() const {
  constexpr int64_t kLarge = int64_t(1) << 20;  // elements: about a millisecond
  return !devices_.empty() && devices_.back()->device.is_cpu() && devices_.back()->tables.elements >= kLarge;
}

Tensors PreparedPairs::tensors() const {
  Tensors tensors;
  tensors.reserve(2 * pairs_.size());
  for (const auto& pair : pairs_)
    for (auto* tensor : {pair.ema, pair.model}) tensors.push_back(reference(tensor));
  return tensors;
}

std::vector<c10::Storage> PreparedPairs::storages() const {
  std::vector<c10::Storage> storages;
  storages.reserve(2 * pairs_.size());
  for (const auto& pair : pairs_) {
    storages.push_back(pair.ema->storage());
    storages.push_back(pair.model->storage());
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
