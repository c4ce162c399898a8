"""Attached models inside PEFT, Accelerate, DDP and FSDP2, attached before or after."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastd2o
from fastd2o.models.attachment import _ATTACHMENT
from tests.models.tiny import assert_same_gradients, batch, eager_log_probs, gradients, tiny, weighted

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")


def attached(model: Any, config: Any, when: str) -> Any:
    """`model` with an adapter of `config`, attached before or after the adapter."""
    if when == "before":
        fastd2o.attach(model)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return fastd2o.attach(wrapped) if when == "after" else wrapped


@pytest.mark.parametrize("when", ["before", "after"])
class TestPeft:
    def test_lora(self, when):
        model = attached(tiny("gemma2"), peft.LoraConfig(target_modules=["q_proj", "down_proj"]), when).eval()
        inputs = batch()
        expected = eager_log_probs(model, inputs)
        eager = gradients(model, weighted(expected))
        log_probs = model(**inputs, fused=True).log_probs
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, weighted(log_probs)), eager)
        assert all("lora" in name for name in eager)

        with model.disable_adapter():
            reference = model(**inputs, fused=True).log_probs
            torch.testing.assert_close(reference, eager_log_probs(model, inputs), rtol=0, atol=1e-5)
        assert not torch.allclose(reference, expected)

    def test_a_head_trained_in_full(self, when):
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        model, inputs = attached(tiny(), config, when).eval(), batch()
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.neg_()
        expected = eager_log_probs(model, inputs)
        eager = gradients(model, weighted(expected))
        log_probs = model(**inputs, fused=True).log_probs
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, weighted(log_probs)), eager)

        with model.disable_adapter():
            reference = model(**inputs, fused=True).log_probs
            torch.testing.assert_close(reference, eager_log_probs(model, inputs), rtol=0, atol=1e-5)
        fastd2o.detach(model)
        torch.testing.assert_close(eager_log_probs(model, inputs), expected)
        assert not any("forward" in module.__dict__ for module in model.modules())

    @pytest.mark.parametrize(
        "options", [{"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": {"lm_head": [3]}}]
    )
    def test_an_adapter_on_the_head_is_refused(self, when, options):
        config = peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
        with pytest.raises(fastd2o.FastD2OError, match=r"carries a PEFT adapter.*modules_to_save"):
            attached(tiny(), config, when)(**batch(), fused=True)

    def test_prefix_tuning(self, when):
        model = attached(tiny(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), when).eval()
        inputs = batch()
        expected = eager_log_probs(model, inputs)
        torch.testing.assert_close(model(**inputs, fused=True).log_probs, expected, rtol=0, atol=1e-5)


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(fastd2o.FastD2OError, match="PROMPT_TUNING puts virtual tokens before every sequence"):
        attached(tiny(), config, "after")


@pytest.fixture
def _fresh_accelerate():
    """Accelerate keeps one state per process, which another test may have set up otherwise."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerates_mixed_precision():
    model, inputs = fastd2o.attach(tiny()), batch()
    expected = model(**inputs, fused=True).log_probs
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    log_probs = prepared(**inputs, fused=True).log_probs
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.1)
    assert not torch.equal(log_probs, expected)

    with pytest.raises(fastd2o.FastD2OError, match="keep_fp32_wrapper=False"):
        fastd2o.detach(model)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**inputs, fused=True).log_probs, expected)
    fastd2o.detach(unwrapped)


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_offloading(when):
    model, inputs = tiny("granite"), batch()
    expected = eager_log_probs(model, inputs)
    if when == "before":
        fastd2o.attach(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    fastd2o.attach(model)
    assert model.lm_head.weight.is_meta
    torch.testing.assert_close(model(**inputs, fused=True).log_probs, expected, rtol=0, atol=1e-5)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def eager_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    return gradients(twin, weighted(eager_log_probs(twin, inputs)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("process_group")
def test_ddp(when):
    model, inputs = tiny("gemma2"), batch()
    eager = eager_gradients(model, inputs)
    if when == "before":
        fastd2o.attach(model)
    wrapped = fastd2o.attach(nn.parallel.DistributedDataParallel(model))
    gradients(wrapped, weighted(wrapped(**inputs, fused=True).log_probs))
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, eager)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("process_group")
def test_fsdp2_gathers_the_heads_weight_again_for_the_backward(when):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs = tiny("granite"), batch()
    eager = eager_gradients(model, inputs)
    mesh = init_device_mesh("cpu", (1,))
    if when == "before":
        fastd2o.attach(model)
    for module in (*model.model.layers, model.lm_head):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    fastd2o.attach(model)
    assert (model.__dict__[_ATTACHMENT].transform is None) == (when == "after")
    for _ in range(2):
        model.zero_grad()  # not between forward and backward, where the root's parameters are the gathered ones
        weighted(model(**inputs, fused=True).log_probs).backward()
        assert_same_gradients({name: p.grad.full_tensor() for name, p in model.named_parameters()}, eager)


@pytest.mark.usefixtures("process_group")
def test_a_head_that_stays_sharded_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = tiny()
    model.lm_head.weight = nn.Parameter(
        distribute_tensor(model.lm_head.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
    )
    fastd2o.attach(model)
    with pytest.raises(fastd2o.FastD2OError, match="leave the head out of the tensor-parallel plan"):
        model(**batch(), fused=True)
