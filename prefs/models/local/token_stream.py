"""The residual stream of one conversation, token by token, with the text that each token stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

# Tokens in a row that may be text only together: 4 at most in Unicode, more in what is none.
LONGEST = 64


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One layer's residual stream over the n tokens of a conversation.

    Attributes
    ----------
    tokens
        The text of each. A character that is spread over several tokens stands with the last of them.
    control
        Whether each is a control token. Text that only looks like one is none.
    roles
        Whose text each belongs to (system, user, assistant); None for what the chat template, a thought or the opening
        of an answer adds.
    ranges
        The token range [start, end) of each position that the conversation has; see `prefs.config.POSITIONS`.
    vectors
        [n, d_model], float32, on the host.
    """

    tokens: tuple[str, ...]
    control: tuple[bool, ...]
    roles: tuple[str | None, ...]
    ranges: Mapping[str, tuple[int, int]]
    vectors: torch.Tensor


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds to those before it; they join to the text of all."""
    texts: list[str] = []
    # A token is decoded after the one before it, since some tokenizers leave out the blank that a text begins with.
    context = begin = 0
    for end in range(1, len(ids) + 1):
        before, text = _decoded(tokenizer, ids[context:begin]), _decoded(tokenizer, ids[context:end])
        new = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, ids[begin:end])
        if new.endswith("\ufffd") and end < len(ids) and end - begin < LONGEST:
            texts.append("")
        else:
            texts.append(new)
            context, begin = begin, end
    return tuple(texts)


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def owners(length: int, spans: Sequence[tuple[int, int]], roles: Sequence[str]) -> tuple[str | None, ...]:
    """For each of so many tokens the role of the message whose span it lies in, or None."""
    roles_of_tokens: list[str | None] = [None] * length
    for (start, end), role in zip(spans, roles, strict=True):
        roles_of_tokens[start:end] = [role] * len(roles_of_tokens[start:end])
    return tuple(roles_of_tokens)
