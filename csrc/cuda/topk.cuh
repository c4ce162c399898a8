// topk: the k largest logits of every token so far, and their columns; the target's column does not take part.
//
// Contract (exactly: fastd2o/ops/tile_ops.py)
//   logits         [T, N] float32, bfloat16 or float16, left as they are
//   values, index  [T, k] float32 and int64, contiguous, k <= 64, in no order, from "all columns before" to "all
//                  columns up to here". Of equal logits the smaller column stays, NaN is larger than all, -inf never
//                  enters: what stays does not depend on how the columns were cut into tiles.
// FLOPs  about 3 a logit: scale, compare; with a softcap tanh on top. A newcomer costs its warp some 40 instructions.
// Bytes  the tile read once, in L2; k * 12 bytes a row read and written
// Share of the limit, the speed of L2: not measured yet
//
// Threshold first: a logit below the smallest of the k is dropped after one comparison. In a row of n logits in random
// order only about k (1 + ln(n / k)) pass, most of them in the first tile. So the k keys need no order and no clever
// structure: they lie in the registers of a warp, two a lane, and a newcomer takes the place of the smallest, which two
// warp reductions then find anew. Sorting networks or a radix select would work on every logit several times to save
// work on these few.
//
// Rows have a warp each. Few long rows get several warps, each with k keys of its own above the smallest of the
// state's; the first warp, which alone has the state's keys, takes in those of the others.
#pragma once

#include <cfloat>

#include "cuda/row.cuh"

namespace fastd2o::cuda {

// k keys (online_softmax.h) in the registers of a warp, two a lane, in no order.
class WarpTopK {
 public:
  // Keys at or below `floor` are not let in.
  __device__ WarpTopK(uint64_t first, uint64_t second, uint64_t floor) : first_(first), second_(second), floor_(floor) {
    find_smallest();
  }

  __device__ __forceinline__ uint64_t first() const { return first_; }
  __device__ __forceinline__ uint64_t second() const { return second_; }

  // A newcomer has to be above this.
  __device__ __forceinline__ uint64_t threshold() const { return smallest_ > floor_ ? smallest_ : floor_; }

  // No logit below this one can enter. While there is room all finite ones can, and NaN; -inf never.
  __device__ __forceinline__ float bar() const { return fmaxf(key_logit(threshold()), -FLT_MAX); }

  // Every lane brings a key, 0 for none; the warp lets in those that are large enough, one after the other.
  __device__ __forceinline__ void offer(uint64_t key) {
    while (const uint32_t waiting = __ballot_sync(kAllLanes, key > threshold())) {
      const int giver = __ffs(waiting) - 1, lane = threadIdx.x % kWarp;
      const uint64_t newcomer = __shfl_sync(kAllLanes, key, giver);
      if (lane == giver) key = 0;
      const bool first = first_ == smallest_, second = second_ == smallest_;
      if (lane == __ffs(__ballot_sync(kAllLanes, first || second)) - 1) (first ? first_ : second_) = newcomer;
      find_smallest();
    }
  }

 private:
  __device__ __forceinline__ void find_smallest() {
    const uint64_t mine = first_ < second_ ? first_ : second_;
    const uint32_t high = __reduce_min_sync(kAllLanes, static_cast<uint32_t>(mine >> 32));
    const uint32_t low = __reduce_min_sync(kAllLanes, mine >> 32 == high ? static_cast<uint32_t>(mine) : 0xFFFFFFFFu);
    smallest_ = static_cast<uint64_t>(high) << 32 | low;
  }

  uint64_t first_, second_, smallest_, floor_;
};

// Entry i of the state or, where there is none, a key that is never the smallest.
__device__ __forceinline__ uint64_t state_key(const TopKArguments& a, int64_t row, int i) {
  return i < a.k ? rank_key(a.values[row * a.k + i], static_cast<uint32_t>(a.index[row * a.k + i])) : UINT64_MAX;
}

__device__ __forceinline__ uint64_t empty_key(const TopKArguments& a, int i) {
  return i < a.k ? rank_key(-INFINITY, 0) : UINT64_MAX;
}

__device__ __forceinline__ void write_entry(const TopKArguments& a, int64_t row, int i, uint64_t key) {
  if (i >= a.k) return;
  a.values[row * a.k + i] = key_logit(key);
  a.index[row * a.k + i] = key_column(key);
}

template <typename Logit>
__global__ void __launch_bounds__(kMaxTopKWarps * kWarp) topk_kernel(const TopKArguments a) {
  const int64_t row = row_of_thread();
  if (row >= a.tokens) return;  // a whole warp, of a block whose rows have a warp each and no barrier
  const Row<Logit> logits(a.logits, row, a.columns);
  const int target = target_column(a.target[row], a.vocab_start, a.columns);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  const WarpTopK before(state_key(a, row, lane), state_key(a, row, lane + kWarp), 0);
  WarpTopK top = warp == 0 ? before : WarpTopK(empty_key(a, lane), empty_key(a, lane + kWarp), before.threshold());

  const int start = logits.begin + warp * kWarp * logits.kWidth;  // all lanes of a warp go round equally often
  for (int begin = start; begin < a.columns; begin += logits.band()) {
    const int first = begin + lane * logits.kWidth;
    float raw[kThreadLogits], z[kThreadLogits];
    logits.load(first, raw);
    transform_all(raw, z, a.transform);
    logits.at(target, first, [&](int i) { z[i] = -INFINITY; });
    const float bar = top.bar();
    bool any = false;
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) any |= !(z[i] < bar);
    if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) {
      const uint32_t column = static_cast<uint32_t>(a.vocab_start) + static_cast<uint32_t>(logits.column(first, i));
      top.offer(z[i] < bar ? 0 : rank_key(z[i], column));
    }
  }

  if (blockDim.x > kWarp) {
    __shared__ uint64_t found[kMaxTopKWarps][kMaxCandidates];
    found[warp][lane] = top.first();
    found[warp][lane + kWarp] = top.second();
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < static_cast<int>(blockDim.x) / kWarp; ++other) {
      for (int i = lane; i < kMaxCandidates; i += kWarp) top.offer(i < a.k ? found[other][i] : 0);
    }
  }
  write_entry(a, row, lane, top.first());
  write_entry(a, row, lane + kWarp, top.second());
}

}  // namespace fastd2o::cuda
