"""Which model a config means (its identity in store keys), and the engine that runs it, loaded when first needed."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_cache_path

from prefs.config import ApiConfig, ModelConfig, ThinkingConfig, VllmConfig
from prefs.errors import ConfigError, UserError
from prefs.models.device import resolve_device, resolve_dtype
from prefs.models.openai.keys import key_of
from prefs.models.types import Engine, Usage
from prefs.store.files import file_checksum, write_durably
from prefs.store.keys import canonical, digest

log = logging.getLogger(__name__)

EMBEDDED = "embedded:"
# The precision of a model that somebody else serves.
SERVED = "served"
# Tokens a batch where the config leaves it to the engine. An engine that cuts its own batches gets long lists.
BATCH_TOKENS = {"transformer_lens": 8192, "vllm": 262_144, "openai": 65_536}
# Of vLLM's own arguments, those that change what a model computes.
VLLM_RESULTS = ("hf_overrides", "kv_cache_dtype", "quantization_config", "load_format", "disable_sliding_window")
# Where each back-end's engine is, a class with `load(spec, folder)`; imported when it is needed.
ENGINES = {
    "transformer_lens": "prefs.models.local.engine.LocalEngine",
    "vllm": "prefs.models.vllm.engine.VllmEngine",
    "openai": "prefs.models.openai.engine.OpenAIEngine",
}
# Raised when answers and vectors of models from folders and hubs mean something else than those stored before. 2: text
# is encoded whole, and answers end at what the chat template writes after a turn.
RECORDS = 2
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class ModelSpec:
    """What of a `ModelConfig` is needed to load the model, resolved for this machine: its precision, its batches, and
    whether it thinks. Specs with the same `engine` share one loaded model."""

    name: str
    path: str
    backend: str = "transformer_lens"
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None
    attn_implementation: str = "auto"
    max_context: int | None = None
    batch_tokens: int = 8192
    prefill: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    thinking: ThinkingConfig | None = None
    vllm: VllmConfig = field(default_factory=VllmConfig)
    api: ApiConfig = field(default_factory=ApiConfig)

    @classmethod
    def from_config(cls, config: ModelConfig) -> ModelSpec:
        """A model of the config, with the precision it has on this machine.

        Raises
        ------
        UserError
            If its device is not there, or the key of its server is not.
        """
        served = config.backend == "openai"
        if served:
            key_of(config.api)
        resolved: dict[str, Any] = {
            "dtype": SERVED if served else resolve_dtype(config.dtype.value, resolve_device(config.device)),
            "batch_tokens": config.batch_tokens or BATCH_TOKENS[config.backend],
            "thinking": config.thinking if config.thinking.enabled else None,
        }
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__} | resolved)

    @property
    def engine(self) -> str:
        """What two specs must share to be served by one loaded model."""
        apart = ("name", "prefill", "batch_tokens")
        return canonical({key: value for key, value in asdict(self).items() if key not in apart})


@dataclass
class Models:
    """The models a process has loaded. One job after another asks it; only what the present job uses stays loaded.

    Pickled, it is empty: a job that a cluster queues again, elsewhere and with what it was called with, loads its own.
    """

    _loaded: dict[str, Engine] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Models], tuple[()]]:
        return Models, ()

    def get(self, spec: ModelSpec) -> Engine:
        """The engine of a spec, loaded now if it is not yet."""
        if spec.engine not in self._loaded:
            self._loaded[spec.engine] = self._load(spec)
        return self._loaded[spec.engine]

    def _load(self, spec: ModelSpec) -> Engine:
        check_weights(spec)
        log.info("Loading %s (%s) with %s", spec.name, spec.dtype, spec.backend)
        module, name = ENGINES[spec.backend].rsplit(".", 1)
        engine = getattr(importlib.import_module(module), name)
        return engine.load(spec, None if spec.backend == "openai" else model_folder(spec))

    def usage(self) -> dict[str, Usage]:
        """What each loaded engine has spent so far, by `ModelSpec.engine`."""
        return {engine: backend.usage() for engine, backend in self._loaded.items()}

    def keep_only(self, specs: Iterable[ModelSpec]) -> None:
        """Let go of every model that none of these specs uses."""
        wanted = {spec.engine for spec in specs}
        for engine in set(self._loaded) - wanted:
            self._loaded.pop(engine).close()


def has_weights(spec: ModelSpec) -> bool:
    """Whether a model's folder holds its weights, and not its config and tokenizer alone; a hub gives all."""
    if spec.path.startswith(EMBEDDED):
        return True
    folder = Path(model_folder(spec))
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def check_weights(spec: ModelSpec) -> None:
    """Refuse a model whose folder lacks what will be loaded.

    Raises
    ------
    UserError
        If there are no weights, or `model_folder` refuses.
    """
    if spec.backend != "openai" and not has_weights(spec):
        raise UserError(f"model.path: {model_folder(spec)} has no weights (*.safetensors)")


def model_folder(spec: ModelSpec) -> str:
    """The local folder of an embedded or local model; a hub name is returned as it is.

    Raises
    ------
    UserError
        If an embedded model is unknown or cannot be unpacked, or a folder holds no model's config.
    """
    if spec.path.startswith(EMBEDDED):
        from prefs.models.embedded import smollm2_folder

        name = spec.path.removeprefix(EMBEDDED)
        if name != "smollm2":
            raise ConfigError("model.path", spec.path, ["embedded:smollm2", "a local folder", "a hub name"])
        return str(smollm2_folder())
    folder = Path(spec.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} has no config.json; it is not a transformers model folder")
        return str(folder)
    if spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1:
        raise UserError(f"model.path: there is no folder {folder}")
    return spec.path


def identity(spec: ModelSpec) -> dict[str, Any]:
    """Which model it is: id, revision, precision, and how it thinks. Loads no weights.

    An embedded model is its package and hash, a hub model its name and commit, and a local folder a fingerprint of
    its files, so that a folder that is moved is the same model and one that is trained on is another. A served model
    is its name and the server's host. The engine is no part of it: what one computed serves the others.

    Raises
    ------
    UserError
        If the folder is not a model, or the hub cannot be asked and the cache does not know.
    """
    from prefs.models import embedded

    known: dict[str, Any] = {"dtype": spec.dtype}
    if spec.backend == "vllm":
        if spec.vllm.quantization is not None:
            known["quantization"] = spec.vllm.quantization
        telling = {name: spec.vllm.engine[name] for name in VLLM_RESULTS if name in spec.vllm.engine}
        if telling:
            known["engine"] = telling
    if spec.thinking is not None:
        known["thinking"] = {key: value for key, value in asdict(spec.thinking).items() if key != "enabled"}
    if spec.chat_template_kwargs:
        known["chat_template_kwargs"] = dict(spec.chat_template_kwargs)
    if spec.max_context is not None:
        known["max_context"] = spec.max_context
    if spec.backend == "openai":
        body = {"extra_body": spec.api.extra_body} if spec.api.extra_body else {}
        return {"id": spec.path, "revision": urlsplit(spec.api.base_url).hostname, **body, **known}
    if spec.path.startswith(EMBEDDED):
        return {"id": spec.path, "revision": f"{embedded.GGUF_SHA256}-{embedded.LAYOUT}", **known}
    folder = model_folder(spec)
    if Path(folder).is_dir():
        return {"id": "folder", "revision": _fingerprint(Path(folder)), **known}
    return {"id": spec.path, "revision": _commit(spec), **known}


def recorded(spec: ModelSpec) -> dict[str, Any]:
    """What of a model goes into store keys: its `identity`, and what its records mean. Raises as that does."""
    changed = spec.backend != "openai" and not spec.path.startswith(EMBEDDED)
    return {**identity(spec), **({"records": RECORDS} if changed else {})}


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the names and checksums of a model folder's files."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES]
    return digest([[path.name, _checksum(path)] for path in files])


def _checksum(path: Path) -> str:
    """Checksum of a whole file, remembered in the user's cache for as long as the file is not touched."""
    stat = path.stat()
    known = (
        user_cache_path("prefs")
        / "checksums"
        / digest([str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns])
    )
    with contextlib.suppress(OSError):
        return known.read_text()
    checksum = file_checksum(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        write_durably(known, checksum.encode())
    return checksum


def _commit(spec: ModelSpec) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(spec.path, "config.json", revision=spec.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path: {spec.path!r} is neither a local folder nor a model the hub or its cache gives ({reason})"
        ) from None
    return Path(config).parent.name
