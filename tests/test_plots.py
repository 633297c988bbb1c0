"""The figures of probes, from frames as a run has them and from frames with nothing in them; read off their artists."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from prefs.results import drawing
from prefs.results import figures as plots

HOSTILE = ("$x_{", "<|im_end|>" * 9, "名前")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(drawing, "DPI", 40)  # drawn in less time


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws to a file, checks that it is a picture, and returns the figure it was saved from."""
    saved: list[Figure] = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: saved.append(figure) or save(figure, path))

    def draw(plot, **named) -> Figure:
        path = plot(tmp_path / "made" / "f.png", title="A title", **named)
        with Image.open(path) as picture:
            assert min(picture.size) > 80
            assert len(picture.convert("L").getcolors()) > 2
        return saved[-1]

    return draw


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def by_layer(targets=("exact", "one seed"), positions=("prompt", "answer"), layers=(0, 7, 14)) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for target, position, layer in itertools.product(targets, positions, layers):
        score = rng.uniform(-0.2, 0.6)
        row = {"target": target, "position": position, "layer": layer, "n": 100 + (position == "answer")}
        row |= {"score": score, "score_low": score - 0.1, "score_high": score + 0.1}
        row |= {"null_low": -0.2, "null_high": 0.05}
        rows.append(row | {"ceiling": 0.9 - 0.5 * (target != targets[0]), "origin_mean": 0.1})
    return pd.DataFrame(rows)


def test_a_panel_a_position_and_a_line_a_target(drawn):
    table = by_layer()
    figure = drawn(plots.probe_by_layer, table=table.sample(frac=1, random_state=0), metric="AUC")
    assert {axes.get_title() for axes in figure.axes} == {"prompt", "answer"}
    assert figure.axes[0].get_ylabel() == "held-out AUC"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    for axes in figure.axes:
        for target in ("exact", "one seed"):
            rows = table[(table["target"] == target) & (table["position"] == axes.get_title())]
            (line,) = [each for each in axes.lines if each.get_label() == f"{target} (n = 100–101)"]
            assert list(line.get_xdata()) == [0, 7, 14]
            np.testing.assert_allclose(line.get_ydata(), rows["score"])
        assert len(axes.collections) == 4  # an interval and a null band for each target
    assert sorted(labels(figure)) == sorted(
        ["95 % of shuffled targets"]
        + [f"{target}: noise ceiling, {level}" for target, level in (("exact", "0.90"), ("one seed", "0.40"))]
        + [f"{target}: mean of the origin, 0.10" for target in ("exact", "one seed")]
        + [f"{target} (n = 100–101)" for target in ("exact", "one seed")]
    )


def test_what_is_not_known_is_not_drawn(drawn):
    table = by_layer(targets=("exact",), positions=("answer",))
    table[["null_low", "null_high", "ceiling"]] = np.nan
    table.loc[1, ["score", "score_low", "score_high"]] = np.nan
    figure = drawn(plots.probe_by_layer, table=table)
    assert labels(figure) == ["exact (n = 101)", "exact: mean of the origin, 0.10"]
    table[["score", "score_low", "score_high", "n", "origin_mean"]] = np.nan
    assert drawn(plots.probe_by_layer, table=table).axes[0].get_ylim() == pytest.approx((-0.05, 1.05))
    drawn(plots.probe_by_layer, table=table.astype({"score": object}).iloc[:0])


@pytest.mark.parametrize(("lowest", "bottom"), [(0.3, -0.05), (-0.4, -0.49), (-300.0, -1.05), (-np.inf, -0.05)])
def test_a_probe_far_worse_than_the_mean_does_not_hide_the_others(drawn, lowest, bottom):
    table = by_layer(targets=("exact",), positions=("answer",)).assign(score=0.5)
    table.loc[0, "score"] = lowest
    assert drawn(plots.probe_by_layer, table=table).axes[0].get_ylim() == pytest.approx((bottom, 1.05))


@pytest.mark.parametrize("positions", [1, 4, 7])
def test_names_are_drawn_as_they_are_written(drawn, positions):
    names = [f"{HOSTILE[at % 3]}{at}" for at in range(positions)]
    figure = drawn(plots.probe_by_layer, table=by_layer(targets=HOSTILE, positions=names, layers=(3,)))
    assert [axes.get_title() for axes in figure.axes] == names


def held_out() -> pd.DataFrame:
    numbers = ["score", "score_low", "score_high", "within"]
    rows = [
        ("exact", "MATH", 30, 0.4, 0.2, 0.5, 0.6, None),
        ("exact", "ALPACA", 1, None, None, None, None, "few tasks"),
        ("seed", "MATH", 29, -7.31, -9.0, -6.0, -0.1, None),
        ("seed", "WILDCHAT", 20, 0.1, None, None, 0.3, None),
    ]
    table = pd.DataFrame(rows, columns=["target", "origin", "n", *numbers, "score_reason"])
    return table.astype(dict.fromkeys(numbers, float))


def test_origins_held_out(drawn):
    figure = drawn(plots.origins_held_out, table=held_out(), metric="AUC")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "MATH\nn = 29–30",
        "ALPACA\nn = 1",
        "WILDCHAT\nn = 20",
    ]
    bars = {bars.get_label(): bars for bars in axes.containers if hasattr(bars, "patches")}
    heights = {name: [bar.get_height() for bar in each.patches] for name, each in bars.items()}
    np.testing.assert_equal(heights["exact: trained on other origins only"], [0.4, np.nan, np.nan])
    np.testing.assert_equal(heights["exact: trained on this origin too (k-fold)"], [0.6, np.nan, np.nan])
    np.testing.assert_equal(heights["seed: trained on other origins only"], [-7.31, np.nan, 0.1])
    # Four bars an origin, beside each other; one colour a target; hatched where the origin was trained on.
    places = sorted(bar.get_x() for each in bars.values() for bar in each.patches[:1])
    assert np.diff(places) == pytest.approx(np.full(3, 0.2))
    for at, target in enumerate(("exact", "seed")):
        alone, within = (
            bars[f"{target}: trained on other origins only"],
            bars[f"{target}: trained on this origin too (k-fold)"],
        )
        assert to_hex(alone.patches[0].get_facecolor()) == to_hex(within.patches[0].get_edgecolor())
        assert to_hex(alone.patches[0].get_facecolor()) == drawing.COLOURS[at].lower()
        assert (alone.patches[0].get_hatch(), within.patches[0].get_hatch()) == (None, "///")
    assert texts(figure) == ["few tasks", "−7.3"]
    assert axes.get_ylim() == pytest.approx((-1.05, 1.05))


@pytest.mark.filterwarnings("error:constrained_layout")
def test_no_origin_with_a_score(drawn):
    table = held_out().iloc[[1]]
    assert texts(drawn(plots.origins_held_out, table=table)) == ["few tasks"]
    drawn(plots.origins_held_out, table=table.iloc[:0])
    drawn(
        plots.origins_held_out, table=table.assign(origin=HOSTILE[0], target=HOSTILE[1], score_reason=HOSTILE[2] * 99)
    )


def test_predicted_against_measured(drawn):
    rng = np.random.default_rng(1)
    measured = rng.normal(3, 1, size=(2, 300))
    table = pd.DataFrame(
        {
            "target": np.repeat(["exact", "seed"], 300),
            "origin": np.tile([f"_o{at}" for at in range(10)], 60),
            "measured": measured.ravel(),
            "predicted": 0.5 * measured.ravel() + rng.normal(1.5, 0.3, size=600),
        }
    )
    table.loc[4, "measured"] = np.nan
    figure = drawn(plots.predicted_against_measured, table=table)
    seen = table.iloc[:300].dropna()
    r2 = 1 - ((seen["measured"] - seen["predicted"]) ** 2).sum() / (seen["measured"].var(ddof=0) * len(seen))
    r = seen["measured"].corr(seen["predicted"])
    assert figure.axes[0].get_title() == f"exact\nR² = {r2:.2f}, r = {r:.2f}, n = 299"
    points = figure.axes[0].collections
    assert sum(len(each.get_offsets()) for each in points) == 299
    looks = {(to_hex(each.get_facecolor()[0]), len(each.get_paths()[0].vertices)) for each in points}
    assert len(looks) == 10
    assert all(each.get_rasterized() for each in points)
    (line,) = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert [label.strip("\u200b") for label in labels(figure)] == [f"_o{at}" for at in range(10)]


def test_more_points_are_lighter_and_smaller(drawn):
    def look(n):
        values = np.random.default_rng(0).normal(size=(2, n))
        table = pd.DataFrame({"target": "t", "origin": "o", "measured": values[0], "predicted": values[1]})
        (points,) = drawn(plots.predicted_against_measured, table=table).axes[0].collections
        return points.get_alpha(), points.get_sizes()[0]

    few, many, most = look(50), look(2_000), look(30_000)
    assert few > many >= most
    assert most[0] >= 0.3
    assert few[1] > many[1] > most[1]


def test_nothing_to_correlate_is_a_dash(drawn):
    table = pd.DataFrame(
        {
            "target": ["flat", "flat", "flat", "still", "still", "still", "two", "two", "none"],
            "origin": "o",
            "measured": [2.0, 2.0, 2.0, 1.0, 2.0, 3.0, 1.0, 2.0, np.nan],
            "predicted": [1.0, 2.0, 3.0, 2.0, 2.0, 2.0, 1.0, 2.0, 1.0],
        }
    )
    figure = drawn(plots.predicted_against_measured, table=table)
    assert [axes.get_title() for axes in figure.axes] == [
        "flat\nR² = –, r = –, n = 3",
        "still\nR² = 0.00, r = –, n = 3",
        "two\nR² = –, r = –, n = 2",
        "none\nR² = –, r = –, n = 0",
    ]
    drawn(plots.predicted_against_measured, table=table.iloc[:0])


def by_condition(**values: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Values by violin, the same in both rows and panels, with their means."""
    keys = list(itertools.product(("exact", "sampled"), ("rated: a", "rated: b"), values.items()))
    parts, means = [], []
    for row, panel, (name, each) in keys:
        named = {"row": row, "panel": panel, "violin": name}
        parts.append(pd.DataFrame({**named, "value": each}))
        mean = np.nanmean(each) if np.isfinite(each).any() else np.nan
        means.append({**named, "n": len(each), "mean": mean, "mean_low": mean - 0.2, "mean_high": mean + 0.1})
    return pd.concat(parts), pd.DataFrame(means)


def test_a_panel_a_condition_and_a_violin_of_each_distribution(drawn):
    spread = np.random.default_rng(0).normal(3, 1, size=50)
    table, means = by_condition(love=spread, hate=np.append(spread - 1, np.nan))
    figure = drawn(plots.violins, table=table, means=means, label="written under")
    assert [axes.get_title() for axes in figure.axes] == ["rated: a", "rated: b"] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["exact", "", "sampled", ""]
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["love\nn = 50", "hate\nn = 50"]
        love, hate = (each for each in axes.collections if isinstance(each, PolyCollection))
        heights = [(paths.vertices[:, 1].min(), paths.vertices[:, 1].max()) for paths in love.get_paths()]
        assert heights == [pytest.approx((spread.min(), spread.max()))]
        assert to_hex(love.get_facecolor()[0]) == drawing.COLOURS[0].lower()
        assert to_hex(hate.get_facecolor()[0]) == drawing.COLOURS[1].lower()
        dots = [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
        assert dots == pytest.approx([spread.mean(), spread.mean() - 1])
        assert axes.get_ylim() == figure.axes[0].get_ylim()


@pytest.mark.parametrize(
    ("values", "lines"),
    [([3.0], 1), ([2.0, 4.0], 2), ([4.0] * 30, 1), ([4.0, 4.0 + 1e-12] * 10, 2), ([0.0] * 9, 1), ([np.nan] * 4, 0)],
)
def test_what_has_no_density_is_drawn_as_it_is(drawn, values, lines):
    table, means = by_condition(few=np.array(values))
    for axes in drawn(plots.violins, table=table, means=means).axes:
        (drawn_lines, *_) = axes.collections
        assert len(drawn_lines.get_segments()) == lines


def test_violins_of_names_as_they_are_written_and_of_nothing(drawn):
    table, means = by_condition(**{name: np.arange(9.0) for name in HOSTILE})
    drawn(plots.violins, table=table.assign(panel=HOSTILE[0], row=HOSTILE[1]), means=means.iloc[:0])
    drawn(plots.violins, table=table.iloc[:0], means=means.iloc[:0])


def doses(panels=("layer 3", "layer 9"), lines=("vector", "random")) -> pd.DataFrame:
    rows = [
        {"panel": panel, "line": line, "coefficient": dose, "mean": 3 + 0.1 * dose * (line == "vector")}
        for panel, line, dose in itertools.product(panels, lines, (4.0, -4.0, -1.0, 0.0, 1.0))
    ]
    table = pd.DataFrame(rows)
    table = table.assign(coherent=table["coefficient"].abs() < 4)
    return table.assign(mean_low=table["mean"] - 0.2, mean_high=table["mean"] + 0.1)


def test_dose_response(drawn):
    figure = drawn(plots.dose_response, table=doses(), dose="× the vector")
    assert [axes.get_title() for axes in figure.axes] == ["layer 3", "layer 9"]
    assert figure.axes[0].get_xlabel() == "× the vector"
    assert [label.strip("\u200b") for label in labels(figure)] == ["vector", "random", "not coherent"]
    for axes in figure.axes:
        filled, hollow = (
            [
                line
                for line in axes.lines
                if line.get_marker() == "o" and (line.get_markerfacecolor() == "white") == white
            ]
            for white in (False, True)
        )
        assert [list(line.get_xdata()) for line in filled] == [[-1, 0, 1]] * 2
        assert [list(line.get_xdata()) for line in hollow][:2] == [[-4, 4]] * 2
        np.testing.assert_allclose(filled[0].get_ydata(), [2.9, 3.0, 3.1])
        (reach, _) = (each.get_segments() for each in axes.collections[:2])
        np.testing.assert_allclose(reach[0][:, 1], [2.4, 2.7])
    together = doses().assign(coherent=True)
    assert "not coherent" not in labels(drawn(plots.dose_response, table=together))


def test_doses_that_are_not_there(drawn):
    table = doses()
    table.loc[0, "mean"] = np.nan
    table[["mean_low", "mean_high"]] = np.nan
    axes = drawn(plots.dose_response, table=table).axes[0]
    assert sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o") == 9
    drawn(plots.dose_response, table=table.assign(mean=np.nan))
    drawn(plots.dose_response, table=table.iloc[:0])
    drawn(plots.dose_response, table=doses(panels=HOSTILE, lines=[f"{HOSTILE[0]}{at}" for at in range(10)]))


def test_transfer(drawn):
    table = pd.DataFrame(
        [("b", "b", 0.91), ("b", "a", 0.4), ("a", "b", np.nan), ("a", "a", -0.25), ("b", HOSTILE[0], 0.0)],
        columns=["trained_on", "tested_on", "r"],
    )
    figure = drawn(plots.transfer, table=table)
    axes, bar = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("trained on", "tested on")
    assert bar.get_ylabel() == "r of prediction and target"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["b", "a", HOSTILE[0]]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {
        (0, 0): "0.91",
        (1, 0): "0.40",
        (2, 0): "0.00",
        (0, 1): "–",
        (1, 1): "-0.25",
        (2, 1): "–",
    }
    drawn(plots.transfer, table=table.iloc[:1])


def test_matrices_keep_their_label(drawn):
    figure = drawn(plots.matrices, panels={"one": pd.DataFrame([[1.0, 0.2], [0.2, 1.0]], ["a", "b"], ["a", "b"])})
    assert figure.axes[-1].get_ylabel() == "Pearson r over tasks"
