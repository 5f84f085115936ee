"""kernels.py against its float64 twins, PyTorch's own kernels, gradcheck and invariances."""
import functools
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import kernels as K  # noqa: E402
from lib import chunked_loss, fast  # noqa: E402

KERNELS = ("reference", "sdpa", "fused")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    old = K.set_default_impl()
    yield
    K.set_default_impl(*old)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(K, "BLOCK", 4)   # several blocks, the last one ragged, at gradcheck's sizes


@pytest.fixture
def precision():
    old = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(old)


def qkv(B=2, Hq=4, Hkv=2, T=9, S=None, D=8, dtype=torch.float64):
    shapes = (B, Hq, T, D), (B, Hkv, S or T, D), (B, Hkv, S or T, D)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def values_and_grads(fn, leaves, upstream=None):
    out = fn(*leaves)
    if upstream is None:
        upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def close(a, b, tol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


# --- attention ----------------------------------------------------------------------------------
def per_head(q, k, v, allowed):
    """The oracle, by hand: one head and one query at a time. allowed(b, t, s) -> bool."""
    out = torch.zeros_like(q)
    B, Hq, T, D = q.shape
    for b in range(B):
        for h in range(Hq):
            kv = h // (Hq // k.shape[1])
            for t in range(T):
                see = [s for s in range(k.shape[2]) if allowed(b, t, s)]
                if see:
                    p = (k[b, kv, see] @ q[b, h, t] * D ** -0.5).softmax(0)
                    out[b, h, t] = p @ v[b, kv, see]
    return out


@pytest.mark.parametrize("impl", KERNELS)
def test_attention_matches_a_loop_over_heads_and_queries(impl, small_tiles):
    """GQA order, causal, segments and mask together; R3.4: query 5 of row 1 sees nothing."""
    q, k, v = (x.detach() for x in qkv(Hq=6, T=9))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [7, 7, 7, 7, 7, 3, 3, 3, 3]])
    mask = torch.rand(2, 1, 9, 9) > 0.2
    mask[1, 0, 5] = False
    out = K.attention(q, k, v, segment_ids=ids, mask=mask, impl=impl)
    want = per_head(q, k, v, lambda b, t, s: s <= t and ids[b, s] == ids[b, t] and mask[b, 0, t, s])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert (out[1, :, 5] == 0).all()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("T,S", [(1, 7), (3, 7), (5, 9), (7, 3)])
def test_cached_decoding_is_bottom_right_aligned(impl, T, S, small_tiles):
    """R3.2: T queries against S keys are the last T positions. T > S leaves rows without a key."""
    q, k, v = (x.detach() for x in qkv(T=T, S=S))
    out = K.attention(q, k, v, impl=impl)
    want = per_head(q, k, v, lambda b, t, s: s <= t + S - T)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ("sdpa", "fused"))
@pytest.mark.parametrize("T,S,Hkv", [(70, 70, 2), (129, 129, 4), (5, 200, 1), (130, 64, 2),
                                     (65, 64, 2)])
def test_attention_values_and_gradients_equal_the_reference(impl, T, S, Hkv):
    leaves = qkv(T=T, S=S, Hkv=Hkv)
    def run(name):
        return values_and_grads(lambda *x: K.attention(*x, impl=name), leaves)
    close(run(impl), run("reference"))


@pytest.mark.parametrize("impl", ("sdpa", "fused"))
def test_packed_and_left_padded_gradients_equal_the_reference(impl):
    leaves = qkv(T=150)
    ids = torch.stack([torch.arange(150) // 40, (torch.arange(150) * 7) % 3])  # ids in any order
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    mask[1, ..., :70] = False                                 # a whole tile, and rows without keys
    def run(name):
        return values_and_grads(
            lambda *x: K.attention(*x, segment_ids=ids, mask=mask, impl=name), leaves)
    close(run(impl), run("reference"))


@pytest.mark.parametrize("options", ({}, {"segment_ids": True}, {"mask": True}))
def test_fused_gradcheck(options, small_tiles):
    """Numerical derivatives: independent of every other implementation."""
    leaves = qkv(B=2, Hq=2, Hkv=1, T=6, D=3)
    options = dict(options)
    if "segment_ids" in options:
        options["segment_ids"] = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 1, 1]])
    if "mask" in options:
        options["mask"] = torch.rand(2, 1, 6, 6) > 0.4
        options["mask"][:, :, 2] = False
    assert torch.autograd.gradcheck(
        lambda *x: K.attention(*x, impl="fused", **options), leaves)


def test_attention_equals_torch_sdpa_in_fp32_and_bf16():
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k, v = (x.detach() for x in qkv(T=140, dtype=dtype))
        want = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1),
                                              v.repeat_interleave(2, 1), is_causal=True)
        for impl in KERNELS:
            out = K.attention(q, k, v, impl=impl)
            assert out.dtype == dtype
            torch.testing.assert_close(out, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("T,S", [(6, 6), (1, 6)])
def test_no_nan_with_fully_masked_rows(impl, T, S, small_tiles):
    """R3.4: output and all gradients finite, and zero where a query saw nothing."""
    leaves = qkv(T=T, S=S, dtype=torch.float32)
    mask = torch.ones(2, 1, T, S, dtype=torch.bool)
    mask[0] = False
    mask[1, :, 0] = False
    out, dq, dk, dv = values_and_grads(lambda *x: K.attention(*x, mask=mask, impl=impl), leaves)
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    for x in (out, dq):
        assert (x[0] == 0).all() and (x[1, :, 0] == 0).all()
    assert (dk[0] == 0).all() and (dv[0] == 0).all()
    if T > 1:
        assert (out[1, :, 1:] != 0).all()


def test_no_backend_is_shown_a_row_without_keys(monkeypatch):
    """R3.4 beyond this machine: on such rows backends differ, and CPU's happens to be right."""
    sdpa = F.scaled_dot_product_attention
    def strict(*args, attn_mask, **options):
        assert attn_mask.any(-1).all()
        return sdpa(*args, attn_mask=attn_mask, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", strict)
    for T, S in ((6, 6), (1, 6), (7, 3)):
        mask = torch.zeros(2, 1, T, S, dtype=torch.bool)
        mask[1] = True
        assert (K.attention(*qkv(T=T, S=S), impl="sdpa", mask=mask)[0] == 0).all()


@pytest.mark.parametrize("impl", KERNELS)
def test_changing_one_document_leaves_the_other_bit_equal(impl):
    q, k, v = (x.detach() for x in qkv(B=1, T=150, dtype=torch.float32))
    ids = (torch.arange(150) >= 90).int()[None]
    before = K.attention(q, k, v, segment_ids=ids, impl=impl)
    for x in (q, k, v):
        x[:, :, :90] = torch.randn_like(x[:, :, :90])
    after = K.attention(q, k, v, segment_ids=ids, impl=impl)
    assert torch.equal(before[:, :, 90:], after[:, :, 90:])
    assert not torch.equal(before[:, :, :90], after[:, :, :90])
    alone = K.attention(q[:, :, 90:], k[:, :, 90:], v[:, :, 90:], impl=impl)
    torch.testing.assert_close(after[:, :, 90:], alone, rtol=1e-5, atol=1e-5)


def test_fused_skips_the_keys_nobody_may_see(monkeypatch, small_tiles):
    widths = []
    block = K.block_probabilities
    monkeypatch.setattr(K, "block_probabilities", lambda *a: widths.append(a[1].shape[3])
                        or block(*a))
    def keys(T, S=None, **options):
        widths.clear()
        K.attention(*qkv(T=T, S=S), impl="fused", **options)
        return widths
    assert keys(15) == [4, 8, 12, 15]
    assert keys(4, S=16) == [16]
    assert keys(16, segment_ids=(torch.arange(16) // 6).expand(2, 16)) == [4, 8, 6, 4]


def largest_allocation(fn):
    """Elements of the largest tensor that fn makes, seen at the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode
    class Watch(TorchDispatchMode):
        largest = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and x.numel():
                    self.largest = max(self.largest, x.untyped_storage().nbytes())
            return out
    with Watch() as watch:
        fn()
    return watch.largest


def test_fused_memory_is_linear_in_length():
    def run(T, impl):
        leaves = qkv(B=1, T=T, dtype=torch.float32)
        return largest_allocation(lambda: K.attention(*leaves, impl=impl).sum().backward())
    assert run(1024, "reference") == 16 * run(256, "reference")
    assert run(1024, "fused") <= 4 * run(256, "fused")


def test_the_switch():
    """Default: auto, nothing compiled. Each value is used and undone; others are refused."""
    assert K.set_default_impl() == ("auto", False)
    assert K.set_default_impl("fused", compile=True) == ("auto", False)
    assert K.set_default_impl(*("reference", False)) == ("fused", True)
    with pytest.raises(ValueError, match="'flash' is not one of auto, .*, fused, flex"):
        K.set_default_impl("flash")
    q, k, v = qkv()
    for impl in KERNELS:
        K.set_default_impl(impl)
        assert torch.equal(K.attention(q, k, v), K.attention(q, k, v, impl=impl))


def test_the_default_on_a_cpu(precision, monkeypatch):
    """fused in bf16 and where products reach oneDNN; one query goes to PyTorch's kernel."""
    blocks = []
    block = K.block_probabilities
    monkeypatch.setattr(K, "block_probabilities", lambda *a: blocks.append(1) or block(*a))
    def fused(dtype, name, T=9):
        torch.set_float32_matmul_precision(name)
        blocks.clear()
        K.attention(*qkv(T=T, dtype=dtype))
        return bool(blocks)
    assert fused(torch.bfloat16, "highest") and fused(torch.float32, "medium")
    assert not fused(torch.float32, "highest") and not fused(torch.bfloat16, "medium", T=1)


def test_fused_gradients_in_bf16():
    """As near to float64 as PyTorch's bf16 kernel, whose error is 0.003 to 0.005 here too."""
    leaves = qkv(T=150, dtype=torch.bfloat16)
    want = values_and_grads(K.attention_reference, [x.detach().double().requires_grad_()
                                                    for x in leaves])
    for got, exact in zip(values_and_grads(lambda *x: K.attention(*x, impl="fused"), leaves),
                          want, strict=True):
        assert got.dtype == torch.bfloat16 and (got - exact).norm() < 0.007 * exact.norm()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="not one of"):
        K.attention(*qkv(), impl="flash")


@pytest.mark.parametrize("impl", KERNELS)
def test_autocast_gives_bf16_and_fp32_gradients(impl):
    q, k, v = qkv(T=20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = K.attention(q, k, v, impl=impl)
    assert out.dtype == torch.bfloat16
    # Only the inputs are rounded: the sums inside stay in fp32.
    assert torch.equal(out, K.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), K.attention(q, k, v), rtol=0.05, atol=0.05)


# --- head and loss --------------------------------------------------------------------------------
def head(N=37, C=16, V=50, dtype=torch.float64):
    hidden = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("ignored", (0, 20))
def test_cross_entropy_equals_torch_in_fp32(reduction, ignored):
    """R4.7: value and gradients to 1e-5, with upstream gradients other than one."""
    h, w, t = head(dtype=torch.float32)
    t[:ignored] = -100
    a = values_and_grads(lambda h, w: 3.7 * K.linear_cross_entropy(
        h, w, t, reduction=reduction, chunk_rows=8), (h, w))
    b = values_and_grads(
        lambda h, w: 3.7 * F.cross_entropy(h @ w.T, t, reduction=reduction), (h, w))
    close(a, b, 1e-5)
    twin = K.linear_cross_entropy_reference(h, w, t, reduction=reduction)
    torch.testing.assert_close(3.7 * twin.detach(), b[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy_numerical_gradient(reduction):
    """gradcheck goes backward twice, which a gradient scaled in place refuses: by hand, then."""
    h, w, t = head(N=7, C=3, V=5)
    t[2] = -100
    leaves, step = (h, w), 1e-6
    def f(*x):
        return 0.3 * K.linear_cross_entropy(*x, t, reduction=reduction, chunk_rows=2,
                                            valid_vocab=5).square().sum()
    loss = f(*leaves)
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    for i, grad in enumerate(grads):
        for j in range(grad.numel()):
            bump = torch.zeros(grad.numel()).double()
            bump[j] = step
            up, down = (f(*[x + sign * bump.view_as(x) if k == i else x
                            for k, x in enumerate(leaves)]) for sign in (1, -1))
            assert abs((up - down).item() / (2 * step) - grad.flatten()[j].item()) < 1e-7
    if reduction != "none":
        with pytest.raises(RuntimeError, match="once"):
            loss.backward()


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_tiling_does_not_change_the_result(reduction, monkeypatch):
    """Chunks of rows, tiles of the vocabulary (the last one ragged), probabilities kept or not."""
    h, w, t = head()
    t[3], t[4] = 0, 49
    want = values_and_grads(lambda h, w: F.cross_entropy(h @ w.T, t, reduction=reduction), (h, w))
    for tile in (2**21, 64, 1):
        monkeypatch.setattr(chunked_loss, "TILE", tile)
        for n in (None, 1, 8, 36, 37, 99):
            close(values_and_grads(lambda h, w, n=n: K.linear_cross_entropy(
                h, w, t, reduction=reduction, chunk_rows=n), (h, w)), want)


def test_a_large_vocabulary_in_bf16_is_tiled(monkeypatch):
    """No chunk of all logits in memory (four times the head's gradient): only tiles."""
    h, w, t = (x.detach() for x in head(N=64, V=2000, dtype=torch.float32))
    w.requires_grad_()
    def run():
        with torch.autocast("cpu", torch.bfloat16):
            loss = K.linear_cross_entropy(h, w, t)
        return loss.detach(), *torch.autograd.grad(loss, w)
    kept = run()
    monkeypatch.setattr(chunked_loss, "TILE", 64 * 100)
    close(run(), kept, 1e-4)
    assert largest_allocation(lambda: run()) == 4 * w.numel()     # the gradient


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_no_targets_is_exactly_zero(reduction):
    """R4.3, where F.cross_entropy gives NaN; also an empty batch."""
    h, w, t = head()
    for hidden, targets in ((h, torch.full_like(t, -100)), (h[:0], t[:0])):
        out = K.linear_cross_entropy(hidden, w, targets, reduction=reduction)
        dh, dw = torch.autograd.grad(out.sum(), (h, w))
        assert (out == 0).all() and (dh == 0).all() and (dw == 0).all()


def test_ignored_rows_cost_no_matmul(monkeypatch):
    seen = []
    tile = chunked_loss.forward_tile
    monkeypatch.setattr(chunked_loss, "forward_tile",
                        lambda h, *a: seen.append(len(h)) or tile(h, *a))
    h, w, t = head()
    t[5:] = -7
    K.linear_cross_entropy(h, w, t, ignore_index=-7, chunk_rows=2)
    assert seen == [2, 2, 1]


def test_micro_batches_with_a_global_count_add_up():
    """R4.1: sums of ragged micro-batches over the step's count give the step's gradient."""
    h, w, t = head()
    t[torch.rand(37) < 0.5] = -100
    whole = torch.autograd.grad(K.linear_cross_entropy(h, w, t), (h, w))
    count = (t != -100).sum()
    parts = sum(K.linear_cross_entropy(h[s], w, t[s], reduction="sum") / count
                for s in (slice(0, 4), slice(4, 30), slice(30, 37)))
    close(torch.autograd.grad(parts, (h, w)), whole)


@pytest.mark.parametrize("temperature", (1.0, 0.7, 2.0))
def test_token_logprobs(temperature):
    h, w, t = head()
    h3, t3 = h[:36].reshape(4, 9, 16), t[:36].reshape(4, 9)
    a = values_and_grads(lambda h, w: K.token_logprobs(h3, w, t3, temperature), (h, w))
    b = values_and_grads(lambda h, w: (h3 @ w.T / temperature).log_softmax(-1).gather(
        -1, t3[..., None])[..., 0], (h, w))
    c = values_and_grads(lambda h, w: K.token_logprobs_reference(h3, w, t3, temperature), (h, w))
    assert a[0].shape == t3.shape
    close(a, b)
    close(c, b)
    with torch.no_grad():
        assert torch.equal(K.token_logprobs(h3, w, t3, temperature), a[0])


@pytest.mark.parametrize("offset", (0.0, 1e4, -3e4))
@pytest.mark.parametrize("tile", (2**21, 64))
def test_large_logits_cost_no_digits(offset, tile, monkeypatch):
    """In fp32, values and gradients are as near to float64's as those of torch's log_softmax. All
    logits are multiples of 1/8, which the product computes exactly at any size."""
    monkeypatch.setattr(chunked_loss, "TILE", tile)
    h = torch.ones(37, 1)
    w = (torch.randint(-40, 41, (50, 1)) / 8 + offset).requires_grad_()
    t = torch.randint(50, (37,))
    def run(fn, w):
        return values_and_grads(fn, [w])
    exact = run(lambda w: (h.double() @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0],
                w.detach().double().requires_grad_())
    torchs = run(lambda w: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0], w)
    for fn in (lambda w: K.token_logprobs(h, w, t),
               lambda w: -K.linear_cross_entropy(h, w, t, reduction="none", chunk_rows=8)):
        for ours, theirs, truth in zip(run(fn, w), torchs, exact, strict=True):
            least = 1e-6 * truth.abs().max()
            assert (ours - truth).abs().max() <= max((theirs - truth).abs().max(), least)
    loss, grad = run(lambda w: K.linear_cross_entropy(h, w, t, reduction="sum")[None], w)
    exact_loss, exact_grad = run(
        lambda w: F.cross_entropy(h.double() @ w.T, t, reduction="sum")[None],
        w.detach().double().requires_grad_())
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=1e-5)


def test_valid_vocab_gives_padding_rows_probability_zero():
    h, w, t = head()
    t = t % 40
    def run(fn, **options):
        return values_and_grads(lambda h, w: fn(h, w, t, **options), (h, w))
    want = values_and_grads(lambda h, w: (h @ w[:40].T).log_softmax(-1).gather(
        1, t[:, None])[:, 0], (h, w))
    close(run(K.token_logprobs, valid_vocab=40), want)
    close(run(K.token_logprobs_reference, valid_vocab=40), want)
    dw = run(K.linear_cross_entropy, valid_vocab=40)[2]
    assert (dw[40:] == 0).all() and (dw[:40] != 0).any()
    with pytest.raises(ValueError, match=r"allowed are 0\.\.29"):
        K.linear_cross_entropy(h, w, t, valid_vocab=30)


def test_head_refuses_what_does_not_fit():
    h, w, t = head()
    for bad in (50, -1):
        with pytest.raises(ValueError, match="targets span"):
            K.linear_cross_entropy(h, w, t.index_fill(0, torch.tensor([3]), bad))
    with pytest.raises(ValueError, match="must be targets' shape"):
        K.linear_cross_entropy(h, w, t[:-1])
    with pytest.raises(ValueError, match="reduction 'max'"):
        K.linear_cross_entropy(h, w, t, reduction="max")
    with pytest.raises(ValueError, match="temperature must be > 0"):
        K.token_logprobs(h, w, t, temperature=0.0)


def test_bf16_logits_are_rounded_in_the_loss_and_not_in_log_probs():
    """On a CPU: the loss as transformers computes it; log-probabilities, of RL, exact."""
    h, w, t = head(V=300, dtype=torch.bfloat16)
    for fn in (K.linear_cross_entropy, K.token_logprobs):
        out, dh, dw = values_and_grads(lambda h, w, f=fn: f(h, w, t), (h, w))
        assert out.dtype == torch.float32 and dh.dtype == dw.dtype == torch.bfloat16
    exact = -F.cross_entropy(h.float() @ w.float().T, t, reduction="none")
    torch.testing.assert_close(K.token_logprobs(h, w, t), exact, rtol=1e-6, atol=1e-6)
    rounded = F.cross_entropy((h @ w.T).float(), t)
    torch.testing.assert_close(K.linear_cross_entropy(h, w, t), rounded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rounded, -exact.mean(), rtol=1e-3, atol=0)
    h, w = h.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = K.linear_cross_entropy(h, w, t)
    loss.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    want = torch.autograd.grad(F.cross_entropy(h @ w.T, t), (h, w))
    for got, exact in zip((h.grad, w.grad), want, strict=True):
        assert (got - exact).norm() < 0.01 * exact.norm()


@pytest.fixture
def cuda_products(monkeypatch):
    """CPU tensors that say is_cuda, and CUDA's two products that a CPU lacks, with its demands.
    Any other bf16 product fails."""
    rows = []  # of each product's bf16 operands: the bytes from one row to the next
    matmul = torch.Tensor.__matmul__

    def checked_matmul(a, b):
        assert a.dtype != torch.bfloat16, "this product would be rounded"
        return matmul(a, b)

    def product(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        rows.extend(2 * max(x.stride()) for x in (a, b) if min(x.shape) > 1)
        return a.double() @ b.double()

    def mm(a, b, *, out_dtype):
        return product(a, b, out_dtype).float()

    def addmm(total, a, b, *, out_dtype, out):
        assert out is total and total.dtype == torch.float32 and total.is_contiguous()
        return total.add_(product(a, b, out_dtype))

    monkeypatch.setattr(torch.Tensor, "__matmul__", checked_matmul)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return rows


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("N, V, chunk_rows", ((37, 64, None), (37, 61, None), (37, 61, 8),
                                              (1, 5, None), (0, 64, None)))
def test_the_head_on_cuda_adds_bf16_products_in_fp32(cuda_products, monkeypatch, autocast, N, V,
                                                     chunk_rows):
    """Numbers against float64 from the same bf16 inputs: fp32 logits, and gradients rounded once.
    Rows of more than 7 columns begin at multiples of 16 bytes, also where the vocabulary is odd."""
    monkeypatch.setattr(chunked_loss, "TILE", 16)  # 2048 logits per tile with the 64 of CUDA
    h, w, t = head(N, 16, 64)
    t = t % V
    h = h.detach().bfloat16().double().requires_grad_()
    w = w.detach().bfloat16().double().requires_grad_()
    kind = torch.float32 if autocast else torch.bfloat16
    leaves = [x.detach().to(kind).requires_grad_() for x in (h, w)]
    for reduction in ("sum", "none"):
        upstream = 0.3 if reduction == "sum" else torch.linspace(-1, 2, N).bfloat16().double()
        want = upstream * F.cross_entropy(h @ w[:V].T, t, reduction=reduction)
        want_grads = torch.autograd.grad(want.sum(), (h, w))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = K.linear_cross_entropy(*leaves, t, reduction=reduction, valid_vocab=V,
                                          chunk_rows=chunk_rows)
        got = upstream * loss
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False)
        got_grads = torch.autograd.grad(got.sum(), leaves)
        for ours, exact in zip(got_grads, want_grads, strict=True):
            assert ours.dtype == kind and (ours - exact).norm() <= 0.01 * exact.norm()
    assert all(stride % 16 == 0 for stride in cuda_products if stride >= 16)


def test_frozen_sides_and_no_grad():
    h, w, t = head()
    want = torch.autograd.grad(K.linear_cross_entropy(h, w, t), (h, w))
    for reduction, count in (("mean", 1), ("none", 37)):
        only_h = K.linear_cross_entropy(h, w.detach(), t, reduction=reduction).sum() / count
        only_w = K.linear_cross_entropy(h.detach(), w, t, reduction=reduction).sum() / count
        close(torch.autograd.grad(only_h, h), want[:1])
        close(torch.autograd.grad(only_w, w), want[1:])
    with torch.no_grad():
        assert not K.linear_cross_entropy(h, w, t).requires_grad


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_peak_memory_is_flat_in_rows(reduction):
    """R4.7: no tensor beyond the chunk of logits and the weight's gradient, at any length."""
    V, C = 20_000, 8
    w = torch.randn(V, C, requires_grad=True)
    def run(N):
        h, t = torch.randn(N, C, requires_grad=True), torch.randint(V, (N,))
        return largest_allocation(lambda: K.linear_cross_entropy(
            h, w, t, reduction=reduction, chunk_rows=16).sum().backward())
    assert run(64) == run(1024) == 4 * 16 * V < 4 * 64 * V


# --- norm and SwiGLU ------------------------------------------------------------------------------
def norm_and_swiglu(shape, C=6, dtype=torch.float64):
    """(kernel, twin, tensors) of both, the tensors of `shape` not contiguous."""
    x, gate, up = (torch.randn(*shape[::-1], 2 * C, dtype=dtype)[..., ::2] for _ in range(3))
    order = (*reversed(range(len(shape))), len(shape))
    x, gate, up = (a.permute(order).detach().requires_grad_() for a in (x, gate, up))
    weight, down = (torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((C,), (5, C)))
    norm, twin = ((lambda x, w, f=f: f(x, w, 1e-6)) for f in (K.rms_norm, K.rms_norm_reference))
    return (norm, twin, [x, weight]), (K.swiglu, K.swiglu_reference, [gate, up, down])


@pytest.mark.parametrize("shape", ((3, 7), (1,), (0,), (2, 4, 3), ()))
def test_norm_and_swiglu_equal_their_twins(shape):
    for kernel, twin, leaves in norm_and_swiglu(shape):
        close(values_and_grads(kernel, leaves), values_and_grads(twin, leaves))
        if shape == (3, 7):
            assert torch.autograd.gradcheck(kernel, leaves)


def test_norm_and_swiglu_in_bf16():
    """As exact as what autograd makes of the twin in bf16: error in gradients against float64."""
    for exact, rounded in zip(norm_and_swiglu((64,), 32), norm_and_swiglu(
            (64,), 32, torch.bfloat16), strict=True):
        (_, twin, exact), (kernel, twin16, leaves) = exact, rounded
        with torch.no_grad():
            for a, b in zip(exact, leaves, strict=True):
                a.copy_(b)
        truth, mine, torchs = (values_and_grads(f, x) for f, x in (
            (twin, exact), (kernel, leaves), (twin16, leaves)))
        for t, a, b in zip(truth, mine, torchs, strict=True):
            assert a.dtype == torch.bfloat16 and (a - t).norm() <= 1.05 * (b - t).norm()


def test_a_norm_that_several_products_read_in_bf16():
    """Their gradients are summed in bf16: a little further from float64 than the twin's casts; and
    autocast may be on in the backward pass."""
    x, w, *readers = (torch.randn(*size, dtype=torch.float64, requires_grad=True)
                      for size in ((64, 32), (32,), (32, 32), (32, 32), (32, 32)))
    def loss(norm):
        y = norm(x, w, 1e-6)
        return sum((y @ reader).square().sum() for reader in readers)
    truth = torch.autograd.grad(loss(K.rms_norm_reference), (x, w))
    x, w, *readers = (a.detach().float().requires_grad_() for a in (x, w, *readers))
    errors = []
    with torch.autocast("cpu", torch.bfloat16):
        for norm in K.rms_norm, K.rms_norm_reference:
            grads = torch.autograd.grad(loss(norm), (x, w))
            errors.append([((a - t).norm() / t.norm()).item() for a, t in
                           zip(grads, truth, strict=True)])
    assert all(a < 1.6 * b < 0.02 for a, b in zip(*errors, strict=True)), errors


def test_norm_and_swiglu_keep_their_inputs_only():
    for dtype in (torch.float32, torch.bfloat16):
        autocast = torch.autocast("cpu", enabled=dtype == torch.bfloat16)
        for i, (kernel, _, leaves) in enumerate(norm_and_swiglu((16,), dtype=torch.float32)):
            if i:                                    # gate and up come from autocast's products
                leaves[:2] = [x.detach().to(dtype).requires_grad_() for x in leaves[:2]]
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x), autocast:
                out = kernel(*leaves)
            assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in leaves]
            assert out.dtype == dtype
            with torch.no_grad(), autocast:
                assert torch.equal(kernel(*leaves), out)   # sampling and training agree


# --- experts --------------------------------------------------------------------------------------
def experts(N=9, C=8, inner=12, dtype=torch.float64):
    """Of five experts 1 and 4 have no token, 3 has one."""
    expert = torch.tensor([[0, 3]] + [[0, 2], [2, 0]] * 4)[:N]
    shapes = (N, C), (N, 2), (5, 2 * inner, C), (5, C, inner)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes], expert


def per_token(x, weight, gate_up, down, expert):
    def ffn(row, e):
        gate, up = gate_up[e].split(down.shape[2])
        return down[e] @ (F.silu(gate @ row) * (up @ row))
    return torch.stack([sum(w * ffn(row, e) for w, e in zip(*pair, strict=True))
                        for row, *pair in zip(x, weight, expert, strict=True)])


@pytest.mark.parametrize("impl,dtype,tol", [
    ("reference", torch.float64, 1e-12), ("auto", torch.float64, 1e-12),
    ("auto", torch.float32, 1e-4), ("grouped", torch.float32, 1e-4)])
@pytest.mark.parametrize("unit", [1, 4, 16])
def test_experts_equal_a_loop_over_tokens(impl, dtype, tol, unit, monkeypatch):
    """R5.5: forward and backward; with rows that belong to no pair, and without."""
    if impl == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(fast, "EXPERT_ROWS", unit)
    leaves, expert = experts(dtype=dtype)
    a = values_and_grads(lambda *x: K.experts(*x, expert, impl=impl), leaves)
    close(a, values_and_grads(lambda *x: per_token(*x, expert), leaves), tol)
    assert (a[3][[1, 4]] == 0).all() and (a[4][[1, 4]] == 0).all()
    K.experts(*leaves, expert, impl=impl).sum().backward()         # an expanded upstream gradient


def test_experts_odd_sizes_no_rows_and_errors():
    for N, C, inner in ((9, 7, 12), (9, 8, 5), (1, 8, 12)):        # strides no grouped matmul takes
        leaves, expert = experts(N, C, inner, torch.float32)
        torch.testing.assert_close(K.experts(*leaves, expert), per_token(*leaves, expert))
    (x, weight, gate_up, down), expert = experts(dtype=torch.float32)
    none = K.experts(x[:0], weight[:0], gate_up, down, expert[:0])
    none.sum().backward()
    assert none.shape == (0, 8) and (gate_up.grad == 0).all()
    with pytest.raises(ValueError, match="not one of auto"):
        K.experts(x, weight, gate_up, down, expert, impl="triton")


@pytest.mark.parametrize("frozen", [(2, 3), (2,), (3,)])
def test_frozen_experts_cost_no_gradients(frozen):
    """LoRA freezes the routed experts: the other gradients are the same, theirs are not computed.
    Without gradients nothing is kept for a backward pass."""
    leaves, expert = experts(dtype=torch.float64)
    _, *full = values_and_grads(lambda *x: K.experts(*x, expert, impl="fused"), leaves)
    for i in frozen:
        leaves[i].grad = None
        leaves[i].requires_grad_(False)
    y = K.experts(*leaves, expert, impl="fused")
    grads = fast.Experts.backward(y.grad_fn, torch.ones_like(y))
    assert [i for i in range(4) if grads[i] is None] == list(frozen)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    part = values_and_grads(lambda *x: K.experts(*leaves, expert, impl="fused"), trained)[1:]
    close(part, [grad for i, grad in enumerate(full) if i not in frozen], 1e-12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.no_grad():
            K.experts(*leaves, expert, impl="fused")
    assert kept == []


@pytest.mark.parametrize("N", [300, 3000])
def test_experts_of_many_tokens(N):
    """Against the twin, with strides: float64 to rounding, under autocast no further from it than
    the twin's own bf16. 3000 tokens: every expert has several EXPERT_ROWS."""
    shapes = (16, N), (N, 6), (24, 5, 16), (5, 12, 16)
    x, weight, gate_up, down = (torch.randn(s, dtype=torch.float64) / 4 for s in shapes)
    leaves = [a.requires_grad_() for a in (x.mT, weight[:, ::2], gate_up.transpose(0, 1), down.mT)]
    expert = torch.randn(N, 5).topk(3).indices.mT.contiguous().mT
    truth = values_and_grads(lambda *x: K.experts_reference(*x, expert), leaves)
    close(values_and_grads(lambda *x: K.experts(*x, expert), leaves), truth, 1e-12)
    errors, single = [], [a.detach().float().requires_grad_() for a in leaves]
    for impl in ("fused", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            half = values_and_grads(functools.partial(K.experts, expert=expert, impl=impl), single)
        errors.append([(a - b).norm() / b.norm() for a, b in zip(half, truth, strict=True)])
    assert all(a < 1.1 * b for a, b in zip(*errors, strict=True)), errors


# --- packed rows by FlexAttention -----------------------------------------------------------------
def packed_rows(T):
    """Documents of 90 tokens; of 150, 7, 1 and the rest; and one alone."""
    uneven = torch.bucketize(torch.arange(T), torch.tensor([150, 157, 158]), right=True)
    return torch.stack([torch.arange(T) // 90, uneven, torch.zeros(T, dtype=torch.long)])


@pytest.mark.parametrize("T", [60, 256, 500])
def test_the_block_mask_is_that_of_the_rule_and_the_rule_is_visible(T):
    """Bit for bit: `may_attend` against `visible`, and every list of blocks against PyTorch's own
    create_block_mask, which goes through a (T,T) mask. Whole blocks and a ragged end."""
    from torch.nn.attention.flex_attention import create_block_mask, create_mask
    ids = packed_rows(T)
    q = torch.zeros(3, 1, T, 8)
    ours = K.flex_block_mask(ids)
    rule = create_mask(ours.mask_mod, 3, None, T, T, device="cpu")
    assert torch.equal(rule, K.visible(q, q, ids, None))
    theirs = create_block_mask(
        lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]), 3, None, T, T, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
                 "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_flex_equals_the_reference_and_leaves_the_rest_to_sdpa():
    q, k, v = (x.detach().float() for x in qkv(B=3, T=300, D=16))
    ids = packed_rows(300)
    want = K.attention(q, k, v, segment_ids=ids, impl="reference")
    block_mask = K.flex_block_mask(ids)
    for options in ({}, {"block_mask": block_mask}):
        out = K.attention(q, k, v, segment_ids=ids, impl="flex", **options)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(K.attention(q, k, v, impl="flex"), K.attention(q, k, v, impl="sdpa"))
    mask = torch.rand(3, 1, 1, 300) > 0.5
    rest = {"segment_ids": ids, "mask": mask}
    assert torch.equal(K.attention(q, k, v, impl="flex", **rest),
                       K.attention(q, k, v, impl="sdpa", **rest))


def test_flex_memory_is_linear_in_length():
    """Of the BlockMask: one entry per block, none per score."""
    def run(T):
        return largest_allocation(lambda: K.flex_block_mask(torch.zeros(1, T, dtype=torch.long)))
    assert run(8192) <= 8192 * 8  # (T,T) bool would be 1024 times as much
    assert K.packed_block_mask(torch.zeros(1, 8, dtype=torch.long)) is None  # on a CPU


# --- the script and the compiler ------------------------------------------------------------------
@pytest.mark.slow
def test_compiled_kernels_equal_the_eager_ones_and_do_not_recompile():
    """R4.8: full chunks of the head and blocks of attention are compiled once; ragged remainders
    and other lengths never recompile."""
    def run(lengths=(128, 128, 130, 150)):
        torch.manual_seed(0)
        results = []
        for T in lengths:
            for rest in ({}, {"segment_ids": (torch.arange(T) // 50).expand(2, T)}):
                results.append(values_and_grads(lambda q, k, v, rest=rest: K.attention(
                    q, k, v, impl="fused", **rest), qkv(T=T, S=T, dtype=torch.float32)))
            h, w, t = head(N=T, dtype=torch.float32)
            t[:T - 120] = -100
            for reduction in ("mean", "none"):
                results.append(values_and_grads(lambda h, w, t=t, r=reduction:
                    K.linear_cross_entropy(h, w, t, reduction=r, chunk_rows=32), (h, w)))
        return results
    eager = run()
    K.set_default_impl(compile=True)
    for a, b in zip(eager, run(), strict=True):
        close(a, b, 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run()


def test_when_products_go_to_onednn(precision, monkeypatch):
    """From a size on, never where a trial shows less than fp32, never for a GPU, and one query of
    attention leaves the choice as it was."""
    cpu, exact = torch.device("cpu"), fast.medium_is_exact()
    for fits in (True, False):
        monkeypatch.setattr(fast, "medium_is_exact", lambda fits=fits: fits)
        for rows, width, least, large in ((2**7, 256, {}, True), (2**7 - 1, 256, {}, False),
                                          (2**9, 128, {}, True), (16, 256, {"least": 2**20}, True),
                                          (15, 256, {"least": 2**20}, False)):
            fast.set_cpu_matmul(rows, width, cpu, **least)
            assert precision() == ("medium" if large and fits else "highest")
    for name in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(name)
        fast.set_cpu_matmul(2**20, 256, torch.device("cuda"))
        q, k, v = qkv(T=1, S=5, dtype=torch.float32)
        K.attention(q, k, v)
        assert precision() == name
    monkeypatch.undo()
    assert fast.medium_is_exact() == exact and precision() == "medium"


def test_both_libraries_agree_in_fp32(precision):
    """To 1e-5 of the largest entry, values and gradients: each sums 512 terms in its own order.
    bf16 inside would be off by 4e-3, which the trial is there to exclude."""
    if not fast.medium_is_exact():
        pytest.skip("this CPU computes medium precision in bf16, so it is never chosen")
    x, w = torch.randn(512, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    both = []
    for name in ("highest", "medium"):
        torch.set_float32_matmul_precision(name)
        both.append(values_and_grads(lambda x, w: F.linear(x, w).square(), [x, w]))
    for a, b in zip(*both, strict=True):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


@pytest.mark.parametrize("kernel", [lambda x: x.sin() * torch.nan,              # all is NaN
                                    lambda x: x.sin() + (x - x).sqrt()])        # the gradient only
def test_the_script_refuses_a_kernel_that_returns_nan(kernel):
    with pytest.raises(SystemExit, match="a kernel differs from its reference"):
        K.compare("a kernel", torch.sin, kernel, [torch.ones(3)])


def test_the_script_leaves_its_inputs_as_they_are():
    x = torch.ones(3)
    K.compare("a kernel", torch.sin, lambda x: x.sin(), [x])
    assert not x.requires_grad


@pytest.mark.slow
def test_the_script_checks_itself():
    out = subprocess.run([sys.executable, str(ROOT / "kernels.py")], capture_output=True, text=True,
                         timeout=300)
    assert out.returncode == 0, out.stderr
    for name in ("attention sdpa", "attention fused", "dual_chunk_attention",
                 "linear_cross_entropy", "token_logprobs",
                 "experts"):
        assert name in out.stdout
