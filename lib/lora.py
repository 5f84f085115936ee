"""LoRA (Hu et al. 2021, arXiv 2106.09685): train W + (alpha / r) B A in place of W.

W (out, in) is frozen. A (r, in) and B (out, r) are trained, in float32. B starts at zero, so the
first step sees the frozen model. Gradients and Adam's moments are kept for A and B only.

Reading a projection's `weight` gives the sum above (a torch parametrization), so no other code need
know of adapters. The price: the sum is rounded to the dtype of W, so in bfloat16 a change far below
2^-9 |W| has no effect until it has grown; it is kept until the backward pass; and its whole
gradient is computed, so a step is not faster than full fine-tuning. All projections are adapted,
which matters most (QLoRA, Dettmers et al. 2023), but not an MoE's routed experts.
lib/checkpoint.py reads and writes adapters in PEFT's format.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import register_parametrization

from lib.args import require


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
        # Autocast would compute B A in bfloat16, but Run.save adds it to the weight in float32.
        with torch.autocast(weight.device.type, enabled=False):
            return (weight + self.alpha / self.rank * (self.B @ self.A)).to(weight.dtype)


def base_dtype(rank: int, autocast) -> torch.dtype:
    """Return the dtype to load a model in: autocast's if adapters will freeze it, which halves its
    memory in bfloat16, else float32, in which small updates are not rounded away."""
    return autocast.fast_dtype if rank else torch.float32


def add_lora(model, rank: int, alpha: float) -> None:
    """Freeze the model, and give each projection an adapter of rank * (in + out) parameters. Rank 0
    does nothing."""
    if rank == 0:
        return
    require(rank > 0 and alpha > 0, f"--lora {rank} and --lora_alpha {alpha} must be above 0")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
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
    for adapter in found:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.active = True


def merged_state_dict(model) -> dict[str, torch.Tensor]:
    """Return model.state_dict() as if every adapter had been added to its weight."""
    state = model.state_dict()
    merged = {name: value for name, value in state.items() if ".parametrizations." not in name}
    for name in adapters(model):
        merged[f"{name}.weight"] = model.get_submodule(name).weight.detach()
    return merged
