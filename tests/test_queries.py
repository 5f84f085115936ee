"""tasks/queries.py: splits that do not overlap, demonstrations that pass their own checks,
responses that must score 0. R numbers: docs/requirements.md."""
import itertools
import random
import re
import zlib

import pytest
from helpers import refuses

import tasks.queries
from sample import Rollout
from tasks.code_blocks import extract_code
from tasks.queries import DOMAINS, SPLITS, builtin, distinct, score, score_many

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
    refuses(lambda: tasks.queries.load("ifeval:rl"), "ifeval:rl")


def test_the_two_instruction_checks():
    """ours wants whole words, IFEval's is content with parts of them."""
    check = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["sea"]}]}
    for kind, worth in (("rules", 0), ("ifeval", 1)):
        assert score({"prompt": "p", "check": {"kind": kind, **check}}, "The seas.") == worth


def test_checks_of_messages():
    """A prompt of messages is scored as a text is, and no message said back earns anything."""
    prompt = [{"role": "system", "content": "Be brief."},
              {"role": "user", "content": "Name a sea."}]
    check = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["sea"]}]}
    for kind in ("ifeval", "rules"):
        query = {"prompt": prompt, "domain": "instruction", "check": {"kind": kind, **check}}
        responses = ["A sea.", "No.", "Name a sea.", ""]
        assert [score(query, response) for response in responses] == [1, 0, 0, 0]
    math = {"prompt": prompt, "domain": "mathematics", "check": {"kind": "math", "answer": "5"}}
    assert tasks.queries.few_shot(math, 0) == "Question: Be brief.\nName a sea.\nAnswer:"


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


def test_demonstrations_are_conversations():
    """What SFT reads: a user's question of the sft split and the assistant's verified answer."""
    rows = tasks.queries.demonstrations(12)
    assert len(rows) == 12
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert tasks.queries.split_of(user["content"]) == "sft" and assistant["content"]


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


def test_a_cut_response_is_no_answer():
    """Right as far as it goes, but it never ended."""
    query = {"prompt": "2 + 2?", "domain": "a", "check": {"kind": "math", "answer": "4"}}
    text = "\\boxed{4}"
    cut, ended = (Rollout(query, [], [1], [0.0], finished, text) for finished in (False, True))
    assert score_many([query, query], [text, text], [cut, ended]) == [0.0, 1.0]


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
    late = tasks.sandbox.Result(False, "tests", "time limit of 3 s", "", "", 3.0)
    monkeypatch.setattr(tasks.queries.sandbox, "run_many", lambda jobs: [late for _ in jobs])
    answer = next(tasks.queries.items("val", "code", 9)).answer
    assert score_many([query, query], [answer, answer]) == [0.0, 0.0]
    monkeypatch.setattr(tasks.queries.sandbox, "run_many", run_many)
    assert score(query, answer) == 1.0  # a busy machine's verdict is not remembered
