"""What the documents claim is true: files, flags, quoted lines, printed results."""
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import ENV

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(f"recipes/{path.name}" for path in ROOT.glob("recipes/*.md"))
FILES = sorted(path.name for path in ROOT.glob("*.py"))
PROGRAMS = ["data", "data.quality", "data.label", "lib.report"]  # run by python -m


def test_the_readme_leads_to_every_file():
    links = set(re.findall(r"\]\(([^)]+)\)", README))
    assert set(FILES) <= links and {"data", "tasks", "lib"} <= links


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_first_hacks_change_lines_that_exist():
    """README says which expressions to replace."""
    for name, line in (("dpo", "-F.logsigmoid(reward_chosen - reward_rejected)"),
                       ("grpo", "rewards.mean(dim=1, keepdim=True)")):
        assert line in (ROOT / f"{name}.py").read_text("utf-8")
    assert "`-F.logsigmoid(reward_chosen - reward_rejected)`" in README


@pytest.mark.parametrize("document", ["README.md", "demo.sh", *RECIPES])
def test_every_flag_named_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"\b(\w+)\.py((?: [^\n`|]*)?)", text)
    commands += re.findall(r"python -m ([\w.]+)((?: [^\n`|]*)?)", text)
    for stage, rest in commands:
        if f"{stage}.py" not in FILES and stage not in PROGRAMS or stage in (
                "tokenizer", "kernels"):
            continue
        module = importlib.import_module("data.__main__" if stage == "data" else stage)
        if hasattr(module, "Args"):
            known = {f.name for f in fields(module.Args)} | {"help"}
            assert set(re.findall(r"(?<= )--(\w+)", rest)) <= known, (stage, rest)


# ---------------------------------------------------------------------------------------------
# the course

LESSONS = sorted(path.name for path in ROOT.glob("docs/0*.md"))
DOCUMENTS = ["README.md", *RECIPES, *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", read(document)):
        assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"
    for name in re.findall(r"`((?:docs|recipes|tests|bench|exercises)/[\w./-]+)`", read(document)):
        assert (ROOT / name).exists(), f"{document}: {name}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_quoted_line_stands_in_its_file(lesson):
    quotes = re.findall(r"^> `([\w/]+\.py)` · `(.*)`$", read(f"docs/{lesson}"), re.M)
    for name, line in quotes:
        assert flat(line) in flat(read(name)), f"{name} has no line {line!r}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_the_documents_prints_what_they_say(document, capsys):
    for code, expected in re.findall(r"```python\n(.*?)```\n```\n(.*?)```", read(document), re.S):
        exec(compile(code, document, "exec"), {})
        assert capsys.readouterr().out == expected, code


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_has_all_its_parts(lesson):
    text, number = read(f"docs/{lesson}"), int(lesson[:2])
    for part in ("## Try it", "## Exercises", "## Questions people ask", ".png)"):
        assert part in text, part
    assert f"`exercises/lesson{number}.py`" in text
    written = re.search(r"## Exercises\n(.*?)\n## ", text, re.S)[1]
    for name in re.findall(r"^def (\w+)", read(f"exercises/lesson{number}.py"), re.M):
        assert f"`{name}`" in written, name


def test_the_map_of_the_report_names_what_exists():
    rows = re.findall(
        r"\| `([\w.]+)\.(\w+)` \| `(\w+)\.(\w+)` \|$", read("docs/report-map.md"), re.M
    )
    assert len(rows) == read("docs/report-map.md").count("\n|") - 2
    for module, name, test_file, test in rows:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
        assert f"def {test}(" in read(f"tests/{test_file}.py"), f"{test_file}.{test}"


@pytest.mark.slow
def test_the_commands_of_the_course_run(tmp_path):
    """In the order of the lessons, each from what the one before left in runs/; then README's that
    look into it."""
    assert "or look inside:" in README and "Each stage also runs alone" in README
    look = README.partition("or look inside:")[2].partition("Each stage also runs alone")[0]
    for lesson, text in [*((name, read(f"docs/{name}")) for name in LESSONS), ("README", look)]:
        for block in re.findall(r"(?<=\n\n)```\n(.*?)```", text, re.S):
            for command in block.splitlines():
                program, *arguments = shlex.split(command, comments=True)
                assert program == "python", command
                if arguments[0] != "-m":
                    arguments[0] = str(ROOT / arguments[0])
                arguments = [word.replace("runs/demo/", "runs/") for word in arguments]
                done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=ENV,
                                      stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                      timeout=600)
                assert done.returncode == 0, f"{lesson}: {command}\n{done.stderr[-2000:]}"


def test_the_r_numbers_in_the_code_can_be_looked_up():
    known = set()
    rows = re.findall(r"^\| R(\d+\.\d+)(?:–R\d+\.(\d+))? \|", read("docs/requirements.md"), re.M)
    for first, last in rows:
        group, start = first.split(".")
        known |= {f"{group}.{n}" for n in range(int(start), int(last or start) + 1)}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        cited = set(re.findall(r"\bR(\d+\.\d+)", path.read_text(encoding="utf-8")))
        assert cited <= known, f"{path.name}: R{sorted(cited - known)}"
