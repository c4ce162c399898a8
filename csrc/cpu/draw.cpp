// draw: one of k candidates per token, from their softmax, by Philox at (seed, counter); docs/engine.md, "The draw, exactly".
//
// values [T, k] float32 and index [T, k] int64 in any order, counter [T] int64 -> positive [T] int64, positive_logit [T] float32.
// Work: a sort of k candidates and k exponentials a token.
#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/tensors.h"
#include "philox.h"

namespace fastd2o {
namespace {

std::tuple<Tensor, Tensor> draw(Tensor values, Tensor index, Tensor counter, int64_t seed) {
  check_dtype("draw", "values", values, {ScalarType::Float});
  check_dtype("draw", "index", index, {ScalarType::Long});
  check_dtype("draw", "counter", counter, {ScalarType::Long});
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) >= 1 && values.is_contiguous() && index.dim() == 2 &&
                      index.size(0) == values.size(0) && index.size(1) == values.size(1) && index.is_contiguous(),
                  "draw: expected values and index as contiguous [T, k], k of at least 1");
  STD_TORCH_CHECK(counter.dim() == 1 && counter.size(0) == values.size(0), "draw: expected counter as [", values.size(0), "]");
  const int64_t tokens = values.size(0), k = values.size(1), stride = counter.stride(0);
  Tensor positive = torch::stable::empty({tokens}, ScalarType::Long), logit = torch::stable::empty({tokens}, ScalarType::Float);
  const float* const all_values = static_cast<const float*>(values.const_data_ptr());
  const int64_t* const all_indices = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t* const counters = static_cast<const int64_t*>(counter.const_data_ptr());
  int64_t* const positives = static_cast<int64_t*>(positive.mutable_data_ptr());
  float* const logits = static_cast<float*>(logit.mutable_data_ptr());
  parallel_for(tokens, 256, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(k);
    std::vector<float> ordered(k);
    for (int64_t t = begin; t < end; t++) {
      const float* const candidates = all_values + t * k;
      const int64_t* const indices = all_indices + t * k;
      for (int64_t i = 0; i < k; i++) keys[i] = rank_key(candidates[i], static_cast<uint32_t>(indices[i]));
      std::sort(keys.begin(), keys.end(), std::greater<>());
      std::transform(keys.begin(), keys.end(), ordered.begin(), key_logit);
      const float uniform = philox_uniform(static_cast<uint64_t>(seed), static_cast<uint64_t>(counters[t * stride]));
      const int drawn = drawn_candidate(ordered.data(), static_cast<int>(k), uniform);
      positives[t] = drawn < 0 ? -1 : static_cast<int64_t>(key_column(keys[drawn]));
      logits[t] = ordered[drawn < 0 ? 0 : drawn];
    }
  });
  return {positive, logit};
}

}  // namespace
}  // namespace fastd2o

STABLE_TORCH_LIBRARY_IMPL(fastd2o_native, CPU, m) {
  m.impl("draw", TORCH_BOX(&fastd2o::draw));
}
