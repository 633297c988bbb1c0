"""The TransformerLens engine: sampling, option scoring and residual capture through one `TransformerBridge`.

Everything runs on left-padded token ids with explicit masks and positions. A conversation is run once, its keys and
values are kept, and each question goes on from there.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from prefs.chat import ChatEncoder, Message
from prefs.errors import UserError
from prefs.models.backend import (
    Answer,
    Ask,
    CaptureRequest,
    Conversation,
    Observation,
    Question,
    Sample,
    Sampling,
    Score,
    Usage,
)
from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec
from prefs.models.thoughts import THOUGHT, Thought, joined
from prefs.options import Asked, ask, option_masses
from prefs.sampling import draw, row_uniforms

log = logging.getLogger(__name__)

# Sampled answers decoded at once for each row: bounds the copies of a conversation's keys and values.
SEEDS_AT_ONCE = 4
# Encoded where there is no question: it shows where the conversation ends.
NO_QUESTION = Question("?", ("1", "2"))


@dataclass(frozen=True)
class _State:
    """A batch that has been run so far: its cache, the mask [rows, width] of real tokens, and tokens a row."""

    cache: Cache
    mask: torch.Tensor
    lengths: torch.Tensor

    def fork(self) -> _State:
        return _State(_fork(self.cache), self.mask, self.lengths)

    def select(self, rows: torch.Tensor) -> _State:
        """The state of these rows, in this order; rows may repeat."""
        if torch.equal(rows, torch.arange(len(self.lengths), device=rows.device)):
            return self
        cache = _fork(self.cache)
        cache.batch_select_indices(rows)  # type: ignore[attr-defined]
        return _State(cache, self.mask[rows], self.lengths[rows])


class _Float32Unembedding(nn.Linear):
    """The output layer in float32: bfloat16 logits are up to 1/8 apart, too coarse for a probability of an option."""

    @classmethod
    def of(cls, linear: nn.Linear) -> _Float32Unembedding:
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float())


class TransformerLensBackend:
    """A chat model in a `TransformerBridge`. See `prefs.models.backend.Backend` for the protocol."""

    def __init__(self, bridge: Any, tokenizer: Any, spec: ModelSpec):
        self.bridge = bridge
        self.spec = spec
        self.encoder = ChatEncoder(tokenizer, json.loads(spec.chat_template_kwargs), spec.thinking)
        model = bridge.original_model
        self.device = next(model.parameters()).device
        self.n_layers = int(bridge.cfg.n_layers)
        self.d_model = int(bridge.cfg.d_model)
        text_config = model.config.get_text_config()
        self.max_context = spec.max_context or int(text_config.max_position_embeddings)
        self._stops = _stop_tokens(tokenizer, model.generation_config)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._stops, default=0)
        self._hooks = [f"blocks.{layer}.hook_out" for layer in range(self.n_layers)]
        absent = [name for name in self._hooks if name not in bridge.hook_dict]
        if absent:
            raise UserError(f"{spec.name}: TransformerLens offers no residual stream at {absent[0]}")

    @classmethod
    def load(cls, spec: ModelSpec, path: str) -> TransformerLensBackend:
        """Load weights (safetensors only, no remote code) and wrap them.

        Raises
        ------
        UserError
            If the weights, the tokenizer or the device are not there, or TransformerLens does not know the family.
        """
        from transformer_lens.model_bridge import TransformerBridge

        device = resolve_device(spec.device)
        dtype = getattr(torch, spec.dtype)
        with _quiet_loading():
            try:
                options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
                tokenizer = AutoTokenizer.from_pretrained(path, **options)
                model = AutoModelForCausalLM.from_pretrained(
                    path, dtype=dtype, use_safetensors=True, attn_implementation="eager", **options
                )
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise UserError(f"cannot load {spec.name} from {path}: {_first_line(error)}") from None
            unembedding = model.get_output_embeddings()
            if isinstance(unembedding, nn.Linear):
                model.set_output_embeddings(_Float32Unembedding.of(unembedding))
            try:
                bridge = TransformerBridge.boot_transformers(
                    path, hf_model=nn.Module.to(model, device).eval(), tokenizer=tokenizer, dtype=dtype, device=device
                )
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"TransformerLens cannot wrap {spec.name}: {_first_line(error)}") from None
            _use_own_attention(bridge)
        return cls(bridge, tokenizer, spec)

    def prompt_tokens(self, conversation: Conversation) -> int:
        return len(self.encoder.encode(conversation, answer="").ids) + self.encoder.thought_room

    def conversation_tokens(self, conversation: Conversation) -> int:
        return ask(self.encoder, conversation, NO_QUESTION).question_start

    def question_tokens(self, conversation: Conversation, question: Question) -> int:
        asked = ask(self.encoder, conversation, question)
        return len(asked.ids) + max(len(tail) for tail in asked.tails) + self.encoder.thought_room

    @torch.inference_mode()
    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        seeds = [(seed,)] * len(batch)
        if self.encoder.thinking is None:
            state, logits = self._start([self.encoder.encode(row, answer="").ids for row in batch])
            return [of_row[seed] for of_row in self._decode(state, logits, seeds, batch, sampling)]
        state, logits = self._start([self.encoder.open_thought(row) for row in batch])
        thoughts = [of_row[seed] for of_row in self._think(state, logits, seeds, batch, sampling)]
        state, logits = self._start(
            [
                self.encoder.encode(row, answer="", thought=thought.text).ids
                for row, thought in zip(batch, thoughts, strict=True)
            ]
        )
        samples = [of_row[seed] for of_row in self._decode(state, logits, seeds, batch, sampling)]
        return [thought.before(sample) for thought, sample in zip(thoughts, samples, strict=True)]

    @torch.inference_mode()
    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
    ) -> list[Observation]:
        questions = [each.question for each in asks] or [NO_QUESTION]
        asked = [[ask(self.encoder, row, question) for row in batch] for question in questions]
        prefixes = [_shared_prefix([of_question[row] for of_question in asked]) for row in range(len(batch))]
        residuals: list[dict[str, torch.Tensor]] = [{} for _ in batch]
        hooks = []
        if capture is not None:
            spots = [_spots(asked[0][row], capture.positions) for row in range(len(batch))]
            width = max(len(prefix) for prefix in prefixes)
            offsets = [width - len(prefix) for prefix in prefixes]
            hooks = self._capture_hooks(capture.layers, partial(_keep_spots, spots, offsets, residuals))
        with self.bridge.hooks(fwd_hooks=hooks):
            state, _ = self._start(prefixes)
        wants_rating = capture is not None and "rating" in capture.positions
        answer = self._answer if self.encoder.thinking is None else self._answer_after_thoughts
        by_question = [
            answer(state.fork(), each, of_question, prefixes, batch, sampling, capture if wants_rating else None)
            for each, of_question in zip(asks, asked, strict=False)
        ]
        return [
            Observation(tuple(answers[row] for answers in by_question), residuals[row]) for row in range(len(batch))
        ]

    @torch.inference_mode()
    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        thoughts: list[str | None] = [None] * len(batch)
        if self.encoder.thinking is not None:
            state, logits = self._start([self.encoder.open_thought(row) for row in batch])
            drawn = self._think(state, logits, [(0,)] * len(batch), batch, Sampling(0.0, 1.0, 1))
            thoughts = [of_row[0].text for of_row in drawn]
        asked = [
            ask(self.encoder, row[:-1], Question(row[-1].content, tuple(options)), thought)
            for row, thought in zip(batch, thoughts, strict=True)
        ]
        masses = self._score(*self._start([row.ids for row in asked]), asked)
        return [options[int(at)] for at in masses.argmax(axis=1)]

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        del self.bridge

    def _answer(
        self,
        state: _State,
        each: Ask,
        asked: Sequence[Asked],
        prefixes: Sequence[tuple[int, ...]],
        batch: Sequence[Conversation],
        sampling: Sampling,
        capture: CaptureRequest | None,
    ) -> list[Answer]:
        """Put one question to a batch whose conversations have been run."""
        rating: list[dict[str, torch.Tensor]] = [{} for _ in batch]
        hooks = []
        if capture is not None:
            hooks = self._capture_hooks(capture.layers, partial(_keep_last, rating))
        with self.bridge.hooks(fwd_hooks=hooks):
            rest = [row.ids[len(prefix) :] for row, prefix in zip(asked, prefixes, strict=True)]
            state, logits = self._extend(state, rest)
        masses = self._score(state, logits, asked) if each.scores else None
        samples: list[dict[int, Sample]] = [{} for _ in batch]
        conversations = [(*row, Message("user", each.question.text)) for row in batch]
        for start in range(0, len(each.seeds), SEEDS_AT_ONCE):
            seeds = each.seeds[start : start + SEEDS_AT_ONCE]
            decoded = self._decode(state.fork(), logits, [seeds] * len(batch), conversations, sampling)
            for row, of_row in enumerate(decoded):
                samples[row] |= of_row
        return [
            Answer(
                scores={} if masses is None else {0: Score(tuple(float(mass) for mass in masses[row]))},
                samples=samples[row],
                residual=rating[row].get("rating"),
            )
            for row in range(len(batch))
        ]

    def _answer_after_thoughts(
        self,
        state: _State,
        each: Ask,
        asked: Sequence[Asked],
        prefixes: Sequence[tuple[int, ...]],
        batch: Sequence[Conversation],
        sampling: Sampling,
        capture: CaptureRequest | None,
    ) -> list[Answer]:
        """Put one question to a batch whose conversations have been run, and let the model think before it answers."""
        seeds = tuple(dict.fromkeys((*each.scores, *each.seeds)))
        conversations = [(*row, Message("user", each.question.text)) for row in batch]
        opened = [
            self.encoder.open_thought(row)[len(prefix) :] for row, prefix in zip(conversations, prefixes, strict=True)
        ]
        thoughts = self._think(*self._extend(state.fork(), opened), [seeds] * len(batch), conversations, sampling)
        answers = [Answer() for _ in batch]
        for seed in seeds:
            after = [
                ask(self.encoder, row, each.question, of_row[seed].text)
                for row, of_row in zip(batch, thoughts, strict=True)
            ]
            once = Ask(each.question, (seed,) * (seed in each.seeds), (0,) * (seed in each.scores))
            captured = capture if seed == seeds[0] else None
            brought = self._answer(state.fork(), once, after, prefixes, batch, sampling, captured)
            answers = [
                joined(before, of_row[seed].of(answer), seed)
                for before, of_row, answer in zip(answers, thoughts, brought, strict=True)
            ]
        return answers

    def _think(
        self,
        state: _State,
        logits: torch.Tensor,
        seeds: Sequence[tuple[int, ...]],
        conversations: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[dict[int, Thought]]:
        """Draw a thought for every (row, seed)."""
        thinking, end = self.encoder.thinking, self.encoder.thought_end
        assert thinking is not None
        assert end is not None
        budget = replace(sampling, max_new_tokens=thinking.max_tokens)
        # Other random numbers than the answer's.
        drawn = self._draw(
            state, logits, seeds, [(*row, THOUGHT) for row in conversations], budget, {end, *self._stops}
        )
        texts = self.encoder.tokenizer.batch_decode([ids for ids, _ in drawn.values()], skip_special_tokens=True)
        thoughts: list[dict[int, Thought]] = [{} for _ in seeds]
        for ((row, seed), (ids, stop)), text in zip(drawn.items(), texts, strict=True):
            thoughts[row][seed] = Thought(text, len(ids), stop == end or thinking.force_close)
        return thoughts

    def _score(self, state: _State, logits: torch.Tensor, asked: Sequence[Asked]) -> np.ndarray:
        """Probability of each whole option string, [rows, options]."""
        first = logits[:, -1].float().log_softmax(dim=-1)
        columns = []
        for option in range(len(asked[0].tails)):
            tails = [row.tails[option] for row in asked]
            log_prob = first.gather(1, self._tensor([[tail[0]] for tail in tails]))[:, 0]
            if any(len(tail) > 1 for tail in tails):
                # The last token is only predicted, never run.
                longest = max(len(tail) for tail in tails)
                _, after = self._extend(state.fork(), [tail[:-1] for tail in tails], keep=longest - 1)
                after = after.float().log_softmax(dim=-1)
                for row, tail in enumerate(tails):
                    for back, token in enumerate(reversed(tail[1:]), start=1):
                        log_prob[row] += after[row, -back, token]
            columns.append(log_prob.double().cpu().numpy())
        stacked = np.stack(columns, axis=1)
        return np.concatenate([option_masses(stacked[row : row + 1], asked[row].tails) for row in range(len(asked))])

    def _decode(
        self,
        state: _State,
        logits: torch.Tensor,
        seeds: Sequence[tuple[int, ...]],
        conversations: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[dict[int, Sample]]:
        """Sample a continuation for every (row, seed)."""
        drawn = self._draw(state, logits, seeds, conversations, sampling, self._stops)
        texts = self.encoder.tokenizer.batch_decode([ids for ids, _ in drawn.values()], skip_special_tokens=True)
        samples: list[dict[int, Sample]] = [{} for _ in seeds]
        for ((row, seed), (ids, stop)), text in zip(drawn.items(), texts, strict=True):
            samples[row][seed] = Sample(text, len(ids), stop is not None)
        return samples

    def _draw(
        self,
        state: _State,
        logits: torch.Tensor,
        seeds: Sequence[tuple[int, ...]],
        conversations: Sequence[Conversation],
        sampling: Sampling,
        stops: Set[int],
    ) -> dict[tuple[int, int], tuple[list[int], int | None]]:
        """Sample tokens for every (row, seed), up to a stop token; and that token, None where there was none.

        Seeds of a row that have drawn the same tokens so far are one branch and are run once; a finished branch leaves
        the batch.
        """
        uniforms = {
            (row, seed): row_uniforms(seed, conversations[row], sampling.max_new_tokens)
            for row in range(len(seeds))
            for seed in seeds[row]
        }
        drawn: dict[tuple[int, int], list[int]] = {stream: [] for stream in uniforms}
        stopped: dict[tuple[int, int], int] = {}
        branches = [[(row, seed) for seed in seeds[row]] for row in range(len(seeds))]
        for step in range(sampling.max_new_tokens):
            most = max(len(streams) for streams in branches)
            numbers = np.zeros((len(branches), most))
            for at, streams in enumerate(branches):
                numbers[at, : len(streams)] = [uniforms[stream][step] for stream in streams]
            tokens = draw(logits[:, -1], torch.from_numpy(numbers), sampling).tolist()
            grown: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for at, streams in enumerate(branches):
                for stream, token in zip(streams, tokens[at], strict=False):
                    if token in stops:
                        stopped[stream] = token
                    else:
                        drawn[stream].append(token)
                        grown.setdefault((at, token), []).append(stream)
            if not grown or step + 1 == sampling.max_new_tokens:
                break
            parents = self._tensor([at for at, _ in grown])
            state, logits = self._extend(state.select(parents), [(token,) for _, token in grown])
            branches = list(grown.values())
        return {stream: (ids, stopped.get(stream)) for stream, ids in drawn.items()}

    def _start(self, rows: Sequence[tuple[int, ...]]) -> tuple[_State, torch.Tensor]:
        """Run whole sequences from nothing."""
        empty = torch.zeros((len(rows), 0), dtype=torch.long, device=self.device)
        return self._run(None, empty, empty.sum(dim=1), rows, keep=1)

    def _extend(self, state: _State, rows: Sequence[tuple[int, ...]], keep: int = 1) -> tuple[_State, torch.Tensor]:
        """Run more tokens after a state; rows may differ in length. The given state must not be used again."""
        return self._run(state.cache, state.mask, state.lengths, rows, keep)

    def _run(
        self,
        cache: Cache | None,
        mask: torch.Tensor,
        lengths: torch.Tensor,
        rows: Sequence[tuple[int, ...]],
        keep: int,
    ) -> tuple[_State, torch.Tensor]:
        """One forward pass over left-padded rows.

        Returns
        -------
        state
            With these tokens in it.
        logits
            [rows, keep, vocabulary] after each of the last `keep` tokens.
        """
        width = max(len(row) for row in rows)
        ids = self._tensor([[self._pad] * (width - len(row)) + list(row) for row in rows])
        real = self._tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        # Padding stands at position 0: it is masked, and positions must lie inside the model's range.
        positions = (lengths[:, None] + real.cumsum(dim=1) - 1).clamp(min=0) * real
        mask = torch.cat([mask, real], dim=1)
        logits, extended = self.bridge(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            return_type="logits_and_cache",
        )
        return _State(extended, mask, lengths + real.sum(dim=1)), logits

    def _capture_hooks(
        self, layers: Sequence[int], keep: Callable[[int, int, torch.Tensor], None]
    ) -> list[tuple[str, Callable[..., None]]]:
        def hook(at: int, tensor: torch.Tensor, hook: Any) -> None:
            keep(at, len(layers), tensor)

        return [(self._hooks[layer], partial(hook, at)) for at, layer in enumerate(layers)]

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _keep_spots(
    spots: Sequence[Mapping[str, tuple[int, int]]],
    offsets: Sequence[int],
    residuals: list[dict[str, torch.Tensor]],
    at: int,
    layers: int,
    tensor: torch.Tensor,
) -> None:
    """Keep the mean over each wanted token range of one layer's residual stream [rows, width, d_model]."""
    for row, of_row in enumerate(spots):
        for position, (start, end) in of_row.items():
            vector = tensor[row, offsets[row] + start : offsets[row] + end].float().mean(dim=0).cpu()
            kept = residuals[row].setdefault(position, torch.empty(layers, len(vector)))
            kept[at] = vector


def _keep_last(residuals: list[dict[str, torch.Tensor]], at: int, layers: int, tensor: torch.Tensor) -> None:
    """Keep one layer's residual stream at the last token: rows are left-padded, so it is the same column for all."""
    last = tensor[:, -1].float().cpu()
    for row, of_row in enumerate(residuals):
        of_row.setdefault("rating", torch.empty(layers, last.shape[1]))[at] = last[row]


def _spots(asked: Asked, positions: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Token ranges [start, end) of the positions that lie in the conversation (all but ``rating``).

    The completion is the last turn before the question; ``last_prompt`` is the token just before it, where the
    assistant's turn has been opened. An empty completion has only that one.
    """
    start, end = asked.spans[-2]
    ranges = {"last_prompt": (start - 1, start)}
    if end > start:
        ranges["first_completion"] = (start, start + 1)
        ranges["last_completion"] = (end - 1, end)
        ranges["mean_completion"] = (start, end)
    return {position: ranges[position] for position in positions if position in ranges}


def _shared_prefix(asked: Sequence[Asked]) -> tuple[int, ...]:
    """The tokens before the questions, which are the same for all of them."""
    first = asked[0]
    prefix = first.ids[: first.question_start]
    for other in asked[1:]:
        if other.ids[: other.question_start] != prefix:
            raise AssertionError("the chat template changes earlier turns with the question that follows")
    return prefix


def _fork(cache: Cache) -> Cache:
    """A cache that can be extended without changing this one. Growing layers replace their tensors, so these are
    shared; other kinds write in place and are copied."""
    forked = copy.copy(cache)
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    forked.layers = [copy.copy(x) if type(x) in growing else copy.deepcopy(x) for x in cache.layers]
    return forked


def _use_own_attention(bridge: Any) -> None:
    """Let every block run the model's own attention in place of TransformerLens' reconstruction of it.

    Hooks inside attention need the reconstruction, which holds all attention patterns; only the residual stream between
    blocks is read here. Attention by torch's `scaled_dot_product_attention` is faster and its memory linear in the
    length. It has no soft cap, so models with one (Gemma 2) keep transformers' eager attention.
    """
    model = bridge.original_model
    for block in bridge.blocks:
        layer = block.original_component
        for name, child in list(layer.named_children()):
            if child is getattr(block, "attn", None):
                setattr(layer, name, child.original_component)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None:
        with contextlib.suppress(ValueError):  # a family without it
            model.set_attn_implementation("sdpa")


def _stop_tokens(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    stops = generation_config.eos_token_id if generation_config is not None else None
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    return frozenset([*stops, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])


def config_layers(path: str, revision: str | None) -> int:
    """Number of layers a model's config gives, without loading weights.

    Raises
    ------
    UserError
        If the config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the config of {path}: {_first_line(error)}") from None
    return int(config.get_text_config().num_hidden_layers)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
