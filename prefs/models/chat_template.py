"""A model's chat template: rendered with placeholders for the texts, and what it says and does by itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from prefs.errors import UserError

if TYPE_CHECKING:  # as in `prefs.models.tokens`
    from transformers import PreTrainedTokenizerFast

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
# Splits a rendered template into what the template wrote and, at odd places, the numbers of the texts.
PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")

Turn = Mapping[str, str]


def placeholder(index: int) -> str:
    """What stands for the text of this number."""
    return f"{_OPEN}{index}{_CLOSE}"


class ChatTemplate:
    """The template of one tokenizer, with the arguments that it is always rendered with.

    Raises
    ------
    UserError
        If the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kwargs: Mapping[str, Any]):
        self.name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(f"{self.name}: no chat template; prefs rates chat models")
        self.kwargs = dict(kwargs)
        self._check_kwargs(tokenizer)
        self._tokenizer = tokenizer

    def _check_kwargs(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Refuse an argument that neither the template nor its renderer reads."""
        known = inspect.signature(tokenizer.apply_chat_template).parameters
        words = set(re.findall(r"\w+", str(self.kwargs.get("chat_template") or tokenizer.chat_template)))
        for name in self.kwargs:
            if name not in known and name not in words:
                raise UserError(
                    f"model.chat_template_kwargs.{name}: the chat template of {self.name} knows nothing of it"
                )

    def render(self, turns: Sequence[Turn], *, open_turn: bool, **kwargs: Any) -> str:
        """The conversation with a placeholder for the text of each turn; ``open_turn`` opens the assistant's next.

        Raises
        ------
        UserError
            If the template refuses these roles or leaves a turn out.
        """
        shown = [{"role": turn["role"], "content": _shown(turn, number)} for number, turn in enumerate(turns)]
        rendered = self._apply(shown, open_turn, tokenize=False, **kwargs)
        for number, turn in enumerate(shown):
            if placeholder(number) in turn["content"] and placeholder(number) not in rendered:
                raise UserError(f"the chat template of {self.name} leaves out the {turn['role']} turn")
        return rendered

    def tokenized(self, turns: Sequence[Turn]) -> list[int]:
        """The ids that transformers makes of a conversation, with the assistant's next turn opened."""
        return self._apply([dict(turn) for turn in turns], True, tokenize=True)

    def _apply(self, turns: list[dict[str, str]], open_turn: bool, *, tokenize: bool, **kwargs: Any) -> Any:
        def apply(turns: list[dict[str, str]]) -> Any:
            return self._tokenizer.apply_chat_template(
                turns,
                tokenize=tokenize,
                return_dict=False,
                add_generation_prompt=open_turn,
                **{"strftime_now": _fixed_date, **self.kwargs, **kwargs},
            )

        try:
            try:
                return apply(turns)
            except TemplateError:
                if (folded := _folded(turns)) is None:
                    raise
                return apply(folded)
        except TemplateError as error:
            raise UserError(f"the chat template of {self.name} refuses: {error}") from None

    def opened_turn(self, **kwargs: Any) -> str:
        """What it opens the assistant's turn with, after a user's."""
        return self.render([{"role": "user", "content": "?"}], open_turn=True, **kwargs).partition(placeholder(0))[2]

    def turn_end(self) -> str:
        """What it writes after an assistant's turn: after the last one or, where it leaves that open, after one that a
        user's turn follows."""
        try:
            turns = [{"role": role, "content": "?"} for role in ("user", "assistant")]
            last = self.render(turns, open_turn=False).partition(placeholder(1))[2]
        except UserError:  # some end with a user's turn only
            last = ""
        return last if last.strip() else self._around_users()[1]

    @property
    def shows_system_last(self) -> bool:
        """Whether it shows the system prompt only behind the answers before the last user's turn.

        Raises
        ------
        UserError
            If it refuses system prompts, or leaves them out.
        """
        turns = [{"role": role, "content": "?"} for role in ("system", "user", "assistant", "user")]
        rendered = self.render(turns, open_turn=True)
        return rendered.index(placeholder(0)) > rendered.index(placeholder(2))

    def own_system(self, control: re.Pattern[str], *given: str) -> str | None:
        """What it says in a system turn by itself, less control tokens and the role's name; None if nothing.

        Parameters
        ----------
        control
            Matches a control token.
        given
            A system prompt, or none.
        """
        marks: dict[str, str] = {}

        def marked(text: str) -> str:
            # Control tokens as one character each, so that none is cut in two.
            return control.sub(lambda token: marks.setdefault(token[0], chr(0xF0000 + len(marks))), text)

        start, between = map(marked, self._around_users())
        # Both end with the header of a user's turn.
        header = next(between[cut:] for cut in range(len(between) + 1) if start.endswith(between[cut:]))
        start = marked(self._around_users(*given)[0])
        before = start.rpartition(header)[0] if header else start
        texts = [re.sub(r"\Asystem(\n|\Z)", "", text).strip() for text in re.split("[\U000f0000-\U000fffff]", before)]
        return "\n".join(text for text in texts if text) or None

    def _around_users(self, *system: str) -> tuple[str, str]:
        """What it writes before the first user's turn, and between an answer and the next user's turn."""
        turns = [{"role": "system", "content": text} for text in system]
        turns += [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
        rendered = self.render(turns, open_turn=False)
        first, answer, second = (placeholder(len(system) + turn) for turn in range(3))
        return rendered.partition(first)[0], rendered.partition(answer)[2].partition(second)[0]


def _shown(turn: Turn, number: int) -> str:
    """A turn's content with a placeholder in it.

    Blanks stay outside: a template that trims its messages trims them as it would. An empty system prompt has no
    placeholder: templates ask whether there is one.
    """
    content = turn["content"]
    text = content.strip()
    if not text:
        return content + placeholder(number) * (turn["role"] != "system")
    lead, _, tail = content.partition(text)
    return lead + placeholder(number) + tail


def _folded(turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The system prompt put before the first user's text, with a blank line between, as Gemma's authors write it.

    For models without a system role. None if no system prompt is there.
    """
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return None
    system, user = turns[0]["content"], turns[1]["content"]
    return [{"role": "user", "content": f"{system}\n\n{user}" if system.strip() else user}, *turns[2:]]


def _fixed_date(form: str) -> str:
    """Today, to chat templates that print it: the day that Llama 3's fall back on, so that records stay the same."""
    return datetime(2024, 7, 26).strftime(form)
