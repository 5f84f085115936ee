"""Look at the tasks, and write conversations for SFT whose answers passed their checks.

    python -m tasks                                     # a few demonstrations and verdicts
    python -m tasks demonstrations --n 1000 --out demonstrations.jsonl
    python -m tasks rejection --init runs/sft --queries rl --out passed.jsonl
    python sft.py --init runs/sft --data passed.jsonl --out runs/rejection
    python -m tasks check --queries my.jsonl --out usable.jsonl
    python -m tasks snippets --dir my_code --out tasks.jsonl

`demonstrations` writes answers of the built-in generators. `rejection` is rejection sampling: it
samples several responses to each query from the model in --init, and keeps the distinct ones that
pass (report 4.1 keeps what passes execution, answer matching or its constraints). The report does
not disclose the number of responses or the temperature; 8 and 1.0 are our choice. --critics A,B
also asks judges (data/judge.py): as in the report, only what all of them approve of is kept.

`check` tries the tests of every row of a file (see check_tests.py) and writes the rows that can be
used. A row takes one run, and one more where it has a solution: some 15 ms of CPU time in Python
and bash, 25 to 40 ms in JavaScript, C++ and Rust, 0.4 s in Java, as long as nothing compiles.
"""
from dataclasses import dataclass

from data.judge import Judge
from lib.args import cli, positive, require
from lib.files import write_jsonl
from lib.optim import setup
from lib.vllm_client import rollout_backend
from sample import load_policy, rollout
from tasks import queries
from tasks.benchmarks import read_queries
from tasks.check_tests import find_problems
from tasks.snippets import kept_tasks, snippet_tasks

SHOWN = 8  # demonstrations that `python -m tasks` prints


@dataclass
class Args:
    out: str = ""                # JSONL file to write the conversations to
    n: int = 0                   # at most so many queries; 0: all of a file, 1000 built-in ones
    seed: int = 0                # seed of the queries and of sampling
    init: str = "runs/sft"       # rejection: model directory that answers
    queries: str = "rl"          # rejection: splits or files joined by commas; check: one file
    dir: str = ""                # snippets: directory of Python files; "": the standard library
    also: str = ""               # demonstrations: a tenth each of VARIANTS, joined by commas
    responses: int = 8           # rejection: responses sampled per query
    max_new_tokens: int = 160    # rejection: longest response, in tokens
    allow_unsafe_code: bool = False  # rejection: judge code although isolation is missing
    rollout_url: str = ""        # rejection: sample on a server of --init, http://HOST:PORT/v1
    critics: str = ""            # rejection: judges that must all approve, separated by commas
    judge_url: str = ""          # rejection: a server that has the critics, http://HOST:PORT/v1
    device: str = "auto"         # rejection: auto, cpu, cuda[:N]
    dtype: str = "auto"          # rejection: auto, float32, bfloat16


def rejection_sample(policy, tokenizer, asked: list[dict], responses: int, max_new_tokens: int,
                     seed: int) -> list[dict]:
    """Sample several responses per query; return a conversation for each distinct one that passes.

    policy: a model, or a server with the same weights. Responses that were cut at max_new_tokens
    score 0, so none of them is kept."""
    groups = rollout(policy, tokenizer, asked, responses, max_new_tokens, temperature=1.0,
                     seed=seed, score=queries.score_steps)
    passed = {}  # a dict, because it keeps the order
    for group in groups:
        for answer in group:
            if answer.score > 0:
                prompt = answer.query["prompt"]
                row = queries.conversation(prompt, answer.text)
                if "tools" in answer.query:
                    row["tools"] = answer.query["tools"]
                passed[repr(prompt), answer.text] = row
    return list(passed.values())


def main(args: Args) -> None:
    """Print a few demonstrations with their checks and verdicts."""
    for query, answer in queries.distinct("sft", SHOWN, args.seed):
        verdict = queries.score(query, answer)
        print(f"[{query['domain']}] {query['prompt']}\n    {query['check']}")
        print(f"assistant: {answer}\n    scores {verdict}\n")


def demonstrations(args: Args) -> None:
    """Write verified demonstrations of the sft split: --n, --seed, --also, --out FILE.jsonl"""
    require(args.out != "", "--out must name the JSONL file to write")
    also = queries.runnable(args.also)
    unknown = set(also) - queries.VARIANTS.keys()
    require(not unknown and len(also) < 10,
            f"--also takes {', '.join(queries.VARIANTS)}, got {args.also}")
    rows = queries.demonstrations(args.n or 1000, args.seed, also)
    write_jsonl(args.out, rows)
    print(f"{len(rows)} conversations in {args.out}")


def rejection(args: Args) -> None:
    """Write the sampled responses that pass: --init, --queries, --n, --responses, --out, ..."""
    require(args.out != "", "--out must name the JSONL file to write")
    positive(args, "responses", "max_new_tokens")
    device, autocast = setup(args)
    asked = queries.load(args.queries, args.n, args.seed, built_in=1000)
    queries.require_isolation(asked, args.allow_unsafe_code)
    model, tokenizer = load_policy(args.init, device)
    names = args.critics.split(",") if args.critics or args.judge_url else []
    critics = {name: Judge(name, args.judge_url, device) for name in names}
    with autocast:
        policy = rollout_backend(args.rollout_url, model, tokenizer)
        rows = rejection_sample(policy, tokenizer, asked, args.responses, args.max_new_tokens,
                                args.seed)
        for name, critic in critics.items():
            rows = [row for row in rows if critic.approves(row["messages"])]
            print(f"critic {name} approves of {len(rows)}")
    require(len(rows) > 0, f"--init {args.init}: no response to {args.queries} passes its check "
            "and all --critics")
    write_jsonl(args.out, rows)
    print(f"{len(rows)} conversations in {args.out}: distinct responses to {len(asked)} queries "
          "that pass their checks")


def check(args: Args) -> None:
    """Name the rows of a file whose tests decide nothing; write the others: --queries, --out"""
    pairs = list(read_queries(args.queries))
    asked = [query for _, query in pairs]
    queries.require_isolation(asked, args.allow_unsafe_code)
    usable = []
    for (line, query), problem in zip(pairs, find_problems(asked), strict=True):
        if problem:
            print(f"{args.queries}:{line}: {problem}")
        else:
            usable.append(query)
    if args.out:
        write_jsonl(args.out, usable)
    print(f"{len(usable)} of {len(pairs)} queries can be used")


def snippets(args: Args) -> None:
    """Write Python functions with doctests as tasks: --dir, --out (see tasks/snippets.py)"""
    require(args.out != "", "--out must name the JSONL file to write")
    found = snippet_tasks(args.dir)
    queries.require_isolation([task for task in found if task], args.allow_unsafe_code)
    kept, dropped = kept_tasks(found)
    write_jsonl(args.out, kept)
    print(f"{len(kept)} of {len(found)} Python functions with examples in {args.out}")
    for reason, count in dropped.most_common():
        print(f"{count} dropped: {reason}")


if __name__ == "__main__":
    cli(main, Args, demonstrations=demonstrations, rejection=rejection, check=check,
        snippets=snippets)
