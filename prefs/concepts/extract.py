"""Concept vectors from the activations of two conditions, and what they separate beyond those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from prefs.concepts.difference import Difference, difference_of_means, project
from prefs.concepts.export import SavedVectors, export_gguf, save_vectors
from prefs.concepts.reading import Read, Reader
from prefs.concepts.separation import separation
from prefs.config import ConceptConfig
from prefs.data.task import Task, same_tasks
from prefs.probes.features import NOT_FINITE, Captured, NotFinite
from prefs.probes.folds import assign_folds, resampled, tasks_of
from prefs.probes.probe import Site
from prefs.probes.scores import permutation_p
from prefs.results.tables import columns, numeric
from prefs.stages.records import not_finite
from prefs.statistics.estimates import LEVEL, Resamples

FLIPS = 1000
HELD_OUT = "held-out tasks"
OTHER_ORIGINS = "other origins"
READ_UNDER = "same text, prompts differ"
WRITTEN_UNDER = "texts differ, no prompt"
WORDS = ("concept", "test", "with", "position")


class ReadPair(NamedTuple):
    """Two readings of some tasks, that a concept's vectors are from or are to tell apart."""

    name: str
    first: Read
    second: Read
    tasks: Sequence[Task]

    @property
    def paired(self) -> list[Task]:
        """The tasks that have a vector at every position in both readings."""
        both = self.first.present.keys() & self.second.present.keys()
        return [task for task in self.tasks if task.id in both]


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
        The fold of each of these tasks, by id, and of every other task of the job that is the same as one of them.
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

    def direction(self, site: Site) -> torch.Tensor:
        """[d] float64: the vector of all tasks at a site, of norm 1; 0 where it is."""
        return self.difference.direction[-1, self.difference.sites.index(site)].double()

    def saved(self, card: Mapping[str, Any]) -> SavedVectors:
        """The vectors with their card."""
        own = {"conditions": dict(self.config.conditions), "contrast": list(self.config.contrast), "n": self.n}
        own |= {"origins": self.config.origins}
        norms = self.difference.activation_norm.float()
        return SavedVectors(
            self.config.name, self.difference.sites, self.difference.vector, norms, card={**own, **card}
        )

    def save(self, folder: Path, card: Mapping[str, Any], model_type: str) -> list[Path]:
        """Write the vectors, their card, and a control vector for each position; returns the files."""
        saved = self.saved(card)
        positions = dict.fromkeys(site.position for site in saved.sites)
        exported = [export_gguf(folder / f"{position}.gguf", saved, position, model_type) for position in positions]
        return [*save_vectors(folder, saved), *(path for path in exported if path is not None)]


def extract(
    concepts: Mapping[str, ConceptConfig], tasks: Sequence[Task], reader: Reader, *, bootstrap: int
) -> dict[str, Concept | str]:
    """Extract the vectors of each concept and test them on tasks, origins, wordings, texts and concepts of others.

    A vector is the mean over tasks of the activations under the first condition less those under the second, at each
    captured layer and position ("difference of means"; Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation
    Addition", take it over pairs too). Both complete the task and are read under their own system prompt. Wherever a
    test has a task that the vector is from, that task is projected on a vector without its fold.

    Returns
    -------
    dict
        By key, the concept; or the reason why there are no vectors of it.
    """
    contrasts, ids = _contrasts(concepts, tasks, reader), [task.id for task in tasks]
    same = dict(zip(ids, same_tasks(ids, [task.prompt for task in tasks]), strict=True))
    extracted: dict[str, Concept | str] = {}
    for key, config in concepts.items():
        if contrasts[key].tasks:
            pairs = _read_pairs(key, concepts, tasks, contrasts, reader)
            extracted[key] = _extract(key, config, same, pairs, bootstrap)
        else:
            origins = ", ".join(dict.fromkeys(task.origin for task in tasks))
            wanted = ", ".join(config.origins or [])
            extracted[key] = f"no task is of {wanted} (concept.{key}.origins); there are {origins}"
    return extracted


def read_all(concepts: Mapping[str, ConceptConfig], tasks: Sequence[Task], reader: Reader) -> None:
    """Read all that `extract` reads, where every concept has tasks enough."""
    contrasts = _contrasts(concepts, tasks, reader)
    for key in concepts:
        if contrasts[key].tasks:
            list(_read_pairs(key, concepts, tasks, contrasts, reader))


def _contrasts(concepts: Mapping[str, ConceptConfig], tasks: Sequence[Task], reader: Reader) -> dict[str, ReadPair]:
    """Of each concept, all tasks read under the two conditions of its contrast; its own tasks are those compared."""
    contrasts = {}
    for key, config in concepts.items():
        prompts = [config.conditions[name] for name in config.contrast]
        first, second = (reader.read(tasks, written_under=prompt, read_under=prompt) for prompt in prompts)
        contrasts[key] = ReadPair(HELD_OUT, first, second, _of_origins(tasks, config.origins))
    return contrasts


def _read_pairs(
    key: str,
    concepts: Mapping[str, ConceptConfig],
    tasks: Sequence[Task],
    contrasts: Mapping[str, ReadPair],
    reader: Reader,
) -> Iterator[ReadPair]:
    """The tests of a concept, the first of which is its own contrast; each is read as it is asked for."""
    config, contrast = concepts[key], contrasts[key]
    (_, first, second, own), names = contrast, config.contrast
    yield contrast
    ids = {task.id for task in own}
    others = [task for task in tasks if task.id not in ids]
    origins = list(dict.fromkeys(task.origin for task in others))
    if len(origins) > 1:
        yield ReadPair(OTHER_ORIGINS, first, second, others)
    for origin in origins:
        yield ReadPair(f"origin {origin}", first, second, _of_origins(others, [origin]))

    def read_pair(name: str, conditions: Sequence[tuple[str | None, str | None]]) -> ReadPair:
        one, other = (reader.read(own, written_under=written, read_under=read) for written, read in conditions)
        return ReadPair(name, one, other, own)

    for wording, texts in config.wordings.items():
        yield read_pair(f"wording {wording}", [(texts[name], texts[name]) for name in names])
    prompts = [config.conditions[name] for name in names]
    yield read_pair(READ_UNDER, [(None, prompt) for prompt in prompts])
    yield read_pair(WRITTEN_UNDER, [(prompt, None) for prompt in prompts])
    for name, prompt in config.conditions.items():
        if name not in names:
            between = reader.read(own, written_under=prompt, read_under=prompt)
            yield ReadPair(f"{names[0]} against {name}", first, between, own)
            yield ReadPair(f"{name} against {names[1]}", between, second, own)
    for other, another in contrasts.items():
        if other != key:
            yield another._replace(name=f"concept {concepts[other].name}")


def _extract(
    key: str, config: ConceptConfig, same: Mapping[str, str], pairs: Iterator[ReadPair], bootstrap: int
) -> Concept | str:
    """One concept; `same` says of each task of the job which one it is, however often it occurs."""
    contrast = next(pairs)
    _, first, second, own = contrast
    ids = [task.id for task in contrast.paired]
    first_ids = [same[name] for name in ids]
    task_of_row = tasks_of(np.array(first_ids))
    needed = max(config.folds, 3)
    readings = list(zip(config.contrast, (first, second), strict=True))
    if (count := len(set(first_ids))) < needed:
        have = [f"{name} has {sum(task.id in read.present for task in own)} of {len(own)}" for name, read in readings]
        return (
            f"{count} tasks have a vector at every position under both conditions ({', '.join(have)}), and"
            f" {config.folds} folds need {needed} (concept.{key}.folds)"
            + "".join(f"; {broken}" for broken in _not_finite(first, second))
        )
    draws = cache(lambda n: Resamples.draw(n, bootstrap, config.seed))
    folds = assign_folds(first_ids, [task.origin for task in contrast.paired], config.folds, config.seed)
    a, b = first.features(ids), second.features(ids)
    remarks = []
    if len(ids) < len(own):
        lack = ", ".join(f"{sum(task.id not in read.present for task in own)} lack {name}" for name, read in readings)
        remarks.append(
            f"Concept {config.name}: paired on the {len(ids)} of {len(own)} tasks that have a completion and a vector"
            f" under both conditions ({lack})."
        )
    remarks += [f"Concept {config.name}: {broken}." for broken in _not_finite(first, second)]
    try:
        difference = difference_of_means(
            a,
            b,
            folds,
            task=task_of_row,
            splits=config.splits,
            draws=resampled(task_of_row, bootstrap, config.seed),
            flips=FLIPS,
            seed=config.seed,
        )
        fold_of_first = dict(zip(first_ids, folds.tolist(), strict=True))
        fold_of = {name: fold_of_first[twin] for name, twin in same.items() if twin in fold_of_first}
        vectors = _vectors_table(config.name, difference)
        concept = Concept(key, config, difference, a, b, fold_of, vectors, pd.DataFrame(), remarks)
        tests = [row for pair in (contrast, *pairs) for row in _test(concept, pair, draws)]
    except NotFinite as error:
        return f"the vector of a task at {error.site} {NOT_FINITE}"
    return replace(concept, tests=numeric(pd.DataFrame(tests), words=WORDS))


def _not_finite(*readings: Read) -> list[str]:
    """What there is to say of vectors that are not finite."""
    told = [not_finite(list(read.residuals.values())) for read in readings]
    return list(dict.fromkeys(text for text in told if text is not None))


def _test(concept: Concept, pair: ReadPair, draws: Callable[[int], Resamples]) -> list[dict[str, object]]:
    """One test: a row a site."""
    ids = [task.id for task in pair.paired]
    difference = concept.difference
    first = second = np.empty((0, len(difference.sites)))
    if ids:
        fits = concept.fits(ids)
        first = project(pair.first.features(ids), difference, fits)
        second = project(pair.second.features(ids), difference, fits)
    rows = []
    for site, estimates in zip(difference.sites, separation(first, second, draws(len(ids))), strict=True):
        row: dict[str, object] = {"concept": concept.config.name, "test": pair.name, **site._asdict()}
        row |= {"n": len(ids), "left_out": len(pair.tasks) - len(ids)}
        for name, estimate in estimates.items():
            row |= columns(name, estimate)
        rows.append(row)
    return rows


def _vectors_table(name: str, difference: Difference) -> pd.DataFrame:
    """One row a site: how large the vector is, and whether other tasks would give the same one.

    ``norm`` is the Euclidean norm, ``activation_norm`` the mean norm of the activations there, ``relative`` their
    ratio. ``split_half`` is the mean cosine of the vectors of two random halves of the tasks, with the range of 95 % of
    splits. ``resampled`` is the median cosine of a bootstrap resample's vector with the vector, and
    ``resampled_low`` the one that 97.5 % are above. ``p`` is how often exchanging the two conditions within tasks, by
    the toss of a coin, gives as large a vector.
    """
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    rows = []
    for column, site in enumerate(difference.sites):
        norm, activation = float(difference.norm[column]), float(difference.activation_norm[column])
        halves, resampled = difference.halves[:, column], difference.resampled[1:, column]
        halves, resampled = halves[np.isfinite(halves)], resampled[np.isfinite(resampled)]
        low, high = np.quantile(halves, ends) if len(halves) else (None, None)
        rows.append(
            {
                "concept": name,
                **site._asdict(),
                "n": difference.n,
                "norm": norm,
                "activation_norm": activation,
                "relative": norm / activation if activation else None,
                "split_half": float(halves.mean()) if len(halves) else None,
                "split_half_low": low,
                "split_half_high": high,
                "resampled": float(np.median(resampled)) if len(resampled) else None,
                "resampled_low": float(np.quantile(resampled, ends[0])) if len(resampled) else None,
                "p": permutation_p(norm, difference.flipped[:, column]) if norm else None,
            }
        )
    return numeric(pd.DataFrame(rows), words=WORDS)


def _of_origins(tasks: Sequence[Task], origins: Sequence[str] | None) -> list[Task]:
    return [task for task in tasks if origins is None or task.origin in origins]
