"""The TransformerLens engine: sampling, option scoring and residual capture through one `TransformerBridge`.

Everything runs on left-padded token ids with explicit masks and positions. A conversation is run once, its keys and
values are kept, and each question goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch

from prefs.errors import UserError
from prefs.models.architecture import context_length, written_context
from prefs.models.loading import ModelSpec
from prefs.models.local.bridge import load_bridge
from prefs.models.local.decoding import Decoder
from prefs.models.local.doses import DosePasses, likelihood_alone
from prefs.models.local.grouping import (
    QuestionBatch,
    Row,
    Steerings,
    active,
    at_question,
    before_question,
    grouped,
    questions,
    reads_logits,
    spans_of_answer,
    spans_of_completion,
)
from prefs.models.local.memory import Halving
from prefs.models.local.passes import Passes, State
from prefs.models.local.proof import Proof
from prefs.models.local.residuals import Recorder
from prefs.models.local.steering import BatchSteering, check
from prefs.models.local.token_stream import TokenStream, owners, token_texts
from prefs.models.local.trial import tried
from prefs.models.positions import POSITIONS, token_ranges
from prefs.models.prompts import Prompt, Thought, chosen, encode_prompt, request_tokens, scored, shared_prefix
from prefs.models.sampling import Stops
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Message, Question, Reply, Request, Sampling, Score, Usage
from prefs.models.weights import check_vocabulary

log = logging.getLogger(__name__)

# Of any tokenizer, more tokens than the trial of what passes may share runs.
TRIAL = " ".join(f"{n} and {n} are {2 * n}." for n in range(1, 31))

# By row, what its requests brought, by number.
Replies = list[dict[int, Reply]]


class LocalEngine:
    """A chat model in a `TransformerBridge`. See `prefs.models.types.Engine` for the protocol."""

    rows_apart = False
    recorder = Recorder

    def __init__(self, bridge: Any, tokenizer: Any, spec: ModelSpec):
        self.bridge = bridge
        self.spec = spec
        self.encoder = ChatEncoder(tokenizer, spec.chat_template_kwargs, spec.thinking)
        model = bridge.original_model
        self.d_model = int(bridge.cfg.d_model)
        self.max_context = spec.max_context or context_length(
            written_context(model.config.get_text_config()), tokenizer
        )
        stops = Stops.of(self.encoder, model.generation_config)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops.tokens, default=0)
        self.passes = Passes(bridge, pad, spec.name)
        self.decoder = Decoder(self.passes, self.encoder, stops)
        self.device, self.n_layers = self.passes.device, self.passes.n_layers
        self.proof: Proof | None = Proof(self)
        self._halving = Halving(spec.name)
        self._requests = 0

    @classmethod
    def load(cls, spec: ModelSpec, path: str) -> LocalEngine:
        """Load a model, or raise `UserError`; see `prefs.models.local.bridge.load_bridge`."""
        bridge, tokenizer = load_bridge(spec, path)
        engine = cls(bridge, tokenizer, spec)
        check_vocabulary(engine.encoder, bridge.original_model.get_input_embeddings().weight.shape[0])
        engine.try_sharing()
        for note in engine.encoder.notes(spec.name):
            log.info("%s", note)
        return engine

    @torch.inference_mode()
    def try_sharing(self) -> None:
        """Try out what the model's passes may share, on a short text; what they may not is logged."""
        text = self.encoder.encode((Message("user", TRIAL),), answer="").ids
        # By a copy, whose tokens are not counted.
        self.passes.sharing = tried(copy(self.passes), self.bridge.original_model.config, text)
        note = self.passes.sharing.note()
        if note is not None:
            log.info("%s, so that no row's numbers depend on others: %s", self.spec.name, note)

    def tokens(self, request: Request) -> int:
        return request_tokens(self.encoder, request)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for request in requests:
            check(request.steering, self.n_layers, self.d_model)
        if self.proof is not None:
            self.proof.before(requests)
        kinds = {
            "complete": self._complete,
            "choose": self._choose,
            "open": self._open,
            "doses": self._doses,
            "observe": self._observe,
        }
        for group in grouped(requests):
            self._requests += group.count
            whole = group.kind in ("complete", "choose", "open")
            for rows in self._side_by_side(group.rows):
                for replies in self._halving.run(
                    kinds[group.kind],
                    rows,
                    tokens=lambda row, whole=whole: self.tokens(row.request if whole else Request(row.messages)),
                ):
                    yield from replies.items()

    def _side_by_side(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows in batches whose rows may stand beside each other."""
        alone = [row for row in rows if self._alone(row)]
        together = [row for row in rows if row not in alone] if alone else list(rows)
        return [rows for rows in [together, *([row] for row in alone)] if rows]

    def _alone(self, row: Row) -> bool:
        """Whether a row is run alone: with all that may be drawn after it.

        Raises
        ------
        UserError
            If it is too long for what the family computes to be right.
        """
        sharing = self.passes.sharing
        if sharing.switch is None:
            return not sharing.rows
        drawn = [request.sampling.max_new_tokens if request.sampling else 0 for request in row.requests.values()]
        over = max(map(self.tokens, row.requests.values())) + max(drawn) > sharing.switch
        if over and sharing.indexed:
            raise UserError(
                f"{self.spec.name}: in conversations of over {sharing.switch:,} tokens, tokens of this family would see"
                f" later ones; give model.max_context={sharing.switch}, so that such are left out as too long"
            )
        return over or not sharing.rows

    def usage(self) -> Usage:
        return Usage(self._requests, self.passes.prompt_tokens, self.passes.drawn_tokens)

    def close(self) -> None:
        del self.bridge, self.passes, self.decoder

    @torch.inference_mode()
    def residual_stream(
        self, messages: Conversation, layer: int, question: Question | None = None, thought: str | None = None
    ) -> TokenStream:
        """The residual stream after block `layer` at every token of one conversation, from one pass over it.

        Parameters
        ----------
        messages
            Ends with the completion; an empty one stands for the opened assistant's turn.
        question
            Put to it, with the opening of the answer. Without it, the conversation ends with the completion's text.
        thought
            What a thinking model thought before its answer to the question.

        Raises
        ------
        UserError
            If the model has no such layer, or the conversation does not fit into memory.
        """
        if layer not in range(self.n_layers):
            raise UserError(f"{self.spec.name} has layers 0 to {self.n_layers - 1}, and no layer {layer}")
        prompt = encode_prompt(self.encoder, messages, question, thought)
        ids = prompt.ids if question is not None else prompt.ids[: prompt.spans.completion[1]]
        (vectors,) = self._halving.run(lambda rows: [self._every_token(row, layer) for row in rows], [ids], tokens=len)
        control = self.encoder.control_ids
        positions = [name for name, position in POSITIONS.items() if question is not None or not position.of_question]
        return TokenStream(
            tokens=token_texts(self.encoder.tokenizer, ids),
            control=tuple(token in control for token in ids),
            roles=owners(len(ids), prompt.spans.turns, [*(message.role for message in messages), "user"]),
            ranges=token_ranges(prompt.spans, positions),
            vectors=vectors,
        )

    def _every_token(self, ids: tuple[int, ...], layer: int) -> torch.Tensor:
        """[tokens, d_model] after a block."""
        recorder = self.recorder([layer], [{str(n): (n, n + 1) for n in range(len(ids))}], [len(ids)], stops=True)
        self.passes.start([ids], watchers=[recorder], cached=False)
        (by_token,) = recorder.vectors()
        return torch.cat(list(by_token.values()))

    @torch.inference_mode()
    def _complete(self, rows: Sequence[Row]) -> Replies:
        """The assistant's next turn, for every row and each of its seeds."""
        sampling, thinks = _sampling(rows[0].request), self.encoder.thinking is not None
        turns = [row.messages for row in rows]
        seeds = [tuple(dict.fromkeys(s for request in row.requests.values() for s in request.seeds)) for row in rows]
        ids = [self.encoder.open_thought(row) if thinks else self.encoder.encode(row, answer="").ids for row in turns]
        steering = BatchSteering.build(rows[0].request.steering, [spans_of_completion(row) for row in ids], self.device)
        state, logits = self.passes.start(ids, steering)
        if not thinks:
            samples = self.decoder.samples(state, logits, seeds, turns, sampling)
        else:
            thoughts = self.decoder.thoughts(state, logits, seeds, turns, sampling)
            samples = [{} for _ in rows]
            for seed in dict.fromkeys(seed for own in seeds for seed in own):
                numbers = [row for row, own in enumerate(seeds) if seed in own]
                ids = [
                    self.encoder.encode(turns[row], answer="", thought=thoughts[row][seed].text).ids for row in numbers
                ]
                state, logits = self.passes.start(ids, steering.select(self.passes.tensor(numbers)))
                drawn = self.decoder.samples(
                    state, logits, [(seed,)] * len(numbers), [turns[row] for row in numbers], sampling
                )
                for row, sample in zip(numbers, drawn, strict=True):
                    samples[row][seed] = thoughts[row][seed].sample(sample[seed])
        return [
            {n: Reply({seed: own[seed] for seed in request.seeds}) for n, request in row.requests.items()}
            for row, own in zip(rows, samples, strict=True)
        ]

    @torch.inference_mode()
    def _choose(self, rows: Sequence[Row]) -> Replies:
        """The likeliest option, after one thought of a model that thinks."""
        thoughts: list[Thought | None] = [None] * len(rows)
        if self.encoder.thinking is not None:
            turns = [row.messages for row in rows]
            state, logits = self.passes.start([self.encoder.open_thought(row) for row in turns])
            drawn = self.decoder.thoughts(state, logits, [(0,)] * len(rows), turns, Sampling(0.0, 1.0, 1))
            thoughts = [of_row[0] for of_row in drawn]
        prompts = [
            encode_prompt(self.encoder, row.request.messages, row.request.question, thought and thought.text).as_said
            for row, thought in zip(rows, thoughts, strict=True)
        ]
        masses = self.decoder.masses(*self.passes.start([prompt.ids for prompt in prompts]), prompts)
        replies: Replies = []
        for row, mass, thought in zip(rows, masses.tolist(), thoughts, strict=True):
            reply = Reply(scores={0: scored(mass)})
            reply = chosen(row.request, reply if thought is None else thought.reply(reply))
            replies.append(dict.fromkeys(row.requests, reply))
        return replies

    @torch.inference_mode()
    def _open(self, rows: Sequence[Row]) -> Replies:
        """Questions that open a conversation, each a prompt of its own."""
        requests = [row.request for row in rows]
        prompts = [encode_prompt(self.encoder, request.messages, request.question) for request in requests]
        answer = self._answer if self.encoder.thinking is None else self._answer_after_thoughts
        replies = answer(self.passes.nothing(len(rows)), QuestionBatch(requests, prompts, [0] * len(rows)))
        return [dict.fromkeys(row.requests, reply) for row, reply in zip(rows, replies, strict=True)]

    @torch.inference_mode()
    def _observe(self, rows: Sequence[Row]) -> Replies:
        """Run each conversation once; capture as it goes by, and let every question go on from it."""
        replies: Replies = [dict.fromkeys(row.requests, Reply()) for row in rows]
        requests = [request for row in rows for request in row.requests.values()]
        asked = questions(rows)
        layers = tuple(sorted({layer for r in requests if r.capture is not None for layer in r.capture.layers}))
        if not asked and not layers:
            return replies
        prompts: list[dict[Question | None, Prompt]] = []
        for row in rows:
            put = dict.fromkeys(request.question for request in row.requests.values() if request.question is not None)
            prompts.append(
                {question: encode_prompt(self.encoder, row.messages, question) for question in put or [None]}
            )
        prefixes = [shared_prefix(list(own.values())) for own in prompts]
        firsts = [next(iter(own.values())) for own in prompts]
        recorder = None
        if layers:
            positions = [dict.fromkeys(p for r in row.requests.values() for p in before_question(r)) for row in rows]
            ranges = [token_ranges(prompt.spans, list(own)) for prompt, own in zip(firsts, positions, strict=True)]
            stops = not any(map(reads_logits, requests))
            recorder = self.recorder(layers, ranges, [len(prefix) for prefix in prefixes], stops=stops)
        if recorder is None and not self.passes.sharing.several:
            prefixes = [()] * len(rows)  # nothing goes on from them
        # What is steered before the questions does not depend on them.
        steering = requests[0].steering
        state = self.passes.nothing(len(rows))
        if any(prefixes):
            watchers = [] if recorder is None else [recorder]
            state, _ = self.passes.start(prefixes, self._steering(steering, firsts), watchers, cached=bool(asked))
        answer = self._answer if self.encoder.thinking is None else self._answer_after_thoughts
        for alike in asked:
            numbers = [row for row, _ in alike]
            own = [rows[row].requests[number] for row, number in alike]
            batch = QuestionBatch(
                own,
                [prompts[row][request.question] for row, request in zip(numbers, own, strict=True)],
                [len(prefixes[row]) for row in numbers],
            )
            begun = state.fork()
            if numbers != list(range(len(rows))):
                begun = begun.select(self.passes.tensor(numbers))
            brought = answer(replace(begun, steering=self._steering(steering, batch.prompts)), batch)
            for (row, number), reply in zip(alike, brought, strict=True):
                replies[row][number] = reply
        captured = recorder.vectors() if recorder is not None else [{}] * len(rows)
        for row, own, vectors in zip(rows, replies, captured, strict=True):
            for number, request in row.requests.items():
                if request.capture is not None:
                    index = [layers.index(layer) for layer in request.capture.layers]
                    shared = {p: vectors[p][index] for p in before_question(request) if p in vectors}
                    own[number] = replace(own[number], residuals={**shared, **own[number].residuals})
        return replies

    def _answer(self, state: State, batch: QuestionBatch) -> list[Reply]:
        """Go on from conversations that have been run."""
        request, capture = batch.request, at_question(batch.request)
        if capture is None and not reads_logits(request):
            return [Reply()] * len(batch.prompts)
        rest, recorder = batch.rest, None
        if capture is not None:
            ranges = [
                token_ranges(prompt.spans, capture.positions, start=done)
                for prompt, done in zip(batch.prompts, batch.done, strict=True)
            ]
            recorder = self.recorder(
                capture.layers, ranges, [len(row) for row in rest], stops=not reads_logits(request)
            )
        state, logits = self.passes.extend(state, rest, watchers=[] if recorder is None else [recorder])
        replies = self._read(state, logits, batch)
        if recorder is None:
            return replies
        vectors = recorder.vectors()
        if self.proof is not None and capture is not None and reads_logits(request):
            self.proof.rating([asked.messages for asked in batch.requests], capture, vectors, logits)
        return [replace(reply, residuals=own) for reply, own in zip(replies, vectors, strict=True)]

    def _read(self, state: State, logits: torch.Tensor, batch: QuestionBatch) -> list[Reply]:
        """What a batch answers that has been run to the end of the question."""
        request, rows = batch.request, len(batch.prompts)
        scores: list[dict[int, Score]] = [{} for _ in range(rows)]
        if request.scores:
            masses = self.decoder.masses(state, logits, batch.prompts).tolist()
            scores = [dict.fromkeys(request.scores, scored(mass)) for mass in masses]
        samples = [{} for _ in range(rows)]
        if request.seeds:
            samples = self.decoder.samples(state, logits, [request.seeds] * rows, batch.turns, _sampling(request))
        return [Reply(drawn, scored) for drawn, scored in zip(samples, scores, strict=True)]

    def _answer_after_thoughts(self, state: State, batch: QuestionBatch) -> list[Reply]:
        """As `_answer`, of a model that thinks before it answers; vectors are those after the first thought."""
        request, turns = batch.request, batch.turns
        seeds = tuple(dict.fromkeys((*request.scores, *request.seeds)))
        opened = replace(batch, prompts=self._thoughts_opened(batch.prompts, turns))
        # The answer goes on from a thought that was generated, so what is steered is counted from the prompt before it.
        state = replace(state, steering=self._steering(state.steering.steering, opened.prompts))
        begun = self.passes.extend(state.fork(), opened.rest)
        thoughts = self.decoder.thoughts(*begun, [seeds] * len(turns), turns, _sampling(request))
        replies = [Reply() for _ in turns]
        for seed in seeds:
            prompts = [
                encode_prompt(self.encoder, asked.messages, asked.question, own[seed].text)
                for asked, own in zip(batch.requests, thoughts, strict=True)
            ]
            once = replace(batch, prompts=prompts).wanting(
                seeds=(seed,) * (seed in request.seeds),
                scores=(seed,) * (seed in request.scores),
                capture=request.capture if seed == seeds[0] else None,
            )
            brought = self._answer(state.fork(), once)
            for row, (own, reply) in enumerate(zip(thoughts, brought, strict=True)):
                reply, before = own[seed].reply(reply), replies[row]
                replies[row] = Reply(
                    {**before.samples, **reply.samples},
                    {**before.scores, **reply.scores},
                    residuals={**before.residuals, **reply.residuals},
                )
        return replies

    @torch.inference_mode()
    def _doses(self, rows: Sequence[Row]) -> Replies:
        """One question under several steerings, the same for all rows."""
        request = rows[0].request
        # Each once: the unsteered model may be among them under several names.
        doses = list(dict.fromkeys(active(dosed.steering) for dosed in rows[0].requests.values()))
        prompts = [encode_prompt(self.encoder, row.messages, request.question) for row in rows]

        def read(state: State, logits: torch.Tensor) -> list[Reply]:
            asked, done = [row.request for row in rows], [len(prompt.ids) for prompt in prompts]
            return self._read(state, logits, QuestionBatch(asked, prompts, done))

        if self.encoder.thinking is None and self.passes.shares_blocks and not any(map(self._alone, rows)):
            by_dose = DosePasses(self.passes, request, prompts, read).run(doses)
        else:
            by_dose = [self._dose_alone(rows, request, prompts, dose) for dose in doses]
        return [
            {n: by_dose[doses.index(active(dosed.steering))][number] for n, dosed in row.requests.items()}
            for number, row in enumerate(rows)
        ]

    def _dose_alone(
        self, rows: Sequence[Row], request: Request, prompts: Sequence[Prompt], dose: Steerings
    ) -> list[Reply]:
        """A dose by passes of its own: of models that think, and families whose blocks share more than the residual
        stream."""
        if self.encoder.thinking is not None:
            prompts = self._thoughts_opened(prompts, [row.request.turns for row in rows])
        alone = [Row(row.messages, {0: replace(row.request, steering=dose)}) for row in rows]
        replies = [own[0] for own in self._observe(alone)]
        if not request.likelihood:
            return replies
        nll = [likelihood_alone(self.passes, prompt, dose) for prompt in prompts]
        return [replace(reply, nll=own) for reply, own in zip(replies, nll, strict=True)]

    def _thoughts_opened(self, prompts: Sequence[Prompt], turns: Sequence[Conversation]) -> list[Prompt]:
        ids = [self.encoder.open_thought(row) for row in turns]
        return [replace(prompt, ids=opened) for prompt, opened in zip(prompts, ids, strict=True)]

    def _steering(self, steering: Steerings, prompts: Sequence[Prompt]) -> BatchSteering:
        return BatchSteering.build(steering, [spans_of_answer(prompt) for prompt in prompts], self.device)


def _sampling(request: Request) -> Sampling:
    assert request.sampling is not None, "a request that draws anything says how"
    return request.sampling
