"""What an engine proves of itself before its numbers count: that vectors are captured, and steered, where it says.

It is seen from the model's own blocks, by hooks of PyTorch that are none of those that capture and steer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from prefs.errors import UserError, first_line
from prefs.models.local.grouping import OPEN
from prefs.models.local.memory import out_of_memory
from prefs.models.local.passes import Kept, State
from prefs.models.local.steering import BatchSteering
from prefs.models.positions import Span
from prefs.models.prompts import Prompt, encode_prompt
from prefs.models.types import Capture, Conversation, Message, Question, Request, Steering

if TYPE_CHECKING:
    from prefs.models.local.engine import LocalEngine

log = logging.getLogger(__name__)

# Of other lengths, so that one is padded.
CONVERSATIONS = (
    (Message("user", "Hi"), Message("assistant", "Hello.")),
    (Message("user", "Name two colours, please."), Message("assistant", "Red, and blue if you like.")),
)
QUESTION = Question("Did you like that?", ("yes", "no"))
# How far rebuilt log-probabilities may be from those of the pass, absolutely and relatively. The output layer computes
# in float32 always; what is before it may round another way in a batch of another shape.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Tokens of a prompt that are run after what is before them.
PIECE = 3


@dataclass(frozen=True)
class Passed:
    """What went through the model's blocks in some passes: by layer and pass, [rows, width, d_model].

    ``into`` and ``out`` are what each block was given and gave, before it was steered. ``kept`` is what hooks saw
    afterwards, and ``logits`` [rows, vocabulary] came out at last.
    """

    into: Mapping[int, Sequence[torch.Tensor]]
    out: Mapping[int, Sequence[torch.Tensor]]
    kept: Mapping[int, Sequence[torch.Tensor]]
    logits: Sequence[torch.Tensor]


class Proof:
    """The proofs of one engine: each is given once, before the first batch that rests on it, and that of capturing
    again in every batch whose number is a power of two. A proof that fails is a `UserError`."""

    def __init__(self, engine: LocalEngine):
        self._engine = engine
        self._captured = False
        self._steered: set[tuple[str, int, str]] = set()
        self._batches = 0
        self._dtype = torch.float32

    def before(self, requests: Sequence[Request]) -> None:
        """Prove what these requests rest on, where it has not been proven yet."""
        if not self._captured and any(request.capture is not None for request in requests):
            with self._engine.passes.uncounted():
                self._prove_capture()
            self._captured = True
        changes = {(change.at, change.layer, change.kind) for request in requests for change in request.steering}
        if wanted := sorted(changes - self._steered):
            with self._engine.passes.uncounted():
                for at in dict.fromkeys(at for at, *_ in wanted):
                    own = [(layer, kind) for where, layer, kind in wanted if where == at]
                    self._prove_steering([_change(layer, at, kind, self._engine.d_model) for layer, kind in own])
            self._steered.update(wanted)

    # --- capture

    @torch.inference_mode()
    def _prove_capture(self) -> None:
        """Of two short conversations, vectors at all layers are those that the blocks gave, and the last layer's give
        the pass's log-probabilities."""
        engine, prompts = self._engine, self._prompts
        ranges = [{"rating": (len(row.ids) - 1, len(row.ids)), "mean": row.spans.completion} for row in prompts]
        layers = range(engine.n_layers)
        recorder = engine.recorder(layers, ranges, [len(row.ids) for row in prompts], stops=False)
        with _watched(engine.bridge) as (_, out):
            _, logits = engine.passes.start([row.ids for row in prompts], watchers=[recorder], cached=False)
        vectors = recorder.vectors()
        self._dtype = out[layers[-1]][0].dtype
        for number, (row, own) in enumerate(zip(prompts, vectors, strict=True)):
            for layer in layers:
                stream = out[layer][0][number, -len(row.ids) :].float().cpu()
                rating, mean = stream[-1], stream[slice(*row.spans.completion)].mean(dim=0)
                if not (_same(own["rating"][layer], rating) and _near(own["mean"][layer], mean, 1e-4)):
                    raise self._not_captured([CONVERSATIONS[number]], layer, "they are not what the block gave")
        last = torch.stack([own["rating"][-1] for own in vectors])
        self._compare(CONVERSATIONS, last, logits[:, -1])

    def rating(
        self,
        conversations: Sequence[Conversation],
        capture: Capture,
        vectors: Sequence[Mapping[str, torch.Tensor]],
        logits: torch.Tensor,
    ) -> None:
        """Prove for the first and last row of a batch that the logits [rows, 1, vocabulary] come from the vectors."""
        layer = self._engine.n_layers - 1
        if layer not in capture.layers or not all("rating" in own for own in vectors):
            return
        self._batches += 1
        if self._batches & (self._batches - 1):
            return
        rows = sorted({0, len(vectors) - 1})
        last = torch.stack([vectors[row]["rating"][capture.layers.index(layer)] for row in rows])
        self._compare([conversations[row] for row in rows], last, logits[rows, -1])

    def _compare(self, conversations: Sequence[Conversation], vectors: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare log-probabilities from the last layer's vectors [rows, d_model] with those of the pass."""
        off, bound = self._off(vectors, logits), BOUNDS[self._dtype]
        wrong = [row for row, gap in enumerate(off) if not gap <= bound]
        if wrong:
            why = f"log-probabilities come out of them up to {max(off):.2g} off those of the pass (allowed: {bound:g})"
            raise self._not_captured([conversations[row] for row in wrong], self._engine.n_layers - 1, why)

    def _off(self, vectors: torch.Tensor, logits: torch.Tensor) -> list[float]:
        """[rows] largest difference of log-probabilities, relative where they are below -1; 0 where the pass has none,
        since its logits are not finite."""
        passes, name = self._engine.passes, self._engine.spec.name
        expected = logits.float().log_softmax(dim=-1)
        try:
            rebuilt = passes.logits(vectors.to(passes.device, self._dtype)).to(expected.device)
        except Exception as error:
            if out_of_memory(error):
                raise
            log.warning("%s: no log-probabilities can be rebuilt from its vectors (%s)", name, first_line(error))
            return [0.0] * len(vectors)
        rebuilt = rebuilt.float().log_softmax(dim=-1)
        gaps = (rebuilt - expected).abs() / expected.abs().clamp(min=1)
        known = expected.isfinite() | (rebuilt != expected)  # a token that cannot be has -inf in both
        return gaps.where(known, 0).amax(dim=-1).where(~expected.isnan().any(dim=-1), 0).tolist()

    def _not_captured(self, conversations: Sequence[Conversation], layer: int, why: str) -> UserError:
        rows = ", ".join(repr(next((m.content for m in turns if m.role == "user"), "")[:40]) for turns in conversations)
        return UserError(
            f"{self._engine.spec.name}: captured vectors at layer {layer} cannot be trusted: of the conversations that"
            f" begin with {rows}, {why}. This model runs with capture=none only; please report it"
        )

    # --- steering

    @torch.inference_mode()
    def _prove_steering(self, changes: Sequence[Steering]) -> None:
        """Of two short conversations, coefficient 0 changes no bit, and another moves the residual stream after each of
        these layers by what it says, at the tokens that it names and at no others: as prompts are run, in two pieces,
        as a token is generated after them, and as doses are run, above their lowest layer."""
        plain, layers = self._run(()), {change.layer for change in changes}
        scale = {layer: float(plain.out[layer][1].float().square().mean().sqrt()) for layer in layers}
        changes = [replace(change, vector=change.vector * scale[change.layer]) for change in changes]
        if any(bool(logits.isnan().any()) for logits in plain.logits):
            return  # as of any row then, whose reason it is
        none = self._run([replace(change, coefficient=0.0) for change in changes])
        for before, after in ((plain.kept, none.kept), (plain.out, none.out)):
            for layer, of_passes in before.items():
                if not all(map(torch.equal, of_passes, after[layer])):
                    raise self._not_steered(f"coefficient 0 changes the residual stream after layer {layer}")
        if not all(map(torch.equal, plain.logits, none.logits)):
            raise self._not_steered("coefficient 0 changes the logits")
        steered = self._run(changes)
        last = self._engine.n_layers - 1
        for layer in layers:
            # What reaches the next block; where a family does more between blocks, what the hooks saw.
            given = plain.into.get(layer + 1, ())
            flows = len(given) == len(plain.out[layer]) and all(map(torch.equal, plain.out[layer], given))
            reached = steered.into[layer + 1] if flows else steered.kept[layer]
            own = [change for change in changes if change.layer == layer]
            for number, (before, after) in enumerate(zip(steered.out[layer], reached, strict=True)):
                tokens = self._numbers(number, before.shape[1])
                self._moved(own, tokens.to(before.device), before, after)
        off = self._off(steered.kept[last][2][:, -1], steered.logits[2])
        if not max(off) <= BOUNDS[self._dtype]:
            raise self._not_steered(f"what is steered does not reach the logits (they are {max(off):.2g} off)")

    def _moved(
        self, changes: Sequence[Steering], tokens: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> None:
        """Check what one layer's changes did in a pass over tokens of these numbers [rows, width] in their rows, where
        -1 is padding."""
        named = torch.zeros_like(tokens, dtype=torch.bool)
        for row, prompt in enumerate(self._prompts):
            start, end = _tokens_named(changes[0].at, prompt)
            named[row] = (tokens[row] >= start) & (tokens[row] < end)
        x, moved = before.double(), before.double()
        for change in changes:
            vector = change.vector.to(before.device).double()
            unit = vector / vector.norm()
            by = vector if change.kind == "add" else -(moved @ unit)[..., None] * unit
            moved = moved + change.coefficient * by
        rounding = torch.finfo(before.dtype).eps * (x.abs() + moved.abs()) * len(changes)
        rounding = rounding + 1e-6 * (x.norm(dim=-1, keepdim=True) + moved.norm(dim=-1, keepdim=True))
        right = ((after.double() - moved).abs() <= rounding).where(named[..., None], after == before)
        wrong = (~right.all(dim=-1) & (tokens >= 0)).nonzero().tolist()
        if wrong:
            row, column = wrong[0]
            off = (after.double() - moved.where(named[..., None], x))[row, column].abs().max()
            raise self._not_steered(
                f"after layer {changes[0].layer}, token {int(tokens[row, column])} of {len(self._prompts[row].ids)}"
                f" should {'be moved' if named[row, column] else 'stay as it is'} by steering at {changes[0].at}, and"
                f" is off by {float(off):.2g}"
            )

    def _run(self, changes: Sequence[Steering]) -> Passed:
        """Run prompts in two pieces, and a token after them; and the second piece once more as doses are run."""
        engine, passes, ids = self._engine, self._engine.passes, [row.ids for row in self._prompts]
        spans = [{change.at: _tokens_named(change.at, row) for change in changes} for row in self._prompts]
        steering = BatchSteering.build(changes, spans, engine.device)
        kept: list[Kept] = []

        def watching() -> list[Kept]:
            kept.append(Kept(range(engine.n_layers), stops=False))
            return kept[-1:]

        first, second, drawn = [row[:-PIECE] for row in ids], [row[-PIECE:] for row in ids], [row[-1:] for row in ids]
        with _watched(engine.bridge) as (into, out):
            state, logits_first = passes.start(first, steering, watching())
            begun = state.fork()
            state, logits_second = passes.extend(state, second, watchers=watching())
            _, logits_drawn = passes.extend(state, drawn, watchers=watching())
        self._dtype = kept[-1].after[engine.n_layers - 1].dtype
        logits = [logits_first, logits_second, logits_drawn]
        if changes and passes.shares_blocks:
            lowest = min(change.layer for change in changes)
            logits.append(self._as_doses(begun, lowest, second, watching, into, out))
        by_layer = {layer: [one.after[layer] for one in kept] for layer in range(engine.n_layers)}
        return Passed(into, out, by_layer, [one[:, -1] for one in logits])

    def _as_doses(
        self, begun: State, lowest: int, rows: Sequence[Sequence[int]], watching: Any, into: Any, out: Any
    ) -> torch.Tensor:
        """Run tokens as `DosePasses` does, from what the lowest steered layer gave unsteered."""
        passes, below_it = self._engine.passes, Kept([lowest], stops=False)
        unsteered = replace(begun.fork(), steering=BatchSteering((), begun.steering.ranges[:, :0]))
        below, _ = passes.extend(unsteered, rows, watchers=[below_it])
        with _watched(self._engine.bridge, into, out):
            _, logits = passes.extend_above(lowest, below_it.after[lowest], below, begun, rows, watching())
        return logits

    def _numbers(self, number: int, width: int) -> torch.Tensor:
        """Of a pass of `_run`, the tokens' numbers in their rows [rows, width]; -1 for padding. Rows end in the same
        column, whether they went on or were run again from their beginning."""
        further = (-PIECE, 0, 1, 0)[number]
        ends = [len(row.ids) + further for row in self._prompts]
        return torch.stack([torch.arange(end - width, end).clamp(min=-1) for end in ends])

    def _not_steered(self, why: str) -> UserError:
        return UserError(
            f"{self._engine.spec.name}: steering does not do what it should: {why}. This model runs with steering=none"
            " only; please report it"
        )

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return [encode_prompt(self._engine.encoder, turns, QUESTION) for turns in CONVERSATIONS]


def _change(layer: int, at: Any, kind: Any, d_model: int) -> Steering:
    """A vector that is like no other layer's, of as large numbers as the standard normal's."""
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(layer))
    return Steering(layer, vector, 1.5 if kind == "add" else 0.5, at, kind)


def _tokens_named(at: str, prompt: Prompt) -> Span:
    """The tokens that `Steering.at` names, the generated ones among them."""
    count = len(prompt.ids)
    return {
        "all": (0, OPEN),
        "last": (count - 1, OPEN),
        "completion": prompt.spans.completion,
        "question": prompt.spans.question,
    }[at]


@contextmanager
def _watched(
    bridge: Any, into: dict[int, list[torch.Tensor]] | None = None, out: dict[int, list[torch.Tensor]] | None = None
) -> Iterator[tuple[dict[int, list[torch.Tensor]], dict[int, list[torch.Tensor]]]]:
    """Note what the model's own blocks are given and give, by layer, one tensor a pass."""
    into, out = {} if into is None else into, {} if out is None else out
    handles = []
    for layer, block in enumerate(bridge.blocks):

        def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if isinstance(hidden, torch.Tensor):
                into.setdefault(layer, []).append(hidden)

        def given(module: Any, args: tuple[Any, ...], output: Any, layer: int = layer) -> None:
            out.setdefault(layer, []).append(output[0] if isinstance(output, tuple) else output)

        handles.append(block.original_component.register_forward_pre_hook(give, with_kwargs=True))
        handles.append(block.original_component.register_forward_hook(given))
    try:
        yield into, out
    finally:
        for handle in handles:
            handle.remove()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _near(one: torch.Tensor, other: torch.Tensor, rounding: float) -> bool:
    bound = rounding * float(other.nan_to_num().abs().max())
    return torch.allclose(one, other, rtol=rounding, atol=bound, equal_nan=True)
