"""A probe applied to a conversation: what it predicts where it was trained to read, and what it says at every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefs.errors import UserError
from prefs.models.local.engine import TransformerLensBackend
from prefs.models.local.token_stream import TokenStream
from prefs.models.tokens import Message
from prefs.models.types import Ask, CaptureRequest, Conversation, Sample, Sampling
from prefs.probes.probe import Probe
from prefs.probes.source import Source
from prefs.stages.complete import conversation


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
    backend: TransformerLensBackend,
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
    backend
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
    _check_fits(probe, backend)
    prompt = conversation(text, source.system_prompt)
    written = None
    if completion is None and probe.site.position != "last_prompt":
        written = _completed(backend, prompt, sampling, seed)
        completion = written.text
    # An empty completion opens the assistant's turn and no more.
    turns = (*prompt, Message("assistant", completion or ""))
    length = (
        backend.conversation_tokens(turns)
        if source.question is None
        else backend.question_tokens(turns, source.question)
    )
    _check_room(backend, "the conversation is", length)
    vector, thought = _captured(probe, source, backend, turns)
    stream = backend.residual_stream(turns, probe.site.layer, source.question, thought)
    return Applied(
        conversation=turns,
        written=written,
        thought=thought,
        prediction=float(probe.predict(vector)),
        centre=float(probe.predict(probe.mean)),
        stream=stream,
        scores=probe.predict(stream.vectors),
    )


def _check_fits(probe: Probe, backend: TransformerLensBackend) -> None:
    name = backend.spec.name
    if probe.d_model != backend.d_model:
        raise UserError(
            f"the probe reads vectors of {probe.d_model} numbers, and {name} has {backend.d_model}: it is of another"
            " model"
        )
    if probe.site.layer not in range(backend.n_layers):
        raise UserError(
            f"the probe reads layer {probe.site.layer}, and {name} has 0 to {backend.n_layers - 1}: it is of another"
            " model"
        )


def _completed(backend: TransformerLensBackend, prompt: Conversation, sampling: Sampling, seed: int) -> Sample:
    _check_room(backend, "the text and its completion are", backend.prompt_tokens(prompt) + sampling.max_new_tokens)
    (sample,) = backend.complete([prompt], seed, sampling)
    if sample.text is None:
        raise UserError(f"{backend.spec.name} writes no completion ({sample.invalid}); give one with completion=")
    return sample


def _captured(
    probe: Probe, source: Source, backend: TransformerLensBackend, turns: Conversation
) -> tuple[torch.Tensor, str | None]:
    """The vector [d_model] at the probe's site, as the rating stage captures it, and the thought before it."""
    capture = CaptureRequest((probe.site.layer,), (probe.site.position,))
    seed, sampling = source.thought or (0, Sampling(0.0, 1.0, 1))
    # A model that thinks does so only to be scored.
    asks = [] if source.question is None else [Ask(source.question, scores=(seed,) if source.thought else ())]
    (observed,) = backend.observe([turns], asks, sampling, capture)
    if source.question is None:
        residual = observed.residuals.get(probe.site.position)
        if residual is None:
            raise UserError(
                f"an empty completion has no {probe.site.position}, where the probe reads; give another one"
            )
        return residual[0], None
    (answer,) = observed.answers
    if answer.residual is None:
        raise UserError(
            f"the thought of {backend.spec.name} did not end within {sampling.max_new_tokens} tokens, and the probe"
            " reads what comes after it"
        )
    return answer.residual[0], answer.scores[seed].thought if source.thought else None


def _check_room(backend: TransformerLensBackend, what: str, tokens: int) -> None:
    if tokens > backend.max_context:
        raise UserError(
            f"{what} {tokens:,} tokens long, and {backend.spec.name} reads {backend.max_context:,}: shorten the text"
        )
