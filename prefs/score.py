"""Apply a saved probe to new text: ``python -m prefs.score probe=FOLDER text="..."``.

Prints what the probe predicts, and writes ``score.html``, the text with every token coloured by what the probe says
there, and ``score.json``. Needs only the probe's folder and the model. `prefs.probes.source` says what of the card is
read.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig

from prefs.config import filled
from prefs.config.folders import claiming_folders
from prefs.config.limits import DEVICE, SHARE, TEMPERATURE, at_least, check_limits, limited
from prefs.errors import ConfigError, UserError, one_line_errors
from prefs.store.files import write_durably

if TYPE_CHECKING:
    from prefs.models.loading import Models
    from prefs.probes.apply import Applied
    from prefs.probes.probe import Probe
    from prefs.probes.source import Source

INTERRUPTED = "nothing was written"
# What metrics of a probe are called in print.
METRICS = {"r2": "R²", "pearson": "r", "auc": "AUC"}


@dataclass
class ScoreConfig:
    """What to score with which probe. See `prefs/score.yaml` for what the keys mean."""

    probe: str = MISSING
    text: str | None = None
    text_file: str | None = None
    completion: str | None = None
    completion_file: str | None = None
    max_new_tokens: int = limited(64, at_least(1))
    temperature: float = limited(0.0, TEMPERATURE)
    top_p: float = limited(1.0, SHARE)
    seed: int = limited(0, at_least(0))
    device: str | None = limited(None, DEVICE)
    model_path: str | None = None
    out: str = MISSING


def main() -> None:
    """Score one text; what the user can mend ends in one line and exit code 2."""
    ConfigStore.instance().store(name="score_schema", node=ScoreConfig)
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in prefs.run
    os.environ["HYDRA_FULL_ERROR"] = "1"
    one_line = partial(one_line_errors, enabled=not wants_traceback, interrupted=INTERRUPTED)
    loaded: list[Models] = []

    def job(cfg: DictConfig) -> None:
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        # Before Hydra prints a line of its own. In a sweep it goes on with the other jobs first.
        with nullcontext() if sweep else one_line():
            config = typed(cfg)
            text, completion = texts(config)
            # Imported only now: help and a wrong config should not wait for torch.
            from prefs.models.loading import Models

            if not loaded:
                loaded.append(Models())
            score(config, text, completion, Path(HydraConfig.get().runtime.output_dir), loaded[0])

    with one_line(), claiming_folders():
        sys.argv[1:] = literal(sys.argv[1:])
        try:
            hydra.main(version_base="1.3", config_path=str(Path(__file__).parent), config_name="score")(job)()
        except OSError as error:  # of Hydra, which makes the folder `out`
            if error.filename is None or wants_traceback:
                raise
            raise UserError(f"{error.filename}: {error.strerror}") from error


def literal(arguments: Sequence[str]) -> list[str]:
    """Arguments for Hydra in which what was given for ``text=`` and ``completion=`` is quoted, and so taken as it is.

    To Hydra a bare comma begins a sweep, braces a dictionary, ``${`` an interpolation, and ``null`` is no text.

    Raises
    ------
    UserError
        If one is not Unicode.
    """
    return [
        f"{key}={_quoted(key, value)}" if key in ("text", "completion") and equals else argument
        for argument in arguments
        for key, equals, value in [argument.partition("=")]
    ]


def _quoted(key: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}: not UTF-8; give {key}_file=PATH") from None
    # OmegaConf: a backslash before ${ keeps it from being an interpolation, and those before it are doubled.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    # Hydra: the same for quotes; also the end of the text stands before one.
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + match[2].replace('"', r"\""), text) + '"'


def typed(cfg: DictConfig) -> ScoreConfig:
    """The config as a plain data class, checked.

    Raises
    ------
    ConfigError
        If a value is missing or impossible.
    """
    config = filled(cfg, ScoreConfig)
    if config.text is None and config.text_file is None:
        raise ConfigError("text", None, 'the prompt, as in text="Write a poem.", or text_file=PATH')
    for key in ("text", "completion"):
        if getattr(config, key) is not None and getattr(config, f"{key}_file") is not None:
            raise ConfigError(f"{key}_file", getattr(config, f"{key}_file"), f"null, since there is {key}= as well")
    check_limits(config)
    return config


def texts(config: ScoreConfig) -> tuple[str, str | None]:
    """The prompt and the completion, if one is given; from files if that is where they are.

    Raises
    ------
    ConfigError
        If the prompt is empty, or a file cannot be read.
    """
    text = _given("text", config.text, config.text_file) or ""
    if not text.strip():
        raise ConfigError("text", text, "a prompt that is not empty")
    return text, _given("completion", config.completion, config.completion_file)


def _given(key: str, text: str | None, file: str | None) -> str | None:
    """A text from the command line or from a file."""
    if file is None:
        return text
    try:
        return Path(file).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{key}_file", file, "a UTF-8 file") from None
    except OSError as error:
        raise ConfigError(f"{key}_file", file, f"a file that can be read ({error.strerror})") from None


def score(config: ScoreConfig, text: str, completion: str | None, folder: Path, models: Models) -> Applied:
    """Score a text with a saved probe, write the page and the record to a folder, and print what was found.

    Raises
    ------
    UserError
        If the probe, the model or the text is not what it has to be, or the disk refuses.
    """
    from prefs.models.types import Sampling
    from prefs.probes.apply import apply
    from prefs.probes.card import load_probe
    from prefs.probes.page import page, record
    from prefs.probes.source import Source

    saved = load_probe(Path(config.probe).expanduser())
    probe, source = saved.probe, Source.read(saved)
    spec = source.rater(config.device, config.model_path)
    models.keep_only([spec])
    sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens)
    applied = apply(probe, source, models.get(spec), text, completion, sampling, config.seed)  # type: ignore[arg-type]
    content = {
        "probe": {"kind": probe.kind, "target": probe.target, **probe.site._asdict()},
        "model": source.model.name,
        "scale": list(source.scale),
        "metrics": dict(source.metrics),
        **record(applied),
    }
    facts = _facts(probe, source, applied)
    html = page(applied, title=f"{probe.target}: probe at {probe.site}", position=probe.site.position, facts=facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoded = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode()
        write_durably(folder / "score.json", encoded)
        write_durably(folder / "score.html", html.encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    _print(facts, folder / "score.html")
    return applied


def _facts(probe: Probe, source: Source, applied: Applied) -> dict[str, str]:
    """What there is to say, by name."""
    from prefs.results.terminal import number

    low, high = source.scale
    known = [f"{name} {number(source.metrics[key])}" for key, name in METRICS.items() if key in source.metrics]
    facts = {
        "predicted": f"{number(applied.prediction)} on a scale from {low:g} to {high:g}",
        "of": probe.target,
        "probe": f"{probe.kind} at {probe.site} of {source.model.name}",
        "on held-out tasks": ", ".join(known) or "not in the probe's card",
    }
    if applied.thought is not None:
        facts["thought"] = applied.thought
    if (written := applied.written) is not None:
        cut = "" if written.finished else f" (cut off after {written.tokens} tokens)"
        facts["completion, by the model"] = f"{written.text}{cut}"
    return facts


def _print(facts: Mapping[str, str], page: Path) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from prefs.results.html import printable
    from prefs.results.terminal import console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for fact, value in facts.items():
        table.add_row(fact, Text(str(printable(value)), style="bold" if fact == "predicted" else ""))
    output = console()
    output.print(table)
    output.print(f"token by token  {page}", soft_wrap=True)


if __name__ == "__main__":
    main()
