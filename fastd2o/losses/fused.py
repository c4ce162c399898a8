"""``grouped_loss``: from token log-probabilities to the losses of groups, in one operator with one gradient.

Two implementations: the losses of this package put together, for any dtype and device, and an operator that does the
same in one launch, natively (``csrc/objectives.h``) or in Triton (``kernels/triton/loss.py``). S sequences, G groups, N
tokens, K positives of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastd2o.losses import checks
from fastd2o.losses.cringe import pairwise_cringe_loss
from fastd2o.losses.d2o import d2o_loss
from fastd2o.losses.dpo import dpo_loss
from fastd2o.ops.autograd import check_differentiated_once
from fastd2o.ops.backends import resolve
from fastd2o.ops.checks import check_not_forward_mode

Options = Mapping[str, Any]

OPTIONS: dict[str, Options] = {
    "d2o": {"alpha": 0.1, "beta": 0.1, "length_normalize": False, "allow_no_anchor": False},
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.0},
    "dpop": {"beta": 0.1, "dpop_lambda": 50.0},
    "bdpo": {"beta": 0.1, "bdpo_lambda": 0.5},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "nca_pair": {"beta": 0.1},
    "sppo_hard": {"beta": 0.1},
    "exo_pair": {"beta": 0.1, "label_smoothing": 1e-3},
    "bco_pair": {"beta": 0.1, "bco_baseline": 0.0},
    "discopop": {"beta": 0.1, "discopop_tau": 0.05},
    "cringe": {"alpha": 1.0},
    "pairwise_cringe": {
        "margin": 0.0,
        "temperature": 1.0,
        "detach_gate": True,
        "alpha": 1.0,
        "length_normalize": False,
    },
}
"""Objective -> its options with their defaults, in the order in which the operator takes them."""

GROUPED_OBJECTIVES: tuple[str, ...] = tuple(OPTIONS)
"""Every ``objective`` of :func:`grouped_loss`."""

CRINGE_OBJECTIVES = ("cringe", "pairwise_cringe")
"""Those that read token_cringe; all others read ref_logp."""


class GroupedLoss(NamedTuple):
    """Result of :func:`grouped_loss`; float32, or float64 for float64 inputs.

    Attributes:
        loss: [G] the loss of each group, differentiable.
        sequence_logp: [S] the log-probability of each sequence, nats, summed over its tokens; without a gradient, to
            log.
    """

    loss: Tensor
    sequence_logp: Tensor


def grouped_loss(
    token_logp: Tensor,
    sequence_start: Tensor,
    group_start: Tensor,
    positive: Tensor,
    *,
    objective: str,
    ref_logp: Tensor | None = None,
    token_cringe: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> GroupedLoss:
    """Sum tokens up to sequences, gather sequences to groups, and return every group's loss.

    ``"d2o"`` is :func:`~fastd2o.losses.d2o_loss` of the group's negative and its positives, the anchors. The types of
    :func:`~fastd2o.losses.dpo_loss` and ``"pairwise_cringe"`` are the mean, over the group's K positives, of the loss
    of each against the negative. ``"cringe"`` is ``Σ CE + α Σ ℓ`` over positives and negatives, which the caller
    divides by N. The gradient of a token is that of its sequence: one number for all of a sequence's tokens.

    Tokens of a sequence lie side by side, and so do sequences of a group; K may differ from group to group::

        token_logp      [ y₁ y₁ y₁ | y₂ y₂ | y₃ y₃ y₃ y₃ | y₄ ]         N = 10, S = 4, G = 2
        sequence_start  [ 0,         3,      5,            9,   10 ]
        group_start     [ 0,                 2,                  4 ]     the first group is y₁ y₂
        positive        [ True,      False,  True,         False ]

    Args:
        token_logp: [N] floating point, log-probabilities of the counted tokens, nats.
        sequence_start: [S + 1] int64, where in N each sequence begins, and N. A sequence may be empty unless the
            objective takes per-token means.
        group_start: [G + 1] int64, where in S each group begins, and S.
        positive: [S] bool, True for positives (chosen sequences, anchors), False for negatives. A group has exactly one
            negative; for ``"cringe"``, any number of either.
        objective: one of :data:`GROUPED_OBJECTIVES`.
        ref_logp: [S] floating point, the log-probability of each sequence under the reference, summed over tokens; a
            constant. For D2O, that of the negative under the helpful reference, of the anchors under the harmful one.
            Needed by all but the Cringe objectives, which have none.
        token_cringe: [N] floating point, the ``loss`` of each token of the negatives from ``fastd2o.linear_cringe``;
            what it holds for positives is not read. Needed by the Cringe objectives alone.
        backend: ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the best that works. float64 is computed
            by ``"torch"``.
        **options: of the objective, with the names, ranges and defaults of its loss:

            - all types of ``dpo_loss``: ``beta``; ``"sigmoid"``, ``"robust"`` and ``"exo_pair"``: ``label_smoothing``
              (1e-3 for the last, which needs one above 0); ``"dpop"``: ``dpop_lambda``; ``"bdpo"``: ``bdpo_lambda``;
              ``"bco_pair"``: ``bco_baseline``, here a number; ``"discopop"``: ``discopop_tau``
            - ``"d2o"``: ``alpha``, ``beta``, ``allow_no_anchor``, and ``length_normalize`` (False): per-token means in
              place of sums
            - ``"cringe"``: ``alpha``
            - ``"pairwise_cringe"``: ``margin``, ``temperature``, ``detach_gate``, ``alpha``, and ``length_normalize``
              (False): per-token means in the gate, not in the loss

    Returns:
        :class:`GroupedLoss`. A group without positives has loss 0 and no gradient, except for ``"cringe"``, and for
        ``"d2o"`` with ``allow_no_anchor``, where its negative term remains.

    Raises:
        TypeError: a tensor of the wrong kind, an option that the objective does not have.
        ValueError: shapes or devices that disagree, a number out of its range, a tensor missing or unread, an unknown
            ``objective``, a ``backend`` that cannot serve. On the CPU also offsets that do not rise from 0 to their
            end, a group without exactly one negative, an empty sequence where means are taken, no anchor in any group.
            Accelerators are not waited for to look at values: there, such a group's loss is NaN.
    """
    checks.one_of("objective", objective, GROUPED_OBJECTIVES)
    resolved = resolve_options(objective, options)
    token_logp, token_cringe, ref_logp = _check_tensors(
        token_logp, sequence_start, group_start, positive, ref_logp, token_cringe, objective
    )
    backend = resolve(backend, token_logp.device.type, token_logp.dtype)
    if backend == "torch":
        if checks.values_readable(token_logp):
            _check_values(sequence_start, group_start, positive, len(token_logp), objective, resolved)
        return _composed(token_logp, sequence_start, group_start, positive, ref_logp, token_cringe, objective, resolved)
    check_not_forward_mode(token_logp, token_cringe)
    loss, sequence_logp, _, _ = torch.ops.fastd2o.grouped_loss(
        token_logp,
        token_cringe,
        sequence_start,
        group_start,
        positive,
        ref_logp,
        objective,
        [float(value) for value in resolved.values()],
        backend,
    )
    return GroupedLoss(loss, sequence_logp)


# --- the door ---------------------------------------------------------------------------------------------------------


def resolve_options(objective: str, given: Options) -> Options:
    """All options of the objective, in their order."""
    known = OPTIONS[objective]
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"objective {objective!r} has no option {name!r}, expected one of: {', '.join(known)}.")
        _RANGES[name](**{name: value})
    resolved = {**known, **given}
    if objective == "exo_pair" and resolved["label_smoothing"] == 0:
        raise ValueError(
            "label_smoothing is 0, expected a rate above 0: 'exo_pair' is infinite from one-hot labels. "
            "Fix: label_smoothing=1e-3, the default."
        )
    return resolved


def _share(**options: float) -> None:
    checks.positive(**options)
    for name, value in options.items():
        if value > 1:
            raise ValueError(f"{name} is {value}, expected a share in (0, 1].")


def _switch(**options: bool) -> None:
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is of type {type(value).__name__}, expected True or False.")


_RANGES: dict[str, Callable[..., None]] = {
    "alpha": checks.non_negative,
    "beta": checks.positive,
    "label_smoothing": lambda label_smoothing: checks.label_smoothing(label_smoothing),
    "dpop_lambda": checks.non_negative,
    "bdpo_lambda": _share,
    "discopop_tau": checks.positive,
    "bco_baseline": checks.finite,
    "margin": checks.finite,
    "temperature": checks.positive,
    "length_normalize": _switch,
    "allow_no_anchor": _switch,
    "detach_gate": _switch,
}


def check_read(objective: str, *, ref_logp: Tensor | None, token_cringe: Tensor | None) -> None:
    """Raise unless the one of the two that the objective reads is given, and it alone."""
    has_cringe = objective in CRINGE_OBJECTIVES
    for name, value, read in (("ref_logp", ref_logp, not has_cringe), ("token_cringe", token_cringe, has_cringe)):
        if value is None and read:
            raise ValueError(f"{name} is missing: objective {objective!r} reads it. Fix: pass {name}.")
        if value is not None and not read:
            raise ValueError(f"{name} is given, but objective {objective!r} does not read it. Fix: leave it out.")


def _check_tensors(
    token_logp: Tensor,
    sequence_start: Tensor,
    group_start: Tensor,
    positive: Tensor,
    ref_logp: Tensor | None,
    token_cringe: Tensor | None,
    objective: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Everything but values; return what is floating point in one dtype, the reference detached."""
    check_read(objective, ref_logp=ref_logp, token_cringe=token_cringe)
    optional = {"ref_logp": ref_logp, "token_cringe": token_cringe}
    floats = {"token_logp": token_logp, **{name: value for name, value in optional.items() if value is not None}}
    floats = dict(zip(floats, checks.logprobs(**floats), strict=True))
    # One dtype for all: the widest.
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in floats.values()) else torch.float32
    floats = {name: value.to(dtype) for name, value in floats.items()}

    for name, start in (("sequence_start", sequence_start), ("group_start", group_start)):
        if not isinstance(start, Tensor):
            raise TypeError(f"{name} is of type {type(start).__name__}, expected a torch.Tensor.")
        if start.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {start.dtype}, expected int64 offsets. Fix: pass {name}.long().")
        if start.dim() != 1 or len(start) == 0:
            raise ValueError(f"{name} has shape {list(start.shape)}, expected one offset for each item, and the end.")
    sequences = len(sequence_start) - 1
    shapes = {
        "token_logp": (floats["token_logp"], [floats["token_logp"].numel()], "one value for each token"),
        "positive": (positive, [sequences], "one flag for each sequence, of which sequence_start holds one less"),
        "ref_logp": (floats.get("ref_logp"), [sequences], "one value for each sequence"),
        "token_cringe": (floats.get("token_cringe"), list(token_logp.shape), "one value for each token"),
    }
    checks.mask("positive", positive, like=positive)
    for name, (tensor, expected, meaning) in shapes.items():
        if tensor is not None and list(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}: {meaning}.")
    checks.same_device(**floats, sequence_start=sequence_start, group_start=group_start, positive=positive)
    for held, items, name in ((len(token_logp), sequences, "sequence"), (sequences, len(group_start) - 1, "group")):
        if held > 0 and items == 0:
            raise ValueError(
                f"{name}_start has no {name}, but there are {held} to put into one. Fix: {name}_start=[0, {held}]."
            )
    ref_logp = floats.get("ref_logp")
    return floats["token_logp"], floats.get("token_cringe"), None if ref_logp is None else ref_logp.detach()


def _check_values(
    sequence_start: Tensor, group_start: Tensor, positive: Tensor, tokens: int, objective: str, options: Options
) -> None:
    """What only the values of the offsets and roles can tell; for tensors on the CPU."""
    ends = (
        ("sequence_start", sequence_start, tokens, "tokens"),
        ("group_start", group_start, len(positive), "sequences"),
    )
    for name, start, end, items in ends:
        if not _rises(start, end):
            raise ValueError(
                f"{name} is {_shortened(start)}, expected offsets that rise from 0 to {end}, the number of {items}. "
                f"Fix: begin with 0, then the cumulative sum of the counts of {items}."
            )
    length = sequence_start.diff()
    if (objective == "ipo" or options.get("length_normalize")) and (length == 0).any():
        raise ValueError(
            f"sequence {int((length == 0).nonzero()[0])} is empty: it has no mean log-probability. Fix: drop the empty "
            "sequences."
        )
    if objective == "cringe":
        return
    negatives = sum_segments((~positive).double(), group_start.diff())
    wrong = (negatives != 1).nonzero()
    if len(wrong):
        group = int(wrong[0])
        raise ValueError(
            f"group {group} has {int(negatives[group])} negatives in positive, expected exactly one. Fix: make a group "
            "for each negative, with the positives it is compared with."
        )
    if objective == "d2o" and not options["allow_no_anchor"] and len(negatives) > 0 and not positive.any():
        raise ValueError(
            "no group has an anchor: positive is False throughout. Fix: sample anchors, or pass allow_no_anchor=True "
            "to train on the negatives alone."
        )


def _shortened(start: Tensor) -> str:
    values = start.tolist()
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


# --- in torch: the losses of this package put together ----------------------------------------------------------------


def _composed(
    token_logp_N: Tensor,
    sequence_start: Tensor,
    group_start: Tensor,
    positive_S: Tensor,
    ref_logp_S: Tensor | None,
    token_cringe_N: Tensor | None,
    objective: str,
    options: Options,
) -> GroupedLoss:
    """As readable as it gets; the operator must agree with it."""
    length_S, count_G = (
        segment_lengths(sequence_start, len(token_logp_N)),
        segment_lengths(group_start, len(positive_S)),
    )
    group_S = segment_owner(group_start, len(positive_S))
    logp_S = sum_segments(token_logp_N, length_S)
    cringe_S = None if token_cringe_N is None else sum_segments(token_cringe_N, length_S)

    def of_positives(values_S: Tensor) -> Tensor:
        """[S] -> [G]: the sum. What is not summed is selected away: it may hold anything."""
        return sum_segments(torch.where(positive_S, values_S, 0.0), count_G)

    def of_negatives(values_S: Tensor) -> Tensor:
        return sum_segments(torch.where(positive_S, 0.0, values_S), count_G)

    def chosen(values_S: Tensor, fill: float = 0.0) -> Tensor:
        """[S]: the values of positives; the rest is no pair and must not make a NaN."""
        return torch.where(positive_S, values_S, fill)

    def rejected(values_S: Tensor, fill: float = 0.0) -> Tensor:
        """[S]: beside every positive, the value of its group's negative."""
        return chosen(of_negatives(values_S)[group_S], fill)

    ones_S = torch.ones_like(logp_S)
    positives_G = of_positives(ones_S)
    mean_length_S = length_S if options.get("length_normalize") else ones_S

    sound = _rises(sequence_start, len(token_logp_N)) & _rises(group_start, len(positive_S))
    if objective == "cringe":
        assert cringe_S is not None
        loss_G = of_positives(-logp_S) + options["alpha"] * of_negatives(cringe_S)
        return GroupedLoss(torch.where(sound, loss_G, torch.nan), logp_S.detach())

    if objective == "pairwise_cringe":
        assert cringe_S is not None
        mean_S = logp_S / mean_length_S
        pairs_S = pairwise_cringe_loss(
            chosen(mean_S),
            rejected(mean_S),
            chosen(-logp_S),
            rejected(cringe_S),
            margin=options["margin"],
            temperature=options["temperature"],
            detach_gate=options["detach_gate"],
            alpha=options["alpha"],
            reduction="none",
        )
        loss_G = of_positives(pairs_S) / positives_G.clamp(min=1)
    elif objective == "d2o":
        assert ref_logp_S is not None
        # The anchors enter by the mean of their log-ratios alone: one anchor that has it stands for all.
        ratio_S = (logp_S - ref_logp_S) / mean_length_S
        anchor_G1 = (of_positives(ratio_S) / positives_G.clamp(min=1))[:, None]
        negative_G = of_negatives(ratio_S)
        loss_G = d2o_loss(
            negative_G,
            anchor_G1,
            ref_negative_logp=torch.zeros_like(negative_G),
            ref_anchor_logp=torch.zeros_like(anchor_G1),
            anchor_mask=(positives_G > 0)[:, None],
            alpha=options["alpha"],
            beta=options["beta"],
            allow_no_anchor=options["allow_no_anchor"],
            reduction="none",
        )
    else:
        assert ref_logp_S is not None
        pairs_S = dpo_loss(
            chosen(logp_S),
            rejected(logp_S),
            ref_chosen_logp=chosen(ref_logp_S),
            ref_rejected_logp=rejected(ref_logp_S),
            chosen_length=chosen(length_S.to(logp_S.dtype), 1.0),
            rejected_length=rejected(length_S.to(logp_S.dtype), 1.0),
            loss_type=objective,
            reduction="none",
            **options,
        )
        loss_G = of_positives(pairs_S) / positives_G.clamp(min=1)
    return GroupedLoss(torch.where(sound & (of_negatives(ones_S) == 1), loss_G, torch.nan), logp_S.detach())


def _rises(start: Tensor, end: int) -> Tensor:
    """0-d bool: whether these are offsets from 0 to ``end``; nobody waits to know."""
    return (start[0] == 0) & (start[-1] == end) & (start.diff() >= 0).all()


def segment_lengths(start: Tensor, items: int) -> Tensor:
    """[segments] int64: how many items lie in each segment. They add up to ``items`` even where offsets that nobody
    could look at are nonsense, so that nothing outside is ever read."""
    if len(start) == 1:
        return start[1:]
    inner = start[1:-1].cummax(0).values.clamp(0, items)
    return inner.diff(prepend=start.new_zeros(1), append=start.new_full((1,), items))


def segment_owner(start: Tensor, items: int) -> Tensor:
    """[items] int64: the segment that each item lies in; one of them whatever the offsets hold. Two launches."""
    return torch.searchsorted(start[1:-1].contiguous(), torch.arange(items, device=start.device), right=True)


def sum_segments(values: Tensor, length: Tensor) -> Tensor:
    """[segments]: the sum of each, in one order whatever the device; 0 for an empty one."""
    return torch.segment_reduce(values, "sum", lengths=length, initial=0.0, unsafe=True)


# --- in one launch ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastd2o::grouped_loss", mutates_args=())
def _grouped_loss_op(
    token_logp: Tensor,
    token_cringe: Tensor | None,
    sequence_start: Tensor,
    group_start: Tensor,
    positive: Tensor,
    ref_logp: Tensor | None,
    objective: str,
    parameters: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [G], sequence_logp [S], and the derivatives [S] of each group's loss by the sums of its sequences."""

    def check_values() -> None:
        if token_logp.device.type == "cpu":  # say it as every other loss would
            options = dict(zip(OPTIONS[objective], parameters, strict=True))
            _check_values(sequence_start, group_start, positive, len(token_logp), objective, options)

    tensors = [
        None if tensor is None else tensor.contiguous()
        for tensor in (token_logp, token_cringe, sequence_start, group_start, positive, ref_logp)
    ]
    if backend == "triton":
        # Here and not above: Triton is an optional dependency.
        from fastd2o.kernels.loss import loss

        check_values()
        return loss(*tensors, objective, parameters)
    try:
        return torch.ops.fastd2o_native.loss(*tensors, objective, parameters)
    except RuntimeError:
        check_values()
        raise


@_grouped_loss_op.register_fake
def _(
    token_logp: Tensor,
    token_cringe: Tensor | None,
    sequence_start: Tensor,
    group_start: Tensor,
    positive: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    of_groups = token_logp.new_empty(group_start.shape[0] - 1)
    return of_groups, *(token_logp.new_empty(positive.shape) for _ in range(3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_logp, _, sequence_start, group_start, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.tokens = token_logp.shape[0]
    _, _, logp_coef, cringe_coef = output
    ctx.save_for_backward(sequence_start, group_start, logp_coef, cringe_coef)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_differentiated_once()
    no_gradient = (None,) * 7
    if grad_loss is None:
        return (None, None, *no_gradient)
    sequence_start, group_start, *coefficients = ctx.saved_tensors
    grad_sequence_S = grad_loss.index_select(0, segment_owner(group_start, len(coefficients[0])))
    sequence_N = segment_owner(sequence_start, ctx.tokens)
    gradients = [
        (coef_S * grad_sequence_S).index_select(0, sequence_N) if needed else None
        for coef_S, needed in zip(coefficients, ctx.needs_input_grad[:2], strict=True)
    ]
    return (*gradients, *no_gradient)


_grouped_loss_op.register_autograd(_backward, setup_context=_setup_context)
