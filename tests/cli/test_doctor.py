"""fastd2o doctor: its report is of this machine."""

import json
import platform
import sys

import torch

import fastd2o as package


def test_json_report(fastd2o):
    result = fastd2o("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["versions"]["fastd2o"] == package.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["machine"]["torch_threads"] == torch.get_num_threads()
    assert report["machine"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(report["devices"]) == torch.cuda.device_count()
    assert report["backends"] == package.backends()
    assert report["extras"]["train"] is None


def test_tables(fastd2o):
    result = fastd2o("doctor")
    assert (result.code, result.err) == (0, "")
    assert torch.__version__ in result.out
    assert "works" in result.out


def test_missing_extras_say_how_to_get_them(fastd2o, monkeypatch):
    from fastd2o.cli import doctor

    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"peft": None, "datasets": "1.0"}.get(name, version(name)))
    extras = doctor.examine()["extras"]
    assert extras["train"] == (
        "datasets is 1.0, needed >=4.0; peft is not installed. Fix: pip install 'fastd2o[train]'"
    )
    assert "[train]" in "".join(fastd2o("doctor").out.split())  # not swallowed as markup


def test_it_works_where_only_torch_is_installed(fastd2o, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("rich.", "packaging."))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("rich", "packaging"):
        monkeypatch.setitem(sys.modules, name, None)
    result = fastd2o("doctor")
    assert result.code == 0
    assert "Fix: pip install 'fastd2o[train]'" in json.loads(result.out)["extras"]["all"]
