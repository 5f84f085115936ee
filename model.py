"""Qwen2.5, dense and mixture of experts, in one file (report section 2; Qwen2 report for the MoE).

A pre-norm decoder: RMSNorm, rotary positions (RoPE), grouped-query attention with a bias on Q, K
and V only, SwiGLU. In an MoE layer the SwiGLU is replaced by many thin ones ("fine-grained
experts"), of which a router picks the top k for each token, plus a shared one that always runs.

Modules and weights carry the names of the published checkpoints, so `from_pretrained` loads any
Qwen2.5 / Qwen2-MoE directory with strict keys and `save_pretrained` writes one that transformers
and vLLM read.

Letters used in shape comments, here and in every stage:
    B batch    T new positions    S positions seen (cache + new)    C hidden size    V vocabulary
    H query heads    K key/value heads    D head size    F inner size of an MLP
    E experts    N tokens (B*T flattened)    L layers
"""
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils import checkpoint as recomputation

from lib import checkpoint
import kernels
from lib.args import exit_on_input_error, require


@dataclass(frozen=True)
class Config:
    """Field names and meanings are those of the published config.json."""
    vocab_size: int = 151936           # rows of the embedding: the tokenizer's 151,665, padded
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0    # 10,000 before the long-context stage, which raises it
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    # mixture of experts; num_experts 0 is the dense model
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False       # False: the chosen probabilities sum to less than 1
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    # beyond the training length, at inference (report 3.3): one of the two, see `extended`
    original_max_position_embeddings: int = 0  # the training length; 0: max_position_embeddings
    yarn_factor: float = 1.0           # YaRN; 1: off
    chunk_size: int = 0                # dual chunk attention: the largest distance + 1; 0: off
    local_size: int = 0                # of it, the tokens before each chunk with exact distances

    def __post_init__(self):
        H, K, C = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        require(H % K == 0, f"{H} query heads cannot be shared by {K} key/value heads")
        require(C % H == 0 and C // H % 2 == 0,
                f"hidden size {C} over {H} heads must give an even head size (RoPE turns pairs)")
        require(self.num_experts_per_tok <= self.num_experts,
                f"{self.num_experts_per_tok} experts a token of only {self.num_experts}")
        require(0 <= self.local_size <= self.chunk_size // 2, f"local_size {self.local_size} wants "
                f"at most half of chunk_size {self.chunk_size}")
        require(self.yarn_factor >= 1, f"the YaRN factor must be >= 1, got {self.yarn_factor}")
        require(self.yarn_factor == 1 or not self.chunk_size, "YaRN and dual chunk attention both: "
                "take one (dual chunk attention comes with YaRN's temperature)")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def trained_length(self) -> int:
        return self.original_max_position_embeddings or self.max_position_embeddings

    def extended(self, yarn: float = 1.0, dca: bool = False) -> "Config":
        """The same weights for texts beyond the training length, which is taken from the
        checkpoint, never from the caller (R7.2): YaRN by a factor, or dual chunk attention for 4x,
        as in the report, with the DCA paper's typical quarter of exact distances."""
        if yarn == 1 and not dca:
            return self
        length = self.trained_length
        require(self.original_max_position_embeddings or length <= 32768, "config.json has "
                f"{length} positions, but not the length of training: add "
                "original_max_position_embeddings (32768 for Qwen2.5)")
        chunk = {}
        if dca and not self.chunk_size:  # else those of the checkpoint
            chunk = {"chunk_size": length, "local_size": length // 4}
        return replace(self, original_max_position_embeddings=length, yarn_factor=yarn, **chunk,
                       max_position_embeddings=int(length * (4 if dca else yarn)))

    def is_sparse(self, layer: int) -> bool:
        return (self.num_experts > 0 and layer not in self.mlp_only_layers
                and (layer + 1) % self.decoder_sparse_step == 0)


def _size(C, F, L, H, K, V=151936, tied=False, eps=1e-6, positions=131072):
    return Config(V, C, F, L, H, K, positions, eps, tie_word_embeddings=tied,
                  original_max_position_embeddings=32768 if positions > 32768 else 0)


def _moe(base: Config, experts, k, inner, shared):
    return replace(base, num_experts=experts, num_experts_per_tok=k, moe_intermediate_size=inner,
                   shared_expert_intermediate_size=shared)


_TINY = replace(_size(128, 384, 4, 4, 2, V=2048, tied=True, positions=1024), rope_theta=10_000.0)
_MICRO = replace(_size(64, 160, 2, 4, 2, V=512, tied=True, positions=512), rope_theta=10_000.0)

PRESETS = {  # report Table 1; eps 1e-5 is that of the larger *base* models
    "0.5B": _size(896, 4864, 24, 14, 2, tied=True, positions=32768),
    "1.5B": _size(1536, 8960, 28, 12, 2, tied=True),
    "3B": _size(2048, 11008, 36, 16, 2, tied=True, positions=32768),
    "7B": _size(3584, 18944, 28, 28, 4, V=152064),
    "14B": _size(5120, 13824, 48, 40, 8, V=152064, eps=1e-5),
    "32B": _size(5120, 27648, 64, 40, 8, V=152064, eps=1e-5),
    "72B": _size(8192, 29568, 80, 64, 8, V=152064, eps=1e-5),
    # the two published MoEs that Qwen2.5-Turbo/Plus (sizes not disclosed) follow
    "Qwen1.5-MoE-A2.7B": _moe(_size(2048, 5632, 24, 16, 16, positions=8192), 60, 4, 1408, 5632),
    "Qwen2-57B-A14B": _moe(_size(3584, 18944, 28, 28, 4), 64, 8, 2560, 20480),
    # ours, for a laptop: the demo's, its MoE of equal active size, and the tests'
    "tiny": _TINY,
    "tiny-moe": _moe(_TINY, 8, 2, 96, 192),
    "micro": _MICRO,
    "micro-moe": _moe(_MICRO, 8, 2, 40, 80),
}


# ---------------------------------------------------------------------------------------------
# parts

class RMSNorm(nn.Module):
    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)  # x / sqrt(mean(x^2) + eps) * weight


@functools.cache
def rope_frequencies(config: Config):
    """inv_freq (D/2,) float32 and the factor of cos and sin.

    Plain RoPE: theta^(-2i/D), factor 1. YaRN (Peng et al. 2023, sections 3.2-3.4): a pair that
    turns more than 32 times within the training length keeps its frequency, one that turns less
    than once is slowed down by the factor s (interpolated), between them a linear ramp; and
    m = 0.1 ln(s) + 1 on cos and sin, so m^2 on the logits, sharpens attention over more keys."""
    D, s = config.head_dim, config.yarn_factor
    # On the CPU by name: kept for all calls, it must not follow a `with torch.device("meta")`.
    i = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    inv = 1.0 / config.rope_theta ** (2 * i / D)
    if s == 1:
        return inv, 1.0

    def pair(turns):  # index of the pair that turns so often within the training length
        return (D * math.log(config.trained_length / (turns * 2 * math.pi))
                / (2 * math.log(config.rope_theta)))
    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), D - 1)
    ramp = ((i - low) / (high - low or 0.001)).clamp(0, 1)
    return inv / s * ramp + inv * (1 - ramp), 0.1 * math.log(s) + 1


def rope(positions, config: Config):
    """positions (B or 1, T) -> cos, sin of shape (B or 1, 1, T, D), float32.

    Computed from the positions in every forward, never stored: a buffer would follow
    `model.bfloat16()`, and bfloat16 turns position 15,962 into 15,936 (R3.5)."""
    inv, factor = rope_frequencies(config)
    angles = positions[..., None].float() * inv.to(positions.device)  # (B, T, D/2)
    angles = torch.cat((-angles, angles), dim=-1)[:, None]            # for `rotate`: -sin, sin
    return angles.cos() * factor, angles.sin() * factor


def dual_chunks(positions, config: Config):
    """Dual chunk attention: positions (B or 1, T) -> three rotations (cos, sin) of a query, towards
    keys of its own chunk, the previous one, all older ones.

    Chunks have s = chunk_size - local_size tokens, and a key is rotated by its position j mod s
    alone. A query i is rotated by i mod s for its own chunk (exact distances), by
    min(i mod s + s, c - 1) for the previous one (exact for the first local_size queries), by c - 1
    for older ones, c = chunk_size: no distance was not seen in training (paper, eq. 2-7; the code
    that serves Qwen2.5-1M caps at c instead of c - 1). Up to c tokens nothing changes.

    Temperature (Qwen2.5-1M, section on length extrapolation), in the rotations: m^2 on the logits
    with YaRN's m = 0.1 ln(length / training length) + 1 beyond the training length. Our choice: the
    length is each query's own, i + 1, so that cached and uncached passes agree."""
    s, cap = config.chunk_size - config.local_size, config.chunk_size - 1
    own = positions % s
    m = 0.1 * ((positions + 1) / config.trained_length).clamp(min=1).log() + 1
    heat = (m * m)[:, None, :, None]
    return [(cos * heat, sin * heat) for cos, sin in (
        rope(p, config) for p in (own, (own + s).clamp(max=cap), torch.full_like(own, cap)))]


def apply_rope(x, cos, sin):
    """x (B, heads, T, D). Halves are paired (i with i + D/2), not neighbours (2i with 2i + 1): the
    first becomes a cos - b sin, the second b cos + a sin. The minus is in `sin` already."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=True)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=True)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)
        self.head_dim = D

    def forward(self, x, cos, sin, cache=None, layer=0, segment_ids=None, mask=None, dual=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        k = apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)
        if dual is None:
            y = kernels.attention(
                apply_rope(q, cos, sin), k, v, causal=True, segment_ids=segment_ids, mask=mask
            )
        else:
            rotations, chunk, pads = dual
            q = [apply_rope(q, *rotation) for rotation in rotations]
            y = kernels.dual_chunk_attention(q, k, v, chunk, pads=pads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, C: int, F_: int):
        super().__init__()
        self.gate_proj = nn.Linear(C, F_, bias=False)
        self.up_proj = nn.Linear(C, F_, bias=False)
        self.down_proj = nn.Linear(F_, C, bias=False)

    def forward(self, x):
        return kernels.swiglu(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class Experts(nn.Module):
    """All routed experts as two stacked weights; on disk each expert has its own three."""

    def __init__(self, config: Config):
        super().__init__()
        E, C, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, C))  # gate rows first
        self.down_proj = nn.Parameter(torch.empty(E, C, F_))


class MoE(nn.Module):
    """y = sum over the top k of p_e FFN_e(x) + sigmoid(w_s x) FFN_shared(x), p = softmax(W_g x)."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.hidden_size
        self.config = config
        self.gate = nn.Linear(C, config.num_experts, bias=False)
        self.experts = Experts(config)
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(C, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(C, 1, bias=False)

    def forward(self, x, note=None):
        """note: is called with (probs, expert)."""
        config, shape = self.config, x.shape
        x = x.reshape(-1, shape[-1])                                     # (N, C)
        # softmax along columns: along rows as short as E, it took 10 times as long on a CPU
        probs = self.gate(x).mT.softmax(0, dtype=torch.float32).mT       # (N, E)
        weight, expert = probs.topk(config.num_experts_per_tok, dim=-1)  # (N, k)
        if config.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        if note is not None:
            note((probs, expert))
        out = kernels.experts(x, weight, self.experts.gate_up_proj, self.experts.down_proj, expert)
        if config.shared_expert_intermediate_size:
            out = out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return out.view(shape)


def load_balancing_loss(router: list, valid=None, all_reduce=lambda x: x):
    """The Switch/Qwen auxiliary loss E * sum_e f_e P_e, and each layer's load.

    router: one (probs (N, E), expert (N, k)) per MoE layer; valid: (N,) bool, False for padding.
    f_e counts e's assignments per token and sums to k, so perfect balance gives k (the scale that
    the published coefficient 0.001 goes with). Layers are averaged, not pooled: pooled, two layers
    that collapse on different experts would look balanced (R5.2).
    Returns (loss, load (layers, E) with 1 = fair share, entropy (layers,) of the router in nats:
    ln E when it does not care, 0 when it is sure)."""
    losses, loads, entropies = [], [], []
    for probs, expert in router:
        if valid is not None:
            probs, expert = probs[valid.flatten()], expert[valid.flatten()]
        E, k = probs.shape[-1], expert.shape[-1]
        # f of the micro-batches of all processes: the losses, averaged, are then that of their rows
        # together, as if one process had them.
        f = all_reduce(torch.bincount(expert.flatten(), minlength=E)) / all_reduce(len(probs))
        losses.append(E * (f * probs.mean(0)).sum())
        loads.append(f * E / k)
        entropies.append(torch.special.entr(probs.detach()).sum(-1).mean())
    return torch.stack(losses).mean(), torch.stack(loads), torch.stack(entropies)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config)
        sparse = config.is_sparse(layer)
        self.mlp = MoE(config) if sparse else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, note=None, **attention):
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        h = self.post_attention_layernorm(x)
        return x + (self.mlp(h, note) if isinstance(self.mlp, MoE) else self.mlp(h))


class KVCache:
    """Keys and values of the positions seen so far, (2, B, K, S, D) a layer, allocated once for
    `max_len`; a block a layer, to stay below the 32 MB of optim.keep_freed_memory. `pads` (B,)
    counts the padding at the *left* of each row, which nothing attends to."""

    def __init__(self, config: Config, B: int, max_len: int, device, dtype, pads=None):
        shape = (2, B, config.num_key_value_heads, max_len, config.head_dim)
        self.layers = [torch.empty(shape, device=device, dtype=dtype)
                       for _ in range(config.num_hidden_layers)]
        self.pads = pads if pads is not None and pads.any() else None
        self.length = 0

    def append(self, layer: int, k, v):
        kept, end = self.layers[layer], self.length + k.shape[2]
        kept[0, :, :, self.length:end], kept[1, :, :, self.length:end] = k, v
        return kept[0, :, :, :end], kept[1, :, :, :end]

    def select(self, rows) -> None:
        """Keep (or repeat) rows of the batch: finished responses leave, a prompt is shared by n."""
        filled = slice(0, self.length)  # what lies beyond is not worth copying
        for layer, old in enumerate(self.layers):
            self.layers[layer] = new = old.new_empty((2, len(rows), *old.shape[2:]))
            new[..., filled, :] = old[..., filled, :].index_select(1, rows)
        self.pads = None if self.pads is None else self.pads[rows]


class GrowingKVCache:
    """A KVCache for training: a prompt is read once, `select` repeats it for its responses, and
    gradients flow back through both. It grows by concatenation, since autograd does not allow
    writing into keys and values that a backward pass still needs."""

    def __init__(self, pads=None):
        self.layers, self.length = {}, 0
        self.pads = pads if pads is not None and pads.any() else None

    def append(self, layer: int, k, v):
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v

    def select(self, rows) -> None:
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        self.pads = None if self.pads is None else self.pads[rows]


# ---------------------------------------------------------------------------------------------
# the model

class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2(nn.Module):
    """model(ids) -> logits. `hidden` stops before the head: the stages' losses take hidden states
    and `head_weight` to kernels.linear_cross_entropy, which never builds the (B, T, V) logits."""

    architecture = "ForCausalLM"      # what config.json calls this kind of head
    on_disk: dict[str, str] = {}      # weights whose published name differs from ours
    gradient_checkpointing = False    # a block's activations again in the backward pass, not kept

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied model has no lm_head, here and on disk
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices Normal(0, 1/sqrt(fan in)), embeddings Normal(0, 0.02), biases 0, and 0 for the
        matrices that write to the residual stream, so that a block starts as the identity. Qwen's
        own initialiser is not disclosed; transformers draws everything at 0.02, which is 1/sqrt(fan
        in) at a width of 2,500, but leaves attention near uniform at 192 (LOG.md, first entry)."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "o_proj.weight", "down_proj.weight", "experts.down_proj")):
                p.zero_()
            elif "embed_tokens" in name or "lm_head" in name:
                p.normal_(0.0, self.config.initializer_range)
            elif p.ndim >= 2:
                p.normal_(0.0, p.shape[-1] ** -0.5)

    @property
    def head_weight(self):
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def hidden(self, ids, *, cache: KVCache | GrowingKVCache = None, segment_ids=None, router=None):
        """ids (B, T) int64 -> (B, T, C), normalised.

        cache: the T positions continue it. segment_ids (B, T): documents of a packed row, which
        do not see each other; positions restart in each. router: a list that receives each MoE
        layer's (probs, expert), for `load_balancing_loss`."""
        B, T = ids.shape
        device = ids.device
        kernels.set_cpu_matmul(B * T, self.config.hidden_size, device)
        start = cache.length if cache is not None else 0
        positions, mask = torch.arange(start, start + T, device=device)[None], None
        if cache is not None and cache.pads is not None:
            # Left padding: positions count from each row's first real token.
            mask = (torch.arange(start + T, device=device) >= cache.pads[:, None])[:, None, None]
            positions = (positions - cache.pads[:, None]).clamp(min=0)
        if segment_ids is not None:
            new = torch.ones_like(segment_ids, dtype=torch.bool)
            new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
            first = torch.where(new, positions, 0).cummax(dim=1).values  # of each one's document
            positions = positions - first
        chunk, dual = self.config.chunk_size - self.config.local_size, None
        if 0 < chunk < start + T:  # else all is one chunk, and this is plain attention
            require(segment_ids is None, "dual chunk attention is for inference, not packed rows")
            pads = cache.pads.tolist() if cache is not None and cache.pads is not None else None
            dual = dual_chunks(positions, self.config), chunk, pads
        note = router.append if router is not None else None  # FSDP hands on copies of lists
        cos, sin = rope(positions % chunk if dual else positions, self.config)
        x = kernels.embedding(self.model.embed_tokens.weight, ids)
        for layer, block in enumerate(self.model.layers):
            if self.gradient_checkpointing:
                block = functools.partial(recomputation.checkpoint, block, use_reentrant=False)
            x = block(x, note, cos=cos, sin=sin, cache=cache, layer=layer,
                      segment_ids=segment_ids, mask=mask, dual=dual)
        if cache is not None:
            cache.length = start + T
        return self.model.norm(x)

    def forward(self, ids, **kwargs):
        """ids (B, T) -> logits (B, T, V). Keyword arguments as in `hidden`."""
        return F.linear(self.hidden(ids, **kwargs), self.head_weight)

    def count_parameters(self) -> dict[str, int]:
        """total, non_embedding, and active: the weights that one token is multiplied by."""
        config = self.config
        total = sum(p.numel() for p in self.parameters())
        embedding = config.vocab_size * config.hidden_size * (2 - config.tie_word_embeddings)
        idle = sum(p.numel() for n, p in self.named_parameters() if ".experts." in n)
        if idle:
            idle -= idle * config.num_experts_per_tok // config.num_experts
        return {"total": total, "non_embedding": total - embedding, "active": total - idle}

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype=torch.float32, device="cpu") -> "Qwen2":
        """Any Qwen2 or Qwen2-MoE directory: config.json and safetensors, whole or sharded.
        Raises InputError for a directory that is no such model, or has missing or extra keys."""
        return checkpoint.load_model(cls, Config, path, dtype, device)

    def save_pretrained(self, path: str | Path) -> None:
        """The same kind of directory, each file written under a temporary name and renamed, the
        weights first."""
        checkpoint.save_model(self, path)


def describe(name: str) -> None:
    """Print what a preset, or the model of a directory, weighs and costs."""
    config = PRESETS[name] if name in PRESETS else checkpoint.read_config(name, Config)
    with torch.device("meta"):
        sizes = Qwen2(config).count_parameters()
    L, C, V, T = (config.num_hidden_layers, config.hidden_size, config.vocab_size,
                  config.trained_length)
    cache = 2 * L * config.num_key_value_heads * config.head_dim * 2  # keys and values; bytes
    # 2 a multiply-add; attention's scores and their use, over half of T keys on average
    inside = sizes["active"] - sizes["total"] + sizes["non_embedding"]
    forward = 2 * (inside + V * C) + 2 * L * C * T
    print(f"{name}: {config}\n"
          f"parameters  {sizes['total']:,}, {sizes['non_embedding']:,} without embeddings, "
          f"{sizes['active']:,} active\n"
          f"weights     {2 * sizes['total'] / 1e9:.3g} GB in bfloat16\n"
          f"training    {16 * sizes['total'] / 1e9:.3g} GB of float32 weights, gradients and two "
          f"moments of AdamW; and activations, see scaling.py plan\n"
          f"KV cache    {cache:,} bytes a token in bfloat16, {cache * T / 1e9:.3g} GB for {T:,}\n"
          f"forward     {forward / 1e9:.3g} GFLOP a token of {T:,}; training 3 times that")


def main(argv: list[str]) -> None:
    require(len(argv) == 2 and argv[0] == "describe",
            f"usage: python model.py describe {'|'.join(PRESETS)}|DIRECTORY")
    describe(argv[1])


if __name__ == "__main__":
    exit_on_input_error(main, sys.argv[1:])
