"""evaluate.py: metrics against enumeration and direct computation, batch independence, the files it
writes. R numbers: docs/requirements.md."""
import json
import math

import pytest
import torch
from helpers import micro_model, refuses, stage_args, tiny_model, write_rows

import evaluate
import tasks.queries
from data.mixture import is_held_out
from evaluate import Answer, bits_per_byte, by_domain
from lib.tables import interval
from model import Qwen2
from reward import RewardModel
from sample import Completion, rollout

TEXTS = ["A short text.", "", "x", "The same words again and again. " * 9, "naïve café, 世界 2025",
         "Tabs\tand\n\nblank lines\n"]


# ---------------------------------------------------------------------------------------------
# metrics

def test_interval_by_hand():
    """mean +- 1.96 s / sqrt(n) with the sample's s, inside [0, 1]; one value has no width."""
    got = interval([0.25, 0.5, 0.75, 0.5])
    s = math.sqrt((0.0625 + 0 + 0.0625 + 0) / 3)
    assert got == pytest.approx({"mean": 0.5, "low": 0.5 - 1.96 * s / 2, "high": 0.5 + 1.96 * s / 2,
                                 "n": 4})
    assert interval([1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    wide = interval([0.0, 1.0, 1.0])
    assert wide["high"] == 1.0 and wide["low"] == pytest.approx(2 / 3 - 1.96 / 3)


def test_interval_covers_the_truth_about_95_times_in_100():
    """R13.1: 2,000 draws of 60 queries that each pass with their own probability."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(2000, 60, generator=g)
    values = torch.bernoulli(p, generator=g)
    got = [interval(row) for row in values.tolist()]
    assert 0.92 < sum(i["low"] <= 0.5 <= i["high"] for i in got) / 2000 < 0.98


def test_by_domain():
    """Each domain's own mean and n, and the total's."""
    queries = [{"domain": d} for d in ("b", "a", "b")]
    got = by_domain(queries, [1.0, 0.0, 0.0])
    assert list(got) == ["total", "a", "b"]
    assert [got[d]["mean"] for d in got] == pytest.approx([1 / 3, 0, 0.5])
    assert [got[d]["n"] for d in got] == [3, 1, 2]


def direct_bits(model, tokenizer, text, max_len):
    """-> nats and bytes, one window at a time with all the logits."""
    ids, nats, n_bytes = tokenizer.encode(text), 0.0, 0
    for start in range(0, max(0, len(ids) - 1), max_len - 1):
        window = ids[start:start + max_len]
        logp = model(torch.tensor([window]))[0].log_softmax(-1)
        for t in range(1, len(window)):
            nats -= logp[t - 1, window[t]].item()
            n_bytes += len(tokenizer.token_bytes(window[t]))
    return nats, n_bytes


@pytest.mark.parametrize("max_len", [2, 7, 512])
def test_bits_per_byte_is_the_direct_sum(tokenizer, max_len):
    """Ragged windows in batches equal the sum over each text alone; all bytes behind a text's
    first token are counted once."""
    model = tiny_model(vocab_size=tokenizer.padded_vocab_size(128))
    parts = [direct_bits(model, tokenizer, text, max_len) for text in TEXTS]
    nats, n_bytes = map(sum, zip(*parts, strict=True))
    got = bits_per_byte(model, tokenizer, TEXTS, max_len)
    assert got["bytes"] == n_bytes == sum(
        len(text.encode()) - len(tokenizer.token_bytes(tokenizer.encode(text)[0]))
        for text in TEXTS if text)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """A model of zeros: log2(V) bits a token, whatever the text and the batches; the order of the
    texts and their company change nothing."""
    model = tiny_model(vocab_size=tokenizer.padded_vocab_size(128), scale=0.0)
    tokens = sum(max(0, len(tokenizer.encode(text)) - 1) for text in TEXTS)
    got = bits_per_byte(model, tokenizer, TEXTS)
    assert got["bits_per_byte"] * got["bytes"] == pytest.approx(tokens * math.log2(640), rel=1e-5)
    real = tiny_model(vocab_size=640)
    a = bits_per_byte(real, tokenizer, TEXTS * 7)
    b = bits_per_byte(real, tokenizer, TEXTS[::-1])
    assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-5)


# ---------------------------------------------------------------------------------------------
# answers

def test_greedy_is_equal_at_batch_1_and_32(tokenizer):
    """R13.1: 32 queries of mixed lengths together and one at a time: the same ids."""
    model = micro_model(tokenizer)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    queries = tasks.queries.builtin("val", 32)
    together = rollout(model, tokenizer, queries, 1, 12, 0.0, score=tasks.queries.score_many)
    for query, group in zip(queries, together, strict=True):
        ((alone,),) = rollout(model, tokenizer, [query], 1, 12, 0.0,
                               score=tasks.queries.score_many)
        assert alone.ids == group[0].ids and alone.score == group[0].score


def word_queries(path, n=6):
    check = {"kind": "ifeval", "instruction_id_list": ["keywords:existence"],
             "kwargs": [{"keywords": ["e"]}]}
    return write_rows(path, [{"prompt": f"Write {i}.", "domain": ("instruction", "logic")[i % 2],
                              "check": check} for i in range(n)])


def run(micro_run, tmp_path, **values):
    return evaluate.main(stage_args(evaluate, **{
        "init": str(micro_run), "queries": word_queries(tmp_path / "q.jsonl"), "samples": 2,
        "max_new_tokens": 6, "out": str(tmp_path / "scores"), **values}))


@pytest.mark.parametrize("few_shot", [0, 2])
def test_evaluation_is_written_and_repeats(micro_run, tmp_path, few_shot):
    """R13.1: settings, n and intervals beside each number; the same seed gives the same file."""
    metrics = run(micro_run, tmp_path, few_shot=few_shot)
    written = json.loads((tmp_path / "scores" / "eval.json").read_text("utf-8"))
    assert written["metrics"] == metrics
    assert written["settings"].items() >= {"n": 6, "samples": 2, "few_shot": few_shot,
                                           "max_new_tokens": 6}.items()
    for name in ("pass@1", "greedy"):
        assert metrics[name]["total"]["n"] == 6 and metrics[name]["logic"]["n"] == 3
        assert all(v["low"] <= v["mean"] <= v["high"] for v in metrics[name].values())
    lines = (tmp_path / "scores" / "eval_samples.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 6 and {"prompt", "greedy", "sampled"} <= json.loads(lines[0]).keys()
    assert run(micro_run, tmp_path, few_shot=few_shot) == metrics
    assert not list(micro_run.glob("eval*"))  # what was evaluated stays as it was given


def test_best_of_by_hand():
    """Three queries of four answers: the majority counts equal final answers, however they are
    reached, and chance decides a draw; the reward model takes its favourite."""
    class Scorer:
        def __init__(self):
            self.tokenizer = self

        def render_prompt(self, prompt, tools):
            return f"{tools}{prompt}"

        def score(self, prompts, responses):
            assert prompts == ["Nonep"] * 4 + ["[f]q"] * 4 + ["Noner"] * 4
            return [text.count("!") - 2 * text.count("?") for text in responses]
    sampled = [[("1 + 6 = 7! The answer is \\boxed{7}.", 1.0), ("The answer is \\boxed{7}.", 1.0),
                ("no", 0.0), ("no?", 0.0)],
               [("a?", 0.0), ("a?", 0.0), ("b!!!", 1.0), ("c?", 0.0)],
               [("a", 1.0), ("a", 1.0), ("b!", 0.0), ("a", 1.0)]]
    sampled = [[Answer(text, score) for text, score in group] for group in sampled]
    queries = [{"prompt": "p"}, {"prompt": "q", "tools": "[f]"}, {"prompt": "r"}]
    got = evaluate.best_of(queries, sampled, Scorer())
    assert {name: value["mean"] for name, value in got.items()} == pytest.approx({
        "majority": 2 / 3, "reward model": 2 / 3, "reward model - majority": 0.0,
        "reward model - chance": (1 / 2 + 3 / 4 - 3 / 4) / 3})
    lead = got["reward model - majority"]  # 0, 1, -1: deviation 1, so 1.96 / sqrt(3)
    assert lead["low"] == max(-1.0, -1.96 / math.sqrt(3))


def test_best_of_with_a_reward_model(micro_run, tokenizer, tmp_path):
    """The flag, with a head that is zero: all answers draw, so its choice is chance, pass@1."""
    RewardModel.from_language_model(Qwen2.from_pretrained(micro_run), tokenizer).save_pretrained(
        tmp_path)
    tokenizer.save_pretrained(tmp_path)
    metrics = run(micro_run, tmp_path, reward_model=str(tmp_path))
    assert metrics["best_of"]["reward model"] == metrics["pass@1"]["total"]
    assert metrics["best_of"]["majority"]["n"] == 6


def test_base_models_answer_ends_at_the_blank_line(tokenizer, monkeypatch):
    """With --few_shot the text is cut before the next question that a base model would ask."""
    ids = tokenizer.encode(" The answer is \\boxed{7}.\n\nQuestion: 2?\nAnswer: \\boxed{4}.")
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kw: [Completion(ids, [], False)])
    query = {"prompt": "p", "domain": "logic", "check": {"kind": "math", "answer": "7"}}
    args = stage_args(evaluate, few_shot=1)
    assert evaluate.answer_queries(None, tokenizer, [query], args, 1, 0.0) == [
        [("The answer is \\boxed{7}.", 1, {})]]


def test_base_models_stop_token_is_no_part_of_its_answer(tokenizer, monkeypatch):
    """"<|endoftext|>" in the text would be a word in small letters, and fail constraints."""
    ids = tokenizer.encode(" A SEA.") + [tokenizer.eos_id]
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kw: [Completion(ids, [], True)])
    rules = ["change_case:english_capital", "ours:exact_words"]
    query = {"prompt": "p", "domain": "instruction", "check": {
        "kind": "rules", "instruction_id_list": rules, "kwargs": [{}, {"n": 2}]}}
    args = stage_args(evaluate, few_shot=1)
    assert evaluate.answer_queries(None, tokenizer, [query], args, 1, 0.0) == [[("A SEA.", 1, {})]]
    cut = tokenizer.encode("A SEA.")  # at --max_new_tokens: as in a chat, it cannot pass
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kw: [Completion(cut, [], False)])
    assert evaluate.answer_queries(None, tokenizer, [query], args, 1, 0.0) == [[("A SEA.", 0, {})]]


def test_a_reward_of_ones_own_is_averaged(micro_run, tmp_path, capsys):
    """pass@1 and greedy are its means, and the table says so."""
    (tmp_path / "mine.py").write_text(
        "def score(query, response):\n"
        "    return {'reward': 1 if query['prompt'] == 'Write 0.' else 0.25, 'half': 0.5}\n")
    own = {"reward": f"{tmp_path / 'mine.py'}:score", "max_new_tokens": 40}
    metrics = run(micro_run, tmp_path, **own)
    text = (tmp_path / "scores" / "eval_samples.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert metrics["pass@1"]["total"]["mean"] == sum(row["pass@1"] for row in rows) / 6 > 0
    said = capsys.readouterr().out
    assert "| pass@1 (mean score), % | total |" in said and "half: 0.5" in said
    assert metrics["parts"] == {"half": 0.5}
    assert all(row["greedy_parts"] == {"half": 0.5} for row in rows if row["greedy_score"] > 0)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Write 0.", "topic": t} for t in "xy"])
    metrics = run(micro_run, tmp_path, **own, queries=path, domain_key="topic")
    assert metrics["greedy"].keys() == {"total", "x", "y"}
    metrics = run(micro_run, tmp_path, **own, few_shot=1, n_queries=4)
    assert metrics["parts"] == {"half": 0.5}


def test_few_shot_of_a_foreign_domain_is_refused(micro_run, tmp_path):
    """--few_shot has worked examples of the built-in domains only: one line, not a KeyError."""
    path = write_rows(tmp_path / "own.jsonl", [
        {"prompt": "1 + 1?", "domain": "cooking", "check": {"kind": "math", "answer": "2"}}])
    refuses(lambda: run(micro_run, tmp_path, queries=path, few_shot=2), "--few_shot", "cooking")


def test_text_is_held_out_only(micro_run, tokenizer, tmp_path):
    """--text scores the documents that pretrain.py left out, of real text only."""
    docs, path = [f"Document number {i} of the directory." for i in range(300)], tmp_path / "docs"
    path.mkdir()
    write_rows(path / "real.jsonl", [{"text": text} for text in docs])
    write_rows(path / "logic.jsonl", [{"text": "q " + text} for text in docs])
    metrics = run(micro_run, tmp_path, text=str(path))
    held_out = list(filter(is_held_out, docs))
    want = bits_per_byte(Qwen2.from_pretrained(micro_run), tokenizer, held_out)
    assert metrics["bits_per_byte"] == pytest.approx(want["bits_per_byte"], rel=1e-6)
    assert 0 < want["bytes"] < 2000


@pytest.mark.parametrize("values,words", [
    ({"samples": 0}, ["--samples"]), ({"text": "nowhere"}, ["--text"]),
    ({"max_new_tokens": 0}, ["--max_new_tokens"])])
def test_impossible_settings_are_refused(micro_run, tmp_path, values, words):
    """One line that names the flag."""
    refuses(lambda: run(micro_run, tmp_path, **values), *words)
    refuses(lambda: run(micro_run, tmp_path, out=str(micro_run)), "--out", "holds a model")
