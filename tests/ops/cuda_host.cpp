// What csrc/cuda decides and computes, behind a C interface for test_cuda_host.py: the host side of every launch, the
// scalar arithmetic, and the kernels themselves in the emulator.
#include "cuda_emulator.h"

#include "cuda/draw.cuh"
#include "cuda/fold.cuh"
#include "cuda/grad.cuh"
#include "cuda/topk.cuh"

using namespace fastd2o;
using namespace fastd2o::cuda;

namespace {

std::string last_error;

// What an operator would do: nullptr, or why it refuses.
template <typename F>
const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

OptionalView given(const TensorView* view) { return view ? OptionalView(*view) : std::nullopt; }

LogitTransform transform_of(const double* t) {
  return LogitTransform::of(t[0], std::isnan(t[1]) ? std::nullopt : std::optional<double>(t[1]), t[2]);
}

FoldTensors fold_tensors(const TensorView* const* v) {
  return {*v[0], *v[1], *v[2], *v[3], *v[4], *v[5], given(v[6]), given(v[7]), given(v[8]), given(v[9])};
}

template <typename Arguments>
void run(void (*kernel)(Arguments), const Launch<Arguments>& launch, uint32_t order) {
  const Grid& grid = launch.grid;
  emulator::launch(grid.blocks, grid.row_threads, grid.rows, order, [&] { kernel(launch.arguments); });
}

void write(const Grid& grid, int64_t* out) {
  out[0] = grid.blocks;
  out[1] = grid.row_threads;
  out[2] = grid.rows;
}

}  // namespace

extern "C" {

// `transform` is logit_scale, softcap (NaN for none), temperature. `order` of the emulated threads, or -1: only plan.
// `grid` receives blocks, threads of a row, rows of a block; and whether vectors are stored whole.

const char* fold(const TensorView* const* views, int64_t vocab_start, const double* transform, int64_t order,
                 int64_t* grid) {
  return guarded([&] {
    const auto launch = plan_fold(fold_tensors(views), vocab_start, transform_of(transform));
    write(launch.grid, grid);
    grid[3] = launch.arguments.whole;
    if (order < 0) return;
    const Dtype dtype = views[0]->dtype;
    run(views[7] ? of_dtype(dtype, fold_kernel<float, true>, fold_kernel<BFloat16, true>, fold_kernel<Half, true>)
                 : of_dtype(dtype, fold_kernel<float, false>, fold_kernel<BFloat16, false>, fold_kernel<Half, false>),
        launch, static_cast<uint32_t>(order));
  });
}

const char* grad(const TensorView* const* v, int64_t vocab_start, const double* transform, int64_t order,
                 int64_t* grid) {
  return guarded([&] {
    const auto launch = plan_grad({*v[0], *v[1], *v[2], *v[3], *v[4]}, vocab_start, transform_of(transform));
    write(launch.grid, grid);
    grid[3] = launch.arguments.whole;
    if (order < 0) return;
    run(of_dtype(v[1]->dtype, grad_kernel<float>, grad_kernel<BFloat16>, grad_kernel<Half>), launch,
        static_cast<uint32_t>(order));
  });
}

const char* topk(const TensorView* const* v, int64_t vocab_start, const double* transform, int64_t order,
                 int64_t* grid) {
  return guarded([&] {
    const auto launch = plan_topk({*v[0], *v[1], *v[2], *v[3]}, vocab_start, transform_of(transform));
    write(launch.grid, grid);
    if (order < 0) return;
    run(of_dtype(v[0]->dtype, topk_kernel<float>, topk_kernel<BFloat16>, topk_kernel<Half>), launch,
        static_cast<uint32_t>(order));
  });
}

const char* draw(const TensorView* const* v, int64_t seed, int64_t* positive, float* logit, int64_t order,
                 int64_t* grid) {
  return guarded([&] {
    auto launch = plan_draw({*v[0], *v[1], *v[2]}, seed);
    launch.arguments.positive = positive;
    launch.arguments.positive_logit = logit;
    write(launch.grid, grid);
    if (order >= 0) run(draw_kernel, launch, static_cast<uint32_t>(order));
  });
}

// The scalar arithmetic, over n numbers.

void transform_each(const float* raw, int64_t n, const double* transform, float* z, float* bends) {
  const LogitTransform t = transform_of(transform);
  for (int64_t i = 0; i < n; ++i) {
    z[i] = transformed(raw[i], t);
    bends[i] = bend(raw[i], t);
  }
}

// Folds z in pieces that end at `ends`, each relative to its maximum, and leaves max, sum, weighted.
void fold_pieces(const float* z, const int64_t* ends, int64_t pieces, float* out) {
  OnlineSums all = OnlineSums::none();
  for (int64_t p = 0, i = 0; p < pieces; ++p) {
    float max = all.max;
    for (int64_t j = i; j < ends[p]; ++j) max = max_or_nan(max, z[j]);
    all = all.relative_to(max);
    for (; i < ends[p]; ++i) all.add(z[i]);
  }
  out[0] = all.max;
  out[1] = all.sum;
  out[2] = all.weighted;
}

void key_each(const float* z, const uint32_t* column, int64_t n, uint64_t* key, float* z_back, uint32_t* column_back) {
  for (int64_t i = 0; i < n; ++i) {
    key[i] = rank_key(z[i], column[i]);
    z_back[i] = key_logit(key[i]);
    column_back[i] = key_column(key[i]);
  }
}

void philox_each(uint64_t seed, const uint64_t* counter, int64_t n, uint32_t* words, float* uniform) {
  for (int64_t i = 0; i < n; ++i) {
    const PhiloxWords w = philox_4x32(seed, counter[i]);
    const uint32_t each[4] = {w.x, w.y, w.z, w.w};
    std::copy(each, each + 4, words + 4 * i);
    uniform[i] = philox_uniform(seed, counter[i]);
  }
}

int drawn(const float* ordered, int k, float u) { return drawn_candidate(ordered, k, u); }
}
