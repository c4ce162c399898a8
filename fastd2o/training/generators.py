"""Where completions come from, behind one small interface: Transformers' ``generate``, or vLLM.

A generator answers requests. A request says which sample of which prompt it is, and with the seed of the run that fixes
its random numbers: what else is in its batch, and in which order requests come, changes no sample.

Shape suffixes: S sequences of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from fastd2o.errors import FastD2OError
from fastd2o.models.mode import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastd2o.training.sampling import SamplingOptions


@dataclass(frozen=True)
class Prompt:
    """A row to sample for.

    Attributes:
        line: of the dataset.
        ids: what the model reads, instruction included.
        negative: what a sample must not repeat, or None.
        row: the row that the samples are added to.
        conversational: whether prompt and completions are messages.
    """

    line: int
    ids: tuple[int, ...]
    negative: str | None
    row: Mapping[str, Any]
    conversational: bool


@dataclass(frozen=True)
class Request:
    """One sample to draw: which of its prompt, and which try at it."""

    prompt: Prompt
    draw: int
    attempt: int

    def seed(self, run: int) -> int:
        """What fixes the random numbers of the sample in a run with the seed ``run``: 56 bits."""
        key = f"{run}/{self.prompt.line}/{self.draw}/{self.attempt}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:7], "big")


@dataclass(frozen=True)
class Sample:
    """A completion.

    Attributes:
        text: without what ended it.
        ids: the tokens as drawn, with the one that ended it.
        cut: whether ``max_new_tokens`` ended it.
    """

    text: str
    ids: tuple[int, ...]
    cut: bool


class Generator(Protocol):
    """A model that answers.

    Attributes:
        stops: the tokens that end an answer.
    """

    stops: list[int]

    def settings(self) -> dict[str, Any]:
        """What of the generator its samples depend on: ``model`` is a fingerprint of the weights."""

    def __call__(self, requests: Sequence[Request], options: SamplingOptions) -> list[Sample]:
        """One sample for each request, drawn with ``options``' length, temperature, nucleus and seed."""


class TransformersGenerator:
    """Transformers' ``generate``, batched, with a key-value cache; the model's modes are restored after every call.

    Args:
        model: a causal language model.
        processing_class: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.processing_class = processing_class
        self.stops = stop_ids(model.generation_config, processing_class)

    def settings(self) -> dict[str, Any]:
        """Weights and their dtype."""
        return {"dtype": str(self.model.dtype).removeprefix("torch."), "model": _fingerprint(self.model)}

    def __call__(self, requests: Sequence[Request], options: SamplingOptions) -> list[Sample]:
        """One sample for each request, all in one batch.

        Raises:
            FastD2OError: the model's probabilities are not numbers.
        """
        prompts = [request.prompt for request in requests]
        length = max(len(prompt.ids) for prompt in prompts)
        pad = self.processing_class.pad_token_id
        pad = pad if pad is not None else (self.stops or [0])[0]
        input_ids_SL = torch.tensor([[pad] * (length - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
        mask_SL = torch.tensor([[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        uniforms_SL = torch.stack(
            [_uniforms(request.seed(options.seed), options.max_new_tokens) for request in requests]
        )
        warpers: list[LogitsProcessor] = []
        if options.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(options.temperature))
        if options.top_p < 1.0:
            warpers.append(TopPLogitsWarper(options.top_p))
        generate: Any = self.model.generate  # its type is that of a submodule: nn.Module.__getattr__
        with _as_itself(self.model):
            output_SL = generate(
                input_ids=input_ids_SL.to(self.model.device),
                attention_mask=mask_SL.to(self.model.device),
                # "Greedy", because _ChooseToken has already drawn.
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=options.max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=self.stops or None,
                ),
                logits_processor=LogitsProcessorList(
                    [*warpers, _ChooseToken(uniforms_SL, length, [prompt.line for prompt in prompts])]
                ),
            )
        new_SL = output_SL[:, length:].tolist()
        return [
            decode(self.processing_class, prompt, new, self.stops) for prompt, new in zip(prompts, new_SL, strict=True)
        ]


class VLLMGenerator:
    """vLLM, from the folder of a model; :meth:`close` gives its memory back, so that a training fits after it.

    It is not tested: vLLM needs a GPU that this project does not have. Every request has its own seed, so samples
    should not depend on batching, but vLLM does not promise that, nor the same samples as Transformers.

    Args:
        folder: of the model. Each round's weights are loaded from where that round's training put them.
        processing_class: its tokenizer.
        dtype: of the weights.
        trust_remote_code: run code that comes with the model.

    Raises:
        FastD2OError: vLLM is not installed.
    """

    def __init__(
        self, folder: str, processing_class: PreTrainedTokenizerBase, dtype: str, *, trust_remote_code: bool = False
    ) -> None:
        vllm = import_vllm()
        self.folder, self.dtype = folder, dtype
        self.processing_class = processing_class
        self.stops = stop_ids(_generation_config(folder, trust_remote_code), processing_class)
        self._sampling_params = vllm.SamplingParams
        # "vllm": its own defaults, not the decoding recipe that came with the model.
        self._llm = vllm.LLM(model=folder, dtype=dtype, generation_config="vllm", trust_remote_code=trust_remote_code)

    def settings(self) -> dict[str, Any]:
        """The folder, which a round writes once, and the dtype."""
        return {"dtype": self.dtype, "model": f"vllm {self.folder}"}

    def __call__(self, requests: Sequence[Request], options: SamplingOptions) -> list[Sample]:
        """One sample for each request."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt.ids)} for request in requests],
            [
                self._sampling_params(
                    temperature=options.temperature,
                    top_p=options.top_p,
                    max_tokens=options.max_new_tokens,
                    seed=request.seed(options.seed),
                    stop_token_ids=self.stops,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return [
            replace(
                decode(self.processing_class, request.prompt, list(answer.token_ids), self.stops),
                cut=answer.finish_reason == "length",
            )
            for request, answer in zip(requests, answers, strict=True)
        ]

    def close(self) -> None:
        """Let go of the weights and the cache."""
        del self._llm
        release_memory()


def release_memory() -> None:
    """Let go of models that nobody uses any more: an attached one, or a trainer's, is part of a cycle of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generation_config(folder: str, trust_remote_code: bool) -> GenerationConfig:
    """That of the model's folder, or what its config says."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


def import_vllm() -> Any:
    """The module ``vllm``.

    Raises:
        FastD2OError: it is not installed, or does not load here.
    """
    try:
        import vllm
    except ImportError as error:
        raise FastD2OError(
            f"generator is 'vllm', which cannot be imported here: {error}. Fix: pip install 'fastd2o[vllm]' on a "
            "machine with a GPU that vLLM supports, or generator='transformers', which needs nothing more"
        ) from error
    return vllm


# --- where an answer ends ---------------------------------------------------------------------------------------------


def stop_ids(recipe: GenerationConfig | None, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: EOS of model and tokenizer, and what the chat template closes a turn with."""
    configured = recipe.eos_token_id if recipe is not None else None
    stops = set(configured if isinstance(configured, list) else [configured])
    stops |= {processing_class.eos_token_id, _end_of_turn(processing_class)}
    return sorted(token for token in stops if token is not None)


def _end_of_turn(processing_class: PreTrainedTokenizerBase) -> int | None:
    if getattr(processing_class, "chat_template", None) is None:
        return None
    answer = "42"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(processing_class.apply_chat_template(turns, tokenize=False))
    except TemplateError:
        return None
    ids = processing_class(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {token for token, added in processing_class.added_tokens_decoder.items() if added.special}
    return ids[0] if ids and ids[0] in special else None


def decode(processing_class: PreTrainedTokenizerBase, prompt: Prompt, new: list[int], stops: list[int]) -> Sample:
    """The sample of the new tokens ``new``, which may go on behind the one that ends it."""
    end = next((position for position, token in enumerate(new) if token in stops), None)
    tokens = new if end is None else new[:end]

    def text_of(ids: Sequence[int]) -> str:
        return str(processing_class.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    text = text_of(tokens)
    if not prompt.conversational:
        # Some tokenizers drop the space in front of the first token they decode; in text it belongs to the completion.
        before, whole = text_of(prompt.ids), text_of([*prompt.ids, *tokens])
        text = whole[len(before) :] if whole.startswith(before) else text
    # A sample cut inside a character of several tokens ends in replacement characters.
    drawn = new if end is None else new[: end + 1]
    return Sample(text.rstrip("\ufffd") if end is None else text, tuple(drawn), cut=end is None)


# --- how Transformers is made to draw ---------------------------------------------------------------------------------


def _uniforms(seed: int, count: int) -> torch.Tensor:
    """The random numbers of one sample, one per token: float64 ``[count]`` in [0, 1), on the CPU."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class _ChooseToken(LogitsProcessor):
    """Choose each token by inverting the distribution function at a number fixed in advance.

    All scores but the chosen one's become −inf, so that ``generate`` takes it greedily.
    """

    def __init__(self, uniforms_SL: torch.Tensor, prompt_length: int, lines: Sequence[int]) -> None:
        self.uniforms_SL = uniforms_SL
        self.prompt_length = prompt_length
        self.lines = lines

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_length
        # float64: in float32 the running sum of 100,000 probabilities is off by as much as many of them.
        cumulative_SV = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        total_S1 = cumulative_SV[:, -1:]
        if not torch.isfinite(total_S1).all():
            line = self.lines[int((~torch.isfinite(total_S1[:, 0])).nonzero()[0])]
            raise FastD2OError(
                f"the model's probabilities are not numbers (NaN) at token {step + 1} of a sample for line {line}. "
                "Fix: another dtype (float16 overflows where bfloat16 and float32 do not), or check the model's weights"
            )
        threshold_S1 = self.uniforms_SL[:, step : step + 1].to(scores.device) * total_S1
        # right=True: the first token whose cumulative probability exceeds the threshold, never one of probability 0.
        chosen_S1 = torch.searchsorted(cumulative_SV, threshold_S1, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_S1, 0.0)  # type: ignore[return-value]


@contextmanager
def _as_itself(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and nothing of the decoding recipe that came with the model; afterwards all is as it was.

    What a call of ``generate`` leaves unset, it takes from the model's own configuration: penalties, filters, beams.
    Anchors are samples of the model's distribution, so that configuration is put aside.
    """
    generator: Any = getattr(model, "get_base_model", lambda: model)()  # PEFT delegates generation to it
    recipe, generator.generation_config = generator.generation_config, GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        generator.generation_config = recipe


def _fingerprint(model: PreTrainedModel) -> str:
    """Of a thousand elements of every parameter: quick for a large model, and no training leaves them all alone."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1000)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()
