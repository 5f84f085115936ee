"""One decoding step, written out for speed: what `model.hidden` does with one new token per row.

Qwen2.hidden is the one to read, and the tests compare the two. The step is faster because
    q, k and v come from one matrix product, and so do gate and up;
    cos and sin of all positions are computed once per batch;
    on a CPU the weights are copies laid out by columns, which makes products of few rows up to 1.5
    times as fast. While a batch lasts, the weights therefore take twice the memory.
A model with other modules than ours decodes by `model.hidden`. So does a model of more than
LARGE weights on a CPU, where the copies gain next to nothing (docs/LOG.md, 2026-11-30).
"""
import functools
import math
import re
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.func import functional_call

from lib.fast import matmul_fp32, set_cpu_matmul
from lib.lora import adapters
from model import Block, KVCache, Qwen2, apply_rope, padding_mask, rope

LARGE = 2**26


@dataclass
class Completion:
    ids: list[int]         # up to and including the first stop id
    logprobs: list[float]  # log-probability of each id under the distribution it was drawn from
    finished: bool         # False: cut at max_new_tokens


MLP_PARTS = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
OTHER_PARTS = {
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias",
    "self_attn.o_proj.weight"}


def parts(module) -> set[str]:
    """Return the names of a module's weights, and of its submodules without weights. A weight with
    a LoRA adapter counts as one: reading it gives the sum."""
    names = set()
    for name, _ in module.named_parameters():
        names.add(re.sub(r"\.parametrizations\.(\w+)\..*", r".\1", name))
    for name, submodule in module.named_modules():
        if not list(submodule.parameters()):
            names.add(name)
    return names


class DecodeBlock:
    """A block and its weights as the step multiplies by them. An MoE keeps its own module."""

    def __init__(self, block: Block, dtype):
        attention = block.self_attn
        mlp = block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.block = block
        self.qkv = join([projection.weight for projection in projections], dtype)
        self.qkv_bias = torch.cat([projection.bias for projection in projections]).to(dtype)
        self.out = join([attention.o_proj.weight], dtype)
        self.mlp = None
        if parts(mlp) == MLP_PARTS:
            self.gate_up = join([mlp.gate_proj.weight, mlp.up_proj.weight], dtype)
            self.down = join([mlp.down_proj.weight], dtype)
        else:
            self.mlp = mlp
            if attention.q_proj.weight.dtype != dtype:
                # Autocast would cast all experts again for every token.
                cast = {name: p.to(dtype) for name, p in mlp.named_parameters()}
                self.mlp = functools.partial(functional_call, mlp, cast)


def join(weights, dtype):
    """Stack weights that are multiplied by the same input."""
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # no copy of the head
    weight = weight.to(dtype)
    if weight.device.type == "cpu":
        return weight.mT.contiguous().mT  # the same matrix, stored by columns
    return weight


def is_large_on_cpu(model: Qwen2, dtype) -> bool:
    """Return whether decoding from the model's own weights is as fast as from copies. It is not if
    every token would cast them or add up their adapters."""
    weight = model.head_weight
    size = sum(p.numel() for p in model.parameters())
    return (weight.device.type == "cpu" and size > LARGE and weight.dtype == dtype
            and not adapters(model))


class DecodeStep:
    """decode_step(token) -> hidden, for the rows of one KVCache; logits(hidden) -> logits."""

    def __init__(self, model: Qwen2, cache: KVCache):
        self.model = model
        self.cache = cache
        keys = cache.layers[0][0]  # (B, Hkv, max_len, D)
        self.dtype = keys.dtype
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        cos, sin = rope(positions, model.config)
        self.cos = cos[0, 0].to(self.dtype)  # (max_len, D)
        self.sin = sin[0, 0].to(self.dtype)
        # A CPU rounds the products of bf16 to bf16.
        head_dtype = self.dtype if keys.is_cuda else torch.float32
        needs_no_copy = is_large_on_cpu(model, self.dtype)
        if needs_no_copy:
            self.head = model.head_weight.to(head_dtype)
        else:
            self.head = join([model.head_weight], head_dtype)
        unknown = set()  # what a block has or lacks outside its MLP
        for block in model.model.layers:
            outside = {name for name in parts(block) if not name.startswith("mlp.")}
            unknown |= outside ^ OTHER_PARTS
        if unknown:
            names = ", ".join(sorted(unknown))
            warnings.warn(f"decoding is slower: lib/decode.py does not expect {names}",
                          stacklevel=2)
        # Dual chunk attention rotates queries in three ways, which the step does not do either.
        self.is_plain = bool(unknown or model.config.chunk_size or needs_no_copy)
        self.blocks = []
        if not self.is_plain:
            self.blocks = [DecodeBlock(block, self.dtype) for block in model.model.layers]

    def logits(self, hidden):
        """Return the logits (B, V) of hidden (B, C) in fp32, as kernels.token_logprobs has them."""
        with torch.autocast(hidden.device.type, enabled=False):
            return matmul_fp32(hidden.to(self.head.dtype), self.head.mT)

    def __call__(self, token):
        """Return the normalised hidden state (B, C) after one more token (B,) int64 per row. The
        cache grows by one position."""
        config = self.model.config
        if self.is_plain:
            return self.model.hidden(token[:, None], cache=self.cache)[:, -1]
        # Decoding repeats the same shapes, so that oneDNN pays off at smaller sizes.
        set_cpu_matmul(len(token), config.hidden_size, token.device, least=2**18)
        cos, sin, mask = self.rotation_and_mask()
        x = self.model.model.embed_tokens(token)
        for layer, weights in enumerate(self.blocks):
            x = x + self.attention(layer, weights, x, cos, sin, mask)
            x = x + self.mlp(weights, x)
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

    def attention(self, layer: int, weights: DecodeBlock, x, cos, sin, mask):
        Hq = self.model.config.num_attention_heads
        Hkv = self.model.config.num_key_value_heads
        h = weights.block.input_layernorm(x).to(self.dtype)
        heads = F.linear(h, weights.qkv, weights.qkv_bias).view(len(x), Hq + 2 * Hkv, 1, -1)
        qk, v = heads.split((Hq + Hkv, Hkv), dim=1)
        q, k = apply_rope(qk, cos, sin).split((Hq, Hkv), dim=1)
        keys, values = self.cache.append(layer, self.cache.length, k, v)
        y = decode_attention(q, keys, values, mask)  # (B, Hq, 1, D)
        return F.linear(y.flatten(1), weights.out)

    def mlp(self, weights: DecodeBlock, x):
        h = weights.block.post_attention_layernorm(x)
        if weights.mlp is not None:
            out = weights.mlp(h)
            return out[0] if isinstance(out, tuple) else out  # an MoE also returns its decisions
        gate, up = F.linear(h.to(self.dtype), weights.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weights.down)


def decode_attention(q, k, v, mask=None):
    """Return kernels.attention of one query per row. mask (B,1,1,S) bool leaves each row a key.

    The G query heads of a group pose as G queries of one kv head, so that no backend copies the
    cache. On a CPU with S from 256 to 2048, this is 1.4 times as fast as enable_gqa and 5 to 8
    times as fast as repeat_interleave.
    """
    precision = torch.get_float32_matmul_precision()
    set_cpu_matmul(1, 1, q.device)  # MKL, because oneDNN would cost 10 us per row and kv head
    grouped = q.reshape(len(q), k.shape[1], -1, k.shape[-1])  # (B, Hkv, G, D)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    torch.set_float32_matmul_precision(precision)
    return out.reshape(q.shape)  # the strides of CUDA's kernels do not allow a view


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
