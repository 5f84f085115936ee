"""The loss of a language model's head without its N x V logits.

kernels.linear_cross_entropy and kernels.token_logprobs call `chunked_nll`; their plain twins stand
in kernels.py. The rows (tokens) come in chunks, and the logits of a chunk come in tiles of columns:

    chunked_nll         drops the ignored rows; chooses the dtype and the chunk size
    ChunkedNLL          the autograd function: calls, for one chunk of rows after the other,
      forward_chunk       -log p of each row's target, by a running softmax over the tiles
      backward_chunk      the gradients of h and of the head's weight, tile by tile

Letters in shapes: N rows, n rows of one chunk; C hidden width; V vocabulary, v columns of one tile.
What is particular to CUDA is not yet measured on a GPU.
"""
import torch
from torch.autograd.function import once_differentiable

from lib.fast import add_matmul, fp32, matmul_fp32, maybe_compiled, to_autocast_dtype

TILE = 2**21  # logits in memory at a time: 8 to 32 MiB; on CUDA 64 times as many


def chunked_nll(hidden, weight, targets, *, want_sum, valid_vocab, temperature=1.0,
                ignore_index=-100, chunk_rows=None):
    """Return -log p of the targets, and the number of targets that count.

    The first is the sum over these targets with want_sum. Else it has the shape of targets and is 0
    where they are ignored. The other arguments are those of kernels.linear_cross_entropy.
    """
    if weight.dim() != 2 or hidden.shape != targets.shape + weight.shape[1:]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be targets' shape "
                         f"{tuple(targets.shape)} + (C,), and weight {tuple(weight.shape)} (V,C)")
    if valid_vocab is not None and valid_vocab < len(weight):
        weight = weight[:valid_vocab]  # a column that is never computed has probability 0
    h = hidden.flatten(0, -2)
    target = targets.flatten().long()
    supervised = (target != ignore_index).nonzero()[:, 0]
    if len(supervised) < len(target):
        h = h.index_select(0, supervised)
        target = target[supervised]
    in_range = ((target >= 0) & (target < len(weight))).all()
    if h.device.type != "cpu":  # without waiting for the GPU
        torch._assert_async(in_range, "a target is outside the vocabulary")
    elif not in_range:
        raise ValueError(f"targets span {target.min()}..{target.max()}; allowed are "
                         f"0..{len(weight) - 1} and {ignore_index} (ignored)")
    h = to_autocast_dtype(h)
    if not want_sum and not h.is_cuda:
        h = fp32(h)  # a CPU's bf16 product would round the log-probabilities
    chunk_rows, columns = tile_size(h, len(weight), chunk_rows)
    nll = ChunkedNLL.apply(h, weight, target[:, None], chunk_rows, columns, want_sum,
                           torch.is_grad_enabled(), 1 / temperature)
    if not want_sum:
        every_row = nll.new_zeros(targets.numel())
        nll = every_row.index_copy(0, supervised, nll).view(targets.shape)
    return nll, len(supervised)


def tile_size(h, vocab, chunk_rows):
    """Choose how many rows a chunk has, and how many columns a tile.

    On a CPU, up to 2^16 ids, the whole vocabulary is one tile, of 128 rows or more. Its
    probabilities are then kept from the forward pass to the gradient, which helps while they stay
    in cache. Above, 1024 rows in tiles are faster than fewer whole rows (docs/LOG.md, "cuts, a
    tokenizer that had learned JSON"). On CUDA, any vocabulary up to 2^22 is one tile; a guess.
    """
    tile = TILE * (64 if h.is_cuda else 1)
    if not chunk_rows:
        chunk_rows = max(128, tile // vocab) if 128 * vocab <= 4 * tile else 1024
    chunk_rows = min(chunk_rows, max(1, len(h)))
    columns = vocab if chunk_rows * vocab <= 4 * tile else max(1, tile // chunk_rows)
    if h.is_cuda:  # each row begins at 16 bytes, as tensor cores want it, also at V 151,665
        columns = max(8, columns // 8 * 8)
    return chunk_rows, columns


# --- one tile: the two functions that torch.compile may get ---------------------------------------
def forward_tile(h, weight, target, running, scale):
    """Fold one tile of logits into the running softmax of each row (FlashAttention, Dao et al.
    2022, arXiv 2205.14135, section 3.1).

    h (n,C); weight (v,C); target (n,1): the target's column, which lies outside 0..v-1 if another
    tile has it. running, of all logits so far: the maximum m, the sum l of exp(logit - m), and the
    target's logit, (n,1) each. scale: 1 / temperature. With this tile's logits s:
        m' = max(m, max s),    l' = l exp(m - m') + sum exp(s - m')
    Returns the new `running`, and exp(s - m') (n,v).
    """
    running_max, running_sum, target_logit = running
    logits = scaled_logits(h, weight.to(h.dtype), scale)
    column = target.clamp(0, len(weight) - 1)
    target_logit = torch.where(column == target, logits.gather(1, column), target_logit)
    new_max = torch.maximum(running_max, logits.amax(-1, keepdim=True))
    exps = logits.sub_(new_max).exp_()  # in the memory of the logits
    rescaled_sum = running_sum * (running_max - new_max).exp()
    running_sum = rescaled_sum + exps.sum(-1, keepdim=True)
    return (new_max, running_sum, target_logit), exps


def scaled_logits(h, weight, scale):
    """Return the logits of h in fp32, divided after the product, as the sampler does."""
    logits = matmul_fp32(h, weight.mT)
    return logits if scale == 1 else logits.mul_(scale)


def backward_tile(h, weight, target, running, scale, exps):
    """Return l times the gradient of one tile's logits (n,v), in the dtype of h.

    That gradient is p - (1 at the target), where p = exp(logit - m) / l, with m and l as in
    forward_tile after the last tile. exp(logit - (m + log l)) would be p at once, but at logits of
    1e4 the sum in brackets is rounded to 5e-4.
    exps: exp(logit - m), if forward_tile's is still there; None: it is computed again.
    """
    row_max, row_sum, _ = running
    if exps is None:
        exps = scaled_logits(h, weight, scale).sub_(row_max).exp_()
    column = target.clamp(0, len(weight) - 1)
    sum_at_target = row_sum * (column == target)
    dlogits = exps.scatter_add_(1, column, -sum_at_target)
    return dlogits.to(h.dtype)


# --- one chunk of rows ----------------------------------------------------------------------------
def forward_chunk(h, target, weight, columns, scale):
    """Return `running` of forward_tile for rows h (n,C) after the last tile, and exps of
    backward_tile if there is only one tile, else None."""
    fold_tile = maybe_compiled(forward_tile)
    zero = torch.zeros_like(fp32(h[:, :1]))
    running = (zero - 1e30, zero, zero)  # the maximum of nothing; -inf could give NaN
    for first in range(0, len(weight), columns):
        tile = weight[first:first + columns]
        running, exps = fold_tile(h, tile, target - first, running, scale)
    return running, exps if columns >= len(weight) else None


def backward_chunk(h, target, weight, columns, running, scale, exps, upstream, dweight):
    """Return the gradient of rows h (n,C), and add to dweight (V,C) unless it is None:
        dh = f dlogits weight,    dweight += dlogits^T (f h),    f = scale upstream / l

    running, exps: what forward_chunk returned; exps may be None. upstream: the gradient of the loss
    with respect to -log p of each row, (n,1) fp32, or one number for all.
    """
    # Compiled, a tile that changes its argument exps in place would copy it twice.
    differentiate = maybe_compiled(backward_tile) if exps is None else backward_tile
    row_sum = running[1]
    factor = scale * upstream / row_sum
    dh = torch.zeros_like(fp32(h))
    h_scaled = (h * factor).to(h.dtype)
    for first in range(0, len(weight), columns):
        tile = weight[first:first + columns].to(h.dtype)
        dlogits = differentiate(h, tile, target - first, running, scale, exps)  # times l
        add_matmul(dh, dlogits, tile)
        if dweight is not None:
            add_matmul(dweight[first:first + columns], dlogits.mT, h_scaled)
    return dh.mul_(factor).to(h.dtype)


# --- all rows -------------------------------------------------------------------------------------
class ChunkedNLL(torch.autograd.Function):
    """-log p of each row's target, where p = softmax(scale h weight^T), or their sum.

    h (N,C), weight (V,C), target (N,1). There are two ways to the gradient.
    The sum: the upstream gradient is one number for all rows, so it can be multiplied in later. The
    forward pass computes each chunk's gradient at once, by 3 matrix products where probabilities
    are kept, else 4 (Liger Kernel, arXiv 2410.10989).
    Single values: the upstream gradient differs from row to row and is known only in the backward
    pass, which therefore computes p again, by 4 products in all.
    """

    @staticmethod
    def forward(ctx, h, weight, target, chunk_rows, columns, want_sum, grad_enabled, scale):
        gradient_now = want_sum and grad_enabled and any(ctx.needs_input_grad)
        ctx.sizes = chunk_rows, columns, scale
        ctx.want_sum = want_sum
        ctx.running = []
        if not want_sum:
            ctx.save_for_backward(h, weight, target)
        dweight = zero_gradient(weight) if gradient_now and ctx.needs_input_grad[1] else None
        weight = cast_if_small(weight, h, columns)
        nll = []
        dh = []
        # Without detach, forward_tile would be compiled once more for training. Without any row,
        # split gives one empty chunk.
        chunks = zip(h.detach().split(chunk_rows), target.split(chunk_rows), strict=True)
        with torch.autocast(h.device.type, enabled=False):
            for h_chunk, target_chunk in chunks:
                running, exps = forward_chunk(h_chunk, target_chunk, weight, columns, scale)
                row_max, row_sum, target_logit = running
                # In this order: the logits' difference is exact where their size would swallow the
                # logarithm.
                nll.append((row_max - target_logit) + row_sum.log())
                if gradient_now:
                    gradient = backward_chunk(h_chunk, target_chunk, weight, columns, running,
                                              scale, exps, 1.0, dweight)
                    dh.append(gradient)
                elif not want_sum:
                    ctx.running.append(running)
                del exps  # the next chunk's go into its memory
        nll = torch.cat(nll)[:, 0]
        if not want_sum:
            return nll
        ctx.gradients = (torch.cat(dh), dweight) if gradient_now else None
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.want_sum:
            if ctx.gradients is None:
                raise RuntimeError("this loss goes backward once: its gradient is scaled in place")
            dh, dweight = ctx.gradients
            ctx.gradients = None
            dh.mul_(upstream)
            if dweight is not None:
                dweight.mul_(upstream)
            return dh, dweight, None, None, None, None, None, None
        h, weight, target = ctx.saved_tensors
        chunk_rows, columns, scale = ctx.sizes
        dweight = zero_gradient(weight) if ctx.needs_input_grad[1] else None
        weight = cast_if_small(weight, h, columns)
        dh = []
        chunks = zip(h.split(chunk_rows), target.split(chunk_rows), ctx.running,
                     upstream[:, None].split(chunk_rows), strict=True)
        with torch.autocast(h.device.type, enabled=False):
            for h_chunk, target_chunk, running, upstream_chunk in chunks:
                gradient = backward_chunk(h_chunk, target_chunk, weight, columns, running, scale,
                                          None, upstream_chunk, dweight)
                dh.append(gradient)
        return torch.cat(dh), dweight, None, None, None, None, None, None


def zero_gradient(weight):
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def cast_if_small(weight, h, columns):
    """Return the head's weight as tiles read it. A CPU casts each tile of a large one in cache."""
    return weight.to(h.dtype) if h.is_cuda or columns >= len(weight) else weight
