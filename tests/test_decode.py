"""lib/decode.py: the decoding step equals the plain forward pass, and rows leave the batch in
sixteens."""
import warnings
from dataclasses import replace

import pytest
import torch
from test_sample import CONFIG, MOE, PROMPTS, STOPS, V, build, greedy, naive_greedy, prompts_of

import kernels
from lib import decode
from lib.decode import DecodeStep
from lib.long_context import extended
from lib.lora import add_lora
from model import KVCache
from sample import left_pad


@pytest.mark.parametrize("config", [
    CONFIG, MOE, extended(CONFIG, yarn=4.0), replace(CONFIG, chunk_size=12, local_size=4)],
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


def normalise_queries(block):
    block.self_attn.q_proj = torch.nn.Sequential(block.self_attn.q_proj, torch.nn.RMSNorm(32))


def squash_keys(block):
    block.self_attn.k_proj = torch.nn.Sequential(block.self_attn.k_proj, torch.nn.Tanh())


def drop_a_bias(block):
    block.self_attn.v_proj.bias = None


def other_mlp(block):
    block.mlp = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(),
                                    torch.nn.Linear(48, 32))


@pytest.mark.parametrize("hack, told", [
    (normalise_queries, 1), (squash_keys, 1), (drop_a_bias, 1), (other_mlp, 0)])
@torch.no_grad()
def test_a_hacked_block_decodes_as_its_forward_pass_says(hack, told):
    """What the step does not know sends it to the plain forward pass, which is said once. An MLP of
    any kind is called as it is."""
    model = build(CONFIG)
    for block in model.model.layers:
        hack(block)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("default")
        batch = greedy(model, PROMPTS, stop_ids=STOPS)
        assert [c.ids for c in greedy(model, PROMPTS, stop_ids=STOPS)] == [c.ids for c in batch]
    assert [c.ids for c in batch] == [naive_greedy(model, p, 16, STOPS) for p in PROMPTS]
    assert len(messages) == told and all("does not expect" in str(m.message) for m in messages)


@torch.no_grad()
def test_a_large_model_is_not_copied(monkeypatch):
    """Its own weights give the same tokens; casts and adapters still need the copies."""
    model = build(CONFIG)
    want = greedy(model, PROMPTS, stop_ids=STOPS)
    monkeypatch.setattr(decode, "LARGE", 100)
    step = DecodeStep(model, KVCache(CONFIG, 8, 4, "cpu", torch.float32))
    assert step.blocks == [] and step.head.data_ptr() == model.head_weight.data_ptr()
    assert [c.ids for c in greedy(model, PROMPTS, stop_ids=STOPS)] == [c.ids for c in want]
    assert DecodeStep(model, KVCache(CONFIG, 8, 4, "cpu", torch.bfloat16)).blocks
    add_lora(model, 2, 4.0)
    assert DecodeStep(model, KVCache(CONFIG, 8, 4, "cpu", torch.float32)).blocks


@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_the_samplers_logits_are_the_trainers(bf16):
    """In float32, also under autocast: rounded logits were off by 0.03 nats per token."""
    model = build(CONFIG)
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        step = DecodeStep(model, KVCache(CONFIG, 8, 4, "cpu", dtype))
        hidden = model.hidden(torch.arange(8)[:, None])[:, 0]
        logits = step.logits(hidden)
        targets = torch.arange(8) * 3
        want = kernels.token_logprobs(hidden, model.head_weight, targets)
    assert logits.dtype == torch.float32
    got = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
