"""Output folders: what may be written where, and that what is there is whole."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastd2o import FastD2OError
from fastd2o.training.checkpoints import (
    check_output_dir,
    checkpoints,
    claim_output_dir,
    publish_files,
    publish_folder,
    written_aside,
)
from tests.training.tiny import losses, make_model, make_trainer


@pytest.fixture
def run(tmp_path):
    """A finished run in ``tmp_path / "run"``."""
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    trainer.save_model()
    return trainer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_saved_models_load_with_plain_transformers(run, tmp_path):
    ids = torch.tensor([[1, 5, 9, 20]])
    expected = run.model.eval()(ids).logits
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is type(make_model())
        torch.testing.assert_close(model.eval()(ids).logits, expected)
        assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == [5, 6]


def test_another_run_is_refused_before_anything_is_written(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(FastD2OError, match=r"holds another run \(README.md, checkpoint-1.*overwrite=True"):
        make_trainer(tmp_path / "run").train()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_overwriting_removes_the_run_and_nothing_else(run, tmp_path):
    out = tmp_path / "run"
    (out / "notes.txt").write_text("mine")
    (out / "samples").mkdir()
    trainer = make_trainer(out, overwrite=True, max_steps=1)
    trainer.train()
    assert names(out) == {"notes.txt", "samples"}
    trainer.save_model()
    assert names(out) >= {"notes.txt", "samples", "model.safetensors", "README.md"}


def test_a_model_that_no_run_wrote_is_never_replaced(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(
            FastD2OError, match=r"holds files that no run wrote .*\(config.json, generation_config.json, model.s"
        ):
            make_trainer(tmp_path / "base", overwrite=overwrite).train()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt"])
def test_files_of_others_that_a_save_could_replace(tmp_path, name):
    """As where output_dir is the folder of a project."""
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("in nobody's way")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(FastD2OError, match=rf"no run wrote there .*\({name}\)\. Fix: choose another output_dir"):
            claim_output_dir(tmp_path, **options)
    assert (tmp_path / name).read_text() == "mine"


def test_a_saved_model_has_no_file_that_the_check_does_not_know(run, tmp_path):
    """What the run noted, seen as someone else's."""
    (tmp_path / "run" / "_fastd2o_run.json").unlink()
    saved = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(FastD2OError) as caught:
        check_output_dir(tmp_path / "run")
    assert not [name for name in saved if name not in str(caught.value)]


def test_a_card_by_itself_is_noted_as_the_runs(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.create_model_card()
    assert names(tmp_path) == {"README.md", "_fastd2o_run.json"}
    make_trainer(tmp_path, max_steps=1, overwrite=True).train()
    assert names(tmp_path) == set()


def test_the_same_trainer_may_go_on_in_its_folder(run):
    run.train()
    assert len(losses(run)) == 2


def test_folder_of_a_run_that_wrote_nothing_is_free(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    (tmp_path / "_incomplete").mkdir()
    make_trainer(tmp_path, max_steps=1).train()
    assert names(tmp_path) == set()


def test_output_dir_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FastD2OError, match="is a file"):
        check_output_dir(tmp_path / "out")


def test_resuming_needs_no_permission(run, tmp_path):
    check_output_dir(tmp_path / "run", resume=True)
    check_output_dir(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(FastD2OError, match="holds another run"):
        check_output_dir(tmp_path / "run", resume=str(tmp_path / "other" / "checkpoint-1"))


def test_overwriting_and_resuming_contradict_each_other(run, tmp_path):
    with pytest.raises(ValueError, match=r"overwrite and resume_from_checkpoint contradict each other"):
        make_trainer(tmp_path / "run", overwrite=True).train(resume_from_checkpoint=True)
    assert len(checkpoints(tmp_path / "run")) == 2


def test_rotation_keeps_the_newest(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=5).train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]


def test_checkpoint_without_its_state_does_not_count(run, tmp_path):
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_steps_taken_again_replace_their_checkpoints(run, tmp_path):
    out = tmp_path / "run"
    first = (out / "checkpoint-2" / "model.safetensors").read_bytes()
    (out / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    again = make_trainer(out, save_strategy="steps", save_steps=1, max_steps=2)
    again.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert (out / "checkpoint-2" / "model.safetensors").read_bytes() == first


def test_killed_between_two_renames(tmp_path):
    """The checkpoint that was being replaced comes back."""
    (tmp_path / "_incomplete" / "replaced" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "_incomplete" / "checkpoint-2").mkdir()
    claim_output_dir(tmp_path)
    assert names(tmp_path) == {"checkpoint-2"}


def test_publish_replaces_folders_and_files(tmp_path):
    for generation in ("old", "new"):
        with written_aside(tmp_path / "x", run_dir=tmp_path, main=True) as aside:
            (aside / "x" / "inner").mkdir(parents=True)
            (aside / "x" / "inner" / "file").write_text(generation)
            publish_folder(aside / "x", tmp_path / "x")
        with written_aside(tmp_path, run_dir=tmp_path, main=True) as aside:
            (aside / "model" / "inner").mkdir(parents=True)
            (aside / "model" / "inner" / "file").write_text(generation)
            publish_files(aside / "model", tmp_path)
        assert (tmp_path / "x" / "inner" / "file").read_text() == generation
        assert (tmp_path / "inner" / "file").read_text() == generation
        assert names(tmp_path) == {"x", "inner", "_fastd2o_run.json"}


def test_broken_manifest(tmp_path):
    (tmp_path / "_fastd2o_run.json").write_text("{")
    with pytest.raises(FastD2OError, match=r"cannot be read.*Fix: remove it"):
        check_output_dir(tmp_path)


def test_save_elsewhere(run, tmp_path):
    run.save_model(str(tmp_path / "elsewhere"))
    assert names(tmp_path / "elsewhere") >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
