"""Choices between pairs of tasks, asked in both orders: which is preferred, and what only follows the order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import expit, logit

from prefs.statistics.estimates import Booleans, Estimate, Floats, Resamples, known_mean, pearson_of_sums, resampling

Integers = NDArray[np.int64]

NO_PAIRS = "no pair with a choice in both orders"
FEW_PAIRS = "fewer than 3 pairs with a choice in both orders"
NO_TRIADS = "no three tasks of which all pairs were chosen between"


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices between P pairs of T tasks.

    Attributes
    ----------
    tasks
        T.
    pairs
        [P, 2] numbers of the tasks: a and b.
    p
        [P, 2], how much of the choice is a: where a is shown first, and where it is shown second. NaN: not asked, or
        not answered with either.
    logits
        [P, 2], the log odds of the same, always finite: of sampled choices those of `sampled_logits`.
    valid
        [P, 2], how much of the answer was a choice at all: the mass of both labels, or the share of sampled answers.
        What is not, refusals among it, is never a win of either.
    answers
        How many answers each of these rests on; 1 of exact ones.
    held_out
        [P] bool, the pairs that utilities are not fitted to.
    rounds
        [P], in which round each pair was asked.
    """

    tasks: int
    pairs: Integers
    p: Floats
    logits: Floats
    valid: Floats
    answers: int
    held_out: Booleans
    rounds: Integers

    def only(self, rows: Booleans | Integers) -> Choices:
        """These pairs: by number, or where True."""
        return Choices(
            self.tasks,
            self.pairs[rows],
            self.p[rows],
            self.logits[rows],
            self.valid[rows],
            self.answers,
            self.held_out[rows],
            self.rounds[rows],
        )

    @property
    def preference(self) -> Floats:
        """[P] ½ (logit p of a shown first + logit p of a shown second): what does not depend on the order. NaN where an
        order is missing."""
        return self.logits.sum(axis=1) / 2

    @property
    def bias(self) -> Floats:
        """[P] ½ (logit p of a shown first - logit p of a shown second): by how much being first helps. NaN where an
        order is missing."""
        return (self.logits[:, 0] - self.logits[:, 1]) / 2

    def without_order(self) -> Choices:
        """As if each pair's task had been preferred by as much in either order."""
        logits = np.repeat(self.preference[:, None], 2, axis=1)
        return replace(self, p=expit(logits), logits=logits)

    @property
    def weight(self) -> Floats:
        """[P, 2] valid answers that a choice stands for, 0 where there is none.

        Of a pair asked in both orders the mean of both: else a refusal in one order would let the other, and with it
        the position, count for more.
        """
        known = np.isfinite(self.p)
        weight = np.where(known, self.answers * np.nan_to_num(self.valid), 0.0)
        both = known.all(axis=1, keepdims=True)
        return np.where(both, weight.mean(axis=1, keepdims=True), weight)


@dataclass(frozen=True)
class Consistency:
    """How choices depend on the order in which tasks are shown.

    Attributes
    ----------
    first
        Mean probability that the task shown first is chosen.
    consistent
        Share of pairs whose likelier task is the same in both orders.
    between_orders
        Pearson r over pairs of a's log odds in one order and in the other, each pair counted as (a, b) and as (b, a): a
        position bias that is the same for all pairs leaves it alone.
    bias
        Mean position bias, in log odds.
    valid
        Mean valid mass.
    """

    first: Estimate
    consistent: Estimate
    between_orders: Estimate
    bias: Estimate
    valid: Estimate


def consistency(choices: Choices, draws: Resamples | None = None) -> Consistency:
    """How much of the choices the order decides; intervals are bootstraps over pairs, by resamples of them."""
    count = len(choices.pairs)
    draws = resampling(draws, count)
    x, y = choices.logits.T
    both = np.isfinite(choices.p).all(axis=1)
    same = np.where(both, (np.sign(x) == np.sign(y)) & (x != 0), np.nan)
    shown = np.column_stack([choices.p[:, 0], 1 - choices.p[:, 1]])
    answered = np.isfinite(shown)
    first = np.divide(
        np.nansum(shown, axis=1), answered.sum(axis=1), out=np.full(count, np.nan), where=answered.any(axis=1)
    )
    n = int(both.sum())
    if n < 3:
        r = Estimate.missing(FEW_PAIRS, n)
    else:
        x, y = np.where(both, x, 0.0), np.where(both, y, 0.0)
        # Both orientations of a pair: (x, y) and (-y, -x).
        total, sum_x, squares, products = draws.totals(np.where(both, 2.0, 0.0), x - y, x**2 + y**2, 2 * x * y)
        r = Estimate.of(
            pearson_of_sums(total, sum_x, -sum_x, squares, squares, products), n, "all pairs have the same log odds"
        )
    return Consistency(
        first=known_mean(first, draws, NO_PAIRS),
        consistent=known_mean(same, draws, NO_PAIRS),
        between_orders=r,
        bias=known_mean(choices.bias, draws, NO_PAIRS),
        valid=known_mean(choices.valid.mean(axis=1), draws, NO_PAIRS),
    )


@dataclass(frozen=True)
class Triads:
    """Triads of tasks of which all three pairs were chosen between, and how many of them run in a circle."""

    measured: int
    cyclic: int


def triads(choices: Choices) -> Triads:
    """Count circles of three, by the sign of the preference; a pair without one is no edge."""
    preference = choices.preference
    known = np.isfinite(preference) & (preference != 0)
    a, b = choices.pairs[known].T
    wins = preference[known] > 0
    shape = (choices.tasks, choices.tasks)
    beats = sparse.csr_array((np.ones(len(a)), (np.where(wins, a, b), np.where(wins, b, a))), shape=shape)
    beats.data[:] = 1.0
    edges = beats + beats.T
    return Triads(_closed_walks(edges) // 6, _closed_walks(beats) // 3)


def _closed_walks(edges: sparse.csr_array) -> int:
    """The trace of the cube: walks of three steps that end where they began."""
    return round(float(((edges @ edges) * edges.T).sum()))


def sampled_logits(chose_a: Floats, chose_b: Floats) -> Floats:
    """Log odds from counts, each with half an answer added, so that none is infinite (Haldane 1956, Anscombe 1956); NaN
    where both are 0."""
    return np.where(chose_a + chose_b > 0, np.log((chose_a + 0.5) / (chose_b + 0.5)), np.nan)


def exact_logits(first: Floats, second: Floats) -> Floats:
    """Log odds of two masses; NaN where neither has any. One without mass is as far off as float64 can tell."""
    total = first + second
    p = np.divide(first, total, out=np.full(np.shape(total), np.nan), where=total > 0)
    return logit(np.clip(p, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg))
