"""Scorers of rounds: patterns, a function, a classifier; and what each refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastd2o import FastD2OError
from fastd2o.training.rounds.scorers import PatternScorer, ScorerOptions, load_scorer, score_prompt
from tests.cli.tiny import message, tiny_tokenizer

CPU = torch.device("cpu")


def load(**options: Any) -> Any:
    return load_scorer(ScorerOptions(**options), CPU)


def test_patterns_count_as_faults_in_text_and_messages():
    scorer = load(patterns=[r"\bstupid\b", "no ?body"])
    texts = ["You are STUPID, and nobody, no body likes you.", "stupidity", "kind"]
    assert scorer([{"completion": text} for text in texts]) == [-2.0, 0.0, 0.0]
    assert scorer([{"completion": message("assistant", text)} for text in texts]) == [-2.0, 0.0, 0.0]
    assert str(score_prompt(scorer, {"prompt": "p"}, texts, "row 1")) == "[-2.0, 0.0, 0.0]"  # and not -0.0


def test_a_function_sees_prompt_completion_and_the_other_columns():
    from tests.training import scorers

    scorers.calls.clear()
    scorer = load(function="tests.training.scorers:remembers")
    assert score_prompt(scorer, {"prompt": "p", "id": 7}, ["ee", "a"], "row 1") == [1.98, -0.01]
    assert scorers.calls == [
        [{"prompt": "p", "id": 7, "completion": "ee"}, {"prompt": "p", "id": 7, "completion": "a"}]
    ]
    assert score_prompt(scorer, {"prompt": "p"}, [], "row 1") == []
    assert len(scorers.calls) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:score", "cannot be imported: No module named"),
        ("tests.training.scorers:no_such", "cannot be imported: .*no_such"),
        ("tests.training.scorers:NOT_A_FUNCTION", "is a int. Fix: name a function"),
    ],
)
def test_functions_that_are_not_there(name, told):
    with pytest.raises(FastD2OError, match=told):
        load(function=name)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda batch: [1.0], "gave 1 scores for the 2 completions of row 3"),
        (lambda batch: [1.0, float("inf")], "gave inf for completion 2 of row 3"),
        (lambda batch: [1.0, "good"], "failed on row 3: ValueError: could not convert"),
        (lambda batch: 1.0, "failed on row 3: TypeError: "),
        (lambda batch: batch[5], "failed on row 3: IndexError: "),
    ],
)
def test_scores_that_cannot_be_used(given, told):
    with pytest.raises(FastD2OError, match=rf"{told}.*Every finished sample and score is kept\. Fix: "):
        score_prompt(given, {"prompt": "p"}, ["a", "b"], "row 3")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "scorer gives nothing; expected exactly one of: patterns, function, classifier"),
        ({"patterns": ["a"], "function": "a:b"}, "scorer gives patterns and function"),
        ({"patterns": "stupid"}, "expected a list of regular expressions"),
        ({"patterns": []}, "expected a list of regular expressions, at least one"),
        ({"patterns": ["("]}, r"'\(' is no regular expression"),
        ({"function": "module"}, "expected 'module:function'"),
        ({"patterns": ["a"], "label": 1}, "label is set, but patterns has no classes"),
    ],
)
def test_options_that_cannot_work(options, told):
    with pytest.raises(ValueError, match=told):
        ScorerOptions(**options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Its tokenizer has no chat template, its classes are named."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny_tokenizer(chat_template=None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "rude", 1: "kind", 2: "neither"},
        label2id={"rude": 0, "kind": 1, "neither": 2},
    )
    model: Any = LlamaForSequenceClassification(config)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.mark.parametrize(("label", "index"), [("kind", 1), (0, 0), (None, 2)])
def test_a_classifier_gives_the_logit_of_its_class(classifier, label, index):
    folder, model, tokenizer = classifier
    texts = ["what do you think of the cat that is kind", "what do you think of the cat stupid"]
    batch = [{"prompt": texts[0][:28], "completion": text[28:]} for text in texts]
    scores = load(classifier=str(folder), label=label)(batch)
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, index].item() for text in texts]
    assert scores == pytest.approx(expected, abs=1e-5)
    tokenizer.model_max_length = 8  # as loaded below: the end of a text that is too long counts
    tokenizer.save_pretrained(folder)
    long = [{"prompt": "the cat " * 20, "completion": f" {end}"} for end in ("kind", "stupid")]
    kept = load(classifier=str(folder), label=label)(long)
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(folder)
    assert kept[0] != kept[1]
    joined = [{"prompt": message("user", "a"), "completion": message("assistant", "b")}]
    with torch.no_grad():
        expected = [model(**tokenizer("a\nb", return_tensors="pt")).logits[0, index].item()]
    assert load(classifier=str(folder), label=label)(joined) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_that_cannot_be_used(classifier, tmp_path):
    folder, model, tokenizer = classifier
    with pytest.raises(FastD2OError, match=r"has no class 'nice'\. Fix: one of rude, kind, neither"):
        load(classifier=str(folder), label="nice")
    with pytest.raises(FileNotFoundError, match="classifier: there is no folder"):
        load(classifier="./nowhere")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FastD2OError, match=r"no classifier could be loaded from .* saved as safetensors"):
        load(classifier=str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    model.model.save_pretrained(tmp_path)
    with pytest.raises(FastD2OError, match=r"lacks weights of a classifier \(score\.weight\)"):
        load(classifier=str(tmp_path))


def test_the_same_pattern_scorer_for_the_same_patterns():
    assert load(patterns=["a"]) == PatternScorer(["a"])
