// loss [G] and the derivatives of every group's loss, from token log-probabilities: csrc/objectives.h on the CPU.
//
// Called as csrc/schema.cpp says. token_logp [N] and token_cringe [N] are read once; a group is one thread's, so that no sum depends on how many there are.
// Stable ABI.
#include "loss.h"

namespace fastd2o::objectives {
namespace {

// A thread is worth waking for this many tokens.
constexpr int64_t kTokensPerTask = 32768;

void check_offsets(const char* name, const int64_t* start, int64_t items, int64_t length, const char* of_what) {
  STD_TORCH_CHECK(start[0] == 0, "loss: ", name, " begins with ", start[0], ", expected 0");
  for (int64_t i = 0; i < items; ++i) {
    STD_TORCH_CHECK(start[i] <= start[i + 1], "loss: ", name, " falls from ", start[i], " to ", start[i + 1], " at position ", i + 1,
                    ", expected offsets that never fall");
  }
  STD_TORCH_CHECK(start[items] == length, "loss: ", name, " ends with ", start[items], ", expected ", length, ", the number of ",
                  of_what);
}

void check_values(const Objective& objective, const Batch& batch) {
  check_offsets("sequence_start", batch.sequence_start, batch.sequences, batch.tokens, "tokens");
  check_offsets("group_start", batch.group_start, batch.groups, batch.sequences, "sequences");
  for (int64_t s = 0; s < batch.sequences && objective.length_normalize; ++s) {
    STD_TORCH_CHECK(batch.sequence_start[s] < batch.sequence_start[s + 1], "loss: sequence ", s,
                    " is empty, and has no mean over its tokens; leave empty sequences out");
  }
  if (objective.kind == Kind::cringe) return;
  for (int64_t g = 0; g < batch.groups; ++g) {
    int64_t negatives = 0;
    for (int64_t s = batch.group_start[g]; s < batch.group_start[g + 1]; ++s) negatives += !batch.positive[s];
    STD_TORCH_CHECK(negatives == 1, "loss: group ", g, " has ", negatives, " negatives, expected exactly one; split the group");
  }
  if (objective.kind == Kind::d2o && !objective.allow_no_anchor && batch.groups > 0) {
    STD_TORCH_CHECK(batch.sequences > batch.groups, "loss: no group has an anchor; sample anchors, or set allow_no_anchor");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& token_logp, const std::optional<Tensor>& token_cringe, const Tensor& sequence_start,
    const Tensor& group_start, const Tensor& positive, const std::optional<Tensor>& ref_logp, std::string objective,
    std::vector<double> parameters) {
  const Call call =
      checked_call(token_logp, token_cringe, sequence_start, group_start, positive, ref_logp, objective, parameters);
  STD_TORCH_CHECK(token_logp.is_cpu(), "loss: token_logp is not on the CPU");
  const Batch& batch = call.batch;
  check_values(call.objective, batch);
  const int64_t grain = batch.groups * kTokensPerTask / (batch.tokens + 1) + 1;
  torch::stable::parallel_for(0, batch.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) group_loss(Single(), call.objective, batch, group);
  });
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastd2o_native, CPU, m) { m.impl("loss", TORCH_BOX(&loss)); }

}  // namespace fastd2o::objectives
