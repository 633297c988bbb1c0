"""What a plan's engines count, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from prefs.errors import UserError, first_line
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Question, Score

COMPLETER, RATER, JUDGE = ROLES = ("completer", "rater", "judge")
# Tables whose rows come after a thought, by who thinks.
THOUGHTS = {COMPLETER: ("completions",), RATER: ("answers", "scores"), JUDGE: ()}


@dataclass
class Tally:
    """What a role would have its model do: requests, tokens run (or, of a server, billed), and thoughts."""

    requests: int = 0
    prompt_tokens: float = 0.0
    drawn_tokens: float = 0.0
    thoughts: int = 0


@dataclass
class Book:
    """What all roles would have done. ``made_up``: some prompts held texts that were made up."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    made_up: bool = False

    def of(self, role: str) -> Tally:
        """The tally of a role, empty at first."""
        return self.tallies.setdefault(role, Tally())


def encoder_of(spec: ModelSpec) -> ChatEncoder:
    """What encodes a model's conversations.

    Raises
    ------
    UserError
        If its tokenizer is not there, or `ChatEncoder` refuses it.
    """
    path = model_folder(spec)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer of {spec.name} from {path}: {first_line(error)}") from None
    return ChatEncoder(tokenizer, spec.chat_template_kwargs, spec.thinking)


def uniform(question: Question) -> Score:
    """The score of a model that has not been asked."""
    return Score((1 / len(question.says),) * len(question.says))
