"""Results as a page: one HTML file with figures, tables, remarks and examples, which needs nothing else to be read."""

from __future__ import annotations

import base64
import io
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
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
from prefs.results.result import Excerpt, Result
from prefs.results.terminal import MISSING, number
from prefs.store.files import write_durably

# Endings of columns that are about another one.
LOW, HIGH, COUNT, REASON, SD = "_low", "_high", "_n", "_reason", "_sd"
# What HTML cannot hold: control characters other than tab and line ends, halves of surrogate pairs, non-characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Figures that are wider than this for their height get a line of their own.
WIDE = 2
# Characters of a prompt that its line in the list of examples shows; the page cuts what does not fit.
START = 200
VERDICTS = {True: "refused", False: "not refused", None: "not judged"}


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


@dataclass(frozen=True, eq=False)
class Report:
    """All that a page says, in its order.

    Attributes
    ----------
    results
        A section each, where it has a title; all remarks stand together above.
    figures
        The files of the results' figures, by name; they are copied into the page.
    configs
        Of jobs, as YAML by name.
    """

    title: str
    when: str
    command: str
    results: Sequence[Result]
    figures: Mapping[str, Path]
    examples: Sequence[Example] = ()
    examples_note: str = ""
    configs: Sequence[tuple[str, str]] = ()


def write_report(path: Path, report: Report) -> Path:
    """Write the page, whole or not at all.

    Raises
    ------
    UserError
        If a figure cannot be read or the disk refuses.
    """
    environment = page_environment("prefs.results")
    environment.filters |= {
        "image": _image,
        "columns": _columns,
        "totals": _totals,
        "excerpts": _excerpts,
        "answers": _answers,
        "start": lambda prompt: " ".join(prompt[:START].split()),
    }
    environment.globals["verdicts"] = VERDICTS
    page = environment.get_template("report.html.jinja").render(report=report, nonce=secrets.token_urlsafe(16))
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


def printable(value: Any) -> Any:
    """Show what HTML cannot hold: ␀ for NUL, � for what has no picture. Applied to all that the template prints."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return UNPRINTABLE.sub(lambda match: _picture(ord(match[0])), value)


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def _excerpts(result: Result) -> list[Excerpt]:
    return [
        excerpt
        for table in result.tables
        if not table.large
        for excerpt in table.excerpts or [Excerpt(table.title or table.name.replace("_", " "), table.frame, table.note)]
    ]


def _image(path: Path) -> dict[str, Any]:
    """A figure as a data: URI, and its size."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
    except OSError as error:
        raise UserError(f"cannot read figure {path}: {error.strerror or error}") from None
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"source": source, "width": width, "height": height, "wide": width > WIDE * height}


@dataclass(frozen=True)
class _Entry:
    """One row's entry in a column: what is printed, and what it is sorted by (empty: missing)."""

    text: str
    key: str
    interval: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Column:
    name: str
    numeric: bool
    entries: Sequence[_Entry]

    @property
    def intervals(self) -> bool:
        return any(entry.interval for entry in self.entries)


def _columns(frame: pd.DataFrame) -> list[_Column]:
    """A table as it is printed: with intervals and reasons folded into the columns that they are about.

    No two columns have the same name; the index is not shown.
    """
    values = {str(name): list(frame[name]) for name in frame}
    nothing = [None] * len(frame)
    bounded = [name for name in values if name + LOW in values and name + HIGH in values]
    folded = {name + end for name in bounded for end in (LOW, HIGH, COUNT)} | {name + REASON for name in values}
    columns = []
    for name, own in values.items():
        if name not in folded:
            low, high = (values[name + end] if name in bounded else nothing for end in (LOW, HIGH))
            known = [value for value in own if not pd.isna(value)]
            numeric = all(isinstance(value, Real) and not isinstance(value, bool) for value in known)
            digits = _digits(name, values) if numeric else None
            counts = values.get(name + COUNT, nothing) if name in bounded else nothing
            # Said only where it is not the row's own.
            fewer = [None if n == whole else n for n, whole in zip(counts, values.get("n", nothing), strict=True)]
            rows = zip(own, low, high, fewer, values.get(name + REASON, nothing), strict=True)
            columns.append(_Column(name, numeric, [_entry(*row, digits) for row in rows]))
    return columns


def _entry(value: Any, low: Any, high: Any, count: Any, reason: Any, digits: int | None) -> _Entry:
    """`digits` is None in a column of words."""
    if pd.isna(value):
        return _Entry(MISSING, "", reason="" if pd.isna(reason) else str(reason))
    if digits is None:
        text = ("no", "yes")[value] if isinstance(value, bool) else str(value)
        return _Entry(text, text)
    known = not (pd.isna(low) and pd.isna(high))
    interval = f"[{_number(low, digits)}, {_number(high, digits)}]" if known else ""
    if not pd.isna(count):
        interval = f"{interval} n = {_number(count, 0)}".strip()
    return _Entry(_number(value, digits), f"{float(value)!r}".replace("inf", "Infinity"), interval)


def _digits(name: str, values: Mapping[str, Sequence[Any]]) -> int:
    """Decimals for a column of numbers and their intervals: none for counts, two for what papers print with two.

    What is integral by chance, such as a correlation of 1, is not a count: an estimate up to 1 keeps its decimals. A
    column of small numbers only, such as variances on a scale from 0 to 1, gets up to two more. A deviation has the
    decimals of what it is of.
    """
    name = name.removesuffix(SD) if name.removesuffix(SD) in values else name
    bounds = [values[name + end] for end in (LOW, HIGH)] if name + LOW in values and name + HIGH in values else []
    estimate = bool(bounds) or name + REASON in values or name + SD in values
    numbers = (value for column in (values[name], *bounds) for value in column if isinstance(value, Real))
    sizes = [abs(float(value)) for value in numbers if math.isfinite(value)]
    largest = max(sizes, default=0.0)
    if all(size.is_integer() for size in sizes) and (largest > 1 or not estimate):
        return 0
    return 2 if largest == 0 else min(max(2, 1 - math.floor(math.log10(largest))), 4)


def _number(value: Any, digits: int) -> str:
    if digits == 0 and not pd.isna(value) and math.isfinite(value):
        return f"{int(value):,}".replace("-", "−")
    return number(float("nan" if value is None else value), digits)


def _totals(columns: Sequence[_Column]) -> set[int]:
    rows = list(zip(*(column.entries for column in columns), strict=True))
    totals = {row for row, entries in enumerate(rows) if any(entry.text == ALL for entry in entries)}
    return totals if len(totals) < len(rows) else set()


def _answers(ratings: Iterable[Rated]) -> list[tuple[str | None, list[Rated]]]:
    """Each distinct completion with the ratings of the cells that rated it, in order of first appearance."""
    answers: dict[str | None, list[Rated]] = {}
    for rated in ratings:
        answers.setdefault(rated.completion, []).append(rated)
    return list(answers.items())
