// fold_, grad_ and topk_ on a tile of float32 logits that is still in cache, and scale_ on softmax weights that were kept;
// contract: fastd2o/ops/tile_ops.py.
//
// logits [T, N] float32, rows contiguous. weights and out [T, N] float32, bfloat16 or float16.
//
// Work per logit: fold_ reads it twice, the second time from the first-level cache: a maximum, then a subtraction, an exponential
// (15 instructions for a register of them) and an addition. grad_ reads it once; scale_ is a multiplication. Bytes: a read of
// the tile, and a write where weights or gradients are wanted; scale_ reads from memory. One thread takes whole rows, so the
// bits do not depend on how many threads there are.
//
// Written once in at::vec, compiled for AVX-512, AVX2 and for any machine.
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/tensors.h"

namespace fastd2o {
namespace {

using at::BFloat16;
using at::Half;
using Vec = at::vec::Vectorized<float>;
using Int = at::vec::Vectorized<int32_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGrain = 32 * 1024;  // logits that are worth a thread's start

// exp(x) for x <= 0 and a little above, within 1.5 units in the last place; 0 below the smallest normal number, NaN for NaN.
// 2^n p(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; the coefficients are those of Cephes' expf.
Vec exp_of(const Vec& x) {
  const Vec magic(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it leaves n + 127 in the low bits, where 2^n has its exponent
  const Vec shifted = at::vec::fmadd(x, Vec(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = at::vec::fmadd(n, Vec(-0.693359375f), x);
  r = at::vec::fmadd(n, Vec(2.12194440e-4f), r);
  Vec p(1.9875691500e-4f);
  p = at::vec::fmadd(p, r, Vec(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r) + Vec(1.0f);
  const Vec power = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Int(23));
  return Vec::blendv(p * power, Vec(0.0f), x < Vec(-87.33f));
}

// z = softcap(logit_scale * u) / temperature, as LogitTransform in tile_ops.py.
class Transform {
 public:
  Transform(double logit_scale, std::optional<double> softcap, double temperature)
      : slope_(logit_scale / temperature),
        capped_(softcap.has_value()),
        inner_(logit_scale / softcap.value_or(1.0)),
        outer_(softcap.value_or(1.0) / temperature) {}

  bool capped() const { return capped_; }
  bool identity() const { return !capped_ && slope_ == 1.0f; }

  Vec operator()(const Vec& u) const {
    if (identity()) return u;
    const Vec z = capped_ ? (u * Vec(inner_)).tanh() * Vec(outer_) : u * Vec(slope_);
    return Vec::blendv(z, Vec(-kInfinity), u == Vec(-kInfinity));  // padding, whatever a cap or a sign would make of it
  }

  // The cap's slope, 1 - tanh^2(x) = 4 e / (1 + e)^2 with e = exp(-2|x|), which does not cancel where the cap saturates.
  Vec bend(const Vec& u) const {
    const Vec e = exp_of((u * Vec(inner_)).abs() * Vec(-2.0f));
    const Vec sum = e + Vec(1.0f);
    return Vec(4.0f) * e / (sum * sum);
  }

 private:
  float slope_;
  bool capped_;
  float inner_, outer_;
};

// The last columns of a row, made up to a register with -inf, which takes part in nothing.
Vec load(const float* from, int64_t count) {
  if (count >= Vec::size()) return Vec::loadu(from);
  float padded[Vec::size()];
  std::fill_n(padded, Vec::size(), -kInfinity);
  std::copy_n(from, count, padded);
  return Vec::loadu(padded);
}

// Two registers of a row; what they have beyond it is anything.
template <typename T>
std::tuple<Vec, Vec> load_two(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return {load(from, count), count > Vec::size() ? load(from + Vec::size(), count - Vec::size()) : Vec(0.0f)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, std::min<int64_t>(count, 2 * Vec::size())));
  }
}

template <typename T>
void store(T* to, const Vec& low, const Vec& high, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    low.store(to, std::min<int64_t>(count, Vec::size()));
    if (count > Vec::size()) high.store(to + Vec::size(), std::min<int64_t>(count - Vec::size(), Vec::size()));
  } else {
    at::vec::convert_from_float<T>(low, high).store(to, std::min<int64_t>(count, 2 * Vec::size()));
  }
}

float largest(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }, values);
}

float total(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, values);
}

// The target's position in a tile, or -1 where it lies in another. Without a sign, because a difference may overflow.
int64_t position_of(int64_t target, int64_t vocab_start, int64_t columns) {
  const uint64_t position = static_cast<uint64_t>(target) - static_cast<uint64_t>(vocab_start);
  return position < static_cast<uint64_t>(columns) ? static_cast<int64_t>(position) : -1;
}

// A column of per-token state, [T, 1] with any distance between its entries.
template <typename T>
struct Column {
  T* data = nullptr;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
  T& operator[](int64_t row) const { return data[row * stride]; }
};

template <typename T>
Column<T> column(const char* op, const char* name, const Tensor& tensor, int64_t tokens) {
  check_dtype(op, name, tensor, {std::is_same_v<std::remove_const_t<T>, float> ? ScalarType::Float : ScalarType::Long});
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == tokens && tensor.size(1) == 1, op, ": expected ", name, " as [", tokens,
                  ", 1]");
  STD_TORCH_CHECK(std::is_const_v<T> || tokens <= 1 || tensor.stride(0) != 0, op, ": the rows of ", name,
                  " are one and the same, and are written");
  if constexpr (std::is_const_v<T>) return {static_cast<T*>(tensor.const_data_ptr()), tensor.stride(0)};
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(tensor.mutable_data_ptr()))), tensor.stride(0)};
}

template <typename T>
Column<T> column(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t tokens) {
  return tensor ? column<T>(op, name, *tensor, tokens) : Column<T>{};
}

void check_tile(const char* op, const char* name, const Tensor& tile, const Tensor& logits) {
  check_dtype(op, name, tile, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_rows(op, name, tile, true);
  STD_TORCH_CHECK(tile.size(0) == logits.size(0) && tile.size(1) == logits.size(1), op, ": expected ", name, " of logits' shape [",
                  logits.size(0), ", ", logits.size(1), "]");
  const bool same = tile.scalar_type() == ScalarType::Float && (tile.size(0) <= 1 || tile.stride(0) == logits.stride(0));
  STD_TORCH_CHECK(same || tile.numel() == 0 || tile.const_data_ptr() != logits.const_data_ptr(), op, ": ", name,
                  " shares memory with logits but has another dtype or row stride");
}

void check_logits(const char* op, const Tensor& logits, int64_t vocab_start, bool written) {
  check_dtype(op, "logits", logits, {ScalarType::Float});
  check_rows(op, "logits", logits, written);
  STD_TORCH_CHECK(vocab_start >= 0 && vocab_start <= UINT32_MAX - logits.size(1), op, ": vocab_start is ", vocab_start,
                  ", expected columns in [0, 2^32)");
}

// Rows that are worth a thread's start.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

struct Fold {
  Transform transform;
  int64_t columns, vocab_start;
  Column<const int64_t> target;
  Column<float> max, sum, target_logit, rescale, weighted, total_logit;
  Column<int64_t> argmax;

  template <typename Weight>
  void row(int64_t t, float* logits, Weight* weights, float* bends) const {
    if (!transform.identity()) {
      for (int64_t i = 0; i < columns; i += Vec::size()) {
        const int64_t count = std::min<int64_t>(Vec::size(), columns - i);
        const Vec raw = load(logits + i, count);
        if (weights && transform.capped()) transform.bend(raw).store(bends + i, count);
        transform(raw).store(logits + i, count);
      }
    }
    if (total_logit) {
      Vec sum_logits(0.0f);
      for (int64_t i = 0; i < columns; i += Vec::size()) {
        const Vec z = load(logits + i, columns - i);
        sum_logits = sum_logits + Vec::blendv(z, Vec(0.0f), z == Vec(-kInfinity));
      }
      total_logit[t] += total(sum_logits);
    }
    const int64_t position = position_of(target[t], vocab_start, columns);
    if (position >= 0) {
      target_logit[t] = logits[position];
      logits[position] = -kInfinity;
    }

    Vec best[4] = {Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity)};
    int64_t i = 0;
    for (; i + 4 * Vec::size() <= columns; i += 4 * Vec::size()) {
      for (int v = 0; v < 4; v++) best[v] = at::vec::clamp_min(Vec::loadu(logits + i + v * Vec::size()), best[v]);
    }
    for (; i < columns; i += Vec::size()) best[0] = at::vec::clamp_min(load(logits + i, columns - i), best[0]);
    for (int v = 1; v < 4; v++) best[0] = at::vec::clamp_min(best[v], best[0]);
    const float tile_max = largest(best[0]), old_max = max[t], old_sum = sum[t];
    const float new_max = std::max(old_max, tile_max);
    // While every logit so far is -inf, shifting by it would make NaN of them; by 0 it makes the zeros they are.
    const float shift = new_max == -kInfinity ? 0.0f : new_max;
    const float factor = std::exp(old_max - shift);

    // Before weights are written, perhaps over the logits.
    if (argmax && tile_max > old_max) argmax[t] = vocab_start + (std::find(logits, logits + columns, tile_max) - logits);

    const Vec shift_vector(shift);
    Vec sums[2] = {Vec(0.0f), Vec(0.0f)}, weighted_sums(0.0f);
    for (i = 0; i < columns; i += 2 * Vec::size()) {
      Vec exponential[2];
      for (int v = 0; v < 2; v++) {
        const int64_t start = i + v * Vec::size();
        const Vec difference = (start < columns ? load(logits + start, columns - start) : Vec(-kInfinity)) - shift_vector;
        exponential[v] = exp_of(difference);
        sums[v] = sums[v] + exponential[v];
        if (weighted) {  // 0 * -inf is the 0 it tends to
          const Vec product = exponential[v] * difference;
          weighted_sums = weighted_sums + Vec::blendv(product, Vec(0.0f), difference == Vec(-kInfinity));
        }
        if (weights && transform.capped() && start < columns) {
          exponential[v] = exponential[v] * load(bends + start, columns - start);
        }
      }
      if (weights) store(weights + i, exponential[0], exponential[1], columns - i);
    }
    if (weighted) {
      // What was gathered relative to the old maximum moves along; where it counts for nothing it may have overflowed.
      const float moved = weighted[t] + (old_sum > 0 ? old_sum * (old_max - shift) : 0.0f);
      weighted[t] = (factor == 0 ? 0.0f : moved * factor) + total(weighted_sums);
    }
    sum[t] = old_sum * factor + total(sums[0] + sums[1]);
    max[t] = new_max;
    rescale[t] = factor;
  }

  template <typename Weight>
  void run(const Tensor& logits, const std::optional<Tensor>& weights) const {
    float* const rows = static_cast<float*>(logits.mutable_data_ptr());
    Weight* const weight_rows = weights ? static_cast<Weight*>(weights->mutable_data_ptr()) : nullptr;
    const int64_t stride = logits.stride(0), weight_stride = weights ? weights->stride(0) : 0;
    parallel_for(logits.size(0), grain(columns), [&](int64_t begin, int64_t end) {
      std::vector<float> bends(weights && transform.capped() ? columns : 0);
      for (int64_t t = begin; t < end; t++) {
        row(t, rows + t * stride, weight_rows ? weight_rows + t * weight_stride : nullptr, bends.data());
      }
    });
  }
};

void fold_(Tensor logits, Tensor target, int64_t vocab_start, Tensor max, Tensor sum, Tensor target_logit, Tensor rescale,
           std::optional<Tensor> weights, std::optional<Tensor> weighted, std::optional<Tensor> argmax,
           std::optional<Tensor> total_logit, double logit_scale, std::optional<double> softcap, double temperature) {
  constexpr const char* op = "fold_";
  check_logits(op, logits, vocab_start, true);
  const int64_t tokens = logits.size(0);
  STD_TORCH_CHECK(weighted.has_value() == argmax.has_value() && weighted.has_value() == total_logit.has_value(),
                  "fold_: weighted, argmax and total are statistics: pass all three, or none");
  const Fold fold{Transform(logit_scale, softcap, temperature),
                  logits.size(1),
                  vocab_start,
                  column<const int64_t>(op, "target", target, tokens),
                  column<float>(op, "max", max, tokens),
                  column<float>(op, "sum", sum, tokens),
                  column<float>(op, "target_logit", target_logit, tokens),
                  column<float>(op, "rescale", rescale, tokens),
                  column<float>(op, "weighted", weighted, tokens),
                  column<float>(op, "total", total_logit, tokens),
                  column<int64_t>(op, "argmax", argmax, tokens)};
  if (weights) check_tile(op, "weights", *weights, logits);
  if (tokens == 0) return;
  const ScalarType dtype = weights ? weights->scalar_type() : ScalarType::Float;
  if (dtype == ScalarType::Float) return fold.run<float>(logits, weights);
  if (dtype == ScalarType::BFloat16) return fold.run<BFloat16>(logits, weights);
  fold.run<Half>(logits, weights);
}

template <typename Out>
void grad_rows(const Tensor& out, const Tensor& logits, const Column<const int64_t>& target, int64_t vocab_start,
               const Column<const float>& lse_others, const Column<const float>& coef, const Transform& transform) {
  const float* const rows = static_cast<const float*>(logits.const_data_ptr());
  Out* const out_rows = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t columns = logits.size(1), stride = logits.stride(0), out_stride = out.stride(0);
  parallel_for(logits.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* const row = rows + t * stride;
      Out* const out_row = out_rows + t * out_stride;
      if (coef[t] == 0) {
        std::fill_n(out_row, columns, Out(0.0f));
        continue;
      }
      // A token whose other logits are all -inf has no softmax over them; shifting by 0 leaves their exponentials at 0.
      const Vec shift(lse_others[t] == -kInfinity ? 0.0f : lse_others[t]), factor(-coef[t]);
      for (int64_t i = 0; i < columns; i += 2 * Vec::size()) {
        Vec gradient[2];
        for (int v = 0; v < 2; v++) {
          const int64_t start = i + v * Vec::size();
          if (start >= columns) break;
          const Vec raw = load(row + start, columns - start);
          gradient[v] = exp_of(transform(raw) - shift) * factor;
          if (transform.capped()) gradient[v] = gradient[v] * transform.bend(raw);
        }
        store(out_row + i, gradient[0], gradient[1], columns - i);
      }
      const int64_t position = position_of(target[t], vocab_start, columns);
      if (position >= 0) out_row[position] = Out(0.0f);
    }
  });
}

void grad_(Tensor out, Tensor logits, Tensor target, int64_t vocab_start, Tensor lse_others, Tensor coef, double logit_scale,
           std::optional<double> softcap, double temperature) {
  constexpr const char* op = "grad_";
  check_logits(op, logits, vocab_start, false);
  check_tile(op, "out", out, logits);
  const int64_t tokens = logits.size(0);
  const auto targets = column<const int64_t>(op, "target", target, tokens);
  const auto lse = column<const float>(op, "lse_others", lse_others, tokens);
  const auto coefs = column<const float>(op, "coef", coef, tokens);
  const Transform transform(logit_scale, softcap, temperature);
  if (logits.numel() == 0) return;
  if (out.scalar_type() == ScalarType::Float) {
    return grad_rows<float>(out, logits, targets, vocab_start, lse, coefs, transform);
  }
  if (out.scalar_type() == ScalarType::BFloat16) {
    return grad_rows<BFloat16>(out, logits, targets, vocab_start, lse, coefs, transform);
  }
  grad_rows<Half>(out, logits, targets, vocab_start, lse, coefs, transform);
}

template <typename Number>
void scale_rows(const Tensor& out, const Tensor& weights, const Column<const float>& scale) {
  const Number* const rows = static_cast<const Number*>(weights.const_data_ptr());
  Number* const out_rows = static_cast<Number*>(out.mutable_data_ptr());
  const int64_t columns = weights.size(1), stride = weights.stride(0), out_stride = out.stride(0);
  parallel_for(weights.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const Vec factor(scale[t]);
      for (int64_t i = 0; i < columns; i += 2 * Vec::size()) {
        const auto [low, high] = load_two(rows + t * stride + i, columns - i);
        store(out_rows + t * out_stride + i, low * factor, high * factor, columns - i);
      }
    }
  });
}

void scale_(Tensor out, Tensor weights, Tensor scale) {
  constexpr const char* op = "scale_";
  check_dtype(op, "weights", weights, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_dtype(op, "out", out, {weights.scalar_type()});
  check_rows(op, "weights", weights, false);
  check_rows(op, "out", out, true);
  STD_TORCH_CHECK(out.size(0) == weights.size(0) && out.size(1) == weights.size(1), op, ": expected out of weights' shape [",
                  weights.size(0), ", ", weights.size(1), "]");
  STD_TORCH_CHECK(out.numel() == 0 || out.const_data_ptr() != weights.const_data_ptr() || out.size(0) <= 1 ||
                      out.stride(0) == weights.stride(0),
                  op, ": out shares memory with weights but has another row stride");
  const auto factors = column<const float>(op, "scale", scale, weights.size(0));
  if (weights.numel() == 0) return;
  if (weights.scalar_type() == ScalarType::Float) return scale_rows<float>(out, weights, factors);
  if (weights.scalar_type() == ScalarType::BFloat16) return scale_rows<BFloat16>(out, weights, factors);
  scale_rows<Half>(out, weights, factors);
}

// Whether a logit ranks above another. NaN ranks above all others, so that it is seen.
bool above(float a, float b) {
  return a > b || (std::isnan(a) && !std::isnan(b));
}

// Put a logit where it belongs among the k largest, kept largest first.
void insert(float value, int64_t index, float* values, int64_t* indices, int64_t k) {
  int64_t place = k - 1;
  for (; place > 0 && above(value, values[place - 1]); place--) {
    values[place] = values[place - 1];
    indices[place] = indices[place - 1];
  }
  values[place] = value;
  indices[place] = index;
}

void topk_(Tensor logits, Tensor target, int64_t vocab_start, Tensor values, Tensor index, double logit_scale,
           std::optional<double> softcap, double temperature) {
  constexpr const char* op = "topk_";
  check_logits(op, logits, vocab_start, false);
  check_dtype(op, "values", values, {ScalarType::Float});
  check_dtype(op, "index", index, {ScalarType::Long});
  const int64_t tokens = logits.size(0), columns = logits.size(1), k = values.dim() == 2 ? values.size(1) : 0;
  STD_TORCH_CHECK(k >= 1 && values.size(0) == tokens && values.is_contiguous() && index.dim() == 2 && index.size(0) == tokens &&
                      index.size(1) == k && index.is_contiguous(),
                  "topk_: expected values and index as contiguous [", tokens, ", k], k of at least 1");
  const auto targets = column<const int64_t>(op, "target", target, tokens);
  const Transform transform(logit_scale, softcap, temperature);
  if (logits.numel() == 0) return;
  const float* const rows = static_cast<const float*>(logits.const_data_ptr());
  float* const best_values = static_cast<float*>(values.mutable_data_ptr());
  int64_t* const best_indices = static_cast<int64_t*>(index.mutable_data_ptr());
  const int64_t stride = logits.stride(0);
  constexpr int64_t kBlock = 8 * Vec::size();
  parallel_for(tokens, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* const row = rows + t * stride;
      float* const best = best_values + t * k;
      int64_t* const indices = best_indices + t * k;
      const int64_t excluded = position_of(targets[t], vocab_start, columns);
      for (int64_t i = 0; i < columns; i += kBlock) {
        // Blocks without a logit above the k-th largest so far, nearly all of them, end here. "Not at most" takes NaN along.
        const int64_t block_end = std::min(i + kBlock, columns);
        Vec at_most = transform(load(row + i, columns - i)) <= Vec(best[k - 1]);
        for (int64_t j = i + Vec::size(); j < block_end; j += Vec::size()) {
          at_most = at_most & (transform(load(row + j, columns - j)) <= Vec(best[k - 1]));
        }
        if (at_most.zero_mask() == 0) continue;
        for (int64_t j = i; j < block_end; j += Vec::size()) {
          float z[Vec::size()];
          transform(load(row + j, columns - j)).store(z);
          for (int64_t lane = 0; lane < std::min<int64_t>(Vec::size(), columns - j); lane++) {
            if (j + lane != excluded && above(z[lane], best[k - 1])) insert(z[lane], vocab_start + j + lane, best, indices, k);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastd2o

STABLE_TORCH_LIBRARY_IMPL(fastd2o_native, CPU, m) {
  m.impl("fold_", TORCH_BOX(&fastd2o::fold_));
  m.impl("grad_", TORCH_BOX(&fastd2o::grad_));
  m.impl("scale_", TORCH_BOX(&fastd2o::scale_));
  m.impl("topk_", TORCH_BOX(&fastd2o::topk_));
}
