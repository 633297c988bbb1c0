"""One job, from tasks to the closing table: its stages in order, each reading its inputs from the store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from prefs.config import Config
from prefs.job import JobCounts
from prefs.models.loading import Models, identity, served_nearby
from prefs.probes.outcome import AUC
from prefs.probes.targets import UTILITY
from prefs.results.answers import answers, completions
from prefs.results.choices import choices, pairs_by_probe, utility_and_rating
from prefs.results.distribution import cell_distribution
from prefs.results.files import Written, write
from prefs.results.judges import judges
from prefs.results.refusals import cell_refusals
from prefs.results.result import Artifact, Result, joined
from prefs.results.stability import cell_stability
from prefs.results.terminal import console, show, show_files
from prefs.results.wandb import tracker
from prefs.stages.concept import compare_concepts, extract_concepts
from prefs.stages.context import CellContext, JobContext, RunFolder, Stage
from prefs.stages.dose_response import steer_cell
from prefs.stages.made_with import made_with
from prefs.stages.measure import Roles, job_tasks, measure, sites
from prefs.stages.probe import ProbeReport, Subject, features_digest, probe, probe_result
from prefs.stages.records import Residuals
from prefs.store.configs import remember
from prefs.store.table import Store

log = logging.getLogger("prefs")


def run_job(
    config: Config, folder: RunFolder, models: Models, counts: JobCounts, *, plain_config: Mapping[str, Any]
) -> None:
    """Run one job, write everything it found to its folder, and note in `counts` what it did and spent; or, with
    `Config.plan`, print what that would cost and do nothing; with `Config.why`, what keeps records from being found.

    Raises
    ------
    UserError
        For anything the user can mend: a bad row, a model that is not there, a full disk.
    """
    if config.plan:
        from prefs.plan import plan, plan_result

        planned = plan_result(plan(config), config, sweep=folder.group is not None)
        show(console(), planned, title=planned.title)
        return
    if config.why:
        from prefs.plan.why import why, why_result

        told = why_result(why(config), config)
        show(console(), told, title=told.title)
        return
    tasks = job_tasks(config)
    store = Store.open(config.store.dir, config.store.lease_s)
    roles = Roles.of(config)
    models.check(roles.specs)
    captured = sites(config, roles.rater)
    config = replace(config, probe=replace(config.probe, layers=list(captured.probed)))
    models.keep_only(roles.specs)
    remember(store, made_with(config, roles, tasks))
    job = JobContext(config, plain_config, folder.path, tasks, roles, config.template, captured, store, models, counts)
    with job.noting_usage():
        results = _run(job, config, by_cell=False)
    if config.shard is not None:
        show_files(console(), [*counts.work, *counts.spent], store=store.root)
        merge = "The same command without shard= shows the whole, once all are."
        console().print(f"• Shard {config.shard} is there. {merge}", soft_wrap=True)
        return
    written = write(joined(results.values()), job.folder)
    offline: dict[str, Path] = {}
    for number, (key, ratings) in enumerate(job.rated.ratings.items()):
        cell = CellContext(job, key, ratings, ratings.measured(job.judged.refused))
        name = f"{roles.rater.name}-{key}{folder.suffix}"
        with tracker(
            config.wandb,
            name=name,
            group=folder.group,
            folder=job.folder,
            run_config=plain_config,
            another=number > 0,
        ) as track:
            own = _run(cell, config, by_cell=True)
            of_cell = write(joined(own.values()), job.folder / key)
            of_job = written.artifacts if number == 0 else ()
            found = {**results, **own}
            whole = joined(found[stage.name] for stage in STAGES if stage.name in found)
            track.log(whole, Written(of_cell.figures, [*of_job, *of_cell.artifacts]))
            track.metrics(_usage(counts))
            title = f"{roles.rater.name} · {ratings.template.name} · {config.dataset.name}"
            show(console(), whole, title=f"{title} · completions by {config.completer.name}")
        if track.offline and track.folder is not None:
            offline[name] = track.folder
    show_files(console(), [*counts.work, *counts.spent], folder=job.folder, store=store.root, wandb=offline)


def _run(context: JobContext | CellContext, config: Config, *, by_cell: bool) -> dict[str, Result]:
    """What the stages of a job, or of a cell, found, by name."""
    return {stage.name: stage.run(context) for stage in STAGES if stage.by_cell == by_cell and stage.wanted(config)}


def _usage(counts: JobCounts) -> dict[str, float]:
    return {
        f"usage/{usage.model}/{name}": value
        for usage in counts.spent
        for name, value in asdict(usage).items()
        if isinstance(value, int | float)
    }


def _measure(job: JobContext) -> Result:
    before = job.models.usage()
    job.completions, job.rated, job.judged = measure(
        job.config, job.tasks, job.roles, job.templates, job.sites.capture, job.store, job.models, job.counts
    )
    after = job.models.usage()
    for engine, spec in {spec.engine: spec for spec in job.roles.specs}.items():
        if served_nearby(spec) and after.get(engine) == before.get(engine):
            log.warning(
                "%s was not asked: all that is said to be from %s was in the store. If another model stands under that"
                " name now, say which: model.revision=NAME",
                spec.api.base_url,
                spec.path,
            )
    return Result()


def _probe(cell: CellContext) -> Result:
    """Probes of the cell's ratings, from the store or trained now; each with its card is an artifact."""
    job, config, completions = cell.job, cell.config, cell.ratings.completions
    # The position ``rating`` is the template's own.
    captured = dict(job.rated.residuals)
    if cell.key in job.rated.rating_residuals:
        captured["rating"] = job.rated.rating_residuals[cell.key]
    layers, positions = tuple(config.probe.layers), config.probe.positions or config.capture.positions
    residuals = [replace(captured[position], layers=layers) for position in positions]
    subject = Subject(
        name=cell.key,
        measured=cell.measured,
        sampling=cell.ratings.sampling,
        prompts=[completion.task.prompt for completion in completions],
        completions=[completion.text or "" for completion in completions],
        residuals=residuals,
        utilities=None if job.revealed is None else job.revealed.of_tasks(cell.measured.tasks),
    )

    def trainer() -> dict[str, Any]:
        # Loggers and callbacks come by `_target_`, as everywhere in Hydra; what they write is the job's.
        made = instantiate(config.probe.trainer, _convert_="all")
        return {"default_root_dir": str(job.folder), **made}

    cell.probed = probe(subject, config.probe, config.stats.bootstrap, job.probes, job.store, trainer)
    result = probe_result(cell.probed, cell.title)
    if not isinstance(cell.probed, ProbeReport):
        return result
    job.counts.add([cell.probed.work])
    job.probes.append(cell.probed)
    return replace(result, artifacts=tuple(_artifacts(cell, cell.probed, residuals)))


def _artifacts(cell: CellContext, report: ProbeReport, residuals: list[Residuals]) -> list[Artifact]:
    """Each target's probe with its card."""
    job, config, plain, values = cell.job, cell.config, cell.job.plain_config, cell.measured.values
    card = {
        "model": identity(job.rater),
        "model_config": plain["model"],
        "template": plain["template"][cell.key] | {"prefill": cell.ratings.question.prefill},
        "system_prompt": config.rating.system_prompt,
        "thought": _thought(cell) if cell.ratings.thinks else None,
        "dataset": config.dataset.name,
        "scale": {"low": 0.0, "high": 1.0} if report.metric == AUC else {"low": min(values), "high": max(values)},
        "tasks": features_digest(residuals),
        "config": plain["probe"],
    }
    metadata = {name: card[name] for name in ("model", "dataset", "tasks")} | {"template": cell.ratings.template.name}
    saved = cache(lambda folder: report.save(folder / "probe", card))
    return [
        Artifact(
            f"probe-{job.rater.name}-{cell.key}-{target}",
            "probe",
            lambda folder, target=target: saved(folder)[target],
            {**metadata, "target": target},
        )
        for target in [result.target.key for result in report.results]
    ]


def _thought(cell: CellContext) -> dict[str, Any]:
    """What draws the thought after which a rater that thinks was captured at ``rating``."""
    ratings, rating = cell.ratings, cell.config.rating
    seeds = ratings.thoughts.seeds if ratings.thoughts is not None else ratings.seeds
    return {"seed": (*seeds, 0)[0], "temperature": rating.temperature, "top_p": rating.top_p}


def _whole(config: Config) -> bool:
    """Of a shard nothing is described: the whole is, once all are there."""
    return config.shard is None


def _chooses(config: Config) -> bool:
    """Rounds of pairs are of all tasks, and not of a shard of them."""
    return _whole(config) and config.choice.kind != "none"


# What a job does, in this order: first what it does once, then what it does for each of its cells. What they found is
# printed in this order, too.
STAGES = (
    Stage("measure", _measure, by_cell=False),
    Stage("completions", completions, wanted=_whole, by_cell=False),
    Stage("choices", choices, wanted=_chooses, by_cell=False),
    Stage("answers", answers),
    Stage("stability", cell_stability),
    Stage("distribution", cell_distribution),
    Stage("refusals", cell_refusals),
    Stage("utilities and ratings", utility_and_rating, wanted=_chooses),
    Stage("probe", _probe, wanted=lambda config: config.probe.kind != "none"),
    Stage("pairs by probe", pairs_by_probe, wanted=lambda config: _chooses(config) and UTILITY in config.probe.targets),
    Stage("judges", judges, wanted=_whole, by_cell=False),
    Stage("concepts", extract_concepts, wanted=lambda config: bool(config.concept), by_cell=False),
    Stage("concepts of the cell", compare_concepts, wanted=lambda config: bool(config.concept)),
    Stage("steering", steer_cell, wanted=lambda config: config.steering.vector != "none"),
)
