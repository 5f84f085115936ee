"""Stage 5, online reinforcement learning: GRPO (Qwen2.5 report, 4.3; DeepSeekMath, eq. 3).

For each query the policy samples a group of G = 8 responses. The advantage of a response compares
its reward with those of its own group, A_i = (r_i - mean(r)) / std(r), and is the same for all its
tokens. With rho = pi / pi_old, the policy climbs, per token,

    min(rho A, clip(rho, 1 - eps, 1 + eps) A) - kl rho (pi_ref/pi - log(pi_ref/pi) - 1)

As in the report, an episode is one optimizer step on fresh samples (there 2048 = 256 queries x 8).
So rho is 1, up to rounding, and the clip is idle, unless --inner_steps is raised. Also as in the
report, queries are taken in the order of the variance of the reward model's scores over their
responses, highest first. The reward is Qwen2.5-Math's, which joins the verifier r_v and the reward
model r_m (its section 4):

    r = sigmoid(r_m / 2) + (r_v - 1):  right answers lie between 0 and 1, wrong ones below 0

With r_v 0 or 1, the reward model ranks answers but never lets a wrong one beat a right one. With a
graded --reward, where r_v lies between 0 and 1, it can overturn the order. --reward_model_weight w
makes its part smaller, r_v + w (sigmoid(r_m / 2) - 1); with w = 0 it only orders the queries. The
report does not disclose learning rate, clip, KL coefficient, temperature, length or number of
episodes. These are our choice, as is the factor rho of the KL term (see grpo_loss), and how the
order of the queries is found (tasks/query_order.py).

A reward of your own: --reward my.py:score, with a function score(query, response) -> 0 to 1 in
my.py. Each row of --queries then needs only a "prompt", and the function gets the whole row. The
log then has its mean, "own", in place of "pass_rate". docs/your-data.md says what else it may take
and return.

From later papers, and off by default: Dr. GRPO is --loss_type dr_grpo --scale_rewards none; of DAPO
there are --loss_type dapo and --clip_high 0.28.

    python grpo.py --init runs/demo/dpo --reward_model runs/demo/reward --out runs/demo/grpo
    python grpo.py inspect --out runs/demo/grpo        # queries, their answers, rewards, advantages

Expect: without --kl, the loss is about 0 at every step, since advantages are centred (with dapo and
dr_grpo it follows the lengths); its gradient is not 0. Watch pass_rate instead, beside
first_pass_rate, the initial policy's on the same queries.
frac_zero_std, the share of groups with equal rewards, grows as queries are solved, unless a reward
model tells the answers apart. The entropy falls. If it nears 0 while pass_rate stalls, lower --lr.
"""
import copy
import math
import random
from dataclasses import dataclass
from itertools import zip_longest

import torch
from tqdm import tqdm

import tasks.queries
from lib.args import InputError, cli, positive, require
from lib.dist import (
    QUIET, WORLD, all_gather, all_reduce_sum, apply_fsdp, full_model, gather_rows, micro_batches,
    rank_slice)
from lib.files import read_jsonl, write_jsonl
from lib.lora import adapters_off, add_lora, base_dtype
from lib.optim import adamw, clip_and_step, default_lr, lr_at, setup
from lib.router import RouterStats
from lib.run import Run
from lib.tables import print_groups
from lib.vllm_client import VLLMClient
from reward import RewardModel
from sample import Rollout, completion_logprobs, load_policy, part_means, rollout
from tasks.query_order import order_by_domain


@dataclass
class Args:
    init: str = "runs/sft"           # initial policy, and the reference policy of the KL term
    out: str = "runs/grpo"           # run directory
    queries: str = "rl"              # query splits or files, joined by commas
    n_queries: int = 0               # at most this many of each; 0: whole files, 128 of a split
    reward_model: str = ""           # reward model directory; empty: the verifier alone
    reward_model_weight: float = 1.0  # of its part of the reward; 0: it only orders the queries
    reward: str = ""                 # your own, file.py:function(query, response) -> 0 to 1
    reward_timeout: float = 60.0     # seconds that it may take per response
    domain_key: str = ""             # column of a file's rows that names their domains
    check_steps: bool = False        # a right answer with a false equation counts as wrong
    steps: int = 25                  # episodes: one optimizer step each
    batch_queries: int = 16          # queries per episode
    num_generations: int = 8         # responses per query (the report's 8)
    temperature: float = 1.0         # of the sampling, and of the log-probabilities
    max_new_tokens: int = 128        # longest response
    allow_unsafe_code: bool = False  # judge code although the sandbox lacks layers of isolation
    rollout_url: str = ""            # sample on a server that reads each step's weights (vLLM)
    inner_steps: int = 1             # optimizer steps per episode: above 1 the clip is active
    micro_batch: int = 32            # responses per forward pass (gradient accumulation)
    gradient_checkpointing: bool = False  # recompute activations: less memory, 1/3 more time
    lora: int = 0                    # rank of LoRA adapters; 0: train all weights
    lora_alpha: float = 32.0         # the adapters' product is scaled by lora_alpha / lora
    clip_eps: float = 0.2            # the ratio is clipped below 1 - clip_eps
    clip_high: float = 0.0           # clipped above 1 + clip_high; 0: as clip_eps (DAPO: 0.28)
    kl: float = 0.0                  # weight of the KL divergence from the reference policy
    query_order: str = "variance"    # variance (the report's; asks all queries first) or random
    scale_rewards: str = "group"     # group: divide advantages by the group's deviation; none
    loss_type: str = "grpo"          # grpo, dapo or dr_grpo: the loss's divisor, see grpo_loss
    lr: float = 0.0                  # peak learning rate; 0: by the size of the model, and printed
    warmup: int = 5                  # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    max_grad_norm: float = 1.0       # gradients are clipped to this norm
    save_every: int = 10             # steps between resumable states
    seed: int = 0                    # of queries and samples
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    save_dtype: str = ""             # of the saved weights; empty: that of --init
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# reward, order, advantage, loss

def shaped_reward(verified, model_score=None, weight: float = 1.0):
    """Return r_v + w (sigmoid(0.5 r_m) - 1) or, without a reward model, r_v itself. With w = 1 this
    is Qwen2.5-Math's reward."""
    if model_score is None:
        return verified
    return verified + weight * (torch.sigmoid(0.5 * model_score) - 1)


def group_advantages(rewards, scale_rewards: str = "group"):
    """rewards (Q, G) -> advantages (Q, G), centred within each group and, with "group", divided by
    its standard deviation.

    We use the population standard deviation (TRL uses the sample one) and add 1e-6, which is not in
    the paper. A group whose largest reward equals its smallest gets exactly 0. Subtracting the mean
    would not give that: in floats, the mean of seven rewards of 0.1 is not 0.1, and dividing by a
    tiny standard deviation magnifies the error."""
    require(rewards.shape[1] > 1, "a group of 1 has no advantage: raise --num_generations")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=False) + 1e-6)
    return advantages.masked_fill(zero_std(rewards)[:, None], 0.0)


def zero_std(rewards):
    """rewards (Q, G) -> (Q,) bool: the groups whose rewards are all equal."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_eps: float = 0.2,
              clip_high: float = 0.0, kl: float = 0.0, loss_type: str = "grpo",
              count: float | None = None):
    """Return the negated objective (DeepSeekMath, eq. 3) and a dict to log: sums over tokens
    (clipped counts those whose gradient the clip removes), and logprob_gap, the largest difference
    between the trainer's and the sampler's log-probability.

    logprobs, old_logprobs, ref_logprobs (or None) and mask are (B, R), advantages (B,).
    loss_type: "grpo" averages the tokens of a response, then the responses (the paper: tokens of
    long responses weigh less); "dapo" averages over all tokens; "dr_grpo" divides by responses x
    --max_new_tokens. count: that divisor for the whole step, of which the rows are a micro-batch
    (`loss_divisor`); None: for these rows alone (dr_grpo: B x R)."""
    ratio = (logprobs - old_logprobs).exp()
    low, high = 1 - clip_eps, 1 + (clip_high or clip_eps)
    advantages = advantages[:, None]
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    kl_term = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        # The value of Schulman's k3 is an unbiased estimate of KL(pi || pi_ref), but its gradient
        # is not that of the KL: the samples come from pi, so the true gradient has the further term
        # k3 * grad log pi. The factor `ratio`, whose value is 1 on-policy, supplies it.
        d = ref_logprobs - logprobs
        k3 = d.expm1() - d  # expm1, because exp(d) - 1 - d can round below 0
        kl_term = ratio * k3
    per_token = (kl * kl_term - objective) * mask
    if loss_type == "grpo":
        per_response = per_token.sum(1) / mask.sum(1)
        loss = per_response.sum() / (count or len(mask))
    elif loss_type == "dapo":
        loss = per_token.sum() / (count or mask.sum())
    else:
        loss = per_token.sum() / (count or mask.numel())
    too_high = (ratio > high) & (advantages > 0)
    too_low = (ratio < low) & (advantages < 0)
    clipped = (too_high | too_low) & mask
    gap = (logprobs - old_logprobs).abs() * mask
    return loss, {
        "clipped": clipped.sum().item(),
        "kl": (kl_term * mask).sum().item(),
        "entropy": -(logprobs * mask).sum().item(),
        "logprob_gap": gap.max().item(),
    }


# ---------------------------------------------------------------------------------------------
# one episode

@dataclass
class Episode:
    """The groups of one episode, one after another; Q queries with G responses each."""
    answers: list[Rollout]            # (Q * G)
    verified: torch.Tensor            # (Q, G) verdicts of the checks, or the values of --reward
    model_scores: torch.Tensor | None  # (Q, G) of the reward model
    rewards: torch.Tensor             # (Q, G)

    @classmethod
    def from_groups(cls, groups: list[list[Rollout]], reward_model: RewardModel | None,
                    weight: float):
        verified = torch.tensor([[answer.score for answer in group] for group in groups])
        model_scores = None
        if reward_model is not None:
            mine = [answer for group in rank_slice(groups) for answer in group]
            prompts = [answer.prompt_ids for answer in mine]
            values = reward_model.score(prompts, [answer.ids for answer in mine])
            size = verified.shape[1]
            by_group = [values[i:i + size] for i in range(0, len(values), size)]
            model_scores = torch.tensor(gather_rows(by_group)).view_as(verified)
        answers = [answer for group in groups for answer in group]
        rewards = shaped_reward(verified, model_scores, weight)
        return cls(answers, verified, model_scores, rewards)

    def groups(self) -> list[list[Rollout]]:
        size = self.verified.shape[1]
        return [self.answers[i:i + size] for i in range(0, len(self.answers), size)]

    def metrics(self, args: Args) -> dict:
        """Return what the log shows of the samples."""
        metrics = {
            "reward": self.rewards.mean().item(),
            score_name(args): self.verified.mean().item(),
        }
        if self.model_scores is not None:
            metrics["model_score"] = self.model_scores.mean().item()
        for name, mean in part_means(self.answers).items():
            metrics[f"own_{name}"] = mean
        groups = self.groups()
        first = [group[0].query.get("first_pass_rate") for group in groups]
        if None not in first:
            metrics["first_pass_rate"] = sum(first) / len(first)
        metrics["frac_zero_std"] = zero_std(self.rewards).float().mean().item()
        lengths = [len(answer.ids) for answer in self.answers if answer.finished]
        metrics["truncated"] = 1 - len(lengths) / len(self.answers)
        metrics["length"] = sum(lengths) / max(1, len(lengths))
        metrics["completions"] = [group[0].text for group in groups[:3]]
        return metrics


def score_name(args: Args) -> str:
    """Return what the log calls the mean score: a reward of your own need not be 0 or 1."""
    return "own" if args.reward else "pass_rate"


def verifier(args: Args):
    """Return the function that scores answers by their checks."""
    return tasks.queries.score_steps if args.check_steps else tasks.queries.score_many


def sample_episode(policy, reward_model, tokenizer, queries, args: Args, step: int) -> Episode:
    """Sample the groups of a step. The step and --seed alone fix its queries and its draws."""
    batch = []
    for i in range(args.batch_queries):
        place = step * args.batch_queries + i
        batch.append(queries[place % len(queries)])
    seed = args.seed * 100_003 + step + 1
    groups = rollout(policy, tokenizer, batch, args.num_generations, args.max_new_tokens,
                     args.temperature, seed, verifier(args))
    return Episode.from_groups(groups, reward_model, args.reward_model_weight)


def responses_to_train(episode: Episode, advantages, args: Args) -> list[int]:
    """Return the indices of the responses with a gradient, groups sorted by their longest response.

    The sorting saves padding. Without a KL term, a response with advantage 0 has no gradient and is
    skipped; a few of them are put back, so that all processes get the same number."""
    everything = range(len(episode.answers))
    trained = [i for i in everything if args.kl or advantages[i] != 0]
    others = sorted(set(everything) - set(trained))
    missing = -len(trained) % WORLD
    trained.extend(others[:missing])
    longest = []  # length, by group
    for group in episode.groups():
        longest.append(max(len(answer.ids) for answer in group))
    trained.sort(key=lambda i: longest[i // args.num_generations])
    return trained


def loss_divisor(episode: Episode, args: Args) -> int:
    """Return `count` of grpo_loss for the whole step."""
    if args.loss_type == "grpo":
        return len(episode.answers)
    if args.loss_type == "dapo":
        return sum(len(answer.ids) for answer in episode.answers)
    return len(episode.answers) * args.max_new_tokens


def micro_batch_loss(model, reference, episode: Episode, advantages, micro: list[int],
                     count: int, valid_vocab: int, args: Args, autocast, router=None):
    """Return grpo_loss of some responses of an episode, with `count` the whole step's divisor.
    router: see Qwen2.hidden."""
    answers = [episode.answers[i] for i in micro]
    prompts = [answer.prompt_ids for answer in answers]
    completions = [answer.ids for answer in answers]
    ref_logprobs = None
    with autocast:
        logprobs, mask = completion_logprobs(model, prompts, completions, args.temperature,
                                             valid_vocab, router)
        if reference is not None:
            with torch.no_grad(), adapters_off(reference):
                ref_logprobs, _ = completion_logprobs(reference, prompts, completions,
                                                      args.temperature, valid_vocab)
    sampled = torch.tensor([p for answer in answers for p in answer.logprobs],
                           device=logprobs.device)
    old_logprobs = torch.zeros_like(logprobs).masked_scatter(mask, sampled)
    return grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages[micro].to(logprobs.device),
                     mask, clip_eps=args.clip_eps, clip_high=args.clip_high, kl=args.kl,
                     loss_type=args.loss_type, count=count)


# ---------------------------------------------------------------------------------------------
# before training

def load_reward_model(args: Args, tokenizer, device) -> RewardModel:
    """Return the reward model. It reads token ids, so both models must share a tokenizer."""
    reward_model = RewardModel.from_pretrained(args.reward_model, device=device)
    require(reward_model.tokenizer.has_ids_of(tokenizer),
            f"--reward_model {args.reward_model} has another tokenizer than --init")
    return reward_model


def reference_policy(model, args: Args, autocast):
    """Return the reference policy of the KL term, None without one: a frozen copy or, with
    adapters, the same model, which micro_batch_loss uses with its adapters switched off."""
    if not args.kl:
        return None
    if args.lora:
        return model
    reference = copy.deepcopy(model).requires_grad_(False)
    for block in reference.model.layers:  # autocast computes attention and MLP in this dtype
        block.self_attn.to(autocast.fast_dtype)
        block.mlp.to(autocast.fast_dtype)
    return apply_fsdp(reference, autocast)


def load_queries(args: Args, run: Run, policy, reward_model, tokenizer) -> list[dict]:
    """Return the queries of --queries in their order. A resumed run keeps the order that it began
    with: a server would now answer differently."""
    if run.resumed:
        queries = [query for _, query in read_jsonl(run.path / "queries.jsonl")]
    else:
        queries = tasks.queries.load(
            args.queries, args.n_queries, args.seed, args.reward, built_in=128,
            reward_timeout=args.reward_timeout, domain_key=args.domain_key)
    tasks.queries.require_isolation(queries, args.allow_unsafe_code)
    if run.resumed:
        return queries
    return order_queries(policy, reward_model, tokenizer, queries, args)


def order_queries(policy, reward_model, tokenizer, queries, args: Args) -> list[dict]:
    """Sample each query once with the initial policy and put those of high variance first. With the
    random order only two batches are sampled, to check that there is something to learn."""
    asked = queries
    if args.query_order == "random":
        queries = random.Random(args.seed).sample(queries, len(queries))
        asked = queries[:2 * args.batch_queries]
    print(f"{len(queries)} queries; {args.steps} steps use {args.steps * args.batch_queries}; "
          f"before them, {len(asked)} are asked {args.num_generations} times each")
    groups = rollout(policy, tokenizer, asked, args.num_generations, args.max_new_tokens,
                     args.temperature, args.seed, verifier(args))
    episode = Episode.from_groups(groups, reward_model, args.reward_model_weight)
    check_before_training(episode, args)
    for query, rate in zip_longest(queries, episode.verified.mean(dim=1).tolist()):
        query["first_pass_rate"] = rate  # None: not asked, whatever another run's file says
    if args.query_order == "random":
        return queries
    order = order_by_domain(queries, episode.verified, episode.model_scores, episode.rewards,
                            args.seed)
    return [queries[i] for i in order]


def check_before_training(episode: Episode, args: Args) -> None:
    """Refuse to train where there is nothing to learn, with advice on what to change."""
    groups, pass_rate = episode.groups(), episode.verified.mean()
    mixed = 1 - zero_std(episode.verified).float().mean().item()
    truncated = sum(not answer.finished for answer in episode.answers) / len(episode.answers)
    print(f"before training: {score_name(args)} {pass_rate:.1%}, {mixed:.1%} of queries have "
          f"better and worse answers, {truncated:.1%} of responses truncated")
    require(truncated <= 0.5, f"{truncated:.0%} of responses are cut: raise --max_new_tokens, or "
            "if the model never stops by itself, train it longer with sft.py")
    same_text = sum(len({answer.text for answer in group}) == 1 for group in groups)
    if same_text > len(groups) / 2:
        advice = "less SFT (a loss near 0 leaves one answer to each), or a higher --temperature"
    elif pass_rate < 0.5:
        advice = "easier --queries, more SFT, or a graded --reward"
    else:
        advice = "harder --queries"
    require(mixed > 0, "each query's answers all score alike, so their advantages from the check "
            f"are 0: {advice}")
    if mixed < 0.1:
        print(f"few queries have anything to learn from: {advice}")


def check_args(args: Args) -> None:
    positive(args, "steps", "batch_queries", "temperature", "max_new_tokens", "inner_steps",
             "micro_batch", "save_every", "max_grad_norm")
    choices = {"loss_type": ("grpo", "dapo", "dr_grpo"), "scale_rewards": ("group", "none"),
               "query_order": ("variance", "random")}
    for name, values in choices.items():
        value = getattr(args, name)
        require(value in values, f"--{name} must be one of {', '.join(values)}, got {value!r}")
    require(not args.rollout_url or args.temperature == 1, "--rollout_url needs --temperature 1: "
            "a server's log-probabilities are those of temperature 1")
    require(0 <= args.reward_model_weight <= 1, "--reward_model_weight must be from 0 to 1")
    require(args.num_generations > 1, "--num_generations must be 2 or more, for a baseline")


# ---------------------------------------------------------------------------------------------
# a rollout server, errors

def synced_policy(model, server: VLLMClient | None, run: Run):
    """Return the sampler: the model, or the server once it has loaded the weights. pi_old is then
    the server's policy, with its rounding."""
    if server is None:
        return model
    server.load(model, run.path / "served")
    return server


def save_and_raise(error: InputError, run: Run, step: int, model, optimizer) -> None:
    """Save the steps before an error that the user can mend, so that none is lost."""
    if WORLD > 1 or step == 0:  # one of several processes cannot save alone
        raise error
    run.save_state(step, model, optimizer)
    raise InputError(f"{error}; mend it and --resume goes on after step {step}") from None


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "grpo")
    device, autocast = setup(args, args.batch_queries * args.num_generations)
    check_args(args)

    # model
    model, tokenizer = load_policy(args.init, device, base_dtype(args.lora, autocast))
    model.gradient_checkpointing = args.gradient_checkpointing
    reward_model = load_reward_model(args, tokenizer, device) if args.reward_model else None
    server = VLLMClient(args.rollout_url, tokenizer) if args.rollout_url else None

    # data
    with autocast:
        policy = synced_policy(model, server, run)
        queries = load_queries(args, run, policy, reward_model, tokenizer)
    if args.reward_model_weight == 0:
        reward_model = None  # it has ordered the queries

    # optimizer, resume
    peak_lr = args.lr or default_lr("grpo", model, 10.0 if args.lora else 1.0)
    add_lora(model, args.lora, args.lora_alpha)
    reference = reference_policy(model, args, autocast)
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, peak_lr, weight_decay=0.0)
    start = run.start_or_resume(model, optimizer)
    write_jsonl(run.path / "queries.jsonl", queries)

    # loop
    router = RouterStats(model.config)  # of an MoE; a dense model has none
    bar = tqdm(range(start, args.steps), desc="grpo", initial=start, total=args.steps,
               disable=QUIET)
    for step in bar:
        try:
            with autocast:
                policy = synced_policy(full_model(model), server, run)
                episode = sample_episode(policy, reward_model, tokenizer, queries, args, step)
        except InputError as error:  # raised by a --reward or by the server
            save_and_raise(error, run, step, model, optimizer)
        advantages = group_advantages(episode.rewards, args.scale_rewards).flatten()
        trained = responses_to_train(episode, advantages, args)
        count = loss_divisor(episode, args)
        for _ in range(args.inner_steps):
            loss, sums = 0.0, {"clipped": 0.0, "kl": 0.0, "entropy": 0.0}
            logprob_gap = 0.0
            for micro in micro_batches(trained, args.micro_batch, model):
                micro_loss, logs = micro_batch_loss(model, reference, episode, advantages, micro,
                                                    count, tokenizer.n_vocab, args, autocast,
                                                    router)
                (micro_loss + router.loss(len(micro) / len(trained))).backward()
                loss += micro_loss.item()
                logprob_gap = max(logprob_gap, logs["logprob_gap"])
                for name in sums:
                    sums[name] += logs[name]
            loss, sums = all_reduce_sum(loss), all_reduce_sum(sums)
            logprob_gap = max(all_gather(logprob_gap))
            router_metrics = router.end_step(step + 1)
            lr = lr_at(step, args.steps, peak_lr, args.warmup, args.final_lr)
            grad_norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
            if not math.isfinite(grad_norm):
                break  # the log shows the last inner step, so it must be this one
        tokens = sum(len(episode.answers[i].ids) for i in trained) or 1
        per_token = {name: value / tokens for name, value in sums.items()}
        prompts = [group[0].query["prompt"] for group in episode.groups()]
        run.log(step + 1, args.steps, bar, prompts, **episode.metrics(args), loss=loss, lr=lr,
                grad_norm=grad_norm, **per_token, logprob_gap=logprob_gap, **router_metrics)
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            run.save_state(step + 1, model, optimizer)

    # save
    run.save(model, tokenizer)
    shown = slice(0, 4 * args.num_generations)
    run.save_samples(episode.answers[shown], reward=episode.rewards.flatten()[shown].tolist(),
                     advantage=advantages[shown].tolist())
    result = {score_name(args): episode.verified.mean().item(),
              "reward": episode.rewards.mean().item()}
    run.finish(**result, measured_on="the answers of the last step")
    return result


if __name__ == "__main__":
    cli(main, Args, inspect=print_groups)
