"""One question under many steerings ("doses"): what they do not change is run once for all of them.

Tokens before the first that a dose steers are run unsteered. From there on, the blocks up to the steered layer are run
once, unsteered, and for each dose only those above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefs.models.local.grouping import Steerings, by_beginning, cut, lowest, spans_of_answer
from prefs.models.local.passes import Kept, Passes, State
from prefs.models.local.residuals import Hook
from prefs.models.local.steering import BatchSteering
from prefs.models.prompts import Prompt
from prefs.models.types import Reply, Request

# Bounds the logits in memory while a completion's likelihood is read.
TOKENS_AT_ONCE = 256

# Replies of all rows from their state and the logits of their last tokens.
Read = Callable[[State, torch.Tensor], list[Reply]]


class Likelihood:
    """Keeps, as a pass goes by, what the completions' tokens are predicted from, and sums up how likely they were.

    Parameters
    ----------
    passes
        Of the model.
    prompts
        The rows.
    starts, ends
        The tokens [start, end) of each row that the pass runs.
    """

    stops = False

    def __init__(self, passes: Passes, prompts: Sequence[Prompt], starts: Sequence[int], ends: Sequence[int]):
        self._passes = passes
        self._rows = len(prompts)
        predictions: list[tuple[int, int, int]] = []  # row, column (from the last), the token that comes next
        for number, (row, start, end) in enumerate(zip(prompts, starts, ends, strict=True)):
            first, last = _predicting(row)
            for token in range(max(first, start), min(last, end)):
                predictions.append((number, token - end, row.ids[token + 1]))
        self._predictions = torch.tensor(predictions, dtype=torch.long).reshape(-1, 3)
        self._kept = torch.empty(0)

    def hooks(self) -> list[tuple[int, Hook]]:
        return [(self._passes.n_layers - 1, self._keep)] if len(self._predictions) else []

    def _keep(self, tensor: torch.Tensor, hook: Any) -> None:
        rows, columns, _ = self._predictions.to(tensor.device).unbind(dim=1)
        self._kept = tensor[rows, columns]

    def sums(self) -> torch.Tensor:
        """[rows] sum of the tokens' log-likelihoods, in nats, on the host."""
        rows, _, tokens = self._predictions.unbind(dim=1)
        log_likelihoods = [torch.empty(0, dtype=torch.float64)]
        for hidden, following in zip(self._kept.split(TOKENS_AT_ONCE), tokens.split(TOKENS_AT_ONCE), strict=False):
            if len(following):
                log_likelihoods.append(-self._passes.nll(self._passes.logits(hidden), following, "none"))
        return torch.zeros(self._rows, dtype=torch.float64).index_add(0, rows, torch.cat(log_likelihoods))


def _predicting(prompt: Prompt) -> tuple[int, int]:
    """Token range that the completion's tokens are predicted from: each by the one before it."""
    start, end = prompt.spans.completion
    return max(start - 1, 0), max(end - 1, 0)


def mean_nll(prompts: Sequence[Prompt], sums: torch.Tensor) -> list[float | None]:
    """Mean negative log-likelihood a token of each row's completion; None if it is empty or that is not finite."""
    means: list[float | None] = []
    for row, total in zip(prompts, sums, strict=True):
        first, last = _predicting(row)
        means.append(-float(total) / (last - first) if last > first and bool(total.isfinite()) else None)
    return means


def likelihood_alone(passes: Passes, prompt: Prompt, dose: Steerings) -> float | None:
    """The likelihood of one completion by a pass of its own, which any family runs; see `mean_nll`."""
    first, last = _predicting(prompt)
    steering = BatchSteering.build(dose, [spans_of_answer(prompt)], passes.device)
    _, logits = passes.start([prompt.ids], steering, cached=False, keep=len(prompt.ids) - first)
    following = torch.tensor(prompt.ids[first + 1 : last + 1], dtype=torch.long)
    return mean_nll([prompt], -passes.nll(logits[0, : last - first], following, "sum")[None])[0]


@dataclass(frozen=True)
class DosePasses:
    """The passes of a question put to a batch under doses; `read` reads the replies where it has been run to the end.

    ``request`` is what is wanted of each row and dose.
    """

    passes: Passes
    request: Request
    prompts: Sequence[Prompt]
    read: Read

    def run(self, doses: Sequence[Steerings]) -> list[list[Reply]]:
        """[doses][rows]."""
        replies: dict[int, list[Reply]] = {}
        state, done = self.passes.nothing(len(self.prompts)), [0] * len(self.prompts)
        sums = torch.zeros(len(self.prompts), dtype=torch.float64)
        for beginning, group in by_beginning(doses).items():
            starts = cut(self.prompts, beginning)
            pieces = [row.ids[start:end] for row, start, end in zip(self.prompts, done, starts, strict=True)]
            if any(pieces):
                watchers = self._likelihood(done, starts)
                state, _ = self.passes.extend(state, pieces, watchers=watchers)
                sums = self._added(sums, watchers)
            done = starts
            replies |= self._group({number: doses[number] for number in group}, state, starts, sums)
        return [replies[number] for number in range(len(doses))]

    def _group(
        self, doses: dict[int, Steerings], state: State, starts: Sequence[int], sums: torch.Tensor
    ) -> dict[int, list[Reply]]:
        """Doses that steer nothing before `starts`, where the state has been run to.

        ``sums`` [rows] are the sums of log-likelihoods up to there.
        """
        rest = [row.ids[start:] for row, start in zip(self.prompts, starts, strict=True)]
        ends = [len(row.ids) for row in self.prompts]
        unsteered = [number for number, dose in doses.items() if not dose]
        kept = Kept([lowest(dose) for dose in doses.values() if dose], stops=not unsteered)
        watchers = self._likelihood(starts, ends) if unsteered else []
        below, logits = self.passes.extend(state.fork(), rest, watchers=[kept, *watchers])
        replies: dict[int, list[Reply]] = {}
        if unsteered:
            replies = dict.fromkeys(unsteered, self._replies(below, logits, self._added(sums, watchers)))
        for number, dose in doses.items():
            if dose:
                steering = BatchSteering.build(dose, [spans_of_answer(row) for row in self.prompts], self.passes.device)
                layer, watchers = lowest(dose), self._likelihood(starts, ends)
                after, logits = self.passes.extend_above(
                    layer, kept.after[layer], below, replace(state.fork(), steering=steering), rest, watchers
                )
                replies[number] = self._replies(after, logits, self._added(sums, watchers))
        return replies

    def _likelihood(self, starts: Sequence[int], ends: Sequence[int]) -> list[Likelihood]:
        return [Likelihood(self.passes, self.prompts, starts, ends)] if self.request.likelihood else []

    def _added(self, sums: torch.Tensor, watchers: Sequence[Likelihood]) -> torch.Tensor:
        return sum((watcher.sums() for watcher in watchers), sums)

    def _replies(self, state: State, logits: torch.Tensor, sums: torch.Tensor) -> list[Reply]:
        replies = self.read(state, logits)
        if not self.request.likelihood:
            return replies
        nll = mean_nll(self.prompts, sums)
        return [replace(reply, nll=own) for reply, own in zip(replies, nll, strict=True)]
