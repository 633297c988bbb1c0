"""A choice among options and no other answer: the response format that asks for it, and how the answer is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Room for a choice as JSON.
CHOICE_TOKENS = 256


def one_of(says: Sequence[str]) -> dict[str, Any]:
    """The response format that lets a model give one of these and nothing else."""
    schema: Mapping[str, Any] = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(says)}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}


def chosen(text: str, says: Sequence[str]) -> str | None:
    """The option that an answer is: the one in its JSON, or the one it says and nothing else."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    if isinstance(said, dict):
        said = said.get("answer")
    if isinstance(said, bool) or not isinstance(said, str | int | float):
        return None
    plain = str(said).casefold().strip(" \t\r\n.\"'*`")
    return next((say for say in says if say.casefold().strip() == plain), None)
