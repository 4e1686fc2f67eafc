"""Wordings of a relation: the words between a pair, and what may be a template."""

import pytest

from luthier.tuning.wordings import distinct, mine, paraphrase, well_formed


def test_the_words_between_subject_and_object_are_a_template():
    pair = [("Apple", "Steve Jobs")]
    assert mine(["Apple was founded by Steve Jobs in 1976."], pair) == ["{text} was founded by {mask}"]
    assert mine(["Steve Jobs, founder of Apple, left."], pair) == ["{mask}, founder of {text}"]


def test_the_most_frequent_come_first_and_parts_of_words_do_not_count():
    sentences = ["Rome lies in Italy.", "Oslo is found in Norway.", "Kano lies in Nigeria."]
    sentences += ["Rome is found in Italyland.", "Chrome is found in Italy."]
    pairs = [("Rome", "Italy"), ("Oslo", "Norway"), ("Kano", "Nigeria")]
    assert mine(sentences, pairs) == ["{text} lies in {mask}", "{text} is found in {mask}"]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("{text} lies in {mask}", True),
        ("{mask} holds {text}", True),
        ("{text} lies", False),
        ("{text} and {text} lie in {mask}", False),
        ("{text} lies in {mask} or {mask}", False),
        ("{text} , {mask}", False),
        ("{text} is in the {mask}", False),
        ("{text} one two three four five six seven eight nine ten eleven {mask}", False),
    ],
)
def test_what_may_be_a_template(text, good):
    assert well_formed(text) == good


def test_a_wording_counts_once():
    assert distinct(["{text} lies in {mask}", "{text}  Lies in {mask}.", "{mask} holds {text}"]) == [
        "{text} lies in {mask}",
        "{mask} holds {text}",
    ]


def test_paraphrases_are_kept_where_they_keep_subject_and_gap():
    good, bad = ["[Y] holds [X].\nMore.", "[Y] HOLDS [X]"], ["[X] lies {there}", "[X] and [X] in [Y]", ""]
    written = {"[X] lies in [Y]": [good[0], *bad, good[1]]}
    assert paraphrase(["{text} lies in {mask}"], lambda text: written[text]) == ["{mask} holds {text}."]
