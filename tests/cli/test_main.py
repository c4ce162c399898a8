"""The door: help, version, usage errors, exit codes, --debug."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

import fastd2o as package
from fastd2o import cli
from fastd2o.cli import doctor, train
from fastd2o.cli.arguments import in_options
from tests.cli.conftest import start


def test_where_only_torch_is_installed_help_works_and_commands_say_what_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fastd2o.cli import main\n"
        "print(main(['--help']), main(['train', '--model', 'm']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert f"\n    {command} " in result.stdout
    assert result.stdout.endswith("0 1\n")
    assert (
        result.stderr
        == "fastd2o: error: the package 'transformers' is not installed. Fix: pip install 'fastd2o[train]'\n"
    )


def test_version(fastd2o):
    result = fastd2o("--version")
    assert (result.code, result.out) == (0, f"fastd2o {package.__version__}\n")


def test_module_is_the_command():
    process = start("--version")
    assert process.communicate(timeout=60)[0] == f"fastd2o {package.__version__}\n"
    assert process.returncode == 0


def test_alone_it_prints_help_and_is_a_usage_error(fastd2o):
    result = fastd2o()
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("usage: fastd2o")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(fastd2o, command):
    result = fastd2o(command, "--help")
    assert result.code == 0
    assert f"examples:\n  fastd2o {command}" in result.out
    assert result.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean train?)"),
        (["--verbose"], "unrecognized arguments: --verbose"),
        (["doctor", "--jsno"], "unrecognized argument '--jsno' (did you mean --json?). See: fastd2o doctor --help"),
        (["doctor", "--js"], "unrecognized argument '--js' (did you mean --json?)"),
        (["doctor", "extra"], "unrecognized argument 'extra'"),
        (["sample"], "the following arguments are required: --model, --dataset, --out, --num_anchors"),
        (
            ["train", "--model", "m", "--dataset", "d", "--output_dir", "o", "--learning_rat", "1"],
            "unrecognized argument '--learning_rat' (did you mean --learning_rate?)",
        ),
        (["train", "--model", "m"], "the following arguments are required: --dataset, --output_dir"),
        (
            ["train", "--model", "m", "--dataset", "d", "--output_dir", "o", "--beta", "much"],
            "argument --beta: invalid float value: 'much'",
        ),
    ],
)
def test_usage_errors_are_one_line(fastd2o, arguments, message):
    result = fastd2o(*arguments)
    assert result.code == 2
    assert result.error.startswith(message)
    assert result.out == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (package.FastD2OError("no\n  good. Fix: better"), 1, "no good. Fix: better"),
        (package.DataError("line 3. Fix: it"), 1, "line 3. Fix: it"),
        (ValueError("beta is -1"), 1, "beta is -1"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "[Errno 2] No such file or directory: 'x'"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            1,
            "the package 'peft' is not installed. Fix: pip install 'fastd2o[train]'",
        ),
        (
            PackageNotFoundError("The 'deepspeed>=0.9.3' distribution was not found and is required by this app."),
            1,
            "the package 'deepspeed' is not installed. Fix: pip install deepspeed",
        ),
        (KeyError("x"), 1, "KeyError: 'x' (unexpected: run again with --debug for the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_one_line(fastd2o, monkeypatch, error, code, line):
    monkeypatch.setattr(doctor, "run", _raise(error))
    result = fastd2o("doctor")
    assert (result.code, result.error) == (code, line)


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"], ["doctor", "--debug", "--json"]])
def test_debug_shows_the_traceback(fastd2o, monkeypatch, arguments):
    monkeypatch.setattr(doctor, "run", _raise(ValueError("beta is -1")))
    result = fastd2o(*arguments)
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("fastd2o: error: beta is -1\n")


def _raise(error):
    def run(args):
        raise error

    return run


def test_own_warnings_are_lines_and_those_of_libraries_are_silent(fastd2o, monkeypatch):
    import warnings

    def run(args):
        warnings.warn("3 rows were dropped", package.FastD2OWarning, stacklevel=2)
        warnings.warn("old API", DeprecationWarning, stacklevel=2)
        warnings.warn("odd", UserWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(doctor, "run", run)
    assert fastd2o("doctor").err == "fastd2o: warning: 3 rows were dropped\n"
    assert "odd" in fastd2o("doctor", "--debug").err


def test_help_tells_a_default_of_zero(fastd2o):
    assert "of every draw (default: 0)" in fastd2o("sample", "--help").out


@pytest.mark.parametrize(
    ("message", "spelled"),
    [
        ("set truncate_prompt=True to cut", "set --truncate_prompt to cut"),
        ("set bad_rows=\"drop\" or bad_rows='drop'", "set --bad_rows drop or --bad_rows drop"),
        ("disable_dropout=False, or lora_dropout=0", "--disable_dropout false, or --lora_dropout 0"),
        ("within max_length=24: 1 row", "within --max_length 24: 1 row"),
        ("simpo_gamma=0.5.", "--simpo_gamma 0.5."),
        (
            "train(bad_rows='drop') and x/seed=3,'seed=3' stay, needs=3 too",
            "train(bad_rows='drop') and x/seed=3,'seed=3' stay, needs=3 too",
        ),
        ("beta is -1", "beta is -1"),
    ],
)
def test_messages_are_put_in_options(message, spelled):
    assert in_options(message, train.parents()[0]) == spelled


def test_help_of_train_begins_with_what_a_run_needs(fastd2o):
    text = fastd2o("train", "--help").out
    places = [text.index(f"\n  --{name} ") for name in ("model", "output_dir", "objective", "beta", "learning_rate")]
    assert places == sorted(places)
    assert "--output-dir" not in text
    assert "The same as --disable_dropout false." in " ".join(text.split())
    assert fastd2o("train", "--output-dir").error.startswith(
        "argument --output_dir/--output-dir: expected one argument"
    )
