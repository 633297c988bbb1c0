"""One job, from tasks to the closing table: the stages in order, each reading its inputs from the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from rich.console import Console

from prefs.config import Config
from prefs.models.loading import Models, ModelSpec, check_weights, identity
from prefs.models.types import Usage
from prefs.probes.outcome import AUC, NoProbe
from prefs.results import closing
from prefs.results import figures as plots
from prefs.results.closing_concepts import dose_lines, slope_lines
from prefs.results.job_record import Doings, Spent
from prefs.results.summary import (
    Group,
    by_origin,
    distribution_table,
    groups_by_origin,
    judges_table,
    refusal_table,
    refusals,
    stability,
    stability_table,
)
from prefs.results.terminal import show, show_files
from prefs.results.wandb import Tracker, tracker
from prefs.stages.concept import Concepts, compared, extracted, steered
from prefs.stages.dose_response import DoseResponse
from prefs.stages.measure import Roles, job_tasks, measure, sites
from prefs.stages.probe import ProbeReport, Subject, features_digest, probe
from prefs.stages.records import Completion, Rated, Ratings, Residuals
from prefs.statistics.measured import Measured
from prefs.store.files import write_table
from prefs.store.table import Store

log = logging.getLogger("prefs")


@dataclass(frozen=True)
class Place:
    """Where a job's results go: its folder, and its W&B group and the words that tell it from others of the sweep."""

    folder: Path
    group: str | None = None
    suffix: str = ""


def run_job(config: Config, place: Place, models: Models, doings: Doings, *, plain_config: Mapping[str, Any]) -> None:
    """Run one job, write everything it found to its folder, and note in `doings` what it did and spent; or, with
    `Config.plan`, print what that would cost and do nothing.

    Raises
    ------
    UserError
        For anything the user can mend: a bad row, a model that is not there, a full disk.
    """
    # Task ids and origins are the user's text: nothing in them is markup.
    console = Console(markup=False, highlight=False, emoji=False)
    if config.plan:
        from prefs.plan.costs import plan
        from prefs.plan.show import show_plan

        show_plan(plan(config), config, sweep=place.group is not None, console=console)
        return
    tasks = job_tasks(config)
    store = Store.open(config.store.dir, config.store.lease_s)
    roles = Roles.of(config)
    rater = roles.rater
    of = sites(config, rater)
    config = replace(config, probe=replace(config.probe, layers=list(of.probed)))
    for spec in roles.specs:
        check_weights(spec)
    models.keep_only(roles.specs)
    with _noting_costs(models, roles.specs, doings):
        completions, rated, judged = measure(config, tasks, roles, config.template, of.capture, store, models, doings)
        concepts = extracted(config, tasks, roles.completer, rater, of.capture, store, models, doings)
    if config.shard is not None:
        show_files(console, [*doings.work, *doings.spent], None, store.root, {})
        merge = "The same command without shard= shows the whole, once all are."
        console.print(f"• Shard {config.shard} is there. {merge}", soft_wrap=True)
        return
    write_table(completions_table(completions, judged.refused), place.folder / "completions")
    groups = groups_by_origin([each.task.origin for each in completions], config.stats.bootstrap, config.stats.seed)
    tables = {}
    if judged.by_phrases is not None:
        by_model, by_phrases = (np.array(each, dtype=float) for each in (judged.refused, judged.by_phrases))
        tables["judges"] = judges_table(by_model, by_phrases, groups)
        write_table(tables["judges"], place.folder / "judges")
    tables |= concepts.tables
    for name, table in concepts.tables.items():
        write_table(table, place.folder / name)
    family = of.architecture.family if of.architecture else ""
    vectors = concepts.save(place.folder, identity(rater), family, plain_config)
    synced: dict[str, Path] = {}
    probed: list[ProbeReport] = []
    for at, (key, ratings) in enumerate(rated.ratings.items()):
        name = f"{rater.name}-{key}{place.suffix}"
        with tracker(
            config.wandb, name=name, group=place.group, folder=place.folder, run_config=plain_config, another=at > 0
        ) as track:
            cell = _Cell(key, ratings, ratings.measured(judged.refused), groups, place.folder / key, tables)
            for concept, paths in vectors.items() if at == 0 else ():
                track.artifact(f"concept-{rater.name}-{concept}", "concept", paths, {"model": identity(rater)})
            stages = _Stages(concepts, of.steered, store, models, doings)
            report = _report(config, cell, rated, rater, track, console, probed, plain_config, stages)
            if isinstance(report, ProbeReport):
                probed.append(report)
            track.metrics({f"usage/{each.model}/{name}": value for each in doings.spent for name, value in costs(each)})
        if track.offline and track.folder is not None:
            synced[name] = track.folder
    show_files(console, [*doings.work, *doings.spent], place.folder, store.root, synced)


@contextmanager
def _noting_costs(models: Models, specs: Sequence[ModelSpec], doings: Doings) -> Iterator[None]:
    """Note what was spent while inside, also where that ends with an error."""
    before = models.usage()
    try:
        yield
    finally:
        names, after = {spec.engine: spec.name for spec in specs}, models.usage()
        for engine in names.keys() & after.keys():
            spent = Spent(names[engine], **asdict(after[engine].since(before.get(engine, Usage()))))
            if spent.requests:
                log.info("%s", spent)
                doings.spend(spent)


def costs(spent: Spent) -> list[tuple[str, float]]:
    """The numbers of what was spent that are known."""
    return [(name, value) for name, value in asdict(spent).items() if isinstance(value, int | float)]


@dataclass(frozen=True)
class _Cell:
    """One template of a job: its ratings, as records and as arrays, and the folder for what is found in them.

    ``of_job`` are the job's own tables, which are logged with every cell.
    """

    key: str
    ratings: Ratings
    measured: Measured
    groups: Sequence[Group]
    folder: Path
    of_job: Mapping[str, pd.DataFrame]


def _report(
    config: Config,
    cell: _Cell,
    rated: Rated,
    rater: ModelSpec,
    track: Tracker,
    console: Console,
    earlier: Sequence[ProbeReport],
    plain_config: Mapping[str, Any],
    stages: _Stages,
) -> ProbeReport | NoProbe | None:
    """One cell: statistics, probe, steering, tables, figures, W&B and the closing table."""
    ratings, measured = cell.ratings, cell.measured
    rows = stability(measured, cell.groups, config.stats.target_r)
    tables = {
        "ratings": answers_table(ratings),
        "stability": stability_table(rows),
        "distribution": distribution_table(measured, cell.groups),
        "refusals": refusal_table(refusals(measured, cell.groups)),
    }
    if measured.exact is not None:
        tables["exact"] = exact_table(measured)
    if ratings.thoughts is not None:
        tables["exact_by_thought"] = thoughts_table(ratings)
    residuals = _residuals(config, rated, cell.key)
    probed = None
    if config.probe.kind != "none":
        # Loggers and callbacks of Lightning's Trainer come by `_target_`, as everywhere in Hydra.
        trainer = partial(instantiate, config.probe.trainer, _convert_="all")
        subject = _subject(cell, residuals)
        probed = probe(subject, config.probe, config.stats.bootstrap, earlier, stages.store, trainer)
    if isinstance(probed, ProbeReport):
        stages.doings.did([probed.work])
        tables |= probed.tables
    title = f"{rater.name}, {ratings.template.name}"
    of_concepts = compared(stages.concepts, measured, rated, probed, config, cell.folder, title)
    tables |= of_concepts.tables
    doses = stages.steered(config, ratings, rater, probed)
    if isinstance(doses, DoseResponse):
        tables |= doses.tables
    for name, table in tables.items():
        write_table(table, cell.folder / name)
    figures = draw_figures(cell.folder / "figures", tables, probed, seeds=len(ratings.seeds), title=title)
    figures += of_concepts.figures
    if isinstance(doses, DoseResponse):
        figures.append(
            plots.dose_response(
                cell.folder / "figures" / "dose_response.png",
                title=f"Steering at {doses.at} tokens: {title}"
                if doses.at == "all"
                else f"Steering at {doses.at}: {title}",
                table=doses.curves(),
                dose=f"coefficient ({_unit(config)})",
                label="mean exact rating",
            )
        )
    _track(track, {**tables, **cell.of_job}, figures)
    if isinstance(probed, ProbeReport):
        _save_probes(config, cell, probed, residuals, rater, track, plain_config)
    lines = [closing.sampled_lines(rows)] if ratings.seeds else []
    lines += [closing.exact_lines(rows)] if measured.exact is not None else []
    rated_by = "exact mean" if measured.exact is not None else f"mean of {len(ratings.seeds)} seeds"
    lines.append(closing.refusal_lines(tables["refusals"], rated_by))
    if isinstance(probed, ProbeReport):
        lines += [closing.probe_lines(probed), closing.chosen_lines(probed), closing.control_lines(probed)]
    lines += of_concepts.lines
    if isinstance(doses, DoseResponse):
        lines += [slope_lines(doses, _unit(config)), dose_lines(doses)]
    title = f"{rater.name} · {ratings.template.name} · {config.dataset.name} · completions by {config.completer.name}"
    said = closing.remarks(ratings, rows, tables["refusals"], probed)
    if "judges" in cell.of_job:
        said.append(closing.judges_remark(cell.of_job["judges"], config.judge.name))
    said += of_concepts.remarks
    said += [doses] if isinstance(doses, str) else doses.remarks if doses is not None else []
    show(console, title=title, tables=lines, said=said)
    return probed


def _unit(config: Config) -> str:
    return f"multiples of the {'vector' if config.steering.unit == 'vector' else 'activation norm'}"


@dataclass(frozen=True)
class _Stages:
    """What the stages after rating need beside a cell: the job's concepts, the layers steered, store and models."""

    concepts: Concepts
    layers: tuple[int, ...]
    store: Store
    models: Models
    doings: Doings

    def steered(
        self, config: Config, ratings: Ratings, rater: ModelSpec, probed: ProbeReport | NoProbe | None
    ) -> DoseResponse | str | None:
        with _noting_costs(self.models, [rater], self.doings):
            return steered(
                config, self.layers, self.concepts, ratings, rater, probed, self.store, self.models, self.doings
            )


def _subject(cell: _Cell, residuals: Sequence[Residuals]) -> Subject:
    completions = cell.ratings.completions
    return Subject(
        name=cell.key,
        measured=cell.measured,
        sampling=cell.ratings.sampling,
        prompts=[each.task.prompt for each in completions],
        completions=[each.text or "" for each in completions],
        residuals=residuals,
    )


def _save_probes(
    config: Config,
    cell: _Cell,
    probed: ProbeReport,
    residuals: Sequence[Residuals],
    rater: ModelSpec,
    track: Tracker,
    plain_config: Mapping[str, Any],
) -> None:
    """Each target's probe with its card, in the run folder and as an artifact."""
    values = cell.measured.values
    scale = {"low": 0.0, "high": 1.0} if probed.metric == AUC else {"low": min(values), "high": max(values)}
    card = {
        "model": identity(rater),
        "model_config": plain_config["model"],
        "template": plain_config["template"][cell.key] | {"prefill": cell.ratings.question.prefill},
        "system_prompt": config.rating.system_prompt,
        "thought": _thought(config, cell) if cell.ratings.thinks else None,
        "dataset": config.dataset.name,
        "scale": scale,
        "tasks": features_digest(residuals),
        "config": plain_config["probe"],
    }
    shown = {name: card[name] for name in ("model", "dataset", "tasks")} | {"template": cell.ratings.template.name}
    for key, paths in probed.save(cell.folder / "probe", card).items():
        track.artifact(f"probe-{rater.name}-{cell.key}-{key}", "probe", paths, {**shown, "target": key})


def _thought(config: Config, cell: _Cell) -> dict[str, Any]:
    """What draws the thought after which a rater that thinks was captured at ``rating``."""
    seeds = cell.ratings.thoughts.seeds if cell.ratings.thoughts is not None else cell.ratings.seeds
    drawn = {"temperature": config.rating.temperature, "top_p": config.rating.top_p}
    return {"seed": (*seeds, 0)[0], **drawn}


def _residuals(config: Config, rated: Rated, key: str) -> list[Residuals]:
    """At the positions and layers probed; ``rating`` is the template's own."""
    found = {**rated.residuals, **({"rating": rated.rating_residuals[key]} if key in rated.rating_residuals else {})}
    chosen = [found[position] for position in config.probe.positions or config.capture.positions]
    return [replace(each, layers=tuple(config.probe.layers)) for each in chosen]


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
            **({"thought": answer.thought} if ratings.thinks else {}),
        }
        for completion, answers in zip(ratings.completions, ratings.answers, strict=True)
        for answer in answers
    ]
    names = ["task", "origin", "seed", "answer", "value", "invalid", *(["thought"] if ratings.thinks else [])]
    return pd.DataFrame(rows, columns=names)


def thoughts_table(ratings: Ratings) -> pd.DataFrame:
    """One row a task and thought: each option's probability after it, the thought, or why there is no rating."""
    assert ratings.thoughts is not None
    thoughts = ratings.thoughts
    rows = [
        {
            "task": completion.task.id,
            "origin": completion.task.origin,
            "thought_seed": seed,
            **{f"p({say})": thoughts.mass[at, k, v] for v, say in enumerate(ratings.template.says)},
            "thought": thoughts.texts[at][k],
            "invalid": reason.value if (reason := thoughts.invalid[at][k]) is not None else None,
        }
        for at, completion in enumerate(ratings.completions)
        for k, seed in enumerate(thoughts.seeds)
    ]
    return pd.DataFrame(rows)


def exact_table(measured: Measured) -> pd.DataFrame:
    """One row a task: each option's probability before renormalising, mean, variance and valid mass.

    Of a rater that thinks they are of the mixture over its thoughts, with the part of the variance that is between
    them.
    """
    assert measured.mass is not None
    assert measured.exact is not None
    table = pd.DataFrame({"task": measured.tasks, "origin": measured.origins})
    for at, say in enumerate(measured.says):
        table[f"p({say})"] = measured.mass[:, at]
    table["mean"], table["variance"] = measured.exact.mean, measured.exact.variance
    if measured.thinks:
        table["between_thoughts"] = measured.exact.between
    table["valid_mass"] = measured.exact.valid_mass
    return table


def draw_figures(
    folder: Path, tables: Mapping[str, pd.DataFrame], probed: ProbeReport | NoProbe | None, *, seeds: int, title: str
) -> list[Path]:
    """The figures of one cell."""
    figures = [
        plots.rating_distribution(
            folder / "ratings_by_origin.png",
            title=f"Ratings by origin: {title}",
            table=by_origin(tables["distribution"]),
        ),
        plots.cross_seed_by_origin(
            folder / "cross_seed_r.png",
            title=f"Stability over {seeds} rating seeds: {title}",
            table=by_origin(tables["stability"]),
        ),
    ]
    if isinstance(probed, ProbeReport):
        figures += _probe_figures(folder, probed, title)
    return figures


def _probe_figures(folder: Path, probed: ProbeReport, title: str) -> list[Path]:
    figures = [
        plots.probe_by_layer(
            folder / "probe_by_layer.png", title=f"Probes by layer: {title}", table=probed.scores, metric=probed.metric
        ),
        plots.predicted_against_measured(
            folder / "probe_predictions.png", title=f"Held-out predictions: {title}", table=probed.predictions
        ),
    ]
    if len(probed.origins):
        figures.append(
            plots.origins_held_out(
                folder / "probe_origins.png",
                title=f"Probes on an origin never trained on: {title}",
                table=probed.origins,
                metric=probed.metric,
            )
        )
    if len(probed.transfer):
        figures.append(
            plots.transfer(folder / "probe_transfer.png", title=f"Probe transfer: {title}", table=probed.transfer)
        )
    return figures


def _track(track: Tracker, tables: Mapping[str, pd.DataFrame], figures: list[Path]) -> None:
    for kind in [kind for kind in ("stability", "refusals", "judges") if kind in tables]:
        for row in tables[kind].to_dict("records"):
            numbers = {
                f"{kind}/{name}/{row['origin']}": float(value)
                for name, value in row.items()
                if isinstance(value, int | float) and pd.notna(value)
            }
            track.metrics(numbers)
    if "probe" in tables:
        wide = tables["probe"].pivot(index="layer", columns=["position", "target"], values="score")
        wide.columns = [f"probe/{position}/{target}" for position, target in wide.columns]
        track.series("probe/layer", wide.rename_axis("probe/layer").reset_index())
        for row in tables["probe_chosen"].to_dict("records"):
            names = ("score", "r2", "pearson", "auc", "p", "ceiling", "layer")
            track.metrics({f"probe/chosen/{name}/{row['target']}": row[name] for name in names if pd.notna(row[name])})
        for row in tables["probe_controls"].to_dict("records"):
            if pd.notna(row["score"]):
                track.metrics({f"probe/control/{row['control']}/{row['target']}": row["score"]})
    if "steering_slopes" in tables:
        for row in tables["steering_slopes"].to_dict("records"):
            if pd.notna(row["slope"]):
                track.metrics({f"steering/slope/{row['vector']}/{row['layer']}": row["slope"]})
    for name, table in tables.items():
        if name not in ("probe_predictions", "steering_ratings"):  # large, and in the run folder
            track.table(name, table)
    for path in figures:
        track.figure(path.stem, path)
