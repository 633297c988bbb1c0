"""The vLLM engine: sampling and option scoring at scale, in batches that vLLM schedules itself.

Conversations are tokenized here, so that text stays text, and handed over as token ids; vLLM's own chat templating is
never used. An exact score asks for the log-probabilities of single tokens after each point at which the options part;
the prefix cache makes the points after the first cheap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from prefs.data.template import Invalid
from prefs.errors import UserError, explained
from prefs.models.loading import ModelSpec
from prefs.models.options import Path, branchings, option_masses
from prefs.models.prompts import THOUGHT, Thought, chosen, encode_prompt, request_tokens, scored
from prefs.models.sampling import Stops, row_seed
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Reply, Request, Sample, Sampling, Score, Usage
from prefs.models.vllm.workers import Call, Output, Workers, WorkersDied
from prefs.models.weights import check_file, check_vocabulary

log = logging.getLogger(__name__)

# How many tokens' log-probabilities vLLM gives a call (0.32: `MAX_LOGPROB_TOKEN_IDS`).
LOOKED_AT_ONCE = 128
LIKELIEST = Sampling(0.0, 1.0, 1)

# What a call is for: a seed to draw with, or a beginning of options to look behind.
Use = int | tuple[int, ...]


@dataclass(frozen=True)
class _Opening:
    """Where the answer to a request begins, after one thought (or none), with what is wanted there.

    ``seeds`` are to be sampled with, ``scores`` the seeds under which the options' score is wanted. No ``ids``: nothing
    can be asked there, since the thought has not ended, or all is too long.
    """

    number: int
    request: Request
    seeds: tuple[int, ...]
    scores: tuple[int, ...]
    thought: Thought | None = None
    ids: tuple[int, ...] | None = None
    options: int = 0
    beginnings: Mapping[Path, int] = field(default_factory=dict)


class VllmEngine:
    """A chat model in vLLM. See `prefs.models.types.Engine` for the protocol."""

    rows_apart = True

    def __init__(self, start: Callable[[], Workers], encoder: ChatEncoder, stops: Stops, spec: ModelSpec):
        self.spec = spec
        self.encoder = encoder
        self._stops = stops
        self._start = start
        self._workers = start()
        self._used = Usage()
        self.max_context = self._workers.max_context

    @classmethod
    def load(cls, spec: ModelSpec, path: str) -> VllmEngine:
        """Start vLLM with a model (safetensors only, no remote code).

        Raises
        ------
        UserError
            If vLLM, the model, its tokenizer or the device are not there, or vLLM refuses them.
        """
        options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
        with explained(f"cannot load {spec.name} from {path}"):
            tokenizer, config = (
                AutoTokenizer.from_pretrained(path, **options),
                AutoConfig.from_pretrained(path, **options),
            )
            try:
                generation = GenerationConfig.from_pretrained(path, revision=spec.revision or "main")
            except OSError:  # none: then the model's config says it
                generation = GenerationConfig.from_model_config(config)
        encoder = ChatEncoder(tokenizer, spec.chat_template_kwargs, spec.thinking)
        check_vocabulary(encoder, config.get_text_config().vocab_size)
        check_file(path, spec.revision)
        engine = cls(lambda: Workers(spec, path), encoder, Stops.of(encoder, generation), spec)
        for note in engine.encoder.notes(spec.name):
            log.info("%s", note)
        return engine

    def tokens(self, request: Request) -> int:
        return request_tokens(self.encoder, request)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        if any(request.capture is not None for request in requests):
            raise UserError("vLLM gives no residual vectors; use model.backend=transformer_lens, or capture=none")
        if any(request.steering or request.likelihood for request in requests):
            raise UserError("vLLM does not steer; use model.backend=transformer_lens, or steering=none")
        openings = self._openings(requests)
        planned = [(opening, *call) for opening in openings for call in self._calls(opening)]
        # Those of one conversation go to one worker, which caches it, one after the other.
        outputs, died = self._generate(requests, [(opening.number, call) for opening, _, call in planned])
        brought: dict[int, dict[Use, list[Output | None]]] = {}
        for (opening, use, _), output in zip(planned, outputs, strict=True):
            brought.setdefault(id(opening), {}).setdefault(use, []).append(output)
        parts: dict[int, list[Reply | None]] = {}
        for opening in openings:
            parts.setdefault(opening.number, []).append(self._read(opening, brought.get(id(opening), {})))
        for number, replies in parts.items():
            answered = [reply for reply in replies if reply is not None]
            if len(answered) == len(replies):
                yield number, _merged(requests[number], answered)
        if died is not None:
            raise died from None

    def usage(self) -> Usage:
        return self._used

    def close(self) -> None:
        self._workers.close()

    def _openings(self, requests: Sequence[Request]) -> list[_Opening]:
        """Where answers are wanted: one a request, or, of a model that thinks, one a thought."""
        wanted = []
        for number, request in enumerate(requests):
            seeds, scores = request.seeds, (0,) if request.choose else request.scores
            if self.encoder.thinking is None:
                wanted.append(_Opening(number, request, seeds, scores))
            else:
                for seed in dict.fromkeys((*seeds, *scores)):
                    wanted.append(_Opening(number, request, (seed,) * (seed in seeds), (seed,) * (seed in scores)))
        if self.encoder.thinking is not None:
            thoughts = self._think(requests, wanted)
            wanted = [replace(opening, thought=thought) for opening, thought in zip(wanted, thoughts, strict=True)]
        return [self._encoded(opening) for opening in wanted]

    def _encoded(self, opening: _Opening) -> _Opening:
        """With the tokens that it begins after, if anything can be asked there."""
        request, thought = opening.request, opening.thought
        if thought is not None and thought.invalid is not None:
            return opening
        text = None if thought is None else thought.text
        if request.question is None:
            opening = replace(opening, ids=self.encoder.encode(request.messages, answer="", thought=text).ids)
        else:
            prompt = encode_prompt(self.encoder, request.messages, request.question, text)
            beginnings = (prompt.as_said if request.choose else prompt).beginnings
            opening = replace(opening, ids=prompt.ids, options=len(prompt.tails), beginnings=beginnings)
        # Callers see to that, but the text of a thought can have more tokens than were drawn for it.
        answer = [_sampling(request).max_new_tokens] if opening.seeds else []
        assert opening.ids is not None
        fits = len(opening.ids) + max([*answer, *map(len, opening.beginnings)], default=0) <= self.max_context
        return opening if fits else replace(opening, ids=None)

    def _think(self, requests: Sequence[Request], openings: Sequence[_Opening]) -> list[Thought]:
        """Draw the thought before each opening."""
        thinking, end = self.encoder.thinking, self.encoder.thought_end
        assert thinking is not None
        assert end is not None
        stops = replace(self._stops, tokens=self._stops.tokens | {end})
        calls = []
        for opening in openings:
            turns, (seed, *_) = opening.request.turns, (*opening.seeds, *opening.scores)
            budget = replace(_sampling(opening.request), max_new_tokens=thinking.max_tokens)
            # Other random numbers than the answer's.
            drawn = row_seed(seed, (*turns, THOUGHT))
            calls.append((opening.number, Call(self.encoder.open_thought(turns), budget, drawn, stops)))
        outputs, died = self._generate(requests, calls)
        if died is not None:
            raise died from None
        thoughts = []
        for output in outputs:
            assert output is not None
            sample = self._sample(output, stops)
            ended = thinking.force_close or (output.stopped and output.ids[-1] == end)
            reason = sample.invalid or (None if ended else Invalid.thought_cut_off.value)
            thoughts.append(Thought(sample.text or "", sample.tokens, reason))
        return thoughts

    def _calls(self, opening: _Opening) -> Iterator[tuple[Use, Call]]:
        """The calls that answer one opening."""
        if opening.ids is None:
            return
        if opening.scores:
            for beginning, tokens in branchings(opening.beginnings).items():
                for start in range(0, len(tokens), LOOKED_AT_ONCE):
                    looked = tokens[start : start + LOOKED_AT_ONCE]
                    yield beginning, Call(opening.ids + beginning, LIKELIEST, looked=looked)
        for seed in opening.seeds:
            drawn = row_seed(seed, opening.request.turns)
            yield seed, Call(opening.ids, _sampling(opening.request), drawn, self._stops)

    def _read(self, opening: _Opening, brought: Mapping[Use, Sequence[Output | None]]) -> Reply | None:
        """Put together what the calls of an opening brought; None if something is missing."""
        outputs = {use: [output for output in some if output is not None] for use, some in brought.items()}
        if any(len(outputs[use]) < len(some) for use, some in brought.items()):
            return None
        samples: dict[int, Sample]
        if opening.ids is None:
            reason = Invalid.too_long.value
            samples = dict.fromkeys(opening.seeds, Sample(None, 0, False, invalid=reason))
            score = Score(None, invalid=reason)
        else:
            samples = {seed: self._sample(outputs[seed][0], self._stops) for seed in opening.seeds}
            score = scored(_mass(opening, outputs)) if opening.scores else None
        reply = Reply(samples, dict.fromkeys(opening.scores, score) if score is not None else {})
        return reply if opening.thought is None else opening.thought.reply(reply)

    def _sample(self, output: Output, stops: Stops) -> Sample:
        if not output.finite:
            return Sample(None, 0, True, invalid=Invalid.not_finite.value)
        ids = output.ids[:-1] if output.ids and output.ids[-1] in stops.tokens else output.ids
        (text,) = self.encoder.texts([ids])
        return Sample(stops.cut(text), len(ids), output.stopped)

    def _generate(
        self, requests: Sequence[Request], calls: Sequence[tuple[int, Call]]
    ) -> tuple[list[Output | None], WorkersDied | None]:
        """What the workers make of calls for requests (by number); with the error if they died, after which new ones
        are started."""
        if not self._workers.running:
            self._workers = self._start()
        distinct = dict.fromkeys(request.messages or request.turns for request in requests)
        conversations = {messages: row for row, messages in enumerate(distinct)}
        rows = [conversations[requests[number].messages or requests[number].turns] for number, _ in calls]
        outputs: list[Output | None] = [None] * len(calls)
        died = None
        try:
            self._workers.run([call for _, call in calls], rows, outputs)
        except WorkersDied as error:
            died = error
        answered = [(call, output) for (_, call), output in zip(calls, outputs, strict=True) if output is not None]
        self._used = Usage(
            self._used.requests + len(answered),
            self._used.prompt_tokens + sum(len(call.ids) - output.cached for call, output in answered),
            # The last is drawn and not run.
            self._used.completion_tokens + sum(len(output.ids) - 1 for _, output in answered),
        )
        return outputs, died


def _mass(opening: _Opening, outputs: Mapping[Use, Sequence[Output]]) -> tuple[float, ...]:
    """The options' masses from the log-probabilities after each of their beginnings."""
    looked = {
        (*beginning, token): log_prob
        for beginning, some in outputs.items()
        if isinstance(beginning, tuple)
        for output in some
        for token, log_prob in output.log_probs.items()
    }
    return tuple(option_masses(looked, opening.beginnings, opening.options).tolist())


def _merged(request: Request, parts: Sequence[Reply]) -> Reply:
    """One reply out of those after each thought."""
    reply = Reply(
        {seed: sample for part in parts for seed, sample in part.samples.items()},
        {seed: score for part in parts for seed, score in part.scores.items()},
    )
    return chosen(request, reply) if request.choose else reply


def _sampling(request: Request) -> Sampling:
    if request.choose:
        return LIKELIEST
    assert request.sampling is not None, "a request that draws anything says how"
    return request.sampling
