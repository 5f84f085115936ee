"""LoRA (Hu et al. 2021, arXiv 2106.09685): train W + (alpha / r) B A in place of W.

W (out, in) is frozen, A (r, in) and B (out, r) are trained in float32. B starts at zero, so the
first step sees the base model bit for bit. Gradients and Adam's moments exist for A and B only.

`add_lora` makes `weight` of each projection the sum above, by torch's parametrizations. Whatever
reads it, such as the fast decode step, sees merged weights and need not know of adapters. The
price: the sum takes memory while its block is computed, and the gradient of the whole weight is
computed before it is projected on A and B.

Adapted are all projections of a block (QLoRA, Dettmers et al. 2023, found that this matters most).
On an MoE these are the attention and the shared expert; router and routed experts stay frozen.
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

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def add_lora(model, rank: int, alpha: float, dtype=torch.float32) -> None:
    """Freeze the model in dtype, and give every projection an adapter of rank * (in + out) numbers.
    In bfloat16, as large models are published, the frozen weights take half of the memory."""
    require(rank > 0 and alpha > 0, f"--lora {rank} and --lora_alpha {alpha} must be above 0")
    model.requires_grad_(False).to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS):
            low_rank = LowRank(module.weight, rank, alpha)
            register_parametrization(module, "weight", low_rank, unsafe=True)


def adapters(model) -> dict[str, LowRank]:
    """Return {name of the projection: its adapter}; empty for a model without LoRA."""
    return {name.removesuffix(".parametrizations.weight.0"): module
            for name, module in model.named_modules() if isinstance(module, LowRank)}


@contextmanager
def base_model(model):
    """Switch the adapters off for a while, which gives the reference policy of GRPO's KL term."""
    for adapter in adapters(model).values():
        adapter.active = False
    yield
    for adapter in adapters(model).values():
        adapter.active = True


def merged_state_dict(model) -> dict[str, torch.Tensor]:
    """Return model.state_dict() as if every adapter had been added to its weight."""
    merged = {}
    for name, value in model.state_dict().items():
        projection, parametrized, part = name.partition(".parametrizations.weight.")
        if not parametrized:
            merged[name] = value
        elif part == "original":
            merged[f"{projection}.weight"] = model.get_submodule(projection).weight.detach()
    return merged


# --- PEFT's format --------------------------------------------------------------------------------

def save_adapter(model, path: Path, base: str) -> None:
    """Write the adapters of a model that started from the directory `base`; PEFT reads them."""
    weights = {}
    for name, adapter in adapters(model).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().cpu().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().cpu().contiguous()
    targets = list(PROJECTIONS)
    if model.config.num_experts:  # PEFT must not adapt the routed experts
        targets[4:] = [f"shared_expert.{name}" for name in PROJECTIONS[4:]]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": targets}
    with atomic_path(path / "adapter_model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_atomic(path / "adapter_config.json", json.dumps(config, indent=1) + "\n")


def adapter_base(path: str | Path) -> str | None:
    """Return the base model's directory if `path` holds an adapter and no model, else None."""
    config = Path(path) / "adapter_config.json"
    if not config.exists() or (Path(path) / "config.json").exists():
        return None
    return read_json(config).get("base_model_name_or_path") or ""


@torch.no_grad()
def merge_adapter(model, path: str | Path) -> None:
    """Add the adapter of a directory to the weights of its base model. InputError if it is more
    than plain LoRA, or does not fit the model."""
    config = read_json(Path(path) / "adapter_config.json")
    more = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
            "modules_to_save")
    plain = config.get("peft_type") == "LORA" and not any(config.get(name) for name in more)
    require(plain and config.get("bias", "none") == "none", f"{path}: adapter_config.json is of "
            "more than plain LoRA, which is all that can be merged")
    weights = load_file(Path(path) / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for name in [name for name in weights if name.endswith("lora_A.weight")]:
        projection = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = weights[name].float(), weights[name.replace("lora_A", "lora_B")].float()
        weight = getattr(modules.get(projection), "weight", None)
        require(weight is not None and weight.shape == (len(B), A.shape[1]),
                f"{path}: {name} does not fit the base model")
        weight += (config["lora_alpha"] / config["r"] * (B @ A)).to(weight)
