"""Device and dtype, randomness, schedule, optimizer, batches."""
import contextlib
import ctypes
import math
import os
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from lib.args import InputError, require
from lib.dist import WORLD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------
# device

def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the first device and dtype on which a tiny forward and backward pass works.

    "auto" prefers a GPU, bfloat16 on it, and float32 on a CPU, where bfloat16 is slower without
    matrix units for it. bfloat16 means autocast over float32 master weights: in pure bfloat16 an
    update of 1e-6 is rounded away."""
    require(device == "auto" or device.split(":")[0] in ("cpu", "cuda"),
            f"--device must be auto, cpu or cuda[:N], got {device!r}")
    require(dtype == "auto" or dtype in DTYPES,
            f"--dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    for candidate in ["cuda", "cpu"] if device == "auto" else [device]:
        if dtype != "auto":
            kinds = [DTYPES[dtype]]
        elif candidate == "cpu":
            kinds = [torch.float32]
        else:
            kinds = [torch.bfloat16, torch.float32]
        for kind in kinds:
            try:
                x = torch.ones(1, 1, 8, 16, device=candidate, dtype=kind, requires_grad=True)
                F.scaled_dot_product_attention(x @ x.mT @ x, x, x).sum().backward()
                return torch.device(candidate), kind
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
    raise InputError(f"--device {device} --dtype {dtype} does not work here: {reason}")


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 32 MB, 1 GB in all, and limit oneDNN's cache.

    glibc returns large freed blocks to the OS, so the next allocation pays one page fault per 4 KB:
    8 to 18% of a small training step. oneDNN caches what it prepares for the last 1,024 shapes of a
    matrix product: half a GB when lengths always differ, as in GRPO."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # read at its first product
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def setup(args, rows: int = 0) -> tuple[torch.device, torch.amp.autocast]:
    """Seed torch and return the device, and the autocast context that forward passes run under.

    rows: the rows of a step. All processes must get equally many of them."""
    require(rows % WORLD == 0, f"a batch of {rows} rows does not divide by {WORLD} processes")
    torch.manual_seed(args.seed)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, and on CPUs that have it
    # CUDA: cuDNN's attention plans anew for every shape, and returned NaN gradients with a mask.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device, dtype = pick_device(args.device, args.dtype)
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    processes = f", {WORLD} processes" if WORLD > 1 else ""
    print(f"device {device}, {name}, {threads} threads, seed {args.seed}{processes}")
    return device, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------
# randomness, schedule, optimizer

def rng(*key: int, device="cpu") -> torch.Generator:
    """Return a generator that is a pure function of its key, such as (seed, step)."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator(device).manual_seed(seed)


def lr_at(step: int, steps: int, peak: float, warmup: int, final: float) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine from `peak` to exactly
    `final * peak` at the last step.

    The warm-up takes at most half of the steps, so that a short run reaches its peak too. A run of
    one step, or of two with a warm-up, ends at the peak. A `final`
    of 0.1 is used by Qwen1's pre-training and by Qwen2.5's SFT (7e-6 to 7e-7)."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    share = final + (1 - final) * cosine
    return peak * share


# {stage: {parameters: peak learning rate}}. Of a million and of 135 million parameters we
# measured them (recipes/real_135m.sh); pretrain's second follows the exponent of our own sweep
# (recipes/scaling.md). Of 7B, SFT's and DPO's are the report's (sections 4.1 and 4.2), reward's and
# GRPO's are DeepSeekMath's (section 4.2).
LEARNING_RATES = {
    "pretrain": {1.05e6: 1.5e-3, 7e9: 1.8e-4},
    "sft": {1.05e6: 5e-4, 1.35e8: 1e-4, 7e9: 7e-6},
    "dpo": {1.05e6: 2e-4, 1.35e8: 2e-5, 7e9: 7e-7},
    "reward": {1.05e6: 5e-4, 1.35e8: 5e-5, 7e9: 2e-5},
    "grpo": {1.05e6: 3e-4, 1.35e8: 2e-5, 7e9: 1e-6},
}


def default_lr(stage: str, model, factor: float = 1.0) -> float:
    """Return the peak learning rate that --lr 0 stands for, and print it: `factor` times a line in
    log-log through LEARNING_RATES, which is level outside of them."""
    known = LEARNING_RATES[stage]
    n_parameters = model.count_parameters()["total"]
    sizes = np.log(list(known))
    rates = np.log(list(known.values()))
    lr = factor * math.exp(np.interp(math.log(n_parameters), sizes, rates))
    points = ", ".join(f"{rate:.2g} at {size:.3g}" for size, rate in known.items())
    times = ""
    if factor != 1:
        times = f"{factor:.2g} x the rate "
    print(f"lr {lr:.2g}, {times}for {n_parameters:,} parameters (known: {points}); --lr sets "
          "another")
    return lr


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, betas=(0.9, 0.95)):
    """Return an AdamW that decays matrices only: shrinking norms and biases regularises nothing."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def clip_and_step(model, optimizer, lr: float, max_norm: float, loss: float = 0.0) -> float:
    """Clip the global gradient norm, step with `lr`, zero the gradients, and return the norm before
    clipping.

    If the norm or the step's loss is not finite, weights and optimizer stay as they are, and the
    returned norm is not finite either: `Run.log` counts such steps."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    norm += 0.0 * loss  # nan if the loss is nan or infinite
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def throughput(model, lengths: list[int], seconds: float, peak_tflops: float) -> dict:
    """Return the tokens per second of a step over rows of these lengths and, on a GPU, its mfu.

    mfu (model FLOPs utilisation) is the share of all GPUs' peak that goes into 6 N per token, head
    included, and 12 L C per token and position of its row for the scores (PaLM, appendix B)."""
    speed = {"tokens_per_s": sum(lengths) / seconds}
    if not model.head_weight.is_cuda:
        return speed
    config = model.config
    sizes = model.count_parameters()
    embeddings = sizes["total"] - sizes["non_embedding"]
    head = config.vocab_size * config.hidden_size
    per_token = 6 * (sizes["active"] - embeddings + head)
    per_score = 12 * config.num_hidden_layers * config.hidden_size
    flops = 0
    for length in lengths:
        flops += length * (per_token + per_score * length)
    peak = WORLD * peak_tflops * 1e12
    speed["mfu"] = flops / seconds / peak
    return speed


# ---------------------------------------------------------------------------------------------
# batches

def epoch_order(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """Return the row numbers of one step: a slice of an endless sequence of shuffled epochs.

    An epoch sees each of the n rows once, and the batch is a pure function of (seed, step)."""
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, n)
        rows.append(int(shuffled(n, seed, epoch)[index]))
    return rows


@lru_cache(2)  # not drawn anew for each step: shuffling a million rows takes 20 ms
def shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=rng(seed, epoch))


def pad_rows(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Return ragged rows as one (B, T) int64 tensor, padded on the right."""
    longest = max(len(row) for row in rows)
    padded = []
    for row in rows:
        padding = [pad_id] * (longest - len(row))
        padded.append(row + padding)
    return torch.tensor(padded)
