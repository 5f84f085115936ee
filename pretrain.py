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

import numpy as np
import torch
from tqdm import tqdm

import data.__main__
from data import corpus
from data import documents
from data import mixture
import kernels
from lib.args import cli, positive, require
from lib.optim import adamw, clip_and_step, epoch_order, lr_at, rng, setup
from lib.run import Run
from lib.dist import (
    QUIET,
    RANK,
    all_gather,
    micro_batches,
    apply_fsdp,
    rank_slice,
    all_reduce_sum,
    full_model,
)
from model import PRESETS, Config, Qwen2, load_balancing_loss
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = ""                   # continue from this model directory; empty: from scratch
    out: str = "runs/pretrain"       # where the run goes
    data: str = ""                   # directory or files, comma-separated; empty: built-in corpus
    weights: str = ""                # token shares "name=0.5,other=0.5"; empty: ours, or by size
    tokenizer: str = ""              # directory or qwen.tiktoken; empty: train one on the data
    vocab_size: int = 2048           # of the tokenizer trained here, control tokens included
    model: str = "tiny"              # preset of model.py
    rope_theta: float = 0.0          # another base of RoPE, for longer rows; 0: leave it
    upcycle: bool = False            # --init is dense: cut its FFNs into the experts of --model
    tokens: int = 600_000            # training tokens in all
    seq_len: int = 128               # positions a row
    doc_mask: bool = True            # packed documents do not see each other
    long_share: float = 0.0          # share of rows of one long document each; 0: as they come
    batch_tokens: int = 1024         # tokens a step: batch_tokens / seq_len rows
    micro_batch: int = 16  # rows a forward pass: memory, not the result (MoE aux apart)
    gradient_checkpointing: bool = (
        False  # activations in the backward pass: less memory, 1/3 more time
    )
    lr: float = 1.5e-3               # peak learning rate
    warmup: int = 50                 # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    max_grad_norm: float = 1.0       # largest gradient norm
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

def load_tokens(
    args: Args,
) -> tuple[dict[str, mixture.Tokens], dict[str, mixture.Tokens], Tokenizer]:
    """Training and held-out documents by source, and their tokenizer. Of a directory that data/
    has tokenised, memory-mapped; else of its texts, or files of any kind it reads, in memory. With
    no --data, data/ builds its corpus first: real Python documentation and code, and synthetic
    documents of the four domains."""
    path = Path(args.data or f"{args.out}-data-seed{args.seed}")
    if not args.data and not (path / "report.json").exists() and RANK == 0:
        data.__main__.main(data.__main__.Args(out=str(path), seed=args.seed, overwrite=True))
    all_gather("the corpus is there")
    given = Tokenizer.from_pretrained(args.tokenizer or args.init) if (
        args.tokenizer or args.init) else None
    names = [file.name.removesuffix(".train.bin") for file in sorted(path.glob("*.train.bin"))]
    if names:
        tokenizer = Tokenizer.from_pretrained(path)
        require(given is None or given.encode(__doc__) == tokenizer.encode(__doc__), f"--data "
                f"{path} holds tokens of another tokenizer than {args.tokenizer or args.init}")
        return *({name: mixture.read_tokens(path / f"{name}.{part}", tokenizer) for name in names}
                 for part in ("train", "held_out")), tokenizer
    train, held_out = {}, {}
    for doc in documents.read_all(args.data or str(path)):
        part = held_out if mixture.is_held_out(doc["text"]) else train
        train.setdefault(doc["source"], [])  # the order of the sources is that of their first text
        held_out.setdefault(doc["source"], [])
        part[doc["source"]].append(doc["text"])
    require(any(train.values()), "--data has no document to train on")
    tokenizer = given or Tokenizer.train((t for texts in train.values() for t in texts),
                                         args.vocab_size)
    return *({name: mixture.tokenize(texts, tokenizer) for name, texts in part.items()}
             for part in (train, held_out)), tokenizer


def pack(train: dict[str, mixture.Tokens], weights: dict[str, float], args: Args):
    """-> rows of --seq_len + 1 tokens, and the report of `mix`. With --long_share s, a share s of
    the rows are each one piece of a longer document, the others hold shorter documents only: the
    report's Turbo has 40% of its sequences at each stage's full length. Within either kind, sources
    keep their relative weights."""
    if not args.long_share:
        stream, report = mixture.mix(train, weights, args.tokens, args.seed)
        return mixture.PackedRows(list(train.values()), stream, args.seq_len), report
    width, sources, streams, report = args.seq_len + 1, [], [], {}
    full = int(args.tokens * args.long_share) // width * width
    for kind, tokens in (("longer", full), ("shorter", args.tokens - full)):
        docs = {name: source.long_pieces(width) if kind == "longer" else
                source.short_documents(width) for name, source in train.items()}
        docs = {name: docs[name] for name in docs if len(docs[name].starts) and name in weights}
        require(len(docs) > 0, f"--long_share: no document is {kind} than {width} tokens")
        stream, rows = mixture.mix(docs, {name: weights[name] for name in docs}, tokens, args.seed)
        streams.append(stream + [len(sources), 0, 0])
        sources += docs.values()
        report |= {f"{name}, {kind}": row for name, row in rows.items()}
    return mixture.PackedRows(sources, np.concatenate(streams), args.seq_len), report


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
    for i in rank_slice(range(0, len(ids), micro_batch)):
        segments = segment_ids[i:i + micro_batch].to(device) if segment_ids is not None else None
        with autocast:
            total += lm_loss(model, ids[i:i + micro_batch].to(device), segments, 1).item()
    return all_reduce_sum(total) / ids[:, 1:].numel()


# ---------------------------------------------------------------------------------------------
# from dense to MoE

@torch.no_grad()
def upcycle(dense: Qwen2, preset: Config, seed: int, fresh: float = 0.5) -> Qwen2:
    """A dense model -> an MoE with the experts of `preset` (Qwen2 report, section 2.2.2): each FFN
    is copied until its inner units suffice, each copy's units are shuffled, experts are cut from
    the row and the rest is dropped; then a random half of every expert's weights is drawn anew, so
    that experts differ. All other weights stay.

    Not disclosed, so our choice, made so that the loss goes on nearer to the dense one's (LOG.md,
    "upcycling", has numbers): the new weights have initializer_range; the shared expert is cut the
    same way but keeps its weights; the router starts near uniform; and each output is divided by
    the weight it will get (1/E, or 1/k if normalised, and 1/2 from the shared gate), times the
    dense size over the active size, which makes the sum of what is active an estimate of the dense
    FFN."""
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size",
             "shared_expert_intermediate_size", "norm_topk_prob", "router_aux_loss_coef",
             "decoder_sparse_step", "mlp_only_layers")
    config = replace(dense.config, **{name: getattr(preset, name) for name in names})
    E, k, inner = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    shared, F = config.shared_expert_intermediate_size, config.intermediate_size
    scale, generator = F / (k * inner + shared), rng(seed, 11)
    model, old = Qwen2(config), dense.state_dict()
    for name, p in model.named_parameters():
        if name in old:
            p.copy_(old[name])

    def units(n):
        copies = [torch.randperm(F, generator=generator) for _ in range(-(-n // F))]
        return torch.cat(copies)[:n]

    for layer in filter(config.is_sparse, range(config.num_hidden_layers)):
        moe, mlp = model.model.layers[layer].mlp, dense.model.layers[layer].mlp
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        cut, experts = units(E * inner).view(E, inner), moe.experts
        experts.gate_up_proj.copy_(torch.cat((gate[cut], up[cut]), dim=1))
        experts.down_proj.copy_(down[:, cut].transpose(0, 1)
                                * scale * (k if config.norm_topk_prob else E))
        for w in experts.parameters():
            new = torch.randn(w.shape, generator=generator) * config.initializer_range
            w.copy_(torch.where(torch.rand(w.shape, generator=generator) < fresh, new, w))
        moe.gate.weight.normal_(0.0, config.initializer_range, generator=generator)
        if shared:
            cut, expert = units(shared), moe.shared_expert
            expert.gate_proj.weight.copy_(gate[cut])
            expert.up_proj.weight.copy_(up[cut])
            expert.down_proj.weight.copy_(down[:, cut] * scale * 2)
            moe.shared_expert_gate.weight.zero_()
    return model


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "pretrain")
    device, autocast = setup(args, args.batch_tokens // max(1, args.seq_len))
    require(args.model in PRESETS, f"--model wants one of {', '.join(PRESETS)}, got {args.model!r}")
    require(args.attention in kernels.IMPLS,
            f"--attention wants one of {', '.join(kernels.IMPLS)}, got {args.attention!r}")
    positive(args, "seq_len", "micro_batch", "tokens", "eval_every", "save_every")
    require(args.batch_tokens >= args.seq_len, f"--batch_tokens {args.batch_tokens} is less than "
            f"one row of --seq_len {args.seq_len}")
    kernels.set_default_impl(args.attention, compile=args.compile)

    # data
    train, held_out, tokenizer = load_tokens(args)
    train = {name: docs for name, docs in train.items() if len(docs.ids)}
    sizes = {name: len(docs.ids) for name, docs in train.items()}
    builtin = sizes.keys() == corpus.BUILTIN_WEIGHTS.keys()
    weights = mixture.parse_weights(args.weights, corpus.BUILTIN_WEIGHTS if builtin else sizes)
    packed, report = pack(train, weights, args)
    held_out = list(held_out.values())
    stream = [(i, j, n) for i, docs in enumerate(held_out) for j, n in enumerate(docs.sizes)]
    random.Random(0).shuffle(stream)  # the rows kept below are of all sources, not of the first
    require(sum(n for _, _, n in stream) > args.seq_len, "--data is too small: its held-out "
            f"documents, one in fifty, do not fill a row of --seq_len {args.seq_len}")
    val = mixture.PackedRows(held_out, np.array(stream), args.seq_len)
    val_ids, val_segments = val[range(min(256, len(val)))]
    if not args.doc_mask:
        val_segments = None
    for name, row in report.items():
        print(f"  {name:<20}{row['share']:>7.1%}{row['tokens']:>10} tokens, {row['epochs']} epochs "
              f"{row['warning']}")

    # model
    trained = 0
    if args.init:
        model = Qwen2.from_pretrained(args.init)
        require(tokenizer.n_vocab <= model.config.vocab_size, "the tokenizer has "
                f"{tokenizer.n_vocab} ids, the model of --init only {model.config.vocab_size}")
        trained = model.config.trained_length
    else:
        model = Qwen2(replace(PRESETS[args.model], vocab_size=tokenizer.padded_vocab_size(128)))
    if args.upcycle:
        preset = PRESETS[args.model]
        require(args.init and not model.config.num_experts and preset.num_experts > 0, "--upcycle "
                "wants a dense --init and a --model with experts, such as tiny-moe")
        model = upcycle(model, preset, args.seed)
    # The length that YaRN and dual chunk attention will extend is the longest one trained at.
    config = replace(model.config, original_max_position_embeddings=max(trained, args.seq_len),
                     max_position_embeddings=max(model.config.max_position_embeddings,
                                                 args.seq_len))
    model.config = replace(config, rope_theta=args.rope_theta or config.rope_theta)
    model.to(device)
    model.gradient_checkpointing = args.gradient_checkpointing
    rows = max(1, args.batch_tokens // args.seq_len)
    steps = len(packed) // rows
    require(steps > 0, f"--tokens {args.tokens} is less than one step of {rows * args.seq_len}")
    print(f"{model.count_parameters()} parameters, {steps} steps of {rows * args.seq_len} tokens")

    # optimizer, resume
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, args.lr, args.weight_decay)
    start = run.start_or_resume(model, optimizer)

    # loop
    starved = 0  # (MoE layers, experts): steps in a row with less than a tenth of the fair share
    bar = tqdm(range(start, steps), desc="pretrain", initial=start, total=steps, disable=QUIET)
    for step in bar:
        began = time.time()
        batch = epoch_order(step, rows, len(packed), args.seed)
        count, loss, aux_sum, load, entropy = rows * args.seq_len, 0.0, 0.0, 0.0, 0.0
        for micro in micro_batches(batch, args.micro_batch):
            ids, segments = (part.to(device) for part in packed[micro])
            router = [] if model.config.num_experts else None
            with autocast:
                micro_loss = lm_loss(model, ids, segments if args.doc_mask else None, count, router)
            loss += micro_loss.item()
            if router:
                part, (aux, *stats) = (
                    len(micro) / rows,
                    load_balancing_loss(router, all_reduce=all_reduce_sum),
                )
                aux, load, entropy = aux * part, load + stats[0] * part, entropy + stats[1] * part
                aux_sum += aux.item()
                micro_loss = micro_loss + model.config.router_aux_loss_coef * aux
            micro_loss.backward()
        loss, aux_sum, load, entropy = map(all_reduce_sum, (loss, aux_sum, load, entropy))
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
        metrics = {"loss": loss, "lr": lr, "grad_norm": norm,
                   "tokens": (step + 1) * count,
                   "tokens_per_s": count / (time.time() - began)}
        if router:
            dead = load < 0.1
            metrics |= {"aux": aux_sum, "dead_experts": int(dead.sum())} | {
                name: [round(x, 4) for x in per_layer.tolist()] for name, per_layer in (
                    ("expert_max", load.amax(1)), ("expert_min", load.amin(1)),
                    ("router_entropy", entropy))}
            starved = (starved + 1) * dead
            for layer, expert in (starved == 100).nonzero().tolist():
                tqdm.write(f"step {step + 1}: expert {expert} of MoE layer {layer} got less than a "
                           "tenth of its fair share for 100 steps: lower --lr, or raise "
                           "router_aux_loss_coef in the config.json of --init")
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            metrics["val_loss"] = held_out_loss(full_model(model), val_ids, val_segments,
                                                args.micro_batch, device, autocast)
        run.log(step + 1, steps, bar, batch, **metrics)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save
    run.finish(model, tokenizer, loss=loss, val_loss=metrics["val_loss"],
               bits_per_token=metrics["val_loss"] / math.log(2), mixture=report,
               **model.count_parameters(), tokens=steps * count)
    return metrics


if __name__ == "__main__":
    cli(main, Args)
