"""What only makes kernels.py fast: skip this file on the first evening.

It holds the helpers for precision and autocast, the choice of a CPU's library for matrix products,
the calls of PyTorch's attention kernel, and the handwritten backward passes of RMSNorm, SwiGLU and
experts. Their plain twins are in kernels.py, which also explains the letters in shapes. CUDA paths
are not yet measured on a GPU.
"""
import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

EXPERT_ROWS = 16  # each expert multiplies a multiple of this many rows


# --- arguments ------------------------------------------------------------------------------------
def check_impl(impl, allowed):
    if impl not in allowed:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(allowed)}")


# --- precision and shapes -------------------------------------------------------------------------
def fp32(x):
    """Return x in float32, but leave float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def to_autocast_dtype(x):
    """Cast x as torch.autocast would if it is on. The kernels then turn autocast off, because it
    would also round their sums."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return x


def matmul_fp32(a, b):
    """Return a @ b in fp32. In bf16, CUDA sums and returns fp32; a CPU first rounds to bf16."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return fp32(a @ b)


def add_matmul(total, a, b):
    """Add a @ b to total in place. torch.compile fails on addmm's out_dtype (its issue 163880)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(fp32(a @ b))


def fold_groups(x, Hkv):
    """(B,Hq,T,D) -> (B,Hkv,T*G,D): row tG + g is query t of head g in its group. Grouped attention
    becomes plain attention with G times the queries, and dk and dv sum over heads by themselves."""
    return x.unflatten(1, (Hkv, -1)).transpose(2, 3).flatten(2, 3)


def unfold_groups(x, T):
    """(B,Hkv,T*G,D) -> (B,Hq,T,D), the inverse of fold_groups."""
    return x.unflatten(2, (T, -1)).transpose(2, 3).flatten(1, 2)


# --- libraries and compiler -----------------------------------------------------------------------
compile_kernels = False  # what kernels.set_default_impl chose


def maybe_compiled(fn):
    """Return fn, compiled for any shapes where set_default_impl asked for it, but not to sample."""
    wanted = compile_kernels and not torch.is_inference_mode_enabled()
    return compiled(fn, dynamic=True) if wanted else fn


@functools.cache
def compiled(fn, dynamic):
    return torch.compile(fn, dynamic=dynamic, fullgraph=True)


@functools.cache
def medium_is_exact():
    """Try whether this CPU multiplies in full fp32 at "medium" precision, rather than in bf16."""
    x = torch.full((256, 256), 1 + 2.0 ** -12, device="cpu")  # becomes 1 in bf16 and in TF32
    with matmul_precision("medium"):
        return torch.equal(x @ torch.eye(256, device="cpu"), x)


def set_cpu_matmul(rows, width, device, least=2**23):
    """Choose the library for a CPU's fp32 matrix products from now on: oneDNN or MKL.

    rows: tokens of the coming forward pass; width: the model's hidden width. oneDNN is chosen from
    rows * width^2 >= least. The choice lasts until the next call, because the backward pass follows
    its forward pass. On other devices this does nothing.

    MKL, torch's default, leaves AVX-512 unused on AMD, which is half of what a Zen 5 can do. torch
    uses oneDNN where "medium" precision permits bf16 products. oneDNN computes them in bf16 only
    with AMX units, so we take "medium" only where a trial shows that fp32 stays exact. oneDNN costs
    10-20 us per call and 500 us per new shape (docs/LOG.md, "oneDNN" and "captured"). Decoding
    repeats its shapes, so it passes a smaller `least`.
    """
    if device.type == "cpu":
        large = rows * width * width >= least
        torch.set_float32_matmul_precision("medium" if large and medium_is_exact() else "highest")


def keep_cpu_matmul():
    """Return the contexts of a block's first run and of its second one, for gradient checkpointing.
    The second keeps the library of the first, so that no bit changes."""
    return contextlib.nullcontext(), matmul_precision(torch.get_float32_matmul_precision())


@contextlib.contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:  # checkpointing leaves a block by an exception, as soon as it has what it needs
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- PyTorch's attention kernel -------------------------------------------------------------------
def sdpa(q, k, v, allowed, is_causal):
    """Return F.scaled_dot_product_attention of q (B,Hq,T,D) and k, v (B,Hkv,S,D), the same for all
    of its backends. allowed: bool (B|1,1,T,S) or None. is_causal: only if that is None, T == S.
    """
    empty = None
    if allowed is not None:
        # Trap: for a query without keys, backends return 0, NaN or the mean of v. We let it see
        # every key, and set its output to 0 below.
        empty = ~allowed.any(-1, keepdim=True)
        allowed = allowed | empty
    # enable_gqa reads shared kv heads in place: 2-20% faster on a CPU than repeating them. On CUDA
    # we repeat them for a mask or fp32, so that the memory-efficient backend can serve. That is our
    # expectation, not yet measured on a GPU.
    if q.is_cuda and (allowed is not None or q.dtype == torch.float32):
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[1])
    return out if empty is None else out.masked_fill(empty, 0.0)


# --- RMSNorm and SwiGLU ---------------------------------------------------------------------------
class RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps only its inputs for the backward pass.

    y = w n, where n = x r and r = (mean x^2 + eps)^(-1/2). The gradients are
        dw = sum over rows of dy n,    dx = r (w dy - n mean(w dy n)).
    Autograd would keep n and y in fp32, and a bf16 copy of y per matrix product that reads it. Here
    y is cast only once, so the gradients of its readers are summed in bf16 rather than in fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, twin):
        """x (...,C), weight (C,); twin(x, weight, eps) computes the value (...,C)."""
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return to_autocast_dtype(twin(x, weight, eps))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        width = dy.shape[-1]
        dy = fp32(dy)
        x_fp32 = fp32(x)
        norm = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
        r = norm.square_().div_(width).add_(ctx.eps).rsqrt_()
        n = x_fp32 * r
        dy_n = (n * dy).reshape(-1, width)
        with torch.autocast(dy.device.type, enabled=False):
            mean = (dy_n @ fp32(weight) / width).view(r.shape)
        dx = (dy * weight).sub_(n.mul_(mean)).mul_(r)
        dweight = dy_n.sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """y = (silu(gate) * up) weight^T, which keeps only its inputs for the backward pass.

    Autograd would also keep silu(gate), the product, and under autocast a copy of the weight. That
    is twice the memory; computing them again takes a hundredth of a training step.
    """

    @staticmethod
    def forward(ctx, gate, up, weight, twin):
        """gate, up (...,I), weight (C,I); twin(gate, up, weight) computes the value (...,C)."""
        ctx.save_for_backward(gate, up, weight)
        return twin(gate, up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        silu = F.silu(gate)
        dproduct = dy @ weight.to(dy.dtype)  # product = silu * up
        dgate = torch.ops.aten.silu_backward(dproduct * up, gate)
        dup = dproduct.mul_(silu)
        product = silu.mul_(up)
        dweight = dy.reshape(-1, len(weight)).mT @ product.reshape(-1, weight.shape[1])
        return dgate, dup, dweight.to(weight.dtype), None


# --- experts --------------------------------------------------------------------------------------
class Experts(torch.autograd.Function):
    """The loop of experts_reference, with lookups in place of scattered additions.

    The pairs (token, choice) are sorted by expert. index_select fetches the rows of one expert at a
    time. embedding_bag, a weighted sum of lookups, brings all results back to their tokens. For the
    backward pass we keep gate and up of each expert, as h (2I,rows): a contiguous gate makes silu
    twice as fast. Only one expert's weights at a time are cast to the dtype of x.

    A new number of rows is a new shape for oneDNN, which it would prepare in each of six products
    per expert and step, and keep. So each expert gets a multiple of 16 rows; for many tokens, of
    1/16 to 1/8 of an expert's mean share. The rows that belong to no pair hold token 0 with weight
    0.
    """

    @staticmethod
    def forward(ctx, x, weight, gate_up, down, expert, grad_enabled):
        chosen = expert.flatten()
        mean_share = len(chosen) // len(down)
        unit = EXPERT_ROWS << max(0, mean_share.bit_length() - 8)
        counts = torch.bincount(chosen, minlength=len(down))
        sizes = counts + -counts % unit
        first_row = sizes.cumsum(0) - sizes
        first_pair = counts.cumsum(0) - counts
        pair = torch.arange(len(chosen), device=x.device)  # token * A + choice
        order = chosen.argsort(stable=True)        # pairs by expert
        position = torch.empty_like(order)         # the row of each pair
        position[order] = pair
        position += (first_row - first_pair)[chosen]
        sizes = sizes.tolist()
        token = order.new_zeros(sum(sizes))        # the token of each row
        token[position] = pair // expert.shape[1]
        y = x.new_empty(len(token), x.shape[1])
        kept = []
        for rows, gate_up_e, down_e, y_e in zip(
                token.split(sizes), gate_up, down, y.split(sizes), strict=True):
            h = gate_up_e.to(x.dtype) @ x.index_select(0, rows).mT  # (2I,rows)
            gate, up = h.chunk(2)
            product = F.silu(gate).mul_(up)
            torch.mm(product.mT, down_e.to(x.dtype).mT, out=y_e)
            if grad_enabled:
                kept.append(h)
        ctx.sizes = sizes
        ctx.save_for_backward(x, weight, gate_up, down, position, token, *kept)
        return F.embedding_bag(position.view(expert.shape), y, mode="sum",
                               per_sample_weights=weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, gate_up, down, position, token, *kept = ctx.saved_tensors
        row_weight = x.new_zeros(len(token))
        row_weight[position] = weight.flatten().to(x.dtype)
        row_weights = row_weight.split(ctx.sizes)
        drow_weight = []
        dx = []                                    # one row per pair
        _, _, trains_gate_up, trains_down, _, _ = ctx.needs_input_grad  # LoRA freezes both
        dgate_up = torch.empty_like(gate_up) if trains_gate_up else None
        ddown = torch.empty_like(down) if trains_down else None
        for e, (rows, h) in enumerate(zip(token.split(ctx.sizes), kept, strict=True)):
            dy = dout.index_select(0, rows)
            gate, up = h.chunk(2)
            silu = F.silu(gate)
            product = silu * up
            dproduct = down[e].to(x.dtype).mT @ dy.mT  # the rows' weights follow below
            drow_weight.append((dproduct * product).sum(0))
            if trains_down:
                ddown[e] = dy.mT @ product.mul_(row_weights[e]).mT
            dproduct.mul_(row_weights[e])
            dh = torch.empty_like(h)
            dgate, dup = dh.chunk(2)
            torch.mul(dproduct, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(dproduct.mul_(up), gate, grad_input=dgate)
            if trains_gate_up:
                dgate_up[e] = dh @ x.index_select(0, rows)
            dx.append(dh.mT @ gate_up[e].to(x.dtype))
        position = position.view(weight.shape)
        dx = F.embedding_bag(position, torch.cat(dx), mode="sum")
        dweight = torch.cat(drow_weight)[position].to(weight.dtype)
        return dx, dweight, dgate_up, ddown, None, None


def grouped_matmul_fits(x, down):
    """Return whether experts_grouped can take x (N,C) and down (E,C,F): bf16 on CUDA,
    and row strides of 16 bytes. (On a CPU grouped_mm is a loop.)"""
    _, C, inner = down.shape
    aligned = C % 8 == 0 and inner % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and aligned


def experts_grouped(x, weight, gate_up, down, expert):
    """experts as one grouped matrix product over all experts, without a host sync."""
    chosen = expert.flatten()
    order = chosen.argsort(stable=True)
    token = order // expert.shape[1]
    every_expert = torch.arange(len(down), device=x.device)
    ends = torch.searchsorted(chosen[order], every_expert, right=True, out_int32=True)
    gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    y = y.index_select(0, order.argsort()).view(*expert.shape, -1)  # (N,A,C)
    return (y * weight[..., None].to(y.dtype)).sum(1)  # index_add would round A times, in any order
