"""The balance loss of an MoE's routers, and what the log shows of them: the same in every stage."""
import torch
from tqdm import tqdm

from lib.dist import all_reduce_sum
from model import load_balancing_loss


class RouterStats:
    """Takes the decisions of every forward pass, as `router` of Qwen2.hidden, and sums it over the
    micro-batches of a step. A dense model has none: its balance loss is 0, and it logs nothing.

    It poses as a list, because FSDP would pass a copy of a list that holds tensors."""

    def __init__(self, config):
        self.coef = config.router_aux_loss_coef
        self.layers = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
        self.decisions = []     # of a micro-batch: (probs (N, E), expert (N, k)), layer by layer
        self.starved_steps = 0  # (MoE layers, experts): steps in a row below a tenth of fair load
        self.reset()

    def reset(self) -> None:
        self.aux = 0.0
        self.load = 0.0      # (MoE layers, experts), 1 is a fair share
        self.entropy = 0.0   # (MoE layers,) nats per token

    def append(self, decisions: tuple) -> None:
        self.decisions.append(decisions)

    def loss(self, share: float):
        """Return router_aux_loss_coef times the balance loss of a micro-batch that is a `share` of
        the step. If its prompts and its answers were two passes, they count as one."""
        if not self.decisions:
            return 0.0
        layers = []
        for layer in range(self.layers):
            probs, expert = zip(*self.decisions[layer::self.layers], strict=True)
            layers.append((torch.cat(probs), torch.cat(expert)))
        self.decisions.clear()
        aux, load, entropy = load_balancing_loss(layers, all_reduce=all_reduce_sum)
        aux = aux * share
        self.aux = self.aux + aux.detach()  # no item(): it would wait for a GPU
        self.load = self.load + load * share
        self.entropy = self.entropy + entropy * share
        return self.coef * aux

    def end_step(self, step: int) -> dict:
        """Return what the log shows of the step, warn of starved experts, and start anew."""
        if not torch.is_tensor(self.load):
            return {}
        load, entropy = all_reduce_sum(self.load), all_reduce_sum(self.entropy)
        starved = load < 0.1
        metrics = {"aux": float(all_reduce_sum(self.aux)), "dead_experts": int(starved.sum()),
                   "expert_max": rounded(load.amax(1)), "expert_min": rounded(load.amin(1)),
                   "router_entropy": rounded(entropy)}
        self.starved_steps = (self.starved_steps + 1) * starved
        for layer, expert in (self.starved_steps == 100).nonzero().tolist():
            tqdm.write(f"step {step}: expert {expert} of MoE layer {layer} got less than a tenth "
                       "of its fair share for 100 steps: lower --lr, or raise "
                       "router_aux_loss_coef in the config.json of --init")
        self.reset()
        return metrics


def rounded(per_layer) -> list[float]:
    return [round(value, 4) for value in per_layer.tolist()]
