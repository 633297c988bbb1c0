"""One job, from tasks to the closing table: the stages in order, each reading its inputs from the store."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from prefs import closing, plots
from prefs.complete import complete
from prefs.config import CaptureConfig, Config
from prefs.errors import ConfigError
from prefs.judge import judge
from prefs.models.backend import Sampling
from prefs.models.loading import Models, ModelSpec, identity, model_folder
from prefs.probing import NoProbe, ProbeReport, features_digest, probe
from prefs.rate import CapturePlan, rate
from prefs.records import Completion, Rated, Ratings, Residuals
from prefs.stability import exact_summary
from prefs.store import Store
from prefs.summary import ALL, by_origin, refusal_table, refusals, stability, stability_table
from prefs.tasks import load_tasks
from prefs.templates import Template
from prefs.track import Tracker, tracker

log = logging.getLogger("prefs")


def run_job(
    config: Config, folder: Path, models: Models, *, plain_config: Mapping[str, Any], group: str | None
) -> None:
    """Run one job and write everything it found to `folder`.

    Raises
    ------
    UserError
        For anything the user can mend: a bad row, a model that is not there, a full disk.
    """
    tasks = load_tasks(config.dataset)
    store = Store.open(config.store.dir)
    rater = ModelSpec.from_config(config.model)
    completer = ModelSpec.from_config(config.completer.model) if config.completer.model else rater
    templates = {key: Template.from_config(each) for key, each in config.template.items()}
    capture = _capture_plan(config.capture, rater)
    models.keep_only([rater, completer])
    completions, completed = complete(
        tasks,
        completer,
        Sampling(config.completer.temperature, config.completer.top_p, config.completer.max_new_tokens),
        seed=config.completer.seed,
        system_prompt=config.completer.system_prompt,
        store=store,
        models=models,
    )
    log.info("%s", completed)
    rated = rate(
        completions,
        rater,
        templates,
        Sampling(config.rating.temperature, config.rating.top_p, config.rating.max_new_tokens),
        seeds=config.rating.seeds,
        exact=config.rating.exact,
        capture=capture,
        system_prompt=config.rating.system_prompt,
        store=store,
        models=models,
    )
    for work in rated.work:
        log.info("%s", work)
    refused = judge(config.judge, completions)
    _write(completions_table(completions, refused), folder / "completions")
    # Task ids and origins are the user's text: nothing in them is markup.
    console = Console(markup=False, highlight=False, emoji=False)
    synced: dict[str, Path] = {}
    for key, ratings in rated.ratings.items():
        name = f"{rater.name}-{key}"
        with tracker(config.wandb, name=name, group=group, folder=folder, run_config=plain_config) as track:
            _report(config, key, ratings, rated, refused, rater, folder / key, track, console)
        if track.offline and track.folder is not None:
            synced[name] = track.folder
    closing.show_files(console, [completed, *rated.work], folder, store.root, synced)


def _capture_plan(config: CaptureConfig, rater: ModelSpec) -> CapturePlan | None:
    """The layers and positions wanted, checked against the model's config before its weights are loaded."""
    if not config.positions:
        return None
    from prefs.models.transformer_lens import config_layers

    count = config_layers(model_folder(rater), rater.revision)
    if config.layers == "all":
        layers = tuple(range(count))
    else:
        for layer in config.layers:
            if not -count <= layer < count:
                raise ConfigError("capture.layers", layer, f"all, or from {-count} to {count - 1} ({rater.name})")
        layers = tuple(dict.fromkeys(layer % count for layer in config.layers))
    return CapturePlan(layers, tuple(config.positions), config.dtype.value)


def _report(
    config: Config,
    key: str,
    ratings: Ratings,
    rated: Rated,
    refused: list[bool | None],
    rater: ModelSpec,
    folder: Path,
    track: Tracker,
    console: Console,
) -> None:
    """One cell: statistics, probe, tables, figures, W&B and the closing table."""
    rows = stability(ratings, config.stats)
    tables = {
        "ratings": answers_table(ratings),
        "stability": stability_table(rows),
        "refusals": refusal_table(refusals(ratings, refused, config.stats)),
    }
    if ratings.mass is not None:
        tables["exact"] = exact_table(ratings)
    probed = _probe(config, ratings, rated, key)
    if isinstance(probed, ProbeReport):
        tables |= {"probe": probed.scores, "probe_predictions": probed.predictions}
    for name, table in tables.items():
        _write(table, folder / name)
    figures = draw_figures(folder / "figures", ratings, tables, probed, title=f"{rater.name}, {ratings.template.name}")
    _track(track, tables, figures)
    if isinstance(probed, ProbeReport):
        residuals = _residuals(config, rated, key)
        metadata = {
            "model": identity(rater),
            "template": ratings.template.name,
            "dataset": config.dataset.name,
            "tasks": features_digest(residuals) if residuals else None,
            "config": dataclasses.asdict(config.probe),
        }
        paths = probed.save(folder / "probe", metadata)
        track.artifact(
            f"probe-{rater.name}-{key}", "probe", paths, {k: v for k, v in metadata.items() if k != "config"}
        )
    shown = [closing.sampled_lines(rows)] if ratings.seeds else []
    shown += [closing.exact_lines(rows)] if ratings.mass is not None else []
    rated_by = "exact mean" if ratings.mass is not None else f"mean of {len(ratings.seeds)} seeds"
    shown.append(closing.refusal_lines(tables["refusals"], rated_by))
    if isinstance(probed, ProbeReport):
        shown.append(closing.probe_lines(probed))
    title = f"{rater.name} · {ratings.template.name} · {config.dataset.name} · completions by {config.completer.name}"
    closing.show(console, title=title, tables=shown, said=closing.remarks(ratings, rows, tables["refusals"], probed))


def _residuals(config: Config, rated: Rated, key: str) -> Residuals | None:
    if config.probe.position == "rating":
        return rated.rating_residuals.get(key)
    return rated.residuals.get(config.probe.position)


def _probe(config: Config, ratings: Ratings, rated: Rated, key: str) -> ProbeReport | NoProbe | None:
    residuals = _residuals(config, rated, key)
    if config.probe.kind == "none" or residuals is None:
        return None
    return probe(ratings, residuals, config.probe)


def completions_table(completions: list[Completion], refused: list[bool | None]) -> pd.DataFrame:
    """One row a task."""
    return pd.DataFrame(
        {
            "task": [each.task.id for each in completions],
            "origin": [each.task.origin for each in completions],
            "topic": [each.task.topic for each in completions],
            "prompt": [each.task.prompt for each in completions],
            "completion": [each.text for each in completions],
            "finished": [each.finished for each in completions],
            "invalid": [each.invalid.value if each.invalid else None for each in completions],
            "refused": pd.array(refused, dtype="boolean"),
        }
    )


def answers_table(ratings: Ratings) -> pd.DataFrame:
    """One row a task and rating seed: the answer as it was, the value read, or the reason why there is none."""
    rows = [
        {
            "task": completion.task.id,
            "origin": completion.task.origin,
            "seed": answer.seed,
            "answer": answer.text,
            "value": answer.value,
            "invalid": answer.invalid.value if answer.invalid else None,
        }
        for completion, answers in zip(ratings.completions, ratings.answers, strict=True)
        for answer in answers
    ]
    return pd.DataFrame(rows, columns=["task", "origin", "seed", "answer", "value", "invalid"])


def exact_table(ratings: Ratings) -> pd.DataFrame:
    """One row a task: each option's probability before renormalising, mean, variance and valid mass."""
    assert ratings.mass is not None
    summary = exact_summary(ratings.mass, ratings.template.values)
    table = pd.DataFrame(
        {
            "task": [each.task.id for each in ratings.completions],
            "origin": [each.task.origin for each in ratings.completions],
        }
    )
    for at, option in enumerate(ratings.template.options):
        table[f"p({option.say})"] = ratings.mass[:, at]
    table["mean"], table["variance"] = summary.mean, summary.variance
    table["valid_mass"] = summary.valid_mass
    return table


def draw_figures(
    folder: Path,
    ratings: Ratings,
    tables: Mapping[str, pd.DataFrame],
    probed: ProbeReport | NoProbe | None,
    *,
    title: str,
) -> list[Path]:
    """The figures of one cell."""
    stable = tables["stability"]
    per_origin = stable.query("origin != @ALL")
    template = ratings.template
    order = np.argsort(template.values)
    groups = {origin: tasks for origin, tasks in by_origin(ratings).items() if origin != ALL}
    sampled = ratings.sampled
    shares, exact, counts = {}, {}, {}
    for origin, tasks in groups.items():
        values = sampled[tasks][np.isfinite(sampled[tasks])]
        counted = np.array([(values == template.values[at]).sum() for at in order], dtype=float)
        shares[origin] = counted / counted.sum() if len(values) else np.full(len(order), np.nan)
        counts[origin] = f"n = {len(tasks)} tasks, {len(values)} ratings"
        if ratings.mass is not None:
            mass = ratings.mass[tasks][:, order]
            mass = mass[mass.sum(axis=1) > 0]
            exact[origin] = (mass / mass.sum(axis=1, keepdims=True)).mean(axis=0) if len(mass) else shares[origin]
    labels = [_label(template.options[at].say, template.options[at].value) for at in order]
    figures = [
        plots.ratings_by_origin(
            folder / "ratings_by_origin.png",
            title=f"Ratings by origin: {title}",
            labels=labels,
            shares=shares,
            exact=exact or None,
            counts=counts,
        ),
        plots.cross_seed_by_origin(
            folder / "cross_seed_r.png",
            title=f"Stability over {len(ratings.seeds)} rating seeds: {title}",
            table=per_origin,
        ),
    ]
    if isinstance(probed, ProbeReport):
        figures.append(
            plots.probe_by_layer(
                folder / "probe_r2.png", title=f"Probe at {probed.position}: {title}", table=probed.scores
            )
        )
    return figures


def _label(say: str, value: float) -> str:
    return say if say == f"{value:g}" else f"{say}\n({value:g})"


def _track(track: Tracker, tables: Mapping[str, pd.DataFrame], figures: list[Path]) -> None:
    for kind in ("stability", "refusals"):
        for row in tables[kind].to_dict("records"):
            numbers = {
                f"{kind}/{name}/{row['origin']}": float(value)
                for name, value in row.items()
                if isinstance(value, int | float) and pd.notna(value)
            }
            track.metrics(numbers)
    if "probe" in tables:
        wide = tables["probe"].pivot(index="layer", columns="target", values="r2")
        wide.columns = [f"probe/r2/{target}" for target in wide.columns]
        track.series("probe/layer", wide.rename_axis("probe/layer").reset_index())
        first = tables["probe"].drop_duplicates("target")
        for name in ("baseline_r2", "ceiling_r2"):
            values = {f"probe/{name}/{row['target']}": row[name] for row in first.to_dict("records")}
            track.metrics({key: value for key, value in values.items() if pd.notna(value)})
    for name, table in tables.items():
        if name != "probe_predictions":  # large, and in the run folder
            track.table(name, table)
    for path in figures:
        track.figure(path.stem, path)


def _write(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV and Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"), index=False)
    table.to_parquet(path.with_suffix(".parquet"), index=False)
