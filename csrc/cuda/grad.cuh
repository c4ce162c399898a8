// grad: a tile of logits becomes its gradient, -coef * bend * softmax over the columns other than the target.
//
// Contract (exactly: fastd2o/ops/tile_ops.py)
//   logits            [T, N] float32, bfloat16 or float16
//   lse_others, coef  [T, 1]; a row whose coef is exactly 0 is not read: it becomes zeros
//   out               [T, N], 0 in the target's column; any of the three dtypes, in place where it is the logits'
// FLOPs  about 6 a logit, one of them an exponential; with a softcap tanh and a second exponential on top
// Bytes  the tile read once, its gradient written once, in L2
// Share of the limit, the speed of L2: not measured yet
#pragma once

#include "cuda/row.cuh"

namespace fastd2o::cuda {

template <typename Logit>
__global__ void __launch_bounds__(kMaxRowWarps * kWarp) grad_kernel(const GradArguments a) {
  const int64_t row = row_of_thread();
  if (row >= a.tokens) return;
  const Row<Logit> logits(a.logits, row, a.columns);
  const int target = target_column(a.target[row], a.vocab_start, a.columns);
  const float coef = a.coef[row], lse_others = a.lse_others[row];

  float raw[kThreadLogits], values[kThreadLogits] = {};
  for (int first = logits.first(); first < a.columns; first += logits.band()) {
    if (coef != 0.0f) {
      logits.load(first, raw);
      transform_all(raw, values, a.transform);
#pragma unroll
      for (int i = 0; i < kThreadLogits; ++i) values[i] = gradient_entry(values[i], lse_others, coef);
      bend_all(raw, values, a.transform);
      logits.at(target, first, [&](int i) { values[i] = 0.0f; });
    }
    logits.store(a.out, row, a.whole, first, values);
  }
}

}  // namespace fastd2o::cuda
