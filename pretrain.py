"""Stage 1: pre-training on next-token prediction (report section 3).

The loss of a step, over all N_step tokens that have a next token, whatever the micro-batches:

    L = - 1/N_step * sum_t log p(x_t | x_<t)   [+ router_aux_loss_coef * L_aux for an MoE]

What is the report's: the architecture, documents ended by <|endoftext|>, the domain mixture by
token share, synthetic data, RoPE base 10,000 in the first phase. What the report does not
disclose, so is our choice: optimizer, learning rate, batch, warm-up, mixture ratios; AdamW with
betas 0.9/0.95 and a cosine to 10% of the peak are Qwen1's. scaling.py is the report's way to choose
learning rate and batch size.

    python pretrain.py                                             # a minute on a CPU
    python pretrain.py --data runs/demo/data --tokenizer runs/demo/tokenizer --tokens 3e6 --out ...
    python pretrain.py --data my.jsonl,more.txt --weights my=0.7,more=0.3 --model 0.5B ...

Expect: the loss at step 0 is ln(vocab_size) = 7.6 for 2,048 tokens, falls below 4 within the first
tenth and then slowly. A loss that stays near 7: learning rate too low, or shuffled targets.
"""
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import kernels
from common import Run, adamw, cli, clip_and_step, epoch_order, lr_at, positive, require, setup
from model import PRESETS, Qwen2, load_balancing_loss
from tokenizer import Tokenizer


@dataclass
class Args:
    out: str = "runs/pretrain"       # where the run goes
    data: str = ""                   # directory or files, comma-separated; empty: built-in corpus
    weights: str = ""                # token shares "name=0.5,other=0.5"; empty: ours, or by size
    tokenizer: str = ""              # directory or qwen.tiktoken; empty: train one on the data
    vocab_size: int = 2048           # of the tokenizer trained here, control tokens included
    model: str = "tiny"              # preset of model.py
    init: str = ""                   # continue from this model directory instead of from scratch
    rope_theta: float = 0.0          # change RoPE's base and continue (ABF); 0: leave it
    tokens: int = 300_000            # training tokens in all
    seq_len: int = 128               # positions a row
    doc_mask: bool = True            # packed documents do not see each other
    batch_tokens: int = 1024         # tokens a step: the batch size that schedules count
    micro_batch: int = 16            # rows a forward pass: memory, not the result (MoE aux apart)
    lr: float = 1.5e-3               # peak learning rate
    warmup: int = 50                 # steps of linear warm-up
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    clip: float = 1.0                # largest gradient norm
    eval_every: int = 200            # steps between held-out losses; the last step always has one
    save_every: int = 200            # steps between resumable states
    attention: str = "auto"          # kernels: auto, reference, sdpa, fused
    compile: bool = False            # torch.compile the kernels: pays off on long runs only
    seed: int = 0                    # of weights, data order and mixture
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# data

def load_sources(args: Args) -> dict[str, list[str]]:
    """Texts by source name, of a directory written by data.py, or of files of any kind it reads.
    With no --data, data.py builds its corpus first: real Python documentation and code, and
    synthetic documents of the four domains."""
    path = Path(args.data or f"{args.out}-data-seed{args.seed}")
    if not args.data and not (path / "report.json").exists():
        data.main(data.Args(out=str(path), seed=args.seed, overwrite=True))
    files = [Path(p) for p in args.data.split(",")]
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
    require(len(files) > 0, f"--data {path}: no .jsonl files in it")
    sources = {}
    for doc in (doc for file in files for doc in data.read_documents(file)):
        sources.setdefault(doc["source"], []).append(doc["text"])
    return sources


# ---------------------------------------------------------------------------------------------
# loss

def lm_loss(model: Qwen2, ids, segment_ids, count: int, router=None):
    """Summed next-token loss of rows ids (B, T+1), over `count`, the targets of the whole step."""
    hidden = model.hidden(ids[:, :-1], segment_ids=segment_ids[:, :-1] if segment_ids is not None
                          else None, router=router)
    return kernels.linear_cross_entropy(hidden, model.head_weight, ids[:, 1:],
                                        reduction="sum") / count


@torch.no_grad()
def held_out_loss(model, ids, segment_ids, micro_batch, device, autocast) -> float:
    """Mean loss per token of the fixed held-out rows, whatever the batch size."""
    total = 0.0
    for i in range(0, len(ids), micro_batch):
        segments = segment_ids[i:i + micro_batch].to(device) if segment_ids is not None else None
        with autocast:
            total += lm_loss(model, ids[i:i + micro_batch].to(device), segments, 1).item()
    return total / ids[:, 1:].numel()


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "pretrain")
    device, autocast = setup(args)
    require(args.model in PRESETS, f"--model wants one of {', '.join(PRESETS)}, got {args.model!r}")
    require(args.attention in kernels.IMPLS,
            f"--attention wants one of {', '.join(kernels.IMPLS)}, got {args.attention!r}")
    positive(args, "seq_len", "micro_batch", "tokens", "eval_every", "save_every")
    require(args.batch_tokens >= args.seq_len, f"--batch_tokens {args.batch_tokens} is less than "
            f"one row of --seq_len {args.seq_len}")
    kernels.use(args.attention, compile=args.compile)

    # data
    sources = load_sources(args)
    train = {name: [t for t in texts if not data.is_held_out(t)] for name, texts in sources.items()}
    require(any(train.values()), "--data has no document to train on")
    if args.init or args.tokenizer:
        tokenizer = Tokenizer.from_pretrained(args.tokenizer or args.init)
    else:
        tokenizer = Tokenizer.train((t for texts in train.values() for t in texts), args.vocab_size)
    docs = {name: data.tokenize(texts, tokenizer) for name, texts in train.items() if texts}
    sizes = {name: sum(map(len, arrays)) for name, arrays in docs.items()}
    builtin = sizes.keys() == data.BUILTIN_WEIGHTS.keys()
    weights = data.parse_weights(args.weights, data.BUILTIN_WEIGHTS if builtin else sizes)
    stream, report = data.mix(docs, weights, args.tokens, args.seed)
    ids, segment_ids = data.pack(stream, args.seq_len)
    held_out = [t for texts in sources.values() for t in texts if data.is_held_out(t)]
    random.Random(0).shuffle(held_out)  # the rows kept below are of all sources, not of the first
    held_out = data.tokenize(held_out, tokenizer)
    require(sum(map(len, held_out)) > args.seq_len, "--data is too small: its held-out documents, "
            f"one in fifty, do not fill a row of --seq_len {args.seq_len}")
    val_ids, val_segments = data.pack(held_out, args.seq_len)
    val_ids, val_segments = val_ids[:256].long(), val_segments[:256]
    if not args.doc_mask:
        segment_ids = val_segments = None
    for name, row in report.items():
        print(f"  {name:<20}{row['share']:>7.1%}{row['tokens']:>10} tokens, {row['epochs']} epochs "
              f"{row['warning']}")

    # model
    if args.init:
        model = Qwen2.from_pretrained(args.init, device=device)
        require(tokenizer.n_vocab <= model.config.vocab_size, "the tokenizer has "
                f"{tokenizer.n_vocab} ids, the model of --init only {model.config.vocab_size}")
    else:
        config = replace(PRESETS[args.model], vocab_size=tokenizer.padded_vocab_size(128))
        model = Qwen2(config).to(device)
    if args.rope_theta:
        model.config = replace(model.config, rope_theta=args.rope_theta)
    require(args.seq_len <= model.config.max_position_embeddings,
            f"--seq_len {args.seq_len} is beyond the model's "
            f"{model.config.max_position_embeddings} positions")
    rows = max(1, args.batch_tokens // args.seq_len)
    steps = len(ids) // rows
    require(steps > 0, f"--tokens {args.tokens} is less than one step of {rows * args.seq_len}")
    print(f"{model.count_parameters()} parameters, {steps} steps of {rows * args.seq_len} tokens")

    # optimizer, resume
    optimizer = adamw(model, args.lr, args.weight_decay)
    start = run.begin(model, optimizer)

    # loop
    bar = tqdm(range(start, steps), desc="pretrain", initial=start, total=steps, disable=None)
    for step in bar:
        began = time.time()
        batch = epoch_order(step, rows, len(ids), args.seed)
        count, loss, aux_sum, load = rows * args.seq_len, 0.0, 0.0, 0.0
        for i in range(0, rows, args.micro_batch):
            micro = batch[i:i + args.micro_batch]
            segments = segment_ids[micro].to(device) if segment_ids is not None else None
            router = [] if model.config.num_experts else None
            with autocast:
                micro_loss = lm_loss(model, ids[micro].to(device).long(), segments, count, router)
            loss += micro_loss.item()
            if router:
                aux, share = load_balancing_loss(router)
                aux, load = aux * len(micro) / rows, load + share * len(micro) / rows
                aux_sum += aux.item()
                micro_loss = micro_loss + model.config.router_aux_loss_coef * aux
            micro_loss.backward()
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.clip)
        metrics = {"loss": loss, "lr": lr, "grad_norm": norm,
                   "tokens": (step + 1) * count,
                   "tokens_per_s": count / (time.time() - began)}
        if router:
            metrics |= {"aux": aux_sum, "expert_max": load.max().item(),
                        "expert_min": load.min().item()}
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            metrics["val_loss"] = held_out_loss(model, val_ids, val_segments, args.micro_batch,
                                                device, autocast)
        run.log(step + 1, steps, bar, **metrics)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save
    run.finish(model, tokenizer, loss=loss, val_loss=metrics["val_loss"],
               bits_per_token=metrics["val_loss"] / math.log(2), mixture=report,
               **model.count_parameters(), tokens=steps * count)
    return metrics


if __name__ == "__main__":
    cli(main, Args)
