"""Rounds from beginning to end: what they leave, how they go on, and where they stop with nothing lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastd2o import DataError, FastD2OError, PreferenceConfig
from fastd2o.training.generators import import_vllm
from fastd2o.training.rounds import RoundsConfig, driver, read_records, run_rounds
from fastd2o.training.sampling import SamplingOptions, sample_anchors
from tests.cli.tiny import TEXT_ROWS, read_jsonl, save_tiny_model, write_jsonl

TRAIN = {
    "use_cpu": True,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and prompts."""
    folder = tmp_path_factory.mktemp("rounds")
    save_tiny_model(folder / "model")
    write_jsonl(folder / "prompts.jsonl", TEXT_ROWS)
    return folder


def make_config(place: Path, **options: Any) -> RoundsConfig:
    """A configuration of one round of Iterative DPO, but for what is given."""
    train = {**TRAIN, "objective": "dpo", **options.pop("train", {})}
    defaults: dict[str, Any] = {
        "model": str(place / "model"),
        "dataset": str(place / "prompts.jsonl"),
        "rounds": 1,
        "num_samples": 3,
        "builder": "pairs",
        "scorer": {"function": "tests.training.scorers:letters"},
        "sampling": {"max_new_tokens": 6},
    }
    return RoundsConfig(**{**defaults, **options}, train=train)


@pytest.fixture
def make(place: Path, tmp_path: Path) -> Callable[..., RoundsConfig]:
    """``make_config`` in a folder of its own."""
    return lambda **options: make_config(place, **{"output_dir": str(tmp_path / "out"), **options})


@pytest.fixture
def loaded(monkeypatch) -> weakref.WeakSet[Any]:
    """Every model that the driver has loaded and that is still in memory."""
    models: weakref.WeakSet[Any] = weakref.WeakSet()
    load = driver._Run._load

    def remembered(self: driver._Run, name: str) -> Any:
        models.add(model := load(self, name))
        return model

    monkeypatch.setattr(driver._Run, "_load", remembered)
    return models


@pytest.fixture(scope="module")
def two_rounds(place: Path) -> RoundsConfig:
    """Two rounds without interruption."""
    torch.set_num_threads(1)
    config = make_config(place, rounds=2, output_dir=str(place / "two"))
    run_rounds(config)
    return config


def weights(config: RoundsConfig, round_: int) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / f"round-{round_}" / "model" / "model.safetensors")


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def files(config: RoundsConfig) -> list[str]:
    folder = Path(config.output_dir)
    kept = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in kept if "model" not in path.parts and path.name != ".lock")


def state(config: RoundsConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "state.json").read_text(encoding="utf-8"))


# --- what a run is ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_rounds_and_can_be_made_longer(make, two_rounds):
    config = make()
    said: list[str] = []
    records = run_rounds(config, say=said.append)
    assert said == [f"round 1: {phase}" for phase in ("sample", "score", "measure", "build", "train")] + [
        f"round 2: {phase}" for phase in ("sample", "score", "measure")
    ]
    first = [f"round-1/{name}" for name in ("build.json", "groups.jsonl", "measures.json", "samples.jsonl")]
    first += ["round-1/sampling.json", "round-1/scored.jsonl", "round-1/training.json"]
    last = [f"round-2/{name}" for name in _MEASURED]
    assert files(config) == ["report.html", *first, *last, "state.json"]
    assert (state(config)["phase"], state(config)["stopped"]) == ("finished", None)
    assert [record.training is not None for record in records] == [True, False]
    assert records[0].measures.kl == 0.0 != records[1].measures.kl
    assert records[0].measures.samples == 3 * len(TEXT_ROWS)
    assert records == read_records(config.output_dir)

    said.clear()
    run_rounds(config, say=said.append)
    assert said == []
    longer = replace(config, rounds=2)
    run_rounds(longer, say=said.append)
    assert said[0] == "round 2: build"
    assert_same_weights(weights(longer, 2), weights(two_rounds, 2))
    assert read_records(longer.output_dir) == read_records(two_rounds.output_dir)

    page = (Path(config.output_dir) / "report.html").read_text(encoding="utf-8")
    assert "2 of 2 rounds trained" in page
    assert page.count("<svg") == 1
    assert not re.search(r'(?:src|href)="(?!#)', page)  # nothing is fetched
    for row in read_jsonl(Path(config.output_dir) / "round-3" / "scored.jsonl"):
        assert f"{row['scores'][0]:.3g}" in page


def test_samples_are_those_of_fastd2o_sample_and_scores_stand_beside_them(make, place):
    config = make(sampling={"max_new_tokens": 6, "seed": 5})
    run_rounds(config)
    for round_, folder in ((1, place / "model"), (2, Path(config.output_dir) / "round-1" / "model")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        expected = sample_anchors(
            model,
            tokenizer,
            [{"prompt": row["prompt"], "rejected": "none that it would say"} for row in TEXT_ROWS],
            num_anchors=3,
            instruction=None,
            max_new_tokens=6,
            seed=5 + round_ - 1,
            progress=False,
        )
        rows = read_jsonl(Path(config.output_dir) / f"round-{round_}" / "scored.jsonl")
        assert [row["completions"] for row in rows] == [row["anchors"] for row in expected]
        assert [row["cut"] for row in rows] == [row["anchor_cut"] for row in expected]
        assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]
        for row in rows:
            assert row["scores"] == [text.count("e") - len(text) / 100 for text in row["completions"]]


def test_anchors_are_drawn_under_an_instruction_unless_told_otherwise(make):
    d2o = make(builder="anchors", train={"objective": "d2o"})
    assert d2o.sampling_options(1).instruction == "harmless"
    assert make().sampling_options(1).instruction is None
    assert make(sampling={"instruction": "Be kind."}).sampling_options(1).instruction == "Be kind."


def test_anchors_that_repeat_one_another_are_kept_once_and_counted(make):
    config = make(builder="anchors", train={"objective": "d2o"}, sampling={"max_new_tokens": 6, "temperature": 1e-5})
    records = run_rounds(config)
    rows = read_jsonl(Path(config.output_dir) / "round-1" / "groups.jsonl")
    assert [row["rejected"] for row in rows] == [row["rejected"] for row in TEXT_ROWS]
    assert all(len(row["anchors"]) == len(row["anchor_cut"]) == 1 for row in rows)
    assert records[0].counts == {"prompts": 6, "groups": 6, "anchors": 6, "duplicates": 12}
    assert records[0].measures.duplicates == pytest.approx(2 / 3)


def test_labels_beside_rows_of_ones_own(make, place):
    base = write_jsonl(
        place / "base.jsonl", [{"prompt": "what do you think", "completion": " a kind thing", "label": True}]
    )
    config = make(
        builder="labels",
        threshold=0.5,
        base_dataset=str(base),
        scorer={"patterns": ["[aeiou]"]},
        num_samples=1,
        train={"objective": "cringe"},
    )
    with pytest.raises(FastD2OError, match=r"all 6 completions are bad by threshold=0\.5"):
        run_rounds(config)
    config = make(
        builder="labels",
        threshold=0.0,
        base_dataset=str(base),
        scorer={"patterns": ["e"]},
        output_dir=config.output_dir + " too",
        train={"objective": "cringe"},
    )
    records = run_rounds(config)
    rows = read_jsonl(Path(config.output_dir) / "round-1" / "groups.jsonl")
    assert rows[-1] == read_jsonl(base)[0]
    assert records[0].counts is not None
    assert records[0].counts["rows of base_dataset"] == 1
    assert len(rows) == 2 * records[0].counts["kept of each"] + 1


def test_the_reference_of_a_round(make, tmp_path):
    """The loss of a first step is ln 2 where policy and reference are the same model, and only there."""
    first_losses = {}
    for reference in ("original", "previous"):
        config = make(
            rounds=2,
            reference=reference,
            output_dir=str(tmp_path / reference),
            train={"max_steps": 1, "learning_rate": 0.01},
        )
        first_losses[reference] = [record.training["loss"] for record in run_rounds(config) if record.training]
    assert first_losses["previous"] == pytest.approx([0.6931, 0.6931], abs=1e-4)
    assert first_losses["original"][0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(first_losses["original"][1] - 0.6931) > 1e-3


def test_the_optimizer_is_kept_if_asked(make, two_rounds):
    kept = make(rounds=2, optimizer="keep")
    run_rounds(kept)
    assert_same_weights(weights(kept, 1), weights(two_rounds, 1))
    assert any(not torch.equal(tensor, weights(two_rounds, 2)[name]) for name, tensor in weights(kept, 2).items())
    out = Path(kept.output_dir)
    assert not (out / "round-1" / "optimizer.safetensors").exists()
    state = load_file(out / "round-2" / "optimizer.safetensors")
    assert {float(tensor) for name, tensor in state.items() if name.endswith(".step")} == {4.0}  # of both rounds


# --- where it stops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "told"),
    [
        ("raises", "the scorer failed on the prompt of .*, line 3: RuntimeError: no credit left"),
        ("nan", "the scorer gave nan for completion 2 of the prompt of .*, line 3"),
        ("too_few", "the scorer gave 2 scores for the 3 completions of the prompt of .*, line 3"),
    ],
)
def test_a_scorer_that_fails_loses_nothing(make, monkeypatch, scorer, told):
    from tests.training import scorers

    config = make(scorer={"function": f"tests.training.scorers:{scorer}"})
    with pytest.raises(FastD2OError, match=rf"{told}.*Every finished sample and score is kept"):
        run_rounds(config)
    assert (state(config)["round"], state(config)["phase"]) == (1, "score")
    assert re.search(told, state(config)["stopped"])
    folder = Path(config.output_dir) / "round-1"
    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 6
    assert [row["line"] for row in read_jsonl(folder / "scored.jsonl.partial")[1:]] == [1, 2]

    if scorer != "raises":
        return
    scorers.calls.clear()
    monkeypatch.setattr(scorers, scorer, scorers.remembers)  # mended
    run_rounds(config)
    assert [batch[0]["prompt"] for batch in scorers.calls[:4]] == [row["prompt"] for row in TEXT_ROWS[2:]]
    assert read_jsonl(folder / "samples.jsonl") == samples
    assert not (folder / "scored.jsonl.partial").exists()


def test_a_training_that_cannot_work_is_mended_without_sampling_again(make, two_rounds):
    """As long as nothing is trained, ``train`` may change."""
    with pytest.raises(DataError, match="max_length"):
        run_rounds(make(rounds=2, train={"max_length": 2}))
    out = Path(make().output_dir)
    drawn = (out / "round-1" / "samples.jsonl").stat().st_mtime_ns
    run_rounds(make(rounds=2))
    assert (out / "round-1" / "samples.jsonl").stat().st_mtime_ns == drawn
    assert_same_weights(weights(make(), 2), weights(two_rounds, 2))
    with pytest.raises(FastD2OError, match=r"train was .* and train for as long as nothing is trained"):
        run_rounds(make(rounds=3, train={"max_steps": 3}))


def test_only_ties(make):
    config = make(scorer={"patterns": ["never said"]})
    with pytest.raises(FastD2OError, match="6 of 6 prompts yield only ties"):
        run_rounds(config)
    assert files(config) == ["report.html", *(f"round-1/{name}" for name in _MEASURED), "state.json"]
    assert "only ties" in state(config)["stopped"]


_MEASURED = ("measures.json", "samples.jsonl", "sampling.json", "scored.jsonl")


def test_a_limit_stops_the_run_and_another_lets_it_go_on(make, two_rounds):
    config = make(limits={"max_length_ratio": 9.0, "max_kl": 1e-9}, rounds=2)
    with pytest.raises(FastD2OError, match=r"round 2: the samples show a collapse: .* past limits: max_kl=1e-09"):
        run_rounds(config)
    assert (state(config)["round"], state(config)["phase"]) == (2, "measure")
    free = replace(config, limits={})
    run_rounds(free)
    assert_same_weights(weights(free, 2), weights(two_rounds, 2))


def test_another_configuration_is_refused(make, place, tmp_path):
    config = make()
    with pytest.raises(FastD2OError, match="only ties"):
        run_rounds(replace(config, scorer={"patterns": ["never said"]}))
    before = files(config)
    with pytest.raises(
        FastD2OError, match=r"is of another run: scorer was .*never said.*, now is .*letters.* Fix: give"
    ):
        run_rounds(config)
    rows = write_jsonl(tmp_path / "prompts.jsonl", TEXT_ROWS)
    moved = make(dataset=str(rows), output_dir=str(tmp_path / "moved"), scorer={"patterns": ["never said"]})
    with pytest.raises(FastD2OError, match="only ties"):
        run_rounds(moved)
    write_jsonl(rows, TEXT_ROWS[1:])
    with pytest.raises(FastD2OError, match=r"is of another run: rows of dataset was \w+, now is \w+"):
        run_rounds(moved)
    (Path(config.output_dir) / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(FastD2OError, match=r"state\.json' cannot be read .* Fix: choose another output_dir"):
        run_rounds(config)
    assert files(config) == before


def test_a_folder_of_others_is_left_alone(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(FastD2OError, match="holds files that no run of rounds wrote"):
        run_rounds(make())
    with pytest.raises(FastD2OError, match="is a file"):
        run_rounds(make(output_dir=str(tmp_path / "out" / "mine.txt")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_folder_is_one_process_s_alone(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FastD2OError, match="another process is at work in output_dir"):
            run_rounds(make(rounds=1))
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
    run_rounds(make(rounds=1))


def test_a_kill_in_the_first_moment_leaves_a_folder_to_begin_in(make, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".lock", "state.json.tmp"):
        (tmp_path / "out" / name).write_text("")
    run_rounds(make())


def test_models_are_let_go_between_phases(make, loaded):
    run_rounds(make(rounds=2, reference="original"), say=lambda phase: loaded and pytest.fail(f"{len(loaded)} {phase}"))
    assert not loaded


def test_several_devices_are_refused_before_anything_is_drawn(make, monkeypatch, tmp_path):
    monkeypatch.setattr(PreferenceConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(FastD2OError, match=r"torch sees 2\. Fix: CUDA_VISIBLE_DEVICES=0"):
        run_rounds(make())
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_end(make, place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.eos_token = tokenizer.chat_template = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(FastD2OError, match=r"nor its tokenizer has an EOS token, .* Fix: set eos_token_id"):
        run_rounds(make(model=str(tmp_path / "endless")))


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([{"prompt": ""}], {}, "line 1: the prompt is empty"),
        ([{"prompt": ""}], {"sampling": {"bad_rows": "drop"}}, "has no row with a prompt that can be sampled"),
        ([{"question": "a"}], {}, "line 1: the columns question fit no format"),
        ([{"prompt": "a", "chosen": " b"}], {"builder": "anchors"}, "fit no format"),
        (
            [{"prompt": "a", "completion": " b", "label": True}],
            {"builder": "anchors", "train": {"objective": "d2o"}},
            "has no row with a negative",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::fastd2o.FastD2OWarning")
def test_prompts_that_cannot_be_used(make, tmp_path, rows, options, told):
    config = make(dataset=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **options)
    with pytest.raises(DataError, match=told):
        run_rounds(config)
    assert not Path(config.output_dir).exists()


def test_a_prompt_alone_is_enough(make, tmp_path):
    config = make(dataset=str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the cat"}, {"prompt": "the dog"}])))
    assert len(run_rounds(config)) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_samples": 1}, "num_samples is 1, but a pair is made of two completions .* Fix: num_samples=2"),
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
        ({"builder": "best"}, "builder is 'best', expected one of: pairs, anchors, labels"),
        ({"threshold": 1.0}, "threshold is set, but the builder pairs reads none"),
        ({"builder": "labels", "train": {"objective": "cringe"}}, "threshold is missing"),
        ({"builder": "labels", "threshold": 0.5}, "the objective dpo needs pairs. Fix: objective cringe"),
        ({"reference": "previous", "train": {"objective": "simpo"}}, "the objective simpo has no reference"),
        ({"optimizer": "keep", "train": {"optim": "adafactor"}}, "the state of adafactor is not kept"),
        (
            {"builder": "labels", "threshold": 0.0, "limits": {"max_saturated": 0.5}, "train": {"objective": "cringe"}},
            "max_saturated is set, but the objective cringe has no margin",
        ),
        ({"train": {"objectiv": "dpo"}}, r"train: unknown option 'objectiv' \(did you mean objective"),
        ({"train": {"learning_rate": "1e-4"}}, "train: learning_rate is the text '1e-4', expected a number"),
        ({"train": {"output_dir": "x"}}, "train: output_dir cannot be set: each round has a folder of its own"),
        ({"sampling": {"num_anchors": 3}}, "sampling: num_anchors cannot be set: it is num_samples"),
        ({"sampling": {"temperature": 0}}, "temperature is 0"),
        ({"scorer": {"pattern": ["a"]}}, r"scorer: unknown option 'pattern' \(did you mean patterns"),
        ({"scorer": ["a"]}, r"scorer is \['a'\], expected a mapping"),
        ({"limits": {"max_kl": -1}}, "limits: max_kl is -1"),
    ],
)
def test_choices_that_cannot_work(make, options, told):
    with pytest.raises(ValueError, match=told):
        make(**options)


def test_several_processes_are_refused(make, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FastD2OError, match="rounds run as one process"):
        run_rounds(make())


def test_vllm_is_told_to_be_absent(make):
    try:
        import vllm  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("vLLM is installed")
    told = r"generator is 'vllm', which cannot be imported here: .* Fix: pip install 'fastd2o\[vllm\]'"
    with pytest.raises(FastD2OError, match=told):
        import_vllm()
    config = make(generator="vllm")
    with pytest.raises(FastD2OError, match=told):
        run_rounds(config)
    assert not Path(config.output_dir).exists()


def test_the_seed_of_a_round(make):
    config = make(sampling={"seed": 7}, train={"seed": 3})
    assert [config.sampling_options(round_).seed for round_ in (1, 3)] == [7, 9]
    assert [config.training(round_).seed for round_ in (1, 3)] == [3, 5]
    assert config.sampling_options(1) == SamplingOptions(3, instruction=None, seed=7)
