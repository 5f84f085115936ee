"""Beyond the training length (report 3.3): YaRN against its published numbers and transformers,
dual chunk attention against a loop over its position rules. ABF, a change of theta, is tested in
test_pretrain.py. R numbers: docs/requirements.md."""
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import evaluate
import kernels
from lib import long_context
from lib.long_context import extended
import model as M
import sample
from lib.args import InputError
from data.mixture import is_held_out
from helpers import stage_args, tiny_model, write_rows
from model import PRESETS, Config, KVCache, GrowingKVCache, Qwen2

LENGTH = 16  # of training, in the tests of dual chunk attention: chunks of 12 tokens, 4 local
IDS = torch.randint(97, (2, 45), generator=torch.Generator().manual_seed(1))


def chunked(**changes) -> Qwen2:
    model = tiny_model(max_position_embeddings=LENGTH, **changes)
    model.config = extended(model.config, dca=True)
    return model


def close(a, b, tol=1e-4):
    """Logits of order 1 to 10 here."""
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


# ---------------------------------------------------------------------------------------------
# YaRN

@pytest.mark.parametrize("heads, low, high", [(14, 11, 20), (7, 23, 40)])
def test_yarn_at_the_published_setting(heads, low, high):
    """theta 1e6, 32,768 -> 131,072; head sizes 64 and 128."""
    config = replace(PRESETS["0.5B"], num_attention_heads=heads, num_key_value_heads=1)
    plain, one = M.rope_frequencies(config)
    yarn, m = M.rope_frequencies(extended(config, yarn=4.0))
    assert one == 1.0 and m == pytest.approx(1.13863, abs=1e-5)
    assert m ** 2 == pytest.approx(1.29648, abs=1e-5)
    slowed = plain / yarn
    assert (slowed[:low + 1] == 1).all() and slowed[low + 1] > 1
    assert (slowed[high:] - 4).abs().max() < 1e-5 and slowed[high - 1] < 3.9
    middle = (low + high) // 2  # the ramp is linear in the frequency, not in the wavelength
    part = (middle - low) / (high - low)
    assert yarn[middle] / plain[middle] == pytest.approx(1 - part + part / 4, abs=1e-6)


def test_yarn_factor_1_is_the_identity():
    """R7.1."""
    config = PRESETS["0.5B"]
    assert extended(config, yarn=1.0) == config
    roomy = replace(config, original_max_position_embeddings=16, max_position_embeddings=1024)
    assert extended(roomy, yarn=2.0).max_position_embeddings == 1024  # and not 32
    for a, b in zip(
        M.rope_frequencies(replace(config, yarn_factor=1.0)),
        M.rope_frequencies(config),
        strict=True,
    ):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_yarn_changes_the_logits_and_counts_positions_as_before():
    model = tiny_model(max_position_embeddings=LENGTH)
    plain = model(IDS)
    model.config = extended(model.config, yarn=4.0)
    assert (model(IDS) - plain).abs().max() > 0.1
    with torch.no_grad():
        cache = KVCache(model.config, 2, 45, "cpu", torch.float32)
        close(torch.cat([model(part, cache=cache) for part in IDS.split([20, 1, 24], 1)], 1),
              model(IDS))


# ---------------------------------------------------------------------------------------------
# dual chunk attention

def test_positions_of_the_papers_examples():
    """towards the previous chunk 6 7 8 9 9 9 (c = 10, s = 6), 5 6 7 7 7 (c = 8, s = 5);
    towards older ones c - 1."""
    for c, s, want in ((10, 6, [6, 7, 8, 9, 9, 9]), (8, 5, [5, 6, 7, 7, 7])):
        config = Config(max_position_embeddings=1000, chunk_size=c, local_size=c - s)
        plan = long_context.dual_chunk_plan(torch.arange(2 * s)[None], config, M.rope)
        for got, positions in ((plan.intra, list(range(s)) * 2), (plan.successive, want * 2),
                               (plan.inter, [c - 1] * 2 * s)):
            for a, b in zip(got, M.rope(torch.tensor([positions]), config), strict=True):
                assert torch.equal(a, b)


def by_the_rules(model, ids):
    """Logits of one row with plain softmax attention, every pair's score by its own rotation."""
    c, chunk = model.config, model.config.chunk_size - model.config.local_size

    def distance(i, j):
        if i // chunk == j // chunk:
            return i - j
        q = min(i % chunk + chunk, c.chunk_size - 1) if i // chunk == j // chunk + 1 \
            else c.chunk_size - 1
        return q - j % chunk

    far = torch.tensor([[distance(i, j) if j <= i else 0 for j in range(len(ids))]
                        for i in range(len(ids))])
    assert far.max() < c.chunk_size  # no distance that training has not seen
    heat = torch.tensor([(0.1 * math.log(max(1, (i + 1) / LENGTH)) + 1) ** 2
                         for i in range(len(ids))])
    cos, sin = M.rope(far.flatten()[None], c)  # RoPE at distance d: q turned by d against k at 0
    x, D = model.model.embed_tokens(ids), c.head_dim
    for block in model.model.layers:
        a, h = block.self_attn, block.input_layernorm(x)
        q, k, v = (p(h).view(len(ids), -1, D) for p in (a.q_proj, a.k_proj, a.v_proj))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        y = torch.zeros_like(q)
        for head in range(q.shape[1]):
            turned = M.apply_rope(q[:, head].repeat_interleave(len(ids), 0)[None, None], cos, sin)
            scores = (turned.view(len(ids), len(ids), D) * k[None, :, head]).sum(-1) * D ** -0.5
            scores = scores * heat[:, None]
            scores = scores.masked_fill(torch.ones_like(far).triu(1).bool(), -torch.inf)
            y[:, head] = scores.softmax(-1) @ v[:, head]
        x = x + a.o_proj(y.flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.model.norm(x) @ model.head_weight.T


@pytest.mark.parity
def test_dual_chunk_attention_equals_a_direct_reference(compare):
    model = chunked()
    logits = model(IDS)
    for row, got in zip(IDS, logits, strict=True):
        compare("dual chunk attention: direct reference", got, by_the_rules(model, row), 1e-4)
    with_flat_heat = replace(model.config, original_max_position_embeddings=10**9)
    model.config = with_flat_heat
    assert (model(IDS) - logits).abs().max() > 1e-2  # the temperature is there


@pytest.mark.parity
def test_up_to_the_training_length_nothing_changes(compare):
    model = chunked()
    long = model(IDS)
    model.config = replace(model.config, chunk_size=0, local_size=0)
    compare("dual chunk attention: plain below training length", long[:, :LENGTH],
            model(IDS[:, :LENGTH]), 1e-4)
    assert (long - model(IDS))[:, LENGTH:].abs().max() > 0.1
    assert torch.equal(chunked()(IDS[:, :12]), model(IDS[:, :12]))  # one chunk: bit for bit


@pytest.mark.parametrize("sizes", [[45], [12, 33], [16, 29], [1] * 45, [13, 13, 1, 18], [44, 1]])
@torch.no_grad()
def test_cached_equals_uncached_across_chunks(sizes):
    """R3.2."""
    model = chunked()
    cache = KVCache(model.config, 2, 45, "cpu", torch.float32)
    close(torch.cat([model(part, cache=cache) for part in IDS.split(sizes, 1)], 1), model(IDS))


@pytest.mark.parametrize("sizes, pad", [([45], 7), ([5, 20, 20], 7), ([30, 1, 14], 7),
                                        ([15, 30], 20), ([15, 1, 1, 28], 15)])
@torch.no_grad()
def test_left_padding_shifts_the_chunks_of_its_row_only(sizes, pad):
    """R3.3, R3.4: chunks begin where the row does, also if that is after a chunk of nothing."""
    model = chunked()
    for make in (lambda pads: KVCache(model.config, 2, 45, "cpu", torch.float32, pads),
                 GrowingKVCache):
        cache = make(torch.tensor([pad, 0]))
        out = torch.cat([model(part, cache=cache) for part in IDS.split(sizes, 1)], 1)
        assert out.isfinite().all()
        close(out[0, pad:], model(IDS[:1, pad:])[0])
        close(out[1], model(IDS[1:])[0])


def test_the_kernel_keeps_its_sums_in_float32_under_autocast():
    g = torch.Generator().manual_seed(0)
    q = [torch.randn(1, 4, 40, 16, generator=g).bfloat16() for _ in range(3)]
    k, v = (torch.randn(1, 2, 40, 16, generator=g).bfloat16() for _ in range(2))
    want = kernels.dual_chunk_attention(q, k, v, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.dual_chunk_attention(q, k, v, 7), want)
        exact = kernels.dual_chunk_attention([x.float() for x in q], k.float(), v.float(), 7)
    assert exact.dtype == torch.float32 and torch.equal(exact.bfloat16(), want)


def test_packed_rows_are_refused():
    with pytest.raises(InputError, match="not packed rows"):
        chunked()(IDS, segment_ids=torch.zeros_like(IDS))


@pytest.mark.parametrize("T, S, chunk", [(30, 30, 7), (5, 30, 7), (1, 30, 7), (30, 30, 30),
                                         (30, 30, 1), (9, 29, 10)])
@pytest.mark.parity
def test_kernel_equals_its_twin_and_plain_attention(T, S, chunk, monkeypatch, compare):
    """In float64, forward and backward; also when a block holds few queries."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, h, n, 8, generator=g, dtype=torch.float64).requires_grad_()
              for h, n in ((4, T), (4, T), (4, T), (2, S), (2, S))]
    for most in (2**24, 700):
        monkeypatch.setattr(long_context, "MAX_SCORES", most)
        outs = [f(leaves[:3], *leaves[3:], chunk) for f in
                (kernels.dual_chunk_attention, kernels.dual_chunk_attention_reference)]
        weights = torch.randn(outs[0].shape, generator=g, dtype=torch.float64)
        grads = [torch.autograd.grad((o * weights).sum(), leaves, retain_graph=True,
                                     materialize_grads=True) for o in outs]
        for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            compare("dual chunk attention: kernel and twin, float64", a, b, 1e-12)
    same = kernels.dual_chunk_attention([leaves[0]] * 3, *leaves[3:], chunk)
    close(same, kernels.attention(leaves[0], *leaves[3:], impl="reference"), 1e-12)


# ---------------------------------------------------------------------------------------------
# directories

@pytest.mark.parametrize("extension", [{"yarn": 4.0}, {"dca": True}])
def test_an_extended_config_is_saved_and_read(extension, tmp_path):
    model = tiny_model(max_position_embeddings=LENGTH)
    model.config = extended(model.config, **extension)
    model.save_pretrained(tmp_path)
    again = Qwen2.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.trained_length == LENGTH
    assert again.config.max_position_embeddings == 4 * LENGTH
    close(again(IDS), model(IDS))


def test_the_published_forms_are_read(tmp_path):
    """rope_scaling of transformers 4, rope_parameters of 5, Qwen2.5-1M's chunks."""
    tiny_model().save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    del plain["rope_theta"], plain["rope_parameters"]
    for change in ({"rope_scaling": yarn, "rope_theta": 1e6},
                   {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **yarn}}):
        (tmp_path / "config.json").write_text(json.dumps(plain | change))
        config = Qwen2.from_pretrained(tmp_path).config
        assert (config.yarn_factor, config.trained_length, config.rope_theta) == (4.0, 32768, 1e6)
        assert config.max_position_embeddings == 131_072  # the file says less, as published
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    (tmp_path / "config.json").write_text(json.dumps(
        plain | {"rope_theta": 1e7, "dual_chunk_attention_config": chunks,
                 "max_position_embeddings": 1010000}))
    config = Qwen2.from_pretrained(tmp_path).config
    assert (config.chunk_size, config.local_size, config.trained_length) == (262144, 8192, 262144)


def test_a_length_that_is_not_recorded_is_asked_for():
    """R7.2: published base models have 131,072 positions and were trained at 32,768."""
    assert extended(PRESETS["7B"], yarn=4.0).max_position_embeddings == 131_072
    assert extended(PRESETS["0.5B"], dca=True).chunk_size == 32_768
    unknown = replace(PRESETS["7B"], original_max_position_embeddings=0)
    with pytest.raises(InputError, match="add original_max_position_embeddings"):
        extended(unknown, yarn=4.0)
    assert extended(unknown) == unknown


@pytest.mark.parametrize("change", [{"yarn": 2.0}, {"dca": True}])
def test_the_yarn_of_a_checkpoint_is_not_replaced(change):
    """It was trained so; another factor would be another model at every position."""
    config = extended(PRESETS["0.5B"], yarn=4.0)
    with pytest.raises(InputError, match="YaRN with factor 4, so pass the same --yarn"):
        extended(config, **change)
    assert extended(config, yarn=4.0) == config == extended(config)


def test_chunks_of_the_checkpoint_are_kept():
    config = replace(PRESETS["7B"], max_position_embeddings=1_010_000, chunk_size=262_144,
                     local_size=8192, original_max_position_embeddings=262_144)
    assert extended(config, dca=True).local_size == 8192


def test_both_at_once_are_refused():
    with pytest.raises(InputError, match="take one"):
        extended(PRESETS["0.5B"], yarn=4.0, dca=True)
    for change in ({"yarn_factor": 0.5}, {"chunk_size": 8, "local_size": 5}, {"local_size": 1}):
        with pytest.raises(InputError):
            replace(PRESETS["0.5B"], **change)
    with pytest.raises(InputError, match="local_size -1 must be 0 to half of chunk_size 8"):
        replace(PRESETS["0.5B"], chunk_size=8, local_size=-1)


# ---------------------------------------------------------------------------------------------
# sample.py, evaluate.py

@pytest.fixture
def short_run(micro_run, tmp_path):
    """A model directory trained at 128 tokens."""
    path = tmp_path / "short"
    shutil.copytree(micro_run, path)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 128}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("flags", [{"yarn": 4.0}, {"dca": True}])
def test_sample_answers_a_prompt_beyond_the_training_length(flags, short_run, capsys):
    args = sample.Args(init=str(short_run), prompt="where is the sea " * 40, max_new_tokens=5,
                       temperature=0.0, device="cpu", dtype="float32")
    with pytest.raises(InputError, match="outgrows the model's 128 positions"):
        sample.main(args)
    seen, rope, chunked = [], M.rope, kernels.dual_chunk_attention
    with pytest.MonkeyPatch.context() as patch:  # what the forward passes really do
        patch.setattr(M, "rope", lambda p, c: seen.append((c.yarn_factor, c.trained_length))
                      or rope(p, c))
        patch.setattr(kernels, "dual_chunk_attention",
                      lambda *a, **k: seen.append("dual") or chunked(*a, **k))
        sample.main(replace(args, **flags))
    assert ("dual" in seen) == ("dca" in flags) and (flags.get("yarn", 1.0), 128) in seen


def test_evaluate_reads_long_windows(short_run, tmp_path):
    """The flags reach the model: windows of 400 tokens are refused without them, and differ with
    each; windows within the training length do not."""
    texts = [f"{i} " + "a long story about the sea and the moon. " * 40 for i in range(200)]
    held_out = [text for text in texts if is_held_out(text)]
    assert held_out
    write_rows(tmp_path / "docs.jsonl", [{"text": text} for text in held_out])
    args = stage_args(evaluate, init=str(short_run), n_queries=4, samples=1, max_new_tokens=2,
                      window=400, text=str(tmp_path),
                      out=str(tmp_path / "scores"))

    def bits(**flags):
        return evaluate.main(replace(args, **flags))["bits_per_byte"]
    with pytest.raises(InputError, match="--window 400: .* has only 128 positions"):
        bits()
    assert len({bits(yarn=4.0), bits(dca=True), bits(window=100)}) == 3
    assert bits(dca=True, window=100) == pytest.approx(bits(window=100), abs=1e-6)
    assert json.loads((tmp_path / "scores" / "eval.json").read_text())["settings"]["window"] == 100


# ---------------------------------------------------------------------------------------------
# transformers

@pytest.mark.parity
def test_yarn_equals_transformers(compare, tmp_path):
    """R7.1: frequencies and attention factor to 1e-6, logits of a whole model, both ways."""
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    for D, theta, length, s in ((64, 1e6, 32768, 4.0), (128, 1e6, 32768, 4.0), (8, 1e4, 64, 2.0),
                                (128, 1e4, 4096, 8.0), (32, 1e4, 256, 1.5), (64, 5e5, 2048, 16.0)):
        config = Config(hidden_size=2 * D, num_attention_heads=2, num_key_value_heads=1,
                        rope_theta=theta, max_position_embeddings=length)
        hf = transformers.Qwen2Config(
            hidden_size=2 * D, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=int(length * s),
            rope_parameters={"rope_type": "yarn", "factor": s, "rope_theta": theta,
                             "original_max_position_embeddings": length})
        inv, factor = functions["yarn"](hf)
        got, m = M.rope_frequencies(extended(config, yarn=s))
        compare("YaRN frequencies", got, inv, 1e-6)
        compare("YaRN attention factor", torch.tensor(m), torch.tensor(factor), 1e-6)
    ours = tiny_model(max_position_embeddings=LENGTH, scale=2.0)
    ours.config = extended(ours.config, yarn=4.0)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    compare("logits with YaRN", ours(IDS), theirs(IDS).logits, 1e-5)
    theirs.save_pretrained(tmp_path / "again")
    again = Qwen2.from_pretrained(tmp_path / "again")
    assert again.config.yarn_factor == 4.0 and again.config.trained_length == LENGTH
    compare("logits with YaRN", again(IDS), theirs(IDS).logits, 1e-5)
