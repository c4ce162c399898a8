// The CUDA kernel of `loss` on tensors of the CPU, in the emulator, as torch.ops.fastd2o_emulated.loss.
#include "ops/cuda_emulator.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __grid_constant__
static emulator::Index gridDim;

#include "cuda/loss.cuh"
#include "loss.h"

namespace fastd2o::objectives {
namespace {

// `blocks` of the grid; `order` in which threads take their turns.
std::tuple<Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& token_logp, const std::optional<Tensor>& token_cringe, const Tensor& sequence_start,
    const Tensor& group_start, const Tensor& positive, const std::optional<Tensor>& ref_logp, std::string objective,
    std::vector<double> parameters, int64_t blocks, int64_t order) {
  const Call call =
      checked_call(token_logp, token_cringe, sequence_start, group_start, positive, ref_logp, objective, parameters);
  gridDim = {static_cast<unsigned>(blocks), 1};
  emulator::launch(gridDim.x, kThreads, 1, static_cast<uint32_t>(order), [&] { loss_kernel(call.objective, call.batch); });
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY(fastd2o_emulated, m) {
  m.def(
      "loss(Tensor token_logp, Tensor? token_cringe, Tensor sequence_start, Tensor group_start, Tensor positive, "
      "Tensor? ref_logp, str objective, float[] parameters, int blocks, int order) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastd2o_emulated, CPU, m) { m.impl("loss", TORCH_BOX(&loss)); }

}  // namespace fastd2o::objectives
