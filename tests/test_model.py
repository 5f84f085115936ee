"""model.py against two oracles: a loop over heads and tokens in float64, and invariances (cache,
packing, padding, save and load). The third, transformers: test_parity_model.py. R numbers:
docs/requirements.md."""
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kernels
import lib.fast
import model as M
from helpers import ENV
from lib.args import InputError
from model import PRESETS, Config, KVCache, MoE, Qwen2, load_balancing_loss

DENSE = Config(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
SPARSE = replace(DENSE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
                 shared_expert_intermediate_size=24)
CONFIGS = {
    "gqa": DENSE,
    "tied": replace(DENSE, tie_word_embeddings=True, rope_theta=10_000.0),
    "mha eps": replace(DENSE, num_key_value_heads=4, rms_norm_eps=1e-2),
    "mqa theta": replace(DENSE, num_key_value_heads=1, rope_theta=100.0),
    "moe": SPARSE,
    "moe norm_topk": replace(SPARSE, norm_topk_prob=True, tie_word_embeddings=True),
    "moe loop": replace(SPARSE, moe_intermediate_size=18, num_experts_per_tok=3),  # no grouped_mm
    "moe every 2nd": replace(SPARSE, decoder_sparse_step=2),
    "moe mlp_only": replace(SPARSE, mlp_only_layers=(1,)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def scramble(model, seed=0):
    """Weights that make every term visible: biases not 0, norms not 1, logits of order 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            center = 1.0 if p.ndim == 1 and "norm" in name else 0.0
            p.copy_(center + torch.randn(p.shape, generator=g) * (0.2 if p.ndim > 1 else 0.5))
    return model


def build(config, seed=0):
    return scramble(Qwen2(config), seed)


def random_ids(*shape, vocab=101, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---------------------------------------------------------------------------------------------
# the forward pass

def naive_logits(model, ids):
    """One sequence through the formulas of the report, in float64, head by head, token by token."""
    c, w = model.config, {k: v.detach().double() for k, v in model.state_dict().items()}
    D, G = c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def turn(x, t):  # x (D,): pair i with i + D/2, by the angle t * theta^(-2i/D)
        out = x.clone()
        for i in range(D // 2):
            a = torch.tensor(t * c.rope_theta ** (-2 * i / D), dtype=torch.float64)
            out[i] = x[i] * a.cos() - x[i + D // 2] * a.sin()
            out[i + D // 2] = x[i] * a.sin() + x[i + D // 2] * a.cos()
        return out

    def swiglu(x, gate, up, down):
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def mlp(x, p):
        return swiglu(x, *(w[f"{p}.{n}_proj.weight"] for n in ("gate", "up", "down")))

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        h = norm(x, p + ".input_layernorm")
        q, k, v = (linear(h, f"{p}.self_attn.{n}_proj").view(len(ids), -1, D) for n in "qkv")
        y = torch.zeros(len(ids), c.num_attention_heads, D, dtype=torch.float64)
        for t, head in itertools.product(range(len(ids)), range(c.num_attention_heads)):
            kv = head // G
            scores = torch.stack([turn(q[t, head], t) @ turn(k[s, kv], s) for s in range(t + 1)])
            y[t, head] = (scores / D ** 0.5).softmax(0) @ v[:t + 1, kv]
        x = x + linear(y.flatten(1), p + ".self_attn.o_proj")
        h = norm(x, p + ".post_attention_layernorm")
        if not c.is_sparse(layer):
            x = x + mlp(h, p + ".mlp")
            continue
        for t in range(len(ids)):
            probs = (h[t] @ w[p + ".mlp.gate.weight"].T).softmax(0)
            best = probs.argsort(descending=True)[:c.num_experts_per_tok]
            scale = probs[best].sum() if c.norm_topk_prob else 1.0
            for e in best.tolist():
                gate, up = w[p + ".mlp.experts.gate_up_proj"][e].chunk(2)
                down = w[p + ".mlp.experts.down_proj"][e]
                x[t] += probs[e] / scale * swiglu(h[t], gate, up, down)
        shared = linear(h, p + ".mlp.shared_expert_gate").sigmoid()
        x = x + shared * mlp(h, p + ".mlp.shared_expert")
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return norm(x, "model.norm") @ w[head].T


@every_config
def test_logits_equal_a_loop_over_heads_and_tokens(config):
    """R3.1 without transformers."""
    model, ids = build(config), random_ids(2, 7)
    logits = model(ids)
    assert logits.std() > 0.1  # else the tolerance below would say nothing
    for row, want in zip(ids, logits.double(), strict=True):
        close(naive_logits(model, row), want, 2e-5)


def test_rope_depends_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def score(t, s):
        cos, sin = M.rope(torch.tensor([[t, s]]), DENSE)
        return (M.apply_rope(q, cos[:, :, :1], sin[:, :, :1])
                * M.apply_rope(k, cos[:, :, 1:], sin[:, :, 1:])).sum()
    close(score(9, 4), score(25, 20))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_rope_stays_float32_and_matches_float64_far_out():
    """R3.5: also after model.bfloat16(), which turns position 15,962 into 15,936."""
    config = PRESETS["0.5B"]
    positions = torch.tensor([[15_962, 32_000]])
    cos, sin = M.rope(positions, config)
    assert cos.dtype == sin.dtype == torch.float32
    inv = config.rope_theta ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angle = (positions[0, :, None] * inv).repeat(1, 2)
    assert (cos[0, 0] - angle.cos()).abs().max() < 5e-3  # ulp(32,000) = 2e-3; bf16 is off by 2
    signs = torch.tensor([[-1.0], [1.0]]).repeat(1, 32).flatten()  # of the halves, for `rotate`
    assert (sin[0, 0] - angle.sin() * signs).abs().max() < 5e-3

    seen, attend = [], M.Attention.forward
    model = build(DENSE).bfloat16()

    def spy(self, x, cos, sin, **kwargs):
        seen.append((x.dtype, cos.dtype, sin.dtype))
        return attend(self, x, cos, sin, **kwargs)
    M.Attention.forward = spy
    try:
        model(random_ids(1, 5))
    finally:
        M.Attention.forward = attend
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    assert not [name for name, _ in model.named_buffers()]  # nothing for .bfloat16() to round


def test_bfloat16_is_near_float32():
    model, ids = build(DENSE), random_ids(2, 16)
    want = model(ids)
    got = model.bfloat16()(ids).float()
    assert ((got - want).norm() / want.norm()) < 0.05


# ---------------------------------------------------------------------------------------------
# cache, padding, packing

def compositions(n):
    """All ways to cut n positions into runs: 2^(n-1)."""
    for cuts in itertools.product((False, True), repeat=n - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        yield [b - a for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_cached_logits_equal_uncached_for_every_way_to_cut_a_prompt(name):
    """R3.2: prefill + decode, one by one, and chunked prefill."""
    model, ids = build(CONFIGS[name]), random_ids(2, 6)
    want = model(ids)
    with torch.no_grad():
        for sizes in compositions(6):
            cache = KVCache(model.config, 2, 9, "cpu", torch.float32)  # roomier than needed
            parts = [model(part, cache=cache) for part in ids.split(sizes, dim=1)]
            close(torch.cat(parts, 1), want)
            assert cache.length == 6


@torch.no_grad()
def test_left_padding_changes_no_logit_and_makes_no_nan():
    """R3.3, R3.4: a padding query sees nothing at all."""
    model, ids = build(DENSE), random_ids(1, 5)
    for chunk in (9, 3, 1):
        cache = KVCache(DENSE, 3, 9, "cpu", torch.float32, torch.tensor([4, 0, 8]))
        rows = torch.stack([F.pad(ids[0, :n], (9 - n, 0), value=7) for n in (5, 5, 1)])
        rows[1] = random_ids(9, seed=5)
        out = torch.cat([model(part, cache=cache) for part in rows.split(chunk, 1)], 1)
        assert out.isfinite().all()
        close(out[0, 4:], model(ids)[0])
        close(out[1], model(rows[1:2])[0])
        close(out[2, 8:], model(ids[:, :1])[0])


@torch.no_grad()
def test_positions_count_from_the_first_token(monkeypatch):
    """Of each row after left padding, of each packed document. Logits would not show it: RoPE
    sees distances only, until float32 runs out of digits."""
    seen, rope = [], M.rope
    monkeypatch.setattr(M, "rope", lambda p, config: seen.append(p.tolist()) or rope(p, config))
    model, ids = build(DENSE), random_ids(2, 5)
    model(ids)
    model(ids, segment_ids=torch.tensor([[4, 4, 4, 7, 7], [1, 2, 2, 3, 3]]))
    cache = KVCache(DENSE, 2, 9, "cpu", torch.float32, torch.tensor([0, 3]))
    model(ids, cache=cache)
    model(ids[:, :2], cache=cache)
    assert seen == [[[0, 1, 2, 3, 4]], [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]],
                    [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]], [[5, 6], [2, 3]]]


@torch.no_grad()
def test_cache_rows_can_be_dropped_and_repeated():
    model, ids = build(DENSE), random_ids(3, 6)
    cache = KVCache(DENSE, 3, 6, "cpu", torch.float32, torch.tensor([0, 2, 0]))
    rows = torch.tensor([1, 1, 2])
    model(ids[:, :4], cache=cache)
    cache.select(rows)
    out = model(ids[rows, 4:], cache=cache)
    close(out[0], model(ids[1:2, 2:])[0, 2:])
    close(out[1], out[0], 0)
    close(out[2], model(ids[2:])[0, 4:])


def test_cache_size_of_the_published_models():
    """bytes a token in bfloat16."""
    for name, size in {"0.5B": 12288, "1.5B": 28672, "3B": 36864, "7B": 57344}.items():
        cache = KVCache(PRESETS[name], 1, 10, "meta", torch.bfloat16)
        assert sum(layer.nbytes for layer in cache.layers) == 10 * size


@pytest.mark.parametrize("impl", ["sdpa", "fused", "reference"])
@torch.no_grad()
def test_packed_documents_equal_separate_ones(impl):
    """R8.6: positions restart, and changing one document leaves the others bit-equal."""
    old = kernels.set_default_impl(impl)
    try:
        model, ids = build(DENSE), random_ids(2, 12)
        segments = torch.tensor([[3, 3, 3, 3, 3, 5, 5, 9, 9, 9, 9, 9], [1] * 11 + [2]])
        packed = model(ids, segment_ids=segments)
        for row, a, b in ((0, 0, 5), (0, 5, 7), (0, 7, 12), (1, 0, 11), (1, 11, 12)):
            close(packed[row, a:b], model(ids[row:row + 1, a:b])[0])
        other = ids.clone()
        other[0, 5:7] += 1
        changed = model(other % 101, segment_ids=segments)
        assert torch.equal(changed[0, :5], packed[0, :5])
        assert torch.equal(changed[0, 7:], packed[0, 7:])
        assert not torch.allclose(changed[0, 5:7], packed[0, 5:7])
    finally:
        kernels.set_default_impl(*old)


# ---------------------------------------------------------------------------------------------
# sizes

@pytest.mark.parametrize("name, total, non_embedding", [
    ("0.5B", 494_032_768, 357_898_112), ("1.5B", 1_543_714_304, 1_310_340_608),
    ("3B", 3_085_938_688, 2_774_773_760), ("7B", 7_615_616_512, 6_525_621_760),
    ("14B", 14_770_033_664, 13_212_898_304), ("32B", 32_763_876_352, 31_206_740_992),
    ("72B", 72_706_203_648, 70_214_787_072)])
@pytest.mark.parity
def test_parameter_counts_of_the_dense_presets(name, total, non_embedding, compare):
    """As published."""
    with torch.device("meta"):
        counts = Qwen2(PRESETS[name]).count_parameters()
    compare("parameter counts of the presets", list(counts.values()),
            [total, non_embedding, total])


@pytest.mark.parametrize("name, total, active", [
    ("Qwen1.5-MoE-A2.7B", 14_315_784_192, 2_689_173_504),
    ("Qwen2-57B-A14B", 57_408_658_944, 14_249_270_784)])
@pytest.mark.parity
def test_parameter_counts_of_the_moe_presets(name, total, active, compare):
    """As published."""
    with torch.device("meta"):
        counts = Qwen2(PRESETS[name]).count_parameters()
    compare("parameter counts of the presets", [counts["total"], counts["active"]],
            [total, active])


def test_presets_have_the_published_details():
    """tied up to 3B, eps 1e-5 from 14B, context, theta 1e6, the two vocabularies."""
    sizes = ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]
    assert [n for n in sizes if PRESETS[n].tie_word_embeddings] == sizes[:3]
    assert [n for n in sizes if PRESETS[n].rms_norm_eps == 1e-5] == sizes[4:]
    assert [n for n in sizes if PRESETS[n].max_position_embeddings == 32768] == ["0.5B", "3B"]
    assert [n for n in sizes if PRESETS[n].vocab_size == 151936] == sizes[:3]
    assert {PRESETS[n].rope_theta for n in sizes} == {1e6}
    for moe, dense in (("tiny-moe", "tiny"), ("micro-moe", "micro")):  # "of equal active size"
        with torch.device("meta"):
            a, b = (Qwen2(PRESETS[n]).count_parameters()["active"] for n in (moe, dense))
        assert 0.95 < a / b < 1.05


def test_initial_weights():
    """Matrices 1/sqrt(fan in), experts too; embedding and head 0.02; biases 0, norms 1; what writes
    to the residual stream 0."""
    config = replace(PRESETS["tiny-moe"], tie_word_embeddings=False)
    for name, p in Qwen2(config).named_parameters():
        want = 0.02 if name.split(".")[-2] in ("embed_tokens", "lm_head") else p.shape[-1] ** -0.5
        if p.ndim == 1 or "o_proj" in name or "down_proj" in name:
            assert (p == ("norm" in name)).all(), name
        else:  # 5 sigma
            assert abs(p.std().item() / want - 1) < 5 / (2 * p.numel()) ** 0.5, name
            assert abs(p.mean().item() / want) < 5 / p.numel() ** 0.5, name


# ---------------------------------------------------------------------------------------------
# mixture of experts

@pytest.mark.parity
def test_dispatch_equals_a_loop_over_tokens_forward_and_backward(compare):
    """R5.5, with an expert that gets no token."""
    for norm, inner in itertools.product((False, True), (20, 18)):  # grouped matmul, loop
        config = replace(SPARSE, norm_topk_prob=norm, moe_intermediate_size=inner)
        moe = scramble(MoE(config))
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
        x[..., 0] = 1.0
        with torch.no_grad():
            moe.gate.weight[4] = 0.0
            moe.gate.weight[4, 0] = -100.0  # nobody chooses expert 4
        x.requires_grad_()
        got, (_, expert) = moe(x)
        assert (expert != 4).all() and expert.unique().numel() == 5

        want = []
        for token in x.flatten(0, 1):
            p, e = (token @ moe.gate.weight.T).softmax(-1).topk(2)
            p = p / p.sum() if norm else p
            y = torch.sigmoid(moe.shared_expert_gate(token)) * moe.shared_expert(token)
            for weight, expert in zip(p, e, strict=True):
                gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
                y = y + weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
            want.append(y)
        want = torch.stack(want).view(3, 5, 32)
        compare("MoE dispatch: token by token", got, want, 1e-5)
        leaves = [x, *moe.parameters()]
        for a, b in zip(torch.autograd.grad(got.square().sum(), leaves),
                        torch.autograd.grad(want.square().sum(), leaves), strict=True):
            compare("MoE dispatch: its gradients", a / b.abs().max(), b / b.abs().max(), 1e-5)


@pytest.mark.parity
def test_one_expert_is_the_dense_model(compare):
    """R5.6: top-1 of one expert, normalised, no shared expert."""
    dense = build(DENSE)
    sparse = Qwen2(replace(DENSE, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=48,
                           norm_topk_prob=True))
    weights = dense.state_dict()
    for layer in range(3):
        p = f"model.layers.{layer}.mlp."
        gate, up, down = (weights.pop(f"{p}{n}_proj.weight") for n in ("gate", "up", "down"))
        weights |= {p + "experts.gate_up_proj": torch.cat((gate, up))[None],
                    p + "experts.down_proj": down[None], p + "gate.weight": torch.randn(1, 32)}
    sparse.load_state_dict(weights)
    compare("one expert, top 1: the dense model", sparse(random_ids(2, 9)),
            dense(random_ids(2, 9)), 1e-5)


def routing(choice, E, confidence=1.0):
    """One layer's (probs, expert) where token i goes to the experts choice[i]."""
    expert = torch.as_tensor(choice)
    expert = expert[:, None] if expert.ndim == 1 else expert
    chosen = torch.zeros(len(expert), E).scatter(1, expert, 1.0 / expert.shape[1])
    return confidence * chosen + (1 - confidence) / E, expert


@pytest.mark.parity
def test_balance_loss_at_perfect_balance_is_k(compare):
    """R5.3, uniform router, whatever E."""
    for E, k in ((4, 1), (4, 2), (8, 4)):
        choice = [[(i + j) % E for j in range(k)] for i in range(3 * E)]
        for confidence in (0.0, 1.0):
            loss, load, entropy = load_balancing_loss([routing(choice, E, confidence)] * 2)
            compare("balance loss: k at perfect balance", loss, torch.tensor(float(k)), 1e-5)
            close(load, torch.ones(2, E))
            close(entropy, torch.full((2,), math.log(k if confidence else E)))


def test_opposite_collapses_do_not_cancel():
    """R5.2: each layer alone scores E, so the mean does; pooled, the layers would score 1."""
    layers = [routing([e] * 8, 4) for e in range(4)]
    loss, load, _ = load_balancing_loss(layers)
    assert loss == 4.0
    assert torch.equal(load, 4 * torch.eye(4))


@pytest.mark.parity
def test_padding_never_changes_the_balance_loss(compare):
    """R5.3."""
    g = torch.Generator().manual_seed(0)
    probs = torch.randn(10, 6, generator=g).softmax(-1)
    want, *want_load = load_balancing_loss([(probs, probs.topk(2).indices)])
    padded = torch.cat((torch.eye(6)[:1].expand(5, 6), probs, torch.eye(6)[3:4].expand(9, 6)))
    valid = torch.tensor([False] * 5 + [True] * 10 + [False] * 9)
    for shape in ((24,), (2, 12)):
        counted = valid.view(shape).flatten()
        loss, *load = load_balancing_loss([(padded[counted], padded.topk(2).indices[counted])])
        compare("balance loss: with and without padding", loss, want, 1e-5)
        close(load, want_load)
    everything, *_ = load_balancing_loss([(padded, padded.topk(2).indices)])
    assert (everything - want).abs() > 0.1


def test_balance_loss_reaches_the_router_of_every_sparse_layer():
    """R5.1: alone; and nothing else."""
    model, router = build(replace(SPARSE, mlp_only_layers=(1,))), []
    model.hidden(random_ids(2, 9), router=router)
    assert len(router) == 2
    load_balancing_loss(router)[0].backward()
    for layer in (0, 2):
        assert model.model.layers[layer].mlp.gate.weight.grad.abs().max() > 1e-5
    assert model.model.layers[2].mlp.experts.down_proj.grad is None  # after the last router


@every_config
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_activations_change_no_bit(config, bf16):
    """Loss, balance loss and every gradient, of packed documents; each block runs a second time,
    and between forward and backward far less is kept."""
    model, ids, found = build(config), random_ids(4, 33), []
    documents = (torch.arange(33) > 20).long().expand(4, -1)
    for model.gradient_checkpointing in (False, True):
        kept, runs, router = {}, [], []
        hook = model.model.layers[1].register_forward_pre_hook(
                lambda *args, runs=runs: runs.append(1))

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), \
                torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model.hidden(ids, segment_ids=documents, router=router).float().square().mean()
        if router:
            loss = loss + load_balancing_loss(router)[0]
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()], len(runs), sum(kept.values())))
        model.zero_grad(set_to_none=True)
        hook.remove()
    (loss, grads, once, all_kept), (again, grads_again, twice, few_kept) = found
    assert torch.equal(loss, again) and (once, twice) == (1, 2) and few_kept < all_kept / 2
    for a, b in zip(grads, grads_again, strict=True):
        assert a is None and b is None or torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [DENSE, replace(SPARSE, moe_intermediate_size=24)], ids=["dense", "moe"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_whole_block_compiles_equals_the_eager_one_and_does_not_recompile(
        config, packed, monkeypatch):
    """R4.8: all blocks of a kind share a graph, and from the third step on a length is no news."""
    monkeypatch.setattr(lib.fast, "grouped_matmul_fits", lambda x, down: True)  # as on CUDA
    old = kernels.set_default_impl("sdpa")
    torch._dynamo.reset()
    model, compiled = build(config), build(config)
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for step, T in enumerate((16, 24, 40, 32, 56)):
        ids = random_ids(2, T, seed=step)
        segment_ids = (torch.arange(T) // 9).expand(2, -1) if packed else None
        found = []
        with torch._dynamo.config.patch(error_on_recompile=step >= 3):
            for one in (model, compiled):
                router = [] if config.num_experts else None
                with torch.autocast("cpu", torch.bfloat16):
                    loss = one.hidden(ids, segment_ids=segment_ids, router=router).square().mean()
                if router:
                    loss = loss + load_balancing_loss(router)[0]
                weights = [p for p in one.parameters() if p.requires_grad]
                found.append([loss, *torch.autograd.grad(loss, weights, allow_unused=True)])
        for a, b in zip(*found, strict=True):
            assert a is b is None or torch.equal(a, b)
    kernels.set_default_impl(*old)


# ---------------------------------------------------------------------------------------------
# directories

@every_config
def test_save_and_load_are_identical(config, tmp_path):
    """R3.6: bit for bit, the config too, and a tied head is stored once."""
    model, ids = build(config), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    again = Qwen2.from_pretrained(tmp_path)
    assert again.config == config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    # Not bit for bit: an MoE was seen to differ by rounding, presumably by memory alignment.
    torch.testing.assert_close(again(ids), model(ids), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in again.parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert ("lm_head.weight" in stored) == (not config.tie_word_embeddings)
    counted = sum(torch.Size(shape).numel() for shape in stored.values())
    assert counted == model.count_parameters()["total"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_tied_head_stored_all_the_same_is_ignored(tmp_path):
    """As some conversions of the small published models do."""
    model = build(CONFIGS["tied"])
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"lm_head.weight": model.head_weight.detach() + 1})
    again = Qwen2.from_pretrained(tmp_path)
    assert torch.equal(again.head_weight, model.head_weight)


def test_load_in_another_dtype(tmp_path):
    model = build(DENSE)
    model.save_pretrained(tmp_path)
    again = Qwen2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(Qwen2.from_pretrained(tmp_path).head_weight,
                       model.head_weight.bfloat16().float())


RSS = """
import sys
from lib.run import peak_rss_mb
from sample import load_policy
before = peak_rss_mb()
model, _ = load_policy(sys.argv[1], "cpu")
size = sum(p.nbytes for p in model.parameters()) / 1e6
print(size, (peak_rss_mb() - before) / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's peak memory")
def test_loading_never_holds_the_weights_twice(tokenizer, tmp_path):
    """Nor those of a bfloat16 file beside their float32. Python's own growth counts in 202 MB."""
    config = replace(PRESETS["micro"], vocab_size=32768, hidden_size=512, intermediate_size=1408,
                     num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2)
    Qwen2(config).save_pretrained(tmp_path, "bfloat16")
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", RSS, tmp_path], env=ENV, text=True,
                          capture_output=True, check=True)
    size, ratio = map(float, done.stdout.split())
    assert size > 200 and 1 <= ratio < 1.2


def test_a_model_remembers_the_dtype_of_its_files(tmp_path):
    """Trained in float32, it can be written as it came; of what was float32 there is no note."""
    model = build(SPARSE)
    model.save_pretrained(tmp_path)
    assert Qwen2.from_pretrained(tmp_path).config.torch_dtype == ""
    model.save_pretrained(tmp_path, "bfloat16")
    again = Qwen2.from_pretrained(tmp_path)
    assert again.config.torch_dtype == "bfloat16" and again.head_weight.dtype == torch.float32
    assert torch.equal(again.head_weight, model.head_weight.bfloat16().float())
    assert Qwen2.from_pretrained(tmp_path, torch.bfloat16).config.torch_dtype == ""
    again.save_pretrained(tmp_path)   # the dtype in memory, unless another one is asked for
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def shard(path, n):
    """Cut model.safetensors into n files with an index, as the Hub stores large models."""
    weights = load_file(path / "model.safetensors")
    file_of = {name: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors"
               for i, name in enumerate(sorted(weights))}
    for file in set(file_of.values()):
        save_file({name: w for name, w in weights.items() if file_of[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": file_of}))
    (path / "model.safetensors").unlink()
    return sorted(set(file_of.values()))


@pytest.mark.parametrize("name", ["tied", "moe"])
def test_sharded_weights_load(name, tmp_path):
    model, ids = build(CONFIGS[name]), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    shards = shard(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == shards
    again = Qwen2.from_pretrained(tmp_path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(again(ids), model(ids), atol=1e-5, rtol=1e-5)
    os.remove(tmp_path / shards[1])
    with pytest.raises(InputError, match=shards[1]):
        Qwen2.from_pretrained(tmp_path)


def test_saving_over_shards_leaves_no_stale_weights(tmp_path):
    """Readers prefer one of model.safetensors and the index: the other must be gone."""
    old, new = build(DENSE, 0), build(DENSE, 1)
    old.save_pretrained(tmp_path)
    shard(tmp_path, 3)
    new.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(Qwen2.from_pretrained(tmp_path).head_weight, new.head_weight)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path, **changes):
    weights = load_file(path / "model.safetensors") | changes
    save_file({k: v for k, v in weights.items() if v is not None}, path / "model.safetensors")


def truncate(file, n):
    file.write_bytes(file.read_bytes()[:n])


BROKEN = {
    "missing key": (lambda p: edit_weights(p, **{"model.norm.weight": None}),
                    "model.norm.weight is missing"),
    "missing expert": (lambda p: edit_weights(
        p, **{"model.layers.1.mlp.experts.3.up_proj.weight": None}), "experts"),
    "unexpected key": (lambda p: edit_weights(p, **{"model.extra": torch.ones(2)}),
                       "model.extra does not belong"),
    "wrong shape": (lambda p: edit_weights(p, **{"model.norm.weight": torch.ones(31)}),
                    r"model.norm.weight has shape \(31,\).*\(32,\)"),
    "model_type": (lambda p: edit_config(p, model_type="llama"), "'llama'"),
    "rope scaling": (lambda p: edit_config(p, rope_scaling={"type": "linear", "factor": 4.0}),
                     "rope scaling 'linear' is not supported, only yarn"),
    "yarn factor": (lambda p: edit_config(p, rope_scaling={"type": "yarn"}), "without a factor"),
    "yarn betas": (lambda p: edit_config(p, rope_scaling={"type": "yarn", "factor": 2.0,
                                                          "beta_fast": 16}), "beta_fast is 16"),
    "training lengths": (lambda p: edit_config(
        p, original_max_position_embeddings=128, rope_scaling={
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}),
        r"several original_max_position_embeddings \[64, 128\]"),
    "two thetas": (lambda p: edit_config(p, rope_theta=5e5), r"several rope_theta \[500000.0,"),
    "theta a layer": (lambda p: edit_config(p, rope_parameters={"full": {"rope_theta": 1e4}}),
                      "no flat object"),
    "rope_scaling a word": (lambda p: edit_config(p, rope_scaling="yarn"), "no flat object"),
    "layers 2.0": (lambda p: edit_config(p, num_hidden_layers=2.0), "num_hidden_layers is 2.0"),
    "width 0": (lambda p: edit_config(p, hidden_size=0), "hidden_size is 0"),
    "eps a word": (lambda p: edit_config(p, rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
    "positions -1": (lambda p: edit_config(p, max_position_embeddings=-1),
                     "max_position_embeddings is -1"),
    "sparse step 0": (lambda p: edit_config(p, decoder_sparse_step=0), "decoder_sparse_step is 0"),
    "tied a word": (lambda p: edit_config(p, tie_word_embeddings="no"), "tie_word_embeddings is"),
    "no local_size": (lambda p: edit_config(p, dual_chunk_attention_config={"chunk_size": 64}),
                      "without local_size"),
    "sliding window": (lambda p: edit_config(p, use_sliding_window=True), "sliding"),
    "window of 127": (lambda p: edit_config(p, use_sliding_window=True, sliding_window=127),
                      r"sliding_window \(127\) below the 128 positions"),
    "window under YaRN": (lambda p: edit_config(
        p, use_sliding_window=True, sliding_window=128, rope_scaling={
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}),
        r"sliding_window \(128\) below the 256 positions"),
    "layers with a window": (lambda p: edit_config(p, layer_types=["sliding_attention"] * 3),
                             "layer_types has 'sliding_attention'"),
    "attention dropout": (lambda p: edit_config(p, attention_dropout=0.1),
                          "attention_dropout is 0.1"),
    "NaN": (lambda p: edit_weights(p, **{"model.norm.weight": torch.tensor(
        [1.0] * 31 + [math.nan])}), "weight model.norm.weight holds NaN or infinity"),
    "-infinity": (lambda p: edit_weights(p, **{"model.layers.2.mlp.gate.weight": torch.full(
        (6, 32), -math.inf)}), "weight model.layers.2.mlp.gate.weight holds NaN"),
    "too large for float32": (lambda p: edit_weights(p, **{"model.norm.weight": torch.full(
        (32,), 1e300, dtype=torch.float64)}), "model.norm.weight holds NaN or infinity"),
    "torch.compile": (lambda p: edit_weights(p, **{"_orig_mod.model.norm.weight": torch.ones(32)}),
                      "_orig_mod.model.norm.weight does not belong"),
    "a layer too many": (lambda p: edit_config(p, num_hidden_layers=4),
                         "config.json has 4 layers, 4 of them of 6 experts, but .* 99 tensors"),
    "more experts than tensors": (lambda p: edit_config(p, num_experts=20_000),
                                  "3 layers, 3 of them of 20000 experts"),
    "experts of two shapes": (lambda p: edit_weights(p, **{
        "model.layers.1.mlp.experts.3.up_proj.weight": torch.ones(20, 31)}),
        "experts.3.up_proj.weight has shape"),
    "up is not gate": (lambda p: edit_weights(p, **{
        f"model.layers.1.mlp.experts.{e}.up_proj.weight": torch.ones(20, 31) for e in range(6)}),
        "experts.0.up_proj.weight has shape"),
    "heads": (lambda p: edit_config(p, num_key_value_heads=3), "4 query heads"),
    "no hidden_size": (lambda p: edit_config(p, hidden_size=None), "no hidden_size"),
    "no experts": (lambda p: edit_config(p, num_experts=0), "num_experts"),
    "not an object": (lambda p: (p / "config.json").write_text("[]"), "config.json"),
    "config cut": (lambda p: truncate(p / "config.json", 99), "not JSON"),
    "weights cut": (lambda p: truncate(p / "model.safetensors", 9999), "not a safetensors file"),
    "weights empty": (lambda p: truncate(p / "model.safetensors", 0), "not a safetensors file"),
    "header cut": (lambda p: truncate(p / "model.safetensors", 50), "not a safetensors file"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "empty index": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "index.json"),
    "index climbs out": (lambda p: (p / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../model.safetensors"}}'), "no ../model"),
}


@pytest.mark.parametrize("spoil, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_directory_is_refused_in_one_line(spoil, message, tmp_path):
    """R3.6: what is wrong and where."""
    build(SPARSE).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        Qwen2.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert tmp_path.name in str(error.value) or message == "4 query heads"


HARMLESS = {
    "inv_freq": lambda p: edit_weights(p, **{
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}),
    "window as long as the texts": lambda p: edit_config(
        p, use_sliding_window=True, sliding_window=128, layer_types=["sliding_attention"] * 3),
    "window of null": lambda p: edit_config(p, use_sliding_window=True, sliding_window=None),
    "window switched off": lambda p: edit_config(p, use_sliding_window=False, sliding_window=4),
    "dropout of 0": lambda p: edit_config(p, attention_dropout=0, hidden_dropout=0.0),
    "byte-order mark": lambda p: (p / "config.json").write_text(
        (p / "config.json").read_text("utf-8"), "utf-8-sig"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_changes_nothing_is_accepted(change, tmp_path):
    model = build(SPARSE)
    model.save_pretrained(tmp_path)
    change(tmp_path)
    again = Qwen2.from_pretrained(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_an_impossible_size_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    """20,000 layers of 20,000 experts, and a file of 20,000 empty tensors: they would be 1.2
    billion names."""
    build(SPARSE).save_pretrained(tmp_path)
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(20_000)]
    monkeypatch.setattr(M, "Block", None)
    for layers, experts in ((20_000, 20_000), (30_000, 20_000), (10**15, 20_000), (20_000, 6)):
        says = f"{layers} layers, .* of them of {experts} experts.* only 20000 tensors"
        edit_config(tmp_path, num_hidden_layers=layers, num_experts=experts)
        save_file({name: torch.empty(0) for name in names}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=says):
            Qwen2.from_pretrained(tmp_path)


def test_something_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(InputError, match="no such directory"):
            Qwen2.from_pretrained(path)


def test_others_may_read_the_weights(tmp_path):
    """A server may run as another user: the mode is that of any new file."""
    tiny = Qwen2(PRESETS["micro"])
    tiny.save_pretrained(tmp_path)
    (tmp_path / "new").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
