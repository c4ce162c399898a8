"""Each objective, as trained: against the formulas of its paper on a plain forward, and whether it learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastd2o.data import Needs
from fastd2o.losses import dpo_loss
from fastd2o.training import OBJECTIVES
from fastd2o.training.scoring import Batch
from tests.training.tiny import losses, make_model, make_rows

DPO_TYPES = {name: "sigmoid" if name == "dpo" else name for name in OBJECTIVES if OBJECTIVES[name].needs is Needs.PAIR}
for name in ("d2o", "pairwise_cringe", "orpo", "simpo"):
    del DPO_TYPES[name]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_falls(make_trainer, objective):
    trainer = make_trainer(objective=[objective], max_steps=6, per_device_train_batch_size=12)
    trainer.train()
    logged = losses(trainer)
    assert len(logged) == 6
    assert logged[-1] < logged[0]


class Eager:
    """The formulas of the papers, in float64, from the logits of a plain forward."""

    def __init__(self, policy, reference, batch: Batch):
        self.batch = batch
        self.logits = self._logits(policy)
        self.token_logp, self.mask = self._token_logp(self.logits)
        self.logp = self.token_logp.sum(1)
        self.length = self.mask.sum(1)
        self.ratio = self.logp - self._token_logp(self._logits(reference))[0].sum(1)
        self.pairs = [
            (int(negative), [int(row) for row in positives if row >= 0])
            for negative, positives in zip(batch.negative_row, batch.positive_rows, strict=True)
        ]

    def _logits(self, model) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=self.batch.input_ids, attention_mask=self.batch.attention_mask).logits
        return logits.double()[:, :-1]

    def _token_logp(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        target = self.batch.labels[:, 1:]
        mask = target != -100
        logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return torch.where(mask, logp, 0.0), mask

    def pair_mean(self, loss) -> float:
        """loss(positive row, negative row), averaged over the positives of each group, then over groups."""
        means = [sum(float(loss(good, bad)) for good in positives) / len(positives) for bad, positives in self.pairs]
        return sum(means) / len(means)

    def d2o(self) -> float:
        terms = [0.1 * self.ratio[positives].mean() - 0.1 * self.ratio[bad] for bad, positives in self.pairs]
        return float(-F.logsigmoid(torch.stack(terms)).mean())

    def dpo(self, loss_type: str) -> float:
        def loss(good: int, bad: int) -> Tensor:
            return dpo_loss(
                self.ratio[good],
                self.ratio[bad],
                ref_chosen_logp=torch.zeros_like(self.ratio[good]),
                ref_rejected_logp=torch.zeros_like(self.ratio[bad]),
                chosen_length=self.length[good],
                rejected_length=self.length[bad],
                loss_type=loss_type,
                label_smoothing=1e-3 if loss_type == "exo_pair" else 0.0,
            )

        return self.pair_mean(loss)

    def simpo(self) -> float:
        mean = self.logp / self.length
        return self.pair_mean(lambda good, bad: -F.logsigmoid(2.0 * (mean[good] - mean[bad]) - 0.5))

    def orpo(self) -> float:
        mean = self.logp / self.length
        logit = mean - torch.log1p(-mean.exp())
        return self.pair_mean(lambda good, bad: -mean[good] - 0.1 * F.logsigmoid(logit[good] - logit[bad]))

    def npo(self) -> float:
        return self.pair_mean(lambda good, bad: -(2 / 0.1) * F.logsigmoid(-0.1 * self.ratio[bad]))

    def simnpo(self) -> float:
        return self.pair_mean(lambda good, bad: -(2 / 2.5) * F.logsigmoid(-2.5 * self.logp[bad] / self.length[bad]))

    def gradient_ascent(self) -> float:
        return self.pair_mean(lambda good, bad: self.logp[bad])

    def _rows(self) -> tuple[list[int], list[int]]:
        return [bad for bad, _ in self.pairs], [good for _, positives in self.pairs for good in positives]

    def unlikelihood(self) -> float:
        negatives, positives = self._rows()
        unlikely = torch.where(self.mask, -torch.log1p(-self.token_logp.exp()), 0.0)
        total = unlikely[negatives].sum() - self.token_logp[positives].sum()
        return float(total) / (len(negatives) + len(positives))

    def nat(self) -> float:
        negatives, positives = self._rows()
        rows = negatives + positives
        return float(-self.token_logp[rows].sum() / self.mask[rows].sum())

    def kto(self) -> float:
        negatives, positives = self._rows()
        mismatches = sorted(set(range(len(self.logp))) - set(negatives) - set(positives))
        assert len(mismatches) == len(self.pairs)
        z = max(0.0, float(self.ratio[mismatches].mean()))
        desirable = (1 - torch.sigmoid(0.1 * (self.ratio[positives] - z))).sum()
        undesirable = (1 - torch.sigmoid(0.1 * (z - self.ratio[negatives]))).sum()
        return float(desirable + undesirable) / (len(negatives) + len(positives))

    def _greedy_cringe(self) -> Tensor:
        """[S, L-1]: with one candidate, the positive is the most likely other token."""
        target = self.batch.labels[:, 1:].clamp(min=0)[..., None]
        negative = self.logits.gather(-1, target)[..., 0]
        positive = self.logits.scatter(-1, target, -math.inf).amax(-1)
        return torch.where(self.mask, F.softplus(negative - positive), 0.0)

    def cringe(self) -> float:
        negatives, positives = self._rows()
        total = self._greedy_cringe()[negatives].sum() - self.token_logp[positives].sum()
        return float(total / self.mask[negatives + positives].sum())

    def pairwise_cringe(self) -> float:
        cringe = self._greedy_cringe().sum(1)
        return self.pair_mean(
            lambda good, bad: torch.sigmoid(self.logp[bad] - self.logp[good]) * (cringe[bad] - self.logp[good])
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_that_of_the_paper(make_trainer, objective):
    """A policy that has moved away from its reference, on groups of one to four positives."""
    reference = make_model(seed=1)
    options: dict[str, Any] = {"cringe_k": 1} if "cringe" in objective else {}
    if OBJECTIVES[objective].reference:
        options["ref_model"] = make_model(seed=1)
    trainer = make_trainer(objective=[objective], eval_dataset=make_rows(7), per_device_eval_batch_size=7, **options)
    trainer.model.eval()
    (inputs,) = trainer.get_eval_dataloader()
    eager = Eager(trainer.model, reference, Batch(**inputs))
    expected = eager.dpo(DPO_TYPES[objective]) if objective in DPO_TYPES else getattr(eager, objective)()
    with torch.no_grad():
        assert float(trainer.compute_loss(trainer.model, inputs)) == pytest.approx(expected, rel=2e-5)


def test_several_objectives_add_up_by_their_weights(make_trainer, tmp_path):
    rows = make_rows(7)
    together = make_trainer(objective=["d2o", "npo", "unlikelihood"], objective_weights=[1, 0.5, 2], eval_dataset=rows)
    metrics = together.evaluate()
    alone = {}
    for objective in ("d2o", "npo", "unlikelihood"):
        single = make_trainer(objective=objective, eval_dataset=rows, output_dir=tmp_path / objective).evaluate()
        alone[objective] = single["eval_loss"]
        assert metrics[f"eval_loss/{objective}"] == pytest.approx(alone[objective], rel=1e-6)
        assert f"eval_loss/{objective}" not in single
    expected = alone["d2o"] + 0.5 * alone["npo"] + 2 * alone["unlikelihood"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_harmful_reference_is_for_positives_alone(make_trainer, tmp_path):
    """The references cross: anchors against the harmful model, the negative against the helpful one."""
    rows = make_rows(6)
    trainer = make_trainer(
        ref_model=make_model(seed=1), harmful_ref_model=make_model(seed=2), eval_dataset=rows, alpha=0.3, beta=0.2
    )
    (inputs,) = make_trainer(eval_dataset=rows, per_device_eval_batch_size=6).get_eval_dataloader()
    helpful = Eager(trainer.model, make_model(seed=1), Batch(**inputs))
    harmful = Eager(trainer.model, make_model(seed=2), Batch(**inputs))
    terms = [0.2 * harmful.ratio[positives].mean() - 0.3 * helpful.ratio[bad] for bad, positives in helpful.pairs]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(-F.logsigmoid(torch.stack(terms)).mean()), rel=1e-5)
    anchor = sum(0.2 * float(harmful.ratio[positives].mean()) for _, positives in helpful.pairs) / 6
    assert metrics["eval_d2o/anchor_term"] == pytest.approx(anchor, rel=1e-5)
    negative = sum(0.3 * float(helpful.ratio[bad]) for bad, _ in helpful.pairs) / 6
    assert metrics["eval_d2o/negative_term"] == pytest.approx(negative, rel=1e-5)
    assert metrics["eval_d2o/valid_k"] == pytest.approx(sum(len(p) for _, p in helpful.pairs) / 6)
    assert metrics["eval_rewards/chosen"] == pytest.approx(anchor, rel=1e-5)


def test_rows_without_anchors_are_kept_when_allowed(make_trainer):
    rows = make_rows(6)
    for row in rows[:2]:
        row["anchors"] = []
        del row["chosen"]
    trainer = make_trainer(allow_no_anchor=True, train_dataset=rows, ref_model=make_model(seed=1))
    (inputs,) = make_trainer(
        allow_no_anchor=True, train_dataset=None, eval_dataset=rows, per_device_eval_batch_size=6
    ).get_eval_dataloader()
    eager = Eager(trainer.model, make_model(seed=1), Batch(**inputs))
    terms = [(0.1 * eager.ratio[p].mean() if p else 0.0) - 0.1 * eager.ratio[bad] for bad, p in eager.pairs]
    loss = trainer.compute_loss(trainer.model.eval(), inputs)
    assert loss.item() == pytest.approx(float(-F.logsigmoid(torch.stack(terms)).mean()), rel=1e-5)


def test_negatives_alone_leave_positives_out_of_training(make_trainer):
    trainer = make_trainer(objective="npo", eval_dataset=make_rows(3))
    assert all(len(group.sequences) == 1 for group in trainer.train_dataset)
    assert all(len(group.sequences) > 1 for group in trainer.eval_dataset)
    assert "eval_rewards/margins" in trainer.evaluate()


def test_kto_scores_completions_under_other_prompts(make_trainer):
    """Each group brings the first completion of the next behind its own prompt, neither negative nor positive."""
    groups = make_trainer(objective="kto").train_dataset.groups
    for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
        first, mismatch = group.sequences[0], group.sequences[-1]
        index = len(group.sequences) - 1
        assert index != group.negative
        assert index not in group.positives
        assert mismatch.input_ids[: mismatch.completion_start] == first.input_ids[: first.completion_start]
        theirs = following.sequences[0].completion_ids
        assert mismatch.completion_ids == theirs[: len(mismatch.completion_ids)] != first.completion_ids
    alone = make_trainer(objective="kto", train_dataset=make_rows(1))
    assert len(alone.train_dataset[0].sequences) == 2


def test_saturated_groups_are_counted(make_trainer):
    metrics = make_trainer(
        ref_model=make_model(seed=1), eval_dataset=make_rows(8), alpha=5.0, saturation_threshold=0.01
    ).evaluate()
    assert 0 < metrics["eval_d2o/saturated"] < 1
