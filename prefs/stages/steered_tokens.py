"""One conversation token by token: which tokens are steered, and which are read. For the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from prefs.models.loading import ModelSpec, identity
from prefs.models.types import Conversation, Message, Question, as_dicts
from prefs.results.result import View
from prefs.stages.records import Completion, conversation
from prefs.store.table import Store

# Characters of the steered and of the read tokens that the terminal shows.
SHOWN = 60


def steered_tokens(
    completions: Sequence[Completion],
    rater: ModelSpec,
    question: Question,
    *,
    at: str,
    position: str,
    system_prompt: str | None,
    store: Store,
) -> pd.DataFrame:
    """The shortest of the conversations, one row a token: ``text``, ``role`` (whose text it is), ``steered``, and
    ``read`` (``rating``: the rating is predicted from it; the position that the vector was taken at; or nothing).

    Taken from the store, or made with the rater's tokenizer; its weights are not loaded.
    """
    example = min(
        (made for made in completions if made.text is not None),
        key=lambda made: (not made.text, len(made.task.prompt) + len(made.text or ""), made.task.id),
    )
    turns = conversation(example.task.prompt, system_prompt, example.text)
    asked = {"question": question.text, "options": list(question.options), "prefill": question.prefill}
    kept = store.result(
        "steered_tokens",
        {"model": identity(rater), "messages": as_dicts(turns), **asked, "at": at, "position": position},
    )
    content = kept.read()
    if content is None:
        content = {}, _tokens(turns, rater, question, at, position)
        kept.write(*content)
    return pd.DataFrame(content[1]).assign(task=example.task.id)


def _tokens(
    turns: Conversation, rater: ModelSpec, question: Question, at: str, position: str
) -> Mapping[str, Sequence[Any]]:
    # Imported only now: a job that finds all in the store tokenizes nothing.
    from prefs.models.counting import tokenizer_of
    from prefs.models.local.grouping import spans_of_answer
    from prefs.models.local.token_stream import owners, token_texts
    from prefs.models.positions import token_ranges
    from prefs.models.prompts import encode_prompt
    from prefs.models.tokens import ChatEncoder

    encoder = ChatEncoder(tokenizer_of(rater), rater.chat_template_kwargs, rater.thinking)
    prompt = encode_prompt(encoder, turns, question)
    if rater.thinking is not None:  # its thought follows, and is steered as what is generated
        prompt = replace(prompt, ids=encoder.open_thought((*turns, Message("user", question.text))))
    count, (start, end) = len(prompt.ids), spans_of_answer(prompt)[at]
    read = [""] * count
    for first, last in token_ranges(prompt.spans, [position]).values():
        read[first:last] = [position] * (last - first)
    if rater.thinking is None:
        read[-1] = "rating"
    return {
        "token": list(range(count)),
        "text": list(token_texts(encoder.tokenizer, prompt.ids)),
        "role": list(owners(count, prompt.spans.turns, [*(message.role for message in turns), "user"])),
        "steered": [start <= token < end for token in range(count)],
        "read": read,
    }


def tokens_view(tokens: pd.DataFrame, at: str) -> View:
    """How many tokens are steered and read, and their text."""
    from prefs.results.html import printable

    count, read = len(tokens), tokens["read"].to_numpy(dtype=object)

    def row(name: str, chosen: np.ndarray) -> list[str]:
        text = str(printable("".join(tokens["text"].to_numpy()[chosen]).replace("\n", "↵")))
        half = SHOWN // 2
        return [name, str(int(chosen.sum())), text if len(text) <= SHOWN else f"{text[:half]} … {text[-half:]}"]

    generated = "" if at in ("completion", "question") else ", and what is generated"
    rows = [row(f"steered: {at}{generated}", tokens["steered"].to_numpy(dtype=bool))]
    rows += [row(f"read: {name}", read == name) for name in dict.fromkeys(filter(None, read))]
    return View(f"Tokens of task {tokens['task'].iloc[0]}, of {count}", ["", "n", "text"], rows)
