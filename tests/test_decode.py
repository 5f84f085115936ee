"""lib/decode.py: the decoding step equals the plain forward pass, and rows leave the batch in
sixteens."""
from dataclasses import replace

import pytest
import torch
from test_sample import CONFIG, MOE, PROMPTS, STOPS, V, build, greedy, prompts_of

from lib.decode import DecodeStep
from model import KVCache
from sample import left_pad


@pytest.mark.parametrize("config", [
    CONFIG, MOE, CONFIG.extended(yarn=4.0), replace(CONFIG, chunk_size=12, local_size=4)],
    ids=["dense", "moe", "yarn", "dual chunk"])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@torch.inference_mode()
def test_a_decoding_step_equals_the_plain_forward_pass(config, pads, bf16):
    """Hidden states and the cache, five tokens on, and with rows dropped on the way; with memory
    that nobody wrote to being NaN."""
    model, hidden, caches = build(config), [], []
    ids, padding = left_pad(PROMPTS if pads else prompts_of(*[9] * 8), "cpu")
    assert bool(padding.any()) == pads
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for fast in (False, True):
            cache = KVCache(config, len(ids), ids.shape[1] + 5, "cpu", dtype, padding)
            for layer in cache.layers:
                layer.fill_(torch.nan)
            model.hidden(ids, cache=cache)
            step, rows = DecodeStep(model, cache), []
            for token in range(5):
                new = torch.arange(cache.layers[0].shape[1]) * 7 % V + token
                rows.append(step(new) if fast else
                            model.hidden(new[:, None], cache=cache)[:, -1])
                if token in (2, 3):
                    cache.select(torch.tensor([5, 0, 2] if token == 2 else [2, 0, 0]))
            hidden.append(rows)
            caches.append(cache)
    tol = 2e-2 if bf16 else 1e-5
    for rows, cache in zip(hidden[1:], caches[1:], strict=True):
        for a, b in zip(hidden[0], rows, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)
        assert cache.length == caches[0].length == ids.shape[1] + 5
        torch.testing.assert_close(caches[0].layers, cache.layers, rtol=tol, atol=tol)


def test_large_batches_shrink_in_sixteens(monkeypatch):
    """And the rows that fill up the last sixteen, finished ones, get nothing more."""
    model, kept, select = build(CONFIG), [], KVCache.select
    monkeypatch.setattr(KVCache, "select", lambda self, rows: kept.append(len(rows)) or
                        select(self, rows))
    prompts = prompts_of(*range(1, 91))
    batch = greedy(model, prompts, stop_ids=STOPS)
    assert len(kept) > 2 and all(n % 16 == 0 or n <= 16 for n in kept)
    assert [c.ids for c in batch] == [greedy(model, [p], stop_ids=STOPS)[0].ids for p in prompts]
