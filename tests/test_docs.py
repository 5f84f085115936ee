"""What the README claims is true: files, line counts, flags, and the import rules of the design."""
import ast
import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(f"recipes/{path.name}" for path in ROOT.glob("recipes/*.md"))
FILES = sorted(path.name for path in ROOT.glob("*.py"))
# Imports point down: a file may import those of lower floors (and `common`).
FLOORS = [["common", "kernels", "sandbox"], ["tokenizer", "answers", "checkpoint"],
          ["model", "tasks"], ["data", "sample"], ["pretrain", "sft", "reward", "evaluate"],
          ["dpo", "grpo", "scaling", "quality"]]


def test_the_table_names_every_file_with_its_line_count():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert {name: int(n) for name, n in rows.items()} == lines


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 300


@pytest.mark.parametrize("document", ["README.md", "demo.sh", "LOG.md", *RECIPES])
def test_every_flag_named_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    for stage, rest in re.findall(r"\b(\w+)\.py((?: [^\n`|]*)?)", text):
        if f"{stage}.py" not in FILES or stage in ("tokenizer", "kernels"):
            continue
        module = importlib.import_module(stage)
        if hasattr(module, "Args"):
            known = {f.name for f in fields(module.Args)} | {"help"}
            assert set(re.findall(r"(?<= )--(\w+)", rest)) <= known, (stage, rest)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    floor = next(i for i, names in enumerate(FLOORS) if name[:-3] in names)
    below = {n for names in FLOORS[:floor] for n in names} | {"common"}
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        for imported in names:
            if f"{imported}.py" in FILES:
                assert imported in below, f"{name} imports {imported}, which is not below it"
