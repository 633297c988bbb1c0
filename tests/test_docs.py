"""What the README and the docs tell to type: every command composes, and every YAML means what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_app import shipped_configs

from prefs.config import Config, typed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page.name, *block) for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)]
# The group of each YAML, by its name. Those of extending.md need its Python beside them: see tests/test_extending.py.
GROUPS = {"quiz": "dataset", "liking": "template", "enjoyed": "template", "courage": "concept", "mistral7b": "model"}
GROUPS |= {"theirs": "model"}
SNIPPETS = [text for page, kind, text in BLOCKS if kind == "yaml" and page != "extending.md"]
# What the reader has and we have not.
THEIRS = {"/data/wild": "there", "RUN/concept/liking_math": "there"}
THEIRS |= {"outputs/2026-11-24/19-04-27/concept/courage": "there"}


def commands() -> list[str]:
    """Those of the job's program, without comments; and those inline."""
    lines = [line for _, kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    lines += [code for page in PAGES for code in re.findall(r"(?<!`)`(python -m [^`\n]+)`(?!`)", page.read_text())]
    written = [re.split(r"\s#|\s&&|\)", line)[0].strip() for line in lines if line.startswith("python -m prefs.run ")]
    return [
        line
        for line in dict.fromkeys(written)
        if not re.search("--help|--cfg|my_probes|sign_diff|middle_compl|…", line)
    ]


def composed(overrides: list[str], folder: Path) -> Config:
    """The config that a job with these overrides would have, of a user with our snippets in `my_conf`."""
    for text in SNIPPETS:
        name = next(iter(yaml.safe_load(text))) if "name" not in yaml.safe_load(text) else yaml.safe_load(text)["name"]
        file = folder / "my_conf" / GROUPS[name] / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "tasks.jsonl").write_text('{"prompt": "Hello"}\n')
    (folder / "there").mkdir(exist_ok=True)
    GlobalHydra.instance().clear()
    with shipped_configs():
        own = f"hydra.searchpath=[file://{folder}/my_conf]"
        return typed(compose("config", overrides=[own, *overrides]))


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_every_command_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for theirs, ours in THEIRS.items():
        command = command.replace(theirs, ours)
    arguments = [word for word in shlex.split(command)[3:] if word not in ("-m", "--config-dir", "my_conf")]
    # One job of a sweep with the first of its values, and one with the last.
    parsed = OverridesParser.create().parse_overrides(arguments)
    for which in (0, -1) if any(override.is_sweep_override() for override in parsed) else (0,):
        job = [
            f"{override.input_line.partition('=')[0]}={list(override.sweep_string_iterator())[which]}"
            if override.is_sweep_override()
            else str(override.input_line)
            for override in parsed
            if not override.key_or_group.startswith("hydra")
        ]
        composed(job, tmp_path)


def test_every_template_has_the_scale_that_its_question_names(tmp_path: Path):
    names = [name for name, group in GROUPS.items() if group == "template"]
    for template in composed([f"template=[{','.join(names)}]"], tmp_path).template.values():
        for option in template.options:
            for word in (option.say, *option.also):
                assert template.read(word) == option.value
        if ends := re.search(r"[Ff]rom (-?\d+).* to (-?\d+)", template.question):
            assert (min(template.values), max(template.values)) == tuple(map(float, ends.groups()))
            assert len(template.options) == float(ends[2]) - float(ends[1]) + 1
        assert all(option.say.casefold() in template.question.casefold() or ends for option in template.options)
    assert len(composed(["template=liking"], tmp_path).template["liking"].options) == 11
