"""Stage 5, online reinforcement learning: GRPO (report section 4.3; DeepSeekMath, eq. 3).

For each query the policy writes a group of G = 8 responses. Each response's advantage is its reward
against its own group, A_i = (r_i - mean(r)) / std(r), the same for all its tokens, and the policy
climbs, per token,

    min(rho A, clip(rho, 1 - eps, 1 + eps) A) - kl * (pi_ref/pi - log(pi_ref/pi) - 1)

with rho = pi / pi_old. As in the report, an episode is one optimizer step on fresh samples (2048 =
256 queries x 8 there), so rho = 1 and the clip is idle unless --inner_steps is raised; and queries
are taken in order of the variance of the reward model's scores over their responses, highest
first. The reward is Qwen2.5-Math's, verifier and reward model together (eq. in its section 4):

    r = sigmoid(r_m / 2) + (r_v - 1):  right answers get (0, 1), wrong ones (-1, 0)

so the reward model ranks answers but can never make a wrong one beat a right one. Not disclosed, so
our choice: learning rate, clip, KL coefficient, temperature, length, number of episodes, and that
the variance is measured once, with the initial policy, and compared within a domain.

A reward of your own: --reward my.py:score, with a function score(query, response) -> 0 to 1 in
my.py; each row of --queries then needs a "prompt" only, and the function gets the whole row. The
log then has its mean, "own", in place of "pass".

Off by default, from later papers: Dr. GRPO is --aggregate constant --normalise none; DAPO is
--aggregate token_mean --clip_high 0.28 --resample 2 --overlong soft.

    python grpo.py --init runs/demo/dpo --reward_model runs/demo/reward --out runs/demo/grpo
    python grpo.py inspect --out runs/demo/grpo        # queries, their answers, rewards, advantages

Expect: the printed loss is about 0 at every step (advantages are centred; the gradient is not 0).
Watch pass instead, from one passage through the queries to the next: the mixed ones come first in
each, the hopeless and the solved ones last. Dead groups (all 8 rewards equal) grow as queries are
solved. Entropy falls; if to near 0 while pass stalls, lower --lr.
"""
import copy
import math
import random
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

import tasks.queries
from lib.args import InputError, cli, positive, require
from lib.files import read_jsonl
from lib.optim import adamw, clip_and_step, lr_at, setup
from lib.run import Run
from lib.dist import (
    QUIET,
    WORLD,
    all_gather,
    gather_rows,
    micro_batches,
    apply_fsdp,
    rank_slice,
    all_reduce_sum,
    full_model,
)
from reward import RewardModel
from sample import completion_logprobs, load_policy, rollout
from lib.vllm_client import VLLMClient


@dataclass
class Args:
    init: str = "runs/sft"           # initial policy, and the reference of the KL term
    out: str = "runs/grpo"           # where the run goes
    queries: str = "rl"              # query split or file
    n_queries: int = 0               # at most so many; 0: all of a file, 128 of a split
    reward_model: str = ""           # reward model directory; empty: the verifier alone
    reward: str = ""                 # your own, file.py:function(query, response) -> 0 to 1
    steps: int = 25                  # episodes: one optimizer step each
    batch_queries: int = 16          # queries an episode
    group: int = 8                   # responses a query (the report's 8)
    temperature: float = 1.0         # of the sampling, and of the log-probabilities
    max_new_tokens: int = 128        # longest response
    rollout_url: str = ""            # sample on a server that reads each step's weights (vLLM)
    inner_steps: int = 1             # optimizer steps an episode: above 1 the clip is active
    micro_batch: int = 32            # responses a forward pass, of similar length: memory only
    clip_eps: float = 0.2            # the ratio is clipped below 1 - clip_eps
    clip_high: float = 0.0           # and above 1 + clip_high; 0: clip_eps there too (DAPO: 0.28)
    kl: float = 0.0                  # weight of the KL to the initial policy
    kl_ratio: bool = True            # k3 times the ratio: the KL's true gradient; false: the paper
    order: str = "variance"          # of the queries: variance (the report's) or random
    resample: int = 0                # up to so many more batches in place of dead groups (DAPO)
    overlong: str = "wrong"          # cut responses: wrong, mask (no gradient), soft (also shorter)
    normalise: str = "group"         # advantages over the group's standard deviation, or "none"
    aggregate: str = "seq_mean"      # token losses: seq_mean (the paper), token_mean, constant
    lr: float = 3e-4                 # peak learning rate
    warmup: int = 5                  # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    max_grad_norm: float = 1.0       # largest gradient norm
    save_every: int = 10             # steps between resumable states
    seed: int = 0                    # of queries and samples
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# reward, order, advantage, loss

def shaped_reward(verified, model_score=None):
    """Qwen2.5-Math: sigmoid(0.5 r_m) + (r_v - 1); without a reward model, r_v itself."""
    return verified if model_score is None else torch.sigmoid(0.5 * model_score) + verified - 1


def query_order(scores):
    """scores (Q, G) -> indices (Q,) by the variance of each query's scores, highest first: queries
    whose answers all score alike have nothing to tell apart. Ties keep their order."""
    return scores.var(dim=1, unbiased=False).argsort(descending=True, stable=True)


def group_advantages(rewards, normalise: str = "group"):
    """rewards (Q, G) -> advantages (Q, G), centred within each query's own group and, with
    "group", over its population standard deviation (the paper does not say which std; TRL's is
    Bessel's).

    A group of equal rewards gets exactly 0, decided by max - min: through rounding, seven rewards
    of 0.1 have a mean that is not 0.1, and dividing by std + 1e-8 makes 0.4 of that (R12.3)."""
    require(rewards.shape[1] > 1, "a group of 1 has no advantage: --group wants 2 or more")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if normalise == "group":
        centred = centred / (rewards.std(dim=1, keepdim=True, unbiased=False) + 1e-6)
    dead = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return centred.masked_fill(dead, 0.0)


def overlong_punishment(lengths, longest: int):
    """DAPO eq. 13: 0 up to 4/5 of the longest length, then down to -1/2 in a straight line (-1 in
    DAPO, whose rewards are +1 and -1, not 1 and 0): a right answer still beats a wrong one."""
    buffer = longest / 5
    return -0.5 * ((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_eps: float = 0.2,
              clip_high: float = 0.0, kl: float = 0.0, kl_ratio: bool = True,
              aggregate: str = "seq_mean", count: float | None = None):
    """DeepSeekMath eq. 3, negated. logprobs, old_logprobs, ref_logprobs (or None) and mask are
    (B, R), advantages (B,). Returns the loss and a dict of sums to log.

    aggregate: "seq_mean" averages tokens within a response, then responses (the paper: tokens of
    long responses weigh less); "token_mean" is over all tokens (DAPO); "constant" divides by
    responses x R (Dr. GRPO). count: the divisor for the whole step (responses, tokens, responses x
    length), when this is one micro-batch of it (R12.4)."""
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages[:, None]
    low, high = 1 - clip_eps, 1 + (clip_high or clip_eps)
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    k3 = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        # k3's value is unbiased for KL(pi || pi_ref), its gradient is not: samples come from pi, so
        # the true one also has the score function, k3 d log pi. What is left without it is the
        # gradient of KL(pi_ref || pi). Times the ratio (1 in value on-policy) it comes along.
        log_ratio = ref_logprobs - logprobs
        k3 = log_ratio.exp() - log_ratio - 1
        k3 = ratio * k3 if kl_ratio else k3
    per_token = (kl * k3 - objective) * mask
    if aggregate == "seq_mean":
        loss = (per_token.sum(1) / mask.sum(1)).sum() / (count or len(mask))
    elif aggregate == "token_mean":
        loss = per_token.sum() / (count or mask.sum())
    else:
        loss = per_token.sum() / (count or mask.numel())
    clipped = ((ratio < low) | (ratio > high)) & mask
    gap = ((logprobs - old_logprobs).abs() * mask).max()
    return loss, {"clipped": clipped.sum().item(), "kl": (k3 * mask).sum().item(),
                  "entropy": -(logprobs * mask).sum().item(), "gap": gap.item()}


# ---------------------------------------------------------------------------------------------
# one episode

def is_mixed(group) -> bool:
    return len({answer.score for answer in group}) > 1


def verdict(args: Args) -> str:
    """What the mean of the answers' scores is called: a reward of your own need not be 0 or 1."""
    return "own" if args.reward else "pass"


def sample_groups(model, tokenizer, queries, args: Args, step: int):
    """-> a step's groups of answers, and the share of those sampled that they are: its batch of the
    queries and, with --resample, the batches after it until enough groups hold right and wrong
    answers (DAPO, section 3.2); what is missing then is made up of dead groups. Each step has its
    own stretch of the queries, so that it is a pure function of its number."""
    B, groups = args.batch_queries, []
    while len(groups) <= args.resample * B and sum(map(is_mixed, groups)) < B:
        first = step * (1 + args.resample) * B + len(groups)
        batch = [queries[(first + i) % len(queries)] for i in range(B)]
        seed = args.seed * 100_003 + step + 1 + 1_000_003 * (len(groups) // B)
        groups += rollout(model, tokenizer, batch, args.group, args.max_new_tokens,
                          args.temperature, seed, tasks.queries.score_many)
    best = sorted(range(len(groups)), key=lambda i: not is_mixed(groups[i]))[:B]
    return [groups[i] for i in sorted(best)], B / len(groups)


def reward_groups(groups, reward_model, args: Args):
    """-> verdicts (Q, G), rewards (Q, G), the reward model's scores (Q, G) or None."""
    verified, scores = torch.tensor([[a.score for a in group] for group in groups]), None
    if reward_model is not None:
        mine = [a for group in rank_slice(groups) for a in group]
        scores = reward_model.score([a.prompt_ids for a in mine], [a.ids for a in mine])
        scores = gather_rows([scores[i:i + args.group] for i in range(0, len(scores), args.group)])
        scores = torch.tensor(scores).view_as(verified)
    rewards = shaped_reward(verified, scores)
    if args.overlong == "soft":
        lengths = torch.tensor([[len(a.ids) for a in group] for group in groups])
        rewards = rewards + overlong_punishment(lengths, args.max_new_tokens)
    return verified, rewards, scores


def order_queries(model, reward_model, tokenizer, queries, args: Args) -> list[dict]:
    """Sample each query's group once with the initial policy; highest variance of scores first
    within a domain, the domains in turn: scores spread more in one domain than in another, and in
    one order for all, whole stretches of training were of one domain (LOG.md). A random
    order needs a sample only for what comes now: it refuses to train where there is nothing to
    learn from (R12.7)."""
    if args.order == "random":
        queries = random.Random(args.seed).sample(queries, len(queries))
    groups = rollout(
        model,
        tokenizer,
        queries if args.order == "variance" else queries[: 2 * args.batch_queries],
        args.group,
        args.max_new_tokens,
        args.temperature,
        args.seed,
        tasks.queries.score_many,
    )
    verified, rewards, scores = reward_groups(groups, reward_model, args)
    truncated = sum(not a.finished for group in groups for a in group) / verified.numel()
    mixed = sum(map(is_mixed, groups)) / len(groups)
    print(f"{len(queries)} queries; {args.steps} steps ask {args.steps * args.batch_queries}")
    print(f"before training: {verdict(args)} {verified.mean():.1%}, {mixed:.1%} of queries have "
          f"better and worse answers, {truncated:.1%} of responses cut")
    require(truncated <= 0.5, f"{truncated:.0%} of responses are cut: raise --max_new_tokens, "
            "or train longer with sft.py a model that does not stop by itself")
    if sum(len({a.text for a in group}) == 1 for group in groups) > len(groups) / 2:
        advice = "less SFT (a loss near 0 leaves one answer to each), or a higher --temperature"
    elif verified.mean() < 0.5:
        advice = "easier --queries, more SFT, or a --reward with degrees"
    else:
        advice = "harder --queries"
    require(mixed > 0, f"each query's answers all score alike, so all advantages are 0: {advice}")
    if mixed < 0.1:
        print(f"few queries have anything to learn from: {advice}")
    if args.order == "random":
        return queries
    order, seen, rank = query_order(rewards if scores is None else scores).tolist(), Counter(), {}
    for i in order:
        rank[i] = seen[queries[i]["domain"]]
        seen[queries[i]["domain"]] += 1
    return [queries[i] for i in sorted(order, key=rank.get)]


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "grpo")
    device, autocast = setup(args, args.batch_queries * args.group)
    positive(args, "steps", "batch_queries", "temperature", "max_new_tokens",
             "inner_steps", "micro_batch", "save_every")
    for name, values in {"aggregate": ("seq_mean", "token_mean", "constant"),
                         "normalise": ("group", "none"), "order": ("variance", "random"),
                         "overlong": ("wrong", "mask", "soft")}.items():
        value = getattr(args, name)
        require(value in values, f"--{name} wants one of {', '.join(values)}, got {value!r}")
    require(args.overlong != "soft" or not args.reward_model, "--overlong soft with --reward_model:"
            " a long right answer could be worth less than a wrong one")
    require(not args.rollout_url or args.temperature == 1, "--rollout_url wants --temperature 1: "
            "so are a server's log-probabilities, and pi_old is the server's policy")
    require(args.resample >= 0, f"--resample wants 0 or more, got {args.resample}")
    require(args.group > 1, "--group wants 2 or more: the group's mean is the baseline")
    model, tokenizer = load_policy(args.init, device)
    reward_model = None
    if args.reward_model:
        reward_model = RewardModel.from_pretrained(args.reward_model, device=device)
        require(reward_model.tokenizer.special == tokenizer.special,
                f"--reward_model {args.reward_model} has another tokenizer than --init")
    queries = tasks.queries.load(args.queries, args.n_queries, args.seed, args.reward, built_in=128)

    # data
    server = VLLMClient(args.rollout_url, tokenizer) if args.rollout_url else None

    def sampler(model):
        """Who answers for the policy. pi_old is then the server's, its rounding included."""
        if server:
            server.load(model, run.path / "served")
        return server or model
    with autocast:
        queries = order_queries(sampler(model), reward_model, tokenizer, queries, args)
    reference = apply_fsdp(copy.deepcopy(model), autocast) if args.kl else None

    # optimizer, resume
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, args.lr, weight_decay=0.0)
    start = run.start_or_resume(model, optimizer)

    # loop
    bar = tqdm(range(start, args.steps), desc="grpo", initial=start, total=args.steps,
               disable=QUIET)
    for step in bar:
        try:
            with autocast:
                groups, used = sample_groups(
                    sampler(full_model(model)), tokenizer, queries, args, step
                )
                verified, rewards, scores = reward_groups(groups, reward_model, args)
        except InputError as error:  # of a --reward of one's own, or of a server
            if WORLD > 1 or step == 0:  # one of several cannot save
                raise
            run.save_state(step, model, optimizer)
            raise InputError(f"{error}; mend it and --resume goes on after step {step}") from None
        answers = [answer for group in groups for answer in group]
        kept = [a.finished or args.overlong != "mask" for a in answers]
        advantages = group_advantages(rewards, args.normalise).flatten() * torch.tensor(kept)
        # A response of a dead group has neither advantage nor, without KL, gradient: skip it.
        alive = [i for i in range(len(answers)) if args.kl or advantages[i] != 0]
        # A few may fill the shares of several processes up to one size.
        alive += sorted(set(range(len(answers))) - set(alive))[:-len(alive) % WORLD]
        # Groups stay together, to share their prompt, among groups of similar length.
        longest = [max(len(a.ids) for a in answers[i:i + args.group])
                   for i in range(0, len(answers), args.group)]
        alive.sort(key=lambda i: longest[i // args.group])
        tokens = sum(len(a.ids) for a, keep in zip(answers, kept, strict=True) if keep) or 1
        count = {"seq_mean": len(answers), "token_mean": tokens,
                 "constant": len(answers) * args.max_new_tokens}[args.aggregate]
        for _ in range(args.inner_steps):
            loss, sums = 0.0, {"clipped": 0, "kl": 0.0, "entropy": 0.0, "gap": 0.0}
            for part in micro_batches(alive, args.micro_batch):
                micro = [answers[j] for j in part]
                inputs = ([a.prompt_ids for a in micro], [a.ids for a in micro], args.temperature,
                          tokenizer.n_vocab)
                with autocast:
                    logprobs, mask = completion_logprobs(model, *inputs)
                    with torch.no_grad():
                        ref = completion_logprobs(reference, *inputs)[0] if reference else None
                old = torch.zeros_like(logprobs).masked_scatter(mask, torch.tensor(
                    [p for a in micro for p in a.logprobs], device=device))
                micro_loss, logs = grpo_loss(
                    logprobs, old, ref, advantages[part].to(device), mask, clip_eps=args.clip_eps,
                    clip_high=args.clip_high, kl=args.kl, kl_ratio=args.kl_ratio,
                    aggregate=args.aggregate, count=count)
                micro_loss.backward()
                loss += micro_loss.item()
                sums = {k: max(sums[k], v) if k == "gap" else sums[k] + v for k, v in logs.items()}
            gap = max(all_gather(sums["gap"]))
            loss, sums = all_reduce_sum(loss), all_reduce_sum(sums) | {"gap": gap}
            lr = lr_at(step, args.steps, args.lr, args.warmup, args.final_lr)
            norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
            if not math.isfinite(norm):
                break  # the log shows the last inner step
        finished = [len(a.ids) for a in answers if a.finished]
        trained = sum(len(answers[i].ids) for i in alive) or 1
        run.log(step + 1, args.steps, bar, [group[0].query["prompt"] for group in groups],
                reward=rewards.mean().item(), **{verdict(args): verified.mean().item()},
                **({} if scores is None else {"score": scores.mean().item()}),
                dead=(rewards.amax(1) == rewards.amin(1)).float().mean().item(), used=used,
                cut=1 - len(finished) / len(answers),
                length=sum(finished) / max(1, len(finished)), loss=loss, lr=lr, grad_norm=norm,
                entropy=sums["entropy"] / trained, kl=sums["kl"] / trained,
                clipped=sums["clipped"] / trained, gap=sums["gap"],
                completions=[group[0].text for group in groups[:3]])
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            run.save_state(step + 1, model, optimizer)

    # save
    shown = slice(0, 4 * args.group)
    run.save_samples(answers[shown], reward=rewards.flatten()[shown].tolist(),
                     advantage=advantages[shown].tolist())
    result = {verdict(args): verified.mean().item(), "reward": rewards.mean().item()}
    run.finish(model, tokenizer, **result)
    return result


def inspect(args: Args) -> None:
    """python grpo.py inspect --out RUN: four groups of its last step, best answer first."""
    path = Path(args.out) / "samples.jsonl"
    require(path.is_file(), f"{path}: no such file; a run writes it when it ends")
    rows = [row for _, row in read_jsonl(path)]
    require(rows and "advantage" in rows[0], f"{path} is of no GRPO run")
    for prompt, group in groupby(rows, key=itemgetter("prompt")):
        print(f"{prompt}\n score  reward  advantage  answer")
        for row in sorted(group, key=itemgetter("advantage"), reverse=True):
            print(f"{row['score']:6.2f} {row['reward']:7.3f} {row['advantage']:+10.3f}  "
                  f"{row['response']!r}")
        print()


if __name__ == "__main__":
    cli(main, Args, inspect=inspect)
