import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastd2o.data import PreferenceCollator, TokenizedGroup, TokenizedSequence

PAD = 3


@st.composite
def sequences(draw):
    # Tokens equal to the padding must survive.
    ids = draw(st.lists(st.integers(0, 9), min_size=2, max_size=12))
    return TokenizedSequence(tuple(ids), draw(st.integers(1, len(ids) - 1)))


@st.composite
def groups(draw):
    negative = draw(st.booleans())
    positives = draw(st.integers(0 if negative else 1, 3))
    members = tuple(draw(sequences()) for _ in range(negative + positives))
    roles = tuple(range(int(negative), len(members)))
    return TokenizedGroup(draw(st.integers(1, 10**6)), members, 0 if negative else -1, roles)


@given(st.lists(groups(), min_size=1, max_size=4), st.sampled_from([None, 1, 4, 7]))
def test_a_batch_holds_exactly_its_groups(batch, multiple):
    out = PreferenceCollator(PAD, pad_to_multiple_of=multiple)(batch)
    members = [sequence for group in batch for sequence in group.sequences]
    longest = max(len(sequence.input_ids) for sequence in members)
    length = out["input_ids"].shape[1]
    assert longest <= length < longest + (multiple or 1)
    assert length % (multiple or 1) == 0
    for row, sequence in enumerate(members):
        end = int(out["attention_mask"][row].sum())
        assert tuple(out["input_ids"][row, :end].tolist()) == sequence.input_ids
        assert out["attention_mask"][row, :end].all()
        assert (out["input_ids"][row, end:] == PAD).all()
        start = sequence.completion_start
        expected = [-100] * start + list(sequence.completion_ids) + [-100] * (length - end)
        assert out["labels"][row].tolist() == expected
    first = 0
    most = max(len(group.positives) for group in batch)
    for index, group in enumerate(batch):
        assert out["negative_row"][index] == (first + group.negative if group.negative >= 0 else -1)
        rows = [first + positive for positive in group.positives]
        assert out["positive_rows"][index].tolist() == rows + [-1] * (most - len(rows))
        first += len(group.sequences)
    assert out["line"].tolist() == [group.line for group in batch]
    assert {tensor.dtype for tensor in out.values()} == {torch.int64}
    assert out["positive_rows"].shape == (len(batch), most)


def make(*ref_logps, harmful=None):
    members = tuple(TokenizedSequence((1, 2), 1, ref_logp, harmful) for ref_logp in ref_logps)
    return TokenizedGroup(1, members, 0, tuple(range(1, len(members))))


def test_references_are_given_when_the_whole_batch_has_them():
    collate = PreferenceCollator(PAD)
    out = collate([make(-1.0, -2.0), make(-3.5)])
    assert out["ref_logp"].tolist() == [-1.0, -2.0, -3.5]
    assert out["ref_logp"].dtype == torch.float32
    assert "harmful_ref_logp" not in out
    assert "ref_logp" not in collate([make(-1.0, -2.0), make(None)])
    assert collate([make(None, harmful=-0.5)])["harmful_ref_logp"].tolist() == [-0.5]


def test_arguments():
    with pytest.raises(ValueError, match=r"Fix: tokenizer\.pad_token = tokenizer\.eos_token"):
        PreferenceCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0"):
        PreferenceCollator(PAD, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="groups is empty"):
        PreferenceCollator(PAD)([])
