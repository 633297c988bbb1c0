"""Lengths in tokens, of engines whose conversations are encoded here."""

from __future__ import annotations

from prefs.models.options import ask, unasked
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Question


class Encoded:
    """The part of a `prefs.models.types.Backend` that counts tokens before they are run."""

    encoder: ChatEncoder

    def prompt_tokens(self, conversation: Conversation) -> int:
        return len(self.encoder.encode(conversation, answer="").ids) + self.encoder.thought_room

    def conversation_tokens(self, conversation: Conversation) -> int:
        return unasked(self.encoder, conversation).question_start

    def question_tokens(self, conversation: Conversation, question: Question) -> int:
        asked = ask(self.encoder, conversation, question)
        return len(asked.ids) + max(len(tail) for tail in asked.tails) + self.encoder.thought_room
