// Makes plans from random bytes and runs them over the emulated grid under sanitizers. Every tensor has memory of
// exactly its size. Built with -fsanitize=fuzzer this is a libFuzzer target; else it is a program: fuzz_plans COUNT
// [SEED].
#include <memory>

#ifndef FUSED_EMA_THREADS  // small tiles, so that small tensors have several
#define FUSED_EMA_THREADS 32
#define FUSED_EMA_UNROLL 2
#define FUSED_EMA_STEPS 2
#endif
#include "emulated_grid.cpp"  // which -I finds

namespace {

// Decisions from the fuzzer's bytes; 0 once they have run out.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  int64_t below(int64_t n) {
    uint64_t bits = 0;
    for (int i = 0; i < (n > 256 ? 4 : 1) && data_ < end_; ++i) bits = bits << 8 | *data_++;
    return static_cast<int64_t>(bits % static_cast<uint64_t>(n));
  }
  bool one_in(int64_t n) { return below(n) == 0; }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};

struct Tensors {
  std::unique_ptr<char[]> memory[2];
  Pair pair;
  std::vector<int64_t> sizes, strides[2];
  int64_t numel = 1;
};

// The dimensions of both sides are in any order, with gaps or without; the model's may be expanded, by strides of 0.
Tensors tensors(Choices& choose, Op op, int averages, int64_t number) {
  Tensors found;
  Type types[2] = {static_cast<Type>(choose.below(8)), Type::f32};
  const bool is_float = types[0] <= Type::f16;
  types[1] = is_float && !(op == Op::copy && choose.one_in(2)) ? static_cast<Type>(choose.below(4)) : types[0];
  const int dims = static_cast<int>(choose.one_in(4) ? choose.below(15) : choose.below(5));
  for (int d = 0; d < dims; ++d) {
    found.sizes.push_back(dims > 5 ? 1 + choose.below(3) : choose.one_in(8) ? choose.below(300) : choose.below(7));
    found.numel *= found.sizes.back();
    if (found.numel > 20000) found.numel /= found.sizes.back(), found.sizes.back() = 1;
  }
  for (int side = 0; side < 2; ++side) {
    auto& strides = found.strides[side];
    std::vector<int> order(static_cast<size_t>(dims));
    std::iota(order.begin(), order.end(), 0);
    for (int d = dims - 1; d > 0 && !choose.one_in(2); --d) std::swap(order[d], order[choose.below(d + 1)]);
    if (side == 1 && choose.one_in(2)) {
      strides = found.strides[0];
    } else {
      strides.assign(static_cast<size_t>(dims), 0);
      int64_t next = 1;
      for (int i = dims - 1; i >= 0; --i) {
        strides[order[i]] = side == 1 && op <= Op::copy && choose.one_in(16) ? 0 : next;
        next *= std::max<int64_t>(found.sizes[order[i]], 1);
        if (next < 40000 && choose.one_in(8)) next += choose.below(4);
      }
    }
    int64_t span = found.numel ? 1 : 0;
    for (int d = 0; d < dims && found.numel; ++d) span += (found.sizes[d] - 1) * strides[d];
    const int64_t size = size_of(types[side]), vector = kVectorBytes / size;
    const int64_t offset = choose.below(vector);
    if (side == 0) found.pair.stride = (span + vector - 1) / vector * vector;
    const int64_t count = offset + (side == 0 ? (averages - 1) * found.pair.stride : 0) + span;
    found.memory[side].reset(new char[static_cast<size_t>(count * size)]());
    for (int64_t i = 0; i < std::min<int64_t>(count * size, 8); ++i)
      found.memory[side][i] = static_cast<char>(choose.below(256));
    (side == 0 ? found.pair.ema : found.pair.model) = found.memory[side].get() + offset * size;
  }
  found.pair.ema_type = types[0];
  found.pair.model_type = types[1];
  found.pair.average = is_float && is_update(op);
  found.pair.dims = dims;
  found.pair.sizes = found.sizes.data();
  found.pair.ema_strides = found.strides[0].data();
  found.pair.model_strides = found.strides[1].data();
  found.pair.number = number;
  return found;
}

void run_one(const uint8_t* data, size_t size) {
  Choices choose(data, size);
  const Op op = static_cast<Op>(choose.below(7));
  const int averages = static_cast<int>(writes_model(op) || choose.one_in(2) ? 1 : 1 + choose.below(kMaxAverages));
  Call call;
  call.last = averages;
  int written = averages;
  for (int k = 0; k < averages; ++k) {
    const double decays[] = {0.9, 0.0, 0.5, 0.9999, 1.0};
    call.decay[k] = decays[choose.below(5)];
    call.key[k] = static_cast<uint64_t>(choose.below(1 << 16));
    written -= is_update(op) && call.decay[k] == 1.0;
  }
  Tables tables;
  std::vector<Tensors> all;
  const int64_t pairs = 1 + choose.below(4);
  int64_t number = 0, bytes = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    Tensors each = tensors(choose, op == Op::restore ? Op::swap : op, averages, number);
    const size_t rows = tables.rows.size();
    if (add_pair(tables, each.pair, true) && tables.rows.size() > rows) {
      number += 2 * each.numel;
      const int64_t ema = size_of(each.pair.ema_type), model = size_of(each.pair.model_type);
      const bool exchanges = each.pair.ema_type == each.pair.model_type;  // else the model's values are saved
      bytes += each.numel * (!writes_model(op)   ? written * ema
                             : exchanges         ? ema + model
                             : op == Op::restore ? model
                                                 : 2 * model);
    }
    all.push_back(std::move(each));
  }
  std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(tables.scratch_bytes + 1)]());
  call.scratch = scratch.get();
  if (op == Op::restore) grid_run(&tables, int(Op::swap), &call, nullptr, 0, 1);
  grid_run(&tables, int(op), &call, nullptr, 0, 1);
  int64_t stored = 0;
  for (const Store& each : stores) stored += static_cast<int64_t>(each.bytes);
  if (stored != bytes) {
    std::fprintf(stderr, "op %d: %lld bytes stored, %lld expected\n", int(op), (long long)stored, (long long)bytes);
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  run_one(data, size);
  return 0;
}

#ifndef FUSED_EMA_LIBFUZZER
int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 1000;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  std::vector<uint8_t> data;
  for (long i = 0; i < count; ++i) {
    data.resize(random() % 200);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    run_one(data.data(), data.size());
  }
  std::printf("%ld plans, nothing reported\n", count);
}
#endif
