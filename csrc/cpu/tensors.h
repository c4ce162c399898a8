// What the kernels of this folder share: LibTorch's tensors under short names, their checks, and the loop over threads.
#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace fastd2o {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using at::get_num_threads;

// f(begin, end) over [0, length), in pieces of at least `grain`, on torch's threads.
template <typename F>
void parallel_for(int64_t length, int64_t grain, const F& f) {
  at::parallel_for(0, length, grain, f);
}

// Uninitialised memory from torch's allocator, so that whoever counts allocations counts it.
inline Tensor scratch(int64_t bytes) {
  return torch::stable::empty({bytes}, ScalarType::Byte);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, std::initializer_list<ScalarType> expected) {
  for (const ScalarType dtype : expected) {
    if (tensor.scalar_type() == dtype) return;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()), ", which it does not take");
}

// A matrix of contiguous rows, at any distance from each other, but apart where they are written.
inline void check_rows(const char* op, const char* name, const Tensor& tensor, bool written) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), op, ": expected ", name,
                  " as a matrix whose rows are contiguous");
  STD_TORCH_CHECK(!written || tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1), op, ": the rows of ", name,
                  " overlap, and are written");
}

}  // namespace fastd2o
