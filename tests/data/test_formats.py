import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastd2o import DataError
from fastd2o.data import Completion, Group, Origin, Row, parse_row


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def parse(data, **options):
    return parse_row(Row(7, data), origin=Origin("d.jsonl", "line"), **options)


STYLES = pytest.mark.parametrize(
    ("ask", "say"),
    [(str, str), (lambda text: [user(text)], lambda text: [assistant(text)])],
    ids=["standard", "conversational"],
)


def frozen(content):
    return content if isinstance(content, str) else tuple(content)


@STYLES
class TestEveryFormat:
    def test_preference(self, ask, say):
        group = parse({"prompt": ask("p"), "chosen": say("c"), "rejected": say("r"), "id": 3})
        negative, chosen = Completion(frozen(say("r"))), Completion(frozen(say("c")))
        assert group == Group(7, frozen(ask("p")), negative, (chosen,), sampled=False)
        assert group.completions == (negative, chosen)
        assert group.conversational is not isinstance(ask("p"), str)

    def test_negative_alone(self, ask, say):
        group = parse({"prompt": ask("p"), "rejected": say("r")})
        assert (group.negative, group.positives) == (Completion(frozen(say("r"))), ())

    @pytest.mark.parametrize("label", [True, 1, False, 0])
    def test_labelled(self, ask, say, label):
        group = parse({"prompt": ask("p"), "completion": say("c"), "label": label})
        completion = Completion(frozen(say("c")))
        expected = (None, (completion,)) if label else (completion, ())
        assert (group.negative, group.positives) == expected

    @pytest.mark.parametrize(
        ("positives", "expected"), [("auto", ("a", "b")), ("anchors", ("a", "b")), ("chosen", ("c",))]
    )
    def test_anchors_and_chosen(self, ask, say, positives, expected):
        data = {"prompt": ask("p"), "chosen": say("c"), "rejected": say("r"), "anchors": [say("a"), say("b")]}
        group = parse(data, positives=positives)
        assert group.positives == tuple(Completion(frozen(say(text))) for text in expected)
        assert group.sampled is (expected != ("c",))

    @pytest.mark.parametrize("anchors", [{}, {"anchors": None}])
    def test_without_anchors(self, ask, say, anchors):
        data = {"prompt": ask("p"), "chosen": say("c"), "rejected": say("r"), **anchors}
        assert parse(data).positives == (Completion(frozen(say("c"))),)
        assert parse(data, positives="anchors").positives == ()

    def test_sampling_that_gave_nothing_is_not_made_up_for_by_the_chosen(self, ask, say):
        data = {"prompt": ask("p"), "chosen": say("c"), "rejected": say("r"), "anchors": []}
        assert (parse(data).positives, parse(data).sampled) == ((), True)
        assert parse(data, positives="chosen").positives == (Completion(frozen(say("c"))),)

    def test_anchors_that_were_cut(self, ask, say):
        data = {"prompt": ask("p"), "rejected": say("r"), "anchors": [say("a"), say("b")], "anchor_cut": [False, True]}
        assert parse(data).positives == (Completion(frozen(say("a"))), Completion(frozen(say("b")), cut=True))

    def test_anchors_beside_a_labelled_negative(self, ask, say):
        group = parse({"prompt": ask("p"), "completion": say("r"), "label": False, "anchors": [say("a")]})
        assert group.positives == (Completion(frozen(say("a"))),)

    def test_none_is_an_absent_column(self, ask, say):
        group = parse({"prompt": ask("p"), "chosen": None, "rejected": say("r"), "completion": None, "label": None})
        assert (group.negative, group.positives) == (Completion(frozen(say("r"))), ())


def test_reference_columns():
    preference = {"prompt": "p", "chosen": "c", "rejected": "r", "ref_chosen_logps": -1, "ref_rejected_logps": -2.5}
    group = parse({**preference, "harmful_ref_rejected_logps": -3.0})
    assert group.positives == (Completion("c", -1.0),)
    assert group.negative == Completion("r", -2.5, -3.0)
    labelled = {"prompt": "p", "completion": "c", "label": True, "ref_completion_logps": -4.0}
    assert parse(labelled).positives == (Completion("c", -4.0),)
    anchored = {"prompt": "p", "rejected": "r", "anchors": ["a", "b"], "ref_anchor_logps": [-1.0, -2.0]}
    assert [anchor.ref_logp for anchor in parse(anchored).positives] == [-1.0, -2.0]
    with pytest.raises(DataError, match=r"line 7: ref_anchor_logps must be a list of 2 numbers"):
        parse({**anchored, "ref_anchor_logps": [-1.0]})


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is grey.", "The sky is green.", ("The sky is", " grey.", " green.")),
        ("Q: sky?\n\nyes", "Q: sky?\n\nno", ("Q: sky?", "\n\nyes", "\n\nno")),
        ("The sky is", "The sky is green.", ("The sky", " is", " is green.")),
        ("The same", "The same", ("The", " same", " same")),
    ],
)
def test_implicit_text_prompt(chosen, rejected, expected):
    group = parse({"chosen": chosen, "rejected": rejected})
    assert (group.prompt, group.positives[0].content, group.negative.content) == expected


@given(st.text("ab \n"), st.text("ab \n"), st.text("ab \n"))
def test_implicit_text_prompt_loses_nothing(common, left, right):
    chosen, rejected = "the " + common + left, "the " + common + right
    group = parse({"chosen": chosen, "rejected": rejected})
    assert group.prompt
    assert not group.prompt[-1].isspace()
    assert group.prompt + group.positives[0].content == chosen
    assert group.prompt + group.negative.content == rejected


def test_implicit_conversation_prompt():
    shared = [user("hi"), assistant("hello"), user("sky?")]
    group = parse({"chosen": [*shared, assistant("blue")], "rejected": [*shared, assistant("green")]})
    assert group.prompt == tuple(shared)
    assert [c.content for c in group.completions] == [(assistant("green"),), (assistant("blue"),)]
    same = parse({"chosen": shared, "rejected": shared})
    assert same.prompt == tuple(shared[:2])
    assert same.negative.content == same.positives[0].content == (shared[2],)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"question": "p", "answer": "r"},
            r"d\.jsonl, line 7: the columns question, answer fit no format\. Fix: .*\{pro",
        ),
        ({"prompt": "p", "chosen": "c"}, "the columns prompt, chosen fit no format"),
        ({"rejected": "r"}, "the columns rejected fit no format"),
        ({}, r"the columns \(none\) fit no format"),
        ({"prompt": "p", "completion": "c"}, "fit no format"),
        ({"prompt": 3, "rejected": "r"}, "prompt is a int; expected text or a list of messages"),
        ({"prompt": "p", "rejected": ["r"]}, "rejected is a list; expected text or a list of messages"),
        ({"prompt": "p", "rejected": []}, "rejected is an empty list"),
        ({"prompt": "p", "rejected": [assistant("r")]}, "the prompt is text but a completion is messages. Fix"),
        ({"prompt": [user("p")], "rejected": "r"}, "the prompt is messages but a completion is text. Fix"),
        ({"prompt": [user("p")], "rejected": [user("p"), assistant("r")]}, "repeats the messages of the prompt"),
        ({"prompt": [{"content": "p"}], "rejected": [assistant("r")]}, r"prompt\[0\] has no role"),
        ({"prompt": [{"role": "user"}], "rejected": [assistant("r")]}, r"prompt\[0\]: content is a NoneType"),
        ({"prompt": [user([{"type": "image"}])], "rejected": [assistant("r")]}, r"content is a list\. Fix: give text"),
        ({"prompt": "p", "rejected": "r\ud83d"}, "rejected holds half of a surrogate pair"),
        ({"prompt": "p", "completion": "c", "label": "bad"}, "label is 'bad'"),
        ({"prompt": "p", "rejected": "r", "anchors": "a"}, "anchors is a str"),
        ({"prompt": "p", "rejected": "r", "anchors": ["a", 1]}, r"anchors\[1\] is a int"),
        (
            {"prompt": "p", "rejected": "r", "anchors": ["a"], "anchor_cut": [True, False]},
            "line 7: anchor_cut must be a list of 1 booleans, one per anchor",
        ),
        (
            {"prompt": "p", "rejected": "r", "anchors": ["a"], "anchor_cut": ["no"]},
            r"line 7: anchor_cut\[0\] is 'no'\. Fix: true where",
        ),
        (
            {"prompt": "p", "rejected": "r", "anchors": [[assistant("a")]]},
            "prompt is text but a completion is messages",
        ),
        ({"prompt": "p", "rejected": "r", "ref_rejected_logps": float("nan")}, "ref_rejected_logps is nan"),
        ({"prompt": "p", "rejected": "r", "ref_rejected_logps": "-1"}, "ref_rejected_logps is '-1'"),
        ({"chosen": "yes", "rejected": "no"}, "share no beginning to be the prompt"),
        ({"chosen": "yes", "rejected": [assistant("no")]}, "differ in style"),
    ],
)
def test_what_fits_no_format(data, message):
    with pytest.raises(DataError, match=message):
        parse(data)


def test_messages_lose_the_keys_that_tables_fill_with_none():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    group = parse({"prompt": [{**user("p"), "tool_calls": None}], "rejected": [call]})
    assert group.prompt == (user("p"),)
    assert group.negative.content == ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},)
    assert not group.negative.blank


@pytest.mark.parametrize(
    ("content", "blank"),
    [("", True), (" \n\t", True), ("a", False), ((assistant(" "),), True), ((assistant(""), assistant("a")), False)],
)
def test_blank(content, blank):
    assert Completion(content).blank is blank
