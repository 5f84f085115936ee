"""Attention forward + backward: our fused kernel against PyTorch's.

8 query and 2 key/value heads of 64, one row of T tokens. "causal": one document, where the peer is
F.scaled_dot_product_attention(is_causal=True, enable_gqa=True); "packed": ten documents of equal
length, which it needs as a boolean mask. bf16: q, k and v are bf16. FLOPs: 4 T^2 D a head forward,
2.5 times that backward, half of it (a tenth of the half, packed) for what a mask hides. Memory: the
peak above the inputs; ours keeps freed memory, as the stages do. `first s` is the first call, in
wall time. Check: mean squares of output and gradients.
"""
import time

import harness
from harness import memory, timed

HQ, HKV, D, DOCUMENTS = 8, 2, 64, 10


def measure(case, attend):
    """attend(q, k, v, segment_ids) -> output."""
    import torch
    dtype, kind, T = case.split()
    T, packed = int(T), kind == "packed"
    torch.manual_seed(0)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    q, k, v, dout = (torch.randn(1, heads, T, D).to(kind) for heads in (HQ, HKV, HKV, HQ))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = (torch.arange(T) * DOCUMENTS // T)[None] if packed else None

    def step():
        out = attend(q, k, v, segment_ids=segments)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    before = memory(reset=True)
    out = timed(step, repeats=max(3, 8192 // T))
    flops = 3.5 * 4 * T * T * D * HQ / 2 / (DOCUMENTS if packed else 1)
    return out | {"work": T, "flops": flops, "dtype": dtype,
                  "check": [x.float().square().mean().item() for x in out["result"]],
                  "extra": {"first s": first, "MB": memory(peak=True) - before}}


def ours(case):
    harness.ours()
    import torch

    import kernels
    from lib import fast
    from lib.optim import keep_freed_memory
    keep_freed_memory()
    kernels.set_default_impl("fused")
    fast.set_cpu_matmul(int(case.split()[2]), 1024, torch.device("cpu"))
    return measure(case, kernels.attention)


def torch_sdpa(case):
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    mask = []

    def attend(q, k, v, segment_ids):
        if segment_ids is None:
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)
        if not mask:
            same = segment_ids[0][:, None] == segment_ids[0]
            mask.append(same & torch.ones_like(same).tril())
        return sdpa(q, k, v, attn_mask=mask[0], enable_gqa=True)
    return measure(case, attend)


SYSTEMS = {"ours": (ours, None), "torch SDPA": (torch_sdpa, None)}
CASES = {f"{dtype} {kind} {T}": list(SYSTEMS)
         for dtype in ("fp32", "bf16") for kind in ("causal", "packed") for T in (1024, 2048, 4096)}
TARGETS = {case: 1.0 if case.startswith("fp32 causal") else 1.3 for case in CASES}

if __name__ == "__main__":
    harness.main("Attention, forward + backward", "tokens", SYSTEMS, CASES,
                 targets=TARGETS)
