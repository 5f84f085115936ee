"""What issue 4 asks of one GPU, in less than ten minutes; not yet measured on one.

    python bench/gpu.py            # CUDA, bf16
    python bench/gpu.py --tiny     # the same lines at toy sizes on a CPU: shows that they run

Attention forward + backward against SDPA and FlexAttention, linear cross-entropy at 8 x 2048 x
151,936, MoE against dense, training of the 0.5B preset at T 4096 as a share of the measured matrix
product (MFU), rollout tokens a second at 0.5B against transformers generate where it is installed.
Wall seconds, medians of 5, one process.
"""
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import harness

harness.ours()
import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402

import kernels  # noqa: E402
import sample  # noqa: E402
from lib.optim import adamw, clip_and_step  # noqa: E402
from model import PRESETS, Qwen2  # noqa: E402
from pretrain import lm_loss  # noqa: E402

TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"


def seconds(fn, repeats=5):
    ticks = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        fn()
        if not TINY:
            torch.cuda.synchronize()
        ticks.append(time.perf_counter() - start)
    return statistics.median(ticks[1:])


def randn(*shape, grad=True):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_(grad)


def peak_mb():
    return float("nan") if TINY else torch.cuda.max_memory_allocated() / 1e6


def show(name, value, unit, more=""):
    print(f"{name:44}{value:12,.1f} {unit:10}{more}", flush=True)


def attention(T):
    q, k, v = (randn(1, heads, T, 64) for heads in (16, 4, 4))
    systems = {"ours sdpa": lambda: kernels.attention(q, k, v, impl="sdpa"),
               "ours fused": lambda: kernels.attention(q, k, v, impl="fused"),
               "torch SDPA": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)}
    if not TINY:  # FlexAttention has no backward pass on a CPU
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T)
        flex = torch.compile(flex_attention)
        systems["FlexAttention"] = lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)
    for name, fn in systems.items():
        t = seconds(lambda fn=fn: torch.autograd.grad(fn().sum(), (q, k, v)))
        show(f"attention T {T}, {name}", 1e3 * t, "ms")


def head(B, T, V, C):
    h, w = randn(B, T, C), randn(V, C)
    targets = torch.randint(V, (B, T), device=DEVICE)
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    t = seconds(lambda: torch.autograd.grad(kernels.linear_cross_entropy(h, w, targets), (h, w)))
    show(f"linear cross-entropy {B} x {T} x {V}", 1e3 * t, "ms", f"peak {peak_mb():,.0f} MB")


def train(name, config, B, T, gemm):
    """Tokens a second and the share of the measured matrix product; FLOPs as in training.py."""
    with torch.device(DEVICE):
        model = Qwen2(config)
    optimizer, ids = adamw(model, 1e-4, 0.1), torch.randint(config.vocab_size, (B, T + 1))
    ids = ids.to(DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = lm_loss(model, ids, None, B * T)
        loss.backward()
        clip_and_step(model, optimizer, 1e-4, 1.0)
    rate = B * T / seconds(step)
    flops = 6 * (model.count_parameters()["active"]
                 + config.num_hidden_layers * config.hidden_size * T)
    show(f"training {name}, B {B} T {T}", rate, "tokens/s", f"{rate * flops / gemm:.0%} of GEMM")
    return model


def rollouts(config, batch, prompt, new):
    """Random weights: no row stops. Both get the same directory."""
    prompts = torch.randint(config.vocab_size, (batch, prompt)).tolist()
    with tempfile.TemporaryDirectory() as path:
        Qwen2(config).save_pretrained(path)
        model = Qwen2.from_pretrained(path, torch.bfloat16, DEVICE)
        t = seconds(lambda: sample.generate(model, prompts, new), 1)
        show(f"rollouts, batch {batch}, ours", batch * new / t, "tokens/s")
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            return
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE)
        peer.generation_config.eos_token_id, ids = None, torch.tensor(prompts, device=DEVICE)
        t = seconds(lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                                          max_new_tokens=new, pad_token_id=0), 1)
        show(f"rollouts, batch {batch}, transformers", batch * new / t, "tokens/s")


def main():
    if not TINY and not torch.cuda.is_available():
        sys.exit("no GPU here; --tiny runs the same lines on a CPU")
    n = 256 if TINY else 8192
    a, b = randn(n, n, grad=False), randn(n, n, grad=False)
    gemm = 2 * n**3 / seconds(lambda: a @ b)
    show("matrix product, bf16", gemm / 1e12, "TFLOP/s")
    for T in (64,) if TINY else (1024, 4096, 16384):
        attention(T)
    head(*((2, 32, 512, 64) if TINY else (8, 2048, 151936, 896)))
    dense, sparse, T = PRESETS["tiny"], PRESETS["tiny-moe"], 32
    if not TINY:
        dense, T = PRESETS["0.5B"], 4096
        sparse = replace(dense, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1216,
                         shared_expert_intermediate_size=2432)  # 2 x 1216 + 2432 = 4864
    train("dense", dense, 2, T, gemm)
    train("MoE of equal active size", sparse, 2, T, gemm)
    for batch in (2,) if TINY else (64, 256, 512):
        rollouts(dense, batch, 16, 4 if TINY else 128)


if __name__ == "__main__":
    main()
