"""What a model does after its head: measured right, refused where it cannot be followed, and without side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import fastd2o
from fastd2o.models.attachment import _ATTACHMENT
from fastd2o.models.transform import HeadTransform
from tests.models.tiny import VOCAB, batch, eager_log_probs, tiny


class Changed(hf.LlamaForCausalLM):
    """A Llama that does `change` to its logits."""

    change: Callable[[Tensor], Tensor]

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = self.change(out.logits)
        return out


def changed(change: Callable[[Tensor], Tensor]) -> Changed:
    torch.manual_seed(0)
    model = Changed(tiny().config).eval()
    model.change = change
    return model


def measured(model: hf.PreTrainedModel) -> HeadTransform:
    return fastd2o.attach(model).__dict__[_ATTACHMENT].transform


@pytest.mark.parametrize(
    ("family", "logit_scale", "softcap"),
    [
        ("llama", 1.0, None),
        ("gemma2", 1.0, 5.0),
        ("cohere", 0.0625, None),
        ("granite", 1 / 3, None),
        ("hyperclovax", 3.0, None),
        ("minicpm3", 1.0, None),
        ("falcon_h1", 0.7, None),
        ("muse_glimmer", 0.3, 4.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_softcap_are_read_to_the_last_digit(family, logit_scale, softcap, dtype):
    """In bfloat16 models too, whose own logits could not tell 0.3 from 0.3008."""
    transform = measured(tiny(family).to(dtype))
    assert transform.logit_scale == pytest.approx(logit_scale, rel=1e-14)
    assert transform.softcap == softcap
    assert transform.vocab_size is None


def test_padding_of_the_vocabulary_that_the_model_drops():
    assert measured(tiny("inkling")) == HeadTransform(1.0, None, vocab_size=61)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.float() * 0.1,
        lambda logits: logits.mul_(0.1),
        lambda logits: 30.0 * torch.tanh(logits.float() * 2.0 / 30.0),
        lambda logits: 1e-3 * torch.tanh(logits / 1e-3),
        lambda logits: logits.bfloat16(),
    ],
)
def test_changes_that_can_be_followed(change):
    model, inputs = changed(change), batch()
    expected = eager_log_probs(model, inputs)
    tolerance = (
        0.02 if change(torch.ones(2)).dtype == torch.bfloat16 else 1e-5
    )  # of the expectation, not of the fused result
    out = fastd2o.attach(model)(**inputs, fused=True)
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=tolerance)


def masked(logits: Tensor) -> Tensor:
    logits[..., 7] = torch.finfo(logits.dtype).min
    return logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits + 1.0, "cannot follow"),
        (lambda logits: logits + torch.linspace(0, 1e-3, logits.shape[-1]), "column"),
        (masked, "in column 7"),
        (lambda logits: -logits, "cannot follow"),
        (lambda logits: logits.clamp(-20, 20), "becomes"),
        (lambda logits: 5.0 * torch.nn.functional.softsign(logits / 5.0), "cannot follow"),
        (lambda logits: logits.log_softmax(-1), "cannot follow"),
        (lambda logits: logits.flip(1) * torch.tensor([1.0, 2.0])[:, None], "cannot follow"),
        (lambda logits: logits[:, -1:], r"come out as \[2, 1, 67\]"),
        (lambda logits: (logits * 0.3).bfloat16(), r"rounded to torch\.bfloat16"),
        (lambda logits: logits * float("nan"), "cannot follow"),
    ],
)
def test_changes_that_cannot_be_followed_are_refused(change, message):
    model = changed(change)
    with pytest.raises(fastd2o.FastD2OError, match=message):
        fastd2o.attach(model)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


class Uncalled(hf.LlamaForCausalLM):
    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return hf.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


class CalledTwice(hf.LlamaForCausalLM):
    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        super().forward(input_ids=input_ids)
        return super().forward(input_ids=input_ids)


@pytest.mark.parametrize(("model_class", "times"), [(Uncalled, 0), (CalledTwice, 2)])
def test_a_head_that_is_not_called_exactly_once_is_refused(model_class, times):
    with pytest.raises(fastd2o.FastD2OError, match=f"called its output head {times} times"):
        fastd2o.attach(model_class(tiny().config))


def test_measuring_leaves_mode_and_random_state_alone():
    torch.manual_seed(0)
    dropout: dict[str, Any] = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, **dropout)).train()
    model.transformer.ln_f.eval()
    state = torch.get_rng_state()
    fastd2o.attach(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, module in model.named_modules() if not module.training] == ["transformer.ln_f"]
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_cannot_run_yet_is_measured_later(monkeypatch):
    """Flash attention, say, on a model that the trainer has still to move to the GPU."""
    model, inputs = tiny("gemma2"), batch()

    def kernel_for_another_device(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel for this device")

    with monkeypatch.context() as context:
        context.setattr(type(model.model), "forward", kernel_for_another_device)
        assert measured(model) is None
        with pytest.raises(RuntimeError, match="no kernel for this device"):
            model(**inputs, fused=True)
    torch.testing.assert_close(model(**inputs, fused=True).log_probs, eager_log_probs(model, inputs), rtol=0, atol=1e-5)


def test_a_refusal_on_the_first_call_names_the_reason():
    model = changed(lambda logits: logits + 1.0)
    with torch.device("meta"):
        late = Changed(model.config).eval()
    late.change = model.change
    fastd2o.attach(late)
    late.to_empty(device="cpu").load_state_dict(model.state_dict())
    late.model.rotary_emb = model.model.rotary_emb
    with pytest.raises(fastd2o.FastD2OError, match="cannot follow"):
        late(**batch(), fused=True)


def test_measuring_runs_without_a_cache():
    """As the fused forward does: a model may do other things to its logits with one."""
    seen = []

    class Cached(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs.get("use_cache"))
            return super().forward(*args, **kwargs)

    fastd2o.attach(Cached(tiny().config))
    assert seen == [False]
