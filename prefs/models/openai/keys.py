"""Keys of served models: from the environment only, and in no message."""

from __future__ import annotations

import os

from prefs.config import ApiConfig
from prefs.errors import UserError


def key_of(api: ApiConfig) -> str | None:
    """The key that the environment holds for a server, None where it needs none.

    Raises
    ------
    UserError
        If it is not there, or is no key. Says where it was looked for, not what was found.
    """
    if api.key_env is None:
        return None
    key = os.environ.get(api.key_env, "").strip()
    if not key:
        raise UserError(
            f"model.api.key_env: the environment variable {api.key_env} is not set; put the key for {api.base_url} in"
            " it, or give the name of the one that holds it (null for a server that needs none)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"model.api.key_env: what the environment variable {api.key_env} holds is not a key")
    return key
