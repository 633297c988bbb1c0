"""Which pairs of tasks to ask for: a regular graph to begin with, then what tells most about the utilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from scipy.special import expit

from prefs.statistics.utilities import Utilities

Selection = Literal["information", "random", "close"]
Pair = tuple[int, int]

# Pairs that are looked at in a round, where there are more.
MOST_CANDIDATES = 2_000_000


def regular(tasks: int, count: int, asked: Iterable[Pair], rng: np.random.Generator) -> list[Pair]:
    """So many new pairs at random, evenly over tasks: the edges of circles through all of them. A pair already asked is
    left out, and there are fewer pairs where next to all have been asked."""
    known = {_ordered(pair) for pair in asked}
    chosen: list[Pair] = []
    for _ in range(2 * tasks):
        circle = rng.permutation(tasks)
        for pair in zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True):
            if len(chosen) >= count:
                return chosen
            pair = _ordered(pair)
            if pair[0] != pair[1] and pair not in known:
                known.add(pair)
                chosen.append(pair)
    return chosen


def held_out(tasks: int, count: int, rng: np.random.Generator) -> list[Pair]:
    """So many different pairs, uniform over all there are; all of them where there are fewer."""
    total = tasks * (tasks - 1) // 2
    drawn = rng.choice(total, size=min(count, total), replace=False) if total else np.empty(0, dtype=int)
    return [_numbered(int(number)) for number in np.sort(drawn)]


def select(
    utilities: Utilities, count: int, asked: Iterable[Pair], how: Selection, rng: np.random.Generator
) -> list[Pair]:
    """So many new pairs for a round, of no task more than twice its share of them.

    By ``information``: those of the largest log(1 + p (1 - p) Var(u_a - u_b)) under the current fit (the D-optimal step
    of a logistic model: Chaloner and Verdinelli 1995, section 6). ``close``: those whose utilities are closest.
    ``random``: `regular`.
    """
    tasks = len(utilities.u)
    if how == "random":
        return regular(tasks, count, asked, rng)
    known = {_ordered(pair) for pair in asked}
    a, b = _candidates(tasks, rng)
    u = np.nan_to_num(utilities.u)
    difference = u[a] - u[b]
    if how == "close":
        worth = -np.abs(difference)
    else:
        own = np.diag(utilities.covariance)
        p = expit(difference)
        worth = np.log1p(p * (1 - p) * (own[a] + own[b] - 2 * utilities.covariance[a, b]))
    left = np.full(tasks, -(-4 * count // tasks))
    chosen: list[Pair] = []
    # What is equally good is taken in random order.
    for number in np.lexsort((rng.random(len(a)), -worth)):
        if len(chosen) >= count:
            break
        pair = (int(a[number]), int(b[number]))
        if left[pair[0]] and left[pair[1]] and pair not in known:
            left[list(pair)] -= 1
            chosen.append(pair)
    return chosen


def _candidates(tasks: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    total = tasks * (tasks - 1) // 2
    if total <= MOST_CANDIDATES:
        b, a = np.tril_indices(tasks, -1)
        return a, b
    drawn = np.unique(rng.integers(0, tasks, size=(MOST_CANDIDATES, 2)), axis=0)
    drawn = np.unique(np.sort(drawn[drawn[:, 0] != drawn[:, 1]], axis=1), axis=0)
    return drawn[:, 0], drawn[:, 1]


def _numbered(number: int) -> Pair:
    """The pair of a number: 0 is (0, 1), 1 is (0, 2), 2 is (1, 2), ..."""
    b = int((1 + np.sqrt(1 + 8 * number)) // 2)
    b -= b * (b - 1) // 2 > number
    return number - b * (b - 1) // 2, b


def _ordered(pair: Pair) -> Pair:
    a, b = int(pair[0]), int(pair[1])
    return (a, b) if a < b else (b, a)
