import json

import datasets
import pytest

from fastd2o import DataError
from fastd2o.data import Row, load_rows

ROWS = [{"prompt": "a", "rejected": "b"}, {"prompt": "c", "rejected": "d"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_keeps_the_numbers_of_its_lines_past_blank_ones(tmp_path):
    path = write(tmp_path / "d.jsonl", f"{json.dumps(ROWS[0])}\n\n   \n{json.dumps(ROWS[1])}")
    assert load_rows(path) == [Row(1, ROWS[0]), Row(4, ROWS[1])]
    assert load_rows(str(path)) == load_rows(path)


def test_jsonl_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path):
    path = write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert [row.data for row in load_rows(path)] == ROWS


def test_jsonl_splits_at_newlines_only(tmp_path):
    row = {"prompt": "a\u2028b\x85c", "rejected": "d"}
    assert load_rows(write(tmp_path / "d.jsonl", json.dumps(row, ensure_ascii=False))) == [Row(1, row)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b",}\n', r"d\.jsonl, line 3: broken JSON: .*double quotes.*Fix:"),
        ('{"prompt": "a"}\n{"prompt": "b"', r"line 2: broken JSON: Expecting ',' delimiter"),
        ('{"prompt": "a"} {"prompt": "b"}', r"line 1: broken JSON: Extra data"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', r"line 2: broken JSON: 'utf-8' codec can't decode.*UTF-8"),
        ('{"prompt": "a"}\n["b"]', r"line 2: found a list\. Fix: every row must be an object"),
        ("null", r"line 1: found a NoneType"),
        (f'{{"prompt": "a"}}\n{{"prompt": {"1" * 5000}}}', r"d\.jsonl, line 2: broken JSON: .*digits.*Fix:"),
        ('{"prompt": ' + "[" * 100_000, r"d\.jsonl, line 1: broken JSON: .*recursion.*Fix:"),
        ("", r"d\.jsonl is empty"),
        ("\n \n", r"d\.jsonl is empty"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "d.jsonl", content))


def test_json_is_one_list(tmp_path):
    assert load_rows(write(tmp_path / "d.json", json.dumps(ROWS, indent=2))) == [Row(1, ROWS[0]), Row(2, ROWS[1])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ('{"prompt": "a"}', r"holds a dict, not a list\. Fix: a \.json file holds one list"),
        ('{"prompt": "a"}\n{"prompt": "b"}', r"broken JSON: Extra data: line 2.*name a file .* \.jsonl"),
        ('[{"prompt": "a"}, 3]', "row 2: found a int"),
        ("[" + "1" * 5000 + "]", r"d\.json: broken JSON: .*digits"),
        ("[" * 100_000, r"d\.json: broken JSON: .*recursion"),
    ],
)
def test_broken_json(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "d.json", content))


def test_datasets_in_memory_and_on_disk(tmp_path):
    rows = [{**row, "label": index == 0, "ref_completion_logps": -1.5} for index, row in enumerate(ROWS)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    for source in (rows, iter(rows), dataset, dataset.with_format("torch"), tmp_path / "saved"):
        # By repr, because a tensor equals the number it holds.
        assert repr(load_rows(source)) == repr([Row(1, rows[0]), Row(2, rows[1])])


def test_several_splits_are_refused_by_name(tmp_path):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "saved"))
    for source in (splits, tmp_path / "saved"):
        with pytest.raises(DataError, match=r"keys 'train', 'test', not rows\. Fix: choose one split"):
            load_rows(source)
    assert len(load_rows(tmp_path / "saved" / "train")) == 2


def test_a_path_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist\. Fix"):
        load_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a directory but not a saved dataset"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match=r"suffix '\.csv'; expected \.jsonl, \.json or a directory"):
        load_rows(write(tmp_path / "d.csv", "a,b"))


def test_objects_that_are_no_rows():
    with pytest.raises(DataError, match="dataset is empty"):
        load_rows([])
    with pytest.raises(DataError, match="dataset, row 2: found a str"):
        load_rows([{}, "prompt"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="source is a int; expected a path"):
        load_rows(3)  # type: ignore[arg-type]
