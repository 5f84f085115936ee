"""Attention beyond the training length: dual chunk attention and its plain twin.

Positions are cut into chunks. Distances within a chunk and to the previous chunk are exact; all
older keys get one capped distance, so that no distance is longer than in training (Dual Chunk
Attention, An et al. 2024, arXiv 2402.17463). model.dual_chunk_plan rotates the queries accordingly.
Letters in shapes: B batch, T queries, S keys, D head width, Hq/Hkv query/kv heads, G = Hq/Hkv.
"""
import torch

from lib.fast import fold_groups, fp32, to_autocast_dtype, unfold_groups

MAX_SCORES = 2**24  # scores in memory at a time: 64 MiB; on CUDA 64 times as many


def dual_chunk_attention_reference(q, k, v, chunk):
    """Return dual_chunk_attention with all scores of all three kinds in memory."""
    _, Hq, T, D = q[0].shape
    _, Hkv, S, _ = k.shape
    k_ = fp32(k).repeat_interleave(Hq // Hkv, dim=1)  # (B,Hq,S,D)
    v_ = fp32(v).repeat_interleave(Hq // Hkv, dim=1)
    scores = []
    for query in q:
        scores.append(fp32(query) @ k_.mT * D ** -0.5)
    intra, successive, inter = scores
    position = torch.arange(S, device=k.device)
    i = position[S - T:, None]  # of the queries
    j = position                # of the keys
    chunks_apart = i // chunk - j // chunk
    scores = torch.where(chunks_apart == 1, successive, inter)
    scores = torch.where(chunks_apart == 0, intra, scores)
    scores = scores.masked_fill(i < j, -torch.inf)
    probs = scores.softmax(-1)
    return (probs @ v_).to(q[0].dtype)


def dual_chunk_attention(q, k, v, chunk, *, pads=None):
    """Return causal attention whose positions depend on how many chunks lie between query and key.

    q: three tensors (B,Hq,T,D), the same queries rotated in three ways: for keys of their own chunk
    (intra), of the previous chunk (successive), and of all older chunks (inter).
    k, v (B,Hkv,S,D): each key is rotated by its position within its chunk. chunk: tokens per chunk.
    The queries are the last T of the S positions. pads: the number of left-padding columns of each
    row, which count neither as keys nor as positions.
    Returns (B,Hq,T,D) in the dtype of q, by one fp32 softmax over the three groups of keys. Memory
    is O(S), because only a block of queries at a time sees all keys.
    """
    B, _, T, _ = q[0].shape
    S = k.shape[2]
    out = torch.zeros_like(q[0])
    q = [to_autocast_dtype(query) for query in q]
    k = fp32(to_autocast_dtype(k))
    v = fp32(to_autocast_dtype(v))
    with torch.autocast(k.device.type, enabled=False):
        for b, pad in enumerate(pads or [0] * B):
            row = slice(b, b + 1)
            keys = k[row, :, pad:]
            values = v[row, :, pad:]
            length = S - pad
            first = max(0, T - length)  # the row's first query that is no padding
            queries = [query[row, :, first:] for query in q]
            row_out = one_row(queries, keys, values, chunk)
            out[row, :, first:] = row_out
    return out


def one_row(q, k, v, chunk):
    """Return dual_chunk_attention of a single row, a block of queries at a time; k, v are fp32."""
    intra, successive, inter = q
    _, Hq, T, D = intra.shape
    _, Hkv, S, _ = k.shape
    scores_per_query = max(1, Hq * S)
    most = MAX_SCORES * (64 if k.is_cuda else 1)
    block = max(1, most // scores_per_query)
    offset = S - T
    start = offset
    out = torch.zeros_like(intra, dtype=k.dtype)
    while start < S:
        intra_start = start // chunk * chunk  # the chunk of these queries
        successive_start = max(0, intra_start - chunk)
        end = min(S, intra_start + chunk, start + block)
        queries = slice(start - offset, end - offset)
        groups = (
            (inter, 0, successive_start),
            (successive, successive_start, intra_start),
            (intra, intra_start, end),
        )
        scores = []
        for query, first_key, last_key in groups:
            rows = query[:, :, queries]
            rows = fp32(fold_groups(rows, Hkv))  # (1,Hkv,n*G,D)
            keys = k[:, :, first_key:last_key]
            scores.append(rows @ keys.mT)
        scores = torch.cat(scores, dim=-1)
        scores = scores * D ** -0.5
        i = torch.arange(start, end, device=k.device)
        i = i.repeat_interleave(Hq // Hkv)
        j = torch.arange(end, device=k.device)
        scores = scores.masked_fill(i[:, None] < j, -torch.inf)
        probs = scores.softmax(-1)
        block_out = probs @ v[:, :, :end]
        out[:, :, queries] = unfold_groups(block_out, end - start)
        start = end
    return out
