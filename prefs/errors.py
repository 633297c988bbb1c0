"""The one kind of error a user is meant to see: a single line that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. Printed as one line, without a traceback; the program exits with code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class ConfigError(UserError):
    """A config value that cannot be right: names the key, what it got and what is allowed."""

    def __init__(self, key: str, got: object, allowed: str | Iterable[object]) -> None:
        if not isinstance(allowed, str):
            allowed = "one of " + ", ".join(str(choice) for choice in allowed)
        super().__init__(f"{key}: got {got!r}; allowed: {allowed}")
        self.key = key


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
