"""One decoding step, written out for speed: what `model.hidden` does with one new token per row.

Qwen2.hidden is the one to read, and the tests compare the two. The step is faster because
    q, k and v come from one matrix product, and so do gate and up;
    cos and sin of all positions are computed once per batch;
    on a CPU the weights are copies laid out by columns, which makes products of few rows up to 1.5
    times as fast. While a batch lasts, the weights therefore take twice the memory.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.fast import decode_attention, set_cpu_matmul
from model import Block, KVCache, MoE, Qwen2, apply_rope, padding_mask, rope


@dataclass
class Completion:
    ids: list[int]         # up to and including the first stop id
    logprobs: list[float]  # log-probability of each id under the distribution it was drawn from
    finished: bool         # False: cut at max_new_tokens


class JoinedBlock(NamedTuple):
    """A block and its weights as the step multiplies by them; an MoE block keeps its own MLP."""
    block: Block
    qkv: torch.Tensor              # ((H + 2 K) D, C)
    qkv_bias: torch.Tensor
    out: torch.Tensor              # (C, H D)
    gate_up: torch.Tensor | None   # (2 F, C); None: MoE
    down: torch.Tensor | None      # (C, F); None: MoE


class DecodeStep:
    """decode_step(token) -> hidden, for the rows of one KVCache. `head` gives the logits:
    F.linear(hidden, decode_step.head)."""

    def __init__(self, model: Qwen2, cache: KVCache):
        self.model = model
        self.cache = cache
        keys = cache.layers[0][0]  # (B, K, max_len, D)
        self.dtype = keys.dtype
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        cos, sin = rope(positions, model.config)
        self.cos = cos[0, 0].to(self.dtype)  # (max_len, D)
        self.sin = sin[0, 0].to(self.dtype)
        self.blocks = [self.join_block(block) for block in model.model.layers]
        self.head = self.join(model.head_weight)

    def join_block(self, block: Block) -> JoinedBlock:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv_weights = [projection.weight for projection in projections]
        gate_up = None
        down = None
        if not isinstance(mlp, MoE):
            gate_up = self.join(mlp.gate_proj.weight, mlp.up_proj.weight)
            down = self.join(mlp.down_proj.weight)
        return JoinedBlock(
            block,
            qkv=self.join(*qkv_weights),
            qkv_bias=torch.cat([projection.bias for projection in projections]).to(self.dtype),
            out=self.join(attention.o_proj.weight),
            gate_up=gate_up,
            down=down)

    def join(self, *weights):
        """Stack weights that are multiplied by the same input, in the dtype of the cache."""
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        weight = weight.to(self.dtype)
        if weight.device.type == "cpu":
            return weight.mT.contiguous().mT  # the same matrix, stored by columns
        return weight

    def __call__(self, token):
        """Return the normalised hidden state (B, C) after one more token (B,) int64 per row. The
        cache grows by one position."""
        config = self.model.config
        if config.chunk_size:  # dual chunk attention rotates queries in three ways: the plain pass
            return self.model.hidden(token[:, None], cache=self.cache)[:, -1]
        # Decoding repeats the same shapes, so that oneDNN pays off at smaller sizes.
        set_cpu_matmul(len(token), config.hidden_size, token.device, least=2**18)
        cos, sin, mask = self.rotation_and_mask()
        x = self.model.model.embed_tokens(token)
        for layer, joined in enumerate(self.blocks):
            x = x + self.attention(layer, joined, x, cos, sin, mask)
            x = x + self.mlp(joined, x)
        self.cache.length += 1
        return self.model.model.norm(x)

    def rotation_and_mask(self):
        """Return cos and sin for the new position, and the mask of the left padding."""
        now = self.cache.length
        pads = self.cache.pads
        if pads is None:
            return self.cos[now], self.sin[now], None
        positions = now - pads
        cos = self.cos[positions][:, None, None]  # (B, 1, 1, D)
        sin = self.sin[positions][:, None, None]
        return cos, sin, padding_mask(pads, now + 1)

    def attention(self, layer: int, joined: JoinedBlock, x, cos, sin, mask):
        H = self.model.config.num_attention_heads
        K = self.model.config.num_key_value_heads
        h = joined.block.input_layernorm(x).to(self.dtype)
        heads = F.linear(h, joined.qkv, joined.qkv_bias).view(len(x), H + 2 * K, 1, -1)
        qk, v = heads.split((H + K, K), dim=1)
        q, k = apply_rope(qk, cos, sin).split((H, K), dim=1)
        keys, values = self.cache.append(layer, k, v)
        y = decode_attention(q, keys, values, mask)  # (B, H, 1, D)
        return F.linear(y.flatten(1), joined.out)

    def mlp(self, joined: JoinedBlock, x):
        h = joined.block.post_attention_layernorm(x)
        if joined.gate_up is None:
            return joined.block.mlp(h)
        gate, up = F.linear(h.to(self.dtype), joined.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, joined.down)


def rows_to_keep(running, n_running: int):
    """Return which rows of the batch go on, or None where dropping the finished ones does not pay.

    Above 16 rows we keep a multiple of 16, filled up with finished rows, since each new shape costs
    oneDNN about 2 ms. Dropping rows copies the cache, so a fifth of them must go."""
    size = n_running
    if n_running > 16:
        size = 16 * math.ceil(n_running / 16)
    if size > 0.8 * len(running):
        return None
    return running.int().argsort(descending=True, stable=True)[:size]
