"""Rules over several fields of a config, which need no model and no file but the data set's."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.parse import urlsplit

from prefs.config.choice import check_choice
from prefs.config.limits import above, at_least, check_limits, is_layers
from prefs.config.schema import ConceptConfig, Config, DatasetConfig, JudgeConfig, ModelConfig, ProbeConfig, RowReader
from prefs.errors import ConfigError
from prefs.sweep import Shard

NUMBER_TARGETS = ("exact", "sampled", "single", "utility")
BINARY_TARGETS = ("good", "refused")


def check(config: Config) -> None:
    """Refuse what the types let through but no run can mean. Needs no model and no file but the data set's.

    Raises
    ------
    ConfigError
        Naming the key, what it got and what is allowed.
    """
    check_limits(config)
    for key, model in (("model", config.model), ("completer.model", config.completer.model)):
        if model is not None:
            _check_model(key, model)
    for key, template in config.template.items():
        template.check(f"template.{key}")
    for group, chosen in (("template", config.template), ("concept", config.concept)):
        names = [part.name for part in chosen.values()]
        if len(set(names)) < len(names):
            raise ConfigError(group, names, f"{group}s with different names")
    rating = config.rating
    if not rating.seeds and not rating.exact:
        raise ConfigError("rating.seeds", [], "at least one seed, or rating.exact=true")
    if rating.exact and config.model.backend == "openai" and config.model.api.top_logprobs == 0:
        allowed = "false, since this model's server gives no log-probabilities (model.api.top_logprobs=0)"
        raise ConfigError("rating.exact", True, allowed)
    _check_dataset(config.dataset)
    if config.shard is not None:
        Shard.parse(config.shard)
    _check_judge(config.judge)
    if config.capture.positions and config.model.backend != "transformer_lens":
        no_vectors = f"model.backend={config.model.backend}, which gives no residual vectors"
        allowed = f"none with {no_vectors}; add: capture=none probe=none"
        raise ConfigError("capture.positions", config.capture.positions, allowed)
    if config.probe.kind != "none":
        _check_probe(config)
    for key, concept in config.concept.items():
        _check_concept(f"concept.{key}", concept)
    check_choice(config)
    _check_conditions(config)
    if config.steering.vector != "none":
        _check_steering(config)


def _check_model(key: str, model: ModelConfig) -> None:
    if model.device_map is not None and model.device != "auto":
        raise ConfigError(f"{key}.device", model.device, "auto, since device_map says where the model goes")
    if model.thinking.enabled and not model.thinking.close.strip():
        raise ConfigError(f"{key}.thinking.close", model.thinking.close, "the text that ends a thought")
    if model.backend != "openai":
        return
    if not _is_address(model.api.base_url):
        allowed = "the address of a server, such as http://127.0.0.1:8000/v1"
        raise ConfigError(f"{key}.api.base_url", model.api.base_url, allowed)
    if "@" in urlsplit(model.api.base_url).netloc:
        raise ConfigError(f"{key}.api.base_url", "one with a password", "an address alone; keys are named by key_env")
    if model.thinking.enabled and model.thinking.force_close:
        raise ConfigError(f"{key}.thinking.force_close", True, "false, since a server ends its model's thoughts")
    if model.prefill and not model.api.prefill:
        allowed = "'' unless the server can go on with an answer (model.api.prefill=true)"
        raise ConfigError(f"{key}.prefill", model.prefill, allowed)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


def _check_dataset(dataset: DatasetConfig) -> None:
    if dataset.kind == "file":
        if not dataset.path:
            raise ConfigError("dataset.path", dataset.path, "the path of a .jsonl or .csv file")
        if not Path(dataset.path).expanduser().is_file():
            raise ConfigError("dataset.path", dataset.path, "a file that exists")
    if dataset.kind == "hub" and not dataset.sources:
        raise ConfigError("dataset.sources", {}, "at least one source")
    for name, source in dataset.sources.items():
        if source.reader is RowReader.conversation and len(source.prompt) > 1:
            key = f"dataset.sources.{name}.prompt"
            raise ConfigError(key, source.prompt, "the one column that holds the conversation")


def _check_kind(key: str, part: ProbeConfig | JudgeConfig) -> None:
    """What a kind's file names holds the kind's word, by which records and tables tell kinds apart."""
    made = part._target_.rpartition(".")[2]
    if part.kind != "none" and part.kind.replace("_", "") not in made.replace("_", "").casefold():
        allowed = f"none, or what {key}._target_ is ({made or 'nothing'}); others by file, as in {key}={part.kind}"
        raise ConfigError(f"{key}.kind", part.kind, allowed)


def _check_judge(judge: JudgeConfig) -> None:
    _check_kind("judge", judge)
    if judge.kind != "llm":
        return
    if judge.model is not None:
        _check_model("judge.model", judge.model)
    for part in ("{request}", "{reply}"):
        if part not in judge.question:
            raise ConfigError("judge.question", judge.question, f"a question that holds {part}")
    words = (judge.refusal.strip(), judge.compliance.strip())
    if not all(words) or words[0].casefold() == words[1].casefold():
        raise ConfigError("judge.refusal", words, "a word for refusal and another for compliance")


def _check_probe(config: Config) -> None:
    probe, captured = config.probe, config.capture.positions
    _check_kind("probe", probe)
    if not captured:
        raise ConfigError("probe.kind", probe.kind, "none, since nothing is captured; or capture=residual")
    for position in probe.positions or []:
        if position not in captured:
            raise ConfigError("probe.positions", position, f"a captured position ({', '.join(captured)})")
    targets = BINARY_TARGETS if probe.binary else NUMBER_TARGETS
    if not probe.targets:
        raise ConfigError("probe.targets", [], f"at least one of {', '.join(targets)}")
    for target in probe.targets:
        if target not in targets:
            raise ConfigError("probe.targets", target, targets)
        if target == "exact" and not config.rating.exact:
            raise ConfigError("probe.targets", probe.targets, "sampled or single, since rating.exact=false")
        if target in ("sampled", "single") and not config.rating.seeds:
            raise ConfigError("probe.targets", probe.targets, "exact, since rating.seeds=[]")
        if target == "utility" and config.choice.kind == "none":
            raise ConfigError("probe.targets", probe.targets, "exact or sampled, since choice=none; or choice=exact")
        if target == "refused" and config.judge.kind == "none":
            raise ConfigError("probe.targets", probe.targets, "good, since judge=none")
    limit = above(0) if probe.kind == "ridge" else at_least(0)
    wrong = [penalty for penalty in probe.penalties or () if not limit.holds(penalty)]
    if wrong or probe.penalties == []:
        raise ConfigError("probe.penalties", wrong, f"at least one number, each {limit.allowed}")


def _check_concept(key: str, concept: ConceptConfig) -> None:
    names = tuple(concept.conditions)
    for name in concept.contrast:
        if name not in names:
            raise ConfigError(f"{key}.contrast", name, names or "conditions (it has none)")
    first, second = (concept.conditions[name] for name in concept.contrast)
    if first == second:
        raise ConfigError(f"{key}.conditions", concept.contrast, "two conditions with different system prompts")
    for wording, prompts in concept.wordings.items():
        if set(prompts) != set(concept.contrast):
            allowed = f"a system prompt for each of {', '.join(concept.contrast)}, and no other"
            raise ConfigError(f"{key}.wordings.{wording}", list(prompts), allowed)
    for prompts in (concept.conditions, *concept.wordings.values()):
        for name, prompt in prompts.items():
            if prompt is not None and not prompt.strip():
                raise ConfigError(f"{key}.conditions.{name}", prompt, "some text, or null for no system prompt")


def conditions(config: Config) -> dict[str, str | None]:
    """The conditions that roles can be in: those of the first concept."""
    return next(iter(config.concept.values())).conditions if config.concept else {}


def _check_conditions(config: Config) -> None:
    names = tuple(conditions(config))
    for key, role in (("completer", config.completer), ("rating", config.rating), ("choice", config.choice)):
        if role.condition is None:
            continue
        if role.condition not in names:
            allowed = names or "null, since no concept is chosen (concept=[liking_math])"
            raise ConfigError(f"{key}.condition", role.condition, allowed)
        if role.system_prompt is not None:
            raise ConfigError(f"{key}.system_prompt", role.system_prompt, f"null, since {key}.condition gives it")


def _check_steering(config: Config) -> None:
    steering, captured = config.steering, config.capture.positions
    if config.model.backend != "transformer_lens":
        raise ConfigError("steering.vector", steering.vector, f"none with model.backend={config.model.backend}")
    if steering.vector == "concept":
        if not config.concept:
            raise ConfigError("steering.vector", "concept", "a folder of saved vectors, since no concept is chosen")
    elif not Path(steering.vector).expanduser().is_dir():
        raise ConfigError("steering.vector", steering.vector, "concept, none, or a folder of saved vectors that exists")
    if not config.rating.exact:
        raise ConfigError("rating.exact", False, "true, since steered ratings are exact")
    if steering.vector == "concept" and steering.position not in captured:
        allowed = f"a captured position ({', '.join(captured) or 'nothing is; capture=residual'})"
        raise ConfigError("steering.position", steering.position, allowed)
    if not is_layers(steering.layers):
        raise ConfigError("steering.layers", steering.layers, "at least one layer number, as in [15]")
    wrong = [coefficient for coefficient in steering.coefficients if not math.isfinite(coefficient)]
    if wrong or len(set(steering.coefficients)) < max(2, len(steering.coefficients)):
        raise ConfigError("steering.coefficients", steering.coefficients, "two or more finite numbers, each once")
