"""What a stage gained: pass@1 and greedy accuracy per domain with 95% intervals, and bits per byte
of held-out text. lib/report.py puts the stages side by side.

Every stage answers the same held-out queries (split "test": nothing trains or is tuned on it),
each `samples` times at temperature 1 and once by greedy decoding. pass@1 is the mean score of the
samples, also where a --reward of your own is not 0 or 1. A base model never saw a chat prompt, so
it gets worked examples as plain text (--few_shot 1).

Intervals are over queries, normal, from the spread of the queries' means: several samples of one
query are not independent.

    python evaluate.py --init runs/demo/grpo                       # table; writes runs/evaluation
    python evaluate.py --init runs/demo/pretrain --few_shot 1 --text runs/demo/data
    python evaluate.py --init runs/demo/dpo --samples 8 --reward_model runs/demo/reward
"""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
import tasks.queries
from data import documents
from data.mixture import is_held_out
from lib.args import cli, positive, require
from lib.files import read_json, write_atomic, write_jsonl
from lib.long_context import extended
from lib.optim import setup
from lib.run import require_writable
from lib.tables import cell, interval, metric_tables
from lib.vllm_client import rollout_backend
from model import Qwen2
from reward import RewardModel
from sample import answer_text, generate, load_policy, part_means, rollout
from tasks.math_answers import extract_answer
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = "runs/sft"           # model directory to evaluate
    out: str = "runs/evaluation"     # directory for eval.json and eval_samples.jsonl
    queries: str = "test"            # query splits or files, joined by commas
    n_queries: int = 0               # at most so many of each; 0: all of a file, 480 of a split
    reward: str = ""                 # your own, file.py:function(query, response) -> 0 to 1
    reward_timeout: float = 60.0     # seconds that it may take per response
    domain_key: str = ""             # column of a file's rows that breaks the tables down
    samples: int = 4                 # answers per query at temperature 1, for pass@1
    reward_model: str = ""           # choose among the samples with it: best of n
    max_new_tokens: int = 128        # longest answer
    allow_unsafe_code: bool = False  # judge code although the sandbox lacks layers of isolation
    rollout_url: str = ""            # ask --init on a server, http://HOST:PORT/v1
    few_shot: int = 0                # worked examples before each query, as plain text: base models
    text: str = ""                   # bits per byte on the held-out documents of this directory
    window: int = 512                # tokens per window that such a document is cut into
    yarn: float = 1.0                # reach this many times the training length with YaRN; 1: off
    dca: bool = False                # reach 4 times the training length by dual chunk attention
    seed: int = 0                    # of the samples
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


class Answer(NamedTuple):
    text: str
    score: float
    parts: dict = {}                 # of a --reward, besides the reward


# ---------------------------------------------------------------------------------------------
# metrics

def by_domain(queries: list[dict], values: list[float]) -> dict[str, dict]:
    """Return the interval of the values over all queries ("total") and within each domain."""
    domains = [query["domain"] for query in queries]
    out = {"total": interval(values)}
    for domain in sorted(set(domains)):
        some = [value for value, name in zip(values, domains, strict=True) if name == domain]
        out[domain] = interval(some)
    return out


@torch.no_grad()
def bits_per_byte(model: Qwen2, tokenizer: Tokenizer, texts: list[str], max_len: int = 512) -> dict:
    """Return -log2 p(text) per UTF-8 byte, which compares models of any vocabulary. Documents are
    cut into windows of max_len tokens that overlap by one: only the first token of a document is
    not predicted. In float32, without autocast, as small differences count."""
    nats = 0.0
    n_bytes = 0
    for text in texts:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids) - 1, max_len - 1):
            window = torch.tensor([ids[start:start + max_len]], device=model.head_weight.device)
            targets = window[0, 1:]
            hidden = model.hidden(window[:, :-1])[0]
            logprobs = kernels.token_logprobs(hidden, model.head_weight, targets)
            nats -= logprobs.sum().item()
            n_bytes += len(tokenizer.decode_bytes(targets.tolist()))
    bits = nats / math.log(2)
    return {"bits_per_byte": bits / max(1, n_bytes), "bytes": n_bytes}


def best_of(queries: list[dict], sampled: list[list[Answer]], scorer: RewardModel) -> dict:
    """Return the mean score of the answers that a majority and that the reward model choose, and
    how far the reward model leads over the majority and over chance, query by query. The majority
    votes by equal final answers, or by equal texts where no answer is marked."""
    prompts = []
    texts = []
    for query, group in zip(queries, sampled, strict=True):
        prompt = scorer.tokenizer.render_prompt(query["prompt"], query.get("tools"))
        prompts += [prompt] * len(group)
        texts += [answer.text for answer in group]
    rewards = iter(scorer.score(prompts, texts))
    majority = []
    preferred = []
    for group in sampled:
        finals = [extract_answer(answer.text, strict=True) or answer.text for answer in group]
        votes = [finals.count(final) for final in finals]
        majority.append(chosen_score(group, votes))
        preferred.append(chosen_score(group, [next(rewards) for _ in group]))
    chance = [mean_score(group) for group in sampled]
    over_majority = [a - b for a, b in zip(preferred, majority, strict=True)]
    over_chance = [a - b for a, b in zip(preferred, chance, strict=True)]
    return {
        "majority": interval(majority),
        "reward model": interval(preferred),
        "reward model - majority": interval(over_majority, least=-1.0),
        "reward model - chance": interval(over_chance, least=-1.0),
    }


def chosen_score(group: list[Answer], points: list[float]) -> float:
    """Return the score of the answer with the most points. Chance decides between equal ones, so
    their mean counts."""
    top = max(points)
    best = [answer for answer, point in zip(group, points, strict=True) if point == top]
    return mean_score(best)


# ---------------------------------------------------------------------------------------------
# answers

def answer_queries(model, tokenizer: Tokenizer, queries: list[dict], args: Args, n: int,
                   temperature: float) -> list[list[Answer]]:
    """Return n scored answers to each query (Rollouts have the fields of an Answer, too). A query
    is asked in a chat or, with args.few_shot, as plain text behind worked examples."""
    if not args.few_shot:
        return rollout(model, tokenizer, queries, n, args.max_new_tokens, temperature, args.seed,
                       tasks.queries.score_many)
    prompts = [tokenizer.encode(tasks.queries.few_shot(query, args.few_shot, args.seed))
               for query in queries]
    # A base model goes on with the next question after its answer: the blank line ends it.
    stop_ids = tokenizer.stop_ids
    blank_line = tokenizer.encode("\n\n")
    if len(blank_line) == 1:
        stop_ids += (blank_line[0],)
    completions = generate(model, prompts, args.max_new_tokens, temperature, seed=args.seed, n=n,
                           stop_ids=stop_ids, valid_vocab=tokenizer.n_vocab)
    texts = []
    ended = []
    for completion in completions:
        text, blank, _ = answer_text(tokenizer, completion).partition("\n\n")
        texts.append(text.strip())
        ended.append(replace(completion, finished=completion.finished or blank != ""))
    asked = [query for query in queries for _ in range(n)]
    scores = tasks.queries.score_many(asked, texts, ended)
    answers = []
    for text, score, completion in zip(texts, scores, ended, strict=True):
        parts = getattr(completion, "parts", {})  # set by a --reward
        answers.append(Answer(text, score, parts))
    return [answers[i:i + n] for i in range(0, len(answers), n)]


def held_out_texts(directory: str) -> list[str]:
    """Read the documents that pretrain.py left out, of real text only: no worked queries."""
    texts = []
    for file in sorted(Path(directory).glob("*.jsonl")):
        if file.stem not in tasks.queries.DOMAINS:
            texts += [document["text"] for document in documents.read_documents(file)]
    texts = [text for text in texts if is_held_out(text)]
    require(len(texts) > 0, f"--text {directory}: no held-out document in it")
    return texts


def sample_rows(queries: list[dict], greedy: list[list[Answer]], sampled: list[list[Answer]]):
    """Yield the rows of eval_samples.jsonl: a query, its greedy and its first sampled answer."""
    for query, (greedy_answer,), group in zip(queries, greedy, sampled, strict=True):
        row = {
            "domain": query["domain"], "prompt": query["prompt"], "check": query["check"],
            "greedy": greedy_answer.text, "greedy_score": greedy_answer.score,
            "sampled": group[0].text, "sampled_score": group[0].score,
            "pass@1": mean_score(group),
        }
        if greedy_answer.parts:
            row["greedy_parts"] = greedy_answer.parts
        yield row


def mean_score(group: list[Answer]) -> float:
    return sum(answer.score for answer in group) / len(group)


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    device, autocast = setup(args)
    positive(args, "samples", "max_new_tokens")
    require(args.window > 1, f"--window must be at least 2, got {args.window}")
    require(not args.rollout_url or args.yarn == 1 and not args.dca,
            "--rollout_url: --yarn and --dca are settings of the server there")
    out = Path(args.out)
    require(not (out / "config.json").exists(),
            f"--out {out} holds a model, and an evaluation must not change it: choose another")
    require_writable(out)

    # data
    queries = tasks.queries.load(args.queries, args.n_queries, reward=args.reward, built_in=480,
                                 reward_timeout=args.reward_timeout, domain_key=args.domain_key)
    tasks.queries.require_isolation(queries, args.allow_unsafe_code)
    foreign = sorted({query["domain"] for query in queries} - set(tasks.queries.DOMAINS))
    require(not args.few_shot or not foreign,
            f"--few_shot has worked examples of the built-in domains only, not of {foreign}")
    texts = held_out_texts(args.text) if args.text else []

    # model
    model, tokenizer = load_policy(args.init, device)
    model.config = extended(model.config, args.yarn, args.dca)
    longest = model.config.max_position_embeddings
    require(not texts or args.window <= longest,
            f"--window {args.window}: {args.init} has only {longest} positions")
    policy = rollout_backend(args.rollout_url, model, tokenizer)

    # answers
    with autocast:
        sampled = answer_queries(policy, tokenizer, queries, args, args.samples, 1.0)
        greedy = answer_queries(policy, tokenizer, queries, args, 1, 0.0)

    # metrics
    metrics = {"pass@1": by_domain(queries, [mean_score(group) for group in sampled])}
    if args.reward_model:
        scorer = RewardModel.from_pretrained(args.reward_model, device=device)
        with autocast:
            metrics["best_of"] = best_of(queries, sampled, scorer)
    parts = part_means([answer for group in sampled for answer in group])
    if parts:
        metrics["parts"] = parts
    metrics["greedy"] = by_domain(queries, [mean_score(group) for group in greedy])
    if texts:
        metrics |= bits_per_byte(model, tokenizer, texts, args.window)

    # save
    record = {"settings": asdict(args) | {"n": len(queries)}, "metrics": metrics,
              "run": read_json(Path(args.init) / "run.json", missing_ok=True)}
    write_jsonl(out / "eval_samples.jsonl", sample_rows(queries, greedy, sampled))
    write_atomic(out / "eval.json", json.dumps(record, indent=1))
    for name, value in metrics.get("best_of", {}).items():
        print(f"best of {args.samples}, {name}: {cell(value)}")
    for table in metric_tables({Path(args.init).name: metrics}):
        print(table.markdown() + "\n")
    for name, mean in parts.items():
        print(f"{name}: {mean:.4g}")
    if texts:
        print(f"{metrics['bits_per_byte']:.3f} bits per byte of held-out text")
    return metrics


if __name__ == "__main__":
    cli(main, Args)
