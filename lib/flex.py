"""Attention of packed rows on a GPU: a rule in Python, which torch.compile turns into one kernel.

It uses PyTorch's FlexAttention (Dong et al. 2024, arXiv 2412.05496). The plain twin is
kernels.attention_reference with segment_ids. PyTorch has the gradient on a GPU only, where it is
not yet measured.
"""
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lib.fast import compiled

BLOCK = 128  # queries and keys per block, FlexAttention's default


def document_starts(segment_ids):
    """Return the position (B,T) int64 at which each token's document begins. A document is a run of
    equal ids."""
    is_first = torch.ones_like(segment_ids, dtype=torch.bool)
    is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return torch.where(is_first, position, 0).cummax(dim=1).values


def flex_block_mask(segment_ids):
    """Return FlexAttention's BlockMask of packed rows (B,T), without any (T,T) mask.

    It lists the blocks of keys that a block of queries must look at: those that all of its queries
    see in full, and those where `may_attend` decides each score. All other blocks are skipped."""
    T = segment_ids.shape[1]
    start = document_starts(segment_ids)

    def may_attend(b, head, query, key):
        return (key <= query) & (key >= start[b, query])

    first = torch.arange(0, T, BLOCK, device=start.device)  # of each block, (n,)
    end = first + BLOCK
    # Starts never decrease along a row: the first query of a block sees furthest back.
    furthest = start[:, None, first, None]                       # (B,1,n,1)
    nearest = start[:, None, (end - 1).clamp(max=T - 1), None]
    query_block = first[:, None]
    seen = (first <= query_block) & (end > furthest)             # (B,1,n,n)
    full = (first < query_block) & (first >= nearest) & (end[:, None] <= T)
    partial_count, partial_order = listed_blocks(seen & ~full)
    full_count, full_order = listed_blocks(full)
    return BlockMask.from_kv_blocks(partial_count, partial_order, full_count, full_order,
                                    BLOCK_SIZE=BLOCK, mask_mod=may_attend, seq_lengths=(T, T))


def listed_blocks(chosen):
    """Return how many of the key blocks chosen (B,1,n,n) each query block has, and their order."""
    count = chosen.sum(-1, dtype=torch.int32)
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)  # the chosen ones first
    return count, order.int()


def attention_flex(q, k, v, block_mask):
    """Return `attention` by FlexAttention, which torch.compile turns into one kernel."""
    compute = flex_attention
    if q.is_cuda:
        compute = compiled(flex_attention, dynamic=None)  # the second shape compiles for all others
    return compute(q, k, v, block_mask=block_mask, enable_gqa=True)
