"""Stage 2: supervised fine-tuning on conversations (report section 4.1).

The pre-training loss on a subset of positions: with m_t = 1 exactly on what the assistant says and
on the <|im_end|> that ends its turn (tokenizer.render is the only place that decides this),

    L = - 1/M_step * sum_t m_t log p(x_t | x_<t),    M_step = sum of m_t over the whole step

The report's settings: 2 epochs, learning rate 7e-6 falling to 7e-7, weight decay 0.1, gradient norm
1.0. Our choice (not disclosed): batch size, warm-up, cosine decay. The default learning rate here
is for a model a thousand times smaller; recipes for published weights pass --lr 7e-6.

    python sft.py --init runs/demo/pretrain --out runs/demo/sft
    python sft.py --init Qwen2.5-0.5B --data chats.jsonl --lr 7e-6 --max_len 4096 --out ...

--data: JSONL of {"messages": [{"role", "content"}, ...]}; without it, verified built-in
demonstrations. With no --init, a base model is looked for in runs/pretrain.

Expect: the loss starts far below pre-training's (answers are easy to guess token by token) and
falls in a step at each epoch's end. After training, more than 95% of answers stop by themselves. A
loss near 0 is no good sign: too high a rate learns the demonstrations by heart and loses what the
base model could do (LOG.md, 2026-11-24).
"""
from dataclasses import dataclass

from tqdm import tqdm

import kernels
import tasks
from common import (
    InputError, Run, adamw, cli, clip_and_step, epoch_order, lr_at, pad_rows, positive,
    read_jsonl, require, setup)
from distributed import QUIET, micro_batches, sharded, summed, whole
from model import Qwen2
from sample import load_policy, rollout


@dataclass
class Args:
    init: str = "runs/pretrain"      # model directory to start from
    out: str = "runs/sft"            # where the run goes
    data: str = ""                   # conversations (JSONL); empty: built-in demonstrations
    n_data: int = 1000               # built-in demonstrations, or the most rows read from --data
    max_len: int = 512               # longer conversations are cut at the end
    epochs: float = 2.0              # passes over the data
    batch_size: int = 16             # conversations a step
    micro_batch: int = 32            # conversations a forward pass: memory only
    lr: float = 1e-3                 # peak learning rate (the report's models: 7e-6)
    warmup: int = 10                 # steps of linear warm-up
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    clip: float = 1.0                # largest gradient norm
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of data and their order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# data

def load_conversations(path: str, n: int, seed: int) -> list[list[dict]]:
    if not path:
        return [row["messages"] for row in tasks.demonstrations(n, seed)]
    out = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("messages"), list) or not row["messages"]:
            raise InputError(f'{path}:{number}: want {{"messages": [{{"role", "content"}}, ...]}}')
        out.append(row["messages"])
        if len(out) == n:
            break
    return out


def tokenize_conversations(conversations, tokenizer, max_len: int):
    """-> rows of (ids, mask), and how many were dropped: cut before the assistant's first word,
    they have nothing to learn from, and a step of only such rows would be 0/0 (R8.5)."""
    rows = []
    for messages in conversations:
        ids, mask = tokenizer.render(messages)
        if any(mask[1:max_len]):
            rows.append((ids[:max_len], mask[:max_len]))
    return rows, len(conversations) - len(rows)


# ---------------------------------------------------------------------------------------------
# loss

def sft_loss(model: Qwen2, ids, mask, count: int):
    """Summed loss of ids (B, T) where mask (B, T) is 1, over `count`, the step's supervised tokens.
    Rows are padded on the right: causal attention never looks there, and the mask is 0."""
    hidden = model.hidden(ids[:, :-1])
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="sum") / count


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "sft")
    device, autocast = setup(args, args.batch_size)
    positive(args, "n_data", "epochs", "batch_size", "micro_batch", "save_every")
    require(args.max_len >= 8, f"--max_len {args.max_len} is too short for a conversation")
    model, tokenizer = load_policy(args.init, device)

    # data
    conversations = load_conversations(args.data, args.n_data, args.seed)
    rows, dropped = tokenize_conversations(conversations, tokenizer, args.max_len)
    require(len(rows) > 0, f"--data {args.data}: no answer within --max_len tokens")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(rows)} conversations ({dropped} dropped: nothing to learn from), {steps} steps")

    # optimizer, resume
    model = sharded(model, autocast)
    optimizer = adamw(model, args.lr, args.weight_decay)
    start = run.begin(model, optimizer)

    # loop
    bar = tqdm(range(start, steps), desc="sft", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        batch.sort(key=lambda i: len(rows[i][0]))  # rows of one forward pass have similar lengths
        count, loss = sum(sum(rows[i][1][1:]) for i in batch), 0.0
        for micro in micro_batches(batch, args.micro_batch):
            ids = pad_rows([rows[j][0] for j in micro], tokenizer.pad_id).to(device)
            mask = pad_rows([rows[j][1] for j in micro], 0).to(device)
            with autocast:
                micro_loss = sft_loss(model, ids, mask, count)
            loss += micro_loss.item()
            micro_loss.backward()
        loss = summed(loss)
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.clip, loss)
        run.log(step + 1, steps, bar, batch, loss=loss, lr=lr, grad_norm=norm, targets=count,
                epoch=(step + 1) * args.batch_size / len(rows))
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, with a look at what it says now
    groups = rollout(whole(model), tokenizer, tasks.builtin("val", 32, args.seed), 1, 160, 1.0,
                     args.seed)
    answers = [group[0] for group in groups]
    run.save_samples(answers)
    stopped = sum(a.finished for a in answers) / len(answers)
    run.finish(model, tokenizer, loss=loss, stopped=stopped, conversations=len(rows))
    return {"loss": loss, "stopped": stopped}


if __name__ == "__main__":
    cli(main, Args)
