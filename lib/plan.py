"""What a training run takes: parameters, FLOPs, memory per GPU and days.

`python scaling.py plan` prints these numbers. Everything here is arithmetic on a Config; nothing is
trained. tests/test_plan.py compares FLOPs with PyTorch's counter, activations with what autograd
saves, and memory with the measured peak of a process.
"""
import functools

import torch

from lib.laws import PUBLISHED, Law
from lib.lora import add_lora
from model import Config, Qwen2

HEAD_CHUNK = {"cuda": 2**27, "cpu": 2**21}  # numbers per buffer of the head's loss; it has three


@functools.cache
def count(config: Config) -> dict[str, int]:
    """Return Qwen2.count_parameters without making the parameters, and N: the parameters that a
    token meets, without embedding and head."""
    with torch.device("meta"):
        sizes = Qwen2(config).count_parameters()
    embedding_and_head = sizes["total"] - sizes["non_embedding"]
    return sizes | {"N": sizes["active"] - embedding_and_head}


def flops(N: float, D: float, config: Config = None, seq_len=0) -> float:
    """Return the training FLOPs of D tokens: 6 N D and, with a config, what 6 N D omits.

    It omits the head and attention's scores (counted whole, though half of them are masked). Both
    are small at 7B, and most of a micro model. DeepSeek's M D has 72 L C^2 for 6 N and no head.
    """
    per_token = 6 * N
    if config:
        C = config.hidden_size
        per_token += 6 * config.vocab_size * C
        per_token += 12 * config.num_hidden_layers * C * seq_len
    return per_token * D


# --- memory ---------------------------------------------------------------------------------------

def ffn_widths(config: Config, layer: int) -> tuple[int, int]:
    """Return how wide a block's dense part is, and all experts together that one token meets."""
    if config.is_sparse(layer):
        routed = config.num_experts_per_tok * config.moe_intermediate_size
        return config.shared_expert_intermediate_size, routed
    return config.intermediate_size, 0


def block_activations(config: Config, layer: int, item: int, cuda: bool) -> int:
    """Return the bytes per token that autograd keeps of one block of model.py.

    item: bytes per number in the products' dtype. The norms read float32. On CUDA all experts are
    one grouped product, which also keeps its gathered inputs and outputs.
    """
    C = config.hidden_size
    inner, routed = ffn_widths(config, layer)
    float32_numbers = 2 * C + config.num_attention_heads
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    # outputs of both norms, queries, attention's output; gate and up
    product_numbers = 4 * C + keys_and_values + 2 * (inner + routed)
    if routed:
        float32_numbers += config.num_experts
        product_numbers += C
        if cuda:
            product_numbers += 3 * config.num_experts_per_tok * C + 2 * routed
    return 4 * float32_numbers + item * product_numbers


def activations(config: Config, tokens: int, item: int, cuda: bool, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps of all blocks and the final norm, at the peak.

    With gradient checkpointing each block keeps its input, and one block is recomputed with the
    gradients of three inner activations, but not while the head's logits exist."""
    C = config.hidden_size
    kept = 8 * C                      # bytes per token: final norm, gradient of the hidden state
    recomputed = 0
    for layer in range(config.num_hidden_layers):
        block = block_activations(config, layer, item, cuda)
        if checkpointing:
            kept += 4 * C
            inner_gradients = 3 * item * sum(ffn_widths(config, layer))
            recomputed = max(recomputed, block + inner_gradients)
        else:
            kept += block
    return tokens * kept + max(0, tokens * recomputed - logits_buffers(cuda))


def logits_buffers(cuda: bool) -> int:
    return 3 * 4 * HEAD_CHUNK["cuda" if cuda else "cpu"]


def lora_parameters(config: Config, rank: int) -> int:
    """Return how many numbers adapters of this rank have."""
    with torch.device("meta"):
        model = Qwen2(config)
        add_lora(model, rank, 1.0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def memory(config: Config, gpus: int, rows: int, seq_len: int, bf16=True, cuda=True,
           checkpointing=False, lora=0) -> dict[str, float]:
    """Return the bytes per GPU at the peak of pretrain.py's step under full sharding (FSDP).

    The peak is where the forward pass of a micro-batch of `rows` ends and gradients of an earlier
    one exist. "gathered": on one GPU autocast's bf16 copies of all weights, except the last matrix
    of each MLP; on several GPUs one block at a time, twice, and its gradient. Not counted: CUDA's
    context, oneDNN's buffers, communication, fragmentation.

    lora: the rank of adapters, 0 for none. Then the base is frozen in bf16, and only the float32
    adapters have gradients and states. "gathered" has the sums W + B A of the blocks that keep
    their activations, and two float32 copies of the largest matrix while its sum is made."""
    sizes = count(config)
    C = config.hidden_size
    layers = config.num_hidden_layers
    item = 2 if bf16 else 4
    block = sizes["non_embedding"] // layers
    embedding_and_head = sizes["total"] - sizes["non_embedding"]
    head = config.vocab_size * C
    if lora:
        trained = lora_parameters(config, lora)
        weights = 2 * sizes["total"] + 4 * trained
        summed = block if checkpointing else block * layers
        gathered = item * summed + 8 * C * config.intermediate_size
        if gpus > 1:
            gathered += 2 * embedding_and_head + 2 * item * block
        head_gradient = 0
    else:
        trained = sizes["total"]
        weights = 4 * trained
        gathered = 0
        if gpus > 1:
            gathered = 4 * embedding_and_head + (2 * item + 4) * block
        elif bf16:
            inner = sum(ffn_widths(config, layer)[0] for layer in range(layers))
            gathered = 2 * (sizes["non_embedding"] + head - C * inner)
        head_gradient = 4 * head
    return {
        "weights": weights / gpus,
        "gradients": 4 * trained / gpus,
        "AdamW": 8 * trained / gpus,
        "activations": activations(config, rows * seq_len, item, cuda, checkpointing),
        "gathered": gathered,
        "head": head_gradient + logits_buffers(cuda),
    }


# --- what `scaling.py plan` prints ----------------------------------------------------------------

def plan_settings(N: float, D: float, laws: dict[str, Law]) -> dict:
    """Print and return learning rate, batch and loss with intervals, and where the run leaves the
    range that a law was fitted on.

    If `laws` lacks "lr", "batch" or "loss", the first published law stands in; its interval is then
    the range of the published laws, which is no confidence interval."""
    out = {"N": N, "D": D, "C": flops(N, D), "extrapolates": []}
    print(f"plan: N {N:.4g}, D {D:.4g} tokens, 6 N D = {out['C']:.3g} FLOPs")
    for name, published in PUBLISHED.items():
        others = {label: float(law.predict(**out)) for label, law in published.items()}
        said = ", ".join(f"{label} {value:.4g}" for label, value in others.items())
        if name in laws:
            law = laws[name]
            low, high = law.interval(**out)
        else:
            law = next(iter(published.values()))
            low = min(others.values())
            high = max(others.values())
            said = "the range of: " + said
        out[name] = float(law.predict(**out))
        out[name + "_interval"] = (low, high)
        print(f"  {name:<6}{out[name]:.4g}  [{low:.4g}, {high:.4g}]  {said}")
        for axis, (smallest, largest) in zip(law.axes, law.seen, strict=True):
            nearest = min(max(out[axis], smallest), largest)
            factor = out[axis] / nearest
            if factor != 1:
                far = f"{name} in {axis}, {factor:.3g} x the nearest fitted"
                out["extrapolates"].append(far)
    if out["extrapolates"]:
        print("  EXTRAPOLATES: " + "; ".join(out["extrapolates"]))
    else:
        print("  inside the fitted range")
    return out


def plan_machines(args, config: Config, D: float) -> dict:
    """Print and return memory and days of a preset in bf16, with every assumption. args: those of
    scaling.py."""
    seq_len = args.seq_len or 4096
    parts = memory(config, args.gpus, args.micro_batch, seq_len,
                   checkpointing=args.gradient_checkpointing, lora=args.lora)
    total = sum(parts.values()) / 1e9
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    print(f"  memory per GPU: {total:.1f} GB of {args.gpu_gb:g}: {listed}")
    base = "bf16 weights, float32 adapters" if args.lora else "float32 weights and states"
    print(f"    (FSDP over {args.gpus}, {base}, bf16 compute, "
          f"{args.micro_batch} x {seq_len} tokens; add 1-3 GB for CUDA)")
    if total > args.gpu_gb:
        print("    DOES NOT FIT: use more --gpus, a smaller --micro_batch or --seq_len, or "
              "--gradient_checkpointing")

    work = flops(count(config)["N"], D, config, seq_len)
    if args.gradient_checkpointing:  # one more forward pass, of the blocks only
        head = 6 * config.vocab_size * config.hidden_size * D
        blocks = work - head
        work += blocks / 3
    flops_per_second = args.gpus * args.peak_tflops * 1e12 * args.mfu
    days = work / flops_per_second / 86400
    print(f"  time: {work:.3g} FLOPs with head and attention = {days:.1f} days ({args.gpus} GPUs, "
          f"{args.peak_tflops:g} TFLOPS peak, MFU {args.mfu:g} assumed, no restarts)")
    return {"memory": parts, "training_flops": work, "days": days}
