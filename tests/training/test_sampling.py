"""Anchors: what the model is asked, how tokens are chosen, and what becomes of a run that is killed."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastd2o
from fastd2o.data import build_dataset
from fastd2o.data.dataset import Needs
from fastd2o.training import files
from fastd2o.training.generators import _ChooseToken, _end_of_turn, decode
from fastd2o.training.sampling import (
    INSTRUCTIONS,
    SamplingOptions,
    SamplingReport,
    draw_chunks,
    read_prompts,
    rows_per_chunk,
    sample_anchors,
)
from fastd2o.training.sampling_file import check_output, sample_file
from tests.cli.tiny import CHAT_ROWS, TEXT_ROWS, message, read_jsonl, tiny_model, tiny_tokenizer, write_jsonl

OPTIONS = SamplingOptions(num_anchors=3, max_new_tokens=8, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


def draw(model, tokenizer, rows, **options):
    return sample_anchors(
        model, tokenizer, rows, **{"num_anchors": 3, "max_new_tokens": 8, "progress": False, **options}
    )


def prompt_texts(tokenizer, model, rows, **options):
    prompts, _ = read_prompts(rows, model, tokenizer, SamplingOptions(num_anchors=1, max_new_tokens=8, **options))
    return [tokenizer.decode(prompt.ids) for prompt in prompts]


# --- what the model reads ---------------------------------------------------------------------------------------------


def test_instruction_goes_before_a_text_prompt(tokenizer, model):
    (text,) = prompt_texts(tokenizer, model, TEXT_ROWS[:1], instruction="Be kind.")
    assert text == "Be kind.\n\nsay something rude about the cat"


def test_instruction_is_a_system_message(tokenizer, model):
    (text,) = prompt_texts(tokenizer, model, CHAT_ROWS[:1], instruction="Be kind.")
    assert text == "<|system|>Be kind.<|end|>\n<|user|>say something rude about the cat<|end|>\n<|assistant|>"


def test_instruction_is_merged_into_a_system_message(tokenizer, model):
    row = {**CHAT_ROWS[0], "prompt": message("system", "Speak English.") + CHAT_ROWS[0]["prompt"]}
    (text,) = prompt_texts(tokenizer, model, [row], instruction="Be kind.")
    assert text.startswith("<|system|>Be kind.\n\nSpeak English.<|end|>\n<|user|>say")


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
SILENT = "{% set messages = messages if messages[0]['role'] != 'system' else messages[1:] %}"


@pytest.mark.parametrize("beginning", [REFUSING, SILENT])
def test_instruction_goes_to_the_user_where_there_is_no_system_role(model, beginning):
    tokenizer = tiny_tokenizer(beginning + tiny_tokenizer().chat_template)
    (text,) = prompt_texts(tokenizer, model, CHAT_ROWS[:1], instruction="Be kind.")
    assert text == "<|user|>Be kind.\n\nsay something rude about the cat<|end|>\n<|assistant|>"


@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS])
def test_without_an_instruction_the_prompt_is_the_one_that_training_scores(tokenizer, model, rows):
    prompts, _ = read_prompts(rows, model, tokenizer, SamplingOptions(1, instruction="none", max_new_tokens=8))
    groups = build_dataset(rows, tokenizer, needs=Needs.NEGATIVE).groups
    for prompt in prompts:
        (group,) = [group for group in groups if group.line == prompt.line]
        negative = group.sequences[group.negative]
        assert list(prompt.ids) == list(negative.input_ids[: negative.completion_start])


def test_long_prompts_come_first_and_rows_stay_in_order(tokenizer, model):
    prompts, _ = read_prompts(TEXT_ROWS, model, tokenizer, SamplingOptions(1, max_new_tokens=8))
    lengths = [len(prompt.ids) for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert [prompt.line for prompt in prompts] != [1, 2, 3, 4, 5, 6]
    assert [row["prompt"] for row in draw(model, tokenizer, TEXT_ROWS)] == [row["prompt"] for row in TEXT_ROWS]


def test_presets_have_names(tokenizer, model):
    (text,) = prompt_texts(tokenizer, model, TEXT_ROWS[:1], instruction="harmless", max_redraws=0)
    assert text.startswith(INSTRUCTIONS["harmless"])
    assert SamplingOptions(1, instruction="none").instruction_text is None
    assert SamplingOptions(1, instruction=None).instruction_text is None


def test_every_format_with_a_negative_is_sampled(tokenizer, model):
    rows = [
        {"prompt": "a", "chosen": " good", "rejected": " bad", "id": 7},
        {"prompt": "b", "completion": " good", "label": True},
        {"prompt": "c", "completion": " bad", "label": False},
        {"chosen": "say it well", "rejected": "say it badly"},
        {"prompt": "d", "rejected": " bad", "anchors": [" old"], "ref_anchor_logps": [-1.0], "anchor_cut": [True]},
    ]
    drawn = draw(model, tokenizer, rows)
    assert all(len(row.pop("anchors")) == len(row.pop("anchor_cut")) == 3 for row in drawn)
    assert drawn == [
        {"prompt": "a", "chosen": " good", "rejected": " bad", "id": 7},
        {"prompt": "c", "rejected": " bad"},
        {"prompt": "say it", "chosen": " well", "rejected": " badly"},
        {"prompt": "d", "rejected": " bad"},
    ]


@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS])
def test_training_takes_the_result(tokenizer, model, rows):
    dataset = build_dataset(draw(model, tokenizer, rows), tokenizer, needs=Needs.PAIR, positives="anchors")
    assert [len(group.positives) for group in dataset.groups] == [3] * len(rows)


# --- how tokens are chosen --------------------------------------------------------------------------------------------


def test_frequencies_are_the_probabilities():
    scores = torch.tensor([2.0, -torch.inf, 0.5, -1.0, 1.0])
    count = 10_000
    uniforms_SL = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    choose: Any = _ChooseToken(uniforms_SL, prompt_length=3, lines=range(count))
    chosen = choose(torch.zeros(count, 3, dtype=torch.int64), scores.expand(count, -1)).argmax(-1)
    expected = scores.softmax(-1) * count
    assert torch.allclose(chosen.bincount(minlength=5).float(), expected, atol=1.0)
    assert (chosen != 1).all()


def test_a_token_of_probability_zero_is_never_drawn():
    choose: Any = _ChooseToken(torch.zeros(1, 1, dtype=torch.float64), prompt_length=0, lines=[1])
    assert choose(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[-torch.inf, 0.0, 0.0]])).argmax() == 1


def test_nan_is_an_error_that_names_the_line(tokenizer):
    broken = tiny_model(tokenizer)
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    with pytest.raises(fastd2o.FastD2OError, match=r"NaN\) at token 1 of a sample for line 3\. Fix: another dtype"):
        draw(broken, tokenizer, TEXT_ROWS)


def test_a_sample_depends_on_seed_row_and_draw_alone(tokenizer, model):
    rows = draw(model, tokenizer, TEXT_ROWS)
    assert draw(model, tokenizer, TEXT_ROWS) == rows
    assert draw(model, tokenizer, TEXT_ROWS, batch_size=1) == rows
    assert [row["anchors"][:2] for row in rows] == [
        row["anchors"] for row in draw(model, tokenizer, TEXT_ROWS, num_anchors=2)
    ]
    assert draw(model, tokenizer, TEXT_ROWS[:2]) == rows[:2]
    others = draw(model, tokenizer, TEXT_ROWS, seed=1)
    assert all(row["anchors"] != other["anchors"] for row, other in zip(rows, others, strict=True))
    first, second = draw(model, tokenizer, TEXT_ROWS[:1] * 2)
    assert len({*first["anchors"], *second["anchors"]}) == 6


def test_the_random_numbers_of_torch_are_left_alone(tokenizer, model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(model, tokenizer, TEXT_ROWS)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_and_top_p_sharpen(tokenizer, model):
    def distinct(**options):
        rows = draw(model, tokenizer, TEXT_ROWS, num_anchors=6, max_new_tokens=2, **options)
        return sum(len(set(row["anchors"])) for row in rows)

    assert distinct(temperature=1e-5) == distinct(top_p=1e-6) == len(TEXT_ROWS) < distinct()


def test_decoding_recipe_of_the_model_is_not_used(tokenizer, model, caplog):
    recipe = tiny_model(tokenizer)
    recipe.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=1.5,
        num_beams=2,
        max_length=5,
        eos_token_id=1,
    )
    assert draw(recipe, tokenizer, TEXT_ROWS) == draw(model, tokenizer, TEXT_ROWS)
    assert recipe.generation_config.top_k == 1
    assert not caplog.records


def test_samples_stop_at_the_end_of_turn_of_the_template(tokenizer, model):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert _end_of_turn(tokenizer) == end
    chatty = model_that_says(tokenizer, [end, tokenizer.convert_tokens_to_ids("a")])
    report = counts_of(chatty, tokenizer, CHAT_ROWS, max_new_tokens=60, max_redraws=30)
    assert (report.anchors, report.cut) == (18, 0)


@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS])
def test_a_cut_sample_is_not_trained_on_as_a_finished_answer(tokenizer, rows):
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    babbling = model_that_says(tokenizer, [tokenizer.eos_token_id, *letters])
    drawn = draw(babbling, tokenizer, rows, num_anchors=6, max_new_tokens=3)
    cut = [flag for row in drawn for flag in row["anchor_cut"]]
    assert {True, False} == set(cut)
    dataset = build_dataset(drawn, tokenizer, needs=Needs.PAIR)
    positives = [group.sequences[index] for group in dataset.groups for index in group.positives]
    for sequence, flag in zip(positives, cut, strict=True):
        assert (set(sequence.completion_ids) <= set(letters)) is flag


def test_text_keeps_the_space_that_a_decoder_drops(model):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(["cat dog"], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    prompts, _ = read_prompts([{"prompt": "cat", "rejected": " cat"}], model, tokenizer, SamplingOptions(1, "none", 8))
    completion = tokenizer("cat dog")["input_ids"][1:]
    assert tokenizer.decode(completion) == "dog"
    assert decode(tokenizer, prompts[0], completion, stops=[]).text == " dog"


# --- what is drawn anew -----------------------------------------------------------------------------------------------


def model_that_says(tokenizer, tokens):
    """A model to which the given tokens are equally likely at every step, and no others."""
    model = tiny_model(tokenizer)
    model.lm_head.register_forward_hook(
        lambda head, inputs, logits: torch.full_like(logits, -1e4).index_fill(-1, torch.tensor(tokens), 0.0)
    )
    return model


def counts_of(model, tokenizer, rows, **options):
    settings = SamplingOptions(**{"num_anchors": 3, "max_new_tokens": 1, "instruction": "none", **options})
    prompts, report = read_prompts(rows, model, tokenizer, settings)
    for chunk in draw_chunks(model, tokenizer, prompts, settings, progress=False):
        for row in chunk:
            report.add(row.counts)
    return report


def test_empty_samples_are_drawn_anew_then_given_up(tokenizer):
    silent = model_that_says(tokenizer, [tokenizer.eos_token_id])
    report = counts_of(silent, tokenizer, TEXT_ROWS[:2], max_redraws=2)
    assert report == SamplingReport(rows=2, empty=2 * 3 * 3, dropped=6, rows_without_anchors=2)
    with pytest.raises(fastd2o.FastD2OError, match="no usable sample for any of the 2 prompts: 24 were empty"):
        draw(silent, tokenizer, TEXT_ROWS[:2])


def test_some_empty_samples_are_replaced(tokenizer):
    letter = tokenizer.convert_tokens_to_ids("a")
    half = model_that_says(tokenizer, [tokenizer.eos_token_id, letter])
    report = counts_of(half, tokenizer, TEXT_ROWS, num_anchors=8, max_redraws=20)
    assert report.anchors == 8 * len(TEXT_ROWS)
    assert report.dropped == 0
    assert report.empty > 10
    assert report.duplicates == 7 * len(TEXT_ROWS)
    with pytest.warns(fastd2o.FastD2OWarning, match="samples were given up"):
        rows = draw(half, tokenizer, TEXT_ROWS, num_anchors=8, max_new_tokens=1, max_redraws=0)
    anchors = [anchor for row in rows for anchor in row["anchors"]]
    assert set(anchors) == {"a"}
    assert 0 < len(anchors) < 8 * len(TEXT_ROWS)


def test_samples_that_repeat_the_negative_are_drawn_anew(tokenizer):
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    report = counts_of(
        model_that_says(tokenizer, [a, b]), tokenizer, [{"prompt": "x", "rejected": " a"}] * 5, max_redraws=30
    )
    assert report.anchors == 15
    assert report.copies > 3
    assert report.duplicates == 10


# --- the model is left as it was --------------------------------------------------------------------------------------


def test_modes_are_restored(tokenizer):
    model = tiny_model(tokenizer).train()
    model.model.norm.eval()
    draw(model, tokenizer, TEXT_ROWS[:1])
    assert model.training
    assert model.lm_head.training
    assert not model.model.norm.training
    assert torch.is_grad_enabled()


def test_an_attached_model_draws_the_same(tokenizer, model):
    attached = fastd2o.attach(tiny_model(tokenizer))
    assert draw(attached, tokenizer, TEXT_ROWS) == draw(model, tokenizer, TEXT_ROWS)


def test_an_adapter_draws_and_keeps_its_recipe(tokenizer, model):
    adapted = get_peft_model(tiny_model(tokenizer), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    recipe = adapted.get_base_model().generation_config
    assert draw(adapted, tokenizer, TEXT_ROWS) == draw(model, tokenizer, TEXT_ROWS)  # a new adapter changes nothing
    assert adapted.get_base_model().generation_config is recipe


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_anchors": 0}, "num_anchors is 0; expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_redraws": -1}, "max_redraws is -1"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"bad_rows": "ignore"}, "bad_rows is 'ignore'"),
        ({"instruction": "harmles"}, "instruction is 'harmles', which is no name .* Fix: 'harmless', or a sentence"),
        ({"instruction": "Honest"}, "Fix: 'honest'"),
        ({"instruction": " None "}, "Fix: 'none'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**{"num_anchors": 1, **options})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "the cat " * 200, "rejected": " bad"},
            r"row 2: the prompt has \d+ tokens .* the 256 the model can",
        ),
        ({"prompt": "a", "rejected": "  "}, "row 2: the negative is empty"),
        ({"prompt": "", "rejected": " bad"}, "row 2: the prompt is empty"),
        ({"question": "a"}, "row 2: the columns question fit no format"),
    ],
)
def test_bad_rows_are_named(tokenizer, model, row, message):
    with pytest.raises(fastd2o.DataError, match=message):
        draw(model, tokenizer, [TEXT_ROWS[0], row], instruction=None)


def test_bad_rows_are_left_out_when_asked(tokenizer, model):
    bad = {"prompt": "the cat " * 200, "rejected": " bad"}
    with pytest.warns(
        fastd2o.FastD2OWarning, match=r"dataset: 2 rows that cannot be sampled are left out \(row 1, 3\)"
    ):
        rows = draw(model, tokenizer, [bad, TEXT_ROWS[0], {"prompt": "a"}, TEXT_ROWS[1]], bad_rows="drop")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in TEXT_ROWS[:2]]
    message = "no row with a negative that can be sampled"
    with pytest.warns(fastd2o.FastD2OWarning), pytest.raises(fastd2o.DataError, match=message):
        draw(model, tokenizer, [bad], bad_rows="drop")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"gives token \d+ \(dataset, row \d+\), but the model has embeddings for 8"):
        draw(small, tokenizer, TEXT_ROWS)


def test_no_row_with_a_negative(tokenizer, model):
    with pytest.raises(fastd2o.DataError, match="no row with a negative"):
        draw(model, tokenizer, [{"prompt": "a", "completion": " b", "label": True}])


def test_conversation_without_a_chat_template(model):
    with pytest.raises(ValueError, match="no chat template"):
        draw(model, tiny_tokenizer(chat_template=None), CHAT_ROWS)


def test_template_that_refuses_the_prompt(model):
    tokenizer = tiny_tokenizer("{{ raise_exception('user and assistant must alternate') }}")
    with pytest.raises(fastd2o.DataError, match=r"row 1: the chat template refuses the prompt \(user and assistant"):
        draw(model, tokenizer, CHAT_ROWS)


# --- files ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def write_chunks(monkeypatch, most):
    """From now on a run dies when it would write more than ``most`` chunks. Returns the list of those written."""
    append = files.PartialFile.append
    written: list[int] = []

    def count(self, rows):
        if len(written) == most:
            raise Killed
        append(self, rows)
        written.append(len(rows))

    monkeypatch.setattr(files.PartialFile, "append", count)
    return written


def run_and_die(monkeypatch, chunks, *arguments, **options):
    with monkeypatch.context() as patch:
        write_chunks(patch, chunks)
        with pytest.raises(Killed):
            sample_file(*arguments, progress=False, **options)


def test_rows_per_chunk_fills_batches():
    assert rows_per_chunk(1, 16) == 16
    assert rows_per_chunk(8, 16) == 2
    assert rows_per_chunk(11, 16) == 4
    assert rows_per_chunk(100, 16) == 1
    assert rows_per_chunk(3, 4) == 4


def test_file_holds_what_the_function_returns(tokenizer, model, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    report = sample_file(model, tokenizer, TEXT_ROWS, out, OPTIONS, progress=False)
    assert read_jsonl(out) == draw(model, tokenizer, TEXT_ROWS, batch_size=4)
    assert report.anchors == 3 * len(TEXT_ROWS)
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("damage", ["none", "cut line", "half a chunk", "garbage", "only the header", "empty"])
def test_a_killed_run_goes_on_to_the_same_samples(tokenizer, model, tmp_path, monkeypatch, damage):
    rows = TEXT_ROWS * 2  # 12 rows in 3 chunks of 4
    undisturbed, out = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    expected = sample_file(model, tokenizer, rows, undisturbed, OPTIONS, progress=False)
    run_and_die(monkeypatch, 2, model, tokenizer, rows, out, OPTIONS)
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 8
    kept = {
        "none": lines,
        "cut line": [*lines, lines[-1][:-5]],
        "half a chunk": lines[:7],
        "garbage": [*lines[:8], b"\0\0\0\n", lines[8]],
        "only the header": lines[:1],
        "empty": [],
    }[damage]
    partial.write_bytes(b"".join(kept))
    written = write_chunks(monkeypatch, 99)
    report = sample_file(model, tokenizer, rows, out, OPTIONS, progress=False)
    assert written == [4] * {"none": 1, "cut line": 1, "half a chunk": 2, "garbage": 2}.get(damage, 3)
    assert out.read_bytes() == undisturbed.read_bytes()
    assert report == expected
    assert not partial.exists()


def test_a_run_that_is_killed_twice_leaves_whole_rows(tokenizer, model, tmp_path, monkeypatch):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    run_and_die(monkeypatch, 1, model, tokenizer, TEXT_ROWS, out, OPTIONS)
    whole = partial.read_bytes()
    partial.write_bytes(whole + whole[-40:-5])
    run_and_die(monkeypatch, 0, model, tokenizer, TEXT_ROWS, out, OPTIONS)
    assert partial.read_bytes() == whole


@pytest.mark.parametrize("limit", [100, 1500])
def test_a_full_disk_leaves_what_is_finished(tokenizer, model, tmp_path, limit):
    rows = TEXT_ROWS * 2
    out = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(fastd2o.FastD2OError, match=r"out.jsonl.partial cannot be written: .* Fix: make room"):
            sample_file(model, tokenizer, rows, out, OPTIONS, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    sample_file(model, tokenizer, rows, out, OPTIONS, progress=False)
    assert read_jsonl(out) == draw(model, tokenizer, rows, batch_size=4)


def test_a_run_that_only_lacks_the_renaming_draws_nothing_anew(tokenizer, model, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.tmp").mkdir()  # in the way of the file that is to be renamed
    with pytest.raises(fastd2o.FastD2OError, match=r"out\.jsonl cannot be written: Is a directory"):
        sample_file(model, tokenizer, TEXT_ROWS, out, OPTIONS, progress=False)
    assert not out.exists()
    (tmp_path / "out.jsonl.tmp").rmdir()
    written = write_chunks(monkeypatch, 0)
    sample_file(model, tokenizer, TEXT_ROWS, out, OPTIONS, progress=False)
    assert written == []
    assert len(read_jsonl(out)) == len(TEXT_ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"temperature": 0.7}, "temperature 1.0 instead of 0.7"),
        ({"instruction": "helpful"}, "instruction 'harmless' instead of 'helpful', other dataset"),
        ({"rows": TEXT_ROWS[1:]}, "other dataset"),
        ({"model": 1}, "other model"),
    ],
)
def test_the_beginning_of_another_run_is_refused(tokenizer, model, tmp_path, monkeypatch, change, named):
    out = tmp_path / "out.jsonl"
    run_and_die(monkeypatch, 1, model, tokenizer, TEXT_ROWS, out, OPTIONS)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    rows = change.pop("rows", TEXT_ROWS)
    other = tiny_model(tokenizer, seed=change.pop("model", 0))
    options = SamplingOptions(**{**vars(OPTIONS), **change})
    with pytest.raises(fastd2o.FastD2OError, match=named) as error:
        sample_file(other, tokenizer, rows, out, options, progress=False)
    assert "overwrite=True" in str(error.value)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    sample_file(other, tokenizer, rows, out, options, overwrite=True, progress=False)
    assert [row["anchors"] for row in read_jsonl(out)] == [
        row["anchors"] for row in draw(other, tokenizer, rows, batch_size=4, **change)
    ]


def test_an_existing_file_is_replaced_only_when_asked_and_only_at_the_end(tokenizer, model, tmp_path, monkeypatch):
    out = write_jsonl(tmp_path / "out.jsonl", [{"mine": 1}])
    with pytest.raises(fastd2o.FastD2OError, match=r"exists\. Fix: .* overwrite=True"):
        sample_file(model, tokenizer, TEXT_ROWS, out, OPTIONS, progress=False)
    run_and_die(monkeypatch, 1, model, tokenizer, TEXT_ROWS, out, OPTIONS, overwrite=True)
    assert read_jsonl(out) == [{"mine": 1}]
    written = write_chunks(monkeypatch, 99)
    sample_file(model, tokenizer, TEXT_ROWS, out, OPTIONS, overwrite=True, progress=False)
    assert written == [2]
    assert len(read_jsonl(out)) == len(TEXT_ROWS)


@pytest.mark.parametrize("name", ["folder.jsonl", "out.json"])
def test_places_that_cannot_be_written(tokenizer, model, tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(fastd2o.FastD2OError, match="Fix: "):
        sample_file(model, tokenizer, TEXT_ROWS, tmp_path / name, OPTIONS, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.jsonl"]


def test_nothing_is_left_of_a_run_without_a_usable_sample(tokenizer, tmp_path):
    silent = model_that_says(tokenizer, [tokenizer.eos_token_id])
    with pytest.raises(fastd2o.FastD2OError, match="no usable sample"):
        sample_file(silent, tokenizer, TEXT_ROWS, tmp_path / "out.jsonl", OPTIONS, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_json_lines_in_utf8(tokenizer, model, tmp_path):
    rows = [{"prompt": "say é\u2028", "rejected": " ✗", "id": 1}]
    out = tmp_path / "out.jsonl"
    sample_file(model, tokenizer, rows, out, OPTIONS, progress=False)
    (line,) = Path(out).read_bytes().decode("utf-8").rstrip("\n").split("\n")
    assert json.loads(line)["prompt"] == "say é\u2028"
    assert "é" in line


@pytest.mark.parametrize("name", ["out.jsonl", "link.jsonl"])
def test_the_dataset_is_never_overwritten(tokenizer, model, tmp_path, name):
    dataset = write_jsonl(tmp_path / "out.jsonl", TEXT_ROWS)
    (tmp_path / "link.jsonl").symlink_to(dataset)
    with pytest.raises(fastd2o.FastD2OError, match=r"is the dataset, which .* Fix: choose another file"):
        sample_file(model, tokenizer, dataset, tmp_path / name, OPTIONS, overwrite=True, progress=False)
    assert read_jsonl(dataset) == TEXT_ROWS


def test_a_place_that_cannot_be_written_is_found_before_anything_is_drawn(tokenizer, model, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "file", [])
    written = write_chunks(monkeypatch, 0)
    with pytest.raises(fastd2o.FastD2OError, match="cannot be written: Not a directory") as error:
        sample_file(model, tokenizer, TEXT_ROWS, tmp_path / "file" / "new" / "out.jsonl", OPTIONS, progress=False)
    assert "stay" not in str(error.value)
    assert written == []


def test_checking_the_place_leaves_nothing(tmp_path):
    check_output(tmp_path / "a" / "b" / "out.jsonl", [], overwrite=False)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(b"begun")
    check_output(tmp_path / "out.jsonl", [], overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    assert partial.read_bytes() == b"begun"
