"""What the vLLM engine would run."""

from __future__ import annotations

from collections.abc import Sequence

from prefs.models.architecture import architecture
from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Ask, CaptureRequest, Conversation, Observation, Sample, Sampling
from prefs.models.vllm.engine import VllmBackend
from prefs.models.vllm.workers import Output, Request
from prefs.plan.book import COMPLETER, JUDGE, RATER, THOUGHTS, Book, Tally, encoder_of
from prefs.plan.lengths import Lengths, Prose

# Of vLLM's prefix cache, whose whole blocks are not run again.
BLOCK, BLOCK_ON_CPU = 16, 32


class PlannedVllm(VllmBackend):
    """The vLLM engine itself, with engines below it that count."""

    def __init__(self, spec: ModelSpec, lengths: Lengths, book: Book):
        shape = architecture(model_folder(spec), spec.revision)
        encoder = encoder_of(spec)
        self._counting = _CountingEngines(spec, encoder, spec.max_context or shape.context, lengths, book)
        # Nothing that is drawn here ends by itself.
        super().__init__(lambda: self._counting, encoder.tokenizer, frozenset(), spec)  # pyright: ignore[reportArgumentType]

    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        self._counting.role = COMPLETER
        samples = super().complete(batch, seed, sampling)
        self._counting.book.made_up = True
        return samples

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
    ) -> list[Observation]:
        self._counting.role = RATER
        return super().observe(batch, asks, sampling, capture)

    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        self._counting.role = JUDGE
        return super().choose(batch, options)


class _CountingEngines:
    """In place of `prefs.models.vllm.workers.Engines`: runs nothing, and counts what their prefix cache would leave."""

    running = True

    def __init__(self, spec: ModelSpec, encoder: ChatEncoder, max_context: int, lengths: Lengths, book: Book):
        self.max_context, self.book, self.role = max_context, book, COMPLETER
        self._encoder, self._lengths, self._prose = encoder, lengths, Prose(encoder)
        on_cpu = resolve_device(spec.device).type == "cpu"
        self._block = int(spec.vllm.engine.get("block_size") or (BLOCK_ON_CPU if on_cpu else BLOCK))
        self._caches = bool(spec.vllm.engine.get("enable_prefix_caching", True))
        self._cached: set[int] = set()

    def run(self, requests: Sequence[Request]) -> list[Output]:
        tally = self.book.of(self.role)
        tally.requests += len(requests)
        outputs = []
        for request in requests:
            cached = self._look_up(request.ids)
            tally.prompt_tokens += len(request.ids) - cached
            outputs.append(self._draw(request, tally, cached))
        return outputs

    def close(self) -> None:
        pass

    def _draw(self, request: Request, tally: Tally, cached: int) -> Output:
        if request.looked:
            return Output((0,), False, dict.fromkeys(request.looked, -1.0), cached)
        end, thinking = self._encoder.thought_end, self._encoder.thinking
        if thinking is not None and end in request.stops:
            length = self._lengths.thought(THOUGHTS[self.role], thinking.max_tokens, self._encoder)
            tally.thoughts += 1
            self.book.made_up = True
        else:
            kind = "completions" if self.role == COMPLETER else "answers"
            length, end = self._lengths.answer(kind, request.sampling.max_new_tokens), None
        tally.drawn_tokens += length.run
        text = self._prose.text(length.drawn, (), request.seed)
        ids = tuple(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        return Output(ids if end is None else (*ids, end), end is not None, {}, cached)

    def _look_up(self, ids: tuple[int, ...]) -> int:
        """How many tokens a prompt has in blocks that are cached; from now on all of its whole blocks are."""
        found, beginning, hit = 0, 0, self._caches
        for end in range(self._block, len(ids) + 1, self._block):
            beginning = hash((beginning, ids[end - self._block : end]))
            # The last token is always run.
            hit = hit and beginning in self._cached and end < len(ids)
            found = end if hit else found
            self._cached.add(beginning)
        return found
