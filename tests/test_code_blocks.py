"""tasks/code_blocks.py: which blocks of an answer are run. The oracle is Python itself: the right f
squares its argument, so an answer is right if the code that is found passes TESTS."""
import time

import pytest

from tasks.code_blocks import extract_code, fenced_blocks, whole_program
from tasks.queries import score

TESTS = "assert f(3) == 9"
F = "def f(x):\n    return x * x\n"
RIGHT = f"```python\n{F}```"
WRONG = "```python\ndef f(x):\n    return x + x\n```"
PREFIX = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """Return the square."""\n'


def passes(response, prefix="", tests=TESTS):
    check = {"language": "python", "tests": tests, "prefix": prefix}
    namespace = {"__name__": "solution"}
    try:
        exec(whole_program(response, check), namespace)
        exec(tests, namespace)
    except Exception:
        return False
    return True


FENCES = {
    "python": RIGHT, "no name": RIGHT.replace("python", ""), "no fence": F,
    "blank": RIGHT.replace("python", " python "), "tab": RIGHT.replace("python", "python\t"),
    "CRLF": RIGHT.replace("\n", "\r\n"), "attribute": RIGHT.replace("python", "{.python}"),
    "title": RIGHT.replace("python", 'python title="a.py"'), "py": RIGHT.replace("python", "py"),
    "python3": RIGHT.replace("python", "python3"), "3.11": RIGHT.replace("python", "python3.11"),
    "capital": RIGHT.replace("python", "Python"), "tildes": RIGHT.replace("```", "~~~"),
    "four marks": RIGHT.replace("```", "````"), "other name": RIGHT.replace("python", "text"),
    "other name, then output": RIGHT.replace("python", "text") + "\n```\n9\n```",
    "behind one that is not closed": f"```python\nf = None\n{RIGHT}",
    "indented": "1. So:\n\n   " + RIGHT.replace("\n", "\n   "),
    "in a list": "- " + RIGHT.replace("\n", "\n  "), "quoted": "> " + RIGHT.replace("\n", "\n> "),
    "closed at once": RIGHT[:-4] + "```\nDone.",
    "unclosed": RIGHT[:-3], "cut": RIGHT[:-4], "opened in the prompt": f"{F}```\nDone.",
    "opened, then an example": f"{F}```\nUse:\n```python\nprint(g(3))\n```",
    "in a line": f"I say ```python\n{F}``` and end", "span before": f"Call ```f```\n{RIGHT}",
    "fence in a docstring": "```python\ndef f(x):\n    '''\n    ```\n    f(3)\n    ```\n    '''\n"
                            "    return x * x\n```",
    "only the docstring's": "def f(x):\n    \"\"\"Square.\n\n    ```python\n    >>> g(3)\n    ```\n"
                            "    \"\"\"\n    return x * x\n",
}


@pytest.mark.parametrize("name", FENCES)
def test_fences(name):
    assert passes(FENCES[name]) and passes(FENCES[name], PREFIX)
    assert not passes(FENCES[name].replace("x * x", "x + x"))
    assert "\r" not in extract_code(FENCES[name], tests=TESTS)  # bash would read it


@pytest.mark.parametrize("after", [
    "```python\nprint(g(3))\n```", "```python\nassert f(3) == 10\n```", "```\n9\n```",
    "```python\nresult = f(int(input()))\n```", "```python\nfrom solution import f\nf(3)\n```",
    "```python\nfrom solution import *\nprint(f(3))\n```",
    "```python\n>>> f(3)\n9\n```", "```bash\npython f.py\n```", '```json\n{"f": 9}\n```',
    "```console\n$ f 3\n```", "```text\nf(3) is 9\n```", "```python\ndef test_f():\n    f()\n```",
    "```js\nconst f = x => x + x;\n```", "```python\n# Example\nx = [3]\nprint(x)\n```"])
def test_what_follows_the_solution_does_not_replace_it(after):
    assert passes(f"{RIGHT}\nSee:\n{after}\n") and not passes(f"{WRONG}\nSee:\n{after}\n")
    assert passes(f"{after}\nSee:\n{RIGHT}")


def test_a_call_is_no_definition():
    """Beside a dict, a call looks like a function of C."""
    code = "```python\ndef f(x, y):\n    return x, y\n```\n```\n9\n```"
    assert passes(code, tests="assert f((4, 5), {1: 2}) == ((4, 5), {1: 2})")


def test_the_last_definition_counts():
    """Two solutions are not two chances."""
    assert passes(f"{WRONG}\nBetter:\n{RIGHT}") and not passes(f"{RIGHT}\nBetter:\n{WRONG}")
    assert passes("```python\nf = lambda x: x * x\n```\n```python\nprint(f(3))\n```")


@pytest.mark.parametrize("blocks", [
    ["def g(x):\n    return x * x", "def f(x):\n    return g(x)"],
    ["def f(x):\n    return g(x)", "def g(x):\n    return x * x"],
    ["import math\nfrom functools import reduce as r", "def f(x):\n    return int(math.pow(x, 2))"],
    ["from math import *", "def f(x):\n    return int(pow(x, 2) + floor(0.5))"],
    ["POWER = 2", "def f(x):\n    return x ** POWER"],
    ["def h(x):\n    return x", "def g(x):\n    return h(x) * x", "def f(x):\n    return g(x)"],
    ["def g(x):\n    return x * x\n\ndef f(x):\n    return -g(x)", "def f(x):\n    return g(x)"]])
def test_a_solution_in_several_blocks(blocks):
    assert passes("\nand\n".join(f"```python\n{block}\n```" for block in blocks))


def test_blocks_that_are_not_needed_are_left_out():
    """A draft's example has a variable that is called like a parameter of the solution."""
    draft = "def f(x):\n    return 0\n\nx = 4\nassert f(x) == 16"
    assert passes(f"```python\n{draft}\n```\nNo:\n{RIGHT}")
    classes = "```python\nclass A: pass\n```\n```python\nclass B: pass\n```"
    assert extract_code(classes, tests="assert A() and B()") == "class A: pass\n\nclass B: pass\n"


@pytest.mark.parametrize("response", [
    f"<think>\n{RIGHT}\n</think>", f"<think>{RIGHT}", f"{RIGHT}</think>",
    f"<thinking>{RIGHT}</thinking>", f"Well. <think>{RIGHT}", WRONG, "", "no"])
def test_thinking_is_no_answer(response):
    assert not passes(response)
    assert score({"check": {"kind": "code", "language": "python", "tests": TESTS}}, response) == 0


def test_answers_after_thinking():
    assert passes(f"<think>{WRONG}</think>{RIGHT}") and passes(f"{WRONG}</think>\n{RIGHT}")
    assert not passes(f"<think>{RIGHT}</think>{WRONG}")


@pytest.mark.parametrize("body", [
    "    return x * x\n", "```python\n    return x * x\n```", "```\n    return x * x\n",
    "    return x * x\n```\nUse:\n```python\nprint(f(3))\n```",
    "```python\n    return x * x\n```\nUse:\n```python\nprint(f(3))\n```"])
def test_a_bare_body_continues_the_prefix(body):
    assert passes(body, PREFIX) and not passes(body.replace("x * x", "x + x"), PREFIX)


def test_a_body_is_not_replaced_by_a_variable():
    body = "```python\n    return x * x\n```\n```python\nx = 3\n```"
    assert passes(body, PREFIX, "for x in [3]:\n    assert f(x) == 9")


@pytest.mark.parametrize("names", ["annotations", "(annotations,\n    division)"])
def test_future_imports_come_first(names):
    """Python allows them nowhere else; `compile` is the oracle that they were misplaced. Without
    this one the annotation is an error."""
    code = f"from __future__ import {names}\n{F.replace('(x)', '(x: Later)')}"
    with pytest.raises(SyntaxError):
        compile(PREFIX + code, "x", "exec")
    assert passes(f"```python\n{code}```", PREFIX)
    helper = "```python\ndef g(x):\n    return x * x\n```\n"
    assert passes(f"{helper}```python\n{code.replace('x * x', 'g(x)')}```")


ELSEWHERE = [
    ("c++", "```cpp\nint f(int x)\n{\n  return x;\n}\n```\n```c++\nint main() { f(3); }\n```",
     "int main() { assert(f(3) == 9); }"),
    ("javascript", "```js\nconst f = x => x;\n```\n```js\nconst y = f(3);\n```\n```\n9\n```",
     "console.assert(f(3) === 9)"),
    ("java", "```java\nclass Solution { int f(int x) { return x; } }\n```\n```java\nclass Demo {\n"
     "  int g() { return new Solution().f(3); } }\n```",
     "public class Main { void g() { new Solution().f(3); } }"),
    ("bash", "```sh\nf() { echo $1; }\n```\n```bash\nf 3\n```", "[ $(f 3) = 9 ]"),
    ("rust", "```rs\npub fn f(x: i32) -> i32 { x }\n```\n```rust\nfn main() { f(3); }\n```",
     "fn main() { assert_eq!(f(3), 9); }"),
    ("go", "```golang\npackage main\nfunc f(x int) int { return x }\n```\n```go\nfunc main() { "
     "f(3) }\n```", "func main() { f(3) }"),
    ("perl", "```perl\nsub f { $_[0] }\n```\n```perl\nprint f(3);\n```", "die unless f(3) == 9;"),
    ("lua", "```lua\nlocal function f(x) return x end\n```\n```lua\nprint(f(3))\n```", "f(3)"),
    ("ruby", "```rb\ndef f(x) = x\n```\n```ruby\nputs f(3)\n```", "raise unless f(3) == 9"),
    ("php", "```php\n<?php function f($x) { return $x; }\n```\n```php\necho f(3);\n```", "f(3);"),
    ("typescript", "```ts\nconst f = (x: number): number => x\n```\n```ts\nf(3)\n```", "f(3)")]


@pytest.mark.parametrize("language, response, tests", ELSEWHERE)
def test_other_languages(language, response, tests):
    """The first block is the solution, the others use it."""
    assert extract_code(response, language, tests) == fenced_blocks(response)[0].code


@pytest.mark.parametrize("text", [
    "`" * 100_000, " " * 100_000, "```\n" * 25_000, "f(" * 50_000, "<think>" * 20_000,
    "a " * 50_000, "```\n" + "f(\n" * 20_000, "from __future__ import (" * 4_000,
    "from __future__ import (\n" * 4_000,
    "```\nx:" + "a" * 100_000,
    RIGHT + ("\n" + "a*" * 40 + "(") * 1_000,
    "".join(f"```\ndef g{i}(): return g{i + 1}()\n```\n" for i in range(1_000))])
def test_no_answer_takes_long(text):
    """100 KB of the worst that we could think of; a pattern of quadratic time takes minutes."""
    start = time.process_time()
    whole_program(text, {"language": "python", "tests": TESTS, "prefix": PREFIX})
    assert time.process_time() - start < 3
