"""``make gpu`` goes on whatever happens, keeps to its time, and needs no installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import run
from tests.gpu.run import Phase

# What pip's editable installation adds to the ways in which Python finds modules.
_NOT_INSTALLED = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one)]; "


def python(name: str, code: str, seconds: int = 20, **more: object) -> Phase:
    return Phase(name, ("-c", code), seconds, **more)  # type: ignore[arg-type]


def test_a_phase_that_fails_leaves_the_others_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "made" / "result.json"
    result.parent.mkdir()
    (old := result.with_name("old.json")).write_text("of another time")
    os.utime(old, (0, 0))
    chosen = [
        python("first", "print('said'); raise SystemExit('oh no')", results=(old,)),
        python("second", f"open({str(result)!r}, 'w').write('2')", results=(result,)),
        python("third", "", packages=("no_such_package",)),
        python("fourth", "", programs=("no-such-program",), is_question=True),
        python("fifth", "", after="fourth"),
        python("sixth", "print('at last')", after="second", prefers=("no_such_package",)),
    ]
    out = tmp_path / "out"
    assert run.run_all(chosen, out) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[:3] == [
        "gpu: third will be left out, for want of no_such_package",
        "gpu: fourth will be left out, for want of no-such-program",
        "gpu: sixth will do less, for want of no_such_package",
    ]
    assert "gpu: fifth: left out, as fourth failed" in lines
    assert "failed: first, third;" in lines[-1]
    assert "  oh no" in lines
    log = (out / "gpu.log").read_text()
    assert log.index("said") < log.index("=== first: failed") < log.index("=== second: ok") < log.index("at last")
    assert sorted(path.name for path in out.iterdir()) == ["gpu.log", "result.json"]


def test_a_phase_has_its_time_and_what_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted, it says how far it came, and takes along what it has started."""
    child = tmp_path / "child"
    code = (
        f"import subprocess, sys; one = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
        f"open({str(child)!r}, 'w').write(str(one.pid))\n"
        "try: one.wait()\nexcept KeyboardInterrupt: print('so far')"
    )
    assert run.run_all([python("quick", "", seconds=1), python("slow", code, seconds=4)], tmp_path) == 1
    said = capsys.readouterr().out
    assert "gpu: quick: ok" in said
    assert "gpu: slow: too slow after" in said
    assert "  so far" in said.splitlines()
    state = Path("/proc", child.read_text(), "stat")
    assert not state.exists() or " Z " in state.read_text()


def test_all_of_it_is_eight_minutes_at_most() -> None:
    names = [phase.name for phase in run.phases()]
    assert len(set(names)) == len(names)
    assert sum(phase.seconds for phase in run.phases()) <= 480
    assert all(phase.after is None or phase.after in names for phase in run.phases())


def test_what_is_watched() -> None:
    (phase,) = (phase for phase in run.phases() if phase.name == "racecheck")
    command = " ".join(phase.command)
    assert "compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-name kns=fastd2o" in command
    assert command.endswith("-m benchmarks.every_kernel --backend cuda")


def test_an_unknown_phase_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["test"])
    assert "there is no phase 'test'; the phases are: kernels, tests" in capsys.readouterr().err


def test_a_checkout_needs_no_installation() -> None:
    folders = {"kernels": "kernels/triton", "csrc": "csrc", "examples": "examples", "benchmarks": "benchmarks"}
    imports = "".join(f"import fastd2o.{name}; print(fastd2o.{name}.__file__); " for name in folders)
    code = _NOT_INSTALLED + imports
    paths = [str(run.SITE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(run.ROOT / folder / "__init__.py") for folder in folders.values()]
