"""loss [G] and the derivatives of every group's loss, from token log-probabilities: ``csrc/objectives.h`` in Triton.

One launch, a program for each group. N tokens, S sequences, G groups; shapes as ``fastd2o::grouped_loss`` has them, all
contiguous, float32 but for int64 offsets and bool roles. A program sums up its sequences, ROWS at a time and LANES
tokens of each, then goes over its pairs, MEMBERS at a time. Sums over tokens and everything per sequence are float32,
sums over a group's few sequences float64; all have one order: no atomics, the same bits on every run. Nothing is read
back to the host. The number of a group's sequences and their lengths are bounded by nothing.

Work: N additions and some 100 operations a sequence. Bytes: 4 N (8 N with token_cringe) + about 50 S.
Share of the limit: not measured yet. What eager code pays for the same are several dozen launches.

A formula is written as in fastd2o/losses, over numbers that carry their two partial derivatives with them. What it does
at saturation and at infinities is therefore what torch's autograd does there: log_sigmoid never takes the logarithm of
a sigmoid, a slope is never formed as a difference of two numbers near 1. Triton has no operators for one's own types,
so plus(x, y) stands for x + y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Values
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastd2o.kernels.scalar import NEG_INF
from fastd2o.losses import checks
from fastd2o.losses.fused import GROUPED_OBJECTIVES, OPTIONS, check_read

# --- numbers with derivatives -----------------------------------------------------------------------------------------


@triton.jit
def log1p_of_share(x):
    """log(1 + x) for x in [0, 1], to a few units in the last place. Without the vendor's library there is no log1p, and
    log(1 + x) loses a small x: this is 2 artanh(s) at s = x / (2 + x) <= 1/3, whose series' next term is 1e-8 of it."""
    s = x / (2 + x)
    square = s * s
    series = 1 / 13
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    return 2 * (s + s * (square * series))


@triton.jit
def logistic(x):
    """σ(x); of a large x neither overflows nor cancels."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def log_logistic(x):
    """log σ(x)."""
    return tl.minimum(x, 0.0) - log1p_of_share(tl.exp(-tl.abs(x)))


class Dual(NamedTuple):
    """A number and its derivatives by what is said of the chosen sequence and by what is said of the rejected one."""

    value: Any
    by_chosen: Any
    by_rejected: Any


@triton.jit
def of_chosen(value, slope):
    """A number that depends on the chosen sequence alone."""
    return Dual(value, slope, tl.zeros_like(value))


@triton.jit
def of_rejected(value, slope):
    """A number that depends on the rejected sequence alone."""
    return Dual(value, tl.zeros_like(value), slope)


@triton.jit
def chain(x, value, slope):
    """f(x) from its value and slope. What does not depend on a sequence does not do so where the slope is infinite
    either."""
    by_chosen = tl.where(x.by_chosen == 0, 0.0, slope * x.by_chosen)
    by_rejected = tl.where(x.by_rejected == 0, 0.0, slope * x.by_rejected)
    return Dual(value, by_chosen, by_rejected)


@triton.jit
def plus(x, y):
    """x + y."""
    return Dual(x.value + y.value, x.by_chosen + y.by_chosen, x.by_rejected + y.by_rejected)


@triton.jit
def minus(x, y):
    """x - y."""
    return Dual(x.value - y.value, x.by_chosen - y.by_chosen, x.by_rejected - y.by_rejected)


@triton.jit
def times(x, y):
    """x · y."""
    by_chosen = x.by_chosen * y.value + x.value * y.by_chosen
    by_rejected = x.by_rejected * y.value + x.value * y.by_rejected
    return Dual(x.value * y.value, by_chosen, by_rejected)


@triton.jit
def scaled(number, x):
    """number · x."""
    return Dual(number * x.value, number * x.by_chosen, number * x.by_rejected)


@triton.jit
def negated(x):
    """-x."""
    return scaled(-1.0, x)


@triton.jit
def shifted(x, number):
    """x + number."""
    return Dual(x.value + number, x.by_chosen, x.by_rejected)


@triton.jit
def sigmoid(x):
    """σ(x)."""
    return chain(x, logistic(x.value), logistic(x.value) * logistic(-x.value))


@triton.jit
def log_sigmoid(x):
    """log σ(x)."""
    return chain(x, log_logistic(x.value), logistic(-x.value))


@triton.jit
def exp(x):
    """e^x."""
    return chain(x, tl.exp(x.value), tl.exp(x.value))


@triton.jit
def square(x):
    """x²."""
    return chain(x, x.value * x.value, 2 * x.value)


@triton.jit
def relu(x):
    """NaN is not below 0: it passes, with its slope."""
    return chain(x, tl.where(x.value <= 0, 0.0, x.value), tl.where(x.value <= 0, 0.0, 1.0))


@triton.jit
def log_add_exp(x, number):
    """log(e^x + e^number). -inf - (-inf) is NaN; a NaN itself must come through."""
    distance = x.value - number
    both = tl.maximum(x.value, number) + log1p_of_share(tl.exp(-tl.abs(distance)))
    nothing = (x.value == NEG_INF) & (number == NEG_INF)
    return chain(x, tl.where(nothing, NEG_INF, both), logistic(distance))


# --- the objectives ---------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """The parameters of an objective that are numbers, and what is worth computing once from them, in float64, before
    the launch rounds it; 0 what the objective does not read. Run-time arguments: another beta compiles nothing."""

    alpha: Any = 0.0
    beta: Any = 0.0
    flipped: Any = 0.0
    """ε of label_smoothing."""
    unflipped: Any = 0.0
    """1 − ε."""
    unbias: Any = 0.0
    """1 / (1 − 2ε)."""
    log_flipped: Any = 0.0
    log_unflipped: Any = 0.0
    dpop_lambda: Any = 0.0
    log_mixed: Any = 0.0
    """log λ of bdpo_lambda."""
    log_kept: Any = 0.0
    """log(1 − λ)."""
    discopop_tau: Any = 0.0
    bco_baseline: Any = 0.0
    margin: Any = 0.0
    temperature: Any = 0.0


class Sequence(NamedTuple):
    """What a pair's loss is made of, on either side. ``cringe`` is the sum of the tokens' Cringe losses, 0 where it is
    not asked for."""

    logp: Any
    ref_logp: Any
    length: Any
    cringe: Any


@triton.jit
def log_ratio(y, MEANS: tl.constexpr):
    """What the model says of a sequence beyond the reference; per token where objectives take means."""
    ratio = y.logp - y.ref_logp
    if MEANS:
        ratio = ratio / y.length
    return ratio


@triton.jit
def log_ratio_slope(y, MEANS: tl.constexpr):
    """The log-ratio's derivative by the sum of the sequence's token log-probabilities."""
    slope = tl.full(y.logp.shape, 1.0, tl.float32)
    if MEANS:
        slope = slope / y.length
    return slope


@triton.jit
def d2o(numbers, anchors, negative):
    """-log σ( β · mean log-ratio of the anchors - α · log-ratio of the negative ); chosen stands for the former."""
    return negated(log_sigmoid(minus(scaled(numbers.beta, anchors), scaled(numbers.alpha, negative))))


@triton.jit
def dpo(numbers, chosen, rejected, OBJECTIVE: tl.constexpr):
    """Every type of dpo_loss, from the log-ratios of the chosen and of the rejected sequence."""
    beta = numbers.beta
    margin = scaled(beta, minus(chosen, rejected))
    if OBJECTIVE == "sigmoid":
        right = scaled(numbers.unflipped, log_sigmoid(margin))
        loss = negated(plus(right, scaled(numbers.flipped, log_sigmoid(negated(margin)))))
    elif OBJECTIVE == "hinge":
        loss = relu(shifted(negated(margin), 1.0))
    elif OBJECTIVE == "ipo":
        loss = square(shifted(minus(chosen, rejected), -1 / (2 * beta)))
    elif OBJECTIVE == "robust":
        right = scaled(numbers.unflipped, log_sigmoid(margin))
        wrong = scaled(numbers.flipped, log_sigmoid(negated(margin)))
        loss = scaled(numbers.unbias, minus(wrong, right))
    elif OBJECTIVE == "dpop":
        loss = negated(log_sigmoid(minus(margin, scaled(beta * numbers.dpop_lambda, relu(negated(chosen))))))
    elif OBJECTIVE == "bdpo":
        mixture = log_add_exp(shifted(rejected, numbers.log_mixed), numbers.log_kept)
        loss = negated(log_sigmoid(scaled(beta, minus(chosen, mixture))))
    elif OBJECTIVE == "apo_zero":
        loss = plus(sigmoid(scaled(-beta, chosen)), sigmoid(scaled(beta, rejected)))
    elif OBJECTIVE == "apo_down":
        loss = plus(sigmoid(scaled(beta, chosen)), sigmoid(negated(margin)))
    elif OBJECTIVE == "nca_pair":
        against = plus(log_sigmoid(scaled(-beta, chosen)), log_sigmoid(scaled(-beta, rejected)))
        loss = negated(plus(log_sigmoid(scaled(beta, chosen)), scaled(0.5, against)))
    elif OBJECTIVE == "sppo_hard":
        loss = plus(square(shifted(chosen, -1 / (2 * beta))), square(shifted(rejected, 1 / (2 * beta))))
    elif OBJECTIVE == "exo_pair":
        right = times(sigmoid(margin), shifted(log_sigmoid(margin), -numbers.log_unflipped))
        wrong = times(sigmoid(negated(margin)), shifted(log_sigmoid(negated(margin)), -numbers.log_flipped))
        loss = plus(right, wrong)
    elif OBJECTIVE == "bco_pair":
        right = log_sigmoid(shifted(scaled(beta, chosen), -numbers.bco_baseline))
        loss = negated(plus(right, log_sigmoid(shifted(scaled(-beta, rejected), numbers.bco_baseline))))
    else:
        tl.static_assert(OBJECTIVE == "discopop")
        gate = scaled(1 / numbers.discopop_tau, margin)
        # exp(-x) σ(x/τ) as one exponential: the two factors overflow and vanish on their own, and inf · 0 is NaN.
        right = exp(minus(log_sigmoid(gate), margin))
        loss = minus(right, times(log_sigmoid(margin), sigmoid(negated(gate))))
    return loss


@triton.jit
def pairwise_cringe(numbers, chosen, rejected, MEANS: tl.constexpr, DETACH_GATE: tl.constexpr):
    """g · (CE(y_w) + α Σ ℓ(y_l)) with the gate g = σ((b - M) / τ), M = lp(y_w) - lp(y_l); and the loss's derivative by
    Σ ℓ(y_l), besides those by the two log-probabilities."""
    chosen_logp = of_chosen(log_ratio(chosen, MEANS), log_ratio_slope(chosen, MEANS))
    rejected_logp = of_rejected(log_ratio(rejected, MEANS), log_ratio_slope(rejected, MEANS))
    apart = minus(chosen_logp, rejected_logp)
    gate = sigmoid(scaled(1 / numbers.temperature, shifted(negated(apart), numbers.margin)))
    cross_entropy = of_chosen(-chosen.logp, tl.full(chosen.logp.shape, -1.0, tl.float32))
    binary = shifted(cross_entropy, numbers.alpha * rejected.cringe)
    if DETACH_GATE:
        loss = chain(binary, gate.value * binary.value, gate.value)
    else:
        loss = times(gate, binary)
    return loss, gate.value * numbers.alpha


@triton.jit
def pair_loss(numbers, chosen, rejected, OBJECTIVE: tl.constexpr, MEANS: tl.constexpr, DETACH_GATE: tl.constexpr):
    """A pair's loss, and its derivative by the rejected sequence's Cringe loss."""
    if OBJECTIVE == "pairwise_cringe":
        loss, by_cringe = pairwise_cringe(numbers, chosen, rejected, MEANS, DETACH_GATE)
    else:
        chosen_ratio = of_chosen(log_ratio(chosen, MEANS), log_ratio_slope(chosen, MEANS))
        rejected_ratio = of_rejected(log_ratio(rejected, MEANS), log_ratio_slope(rejected, MEANS))
        loss = dpo(numbers, chosen_ratio, rejected_ratio, OBJECTIVE)
        by_cringe = tl.zeros_like(loss.value)
    return loss, by_cringe


# --- from tokens to the loss of a group -------------------------------------------------------------------------------


class Range(NamedTuple):
    """What offsets say of an item."""

    begin: Any
    end: Any
    sound: Any


@triton.jit
def range_of(start, item, items, length, mask):
    """What offsets say of ``item`` of ``items``, kept within [0, length) and such that the items together leave nothing
    out, whatever the offsets hold."""
    first = tl.load(start + item, mask=mask, other=0)
    last = tl.load(start + item + 1, mask=mask, other=0)
    begin = tl.where(item == 0, 0, tl.minimum(tl.maximum(first, 0), length))
    end = tl.where(item + 1 == items, length, tl.minimum(tl.maximum(last, 0), length))
    return Range(begin, end, (begin == first) & (end == last) & (begin <= end))


@triton.jit
def sum_tokens(tokens, begin_R, length_R, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS] the sum over each sequence, in LANES interleaved parts."""
    part_RL = tl.zeros([ROWS, LANES], tl.float32)
    for t in tl.range(0, tl.max(length_R), LANES, loop_unroll_factor=8):  # several loads on their way at once
        t_L = t + tl.arange(0, LANES)
        place_RL = begin_R[:, None] + t_L[None, :]
        part_RL += tl.load(tokens + place_RL, mask=t_L[None, :] < length_R[:, None], other=0.0)
    return tl.sum(part_RL, 1)


@triton.jit
def sum_double(values, mask):
    """The sum in float64; what is not summed is selected away: it may hold anything."""
    return tl.sum(tl.where(mask, values, 0.0).to(tl.float64))


@triton.jit(do_not_specialize=["tokens", "sequences", "groups"])
def loss_kernel(
    token_logp,
    token_cringe,  # None where the objective has none
    sequence_start,
    group_start,
    positive,
    ref_logp,  # likewise
    loss,
    sequence_logp,
    logp_coef,
    cringe_coef,
    tokens,
    sequences,
    groups,
    numbers,
    OBJECTIVE: tl.constexpr,
    MEANS: tl.constexpr,
    ALLOW_NO_ANCHOR: tl.constexpr,
    DETACH_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Everything of one group. Offsets that are none, and a group of pairs without exactly one negative, make NaN of
    the loss and of the coefficients: an accelerator's values cannot be looked at without waiting for it."""
    group = tl.program_id(0).to(tl.int64)
    own = range_of(group_start, group, groups, sequences, True)

    # Tokens -> sequences, and what can be summed over the group's sequences on the way. There is one negative: what is
    # summed over all that there are is the negative's.
    negatives = 0
    negative = tl.zeros([], tl.int64)
    rejected_logp = 0.0
    rejected_ref = 0.0
    rejected_length = 0.0
    rejected_cringe = 0.0
    anchors = tl.zeros([], tl.float64)
    total = tl.zeros([], tl.float64)
    for first in range(own.begin, own.end, ROWS):
        s_R = first + tl.arange(0, ROWS)
        inside_R = s_R < own.end
        place_R = range_of(sequence_start, s_R, sequences, tokens, inside_R)
        is_positive_R = inside_R & (tl.load(positive + s_R, mask=inside_R, other=0) != 0)
        is_negative_R = inside_R & (is_positive_R == 0)
        length_R = tl.where(inside_R & place_R.sound, place_R.end - place_R.begin, 0)

        logp_R = sum_tokens(token_logp, place_R.begin, length_R, ROWS, LANES)
        logp_R = tl.where(place_R.sound, logp_R, float("nan"))
        tl.store(sequence_logp + s_R, logp_R, mask=inside_R)
        negatives += tl.sum(is_negative_R.to(tl.int32))
        negative += tl.sum(tl.where(is_negative_R, s_R, 0))
        rejected_logp += tl.sum(tl.where(is_negative_R, logp_R, 0.0))
        rejected_length += tl.sum(tl.where(is_negative_R, length_R, 0).to(tl.float32))

        cringe_R = tl.zeros_like(logp_R)
        if token_cringe is not None:
            cringe_R = sum_tokens(token_cringe, place_R.begin, tl.where(is_negative_R, length_R, 0), ROWS, LANES)
            cringe_R = tl.where(place_R.sound, cringe_R, float("nan"))
            rejected_cringe += tl.sum(tl.where(is_negative_R, cringe_R, 0.0))
        ref_R = tl.zeros_like(logp_R)
        if ref_logp is not None:
            ref_R = tl.load(ref_logp + s_R, mask=inside_R, other=0.0)
            rejected_ref += tl.sum(tl.where(is_negative_R, ref_R, 0.0))

        if OBJECTIVE == "d2o":
            y_R = Sequence(logp_R, ref_R, tl.where(inside_R, length_R, 1).to(tl.float32), cringe_R)
            anchors += sum_double(log_ratio(y_R, MEANS), is_positive_R)
        if OBJECTIVE == "cringe":
            total += sum_double(tl.where(is_positive_R, -logp_R, numbers.alpha * cringe_R), inside_R)
            by_logp_R = tl.where(is_positive_R, -1.0, 0.0)
            by_cringe_R = tl.where(is_positive_R, 0.0, numbers.alpha)
            tl.store(logp_coef + s_R, tl.where(own.sound, by_logp_R, float("nan")), mask=inside_R)
            tl.store(cringe_coef + s_R, tl.where(own.sound, by_cringe_R, float("nan")), mask=inside_R)

    if OBJECTIVE == "cringe":
        tl.store(loss + group, tl.where(own.sound, total.to(tl.float32), float("nan")))
    else:
        # Sequences -> pairs.
        positives = (own.end - own.begin - 1).to(tl.float32)
        sound = own.sound & (negatives == 1)
        counts = sound & (positives > 0)
        if ALLOW_NO_ANCHOR:
            counts = sound
        nothing = tl.where(sound, 0.0, float("nan"))
        rejected = Sequence(rejected_logp, rejected_ref, rejected_length, rejected_cringe)
        divisor = tl.where(positives > 0, positives, 1.0)
        by_rejected = tl.zeros([], tl.float64)
        by_cringe = tl.zeros([], tl.float64)
        if OBJECTIVE == "d2o":
            mean = anchors.to(tl.float32) / divisor
            anchor = of_chosen(mean, tl.full([], 1.0, tl.float32))
            result = d2o(numbers, anchor, of_rejected(log_ratio(rejected, MEANS), log_ratio_slope(rejected, MEANS)))
        # Sequences were summed by other threads than those that read the sums now.
        tl.debug_barrier()
        for first in range(own.begin, own.end, MEMBERS):
            s_M = first + tl.arange(0, MEMBERS)
            inside_M = s_M < own.end
            is_positive_M = inside_M & (tl.load(positive + s_M, mask=inside_M, other=0) != 0)
            place_M = range_of(sequence_start, s_M, sequences, tokens, inside_M)
            length_M = tl.where(inside_M, place_M.end - place_M.begin, 1).to(tl.float32)
            logp_M = tl.load(sequence_logp + s_M, mask=inside_M, other=0.0)
            ref_M = tl.zeros_like(logp_M)
            if ref_logp is not None:
                ref_M = tl.load(ref_logp + s_M, mask=inside_M, other=0.0)
            chosen_M = Sequence(logp_M, ref_M, length_M, tl.zeros_like(logp_M))
            if OBJECTIVE == "d2o":
                coef_M = result.by_chosen / divisor * log_ratio_slope(chosen_M, MEANS)
            else:
                pair_M, by_cringe_M = pair_loss(numbers, chosen_M, rejected, OBJECTIVE, MEANS, DETACH_GATE)
                total += sum_double(pair_M.value, is_positive_M)
                by_rejected += sum_double(pair_M.by_rejected, is_positive_M)
                by_cringe += sum_double(by_cringe_M, is_positive_M)
                coef_M = pair_M.by_chosen / divisor
            # All but the negative's, which is not known before the end.
            written_M = inside_M & (is_positive_M | (counts == 0))
            tl.store(logp_coef + s_M, tl.where(counts, coef_M, nothing), mask=written_M)
            tl.store(cringe_coef + s_M, tl.where(counts, 0.0, nothing), mask=written_M)
        if OBJECTIVE == "d2o":
            value = result.value
            negative_coef = result.by_rejected
        else:
            value = total.to(tl.float32) / divisor
            negative_coef = by_rejected.to(tl.float32) / divisor
        tl.store(loss + group, tl.where(counts, value, nothing))
        tl.store(logp_coef + negative, negative_coef, mask=counts)
        tl.store(cringe_coef + negative, by_cringe.to(tl.float32) / divisor, mask=counts)


# --- the launch -------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Sequences whose tokens are summed at once, tokens of each, pairs at once."""

    rows: int = 4
    lanes: int = 32
    members: int = 32


NUM_WARPS = 4


def loss(
    token_logp: Tensor,
    token_cringe: Tensor | None,
    sequence_start: Tensor,
    group_start: Tensor,
    positive: Tensor,
    ref_logp: Tensor | None,
    objective: str,
    parameters: Values[float],
    config: Config = Config(),  # noqa: B008 (immutable)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of groups and what their gradients are made of, with the semantics of ``fastd2o_native::loss``.

    Args:
        token_logp: [N] float32, log-probabilities of the counted tokens, nats. All tensors are contiguous.
        token_cringe: [N] float32, tokens' Cringe losses; for the Cringe objectives alone.
        sequence_start: [S + 1] int64, where in N each sequence begins, and N.
        group_start: [G + 1] int64, where in S each group begins, and S.
        positive: [S] bool.
        ref_logp: [S] float32; for all but the Cringe objectives.
        objective: one of :data:`fastd2o.losses.GROUPED_OBJECTIVES`.
        parameters: its options, in the order of :data:`fastd2o.losses.fused.OPTIONS`, switches as 0 or 1.
        config: block sizes.

    Returns:
        loss [G], sequence_logp [S], and the derivatives [S] of each group's loss by the sums of its sequences'
        token_logp and token_cringe. Of a group that makes no sense, NaN; values are not looked at on the host.

    Raises:
        ValueError: a tensor of the wrong dtype, shape, device or layout, missing or unread, an unknown objective, the
            wrong number of parameters.
    """
    _check(token_logp, token_cringe, sequence_start, group_start, positive, ref_logp, objective, parameters)
    sequences, groups = len(positive), len(group_start) - 1
    loss_G = token_logp.new_empty(groups)
    sequence_logp, logp_coef, cringe_coef = (token_logp.new_empty(sequences) for _ in range(3))
    if groups > 0:
        given = dict(zip(OPTIONS[objective], parameters, strict=True))
        with torch.cuda.device_of(token_logp):
            loss_kernel[(groups,)](
                token_logp,
                token_cringe,
                sequence_start,
                group_start,
                positive,
                ref_logp,
                loss_G,
                sequence_logp,
                logp_coef,
                cringe_coef,
                len(token_logp),
                sequences,
                groups,
                numbers_of(given),
                **constants(objective, given, config),
                num_warps=NUM_WARPS,
            )
    return loss_G, sequence_logp, logp_coef, cringe_coef


def constants(objective: str, given: dict[str, float], config: Config) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "OBJECTIVE": objective,
        "MEANS": objective == "ipo" or bool(given.get("length_normalize")),
        "ALLOW_NO_ANCHOR": bool(given.get("allow_no_anchor")),
        "DETACH_GATE": bool(given.get("detach_gate")),
        "ROWS": config.rows,
        "LANES": config.lanes,
        "MEMBERS": config.members,
    }


def numbers_of(given: dict[str, float]) -> Numbers:
    """The parameters of an objective, as its formula wants them."""
    numbers = Numbers(**{name: float(value) for name, value in given.items() if name in Numbers._fields})
    if "label_smoothing" in given:
        flipped = given["label_smoothing"]
        numbers = numbers._replace(
            flipped=flipped,
            unflipped=1 - flipped,
            unbias=1 / (1 - 2 * flipped),
            log_flipped=_log(flipped),
            log_unflipped=math.log1p(-flipped),
        )
    if "bdpo_lambda" in given:
        mixed = given["bdpo_lambda"]
        numbers = numbers._replace(log_mixed=_log(mixed), log_kept=_log(1 - mixed))
    return numbers


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _check(
    token_logp: Tensor,
    token_cringe: Tensor | None,
    sequence_start: Tensor,
    group_start: Tensor,
    positive: Tensor,
    ref_logp: Tensor | None,
    objective: str,
    parameters: Values[float],
) -> None:
    """What can be checked of a call without looking at values."""
    checks.one_of("objective", objective, GROUPED_OBJECTIVES)
    names = OPTIONS[objective]
    if len(parameters) != len(names):
        raise ValueError(
            f"loss: {objective!r} has {len(names)} parameters ({', '.join(names)}), but {len(parameters)} are given"
        )
    check_read(objective, ref_logp=ref_logp, token_cringe=token_cringe)
    tokens, sequences, groups = token_logp.numel(), positive.numel(), group_start.numel() - 1
    if groups < 0:
        raise ValueError("loss: group_start is empty, expected the G + 1 offsets of G groups")
    tensors: dict[str, tuple[Tensor | None, torch.dtype, int]] = {
        "token_logp": (token_logp, torch.float32, tokens),
        "token_cringe": (token_cringe, torch.float32, tokens),
        "sequence_start": (sequence_start, torch.int64, sequences + 1),
        "group_start": (group_start, torch.int64, groups + 1),
        "positive": (positive, torch.bool, sequences),
        "ref_logp": (ref_logp, torch.float32, sequences),
    }
    for name, (tensor, dtype, size) in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"loss: {name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != token_logp.device:
            raise ValueError(f"loss: {name} is on {tensor.device}, token_logp on {token_logp.device}; move it there")
        if list(tensor.shape) != [size]:
            raise ValueError(f"loss: {name} has shape {list(tensor.shape)}, expected [{size}]")
        if not tensor.is_contiguous():
            raise ValueError(f"loss: {name} is not contiguous; pass {name}.contiguous()")
    if tokens > 0 and sequences == 0:
        raise ValueError(f"loss: token_logp has {tokens} tokens, but positive has no sequence")
    if sequences > 0 and groups == 0:
        raise ValueError(f"loss: positive has {sequences} sequences, but group_start no group")
