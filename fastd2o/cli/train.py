"""``fastd2o train``: align a model with a dataset of preferences, or of negatives alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_origin

from fastd2o.cli.arguments import JSON, UsageError, usage_errors
from fastd2o.cli.libraries import quiet_libraries
from fastd2o.loading import check_model, load_model, load_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import HfArgumentParser, PreTrainedModel

    from fastd2o.training import PreferenceConfig, PreferenceTrainer

HELP = "align a model from negatives (D2O and others) or from preference pairs (DPO and others)"

_USAGE = "fastd2o train --model MODEL --dataset FILE --output_dir OUT [--objective NAME ...] [options]"
_EPILOG = """\
examples:
  fastd2o train --model MODEL --dataset anchors.jsonl --objective d2o --output_dir OUT
  fastd2o train --model MODEL --dataset pairs.jsonl --objective dpo --beta 0.2 --output_dir OUT --use_peft \\
      --learning_rate 1e-4 --dtype bfloat16
  fastd2o train --config run.yaml --learning_rate 2e-6
  torchrun --nproc_per_node 4 -m fastd2o train --model MODEL --dataset pairs.jsonl --objective npo --output_dir OUT
A run that was stopped goes on with --resume_from_checkpoint. --debug alone shows the traceback of a failure; with a
value it is the Trainer's own option.
"""


@dataclass
class RunArguments:
    """What ``fastd2o train`` asks for besides :class:`fastd2o.PreferenceConfig`."""

    _argument_group_name: ClassVar[str] = "model and data"

    model: str = field(metadata={"help": "Folder of a model, or its name on the Hub."})
    dataset: str = field(metadata={"help": "Training data: .jsonl, .json, or a folder of datasets.save_to_disk."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Data to evaluate on, see --eval_strategy."})
    ref_model: str | None = field(
        default=None, metadata={"help": "The reference model. Default: the model as it is before training."}
    )
    harmful_ref_model: str | None = field(
        default=None, metadata={"help": "d2o: the reference of the anchors. Default: the same as of the negatives."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Such as sdpa or flash_attention_2. Default: what Transformers picks."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter, not the weights; --learning_rate 1e-4 suits it."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, divided by its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in the adapter; see --disable_dropout."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get an adapter: names, or all-linear for every linear layer but the head."},
    )
    config: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "YAML file with any of these options; the command line wins."},
    )


def parents() -> list[argparse.ArgumentParser]:
    """The options, made from the dataclasses that hold them."""
    from transformers import TrainingArguments
    from transformers.hf_argparser import string_to_bool

    parser = _option_parser(add_help=False)
    for action in parser._actions:
        if action.type is string_to_bool:
            # HfArgumentParser lets a switch stand alone only if it is off by default, not if it is undecided (None).
            action.nargs, action.const = "?", True
        if isinstance(action, argparse._StoreFalseAction):
            action.help = f"The same as --{action.dest} false."
        if get_origin(action.type) is dict:
            action.type, action.metavar = json.loads, JSON
        if action.dest in TrainingArguments._VALID_DICT_FIELDS:
            action.metavar = JSON
        if "--resume_from_checkpoint" in action.option_strings:
            # Alone, as in Trainer.train(resume_from_checkpoint=True), it means the last one.
            action.nargs, action.const = "?", "true"
            action.help = "Go on from this checkpoint; without a value: from the last one in --output_dir."
        if "--output_dir" in action.option_strings:
            action.required = True
            action.help = "Where the model and its checkpoints go."
    _sort_into_groups(parser)
    return [parser]


def _sort_into_groups(parser: argparse.ArgumentParser) -> None:
    """For ``--help``: what a run cannot do without first, the hundred options of Transformers last."""
    from transformers import TrainingArguments

    *_, options, run = parser._action_groups
    ours = parser.add_argument_group("objective, data and reference")
    theirs = parser.add_argument_group("the Trainer's own (transformers.TrainingArguments)")
    inherited = {field.name for field in fields(TrainingArguments)}
    for action in options._group_actions:
        if action.dest in ("output_dir", "overwrite", "resume_from_checkpoint"):
            run._group_actions.append(action)
        else:
            (theirs if action.dest in inherited else ours)._group_actions.append(action)
    options._group_actions.clear()


def configure(parser: argparse.ArgumentParser) -> None:
    """Finish what :func:`parents` began."""
    parser.usage = _USAGE
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    """Train, save, and say where the model is."""
    options, config = _options(args)
    for flag in ("dataset", "eval_dataset"):
        path = getattr(options, flag)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"--{flag}: there is no file {path!r}. Fix: check the path of the dataset")
    for flag in ("model", "ref_model", "harmful_ref_model"):
        name = getattr(options, flag)
        if name is not None:
            check_model(name, f"--{flag}")
    resume = _resume(config.resume_from_checkpoint)
    from fastd2o.training.checkpoints import check_output_dir, resolve_checkpoint

    with usage_errors():
        check_output_dir(config.output_dir, overwrite=config.overwrite, resume=resume)
    if resume is not None:
        resolve_checkpoint(config.output_dir, resume)
    with quiet_libraries():
        trainer = _build_trainer(options, config)
        main_process = trainer.is_world_process_zero()
        if main_process:
            for report in trainer.reports.values():
                if report.clean:  # what is not has been warned of
                    print(report, flush=True)
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(config.output_dir)) from None
        trainer.save_model()
        # A process that ends without having left its group is now and then aborted by a thread of it.
        trainer.accelerator.end_training()
    if main_process:
        out = config.output_dir
        print(f"The model is in {out}")
        print(
            f"Next: fastd2o sample --model {out} --dataset {options.dataset} --out samples.jsonl --num_anchors 1 "
            "--instruction none"
        )
    return 0


def _options(args: argparse.Namespace) -> tuple[RunArguments, PreferenceConfig]:
    """The arguments as the dataclasses they were made from, which check them."""
    with quiet_libraries(), usage_errors():
        run, config = _option_parser().parse_dict(vars(args), allow_extra_keys=True)
    return run, config


def _option_parser(**options: Any) -> HfArgumentParser:
    from transformers import HfArgumentParser

    from fastd2o.training import PreferenceConfig

    return HfArgumentParser([RunArguments, PreferenceConfig], **options)  # type: ignore[list-item]


def _resume(value: str | None) -> bool | str | None:
    """``--resume_from_checkpoint`` as ``Trainer.train`` takes it: True for the last checkpoint, or a folder."""
    if value is None or value.lower() == "false":
        return None
    return True if value.lower() == "true" else value


def _how_to_go_on(output_dir: str | None) -> str:
    """For a run that was interrupted: from where it can go on."""
    from fastd2o.training.checkpoints import checkpoints

    saved = checkpoints(output_dir or "")
    if not saved:
        return "interrupted before the first checkpoint (see --save_steps), so the run begins anew"
    return f"interrupted; the same command with --resume_from_checkpoint goes on from {saved[-1]}"


def _build_trainer(run: RunArguments, config: PreferenceConfig) -> PreferenceTrainer:
    from transformers import PrinterCallback, ProgressCallback

    from fastd2o.cli.progress import LogLines, ProgressBar
    from fastd2o.training import PreferenceTrainer

    peft_config = _lora(run, config)

    def load(flag: str) -> PreTrainedModel:
        return load_model(
            getattr(run, flag.removeprefix("--")),
            flag=flag,
            dtype=config.dtype,
            attn_implementation=run.attn_implementation,
            trust_remote_code=run.trust_remote_code,
        )

    trainer = PreferenceTrainer(
        model=load("--model"),
        args=config,
        train_dataset=run.dataset,
        eval_dataset=run.eval_dataset,
        processing_class=load_tokenizer(run.model, trust_remote_code=run.trust_remote_code),
        ref_model=load("--ref_model") if run.ref_model else None,
        harmful_ref_model=load("--harmful_ref_model") if run.harmful_ref_model else None,
        peft_config=peft_config,
    )
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if not config.disable_tqdm:
        trainer.add_callback(ProgressBar)
    trainer.add_callback(LogLines)
    return trainer


def _lora(run: RunArguments, config: PreferenceConfig) -> LoraConfig | None:
    """The adapter asked for; None without ``--use_peft``, which the other options then must not contradict."""
    if not run.use_peft:
        default = RunArguments(model="", dataset="")
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(run, name) != getattr(default, name):
                raise UsageError(f"--{name} is set, but no adapter is trained. Fix: add --use_peft, or leave it out")
        return None
    if run.lora_dropout and config.disable_dropout:
        raise UsageError(
            "--lora_dropout is set, but all dropout is off. Fix: add --disable_dropout false, or leave it out"
        )
    from peft import LoraConfig

    targets = run.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
