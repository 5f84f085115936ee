"""A roofline model of one GPU: the table "GPU, modelled" of bench/RESULTS.md. Nothing is measured.

    python bench/gpu_model.py            # prints the table, in a second

Every operation takes the longest of its FLOPs at a rate, its bytes at a bandwidth, and the launches
of its kernels. Operations follow one another. The peaks are NVIDIA's for an H100 SXM; the rates
below them are assumptions, and so are the bytes per number of the elementwise parts, counted by
reading the code. Training is one micro-batch of 32,768 tokens per GPU and an AdamW step.

Plain rows take SDPA's flash kernel. Packed rows took, before, its memory-efficient kernel with a
dense (B,1,T,T) mask, which skips nothing; after, they take FlexAttention. "Blocked" is
kernels.FusedAttention on a GPU instead: 64 queries at a time, all scores in memory. The head before
computes its logits twice, and adds the gradient of its weight in fp32 by a product and a sum. The
one after is lib/chunked_loss.py: logits once, and a product that itself adds in fp32. Nothing else
differs. The last table says what the head and the sampler could still gain.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.plan import count, flops  # noqa: E402
from model import PRESETS, Config  # noqa: E402

PEAK = 989e12                        # FLOP/s in bf16, dense: the data sheet's
BANDWIDTH = 2.8e12                   # bytes/s, of the data sheet's 3.35e12
GEMM = 600e12                        # a large matrix product
FLASH = 350e12, 250e12               # attention kernels, forward and backward
DENSE = 175e12, 125e12               # the same with a dense mask: half of it
LAUNCH = 6e-6                        # seconds per kernel, from Python
SYNC = 30e-6                         # seconds until the host has a number from the GPU
TOKENS = 32_768                      # per micro-batch
DOCUMENT = 1_024                     # tokens per packed document
BLOCK = 64                           # queries per block of kernels.FusedAttention
FLEX_BLOCK = 128
HEAD_ROWS = 1_024                    # rows per chunk of the head before
HEAD_LOGITS = 2**27                  # logits in memory, of the head after
PROMPT, NEW = 256, 256               # tokens per rollout


@dataclass
class Work:
    """What some kernels do."""
    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 1.0
    rate: float = GEMM

    def seconds(self) -> float:
        return max(self.flops / self.rate, self.bytes / BANDWIDTH, self.kernels * LAUNCH)


def product(rows: float, n_in: int, n_out: int) -> Work:
    """rows x n_in times n_in x n_out, in bf16."""
    numbers = rows * n_in + n_in * n_out + rows * n_out
    return Work(2 * rows * n_in * n_out, 2 * numbers)


def projections(config: Config) -> list[tuple[int, int]]:
    """(in, out) of a dense block's seven matrices."""
    C = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    return [(C, queries), (C, keys), (C, keys), (queries, C), (C, inner), (C, inner), (inner, C)]


# --- one layer's attention, forward and backward --------------------------------------------------

def causal_pairs(T: int, packed: bool) -> float:
    """Pairs of a query and a key it sees, per row."""
    length = min(DOCUMENT, T) if packed else T
    return T * (length + 1) / 2


def attention(config: Config, rows: int, T: int, packed: bool, kind: str) -> list[Work]:
    """4 FLOPs per pair, head and unit of width forward, 10 backward: five products, one again."""
    heads = config.num_attention_heads
    width = heads * config.head_dim
    token_bytes = 2 * rows * T * (2 * width + 2 * config.num_key_value_heads * config.head_dim)
    if kind == "dense":
        pairs = rows * T * T
        # Built as bool by comparisons (10 bytes a pair), then turned into bf16 numbers, which every
        # head reads, in the forward and in the backward pass.
        mask = Work(bytes=13 * pairs, kernels=8)
        read = 2 * pairs * heads
        return [mask,
                Work(4 * pairs * width, token_bytes + read, rate=DENSE[0]),
                Work(10 * pairs * width, 2 * token_bytes + read, rate=DENSE[1])]
    if kind == "blocked":
        pairs = rows * (causal_pairs(T, packed) + T * BLOCK / 2)
        blocks = T / BLOCK
        # Scores are fp32: written, masked, softmax, cast and read (26 bytes), backward also the
        # gradients of probabilities and scores (56). Two host syncs per block where it is packed.
        waiting = 2 * blocks * SYNC / LAUNCH if packed else 0
        return [Work(4 * pairs * width, 26 * pairs * heads, kernels=8 * blocks + waiting),
                Work(10 * pairs * width, 56 * pairs * heads, kernels=16 * blocks + waiting)]
    pairs = rows * (causal_pairs(T, packed) + T * FLEX_BLOCK / 2)
    return [Work(4 * pairs * width, token_bytes, rate=FLASH[0]),
            Work(10 * pairs * width, 2 * token_bytes, rate=FLASH[1])]


# --- the rest of a step ---------------------------------------------------------------------------

def block_without_attention(config: Config, tokens: int) -> list[Work]:
    """A dense block, forward and backward: products, and elementwise work in bytes per token."""
    C, inner = config.hidden_size, config.intermediate_size
    rotated = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    works = []
    parameters = 0
    for n_in, n_out in projections(config):
        works += [product(tokens, n_in, n_out)] * 3   # output, gradients of input and of weight
        parameters += n_in * n_out
    works += [
        Work(bytes=18 * parameters, kernels=14),      # fp32 to bf16; gradients to fp32, added
        Work(bytes=2 * 74 * C * tokens, kernels=30),  # two norms: 14 forward, 60 backward
        Work(bytes=44 * C * tokens, kernels=6),       # two residual sums
        Work(bytes=36 * rotated * tokens, kernels=20),  # RoPE of queries and keys
        Work(bytes=38 * inner * tokens, kernels=7),   # SwiGLU: 10 forward, 28 backward
    ]
    return works


def head_before(config: Config, tokens: int) -> list[Work]:
    """Four products: logits, logits again, gradients of the hidden state and of the weight."""
    C, V = config.hidden_size, config.vocab_size
    chunks = tokens / HEAD_ROWS
    work = product(HEAD_ROWS, C, V)
    return [Work(work.flops * chunks, work.bytes * chunks, chunks)] * 4 + [
        Work(bytes=74 * V * tokens, kernels=20 * chunks),
        Work(bytes=16 * V * C * chunks, kernels=2 * chunks)]  # product, then sum


def head(config: Config, tokens: int, logit_bytes=4, passes=30, sum_apart=False) -> list[Work]:
    """Three products: logits, gradients of the hidden state and of the weight.

    logit_bytes: 4 in fp32. passes: bytes per logit of the elementwise kernels: maximum 4,
    difference 8, exp 8, sum 4, cast 6. sum_apart: a product, then a sum."""
    C, V = config.hidden_size, config.vocab_size
    rows = HEAD_LOGITS // V
    chunks = tokens / rows
    flops = 2 * rows * C * V
    works = [
        Work(flops, 2 * rows * C + 2 * C * V + logit_bytes * rows * V),
        Work(flops, 2 * rows * V + 2 * C * V + 8 * rows * C),
        Work(flops, 2 * rows * V + 2 * rows * C + (4 if sum_apart else 8) * C * V),
        Work(bytes=passes * rows * V, kernels=20),
    ]
    if sum_apart:
        works.append(Work(bytes=12 * C * V))
    return [Work(work.flops * chunks, work.bytes * chunks, work.kernels * chunks)
            for work in works]


def training(config: Config, T: int, packed: bool, kind: str, after: bool, gpus: int) -> dict:
    """{part: seconds} of one micro-batch and one AdamW step; weights are shared by `gpus`."""
    layers = config.num_hidden_layers
    adam = Work(bytes=40 * count(config)["total"] / gpus, kernels=20)  # norm, clip, Adam
    return {
        "attention": layers * seconds(attention(config, TOKENS // T, T, packed, kind)),
        "blocks": layers * seconds(block_without_attention(config, TOKENS)),
        "head": seconds(head(config, TOKENS) if after else head_before(config, TOKENS)),
        "AdamW": seconds([adam]),
    }


def seconds(works: list[Work]) -> float:
    return sum(work.seconds() for work in works)


def sampler(config: Config, batch: int, fused: bool) -> Work:
    """sample.sample_token with neither top-k nor top-p. Per logit: softmax reads three times and
    writes (16 bytes), then float64 (12) and its running sum (16). fused, as a compiler could at
    best: three reads, and the running sum is written."""
    per_logit = 20 if fused else 44
    return Work(bytes=per_logit * batch * config.vocab_size, kernels=4 if fused else 10)


def decoding(config: Config, batch: int, launched: bool, fused=False) -> float:
    """Seconds per token of all rows, halfway through an answer. launched: each kernel from Python,
    25 per layer and 20 besides the sampler; else only what must be read and computed. The host
    waits for the token, so the sampler's work cannot hide behind the launches of the blocks."""
    sizes = count(config)
    layers = config.num_hidden_layers
    cached = PROMPT + NEW / 2
    token_bytes = 4 * config.num_key_value_heads * config.head_dim
    weights = sizes["N"] + config.vocab_size * config.hidden_size
    blocks = Work(2 * sizes["N"] * batch, 2 * sizes["N"])
    cache = Work(bytes=layers * token_bytes * cached * batch)
    logits = Work(2 * (weights - sizes["N"]) * batch,
                  2 * (weights - sizes["N"]) + 4 * batch * config.vocab_size)
    work = seconds([blocks, cache, logits])
    if launched:
        return max(work, LAUNCH * (25 * layers + 20)) + sampler(config, batch, fused).seconds()
    return work + sampler(config, batch, fused).bytes / BANDWIDTH


# --- the table ------------------------------------------------------------------------------------

def lines() -> list[str]:
    out = ["| training, tokens/s, all *modelled* | before | before, blocked | after | of 989 | "
           "after / before |",
           "|---|---|---|---|---|---|"]
    for name, gpus in (("0.5B", 1), ("1.5B", 1), ("7B", 8)):
        config = PRESETS[name]
        for T in (4096, 32768):
            for packed in (False, True):
                kinds = ("dense", "blocked", "flex") if packed else ("flex", "blocked", "flex")
                steps = []
                for number, kind in enumerate(kinds):
                    parts = training(config, T, packed, kind, number == 2, gpus)
                    steps.append(sum(parts.values()))
                useful = flops(count(config)["N"], TOKENS, config, 0) + 12 * TOKENS * (
                    config.num_hidden_layers * config.hidden_size * causal_pairs(T, packed) / T)
                share = useful / steps[2] / PEAK
                rates = " | ".join(f"*{TOKENS / step:,.0f}*" for step in steps)
                what = "packed" if packed else "plain"
                out.append(f"| {name}, T {T:,}, {what} | {rates} | *{share:.0%}* | "
                           f"*{steps[0] / steps[2]:.2f}* |")
    out += ["", "| rollouts, tokens/s, all *modelled* | from Python | without launches |",
            "|---|---|---|"]
    for name in ("0.5B", "1.5B", "7B"):
        for batch in (64, 512):
            launched = batch / decoding(PRESETS[name], batch, True)
            bound = batch / decoding(PRESETS[name], batch, False)
            out.append(f"| {name}, batch {batch} | *{launched:,.0f}* | *{bound:,.0f}* |")
    return out + [""] + possible()


def possible() -> list[str]:
    """What the head and the sampler take, and what they would take otherwise."""
    configs = [PRESETS[name] for name in ("0.5B", "1.5B", "7B")]
    out = ["| ms, all *modelled* | 0.5B | 1.5B | 7B |", "|---|---|---|---|"]

    def row(what, fn):
        values = " | ".join(f"*{1e3 * fn(config):.2f}*" for config in configs)
        out.append(f"| {what} | {values} |")
    row("head of 32,768 tokens: a product, then a sum",
        lambda config: seconds(head(config, TOKENS, sum_apart=True)))
    row("as it is: the product adds by itself", lambda config: seconds(head(config, TOKENS)))
    row("with bf16 logits", lambda config: seconds(head(config, TOKENS, 2, 26)))
    row("fused by `--compile`: maximum 4 bytes, exp and sum 8, cast 6",
        lambda config: seconds(head(config, TOKENS, 4, 18)))
    row("both", lambda config: seconds(head(config, TOKENS, 2, 14)))
    for batch in (64, 512):
        row(f"one token of {batch} rows, from Python",
            lambda config, batch=batch: decoding(config, batch, True))
        row("its sampler", lambda config, batch=batch: sampler(config, batch, False).seconds())
        row("its sampler, fused",
            lambda config, batch=batch: sampler(config, batch, True).seconds())
    return out


if __name__ == "__main__":
    print("\n".join(lines()))
