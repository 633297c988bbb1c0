"""The schema of the config group ``choice``: how pairs of tasks are asked for, and what utilities are made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from prefs.config.limits import (
    SEED,
    SEEDS,
    SHARE,
    TEMPERATURE,
    Limit,
    above,
    at_least,
    limited,
    not_empty,
    one_of,
)
from prefs.data.template import Option, Reading, Template
from prefs.errors import ConfigError

if TYPE_CHECKING:
    from prefs.config.schema import Config

SLOTS = ("first", "second", "first_label", "second_label")


def _two_labels(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(label) in (str, int) for label in pair):
        return False
    return len({str(label).strip().casefold() for label in pair} - {""}) == 2


@dataclass
class ChoiceTemplate:
    """How a choice is asked for."""

    name: str = MISSING
    when: str = limited("before", one_of("before", "after"))
    """``before``: of two prompts. ``after``: of two that have been completed, which then stand before the question, the
    first shown first."""
    question: str = limited(MISSING, not_empty("some text"))
    """It holds ``{first_label}`` and ``{second_label}``, and, asked before, the tasks at ``{first}`` and ``{second}``.
    """
    opening: str | None = None
    """Opens the answer; null: the model's own."""

    def ask(self, first: str, second: str, labels: tuple[str, str]) -> str:
        """The question about two tasks under two labels. What stands in braces in a task is its own."""
        texts: dict[str, str] = dict(zip(SLOTS, (first, second, *labels), strict=True))
        return re.sub(r"\{(" + "|".join(SLOTS) + r")\}", lambda slot: texts[slot[1]], self.question).strip()


@dataclass
class PairsConfig:
    """Which pairs are asked for, in how many rounds."""

    degree: int = limited(10, at_least(1))
    """Pairs a task, when all rounds are done."""
    first: int = limited(2, at_least(1))
    """Of these in the first round, at random."""
    step: int = limited(1, at_least(1))
    """In each later round."""
    select: str = limited("information", one_of("information", "random", "close"))
    holdout: int = limited(100, at_least(0))
    """Pairs drawn uniformly that utilities are not fitted to: what is predicted of these can be believed."""
    stop_se: float | None = limited(None, above(0))
    """Rounds end once the median standard error of the utilities is no larger, in log odds."""
    seed: int = limited(0, SEED)


@dataclass
class UtilityConfig:
    """The scale that explains choices."""

    model: str = limited("bradley_terry", one_of("bradley_terry", "thurstone"))
    position: str = limited("shared", one_of("none", "shared", "task"))
    """The position term: one number, or also one for each task."""
    folds: int = limited(5, at_least(2))
    """Of pairs, by which the penalty is chosen."""
    splits: int = limited(10, at_least(1))
    """Ways of halving the pairs, for the reliability."""
    seed: int = limited(0, SEED)


@dataclass
class ChoiceConfig:
    """Choices between tasks: ``exact`` from log-probabilities, or ``sampled``, in both orders."""

    name: str = MISSING
    kind: str = limited("none", one_of("none", "exact", "sampled"))
    template: ChoiceTemplate | None = None
    labels: list[Any] = limited(
        [["A", "B"]],
        not_empty("at least one pair of labels"),
        Limit(_two_labels, "pairs of two labels that differ, as in [[A,B],[1,2]]", items=True),
    )
    """Of several pairs, log odds are averaged."""
    orders: str = limited("both", one_of("both", "random"))
    """``random``: each pair in one order only, as the literature does; what is order and what is preference cannot be
    told apart then."""
    seeds: list[int] = limited([0, 1, 2, 3, 4], *SEEDS)
    """Sampled answers to each order, one a seed."""
    thoughts: int = limited(1, at_least(1))
    """Of a model that thinks, exact choices are after so many thoughts."""
    temperature: float = limited(1.0, TEMPERATURE)
    top_p: float = limited(1.0, SHARE)
    max_new_tokens: int = limited(8, at_least(1))
    condition: str | None = None
    """One of the concept's, which stands for its system prompt."""
    system_prompt: str | None = None
    pairs: PairsConfig = field(default_factory=PairsConfig)
    utility: UtilityConfig = field(default_factory=UtilityConfig)

    @property
    def label_pairs(self) -> list[tuple[str, str]]:
        """The labels as text: YAML takes 1 for a number."""
        return [(str(first), str(second)) for first, second in self.labels]

    def reading(self, labels: tuple[str, str]) -> Template:
        """How a sampled answer is read: 1 where it is the first label, 0 where it is the second."""
        options = [Option(label, value) for label, value in zip(labels, (1.0, 0.0), strict=True)]
        return Template(name="choice", question="?", options=options, reading=Reading.option)


def check_choice(config: Config) -> None:
    """Refuse choices that could not be asked for or read.

    Raises
    ------
    ConfigError
        Naming the key, what it got and what is allowed.
    """
    choice = config.choice
    if choice.kind == "none":
        return
    if choice.template is None:
        raise ConfigError("choice.template", None, "a template, as in choice/template=before")
    slots = SLOTS if choice.template.when == "before" else SLOTS[2:]
    for slot in slots:
        if f"{{{slot}}}" not in choice.template.question:
            raise ConfigError("choice.template.question", choice.template.question, f"a question that holds {{{slot}}}")
    for labels in choice.label_pairs:
        choice.reading(labels).check("choice.labels")
    if choice.kind == "sampled" and not choice.seeds:
        raise ConfigError("choice.seeds", [], "at least one seed, or choice=exact")
    if choice.kind == "exact" and config.model.backend == "openai" and config.model.api.top_logprobs == 0:
        allowed = "none or sampled, since this model's server gives no log-probabilities (model.api.top_logprobs=0)"
        raise ConfigError("choice", choice.kind, allowed)
    if choice.pairs.first > choice.pairs.degree:
        raise ConfigError(
            "choice.pairs.first", choice.pairs.first, f"at most choice.pairs.degree={choice.pairs.degree}"
        )
