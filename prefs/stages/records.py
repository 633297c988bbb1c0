"""What stages hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from prefs.data.task import Task
from prefs.data.template import Invalid, Template
from prefs.job import StageCounts
from prefs.models.thoughts import without_thought
from prefs.models.types import Conversation, Message, Question, Reply, Sample, Sampling, Score
from prefs.statistics.measured import Measured
from prefs.store.vectors import Vectors

# What to do where numbers are not finite, with the key that it is about: in float16 those beyond 65,504 are not.
OTHER_DTYPE = "{} must be bfloat16 or float32 for this model"


def conversation(prompt: str, system_prompt: str | None, reply: str | None = None) -> Conversation:
    """A task as messages, with the assistant's reply if there is one."""
    system = (Message("system", system_prompt),) if system_prompt is not None else ()
    replied = (Message("assistant", reply),) if reply is not None else ()
    return (*system, Message("user", prompt), *replied)


def sample_row(reply: Reply | None, seed: int) -> dict[str, Any] | None:
    """What is stored of a reply's sample; see `prefs.store.missing.ReplyTable`."""
    too_long = Sample(None, 0, True, invalid=Invalid.too_long.value)
    sample = too_long if reply is None else reply.samples.get(seed)
    return None if sample is None else asdict(sample)


def score_row(reply: Reply | None, seed: int) -> dict[str, Any] | None:
    """What is stored of a reply's score; see `prefs.store.missing.ReplyTable`."""
    score = Score(None, invalid=Invalid.too_long.value) if reply is None else reply.scores.get(seed)
    return None if score is None else asdict(score)


def own_text(
    text: str | None, finished: bool, thought: str | None, invalid: str | None
) -> tuple[str | None, str | None, Invalid | None]:
    """Of a stored sample: its text without a thought that stands in it, the thought, and why there is no text."""
    if text is None or invalid is not None:
        return None, thought, Invalid(invalid) if invalid is not None else None
    parted = without_thought(text, finished)
    reason = None if parted.closed else Invalid.thought_cut_off
    return parted.text if parted.closed else None, thought or parted.thought, reason


@dataclass(frozen=True)
class Completion:
    """The completer's answer to a task. There is no text where the prompt was too long, or for another ``reason``.

    ``thought`` is what the completer wrote before it, in a field of its own or in the text.
    """

    task: Task
    text: str | None
    finished: bool = True
    reason: Invalid = Invalid.too_long
    thought: str | None = None

    @property
    def invalid(self) -> Invalid | None:
        """Why there is no text, if there is none."""
        return self.reason if self.text is None else None


@dataclass(frozen=True)
class Answer:
    """One sampled answer and how it was read: a value, or the reason why there is none.

    ``thought`` is what the rater wrote before it.
    """

    seed: int
    text: str | None
    value: float | None
    invalid: Invalid | None
    thought: str | None = None


@dataclass(frozen=True)
class Thoughts:
    """Exact ratings of a thinking rater, one after each of K thoughts.

    ``seeds`` are the thoughts' seeds; ``mass`` is [tasks, K, options], NaN where there is none; ``texts[t]`` are the
    thoughts, and ``invalid[t]`` the reasons where one gave no rating.
    """

    seeds: tuple[int, ...]
    mass: np.ndarray
    texts: Sequence[Sequence[str | None]]
    invalid: Sequence[Sequence[Invalid | None]]


@dataclass(frozen=True)
class Ratings:
    """Everything one template brought for a list of completions, in their order.

    ``answers[t]`` runs over the rating seeds; ``mass`` is [tasks, options], the options' probabilities before
    renormalising, NaN in the rows of tasks that have none (``without_mass`` says why), or None where exact ratings were
    not wanted. Of a rater that ``thinks`` it is the mixture over its ``thoughts``.
    """

    template: Template
    question: Question
    sampling: Sampling
    completions: Sequence[Completion]
    seeds: tuple[int, ...]
    answers: Sequence[Sequence[Answer]]
    mass: np.ndarray | None
    thinks: bool = False
    thoughts: Thoughts | None = None
    without_mass: Mapping[int, Invalid] = field(default_factory=dict)

    def measured(self, refused: Sequence[bool | None]) -> Measured:
        """These ratings and the judge's verdicts as arrays."""
        rows = [[np.nan if answer.value is None else answer.value for answer in answers] for answers in self.answers]
        return Measured(
            tasks=tuple(completion.task.id for completion in self.completions),
            origins=tuple(completion.task.origin for completion in self.completions),
            says=self.template.says,
            values=self.template.values,
            sampled=np.array(rows, dtype=float).reshape(len(self.completions), len(self.seeds)),
            mass=self.mass,
            refused=np.array(refused, dtype=float),
            thinks=self.thinks,
            by_thought=None if self.thoughts is None else self.thoughts.mass,
        )

    def invalid_counts(self) -> dict[str, int]:
        """Number of sampled answers by reason, for the reasons that occur."""
        reasons = [answer.invalid.value for row in self.answers for answer in row if answer.invalid is not None]
        return {reason.value: reasons.count(reason.value) for reason in Invalid if reason.value in reasons}


@dataclass(frozen=True)
class Residuals:
    """Captured vectors of a list of completions at one position.

    ``keys[t]`` is the record of task t, None where it was not captured (too long).
    """

    position: str
    layers: tuple[int, ...]
    keys: Sequence[str | None]
    vectors: Vectors

    def present(self) -> np.ndarray:
        """[tasks] bool: which tasks have a vector at this position, at all of the layers."""
        absent = self.vectors.absent
        return np.array([key is not None and key not in absent and not self.broken(key) for key in self.keys], bool)

    def broken(self, key: str | None) -> set[int]:
        """The layers at which a record is not finite."""
        return set(self.layers) & self.vectors.not_finite.get(key or "", frozenset())


def not_finite(residuals: Sequence[Residuals]) -> str | None:
    """Of how many tasks some vectors are not finite, where, and what to do; None where all are."""
    tasks, layers, positions = set[int](), set[int](), list[str]()
    for captured in residuals:
        broken = {task: own for task, key in enumerate(captured.keys) if (own := captured.broken(key))}
        tasks |= broken.keys()
        layers = layers.union(*broken.values())
        positions += [captured.position] * bool(broken)
    if not tasks:
        return None
    # Float16 has no numbers beyond 65,504. Where the model computes in it, they were infinite before they were stored.
    spec = residuals[0].vectors.spec
    model, stored = spec["model"]["dtype"], spec["dtype"]
    overflow = stored == "float16" != model
    what = f"overflow {stored}" if overflow else f"are not finite in {model}"
    mend = OTHER_DTYPE.format("capture.dtype" if overflow else "model.dtype")
    return (
        f"vectors of {len(tasks)} of {len(residuals[0].keys)} tasks {what} ({', '.join(positions)}; layers"
        f" {', '.join(map(str, sorted(layers)))}), and are not used: {mend}"
    )


@dataclass(frozen=True)
class Rated:
    """What the rating stage brought: ratings by template key, residuals by position, and the work done.

    Residuals at ``rating`` depend on the template, and are found in ``rating_residuals`` by template key.
    """

    ratings: Mapping[str, Ratings]
    residuals: Mapping[str, Residuals]
    rating_residuals: Mapping[str, Residuals]
    work: Sequence[StageCounts]
