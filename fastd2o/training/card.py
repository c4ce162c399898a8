"""The model card: what was trained, on what, how, and whom to cite."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

import fastd2o

if TYPE_CHECKING:
    from fastd2o.data import DataReport
    from fastd2o.training.config import PreferenceConfig


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    year: int
    arxiv: str


_DPO = Paper(
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and others",
    2023,
    "2305.18290",
)
_APO = Paper(
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    "D'Oosterlinck, Karel and others",
    2024,
    "2408.06266",
)

PAPERS: Mapping[str, Paper] = {
    "d2o": Paper(
        "Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference Optimization",
        "Duan, Shitong and others",
        2024,
        "2403.03419",
    ),
    "dpo": _DPO,
    "hinge": Paper(
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "Zhao, Yao and others",
        2023,
        "2305.10425",
    ),
    "ipo": Paper(
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Azar, Mohammad Gheshlaghi and others",
        2023,
        "2310.12036",
    ),
    "robust": Paper(
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        "Chowdhury, Sayak Ray and Kini, Anush and Natarajan, Nagarajan",
        2024,
        "2403.00409",
    ),
    "dpop": Paper(
        "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
        "Pal, Arka and others",
        2024,
        "2402.13228",
    ),
    "bdpo": Paper(
        "Rethinking DPO: The Role of Rejected Responses in Preference Misalignment",
        "Cho, Jay Hyeon and others",
        2025,
        "2506.12725",
    ),
    "apo_zero": _APO,
    "apo_down": _APO,
    "nca_pair": Paper(
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        "Chen, Huayu and others",
        2024,
        "2402.05369",
    ),
    "sppo_hard": Paper(
        "Self-Play Preference Optimization for Language Model Alignment",
        "Wu, Yue and others",
        2024,
        "2405.00675",
    ),
    "exo_pair": Paper(
        "Towards Efficient Exact Optimization of Language Model Alignment",
        "Ji, Haozhe and others",
        2024,
        "2402.00856",
    ),
    "bco_pair": Paper(
        "Binary Classifier Optimization for Large Language Model Alignment",
        "Jung, Seungjae and others",
        2024,
        "2404.04656",
    ),
    "discopop": Paper(
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
        "Lu, Chris and others",
        2024,
        "2406.08414",
    ),
    "cringe": Paper(
        "The CRINGE Loss: Learning what language not to model",
        "Adolphs, Leonard and Gao, Tianyu and Xu, Jing and Shuster, Kurt and Sukhbaatar, Sainbayar and Weston, Jason",
        2022,
        "2211.05826",
    ),
    "pairwise_cringe": Paper(
        "Some things are more CRINGE than others: Iterative Preference Optimization with the Pairwise Cringe Loss",
        "Xu, Jing and Lee, Andrew and Sukhbaatar, Sainbayar and Weston, Jason",
        2023,
        "2312.16682",
    ),
    "npo": Paper(
        "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        "Zhang, Ruiqi and Lin, Licong and Bai, Yu and Mei, Song",
        2024,
        "2404.05868",
    ),
    "simnpo": Paper(
        "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        "Fan, Chongyu and others",
        2024,
        "2410.07163",
    ),
    "unlikelihood": Paper(
        "Neural Text Generation with Unlikelihood Training",
        "Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason",
        2019,
        "1908.04319",
    ),
    "kto": Paper(
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        "Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe",
        2024,
        "2402.01306",
    ),
    "orpo": Paper(
        "ORPO: Monolithic Preference Optimization without Reference Model",
        "Hong, Jiwoo and Lee, Noah and Thorne, James",
        2024,
        "2403.07691",
    ),
    "simpo": Paper(
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
        2024,
        "2405.14734",
    ),
    "nat": Paper(
        "Learning From Failure: Integrating Negative Examples when Fine-tuning Large Language Models as Agents",
        "Wang, Renxi and others",
        2024,
        "2402.11651",
    ),
    "gradient_ascent": Paper(
        "Knowledge Unlearning for Mitigating Privacy Risks in Language Models",
        "Jang, Joel and others",
        2022,
        "2210.01504",
    ),
}
"""The paper of every objective."""

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft")
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "max_grad_norm",
    "max_length",
    "bf16",
    "fp16",
    "seed",
)
_ONLINE_SETTINGS = (
    "resample_every",
    "online_after",
    "online_instruction",
    "online_max_new_tokens",
    "online_temperature",
)


def model_card(
    config: PreferenceConfig,
    *,
    base_model: str | None,
    reports: Mapping[str, DataReport],
    reference: str,
    adapter: bool,
    step: int,
    processes: int,
    metrics: Mapping[str, float],
    name: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Describe a trained model.

    Args:
        config: of the run.
        base_model: name or path of the model it started from, if known.
        reports: what became of the rows of each dataset, by its role.
        reference: where reference log-probabilities came from, in words.
        adapter: whether this is a PEFT adapter rather than a whole model.
        step: optimiser steps so far.
        processes: how many processes trained it.
        metrics: the latest that were logged.
        name: title of the card; default: the last part of ``output_dir``.
        license, language, datasets, tags: for the card's metadata.

    Returns:
        The card; ``save`` it as ``README.md``.
    """
    title = name or Path(config.output_dir).absolute().name
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        datasets=datasets,
        model_name=title,
        tags=list(dict.fromkeys(["fastd2o", "generated_from_trainer", *config.objective, *tags])),
    )
    trained = f"`{base_model}`" if base_model else "a causal language model"
    sections = [
        f"# {title}",
        f"{'An adapter for' if adapter else 'Fine-tuned from'} {trained} with FastD2O, step {step}.",
        "## Objective",
        _table("objective", "value", _objective_rows(config)),
        f"Reference: {reference}.",
        "## Data",
        "\n".join(f"**{role}**\n\n```text\n{report}\n```\n" for role, report in reports.items()) or "Not recorded.",
        "## Training",
        _table("setting", "value", [*_settings(config), ("processes", processes)]),
    ]
    if metrics:
        sections += [
            "## Metrics",
            _table("metric", "last logged", [(key, f"{value:.6g}") for key, value in metrics.items()]),
        ]
    sections += [
        "## Versions",
        _table("package", "version", _versions()),
        "## Citation",
        "```bibtex\n" + "\n\n".join(_bibtex(objective) for objective in config.objective) + "\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n", ignore_metadata_errors=True)


def _objective_rows(config: PreferenceConfig) -> list[tuple[str, Any]]:
    assert config.objective_weights is not None
    rows: list[tuple[str, Any]] = []
    for objective, weight in zip(config.objectives, config.objective_weights, strict=True):
        paper = PAPERS[objective.name]
        rows.append((f"**{objective.name}**", f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"))
        if len(config.objective) > 1:
            rows.append(("weight", weight))
        rows += [(name, config.option(objective, name)) for name in objective.options]
    return rows


def _settings(config: PreferenceConfig) -> list[tuple[str, Any]]:
    names = _SETTINGS if config.resample_every is None else (*_SETTINGS, *_ONLINE_SETTINGS)
    values = ((name, getattr(config, name)) for name in names)
    return [(name, value.value if isinstance(value, Enum) else value) for name, value in values]


def _versions() -> list[tuple[str, str]]:
    installed = [(package, version(package)) for package in _PACKAGES if find_spec(package) is not None]
    return [("fastd2o", fastd2o.__version__), ("Python", platform.python_version()), *installed]


def _table(left: str, right: str, rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _bibtex(objective: str) -> str:
    paper = PAPERS[objective]
    return (
        f"@misc{{{objective}{paper.year},\n"
        f"  title = {{{{{paper.title}}}}},\n"
        f"  author = {{{paper.authors}}},\n"
        f"  year = {{{paper.year}}},\n"
        f"  eprint = {{{paper.arxiv}}},\n"
        "  archivePrefix = {arXiv}\n"
        "}"
    )
