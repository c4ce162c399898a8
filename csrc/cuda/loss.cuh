// loss [G] and the derivatives of every group's loss, from token log-probabilities: csrc/objectives.h on CUDA, in one launch.
//
// Tensors as csrc/schema.cpp says, contiguous. A block works on a group, and takes another when there are more groups than blocks;
// a warp sums up a sequence. Sums go from lane to lane and from warp to warp in one order: no atomics, the same bits on every run.
// Nothing is read back to the host. K is bounded by nothing: what the block's threads tell each other of its sequences goes
// through sequence_logp and cringe_coef in global memory.
//
// Work: N additions and some 100 operations a sequence. Bytes: 4 N (8 N with token_cringe) + about 50 S. What eager code pays for
// the same are several dozen launches.
#pragma once

#include "objectives.h"

namespace fastd2o::objectives {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr unsigned kAll = 0xffffffff;

// The team of a block.
struct Block {
  double* of_warp;  // [kWarps], shared

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kThreads; }
  __device__ int squad() const { return threadIdx.x / kLanes; }
  __device__ int squads() const { return kWarps; }
  __device__ bool leads_squad() const { return threadIdx.x % kLanes == 0; }
  __device__ void sync() const { __syncthreads(); }

  // The sum over all threads, for all threads.
  __device__ double sum(double value) const {
    for (int half = kLanes / 2; half > 0; half /= 2) value += __shfl_xor_sync(kAll, value, half);
    if (leads_squad()) of_warp[squad()] = value;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += of_warp[warp];
    __syncthreads();  // of_warp may be written again
    return total;
  }

  // The sum over a sequence, by a warp: the order of Single::sum_tokens.
  __device__ float sum_tokens(const float* tokens, int64_t length) const {
    float part = 0;
#pragma unroll 8
    for (int64_t t = threadIdx.x % kLanes; t < length; t += kLanes) part += tokens[t];
    for (int half = kLanes / 2; half > 0; half /= 2) part += __shfl_xor_sync(kAll, part, half);
    return part;
  }
};

// One block on a multiprocessor would do: left to aim for more, nvcc saves registers until it spills.
__global__ void __launch_bounds__(kThreads, 1)
    loss_kernel(const __grid_constant__ Objective objective, const __grid_constant__ Batch batch) {
  __shared__ double of_warp[kWarps];
  for (int64_t group = blockIdx.x; group < batch.groups; group += gridDim.x) group_loss(Block{of_warp}, objective, batch, group);
}

}  // namespace fastd2o::objectives
