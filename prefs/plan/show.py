"""A plan as it is printed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from rich.filesize import decimal
from rich.table import Column

from prefs.config import Config
from prefs.job import StageCounts
from prefs.plan.book import COMPLETER, JUDGE, RATER
from prefs.plan.costs import Amount, Plan, RoleCost
from prefs.results.result import Result, View
from prefs.results.terminal import MISSING

MOST_NAMED = 2
SWEEP = (
    "This is one job of a sweep. Its jobs share the store: what several of them want is in the plan of each, and made"
    " once."
)


def plan_result(plan: Plan, config: Config, *, sweep: bool) -> Result:
    """What a plan prints: what is to be made, what that costs, and which of the numbers are exact."""
    names = [each.name for each in config.template.values()]
    templates = ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} templates"
    title = f"Plan · {config.model.name} · {templates} · {config.dataset.name}, {plan.tasks:,} tasks"
    views = [_records(plan.work), *([_costs(plan.roles)] if plan.roles else [])]
    return Result(title, views=tuple(views), remarks=(*_said(plan, config), *([SWEEP] if sweep else [])))


def _records(work: Sequence[StageCounts]) -> View:
    rows: list[list[str]] = []
    kinds: dict[str, list[StageCounts]] = {}
    for each in work:
        kinds.setdefault(_kind(each.stage), []).append(each)
    for role in (COMPLETER, RATER, JUDGE):
        for at, kind in enumerate(kind for kind in kinds if _role(kind) == role):
            reused, computed = (sum(getattr(each, name) for each in kinds[kind]) for name in ("reused", "computed"))
            numbers = (reused + computed, reused, computed)
            rows.append([role if at == 0 else "", kind, *(f"{number:,}" for number in numbers)])
    return View("Records: exact", ["role", Column("of"), "wanted", "in the store", "to make"], rows)


def _kind(stage: str) -> str:
    """What a stage makes: the same for every template."""
    kind, _, _ = stage.partition(", ")
    return stage if kind == "concepts" else kind


def _role(kind: str) -> str:
    return {"completions": COMPLETER, "verdicts": JUDGE}.get(kind.removeprefix("concepts, "), RATER)


def _costs(roles: Sequence[RoleCost]) -> View:
    lines: list[list[str]] = []
    names = ["thoughts"] if any(each.thoughts for each in roles) else []
    names += ["prompt tokens", "generated tokens"]
    names += ["GPU-hours"] if any(each.gpu_hours for each in roles) else []
    names += ["US dollars"] if any(each.dollars for each in roles) else []
    rows: list[tuple[str, str, Sequence[RoleCost]]] = [(each.role, each.model, [each]) for each in roles]
    for role, model, of in [*rows, ("total", "", roles)] if len(roles) > 1 else rows:
        thoughts = sum(each.thoughts for each in of)
        cells = {
            "thoughts": f"{thoughts:,}" if thoughts else MISSING,
            "prompt tokens": _sum([each.prompt_tokens for each in of], _whole),
            "generated tokens": _sum([each.drawn_tokens for each in of], _whole),
            "GPU-hours": _sum([each.gpu_hours for each in of], _hours),
            "US dollars": _sum([each.dollars for each in of], _cents),
        }
        lines.append([role, model, *(cells[name] for name in names)])
    title = "Forward passes: ≤ upper bound, ~ expected, no sign: exact"
    return View(title, ["role", Column("model"), *names], lines)


def _sum(amounts: Sequence[Amount | None], form: Callable[[float], str]) -> str:
    """A sum with the signs that say how sure it is."""
    known = [each for each in amounts if each is not None]
    if not known:
        return MISSING
    total = functools.reduce(Amount.plus, known)
    most, expected = form(total.most), form(total.expected)
    if total.exact:
        return most
    return f"≤ {most}" if most == expected else f"≤ {most}\n~ {expected}"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _hours(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{max(number, 0.001):.3f}"


def _cents(number: float) -> str:
    return f"{number:,.2f}"


def _said(plan: Plan, config: Config) -> list[str]:
    if not any(each.computed for each in plan.work):
        return ["Nothing is left to make: the store has everything that models are asked for."]
    activations = f"Activations to be written: {_size(plan.vector_bytes)}. " if plan.vector_bytes.most else ""
    said = [f"{activations}The store grows by about {_size(plan.store_bytes, about=True)}."]
    if any(not each.drawn_tokens.exact for each in plan.roles):
        completer, rating = config.completer.max_new_tokens, config.rating.max_new_tokens
        bound = f"At most {completer} tokens a completion and {rating} an answer"
        known = [f"{count:,} {kind} with {mean:.1f} tokens on average" for kind, (count, mean) in plan.known.items()]
        so_far = f"the store has {' and '.join(known)}" if known else "the store has none to expect another length from"
        said.append(f"{bound}; {so_far}. Answers of several seeds that begin alike are run once where they do.")
    parameters = {each.model: each.parameters for each in plan.roles if each.parameters is not None}
    if parameters:
        sizes = ", ".join(f"{name} {count / 1e9:,.2f}" for name, count in parameters.items())
        said.append(
            f"GPU-hours are an estimate: 2 operations a parameter and token, at {config.plan_tflops:g} TFLOP/s"
            f" (plan_tflops). Billions of parameters: {sizes}."
        )
    if any(each.served for each in plan.roles):
        said.append("A served model's tokens are guessed from the lengths of texts.")
    return said + list(plan.remarks)


def _size(of: Amount, *, about: bool = False) -> str:
    most, expected = decimal(round(of.most)), decimal(round(of.expected))
    if about:
        return expected if most == expected else f"{expected} to {most}"
    return most if of.exact else f"≤ {most}"
