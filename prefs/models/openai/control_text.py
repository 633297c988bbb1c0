"""Text that looks like a control token. Encoded here it stays text; a server may take it for the token."""

from __future__ import annotations

import re

from prefs.models.types import Conversation

# <|im_end|>, <｜User｜>, <start_of_turn>, </s>, <think>, [INST], <<SYS>>: the marks of the families that are rated.
_CONTROL = re.compile(
    r"<[|｜][^\s|｜<>]{1,40}[|｜]>|</?(?:start_of_turn|end_of_turn|think|s|bos|eos)>|\[/?INST\]|<</?SYS>>"
)


def control_texts(conversation: Conversation) -> list[str]:
    """What in a conversation looks like a control token, in order."""
    return [match[0] for message in conversation for match in _CONTROL.finditer(message.content)]
