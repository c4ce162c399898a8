"""Anchors that the policy draws while it trains: whose, when, under which weights, and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from fastd2o import DataError, FastD2OError, FastD2OWarning, PreferenceConfig, PreferenceTrainer
from fastd2o.data import Needs, build_dataset
from fastd2o.training.online import seed_of_step
from fastd2o.training.sampling import SamplingOptions, draw_chunks, read_prompts
from fastd2o.training.scoring import Batch
from tests.cli.tiny import CHAT_ROWS, message, tiny_model, tiny_tokenizer
from tests.training import tiny
from tests.training.test_resume import assert_same_run

ROWS = tiny.make_rows(10)
BY_PROMPT = {row["prompt"]: row for row in ROWS}
ONLINE: dict[str, Any] = {
    "objective": "d2o",
    "train_dataset": ROWS,
    "resample_every": 2,
    "online_instruction": "w1 w2",
    "online_max_new_tokens": 6,
}
EPOCHS: dict[str, Any] = {
    **ONLINE,
    "online_after": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 9,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
}
"""Three steps an epoch, the last of a single batch."""
WINDOWS = {1: (1, 2), 3: (3, 4), 5: (5,), 6: (6, 7), 8: (8,)}
"""The steps of each window, by the step of its draw: none reaches over the end of an epoch."""


def drawn(trainer: PreferenceTrainer) -> dict[int, dict[str, dict[str, Any]]]:
    """By step, the rows of its file by their prompt."""
    found = {}
    for path in Path(trainer.args.output_dir, "_online_anchors").iterdir():
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found[int(path.stem.removeprefix("step-").removesuffix("_0"))] = {row["prompt"]: row for row in rows}
    return found


def record_batches(trainer: PreferenceTrainer) -> list[list[Batch]]:
    """The micro-batches of every step, as they will be trained on."""
    steps: list[list[Batch]] = []
    get_batch_samples = trainer.get_batch_samples

    def recording(*args: Any) -> Any:
        batches, counts = get_batch_samples(*args)
        steps.append([Batch(**batch) for batch in batches])
        assert counts.tolist() == sum(batch.counts() for batch in steps[-1]).tolist()  # type: ignore[union-attr]
        return batches, counts

    trainer.get_batch_samples = recording  # type: ignore[method-assign, assignment]
    return steps


def completions(batch: Batch, rows: Tensor) -> list[tuple[str, str]]:
    """Prompt and completion of some rows of a batch."""
    tokenizer: Any = tiny.make_tokenizer()

    def text(ids: Tensor) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    scored = batch.labels != -100
    prompt = batch.attention_mask.bool() & ~scored
    return [(text(batch.input_ids[row][prompt[row]]), text(batch.input_ids[row][scored[row]])) for row in rows.tolist()]


def metrics(trainer: PreferenceTrainer, name: str) -> list[float]:
    return [entry[f"online/{name}"] for entry in trainer.state.log_history if f"online/{name}" in entry]


def assert_same_online_run(trainer: PreferenceTrainer, expected: PreferenceTrainer) -> None:
    for entry in (*trainer.state.log_history, *expected.state.log_history):
        entry.pop("online/seconds", None)
    assert_same_run(trainer, expected)


def train(out: Path, **options: Any) -> PreferenceTrainer:
    trainer = tiny.make_trainer(out, **{**ONLINE, **options})
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreferenceTrainer, list[list[Batch]]]:
    torch.set_num_threads(1)
    trainer = tiny.make_trainer(tmp_path_factory.mktemp("online"), **EPOCHS)
    steps = record_batches(trainer)
    trainer.train()
    return trainer, steps


# --- what is trained on -----------------------------------------------------------------------------------------------


def test_every_window_trains_on_what_was_drawn_for_its_own_rows(run):
    trainer, steps = run
    files = drawn(trainer)
    assert files.keys() == WINDOWS.keys()
    assert len(steps) == 9
    for begin, window in {0: (0,), **WINDOWS}.items():
        expected, seen = files.get(begin, BY_PROMPT), set()
        for batch in (batch for step in window for batch in steps[step]):
            for negative, positives in zip(batch.negative_row, batch.positive_rows, strict=True):
                ((prompt, rejected),) = completions(batch, negative[None])
                anchors = completions(batch, positives[positives >= 0])
                assert rejected == BY_PROMPT[prompt]["rejected"].strip()
                # Under the prompt as it is: the instruction was for generation only.
                assert anchors == [(prompt, anchor.strip()) for anchor in expected[prompt]["anchors"]]
                assert len(anchors) == len(BY_PROMPT[prompt]["anchors"])
                seen.add(prompt)
        assert begin == 0 or seen == files[begin].keys()


def test_anchors_come_from_the_weights_at_the_draw(run):
    trainer, _ = run
    tokenizer: Any = trainer.processing_class
    for step, rows in drawn(trainer).items():
        policy = AutoModelForCausalLM.from_pretrained(Path(trainer.args.output_dir) / f"checkpoint-{step}")
        options = SamplingOptions(4, "w1 w2", max_new_tokens=6, seed=seed_of_step(trainer.args.seed, step))
        prompts, _ = read_prompts(ROWS, policy, tokenizer, options)
        chunks = draw_chunks(policy, tokenizer, prompts, options, progress=False)
        expected = {row.data["prompt"]: row.data for chunk in chunks for row in chunk}
        for prompt, row in rows.items():
            assert row["anchors"] == expected[prompt]["anchors"][: len(row["anchors"])]


def test_every_draw_draws_anew(tmp_path):
    """From the same weights too."""
    trainer = train(tmp_path, learning_rate=0.0, max_steps=3, resample_every=1, train_dataset=ROWS[:4])
    anchors = [tuple(row["anchors"]) for rows in drawn(trainer).values() for row in rows.values()]
    assert len(set(anchors)) == len(anchors) == 12


def test_references_are_those_of_the_frozen_model(run):
    trainer, steps = run
    assert steps[0][0].ref_logp is None
    for batch in (batch for step in steps[1:] for batch in step):
        assert batch.ref_logp is not None
        expected = trainer.references.helpful(batch)
        assert torch.allclose(batch.ref_logp, expected, rtol=1e-5)
    first, *later = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert later
    assert abs(first - 0.693147) > 1e-3  # the policy has left its reference


def test_every_draw_is_logged(run):
    trainer, _ = run
    assert metrics(trainer, "not_drawn") == [0.0] * 3
    assert metrics(trainer, "given_up") == [0.0] * 3
    tokenizer: Any = trainer.processing_class
    windows = {0: (1,), 1: (3, 5), 2: (6, 8)}  # by the log that they end up in
    for place, begins in windows.items():
        rows = [row for begin in begins for row in drawn(trainer)[begin].values()]
        lengths, cut = [], []
        for row in rows:
            group = build_dataset([row], tokenizer, needs=Needs.PAIR, positives="anchors").groups[0]
            lengths += [len(group.sequences[positive].completion_ids) for positive in group.positives]
            cut += row["anchor_cut"]
        assert metrics(trainer, "length")[place] == pytest.approx(sum(lengths) / len(lengths))
        assert metrics(trainer, "cut")[place] == pytest.approx(sum(cut) / len(cut))
    assert "| resample_every | 2 |" in trainer._model_card().content


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "begins"), [(1, {1, 3, 5, 6, 8}), (2, {3, 5, 6, 8}), (6, {6, 8}), (7, {8})])
def test_resumed_run_ends_with_the_same_bits(run, tmp_path, step, begins):
    """From before the first draw, inside windows, and at the end of an epoch."""
    whole, _ = run
    trainer = tiny.make_trainer(tmp_path, **EPOCHS)
    trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert_same_online_run(trainer, whole)
    assert drawn(trainer) == {begin: rows for begin, rows in drawn(whole).items() if begin in begins}


class DieInStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_died_goes_on_in_its_folder(run, tmp_path):
    """It died after a draw that no checkpoint has."""
    whole, _ = run
    with pytest.raises(KeyboardInterrupt):
        tiny.make_trainer(tmp_path, **{**EPOCHS, "save_steps": 2}, callbacks=[DieInStep(3)]).train()
    trainer = tiny.make_trainer(tmp_path, **{**EPOCHS, "save_steps": 2})
    assert drawn(trainer).keys() == {1, 3}
    trainer.train(resume_from_checkpoint=True)
    assert_same_online_run(trainer, whole)
    assert drawn(trainer) == drawn(whole)


def test_other_batches_after_a_resume_are_drawn_for(run, tmp_path):
    whole, _ = run
    trainer = tiny.make_trainer(tmp_path, **{**EPOCHS, "per_device_train_batch_size": 3, "max_steps": 4})
    steps = record_batches(trainer)
    trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    prompts = {completions(batch, batch.negative_row[:1])[0][0] for batch in steps[0]}
    assert prompts <= drawn(trainer)[3].keys()


def test_a_new_run_starts_with_an_empty_folder(run, tmp_path):
    stale = tmp_path / "_online_anchors" / "step-99_0.jsonl"
    stale.parent.mkdir()
    stale.write_text("{}\n")
    trainer = train(tmp_path, max_steps=1)
    assert drawn(trainer).keys() == {0}


# --- references and models --------------------------------------------------------------------------------------------


def test_precomputed_and_given_references(tmp_path):
    """All ways to the same values."""

    def anchors(trainer: PreferenceTrainer) -> list[list[str]]:
        return [row["anchors"] for rows in drawn(trainer).values() for row in rows.values()]

    reference = tiny.make_model(1)
    options = {"ref_model": reference, "online_after": 1}
    plain = train(tmp_path / "plain", **options)
    stored = train(tmp_path / "stored", precompute_ref_log_probs=True, **options)
    rows = [{name: row[name] for name in ("prompt", "rejected", "anchors")} for row in ROWS]
    groups = plain.references.score(plain.train_dataset, plain.data_collator, 4).groups
    for row, group in zip(rows, groups, strict=True):
        row["ref_rejected_logps"] = group.sequences[0].ref_logp
        row["ref_anchor_logps"] = [group.sequences[positive].ref_logp for positive in group.positives]
    columns = train(tmp_path / "columns", **options, train_dataset=rows)
    for other in (stored, columns):
        assert tiny.losses(other) == pytest.approx(tiny.losses(plain), rel=1e-5)
        assert anchors(other) == anchors(plain)
    with pytest.raises(ValueError, match=r"anchors that resample_every draws.*Fix: give the model .* as ref_model"):
        tiny.make_trainer(tmp_path / "none", **{**ONLINE, "train_dataset": rows})


def test_precomputing_keeps_the_model_before_training_apart(tmp_path):
    trainer = train(tmp_path, precompute_ref_log_probs=True)
    assert trainer.references.helpful is not None
    reference: Any = trainer.references.helpful.model
    assert reference is not trainer.model
    assert torch.equal(reference.lm_head.weight, tiny.make_model().lm_head.weight)


def test_harmful_reference_scores_the_drawn_anchors(tmp_path):
    trainer = tiny.make_trainer(tmp_path, **ONLINE, harmful_ref_model=tiny.make_model(1))
    steps = record_batches(trainer)
    trainer.train()
    harmful = trainer.references.harmful
    assert harmful is not None
    for batch in (batch for step in steps for batch in step):
        assert batch.harmful_ref_logp is not None
        assert torch.allclose(batch.harmful_ref_logp, harmful(batch), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:the model came with an adapter:fastd2o.FastD2OWarning")
def test_an_adapter_under_gradient_checkpointing_draws_with_a_cache(tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = tiny.make_trainer(tmp_path, **ONLINE, peft_config=lora, gradient_checkpointing=True)
    steps, read = record_batches(trainer), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() and kwargs.get("use_cache"):
            read.append(kwargs["input_ids"].shape[1])

    adapted: Any = trainer.model
    adapted.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    assert read.count(1) > len(read) / 2  # after the prompt, one token at a time
    base = tiny.make_model().eval()
    for batch in (batch for step in steps for batch in step):
        assert batch.ref_logp is not None
        assert torch.allclose(batch.ref_logp, completion_logp(base, batch), rtol=1e-4)


def completion_logp(model: Any, batch: Batch) -> Tensor:
    """[S] log-probability of every completion, the long way."""
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    labels = batch.labels[:, 1:]
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logp * (labels != -100)).sum(1)


def test_modes_are_restored(tmp_path):
    trainer = tiny.make_trainer(tmp_path, **ONLINE)
    trainer.state.max_steps = 3
    model: Any = trainer.model
    model.train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert [module.training for module in model.modules()] == before
    assert drawn(trainer).keys() == {0}


def test_other_sequences_of_a_group_stay(tmp_path):
    """KTO's completion under another prompt."""
    trainer = tiny.make_trainer(tmp_path, **{**ONLINE, "objective": ["d2o", "kto"]})
    steps = record_batches(trainer)
    trainer.train()
    own = {group.line: group.sequences[-1].input_ids for group in trainer.train_dataset.groups}
    for batch in (batch for step in steps for batch in step):
        rows = (~batch.negative & ~batch.positive).nonzero()[:, 0]
        ids = [tuple(batch.input_ids[row][batch.attention_mask[row].bool()].tolist()) for row in rows]
        assert ids == [own[line] for line in batch.line.tolist()]


def test_conversations(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{**row, "anchors": [message("assistant", "kind"), message("assistant", "good")]} for row in CHAT_ROWS]
    options: dict[str, Any] = {
        "objective": "d2o",
        "max_steps": 1,
        "resample_every": 1,
        "online_max_new_tokens": 6,
    }
    config = PreferenceConfig(str(tmp_path), use_cpu=True, save_strategy="no", logging_steps=1, **options)
    trainer = PreferenceTrainer(tiny_model(tokenizer, context=512), config, iter(rows), tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["d2o/valid_k"] == 2
    (path,) = (tmp_path / "_online_anchors").iterdir()
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        assert [[said["role"] for said in anchor] for anchor in row["anchors"]] == [["assistant"]] * 2


# --- samples of little use --------------------------------------------------------------------------------------------


def test_repeated_samples_are_kept_once_and_counted(tmp_path):
    trainer = train(tmp_path, online_temperature=1e-6, max_steps=1)
    assert all(len(row["anchors"]) == len(row["anchor_cut"]) == 1 for row in drawn(trainer)[0].values())
    rows = [BY_PROMPT[prompt] for prompt in drawn(trainer)[0]]
    asked = sum(len(row["anchors"]) for row in rows)
    assert metrics(trainer, "duplicates") == [pytest.approx((asked - len(rows)) / asked)]
    assert trainer.state.log_history[0]["d2o/valid_k"] == 1


def test_rows_without_a_useful_sample_keep_their_anchors(tmp_path):
    model: Any = tiny.make_model()
    trainer = tiny.make_trainer(tmp_path, **{**ONLINE, "model": model, "max_steps": 1, "train_dataset": ROWS[:4]})

    def nothing_but_the_end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs.get("use_cache"):  # in generation alone
            output.logits = torch.full_like(output.logits, -1e4).index_fill(-1, torch.tensor([2]), 0.0)

    model.register_forward_hook(nothing_but_the_end, with_kwargs=True)
    steps = record_batches(trainer)
    with pytest.warns(FastD2OWarning, match="no sample of step 0 is of use as an anchor"):
        trainer.train()
    assert metrics(trainer, "not_drawn") == metrics(trainer, "given_up") == [1.0]
    ((batch,),) = steps
    anchors = [completion for _, completion in completions(batch, batch.positive.nonzero()[:, 0])]
    assert sorted(anchors) == sorted(anchor.strip() for row in ROWS[:4] for anchor in row["anchors"])


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"online_after": 3}, "online_after is set, but no anchors are drawn in training. Fix: set resample_every"),
        ({"resample_every": 0}, "resample_every is 0, expected a number of steps, at least 1"),
        ({"resample_every": 2, "online_after": -1}, "online_after is -1, expected a number of steps, 0 or more"),
        ({"resample_every": 2, "objective": "npo"}, "draws anchors for d2o, but the objective is npo. Fix: obj"),
        ({"resample_every": 2, "positives": "chosen"}, "leaves anchors unused. Fix: positives='anchors'"),
        ({"resample_every": 2, "online_temperature": 0.0}, "online_temperature is 0.0; expected a number above 0"),
        ({"resample_every": 2, "online_instruction": "harmles"}, "online_instruction is 'harmles'.*Fix: 'harmless'"),
        ({"resample_every": 2, "online_max_new_tokens": 0}, "online_max_new_tokens is 0; expected at least 1"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig("out", **options)


def test_weights_in_parts(tmp_path):
    trainer = tiny.make_trainer(tmp_path, **ONLINE)
    trainer.is_fsdp_enabled = True
    with pytest.raises(FastD2OError, match=r"which FSDP and DeepSpeed may have shared out. Fix: train under DDP"):
        trainer._online_anchors(ROWS)


def test_a_model_without_an_end_of_text(tmp_path):
    tokenizer: Any = tiny.make_tokenizer()
    tokenizer.eos_token = None
    config = PreferenceConfig(str(tmp_path), resample_every=2, online_max_new_tokens=6, use_cpu=True)
    with pytest.raises(FastD2OError, match=r"no anchor that resample_every draws would ever end.*Fix: set tokenizer"):
        PreferenceTrainer(tiny.make_model(eos_token_id=None), config, ROWS, tokenizer)


def test_data_that_cannot_be_drawn_for(tmp_path):
    built = build_dataset(ROWS, tiny.make_tokenizer(), needs=Needs.PAIR)
    with pytest.raises(ValueError, match=r"the train dataset is tokenised.*Fix: give the rows"):
        tiny.make_trainer(tmp_path, **{**ONLINE, "train_dataset": built})
    with pytest.raises(
        DataError, match=r"resample_every .*: dataset, row 1: the prompt has \d+ tokens \(instruction included\)"
    ):
        tiny.make_trainer(tmp_path, **{**ONLINE, "online_max_new_tokens": 60})
    with pytest.raises(DataError, match=r"no row is left; each needs a negative and a positive.*fastd2o sample"):
        tiny.make_trainer(tmp_path, **{**ONLINE, "train_dataset": tiny.make_rows(4, anchors=False)})
