"""What an optimiser step takes of memory, before any is taken.

The step is run: the model made from its configuration, references, forward, backward, optimiser, in the order of
:class:`fastd2o.PreferenceTrainer`; but on fake tensors, which have a shape and no memory, while every storage is
recorded (:mod:`~fastd2o.training.allocations`). Activations, checkpointing, adapters, tied embeddings, the casts of
autocast and the temporaries of the optimiser need no formulas: they are there.

The fused head alone is a stand-in, since what it does depends on values. It takes what its :class:`fastd2o.Plan` says
when the engine would.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.nn.utils import clip_grad_norm_

from fastd2o.data import Needs
from fastd2o.errors import FastD2OError
from fastd2o.models.head import open_heads, projecting
from fastd2o.models.mode import evaluating
from fastd2o.ops.plan import Algorithm, Plan
from fastd2o.training.allocations import WORKING, Allocations
from fastd2o.training.datasets import context_length
from fastd2o.training.fake_cuda import FakeCuda
from fastd2o.training.objectives import Objective, Options, find_objective
from fastd2o.training.policy import disable_dropout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "sgd")
DEVICES = ("cuda", "cpu")

# torch's CUDA allocator rounds every tensor up to a multiple of so many bytes.
_GRANULARITY = {"cuda": 512, "cpu": 1}
# bitsandbytes: one float32 scale for a block of so many 8-bit states, and smaller tensors not quantised.
_STATE_BLOCK, _LEAST_QUANTISED = 256, 4096


@dataclass(frozen=True)
class TrainingStep:
    """An optimiser step of :class:`fastd2o.PreferenceTrainer`, as far as it takes memory.

    Attributes:
        model: the configuration of a causal LM.
        objective: one of :data:`fastd2o.training.OBJECTIVES`.
        groups: of a micro-batch, one negative each.
        positives: K, of each group.
        prompt_length: tokens of every prompt.
        completion_length: tokens of every completion.
        lora_rank: of an adapter on every linear layer but the head; None: all weights train.
        dtype: of the weights.
        bf16: forward under bfloat16 autocast.
        optimizer: one of :data:`OPTIMIZERS`: Trainer's ``adamw_torch_fused``, ``adamw_bnb_8bit``, ``adafactor`` and
            ``sgd``.
        gradient_checkpointing: recompute a layer's activations in the backward.
        precompute_ref_log_probs: the references are columns of the dataset by now.
        gradient_accumulation_steps: micro-batches of a step.
        memory_budget: bytes that the fused head may take, see :class:`fastd2o.PreferenceConfig`.
        device: ``"cuda"`` or ``"cpu"``, where it is to run.

    Raises:
        ValueError: a value that cannot be.
    """

    model: PretrainedConfig
    objective: str = "d2o"
    groups: int = 1
    positives: int = 1
    prompt_length: int = 256
    completion_length: int = 256
    lora_rank: int | None = None
    dtype: torch.dtype = torch.float32
    bf16: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    precompute_ref_log_probs: bool = False
    gradient_accumulation_steps: int = 1
    memory_budget: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        objective = self._objective
        least = {"positives": 1 if objective.needs is Needs.PAIR else 0}
        for name in ("groups", "prompt_length", "completion_length", "gradient_accumulation_steps", "positives"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least.get(name, 1)}")
        if self.memory_budget is not None and self.memory_budget < 0:
            raise ValueError(f"memory_budget is {self.memory_budget}, expected bytes, or None")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}, expected at least 1, or None")
        for name, known in (("optimizer", OPTIMIZERS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of: {', '.join(known)}")
        if self.precompute_ref_log_probs and not objective.reference:
            raise ValueError(
                f"precompute_ref_log_probs is set, but {objective.name} has no reference. Fix: leave it out"
            )

    @property
    def _objective(self) -> Objective:
        return find_objective(self.objective)

    @property
    def reference(self) -> bool:
        """Whether a reference scores the batch in every step."""
        return self._objective.reference and not self.precompute_ref_log_probs

    @property
    def positive_rows(self) -> int:
        """Sequences of a micro-batch that are positives."""
        return self.groups * self.positives if self._objective.positives else 0

    @property
    def rows(self) -> int:
        """S, the sequences of a micro-batch: negatives, positives, KTO's completions of another prompt."""
        return self.groups * (2 if self._objective.mismatches else 1) + self.positive_rows

    @property
    def length(self) -> int:
        """L, tokens of a sequence."""
        return self.prompt_length + self.completion_length

    @property
    def counted(self) -> int:
        """T, tokens of a micro-batch whose log-probability is asked for."""
        return self.rows * self.completion_length

    def algorithm(self, *, trained: bool) -> Algorithm:
        """Of the fused head, whose weight trains or does not."""
        if not trained:
            return "unit"
        return "grouped" if self._objective.separable else "recompute"

    def plan(self, algorithm: Algorithm, tokens: int, weight_shape: Sequence[int]) -> Plan:
        """The engine's plan of a call on so many tokens with a weight ``[V, D]``."""
        dtype = torch.bfloat16 if self.bf16 else self.dtype
        # A loss that is no sum over groups keeps what a part could have kept, see linear_grouped.
        plan = Plan.choose(
            tokens=tokens,
            vocab_size=weight_shape[0],
            hidden_size=weight_shape[1],
            algorithm="grouped" if algorithm == "recompute" else algorithm,
            dtype=dtype,
            device=self.device,
            weight_dtype=self.dtype,
            memory_budget=self.memory_budget,
        )
        return replace(plan, algorithm=algorithm, part_tokens=None) if algorithm == "recompute" else plan


@dataclass(frozen=True)
class Footprint:
    """Memory of a :class:`TrainingStep`, on one device, once the optimiser has its states.

    Attributes:
        step: what was asked.
        parameters: of the policy, the adapter included.
        trained: parameters that train.
        head: what the fused head does under the policy: one plan, or Cringe's and that of the other tokens.
        head_frozen: whether the head's weight is.
        moments: for each of ``reference``, ``forward``, ``backward`` and ``optimizer`` that the step has, bytes by part
            when most were taken. Parts: ``weights``; ``reference``, the weights of a second model; ``gradients``;
            ``optimizer``, its states; ``activations``, what the policy's forward leaves for its backward; ``head``;
            ``working memory``, everything else.
    """

    step: TrainingStep
    parameters: int
    trained: int
    head: tuple[Plan, ...]
    head_frozen: bool
    moments: dict[str, dict[str, int]]

    @property
    def fullest(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return sum(self.moments[self.fullest].values())


def footprint(step: TrainingStep) -> Footprint:
    """Run a step on fake tensors, in seconds, and report its memory.

    Raises:
        FastD2OError: a model that cannot be run without values (a mixture of experts whose routing is a loop over what
            was chosen, say), that the fused head cannot serve, or whose configuration is of no causal LM.
        ValueError: sequences longer than the model reads.
    """
    with _quiet():
        run = _Run.prepare(step)
        try:
            with run.mode, run.record:
                run()
        except FastD2OError:
            raise
        except RuntimeError as error:  # fake tensors have many ways to say that they cannot
            raise FastD2OError(
                f"{_name(step.model)} cannot be run without its numbers: {_first_line(error)}. Fix: dtype=bfloat16 if "
                "that is about a dtype; else plan another model of like size, or take one step on the device and read "
                "torch.cuda.max_memory_allocated()"
            ) from error
    return Footprint(
        step=step,
        parameters=_count(run.policy.module.parameters()),
        trained=_count(run.trained),
        head=run.plans,
        head_frozen=not run.policy.head_weight.requires_grad,
        moments=run.record.peaks(),
    )


def _name(config: PretrainedConfig) -> str:
    return (getattr(config, "architectures", None) or [config.model_type])[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries have to say about a model that is never used."""
    loggers = [logging.getLogger(name) for name in ("transformers", fake_tensor.__name__)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- the models -------------------------------------------------------------------------------------------------------


@dataclass
class _FakeModel:
    """A causal LM of fake tensors. ``module`` is what is called: the model, or PEFT around it."""

    module: Any
    heads: list[nn.Linear]

    @classmethod
    def make(cls, step: TrainingStep, mode: fake_tensor.FakeTensorMode, *, trained: bool) -> _FakeModel:
        """On ``meta`` first, which is what libraries are used to."""
        with torch.device("meta"):
            module: Any = _causal_lm(step)
            heads = open_heads(module)
            if not trained:
                module.requires_grad_(False)
            elif step.lora_rank is not None:
                module = _with_adapter(module, step.lora_rank, checkpointing=step.gradient_checkpointing)
        disable_dropout(module)
        with mode:
            _make_fake(module)
        return cls(module.train(trained), heads)

    @property
    def head_weight(self) -> Tensor:
        return self.heads[0].weight

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Weights and buffers."""
        return itertools.chain(self.module.parameters(), self.module.buffers())

    def without_adapter(self) -> AbstractContextManager[Any]:
        adapted = hasattr(self.module, "disable_adapter")
        return self.module.disable_adapter() if adapted else nullcontext()


def _causal_lm(step: TrainingStep) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if getattr(step.model, "quantization_config", None) is not None:
        raise FastD2OError(
            f"the configuration of {_name(step.model)} is of quantised weights, whose layers cannot be made from it. "
            "Fix: plan the model that it was made from"
        )
    try:
        made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(step.model), dtype=step.dtype)
    except ValueError as error:
        raise FastD2OError(
            f"no causal LM can be made from the configuration of {_name(step.model)}: {_first_line(error)} Fix: give "
            "a decoder-only model that AutoModelForCausalLM knows"
        ) from error
    model: PreTrainedModel = made
    limit = context_length(model)
    if step.length > limit:
        raise ValueError(
            f"prompt_length + completion_length is {step.length}, but the model reads at most {limit:.0f} tokens "
            "(max_position_embeddings). Fix: shorter ones"
        )
    return model


def _with_adapter(model: PreTrainedModel, rank: int, *, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"))
    if checkpointing:
        adapted.enable_input_require_grads()  # as wrap_peft does
    return adapted


def _make_fake(module: nn.Module) -> None:
    """Replace tensors on ``meta`` by fake ones on the CPU, which have autocast, kernels of attention and fused
    optimisers; what was tied stays tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = (
                nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
            )
        return made[id(tensor)]

    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, part.__dict__)
        for tensors in held:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    tensors[name] = fake(tensor)


# --- the step ---------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Everything of a run that is alive between steps."""

    step: TrainingStep
    mode: fake_tensor.FakeTensorMode
    record: Allocations
    policy: _FakeModel
    reference: _FakeModel | None
    optimizer: torch.optim.Optimizer
    trained: list[nn.Parameter]
    plans: tuple[Plan, ...]

    @classmethod
    def prepare(cls, step: TrainingStep) -> _Run:
        mode = fake_tensor.FakeTensorMode()
        policy = _FakeModel.make(step, mode, trained=True)
        reference = None
        if step.reference:
            # Under PEFT, the policy without its adapter.
            reference = policy if step.lora_rank is not None else _FakeModel.make(step, mode, trained=False)
        if step.gradient_checkpointing:
            # What is recomputed in the backward is so on the same device.
            recompute = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _kernels_of(step.device))}
            policy.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
        trained = [parameter for parameter in policy.module.parameters() if parameter.requires_grad]
        return cls(
            step=step,
            mode=mode,
            record=Allocations(_GRANULARITY[step.device]),
            policy=policy,
            reference=reference,
            optimizer=_make_optimizer(step, policy.module, trained),
            trained=trained,
            plans=_plans(step, policy.head_weight),
        )

    def __call__(self) -> None:
        """One step, not the first of its run."""
        record = self.record
        if self.reference is not None:
            record.claim(self.reference.tensors, "reference")
        record.claim(self.policy.tensors, "weights")
        self._make_states()
        # The first micro-batch makes the gradients, all others add to them.
        for _ in range(min(2, self.step.gradient_accumulation_steps)):
            self._micro_batch()
        with record.during("optimizer"):
            clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()

    def _make_states(self) -> None:
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        states = (value for state in self.optimizer.state.values() for value in state.values())
        self.record.claim((value for value in states if isinstance(value, Tensor)), "optimizer")

    def _micro_batch(self) -> None:
        step, record = self.step, self.record
        batch = {
            "input_ids": torch.zeros((step.rows, step.length), dtype=torch.int64),
            "attention_mask": torch.ones((step.rows, step.length), dtype=torch.int64),
        }
        record.claim(batch.values(), WORKING)
        reference = self.reference
        if reference is not None:
            plans = (step.plan("forward", step.counted, reference.head_weight.shape),)
            with record.during("reference"), torch.no_grad(), evaluating(reference.module), reference.without_adapter():
                self._forward(reference, batch, plans)
        with record.during("forward"):
            loss = self._forward(self.policy, batch, self.plans)
            record.claim_rest("activations")
        with record.during("backward"):
            loss.backward()
        gradients = (parameter.grad for parameter in self.trained)
        record.claim((gradient for gradient in gradients if gradient is not None), "gradients")

    def _forward(self, model: _FakeModel, batch: dict[str, Tensor], plans: Sequence[Plan]) -> Tensor:
        """0-d, through the model's own forward, with a stand-in for what its head does."""

        def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            hidden_TD = hidden.reshape(-1, hidden.shape[-1])
            values = [_StandIn.apply(hidden_TD, weight, bias, plan, self.record) for plan in plans]
            return torch.stack(values).sum().view(1, 1, 1)

        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.step.bf16)
        with autocast, _kernels_of(self.step.device), projecting(model.heads, project):
            return model.module(**batch, use_cache=False, return_dict=True).logits.sum()


def _kernels_of(device: str) -> AbstractContextManager[Any]:
    return FakeCuda() if device == "cuda" else nullcontext()


def _make_optimizer(step: TrainingStep, policy: nn.Module, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if step.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=1e-6, fused=True)
    if step.optimizer == "adamw_8bit":
        embeddings = [module.weight for module in policy.modules() if isinstance(module, nn.Embedding)]
        return _EightBitAdam(trained, {"whole": embeddings})
    if step.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(trained, lr=1e-6, scale_parameter=False, relative_step=False)
    return torch.optim.SGD(trained, lr=1e-6)


class _EightBitAdam(torch.optim.Optimizer):
    """The memory of bitsandbytes' 8-bit AdamW under Trainer, which leaves the states of embeddings in float32. Its
    kernels update in place."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states of parameters that have none."""
        whole = {id(parameter) for parameter in self.defaults["whole"]}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    continue
                numel = parameter.numel()
                if id(parameter) in whole or numel < _LEAST_QUANTISED:
                    states = [torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2)]
                else:
                    states = [torch.zeros_like(parameter, dtype=torch.uint8) for _ in range(2)]
                    states += [parameter.new_zeros(-(-numel // _STATE_BLOCK), dtype=torch.float32) for _ in range(2)]
                self.state[parameter] = dict(enumerate(states))


# --- the head ---------------------------------------------------------------------------------------------------------


def _plans(step: TrainingStep, weight_VD: Tensor) -> tuple[Plan, ...]:
    """What scoring makes of a micro-batch (:func:`fastd2o.training.scoring.score`), call by call."""
    objective = find_objective(step.objective)
    counted, calls = step.counted, []
    if objective.cringe:
        negatives = step.groups * step.completion_length
        calls.append(step.plan("cringe", negatives, weight_VD.shape))
        if not objective.negative_gradient(Options(**objective.options)):
            counted -= negatives
    if counted:
        calls.append(step.plan(step.algorithm(trained=weight_VD.requires_grad), counted, weight_VD.shape))
    return tuple(calls)


class _StandIn(torch.autograd.Function):
    """Takes the memory that the fused head takes, when it takes it, and gives gradients of the right shapes: a function
    of hidden ``[S·L, D]``, weight ``[V, D]`` and bias ``[V]`` to a number.

    T tokens that count, of the S·L.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan, record: Allocations
    ) -> Tensor:
        ctx.call, ctx.record, ctx.dtype = _HeadCall(plan, len(hidden_TD)), record, hidden_TD.dtype
        with record.making("head"):
            ctx.kept = ctx.call.forward(hidden_TD, weight_VD, bias_V)
            if plan.algorithm in ("recompute", "cringe"):
                ctx.save_for_backward(hidden_TD, weight_VD, bias_V)
            return hidden_TD.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        with ctx.record.making("head"):
            return (*ctx.call.backward(kept, ctx.saved_tensors, ctx.needs_input_grad, ctx.dtype), None, None)


@dataclass(frozen=True)
class _HeadCall:
    """One call of the engine, as tensors of its size: see :mod:`fastd2o.ops.grouped` and :mod:`fastd2o.ops.logprob`.

    ``rows``: S·L, of hidden; ``plan.tokens`` of them count.
    """

    plan: Plan
    rows: int

    def forward(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> list[Tensor | None]:
        """What is kept for the backward, beside the inputs."""
        plan, counted_CD = self.plan, self._counted(hidden_TD)
        if plan.algorithm == "grouped":
            dhidden_CD = self._sums(hidden_TD)
            in_parts = plan.part_tokens is not None
            dweight_VD = torch.empty_like(weight_VD, dtype=dhidden_CD.dtype if in_parts else weight_VD.dtype)
            own = [dweight_VD] if dweight_VD.dtype != weight_VD.dtype else []
            _work(plan, counted_CD, dhidden_CD, *own)
            del counted_CD, own
            return [dhidden_CD, dweight_VD.to(weight_VD.dtype), None if bias_V is None else torch.empty_like(bias_V)]
        if plan.algorithm == "unit":
            unit_CD = self._sums(hidden_TD)
            _work(plan, counted_CD, unit_CD)
            del counted_CD
            return [unit_CD]
        kept = counted_CD.new_empty(plan.kept_columns * plan.tokens)
        _work(replace(plan, algorithm="forward", kept_bytes=0), counted_CD)
        return [kept]

    def backward(
        self, kept: list[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool], dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, in its ``dtype``, weight and bias."""
        if self.plan.algorithm == "grouped":
            dhidden_CD, dweight_VD, dbias_V = kept
            kept.clear()
            assert dhidden_CD is not None
            return self._scattered(dhidden_CD.to(dtype)), dweight_VD, dbias_V
        if self.plan.algorithm == "unit":
            unit_CD = kept[0]
            assert unit_CD is not None
            return self._scattered(torch.empty_like(unit_CD, dtype=dtype)), None, None
        hidden_TD, weight_VD, bias_V = inputs
        assert hidden_TD is not None
        counted_CD, dhidden_CD = self._counted(hidden_TD), self._sums(hidden_TD)
        dweight_VD = torch.empty_like(weight_VD) if needed[1] and weight_VD is not None else None
        dbias_V = torch.empty_like(bias_V) if needed[2] and bias_V is not None else None
        _work(self.plan, counted_CD, dhidden_CD, *(tensor for tensor in kept if tensor is not None))
        del counted_CD
        return self._scattered(dhidden_CD.to(dtype)), dweight_VD, dbias_V

    def _counted(self, hidden_TD: Tensor) -> Tensor:
        """The tokens that count, gathered, in the dtype of the products."""
        return hidden_TD.new_empty((self.plan.tokens, self.plan.hidden_size), dtype=self.plan.dtype)

    def _sums(self, hidden_TD: Tensor) -> Tensor:
        dtype = torch.float64 if self.plan.dtype == torch.float64 else torch.float32
        return hidden_TD.new_empty((self.plan.tokens, self.plan.hidden_size), dtype=dtype)

    def _scattered(self, values_CD: Tensor) -> Tensor:
        """Over all rows."""
        if self.plan.tokens == self.rows:
            return values_CD
        return values_CD.new_zeros((self.rows, values_CD.shape[1]))


def _work(plan: Plan, *held: Tensor) -> None:
    """Take, for a moment, what a call takes at its worst beyond what it holds already."""
    held[0].new_empty(max(0, plan.extra_bytes - sum(tensor.nbytes for tensor in held)), dtype=torch.uint8)
