"""What a step is said to take, against the allocator's records of one that was taken."""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, T5Config

from fastd2o import FastD2OError
from fastd2o.memory import measure_memory
from fastd2o.training import fitting
from fastd2o.training.allocations import WORKING, Allocations
from fastd2o.training.fake_cuda import FakeCuda
from fastd2o.training.fitting import GIB, needed
from fastd2o.training.footprint import Footprint, TrainingStep, footprint
from fastd2o.training.head_costs import head_costs
from tests.training.tiny import WORDS, make_trainer

PROMPT, COMPLETION = 56, 40


def config(**options: Any) -> LlamaConfig:
    """Small, but with a head and activations that matter beside the weights."""
    sizes = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options})


def step(model: Any = None, **options: Any) -> TrainingStep:
    settings: dict[str, Any] = {"objective": "dpo", "groups": 12, "device": "cpu", "prompt_length": PROMPT}
    settings |= {"completion_length": COMPLETION, **options}
    return TrainingStep(model or config(), **settings)


def rows(count: int, positives: int, prompt: int) -> list[dict[str, Any]]:
    """Of the lengths above; a completion is one token shorter, as in a batch with padding."""
    generator = random.Random(0)

    def text(length: int) -> str:
        return " ".join(generator.choices(WORDS, k=length))

    def completion(row: int) -> str:
        return " " + text(COMPLETION - 1 - (row == 0))  # and </s>

    return [
        {"prompt": text(prompt), "rejected": completion(row), "anchors": [completion(1) for _ in range(positives)]}
        for row in range(count)
    ]


def taken(tmp_path: Path, planned: TrainingStep, **options: Any) -> int:
    """The peak of one optimiser step of a real trainer beyond weights and states, in bytes."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(planned.model)
    model.to(planned.dtype)
    groups, steps = planned.groups, planned.gradient_accumulation_steps
    data = rows(groups * steps, planned.positives, planned.prompt_length)
    trainer: Any = make_trainer(
        tmp_path,
        model=model,
        train_dataset=data,
        objective=planned.objective,
        per_device_train_batch_size=groups,
        gradient_accumulation_steps=steps,
        gradient_checkpointing=planned.gradient_checkpointing,
        bf16=planned.bf16,
        optim={"adamw": "adamw_torch_fused"}.get(planned.optimizer, planned.optimizer),
        max_steps=1,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader) for _ in range(steps)]
    units = trainer._get_num_items_in_batch(batches, torch.device("cpu"))

    def step() -> None:
        for batch in batches:
            trainer.training_step(trainer.model_wrapped, dict(batch), units)
        trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    gc.collect()
    return measure_memory(step, warm_up=False).peak


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_rank": 8},
        {"gradient_checkpointing": True, "model": config(vocab_size=1024)},
        {"bf16": True},
        {"objective": "kto", "groups": 8, "prompt_length": 72},
        {"objective": "d2o", "positives": 3, "groups": 4, "dtype": torch.bfloat16, "gradient_accumulation_steps": 2},
        {
            "optimizer": "adafactor",
            "groups": 1,
            "dtype": torch.bfloat16,
            "model": config(vocab_size=1024, hidden_size=256, intermediate_size=8192, num_hidden_layers=1),
        },
    ],
    ids=["all weights", "lora", "checkpointing", "autocast", "kto", "d2o in bfloat16, accumulated", "adafactor"],
)
def test_the_peak_is_that_of_a_real_step(tmp_path: Path, options: dict[str, Any]) -> None:
    """Beyond what lasts from step to step, which anybody can count. The head's share is an upper estimate, the rest is
    exact."""
    planned = step(**options)
    expected = footprint(planned)
    lasting = sum(expected.moments["forward"].get(part, 0) for part in ("weights", "reference", "optimizer"))
    adapter = {}
    if planned.lora_rank is not None:
        adapter["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=planned.lora_rank, target_modules="all-linear")
    actual, head = taken(tmp_path, planned, **adapter), expected.moments[expected.fullest].get("head", 0)
    assert 0.99 * actual <= expected.peak - lasting <= min(1.1 * actual, 1.01 * actual + 0.3 * head)


# --- what the parts are -----------------------------------------------------------------------------------------------


def small(**options: Any) -> TrainingStep:
    return step(**{"groups": 1, "model": config(num_hidden_layers=1), **options})


def parts(**options: Any) -> dict[str, int]:
    """Bytes in the optimiser's part of a step."""
    return footprint(small(**options)).moments["optimizer"]


def weights_of(model: Any) -> int:
    return sum(parameter.nbytes for parameter in LlamaForCausalLM(model).parameters())


def test_weights_gradients_and_states() -> None:
    found, size = parts(), weights_of(config(num_hidden_layers=1))
    assert found["gradients"] == size
    # And buffers, and a count of steps for each parameter.
    assert [found[part] / size for part in ("weights", "reference", "optimizer")] == pytest.approx([1, 1, 2], rel=1e-3)


def test_tied_embeddings_are_there_once() -> None:
    tied = config(num_hidden_layers=1, tie_word_embeddings=True)
    assert parts(model=tied)["gradients"] == weights_of(tied) < weights_of(config(num_hidden_layers=1)) * 0.6


@pytest.mark.parametrize(
    ("options", "second_model"),
    [
        ({}, True),
        ({"objective": "simpo"}, False),
        ({"precompute_ref_log_probs": True}, False),
        ({"lora_rank": 4}, False),
    ],
)
def test_when_there_is_a_second_model(options: dict[str, Any], second_model: bool) -> None:
    assert ("reference" in parts(**options)) == second_model


@pytest.mark.parametrize(
    ("optimizer", "states"),
    # Of the weights 45 % are the embeddings, whose states are not quantised.
    [("sgd", 0.0), ("adafactor", 0.01), ("adamw_8bit", 2 * (1 + 4 / 256) / 4 * 0.55 + 2 * 0.45)],
)
def test_states_of_an_optimizer(optimizer: str, states: float) -> None:
    """In sizes of the weights."""
    found = parts(optimizer=optimizer)
    assert found.get("optimizer", 0) / found["weights"] == pytest.approx(states, abs=0.02)


def test_an_adapter_trains_alone() -> None:
    found = footprint(small(lora_rank=4, dtype=torch.bfloat16))
    assert found.head_frozen
    assert found.parameters - found.trained == weights_of(config(num_hidden_layers=1)) // 4
    assert found.moments["optimizer"]["gradients"] == found.trained * 4  # PEFT keeps adapters in float32


def test_checkpointing_leaves_few_activations() -> None:
    kept, recomputed = (footprint(small(model=None, gradient_checkpointing=on)) for on in (False, True))
    assert recomputed.moments["forward"]["activations"] < kept.moments["forward"]["activations"] / 5
    assert recomputed.peak < kept.peak


@pytest.mark.parametrize(
    ("objective", "options", "rows_of_a_group", "algorithms"),
    [
        ("dpo", {}, 2, ["grouped"]),
        ("d2o", {"positives": 3}, 4, ["grouped"]),
        ("npo", {"positives": 3}, 1, ["grouped"]),
        ("kto", {}, 3, ["recompute"]),
        ("kto", {"lora_rank": 4}, 3, ["unit"]),
        ("pairwise_cringe", {}, 2, ["cringe", "grouped"]),
        ("cringe", {"positives": 0}, 1, ["cringe"]),
    ],
)
def test_what_the_head_does(
    objective: str, options: dict[str, Any], rows_of_a_group: int, algorithms: list[str]
) -> None:
    planned = small(objective=objective, groups=2, **options)
    found = footprint(planned)
    assert planned.rows == 2 * rows_of_a_group
    assert [plan.algorithm for plan in found.head] == algorithms
    assert sum(plan.tokens for plan in found.head) == planned.counted
    chosen = [way.name for way in head_costs(found) if way.chosen]
    named = ["stash" if name == "recompute" else name for name in algorithms[::-1]]
    assert chosen == named + ["forward only"] * planned.reference


def test_a_gpu_is_planned_without_one() -> None:
    found = footprint(small(device="cuda", dtype=torch.bfloat16, gradient_checkpointing=True))
    assert all(size % 512 == 0 for taken in found.moments.values() for size in taken.values())
    assert found.head[0].device == "cuda"


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_the_record_is_the_allocator_s() -> None:
    weight = torch.randn(300, 200, requires_grad=True)

    def work() -> None:
        hidden = torch.randn(500, 200)
        (hidden @ weight.T).float().log_softmax(-1)[:, 0].sum().backward()
        weight.grad = None

    with Allocations() as record, record.during("work"):
        record.claim([weight], "weights")
        work()
    peak = record.peaks()["work"]
    assert peak.pop("weights") == weight.nbytes
    assert sum(peak.values()) == measure_memory(work).peak


def test_parts_and_moments() -> None:
    with Allocations(granularity=64) as record:
        kept = torch.zeros(16)
        with record.during("first"):
            gone = kept + 1
            del gone
            view = kept.view(4, 4)
        with record.making("made"), record.during("second"):
            more = torch.zeros(100)
        record.claim_rest("kept")
    assert record.peaks() == {"first": {"kept": 64, WORKING: 64}, "second": {"kept": 64, WORKING: 0, "made": 448}}
    assert view.shape == (4, 4)
    assert more.shape == (100,)


def test_attention_of_a_gpu_keeps_no_scores() -> None:
    attention: Any = F.scaled_dot_product_attention
    query = torch.randn(2, 4, 48, 16)
    key = torch.randn(2, 2, 48, 16)
    mask = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor).bfloat16().requires_grad_() for tensor in (query, key, key)]
        for options in ({"is_causal": True}, {"attn_mask": mode.from_tensor(mask)}):
            with Allocations() as record, FakeCuda():
                with record.during("forward"):
                    out = attention(*tensors, enable_gqa=True, **options)
                (taken,) = record.peaks().values()
            assert out.shape == query.shape
            out.float().sum().backward()
            assert tensors[1].grad is not None
            assert tensors[1].grad.shape == key.shape
            assert sum(taken.values()) < 4 * query.nbytes + 2 * mask.numel() * 2


def test_autocast_of_a_gpu() -> None:
    tensor = torch.randn(4, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (tensor**3).dtype == tensor.softmax(-1).dtype == torch.bfloat16
        with FakeCuda():
            results = [tensor**3, tensor.pow(2), tensor.rsqrt(), F.layer_norm(tensor, (4,)), tensor.softmax(-1)]
            results += [F.softmax(tensor, dim=-1), tensor.sum()]
            assert {result.dtype for result in results} == {torch.float32}
            assert (tensor * 2).dtype == F.linear(tensor.float(), tensor.float()).dtype == torch.bfloat16
    with FakeCuda():
        assert (tensor**3).dtype == torch.bfloat16


# --- what others take -------------------------------------------------------------------------------------------------


def test_ways_of_the_head() -> None:
    planned = small(groups=12, dtype=torch.bfloat16)
    ways = {way.name: way for way in head_costs(footprint(planned))}
    factors = {name: way.factor for name, way in ways.items()}
    assert factors == {
        "unit": 4,
        "grouped": 6,
        "grouped, half skipped": 4,
        "recompute": 8,
        "stash": 6,
        "forward only": 2,
        "eager": 6,
        "TRL": 8,
        "Liger": 6,
    }
    counted, positions = planned.counted, planned.rows * planned.length
    assert [ways[name].tokens for name in ("grouped", "TRL", "eager", "Liger")] == [counted, counted, *[positions] * 2]
    assert ways["grouped"].flops == 6 * counted * 128 * 8192
    frozen = {way.name: way.factor for way in head_costs(footprint(small(lora_rank=4)))}
    assert [frozen[name] for name in ("eager", "TRL", "Liger")] == [4, 6, 4]


def test_eager_code_takes_what_is_said() -> None:
    planned = small(dtype=torch.bfloat16)
    (eager,) = (way for way in head_costs(footprint(planned)) if way.name == "eager")
    with FakeTensorMode():
        hidden = torch.empty(eager.tokens, 128, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(8192, 128, dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(eager.tokens, 1, dtype=torch.int64)
        with Allocations() as record, record.during("step"):
            record.claim([hidden, weight, target], "inputs")
            (hidden @ weight.T).float().log_softmax(-1).gather(1, target).sum().backward()
    assert record.peaks()["step"][WORKING] == pytest.approx(eager.extra_bytes, rel=1e-3)


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainingStep], Footprint]:
    """Footprints in no time: 10 GiB of weights in float32, 2 for every group."""

    def measure(planned: TrainingStep) -> Footprint:
        parameters = int(2.5 * GIB)
        weights = parameters * planned.dtype.itemsize
        copies = 1 if planned.lora_rank else {"adamw": 4, "adamw_8bit": 2.5}[planned.optimizer] + planned.reference
        activations = (2 * GIB * planned.groups) >> (3 * planned.gradient_checkpointing)
        return Footprint(planned, parameters, 0, (), False, {"step": {"all": int(weights * copies) + activations}})

    monkeypatch.setattr(fitting, "measure", measure)
    return measure


def options_of(found: list[fitting.Alternative]) -> list[str]:
    return [other.options for other in found]


def test_alternatives_that_fit(measured: Callable[[TrainingStep], Footprint]) -> None:
    tight = measured(step(groups=16))
    asked: list[str] = []
    found = fitting.alternatives(tight, needed(60 * GIB), asked.append)
    one_group = "--per_device_train_batch_size 1 --gradient_accumulation_steps 16"
    assert options_of(found) == ["--gradient_checkpointing", one_group, "--dtype bfloat16", "--use_peft"]
    assert len(asked) == len(set(asked)) > len(found)
    assert found[0].footprint.step.gradient_checkpointing
    assert found[1].footprint.step.gradient_accumulation_steps == 16


def test_one_change_after_the_other(measured: Callable[[TrainingStep], Footprint]) -> None:
    """What cannot fit for its weights alone is not even tried."""
    asked: list[str] = []
    found = fitting.alternatives(measured(step(groups=4)), needed(17 * GIB), asked.append)
    all_weights = (
        "--gradient_checkpointing --per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
        "--precompute_ref_log_probs --optim adamw_bnb_8bit --dtype bfloat16"
    )
    assert options_of(found) == [all_weights, "--use_peft --dtype bfloat16"]
    assert asked == ["--use_peft", all_weights, "--use_peft --dtype bfloat16"]


def test_where_nothing_fits_the_nearest_are_told(measured: Callable[[TrainingStep], Footprint]) -> None:
    found = fitting.alternatives(measured(step(groups=4)), needed(4 * GIB))
    assert [options.split()[0] for options in options_of(found)] == ["--use_peft", "--gradient_checkpointing"]
    assert all(needed(other.footprint.peak) > needed(4 * GIB) for other in found)


# --- what cannot be planned -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups is 0, expected at least 1"),
        ({"positives": 0}, "positives is 0, expected at least 1"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"optimizer": "lion"}, "optimizer is 'lion', expected one of: adamw"),
        ({"device": "tpu"}, "device is 'tpu', expected one of: cuda, cpu"),
        ({"objective": "dpp"}, "objective 'dpp' is unknown"),
        ({"objective": "simpo", "precompute_ref_log_probs": True}, "simpo has no reference. Fix: "),
        ({"memory_budget": -1}, "memory_budget is -1"),
    ],
)
def test_steps_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        step(**options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (T5Config(), "no causal LM can be made"),
        (config(quantization_config={"quant_method": "fp8"}), "quantised weights"),
        (
            AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64),
            "cannot be run without its numbers: Expected inputs of BF16 type",
        ),
    ],
)
def test_models_that_cannot_be_planned(model: Any, message: str) -> None:
    with pytest.raises(FastD2OError, match="Fix: ") as error:
        footprint(step(model=model, groups=1))
    assert message in str(error.value)


def test_a_mixture_of_experts_in_bfloat16() -> None:
    model = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    assert footprint(step(model=model, groups=1, dtype=torch.bfloat16)).moments["forward"]["activations"] > 0


def test_sequences_longer_than_the_model_reads() -> None:
    with pytest.raises(ValueError, match="the model reads at most 128 tokens"):
        footprint(step(completion_length=128))
