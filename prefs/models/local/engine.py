"""The TransformerLens engine: sampling, option scoring and residual capture through one `TransformerBridge`.

Everything runs on left-padded token ids with explicit masks and positions. A conversation is run once, its keys and
values are kept, and each question goes on from there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prefs.config import POSITIONS
from prefs.errors import UserError
from prefs.models.encoded import Encoded
from prefs.models.loading import ModelSpec
from prefs.models.local.bridge import load_bridge
from prefs.models.local.doses import Dose, DoseResponse, active, dosed, finite_rows, likelihood_alone
from prefs.models.local.memory import Halving
from prefs.models.local.passes import Passes
from prefs.models.local.residuals import Recorder, spots
from prefs.models.local.state import State
from prefs.models.local.steering import Steered, check, places_of_answer, places_of_completion
from prefs.models.local.token_stream import TokenStream, owners, token_texts
from prefs.models.options import Asked, ask, common_prefix, option_masses, unasked
from prefs.models.sampling import draw, row_uniforms
from prefs.models.stops import stop_tokens
from prefs.models.thoughts import THOUGHT, Thought, joined
from prefs.models.tokens import ChatEncoder, Message
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
    Score,
    Steering,
    Usage,
)

log = logging.getLogger(__name__)

# Sampled answers decoded at once for each row: bounds the copies of a conversation's keys and values.
SEEDS_AT_ONCE = 4


class TransformerLensBackend(Encoded):
    """A chat model in a `TransformerBridge`. See `prefs.models.types.Backend` for the protocol."""

    def __init__(self, bridge: Any, tokenizer: Any, spec: ModelSpec):
        self.bridge = bridge
        self.spec = spec
        self.encoder = ChatEncoder(tokenizer, json.loads(spec.chat_template_kwargs), spec.thinking)
        model = bridge.original_model
        self.d_model = int(bridge.cfg.d_model)
        text_config = model.config.get_text_config()
        self.max_context = spec.max_context or int(text_config.max_position_embeddings)
        self._stops = stop_tokens(tokenizer, model.generation_config)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._stops, default=0)
        self.passes = Passes(bridge, pad, spec.name)
        self.device, self.n_layers = self.passes.device, self.passes.n_layers
        self._halving = Halving(spec.name)
        self._requests = 0

    @classmethod
    def load(cls, spec: ModelSpec, path: str) -> TransformerLensBackend:
        """Load a model, or raise `UserError`; see `prefs.models.local.bridge.load_bridge`."""
        bridge, tokenizer = load_bridge(spec, path)
        backend = cls(bridge, tokenizer, spec)
        for note in backend.encoder.notes(spec.name):
            log.info("%s", note)
        return backend

    @torch.inference_mode()
    def complete(
        self, batch: Sequence[Conversation], seed: int, sampling: Sampling, steering: Sequence[Steering] = ()
    ) -> list[Sample]:
        check(steering, self.n_layers, self.d_model)
        self._requests += len(batch)
        return self._halving.run(
            lambda rows: self._complete(rows, seed, sampling, steering), batch, tokens=self.prompt_tokens
        )

    @torch.inference_mode()
    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
        steering: Sequence[Steering] = (),
    ) -> list[Observation]:
        check(steering, self.n_layers, self.d_model)
        self._requests += len(batch)
        return self._halving.run(
            lambda rows: self._observe(rows, asks, sampling, capture, steering), batch, tokens=self.conversation_tokens
        )

    @torch.inference_mode()
    def observe_doses(
        self,
        batch: Sequence[Conversation],
        question: Ask,
        sampling: Sampling,
        doses: Sequence[Sequence[Steering]],
        *,
        likelihood: bool = True,
    ) -> list[list[Dosed]]:
        for dose in doses:
            check(dose, self.n_layers, self.d_model)
        self._requests += len(batch) * len(doses)
        changes = [active(dose) for dose in doses]
        # Each once: the unsteered model may be among them under several names.
        different = list(dict.fromkeys(changes))
        shared = self.encoder.thinking is None and self.passes.shares_blocks
        run = self._observe_doses if shared else self._observe_each_dose
        by_row = self._halving.run(
            lambda rows: run(rows, question, sampling, different, likelihood), batch, tokens=self.conversation_tokens
        )
        return [[of_row[different.index(change)] for of_row in by_row] for change in changes]

    @torch.inference_mode()
    def residual_stream(
        self, conversation: Conversation, layer: int, question: Question | None = None, thought: str | None = None
    ) -> TokenStream:
        """The residual stream after block `layer` at every token of one conversation, from one pass over it.

        Parameters
        ----------
        conversation
            Ends with the completion, as for `observe`; an empty one stands for the opened assistant's turn.
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
        if question is None:
            asked = unasked(self.encoder, conversation)
            asked = replace(asked, ids=asked.ids[: asked.spans[-2][1]])
        else:
            asked = ask(self.encoder, conversation, question, thought)
        (vectors,) = self._halving.run(
            lambda rows: [self._every_token(row.ids, layer) for row in rows], [asked], tokens=lambda row: len(row.ids)
        )
        at_rating = {} if question is None else {"rating": (len(asked.ids) - 1, len(asked.ids))}
        control = self.encoder.control_ids
        return TokenStream(
            tokens=token_texts(self.encoder.tokenizer, asked.ids),
            control=tuple(token in control for token in asked.ids),
            roles=owners(len(asked.ids), asked.spans, [*(message.role for message in conversation), "user"]),
            ranges=spots(asked, POSITIONS) | at_rating,
            vectors=vectors,
        )

    def _every_token(self, ids: tuple[int, ...], layer: int) -> torch.Tensor:
        """[tokens, d_model] after a block."""
        recorder = Recorder([layer], [{str(at): (at, at + 1) for at in range(len(ids))}], [len(ids)], stops=True)
        self.passes.start([ids], watchers=[recorder], cached=False)
        (by_token,) = recorder.vectors()
        return torch.cat([by_token[str(at)] for at in range(len(ids))])

    def _complete(
        self, batch: Sequence[Conversation], seed: int, sampling: Sampling, steering: Sequence[Steering]
    ) -> list[Sample]:
        if not batch:
            return []
        seeds = [(seed,)] * len(batch)
        thinks = self.encoder.thinking is not None
        opened = [
            self.encoder.open_thought(row) if thinks else self.encoder.encode(row, answer="").ids for row in batch
        ]
        steered = Steered.of(steering, [places_of_completion(row) for row in opened], self.device)
        state, logits = self.passes.start(opened, steered)
        if not thinks:
            return [of_row[seed] for of_row in self._decode(state, logits, seeds, batch, sampling)]
        thoughts = [of_row[seed] for of_row in self._think(state, logits, seeds, batch, sampling)]
        after = [
            self.encoder.encode(row, answer="", thought=thought.text).ids
            for row, thought in zip(batch, thoughts, strict=True)
        ]
        state, logits = self.passes.start(after, steered)
        samples = [of_row[seed] for of_row in self._decode(state, logits, seeds, batch, sampling)]
        return [thought.before(sample) for thought, sample in zip(thoughts, samples, strict=True)]

    def _observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None,
        steering: Sequence[Steering],
    ) -> list[Observation]:
        if not batch or (not asks and capture is None):
            return [Observation(())] * len(batch)
        asked = [[ask(self.encoder, row, each.question) for row in batch] for each in asks]
        asked = asked or [[unasked(self.encoder, row) for row in batch]]
        prefixes = [shared_prefix([of_question[row] for of_question in asked]) for row in range(len(batch))]
        recorder = None
        if capture is not None:
            recorder = Recorder(
                capture.layers,
                [spots(row, capture.positions) for row in asked[0]],
                [len(prefix) for prefix in prefixes],
                stops=not reads_logits(asks),
            )
        # What is steered before the questions does not depend on them.
        state, _ = self.passes.start(
            prefixes, self._steered(steering, asked[0]), [] if recorder is None else [recorder], cached=bool(asks)
        )
        at_rating = capture if capture is not None and "rating" in capture.positions else None
        answer = self._answer if self.encoder.thinking is None else self._answer_after_thoughts
        by_question = [
            answer(
                replace(state.fork(), steered=self._steered(steering, of_question)),
                each,
                of_question,
                prefixes,
                batch,
                sampling,
                at_rating,
            )
            for each, of_question in zip(asks, asked, strict=False)
        ]
        residuals = recorder.vectors() if recorder is not None else [{}] * len(batch)
        return [
            Observation(tuple(answers[row] for answers in by_question), residuals[row]) for row in range(len(batch))
        ]

    def _observe_doses(
        self,
        batch: Sequence[Conversation],
        question: Ask,
        sampling: Sampling,
        doses: Sequence[Dose],
        likelihood: bool,
    ) -> list[list[Dosed]]:
        """[rows][doses], sharing what doses do not change."""
        if not batch or not doses:
            return [[] for _ in batch]
        asked = [ask(self.encoder, row, question.question) for row in batch]

        def read(state: State, logits: torch.Tensor, rows: Sequence[int]) -> list[Answer]:
            here = [asked[row] for row in rows], [batch[row] for row in rows]
            return self._read(state, logits, question, *here, sampling)

        by_dose = DoseResponse(self.passes, question, asked, read, likelihood).under(doses)
        return [list(of_row) for of_row in zip(*by_dose, strict=True)]

    def _observe_each_dose(
        self,
        batch: Sequence[Conversation],
        question: Ask,
        sampling: Sampling,
        doses: Sequence[Dose],
        likelihood: bool,
    ) -> list[list[Dosed]]:
        """[rows][doses], each dose by passes of its own: of models that think, and families whose blocks share more
        than the residual stream."""
        found: list[list[Dosed]] = [[] for _ in batch]
        if not batch:
            return found
        asked = [ask(self.encoder, row, question.question) for row in batch]
        opened = asked
        if self.encoder.thinking is not None:
            turns = [(*row, Message("user", question.question.text)) for row in batch]
            opened = [replace(row, ids=self.encoder.open_thought(turn)) for row, turn in zip(asked, turns, strict=True)]
        for dose in doses:
            _, logits = self.passes.start([row.ids for row in opened], self._steered(dose, opened), cached=False)
            rows = finite_rows(logits)
            observed = self._observe([batch[row] for row in rows], [question], sampling, None, dose)
            answers = {row: each.answers[0] for row, each in zip(rows, observed, strict=True)}
            for row, of_row in enumerate(found):
                nll = likelihood_alone(self.passes, opened[row], dose) if likelihood else None
                of_row.append(dosed(question, answers.get(row), nll))
        return found

    def _steered(self, steering: Sequence[Steering], asked: Sequence[Asked]) -> Steered:
        return Steered.of(steering, [places_of_answer(row) for row in asked], self.device)

    @torch.inference_mode()
    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        self._requests += len(batch)
        return self._halving.run(lambda rows: self._choose(rows, options), batch, tokens=self.prompt_tokens)

    def _choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        thoughts: list[str | None] = [None] * len(batch)
        if self.encoder.thinking is not None:
            state, logits = self.passes.start([self.encoder.open_thought(row) for row in batch])
            drawn = self._think(state, logits, [(0,)] * len(batch), batch, Sampling(0.0, 1.0, 1))
            thoughts = [of_row[0].text for of_row in drawn]
        asked = [
            ask(self.encoder, row[:-1], Question(row[-1].content, tuple(options)), thought)
            for row, thought in zip(batch, thoughts, strict=True)
        ]
        masses = self._score(*self.passes.start([row.ids for row in asked]), asked)
        return [options[int(at)] for at in masses.argmax(axis=1)]

    def usage(self) -> Usage:
        return Usage(self._requests, self.passes.prompt_tokens, self.passes.drawn_tokens)

    def close(self) -> None:
        del self.bridge, self.passes

    def _answer(
        self,
        state: State,
        each: Ask,
        asked: Sequence[Asked],
        prefixes: Sequence[tuple[int, ...]],
        batch: Sequence[Conversation],
        sampling: Sampling,
        capture: CaptureRequest | None,
    ) -> list[Answer]:
        """Put one question to a batch whose conversations have been run."""
        if capture is None and not reads_logits([each]):
            return [Answer()] * len(batch)
        rest = [row.ids[len(prefix) :] for row, prefix in zip(asked, prefixes, strict=True)]
        recorder = None
        if capture is not None:
            recorder = Recorder.of_last(capture.layers, [len(row) for row in rest], stops=not reads_logits([each]))
        state, logits = self.passes.extend(state, rest, watchers=[] if recorder is None else [recorder])
        answers = self._read(state, logits, each, asked, batch, sampling)
        if recorder is None:
            return answers
        vectors = recorder.vectors()
        return [replace(answer, residual=of_row.get("rating")) for answer, of_row in zip(answers, vectors, strict=True)]

    def _read(
        self,
        state: State,
        logits: torch.Tensor,
        each: Ask,
        asked: Sequence[Asked],
        batch: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[Answer]:
        """What a batch answers that has been run to the end of a question."""
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
            )
            for row in range(len(batch))
        ]

    def _answer_after_thoughts(
        self,
        state: State,
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
            replace(row, ids=self.encoder.open_thought(conversation))
            for row, conversation in zip(asked, conversations, strict=True)
        ]
        rest = [row.ids[len(prefix) :] for row, prefix in zip(opened, prefixes, strict=True)]
        # The answer goes on from a thought that was generated, so what is steered is counted from the prompt before it.
        state = replace(state, steered=self._steered(state.steered.steering, opened))
        thoughts = self._think(*self.passes.extend(state.fork(), rest), [seeds] * len(batch), conversations, sampling)
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
        state: State,
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

    def _score(self, state: State, logits: torch.Tensor, asked: Sequence[Asked]) -> np.ndarray:
        """Probability of each whole option string, [rows, options]."""
        first = logits[:, -1].float().log_softmax(dim=-1)
        columns = []
        for option in range(len(asked[0].tails)):
            tails = [row.tails[option] for row in asked]
            log_prob = first.gather(1, self.passes.tensor([[tail[0]] for tail in tails]).to(first.device))[:, 0]
            if any(len(tail) > 1 for tail in tails):
                # The last token is only predicted, never run.
                longest = max(len(tail) for tail in tails)
                _, after = self.passes.extend(state.fork(), [tail[:-1] for tail in tails], keep=longest - 1)
                after = after.float().log_softmax(dim=-1)
                # All at once: on a GPU each look at one number would cost as much as all of them.
                padded = [[-1] * (longest - len(tail)) + list(tail[1:]) for tail in tails]
                tokens = self.passes.tensor(padded).to(after.device)
                each = after.gather(2, tokens.clamp(min=0)[..., None])[..., 0]
                log_prob += each.masked_fill(tokens < 0, 0.0).sum(dim=1)
            columns.append(log_prob.double().cpu().numpy())
        stacked = np.stack(columns, axis=1)
        return np.concatenate([option_masses(stacked[row : row + 1], asked[row].tails) for row in range(len(asked))])

    def _decode(
        self,
        state: State,
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
        state: State,
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
            parents = self.passes.tensor([at for at, _ in grown])
            state, logits = self.passes.extend(state.select(parents), [(token,) for _, token in grown], drawn=True)
            branches = list(grown.values())
        return {stream: (ids, stopped.get(stream)) for stream, ids in drawn.items()}


def reads_logits(asks: Sequence[Ask]) -> bool:
    """Whether anything is asked that only the model's output answers."""
    return any(each.seeds or each.scores for each in asks)


def shared_prefix(asked: Sequence[Asked]) -> tuple[int, ...]:
    """The tokens before the questions that are the same for all of them.

    Raises
    ------
    UserError
        If they end before the completion does, so that it would not be the same to all questions.
    """
    prefix = asked[0].ids[: asked[0].question_start]
    for other in asked[1:]:
        prefix = prefix[: common_prefix(prefix, other.ids[: other.question_start])]
    if len(prefix) < max(of_question.spans[-2][1] for of_question in asked):
        raise UserError(
            "this model's chat template writes earlier turns in another way with another question after them; rate one"
            " template a job (-m template=a,b in place of template=[a,b])"
        )
    return prefix
