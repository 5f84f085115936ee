"""Stage 3, offline reinforcement learning: DPO with online merging (report section 4.2).

The SFT model answers new queries several times. Answers that pass their check are "chosen", answers
that fail are "rejected". With log-probabilities summed over the response's tokens, h is the
policy's preference for the chosen answer minus that of the reference policy, which is the frozen
SFT policy (DPO paper, eq. 7):

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
    L = - log sigmoid(beta * h)

The Online Merging Optimizer (Lu et al. 2024) takes the step. It blends each update with the
direction from the pre-trained to the SFT model, so that less is forgotten.

The report's pairs are reviewed by programs and by people. Here `review` drops pairs from which
nothing should be learned and says why; people's verdicts (data/label.py) come back as a file for
--data. The report trains on about 150,000 pairs for 1 epoch at a learning rate of 7e-7 with online
merging. It does not disclose beta, the batch size, the schedule or what a review drops; these, and
the OnDARE variant with --merge_alpha and --reserve, are our choice.

    python dpo.py --init runs/demo/sft --base runs/demo/pretrain --out runs/dpo
    python dpo.py --init Qwen2.5-0.5B-Instruct --data pairs.jsonl --lr 7e-7 --out ...

--data is JSONL of {"prompt": str or messages, "chosen": str or messages, "rejected": ...}.

Expect: the loss starts at ln 2 = 0.693 (plus --rpo_alpha times the loss of the chosen
answers), and the accuracy, the share of pairs with h > 0, rises from 0, where all h are equal, to
0.7-0.9. Both log-probabilities may fall, the rejected one faster: that is DPO, not a fault. If the
chosen one falls by more than a few nats, lower --lr, or raise --beta or --rpo_alpha, which holds
the chosen answer up. A small model needs much of it (docs/LOG.md, "SFT above the base model, DPO
above SFT").
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import tasks.queries
from data.pairs import PairFile, PairIds, pair_responses, read_held_out, review
from lib.args import cli, positive, require
from lib.dist import (
    QUIET, all_reduce_sum, apply_fsdp, full_model, gather_rows, micro_batches, rank_slice,
    shard_like)
from lib.files import write_jsonl
from lib.lora import add_lora, base_dtype
from lib.optim import adamw, clip_and_step, default_lr, epoch_order, lr_at, rng, setup
from lib.router import RouterStats
from lib.run import Run
from lib.vllm_client import rollout_backend
from model import Qwen2
from sample import completion_logprobs, load_policy, rollout
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = "runs/sft"           # SFT model: initial policy and reference policy
    out: str = "runs/dpo"            # run directory
    base: str = ""                   # pre-trained model, for online merging; empty: plain AdamW
    data: str = ""                   # preference pairs (JSONL); empty: resample --init on queries
    eval_data: str = ""              # pairs (JSONL) to measure on, and not to learn from
    queries: str = "rl"              # to resample on: query splits or files, joined by commas
    n_queries: int = 0               # at most this many of each; 0: whole files, 256 of a split
    responses: int = 8               # answers sampled per query
    pairs_per_query: int = 4         # at most this many pairs per query
    temperature: float = 1.0         # of the sampling
    allow_unsafe_code: bool = False  # judge code although the sandbox lacks layers of isolation
    rollout_url: str = ""            # sample from --init on a server, http://HOST:PORT/v1
    max_new_tokens: int = 128        # longest sampled answer
    max_len: int = 1024              # drop pairs with a longer prompt + answer (or than --init's)
    check_format: bool = False       # drop ill-formed chosen answers and false equations
    epochs: float = 2.0              # passes over the pairs
    batch_size: int = 16             # pairs per step
    micro_batch: int = 32            # pairs per forward pass (gradient accumulation): memory only
    gradient_checkpointing: bool = False  # recompute activations: less memory, 1/3 more time
    lora: int = 0                    # rank of LoRA adapters; 0: train all weights
    lora_alpha: float = 32.0         # the adapters' product is scaled by lora_alpha / lora
    beta: float = 0.1                # strength of the tie to the reference policy
    rpo_alpha: float = 0.0           # weight of -log pi(chosen) per token, added to the loss
    lr: float = 0.0                  # peak learning rate; 0: by the size of the model, and printed
    warmup: int = 5                  # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    merge_alpha: float = 1e-7        # online merging: share of the SFT direction in each update
    reserve: float = 0.5             # online merging: share of the entries that are kept
    max_grad_norm: float = 1.0       # gradients are clipped to this norm
    eval_every: int = 200            # steps between measures of --eval_data; first and last too
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of sampling, pairing and order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    save_dtype: str = ""             # of the saved weights; empty: that of --init
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# loss and optimizer

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta: float, label=1.0):
    """Return losses (B,) and the implicit rewards of chosen and rejected (B,) (DPO paper, eq. 7).

    The first four are summed log-probabilities (B,). The implicit reward of an answer is
    beta * log(pi / pi_ref). label (B,) is the probability that the chosen answer is better; it is 1
    unless judges disagree. The losses are those of reward.preference_loss, stage 4."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(reward_chosen - reward_rejected)
    losses = losses + (1 - label) * (reward_chosen - reward_rejected)
    return losses, reward_chosen.detach(), reward_rejected.detach()


class OnlineMerging(torch.optim.Optimizer):
    """Online Merging Optimizer (Lu et al. 2024, algorithm 1; their OnDARE variant):

        theta += (1 - alpha) F(delta) + alpha F(tau)

    delta is Adam's update. tau = theta_SFT - theta_base is fixed and sparsified once. F is
    `sparsify`: it keeps each entry with probability `reserve` and sets the others to 0. As in the
    authors' code, and unlike eq. 4, it divides what it keeps by `reserve`, so that the mean is
    right. Every mask is a pure function of (seed, step, tensor)."""

    def __init__(self, params, taus, lr: float, alpha: float, reserve: float, seed: int = 0,
                 betas=(0.9, 0.95), eps: float = 1e-8):
        require(0 < reserve <= 1, f"--reserve must be a share in (0, 1], got {reserve}")
        require(0 <= alpha < 1, f"--merge_alpha must be a share in [0, 1), got {alpha}")
        super().__init__(list(params), {"lr": lr})
        self.alpha = alpha
        self.reserve = reserve
        self.seed = seed
        self.betas = betas
        self.eps = eps
        self.taus = [self.sparsify(tau, 0, i) for i, tau in enumerate(taus)]

    def sparsify(self, x, draw: int, index: int):
        """F: keep a random share `reserve` of the entries of tensor number `index`, another one at
        every draw."""
        if self.reserve == 1:
            return x
        generator = rng(self.seed, draw, index, device=x.device)
        keep = torch.rand(x.shape, device=x.device, generator=generator) < self.reserve
        return x * shard_like(keep, x) / self.reserve

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
                state["m"] = torch.zeros_like(p)
                state["v"] = torch.zeros_like(p)
            state["step"] += 1
            t = int(state["step"])
            state["m"].lerp_(p.grad, 1 - beta1)
            state["v"].lerp_(p.grad.square(), 1 - beta2)
            m = state["m"] / (1 - beta1**t)
            v = state["v"] / (1 - beta2**t)
            delta = -group["lr"] * m / (v.sqrt() + self.eps)
            delta = self.sparsify(delta, t + 1, i)  # draw 0 was tau's
            p += (1 - self.alpha) * delta + self.alpha * tau


def make_optimizer(model: Qwen2, args: Args, peak_lr: float, device):
    """Return OnlineMerging with tau = --init - --base or, without --base, AdamW."""
    if not args.base:
        return adamw(model, peak_lr, weight_decay=0.0)
    base_model = Qwen2.from_pretrained(args.base, device=device)
    base = dict(base_model.named_parameters())
    base_shapes = {name: p.shape for name, p in base.items()}
    params = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in params.items()}
    require(shapes == base_shapes,
            f"--base {args.base} must have the architecture of --init, and excludes --lora")
    taus = []
    for name, p in params.items():
        tau = p.detach() - shard_like(base[name], p)
        taus.append(tau)
    return OnlineMerging(params.values(), taus, peak_lr, args.merge_alpha, args.reserve,
                         args.seed)


# ---------------------------------------------------------------------------------------------
# pairs and log-probabilities

def load_pairs(args: Args, run: Run, model: Qwen2, tokenizer: Tokenizer, autocast):
    """Read the pairs of --data, or sample answers of --init to queries and pair them."""
    if run.resumed:  # a server, or another number of processes, would now answer differently
        return PairFile(str(run.path / "pairs.jsonl"))
    if args.data:
        return PairFile(args.data)
    queries = tasks.queries.load(args.queries, args.n_queries, args.seed, built_in=256)
    policy = rollout_backend(args.rollout_url, model, tokenizer)
    with autocast:
        groups = rollout(policy, tokenizer, queries, args.responses, args.max_new_tokens,
                         args.temperature, args.seed, tasks.queries.score_many)
    answers = [answer for group in groups for answer in group]
    pairs = pair_responses(answers, args.pairs_per_query, args.seed)
    pass_rate = sum(answer.score for answer in answers) / len(answers)
    print(f"{args.init} passes {pass_rate:.1%} of {len(queries)} queries x {args.responses}: "
          f"{len(pairs)} pairs")
    require(len(pairs) > 0, "no preference pair: every query's answers all pass or all fail; "
            "choose other --queries, a higher --temperature, or more SFT")
    return pairs


def sequence_logprobs(model: Qwen2, rows: list[PairIds], router=None):
    """Return the summed log-probabilities of chosen (B,) and of rejected (B,), and the lengths of
    the chosen answers (B,). Both answers of a pair go through one forward pass. router: see
    Qwen2.hidden."""
    prompts = [row.prompt for row in rows]
    answers = [row.chosen for row in rows] + [row.rejected for row in rows]
    logprobs, mask = completion_logprobs(model, prompts * 2, answers, router=router)
    sums = logprobs.sum(-1)
    lengths = mask.sum(-1)
    chosen, rejected = sums.chunk(2)
    chosen_length, _ = lengths.chunk(2)
    return chosen, rejected, chosen_length


@torch.no_grad()
def all_logprobs(model: Qwen2, rows, micro_batch: int, autocast):
    """Return (pairs, 2): sequence_logprobs of all rows. Those of the reference are computed before
    the policy's first step, so that one model in memory is enough."""
    mine = rank_slice(range(len(rows)))
    logprobs = []
    for i in range(0, len(mine), micro_batch):
        some = [rows[row] for row in mine[i:i + micro_batch]]
        with autocast:
            chosen, rejected, _ = sequence_logprobs(model, some)
        logprobs.extend(torch.stack((chosen, rejected), dim=1).tolist())
    return torch.tensor(gather_rows(logprobs))


def held_out_metrics(model: Qwen2, rows, reference, args: Args, autocast) -> dict[str, float]:
    """Return the mean loss, without --rpo_alpha, and the accuracy of held-out pairs."""
    chosen, rejected = all_logprobs(model, rows, args.micro_batch, autocast).unbind(1)
    ref_chosen, ref_rejected = reference.unbind(1)
    labels = torch.tensor([row.label for row in rows])
    losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected,
                                                      args.beta, labels)
    accuracy = (reward_chosen > reward_rejected).float()
    return {
        "val_loss": losses.mean().item(),
        "val_accuracy": accuracy.mean().item(),
    }


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "dpo")
    device, autocast = setup(args, args.batch_size)
    positive(args, "responses", "temperature", "max_new_tokens", "epochs", "batch_size",
             "micro_batch", "eval_every", "save_every", "max_grad_norm")
    require(not (args.data and args.rollout_url), "--data and --rollout_url: take one")
    shown = tasks.queries.builtin("val", 32, args.seed)
    tasks.queries.require_isolation(shown, args.allow_unsafe_code)  # `shown` holds code

    # model
    model, tokenizer = load_policy(args.init, device, base_dtype(args.lora, autocast))
    model.gradient_checkpointing = args.gradient_checkpointing

    # data
    pairs = load_pairs(args, run, model, tokenizer, autocast)
    max_len = min(args.max_len, model.config.max_position_embeddings)
    pairs, rows, dropped = review(pairs, tokenizer, max_len, args.check_format)
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    require(len(pairs) > 0, f"no pair is left after the review: {why}")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(pairs)} pairs (dropped by the review: {why}), {steps} steps")
    reference = all_logprobs(model, rows, args.micro_batch, autocast)
    held_out = read_held_out(args.eval_data, tokenizer, max_len)
    held_out_ref = all_logprobs(model, held_out, args.micro_batch, autocast)

    # optimizer, resume
    peak_lr = args.lr or default_lr("dpo", model, 10.0 if args.lora else 1.0)
    add_lora(model, args.lora, args.lora_alpha)
    model = apply_fsdp(model, autocast)
    optimizer = make_optimizer(model, args, peak_lr, device)
    start = run.start_or_resume(model, optimizer)
    write_jsonl(run.path / "pairs.jsonl", pairs)

    # loop
    router = RouterStats(model.config)  # of an MoE; a dense model has none
    bar = tqdm(range(start, steps), desc="dpo", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        row_of = {i: rows[i] for i in batch}
        # Rows of similar lengths share a micro-batch: little padding.
        batch.sort(key=lambda i: len(row_of[i].prompt) + len(row_of[i].chosen))
        metrics = {"loss": 0.0, "accuracy": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0}
        for micro in micro_batches(batch, args.micro_batch, model):
            some = [row_of[i] for i in micro]
            labels = torch.tensor([row.label for row in some], device=device)
            ref_chosen, ref_rejected = reference[micro].to(device).unbind(1)
            with autocast:
                chosen, rejected, length = sequence_logprobs(model, some, router)
            losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, ref_chosen,
                                                              ref_rejected, args.beta, labels)
            losses = losses - args.rpo_alpha * chosen / length
            (losses.sum() / len(batch) + router.loss(len(micro) / len(batch))).backward()
            values = {
                "loss": losses,
                "accuracy": reward_chosen > reward_rejected,
                "reward_chosen": reward_chosen,
                "reward_rejected": reward_rejected,
            }
            for name, per_pair in values.items():
                metrics[name] += per_pair.sum().item() / len(batch)
        metrics = all_reduce_sum(metrics)
        lr = lr_at(step, steps, peak_lr, args.warmup, args.final_lr)
        grad_norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, metrics["loss"])
        margin = metrics["reward_chosen"] - metrics["reward_rejected"]
        if held_out and (step % args.eval_every == 0 or step + 1 == steps):
            metrics |= held_out_metrics(full_model(model), held_out, held_out_ref, args, autocast)
        run.log(step + 1, steps, bar, batch, **metrics, lr=lr, grad_norm=grad_norm, margin=margin,
                **router.end_step(step + 1))
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, then look at what the model answers now
    run.save(model, tokenizer)
    with autocast:
        groups = rollout(full_model(model), tokenizer, shown, 1, args.max_new_tokens, 1.0,
                         args.seed, tasks.queries.score_many)
    run.save_samples([group[0] for group in groups])
    run.finish(pairs=len(rows), dropped=dropped, **metrics)
    return metrics


if __name__ == "__main__":
    cli(main, Args)
