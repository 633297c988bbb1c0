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
LETTERS = Template("t", "?", [Option(letter, float(n)) for n, letter in enumerate("ABCDEFGHI")], Reading.option)
ENJOYED = Template("t", "?", [Option("Yes", 1.0), Option("No", 0.0)], Reading.option)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (ANCHORED, " 4.", 4),
        (ANCHORED, "4/5", 4),
        (ANCHORED, "I'd give it a 4 out of 5.", 4),
        (ANCHORED, "Four", 4),
        (ANCHORED, "I'd give it four stars, all told", 4),
        (ANCHORED, "It took me two hours to write: three of them wasted", Invalid.no_option),
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
        (SIGNED, "My rating: ‒ 1 / 2", Invalid.ambiguous),
        (SIGNED, "Minus two.", -2),
        (SIGNED, "I would say negative 1", -1),
        (SIGNED, "plus 2", 2),
        (SIGNED, "on a scale from -2 to 2: 0", 0),
        (SIGNED, "1–2", Invalid.ambiguous),
        # The first line alone is the answer, whatever explanation follows, but for another answer.
        (ANCHORED, "**2**\n\n1. It was rude.\n2. It took 3 tries, not 4.", 2),
        (ANCHORED, "My rating is 3/5.\nIt had 4 parts", 3),
        (ANCHORED, "4\n\nActually, 5", Invalid.ambiguous),
        (ANCHORED, "4\n\nOverall rating: 2, I suppose", Invalid.ambiguous),
        (ANCHORED, "7\n\nOut of 5", Invalid.out_of_range),
        (LIKERT, "Neutral.\n\nIt was neither positive nor negative.", 3),
        (LIKERT, "Neutral\nPositive", Invalid.ambiguous),
        # The scale is no answer, nor are names and counts.
        (ANCHORED, "1–5", Invalid.no_option),
        (ANCHORED, "between 1 and 5", Invalid.no_option),
        (ANCHORED, "3 (on a 5-point scale)", 3),
        (ANCHORED, "From 1 (hate) to 5 (love), I would say 2", 2),
        (ANCHORED, "Llama 3 and GPT-4 cannot enjoy", Invalid.no_option),
        (ANCHORED, "5 sentences", Invalid.no_option),
        (ANCHORED, "⭐⭐⭐", 3),
        (ANCHORED, "★★☆☆☆", 2),
        (ANCHORED, "★★☆", Invalid.out_of_range),
        (ANCHORED, "3½", Invalid.out_of_range),
        (ANCHORED, "3.5Angles", Invalid.no_option),
        (TO_TEN, "Seven out of ten!", 7),
        (TO_TEN, "7/10, since 3 of the jokes were good", 7),
        # What is denied or hedged is no answer; what is denied beside an answer changes nothing.
        (ANCHORED, "no more than 3", Invalid.ambiguous),
        (ANCHORED, "almost a 5", Invalid.ambiguous),
        (ANCHORED, "5 would be too much", Invalid.ambiguous),
        (ANCHORED, "I don't feel, but 4", 4),
        (ANCHORED, "2, not 3", 2),
        (LIKERT, "It would not be right to call this positive", Invalid.ambiguous),
        (LIKERT, "It was positive, it was not negative", 4),
        (LIKERT, "Not a great, or even positive, experience", Invalid.ambiguous),
        (BINARY, "I have no complaints, it was good", 1),
        (BINARY, "anything but pleasant", Invalid.ambiguous),
        (AGREEMENT, "Neither.", 3),
        (AGREEMENT, "Neither of these", Invalid.no_option),
        (AGREEMENT, "I agree, strongly", 5),
        # Words that are also something else.
        (ENJOYED, "No, I did not", 0),
        (ENJOYED, "Yes, no problem", 1),
        (ENJOYED, "There is no way to tell", Invalid.no_option),
        (LETTERS, "I'd rather not, I'm sorry", Invalid.no_option),
        (LETTERS, "A fine task; a joy", Invalid.no_option),
        (LETTERS, "(c) somewhat", 2),
        (LETTERS, "I choose D because it was fine.", 3),
        (LETTERS, "My answer: B", 1),
        (LETTERS, "B or C", Invalid.no_option),
        (LETTERS, "B, or maybe C", Invalid.ambiguous),
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
EXPLANATION = st.text(alphabet="bcfhjkmpqxyz -,.!?()0123456789\n", max_size=80)


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


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
def test_an_option_on_a_line_of_its_own_stands_whatever_explanation_follows(name: str, data: st.DataObject):
    question = template(name)
    option = data.draw(st.sampled_from(question.options))
    word = data.draw(st.sampled_from([option.say, *option.also]))
    mark = data.draw(st.sampled_from(["", "*", "**", '"', "`", "> ", "- ", "(", "\n"]))
    label = data.draw(st.sampled_from(["", "Answer: ", "My rating is ", "I'd say ", "The final answer: "]))
    first = (
        f"{label}{mark}{word}{')' if mark == '(' else mark.strip('>- ')}{data.draw(st.sampled_from(['', '.', '!']))}"
    )
    explanation = data.draw(EXPLANATION)
    assert question.read(f"{first}\n\nBecause {' '.join(explanation.split())}") == option.value
    assert question.read(first, finished=True) == option.value


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
    assert ANCHORED.read("bla " * 100_000) == Invalid.no_option
    assert isinstance(ANCHORED.read("4 3 " * 20_000), Invalid)
    assert LIKERT.read("not " * 20_000 + "positive, " * 2_000) == Invalid.ambiguous
    assert LETTERS.read("I, (B). " * 10_000) == 1
    assert SIGNED.read("- " * 40_000 + "(1" * 20_000) == 1
