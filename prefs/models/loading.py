"""Which model a config means (its identity in store keys), and the engine that runs it, loaded when first needed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from prefs.config import ModelConfig
from prefs.errors import ConfigError, UserError
from prefs.files import write_durably
from prefs.models.backend import Backend
from prefs.models.device import resolve_device, resolve_dtype
from prefs.store import digest, file_checksum

log = logging.getLogger(__name__)

EMBEDDED = "embedded:"
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to load a model, and nothing else; equal specs share one loaded model."""

    name: str
    path: str
    revision: str | None
    backend: str
    dtype: str
    device: str
    max_context: int | None
    batch_tokens: int
    prefill: str
    chat_template_kwargs: str = "{}"

    @classmethod
    def from_config(cls, config: ModelConfig) -> ModelSpec:
        """A model of the config, with the precision it has on this machine.

        Raises
        ------
        UserError
            If its device is not there.
        """
        return cls(
            name=config.name,
            path=config.path,
            revision=config.revision,
            backend=config.backend,
            dtype=resolve_dtype(config.dtype.value, resolve_device(config.device)),
            device=config.device,
            max_context=config.max_context,
            batch_tokens=config.batch_tokens,
            prefill=config.prefill,
            chat_template_kwargs=json.dumps(config.chat_template_kwargs, sort_keys=True),
        )

    @property
    def engine(self) -> tuple[Any, ...]:
        """What two specs must share to be served by one loaded model."""
        return (
            self.backend,
            self.path,
            self.revision,
            self.dtype,
            self.device,
            self.max_context,
            self.chat_template_kwargs,
        )


@dataclass
class Models:
    """The models a process has loaded. One job after another asks it; only what the present job uses stays loaded."""

    _loaded: dict[tuple[Any, ...], Backend] = field(default_factory=dict)

    def get(self, spec: ModelSpec) -> Backend:
        """The engine of a spec, loaded now if it is not yet."""
        if spec.engine not in self._loaded:
            self._loaded[spec.engine] = _load(spec)
        return self._loaded[spec.engine]

    def keep_only(self, specs: Iterable[ModelSpec]) -> None:
        """Let go of every model that none of these specs uses."""
        wanted = {spec.engine for spec in specs}
        for engine in set(self._loaded) - wanted:
            del self._loaded[engine]


def _load(spec: ModelSpec) -> Backend:
    from prefs.models.transformer_lens import TransformerLensBackend

    log.info("Loading %s (%s) with %s", spec.name, spec.dtype, spec.backend)
    return TransformerLensBackend.load(spec, model_folder(spec))


def model_folder(spec: ModelSpec) -> str:
    """The local folder of an embedded or local model; a hub name is returned as it is.

    Raises
    ------
    UserError
        If an embedded model is unknown or cannot be unpacked, or a folder holds no model.
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
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"model.path: {folder} has no weights (*.safetensors)")
        return str(folder)
    if spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1:
        raise UserError(f"model.path: there is no folder {folder}")
    return spec.path


def identity(spec: ModelSpec) -> dict[str, Any]:
    """What of a model goes into store keys: id, revision and precision. Loads no weights.

    An embedded model is its package and hash, a hub model its name and commit, and a local folder a fingerprint of
    its files, so that a folder that is moved is the same model and one that is trained on is another.

    Raises
    ------
    UserError
        If the folder is not a model, or the hub cannot be asked and the cache does not know.
    """
    from prefs.models import embedded

    known: dict[str, Any] = {"dtype": spec.dtype}
    if json.loads(spec.chat_template_kwargs):
        known["chat_template_kwargs"] = json.loads(spec.chat_template_kwargs)
    if spec.max_context is not None:
        known["max_context"] = spec.max_context
    if spec.path.startswith(EMBEDDED):
        return {"id": spec.path, "revision": f"{embedded.GGUF_SHA256}-{embedded.LAYOUT}", **known}
    folder = model_folder(spec)
    if Path(folder).is_dir():
        return {"id": "folder", "revision": _fingerprint(Path(folder)), **known}
    return {"id": spec.path, "revision": _commit(spec), **known}


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
