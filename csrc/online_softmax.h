// The arithmetic of one logit in `fold`, `grad` and `topk` (contract: fastd2o/ops/tile_ops.py), in float32: for the CUDA
// kernels and the host that tests them. The CPU's work on vectors (cpu/tiles.cpp), and share the ranks alone.
//
// A column whose raw logit is -inf is padding: it becomes z = -inf whatever the transform, and z = -inf adds nothing
// anywhere. NaN is carried on, never compared away.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "portable.h"

namespace fastd2o {

// z = softcap(logit_scale * u) / temperature of a raw logit u: outer * tanh(inner * u), or inner * u without a softcap.
struct LogitTransform {
  float inner;
  float outer;
  bool capped;

  static LogitTransform of(double logit_scale, std::optional<double> softcap, double temperature) {
    if (!softcap) return {static_cast<float>(logit_scale / temperature), 1.0f, false};
    return {static_cast<float>(logit_scale / *softcap), static_cast<float>(*softcap / temperature), true};
  }
};

FASTD2O_HD float transformed(float raw, const LogitTransform& transform) {
  const float x = raw * transform.inner;
  const float z = transform.capped ? transform.outer * tanhf(x) : x;
  return raw == -INFINITY ? raw : z;
}

// The factor 1 - tanh^2 = 1 / cosh^2 of dz/du, which is 1 without a softcap; formed from exp(-2|x|), it neither cancels
// where the cap saturates nor overflows.
FASTD2O_HD float bend(float raw, const LogitTransform& transform) {
  if (!transform.capped) return 1.0f;
  const float e = expf(-2.0f * fabsf(raw * transform.inner));
  const float half_cosh = 1.0f + e;
  return 4.0f * e / (half_cosh * half_cosh);
}

// exp(x) of a logit less the maximum. On a GPU it takes a few instructions where expf takes eight, as many as all else
// that is done to a logit. Its relative error is about |x| 2^-24: little, in a sum to which x < 0 adds but e^x.
FASTD2O_HD float exponential(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return expf(x);
#endif
}

// The larger of two, NaN if either is.
FASTD2O_HD float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// What to subtract before exponentials are taken. While everything so far is -inf, subtracting that would make NaN of
// it; subtracting 0 makes the zeros they are.
FASTD2O_HD float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

// By what sums relative to `old_max` must be multiplied to be relative to `new_max`.
FASTD2O_HD float rescale_factor(float old_max, float new_max) { return expf(old_max - shift_of(new_max)); }

// Some columns' maximum, and sums relative to it: sum = sum exp(z - max), weighted = sum exp(z - max) (z - max).
struct OnlineSums {
  float max, sum, weighted;

  // Of no column at all.
  static FASTD2O_HD OnlineSums none() { return {-INFINITY, 0.0f, 0.0f}; }

  // The same columns, relative to a maximum at least as large.
  FASTD2O_HD OnlineSums relative_to(float new_max) const {
    const float by = max - shift_of(new_max);
    const float factor = expf(by);
    // 0 * -inf is the 0 it tends to, here and where what counts for nothing any more has overflowed.
    const float moved = weighted + (sum > 0.0f ? sum * by : 0.0f);
    return {new_max, sum * factor, factor == 0.0f ? 0.0f : moved * factor};
  }

  // One more column, which is at most `max`; returns exp(z - max).
  FASTD2O_HD float add(float z) {
    const float below = z - shift_of(max);
    const float e = exponential(below);
    sum += e;
    weighted += e > 0.0f ? e * below : 0.0f;
    return e;
  }
};

// A column's entry of the gradient: -coef * softmax over the columns other than the target; without a softcap's bend.
FASTD2O_HD float gradient_entry(float z, float lse_others, float coef) {
  return exponential(z - shift_of(lse_others)) * -coef;
}

// A logit and its column as one integer: larger for a larger logit and, of equal ones, for the smaller column. NaN
// comes out above everything, so that it is seen. Columns are below 2^32.
FASTD2O_HD uint64_t rank_key(float z, uint32_t column) {
  z = z != z ? NAN : z + 0.0f;  // one NaN, and one zero
  uint32_t bits;
  memcpy(&bits, &z, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - column);
}

FASTD2O_HD float key_logit(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits;
  float z;
  memcpy(&z, &bits, sizeof z);
  return z;
}

FASTD2O_HD uint32_t key_column(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

}  // namespace fastd2o
