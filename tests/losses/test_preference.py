"""``linear_preference_loss`` against full logits in float64, group by group, and its ways to one result against each
other."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import fastd2o
from fastd2o import FastD2OWarning, Groups, Plan, PreferenceOutput, linear_preference_loss, losses
from fastd2o.ops import engine, native
from fastd2o.ops.grouped import Part, linear_grouped
from fastd2o.ops.kept import active_columns
from fastd2o.ops.native_tile_ops import CpuTileOps
from fastd2o.ops.tile_ops import LogitTransform
from fastd2o.ops.torch_tile_ops import TorchTileOps
from tests.losses import reference
from tests.ops.oracle import full_logits, logprob, relative_error, rms_error

unavailable = native.unavailable("cpu")
needs_native = pytest.mark.skipif(unavailable is not None, reason=f"no native kernels: {unavailable}")
BACKENDS = [pytest.param("cpu", marks=needs_native), "torch"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("d2o", {}),
    ("d2o", {"alpha": 0.3, "beta": 0.05, "allow_no_anchor": True}),
    ("d2o", {"alpha": 1.5, "beta": 2.0, "length_normalize": True}),
    ("sigmoid", {"label_smoothing": 0.1}),
    ("hinge", {}),
    ("ipo", {}),
    ("robust", {"label_smoothing": 0.1}),
    ("dpop", {}),
    ("bdpo", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("nca_pair", {}),
    ("sppo_hard", {}),
    ("exo_pair", {}),
    ("bco_pair", {"bco_baseline": 0.3}),
    ("discopop", {}),
]
"""The options of the types of ``dpo_loss`` are those that ``reference.DPO`` was written for."""

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 3.0},
    "all": {"logit_scale": -1.5, "softcap": 4.0, "temperature": 1.3},
}

Objective = str | Callable[[Tensor, Tensor | None, Groups], Tensor]


# --- cases and the oracle ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The tensors of one call; at ignored positions, hidden is NaN and the sequence is nonsense."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    sequence_ids: Tensor
    groups: Groups
    ref_logp: Tensor
    transform: dict[str, Any]

    @property
    def counted(self) -> Tensor:
        return self.target != -100

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Fresh ones."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor.detach().clone() for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def sequences(self, token_logp: Tensor) -> Tensor:
        """[S] sums of the tokens that count."""
        own = [self.counted & (self.sequence_ids == s) for s in range(len(self.groups.group))]
        return torch.stack([token_logp[tokens].sum() for tokens in own]) if own else token_logp.new_zeros(0)

    def lengths(self) -> Tensor:
        return self.sequences(torch.ones(len(self.target), dtype=torch.float64))


def make_case(
    lengths: list[list[int]],
    negatives: list[int],
    *,
    seed: int = 0,
    shuffled: bool = True,
    ignored: int = 7,
    hidden_size: int = 6,
    vocab_size: int = 53,
    bias: bool = True,
    scale: float = 1.0,
    away: float = 8.0,
    dtype: torch.dtype = torch.float64,
    **transform: Any,
) -> Case:
    """Groups of sequences of these lengths; in each, the negative's place, or -1 for none. ``shuffled``: sequences and
    tokens in any order. Log-ratios to the reference lie within ``away``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    roles = [(g, i != negatives[g], length) for g, group in enumerate(lengths) for i, length in enumerate(group)]
    if shuffled:
        roles = [roles[i] for i in torch.randperm(len(roles), generator=generator).tolist()]
    ids = [s for s, (*_, length) in enumerate(roles) for _ in range(length)]
    sequence_ids = torch.tensor([*ids, *([-5, 10**9] * ignored)[:ignored]], dtype=torch.int64)
    target = torch.randint(vocab_size, (len(sequence_ids),), generator=generator)
    hidden = normal(len(target), hidden_size)
    target[len(ids) :], hidden[len(ids) :] = -100, torch.nan
    if shuffled:
        order = torch.randperm(len(target), generator=generator)
        hidden, target, sequence_ids = hidden[order], target[order], sequence_ids[order]
    case = Case(
        hidden=hidden,
        weight=normal(vocab_size, hidden_size) * scale / hidden_size**0.5,
        bias=normal(vocab_size) * 0.5 * scale if bias else None,
        target=target,
        sequence_ids=sequence_ids,
        groups=Groups(
            torch.tensor([g for g, *_ in roles], dtype=torch.int64),
            torch.tensor([positive for _, positive, _ in roles], dtype=torch.bool),
            len(lengths),
        ),
        ref_logp=torch.zeros(len(roles), dtype=torch.float64),
        transform=transform,
    ).to(dtype)
    ratio = (2 * torch.rand(len(roles), generator=generator, dtype=torch.float64) - 1) * away
    return replace(case, ref_logp=case.sequences(_token_logp(case, case.leaves)) - ratio)


def _token_logp(case: Case, leaves: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    hidden, weight, bias = (None if x is None else x.to(dtype) for x in map(leaves.get, ("hidden", "weight", "bias")))
    assert hidden is not None
    assert weight is not None
    hidden = torch.where(case.counted.unsqueeze(-1), hidden, 0.0)
    return logprob(full_logits(hidden, weight, bias, **case.transform), case.target)


class Expected(NamedTuple):
    loss: Tensor
    group_loss: Tensor
    sequence_logp: Tensor
    gradients: dict[str, Tensor]
    token_coef: Tensor
    """dL/dlogp of every token."""


def oracle(
    case: Case,
    objective: Objective,
    options: dict[str, Any] | None = None,
    *,
    group_weight: Tensor | None = None,
    reduction: str = "mean",
    softmax: torch.dtype | None = None,
) -> Expected:
    """In float64, with full logits and the public losses, one group at a time. ``softmax``: instead ordinary code in
    the dtype of the case, with a softmax in this one."""
    leaves = {name: (x if softmax else x.double()).requires_grad_() for name, x in case.leaves.items()}
    if softmax is None:
        token_logp = _token_logp(case, leaves)
    else:
        hidden = torch.where(case.counted.unsqueeze(-1), leaves["hidden"], 0.0)
        raw = F.linear(hidden, leaves["weight"], leaves.get("bias")).to(softmax)
        one = torch.ones((1, 1), dtype=softmax)
        token_logp = logprob(full_logits(raw[..., None], one, **case.transform)[..., 0], case.target)
    sequence_logp = case.sequences(token_logp)
    ref_logp = case.ref_logp.to(sequence_logp.dtype)
    if isinstance(objective, str):
        each = [
            _one_group(case, sequence_logp, ref_logp, g, objective, options or {}) for g in range(case.groups.count)
        ]
        group_loss = torch.stack(each) if each else sequence_logp.new_zeros(0)
        counted = case.groups.group[case.groups.positive].unique().numel()
        if (options or {}).get("allow_no_anchor"):
            counted = case.groups.count
    else:
        group_loss, counted = objective(sequence_logp, ref_logp, case.groups), case.groups.count
    weighted = group_loss if group_weight is None else group_weight * group_loss
    loss = weighted.sum() / (max(1, counted) if reduction == "mean" else 1)
    # Whatever the loss does not depend on has gradient 0.
    nothing = sum(x.flatten()[:0].sum() for x in (token_logp, *leaves.values()))
    token_coef, *gradients = torch.autograd.grad(loss + nothing, [token_logp, *leaves.values()])
    named = dict(zip(leaves, gradients, strict=True))
    return Expected(loss.detach(), group_loss.detach(), sequence_logp.detach(), named, token_coef)


def _one_group(
    case: Case, logp: Tensor, ref_logp: Tensor, number: int, objective: str, options: dict[str, Any]
) -> Tensor:
    own = case.groups.group == number
    chosen, rejected = own & case.groups.positive, own & ~case.groups.positive
    length = case.lengths()
    if not chosen.any() and not options.get("allow_no_anchor"):
        return logp.new_zeros(())
    if objective == "d2o":
        options = dict(options)
        divide = length if options.pop("length_normalize", False) else torch.ones_like(length)
        return losses.d2o_loss(
            logp[rejected] / divide[rejected],
            (logp[chosen] / divide[chosen])[None],
            ref_negative_logp=ref_logp[rejected] / divide[rejected],
            ref_anchor_logp=(ref_logp[chosen] / divide[chosen])[None],
            **options,
        )
    if objective == "exo_pair":
        options = {"label_smoothing": 1e-3, **options}
    return losses.dpo_loss(
        logp[chosen],
        logp[rejected],
        ref_chosen_logp=ref_logp[chosen],
        ref_rejected_logp=ref_logp[rejected],
        chosen_length=length[chosen] if objective == "ipo" else None,
        rejected_length=length[rejected] if objective == "ipo" else None,
        loss_type=objective,
        **options,
    )


def tiles(
    case: Case,
    way: str = "one part",
    *,
    backend: str | None = None,
    block: tuple[int, int] = (5, 16),
    part_tokens: int = 7,
) -> Plan:
    """A plan with small tiles, which takes one of the ways to a loss."""
    plan = Plan.choose(
        tokens=int(case.counted.sum()),
        hidden_size=case.weight.shape[1],
        vocab_size=len(case.weight),
        algorithm="grouped",
        dtype=case.hidden.dtype,
        backend=backend,
    )
    plan = replace(plan, block_tokens=block[0], block_vocab=min(block[1], len(case.weight)))
    row = len(case.weight) * case.hidden.element_size()
    half = (len(case.weight) // 2 + block[1]) * case.hidden.element_size()
    ways = {
        "one part": {"kept_bytes": plan.tokens * row},
        "part of the columns": {"kept_bytes": plan.tokens * half},
        "recompute": {"kept_bytes": 0},
        "parts": {"kept_bytes": part_tokens * row, "part_tokens": part_tokens},
        "parts of the columns": {"kept_bytes": part_tokens * half, "part_tokens": part_tokens},
        "parts, recompute": {"kept_bytes": 0, "part_tokens": part_tokens},
    }
    return dataclasses.replace(plan, **ways[way])  # type: ignore[arg-type]


WAYS = ("one part", "part of the columns", "recompute", "parts", "parts of the columns", "parts, recompute")


def run(
    case: Case,
    objective: Objective,
    options: dict[str, Any] | None = None,
    *,
    trained: tuple[str, ...] = ("hidden", "weight", "bias"),
    scale: float = 1.0,
    **arguments: Any,
) -> tuple[PreferenceOutput, dict[str, Tensor]]:
    """The result, and the gradients of ``scale * loss``, divided by it again."""
    leaves = case.leaves
    wanted = {name: leaves[name].requires_grad_() for name in trained if name in leaves}
    arguments = {"ref_logp": case.ref_logp.to(sums_of(case)), **arguments}
    out = linear_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        case.target,
        case.sequence_ids,
        case.groups,
        objective=objective,
        options=options,
        bias=leaves.get("bias"),
        **case.transform,
        **arguments,
    )
    if not wanted:
        return out, {}
    gradients = torch.autograd.grad(out.loss * scale, list(wanted.values()))
    return out, {name: gradient / scale for name, gradient in zip(wanted, gradients, strict=True)}


def sums_of(case: Case) -> torch.dtype:
    return torch.float64 if case.hidden.dtype == torch.float64 else torch.float32


def agree(
    result: tuple[PreferenceOutput, dict[str, Tensor]],
    expected: tuple[Any, dict[str, Tensor]],
    tolerance: float,
    floor: float = 0.0,
) -> None:
    """Losses, log-probabilities and gradients of two results, in float64 or float32; gradients relative to their
    largest entry, or to ``floor`` if that is more."""
    for name in ("loss", "group_loss", "sequence_logp"):
        ours, right = getattr(result[0], name).detach(), getattr(expected[0], name).detach()
        torch.testing.assert_close(ours.double(), right.double(), rtol=tolerance, atol=tolerance)
    for name, gradient in result[1].items():
        right = expected[1][name].double()
        size, error = (x.abs().max().item() if x.numel() else 0.0 for x in (right, gradient.double() - right))
        assert error <= tolerance * max(size, floor), name


def check(
    case: Case, objective: Objective, options: dict[str, Any], tolerance: float, floor: float = 0.0, **arguments: Any
) -> None:
    """Everything is what the oracle says."""
    reduced = {name: arguments[name] for name in ("group_weight", "reduction") if name in arguments}
    result = run(case, objective, options, **arguments)
    expected = oracle(case, objective, options, **reduced)
    assert result[0].loss.dtype == sums_of(case)
    assert all(gradient.dtype == case.hidden.dtype for gradient in result[1].values())
    agree(result, (expected, expected.gradients), tolerance, floor)


RAGGED = ([[5, 1, 7], [3], [4, 3, 6, 3, 2], [2, 2], [9, 7, 1, 4, 6]], [2, 0, 1, 0, 4])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def means(objective: str, options: dict[str, Any]) -> bool:
    return objective == "ipo" or bool(options.get("length_normalize"))


@st.composite
def structures(draw: Any) -> tuple[str, dict[str, Any], Case]:
    """Groups of 0 to 16 positives and a negative, their sequences ragged or empty, in any order."""
    objective, options = draw(st.sampled_from(OPTIONS))
    shortest = int(means(objective, options))
    lengths = draw(st.lists(st.lists(st.integers(shortest, 12), min_size=1, max_size=17), max_size=4))
    if objective == "d2o" and not options.get("allow_no_anchor"):
        lengths.append([shortest, 3])
    return (
        objective,
        options,
        make_case(
            lengths,
            [draw(st.integers(0, len(group) - 1)) for group in lengths],
            seed=draw(st.integers(0, 99)),
            shuffled=draw(st.booleans()),
            ignored=draw(st.sampled_from([0, 1, 9])),
            hidden_size=draw(st.integers(1, 7)),
            vocab_size=draw(st.sampled_from([2, 31, 64, 97])),
            bias=draw(st.booleans()),
            **TRANSFORMS[draw(st.sampled_from(sorted(TRANSFORMS)))],
        ),
    )


# --- against the oracle -----------------------------------------------------------------------------------------------


class TestOracle:
    @pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            pytest.param("cpu", torch.float32, marks=needs_native),
            ("torch", torch.float32),
            ("torch", torch.float64),
        ],
    )
    @given(
        drawn=structures(),
        way=st.sampled_from(WAYS),
        block=st.tuples(st.integers(1, 9), st.sampled_from([8, 16, 40])),
        part_tokens=st.integers(1, 40),
        reduction=st.sampled_from(["mean", "sum"]),
    )
    @hypothesis_settings(max_examples=25)
    def test_any_structure_of_groups(
        self,
        drawn: tuple[str, dict[str, Any], Case],
        way: str,
        block: tuple[int, int],
        part_tokens: int,
        reduction: str,
        backend: str,
        dtype: torch.dtype,
    ):
        objective, options, case = drawn
        case = case.to(dtype)
        plan = tiles(case, way, backend=backend, block=block, part_tokens=part_tokens)
        # Sums of tens of nats are known to 1e-6 of them, and terms of a coefficient may cancel: neither is relative to
        # what is left. A square passes such an error on twice, a sigmoid a hundredth of it.
        floor = 1.0 if objective in ("ipo", "sppo_hard") else 0.1
        check(case, objective, options, TOLERANCE[dtype], floor=floor, plan=plan, reduction=reduction)

    @pytest.mark.parametrize(("objective", "options"), OPTIONS, ids=str)
    @every_backend
    def test_every_objective(self, objective: str, options: dict[str, Any], backend: str):
        case = make_case(*RAGGED).to(torch.float32)
        check(case, objective, options, 1e-5, plan=tiles(case, "parts of the columns", backend=backend))
        check(case, objective, options, 1e-5, backend=backend)

    def test_there_is_an_example_of_every_objective(self):
        assert {objective for objective, _ in OPTIONS} == set(losses.PREFERENCE_OBJECTIVES)

    @pytest.mark.parametrize(("objective", "options"), OPTIONS, ids=str)
    def test_losses_are_the_formulas(self, objective: str, options: dict[str, Any]):
        """In plain Python floats, from log-probabilities of sequences."""
        case = make_case(*RAGGED)
        out, _ = run(case, objective, options)
        logp, length = oracle(case, objective, options).sequence_logp.tolist(), case.lengths().tolist()
        ref, group, positive = case.ref_logp.tolist(), case.groups.group.tolist(), case.groups.positive.tolist()
        for number in range(case.groups.count):
            own = [s for s in range(len(group)) if group[s] == number]
            (rejected,) = [s for s in own if not positive[s]]
            chosen = [s for s in own if positive[s]]
            if objective == "d2o":
                divide = length if options.get("length_normalize") else [1.0] * len(length)
                argument = reference.d2o_argument(
                    logp[rejected] / divide[rejected],
                    [logp[s] / divide[s] for s in chosen],
                    ref[rejected] / divide[rejected],
                    [ref[s] / divide[s] for s in chosen],
                    alpha=options.get("alpha", 0.1),
                    beta=options.get("beta", 0.1),
                )
                value = -reference.log_sigmoid(argument) if chosen or options.get("allow_no_anchor") else 0.0
            else:
                pairs = [
                    reference.Pair(logp[s] - ref[s], logp[rejected] - ref[rejected], 0.1, length[s], length[rejected])
                    for s in chosen
                ]
                value = sum(map(reference.DPO[objective], pairs)) / max(1, len(pairs))
            assert out.group_loss[number].item() == pytest.approx(value, rel=1e-9), number

    @every_backend
    @pytest.mark.parametrize("way", ["one part", "parts of the columns"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, dtype: torch.dtype, way: str, backend: str):
        """A kept weight is rounded, and once more with its coefficient, where eager code rounds once. Each rounding of
        8 bits is 1.6e-3 of a number, root mean square; with that of the result they make 3e-3, and 1/8 of it in
        float16."""
        lengths = [[12, 9, 14, 11], [15, 13], [8, 20, 10]]
        case = make_case(lengths, [0, 1, 2], hidden_size=32, vocab_size=401, scale=2.0, ignored=11).to(dtype)
        plan = tiles(case, way, backend=backend, block=(16, 64), part_tokens=50)
        expected, eager = oracle(case, "sigmoid"), oracle(case, "sigmoid", softmax=torch.float32)
        out, gradients = run(case, "sigmoid", plan=plan)
        assert out.loss.dtype == torch.float32
        assert rms_error(out.sequence_logp, expected.sequence_logp) <= 1.1 * rms_error(
            eager.sequence_logp, expected.sequence_logp
        )
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            own = rms_error(gradient, expected.gradients[name])
            assert own <= 1.05 * rms_error(eager.gradients[name], expected.gradients[name]) + (
                4e-3 if dtype == torch.bfloat16 else 5e-4
            ), name

    @pytest.mark.parametrize("with_ref", [True, False])
    @pytest.mark.parametrize("way", WAYS)
    def test_a_loss_of_ones_own(self, way: str, with_ref: bool):
        """Any function of a group's sequences; groups may have any number of negatives, or nothing at all."""

        def objective(logp: Tensor, ref_logp: Tensor | None, groups: Groups) -> Tensor:
            assert (ref_logp is not None) == with_ref
            ratio = logp if ref_logp is None else logp - ref_logp
            return F.softplus(groups.negatives(ratio) - groups.positives(ratio).square() / 40)

        lengths = [[5, 1, 7], [], [4, 3, 6, 3, 2], [0], [9, 7]]
        case = make_case(lengths, [2, -1, 0, -1, -1])
        case = replace(case, groups=replace(case.groups, positive=case.groups.positive.roll(1)))
        if not with_ref:
            case = replace(case, ref_logp=torch.zeros_like(case.ref_logp))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            arguments: dict[str, Any] = {} if with_ref else {"ref_logp": None}
            result = run(case, objective, plan=tiles(case, way), **arguments)
        expected = oracle(case, (lambda logp, _, groups: objective(logp, None, groups)) if not with_ref else objective)
        agree(result, (expected, expected.gradients), 1e-11)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("way", ["one part", "parts"])
    @pytest.mark.parametrize(("objective", "options"), [("sigmoid", {}), ("d2o", {}), *OPTIONS[1:2]])
    def test_weights_and_reduction(self, objective: str, options: dict[str, Any], way: str, reduction: str):
        case = make_case(*RAGGED)
        weight = torch.tensor([0.5, 3.0, 0.0, 2.5, 1e-3], dtype=torch.float64, requires_grad=True)
        check(case, objective, options, 1e-11, plan=tiles(case, way), group_weight=weight, reduction=reduction)
        assert weight.grad is None

    def test_the_mean_is_over_groups_with_a_positive(self):
        case = make_case(*RAGGED)
        out, _ = run(case, "sigmoid")
        torch.testing.assert_close(out.loss.detach(), out.group_loss.sum() / 4)
        out, _ = run(case, "d2o", {"allow_no_anchor": True})
        torch.testing.assert_close(out.loss.detach(), out.group_loss.sum() / 5)
        out, _ = run(case, lambda logp, _, groups: groups.negatives(logp))
        torch.testing.assert_close(out.loss.detach(), out.group_loss.sum() / 5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_leading_dimensions_and_strides_do_not_matter(self, dtype: torch.dtype):
        case = make_case([[4, 4], [4, 4, 4]], [1, 0], shuffled=False, ignored=0).to(dtype)
        flat, flat_gradients = run(case, "sigmoid")
        assert case.bias is not None
        wide = torch.zeros(len(case.weight), 12, dtype=dtype)
        leaves = {
            "hidden": case.hidden.view(5, 4, -1).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
            "weight": wide[:, ::2].copy_(case.weight).requires_grad_(),
            "bias": torch.stack([case.bias, case.bias], 1)[:, 0].requires_grad_(),
        }
        assert not any(tensor.is_contiguous() for tensor in leaves.values())
        arguments = (leaves["hidden"], leaves["weight"], case.target.view(5, 4), case.sequence_ids.view(5, 4))
        ref_logp = case.ref_logp.to(sums_of(case))
        out = linear_preference_loss(
            *arguments, case.groups, objective="sigmoid", ref_logp=ref_logp, bias=leaves["bias"]
        )
        gradients = torch.autograd.grad(out.loss, list(leaves.values()))
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(out.loss, flat.loss, rtol=tolerance, atol=tolerance)
        for name, gradient in zip(leaves, gradients, strict=True):
            assert gradient.shape == leaves[name].shape
            right = flat_gradients[name].double()
            assert relative_error(gradient.reshape(right.shape), right) <= tolerance, name

    @pytest.mark.parametrize(
        ("hidden_dtype", "weight_dtype"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
    )
    @pytest.mark.parametrize("way", ["one part", "parts"])
    def test_mixed_dtypes_compute_in_the_dtype_of_hidden(
        self, way: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
    ):
        case = make_case(*RAGGED, bias=False).to(torch.bfloat16)
        mixed = replace(case, hidden=case.hidden.to(hidden_dtype), weight=case.weight.to(weight_dtype))
        same = case.to(hidden_dtype)
        results = [
            run(each, "sigmoid", plan=replace(tiles(same, way), weight_dtype=each.weight.dtype))
            for each in (mixed, same)
        ]
        assert torch.equal(results[0][0].loss, results[1][0].loss)
        for name, gradient in results[0][1].items():
            other = results[1][1][name]
            assert gradient.dtype == getattr(mixed, name).dtype
            # Both are the same sum, rounded to two dtypes.
            coarser = min(gradient.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
            assert torch.equal(gradient.to(coarser), other.to(coarser)), name

    def test_autocast_chooses_the_dtype(self):
        case = make_case(*RAGGED).to(torch.float32)
        low = replace(case.to(torch.bfloat16), bias=case.bias)
        with torch.autocast("cpu", torch.bfloat16):
            out, gradients = run(case, "sigmoid", coefficient_tol=1e-9)
        right, right_gradients = run(low, "sigmoid", coefficient_tol=1e-9)
        assert torch.equal(out.loss, right.loss)
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        for name, gradient in gradients.items():
            assert torch.equal(gradient.to(right_gradients[name].dtype), right_gradients[name]), name

    def test_two_runs_give_the_same_bits(self):
        case = make_case(*RAGGED).to(torch.float32)
        for way in WAYS:
            first, second = (run(case, "d2o", plan=tiles(case, way), vocab_mass_tol=0.01) for _ in range(2))
            assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
            assert torch.equal(first[0].loss, second[0].loss)

    def test_metrics(self):
        case = make_case(*RAGGED)
        out, _ = run(case, "d2o", {"beta": 0.3})
        logp, groups = oracle(case, "d2o").sequence_logp, case.groups
        reward = 0.3 * (logp - case.ref_logp)
        sides = []
        for number in (0, 2, 3, 4):  # group 1 has no positive
            own = groups.group == number
            sides.append((own & groups.positive, own & ~groups.positive))
        expected = {
            "logps/chosen": [logp[chosen].mean() for chosen, _ in sides],
            "rewards/chosen": [reward[chosen].mean() for chosen, _ in sides],
            "rewards/rejected": [reward[rejected].sum() for _, rejected in sides],
            "rewards/accuracies": [(reward[chosen] > reward[rejected]).double().mean() for chosen, rejected in sides],
            "rewards/margins": [reward[chosen].mean() - reward[rejected].sum() for chosen, rejected in sides],
        }
        assert 0 < out.metrics["rewards/accuracies"] < 1
        for name, values in expected.items():
            torch.testing.assert_close(out.metrics[name].double(), torch.stack(values).mean(), rtol=1e-6, atol=0)
        assert out.metrics["skipped"] == pytest.approx(1 / 5)  # the group without a positive
        assert out.metrics["skipped_bound"] == 0
        assert "active_columns" not in out.metrics
        assert all(metric.dim() == 0 and not metric.requires_grad for metric in out.metrics.values())
        out, _ = run(case, lambda logp, _, groups: groups.negatives(logp))
        assert set(out.metrics) == {"logps/chosen", "logps/rejected", "skipped", "skipped_bound"}


class TestUpstream:
    """The loss's own gradient may be anything."""

    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
    @pytest.mark.parametrize("scale", [-3.0, 2.0**20])
    def test_a_scaled_loss(self, scale: float, trained: tuple[str, ...]):
        case = make_case(*RAGGED)
        plan = tiles(case, "parts") if len(trained) > 1 else None
        right = run(case, "d2o", trained=trained, plan=plan)
        agree(run(case, "d2o", trained=trained, plan=plan, scale=scale), right, 1e-13)

    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
    def test_a_loss_times_zero_has_gradient_zero(self, trained: tuple[str, ...]):
        leaves, case = make_case(*RAGGED).leaves, make_case(*RAGGED)
        for name in trained:
            leaves[name].requires_grad_()
        out = linear_preference_loss(
            *(leaves["hidden"], leaves["weight"], case.target, case.sequence_ids, case.groups),
            objective="d2o",
            ref_logp=case.ref_logp,
            bias=leaves["bias"],
        )
        (out.loss * 0.0).backward()
        for name in trained:
            gradient = leaves[name].grad
            assert gradient is not None
            assert torch.equal(gradient, torch.zeros_like(gradient)), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_gradients_accumulate_over_calls(self, dtype: torch.dtype):
        cases = [make_case(*RAGGED, seed=seed).to(dtype) for seed in range(3)]
        weight = cases[0].weight.clone().requires_grad_()
        expected = torch.zeros_like(weight)
        for case, factor in zip(cases, (1.0, 0.25, -2.0), strict=True):
            case = replace(case, weight=cases[0].weight)
            out = linear_preference_loss(
                *(case.hidden, weight, case.target, case.sequence_ids, case.groups),
                objective="sigmoid",
                ref_logp=case.ref_logp.to(sums_of(case)),
                bias=case.bias,
                plan=tiles(case, "parts"),
            )
            (factor * out.loss).backward()
            _, gradients = run(case, "sigmoid", trained=("weight",), plan=tiles(case, "parts"))
            expected += factor * gradients["weight"]
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected, rtol=1e-13 if dtype == torch.float64 else 1e-2, atol=1e-13)

    def test_the_loss_may_be_one_term_of_several(self):
        case = make_case(*RAGGED)
        leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
        arguments = (leaves["hidden"], leaves["weight"], case.target, case.sequence_ids, case.groups)
        options: dict[str, Any] = {"ref_logp": case.ref_logp, "bias": leaves["bias"]}
        first = linear_preference_loss(*arguments, objective="d2o", **options).loss
        second = linear_preference_loss(*arguments, objective="sigmoid", **options).loss
        total = first.square() + 3 * second + leaves["weight"].square().sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        ours = dict(zip(leaves, gradients, strict=True))
        d2o, sigmoid = oracle(case, "d2o"), oracle(case, "sigmoid")
        for name, gradient in ours.items():
            right = 2 * d2o.loss * d2o.gradients[name] + 3 * sigmoid.gradients[name]
            right = right + 2 * case.weight if name == "weight" else right
            assert relative_error(gradient, right) <= 1e-12, name

    def test_float16_gradients_survive_a_loss_scale(self):
        """Coefficients far below float16's range reach hidden and weight, as with any loss on ``linear_logprob``."""
        case = make_case(*RAGGED, bias=False).to(torch.float16)
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = linear_preference_loss(
            *(hidden, weight, case.target, case.sequence_ids, case.groups),
            objective="d2o",
            ref_logp=case.ref_logp.float(),
            options=(options := {"alpha": 1e-5, "beta": 1e-5}),
        )
        (out.loss * 2.0**17).backward()
        right = oracle(case, "d2o", options).gradients
        for name, leaf in (("hidden", hidden), ("weight", weight)):
            assert leaf.grad is not None
            assert rms_error(leaf.grad.double() / 2.0**17, right[name]) <= 2e-3, name


# --- the ways agree ---------------------------------------------------------------------------------------------------


class TestWays:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("objective", "options"), [("d2o", {}), ("ipo", {})])
    def test_they_agree_to_rounding(self, objective: str, options: dict[str, Any], dtype: torch.dtype):
        case = make_case(*RAGGED).to(dtype)
        right = run(case, objective, options, plan=tiles(case, "recompute"))
        for way in WAYS:
            result = run(case, objective, options, plan=tiles(case, way))
            agree(result, right, 1e-12 if dtype == torch.float64 else 3e-6)
        for budget in (0, 10**4, None, 0.5):
            agree(run(case, objective, options, memory_budget=budget), right, 1e-12 if dtype == torch.float64 else 3e-6)

    @pytest.mark.parametrize("way", WAYS)
    def test_they_are_what_autograd_makes_of_sequence_logprob(self, way: str):
        case = make_case([[6, 6], [6, 6, 6], [6], [6, 6]], [1, 0, 0, 1], shuffled=False, ignored=0, softcap=3.0)
        case.target[torch.arange(0, 48, 5)] = -100
        result = run(case, "sigmoid", plan=tiles(case, way))
        leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
        logp = fastd2o.sequence_logprob(
            leaves["hidden"].view(8, 6, -1),
            leaves["weight"],
            case.target.view(8, 6),
            shift=False,
            bias=leaves["bias"],
            **case.transform,
        )
        assert result[0].plan.algorithm == "grouped"
        start = torch.arange(9)
        grouped = losses.grouped_loss(
            logp,
            start,
            torch.tensor([0, 2, 5, 6, 8]),
            case.groups.positive,
            objective="sigmoid",
            ref_logp=case.ref_logp,
        )
        loss = grouped.loss.sum() / 3
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        expected = Expected(loss.detach(), grouped.loss.detach(), logp.detach(), {}, logp)
        agree(result, (expected, dict(zip(leaves, gradients, strict=True))), 1e-12)

    def test_the_plan_says_what_was_done(self):
        case = make_case(*RAGGED)
        factors = {
            "one part": 6.0,
            "part of the columns": 8 - 2 * 32 / 53,  # two slabs of 16
            "recompute": 8.0,
            "parts": 6.0,
            "parts of the columns": 8 - 2 * 32 / 53,
            "parts, recompute": 8.0,
        }
        for way, factor in factors.items():
            plan = tiles(case, way)
            out, _ = run(case, "d2o", plan=plan)
            assert out.plan == plan
            assert plan.flops_factor == pytest.approx(factor)
            assert plan.flops == pytest.approx(factor * 65 * 6 * 53)

    @pytest.mark.parametrize("way", WAYS)
    def test_operations(self, way: str, operations: list[int]):
        """As many as the plan says, with every part no larger than it says."""
        case = make_case([[3, 4]] * 8, [0] * 8)
        plan = tiles(case, way)
        run(case, "sigmoid", plan=plan)
        assert sum(operations) == plan.flops

    def test_a_group_larger_than_a_part_keeps_what_fits(self, operations: list[int]):
        case = make_case([[3, 4], [14, 14], [7]], [0, 0, 0], vocab_size=64)
        run(case, "sigmoid", plan=tiles(case, "parts", part_tokens=14))
        # 7 and 7 tokens do not go together with 28; those keep 32 of 64 columns. The last 7 have no gradient.
        expected = 2 * 6 * 64 * (3 * 7 + 3 * 28 + 7) + 2 * 6 * 32 * 28
        assert sum(operations) == expected


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Floating-point operations of every matrix product of the engine."""
    counts: list[int] = []
    for ops in (TorchTileOps, CpuTileOps):

        def product(self: Any, out: Tensor, left: Tensor, right: Tensor, *rest: Any, do: Any = ops.product, **kw: Any):
            counts.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
            do(self, out, left, right, *rest, **kw)

        monkeypatch.setattr(ops, "product", product)
    return counts


# --- losses that are no sum over groups -------------------------------------------------------------------------------


def kto_like(logp: Tensor, ref_logp: Tensor | None, groups: Groups) -> Tensor:
    """The mean over the batch is part of every group's loss, and of its gradient."""
    assert ref_logp is not None
    ratio = logp - ref_logp
    away = torch.where(groups.positive, 1.0, -1.0) * (ratio - ratio.mean()) / 5
    return groups.negatives(1 - away.sigmoid()) + groups.positives(1 - away.sigmoid())


class TestNotASum:
    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ("bias",)])
    @pytest.mark.parametrize("way", WAYS)
    def test_it_is_recognised(self, way: str, trained: tuple[str, ...]):
        case = make_case(*RAGGED)
        expected = oracle(case, kto_like)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(case, kto_like, trained=trained, plan=tiles(case, way) if "bias" in trained else None)
        several = way.startswith("parts") and "bias" in trained
        assert [warning.category for warning in caught] == [FastD2OWarning] * several
        if several:
            assert "not a sum over groups" in str(caught[0].message)
            assert "Fix: memory_budget=" in str(caught[0].message)
            assert caught[0].filename == __file__
            assert result[0].plan.algorithm == "recompute"
        agree(result, (expected, expected.gradients), 1e-11)

    @pytest.mark.parametrize("way", ["parts", "parts of the columns"])
    def test_it_is_recognised_at_the_first_step(self, way: str):
        """Policy and reference are one model: the losses are what they would be without the mean, the gradients not."""
        case = make_case(*RAGGED)
        case = replace(case, ref_logp=oracle(case, "d2o").sequence_logp)
        expected = oracle(case, kto_like)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(case, kto_like, plan=tiles(case, way))
        agree(result, (expected, expected.gradients), 1e-11)
        assert [warning.category for warning in caught] == [FastD2OWarning]

    def test_weights_and_skipping_hold_for_it_too(self):
        case = make_case(*RAGGED)
        weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], dtype=torch.float64)
        with pytest.warns(FastD2OWarning, match="not a sum"):
            result = run(case, kto_like, plan=tiles(case, "parts"), group_weight=weight, reduction="sum")
        expected = oracle(case, kto_like, group_weight=weight, reduction="sum")
        agree(result, (expected, expected.gradients), 1e-11)


# --- skipping groups --------------------------------------------------------------------------------------------------


def group_of_token(case: Case) -> Tensor:
    """[T], -1 where ignored."""
    group = torch.full_like(case.target, -1)
    group[case.counted] = case.groups.group[case.sequence_ids[case.counted]]
    return group


def logodds_coef(case: Case, expected: Expected) -> Tensor:
    """dL/dm of every token: d logsigmoid(m) = 1 - p."""
    return expected.token_coef * -torch.expm1(_token_logp(case, case.leaves))


class TestSkipping:
    def hinge_case(self, **options: Any) -> tuple[Case, int]:
        """A case of which groups 0 and 2 have met the margin, and how many tokens the others have."""
        case = make_case([[5, 6, 3], [4, 7], [8, 2], [3, 9, 1]], [0, 1, 0, 2], away=3.0, **options)
        ref_logp = case.ref_logp.clone()
        met = (case.groups.group % 2 == 0) & case.groups.positive
        ref_logp[met] -= 100
        return replace(case, ref_logp=ref_logp), 11 + 13

    @every_backend
    @pytest.mark.parametrize("way", WAYS)
    def test_a_margin_that_is_met_costs_nothing(self, way: str, backend: str, operations: list[int]):
        case, live = self.hinge_case(vocab_size=64)
        case = case.to(torch.float32)
        plan = tiles(case, way, backend=backend, part_tokens=14)
        out, gradients = run(case, "hinge", plan=plan)
        kept = plan.kept_columns / 64
        assert sum(operations) == 2 * 6 * 64 * (48 + (3 - kept) * live)
        assert out.metrics["skipped"] == 0.5
        assert out.metrics["skipped_bound"] == 0
        is_met = group_of_token(case) % 2 == 0
        assert torch.equal(gradients["hidden"][is_met], torch.zeros(int(is_met.sum()), 6))
        agree((out, gradients), (expected := oracle(case, "hinge"), expected.gradients), 1e-5)

    @pytest.mark.parametrize("way", WAYS)
    def test_a_group_without_weight_costs_nothing(self, way: str, operations: list[int]):
        case = make_case([[5, 6, 3], [4, 7], [8, 2], [3, 9, 1]], [0, 1, 0, 2], vocab_size=64)
        plan, weight = tiles(case, way, part_tokens=14), torch.tensor([0.0, 2.0, 0.0, 0.1], dtype=torch.float64)
        out, gradients = run(case, "sigmoid", plan=plan, group_weight=weight)
        assert sum(operations) == 2 * 6 * 64 * (48 + (3 - plan.kept_columns / 64) * 24)
        assert out.metrics["skipped"] == 0.5
        expected = oracle(case, "sigmoid", group_weight=weight)
        agree((out, gradients), (expected, expected.gradients), 1e-11)
        assert (out.group_loss > 0).all()  # before the weight

    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
    def test_a_group_without_weight_may_hold_anything(self, trained: tuple[str, ...]):
        case = make_case([[2, 3], [4, 7]], [0, 1], shuffled=False, ignored=0)
        assert case.bias is not None
        case.target[:5], case.target[5:], case.bias[7] = 7, case.target[5:] % 7, -torch.inf
        weight = torch.tensor([0.0, 1.0])
        out, gradients = run(case, "sigmoid", group_weight=weight, trained=trained)
        assert out.loss.isfinite()
        assert torch.equal(gradients["hidden"][:5], torch.zeros(5, 6, dtype=torch.float64))
        assert all(gradient.isfinite().all() for gradient in gradients.values())

    @pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("way", ["one part", "parts of the columns", "general"])
    def test_small_coefficients_are_left_out_and_bounded(
        self, way: str, reduction: str, share: float, operations: list[int]
    ):
        """The tolerance is for a group's own loss: weight and reduction do not count."""
        case = make_case(
            [[5, 6, 3], [4, 7], [8, 2], [3, 9, 1], [2, 2]], [0, 1, 0, 2, 1], vocab_size=64, logit_scale=0.5
        )
        weight = torch.tensor([1e-3, 2.0, 30.0, 0.5, 1.0], dtype=torch.float64)
        alone = oracle(case, "d2o", reduction="sum")
        group, coef = group_of_token(case), logodds_coef(case, alone).abs()
        largest = torch.stack([coef[group == g].max() for g in range(5)])
        tolerance = (largest.sort().values[::1] * (1 + 1e-4))[min(4, int(share * 5))].item() if share else 0.0
        skipped = largest <= tolerance
        arguments: dict[str, Any] = {"group_weight": weight, "reduction": reduction}
        trained = ("hidden",) if way == "general" else ("hidden", "weight", "bias")
        plan = None if way == "general" else tiles(case, way, part_tokens=14)
        out, gradients = run(case, "d2o", trained=trained, plan=plan, coefficient_tol=tolerance, **arguments)
        expected = oracle(case, "d2o", **arguments)
        left_out = skipped[group] & (group >= 0)
        bound = (
            2**0.5
            * 0.5
            * (logodds_coef(case, expected).abs() * torch.where(left_out, case.hidden.norm(dim=1), 0)).sum()
        )
        right = expected.gradients["hidden"].masked_fill(left_out.unsqueeze(1), 0.0)
        assert relative_error(gradients["hidden"], right) <= 1e-11
        if way == "general":
            assert "skipped" not in out.metrics  # only a backward knows
        else:
            assert out.metrics["skipped"].item() == pytest.approx(skipped.double().mean().item())
            torch.testing.assert_close(out.metrics["skipped_bound"], bound, rtol=1e-6, atol=0)
            lost = (gradients["weight"] - expected.gradients["weight"]).norm()
            assert lost <= out.metrics["skipped_bound"] * (1 + 1e-9) + 1e-12
            assert (lost > 1e-12) == bool(skipped.any())
        if way == "one part":
            live = int((~left_out & (group >= 0)).sum())
            assert sum(operations) == 2 * 6 * 64 * (52 + 2 * live)

    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
    @pytest.mark.parametrize("scale", [2.0**16, 2.0**-20, -1.0])
    def test_loss_scaling_does_not_change_what_is_skipped(self, scale: float, trained: tuple[str, ...]):
        case = make_case(*RAGGED)
        plan = tiles(case, "parts") if len(trained) > 1 else None
        arguments: dict[str, Any] = {"coefficient_tol": 0.03, "plan": plan, "trained": trained}
        out, gradients = run(case, "sigmoid", **arguments)
        scaled_out, scaled = run(case, "sigmoid", scale=scale, **arguments)
        zeros = gradients["hidden"].norm(dim=1) == 0
        assert 0 < zeros[case.counted].double().mean() < 1
        assert torch.equal(scaled["hidden"].norm(dim=1) == 0, zeros)
        assert all(torch.equal(scaled_out.metrics[name], metric) for name, metric in out.metrics.items())
        for name, gradient in gradients.items():
            torch.testing.assert_close(scaled[name], gradient, rtol=1e-12, atol=1e-15)

    def test_a_negative_weight_skips_no_less(self):
        case = make_case(*RAGGED)
        weight = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5])
        arguments: dict[str, Any] = {"coefficient_tol": 100.0, "plan": tiles(case, "parts")}
        out, gradients = run(case, "sigmoid", group_weight=-weight, **arguments)
        assert out.metrics["skipped"] == 1
        assert torch.equal(gradients["weight"], torch.zeros_like(gradients["weight"]))


# --- active vocabulary ------------------------------------------------------------------------------------------------


def flat(case: Case) -> Case:
    """All columns alike."""
    return replace(case, weight=torch.ones_like(case.weight), bias=None)


def check_bounds(case: Case, tol: float, way: str, objective: str = "sigmoid", part_tokens: int = 7) -> Tensor:
    """What ``vocab_mass_tol`` promises; the share of active columns."""
    plan = tiles(case, way, part_tokens=part_tokens)
    _, exact = run(case, objective, plan=plan)
    out, gradients = run(case, objective, plan=plan, vocab_mass_tol=tol)
    slope = abs(case.transform.get("logit_scale", 1.0) / case.transform.get("temperature", 1.0))
    coef = oracle(case, objective).token_coef.abs()
    lost = {name: gradient - exact[name] for name, gradient in gradients.items()}
    rounding = 1e-12
    bound_T = coef * tol * case.weight.norm(dim=1).max() * slope
    assert (lost["hidden"].norm(dim=1) <= bound_T * (1 + 1e-9) + rounding).all()
    hidden_norm = torch.where(case.counted, case.hidden.norm(dim=1), 0.0)
    assert lost["weight"].norm() <= (coef * hidden_norm).sum() * tol * slope * (1 + 1e-9) + rounding
    if "bias" in lost:
        assert lost["bias"].norm() <= coef.sum() * tol * slope * (1 + 1e-9) + rounding
    return out.metrics["active_columns"]


class TestActiveVocabulary:
    @given(
        sharpness=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
        tol=st.sampled_from([1e-6, 1e-3, 0.02, 0.3, 0.9]),
        way=st.sampled_from(WAYS),
        transform=st.sampled_from(sorted(TRANSFORMS)),
        objective=st.sampled_from(["sigmoid", "hinge", "d2o"]),
        vocab_size=st.sampled_from([2, 50, 300]),
        seed=st.integers(0, 99),
    )
    @hypothesis_settings(max_examples=25)
    def test_errors_are_within_the_bounds(
        self, sharpness: float, tol: float, way: str, transform: str, objective: str, vocab_size: int, seed: int
    ):
        case = make_case(*RAGGED, seed=seed, scale=sharpness, vocab_size=vocab_size, **TRANSFORMS[transform])
        if way.endswith("recompute"):
            out, gradients = run(case, objective, plan=tiles(case, way), vocab_mass_tol=tol)
            agree((out, gradients), run(case, objective, plan=tiles(case, way)), 1e-12)  # nothing kept, all exact
        else:
            check_bounds(case, tol, way, objective)

    @pytest.mark.parametrize("way", ["one part", "parts"])
    def test_a_flat_distribution_keeps_nearly_everything(self, way: str):
        case = flat(make_case(*RAGGED, vocab_size=640))
        assert check_bounds(case, 0.01, way, part_tokens=30) == 1.0  # less than one of 64 steps
        assert 0.9 <= check_bounds(case, 0.1, way, part_tokens=30) < 1.0

    @pytest.mark.parametrize("way", ["one part", "parts", "part of the columns"])
    def test_a_peaked_distribution_drops_most(self, way: str):
        case = make_case(*RAGGED, vocab_size=640, scale=20.0)
        # Columns that are not kept, in some of the parts too, count as formed.
        assert check_bounds(case, 0.01, way) < (0.4 if way == "one part" else 0.7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tol", [1e-2, 1e-6])
    def test_a_peaked_distribution_drops_most_in_any_dtype(self, tol: float, dtype: torch.dtype):
        """Every token is nearly sure of one of four columns."""
        case = make_case(*RAGGED, vocab_size=640, bias=False).to(dtype)
        hidden, weight = torch.zeros_like(case.hidden), torch.zeros_like(case.weight)
        hidden[torch.arange(len(hidden)), torch.arange(len(hidden)) % 4] = 8
        weight[:4, :4] = 8 * torch.eye(4)
        case = replace(case, hidden=hidden, weight=weight, target=torch.where(case.counted, case.target % 4, -100))
        out, gradients = run(case, "sigmoid", {"beta": 1e-3}, vocab_mass_tol=tol)
        assert out.metrics["active_columns"] < 0.1
        assert all(gradient.isfinite().all() for gradient in gradients.values())

    def test_columns_that_are_left_out_have_no_gradient_and_targets_have(self):
        case = make_case(*RAGGED, vocab_size=640, scale=12.0)
        out, gradients = run(case, "sigmoid", plan=tiles(case, "one part"), vocab_mass_tol=0.5)
        touched = (gradients["weight"] != 0).any(1)
        assert torch.equal(touched, gradients["bias"] != 0)
        assert out.metrics["active_columns"] == touched.double().mean()
        assert 0 < out.metrics["active_columns"] < 0.3
        has_gradient = oracle(case, "sigmoid").token_coef != 0
        assert touched[case.target[has_gradient]].all()

    def test_operations(self, operations: list[int]):
        """Two products, forward apart, are about active columns alone; choosing them costs one with 64 columns."""
        case = make_case(*RAGGED, vocab_size=640, scale=12.0, ignored=0)
        out, _ = run(case, "d2o", {"allow_no_anchor": True}, plan=tiles(case, "one part"), vocab_mass_tol=0.3)
        active = round(out.metrics["active_columns"].item() * 640)
        assert sum(operations) == 2 * 65 * (6 * 640 + 64 * 640 + 2 * 6 * active)

    def test_nothing_kept_is_nothing_left_out(self):
        case = make_case(*RAGGED, scale=12.0)
        several: tuple[dict[str, Any], ...] = ({"memory_budget": 0}, {"trained": ("hidden",)}, {"trained": ()})
        for arguments in several:
            out, gradients = run(case, "sigmoid", vocab_mass_tol=0.5, **arguments)
            agree((out, gradients), (expected := oracle(case, "sigmoid"), expected.gradients), 1e-11)
            assert out.metrics.get("active_columns", 1.0) == 1.0

    @given(
        sharpness=st.sampled_from([0.0, 0.3, 3.0, 10.0]),
        tol=st.sampled_from([1e-7, 1e-3, 0.05, 0.5]),
        columns=st.sampled_from([16, 100, 300]),
        block_vocab=st.sampled_from([16, 100, 300]),
        some=st.booleans(),
        softcap=st.sampled_from([None, 3.0]),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 99),
    )
    @hypothesis_settings(max_examples=30)
    def test_what_is_dropped(
        self,
        sharpness: float,
        tol: float,
        columns: int,
        block_vocab: int,
        some: bool,
        softcap: float | None,
        dtype: torch.dtype,
        seed: int,
    ):
        """No token loses more than its tolerance of the softmax over the others, no target is lost, and as much is
        dropped as 64 steps allow."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(20, 8, generator=generator, dtype=torch.float64).to(dtype)
        weight = (torch.randn(300, 8, generator=generator, dtype=torch.float64) * sharpness / 8**0.5).to(dtype)
        target = torch.randint(300, (20,), generator=generator)
        head = engine.Head(weight, None, LogitTransform(1.0, softcap, 1.0))
        tiling = engine.Tiling(7, block_vocab, dtype, "torch", kept_bytes=columns * 20 * dtype.itemsize)
        forward = engine.logodds_forward(hidden, head, target, tiling, unit=False, statistics=False, keep=True)
        rows = torch.tensor([1, 2, 5, 11, 19]) if some else torch.arange(20)
        assert (forward.kept is None) == (columns < block_vocab)
        if forward.kept is None:
            return
        kept = forward.kept.of(rows if some else None)
        tol_T1 = tol * (1 + torch.rand(20, 1, generator=generator, dtype=torch.float64)).to(tiling.sum_dtype)[rows]
        blocks = [slice(start, min(start + 7, len(rows))) for start in range(0, len(rows), 7)]

        def memory(tokens: int, columns: int) -> torch.Tensor:
            return hidden.new_empty(tokens, columns)

        lse_others_T1 = forward.lse_others[rows].unsqueeze(1)
        active = active_columns(kept, lse_others_T1, target[rows], tol_T1, blocks, memory, tiling.ops(head))

        logits = full_logits(hidden.double(), weight.double(), softcap=softcap)
        bend = 1 if softcap is None else 1 - (logits / softcap).square()
        others = logits.scatter(1, target[:, None], -torch.inf).softmax(1) * bend
        chosen = torch.zeros(300, dtype=torch.bool)
        chosen[kept.columns :] = True
        for start in range(0, kept.columns, block_vocab):
            own = active.of(start)
            assert (own.diff() > 0).all()
            chosen[start + own] = True
        assert chosen[target[rows]].all()
        assert active.left_of(300) == chosen.sum()
        dropped = (others[rows] * ~chosen).sum(1, keepdim=True)
        # A logit of a 16-bit tile is known to its own rounding, and so are sums of weights.
        unit = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        slack = 1 + unit * (2 + (0 if dtype.itemsize > 2 else logits.abs().max().item()))
        # What float16 takes for 0 is nobody's gradient, active or not.
        vanished = 300 * 2**-25 if dtype == torch.float16 else 0.0
        assert (dropped <= tol_T1 * slack + vanished).all()
        # One step more, of 1/64 of the columns, would be too much; its columns' mass is at most this.
        chosen[target[rows]] = False
        if chosen[: kept.columns].any() and sharpness == 0:
            one_more = (kept.columns // 64 + 1) / 299
            assert ((dropped + one_more) >= tol_T1 / slack).any()


# --- the operator below -----------------------------------------------------------------------------------------------


class TestLinearGrouped:
    """``linear_grouped``: any loss of parts, which may depend on other tensors, and on statistics."""

    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
    @pytest.mark.parametrize("way", ["one part", "parts"])
    def test_other_tensors_and_statistics(self, way: str, trained: tuple[str, ...]):
        case = make_case(*RAGGED)
        leaves = case.leaves
        wanted = [leaves[name].requires_grad_() for name in trained]
        generator = torch.Generator().manual_seed(1)
        factor, shift, constant = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (72, 5, 72))
        extra = (factor.requires_grad_(), shift.requires_grad_(), constant)
        seen: list[Part] = []

        def of_tokens(
            logodds: Tensor, tokens: Tensor, group: Tensor, extra: tuple[Tensor, ...], entropy: Tensor
        ) -> Tensor:
            factor, shift, constant = extra
            return (F.softplus(logodds * factor[tokens] + shift[group]) * entropy + constant[tokens] * logodds).sum()

        def loss(part: Part) -> Tensor:
            seen.append(part)
            length = part.group_start.diff()
            own = torch.arange(part.groups.start, part.groups.stop).repeat_interleave(length)
            assert torch.equal(own, case.groups.group[part.sequences])
            sequence = part.sequences.repeat_interleave(part.sequence_start.diff())
            assert torch.equal(sequence, case.sequence_ids[part.tokens])
            assert part.statistics is not None
            group = case.groups.group[sequence]
            return of_tokens(part.logodds, part.tokens, group, part.extra, part.statistics.entropy)

        out = linear_grouped(
            *(leaves["hidden"], leaves["weight"], case.target, case.sequence_ids),
            case.groups.group.tolist(),
            loss,
            groups=5,
            extra=extra,
            bias=leaves["bias"],
            plan=tiles(case, way) if len(trained) > 1 else None,
            stats=True,
        )
        gradients = torch.autograd.grad(-2 * out.loss, [*wanted, factor, shift])
        assert len(seen) == out.parts == (5 if way == "parts" and len(trained) > 1 else 1)
        assert sorted(torch.cat([part.tokens for part in seen]).tolist()) == case.counted.nonzero().flatten().tolist()

        exact = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
        odds, entropy, *_ = fastd2o.linear_logodds(
            *(exact["hidden"], exact["weight"], case.target), bias=exact["bias"], stats=True
        )
        tokens = case.counted.nonzero().flatten()
        right = of_tokens(odds[tokens], tokens, group_of_token(case)[tokens], extra, entropy[tokens])
        torch.testing.assert_close(out.loss, right)
        expected = torch.autograd.grad(-2 * right, [*(exact[name] for name in trained), factor, shift])
        for ours, theirs in zip(gradients, expected, strict=True):
            assert relative_error(ours, theirs) <= 1e-12

    @pytest.mark.parametrize("scale", [1.0, -(2.0**16), 2.0**-20])
    @pytest.mark.parametrize("separable", [True, False])
    @pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)])
    def test_what_is_skipped(self, trained: tuple[str, ...], separable: bool, scale: float):
        """Where gradients are not formed in the forward, every backward says it, and says the same."""
        case = make_case(*RAGGED, bias=False, logit_scale=0.5)
        leaves = case.leaves
        wanted = [leaves[name].requires_grad_() for name in trained]
        factor = torch.tensor([0.1, 3.0, 0.0, 1.0, 0.2], dtype=torch.float64)  # |dloss/dm| of groups

        def loss(part: Part) -> Tensor:
            group = case.groups.group[part.sequences].repeat_interleave(part.sequence_start.diff())
            return (factor[group] * part.logodds).sum()

        out = linear_grouped(
            *(leaves["hidden"], leaves["weight"], case.target, case.sequence_ids, case.groups.group.tolist(), loss),
            groups=5,
            separable=separable,
            coefficient_tol=torch.tensor([0.2, 0.2, 0.2, 2.0, 0.1]),
            logit_scale=0.5,
            plan=tiles(case, "parts") if len(trained) > 1 else None,
        )
        group = group_of_token(case)
        for _ in range(1 if out.plan.algorithm == "grouped" else 2):
            gradient, *_ = torch.autograd.grad(scale * out.loss, wanted, retain_graph=True)
            assert out.skipped.tolist() == [True, False, True, True, False]
            left_out = (group == 0) | (group == 3)
            norm = torch.where(left_out, case.hidden.norm(dim=1), 0.0)
            torch.testing.assert_close(out.skipped_bound, 2**0.5 * 0.5 * (factor[group] * norm).sum())
            assert torch.equal(gradient.norm(dim=1) > 0, (group == 1) | (group == 4))


class TestGroups:
    def test_sums_over_sides(self):
        groups = Groups(torch.tensor([2, 0, 2, 0, 2, 3]), torch.tensor([True, False, False, True, True, True]))
        values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
        assert groups.count == 4
        assert groups.negatives(values).tolist() == [2.0, 0.0, 3.0, 0.0]
        assert groups.positives(values).tolist() == [4.0, 0.0, 3.0, 6.0]
        (gradient,) = torch.autograd.grad(groups.positives(values) @ torch.arange(4.0), values)
        assert gradient.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 3.0]

    def test_the_other_side_may_hold_anything(self):
        groups = Groups(torch.tensor([0, 0]), torch.tensor([True, False]))
        assert groups.negatives(torch.tensor([torch.nan, 1.0])).tolist() == [1.0]
        assert groups.positives(torch.tensor([1.0, torch.inf])).tolist() == [1.0]

    def test_no_sequence(self):
        groups = Groups(torch.zeros(0).long(), torch.zeros(0).bool())
        assert groups.count == 0
        assert groups.positives(torch.zeros(0)).shape == (0,)
        assert replace(groups, number=2).negatives(torch.zeros(0)).tolist() == [0.0, 0.0]


# --- what gets a gradient ---------------------------------------------------------------------------------------------


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        ("trained", "algorithm"),
        [
            ((), "forward"),
            (("hidden",), "unit"),
            (("weight",), "grouped"),
            (("bias",), "grouped"),
            (("weight", "bias"), "grouped"),
            (("hidden", "bias"), "grouped"),
            (("hidden", "weight"), "grouped"),
        ],
    )
    @pytest.mark.parametrize("way", ["one part", "parts of the columns"])
    @pytest.mark.parametrize("vocab_mass_tol", [0.0, 1e-14])
    def test_any_choice(self, vocab_mass_tol: float, way: str, trained: tuple[str, ...], algorithm: str):
        case = make_case(*RAGGED)
        plan = tiles(case, way) if algorithm == "grouped" else None
        out, gradients = run(case, "d2o", trained=trained, plan=plan, vocab_mass_tol=vocab_mass_tol)
        assert out.plan.algorithm == algorithm
        assert out.loss.requires_grad == bool(trained)
        assert set(gradients) == set(trained)
        assert not out.group_loss.requires_grad
        assert not out.sequence_logp.requires_grad
        agree((out, gradients), (expected := oracle(case, "d2o"), expected.gradients), 1e-11)

    def test_no_grad_mode(self):
        case = make_case(*RAGGED)
        with torch.no_grad():
            hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
            out = linear_preference_loss(
                *(hidden, weight, case.target, case.sequence_ids, case.groups),
                objective="d2o",
                ref_logp=case.ref_logp,
                bias=case.bias,
            )
        assert out.plan.algorithm == "forward"
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, oracle(case, "d2o").loss)

    def test_operations_of_the_general_path(self, operations: list[int]):
        case = make_case(*RAGGED, ignored=30)
        run(case, "d2o", trained=("hidden",))
        assert sum(operations) == 4 * 65 * 6 * 53
        operations.clear()
        run(case, "d2o", trained=())
        assert sum(operations) == 2 * 65 * 6 * 53

    @pytest.mark.parametrize("objective", ["d2o", kto_like])
    def test_references_and_weights_are_constants(self, objective: Objective):
        case = make_case(*RAGGED)
        for trained in (("hidden", "weight"), ("hidden",)):
            ref_logp, weight = case.ref_logp.clone().requires_grad_(), torch.ones(5).requires_grad_()
            leaves = case.leaves
            wanted = [leaves[name].requires_grad_() for name in trained]
            out = linear_preference_loss(
                *(leaves["hidden"], leaves["weight"], case.target, case.sequence_ids, case.groups),
                objective=objective,
                ref_logp=ref_logp,
                group_weight=weight,
            )
            gradients = torch.autograd.grad(out.loss, [*wanted, ref_logp, weight], allow_unused=True)
            assert gradients[-2:] == (None, None)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ()])
    @pytest.mark.parametrize("ignored", [0, 5])
    def test_no_token_counts(self, ignored: int, trained: tuple[str, ...], dtype: torch.dtype):
        case = make_case([[0, 0], [0]], [0, 0], ignored=ignored).to(dtype)
        case = replace(case, ref_logp=torch.tensor([-3.0, -2.0, -5.0], dtype=torch.float64))
        for objective in ("d2o", "sigmoid"):
            out, gradients = run(case, objective, trained=trained)
            torch.testing.assert_close(out.loss.detach().double(), oracle(case, objective).loss, rtol=1e-5, atol=0)
            assert out.loss.dtype == sums_of(case)
            assert torch.equal(out.sequence_logp, torch.zeros(3, dtype=sums_of(case)))
            for name, gradient in gradients.items():
                assert torch.equal(gradient, torch.zeros_like(case.leaves[name])), name

    @pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ()])
    @pytest.mark.parametrize("ignored", [0, 5])
    @pytest.mark.parametrize("objective", ["d2o", "sigmoid", lambda logp, _, groups: groups.negatives(logp)])
    def test_no_group(self, objective: Objective, ignored: int, trained: tuple[str, ...]):
        case = make_case([], [], ignored=ignored)
        out, gradients = run(case, objective, trained=trained)
        assert out.loss == 0
        assert (out.group_loss.shape, out.sequence_logp.shape) == ((0,), (0,))
        for name, gradient in gradients.items():
            assert torch.equal(gradient, torch.zeros_like(case.leaves[name])), name

    def test_the_number_of_groups_is_told_or_found(self):
        case = make_case(*RAGGED)
        found = run(replace(case, groups=Groups(case.groups.group, case.groups.positive)), "d2o")
        agree(found, run(case, "d2o"), 0)

        def objective(logp: Tensor, _: Tensor | None, groups: Groups) -> Tensor:
            return groups.negatives(logp) + 1

        more = replace(case, groups=replace(case.groups, number=7))
        out, _ = run(more, objective, plan=tiles(case, "parts"))
        assert out.group_loss[5:].tolist() == [1.0, 1.0]

    def test_a_second_backward_is_refused(self):
        case = make_case(*RAGGED)
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        arguments = (hidden, weight, case.target, case.sequence_ids, case.groups)
        loss = linear_preference_loss(*arguments, objective="d2o", ref_logp=case.ref_logp).loss
        torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        with pytest.raises(RuntimeError, match=r"second backward .* Fix: compute the loss again"):
            torch.autograd.grad(loss, [hidden, weight])

    def test_a_second_backward_of_the_general_path(self):
        case = make_case(*RAGGED)
        hidden = case.hidden.clone().requires_grad_()
        arguments = (hidden, case.weight, case.target, case.sequence_ids, case.groups)
        out = linear_preference_loss(*arguments, objective="d2o", ref_logp=case.ref_logp, coefficient_tol=0.03)
        first = torch.autograd.grad(out.loss, hidden, retain_graph=True)
        assert torch.equal(*first, *torch.autograd.grad(out.loss, hidden))

    @pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)])
    def test_a_second_derivative_is_refused(self, trained: tuple[str, ...]):
        case = make_case(*RAGGED)
        leaves = case.leaves
        wanted = [leaves[name].requires_grad_() for name in trained]
        arguments = (leaves["hidden"], leaves["weight"], case.target, case.sequence_ids, case.groups)
        loss = linear_preference_loss(*arguments, objective="d2o", ref_logp=case.ref_logp).loss
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, wanted, create_graph=True)

    def test_forward_mode_is_refused(self):
        case = make_case(*RAGGED)

        def loss(weight: Tensor) -> Tensor:
            arguments = (case.hidden, weight, case.target, case.sequence_ids, case.groups)
            return linear_preference_loss(*arguments, objective="d2o", ref_logp=case.ref_logp).loss

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(loss, (case.weight,), (torch.ones_like(case.weight),))


# --- bad input --------------------------------------------------------------------------------------------------------

SMALL = make_case([[3, 2], [4, 1]], [1, 1], shuffled=False, ignored=2)
GROUP, POSITIVE = SMALL.groups.group, SMALL.groups.positive


def call(**changes: Any) -> PreferenceOutput:
    arguments: dict[str, Any] = {
        "hidden": SMALL.hidden.clone().requires_grad_(),
        "weight": SMALL.weight.clone().requires_grad_(),
        "target": SMALL.target,
        "sequence_ids": SMALL.sequence_ids,
        "groups": SMALL.groups,
        "objective": "d2o",
        "ref_logp": SMALL.ref_logp,
        **changes,
    }
    return linear_preference_loss(**arguments)


def negative_of(logp: Tensor, _: Tensor | None, groups: Groups) -> Tensor:
    return groups.negatives(logp)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "groups of another type": (
        {"groups": (GROUP, POSITIVE)},
        TypeError,
        r"groups is of type tuple, expected fastd2o.losses.Groups\(group, positive\)",
    ),
    "int32 groups": ({"groups": Groups(GROUP.int(), POSITIVE)}, TypeError, "groups.group is torch.int32 of shape"),
    "a matrix of groups": (
        {"groups": Groups(GROUP.view(2, 2), POSITIVE.view(2, 2))},
        TypeError,
        r"groups.group is torch.int64 of shape \[2, 2\], expected an int64 tensor \[S\]",
    ),
    "a list of groups": ({"groups": Groups([0, 0, 1, 1], POSITIVE)}, TypeError, "groups.group"),  # type: ignore[arg-type]
    "integer roles": (
        {"groups": Groups(GROUP, POSITIVE.long())},
        TypeError,
        "groups.positive has dtype torch.int64, expected torch.bool",
    ),
    "a list of roles": ({"groups": Groups(GROUP, [True] * 4)}, TypeError, "groups.positive is of type list"),  # type: ignore[arg-type]
    "a role missing": (
        {"groups": Groups(GROUP, POSITIVE[:3])},
        ValueError,
        r"groups.positive has shape \[3\], expected \[4\]",
    ),
    "roles elsewhere": ({"groups": Groups(GROUP, POSITIVE.to("meta"))}, ValueError, "groups.positive is on meta"),
    "a group too large": (
        {"groups": Groups(GROUP + 1, POSITIVE, 2)},
        ValueError,
        r"groups.group holds 2, expected groups in \[0, 2\)",
    ),
    "a negative group": ({"groups": Groups(GROUP - 1, POSITIVE)}, ValueError, "groups.group holds -1, expected groups"),
    "no negative": (
        {"groups": Groups(GROUP, torch.tensor([True, True, True, False]))},
        ValueError,
        "group 0 has 0 negatives in groups.positive, expected exactly one. Fix",
    ),
    "two negatives": (
        {"groups": Groups(GROUP, torch.tensor([True, False, False, False]))},
        ValueError,
        "group 1 has 2 negatives in groups.positive",
    ),
    "an empty group": ({"groups": Groups(GROUP, POSITIVE, 3)}, ValueError, "group 2 has 0 negatives"),
    "no anchor": (
        {"groups": Groups(torch.arange(4), torch.zeros(4).bool())},
        ValueError,
        r"no group has an anchor: .* Fix: .*\"allow_no_anchor\": True",
    ),
    "an unknown objective": (
        {"objective": "dpo"},
        ValueError,
        "objective is 'dpo', expected one of: d2o, sigmoid, hinge",
    ),
    "an objective that needs a draw": ({"objective": "cringe"}, ValueError, "objective is 'cringe', expected one of"),
    "no objective": ({"objective": None}, TypeError, "objective is of type NoneType, expected a name or a callable"),
    "no reference": (
        {"ref_logp": None},
        ValueError,
        "ref_logp is missing: objective 'd2o' reads it. Fix: pass ref_logp",
    ),
    "the reference's shape": ({"ref_logp": torch.zeros(3)}, ValueError, r"ref_logp has shape \[3\], expected \[4\]"),
    "the reference's dtype": ({"ref_logp": torch.zeros(4).long()}, TypeError, "ref_logp has dtype torch.int64"),
    "the reference's type": ({"ref_logp": [0.0] * 4}, TypeError, "ref_logp is of type list, expected a torch.Tensor"),
    "the reference's device": ({"ref_logp": torch.zeros(4, device="meta")}, ValueError, "ref_logp is on meta"),
    "the weight's shape": (
        {"group_weight": torch.ones(4)},
        ValueError,
        r"group_weight has shape \[4\], expected \[2\]",
    ),
    "the weight's dtype": ({"group_weight": torch.ones(2).bool()}, TypeError, "group_weight has dtype torch.bool"),
    "an unknown option": (
        {"options": {"gamma": 1.0}},
        TypeError,
        "objective 'd2o' has no option 'gamma', expected one of: alpha, beta",
    ),
    "an option out of range": ({"options": {"beta": 0.0}}, ValueError, "beta is 0.0, expected a number above 0"),
    "options of a callable": (
        {"objective": negative_of, "options": {"beta": 0.1}},
        ValueError,
        "options go with an objective's name. Fix: bind them to the callable",
    ),
    "a callable's shape": (
        {"objective": lambda logp, *_: logp},
        ValueError,
        r"objective returned shape \[4\], expected \[2\], the loss of each group",
    ),
    "a callable's sum": ({"objective": lambda logp, *_: logp.sum()}, ValueError, r"objective returned shape \[\], exp"),
    "a callable's type": ({"objective": lambda *_: 0.0}, ValueError, r"objective returned a float, expected \[2\]"),
    "an unknown reduction": ({"reduction": "none"}, ValueError, "reduction is 'none', expected one of: mean, sum"),
    "a negative coefficient_tol": (
        {"coefficient_tol": -1e-3},
        ValueError,
        "coefficient_tol is -0.001, expected a number of at least 0",
    ),
    "a coefficient_tol that is none": ({"coefficient_tol": float("nan")}, ValueError, "coefficient_tol is nan"),
    "a tensor as coefficient_tol": ({"coefficient_tol": torch.ones(2)}, TypeError, "coefficient_tol is of type Tensor"),
    "a negative vocab_mass_tol": ({"vocab_mass_tol": -0.1}, ValueError, "vocab_mass_tol is -0.1, expected a number of"),
    "all of the softmax": (
        {"vocab_mass_tol": 1.0},
        ValueError,
        "vocab_mass_tol is 1.0, expected a share of the softmax below 1",
    ),
    "a sequence too large": (
        {"sequence_ids": torch.where(SMALL.counted, SMALL.sequence_ids + 1, 0)},
        ValueError,
        r"sequence_ids holds 4 where target counts: expected ids in \[0, 4\), one for each of the sequences of groups",
    ),
    "a negative sequence": (
        {"sequence_ids": torch.where(SMALL.counted, SMALL.sequence_ids - 1, 0)},
        ValueError,
        "sequence_ids holds -1 where target counts",
    ),
    "tokens of no sequence": (
        {"groups": Groups(GROUP[:0], POSITIVE[:0]), "ref_logp": torch.zeros(0)},
        ValueError,
        r"sequence_ids holds 0 where target counts: expected ids in \[0, 0\)",
    ),
    "int32 sequences": (
        {"sequence_ids": SMALL.sequence_ids.int()},
        TypeError,
        r"sequence_ids has dtype torch.int32: expected int64. Fix: sequence_ids.long\(\)",
    ),
    "the sequences' shape": ({"sequence_ids": SMALL.sequence_ids[1:]}, ValueError, r"sequence_ids has shape \[11\]"),
    "the target's shape": ({"target": SMALL.target[1:]}, ValueError, r"target has shape \[11\]"),
    "a target outside": ({"target": SMALL.target.clamp(min=99)}, ValueError, "target holds 99 at flat position 0"),
    "an empty sequence where means are taken": (
        {"objective": "ipo", "target": torch.where(SMALL.sequence_ids == 3, -100, SMALL.target)},
        ValueError,
        "sequence 3 is empty: it has no mean log-probability. Fix: drop the empty sequences",
    ),
    "transposed": ({"weight": SMALL.weight.T}, ValueError, "weight"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature=0.0 must be a positive number"),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "backend='tpu' is unknown"),
    "a budget that is none": ({"memory_budget": 1.5}, ValueError, "memory_budget=1.5 is neither a whole number of"),
    "a plan and a budget": (
        {"plan": tiles(SMALL), "memory_budget": 10**6},
        ValueError,
        "plan and memory_budget are both given.* Fix: leave one out",
    ),
    "a plan of another algorithm": (
        {"plan": replace(tiles(SMALL), algorithm="recompute")},
        ValueError,
        "plan.algorithm='recompute' cannot serve this call: expected 'grouped'",
    ),
    "a plan of another vocabulary": (
        {"plan": replace(tiles(SMALL), vocab_size=99)},
        ValueError,
        "plan.vocab_size=99 but this call has 53",
    ),
    "an option of linear_logprob that is none here": ({"stats": True}, TypeError, "stats"),
}


class TestBadInput:
    def test_the_call_is_good_without_changes(self):
        assert call().loss.isfinite()
        call(sequence_ids=torch.where(SMALL.counted, SMALL.sequence_ids, -(2**62)))  # anything where ignored

    @pytest.mark.parametrize("name", BAD)
    def test_it_is_refused(self, name: str):
        changes, kind, message = BAD[name]
        with pytest.raises(kind, match=message):
            call(**changes)

    def test_a_group_that_is_larger_than_the_number_is_named_whatever_the_order(self):
        with pytest.raises(ValueError, match=r"groups.group holds 7, expected groups in \[0, 2\)"):
            call(groups=Groups(torch.tensor([0, 7, 1, 1]), POSITIVE, 2))

    def test_plans_are_checked_when_they_are_made(self):
        bad: tuple[tuple[dict[str, Any], str], ...] = (
            ({"kept_bytes": -1}, "plan.kept_bytes=-1 must not be negative"),
            ({"part_tokens": 0}, "plan.part_tokens=0 must be at least 1, or None"),
            ({"algorithm": "unit", "kept_bytes": 9}, "plan.kept_bytes=9, but 'unit' has nothing to keep. Fix: kept_b"),
            ({"algorithm": "recompute", "part_tokens": 9}, "plan.part_tokens=9, but only 'grouped' works in parts"),
        )
        for changes, message in bad:
            with pytest.raises(ValueError, match=message):
                replace(tiles(SMALL), **changes)
        logprob_plan = replace(tiles(SMALL), algorithm="grouped")
        with pytest.raises(ValueError, match="'grouped' cannot serve this call: expected 'recompute'"):
            fastd2o.linear_logprob(SMALL.hidden, SMALL.weight.clone().requires_grad_(), SMALL.target, plan=logprob_plan)


# --- what a review found ----------------------------------------------------------------------------------------------


class TestOrder:
    """Sequences of interleaved groups reach a callable in the caller's order."""

    @pytest.mark.parametrize("trained", [True, False])
    def test_of_a_callable_that_knows_its_sequences(self, trained: bool):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        weight = torch.randn(50, 8, generator=generator, dtype=torch.float64).requires_grad_(trained)
        target = torch.randint(50, (12,), generator=generator)
        groups = Groups(torch.tensor([0, 1, 0, 1]), torch.tensor([False, True, True, False]))
        scale = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
        ref_logp = torch.arange(4.0, dtype=torch.float64)

        def objective(logp: torch.Tensor, ref_logp: torch.Tensor | None, groups: Groups) -> torch.Tensor:
            assert ref_logp is not None
            assert ref_logp.tolist() == [0, 1, 2, 3]
            return groups.positives(logp / scale) - groups.negatives(logp / scale)

        ids = torch.arange(12) // 3
        out = fastd2o.linear_preference_loss(
            hidden.requires_grad_(), weight, target, ids, groups, objective=objective, ref_logp=ref_logp
        )
        logp = (hidden @ weight.T).log_softmax(-1)[range(12), target].view(4, 3).sum(1) / scale
        expected = (logp[2] - logp[0] + logp[1] - logp[3]) / 2
        torch.testing.assert_close(out.loss, expected)
        ours, right = (torch.autograd.grad(loss, hidden)[0] for loss in (out.loss, expected))
        torch.testing.assert_close(ours, right)

    def test_the_whole_is_asked_in_the_dtype_of_its_parts(self):
        """An objective that minds its dtype must not fail only where there are several parts."""

        def objective(logp: torch.Tensor, ref_logp: torch.Tensor | None, groups: Groups) -> torch.Tensor:
            loss = torch.zeros(groups.count)
            loss[:] = groups.positives(logp) @ torch.eye(groups.count)
            return loss

        case = make_case(*RAGGED).to(torch.float32)
        run(case, objective, plan=tiles(case, "parts"))


@pytest.mark.parametrize("trained", [(), ("hidden",)])
def test_a_grouped_plan_serves_without_its_gradients(trained: tuple[str, ...]):
    out, _ = run(SMALL, "sigmoid", plan=tiles(SMALL), trained=trained)
    assert out.plan.algorithm == ("unit" if trained else "forward")
    torch.testing.assert_close(out.loss.detach(), run(SMALL, "sigmoid")[0].loss.detach())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_parts_are_paid_for_whatever_the_products_are(weight_dtype: torch.dtype):
    """[V, D] float32 sums come on top where the weight's gradient is narrower."""
    shape: dict[str, Any] = {"tokens": 16384, "hidden_size": 64, "vocab_size": 32000, "dtype": torch.float32}
    plan = fastd2o.Plan.choose(**shape, algorithm="grouped", weight_dtype=weight_dtype, memory_budget=400 << 20)
    assert plan.part_tokens is not None
    assert plan.extra_bytes <= 400 << 20
    more = plan.extra_bytes - replace(plan, weight_dtype=torch.float32).extra_bytes
    sums, slab = (64 * columns * 4 for columns in (32000, plan.block_vocab))  # and a slab of the weight, cast
    assert more == (0 if weight_dtype == torch.float32 else sums + slab)
