"""Sweeps over the conditions of completing and of rating: what a comparison makes of their run folders.

Expected numbers come from the simulated arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated import Compared, Simulated, around, compared, completed, hydra_sweep, row_of, simulate, some_tasks, steer

from prefs.comparison.cells import read_sweep
from prefs.comparison.conditions import grids

LEVELS, KEY, TASKS = ("positive", "neutral", "negative"), "anchored_precise", 40
PAIRS = tuple(itertools.product(LEVELS, LEVELS))
# Of which two by two are enough.
CORNERS = tuple(itertools.product(LEVELS[::2], LEVELS[::2]))
GRID = f"smollm2-{KEY}"


def means(completing: str, rating: str, tasks: int = TASKS) -> np.ndarray:
    """[T] ratings: .1 a step of completing, .7 a step of rating, and what is the task's own."""
    task = np.random.default_rng(0).uniform(-0.8, 0.8, size=tasks)
    own = np.random.default_rng([0, PAIRS.index((completing, rating))]).uniform(-0.1, 0.1, size=tasks)
    steps = 0.1 * (1 - LEVELS.index(completing)) + 0.7 * (1 - LEVELS.index(rating))
    return 3 + task + steps + own


def cell(
    folder: Path,
    completing: str | None,
    rating: str | None,
    *overrides: str,
    tasks: int = TASKS,
    first: int = 0,
    by: str | None = None,
    mean: np.ndarray | None = None,
    keys: Sequence[str] = (KEY,),
    error: BaseException | None = None,
) -> Simulated:
    """One job of a sweep over conditions."""
    given = {"completer": completing, "rating": rating}
    conditions = [f"{role}.condition={name}" for role, name in given.items() if name is not None]
    if mean is None:
        mean = means(completing or "neutral", rating or "neutral", tasks)
    texts = completed(some_tasks(tasks, first), by=by or f"Done, {completing}")
    concept = () if any(override.startswith("concept=") for override in overrides) else ("concept=[liking_math]",)
    mass = {key: around(mean) for key in keys}
    return simulate(folder, [*conditions, *overrides], texts, mass, config_only=concept, error=error)


def sweep(folder: Path, *overrides: str, pairs: Sequence[tuple[str, str]] = PAIRS) -> dict[tuple[str, str], Simulated]:
    return {pair: cell(folder / f"{number}", *pair, *overrides) for number, pair in enumerate(pairs)}


# The 3 × 3


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[tuple[str, str], Simulated]:
    folder = tmp_path_factory.mktemp("multirun") / "09-00-00"
    made = hydra_sweep(folder, "+experiment=system_prompts")
    swept = [tuple(each.partition("=")[2] for each in job if ".condition=" in each) for job in made]
    assert swept == list(PAIRS)
    return sweep(folder)


@pytest.fixture(scope="module")
def nine(jobs) -> Compared:
    return compared(jobs["positive", "positive"].folder.parent, drawn=True, width=1000)


def test_means_are_those_of_the_ratings(nine, jobs):
    table = nine.table("conditions")
    assert len(table) == 9 * 3 * 2  # cells, ALL and two origins, exact and sampled
    for pair, job in jobs.items():
        own = {"completing": pair[0], "rating": pair[1], "grid": GRID}
        row, y = row_of(table, **own, origin="ALL", ratings="exact"), job.means(KEY)
        assert (row["n"], row["mean"], row["sd"]) == (TASKS, pytest.approx(y.mean()), pytest.approx(y.std(ddof=1)))
        assert row["mean_low"] < row["mean"] < row["mean_high"]
        assert row["valid"] == pytest.approx(1)
        odd = row_of(table, **own, origin="MATH", ratings="exact")
        assert (odd["n"], odd["mean"]) == (TASKS // 2, pytest.approx(y[1::2].mean()))
        sampled = row_of(table, **own, origin="ALL", ratings="sampled")
        assert sampled["mean"] == pytest.approx(np.nanmean(job.sampled[KEY], axis=1).mean())
        assert sampled["valid"] == np.isfinite(job.sampled[KEY]).mean()


def test_effects_are_paired_differences(nine, jobs):
    y = np.stack([jobs[pair].means(KEY) for pair in PAIRS], axis=1).reshape(TASKS, 3, 3)
    exact = nine.table("condition_effects").query("ratings == 'exact'")
    assert list(exact["of"]) == ["completing"] * 3 + ["rating"] * 3 + ["completing × rating", "rating over completing"]
    for (a, first), (b, second) in itertools.combinations(enumerate(LEVELS), 2):
        row = row_of(exact, of="completing", contrast=f"{first} − {second}")
        assert (row["points"], row["over"]) == (
            pytest.approx((y[:, a] - y[:, b]).mean()),
            "positive, neutral, negative",
        )
        row = row_of(exact, of="rating", contrast=f"{first} − {second}")
        assert row["points"] == pytest.approx((y[:, :, a] - y[:, :, b]).mean())
        assert (row["n"], row["left_out"]) == (TASKS, 0)
    crossed = row_of(exact, of="completing × rating")
    assert crossed["contrast"] == "(positive − negative) × (positive − negative)"
    assert crossed["points"] == pytest.approx((y[:, 0, 0] - y[:, 0, 2] - y[:, 2, 0] + y[:, 2, 2]).mean())
    shares = nine.table("condition_shares").pivot(index="source", columns="ratings", values="share")
    assert set(shares.index) == {"completing", "rating", "completing × rating", "task × condition"}
    assert shares["exact"].sum() == pytest.approx(1)
    within = ((y - y.mean(axis=(1, 2), keepdims=True)) ** 2).sum()
    expected = 3 * TASKS * ((y.mean(axis=(0, 1)) - y.mean()) ** 2).sum() / within
    assert shares.loc["rating", "exact"] == pytest.approx(expected)
    # The noise of seeds is of neither context.
    assert shares.loc["task × condition", "sampled"] > 2 * shares.loc["task × condition", "exact"]


def test_which_context_dominates_is_said(nine):
    (remark,) = [line for line in nine.remarks if line.startswith(GRID + ": being")]
    assert remark.startswith(f"{GRID}: being rated under positive instead of negative moves ratings by 1.4")
    assert "points, having been completed under positive instead of negative by ." in remark
    assert ": the rating context dominates. Of the variation within tasks, .9" in remark
    assert remark.endswith(" completing's.")
    assert any(line.startswith("Sampled ratings by condition are of 4 rating seeds a task") for line in nine.remarks)
    # What conditions come to is no other difference of cells, and their completions differ by design.
    assert not [line for line in nine.remarks if "names say" in line or "rated different completions" in line]


def test_the_screen_and_the_page_have_the_grid(nine, jobs):
    printed = nine.printed.split(f"{GRID}: exact ratings by condition")[1]
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("neutral  ")]
    for rating in LEVELS:
        assert f"{jobs['neutral', rating].means(KEY).mean():.2f} [" in line
    assert f"What conditions do to the same {TASKS} tasks" in nine.printed
    assert "completed: negative rated: positive" in nine.printed
    for words in ("Means by condition", "Main effects and interaction", "Shares of the variation within tasks"):
        assert words in nine.page
    assert (nine.out / "figures" / "conditions.png").exists()


# Grids that are not whole, or not one


def test_a_failed_job_leaves_what_does_not_need_it(tmp_path):
    for number, pair in enumerate(PAIRS):
        if pair == ("negative", "positive"):
            with pytest.raises(RuntimeError):
                cell(tmp_path / f"{number}", *pair, error=RuntimeError("out of memory"))
        else:
            cell(tmp_path / f"{number}", *pair)
    result = compared(tmp_path)
    assert f"{GRID}: there is no cell completed negative and rated positive; main effects" in "\n".join(result.remarks)
    row = row_of(result.table("condition_effects"), of="completing", contrast="positive − negative", ratings="exact")
    beside = ("neutral", "negative")
    expected = np.mean([means("positive", rating) - means("negative", rating) for rating in beside])
    assert (row["over"], row["points"]) == ("neutral, negative", pytest.approx(expected))
    shares = result.table("condition_shares")
    assert shares["share"].isna().all()
    assert set(shares["share_reason"]) == {"a cell of the design has no ratings"}
    (line,) = [line for line in result.printed.splitlines() if line.strip().startswith("negative  ")]
    assert line.split()[1] == "–"


def names_of_grids(folder: Path) -> dict[str, int]:
    """The grids of some jobs, and how many cells each has."""
    return {grid.name: len(grid.cells) for grid in grids(read_sweep([folder]).cells)}


@pytest.mark.parametrize(
    ("varied", "names"),
    [
        ((["completer.seed=0"], ["completer.seed=1"]), [f"{GRID} completer.seed={seed}" for seed in (0, 1)]),
        # The same names in two concepts are not one grid.
        (
            (["concept=[liking_math]"], ["concept=[liking_poetry]"]),
            [f"{GRID} concept.name={name}" for name in ("liking_math", "liking_poetry")],
        ),
        ((["model.name=a"], ["model.name=b"]), [f"{name}-{KEY}" for name in "ab"]),
    ],
)
def test_what_else_differs_makes_another_grid_and_is_in_its_name(tmp_path, varied, names):
    for number, (overrides, pair) in enumerate(itertools.product(varied, CORNERS[:2])):
        cell(tmp_path / f"{number}", *pair, *overrides)
    assert names_of_grids(tmp_path) == dict.fromkeys(names, 2)


# Tasks and ratings that are not all there


def test_tasks_missing_in_some_cells_are_left_out_and_counted(tmp_path):
    for number, pair in enumerate(PAIRS):
        first = 5 if pair == ("neutral", "neutral") else 0
        cell(tmp_path / f"{number}", *pair, first=first, tasks=TASKS - first, mean=means(*pair)[first:])
    result = compared(tmp_path)
    y = np.stack([means(*pair)[5:] for pair in PAIRS], axis=1).reshape(-1, 3, 3)
    row = row_of(result.table("condition_effects"), of="rating", contrast="positive − negative", ratings="exact")
    assert (row["n"], row["left_out"]) == (TASKS - 5, 5)
    assert row["points"] == pytest.approx((y[:, :, 0] - y[:, :, 2]).mean())
    assert f"{GRID}: effects are without 5 tasks that lack a rating in some cell." in result.remarks
    table = result.table("conditions").query("completing == 'neutral' and origin == 'ALL' and ratings == 'exact'")
    assert dict(zip(table["rating"], table["n"], strict=True)) == {
        "positive": TASKS,
        "neutral": TASKS - 5,
        "negative": TASKS,
    }


@pytest.mark.parametrize(("override", "kind"), [("rating.exact=false", "sampled"), ("rating.seeds=[]", "exact")])
def test_one_kind_of_ratings_alone(tmp_path, override, kind):
    jobs = sweep(tmp_path, override, pairs=CORNERS)
    result = compared(tmp_path)
    assert set(result.table("conditions")["ratings"]) == {kind}
    row = row_of(result.table("condition_effects"), of="rating", contrast="positive − negative")
    y = {
        pair: job.means(KEY) if kind == "exact" else np.nanmean(job.sampled[KEY], axis=1) for pair, job in jobs.items()
    }
    assert row["points"] == pytest.approx(np.mean([y[c, "positive"] - y[c, "negative"] for c in LEVELS[::2]]))
    words = {"exact": "exact ratings", "sampled": "means over seeds"}[kind]
    assert f"{GRID}: {words} by condition" in result.printed
    sampled = [line for line in result.remarks if line.startswith("Sampled ratings by condition")]
    assert len(sampled) == (kind == "sampled")


# Steering


DOSES = (-4, -2, 0, 2, 4)


def steered(
    folder: Path, pair: tuple[str, str], slope: float, layers: Sequence[int] = (15,), left_out: int = 0
) -> None:
    """Ratings that a vector moves by `slope` a unit, up to doses of 2; a random one moves them by a tenth of it."""
    vectors = (("liking_math", "concept", 1.0), ("random 0", "random", -0.1), ("random 1", "random", 0.05))
    doses: list[Mapping[str, object]] = []
    for layer, (name, control, times), dose in itertools.product(layers, vectors, DOSES):
        mean = float(means(*pair).mean()) + times * slope * dose
        row = {"vector": name, "control": control, "layer": layer, "coefficient": dose, "mean": mean}
        doses.append(row | {"coherent": abs(dose) <= 2})
    steer(folder / KEY, doses, left_out)


@pytest.fixture(scope="module")
def steered_sweep(tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("multirun") / "10-00-00"
    for number, pair in enumerate(PAIRS):
        cell(folder / f"{number}", *pair)
        steered(
            folder / f"{number}", pair, slope=0.2 if pair[1] == "neutral" else 0.1, left_out=3 if number == 0 else 0
        )
    return compared(folder, drawn=True)


def test_the_table_of_steering_has_conditions_and_slopes(steered_sweep):
    table = steered_sweep.table("steering")
    assert len(table) == 9 * 3
    row = row_of(table, completing="positive", rating="neutral", vector="liking_math")
    assert (row["control"], row["layer"], row["doses"], row["n"]) == ("concept", 15, 3, 8)
    assert (row["slope"], row["slope_low"]) == (pytest.approx(0.2), pytest.approx(0.19))
    assert (row["delta_minus"], row["delta_plus"]) == (pytest.approx(-0.4), pytest.approx(0.4))
    assert row["null_slope"] == pytest.approx(0.02)
    assert "Steering: rating points a unit of the coefficient" in steered_sweep.printed
    assert ".20 [.19, .21]" in steered_sweep.printed
    (remark,) = [line for line in steered_sweep.remarks if "no rating at some of its doses" in line]
    assert remark.endswith(
        "the slope along liking_math at layer 15 is of 8/11 tasks; the others have no rating at some of its doses."
    )
    assert "Slopes and changes" in steered_sweep.page
    assert (steered_sweep.out / "figures" / "steering.png").exists()


@pytest.mark.parametrize("name", ["steering_doses.parquet", "steering_slopes.parquet"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other", "no rows"])
def test_damaged_steering_is_named_and_left_out(tmp_path, name, damage):
    for number, pair in enumerate(PAIRS[:2]):
        cell(tmp_path / f"{number}", *pair)
        steered(tmp_path / f"{number}", pair, 0.1)
    path = tmp_path / "1" / KEY / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        table = pd.DataFrame({"x": [1]}) if damage == "other" else pd.read_parquet(path).iloc[:0]
        table.to_parquet(path)
    result = compared(tmp_path)
    (remark,) = [line for line in result.remarks if "its steered ratings are left out" in line]
    assert remark.startswith(f"{GRID} rating.condition=neutral: ")
    assert str(path) in remark
    assert set(result.table("steering")["rating"]) == {"positive"}
