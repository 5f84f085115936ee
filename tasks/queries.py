"""Queries whose answers a program can check, in the four domains of the report's offline and
online RL (sections 4.2, 4.3): mathematics, code, instruction following, logic.

The built-in queries are generated, so that the whole pipeline runs with no download. Every prompt
belongs to exactly one split, by a hash of its text, so no two splits share a query:

    sft 40%   demonstrations for SFT and the worked examples inside pre-training text
    rl  40%   queries without answers: DPO, the reward model and GRPO ("a new query set", 4.2)
    val 10%   for choosing settings            test 10%   for the report, and for nothing else

Demonstrations come in several styles, as collected data does: some show their work, some state
the answer at once. All of them are right. Which style a model of a given size should use is for
reinforcement learning to find out.

A query is {"prompt": str, "domain": str, "check": {...}}; `score(query, response)` is 1.0 or 0.0.
Beside the built-in ones, `load` gives prompts of IFEval's kinds (ifeval.py) and reads the public
benchmark files (benchmarks.py).

    python -m tasks                       # a few queries, demonstrations and verdicts
"""
import hashlib
import math
import random
import re
from itertools import islice

from tasks import ifeval
from tasks import sandbox
from lib.args import InputError, require
from lib.files import read_jsonl
from tasks.benchmarks import load_file
from tasks.custom import line_in, own_reward
from tasks.math_answers import extract_answer, math_equal
from tasks.toy import code, follows, instruction, logic, mathematics, words_of

DOMAINS = ("mathematics", "code", "instruction", "logic")
SPLITS = {"test": range(0, 10), "val": range(10, 20), "rl": range(20, 60), "sft": range(60, 100)}


def split_of(prompt: str) -> str:
    bucket = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


# ---------------------------------------------------------------------------------------------
# scoring

def extract_code(response: str) -> str:
    """The last fenced block, or the whole response when there is none."""
    blocks = re.findall(r"```(?:\w+)?\n(.*?)```", response, re.S)
    return blocks[-1] if blocks else response


VERDICTS: dict[tuple, bool] = {}  # of the latest programs: in RL, many come again in later steps
MAX_VERDICTS = 20_000  # some 20 MB of text


def score_many(queries: list[dict], responses: list[str]) -> list[float]:
    """1.0 where the response passes its query's check, else 0.0. Code runs in the sandbox, several
    programs at a time, equal ones once while VERDICTS has them."""
    scores, jobs = [0.0] * len(queries), {}
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        check = query["check"]
        if check["kind"] == "code":
            jobs[i] = (check.get("prefix", "") + extract_code(response), check["language"],
                       check["tests"])
        elif check["kind"] == "math":
            answer = extract_answer(response, strict=True)
            scores[i] = float(answer is not None and math_equal(answer, check["answer"]))
        elif check["kind"] == "own":
            try:
                value = own_reward(check["function"])(query, response)
            except Exception as error:  # whatever stands in it
                raise InputError(f"{check['function']}{line_in(check['function'], error)}: "
                                 f"{type(error).__name__}: {error}, for the response "
                                 f"{response[:200]!r} to {str(query['prompt'])[:200]!r}") from None
            try:  # numpy's and torch's numbers too
                scores[i] = math.nan if isinstance(value, str) else float(value)
            except (TypeError, ValueError):
                scores[i] = math.nan
            require(0 <= scores[i] <= 1,
                    f"{check['function']} gave {value!r}: want a number from 0 to 1, for the "
                    f"response {response[:200]!r}")
        else:
            follow = ifeval.follows if check["kind"] == "ifeval" else follows
            rules = zip(check["instruction_id_list"], check["kwargs"], strict=True)
            # The question names the topic and the words to use: saying it back must earn nothing.
            echo = words_of(query["prompt"]) == words_of(response)
            scores[i] = float(bool(response.strip()) and not echo
                              and all(follow(response, rule, kw) for rule, kw in rules))
    new = list(dict.fromkeys(job for job in jobs.values() if job not in VERDICTS))
    results = sandbox.run_many([dict(zip(("code", "language", "tests"), job, strict=True))
                                for job in new])
    VERDICTS.update((job, result.passed) for job, result in zip(new, results, strict=True))
    for i, job in jobs.items():
        scores[i] = float(VERDICTS[job])
    for oldest in list(VERDICTS)[:-MAX_VERDICTS]:
        del VERDICTS[oldest]
    return scores


def score(query: dict, response: str) -> float:
    return score_many([query], [response])[0]


# ---------------------------------------------------------------------------------------------
# queries, demonstrations, documents

GENERATORS = {"mathematics": mathematics, "code": code, "instruction": instruction, "logic": logic}


def items(split: str, domain: str, seed: int, worked: float = 0.6):
    """Endless (query, demonstration) of one split and domain; prompts may come again. worked: the
    share of the demonstrations in mathematics and logic that show their work."""
    r = random.Random(f"{split} {domain} {seed}")
    while True:
        prompt, check, right = GENERATORS[domain](r)
        demonstration = right[len(right) > 1 and r.random() < worked]
        if split_of(prompt) == split:
            yield {"prompt": prompt, "domain": domain, "check": check}, demonstration


def distinct(split: str, n: int, seed: int) -> list[tuple[dict, str]]:
    """n (query, demonstration) with n different prompts, the four domains in turn."""
    streams, seen, out = [items(split, domain, seed) for domain in DOMAINS], set(), []
    while len(out) < n:
        stream, repeats = streams[len(out) % len(DOMAINS)], 0
        pair = next(stream)
        while pair[0]["prompt"] in seen:
            pair, repeats = next(stream), repeats + 1
            require(repeats < 100_000, f"the built-in {split} split has no {n} different queries")
        seen.add(pair[0]["prompt"])
        out.append(pair)
    return out


def builtin(split: str, n: int, seed: int = 0) -> list[dict]:
    """n different queries, the four domains in turn."""
    return [query for query, _ in distinct(split, n, seed)]


def demonstrations(n: int, seed: int = 0) -> list[dict]:
    """n conversations of the sft split, each verified by its own check (report 4.1: only what
    passes execution or answer matching is kept)."""
    pairs = distinct("sft", n, seed)
    passed = score_many([query for query, _ in pairs], [text for _, text in pairs])
    return [{"messages": [{"role": "user", "content": query["prompt"]},
                          {"role": "assistant", "content": text}], "domain": query["domain"]}
            for (query, text), ok in zip(pairs, passed, strict=True) if ok]


def few_shot(query: dict, k: int, seed: int = 0) -> str:
    """The query as plain text after k worked examples of its domain, in the first of FORMS: how a
    base model is asked."""
    stream = items("sft", query["domain"], seed, worked=1.0)
    shots = [next(stream) for _ in range(k)]
    return "".join(FORMS[0].format(q["prompt"], text) + "\n\n" for q, text in shots) \
        + FORMS[0].format(query["prompt"], "").rstrip()


# Collected text puts questions in more ways than one; the chat template, first met in SFT, is then
# only another. (Six layouts were tried as well: LOG.md, "SFT above the base model".)
FORMS = ("Question: {}\nAnswer: {}", "Problem: {}\nSolution:\n{}", "User: {}\nAssistant:\n{}")


def documents(domain: str, seed: int = 0):
    """Endless plain-text documents for pre-training: answered questions of the sft split, nearly
    always one a document: with several in view, which of them is being answered is the hardest
    thing for a small model to find out (LOG.md). The report's synthetic data is written
    by larger models; a generator that knows the answer is the small-scale stand-in."""
    r, stream = random.Random(f"documents {domain} {seed}"), items("sft", domain, seed + 1, 0.75)
    while True:
        form = r.choice(FORMS)
        shots = [next(stream) for _ in range(1 if r.random() < 0.95 else 2)]
        yield "\n\n".join(form.format(q["prompt"], text) for q, text in shots)


def load(name: str, n: int = 0, seed: int = 0, reward: str = "", built_in: int = 400) -> list[dict]:
    """Queries of a built-in split ("rl", "val", "test"), of IFEval's kinds made for a split
    ("ifeval:rl"), or of a file (see `load_file`): n of them, or with n = 0 all of a file and
    `built_in` of a split. With `reward`, "file.py:function", that function takes the place of the
    checks, and a file needs nothing but a "prompt" a row."""
    kind, _, split = name.rpartition(":")
    is_file = split not in SPLITS or kind not in ("", "ifeval")
    if reward:
        own_reward(reward)
        rows = list(read_jsonl(name)) if is_file else enumerate(load(name, n or built_in, seed), 1)
        rows = list(islice(rows, n or None))
        require(rows, f"{name}: no query in it")
        for line, row in rows:
            require(row.get("prompt"), f'{name}:{line}: want a "prompt", got {", ".join(row)}')
        check = {"kind": "own", "function": reward}
        return [{"domain": "own", **row, "check": check} for _, row in rows]
    if is_file:
        queries, here = load_file(name)[:n or None], sandbox.languages()
        for query in queries:  # refuse now what cannot run, not while training
            lack = here.get(query["check"].get("language", "python"), "is unknown")
            require(not lack, f"{name}: a check in {query['check'].get('language')}: {lack}")
        return queries
    n, made = n or built_in, {}
    if not kind:
        return builtin(name, n, seed)
    for query in ifeval.queries(random.Random(f"{name} {seed}")):
        if len(made) == n:
            return list(made.values())
        if split_of(query["prompt"]) == split:
            made[query["prompt"]] = query
