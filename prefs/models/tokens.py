"""From messages to token ids, by the model's own chat template, with text kept apart from control tokens.

The template is rendered with a placeholder for each text, so whatever it prints around them is the author's and may
hold control tokens. These are written under names that no text can hold; then the texts are put in, and the whole is
encoded by a copy of the tokenizer that knows the control tokens by these names alone. A data set's ``<|im_end|>`` is
therefore seven plain tokens, and role boundaries hold; in all else the copy does what the tokenizer does, so that for
text without such strings the ids equal ``tokenizer.apply_chat_template``'s. A probe conversation shows that they do.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tokenizers import Tokenizer

from prefs.config import ThinkingConfig
from prefs.errors import UserError
from prefs.models.chat_template import PLACEHOLDER, ChatTemplate, placeholder
from prefs.models.thoughts import MARKS, opens_thought
from prefs.models.types import Message, as_dicts

if TYPE_CHECKING:  # it takes a second, and a job that finds everything in the store needs no tokenizer
    from transformers import PreTrainedTokenizerFast

# The variable that turns thinking off in chat templates that know it (Qwen3's, SmolLM3's, GLM's).
THINKING_SWITCH = "enable_thinking"

# What tokenizers and templates treat in ways of their own: digits, scripts, emoji; and texts with blanks at their
# borders, and with none, by either role.
PROBE = (
    Message("system", " Be brief: 3 lines.\n"),
    Message("user", "\n  What is 12,345.67 × 8 − 0.5?\n\n\tif x == 1:  # naïve\n\t\tpass\r\n 你好, мир 🙂👩‍🚀!  "),
    Message("assistant", "  It's 98,764.86…\n\n\n- one\n-  two\n"),
    Message("user", "Why"),
    Message("assistant", "Because"),
    Message("user", " Rate it: 1\t"),
)


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each message the range [start, end) of the tokens that hold its content."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class ChatEncoder:
    """Encodes conversations for one model.

    Raises
    ------
    UserError
        If the tokenizer has no chat template, or no fast implementation to take control tokens out of; if a
        conversation is encoded here as other tokens than transformers makes of it; if the text that ends a thought is
        not one token of it; or if the template ends a thought that the model is to think, or opens one that it is not
        to.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template_kwargs: Mapping[str, Any] | None = None,
        thinking: ThinkingConfig | None = None,
    ):
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: needs a fast tokenizer (a tokenizer.json)")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_kwargs or {})
        self._control = _control_tokens(tokenizer)
        self._control_pattern = _any_of(self._control)
        # Of characters that no normalizer changes, and different in each process: no text was written to hold it.
        self._names = {token: f"\ue0f2{uuid4().hex}{number}\ue0f3" for number, token in enumerate(self._control)}
        self._renamed = _renamed(tokenizer.backend_tokenizer, self._names)
        self._border = _any_of(self._names[token] for token in self._names.keys() & _borders(tokenizer))
        # Question texts and role headers recur in every row: encode each of them once.
        self._short_text = lru_cache(maxsize=8192)(lambda text: self._encode_text(text))
        # What `prefs.models.prompts` has found out of a question's options, by what comes before the answer.
        self.answers: dict[Any, Any] = {}
        self._check_probe()
        self.thinking = thinking
        self.thought_end = self._one_token(thinking.close) if thinking is not None else None
        if thinking is None and opens_thought(self.template.opened_turn()):
            raise UserError(
                f"model.thinking.enabled: the chat template of {tokenizer.name_or_path} opens a thought; give"
                " model.thinking.enabled=true"
            )
        if thinking is not None and self.template.opened_turn().rstrip().endswith(thinking.close):
            raise UserError(
                f"model.thinking.enabled: the chat template of {tokenizer.name_or_path} ends the thought itself, with"
                f" model.chat_template_kwargs={self.template.kwargs}; change these, or give thinking.enabled=false"
            )

    def _check_probe(self) -> None:
        """Refuse a tokenizer that transformers gets other ids from.

        A conversation that the template refuses is none that could be got wrong.
        """
        for turns in (PROBE, PROBE[1:], PROBE[1:2], PROBE[3:4]):
            try:
                ours = self.encode(turns, answer="").ids
            except UserError:
                continue
            theirs = self.template.tokenized(as_dicts(turns))
            place = next((n for n, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1]), None)
            if place is not None:
                here, there = (
                    self.tokenizer.convert_ids_to_tokens(list(ids[place : place + 4])) for ids in (ours, theirs)
                )
                raise UserError(
                    f"{self.tokenizer.name_or_path}: this tokenizer and chat template cannot be used, since text is"
                    f" encoded here as other tokens than transformers' apply_chat_template makes of it: token {place}"
                    f" of a probe conversation and those after it are {here} for {there}"
                )

    def texts(self, drawn: Sequence[Sequence[int]]) -> list[str]:
        """Drawn tokens as text, without special ones; but the marks of a thought stay, to be told from an answer."""
        kept = [[token for token in ids if token not in self._unwritten] for ids in drawn]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=False)

    @cached_property
    def _unwritten(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(id for id, token in added.items() if token.special and token.content not in MARKS)

    @property
    def control_ids(self) -> frozenset[int]:
        """The tokens that only the chat template can write, and no text."""
        return frozenset(self._control.values())

    @property
    def default_system(self) -> str | None:
        """What the chat template says in a system turn where no system prompt is given; None if nothing."""
        return self.template.own_system(self._control_pattern)

    def turn_end(self) -> int | str | None:
        """What ends an assistant's turn in the chat template: a control token, or a text where none comes first; None
        where there is nothing but blanks."""
        end = self.template.turn_end()
        control = self._control_pattern.search(end)
        text = end[: control.start()] if control is not None else end
        if control is not None and not text.strip():
            return self._control[control[0]]
        # Blanks at the beginning of a line may be the model's; those before the next text are not its to write.
        return text.strip(" ").rstrip() or None

    def notes(self, name: str) -> list[str]:
        """What the users of this model should know of its chat template, a line each, for the log."""
        notes = []
        if self.default_system is not None:
            kept = self.template.own_system(self._control_pattern, "")
            without = 'rating.system_prompt="" for none' if kept is None else "it does so whatever prompt is given"
            own = " ".join(self.default_system.split())
            notes.append(f'{name}: the chat template puts in a system prompt of its own: "{own}" ({without})')
        thoughtless = self.template.opened_turn(**{THINKING_SWITCH: False})
        if self.thinking is None and self.template.opened_turn() != thoughtless:
            notes.append(
                f"{name}: the chat template lets the model think, and its thoughts use up the tokens of answers; give"
                f" model.chat_template_kwargs={{{THINKING_SWITCH}: false}} or model.thinking.enabled=true"
            )
        return notes

    @property
    def thought_room(self) -> int:
        """Tokens that a whole thought and its marks may take; 0 for a model that answers at once."""
        if self.thinking is None:
            return 0
        marks = (self.thinking.open, self.thinking.close + self.thinking.gap)
        return self.thinking.max_tokens + sum(len(self._encode(mark, []).ids) for mark in marks)

    def _one_token(self, text: str) -> int:
        ids = self._encode(text, []).ids
        if len(ids) != 1:
            raise UserError(
                f"model.thinking.close: {text!r} is {len(ids)} tokens to {self.tokenizer.name_or_path}, not one; give"
                " the token that ends this model's thoughts, or model.thinking.enabled=false"
            )
        return ids[0]

    def open_thought(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation with the assistant's turn and its thought opened."""
        rendered, texts = self._render(messages, open_turn=True)
        return self._encode(self._with_thought_open(rendered), texts).ids

    def _with_thought_open(self, rendered: str) -> str:
        assert self.thinking is not None
        # Some templates open the thought themselves (DeepSeek-R1's).
        return rendered if rendered.rstrip().endswith(self.thinking.open) else rendered + self.thinking.open

    def encode(self, messages: Sequence[Message], *, answer: str | None = None, thought: str | None = None) -> Encoded:
        """Token ids of a conversation.

        Parameters
        ----------
        messages
            The turns so far.
        answer
            None: the conversation as it stands. Text (also ""): followed by the header of the assistant's turn and
            this opening of the answer, left open.
        thought
            What the model thought before the answer, without its marks.

        Raises
        ------
        UserError
            If the chat template refuses these roles.
        """
        rendered, texts = self._render(messages, open_turn=answer is not None)
        if thought is not None:
            assert self.thinking is not None
            opened = self._with_thought_open(rendered)
            rendered = opened + placeholder(len(texts)) + self.thinking.close + self.thinking.gap
            texts.append(thought)
        if answer:
            rendered += placeholder(len(texts))
            texts.append(answer)
        encoded = self._encode(rendered, texts)
        return Encoded(encoded.ids, encoded.spans[: len(messages)])

    def _encode(self, rendered: str, texts: list[str]) -> Encoded:
        """Ids of a rendered template, and the spans of the texts put in for its placeholders."""
        parts: list[str] = []
        ranges: dict[int, tuple[int, int]] = {}
        length = 0
        for number, part in enumerate(PLACEHOLDER.split(rendered)):
            if number % 2:
                written = texts[int(part)]
                ranges.setdefault(int(part), (length, length + len(written)))
            else:
                written = self._control_pattern.sub(lambda token: self._names[token[0]], part)
            parts.append(written)
            length += len(written)
        ids, ends = self._tokens("".join(parts))
        spans = (ranges.get(index, (length, length)) for index in range(len(texts)))
        # A token belongs to the text that its last character lies in.
        return Encoded(
            tuple(ids), tuple((bisect_right(ends, first), bisect_right(ends, last)) for first, last in spans)
        )

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a whole text, and the character after each token.

        Tokenizers treat what lies between two control tokens by itself, but for the blanks that these strip and for
        what stands first. So each stretch is encoded between the two, and the second left to the next.
        """
        ids: list[int] = []
        ends: list[int] = []
        start = 0
        for border in [*self._border.finditer(text), None]:
            stretch = text[start:] if border is None else text[start : border.end()]
            stretch_ids, stretch_ends = (self._short_text if len(stretch) < 4096 else self._encode_text)(stretch)
            count = len(stretch_ids) - (border is not None)
            ids += stretch_ids[:count]
            ends += [start + end for end in stretch_ends[:count]]
            start = len(text) if border is None else border.start()
        return ids, ends

    def _encode_text(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        encoding = self._renamed.encode(text, add_special_tokens=False)
        return tuple(encoding.ids), tuple(end for _, end in encoding.offsets)

    def _render(self, messages: Sequence[Message], *, open_turn: bool) -> tuple[str, list[str]]:
        """The chat template's text with placeholders, and the texts that they stand for."""
        rendered = self.template.render(as_dicts(messages), open_turn=open_turn)
        return rendered, [message.content.strip() for message in messages]


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Text → id of the tokens that steer the model rather than say something.

    The special ones; and added tokens that look like a tag and either stand in the chat template (Qwen's ``<think>``
    is not marked special) or are written ``<|…|>``. Added tokens that are plain text, such as Gemma's runs of
    newlines, stay with the text.
    """
    template = (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else json.dumps(tokenizer.chat_template)
    )
    control: dict[str, int] = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        tag = re.fullmatch(r"</?[^<>\s]+>|\[/?[A-Z_]+\]", token.content) is not None
        piped = re.fullmatch(r"<[|｜].*[|｜]>", token.content) is not None
        if token.special or piped or (tag and token.content in template):
            control[token.content] = token_id
    return control


def _borders(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The added tokens that are found in a text whatever stands around them, before anything is normalised."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if not token.normalized and not token.single_word}


def _renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A copy of a tokenizer that knows these tokens by other names, and does the same in all else."""
    state = json.loads(tokenizer.to_str())
    ids = {token["content"]: token["id"] for token in state["added_tokens"]}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    elif inside := names.keys() & model["vocab"].keys():
        model["vocab"] |= {names[token]: model["vocab"].pop(token) for token in inside}
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not inside & {*pair, "".join(pair)}]
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    state["truncation"] = state["padding"] = None
    renamed = Tokenizer.from_str(json.dumps(state))
    for token, token_id in ids.items():
        if renamed.token_to_id(names.get(token, token)) != token_id:
            raise AssertionError(f"token {token!r} changed its id; please report this tokenizer")
    return renamed


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these texts, the longest where several match; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
