"""Rendering and tokenising together: where the completion begins, and which tokens it has."""

import string
from copy import deepcopy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fastd2o import DataError
from fastd2o.data import PromptSuffix, Row, parse_row
from fastd2o.data.render import OTHER_OPENING, REWRITTEN_TURNS, BadRow, Renderer
from fastd2o.data.tokenize import Encoder
from tests.data.toy_tokenizers import (
    CHATML,
    FORGETFUL,
    HIDDEN_THOUGHT,
    LLAMA2,
    OPEN_ENDED,
    WordTokenizer,
    bpe_tokenizer,
    decode,
)

BOS, EOS = 0, 1
# The first use of a tokenizer trains it.
no_deadline = settings(deadline=None)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def encode(tokenizer, prompt, answer, suffix=None):
    """The negative of a row, encoded."""
    group = parse_row(Row(1, {"prompt": prompt, "rejected": answer}))
    (rendered,) = Renderer(tokenizer, suffix)(group)
    (encoded,) = Encoder(tokenizer)([rendered])
    return encoded


def halves(tokenizer, encoded):
    return decode(tokenizer, encoded.ids[: encoded.start]), decode(tokenizer, encoded.ids[encoded.start :])


class TestText:
    @no_deadline
    @given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.booleans())
    @example("What color is the sky?", " The sky is blue.", True)
    @example("a  ", "\n\n b", False)
    @example("e", "\u0301", True)
    @example("é😀", "😀é", False)
    def test_tokens_are_those_of_the_whole_text(self, prompt, answer, bos):
        tokenizer = bpe_tokenizer(bos=bos)
        encoded = encode(tokenizer, prompt, answer)
        assert list(encoded.ids) == [*tokenizer(prompt + answer).input_ids, EOS]
        if not encoded.clipped:
            before, after = halves(tokenizer, encoded)
            assert before.removeprefix("<s>") + after == prompt + answer + "</s>"
            # A straddling token moves the boundary to the left, never to the right.
            assert after.endswith(answer + "</s>")

    @no_deadline
    @given(st.text(string.ascii_letters, max_size=9), st.text(string.ascii_letters, min_size=1, max_size=9))
    def test_the_completion_is_exact_where_a_space_parts_it(self, prompt, answer):
        tokenizer = bpe_tokenizer()
        before, after = halves(tokenizer, encode(tokenizer, prompt, " " + answer))
        assert (before, after) == ("<s>" + prompt, " " + answer + "</s>")

    def test_a_straddling_token_belongs_to_the_completion(self):
        tokenizer = bpe_tokenizer()
        assert len(tokenizer(" then", add_special_tokens=False).input_ids) == 1
        assert halves(tokenizer, encode(tokenizer, "wait th", "en mix")) == ("<s>wait", " then mix</s>")

    @pytest.mark.parametrize(("prompt", "answer"), [("<s>sky", " blue"), ("sky", " blue</s>"), ("<s>sky", " blue</s>")])
    def test_bos_and_eos_written_in_the_text_are_not_doubled(self, prompt, answer):
        tokenizer = bpe_tokenizer()
        assert encode(tokenizer, prompt, answer) == encode(tokenizer, "sky", " blue")
        assert encode(tokenizer, prompt, answer).ids.count(BOS) == 1

    def test_the_first_token_needs_context(self):
        encoded = encode(bpe_tokenizer(bos=False), "", "The sky")
        assert encoded.start == 1
        assert encoded.clipped
        assert not encode(bpe_tokenizer(), "", "The sky").clipped

    def test_without_eos_nothing_is_added(self):
        tokenizer = deepcopy(bpe_tokenizer())
        tokenizer.eos_token = None
        assert halves(tokenizer, encode(tokenizer, "sky", " blue")) == ("<s>sky", " blue")

    def test_suffix(self):
        tokenizer = bpe_tokenizer()
        encoded = encode(tokenizer, "sky?", " green", PromptSuffix(positive=" (right)", negative=" (wrong)"))
        assert halves(tokenizer, encoded) == ("<s>sky? (wrong)", " green</s>")


contents = st.text(string.ascii_letters + " .é😀", min_size=1, max_size=12).filter(str.strip)


class TestConversation:
    @no_deadline
    @given(st.lists(contents, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1), contents)
    @pytest.mark.parametrize("template", [CHATML, LLAMA2, FORGETFUL, HIDDEN_THOUGHT, OPEN_ENDED])
    def test_tokens_are_those_of_the_template(self, template, turns, answer):
        tokenizer = bpe_tokenizer(template)
        prompt = [assistant(text) if index % 2 else user(text) for index, text in enumerate(turns)]
        encoded = encode(tokenizer, prompt, [assistant(answer)])
        whole = tokenizer.apply_chat_template([*prompt, assistant(answer)], return_dict=False)
        assert list(encoded.ids) == [*whole, *([EOS] if template == OPEN_ENDED else [])]
        before, after = halves(tokenizer, encoded)
        assert before.rstrip().endswith(("assistant", "assistant:", "[/INST]"))
        tail = after.removeprefix("<think>\n\n</think>\n\n") if template == FORGETFUL else after
        ending = {LLAMA2: " </s>", OPEN_ENDED: "\n</s>"}.get(template, "<|im_end|>\n")
        assert tail.endswith(ending)
        assert tail.removesuffix(ending).strip() == answer.strip()

    def test_chatml(self):
        tokenizer = bpe_tokenizer(CHATML)
        encoded = encode(tokenizer, [user("sky?")], [assistant("green")])
        prompt = "<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n"
        assert halves(tokenizer, encoded) == (prompt, "green<|im_end|>\n")
        assert encoded.repair is None

    def test_bos_in_the_template_comes_once(self):
        tokenizer = bpe_tokenizer(LLAMA2)
        encoded = encode(tokenizer, [user("sky?")], [assistant("green")])
        assert halves(tokenizer, encoded) == ("<s>[INST] sky? [/INST]", " green </s>")
        assert encoded.ids.count(BOS) == encoded.ids.count(EOS) == 1

    def test_eos_where_the_template_leaves_the_turn_open(self):
        tokenizer = bpe_tokenizer(OPEN_ENDED)
        encoded = encode(tokenizer, [user("sky?")], [assistant("green")])
        # The space before an answer is part of its first token.
        assert halves(tokenizer, encoded) == ("user: sky?\nassistant:", " green\n</s>")

    @pytest.mark.parametrize("answer", ["green", "0 is not 1", "<think>hm</think> green"])
    def test_rewritten_earlier_turns_stay_in_the_prompt(self, answer):
        tokenizer = bpe_tokenizer(FORGETFUL)
        encoded = encode(tokenizer, [user("a"), assistant("<think>x</think> b"), user("c")], [assistant(answer)])
        before, after = halves(tokenizer, encoded)
        turns = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        assert before == turns + "<|im_start|>assistant\n"
        assert after == ("" if "<think>" in answer else "<think>\n\n</think>\n\n") + answer + "<|im_end|>\n"
        assert encoded.repair == REWRITTEN_TURNS

    @pytest.mark.parametrize("answer", ["green", "<think>", "0", "\n x"])
    def test_a_generation_prompt_that_the_conversation_does_not_show(self, answer):
        tokenizer = bpe_tokenizer(HIDDEN_THOUGHT)
        encoded = encode(tokenizer, [user("<think> sky?")], [assistant(answer)])
        before, after = halves(tokenizer, encoded)
        assert before == "<|im_start|>user\n<think> sky?<|im_end|>\n<|im_start|>assistant\n"
        assert after == answer + "<|im_end|>\n"
        assert encoded.repair == OTHER_OPENING

    def test_an_earlier_turn_that_looks_like_the_generation_prompt(self):
        tokenizer = bpe_tokenizer(HIDDEN_THOUGHT)
        prompt = [user("a"), assistant("<think>\nx</think> b"), user("c")]
        before, after = halves(tokenizer, encode(tokenizer, prompt, [assistant("d")]))
        assert before.endswith("c<|im_end|>\n<|im_start|>assistant\n")
        assert after == "d<|im_end|>\n"

    def test_a_completion_of_several_messages(self):
        tokenizer = bpe_tokenizer(CHATML)
        answer = [assistant("b"), user("c"), assistant("d")]
        before, after = halves(tokenizer, encode(tokenizer, [user("a")], answer))
        assert before == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        assert after == "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"

    def test_suffix_goes_to_the_last_user_message_by_role(self):
        tokenizer = bpe_tokenizer(CHATML)
        data = {"prompt": [user("a"), assistant("b"), user("c")]}
        group = parse_row(Row(1, {**data, "chosen": [assistant("d")], "rejected": [assistant("e")]}))
        negative, positive = Renderer(tokenizer, PromptSuffix(positive=" (right)", negative=" (wrong)"))(group)
        assert "c (wrong)<|im_end|>" in negative.text
        assert "c (right)<|im_end|>" in positive.text
        assert "a<|im_end|>" in negative.text
        assert group.prompt[2] == user("c")

    def test_suffix_without_a_user_message(self):
        with pytest.raises(BadRow, match="no user message"):
            encode(
                bpe_tokenizer(CHATML), [{"role": "system", "content": "s"}], [assistant("a")], PromptSuffix("+", "-")
            )

    def test_no_chat_template(self):
        with pytest.raises(DataError, match=r"no chat template\. Fix: set tokenizer\.chat_template"):
            encode(bpe_tokenizer(), [user("a")], [assistant("b")])

    def test_a_template_that_refuses(self):
        with pytest.raises(BadRow, match=r"refused by the chat template \(roles must alternate\)"):
            encode(bpe_tokenizer(LLAMA2), [assistant("a")], [assistant("b")])


def encode_cut(tokenizer, prompt, anchor):
    """The same anchor cut and whole, both encoded."""
    data = {"prompt": prompt, "rejected": anchor, "anchors": [anchor, anchor], "anchor_cut": [True, False]}
    _, cut, whole = Encoder(tokenizer)(Renderer(tokenizer)(parse_row(Row(1, data))))
    return cut, whole


class TestCutAnchors:
    """What a length limit cut is not taught as a finished answer."""

    @no_deadline
    @given(st.text(min_size=1, max_size=20))
    def test_text_gets_no_eos(self, answer):
        cut, whole = encode_cut(bpe_tokenizer(), "sky?", answer)
        assert (*cut.ids, EOS) == whole.ids
        assert cut.start == whole.start

    def test_text_loses_the_eos_of_a_tokenizer_that_closes_every_text(self):
        tokenizer = deepcopy(bpe_tokenizer())
        closing = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
        tokenizer.backend_tokenizer.post_processor = closing
        cut, whole = encode_cut(tokenizer, "sky?", " green")
        assert halves(tokenizer, cut) == ("<s>sky?", " green")
        assert halves(tokenizer, whole) == ("<s>sky?", " green</s>")

    @no_deadline
    @given(contents, contents)
    @pytest.mark.parametrize("template", [CHATML, LLAMA2, FORGETFUL, HIDDEN_THOUGHT, OPEN_ENDED])
    def test_a_conversation_ends_with_the_last_word(self, template, prompt, answer):
        tokenizer = bpe_tokenizer(template)
        cut, whole = encode_cut(tokenizer, [user(prompt)], [assistant(answer)])
        ending = {LLAMA2: " </s>", OPEN_ENDED: "\n</s>"}.get(template, "<|im_end|>\n")
        assert "".join(halves(tokenizer, cut)) + ending == "".join(halves(tokenizer, whole))
        assert (cut.start, cut.repair) == (whole.start, whole.repair)

    def test_slow_tokenizer(self):
        tokenizer = WordTokenizer(chat_template=OPEN_ENDED)
        cut, _ = encode_cut(tokenizer, [user("sky?")], [assistant("green")])
        assert halves(tokenizer, cut) == ("user: sky?\nassistant: ", "green")


class TestSlowTokenizer:
    def test_text(self):
        tokenizer = WordTokenizer()
        encoded = encode(tokenizer, "the sky is", " not green")
        assert halves(tokenizer, encoded) == ("the sky is", " not green</s>")

    def test_a_straddling_token_belongs_to_the_completion(self):
        tokenizer = WordTokenizer()
        assert halves(tokenizer, encode(tokenizer, "the sk", "y is")) == ("the ", "sky is</s>")

    def test_conversation(self):
        tokenizer = WordTokenizer(chat_template=OPEN_ENDED)
        encoded = encode(tokenizer, [user("sky?")], [assistant("green")])
        assert halves(tokenizer, encoded) == ("user: sky?\nassistant: ", "green\n</s>")


def test_text_and_conversations_in_one_batch_keep_their_order():
    tokenizer = bpe_tokenizer(CHATML)
    rows = [("a", " b"), ([user("a")], [assistant("b")]), ("c", " d")]
    groups = [parse_row(Row(1, {"prompt": prompt, "rejected": answer})) for prompt, answer in rows]
    renderer = Renderer(tokenizer)
    together = Encoder(tokenizer)([renderer(group)[0] for group in groups])
    assert together == [encode(tokenizer, prompt, answer) for prompt, answer in rows]
