"""How fast residual-stream vectors are captured: beside the bare forward pass, and beside TransformerLens.

Ragged conversations of ``--shortest`` to ``--longest`` tokens. First, tokens a second of

- transformers' forward pass alone, no logits, on the batches that `prefs` cuts by its token budget; and
- `prefs` on the same batches: encoding, forward pass, and the vectors of all layers at three positions on the host.

Then, for one layer in the middle and for the last, `prefs` against TransformerLens' ``run_with_cache`` on one
conversation at a time, with and without ``names_filter`` and ``stop_at_layer``; ``--tl-bfloat16 N`` adds N of the
conversations in bfloat16. Times are medians of ``--repeats``, and what is compared takes turns. Prints Markdown.

    python benchmarks/capture.py                                           # the embedded model, on any machine
    python benchmarks/capture.py --shape llama_1b --device cuda            # random weights in the shape of Llama-3.2-1B
    python benchmarks/capture.py --shape gemma2_27b --device cuda          # random weights in the shape of Gemma-2-27B
    python benchmarks/capture.py --shape gemma2_tiny                       # the same in small, to try the benchmark
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from shapes import CHOICES, lens_model, plain_model, prefs_model
from transformers import AutoTokenizer

from prefs.config import DatasetConfig
from prefs.data.task import load_tasks
from prefs.models.device import resolve_device, resolve_dtype
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import BATCH_TOKENS, ModelSpec
from prefs.models.prompts import encode_prompt
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Capture, Conversation, Message, Reply, Request
from prefs.store.missing import batches

POSITIONS = ("last_prompt", "last_completion", "mean_completion")
# Dense bfloat16 matrix arithmetic by the makers' data sheets, 10^12 operations a second.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}


def conversations(count: int, shortest: int, longest: int, tokenizer) -> list[Conversation]:
    """Text of the shipped data set, cut to lengths spread evenly: a third of each is the prompt."""
    text = "\n\n".join(task.prompt for task in load_tasks(DatasetConfig(name="mini")))
    ids = tokenizer(text)["input_ids"]
    template = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=True)["input_ids"]) + 7
    found = []
    for at in range(count):
        length = shortest + (longest - shortest) * at // max(count - 1, 1) - template
        start = at * 997 % (len(ids) - longest)
        cut = start + max(length // 3, 1)
        prompt, completion = tokenizer.decode(ids[start:cut]), tokenizer.decode(ids[cut : start + max(length, 2)])
        found.append((Message("user", prompt), Message("assistant", completion)))
    return found


class Stopwatch:
    """Medians of runs that take turns, so that a noisy neighbour disturbs all of them alike."""

    def __init__(self, repeats: int, clock: Callable[[], float], device: torch.device):
        self._repeats, self._clock, self._device = repeats, clock, device
        self.card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"

    def seconds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self._repeats):
            for name, run in runs.items():
                begun = self._now()
                run()
                times[name].append(self._now() - begun)
        return {name: statistics.median(of_run) for name, of_run in times.items()}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return self._clock()


def cut_batches(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Rows by number, in the batches that `prefs` makes of them."""
    return [
        [int(key) for key in batch] for batch in batches({f"{at:06}": len(row) for at, row in enumerate(rows)}, budget)
    ]


def bare(model, rows: Sequence[tuple[int, ...]], cut: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Transformers' forward pass over batches of rows, padded as tokenizers pad, to the last hidden state."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run() -> None:
        for batch in cut:
            width = max(len(rows[at]) for at in batch)
            ids = torch.tensor([[*rows[at], *[0] * (width - len(rows[at]))] for at in batch], device=device)
            mask = torch.tensor([[1] * len(rows[at]) + [0] * (width - len(rows[at])) for at in batch], device=device)
            model.model(ids, attention_mask=mask, use_cache=False)

    return run


def throughput(given: argparse.Namespace, spec: ModelSpec, turns: Sequence[Conversation], watch: Stopwatch) -> None:
    """Capture of all layers against the bare forward pass of the same batches."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    encoder = ChatEncoder(tokenizer)
    prompts = [encode_prompt(encoder, turn, None) for turn in turns]
    rows = [prompt.ids[: prompt.spans.question[0]] for prompt in prompts]
    cut = cut_batches(rows, spec.batch_tokens)
    model = plain_model(spec, "eager")
    # The largest does not fit twice, so it is measured bare before it is wrapped.
    run_bare = bare(model if given.shape == "gemma2_27b" else plain_model(spec), rows, cut)
    run_bare()  # warms up
    runs: dict[str, Callable[[], object]] = {"transformers, bare forward pass": run_bare}
    seconds: dict[str, float] = {}
    if given.shape == "gemma2_27b":
        seconds, runs = watch.seconds(runs), {}
    engine = prefs_model(spec, model)
    wanted = Capture(tuple(range(engine.n_layers)), POSITIONS)

    def capture() -> None:
        for batch in cut:
            list(engine.run([Request(turns[row], capture=wanted) for row in batch]))

    capture()
    seconds |= watch.seconds({**runs, "prefs, all layers at three positions": capture})
    total = sum(map(len, rows))
    padded = sum(len(batch) * max(len(rows[at]) for at in batch) for batch in cut)
    # Attention scores are left out, a few percent at these lengths.
    operations = 2 * padded * sum(weight.numel() for block in engine.bridge.blocks for weight in block.parameters())
    peak = given.peak or next((value for card, value in PEAKS.items() if card in watch.card), None)
    print(
        f"{given.shape} in {spec.dtype} on {watch.card}, {torch.get_num_threads()} threads, {given.clock} time;"
        f" {len(turns)} conversations of {min(map(len, rows))} to {max(map(len, rows))} tokens in {len(cut)} batches"
        f" of {spec.batch_tokens:,} tokens at most, {padded / total - 1:.0%} padding; median of {given.repeats}\n"
    )
    print("| method | tokens a second | share of bare | share of the card's peak |\n|---|---|---|---|")
    for name, value in seconds.items():
        share = f"{operations / value / (peak * 1e12):.0%}" if peak else "–"
        print(f"| {name} | {total / value:,.0f} | {next(iter(seconds.values())) / value:.2f} | {share} |")


def against_transformer_lens(spec: ModelSpec, turns: Sequence[Conversation], watch: Stopwatch) -> None:
    """One layer, in the middle or the last, against run_with_cache one conversation at a time."""
    bridge, engine = lens_model(spec), prefs_model(spec)
    asked = [engine.encoder.encode(turn) for turn in turns]
    cut = cut_batches([each.ids for each in asked], spec.batch_tokens)
    total = sum(len(each.ids) for each in asked)
    print(f"\nAgainst TransformerLens in {spec.dtype}: {len(turns)} conversations, {total:,} tokens\n")
    print("| layer | method | s | ratio | largest difference, of the largest entry |\n|---|---|---|---|---|")
    for layer in (engine.n_layers // 2 - 1, engine.n_layers - 1):
        name = f"blocks.{layer}.hook_out"
        kept: dict[str, torch.Tensor] = {}

        def prefs(layer: int = layer, kept: dict[str, torch.Tensor] = kept) -> None:
            replies: dict[int, Reply] = {}
            for batch in cut:
                wanted = Capture((layer,), POSITIONS)
                answered = engine.run([Request(turns[row], capture=wanted) for row in batch])
                replies |= {batch[number]: reply for number, reply in answered}
            rows = [[replies[row].residuals[position][0] for position in POSITIONS] for row in range(len(turns))]
            kept["prefs"] = torch.stack([torch.stack(row) for row in rows])

        def lens(method: str, options: dict, name: str = name, kept: dict[str, torch.Tensor] = kept) -> None:
            rows = []
            for each in asked:
                _, cache = bridge.run_with_cache(torch.tensor([each.ids], device=engine.device), **options)
                start, end = each.spans[-1]
                vectors = cache[name][0]
                picked = [vectors[start - 1], vectors[end - 1], vectors[start:end].float().mean(dim=0)]
                rows.append(torch.stack([one.detach().float().cpu() for one in picked]))
            kept[method] = torch.stack(rows)

        filtered = {"names_filter": name}
        methods: dict[str, dict] = {
            "run_with_cache": {},
            "run_with_cache, names_filter": filtered,
            "run_with_cache, names_filter, stop_at_layer": {**filtered, "stop_at_layer": layer + 1},
        }
        runs = {"prefs": prefs}
        runs |= {method: (lambda m=method, o=options: lens(m, o)) for method, options in methods.items()}
        seconds = watch.seconds(runs)
        for method, value in seconds.items():
            off = (kept[method] - kept["prefs"]).abs().max() / kept["prefs"].abs().max()
            print(f"| {layer} | {method} | {value:.2f} | {value / seconds['prefs']:.2f} | {float(off):.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CHOICES, default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of prefs and the bare pass")
    parser.add_argument("--conversations", type=int, default=96)
    parser.add_argument("--shortest", type=int, default=50)
    parser.add_argument("--longest", type=int, default=500)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS["transformer_lens"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=float, help="10^12 operations a second of the card, where it is not known")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: for busy machines")
    parser.add_argument("--tl-bfloat16", type=int, default=0, help="conversations to compare in bfloat16")
    parser.add_argument("--no-tl", action="store_true", help="leave the comparison with TransformerLens out")
    given = parser.parse_args()
    device = resolve_device(given.device)
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    watch = Stopwatch(given.repeats, clock, device)
    dtype = resolve_dtype(given.dtype, device)
    spec = ModelSpec(
        name=given.shape,
        path=str(smollm2_folder()),
        dtype=dtype,
        device=str(device),
        batch_tokens=given.batch_tokens,
    )
    turns = conversations(
        given.conversations, given.shortest, given.longest, AutoTokenizer.from_pretrained(smollm2_folder())
    )
    throughput(given, spec, turns, watch)
    if not given.no_tl and given.shape != "gemma2_27b":
        against_transformer_lens(replace(spec, dtype="float32"), turns, watch)
    if given.tl_bfloat16:
        few = turns[:: max(len(turns) // given.tl_bfloat16, 1)][: given.tl_bfloat16]
        against_transformer_lens(replace(spec, dtype="bfloat16"), few, watch)


if __name__ == "__main__":
    main()
