"""``grouped_loss``: both backends against the losses it is made of, in float64, group by group."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from fastd2o import losses
from fastd2o.losses.fused import resolve_options
from fastd2o.ops import native

unavailable = native.unavailable("cpu")
needs_native = pytest.mark.skipif(unavailable is not None, reason=f"no native kernels: {unavailable}")
BACKENDS = [pytest.param("cpu", marks=needs_native), "torch"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("d2o", {}),
    ("d2o", {"alpha": 0.3, "beta": 0.05, "allow_no_anchor": True}),
    ("d2o", {"alpha": 1.5, "beta": 2.0, "length_normalize": True}),
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.2}),
    ("hinge", {"beta": 0.02}),
    ("ipo", {}),
    ("ipo", {"beta": 0.7}),
    ("robust", {"label_smoothing": 0.3}),
    ("dpop", {}),
    ("dpop", {"dpop_lambda": 0.5}),
    ("bdpo", {}),
    ("bdpo", {"bdpo_lambda": 1.0}),
    ("bdpo", {"bdpo_lambda": 0.999999}),
    ("apo_zero", {}),
    ("apo_down", {"beta": 0.3}),
    ("nca_pair", {}),
    ("sppo_hard", {}),
    ("exo_pair", {}),
    ("exo_pair", {"label_smoothing": 0.1}),
    ("bco_pair", {"bco_baseline": 0.7}),
    ("discopop", {}),
    ("discopop", {"beta": 0.05, "discopop_tau": 0.8}),
    ("cringe", {}),
    ("cringe", {"alpha": 0.3}),
    ("pairwise_cringe", {}),
    ("pairwise_cringe", {"margin": 3.0, "temperature": 20.0, "alpha": 0.5, "detach_gate": False}),
    ("pairwise_cringe", {"temperature": 0.5, "detach_gate": False, "length_normalize": True}),
]
every_objective = pytest.mark.parametrize(("objective", "options"), OPTIONS, ids=str)


@dataclass(frozen=True)
class Case:
    """Groups of sequences of tokens. Every number is a multiple of 1/64: their sums are exact in float32 too, so that
    what is compared is the arithmetic behind them."""

    token_logp: Tensor
    token_cringe: Tensor
    sequence_start: Tensor
    group_start: Tensor
    positive: Tensor
    ref_logp: Tensor
    upstream: Tensor
    """[G] the gradient that reaches the losses."""

    @property
    def groups(self) -> list[list[tuple[bool, slice, int]]]:
        """For each group, whether each sequence is positive, its tokens, its number."""
        starts, groups = self.sequence_start.tolist(), self.group_start.tolist()
        return [
            [(bool(self.positive[s]), slice(starts[s], starts[s + 1]), s) for s in range(*pair)]
            for pair in itertools.pairwise(groups)
        ]

    def inputs(self, objective: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of ``grouped_loss`` that are tensors; what has a gradient is a fresh leaf."""
        tensors: dict[str, Any] = {"token_logp": self.token_logp.to(dtype).clone().requires_grad_()}
        if "cringe" in objective:
            tensors["token_cringe"] = self.token_cringe.to(dtype).clone().requires_grad_()
        else:
            tensors["ref_logp"] = self.ref_logp.to(dtype)
        return {
            **tensors,
            "sequence_start": self.sequence_start,
            "group_start": self.group_start,
            "positive": self.positive,
            "objective": objective,
        }


def make_case(lengths: list[list[int]], negatives: list[int], seed: int = 0, per_token: float = 3.0) -> Case:
    """Groups of sequences of these lengths; in each, the negative's place. Log-ratios lie within ±20."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, low: float, high: float) -> Tensor:
        return torch.randint(int(low * 64), int(high * 64) + 1, (size,), generator=generator) / 64

    sizes = torch.tensor([length for group in lengths for length in group], dtype=torch.int64)
    sequence_start = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    counts = torch.tensor([0, *(len(group) for group in lengths)])
    token_logp = draw(int(sizes.sum()), -per_token, 0.0)
    sums = torch.segment_reduce(token_logp.double(), "sum", offsets=sequence_start, initial=0.0).float()
    return Case(
        token_logp,
        draw(len(token_logp), 0.0, 3.0),
        sequence_start,
        counts.cumsum(0),
        torch.tensor(
            [i != place for group, place in zip(lengths, negatives, strict=True) for i in range(len(group))]
        ).bool(),
        sums + draw(len(sizes), -20.0, 20.0),
        draw(len(lengths), -2.0, 2.0),
    )


RAGGED = make_case([[5, 1, 7], [3], [40, 33, 64, 31], [2, 2], [9, 70, 1, 4, 6]], [2, 0, 1, 0, 4])


def expected(case: Case, objective: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [G] and gradients [N] of both token tensors, in float64, one group at a time with the public losses."""
    logp = case.token_logp.double().requires_grad_()
    cringe = case.token_cringe.double().requires_grad_()
    each = [_group(case, logp, cringe, group, objective, options) for group in case.groups]
    loss = torch.stack([torch.zeros((), dtype=torch.float64) + value for value in each]) if each else logp.new_zeros(0)
    total = (loss * case.upstream).sum() + 0 * (logp[:0].sum() + cringe[:0].sum())
    logp_gradient, cringe_gradient = torch.autograd.grad(total, (logp, cringe))
    return loss.detach(), logp_gradient, cringe_gradient


def _group(
    case: Case,
    logp: Tensor,
    cringe: Tensor,
    group: list[tuple[bool, slice, int]],
    objective: str,
    options: dict[str, Any],
) -> Tensor | float:
    mean = options.get("length_normalize")
    options = {name: value for name, value in options.items() if name != "length_normalize"}

    def stack(positive: bool, value: Any) -> Tensor:
        values = [value(tokens, s) for role, tokens, s in group if role == positive]
        return torch.stack(values) if values else logp.new_zeros(0)

    def total(positive: bool) -> Tensor:
        return stack(positive, lambda tokens, s: logp[tokens].sum())

    def reference(positive: bool) -> Tensor:
        return stack(positive, lambda tokens, s: case.ref_logp[s].double())

    def length(positive: bool) -> Tensor:
        return stack(positive, lambda tokens, s: torch.tensor(float(tokens.stop - tokens.start), dtype=torch.float64))

    def contrast(positive: bool) -> Tensor:
        return stack(positive, lambda tokens, s: cringe[tokens].sum())

    def scaled(values: Tensor, positive: bool) -> Tensor:
        return values / length(positive) if mean else values

    if objective == "cringe":
        return -total(True).sum() + options.get("alpha", 1.0) * contrast(False).sum()
    if not any(role for role, *_ in group) and not options.get("allow_no_anchor"):
        return 0.0
    if objective == "d2o":
        return losses.d2o_loss(
            scaled(total(False), False),
            scaled(total(True), True)[None],
            ref_negative_logp=scaled(reference(False), False),
            ref_anchor_logp=scaled(reference(True), True)[None],
            reduction="sum",
            **options,
        )
    if objective == "pairwise_cringe":
        return losses.pairwise_cringe_loss(
            scaled(total(True), True), scaled(total(False), False), -total(True), contrast(False), **options
        )
    if objective == "exo_pair":
        options = {"label_smoothing": 1e-3, **options}
    return losses.dpo_loss(
        total(True),
        total(False),
        ref_chosen_logp=reference(True),
        ref_rejected_logp=reference(False),
        chosen_length=length(True) if objective == "ipo" else None,
        rejected_length=length(False) if objective == "ipo" else None,
        loss_type=objective,
        **options,
    )


def check(case: Case, objective: str, options: dict[str, Any], backend: str) -> None:
    """Losses and token gradients are those of the public losses in float64."""
    inputs = case.inputs(objective)
    out = losses.grouped_loss(**inputs, backend=backend, **options)
    names = [name for name in ("token_logp", "token_cringe") if name in inputs]
    gradients = torch.autograd.grad((out.loss * case.upstream).sum(), [inputs[name] for name in names])
    loss, *exact = expected(case, objective, options)
    torch.testing.assert_close(out.loss.detach().double(), loss, rtol=1e-5, atol=1e-6)
    for gradient, right in zip(gradients, exact, strict=False):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-6)


# --- values and gradients ---------------------------------------------------------------------------------------------


@every_objective
@every_backend
def test_agrees_with_the_losses_it_is_made_of(objective: str, options: dict[str, Any], backend: str):
    check(RAGGED, objective, options, backend)


def means(objective: str, options: dict[str, Any]) -> bool:
    return objective == "ipo" or bool(options.get("length_normalize"))


@st.composite
def structures(draw: Any) -> tuple[str, dict[str, Any], Case]:
    objective, options = draw(st.sampled_from(OPTIONS))
    shortest = int(means(objective, options))
    lengths = draw(st.lists(st.lists(st.integers(shortest, 70), min_size=1, max_size=17), max_size=5))
    if objective == "d2o" and not options.get("allow_no_anchor"):
        lengths.append([shortest, 3])
    negatives = [draw(st.integers(0, len(group) - 1)) for group in lengths]
    return objective, options, make_case(lengths, negatives, seed=draw(st.integers(0, 99)))


@every_backend
@given(drawn=structures())
@hypothesis_settings(max_examples=150)
def test_any_structure_of_groups(drawn: tuple[str, dict[str, Any], Case], backend: str):
    objective, options, case = drawn
    check(case, objective, options, backend)


@every_objective
@every_backend
def test_no_group_at_all(objective: str, options: dict[str, Any], backend: str):
    check(make_case([], []), objective, options, backend)


@pytest.mark.parametrize("objective", ["d2o", "sigmoid", "ipo", "cringe", "pairwise_cringe"])
@every_backend
def test_one_huge_group(objective: str, backend: str):
    check(make_case([[1 + i % 5 for i in range(2000)]], [1234]), objective, {}, backend)


@pytest.mark.parametrize("objective", ["d2o", "sigmoid", "cringe"])
@every_backend
def test_long_sequences(objective: str, backend: str):
    check(make_case([[5000, 4999, 4097], [3000, 1]], [1, 0], per_token=12.0), objective, {}, backend)


@every_backend
def test_sums_of_any_numbers_are_as_good_as_float32(backend: str):
    case = replace(
        RAGGED, token_logp=-12 * torch.rand(len(RAGGED.token_logp), generator=torch.Generator().manual_seed(3))
    )
    sums = losses.grouped_loss(**case.inputs("sigmoid"), backend=backend).sequence_logp
    exact = torch.stack([case.token_logp[tokens].double().sum() for group in case.groups for _, tokens, _ in group])
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)
    assert not sums.requires_grad


@needs_native
@pytest.mark.parametrize("backend", [None, "torch"])
def test_float64_is_served_by_torch(backend: str | None):
    out = losses.grouped_loss(**RAGGED.inputs("discopop", torch.float64), backend=backend)
    assert out.loss.dtype == torch.float64
    torch.testing.assert_close(out.loss.detach(), expected(RAGGED, "discopop", {})[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="float64"):
        losses.grouped_loss(**RAGGED.inputs("discopop", torch.float64), backend="cpu")


@pytest.mark.parametrize("objective", ["d2o", "bdpo", "pairwise_cringe"])
def test_gradcheck(objective: str):
    case = make_case([[3, 2], [2, 2, 1]], [1, 0])
    inputs = case.inputs(objective, torch.float64)
    names = [name for name in ("token_logp", "token_cringe") if name in inputs]
    options: dict[str, Any] = {"detach_gate": False} if objective == "pairwise_cringe" else {}

    def loss(*values: Tensor) -> Tensor:
        inputs.update(zip(names, values, strict=True))
        return losses.grouped_loss(**inputs, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(inputs[name] for name in names))


@every_objective
@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(
    objective: str, options: dict[str, Any], backend: str, dtype: torch.dtype
):
    inputs = RAGGED.inputs(objective, dtype)
    upcast: dict[str, Any] = {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }
    out = losses.grouped_loss(**inputs, backend=backend, **options)
    assert torch.equal(out.loss, losses.grouped_loss(**upcast, backend=backend, **options).loss)
    (gradient,) = torch.autograd.grad(out.loss.sum(), inputs["token_logp"])
    assert gradient.dtype == dtype


@every_backend
def test_views_with_gaps_are_taken(backend: str):
    inputs = RAGGED.inputs("sigmoid")
    plain = losses.grouped_loss(**inputs, backend=backend).loss
    spread: dict[str, Any] = {
        name: torch.stack([x, x], 1)[:, 0] if isinstance(x, Tensor) else x for name, x in inputs.items()
    }
    assert torch.equal(losses.grouped_loss(**spread, backend=backend).loss, plain)


@every_backend
def test_the_reference_is_a_constant(backend: str):
    inputs = RAGGED.inputs("d2o")
    inputs["ref_logp"].requires_grad_()
    out = losses.grouped_loss(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss.sum(), [inputs["ref_logp"]], allow_unused=True)
    assert gradient is None


@every_backend
def test_only_one_of_the_token_tensors_may_want_a_gradient(backend: str):
    for wanted in ("token_logp", "token_cringe"):
        inputs = RAGGED.inputs("pairwise_cringe")
        other = ({"token_logp", "token_cringe"} - {wanted}).pop()
        both = torch.autograd.grad(losses.grouped_loss(**inputs, backend=backend).loss.sum(), inputs[wanted])
        inputs[other] = inputs[other].detach()
        one = torch.autograd.grad(losses.grouped_loss(**inputs, backend=backend).loss.sum(), inputs[wanted])
        assert torch.equal(one[0], both[0])


# --- extremes ---------------------------------------------------------------------------------------------------------


def pairs_of(ratios: Tensor) -> Case:
    """A group with one positive for each row of log-ratios [G, 2] of chosen and rejected; one token per sequence."""
    count = len(ratios)
    ones = torch.ones(2 * count)
    return Case(
        ratios.flatten(),
        ones,
        torch.arange(2 * count + 1),
        torch.arange(count + 1) * 2,
        torch.tensor([True, False]).repeat(count),
        0 * ones,
        torch.ones(count),
    )


@every_objective
@every_backend
def test_saturation(objective: str, options: dict[str, Any], backend: str):
    corners = torch.tensor(list(itertools.product([-1e4, -30.0, -1e-4, 0.0, 1e-4, 30.0, 1e4], repeat=2)))
    inputs = pairs_of(corners).inputs(objective)
    assert losses.grouped_loss(**inputs, backend=backend, **options).loss.isfinite().all()
    if objective == "bdpo":  # of these two, all that is left is less than the distance of float32's numbers there
        corners = corners[(corners != 1e4).any(1)]
    check(pairs_of(corners), objective, options, backend)


@needs_native
@every_objective
def test_infinite_log_probabilities_are_what_they_are_in_torch(objective: str, options: dict[str, Any]):
    values = [-torch.inf, -5.0, -1.0]
    rows = torch.tensor(list(itertools.product(values, repeat=4)))
    case = replace(pairs_of(rows[:, :2]), ref_logp=rows[:, 2:].flatten())
    results = []
    for backend in ("cpu", "torch"):
        inputs = case.inputs(objective)
        out = losses.grouped_loss(**inputs, backend=backend, **options)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss.sum(), inputs["token_logp"])))
    (loss, gradient), (torch_loss, torch_gradient) = results
    torch.testing.assert_close(loss, torch_loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    # Of a loss that is NaN, a gradient may be; which of its two parts are is no matter.
    lost = torch_loss.isnan().repeat_interleave(2) & torch_gradient.isnan()
    torch.testing.assert_close(gradient[~lost], torch_gradient[~lost], rtol=1e-5, atol=1e-6, equal_nan=True)


@every_backend
def test_what_does_not_count_may_hold_anything(backend: str):
    """A group without an anchor has loss 0 whatever its negative holds; Cringe tokens of positives are not read."""
    case = make_case([[2], [3, 4]], [0, 1])
    case.token_logp[:2] = torch.nan
    for objective in ("d2o", "sigmoid", "nca_pair"):
        inputs = case.inputs(objective)
        out = losses.grouped_loss(**inputs, backend=backend)
        (gradient,) = torch.autograd.grad(out.loss.sum(), inputs["token_logp"])
        assert out.loss[0] == 0
        assert (gradient[:2] == 0).all()
        assert (gradient[2:] != 0).all()
    case.token_cringe[2:5] = torch.nan
    for objective in ("cringe", "pairwise_cringe"):
        inputs = case.inputs(objective)
        out = losses.grouped_loss(**inputs, backend=backend)
        (gradient,) = torch.autograd.grad(out.loss[1], inputs["token_logp"])
        assert out.loss[1].isfinite()
        assert gradient.isfinite().all()


# --- the same bits ----------------------------------------------------------------------------------------------------


@needs_native
@every_objective
def test_the_same_bits_on_every_run_and_any_number_of_threads(objective: str, options: dict[str, Any]):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 400, (40, 6), generator=generator).tolist()
    case = make_case(lengths, [i % 6 for i in range(40)])
    case = replace(case, token_logp=-3 * torch.rand(len(case.token_logp), generator=generator))
    assert len(case.token_logp) > 32768  # enough for a second thread
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            inputs = case.inputs(objective)
            out = losses.grouped_loss(**inputs, backend="cpu", **options)
            (gradient,) = torch.autograd.grad((out.loss * case.upstream).sum(), inputs["token_logp"])
            results.append((out.loss.detach(), out.sequence_logp, gradient))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# --- the CUDA kernel, thread by thread --------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``torch.ops.fastd2o_emulated.loss``: the operator as its CUDA kernel computes it."""
    if unavailable is not None or shutil.which("g++") is None:
        pytest.skip(unavailable or "no g++")
    native.load("cpu")
    library = tmp_path_factory.mktemp("loss_kernel") / "loss_kernel.so"
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-isystem", str(torch_folder / "include")]
    command += [str(ROOT / "tests/losses/loss_kernel.cpp"), "-o", str(library)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    torch.ops.load_library(str(library))
    return torch.ops.fastd2o_emulated.loss


def operator_arguments(case: Case, objective: str, options: dict[str, Any]) -> list[Any]:
    inputs = case.inputs(objective)
    names = ("token_logp", "token_cringe", "sequence_start", "group_start", "positive", "ref_logp", "objective")
    tensors = [x.detach() if isinstance(x, Tensor) else x for x in map(inputs.get, names)]
    return [*tensors, [float(value) for value in resolve_options(objective, options).values()]]


MANY = make_case([[2, 9], [1], [33, 4, 5], [70] * 9, [3 + i % 40 for i in range(300)]], [0, 0, 2, 8, 150])


@every_objective
def test_the_cuda_kernel_computes_what_the_cpu_does(objective: str, options: dict[str, Any], emulated: Any):
    arguments = operator_arguments(MANY, objective, options)
    results = torch.ops.fastd2o_native.loss(*arguments)
    emulations = [emulated(*arguments, blocks, order) for blocks, order in ((5, 0), (2, 1))]
    for right, first, second in zip(results, *emulations, strict=True):
        assert torch.equal(first, second)  # whatever the grid and the order of threads
        torch.testing.assert_close(first, right, rtol=1e-6, atol=1e-7)


def test_sums_have_the_same_bits_on_both_devices(emulated: Any):
    case = replace(MANY, token_logp=-3 * torch.rand(len(MANY.token_logp), generator=torch.Generator().manual_seed(1)))
    arguments = operator_arguments(case, "sigmoid", {})
    assert torch.equal(emulated(*arguments, 5, 0)[1], torch.ops.fastd2o_native.loss(*arguments)[1])


@pytest.mark.parametrize("objective", ["d2o", "sigmoid", "cringe", "pairwise_cringe"])
def test_the_cuda_kernel_answers_nonsense_with_nan(objective: str, emulated: Any):
    """Nothing outside is read, nothing is left unwritten, and groups that make sense are not touched."""
    options = {"allow_no_anchor": True} if objective == "d2o" else {}
    case = make_case([[2, 9], [5], [33, 4, 5], [70] * 9, [6, 7]], [0, 0, 2, 8, 1])
    good = emulated(*operator_arguments(case, objective, options), 5, 0)
    wild_tokens, wild_groups, two_negatives = (
        x.clone() for x in (case.sequence_start, case.group_start, case.positive)
    )
    wild_tokens[1], wild_tokens[4] = -(2**62), 2**62
    wild_groups[0], wild_groups[4] = 1, 2**40
    two_negatives[1] = False
    changes = [
        (replace(case, sequence_start=wild_tokens), [0, 2]),
        (replace(case, group_start=wild_groups), [0, 3, 4]),
        *([] if objective == "cringe" else [(replace(case, positive=two_negatives), [0])]),
    ]
    for changed, lost in changes:
        loss, _, *coefficients = emulated(*operator_arguments(changed, objective, options), 5, 0)
        assert loss.isnan().nonzero().flatten().tolist() == lost
        for g, group in enumerate(case.groups):
            if g in lost:
                continue
            own = [s for *_, s in group]
            assert torch.equal(loss[g], good[0][g])
            assert all(torch.equal(x[own], y[own]) for x, y in zip(coefficients, good[2:], strict=True))


# --- a citizen of torch.library ---------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("objective", ["d2o", "pairwise_cringe"])
def test_opcheck(objective: str):
    native.load("cpu")
    arguments = operator_arguments(RAGGED, objective, {})
    arguments[0].requires_grad_()
    results = torch.library.opcheck(torch.ops.fastd2o.grouped_loss, (*arguments, "cpu"))
    assert set(results.values()) == {"SUCCESS"}


@every_backend
@pytest.mark.parametrize("objective", ["d2o", "bdpo", "pairwise_cringe"])
def test_compiles_without_a_graph_break(objective: str, backend: str):
    torch._dynamo.reset()
    compiled = torch.compile(losses.grouped_loss, fullgraph=True, backend="aot_eager")
    inputs = RAGGED.inputs(objective)
    results = []
    for function in (losses.grouped_loss, compiled):
        out = function(**inputs, backend=backend)
        gradient = torch.autograd.grad((out.loss * RAGGED.upstream).sum(), inputs["token_logp"])
        results.append((out.loss.detach(), out.sequence_logp, *gradient))
    torch.testing.assert_close(*results)


@needs_native
def test_differentiable_once():
    inputs = RAGGED.inputs("d2o")
    loss = losses.grouped_loss(**inputs, backend="cpu").loss.sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, inputs["token_logp"], create_graph=True)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "offsets that fall": (
        {"sequence_start": torch.tensor([0, 3, 2, 9, 10])},
        r"sequence_start is \[0, 3, 2, 9, 10\], expected offsets that rise from 0 to 10, the number of tokens. Fix",
    ),
    "a late begin": ({"sequence_start": torch.tensor([1, 3, 5, 9, 10])}, "sequence_start is .* expected offsets"),
    "an early end": ({"sequence_start": torch.tensor([0, 3, 5, 9, 9])}, "sequence_start is .* expected offsets"),
    "offsets outside": ({"sequence_start": torch.tensor([0, -(2**62), 2**62, 9, 10])}, "sequence_start is .* expected"),
    "groups outside": ({"group_start": torch.tensor([0, 2, 2**40])}, r"group_start is \[0, 2, .*number of sequences"),
    "two negatives": (
        {"positive": torch.tensor([False, False, True, False])},
        "group 0 has 2 negatives in positive, expected exactly one. Fix",
    ),
    "no negative": ({"positive": torch.tensor([True, False, True, True])}, "group 1 has 0 negatives"),
    "no anchor": (
        {"positive": torch.zeros(4).bool(), "group_start": torch.arange(5)},
        "no group has an anchor.*allow_no_anchor=True",
    ),
    "an empty sequence": (
        {"sequence_start": torch.tensor([0, 3, 3, 9, 10]), "length_normalize": True},
        "sequence 1 is empty: it has no mean log-probability. Fix: drop",
    ),
}


SMALL = make_case([[3, 2], [4, 1]], [1, 1])


def small() -> dict[str, Any]:
    return SMALL.inputs("d2o")


@every_backend
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused(name: str, backend: str):
    changes, message = BAD_VALUES[name]
    with pytest.raises(ValueError, match=message):
        losses.grouped_loss(**{**small(), **changes}, backend=backend)


@needs_native
def test_bad_values_are_refused_inside_a_compiled_graph_too():
    torch._dynamo.reset()
    compiled = torch.compile(losses.grouped_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="group 0 has 2 negatives"):
        compiled(**{**small(), "positive": torch.tensor([False, False, True, False])}, backend="cpu")


def test_bad_values_that_are_not_looked_at_make_nan_and_stay_in_bounds():
    torch._dynamo.reset()
    compiled = torch.compile(losses.grouped_loss, fullgraph=True, backend="aot_eager")
    out = compiled(**{**small(), "positive": torch.tensor([False, False, True, False])}, backend="torch")
    assert out.loss.isnan().tolist() == [True, False]
    for name in ("offsets that fall", "a late begin", "an early end", "offsets outside", "groups outside"):
        out = compiled(**{**small(), **BAD_VALUES[name][0]}, backend="torch")
        assert out.loss.isnan().all(), name


BAD_TENSORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "objective": ({"objective": "dpo"}, ValueError, "objective is 'dpo', expected one of: d2o, sigmoid, hinge"),
    "integer log-probabilities": (
        {"token_logp": torch.zeros(10).long()},
        TypeError,
        "token_logp has dtype torch.int64",
    ),
    "a matrix": ({"token_logp": torch.zeros(2, 5)}, ValueError, r"token_logp has shape \[2, 5\], expected \[10\]"),
    "int32 offsets": (
        {"group_start": torch.tensor([0, 2, 4]).int()},
        TypeError,
        r"group_start has dtype torch.int32, expected int64 offsets. Fix: pass group_start.long\(\)",
    ),
    "a list": ({"sequence_start": [0, 10]}, TypeError, "sequence_start is of type list, expected a torch.Tensor"),
    "no offsets": ({"group_start": torch.zeros(0).long()}, ValueError, r"group_start has shape \[0\]"),
    "integer roles": ({"positive": torch.ones(4)}, TypeError, "positive has dtype torch.float32, expected torch.bool"),
    "a role missing": ({"positive": torch.ones(3).bool()}, ValueError, r"positive has shape \[3\], expected \[4\]"),
    "no reference": ({"ref_logp": None}, ValueError, "ref_logp is missing: objective 'd2o' reads it. Fix"),
    "reference's shape": ({"ref_logp": torch.zeros(5)}, ValueError, r"ref_logp has shape \[5\], expected \[4\]"),
    "an unread tensor": (
        {"token_cringe": torch.zeros(10)},
        ValueError,
        "token_cringe is given, but objective 'd2o' does not read it. Fix: leave it out",
    ),
    "no group": (
        {"group_start": torch.zeros(1).long()},
        ValueError,
        r"group_start has no group, .* Fix: group_start=\[0, 4\]",
    ),
    "devices": ({"positive": torch.ones(4, device="meta").bool()}, ValueError, "positive is on meta"),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "backend='tpu' is unknown"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name: str):
    changes, kind, message = BAD_TENSORS[name]
    with pytest.raises(kind, match=message):
        losses.grouped_loss(**{**small(), **changes})


@pytest.mark.parametrize(
    ("objective", "options", "kind", "message"),
    [
        ("d2o", {"gamma": 1.0}, TypeError, "objective 'd2o' has no option 'gamma', expected one of: alpha, beta"),
        ("hinge", {"label_smoothing": 0.1}, TypeError, "objective 'hinge' has no option 'label_smoothing'"),
        ("d2o", {"beta": 0.0}, ValueError, "beta is 0.0, expected a number above 0"),
        ("d2o", {"alpha": -1}, ValueError, "alpha is -1, expected a number of at least 0"),
        ("d2o", {"length_normalize": 1}, TypeError, "length_normalize is of type int, expected True or False"),
        ("sigmoid", {"label_smoothing": 0.5}, ValueError, r"label_smoothing is 0.5, expected a rate in \[0, 0.5\)"),
        ("exo_pair", {"label_smoothing": 0.0}, ValueError, "label_smoothing is 0, expected a rate above 0"),
        ("dpop", {"dpop_lambda": -1.0}, ValueError, "dpop_lambda is -1.0, expected a number of at least 0"),
        ("bdpo", {"bdpo_lambda": 1.5}, ValueError, r"bdpo_lambda is 1.5, expected a share in \(0, 1\]"),
        ("bco_pair", {"bco_baseline": torch.ones(1)}, TypeError, "bco_baseline is of type Tensor, expected a number"),
        ("discopop", {"discopop_tau": 0}, ValueError, "discopop_tau is 0, expected a number above 0"),
        ("pairwise_cringe", {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ("pairwise_cringe", {"margin": torch.inf}, ValueError, "margin is inf, expected a finite number"),
    ],
)
def test_bad_options_are_refused(objective: str, options: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        losses.grouped_loss(**RAGGED.inputs(objective), **options)


def test_the_cringe_objectives_need_their_tokens_and_no_reference():
    inputs = {**RAGGED.inputs("cringe"), "token_cringe": None}
    with pytest.raises(ValueError, match="token_cringe is missing: objective 'cringe' reads it"):
        losses.grouped_loss(**inputs)
    with pytest.raises(ValueError, match="ref_logp is given, but objective 'pairwise_cringe' does not read it"):
        losses.grouped_loss(**RAGGED.inputs("pairwise_cringe"), ref_logp=RAGGED.ref_logp)


@needs_native
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(10).double(), "token_logp has dtype Double, expected Float"),
        (0, torch.zeros(2, 5), r"token_logp has 10 values in 2 dimensions, expected shape \[10\]"),
        (1, torch.zeros(10), "token_cringe is not read by 'd2o'; leave it out"),
        (2, torch.tensor([0, 3, 5, 9, 11]), "sequence_start ends with 11, expected 10, the number of tokens"),
        (2, torch.tensor([0, 3, 5, 10]), r"sequence_start has 4 values .* expected shape \[5\]"),
        (3, torch.tensor([1, 2, 4]), "group_start begins with 1, expected 0"),
        (3, torch.tensor([0, 5, 4]), "group_start falls from 5 to 4 at position 2"),
        (3, torch.zeros(0).long(), "group_start is empty"),
        (3, torch.zeros(1).long(), "positive has 4 sequences, but group_start no group"),
        (4, torch.tensor([True, False] * 4)[::2], "positive is not contiguous"),
        (5, None, "ref_logp is missing: 'd2o' reads it"),
        (6, "dpo", "objective is 'dpo', expected one of: d2o, sigmoid"),
        (7, [0.1], r"'d2o' has 4 parameters \(alpha, beta, length_normalize, allow_no_anchor\), but 1 are given"),
    ],
)
def test_the_native_operator_has_a_door_of_its_own(place: int, value: Any, message: str):
    native.load("cpu")
    arguments = operator_arguments(SMALL, "d2o", {})
    torch.ops.fastd2o_native.loss(*arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastd2o_native.loss(*arguments)
