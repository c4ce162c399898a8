"""``fastd2o sample``: draw anchors for a dataset of negatives."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastd2o.cli.arguments import usage_errors
from fastd2o.cli.libraries import default_device, quiet_libraries
from fastd2o.errors import FastD2OError
from fastd2o.loading import DTYPES, check_model, load_model, load_tokenizer

if TYPE_CHECKING:
    from fastd2o.training.sampling import SamplingOptions, SamplingReport

HELP = "draw anchors for D2O: the model's own good answers to the prompts of a dataset of negatives"

_EPILOG = """\
examples:
  fastd2o sample --model MODEL --dataset negatives.jsonl --out anchors.jsonl --num_anchors 8
  fastd2o sample --model MODEL --dataset negatives.jsonl --out anchors.jsonl --num_anchors 11 \\
      --instruction "Answer kindly and briefly." --max_new_tokens 128 --temperature 0.9
The result is a dataset for: fastd2o train --model MODEL --dataset anchors.jsonl --objective d2o --output_dir OUT
A run that was stopped goes on where it was when the same command is given again.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o sample``."""
    from fastd2o.training.sampling import INSTRUCTIONS, SamplingOptions

    default = SamplingOptions(num_anchors=1)
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, or its name on the Hub")
    add("--dataset", required=True, help="rows with a negative: .jsonl, .json, or a folder of datasets.save_to_disk")
    add("--out", required=True, type=Path, help="the .jsonl file to write")
    add("--num_anchors", required=True, type=int, help="K, samples per prompt (11 in the paper)")
    add(
        "--instruction",
        default=default.instruction,
        help=f"put in front of every prompt, for generation only: a text, or one of {', '.join(INSTRUCTIONS)}, none",
    )
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="longest sample, in tokens")
    add("--temperature", type=float, default=default.temperature, help="of the softmax, above 0")
    add("--top_p", type=float, default=default.top_p, help="draw from the smallest set of tokens with this probability")
    add("--batch_size", type=int, default=default.batch_size, help="samples generated together")
    add("--seed", type=int, default=default.seed, help="of every draw")
    add(
        "--bad_rows",
        choices=("error", "drop"),
        default=default.bad_rows,
        help="stop at a row of no use, or leave it out",
    )
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto is the one they were saved in")
    add("--device", help="where to run, such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--attn_implementation", help="such as sdpa or flash_attention_2 (default: what Transformers picks)")
    add("--overwrite", action="store_true", help="replace OUT, and what is left of a run with other settings")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")


def run(args: argparse.Namespace) -> int:
    """Draw the anchors and print what came out."""
    options = _options(args)
    check_model(args.model)
    if not Path(args.dataset).exists():
        raise FileNotFoundError(f"--dataset: there is no file {args.dataset!r}. Fix: check the path of the dataset")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FastD2OError(
            "sample runs as one process. Fix: start it without torchrun, on a part of the dataset per GPU"
        )
    with quiet_libraries():
        report = _sample(args, options)
        _print_summary(report, args, options)
    return 0


def _options(args: argparse.Namespace) -> SamplingOptions:
    from fastd2o.training.sampling import SamplingOptions

    with usage_errors():
        return SamplingOptions(
            num_anchors=args.num_anchors,
            instruction=args.instruction,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            batch_size=args.batch_size,
            seed=args.seed,
            bad_rows=args.bad_rows,
        )


def _sample(args: argparse.Namespace, options: SamplingOptions) -> SamplingReport:
    from fastd2o.training.sampling_file import check_output, sample_file

    check_output(args.out, args.dataset, overwrite=args.overwrite)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model = load_model(
        args.model,
        dtype=args.dtype,
        device=args.device or default_device(),
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    try:
        return sample_file(model, tokenizer, args.dataset, args.out, options, overwrite=args.overwrite)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None


def _print_summary(report: SamplingReport, args: argparse.Namespace, options: SamplingOptions) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(args.out)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    notes = {
        "rows": (report.rows, ""),
        "anchors": (report.anchors, f"of {report.rows * args.num_anchors} asked for"),
        "cut": (report.cut, f"ended at --max_new_tokens {args.max_new_tokens}; train gives them no end of text"),
        "duplicates": (report.duplicates, "repeat an anchor of the same prompt (kept)"),
        "empty": (report.empty, "drawn anew"),
        "same as the negative": (report.copies, "drawn anew"),
        "dropped": (report.dropped, "still of no use after the last redraw"),
        "rows without anchors": (report.rows_without_anchors, "train leaves them out, unless --allow_no_anchor"),
        "bad rows": (report.bad, "left out"),
        "rows left out": (report.without_negative, "have no negative"),
    }
    for name, (count, note) in notes.items():
        if count or name in ("rows", "anchors"):
            table.add_row(name, str(count), note)
    Console().print(table)
    print(f"Instruction, for generation only: {options.instruction_text or 'none'}")
    print(f"Next: fastd2o train --model {args.model} --dataset {args.out} --objective d2o --output_dir OUT")
