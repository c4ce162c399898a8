"""``PreferenceTrainer``: :class:`transformers.Trainer` with the objectives of this package.

The story of a step is :meth:`PreferenceTrainer.compute_loss`: score the batch under the policy, in one forward through
the model and its fused head; look up or compute the references; hand both to the objectives; divide by the units of the
whole accumulation window.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from fastd2o.data import PreferenceCollator, PreferenceDataset
from fastd2o.errors import FastD2OError
from fastd2o.models import attach
from fastd2o.training.card import model_card
from fastd2o.training.checkpoints import (
    check_same_run,
    checkpoints,
    claim_output_dir,
    no_empty_folder_left,
    note_run,
    publish_files,
    publish_folder,
    resolve_checkpoint,
    written_aside,
)
from fastd2o.training.config import PreferenceConfig
from fastd2o.training.datasets import Data, check_fits, prepare_dataset, vocabulary
from fastd2o.training.metrics import Meter
from fastd2o.training.objectives import ENTROPY, Mixture
from fastd2o.training.online import OnlineAnchors
from fastd2o.training.policy import (
    digest,
    disable_dropout,
    is_peft,
    load_model,
    load_processing_class,
    wrap_peft,
)
from fastd2o.training.references import References, find_references
from fastd2o.training.scoring import UNITS, Batch, HeadOptions, Scores, score

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from fastd2o.data import DataReport

logger = logging.get_logger(__name__)

_ONLY = "evaluation"  # the name of an evaluation dataset that was given without one


class PreferenceTrainer(Trainer):
    """Train a causal language model from preferences, or from negatives alone.

    ::

        config = PreferenceConfig("out", objective="d2o")
        trainer = PreferenceTrainer("path/to/model", config, train_dataset="anchors.jsonl")
        trainer.train()
        trainer.save_model()

    A loss is a mean over its units (groups, sequences or tokens) of the *whole* optimiser step: splitting the step into
    micro-batches or over processes changes no gradient. KTO alone has a statistic of the micro-batch in it, its
    reference point z₀. The draws of Cringe losses depend on the seed, the step and the dataset line.

    Args:
        model: a causal LM, or the path or Hub id of one. It is attached (:func:`fastd2o.attach`) and, unless
            ``disable_dropout=False``, rid of dropout.
        args: the configuration.
        train_dataset: what :func:`fastd2o.data.load_rows` takes (a path, a ``datasets.Dataset``, a list of dicts), or a
            :class:`fastd2o.data.PreferenceDataset` already built. None to evaluate only.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer, or a processor that holds one; default: the one saved beside ``model``, if that
            is a path.
        ref_model: the reference (D2O: the helpful one), a model or its path. Default: the adapter switched off under
            PEFT, else a frozen copy of ``model`` as it is now. Objectives without a reference never make one; neither
            do datasets whose every row has reference log-probabilities.
        harmful_ref_model: the reference of D2O's positives. Default: the same.
        peft_config: train an adapter on ``model`` instead of its weights.
        callbacks, optimizers: as for :class:`transformers.Trainer`.

    Raises:
        FastD2OError: what cannot be trained as asked; the message names the fix.
        fastd2o.DataError: a dataset that cannot be used.
        ValueError, TypeError: arguments that contradict each other.
    """

    args: PreferenceConfig
    model: nn.Module
    processing_class: Any
    data_collator: PreferenceCollator
    train_dataset: Any
    eval_dataset: Any
    # From Transformers 5.19 on, Trainer asks this; before, it is `model_accepts_loss_kwargs` below.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: PreferenceConfig,
        train_dataset: Data | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        ref_model: PreTrainedModel | nn.Module | str | None = None,
        harmful_ref_model: PreTrainedModel | nn.Module | str | None = None,
        peft_config: PeftConfig | None = None,
        eval_dataset: Data | dict[str, Data] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"args is a {type(args).__name__}, expected a PreferenceConfig")
        self.mixture = Mixture(args)
        models = {"model": model, "ref_model": ref_model, "harmful_ref_model": harmful_ref_model}
        _check_arguments(args, self.mixture, models)
        set_seed(args.seed)  # before an adapter draws its weights
        if processing_class is None:
            processing_class = load_processing_class(model)
        policy = load_model(model, args.dtype, "model")
        self._base_model = policy.name_or_path or None
        base_digest = digest(policy)
        if peft_config is not None:
            policy = wrap_peft(policy, peft_config, args)
        if args.disable_dropout:
            disable_dropout(policy)
        attach(policy, backend=args.backend)

        if args.resample_every is not None and isinstance(train_dataset, Iterator):
            train_dataset = list(train_dataset)  # read twice: tokenised, and sampled from
        # Before Trainer's own set-up: what the data has wrong is known before anything is put on a device.
        self.args, self.processing_class = args, processing_class
        self.reports: dict[str, DataReport] = {}
        datasets = {} if train_dataset is None else {"train": self._prepare(train_dataset, "train", policy)}
        several = eval_dataset if isinstance(eval_dataset, dict) else {_ONLY: eval_dataset}
        datasets |= {
            f"eval {name}": self._prepare(data, name, policy) for name, data in several.items() if data is not None
        }

        self._head_options = HeadOptions(args.memory_budget, args.coefficient_tol, args.vocab_mass_tol)
        self._meter, self._eval_meter = Meter(), Meter()
        self._staging: Path | None = None
        self._resumed_from: Path | None = None
        self._claimed = False
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._makes_output_dir = args.should_save and not Path(args.output_dir).exists()
        with no_empty_folder_left(args.output_dir, made=self._makes_output_dir):
            super().__init__(
                model=policy,
                args=args,
                data_collator=PreferenceCollator(_pad_token_id(tokenizer, policy)),
                train_dataset=datasets.get("train"),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[*(callbacks or []), _WindowRestorer(self)],
                optimizers=optimizers,
            )
            # compute_loss divides by the whole window: Trainer must not divide again.
            self.model_accepts_loss_kwargs = True
            self.references = References(None, None, "none")
            if self.mixture.reference:
                self.references, datasets = find_references(
                    policy,
                    datasets,
                    ref_model=ref_model,
                    harmful_ref_model=harmful_ref_model,
                    accelerator=self.accelerator,
                    config=args,
                    collate=self.data_collator,
                )
        self._run = self._describe_run(base_digest, datasets.get("train"))
        self.train_dataset = datasets.get("train")
        self._online = None
        if args.resample_every is not None and train_dataset is not None:
            self._online = self._online_anchors(train_dataset)
        evaluation = {name: datasets[f"eval {name}"] for name, data in several.items() if data is not None}
        self.eval_dataset = evaluation if isinstance(eval_dataset, dict) else evaluation.get(_ONLY)

    # --- a step -----------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the mean over the accumulation window of all processes.

        Args:
            model: the policy, wrapped or not.
            inputs: a batch of the collator.
            return_outputs: also return the :class:`Scores`, without a gradient.
            num_items_in_batch: [3] units of the window, from :meth:`_get_num_items_in_batch`; None: those of this
                batch.

        Raises:
            FastD2OError: the loss is NaN or infinite.
        """
        batch = Batch(**inputs)
        counts = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else batch.counts()
        (loss, metrics), scores = score(
            model,
            batch,
            self.mixture.wants,
            lambda scores: self.mixture(scores, counts),
            # Before the policy's forward: what that keeps for its backward is not there yet.
            references=self.references(batch) if self.mixture.reference else None,
            over_ranks=self._sum_over_ranks if model.training else lambda tensor: tensor,
            seed=self._seed(model),
            statistics=self._wants_statistics(model),
            separable=self.mixture.separable,
            unit_scale=self.mixture.unit_scale(counts),
            options=self._head_options,
        )
        self._stop_if_not_finite(loss, scores)
        (self._meter if model.training else self._eval_meter).add(metrics)
        if model.training:
            loss = loss * self.accelerator.num_processes  # which DDP divides the sum of gradients by
        return (loss, scores) if return_outputs else loss

    def _seed(self, model: nn.Module) -> str:
        """What the draws of a forward depend on: evaluations are comparable with one another, steps draw anew."""
        return f"{self.args.seed} " + (f"step {self.state.global_step}" if model.training else "evaluation")

    def _wants_statistics(self, model: nn.Module) -> bool:
        """Entropy and the like cost half a fold more: training shows those of one micro-batch per logging window."""
        return not model.training or ENTROPY not in self._meter

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of the coming step, and the units in them; with ``resample_every`` the policy may draw
        their anchors first.

        Args:
            epoch_iterator: what the epoch still holds.
            num_batches: micro-batches of the step.
            device: where the units are counted.
        """
        if self._online is None or self.state.global_step < self.args.online_after:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self._online.take(
            epoch_iterator, num_batches, step=self.state.global_step, max_steps=self.state.max_steps
        )
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """[3] how many of each of ``UNITS`` the accumulation window holds, over all processes."""
        own = torch.zeros(len(UNITS), dtype=torch.int64, device=device)
        for inputs in batch_samples:
            own += Batch(**inputs).counts().to(device)
        return self._sum_over_ranks(own)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _stop_if_not_finite(self, loss: Tensor, scores: Scores) -> None:
        if torch.isfinite(loss):
            return
        batch = scores.batch
        row_is_bad = ~torch.isfinite(scores.logp)
        negative_is_bad = scores.negatives(row_is_bad) & (batch.negative_row >= 0)
        positive_is_bad = scores.positives(row_is_bad.float()).any(1)
        bad = batch.line[negative_is_bad | positive_is_bad]
        lines = ", ".join(map(str, (bad if len(bad) else batch.line).tolist()))
        step = self.state.global_step
        during = f"step {step + 1}" if self.model.training else f"the evaluation after step {step}"
        raise FastD2OError(
            f"the loss is {loss.item()} in {during}, on dataset lines {lines}. The run stopped before that reached the "
            f"weights; {self._last_checkpoint_in_words()}. Fix: look at those lines, lower learning_rate, or train in "
            "bf16 or float32 instead of fp16"
        )

    # --- data -------------------------------------------------------------------------------------------------

    def _prepare(self, data: Data, role: str, model: nn.Module) -> PreferenceDataset:
        dataset = prepare_dataset(data, self.processing_class, self.mixture, self.args, role=role)
        check_fits(model, "the model", dataset, role)
        logger.info(f"{role} dataset: {dataset.report}")
        self.reports[role] = dataset.report
        return dataset

    def _online_anchors(self, source: Data) -> OnlineAnchors:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise FastD2OError(
                "resample_every lets every process draw with the whole model, which FSDP and DeepSpeed may have shared "
                "out. Fix: train under DDP, or draw anchors between runs with `fastd2o sample`"
            )
        assert not isinstance(source, PreferenceDataset)  # prepare_dataset refuses that
        policy: Any = self.model
        return OnlineAnchors(
            policy,
            getattr(self.processing_class, "tokenizer", self.processing_class),
            source,
            self.train_dataset,
            self.data_collator,
            self.args,
            self.references,
            self._meter.add,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        window = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return _LengthGroupedSampler(window, dataset.lengths, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of this process's share of ``eval_dataset``: every so many-th group, none of them twice.

        Args:
            eval_dataset: the name of one of several evaluation datasets, a dataset as for the trainer, or None for its
                own.
        """
        own = self._evaluation_datasets()
        dataset: Any = eval_dataset
        if eval_dataset is None:
            dataset = self.eval_dataset
        elif isinstance(eval_dataset, str):
            dataset = own.get(eval_dataset, eval_dataset)
        if dataset is None:
            raise ValueError(
                "there is no dataset to evaluate on. Fix: give eval_dataset to the trainer or to evaluate()"
            )
        if not any(dataset is prepared for prepared in own.values()):
            dataset = self._prepare(dataset, _ONLY, self.model)
            self.references.check_fits(dataset, _ONLY)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return DataLoader(
            Subset(dataset, range(rank, len(dataset), world)),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As :meth:`get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def _evaluation_datasets(self) -> dict[str, PreferenceDataset]:
        if self.eval_dataset is None:
            return {}
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else {_ONLY: self.eval_dataset}

    # --- evaluation -------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Measure a batch; what is said of the dataset is ratios of sums, which :meth:`evaluation_loop` forms."""
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, self._prepare_inputs(inputs))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate: the loss is that of the whole dataset as one batch, however it is split."""
        self._eval_meter = Meter()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        measured = self._eval_meter.take(self._sum_over_ranks, self.args.device)
        measured = {"loss": self.mixture.combine(measured), **self._worth_logging(measured)}
        named = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        everyone = self._sum_over_ranks(torch.tensor(output.num_samples, device=self.args.device))
        return output._replace(metrics={**(output.metrics or {}), **named}, num_samples=int(everyone))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with a training loss the metrics of its window."""
        if "loss" in logs:
            logs = {**logs, **self._worth_logging(self._meter.take(self._sum_over_ranks, self.args.device))}
        super().log(logs, start_time)

    def _worth_logging(self, measured: dict[str, float]) -> dict[str, float]:
        """Without the loss of an only objective, which is the loss."""
        only = len(self.args.objective) == 1
        return {name: value for name, value in measured.items() if not (only and name.startswith("loss/"))}

    # --- runs and checkpoints ---------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint of ``output_dir``, or a checkpoint; default:
                the setting of that name in ``args``. On the CPU the run goes on with the same bits as one that was
                never interrupted.

            trial, ignore_keys_for_eval: as for :meth:`transformers.Trainer.train`.

        Raises:
            FastD2OError: ``output_dir`` holds another run, there is no checkpoint to resume from or it is of a run with
                another objective, model, reference or training data, the loss is not finite, or a checkpoint cannot be
                written.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if isinstance(resume, str) and resume.lower() in ("true", "false"):  # from a command line
            resume = resume.lower() == "true"
        with no_empty_folder_left(self.args.output_dir, made=self._makes_output_dir):
            checkpoint = self._claim(resume)
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _claim(self, resume: bool | str | None) -> str | None:
        """Make ``output_dir`` this run's; the checkpoint that it goes on from."""
        if not self._claimed:
            if self.args.should_save:
                claim_output_dir(self.args.output_dir, overwrite=self.args.overwrite, resume=resume)
            self.accelerator.wait_for_everyone()
            self._claimed = True
        self._resumed_from = resolve_checkpoint(self.args.output_dir, resume) if resume else None
        if self._resumed_from is None:
            return None
        if self.args.should_save:
            check_same_run(self._resumed_from, self._run)
        return str(self._resumed_from)

    def _describe_run(self, base_digest: str, train_dataset: PreferenceDataset | None) -> dict[str, Any]:
        """What a run that goes on from a checkpoint must have as it was. Learning rate, batches and steps are free."""
        run: dict[str, Any] = {
            "objective": " ".join(self.args.objective),
            "objective_weights": self.args.objective_weights,
            "base model": f"weights {base_digest[:16]}",
            "reference": self.references.description,
        }
        if train_dataset is not None:
            run["training data"] = f"{len(train_dataset)} groups, tokens {train_dataset.fingerprint()[:16]}"
        return run | {
            f"{objective.name} {name}": value
            for objective, options, _ in self.mixture.parts
            for name, value in vars(options).items()
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that ``from_pretrained`` loads it, with a model card; every file appears whole or not at
        all.

        Args:
            output_dir: where; default: ``args.output_dir``.

        Raises:
            FastD2OError: it cannot be written; what was there is still there.
        """
        if self._staging is not None:  # part of a checkpoint, which is written aside as a whole
            super().save_model(output_dir, _internal_call=True)
            return
        target = Path(output_dir or self.args.output_dir)
        with self._written_aside(target, run_dir=target) as aside:
            written = aside / "model"
            super().save_model(str(written), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and written.is_dir():
                publish_files(written, target)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_weights_are_broken()
        run_dir = Path(super()._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        with self._written_aside(target, run_dir=run_dir) as aside:
            self._staging = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            written = aside / target.name
            self._save_window(written)
            if self.args.should_save:
                note_run(written, self._run)
            if self.args.should_save and self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(target)
                self.state.save_to_json(str(written / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_folder(written, target)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    @contextmanager
    def _written_aside(self, target: Path, *, run_dir: Path) -> Iterator[Path]:
        with written_aside(target, run_dir=run_dir, main=self.args.should_save) as aside:
            self.accelerator.wait_for_everyone()  # nobody writes before the rest of an earlier attempt is gone
            yield aside
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else Trainer asks before the checkpoint is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        self._model_card().save(Path(output_dir or self.args.output_dir) / "README.md")

    def _stop_if_weights_are_broken(self) -> None:
        """An overflow in a gradient breaks the weights one step before the loss tells: keep them out of checkpoints."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
            raise FastD2OError(
                f"the weights are no longer finite after step {self.state.global_step}, so no checkpoint was written; "
                f"{self._last_checkpoint_in_words()}. Fix: lower learning_rate, set max_grad_norm, or train in bf16 or "
                "float32"
            )

    def _last_checkpoint_in_words(self) -> str:
        found = checkpoints(self.args.output_dir)
        return f"the last checkpoint is {str(found[-1])!r}" if found else "there is no checkpoint yet"

    def _save_window(self, folder: Path) -> None:
        """Save what was measured since the last log, so that a resumed run logs what an uninterrupted one does; and the
        anchors that the policy drew for the steps to come.
        """
        window: dict[str, Any] = {
            "loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self._meter.state(),
        }
        if self._online is not None:
            window["online"] = self._online.state()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"window_{self.args.process_index}.json"
        path.write_text(json.dumps(window), encoding="utf-8")

    def load_window(self) -> None:
        """Continue the logging window of the checkpoint resumed from, and its anchors; Trainer has just begun anew."""
        if self._resumed_from is None:
            return
        path = self._resumed_from / f"window_{self.args.process_index}.json"
        if not path.is_file():  # a checkpoint of another trainer, or of fewer processes
            return
        window = json.loads(path.read_text(encoding="utf-8"))
        self._tr_loss.fill_(window["loss"])
        self._total_loss_scalar = window["total_loss"]
        self._globalstep_last_logged = window["last_logged"]
        self._meter.load(window["metrics"], self.args.device)
        if self._online is not None and "online" in window and not self.args.ignore_data_skip:
            self._online.load(window["online"])

    # --- model card -------------------------------------------------------------------------------------------

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
    ) -> None:
        """Write the model card to ``output_dir``; arguments as for :meth:`transformers.Trainer.create_model_card`."""
        if not self.is_world_process_zero():
            return
        card = self._model_card(
            name=model_name,
            base_model=finetuned_from,
            license=license,
            language=language,
            datasets=dataset,
            tags=[tags] if isinstance(tags, str) else tags or (),
        )
        target = Path(self.args.output_dir)
        with written_aside(target, run_dir=target, main=True) as aside:
            card.save(aside / "card" / "README.md")
            publish_files(aside / "card", target)

    def _model_card(self, **given: Any) -> ModelCard:
        measured = {key: value for entry in self.state.log_history for key, value in entry.items()}
        facts: dict[str, Any] = {
            "base_model": self._base_model,
            "reports": self.reports,
            "reference": self.references.description,
            "adapter": is_peft(self.model),
            "step": self.state.global_step,
            "processes": self.args.world_size,
            "metrics": {key: value for key, value in measured.items() if isinstance(value, int | float)},
        }
        return model_card(self.args, **{**facts, **{key: value for key, value in given.items() if value}})


class _WindowRestorer(TrainerCallback):
    """Hands a resumed run its half-full logging window, once Trainer has set up an empty one."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Called by Trainer after it has reset its own sums."""
        self.trainer.load_window()


class _LengthGroupedSampler(LengthGroupedSampler):
    """Groups of like length, in an order that depends on seed and epoch alone, so that a resumed run finds it again."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate before every epoch."""
        self.generator.manual_seed(self.seed + epoch)


def _check_arguments(args: PreferenceConfig, mixture: Mixture, models: dict[str, Any]) -> None:
    for name, model in models.items():
        if model is not None and not isinstance(model, str | os.PathLike | nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}, expected a model, or the path or Hub id of one")
    uses = {"ref_model": mixture.reference, "harmful_ref_model": mixture.harmful_reference}
    for name, used in uses.items():
        if models[name] is not None and not used:
            raise ValueError(
                f"{name} is given, but the objective {' '.join(args.objective)} does not use it. Fix: leave {name} out"
            )
    if args.precompute_ref_log_probs and not mixture.reference:
        raise ValueError(
            f"precompute_ref_log_probs is set, but the objective {' '.join(args.objective)} has no reference. Fix: "
            "leave it out"
        )
    if args.n_gpu > 1:
        raise FastD2OError(
            f"{args.n_gpu} GPUs are visible to one process, which Trainer would drive with torch.nn.DataParallel. Fix: "
            f"launch with `torchrun --nproc_per_node {args.n_gpu} ...`, or make one visible: CUDA_VISIBLE_DEVICES=0"
        )


def _pad_token_id(tokenizer: Any, model: nn.Module) -> int:
    # Padding is masked: any token that the model knows will do, and the tokenizer stays as it is.
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in given if token is not None and token < vocabulary(model))
