"""Keys and values that attention has computed already: a cache for sampling and one for training.

`model.hidden(ids, cache=cache)` continues a cache. Each attention layer calls `append`, the only
writer, with the length of the cache before this pass, and gets all keys and values so far.
"""
import torch


class KVCache:
    """Keys and values of the positions seen so far, allocated once for max_len positions.

    layers: one tensor (2, B, Hkv, max_len, D) per layer, keys first. pads (B,): how much *left*
    padding each row has, which nothing attends to; None if there is none."""

    def __init__(self, config, B: int, max_len: int, device, dtype, pads=None):
        shape = (2, B, config.num_key_value_heads, max_len, config.head_dim)
        self.layers = []
        # Not one tensor for all layers: lib.optim.keep_freed_memory keeps only blocks below 32 MB.
        for _ in range(config.num_hidden_layers):
            self.layers.append(torch.empty(shape, device=device, dtype=dtype))
        self.pads = none_if_zero(pads)
        self.length = 0

    def append(self, layer: int, start: int, k, v):
        """Store k, v (B, Hkv, T, D) of the positions from `start` on; return those of all positions
        (B, Hkv, S, D). The forward pass moves `length` after its last layer."""
        keys = self.layers[layer][0]
        values = self.layers[layer][1]
        end = start + k.shape[2]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows) -> None:
        """Keep (or repeat) these rows: finished answers leave, a prompt is shared by n answers."""
        for layer, kept in enumerate(self.layers):  # one by one: never all of them twice in memory
            self.layers[layer] = kept[:, rows]
        if self.pads is not None:
            self.pads = self.pads[rows]


class GrowingKVCache(KVCache):
    """A KVCache for training: a prompt is read once, `select` repeats it for its answers, and
    gradients flow back through both. It grows by concatenation, since autograd forbids writing
    into keys and values that a backward pass still needs. Gradient checkpointing runs a block again
    after its pass has ended: `append` then returns what it returned before, and stores nothing."""

    def __init__(self, pads=None):
        self.layers = []
        self.pads = none_if_zero(pads)
        self.length = 0

    def append(self, layer: int, start: int, k, v):
        both = torch.stack((k, v))
        if start > 0:
            past = self.layers[layer][:, :, :, :start]
            both = torch.cat((past, both), dim=3)
        if start == self.length:
            self.layers[layer:layer + 1] = [both]  # a first pass adds the layer
        return both.unbind()


def none_if_zero(pads):
    """Return None if no row has padding: attention without a mask is faster."""
    return pads if pads is not None and pads.any() else None
