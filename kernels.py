"""The tensor functions that decide speed and memory, each with a plain twin.

    attention             softmax(q k^T) v without keeping the T x S probabilities
    dual_chunk_attention  attention beyond the training length (lib/long_context.py)
    linear_cross_entropy  head and loss without the N x V logits (16,384 x 151,936: 9.3 GiB)
    token_logprobs        log p(target) by the same means, for DPO, GRPO and evaluation
    rms_norm, swiglu      keep less for the gradient (on CUDA, rms_norm is PyTorch's own)
    experts               each token through the experts it chose, and their weighted sum

Read the twin `*_reference` first. The tiles of the loss are in lib/chunked_loss.py, handwritten
gradients in lib/fast.py, packed rows on a GPU in lib/flex.py. CUDA paths are not yet measured on a
GPU. `python kernels.py` compares most pairs and times them in about 20 s.

Letters in shapes: B batch, T queries, S keys, D head width, Hq/Hkv query/kv heads, G = Hq/Hkv;
N rows (tokens), C hidden width, V vocabulary; E experts, A of them active per token; I inner width
of an MLP or expert. "fp32" means that bf16 becomes float32 while float64 stays float64.
"""
import functools
import sys
import timeit

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lib import fast
from lib.chunked_loss import chunked_nll
from lib.long_context import dual_chunk_attention, dual_chunk_attention_reference
from lib.fast import fold_groups, fp32, to_autocast_dtype, unfold_groups
from lib.flex import attention_flex, flex_block_mask

IMPLS = ("auto", "reference", "sdpa", "fused", "flex")
BLOCK = 64  # queries per block of fused attention: the fastest of 32 to 128 on a CPU
default_impl = "auto"


def set_default_impl(impl="auto", compile=False):
    """Set what `impl="auto"` means from now on (one of IMPLS), and whether blocks of fused
    attention and tiles of the loss are compiled, which pays off in long runs only. Return the
    previous (impl, compile)."""
    global default_impl
    fast.check_impl(impl, IMPLS)
    old = default_impl, fast.compile_kernels
    default_impl = impl
    fast.compile_kernels = compile
    return old


# --- attention ------------------------------------------------------------------------------------
def attention_reference(q, k, v, *, segment_ids=None, mask=None):
    """Return `attention` as the formula reads, with all (B,Hq,T,S) scores in memory."""
    group = q.shape[1] // k.shape[1]  # query heads per kv head
    k_ = fp32(k).repeat_interleave(group, dim=1)  # (B,Hq,S,D)
    v_ = fp32(v).repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5
    scores = fp32(q) @ k_.mT * scale
    allowed = visible(q, k, segment_ids, mask)
    if allowed is None:
        return (scores.softmax(-1) @ v_).to(q.dtype)
    # The fill is finite, because softmax over a row of -inf is NaN, in value and gradient. A query
    # that sees no key then gets equal probabilities; the second fill makes them 0.
    lowest = torch.finfo(scores.dtype).min
    probs = scores.masked_fill(~allowed, lowest).softmax(-1)
    probs = probs.masked_fill(~allowed, 0.0)
    return (probs @ v_).to(q.dtype)


def visible(q, k, segment_ids, mask, queries=None, keys=None):
    """Return which query may attend to which key: bool (B|1,1,T,S); None if every query sees every
    key. queries, keys: slices with start and stop, to get only these rows and columns."""
    T = q.shape[2]
    S = k.shape[2]
    queries = queries or slice(0, T)
    keys = keys or slice(0, S)
    offset = S - T  # query t is at position t + offset: the queries are the last T of S positions
    allowed = None
    if keys.stop - 1 > queries.start + offset:  # skip if even the first query sees the last key
        query_position = torch.arange(queries.start, queries.stop, device=q.device) + offset
        key_position = torch.arange(keys.start, keys.stop, device=q.device)
        allowed = query_position[:, None] >= key_position
        allowed = allowed[None, None]  # the same for the whole batch and all heads
    if segment_ids is not None:
        query_segment = segment_ids[:, None, queries, None]
        key_segment = segment_ids[:, None, None, keys]
        same = query_segment == key_segment
        allowed = same if allowed is None else allowed & same
    if mask is not None:
        mask = mask.expand(-1, 1, T, S)[:, :, queries, keys]
        allowed = mask if allowed is None else allowed & mask
    return allowed


def attention(q, k, v, *, segment_ids=None, impl="auto", mask=None, block_mask=None):
    """Return causal grouped-query attention, softmax(q k^T / sqrt(D) + masks) v, softmax in fp32.

    q (B,Hq,T,D) and k, v (B,Hkv,S,D) in bf16, fp32 or float64; query head i reads kv head i // G.
    Returns (B,Hq,T,D) in the dtype of q.
    The queries are the last T of the S positions, so that cached decoding needs no mask.
    segment_ids (B,T) int, T == S: the documents of a packed row, each invisible to the others.
    mask bool (B|1,1,T|1,S|1), True = may attend: for left padding. segment_ids, mask and causality
    must all allow a key. A query without any (as when T > S) gives 0 and zero gradients, never NaN.
    impl: "reference" keeps all scores. "sdpa" is PyTorch's kernel. "fused" takes one block of
    queries at a time, in O(T) memory, and skips later keys and other documents, but not padding.
    "flex", for packed rows on a GPU, is one compiled kernel; what it cannot do goes to sdpa. "auto"
    is sdpa for T == 1, else what `set_default_impl` set; if that is auto: on CUDA flex for packed
    rows, otherwise sdpa; on a CPU fused or sdpa, whichever is expected to be faster.
    block_mask: `flex_block_mask` of segment_ids; None: built here.
    """
    fast.check_impl(impl, IMPLS)
    q = to_autocast_dtype(q)
    k = to_autocast_dtype(k)
    v = to_autocast_dtype(v)
    if impl == "auto":
        impl = pick_impl(q, segment_ids)
    with torch.autocast(q.device.type, enabled=False):
        if impl == "fused":
            return FusedAttention.apply(q, k, v, segment_ids, mask)
        if impl == "flex" and segment_ids is not None and mask is None:
            if block_mask is None:
                block_mask = flex_block_mask(segment_ids)
            return attention_flex(q, k, v, block_mask)
        if impl == "reference":
            return attention_reference(q, k, v, segment_ids=segment_ids, mask=mask)
        # Trap: PyTorch's is_causal aligns the first query with the first key. With a cache (T < S),
        # query 0 would see key 0 only. So is_causal, the fast path, is for T == S.
        same_length = q.shape[2] == k.shape[2]
        if same_length and segment_ids is None and mask is None:
            return fast.sdpa(q, k, v, None, is_causal=True)
        allowed = visible(q, k, segment_ids, mask)
        return fast.sdpa(q, k, v, allowed, is_causal=False)


def pick_impl(q, segment_ids):
    """Return the impl that "auto" stands for."""
    if q.shape[2] == 1:
        return "sdpa"
    if default_impl != "auto":
        return default_impl
    if q.is_cuda:  # before the precision, which torch.compile cannot trace
        return "sdpa" if segment_ids is None else "flex"
    # On a CPU, bf16 and "medium" fp32 use oneDNN (lib.fast.set_cpu_matmul sets "medium" where that
    # pays off); there our blocks are faster. float64 goes the way of fp32.
    onednn = q.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"
    return "fused" if onednn else "sdpa"


def packed_block_mask(segment_ids):
    """Return flex_block_mask if `attention` will use it, else None. All layers share one call."""
    impl = default_impl
    if impl == "auto" and segment_ids.is_cuda:
        impl = "flex"
    return flex_block_mask(segment_ids) if impl == "flex" else None


# --- attention by blocks --------------------------------------------------------------------------
def query_blocks(q, k, segment_ids, mask):
    """Yield (block_rows, keys, allowed, blind) for each block of BLOCK queries.

    block_rows: slice of R rows of the folded queries (B,Hkv,T*G,D). keys: slice; no query of the
    block sees a key outside it. allowed: bool (B|1,1,R,n), covers only the last n keys of `keys`;
    every query sees the ones before. Without segment_ids and mask, these n are the causal triangle
    at the end of `keys`. None: every query sees all. blind: bool (B|1,1,R,1), the queries that see
    no key; None: there are none.
    """
    T = q.shape[2]
    S = k.shape[2]
    group = q.shape[1] // k.shape[1]
    offset = S - T
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = 0
        last = max(1, stop + offset)
        mask_start = 0  # every query of the block sees all keys before it
        if segment_ids is None and mask is None:
            mask_start = max(0, start + offset)  # the position of the block's first query
        allowed = visible(q, k, segment_ids, mask, slice(start, stop), slice(mask_start, last))
        if segment_ids is not None:
            # Cut to the documents in sight. On CUDA, this waits for the GPU once per block.
            seen_by_any = allowed.flatten(0, 2).any(0)
            seen = seen_by_any.nonzero().flatten().tolist()
            first = seen[0] if seen else 0
            last = seen[-1] + 1 if seen else 1
            allowed = allowed[..., first:last]
        blind = None
        if allowed is not None:
            allowed = allowed.repeat_interleave(group, dim=2)
            if mask is not None or T > S:
                blind = ~allowed.any(-1, keepdim=True)
        yield slice(start * group, stop * group), slice(first, last), allowed, blind


def block_probabilities(q_scaled, k_t, allowed):
    """Return P = softmax(scale q k^T) of one block in fp32; uniform for a query that sees no key.

    q_scaled = scale q (B,Hkv,R,D); k_t = k^T (B,Hkv,D,keys); R, allowed: see query_blocks.
    """
    scores = q_scaled @ k_t
    if allowed is not None:
        tail = scores[..., -allowed.shape[-1]:]
        tail.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def block_forward(q_scaled, k_t, v, allowed):
    """Return O = P v of one block."""
    probs = block_probabilities(q_scaled, k_t, allowed)
    return probs.to(v.dtype) @ v


def block_backward(q_scaled, k_t, q, k, v_t, dout, allowed):
    """Return the block's dq, dk and dv, the first two without the factor `scale`.

    P is computed again. Then (FlashAttention, appendix B.2; dS is the gradient of the scores):
        dP = dO v^T,   dS = P * (dP - rowsum(P * dP)),   dq = dS k,   dk = dS^T q,   dv = P^T dO
    """
    probs = block_probabilities(q_scaled, k_t, allowed)
    dprobs = fp32(dout @ v_t)
    dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
    dscores = dscores.to(q.dtype)
    dq = dscores @ k
    dk = dscores.mT @ q
    dv = probs.to(q.dtype).mT @ dout
    return dq, dk, dv


class FusedAttention(torch.autograd.Function):
    """Attention of BLOCK queries at a time; only q, k, v and the masks are saved.

    The backward pass recomputes the probabilities, as FlashAttention does for its O(T) memory (Dao
    et al. 2022, arXiv 2205.14135). FlashAttention also cuts the keys into tiles, with a running
    softmax, to fit a GPU's small on-chip memory. Scores are fp32; for bf16 inputs, other products
    are bf16. Only one block is compiled: a graph of the loop would grow with T.
    """

    @staticmethod
    def forward(ctx, q, k, v, segment_ids, mask):
        ctx.save_for_backward(q, k, v, segment_ids, mask)
        compute = fast.maybe_compiled(block_forward)
        scale = q.shape[-1] ** -0.5
        folded_q = fold_groups(q, k.shape[1])  # (B,Hkv,T*G,D)
        q_scaled = fp32(folded_q) * scale
        # Transposed once here; otherwise each block's product would copy its keys to transpose.
        k_t = fp32(k).mT.contiguous()          # (B,Hkv,D,S)
        v = v.contiguous()
        out = torch.empty_like(folded_q)
        for rows, keys, allowed, blind in query_blocks(q, k, segment_ids, mask):
            block_out = compute(
                q_scaled[:, :, rows],
                k_t[..., keys],
                v[:, :, keys],
                allowed,
            )
            if blind is not None:
                block_out = block_out.masked_fill(blind, 0.0)
            out[:, :, rows] = block_out
        return unfold_groups(out, q.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, segment_ids, mask = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        compute = fast.maybe_compiled(block_backward)
        with torch.autocast(q.device.type, enabled=False):
            folded_q = fold_groups(q, k.shape[1])
            folded_dout = fold_groups(dout, k.shape[1])
            q_scaled = fp32(folded_q) * scale
            k_t = fp32(k).mT.contiguous()
            v_t = v.mT.contiguous()
            contiguous_k = k.contiguous()
            dq = torch.empty_like(folded_q)
            dk = torch.zeros(k.shape, dtype=q_scaled.dtype, device=k.device)
            dv = torch.zeros_like(dk)
            for rows, keys, allowed, blind in query_blocks(q, k, segment_ids, mask):
                block_dout = folded_dout[:, :, rows]
                if blind is not None:
                    block_dout = block_dout.masked_fill(blind, 0.0)
                block_dq, block_dk, block_dv = compute(
                    q_scaled[:, :, rows],
                    k_t[..., keys],
                    folded_q[:, :, rows],
                    contiguous_k[:, :, keys],
                    v_t[..., keys],
                    block_dout,
                    allowed,
                )
                dq[:, :, rows] = block_dq
                dk[:, :, keys] += block_dk
                dv[:, :, keys] += block_dv
        dq = unfold_groups(dq * scale, q.shape[2])
        dk = (dk * scale).to(k.dtype)
        return dq, dk, dv.to(v.dtype), None, None


# --- head and loss --------------------------------------------------------------------------------
def token_logprobs_reference(hidden, weight, targets, temperature=1.0, valid_vocab=None):
    """Return token_logprobs with all the logits in memory; every target must be in range."""
    logits = fp32(hidden) @ fp32(weight).mT
    logits = logits[..., :valid_vocab] / temperature
    logprobs = logits.log_softmax(-1)
    targets = targets[..., None]
    return logprobs.gather(-1, targets)[..., 0]


def token_logprobs(hidden, weight, targets, temperature=1.0, valid_vocab=None):
    """Return log softmax(hidden weight^T / temperature) at targets: fp32, in the shape of targets.

    Shapes and errors are those of linear_cross_entropy; targets of -100 give 0 at no cost.
    Differentiable per token. For GRPO, pass the sampler's temperature, so that ratios start at 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy has no log-probs")
    nll, _ = chunked_nll(hidden, weight, targets, want_sum=False, valid_vocab=valid_vocab,
                         temperature=temperature)
    return -nll


def linear_cross_entropy_reference(hidden, weight, targets, *, ignore_index=-100,
                                   reduction="mean", valid_vocab=None):
    """Return linear_cross_entropy with all the logits in memory."""
    keep = targets != ignore_index
    loss = -token_logprobs_reference(hidden, weight, targets * keep, 1.0, valid_vocab) * keep
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / keep.sum().clamp(min=1)


def linear_cross_entropy(hidden, weight, targets, *, ignore_index=-100, reduction="mean",
                         valid_vocab=None, chunk_rows=None):
    """Return F.cross_entropy(hidden @ weight.T, targets) with only a tile of the logits in memory.

    hidden (..., C), weight (V,C), targets (...) int. Returns fp32: a scalar for "mean" (over the
    supervised targets) and "sum"; for "none" the shape of targets, 0 where ignored. Rows whose
    target is ignore_index are dropped first and cost nothing; in SFT, most rows are. Without any
    supervised target, the loss and its gradients are exactly 0, not NaN.
    In bf16, also by autocast, the products are bf16 and all else is fp32. A CPU's bf16 product
    cannot return fp32. So "mean" and "sum" round the logits to bf16 there, as transformers does;
    "none" uses fp32 products, which are slow.
    valid_vocab: rows of weight from valid_vocab on are padding and get probability 0. chunk_rows
    trades memory for speed. A target out of range raises ValueError, on CUDA a device-side
    assertion. Under FSDP2, call this inside the forward of the module that owns weight.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is not mean, sum or none")
    loss, count = chunked_nll(
        hidden, weight, targets, want_sum=reduction != "none", valid_vocab=valid_vocab,
        ignore_index=ignore_index, chunk_rows=chunk_rows)
    return loss / max(count, 1) if reduction == "mean" else loss


# --- norm, SwiGLU and experts ---------------------------------------------------------------------
def rms_norm_reference(x, weight, eps):
    """Return x / sqrt(mean x^2 + eps) * weight (RMSNorm, arXiv 1910.07467) in Qwen2's order:
    normalise in fp32, cast back, then multiply."""
    width = x.shape[-1:]
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, width, weight, eps)  # nothing to cast: one call
    normalised = F.rms_norm(fp32(x), width, None, eps)
    return weight * normalised.to(x.dtype)


def rms_norm(x, weight, eps):
    """Return what rms_norm_reference does, cast to autocast's dtype if autocast is on. x (...,C),
    weight (C,) -> (...,C). On a CPU, the backward pass of lib.fast.RMSNorm keeps its inputs only.
    """
    if torch.is_grad_enabled() and not x.is_cuda:  # PyTorch's own backward is one kernel on CUDA
        return fast.RMSNorm.apply(x, weight, eps, rms_norm_reference)
    return to_autocast_dtype(rms_norm_reference(x, weight, eps))


def swiglu_reference(gate, up, weight):
    """Return (silu(gate) * up) weight^T, the second half of an MLP (arXiv 2002.05202)."""
    return F.linear(F.silu(gate) * up, weight)


def swiglu(gate, up, weight):
    """Return what swiglu_reference does. gate, up (...,I), weight (C,I) -> (...,C). The backward
    pass of lib.fast.SwiGLU keeps gate and up only."""
    gate = to_autocast_dtype(gate)
    up = to_autocast_dtype(up)
    if torch.is_grad_enabled():
        return fast.SwiGLU.apply(gate, up, weight, swiglu_reference)
    return swiglu_reference(gate, up, weight)


def experts_reference(x, weight, gate_up, down, expert):
    """For each expert, run its tokens through it and add up the weighted results."""
    out = torch.zeros_like(x)
    # unbind, because the backward pass of gate_up[e] fills a zero (E,2I,C) for every expert: 14
    # times as slow at 60 experts.
    every_gate_up = gate_up.unbind()
    every_down = down.unbind()
    for e in range(len(every_down)):
        gate_up_e = every_gate_up[e]
        down_e = every_down[e]
        token, choice = (expert == e).nonzero(as_tuple=True)
        h = x[token] @ gate_up_e.mT
        gate, up = h.chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down_e.mT
        pair_weight = weight[token, choice, None].to(y.dtype)
        out = out.index_add(0, token, y * pair_weight)
    return out


def experts(x, weight, gate_up, down, expert, impl="auto"):
    """Return the routed half of a mixture of experts: sum over j of weight_j FFN_{expert_j}(x) with
    FFN_e(x) = down_e (silu(gate_e x) * up_e x). There is no capacity limit; no token is dropped.

    x (N,C); expert (N,A) int64: each token's experts; weight (N,A): their routing weights, of any
    float dtype; gate_up (E,2I,C), gate rows first; down (E,C,I). Returns (N,C). impl: "reference";
    "fused", lib.fast.Experts; "grouped", one product; "auto", grouped where it fits, else fused.
    """
    fast.check_impl(impl, ("auto", "reference", "fused", "grouped"))
    x = to_autocast_dtype(x)
    if impl == "auto":
        impl = "grouped" if fast.grouped_matmul_fits(x, down) else "fused"
    if impl == "fused":
        return fast.Experts.apply(x, weight, gate_up, down, expert, torch.is_grad_enabled())
    gate_up = gate_up.to(x.dtype)
    down = down.to(x.dtype)
    if impl == "reference":
        return experts_reference(x, weight, gate_up, down, expert)
    return fast.experts_grouped(x, weight, gate_up, down, expert)


# --- python kernels.py ----------------------------------------------------------------------------
def values_and_gradients(fn, inputs, options, dtype):
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    out = fn(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]


def compare(name, twin, kernel, inputs, **options):
    """Print a kernel's error in float64, relative to the largest entry of the twin's tensor, and
    the shortest of 5 times in fp32 of both, each a forward and backward pass."""
    truth = values_and_gradients(twin, inputs, options, torch.float64)
    ours = values_and_gradients(kernel, inputs, options, torch.float64)
    gaps = []
    for expected, got in zip(truth, ours, strict=True):
        gap = (expected - got).abs().max()
        gaps.append(gap / expected.abs().max())
    error = torch.stack(gaps).max()  # unlike Python's max, NaN if any gap is NaN
    ms = []
    for fn in (twin, kernel):
        once = functools.partial(values_and_gradients, fn, inputs, options, torch.float32)
        seconds = timeit.repeat(once, number=1, repeat=5)
        ms.append(1e3 * min(seconds))
    twin_ms, kernel_ms = ms
    speed_up = twin_ms / kernel_ms
    print(f"{name:28}{error:9.0e}{twin_ms:9.1f}{kernel_ms:11.1f}{speed_up:9.1f}x")
    if not error < 1e-11:
        sys.exit(f"{name} differs from its reference")


def main():
    """Compare kernels with their twins; tests/test_kernels.py also has flex, grouped and masks."""
    torch.manual_seed(0)
    print(f"{'kernel':28}{'error':>9}{'twin ms':>9}{'kernel ms':>11}{'speed-up':>10}")
    q = torch.randn(2, 8, 512, 32)
    k = torch.randn(2, 2, 512, 32)
    v = torch.randn(2, 2, 512, 32)
    sdpa = functools.partial(attention, impl="sdpa")
    fused = functools.partial(attention, impl="fused")
    documents = (torch.arange(512) // 90).expand(2, 512)
    compare("attention sdpa", attention_reference, sdpa,
            (q, k, v))
    compare("attention fused", attention_reference, fused,
            (q, k, v))
    compare("attention fused, packed", attention_reference, fused,
            (q, k, v), segment_ids=documents)

    def in_chunks(fn):
        return lambda intra, successive, inter, k, v: fn((intra, successive, inter), k, v, 100)
    compare("dual_chunk_attention", in_chunks(dual_chunk_attention_reference),
            in_chunks(dual_chunk_attention), (q, q.flip(2), q.flip(3), k, v))
    hidden = torch.randn(1024, 128)
    head = torch.randn(8192, 128) / 8
    targets = torch.randint(8192, (1024,))
    compare("linear_cross_entropy", linear_cross_entropy_reference, linear_cross_entropy,
            (hidden, head), targets=targets)
    compare("token_logprobs", token_logprobs_reference, token_logprobs,
            (hidden, head), targets=targets)
    compare("rms_norm", rms_norm_reference, rms_norm,
            (hidden, head[0]), eps=1e-6)
    compare("swiglu", swiglu_reference, swiglu,
            (hidden, hidden.flip(0), head[:256]))
    weight, expert = torch.rand(1024, 15).topk(2)  # the last of 16 experts gets no token
    gate_up = torch.randn(16, 256, 128) / 8
    down = torch.randn(16, 128, 128) / 8
    compare("experts", experts_reference, experts,
            (hidden, weight, gate_up, down), expert=expert)


if __name__ == "__main__":
    main()
