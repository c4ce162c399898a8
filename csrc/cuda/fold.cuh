// fold: the online log-sum-exp of a tile of logits, over every column but the target's, and what comes with it.
//
// Contract (exactly: fastd2o/ops/tile_ops.py)
//   logits   [T, N] float32, bfloat16 or float16
//   state    max, sum, target_logit and, with statistics, weighted, argmax, total: [T, 1], from "all columns before" to
//            "all columns up to here"
//   rescale  [T, 1] = exp(old max - new max)
//   weights  [T, N] where asked for = exp(z - new max) * bend, 0 at the target; any of the three dtypes, in place where
//            it is the logits'
// FLOPs  about 8 a logit, one of them an exponential; with a softcap tanh comes on top, and with weights a second one
// Bytes  the tile read once, its weights written once, in L2; for weights under a softcap, or of rows over 16384 columns,
//        it is read twice
// Share of the limit, the speed of L2: not measured yet
//
// Every thread folds its logits relative to its own maximum, and the row agrees on maximum and sums at the end: one
// exponential a logit, one barrier at most. The state enters as if it were one more column of thread 0, so that merging
// with earlier tiles needs no code of its own. The order of all sums is fixed: two runs give the same bits.
//
// What costs beside the bytes is everything that is done once for a thread. So a row has a single warp as long as rows
// are enough to fill the GPU; where weights are asked for, it has as many as hold it in registers until they are written.
#pragma once

#include "cuda/row.cuh"

namespace fastd2o::cuda {

// What is known of some columns of a row: by a thread, a warp, or all.
struct Folded {
  OnlineSums sums;
  float total;
  int argmax;  // the first column at the maximum; -1 if that is in an earlier tile

  static __device__ Folded none() { return {OnlineSums::none(), 0.0f, INT32_MAX}; }
};

// The same for the columns of a warp's 32 lanes, known to each of them.
template <bool statistics>
__device__ __forceinline__ Folded warp_merged(Folded lane) {
  Folded all = Folded::none();
  const float max = warp_max(lane.sums.max);
  const OnlineSums moved = lane.sums.relative_to(max);
  all.sums.max = max;
  all.sums.sum = warp_sum(moved.sum);
  if (statistics) {
    all.sums.weighted = warp_sum(moved.weighted);
    all.total = warp_sum(lane.total);
    const int candidate = lane.sums.max == max ? lane.argmax : INT32_MAX;
    all.argmax = __reduce_min_sync(kAllLanes, candidate);
  }
  return all;
}

// The same for all warps of a row. Every thread of the block must come here.
template <bool statistics>
__device__ __forceinline__ Folded row_merged(const Folded& thread) {
  const Folded warp = warp_merged<statistics>(thread);
  if (blockDim.x == kWarp) return warp;
  __shared__ Folded warps[kMaxRowWarps];
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warps[threadIdx.x / kWarp] = warp;
  __syncthreads();
  return warp_merged<statistics>(lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : Folded::none());
}

template <typename Logit, bool statistics>
__global__ void __launch_bounds__(kMaxRowWarps * kWarp) fold_kernel(const FoldArguments a) {
  const int64_t row = row_of_thread();
  if (row >= a.tokens) return;  // a whole warp, of a block whose rows have a warp each and no barrier
  const Row<Logit> logits(a.logits, row, a.columns);
  const int target = target_column(a.target[row], a.vocab_start, a.columns);

  Folded mine = Folded::none();
  float old_max = -INFINITY;
  if (threadIdx.x == 0) {
    old_max = a.max[row];
    mine.sums = {old_max, a.sum[row], statistics ? a.weighted[row] : 0.0f};
    mine.total = statistics ? a.total[row] : 0.0f;
    mine.argmax = -1;
  }

  float raw[kThreadLogits], values[kThreadLogits] = {};
  for (int first = logits.first(); first < a.columns; first += logits.band()) {
    logits.load(first, raw);
    transform_all(raw, values, a.transform);
    if (statistics) {
#pragma unroll
      for (int i = 0; i < kThreadLogits; ++i) mine.total += values[i] == -INFINITY ? 0.0f : values[i];
    }
    logits.at(target, first, [&](int i) {
      a.target_logit[row] = values[i];
      values[i] = -INFINITY;
    });
    float max = values[0];
#pragma unroll
    for (int i = 1; i < kThreadLogits; ++i) max = max_or_nan(max, values[i]);
    if (statistics && max > mine.sums.max) {
      // From the last to the first, so that the first of equals stays.
#pragma unroll
      for (int i = kThreadLogits - 1; i >= 0; --i) {
        if (values[i] == max) mine.argmax = logits.column(first, i);
      }
    }
    mine.sums = mine.sums.relative_to(max_or_nan(mine.sums.max, max));
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) values[i] = mine.sums.add(values[i]);
  }

  const Folded all = row_merged<statistics>(mine);
  if (threadIdx.x == 0) {
    a.max[row] = all.sums.max;
    a.sum[row] = all.sums.sum;
    a.rescale[row] = rescale_factor(old_max, all.sums.max);
    if (statistics) {
      a.weighted[row] = all.sums.weighted;
      a.total[row] = all.total;
      if (0 <= all.argmax && all.argmax < a.columns) a.argmax[row] = a.vocab_start + all.argmax;
    }
  }
  if (a.weights.data == nullptr) return;

  if (logits.begin + logits.band() >= a.columns) {  // the row is still in registers
    const float factor = rescale_factor(mine.sums.max, all.sums.max);
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) values[i] *= factor;
    if (a.transform.capped) {  // for which the raw logits come from cache again: registers for both would spill
      logits.load(logits.first(), raw);
      bend_all(raw, values, a.transform);
    }
    logits.store(a.weights, row, a.whole, logits.first(), values);
    return;
  }
  for (int first = logits.first(); first < a.columns; first += logits.band()) {
    logits.load(first, raw);
    transform_all(raw, values, a.transform);
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) values[i] = exponential(values[i] - shift_of(all.sums.max));
    bend_all(raw, values, a.transform);
    logits.at(target, first, [&](int i) { values[i] = 0.0f; });
    logits.store(a.weights, row, a.whole, first, values);
  }
}

}  // namespace fastd2o::cuda
