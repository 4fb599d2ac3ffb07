"""Which number each class gets: by the data alone, and by a head that is already there."""

import pytest

from cutlayer.data.classes import MOST, classes_of, label_names
from cutlayer.errors import DataError
from cutlayer.models.heads import Head


def rows(*labels):
    return [{"text": "a", "label": label} for label in labels]


def head(*names, **more):
    return Head(names, {**more, **{name: number for number, name in enumerate(names)}})


UNNAMED = head("LABEL_0", "LABEL_1", "LABEL_2")
MOODS = head("sad", "neutral", "glad")


def numbers(found, *labels):
    return [found.numbers[str(label)] for label in labels]


def test_without_a_head_the_classes_are_those_of_the_data():
    found = classes_of(rows("b", "a", "b"), None, model="m")
    assert found.names == ["a", "b"]
    assert numbers(found, "a", "b") == [0, 1]
    found = classes_of(rows(2, 0), None, model="m")
    assert found.names == ["0", "1", "2"]
    assert numbers(found, 2, 0) == [2, 0]
    for only in ("a", 0):
        with pytest.raises(DataError, match=rf"the label '{only}': there is nothing to tell apart"):
            classes_of(rows(only, only), None, model="m")


def test_names_are_looked_up_in_the_head():
    found = classes_of(rows("glad", "sad"), MOODS, model="m")
    assert found.names == ["sad", "neutral", "glad"]
    assert numbers(found, "glad", "sad") == [2, 0]
    assert numbers(classes_of(rows("LABEL_2", "LABEL_0"), UNNAMED, model="m"), "LABEL_2", "LABEL_0") == [2, 0]


def test_whole_numbers_are_the_heads_own():
    found = classes_of(rows(2, 0), MOODS, model="m")
    assert found.names == ["sad", "neutral", "glad"]
    assert numbers(found, 2, 0) == [2, 0]
    assert classes_of(rows(0), MOODS, model="m").names == ["sad", "neutral", "glad"]


def test_names_that_only_label2id_knows():
    """A checkpoint whose id2label nobody filled in; or that has another name for a class beside."""
    found = classes_of(rows("glad", "sad"), head("LABEL_0", "LABEL_1", sad=1, glad=0), model="m")
    assert found.names == ["glad", "sad"]
    assert numbers(found, "glad", "sad") == [0, 1]


def test_an_unnamed_head_gets_the_datas_names_in_order(caplog):
    found = classes_of(rows("y", "x"), UNNAMED, model="m")
    assert found.names == ["x", "y", "LABEL_2"]
    assert "x is 0, y is 1" in caplog.text
    assert numbers(found, "x", "y") == [0, 1]


def test_other_names_are_refused():
    with pytest.raises(
        DataError, match=r"labels are glad, joy, but .* of 'm' was trained for sad, neutral, glad, .*'joy'"
    ):
        classes_of(rows("joy", "glad"), MOODS, model="m")
    with pytest.raises(DataError, match="nobody knows which of these 'x' is"):  # x might be any, also LABEL_1
        classes_of(rows("x", "LABEL_1"), UNNAMED, model="m")


def test_too_many_classes_for_the_head():
    for labels in (("a", "b", "c", "d"), (3, 0)):
        with pytest.raises(DataError, match=r"The data has 4 classes .* head of 'm' has 3 \(sad, neutral, glad\)"):
            classes_of(rows(*labels), MOODS, model="m")


def test_a_number_that_is_no_class():
    with pytest.raises(DataError, match=rf"holds {MOST}"):
        label_names(rows(0, MOST))


def test_classes_that_the_run_names():
    """They are the same whatever rows a client has; texts by name, whole numbers by place."""
    named = ["b", "a"]
    for some in (rows("a"), rows("b", "a"), []):
        found = classes_of(some, None, model="m", named=named)
        assert (found.names, found.numbers) == (named, {"b": 0, "a": 1})
    assert numbers(classes_of(rows(1), None, model="m", named=named), 0, 1) == [0, 1]
    with pytest.raises(DataError, match="'c', which is none of the run's classes: b, a"):
        classes_of(rows("a", "c"), None, model="m", named=named)
    with pytest.raises(DataError, match="'2', which is none of the run's classes: 0, 1"):
        classes_of(rows(2), None, model="m", named=named)


def test_classes_that_the_run_names_for_a_head():
    """A head that names its classes keeps their numbers; one that does not gets the run's names in order."""
    found = classes_of(rows("glad"), MOODS, model="m", named=["glad", "sad"])
    assert found.names == ["sad", "neutral", "glad"]
    assert found.numbers == {"glad": 2, "sad": 0}
    assert classes_of(rows("y"), UNNAMED, model="m", named=["y", "x"]).names == ["y", "x", "LABEL_2"]
    assert classes_of(rows("y"), UNNAMED, model="m", named=["y", "x"]).numbers == {"y": 0, "x": 1}
    with pytest.raises(DataError, match="was trained for sad, neutral, glad"):
        classes_of(rows("joy"), MOODS, model="m", named=["joy", "sad"])
    with pytest.raises(DataError, match="in another order than the head"):
        classes_of(rows(0), MOODS, model="m", named=["glad", "sad"])
