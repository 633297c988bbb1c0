"""Sweeps of simulated raters: what `prefs.run` would have written, with option probabilities that are known.

No model is loaded. Answers are drawn from the probabilities and read by the real templates; records, tables, configs
and ``multirun.yaml`` are written by the functions that write them in a run.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins import basic_sweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from hydra_app import shipped_configs
from matplotlib.figure import Figure
from omegaconf import OmegaConf, open_dict
from PIL import Image

from prefs.compare import compare
from prefs.config import JudgeConfig, ProbeConfig, with_prompts
from prefs.data.task import Task
from prefs.data.template import Invalid, Template
from prefs.job import StageCounts, recorded
from prefs.models.loading import Models
from prefs.models.types import Question, Sampling
from prefs.probes.outcome import NoProbe
from prefs.results import drawing, files
from prefs.results.answers import answers_table, completions_table, exact_table, thoughts_table
from prefs.stages.judge import judge
from prefs.stages.probe import Subject, probe, probe_result
from prefs.stages.records import Answer, Completion, Ratings, Residuals, Thoughts
from prefs.statistics.measured import Measured
from prefs.store.files import write_table
from prefs.store.table import Store

# Beside what a test gives: no figure of a job is simulated, and no probe if not asked for; few resamples are quick.
ALWAYS = ("completer=smollm2", "capture=none", "probe=none", "stats.bootstrap=20", "wandb.mode=disabled")
NO_ANSWER = "Hmm."


@dataclass(frozen=True)
class Simulated:
    """What one job was made of: the sampled ratings [T, S] and the options' probabilities [T, V], by template key."""

    folder: Path
    sampled: Mapping[str, np.ndarray]
    mass: Mapping[str, np.ndarray]

    def means(self, key: str) -> np.ndarray:
        """[T] exact means, by the formula."""
        mass = self.mass[key]
        return mass @ np.arange(1, mass.shape[1] + 1) / mass.sum(axis=1)


@functools.cache
def config(*overrides: str) -> Mapping[str, Any]:
    """The shipped config with overrides, as a job records it."""
    with shipped_configs():
        given = {override.partition("=")[0] for override in overrides}
        always = [override for override in ALWAYS if override.partition("=")[0] not in given]
        composed = compose("config", overrides=[*always, *overrides])
    plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return with_prompts({str(key): value for key, value in plain.items()})


def some_tasks(count: int, first: int = 0) -> list[Task]:
    """Tasks of two origins, the same ones for the same numbers."""
    return [Task(f"t{n}", f"Do number {n}.", ("ALPACA", "MATH")[n % 2]) for n in range(first, first + count)]


def completed(tasks: Sequence[Task], by: str = "Done") -> list[Completion]:
    """A completion of each task."""
    return [Completion(task, f"{by}: {task.prompt}") for task in tasks]


def around(means: np.ndarray, low: int = 1, high: int = 5, mass: float = 1.0) -> np.ndarray:
    """[T, V] probabilities of the whole numbers from `low` to `high` on the two next to each mean, with that mean."""
    options = np.arange(low, high + 1)
    return mass * np.clip(1 - np.abs(np.asarray(means)[:, None] - options), 0, None)


def simulate(
    folder: Path,
    overrides: Sequence[str],
    completions: Sequence[Completion],
    mass: Mapping[str, np.ndarray],
    *,
    group: str | None = None,
    draw: int = 0,
    config_only: Sequence[str] = (),
    error: BaseException | None = None,
    vectors: Mapping[str, np.ndarray] | None = None,
) -> Simulated:
    """Write the folder of a job whose templates `mass` gives the probabilities of.

    Probabilities [T, K, V] are of a rater that thinks, after each of K thoughts. ``draw`` is the seed of the sampled
    answers; `config_only` are overrides that the job's record does not name; with an `error` the job ends by it instead
    of writing anything. ``vectors`` [T, L, d] are what was captured at position ``rating`` of each template, of which
    probes are trained where the config wants them.
    """
    plain = config(f"template=[{','.join(mass)}]", *config_only, *overrides)
    random = np.random.default_rng(draw)
    sampled = {}
    with recorded(folder, plain, overrides, group) as counts:
        if error is not None:
            raise error
        store = Store.open(str(folder / "store"))
        refused = judge(
            _section(JudgeConfig, plain["judge"]), completions, model=None, store=store, models=Models()
        ).refused
        write_table(completions_table(completions, refused), folder / "completions")
        counts.add([StageCounts("completions", 0, len(completions))])
        for key, probabilities in mass.items():
            ratings = _ratings(plain, key, completions, probabilities, random)
            measured = ratings.measured(refused)
            tables = {"ratings": answers_table(ratings)}
            if measured.exact is not None:
                tables["exact"] = exact_table(measured)
            if ratings.thoughts is not None:
                tables["exact_by_thought"] = thoughts_table(ratings)
            for name, table in tables.items():
                write_table(table, folder / key / name)
            if vectors is not None:
                _probe(folder, plain, key, completions, ratings.sampling, measured, vectors[key])
            sampled[key] = measured.sampled
            answers = len(completions) * (len(ratings.seeds) + plain["rating"]["exact"])
            counts.add([StageCounts(f"sampled ratings, {ratings.template.name}", 1, answers - 1)])
    return Simulated(folder, sampled, mass)


def _section(kind: type, plain: Any) -> Any:
    """A part of a job's config as the code has it."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))


def _probe(
    folder: Path,
    plain: Mapping[str, Any],
    key: str,
    completions: Sequence[Completion],
    sampling: Sampling,
    measured: Measured,
    vectors: np.ndarray,
) -> None:
    """Probes of one template, trained and written as a job does it."""
    store, layers = Store.open(str(folder / "store")), range(vectors.shape[1])
    captured = store.vectors("residuals", {"template": key})
    keys = [captured.key(task=task) for task in measured.tasks]
    captured.append(keys, layers, torch.tensor(vectors, dtype=torch.float32), ())
    captured.refresh()
    prompts, texts = [made.task.prompt for made in completions], [made.text or "" for made in completions]
    residuals = [Residuals("rating", tuple(layers), keys, captured)]
    subject = Subject(key, measured, sampling, prompts, texts, residuals)
    report = probe(subject, _section(ProbeConfig, plain["probe"]), plain["stats"]["bootstrap"], [], store)
    if not isinstance(report, NoProbe):
        files.write(replace(probe_result(report, key), figures=()), folder / key)
        model = {"id": plain["model"]["path"], "revision": plain["model"]["revision"], "dtype": plain["model"]["dtype"]}
        report.save(folder / key / "probe", {"model": model, "config": plain["probe"]})


def _ratings(
    plain: Mapping[str, Any], key: str, completions: Sequence[Completion], mass: np.ndarray, random: np.random.Generator
) -> Ratings:
    template = _section(Template, plain["template"][key])
    exact, seeds = plain["rating"]["exact"], tuple(plain["rating"]["seeds"])
    thoughts = None
    if mass.ndim == 3:
        k = mass.shape[1]
        texts = [tuple(f"thought {n}" for n in range(k))] * len(completions)
        thoughts = Thoughts(tuple(range(k)), mass, texts, [(None,) * k] * len(completions))
        mass = mass.mean(axis=1)
    options = (*template.says, NO_ANSWER)
    answers = []
    for completion, row in zip(completions, mass, strict=True):
        if completion.text is None:
            answers.append([Answer(seed, None, None, Invalid.too_long) for seed in seeds])
            continue
        p = np.append(row, max(0.0, 1 - row.sum()))
        texts = [options[option] for option in random.choice(len(options), len(seeds), p=p / p.sum())]
        values = [template.read(text) for text in texts]
        answers.append(
            [
                Answer(seed, text, *((None, value) if isinstance(value, Invalid) else (value, None)))
                for seed, text, value in zip(seeds, texts, values, strict=True)
            ]
        )
    asked = np.array([[completion.text is not None] for completion in completions])
    return Ratings(
        template=template,
        question=Question(template.question, template.says),
        sampling=Sampling(1.0, 1.0, 8),
        completions=completions,
        seeds=seeds,
        answers=answers,
        mass=np.where(asked, mass, np.nan) if exact else None,
        thinks=thoughts is not None,
        thoughts=thoughts if exact else None,
    )


def steer(folder: Path, doses: Sequence[Mapping[str, Any]], left_out: int = 0) -> None:
    """Write the tables of a template's steered ratings (`folder`), from doses as dictionaries of their columns.

    What is not given of a dose is as of one that went well; slopes are fitted to the coherent doses, of 8 tasks.
    """
    usual = {"vector": "liking_math", "control": "concept", "layer": 15, "n": 8, "coherent": True, "reason": None}
    usual |= {"valid_mass": 1.0, "perplexity_ratio": 1.0, "invalid": 0.0, "delta_reason": None}
    rows = []
    for dose in doses:
        row = {**usual, **dose}
        row = {"mean_low": row["mean"] - 0.1, "mean_high": row["mean"] + 0.1, "norm_multiple": row["coefficient"]} | row
        rows.append(row | {"delta": row["mean"], "delta_low": row["mean"], "delta_high": row["mean"]})
    table = pd.DataFrame(rows)
    slopes = []
    for (vector, control, layer), of_vector in table.groupby(["vector", "control", "layer"], sort=False):
        coherent = of_vector.loc[of_vector["coherent"], :].sort_values(by="coefficient")
        slope = float(np.polyfit(coherent["coefficient"], coherent["mean"], 1)[0])
        at_none = float(np.interp(0, coherent["coefficient"], coherent["mean"]))
        row = {
            "vector": vector,
            "control": control,
            "layer": layer,
            "n": 8,
            "left_out": left_out,
            "doses": len(coherent),
        }
        deltas = {"delta_minus": coherent["mean"].iloc[0] - at_none, "delta_plus": coherent["mean"].iloc[-1] - at_none}
        for name, value in ({"slope": slope} | deltas).items():
            row |= {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.01, f"{name}_n": 8}
            row |= {f"{name}_reason": None}
        slopes.append(row)
    write_table(table, folder / "steering_doses")
    write_table(pd.DataFrame(slopes), folder / "steering_slopes")


def hydra_sweep(folder: Path, *overrides: str) -> list[list[str]]:
    """What ``python -m prefs.run -m ...`` does before its first job: the file in its folder, and each job's overrides.

    The overrides are Hydra's own, so that what `prefs.sweep` reads from the file can be held against them.
    """
    with shipped_configs():
        loader = GlobalHydra.instance().config_loader()
        composed = loader.load_configuration("config", list(overrides), RunMode.MULTIRUN)
        with open_dict(composed):
            composed.hydra.mode = RunMode.MULTIRUN
            composed.hydra.sweep.dir = str(folder)
        settings = composed.hydra.sweeper
        # Hydra loads its plugins' modules anew, so the class is looked up only here.
        sweeper = basic_sweeper.BasicSweeper(settings.max_batch_size, settings.params)
        sweeper.validate_batch_is_legal = lambda batch: None  # composes every job's config, which takes long
        jobs: list[list[str]] = []
        launcher = SimpleNamespace(launch=lambda job_overrides, initial_job_idx: jobs.extend(job_overrides) or [])
        sweeper.config, sweeper.launcher = composed, launcher  # type: ignore[assignment]
        sweeper.hydra_context = HydraContext(loader, Callbacks())
        sweeper.sweep(list(composed.hydra.overrides.task))
    return [list(job) for job in jobs]


@dataclass(frozen=True)
class Compared:
    """What a comparison wrote and printed."""

    out: Path
    printed: str

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.out / f"{name}.csv", keep_default_na=False, na_values=[""])

    @property
    def page(self) -> str:
        return (self.out / "report.html").read_text()

    @property
    def remarks(self) -> list[str]:
        return [line.removeprefix("• ") for line in self.printed.splitlines() if line.startswith("• ")]

    def cells(self) -> list[str]:
        return list(self.table("cells")["cell"].unique())

    def cell(self, name: str, origin: str = "ALL") -> pd.Series:
        return row_of(self.table("cells"), cell=name, origin=origin)


def compared(
    *folders: Path, out: Path | None = None, wandb_mode: str | None = None, drawn: bool = False, width: int = 1000
) -> Compared:
    """Compare folders. Figures take most of the time, and are single points where they are not what is tested."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", str(width))  # each remark on one line
        patch.setattr(drawing, "DPI", 40)  # drawn in less time
        if not drawn:
            patch.setattr(drawing, "save", _point)
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        written = compare(list(folders), out, wandb_mode)
    return Compared(written, printed.getvalue())


def _point(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1)).save(path)
    return path


def row_of(table: pd.DataFrame, **wanted: object) -> pd.Series:
    """The one row that has these values."""
    for name, value in wanted.items():
        table = table.loc[table[name] == value, :]
    (row,) = [row for _, row in table.iterrows()]
    return row


def signal(count: int, seed: int = 0) -> np.ndarray:
    """Means of ratings that tell tasks apart."""
    return np.random.default_rng(seed).permutation(np.linspace(1.1, 4.9, count))
