// The operators that `csrc` implements, declared once; csrc/cpu and csrc/cuda register an implementation each.
//
// Letters: T tokens, N columns of a tile of logits, K candidates or inner size, S sequences, G groups. What `fold_`, `grad_`,
// `scale_` and `topk_` do is the contract of fastd2o/ops/tile_ops.py. State is kept as [T, 1] columns, contiguous or not.
#include <torch/csrc/stable/library.h>

// What becomes of a raw logit u: z = softcap(logit_scale * u) / temperature.
#define TRANSFORM "float logit_scale, float? softcap, float temperature"

STABLE_TORCH_LIBRARY(fastd2o_native, m) {
  // out [M, N] float32 (+)= left [M, K] @ right [K, N] (+ bias [N]), summed in float32. CPU only: CUDA's vendor has it.
  m.def("product_(Tensor(a!) out, Tensor left, Tensor right, Tensor? bias, bool accumulate) -> ()");

  m.def(
      "fold_(Tensor(a!) logits, Tensor target, int vocab_start, Tensor(b!) max, Tensor(c!) sum, Tensor(d!) target_logit, "
      "Tensor(e!) rescale, Tensor(f!)? weights, Tensor(g!)? weighted, Tensor(h!)? argmax, Tensor(i!)? total, " TRANSFORM
      ") -> ()");
  m.def(
      "grad_(Tensor(a!) out, Tensor logits, Tensor target, int vocab_start, Tensor lse_others, Tensor coef, " TRANSFORM
      ") -> ()");
  // out [T, N] = scale [T, 1] * weights [T, N], rounded once; the two may be the same. CPU only.
  m.def("scale_(Tensor(a!) out, Tensor weights, Tensor scale) -> ()");
  m.def("topk_(Tensor logits, Tensor target, int vocab_start, Tensor(a!) values, Tensor(b!) index, " TRANSFORM ") -> ()");

  // One of the candidates [T, K] of every token by Philox at (seed, counter): its column, -1 where none is finite, and its
  // logit. docs/engine.md, "The draw, exactly".
  m.def("draw(Tensor values, Tensor index, Tensor counter, int seed) -> (Tensor positive, Tensor positive_logit)");

  // Token log-probabilities -> sequences -> groups -> loss, and the derivatives of every group's loss by the sums of its
  // sequences' token_logp and token_cringe [S]. token_logp [N]; token_cringe [N] for the Cringe objectives alone;
  // sequence_start [S + 1] and group_start [G + 1] are offsets; positive [S] bool; ref_logp [S] for objectives with a reference
  // alone; parameters are those of the objective, in the order of csrc/loss.h.
  m.def(
      "loss(Tensor token_logp, Tensor? token_cringe, Tensor sequence_start, Tensor group_start, Tensor positive, "
      "Tensor? ref_logp, str objective, float[] parameters) "
      "-> (Tensor loss, Tensor sequence_logp, Tensor logp_coef, Tensor cringe_coef)");
}
