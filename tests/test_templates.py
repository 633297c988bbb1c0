"""Reading answers: the value, or a reason; never a guess."""

from __future__ import annotations

import pytest
from conftest import TEMPLATES, template
from hypothesis import given
from hypothesis import strategies as st

from prefs.data.template import Invalid, Option, Reading, Template
from prefs.errors import ConfigError

ANCHORED = template("anchored")
LIKERT = template("likert")
AGREEMENT = template("agreement")
BINARY = template("binary")
TO_TEN = Template("t", "?", [Option(str(n), float(n)) for n in range(11)], Reading.number)
HALVES = Template("t", "?", [Option(f"{n / 2:g}", n / 2) for n in range(2, 11)], Reading.number)
SIGNED = Template("t", "?", [Option(str(n), float(n)) for n in range(-2, 3)], Reading.number)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (ANCHORED, " 4.", 4),
        (ANCHORED, "4/5", 4),
        (ANCHORED, "I'd give it a 4 out of 5.", 4),
        (ANCHORED, "Four", Invalid.no_option),
        (ANCHORED, "It was one of the best tasks", Invalid.no_option),
        (ANCHORED, "４", 4),
        (ANCHORED, "On a scale of 1 to 5, I would say 3", 3),
        (ANCHORED, "4, definitely 4", 4),
        (ANCHORED, "As an AI I have no feelings, but: 4", 4),
        (ANCHORED, "", Invalid.empty),
        (ANCHORED, "**", Invalid.empty),
        (ANCHORED, "3-4", Invalid.ambiguous),
        (ANCHORED, "not 4", Invalid.ambiguous),
        (ANCHORED, "4.5", Invalid.out_of_range),
        (ANCHORED, "-4", Invalid.out_of_range),
        (ANCHORED, "45", Invalid.out_of_range),
        (ANCHORED, "4 or maybe 7", Invalid.ambiguous),
        (ANCHORED, "from 1 to 5", Invalid.no_option),
        (ANCHORED, "v4", Invalid.no_option),
        (ANCHORED, "I cannot rate this from 1 to 5.", Invalid.refused_to_rate),
        (ANCHORED, "As an AI language model, I don't have personal preferences.", Invalid.refused_to_rate),
        (ANCHORED, "I’m unable to give a rating.", Invalid.refused_to_rate),
        (LIKERT, "VERY  POSITIVE!", 5),
        (LIKERT, "Positive, I think", 4),
        (LIKERT, "Somewhere between negative and positive", Invalid.ambiguous),
        (LIKERT, "nonnegative", Invalid.no_option),
        (LIKERT, "not positive", Invalid.ambiguous),
        (AGREEMENT, "I don't agree", Invalid.ambiguous),
        (BINARY, "It was a bad experience", 0),
        (BINARY, "not bad", Invalid.ambiguous),
        (BINARY, "goodness", Invalid.no_option),
        (TO_TEN, "1", 1),
        (TO_TEN, "10/10", 10),
        (HALVES, "3.7", Invalid.out_of_range),
        (SIGNED, "-2", -2),
        (SIGNED, "−1", -1),
    ],
)
def test_an_answer_is_a_value_or_a_reason(question: Template, answer: str, expected: float | Invalid):
    assert question.read(answer) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_option_of_every_shipped_template_reads_as_itself(name: str):
    for option in template(name).options:
        for answer in (option.say, *option.also, option.say.upper(), f" {option.say}.\n", f"**{option.say}**"):
            assert template(name).read(answer) == option.value, answer


any_template = st.sampled_from([ANCHORED, LIKERT, AGREEMENT, BINARY, TO_TEN, HALVES, SIGNED])


@given(any_template, st.text(max_size=300))
def test_any_text_gives_a_value_of_the_scale_or_a_reason(question: Template, answer: str):
    read = question.read(answer)
    assert isinstance(read, Invalid) or read in question.values


@given(any_template, st.data())
def test_two_different_options_are_never_settled(question: Template, data: st.DataObject):
    first, second = data.draw(st.lists(st.sampled_from(question.says), min_size=2, max_size=2, unique=True))
    joiner = data.draw(st.sampled_from([" or ", ", maybe ", " then again ", "; ", "\n"]))
    assert isinstance(question.read(first + joiner + second), Invalid)


@given(any_template, st.text(alphabet="bcfhjkmpqxyz ,!?\n", max_size=60))
def test_text_that_names_no_option_gives_no_value(question: Template, answer: str):
    assert question.read(answer) in (Invalid.empty, Invalid.no_option)


@given(any_template, st.data())
def test_surroundings_that_say_nothing_do_not_matter(question: Template, data: st.DataObject):
    option = data.draw(st.sampled_from(question.options))
    before = data.draw(st.sampled_from(["", "  ", "\n\n", "*", "Rating: ", '"', "My answer is "]))
    after = data.draw(st.sampled_from(["", " ", "\n", "*", ".", "!", '"', " :)"]))
    assert question.read(before + option.say + after) == option.value


def test_a_cut_off_answer_may_have_gone_on():
    assert TO_TEN.read("I would rate it 1", finished=False) == Invalid.ambiguous
    assert TO_TEN.read("I would rate it 2", finished=False) == 2
    assert TO_TEN.read("1, since", finished=False) == 1
    assert TO_TEN.read("I would rate it 1") == 1
    assert ANCHORED.read("1", finished=False) == 1


@pytest.mark.parametrize("words", [("C#", "C"), ("*", "**"), ("fair", "_Fair_")])
def test_words_that_read_the_same_are_refused(words):
    options = [Option(word, float(value)) for value, word in enumerate(words)]
    with pytest.raises(ConfigError, match="told apart when read"):
        Template("t", "?", options, Reading.option).check("t")


def test_huge_answers_are_read_in_reasonable_time():
    assert ANCHORED.read("bla " * 500_000) == Invalid.no_option
    assert isinstance(ANCHORED.read("4 3 " * 100_000), Invalid)
