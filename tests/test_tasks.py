"""tasks.py: splits that do not overlap, demonstrations that pass their own checks, every rule with
both verdicts, responses that must score 0. R numbers: docs/requirements.md."""
import datetime
import itertools
import json
import random
import re
import sys
import zlib

import pytest
from helpers import letter_queries, refuses, stage_args, teach_letters, write_rows

from tasks import __main__ as program
from tasks import custom
import data
import tasks.queries
from tasks import toy
from tasks.queries import DOMAINS, SPLITS, builtin, distinct, extract_code, score, score_many
from tasks.toy import follows

N = 600


@pytest.fixture(scope="module")
def prompts():
    """Prompts of each split, more than a demo uses of the small ones."""
    return {split: [q["prompt"] for q in builtin(split, N)] for split in SPLITS}


# ---------------------------------------------------------------------------------------------
# splits

def test_splits_are_disjoint_and_prompts_distinct(prompts):
    """No query is in two splits or twice in one; every domain has its quarter."""
    for split, mine in prompts.items():
        assert len(set(mine)) == N
        assert all(tasks.queries.split_of(p) == split for p in mine)
    for a, b in itertools.combinations(SPLITS, 2):
        assert not set(prompts[a]) & set(prompts[b])
    for split in SPLITS:
        assert [q["domain"] for q in builtin(split, 8)] == list(DOMAINS) * 2


def test_split_shares():
    """40/40/10/10 by the hash of the text, whatever the text."""
    names = [tasks.queries.split_of(f"prompt {i}") for i in range(20_000)]
    shares = {split: names.count(split) / 20_000 for split in SPLITS}
    assert shares == pytest.approx({"sft": 0.4, "rl": 0.4, "val": 0.1, "test": 0.1}, abs=0.015)


def test_queries_are_a_function_of_the_seed():
    """The same seed gives the same queries and texts; the first n of more are these n."""
    assert distinct("rl", 40, 3) == distinct("rl", 40, 3) == distinct("rl", 60, 3)[:40]
    assert builtin("rl", 40, 3) != builtin("rl", 40, 4)


def test_documents_hold_no_query_of_another_split(prompts):
    """Pre-training text is of the sft split only: no rl, val or test question stands in it."""
    text = []
    for domain in DOMAINS:
        text += itertools.islice(tasks.queries.documents(domain), 400)
    patterns = [re.escape(form).replace(r"\{\}", "(.+?)") for form in tasks.queries.FORMS]
    forms = [next(p for p in patterns if re.match(p, doc, re.S)) for doc in text]
    questions = [re.match(p, doc, re.S)[1] for p, doc in zip(forms, text, strict=True)]
    assert {tasks.queries.split_of(q) for q in questions} == {"sft"}
    assert min(forms.count(p) for p in patterns) > 400  # each form is used
    everything = "\n".join(text)
    for split in ("rl", "val", "test"):
        assert not [p for p in prompts[split] if p in everything]


def test_documents_are_a_function_of_the_seed():
    """The same seed, the same documents."""
    for domain in DOMAINS:
        one, two, other = (
            list(itertools.islice(tasks.queries.documents(domain, s), 5)) for s in (1, 1, 2)
        )
        assert one == two != other


def test_few_shot_shows_no_held_out_query():
    """The worked examples are of the sft split; the question comes last, without its answer."""
    for split in ("test", "val", "rl"):
        for query in builtin(split, 40):
            text = tasks.queries.few_shot(query, 3)
            parts = re.findall(r"^Question: (.*?)\nAnswer:", text, re.M | re.S)
            assert len(parts) == 4 and parts[-1] == query["prompt"]
            assert [tasks.queries.split_of(p) for p in parts[:3]] == ["sft"] * 3
            assert text.endswith(f"{query['prompt']}\nAnswer:")


def test_load():
    """A split by its name, n of it; anything else is a file, or one line."""
    assert tasks.queries.load("val", 4, 1) == builtin("val", 4, 1)
    refuses(lambda: tasks.queries.load("no_such_split"), "no_such_split")
    refuses(lambda: tasks.queries.load("ifeval:no_such_split"), "no_such_split")


def test_ifeval_prompts_of_a_split():
    """n different ones, of that split by their hash, the same for a seed; with all 25 kinds."""
    rows = tasks.queries.load("ifeval:rl", 300, 1)
    assert (
        rows == tasks.queries.load("ifeval:rl", 300, 1) != tasks.queries.load("ifeval:rl", 300, 2)
    )
    assert len({row["prompt"] for row in rows}) == 300
    assert {tasks.queries.split_of(row["prompt"]) for row in rows} == {"rl"}
    assert len({kind for row in rows for kind in row["check"]["instruction_id_list"]}) == 25
    assert score(rows[0], rows[0]["prompt"]) == 0  # the echo


def test_the_two_instruction_checks():
    """ours wants whole words, IFEval's is content with parts of them."""
    check = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["sea"]}]}
    for kind, worth in (("rules", 0), ("ifeval", 1)):
        assert score({"prompt": "p", "check": {"kind": kind, **check}}, "The seas.") == worth


# The demo's published numbers come from these: a change of any draw changes all of them.
DIGESTS = {"sft": 1224144311, "rl": 118989601, "test": 2403577686}


@pytest.mark.parametrize("split", DIGESTS)
def test_queries_and_demonstrations_stay_what_they_were(split):
    """Prompts, answers and tests of 400 queries, seed 0, as of commit e5a22e4."""
    rows = [(query["prompt"], query["check"].get("tests", ""), query["check"].get("answer", ""),
             query["check"].get("kwargs", ""), text) for query, text in distinct(split, 400, 0)]
    assert zlib.crc32(repr(rows).encode()) == DIGESTS[split]


# ---------------------------------------------------------------------------------------------
# demonstrations

@pytest.mark.parametrize("worked", [0.0, 0.6, 1.0])
def test_share_of_worked_demonstrations(worked):
    """`worked` is the share that shows its work; the questions do not depend on it."""
    for domain in ("mathematics", "logic"):
        pairs = list(itertools.islice(tasks.queries.items("sft", domain, 0, worked), 1000))
        shown = [not text.startswith("The answer is") for _, text in pairs]
        assert sum(shown) / 1000 == pytest.approx(worked, abs=0.05)
        other = itertools.islice(tasks.queries.items("sft", domain, 0, 1 - worked), 1000)
        assert [query for query, _ in pairs] == [query for query, _ in other]


def mutate(r, domain: str, query: dict, text: str) -> str:
    """A near miss: right in form, wrong in content."""
    if domain == "code":
        return re.sub(r"(def \w+\(\w+\):\n)", r"\1    return 'wrong'\n", text)
    if domain == "instruction":
        return " ".join(word[::-1] for word in text.split()) + " x y z"
    found = re.search(r"\\boxed\{(.*)\}", text)
    answer = found.group(1)
    wrong = str(int(answer) + r.choice([-1, 1])) if answer.lstrip("-").isdigit() else "x" + answer
    return text[:found.start(1)] + wrong + text[found.end(1):]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["sft", "test"])
def test_demonstrations_pass_and_mutations_fail(domain, split):
    """Every generator's answer passes its own check, a wrong one does not, over many draws."""
    r, n = random.Random(0), 16 if domain == "code" else 300
    pairs = list(itertools.islice(tasks.queries.items(split, domain, 5), n))
    queries = [query for query, _ in pairs]
    assert score_many(queries, [text for _, text in pairs]) == [1.0] * n
    wrong = [mutate(r, domain, query, text) for query, text in pairs]
    assert sum(score_many(queries, wrong)) == 0


def test_every_code_solution_equals_the_reference():
    """The style with a loop and the one-liner agree on every example (ours, so no sandbox)."""
    r = random.Random(1)
    for make in (toy.list_function, toy.string_function, toy.number_function):
        for _ in range(150):
            _, signature, bodies, inputs = make(r)
            name, functions = signature.partition("(")[0], []
            for body in bodies:
                space = {}
                exec(f"def {signature}:\n{body}", space)
                functions.append(space[name])
            for x in inputs:
                values = [f(eval(x)) for f in functions]
                same = all(v == values[0] and type(v) is type(values[0]) for v in values)
                assert same, (bodies, x)


def test_steps_of_the_work_shown_are_right():
    """Each "a op b = c" of the mathematics is true, and the last one is the answer."""
    r = random.Random(2)
    makers = [toy.gain_and_loss, toy.boxes, toy.together, toy.change, toy.share,
              toy.perimeter]
    for make in makers * 60:
        _, answer, steps = make(r)
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right), step
        assert int(steps[-1].split(" = ")[1]) == answer > 0


def test_logic_by_its_own_rules():
    """Swaps, by playing them; weekdays, by the calendar; syllogisms, by closing the relation."""
    r = random.Random(3)
    for _ in range(100):
        prompt, answer, _ = toy.swap(r)
        has = dict(re.findall(r"(\w+) has the (\w+)", prompt))
        a, b = re.search(r"(\w+) and (\w+) swap", prompt).groups()
        has[a], has[b] = has[b], has[a]
        assert has[re.search(r"does (\w+) have", prompt)[1]] == answer
    for _ in range(100):
        prompt, answer, _ = toy.weekday(r)
        start = datetime.date(2024, 1, 1)  # a Monday
        while start.strftime("%A") not in prompt:
            start += datetime.timedelta(1)
        days = int(re.search(r"\d+", prompt)[0]) * (-1 if "ago" in prompt else 1)
        assert (start + datetime.timedelta(days)).strftime("%A") == answer
    for _ in range(100):
        prompt, answer, _ = toy.syllogism(r)
        every = dict(re.findall(r"Every (\w+) is a (\w+)", prompt))
        never = dict(re.findall(r"No (\w+) is a (\w+)", prompt))
        kind, asked = re.search(r"(?:^|\. )[A-Z]\w+ is a (\w+)\. Is \w+ a (\w+)\?", prompt).groups()
        known = {kind}
        while known & every.keys() and not known >= {every[k] for k in known & every.keys()}:
            known |= {every[k] for k in known & every.keys()}
        denied = {never[k] for k in known & never.keys()}
        assert answer == ("yes" if asked in known else "no" if asked in denied else "unknown")


def test_demonstrations_are_conversations():
    """What SFT reads: a user's question of the sft split and the assistant's verified answer."""
    rows = tasks.queries.demonstrations(12)
    assert len(rows) == 12
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert tasks.queries.split_of(user["content"]) == "sft" and assistant["content"]


# ---------------------------------------------------------------------------------------------
# the programs of python -m tasks

def test_demonstrations_are_written(tmp_path):
    """The file holds exactly the rows of demonstrations(n, seed), in order."""
    path = tmp_path / "rows.jsonl"
    program.demonstrations(stage_args(program, n=8, seed=2, out=str(path)))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == tasks.queries.demonstrations(8, 2)
    refuses(lambda: program.demonstrations(stage_args(program, n=8)), "--out")


def test_rejection_sampling_keeps_what_passes(tokenizer, tmp_path):
    """A policy that says "A." or "B.": what is kept is right, and each conversation is there once;
    nothing is written where nothing passes."""
    policy = str(teach_letters(tokenizer, tmp_path / "policy"))
    queries = letter_queries(tmp_path / "queries.jsonl")
    path = tmp_path / "rows.jsonl"
    values = {"init": policy, "queries": queries, "responses": 16, "max_new_tokens": 8}
    program.rejection(stage_args(program, out=str(path), **values))
    rows = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    said = [(user["content"], assistant["content"]) for user, assistant in rows]
    assert {question for question, _ in said} == {"Pick A.", "Choose A."}
    assert all("a" in text.lower() for _, text in said) and len(set(said)) == len(said)
    path.unlink()
    values["queries"] = letter_queries(tmp_path / "never.jsonl", "never said")
    refuses(lambda: program.rejection(stage_args(program, out=str(path), **values)), "passes")
    assert not path.exists()


# ---------------------------------------------------------------------------------------------
# rules

@pytest.mark.parametrize("rule,kw,good,bad", [
    ("keywords:existence", {"keywords": ["sea", "Wind"]}, "Wind over the Sea.", "The seas, wind"),
    ("keywords:forbidden_words", {"forbidden_words": ["the"]}, "A theme.", "By THE sea."),
    ("ours:exact_words", {"n": 3}, "Don't stop now!", "Don't stop - right now."),
    ("ours:start_word", {"word": "The"}, '"the sea."', "A the sea."),
    ("startend:end_checker", {"end_phrase": "noon."}, '"Stops at Noon."', "Stops at noon. Really."),
    ("startend:quotation", {}, ' "Yes."\n', '"Yes." he said'),
    ("startend:quotation", {}, '""', '"'),
    ("change_case:english_capital", {}, "ALL 4 OF IT.", "ALL BUT oNE."),
    ("change_case:english_lowercase", {}, "all 4 of it.", "all but One."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "text\n* a", "*\n"),
    ("ours:items", {"category": "fruits", "n": 2}, "Apple, pear.", "apple, apple"),
    ("ours:items", {"category": "fruits", "n": 2}, "* apple\n* PEAR", "apple, pear, plum"),
    ("ours:items", {"category": "fruits", "n": 2}, '"apple, pear"', "apple, cat")])
def test_rules(rule, kw, good, bad):
    """Each constraint, followed and not; never by the empty text."""
    assert follows(good, rule, kw) and not follows(bad, rule, kw)
    assert not follows("", rule, kw) or rule == "keywords:forbidden_words"


def test_unknown_rule_is_not_followed():
    """No reward for a constraint that nobody checks."""
    assert not follows("anything", "combination:two_responses", {})


def test_every_generated_rule_is_known():
    """What `instruction` asks for, `follows` can check: no rule by a name it does not know."""
    r, rules = random.Random(0), set()
    for _ in range(2000):
        _, check, _ = toy.instruction(r)
        rules |= set(check["instruction_id_list"])
    source = open(toy.__file__, encoding="utf-8").read()
    assert len(rules) == 10 and all(f'rule == "{rule}"' in source for rule in rules)


# ---------------------------------------------------------------------------------------------
# scores that must be 0, and some that must be 1 (R9.5)

DUMP = " ".join(map(str, range(1, 200)))


@pytest.mark.parametrize("response", ["", " \n ", DUMP, "?", "\\boxed{}", "```python\n```",
                                      "I do not know.", "The answer is", "0" * 5000])
def test_empty_answers_score_nothing(response):
    """R9.5: empty, blank, a dump of all numbers, form without content: 0 in every domain."""
    queries = builtin("test", 160 if response.strip() else 40)
    if response in ("?", "I do not know."):
        queries = queries[:40]
    queries = [q for i, q in enumerate(queries) if q["domain"] != "code" or i < 8]
    assert sum(score_many(queries, [response] * len(queries))) == 0


def test_the_prompt_itself_scores_nothing():
    """R9.5: saying the question back is no answer, in any domain."""
    queries = [q for i, q in enumerate(builtin("test", 400)) if q["domain"] != "code" or i < 16]
    passed = [q["prompt"] for q, s in zip(
        queries, score_many(queries, [q["prompt"] for q in queries]), strict=True) if s]
    assert not passed, passed[:3]


@pytest.mark.parametrize("response", ["1000", "1000.0", "\\boxed{1,000}", "The answer is 1000.",
                                      "500 + 500 = 1000. The answer is \\boxed{1000}."])
def test_forms_of_a_right_answer(response):
    """R9.5: the same number in other clothes; a bare number only where nothing else is asked."""
    query = {"prompt": "p", "check": {"kind": "math", "answer": "1000"}}
    bare = response.replace(".", "").isdigit()
    assert score(query, response) == float(not bare)


def test_last_answer_counts():
    """Two boxes are not two chances."""
    query = {"prompt": "p", "check": {"kind": "math", "answer": "7"}}
    assert score(query, "\\boxed{5} or \\boxed{7}") == 1
    assert score(query, "\\boxed{7} \\boxed{5}") == 0


def test_code_is_taken_from_the_last_block():
    """A fenced block, the last of several, or the whole text when there is none."""
    assert extract_code("say ```python\na = 1\n``` and ```\nb = 2\n``` end") == "b = 2\n"
    assert extract_code("x = 3") == "x = 3"


def test_score_many_equals_score():
    """In order, mixed domains, right and wrong, repeated programs."""
    pairs = distinct("val", 8, 0)
    queries = [q for q, _ in pairs] * 2
    responses = [text for _, text in pairs] + ["no"] * 8
    assert score_many(queries, responses) == [1.0] * 8 + [0.0] * 8
    assert [score(q, r) for q, r in zip(queries[:4], responses[:4], strict=True)] == [1.0] * 4


def test_a_program_runs_once(monkeypatch):
    """Within a call and, while it is kept, in later ones; with other tests it is another run."""
    query = next(tasks.queries.items("val", "code", 9))[0]
    other = {**query, "check": {**query["check"], "tests": "assert False"}}
    ran, run_many = [], tasks.sandbox.run_many
    monkeypatch.setattr(
        tasks.queries.sandbox, "run_many", lambda jobs: ran.extend(jobs) or run_many(jobs)
    )
    text = "unheard_of = 1"
    monkeypatch.setattr(tasks.queries, "VERDICTS", {})
    monkeypatch.setattr(tasks.queries, "MAX_VERDICTS", 1)
    assert score_many([query, query], [text, text]) == [0.0, 0.0] and len(ran) == 1
    assert score_many([query, other], [text, text]) == [0.0, 0.0] and len(ran) == 2
    assert len(tasks.queries.VERDICTS) == 1  # the latest: a long run must not keep all its programs
    assert score(other, text) == 0.0 and len(ran) == 2
    assert score(query, text) == 0.0 and len(ran) == 3


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
    refuses(lambda: tasks.queries.load(str(path), reward="nowhere.py"), "wants file.py:function")
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
