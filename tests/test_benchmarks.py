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


@pytest.mark.parametrize("bad, message", [
    ('{"question": ', ":2: "),
    ({"foo": 1}, ":2: .*foo.*question, answer.*test_list.*instruction_id_list"),
    ({"question": "Q", "answer": "18"}, ":2: "), ({"question": None, "answer": "#### 1"}, ":2: "),
    ({"problem": "P", "solution": "no box"}, ":2: "),
    ({"Body": 1, "Question": "Q", "Answer": 1}, ":2: "),
    ({"text": "T", "code": "", "test_list": []}, ":2: "),
    ({"question": "Q", "answer": "#### "}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": {"kind": "vibes"}}, ":2: "),
    ({"prompt": "P", "domain": "d", "check": 3}, ":2: "),
    ({"prompt": "P", "instruction_id_list": ["a"], "kwargs": []}, ":2: "),
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
