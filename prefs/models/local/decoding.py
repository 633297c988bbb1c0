"""What is read off a batch that has been run: the options' probabilities, sampled answers, thoughts."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import numpy as np
import torch

from prefs.models.local.passes import Passes, State
from prefs.models.prompts import THOUGHT, Prompt, Thought, option_masses
from prefs.models.sampling import draw, row_uniforms
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Sample, Sampling

# Sampled answers decoded at once for each row: bounds the copies of a conversation's keys and values.
SEEDS_AT_ONCE = 4

Stream = tuple[int, int]  # row, seed


class Decoder:
    """Goes on from batches of one model. ``stops`` are the tokens that end an answer."""

    def __init__(self, passes: Passes, encoder: ChatEncoder, stops: Set[int]):
        self._passes = passes
        self._encoder = encoder
        self.stops = stops

    def masses(self, state: State, logits: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        """Probability of each whole option string, [rows, options]."""
        first = logits[:, -1].float().log_softmax(dim=-1)
        columns = []
        for option in range(len(prompts[0].tails)):
            tails = [row.tails[option] for row in prompts]
            log_prob = first.gather(1, self._passes.tensor([[tail[0]] for tail in tails]).to(first.device))[:, 0]
            if any(len(tail) > 1 for tail in tails):
                # The last token is only predicted, never run.
                longest = max(len(tail) for tail in tails)
                _, after = self._passes.extend(state.fork(), [tail[:-1] for tail in tails], keep=longest - 1)
                after = after.float().log_softmax(dim=-1)
                # All at once: on a GPU each look at one number would cost as much as all of them.
                padded = [[-1] * (longest - len(tail)) + list(tail[1:]) for tail in tails]
                tokens = self._passes.tensor(padded).to(after.device)
                later = after.gather(2, tokens.clamp(min=0)[..., None])[..., 0]
                log_prob += later.masked_fill(tokens < 0, 0.0).sum(dim=1)
            columns.append(log_prob.double().cpu().numpy())
        stacked = np.stack(columns, axis=1)
        return np.concatenate(
            [option_masses(row[None], prompt.tails) for row, prompt in zip(stacked, prompts, strict=True)]
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
        for start in range(0, max(map(len, seeds), default=0), SEEDS_AT_ONCE):
            some = [of_row[start : start + SEEDS_AT_ONCE] for of_row in seeds]
            drawn = self._draw(state.fork(), logits, some, turns, sampling, self.stops)
            for ((row, seed), (ids, stop)), text in zip(drawn.items(), self._texts(drawn), strict=True):
                samples[row][seed] = Sample(text, len(ids), stop is not None)
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
        drawn = self._draw(state, logits, seeds, [(*row, THOUGHT) for row in turns], budget, {end, *self.stops})
        thoughts: list[dict[int, Thought]] = [{} for _ in seeds]
        for ((row, seed), (ids, stop)), text in zip(drawn.items(), self._texts(drawn), strict=True):
            thoughts[row][seed] = Thought(text, len(ids), stop == end or thinking.force_close)
        return thoughts

    def _texts(self, drawn: dict[Stream, tuple[list[int], int | None]]) -> list[str]:
        return self._encoder.texts([ids for ids, _ in drawn.values()])

    def _draw(
        self,
        state: State,
        logits: torch.Tensor,
        seeds: Sequence[Sequence[int]],
        turns: Sequence[Conversation],
        sampling: Sampling,
        stops: Set[int],
    ) -> dict[Stream, tuple[list[int], int | None]]:
        """Sample tokens for every (row, seed), up to a stop token; and that token, None where there was none.

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
        branches = [[(row, seed) for seed in seeds[row]] for row in range(len(seeds))]
        for step in range(sampling.max_new_tokens):
            numbers = np.zeros((len(branches), max(map(len, branches))))
            for branch, streams in enumerate(branches):
                numbers[branch, : len(streams)] = [uniforms[stream][step] for stream in streams]
            tokens = draw(logits[:, -1], torch.from_numpy(numbers), sampling).tolist()
            grown: dict[tuple[int, int], list[Stream]] = {}
            for branch, streams in enumerate(branches):
                for stream, token in zip(streams, tokens[branch], strict=False):
                    if token in stops:
                        stopped[stream] = token
                    else:
                        drawn[stream].append(token)
                        grown.setdefault((branch, token), []).append(stream)
            if not grown or step + 1 == sampling.max_new_tokens:
                break
            parents = self._passes.tensor([branch for branch, _ in grown])
            state, logits = self._passes.extend(state.select(parents), [(token,) for _, token in grown], drawn=True)
            branches = list(grown.values())
        return {stream: (ids, stopped.get(stream)) for stream, ids in drawn.items()}
