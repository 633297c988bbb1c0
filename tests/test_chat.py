"""Text kept apart from control tokens, on SmolLM2's own tokenizer; other families' templates: test_chat_templates."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefs.errors import UserError
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Message, as_dicts

TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = TRIMS.replace(
    "{{ m['content'] | trim }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
FORGETS = "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}{% endif %}{% endfor %}"
CONVERSATION = [
    Message("user", "What is 12 + 30?\n\n 1. Think.  2. Answer. "),
    Message("assistant", "  It's 42.\n"),
    Message("user", "Rate it: 1 to 5 ∑ 你好 🙂"),
]


def with_template(tokenizer, text: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = text
    return changed


@pytest.mark.parametrize("text", [TRIMS, THINKING])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_ids_equal_apply_chat_template(tokenizer, text, turns):
    tokenizer, messages = with_template(tokenizer, text), CONVERSATION[:turns]
    expected = tokenizer.apply_chat_template(
        as_dicts(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(ChatEncoder(tokenizer).encode(messages, answer="").ids) == list(expected)


def test_digits_are_tokens_of_their_own_even_after_blanks(tokenizer):
    # The published tokenizer splits digits before anything else; the GGUF conversion loses that.
    assert tokenizer.tokenize("a.\n\n12") == ["a", ".", "ĊĊ", "1", "2"]


def test_added_tags_of_the_template_are_control_even_if_not_marked_special(tokenizer):
    tokenizer = with_template(tokenizer, THINKING)
    tokenizer.add_tokens(["<think>", "</think>", "plainword"])
    encoder = ChatEncoder(tokenizer)
    ids = encoder.encode([Message("user", "<think> plainword </think>"), Message("assistant", "ok")]).ids
    think, plain = tokenizer.convert_tokens_to_ids(["<think>", "plainword"])
    assert ids.count(think) == 1  # the template's own, before the answer
    assert plain in ids


assigned = st.characters(exclude_categories=("Cc", "Cs", "Co", "Cn")) | st.just("\n")


@given(st.lists(st.text(assigned, max_size=80), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
def test_any_text_is_kept_whole_in_its_span(encoder, texts):
    messages = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    encoded = encoder.encode(messages, answer="")
    benign = encoder.encode([Message(message.role, "x") for message in messages], answer="")
    assert [token for token in encoded.ids if token < 17] == [token for token in benign.ids if token < 17]
    for message, (start, end) in zip(messages, encoded.spans, strict=True):
        # Compared with what the tokenizer itself keeps: its vocabulary lacks some bytes.
        alone = encoder.tokenizer(message.content.strip(), split_special_tokens=True)["input_ids"]
        assert encoder.tokenizer.decode(alone) in encoder.tokenizer.decode(list(encoded.ids[start:end]))


@pytest.mark.parametrize(("text", "message"), [(FORGETS, "leaves out the system turn"), ("", "no chat template")])
def test_a_template_that_drops_a_message_and_none_at_all_are_refused(tokenizer, text, message):
    with pytest.raises(UserError, match=message):
        ChatEncoder(with_template(tokenizer, text)).encode([Message("system", "Be kind."), CONVERSATION[0]], answer="")


@pytest.mark.slow
def test_ten_megabytes(encoder):
    encoded = encoder.encode([Message("user", "word <|im_end|> " * 640_000)], answer="")
    assert len(encoded.ids) > 1_000_000
    assert [token for token in encoded.ids if token < 17] == [1, 2, 1, 2, 1]
