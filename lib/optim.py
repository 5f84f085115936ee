"""Device and dtype, randomness, schedule, optimizer, batches."""
import contextlib
import ctypes
import math
import os
from functools import lru_cache

import torch
import torch.nn.functional as F

from lib.args import InputError, require
from lib.dist import WORLD

# ---------------------------------------------------------------------------------------------
# device, randomness, optimizer, schedule

def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Choose by trying: a tiny forward and backward, not a table of capabilities (R0.2). bfloat16
    means autocast over float32 master weights: in pure bf16 an update of 1e-6 is rounded away
    (R4.6). CUDA is written for but not yet measured on a GPU."""
    require(device == "auto" or device.split(":")[0] in ("cpu", "cuda"),
            f"--device wants auto, cpu or cuda[:N], got {device!r}")
    names = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    require(dtype in names, f"--dtype wants one of {', '.join(names)}, got {dtype!r}")
    devices = [device] if device != "auto" else ["cuda"] * torch.cuda.is_available() + ["cpu"]
    for candidate in devices:
        for kind in [names[dtype]] if names[dtype] else [torch.bfloat16, torch.float32]:
            if dtype == "auto" and candidate == "cpu" and kind is torch.bfloat16:
                continue  # slower than float32 on processors without bf16 matrix units
            try:
                x = torch.ones(1, 1, 8, 16, device=candidate, dtype=kind, requires_grad=True)
                F.scaled_dot_product_attention(x @ x.mT @ x, x, x).sum().backward()
                return torch.device(candidate), kind
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
    raise InputError(f"--device {device} --dtype {dtype} does not work here: {reason}")


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system when they are freed, and every 4 KB of the next
    one is a page fault: 8 to 18% of a small training step. Let it keep blocks of up to 32 MB,
    1 GB in all. Any other C library goes on as it does. And oneDNN keeps what it prepared for the
    last 1,024 shapes of a product, half a GB where lengths are always new, as in GRPO: 256 do."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # read at its first product
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def setup(args, rows: int = 0) -> tuple[torch.device, torch.amp.autocast]:
    """Seed, pick the device, and return it with the autocast context that forwards run under.
    rows: of a step. Several processes compute in step, so each must have as many."""
    require(rows % WORLD == 0, f"a batch of {rows} rows does not divide by {WORLD} processes")
    torch.manual_seed(args.seed)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; no effect on a CPU
    device, dtype = pick_device(args.device, args.dtype)
    print(f"device {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, seed {args.seed}"
          + f", {WORLD} processes" * (WORLD > 1))
    return device, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def rng(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a pure function of its key, such as (seed, step)."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator(device).manual_seed(seed)


def lr_at(step: int, steps: int, peak: float, warmup: int, final: float) -> float:
    """Linear warm-up over `warmup` steps, at most half of all, so that a short run reaches its peak
    too; then cosine from `peak` to exactly `final * peak` at the last step. `final` 0.1 is both
    Qwen1's pre-training and Qwen2.5's SFT (7e-6 -> 7e-7)."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, betas=(0.9, 0.95)):
    """AdamW that decays matrices only: shrinking norms and biases has no regularising sense."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def epoch_order(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """The rows of one step: positions of an endless sequence of shuffled epochs, so that an epoch
    sees every row once, and the batch is a pure function of (seed, step)."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(shuffled(n, seed, p // n)[p % n]) for p in positions]


@lru_cache(2)  # not drawn anew for each step: a million rows take 20 ms
def shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=rng(seed, epoch))


def pad_rows(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Ragged rows -> (B, T) int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def clip_and_step(model, optimizer, lr: float, max_norm: float, loss: float = 0.0) -> float:
    """Clip the global gradient norm, step with `lr`, zero the gradients. Returns the norm before
    clipping. Where it or the step's loss is not finite, weights and optimizer stay as they are and
    what is returned is not finite either: `Run.log` counts such steps (R4.5)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item() + 0.0 * loss
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
