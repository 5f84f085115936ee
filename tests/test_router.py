"""lib/router.py: the balance loss of each post-training stage against that of its rows alone, one
by one and without padding. And gradient checkpointing of prompts that are read once."""
import pytest
import torch
from helpers import gradients, stage_args, tiny_model

import grpo as grpo_stage
from data.pairs import PairIds
from dpo import sequence_logprobs
from lib.optim import pad_rows
from lib.router import RouterStats
from model import load_balancing_loss
from reward import RewardModel, pair_rewards
from sample import completion_logprobs
from data.conversations import PackedRow, Row, pack
from sft import sft_loss

PROMPTS = [[5, 9, 2, 7], [8, 8, 1], [5, 9, 2, 7]]  # one twice: it is read once, and counts twice
ANSWERS = [[3, 4], [60, 61, 62, 63, 64], [31, 32, 33]]
REJECTED = [[11], [12, 13, 14], [15, 16, 17, 18]]


def experts(kind=None):
    """An MoE of three layers, of which the second is dense."""
    model = tiny_model(num_hidden_layers=3, mlp_only_layers=(1,), num_experts=6,
                       num_experts_per_tok=2, moe_intermediate_size=16,
                       shared_expert_intermediate_size=16, router_aux_loss_coef=0.3)
    return kind.from_language_model(model, None) if kind else model


def sft(model, router):
    ids = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    mask = pad_rows([[1] * len(row) for row in ids], -1)
    sft_loss(model, pad_rows(ids, 0), mask, 1, router=router)
    return [row[:-1] for row in ids]  # the last token has no target


def sft_packed(model, router):
    """A conversation's last token has a target in front of the next one: the next one's first."""
    rows = [Row(prompt + [0], [0] + [1] * len(prompt)) for prompt in PROMPTS[:2]]
    packed = [*pack(rows, 20), PackedRow([0, 0], [-1, -1], [0, 0])]
    ids, mask, segments = (pad_rows(list(column), pad) for column, pad in zip(
        zip(*packed, strict=True), (0, -1, -1), strict=True))
    sft_loss(model, ids, mask, 1, segments, router)
    return [PROMPTS[0] + [0], PROMPTS[1]]


def grpo(model, router):
    completion_logprobs(model, PROMPTS, ANSWERS, router=router)
    return [prompt + answer[:-1] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


def dpo(model, router):
    rows = [PairIds(*row) for row in zip(PROMPTS, ANSWERS, REJECTED, strict=True)]
    sequence_logprobs(model, rows, router)
    return [row.prompt + answer[:-1] for row in rows for answer in (row.chosen, row.rejected)]


def reward(model, router):
    rows = [PairIds(*row) for row in zip(PROMPTS, ANSWERS, REJECTED, strict=True)]
    pair_rewards(model, rows, router)
    return [row.prompt + answer for row in rows for answer in (row.chosen, row.rejected)]


@pytest.mark.parametrize("stage", [sft, sft_packed, dpo, reward, grpo])
def test_balance_loss_is_that_of_the_rows_without_padding(stage):
    """Its value, load and entropy, and its gradient, which reaches the routers without any other
    loss. With padding counted, as a router that takes all tokens sees them, it is another."""
    model = experts(RewardModel if stage is reward else None)
    router = RouterStats(model.config)
    rows = stage(model, router)
    router.loss(0.5).backward()
    found, logged = gradients(model), router.end_step(1)
    for layer in (0, 2):
        assert model.model.layers[layer].mlp.gate.weight.grad.abs().max() > 1e-3
    model.zero_grad()

    layers = [([], []), ([], [])]
    for row in rows:
        alone = []
        model.hidden(torch.tensor([row]), router=alone)
        for (probs, expert), one in zip(layers, alone, strict=True):
            probs.append(one[0])
            expert.append(one[1])
    aux, load, entropy = load_balancing_loss(
        [(torch.cat(probs), torch.cat(expert)) for probs, expert in layers])
    (0.5 * model.config.router_aux_loss_coef * aux).backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)
    assert logged["aux"] == pytest.approx(0.5 * aux.item(), rel=1e-5)
    assert logged["expert_max"] == pytest.approx((0.5 * load).amax(1).tolist(), abs=1e-4)
    assert logged["router_entropy"] == pytest.approx((0.5 * entropy).tolist(), abs=1e-4)
    assert router.end_step(2) == {}


def test_a_dense_model_has_no_balance_loss():
    model = tiny_model()
    router = RouterStats(model.config)
    grpo(model, router)
    assert router.loss(1.0) == 0.0 and router.end_step(1) == {}


@pytest.mark.parametrize("make", [tiny_model, experts], ids=["dense", "moe"])
@pytest.mark.parametrize("answers", [40, 400], ids=["short", "long"])
def test_recomputed_activations_of_prompts_and_answers_change_no_bit(make, answers):
    """A block runs again after its cache has grown and its rows were selected. Long answers are
    multiplied by oneDNN, their prompts by MKL, and each of them again by its own."""
    model = make(hidden_size=256, num_attention_heads=4) if make is tiny_model else make()
    completions = [[(7 * i + row) % 90 for i in range(answers + row)] for row in range(3)]
    found = []
    for model.gradient_checkpointing in (False, True):
        router = RouterStats(model.config)
        logprobs, _ = completion_logprobs(model, PROMPTS, completions, router=router)
        (logprobs.mean() + router.loss(1.0)).backward()
        found.append((logprobs, gradients(model)))
        model.zero_grad(set_to_none=True)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize("make", [tiny_model, experts], ids=["dense", "moe"])
def test_the_reference_in_bfloat16_changes_no_bit_under_autocast(make):
    """Its attention and MLPs take half the memory of the policy's; norms and embeddings do not."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    model = make()
    reference = grpo_stage.reference_policy(model, stage_args(grpo_stage, kl=0.1),
                                            autocast)
    with torch.no_grad(), autocast:
        a, _ = completion_logprobs(model, PROMPTS, ANSWERS)
        b, _ = completion_logprobs(reference, PROMPTS, ANSWERS)
    assert torch.equal(a, b) and a.abs().sum() > 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    blocks = reference.model.layers
    assert {p.dtype for block in blocks for p in block.mlp.parameters()} == {torch.bfloat16}
    assert blocks[0].input_layernorm.weight.dtype == torch.float32
