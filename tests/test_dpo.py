"""dpo.py: the loss by hand, brute-force log-probabilities, the merging optimizer against
torch.optim.Adam and its own definition, TRL, the cached reference, pairs, resume. R numbers:
docs/requirements.md."""
import gzip
import json
import math
import re
import tracemalloc

import pytest
import torch
from helpers import (
    interrupt_at, log, no_samples, refuses, same_weights, stage_args, tiny_model, write_rows)

import dpo
from dpo import OnlineMerging, dpo_loss
from data.pairs import pair_responses, PairFile, tokenize_pair
from lib.files import read_jsonl
from model import Qwen2
from reward import preference_loss
from sample import Rollout, completion_logprobs

# ---------------------------------------------------------------------------------------------
# the loss


def test_loss_at_the_reference_is_ln_2():
    """R10.1: exactly ln 2 and margin exactly 0, whatever the log-probabilities."""
    chosen, rejected = torch.tensor([-3.0, -70.0]), torch.tensor([-55.5, -0.1])
    loss, good, bad = dpo_loss(chosen, rejected, chosen, rejected, 0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert (good - bad).tolist() == [0, 0]


def test_known_losses():
    """beta 0.1 at h = 10 gives 0.313262; and -log sigmoid(beta h) for others."""
    h = torch.tensor([10.0, -10.0, 0.0, 1000.0])
    zero = torch.zeros(4)
    loss, good, bad = dpo_loss(h * 0.75, -h * 0.25, zero, zero, 0.1)
    want = [math.log1p(math.exp(-0.1 * x)) for x in h.tolist()]
    assert want[0] == pytest.approx(0.313262, abs=1e-6)
    assert loss.tolist() == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(good, 0.075 * h)
    torch.testing.assert_close(bad, -0.025 * h)


def test_soft_labels_are_those_of_the_reward_model():
    """A tie is lowest at h = 0; label 0 is the pair turned round."""
    h, zero = torch.tensor([10.0, -10.0, 0.0, 4.0]), torch.zeros(4)
    for label in (1.0, 0.75, 0.5, 0.0):
        loss, _, _ = dpo_loss(h, zero, zero, zero, 0.1, torch.full((4,), label))
        torch.testing.assert_close(loss, preference_loss(0.1 * h, zero, label))
    torch.testing.assert_close(loss, dpo_loss(zero, h, zero, zero, 0.1)[0])
    tied, _, _ = dpo_loss(h, zero, zero, zero, 0.1, 0.5)
    assert tied.argmin() == 2
    torch.testing.assert_close(tied[0], tied[1])


def test_swapping_the_pair_negates_the_margin():
    """R10.2: exactly, and the chosen reward becomes the rejected one."""
    torch.manual_seed(0)
    a, b, ref_a, ref_b = -50 * torch.rand(4, 6)
    _, good, bad = dpo_loss(a, b, ref_a, ref_b, 0.3)
    _, good2, bad2 = dpo_loss(b, a, ref_b, ref_a, 0.3)
    assert torch.equal(good - bad, -(good2 - bad2)) and torch.equal(good, bad2)


def test_gradient_raises_chosen_and_lowers_rejected():
    """d loss / d chosen = -beta sigmoid(-beta h), and the opposite for rejected."""
    x = torch.tensor([2.0, -1.0], requires_grad=True)
    loss, _, _ = dpo_loss(x[:1], x[1:], torch.zeros(1), torch.zeros(1), 0.1)
    loss.sum().backward()
    slope = 0.1 / (1 + math.exp(0.3))
    assert x.grad.tolist() == pytest.approx([-slope, slope], abs=1e-7)


# ---------------------------------------------------------------------------------------------
# sequence log-probabilities

def brute_force(model, prompt, completion) -> float:
    logp = model(torch.tensor([prompt + completion]))[0].log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(completion))


def test_sequence_logprob_is_the_brute_force_sum():
    """R10.2: over the answer's ids, first one and <|im_end|> included, whatever its batch mates
    and their padding; prompts that hold the padding id change nothing (R8.3)."""
    model = tiny_model()
    pairs = [([5, 0, 7, 0], [9, 10, 2]), ([8], [11]), ([9] * 12, [0, 0, 3, 4, 5, 6, 2]),
             ([1, 2], [3, 1])]
    want = torch.tensor([brute_force(model, *pair) for pair in pairs])
    prompts, answers = zip(*pairs, strict=True)
    logprobs, mask = completion_logprobs(model, list(prompts), list(answers))
    assert mask.sum(1).tolist() == [3, 1, 7, 2] and logprobs[~mask].abs().sum() == 0
    torch.testing.assert_close(logprobs.sum(1), want, rtol=1e-5, atol=1e-5)
    for i in range(4):
        alone, _ = completion_logprobs(model, [prompts[i]], [answers[i]])
        torch.testing.assert_close(alone.sum(1), want[i:i + 1], rtol=1e-5, atol=1e-5)


def test_answer_is_content_and_end(tokenizer):
    """R10.2, R8.2: the three parts of a pair put together are what SFT would train on."""
    prompt, chosen, rejected, _ = tokenize_pair({
        "prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "Five<|im_end|>"}, tokenizer)
    ids, mask = tokenizer.render([{"role": "user", "content": "2 + 2?"},
                                  {"role": "assistant", "content": "It is 4."}])
    assert prompt + chosen == ids[:len(prompt + chosen)]
    assert chosen == [i for i, m in zip(ids, mask, strict=True) if m]
    assert rejected.count(tokenizer.im_end_id) == 1  # text that looks like a token is text


def test_tools_are_part_of_the_prompt(tokenizer, tmp_path):
    """Of a pair from a file, of one made from rollouts, and as JSON text."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    asked = [{"role": "user", "content": "Hi"}]
    want, _ = tokenizer.render(asked, add_generation_prompt=True, tools=tools)
    row = {"chosen": "a", "rejected": "b", "tools": tools}
    path = write_rows(tmp_path / "pairs.jsonl", [
        row | {"prompt": "Hi"}, row | {"prompt": asked}, row | {
            "prompt": "Hi", "tools": json.dumps(tools)}])
    query = {"prompt": "Hi", "domain": "own", "tools": tools}
    answers = [Rollout(query | more, [], [], [], True, text, score)
               for more, text, score in (({}, "a", 1.0), ({}, "b", 0.0), ({"tools": []}, "c", 0.0))]
    made = pair_responses(answers, 4, 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("a", "b")]
    for pair in [*PairFile(path), *made]:
        assert tokenize_pair(pair, tokenizer).prompt == want
    assert tokenize_pair({"prompt": "Hi", "chosen": "a", "rejected": "b"}, tokenizer).prompt != want


@pytest.mark.parity
def test_loss_gradients_and_metrics_equal_trl(tmp_path, tokenizer, compare):
    """TRL's DPOTrainer on random batches: the loss, every weight's gradient and what is logged."""
    trl = pytest.importorskip("trl", reason="make test-parity installs it")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    vocab, theirs = tokenizer.padded_vocab_size(128), []
    ours = [tiny_model(seed, 1.5, vocab_size=vocab) for seed in (0, 1)]  # policy, reference
    for i, model in enumerate(ours):
        model.save_pretrained(tmp_path / str(i))
        theirs.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(i), dtype=torch.float32))
    tokenizer.save_pretrained(tmp_path / "0")
    trainer = trl.DPOTrainer(
        *theirs, trl.DPOConfig(str(tmp_path / "trl"), beta=0.3, use_cpu=True, bf16=False,
                               gradient_checkpointing=False, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "0"))
    policy, generator = trainer.model.train(), torch.Generator().manual_seed(0)
    for _ in range(10):
        sizes = torch.randint(1, 12, (4, 3), generator=generator).tolist()
        rows = [[torch.randint(vocab, (n,), generator=generator).tolist() for n in row]
                for row in sizes]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = trainer.data_collator([dict(zip(names, row, strict=True)) for row in rows])
        want = trainer.compute_loss(policy, batch)
        want.backward()
        logged = {k: torch.tensor(v.pop()) for k, v in trainer._metrics["train"].items()}
        (chosen, rejected), (ref_chosen, ref_rejected) = (
            completion_logprobs(model, [r[0] for r in rows] * 2,
                                [r[1] for r in rows] + [r[2] for r in rows])[0].sum(-1).chunk(2)
            for model in ours)
        loss, good, bad = dpo_loss(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(),
                                   0.3)
        loss.mean().backward()
        compare("DPO loss, TRL", loss.mean(), want, 1e-5)
        for name, value in {"rewards/chosen": good, "rewards/rejected": bad,
                            "rewards/margins": good - bad, "rewards/accuracies": good > bad,
                            "logps/chosen": chosen, "logps/rejected": rejected}.items():
            compare("DPO metrics, TRL", value.float().mean(), logged[name], 1e-5)
        gradients = dict(policy.named_parameters())
        for name, p in ours[0].named_parameters():
            compare("DPO gradients, TRL", p.grad, gradients[name].grad, 1e-5)
        ours[0].zero_grad(), policy.zero_grad()


# ---------------------------------------------------------------------------------------------
# the online merging optimizer

def quadratic(optimizer_of, steps=25, seed=0):
    """The same noisy quadratic under any optimizer -> the parameters after every step."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(5, 4, generator=g).requires_grad_(),
              torch.randn(4, generator=g).requires_grad_()]
    optimizer, path = optimizer_of(params), []
    for _ in range(steps):
        noise = torch.randn(4, generator=g)
        ((params[0] @ params[1] - 1).square().sum() + (params[1] * noise).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(path)


def test_merging_without_merging_is_adam():
    """reserve 1 and alpha 0 equal torch.optim.Adam, step for step."""
    ours = quadratic(lambda params: OnlineMerging(
        params, [torch.ones_like(p) for p in params], 0.05, alpha=0, reserve=1))
    adam = quadratic(lambda params: torch.optim.Adam(params, 0.05, (0.9, 0.95), 1e-8))
    torch.testing.assert_close(ours, adam, rtol=1e-5, atol=1e-5)
    assert (ours[-1] - ours[0]).abs().max() > 0.1


def test_alpha_moves_toward_tau():
    """theta += (1 - alpha) delta + alpha tau: with no gradient a step is alpha tau exactly."""
    theta, tau = torch.zeros(3, requires_grad=True), torch.tensor([1.0, -2.0, 4.0])
    optimizer = OnlineMerging([theta], [tau], 0.1, alpha=0.25, reserve=1)
    theta.grad = torch.zeros(3)
    optimizer.step()
    assert theta.tolist() == [0.25, -0.5, 1.0]
    other = torch.zeros(3, requires_grad=True)
    optimizer = OnlineMerging([other], [tau], 0.1, alpha=0.25, reserve=1)
    other.grad = torch.tensor([1.0, 1.0, 1.0])  # Adam's first update is -lr * sign(g)
    optimizer.step()
    assert other.tolist() == pytest.approx([0.25 - 0.075, -0.5 - 0.075, 1.0 - 0.075], abs=1e-6)


def test_ondare_is_unbiased():
    """The survivors are divided by p: over many masks F(x) has mean x, and keeps a share p."""
    x = torch.tensor([1.0, -2.0, 0.5, 3.0])
    optimizer = OnlineMerging([torch.zeros(4, requires_grad=True)], [x], 0.1, 0.1, 0.25)
    drawn = torch.stack([optimizer.sparsify(x, step, 0) for step in range(4000)])
    assert ((drawn == 0) | torch.isclose(drawn, x / 0.25)).all()
    assert (drawn != 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(drawn.mean(0), x, rtol=0.12, atol=0)  # 4.4 standard errors


def test_masks_are_a_function_of_seed_step_and_tensor():
    """Reproducible, and different for another seed, step or tensor; tau is masked once."""
    x = torch.ones(400)

    def optimizer(seed):
        return OnlineMerging([torch.zeros(400, requires_grad=True)], [x], 0.1, 0.1, 0.5, seed)
    a, b = optimizer(1), optimizer(1)
    assert torch.equal(a.taus[0], b.taus[0]) and torch.equal(
        a.sparsify(x, 3, 0), b.sparsify(x, 3, 0)
    )
    for other in (
        a.sparsify(x, 4, 0),
        a.sparsify(x, 3, 1),
        optimizer(2).sparsify(x, 3, 0),
        a.taus[0],
    ):
        assert 100 < (a.sparsify(x, 3, 0) != other).sum() < 300
    before = a.taus[0].clone()
    quadratic(lambda params: OnlineMerging(params, [torch.ones_like(p) for p in params], 0.05, 0.1,
                                           0.5), steps=2)
    assert torch.equal(a.taus[0], before)


@pytest.mark.parametrize("values", [{"reserve": 0.0}, {"reserve": 1.5}, {"alpha": 1.0},
                                    {"alpha": -0.1}])
def test_impossible_merging_is_refused(values):
    """Shares outside (0, 1] and [0, 1) are one line each."""
    refuses(lambda: OnlineMerging([torch.zeros(1, requires_grad=True)], [torch.zeros(1)], 0.1,
                                  **{"alpha": 0.1, "reserve": 0.5, **values}), "--")


# ---------------------------------------------------------------------------------------------
# pairs

def answers(query, *rows):
    return [Rollout(query, [1], [2], [-1.0], finished, text, score)
            for text, score, finished in rows]


def test_pairs_are_passing_against_failing():
    """Only a passing chosen and a finished failing rejected, of the same query; a query without
    both gives none; equal texts count once; at most per_query pairs."""
    q = [{"prompt": f"q{i}", "domain": "d"} for i in range(4)]
    groups = [
        answers(q[0], ("a", 1.0, True), ("a", 1.0, True), ("b", 0.0, True), ("c", 0.0, True)),
        answers(q[1], ("a", 1.0, True), ("b", 1.0, True)),
        answers(q[2], ("a", 0.0, True), ("b", 0.0, True)),
        answers(q[3], ("a", 1.0, True), ("cut", 0.0, False), ("b", 1.0, True), ("w", 0.0, True),
                ("v", 0.0, True), ("u", 0.0, True))]
    score = {(g[0].query["prompt"], a.text): a.score for g in groups for a in g}
    for seed in range(10):
        pairs = pair_responses(sum(groups, []), 2, seed)
        assert [p["prompt"] for p in pairs] == ["q0", "q3", "q3"]
        for p in pairs:
            assert score[p["prompt"], p["chosen"]] == 1 and score[p["prompt"], p["rejected"]] == 0
            assert p["rejected"] != "cut"
        assert len({(p["prompt"], p["chosen"]) for p in pairs}) == 3
    assert pair_responses(sum(groups, []), 2, 5) == pair_responses(sum(groups, []), 2, 5)
    late = answers(q[0], ("a", 1.0, True), ("a", 0.0, True), ("b", 0.0, True))  # out of time once
    assert pair_responses(late, 2, 0) == []


def test_trl_files_load_unchanged(tokenizer, tmp_path):
    """A prompt as text or messages, answers as text or messages, also with the question in front
    (UltraFeedback's binarized shape): all give the same ids."""
    user, yes, no = ({"role": r, "content": c} for r, c in
                     (("user", "Is it?"), ("assistant", "Yes."), ("assistant", "No.")))
    rows = [{"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
            {"prompt": [user], "chosen": [yes], "rejected": [no]},
            {"prompt": "Is it?", "chosen": [user, yes], "rejected": [user, no], "score_chosen": 9}]
    pairs = PairFile(write_rows(tmp_path / "trl.jsonl", rows))
    first, second, third = (tokenize_pair(pair, tokenizer) for pair in pairs)
    assert first == second == third


def message(role, content):
    return {"role": role, "content": content}


HI, MORE = message("user", "Hi"), message("user", "More")
HELLO, GOOD, BAD = (message("assistant", text) for text in ("Hello", "Good", "Bad"))
BRIEF, CALL = message("system", "Be brief."), message("assistant", None) | {
    "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = message("tool", "4")
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
# a row of a file, as its prompt must be read; the answers are Good and Bad
PAIR_SHAPES = [
    # several turns behind the prompt, and a system message or the prompt itself in front
    ({"prompt": [HI], "chosen": [HELLO, MORE, GOOD], "rejected": [HELLO, MORE, BAD]},
     [HI, HELLO, MORE]),
    ({"prompt": "Hi", "chosen": [HI, HELLO, MORE, GOOD], "rejected": [HI, HELLO, MORE, BAD]},
     [HI, HELLO, MORE]),
    ({"prompt": "Hi", "chosen": [BRIEF, HI, GOOD], "rejected": [BRIEF, HI, BAD]}, [BRIEF, HI]),
    ({"prompt": [BRIEF, HI], "chosen": [HI, GOOD], "rejected": "Bad"}, [BRIEF, HI]),
    ({"prompt": [BRIEF, HI], "chosen": [BRIEF, HI, GOOD], "rejected": [BAD]}, [BRIEF, HI]),
    ({"prompt": [BRIEF], "chosen": [HI, GOOD], "rejected": [HI, BAD]}, [BRIEF, HI]),
    # a tool's result
    ({"prompt": [HI], "chosen": [CALL, RESULT, GOOD], "rejected": [CALL, RESULT, BAD]},
     [HI, CALL, RESULT]),
    ({"prompt": [HI, CALL], "chosen": [RESULT, GOOD], "rejected": [RESULT, BAD]},
     [HI, CALL, RESULT]),
    # without a prompt: what both sides have in common
    ({"chosen": [HI, GOOD], "rejected": [HI, BAD]}, [HI]),
    ({"prompt": None, "chosen": [BRIEF, HI, HELLO, MORE, GOOD],
      "rejected": [BRIEF, HI, HELLO, MORE, BAD]}, [BRIEF, HI, HELLO, MORE]),
    # hh-rlhf and what is made of it
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Good", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad"},
     [HI]),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: Good",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: Bad"},
     [HI, HELLO, MORE]),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Good", "rejected": "Bad"}, [HI]),
    ({"prompt": "Hi", "chosen": "\n\nHuman: Hi\n\nAssistant: Good", "criteria": None,
      "rejected": "\n\nHuman: Hi\n\nAssistant: Bad"}, [HI]),
    # ShareGPT's names, one message as an object, a text in parts
    ({"conversations": [{"from": "human", "value": "Hi"}],
      "chosen": {"from": "gpt", "value": "Good"},
      "rejected": {"from": "gpt", "value": "Bad"}}, [HI]),
    ({"prompt": [message("user", PARTS)], "chosen": GOOD, "rejected": BAD}, [HI]),
]


@pytest.mark.parametrize("row, prompt", PAIR_SHAPES)
def test_every_shape_of_a_pair_is_kept_whole(row, prompt, tokenizer, tmp_path):
    """The ids are those of the messages written out, and what is written is read the same."""
    want = [tokenizer.render(prompt, add_generation_prompt=True)[0]]
    want += [tokenizer.encode(text) + [tokenizer.im_end_id] for text in ("Good", "Bad")]
    (pair,) = PairFile(write_rows(tmp_path / "pairs.jsonl", [row]))
    assert list(tokenize_pair(pair, tokenizer)) == [*want, 1.0]
    assert list(PairFile(write_rows(tmp_path / "again.jsonl", [pair]))) == [pair]


def test_texts_are_taken_as_they_are(tmp_path):
    """Spaces, an answer that looks like a transcript, a prompt that only mentions one."""
    rows = [{"prompt": " a\n\nHuman: b", "chosen": " c\n", "rejected": "\n\nHuman: r", "n": 1}]
    assert list(PairFile(write_rows(tmp_path / "pairs.jsonl", rows))) == rows
    rows = [{"conversations": "p", "chosen": "c", "rejected": "r"}]
    assert list(PairFile(write_rows(tmp_path / "pairs.jsonl", rows))) == [rows[0] | {"prompt": "p"}]


def test_pairs_are_found_again_in_every_kind_of_file(tmp_path):
    """In any order, by where their lines begin: behind a mark, blank lines and letters of several
    bytes; in a .gz, and in an array. 20,000 pairs of 300 bytes take 1 MB of memory, not 6."""
    rows = [{"prompt": f"é{i}", "chosen": "世界" * i, "rejected": "r"} for i in range(5)]
    lines = b"\xef\xbb\xbf" + b"\n \n".join(
        json.dumps(row, ensure_ascii=False).encode() for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        pairs = PairFile(str(tmp_path / name))
        assert len(pairs) == 5 and [pairs[i] for i in (4, 0, 2)] == [rows[i] for i in (4, 0, 2)]
        assert list(pairs) == list(pairs) == rows
    path = write_rows(tmp_path / "many.jsonl", [rows[3] | {"note": "x" * 250}] * 20_000)
    tracemalloc.start()
    assert len(PairFile(path)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("name, n", [("hh_harmless_mild", 478), ("dpo_en_demo", 216),
                                     ("dpo_zh_demo", 202)])
def test_public_files_of_pairs(shared, name, n):
    """Every row: all its texts are there, in their order."""
    rows = [row for _, row in read_jsonl(shared / "pref" / f"{name}.jsonl")]
    pairs = PairFile(str(shared / "pref" / f"{name}.jsonl"))
    assert len(pairs) == len(rows) == n
    for row, pair in zip(rows, pairs, strict=True):
        roles = [m["role"] for m in pair["prompt"] if m["role"] != "system"]
        assert roles == (["user", "assistant"] * len(roles))[:len(roles)] and len(roles) % 2
        said = "".join(m["content"] for m in pair["prompt"])
        for side in ("chosen", "rejected"):
            text = row[side]
            if isinstance(text, dict):
                text = "".join(turn["value"] for turn in [*row["conversations"], text])
            text = re.sub(r"\n\n(Human|Assistant):", "", text)
            assert "".join((said + pair[side]).split()) == "".join(text.split())


TURNS = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("row, word", [
    ({"prompt": "p", "chosen": "c"}, "expected"),
    ({"prompt": 5, "chosen": "c", "rejected": "r"}, "expected"),
    ({"prompt": "", "chosen": "c", "rejected": "r"}, "empty"),
    ({"prompt": "p", "chosen": [], "rejected": "r"}, "expected"),
    ({"prompt": "p", "chosen": "c", "rejected": None}, "expected"),
    ({"prompt": [], "chosen": "c", "rejected": "r"}, "expected"),
    ({"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "r"}, "content"),
    ({"prompt": [{"role": "user", "content": 5}], "chosen": "c", "rejected": "r"}, "content"),
    ({"chosen": "c", "rejected": "r"}, "expected"),
    # the answer is not the assistant's text
    ({"prompt": [HI], "chosen": [HI], "rejected": [BAD]}, "the assistant's text"),
    ({"prompt": [HI], "chosen": [HELLO, MORE], "rejected": [BAD]}, "the assistant's text"),
    ({"prompt": [HI], "chosen": [CALL], "rejected": [BAD]}, "the assistant's text"),
    ({"prompt": [HI], "chosen": [GOOD | {"tool_calls": CALL["tool_calls"]}], "rejected": [BAD]},
     "the assistant's text"),
    # it would go on with the assistant's words
    ({"prompt": [HI, HELLO], "chosen": [GOOD], "rejected": [BAD]}, "goes on"),
    ({"prompt": [HI, HELLO], "chosen": "Good", "rejected": "Bad"}, "goes on"),
    ({"prompt": [BRIEF], "chosen": [GOOD], "rejected": [BAD]}, "end in the user's"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "end in the user's"),
    # they part before their last message
    ({"prompt": [HI], "chosen": [HELLO, MORE, GOOD], "rejected": [BAD]}, "but for the last one"),
    ({"prompt": [HI], "chosen": [HELLO, MORE, GOOD], "rejected": [BAD, MORE, BAD]}, "last one"),
    ({"chosen": f"{TURNS} Good", "rejected": "\n\nHuman: Ho\n\nAssistant: Bad"}, "last one"),
    # another prompt, another system message, columns that would be lost
    ({"prompt": "Ho", "chosen": f"{TURNS} Good", "rejected": f"{TURNS} Bad"}, "begin with"),
    ({"prompt": "Ho", "chosen": [HI, GOOD], "rejected": [HI, BAD]}, "begin with the prompt"),
    ({"prompt": "More", "chosen": [HI, HELLO, MORE, GOOD], "rejected": [HI, HELLO, MORE, BAD]},
     "begin with the prompt"),
    ({"prompt": [BRIEF, HI], "chosen": [message("system", "x"), HI, GOOD], "rejected": [BAD]},
     "begin with the prompt"),
    ({"prompt": "Hi", "chosen": "Good", "rejected": "Bad", "tools": ["f"]}, "tools"),
    ({"prompt": "Hi", "chosen": "Good", "rejected": "Bad", "system": "Be brief."}, "system"),
    # transcripts out of turn
    ({"chosen": f"{TURNS} A\n\nAssistant: Good", "rejected": f"{TURNS} Bad"}, "alternate"),
    ({"chosen": "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: Good", "rejected": f"{TURNS} Bad"},
     "alternate"),
    ({"chosen": "\n\nAssistant: Good", "rejected": f"{TURNS} Bad"}, "expected")])
def test_bad_pairs_are_named_by_line(tmp_path, row, word):
    """One line with file:line, not a traceback from the middle of tokenizing, nor half a pair."""
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write_rows(tmp_path / "pairs.jsonl", [good, row])
    refuses(lambda: PairFile(path), f"{path}:2", word)


# ---------------------------------------------------------------------------------------------
# the whole stage

def pairs(path, n=10):
    return write_rows(path, [{"prompt": f"Say {i} " + "again " * (i % 3), "chosen": f"{i} it is",
                              "rejected": "no " * (1 + i % 4) + str(i)} for i in range(n)])


def run(micro_run, tmp_path, name, **values):
    args = {"init": str(micro_run), "out": str(tmp_path / name), "batch_size": 4, "micro_batch": 4,
            "data": pairs(tmp_path / "pairs.jsonl"), "epochs": 2.4, "save_every": 2, "warmup": 1,
            "lr": 1e-3, **values}
    return dpo.main(stage_args(dpo, **args))


def test_first_logged_step_is_ln_2(micro_run, tmp_path, monkeypatch):
    """R10.1 through the whole stage: cached reference, sorted batches, micro-batches."""
    no_samples(monkeypatch, dpo)
    run(micro_run, tmp_path, "run", micro_batch=3)
    first, last = log(tmp_path / "run")[0], log(tmp_path / "run")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < first["loss"] and last["margin"] > 0
    for row in log(tmp_path / "run"):  # R10.4
        margin = row["reward_chosen"] - row["reward_rejected"]
        assert row["margin"] == pytest.approx(margin, abs=2e-6)


def test_held_out_pairs_are_measured(micro_run, tokenizer, tmp_path, monkeypatch):
    """The last values are the saved model's against --init, pair by pair, by brute force; what is
    learned does not change. A tie is not measured."""
    no_samples(monkeypatch, dpo)
    rows = [row for _, row in read_jsonl(pairs(tmp_path / "all.jsonl", 16))][10:]
    tie = rows[0] | {"criteria": {"overall": 0.5}}
    held_out = write_rows(tmp_path / "held_out.jsonl", [*rows, tie])
    result = run(micro_run, tmp_path, "run", eval_data=held_out, eval_every=4, micro_batch=3)
    run(micro_run, tmp_path, "without", micro_batch=3)
    assert same_weights(tmp_path / "run", tmp_path / "without")
    policy, reference = Qwen2.from_pretrained(tmp_path / "run"), Qwen2.from_pretrained(micro_run)
    margins = []
    for row in rows:
        prompt, *sides, _ = tokenize_pair(row, tokenizer)
        good, bad = [brute_force(policy, prompt, side) - brute_force(reference, prompt, side)
                     for side in sides]
        margins.append(0.1 * (good - bad))
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert result["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["val_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    found = {row["step"]: row["val_loss"] for row in log(tmp_path / "run") if "val_loss" in row}
    assert list(found) == [1, 5, 6] and found[6] < found[1] < math.log(2)


def test_toy_set_reaches_accuracy_1(micro_run, tmp_path, monkeypatch):
    """R10.4: ten pairs, fifteen epochs."""
    no_samples(monkeypatch, dpo)
    result = run(micro_run, tmp_path, "run", epochs=15, batch_size=10, save_every=99)
    assert result["accuracy"] == 1.0 and result["loss"] < 0.5


@pytest.fixture(scope="module")
def base_run(micro_run, tokenizer, tmp_path_factory):
    """Another model of the same shape, for tau = SFT - base."""
    from helpers import micro_model
    path = tmp_path_factory.mktemp("base")
    micro_model(tokenizer, seed=7).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("merging", [False, True])
def test_resume_is_bit_exact(micro_run, base_run, tmp_path, monkeypatch, merging):
    """R4.4 for AdamW and for online merging, whose masks depend on the step: 6 == 3 + 3 steps."""
    no_samples(monkeypatch, dpo)
    more = {"base": str(base_run), "merge_alpha": 1e-3} if merging else {}
    run(micro_run, tmp_path, "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, dpo, 4)
        run(micro_run, tmp_path, "halves", **more)
    run(micro_run, tmp_path, "halves", resume=True, **more)
    assert len(log(tmp_path / "whole")) == 6 and log(tmp_path / "halves") == log(tmp_path / "whole")
    assert same_weights(tmp_path / "halves", tmp_path / "whole")
    assert not same_weights(tmp_path / "whole", micro_run)


def test_a_resumed_run_reads_its_pairs(micro_run, tmp_path, monkeypatch):
    """Another number of processes would sample other answers, and a file may have changed."""
    no_samples(monkeypatch, dpo)
    path = pairs(tmp_path / "mine.jsonl")
    run(micro_run, tmp_path, "whole", data=path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, dpo, 4)
        run(micro_run, tmp_path, "halves", data=path)
    pairs(tmp_path / "mine.jsonl", n=3)
    run(micro_run, tmp_path, "halves", data=path, resume=True)
    assert log(tmp_path / "halves") == log(tmp_path / "whole")


def test_reference_is_the_policy_before_its_first_step(micro_run, tmp_path, monkeypatch):
    """R10.3: what training compares with is what a forward pass of --init gives, to 1e-6, whatever
    the micro-batch."""
    from model import Qwen2
    from tokenizer import Tokenizer
    tokenizer, model = Tokenizer.from_pretrained(micro_run), Qwen2.from_pretrained(micro_run)
    rows = [tokenize_pair(p, tokenizer) for p in PairFile(pairs(tmp_path / "pairs.jsonl"))]
    want = [[dpo.completion_logprobs(model, [r[0]], [r[k]])[0].sum().item() for k in (1, 2)]
            for r in rows]
    autocast = torch.autocast("cpu", enabled=False)
    for micro_batch in (1, 4, 32):
        got = dpo.all_logprobs(model, rows, micro_batch, autocast)
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=1e-6)


def test_pairs_are_reviewed_before_they_are_learned(micro_run, tmp_path, monkeypatch, capsys):
    """Counts by reason on the screen and in run.json; pairs.jsonl has what was kept; nothing left
    is one line."""
    no_samples(monkeypatch, dpo)
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in
            (("a", "b"), ("a", "b"), ("same", "same"), (" ", "b"), ("c", "d"))]
    path = write_rows(tmp_path / "some.jsonl", rows)
    run(micro_run, tmp_path, "run", data=path, batch_size=2, epochs=1)
    dropped = {"seen before, or its opposite": 1, "equal answers": 1, "empty chosen answer": 1}
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["result"]["dropped"] == dropped and record["result"]["pairs"] == 2
    assert "2 pairs (dropped by the review: 1 seen before" in capsys.readouterr().out
    assert list(PairFile(str(tmp_path / "run" / "pairs.jsonl"))) == [rows[0], rows[4]]
    path = write_rows(tmp_path / "none.jsonl", rows[2:3])
    refuses(lambda: run(micro_run, tmp_path, "none", data=path), "1 equal answers")
    assert not (tmp_path / "none").exists()


def test_micro_batch_changes_memory_only(micro_run, tmp_path, monkeypatch):
    """R4.1: gradients of 4 pairs at once, or of 3 and 1, agree (AdamW's first steps show signs
    only, so the norms are compared)."""
    no_samples(monkeypatch, dpo)
    for name, size in (("four", 4), ("three", 3)):
        run(micro_run, tmp_path, name, micro_batch=size, rpo_alpha=0.2, lr=1e-5)
    for a, b in zip(log(tmp_path / "four"), log(tmp_path / "three"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_base_of_another_shape_is_refused(micro_run, tmp_path, tokenizer):
    """One line that names --base, not a KeyError."""
    tiny_model(vocab_size=tokenizer.padded_vocab_size(128)).save_pretrained(tmp_path / "other")
    refuses(lambda: run(micro_run, tmp_path, "run", base=str(tmp_path / "other")), "--base")


def test_nll_adds_the_chosen_answers_loss(micro_run, tmp_path, monkeypatch):
    """--rpo_alpha w: loss + w * mean over pairs of -log pi(chosen) / its tokens."""
    from model import Qwen2
    from tokenizer import Tokenizer
    no_samples(monkeypatch, dpo)
    run(micro_run, tmp_path, "run", rpo_alpha=0.5, batch_size=10, epochs=1)
    tokenizer, model = Tokenizer.from_pretrained(micro_run), Qwen2.from_pretrained(micro_run)
    rows = [tokenize_pair(p, tokenizer) for p in PairFile(str(tmp_path / "pairs.jsonl"))]
    nll = sum(-brute_force(model, r[0], r[1]) / len(r[1]) for r in rows) / len(rows)
    (row,) = log(tmp_path / "run")
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * nll, abs=1e-4)
