"""Stage 2: supervised fine-tuning on conversations (report section 4.1).

This is the pre-training loss, counted on a subset of the positions. The loss mask m_t is 1 on what
the assistant says and on the <|im_end|> that ends its turn; only tokenizer.render sets it:

    L = - 1/M_step * sum_t m_t log p(x_t | x_<t),    M_step = sum of m_t over the whole step

The report trains on over a million conversations for 2 epochs, with up to 32,768 tokens each, at a
learning rate that falls from 7e-6 to 7e-7, with weight decay 0.1 and a gradient norm of at most
1.0. It does not disclose batch size, warm-up, the shape of the decay or packing: these are our
choice. The report has one learning rate for all model sizes; smaller models need more. --lr 0 picks
one by the size of the model, between measured and published rates (lib/optim.py).

    python sft.py --init runs/demo/pretrain --out runs/demo/sft --lr 2e-4
    python sft.py --init Qwen2.5-7B --data chats.jsonl --n_data 1e6 --lr 7e-6 --max_len 32768 \\
        --epochs 2 --pack --batch_size 128 --micro_batch 1 --out ...    # the report's, where known
    python tokenizer.py show runs/demo/sft --chat chats.jsonl              # look at the loss mask

--data is JSONL of {"messages": [{"role", "content"}, ...]}, optionally with "tools" and the
assistant's "tool_calls". docs/your-data.md has the other shapes that are read, such as
ShareGPT's and Alpaca's. Every assistant turn is trained on. Without --data, the stage trains on
answers that a program has checked (`python -m tasks demonstrations`). `python -m tasks rejection`
makes a file for --data by rejection sampling.

Expect: with the demonstrations, the loss starts far below pre-training's and drops from one epoch
to the next. Then more than 95% of the answers stop by themselves. A loss near 0 is a bad sign: the
model has memorised the demonstrations and lost some of what the base model could do
(docs/LOG.md, "SFT above the base model, DPO above SFT").
"""
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from data.conversations import Conversations, pack
from lib.args import cli, positive, require
from lib.dist import (
    QUIET, all_reduce_sum, apply_fsdp, full_model, micro_batches, rank_slice)
from lib.lora import add_lora, base_dtype
from lib.optim import (
    adamw, clip_and_step, default_lr, epoch_order, lr_at, pad_rows, setup, throughput)
from lib.router import RouterStats
from lib.run import Run, build_once
from model import Qwen2
from sample import load_policy, rollout
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = "runs/pretrain"      # model directory to start from
    out: str = "runs/sft"            # run directory
    data: str = ""                   # conversations (JSONL); empty: built-in demonstrations
    eval_data: str = ""              # conversations (JSONL) to measure on, and not to learn from
    n_data: int = 0                  # read at most this many; 0: all of --data, or 1000 built-in
    system: str = ""                 # another default system prompt; empty: that of --init
    max_len: int = 512               # longer conversations are cut at the end
    allow_cut: bool = False          # train even if more than 10% of the conversations are cut
    pack: bool = False               # sequence packing: several conversations per row, less padding
    epochs: float = 4.0              # passes over the data
    batch_size: int = 16             # conversations per step
    micro_batch: int = 32            # rows per forward pass (gradient accumulation): memory only
    lora: int = 0                    # rank of LoRA adapters; 0: train all weights
    lora_alpha: float = 32.0         # the adapters' product is scaled by lora_alpha / lora
    gradient_checkpointing: bool = False  # recompute activations: less memory, 1/3 more time
    lr: float = 0.0                  # peak learning rate; 0: by the size of the model, and printed
    warmup: int = 10                 # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    max_grad_norm: float = 1.0       # gradients are clipped to this norm
    max_new_tokens: int = 160        # longest answer in samples.jsonl
    peak_tflops: float = 989.0       # of one GPU, for the log's mfu (H100, bf16, dense)
    eval_every: int = 200            # steps between losses of --eval_data; first and last have one
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of the demonstrations and the order of the data
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    save_dtype: str = ""             # of the saved weights; empty: that of --init
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# data

def load_conversations(args: Args, tokenizer: Tokenizer) -> Conversations:
    """Read --data, or generate the built-in demonstrations, and check what is cut."""
    path, n = args.data, args.n_data
    if not path:
        n = args.n_data or 1000
        path = Path(args.out).parent / f"demonstrations-{n}-seed{args.seed}.jsonl"
        build_once(path, "tasks", "demonstrations", "--n", n, "--seed", args.seed, "--out", path)
    conversations = Conversations(path, tokenizer, args.max_len, n)
    check_cuts(conversations, args)
    return conversations


def load_held_out(args: Args, tokenizer: Tokenizer) -> Conversations | None:
    """Read --eval_data, if it is given."""
    if not args.eval_data:
        return None
    return load_conversations(replace(args, data=args.eval_data, n_data=0), tokenizer)


def check_cuts(conversations: Conversations, args: Args) -> None:
    """Print what --max_len cuts, if anything. Refuse to cut more than a tenth of the conversations:
    an answer without its end teaches the model not to stop."""
    n = len(conversations) + conversations.dropped
    name = args.data or "demonstrations"
    require(len(conversations) > 0, f"{name}: none of {n} has an answer within --max_len "
            f"{args.max_len}")
    text = (f"{name}: --max_len {args.max_len} cuts {conversations.cut} of {n} conversations, "
            f"which loses {conversations.lost_targets} of {conversations.targets} targets; "
            f"{conversations.dropped} have no answer within it")
    require(args.allow_cut or conversations.cut <= n / 10,
            f"{text}: raise --max_len, or add --allow_cut")
    if conversations.cut or conversations.dropped:
        print(text)


# ---------------------------------------------------------------------------------------------
# loss

def sft_loss(model: Qwen2, ids, mask, count: int, segment_ids=None, router=None):
    """Return the summed loss of ids (B, T) where mask (B, T) is 1, divided by `count`.

    count is the number of supervised tokens of the whole step: the micro-batches of all processes
    then add up to its mean. Rows are padded on the right: causal attention keeps real tokens from
    seeing the padding. Its mask is -1, so that the router's balance does not count it.
    segment_ids (B, T) tells the conversations of a packed row apart. router: see Qwen2.hidden."""
    if segment_ids is not None:
        segment_ids = segment_ids[:, :-1]
    real = (mask[:, 1:] >= 0).flatten()
    hidden = model.hidden(ids[:, :-1], segment_ids=segment_ids, router=router, counted=real)
    targets = ids[:, 1:].masked_fill(mask[:, 1:] != 1, -100)  # -100: no loss here
    total = kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="sum")
    return total / count


@torch.no_grad()
def held_out_loss(model: Qwen2, conversations: Conversations, args: Args, autocast) -> float:
    """Return the mean loss per target of held-out conversations."""
    device = model.head_weight.device
    rows = [conversations[i] for i in rank_slice(range(len(conversations)))]
    loss = targets = 0
    for i in range(0, len(rows), args.micro_batch):
        some = rows[i:i + args.micro_batch]
        ids = pad_rows([row.ids for row in some], conversations.tokenizer.pad_id)
        mask = pad_rows([row.mask for row in some], -1)
        with autocast:
            loss += sft_loss(model, ids.to(device), mask.to(device), 1).item()
        for row in some:
            targets += sum(row.mask[1:])
    return all_reduce_sum(loss) / all_reduce_sum(targets)


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "sft")
    device, autocast = setup(args, args.batch_size)
    positive(args, "epochs", "batch_size", "micro_batch", "max_new_tokens", "eval_every",
             "save_every", "peak_tflops", "max_grad_norm")
    require(args.max_len >= 8, f"--max_len {args.max_len} is too short for a conversation")

    # model
    model, tokenizer = load_policy(args.init, device, base_dtype(args.lora, autocast))
    longest = model.config.max_position_embeddings
    require(args.max_len <= longest, f"--max_len {args.max_len}: {args.init} has only {longest} "
            "positions")
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.system:
        tokenizer.set_default_system(args.system)
    # On a CPU, "fused" attention skips the other conversations of a packed row.
    kernels.set_default_impl("fused" if args.pack and device.type == "cpu" else "auto")

    # data
    conversations = load_conversations(args, tokenizer)
    steps = max(1, int(args.epochs * len(conversations) / args.batch_size))
    print(f"{len(conversations)} conversations, {steps} steps of {args.batch_size}")
    held_out = load_held_out(args, tokenizer)

    # optimizer, resume
    peak_lr = args.lr or default_lr("sft", model, 10.0 if args.lora else 1.0)
    add_lora(model, args.lora, args.lora_alpha)
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, peak_lr, args.weight_decay)
    start = run.start_or_resume(model, optimizer)

    # loop
    router = RouterStats(model.config)  # of an MoE; a dense model has none
    bar = tqdm(range(start, steps), desc="sft", initial=start, total=steps, disable=QUIET)
    for step in bar:
        began = time.perf_counter()
        batch = epoch_order(step, args.batch_size, len(conversations), args.seed)
        rows = [conversations[i] for i in batch]
        rows.sort(key=lambda row: len(row.ids))  # similar lengths together: little padding
        count = sum(sum(row.mask[1:]) for row in rows)
        if args.pack:
            rows = pack(rows, args.max_len)
        loss = 0.0
        for micro in micro_batches(rows, args.micro_batch, model):
            ids = pad_rows([row.ids for row in micro], tokenizer.pad_id).to(device)
            mask = pad_rows([row.mask for row in micro], -1).to(device)
            segment_ids = None
            if args.pack:
                segment_ids = pad_rows([row.segment_ids for row in micro], -1).to(device)
            with autocast:
                micro_loss = sft_loss(model, ids, mask, count, segment_ids, router)
            (micro_loss + router.loss(len(micro) / len(rows))).backward()
            loss += micro_loss.item()
        loss = all_reduce_sum(loss)
        lr = lr_at(step, steps, peak_lr, args.warmup, args.final_lr)
        grad_norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
        epoch = (step + 1) * args.batch_size / len(conversations)
        speed = throughput(model, [len(row.ids) for row in rows], time.perf_counter() - began,
                           args.peak_tflops)
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "targets": count,
                   "epoch": epoch, **speed, **router.end_step(step + 1)}
        if held_out and (step % args.eval_every == 0 or step + 1 == steps):
            metrics["val_loss"] = held_out_loss(full_model(model), held_out, args, autocast)
        run.log(step + 1, steps, bar, batch, **metrics)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, then look at what the model answers now
    run.save(model, tokenizer)
    with autocast:
        groups = rollout(full_model(model), tokenizer, (held_out or conversations).prompts(32), 1,
                         args.max_new_tokens, seed=args.seed)
    answers = [group[0] for group in groups]
    stopped = sum(answer.finished for answer in answers) / max(1, len(answers))
    print(f"{stopped:.0%} of {len(answers)} sampled answers end by themselves")
    run.save_samples(answers)
    result = {"loss": loss, "val_loss": metrics.get("val_loss"), "stopped": stopped}
    run.finish(**result, conversations=len(conversations))
    return result


if __name__ == "__main__":
    cli(main, Args)
