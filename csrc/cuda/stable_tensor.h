// Between torch's stable ABI and the kernels: what launch.h wants to know of a tensor, and the stream to launch on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/launch.h"

namespace fastd2o::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline TensorView view_of(const Tensor& tensor) {
  TensorView view{};
  view.dim = static_cast<int32_t>(tensor.dim());
  view.device = tensor.is_cuda() ? tensor.get_device_index() : -1;
  for (int32_t d = 0; d < view.dim && d < 2; ++d) {
    view.size[d] = tensor.size(d);
    view.stride[d] = tensor.stride(d);
  }
  switch (tensor.scalar_type()) {
    case ScalarType::Float: view.dtype = Dtype::kFloat32; break;
    case ScalarType::BFloat16: view.dtype = Dtype::kBFloat16; break;
    case ScalarType::Half: view.dtype = Dtype::kFloat16; break;
    case ScalarType::Long: view.dtype = Dtype::kInt64; break;
    default: view.dtype = Dtype::kOther;
  }
  view.data = tensor.data_ptr();
  return view;
}

inline OptionalView view_of(const std::optional<Tensor>& tensor) {
  return tensor ? OptionalView(view_of(*tensor)) : std::nullopt;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastd2o::cuda
