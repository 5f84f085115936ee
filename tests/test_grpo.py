"""grpo.py: advantages and losses by hand and against TRL's, invariances, the KL's true gradient on
an enumerable policy, a bandit that must be learned, pre-flight refusals, resume. R numbers:
docs/requirements.md."""
import json
import math
import types

import pytest
import torch
from helpers import (
    gradients, interrupt_at, letter_queries, log, refuses, same_weights, stage_args, teach_letters,
    tiny_model, write_rows)

import lib.args
import tasks.custom
import tasks.queries
import grpo
from grpo import (
    group_advantages, grpo_loss, sample_episode, shaped_reward)
from sample import Rollout, completion_logprobs, generate, rollout

LOSS_TYPES = ["grpo", "dapo", "dr_grpo"]


# ---------------------------------------------------------------------------------------------
# reward, order, advantages

def test_advantages_of_one_right_in_eight():
    """population std 0.330719, so 2.645751 and -0.377964 (Bessel's would be 2.474874)."""
    a = group_advantages(torch.tensor([[1.0] + [0.0] * 7]))[0]
    assert a[0].item() == pytest.approx(2.645751, abs=2e-5)
    assert a[1:].tolist() == pytest.approx([-0.377964] * 7, abs=2e-5)


def test_advantages_belong_to_their_group():
    """Each row is normalised alone: its own mean and spread, whatever the other rows are."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 0.0, 1.0]])
    together = group_advantages(rewards)
    for row, alone in zip(rewards, together, strict=True):
        torch.testing.assert_close(group_advantages(row[None])[0], alone, rtol=0, atol=0)
        assert alone.mean().abs() < 1e-6
        assert alone.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_advantages_without_normalisation():
    """Dr. GRPO: only centred."""
    a = group_advantages(torch.tensor([[3.0, 0.0, 0.0, 1.0]]), "none")
    assert a.tolist() == [[2.0, -1.0, -1.0, 0.0]]


@pytest.mark.parametrize("normalise", ["group", "none"])
@pytest.mark.parametrize("value,n", [(0.1, 7), (0.7, 11), (-0.3, 8), (1.0, 8), (0.0, 2), (1e8, 3)])
def test_equal_rewards_have_exactly_no_advantage(value, n, normalise):
    """R12.3: 7 x 0.1 has a float32 mean that is not 0.1; max - min decides, so exactly 0."""
    rewards = torch.full((2, n), value)
    rewards[1, 0] += 1
    a = group_advantages(rewards, normalise)
    assert a[0].tolist() == [0.0] * n


def test_group_of_one_is_refused():
    """R12.3."""
    refuses(lambda: group_advantages(torch.ones(3, 1)), "group")


def test_shaped_reward():
    """r_m = 2 gives .731 right and -.269 wrong; a wrong answer never beats a right one."""
    r = shaped_reward(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))
    assert r.tolist() == pytest.approx([0.731059, -0.268941], abs=1e-6)
    worst, best = shaped_reward(torch.tensor([1.0, 0.0]), torch.tensor([-30.0, 30.0]))
    assert worst > best - 1e-6
    assert shaped_reward(torch.tensor([1.0, 0.0])).tolist() == [1, 0]
    half = shaped_reward(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]), weight=0.5)
    assert half.tolist() == pytest.approx([0.865529, -0.134471], abs=1e-6)


# ---------------------------------------------------------------------------------------------
# the loss

def case(seed=0, lengths=(3, 5, 1, 4)):
    """Random log-probabilities off-policy: about half the ratios lie beyond the clip."""
    g = torch.Generator().manual_seed(seed)
    B, R = len(lengths), max(lengths)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    logprobs, old, ref = (-2 * torch.rand(3, B, R, generator=g)).unbind()
    old = logprobs + 0.4 * (old + 1)
    return logprobs, old, ref, torch.randn(B, generator=g), mask


def by_hand(logprobs, old, ref, advantages, mask, eps, high, kl, loss_type):
    """DeepSeekMath eq. 3, DAPO eq. 8 to 10 in plain Python floats, token by token."""
    rows, tokens, clipped = [], 0, 0
    for i in range(len(mask)):
        row = []
        for t in range(mask.shape[1]):
            if not mask[i, t]:
                continue
            ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
            a = advantages[i].item()
            value = min(ratio * a, max(min(ratio, 1 + high), 1 - eps) * a)
            clipped += value < ratio * a
            if ref is not None:
                x = ref[i, t].item() - logprobs[i, t].item()
                value -= kl * ratio * (math.exp(x) - x - 1)
            row.append(-value)
            tokens += 1
        rows.append(row)
    total = sum(map(sum, rows))
    return {"grpo": sum(sum(row) / len(row) for row in rows) / len(rows),
            "dapo": total / tokens, "dr_grpo": total / mask.numel()}[loss_type], clipped


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("high", [0.0, 0.5])
def test_loss_equals_the_formula(loss_type, kl, high):
    """R12.4: each aggregation against the sums written out; the clip and the KL are active."""
    logprobs, old, ref, advantages, mask = case()
    loss, logs = grpo_loss(logprobs, old, ref if kl else None, advantages, mask, clip_eps=0.2,
                           clip_high=high, kl=kl, loss_type=loss_type)
    want, clipped = by_hand(logprobs, old, ref if kl else None, advantages, mask, 0.2, high or 0.2,
                            kl, loss_type)
    assert loss.item() == pytest.approx(want, abs=1e-5)
    assert logs["clipped"] == clipped and 0 < clipped < mask.sum()


@pytest.mark.parity
@pytest.mark.parametrize("theirs_type,loss_type", [
    ("grpo", "grpo"), ("dr_grpo", "dr_grpo"), ("dapo", "dapo"), ("bnpo", "dapo")])
def test_loss_gradients_and_advantages_equal_trl(theirs_type, loss_type, tmp_path, tokenizer,
                                                 compare):
    """TRL's GRPOTrainer on random completions and rewards, off-policy, with KL and clip-higher. Its
    std is Bessel's, with 1e-4 added, ours the paper's with 1e-6; bnpo divides by the tokens of one
    micro-batch and dapo by the step's, which are the same here."""
    trl = pytest.importorskip("trl", reason="make test-parity installs it")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    vocab, G, longest = tokenizer.padded_vocab_size(128), 4, 9
    ours = [tiny_model(seed, 1.5, vocab_size=vocab) for seed in (0, 1)]  # policy, reference
    for i, model in enumerate(ours):
        model.save_pretrained(tmp_path / str(i))
    tokenizer.save_pretrained(tmp_path / "0")
    theirs, reference = (AutoModelForCausalLM.from_pretrained(tmp_path / str(i),
                                                              dtype=torch.float32) for i in (0, 1))
    scale = "none" if theirs_type == "dr_grpo" else "group"
    trainer = trl.GRPOTrainer(
        theirs, lambda **kwargs: rewards, trl.GRPOConfig(
            str(tmp_path / "trl"), loss_type=theirs_type, beta=0.3, use_bias_correction_kl=True,
            epsilon=0.2, epsilon_high=0.28, scale_rewards=scale, num_generations=G,
            max_completion_length=longest, temperature=0.7,
            per_device_train_batch_size=2 * G, gradient_accumulation_steps=1, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "p"}]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "0"))
    trainer.ref_model.load_state_dict(reference.state_dict())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(5, tokenizer.n_vocab, (n,), generator=generator).tolist()
    for _ in range(5):
        sizes = torch.randint(1, longest, (2 * G,), generator=generator).tolist()
        prompts = [prompt for prompt in (draw(3), draw(6)) for _ in range(G)]
        answers = [draw(n) for n in sizes]
        rewards = torch.rand(2 * G, generator=generator).tolist()
        sampled = prompts, answers, None, ["c"] * 2 * G, None, {}, None, None
        trainer._generate = lambda prompts, sampled=sampled: sampled
        batch = trainer._generate_and_score_completions([{"prompt": "p"}] * 2 * G)
        table = torch.tensor(rewards).view(2, G)
        advantages = group_advantages(table, scale)
        if scale == "group":
            advantages *= (table.std(1, unbiased=False) + 1e-6)[:, None]
            advantages /= (table.std(1) + 1e-4)[:, None]
        compare("GRPO advantages, TRL", advantages.flatten(), batch["advantages"], 1e-5)

        logprobs, mask = completion_logprobs(ours[0], prompts, answers, 0.7)
        ref = completion_logprobs(ours[1], prompts, answers, 0.7)[0].detach()
        old = logprobs.detach() + 0.5 * torch.randn(mask.shape, generator=generator)
        batch["old_per_token_logps"] = old
        want = trainer.compute_loss(trainer.model, batch)
        want.backward()
        loss, logs = grpo_loss(
            logprobs, old, ref, advantages.flatten(), mask, clip_eps=0.2, clip_high=0.28, kl=0.3,
            loss_type=loss_type, count=2 * G * longest if loss_type == "dr_grpo" else None)
        loss.backward()
        assert logs["clipped"] > 0
        compare(f"GRPO loss, TRL {theirs_type}", loss, want, 1e-5)
        for name, p in ours[0].named_parameters():
            other = theirs.get_parameter(name)
            compare(f"GRPO gradients, TRL {theirs_type}", p.grad, other.grad, 1e-5)
            p.grad = other.grad = None


def test_clip_by_hand():
    """ratio 1.5, 0.5 with A = +-1, eps 0.2: the four corners of min(rho A, clip(rho) A), and a
    token has a gradient exactly where the unclipped term is the smaller one."""
    old = torch.zeros(4, 1)
    logprobs = torch.tensor([[1.5], [1.5], [0.5], [0.5]]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    want = [1.2, -1.5, 0.5, -0.8]
    mask = torch.ones(4, 1, dtype=torch.bool)
    loss, logs = grpo_loss(logprobs, old, None, advantages, mask)
    assert loss.item() == pytest.approx(-sum(want) / 4, abs=1e-6) and logs["clipped"] == 2
    loss.backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0], abs=1e-6)


def test_seq_mean_weighs_responses_and_token_mean_tokens():
    """One token of A = 1 and three of A = -1: -(1 - 1)/2 and -(1 - 3)/4 and -(1 - 3)/6."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    zeros, a = torch.zeros(2, 3), torch.tensor([1.0, -1.0])
    losses = [grpo_loss(zeros, zeros, None, a, mask, loss_type=x)[0].item() for x in LOSS_TYPES]
    assert losses == pytest.approx([0, 0.5, 1 / 3], abs=1e-7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_is_invariant(loss_type):
    """R12.4: padding (whatever it holds), row order and micro-batches with the step's count."""
    logprobs, old, ref, advantages, mask = case(1, (3, 5, 1, 4, 2))
    count = {"grpo": 5, "dapo": 15, "dr_grpo": 5 * 8}[loss_type]

    def loss(index, extra=0, junk=0.0):
        pad = [torch.nn.functional.pad(x[index], (0, extra), value=v)
               for x, v in ((logprobs, junk), (old, 0.0), (ref, -junk), (mask, False))]
        pad[0] = pad[0].requires_grad_()
        value = grpo_loss(pad[0], pad[1], pad[2], advantages[index], pad[3], kl=0.1,
                          loss_type=loss_type, count=count)[0]
        (g,) = torch.autograd.grad(value, pad[0])
        assert extra == 0 or g[:, 5:].abs().max() == 0
        return value.item(), g[:, :5]
    whole, g = loss([0, 1, 2, 3, 4])
    assert loss([0, 1, 2, 3, 4], extra=3, junk=-1.7)[0] == pytest.approx(whole, abs=1e-6)
    order = [4, 2, 0, 1, 3]
    value, permuted = loss(order)
    assert value == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(permuted, g[order], rtol=0, atol=1e-7)
    for parts in ([[0], [1], [2], [3], [4]], [[3, 1], [0, 4], [2]]):
        values, grads = zip(*(loss(part) for part in parts), strict=True)
        assert sum(values) == pytest.approx(whole, abs=1e-6)
        torch.testing.assert_close(torch.cat(grads), g[sum(parts, [])], rtol=0, atol=1e-7)


@pytest.mark.parametrize("log_ratio,value", [(0.0, 0.0), (0.5, 0.148721), (-0.5, 0.106531)])
def test_k3(log_ratio, value):
    """k3 at log(pi_ref / pi), on-policy; positive on both sides."""
    logprobs = torch.full((1, 1), -1.0)
    loss, logs = grpo_loss(logprobs, logprobs, logprobs + log_ratio, torch.zeros(1),
                           torch.ones(1, 1, dtype=torch.bool), kl=2.0)
    assert logs["kl"] == pytest.approx(value, abs=1e-6)
    assert loss.item() == pytest.approx(2 * value, abs=1e-6)


def test_k3_of_small_differences_is_not_cancelled():
    """exp(d) - d - 1 in float32 is 0 or negative where d^2 / 2 is below the last digit of 1."""
    def kl(d):
        logprobs = torch.zeros(1, 1)
        _, logs = grpo_loss(logprobs, logprobs, d.view(1, 1), torch.zeros(1),
                            torch.ones(1, 1, dtype=torch.bool), kl=1.0)
        return logs["kl"]
    size = torch.logspace(-12, 0, 501)
    for d in torch.cat((size, -size)):
        assert kl(d) >= 0
        if d.abs() >= 1e-4:
            exact = d.double()
            assert kl(d) == pytest.approx((exact.expm1() - exact).item(), rel=2e-3)


def test_kl_gradient_is_the_true_one():
    """R12.6: in expectation over every action of a small policy, the loss's gradient is that of
    KL(pi || pi_ref) exactly; without the ratio, k3's is that of KL(pi_ref || pi), far off."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    logp = theta.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)
    p = logp.detach().exp()
    # One response of one token for each action; its advantage is 0; weighed by its probability.
    estimate, naive = torch.zeros(2, 6, dtype=torch.float64)
    for action in range(6):
        x = logp[action].view(1, 1)
        loss, _ = grpo_loss(x, x.detach(), ref[action].view(1, 1),
                            torch.zeros(1, dtype=torch.float64),
                            torch.ones(1, 1, dtype=torch.bool), kl=1.0)
        k3 = (ref[action] - logp[action]).exp() - (ref[action] - logp[action]) - 1
        for total, value in ((estimate, loss), (naive, k3)):
            total += p[action] * torch.autograd.grad(value, theta, retain_graph=True)[0]
    torch.testing.assert_close(estimate, true, rtol=1e-9, atol=1e-12)
    assert (naive - true).norm() > 0.1 * true.norm()
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), theta)
    torch.testing.assert_close(naive, reverse, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# the sampler and the trainer

def test_first_step_has_ratio_one_and_a_gradient():
    """R12.1, R12.2: at temperature 0.7, prompts and responses of mixed lengths: the trainer's
    log-probabilities are the sampler's, the loss about 0, the gradient not."""
    model = tiny_model()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    out = generate(model, prompts, 12, 0.7, seed=3, n=4, stop_ids=(1, 2, 3, 4), valid_vocab=90)
    assert len({len(c.ids) for c in out}) > 2 and max(max(c.ids) for c in out) < 90
    logprobs, mask = completion_logprobs(model, [p for p in prompts for _ in range(4)],
                                         [c.ids for c in out], 0.7, 90)
    assert mask.sum(1).tolist() == [len(c.ids) for c in out]
    old = torch.zeros_like(logprobs).masked_scatter(
        mask, torch.tensor([p for c in out for p in c.logprobs]))
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]])
    loss, logs = grpo_loss(logprobs, old, None, group_advantages(rewards).flatten(), mask)
    assert logs["logprob_gap"] < 1e-4 and logs["clipped"] == 0
    assert abs(loss.item()) < 1e-4
    loss.backward()
    assert gradients(model).norm() > 1e-2
    wrong = completion_logprobs(model, [p for p in prompts for _ in range(4)],
                                [c.ids for c in out], 1.0, 90)[0]
    assert grpo_loss(wrong, old, None, rewards.flatten(), mask)[1]["logprob_gap"] > 0.1  # R12.2


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_bandit_is_learned(loss_type, inner_steps):
    """R12.9: three arms of eight pay, responses of two to four pulls; the share of paying pulls
    reaches 0.95 with one and with three inner steps, where the clip is active."""
    torch.manual_seed(0)
    theta = torch.zeros(4, 8, requires_grad=True)  # a softmax at each of four positions
    optimizer = torch.optim.Adam([theta], 0.1)
    reward, clipped = 0.0, 0
    for _ in range(120):
        with torch.no_grad():
            length = torch.randint(2, 5, (64,))
            mask = torch.arange(4) < length[:, None]
            old_policy = theta.log_softmax(-1).expand(64, 4, 8)
            arms = torch.distributions.Categorical(logits=old_policy).sample()
            old = old_policy.gather(-1, arms[..., None])[..., 0]
            rewards = ((arms < 3) & mask).sum(1) / length
        advantages = group_advantages(rewards.view(8, 8)).flatten()
        for _ in range(inner_steps):
            new = theta.log_softmax(-1).expand(64, 4, 8).gather(-1, arms[..., None])[..., 0]
            loss, logs = grpo_loss(new, old, None, advantages, mask, loss_type=loss_type)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clipped += logs["clipped"]
        reward = rewards.mean().item()
    assert reward >= 0.95
    assert (clipped > 0) == (inner_steps > 1)


# ---------------------------------------------------------------------------------------------
# the whole stage, on a policy that ends at once half the time and is paid for one word

@pytest.fixture
def policy(tokenizer, tmp_path):
    return teach_letters(tokenizer, tmp_path / "policy")


def run(policy, tmp_path, name, **values):
    args = {"init": str(policy), "out": str(tmp_path / name), "steps": 6, "batch_queries": 2,
            "num_generations": 8, "max_new_tokens": 8, "lr": 1e-3, "save_every": 2, "warmup": 1,
            "queries": letter_queries(tmp_path / "q.jsonl"), **values}
    return grpo.main(stage_args(grpo, **args))


@pytest.mark.parametrize("values", [
    {}, {"inner_steps": 3, "loss_type": "dapo", "scale_rewards": "none"},
    {"loss_type": "dr_grpo", "kl": 0.01, "micro_batch": 5}], ids=["paper", "inner", "kl"])
def test_stage_learns_a_word(policy, tmp_path, values, capsys):
    """R12.9, R12.8: sampler, verifier, loss and optimizer together: "A" becomes the answer, and
    each step logs what a reader needs; loss 0 at ratio 1 is normal, a gap is not."""
    run(policy, tmp_path, "run", steps=16, save_every=99, lr=3e-3, num_generations=16, **values)
    rows = log(tmp_path / "run")
    assert rows[0]["pass_rate"] <= 0.8 and sum(row["pass_rate"] for row in rows[-4:]) / 4 >= 0.9
    assert {"reward", "pass_rate", "frac_zero_std", "truncated", "length", "entropy", "kl",
            "clipped", "logprob_gap", "grad_norm"} <= rows[0].keys()
    assert [len(row["completions"]) for row in rows] == [2] * 16  # of the 2 queries' groups
    for row in rows:
        assert 0 <= row["frac_zero_std"] <= 1 and 0 <= row["clipped"] <= 1
        if values.get("inner_steps", 1) == 1:
            assert row["logprob_gap"] < 1e-4 and row["clipped"] == 0
        if not values:
            assert abs(row["loss"]) < 1e-4
    if values.get("kl"):
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 0
    samples = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in samples]
    assert {"prompt", "response", "score"} <= rows[0].keys() and len(rows) == 32  # both groups
    rewards, advantages = (torch.tensor([row[name] for row in rows]).view(2, 16)
                           for name in ("reward", "advantage"))
    torch.testing.assert_close(advantages, group_advantages(
        rewards, values.get("scale_rewards", "group")))
    capsys.readouterr()
    grpo.print_groups(stage_args(grpo, out=str(tmp_path / "run")))
    shown = capsys.readouterr().out
    assert shown.count("advantage") == 2 and shown.count("'") == 64
    best = [float(line.split()[2]) for line in shown.splitlines()[2:18]]
    assert best == sorted(best, reverse=True)


def test_a_reward_of_ones_own_is_no_pass(policy, tmp_path):
    """Its mean is logged under its own name: half a point is not half of the answers passing."""
    (tmp_path / "mine.py").write_text(
        "def score(query, response):\n    return response.count('A') / (1 + len(response))\n")
    result = run(policy, tmp_path, "own", steps=2, reward=f"{tmp_path / 'mine.py'}:score")
    rows = log(tmp_path / "own")
    assert 0 < rows[0]["own"] == rows[0]["reward"] < 0.6 and "pass_rate" not in rows[0]
    assert result["own"] == pytest.approx(rows[-1]["own"], rel=1e-6)


def test_a_reward_that_sees_cut_answers_and_returns_parts(policy, tmp_path):
    """The means of its parts agree with the log's own lengths; without a third argument it never
    sees a cut answer. --domain_key names the domains."""
    mine, queries = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    write_rows(queries, [{"prompt": p, "topic": p[:4]} for p in ("Pick A.", "Choose A.")])
    mine.write_text("def score(query, response, sample):\n"
                    "    return {'reward': 0.3 * sample.truncated + 0.1 * response.count('A'),\n"
                    "            'cut': sample.truncated, 'tokens': len(sample.ids)}\n\n\n"
                    "def ended(query, response):\n    return 0.5 + 0.5 * ('A' in response)\n")
    values = {"queries": str(queries), "steps": 3, "max_new_tokens": 4, "temperature": 1.5}
    run(policy, tmp_path, "parts", **values, reward=f"{mine}:score", domain_key="topic")
    rows = log(tmp_path / "parts")
    assert any(row["truncated"] > 0 for row in rows)
    for row in rows:
        assert row["own_cut"] == pytest.approx(row["truncated"], abs=1e-6)
        tokens = row["length"] * (1 - row["truncated"]) + 4 * row["truncated"]
        assert row["own_tokens"] == pytest.approx(tokens, rel=1e-5)
    samples = (tmp_path / "parts" / "samples.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["domain"] for line in samples} == {"Pick", "Choo"}
    run(policy, tmp_path, "ended", **values, reward=f"{mine}:ended")
    for row in log(tmp_path / "ended"):
        assert 0.5 <= row["own"] / (1 - row["truncated"]) < 1


def test_an_error_in_a_reward_loses_no_step(policy, tmp_path):
    """It ends the run in one line, with the state of the last whole step; mended, the run goes on
    to what one without the error comes to, bit for bit."""
    good = "def score(query, response):\n    return response.count('A') / (1 + len(response))\n"
    bad = "calls = []\n" + good.replace("return", "calls.append(1)\n    if len(calls) > 50:\n"
                                        "        raise KeyError('x')\n    return")
    mine = tmp_path / "mine.py"
    values = {"save_every": 99, "reward": f"{mine}:score"}
    mine.write_text(good)
    run(policy, tmp_path, "whole", **values)
    mine.write_text(bad)
    tasks.custom.own_reward.cache_clear()
    said = refuses(lambda: run(policy, tmp_path, "halves", **values), "line 5: KeyError: 'x'")
    step = said.rpartition("mend it and --resume goes on after step ")[2]
    assert int(step) == len(log(tmp_path / "halves")) > 0
    mine.write_text(good)
    tasks.custom.own_reward.cache_clear()
    run(policy, tmp_path, "halves", **values, resume=True)
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    assert same_weights(tmp_path / "halves", tmp_path / "whole")


def test_inspect_tells_what_it_wants(tmp_path, monkeypatch, capsys):
    """A run never started, one that was no GRPO, and --help: what inspect wants, in one line."""
    refuses(lambda: grpo.print_groups(stage_args(grpo, out=str(tmp_path))), "no such file", "ends")
    write_rows(tmp_path / "samples.jsonl", [])
    refuses(lambda: grpo.print_groups(stage_args(grpo, out=str(tmp_path))), "no GRPO run")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    write_rows(tmp_path / "samples.jsonl", [
        {"prompt": talk, "response": "2", "score": 1.0, "reward": 1.0, "advantage": 0.5}])
    grpo.print_groups(stage_args(grpo, out=str(tmp_path)))
    assert capsys.readouterr().out.startswith("system: Be brief.\nuser: 1 + 1?\n score  reward")
    monkeypatch.setattr("sys.argv", ["grpo.py", "inspect", "--help"])
    lib.args.cli(grpo.main, grpo.Args, inspect=grpo.print_groups)
    assert capsys.readouterr().out == grpo.print_groups.__doc__ + "\n"


@pytest.mark.parametrize("values", [{"kl": 0.01}, {"query_order": "random"}],
                         ids=["kl", "random"])
def test_resume_is_bit_exact(policy, tmp_path, monkeypatch, values):
    """R4.4: 6 steps == Ctrl-C in the fourth, then --resume: with the KL's reference, and in the
    middle of the queries."""
    run(policy, tmp_path, "whole", **values)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, grpo, 4)
        run(policy, tmp_path, "halves", **values)
    run(policy, tmp_path, "halves", **values, resume=True)
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    assert same_weights(tmp_path / "halves", tmp_path / "whole")


def test_dead_share_counts_groups_also_with_kl(policy, tmp_path, monkeypatch):
    """R12.8: a solved or hopeless query is dead whether or not the KL still pulls at it."""
    real = grpo.rollout

    def paid_alike(*args):
        groups = real(*args)
        for row in groups[0]:
            row.score = 1.0
        for i, row in enumerate(groups[1]):
            row.score = float(i % 2)
        return groups
    monkeypatch.setattr(grpo, "rollout", paid_alike)
    for kl in (0.0, 0.1):
        run(policy, tmp_path, f"kl{kl}", steps=1, kl=kl)
        assert log(tmp_path / f"kl{kl}")[0]["frac_zero_std"] == 0.5


def test_truncated_responses_are_wrong_answers_like_any_other(policy, tmp_path, monkeypatch):
    """The trainer reads them, and the tokens of the step's mean count theirs."""
    read, real = [], grpo.completion_logprobs
    monkeypatch.setattr(grpo, "completion_logprobs",
                        lambda model, prompts, ids, *rest: read.extend(ids) or real(
                            model, prompts, ids, *rest))
    counts, real_loss = [], grpo.grpo_loss
    monkeypatch.setattr(grpo, "grpo_loss", lambda *args, **kw: counts.append(kw["count"])
                        or real_loss(*args, **kw))

    def half_cut(model, tokenizer, queries, *rest):
        return [[Rollout(q, [5], [6, 7 + i], [-1.0] * 2, i % 2 == 0, "x", float(i == 0))
                 for i in range(8)] for q in queries]
    monkeypatch.setattr(grpo, "rollout", half_cut)
    run(policy, tmp_path, "wrong", steps=1, loss_type="dapo")
    assert {ids[-1] for ids in read} == set(range(7, 15)) and counts[-1] == 32


def test_a_step_has_queries_and_a_seed_of_its_own(monkeypatch):
    """A pure function of the step's number: the next stretch of the queries, from their end on from
    the beginning, and a seed that no other step has."""
    seeds = []

    def rollout(model, tokenizer, queries, n, length, temperature, seed, score=None):
        seeds.append(seed)
        return [[Rollout(q, [1], [2], [-1.0], True, "x", 0.0) for _ in range(n)] for q in queries]
    monkeypatch.setattr(grpo, "rollout", rollout)
    queries = [{"prompt": p} for p in "abcde"]
    args = stage_args(grpo, num_generations=4, batch_queries=2)
    for step, want in enumerate(("ab", "cd", "ea", "bc")):
        episode = sample_episode(None, None, None, queries, args, step)
        assert "".join(group[0].query["prompt"] for group in episode.groups()) == want
        assert [len(group) for group in episode.groups()] == [4, 4]
    assert len(set(seeds)) == 4


def fake_rollout(scores, finished=True, different=True):
    def rollout(model, tokenizer, queries, n, *rest, **kwargs):
        return [[Rollout(q, [1], [2], [-1.0], finished, f"x{i * different}", s)
                 for i, s in enumerate(row)] for q, row in zip(queries, scores, strict=True)]
    return rollout


@pytest.mark.parametrize("scores,finished,words", [
    ([[1.0] * 4, [1.0] * 4], True, ["all score alike", "0: harder --queries"]),
    ([[0.0] * 4] * 2, True, ["all score alike", "0: easier --queries, more SFT"]),
    ([[1.0, 0, 0, 0], [0.0] * 4], False, ["cut", "--max_new_tokens"])],
    ids=["all dead", "never", "truncated"])
def test_preflight_refuses(scores, finished, words, monkeypatch):
    """R12.7: no query passes only sometimes, or most answers cut: one line with the knob."""
    monkeypatch.setattr(grpo, "rollout", fake_rollout(scores, finished))
    args = stage_args(grpo, num_generations=4)
    refuses(lambda: grpo.order_queries(None, None, None, [{"domain": "a"}] * 2, args), *words)


def test_preflight_of_a_model_that_has_one_answer_to_each_query(monkeypatch, capsys):
    """SFT down to a loss of 0 leaves nothing to choose from; more of it would not help. One mixed
    query among many is not refused, but said."""
    monkeypatch.setattr(grpo, "rollout", fake_rollout([[0.5] * 4] * 2, different=False))
    args = stage_args(grpo, num_generations=4)
    some = [{"domain": "a"}] * 2
    refuses(lambda: grpo.order_queries(None, None, None, some, args), "0: less SFT")
    monkeypatch.setattr(grpo, "rollout", fake_rollout([[1.0, 0, 0, 0]] + [[1.0] * 4] * 11))
    grpo.order_queries(None, None, None, [{"domain": "a"}] * 12, args)
    assert "few queries have anything to learn from: harder --queries" in capsys.readouterr().out


def test_preflight_orders_by_variance(monkeypatch):
    """Report 4.3: the mixed query first, the dead ones after it, in their order; with several
    domains, so within each, and the domains in turn."""
    scores = [[0.0] * 4, [1.0, 0, 0, 0], [1.0] * 4, [1.0, 1, 0, 0]]
    for domains, want in (("1111", "dbac"), ("1222", "dabc"), ("1121", "dcba")):
        queries = [{"prompt": p, "domain": d} for p, d in zip("abcd", domains, strict=True)]
        monkeypatch.setattr(grpo, "rollout", fake_rollout(scores))
        ordered = grpo.order_queries(None, None, None, queries, stage_args(grpo, num_generations=4))
        assert "".join(query["prompt"] for query in ordered) == want


def test_a_resumed_run_keeps_the_order_of_its_queries(tmp_path):
    """A server would answer differently now. Nothing is asked: there is no policy."""
    queries = tasks.queries.load("rl", 6, 1)[::-1]
    write_rows(tmp_path / "queries.jsonl", queries)
    run = types.SimpleNamespace(resumed=True, path=tmp_path)
    args = stage_args(grpo, allow_unsafe_code=True)
    assert grpo.load_queries(args, run, None, None, None) == queries


def test_first_pass_rate(monkeypatch):
    """Each step says what the initial policy passed of its queries; in random order only the first
    two steps' queries were sampled."""
    rates = {"a": 0.25, "b": 0.5, "c": 0.75, "d": 1.0, "e": 0.5}

    def rollout(model, tokenizer, queries, n, *rest):
        return [[Rollout(q, [1], [2], [-1.0], True, f"x{i}", float(i < 4 * rates[q["prompt"]]))
                 for i in range(4)] for q in queries]
    monkeypatch.setattr(grpo, "rollout", rollout)
    for order, known in (("variance", 5), ("random", 4)):
        args = stage_args(grpo, num_generations=4, batch_queries=2, query_order=order)
        queries = [{"prompt": prompt, "domain": "d"} for prompt in rates]
        for query in queries:
            query["first_pass_rate"] = 0.9  # as in the queries.jsonl of another run
        queries = grpo.order_queries(None, None, None, queries, args)
        for step in range(5):
            places = [2 * step % 5, (2 * step + 1) % 5]
            metrics = sample_episode(None, None, None, queries, args, step).metrics(args)
            want = sum(rates[queries[i]["prompt"]] for i in places) / 2
            assert metrics.get("first_pass_rate") == (want if max(places) < known else None)


def test_random_order(monkeypatch):
    """The baseline of the variance order: every query once, the same whatever the scores; the
    pre-flight samples two batches of it."""
    asked, queries = [], [{"prompt": i, "domain": "d"} for i in range(40)]
    for score in (0.0, 1.0):
        def rollout(model, tokenizer, queries, n, *rest, score=score):
            asked.append([q["prompt"] for q in queries])
            return fake_rollout([[score, 1 - score] * 2] * len(queries))(None, None, queries, n)
        monkeypatch.setattr(grpo, "rollout", rollout)
        args = stage_args(grpo, num_generations=4, query_order="random", batch_queries=3)
        order = [q["prompt"] for q in grpo.order_queries(None, None, None, queries, args)]
        assert order[:6] == asked[-1] and sorted(order) == list(range(40)) != order
    assert asked[0] == asked[1]


@pytest.mark.parametrize("flag,value", [
    ("num_generations", 1), ("loss_type", "mean"), ("scale_rewards", "batch"), ("steps", 0),
    ("temperature", 0.0), ("query_order", "easy"),
    ("batch_queries", 0), ("micro_batch", 0), ("save_every", 0)])
def test_impossible_settings_are_refused(micro_run, tmp_path, flag, value):
    """R12.2, R12.3: one line with the flag, and nothing is written."""
    values = {"init": str(micro_run), "out": str(tmp_path / "run"), flag: value}
    refuses(lambda: grpo.main(stage_args(grpo, **values)), f"--{flag} ")
    assert not (tmp_path / "run").exists()


def test_mask_ends_with_the_first_stop_token(policy, tokenizer):
    """R12.5: ids come from the sampler, up to and including the first stop id, no further."""
    from model import Qwen2
    groups = rollout(Qwen2.from_pretrained(policy), tokenizer, [{
        "prompt": "Pick A.", "check": {"kind": "math", "answer": "1"}}], 16, 8, 1.0, 0)
    assert any(a.finished for a in groups[0])
    for a in groups[0]:
        stops = [i for i in a.ids if i in tokenizer.stop_ids]
        assert stops == ([a.ids[-1]] if a.finished else [])
        assert len(a.ids) == len(a.logprobs) and a.prompt_ids == tokenizer.render_prompt(
            "Pick A.")
