// The objectives over groups of sequences: the loss of a group and its derivatives, written once for every device.
//
// A formula is written as in fastd2o/losses, over numbers that carry their two partial derivatives with them. What it does at
// saturation and at infinities is therefore what torch's autograd does there: log_sigmoid never takes the logarithm of a sigmoid,
// a slope is never formed as a difference of two numbers near 1.
//
// A *team* of threads works on a group: a block on CUDA, a single thread on the CPU. It is made of *squads*, warps on CUDA, that
// sum up a sequence each. A team's order of summation is fixed, and a sequence's sum has one order on every device.
//
// S sequences, G groups, N tokens, K positives of a group. Bytes: every input is read once, every output written once or twice;
// N dominates. Sums over tokens and everything per sequence are float32, sums over a group's few sequences are float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

// Group code runs on whole teams, so nvcc compiles it for the device alone.
#ifdef __CUDACC__
#define FASTD2O_TEAM __device__ __forceinline__
#else
#define FASTD2O_TEAM inline
#endif

namespace fastd2o::objectives {

// --- numbers with derivatives ---------------------------------------------------------------------------------------------

FASTD2O_HD float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

FASTD2O_HD float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// A number and its derivatives by what is said of the chosen sequence and by what is said of the rejected one.
struct Dual {
  float value, by_chosen, by_rejected;
};

// f(x) from its value and slope. What does not depend on a sequence does not do so where the slope is infinite either.
FASTD2O_HD Dual chain(Dual x, float value, float slope) {
  return {value, x.by_chosen == 0 ? 0 : slope * x.by_chosen, x.by_rejected == 0 ? 0 : slope * x.by_rejected};
}

FASTD2O_HD Dual operator+(Dual a, Dual b) {
  return {a.value + b.value, a.by_chosen + b.by_chosen, a.by_rejected + b.by_rejected};
}
FASTD2O_HD Dual operator*(Dual a, Dual b) {
  return {a.value * b.value, a.by_chosen * b.value + a.value * b.by_chosen, a.by_rejected * b.value + a.value * b.by_rejected};
}
FASTD2O_HD Dual operator*(float a, Dual b) { return {a * b.value, a * b.by_chosen, a * b.by_rejected}; }
FASTD2O_HD Dual operator/(Dual a, float b) { return {a.value / b, a.by_chosen / b, a.by_rejected / b}; }
FASTD2O_HD Dual operator-(Dual a) { return {-a.value, -a.by_chosen, -a.by_rejected}; }
FASTD2O_HD Dual operator-(Dual a, Dual b) { return a + -b; }
FASTD2O_HD Dual operator+(Dual a, float b) { return {a.value + b, a.by_chosen, a.by_rejected}; }
FASTD2O_HD Dual operator-(Dual a, float b) { return a + -b; }
FASTD2O_HD Dual operator-(float a, Dual b) { return -b + a; }

FASTD2O_HD Dual sigmoid(Dual x) { return chain(x, sigmoid(x.value), sigmoid(x.value) * sigmoid(-x.value)); }
FASTD2O_HD Dual log_sigmoid(Dual x) { return chain(x, log_sigmoid(x.value), sigmoid(-x.value)); }
FASTD2O_HD Dual exp(Dual x) { return chain(x, expf(x.value), expf(x.value)); }
FASTD2O_HD Dual square(Dual x) { return chain(x, x.value * x.value, 2 * x.value); }
// NaN is not below 0: it passes, with its slope.
FASTD2O_HD Dual relu(Dual x) { return chain(x, x.value <= 0 ? 0 : x.value, x.value <= 0 ? 0.0f : 1.0f); }
FASTD2O_HD Dual log_add_exp(Dual x, float y) {
  // −inf − (−inf) is NaN; a NaN itself must come through.
  const bool both_nothing = x.value == -INFINITY && y == -INFINITY;
  const float sum = both_nothing ? y : fmaxf(x.value, y) + log1pf(expf(-fabsf(x.value - y)));
  return chain(x, sum, sigmoid(x.value - y));
}

// --- the objectives -------------------------------------------------------------------------------------------------------

enum class Kind {
  d2o,
  sigmoid,
  hinge,
  ipo,
  robust,
  dpop,
  bdpo,
  apo_zero,
  apo_down,
  nca_pair,
  sppo_hard,
  exo_pair,
  bco_pair,
  discopop,
  cringe,
  pairwise_cringe,
};

// An objective with its options, and what is worth computing once from them, in float64, before it is rounded.
struct Objective {
  Kind kind;
  float alpha, beta;
  bool length_normalize;  // log-probabilities and log-ratios are means over tokens
  bool allow_no_anchor;
  float flipped, unflipped;  // ε and 1 − ε of label_smoothing
  float unbias;              // 1 / (1 − 2ε)
  float log_flipped, log_unflipped;
  float dpop_lambda;
  float log_mixed, log_kept;  // log λ and log(1 − λ) of bdpo_lambda
  float discopop_tau;
  float bco_baseline;
  float margin, temperature;
  bool detach_gate;
};

// What a pair's loss is made of, on either side. `cringe` is the sum of the tokens' Cringe losses, 0 where it is not asked for.
struct Sequence {
  float logp, ref_logp, length, cringe;
};

// The log-ratio with a derivative of 1 by the sum of the sequence's token log-probabilities, or 1 / length.
FASTD2O_HD float log_ratio(const Objective& objective, const Sequence& y) {
  const float ratio = y.logp - y.ref_logp;
  return objective.length_normalize ? ratio / y.length : ratio;
}
FASTD2O_HD float log_ratio_slope(const Objective& objective, const Sequence& y) {
  return objective.length_normalize ? 1 / y.length : 1;
}

// −log σ( β · mean log-ratio of the anchors − α · log-ratio of the negative ); chosen stands for the former.
FASTD2O_HD Dual d2o(const Objective& objective, Dual anchors, Dual negative) {
  return -log_sigmoid(objective.beta * anchors - objective.alpha * negative);
}

// Every type of dpo_loss, from the log-ratios of the chosen and of the rejected sequence.
FASTD2O_HD Dual dpo(const Objective& objective, Dual chosen, Dual rejected) {
  const float beta = objective.beta;
  const Dual margin = beta * (chosen - rejected);
  switch (objective.kind) {
    case Kind::sigmoid:
      return -(objective.unflipped * log_sigmoid(margin)) - objective.flipped * log_sigmoid(-margin);
    case Kind::hinge:
      return relu(1 - margin);
    case Kind::ipo:
      return square(chosen - rejected - 1 / (2 * beta));
    case Kind::robust:
      return objective.unbias * (objective.flipped * log_sigmoid(-margin) - objective.unflipped * log_sigmoid(margin));
    case Kind::dpop:
      return -log_sigmoid(margin - beta * objective.dpop_lambda * relu(-chosen));
    case Kind::bdpo:
      return -log_sigmoid(beta * (chosen - log_add_exp(rejected + objective.log_mixed, objective.log_kept)));
    case Kind::apo_zero:
      return sigmoid(-(beta * chosen)) + sigmoid(beta * rejected);
    case Kind::apo_down:
      return sigmoid(beta * chosen) + sigmoid(-margin);
    case Kind::nca_pair:
      return -log_sigmoid(beta * chosen) - 0.5f * log_sigmoid(-(beta * chosen)) - 0.5f * log_sigmoid(-(beta * rejected));
    case Kind::sppo_hard:
      return square(chosen - 1 / (2 * beta)) + square(rejected + 1 / (2 * beta));
    case Kind::exo_pair:
      return sigmoid(margin) * (log_sigmoid(margin) - objective.log_unflipped) +
             sigmoid(-margin) * (log_sigmoid(-margin) - objective.log_flipped);
    case Kind::bco_pair:
      return -log_sigmoid(beta * chosen - objective.bco_baseline) - log_sigmoid(objective.bco_baseline - beta * rejected);
    default: {  // discopop
      const Dual gate = margin / objective.discopop_tau;
      // exp(−x) σ(x/τ) as one exponential: the two factors overflow and vanish on their own, and inf · 0 is NaN.
      return exp(log_sigmoid(gate) - margin) - log_sigmoid(margin) * sigmoid(-gate);
    }
  }
}

// A pair's loss, and its derivative by the rejected sequence's Cringe loss besides those by the two log-probabilities.
struct PairLoss {
  Dual loss;
  float by_cringe;
};

// g · (CE(y_w) + α Σ ℓ(y_l)) with the gate g = σ((b − M) / τ), M = lp(y_w) − lp(y_l).
FASTD2O_HD PairLoss pairwise_cringe(const Objective& objective, const Sequence& chosen, const Sequence& rejected) {
  const Dual chosen_logp{log_ratio(objective, chosen), log_ratio_slope(objective, chosen), 0};
  const Dual rejected_logp{log_ratio(objective, rejected), 0, log_ratio_slope(objective, rejected)};
  const Dual gate = sigmoid((objective.margin - (chosen_logp - rejected_logp)) / objective.temperature);
  const Dual binary{-chosen.logp + objective.alpha * rejected.cringe, -1, 0};
  const Dual loss = objective.detach_gate ? chain(binary, gate.value * binary.value, gate.value) : gate * binary;
  return {loss, gate.value * objective.alpha};
}

FASTD2O_HD PairLoss pair_loss(const Objective& objective, const Sequence& chosen, const Sequence& rejected) {
  if (objective.kind == Kind::pairwise_cringe) return pairwise_cringe(objective, chosen, rejected);
  const Dual chosen_ratio{log_ratio(objective, chosen), log_ratio_slope(objective, chosen), 0};
  const Dual rejected_ratio{log_ratio(objective, rejected), 0, log_ratio_slope(objective, rejected)};
  return {dpo(objective, chosen_ratio, rejected_ratio), 0};
}

// --- from tokens to the loss of a group -----------------------------------------------------------------------------------

// The tensors of the operator (csrc/schema.cpp); token_cringe and ref_logp are null where the objective has none.
struct Batch {
  const float* token_logp;
  const float* token_cringe;
  const int64_t* sequence_start;
  const int64_t* group_start;
  const bool* positive;
  const float* ref_logp;
  int64_t tokens, sequences, groups;

  float* loss;
  float* sequence_logp;
  float* logp_coef;
  float* cringe_coef;
};

struct Range {
  int64_t begin, end;
  bool sound;
};

// What offsets say of item i of `items`, kept within [0, length) and such that the items together leave nothing out, whatever
// the offsets hold.
FASTD2O_HD Range range_of(const int64_t* start, int64_t i, int64_t items, int64_t length) {
  const int64_t begin = i == 0 || start[i] < 0 ? 0 : start[i] < length ? start[i] : length;
  const int64_t end = i + 1 == items || start[i + 1] > length ? length : start[i + 1] > 0 ? start[i + 1] : 0;
  return {begin, end, begin == start[i] && end == start[i + 1] && begin <= end};
}

// A sequence's sum in 32 parts, one for each lane of a warp, which are then folded in halves.
constexpr int kLanes = 32;

// A team of one, for the CPU.
struct Single {
  int rank() const { return 0; }
  int size() const { return 1; }
  int squad() const { return 0; }
  int squads() const { return 1; }
  bool leads_squad() const { return true; }
  void sync() const {}
  double sum(double value) const { return value; }

  float sum_tokens(const float* tokens, int64_t length) const {
    float part[kLanes] = {};
    int64_t t = 0;
    for (; t + kLanes <= length; t += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) part[lane] += tokens[t + lane];
    }
    for (int lane = 0; t + lane < length; ++lane) part[lane] += tokens[t + lane];
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    }
    return part[0];
  }
};

// Everything of one group. Offsets that are none, and a group of pairs without exactly one negative, make NaN of the loss and
// of the coefficients: an accelerator's values cannot be looked at without waiting for it.
template <typename Team>
FASTD2O_TEAM void group_loss(const Team& team, const Objective& objective, const Batch& batch, int64_t group) {
  const Range own = range_of(batch.group_start, group, batch.groups, batch.sequences);
  const bool by_pairs = objective.kind != Kind::cringe;

  // Squads: tokens -> sequences. cringe_coef holds the sums of ℓ until the coefficients take their place.
  for (int64_t s = own.begin + team.squad(); s < own.end; s += team.squads()) {
    const Range tokens = range_of(batch.sequence_start, s, batch.sequences, batch.tokens);
    const int64_t length = tokens.sound ? tokens.end - tokens.begin : 0;
    const bool contrasted = batch.token_cringe != nullptr && !batch.positive[s];
    const float logp = team.sum_tokens(batch.token_logp + tokens.begin, length);
    const float cringe = contrasted ? team.sum_tokens(batch.token_cringe + tokens.begin, length) : 0;
    if (team.leads_squad()) {
      batch.sequence_logp[s] = tokens.sound ? logp : NAN;
      batch.cringe_coef[s] = tokens.sound ? cringe : NAN;
    }
  }
  team.sync();

  const auto sequence = [&](int64_t s) -> Sequence {
    const Range tokens = range_of(batch.sequence_start, s, batch.sequences, batch.tokens);
    return {batch.sequence_logp[s], batch.ref_logp == nullptr ? 0 : batch.ref_logp[s],
            static_cast<float>(tokens.end - tokens.begin), batch.cringe_coef[s]};
  };
  const auto over_members = [&](const auto& body) {
    for (int64_t s = own.begin + team.rank(); s < own.end; s += team.size()) body(s);
  };

  if (!by_pairs) {
    double loss = 0;
    over_members([&](int64_t s) {
      const bool positive = batch.positive[s];
      loss += positive ? -batch.sequence_logp[s] : objective.alpha * batch.cringe_coef[s];
      batch.logp_coef[s] = !own.sound ? NAN : positive ? -1.0f : 0.0f;
      batch.cringe_coef[s] = !own.sound ? NAN : positive ? 0.0f : objective.alpha;
    });
    loss = team.sum(loss);
    if (team.rank() == 0) batch.loss[group] = own.sound ? static_cast<float>(loss) : NAN;
    return;
  }

  // The one negative is found as a sum over all that there are.
  double negatives = 0, negative_row = 0;
  over_members([&](int64_t s) {
    if (batch.positive[s]) return;
    negatives += 1;
    negative_row += static_cast<double>(s);
  });
  negatives = team.sum(negatives);
  negative_row = team.sum(negative_row);
  const float positives = static_cast<float>(own.end - own.begin - 1);
  const bool sound = own.sound && negatives == 1;
  if (!sound || (positives == 0 && !(objective.kind == Kind::d2o && objective.allow_no_anchor))) {
    const float nothing = sound ? 0.0f : NAN;
    over_members([&](int64_t s) { batch.logp_coef[s] = batch.cringe_coef[s] = nothing; });
    if (team.rank() == 0) batch.loss[group] = nothing;
    return;
  }
  const int64_t negative = static_cast<int64_t>(negative_row);
  const Sequence rejected = sequence(negative);

  double loss = 0, by_rejected = 0, by_cringe = 0;
  if (objective.kind == Kind::d2o) {
    double anchors = 0;
    over_members([&](int64_t s) {
      if (batch.positive[s]) anchors += log_ratio(objective, sequence(s));
    });
    anchors = team.sum(anchors) / (positives > 0 ? positives : 1);
    const Dual mean{static_cast<float>(anchors), 1, 0};
    const Dual result = d2o(objective, mean, {log_ratio(objective, rejected), 0, log_ratio_slope(objective, rejected)});
    over_members([&](int64_t s) {
      if (!batch.positive[s]) return;
      batch.logp_coef[s] = result.by_chosen / positives * log_ratio_slope(objective, sequence(s));
      batch.cringe_coef[s] = 0;
    });
    loss = result.value;
    by_rejected = result.by_rejected;
  } else {
    over_members([&](int64_t s) {
      if (!batch.positive[s]) return;
      const PairLoss pair = pair_loss(objective, sequence(s), rejected);
      loss += pair.loss.value;
      by_rejected += pair.loss.by_rejected;
      by_cringe += pair.by_cringe;
      batch.logp_coef[s] = pair.loss.by_chosen / positives;
      batch.cringe_coef[s] = 0;
    });
    loss = team.sum(loss) / positives;
    by_rejected = team.sum(by_rejected) / positives;
    by_cringe = team.sum(by_cringe) / positives;
  }
  if (team.rank() == 0) {
    batch.loss[group] = static_cast<float>(loss);
    batch.logp_coef[negative] = static_cast<float>(by_rejected);
    batch.cringe_coef[negative] = static_cast<float>(by_cringe);
  }
}

}  // namespace fastd2o::objectives
