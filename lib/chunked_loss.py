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
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lib.fast import add_matmul, fp32, matmul_fp32, maybe_compiled, to_autocast_dtype

TILE = 2**21  # logits in memory at a time: 8 MiB; on CUDA 64 times as many


class Options(NamedTuple):
    inv_temperature: float
    chunk_rows: int    # rows per chunk
    columns: int       # columns per tile


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
    options = choose_options(h, len(weight), targets.numel(), chunk_rows, temperature)
    nll = ChunkedNLL.apply(h, weight, target[:, None], options, want_sum, torch.is_grad_enabled())
    if not want_sum:
        every_row = nll.new_zeros(targets.numel())
        nll = every_row.index_copy(0, supervised, nll).view(targets.shape)
    return nll, len(supervised)


def choose_options(h, vocab, all_rows, chunk_rows, temperature):
    """Choose how many rows a chunk has, and how many columns a tile.

    Up to 2^16 ids, the whole vocabulary is one tile. Its probabilities can then be kept from the
    forward pass to the gradient, which on a CPU helps while they stay in cache. Of 64 to 4096 rows,
    the best are 512 at V 4096 and 128 at V 32,000; from V 2^16 on keeping never helps.
    A chunk is never larger than all rows together, ignored ones included. Rows of one constant
    shape thus fill their chunk, which is the condition for compiling it.
    """
    tile = TILE * (64 if h.is_cuda else 1)  # CUDA: a guess
    if not chunk_rows:
        one_tile = 128 * vocab <= 4 * tile
        chunk_rows = max(128, tile // vocab) if one_tile else 1024
    chunk_rows = max(1, min(chunk_rows, all_rows))
    columns = vocab if chunk_rows * vocab <= 4 * tile else max(1, tile // chunk_rows)
    return Options(1.0 / temperature, chunk_rows, columns)


def prepare_weight(h, weight, options, want_dweight):
    """Return the head's weight (V,C) as tiles read it, and its gradient: fp32 zeros, or None."""
    dweight = None
    if want_dweight:
        dweight = torch.zeros_like(weight, dtype=torch.promote_types(h.dtype, torch.float32))
    if options.columns >= len(weight):
        weight = weight.to(h.dtype)  # it is small; else each tile is cast when it is in cache
    return weight, dweight


# --- one tile: the two functions that torch.compile may get ---------------------------------------
def forward_tile(h, weight, target, running_max, running_sum, target_logit, inv_temperature):
    """Fold one tile of logits into the running softmax of each row (FlashAttention, Dao et al.
    2022, arXiv 2205.14135, section 3.1).

    h (n,C); weight (v,C); target (n,1): the target's column, which lies outside 0..v-1 if another
    tile has it. Of all logits so far, the state holds the maximum m, the sum l of exp(logit - m),
    and the target's logit, (n,1) each. With this tile's logits s:
        m' = max(m, max s),    l' = l exp(m - m') + sum exp(s - m')
    Returns the new state and exp(s - m') (n,v).
    """
    logits = matmul_fp32(h, weight.to(h.dtype).mT)
    if inv_temperature != 1:
        logits.mul_(inv_temperature)
    column = target.clamp(0, len(weight) - 1)
    is_here = column == target
    target_logit = torch.where(is_here, logits.gather(1, column), target_logit)
    new_max = torch.maximum(running_max, logits.amax(-1, keepdim=True))
    exps = logits.sub_(new_max).exp_()  # in the memory of the logits
    rescaled_sum = running_sum * (running_max - new_max).exp()
    running_sum = rescaled_sum + exps.sum(-1, keepdim=True)
    return new_max, running_sum, target_logit, exps


def backward_tile(h, weight, target, row_max, row_sum, exps, h_scaled, dh, dweight,
                  inv_temperature):
    """Add one tile's part of the gradients to dh (n,C) and, unless it is None, dweight (v,C).

    The gradient of the logits is p - (1 at the target), where p = exp(logit - m) / l, with m and l
    as in forward_tile after the last tile: row_max and row_sum (n,1). We compute l times it:
        dlogits = exp(logit - m) - (l at the target)
        dh += dlogits weight,    dweight += dlogits^T h_scaled
    h_scaled is h times the factor upstream gradient / (temperature l). The caller multiplies dh by
    the same factor at the end. exp(logit - (m + log l)) would be p at once, but at logits of 1e4
    the sum in brackets is rounded to 5e-4.
    exps: exp(logit - m), if forward_tile's is still there; None: it is computed again.
    """
    weight = weight.to(h.dtype)
    if exps is None:
        logits = matmul_fp32(h, weight.mT)
        if inv_temperature != 1:
            logits.mul_(inv_temperature)
        exps = logits.sub_(row_max).exp_()
    column = target.clamp(0, len(weight) - 1)
    sum_at_target = row_sum * (column == target)
    dlogits = exps.scatter_add_(1, column, -sum_at_target).to(h.dtype)
    add_matmul(dh, dlogits, weight)
    if dweight is not None:
        add_matmul(dweight, dlogits.mT, h_scaled)


# --- one chunk of rows ----------------------------------------------------------------------------
def forward_chunk(h, target, weight, options):
    """Return, for rows h (n,C), -log p (n,1), their softmax's maximum and sum (n,2), and exps of
    backward_tile if there is only one tile, else None."""
    # Only a full chunk is compiled: every other length would compile once more.
    fold_tile = maybe_compiled(forward_tile, len(h) == options.chunk_rows)
    row_sum = torch.zeros_like(fp32(h[:, :1]))
    target_logit = row_sum
    row_max = row_sum - 1e30
    for first in range(0, len(weight), options.columns):
        tile = weight[first:first + options.columns]
        row_max, row_sum, target_logit, exps = fold_tile(
            h, tile, target - first, row_max, row_sum, target_logit, options.inv_temperature)
    # In this order: the logits' difference is exact where their size would swallow log(row_sum).
    nll = (row_max - target_logit) + row_sum.log()
    return nll, torch.cat((row_max, row_sum), 1), exps if len(tile) == len(weight) else None


def backward_chunk(h, target, softmax_state, exps, upstream, weight, dweight, options):
    """Return the gradient of rows h (n,C), and add to dweight (V,C) unless it is None.

    softmax_state, exps: what forward_chunk returned; exps may be None. upstream: the gradient of
    the loss with respect to -log p of each row, (n,1) fp32, or one number for all.
    """
    add_tile = maybe_compiled(backward_tile, len(h) == options.chunk_rows)
    row_max, row_sum = softmax_state.split(1, dim=1)
    factor = upstream * options.inv_temperature / row_sum
    dh = torch.zeros_like(fp32(h))
    h_scaled = (h * factor).to(h.dtype)
    for first in range(0, len(weight), options.columns):
        tile = slice(first, first + options.columns)
        dtile = None if dweight is None else dweight[tile]
        add_tile(h, weight[tile], target - first, row_max, row_sum, exps,
                 h_scaled, dh, dtile, options.inv_temperature)
    return dh.mul_(factor).to(h.dtype)


# --- all rows -------------------------------------------------------------------------------------
class ChunkedNLL(torch.autograd.Function):
    """-log p of each row's target, where p = softmax(h weight^T / temperature), or their sum.

    h (N,C), weight (V,C), target (N,1). There are two ways to the gradient.
    The sum: the upstream gradient is one number for all rows, so it can be multiplied in later. The
    forward pass computes each chunk's gradient at once, by 3 matrix products where probabilities
    are kept, else 4 (Liger Kernel, arXiv 2410.10989).
    Single values: the upstream gradient differs from row to row and is known only in the backward
    pass, which therefore computes p again, by 4 products in all.
    """

    @staticmethod
    def forward(ctx, h, weight, target, options, want_sum, grad_enabled):
        ctx.options = options
        ctx.want_sum = want_sum
        gradient_now = want_sum and grad_enabled and any(ctx.needs_input_grad)
        want_dweight = gradient_now and ctx.needs_input_grad[1]
        nll = []
        softmax_state = []
        dh = []
        with torch.autocast(h.device.type, enabled=False):
            tile_weight, dweight = prepare_weight(h, weight, options, want_dweight)
            # Without any row, split gives one empty chunk. Without detach the chunks would want a
            # gradient in training only, and forward_tile would be compiled once more for this.
            h_chunks = h.detach().split(options.chunk_rows)
            chunks = zip(h_chunks, target.split(options.chunk_rows), strict=True)
            for h_chunk, target_chunk in chunks:
                chunk_nll, chunk_state, exps = forward_chunk(
                    h_chunk, target_chunk, tile_weight, options)
                nll.append(chunk_nll)
                softmax_state.append(chunk_state)
                if gradient_now:
                    dh.append(backward_chunk(
                        h_chunk, target_chunk, chunk_state, exps, 1.0, tile_weight, dweight,
                        options))
                del exps  # the next chunk's go into its memory
        if want_sum:
            ctx.gradients = (torch.cat(dh), dweight) if gradient_now else None
            return torch.cat(nll).sum()
        ctx.save_for_backward(h, weight, target, torch.cat(softmax_state))
        return torch.cat(nll)[:, 0]

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
            return dh, dweight, None, None, None, None
        h, weight, target, softmax_state = ctx.saved_tensors
        dh = []
        with torch.autocast(h.device.type, enabled=False):
            tile_weight, dweight = prepare_weight(
                h, weight, ctx.options, ctx.needs_input_grad[1])
            rows = (h, target, softmax_state, upstream[:, None])
            chunks = zip(*[x.split(ctx.options.chunk_rows) for x in rows], strict=True)
            for h_chunk, target_chunk, chunk_state, chunk_upstream in chunks:
                dh.append(backward_chunk(
                    h_chunk, target_chunk, chunk_state, None, chunk_upstream, tile_weight,
                    dweight, ctx.options))
        return torch.cat(dh), dweight, None, None, None, None
