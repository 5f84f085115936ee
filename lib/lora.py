"""LoRA (Hu et al. 2021, arXiv 2106.09685): train W + (alpha / r) B A in place of W.

W (out, in) is frozen. A (r, in) and B (out, r) are trained, in float32. B starts at zero, so the
first step sees the frozen model. Gradients and Adam's moments are kept for A and B only.

`add_lora` registers a torch parametrization: reading a projection's `weight` then gives the sum
above. Code that reads it, such as the fast decode step, need not know of adapters. This has three
prices. The sum is rounded to the dtype of W. Without gradient checkpointing, the sums of all blocks
stay in memory until the backward pass. And the gradient of each sum is computed in full, before the
gradients of A and B follow from it, so a step is not faster than full fine-tuning.

All projections of a block are adapted, which matters most according to QLoRA (Dettmers et al.
2023). On an MoE, router and routed experts stay frozen: model.py stacks them, outside nn.Linear.
"""
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrize import register_parametrization

from lib.args import require
from lib.files import atomic_path, read_json, write_atomic

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """weight -> weight + (alpha / rank) B A, in the dtype of the weight, unless switched off."""

    def __init__(self, weight, rank: int, alpha: float):
        super().__init__()
        n_out, n_in = weight.shape
        bound = n_in ** -0.5  # PEFT's initialisation
        self.A = nn.Parameter(torch.empty(rank, n_in, device=weight.device).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(n_out, rank, device=weight.device))
        self.rank = rank
        self.alpha = alpha
        self.active = True

    def forward(self, weight):
        if not self.active:
            return weight
        return (weight + self.alpha / self.rank * (self.B @ self.A)).to(weight.dtype)


def base_dtype(rank: int, autocast) -> torch.dtype:
    """Return the dtype to load a model in: autocast's if adapters will freeze it, which halves its
    memory in bfloat16, else float32, in which small updates are not rounded away."""
    return autocast.fast_dtype if rank else torch.float32


def add_lora(model, rank: int, alpha: float) -> None:
    """Freeze the model, and give every projection an adapter of rank * (in + out) parameters. Rank
    0 does nothing."""
    if rank == 0:
        return
    require(rank > 0 and alpha > 0, f"--lora {rank} and --lora_alpha {alpha} must be above 0")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ATTENTION + FEED_FORWARD):
            low_rank = LowRank(module.weight, rank, alpha)
            register_parametrization(module, "weight", low_rank, unsafe=True)


def adapters(model) -> dict[str, LowRank]:
    """Return {name of the projection: its adapter}; empty for a model without LoRA."""
    return {name.removesuffix(".parametrizations.weight.0"): module
            for name, module in model.named_modules() if isinstance(module, LowRank)}


@contextmanager
def adapters_off(model):
    """Inside the with block the model is the frozen one: the reference policy of GRPO's KL term."""
    found = adapters(model).values()
    try:
        for adapter in found:
            adapter.active = False
        yield
    finally:
        for adapter in found:
            adapter.active = True


def merged_state_dict(model) -> dict[str, torch.Tensor]:
    """Return model.state_dict() as if every adapter had been added to its weight."""
    merged = {}
    for name, value in model.state_dict().items():
        projection, is_adapted, part = name.partition(".parametrizations.weight.")
        if not is_adapted:
            merged[name] = value
        elif part == "original":  # the others are A and B
            merged[f"{projection}.weight"] = model.get_submodule(projection).weight.detach()
    return merged


# --- PEFT's format --------------------------------------------------------------------------------

def save_adapter(model, path: Path, base: str) -> None:
    """Write the adapters of a model that started from the directory `base`; PEFT reads them."""
    weights = {}
    for name, adapter in adapters(model).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().cpu().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().cpu().contiguous()
    targets = list(ATTENTION)
    for part in ("mlp", "shared_expert"):  # and not the routed experts of an MoE
        targets += [f"{part}.{name}" for name in FEED_FORWARD]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": targets}
    with atomic_path(path / "adapter_model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_atomic(path / "adapter_config.json", json.dumps(config, indent=1) + "\n")


def adapter_base(path: str | Path) -> str | None:
    """Return the base model's directory if `path` holds an adapter and no model, else None. The
    directory is "" if the adapter does not name it."""
    file = Path(path) / "adapter_config.json"
    if not file.exists() or (Path(path) / "config.json").exists():
        return None
    return read_json(file).get("base_model_name_or_path") or ""


@torch.no_grad()
def merge_adapter(model, path: str | Path) -> None:
    """Add the adapter of a directory to the weights of its base model. Raises InputError for other
    kinds of adapters, and for one that does not fit the model."""
    config = read_json(Path(path) / "adapter_config.json")
    unsupported = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
                   "modules_to_save", "lora_bias")
    plain = config.get("peft_type") == "LORA" and not any(config.get(name) for name in unsupported)
    require(plain and config.get("bias", "none") == "none",
            f"{path}: only plain LoRA of weights can be merged, see adapter_config.json")
    weights = load_file(Path(path) / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    while weights:
        name = min(weights)
        projection = name.removeprefix("base_model.model.").partition(".lora_")[0]
        A = weights.pop(f"base_model.model.{projection}.lora_A.weight", None)
        B = weights.pop(f"base_model.model.{projection}.lora_B.weight", None)
        fits = A is not None and B is not None and projection in modules
        require(fits and modules[projection].weight.shape == (len(B), A.shape[1])
                and len(A) == B.shape[1], f"{path}: {name} does not fit the base model")
        delta = config["lora_alpha"] / config["r"] * (B.float() @ A.float())
        modules[projection].weight.add_(delta)
