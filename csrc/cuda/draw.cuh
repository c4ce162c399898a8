// draw: one of the k candidates of every token, by Philox at (seed, counter).
//
// Contract (exactly: docs/engine.md, "The draw, exactly")
//   values, index   [T, k] float32 and int64, contiguous, in any order, k <= 64
//   counter         [T] int64
//   positive        [T] int64, the drawn column; -1 where no candidate is finite
//   positive_logit  [T] float32, its logit; -inf there
// FLOPs  k^2 comparisons, 2 k exponentials and one Philox a token
// Bytes  k * 12 + 20 a token
// Share of the limit: not measured yet; launch and latency, a few microseconds, outweigh both
//
// A warp works on a token. Each lane counts who comes before its candidates, which puts them in order without a sort;
// the draw itself goes through them one by one, as on every other device, so that the sums round alike.
#pragma once

#include "cuda/launch.h"
#include "philox.h"

namespace fastd2o::cuda {

__global__ void __launch_bounds__(kRowsPerBlock * kWarp) draw_kernel(const DrawArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.tokens) return;  // a whole warp
  const float* const values = a.values + row * a.k;
  const int64_t* const index = a.index + row * a.k;
  __shared__ float logits[kRowsPerBlock][kMaxCandidates];
  __shared__ int64_t columns[kRowsPerBlock][kMaxCandidates];
  for (int i = threadIdx.x; i < a.k; i += kWarp) {
    const int rank = candidate_rank(values, index, a.k, i);
    logits[threadIdx.y][rank] = values[i];
    columns[threadIdx.y][rank] = index[i];
  }
  __syncwarp();
  if (threadIdx.x > 0) return;
  const float u = philox_uniform(a.seed, static_cast<uint64_t>(a.counter[row]));
  const int drawn = drawn_candidate(logits[threadIdx.y], a.k, u);
  a.positive[row] = drawn < 0 ? -1 : columns[threadIdx.y][drawn];
  a.positive_logit[row] = drawn < 0 ? -INFINITY : logits[threadIdx.y][drawn];
}

}  // namespace fastd2o::cuda
