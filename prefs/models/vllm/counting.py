"""What the vLLM engine would run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefs.models.architecture import architecture
from prefs.models.counting import COMPLETER, CountingEngine, Counts, encoder_of, role_of
from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Reply, Request
from prefs.models.vllm.engine import VllmEngine
from prefs.models.vllm.workers import Call, Output

# Of vLLM's prefix cache, whose whole blocks are not run again.
BLOCK, BLOCK_ON_CPU = 16, 32


class CountingVllm(VllmEngine):
    """The vLLM engine itself, with workers below it that count."""

    def __init__(self, spec: ModelSpec, counts: Counts):
        encoder = encoder_of(spec)
        self._counting = _CountingWorkers(spec, counts, encoder)
        # Nothing that is drawn here ends by itself.
        super().__init__(lambda: self._counting, encoder.tokenizer, frozenset(), spec)  # pyright: ignore[reportArgumentType]

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self._counting.role = role_of(requests[0])  # of a stage, and so the same for all
        yield from super().run(requests)


class _CountingWorkers(CountingEngine):
    """In place of `prefs.models.vllm.workers.Workers`: runs nothing, and counts what their prefix cache would leave."""

    running = True
    encoder: ChatEncoder

    def __init__(self, spec: ModelSpec, counts: Counts, encoder: ChatEncoder):
        super().__init__(spec, counts, encoder)
        self.max_context = spec.max_context or architecture(model_folder(spec), spec.revision).context
        self.role = COMPLETER
        on_cpu = resolve_device(spec.device).type == "cpu"
        self._block = int(spec.vllm.engine.get("block_size") or (BLOCK_ON_CPU if on_cpu else BLOCK))
        self._caches = bool(spec.vllm.engine.get("enable_prefix_caching", True))
        self._cached: set[int] = set()

    def run(self, calls: Sequence[Call], rows: Sequence[int], outputs: list[Output | None]) -> None:
        tally = self.counts.tallies[self.role]
        for number, call in enumerate(calls):
            cached = self._look_up(call.ids)
            tally.requests += 1
            tally.prompt_tokens += len(call.ids) - cached
            outputs[number] = self._draw(call, cached)

    def _draw(self, call: Call, cached: int) -> Output:
        if call.looked:
            return Output((0,), False, dict.fromkeys(call.looked, -1.0), cached)
        tally, end, thinking = self.counts.tallies[self.role], self.encoder.thought_end, self.encoder.thinking
        if thinking is not None and end in call.stops:
            length = self.counts.thought(self.role, thinking.max_tokens, self.encoder)
            tally.thoughts += 1
        else:
            length, end = self.counts.answer(self.role, call.sampling.max_new_tokens), None
        if end is not None or self.role == COMPLETER:
            self.counts.made_up = True
        tally.drawn_tokens += length.run
        text = self.text(length.drawn, (), call.seed)
        ids = tuple(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        return Output(ids if end is None else (*ids, end), end is not None, {}, cached)

    def _look_up(self, ids: tuple[int, ...]) -> int:
        """How many tokens a prompt has in blocks that are cached; from now on all of its whole blocks are."""
        cached, beginning, hit = 0, 0, self._caches
        for end in range(self._block, len(ids) + 1, self._block):
            beginning = hash((beginning, ids[end - self._block : end]))
            # The last token is always run.
            hit = hit and beginning in self._cached and end < len(ids)
            cached = end if hit else cached
            self._cached.add(beginning)
        return cached
