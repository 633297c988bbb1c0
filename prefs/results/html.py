"""The report of a sweep: one HTML file with figures, tables and examples, which needs nothing else to be read."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from PIL import Image

from prefs.data.task import ALL
from prefs.errors import UserError
from prefs.results.terminal import MISSING, number
from prefs.store.files import write_durably

# Endings of columns that are about another one.
LOW, HIGH, REASON, SD = "_low", "_high", "_reason", "_sd"
# What HTML cannot hold: control characters other than tab and line ends, halves of surrogate pairs, non-characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Figures that are wider than this for their height get a line of their own.
WIDE = 2
# Characters of a prompt that its line in the list of examples shows; the page cuts what does not fit.
START = 200
VERDICTS = {True: "refused", False: "not refused", None: "not judged"}


@dataclass(frozen=True)
class Figure:
    """A PNG file, which is copied into the report."""

    title: str
    path: Path


@dataclass(frozen=True)
class Table:
    """A table with its columns as they are, but for two kinds that are folded into the column they are about.

    Beside a column X, ``X_low`` and ``X_high`` are shown as its interval, and ``X_reason`` where X is missing. No two
    columns have the same name. The frame's index is not shown.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Figures and tables about one question."""

    title: str
    note: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Rated:
    """What one cell made of a task.

    Attributes
    ----------
    completion
        None where there is none.
    refused
        The judge's verdict; None where there is none.
    exact
        The exact rating in words, such as "3.62 (mass .95)"; empty where there is none.
    sampled
        The sampled ratings, one a seed: a number, or what the answer was instead, such as "out_of_range: 10".
    """

    cell: str
    completion: str | None
    refused: bool | None
    exact: str
    sampled: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A task, and what each cell made of it."""

    task: str
    origin: str
    prompt: str
    ratings: tuple[Rated, ...]


@dataclass(frozen=True)
class Config:
    """A job's config."""

    name: str
    yaml: str


@dataclass(frozen=True)
class Report:
    """All that a report says, in its order."""

    title: str
    when: str
    command: str
    remarks: tuple[str, ...]
    sections: tuple[Section, ...]
    examples: tuple[Example, ...]
    examples_note: str
    configs: tuple[Config, ...]


def write_report(path: Path, report: Report) -> Path:
    """Write the report, whole or not at all.

    Raises
    ------
    UserError
        If a figure cannot be read or the disk refuses.
    """
    page = _environment().get_template("report.html.jinja").render(report=report, nonce=secrets.token_urlsafe(16))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, page.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def page_environment(package: str) -> jinja2.Environment:
    """What pages are rendered with, from the templates that lie in a package: everything from outside is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _environment() -> jinja2.Environment:
    environment = page_environment("prefs")
    environment.filters |= {"image": _image, "grid": _grid, "answers": _answers, "start": _start}
    environment.globals["verdicts"] = VERDICTS
    return environment


def printable(value: Any) -> Any:
    """Show what HTML cannot hold: ␀ for NUL, � for what has no picture. Applied to all that the template prints."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return UNPRINTABLE.sub(lambda found: _picture(ord(found[0])), value)


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


@dataclass(frozen=True)
class _Image:
    source: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        return self.width > WIDE * self.height


def _image(path: Path) -> _Image:
    """A figure as a data: URI."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
    except OSError as error:
        raise UserError(f"cannot read figure {path}: {error.strerror or error}") from None
    return _Image(f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height)


@dataclass(frozen=True)
class _Entry:
    """One row's place in a column: what is printed, and what it is sorted by (empty: missing)."""

    text: str
    key: str
    interval: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Column:
    name: str
    numeric: bool
    entries: tuple[_Entry, ...]

    @property
    def intervals(self) -> bool:
        return any(entry.interval for entry in self.entries)


@dataclass(frozen=True)
class _Grid:
    columns: tuple[_Column, ...]

    @property
    def rows(self) -> list[tuple[_Entry, ...]]:
        return list(zip(*(column.entries for column in self.columns), strict=True))

    @property
    def totals(self) -> set[int]:
        """The rows over all origins, where others are over one."""
        totals = {at for at, row in enumerate(self.rows) if any(entry.text == ALL for entry in row)}
        return totals if len(totals) < len(self.rows) else set()


def _grid(frame: pd.DataFrame) -> _Grid:
    """A table as it is printed: with intervals and reasons folded into the columns that they are about."""
    values = {str(name): list(frame[name]) for name in frame}
    ends = {
        name: list(zip(values[name + LOW], values[name + HIGH], strict=True))
        for name in values
        if name + LOW in values and name + HIGH in values
    }
    reasons = {name: values[name + REASON] for name in values if name + REASON in values}
    folded = {name + end for name in ends for end in (LOW, HIGH)} | {name + REASON for name in reasons}

    def digits(name: str) -> int:
        if name.removesuffix(SD) in values:
            name = name.removesuffix(SD)
        about = [*values[name], *itertools.chain(*ends.get(name, []))]
        return _digits(about, estimate=name in ends or name in reasons or name + SD in values)

    return _Grid(
        tuple(
            _numbers(name, values[name], ends.get(name, []), reasons.get(name, []), digits(name))
            if _are_numbers(values[name])
            else _words(name, values[name], reasons.get(name, []))
            for name in values
            if name not in folded
        )
    )


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in values if not pd.isna(value))


def _numbers(
    name: str, values: Sequence[Any], ends: Sequence[tuple[Any, Any]], reasons: Sequence[Any], digits: int
) -> _Column:
    entries = []
    for value, pair, reason in itertools.zip_longest(values, ends, reasons):
        if pd.isna(value):
            entries.append(_missing(reason))
            continue
        known = any(not pd.isna(end) for end in pair or ())
        interval = f"[{', '.join(_number(end, digits) for end in pair or ())}]" if known else ""
        entries.append(_Entry(_number(value, digits), f"{float(value)!r}".replace("inf", "Infinity"), interval))
    return _Column(name, True, tuple(entries))


def _words(name: str, values: Sequence[Any], reasons: Sequence[Any]) -> _Column:
    entries = []
    for value, reason in itertools.zip_longest(values, reasons):
        if pd.isna(value):
            entries.append(_missing(reason))
        else:
            text = ("no", "yes")[value] if isinstance(value, bool) else str(value)
            entries.append(_Entry(text, text))
    return _Column(name, False, tuple(entries))


def _missing(reason: Any) -> _Entry:
    return _Entry(MISSING, "", reason="" if pd.isna(reason) else str(reason))


def _digits(values: Sequence[Any], estimate: bool) -> int:
    """Decimals for a column of numbers and their intervals: none for counts, two for what papers print with two.

    What is integral by chance, such as a correlation of 1, is not a count: an estimate up to 1 keeps its decimals. A
    column of small numbers only, such as variances on a scale from 0 to 1, gets up to two more.
    """
    sizes = [abs(float(value)) for value in values if isinstance(value, Real) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    if all(size.is_integer() for size in sizes) and (largest > 1 or not estimate):
        return 0
    return 2 if largest == 0 else min(max(2, 1 - math.floor(math.log10(largest))), 4)


def _number(value: float, digits: int) -> str:
    if digits == 0 and not pd.isna(value) and math.isfinite(value):
        return f"{int(value):,}".replace("-", "−")
    return number(float(value), digits)


def _start(prompt: str) -> str:
    """The first words of a prompt, on one line."""
    return " ".join(prompt[:START].split())


def _answers(ratings: Iterable[Rated]) -> list[tuple[str | None, list[Rated]]]:
    """Each distinct completion with the ratings of the cells that rated it, in order of first appearance."""
    answers: dict[str | None, list[Rated]] = {}
    for rated in ratings:
        answers.setdefault(rated.completion, []).append(rated)
    return list(answers.items())
