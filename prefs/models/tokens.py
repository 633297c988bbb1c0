"""From messages to token ids, by the model's own chat template, with text kept apart from control tokens.

The template is rendered with a placeholder for each text, so whatever it prints around them is the author's and may
hold control tokens; the texts are put in afterwards and encoded by a copy of the tokenizer that knows no control
tokens. A data set's ``<|im_end|>`` is therefore seven plain tokens, and role boundaries hold. For text without such
strings the ids equal ``tokenizer.apply_chat_template``'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
        If the tokenizer has no chat template, or no fast implementation to take control tokens out of; if the text that
        ends a thought is not one token of it; or if the template ends a thought that the model is to think, or
        opens one that it is not to.
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
        self._control_pattern = re.compile(
            "(" + "|".join(re.escape(token) for token in sorted(self._control, key=len, reverse=True)) + ")"
        )
        self._plain = _without(tokenizer.backend_tokenizer, set(self._control))
        # Question texts and role headers recur in every row: encode each of them once.
        self._short_text = lru_cache(maxsize=8192)(lambda text: self._encode_text(text))
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
        ids = (self._control[text],) if text in self._control else self._encode_text(text)[0]
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
        ids: list[int] = []
        spans: dict[int, tuple[int, int]] = {}
        for piece in self._control_pattern.split(rendered):
            if piece in self._control:
                ids.append(self._control[piece])
            elif piece:
                self._append_text(piece, texts, ids, spans)
        empty = (len(ids), len(ids))
        return Encoded(tuple(ids), tuple(spans.get(index, empty) for index in range(len(texts))))

    def _append_text(self, piece: str, texts: list[str], ids: list[int], spans: dict[int, tuple[int, int]]) -> None:
        """Encode one stretch between control tokens, and note which of its tokens hold which text."""
        text = ""
        ranges: dict[int, tuple[int, int]] = {}
        for number, part in enumerate(PLACEHOLDER.split(piece)):
            if number % 2:
                ranges.setdefault(int(part), (len(text), len(text) + len(texts[int(part)])))
                part = texts[int(part)]
            text += part
        encode = self._short_text if len(text) < 4096 else self._encode_text
        token_ids, ends = encode(text)
        start = len(ids)
        ids.extend(token_ids)
        for index, (first, last) in ranges.items():
            # A token belongs to the text that its last character lies in.
            inside = [token for token, end in enumerate(ends) if first < end <= last]
            if inside:
                spans[index] = (start + inside[0], start + inside[-1] + 1)
            else:
                before = start + sum(end <= first for end in ends)
                spans[index] = (before, before)

    def _encode_text(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        encoding = self._plain.encode(text, add_special_tokens=False)
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


def _without(tokenizer: Tokenizer, control: set[str]) -> Tokenizer:
    """A copy of a tokenizer that does not know the control tokens, and gives all others the same ids."""
    state = json.loads(tokenizer.to_str())
    kept = []
    for token in state["added_tokens"]:
        if token["content"] not in control:
            kept.append(token)
        elif token["id"] >= tokenizer.get_vocab_size(with_added_tokens=False):
            # Ids after the vocabulary are counted on loading: a name that no text can hold keeps the place.
            kept.append({**token, "content": f"\ue0f2{uuid4().hex}\ue0f3"})
    state["added_tokens"] = kept
    state["truncation"] = state["padding"] = None
    plain = Tokenizer.from_str(json.dumps(state))
    for token in kept:
        if plain.token_to_id(token["content"]) != token["id"]:
            raise AssertionError(f"token {token['content']!r} changed its id; please report this tokenizer")
    return plain
