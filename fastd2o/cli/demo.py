"""``fastd2o demo``: a tiny model learns good and bad answers, then unlearns the bad ones, on a CPU in two minutes.

:func:`play` is the whole story. The world it happens in is ``demo_world``, the model ``demo_model``, its alignment
``demo_align``, what is measured ``demo_measure``, what is shown ``demo_report``. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastd2o.errors import FastD2OError

if TYPE_CHECKING:
    from fastd2o.cli.demo_measure import HeadMemory
    from fastd2o.cli.demo_report import Outcome

HELP = "watch a tiny model, made here in minutes, unlearn its rude answers"

_EPILOG = """\
examples:
  fastd2o demo
  fastd2o demo --compare       # D2O beside gradient ascent, NPO and DPO on the same data
"""
_COMPARED = ("dpo", "npo", "gradient_ascent")
_HELD_OUT = 0.2
_MAX_NEW_TOKENS = 48
_SAMPLING_BATCH = 256

_MARK = "demo.json"  # stands in a folder that a demo wrote
_WRITTEN = ("start", "model", "compared", "negatives.jsonl", "anchors.jsonl", "metrics.jsonl", "report.png", _MARK)


@dataclass(frozen=True)
class Settings:
    """The size of a demo.

    Attributes:
        out_dir: the folder it writes to.
        seed: of everything.
        compare: also run the objectives that D2O is compared with.
        keep: keep the models of the compared objectives.
        steps: optimizer steps of each alignment.
        learning_rate: of each alignment. Of 2e-4, 5e-4 and 1e-3, the default leaves D2O, DPO and NPO, each taken by
            itself, with the fewest bad answers; gradient ascent breaks at it. All figures are in examples/README.md.
        tasks: how many of the world's tasks there are; default: all.
        conversations: what the model learns the language from.
        questions_per_task: lessons of each task.
        num_anchors: K, samples of the model for each question.
        samples: answers drawn for each held-out question when a model is judged.

    Raises:
        ValueError: ``steps``, ``learning_rate`` or ``seed`` outside its range.
    """

    out_dir: Path
    seed: int = 0
    compare: bool = False
    keep: bool = False
    steps: int = 80
    learning_rate: float = 5e-4
    tasks: int | None = None
    conversations: int = 24_000
    questions_per_task: int = 2
    num_anchors: int = 5
    samples: int = 6

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}; expected at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"--learning_rate is {self.learning_rate}; expected a number between 0 and 1, such as 5e-4"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; expected a number from 0 to {2**32 - 1}")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o demo``."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--out_dir", type=Path, default=Path("runs/demo"), help="where to write; an earlier demo is replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything: the same seed, the same numbers")
    parser.add_argument("--compare", action="store_true", help="also align with gradient ascent, NPO and DPO")
    parser.add_argument("--keep", action="store_true", help="with --compare: keep the models of the other objectives")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps of each alignment")
    parser.add_argument("--learning_rate", type=float, default=Settings.learning_rate, help="of each alignment")


def run(args: argparse.Namespace) -> int:
    """Play the demo, and say where its files are and what to try next."""
    settings = Settings(args.out_dir, args.seed, args.compare, args.keep, args.steps, args.learning_rate)
    play(settings)
    out = settings.out_dir
    print(
        f"""
The picture: {out / "report.png"}   The figures: {out / "metrics.jsonl"}
The model before is in {out / "start"}, after in {out / "model"}. Try them:
  fastd2o sample --model {out / "model"} --dataset {out / "negatives.jsonl"} --out {out / "my_answers.jsonl"} \\
      --num_anchors 1 --instruction none --max_new_tokens {_MAX_NEW_TOKENS}
  fastd2o train --model {out / "start"} --dataset {out / "anchors.jsonl"} --objective ipo --learning_rate 2e-4 \\
      --max_steps {settings.steps} --output_dir {out / "my_model"}"""
    )
    return 0


def play(settings: Settings) -> tuple[list[Outcome], list[HeadMemory]]:
    """Build a model, align it, judge it before and after, and write everything to ``settings.out_dir``.

    Returns:
        The outcomes, the model at the start first and D2O second; and the head's memory at two sizes of the vocabulary.

    Raises:
        FastD2OError: the folder holds something that no demo wrote.
    """
    from fastd2o.cli.demo_align import GROUPS_PER_STEP, align
    from fastd2o.cli.demo_measure import Examiner, measure_heads
    from fastd2o.cli.demo_model import build_model, build_tokenizer, teach
    from fastd2o.cli.demo_report import Outcome, draw_report, print_report, write_metrics
    from fastd2o.cli.demo_world import INSTRUCTION, load_world
    from fastd2o.cli.libraries import quiet_libraries
    from fastd2o.training.sampling import sample_anchors

    out, seed = settings.out_dir, settings.seed
    claim_folder(out)
    with quiet_libraries(), _one_thread():
        _say("1/4  A tiny Llama learns a small world, in which half of the answers are rude.")
        world = load_world(settings.tasks)
        lessons, held_out = world.lessons(random.Random(f"{seed}/lessons"), settings.questions_per_task, _HELD_OUT)
        conversations = list(world.conversations(random.Random(f"{seed}/language"), settings.conversations, held_out))
        tokenizer = build_tokenizer(conversations)
        model = build_model(tokenizer, seed)
        teach(model, tokenizer, conversations, seed)
        model.save_pretrained(out / "start")
        tokenizer.save_pretrained(out / "start")
        examiner = Examiner(world, held_out, tokenizer, samples=settings.samples, seed=seed)
        outcomes = [Outcome("start", examiner.score(model), examiner.interview(model))]

        _say(f'2/4  It answers each training question {settings.num_anchors} times, told: "{INSTRUCTION}"')
        pairs = [lesson.row() for lesson in lessons]
        negatives = [{name: row[name] for name in ("prompt", "rejected")} for row in pairs]
        anchored = sample_anchors(
            model,
            tokenizer,
            negatives,
            num_anchors=settings.num_anchors,
            instruction=INSTRUCTION,
            max_new_tokens=_MAX_NEW_TOKENS,
            batch_size=_SAMPLING_BATCH,
            seed=seed,
        )
        _write_rows(out / "negatives.jsonl", negatives)
        _write_rows(out / "anchors.jsonl", anchored)
        memories = measure_heads(model, tokenizer, anchored[:GROUPS_PER_STEP])

        _say("3/4  D2O aligns it with these anchors and the rude answers. No good answer is shown to it.")
        rows = {"d2o": anchored, "dpo": pairs, "npo": negatives, "gradient_ascent": negatives}
        for objective in ("d2o", *(_COMPARED if settings.compare else ())):
            if objective != "d2o":
                _say(f"     For comparison: {objective}.")
            folder = out / "model" if objective == "d2o" else out / "compared" / objective
            outcome = align(
                objective,
                out / "start",
                rows[objective],
                tokenizer,
                examiner,
                output_dir=folder,
                learning_rate=settings.learning_rate,
                steps=settings.steps,
                seed=seed,
            )
            outcomes.append(outcome)

    _say("4/4  The report.")
    if not settings.keep:
        shutil.rmtree(out / "compared", ignore_errors=True)
    write_metrics(out / "metrics.jsonl", outcomes, memories, {**asdict(settings), "out_dir": str(out)})
    draw_report(out / "report.png", outcomes, memories)
    print_report(outcomes, memories)
    return outcomes, memories


def claim_folder(folder: Path) -> None:
    """Make ``folder`` ready: what an earlier demo wrote there is removed, and nothing else.

    Raises:
        FastD2OError: it is a file, or holds files and no demo has marked it as its own.
    """
    if folder.exists() and not folder.is_dir():
        raise FastD2OError(f"--out_dir: {str(folder)!r} is a file. Fix: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise FastD2OError(f"--out_dir: {str(folder)!r} holds files that no demo wrote. Fix: give another folder")
    for name in _WRITTEN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).write_text('{"written_by": "fastd2o demo"}\n', encoding="utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: the numbers do not depend on how many there are, and a busy machine does not stall the demo.

    With matrices this small a second thread gains a third, and loses far more where it has to share its core.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)
