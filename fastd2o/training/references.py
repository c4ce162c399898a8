"""Where reference log-probabilities come from: the dataset, a model, the policy as it was, or a cache on disk.

Decided once, when the trainer is built and the policy has not been trained yet:

1. columns of the dataset, where every sequence has them;
2. the ``ref_model`` given;
3. under PEFT, the policy with its adapter switched off;
4. a frozen copy of the policy, taken in memory.

With ``precompute_ref_log_probs`` the model among 2–4 scores the dataset before training and is let go: 1 from then on.
Where anchors are drawn in training (``resample_every``) it stays, to score those, and columns alone are not enough.
"""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastd2o.data import PreferenceCollator, PreferenceDataset
from fastd2o.errors import FastD2OError, FastD2OWarning
from fastd2o.models import attach
from fastd2o.models.mode import evaluating
from fastd2o.training.checkpoints import REFERENCE_CACHE
from fastd2o.training.datasets import check_fits
from fastd2o.training.policy import adapter_has_learnt, base_weights, is_peft, load_model
from fastd2o.training.scoring import Batch, ReferenceLogps, sequence_logp

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastd2o.training.config import PreferenceConfig

Datasets: TypeAlias = dict[str, PreferenceDataset]


@dataclass(frozen=True)
class Reference:
    """A model that completions are scored under.

    Attributes:
        model: attached, in evaluation mode or put there for the time of a call.
        accelerator: the trainer's; the policy runs under its autocast, and so must what it is compared with.
        description: in words, for the model card.
        adapter_off: call the model with its PEFT adapter switched off.
    """

    model: nn.Module
    accelerator: Accelerator
    description: str
    adapter_off: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        """[S] float32 without gradient: the log-probability of every completion."""
        model: Any = self.model
        adapter = model.disable_adapter() if self.adapter_off else nullcontext()
        with self.accelerator.autocast(), evaluating(self.model), adapter:
            return sequence_logp(self.model, batch)


@dataclass(frozen=True)
class References:
    """The helpful reference, and the harmful one that D2O measures positives against; None: no model, only columns.

    Attributes:
        helpful: scores what has no column ``ref_logp``.
        harmful: scores what has no column ``harmful_ref_logp``; None: the helpful values serve for both.
        description: where the values come from, in words.
    """

    helpful: Reference | None
    harmful: Reference | None
    description: str

    def check_fits(self, dataset: PreferenceDataset, role: str) -> None:
        """Check that the models can score ``dataset``.

        Raises:
            fastd2o.DataError: a token that one of them does not know, or a sequence that is too long for it.
        """
        for reference in (self.helpful, self.harmful):
            if reference is not None:
                check_fits(reference.model, f"the reference ({reference.description})", dataset, role)

    def __call__(self, batch: Batch) -> ReferenceLogps:
        """The reference log-probabilities of a batch: from its columns, or else from the models."""
        helpful, harmful = batch.ref_logp, batch.harmful_ref_logp
        if helpful is None:
            if self.helpful is None:
                raise FastD2OError(
                    "a dataset has no reference log-probabilities, and no reference model is left to compute them: "
                    "those of the other datasets were columns, or precomputed. Fix: give this dataset to the trainer "
                    "as eval_dataset, or pass ref_model"
                )
            helpful = self.helpful(batch)
        if harmful is None:
            harmful = helpful if self.harmful is None else self.harmful(batch)
        return ReferenceLogps(helpful, harmful)

    def score(self, dataset: PreferenceDataset, collate: PreferenceCollator, batch_size: int) -> PreferenceDataset:
        """``dataset`` with what the models say of every sequence as columns; this process does it alone.

        Raises:
            FastD2OError: a value that is not finite.
        """
        columns: list[list[float] | None] = []
        for reference in (self.helpful, self.harmful):
            if reference is None:
                columns.append(None)
                continue
            logps = _score(reference, dataset, collate, batch_size)
            _check_finite(reference, logps)
            columns.append(logps.tolist())
        return dataset.with_reference(*columns)


def find_references(
    policy: nn.Module,
    datasets: Datasets,
    *,
    ref_model: nn.Module | str | None,
    harmful_ref_model: nn.Module | str | None,
    accelerator: Accelerator,
    config: PreferenceConfig,
    collate: PreferenceCollator,
) -> tuple[References, Datasets]:
    """Decide where references come from; to be called while ``policy`` is what it was given as.

    Returns:
        The references, and the datasets with what was precomputed as columns, and without columns that are not to be
        used.

    Raises:
        ValueError: a model for what the datasets hold already, or the policy itself as reference.
        fastd2o.DataError: a dataset that a reference cannot score.
        FastD2OError: no memory for a copy of the policy; weights that are sharded, so that it cannot be copied.
    """
    helpful: Reference | None = None
    harmful: Reference | None = None
    description = "columns of the dataset"
    online = config.resample_every is not None
    datasets, covered = _use_columns(datasets, "ref_logp", "ref_model", ref_model, online=online)
    if not covered or online:
        helpful = _find_helpful(policy, ref_model, accelerator, config)
        description = helpful.description
    datasets, covered = _use_columns(
        datasets, "harmful_ref_logp", "harmful_ref_model", harmful_ref_model, online=online
    )
    if harmful_ref_model is not None:
        harmful = _own_model(harmful_ref_model, "harmful_ref_model", policy, accelerator, config)
        description += f"; positives: {harmful.description}"
    elif covered:
        description += "; positives: columns of the dataset"
    references = References(helpful, harmful, description)
    for name, data in datasets.items():
        references.check_fits(data, name.removeprefix("eval "))
    if config.precompute_ref_log_probs:
        cache = Path(config.ref_cache_dir or Path(config.output_dir) / REFERENCE_CACHE)
        scorer = _Scorer(collate, accelerator, config.per_device_eval_batch_size, cache)
        if helpful is not None:
            datasets = {name: data.with_reference(scorer(helpful, data)) for name, data in datasets.items()}
        if harmful is not None:
            datasets = {
                name: data.with_reference(harmful_ref_logps=scorer(harmful, data)) for name, data in datasets.items()
            }
        if not online:
            # An adapter can be switched off at any time; other models are let go.
            references = References(helpful if helpful is not None and helpful.adapter_off else None, None, description)
    return references, datasets


def _use_columns(
    datasets: Datasets, column: str, argument: str, model: nn.Module | str | None, *, online: bool
) -> tuple[Datasets, bool]:
    """Whether every sequence of ``datasets`` has ``column``; where only some have, it is taken out of all.

    ``online``: anchors will be drawn that have none, so that the model behind the column is needed.
    """
    known = [getattr(sequence, column) is not None for data in datasets.values() for sequence in data.sequences]
    if known and all(known):
        if online and model is None:
            raise ValueError(
                f"every sequence of the datasets has its {column}, but the anchors that resample_every draws will have "
                f"none. Fix: give the model that the columns are of as {argument}, or remove the columns"
            )
        if model is not None and not online:
            raise ValueError(
                f"{argument} is given, and every sequence of the datasets has its {column} already. Fix: leave "
                f"{argument} out, or remove the columns"
            )
        return datasets, True
    if any(known):
        warnings.warn(
            f"{known.count(True)} of {len(known)} sequences have a {column}: it is used for all or for none, so it is "
            "computed for all (kto also scores completions under other prompts, which no column covers)",
            FastD2OWarning,
            stacklevel=2,
        )
        return {name: _without_column(data, column) for name, data in datasets.items()}, False
    return datasets, False


def _without_column(dataset: PreferenceDataset, column: str) -> PreferenceDataset:
    cleared: dict[str, Any] = {column: None}
    groups = [
        replace(group, sequences=tuple(replace(sequence, **cleared) for sequence in group.sequences))
        for group in dataset.groups
    ]
    return PreferenceDataset(groups, dataset.report)


def _find_helpful(
    policy: nn.Module, ref_model: nn.Module | str | None, accelerator: Accelerator, config: PreferenceConfig
) -> Reference:
    if ref_model is not None:
        return _own_model(ref_model, "ref_model", policy, accelerator, config)
    if is_peft(policy):
        if adapter_has_learnt(policy):
            warnings.warn(
                "the model came with an adapter that changes it already; the reference is the base model, without that "
                "adapter. To start from the adapted model as reference, merge the adapter into it first "
                "(merge_and_unload)",
                FastD2OWarning,
                stacklevel=2,
            )
        return Reference(policy, accelerator, "the base model, without the adapter", adapter_off=True)
    if config.precompute_ref_log_probs and config.resample_every is None:
        return Reference(policy, accelerator, "the model before training")
    if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        raise FastD2OError(
            "the weights are sharded over processes (DeepSpeed ZeRO-3), so no copy of them can serve as reference. "
            "Fix: give reference log-probabilities as columns of the dataset"
        )
    try:
        copied = copy.deepcopy(policy)
    except torch.OutOfMemoryError as error:
        raise FastD2OError(
            "there is no memory for a copy of the model as reference. Fix: precompute_ref_log_probs=True, or train an "
            "adapter (peft_config), whose reference is the model without it"
        ) from error
    return Reference(copied.requires_grad_(False).eval(), accelerator, "the model before training")


def _own_model(
    given: nn.Module | str, argument: str, policy: nn.Module, accelerator: Accelerator, config: PreferenceConfig
) -> Reference:
    model = load_model(given, config.dtype, argument)
    if model is policy:
        raise ValueError(
            f"{argument} is the model that trains, so it would change with it. Fix: leave {argument} out; a frozen "
            "copy is taken"
        )
    model = attach(model.requires_grad_(False).eval(), backend=config.backend).to(accelerator.device)
    return Reference(model, accelerator, f"the model given as {argument}")


# --- precomputing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scorer:
    """Scores a whole dataset under a reference, once: the result is kept on disk.

    The file is named after a fingerprint of the data and of the weights. One that cannot be read is computed anew, with
    a warning. Processes share the work.
    """

    collate: PreferenceCollator
    accelerator: Accelerator
    batch_size: int
    cache_dir: Path

    def __call__(self, reference: Reference, dataset: PreferenceDataset) -> list[float]:
        """One value for each of ``dataset.sequences``."""
        key = hashlib.sha256(f"{dataset.fingerprint()} {_fingerprint(reference.model)}".encode()).hexdigest()
        path = self.cache_dir / f"{key[:32]}.safetensors"
        cached = _read(path, len(dataset.sequences))
        found = torch.tensor(int(cached is not None), device=self.accelerator.device)
        found_by_all = int(self.accelerator.reduce(found, "sum")) == self.accelerator.num_processes
        if cached is not None and found_by_all:
            return cached.tolist()
        every, own = self.accelerator.num_processes, self.accelerator.process_index
        hidden = not self.accelerator.is_local_main_process
        logps = self.accelerator.reduce(
            _score(reference, dataset, self.collate, self.batch_size, share=slice(own, None, every), hidden=hidden),
            "sum",
        ).cpu()
        _check_finite(reference, logps)
        if self.accelerator.is_main_process:
            _write(path, logps)
        return logps.tolist()


def _score(
    reference: Reference,
    dataset: PreferenceDataset,
    collate: PreferenceCollator,
    batch_size: int,
    *,
    share: slice = slice(None),
    hidden: bool = True,
) -> Tensor:
    """One float32 value for each sequence of ``dataset``, on the device; 0 for those of groups not in ``share``.

    Args:
        reference, dataset, collate: what scores, what is scored, and how it becomes a batch.
        batch_size: groups scored together.
        share: of the groups, the longest first.
        hidden: show no progress bar.
    """
    first = list(accumulate((len(group.sequences) for group in dataset.groups), initial=0))
    # Like lengths together, so that little is padding.
    chosen = sorted(range(len(dataset)), key=dataset.lengths.__getitem__, reverse=True)[share]
    logps = torch.zeros(first[-1], device=reference.accelerator.device)
    with tqdm(total=len(chosen), desc="Reference log-probabilities", unit="group", disable=hidden) as bar:
        for begin in range(0, len(chosen), batch_size):
            indices = chosen[begin : begin + batch_size]
            inputs = collate([dataset[index] for index in indices])
            batch = Batch(**{name: tensor.to(logps.device) for name, tensor in inputs.items()})
            places = [place for index in indices for place in range(first[index], first[index + 1])]
            logps[torch.tensor(places, device=logps.device)] = reference(batch).float()
            bar.update(len(indices))
    return logps


def _check_finite(reference: Reference, logps: Tensor) -> None:
    if not torch.isfinite(logps).all():
        raise FastD2OError(
            f"the reference ({reference.description}) gives log-probabilities that are not finite. Fix: use "
            "another model or dtype"
        )


def _fingerprint(model: nn.Module) -> str:
    """A digest of the weights of ``model``, adapters of PEFT left out, and of the dtype they are in."""
    digest = hashlib.sha256()
    state = base_weights(model)
    with tqdm(total=len(state), desc="Fingerprint of the reference", unit="tensor", leave=False, delay=2) as bar:
        for name, tensor in state.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            bar.update()
    return digest.hexdigest()


def _read(path: Path, total: int) -> Tensor | None:
    """The cached log-probabilities, or None if there are none to be trusted."""
    if not path.exists():
        return None
    try:
        logps = load_file(path)["logp"]
        if logps.shape == (total,) and logps.dtype == torch.float32 and bool(torch.isfinite(logps).all()):
            return logps
        reason = f"it holds {list(logps.shape)} {logps.dtype}, expected [{total}] finite numbers of torch.float32"
    except (OSError, SafetensorError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"the cached reference log-probabilities in {path} cannot be used ({reason}); they are computed again",
        FastD2OWarning,
        stacklevel=2,
    )
    return None


def _write(path: Path, logps: Tensor) -> None:
    """Write aside, then rename: whoever reads finds a whole file or none."""
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logp": logps}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise FastD2OError(
            f"the reference log-probabilities cannot be written to {path.parent}: {error}. Fix: free space, or set "
            "ref_cache_dir"
        ) from error
