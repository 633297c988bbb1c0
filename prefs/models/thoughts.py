"""Thoughts that stand in a text as the model wrote it, between marks of its own, though it was not said to think."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Parted:
    """An answer with its thought taken apart; ``closed`` is False where the thought was cut off before an answer."""

    text: str
    thought: str | None
    closed: bool


# What opens and what ends a thought of Qwen 3, DeepSeek, Olmo 3 and most others; of Mistral; Seed; Kimi; Command A;
# Apertus; Gemma 4; gpt-oss, also as its channels read without their control tokens.
_MARKS = (
    (r"<(think|thinking|thought|reasoning|reflection)>", r"</(?:think|thinking|thought|reasoning|reflection)>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<seed:think>", r"</seed:think>"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
    (r"<\|channel>thought\b", r"<channel\|>"),
    (
        r"<\|channel\|>(?:analysis|commentary)<\|message\|>",
        r"(?:<\|end\|>)?(?:<\|start\|>)?(?:assistant)?<\|channel\|>final<\|message\|>",
    ),
    (r"analysis(?=[A-Z])", r"assistantfinal"),
)
_OPENED = [(re.compile(rf"\s*{start}"), re.compile(end)) for start, end in _MARKS]
# Of a thought that the chat template opened: an end that stands at an end of its line.
_ENDS = "|".join(end for _, end in _MARKS[:-2])
_ENDED = re.compile(rf"^\s*(?:{_ENDS})|(?:{_ENDS})\s*?$", re.MULTILINE)
# The control tokens among the marks, which decoding keeps.
MARKS = frozenset(
    [
        *("<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>", "◁think▷", "◁/think▷"),
        *("<|START_THINKING|>", "<|END_THINKING|>", "<|inner_prefix|>", "<|inner_suffix|>", "<|channel>", "<channel|>"),
        *("<|channel|>", "<|message|>"),
    ]
)


def without_thought(text: str, finished: bool = True) -> Parted:
    """A text, and the thought that it begins with; as it is where there is none.

    Only what opens the text is a thought. One that did not end has no answer behind it, nor has one whose answer did
    not begin before the text was cut off (not `finished`).
    """
    for start, end in _OPENED:
        if opened := start.match(text):
            ended = end.search(text, opened.end())
            if ended is None:
                return Parted("", text[opened.end() :], closed=False)
            return _behind(text[ended.end() :], text[opened.end() : ended.start()], finished)
    ended = _ENDED.search(text)
    if ended is None:
        return Parted(text, None, closed=True)
    return _behind(text[ended.end() :], text[: ended.start()], finished)


def _behind(answer: str, thought: str, finished: bool) -> Parted:
    answer = answer.lstrip()
    return Parted(answer, thought, closed=finished or bool(answer))


def opens_thought(turn: str) -> bool:
    """Whether what a chat template opens the assistant's turn with leaves it in a thought."""
    return any(re.search(rf"(?:{start})\s*$", turn) for start, _ in _MARKS[:-1])
