"""Which model a config means (its identity in store keys), and the engine that runs it, loaded when first needed."""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_cache_path

from prefs.config import ApiConfig, ModelConfig, ThinkingConfig, VllmConfig
from prefs.errors import ConfigError, UserError
from prefs.models.device import resolve_device, resolve_dtype
from prefs.models.hub import ADAPTER, hub_model, to_load, with_adapter
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
# Of vLLM's own arguments, those that say when and where it computes. Any other may change what comes out.
VLLM_SCHEDULING = (
    *("max_num_seqs", "max_num_batched_tokens", "max_num_partial_prefills", "enable_chunked_prefill", "block_size"),
    *("enable_prefix_caching", "kv_cache_memory_bytes", "num_gpu_blocks_override", "swap_space", "cpu_offload_gb"),
    *("pipeline_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce", "scheduling_policy"),
    *("async_scheduling", "max_parallel_loading_workers", "download_dir", "disable_log_stats"),
)
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
# Hosts that have one server, where a model's name means one model.
PUBLIC_HOSTS = ("api.openai.com", "openrouter.ai")


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
    _refused: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Models], tuple[()]]:
        return Models, ()

    def get(self, spec: ModelSpec) -> Engine:
        """The engine of a spec, loaded now if it is not yet."""
        if spec.engine not in self._loaded:
            self._loaded[spec.engine] = self._load(spec)
        return self._loaded[spec.engine]

    def check(self, specs: Iterable[ModelSpec]) -> None:
        """Refuse models that cannot be had, before anything is run. What the hub did not give is not asked for again
        by later jobs.

        Raises
        ------
        UserError
            As `check_weights` does.
        """
        for spec in specs:
            name = spec.path, spec.revision
            if name in self._refused:
                raise UserError(f"{self._refused[name]} (not asked for again: an earlier job did)")
            try:
                check_weights(spec)
            except UserError as error:
                if _on_hub(spec):
                    self._refused[name] = str(error)
                raise

    def _load(self, spec: ModelSpec) -> Engine:
        log.info("Loading %s (%s) with %s", spec.name, spec.dtype, spec.backend)
        module, name = ENGINES[spec.backend].rsplit(".", 1)
        engine = getattr(importlib.import_module(module), name)
        if spec.backend == "openai":
            return engine.load(spec)
        check_weights(spec)
        if not _on_hub(spec):
            return engine.load(spec, model_folder(spec))
        # The commit that is in the keys, whatever the name means by now.
        model = to_load(spec.path, spec.revision)
        here = replace(spec, path=model.path, revision=model.commit)
        check_weights(here)
        return engine.load(here, model.path)

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
    """Refuse a model that cannot be had, whose folder lacks what will be loaded, or holds more than one model.

    Raises
    ------
    UserError
        If there are no weights or two sets of them, an adapter lies beside them, or `model_folder` refuses.
    """
    if spec.backend == "openai":
        return
    folder = Path(model_folder(spec))
    if not has_weights(spec):
        raise UserError(f"model.path: {folder} has no weights (*.safetensors)")
    names = ("model.safetensors", "model.safetensors.index.json")
    if all((folder / name).is_file() for name in names):
        raise UserError(f"model.path: {folder} has weights twice, {' and '.join(names)}; take one of them away")
    if (folder / ADAPTER).is_file():
        raise with_adapter(folder)


def model_folder(spec: ModelSpec) -> str:
    """The local folder of an embedded or local model; of a hub model its name, or a folder of the cache where the hub
    is out of reach.

    Raises
    ------
    UserError
        If an embedded model is unknown or cannot be unpacked, a folder holds no model's config, or there is neither a
        folder nor a hub model of that name.
    """
    if spec.path.startswith(EMBEDDED):
        from prefs.models.embedded import smollm2_folder

        name = spec.path.removeprefix(EMBEDDED)
        if name != "smollm2":
            raise ConfigError("model.path", spec.path, ["embedded:smollm2", "a local folder", "a hub name"])
        return str(smollm2_folder())
    if _on_hub(spec):
        return hub_model(spec.path, spec.revision).path
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model.path: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        what = (
            f"an adapter ({ADAPTER}) and no whole model" if (folder / ADAPTER).is_file() else "no model of transformers"
        )
        raise UserError(f"model.path: {folder} has no config.json; it is {what}")
    return str(folder)


def _on_hub(spec: ModelSpec) -> bool:
    """Whether a path is a name of the hub."""
    local = spec.path.startswith((EMBEDDED, ".", "/", "~")) or spec.path.count("/") > 1
    return spec.backend != "openai" and not local and not Path(spec.path).is_dir()


def identity(spec: ModelSpec) -> dict[str, Any]:
    """Which model it is: id, revision, precision, and how it thinks. Loads no weights.

    An embedded model is its package and hash, a hub model its name and commit, and a local folder a fingerprint of
    its files, so that a folder that is moved is the same model and one that is trained on is another. A served model
    is its name, the server's address, and what the user calls it (`revision`); of public hosts the host is enough. The
    engine is no part of it: what one computed serves the others.

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
        telling = {name: value for name, value in spec.vllm.engine.items() if name not in VLLM_SCHEDULING}
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
        return {"id": spec.path, "revision": _address(spec), **body, **known}
    if spec.path.startswith(EMBEDDED):
        return {"id": spec.path, "revision": f"{embedded.GGUF_SHA256}-{embedded.LAYOUT}", **known}
    if _on_hub(spec):
        return {"id": spec.path, "revision": hub_model(spec.path, spec.revision).commit, **known}
    return {"id": "folder", "revision": _fingerprint(Path(model_folder(spec))), **known}


def _address(spec: ModelSpec) -> str:
    """What tells a served model from others of its name."""
    parts = urlsplit(spec.api.base_url)
    whole = f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
    address = parts.hostname if parts.hostname in PUBLIC_HOSTS else whole
    return f"{address}@{spec.revision}" if spec.revision else str(address)


def served_nearby(spec: ModelSpec) -> bool:
    """Whether a model is served on this machine or its network, where another one may stand under its name next."""
    host = urlsplit(spec.api.base_url).hostname or ""
    try:
        near = ipaddress.ip_address(host).is_private
    except ValueError:  # a name
        near = host in ("localhost", socket.gethostname(), socket.getfqdn())
    return spec.backend == "openai" and near


def scored_by(spec: ModelSpec) -> dict[str, Any]:
    """What goes into the keys of exact ratings beside the model: how many probabilities its server shows, and whether
    options are scored as whole strings there or by their first tokens."""
    return {"top_logprobs": spec.api.top_logprobs, "whole": spec.api.prefill} if spec.backend == "openai" else {}


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
        / digest([str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    )
    with contextlib.suppress(OSError):
        return known.read_text()
    checksum = file_checksum(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        write_durably(known, checksum.encode())
    return checksum
