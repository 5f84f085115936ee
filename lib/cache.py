"""Keys and values that attention has computed already: a cache for sampling and one for training.

`model.hidden(ids, cache=cache)` continues a cache. Each attention layer calls `append`, the only
writer, and gets all keys and values so far.
"""
import torch


class KVCache:
    """Keys and values of the positions seen so far, allocated once for max_len positions.

    layers: one tensor (2, B, K, max_len, D) per layer, keys first. pads (B,): how much *left*
    padding each row has, which nothing attends to; None if there is none."""

    def __init__(self, config, B: int, max_len: int, device, dtype, pads=None):
        shape = (2, B, config.num_key_value_heads, max_len, config.head_dim)
        self.layers = []
        # Not one tensor for all layers: lib.optim.keep_freed_memory keeps only blocks below 32 MB.
        for _ in range(config.num_hidden_layers):
            self.layers.append(torch.empty(shape, device=device, dtype=dtype))
        self.pads = none_if_zero(pads)
        self.length = 0

    def append(self, layer: int, k, v):
        """Store k, v (B, K, T, D) of new positions; return those of all positions (B, K, S, D).
        The forward pass moves `length` after its last layer."""
        keys = self.layers[layer][0]
        values = self.layers[layer][1]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
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
    into keys and values that a backward pass still needs."""

    def __init__(self, pads=None):
        self.layers = []
        self.pads = none_if_zero(pads)
        self.length = 0

    def append(self, layer: int, k, v):
        new = torch.stack((k, v))
        if layer == len(self.layers):
            self.layers.append(new)
        else:
            self.layers[layer] = torch.cat((self.layers[layer], new), dim=3)
        return self.layers[layer].unbind()


def none_if_zero(pads):
    """Return None if no row has padding: attention without a mask is faster."""
    return pads if pads is not None and pads.any() else None
