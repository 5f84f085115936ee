"""Upcycling: from a dense model to a mixture of experts (pretrain.py --upcycle)."""
import math
from dataclasses import replace

import torch

from lib.optim import rng
from model import Config, Qwen2

MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
              "shared_expert_intermediate_size", "router_aux_loss_coef", "decoder_sparse_step",
              "mlp_only_layers")


@torch.no_grad()
def upcycle(dense: Qwen2, preset: Config, seed: int, fresh: float = 0.5) -> Qwen2:
    """Turn a dense model into an MoE with the experts of `preset` (Qwen2 report, section 2.2.2).

    Each FFN is copied until it has enough inner units. The units of each copy are shuffled, experts
    are cut from the row of copies, and the rest is dropped. Then a random half of every expert's
    weights is drawn anew, so that experts differ. All other weights stay.

    The report does not disclose the rest. Our choice keeps the loss near the dense model's
    (docs/LOG.md, "upcycling"): new weights have the scale initializer_range; the shared expert is
    cut in the same way but keeps its weights; the router starts near uniform. Each expert's output
    is divided by the routing weight that it will get (1/E, or 1/k if normalised, and 1/2 from the
    shared gate) and multiplied by dense size / active size, so that the sum of the active experts
    estimates the dense FFN."""
    config = replace(dense.config, **{name: getattr(preset, name) for name in MOE_FIELDS})
    experts = config.num_experts
    top_k = config.num_experts_per_tok
    inner = config.moe_intermediate_size
    shared = config.shared_expert_intermediate_size
    size_ratio = config.intermediate_size / (top_k * inner + shared)
    routing = top_k if config.norm_topk_prob else experts  # 1 / (the weight an expert will get)
    generator = rng(seed, 11)
    model = Qwen2(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer in range(config.num_hidden_layers):
        if not config.is_sparse(layer):
            continue
        moe, mlp = model.model.layers[layer].mlp, dense.model.layers[layer].mlp
        units = shuffled_units(config.intermediate_size, experts * inner, generator)
        units = units.view(experts, inner)
        gate_up = torch.cat((mlp.gate_proj.weight[units], mlp.up_proj.weight[units]), dim=1)
        moe.experts.gate_up_proj.copy_(gate_up)
        down = mlp.down_proj.weight[:, units].transpose(0, 1)
        moe.experts.down_proj.copy_(down * size_ratio * routing)
        for weight in moe.experts.parameters():
            new = torch.randn(weight.shape, generator=generator) * config.initializer_range
            replaced = torch.rand(weight.shape, generator=generator) < fresh
            weight.copy_(torch.where(replaced, new, weight))
        moe.gate.weight.normal_(0.0, config.initializer_range, generator=generator)
        if shared:
            units = shuffled_units(config.intermediate_size, shared, generator)
            moe.shared_expert.gate_proj.weight.copy_(mlp.gate_proj.weight[units])
            moe.shared_expert.up_proj.weight.copy_(mlp.up_proj.weight[units])
            down = mlp.down_proj.weight[:, units]
            moe.shared_expert.down_proj.weight.copy_(down * size_ratio * 2)
            moe.shared_expert_gate.weight.zero_()
    return model


def shuffled_units(size: int, wanted: int, generator):
    """Return `wanted` indices of inner units: shuffled copies of 0 .. size-1, one after another."""
    copies = []
    for _ in range(math.ceil(wanted / size)):
        copies.append(torch.randperm(size, generator=generator))
    return torch.cat(copies)[:wanted]
