"""Queries whose answers a program can check: their splits, their sources and their scores.

A query is {"prompt": str, "domain": str, "check": {...}}, and score(query, response) is 1.0 or 0.0;
only a reward of one's own may give a number between.
The report checks answers in the same way for rejection sampling, DPO's pairs and GRPO's rewards
(sections 4.1 to 4.3). Queries come from the built-in generators (toy.py) and their variants
(variants.py), and from the public benchmark files (benchmarks.py).

A built-in prompt belongs to exactly one split, by a hash of its text, so no two splits share a
query:

    sft  40%  demonstrations for SFT, and the worked examples inside pre-training text
    rl   40%  queries without answers for DPO, the reward model and GRPO ("a new query set", 4.2)
    val  10%  for choosing settings
    test 10%  for the report, and for nothing else

Demonstrations come in several styles, as collected data does: some show their work, some state the
answer at once. All of them are right. Reinforcement learning has to find out which style suits a
model of a given size.

    python -m tasks             # print a few demonstrations and verdicts
"""
import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

from lib.args import InputError, require
from lib.chat import parse_tools
from lib.files import read_jsonl
from tasks import ifeval, sandbox, toy, variants
from tasks.benchmarks import clean_prompt, contents, read_queries
from tasks.check_tests import find_problems
from tasks.code_blocks import whole_program
from tasks.custom import own_reward, own_score, sees_truncated
from tasks.math_answers import extract_answer, math_equal
from tasks.steps import steps_hold

GENERATORS = {"mathematics": toy.mathematics, "code": toy.code, "instruction": toy.instruction,
              "logic": toy.logic}
DOMAINS = tuple(GENERATORS)
VARIANTS = {"javascript": partial(variants.brace_code, language="javascript"),
            "c++": partial(variants.brace_code, language="c++"),
            "system": variants.system, "turns": variants.turns}
SPLITS = {"test": range(0, 10), "val": range(10, 20), "rl": range(20, 60), "sft": range(60, 100)}

# Collected text asks questions in more than one layout; the chat template, which SFT introduces, is
# then one more. (We tried six layouts as well: docs/LOG.md, "SFT above the base model".)
FORMS = ("Question: {}\nAnswer: {}", "Problem: {}\nSolution:\n{}", "User: {}\nAssistant:\n{}")


class Example(NamedTuple):
    query: dict
    answer: str  # a right one


def split_of(prompt: str | list[dict]) -> str:
    """Return the split that a prompt belongs to, by a hash of its text, or of its first question:
    a second turn or a system prompt must not carry a question into another split."""
    if isinstance(prompt, list):
        prompt = next(message["content"] for message in prompt if message["role"] == "user")
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


# ---------------------------------------------------------------------------------------------
# scores

class Program(NamedTuple):
    code: str
    language: str
    tests: str


# In RL many programs come again in later steps, so we remember whether the latest ones passed.
VERDICTS: dict[Program, bool] = {}
MAX_VERDICTS = 20_000  # some 20 MB of text
CHECKED = 200  # rows of a file whose tests are tried when it is loaded


def run_programs(programs: list[Program]) -> list[bool]:
    """Return whether each program passes its tests. Those without a verdict run in the sandbox."""
    new = [program for program in dict.fromkeys(programs) if program not in VERDICTS]
    try:
        results = sandbox.run_many([program._asdict() for program in new])
    except OSError as error:  # of the sandbox, so it is no verdict on a program
        raise InputError(f"code cannot be judged: {error}") from None
    for program, result in zip(new, results, strict=True):
        VERDICTS[program] = result.passed
    passed = [VERDICTS[program] for program in programs]
    for program, result in zip(new, results, strict=True):
        if "time limit" in result.reason:  # it may be right, on a machine that is less busy
            del VERDICTS[program]
    for oldest in list(VERDICTS)[:-MAX_VERDICTS]:
        del VERDICTS[oldest]
    return passed


def require_isolation(queries: list[dict], allow_unsafe_code: bool) -> None:
    """Say what a model's code could do on this machine, where the sandbox lacks some isolation.

    Without "files" or "pids" refuse, unless it is allowed. Without code checks there is nothing to
    say."""
    if not hold_code(queries):
        return
    gaps = sandbox.isolation_gaps()
    text = "; ".join(f"without {layer!r} it can {harm}" for layer, harm in gaps.items())
    require(allow_unsafe_code or sandbox.is_isolated(),
            f"the model's code is not isolated on this machine: {text}. Run in a container or VM "
            "that holds nothing else of value, and add --allow_unsafe_code")
    if gaps:
        print(f"warning: the model's code is not isolated: {text} (docs/trust.md)")


def hold_code(queries: list[dict]) -> bool:
    return any(query["check"].get("kind") == "code" for query in queries)


def follows_all(query: dict, response: str) -> bool:
    """Return whether the response follows every constraint of the query."""
    # The prompt names the topic and the words to use, so an echo of it must earn nothing.
    said = toy.words_of(response)
    is_echo = any(toy.words_of(text) == said for text in contents(query["prompt"]))
    if is_echo or not response.strip():
        return False
    check = query["check"]
    follows = ifeval.follows if check["kind"] == "ifeval" else toy.follows
    rules = zip(check["instruction_id_list"], check["kwargs"], strict=True)
    return all(follows(response, rule, arguments) for rule, arguments in rules)


def score_many(queries: list[dict], responses: list[str], rollouts=None) -> list[float]:
    """Return 1.0 for each response that passes its query's check, else 0.0.

    rollouts: sample.Rollout of the responses, or None. A response that was cut gets 0.0, unless it
    meets a reward of one's own that asks for its tokens. Such a reward may give any number from 0
    to 1, and `parts` to the rollout. Code runs in the sandbox, several programs at a time."""
    scores = [0.0] * len(queries)
    programs = {}
    rollouts = rollouts or [None] * len(queries)
    for i, (query, response, rollout) in enumerate(zip(queries, responses, rollouts, strict=True)):
        check = query["check"]
        was_cut = rollout is not None and not rollout.finished
        if was_cut and not sees_truncated(query):
            continue
        rule = check.get("system_rule")
        if rule and not toy.follows(response, *rule):
            continue
        if check["kind"] == "code":
            code = whole_program(response, check)
            programs[i] = Program(code, check["language"], check["tests"])
        elif check["kind"] == "math":
            answer = extract_answer(response, strict=True)  # None equals nothing
            scores[i] = float(math_equal(answer, check["answer"]))
        elif check["kind"] == "own":
            scores[i] = own_score(query, response, rollout)
        else:
            scores[i] = float(follows_all(query, response))
    for i, passed in zip(programs, run_programs(list(programs.values())), strict=True):
        scores[i] = float(passed)
    return scores


def score_steps(queries: list[dict], responses: list[str], rollouts=None) -> list[float]:
    """Return what `score_many` does, but 0.0 for right answers to mathematics and logic whose text
    states a false equation (tasks/steps.py)."""
    scores = score_many(queries, responses, rollouts)
    for i, query in enumerate(queries):
        if query["check"]["kind"] == "math" and not steps_hold(responses[i]):
            scores[i] = 0.0
    return scores


def score(query: dict, response: str) -> float:
    return score_many([query], [response])[0]


# ---------------------------------------------------------------------------------------------
# built-in queries, demonstrations, documents

def items(split: str, domain: str, seed: int, worked: float = 0.6) -> Iterator[Example]:
    """Yield examples of one split and domain without end; prompts may repeat.

    worked: the share of the answers in mathematics and logic that show their work."""
    r = random.Random(f"{split} {domain} {seed}")
    generate = (GENERATORS | VARIANTS)[domain]
    while True:
        task = generate(r)
        answer = task.responses[0]
        if len(task.responses) > 1 and r.random() < worked:
            answer = task.responses[1]
        if split_of(task.prompt) == split:
            query = {"prompt": task.prompt, "domain": domain, "check": task.check}
            yield Example(query, answer)


def distinct(split: str, n: int, seed: int, domains: Sequence[str] = DOMAINS) -> list[Example]:
    """Return n examples with n different prompts, the domains in turn."""
    streams = [items(split, domain, seed) for domain in domains]
    examples = {}
    while len(examples) < n:
        stream = streams[len(examples) % len(domains)]
        for example in islice(stream, 100_000):
            prompt = repr(example.query["prompt"])
            if prompt not in examples:
                break
        require(prompt not in examples, f"the built-in {split} split has no {n} different queries")
        examples[prompt] = example
    return list(examples.values())


def builtin(split: str, n: int, seed: int = 0) -> list[dict]:
    """Return n different queries, the four domains in turn."""
    return [example.query for example in distinct(split, n, seed)]


def conversation(prompt: str | list[dict], answer: str) -> dict:
    """Return a row of SFT's data: a user's question, or messages, and the assistant's answer."""
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return {"messages": [*asked, {"role": "assistant", "content": answer}]}


def demonstrations(n: int, seed: int = 0, also: Sequence[str] = ()) -> list[dict]:
    """Return n conversations of the sft split that pass their own checks (report 4.1: only what
    passes execution or answer matching is kept).

    also: VARIANTS, each of which gives a tenth of the conversations."""
    tenth = n // 10
    examples = distinct("sft", n - tenth * len(also), seed)
    for variant in also:
        examples += distinct("sft", tenth, seed, [variant])
    queries = [query for query, _ in examples]
    scores = score_many(queries, [answer for _, answer in examples])
    return [conversation(query["prompt"], answer) | {"domain": query["domain"]}
            for (query, answer), passed in zip(examples, scores, strict=True) if passed]


def as_text(examples: list[Example], form: str) -> str:
    texts = []
    for example in examples:
        question = "\n".join(contents(example.query["prompt"]))
        texts.append(form.format(question, example.answer))
    return "\n\n".join(texts)


def few_shot(query: dict, k: int, seed: int = 0) -> str:
    """Return the query as plain text after k worked examples of its domain. This is how a base
    model is asked."""
    shots = list(islice(items("sft", query["domain"], seed, worked=1.0), k))
    return as_text([*shots, Example(query, "")], FORMS[0]).rstrip()


def documents(domain: str, seed: int = 0) -> Iterator[str]:
    """Yield plain-text documents for pre-training without end: answered questions of the sft split.

    Nearly every document holds one question. With several in view, a small model finds it hardest
    to tell which one is being answered (docs/LOG.md). The report's synthetic data is written by
    larger models; a generator that knows the answer is our small-scale stand-in."""
    r = random.Random(f"documents {domain} {seed}")
    stream = items("sft", domain, seed + 1, worked=0.75)
    while True:
        form = r.choice(FORMS)
        count = 1 if r.random() < 0.95 else 2
        yield as_text(list(islice(stream, count)), form)


# ---------------------------------------------------------------------------------------------
# queries by name

def load(names: str, n: int = 0, seed: int = 0, reward: str = "", built_in: int = 400,
         reward_timeout: float = 60.0, domain_key: str = "") -> list[dict]:
    """Return the queries of sources that are joined by commas, one source after another.

    A source is a built-in split ("rl", "val", "test"), a variant of it ("c++:rl", see VARIANTS), or
    a file (`benchmarks.read_queries`). A language without a toolchain here is left out, with a line
    that says so.

    n: how many of each source; 0: all of a file, and `built_in` of a split. reward:
    "file.py:function", which takes the place of the checks; the rows of a file then need nothing
    but a "prompt". It may take `reward_timeout` seconds per response. domain_key: the column of a
    file that names the domain of each row."""
    sources = runnable(names)
    require(len(sources) > 0, f"--queries {names!r} names no source of queries")
    if reward:
        own_reward(reward)  # refuse now a file or function that is not there
    queries = []
    for name in sources:
        if is_split(name):
            found = load_split(name, n or built_in, seed)
        elif reward:
            found = load_prompts(name, n)
        else:
            found = load_runnable_file(name, n)
        if domain_key:
            set_domains(found, name, domain_key)
        queries += found
    if reward:
        check = {"kind": "own", "function": reward, "timeout": reward_timeout}
        queries = [query | {"check": check} for query in queries]
    return queries


def set_domains(queries: list[dict], path: str, key: str) -> None:
    """Let the column `key` of a file's first rows name the domains of its queries."""
    require(not is_split(path), f"--domain_key {key}: {path} has no columns, only files have them")
    for query, (line, row) in zip(queries, read_jsonl(path), strict=False):
        require(isinstance(row.get(key), str | int),
                f"{path}:{line}: --domain_key: no text or number under {key!r}")
        require(row[key] != "total", f"{path}:{line}: no domain may be called total")
        query["domain"] = str(row[key])


def runnable(names: str) -> list[str]:
    """Return the names, which commas join, without the languages that this machine cannot run, and
    print those."""
    kept = []
    for name in filter(None, names.split(",")):
        variant = name.partition(":")[0]
        problem = sandbox.languages().get(variant) if variant in VARIANTS else ""
        if problem:
            print(f"{name} is left out: no toolchain here ({problem})")
        else:
            kept.append(name)
    return kept


def is_split(name: str) -> bool:
    variant, _, split = name.rpartition(":")
    return split in SPLITS and variant in ("", *VARIANTS)


def load_split(name: str, n: int, seed: int) -> list[dict]:
    """Return n different queries of "SPLIT" or of "VARIANT:SPLIT"."""
    variant, _, split = name.rpartition(":")
    domains = [variant] if variant else DOMAINS
    return [example.query for example in distinct(split, n, seed, domains)]


def load_runnable_file(path: str, n: int) -> list[dict]:
    """Return the queries of a file. Refuse now what cannot be judged here, not in training.

    The tests of the first CHECKED rows are tried, in Python by two runs of 15 ms per row, if code
    is isolated here: a file's code is a stranger's. `python -m tasks check` tries all rows."""
    pairs = list(islice(read_queries(path), n or None))
    queries = [query for _, query in pairs]
    problems = []
    if hold_code(queries) and sandbox.is_isolated():
        problems = find_problems(queries[:CHECKED])
    for (line, _), problem in zip(pairs, problems, strict=False):
        require(not problem, f"{path}:{line}: {problem} (`python -m tasks check` finds all)")
    return queries


def load_prompts(path: str, n: int) -> list[dict]:
    """Return the rows of a file whose check will be the user's own function."""
    queries = []
    for line, row in islice(read_jsonl(path), n or None):
        require(row.get("prompt"),
                f'{path}:{line}: a row must have a "prompt", got {", ".join(row)}')
        query = {"domain": "own"} | row
        try:
            clean_prompt(query)
            parse_tools(row.get("tools"))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}:{line}: {type(error).__name__}: {error}") from None
        queries.append(query)
    require(len(queries) > 0, f"{path}: the file holds no queries")
    return queries
