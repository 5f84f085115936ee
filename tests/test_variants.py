"""tasks/variants.py: right solutions in other languages, system prompts that are kept, turns that
depend on each other; none of them in the default queries."""
import itertools
import json
import random
import re

import pytest
from helpers import refuses, stage_args

import tasks.queries
from tasks import __main__ as program
from tasks import sandbox, toy, variants
from tasks.queries import VARIANTS, distinct, load, score, score_many

MISSING = {name for name, problem in sandbox.languages().items() if problem}


@pytest.mark.parametrize("variant", [*VARIANTS])
def test_answers_pass_their_checks(variant):
    """Every generator's answer passes its own check; an empty one and another task's do not."""
    if variant in MISSING:
        pytest.skip(f"no {variant} on this machine")
    n = 4 if variant == "c++" else 12  # it has to be compiled
    pairs = distinct("sft", n, 3, [variant])
    queries = [query for query, _ in pairs]
    answers = [answer for _, answer in pairs]
    assert score_many(queries, answers) == [1.0] * n
    assert sum(score_many(queries, [""] * n)) == 0
    assert sum(score_many(queries, answers[1:] + answers[:1])) <= 1  # two may have equal answers


BODIES = [body for *_, body in toy.NUMBER_TASKS]


def test_translation_by_hand():
    """A loop with a condition, a choice, two statements: braces open and close with the blocks."""
    loop = toy.loop("out = []", "x in xs", "x % 2 == 1", "out.append(abs(x))", "out")
    assert variants.translate(loop, "javascript").split("\n") == [
        "    let out = [];", "    for (let x of xs) {", "        if (x % 2 != 0) {",
        "            out.push(Math.abs(x));", "        }", "    }", "    return out;"]
    choice = toy.branch("n > 3 and n % 2 == 0", "True", "False")
    assert variants.translate(choice, "c++").split("\n") == [
        "    if (n > 3 && n % 2 == 0) {", "        return true;", "    }", "    return false;"]


def test_every_exercise_is_translated():
    """1000 draws use every kind of number task, and no Python is left in any of them."""
    r = random.Random(0)
    for language in ("javascript", "c++"):
        tasks_of = [variants.brace_code(r, language) for _ in range(1000)]
        kinds = {re.sub(r"\d+", "", task.prompt.split(" that ")[1]) for task in tasks_of}
        assert len([kind for kind in kinds if "n " in kind]) >= len(BODIES)
        for task in tasks_of:
            (answer,) = task.responses
            assert not re.search(r"\bdef\b|\bTrue\b|\band\b|append|:$", answer, re.M), answer


def test_a_broken_system_rule_scores_nothing():
    """A right answer that does not keep to the system prompt is wrong; one that does is right."""
    check = {"kind": "math", "answer": "5", "system_rule": ["ours:start_word", {"word": "Sure"}]}
    query = {"prompt": "p", "domain": "system", "check": check}
    assert score(query, "Sure. \\boxed{5}") == 1
    assert score(query, "\\boxed{5}") == score(query, "Sure. \\boxed{6}") == 0
    words = {query["prompt"][0]["content"].split(":")[0]
             for query, _ in itertools.islice(tasks.queries.items("rl", "system", 0), 60)}
    assert len(words) == 5  # four opening words, and the closings


def test_second_turn_depends_on_the_first():
    """The second answer, computed from the first one's box."""
    for query, _ in itertools.islice(tasks.queries.items("sft", "turns", 0), 50):
        first, said, second = [message["content"] for message in query["prompt"]]
        number = int(re.search(r"boxed\{(\d+)\}", said)[1])
        k = int(re.search(r"\d+", second)[0])
        expected = number + k if "Add" in second else number * k
        assert query["check"]["answer"] == str(expected)


@pytest.mark.parametrize("variant", ["system", "turns"])
def test_no_question_leaves_its_split(variant):
    """Under a system prompt or before a second turn stands a question of the same split."""
    for query, _ in itertools.islice(tasks.queries.items("test", variant, 1), 100):
        question = next(m["content"] for m in query["prompt"] if m["role"] == "user")
        assert tasks.queries.split_of(question) == "test" == tasks.queries.split_of(query["prompt"])


def test_sources_are_joined(tmp_path):
    """One source after another, n of each; a variant of a split; an empty list is refused."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "2 + 3?", "answer": "#### 5"}) + "\n", "utf-8")
    joined = load(f"val,turns:rl,{path}", 4, 1)
    assert joined == load("val", 4, 1) + load("turns:rl", 4, 1) + load(str(path))
    assert {query["domain"] for query in load("turns:rl", 4)} == {"turns"}
    refuses(lambda: load(","), "names no source")
    refuses(lambda: load("turns:no_such_split"), "turns:no_such_split")


def test_a_missing_toolchain_is_said(monkeypatch, capsys):
    """The language is left out with one line, and refused where nothing else is asked for."""
    monkeypatch.setattr(tasks.queries.sandbox, "languages", lambda: {"c++": "apt-get install g++"})
    assert load("val,c++:val", 4) == load("val", 4)
    assert "c++:val is left out: no toolchain here (apt-get install g++)" in capsys.readouterr().out
    refuses(lambda: load("c++:val"), "names no source")


def test_demonstrations_with_variants(tmp_path):
    """A tenth each, the rest as without them; an unknown variant is refused."""
    path = tmp_path / "rows.jsonl"
    program.demonstrations(stage_args(program, n=20, also="system,turns", out=str(path)))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows[:16] == tasks.queries.demonstrations(16)
    assert [row["domain"] for row in rows[16:]] == ["system"] * 2 + ["turns"] * 2
    roles = [[message["role"] for message in row["messages"]] for row in rows[15:]]
    assert roles[0] == ["user", "assistant"] and roles[1] == ["system", *roles[0]]
    assert roles[-1] == roles[0] * 2
    bad = stage_args(program, n=20, also="fortran", out=str(path))
    refuses(lambda: program.demonstrations(bad), "--also")
