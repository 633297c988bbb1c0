"""What is read off a batch that has been run: the options' probabilities, sampled answers, thoughts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from prefs.data.template import Invalid
from prefs.models.local.passes import Passes, State
from prefs.models.options import Path, branchings, option_masses, runs
from prefs.models.prompts import THOUGHT, Prompt, Thought
from prefs.models.sampling import NOT_FINITE, Stops, draw, row_uniforms
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Sample, Sampling

# Sampled answers decoded, or spellings run, at once for each row: bounds the copies of its keys and values.
COPIES = 4

Stream = tuple[int, int]  # row, seed


class Drawn(NamedTuple):
    """Tokens drawn; the stop token after them, None where there was none; whether all logits were finite."""

    ids: list[int]
    stop: int | None
    finite: bool


class Decoder:
    """Goes on from batches of one model. ``stops`` are what ends an answer."""

    def __init__(self, passes: Passes, encoder: ChatEncoder, stops: Stops):
        self._passes = passes
        self._encoder = encoder
        self.stops = stops

    def masses(self, state: State, logits: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        """Probability of each option, [rows, options]; see `prefs.models.options`."""
        looks = [branchings(prompt.beginnings) for prompt in prompts]
        begun = [((), row, row, 0) for row in range(len(prompts))]
        paths: list[tuple[int, Path]] = []
        values = []
        for looked, after in ((begun, logits[:, -1:]), *self._after_beginnings(state, looks)):
            asked = []
            for path, row, stream, place in looked:
                for token in looks[row].get(path, ()):
                    asked.append((stream, place, token))
                    paths.append((row, (*path, token)))
            values.append(_log_probs(after, asked))
        by_row: list[dict[Path, float]] = [{} for _ in prompts]
        for (row, path), value in zip(paths, torch.cat(values).tolist(), strict=True):
            by_row[row][path] = value
        return np.stack(
            [
                option_masses(own, prompt.beginnings, len(prompt.tails))
                for own, prompt in zip(by_row, prompts, strict=True)
            ]
        )

    def _after_beginnings(
        self, state: State, looks: Sequence[Mapping[Path, Path]]
    ) -> Iterator[tuple[list[tuple[Path, int, int, int]], torch.Tensor]]:
        """Logits [streams, places, vocabulary] after all beginnings that an option goes on from, by each row's
        `branchings`: with each one's tokens, row, stream and place."""
        trees = [[path for path in own if path] for own in looks]
        if self._passes.sharing.tree and any(trees):
            looked = [(path, row, row, place) for row, own in enumerate(trees) for place, path in enumerate(own)]
            yield looked, self._passes.extend_tree(state.fork(), trees)
            return
        to_run = [runs(own) for own in looks]
        # Runs of different lengths side by side are padded.
        copies = COPIES if self._passes.sharing.rows else 1
        for start in range(0, max(map(len, to_run)), copies):
            streams = [(row, run) for row, own in enumerate(to_run) for run in own[start : start + copies]]
            longest = max(len(run) for _, run in streams)
            begun = state.fork().select(self._passes.tensor([row for row, _ in streams]))
            _, after = self._passes.extend(begun, [run for _, run in streams], keep=longest)
            yield (
                [
                    (run[:length], row, stream, longest - len(run) + length - 1)
                    for stream, (row, run) in enumerate(streams)
                    for length in range(1, len(run) + 1)
                ],
                after,
            )

    def samples(
        self,
        state: State,
        logits: torch.Tensor,
        seeds: Sequence[Sequence[int]],
        turns: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[dict[int, Sample]]:
        """Sample a continuation for every (row, seed); random numbers are those of the row's turns and the seed."""
        samples: list[dict[int, Sample]] = [{} for _ in seeds]
        for start in range(0, max(map(len, seeds), default=0), COPIES):
            some = [of_row[start : start + COPIES] for of_row in seeds]
            drawn = self._draw(state.fork(), logits, some, turns, sampling, self.stops.tokens)
            for ((row, seed), (ids, stop, finite)), text in zip(drawn.items(), self._texts(drawn), strict=True):
                if finite:
                    samples[row][seed] = Sample(text, len(ids), stop is not None)
                else:
                    samples[row][seed] = Sample(None, len(ids), True, invalid=Invalid.not_finite.value)
        return samples

    def thoughts(
        self,
        state: State,
        logits: torch.Tensor,
        seeds: Sequence[Sequence[int]],
        turns: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[dict[int, Thought]]:
        """Draw a thought for every (row, seed)."""
        thinking, end = self._encoder.thinking, self._encoder.thought_end
        assert thinking is not None
        assert end is not None
        budget = replace(sampling, max_new_tokens=thinking.max_tokens)
        # Other random numbers than the answer's.
        drawn = self._draw(state, logits, seeds, [(*row, THOUGHT) for row in turns], budget, {end, *self.stops.tokens})
        thoughts: list[dict[int, Thought]] = [{} for _ in seeds]
        for ((row, seed), (ids, stop, finite)), text in zip(drawn.items(), self._texts(drawn), strict=True):
            ended = stop == end or thinking.force_close
            reason = None if finite and ended else Invalid.thought_cut_off if finite else Invalid.not_finite
            thoughts[row][seed] = Thought(text, len(ids), reason and reason.value)
        return thoughts

    def _texts(self, drawn: dict[Stream, Drawn]) -> list[str]:
        return [self.stops.cut(text) for text in self._encoder.texts([own.ids for own in drawn.values()])]

    def _draw(
        self,
        state: State,
        logits: torch.Tensor,
        seeds: Sequence[Sequence[int]],
        turns: Sequence[Conversation],
        sampling: Sampling,
        stops: Set[int],
    ) -> dict[Stream, Drawn]:
        """Sample tokens for every (row, seed): up to a stop token, through the text that stops, or to logits that are
        not finite.

        Seeds of a row that have drawn the same tokens so far are one branch and are run once; a finished branch leaves
        the batch.
        """
        uniforms = {
            (row, seed): row_uniforms(seed, turns[row], sampling.max_new_tokens)
            for row in range(len(seeds))
            for seed in seeds[row]
        }
        drawn: dict[Stream, list[int]] = {stream: [] for stream in uniforms}
        stopped: dict[Stream, int] = {}
        broken: set[Stream] = set()
        branches = [[(row, seed) for seed in seeds[row]] for row in range(len(seeds))]
        for step in range(sampling.max_new_tokens):
            numbers = np.zeros((len(branches), max(map(len, branches))))
            for branch, streams in enumerate(branches):
                numbers[branch, : len(streams)] = [uniforms[stream][step] for stream in streams]
            tokens = draw(logits[:, -1], torch.from_numpy(numbers), sampling).tolist()
            grown: dict[tuple[int, int], list[Stream]] = {}
            for branch, streams in enumerate(branches):
                for stream, token in zip(streams, tokens[branch], strict=False):
                    if token == NOT_FINITE:
                        broken.add(stream)
                        continue
                    if token in stops:
                        stopped[stream] = token
                        continue
                    drawn[stream].append(token)
                    if self.stops.reached(self._encoder.tokenizer, drawn[stream]):
                        stopped[stream] = token
                    else:
                        grown.setdefault((branch, token), []).append(stream)
            if not grown or step + 1 == sampling.max_new_tokens:
                break
            parents = self._passes.tensor([branch for branch, _ in grown])
            state, logits = self._passes.extend(state.select(parents), [(token,) for _, token in grown], drawn=True)
            branches = list(grown.values())
        return {stream: Drawn(ids, stopped.get(stream), stream not in broken) for stream, ids in drawn.items()}


def _log_probs(logits: torch.Tensor, looked: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Log-probabilities of tokens, [looked], float64 on the host, by (row, place, token) in logits [rows, places,
    vocabulary]; NaN where logits are not finite."""
    # All at once: on a GPU each look at one number would cost as much as all of them.
    rows, places, tokens = torch.tensor(looked, dtype=torch.long, device=logits.device).reshape(-1, 3).unbind(dim=1)
    return (logits[rows, places, tokens].float() - logits.float().logsumexp(dim=-1)[rows, places]).double().cpu()
