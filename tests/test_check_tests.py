"""tasks/check_tests.py: tests that decide nothing are refused, and only these. The oracles are a
right answer, which must pass what is accepted, and a wrong one, which must not."""
import json
import os

import pytest
from helpers import refuses, stage_args, write_rows

import tasks.queries
from tasks import __main__ as program
from tasks import sandbox
from tasks.benchmarks import load_file
from tasks.check_tests import find_problems

pytestmark = pytest.mark.skipif(os.name != "posix", reason="run() needs POSIX")
isolated = pytest.mark.skipif(
    os.name != "posix" or not sandbox.is_isolated(),
    reason="without isolation the code of a file is not tried when it is loaded")
SQUARES = {"python": "def f(x):\n    return x * x\n"}
SQUARES |= {name: code for name, (code, _) in sandbox.SAMPLES.items()}
UNIT = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        " \
       "self.assertEqual(f(3), 9)\n"
RUN = "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))"
DECIDE = {
    "python": [
        "assert f(3) == 9", "def test_f():\n    assert f(3) == 9\ntest_f()", "assert not f(3) - 9",
        "def check(g):\n    assert g(3) == 9\ncheck(f)", "if f(3) != 9:\n    raise SystemExit(1)",
        "import sys\nif f(3) != 9:\n    sys.exit('bad')", "assert f(3) == 9  # exit early",
        "x = f(3)\n# if it is 9, then exit\nassert x == 9",
        f"{UNIT}assert {RUN}.wasSuccessful()", "import numpy as np\nassert np.isclose(f(3), 9)"],
    "javascript": [
        "console.assert(f(3) === 9) // async, then exit",
        "const assert = require('assert');\nassert.equal(f(3), 9)",
        "if (f(3) !== 9) process.exit(1)", "const y = f(3);\nif (y !== 9) throw new Error('no')"],
    "bash": ["[ $(f 3) = 9 ]", "[ $(f 3) = 9 ] || exit 1", "[ $(f 3) = 9 ] || exit",
             "t() { [ $(f 3) = 9 ]; }\nt", "! [ $(f 3) = 6 ]", "[ $(f 3) = 9 ] && echo ok"],
    "rust": ["fn main() { assert_eq!(f(3), 9); }"],
    "c": ["int main() { assert(f(3) == 9); }", "int main() { return f(3) == 9 ? 0 : 1; }"],
    "perl": ["die unless f(3) == 9;"]}
NOTHING = {
    "python": [
        "pass", "# none", "assert True", "f(3) == 9", "print(f(3) == 9)", "import doctest",
        "def test_f():\n    assert f(3) == 9", "def check(g):\n    assert g(3) == 9",
        "if __name__ == '__main__':\n    assert f(3) == 9", UNIT, UNIT + RUN,
        "class Test:\n    def test(self):\n        assert f(3) == 9",
        "async def test():\n    assert f(3) == 9",
        "try:\n    assert f(3) == 9\nexcept Exception:\n    print('bad')",
        "if f(3) == 9:\n    print('good')"],
    "javascript": ["console.log(f(3) === 9)", "function t() { console.assert(f(3) === 9) }", "//",
                   "test('f', () => { expect(f(3)).toBe(9) })",
                   "describe('f', () => { it('s', () => { console.assert(f(3) === 9) }) })"],
    "bash": ["f 3", "# none", "t() { [ $(f 3) = 9 ]; }", "[ $(f 3) = 9 ] && echo ok || echo no"],
    "rust": ["#[test]\nfn s() { assert_eq!(f(3), 9); }\nfn main() {}"],
    "c": ["int main() { return 0; }"], "perl": ["sub t { die unless f(3) == 9; }"]}
NEVER = {
    "python": ["from solution import f\nassert f(3) == 9", "import pandas\nassert f(3) == 9",
               "import pytest\nassert f(3) == pytest.approx(9)", "assert f(3) ="],
    "javascript": ["const {f} = require('./solution'); console.assert(f(3) === 9)",
                   "import {f} from './solution.js'; console.assert(f(3) === 9)"],
    "bash": ["source ./solution.sh\n[ $(f 3) = 9 ]", "@test 's' {\n  [ $(f 3) = 9 ]\n}"]}
ENDS = {
    "python": [
        "assert f(3) == 9\nimport sys\nsys.exit(0)", "assert f(3) == 9\nexit()",
        f"{UNIT}unittest.main()",
        f"{UNIT}unittest.main(exit=False)", "import sys\nsys.exit(0 if f(3) == 9 else 1)",
        "import sys\nsys.exit(f(3) != 9)", "assert f(3) == 9\nraise SystemExit", "import os\n"
        "def main():\n    assert f(3) == 9\n    os._exit(0)\nmain()"],
    "javascript": ["console.assert(f(3) === 9); process.exit(0)",
                   "process.exit(f(3) === 9 ? 0 : 1)"],
    "bash": ["[ $(f 3) = 9 ]\nexit 0", "[ $(f 3) = 9 ]; exit $?",
             "if [ $(f 3) = 9 ]; then exit 0; else exit 1; fi"],
    "c": ["#include <stdlib.h>\nint main() { assert(f(3) == 9); exit(0); }"],
    "rust": ["fn main() { std::process::exit(if f(3) == 9 { 0 } else { 1 }) }"],
    "perl": ["exit(f(3) == 9 ? 0 : 1);"]}
NO_MAIN = {"rust": ["mod tests {\n    #[test]\n    fn s() { assert_eq!(super::f(3), 9); }\n}"],
           "c": ["void test() { assert(f(3) == 9); }"]}


def query_of(language, tests, **more):
    check = {"kind": "code", "language": language, "tests": tests}
    return {"prompt": "p", "domain": "code", "check": check, **more}


def all_of(kind):
    return [query_of(language, tests) for language, texts in kind.items() for tests in texts
            if not sandbox.languages()[language]]


def test_what_decides_is_accepted():
    """Right code scores 1, wrong code 0, and an answer that does nothing was not let pass."""
    queries = all_of(DECIDE)
    assert find_problems(queries) == [""] * len(queries)
    right = [SQUARES[query["check"]["language"]] for query in queries]
    wrong = [code.replace("*", "+") for code in right]
    assert find_problems([query_of("python", "assert not odd(4)"),
                          query_of("python", "assert odd(3)")]) == ["", ""]
    assert tasks.queries.score_many(queries, right) == [1.0] * len(queries)
    assert tasks.queries.score_many(queries, wrong) == [0.0] * len(queries)


@pytest.mark.parametrize("kind, words", [
    (NOTHING, "an answer pass that does nothing"), (NEVER, "let no answer pass: "),
    ({"bash": ["set +e\n[ $(f 3) = 9 ]\necho done", "set +eu; f 3"]}, "turn off `set -e`"),
    ({"javascript": ["f(3).then(y => console.assert(y === 9))",
                     "(async () => { console.assert(await f(3) === 9) })()"]}, "a promise"),
    (ENDS, "end the program"), (NO_MAIN, "must hold main()")])
def test_what_decides_nothing_is_refused(kind, words):
    queries = all_of(kind)
    accepted = [query["check"]["tests"] for query, problem in
                zip(queries, find_problems(queries), strict=True) if words not in problem]
    assert not accepted


def test_the_own_solution_must_pass():
    right, wrong = SQUARES["python"], SQUARES["python"].replace("*", "+")
    queries = [query_of("python", "assert f(3) == 9", solution=code)
               for code in (right, wrong, f"```python\n{right}```", None)]
    problem = "its own solution fails: AssertionError: f(3) == 9"
    assert find_problems(queries) == ["", problem, "", ""]
    math = {"prompt": "p", "check": {"kind": "math", "answer": "3"}, "solution": "2"}
    assert find_problems([math]) == [""]


@isolated
def test_bad_rows_are_refused_with_their_line(tmp_path, monkeypatch):
    """`load` tries the first CHECKED rows that it takes; `check` tries all and writes the rest."""
    rows = [query_of("python", tests) for tests in ("assert f(3) == 9", "def t(): assert f(3) == 9",
                                                    "assert f(4) == 16", "pass")]
    path = write_rows(tmp_path / "q.jsonl", rows)
    refuses(lambda: tasks.queries.load(path), "q.jsonl:2", "does nothing", "tasks check")
    assert tasks.queries.load(path, 1) == rows[:1]
    monkeypatch.setattr(tasks.queries, "CHECKED", 1)
    assert tasks.queries.load(path) == rows
    program.check(stage_args(program, queries=path, out=str(tmp_path / "good.jsonl")))
    assert load_file(tmp_path / "good.jsonl") == [rows[0], rows[2]]


@isolated
def test_check_names_all_bad_rows(tmp_path, capsys):
    rows = [query_of("python", "pass"), query_of("python", "assert f(3) == 9"),
            query_of("python", "from solution import f")]
    path = write_rows(tmp_path / "q.jsonl", rows)
    program.check(stage_args(program, queries=path))
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}:1: ") and second.startswith(f"{path}:3: ")
    assert last == "1 of 3 queries can be used"
    write_rows(tmp_path / "q.jsonl", [query_of("cobol", "x")])
    refuses(lambda: program.check(stage_args(program, queries=path)), "q.jsonl:1", "cobol")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp_train", "mbpp_sanitized_train"])
def test_no_row_of_the_public_files_is_refused(shared, name):
    assert not any(find_problems(load_file(shared / f"code/{name}.jsonl")))


@isolated
def test_rows_of_evalplus(tmp_path):
    """Rows like those of HumanEval+ and MBPP+: numpy is imported, and the column "test" counts."""
    helper = "import numpy as np\n\ndef same(out, exp):\n    assert out == exp or " \
             "np.allclose(out, exp)\n\n"
    human = {"prompt": "def f(x):\n    '''Square x.'''\n", "entry_point": "f",
             "canonical_solution": "    return x * x\n",
             "test": f"{helper}def check(candidate):\n    for x in (3, 0.5):\n"
                     "        same(candidate(x), x ** 2)\n"}
    mbpp = {"prompt": "Square a number.", "code": SQUARES["python"], "test_imports": [],
            "test_list": ["assert f(2) == 4"], "test": f"{helper}same(f(3), 9)\n"}
    path = tmp_path / "q.jsonl"
    queries = tasks.queries.load(write_rows(path, [human, mbpp]))
    assert [tasks.queries.score(query, SQUARES["python"]) for query in queries] == [1, 1]
    wrong = SQUARES["python"].replace("*", "+")
    assert [tasks.queries.score(query, wrong) for query in queries] == [0, 0]
    path.write_text(json.dumps(mbpp | {"code": wrong}) + "\n")
    refuses(lambda: tasks.queries.load(str(path)), "q.jsonl:1", "its own solution fails")
