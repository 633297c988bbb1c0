"""How long the statistics of a large sweep take, intervals included: 10,000 tasks x 10 seeds x 6 templates.

Prints a Markdown table: every statistic of every template over all tasks, and the same again by origin.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from prefs.results.refusals import refusals
from prefs.results.stability import stability
from prefs.statistics.groups import groups_by_origin
from prefs.statistics.measured import Measured


def cell(tasks: int, seeds: int, origins: tuple[str, ...], rng: np.random.Generator) -> Measured:
    """Ratings drawn from option probabilities of their own for each task; a tenth of the answers is invalid."""
    values = np.arange(1.0, 6.0)
    mass = 0.9 * rng.dirichlet(np.full(5, 0.6), size=tasks)
    above = rng.random((tasks, seeds, 1)) > np.cumsum(mass / 0.9, axis=1)[:, None, :-1]
    sampled = values[above.sum(axis=2)]
    sampled[rng.random(sampled.shape) < 0.1] = np.nan
    refused = (rng.random(tasks) < 0.1).astype(float)
    names = tuple(map(str, range(tasks)))
    return Measured(names, origins, tuple(f"{value:g}" for value in values), tuple(values), sampled, mass, refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--templates", type=int, default=6)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    origins = tuple(f"ORIGIN{at % 4}" for at in range(given.tasks))
    cells = [cell(given.tasks, given.seeds, origins, rng) for _ in range(given.templates)]
    times: dict[str, list[float]] = {"all tasks": [], "all tasks, and each of 4 origins": []}
    for _ in range(given.repeats):
        for name, of in zip(times, (("ONE",) * given.tasks, origins), strict=True):
            begun = time.perf_counter()
            groups = groups_by_origin(of, given.resamples, seed=0)
            for each in cells:
                chosen = groups if of is origins else groups[:1]
                stability(each, chosen, target_r=0.9)
                refusals(each, chosen)
            times[name].append(time.perf_counter() - begun)
    print(f"{given.tasks:,} tasks x {given.seeds} seeds x {given.templates} templates, {given.resamples:,} resamples\n")
    print("| statistics | median (s) | all (s) |\n|---|---|---|")
    for name, each in times.items():
        print(f"| {name} | {statistics.median(each):.1f} | {', '.join(f'{value:.1f}' for value in each)} |")


if __name__ == "__main__":
    main()
