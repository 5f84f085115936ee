"""Stage 3, offline reinforcement learning: DPO with online merging (report section 4.2).

The SFT model answers new queries several times; answers that pass the check are "chosen", answers
that fail are "rejected". With h the policy's gain of chosen over rejected against the frozen SFT
policy, log-probabilities summed over the response's tokens (DPO paper, eq. 7),

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
    L = - log sigmoid(beta * h)

and the step is taken by the Online Merging Optimizer (Lu et al. 2024), which blends each update
with the direction from the pre-trained to the SFT model, so that less is forgotten.

The report's pairs are reviewed by programs and by people (data/label.py). Here `review` drops
what nothing should be learned from and says why; people's verdicts come back as a file for --data.

The report's: about 150,000 pairs, 1 epoch, learning rate 7e-7, online merging. Our choice (not
disclosed): beta, batch, schedule, what a review drops, the OnDARE variant with its alpha and p.

    python dpo.py --init runs/demo/sft --base runs/demo/pretrain --out runs/demo/dpo
    python dpo.py --init Qwen2.5-0.5B-Instruct --data pairs.jsonl --lr 7e-7 --out ...

--data: JSONL of {"prompt": str or messages, "chosen": str or messages, "rejected": ...}.

Expect: the loss starts at exactly ln 2 = 0.693 (with --nll, that times the chosen answers' loss
more) and the accuracy (share of pairs with h > 0) rises to 0.7-0.9. Both log-probabilities may
fall, the rejected one faster: that is DPO, not a fault. A fall of the chosen one by more than a few
nats is one: lower --lr, or raise --beta or --nll, which holds the chosen answer up. A small model
needs much of it (LOG.md, "SFT above the base model, DPO above SFT").
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import tasks.queries
from lib.args import cli, positive, require
from lib.files import read_json, write_atomic, write_jsonl
from lib.optim import adamw, clip_and_step, epoch_order, lr_at, rng, setup
from lib.run import Run
from lib.dist import (
    QUIET,
    WORLD,
    shard_like,
    all_gather,
    gather_rows,
    micro_batches,
    apply_fsdp,
    rank_slice,
    all_reduce_sum,
    full_model,
)
from data.pairs import review
from model import Qwen2
from data.pairs import pair_responses, read_pairs
from reward import RewardModel
from sample import completion_logprobs, load_policy, rollout
from lib.vllm_client import rollout_backend


@dataclass
class Args:
    init: str = "runs/sft"           # SFT model: initial policy and reference
    out: str = "runs/dpo"            # where the run goes
    base: str = ""                   # pre-trained model, for online merging; empty: plain AdamW
    data: str = ""                   # preference pairs (JSONL); empty: resample --init on queries
    queries: str = "rl"              # query split or file to resample on
    n_queries: int = 0               # at most so many; 0: all of a file, 256 of a split
    responses: int = 8               # answers sampled to each
    pairs_per_query: int = 4         # at most so many pairs of each query's answers
    temperature: float = 1.0         # of the sampling
    rollout_url: str = ""            # sample from --init on a server, http://HOST:PORT/v1
    max_new_tokens: int = 128        # longest sampled answer
    max_len: int = 1024              # pairs with a longer prompt + answer are dropped
    max_ratio: float = 0.0           # so are those with one answer so many times as long; 0: none
    check_format: bool = False       # and those whose chosen answer is ill-formed
    reward_model: str = ""           # and those that it scores
    min_margin: float = 0.0          #   chosen - rejected below this
    cache: str = ""                  # of reference log-probabilities; empty: cache, beside --out
    epochs: float = 2.0              # passes over the pairs
    batch_size: int = 16             # pairs a step
    micro_batch: int = 32            # pairs a forward pass: memory only
    beta: float = 0.1                # strength of the tie to the reference
    nll: float = 0.0                 # weight of -log pi(chosen) per token, added to the loss
    lr: float = 2e-4                 # peak learning rate (the report's models: 7e-7)
    warmup: int = 5                  # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    merge: str = "dare"              # OnDARE keeps random entries, "ties" (OnTIES) the largest
    merge_alpha: float = 1e-7        # share of the SFT direction in each update
    reserve: float = 0.5             # share of entries that are kept
    max_grad_norm: float = 1.0       # largest gradient norm
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of sampling, pairing and order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# loss and optimizer

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta: float):
    """Summed log-probabilities (B,) -> loss (B,), implicit rewards of chosen and of rejected (B,):
    beta * log(pi / pi_ref) (DPO paper, eq. 7)."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


class OnlineMerging(torch.optim.Optimizer):
    """Online Merging Optimizer (Lu et al. 2024, algorithm 1):

        theta += (1 - alpha) F(delta) (+) alpha F(tau)

    delta is Adam's update, tau = theta_SFT - theta_base is fixed and sparsified once, F keeps a
    share p of a tensor's entries. OnDARE keeps random ones, and (+) adds; as in the authors' code,
    and unlike eq. 4, the survivors are divided by p (unbiased). Every mask is a pure function of
    (seed, step, tensor). OnTIES keeps the largest, and where the two differ in sign, (+) drops the
    smaller. We compare them with their weights, as eq. 7 does; the authors' code does without, and
    tau, much larger than one step, nearly always wins."""

    def __init__(self, params, taus, lr: float, alpha: float, reserve: float, seed: int = 0,
                 merge: str = "dare", betas=(0.9, 0.95), eps: float = 1e-8):
        require(0 < reserve <= 1, f"--reserve wants a share in (0, 1], got {reserve}")
        require(0 <= alpha < 1, f"--merge_alpha wants a share in [0, 1), got {alpha}")
        require(merge in ("dare", "ties"), f"--merge wants dare or ties, got {merge!r}")
        super().__init__(list(params), {"lr": lr})
        self.alpha, self.reserve, self.seed, self.betas, self.eps = alpha, reserve, seed, betas, eps
        self.ties = merge == "ties"
        self.taus = [self.drop(tau, -1, i) for i, tau in enumerate(taus)]

    def drop(self, x, step: int, index: int):
        if self.reserve == 1:
            return x
        if self.ties:
            kept = max(1, round(self.reserve * x.numel()))
            sizes = (x if WORLD == 1 else x.full_tensor()).abs().flatten()
            return x * (x.abs() >= sizes.kthvalue(x.numel() - kept + 1).values.item())
        generator = rng(self.seed, step + 1, index, device=x.device)
        keep = torch.rand(x.shape, device=x.device, generator=generator) < self.reserve
        return x * shard_like(keep, x) / self.reserve

    def merge(self, delta, tau):
        delta, tau = (1 - self.alpha) * delta, self.alpha * tau
        larger = torch.where(delta.abs() >= tau.abs(), delta, tau)
        differ = delta.sign() * tau.sign() < 0
        return torch.where(differ, larger, delta + tau) if self.ties else delta + tau

    @torch.no_grad()
    def step(self, closure=None) -> None:
        beta1, beta2 = self.betas
        (group,) = self.param_groups
        for i, (p, tau) in enumerate(zip(group["params"], self.taus, strict=True)):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            t = int(state["step"])
            state["m"].lerp_(p.grad, 1 - beta1)
            state["v"].lerp_(p.grad.square(), 1 - beta2)
            m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
            delta = -group["lr"] * m / (v.sqrt() + self.eps)
            p += self.merge(self.drop(delta, t, i), tau)


# ---------------------------------------------------------------------------------------------
# reference

def content_hash(model: Qwen2, rows, *settings) -> str:
    """Of all that reference log-probabilities depend on: weights, the rendered ids (data and chat
    template), the code and the numerical settings. Equal hash, equal numbers (R10.3)."""
    digest = hashlib.sha256(repr((model.config, rows, settings, torch.__version__)).encode())
    for file in ("kernels.py", "model.py", "sample.py"):
        digest.update((Path(__file__).parent / file).read_bytes())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "dpo")
    device, autocast = setup(args, args.batch_size)
    positive(args, "responses", "temperature", "max_new_tokens", "epochs",
             "batch_size", "micro_batch", "save_every")
    model, tokenizer = load_policy(args.init, device)
    scorer = args.reward_model and RewardModel.from_pretrained(args.reward_model, device=device)
    require(not (args.data and args.rollout_url), "--data and --rollout_url: take one")
    # Resumed, it takes the pairs that it had: a server answers otherwise each time.
    data = str(run.path / "pairs.jsonl") if args.rollout_url and run.resumed else args.data
    pairs = read_pairs(data) if data else []
    queries = (
        [] if data else tasks.queries.load(args.queries, args.n_queries, args.seed, built_in=256)
    )

    # data
    if not data:
        policy = rollout_backend(args.rollout_url, model, tokenizer)
        with autocast:
            groups = rollout(policy, tokenizer, queries, args.responses, args.max_new_tokens,
                             args.temperature, args.seed, tasks.queries.score_many)
        answers = [answer for group in groups for answer in group]
        pairs = pair_responses(answers, args.pairs_per_query, args.seed)
        rate = sum(a.score for a in answers) / len(answers)
        print(f"{args.init} passes {rate:.1%} of {len(queries)} queries x {args.responses}: "
              f"{len(pairs)} pairs")
    require(len(pairs) > 0, "no preference pair: every query's answers all pass or all fail; "
            "choose other --queries, a higher --temperature, or more SFT")
    pairs, rows, dropped = review(pairs, tokenizer, args.max_len, args.max_ratio,
                                  args.check_format, scorer, args.min_margin)
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    require(len(pairs) > 0, f"no pair is left by the review: {why}")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(pairs)} pairs (dropped by the review: {why}), {steps} steps")

    def sequence_logprobs(batch):
        """-> (B,) sums of chosen, (B,) of rejected; both sides go through in one forward pass."""
        logprobs, mask = completion_logprobs(model, [row[0] for row in batch] * 2,
                                             [row[1] for row in batch] + [row[2] for row in batch])
        return logprobs.sum(-1).chunk(2), mask.sum(-1).chunk(2)[0]

    # reference: the policy before its first step, so one model is enough
    key = content_hash(model, rows, device.type, autocast.fast_dtype, args.micro_batch, WORLD)
    cache = Path(args.cache or Path(args.out).parent / "cache") / f"reference-{key}.json"
    if all(all_gather(cache.exists())):
        reference = read_json(cache)["logprobs"]
    else:
        reference, mine = [], rank_slice(rows)
        with torch.no_grad(), autocast:
            for i in range(0, len(mine), args.micro_batch):
                (chosen, rejected), _ = sequence_logprobs(mine[i:i + args.micro_batch])
                reference += zip(chosen.tolist(), rejected.tolist(), strict=True)
        reference = gather_rows(reference)

    # optimizer, resume
    model = apply_fsdp(model, autocast)
    if args.base:
        params = dict(model.named_parameters())
        base = dict(Qwen2.from_pretrained(args.base, device=device).named_parameters())
        require({k: p.shape for k, p in base.items()} == {k: p.shape for k, p in params.items()},
                f"--base {args.base} and --init {args.init} differ in size or architecture")
        taus = [(p - shard_like(base[name], p)).detach() for name, p in params.items()]
        optimizer = OnlineMerging(params.values(), taus, args.lr, args.merge_alpha, args.reserve,
                                  args.seed, args.merge)
    else:
        optimizer = adamw(model, args.lr, weight_decay=0.0)
    start = run.start_or_resume(model, optimizer)
    write_jsonl(run.path / "pairs.jsonl", pairs)
    write_atomic(cache, json.dumps({"logprobs": reference}))

    # loop
    bar = tqdm(range(start, steps), desc="dpo", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        batch.sort(key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        sums = dict.fromkeys(("loss", "accuracy", "reward_chosen", "reward_rejected"), 0.0)
        for micro in micro_batches(batch, args.micro_batch):
            ref_chosen, ref_rejected = torch.tensor([reference[j] for j in micro], device=device).T
            with autocast:
                (chosen, rejected), length = sequence_logprobs([rows[j] for j in micro])
            losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, ref_chosen,
                                                              ref_rejected, args.beta)
            losses = losses - args.nll * chosen / length
            (losses.sum() / len(batch)).backward()
            for name, value in (("loss", losses), ("accuracy", reward_chosen > reward_rejected),
                                ("reward_chosen", reward_chosen),
                                ("reward_rejected", reward_rejected)):
                sums[name] += value.sum().item() / len(batch)
        sums = all_reduce_sum(sums)
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, sums["loss"])
        run.log(step + 1, steps, bar, batch, **sums, lr=lr, grad_norm=norm,
                margin=sums["reward_chosen"] - sums["reward_rejected"])
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, with a look at what it says now
    with autocast:
        groups = rollout(
            full_model(model),
            tokenizer,
            tasks.queries.builtin("val", 32, args.seed),
            1,
            args.max_new_tokens,
            1.0,
            args.seed,
            tasks.queries.score_many,
        )
    run.save_samples([group[0] for group in groups])
    run.finish(model, tokenizer, pairs=len(rows), dropped=dropped, **sums)
    return sums


if __name__ == "__main__":
    cli(main, Args)
