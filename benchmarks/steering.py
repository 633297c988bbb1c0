"""How much faster a dose–response is than one hooked forward pass a coefficient.

The same conversations (task + completion of about ``--tokens`` tokens) with the question of the template ``anchored``
are scored under several coefficients of one vector at one layer

- by `prefs`, which runs once what the coefficients do not change;
- plainly: one whole forward pass of transformers a coefficient, with a hook on the layer, of the same batches; logits
  of the last token alone, no cache.

Both have the same weights, precision, tokens, batches and threads, in one process, and take turns; times are medians.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from exact_ratings import card, conversations, now, templates
from shapes import CHOICES, plain_model, prefs_model

from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec
from prefs.models.local.grouping import spans_of_answer
from prefs.models.prompts import Prompt, encode_prompt
from prefs.models.types import Question, Request, Steering

CLOCKS = {"wall": now, "processor": time.process_time}


class Plain:
    """transformers' own forward pass, steered by a hook on a layer."""

    def __init__(self, spec: ModelSpec, pad: int):
        self.model, self.pad = plain_model(spec), pad

    @torch.inference_mode()
    def masses(self, asked: Sequence[Prompt], steering: Steering) -> torch.Tensor:
        """[rows, options] probabilities of options of one token."""
        width = max(len(row.ids) for row in asked)
        gaps = [width - len(row.ids) for row in asked]
        device = self.model.device
        padded = [[self.pad] * gap + list(row.ids) for row, gap in zip(asked, gaps, strict=True)]
        ids = torch.tensor(padded, device=device)
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
        steered = torch.zeros(len(asked), width, 1)
        for row, (each, gap) in enumerate(zip(asked, gaps, strict=True)):
            start, end = spans_of_answer(each)[steering.at]
            steered[row, gap + start : gap + min(end, width)] = steering.coefficient
        change = (steered * steering.vector).to(device, self.model.dtype)
        hook = self.model.model.layers[steering.layer].register_forward_hook(
            lambda module, inputs, output: output + change
        )
        try:
            logits = self.model(
                ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
        finally:
            hook.remove()
        p = logits.double().softmax(dim=-1).cpu()
        masses = torch.zeros(len(asked), len(asked[0].tails), dtype=torch.float64)
        for number, row in enumerate(asked):
            for (token,), option in row.beginnings.items():
                masses[number, option] += p[number, token]
        return masses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=500, help="tokens of a conversation, at least")
    parser.add_argument("--batch", type=int, default=4, help="conversations in one")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--coefficients", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--at", nargs="+", default=["all", "completion", "question", "last"])
    parser.add_argument("--shape", choices=CHOICES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    device = resolve_device(given.device)
    spec = ModelSpec(given.shape, given.shape, dtype=given.dtype, device=str(device), prefill="Answer: ")
    backend = prefs_model(spec)
    (template,) = (each for each in templates() if each.name == "anchored_1_5")
    # Words of one token: a digit can have another behind it, which takes a pass of its own.
    question = Question(template.question, ("yes", "no"), spec.prefill)
    turns = conversations(given.conversations, given.tokens, backend)
    asked = [encode_prompt(backend.encoder, row, question) for row in turns]
    if any(len(path) != 1 for row in asked for path in row.beginnings):
        raise SystemExit("the plain side scores options of one token")
    batches = [slice(at, at + given.batch) for at in range(0, len(turns), given.batch)]
    plain = Plain(spec, backend.encoder.tokenizer.pad_token_id or 0)
    # The largest coefficients turn the model over, the smallest hardly touch it.
    vector = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(0))
    coefficients = torch.linspace(-1, 1, given.coefficients).tolist()

    def ours(steering: Sequence[Steering]) -> torch.Tensor:
        """[doses, rows, options]."""
        found = []
        for rows in batches:
            doses = [(change,) for change in steering]
            requests = [Request(row, question, scores=(0,), steering=dose) for dose in doses for row in turns[rows]]
            replies = dict(backend.run(requests))
            masses = torch.tensor([replies[number].scores[0].mass for number in range(len(requests))])
            found.append(masses.reshape(len(doses), -1, masses.shape[-1]))
        return torch.cat(found, dim=1)

    def theirs(steering: Sequence[Steering]) -> torch.Tensor:
        return torch.stack([torch.cat([plain.masses(asked[rows], each) for rows in batches]) for each in steering])

    lengths = [len(row.ids) for row in asked]
    print(
        f"{len(coefficients)} coefficients at layer {given.layer} of {backend.n_layers}, {len(turns)} conversations of"
        f" {min(lengths)} to {max(lengths)} tokens with their question in batches of {given.batch}, {given.shape} in"
        f" {given.dtype} on {card(device)}, {given.clock} time; median of {given.repeats}\n"
    )
    print("| steered | plain (s) | prefs (s) | ratio | largest difference of a probability |\n|---|---|---|---|---|")
    ours([Steering(given.layer, vector, 1.0)])  # warm up
    for at in given.at:
        steering = [Steering(given.layer, vector, each, at) for each in coefficients]
        seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
        brought: dict[Callable, torch.Tensor] = {}
        for _ in range(given.repeats):
            for side, spent in seconds.items():
                spent.append(timed(CLOCKS[given.clock], partial(record, brought, side, steering)))
        mine, others = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
        apart = float((brought[ours] - brought[theirs]).abs().max())
        print(f"| {at} | {others:.2f} | {mine:.2f} | {others / mine:.2f} | {apart:.0e} |", flush=True)


def record(brought: dict[Callable, torch.Tensor], side: Callable, steering: Sequence[Steering]) -> None:
    """Keep what a side found."""
    brought[side] = side(steering)


def timed(clock: Callable[[], float], run: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = clock()
    run()
    return clock() - begun


if __name__ == "__main__":
    main()
