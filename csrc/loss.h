// The door of the operator `loss`: what can be checked of a call without looking at an accelerator's memory, the objective by its
// name, and the results' tensors. For the host side of both devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "objectives.h"

namespace fastd2o::objectives {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An objective as the schema knows it: its parameters in the order in which they come (switches as 0 or 1) and how they are read.
struct Entry {
  const char* name;
  Kind kind;
  bool has_reference, has_cringe;
  std::vector<const char*> parameters;
  void (*read)(Objective& objective, const double* values);
};

inline void read_beta(Objective& objective, const double* values) { objective.beta = static_cast<float>(values[0]); }

inline void read_smoothed(Objective& objective, const double* values) {
  read_beta(objective, values);
  const double flipped = values[1];
  objective.flipped = static_cast<float>(flipped);
  objective.unflipped = static_cast<float>(1 - flipped);
  objective.unbias = static_cast<float>(1 / (1 - 2 * flipped));
  objective.log_flipped = static_cast<float>(std::log(flipped));
  objective.log_unflipped = static_cast<float>(std::log1p(-flipped));
}

inline const std::vector<Entry>& entries() {
  static const std::vector<const char*> beta = {"beta"}, smoothed = {"beta", "label_smoothing"};
  static const std::vector<Entry> all = {
      {"d2o", Kind::d2o, true, false, {"alpha", "beta", "length_normalize", "allow_no_anchor"},
       [](Objective& objective, const double* values) {
         objective.alpha = static_cast<float>(values[0]);
         objective.beta = static_cast<float>(values[1]);
         objective.length_normalize = values[2] != 0;
         objective.allow_no_anchor = values[3] != 0;
       }},
      {"sigmoid", Kind::sigmoid, true, false, smoothed, read_smoothed},
      {"hinge", Kind::hinge, true, false, beta, read_beta},
      {"ipo", Kind::ipo, true, false, beta,
       [](Objective& objective, const double* values) {
         read_beta(objective, values);
         objective.length_normalize = true;
       }},
      {"robust", Kind::robust, true, false, smoothed, read_smoothed},
      {"dpop", Kind::dpop, true, false, {"beta", "dpop_lambda"},
       [](Objective& objective, const double* values) {
         read_beta(objective, values);
         objective.dpop_lambda = static_cast<float>(values[1]);
       }},
      {"bdpo", Kind::bdpo, true, false, {"beta", "bdpo_lambda"},
       [](Objective& objective, const double* values) {
         read_beta(objective, values);
         objective.log_mixed = static_cast<float>(std::log(values[1]));
         objective.log_kept = static_cast<float>(std::log(1 - values[1]));
       }},
      {"apo_zero", Kind::apo_zero, true, false, beta, read_beta},
      {"apo_down", Kind::apo_down, true, false, beta, read_beta},
      {"nca_pair", Kind::nca_pair, true, false, beta, read_beta},
      {"sppo_hard", Kind::sppo_hard, true, false, beta, read_beta},
      {"exo_pair", Kind::exo_pair, true, false, smoothed, read_smoothed},
      {"bco_pair", Kind::bco_pair, true, false, {"beta", "bco_baseline"},
       [](Objective& objective, const double* values) {
         read_beta(objective, values);
         objective.bco_baseline = static_cast<float>(values[1]);
       }},
      {"discopop", Kind::discopop, true, false, {"beta", "discopop_tau"},
       [](Objective& objective, const double* values) {
         read_beta(objective, values);
         objective.discopop_tau = static_cast<float>(values[1]);
       }},
      {"cringe", Kind::cringe, false, true, {"alpha"},
       [](Objective& objective, const double* values) { objective.alpha = static_cast<float>(values[0]); }},
      {"pairwise_cringe", Kind::pairwise_cringe, false, true,
       {"margin", "temperature", "detach_gate", "alpha", "length_normalize"},
       [](Objective& objective, const double* values) {
         objective.margin = static_cast<float>(values[0]);
         objective.temperature = static_cast<float>(values[1]);
         objective.detach_gate = values[2] != 0;
         objective.alpha = static_cast<float>(values[3]);
         objective.length_normalize = values[4] != 0;
       }},
  };
  return all;
}

inline std::string joined(const std::vector<const char*>& words) {
  std::string text;
  for (const char* word : words) text += (text.empty() ? "" : ", ") + std::string(word);
  return text;
}

inline const Entry& entry_of(const std::string& name) {
  const Entry* found = nullptr;
  std::vector<const char*> names;
  for (const Entry& entry : entries()) {
    names.push_back(entry.name);
    if (name == entry.name) found = &entry;
  }
  STD_TORCH_CHECK(found != nullptr, "loss: objective is '", name, "', expected one of: ", joined(names));
  return *found;
}

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size, const Tensor& token_logp) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "loss: ", name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.device() == token_logp.device(), "loss: ", name, " is not on the device of token_logp; move it there");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, "loss: ", name, " has ", tensor.numel(), " values in ",
                  tensor.dim(), " dimensions, expected shape [", size, "]");
  STD_TORCH_CHECK(tensor.is_contiguous(), "loss: ", name, " is not contiguous; pass ", name, ".contiguous()");
}

inline void check_optional(const char* name, const std::optional<Tensor>& tensor, const Entry& entry, bool wanted) {
  STD_TORCH_CHECK(tensor.has_value() || !wanted, "loss: ", name, " is missing: '", entry.name, "' reads it");
  STD_TORCH_CHECK(!tensor.has_value() || wanted, "loss: ", name, " is not read by '", entry.name, "'; leave it out");
}

// A call that can be carried out.
struct Call {
  Objective objective;
  Batch batch;
  Tensor loss, sequence_logp, logp_coef, cringe_coef;

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {loss, sequence_logp, logp_coef, cringe_coef}; }
};

inline Call checked_call(const Tensor& token_logp, const std::optional<Tensor>& token_cringe, const Tensor& sequence_start,
                         const Tensor& group_start, const Tensor& positive, const std::optional<Tensor>& ref_logp,
                         const std::string& name, const std::vector<double>& parameters) {
  const Entry& entry = entry_of(name);
  STD_TORCH_CHECK(parameters.size() == entry.parameters.size(), "loss: '", name, "' has ", entry.parameters.size(),
                  " parameters (", joined(entry.parameters), "), but ", parameters.size(), " are given");
  check_optional("token_cringe", token_cringe, entry, entry.has_cringe);
  check_optional("ref_logp", ref_logp, entry, entry.has_reference);

  check_tensor("token_logp", token_logp, ScalarType::Float, token_logp.numel(), token_logp);
  const int64_t tokens = token_logp.numel(), sequences = positive.numel(), groups = group_start.numel() - 1;
  STD_TORCH_CHECK(groups >= 0, "loss: group_start is empty, expected the G + 1 offsets of G groups");
  if (token_cringe) check_tensor("token_cringe", *token_cringe, ScalarType::Float, tokens, token_logp);
  check_tensor("sequence_start", sequence_start, ScalarType::Long, sequences + 1, token_logp);
  check_tensor("group_start", group_start, ScalarType::Long, groups + 1, token_logp);
  check_tensor("positive", positive, ScalarType::Bool, sequences, token_logp);
  if (ref_logp) check_tensor("ref_logp", *ref_logp, ScalarType::Float, sequences, token_logp);
  STD_TORCH_CHECK(sequences > 0 || tokens == 0, "loss: token_logp has ", tokens, " tokens, but positive has no sequence");
  STD_TORCH_CHECK(groups > 0 || sequences == 0, "loss: positive has ", sequences, " sequences, but group_start no group");

  Call call{{},
            {},
            torch::stable::new_empty(token_logp, {groups}),
            torch::stable::new_empty(token_logp, {sequences}),
            torch::stable::new_empty(token_logp, {sequences}),
            torch::stable::new_empty(token_logp, {sequences})};
  call.objective.kind = entry.kind;
  entry.read(call.objective, parameters.data());
  call.batch = {
      token_logp.const_data_ptr<float>(),
      token_cringe ? token_cringe->const_data_ptr<float>() : nullptr,
      sequence_start.const_data_ptr<int64_t>(),
      group_start.const_data_ptr<int64_t>(),
      positive.const_data_ptr<bool>(),
      ref_logp ? ref_logp->const_data_ptr<float>() : nullptr,
      tokens,
      sequences,
      groups,
      call.loss.mutable_data_ptr<float>(),
      call.sequence_logp.mutable_data_ptr<float>(),
      call.logp_coef.mutable_data_ptr<float>(),
      call.cringe_coef.mutable_data_ptr<float>(),
  };
  return call;
}

}  // namespace fastd2o::objectives
