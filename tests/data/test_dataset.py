import json
import warnings
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastd2o import DataError, FastD2OWarning
from fastd2o.data import Needs, PreferenceDataset, PromptSuffix, build_dataset
from fastd2o.data import groups as reasons
from fastd2o.data.render import OTHER_OPENING, REWRITTEN_TURNS
from tests.data.toy_tokenizers import CHATML, FORGETFUL, HIDDEN_THOUGHT, LLAMA2, WordTokenizer, bpe_tokenizer, decode

PAIR = {"prompt": "What color is the sky?", "chosen": " The sky is blue.", "rejected": " It is green."}
NEGATIVE = {"prompt": "What color is the sky?", "rejected": " It is green."}
ANCHORED = {**NEGATIVE, "anchors": [" It is grey.", " The sky is blue."]}


def build(rows, tokenizer=None, *, needs=Needs.PAIR, **options):
    """Build quietly; the report is looked at where it matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastD2OWarning)
        return build_dataset(rows, tokenizer or bpe_tokenizer(), needs=needs, **options)


def texts(dataset, index=0, tokenizer=None):
    """Prompt and completion of every sequence of a group."""
    tokenizer = tokenizer or bpe_tokenizer()
    return [
        (decode(tokenizer, sequence.input_ids[: sequence.completion_start]), decode(tokenizer, sequence.completion_ids))
        for sequence in dataset[index].sequences
    ]


class TestGroups:
    def test_pair(self):
        dataset = build([PAIR])
        prompt = "<s>What color is the sky?"
        assert texts(dataset) == [(prompt, " It is green.</s>"), (prompt, " The sky is blue.</s>")]
        assert (dataset[0].line, dataset[0].negative, dataset[0].positives) == (1, 0, (1,))

    def test_anchors(self):
        (group,) = build([ANCHORED])
        assert (group.negative, group.positives) == (0, (1, 2))

    def test_positive_alone(self):
        (group,) = build([{"prompt": "a", "completion": " b", "label": True}], needs=Needs.ANY)
        assert (group.negative, group.positives, len(group.sequences)) == (-1, (0,), 1)

    def test_processor_with_a_tokenizer(self):
        class Processor:
            tokenizer = bpe_tokenizer()

        assert build([PAIR], Processor()).groups == build([PAIR]).groups

    def test_reference_columns(self):
        row = {**ANCHORED, "ref_rejected_logps": -3.0, "ref_anchor_logps": [-1.0, -2.0]}
        dataset = build([row])
        assert [sequence.ref_logp for sequence in dataset.sequences] == [-3.0, -1.0, -2.0]
        assert dataset.has_reference
        assert not dataset.has_harmful_reference

    def test_suffix_changes_the_prompt_so_reference_columns_no_longer_hold(self):
        dataset = build([{**PAIR, "ref_rejected_logps": -3.0}], prompt_suffix=PromptSuffix(" (right)", " (wrong)"))
        assert [prompt[-7:] for prompt, _ in texts(dataset)] == ["(wrong)", "(right)"]
        assert dataset.sequences[0].ref_logp is None
        assert dataset.report.repaired == {reasons.STALE_REFERENCE: [1]}

    def test_order_and_lines_over_many_rows(self):
        rows = [{"prompt": f"p{index}", "rejected": f" r{index}"} for index in range(600)]
        dataset = build(rows, needs=Needs.NEGATIVE)
        assert [group.line for group in dataset.groups] == list(range(1, 601))
        assert [texts(dataset, index)[0] for index in (0, 255, 256, 599)] == [
            (f"<s>p{index}", f" r{index}</s>") for index in (0, 255, 256, 599)
        ]


class TestNeeds:
    MIXED = (
        PAIR,
        NEGATIVE,
        {"prompt": "a", "completion": " b", "label": True},
        {"prompt": "a", "completion": " b", "label": False},
    )

    @pytest.mark.parametrize(
        ("needs", "kept", "dropped"),
        [
            (Needs.PAIR, [1], {"no positive": [2, 4], "no negative": [3]}),
            (Needs.NEGATIVE, [1, 2, 4], {"no negative": [3]}),
            (Needs.ANY, [1, 2, 3, 4], {}),
        ],
    )
    def test_what_lacks_is_dropped_and_counted(self, needs, kept, dropped):
        dataset = build(self.MIXED, needs=needs)
        assert [group.line for group in dataset.groups] == kept
        assert dataset.report.dropped == dropped
        assert (dataset.report.rows, dataset.report.kept) == (4, len(kept))

    @pytest.mark.parametrize("bad_rows", ["error", "drop"])
    def test_no_anchors_anywhere(self, bad_rows):
        with pytest.raises(DataError, match=r"no row is left; each needs a negative and a positive.*`fastd2o sample`"):
            build([NEGATIVE, NEGATIVE], bad_rows=bad_rows)
        with pytest.raises(DataError, match=r"no positive: 1 \(row 1\).*`fastd2o sample`"):
            build([PAIR], positives="anchors")

    def test_no_negatives_anywhere(self):
        with pytest.raises(DataError, match=r"no negative: 1 \(row 1\)\. Fix: add a rejected column"):
            build([{"prompt": "a", "completion": " b", "label": True}], needs=Needs.NEGATIVE)


class TestBadRows:
    @pytest.mark.parametrize("empty", ["", "  \n", "</s>", " <pad> "])
    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    def test_empty_completion(self, tmp_path, empty, column):
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(map(json.dumps, [PAIR, {**PAIR, column: empty}, PAIR])))
        message = r"d\.jsonl: 1 of 3 rows cannot be used: empty completion: 1 \(line 2\)\. Fix: .*bad_rows=\"drop\""
        with pytest.raises(DataError, match=message) as raised:
            build(path)
        assert "\n" not in str(raised.value)
        dataset = build(path, bad_rows="drop")
        assert [group.line for group in dataset.groups] == [1, 3]
        assert dataset.report.dropped == {"empty completion": [2]}

    def test_empty_message_whatever_the_template_writes_around_it(self):
        row = {"prompt": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": " "}]}
        with pytest.raises(DataError, match="empty completion"):
            build([row], bpe_tokenizer(FORGETFUL), needs=Needs.NEGATIVE)

    def test_long_prompt(self):
        rows = [PAIR, {**PAIR, "prompt": "sky " * 30}]
        with pytest.raises(
            DataError, match=r"max_length=24: 1 \(row 2\)\. Fix: raise max_length, or set truncate_prompt"
        ):
            build(rows, max_length=24)
        assert len(build(rows, max_length=24, bad_rows="drop")) == 1
        assert len(build(rows, max_length=24, truncate_prompt=True)) == 2
        assert len(build(rows, max_length=None)) == 2

    def test_nothing_left(self):
        with pytest.raises(DataError, match=r"no row is left.*empty completion: 1 \(row 1\)"):
            build([{**PAIR, "rejected": ""}], bad_rows="drop")

    def test_refused_by_the_template(self):
        row = {key: [{"role": "assistant", "content": key}] for key in ("prompt", "rejected")}
        with pytest.raises(DataError, match=r"refused by the chat template \(roles must alternate\): 1 \(row 1\)"):
            build([row], bpe_tokenizer(LLAMA2), needs=Needs.NEGATIVE)

    def test_a_row_of_no_format_is_an_error_either_way(self):
        with pytest.raises(DataError, match="dataset, row 2: the columns question fit no format"):
            build([PAIR, {"question": "a"}], bad_rows="drop")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_length": 1}, "max_length is 1; expected at least 2"),
            ({"positives": "best"}, "positives is 'best'; expected one of 'auto', 'chosen', 'anchors'"),
            ({"bad_rows": "ignore"}, "bad_rows is 'ignore'; expected one of 'error', 'drop'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            build([PAIR], **options)
        with pytest.raises(TypeError, match="processing_class is a int; expected a tokenizer"):
            build([PAIR], 3)


class TestAnchors:
    def test_empty_ones_are_removed(self):
        dataset = build([{**NEGATIVE, "anchors": ["", " It is grey.", "</s>"]}])
        assert [after for _, after in texts(dataset)] == [" It is green.</s>", " It is grey.</s>"]
        assert dataset.report.repaired == {reasons.EMPTY_ANCHOR: [1]}

    def test_cut_ones_have_no_end(self):
        dataset = build([{**ANCHORED, "anchor_cut": [True, False]}])
        assert [after for _, after in texts(dataset)] == [" It is green.</s>", " It is grey.", " The sky is blue.</s>"]
        assert dataset.report.clean

    def test_where_sampling_gave_none_the_row_is_dropped(self):
        dataset = build([PAIR, {**PAIR, "anchors": []}])
        assert [group.line for group in dataset.groups] == [1]
        assert dataset.report.dropped == {"no positive": [2]}

    def test_those_equal_to_the_negative_are_removed(self):
        dataset = build([{**NEGATIVE, "anchors": [" It is green.", " It is grey.", " It is green."]}, PAIR])
        assert len(dataset[0].positives) == 1
        assert dataset.report.repaired == {reasons.SAME_AS_NEGATIVE: [1]}

    def test_equal_after_the_cut_is_equal(self):
        row = {"prompt": "sky?", "rejected": " It is green, it is", "anchors": [" It is green, it was", " It was"]}
        length = build([row])[0].sequences[0].completion_start + 4
        dataset = build([row], max_length=length)
        assert len(dataset[0].positives) == 1
        assert dataset.report.repaired == {reasons.CUT_COMPLETION: [1], reasons.SAME_AS_NEGATIVE: [1]}

    def test_a_row_left_without_any_is_dropped(self):
        dataset = build([PAIR, {**NEGATIVE, "anchors": ["", " It is green."]}, {**PAIR, "chosen": PAIR["rejected"]}])
        assert len(dataset) == 1
        assert dataset.report.dropped == {"no positive": [2, 3]}
        assert dataset.report.repaired == {}

    def test_repetitions_stay_with_a_note(self):
        dataset = build([{**NEGATIVE, "anchors": [" It is grey.", " blue", " It is grey."]}])
        assert len(dataset[0].positives) == 3
        assert dataset.report.notes == {reasons.DUPLICATE_POSITIVES: [1]}
        assert dataset.report.clean


vocabulary = st.sampled_from(["sky", "blue", "green", "the", "bread", "flour", "é", "😀", "x"])
words = st.lists(vocabulary, min_size=1, max_size=12).map(" ".join)


class TestTruncation:
    @settings(deadline=None)
    @given(words, words, st.lists(words, max_size=3), st.integers(2, 40), st.booleans(), st.booleans())
    def test_every_sequence_fits_and_says_something(self, prompt, answer, anchors, max_length, bos, conversational):
        tokenizer = bpe_tokenizer(CHATML, bos=bos)
        row = {"prompt": prompt, "rejected": " " + answer, "anchors": [" " + anchor for anchor in anchors]}
        if conversational:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "rejected": [{"role": "assistant", "content": answer}],
                "anchors": [[{"role": "assistant", "content": anchor}] for anchor in anchors],
            }
        (whole,) = build([row], tokenizer, needs=Needs.NEGATIVE, max_length=None)
        try:
            (group,) = build([row], tokenizer, needs=Needs.NEGATIVE, max_length=max_length, truncate_prompt=True)
        except DataError as error:
            # Half of max_length was too little for anything visible: a character of four bytes can take four tokens.
            assert "leaves no room" in str(error)  # noqa: PT017
            assert max_length < 10
            return
        for sequence in group.sequences:
            assert 1 <= sequence.completion_start < len(sequence.input_ids) <= max_length
            assert str(tokenizer.decode(list(sequence.completion_ids), skip_special_tokens=True)).strip()
            assert any(
                sequence.completion_ids == other.completion_ids[: len(sequence.completion_ids)]
                for other in whole.sequences
            )
        assert len({sequence.input_ids[: sequence.completion_start] for sequence in group.sequences}) == 1
        prompt_ids = group.sequences[0].input_ids[: group.sequences[0].completion_start]
        whole_ids = whole.sequences[0].input_ids[: whole.sequences[0].completion_start]
        kept_bos = bos and not conversational
        assert whole_ids[:1] == prompt_ids[:1] or not kept_bos
        assert whole_ids[len(whole_ids) - len(prompt_ids) + kept_bos :] == prompt_ids[kept_bos:]

    def test_a_completion_is_cut_at_its_end(self):
        (whole,) = build([PAIR])
        dataset = build([PAIR], max_length=whole.sequences[0].completion_start + 3)
        for cut, full in zip(dataset.sequences, whole.sequences, strict=True):
            assert cut.input_ids == full.input_ids[: cut.completion_start + 3]
            assert cut.completion_start == full.completion_start
        assert dataset.report.repaired == {reasons.CUT_COMPLETION: [1]}

    def test_a_prompt_leaves_the_longest_completion_what_it_needs_up_to_half(self):
        row = {"prompt": "sky " * 40, "rejected": " blue", "anchors": [" x" * 6]}
        (whole,) = build([row], max_length=None)
        longest = len(whole.sequences[1].completion_ids)
        for max_length in (longest, longest + 2, 2 * longest, len(whole.sequences[1].input_ids) - 1):
            (group,) = build([row], max_length=max_length, truncate_prompt=True)
            start = max_length - min(longest, max_length // 2)
            assert [sequence.completion_start for sequence in group.sequences] == [start, start]
            assert group.sequences[0].input_ids[0] == 0
        report = build([row], max_length=2 * longest, truncate_prompt=True).report
        assert report.repaired == {reasons.CUT_PROMPT: [1]}

    def test_what_is_long_enough_is_not_touched(self):
        (whole,) = build([PAIR], max_length=None)
        longest = max(len(sequence.input_ids) for sequence in whole.sequences)
        dataset = build([PAIR], max_length=longest, truncate_prompt=True)
        assert dataset.groups == (whole,)
        assert dataset.report.clean

    def test_reference_of_a_cut_sequence_no_longer_holds(self):
        row = {**PAIR, "rejected": " no", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
        (whole,) = build([row])
        dataset = build([row], max_length=len(whole.sequences[1].input_ids) - 1)
        assert [sequence.ref_logp for sequence in dataset.sequences] == [-2.0, None]
        assert dataset.report.repaired == {reasons.CUT_COMPLETION: [1], reasons.STALE_REFERENCE: [1]}

    def test_a_first_token_without_context(self):
        row = {"prompt": "", "rejected": "The sky", "ref_rejected_logps": -1.0}
        dataset = build([row], bpe_tokenizer(bos=False), needs=Needs.NEGATIVE)
        assert (dataset.sequences[0].completion_start, dataset.sequences[0].ref_logp) == (1, None)
        assert dataset.report.repaired == {reasons.NO_CONTEXT: [1], reasons.STALE_REFERENCE: [1]}


def test_rewritten_prompts_are_counted():
    turns = ["a", "<think>x</think> b", "c"]
    prompt = [{"role": ["user", "assistant"][index % 2], "content": text} for index, text in enumerate(turns)]
    row = {"prompt": prompt, "rejected": [{"role": "assistant", "content": "d"}]}
    tokenizer = bpe_tokenizer(FORGETFUL)
    assert build([row], tokenizer, needs=Needs.NEGATIVE).report.repaired == {REWRITTEN_TURNS: [1]}
    assert build([row], bpe_tokenizer(CHATML), needs=Needs.NEGATIVE).report.clean


def test_a_generation_prompt_of_its_own_is_not_taken_for_rewritten_turns():
    row = {"prompt": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": "d"}]}
    report = build([row], bpe_tokenizer(HIDDEN_THOUGHT), needs=Needs.NEGATIVE).report
    assert report.repaired == {OTHER_OPENING: [1]}


def test_slow_tokenizers():
    tokenizer = WordTokenizer()
    dataset = build([PAIR], tokenizer)
    assert texts(dataset, tokenizer=tokenizer)[0] == ("What color is the sky?", " It is green.</s>")


class TestReport:
    def test_text(self):
        rows = [PAIR, NEGATIVE, {**NEGATIVE, "anchors": ["", " a", " a"]}, *[NEGATIVE] * 6]
        assert str(build(rows).report) == (
            "dataset: 9 rows, 2 kept, 7 dropped, 1 repaired\n"
            "  dropped: no positive: 7 (rows 2, 4, 5, 6, 7, …)\n"
            "  repaired: empty anchor removed: 1 (row 3)\n"
            "  note: identical positives: 1 (row 3)"
        )

    def test_given_as_a_warning_once_if_anything_changed(self):
        with pytest.warns(FastD2OWarning, match="1 dropped") as caught:
            dataset = build_dataset([PAIR, NEGATIVE], bpe_tokenizer(), needs=Needs.PAIR)
        assert [str(warning.message) for warning in caught] == [str(dataset.report)]
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build_dataset([PAIR], bpe_tokenizer(), needs=Needs.PAIR)


class TestDataset:
    def test_lengths(self):
        dataset = build([PAIR, ANCHORED])
        assert dataset.lengths == [
            max(len(sequence.input_ids) for sequence in group.sequences) for group in dataset.groups
        ]

    def test_with_reference(self):
        dataset = build([PAIR, ANCHORED])
        filled = dataset.with_reference([-1, -2, -3, -4, -5], harmful_ref_logps=iter([1.0, 2.0, 3.0, 4.0, 5.0]))
        assert [sequence.ref_logp for sequence in filled.sequences] == [-1.0, -2.0, -3.0, -4.0, -5.0]
        assert [sequence.harmful_ref_logp for sequence in filled[1].sequences] == [3.0, 4.0, 5.0]
        assert filled.has_reference
        assert filled.has_harmful_reference
        assert not dataset.has_reference
        assert filled.report is dataset.report
        refilled = filled.with_reference(harmful_ref_logps=[0.0] * 5)
        assert refilled.sequences[4].ref_logp == -5.0
        assert refilled.sequences[4].harmful_ref_logp == 0.0
        with pytest.raises(ValueError, match="ref_logps has 2 values for 5 sequences"):
            dataset.with_reference([-1.0, -2.0])

    def test_fingerprint_is_that_of_tokens_boundaries_and_roles(self):
        dataset = build([PAIR, ANCHORED])
        assert dataset.fingerprint() == build([PAIR, ANCHORED]).fingerprint()
        assert dataset.fingerprint() == dataset.with_reference([0.0] * 5).fingerprint()
        first, second = dataset.groups
        sequence = first.sequences[0]
        other_tokens = replace(sequence, input_ids=(*sequence.input_ids[:-1], 5))
        other_boundary = replace(sequence, completion_start=sequence.completion_start + 1)
        changed = [
            (replace(first, sequences=(other_tokens, first.sequences[1])), second),
            (replace(first, sequences=(other_boundary, first.sequences[1])), second),
            (second, first),
            (first,),
            (replace(first, negative=1, positives=(0,)), second),
            (replace(first, negative=-1, positives=(0, 1)), second),
        ]
        prints = {PreferenceDataset(groups, dataset.report).fingerprint() for groups in changed}
        assert len(prints | {dataset.fingerprint()}) == len(changed) + 1

    def test_fingerprint_does_not_depend_on_the_machine(self):
        dataset = build([{"prompt": "a", "rejected": "b"}], needs=Needs.NEGATIVE)
        assert dataset[0].sequences[0].input_ids == (0, 69, 70, 1)
        assert dataset.fingerprint() == "a5e2de9957d7f707e97579d484508e212ea9386dcfd59f711c2f077019d73e64"
