"""Where the noise of ratings comes from: a random-effects analysis of variance over the facets of a rating.

Generalizability theory (Cronbach, Gleser, Nanda & Rajaratnam 1972, "The Dependability of Behavioral Measurements";
Brennan 2001, "Generalizability Theory"). A rating has five facets: task t, template m, rater r, completion seed c and
rating seed s. Every template and rater rates the same completions, so c is crossed with m and r; but seed 0 of one task
has nothing in common with seed 0 of another, so c is nested in t. The rating seed is nested in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import MIN_TASKS, NO_VARIANCE, ROUNDING, Estimate, Floats, Resamples, ratio, resampling

Effect = frozenset[str]

# The axes of ratings, in order.
FACETS = {"t": "task", "c": "completion seed", "m": "template", "r": "rater"}
# The effects in reading order, in which each comes after those it contains. Nested in tasks, c occurs only with t.
EFFECTS: dict[Effect, str] = {
    frozenset("t"): "task",
    frozenset("m"): "template",
    frozenset("r"): "rater",
    frozenset("tm"): "task × template",
    frozenset("tr"): "task × rater",
    frozenset("mr"): "template × rater",
    frozenset("tmr"): "task × template × rater",
    frozenset("tc"): "completion",
    frozenset("tcm"): "completion × template",
    frozenset("tcr"): "completion × rater",
    frozenset("tcmr"): "completion × template × rater",
}
RATING_SEED = "rating seed"
FEW_COMPLETE = "fewer than 3 tasks with all their ratings"
NO_SAMPLING = "sampling variance not known"
PARTLY_KNOWN = "sampling variance known in part only"


@dataclass(frozen=True)
class Component:
    """What one effect adds to the variance of a rating.

    Attributes
    ----------
    name
        Of the effect, such as "task × template".
    variance
        Its variance component, in squared units of the ratings: negative where the estimate is.
    share
        Of the total, with negative components counted as 0.
    holds
        The effects that are not told apart from it, because a facet has one level or the noise is not known.
    """

    name: str
    variance: Estimate
    share: Estimate
    holds: tuple[str, ...] = ()


@dataclass(frozen=True)
class VarianceDecomposition:
    """The variance of one sampled rating, by what it comes from.

    Attributes
    ----------
    components
        The eleven effects of task, template, rater and completion in the order of `EFFECTS`, then the rating seed. One
        that cannot be estimated is missing with its reason; the one it became part of, if any, has it in its `holds`.
    total
        The variance of one rating, or of one of `y` where its sampling variance is not known: the sum of the
        components, negative ones counted as 0.
    levels
        How many of each facet: task (those used), completion seed, template, rater.
    n, left_out
        Tasks used, and tasks left out because a rating is missing.
    """

    components: tuple[Component, ...]
    total: Estimate
    levels: Mapping[str, int]
    n: int
    left_out: int


def pomp(ratings: ArrayLike, low: float, high: float) -> Floats:
    """Ratings as a proportion of the maximum possible, (x - low) / (high - low), so that scales compare.

    P. Cohen, J. Cohen, Aiken & West 1999, "The problem of units and the circumstance for POMP", Multivariate Behavioral
    Research 34; theirs is a percentage. A variance is divided by (high - low)² to match.

    Parameters
    ----------
    ratings
        Of any shape; NaN stays NaN.
    low, high
        The ends of their scale.

    Raises
    ------
    ValueError
        If `low` is not below `high`.
    """
    if not low < high:
        raise ValueError(f"the low end of a scale must be below its high end, got {low} and {high}")
    return (np.asarray(ratings, dtype=np.float64) - low) / (high - low)


def variance_decomposition(
    y: ArrayLike, sampling: ArrayLike, noise: ArrayLike, draws: Resamples | None = None
) -> VarianceDecomposition:
    """Variance components by the method of moments, of the tasks that have all their ratings.

    All facets are random, and the design is balanced, so these are the ANOVA estimators (Searle, Casella & McCulloch
    1992, "Variance Components", chapter 4): unbiased whatever the distributions, and negative at times. Sampling leaves
    in every mean square, on average, the mean of `noise`, which is subtracted from the component of the highest order.
    A facet with one level is dropped: its main effect is the same for all ratings, and its interactions are part of the
    effects they are interactions with. Shares count negative components as 0 (Brennan 2001, chapter 3).

    Parameters
    ----------
    y
        [T, C, M, R] mean rating of each task, completion seed, template and rater, on one scale for all (`pomp`); NaN
        where there is none.
    sampling
        [T, C, M, R] variance of one sampled rating, in the squared unit of `y`; NaN where not known.
    noise
        [T, C, M, R] variance that `y` has from sampling: 0 for exact ratings, sampling/k for a mean of k; NaN where not
        known. Where no rating's is, the component of the highest order holds the rating seed, as a single sampled
        rating for each cell of the design would have it.
    draws
        Of the T tasks, for intervals: they say what other tasks would give with these templates and raters. How much
        templates or raters differ at large is far less certain from a handful of them than their intervals say.

    Raises
    ------
    ValueError
        If the shapes differ or are not of four axes, a variance is negative, or `draws` are of other tasks.
    """
    y, sampling, noise = (np.asarray(given, dtype=np.float64) for given in (y, sampling, noise))
    if y.ndim != 4 or not y.shape == sampling.shape == noise.shape:
        shapes = f"{y.shape}, {sampling.shape} and {noise.shape}"
        raise ValueError(f"y, sampling and noise must be [tasks, completion seeds, templates, raters], got {shapes}")
    if (sampling < 0).any() or (noise < 0).any():
        raise ValueError("variances must not be negative")
    draws = resampling(draws, len(y))
    complete = np.asarray(np.isfinite(y).all(axis=(1, 2, 3)) & (y.size > 0))
    n, left_out = int(complete.sum()), int((~complete).sum())
    counts = dict(zip(FACETS, (n, *y.shape[1:]), strict=True))
    levels = {FACETS[facet]: count for facet, count in counts.items()}
    if n < MIN_TASKS:
        none = Estimate.missing(FEW_COMPLETE, n)
        components = tuple(Component(name, none, none) for name in (*EFFECTS.values(), RATING_SEED))
        return VarianceDecomposition(components, none, levels, n, left_out)

    y, sampling, noise, draws = y[complete], sampling[complete], noise[complete], draws.only(complete)
    effects = _effect_variances(y, draws)
    single, carried = _mean_of_known(sampling, draws), _mean_of_known(noise, draws)
    single_known, noise_known = not np.isnan(single[0]), not np.isnan(carried[0])
    *_, highest = effects
    if noise_known:
        effects[highest] = _difference(effects[highest], carried)
    one = frozenset(facet for facet, count in counts.items() if count == 1)
    variances = {EFFECTS[effect]: variance for effect, variance in effects.items()}
    holds = {EFFECTS[effect]: _not_told_apart(effect, one) for effect in effects}
    if single_known:
        variances[RATING_SEED] = single
    if not noise_known:
        holds[EFFECTS[highest]] += (RATING_SEED,)
    # Where it is known of some ratings, or in one of the two ways, sampling would be counted twice or not in full.
    known = np.isfinite(sampling).any() or np.isfinite(noise).any()
    summed = (single_known and noise_known) or not known
    whole = sum((np.maximum(variance, 0.0) for variance in variances.values()), np.zeros(len(draws.times)))

    def share(part: Floats) -> Estimate:
        return Estimate.of(part, n, NO_VARIANCE) if summed else Estimate.missing(PARTLY_KNOWN, n)

    missing = {name: " and ".join(f"one {FACETS[f]}" for f in FACETS if f in e & one) for e, name in EFFECTS.items()}
    components = []
    for name, reason in (missing | {RATING_SEED: NO_SAMPLING}).items():
        variance = of_whole = Estimate.missing(reason, n)
        if name in variances:
            variance = Estimate.of(variances[name], n, reason)
            of_whole = share(ratio(np.maximum(variances[name], 0.0), whole))
        components.append(Component(name, variance, of_whole, holds.get(name, ())))
    return VarianceDecomposition(tuple(components), share(whole), levels, n, left_out)


def _not_told_apart(effect: Effect, one: Effect) -> tuple[str, ...]:
    """Names of the effects that are part of this one, where the facets `one` have one level."""
    return tuple(name for other, name in EFFECTS.items() if other != effect and other - one == effect)


def _effect_variances(y: Floats, draws: Resamples) -> dict[Effect, Floats]:
    """[1 + B] of each effect whose facets have several levels, in the order of `EFFECTS`; noise is in the last.

    E[MS(S)] is the sum over the effects S' that contain S of σ²(S') times the cells of one level of S' (Cornfield &
    Tukey 1956, "Average values of mean squares in factorials"). From the highest order down, each mean square has one
    unknown.
    """
    tasks = draws.times.sum(axis=1).astype(np.float64)
    levels = dict(zip(FACETS, [tasks, *(np.full_like(tasks, count) for count in y.shape[1:])], strict=True))
    mean_squares = _mean_squares(y, draws, levels)
    own: dict[Effect, Floats] = {}
    for effect in reversed(mean_squares):
        others = sum((part for other, part in own.items() if other > effect), np.zeros_like(tasks))
        own[effect] = _difference(mean_squares[effect], others)
    return {effect: ratio(own[effect], _count(FACETS.keys() - effect, levels)) for effect in mean_squares}


def _count(facets: Iterable[str], levels: Mapping[str, Floats]) -> Floats:
    """[1 + B] combinations of the levels of some facets; 1 of none."""
    return np.prod([np.ones_like(levels["t"]), *(levels[facet] for facet in facets)], axis=0)


def _mean_squares(y: Floats, draws: Resamples, levels: Mapping[str, Floats]) -> dict[Effect, Floats]:
    """[1 + B] mean square of each effect whose facets have several levels; those of resamples without their bias.

    A task drawn twice is not two tasks. Mean squares over tasks come out too small in resamples, by 1 - 1/T, and those
    without tasks too large, by that of their interaction with tasks: an interval of template × rater could lie above 0
    where there is no such effect. (Completions are counted within tasks, and have no such bias.) What is expected of
    the bias is subtracted, as Tong & Brennan do (2007, "Bootstrap estimates of standard errors in generalizability
    theory", Educational and Psychological Measurement 67).
    """
    effects = [e for e in EFFECTS if all(count > 1 for f, count in zip(FACETS, y.shape, strict=True) if f in e)]
    # From the grand mean, which keeps the sums from cancelling. What differs by rounding only is alike.
    z = y - y.mean()
    if np.abs(z).max() <= ROUNDING * np.abs(y).max():
        z = np.zeros_like(y)
    tasks = levels["t"][:, None]
    per_task = np.stack([_mean_square_margin(z, effect) for effect in effects if "t" in effect], axis=1)
    over_tasks = iter(ratio(draws.sums(per_task), tasks).T)
    margins = ratio(draws.sums(z.mean(axis=1).reshape(len(y), -1)), tasks).reshape(-1, 1, *y.shape[2:])
    squares = {e: next(over_tasks) if "t" in e else _mean_square_margin(margins, e) for e in effects}

    # An effect's own sum of squares and degrees of freedom are what those of the effects within it leave.
    own = {Effect(): _mean_square_margin(margins, Effect())}
    df = {Effect(): np.ones(len(margins))}
    mean_squares: dict[Effect, Floats] = {}
    for effect in effects:
        within = [other for other in own if other < effect]
        own[effect] = squares[effect] - sum(own[other] for other in within)
        df[effect] = _count(effect, levels) - sum(df[other] for other in within)
        beyond_rounding = own[effect] > ROUNDING * squares[effects[-1]]
        mean_squares[effect] = ratio(np.where(beyond_rounding, own[effect], 0.0) * _count(FACETS, levels), df[effect])

    resampled = slice(1, None)
    for effect in effects:
        if "t" not in effect:
            mean_squares[effect][resampled] -= mean_squares[effect | {"t"}][resampled]
    for effect in effects:
        if "t" in effect and "c" not in effect:
            mean_squares[effect][resampled] *= len(y) / (len(y) - 1)
    return mean_squares


def _mean_square_margin(cells: Floats, effect: Effect) -> Floats:
    """[K] from [K, C, M, R]: the mean over an effect's levels of its squared marginal mean, for each of the K."""
    others = tuple(axis for axis, facet in enumerate(FACETS) if axis > 0 and facet not in effect)
    return (cells.mean(axis=others, keepdims=True) ** 2).mean(axis=(1, 2, 3))


def _mean_of_known(values: Floats, draws: Resamples) -> Floats:
    """[1 + B] mean of what is known of [T, C, M, R]; NaN where nothing is for some template and rater.

    Each template and rater counts the same, however much of it is known: they differ in noise, and a mean of what is
    known of all of them would be of those that it is known of.
    """
    known = np.isfinite(values)
    sums = draws.sums(np.where(known, values, 0.0).sum(axis=1).reshape(len(values), -1))
    counts = draws.sums(known.sum(axis=1).reshape(len(values), -1).astype(np.float64))
    return ratio(sums, counts).mean(axis=1)


def _difference(whole: Floats, part: Floats) -> Floats:
    """``whole - part`` of either sign, with a difference of the size of rounding as an exact zero."""
    difference = whole - part
    return np.where(np.abs(difference) > ROUNDING * np.maximum(np.abs(whole), np.abs(part)), difference, 0.0)
