"""What a stage gained: pass@1 and greedy accuracy a domain with 95% intervals, bits per byte of
held-out text. lib/report.py puts the stages side by side.

Every stage answers the same held-out queries (split "test": nothing trains or is tuned on it):
`samples` times at temperature 1 (pass@1 is the mean, pass@4 whether one of four passes) and once
greedily. A chat model gets the chat prompt; a base model, which never saw one
(--few_shot 1), gets worked examples as plain text. Intervals are over queries, normal, from the
spread of the queries' means: several samples of one query are not independent. With --reward,
which need not be 0 or 1, pass@1 and greedy are its means (the tables say "mean" of the first), and
a pass is what it gives 1.

    python evaluate.py --init runs/demo/grpo                       # table; writes eval.json there
    python evaluate.py --init runs/demo/pretrain --few_shot 1 --text runs/demo/data
    python evaluate.py --init runs/demo/dpo --samples 8 --reward_model runs/demo/reward
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data import documents
from data import mixture
import kernels
import tasks.queries
from tasks.math_answers import extract_answer
from lib.args import cli, positive, require
from lib.files import write_atomic, write_jsonl
from lib.optim import pad_rows, setup
from lib.run import peak_rss_mb
from model import Qwen2
from reward import RewardModel
from sample import generate, load_policy, rollout
from lib.vllm_client import rollout_backend
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = "runs/sft"           # model directory to evaluate
    queries: str = "test"            # query split or file
    n_queries: int = 0               # at most so many; 0: all of a file, 480 of a split
    reward: str = ""                 # your own, file.py:function(query, response) -> 0 to 1
    samples: int = 4                 # answers a query at temperature 1, for pass@1
    reward_model: str = ""           # choose among the samples with it: best of n
    max_new_tokens: int = 128        # longest answer
    rollout_url: str = ""            # ask --init on a server, http://HOST:PORT/v1
    few_shot: int = 0                # worked examples before each query, as plain text: base models
    text: str = ""                   # bits per byte on the held-out documents of this directory
    window: int = 512                # tokens that such a document is cut into
    yarn: float = 1.0                # stretch the context by this factor with YaRN; 1: off
    dca: bool = False                # stretch it 4x with dual chunk attention
    seed: int = 0                    # of the samples
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


# ---------------------------------------------------------------------------------------------
# metrics

def interval(values: list[float], least: float = 0.0) -> dict[str, float]:
    """Mean of per-query values in [least, 1] and its normal 95% interval."""
    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return {"mean": mean, "low": max(least, mean - 1.96 * spread),
            "high": min(1.0, mean + 1.96 * spread), "n": n}


def by_domain(queries: list[dict], values: list[float]) -> dict[str, dict]:
    domains = sorted({q["domain"] for q in queries})
    return {"total": interval(values)} | {
        d: interval([v for q, v in zip(queries, values, strict=True) if q["domain"] == d])
        for d in domains}


@torch.no_grad()
def bits_per_byte(model: Qwen2, tokenizer: Tokenizer, texts: list[str], max_len: int = 512) -> dict:
    """-log2 p(text) over its UTF-8 bytes, so that tokenizers of any vocabulary compare; also by
    quarters of the window, where a model that was trained on shorter rows shows it. Documents are
    cut into windows of max_len tokens; the first token of a window is given, not predicted."""
    device, windows = model.head_weight.device, []
    nats, n_bytes = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for text in texts:
        ids = tokenizer.encode(text)
        windows += [ids[i:i + max_len] for i in range(0, len(ids) - 1, max_len - 1)]
    windows = sorted((w for w in windows if len(w) > 1), key=len)
    for i in range(0, len(windows), 16):
        ids = pad_rows(windows[i:i + 16], 0).to(device)
        places = torch.arange(1, ids.shape[1], device=device)
        inside = places < torch.tensor([[len(w)] for w in windows[i:i + 16]], device=device)
        targets = ids[:, 1:][inside]
        logprobs = kernels.token_logprobs(model.hidden(ids[:, :-1])[inside], model.head_weight,
                                          targets)
        quarter = (places * 4 // max_len).expand_as(inside)[inside].cpu()
        nats.index_add_(0, quarter, -logprobs.double().cpu())
        n_bytes.index_add_(0, quarter, torch.tensor(
            [len(tokenizer.token_bytes(t)) for t in targets.tolist()]).double())
    bits = nats / math.log(2)
    return {"bits_per_byte": (bits.sum() / n_bytes.sum()).item(), "bytes": int(n_bytes.sum()),
            "by_quarter": (bits / n_bytes.clamp_min(1)).tolist()}


# ---------------------------------------------------------------------------------------------
# answers

def answer(model, tokenizer, queries, args: Args, n: int, temperature: float):
    """-> one list of n (text, score) a query."""
    if not args.few_shot:
        groups = rollout(
            model,
            tokenizer,
            queries,
            n,
            args.max_new_tokens,
            temperature,
            args.seed,
            tasks.queries.score_many,
        )
        return [[(a.text, a.score) for a in group] for group in groups]
    # A base model goes on with the next question after its answer: the blank line ends it.
    prompts = [
        tokenizer.encode(tasks.queries.few_shot(q, args.few_shot, args.seed)) for q in queries
    ]
    blank = tokenizer.encode("\n\n")
    stops = tokenizer.stop_ids + (tuple(blank) if len(blank) == 1 else ())
    out = generate(model, prompts, args.max_new_tokens, temperature, seed=args.seed, n=n,
                   stop_ids=stops, valid_vocab=tokenizer.n_vocab)
    texts = [tokenizer.decode(c.ids[:-1] if c.finished else c.ids).split("\n\n")[0].strip()
             for c in out]
    scores = tasks.queries.score_many([q for q in queries for _ in range(n)], texts)
    pairs = list(zip(texts, scores, strict=True))
    return [pairs[i:i + n] for i in range(0, len(pairs), n)]


def best_of(queries: list[dict], sampled, scorer: RewardModel) -> dict[str, dict]:
    """How good is the one of a query's answers that is chosen by chance, by the majority (of equal
    final answers; of equal texts where none is marked), by the reward model r, by the majority with
    sigmoid(r) of a vote each? Between answers with as many votes, chance decides: their mean score.
    And query by query, the lead of those that use the reward model."""
    rewards = iter(scorer.score([q["prompt"] for q, group in zip(queries, sampled, strict=True)
                                 for _ in group], [text for group in sampled for text, _ in group]))
    chosen = {"chance": [], "majority": [], "reward model": [], "weighted majority": []}
    for group in sampled:
        finals = [extract_answer(text, strict=True) or text for text, _ in group]
        mine = [next(rewards) for _ in group]
        weights = torch.tensor(mine).sigmoid().tolist()
        weighted = [sum(w for w, other in zip(weights, finals, strict=True) if other == final)
                    for final in finals]
        for votes, values in zip(([0] * len(group), [finals.count(a) for a in finals], mine,
                                  weighted), chosen.values(), strict=True):
            best = [score for vote, (_, score) in zip(votes, group, strict=True)
                    if vote == max(votes)]
            values.append(sum(best) / len(best))
    out = {name: interval(values) for name, values in chosen.items()}
    for ours in ("reward model", "weighted majority"):
        for name in ("chance", "majority"):
            pairs = zip(chosen[ours], chosen[name], strict=True)
            out[f"{ours} - {name}"] = interval([a - b for a, b in pairs], least=-1.0)
    return out


# ---------------------------------------------------------------------------------------------
# tables

def cell(value: dict, form: str = ".1f") -> str:
    mean, low, high = (format(100 * value[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(rows: list[tuple[str, dict]], sampled: str = "pass@1") -> str:
    """Markdown: stages x domains, percent with 95% intervals; one table a metric."""
    out = []
    for metric in ("pass@1", "greedy"):
        domains, label = list(rows[0][1][metric]), metric.replace("pass@1", sampled)
        out += [f"| {label}, % | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
        out += [f"| {name} | " + " | ".join(cell(metrics[metric][d]) for d in domains) + " |"
                for name, metrics in rows]
        out.append("")
    out += [f"{name}: {metrics['bits_per_byte']:.3f} bits per byte of held-out text"
            for name, metrics in rows if "bits_per_byte" in metrics]
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    device, autocast = setup(args)
    positive(args, "samples", "max_new_tokens")
    model, tokenizer = load_policy(args.init, device)
    model.config = model.config.extended(args.yarn, args.dca)
    longest = model.config.max_position_embeddings
    require(1 < args.window <= longest or not args.text,
            f"--window {args.window} wants 2 to {longest}, the positions of {args.init}")

    # data
    queries = tasks.queries.load(args.queries, args.n_queries, reward=args.reward, built_in=480)
    foreign = sorted({q["domain"] for q in queries} - set(tasks.queries.DOMAINS))
    require(not (args.few_shot and foreign), f"--few_shot has no worked examples of the domain "
            f"{', '.join(foreign)}, only of {', '.join(tasks.queries.DOMAINS)}")
    texts = []
    if args.text:
        texts = [
            doc["text"]
            for file in sorted(Path(args.text).glob("*.jsonl"))
            if file.stem not in tasks.queries.DOMAINS
            for doc in documents.read_documents(file)
        ]
        texts = [text for text in texts if mixture.is_held_out(text)]
        require(len(texts) > 0, f"--text {args.text}: no held-out document in it")
    require(not args.rollout_url or args.yarn == 1 and not args.dca,
            "--rollout_url: --yarn and --dca are settings of the server there")

    # answers
    policy = rollout_backend(args.rollout_url, model, tokenizer)
    with autocast:
        sampled = answer(policy, tokenizer, queries, args, args.samples, 1.0)
        greedy = answer(policy, tokenizer, queries, args, 1, 0.0)

    # metrics
    metrics = {"pass@1": by_domain(queries, [sum(score for _, score in group) / args.samples
                                             for group in sampled])}
    if args.samples > 1:
        metrics[f"pass@{args.samples}"] = by_domain(
            queries, [float(any(score == 1 for _, score in group)) for group in sampled])
    if args.reward_model:
        scorer = RewardModel.from_pretrained(args.reward_model, device=device)
        with autocast:
            metrics["best_of"] = best_of(queries, sampled, scorer)
        for name, value in metrics["best_of"].items():
            print(f"best of {args.samples}, {name}: {cell(value)}")
    metrics["greedy"] = by_domain(queries, [group[0][1] for group in greedy])
    if texts:
        metrics |= bits_per_byte(model, tokenizer, texts, args.window)

    # save
    write_jsonl(Path(args.init) / "eval_samples.jsonl", (
        {"domain": q["domain"], "prompt": q["prompt"], "check": q["check"], "greedy": g[0][0],
         "greedy_score": g[0][1], "sampled": s[0][0], "sampled_score": s[0][1],
         "pass@1": sum(score for _, score in s) / len(s)}
        for q, g, s in zip(queries, greedy, sampled, strict=True)))
    settings = {"queries": args.queries, "n": len(queries), "reward": args.reward,
                "samples": args.samples, "few_shot": args.few_shot, "seed": args.seed,
                "max_new_tokens": args.max_new_tokens, "window": args.window, "yarn": args.yarn,
                "dca": args.dca, "rollout_url": args.rollout_url}
    write_atomic(Path(args.init) / "eval.json", json.dumps(
        {"settings": settings, "metrics": metrics, "peak_rss_mb": round(peak_rss_mb())}, indent=1))
    print(table([(Path(args.init).name, metrics)], "mean" if args.reward else "pass@1"))
    if texts:
        print("by quarters of its window:", *(f"{bits:.3f}" for bits in metrics["by_quarter"]))
    return metrics


if __name__ == "__main__":
    cli(main, Args)
