"""The documentation is run, and compared with the code.

In README.md and docs/*.md an HTML comment says what a code block is:

- ``<!-- run -->``: Python is executed, a shell block's ``fastd2o`` commands are run. The blocks of a page share one
  namespace and one empty folder that holds ``model``, a tiny causal LM with its tokenizer.
- ``<!-- file: NAME -->``: the block is the content of that file in the folder.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastd2o
from fastd2o.cli import COMMANDS, main
from fastd2o.data import groups
from fastd2o.training import OBJECTIVES, PreferenceConfig, PreferenceTrainer
from fastd2o.training.rounds import Limits, Measures, RoundsConfig, ScorerOptions
from fastd2o.training.sampling import INSTRUCTIONS, SamplingReport
from tests.cli.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}

_BLOCK = re.compile(r"^<!-- (run|file: \S+) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^(`{3,})[^`\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A marked code block: the file it fills (None: it is run), its language, its text, its first line on the page."""

    file: str | None
    language: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        mark, language, content = match.groups()
        file = mark.removeprefix("file: ") if mark != "run" else None
        yield Block(file, language, content, text.count("\n", 0, match.start(3)) + 1)


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, comments and continued lines taken care of."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="session")
def model() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer, context=1024), tokenizer


@pytest.fixture
def folder(model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the model that every page may use."""
    for part in model:
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name, text in TEXT.items() if any(blocks(text))])
@pytest.mark.filterwarnings("ignore::fastd2o.FastD2OWarning", "ignore:.pin_memory. argument")
def test_examples_run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(TEXT[name]):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # Padded, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(PAGES[name]), "exec"), namespace)
        else:
            assert block.language == "bash", f"{name}, line {block.line}: a {block.language} block cannot be run"
            for words in commands(block.text):
                assert words[0] == "fastd2o", f"{name}, line {block.line}: {words[0]} is not run here"
                assert main(words[1:]) == 0, f"{name}: {shlex.join(words)}\n{capsys.readouterr().err}"


def test_every_mark_belongs_to_a_block() -> None:
    for name, text in TEXT.items():
        marks = len(re.findall(r"^<!-- (?:run|file: \S+) -->$", text, re.MULTILINE))
        assert marks == len(list(blocks(text))), name


# --- everything is documented -----------------------------------------------------------------------------------------


def is_code_in(name: str, text: str) -> bool:
    """Whether ``name`` stands in ``text`` as code: a whole word between backticks or in a code block."""
    code = "\n".join([*(match[0] for match in _FENCED.finditer(text)), *re.findall(r"`[^`\n]+`", text)])
    return re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", code) is not None


def table(text: str, first_column: str) -> dict[str, list[str]]:
    """The rows of the tables whose first column is so called, by the first name between backticks in them."""
    rows: dict[str, list[str]] = {}
    for match in re.finditer(rf"^\| {first_column} \|.*\n\|[-| ]+\|\n((?:\|.*\n?)+)", text, re.MULTILINE):
        for line in match[1].splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows[re.findall(r"`([^`]+)`", cells[0])[0]] = cells
    return rows


def missing(names: Any, *pages: str) -> list[str]:
    text = "\n".join(TEXT[page] for page in pages or TEXT)
    return [name for name in names if not is_code_in(name, text)]


def test_public_names() -> None:
    assert missing(set(fastd2o.__all__) - {"__version__"}) == []
    assert missing(fastd2o.losses.__all__, "losses.md") == []


def test_fields_of_the_configuration() -> None:
    own = PreferenceConfig.__annotations__
    documented = table(TEXT["training.md"], "field")
    assert set(documented) == set(own)
    for field in dataclasses.fields(PreferenceConfig):
        if field.name in own and isinstance(field.default, bool | int | float | str):
            assert f"`{field.default}`" in documented[field.name][1], field.name


def test_objectives() -> None:
    rows = {"a negative and a positive": "pair", "a negative": "negative", "a completion": "any"}
    readme, training = table(TEXT["README.md"], "objective"), table(TEXT["training.md"], "objective")
    assert list(readme) == list(training) == list(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        assert readme[name][1] == rows[objective.needs.value], name
        assert readme[name][2].startswith("yes" if objective.reference else "no"), name
        assert training[name][1] == objective.unit, name
        options = dict(re.findall(r"`(\w+)` ([^`,]+)", training[name][2]))
        numbers = {key: value for key, value in objective.options.items() if not isinstance(value, str)}
        assert {key: str(value) for key, value in numbers.items()} == {
            key: value.strip() for key, value in options.items() if key in numbers
        }, name
        assert set(options) == set(objective.options), name
    assert missing(OBJECTIVES, "losses.md") == []


def test_metrics(folder: Path) -> None:
    """Everything that Trainer itself does not log: in a run of all objectives at once, in one of a sum over groups that
    leaves something out of its gradients, and in one that draws its anchors."""
    rows = [{"prompt": f"ask {i}", "chosen": " kind", "rejected": " rude", "anchors": [" kind"]} for i in range(4)]
    logged = set()
    for options in (
        {"objective": [name for name in OBJECTIVES if name != "nat"]},
        {"objective": ["dpo"], "coefficient_tol": 1e-3, "vocab_mass_tol": 1e-3},
        {"objective": ["d2o"], "resample_every": 1, "online_max_new_tokens": 4},
    ):
        config = PreferenceConfig(
            "out",
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            overwrite=True,
            **options,
        )
        trainer = PreferenceTrainer("model", config, train_dataset=rows)
        trainer.train()
        logged |= {name for entry in trainer.state.log_history for name in entry}
    assert "d2o/saturated" in logged
    theirs = {"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "train_loss", "train_runtime"}
    theirs |= {"train_samples_per_second", "train_steps_per_second"}
    ours = {name for name in logged - theirs if not name.startswith("loss/")}
    assert set(table(TEXT["training.md"], "metric")) == ours | {"loss/NAME"}


def test_what_the_data_report_says() -> None:
    reasons = [value for name, value in vars(groups).items() if name.isupper() and isinstance(value, str)]
    assert len(reasons) >= 7
    assert missing(reasons, "data.md") == []


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert missing([f"fastd2o {command}" for command in COMMANDS], "cli.md") == []
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        options = set(re.findall(r"^  (?:-\w, )?--(\w+)", capsys.readouterr().out, re.MULTILINE))
        if command == "train":  # a table of its own in training.md has the fields of PreferenceConfig
            options -= {field.name for field in dataclasses.fields(PreferenceConfig)}
            options = {name for name in options if not name.startswith("no_")}
        assert missing([f"--{name}" for name in options - {"help"}], "cli.md") == [], command


def test_rounds() -> None:
    options = {field.name for kind in (RoundsConfig, ScorerOptions) for field in dataclasses.fields(kind)}
    assert options - set(table(TEXT["rounds.md"], "option")) == {"label"}
    found = {field.name for kind in (Measures, Limits, ScorerOptions) for field in dataclasses.fields(kind)}
    assert missing(found, "rounds.md") == []


def test_sampling() -> None:
    assert missing(INSTRUCTIONS, "sampling.md") == []
    assert set(table(TEXT["sampling.md"], "count")) == {field.name for field in dataclasses.fields(SamplingReport)}


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The fragments that GitHub and MkDocs give the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md", "csrc/README.md"])
def test_links_resolve(name: str) -> None:
    path = PAGES.get(name, ROOT / name)
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", path.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name}: {target}"
        if fragment:
            assert fragment in anchors(linked.read_text(encoding="utf-8")), f"{name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- .*?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(name for name in PAGES if name != "README.md")
