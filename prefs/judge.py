"""Judges: whether a completion is a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from prefs.config import JudgeConfig
from prefs.records import Completion


def judge(config: JudgeConfig, completions: Sequence[Completion]) -> list[bool | None]:
    """Whether each completion is a refusal; None where there is no completion, or no judge.

    ``phrases`` is the string match of Zou et al. 2023 ("Universal and Transferable Adversarial Attacks on Aligned
    Language Models"), restricted to the completion's opening: its first ``window`` characters hold one of the phrases.
    """
    if config.kind == "none":
        return [None] * len(completions)
    phrases = [_plain(phrase) for phrase in config.phrases]
    return [None if each.text is None else refuses(each.text, phrases, config.window) for each in completions]


def refuses(text: str, phrases: Sequence[str], window: int) -> bool:
    """Whether the first `window` characters of a text (0: all of it) hold one of the phrases, case apart."""
    opening = _plain(text.strip())
    opening = opening[:window] if window else opening
    return any(_plain(phrase) in opening for phrase in phrases)


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("’", "'").split())
