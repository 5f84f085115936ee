"""reward.py: scores that do not depend on their batch, transformers' classifier as an oracle, a set
that must be learned, baselines, resume. R numbers: docs/requirements.md."""
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    TINY, interrupt_at, letter_queries, log, micro_model, refuses, same_weights, stage_args,
    teach_letters, tiny_model, wake, weights, write_rows)

import reward
from model import PRESETS, Qwen2
from data.pairs import PairIds, pair_responses, soft_label, tokenize_pairs
from reward import RewardModel, accuracies, pair_rewards, preference_loss
from lib.args import parse_args
from sample import Rollout

PROMPTS = ["Hi?", "What is the sum of two and three, please?", "Hi?", "Go", "A longer one " * 6]
RESPONSES = ["Yes.", "Five.", "No, never, not at all.", "ok " * 20, ""]


def random_reward(tokenizer, seed=0, **changes) -> RewardModel:
    """A body with logits of order 1 and a head that is not zero."""
    body = tiny_model(seed, vocab_size=tokenizer.padded_vocab_size(128), **changes)
    model = RewardModel.from_language_model(body, tokenizer)
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


# ---------------------------------------------------------------------------------------------
# loss and scores

def test_preference_loss():
    """Bradley-Terry by hand: ln 2 at equal rewards, log(1 + e^-d) at a difference d."""
    d = torch.tensor([0.0, 1.0, -2.0, 50.0])
    want = [math.log1p(math.exp(-x)) for x in d.tolist()]
    assert want[0] == pytest.approx(math.log(2))
    assert preference_loss(d + 3, torch.full((4,), 3.0)).tolist() == pytest.approx(want, abs=1e-6)


def test_preference_loss_of_soft_labels():
    """-p ln sigmoid(d) - (1 - p) ln sigmoid(-d) by hand; p = 0 is the pair turned round; a tie
    pulls the two rewards together; the minimum is at d = ln(p / (1 - p))."""
    chosen, rejected = torch.tensor([1.0, 1.0, 1.0, -2.0]), torch.zeros(4)
    got = preference_loss(chosen, rejected, torch.tensor([1.0, 0.5, 0.0, 0.75]))
    plus, minus = math.log1p(math.exp(-1)), math.log1p(math.exp(1))  # 0.3133 and 1.3133
    want = [plus, (plus + minus) / 2, minus,
            0.75 * math.log1p(math.exp(2)) + 0.25 * math.log1p(math.exp(-2))]
    assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert want[1] == pytest.approx(0.8133, abs=1e-4)
    d = torch.tensor([0.0, math.log(3.0), 1.0], requires_grad=True)
    preference_loss(d, torch.zeros(3), torch.tensor([0.5, 0.75, 0.5])).sum().backward()
    assert d.grad.tolist() == pytest.approx([0, 0, 1 / (1 + math.exp(-1)) - 0.5], abs=1e-6)


def test_soft_label_by_hand():
    """The weighted mean of the shares; equal weights without any; 1 where nothing is weighed."""
    pair = {"criteria": {"overall": 1.0, "truthfulness": 0.5, "helpfulness": 0.0}}
    assert soft_label(pair, None) == soft_label(pair, {}) == 0.5
    assert soft_label(pair, {"truthfulness": 2.0, "overall": 1.0}) == pytest.approx(2 / 3)
    assert soft_label(pair, {"helpfulness": 1.0}) == 0
    assert soft_label(pair, {"debiasing": 1.0}) == soft_label({}, {"overall": 1.0}) == 1


def test_score_does_not_depend_on_the_batch(tokenizer):
    """R11.1: alone, all together, in another order, in any batch size: equal to 1e-4 (scores are of
    order 10, and torch 2.15 sums a batch in another order)."""
    model = random_reward(tokenizer)
    alone = [model.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert max(alone) - min(alone) > 0.1
    for size in (1, 2, 64):
        assert model.score(PROMPTS, RESPONSES, size) == pytest.approx(alone, abs=1e-4)
    assert model.score(PROMPTS[::-1], RESPONSES[::-1]) == pytest.approx(alone[::-1], abs=1e-4)


def test_a_prompt_read_once_scores_like_whole_rows(tokenizer):
    """A group's prompt is read once: as if every row were read alone, from its first token."""
    model = random_reward(tokenizer)
    prompts, responses = [p for p in PROMPTS for _ in RESPONSES], RESPONSES * len(PROMPTS)
    rows = [tokenizer.render_prompt(p) + tokenizer.encode(r) + [tokenizer.im_end_id]
            for p, r in zip(prompts, responses, strict=True)]
    want = [model.rewards([row]).item() for row in rows]
    assert model.score(prompts, responses, 5) == pytest.approx(want, abs=1e-4)


def test_score_is_read_at_the_last_token_whatever_the_padding(tokenizer):
    """R11.1: a full forward of the row alone, the head at its last position; padding of any id,
    of any length, and the padding id inside the text change nothing."""
    model, pad = random_reward(tokenizer), tokenizer.pad_id
    rows = [[5, 6, pad, 7], [9], [pad, pad, 3, pad]]
    want = [model.head(model.hidden(torch.tensor([row]))[0, -1]).item() for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    for fill, width in ((0, 4), (pad, 9), (tokenizer.im_end_id, 6)):
        ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
        assert model(ids, lengths).tolist() == pytest.approx(want, abs=1e-5)


def test_the_head_keeps_float32_under_autocast(tokenizer):
    """In bfloat16 rewards near 4 would have steps of 0.03, and answers that differ would tie."""
    model = random_reward(tokenizer)
    rows = torch.randn(64, model.config.hidden_size)
    want = (rows.double() @ model.head.weight.double().T).flatten()
    with torch.autocast("cpu", torch.bfloat16):
        got = model.read(rows[:, None], torch.ones(64, dtype=torch.long))
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_prompt_and_response_forms_agree(tokenizer):
    """Text, messages or the sampler's ids of one dialogue have one score; the end token counts."""
    model = random_reward(tokenizer)
    ids = tokenizer.render_prompt("Hi?")
    response = tokenizer.encode("Yes.") + [tokenizer.im_end_id]
    scores = model.score(["Hi?", [{"role": "user", "content": "Hi?"}], ids, ids],
                         ["Yes.", "Yes.", response, response[:-1]])
    assert scores[:3] == pytest.approx([scores[0]] * 3, abs=1e-6)
    assert abs(scores[3] - scores[0]) > 1e-3


# ---------------------------------------------------------------------------------------------
# directories

@pytest.mark.parametrize("preset", ["tied", "untied", "micro-moe"])
def test_directory_has_score_weight(tokenizer, tmp_path, preset):
    """R11: the published names; from tied, untied and MoE language models alike; loads again with
    equal scores and is no language model."""
    V = tokenizer.padded_vocab_size(128)
    config = {"tied": replace(TINY, vocab_size=V),
              "untied": replace(TINY, vocab_size=V, tie_word_embeddings=False),
              "micro-moe": replace(PRESETS["micro-moe"], vocab_size=V)}[preset]
    torch.manual_seed(0)
    model = RewardModel.from_language_model(wake(Qwen2(config)), tokenizer)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = weights(tmp_path)
    assert names["score.weight"].shape == (1, config.hidden_size)
    assert "lm_head.weight" not in names and "head.weight" not in names
    kind = "Qwen2Moe" if preset == "micro-moe" else "Qwen2"
    raw = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert raw["architectures"] == [f"{kind}ForSequenceClassification"]
    again = RewardModel.from_pretrained(tmp_path)
    want = model.score(PROMPTS, RESPONSES)
    assert again.score(PROMPTS, RESPONSES) == pytest.approx(want, abs=1e-5)
    refuses(lambda: Qwen2.from_pretrained(tmp_path), "score.weight")


def test_language_model_is_no_reward_model(micro_run):
    """One line, not a score from a random head."""
    refuses(lambda: RewardModel.from_pretrained(micro_run), "weight", "missing")


def test_the_config_has_one_label(tokenizer, tmp_path):
    """Without it, transformers builds a head of two."""
    random_reward(tokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "reward"} and config["label2id"] == {"reward": 0}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_same_scores(tokenizer, tmp_path, tied):
    """R3.6, R11.1: Qwen2ForSequenceClassification on our directory, batched and padded."""
    transformers = pytest.importorskip("transformers")
    model = random_reward(tokenizer, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    oracle, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True)
    assert oracle.config.id2label == {0: "reward"} and oracle.num_labels == 1
    assert not info["missing_keys"] and not info["unexpected_keys"]
    oracle.config.pad_token_id = tokenizer.pad_id
    rows = [tokenizer.render_prompt(p) + tokenizer.encode(r) + [tokenizer.im_end_id]
            for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        want = oracle(ids, attention_mask=(ids != tokenizer.pad_id).long()).logits[:, 0].tolist()
    assert model.score(PROMPTS, RESPONSES) == pytest.approx(want, rel=1e-4)


# ---------------------------------------------------------------------------------------------
# learning

def preferences(n):
    """Only a reader of the question can tell right from wrong: the answers are the same."""
    return [{"prompt": f"Is {i} even?", "chosen": "yes" if i % 2 == 0 else "no",
             "rejected": "no" if i % 2 == 0 else "yes"} for i in range(n)]


def test_starts_at_ln_2_and_overfits_32_pairs(tokenizer):
    """R11.2: a zero head scores all alike, exactly ln 2; then 32 pairs are learned to 100%."""
    model = RewardModel.from_language_model(micro_model(tokenizer), tokenizer)
    rows = list(tokenize_pairs(preferences(32), tokenizer, 512))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        chosen, rejected = pair_rewards(model, rows)
        loss = preference_loss(chosen, rejected).mean()
        if step == 0:
            assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
        if (chosen > rejected).all():
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracies(model, rows)["accuracy"] == 1.0 and step < 59


def test_trivial_rules_by_hand(tokenizer):
    """R11.3: the accuracy stands beside "longer wins" and the correlation of score and length."""
    class Length(torch.nn.Module):
        def rewards(self, rows, router=None):
            return torch.tensor([float(len(row)) for row in rows])
    rows = [([1] * 5, [1] * 3), ([1] * 2, [1] * 7), ([1] * 9, [1] * 4), ([1] * 6, [1] * 6)]
    got = accuracies(Length(), [PairIds([], chosen, rejected) for chosen, rejected in rows])
    loss = sum(math.log1p(math.exp(-d)) for d in (2, -5, 5, 0)) / 4
    assert got == pytest.approx({"loss": loss, "accuracy": 0.5, "longer_wins": 0.5,
                                 "shorter_wins": 0.25, "score_length_correlation": 1.0}, abs=1e-6)


def test_pairs_join_policies_by_query():
    """Answers of two policies to one query are compared; never those of two queries."""
    def answer(prompt, text, score, finished=True):
        return Rollout({"prompt": prompt, "domain": "d"}, [], [], [], finished, text, score)
    pool = [answer("p", "right", 1.0), answer("q", "fail q", 0.0), answer("p", "cut", 0.0, False),
            answer("p", "wrong", 0.0), answer("p", "right", 1.0), answer("r", "good", 1.0)]
    assert pair_responses(pool, 4, 0) == [
        {"prompt": "p", "chosen": "right", "rejected": "wrong", "domain": "d"}]


def test_long_pairs_are_dropped(tokenizer):
    """--max_len is the longer side's, prompt and end token included."""
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r " * 30}]
    ((prompt, chosen, rejected, label),) = tokenize_pairs(pairs, tokenizer, 9999)
    assert label == 1
    assert chosen[-1] == rejected[-1] == tokenizer.im_end_id
    assert len(tokenize_pairs(pairs, tokenizer, len(prompt + rejected))) == 1
    assert len(tokenize_pairs(pairs, tokenizer, len(prompt + rejected) - 1)) == 0


def run(micro_run, tmp_path, name, **values):
    args = {"init": str(micro_run), "out": str(tmp_path / name), "queries": "none",
            "n_held_out": 0, "batch_size": 4, "micro_batch": 4,
            "pairs": write_rows(tmp_path / "p.jsonl", preferences(10)),
            "epochs": 2.4, "save_every": 2, "warmup": 1, **values}
    return reward.main(stage_args(reward, **args))


def test_resume_is_bit_exact(micro_run, tmp_path, monkeypatch):
    """R4.4: 6 steps == Ctrl-C in the fourth, then --resume; and the first loss is ln 2."""
    run(micro_run, tmp_path, "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, reward, 4)
        run(micro_run, tmp_path, "halves")
    run(micro_run, tmp_path, "halves", resume=True)
    assert log(tmp_path / "whole")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(log(tmp_path / "whole")) == 6 and log(tmp_path / "halves") == log(tmp_path / "whole")
    assert same_weights(tmp_path / "halves", tmp_path / "whole")
    assert RewardModel.from_pretrained(tmp_path / "whole").score(["a"], ["b"])[0] != 0


def test_weights_decide_what_is_learned(micro_run, tmp_path):
    """Truthfulness prefers "yes", conciseness "no": the weighted one is learned; equal weights make
    ties of all pairs, which leave the rewards together and are not measured."""
    def rows(numbers):
        return write_rows(tmp_path / f"{numbers[0]}.jsonl", [
            {"prompt": f"Is {i} even?", "chosen": "yes, it is", "rejected": "no",
             "criteria": {"truthfulness": 1.0, "conciseness": 0.0}} for i in numbers])
    learned, measured = rows(range(12)), rows(range(12, 16))
    all_equal = "overall=1,truthfulness=1,conciseness=1"
    gaps = {}
    for chosen in ("truthfulness=2", "conciseness=1", all_equal):
        result = run(micro_run, tmp_path, chosen, epochs=6, lr=3e-3, pairs=learned,
                     eval_data=measured, weights=chosen)
        model = RewardModel.from_pretrained(tmp_path / chosen)
        yes, no = model.score(["Is 3 even?"] * 2, ["yes, it is", "no"])
        gaps[chosen] = yes - no
        assert set(result) == ({measured} if chosen != all_equal else set())
        if chosen != all_equal:  # the better answer by the weights counts, whatever it is called
            assert result[measured]["accuracy"] == 1.0
    assert gaps["truthfulness=2"] > 1 and gaps["conciseness=1"] < -1
    assert abs(gaps[all_equal]) < 0.01
    assert log(tmp_path / all_equal)[-1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_old_name_is_refused():
    refuses(lambda: parse_args(reward.Args, ["--held_out", "x"]), "now called --eval_data")


def test_held_out_files(micro_run, tmp_path):
    """Pairs that are only measured: learned from 24 pairs, right on 8 others; nothing is
    sampled."""
    def rows(numbers):
        return [{"prompt": f"Is {i} even?", "chosen": c, "rejected": r} for i in numbers
                for c, r in (("yes", "never, never"), ("yes, yes, yes", "no"))]
    measured = write_rows(tmp_path / "held.jsonl", rows(range(12, 16)))
    result = run(micro_run, tmp_path, "run", epochs=8, lr=3e-3, eval_every=20,
                 pairs=write_rows(tmp_path / "p2.jsonl", rows(range(12))), eval_data=measured)
    first, last = log(tmp_path / "run")[0], log(tmp_path / "run")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and last["accuracy"] == 1
    assert len(log(tmp_path / "run")) == 48
    assert result == {measured: result[measured]} and result[measured]["pairs"] == 8
    assert result[measured]["accuracy"] == 1 and result[measured]["longer_wins"] == 0.5
    assert first["val_loss"] == pytest.approx(math.log(2), abs=0.1) and last["val_accuracy"] == 1
    assert last["val_loss"] == pytest.approx(result[measured]["loss"], rel=1e-6)
    assert sum("val_loss" in row for row in log(tmp_path / "run")) == 4  # steps 1, 21, 41, 48
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["result"]["by_source"] == result


def test_held_out_pairs_by_source_and_temperature(tokenizer, micro_run, tmp_path, monkeypatch):
    """A row for each policy and temperature, of its own answers, beside all of them together."""
    teach_letters(tokenizer, tmp_path / "policy")
    queries = letter_queries(tmp_path / "queries.jsonl")
    policies = f"{tmp_path / 'policy'},{micro_run}"
    monkeypatch.setattr(
        reward.tasks.queries, "builtin", lambda *args: reward.tasks.queries.load(queries)
    )
    result = run(micro_run, tmp_path, "run", queries=queries, policies=policies, pairs="",
                 temperatures="0.8,1.0", responses=8, max_new_tokens=8, epochs=4,
                 n_held_out=2)
    sources = [f"{tmp_path / 'policy'} at temperature {t}" for t in (0.8, 1.0)]
    assert list(result)[:3] == ["all", *sources]
    assert result["all"]["pairs"] >= max(result[source]["pairs"] for source in sources) > 0


@pytest.mark.parametrize("values,words", [
    ({"queries": "none", "pairs": ""}, ["--pairs"]),
    ({"temperatures": "0.7,hot"}, ["--temperatures"]), ({"temperatures": ""}, ["--temperatures"]),
    ({"weights": "truth=1"}, ["--weights", "truthfulness"]),
    ({"weights": "overall=-1"}, ["--weights", "at least 0"]),
    ({"weights": "overall"}, ["--weights"]),
    ({"batch_size": 0}, ["--batch_size"])])
def test_impossible_settings_are_refused(micro_run, tmp_path, values, words):
    """One line each, and --out is not begun."""
    refuses(lambda: run(micro_run, tmp_path, "run", **values), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", [{"prompt": "p", "chosen": "c"}, {"text": "t"},
                                 {"prompt": "p", "chosen": 4, "rejected": "r"},
                                 {"prompt": "p", "chosen": "c", "rejected": "r",
                                  "criteria": {"overall": 2}}])
def test_bad_pairs_are_named_by_line(micro_run, tmp_path, row):
    """file:line, and --out is not begun."""
    path = write_rows(tmp_path / "bad.jsonl", [*preferences(1), row])
    refuses(lambda: run(micro_run, tmp_path, "run", pairs=path), f"{path}:2")
    assert not (tmp_path / "run").exists()
