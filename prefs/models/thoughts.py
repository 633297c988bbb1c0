"""A thinking model's thought, and the answers that come after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefs.data.template import Invalid
from prefs.models.tokens import Message
from prefs.models.types import Answer, Sample, Score

# Ends the messages that a thought's random numbers are drawn for, so that they are not those of the answer.
THOUGHT = Message("assistant", "<thought>")


@dataclass(frozen=True)
class Thought:
    """What a model thought, without its marks; ``ended`` is False where its budget cut it off."""

    text: str
    tokens: int
    ended: bool

    def before(self, sample: Sample) -> Sample:
        """The sample drawn after this thought: none where the thought has not ended."""
        if not self.ended:
            return Sample(None, self.tokens, False, self.text, Invalid.thought_cut_off.value)
        return replace(sample, thought=self.text)

    def of(self, answer: Answer) -> Answer:
        """The answer given after this thought: none where the thought has not ended."""
        if not self.ended:
            nothing = Score(None, self.text, Invalid.thought_cut_off.value)
            samples = {seed: self.before(sample) for seed, sample in answer.samples.items()}
            return Answer(dict.fromkeys(answer.scores, nothing), samples)
        return Answer(
            scores={seed: replace(score, thought=self.text) for seed, score in answer.scores.items()},
            samples={seed: self.before(sample) for seed, sample in answer.samples.items()},
            residual=answer.residual,
        )


def joined(answers: Answer, after: Answer, seed: int) -> Answer:
    """The answers after several thoughts, and those after one more, of this seed."""
    scores = dict(answers.scores)
    if after.scores:
        (scores[seed],) = after.scores.values()
    residual = answers.residual if after.residual is None else after.residual
    return Answer(scores, {**answers.samples, **after.samples}, residual)
