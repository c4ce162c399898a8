"""The demo at a reduced size, and the parts of it that its claims rest on."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fastd2o.cli import main
from fastd2o.cli.demo import Settings, claim_folder, play
from fastd2o.cli.demo_measure import measure_head
from fastd2o.cli.demo_world import GOOD_OTHERWISE, GOOD_WHEN_INSTRUCTED, World, load_world
from fastd2o.errors import FastD2OError

SMALL: dict[str, Any] = {"tasks": 16, "conversations": 4000, "questions_per_task": 6, "num_anchors": 3, "steps": 30}
TINY: dict[str, Any] = {
    "tasks": 10,
    "conversations": 48,
    "questions_per_task": 1,
    "num_anchors": 2,
    "steps": 2,
    "samples": 1,
}


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


def records(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_demo_unlearns_and_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "demo"
    play(Settings(out, **SMALL))

    before, after = records(out, "model")
    assert (before["model"], after["model"]) == ("start", "d2o")
    assert before["bad_rate"] > 0.15
    assert after["bad_rate"] < 0.7 * before["bad_rate"]
    assert after["bad_logprob"] < before["bad_logprob"] - 1
    assert after["good_perplexity"] < 1.3 * before["good_perplexity"]

    curve = records(out, "curve")
    assert [point["step"] for point in curve] == list(range(31))
    assert curve[0]["bad_logprob"] == pytest.approx(before["bad_logprob"])
    assert curve[-1]["bad_logprob"] == pytest.approx(after["bad_logprob"])
    own, large = records(out, "head_memory")
    assert large["vocabulary"] == 128_256
    assert large["fused"] < large["full"] / 5
    assert own["tokens"] == large["tokens"]

    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report.png").stat().st_size > 50_000
    printed = capsys.readouterr().out
    assert f"{before['bad_rate']:.1%}" in printed
    assert f"{after['bad_rate']:.1%}" in printed

    anchors = rows(out / "anchors.jsonl")
    assert all(len(row["anchors"]) == 3 and "chosen" not in row for row in anchors)
    assert [row["prompt"] for row in anchors] == [row["prompt"] for row in rows(out / "negatives.jsonl")]
    for model in ("start", "model"):
        assert (out / model / "model.safetensors").is_file()
        assert (out / model / "chat_template.jinja").is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_a_rerun_replaces_only_the_demo(tmp_path):
    out = tmp_path / "demo"
    play(Settings(out, compare=True, keep=True, **TINY))
    first = (out / "metrics.jsonl").read_text(encoding="utf-8")
    assert [line["model"] for line in records(out, "model")] == ["start", "d2o", "dpo", "npo", "gradient_ascent"]
    assert {path.name for path in (out / "compared").iterdir()} == {"dpo", "npo", "gradient_ascent"}

    (out / "mine.txt").write_text("keep me")
    play(Settings(out, compare=True, **TINY))
    assert (out / "mine.txt").read_text() == "keep me"
    assert not (out / "compared").exists()
    second = (out / "metrics.jsonl").read_text(encoding="utf-8")
    assert second.splitlines()[1:] == first.splitlines()[1:]  # the first line holds the settings


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "report.png").write_text("somebody's")
    with pytest.raises(FastD2OError, match="holds files that no demo wrote"):
        claim_folder(tmp_path)
    assert (tmp_path / "report.png").read_text() == "somebody's"
    with pytest.raises(FastD2OError, match="is a file"):
        claim_folder(tmp_path / "report.png")


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--seed", "-1"), ("--learning_rate", "0.0")])
def test_a_number_out_of_range_is_told_before_anything_is_done(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", option, value]) == 1
    assert f"{option} is {value}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_rule_finds_every_bad_answer_and_no_other_sentence(world):
    for task in world.tasks:
        assert all(world.is_bad(task.fill(answer)) for answer in world.bad_answers)
        assert not any(world.is_bad(task.fill(text)) for text in (*world.good_answers, *world.questions))
        assert all(world.is_helpful(task, task.fill(answer)) for answer in world.good_answers)


def test_an_answer_about_another_task_is_not_helpful(world):
    for task, other in product(world.tasks[:20], world.tasks[20:40]):
        assert not world.is_helpful(task, other.fill(world.good_answers[0]))


def test_the_world_is_large_enough_and_its_tasks_differ(world):
    assert len(world.tasks) * len(world.questions) > 1000
    for field in ("name", "first", "second"):
        assert max(Counter(getattr(task, field) for task in world.tasks).values()) == 1
    for sentences in (world.questions, world.good_answers, world.bad_answers):
        assert len(set(sentences)) == len(sentences)


def test_lessons_are_judged_by_tasks_and_wordings_that_none_was_learned_from(world):
    learned, judged = world.lessons(random.Random(0), per_task=3, held_out=0.2)
    assert len(learned) + len(judged) == 3 * len(world.tasks)
    assert len(judged) == pytest.approx(0.2 * 3 * len(world.tasks), abs=3)
    assert not {lesson.task for lesson in learned} & {lesson.task for lesson in judged}

    def wordings(lessons):
        return {lesson.bad.replace(lesson.task.name, "{task}") for lesson in lessons}

    assert not wordings(learned) & wordings(judged)
    assert learned[0].row().keys() == {"prompt", "chosen", "rejected"}


def test_the_instruction_is_a_signal_and_held_out_exchanges_are_left_out(world):
    small = replace(world, tasks=world.tasks[:5])
    _, judged = small.lessons(random.Random(0), per_task=5, held_out=0.4)
    good: dict[bool, list[bool]] = {True: [], False: []}
    exchanges = set()
    for messages in small.conversations(random.Random(1), 5000, judged):
        instructed = messages[0]["role"] == "system"
        question, answer = (message["content"] for message in messages[-2:])
        good[instructed].append(not world.is_bad(answer))
        exchanges.add((question, answer))
    assert sum(good[True]) / len(good[True]) == pytest.approx(GOOD_WHEN_INSTRUCTED, abs=0.03)
    assert sum(good[False]) / len(good[False]) == pytest.approx(GOOD_OTHERWISE, abs=0.04)
    for lesson in judged:
        assert (lesson.question, lesson.good) not in exchanges
        assert (lesson.question, lesson.bad) not in exchanges


def test_the_measured_peaks_are_those_of_the_tensors_that_must_be_there():
    tokens, hidden_size, vocabulary = 256, 8, 60_000
    generator = torch.Generator().manual_seed(0)
    memory = measure_head(
        torch.randn(tokens, hidden_size, generator=generator),
        torch.randn(vocabulary, hidden_size, generator=generator),
        torch.randint(vocabulary, (tokens,), generator=generator),
    )
    plane = 4 * tokens * vocabulary
    assert (memory.tokens, memory.vocabulary) == (tokens, vocabulary)
    # Log-softmax, its gradient, and the gradient of the logits.
    assert 3 * plane <= memory.full < 3.1 * plane
    assert memory.fused < plane
