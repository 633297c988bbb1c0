"""A probe applied to a conversation: what it predicts where it was trained to read, and what it says at every token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prefs.data.template import Invalid
from prefs.errors import UserError
from prefs.models.local.engine import LocalEngine
from prefs.models.local.token_stream import TokenStream
from prefs.models.thoughts import without_thought
from prefs.models.types import Capture, Conversation, Message, Reply, Request, Sample, Sampling
from prefs.probes.probe import Probe
from prefs.probes.source import Source
from prefs.stages.records import conversation


@dataclass(frozen=True, eq=False)
class Applied:
    """What a probe made of a text.

    Attributes
    ----------
    conversation
        What was run; it ends with the completion.
    written
        The completion, where the model wrote it.
    thought
        What a rater that thinks wrote before its answer.
    prediction
        At the probe's own position.
    centre
        What the probe predicts for the mean vector of its training tasks: of a linear one, their mean target.
    stream
        The conversation token by token.
    scores
        [n], the probe at each of the tokens.
    """

    conversation: Conversation
    written: Sample | None
    thought: str | None
    prediction: float
    centre: float
    stream: TokenStream
    scores: torch.Tensor


def apply(
    probe: Probe,
    source: Source,
    engine: LocalEngine,
    text: str,
    completion: str | None,
    sampling: Sampling,
    seed: int = 0,
) -> Applied:
    """Apply a probe to a prompt and its completion.

    Parameters
    ----------
    probe, source
        The probe, and where it is from.
    engine
        With the model of `Source.rater` in it.
    text
        The prompt.
    completion
        None: the model writes one, under the system prompt that it rates with, if the probe's position needs one.
    sampling, seed
        How it writes.

    Raises
    ------
    UserError
        If the model has not got what the probe reads, the conversation does not fit, there is no completion, or it is
        empty and the probe reads in it.
    """
    name, site = engine.spec.name, probe.site
    if probe.d_model != engine.d_model:
        raise UserError(
            f"the probe reads vectors of {probe.d_model} numbers, and {name} has {engine.d_model}: it is of another"
            " model"
        )
    if site.layer not in range(engine.n_layers):
        raise UserError(
            f"the probe reads layer {site.layer}, and {name} has 0 to {engine.n_layers - 1}: it is of another model"
        )
    prompt = conversation(text, source.system_prompt)
    written = None
    if completion is None and site.position != "last_prompt":
        request = Request(prompt, sampling=sampling, seeds=(seed,))
        reply = _reply(engine, request, "the text and its completion are", sampling.max_new_tokens)
        written = reply.samples[seed]
        parted = without_thought(written.text or "", written.finished)
        if written.text is None or not parted.closed:
            reason = written.invalid or Invalid.thought_cut_off.value
            raise UserError(f"{name} writes no completion ({reason}); give one with completion=")
        written = replace(written, text=parted.text)
        completion = written.text
    # An empty completion opens the assistant's turn and no more.
    turns = (*prompt, Message("assistant", completion or ""))
    vector, thought = _captured(probe, source, engine, turns)
    stream = engine.residual_stream(turns, site.layer, source.question, thought)
    return Applied(
        conversation=turns,
        written=written,
        thought=thought,
        prediction=float(probe.predict(vector)),
        centre=float(probe.predict(probe.mean)),
        stream=stream,
        scores=probe.predict(stream.vectors),
    )


def _captured(
    probe: Probe, source: Source, engine: LocalEngine, turns: Conversation
) -> tuple[torch.Tensor, str | None]:
    """The vector [d_model] at the probe's site, as the rating stage captures it, and the thought before it."""
    position = probe.site.position
    seed, sampling = source.thought or (0, Sampling(0.0, 1.0, 1))
    # A model that thinks does so only to be scored.
    scores = (seed,) if source.thought else ()
    capture = Capture((probe.site.layer,), (position,))
    request = Request(turns, source.question, sampling, scores=scores, capture=capture)
    reply = _reply(engine, request, "the conversation is")
    if position in reply.residuals:
        if not bool(reply.residuals[position].isfinite().all()):
            raise UserError(
                f"the vector at {probe.site} is not finite, so the probe has nothing to read: {engine.spec.name}"
                f" overflows {engine.spec.dtype} on this text"
            )
        return reply.residuals[position][0], reply.scores[seed].thought if source.thought else None
    if source.question is None:
        raise UserError(f"an empty completion has no {position}, where the probe reads; give another one")
    raise UserError(
        f"the thought of {engine.spec.name} did not end within {sampling.max_new_tokens} tokens, and the probe"
        " reads what comes after it"
    )


def _reply(engine: LocalEngine, request: Request, what: str, answer_tokens: int = 0) -> Reply:
    """The reply to a request that fits into the model's context."""
    tokens = engine.tokens(request) + answer_tokens
    if tokens > engine.max_context:
        raise UserError(
            f"{what} {tokens:,} tokens long, and {engine.spec.name} reads {engine.max_context:,}: shorten the text"
        )
    ((_, reply),) = engine.run([request])
    return reply
