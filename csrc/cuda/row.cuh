// How a thread meets its row: which logits are its own, moved 16 bytes at a time, and what a warp agrees on.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "cuda/launch.h"
#include "online_softmax.h"

namespace fastd2o::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
// The target's column where it lies in another tile: far from any column, as unsigned distances go.
constexpr int kElsewhere = INT32_MIN;

template <typename Logit>
constexpr int kVector = 16 / sizeof(Logit);

template <typename T, int width>
struct alignas(sizeof(T) * width) Vector {
  T at[width];
};

__device__ __forceinline__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ __forceinline__ int target_column(int64_t target, int64_t vocab_start, int columns) {
  const uint64_t column = static_cast<uint64_t>(target) - static_cast<uint64_t>(vocab_start);
  return column < static_cast<uint64_t>(columns) ? static_cast<int>(column) : kElsewhere;
}

// The row of a tile, cut at the 16-byte boundaries of its logits. A thread's share of one *band* of the row is
// kThreadLogits logits: vectors that start at columns first, first + step, ..., next to those of its neighbours. The
// first column may be negative and the last beyond the row.
template <typename Logit>
struct Row {
  static constexpr int kWidth = kVector<Logit>;
  static constexpr int kVectors = kThreadLogits / kWidth;

  const Logit* data;
  int columns;
  int begin;  // the column of the row's first boundary: 0 or before

  __device__ Row(const Tile& tile, int64_t row, int columns)
      : data(static_cast<const Logit*>(tile.data) + row * tile.stride),
        columns(columns),
        begin(-static_cast<int>((tile.phase + static_cast<uint64_t>(row * tile.stride)) % kWidth)) {}

  __device__ int first() const { return begin + static_cast<int>(threadIdx.x) * kWidth; }
  __device__ int step() const { return static_cast<int>(blockDim.x) * kWidth; }
  __device__ int band() const { return static_cast<int>(blockDim.x) * kThreadLogits; }

  // The column of the thread's i-th logit in a band.
  __device__ __forceinline__ int column(int first, int i) const { return first + i / kWidth * step() + i % kWidth; }

  __device__ __forceinline__ bool has(int column) const { return 0 <= column && column < columns; }

  // All of the thread's vectors in a band are whole.
  __device__ __forceinline__ bool has_all(int first) const {
    return first >= 0 && column(first, kThreadLogits - 1) < columns;
  }

  // f(i) for the i-th logit if that is in the wanted column. Most bands are ruled out by one comparison.
  template <typename F>
  __device__ __forceinline__ void at(int wanted, int first, const F& f) const {
    const uint32_t distance = static_cast<uint32_t>(wanted) - static_cast<uint32_t>(first);
    if (distance >= static_cast<uint32_t>(band())) return;
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) {
      if (distance == static_cast<uint32_t>(column(0, i))) f(i);
    }
  }

  // The thread's logits in the band as float32; -inf, like padding, where the row has none.
  __device__ __forceinline__ void load(int first, float (&raw)[kThreadLogits]) const {
    Vector<Logit, kWidth> loaded[kVectors];
    if (has_all(first)) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        loaded[v] = *reinterpret_cast<const Vector<Logit, kWidth>*>(data + first + v * step());
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadLogits; ++i) {
        const int at = column(first, i);
        loaded[i / kWidth].at[i % kWidth] = has(at) ? data[at] : Logit(-INFINITY);
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) raw[i] = static_cast<float>(loaded[i / kWidth].at[i % kWidth]);
  }

  // Writes the thread's share of a band, rounded once, to the same columns of another tile's row; `whole`: launch.h.
  template <typename Out>
  __device__ __forceinline__ void store_as(Out* out, bool whole, int first,
                                           const float (&values)[kThreadLogits]) const {
    if (whole && has_all(first)) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<Out, kWidth> rounded;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) rounded.at[j] = static_cast<Out>(values[v * kWidth + j]);
        *reinterpret_cast<Vector<Out, kWidth>*>(out + first + v * step()) = rounded;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadLogits; ++i) {
        const int at = column(first, i);
        if (has(at)) out[at] = static_cast<Out>(values[i]);
      }
    }
  }

  __device__ __forceinline__ void store(const Tile& tile, int64_t row, bool whole, int first,
                                        const float (&values)[kThreadLogits]) const {
    const int64_t offset = row * tile.stride;
    if (tile.dtype == Dtype::kFloat32) {
      store_as(static_cast<float*>(tile.data) + offset, whole, first, values);
    } else if (tile.dtype == Dtype::kBFloat16) {
      store_as(static_cast<BFloat16*>(tile.data) + offset, whole, first, values);
    } else {
      store_as(static_cast<Half*>(tile.data) + offset, whole, first, values);
    }
  }
};

// One branch on the softcap for all of a thread's logits, not one for each.
__device__ __forceinline__ void transform_all(const float (&raw)[kThreadLogits], float (&z)[kThreadLogits],
                                              const LogitTransform& transform) {
  if (transform.capped) {
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) z[i] = transformed(raw[i], transform);
  } else {
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) z[i] = transformed(raw[i], transform);
  }
}

__device__ __forceinline__ void bend_all(const float (&raw)[kThreadLogits], float (&values)[kThreadLogits],
                                         const LogitTransform& transform) {
  if (!transform.capped) return;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) values[i] *= bend(raw[i], transform);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

}  // namespace fastd2o::cuda
