"""tasks/custom.py: a reward of one's own, and what is wrong with it in one line."""
import os
import sys

import pytest
from helpers import refuses, write_rows

import data
import tasks.queries
from sample import Rollout
from tasks import custom


def test_a_reward_of_ones_own(tmp_path):
    """A row needs a prompt only and reaches the function whole; a file of queries can name no
    function."""
    path, mine = tmp_path / "q.jsonl", tmp_path / "my_reward.py"
    mine.write_text("def score(query, response):\n"
                    "    return len(response) / query['longest']\n")
    write_rows(path, [{"prompt": "Say it.", "longest": 8}])
    refuses(lambda: tasks.queries.load(str(path)), "q.jsonl:1", "--reward")
    (query,) = tasks.queries.load(str(path), reward=f"{mine}:score")
    assert query["domain"] == "own" and tasks.queries.score(query, "four") == 0.5
    refuses(
        lambda: tasks.queries.score(query, "more than eight"), "my_reward.py:score gave", "0 to 1"
    )
    write_rows(tmp_path / "many.jsonl", [{"prompt": "Say it."}] * 500)
    assert [len(tasks.queries.load(str(tmp_path / "many.jsonl"), n, reward=f"{mine}:score"))
            for n in (0, 7)] == [500, 7]
    (built_in,) = tasks.queries.load("rl", 1, reward=f"{mine}:score")
    assert built_in["prompt"] == tasks.queries.builtin("rl", 1)[0]["prompt"]
    refuses(lambda: tasks.queries.load(str(path), reward=f"{mine}:missing"), "no function missing")
    refuses(
        lambda: tasks.queries.load(str(path), reward="nowhere.py:score"), "nowhere.py: no such file"
    )
    refuses(lambda: tasks.queries.load(str(path), reward="nowhere.py"), "must be file.py:function")
    (tmp_path / "beside.py").write_text("import json\n")
    mine.write_text("from beside import json\n\n\ndef none(query, response):\n    pass\n\n\n"
                    "def boom(query, response):\n    return json.loads(response)\n\n\n"
                    "def one(query):\n    return 1\n\n\ndef text(query, response):\n"
                    "    return '0.5'\n\n\ndef tensor(query, response):\n"
                    "    import torch\n    return torch.tensor(0.5)\n")
    custom.own_reward.cache_clear()
    for name, words in (("none", "gave None"), ("text", "gave '0.5'"),
                        ("boom", "boom, line 9: JSONDecodeError"), ("boom", "for the response 'x'"),
                        ("one", "as score(query, response): TypeError")):
        (query,) = tasks.queries.load(str(path), reward=f"{mine}:{name}")
        refuses(lambda query=query: tasks.queries.score(query, "x"), words)
    (query,) = tasks.queries.load(str(path), reward=f"{mine}:tensor")
    assert tasks.queries.score(query, "x") == 0.5
    (tmp_path / "data.py").write_text("half = 0.5\n")  # called as a module of ours is
    mine.write_text("import data\nfrom tasks import math_answers\n\n\ndef both(query, response):\n"
                    "    return data.half * math_answers.math_equal(response, '2')\n")
    custom.own_reward.cache_clear()
    (query,) = tasks.queries.load(str(path), reward=f"{mine}:both")
    assert tasks.queries.score(query, "2") == 0.5 and sys.modules["data"] is data
    mine.write_text("x = (\n")
    refuses(lambda: tasks.queries.load(str(path), reward=f"{mine}:other"), "SyntaxError")
    write_rows(path, [{"prompt": "a"}, {"question": "b"}])
    mine.write_text("def f(query, response):\n    return 1\n")
    refuses(lambda: tasks.queries.load(str(path), reward=f"{mine}:f"), "q.jsonl:2", "got question")
    write_rows(path, [{"prompt": "Say it.", "domain": "x", "check": query["check"]}])
    refuses(lambda: tasks.queries.load(str(path)), "q.jsonl:1", "check.kind")


def own_query(tmp_path, body: str, timeout: float = 60.0) -> dict:
    """A query with a reward of one's own, which has this body."""
    path = tmp_path / "own.py"
    path.write_text(f"import os, re, sys, time\n\n\ndef score(query, response):\n    {body}\n")
    write_rows(tmp_path / "q.jsonl", [{"prompt": "Say it."}])
    custom.own_reward.cache_clear()
    (query,) = tasks.queries.load(str(tmp_path / "q.jsonl"), reward=f"{path}:score",
                                  reward_timeout=timeout)
    return query


@pytest.mark.parametrize("body, words", [
    ("sys.exit(0)", ["line 5", "SystemExit: 0"]),
    ("raise GeneratorExit", ["GeneratorExit"]),
    ("raise ValueError('x' * 10**6)", ["ValueError: xxx"]),
    ("return b'1'", ["gave b'1'"]),
    ("return 1j", ["complex"]),
    ("time.sleep(60)", ["TimeoutError: no answer within 0.2 seconds (--reward_timeout)"]),
    ("exec('try:\\n    time.sleep(60)\\nexcept Exception:\\n    pass'); return 1",
     ["TimeoutError: no answer within 0.2 seconds (--reward_timeout)"]),
    ("re.match('(x+x+)+y', 'x' * 60)", ["TimeoutError"])])
def test_a_reward_that_goes_wrong_is_one_line(body, words, tmp_path):
    query = own_query(tmp_path, body, 0.2)
    message = refuses(lambda: tasks.queries.score(query, "x"), "own.py:score", *words)
    assert len(message) < 1000


@pytest.mark.parametrize("value", ["{}", "{'short': 1}", "{'reward': 2}", "{'reward': '1'}",
                                   "{'reward': 1, 'short': 'yes'}", "{'reward': 1, 'x': 1e999}"])
def test_a_dict_without_a_reward_or_with_more_than_numbers_is_refused(value, tmp_path):
    query = own_query(tmp_path, f"return {value}")
    refuses(lambda: tasks.queries.score(query, "x"), "own.py:score gave {", '"reward"')


def test_a_third_argument_decides(tmp_path):
    """A function gets the sample, a copy of it, if its third argument has no default."""
    body = "; seen = sample.ids[:]; sample.ids.clear(); return {'reward': 1, 'first': seen[0]}"
    for third, takes in (("sample", True), ("sample=None", False), ("*rest", False)):
        query = own_query(tmp_path, "pass" + body if takes else "return 1")
        mine = tmp_path / "own.py"
        mine.write_text(mine.read_text().replace("response):", f"response, {third}):"))
        custom.own_reward.cache_clear()
        assert custom.sees_truncated(query) == takes
        cut = Rollout(query, [], [7, 8], [], finished=False, text="x")
        assert tasks.queries.score_steps([query], ["x"], [cut]) == [float(takes)]
        assert cut.ids == [7, 8] and cut.parts == ({"first": 7.0} if takes else {})


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "domain": 7}, "domain must be a text"), ({"prompt": 5}, "prompt must be"),
    ({"prompt": "a", "domain": "total"}, "total"), ({"prompt": [{"role": "user"}]}, "content"),
    ({"prompt": [{"role": "user", "content": 5}]}, "content"), ({"prompt": [5]}, "TypeError"),
    ({"prompt": {"role": "user"}}, "prompt must be"), ({"prompt": " "}, "empty"),
    ({"prompt": "a", "tools": [5]}, "tools")])
def test_bad_prompts_are_refused_with_their_line(row, words, tmp_path):
    """In training they would be a traceback, or a prompt that says nothing."""
    query = own_query(tmp_path, "return 1")
    write_rows(tmp_path / "q.jsonl", [{"prompt": "Say it."}, row])
    refuses(lambda: tasks.queries.load(str(tmp_path / "q.jsonl"),
                                       reward=query["check"]["function"]), "q.jsonl:2: ", words)


def test_domains_from_a_column(tmp_path):
    """In files of any shape, in several sources, and for the rows that are read only."""
    rows = [{"question": "1 + 1?", "answer": "#### 2", "level": 3, "topic": "sums"},
            {"question": "2 * 2?", "answer": "#### 4", "level": 5}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    queries = tasks.queries.load(path, domain_key="level")
    assert [(query["domain"], query["check"]["answer"]) for query in queries] == [
        ("3", "2"), ("5", "4")]
    (query,) = tasks.queries.load(path, 1, domain_key="topic")
    assert query["domain"] == "sums"
    refuses(lambda: tasks.queries.load(path, domain_key="topic"), "q.jsonl:2", "--domain_key")
    refuses(lambda: tasks.queries.load("rl", domain_key="topic"), "--domain_key topic", "rl")
    write_rows(tmp_path / "q.jsonl", [{"prompt": "P", "answer": "1", "topic": "total"}])
    refuses(lambda: tasks.queries.load(path, domain_key="topic"), "q.jsonl:1", "total")


def test_a_reward_changes_neither_the_query_nor_the_working_directory(tmp_path):
    query = own_query(tmp_path, "os.chdir('/'); query.clear(); return 1")
    before = os.getcwd()
    assert tasks.queries.score(query, "x") == 1.0
    assert os.getcwd() == before and query["prompt"] == "Say it."


def test_a_file_that_ends_the_program_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("import sys\nsys.exit(0)\n")
    custom.own_reward.cache_clear()
    refuses(lambda: custom.own_reward(f"{tmp_path}/own.py:score"), "--reward", "line 2",
            "SystemExit")
