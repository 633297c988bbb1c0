"""What the vLLM engine would run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefs.models.architecture import architecture, context_length
from prefs.models.counting import COMPLETER, Counts, MadeUp, role_of, tokenizer_of
from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.sampling import Stops
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Reply, Request
from prefs.models.vllm.engine import VllmEngine
from prefs.models.vllm.workers import Call, Output

# Of vLLM's prefix cache, whose whole blocks are not run again.
BLOCK, BLOCK_ON_CPU = 16, 32


class CountingVllm(VllmEngine):
    """The vLLM engine itself, with workers below it that count."""

    def __init__(self, spec: ModelSpec, counts: Counts):
        self._counts, encoder = counts, ChatEncoder(tokenizer_of(spec), spec.chat_template_kwargs, spec.thinking)
        # Nothing that is drawn here ends by itself.
        super().__init__(lambda: _CountingWorkers(spec, counts, encoder), encoder, Stops(), spec)  # pyright: ignore[reportArgumentType]

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self._counts.role = role_of(requests[0])  # of a stage, and so the same for all
        yield from super().run(requests)


class _CountingWorkers:
    """In place of `prefs.models.vllm.workers.Workers`: runs nothing, and counts what their prefix cache would leave."""

    running = True

    def __init__(self, spec: ModelSpec, counts: Counts, encoder: ChatEncoder):
        self._counts, self._encoder, self._made_up = counts, encoder, MadeUp(counts, encoder)
        context = architecture(model_folder(spec), spec.revision).context
        self.max_context = spec.max_context or context_length(context, encoder.tokenizer)
        on_cpu = resolve_device(spec.device).type == "cpu"
        self._block = int(spec.vllm.engine.get("block_size") or (BLOCK_ON_CPU if on_cpu else BLOCK))
        self._caches = bool(spec.vllm.engine.get("enable_prefix_caching", True))
        self._cached: set[int] = set()

    def run(self, calls: Sequence[Call], rows: Sequence[int], outputs: list[Output | None]) -> None:
        tally = self._counts.tally
        for number, call in enumerate(calls):
            cached = self._look_up(call.ids)
            tally.requests += 1
            tally.prompt_tokens += len(call.ids) - cached
            outputs[number] = self._draw(call, cached)

    def close(self) -> None:
        pass

    def _draw(self, call: Call, cached: int) -> Output:
        if call.looked:
            return Output((0,), False, dict.fromkeys(call.looked, -1.0), cached)
        counts, end, thinking = self._counts, self._encoder.thought_end, self._encoder.thinking
        if thinking is not None and end in call.stops.tokens:
            length = counts.thought(thinking.max_tokens, self._encoder)
            counts.tally.thoughts += 1
        else:
            length, end = counts.answer(call.sampling.max_new_tokens), None
        counts.made_up |= end is not None or counts.role == COMPLETER
        counts.tally.drawn_tokens += length.run
        text = self._made_up.text(length.drawn, (), call.seed)
        ids = tuple(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
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
