"""Measure on one GPU, in less than eight minutes, what bench/gpu_model.py models.

    python bench/gpu.py                      # CUDA, bf16; not yet measured on a GPU
    python bench/gpu.py --compile            # the training steps under torch.compile
    python bench/gpu.py --tiny               # the same lines at toy sizes on a CPU: they run

Each line is a measurement of its own: an exception is printed as its line, and once seven minutes
are over the remaining ones are left out. So that states and activations of 32,768 tokens fit in 80
GB, training has half of 1.5B's layers and four of 7B's; "of GEMM" is what to compare there. Times
are medians of CUDA events after two warm-up runs. Gradients of outputs are random, since that of a
sum has stride 0. So are the projections that a new model has at zero: otherwise attention would not
matter. "of GEMM" is the share of the measured matrix product, "of 989" that of an H100's peak in
bf16, whatever the card is.
"""
import contextlib
import gc
import io
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import harness

harness.ours()
import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import kernels  # noqa: E402
import sample  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from grpo import grpo_loss  # noqa: E402
from lib.optim import adamw, clip_and_step  # noqa: E402
from lib.plan import count, flops  # noqa: E402
from model import PRESETS, Qwen2  # noqa: E402
from pretrain import lm_loss  # noqa: E402

TINY = "--tiny" in sys.argv
COMPILE = "--compile" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
LIMIT = 420                          # seconds, after which no measurement starts
PEAK = 989e12                        # FLOP/s
TOKENS = 128 if TINY else 32_768     # per training step
LENGTHS = (32, 64) if TINY else (4096, 32_768)
DOCUMENT = 16 if TINY else 1024      # tokens per packed document
began = time.monotonic()
gemm = float("nan")                  # FLOP/s of a matrix product, measured first


def measure(name, fn, *args):
    """Print what fn(*args) returns, or why it gave nothing."""
    if time.monotonic() - began > LIMIT:
        print(f"{name:52} left out: {LIMIT} s are over", flush=True)
        return
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    try:
        result = fn(*args)
    except Exception as error:  # out of memory, a kernel that this card or this torch lacks
        first_line = (str(error).splitlines() or [""])[0][:100]
        result = f"FAILED: {type(error).__name__}: {first_line}"
    print(f"{name:52} {result}", flush=True)
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()


def seconds(fn, repeats=5):
    """Return the median seconds of fn() on the device."""
    ticks = []
    for _ in range(2 + repeats):
        if TINY:
            start = time.perf_counter()
            fn()
            ticks.append(time.perf_counter() - start)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        ticks.append(start.elapsed_time(end) / 1e3)
    return statistics.median(ticks[2:])


def shares(work, time_taken):
    """Text on a rate of FLOPs."""
    rate = work / time_taken
    return f"{rate / 1e12:8.2f} TFLOP/s, {rate / gemm:4.0%} of GEMM, {rate / PEAK:4.0%} of 989"


def peak():
    return "" if TINY else f", peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def documents(rows, T):
    """(rows, T): the document of each token."""
    return (torch.arange(T, device=DEVICE) // DOCUMENT).expand(rows, T).contiguous()


def new_model(config):
    """A model whose blocks all do something."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2 and not p.any():
                p.normal_(0.0, p.shape[-1] ** -0.5)
    return model


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


# --- kernels --------------------------------------------------------------------------------------

def matrix_product():
    global gemm
    n = 256 if TINY else 8192
    a, b = randn(n, n), randn(n, n)
    taken = seconds(lambda: a @ b)
    gemm = 2 * n**3 / taken
    return shares(2 * n**3, taken)


def attention(config, T, packed, impl):
    """Forward and backward, and the largest difference from the reference in fp32 at length 512."""
    heads, shared, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (randn(1, h, T, D).requires_grad_() for h in (heads, shared, shared))
    segment_ids = documents(1, T) if packed else None
    dout = torch.randn_like(q)

    def ours(q, k, v, segment_ids):
        return kernels.attention(q, k, v, segment_ids=segment_ids, impl=impl)

    def torchs(q, k, v, segment_ids):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    fn = torchs if impl == "torch" else ours
    short = [x.detach()[:, :, :512] for x in (q, k, v)]
    of_short = None if segment_ids is None else segment_ids[:, :512].contiguous()
    truth = kernels.attention_reference(*(x.float() for x in short), segment_ids=of_short)
    gap = (fn(*short, of_short).float() - truth).abs().max().item()
    taken = seconds(lambda: torch.autograd.grad(fn(q, k, v, segment_ids), (q, k, v), dout))
    pairs = T * (min(T, DOCUMENT if packed else T) + 1) / 2
    return f"{1e3 * taken:9.2f} ms, {shares(14 * pairs * heads * D, taken)}, gap {gap:.0e}{peak()}"


def head(rows, T, V, C):
    """Linear cross-entropy; its FLOPs are three products, whatever is computed again."""
    hidden = randn(rows, T, C).requires_grad_()
    weight = randn(V, C).mul_(C ** -0.5).requires_grad_()
    targets = torch.randint(V, (rows, T), device=DEVICE)

    def both():
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
        return torch.autograd.grad(loss, (hidden, weight))
    taken = seconds(both)
    return f"{1e3 * taken:9.2f} ms, {shares(6 * rows * T * V * C, taken)}{peak()}"


# --- steps ----------------------------------------------------------------------------------------

def training(config, T, packed, impl):
    """A micro-batch and an AdamW step. FLOPs: 6 N D, the head, and scores that are not masked."""
    model = new_model(config)
    optimizer = adamw(model, 1e-4, 0.1)
    rows = max(1, TOKENS // T)
    ids = torch.randint(config.vocab_size, (rows, T + 1), device=DEVICE)
    segment_ids = documents(rows, T + 1) if packed else None
    old = kernels.set_default_impl(impl, compile=COMPILE)
    if COMPILE and not TINY:
        for block in model.model.layers:
            block.compile()

    def step():
        router = [] if config.num_experts else None
        with autocast():
            loss = lm_loss(model, ids, segment_ids, rows * T, router)
        loss.backward()
        clip_and_step(model, optimizer, 1e-4, 1.0)
    try:
        taken = seconds(step, repeats=3)
    finally:
        kernels.set_default_impl(*old)
    seen = (min(T, DOCUMENT if packed else T) + 1) / 2
    scores = 12 * config.num_hidden_layers * config.hidden_size * seen
    work = flops(count(config)["N"], rows * T, config) + scores * rows * T
    return f"{rows * T / taken:9,.0f} tokens/s, {shares(work, taken)}{peak()}"


def packed_check(config, T):
    """Do packed rows give the same hidden states by every kernel, and does the mask matter?"""
    model = new_model(config)
    ids = torch.randint(config.vocab_size, (1, T), device=DEVICE)
    found = {}
    for impl in kernels.IMPLS[2:]:
        old = kernels.set_default_impl(impl)
        with torch.no_grad(), autocast():
            found[impl] = model.hidden(ids, segment_ids=documents(1, T)).float()
            plain = model.hidden(ids).float()
        kernels.set_default_impl(*old)
    truth = found["sdpa"]
    gaps = [f"{name} {(h - truth).abs().mean() / truth.abs().mean():.0e}"
            for name, h in found.items()]
    control = (plain - truth).abs().mean() / truth.abs().mean()
    return f"gap to sdpa: {', '.join(gaps)}; without the mask {control:.0e}"


def update(config, kind):
    """One DPO or GRPO update on rows of varying lengths, other ones in every repetition."""
    model = new_model(config)
    optimizer = adamw(model, 1e-6, 0.0)
    longest = 16 if TINY else 1024
    rows = 4 if TINY else 16
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(config.vocab_size, (length,), generator=generator).tolist()
    tokens = []

    def step():
        prompts = [draw(longest // 4, longest // 2) for _ in range(rows)]
        answers = [draw(longest // 4, longest) for _ in range(rows)]
        tokens.append(sum(map(len, prompts + answers)))
        with autocast():
            logprobs, mask = sample.completion_logprobs(model, prompts, answers)
        if kind == "DPO":
            chosen, rejected = logprobs.sum(-1).chunk(2)
            loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0].mean()
        else:
            advantages = torch.randn(rows, generator=generator).to(DEVICE)
            loss, _ = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask)
        loss.backward()
        clip_and_step(model, optimizer, 1e-6, 1.0)
    taken = seconds(step)
    mean_tokens = statistics.mean(tokens[2:])
    work = flops(count(config)["N"], mean_tokens, config)
    return f"{rows / taken:9.1f} rows/s, {shares(work, taken)}{peak()}"


# --- rollouts -------------------------------------------------------------------------------------

def rollouts(config, batch, who):
    """New tokens per second, from random weights: no row stops."""
    prompt_tokens, new = (8, 4) if TINY else (256, 256)
    torch.manual_seed(0)
    prompts = torch.randint(config.vocab_size, (batch, prompt_tokens)).tolist()
    model = new_model(config).to(torch.bfloat16)

    def generate():
        return sample.generate(model, prompts, new)
    if who == "transformers":
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as path, contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE)
        model.generation_config.eos_token_id = None
        ids = torch.tensor(prompts, device=DEVICE)

        def generate():
            return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                                  max_new_tokens=new, pad_token_id=0)
    generate()
    taken = seconds_once(generate)
    return f"{batch * new / taken:9,.0f} tokens/s{peak()}"


def seconds_once(fn):
    """Wall seconds of a function that itself waits for the GPU."""
    start = time.perf_counter()
    fn()
    if not TINY:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    if not TINY and not torch.cuda.is_available():
        sys.exit("no GPU here; --tiny runs the same lines on a CPU")
    card = "CPU, toy sizes" if TINY else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}{', compiled' if COMPILE else ''}")
    if TINY:
        small, sparse = PRESETS["tiny"], PRESETS["tiny-moe"]
        trained = rolled_out = {"tiny": small}
    else:
        small = PRESETS["0.5B"]
        sparse = replace(small, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1216,
                         shared_expert_intermediate_size=2432)  # 2 x 1216 + 2432 = 4864
        rolled_out = {name: PRESETS[name] for name in ("0.5B", "1.5B", "7B")}
        trained = {"0.5B": small,
                   "1.5B, 14 layers": replace(PRESETS["1.5B"], num_hidden_layers=14),
                   "7B, 4 layers": replace(PRESETS["7B"], num_hidden_layers=4)}
    impls = kernels.IMPLS[2:]         # all but auto and reference

    measure("matrix product, bf16", matrix_product)
    measure("packed rows, every kernel", packed_check, small, LENGTHS[0])
    for T in LENGTHS:
        for impl in (*impls, "torch"):
            if impl != "flex":        # which is for packed rows
                measure(f"attention T {T}, causal, {impl}", attention, small, T, False, impl)
        for impl in impls:
            measure(f"attention T {T}, document mask, {impl}", attention, small, T, True, impl)
    shape = (2, 32, 512, 64) if TINY else (8, 2048, 151_936, 896)
    measure(f"linear cross-entropy {shape[0]} x {shape[1]} x {shape[2]}", head, *shape)
    for T in LENGTHS:
        measure(f"training, T {T}, packed, dense mask", training, small, T, True, "sdpa")
    for name, config in trained.items():
        for T in LENGTHS:
            measure(f"training {name}, T {T}, plain", training, config, T, False, "auto")
            measure(f"training {name}, T {T}, packed", training, config, T, True, "auto")
    measure("training, MoE of equal active size", training, sparse, LENGTHS[0], False, "auto")
    for kind in ("DPO", "GRPO"):
        measure(f"{kind} update, rows of varying lengths", update, small, kind)
    for name, config in rolled_out.items():
        for batch in (2, 4) if TINY else (64, 512):
            measure(f"rollouts {name}, batch {batch}, ours", rollouts, config, batch, "ours")
            if name != "7B":          # 15 GB through the disk would take a minute
                measure(f"rollouts {name}, batch {batch}, transformers", rollouts, config, batch,
                        "transformers")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
