"""Figures, from frames as a run has them and from frames with nothing in them; read off their artists."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from prefs.results import drawing
from prefs.results import figures as plots

HOSTILE = ("$x_{", "<|im_end|>" * 9, "名前")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws to a file, checks that it is a picture, and returns the figure it was saved from."""
    saved: list[Figure] = []
    save = drawing.save
    monkeypatch.setattr(drawing, "DPI", 40)  # drawn in less time
    monkeypatch.setattr(drawing, "save", lambda figure, path: saved.append(figure) or save(figure, path))

    def draw(plot, **named) -> Figure:
        path = plot(tmp_path / "made" / "f.png", title="A title", **named)
        with Image.open(path) as picture:
            assert min(picture.size) > 80
            assert len(picture.convert("L").getcolors()) > 2
        return saved[-1]

    return draw


def labels(figure: Figure) -> list[str]:
    return [text.get_text().strip("\u200b") for legend in figure.legends for text in legend.get_texts()]


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


def predictions(targets=("exact", "seed"), n=300) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    measured = rng.normal(3, 1, size=n * len(targets))
    return pd.DataFrame(
        {
            "target": np.repeat(targets, n),
            "origin": [f"_o{row % 10}" for row in range(len(measured))],
            "measured": measured,
            "predicted": 0.5 * measured + rng.normal(1.5, 0.3, size=len(measured)),
        }
    )


def by_condition(**values: np.ndarray) -> dict[str, pd.DataFrame]:
    """Values by violin, the same in both rows and panels, with their means."""
    keys = list(itertools.product(("exact", "sampled"), ("rated: a", "rated: b"), values.items()))
    parts, means = [], []
    for row, panel, (name, of_violin) in keys:
        named = {"row": row, "panel": panel, "violin": name}
        parts.append(pd.DataFrame({**named, "value": of_violin}))
        mean = np.nanmean(of_violin) if np.isfinite(of_violin).any() else np.nan
        means.append({**named, "n": len(of_violin), "mean": mean, "mean_low": mean - 0.2, "mean_high": mean + 0.1})
    return {"table": pd.concat(parts), "means": pd.DataFrame(means)}


def doses(panels=("layer 3", "layer 9"), lines=("vector", "random")) -> pd.DataFrame:
    rows = [
        {"panel": panel, "line": line, "coefficient": dose, "mean": 3 + 0.1 * dose * (line == "vector")}
        for panel, line, dose in itertools.product(panels, lines, (4.0, -4.0, -1.0, 0.0, 1.0))
    ]
    table = pd.DataFrame(rows)
    table = table.assign(coherent=table["coefficient"].abs() < 4)
    return table.assign(mean_low=table["mean"] - 0.2, mean_high=table["mean"] + 0.1)


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize(
    ("plot", "tables", "names"),
    [
        (plots.probe_by_layer, {"table": by_layer(layers=(3,))}, ("target", "position")),
        (plots.origins_held_out, {"table": held_out()}, ("target", "origin")),
        (plots.origins_held_out, {"table": held_out().iloc[[1]]}, ("target", "origin")),  # nothing but a reason
        (plots.predicted_against_measured, {"table": predictions(n=9)}, ("target", "origin")),
        (plots.violins, by_condition(a=np.arange(9.0), b=np.arange(9.0), c=np.arange(2.0)), ("row", "panel", "violin")),
        (plots.dose_response, {"table": doses()}, ("panel", "line")),
    ],
)
def test_names_are_drawn_as_they_are_written_and_nothing_is_drawn_too(drawn, plot, tables, names):
    table = tables["table"]
    given = {name: dict(zip(dict.fromkeys(table[name]), itertools.cycle(HOSTILE))) for name in names}
    written = {
        key: frame.assign(**{name: frame[name].map(given[name]) for name in names}) for key, frame in tables.items()
    }
    figure = drawn(plot, **written)
    shown = {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    assert any(HOSTILE[0] in text for text in shown)
    drawn(plot, **{key: frame.iloc[:0] for key, frame in tables.items()})


def test_a_panel_a_position_and_a_line_a_target(drawn):
    table = by_layer()
    figure = drawn(plots.probe_by_layer, table=table.sample(frac=1, random_state=0), metric="AUC")
    assert {axes.get_title() for axes in figure.axes} == {"prompt", "answer"}
    assert figure.axes[0].get_ylabel() == "held-out AUC"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    for axes in figure.axes:
        for target in ("exact", "one seed"):
            rows = table[(table["target"] == target) & (table["position"] == axes.get_title())]
            (line,) = [line for line in axes.lines if line.get_label() == f"{target} (n = 100–101)"]
            assert list(line.get_xdata()) == [0, 7, 14]
            np.testing.assert_allclose(line.get_ydata(), rows["score"])
        assert len(axes.collections) == 4  # an interval and a null band for each target
    assert sorted(labels(figure)) == sorted(
        ["95 % of shuffled targets"]
        + [f"{target}: noise ceiling, {level}" for target, level in (("exact", "0.90"), ("one seed", "0.40"))]
        + [f"{target}: mean of the origin, 0.10" for target in ("exact", "one seed")]
        + [f"{target} (n = 100–101)" for target in ("exact", "one seed")]
    )


def test_origins_held_out(drawn):
    figure = drawn(plots.origins_held_out, table=held_out(), metric="AUC")
    (axes,) = figure.axes
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["MATH\nn = 29–30", "ALPACA\nn = 1", "WILDCHAT\nn = 20"]
    bars = {bars.get_label(): bars.patches for bars in axes.containers if hasattr(bars, "patches")}
    heights = {name: [bar.get_height() for bar in patches] for name, patches in bars.items()}
    np.testing.assert_equal(heights["exact: trained on other origins only"], [0.4, np.nan, np.nan])
    np.testing.assert_equal(heights["exact: trained on this origin too (k-fold)"], [0.6, np.nan, np.nan])
    np.testing.assert_equal(heights["seed: trained on other origins only"], [-7.31, np.nan, 0.1])
    assert texts(figure) == ["few tasks", "−7.3"]
    assert axes.get_ylim() == pytest.approx((-1.05, 1.05))


def test_predicted_against_measured(drawn):
    table = predictions()
    table.loc[4, "measured"] = np.nan
    figure = drawn(plots.predicted_against_measured, table=table)
    known = table.iloc[:300].dropna()
    r2 = 1 - ((known["measured"] - known["predicted"]) ** 2).sum() / (known["measured"].var(ddof=0) * len(known))
    r = known["measured"].corr(known["predicted"])
    assert figure.axes[0].get_title() == f"exact\nR² = {r2:.2f}, r = {r:.2f}, n = 299"
    points = figure.axes[0].collections
    assert sum(len(origin.get_offsets()) for origin in points) == 299
    (line,) = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert labels(figure) == [f"_o{number}" for number in range(10)]


def test_a_panel_a_condition_and_a_violin_of_each_distribution(drawn):
    spread = np.random.default_rng(0).normal(3, 1, size=50)
    tables = by_condition(love=spread, hate=np.append(spread - 1, np.nan))
    figure = drawn(plots.violins, **tables, label="written under")
    assert [axes.get_title() for axes in figure.axes] == ["rated: a", "rated: b"] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["exact", "", "sampled", ""]
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["love\nn = 50", "hate\nn = 50"]
        love, _ = (body for body in axes.collections if isinstance(body, PolyCollection))
        heights = [(paths.vertices[:, 1].min(), paths.vertices[:, 1].max()) for paths in love.get_paths()]
        assert heights == [pytest.approx((spread.min(), spread.max()))]
        dots = [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
        assert dots == pytest.approx([spread.mean(), spread.mean() - 1])
        assert axes.get_ylim() == figure.axes[0].get_ylim()


def test_dose_response(drawn):
    figure = drawn(plots.dose_response, table=doses(), dose="× the vector")
    assert [axes.get_title() for axes in figure.axes] == ["layer 3", "layer 9"]
    assert figure.axes[0].get_xlabel() == "× the vector"
    assert labels(figure) == ["vector", "random", "not coherent"]
    for axes in figure.axes:
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        hollow = [line for line in dots if line.get_markerfacecolor() == "white"]
        filled = [line for line in dots if line not in hollow]
        assert [list(line.get_xdata()) for line in filled] == [[-1, 0, 1]] * 2
        assert [list(line.get_xdata()) for line in hollow][:2] == [[-4, 4]] * 2
        np.testing.assert_allclose(filled[0].get_ydata(), [2.9, 3.0, 3.1])
        np.testing.assert_allclose(axes.collections[0].get_segments()[0][:, 1], [2.4, 2.7])


def test_transfer(drawn):
    rows = [("b", "b", 0.91), ("b", "a", 0.4), ("a", "b", np.nan), ("a", "a", -0.25), ("b", HOSTILE[0], 0.0)]
    figure = drawn(plots.transfer, table=pd.DataFrame(rows, columns=["trained_on", "tested_on", "r"]))
    axes, bar = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("trained on", "tested on")
    assert bar.get_ylabel() == "r of prediction and target"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["b", "a", HOSTILE[0]]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.91", (1, 0): "0.40", (2, 0): "0.00", (0, 1): "–", (1, 1): "-0.25", (2, 1): "–"}
