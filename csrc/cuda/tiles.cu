// The CUDA side of fold_, grad_, topk_ and draw (csrc/schema.cpp): checks and grid from launch.h, one launch on torch's
// current stream, no synchronisation, no memory of its own but draw's results. The kernels have a header each.
#include "cuda/draw.cuh"
#include "cuda/fold.cuh"
#include "cuda/grad.cuh"
#include "cuda/stable_tensor.h"
#include "cuda/topk.cuh"

namespace fastd2o::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <typename Arguments>
void run(void (*kernel)(Arguments), const Launch<Arguments>& launch, const Tensor& on) {
  if (launch.grid.blocks == 0) return;
  const DeviceGuard guard(on.get_device_index());
  const dim3 block(launch.grid.row_threads, launch.grid.rows);
  kernel<<<launch.grid.blocks, block, 0, current_stream(on)>>>(launch.arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void fold(Tensor logits, Tensor target, int64_t vocab_start, Tensor max, Tensor sum, Tensor target_logit,
          Tensor rescale, std::optional<Tensor> weights, std::optional<Tensor> weighted, std::optional<Tensor> argmax,
          std::optional<Tensor> total, double logit_scale, std::optional<double> softcap, double temperature) {
  const FoldTensors tensors{view_of(logits),       view_of(target),  view_of(max),     view_of(sum),
                            view_of(target_logit), view_of(rescale), view_of(weights), view_of(weighted),
                            view_of(argmax),       view_of(total)};
  const auto launch = plan_fold(tensors, vocab_start, LogitTransform::of(logit_scale, softcap, temperature));
  const Dtype dtype = tensors.logits.dtype;
  run(weighted ? of_dtype(dtype, fold_kernel<float, true>, fold_kernel<BFloat16, true>, fold_kernel<Half, true>)
               : of_dtype(dtype, fold_kernel<float, false>, fold_kernel<BFloat16, false>, fold_kernel<Half, false>),
      launch, logits);
}

void grad(Tensor out, Tensor logits, Tensor target, int64_t vocab_start, Tensor lse_others, Tensor coef,
          double logit_scale, std::optional<double> softcap, double temperature) {
  const GradTensors tensors{view_of(out), view_of(logits), view_of(target), view_of(lse_others), view_of(coef)};
  const auto launch = plan_grad(tensors, vocab_start, LogitTransform::of(logit_scale, softcap, temperature));
  run(of_dtype(tensors.logits.dtype, grad_kernel<float>, grad_kernel<BFloat16>, grad_kernel<Half>), launch, logits);
}

void topk(Tensor logits, Tensor target, int64_t vocab_start, Tensor values, Tensor index, double logit_scale,
          std::optional<double> softcap, double temperature) {
  const TopKTensors tensors{view_of(logits), view_of(target), view_of(values), view_of(index)};
  const auto launch = plan_topk(tensors, vocab_start, LogitTransform::of(logit_scale, softcap, temperature));
  run(of_dtype(tensors.logits.dtype, topk_kernel<float>, topk_kernel<BFloat16>, topk_kernel<Half>), launch, logits);
}

std::tuple<Tensor, Tensor> draw(Tensor values, Tensor index, Tensor counter, int64_t seed) {
  auto launch = plan_draw({view_of(values), view_of(index), view_of(counter)}, seed);
  Tensor positive = torch::stable::new_empty(values, {launch.arguments.tokens}, ScalarType::Long);
  Tensor positive_logit = torch::stable::new_empty(values, {launch.arguments.tokens}, ScalarType::Float);
  launch.arguments.positive = static_cast<int64_t*>(positive.data_ptr());
  launch.arguments.positive_logit = static_cast<float*>(positive_logit.data_ptr());
  run(draw_kernel, launch, values);
  return {positive, positive_logit};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastd2o_native, CUDA, m) {
  m.impl("fold_", TORCH_BOX(&fold));
  m.impl("grad_", TORCH_BOX(&grad));
  m.impl("topk_", TORCH_BOX(&topk));
  m.impl("draw", TORCH_BOX(&draw));
}

}  // namespace fastd2o::cuda
