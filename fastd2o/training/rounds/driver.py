"""The driver: sample, score, measure, build, train; again.

Every phase reads what it needs from the disk and leaves its result there. A run that was interrupted and one that was
not take the same way: on the CPU they end with the same bits.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastd2o.data import Origin, load_rows
from fastd2o.errors import FastD2OError
from fastd2o.loading import check_model, load_model, load_outline, load_tokenizer
from fastd2o.training.checkpoints import checkpoints
from fastd2o.training.files import PartialFile, partial_path, replace_file, write_rows
from fastd2o.training.generators import (
    Generator,
    TransformersGenerator,
    VLLMGenerator,
    import_vllm,
    release_memory,
)
from fastd2o.training.objectives import SATURATED, Mixture
from fastd2o.training.rounds.builders import Built, ScoredRow, build_anchors, build_labels, build_pairs
from fastd2o.training.rounds.config import RoundsConfig
from fastd2o.training.rounds.report import write_report
from fastd2o.training.rounds.scorers import load_scorer, score_prompt
from fastd2o.training.rounds.state import State, read_json, read_lines, round_folder, write_json
from fastd2o.training.rounds.watch import Measures, measure, sample_logps
from fastd2o.training.sampling import SamplingReport, check_result, read_prompts
from fastd2o.training.sampling_file import draw_rows, sampling_partial
from fastd2o.training.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OPTIMIZER = "optimizer.safetensors"
_WITH_MODELS = ("sample", "measure", "train")


@dataclass(frozen=True)
class RoundRecord:
    """What a round left.

    Attributes:
        measures: of the samples that it began with.
        counts: of its builder; None for the last model's samples, which nothing is trained on.
        training: the last log of its training; None likewise.
    """

    measures: Measures
    counts: dict[str, int] | None
    training: dict[str, float] | None


def run_rounds(
    config: RoundsConfig,
    *,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    say: Callable[[str], None] | None = None,
) -> list[RoundRecord]:
    """Run the rounds of ``config``, or go on with them where they stopped.

    Args:
        config: what to do.
        callbacks: for the trainer of every round; without any, training is silent.
        say: is told each phase as it begins.

    Returns:
        One record for each round, and one for the samples of the last model, which is in ``round-N/model``.

    Raises:
        FastD2OError: the run cannot go on: the folder holds another run, or another process is at work in it, a scorer
            failed, a builder has nothing to train on, a limit is passed, the disk is full. What was finished is kept,
            and the same call goes on from there.
        fastd2o.DataError: a dataset that cannot be used.
    """
    run = _Run(config, callbacks, say or (lambda line: None))
    with run.state.alone():
        for round_ in range(1, config.rounds + 2):
            for phase, result, work in run.phases(round_):
                run.step(round_, phase, result, work)
        run.state.note(config.rounds + 1, "finished")
    return read_records(config.output_dir)


def read_records(output_dir: str | Path) -> list[RoundRecord]:
    """The records of a run's rounds, as far as they are measured."""
    records = []
    round_ = 1
    while (measured := read_json(round_folder(Path(output_dir), round_) / "measures.json")) is not None:
        folder = round_folder(Path(output_dir), round_)
        training = read_json(folder / "training.json")
        last = None if training is None else _last_log(training["log"])
        records.append(RoundRecord(Measures(**measured), read_json(folder / "build.json"), last))
        round_ += 1
    return records


class _Run:
    """A run, set up: what is wrong with prompts, model or folder is known before any weight is loaded."""

    def __init__(
        self,
        config: RoundsConfig,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.callbacks, self.say = config, callbacks, say
        self.folder = Path(config.output_dir)
        training = config.training(1)
        self.device = training.device
        check_model(config.model, "model")
        if training.n_gpu > 1:
            raise FastD2OError(
                f"rounds run on one device, and torch sees {training.n_gpu}. Fix: CUDA_VISIBLE_DEVICES=0"
            )
        if config.generator == "vllm":
            import_vllm()
        self.state = State(self.folder, config.fingerprint())
        self.scorer = load_scorer(config.scorer_options(), self.device)
        self.tokenizer = load_tokenizer(config.model, flag="model", trust_remote_code=config.trust_remote_code)
        self.prompts, _ = read_prompts(
            config.dataset,
            load_outline(config.model, flag="model", trust_remote_code=config.trust_remote_code),
            self.tokenizer,
            config.sampling_options(1),
            negatives=config.builder == "anchors",
        )
        self.origin = Origin.of(config.dataset)

    def phases(self, round_: int) -> Iterator[tuple[str, str, Callable[[int, Path], None]]]:
        """The phases of a round: name, the file that is its last, and the work."""
        yield "sample", "samples.jsonl", self.sample
        yield "score", "scored.jsonl", self.score
        yield "measure", "measures.json", self.measure
        if round_ <= self.config.rounds:
            yield "build", "groups.jsonl", self.build
            yield "train", "training.json", self.train

    def step(self, round_: int, phase: str, result: str, work: Callable[[int, Path], None]) -> None:
        """Do a phase, unless it is done, and look at what came out."""
        folder = round_folder(self.folder, round_)
        try:
            if not (folder / result).exists():
                self.say(f"round {round_}: {phase}")
                self.state.note(round_, phase)
                folder.mkdir(exist_ok=True)
                work(round_, folder)
                if phase in _WITH_MODELS:
                    release_memory()
            # Left where a kill came between the rename and this.
            partial_path(folder / result).unlink(missing_ok=True)
            if phase == "measure":
                if _is_older(self.folder / "report.html", folder / result):
                    self.report()
                self.config.watch().check_samples(round_, Measures(**read_json(folder / result)))
            if phase == "train":
                shutil.rmtree(folder / "train", ignore_errors=True)
                (round_folder(self.folder, round_ - 1) / _OPTIMIZER).unlink(missing_ok=True)
                self.config.watch().check_training(round_, _saturated(read_json(folder / result)["log"]))
        except Exception as error:
            with suppress(FastD2OError):  # a full disk, which is what stopped the run
                self.state.note(round_, phase, stopped=str(error) or type(error).__name__)
                self.report()
            raise

    def report(self) -> None:
        """Write the report of what is measured so far, if anything is."""
        records = read_records(self.folder)
        if records:
            write_report(self.folder, records, self.config.rounds)

    # --- the phases ---------------------------------------------------------------------------------------------

    def sample(self, round_: int, folder: Path) -> None:
        """Draw every prompt's completions from the model that the round begins with."""
        options, out = self.config.sampling_options(round_), folder / "samples.jsonl"
        with self._generator(round_) as generator:
            partial = sampling_partial(out, generator, self.prompts, options)
            rows = draw_rows(generator, self.prompts, options, partial, progress=_watched())
        report = SamplingReport()
        for row in rows:
            report.add(row.counts)
        check_result(report)
        write_json(folder / "sampling.json", asdict(report))
        prompts = {prompt.line: prompt for prompt in self.prompts}
        write_rows(
            out,
            (
                {
                    "line": row.line,
                    "row": prompts[row.line].row,
                    "completions": row.data["anchors"],
                    "cut": row.data["anchor_cut"],
                    "ids": row.ids,
                }
                for row in sorted(rows, key=lambda row: row.line)
            ),
        )

    def score(self, round_: int, folder: Path) -> None:
        """Put a score beside every completion, a prompt at a time; what is scored stays."""
        samples, out = read_lines(folder / "samples.jsonl"), folder / "scored.jsonl"
        partial = PartialFile(out, {"fastd2o_scores": 1}, "fastd2o_scores", lambda record: ScoredRow(**record))
        rows = partial.resume([sample["line"] for sample in samples])
        for sample in tqdm(samples[len(rows) :], desc="Scoring", unit="prompt", disable=not _watched()):
            where = f"the prompt of {self.origin.at(sample['line'])}"
            scores = score_prompt(self.scorer, sample["row"], sample["completions"], where)
            rows.append(ScoredRow(**sample, scores=scores))
            partial.append(rows[-1:])
        write_rows(out, map(asdict, rows))

    def measure(self, round_: int, folder: Path) -> None:
        """Measure the samples, under the model that drew them and under the one that the run began with."""
        rows = self._scored(folder)
        prompts = {prompt.line: prompt for prompt in self.prompts}
        batch_size = self.config.sampling_options(round_).batch_size
        logps = sample_logps(self._load(self._model_of(round_)), prompts, rows, batch_size=batch_size)
        original = logps
        if round_ > 1:
            release_memory()
            original = sample_logps(self._load(self.config.model), prompts, rows, batch_size=batch_size)
        first = None if round_ == 1 else read_json(round_folder(self.folder, 1) / "measures.json")["length"]
        empty = read_json(folder / "sampling.json")["empty"]
        write_json(folder / "measures.json", asdict(measure(rows, logps, original, first, empty)))

    def build(self, round_: int, folder: Path) -> None:
        """Make what the round trains on."""
        built = self._build(self._scored(folder), round_)
        base = [] if self.config.base_dataset is None else [row.data for row in load_rows(self.config.base_dataset)]
        counts = {**built.counts, "rows of base_dataset": len(base)} if base else built.counts
        write_json(folder / "build.json", counts)
        write_rows(folder / "groups.jsonl", [*built.rows, *base])

    def train(self, round_: int, folder: Path) -> None:
        """Train the round's model, from the last checkpoint of this round if there is one."""
        run_dir = folder / "train"
        resume = next(reversed(checkpoints(run_dir)), None)
        args = self.config.training(round_, output_dir=str(run_dir), overwrite=resume is None)
        # In round 1 that is the model before training, of which the trainer takes a copy, as it does for "previous".
        original = self.config.reference == "original" and round_ > 1 and Mixture(args).reference
        keep = self.config.optimizer == "keep"
        trainer = PreferenceTrainer(
            self._load(self._model_of(round_)),
            args,
            train_dataset=str(folder / "groups.jsonl"),
            processing_class=self.tokenizer,
            ref_model=self._load(self.config.model) if original else None,
            callbacks=[_Ends(round_folder(self.folder, round_ - 1) / _OPTIMIZER if keep and round_ > 1 else None)],
        )
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        for callback in self.callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model(str(folder / "model"))
        if keep:
            assert trainer.optimizer is not None
            _save_optimizer(folder / _OPTIMIZER, trainer.optimizer)
        write_json(folder / "training.json", {"log": trainer.state.log_history, "data": str(trainer.reports["train"])})

    # --- what they share ----------------------------------------------------------------------------------------

    def _model_of(self, round_: int) -> str:
        """The folder or name of the model that round ``round_`` begins with."""
        return self.config.model if round_ == 1 else str(round_folder(self.folder, round_ - 1) / "model")

    def _load(self, name: str) -> PreTrainedModel:
        return load_model(
            name,
            flag="model",
            dtype=self.config.training(1).dtype,
            device=str(self.device),
            attn_implementation=self.config.attn_implementation,
            trust_remote_code=self.config.trust_remote_code,
        )

    @contextmanager
    def _generator(self, round_: int) -> Iterator[Generator]:
        """The generator with the weights that round ``round_`` begins with."""
        name = self._model_of(round_)
        generator: TransformersGenerator | VLLMGenerator
        if self.config.generator == "vllm":
            generator = VLLMGenerator(
                name,
                self.tokenizer,
                self.config.training(1).dtype,
                trust_remote_code=self.config.trust_remote_code,
            )
        else:
            generator = TransformersGenerator(self._load(name), self.tokenizer)
        try:
            if not generator.stops:
                raise FastD2OError(
                    f"neither the model {name!r} nor its tokenizer has an EOS token, so no completion would ever end. "
                    "Fix: set eos_token_id in its generation_config.json, or tokenizer.eos_token, to the token that "
                    "ends an answer"
                )
            yield generator
        finally:
            if isinstance(generator, VLLMGenerator):
                generator.close()

    def _scored(self, folder: Path) -> list[ScoredRow]:
        return [ScoredRow(**record) for record in read_lines(folder / "scored.jsonl")]

    def _build(self, rows: list[ScoredRow], round_: int) -> Built:
        if self.config.builder == "pairs":
            return build_pairs(rows)
        if self.config.builder == "anchors":
            return build_anchors(rows)
        assert self.config.threshold is not None
        return build_labels(rows, threshold=self.config.threshold, seed=self.config.sampling_options(round_).seed)


def _is_older(path: Path, than: Path) -> bool:
    """Whether it was written before, or never."""
    return not path.exists() or path.stat().st_mtime_ns < than.stat().st_mtime_ns


def _watched() -> bool:
    """Whether somebody looks at the bars."""
    return sys.stderr.isatty()


# --- training ---------------------------------------------------------------------------------------------------------


class _Ends(TrainerCallback):
    """Begins a round with the optimiser of the one before, if there is a file of it; its last step is logged, and makes
    no checkpoint: the model comes right after it."""

    def __init__(self, optimizer: Path | None) -> None:
        self.optimizer = optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by Trainer once optimiser and scheduler are there, and a checkpoint is loaded."""
        if self.optimizer is not None and state.global_step == 0:
            _load_optimizer(self.optimizer, kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by Trainer after every step."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            # A Trainer that resumes from there would go a step too far where steps do not fill an epoch.
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by Trainer after every epoch."""
        if state.global_step >= state.max_steps:
            control.should_save = False


def _save_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Save the state of every parameter: tensors alone, :class:`RoundsConfig` lets no other optimiser pass."""
    state = optimizer.state_dict()["state"]
    tensors = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    replace_file(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load what :func:`_save_optimizer` saved; learning rate and the like are the new round's."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _last_log(log: list[dict[str, float]]) -> dict[str, float]:
    """The last entry with a loss; nothing where a callback ended the training before the first."""
    return next((entry for entry in reversed(log) if "loss" in entry), {})


def _saturated(log: list[dict[str, float]]) -> float | None:
    last = _last_log(log)
    return next((last[name] for name in SATURATED if name in last), None)
