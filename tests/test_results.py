"""What one `Result` is in each medium: the terminal, files, and an offline W&B run."""

from __future__ import annotations

import math
import time
from pathlib import Path

import offline_wandb
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from prefs.config import WandbConfig
from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.errors import UserError
from prefs.results.answers import cut_off
from prefs.results.files import LONGEST, plain, write
from prefs.results.result import Artifact, Figure, Result, Series, Table, View, joined
from prefs.results.stability import share_remarks
from prefs.results.terminal import number, show
from prefs.results.wandb import tracker
from prefs.stages.records import Answer, Completion

FRAME = pd.DataFrame({"origin": ["MATH", "ALL"], "r": [0.5, None], "r_reason": [None, "few tasks"]})


def save(folder: Path) -> list[Path]:
    (folder / "vector").mkdir()
    (folder / "vector" / "card.json").write_text("{}")
    return [folder / "vector" / "card.json"]


RESULT = Result(
    title="Correlations",
    tables=(Table("scores", FRAME), Table("predictions", FRAME, large=True)),
    views=(View("A view", ["origin", "r"], [["MATH", ".50"], ["ALL"]], bold=frozenset({1}), gaps=frozenset({0})),),
    figures=(Figure("r/by origin", lambda path: save_png(path)),),
    remarks=("Beware of [markup].",),
    metrics={"r/MATH": 0.5, "r/ALL": math.nan, "r/NONE": None},
    series=(Series("layer", pd.DataFrame({"layer": [3, 7], "score": [0.1, None]})),),
    artifacts=(Artifact("a vector", "concept", save, {"model": "m"}),),
)


def save_png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def finished(folder: Path | None) -> offline_wandb.OfflineRun:
    """An offline run, once W&B's own process has written all of it."""
    assert folder is not None
    deadline = time.monotonic() + 60
    while (run := offline_wandb.read(folder)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return run


def printed(result: Result, width: int = 60) -> str:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        show(console, result, title="A job")
    return captured.get()


def test_views_and_remarks_are_printed_in_their_order():
    lines = [line.rstrip() for line in printed(joined([RESULT, Result(remarks=("And of this.",))])).splitlines()]
    assert lines[1].startswith("A job ──")
    assert lines[2:] == [
        "A view", "", " origin     r", " ────────────", " MATH     .50", "", " ALL", "",
        "• Beware of [markup].", "• And of this.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.871, ".87"), (-0.05, "−.05"), (1, "1.00"), (-0.001, ".00"), (math.nan, "–"), (None, "–"), (-12.5, "−12.50")],
)
def test_numbers_are_printed_as_papers_print_them(value, text):
    assert number(value) == text


def test_files_and_wandb_have_what_there_is(tmp_path):
    written = write(RESULT, tmp_path)
    for name in ("scores", "predictions"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), FRAME)
        assert (tmp_path / f"{name}.csv").read_text().splitlines()[1] == "MATH,0.5,"
    assert written.figures == {"r/by origin": tmp_path / "figures" / f"{plain('r/by origin')}.png"}
    with tracker(WandbConfig(mode="offline"), name="a cell", group="g", folder=tmp_path, run_config={}) as track:
        track.log(RESULT, written)
    assert track.offline
    run = finished(track.folder)
    logged = {key for row in run.history for key in row}
    assert {"tables/scores", "figures/r/by origin"} <= logged
    assert "tables/predictions" not in logged
    assert (run.name, run.group, run.exit_code, run.summary["r/MATH"]) == ("a cell", "g", 0, 0.5)
    assert not {"r/ALL", "r/NONE"} & set(run.summary)
    layers = [{name: row[name] for name in ("layer", "score") if name in row} for row in run.history if "layer" in row]
    assert layers == [{"layer": 3, "score": 0.1}, {"layer": 7}]
    assert ("concept", "a-vector") in run.artifacts


def test_a_run_that_raises_is_marked_as_failed(tmp_path):
    with (
        pytest.raises(KeyError),
        tracker(WandbConfig(mode="offline"), name="n", group=None, folder=tmp_path, run_config={}) as track,
    ):
        raise KeyError
    assert finished(track.folder).exit_code == 1


def test_a_disk_that_refuses_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/scores: File exists"):
        write(RESULT, tmp_path / "file")


@pytest.mark.parametrize("name", ["a/b", "..\\c", "名前", "x" * 300])
def test_a_figure_has_a_file_whatever_its_name(name):
    assert plain(name) != plain(name + "!")
    assert len(plain(name)) <= LONGEST
    assert plain(plain(name)) == plain(name)
    assert not set(plain(name)) & set("/\\ ")


def test_completions_that_were_cut_off_are_told():
    made = [Completion(Task(f"t{n}", "?"), "text", finished=n < 3) for n in range(8)]
    made += [Completion(Task("blocked", "?"), None, finished=False, reason=Invalid.blocked)]
    assert cut_off(made, "smollm2", 64) == [
        "5 of 8 completions (62%) were cut off at 64 tokens (completer.max_new_tokens; model.completion_tokens of"
        " smollm2): what is rated is their beginning."
    ]
    assert cut_off(made[:3], "smollm2", 64) == []


@pytest.mark.parametrize(
    ("valid", "answers", "mass", "told"),
    [
        (55, 100, 0.99, True),
        (99, 100, 0.4, True),
        (95, 100, 0.9, False),  # within .1
        (7, 10, 0.99, False),  # too few to say
        (18, 25, 0.9, False),  # within three standard errors
        (0, 0, 0.99, False),
    ],
)
def test_a_valid_mass_that_sampled_answers_do_not_bear_out_is_told_with_both_numbers(valid, answers, mass, told):
    read = [Answer(0, "4", 4.0, None)] * valid + [Answer(0, "No.", None, Invalid.no_option)] * (answers - valid)
    unasked = [Answer(0, None, None, Invalid.too_long)] * 50
    remarks = share_remarks([(answer,) for answer in [*read, *unasked]], mass)
    assert bool(remarks) == told
    if told:
        assert f"Valid mass is {number(mass)}, but {number(valid / answers)} of the sampled answers" in remarks[0]
    assert share_remarks([], mass) == share_remarks([(read[0],)] if read else [], None) == []
