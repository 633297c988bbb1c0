"""Utilities: the one scale that explains choices between pairs best, with standard errors and reliability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit, log_ndtr, ndtr, xlogy
from scipy.stats import norm

from prefs.statistics.agreement import correlation
from prefs.statistics.choices import Choices
from prefs.statistics.estimates import ROUNDING, Estimate, Floats, Resamples, known_mean

Position = Literal["none", "shared", "task"]

# A task's SD in Thurstone's model, where the typical one is 1: beyond these it says that nothing is known of it.
LEAST_SPREAD, MOST_SPREAD = 0.2, 5.0
MOST_STEPS = 200
NO_HELD_OUT = "no pairs were held out"
SAMPLED_CEILING = "the ceiling needs exact probabilities"


@dataclass(frozen=True, eq=False)
class Utilities:
    """What explains the choices between T tasks.

    Attributes
    ----------
    u
        [T], in log odds (Thurstone: in SDs of a difference); of mean 0 within each component. NaN of a task that was
        never chosen for or against.
    se
        [T], standard errors that allow for what the scale does not explain of each pair (sandwich estimator, clustered
        by pair: Huber 1967, White 1982).
    covariance
        [T, T], the inverse information under the model: how well each difference is known yet.
    position
        By how much being shown first helps, in the units of u.
    component
        [T], tasks that no chain of pairs connects are not on one scale.
    penalty
        The precision of the normal prior on u, by which they are drawn to 0.
    spread
        [T], each task's SD in Thurstone's model; None of Bradley and Terry's.
    """

    u: Floats
    se: Floats
    covariance: Floats
    position: float
    component: np.ndarray
    penalty: float
    spread: Floats | None = None

    @property
    def components(self) -> int:
        """How many pieces the graph of pairs is in, without tasks of which there is no choice."""
        return len(np.unique(self.component[np.isfinite(self.u)]))

    def log_odds(self, pairs: np.ndarray) -> Floats:
        """[P] the preferences that they predict for pairs [P, 2]; NaN where one has no utility."""
        a, b = pairs.T
        difference = self.u[a] - self.u[b]
        if self.spread is None:
            return difference
        z = difference / np.hypot(self.spread[a], self.spread[b])
        return log_ndtr(z) - log_ndtr(-z)


@dataclass(frozen=True)
class BradleyTerry:
    """The model P(a) = σ(u_a - u_b + s·position), s = 1 where a is shown first and -1 where second: Bradley and Terry
    (1952), with the order effect of Davidson and Beaver (1977), fitted to soft targets by penalised likelihood.

    Of exact choices in both orders every pair's own bias is known. They are fitted by their preferences, which no
    position, of whatever size and on whichever pairs, can move; the position is then the mean bias.

    Attributes
    ----------
    position
        ``none``; ``shared``: one number; ``task``: also one for each task, added for both of a pair.
    penalties
        Precisions of the prior on u to choose from, by the log-loss on folds of the pairs.
    folds, seed
        How many, and what shares pairs out.
    """

    position: Position = "shared"
    penalties: tuple[float, ...] = tuple(np.logspace(-3, 1, 7))
    folds: int = 5
    seed: int = 0

    def fit(self, choices: Choices, penalty: float | None = None) -> Utilities:
        """Fit to the pairs that are not held out; by a penalty, or the one that predicts left-out folds best."""
        choices = choices.only(~choices.held_out)
        if choices.answers == 1 and np.isfinite(choices.preference[choices.weight.any(axis=1)]).all():
            position = float(np.nanmean(choices.bias)) if self.position != "none" and choices.weight.any() else 0.0
            alike = replace(self, position="none")._fit(choices.without_order(), penalty)
            return replace(alike, position=position)
        return self._fit(choices, penalty)

    def _fit(self, choices: Choices, penalty: float | None) -> Utilities:
        weight, design = choices.weight, _design(choices, self.position)
        targets = np.nan_to_num(choices.p)
        if penalty is None:
            penalty = self._chosen(design, targets, weight)
        beta = _fitted(design, targets, weight, penalty, np.zeros(design.tasks + design.terms))
        return _utilities(design, targets, weight, penalty, beta, choices)

    def _chosen(self, design: _Design, targets: Floats, weight: Floats) -> float:
        """The penalty of least log-loss; the middle one where there are too few pairs to tell."""
        if len(self.penalties) == 1 or len(targets) < 2 * self.folds:
            return self.penalties[len(self.penalties) // 2]
        fold = np.random.default_rng(self.seed).permutation(len(targets)) % self.folds
        losses = np.zeros(len(self.penalties))
        for number in range(self.folds):
            beta = np.zeros(design.tasks + design.terms)
            training, testing = (np.where((fold == number)[:, None] == out, weight, 0.0) for out in (False, True))
            # From the strongest to the weakest, each from where the last one ended.
            for index in np.argsort(self.penalties)[::-1]:
                beta = _fitted(design, targets, training, self.penalties[index], beta, tolerance=1e-2)
                losses[index] += _loss(design.odds(beta), targets, testing)
        return self.penalties[int(losses.argmin())]


@dataclass(frozen=True)
class Thurstone:
    """The model P(a) = Φ((u_a - u_b + s·position) / √(σ_a² + σ_b²)): Thurstone (1927), Case III, with a task's own SD
    within bounds, and a normal prior on u of SD 1/√penalty, which sets the unit.

    Standard errors take the SDs as known.
    """

    penalty: float = 1e-2
    position: Position = "shared"

    def fit(self, choices: Choices, penalty: float | None = None) -> Utilities:
        """Fit to the pairs that are not held out."""
        choices = choices.only(~choices.held_out)
        weight, penalty = choices.weight, self.penalty if penalty is None else penalty
        design = _design(choices, "none" if self.position == "none" else "shared")
        targets = np.nan_to_num(choices.p)
        a, b = choices.pairs.T
        size = design.tasks + design.terms

        def loss(parameters: Floats) -> tuple[float, Floats]:
            beta, log_spread = parameters[:size], parameters[size:]
            spread = np.exp(2 * log_spread)
            scale = np.sqrt(spread[a] + spread[b])[:, None]
            z = design.odds(beta) / scale
            up, down = log_ndtr(z), log_ndtr(-z)
            value = -(weight * (targets * up + (1 - targets) * down)).sum()
            density = norm.logpdf(z)
            slope = -weight * (targets * np.exp(density - up) - (1 - targets) * np.exp(density - down))
            gradient = design.gradient(slope / scale)
            # dz/dlog σ_a = -z σ_a² / scale².
            share = -(slope * z).sum(axis=1) / scale[:, 0] ** 2
            by_spread = np.bincount(a, share * spread[a], design.tasks) + np.bincount(
                b, share * spread[b], design.tasks
            )
            prior = penalty * np.r_[beta[: design.tasks], np.zeros(design.terms)]
            value += 0.5 * penalty * (beta[: design.tasks] ** 2).sum() + 0.5 * (log_spread**2).sum()
            return value, np.r_[gradient + prior, by_spread + log_spread]

        bounds = [(None, None)] * size + [(np.log(LEAST_SPREAD), np.log(MOST_SPREAD))] * design.tasks
        found = minimize(
            loss,
            np.zeros(size + design.tasks),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-13, "gtol": 1e-8},
        ).x
        beta, spread = found[:size], np.exp(found[size:])
        scale = np.hypot(spread[a], spread[b])[:, None]
        z = design.odds(beta) / scale
        p = ndtr(z)
        density = norm.pdf(z)
        per = np.divide(density, p * (1 - p), out=np.zeros_like(p), where=(p > 0) & (p < 1)) / scale
        information = weight * density * per / scale
        return replace(
            _spread_of(design, information, weight * per * (p - targets), penalty, beta, choices), spread=spread
        )


@dataclass(frozen=True, eq=False)
class _Design:
    """Log odds from parameters: [u of T tasks, position terms]; `rows` [2 P, T + terms], first orders then seconds."""

    tasks: int
    terms: int
    rows: sparse.csr_array
    transposed: sparse.csr_array

    def odds(self, beta: Floats) -> Floats:
        """[P, 2]."""
        return (self.rows @ beta).reshape(2, -1).T

    def gradient(self, slope: Floats) -> Floats:
        """[T + terms] of slopes [P, 2]."""
        return self.transposed @ slope.T.ravel()

    @property
    def penalised(self) -> Floats:
        """[T + terms] bool: all but a shared position."""
        return np.r_[np.ones(self.tasks), np.zeros(min(1, self.terms)), np.ones(max(0, self.terms - 1))]


def _design(choices: Choices, position: Position) -> _Design:
    tasks, count = choices.tasks, len(choices.pairs)
    terms = {"none": 0, "shared": 1, "task": 1 + tasks}[position]
    row = np.arange(count)
    a, b = choices.pairs.T
    parts = [(row, a, np.ones(count)), (row, b, -np.ones(count))]
    orders = []
    for sign in (1.0, -1.0):
        placed = list(parts)
        if terms:
            placed.append((row, np.full(count, tasks), np.full(count, sign)))
        if terms > 1:
            placed += [(row, tasks + 1 + task, np.full(count, sign)) for task in (a, b)]
        rows, columns, values = (np.concatenate(part) for part in zip(*placed, strict=True))
        orders.append(sparse.csr_array((values, (rows, columns)), shape=(count, tasks + terms)))
    whole = sparse.csr_array(sparse.vstack(orders))
    return _Design(tasks, terms, whole, sparse.csr_array(whole.T))


def _loss(odds: Floats, targets: Floats, weight: Floats) -> float:
    """Log-loss of soft targets, in nats."""
    return float((weight * (np.logaddexp(0, odds) - targets * odds)).sum())


def _fitted(
    design: _Design, targets: Floats, weight: Floats, penalty: float, start: Floats, tolerance: float = 1e-6
) -> Floats:
    """Parameters of least penalised log-loss: a convex problem, solved by Newton's method with conjugate gradients,
    until no derivative by a parameter is beyond `tolerance`."""
    pull, beta = penalty * design.penalised, start
    size = len(start)

    def loss(beta: Floats) -> float:
        return _loss(design.odds(beta), targets, weight) + 0.5 * float((pull * beta**2).sum())

    value = loss(beta)
    for _ in range(MOST_STEPS):
        p = expit(design.odds(beta))
        gradient = design.gradient(weight * (p - targets)) + pull * beta
        if np.abs(gradient).max(initial=0.0) <= tolerance:
            break
        information = weight * p * (1 - p)
        curvature = LinearOperator(
            (size, size), lambda by, own=information: design.gradient(own * design.odds(by)) + pull * by
        )
        step, _ = cg(curvature, -gradient, rtol=0.1, maxiter=size)
        # Far from the solution a whole step may go too far.
        while (next_value := loss(beta + step)) > value and np.abs(step).max() > ROUNDING:
            step = step / 2
        beta, value = beta + step, next_value
    return beta


def _utilities(
    design: _Design, targets: Floats, weight: Floats, penalty: float, beta: Floats, choices: Choices
) -> Utilities:
    p = expit(design.odds(beta))
    return _spread_of(design, weight * p * (1 - p), weight * (p - targets), penalty, beta, choices)


def _spread_of(
    design: _Design, information: Floats, residual: Floats, penalty: float, beta: Floats, choices: Choices
) -> Utilities:
    """Utilities with their standard errors, from each choice's information and score residual, [P, 2]."""
    tasks, rows = design.tasks, design.rows
    weighed = sparse.csr_array(rows * information.T.ravel()[:, None])
    # A position term of next to no information would make it singular.
    pull = np.where(design.penalised > 0, penalty, 1e-9)
    curvature = sparse.csr_array(design.transposed @ weighed).todense() + np.diag(pull)
    inverse = np.linalg.inv(curvature)
    count = len(choices.pairs)
    score = rows[:count] * residual[:, :1] + rows[count:] * residual[:, 1:]
    score = sparse.csr_array(score)
    se = np.sqrt(np.maximum((inverse * (sparse.csr_array(score.T @ score) @ inverse)).sum(axis=0), 0.0)[:tasks])
    used = choices.weight.any(axis=1)
    a, b = choices.pairs[used].T
    known = np.zeros(tasks, dtype=bool)
    known[choices.pairs[used].ravel()] = True
    graph = sparse.csr_array((np.ones(len(a)), (a, b)), shape=(tasks, tasks))
    _, component = connected_components(graph, directed=False)
    u = beta[:tasks] - _means(beta[:tasks], component)
    shared = float(beta[tasks]) if design.terms else 0.0
    return Utilities(
        u=np.where(known, u, np.nan),
        se=np.where(known, se, np.nan),
        covariance=inverse[:tasks, :tasks],
        position=shared,
        component=component,
        penalty=penalty,
    )


def _means(values: Floats, group: np.ndarray) -> Floats:
    return (np.bincount(group, values) / np.bincount(group))[group]


def split_half(
    choices: Choices, model: BradleyTerry | Thurstone, penalty: float, splits: int = 10, seed: int = 0
) -> list[tuple[Floats, Floats]]:
    """Utilities [T] of each half of the fitted pairs, for so many ways of halving them; see `reliability`."""
    rng = np.random.default_rng(seed)
    fitted = np.flatnonzero(~choices.held_out)
    halves = []
    for _ in range(splits):
        mixed = rng.permutation(fitted)
        both = (choices.only(mixed[: len(mixed) // 2]), choices.only(mixed[len(mixed) // 2 :]))
        halves.append(tuple(model.fit(half, penalty).u for half in both))
    return halves


def reliability(halves: Sequence[tuple[Floats, Floats]], tasks: np.ndarray, draws: Resamples | None = None) -> Estimate:
    """The reliability of the utilities of some tasks: r between halves, stepped up to all pairs, 2r / (1 + r)
    (Spearman 1910, Brown 1910), mean over the ways of halving; the interval is a bootstrap over tasks."""
    estimates = [correlation(first[tasks], second[tasks], draws) for first, second in halves]
    defined = [estimate for estimate in estimates if estimate.value is not None]
    if not defined:
        return estimates[0] if estimates else Estimate.missing("no pairs to halve", len(tasks))

    def mean(values: list[float | None]) -> float | None:
        known = [_stepped_up(value) for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Estimate(
        mean([estimate.value for estimate in defined]),
        mean([estimate.low for estimate in defined]),
        mean([estimate.high for estimate in defined]),
        defined[0].n,
    )


def _stepped_up(r: float) -> float:
    """To twice the length. What disagrees would not do so more with more of it."""
    return 2 * r / (1 + r) if r > 0 else r


@dataclass(frozen=True)
class HeldOut:
    """How well utilities predict pairs that they were not fitted to, both orders of a pair taken together.

    Attributes
    ----------
    accuracy, log_loss
        Mean probability of the task that is predicted to be preferred; mean log-loss, in nats.
    most_accurate, least_log_loss
        What they would be if every pair's own preference were known: no scale does better.
    residual
        SD of the preferences around what the utilities predict, in log odds.
    """

    accuracy: Estimate
    most_accurate: Estimate
    log_loss: Estimate
    least_log_loss: Estimate
    residual: Estimate


def held_out(choices: Choices, utilities: Utilities, draws: Resamples | None = None) -> HeldOut:
    """Predict the held-out pairs of choices; intervals are bootstraps over them, by resamples of them."""
    left_out = choices.only(choices.held_out)
    count = len(left_out.pairs)
    if not count:
        return HeldOut(*[Estimate.missing(NO_HELD_OUT, 0)] * 5)
    draws = draws or Resamples.none(count)
    wanted, predicted = left_out.preference, utilities.log_odds(left_out.pairs)
    unknown = ~np.isfinite(predicted)
    predicted = np.where(unknown, 0.0, predicted)
    p = expit(wanted)
    loss = np.logaddexp(0, predicted) - p * predicted
    residual = known_mean(np.where(unknown, np.nan, (wanted - predicted) ** 2), draws, NO_HELD_OUT).map(np.sqrt)
    ceilings = [np.maximum(p, 1 - p), -(xlogy(p, p) + xlogy(1 - p, 1 - p))]
    best = [known_mean(np.where(unknown, np.nan, ceiling), draws, NO_HELD_OUT) for ceiling in ceilings]
    if choices.answers > 1:
        best = [Estimate.missing(SAMPLED_CEILING, count)] * 2
    return HeldOut(
        accuracy=preferred(wanted, np.where(unknown, np.nan, predicted), draws),
        most_accurate=best[0],
        log_loss=known_mean(np.where(unknown, np.nan, loss), draws, NO_HELD_OUT),
        least_log_loss=best[1],
        residual=residual,
    )


def preferred(preference: Floats, predicted: Floats, draws: Resamples | None = None) -> Estimate:
    """Mean probability of the task that is predicted to be preferred, from preferences and predictions of them [P] in
    log odds; NaN in either: left out. A prediction of 0 is half right."""
    p = expit(preference)
    right = np.where(predicted == 0, 0.5, np.where(predicted > 0, p, 1 - p))
    right[~np.isfinite(predicted)] = np.nan
    return known_mean(right, draws or Resamples.none(len(p)), NO_HELD_OUT)
