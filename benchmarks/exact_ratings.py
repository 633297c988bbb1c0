"""How much faster an exact rating is than the sampled ratings that it replaces.

The same conversations (task + completion of at least ``--tokens`` tokens) are rated with the same templates

- exactly, by `prefs`: one pass over each conversation, from whose keys and values all templates go on;
- (a) one conversation at a time, one ``generate`` a seed, with TransformerLens as the report's author did, and with
  transformers;
- (b) by transformers' batched ``generate`` with as many return sequences as there are seeds.

All use the same weights, precision, tokens, device and threads, in one process. `prefs` rates all conversations, (b) a
few of them and (a) one; times are medians and for one conversation. The means that (b) samples are compared
with the exact ones: their difference must be sampling error. Prints Markdown.

    python benchmarks/exact_ratings.py                                                   # the embedded model
    python benchmarks/exact_ratings.py --shape llama_8b --device cuda --conversations 64 # random weights
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from shapes import CHOICES, lens_model, plain_model, prefs_model

from prefs.config import CONF, DatasetConfig, register
from prefs.data.task import load_tasks
from prefs.data.template import Template
from prefs.models.device import resolve_device, resolve_dtype
from prefs.models.loading import BATCH_TOKENS, ModelSpec
from prefs.models.options import NO_OPTION
from prefs.models.prompts import Prompt, encode_prompt
from prefs.models.types import Conversation, Message, Question, Reply, Request
from prefs.statistics.exact import exact_summary
from prefs.store.missing import batches

TEMPLATES = ("binary", "likert", "agreement", "stated", "anchored", "anchored_precise")


def templates() -> list[Template]:
    """The six shipped templates."""
    from hydra import compose, initialize_config_dir

    from prefs.config import typed

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = typed(compose("config", overrides=[f"template=[{','.join(TEMPLATES)}]"]))
    return list(config.template.values())


def conversations(count: int, tokens: int, backend) -> list[Conversation]:
    """Tasks with completions long enough: text of the data set itself, so that it is language and takes no model."""
    tasks = load_tasks(DatasetConfig(name="mini"))
    found = []
    for start in range(count):
        parts = [tasks[(start * 7 + at) % len(tasks)].prompt for at in range(1, 60)]
        text = ""
        for part in parts:
            text += part + "\n\n"
            turns = (Message("user", tasks[start].prompt), Message("assistant", text.strip()))
            if backend.conversation_tokens(turns) >= tokens:
                break
        found.append(turns)
    return found


def median_time(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of a call, until the device has done all of it."""
    times = []
    for _ in range(repeats):
        begun = now()
        run()
        times.append(now() - begun)
    return statistics.median(times)


def now() -> float:
    """Wall-clock seconds, once all that a GPU has been given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def card(device: torch.device) -> str:
    """What a device is called in print."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the processor, {torch.get_num_threads()} threads"


def generate(model, ids: Sequence[int], pad: int, sequences: int, new_tokens: int) -> torch.Tensor:
    """transformers' own sampling at temperature 1: the new tokens of each sequence."""
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=pad, max_new_tokens=new_tokens, num_return_sequences=sequences,
        )  # fmt: skip
    return out[:, len(ids) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16, help="rated exactly")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of a conversation, at least")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="(b) rates so many conversations, (a) one")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--shape", choices=CHOICES, default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS["transformer_lens"], help="of prefs")
    given = parser.parse_args()
    device = resolve_device(given.device)
    spec = ModelSpec(
        name=given.shape,
        path=given.shape,
        dtype=resolve_dtype(given.dtype, device),
        device=str(device),
        batch_tokens=given.batch_tokens,
        prefill="Answer: ",
    )
    backend = prefs_model(spec)
    asked = templates()
    questions = [Question(each.question, each.says, spec.prefill) for each in asked]
    turns = conversations(given.conversations, given.tokens, backend)
    lengths = [backend.tokens(Request(row)) for row in turns]
    # As the rating stage cuts them, by the longest question.
    longest = [max(backend.tokens(Request(row, question)) for question in questions) for row in turns]
    cut = [
        [int(key) for key in batch]
        for batch in batches({f"{at:06}": tokens for at, tokens in enumerate(longest)}, spec.batch_tokens)
    ]

    def exact() -> list[list[Reply]]:
        """[conversations][questions]."""
        replies: dict[tuple[int, int], Reply] = {}
        for batch in cut:
            places = [(row, number) for row in batch for number in range(len(questions))]
            requests = [Request(turns[row], questions[number], scores=(0,)) for row, number in places]
            replies |= {places[number]: reply for number, reply in backend.run(requests)}
        return [[replies[row, number] for number in range(len(questions))] for row in range(len(turns))]

    model, bridge = plain_model(spec), lens_model(spec)
    pad = backend.encoder.tokenizer.pad_token_id or 0
    prompts = [[encode_prompt(backend.encoder, row, question) for row in turns] for question in questions]
    sampled: dict[int, dict[int, list[list[int]]]] = {row: {} for row in range(given.repeats)}

    def one_by_one(run: Callable[[Sequence[int]], object]) -> float:
        """Seconds a conversation: of each template, the median of a few of its seeds, times the seeds."""
        each = (median_time(partial(run, of_question[0].ids), given.repeats) for of_question in prompts)
        return given.seeds * sum(each)

    def batched(row: int) -> float:
        begun = now()
        for at, of_question in enumerate(prompts):
            out = generate(model, of_question[row].ids, pad, given.seeds, given.max_new_tokens)
            sampled[row][at] = out.tolist()
        return now() - begun

    exact()  # warm up
    generate(model, prompts[0][0].ids, pad, given.seeds, 2)
    bridge.generate(torch.tensor([prompts[0][0].ids], device=device), max_new_tokens=2, verbose=False)
    rows = range(given.repeats)
    seconds = {
        "prefs, exact": median_time(exact, given.repeats) / len(turns),
        "(a) TransformerLens, one conversation and one generate a seed": one_by_one(
            lambda ids: bridge.generate(
                torch.tensor([ids], device=device),
                max_new_tokens=given.max_new_tokens,
                verbose=False,
                return_type="tokens",
            )
        ),
        "(a) transformers, one conversation and one generate a seed": one_by_one(
            lambda ids: generate(model, ids, pad, 1, given.max_new_tokens)
        ),
        "(b) transformers, batched generate, all seeds at once": statistics.median(batched(row) for row in rows),
    }
    base = seconds["prefs, exact"]
    print(
        f"{len(asked)} templates, {given.seeds} seeds, conversations of {min(lengths)} to {max(lengths)} tokens,"
        f" {given.shape} in {spec.dtype} on {card(device)}; {len(turns)} of them exactly, in {len(cut)} batches;"
        f" median of {given.repeats}\n"
    )
    print("| method | s a conversation | ratio |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / base:.0f} |")
    begun = lengths[0] + sum(len(of_question[0].ids) - lengths[0] for of_question in prompts)
    each = given.seeds * sum(len(of_question[0].ids) for of_question in prompts)
    print(f"\nTokens run before any is drawn: {begun:,} exactly; (a), (b) {each:,}, {each / begun:.0f} times as many")
    if given.shape == "smollm2":  # random weights draw no option
        compare_means(asked, prompts, exact()[: given.repeats], sampled)


def compare_means(
    asked: Sequence[Template], prompts: Sequence[Sequence[Prompt]], observed: Sequence[Sequence[Reply]], sampled: dict
) -> None:
    """Sampled means of (b) against exact ones, in standard errors: their mean square should be about 1.

    A sample counts for the option whose tokens it begins with, which is what an exact rating is the probability of.
    (`Template.read` reads whole answers and drops ambiguous ones, so the ratings it keeps are a selection.)
    """
    print("\n| template | exact mean | sampled mean | valid | difference / standard error |\n|---|---|---|---|---|")
    for at, template in enumerate(asked):
        exact = exact_summary([replies[at].scores[0].mass for replies in observed], template.values)
        values = [
            [value for ids in sampled[row][at] if (value := begins(ids, prompts[at][row], template)) is not None]
            for row in range(len(observed))
        ]
        there = [row for row, valid in enumerate(values) if valid]
        if not there:
            print(f"| {template.name} | – | – | 0 | – |")
            continue
        means = np.array([np.mean(values[row]) for row in there])
        counts = np.array([len(values[row]) for row in there])
        error = np.sqrt((exact.variance[there] / counts).sum()) / len(there)
        difference = (means - exact.mean[there]).mean() / error
        drawn = sum(len(sampled[row][at]) for row in range(len(observed)))
        print(
            f"| {template.name} | {exact.mean[there].mean():.3f} | {means.mean():.3f} | {counts.sum()}/{drawn}"
            f" | {difference:+.1f} |"
        )


def begins(ids: Sequence[int], prompt: Prompt, template: Template) -> float | None:
    """The value of the option that an answer begins with."""
    longest = max((path for path in prompt.beginnings if tuple(ids[: len(path)]) == path), key=len, default=())
    option = prompt.beginnings.get(longest, NO_OPTION)
    return None if option == NO_OPTION else template.values[option]


if __name__ == "__main__":
    main()
