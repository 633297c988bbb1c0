"""The choosing stage: which of two tasks, in both orders, for pairs that are chosen in rounds; then their utilities.

A choice is a question with two options, so that its records are those of ratings: the same tables of the store, the
same loop, any engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import expit

from prefs.config.choice import ChoiceConfig
from prefs.data.template import Invalid, Template
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec
from prefs.models.types import Conversation, Message, Question, Request, Sampling, as_dicts
from prefs.stages.rate import answers_table, scores_table, thought_seeds
from prefs.stages.records import Completion, conversation
from prefs.statistics import pairs
from prefs.statistics.choices import Choices, exact_logits, sampled_logits
from prefs.statistics.pairs import Pair
from prefs.statistics.utilities import BradleyTerry, Thurstone, Utilities
from prefs.store.keys import digest
from prefs.store.missing import Record, ReplyTable, Unit, Wanted, fill
from prefs.store.table import Store


@dataclass(frozen=True)
class Round:
    """A round of pairs: how many were fitted by its end, and the median standard error of the utilities then."""

    number: int
    pairs: int
    median_se: float


@dataclass(frozen=True, eq=False)
class Chosen:
    """What choosing brought.

    Attributes
    ----------
    completions
        The tasks that could be chosen between, with what was completed, in order; pairs are their numbers.
    choices
        All pairs, those held out among them, in the order in which they were asked.
    mass
        [P, 2 orders, labels, 2], what was on the label of the one shown first and of the second: the mass, or of
        sampled choices the number of answers. NaN: not asked.
    invalid
        Answers that are no choice, by reason.
    utilities
        None where there is no pair to fit.
    """

    config: ChoiceConfig
    completions: Sequence[Completion]
    choices: Choices
    mass: np.ndarray
    invalid: dict[str, int]
    utilities: Utilities | None
    rounds: tuple[Round, ...]
    work: StageCounts


def utility_model(config: ChoiceConfig) -> BradleyTerry | Thurstone:
    """The model of choices that a config wants."""
    utility = config.utility
    if utility.model == "thurstone":
        return Thurstone(position=utility.position)  # type: ignore[arg-type]
    return BradleyTerry(position=utility.position, folds=utility.folds, seed=utility.seed)  # type: ignore[arg-type]


def choose(
    config: ChoiceConfig, completions: Sequence[Completion], chooser: ModelSpec, store: Store, models: Models
) -> Chosen:
    """Have a model choose between tasks, doing only what the store lacks.

    Pairs of a round are chosen by what the rounds before it brought, so that with the same answers in the store the
    same pairs are asked for again.

    Raises
    ------
    UserError
        If the model stops in the middle of a batch; what it has answered is in the store.
    """
    assert config.template is not None
    if config.template.when == "after":
        completions = [completion for completion in completions if completion.text is not None]
    tasks, plan = len(completions), config.pairs
    rng = np.random.default_rng(plan.seed)
    asking = _Asking(config, completions, chooser, store, models)
    asked = pairs.held_out(tasks, plan.holdout, rng)
    # At least half of all pairs there are is left to fit.
    asked = asked[: tasks * (tasks - 1) // 4]
    held_out = len(asked)
    asked += pairs.regular(tasks, tasks * plan.first // 2, asked, rng)
    model, rounds, numbers = utility_model(config), [], [0] * len(asked)
    while True:
        asking.ask(asked, rng)
        choices = asking.choices(asked, held_out, numbers)
        if len(asked) == held_out or not choices.only(~choices.held_out).weight.any():
            utilities = None
            break
        utilities = model.fit(choices)
        median = float(np.nanmedian(utilities.se))
        rounds.append(Round(len(rounds), len(asked) - held_out, median))
        left = tasks * plan.degree // 2 - (len(asked) - held_out)
        if left <= 0 or (plan.stop_se is not None and median <= plan.stop_se):
            break
        count = min(left, max(1, tasks * plan.step // 2))
        new = pairs.select(utilities, count, asked, plan.select, rng)  # type: ignore[arg-type]
        if not new:
            break
        asked += new
        numbers += [len(rounds)] * len(new)
    return Chosen(
        config, completions, choices, asking.mass(asked), asking.invalid(asked), utilities, tuple(rounds), asking.work()
    )


class _Asking:
    """The questions about pairs, in every order and under every pair of labels, and what was answered.

    ``orders`` are those in which a pair is asked: 0 with its first task shown first, 1 with its second.
    """

    def __init__(
        self,
        config: ChoiceConfig,
        completions: Sequence[Completion],
        chooser: ModelSpec,
        store: Store,
        models: Models,
    ) -> None:
        self.config, self.completions, self.chooser = config, completions, chooser
        self.store, self.models = store, models
        self.thinks, self.exact = chooser.thinking is not None, config.kind == "exact"
        self.sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens)
        seeds = tuple(config.seeds)
        if self.exact:
            seeds = thought_seeds((), config.thoughts) if self.thinks else (0,)
        self.seeds = seeds
        self.labels = config.label_pairs
        self.readings = [config.reading(labels) for labels in self.labels]
        assert config.template is not None
        self.template = config.template
        self.opening = chooser.prefill if self.template.opening is None else self.template.opening
        self.kept = [self._table(labels) for labels in self.labels]
        self.orders: dict[Pair, tuple[int, ...]] = {}
        self.keys: dict[tuple[Pair, int, int, int], str] = {}

    def _table(self, labels: tuple[str, str]) -> ReplyTable:
        """Where answers to questions with these labels are kept: beside those of ratings with these options."""
        kept = scores_table if self.exact else answers_table
        return kept(self.store, self.chooser, self._question("", labels), self.sampling)

    def _question(self, text: str, labels: tuple[str, str]) -> Question:
        return Question(text, labels, self.opening, ((), ()))

    def ask(self, asked: Sequence[Pair], rng: np.random.Generator) -> None:
        """Have the pairs answered that were not asked yet."""
        new = [pair for pair in asked if pair not in self.orders]
        for pair in new:
            self.orders[pair] = (0, 1) if self.config.orders == "both" else (int(rng.integers(2)),)
        units = [
            self._unit(pair, order, number)
            for pair in new
            for order in self.orders[pair]
            for number in range(len(self.labels))
        ]
        fill(units, partial(self.models.get, self.chooser), self.chooser.batch_tokens, self.store, label="Choosing")

    def _unit(self, pair: Pair, order: int, number: int) -> Unit:
        request = self.request(pair, order, number)
        kept, records = self.kept[number], []
        for seed in self.seeds:
            turns = as_dicts(request.turns)
            drawn = {"seed": seed} if not self.exact else {"thought": seed} if self.thinks else {}
            key = kept.table.key(messages=turns, **drawn)
            self.keys[pair, order, number, seed] = key
            records.append(Record(kept, key, seed))
        return Unit(digest([as_dicts(request.turns), number]), request, 0, (Wanted(request, tuple(records)),))

    def request(self, pair: Pair, order: int, number: int) -> Request:
        """The question about a pair in an order, under a pair of labels."""
        first, second = (self.completions[task] for task in (pair if order == 0 else pair[::-1]))
        text = self.template.ask(first.task.prompt, second.task.prompt, self.labels[number])
        before: Conversation = ()
        if self.config.system_prompt is not None:
            before = (Message("system", self.config.system_prompt),)
        if self.template.when == "after":
            for completion in (first, second):
                before += conversation(completion.task.prompt, None, completion.text)
        scores, seeds = (self.seeds, ()) if self.exact else ((), self.seeds)
        return Request(before, self._question(text, self.labels[number]), self.sampling, seeds=seeds, scores=scores)

    def mass(self, asked: Sequence[Pair]) -> np.ndarray:
        """[P, 2 orders, labels, 2]; see `Chosen`. After several thoughts the mean of those that ended."""
        mass = np.full((len(asked), 2, len(self.labels), 2), np.nan)
        for row, pair in enumerate(asked):
            for order in self.orders[pair]:
                for number, reading in enumerate(self.readings):
                    mass[row, order, number] = self._answered(pair, order, number, reading)
        return mass

    def _answered(self, pair: Pair, order: int, number: int, reading: Template) -> np.ndarray:
        rows = self._rows(pair, order, number)
        if self.exact:
            known = [row["mass"] for row in rows if row["invalid"] is None]
            return np.mean(known, axis=0) if known else np.full(2, np.nan)
        values = [self._read(row, reading) for row in rows]
        return np.array([values.count(1.0), values.count(0.0)], dtype=float)

    def _rows(self, pair: Pair, order: int, number: int) -> list[dict]:
        table = self.kept[number].table
        return [table.rows[self.keys[pair, order, number, seed]] for seed in self.seeds]

    @staticmethod
    def _read(row: dict, reading: Template) -> float | Invalid:
        if row["invalid"] is not None:
            return Invalid(row["invalid"])
        return reading.read(row["text"], finished=bool(row["finished"]))

    def choices(self, asked: Sequence[Pair], held_out: int, rounds: Sequence[int]) -> Choices:
        """What was answered, as log odds of each pair's first task, averaged over pairs of labels."""
        mass = self.mass(asked)
        logits = exact_logits if self.exact else sampled_logits
        if not self.exact:
            mass = mass.sum(axis=2, keepdims=True)  # answers under several labels are answers
        first = logits(mass[..., 0], mass[..., 1]).mean(axis=2)
        # In the second order it is the pair's second task that is shown first.
        odds = np.stack([first[:, 0], -first[:, 1]], axis=1)
        shares = expit(odds)
        if not self.exact:
            total = mass.sum(axis=3)[..., 0]
            share = np.divide(mass[..., 0, 0], total, out=np.full(total.shape, np.nan), where=total > 0)
            shares = np.stack([share[:, 0], 1 - share[:, 1]], axis=1)
        answers = 1 if self.exact else len(self.seeds) * len(self.labels)
        return Choices(
            tasks=len(self.completions),
            pairs=np.array(asked, dtype=np.int64).reshape(-1, 2),
            p=shares,
            logits=odds,
            valid=mass.sum(axis=3).mean(axis=2) / answers,
            answers=answers,
            held_out=np.arange(len(asked)) < held_out,
            rounds=np.array(rounds, dtype=np.int64),
        )

    def invalid(self, asked: Sequence[Pair]) -> dict[str, int]:
        """Answers that are no choice, by reason."""
        reasons = []
        for pair in asked:
            for order in self.orders[pair]:
                for number, reading in enumerate(self.readings):
                    for row in self._rows(pair, order, number):
                        answer = row["invalid"] and Invalid(row["invalid"]) if self.exact else self._read(row, reading)
                        reasons += [answer.value] if isinstance(answer, Invalid) else []
        return {reason.value: reasons.count(reason.value) for reason in Invalid if reason.value in reasons}

    def work(self) -> StageCounts:
        total, made = len(set(self.keys.values())), sum(len(kept.table.made) for kept in self.kept)
        return StageCounts("choices", total - made, made)
