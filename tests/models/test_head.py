"""Which heads are served, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastd2o
from tests.models.tiny import batch, eager_log_probs, tiny


def test_a_head_of_another_class_is_refused():
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = tiny()
    model.lm_head = Scaled(32, 67, bias=False)
    with pytest.raises(fastd2o.FastD2OError, match=r"is a Scaled; only a plain nn\.Linear"):
        fastd2o.attach(model)


def test_a_quantised_weight_is_refused():
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(fastd2o.FastD2OError, match=r"Parameter of torch\.float8_e4m3fn.*left out of the quantisation"):
        fastd2o.attach(model)


def test_a_weight_that_only_looks_like_a_tensor_is_refused():
    class Packed(torch.Tensor):
        pass

    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
    with pytest.raises(fastd2o.FastD2OError, match="is a Packed of"):
        fastd2o.attach(model)


def test_a_head_whose_forward_was_replaced_is_refused():
    model = tiny()
    original = model.lm_head.forward
    model.lm_head.forward = lambda input: original(input) + 1
    with pytest.raises(fastd2o.FastD2OError, match=r"call fastd2o\.attach\(model\) before replacing it"):
        fastd2o.attach(model)


def test_a_head_exchanged_after_attach_is_found():
    """Resizing the vocabulary makes a new one."""
    model, inputs = fastd2o.attach(tiny("llama_tied")), batch()
    model.resize_token_embeddings(80, mean_resizing=False)
    torch.testing.assert_close(model(**inputs, fused=True).log_probs, eager_log_probs(model, inputs), rtol=0, atol=1e-5)
    del inputs["labels"]
    assert model(**inputs, fused=lambda hidden, weight, **_: weight.shape[0]).head == 80


def test_an_error_in_the_head_call_leaves_the_head_usable():
    model, inputs = fastd2o.attach(tiny()), batch()
    labels = inputs.pop("labels")

    def fails(*args: object, **kwargs: object) -> None:
        raise ArithmeticError("in the head call")

    with pytest.raises(ArithmeticError, match="in the head call"):
        model(**inputs, fused=fails)
    assert model(**inputs).logits.shape == (2, 9, 67)
    assert model(**inputs, labels=labels, fused=True).log_probs.shape == (2, 9)
