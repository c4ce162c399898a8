// The CUDA side of the operator `loss` (csrc/schema.cpp): checks from loss.h, one launch of loss.cuh on torch's current stream, no
// synchronisation, no memory of its own but the results. Stable ABI.
#include "cuda/loss.cuh"

#include <algorithm>

#include "cuda/stable_tensor.h"
#include "loss.h"

namespace fastd2o::objectives {
namespace {

constexpr int64_t kMostBlocks = 65536;

std::tuple<Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& token_logp, const std::optional<Tensor>& token_cringe, const Tensor& sequence_start,
    const Tensor& group_start, const Tensor& positive, const std::optional<Tensor>& ref_logp, std::string objective,
    std::vector<double> parameters) {
  STD_TORCH_CHECK(token_logp.is_cuda(), "loss: token_logp is not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(token_logp.get_device_index());
  const Call call =
      checked_call(token_logp, token_cringe, sequence_start, group_start, positive, ref_logp, objective, parameters);
  if (call.batch.groups == 0) return call.results();
  const auto blocks = static_cast<unsigned>(std::min(call.batch.groups, kMostBlocks));
  loss_kernel<<<blocks, kThreads, 0, cuda::current_stream(token_logp)>>>(call.objective, call.batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastd2o_native, CUDA, m) { m.impl("loss", TORCH_BOX(&loss)); }

}  // namespace fastd2o::objectives
