"""Sweeps over the conditions of completing and of rating: what a comparison makes of their run folders.

Expected numbers come from the simulated arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated import Simulated, around, completed, hydra_sweep, simulate, some_tasks, steer
from test_comparison import Compared, compared

import prefs.compare
from prefs.comparison.cells import read_sweep
from prefs.comparison.conditions import condition_effects, condition_remarks, condition_table, grids, violin_tables
from prefs.comparison.steered import dose_tables, read_steered, steering_table

LEVELS, KEY, TASKS = ("positive", "neutral", "negative"), "anchored_precise", 40
PAIRS = tuple(itertools.product(LEVELS, LEVELS))
# Of which two by two are enough.
CORNERS = tuple(itertools.product(LEVELS[::2], LEVELS[::2]))
GRID = f"smollm2-{KEY}"


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figures, which take most of the time, where they are not what is tested."""
    monkeypatch.setattr(prefs.compare, "draw", lambda *_: {})


def means(completing: str, rating: str, tasks: int = TASKS, seed: int = 0) -> np.ndarray:
    """[T] ratings: .1 a step of completing, .7 a step of rating, and what is the task's own."""
    task = np.random.default_rng(seed).uniform(-0.8, 0.8, size=tasks)
    own = np.random.default_rng([seed, PAIRS.index((completing, rating))]).uniform(-0.1, 0.1, size=tasks)
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
    concept = () if any(each.startswith("concept=") for each in overrides) else ("concept=[liking_math]",)
    return simulate(
        folder, [*conditions, *overrides], texts, {key: around(mean) for key in keys}, config_only=concept, error=error
    )  # fmt: skip


def sweep(folder: Path, *overrides: str, pairs: Sequence[tuple[str, str]] = PAIRS) -> dict[tuple[str, str], Simulated]:
    return {pair: cell(folder / f"{at}", *pair, *overrides) for at, pair in enumerate(pairs)}


def found(folder: Path, resamples: int = 20):
    """Grids, their means and their effects."""
    made = grids(read_sweep([folder]).cells)
    effects = condition_effects(made, resamples=resamples, seed=0)
    return made, condition_table(made, resamples=resamples, seed=0), effects


def of(table: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        table = table.loc[table[name] == value, :]
    (row,) = [row for _, row in table.iterrows()]
    return row


# The 3 × 3


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[tuple[str, str], Simulated]:
    folder = tmp_path_factory.mktemp("multirun") / "09-00-00"
    assert len(hydra_sweep(folder, "+experiment=system_prompts")) == 9
    return sweep(folder)


@pytest.fixture(scope="module")
def nine(jobs) -> Compared:
    return compared(jobs["positive", "positive"].folder.parent)


def test_the_experiment_is_the_nine_jobs_of_the_grid(tmp_path):
    made = hydra_sweep(tmp_path, "+experiment=system_prompts")
    swept = [tuple(each.partition("=")[2] for each in job if ".condition=" in each) for job in made]
    assert swept == list(PAIRS)


def test_means_are_those_of_the_ratings(nine, jobs):
    table = nine.table("conditions")
    assert len(table) == 9 * 3 * 2  # cells, ALL and two origins, exact and sampled
    for pair, job in jobs.items():
        mine = {"completing": pair[0], "rating": pair[1], "grid": GRID}
        row = of(table, **mine, origin="ALL", ratings="exact")
        y = job.means(KEY)
        assert (row["n"], row["mean"], row["sd"]) == (TASKS, pytest.approx(y.mean()), pytest.approx(y.std(ddof=1)))
        assert row["mean_low"] < row["mean"] < row["mean_high"]
        assert row["valid"] == pytest.approx(1)
        odd = of(table, **mine, origin="MATH", ratings="exact")
        assert (odd["n"], odd["mean"]) == (TASKS // 2, pytest.approx(y[1::2].mean()))
        sampled = of(table, **mine, origin="ALL", ratings="sampled")
        assert sampled["mean"] == pytest.approx(np.nanmean(job.sampled[KEY], axis=1).mean())
        assert sampled["valid"] == np.isfinite(job.sampled[KEY]).mean()


def test_effects_are_paired_differences(nine, jobs):
    table = nine.table("condition_effects")
    y = np.stack([jobs[pair].means(KEY) for pair in PAIRS], axis=1).reshape(TASKS, 3, 3)
    exact = table.query("ratings == 'exact'")
    assert list(exact["of"]) == ["completing"] * 3 + ["rating"] * 3 + ["completing × rating", "rating over completing"]
    for (a, first), (b, second) in itertools.combinations(enumerate(LEVELS), 2):
        contrast = f"{first} − {second}"
        row = of(exact, of="completing", contrast=contrast)
        assert row["points"] == pytest.approx((y[:, a] - y[:, b]).mean())
        assert row["over"] == "positive, neutral, negative"
        row = of(exact, of="rating", contrast=contrast)
        assert row["points"] == pytest.approx((y[:, :, a] - y[:, :, b]).mean())
        assert (row["n"], row["left_out"]) == (TASKS, 0)
    crossed = of(exact, of="completing × rating")
    assert crossed["contrast"] == "(positive − negative) × (positive − negative)"
    assert crossed["points"] == pytest.approx((y[:, 0, 0] - y[:, 0, 2] - y[:, 2, 0] + y[:, 2, 2]).mean())
    shares = nine.table("condition_shares").query("ratings == 'exact'").set_index("source")["share"]
    assert list(shares.index) == ["completing", "rating", "completing × rating", "task × condition"]
    assert shares.sum() == pytest.approx(1)
    within = ((y - y.mean(axis=(1, 2), keepdims=True)) ** 2).sum()
    assert shares["rating"] == pytest.approx(3 * TASKS * ((y.mean(axis=(0, 1)) - y.mean()) ** 2).sum() / within)


def test_sampled_ratings_have_more_that_is_neither(nine):
    residual = nine.table("condition_shares").query("source == 'task × condition'").set_index("ratings")["share"]
    assert residual["sampled"] > 2 * residual["exact"]


def test_which_context_dominates_is_said(nine):
    table = nine.table("condition_effects").query("ratings == 'exact'")
    rating = of(table, of="rating", contrast="positive − negative")
    assert rating["points"] == pytest.approx(1.4, abs=0.05)
    remarks = [line for line in nine.remarks if line.startswith(GRID + ": being")]
    (said,) = remarks
    assert said.startswith(f"{GRID}: being rated under positive instead of negative moves ratings by 1.4")
    assert "points, having been completed under positive instead of negative by ." in said
    assert ": the rating context dominates. Of the variation within tasks, .9" in said
    assert said.endswith(" completing's.")
    assert any(line.startswith("Sampled ratings by condition are of 4 rating seeds a task") for line in nine.remarks)


def test_the_screen_and_the_page_have_the_grid(nine, jobs):
    printed = nine.printed.split(f"{GRID}: exact ratings by condition")[1]
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("neutral  ")]
    for rating in LEVELS:
        assert f"{jobs['neutral', rating].means(KEY).mean():.2f} [" in line
    assert f"What conditions do to the same {TASKS} tasks" in nine.printed
    assert "completed: negative rated: positive" in nine.printed
    page = (nine.out / "report.html").read_text()
    for words in ("Means by condition", "Main effects and interaction", "Shares of the variation within tasks"):
        assert words in page
    assert (nine.out / "figures" / "conditions.png").exists()


def test_conditions_say_what_system_prompts_differ_in(nine):
    assert not [line for line in nine.remarks if "differ in more than their names say" in line]
    assert not [line for line in nine.remarks if "rated different completions" in line]


def test_the_closing_tables_fit_into_80_columns(jobs, capsys, monkeypatch, undrawn, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    prefs.compare.compare([jobs["positive", "positive"].folder.parent], tmp_path / "out", "disabled")
    printed = capsys.readouterr().out
    assert max(map(len, printed.partition("tables and figures")[0].splitlines())) <= 80
    assert "…" not in printed


def test_violins_have_every_task(jobs):
    (grid,), table, _ = found(jobs["positive", "positive"].folder.parent)
    values, numbers = violin_tables(grid, table)
    assert list(dict.fromkeys(values["row"])) == ["exact mean of a task", "mean of 4 sampled ratings"]
    assert list(dict.fromkeys(values["panel"])) == [f"rated: {name}" for name in LEVELS]
    assert list(dict.fromkeys(values["violin"])) == list(LEVELS)
    mine = values.query("row == 'exact mean of a task' and panel == 'rated: neutral' and violin == 'negative'")
    np.testing.assert_allclose(mine["value"], jobs["negative", "neutral"].means(KEY))
    row = of(numbers, row="exact mean of a task", panel="rated: neutral", violin="negative")
    assert row["mean"] == pytest.approx(mine["value"].mean())


# Grids that are not whole, or not one


def test_a_failed_job_leaves_what_does_not_need_it(undrawn, tmp_path):
    for at, pair in enumerate(PAIRS):
        if pair == ("negative", "positive"):
            with pytest.raises(RuntimeError):
                cell(tmp_path / f"{at}", *pair, error=RuntimeError("out of memory"))
        else:
            cell(tmp_path / f"{at}", *pair)
    result = compared(tmp_path)
    assert f"{GRID}: there is no cell completed negative and rated positive; main effects" in "\n".join(result.remarks)
    row = of(result.table("condition_effects"), of="completing", contrast="positive − negative", ratings="exact")
    y = {pair: means(*pair) for pair in PAIRS}
    beside = ("neutral", "negative")
    expected = np.mean([y["positive", each] - y["negative", each] for each in beside])
    assert (row["over"], row["points"]) == ("neutral, negative", pytest.approx(expected))
    shares = result.table("condition_shares")
    assert shares["share"].isna().all()
    assert set(shares["share_reason"]) == {"a cell of the design has no ratings"}
    assert "completed under     rated: positive" in result.printed
    (line,) = [line for line in result.printed.splitlines() if line.strip().startswith("negative  ")]
    assert line.split()[1] == "–"


@pytest.mark.parametrize(("role", "varied", "other"), [("completer", "completing", "rating"), ("rating",) * 2 + ("",)])
def test_one_factor_alone(undrawn, tmp_path, role, varied, other):
    for at, level in enumerate(("neutral", "positive")):
        pair = (level, None) if role == "completer" else (None, level)
        cell(tmp_path / f"{at}", *pair, mean=means(*(each or "neutral" for each in pair)))
    result = compared(tmp_path)
    effects = result.table("condition_effects")
    assert set(effects["of"]) == {varied}
    row = of(effects, ratings="exact")
    assert row["contrast"] == "positive − neutral"  # in the order of the concept, not of the jobs
    assert row["over"] == "no condition"
    assert f"{GRID}: {varied} under positive instead of neutral moves ratings by" in "\n".join(result.remarks)
    shares = result.table("condition_shares").query("ratings == 'exact'").set_index("source")
    assert shares.loc[[varied, "task × condition"], "share"].sum() == pytest.approx(1)
    assert shares["share"].notna().sum() == 2


def test_raters_and_templates_have_grids_of_their_own(tmp_path):
    for at, (rater, pair) in enumerate(itertools.product("ab", CORNERS[:2])):
        shift = 0.2 if rater == "b" else 0.0
        cell(tmp_path / f"{at}", *pair, f"model.name={rater}", mean=means(*pair) + shift, keys=(KEY, "stated"))
    made, table, effects = found(tmp_path)
    assert [grid.name for grid in made] == [f"a-{KEY}", "a-stated", f"b-{KEY}", "b-stated"]
    assert {len(grid.cells) for grid in made} == {2}
    whole = table.query("origin == 'ALL' and ratings == 'exact'").set_index("grid")["mean"]
    np.testing.assert_allclose(whole[f"b-{KEY}"].to_numpy() - whole[f"a-{KEY}"].to_numpy(), 0.2)
    assert len(condition_remarks(made, effects)) == 5


def test_what_else_differs_makes_another_grid_and_is_in_its_name(tmp_path):
    for at, (seed, level) in enumerate(itertools.product((0, 1), LEVELS)):
        cell(tmp_path / f"{at}", level, "neutral", f"completer.seed={seed}", by=f"{level} {seed}")
    made, _, _ = found(tmp_path)
    assert [grid.name for grid in made] == [f"{GRID} completer.seed={seed}" for seed in (0, 1)]


def test_the_same_names_in_two_concepts_are_not_one_grid(tmp_path):
    pairs = [("positive", "positive"), ("negative", "positive")]
    for at, (concept, pair) in enumerate(itertools.product(("liking_math", "liking_poetry"), pairs)):
        cell(tmp_path / f"{at}", *pair, f"concept=[{concept}]")
    made, _, _ = found(tmp_path)
    assert [grid.name for grid in made] == [f"{GRID} concept.name={name}" for name in ("liking_math", "liking_poetry")]
    assert [len(grid.cells) for grid in made] == [2, 2]


def test_a_sweep_without_conditions_has_no_grid(undrawn, tmp_path):
    for at, name in enumerate("ab"):
        cell(tmp_path / f"{at}", None, None, f"model.name={name}", "concept=[]")
    result = compared(tmp_path)
    assert not list(result.out.glob("condition*"))
    assert "by condition" not in result.printed
    assert "<h2>Conditions" not in (result.out / "report.html").read_text()


def test_a_system_prompt_of_ones_own_is_no_level(tmp_path):
    cell(tmp_path / "0", None, "positive", "completer.system_prompt=Hello.")
    cell(tmp_path / "1", None, "negative", "completer.system_prompt=Hello.")
    cell(tmp_path / "2", None, "negative", "completer.system_prompt=Goodbye.")
    made, _, _ = found(tmp_path)
    assert [list(grid.cells) for grid in made] == [[("no condition", "positive"), ("no condition", "negative")]]


# Tasks and ratings that are not all there


def test_tasks_missing_in_some_cells_are_left_out_and_counted(undrawn, tmp_path):
    for at, pair in enumerate(PAIRS):
        first = 5 if pair == ("neutral", "neutral") else 0
        cell(tmp_path / f"{at}", *pair, first=first, tasks=TASKS - first, mean=means(*pair)[first:])
    result = compared(tmp_path)
    y = np.stack([means(*pair)[5:] for pair in PAIRS], axis=1).reshape(-1, 3, 3)
    row = of(result.table("condition_effects"), of="rating", contrast="positive − negative", ratings="exact")
    assert (row["n"], row["left_out"]) == (TASKS - 5, 5)
    assert row["points"] == pytest.approx((y[:, :, 0] - y[:, :, 2]).mean())
    assert f"{GRID}: effects are without 5 tasks that lack a rating in some cell." in result.remarks
    table = (
        result.table("conditions").query("origin == 'ALL' and ratings == 'exact'").set_index(["completing", "rating"])
    )
    assert table.loc[("neutral", "neutral"), "n"] == TASKS - 5
    assert table.loc[("neutral", "positive"), "n"] == TASKS


def test_all_ratings_equal(tmp_path):
    for at, pair in enumerate(PAIRS[:2] + PAIRS[3:5]):
        cell(tmp_path / f"{at}", *pair, mean=np.full(12, 4.0), tasks=12)
    result = compared(tmp_path)
    effects = result.table("condition_effects").query("ratings == 'exact'")
    assert set(effects["points"]) == {0}
    assert effects["standardised"].isna().all()
    assert "tasks do not differ" in set(effects["standardised_reason"])
    assert set(result.table("condition_shares")["share_reason"]) == {"no variation within tasks"}
    assert "neither context clearly dominates" in "\n".join(result.remarks)
    assert (result.out / "figures" / "conditions.png").exists()


@pytest.mark.parametrize("tasks", [1, 2])
def test_few_tasks(tmp_path, tasks):
    for at, pair in enumerate(PAIRS[:2]):
        cell(tmp_path / f"{at}", *pair, tasks=tasks)
    result = compared(tmp_path)
    assert set(result.table("condition_effects")["points_reason"]) == {"fewer than 3 tasks with all their ratings"}
    assert set(result.table("conditions").query("origin == 'ALL'")["n"]) == {tasks}
    assert "what the condition of rating does is not known (fewer than 3 tasks" in "\n".join(result.remarks)
    assert (result.out / "figures" / "conditions.png").exists()


def test_sampled_ratings_alone(undrawn, tmp_path):
    jobs = sweep(tmp_path, "rating.exact=false", pairs=CORNERS)
    result = compared(tmp_path)
    assert set(result.table("conditions")["ratings"]) == {"sampled"}
    row = of(result.table("condition_effects"), of="rating", contrast="positive − negative")
    y = {pair: np.nanmean(job.sampled[KEY], axis=1) for pair, job in jobs.items()}
    assert row["points"] == pytest.approx(np.mean([y[c, "positive"] - y[c, "negative"] for c in LEVELS[::2]]))
    assert f"{GRID}: means over seeds by condition" in result.printed


def test_no_sampled_seeds(undrawn, tmp_path):
    sweep(tmp_path, "rating.seeds=[]", pairs=CORNERS)
    result = compared(tmp_path)
    assert set(result.table("conditions")["ratings"]) == {"exact"}
    assert not [line for line in result.remarks if line.startswith("Sampled ratings by condition")]


def test_no_resamples_give_no_verdict(undrawn, tmp_path):
    sweep(tmp_path, "stats.bootstrap=0", pairs=CORNERS)
    (said,) = [line for line in compared(tmp_path).remarks if line.startswith(f"{GRID}: being")]
    assert "without intervals (stats.bootstrap=0) there is no saying which dominates." in said


def test_completions_that_are_not_shared_are_said(undrawn, tmp_path):
    for at, pair in enumerate(PAIRS):
        cell(tmp_path / f"{at}", *pair, by=f"{pair[0]} {at}" if pair[0] == "neutral" else None)
    said = f"{GRID}: cells completed under neutral rated different completions"
    assert [line for line in compared(tmp_path).remarks if line.startswith(GRID) and said in line]


def test_two_data_sets_have_no_tasks_in_common_but_whole_grids(tmp_path):
    for at, (name, pair) in enumerate(itertools.product("ab", CORNERS[:2])):
        first = 0 if name == "a" else 100
        cell(tmp_path / f"{at}", *pair, f"dataset.name={name}", first=first, tasks=10)
    made, _, _ = found(tmp_path)
    assert [(grid.name, len(grid.cells), len(grid.tasks)) for grid in made] == [
        (f"{GRID} dataset.name={name}", 2, 10) for name in "ab"
    ]


# Steering


DOSES = (-4, -2, 0, 2, 4)


def steered(folder: Path, pair: tuple[str, str], slope: float, layers: Sequence[int] = (15,)) -> None:
    """Ratings that a vector moves by `slope` a unit, up to doses of 2; a random one moves them by a tenth of it."""
    doses = []
    for layer, (name, control, times) in itertools.product(
        layers, (("liking_math", "concept", 1.0), ("random 0", "random", -0.1), ("random 1", "random", 0.05))
    ):
        for dose in DOSES:
            mean = float(means(*pair).mean()) + times * slope * dose
            row = {"vector": name, "control": control, "layer": layer, "coefficient": dose, "mean": mean}
            doses.append(row | {"coherent": abs(dose) <= 2})
    steer(folder / KEY, doses)


@pytest.fixture(scope="module")
def steered_sweep(tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("multirun") / "10-00-00"
    for at, pair in enumerate(PAIRS):
        cell(folder / f"{at}", *pair)
        steered(folder / f"{at}", pair, slope=0.2 if pair[1] == "neutral" else 0.1)
    return compared(folder)


def test_the_table_of_steering_has_conditions_and_slopes(steered_sweep):
    table = steered_sweep.table("steering")
    assert len(table) == 9 * 3
    row = of(table, completing="positive", rating="neutral", vector="liking_math")
    assert (row["control"], row["layer"], row["doses"], row["n"]) == ("concept", 15, 3, 8)
    assert (row["slope"], row["slope_low"]) == (pytest.approx(0.2), pytest.approx(0.19))
    assert (row["delta_minus"], row["delta_plus"]) == (pytest.approx(-0.4), pytest.approx(0.4))
    assert row["null_slope"] == pytest.approx(0.02)
    assert "Steering: rating points a unit of the coefficient" in steered_sweep.printed
    assert ".20 [.19, .21]" in steered_sweep.printed
    assert "Slopes and changes" in (steered_sweep.out / "report.html").read_text()
    assert (steered_sweep.out / "figures" / "steering.png").exists()


def test_curves_are_panels_of_rating_and_lines_of_completing(steered_sweep):
    found = read_sweep([steered_sweep.out.parent])
    read, remarks = read_steered(found)
    assert remarks == ()
    ((title, table),) = dose_tables(read, grids(found.cells)).items()
    assert title == f"{GRID}\nliking_math, layer 15"
    assert list(dict.fromkeys(table["panel"])) == [f"rated: {name}" for name in LEVELS]
    assert list(dict.fromkeys(table["line"])) == [f"completed: {name}" for name in LEVELS]
    assert len(table) == 9 * len(DOSES)
    assert set(table["control"]) == {"concept"}


def test_without_a_grid_a_line_is_a_cell(tmp_path):
    for at, name in enumerate("ab"):
        cell(tmp_path / f"{at}", None, None, f"model.name={name}")
        steered(tmp_path / f"{at}", ("neutral", "neutral"), 0.1, layers=(15, 23))
    found = read_sweep([tmp_path])
    read, _ = read_steered(found)
    tables = dose_tables(read, grids(found.cells))
    assert list(tables) == [f"{KEY}\nliking_math, layer {layer}" for layer in (15, 23)]
    assert [set(each["line"]) for each in tables.values()] == [{f"a-{KEY}", f"b-{KEY}"}] * 2
    assert set(steering_table(read)["completing"]) == {"no condition"}


@pytest.mark.parametrize("name", ["steering_doses.parquet", "steering_slopes.parquet"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other", "no rows"])
def test_damaged_steering_is_named_and_left_out(undrawn, tmp_path, name, damage):
    for at, pair in enumerate(PAIRS[:2]):
        cell(tmp_path / f"{at}", *pair)
        steered(tmp_path / f"{at}", pair, 0.1)
    path = tmp_path / "1" / KEY / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "other":
        pd.DataFrame({"x": [1]}).to_parquet(path)
    else:
        pd.read_parquet(path).iloc[:0].to_parquet(path)
    result = compared(tmp_path)
    (said,) = [line for line in result.remarks if "its steered ratings are left out" in line]
    assert said.startswith(f"{GRID} rating.condition=neutral: ")
    assert str(path) in said
    assert set(result.table("steering")["rating"]) == {"positive"}


def test_a_job_that_should_have_steered_but_has_no_files_is_named(undrawn, tmp_path):
    cell(tmp_path / "0", None, None, "steering=concept")
    (said,) = [line for line in compared(tmp_path).remarks if "its steered ratings are left out" in line]
    assert "steering_doses.parquet" in said


def test_the_same_cell_steered_in_two_ways_counts_once_with_both(undrawn, tmp_path):
    for at, layer in enumerate((7, 15)):
        cell(tmp_path / f"{at}", None, None, "steering=concept", f"steering.layers=[{layer}]")
        steered(tmp_path / f"{at}", ("neutral", "neutral"), 0.1, layers=(layer,))
    result = compared(tmp_path)
    assert len(result.table("cells").query("origin == 'ALL'")) == 1
    table = result.table("steering").query("control == 'concept'")
    assert sorted(zip(table["cell"], table["layer"], strict=True)) == [
        (f"{GRID} steering.layers=[15]", 15),
        (f"{GRID} steering.layers=[7]", 7),
    ]
