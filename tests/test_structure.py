"""The house: no cycles of imports, no module that is too long, few entries at the top, and light programs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "prefs"
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The modules of prefs that a module imports when it is imported itself: not within functions, nor for types."""
    imported: set[str] = set()
    for statement in ast.parse(MODULES[name].read_text()).body:
        if isinstance(statement, ast.ImportFrom):
            module = statement.module or ""
            names = [f"{module}.{alias.name}" for alias in statement.names]
            imported |= {name if name in MODULES else module for name in names}
        if isinstance(statement, ast.Import):
            imported |= {alias.name for alias in statement.names}
    return imported & MODULES.keys()


def test_imports_have_no_cycle():
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()  # CycleError names one


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_at_most_450_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 450


def test_few_entries_at_the_top():
    entries = {path.name for path in ROOT.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert len(entries) <= 20, sorted(entries)


def test_a_wrong_config_and_help_import_nothing_heavy():
    heavy = ("torch", "transformers", "transformer_lens", "lightning", "wandb", "matplotlib", "datasets", "pandas")
    program = f"import sys, prefs.run, prefs.config; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
