"""The fused forward against the model's own logits, over many families, and everything that must not change."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers as hf
from torch import Tensor, nn

import fastd2o
from fastd2o.models import FusedCausalLMOutput
from fastd2o.models.attachment import _ATTACHMENT
from tests.models.tiny import (
    FAMILIES,
    VOCAB,
    assert_same_gradients,
    batch,
    eager_log_probs,
    gradients,
    log_probs_of,
    tiny,
    weighted,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(family):
    model, inputs = tiny(family), batch()
    expected = eager_log_probs(model, inputs)
    eager = gradients(model, weighted(expected))

    out = fastd2o.attach(model)(**inputs, fused=True)

    assert isinstance(out, FusedCausalLMOutput)
    assert out.logits is None
    assert out.loss is None
    assert out.log_probs is not None
    assert out.log_probs.dtype == torch.float32
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, weighted(out.log_probs)), eager)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "mamba"])
def test_nothing_changes_without_fused(family):
    model, inputs = tiny(family), batch()
    prompt = {"input_ids": inputs["input_ids"][:, :4], "attention_mask": inputs["attention_mask"][:, :4]}
    sample = functools.partial(model.generate, **prompt, max_new_tokens=5, do_sample=True)
    logits, loss = model(**inputs).logits, model(**inputs).loss
    torch.manual_seed(3)
    sampled = sample()

    fastd2o.attach(model)
    model(**inputs, fused=True)

    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).loss, loss)
    assert torch.equal(model(**inputs, fused=False).logits, logits)
    torch.manual_seed(3)
    assert torch.equal(sample(), sampled)


def test_only_the_head_is_exchanged():
    """The other outputs of the forward are there, and the labels do not make the model compute a loss of its own."""
    model, inputs = tiny("mixtral"), batch()
    plain = model(**inputs, output_hidden_states=True, output_router_logits=True)
    out = fastd2o.attach(model)(**inputs, output_hidden_states=True, output_router_logits=True, fused=True)

    torch.testing.assert_close(out.aux_loss, plain.aux_loss)
    torch.testing.assert_close(out.router_logits, plain.router_logits)
    torch.testing.assert_close(out.hidden_states, plain.hidden_states)
    assert out.past_key_values is None
    assert out.loss is None
    assert model(**inputs, fused=True, use_cache=True).past_key_values is not None


def test_head_call_gets_the_heads_inputs_and_the_measured_transform():
    model, inputs = tiny("muse_glimmer"), batch()
    labels = inputs.pop("labels")
    seen: dict[str, Any] = {}

    def head_call(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen.update(options, weight=weight)
        logits = hidden @ weight.T * options["logit_scale"]
        return log_probs_of(options["softcap"] * torch.tanh(logits / options["softcap"]), labels)

    out = fastd2o.attach(model, backend="torch")(**inputs, fused=head_call)

    assert seen["weight"] is model.lm_head.weight
    assert seen["bias"] is None
    assert seen["logit_scale"] == pytest.approx(0.3, rel=1e-12)
    assert seen["softcap"] == 4.0
    assert seen["backend"] == "torch"
    assert out.log_probs is None
    torch.testing.assert_close(out.head, eager_log_probs(model, {**inputs, "labels": labels}), rtol=0, atol=1e-5)


def test_operators_are_head_calls_and_keep_their_output_types():
    model, inputs = fastd2o.attach(tiny("phi")), batch()
    target = inputs.pop("labels").roll(-1, 1)
    with torch.no_grad():
        logits = model(**inputs).logits

    scored = model(**inputs, fused=functools.partial(fastd2o.linear_logprob, target=target, stats=True)).head
    assert type(scored).__name__ == "LogprobOutput"
    assert scored.logprob.requires_grad
    assert torch.equal(scored.top1, logits.argmax(-1).masked_fill(target == -100, 0))

    cringe = model(**inputs, fused=functools.partial(fastd2o.linear_cringe, target=target, k=3, seed=0)).head
    assert cringe.loss.shape == target.shape
    assert gradients(model, cringe.loss.sum())["lm_head.bias"].abs().sum() > 0


def test_several_differentiable_results_of_one_head_call():
    model, inputs = tiny("granite"), batch()
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    eager = gradients(model, weighted(logits.logsumexp(-1)) + 3 * logits[..., 5].sum())

    def head_call(hidden: Tensor, weight: Tensor, *, logit_scale: float, **_: Any) -> dict[str, Any]:
        own = hidden @ weight.T * logit_scale
        return {"lse": own.logsumexp(-1), "rest": [own[..., 5], "note", labels, None]}

    head = fastd2o.attach(model)(**inputs, fused=head_call).head
    lse, (fifth, note, same, nothing) = head["lse"], head["rest"]

    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert (note, nothing) == ("note", None)
    assert same is labels
    assert_same_gradients(gradients(model, weighted(lse) + 3 * fifth.sum()), eager)


def test_an_impossible_token_stays_impossible():
    """-inf passes through the model's scaling and capping untouched, and leaves no NaN elsewhere."""
    model, inputs = fastd2o.attach(tiny("phi")), batch()
    with torch.no_grad():
        model.lm_head.bias[inputs["labels"][0, 6]] = -torch.inf
    log_probs = model(**inputs, fused=True).log_probs
    assert log_probs[0, 6] == -torch.inf
    torch.testing.assert_close(log_probs, eager_log_probs(model, inputs))


def test_hooks_of_model_and_head_fire():
    model, inputs = fastd2o.attach(tiny()), batch()
    fired: list[str] = []
    model.register_forward_pre_hook(lambda *_: fired.append("model before"))
    model.lm_head.register_forward_pre_hook(lambda *_: fired.append("head before"))
    model.lm_head.register_forward_hook(lambda *_: fired.append("head after"))
    outputs: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.register_forward_hook(lambda *_: fired.append("model after"))
    model.lm_head.register_full_backward_pre_hook(lambda *_: fired.append("head backward"))
    model.lm_head.register_full_backward_hook(lambda *_: fired.append("head backward after"))
    model(**inputs, fused=True).log_probs.sum().backward()
    forward = ["model before", "head before", "head after", "model after"]
    assert fired == [*forward, "head backward", "head backward after"]
    assert outputs[0].numel() == inputs["labels"].numel()  # and not times the vocabulary


def test_the_gradient_enters_through_what_the_heads_forward_returned():
    """As DeepSpeed's ZeRO-3 needs it, which puts a function of its own around the head's output."""
    model, inputs = tiny("cohere"), batch()
    order: list[str] = []

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: Tensor) -> Tensor:
            return output.view_as(output)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            order.append("gather")
            return grad

    model.lm_head.register_forward_hook(lambda module, args, output: Gather.apply(output))
    model.lm_head.weight.register_hook(lambda grad: order.append("use"))
    fastd2o.attach(model)(**inputs, fused=True).log_probs.sum().backward()
    assert order == ["gather", "use"]


def test_signature_is_the_original_one():
    model = tiny()
    original = inspect.signature(model.forward)
    fastd2o.attach(model)
    assert inspect.signature(model.forward) == original


def test_detach_leaves_no_trace():
    model, inputs = tiny(), batch()
    before, head_before = dict(model.__dict__), dict(model.lm_head.__dict__)
    logits = model(**inputs).logits
    fastd2o.attach(model)
    model(**inputs, fused=True)

    assert fastd2o.detach(model) is model
    assert model.__dict__.keys() == before.keys()
    assert model.lm_head.__dict__.keys() == head_before.keys()
    assert torch.equal(model(**inputs).logits, logits)
    assert fastd2o.detach(model) is model


def test_a_forward_of_the_instances_own_is_used_and_put_back():
    model, inputs = tiny(), batch()
    calls: list[int] = []
    original = model.forward

    def own_forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = own_forward
    fastd2o.attach(model)
    calls.clear()
    model(**inputs)
    model(**inputs, fused=True)
    assert len(calls) == 2
    fastd2o.detach(model)
    assert model.forward is own_forward


def test_detach_refuses_when_a_forward_was_wrapped_since():
    model = fastd2o.attach(tiny())
    model.forward = functools.partial(model.forward)
    with pytest.raises(fastd2o.FastD2OError, match=r"wrapped the model's forward after fastd2o\.attach"):
        fastd2o.detach(model)

    model = fastd2o.attach(tiny())
    model.lm_head.forward = functools.partial(model.lm_head.forward)
    with pytest.raises(fastd2o.FastD2OError, match="replaced the forward of the output head"):
        fastd2o.detach(model)
    assert _ATTACHMENT in model.__dict__


def test_attach_twice_only_sets_the_backend():
    model = tiny()
    assert fastd2o.attach(model) is model
    forward = model.forward
    assert fastd2o.attach(model, backend="torch") is model
    assert model.forward == forward
    inputs = batch()
    del inputs["labels"]
    assert model(**inputs, fused=lambda *_, backend, **__: backend).head == "torch"
    fastd2o.detach(model)
    assert "forward" not in model.__dict__


def test_a_deep_copy_is_attached_and_independent():
    model, inputs = fastd2o.attach(tiny()), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    expected, mirrored = eager_log_probs(model, inputs), eager_log_probs(twin, inputs)
    assert not torch.allclose(expected, mirrored)

    torch.testing.assert_close(twin(**inputs, fused=True).log_probs, mirrored)
    torch.testing.assert_close(model(**inputs, fused=True).log_probs, expected)
    fastd2o.detach(model)
    torch.testing.assert_close(twin(**inputs, fused=True).log_probs, mirrored)


def test_saving_and_loading_see_nothing_of_it(tmp_path):
    model, inputs = tiny("gemma2"), batch()
    names = list(model.state_dict())
    fastd2o.attach(model)
    assert list(model.state_dict()) == names
    expected = model(**inputs, fused=True).log_probs
    model.save_pretrained(tmp_path)

    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "forward" not in loaded.__dict__
    torch.testing.assert_close(fastd2o.attach(loaded)(**inputs, fused=True).log_probs, expected)


def test_an_attached_model_is_not_pickled_by_half():
    model = fastd2o.attach(tiny())
    with pytest.raises(TypeError, match=r"save_pretrained, or call fastd2o\.detach"):
        pickle.dumps(model)
    assert pickle.loads(pickle.dumps(fastd2o.detach(model))).config.vocab_size == VOCAB


def test_the_whole_forward_under_activation_checkpointing():
    model, inputs = fastd2o.attach(tiny("granite")), batch()
    eager = gradients(model, weighted(eager_log_probs(model, inputs)))

    def step(**inputs: Tensor) -> Tensor:
        return model(**inputs, fused=True).log_probs

    log_probs = torch.utils.checkpoint.checkpoint(functools.partial(step, **inputs), use_reentrant=False)
    assert_same_gradients(gradients(model, weighted(log_probs)), eager)


def test_gradient_checkpointing():
    model, inputs = tiny("qwen3"), batch()
    eager = gradients(model, weighted(eager_log_probs(model, inputs)))
    fastd2o.attach(model).train()
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, weighted(model(**inputs, fused=True).log_probs)), eager)


def test_frozen_head():
    model, inputs = tiny("cohere"), batch()
    fastd2o.attach(model)
    model.lm_head.weight.requires_grad_(False)  # tied: the embedding is frozen with it
    eager = gradients(model, weighted(eager_log_probs(model, inputs)))
    assert_same_gradients(gradients(model, weighted(model(**inputs, fused=True).log_probs)), eager)


def test_without_gradient():
    model, inputs = fastd2o.attach(tiny("gemma3")), batch()
    with torch.no_grad():
        log_probs = model(**inputs, fused=True).log_probs
        assert not log_probs.requires_grad
        torch.testing.assert_close(log_probs, eager_log_probs(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_half_precision_is_no_less_accurate_than_eager(family, precision):
    """Judged against float64 on the hidden states and weights as the matrix product sees them, in bfloat16."""
    model, inputs = tiny(family), batch()
    labels = inputs.pop("labels")
    if precision == "bfloat16":
        model.bfloat16()
    fastd2o.attach(model)
    seen: list[Tensor] = []

    def remember(hidden: Tensor, weight: Tensor, **options: Any) -> dict[str, Any]:
        seen.extend(tensor.detach().bfloat16().double() for tensor in (hidden, weight))
        return options

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        softcap = model(**inputs, fused=remember).head["softcap"]
        out = model(**inputs, labels=labels, fused=True)
        logits = model(**inputs).logits
    exact = seen[0] @ seen[1].T
    exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = exact[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    expected = expected.masked_fill(labels[:, 1:] == -100, 0.0)

    assert out.log_probs.dtype == torch.float32
    error = (out.log_probs[:, 1:] - expected).abs().max()
    eager_error = (log_probs_of(logits, labels)[:, 1:] - expected).abs().max()
    assert error <= eager_error
    out.log_probs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_on_meta_is_measured_on_its_first_fused_call():
    source, inputs = tiny("granite"), batch()
    with torch.device("meta"):
        model = hf.GraniteForCausalLM(source.config).eval()
    fastd2o.attach(model)
    assert model.__dict__[_ATTACHMENT].transform is None
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = source.model.rotary_emb  # its buffers are not part of the state
    torch.testing.assert_close(
        model(**inputs, fused=True).log_probs, eager_log_probs(source, inputs), rtol=0, atol=1e-5
    )
    assert model.__dict__[_ATTACHMENT].transform.logit_scale == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break():
    model, inputs = tiny("gemma2"), batch()
    eager = gradients(model, weighted(eager_log_probs(model, inputs)))
    compiled: Any = torch.compile(fastd2o.attach(model), fullgraph=True, backend="aot_eager")
    assert fastd2o.attach(compiled) is compiled
    assert_same_gradients(gradients(model, weighted(compiled(**inputs, fused=True).log_probs)), eager)


def test_compiling_before_measuring_is_refused():
    model, inputs = fastd2o.attach(tiny()), batch()
    model.__dict__[_ATTACHMENT].transform = None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"make one fused call before torch\.compile"):
        compiled(**inputs, fused=True)
    assert model(**inputs, fused=True).log_probs is not None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": None}, ValueError, r"fused=True scores labels.*Fix: labels="),
        (
            {"labels": torch.zeros(2, 5, dtype=torch.long)},
            ValueError,
            r"labels has shape \[2, 5\] but .*\[2, 9\]",
        ),
        ({"labels": torch.zeros(2, 9)}, TypeError, r"labels has dtype torch\.float32"),
        ({"labels": torch.full((2, 9), VOCAB)}, ValueError, rf"labels\[0, 1\] is {VOCAB}"),
        ({"fused": "yes"}, TypeError, "fused must be True, False or a head call, got 'yes'"),
        ({"fused": lambda *_, **__: None}, ValueError, "a head call brings its own targets"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep cannot go with fused"),
        ({"logits_to_keep": torch.tensor([3])}, ValueError, "logits_to_keep cannot go with fused"),
        ({"return_dict": False}, ValueError, "return_dict=False cannot go with fused"),
    ],
)
def test_arguments_that_do_not_fit(changes, error, message):
    model, inputs = fastd2o.attach(tiny()), batch()
    with pytest.raises(error, match=message):
        model(**{**inputs, "fused": True, **changes})
    torch.testing.assert_close(model(**inputs, fused=True).log_probs, eager_log_probs(model, inputs))


def test_only_input_ids_go_by_position():
    model, inputs = fastd2o.attach(tiny()), batch()
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    expected = model(input_ids=ids, attention_mask=mask, **inputs, fused=True).log_probs
    assert torch.equal(model(ids, attention_mask=mask, **inputs, fused=True).log_probs, expected)
    with pytest.raises(TypeError, match="takes input_ids alone by position, got 2"):
        model(ids, mask, **inputs, fused=True)


def test_models_that_cannot_be_served():
    with pytest.raises(TypeError, match="must be a transformers causal LM, or a wrapper around one; got Linear"):
        fastd2o.attach(nn.Linear(2, 2))
    with pytest.raises(fastd2o.FastD2OError, match="DistributedDataParallel"):
        fastd2o.attach(nn.DataParallel(tiny()))
    with pytest.raises(fastd2o.FastD2OError, match=r"LlamaModel has no language-modelling head.*AutoModelForCausalLM"):
        fastd2o.attach(tiny().model)
    t5 = hf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(fastd2o.FastD2OError, match="encoder-decoder"):
        fastd2o.attach(hf.T5ForConditionalGeneration(t5))
    bert = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(fastd2o.FastD2OError, match="BertForMaskedLM predicts masked tokens"):
        fastd2o.attach(hf.BertForMaskedLM(bert))
    with pytest.raises(fastd2o.FastD2OError, match=r"BertLMHeadModel is not causal.*Fix: use a decoder-only"):
        fastd2o.attach(hf.BertLMHeadModel(bert))  # as AutoModelForCausalLM loads any BERT
    bert.is_decoder = True
    fastd2o.attach(hf.BertLMHeadModel(bert))
    with pytest.raises(fastd2o.FastD2OError, match="BertForPreTraining returns no logits"):
        fastd2o.attach(hf.BertForPreTraining(bert))
    sharded = tiny()
    sharded._tp_size = 2
    with pytest.raises(fastd2o.FastD2OError, match="tensor-parallel over 2 devices"):
        fastd2o.attach(sharded)


def test_labels_outside_the_vocabulary_are_named_in_their_own_places():
    model, inputs = fastd2o.attach(tiny()), batch()
    inputs["labels"][1, 3] = VOCAB
    inputs["labels"][:, 0] = VOCAB  # nothing predicts the first token
    with pytest.raises(ValueError, match=rf"labels\[1, 3\] is {VOCAB} \(1 such in all\).*Fix: ids in \[0, {VOCAB}\)"):
        model(**inputs, fused=True)
    inputs["labels"][1, 3] = -100
    model(**inputs, fused=True)


def test_backend_that_does_not_exist_is_refused_at_once():
    model = tiny()
    with pytest.raises(ValueError, match="backend='nope' is unknown"):
        fastd2o.attach(model, backend="nope")
    assert "forward" not in vars(model)
