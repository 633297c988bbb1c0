"""The concept stage: vectors from the activations of two conditions, and what they separate beyond those."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefs.concepts.card import SavedVectors, export_gguf, save_vectors
from prefs.concepts.difference import Difference, difference_of_means, project
from prefs.concepts.reading import Read, Reader
from prefs.concepts.separation import separation
from prefs.config import ConceptConfig
from prefs.data.task import Task
from prefs.probes.features import Captured, NotFinite
from prefs.probes.folds import assign_folds
from prefs.probes.scores import permutation_p
from prefs.results.summary import columns, numeric
from prefs.statistics.estimates import LEVEL, Resamples

FLIPS = 1000
HELD_OUT = "held-out tasks"
OTHER_ORIGINS = "other origins"
READ_UNDER = "same text, prompts differ"
WRITTEN_UNDER = "texts differ, no prompt"
Pair = tuple[Read, Read]


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept's vectors and what was found of them.

    Attributes
    ----------
    difference
        The vectors, with the directions that each fold's tasks did not take part in.
    first, second
        Vectors of the tasks that they are from, under the two conditions.
    fold_of
        The fold of each of these tasks, by id.
    vectors
        Table: one row a position and layer; how large the vector is, and how sure.
    tests
        Table: one row a test, position and layer; how well the vector separates the two conditions there.
    remarks
        What was left out.
    """

    key: str
    config: ConceptConfig
    difference: Difference
    first: Captured
    second: Captured
    fold_of: Mapping[str, int]
    vectors: pd.DataFrame
    tests: pd.DataFrame
    remarks: Sequence[str]

    @property
    def n(self) -> int:
        return self.difference.n

    def fits(self, tasks: Sequence[str]) -> np.ndarray:
        """[n] which direction each task is projected on: one that it had no part in."""
        whole = len(self.difference.direction) - 1
        return np.array([self.fold_of.get(task, whole) for task in tasks], dtype=np.int64)

    def saved(self, card: Mapping[str, Any]) -> SavedVectors:
        """The vectors with their card."""
        own = {"conditions": dict(self.config.conditions), "contrast": list(self.config.contrast), "n": self.n}
        own |= {"origins": self.config.origins}
        return SavedVectors(
            concept=self.config.name,
            sites=self.difference.sites,
            vectors=self.difference.vector,
            activation_norms=self.difference.activation_norm.float(),
            card={**own, **card},
        )

    def save(self, folder: Path, card: Mapping[str, Any], model_type: str) -> list[Path]:
        """Write the vectors, their card, and a control vector for each position; returns the files."""
        saved = self.saved(card)
        paths = save_vectors(folder, saved)
        for position in dict.fromkeys(site.position for site in saved.sites):
            written = export_gguf(folder / f"{position}.gguf", saved, position, model_type)
            paths += [] if written is None else [written]
        return paths


@dataclass(frozen=True)
class NoConcept:
    """Why there are no vectors of a concept."""

    key: str
    reason: str


def extract(
    concepts: Mapping[str, ConceptConfig], tasks: Sequence[Task], reader: Reader, *, bootstrap: int
) -> list[Concept | NoConcept]:
    """Extract the vectors of each concept and test them on tasks, origins, wordings, texts and concepts of others.

    A vector is the mean over tasks of the activations under the first condition less those under the second, at each
    captured layer and position ("difference of means"; Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation
    Addition", take it over pairs too). Both complete the task and are read under their own system prompt. Wherever a
    test has a task that the vector is from, that task is projected on a vector without its fold.
    """
    contrasts = _contrasts(concepts, tasks, reader)
    return [_extract(key, config, concepts, tasks, contrasts, reader, bootstrap) for key, config in concepts.items()]


def read_all(concepts: Mapping[str, ConceptConfig], tasks: Sequence[Task], reader: Reader) -> None:
    """Read all that `extract` reads, where every concept has tasks enough."""
    contrasts = _contrasts(concepts, tasks, reader)
    for key, config in concepts.items():
        if own := _of_origins(tasks, config.origins):
            _tests(key, concepts, own, tasks, contrasts, reader)


def _contrasts(concepts: Mapping[str, ConceptConfig], tasks: Sequence[Task], reader: Reader) -> dict[str, Pair]:
    """Of each concept, the tasks read under the two conditions of its contrast."""
    contrasts: dict[str, Pair] = {}
    for key, config in concepts.items():
        prompts = [config.conditions[name] for name in config.contrast]
        first, second = (reader.read(tasks, written_under=each, read_under=each) for each in prompts)
        contrasts[key] = first, second
    return contrasts


def _extract(
    key: str,
    config: ConceptConfig,
    concepts: Mapping[str, ConceptConfig],
    tasks: Sequence[Task],
    contrasts: Mapping[str, Pair],
    reader: Reader,
    bootstrap: int,
) -> Concept | NoConcept:
    own = _of_origins(tasks, config.origins)
    if not own:
        there = ", ".join(dict.fromkeys(task.origin for task in tasks))
        return NoConcept(
            key, f"no task is of {', '.join(config.origins or [])} (concept.{key}.origins); there are {there}"
        )
    first, second = contrasts[key]
    paired = _paired(own, first, second)
    needed = max(config.folds, 3)
    if len(paired) < needed:
        missing = [
            f"{name} has {sum(task.id in read.present for task in own)} of {len(own)}"
            for name, read in zip(config.contrast, (first, second), strict=True)
        ]
        return NoConcept(
            key,
            f"{len(paired)} tasks have a vector at every position under both conditions ({', '.join(missing)}),"
            f" and {config.folds} folds need {needed} (concept.{key}.folds)",
        )
    draws = cache(lambda n: Resamples.draw(n, bootstrap, config.seed))
    ids = [task.id for task in paired]
    folds = assign_folds(ids, [task.origin for task in paired], config.folds, config.seed)
    a, b = first.features(ids), second.features(ids)
    try:
        difference = difference_of_means(
            a, b, folds, splits=config.splits, draws=draws(len(ids)), flips=FLIPS, seed=config.seed
        )
        found = Concept(
            key=key,
            config=config,
            difference=difference,
            first=a,
            second=b,
            fold_of=dict(zip(ids, folds.tolist(), strict=True)),
            vectors=vectors_table(config.name, difference),
            tests=pd.DataFrame(),
            remarks=_left_out(config, own, paired, first, second),
        )
        tests = [
            _test(found, name, pair, of, draws)
            for name, pair, of in _tests(key, concepts, own, tasks, contrasts, reader)
        ]
    except NotFinite as error:
        return NoConcept(key, f"the vector of a task at {error.site} holds a NaN or an infinity: capture it again")
    words = ("concept", "test", "position")
    table = numeric(pd.concat(tests, ignore_index=True), words=words)
    return replace(found, tests=table)


def _tests(
    key: str,
    concepts: Mapping[str, ConceptConfig],
    own: Sequence[Task],
    tasks: Sequence[Task],
    contrasts: Mapping[str, Pair],
    reader: Reader,
) -> list[tuple[str, Pair, Sequence[Task]]]:
    """The tests: their names, the two readings that are to be told apart, and the tasks."""
    config = concepts[key]
    names = config.contrast
    prompts = [config.conditions[name] for name in names]
    first, second = contrasts[key]
    tests: list[tuple[str, Pair, Sequence[Task]]] = [(HELD_OUT, (first, second), own)]
    ids = {task.id for task in own}
    others = [task for task in tasks if task.id not in ids]
    origins = list(dict.fromkeys(task.origin for task in others))
    tests += [(OTHER_ORIGINS, (first, second), others)] if len(origins) > 1 else []
    tests += [(f"origin {origin}", (first, second), _of_origins(others, [origin])) for origin in origins]
    for wording, texts in config.wordings.items():
        pair = tuple(reader.read(own, written_under=texts[name], read_under=texts[name]) for name in names)
        tests.append((f"wording {wording}", (pair[0], pair[1]), own))
    without = [reader.read(own, written_under=None, read_under=each) for each in prompts]
    tests.append((READ_UNDER, (without[0], without[1]), own))
    under = [reader.read(own, written_under=each, read_under=None) for each in prompts]
    tests.append((WRITTEN_UNDER, (under[0], under[1]), own))
    for name, prompt in config.conditions.items():
        if name not in names:
            between = reader.read(own, written_under=prompt, read_under=prompt)
            tests.append((f"{names[0]} against {name}", (first, between), own))
            tests.append((f"{name} against {names[1]}", (between, second), own))
    for another, other in concepts.items():
        if another != key:
            tests.append((f"concept {other.name}", contrasts[another], _of_origins(tasks, other.origins)))
    return tests


def _test(concept: Concept, name: str, pair: Pair, tasks: Sequence[Task], draws: Any) -> pd.DataFrame:
    """One test: a row a site."""
    ids = [task.id for task in _paired(tasks, *pair)]
    difference = concept.difference
    if ids:
        fits = concept.fits(ids)
        first, second = (project(read.features(ids), difference, fits) for read in pair)
    else:
        first = second = np.empty((0, len(difference.sites)))
    rows = []
    for site, found in zip(difference.sites, separation(first, second, draws(len(ids))), strict=True):
        row: dict[str, object] = {"concept": concept.config.name, "test": name, **site._asdict(), "n": found.n}
        row |= {"left_out": len(tasks) - len(ids)}
        rows.append(row | columns("auc", found.auc) | columns("d", found.d) | columns("accuracy", found.accuracy))
    return pd.DataFrame(rows)


def vectors_table(name: str, difference: Difference) -> pd.DataFrame:
    """One row a site: how large the vector is, and whether other tasks would give the same one.

    ``norm`` is the Euclidean norm, ``activation_norm`` the mean norm of the activations there, ``relative`` their
    ratio. ``split_half`` is the mean cosine of the vectors of two random halves of the tasks, with the range of 95 % of
    splits. ``resampled`` is the median cosine of a bootstrap resample's vector with the vector, and
    ``resampled_low`` the one that 97.5 % are above. ``p`` is how often exchanging the two conditions within tasks, by
    the toss of a coin, gives as large a vector.
    """
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    rows = []
    for at, site in enumerate(difference.sites):
        norm, activation = float(difference.norm[at]), float(difference.activation_norm[at])
        halves, resampled = difference.halves[:, at], difference.resampled[1:, at]
        halves, resampled = halves[np.isfinite(halves)], resampled[np.isfinite(resampled)]
        row: dict[str, object] = {"concept": name, **site._asdict(), "n": difference.n, "norm": norm}
        row |= {"activation_norm": activation, "relative": norm / activation if activation else None}
        row["split_half"] = float(halves.mean()) if len(halves) else None
        row["split_half_low"], row["split_half_high"] = np.quantile(halves, ends) if len(halves) else (None, None)
        row["resampled"] = float(np.median(resampled)) if len(resampled) else None
        row["resampled_low"] = float(np.quantile(resampled, ends[0])) if len(resampled) else None
        row["p"] = permutation_p(norm, difference.flipped[:, at]) if norm else None
        rows.append(row)
    return numeric(pd.DataFrame(rows), words=("concept", "position"))


def concept_cosines(concepts: Sequence[Concept]) -> pd.DataFrame:
    """Cosine of the vectors of every two concepts, one row a pair and site."""
    rows = []
    for one, other in itertools.combinations(concepts, 2):
        for at, site in enumerate(one.difference.sites):
            cosine = one.difference.direction[-1, at].double() @ other.difference.direction[-1, at].double()
            row: dict[str, object] = {"concept": one.config.name, "with": f"concept {other.config.name}"}
            d = one.difference.vector.shape[-1]
            rows.append(row | {**site._asdict(), "cosine": float(cosine.clamp(-1, 1)), "random_sd": d**-0.5})
    return pd.DataFrame(rows)


def _of_origins(tasks: Sequence[Task], origins: Sequence[str] | None) -> list[Task]:
    return [task for task in tasks if origins is None or task.origin in origins]


def _paired(tasks: Sequence[Task], first: Read, second: Read) -> list[Task]:
    """The tasks that have a vector at every position in both."""
    both = first.present.keys() & second.present.keys()
    return [task for task in tasks if task.id in both]


def _left_out(
    config: ConceptConfig, tasks: Sequence[Task], paired: Sequence[Task], first: Read, second: Read
) -> list[str]:
    if len(paired) == len(tasks):
        return []
    counts = ", ".join(
        f"{sum(task.id not in read.present for task in tasks)} lack {name}"
        for name, read in zip(config.contrast, (first, second), strict=True)
    )
    return [
        f"Concept {config.name}: paired on the {len(paired)} of {len(tasks)} tasks that have a completion and a vector"
        f" under both conditions ({counts})."
    ]
