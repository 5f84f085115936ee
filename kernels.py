"""The tensor functions that decide speed and memory, each beside its plain reference twin.

    attention             softmax(q k^T) v without keeping the T x S probabilities
    dual_chunk_attention  the same beyond the training length, with capped distances
    linear_cross_entropy  head + loss without the N x V logits (8 x 2048 x 151,936 fp32 = 9.3 GiB)
    token_logprobs        log p(target), the same machinery: for DPO, GRPO and evaluation
    rms_norm, swiglu      a block's other functions, with less kept for the gradient
    experts               each token through the few experts it chose, and their weighted sum

`*_reference` says *what* is computed, in the fewest lines; the kernel says *how*. The tests hold
the two equal in float64, and so does `python kernels.py`, which also times them in about 20 s on
one CPU core (`--compile` adds that variant).

Letters: B batch, T queries, S keys, D head dim, Hq/Hkv query/kv heads, G = Hq/Hkv; N rows (tokens),
C hidden, V vocabulary; E experts, F an expert's inner width. "fp32" means: float64 stays float64.
CPU paths are tested and measured; what is particular to CUDA is not yet measured on a GPU.
"""
import contextlib
import functools
import itertools
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IMPLS = ("auto", "reference", "sdpa", "fused")
BLOCK = 64           # queries at a time of fused attention: best of 32 .. 128 on CPU
TILE = 2**21         # logits of the head computed at a time: 8 MiB; on CUDA 16 times that
MAX_KEPT_PROBS = 2**23  # probabilities kept from forward to gradient: 32 MiB; on CUDA 64 times
EXPERT = 16          # an expert's rows on a CPU are a multiple of this, at least
SCORES = 2**24       # of dual chunk attention in memory at a time: 64 MiB
_SWITCH = {"impl": "auto", "compile": False}


def set_default_impl(impl="auto", compile=False):
    """The one switch: what `impl="auto"` means from now on, and whether kernels are compiled.

    impl: "auto" (the default: see `attention`), "sdpa", "fused" or "reference"; else ValueError.
    compile: the blocks of "fused" and the tiles of linear_cross_entropy and token_logprobs run
    under torch.compile. Off by default, so a short run never pays for a compilation; when on, it
    happens at the first call, and only while gradients are enabled: sampling stays uncompiled
    (R4.8). Returns the previous (impl, compile): `use(*old)` undoes a change.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLS)}")
    old = _SWITCH["impl"], _SWITCH["compile"]
    _SWITCH.update(impl=impl, compile=bool(compile))
    return old


@functools.cache
def _compiled(fn, dynamic=False):
    # Not dynamic: one graph a shape. So only *full* chunks of the head's rows come here and the
    # ragged rest runs eagerly, or every new remainder would compile again (R4.8). Attention's
    # blocks see ever more keys: theirs is one graph for any number of them.
    return torch.compile(fn, dynamic=dynamic, fullgraph=True)


@functools.cache
def _medium_is_exact():
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    x = torch.full((256, 256), 1 + 2.0 ** -12, device="cpu")      # 1 in bf16, and in TF32
    exact = torch.equal(x @ torch.eye(256, device="cpu"), x)
    torch.set_float32_matmul_precision(old)
    return exact


def set_cpu_matmul(rows, width, device, least=2**23):
    """Which library multiplies fp32 matrices (rows, width) on a CPU from now on.

    torch's default, MKL, leaves AVX-512 unused on AMD: half of what a Zen 5 can do. oneDNN uses it,
    and torch asks oneDNN where "medium" precision allows it to compute in bf16. It does so only
    with AMX units, so "medium" is taken where a trial shows that fp32 stays fp32; and only for work
    that repays oneDNN's 10-20 us a call and 500 us for each new shape: from 128 rows at width 256,
    512 at 128, GRPO's micro-batches, all of other lengths, take 0.6 to 0.85 times as long (LOG.md,
    "oneDNN" and "captured"; `attention` then takes "fused"). Where shapes recur, as in decoding,
    `least` (of rows x width^2) may be smaller.

    It stays chosen until the next forward pass chooses: the backward pass comes in between."""
    if device.type == "cpu":
        large = rows * width * width >= least
        torch.set_float32_matmul_precision("medium" if large and _medium_is_exact() else "highest")


def _fp32(x):
    return x if x.dtype == torch.float64 else x.float()


def _autocast(*tensors):
    """Cast as torch.autocast would, if on; the kernels then turn it off, to keep sums in fp32."""
    kind = tensors[0].device.type
    on = torch.is_autocast_enabled(kind)
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors) if on else tensors


def _no_autocast(kind):
    # Entering the context costs as much as three small operations: in decoding, it is felt.
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


# --- attention ------------------------------------------------------------------------------------
def attention(q, k, v, *, causal=True, segment_ids=None, scale=None, impl="auto", mask=None):
    """Grouped-query attention: softmax(scale q k^T + masks) v, softmax in fp32.

    q (B,Hq,T,D); k, v (B,Hkv,S,D); query heads hG .. hG+G-1 read kv head h. bf16, fp32 or float64;
    returns (B,Hq,T,D) in q's dtype. scale: D^-0.5 unless given.
    causal: queries are the *last* T of the S positions, so cached decoding needs nothing else.
    segment_ids (B,T) int, T == S: document ids of a packed row; other documents are invisible.
    mask bool, (B or 1,1,T or 1,S or 1), True = may attend: for left padding. All are ANDed; a query
    left with no key gives 0 and zero gradients, never NaN (R3.4).
    impl: "reference" materialises the scores; "sdpa" is PyTorch's kernel; "fused" has a block of
    queries' scores at a time, O(T) memory, and skips keys that no query of it may see: for packed
    documents much faster. "auto" is what `use` chose, by default "fused" on a CPU in bf16, and in
    fp32 where `set_cpu_matmul` took oneDNN; else, and for T == 1, "sdpa".
    ValueError for any other impl and for shapes that do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[1] % k.shape[1] or (
            q.shape[::3] != k.shape[::3]):
        raise ValueError("need q (B,Hq,T,D) and k, v (B,Hkv,S,D), Hq a multiple of Hkv; got "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    (B, _, T, D), S = q.shape, k.shape[2]
    if segment_ids is not None and (T != S or segment_ids.shape != (B, T)):
        raise ValueError(f"segment_ids {tuple(segment_ids.shape)} must be (B,T) = {(B, T)} and "
                         f"T equal S = {S}; with a cache, pass a mask")
    if mask is not None:
        if mask.dtype != torch.bool or mask.dim() != 4 or any(
                m not in (1, n) for m, n in zip(mask.shape, (B, 1, T, S), strict=True)):
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool, broadcastable "
                             f"to (B,1,T,S) = {(B, 1, T, S)}")
        mask = mask.expand(B, 1, T, S)
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLS)}")
    if impl == "auto":
        impl = "sdpa" if T == 1 else _SWITCH["impl"]
    scale = D ** -0.5 if scale is None else scale
    q, k, v = _autocast(q, k, v)
    if impl == "auto":                             # where products reach oneDNN, they beat SDPA
        fast = q.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"
        impl = "fused" if q.device.type == "cpu" and fast else "sdpa"
    with _no_autocast(q.device.type):
        if impl == "fused":
            return _Fused.apply(q, k, v, causal, segment_ids, scale, mask,
                                _SWITCH["compile"] and torch.is_grad_enabled())
        fn = attention_reference if impl == "reference" else _attention_sdpa
        return fn(q, k, v, causal=causal, segment_ids=segment_ids, scale=scale, mask=mask)


def _keep(q, k, causal, segment_ids, mask, i0=0, i1=None, j0=0, j1=None):
    """Who may see whom in the tile [i0:i1] x [j0:j1]: bool (B or 1,1,i,j); None = everyone."""
    T, S = q.shape[2], k.shape[2]
    i1, j1 = i1 or T, j1 or S
    parts = []
    if causal and j1 - 1 > i0 + S - T:                       # else the tile is below the diagonal
        i = torch.arange(i0, i1, device=q.device) + S - T    # query 0 is position S - T
        parts.append((i[:, None] >= torch.arange(j0, j1, device=q.device))[None, None])
    if segment_ids is not None:
        parts.append(segment_ids[:, None, i0:i1, None] == segment_ids[:, None, None, j0:j1])
    if mask is not None:
        parts.append(mask[:, :, i0:i1, j0:j1])
    return functools.reduce(torch.logical_and, parts) if parts else None


def attention_reference(q, k, v, *, causal=True, segment_ids=None, scale=None, mask=None):
    """`attention` as the formula reads; all (B,Hq,T,S) scores in memory. Same arguments."""
    G = q.shape[1] // k.shape[1]
    k_, v_ = (_fp32(x).repeat_interleave(G, dim=1) for x in (k, v))
    scores = _fp32(q) @ k_.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    keep = _keep(q, k, causal, segment_ids, mask)
    if keep is None:
        return (scores.softmax(-1) @ v_).to(q.dtype)
    # A finite floor: softmax over a row of -inf is NaN, in value and gradient. The second fill
    # then empties the rows without a key, which are uniform until here.
    probs = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1)
    return (probs.masked_fill(~keep, 0.0) @ v_).to(q.dtype)


def _attention_sdpa(q, k, v, *, causal, segment_ids, scale, mask):
    dtype, one, G = q.dtype, q.shape[2] == 1, q.shape[1] // k.shape[1]
    causal = causal and not one                    # a single query is the last position
    if torch.get_float32_matmul_precision() == "medium" and not one and not q.is_cuda:
        q, k, v = _fp32(q), _fp32(k), _fp32(v)     # oneDNN: in fp32 1.3x as fast as bf16
    # Trap: is_causal is aligned *top-left*. With a cache (T != S) query 0 would see key 0 only, so
    # that takes a mask, and is_causal, the fast path, is left for T == S.
    fast = segment_ids is None and mask is None and (q.shape[2] == k.shape[2] or not causal)
    keep, dead = None if fast else _keep(q, k, causal, segment_ids, mask), None
    if mask is not None or (causal and q.shape[2] > k.shape[2]):
        # Backends differ on a row without keys (0, NaN, the mean of v): let it see everything, then
        # blank it. Causal and segment masks always leave a query itself, so they skip this.
        dead = ~keep.any(-1, keepdim=True)
        keep = keep | dead
    # enable_gqa reads shared kv heads in place: on CPU 2-20% faster than repeating them. On CUDA
    # repeat them where there is a mask or fp32, so that the memory-efficient backend can serve:
    # our expectation, not yet measured on a GPU.
    if q.is_cuda and (keep is not None or q.dtype == torch.float32) and G > 1 and not one:
        k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    out = decode_attention(q, k, v, keep, scale) if one else F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep, is_causal=causal and keep is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1])
    return (out if dead is None else out.masked_fill(dead, 0.0)).to(dtype)


def decode_attention(q, k, v, keep=None, scale=None):
    """Decoding: `attention` with T = 1, without checks. keep (B,1,1,S): as mask, a key in each row.
    The G heads of a group pose as G queries of one kv head, so that no backend copies the cache:
    on CPU, S 256 .. 2048, 1.4x enable_gqa and 5-8x repeat_interleave."""
    precision = torch.get_float32_matmul_precision()
    set_cpu_matmul(1, 1, q.device)                # here oneDNN takes 10 us a row and kv head
    out = F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, k.shape[3]), k, v,
                                         attn_mask=keep, scale=scale)
    torch.set_float32_matmul_precision(precision)
    return out.view(q.shape)


def _transposed(x):
    return x.mT.contiguous()


def _fold(x, Hkv):
    """(B,Hq,T,D) -> (B,Hkv,T*G,D): row tG+g is query t of head g of its group. Grouped attention
    becomes plain attention with more queries; dk and dv sum over heads by themselves."""
    return x.unflatten(1, (Hkv, -1)).transpose(2, 3).flatten(2, 3)


def _unfold(x, T):
    return x.unflatten(2, (T, -1)).transpose(2, 3).flatten(1, 2)


def _blocks(q, k, causal, segment_ids, mask):
    """For each BLOCK of queries: its folded rows, the keys from the first to the last that one of
    its queries may see (the others cost nothing), and `_keep` of the last of these keys; all see
    the ones before."""
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    for i0 in range(0, T, BLOCK):
        i1 = min(i0 + BLOCK, T)
        j0, j1 = 0, max(1, i1 + S - T) if causal else S
        plain = segment_ids is None and mask is None
        keep = _keep(q, k, causal, segment_ids, mask, i0, i1, max(0, i0 + S - T) * plain, j1)
        if segment_ids is not None:      # packed rows: the documents in sight. One host sync
            seen = keep.flatten(0, 2).any(0).nonzero().flatten().tolist() or [0]
            j0, j1 = seen[0], seen[-1] + 1
            keep = keep[..., j0:j1]
        yield (slice(i0 * G, i1 * G), slice(j0, j1),
               None if keep is None else keep.repeat_interleave(G, dim=2))


def _probabilities(rows, keys_t, keep, hollow):
    """softmax(q k^T) of one block, fp32. hollow: rows without a key, which get 0 (R3.4), may be."""
    s = rows @ keys_t
    if keep is not None:
        s[..., -keep.shape[-1]:].masked_fill_(~keep, torch.finfo(s.dtype).min)
    p = s.softmax(-1)
    return p * keep.any(-1, keepdim=True) if hollow else p


def _block_forward(rows, keys_t, v, keep, hollow):
    return _probabilities(rows, keys_t, keep, hollow).to(v.dtype) @ v


def _block_backward(rows, keys_t, q, k, v_t, dout, keep, hollow):
    """The block's dq, dk, dv, all for scale = 1."""
    p = _probabilities(rows, keys_t, keep, hollow)
    dp = _fp32(dout @ v_t)
    ds = torch._softmax_backward_data(dp, p, -1, p.dtype).to(q.dtype)  # p (dp - sum of p dp)
    return ds @ k, ds.mT @ q, p.to(q.dtype).mT @ dout


class _Fused(torch.autograd.Function):
    """A BLOCK of queries at a time against all the keys it sees. The probabilities are computed
    again in the backward pass instead of kept, which is what makes FlashAttention's memory O(T)
    (Dao et al. 2022, arXiv 2205.14135); its running softmax over tiles of keys is for memories
    smaller than a CPU's cache. Scores are fp32; for bf16 inputs the other products are bf16. What
    gets compiled is one block, not the loop, whose graph would grow with T."""

    @staticmethod
    def forward(ctx, q, k, v, causal, segment_ids, scale, mask, compiled):
        hollow = mask is not None or (causal and q.shape[2] > k.shape[2])
        ctx.save_for_backward(q, k, v, segment_ids, mask)
        ctx.rest = causal, scale, hollow, compiled
        step = _compiled(_block_forward, dynamic=True) if compiled else _block_forward
        # Transposed once: bmm would copy a slice of keys, transposed, for every block.
        rows, keys_t, v = _fp32(_fold(q, k.shape[1])) * scale, _transposed(_fp32(k)), v.contiguous()
        out = []
        for i, j, keep in _blocks(q, k, causal, segment_ids, mask):
            out.append(step(rows[:, :, i], keys_t[..., j], v[:, :, j], keep, hollow))
        return _unfold(torch.cat(out, 2), q.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (q, k, v, segment_ids, mask), (causal, scale, hollow, compiled) = \
            ctx.saved_tensors, ctx.rest
        step = _compiled(_block_backward, dynamic=True) if compiled else _block_backward
        with torch.autocast(q.device.type, enabled=False):
            queries, dout = (_fold(x, k.shape[1]) for x in (q, dout))
            rows, keys_t, v_t = _fp32(queries) * scale, _transposed(_fp32(k)), _transposed(v)
            dq, dk, dv = [], *torch.zeros((2, *k.shape), dtype=rows.dtype, device=k.device)
            k = k.contiguous()
            for i, j, keep in _blocks(q, k, causal, segment_ids, mask):
                part = step(rows[:, :, i], keys_t[..., j], queries[:, :, i], k[:, :, j],
                            v_t[..., j], dout[:, :, i], keep, hollow)
                dq.append(part[0])
                dk[:, :, j] += part[1]
                dv[:, :, j] += part[2]
        dq = _unfold(torch.cat(dq, 2) * scale, q.shape[2])
        return dq, (dk * scale).to(k.dtype), dv.to(v.dtype), None, None, None, None, None


# --- attention beyond the training length ---------------------------------------------------------
def dual_chunk_attention(q, k, v, chunk, *, scale=None, pads=None):
    """Causal attention whose position depends on how many chunks of `chunk` tokens lie between
    query and key (Dual Chunk Attention, An et al. 2024, arXiv 2402.17463; see model.dual_chunks).

    q: three (B,Hq,T,D), one query rotated in three ways: for keys of its own chunk, of the previous
    one, of all older ones. k, v (B,Hkv,S,D): keys rotated by their position within their chunk.
    The queries are the last T of S positions. pads: the columns of left padding of each of the B
    rows, which count neither as keys nor as positions. Returns (B,Hq,T,D) in q's dtype, by one fp32
    softmax over the three groups of keys. Memory O(S): a block of queries sees all keys at once.
    """
    dtype = q[0].dtype
    q, (k, v) = _autocast(*q), _autocast(k, v)
    with _no_autocast(k.device.type):
        if pads is None:
            return _dual_chunks(q, _fp32(k), _fp32(v), chunk, scale).to(dtype)
        out, T = torch.zeros_like(q[0], dtype=dtype), q[0].shape[2]
        for b, pad in enumerate(pads):
            if (t := min(T, k.shape[2] - pad)) > 0:    # how many queries of this row are no padding
                out[b:b + 1, :, T - t:] = _dual_chunks(
                    [x[b:b + 1, :, T - t:] for x in q], _fp32(k[b:b + 1, :, pad:]),
                    _fp32(v[b:b + 1, :, pad:]), chunk, scale).to(dtype)
        return out


def _dual_chunks(q, k, v, chunk, scale):
    (B, Hq, T, D), (Hkv, S) = q[0].shape, k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    start, out, block = S - T, [], max(1, SCORES // (B * Hq * S))
    while start < S:
        own = start // chunk * chunk               # where the queries' chunk begins
        previous, end = max(0, own - chunk), min(S, own + chunk, start + block)
        at = slice(start - (S - T), end - (S - T))
        scores = torch.cat([_fp32(_fold(x[:, :, at], Hkv)) @ k[:, :, a:b].mT for x, a, b in zip(
            q, (own, previous, 0), (end, own, previous), strict=True)][::-1], dim=-1) * scale
        i = torch.arange(start, end, device=k.device).repeat_interleave(Hq // Hkv)
        scores = scores.masked_fill(i[:, None] < torch.arange(end, device=k.device), -torch.inf)
        out.append(_unfold(scores.softmax(-1) @ v[:, :, :end], end - start))
        start = end
    return torch.cat(out, dim=2)


def dual_chunk_attention_reference(q, k, v, chunk, *, scale=None):
    """dual_chunk_attention with all scores of all three kinds in memory."""
    G, (T, D), S = q[0].shape[1] // k.shape[1], q[0].shape[2:], k.shape[2]
    k_, v_ = (_fp32(x).repeat_interleave(G, dim=1) for x in (k, v))
    own, previous, older = (_fp32(x) @ k_.mT * (D ** -0.5 if scale is None else scale) for x in q)
    i, j = torch.arange(S - T, S, device=k.device)[:, None], torch.arange(S, device=k.device)
    apart = i // chunk - j // chunk
    scores = torch.where(apart == 0, own, torch.where(apart == 1, previous, older))
    return (scores.masked_fill(i < j, -torch.inf).softmax(-1) @ v_).to(q[0].dtype)


# --- head and loss without the logits -------------------------------------------------------------
def linear_cross_entropy(hidden, weight, targets, *, ignore_index=-100, reduction="mean",
                         valid_vocab=None, chunk_rows=None):
    """F.cross_entropy(hidden @ weight.T, targets) with only a chunk of the logits alive at a time.

    hidden (..., C), weight (V,C), targets (...) int. Returns fp32: a scalar for "mean" (over the
    supervised targets) and "sum"; for "none" the shape of targets, 0 where ignored. In bf16 (also
    under autocast) the products are bf16 and all else is fp32; a CPU, which has no product of bf16
    with an fp32 result, also rounds the logits to bf16 for "mean" and "sum", as transformers does:
    in fp32 the head would take most of a step. Rows of ignore_index are dropped first and cost no
    matmul: in SFT, most.
    No supervised target at all: the loss and its gradients are exactly 0, not NaN (R4.3).
    valid_vocab: rows of weight from there on are padding of the embedding and get probability 0.
    chunk_rows trades memory for speed, nothing else. ValueError for shapes that do not fit, an
    unknown reduction, and on CPU a target out of range (on CUDA a device-side assertion).
    Under FSDP2 call it inside the forward of the module that owns weight, where it is gathered.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is not mean, sum or none")
    loss, count = _nll(hidden, weight, targets, 1.0, valid_vocab, ignore_index,
                       reduction != "none", chunk_rows)
    return loss / max(count, 1) if reduction == "mean" else loss


def token_logprobs(hidden, weight, targets, temperature=1.0, valid_vocab=None):
    """log softmax(hidden weight^T / temperature) at targets: fp32, in the shape of targets.

    Shapes, chunks and errors as linear_cross_entropy; targets of -100 give 0 at no cost.
    Differentiable per token. Use the sampler's temperature, or GRPO's first ratio is not 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy has no log-probs")
    return -_nll(hidden, weight, targets, temperature, valid_vocab, -100, False, None)[0]


def token_logprobs_reference(hidden, weight, targets, temperature=1.0, valid_vocab=None):
    """token_logprobs with all the logits in memory, every target in range."""
    logits = (_fp32(hidden) @ _fp32(weight).mT)[..., :valid_vocab] / temperature
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def linear_cross_entropy_reference(hidden, weight, targets, *, ignore_index=-100,
                                   reduction="mean", valid_vocab=None):
    """linear_cross_entropy with all the logits in memory."""
    keep = targets != ignore_index
    loss = -token_logprobs_reference(hidden, weight, targets * keep, 1.0, valid_vocab) * keep
    count = keep.sum().clamp(min=1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / count}[reduction]


def _nll(hidden, weight, targets, temperature, valid_vocab, ignore_index, total, chunk_rows):
    """Front of both kernels: (sum of -log p, or -log p in the shape of targets; how many)."""
    if weight.dim() != 2 or hidden.shape != targets.shape + weight.shape[1:]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be targets' shape "
                         f"{tuple(targets.shape)} + (C,), and weight {tuple(weight.shape)} (V,C)")
    if valid_vocab is not None and valid_vocab < len(weight):
        weight = weight[:valid_vocab]              # a column never computed has probability 0
    h, t = hidden.flatten(0, -2), targets.flatten().long()
    index = (t != ignore_index).nonzero()[:, 0]
    if len(index) < targets.numel():
        h, t = h.index_select(0, index), t[index]
    if t.device.type == "cpu" and len(t) and not 0 <= t.min() <= t.max() < len(weight):
        raise ValueError(f"targets span {t.min()}..{t.max()}; allowed are 0..{len(weight) - 1} and "
                         f"{ignore_index} (ignored)")
    (h,) = _autocast(h)
    if not (h.is_cuda or total):                   # log-probs: no bf16 x bf16 -> fp32 matmul there
        h = _fp32(h)
    # Probabilities are kept for the gradient: on a CPU while they stay in cache (of 64 .. 4096 rows
    # 512 is best at V 4096, 128 at 32,000, and beyond 2^16 none); on CUDA 512 MiB, a guess. A chunk
    # is full, for the compiler, at min(rows, all rows): so pre-training's one shape counts as well.
    room, V = MAX_KEPT_PROBS * (64 if h.is_cuda else 1), len(weight)
    rows = chunk_rows or (max(128, room // 4 // V) if 128 * V <= room else 1024)
    rows, grad = max(1, min(rows, targets.numel())), torch.is_grad_enabled()
    nll = _ChunkedNLL.apply(h, weight, t[:, None], 1.0 / temperature, rows, rows * V <= room,
                            total, grad, _SWITCH["compile"] and grad)
    if not total:
        nll = nll.new_zeros(targets.numel()).index_copy(0, index, nll).view(targets.shape)
    return nll, len(index)


def _product(a, b, total=None):
    """a @ b in fp32 (on a CPU, bf16 sums are rounded before); with `total`, added to that."""
    if total is not None and a.dtype == total.dtype:
        return total.addmm_(a, b)
    wide = a.is_cuda and a.dtype == torch.bfloat16
    out = torch.mm(a, b, out_dtype=torch.float32) if wide else _fp32(a @ b)
    return out if total is None else total.add_(out)


def _tile_nll(h, w, t, m, norm, picked, inv_t):
    """FlashAttention's running softmax: folds a tile of logits, h (n,C) by w (v,C), into each row's
    maximum m, sum of exponentials norm and logit of the target, all (n,1). t (n,1) is the target's
    column in this tile, or outside of it. Returns these and exp(logits - m)."""
    p = _product(h, w.to(h.dtype).mT).mul_(inv_t)      # one (n,v) buffer: logits, then p
    column = t.clamp(0, len(w) - 1)
    picked = torch.where(column == t, p.gather(1, column), picked)
    m_new = torch.maximum(m, p.amax(-1, keepdim=True))
    p = p.sub_(m_new).exp_()
    return m_new, norm * (m - m_new).exp() + p.sum(-1, keepdim=True), picked, p


def _tile_grad(h, w, t, lse, m, p, scaled, dh, dw, inv_t):
    """With dz = p - (1 at the target), adds dz w to dh, and dz^T `scaled`, that is h times the
    upstream gradient, to dw unless that is None. m and p: _tile_nll's; None: p anew."""
    w, column = w.to(h.dtype), t.clamp(0, len(w) - 1)
    if p is None:
        p = _product(h, w.mT).mul_(inv_t).sub_(lse).exp_()
    else:
        p = p.mul_((m - lse).exp())
    dz = p.scatter_add_(1, column, -(column == t).to(p.dtype)).to(h.dtype)
    _product(dz, w, dh)
    if dw is not None:
        _product(dz.mT, scaled, dw)


class _ChunkedNLL(torch.autograd.Function):
    """h (n,C), w (V,C), t (n,1) -> sum of nll if `total`, else nll (n,): `rows` after `rows`, and
    of their logits one tile of TILE entries after the other.

    Two ways to the gradient. total: the upstream gradient is one factor for all rows and can wait,
    so the forward pass takes each chunk's gradient at once: 3 matmuls with `keep` (Liger Kernel,
    arXiv 2410.10989), else 4. Not total: one factor a row, so backward computes p again, 4 matmuls.
    """

    @staticmethod
    def walk(h, w, t, lse, g, want_dw, inv_t, rows, keep, compiled):
        """nll, lse, dh, dw. lse (n,1): known already, or None; g (n,1): None for no gradient."""
        dw = torch.zeros_like(w, dtype=g.dtype) if g is not None and want_dw else None
        w = w.to(h.dtype) if keep else w               # else tile by tile, in cache
        cols, parts = max(1, (16 if h.is_cuda else 1) * TILE // rows), []
        tiles = [(j, w[j:j + cols], None if dw is None else dw[j:j + cols])
                 for j in range(0, len(w), cols)]
        for i in range(0, max(1, len(h)), rows):       # of no rows at all, one empty chunk
            a, b, kept = h[i:i + rows], t[i:i + rows], {}
            fold, spread = (_compiled(f) if compiled and len(a) == rows else f
                            for f in (_tile_nll, _tile_grad))
            norm = picked = torch.zeros_like(_fp32(a[:, :1]))
            m, dh = norm - 1e30, None
            for j, part, _ in tiles if lse is None else ():
                m, norm, picked, p = fold(a, part, b - j, m, norm, picked, inv_t)
                if keep and g is not None:
                    kept[j] = m, p
            end = m + norm.log() if lse is None else lse[i:i + rows]
            if g is not None:
                factor = g[i:i + rows] * inv_t
                dh, scaled = torch.zeros_like(_fp32(a)), (a * factor).to(a.dtype)
                for j, part, d in tiles:
                    spread(a, part, b - j, end, *kept.pop(j, (None, None)), scaled, dh, d, inv_t)
                dh = dh.mul_(factor).to(a.dtype)
            parts.append((end - picked, end, dh))
        nll, lse, dh = zip(*parts, strict=True)
        return torch.cat(nll), torch.cat(lse), None if g is None else torch.cat(dh), dw

    @staticmethod
    def forward(ctx, h, w, t, inv_t, rows, keep, total, grad, compiled):
        ctx.rest = inv_t, rows, keep, compiled
        early = total and grad and any(ctx.needs_input_grad)
        g = torch.ones_like(_fp32(h[:, :1])) if early else None
        with torch.autocast(h.device.type, enabled=False):
            nll, lse, dh, dw = _ChunkedNLL.walk(h, w, t, None, g, ctx.needs_input_grad[1],
                                                *ctx.rest)
        ctx.total, ctx.early = total, (dh, dw) if early else None
        if not total:
            ctx.save_for_backward(h, w, t, lse)
        return nll.sum() if total else nll[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.total:
            if ctx.early is None:
                raise RuntimeError("this loss goes backward once: its gradient is scaled in place")
            (dh, dw), ctx.early = ctx.early, None
            return dh.mul_(g), None if dw is None else dw.mul_(g), *[None] * 7
        h, w, t, lse = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            _, _, dh, dw = _ChunkedNLL.walk(h, w, t, lse, g[:, None].contiguous(),
                                            ctx.needs_input_grad[1], *ctx.rest)
        return dh, dw, *[None] * 7


# --- norm and SwiGLU ------------------------------------------------------------------------------
class _RMSNorm(torch.autograd.Function):
    """y = w n with n = x r, r = (mean x^2 + eps)^-1/2. Autograd would keep n and y, both fp32, and
    y once more in bf16 for each product that reads it. Here only x is kept, and
        dw = sum over rows of dy n,    dx = r (w dy - n mean(w dy n)).
    y is cast once, so the gradients of its readers are summed in bf16, no longer in fp32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _autocast(rms_norm_reference(x, weight, eps))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), C = ctx.saved_tensors, dy.shape[-1]
        wide, dy = _fp32(x), _fp32(dy)
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(C).add_(ctx.eps)
        n = wide * r.rsqrt_()
        product = (n * dy).reshape(-1, C)
        with _no_autocast(dy.device.type):
            mean = (product @ _fp32(weight) / C).view(r.shape)
        dx = (dy * weight).sub_(n.mul_(mean)).mul_(r)
        return dx.to(x.dtype), product.sum(0).to(weight.dtype), None


def rms_norm(x, weight, eps):
    """RMSNorm (arXiv 1910.07467) in the published order: normalise in fp32, cast back, and only
    then multiply. x (...,C), weight (C,). Returns (...,C), under autocast in its dtype."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _autocast(rms_norm_reference(x, weight, eps))[0]


def rms_norm_reference(x, weight, eps):
    """rms_norm as it reads. Where there is nothing to cast, torch has it in one call."""
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return weight * F.rms_norm(_fp32(x), x.shape[-1:], None, eps).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up. Autograd would keep silu(gate), the product, and under autocast a copy of
    the weight, too: twice the memory, for a hundredth of a step's time."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return swiglu_reference(gate, up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        silu, inner = F.silu(gate), dy @ weight.to(dy.dtype)          # inner: of silu(gate) * up
        dgate = torch.ops.aten.silu_backward(inner * up, gate)
        dup, product = inner.mul_(silu), silu.mul_(up)
        dweight = dy.reshape(-1, len(weight)).mT @ product.reshape(-1, weight.shape[1])
        return dgate, dup, dweight.to(weight.dtype)


def swiglu(gate, up, weight):
    """The second half of an MLP, (silu(gate) * up) weight^T. gate, up (...,F), weight (C,F);
    returns (...,C)."""
    fn = _SwiGLU.apply if torch.is_grad_enabled() else swiglu_reference
    return fn(*_autocast(gate, up), weight)


def swiglu_reference(gate, up, weight):
    """swiglu as it reads (GLU Variants, arXiv 2002.05202)."""
    return F.linear(F.silu(gate) * up, weight)


# --- experts --------------------------------------------------------------------------------------
def experts(x, weight, gate_up, down, expert, impl="auto"):
    """The routed half of a mixture of experts: the sum over j of weight_j FFN_{expert_j}(x), where
    FFN_e(x) = down_e(silu(gate_e x) * up_e x). No capacity limit, so no token is dropped.

    x (N,C); weight (N,k) and expert (N,k) int64; gate_up (E,2F,C), gate rows first; down (E,C,F).
    Returns (N,C). impl: "reference"; "fused", see `_Experts`; "grouped", one matmul over all
    experts without a host sync; "auto": grouped for bf16 on CUDA where torch has it and 16-byte row
    strides allow (on a CPU it is a loop too), else fused. ValueError for any other impl and for
    shapes that do not fit.
    """
    E, C, inner = down.shape
    if x.shape[1:] != (C,) or gate_up.shape != (E, 2 * inner, C) or (
            weight.shape != expert.shape or expert.shape[:-1] != x.shape[:1]):
        raise ValueError("need x (N,C), weight and expert (N,k), gate_up (E,2F,C), down (E,C,F); "
                         f"got {[tuple(a.shape) for a in (x, weight, expert, gate_up, down)]}")
    if impl not in ("auto", "reference", "fused", "grouped"):
        raise ValueError(f"impl {impl!r} is not one of auto, reference, fused, grouped")
    x, = _autocast(x)
    fits = x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and C % 8 == inner % 8 == 0
    if impl == "fused" or (impl == "auto" and not (fits and hasattr(F, "grouped_mm"))):
        return _Experts.apply(x, weight, gate_up, down, expert)
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    if impl == "reference":
        return experts_reference(x, weight, gate_up, down, expert)
    order = expert.flatten().argsort(stable=True)      # (token, j) pairs, by expert
    token = order // expert.shape[1]
    ends = torch.searchsorted(expert.flatten()[order], torch.arange(E, device=x.device),
                              right=True, out_int32=True)
    gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    y = y * weight.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add(0, token, y)


def experts_reference(x, weight, gate_up, down, expert):
    """Each expert in turn, on the tokens that chose it. unbind, since the backward pass of
    gate_up[e] fills a zero (E,2F,C) for every expert: 14x slower at 60 experts."""
    out = torch.zeros_like(x)
    for e, (wgu, wd) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, j = (expert == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ wgu.mT).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ wd.mT
        out = out.index_add(0, token, y * weight[token, j, None].to(y.dtype))
    return out


class _Experts(torch.autograd.Function):
    """The loop again: a lookup fetches an expert's rows, an embedding bag, a weighted sum of
    lookups, brings all results back, and the gradients travel the same way. Of an expert's weights
    there is a cast copy at a time; of its activations the products h with gate and up are kept, as
    (2F,rows): silu goes through a contiguous gate twice as fast.

    Blocks are multiples of 16 rows, or of a 16th to an eighth of an even share: oneDNN, to which
    six products of an expert are new shapes whenever its count is new, would prepare them anew in
    every step. What a block has too much are rows of the next experts, which overwrite the results.
    """

    @staticmethod
    def forward(ctx, x, weight, gate_up, down, expert):
        order = expert.flatten().argsort(stable=True)      # (token, j) pairs, by expert
        place = torch.empty_like(order)                    # and where each pair is now
        place[order] = torch.arange(len(order), device=x.device)
        size = EXPERT << max(0, (len(order) // len(down)).bit_length() - 8)
        counts = torch.bincount(expert.flatten(), minlength=len(down)).tolist()
        ctx.blocks = [(n, slice(end - n, end + -n % size))
                      for n, end in zip(counts, itertools.accumulate(counts), strict=True)]
        token = F.pad(order // expert.shape[1], (0, size))  # for the last block's surplus
        y, inner = x.new_empty(len(token), x.shape[1]), []
        for (_, b), wgu, wd in zip(ctx.blocks, gate_up, down, strict=True):
            h = wgu.to(x.dtype) @ x.index_select(0, token[b]).mT
            gate, up = h.chunk(2)
            torch.mm(F.silu(gate).mul_(up).mT, wd.to(x.dtype).mT, out=y[b])
            if any(ctx.needs_input_grad):
                inner.append(h)
        ctx.save_for_backward(x, weight, gate_up, down, order, place, token, *inner)
        return F.embedding_bag(place.view(expert.shape), y, mode="sum",
                               per_sample_weights=weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, gate_up, down, order, place, token, *inner = ctx.saved_tensors
        w = F.pad(weight.flatten()[order], (0, len(token) - len(order))).to(x.dtype)
        dx = x.new_empty(len(token), x.shape[1])
        dw, dgate_up, ddown = (torch.empty_like(t) for t in (w, gate_up, down))
        for e, ((n, b), h, wgu, wd) in enumerate(zip(ctx.blocks, inner, gate_up, down,
                                                     strict=True)):
            t, wb, dh = token[b], w[b], torch.empty_like(h)
            dy = g.index_select(0, t)
            dy[n:] = 0                                     # rows of the next experts
            (gate, up), (dgate, dup) = h.chunk(2), dh.chunk(2)
            silu = F.silu(gate)
            a = silu * up
            da = wd.to(x.dtype).mT @ dy.mT                 # but for the weight
            torch.sum(da * a, 0, out=dw[b])
            ddown[e] = dy.mT @ a.mul_(wb).mT
            torch.mul(da.mul_(wb), silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
            dgate_up[e] = dh @ x.index_select(0, t)
            torch.mm(dh.mT, wgu.to(x.dtype), out=dx[b])
        place = place.view(weight.shape)
        dx = F.embedding_bag(place, dx, mode="sum")
        return dx, dw[place].to(weight.dtype), dgate_up, ddown, None


# --- python kernels.py ----------------------------------------------------------------------------
def main(compiled=False):
    """Every kernel against its twin: largest error of values and gradients relative to the float64
    twin's largest entry, and forward + backward times in fp32 (medians of 5, interleaved)."""
    torch.manual_seed(0)
    B, Hq, Hkv, T, D, V, E = 2, 8, 2, 512, 32, 8192, 16
    q, k, v = torch.randn(B, Hq, T, D), torch.randn(B, Hkv, T, D), torch.randn(B, Hkv, T, D)
    packed = (torch.arange(T) // 90).expand(B, T)
    h, w, t = torch.randn(B, T, 128), torch.randn(V, 128) / 8, torch.randint(V, (B, T))
    sft = torch.where(torch.rand(B, T) < 0.3, t, -100)
    x, weight, expert = torch.randn(B * T, 128), *torch.rand(B * T, E - 1).topk(2)
    gate_up, down = torch.randn(E, 256, 128) / 8, torch.randn(E, 128, 128) / 8
    ce, ce_ref = linear_cross_entropy, linear_cross_entropy_reference
    rows = [(f"attention {i}{n}", attention_reference, functools.partial(attention, impl=i),
             (q, k, v), {"segment_ids": s})
            for n, s in ((", causal", None), (", packed", packed)) for i in ("sdpa", "fused")]
    chunked, chunked_ref = (lambda a, b, c, k, v, f=f: f((a, b, c), k, v, 100)
                            for f in (dual_chunk_attention, dual_chunk_attention_reference))
    rows += [("dual_chunk_attention", chunked_ref, chunked, (q, q.flip(2), q.flip(3), k, v), {}),
             ("linear_cross_entropy", ce_ref, ce, (h, w), {"targets": t}),
             ("  30% supervised", ce_ref, ce, (h, w), {"targets": sft}),
             ("token_logprobs", token_logprobs_reference, token_logprobs, (h, w), {"targets": t}),
             ("rms_norm", rms_norm_reference, rms_norm, (h, w[0]), {"eps": 1e-6}),
             ("swiglu", swiglu_reference, swiglu, (h, h.flip(0), w[:256]), {}),
             ("experts", experts_reference, experts, (x, weight, gate_up, down),
              {"expert": expert})]

    def run(fn, tensors, rest, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in tensors]
        start = time.perf_counter()
        out = fn(*leaves, **rest)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return time.perf_counter() - start, (out.detach(), *grads)

    set_default_impl(compile=compiled)
    print(f"{'kernel':28}{'error':>9}{'twin ms':>9}{'kernel ms':>11}{'speed-up':>10}")
    worst = 0.0
    for name, twin, fn, tensors, rest in rows:
        truth, mine = (run(f, tensors, rest, torch.float64)[1] for f in (twin, fn))
        error = max(((a - b).abs().max() / a.abs().max()).item()
                    for a, b in zip(truth, mine, strict=True))
        worst = max(worst, error)
        pairs = [[run(f, tensors, rest, torch.float32)[0] for f in (twin, fn)] for _ in range(6)]
        a, b = (1e3 * statistics.median(column) for column in zip(*pairs[1:], strict=True))
        print(f"{name:28}{error:9.0e}{a:9.1f}{b:11.1f}{a / b:9.1f}x")
    if not worst < 1e-11:
        sys.exit("a kernel differs from its reference")


if __name__ == "__main__":
    main(compiled="--compile" in sys.argv[1:])
