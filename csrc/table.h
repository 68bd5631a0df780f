// Turns pairs of strided arrays into the tables of a plan, on the host. It never reads the arrays, so tests can pass
// shapes of 2^40 elements.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "tiles.h"

namespace fused_ema {

// Starts loading what will be needed a few items later: the caches go cold between two updates of a training loop.
inline void prefetch(const void* address, int bytes) {
#ifdef __GNUC__
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(address) + at);
#endif
}

// One pair of arrays of equal sizes. Strides are in elements.
struct Pair {
  void* ema;
  void* model;
  Type ema_type;
  Type model_type;
  bool average;
  int dims;
  const int64_t* sizes;
  const int64_t* ema_strides;
  const int64_t* model_strides;
  int64_t stride = 0;  // from one average to the next
  int64_t number = 0;  // of the first element, counted over all devices
};

struct Tables {
  std::vector<Row> rows;
  std::vector<Layout> layouts;
  std::vector<Tile> tiles;
  int64_t elements = 0;
  int64_t scratch_bytes = 0;  // that an exchange needs for the pairs of two types
};

// Drops dimensions of size 1, sorts the others by the average's strides, the largest first, and merges neighbours that
// have no gap between them on either side. Returns false if more than kMaxDims are left.
inline bool make_layout(const Pair& pair, Layout& layout) {
  std::vector<int> order;
  for (int d = 0; d < pair.dims; ++d)
    if (pair.sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return pair.ema_strides[a] > pair.ema_strides[b]; });
  layout.dims = 0;
  for (int d : order) {
    const int64_t size = pair.sizes[d], ema = pair.ema_strides[d], model = pair.model_strides[d];
    const int last = layout.dims - 1;
    if (last >= 0 && layout.ema_stride[last] == ema * size && layout.model_stride[last] == model * size) {
      layout.size[last] *= size;
      layout.ema_stride[last] = ema;
      layout.model_stride[last] = model;
      continue;
    }
    if (layout.dims == kMaxDims) return false;
    layout.size[layout.dims] = size;
    layout.ema_stride[layout.dims] = ema;
    layout.model_stride[layout.dims] = model;
    ++layout.dims;
  }
  return true;
}

inline bool is_flat(const Layout& layout) {
  return layout.dims == 0 || (layout.dims == 1 && layout.ema_stride[0] == 1 && layout.model_stride[0] == 1);
}

// Points a row whose shape, strides and types are set to two arrays, and notes how they are aligned.
inline void set_addresses(Row& row, void* ema, void* model) {
  row.ema = ema;
  row.model = model;
  if (row.layout >= 0) return;
  const int64_t ema_size = size_of(row.ema_type), model_size = size_of(row.model_type);
  const int64_t model_vector = std::min<int64_t>(kVectorBytes, kVectorBytes / ema_size * model_size);
  row.misaligned = static_cast<uint8_t>(reinterpret_cast<uintptr_t>(ema) % kVectorBytes / ema_size);
  row.model_aligned = (reinterpret_cast<uintptr_t>(model) - uintptr_t(row.misaligned) * model_size) % model_vector == 0;
}

// Appends the row of one pair, its layout unless it is flat, and the tiles that a grid needs. An empty pair adds
// nothing. Returns false, with the tables unchanged, if more than kMaxDims dimensions are left after merging.
inline bool add_pair(Tables& tables, const Pair& pair, bool with_tiles) {
  int64_t numel = 1;
  for (int d = 0; d < pair.dims; ++d) numel *= pair.sizes[d];
  if (numel == 0) return true;
  Layout layout{};  // zeros beyond its dims, so that equal pairs give equal bytes
  if (!make_layout(pair, layout)) return false;

  const int64_t ema_size = size_of(pair.ema_type), model_size = size_of(pair.model_type);
  Row row{};
  row.numel = numel;
  row.first = tables.elements;
  row.layout = -1;
  row.ema_type = pair.ema_type;
  row.model_type = pair.model_type;
  row.average = pair.average;
  row.stride = pair.stride;
  row.number = pair.number;
  row.scratch = -1;
  if (!is_flat(layout)) {
    row.layout = static_cast<int32_t>(tables.layouts.size());
    tables.layouts.push_back(layout);
  }
  set_addresses(row, pair.ema, pair.model);
  if (pair.ema_type != pair.model_type) {
    row.scratch = (tables.scratch_bytes + 15) / 16 * 16;
    tables.scratch_bytes = row.scratch + numel * model_size;
  }
  if (with_tiles) {
    const int64_t tile = tile_elements(ema_size);
    const int64_t count = (numel + row.misaligned + tile - 1) / tile;
    for (int64_t i = 0; i < count; ++i) {
      tables.tiles.push_back(Tile{static_cast<uint32_t>(tables.rows.size()), static_cast<uint32_t>(i)});
    }
  }
  tables.rows.push_back(row);
  tables.elements += numel;
  return true;
}

}  // namespace fused_ema
