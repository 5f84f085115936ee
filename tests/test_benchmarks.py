"""tasks/benchmarks.py: every row of the public files, each format by example, bad rows."""
import gzip
import json
import re

import pytest

from lib.args import InputError
from tasks.benchmarks import load_file


@pytest.mark.parametrize("name, count, kind", [
    ("math/gsm8k_test", 1319, "math"), ("math/gsm8k_train", 7473, "math"),
    ("math/svamp_test", 1000, "math"), ("math/mgsm_zh", 250, "math"),
    ("math/math500", 500, "math"), ("code/humaneval", 164, "code"),
    ("code/mbpp_train", 474, "code"),
    ("code/mbpp_sanitized_train", 170, "code"), ("ifeval/ifeval_input", 541, "ifeval")])
def test_reads_every_row(shared, name, count, kind):
    queries = load_file(shared / f"{name}.jsonl")
    assert len(queries) == count
    assert all(q["check"]["kind"] == kind and q["prompt"].strip() and q["domain"] for q in queries)


def test_reference_code_passes_the_tests_that_were_read(shared):
    for name, solution in (("humaneval", "canonical_solution"), ("mbpp_train", "code")):
        path = shared / f"code/{name}.jsonl"
        rows = map(json.loads, path.read_text("utf-8").splitlines())
        for query, row in list(zip(load_file(path), rows, strict=True))[:30]:
            prefix, tests = query["check"].get("prefix", ""), query["check"]["tests"]
            exec(f"{prefix}{row[solution]}\n{tests}", {})
            with pytest.raises((AssertionError, NameError, TypeError)):
                exec(f"{prefix and prefix + '    pass'}\n{tests}", {})


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def test_readers_by_example(tmp_path):
    gsm8k = {"question": "Q?", "answer": "2*9=<<2*9=18>>18\n#### 18"}
    assert load_file(write(tmp_path, gsm8k)) == [
        {"prompt": "Q?", "domain": "mathematics", "check": {"kind": "math", "answer": "18"}}]
    svamp = {"Body": "Tom has 3 pens", "Question": "How many?", "Answer": 3.0, "Equation": "3"}
    assert load_file(write(tmp_path, svamp))[0]["prompt"] == "Tom has 3 pens. How many?"
    assert load_file(write(tmp_path, svamp))[0]["check"]["answer"] == "3"
    asked, empty = {"role": "user", "content": "几？"}, {"role": "assistant", "content": ""}
    mgsm = {"messages": [asked, empty], "answer": "18"}
    assert load_file(write(tmp_path, mgsm))[0]["prompt"] == "几？"
    for messages in ([asked], [asked, empty | {"content": "18"}], [empty, empty]):
        with pytest.raises(InputError, match="cannot read"):
            load_file(write(tmp_path, mgsm | {"messages": messages}))
    math = {"problem": "P", "solution": r"\boxed{1} is wrong, \boxed{\frac{1}{2}}"}
    assert load_file(write(tmp_path, math))[0]["check"]["answer"] == r"\frac{1}{2}"
    mbpp = {"text": "Double it.", "code": "", "test_list": ["assert f(1) == 2", "assert f(2) == 4"],
            "test_setup_code": "y = 1"}
    query = load_file(write(tmp_path, mbpp))[0]
    assert "assert f(1) == 2" in query["prompt"] and "f(2)" not in query["prompt"]
    assert query["check"]["tests"] == "y = 1\nassert f(1) == 2\nassert f(2) == 4\n"
    ifeval = {"prompt": "P", "instruction_id_list": ["detectable_format:number_bullet_lists"],
              "kwargs": [{"num_bullets": 3, "m": None}]}
    assert load_file(write(tmp_path, ifeval))[0]["check"]["kwargs"] == [{"num_bullets": 3}]
    for wrong in ({"instruction_id_list": ["a:b"]}, {"kwargs": [{"n": 3}]}, {"kwargs": []}):
        with pytest.raises(InputError, match="cannot read"):
            load_file(write(tmp_path, ifeval | wrong))
    own = {"prompt": "P", "domain": "logic", "check": {"kind": "math", "answer": "3"}}
    assert load_file(write(tmp_path, own)) == [own]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(own).encode()))
    assert load_file(path) == [own]


BAD_RULES = [
    ("keywords:existence", {"keywords": "sea"}, "keywords must be a list"),
    ("ours:exact_words", {"n": "5"}, "n must be a whole number"),
    ("ours:start_word", {"word": 3}, "word must be a text")]


@pytest.mark.parametrize("bad, message", [
    ('{"question": ', ":2: "),
    ({"foo": 1}, ":2: .*foo.*question, answer.*test_list.*instruction_id_list"),
    ({"question": "Q", "answer": "word " * 30}, ":2: .*####"),
    ({"question": None, "answer": "#### 1"}, ":2: "),
    ({"problem": "P", "solution": "no box"}, ":2: "),
    ({"Body": 1, "Question": "Q", "Answer": 1}, ":2: "),
    ({"text": "T", "code": "", "test_list": []}, ":2: "),
    ({"question": "Q", "answer": "#### "}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": {"kind": "vibes"}}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": 3}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": {"kind": "math", "answer": " "}}, ":2: .*empty"),
    ({"prompt": "P", "domain": "d", "check": {"kind": "math", "answer": 3}}, ":2: .*got int"),
    ({"prompt": "P", "domain": "d", "check": {"kind": "code", "language": "python", "tests": ""}},
     ":2: .*tests must not be empty"),
    ({"prompt": 3, "domain": "d", "check": {"kind": "math", "answer": "3"}}, ":2: "),
    ({"prompt": [{"role": "user", "content": 3}], "domain": "d",
      "check": {"kind": "math", "answer": "3"}}, ":2: .*content"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "domain": "d",
      "check": {"kind": "math", "answer": "3"}}, ":2: .*image"),
    ({"prompt": "P", "ability": "code", "reward_model": {"ground_truth": "{}"}}, ":2: .*ability"),
    ({"prompt": "P", "instruction_id_list": ["a"], "kwargs": []}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": {"kind": "rules"}}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": {
        "kind": "rules", "instruction_id_list": ["ours:no"], "kwargs": [{}]}}, ":2: .*ours:no"),
    ({"prompt": "P", "domain": "d", "check": {
        "kind": "rules", "instruction_id_list": ["ours:exact_words"], "kwargs": [{}]}}, ":2: "),
    ({"prompt": "P", "domain": "total", "check": {"kind": "math", "answer": "3"}}, ":2: .*total"),
    *[({"prompt": "P", "domain": "d", "check": {
        "kind": "rules", "instruction_id_list": [rule], "kwargs": [arguments]}}, f":2: .*{words}")
      for rule, arguments, words in BAD_RULES],
    *[({"prompt": "P", "domain": "d", "check": {
        "kind": "math", "answer": "3", "system_rule": [rule, arguments]}}, f":2: .*{words}")
      for rule, arguments, words in [*BAD_RULES, ("ours:no", {}, "ours:no")]],
    ({"prompt": "P", "domain": "d", "check": {
        "kind": "math", "answer": "3", "system_rule": "Sure"}}, ":2: "),
    ({"Body": "B", "Question": "Q", "Answer": float("inf")}, ":2: ")])
def test_bad_rows_name_file_and_line(tmp_path, bad, message):
    path = write(tmp_path, {"question": "Q?", "answer": "#### 1"}, bad)
    with pytest.raises(InputError, match=re.escape(str(path)) + message):
        load_file(path)


def test_empty_or_missing_file(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        load_file(write(tmp_path, ""))
    with pytest.raises(InputError):
        load_file(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("answer, gold", [
    ("1/2", "1/2"), (18, "18"), (27.0, "27"), (0.5, "0.5"), (["2"], "2"), ([3.0], "3"),
    (None, None), ([], None), (["2", "3"], None), ({"value": 2}, None), (True, None),
    ([None], None), (float("nan"), None), ("", None)])
@pytest.mark.parametrize("columns", ["question", "problem", "prompt", "Body", "verl"])
def test_golds_are_texts_or_refused(tmp_path, answer, gold, columns):
    """A gold is never the Python spelling of something else, in any shape of row."""
    row = {columns: "Q?", "answer": answer}
    if columns == "Body":
        row = {"Body": "B.", "Question": "Q?", "Answer": answer}
    if columns == "verl":
        row = {"prompt": [{"role": "user", "content": "Q?"}], "ability": "MATH",
               "reward_model": {"style": "rule", "ground_truth": answer}}
    path = write(tmp_path, row)
    if gold is None:
        with pytest.raises(InputError, match=":1: "):
            load_file(path)
    else:
        assert load_file(path)[0]["check"] == {"kind": "math", "answer": gold}


def test_final_answers(tmp_path):
    """A worked solution states its answer; a short text is one."""
    solution = "Work it out.\nTherefore, the answer is: 180."
    rows = [{"problem": "P", "solution": solution}, {"prompt": "P", "answer": solution},
            {"question": "P", "answer": solution}, {"question": "P", "answer": "180"},
            {"question": "P", "answer": "90 * 2\n#### 180"},
            {"problem": "P", "solution": "So \\boxed{180}.", "answer": None},
            {"problem": "P", "solution": "So $\\boxed 8$."},
            {"question": "P", "answer": "Behind #### it stands.\n#### 180\nI checked it."},
            {"prompt": "P", "answer": "A: 12"}, {"prompt": "P", "answer": "B: 12"}]
    answers = [q["check"]["answer"].strip() for q in load_file(write(tmp_path, *rows))]
    assert answers == ["180"] * 6 + ["8", "180", "A: 12", "B: 12"]


def test_arrays_and_byte_order_marks(tmp_path):
    """Both are read as JSONL is; what is broken in an array is named as in any other file."""
    rows = [{"question": "Q?", "answer": "#### 1"}, {"question": "R?", "answer": "#### 2"}]
    queries = load_file(write(tmp_path, *rows))
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2)):
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_text(text, encoding)
            assert load_file(path) == queries
    lines = write(tmp_path, *rows)
    lines.write_text(lines.read_text("utf-8"), "utf-8-sig")
    assert load_file(lines) == queries
    for text, message in (("[1]", ":1: "), ("[]", "no rows"),
                          (json.dumps(rows)[:-3], ":1: not JSON"),
                          (json.dumps([rows[0], {"a": 1}]), ":2: unknown columns a")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_file(path)


def test_prompts_of_messages(tmp_path):
    """Parts of text become a text, and the item that contamination is measured on is a text."""
    parts = [{"type": "text", "text": "Name "}, {"text": "it."}]
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, {"role": "user", "content": parts}], "domain": "d",
           "check": {"kind": "math", "answer": "5"}}
    (query,) = load_file(write(tmp_path, row))
    assert query["prompt"] == [system, {"role": "user", "content": "Name it."}]
    assert query["item"] == "Name it."


def test_mbpp_plus_keeps_its_tests(tmp_path):
    row = {"prompt": "Square.", "code": "x", "test_list": ["assert f(2) == 4"], "test_imports": [],
           "test": "assert f(3) == 9"}
    (query,) = load_file(write(tmp_path, row))
    assert query["check"]["tests"] == "assert f(2) == 4\nassert f(3) == 9\n"
    assert query["solution"] == "x"
