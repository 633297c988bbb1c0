"""The vectors that a job steers with: the concept's, and its controls of the same norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from prefs.concepts.difference import shuffled_vector
from prefs.concepts.export import SavedVectors, check_model, load_vectors
from prefs.concepts.extract import Concept
from prefs.config import Config, SteeringConfig
from prefs.errors import UserError
from prefs.models.architecture import Architecture
from prefs.models.loading import ModelSpec, identity
from prefs.probes.probe import Site
from prefs.stages.probe import ProbeReport
from prefs.stages.steer import Control, SteeringVector


def check_saved(config: Config, rater: ModelSpec, layers: Sequence[int], architecture: Architecture) -> None:
    """Refuse saved vectors that do not fit the model, before it is loaded.

    Raises
    ------
    UserError
        If they are of another model, or lack a layer or the position.
    """
    if config.steering.vector in ("none", "concept"):
        return
    saved = load_vectors(config.steering.vector)
    check_model(saved, identity(rater), rater.name)
    if (width := saved.vectors.shape[-1]) != architecture.d_model:
        raise UserError(f"the vectors of {saved.concept} have {width} numbers; {rater.name} has {architecture.d_model}")
    for layer in layers:
        saved.vector(Site(layer, config.steering.position))


def steering_vectors(
    config: SteeringConfig,
    layers: Sequence[int],
    saved: SavedVectors,
    concept: Concept | None,
    probes: ProbeReport | None,
) -> tuple[list[SteeringVector], list[str]]:
    """The vector and its controls at each layer, all of the same norm; and what controls there are not, and why.

    Random directions are normal deviates; a shuffled vector is the difference of means of labels exchanged within
    half of the tasks; a probe's direction is that of the highest exact rating (or of its first target), at ``rating``
    where it was probed there.

    Raises
    ------
    UserError
        If there is no vector at a layer, or it is zero or not finite.
    """
    controls = config.controls
    vectors: list[SteeringVector] = []
    for layer in layers:
        site = Site(layer, config.position)
        vector, activation_norm = saved.vector(site)
        if not bool(vector.any()):
            raise UserError(f"the vector of {saved.concept} at {site} is zero: its two conditions do not differ there")
        if not bool(vector.isfinite().all()) or not math.isfinite(activation_norm):
            raise UserError(f"the vector of {saved.concept} at {site}, or the activations there, overflow float32")
        vector = vector if config.unit == "vector" else vector / vector.norm() * activation_norm
        length = float(vector.norm())
        relative = length / activation_norm if activation_norm else math.nan
        others: list[tuple[str, Control, torch.Tensor]] = []
        for count in range(controls.random):
            generator = torch.Generator().manual_seed(_seed(config.seed, layer, count))
            others.append((f"random {count}", "random", torch.randn(len(vector), generator=generator)))
        for count in range(controls.shuffled if concept is not None else 0):
            assert concept is not None
            shuffled = shuffled_vector(concept.first, concept.second, site, _seed(config.seed, layer, count))
            others.append((f"shuffled labels {count}", "shuffled", shuffled))
        if controls.probes and probes is not None:
            others += _probe_direction(probes, site)
        vectors.append(SteeringVector(saved.concept, "concept", layer, vector.float(), relative))
        for name, control, other in others:
            if bool(other.any()):
                scaled = other.float() / other.float().norm() * length
                vectors.append(SteeringVector(name, control, layer, scaled, relative))
        if controls.ablation:
            vectors.append(SteeringVector("ablation", "ablation", layer, vector.float(), relative))
    without = []
    if controls.shuffled and concept is None:
        without.append("No control by shuffled labels: the vectors came from files, without the activations.")
    if controls.probes and not any(vector.control == "probe" for vector in vectors):
        without.append("No control by a probe's direction: no probe of this job has one at a steered layer.")
    return vectors, without


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _probe_direction(report: ProbeReport, site: Site) -> list[tuple[str, Control, torch.Tensor]]:
    """The direction of one probe at a site or, at its layer, at ``rating``; none where none was probed there."""
    sites = report.features.sites
    for result in sorted(report.results, key=lambda result: result.target.key != "exact"):
        for probed in (Site(site.layer, "rating"), site):
            if result.final_directions is not None and probed in sites:
                direction = result.final_directions[sites.index(probed)]
                if bool(direction.any()):
                    return [(f"probe on {result.target.name}, {probed.position}", "probe", direction)]
    return []
