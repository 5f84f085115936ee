"""Every stage's forward pass on fake CUDA tensors: devices, dtypes, and where the host waits."""
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fake_cuda import fake_cuda, fake_model
from safetensors.torch import load_file

import kernels
import lib.checkpoint
import lib.plan
from data.pairs import PairIds
from dpo import dpo_loss, sequence_logprobs
from grpo import grpo_loss
from lib.checkpoint import save_adapter
from lib import chunked_loss
from lib.fast import matmul_fp32
from lib.lora import add_lora
from lib.optim import throughput
from model import PRESETS, Qwen2, load_balancing_loss
from lib.router import RouterStats
from pretrain import lm_loss
from reward import RewardModel, pair_rewards
from sample import completion_logprobs, generate
from sft import sft_loss

CONFIGS = {"dense": PRESETS["micro"], "moe": PRESETS["micro-moe"]}
PROMPTS = [[1, 2, 3], [4, 5]]  # of different lengths: the second is padded on the left
LOSS_ONLY = ["chunked_loss.chunked_nll"]  # which looks for the supervised rows


def bf16():
    return torch.autocast("cuda", torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
def test_pretraining_and_sft_wait_once_per_loss(config, packed):
    """Packed rows go to FlexAttention: a mask as large as these scores is refused by `sdpa`."""
    with fake_cuda() as gpu:
        model = fake_model(Qwen2, config)
        ids = torch.zeros(2, 1537, dtype=torch.long, device="cuda")
        segment_ids = ids if packed else None
        router = RouterStats(config)
        with bf16():
            loss = lm_loss(model, ids, segment_ids, 3, router)
            loss = loss + router.loss(0.5)
        assert gpu.syncs == LOSS_ONLY and "_assert_async" in gpu.calls
        assert ("_grouped_mm" in gpu.calls) == (config.num_experts > 0)
        assert loss.is_cuda and loss.dtype == torch.float32 and loss.requires_grad
        gpu.syncs.clear()
        with bf16():
            loss = sft_loss(model, ids, ids, 3, segment_ids)
        assert gpu.syncs == LOSS_ONLY and loss.dtype == torch.float32


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_preference_stages_and_grpo(config):
    """Prompts of different lengths, padded on the left, read once into a growing cache."""
    rows = [PairIds(prompt, [1, 2], [1, 2, 3]) for prompt in PROMPTS]
    with fake_cuda():
        model = fake_model(Qwen2, config)
        scorer = fake_model(RewardModel, config)
        with bf16():
            chosen, rejected, length = sequence_logprobs(model, rows)
            rewards = pair_rewards(scorer, rows)
            logprobs, mask = completion_logprobs(model, PROMPTS, [[1, 2], [3]], valid_vocab=500)
        losses, *_ = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)
        loss, _ = grpo_loss(logprobs, logprobs.detach(), None, torch.ones(2, device="cuda"), mask)
        for x in (losses, *rewards, logprobs, loss):
            assert x.is_cuda and x.dtype == torch.float32 and x.requires_grad


@pytest.mark.parametrize("kind,autocast", [("dense", False), ("dense", True), ("moe", True)])
def test_decoding_waits_once_per_token(kind, autocast):
    """With left padding, shared prompts and a cache; in float32, where attention's strides forbid a
    view; under autocast, the experts are cast once per rollout."""
    with fake_cuda() as gpu, torch.no_grad(), torch.autocast("cuda", torch.bfloat16,
                                                             enabled=autocast):
        model = fake_model(Qwen2, CONFIGS[kind])
        weights = getattr(model.model.layers[0].mlp, "experts", None)
        casts = 0
        for tokens in (2, 4):
            gpu.syncs.clear()
            gpu.cast.clear()
            # Outside of inference mode, under which fake tensors do not decompose operations.
            out = generate.__wrapped__(model, PROMPTS, tokens, stop_ids=(0,), n=2)
            assert len(out) == 4
            assert Counter(gpu.syncs)["sample.generate_batch"] == tokens
            if weights is not None:
                before, casts = casts, gpu.cast.count(tuple(weights.gate_up_proj.shape))
                assert casts == before or before == 0
        assert (casts > 0) == (kind == "moe")


def test_the_head_on_a_gpu_is_three_products_per_chunk_of_rows():
    """Of 883 rows at V 151,936: the logits in fp32, kept for the gradients, which are added in fp32
    by the products themselves. The head's weight is cast once."""
    N, C, V = 2000, 896, 151_936
    added = []
    addmm = torch.addmm

    def noted_addmm(total, a, b, **options):
        added.append((tuple(a.shape), a.dtype, b.dtype, total.dtype, options["out"] is total))
        return addmm(total, a, b, **options)

    with fake_cuda() as gpu, bf16(), mock.patch.object(torch, "addmm", noted_addmm):
        hidden = torch.empty(N, C, device="cuda", requires_grad=True)
        weight = torch.empty(V, C, device="cuda", requires_grad=True)
        targets = torch.zeros(N, dtype=torch.long, device="cuda")
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32 and gpu.cast.count((V, C)) == 1
    kinds = (torch.bfloat16, torch.bfloat16, torch.float32, True)
    expected = []
    for n in (883, 883, 234):
        expected += [((n, V), *kinds), ((V, n), *kinds)]
    assert added == expected and gpu.calls.count("mm") == 3


def test_dual_chunks_on_a_gpu_come_in_large_blocks():
    with fake_cuda() as gpu, torch.no_grad(), bf16():
        model = fake_model(Qwen2, replace(CONFIGS["dense"], chunk_size=16, local_size=4))
        out = generate.__wrapped__(model, [[1] * 30, [4, 5]], 4)
        assert len(out) == 2 and gpu.calls


def test_the_balance_loss_does_not_wait():
    with fake_cuda() as gpu:
        probs = torch.empty(64, 8, device="cuda")
        load_balancing_loss([(probs, probs.topk(2).indices)])
        assert gpu.syncs == []


@pytest.mark.parametrize("name", ["micro", "micro-moe", "tiny"])
def test_mfu_counts_the_flops_of_the_plan(name):
    """lib.plan.flops, itself compared with PyTorch's counter; without a GPU there is no mfu."""
    config, lengths = PRESETS[name], [64] * 6
    want = lib.plan.flops(lib.plan.count(config)["N"], 384, config, 64) / 2.0 / 5e12
    with fake_cuda():
        got = throughput(fake_model(Qwen2, config), lengths, 2.0, peak_tflops=5.0)
    assert got == {"tokens_per_s": 192.0, "mfu": pytest.approx(want)}
    assert throughput(Qwen2(config), lengths, 2.0, 5.0) == {"tokens_per_s": 192.0}


def test_flex_is_the_default_for_packed_rows_on_a_gpu():
    with fake_cuda():
        ids = torch.zeros(1, 300, dtype=torch.long, device="cuda")
        mask = kernels.packed_block_mask(ids)
        assert mask.kv_indices.is_cuda and mask.kv_indices.shape == (1, 1, 3, 3)


def test_an_adapter_is_merged_on_the_gpu(tmp_path):
    """Its file is read into the memory of the CPU."""
    model = Qwen2(CONFIGS["dense"])
    add_lora(model, 2, 4.0)
    save_adapter(model, tmp_path, "base")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    with fake_cuda(), mock.patch.object(lib.checkpoint, "open_weights") as open_weights:
        opened = open_weights.return_value.__enter__.return_value
        opened.keys.return_value = weights.keys()
        opened.get_tensor = weights.get
        with mock.patch.object(torch.Tensor, "isfinite", lambda self: mock.Mock(all=lambda: True)):
            lib.checkpoint.merge_adapter(fake_model(Qwen2, CONFIGS["dense"]), tmp_path)


def test_a_temperature_keeps_the_products_of_the_sampler():
    """In bfloat16 with fp32 logits: other weights would show in GRPO's ratio."""
    dtypes = []

    def product(a, b):
        dtypes.append((a.dtype, b.dtype))
        return matmul_fp32(a, b)
    with fake_cuda(), bf16(), mock.patch.object(chunked_loss, "matmul_fp32", product):
        hidden = torch.empty(6, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(32, 16, device="cuda", requires_grad=True)
        targets = torch.zeros(6, dtype=torch.long, device="cuda")
        logprobs = kernels.token_logprobs(hidden, weight, targets, 0.7)
    assert logprobs.dtype == torch.float32
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
