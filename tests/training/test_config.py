"""Options: what is read, what is refused, and the same on the command line."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from fastd2o import PreferenceConfig, losses
from fastd2o.training import OBJECTIVES
from fastd2o.training.objectives import OPTIONS, find_objective


def config(**options) -> PreferenceConfig:
    return PreferenceConfig(use_cpu=True, **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("dpo", ["dpo"]),
        ("d2o, npo", ["d2o", "npo"]),
        (["d2o", "npo"], ["d2o", "npo"]),
        (["sigmoid"], ["dpo"]),
    ],
)
def test_names(given, expected):
    assert config(objective=given).objective == expected


def test_defaults():
    assert config().objective == ["d2o"]
    assert config().objective_weights == [1.0]
    assert not config().remove_unused_columns
    assert dataclasses.replace(config(objective="npo"), beta=0.2).beta == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "d20"}, r"objective 'd20' is unknown, expected one of: d2o, dpo.*Did you mean 'd2o'"),
        ({"objective": []}, "objective is empty"),
        ({"objective": ["dpo", "sigmoid"]}, "named twice"),
        ({"objective": ["nat", "dpo"]}, "Fix: use nat alone"),
        ({"objective": "d2o", "objective_weights": [1, 2]}, "expected 1 numbers above 0"),
        ({"objective_weights": [float("nan")]}, "above 0"),
        ({"objective": "dpo", "alpha": 0.5}, r"alpha is set, but the objective dpo does not read it \(d2o would\)"),
        ({"objective": "cringe", "beta": 0.5}, "beta is set, but the objective cringe does not read it"),
        ({"beta": 0.0}, "beta is 0.0, expected a number above 0"),
        ({"alpha": -1.0}, "alpha is -1.0, expected a number of at least 0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, r"expected a share in \[0, 0.5\)"),
        ({"objective": "exo_pair", "label_smoothing": 0.0}, r"Fix: label_smoothing=0.001"),
        ({"objective": "cringe", "cringe_k": 0}, "cringe_k is 0, expected a whole number of at least 1"),
        ({"objective": "bdpo", "bdpo_lambda": 2.0}, r"expected a share in \(0, 1\]"),
        ({"length_normalize": "yes"}, "expected True or False"),
        ({"max_length": 1}, "max_length is 1, expected at least 2"),
        ({"positives": "best"}, "positives is 'best', expected one of: auto, chosen, anchors"),
        ({"bad_rows": "ignore"}, "bad_rows is 'ignore'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"ref_cache_dir": "x"}, "Fix: precompute_ref_log_probs=True"),
        ({"label_smoothing_factor": 0.1}, "Fix: label_smoothing,"),
        ({"remove_unused_columns": True}, "remove_unused_columns cannot be True"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices cannot be False"),
        ({"train_sampling_strategy": "batch_rebalance"}, "balances rows"),
        ({"use_liger_kernel": True}, "fused_linear_cross_entropy"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_every_option_is_on_the_command_line():
    """With help, and read back as it was written."""
    parser: Any = HfArgumentParser(PreferenceConfig)  # type: ignore[arg-type]
    words = "--output_dir x --use_cpu true --objective d2o npo --objective_weights 1 0.5 --beta 0.2"
    (parsed,) = parser.parse_args_into_dataclasses(
        [*words.split(), "--length_normalize", "true", "--positives", "chosen", "--max_length", "64"]
    )
    assert (parsed.objective, parsed.objective_weights) == (["d2o", "npo"], [1.0, 0.5])
    assert (parsed.beta, parsed.length_normalize, parsed.positives, parsed.max_length) == (0.2, True, "chosen", 64)
    own = {field.name for field in dataclasses.fields(PreferenceConfig)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(PreferenceConfig):
        if field.name in own:
            assert field.metadata["help"], field.name
    parser.format_help()
    assert set(OPTIONS) <= own


def test_options_and_objectives_know_each_other():
    for objective in OBJECTIVES.values():
        assert set(objective.options) <= set(OPTIONS), objective.name
        for name, default in objective.options.items():
            assert OPTIONS[name].valid(default), (objective.name, name)
    assert {name for objective in OBJECTIVES.values() for name in objective.options} == set(OPTIONS)
    assert set(losses.DPO_LOSS_TYPES) == {"sigmoid", *OBJECTIVES} & set(losses.DPO_LOSS_TYPES)


@pytest.mark.parametrize(
    ("objective", "function", "renamed"),
    [
        ("d2o", losses.d2o_loss, {}),
        *((name, losses.dpo_loss, {}) for name in losses.DPO_LOSS_TYPES if name != "exo_pair"),
        ("simpo", losses.simpo_loss, {"simpo_gamma": "gamma"}),
        ("simnpo", losses.simnpo_loss, {"simnpo_delta": "delta"}),
        ("npo", losses.npo_loss, {}),
        ("orpo", losses.orpo_loss, {}),
        ("unlikelihood", losses.unlikelihood_loss, {"unlikelihood_alpha": "alpha"}),
        ("cringe", losses.cringe_loss, {"cringe_alpha": "alpha"}),
        (
            "kto",
            losses.kto_loss,
            {"kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight"},
        ),
        (
            "pairwise_cringe",
            losses.pairwise_cringe_loss,
            {
                "cringe_alpha": "alpha",
                "cringe_margin": "margin",
                "cringe_temperature": "temperature",
                "cringe_detach_gate": "detach_gate",
            },
        ),
    ],
)
def test_defaults_are_those_of_the_losses(objective, function, renamed):
    parameters = inspect.signature(function).parameters
    for name, default in find_objective(objective).options.items():
        parameter = parameters.get(renamed.get(name, name))
        if parameter is not None:
            assert parameter.default == default, name


def test_backend_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="backend='nope' is unknown"):
        PreferenceConfig(str(tmp_path), backend="nope")
