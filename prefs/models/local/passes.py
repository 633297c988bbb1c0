"""Forward passes of a `TransformerBridge` over left-padded token ids, with explicit masks and positions.

A pass goes on from a `State`, whose keys and values are kept, and may begin above a block whose output is known.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from prefs.errors import UserError
from prefs.models.local.memory import out_of_memory
from prefs.models.local.residuals import AllRecorded, Hook
from prefs.models.local.sharing import Sharing
from prefs.models.local.steering import BatchSteering
from prefs.models.options import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """A batch that has been run so far: its tokens, its cache, the mask [rows, width] of real tokens, tokens a row, and
    what its residual stream is steered by. There is no cache where none follows it, and where a family keeps none that
    can be gone on from."""

    ids: tuple[tuple[int, ...], ...]
    cache: Cache | None
    mask: torch.Tensor
    lengths: torch.Tensor
    steering: BatchSteering

    def fork(self) -> State:
        """The same, to go on from without changing this one."""
        return replace(self, cache=_fork(self.cache))

    def select(self, rows: torch.Tensor) -> State:
        """The state of these rows, in this order; rows may repeat."""
        numbers = rows.tolist()
        if numbers == list(range(len(self.ids))):
            return self
        cache = _fork(self.cache)
        if cache is not None:
            cache.reorder_cache(rows)  # type: ignore[arg-type]
        ids = tuple(self.ids[number] for number in numbers)
        return State(ids, cache, self.mask[rows], self.lengths[rows], self.steering.select(rows))

    def with_lower(self, other: State, count: int) -> State:
        """With the keys and values of another state over the same tokens in its lowest `count` blocks."""
        cache, lower = _fork(self.cache), _fork(other.cache)
        assert cache is not None
        assert lower is not None
        cache.layers[:count] = lower.layers[:count]
        return replace(self, cache=cache)


def _fork(cache: Cache | None) -> Cache | None:
    """A cache that can be extended without changing this one. Growing layers replace their tensors, so these are
    shared; other kinds write in place and are copied."""
    if cache is None:
        return None
    forked = copy.copy(cache)
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    forked.layers = [copy.copy(x) if type(x) in growing else copy.deepcopy(x) for x in cache.layers]
    return forked


class Watcher(Protocol):
    """What looks at the residual stream as a pass goes by; `stops` if it may end the pass by `AllRecorded`."""

    @property
    def stops(self) -> bool: ...

    def hooks(self) -> Sequence[tuple[int, Hook]]: ...


class Kept:
    """Keeps the whole residual stream [rows, width, d_model] after some blocks, where it is.

    ``stops`` ends the pass after the deepest of them.
    """

    def __init__(self, layers: Sequence[int], *, stops: bool):
        self.stops = stops
        self.after: dict[int, torch.Tensor] = {}
        self._layers = sorted(set(layers))

    def hooks(self) -> list[tuple[int, Hook]]:
        return [(layer, self._keeping(layer)) for layer in self._layers]

    def _keeping(self, layer: int) -> Hook:
        def keep(tensor: torch.Tensor, hook: Any) -> None:
            self.after[layer] = tensor
            if self.stops and layer == self._layers[-1]:
                raise AllRecorded

        return keep


class Passes:
    """Forward passes of one model.

    Parameters
    ----------
    bridge
        The `TransformerBridge`.
    pad
        A token to pad with; it is masked.
    name
        Of the model, for errors.
    """

    def __init__(self, bridge: Any, pad: int, name: str):
        self._bridge = bridge
        self._pad = pad
        self.name = name
        # Where tokens go. With a device map, blocks and logits may be elsewhere.
        self.device = bridge.original_model.get_input_embeddings().weight.device
        takes = inspect.signature(bridge.original_model.forward).parameters
        # Mamba's families have another name for the cache, and a mask of the new tokens alone.
        self._states_alone = "cache_params" in takes
        self._dtype = bridge.original_model.dtype
        self.sharing = Sharing.of_config(bridge.original_model.config)
        if "position_ids" not in takes:  # which may be counted by columns (MPT)
            self.sharing = replace(self.sharing, gaps=False)
        self.n_layers = int(bridge.cfg.n_layers)
        # Tokens times blocks that ran them.
        self._ran_of_prompts = self._ran_of_answers = 0
        self._hooks = [f"blocks.{layer}.hook_out" for layer in range(self.n_layers)]
        absent = [name for name in self._hooks if name not in bridge.hook_dict]
        if absent:
            raise UserError(f"{name}: TransformerLens offers no residual stream at {absent[0]}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts that have been run, without padding; one that half of the blocks ran is half a token."""
        return round(self._ran_of_prompts / self.n_layers)

    @property
    def drawn_tokens(self) -> int:
        """Tokens that were drawn and then run, counted as those of prompts."""
        return round(self._ran_of_answers / self.n_layers)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Passes in here, which nobody asked for, are not counted."""
        counts = self._ran_of_prompts, self._ran_of_answers
        try:
            yield
        finally:
            self._ran_of_prompts, self._ran_of_answers = counts

    def nothing(self, rows: int, cached: bool = True) -> State:
        """The state of rows with no tokens yet; with a cache, so that it can be forked, or without."""
        empty = torch.zeros((rows, 0), dtype=torch.long, device=self.device)
        cache = DynamicCache(config=self._bridge.original_model.config) if cached else None
        return State(((),) * rows, cache, empty, empty.sum(dim=1), BatchSteering.build((), [{}] * rows, self.device))

    def start(
        self,
        rows: Sequence[Sequence[int]],
        steering: BatchSteering | None = None,
        watchers: Sequence[Watcher] = (),
        cached: bool = True,
        keep: int = 1,
        *,
        drawn: bool = False,
    ) -> tuple[State, torch.Tensor]:
        """Run whole sequences from nothing; `cached` unless nothing goes on from them. See `extend`."""
        state = self.nothing(len(rows), cached and (self.sharing.several or self.sharing.single))
        return self._run(replace(state, steering=steering or state.steering), rows, keep, watchers, drawn=drawn)

    def extend(
        self,
        state: State,
        rows: Sequence[Sequence[int]],
        keep: int = 1,
        watchers: Sequence[Watcher] = (),
        *,
        drawn: bool = False,
    ) -> tuple[State, torch.Tensor]:
        """Run more tokens after a state; rows may differ in length. The given state must not be used again.

        Where going on would change numbers (`Sharing`), rows are run again from their beginning: they end in the same
        column, but are wider than their new tokens. `drawn` tokens are the model's own.

        Returns
        -------
        state
            With these tokens in it.
        logits
            [rows, keep, vocabulary] after each of the last `keep` tokens; [rows, 0, 0] where a watcher stops the pass
            before them.
        """
        if not any(state.ids) or (state.cache is not None and self.sharing.goes_on(state.ids, rows)):
            return self._run(state, rows, keep, watchers, drawn=drawn)
        whole = [(*before, *row) for before, row in zip(state.ids, rows, strict=True)]
        return self.start(whole, state.steering, watchers, keep=keep, drawn=drawn)

    def extend_tree(
        self, state: State, trees: Sequence[Sequence[Path]], watchers: Sequence[Watcher] = ()
    ) -> torch.Tensor:
        """Run token sequences that all go on from a state, side by side in one row: each token sees the state and what
        is before it in its own sequence. Only where `Sharing.tree`; the given state must not be used again.

        Parameters
        ----------
        trees
            Of each row, the sequences; with every one, all of its beginnings.

        Returns
        -------
        torch.Tensor
            [rows, sequences, vocabulary], logits after each; rows of fewer sequences are padded at the end.
        """
        width = max(map(len, trees))
        padded = [(*own, *[()] * (width - len(own))) for own in trees]
        ids = self.tensor([[path[-1] if path else self._pad for path in own] for own in padded])
        depth = self.tensor([[len(path) for path in own] for own in padded])
        sees = {own: [[one[: len(other)] == other for other in own] for one in own] for own in set(padded)}
        branches = self.tensor([sees[own] for own in padded]) * depth.bool()[:, None]
        # Padding sees itself, too: a softmax over nothing is not finite.
        branches |= torch.eye(width, dtype=torch.long, device=self.device)
        past = state.mask[:, None].expand(-1, width, -1)
        seen = torch.cat([past, branches], dim=2).bool()[:, None]
        blocked = torch.finfo(self._dtype).min
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self.device).masked_fill(~seen, blocked)
        real = (depth > 0).long()
        positions = (state.lengths[:, None] + depth - 1) * real
        logits, blocks = self._forward(state, ids, positions, real, mask, width, watchers)
        self._ran_of_prompts += sum(map(len, trees)) * blocks
        return logits

    def extend_above(
        self,
        layer: int,
        hidden: torch.Tensor,
        below: State,
        state: State,
        rows: Sequence[Sequence[int]],
        watchers: Sequence[Watcher] = (),
    ) -> tuple[State, torch.Tensor]:
        """As `extend`, running only the blocks above `layer`.

        Parameters
        ----------
        hidden
            [rows, width, d_model], the residual stream after that block in an earlier pass over the same tokens.
        below
            The state after that pass, for the keys and values of the blocks that are not run.
        state
            The state before it, whose steering has not changed `hidden`, but may: it is of `layer` and those above.
        """
        with self._handing_over(range(layer + 1), hidden):
            state, logits = self._run(state, rows, 1, watchers, first=layer + 1)
        return state.with_lower(below, layer + 1), logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] from what the last block left, [tokens, d_model]: the model's own norm, output layer
        and all that it does to logits."""
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=self.device)
        with self._handing_over(range(self.n_layers), hidden[None]):
            return self._bridge(
                ids,
                attention_mask=torch.ones_like(ids),
                position_ids=ids,
                use_cache=False,
                logits_to_keep=len(hidden),
                return_type="logits",
            )[0]

    def nll(self, logits: torch.Tensor, tokens: torch.Tensor, reduction: str) -> torch.Tensor:
        """Negative log-likelihood of tokens under logits [tokens, vocabulary], in nats: of each ("none"), or their
        "sum"; float64, on the host."""
        return cross_entropy(logits.float(), tokens.to(logits.device), reduction=reduction).double().cpu()

    @property
    def shares_blocks(self) -> bool:
        """Whether a pass can begin above a block, and go on from one that did."""
        return self.sharing.several and self._begins_above

    @cached_property
    @torch.inference_mode()
    def _begins_above(self) -> bool:
        """Whether all that reaches the next block is the residual stream.

        It is tried out, in a pass over a few tokens: families may also hand over keys and values, or keep states of
        another kind.
        """
        first, then = [(1, 2, 3)], [(4, 5)]
        layer = max(self.n_layers - 2, 0)
        kept = Kept([layer], stops=False)
        try:
            state, _ = self.extend(self.nothing(1), first)
            below, expected = self.extend(state.fork(), then, watchers=[kept])
            shared, logits = self.extend_above(layer, kept.after[layer], below, state.fork(), then)
            pairs = [(expected, logits), (self.extend(below, then)[1], self.extend(shared, then)[1])]
        except Exception as error:
            if out_of_memory(error):
                raise
            log.debug("%s: no pass begins above a block: %s", self.name, error)
            return False
        return all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in pairs)

    def tensor(self, values: Sequence[Any]) -> torch.Tensor:
        """Whole numbers, where tokens go."""
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _run(
        self,
        state: State,
        rows: Sequence[Sequence[int]],
        keep: int,
        watchers: Sequence[Watcher],
        *,
        drawn: bool = False,
        first: int = 0,
    ) -> tuple[State, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = self.tensor([[self._pad] * (width - len(row)) + list(row) for row in rows])
        real = self.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        # Padding stands at position 0: it is masked, and positions must lie inside the model's range.
        positions = (state.lengths[:, None] + real.cumsum(dim=1) - 1).clamp(min=0) * real
        mask = torch.cat([state.mask, real], dim=1)
        seen = real if self._states_alone else mask
        logits, end = self._forward(state, ids, positions, real, seen, keep, watchers)
        ran = sum(len(row) for row in rows) * (end - first)
        if drawn:
            self._ran_of_answers += ran
        else:
            self._ran_of_prompts += ran
        run = tuple((*before, *row) for before, row in zip(state.ids, rows, strict=True))
        return State(run, state.cache, mask, state.lengths + real.sum(dim=1), state.steering), logits

    def _forward(
        self,
        state: State,
        ids: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor,
        mask: torch.Tensor,
        keep: int,
        watchers: Sequence[Watcher],
    ) -> tuple[torch.Tensor, int]:
        """Logits [rows, keep, vocabulary], and the blocks that were run."""
        # In this order, vectors are recorded as they flow on: after steering.
        by_layer = [*state.steering.hooks(positions, real), *(hook for watcher in watchers for hook in watcher.hooks())]
        logits, end = torch.empty((len(ids), 0, 0)), blocks_until_stopped(watchers)
        with (
            contextlib.suppress(AllRecorded),
            self._bridge.hooks([(self._hooks[layer], hook) for layer, hook in by_layer]),
        ):
            logits = self._bridge(
                ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=state.cache is not None,
                logits_to_keep=keep,
                return_type="logits",
                **{"cache_params" if self._states_alone else "past_key_values": state.cache},
            )[:, -keep:]
            end = self.n_layers
        return logits, end

    def _handing_over(self, layers: Sequence[int], hidden: torch.Tensor) -> contextlib.AbstractContextManager[object]:
        """Let blocks give `hidden` in place of running. Each gives the same: the last one's is what is read."""
        form = self._form_of_output
        stack = contextlib.ExitStack()
        for layer in layers:
            block = self._bridge.blocks[layer].original_component
            stack.enter_context(_in_place_of_forward(block, hidden if form is None else (hidden, *form)))
        return stack

    @cached_property
    def _form_of_output(self) -> tuple[None, ...] | None:
        """None for a family whose blocks give the residual stream; what comes after it where they give a tuple.

        That is attention's weights, which nobody reads.
        """
        given: list[Any] = []
        block = self._bridge.blocks[0].original_component
        handle = block.register_forward_hook(lambda module, inputs, output: given.append(output))
        try:
            self.start([(1,)], watchers=[Kept([0], stops=True)], cached=False)
        finally:
            handle.remove()
        return (None,) * (len(given[0]) - 1) if isinstance(given[0], tuple) else None


def blocks_until_stopped(watchers: Sequence[Watcher]) -> int:
    """The blocks that a pass has run when a watcher stops it; 0 where none does."""
    return min((1 + max(layer for layer, _ in watcher.hooks()) for watcher in watchers if watcher.stops), default=0)


@contextmanager
def _in_place_of_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Give `output` where the module would run; hooks around it run as ever."""
    # Of its own where accelerate has put one on the module, and the class's otherwise.
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
