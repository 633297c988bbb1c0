"""Structured configs: the schema of every config group, and the checks that need no model.

Hydra composes ``conf/`` into a `Config`; OmegaConf enforces names and types while it does, so a misspelt key or
a wrong type stops before anything is loaded. `check` then refuses what types cannot express. These data classes are
the one exception to "frozen": OmegaConf fills them in, and nothing changes them afterwards.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from prefs.data.shard import Shard
from prefs.errors import ConfigError

# The YAML files: within the package of a wheel, beside it in a checkout.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir())

POSITIONS = ("last_prompt", "first_completion", "last_completion", "mean_completion", "rating")
# Those that lie in the conversation, before any question.
COMPLETION_POSITIONS = tuple(position for position in POSITIONS if position != "rating")
PLACES = ("all", "last", "completion", "question")
Filled = TypeVar("Filled")
PROBES = ("ridge", "linear", "logistic", "ordinal", "mlp", "mean_difference", "none")
NUMBER_TARGETS = ("exact", "sampled", "single")
BINARY_TARGETS = ("good", "refused")
BACKENDS = ("transformer_lens", "vllm", "openai")
PLACE = re.compile(r"https?://.+|\w[\w.-]*(/\w[\w.-]*)?")  # of a data set: a URL, or a name on the hub
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3")


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


class Reading(Enum):
    """How an answer is read: as a number on the scale, or as one of the options' words."""

    number = "number"
    option = "option"


@dataclass
class ThinkingConfig:
    """How a model that thinks before it answers marks its thought, and how long it may think.

    The thought ends at ``close``, and the answer begins after ``gap``. A thought of ``max_tokens`` that has not ended
    gives no answer (``thought_cut_off``), or, with ``force_close``, is closed for the model and answered: the thinking
    budget of s1 (Muennighoff et al. 2025) and of Qwen3's authors.
    """

    enabled: bool = False
    open: str = "<think>"
    close: str = "</think>"
    gap: str = "\n\n"
    max_tokens: int = 4096
    force_close: bool = False


@dataclass
class VllmConfig:
    """What only vLLM needs. ``engine`` takes any further argument of its ``LLM``, as vLLM spells it."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    quantization: str | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass
class ApiConfig:
    """An OpenAI-compatible server. The key is read from the environment variable ``key_env`` (null: it needs none).

    ``prefill`` says that the server can go on with an answer begun for it (vLLM's ``continue_final_message``), which
    also lets options of several tokens be scored. ``extra_body`` goes into every request as it is. Prices are US
    dollars a million tokens.
    """

    base_url: str = "https://api.openai.com/v1"
    key_env: str | None = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout_s: float = 120.0
    max_retries: int = 8
    top_logprobs: int = 20
    prefill: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)
    price_prompt: float | None = None
    price_completion: float | None = None


@dataclass
class ModelConfig:
    """A language model. ``path`` is ``embedded:NAME``, a local folder, a model-hub name, or a server's model name.

    ``batch_tokens: null`` is the engine's own: what is run, and written to the store, at a time. ``device_map`` spreads
    a model over several GPUs; ``attn_implementation: auto`` is ``sdpa`` where it computes what the model means.
    ``gpus`` is how many of them a job asks a cluster for; null: those of vLLM's parallel sizes, one of any other model
    that is not served.
    """

    name: str = MISSING
    path: str = MISSING
    revision: str | None = None
    backend: str = "transformer_lens"
    dtype: ModelDType = ModelDType.auto
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str = "auto"
    max_context: int | None = None
    prefill: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    batch_tokens: int | None = None
    gpus: int | None = None
    vllm: VllmConfig = field(default_factory=VllmConfig)
    api: ApiConfig = field(default_factory=ApiConfig)


@dataclass
class CompleterConfig:
    """Who answers the tasks. ``model: null`` means the rater itself; ``condition`` is one of the concept's."""

    name: str = MISSING
    model: ModelConfig | None = None
    condition: str | None = None
    system_prompt: str | None = None
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64


@dataclass
class OptionConfig:
    """One option: what the model says, what it is worth, and other words for it that are read the same."""

    say: str = MISSING
    value: float = MISSING
    also: list[str] = field(default_factory=list)


@dataclass
class TemplateConfig:
    """A question and its scale. ``prefill`` (null: the model's own) opens the assistant's answer."""

    name: str = MISSING
    question: str = MISSING
    options: list[OptionConfig] = field(default_factory=list)
    reading: Reading = Reading.number
    prefill: str | None = None


class RowReader(Enum):
    """Where a row's prompt is: in columns of text, joined by blank lines, or in a conversation's first user turn."""

    columns = "columns"
    conversation = "conversation"


@dataclass
class SourceConfig:
    """A data set that `datasets` reads: ``path`` is a hub name, a local folder or file, or the URL of one file.

    ``configs`` are the hub's configurations to read (empty: its only one). ``prompt``, ``id`` and ``topic`` are names
    of columns, and ``only`` the values that other columns must have. A prompt longer than ``max_chars`` is left out.
    """

    path: str = MISSING
    revision: str | None = None
    configs: list[str] = field(default_factory=list)
    split: str = "train"
    origin: str = MISSING
    reader: RowReader = RowReader.columns
    prompt: list[str] = field(default_factory=lambda: ["prompt"])
    id: str | None = None
    topic: str | None = None
    only: dict[str, Any] = field(default_factory=dict)
    max_chars: int | None = None


@dataclass
class DatasetConfig:
    """Where the tasks come from. ``limit`` keeps that many, drawn evenly over origins by ``seed``."""

    name: str = MISSING
    kind: str = "mini"
    path: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    origins: list[str] | None = None
    limit: int | None = None
    seed: int = 0


@dataclass
class RatingConfig:
    """How the rater is asked: sampled once per seed, and/or exactly from its log-probabilities.

    A model that thinks has one exact distribution after each thought; ``thoughts`` of them are drawn and mixed.
    ``condition`` is one of the concept's, and stands for its system prompt.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    exact: bool = True
    thoughts: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 8
    condition: str | None = None
    system_prompt: str | None = None


@dataclass
class ConceptConfig:
    """A concept: named system prompts under which it is on, off or the other way round (null: no system prompt).

    Its vectors are the mean difference of activations between the two conditions of ``contrast``, over the same tasks
    of ``origins`` (null: all). ``wordings`` are other words for these two conditions, by a name for each wording.
    """

    name: str = MISSING
    conditions: dict[str, str | None] = field(default_factory=dict)
    contrast: list[str] = field(default_factory=lambda: ["positive", "negative"])
    wordings: dict[str, dict[str, str | None]] = field(default_factory=dict)
    origins: list[str] | None = None
    folds: int = 5
    splits: int = 100
    seed: int = 0


@dataclass
class SteeringControlsConfig:
    """What a steered rating is compared with: vectors of the same norm that mean something else, or nothing.

    ``random`` and ``shuffled`` are how many random directions and how many vectors of shuffled labels; ``probes``
    steers with the directions of the job's probes; ``ablation`` projects the vector's direction out.
    """

    random: int = 3
    shuffled: int = 1
    probes: bool = True
    ablation: bool = True


@dataclass
class CoherenceConfig:
    """Which doses still leave a model that answers: at least ``valid_mass`` of the unsteered model's valid mass, at
    most ``perplexity`` times its perplexity on the unsteered completions, and at most ``invalid`` more invalid answers
    (as a share)."""

    valid_mass: float = 0.5
    perplexity: float = 2.0
    invalid: float = 0.2


@dataclass
class SteeringConfig:
    """Rating with vectors added to the residual stream.

    ``vector`` is ``concept`` (the job's), or a folder of saved concept vectors, from ``position``. ``coefficients`` are
    multiples of the difference of means (``unit: vector``), or of the layer's mean activation norm along it
    (``unit: norm``). ``at`` is where: all, last, completion or question.
    """

    name: str = MISSING
    vector: str = "none"
    position: str = "mean_completion"
    layers: list[int] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    unit: str = "vector"
    at: str = "all"
    seeds: list[int] = field(default_factory=list)
    seed: int = 0
    controls: SteeringControlsConfig = field(default_factory=SteeringControlsConfig)
    coherence: CoherenceConfig = field(default_factory=CoherenceConfig)


@dataclass
class JudgeConfig:
    """What decides that a completion is a refusal: phrases in its opening, or a model that is asked.

    The ``question`` to the model holds ``{request}`` and ``{reply}``; it answers with the word for ``refusal`` or the
    one for ``compliance``. Where phrases are given as well, their agreement with the model is reported.
    """

    name: str = MISSING
    kind: str = "phrases"
    model: ModelConfig | None = None
    question: str = ""
    refusal: str = ""
    compliance: str = ""
    phrases: list[str] = field(default_factory=list)
    window: int = 0


@dataclass
class CaptureConfig:
    """Which residual-stream vectors are kept. ``layers``: ``all`` or a list; negative counts from the last."""

    name: str = MISSING
    layers: Any = "all"
    positions: list[str] = field(default_factory=list)
    dtype: DType = DType.bfloat16


@dataclass
class ProbeControlsConfig:
    """What probes are compared with. ``permutations``: shuffled targets, trained like the true one (0: no null).

    ``embedding_model`` is a folder or hub name that sentence-transformers loads; it is used where that is installed.
    """

    permutations: int = 100
    random_directions: int = 100
    texts: bool = True
    held_out_origins: bool = True
    embedding_model: str | None = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class ProbeConfig:
    """Probes from residual vectors to ratings, at captured ``layers`` (or all) and ``positions`` (null: all).

    ``penalties`` are tried one by one, and chosen by the training folds: of ``ridge`` the weight of the squared norm on
    standardised features, of the kinds that descend decoupled weight decay. ``threshold`` is what a ``good`` rating
    lies above: midpoint, median or a number. ``trainer`` are arguments of Lightning's Trainer, as Lightning spells
    them.
    """

    name: str = MISSING
    kind: str = "ridge"
    positions: list[str] | None = None
    layers: Any = "all"
    targets: list[str] = field(default_factory=list)
    threshold: Any = "midpoint"
    penalties: list[float] = field(default_factory=list)
    folds: int = 5
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    batch_size: int = 64
    max_epochs: int = 200
    patience: int = 10
    min_delta: float = 0.0
    hidden: int = 32
    controls: ProbeControlsConfig = field(default_factory=ProbeControlsConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    _target_: str = ""


@dataclass
class StoreConfig:
    """Where records live. ``dir: null`` is the user's data directory, one for all runs.

    Jobs that run at the same time lease what they compute. A job that gives no sign of life for ``lease_s`` seconds is
    taken for dead, and another goes on in its place (0: nothing is leased, and two jobs may do the same work).
    """

    dir: str | None = None
    lease_s: float = 60.0


@dataclass
class WandbConfig:
    """Weights & Biases. ``mode: auto`` is online with a key and offline without; there is never a prompt."""

    mode: str = "auto"
    project: str = "prefs"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class StatsConfig:
    """Bootstrap over tasks: number of resamples (0: no intervals) and their seed."""

    bootstrap: int = 1000
    seed: int = 0
    target_r: float = 0.9


@dataclass
class Config:
    """The whole configuration of a run.

    With ``shard: i/n`` it makes the i-th of n shares of what models are asked for, and leaves the rest to other jobs on
    the same store. With ``plan``, what it will cost is told and nothing is run; hours are those of a GPU that sustains
    ``plan_tflops`` (10^12 operations a second).
    """

    model: ModelConfig = MISSING
    completer: CompleterConfig = MISSING
    template: dict[str, TemplateConfig] = MISSING
    dataset: DatasetConfig = MISSING
    judge: JudgeConfig = MISSING
    capture: CaptureConfig = MISSING
    probe: ProbeConfig = MISSING
    steering: SteeringConfig = MISSING
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    shard: str | None = None
    plan: bool = False
    plan_tflops: float = 200.0
    rating: RatingConfig = field(default_factory=RatingConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    stats: StatsConfig = field(default_factory=StatsConfig)


def register() -> None:
    """Make the schema known to Hydra, under the name that ``conf/config.yaml`` begins with."""
    ConfigStore.instance().store(name="prefs_schema", node=Config)


def typed(cfg: DictConfig) -> Config:
    """The composed config as plain data classes, checked.

    Raises
    ------
    ConfigError
        If a value is missing or impossible.
    """
    config = filled(cfg, Config)
    check(config)
    completer, rating = config.completer, config.rating
    return replace(
        config,
        completer=replace(completer, system_prompt=_prompt(config, completer)),
        rating=replace(rating, system_prompt=_prompt(config, rating)),
    )


def _prompt(config: Config, of: CompleterConfig | RatingConfig) -> str | None:
    """The system prompt of a role: its condition's, or its own."""
    return of.system_prompt if of.condition is None else _conditions(config)[of.condition]


def _conditions(config: Config) -> dict[str, str | None]:
    """The conditions that roles can be in: those of the first concept."""
    return next(iter(config.concept.values())).conditions if config.concept else {}


def with_prompts(plain: dict[str, Any]) -> dict[str, Any]:
    """A plain config in which the system prompts stand that its conditions mean, where it has conditions that exist."""
    concept = next(iter((plain.get("concept") or {}).values()), {})
    conditions = concept.get("conditions") or {}
    filled_in = dict(plain)
    for role in ("completer", "rating"):
        of = plain.get(role) or {}
        if of.get("condition") in conditions:
            filled_in[role] = {**of, "system_prompt": conditions[of["condition"]]}
    return filled_in


def filled(cfg: DictConfig, kind: type[Filled]) -> Filled:
    """A composed config as plain data classes of its schema.

    Raises
    ------
    ConfigError
        If a value is missing.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise missing_value(missing[0])
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, kind)
    return config


def missing_value(key: str) -> ConfigError:
    """The error for a key that has no default and was not given."""
    return ConfigError(key, "???", "a value; this one has no default, so give it on the command line")


def check(config: Config) -> None:
    """Refuse what the types let through but no run can mean. Needs no model and no file but the data set's.

    Raises
    ------
    ConfigError
        Naming the key, what it got and what is allowed.
    """
    _check_model("model", config.model)
    if config.completer.model is not None:
        _check_model("completer.model", config.completer.model)
    _check_sampling("completer", config.completer.temperature, config.completer.top_p, config.completer.max_new_tokens)
    _check_seeds("completer.seed", [config.completer.seed])
    if not config.template:
        raise ConfigError("template", "[]", "at least one template")
    for key, template in config.template.items():
        _check_template(f"template.{key}", template)
    names = [template.name for template in config.template.values()]
    if len(set(names)) < len(names):
        raise ConfigError("template", names, "templates with different names")
    _check_rating(config.rating)
    if config.rating.exact and config.model.backend == "openai" and config.model.api.top_logprobs == 0:
        allowed = "false, since this model's server gives no log-probabilities (model.api.top_logprobs=0)"
        raise ConfigError("rating.exact", True, allowed)
    _check_dataset(config.dataset)
    if config.shard is not None:
        Shard.parse(config.shard)
    _check_judge(config.judge)
    _check_capture(config.capture, config.model.backend)
    _check_probe(config)
    for key, concept in config.concept.items():
        _check_concept(f"concept.{key}", concept)
    names = [concept.name for concept in config.concept.values()]
    if len(set(names)) < len(names):
        raise ConfigError("concept", names, "concepts with different names")
    _check_condition("completer", config.completer, config)
    _check_condition("rating", config.rating, config)
    _check_steering(config)
    if not (math.isfinite(config.store.lease_s) and config.store.lease_s >= 0):
        raise ConfigError("store.lease_s", config.store.lease_s, "seconds, 0 or more")
    if not (math.isfinite(config.plan_tflops) and config.plan_tflops > 0):
        raise ConfigError("plan_tflops", config.plan_tflops, "more than 0, in 10^12 operations a second")
    _check_choice("wandb.mode", config.wandb.mode, ("auto", "online", "offline", "disabled"))
    _check_range("stats.bootstrap", config.stats.bootstrap, 0, 1_000_000)
    if not 0 < config.stats.target_r < 1:
        raise ConfigError("stats.target_r", config.stats.target_r, "between 0 and 1, both excluded")


def _check_choice(key: str, got: object, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ConfigError(key, got, allowed)


def _check_range(key: str, got: int, low: int, high: int | None = None) -> None:
    if got < low or (high is not None and got > high):
        raise ConfigError(key, got, f"{low} to {high}" if high is not None else f"{low} or more")


def _check_seeds(key: str, seeds: list[int]) -> None:
    if any(seed < 0 for seed in seeds):
        raise ConfigError(key, seeds, "seeds that are 0 or more")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(key, seeds, "seeds that differ from each other")


def _check_sampling(key: str, temperature: float, top_p: float, max_new_tokens: int) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"{key}.temperature", temperature, "0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{key}.top_p", top_p, "more than 0, at most 1")
    _check_range(f"{key}.max_new_tokens", max_new_tokens, 1)


def _check_model(key: str, model: ModelConfig) -> None:
    _check_choice(f"{key}.backend", model.backend, BACKENDS)
    if not DEVICE.fullmatch(model.device):
        raise ConfigError(f"{key}.device", model.device, "auto, cpu, mps, cuda or cuda:N")
    if model.device_map is not None:
        _check_choice(f"{key}.device_map", model.device_map, DEVICE_MAPS)
        if model.device != "auto":
            raise ConfigError(f"{key}.device", model.device, "auto, since device_map says where the model goes")
    _check_choice(f"{key}.attn_implementation", model.attn_implementation, ATTENTIONS)
    if model.max_context is not None:
        _check_range(f"{key}.max_context", model.max_context, 1)
    if model.batch_tokens is not None:
        _check_range(f"{key}.batch_tokens", model.batch_tokens, 1)
    if model.thinking.enabled:
        _check_range(f"{key}.thinking.max_tokens", model.thinking.max_tokens, 1)
        if not model.thinking.close.strip():
            raise ConfigError(f"{key}.thinking.close", model.thinking.close, "the text that ends a thought")
    for name in ("tensor_parallel_size", "data_parallel_size"):
        _check_range(f"{key}.vllm.{name}", getattr(model.vllm, name), 1)
    if model.gpus is not None:
        _check_range(f"{key}.gpus", model.gpus, 0)
    if not 0 < model.vllm.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"{key}.vllm.gpu_memory_utilization", model.vllm.gpu_memory_utilization, "more than 0, at most 1"
        )
    if model.backend == "openai":
        _check_api(key, model)


def _check_api(key: str, model: ModelConfig) -> None:
    api = model.api
    if not _is_address(api.base_url):
        raise ConfigError(
            f"{key}.api.base_url", api.base_url, "the address of a server, such as http://127.0.0.1:8000/v1"
        )
    if "@" in urlsplit(api.base_url).netloc:
        raise ConfigError(f"{key}.api.base_url", "one with a password", "an address alone; keys are named by key_env")
    if model.thinking.enabled and model.thinking.force_close:
        raise ConfigError(f"{key}.thinking.force_close", True, "false, since a server ends its model's thoughts")
    _check_range(f"{key}.api.concurrency", api.concurrency, 1)
    _check_range(f"{key}.api.max_retries", api.max_retries, 0)
    _check_range(f"{key}.api.top_logprobs", api.top_logprobs, 0, 20)
    if not (math.isfinite(api.timeout_s) and api.timeout_s > 0):
        raise ConfigError(f"{key}.api.timeout_s", api.timeout_s, "seconds, more than 0")
    if model.prefill and not api.prefill:
        raise ConfigError(
            f"{key}.prefill", model.prefill, "'' unless the server can go on with an answer (model.api.prefill=true)"
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


def _check_template(key: str, template: TemplateConfig) -> None:
    if not template.question.strip():
        raise ConfigError(f"{key}.question", template.question, "some text")
    if len(template.options) < 2:
        raise ConfigError(f"{key}.options", [option.say for option in template.options], "two options or more")
    says = [option.say for option in template.options]
    if any(not say.strip() for say in says):
        raise ConfigError(f"{key}.options", says, "options that say something")
    if len({say.casefold().strip() for say in says}) < len(says):
        raise ConfigError(f"{key}.options", says, "options that differ in more than case and blanks")
    for option in template.options:
        if not math.isfinite(option.value):
            raise ConfigError(f"{key}.options", option.value, "finite values")
        if template.reading is Reading.number and _number(option.say) != option.value:
            raise ConfigError(
                f"{key}.options", f"{option.say}: {option.value}", "numbers worth themselves, or reading: option"
            )
    values = [option.value for option in template.options]
    if len(set(values)) < len(values):
        raise ConfigError(f"{key}.options", values, "one value an option; more words for it go to `also`")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_rating(rating: RatingConfig) -> None:
    _check_seeds("rating.seeds", rating.seeds)
    _check_sampling("rating", rating.temperature, rating.top_p, rating.max_new_tokens)
    _check_range("rating.thoughts", rating.thoughts, 1)
    if not rating.seeds and not rating.exact:
        raise ConfigError("rating.seeds", [], "at least one seed, or rating.exact=true")


def _check_dataset(dataset: DatasetConfig) -> None:
    _check_choice("dataset.kind", dataset.kind, ("mini", "file", "hub"))
    if dataset.kind == "file":
        if not dataset.path:
            raise ConfigError("dataset.path", dataset.path, "the path of a .jsonl or .csv file")
        if not Path(dataset.path).expanduser().is_file():
            raise ConfigError("dataset.path", dataset.path, "a file that exists")
    if dataset.kind == "hub" and not dataset.sources:
        raise ConfigError("dataset.sources", {}, "at least one source")
    for name, source in dataset.sources.items():
        _check_source(f"dataset.sources.{name}", source)
    if dataset.limit is not None:
        _check_range("dataset.limit", dataset.limit, 1)
    _check_seeds("dataset.seed", [dataset.seed])


def _check_source(key: str, source: SourceConfig) -> None:
    if not (PLACE.fullmatch(source.path) or Path(source.path).expanduser().exists()):
        raise ConfigError(f"{key}.path", source.path, "a folder or file that exists, a URL, or a hub name (owner/name)")
    if not source.origin.strip():
        raise ConfigError(f"{key}.origin", source.origin, "some name")
    if not source.prompt:
        raise ConfigError(f"{key}.prompt", source.prompt, "at least one column")
    if source.reader is RowReader.conversation and len(source.prompt) > 1:
        raise ConfigError(f"{key}.prompt", source.prompt, "the one column that holds the conversation")
    if source.max_chars is not None:
        _check_range(f"{key}.max_chars", source.max_chars, 1)


def _check_judge(judge: JudgeConfig) -> None:
    _check_choice("judge.kind", judge.kind, ("phrases", "llm", "none"))
    if judge.kind == "phrases" and not [phrase for phrase in judge.phrases if phrase.strip()]:
        raise ConfigError("judge.phrases", judge.phrases, "at least one phrase")
    if judge.kind != "llm":
        return
    if judge.model is None:
        raise ConfigError("judge.model", None, "a model, as in model@judge.model=smollm2")
    _check_model("judge.model", judge.model)
    for part in ("{request}", "{reply}"):
        if part not in judge.question:
            raise ConfigError("judge.question", judge.question, f"a question that holds {part}")
    words = (judge.refusal.strip(), judge.compliance.strip())
    if not all(words) or words[0].casefold() == words[1].casefold():
        raise ConfigError("judge.refusal", words, "a word for refusal and another for compliance")


def _check_capture(capture: CaptureConfig, backend: str) -> None:
    if capture.positions and backend != "transformer_lens":
        raise ConfigError(
            "capture.positions",
            capture.positions,
            f"none with model.backend={backend}, which gives no residual vectors; add: capture=none probe=none",
        )
    layers = capture.layers
    if layers != "all" and not _is_layers(layers):
        raise ConfigError("capture.layers", layers, "all, or a list of layer numbers such as [0,15,-1]")
    for position in capture.positions:
        _check_choice("capture.positions", position, POSITIONS)
    if len(set(capture.positions)) < len(capture.positions):
        raise ConfigError("capture.positions", capture.positions, "each position once")


def _check_concept(key: str, concept: ConceptConfig) -> None:
    names = list(concept.conditions)
    if len(concept.contrast) != 2 or concept.contrast[0] == concept.contrast[1]:
        raise ConfigError(f"{key}.contrast", concept.contrast, "two conditions, as in [positive,negative]")
    for name in concept.contrast:
        if name not in names:
            raise ConfigError(f"{key}.contrast", name, tuple(names) if names else "conditions (it has none)")
    first, second = (concept.conditions[name] for name in concept.contrast)
    if first == second:
        raise ConfigError(f"{key}.conditions", concept.contrast, "two conditions with different system prompts")
    for wording, prompts in concept.wordings.items():
        if set(prompts) != set(concept.contrast):
            allowed = f"a system prompt for each of {', '.join(concept.contrast)}, and no other"
            raise ConfigError(f"{key}.wordings.{wording}", list(prompts), allowed)
    for name, prompt in [
        *concept.conditions.items(),
        *((w, p) for ps in concept.wordings.values() for w, p in ps.items()),
    ]:
        if prompt is not None and not prompt.strip():
            raise ConfigError(f"{key}.conditions.{name}", prompt, "some text, or null for no system prompt")
    if concept.origins == []:
        raise ConfigError(f"{key}.origins", [], "at least one origin, or null for all")
    _check_range(f"{key}.folds", concept.folds, 2)
    _check_range(f"{key}.splits", concept.splits, 1)
    _check_seeds(f"{key}.seed", [concept.seed])


def _check_condition(role: str, of: CompleterConfig | RatingConfig, config: Config) -> None:
    if of.condition is None:
        return
    names = tuple(_conditions(config))
    if of.condition not in names:
        allowed = names or "null, since no concept is chosen (concept=[liking_math])"
        raise ConfigError(f"{role}.condition", of.condition, allowed)
    if of.system_prompt is not None:
        raise ConfigError(f"{role}.system_prompt", of.system_prompt, f"null, since {role}.condition gives it")


def _check_steering(config: Config) -> None:
    steering = config.steering
    if steering.vector == "none":
        return
    if config.model.backend != "transformer_lens":
        raise ConfigError("steering.vector", steering.vector, f"none with model.backend={config.model.backend}")
    if steering.vector == "concept":
        if not config.concept:
            raise ConfigError("steering.vector", "concept", "a folder of saved vectors, since no concept is chosen")
    elif not Path(steering.vector).expanduser().is_dir():
        raise ConfigError("steering.vector", steering.vector, "concept, none, or a folder of saved vectors that exists")
    if not config.rating.exact:
        raise ConfigError("rating.exact", False, "true, since steered ratings are exact")
    _check_choice("steering.position", steering.position, COMPLETION_POSITIONS)
    if steering.vector == "concept" and steering.position not in config.capture.positions:
        captured = ", ".join(config.capture.positions) or "nothing is; capture=residual"
        raise ConfigError("steering.position", steering.position, f"a captured position ({captured})")
    _check_choice("steering.unit", steering.unit, ("vector", "norm"))
    _check_choice("steering.at", steering.at, PLACES)
    if not steering.layers or not _is_layers(steering.layers):
        raise ConfigError("steering.layers", steering.layers, "at least one layer number, as in [15]")
    wrong = [each for each in steering.coefficients if not math.isfinite(each)]
    if wrong or len(set(steering.coefficients)) < max(2, len(steering.coefficients)):
        raise ConfigError("steering.coefficients", steering.coefficients, "two or more finite numbers, each once")
    _check_seeds("steering.seeds", steering.seeds)
    _check_seeds("steering.seed", [steering.seed])
    for name in ("random", "shuffled"):
        _check_range(f"steering.controls.{name}", getattr(steering.controls, name), 0, 1000)
    for name in ("valid_mass", "perplexity", "invalid"):
        value = getattr(steering.coherence, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"steering.coherence.{name}", value, "0 or more")


def _is_layers(layers: object) -> bool:
    return isinstance(layers, list) and bool(layers) and all(type(layer) is int for layer in layers)


def _check_probe(config: Config) -> None:
    probe = config.probe
    _check_choice("probe.kind", probe.kind, PROBES)
    if probe.kind == "none":
        return
    if not config.capture.positions:
        raise ConfigError("probe.kind", probe.kind, "none, since nothing is captured; or capture=residual")
    for position in probe.positions or []:
        _check_choice("probe.positions", position, POSITIONS)
        if position not in config.capture.positions:
            raise ConfigError(
                "probe.positions", position, f"a captured position ({', '.join(config.capture.positions)})"
            )
    if probe.layers != "all" and not _is_layers(probe.layers):
        raise ConfigError("probe.layers", probe.layers, "all, or a list of captured layers such as [0,15,-1]")
    if probe.positions == []:
        raise ConfigError("probe.positions", [], "at least one position, or null for all captured")
    _check_targets(config)
    _check_range("probe.folds", probe.folds, 2)
    _check_range("probe.max_epochs", probe.max_epochs, 1)
    _check_range("probe.batch_size", probe.batch_size, 1)
    _check_range("probe.patience", probe.patience, 1)
    _check_range("probe.hidden", probe.hidden, 1)
    _check_range("probe.controls.permutations", probe.controls.permutations, 0, 100_000)
    _check_range("probe.controls.random_directions", probe.controls.random_directions, 0, 100_000)
    _check_seeds("probe.seed", [probe.seed])
    _check_choice("probe.optimizer", probe.optimizer, ("adamw", "sgd"))
    if not (math.isfinite(probe.learning_rate) and probe.learning_rate > 0):
        raise ConfigError("probe.learning_rate", probe.learning_rate, "more than 0")
    if not (math.isfinite(probe.min_delta) and probe.min_delta >= 0):
        raise ConfigError("probe.min_delta", probe.min_delta, "0 or more")
    if not 0 <= probe.momentum < 1:
        raise ConfigError("probe.momentum", probe.momentum, "0 or more, less than 1")
    above = "more than 0" if probe.kind == "ridge" else "0 or more"
    wrong = [p for p in probe.penalties if not (math.isfinite(p) and (p > 0 or (p == 0 and probe.kind != "ridge")))]
    if wrong or (not probe.penalties and probe.kind != "mean_difference"):
        raise ConfigError("probe.penalties", wrong or [], f"at least one number, each {above}")
    if probe.threshold not in ("midpoint", "median") and not (
        isinstance(probe.threshold, int | float) and math.isfinite(probe.threshold)
    ):
        raise ConfigError("probe.threshold", probe.threshold, "midpoint, median or a number")


def _check_targets(config: Config) -> None:
    probe = config.probe
    allowed = BINARY_TARGETS if probe.kind == "logistic" else NUMBER_TARGETS
    if not probe.targets:
        raise ConfigError("probe.targets", [], f"at least one of {', '.join(allowed)}")
    for target in probe.targets:
        _check_choice("probe.targets", target, allowed)
        if target == "exact" and not config.rating.exact:
            raise ConfigError("probe.targets", probe.targets, "sampled or single, since rating.exact=false")
        if target in ("sampled", "single") and not config.rating.seeds:
            raise ConfigError("probe.targets", probe.targets, "exact, since rating.seeds=[]")
        if target == "refused" and config.judge.kind == "none":
            raise ConfigError("probe.targets", probe.targets, "good, since judge=none")
    if len(set(probe.targets)) < len(probe.targets):
        raise ConfigError("probe.targets", probe.targets, "each target once")
