"""Whether it pays to leave columns of the vocabulary out of the gradients (``vocab_mass_tol`` of
``fastd2o.linear_preference_loss``) on a trained language model: how many are left, what is lost, how long it takes.

    python -m benchmarks.active_vocabulary --text prose.txt pairs.jsonl                  trains a small model first
    python -m benchmarks.active_vocabulary --text prose.txt pairs.jsonl --model FOLDER   measures one that is there

A byte-level BPE and a Llama are trained on 19 of 20 pieces of the text. The loss is D2O's on groups of four sequences
of the twentieth. Times are ratios to ``vocab_mass_tol=0``, which takes turns with the others: the median of the ratios
within a round. Errors are against float64 on the same, perhaps rounded, hidden states and weight. Beside it stands a
filter of elements: gradients without the entries whose softmax is below 2^-12, as Cut Cross-Entropy skips blocks.

Shapes: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import fastd2o
from fastd2o.losses import Groups, d2o_loss

from .instruments import timed
from .race import Patience
from .results import FOLDER, machine, median_ratio

TOLERANCES = (0.0, 1e-1, 1e-2, 1e-3, 1e-4)
DTYPES = (torch.bfloat16, torch.float32)
# Cut Cross-Entropy skips a block of the gradient if every entry is smaller than this, before the loss's coefficient.
FILTER = 2.0**-12
BLOCK_TOKENS, BLOCK_VOCAB = 128, 256

END = "<|end|>"
CONTEXT = 128  # tokens that are predicted in one sequence
BATCH = 16
PEAK_RATE, WARM_UP_STEPS = 2e-3, 40
PIECE_CHARACTERS = 4000
HELD_OUT_EVERY = 20
GROUP = 4  # sequences: a negative and three anchors
REFERENCE_NOISE = 0.1  # of the hidden states' standard deviation


@dataclass(frozen=True)
class Setting:
    """What the loss is computed of.

    Attributes:
        tokens: T.
        text: "held-out" or "training".
        trained: whether the model is; if not, it has the weights that it began with.
        sharpness: logits are multiplied by this: the softmax of a model that is surer of itself.
        width: hidden states and weight are padded with zeros to this D: the same softmax, the products of a wider
            model.
    """

    tokens: int
    text: str = "held-out"
    trained: bool = True
    sharpness: float = 1.0
    width: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens"]
        parts += ["training text"] if self.text == "training" else []
        parts += [] if self.trained else ["untrained"]
        parts += [] if self.sharpness == 1.0 else [f"logits x {self.sharpness:g}"]
        parts += [] if self.width is None else [f"D {self.width}"]
        return ", ".join(parts)


SETTINGS = (
    Setting(128),
    Setting(512),
    Setting(2048),
    Setting(2048, text="training"),
    Setting(512, sharpness=2.0),
    Setting(2048, sharpness=2.0),
    Setting(2048, sharpness=4.0),
    Setting(2048, trained=False),
    Setting(2048, width=1024),
    Setting(2048, sharpness=2.0, width=1024),
    Setting(2048, sharpness=4.0, width=1024),
)


@dataclass
class Row:
    """Forward and backward at one tolerance.

    Attributes:
        dtype: of hidden states, weight and products.
        tol: ``vocab_mass_tol``.
        active_columns: share of the columns that the gradients are formed of.
        rounds: how many runs were timed.
        seconds, min, max: of these, the median, the fastest, the slowest.
        over_exact: time over that without tolerance in the same round, the median of that.
        errors: relative to the norm in float64: of dX, of the worst row of dX relative to that row, of dW.
    """

    dtype: str
    tol: float
    active_columns: float
    rounds: int
    seconds: float
    min: float
    max: float
    over_exact: float
    errors: dict[str, float]


@dataclass
class Tolerance:
    """What one tolerance does, in float64, where nothing but the columns left out makes an error.

    Attributes:
        active_columns: share of the columns that the gradients are formed of, whose rows of dW are not 0.
        one_token, most_demanding: share that one token would need by itself, on average and the largest.
        of_bound: errors over their bounds: of the row of dX where that is largest, of dW, of the gradient of a bias.
        on_average: share of the columns that are needed if the tolerance is for the mean over tokens, weighted with the
            bound of each one's dW, in place of each token.
        errors_on_average: of the gradients that are formed of these, as in :class:`Row`.
    """

    tol: float
    active_columns: float
    one_token: float
    most_demanding: float
    of_bound: dict[str, float]
    on_average: float
    errors_on_average: dict[str, float]


@dataclass
class Filter:
    """Gradients without entries whose softmax is small.

    Attributes:
        entries: share of the T x V entries that are kept.
        blocks: share of the blocks of 128 x 256 that have one of these.
        blocks_sorted: the same with the vocabulary sorted by mean logit.
        errors: without the entries, as in :class:`Row`.
        errors_of_blocks: without the blocks of the sorted vocabulary that have none.
    """

    entries: float
    blocks: float
    blocks_sorted: float
    errors: dict[str, float]
    errors_of_blocks: dict[str, float]


@dataclass
class Figures:
    """All of one setting; what follows from the softmax alone is left out of those with a padded ``width``.

    Attributes:
        title: of the setting.
        entropy: of a token's softmax, nats, the mean.
    """

    setting: Setting
    title: str
    entropy: float
    tolerances: list[Tolerance] = field(default_factory=list)
    filter: Filter | None = None
    rows: list[Row] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Train if need be, measure, write, show."""
    arguments = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    torch.manual_seed(0)
    training, held_out = split(list(pieces(arguments.text)))
    tokenizer, model = load(arguments.model)
    if tokenizer is None:
        tokenizer = train_tokenizer(training, arguments.vocab)
        console.print(f"vocabulary {len(tokenizer)} of {arguments.vocab}", highlight=False)
    streams = {"training": encode(tokenizer, training), "held-out": encode(tokenizer, held_out)}
    if model is None:
        model = AutoModelForCausalLM.from_config(llama(tokenizer))
        model.config.trained = train(model, streams["training"], arguments.minutes)
        if arguments.model is not None:
            model.save_pretrained(arguments.model)
            tokenizer.save_pretrained(arguments.model)
    about = describe(model, streams)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)

    figures = []
    for setting in SETTINGS:
        problem = Problem.of(model, streams[setting.text], setting)
        figures.append(measure(problem, setting, arguments.rounds))
        path = write(arguments.out, about, figures)
    show(console, figures)
    console.print(f"written to {path}", highlight=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.active_vocabulary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain text, or .jsonl with text in it")
    parser.add_argument("--model", type=Path, help="folder of a model and its tokenizer; made if it is not there")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training (default: 20)")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of the tokenizer, if the text has as many")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many; short ones are repeated more often")
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER / "active-vocabulary",
        help="folder to write cpu.json to (default: %(default)s)",
    )
    return parser.parse_args(argv)


def write(folder: Path, about: dict[str, Any], figures: list[Figures]) -> Path:
    """What there is so far, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cpu.json"
    result = {"machine": machine("cpu"), "model": about, "figures": [asdict(of_setting) for of_setting in figures]}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


# --- text and model ---------------------------------------------------------------------------------------------------


def pieces(paths: list[Path]) -> Iterator[str]:
    """Lines together of some thousand characters; of a .jsonl, all the text in a line."""
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if path.suffix == ".jsonl":
            yield from ("\n".join(strings(json.loads(line))) for line in lines)
            continue
        piece = ""
        for line in lines:
            piece += line
            if len(piece) >= PIECE_CHARACTERS:
                yield piece
                piece = ""
        if piece:
            yield piece


def strings(value: Any) -> Iterator[str]:
    """The texts in a line of JSON, without the roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != "role":
                yield from strings(item)


def split(every: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out pieces."""
    return [piece for i, piece in enumerate(every) if i % HELD_OUT_EVERY], every[::HELD_OUT_EVERY]


def load(folder: Path | None) -> tuple[Any, Any]:
    """Tokenizer and model in a folder, if there are."""
    if folder is None or not (folder / "config.json").exists():
        return None, None
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float()


def train_tokenizer(training: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of pairs that occur more than once."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """[N] int64: the pieces one after the other."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return torch.tensor([token for text in texts for token in [*tokenizer(text, verbose=False).input_ids, *end]])


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def train(model: Any, stream_N: Tensor, minutes: float) -> dict[str, float]:
    """AdamW in bfloat16 on windows at random, its rate falling to 0 as the time runs out. Returns what was done."""
    fastd2o.attach(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start, limit, step, loss = time.monotonic(), 60 * minutes, 0, math.inf
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
    with Progress(TextColumn("training"), *columns) as progress:
        task = progress.add_task("training", total=limit, said="")
        while (elapsed := time.monotonic() - start) < limit:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - elapsed / limit)
            batch = stream_N.unfold(0, CONTEXT + 1, 1)[torch.randint(len(stream_N) - CONTEXT, (BATCH,))]
            with torch.autocast("cpu", torch.bfloat16):
                logprob = model(input_ids=batch, labels=batch, fused=True).log_probs
            mean = -logprob.sum() / (BATCH * CONTEXT)
            mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss, step = mean.item(), step + 1
            progress.update(task, completed=elapsed, said=f"step {step}, perplexity {math.exp(min(loss, 20)):,.0f}")
    fastd2o.detach(model.eval())
    return {"minutes": minutes, "steps": step, "tokens": step * BATCH * CONTEXT}


def describe(model: Any, streams: dict[str, Tensor]) -> dict[str, Any]:
    """Size and perplexities."""
    counts_V = streams["training"].bincount(minlength=model.config.vocab_size).double() + 1
    unigram = -(counts_V / counts_V.sum()).log()[streams["held-out"]].mean()
    return {
        "vocab": model.config.vocab_size,
        "hidden": model.config.hidden_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": getattr(model.config, "trained", None),
        **{f"tokens, {name}": len(stream) for name, stream in streams.items()},
        **{f"perplexity, {name}": round(perplexity(model, stream), 1) for name, stream in streams.items()},
        "perplexity, unigram": round(math.exp(unigram), 1),
    }


@torch.no_grad()
def perplexity(model: Any, stream_N: Tensor, sequences: int = 256) -> float:
    """Of evenly spaced sequences."""
    fastd2o.attach(model)
    logprob = [
        model(input_ids=batch, labels=batch, fused=True).log_probs
        for batch in windows(stream_N, sequences).split(BATCH)
    ]
    fastd2o.detach(model)
    return math.exp(-torch.cat(logprob)[:, 1:].mean())


def windows(stream_N: Tensor, sequences: int) -> Tensor:
    """[sequences, CONTEXT + 1], evenly spaced."""
    start = torch.linspace(0, len(stream_N) - CONTEXT - 1, sequences).long()
    return stream_N.unfold(0, CONTEXT + 1, 1)[start]


# --- the loss, and what is exact --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A D2O loss on groups of four sequences: hidden [T, D], weight [V, D], target and sequence [T], and for each of
    the S sequences its group and its log-probability under a reference."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    sequence: Tensor
    groups: Groups
    ref_logp: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, stream_N: Tensor, setting: Setting) -> Problem:
        """The last tokens of evenly spaced sequences. The reference is the model with noise on its hidden states."""
        sequences = GROUP * math.ceil(setting.tokens / (GROUP * CONTEXT))
        counted = setting.tokens // sequences
        if not setting.trained:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model.config)
        batch = windows(stream_N, sequences)
        hidden = model.base_model(batch[:, :-1]).last_hidden_state[:, -counted:].flatten(0, 1)
        weight = model.get_output_embeddings().weight.detach() * setting.sharpness
        target = batch[:, -counted:].flatten()
        number = torch.arange(sequences)
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) * hidden.std()
        reference = fastd2o.linear_logprob(hidden + REFERENCE_NOISE * noise, weight, target)
        padding = (0, 0 if setting.width is None else setting.width - hidden.shape[1])
        return cls(
            F.pad(hidden, padding),
            F.pad(weight, padding),
            target,
            number.repeat_interleave(counted),
            Groups(number // GROUP, number % GROUP != 0),
            reference.view(sequences, counted).sum(1).double(),
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """Rounded."""
        hidden, weight = self.hidden.to(dtype), self.weight.to(dtype)
        return Problem(hidden, weight, self.target, self.sequence, self.groups, self.ref_logp)

    def run(self, tol: float, bias: Tensor | None = None) -> tuple[float, list[Tensor]]:
        """The share of active columns; the gradients of hidden, weight, and of a bias if there is one."""
        leaves = [tensor.detach().requires_grad_() for tensor in (self.hidden, self.weight, bias) if tensor is not None]
        output = fastd2o.linear_preference_loss(
            leaves[0],
            leaves[1],
            self.target,
            self.sequence,
            self.groups,
            objective="d2o",
            ref_logp=self.ref_logp,
            vocab_mass_tol=tol,
            bias=None if bias is None else leaves[2],
        )
        gradients = torch.autograd.grad(output.loss, leaves)
        return float(output.metrics.get("active_columns", 1.0)), list(gradients)


class Exact:
    """A problem in float64, on full logits.

    Attributes:
        problem: in float64.
        softmax_TV: of every token.
        coef_T1: the loss's derivative with respect to every token's log-probability.
        gradients: of hidden and weight.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem = problem.to(torch.float64)
        logprob_TV = torch.mm(problem.hidden, problem.weight.T).log_softmax(1)
        token_logp = logprob_TV.gather(1, problem.target[:, None]).squeeze(1).requires_grad_()
        logp_G4, ref_G4 = (
            of_sequences.view(-1, GROUP)
            for of_sequences in (token_logp.view(len(problem.ref_logp), -1).sum(1), problem.ref_logp)
        )
        loss = d2o_loss(logp_G4[:, 0], logp_G4[:, 1:], ref_negative_logp=ref_G4[:, 0], ref_anchor_logp=ref_G4[:, 1:])
        self.coef_T1 = torch.autograd.grad(loss, token_logp)[0][:, None]
        self.softmax_TV = logprob_TV.exp_()
        self.gradients = self.of(self.unit_TV())

    def unit_TV(self) -> Tensor:
        """``onehot - softmax``."""
        unit_TV = -self.softmax_TV
        unit_TV[torch.arange(len(unit_TV)), self.problem.target] += 1
        return unit_TV

    def of(self, unit_TV: Tensor) -> list[Tensor]:
        """Gradients of hidden and weight, made of what stands for ``onehot - softmax``, which is overwritten."""
        unit_TV *= self.coef_T1
        return [unit_TV @ self.problem.weight, unit_TV.T @ self.problem.hidden]

    def errors(self, found: list[Tensor]) -> dict[str, float]:
        """Of gradients of hidden and weight."""
        (exact_X, exact_W), (error_X, error_W) = self.gradients, self.differences(found)
        return {
            "hidden_gradient": float(error_X.norm() / exact_X.norm()),
            "worst_token": float((error_X.norm(dim=1) / exact_X.norm(dim=1)).max()),
            "weight_gradient": float(error_W.norm() / exact_W.norm()),
        }

    def differences(self, found: list[Tensor]) -> list[Tensor]:
        """From gradients of hidden and weight."""
        return [ours.double() - exact for ours, exact in zip(found, self.gradients, strict=True)]

    def entropy(self) -> float:
        """The mean over tokens, nats."""
        return float(torch.special.entr(self.softmax_TV).sum(1).mean())

    def tolerances(self) -> list[Tolerance]:
        """What each tolerance leaves out, and whether its bounds hold."""
        problem, coef_T = self.problem, self.coef_T1.abs().squeeze(1)
        bias_V = problem.weight.new_zeros(len(problem.weight))
        exact_bias_V = (self.unit_TV() * self.coef_T1).sum(0)
        up_to_TV = self.softmax_TV.sort(dim=1).values.cumsum(1)
        weight_T = coef_T * problem.hidden.norm(dim=1)
        average_V = (weight_T / weight_T.sum()) @ self.softmax_TV
        average_V[problem.target] = 1.0
        up_to_V, order_V = average_V.sort()
        up_to_V = up_to_V.cumsum(0)
        found = []
        for tol in TOLERANCES[1:]:
            needed_T = (up_to_TV > tol).double().mean(1)
            _, (hidden, weight, bias) = problem.run(tol, bias_V)
            error_X, error_W = self.differences([hidden, weight])
            bounds = {
                "hidden_gradient": coef_T * tol * problem.weight.norm(dim=1).max(),
                "weight_gradient": (weight_T * tol).sum(),
                "bias_gradient": (coef_T * tol).sum(),
            }
            errors = (error_X.norm(dim=1), error_W.norm(), (bias - exact_bias_V).norm())
            needed_V = torch.empty_like(up_to_V).index_copy_(0, order_V, (up_to_V > tol).double())
            found.append(
                Tolerance(
                    tol=tol,
                    active_columns=float(weight.any(dim=1).double().mean()),
                    one_token=float(needed_T.mean()),
                    most_demanding=float(needed_T.max()),
                    of_bound={
                        name: float((error / bound).max())
                        for (name, bound), error in zip(bounds.items(), errors, strict=True)
                    },
                    on_average=float(needed_V.mean()),
                    errors_on_average=self.errors(self.of(self.unit_TV().mul_(needed_V))),
                )
            )
        return found

    def filter(self) -> Filter:
        """Without the entries that are small."""
        unit_TV = self.unit_TV()
        large_TV = unit_TV.abs() >= FILTER
        order_V = (self.problem.hidden.mean(0) @ self.problem.weight.T).argsort()
        blocks, in_blocks_TV = blocks_with(large_TV[:, order_V])
        sorted_TV = torch.empty_like(in_blocks_TV)
        sorted_TV[:, order_V] = in_blocks_TV
        return Filter(
            entries=float(large_TV.double().mean()),
            blocks=blocks_with(large_TV)[0],
            blocks_sorted=blocks,
            errors=self.errors(self.of(unit_TV * large_TV)),
            errors_of_blocks=self.errors(self.of(unit_TV * sorted_TV)),
        )


def blocks_with(chosen_TV: Tensor) -> tuple[float, Tensor]:
    """The share of blocks that have an entry that is chosen, and all entries of these."""
    tokens, columns = chosen_TV.shape
    padded = F.pad(chosen_TV, (0, -columns % BLOCK_VOCAB, 0, -tokens % BLOCK_TOKENS))
    blocks = padded.unflatten(0, (-1, BLOCK_TOKENS)).unflatten(2, (-1, BLOCK_VOCAB)).any(3).any(1)
    entries = blocks.repeat_interleave(BLOCK_TOKENS, 0).repeat_interleave(BLOCK_VOCAB, 1)
    return float(blocks.double().mean()), entries[:tokens, :columns]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(problem: Problem, setting: Setting, rounds: int) -> Figures:
    """All figures of one setting."""
    exact = Exact(problem)
    figures = Figures(setting, str(setting), exact.entropy())
    if setting.width is None:
        figures.tolerances, figures.filter = exact.tolerances(), exact.filter()
    for dtype in DTYPES:
        figures.rows += measure_dtype(problem.to(dtype), f"{setting}, {_name(dtype)}", rounds)
    return figures


def measure_dtype(problem: Problem, title: str, rounds: int) -> list[Row]:
    """Errors first, which warms up as well; then the tolerances take turns."""
    exact = Exact(problem)
    runs = {tol: functools.partial(problem.run, tol) for tol in TOLERANCES}
    found = {tol: run() for tol, run in runs.items()}
    errors = {tol: exact.errors(gradients) for tol, (_, gradients) in found.items()}
    shares = {tol: share for tol, (share, _) in found.items()}
    del exact, found
    times: dict[float, list[float]] = {tol: [] for tol in runs}
    rounds = Patience(rounds=rounds).rounds_of(timed(runs[0.0], "cpu"))
    for _ in track(range(rounds), description=f"{title}: {rounds} rounds of {len(runs)}"):
        for tol, run in runs.items():
            times[tol].append(timed(run, "cpu"))
    return [
        Row(
            dtype=_name(problem.hidden.dtype),
            tol=tol,
            active_columns=shares[tol],
            rounds=rounds,
            seconds=sorted(times[tol])[rounds // 2],
            min=min(times[tol]),
            max=max(times[tol]),
            over_exact=median_ratio(times[tol], times[0.0]),
            errors=errors[tol],
        )
        for tol in TOLERANCES
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- tables -----------------------------------------------------------------------------------------------------------


def show(console: Console, figures: list[Figures]) -> None:
    """Three tables: time and error, columns and bounds, the filter of elements."""
    table = _table("Forward and backward", ["", "dtype"], ["tol", "columns", "seconds", "/ tol 0", "dX", "worst", "dW"])
    for of_setting in figures:
        table.add_section()
        for row in of_setting.rows:
            numbers = (f"{row.active_columns:.1%}", f"{row.seconds:.3f}", f"{row.over_exact:.2f}")
            table.add_row(of_setting.title, row.dtype, f"{row.tol:g}", *numbers, *_errors(row.errors))
    console.print(table)

    table = _table(
        "Columns that one token needs (mean, most), that all need, error over bound; that all need on average, error",
        [""],
        ["entropy", "tol", "one", "most", "all", "dX", "dW", "db", "average", "dX", "worst", "dW"],
    )
    for of_setting in figures:
        for of_tol in of_setting.tolerances:
            shares = (of_tol.one_token, of_tol.most_demanding, of_tol.active_columns)
            table.add_row(
                of_setting.title,
                f"{of_setting.entropy:.2f}",
                f"{of_tol.tol:g}",
                *(f"{share:.1%}" for share in shares),
                *(f"{value:.3f}" for value in of_tol.of_bound.values()),
                f"{of_tol.on_average:.1%}",
                *_errors(of_tol.errors_on_average),
            )
    console.print(table)

    table = _table(
        f"Without entries below {FILTER:.2g}, in float64; then without blocks of the sorted vocabulary",
        [""],
        ["entries", "blocks", "sorted", "dX", "worst", "dW", "dX", "worst", "dW"],
    )
    for of_setting in figures:
        if (kept := of_setting.filter) is not None:
            shares = (kept.entries, kept.blocks, kept.blocks_sorted)
            errors = (*_errors(kept.errors), *_errors(kept.errors_of_blocks))
            table.add_row(of_setting.title, *(f"{share:.2%}" for share in shares), *errors)
    console.print(table)


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title)
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _errors(errors: dict[str, float]) -> Iterator[str]:
    return (f"{error:.1e}" for error in errors.values())


if __name__ == "__main__":
    main()
