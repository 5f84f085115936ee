"""Qwen2.5 in one file (Qwen2.5 technical report, section 2; for the MoE, the Qwen2 report).

The model is a pre-norm decoder. Each block has grouped-query attention with rotary positions (RoPE)
and a bias on Q, K and V only, then a SwiGLU; RMSNorm comes before both. In a mixture-of-experts
(MoE) layer, many thin SwiGLUs ("fine-grained experts") replace the single one: a router picks the
top k experts for each token, and one shared expert always runs.

Modules and weights carry the names of the published checkpoints, except the stacked experts.
`from_pretrained` therefore loads any Qwen2.5 or Qwen2-MoE directory with strict keys, and
`save_pretrained` writes a directory that transformers and vLLM read.

Letters in shapes, as in kernels.py (which writes A for the k of experts); B|1 is B or 1:
    B batch    T new positions    S positions seen (cache + new)    C hidden size    V vocabulary
    Hq query heads    Hkv key/value heads    D head size    I inner size of an MLP or expert
    E experts    k experts per token    N tokens (B*T flattened)    L layers
"""
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import kernels
from lib import checkpoint, fast, long_context
from lib.args import require
from lib.cache import GrowingKVCache, KVCache
from lib.flex import document_starts


@dataclass(frozen=True)
class Config:
    """Sizes of a model. Field names and meanings are those of the published config.json."""
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
    norm_topk_prob: bool = False       # True: rescale the chosen probabilities to sum to 1
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    # beyond the training length (report section 3.3), see lib/long_context.py
    original_max_position_embeddings: int = 0  # the training length; 0: max_position_embeddings
    yarn_factor: float = 1.0           # YaRN; 1: off
    chunk_size: int = 0                # dual chunk attention: the largest distance + 1; 0: off
    local_size: int = 0                # at most half of chunk_size
    torch_dtype: str = ""              # dtype of the files, when it differs from that in memory

    def __post_init__(self):
        Hq = self.num_attention_heads
        Hkv = self.num_key_value_heads
        C = self.hidden_size
        require(Hq % Hkv == 0, f"{Hq} query heads cannot be shared by {Hkv} key/value heads")
        require(C % Hq == 0 and C // Hq % 2 == 0,
                f"hidden size {C} over {Hq} heads must give an even head size (RoPE turns pairs)")
        require(self.num_experts_per_tok <= self.num_experts,
                f"{self.num_experts_per_tok} experts per token, but only {self.num_experts} exist")
        require(0 <= self.local_size <= self.chunk_size // 2,
                f"local_size {self.local_size} must be 0 to half of chunk_size {self.chunk_size}")
        require(self.yarn_factor >= 1, f"the YaRN factor must be >= 1, got {self.yarn_factor}")
        require(self.yarn_factor == 1 or not self.chunk_size,
                "YaRN and dual chunk attention exclude each other: take one")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def trained_length(self) -> int:
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def chunk_length(self) -> int:
        """Tokens per chunk of dual chunk attention; 0: it is off."""
        return self.chunk_size - self.local_size

    def is_sparse(self, layer: int) -> bool:
        """Return whether this layer is a mixture of experts."""
        return (self.num_experts > 0 and layer not in self.mlp_only_layers
                and (layer + 1) % self.decoder_sparse_step == 0)


def _dense(C, inner, L, Hq, Hkv, V=151936, tied=False, eps=1e-6, positions=131072,
           theta=1_000_000.0) -> Config:
    return Config(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=inner,
        num_hidden_layers=L,
        num_attention_heads=Hq,
        num_key_value_heads=Hkv,
        max_position_embeddings=positions,
        original_max_position_embeddings=32768 if positions > 32768 else 0,
        rms_norm_eps=eps,
        rope_theta=theta,
        tie_word_embeddings=tied,
    )


def _moe(base: Config, experts, k, inner, shared) -> Config:
    return replace(base, num_experts=experts, num_experts_per_tok=k, moe_intermediate_size=inner,
                   shared_expert_intermediate_size=shared)


_TINY = _dense(128, 384, 4, 4, 2, V=2048, tied=True, positions=1024, theta=10_000.0)
_MICRO = _dense(64, 160, 2, 4, 2, V=512, tied=True, positions=512, theta=10_000.0)

PRESETS = {
    # Report, Table 1; eps 1e-5 is that of the larger *base* models.
    "0.5B": _dense(896, 4864, 24, 14, 2, tied=True, positions=32768),
    "1.5B": _dense(1536, 8960, 28, 12, 2, tied=True),
    "3B": _dense(2048, 11008, 36, 16, 2, tied=True, positions=32768),
    "7B": _dense(3584, 18944, 28, 28, 4, V=152064),
    "14B": _dense(5120, 13824, 48, 40, 8, V=152064, eps=1e-5),
    "32B": _dense(5120, 27648, 64, 40, 8, V=152064, eps=1e-5),
    "72B": _dense(8192, 29568, 80, 64, 8, V=152064, eps=1e-5),
    # Two published MoEs. Qwen2.5-Turbo and -Plus follow them; their own sizes are not disclosed.
    "Qwen1.5-MoE-A2.7B": _moe(_dense(2048, 5632, 24, 16, 16, positions=8192), 60, 4, 1408, 5632),
    "Qwen2-57B-A14B": _moe(_dense(3584, 18944, 28, 28, 4), 64, 8, 2560, 20480),
    # Ours, for a laptop: "tiny" for the demo, "micro" for the tests, and MoEs of equal active size.
    "tiny": _TINY,
    "tiny-moe": _moe(_TINY, 8, 2, 96, 192),
    "micro": _MICRO,
    "micro-moe": _moe(_MICRO, 8, 2, 40, 80),
}


# --- positions ------------------------------------------------------------------------------------

@functools.cache
def rope_frequencies(config: Config):
    """Return RoPE's frequencies, the angle theta^(-2i/D) that pair i turns per position, (D/2,)
    float32; and a factor for cos and sin, which is 1 without YaRN."""
    D = config.head_dim
    # The CPU is named because the result is cached: it must not follow `torch.device("meta")`.
    i = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    frequency = 1.0 / config.rope_theta ** (2 * i / D)
    if config.yarn_factor == 1:
        return frequency, 1.0
    return long_context.yarn(frequency, config)


def rope(positions, config: Config):
    """Return cos and signed sin, (B|1, 1, T, D) float32, of positions (B|1, T).

    Every forward pass computes them anew. As a buffer, the frequencies would follow
    `model.bfloat16()`, and three digits are far too few at position 15,962."""
    frequency, factor = rope_frequencies(config)
    angles = positions[..., None].float() * frequency.to(positions.device)  # (B, T, D/2)
    angles = torch.cat((-angles, angles), dim=-1)  # `apply_rope` needs -sin, then sin
    angles = angles[:, None]                       # the same for all heads
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x, cos, sin):
    """Rotate x (B, heads, T, D). A pair (a, b) is numbers i and i + D/2, not neighbours: a becomes
    a cos - b sin, and b becomes b cos + a sin. `sin` carries the minus already."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return x * cos.to(x.dtype) + swapped * sin.to(x.dtype)


def token_positions(start: int, end: int, pads, device):
    """Return the positions (B|1, T) of columns start .. end - 1. pads (B,): the number of padding
    columns on the left of each row; None: no padding. A row counts from its first real token, and
    its padding gets position 0."""
    columns = torch.arange(start, end, device=device)[None]
    if pads is None:
        return columns
    return (columns - pads[:, None]).clamp(min=0)


def padding_mask(pads, end: int):
    """Return (B, 1, 1, S) bool over the columns 0 .. end - 1: False on each row's left padding."""
    columns = torch.arange(end, device=pads.device)
    return (columns >= pads[:, None])[:, None, None]


# --- parts ----------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)  # x / sqrt(mean(x^2) + eps) * weight


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + causal mask) v; Hq / Hkv query heads share one key/value head."""

    def __init__(self, config: Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=True)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=True)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)
        self.head_dim = D

    def forward(self, x, cos, sin, append=None, dual=None, **masks):
        """x (B, T, C) -> (B, T, C). append(k, v) returns the cached keys and values with these;
        dual: DualChunks. masks: segment_ids, mask, block_mask, from `Qwen2.hidden`."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, Hq, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        k = apply_rope(k, cos, sin)
        if append is not None:
            k, v = append(k, v)                                           # (B, Hkv, S, D)
        if dual is None:
            q = apply_rope(q, cos, sin)
            y = kernels.attention(q, k, v, **masks)
        else:  # without masks: `hidden` refuses packed rows here, and dual.pads has the padding
            rotations = (dual.intra, dual.successive, dual.inter)
            queries = [apply_rope(q, q_cos, q_sin) for q_cos, q_sin in rotations]
            y = kernels.dual_chunk_attention(queries, k, v, dual.chunk, pads=dual.pads)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, C: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        return kernels.swiglu(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class Experts(nn.Module):
    """All routed experts as two stacked weights; on disk each expert has its own three matrices."""

    def __init__(self, config: Config):
        super().__init__()
        E = config.num_experts
        C = config.hidden_size
        inner = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, C))  # gate rows first
        self.down_proj = nn.Parameter(torch.empty(E, C, inner))


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

    def forward(self, x):
        """x (B, T, C) -> y (B, T, C), and the decisions: p (N, E) and the chosen experts (N, k)."""
        config, shape = self.config, x.shape
        x = x.reshape(-1, shape[-1])                                     # (N, C)
        scores = self.gate(x)                                            # (N, E)
        # On a CPU, softmax over the short last axis (E) is 10 times slower than over the first.
        probs = scores.mT.softmax(0, dtype=torch.float32).mT
        weight, expert = probs.topk(config.num_experts_per_tok, dim=-1)  # (N, k)
        if config.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        out = kernels.experts(x, weight, self.experts.gate_up_proj, self.experts.down_proj, expert)
        if config.shared_expert_intermediate_size:
            out = out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return out.view(shape), (probs, expert)


def load_balancing_loss(router: list, all_reduce=lambda x: x):
    """Return the Switch/Qwen auxiliary loss E * sum_e f_e P_e; the load (layers, E), where 1 is the
    fair share; and the router's entropy (layers,) in nats: ln E if it is uniform, 0 if certain.

    router: a list of decisions, one (probs (N, E), expert (N, k)) per MoE layer, of N tokens
    without padding. f_e counts e's assignments per token and sums to k; P_e is e's mean
    probability. Perfect balance gives k, the scale that the published coefficient 0.001 belongs to.
    The loss is computed per layer, then averaged. If layers were pooled, two that collapse on
    different experts would look balanced."""
    losses = []
    loads = []
    entropies = []
    for probs, expert in router:
        N, E = probs.shape
        k = expert.shape[-1]
        chosen = expert.flatten()
        # bincount would make the host wait for the GPU.
        assignments = chosen.new_zeros(E).index_add(0, chosen, torch.ones_like(chosen))
        total = all_reduce(N)
        f = all_reduce(assignments) / total
        # f and mean_N are of all processes, P is of this one: the mean of the processes' losses is
        # then the loss of the whole batch.
        mean_N = total / all_reduce(1)
        P = probs.sum(0) / mean_N
        losses.append(E * (f * P).sum())
        loads.append(f * E / k)
        entropies.append(torch.special.entr(probs.detach()).sum() / mean_N)
    return torch.stack(losses).mean(), torch.stack(loads), torch.stack(entropies)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config)
        if config.is_sparse(layer):
            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, **attention):  # attention: arguments of Attention.forward
        """x (B, T, C) -> x (B, T, C), and the decisions of an MoE or None."""
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, decisions = self.mlp(h)
            return x + y, decisions
        return x + self.mlp(h), None


# --- the model ------------------------------------------------------------------------------------

class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2(nn.Module):
    """model(ids) -> logits.

    `hidden` stops before the head. The losses of the stages pass hidden states and `head_weight` to
    kernels.linear_cross_entropy, which never builds the (B, T, V) logits."""

    architecture = "ForCausalLM"      # what config.json calls this kind of head
    on_disk: dict[str, str] = {}      # our name -> published name, where subclasses differ
    gradient_checkpointing = False    # recompute a block's activations in the backward pass

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied model has no lm_head, here and on disk
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from Normal(0, 1/sqrt(fan in)), embeddings and an untied head from
        Normal(0, 0.02). Biases start at 0, and so do the matrices that write to the residual
        stream: a new block is the identity. This is our choice: Qwen does not disclose its
        initialiser. transformers uses 0.02, which is 1/sqrt(fan in) at a width of 2,500. At small
        widths it would leave attention nearly uniform (docs/LOG.md, first entry)."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "o_proj.weight", "down_proj.weight", "experts.down_proj")):
                p.zero_()
            elif "embed_tokens" in name or "lm_head" in name:
                p.normal_(0.0, self.config.initializer_range)
            elif p.ndim >= 2:
                p.normal_(0.0, p.shape[-1] ** -0.5)

    @property
    def head_weight(self):
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def hidden(self, ids, *, cache: KVCache | GrowingKVCache = None, segment_ids=None, router=None,
               counted=slice(None)):
        """Return the normalised hidden states (B, T, C) of ids (B, T) int64.

        cache: the tokens before ids; ids are added to it. segment_ids (B, T): the documents of a
        packed row; they do not see each other, and positions restart in each. router: its `append`
        gets the decisions (probs, expert) of every MoE layer, for `load_balancing_loss`. counted
        selects the tokens among B*T that they are about: a bool mask that leaves padding out, or
        indices, which may repeat a token (`sample.read_prompts`)."""
        config = self.config
        fast.set_cpu_matmul(ids.numel(), config.hidden_size, ids.device)  # only for speed
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        pads = None if cache is None else cache.pads
        mask = None if pads is None else padding_mask(pads, end)
        positions = token_positions(start, end, pads, ids.device)
        block_mask = None
        if segment_ids is not None:
            positions = positions - document_starts(segment_ids)
            block_mask = kernels.packed_block_mask(segment_ids)
        dual = None
        if 0 < config.chunk_length < end:  # else all is one chunk, which is plain attention
            require(segment_ids is None, "dual chunk attention is for inference, not packed rows")
            dual = long_context.dual_chunk_plan(positions, config, rope, pads)
            positions = positions % config.chunk_length  # from here on those of the keys
        cos, sin = rope(positions, config)

        x = self.model.embed_tokens(ids)
        append = None
        for layer, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = functools.partial(recompute_in_backward, block, use_reentrant=False,
                                          context_fn=fast.keep_cpu_matmul)
            if cache is not None:  # `start` is fixed: recomputation comes after cache.length moves
                append = functools.partial(cache.append, layer, start)
            x, decisions = block(x, cos=cos, sin=sin, append=append, dual=dual,
                                 segment_ids=segment_ids, mask=mask, block_mask=block_mask)
            if router is not None and decisions is not None:
                probs, expert = decisions
                router.append((probs[counted], expert[counted]))
        if cache is not None:
            cache.length = end
        return self.model.norm(x)

    def forward(self, ids, **kwargs):
        """Return the logits (B, T, V) of ids (B, T). Keyword arguments as in `hidden`."""
        return F.linear(self.hidden(ids, **kwargs), self.head_weight)

    def count_parameters(self) -> dict[str, int]:
        """Return total, non_embedding (without embedding and head), active (without the experts
        that a token does not choose)."""
        total = 0
        embedding = 0
        idle = 0
        for name, p in self.named_parameters():
            total += p.numel()
            if "embed_tokens" in name or "lm_head" in name:
                embedding += p.numel()
            if ".experts." in name:
                unused = self.config.num_experts - self.config.num_experts_per_tok
                idle += p.numel() // self.config.num_experts * unused
        return {"total": total, "non_embedding": total - embedding, "active": total - idle}

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype=torch.float32, device="cpu") -> "Qwen2":
        """Load any Qwen2 or Qwen2-MoE directory: config.json and safetensors, whole or sharded.
        Raises InputError for another kind of model, and for missing or foreign weights."""
        return checkpoint.load_model(cls, Config, path, dtype, device)

    def save_pretrained(self, path: str | Path, dtype: str = "") -> None:
        """Write config.json and safetensors, weights first; a file is replaced only when complete.
        dtype: "float32", "bfloat16" or "float16"; empty: that of the weights in memory."""
        checkpoint.save_model(self, path, dtype)
