"""What the TransformerLens engine would run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prefs.models.architecture import architecture
from prefs.models.encoded import Encoded
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.local.doses import Dose, active, by_beginning, cut, lowest
from prefs.models.local.engine import reads_logits, shared_prefix
from prefs.models.local.residuals import spots
from prefs.models.options import Asked, ask, unasked
from prefs.models.thoughts import Thought, joined
from prefs.models.tokens import Message
from prefs.models.types import (
    Answer,
    Ask,
    CaptureRequest,
    Conversation,
    Dosed,
    Observation,
    Question,
    Sample,
    Sampling,
    Steering,
    Usage,
)
from prefs.plan.book import COMPLETER, JUDGE, RATER, THOUGHTS, Book, encoder_of, uniform
from prefs.plan.lengths import Lengths, Prose


class PlannedTransformerLens(Encoded):
    """Counts the tokens that `prefs.models.local.engine` would run, a conversation at a time.

    Steered passes are counted as those of a family that `shares_blocks`.
    """

    def __init__(self, spec: ModelSpec, lengths: Lengths, book: Book):
        self.encoder = encoder_of(spec)
        self.shape = architecture(model_folder(spec), spec.revision)
        self.max_context = spec.max_context or self.shape.context
        self._lengths, self._book, self._prose = lengths, book, Prose(self.encoder)

    def complete(
        self, batch: Sequence[Conversation], seed: int, sampling: Sampling, steering: Sequence[Steering] = ()
    ) -> list[Sample]:
        tally, length = self._book.of(COMPLETER), self._lengths.answer("completions", sampling.max_new_tokens)
        tally.requests += len(batch)
        samples = []
        for row in batch:
            thought = self._think(COMPLETER, row, (seed,))[seed]
            tally.prompt_tokens += len(self.encoder.encode(row, answer="", thought=thought).ids)
            tally.drawn_tokens += length.run
            samples.append(Sample(self._prose.text(length.drawn, row, seed), round(length.drawn), False, thought))
        self._book.made_up = True
        return samples

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
        steering: Sequence[Steering] = (),
    ) -> list[Observation]:
        self._book.of(RATER).requests += len(batch)
        return [self._observe(row, asks, sampling, capture) for row in batch]

    def observe_doses(
        self,
        batch: Sequence[Conversation],
        question: Ask,
        sampling: Sampling,
        doses: Sequence[Sequence[Steering]],
        *,
        likelihood: bool = True,
    ) -> list[list[Dosed]]:
        tally = self._book.of(RATER)
        tally.requests += len(batch) * len(doses)
        different = list(dict.fromkeys(active(dose) for dose in doses))
        asked = [ask(self.encoder, row, question.question) for row in batch]
        if self.encoder.thinking is None:
            self._doses(asked, different, question, sampling)
        else:
            for row, of in zip(batch, asked, strict=True):
                opened = self.encoder.open_thought((*row, Message("user", question.question.text)))
                # Run to see whether the logits are finite, for the completion's likelihood, and then to be answered.
                tally.prompt_tokens += len(different) * (len(opened) + likelihood * of.spans[-2][1])
                for _ in different:
                    self._observe(row, [question], sampling, None)
        answers = [
            Answer(
                dict.fromkeys(question.scores, uniform(question.question)),
                {seed: self._sample(sampling, row, seed) for seed in question.seeds},
            )
            for row in batch
        ]
        return [[Dosed(answer, 0.0) for answer in answers] for _ in doses]

    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        tally = self._book.of(JUDGE)
        tally.requests += len(batch)
        for row in batch:
            thought = self._think(JUDGE, row, (0,))[0]
            asked = ask(self.encoder, row[:-1], Question(row[-1].content, tuple(options)), thought)
            tally.prompt_tokens += len(asked.ids) + _scoring(asked)
        return [options[0]] * len(batch)

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        pass

    def _think(
        self, role: str, conversation: Conversation, seeds: Sequence[int], shared: int = 0
    ) -> Mapping[int, str | None]:
        """The thoughts that answers come after, by seed; `shared` tokens of their prompt have been run."""
        thinking, tally = self.encoder.thinking, self._book.of(role)
        if thinking is None:
            return dict.fromkeys(seeds)
        length = self._lengths.thought(THOUGHTS[role], thinking.max_tokens, self.encoder)
        tally.prompt_tokens += len(self.encoder.open_thought(conversation)) - shared
        tally.drawn_tokens += length.run * len(seeds)
        tally.thoughts += len(seeds)
        self._book.made_up = True
        return {seed: self._prose.text(length.drawn, conversation, seed) for seed in seeds}

    def _observe(
        self, row: Conversation, asks: Sequence[Ask], sampling: Sampling, capture: CaptureRequest | None
    ) -> Observation:
        if not asks and capture is None:
            return Observation(())
        asked = [ask(self.encoder, row, each.question) for each in asks] or [unasked(self.encoder, row)]
        prefix = len(shared_prefix(asked))
        self._book.of(RATER).prompt_tokens += prefix * self._share(capture, asks)
        at_rating = capture if capture is not None and "rating" in capture.positions else None
        answer = self._answer if self.encoder.thinking is None else self._answer_after_thoughts
        answers = [answer(row, each, of, prefix, sampling, at_rating) for each, of in zip(asks, asked, strict=False)]
        return Observation(
            tuple(answers),
            {} if capture is None else {at: self._vector(capture) for at in spots(asked[0], capture.positions)},
        )

    def _answer(
        self,
        row: Conversation,
        each: Ask,
        asked: Asked,
        prefix: int,
        sampling: Sampling,
        capture: CaptureRequest | None,
    ) -> Answer:
        if capture is None and not reads_logits([each]):
            return Answer()
        self._book.of(RATER).prompt_tokens += (len(asked.ids) - prefix) * self._share(capture, [each])
        self._read([asked], each, sampling)
        return Answer(
            {0: uniform(each.question)} if each.scores else {},
            {seed: self._sample(sampling, (*row, Message("user", each.question.text)), seed) for seed in each.seeds},
            None if capture is None else self._vector(capture),
        )

    def _answer_after_thoughts(
        self,
        row: Conversation,
        each: Ask,
        asked: Asked,
        prefix: int,
        sampling: Sampling,
        capture: CaptureRequest | None,
    ) -> Answer:
        seeds = tuple(dict.fromkeys((*each.scores, *each.seeds)))
        thoughts = self._think(RATER, (*row, Message("user", each.question.text)), seeds, prefix)
        answers = Answer()
        for seed, text in thoughts.items():
            assert text is not None
            after = ask(self.encoder, row, each.question, text)
            once = Ask(each.question, (seed,) * (seed in each.seeds), (0,) * (seed in each.scores))
            captured = capture if seed == seeds[0] else None
            answer = self._answer(row, once, after, prefix, sampling, captured)
            answers = joined(answers, Thought(text, 0, True).of(answer), seed)
        return answers

    def _doses(self, asked: Sequence[Asked], doses: Sequence[Dose], question: Ask, sampling: Sampling) -> None:
        """What `prefs.models.local.doses.DoseResponse` runs."""
        tally, layers, done = self._book.of(RATER), self.shape.layers, 0
        for beginning, group in by_beginning(doses).items():
            starts = cut(asked, beginning)
            tally.prompt_tokens += sum(starts) - done
            done = sum(starts)
            rest = sum(len(row.ids) for row in asked) - done
            lowest_layers = [lowest(doses[at]) for at in group if doses[at]]
            plain = len(lowest_layers) < len(group)
            blocks = layers if plain else 1 + max(lowest_layers)
            blocks += sum(layers - 1 - layer for layer in lowest_layers)
            tally.prompt_tokens += rest * blocks / layers
            for _ in group:
                self._read(asked, question, sampling)

    def _read(self, asked: Sequence[Asked], each: Ask, sampling: Sampling) -> None:
        """Score options and draw answers."""
        tally = self._book.of(RATER)
        if each.scores:
            tally.prompt_tokens += sum(_scoring(row) for row in asked)
        length = self._lengths.answer("answers", sampling.max_new_tokens)
        tally.drawn_tokens += len(asked) * len(each.seeds) * length.run

    def _sample(self, sampling: Sampling, conversation: Conversation, seed: int) -> Sample:
        length = self._lengths.answer("answers", sampling.max_new_tokens)
        return Sample(self._prose.text(length.drawn, conversation, seed), round(length.drawn), False)

    def _share(self, capture: CaptureRequest | None, asks: Sequence[Ask]) -> float:
        """The share of the blocks that a pass runs: it stops where nobody reads what comes after."""
        if capture is None or reads_logits(asks):
            return 1.0
        return (1 + max(capture.layers)) / self.shape.layers

    def _vector(self, capture: CaptureRequest) -> torch.Tensor:
        return torch.empty(len(capture.layers), self.shape.d_model, device="meta")


def _scoring(asked: Asked) -> int:
    """Tokens that are run to score options as whole strings: all but each option's last."""
    return sum(len(tail) - 1 for tail in asked.tails)
