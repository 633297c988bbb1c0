"""The stages that ask models, as a config wants them: of a run, and of the plan of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefs.config import COMPLETION_POSITIONS, Config
from prefs.data.task import Task, load_tasks
from prefs.data.template import Template
from prefs.errors import ConfigError, UserError
from prefs.job import JobCounts
from prefs.models.architecture import Architecture, architecture
from prefs.models.chat_template import ChatTemplate
from prefs.models.counting import tokenizer_of
from prefs.models.loading import Models, ModelSpec, model_folder
from prefs.models.types import Capture, Sampling
from prefs.stages.complete import complete
from prefs.stages.judge import Judged, judge, judging_model
from prefs.stages.rate import rate
from prefs.stages.records import Completion, Rated
from prefs.stages.steering_vectors import check_saved
from prefs.store.table import Store
from prefs.sweep import Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Roles:
    """The models of a job. There is no judge where none is asked."""

    completer: ModelSpec
    rater: ModelSpec
    judge: ModelSpec | None

    @classmethod
    def of(cls, config: Config) -> Roles:
        """Those of a config.

        Raises
        ------
        UserError
            If a device is not there, or the key of a server is not.
        """
        rater = ModelSpec.from_config(config.model)
        completer = ModelSpec.from_config(config.completer.model) if config.completer.model else rater
        return cls(completer, rater, judging_model(config.judge, completer))

    @property
    def specs(self) -> list[ModelSpec]:
        """All of them; one model may be in two roles."""
        return [spec for spec in (self.completer, self.rater, self.judge) if spec is not None]


def job_tasks(config: Config) -> list[Task]:
    """The tasks of a job: those of its data set, or its shard of them.

    Raises
    ------
    UserError
        As `load_tasks` does, or if the shard has none.
    """
    tasks = load_tasks(config.dataset)
    return tasks if config.shard is None else Shard.parse(config.shard).share(tasks)


@dataclass(frozen=True)
class Sites:
    """What is captured, which layers are probed and steered, and the rater's architecture (None: nobody asked)."""

    capture: Capture | None
    probed: tuple[int, ...]
    steered: tuple[int, ...]
    architecture: Architecture | None


def sites(config: Config, rater: ModelSpec) -> Sites:
    """The layers and positions wanted, checked before the model's weights are loaded.

    Raises
    ------
    UserError
        If the model has no such layer, a layer is not captured, saved vectors do not fit, or no completion is read
        under the conditions of a concept.
    """
    capture, steering = config.capture, config.steering
    if not capture.positions and steering.vector == "none":
        return Sites(None, (), (), None)
    shape = architecture(model_folder(rater), rater.revision)
    layers: tuple[int, ...] = ()
    if capture.positions:
        layers = _numbered("capture.layers", capture.layers, shape.layers, range(shape.layers), rater)
    probed = _numbered("probe.layers", config.probe.layers, shape.layers, layers, rater)
    steerable = layers if steering.vector == "concept" else range(shape.layers)
    steered = _numbered("steering.layers", steering.layers, shape.layers, steerable, rater)
    check_saved(config, rater, steered, shape)
    _check_prompts_are_read(config, rater)
    captured = Capture(layers, tuple(capture.positions)) if capture.positions else None
    return Sites(captured, probed if config.probe.kind != "none" else (), steered, shape)


def _check_prompts_are_read(config: Config, rater: ModelSpec) -> None:
    """Refuse concepts of a model whose chat template writes the system prompt behind the completion, and say where it
    makes no difference to what is captured otherwise."""
    positions = ", ".join(name for name in config.capture.positions if name in COMPLETION_POSITIONS)
    prompted = bool(config.concept) or config.rating.system_prompt is not None
    if not positions or not prompted:
        return
    if ChatTemplate(tokenizer_of(rater), rater.chat_template_kwargs).shows_system_last:
        reason = f"the chat template of {rater.name} shows the system prompt only in the last turn"
        if config.concept:
            raise UserError(
                f"concept: {reason}, so that conditions of completing cannot be read here ({positions} would be"
                " captured without them); choose another model, or ratings under rating.condition with"
                " capture.positions=[rating]"
            )
        log.warning("rating.system_prompt: %s; %s are captured without it", reason, positions)


def _numbered(key: str, wanted: Any, count: int, allowed: Sequence[int], rater: ModelSpec) -> tuple[int, ...]:
    """Layers by their numbers from 0, of those that are allowed."""
    if wanted == "all":
        return tuple(allowed)
    for layer in wanted:
        if not -count <= layer < count:
            raise ConfigError(key, layer, f"all, or from {-count} to {count - 1} ({rater.name})")
        if layer % count not in allowed:
            raise ConfigError(key, layer, f"a layer that is captured ({', '.join(map(str, allowed))})")
    return tuple(dict.fromkeys(layer % count for layer in wanted))


def measure(
    config: Config,
    tasks: Sequence[Task],
    roles: Roles,
    templates: Mapping[str, Template],
    capture: Capture | None,
    store: Store,
    models: Models,
    counts: JobCounts,
) -> tuple[list[Completion], Rated, Judged]:
    """Complete, rate and capture, and judge, doing only what the store lacks."""
    completions, completed = complete(
        tasks,
        roles.completer,
        Sampling.from_config(config.completer),
        seed=config.completer.seed,
        system_prompt=config.completer.system_prompt,
        store=store,
        models=models,
    )
    counts.add([completed])
    rated = rate(
        completions,
        roles.rater,
        templates,
        Sampling.from_config(config.rating),
        seeds=config.rating.seeds,
        exact=config.rating.exact,
        thoughts=config.rating.thoughts,
        capture=capture,
        dtype=config.capture.dtype.value,
        system_prompt=config.rating.system_prompt,
        store=store,
        models=models,
    )
    counts.add(rated.work)
    judged = judge(config.judge, completions, model=roles.judge, store=store, models=models)
    counts.add(judged.work)
    return completions, rated, judged
