"""One question under many steerings ("doses"): what they do not change is run once for all of them.

Tokens before the first that a dose steers are run unsteered. From there on, the blocks up to the steered layer are run
once, unsteered, and for each dose only those above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from prefs.data.template import Invalid
from prefs.models.local.passes import Kept, Passes
from prefs.models.local.residuals import Hook
from prefs.models.local.state import State
from prefs.models.local.steering import Steered, places_of_answer
from prefs.models.options import Asked
from prefs.models.types import Answer, Ask, Dosed, Sample, Score, Steering

# What `Steering.at` names, by where it begins: in this order in every row.
BEGINNINGS = ("all", "completion", "question", "last")
# Bounds the logits in memory while a completion's likelihood is read.
TOKENS_AT_ONCE = 256

# Answers of some rows (by number) from their state and the logits of their last tokens.
Read = Callable[[State, torch.Tensor, Sequence[int]], list[Answer]]
Dose = tuple[Steering, ...]


def active(steering: Sequence[Steering]) -> Dose:
    """What of a dose changes anything; none of it is the unsteered model."""
    return tuple(each for each in steering if each.coefficient != 0)


class Likelihood:
    """Keeps, as a pass goes by, what the completions' tokens are predicted from, and sums up how likely they were.

    Parameters
    ----------
    passes
        Of the model.
    asked
        The rows.
    starts, ends
        The tokens [start, end) of each row that the pass runs.
    """

    stops = False

    def __init__(self, passes: Passes, asked: Sequence[Asked], starts: Sequence[int], ends: Sequence[int]):
        self._passes = passes
        self._rows = len(asked)
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        places: list[tuple[int, int, int]] = []  # row, column, the token that comes next
        for at, (row, start, end) in enumerate(zip(asked, starts, ends, strict=True)):
            first, last = _predicting(row)
            offset = width - end
            places += [(at, offset + token, row.ids[token + 1]) for token in range(max(first, start), min(last, end))]
        self._places = torch.tensor(places, dtype=torch.long).reshape(-1, 3)
        self._kept = torch.empty(0)

    def hooks(self) -> list[tuple[int, Hook]]:
        return [(self._passes.n_layers - 1, self._keep)] if len(self._places) else []

    def _keep(self, tensor: torch.Tensor, hook: Any) -> None:
        rows, columns, _ = self._places.to(tensor.device).unbind(dim=1)
        self._kept = tensor[rows, columns]

    def sums(self) -> torch.Tensor:
        """[rows] sum of the tokens' log-likelihoods, in nats, on the host."""
        rows, _, tokens = self._places.unbind(dim=1)
        found = [torch.empty(0, dtype=torch.float64)]
        for hidden, following in zip(self._kept.split(TOKENS_AT_ONCE), tokens.split(TOKENS_AT_ONCE), strict=False):
            if len(following):
                logits = self._passes.logits(hidden).float()
                found.append(-cross_entropy(logits, following.to(logits.device), reduction="none").double().cpu())
        return torch.zeros(self._rows, dtype=torch.float64).index_add(0, rows, torch.cat(found))


def _predicting(asked: Asked) -> tuple[int, int]:
    """Token range that the completion's tokens are predicted from: each by the one before it."""
    start, end = asked.spans[-2]
    return max(start - 1, 0), max(end - 1, 0)


def mean_nll(asked: Sequence[Asked], sums: torch.Tensor) -> list[float | None]:
    """Mean negative log-likelihood a token of each row's completion; None if it is empty or that is not finite."""
    found: list[float | None] = []
    for row, total in zip(asked, sums, strict=True):
        first, last = _predicting(row)
        found.append(-float(total) / (last - first) if last > first and bool(total.isfinite()) else None)
    return found


def likelihood_alone(passes: Passes, asked: Asked, dose: Dose) -> float | None:
    """The likelihood of one completion by passes of its own, which any family runs; see `mean_nll`."""
    first, last = _predicting(asked)
    steered = Steered.of(dose, [places_of_answer(asked)], passes.device)
    state, logits = passes.start([asked.ids[: first + 1]], steered)
    total = torch.zeros(1, dtype=torch.float64)
    for token in range(first, last, TOKENS_AT_ONCE):
        following = asked.ids[token + 1 : min(token + TOKENS_AT_ONCE, last) + 1]
        state, after = passes.extend(state, [following], keep=len(following))
        logits = torch.cat([logits, after], dim=1)
        tokens = torch.tensor(following, device=logits.device)
        total -= cross_entropy(logits[0, :-1].float(), tokens, reduction="sum").double().cpu()
        logits = logits[:, -1:]
    return mean_nll([asked], total)[0]


def invalid(question: Ask) -> Answer:
    """The answer of a model whose logits are not finite."""
    reason = Invalid.not_finite.value
    return Answer(
        dict.fromkeys(question.scores, Score(None, invalid=reason)),
        dict.fromkeys(question.seeds, Sample(None, 0, True, invalid=reason)),
    )


def finite(question: Ask, answer: Answer) -> bool:
    """Whether all scored masses are numbers."""
    masses = [score.mass for score in answer.scores.values() if score.mass is not None]
    return all(mass == mass for of_score in masses for mass in of_score)


@dataclass(frozen=True)
class DoseResponse:
    """A question put to a batch, to be answered under doses.

    ``read`` reads answers; ``likelihood`` whether the completions' likelihood is wanted.
    """

    passes: Passes
    question: Ask
    asked: Sequence[Asked]
    read: Read
    likelihood: bool

    def under(self, doses: Sequence[Dose]) -> list[list[Dosed]]:
        """[doses][rows]."""
        found: dict[int, list[Dosed]] = {}
        state, done = self.passes.nothing(len(self.asked)), [0] * len(self.asked)
        before = torch.zeros(len(self.asked), dtype=torch.float64)
        for beginning, group in by_beginning(doses).items():
            starts = cut(self.asked, beginning)
            state, predicted = self._unsteered(state, done, starts)
            before, done = before + predicted, starts
            found |= self._group({at: doses[at] for at in group}, state, starts, before)
        return [found[at] for at in range(len(doses))]

    def _unsteered(self, state: State, starts: Sequence[int], ends: Sequence[int]) -> tuple[State, torch.Tensor]:
        """Run the tokens [start, end) of each row; the state after them, and the sums of `Likelihood`."""
        pieces = [row.ids[start:end] for row, start, end in zip(self.asked, starts, ends, strict=True)]
        if not any(pieces):
            return state, torch.zeros(len(pieces), dtype=torch.float64)
        watching = self._watching(starts, ends)
        state, _ = self.passes.extend(state, pieces, watchers=watching)
        return state, self._sums(watching)

    def _group(
        self, doses: dict[int, Dose], state: State, starts: Sequence[int], before: torch.Tensor
    ) -> dict[int, list[Dosed]]:
        """Doses that steer nothing before `starts`, where the state has been run to.

        ``before`` [rows] is the sum of log-likelihoods up to there.
        """
        rest = [row.ids[start:] for row, start in zip(self.asked, starts, strict=True)]
        ends = [len(row.ids) for row in self.asked]
        plain = [at for at, dose in doses.items() if not dose]
        kept = Kept([lowest(dose) for dose in doses.values() if dose], stops=not plain)
        watching = self._watching(starts, ends) if plain else []
        below, logits = self.passes.extend(state.fork(), rest, watchers=[kept, *watching])
        found: dict[int, list[Dosed]] = {}
        if plain:
            found = dict.fromkeys(plain, self._answers(below, logits, before + self._sums(watching)))
        for at, dose in doses.items():
            if dose:
                steered = Steered.of(dose, [places_of_answer(row) for row in self.asked], self.passes.device)
                layer, watching = lowest(dose), self._watching(starts, ends)
                after, logits = self.passes.extend_above(
                    layer, kept.after[layer], below, replace(state.fork(), steered=steered), rest, watching
                )
                found[at] = self._answers(after, logits, before + self._sums(watching))
        return found

    def _watching(self, starts: Sequence[int], ends: Sequence[int]) -> list[Likelihood]:
        return [Likelihood(self.passes, self.asked, starts, ends)] if self.likelihood else []

    def _sums(self, watching: Sequence[Likelihood]) -> torch.Tensor:
        return sum((each.sums() for each in watching), torch.zeros(len(self.asked), dtype=torch.float64))

    def _answers(self, state: State, logits: torch.Tensor, sums: torch.Tensor) -> list[Dosed]:
        rows = finite_rows(logits)
        answers = {}
        if rows:
            read = self.read(state.select(self.passes.tensor(rows)), logits[rows], rows)
            answers = dict(zip(rows, read, strict=True))
        nll = mean_nll(self.asked, sums) if self.likelihood else [None] * len(self.asked)
        return [dosed(self.question, answers.get(row), nll[row]) for row in range(len(self.asked))]


def finite_rows(logits: torch.Tensor) -> list[int]:
    """The rows whose logits of the last token give probabilities. -inf for some tokens does."""
    nan = logits[:, -1].float().log_softmax(dim=-1).isnan().any(dim=-1)
    return (~nan).nonzero()[:, 0].tolist()


def dosed(question: Ask, answer: Answer | None, nll: float | None) -> Dosed:
    """What a row brought; with the reason in place of numbers where it has no answer, or one that is no number."""
    if answer is None or not finite(question, answer):
        return Dosed(invalid(question))
    return Dosed(answer, nll)


def lowest(dose: Dose) -> int:
    """The lowest layer that a dose steers at."""
    return min(each.layer for each in dose)


def cut(asked: Sequence[Asked], beginning: str) -> list[int]:
    """The first token of each row that is run for every dose: none that is steered lies before it.

    Rows end in the same column, and are cut in the same one: padding between a row's tokens would take up room in a
    sliding window.
    """
    firsts = [min(places_of_answer(row)[beginning][0], len(row.ids) - 1) for row in asked]
    width = max(len(row.ids) - first for row, first in zip(asked, firsts, strict=True))
    return [max(len(row.ids) - width, 0) for row in asked]


def by_beginning(doses: Sequence[Dose]) -> dict[str, list[int]]:
    """The numbers of the doses by where they begin to steer, in the order of the tokens.

    The unsteered model can be run from anywhere: it goes with those that leave the least to be run.
    """
    found: dict[str, list[int]] = {}
    for beginning in BEGINNINGS:
        group = [
            at for at, dose in enumerate(doses) if dose and min(map(_beginning, dose)) == BEGINNINGS.index(beginning)
        ]
        if group:
            found[beginning] = group
    plain = [at for at, dose in enumerate(doses) if not dose]
    if plain:
        latest = next(reversed(found), BEGINNINGS[-1])
        found[latest] = [*found.get(latest, []), *plain]
    return found


def _beginning(steering: Steering) -> int:
    return BEGINNINGS.index(steering.at)
