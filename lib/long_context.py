"""Beyond the training length, without training: YaRN and dual chunk attention (report, 3.3).

YaRN slows the rotation of those pairs that never turned fully in training. Dual chunk attention
(An et al. 2024, arXiv 2402.17463) keeps RoPE's frequencies and cuts positions into chunks.
Distances within a chunk are exact, and so are those from the first queries of a chunk to the chunk
before. For all other keys the query's position is capped, so that no distance is longer than in
training. Both are switched on by `extended`.

Letters in shapes: B batch, T queries, S keys, D head width, Hq/Hkv query/kv heads, G = Hq/Hkv.
"""
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from lib.args import require
from lib.fast import fold_groups, fp32, to_autocast_dtype, unfold_groups

MAX_SCORES = 2**24  # scores in memory at a time: 64 MiB; on CUDA 64 times as many


def extended(config, yarn: float = 1.0, dca: bool = False):
    """Return a model.Config for longer texts: by the factor `yarn` with YaRN, or 4 times with dual
    chunk attention, as in the report. local_size is then a quarter of the training length, as is
    typical in the DCA paper. The training length comes from the checkpoint, never from the caller,
    because YaRN over a wrong length would be silently wrong. A model that allows more positions
    than it was trained at keeps them. Raises InputError if the checkpoint has YaRN with another
    factor, or if max_position_embeddings is over 32768 and the training length is not recorded."""
    if yarn == 1 and not dca:
        return config
    require(config.yarn_factor in (1, yarn),
            f"config.json has YaRN with factor {config.yarn_factor:g}, so pass the same --yarn")
    length = config.trained_length
    require(config.original_max_position_embeddings or length <= 32768,
            f"config.json has {length} positions, but not the length of training: add "
            "original_max_position_embeddings (32768 for Qwen2.5)")
    reach = int(length * (4 if dca else yarn))
    positions = max(config.max_position_embeddings, reach)
    longer = replace(config, original_max_position_embeddings=length, yarn_factor=yarn,
                     max_position_embeddings=positions)
    if dca and not config.chunk_size:  # a checkpoint that names its own chunks keeps them
        longer = replace(longer, chunk_size=length, local_size=length // 4)
    return longer


# --- YaRN -----------------------------------------------------------------------------------------

def yarn(frequency, config):
    """Return RoPE's frequencies (D/2,) slowed for config.yarn_factor times the training length, and
    the factor 0.1 ln(yarn_factor) + 1 for cos and sin (Peng et al. 2023, sections 3.2-3.4).

    A pair that turns more than 32 times within the training length keeps its frequency; one that
    turns less than once is slowed by yarn_factor; pairs between are blended linearly in their
    index, as published code does. The factor scales q and k, so attention stays sharp."""
    D = config.head_dim

    def pair_that_turns(times):  # within the training length
        wavelength = config.trained_length / times  # solve 2 pi theta^(2i/D) = wavelength for i
        return D * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(32)), 0)
    high = min(math.ceil(pair_that_turns(1)), D - 1)  # as published, not D/2 - 1
    i = torch.arange(D // 2, dtype=torch.float32, device=frequency.device)
    slowed = ((i - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: kept, 1: fully slowed
    blended = frequency / config.yarn_factor * slowed + frequency * (1 - slowed)
    return blended, 0.1 * math.log(config.yarn_factor) + 1


# --- dual chunk attention -------------------------------------------------------------------------

class DualChunks(NamedTuple):
    """How dual chunk attention rotates queries (cos, sin), and where the chunks are."""
    intra: tuple             # rotation for keys of the query's own chunk
    successive: tuple        # rotation for keys of the chunk before
    inter: tuple             # rotation for keys of all older chunks
    chunk: int               # tokens per chunk
    pads: list[int] | None   # left padding per row


def dual_chunk_plan(positions, config, rope, pads=None) -> DualChunks:
    """Return the rotations, by model.rope, of queries at positions (B|1, T) (equations 2-7).

    With n = chunk_length, a key j is rotated by j mod n. A query i is rotated by i mod n for its
    own chunk (exact distances), by min(i mod n + n, chunk_size - 1) for the chunk before (exact for
    the first local_size queries), and by chunk_size - 1 for older chunks. We cap as the paper does;
    code serving Qwen2.5-1M caps at chunk_size.

    Beyond the training length, the attention logits are multiplied by the square of YaRN's
    m = 0.1 ln(length / training length) + 1 (Qwen2.5-1M report, length extrapolation). Our choice:
    the length is each query's own, i + 1, so that cached and uncached passes agree."""
    furthest = config.chunk_size - 1
    chunk = config.chunk_length
    within = positions % chunk
    m = 0.1 * ((positions + 1) / config.trained_length).clamp(min=1).log() + 1
    logit_scale = (m * m)[:, None, :, None]

    def rotation(query_positions):
        cos, sin = rope(query_positions, config)
        return cos * logit_scale, sin * logit_scale

    return DualChunks(
        intra=rotation(within),
        successive=rotation((within + chunk).clamp(max=furthest)),
        inter=rotation(torch.full_like(within, furthest)),
        chunk=chunk,
        pads=None if pads is None else pads.tolist())


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
            out[row, :, first:] = one_row(queries, keys, values, chunk)
    return out


def one_row(q, k, v, chunk):
    """Return dual_chunk_attention of a single row, a block of queries at a time; k, v are fp32."""
    intra, successive, inter = q
    _, Hq, T, D = intra.shape
    _, Hkv, S, _ = k.shape
    most = MAX_SCORES * (64 if k.is_cuda else 1)
    block = max(1, most // max(1, Hq * S))
    offset = S - T
    out = torch.zeros_like(intra, dtype=k.dtype)
    start = offset
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
