"""Stage 1: pre-training on next-token prediction (Qwen2.5 report, section 3.1).

The loss of a step is the mean over all N_step tokens that have a next token, however the step is
split into micro-batches:

    L = - 1/N_step * sum_t log p(x_t | x_<t)   [+ router_aux_loss_coef * L_aux for an MoE]

From the report: the architecture, documents that end in <|endoftext|>, a mixture of domains by
token share, synthetic data, and RoPE base 10,000 in the first phase (the presets "tiny" and
"micro" have it; for others pass --rope_theta 1e4). The report does not disclose
optimizer, learning rate, batch size, warm-up or mixture ratios. We chose these; AdamW with betas
0.9/0.95 and a cosine to 10% of the peak follow Qwen1. scaling.py is the report's way to choose
the learning rate and the batch size.

    python pretrain.py                                             # a minute on a CPU
    python pretrain.py --data tinyshakespeare.txt --out runs/shakespeare       # any text
    python pretrain.py --data runs/demo/data --tokenizer runs/demo/tokenizer --tokens 3e6 --out ...
    python pretrain.py --data my.jsonl,more.txt --weights my=0.7,more=0.3 --model 0.5B ...

Expect: the loss at step 0 is ln(vocab_size), 7.6 for a vocabulary of 2,048. It falls below 4 in
the first tenth of the run, and then slowly. A loss that stays near 7 means that the learning rate
is too low or that the targets do not match the inputs.
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from data import mixture
from data.corpus import BUILTIN_WEIGHTS
from lib.args import cli, positive, require
from lib.dist import (
    QUIET, all_reduce_sum, apply_fsdp, full_model, micro_batches, rank_slice)
from lib.optim import adamw, clip_and_step, default_lr, epoch_order, lr_at, setup, throughput
from lib.router import RouterStats
from lib.run import Run, build_once
from lib.upcycle import upcycle
from model import PRESETS, Qwen2
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = ""                   # continue from this model directory; empty: from scratch
    out: str = "runs/pretrain"       # run directory
    data: str = ""                   # directory or files, comma-separated; empty: built-in corpus
    weights: str = ""                # token shares "name=0.5,other=0.5"; empty: by size
    tokenizer: str = ""              # directory or qwen.tiktoken; empty: train one on the data
    vocab_size: int = 2048           # of the tokenizer trained here, control tokens included
    model: str = "tiny"              # preset of model.py
    rope_theta: float = 0.0          # new base of RoPE, for longer rows; 0: keep the model's
    upcycle: bool = False            # --init is dense: turn its FFNs into the experts of --model
    tokens: int = 600_000            # training tokens in all
    seq_len: int = 128               # positions per row
    doc_mask: bool = True            # packed documents do not see each other
    long_share: float = 0.0          # share of rows with one long document each; 0: mixed
    batch_tokens: int = 1024         # tokens per step: batch_tokens / seq_len rows
    micro_batch: int = 16            # rows per forward pass: changes memory only (MoE aux apart)
    gradient_checkpointing: bool = False  # recompute activations: less memory, 1/3 more time
    lr: float = 0.0                  # peak learning rate; 0: by the size of the model, and printed
    warmup: int = 50                 # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    max_grad_norm: float = 1.0       # gradients are clipped to this norm
    eval_every: int = 200            # steps between held-out losses; the last step always has one
    save_every: int = 200            # steps between resumable states
    attention: str = "auto"          # kernels: auto, reference, sdpa, fused, flex (GPU)
    compile: bool = False            # torch.compile blocks and kernels: pays off on long runs only
    peak_tflops: float = 989.0       # of one GPU, for the log's mfu (H100, bf16, dense)
    seed: int = 0                    # of weights, data order and mixture
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    save_dtype: str = ""             # of the saved weights; empty: that of --init
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# data

def load_tokens(args: Args):
    """Return training documents and held-out documents, {source: Tokens} each, and the tokenizer.

    A directory that `python -m data --tokenizer` has tokenized is memory-mapped. Other documents
    are tokenized here, in memory. With no --data, `python -m data` builds its corpus first: real
    Python documentation and code, and synthetic mathematics, code, instructions and logic."""
    path = args.data
    if not path:
        path = f"{args.out}-data-seed{args.seed}"
        build_once(Path(path) / "report.json",
                   "data", "--out", path, "--seed", args.seed, "--overwrite")
    tokenizer = None
    if args.tokenizer or args.init:
        tokenizer = Tokenizer.from_pretrained(args.tokenizer or args.init)
    if any(Path(path).glob("*.train.bin")):
        return mixture.read_token_files(Path(path), tokenizer)
    return mixture.tokenize_documents(path, tokenizer, args.vocab_size)


# ---------------------------------------------------------------------------------------------
# loss

def lm_loss(model: Qwen2, ids, segment_ids, count: int, router=None):
    """Return the summed next-token loss of rows ids (B, T+1), divided by `count`.

    count is the number of targets of the whole step, so that micro-batches add up to its mean.
    segment_ids (B, T+1), or None, tells packed documents apart. The target of <|endoftext|> is the
    first token of the next document, and it counts. router: see model.Qwen2.hidden."""
    if segment_ids is not None:
        segment_ids = segment_ids[:, :-1]
    hidden = model.hidden(ids[:, :-1], segment_ids=segment_ids, router=router)
    total = kernels.linear_cross_entropy(hidden, model.head_weight, ids[:, 1:], reduction="sum")
    return total / count


@torch.no_grad()
def held_out_loss(model: Qwen2, ids, segment_ids, micro_batch: int, device, autocast) -> float:
    """Return the mean loss per token of the fixed held-out rows, whatever the batch size."""
    total = 0.0
    for i in rank_slice(range(0, len(ids), micro_batch)):
        some_ids = ids[i:i + micro_batch].to(device)
        some_segments = None
        if segment_ids is not None:
            some_segments = segment_ids[i:i + micro_batch].to(device)
        with autocast:
            total += lm_loss(model, some_ids, some_segments, 1).item()
    return all_reduce_sum(total) / ids[:, 1:].numel()


# ---------------------------------------------------------------------------------------------

def load_model(args: Args, tokenizer: Tokenizer) -> Qwen2:
    """Return the model of --init or a new one of --model, set to --seq_len and --rope_theta."""
    preset = PRESETS[args.model]
    trained_length = 0
    if args.init:
        model = Qwen2.from_pretrained(args.init)
        require(tokenizer.n_vocab <= model.config.vocab_size, "the tokenizer has "
                f"{tokenizer.n_vocab} ids, the model of --init only {model.config.vocab_size}")
        trained_length = model.config.trained_length
    else:
        model = Qwen2(replace(preset, vocab_size=tokenizer.padded_vocab_size(128)))
    if args.upcycle:
        dense = args.init and not model.config.num_experts
        require(dense and preset.num_experts > 0, "--upcycle expects a dense --init and a --model "
                "with experts, such as tiny-moe")
        model = upcycle(model, preset, args.seed)
    # YaRN and dual chunk attention will extend the longest length of any training so far.
    positions = max(model.config.max_position_embeddings, args.seq_len)
    model.config = replace(
        model.config, original_max_position_embeddings=max(trained_length, args.seq_len),
        max_position_embeddings=positions, rope_theta=args.rope_theta or model.config.rope_theta)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model


def check_args(args: Args, device) -> None:
    require(args.model in PRESETS, f"--model must be one of {', '.join(PRESETS)}, got "
            f"{args.model!r}")
    require(args.attention in kernels.IMPLS, f"--attention must be one of "
            f"{', '.join(kernels.IMPLS)}, got {args.attention!r}")
    require(args.attention != "flex" or device.type == "cuda", "--attention flex: PyTorch has its "
            "gradient on a GPU only; fused skips other documents on a CPU")
    positive(args, "seq_len", "micro_batch", "tokens", "eval_every", "save_every", "peak_tflops",
             "max_grad_norm")
    require(args.batch_tokens >= args.seq_len, f"--batch_tokens {args.batch_tokens} is less than "
            f"one row of --seq_len {args.seq_len}")


def main(args: Args) -> dict:
    # set-up
    run = Run(args, "pretrain")
    rows_per_step = args.batch_tokens // max(1, args.seq_len)
    device, autocast = setup(args, rows_per_step)
    check_args(args, device)
    kernels.set_default_impl(args.attention, compile=args.compile)

    # data
    train, held_out, tokenizer = load_tokens(args)
    train, held_out = mixture.hold_out_ends(train, held_out, args.seq_len)
    sizes = {name: int(documents.sizes.sum()) for name, documents in train.items()}
    sizes = {name: size for name, size in sizes.items() if size > 0}
    train = {name: train[name] for name in sizes}
    builtin = sizes.keys() == BUILTIN_WEIGHTS.keys()
    weights = mixture.parse_weights(args.weights, BUILTIN_WEIGHTS if builtin else sizes)
    packed, report = mixture.pack(train, weights, args.tokens, args.seq_len, args.seed,
                                  args.long_share)
    val_ids, val_segments = mixture.held_out_rows(held_out, args.seq_len, args.tokens)
    if not args.doc_mask:
        val_segments = None
    for name, row in report.items():
        print(f"  {name:<20}{row['share']:>7.1%}{row['tokens']:>10} tokens, {row['epochs']} epochs "
              f"{row['warning']}")

    # model
    model = load_model(args, tokenizer).to(device)
    count = rows_per_step * args.seq_len  # tokens with a target, per step
    steps = len(packed) // rows_per_step
    require(steps > 0, f"--tokens {args.tokens} fills no step of {rows_per_step} rows of "
            f"{args.seq_len + 1} tokens")
    print(f"{model.count_parameters()} parameters, {steps} steps of {count} tokens")

    # optimizer, resume
    peak_lr = args.lr or default_lr("pretrain", model, 1 / 3 if args.init else 1.0)
    if args.compile and device.type == "cuda":  # on a CPU only the kernels
        for block in model.model.layers:
            block.compile()
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, peak_lr, args.weight_decay)
    start = run.start_or_resume(model, optimizer)

    # loop
    router = RouterStats(model.config)  # of an MoE; a dense model has none
    bar = tqdm(range(start, steps), desc="pretrain", initial=start, total=steps, disable=QUIET)
    for step in bar:
        began = time.perf_counter()
        batch = epoch_order(step, rows_per_step, len(packed), args.seed)
        loss = 0.0
        for micro in micro_batches(batch, args.micro_batch, model):
            ids, segment_ids = packed[micro]
            ids = ids.to(device)
            segment_ids = segment_ids.to(device) if args.doc_mask else None
            with autocast:
                micro_loss = lm_loss(model, ids, segment_ids, count, router)
            (micro_loss + router.loss(len(micro) / rows_per_step)).backward()
            loss += micro_loss.item()
        loss = all_reduce_sum(loss)
        lr = lr_at(step, steps, peak_lr, args.warmup, args.final_lr)
        grad_norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
        speed = throughput(model, [args.seq_len] * rows_per_step, time.perf_counter() - began,
                           args.peak_tflops)
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": (step + 1) * count,
                   **speed, **router.end_step(step + 1)}
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            metrics["val_loss"] = held_out_loss(full_model(model), val_ids, val_segments,
                                                args.micro_batch, device, autocast)
        run.log(step + 1, steps, bar, batch, **metrics)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save
    run.save(model, tokenizer)
    run.finish(loss=loss, val_loss=metrics["val_loss"],
               bits_per_token=metrics["val_loss"] / math.log(2), mixture=report,
               **model.count_parameters(), tokens=steps * count)
    return metrics


if __name__ == "__main__":
    cli(main, Args)
