"""The schema of every config group: one data class each, with the limits of its fields.

These data classes are the one exception to "frozen": Hydra and `prefs.config.typed` fill them in, and nothing changes
them afterwards.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from prefs.config.choice import ChoiceConfig
from prefs.config.limits import (
    DEVICE,
    SEED,
    SEEDS,
    SHARE,
    TEMPERATURE,
    Limit,
    above,
    at_least,
    between,
    distinct,
    items_of,
    layers_or_all,
    limited,
    not_empty,
    one_of,
)
from prefs.data.template import Template
from prefs.models import positions

POSITIONS = tuple(positions.POSITIONS)
# Those that lie in the conversation, before any question.
COMPLETION_POSITIONS = tuple(name for name, position in positions.POSITIONS.items() if not position.of_question)

# What a user may say to Lightning's Trainer. Its other arguments leave out tasks or passes, are a probe's own (epochs,
# precision, validation), or write files that nothing reads.
TRAINER = (
    *("accelerator", "devices", "strategy", "deterministic", "logger", "callbacks"),
    *("gradient_clip_val", "gradient_clip_algorithm"),
)


class DType(Enum):
    """Precision of stored activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class ModelDType(Enum):
    """Precision of a model's weights and arithmetic; ``auto``: bfloat16 where the device has it, else float32."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class RowReader(Enum):
    """Where a row's prompt is: in columns of text, joined by blank lines, or in a conversation's first user turn."""

    columns = "columns"
    conversation = "conversation"


@dataclass
class ThinkingConfig:
    """How a model that thinks before it answers marks its thought, and how long it may think."""

    enabled: bool = False
    open: str = "<think>"
    close: str = "</think>"
    """Ends the thought; the answer begins after ``gap``."""
    gap: str = "\n\n"
    max_tokens: int = limited(4096, at_least(1))
    """A thought that has not ended by then gives no answer (``thought_cut_off``)."""
    force_close: bool = False
    """It is closed for the model instead, and answered: the thinking budget of s1 (Muennighoff et al. 2025) and of
    Qwen3's authors."""


@dataclass
class VllmConfig:
    """What only vLLM needs."""

    tensor_parallel_size: int = limited(1, at_least(1))
    data_parallel_size: int = limited(1, at_least(1))
    quantization: str | None = None
    gpu_memory_utilization: float = limited(0.9, SHARE)
    enforce_eager: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    """Any further argument of its ``LLM``, as vLLM spells it."""


@dataclass
class ApiConfig:
    """An OpenAI-compatible server."""

    base_url: str = "https://api.openai.com/v1"
    key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that the key is read from; null: it needs none."""
    concurrency: int = limited(16, at_least(1))
    timeout_s: float = limited(120.0, above(0, "seconds, more than 0"))
    max_retries: int = limited(8, at_least(0))
    top_logprobs: int = limited(20, between(0, 20))
    """How many log-probabilities it gives at most; 0: none, so no exact ratings."""
    prefill: bool = False
    """The server can go on with an answer begun for it (vLLM's ``continue_final_message``), which also lets options of
    several tokens be scored."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Goes into every request as it is."""
    price_prompt: float | None = None
    """US dollars a million tokens, as the next."""
    price_completion: float | None = None


@dataclass
class ModelConfig:
    """A language model."""

    name: str = MISSING
    path: str = MISSING
    """``embedded:NAME``, a local folder, a model-hub name, or a server's model name."""
    revision: str | None = None
    """A commit, tag or branch of the hub's; of a served model, a word of yours for what stands under its name now."""
    backend: str = limited("transformer_lens", one_of("transformer_lens", "vllm", "openai"))
    dtype: ModelDType = ModelDType.auto
    device: str = limited("auto", DEVICE)
    device_map: str | None = limited(None, one_of("auto", "balanced", "balanced_low_0", "sequential"))
    """Spreads the model over several GPUs."""
    attn_implementation: str = limited(
        "auto", one_of("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3")
    )
    """``auto``: ``sdpa`` where it computes what the model means."""
    max_context: int | None = limited(None, at_least(1))
    completion_tokens: int = limited(512, at_least(1))
    """How long a completion may become that it writes (``completer.max_new_tokens``)."""
    prefill: str = ""
    """Opens its answers to a template that has no opening of its own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    batch_tokens: int | None = limited(None, at_least(1))
    """Tokens run, and written to the store, at a time; null: the engine's own."""
    gpus: int | None = limited(None, at_least(0))
    """How many a job asks a cluster for; null: those of vLLM's parallel sizes, one of any other model not served."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    api: ApiConfig = field(default_factory=ApiConfig)


@dataclass
class CompleterConfig:
    """Who answers the tasks."""

    name: str = MISSING
    model: ModelConfig | None = None
    """null: the rater itself."""
    condition: str | None = None
    """One of the concept's, which stands for its system prompt."""
    system_prompt: str | None = None
    seed: int = limited(0, SEED)
    temperature: float = limited(1.0, TEMPERATURE)
    top_p: float = limited(1.0, SHARE)
    max_new_tokens: int = limited(512, at_least(1))
    """As its model's ``completion_tokens`` in the YAML of each completer."""


@dataclass
class SourceConfig:
    """A data set that `datasets` reads."""

    path: str = limited(
        MISSING,
        Limit(
            lambda path: bool(
                re.fullmatch(r"https?://.+|\w[\w.-]*(/\w[\w.-]*)?", path) or Path(path).expanduser().exists()
            ),
            "a folder or file that exists, a URL, or a hub name (owner/name)",
        ),
    )
    revision: str | None = None
    configs: list[str] = field(default_factory=list)
    """The hub's configurations to read; empty: its only one."""
    split: str = "train"
    origin: str = limited(MISSING, not_empty("some name"))
    reader: RowReader = RowReader.columns
    prompt: list[str] = limited(["prompt"], not_empty("at least one column"))
    """Columns, as the next two."""
    id: str | None = None
    topic: str | None = None
    only: dict[str, Any] = field(default_factory=dict)
    """The values that other columns must have."""
    max_chars: int | None = limited(None, at_least(1))
    """A longer prompt is left out."""


@dataclass
class DatasetConfig:
    """Where the tasks come from: those that ship, a file of one's own, or data sets of the hub."""

    name: str = MISSING
    kind: str = limited("mini", one_of("mini", "file", "hub"))
    path: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    origins: list[str] | None = None
    harmful: list[str] = field(default_factory=lambda: ["BAILBENCH"])
    """Origins of tasks that models are expected to refuse: a caution says where no refusal is found among them."""
    limit: int | None = limited(None, at_least(1))
    """Keeps so many, drawn evenly over origins by ``seed``."""
    seed: int = limited(0, SEED)


@dataclass
class RatingConfig:
    """How the rater is asked: sampled once per seed, and/or exactly from its log-probabilities."""

    seeds: list[int] = limited([0, 1, 2, 3], *SEEDS)
    exact: bool = True
    thoughts: int = limited(1, at_least(1))
    """A model that thinks has one exact distribution after each thought: so many are drawn and mixed."""
    temperature: float = limited(1.0, TEMPERATURE)
    top_p: float = limited(1.0, SHARE)
    max_new_tokens: int = limited(8, at_least(1))
    condition: str | None = None
    """One of the concept's, which stands for its system prompt."""
    system_prompt: str | None = None


@dataclass
class ConceptConfig:
    """A concept: named system prompts under which it is on, off or the other way round. Its vectors are the mean
    difference of activations between two of these conditions."""

    name: str = MISSING
    conditions: dict[str, str | None] = field(default_factory=dict)
    """null: no system prompt."""
    contrast: list[str] = limited(
        ["positive", "negative"],
        Limit(lambda pair: len(pair) == len(set(pair)) == 2, "two conditions, as in [positive,negative]"),
    )
    wordings: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Other words for these two conditions, by a name for each wording."""
    origins: list[str] | None = limited(None, not_empty("at least one origin, or null for all"))
    """Of the tasks that the vectors are taken from."""
    folds: int = limited(5, at_least(2))
    splits: int = limited(100, at_least(1))
    seed: int = limited(0, SEED)


@dataclass
class SteeringControlsConfig:
    """What a steered rating is compared with: vectors of the same norm that mean something else, or nothing."""

    random: int = limited(3, between(0, 1000))
    """Random directions."""
    shuffled: int = limited(1, between(0, 1000))
    """Vectors of shuffled labels."""
    probes: bool = True
    """Steers with the directions of the job's probes."""
    ablation: bool = True
    """Projects the vector's direction out."""


@dataclass
class CoherenceConfig:
    """Which doses still leave a model that answers."""

    valid_mass: float = limited(0.5, at_least(0))
    """At least so much of the unsteered model's valid mass."""
    perplexity: float = limited(2.0, at_least(0))
    """At most so many times its perplexity, on the unsteered completions."""
    invalid: float = limited(0.2, at_least(0))
    """At most so many more invalid answers, as a share."""


@dataclass
class SteeringConfig:
    """Rating with vectors added to the residual stream."""

    name: str = MISSING
    vector: str = "none"
    """``concept`` (the job's), or a folder of saved concept vectors."""
    position: str = limited("mean_completion", one_of(*COMPLETION_POSITIONS))
    layers: list[int] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    unit: str = limited("vector", one_of("vector", "norm"))
    """Of the coefficients: multiples of the difference of means, or of the layer's mean activation norm along it."""
    at: str = limited("all", one_of("all", "last", "completion", "question"))
    seeds: list[int] = limited([], *SEEDS)
    seed: int = limited(0, SEED)
    controls: SteeringControlsConfig = field(default_factory=SteeringControlsConfig)
    coherence: CoherenceConfig = field(default_factory=CoherenceConfig)


@dataclass
class JudgeConfig:
    """What decides that a completion is a refusal: how it opens, or a model that is asked."""

    name: str = MISSING
    kind: str = "phrases"
    model: ModelConfig | None = None
    """null: the completer, where it has 7 billion parameters or more; else how it opens decides."""
    question: str = ""
    """To the model; it holds ``{request}`` and ``{reply}``, and is answered with one of the next two words."""
    refusal: str = ""
    compliance: str = ""
    phrases: list[str] = field(default_factory=list)
    """Openings that are refusals beside those that `prefs.stages.phrases` knows, such as a model's own formula."""
    window: int = limited(500, at_least(0))
    """Characters of the completion that count as its opening; 0: all."""
    _target_: str = ""
    """The function that judges; its name holds ``kind``."""


@dataclass
class CaptureConfig:
    """Which residual-stream vectors are kept."""

    name: str = MISSING
    layers: Any = limited("all", layers_or_all("all, or a list of layer numbers such as [0,15,-1]"))
    """Negative: counted from the last."""
    positions: list[str] = limited([], items_of(*POSITIONS), distinct("each position once"))
    dtype: DType = DType.bfloat16


@dataclass
class ProbeControlsConfig:
    """What probes are compared with."""

    permutations: int = limited(100, between(0, 100_000))
    """Shuffled targets, trained like the true one; 0: no null."""
    random_directions: int = limited(100, between(0, 100_000))
    texts: bool = True
    held_out_origins: bool = True
    embedding_model: str | None = "sentence-transformers/all-MiniLM-L6-v2"
    """A folder or hub name that sentence-transformers loads; used where that is installed."""


@dataclass
class ProbeConfig:
    """Probes from residual vectors to ratings."""

    name: str = MISSING
    kind: str = "ridge"
    positions: list[str] | None = limited(
        None, not_empty("at least one position, or null for all captured"), items_of(*POSITIONS)
    )
    layers: Any = limited("all", layers_or_all("all, or a list of captured layers such as [0,15,-1]"))
    targets: list[str] = limited([], distinct("each target once"))
    threshold: Any = limited(
        "midpoint",
        Limit(
            lambda value: value in ("midpoint", "median") or (isinstance(value, int | float) and math.isfinite(value)),
            "midpoint, median or a number",
        ),
    )
    """What a ``good`` rating lies above."""
    penalties: list[float] | None = None
    """Tried one by one, and chosen by the training folds: of ``ridge`` the weight of the squared norm on standardised
    features, of the kinds that descend decoupled weight decay. null: of a kind without."""
    folds: int = limited(5, at_least(2))
    seed: int = limited(0, SEED)
    optimizer: str = limited("adamw", one_of("adamw", "sgd"))
    learning_rate: float = limited(1e-3, above(0))
    momentum: float = limited(0.9, Limit(lambda value: 0 <= value < 1, "0 or more, less than 1"))
    batch_size: int = limited(64, at_least(1))
    max_epochs: int = limited(200, at_least(1))
    patience: int = limited(10, at_least(1))
    min_delta: float = limited(0.0, at_least(0))
    hidden: int = limited(32, at_least(1))
    controls: ProbeControlsConfig = field(default_factory=ProbeControlsConfig)
    trainer: dict[str, Any] = limited({}, items_of(*TRAINER))
    """Arguments of Lightning's Trainer, as Lightning spells them."""
    binary: bool = False
    """This kind predicts a yes and no."""
    _target_: str = ""
    """The class that is trained; its name holds ``kind``."""


@dataclass
class StoreConfig:
    """Where records live."""

    dir: str | None = None
    """null: the user's data directory, one for all runs."""
    lease_s: float = limited(60.0, at_least(0, "seconds, 0 or more"))
    """Jobs that run at the same time lease what they compute. One that gives no sign of life for so long is taken for
    dead, and another goes on in its place (0: nothing is leased, and two jobs may do the same work)."""


@dataclass
class WandbConfig:
    """Weights & Biases. There is never a prompt."""

    mode: str = limited("auto", one_of("auto", "online", "offline", "disabled"))
    """``auto``: online with a key and offline without."""
    project: str = "prefs"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class StatsConfig:
    """Bootstrap over tasks."""

    bootstrap: int = limited(1000, between(0, 1_000_000))
    """Resamples; 0: no intervals."""
    seed: int = 0
    target_r: float = limited(0.9, Limit(lambda value: 0 < value < 1, "between 0 and 1, both excluded"))
    """How many seeds does it take for this cross-seed r?"""


@dataclass
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = MISSING
    completer: CompleterConfig = MISSING
    template: dict[str, Template] = limited(MISSING, Limit(bool, "at least one template"))
    dataset: DatasetConfig = MISSING
    judge: JudgeConfig = MISSING
    capture: CaptureConfig = MISSING
    probe: ProbeConfig = MISSING
    steering: SteeringConfig = MISSING
    choice: ChoiceConfig = MISSING
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    shard: str | None = None
    """``i/n``: makes the i-th of n shares of what models are asked for, and leaves the rest to other jobs on the same
    store."""
    plan: bool = False
    """What it will cost is told and nothing is run."""
    plan_tflops: float = limited(200.0, above(0, "more than 0, in 10^12 operations a second"))
    """GPU-hours are those of a GPU that sustains so much."""
    why: bool = False
    """Which fields keep records from being found in the store is told and nothing is run."""
    rating: RatingConfig = field(default_factory=RatingConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    stats: StatsConfig = field(default_factory=StatsConfig)
