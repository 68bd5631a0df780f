// The CUDA kernel's own tile code, built for the host behind a plain C API. emulated_grid.py loads it with ctypes and
// runs it over an emulated grid: every (block, thread) of a launch once, in shuffled order. Threads of the kernel never
// wait for each other, so a GPU may run them in any such order.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

struct Store {
  uintptr_t address;
  uint64_t bytes;
};
static std::vector<Store> stores;  // every write of the last run

static void on_store(const void* pointer, size_t bytes) {
  stores.push_back(Store{reinterpret_cast<uintptr_t>(pointer), bytes});
  if (stores.size() > size_t(1) << 24) {  // 256 MB: an endless loop must not fill the machine's memory
    std::fputs("emulated grid: more writes than any test makes\n", stderr);
    std::abort();
  }
}
#define FUSED_EMA_ON_STORE(pointer, bytes) on_store(pointer, bytes)

#include "../../csrc/table.h"

using namespace fused_ema;

template <Op kOp>
static void run_threads(const Launch& launch, const std::vector<int64_t>& order) {
  for (int64_t i : order) run_block<kOp>(launch, static_cast<uint32_t>(i / kThreads), static_cast<int>(i % kThreads));
}

template <class T>
static void convert_to_float(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

// Rounds to nearest, or stochastically if there are random bits.
template <class T>
static void convert_from_float(const float* from, T* to, int64_t n, const uint32_t* random) {
  for (int64_t i = 0; i < n; ++i) to[i] = random ? from_float<T>(from[i], random[i]) : from_float<T>(from[i]);
}

extern "C" {

#define FUSED_EMA_NAME(E, P) #E "<-" #P " "
const char* grid_lerp_pairs() { return FUSED_EMA_LERP_PAIRS(FUSED_EMA_NAME); }
const char* grid_narrow_pairs() { return FUSED_EMA_NARROW_PAIRS(FUSED_EMA_NAME); }
const char* grid_cast_pairs() { return FUSED_EMA_CAST_PAIRS(FUSED_EMA_NAME); }

int64_t grid_tile_elements(int ema_size) { return tile_elements(ema_size); }
int64_t grid_call_bytes() { return sizeof(Call); }

// Sizes of Row, Layout, Tile and Launch; and a Launch of these parts.
void grid_sizes(int64_t* out) {
  for (size_t size : {sizeof(Row), sizeof(Layout), sizeof(Tile), sizeof(Launch)}) *out++ = static_cast<int64_t>(size);
}
void grid_launch(Launch* out, const Row* rows, const Layout* layouts, const Tile* tiles, int64_t count,
                 const Call* call) {
  *out = Launch{rows, layouts, tiles, count, *call};
}

Tables* grid_new() { return new Tables; }
void grid_delete(Tables* tables) { delete tables; }

int grid_add(Tables* tables, void* ema, void* model, int ema_type, int model_type, int average, int dims,
             const int64_t* sizes, const int64_t* ema_strides, const int64_t* model_strides, int64_t stride,
             int64_t number, int with_tiles) {
  return add_pair(*tables,
                  Pair{ema, model, static_cast<Type>(ema_type), static_cast<Type>(model_type), average != 0, dims,
                       sizes, ema_strides, model_strides, stride, number},
                  with_tiles != 0);
}

void grid_set_addresses(Tables* tables, void* ema, void* model) { set_addresses(tables->rows.front(), ema, model); }

// rows, layouts, tiles, elements
void grid_counts(const Tables* tables, int64_t* out) {
  out[0] = static_cast<int64_t>(tables->rows.size());
  out[1] = static_cast<int64_t>(tables->layouts.size());
  out[2] = static_cast<int64_t>(tables->tiles.size());
  out[3] = tables->elements;
}
int64_t grid_scratch_bytes(const Tables* tables) { return tables->scratch_bytes; }
int64_t grid_scratch(const Tables* tables, int64_t row) { return tables->rows[static_cast<size_t>(row)].scratch; }
const Row* grid_rows(const Tables* tables) { return tables->rows.data(); }
const Layout* grid_layouts(const Tables* tables) { return tables->layouts.data(); }
const Tile* grid_tiles(const Tables* tables) { return tables->tiles.data(); }

// The dimensions of a row's layout; -1 if the row is flat.
int grid_dims(const Tables* tables, int64_t row) {
  const int32_t layout = tables->rows[static_cast<size_t>(row)].layout;
  return layout < 0 ? -1 : tables->layouts[static_cast<size_t>(layout)].dims;
}

// Where element i of a strided row lies on each side.
void grid_offsets(const Tables* tables, int64_t row, int64_t i, int64_t* out) {
  const int32_t layout = tables->rows[static_cast<size_t>(row)].layout;
  const Offsets at = offsets_of(tables->layouts[static_cast<size_t>(layout)], i);
  out[0] = at.ema;
  out[1] = at.model;
}

// Runs `count` tiles of `tiles`; if that is null, all tiles of the tables.
void grid_run(const Tables* tables, int op, const Call* call, const Tile* tiles, int64_t count, uint64_t seed) {
  stores.clear();
  if (!tiles) {
    tiles = tables->tiles.data();
    count = static_cast<int64_t>(tables->tiles.size());
  }
  const Launch launch{tables->rows.data(), tables->layouts.data(), tiles, count, *call};
  std::vector<int64_t> order(static_cast<size_t>(blocks(launch) * kThreads));
  std::iota(order.begin(), order.end(), int64_t(0));
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  switch (static_cast<Op>(op)) {
    case Op::update: return run_threads<Op::update>(launch, order);
    case Op::copy: return run_threads<Op::copy>(launch, order);
    case Op::swap: return run_threads<Op::swap>(launch, order);
    case Op::restore: return run_threads<Op::restore>(launch, order);
    case Op::update_stochastic: return run_threads<Op::update_stochastic>(launch, order);
    case Op::update_finite: return run_threads<Op::update_finite>(launch, order);
    case Op::update_stochastic_finite: return run_threads<Op::update_stochastic_finite>(launch, order);
  }
}

int64_t grid_store_count() { return static_cast<int64_t>(stores.size()); }
const Store* grid_stores() { return stores.data(); }

void grid_bf16_to_float(const bf16* from, float* to, int64_t n) { convert_to_float(from, to, n); }
void grid_f16_to_float(const f16* from, float* to, int64_t n) { convert_to_float(from, to, n); }
void grid_bf16_from_float(const float* from, bf16* to, int64_t n, const uint32_t* random) {
  convert_from_float(from, to, n, random);
}
void grid_f16_from_float(const float* from, f16* to, int64_t n, const uint32_t* random) {
  convert_from_float(from, to, n, random);
}
void grid_random_bits(uint64_t key, const uint64_t* counters, uint32_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = random_bits(key, counters[i]);
}

}  // extern "C"
