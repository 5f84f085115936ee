"""recipes/: the long-context experiment, its measurements by hand and its whole path on a model
without skill; preferences, by hand; the scripts of post-training on a model that learns to guess.
The flags in the Markdown recipes are checked by test_docs.py."""
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.pairs import to_pair
from lib.args import InputError
from helpers import tiny_model, write_rows

ROOT = Path(__file__).resolve().parents[1]


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


L, P, R = recipe("long_context"), recipe("preferences"), recipe("real_data")


def test_the_curves_of_a_log(tmp_path):
    """What a step logged that is a number, of whole lines after the last one seen; a run that was
    resumed at step 1 has written step 2 anew, which is not shown twice."""
    file = tmp_path / "log.jsonl"
    first = '{"step": 1, "loss": 2.5, "targets": 7, "expert_max": [1.5], "completions": ["a"]}\n'
    file.write_text(first + '{"step": 2, "loss": null, "lr": 0.001}\n{"step": 3, "lo')
    new_rows = recipe("to_tensorboard").new_rows
    assert new_rows(file, 0) == [(1, {"loss": 2.5, "targets": 7}), (2, {"lr": 0.001})]
    assert new_rows(file, 1) == [(2, {"lr": 0.001})] and new_rows(file, 2) == []
    file.write_text(first + '{"step": 2, "loss": 2.0}\n')
    assert new_rows(file, 2) == []
    file.write_text(first + '{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.5}\n')
    assert new_rows(file, 2) == [(3, {"loss": 1.5})]


def test_loss_by_position_is_the_mean_over_rows():
    model, rows = tiny_model(), torch.randint(97, (6, 21))
    want = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(),
                           reduction="none").view(6, 20).mean(0)
    torch.testing.assert_close(L.loss_by_position(model, rows), want, atol=1e-4, rtol=1e-4)


class Reader:
    """Finds the first code in the text, as a model should, or always says 0."""

    def __init__(self, tokenizer, reads):
        self.tokenizer, self.reads, self.lengths = tokenizer, reads, []
        self.head_weight = torch.eye(tokenizer.n_vocab)

    def hidden(self, ids):
        self.lengths.append(ids.shape[1] + 1)
        code = re.search(r"The code is (\d)(\d)\.", self.tokenizer.decode(ids[0].tolist()))
        digits = code.groups() if self.reads else "00"
        out = torch.zeros(1, ids.shape[1], self.tokenizer.n_vocab)
        for at, digit in zip((-3, -2), digits, strict=True):
            out[0, at, self.tokenizer.encode(digit)[0]] = 1.0
        return out


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_is_in_the_text_and_asked_at_its_end(length, depth, tokenizer, texts):
    book = "\n".join(texts)
    reader = Reader(tokenizer, reads=True)
    assert L.needle_accuracy(reader, tokenizer, book, length, depth, 20, seed=0) == 1.0
    assert all(0.9 * length < n <= length + 2 for n in reader.lengths)
    with pytest.raises(AssertionError):
        L.needle_accuracy(reader, tokenizer, "too short", length, depth, 1, seed=0)
    blind = Reader(tokenizer, reads=False)
    assert L.needle_accuracy(blind, tokenizer, book, length, depth, 20, seed=0) < 0.2


def test_depth_is_where_the_needle_goes():
    lines = [str(i) for i in range(10)]
    for depth, want in ((0.0, 0), (0.5, 5), (1.0, 10)):
        text, asked = L.needle(random.Random(0), lines, depth)
        assert text.split("\n").index(asked.strip()) == want and len(text.split("\n")) == 11


def test_four_tenths_of_the_needle_documents_fill_a_row(tokenizer, texts):
    """With their end token, so that a row of 65 holds the code and its question."""
    documents = L.training_documents(random.Random(0), tokenizer, "\n".join(texts), 64, 20_000)
    found = [document["text"] for document in documents]
    sizes = [len(tokenizer.encode(text)) for text in found]
    assert max(sizes) == 64 and sum(sizes) < 20_064
    assert sizes.count(64) * 64 / sum(sizes) == pytest.approx(0.4, abs=0.01)
    codes = [re.findall(r"The code is (\d\d)\.", text) for text in found]
    assert all(code[0] == code[-1] and text.endswith(f"\nThe code is {code[0]}.")
               for code, text in zip(codes, found, strict=True))


def test_preferences_of_both_shapes():
    """A transcript is split at the last answer's turn, also where both answers begin alike."""
    start = "\n\nHuman: Hi: there\n\nAssistant: Yes?\n\nHuman: A\n\nB?"
    asked = [{"role": "user", "content": "Hi: there"}, {"role": "assistant", "content": "Yes?"},
             {"role": "user", "content": "A\n\nB?"}]
    assert to_pair({"chosen": start + "\n\nAssistant: It is 7: yes",
                    "rejected": start + "\n\nAssistant: It is 8."}) == {
        "prompt": asked, "chosen": "It is 7: yes", "rejected": "It is 8."}
    names = {"user": "human", "assistant": "gpt"}
    said = [{"from": names[m["role"]], "value": m["content"]} for m in asked]
    assert to_pair({"conversations": said, "chosen": {"from": "gpt", "value": "a"},
                    "rejected": {"from": "gpt", "value": "b"}}) == {
        "conversations": said, "prompt": asked, "chosen": "a", "rejected": "b"}


def test_the_pairs_of_a_prompt_are_held_out_together(tmp_path):
    """Nothing of a held-out prompt is trained on; every pair is in one of the files."""
    rows = [{"prompt": f"q{i % 40}", "chosen": f"c{i}", "rejected": "r"} for i in range(200)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    P.main(P.Args(files=path, out=str(tmp_path / "out"), held_out=4))
    parts = [[json.loads(line) for line in open(tmp_path / "out" / f"{name}.jsonl")]
             for name in ("train", "held_out")]
    train, held_out = ({row["prompt"] for row in part} for part in parts)
    assert not train & held_out and 4 <= len(held_out) <= 16 and len(train | held_out) == 40
    assert sum(map(len, parts)) == 200
    with pytest.raises(InputError, match="--held_out 1"):
        P.main(P.Args(files=path, out=str(tmp_path / "out"), held_out=1))


def test_beside_qwens_scores_by_hand():
    """One problem with right and wrong solutions, one without. Ours likes the last best, Qwen the
    first, both linear in the rank, so the correlation is -1."""
    class Reversed:
        def score(self, prompts, responses, batch_size):
            assert prompts == ["q"] * 4
            return [float(text[0]) for text in responses]
    rows = [{"idx": 0, "question": "q", "response": f"{i}" + "x" * length, "is_correct": right,
             "rm_score": -i} for i, right, length in ((0, True, 9), (1, False, 5), (2, True, 1),
                                                      (3, False, 2))]
    rows += [{"idx": 1, "question": "p", "response": "x", "is_correct": True, "rm_score": 0.0}] * 2
    assert P.against_qwen(Reversed(), rows) == pytest.approx({
        "problems": 1, "right above wrong, ours": 1 / 4, "best of 8, ours": 0,
        "right above wrong, Qwen": 3 / 4, "best of 8, Qwen": 1,
        "right above wrong, longer": 2 / 4, "best of 8, longer": 1, "random": 0.5,
        "correlation with Qwen": -1})


def test_real_files_become_documents_conversations_and_queries(tmp_path, micro_run, capsys):
    """Each answer passes its own check; what is held out is in none of the files to learn from, and
    measured for each source."""
    sums = [{"question": f"What is {i} and {i}?",
             "answer": f"It is {i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
            for i in range(80)]
    halves = [{"problem": f"Halve ${i}$.", "solution": f"$\\boxed{{\\frac{{{i}}}{{2}}}}$",
               "level": "Level 1"} for i in range(1, 21)]
    code = {"text": "Write a function to add one.", "code": "def f(x):\r\n\treturn x + 1",
            "test_list": ["assert f(1) == 2", "assert f(0) == 1"], "test_setup_code": ""}
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_rows(tmp_path / "a" / "gsm8k_train.jsonl", sums)
    write_rows(tmp_path / "a" / "b" / "math_train.jsonl", halves)
    write_rows(tmp_path / "a" / "mbpp_train.jsonl", [code])
    out = tmp_path / "out"
    R.write(R.Args(real=str(tmp_path), out=str(out), built_in=3, n_real=999))
    documents, sft, rl = ([json.loads(line) for line in (out / name).read_text().splitlines()]
                          for name in ("documents.jsonl", "sft.jsonl", "rl.jsonl"))
    assert len(documents) == 101 and documents[7]["text"] == (
        "What is 7 and 7?\n\nIt is 7+7 = 14.\nThe answer is \\boxed{14}.")
    held_out = [doc["text"].split("\n")[0] for doc in documents if R.is_held_out(doc["text"])]
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in sft}
    real = [query for query in rl if query["prompt"] in answers]
    assert len(real) == len(sft) - 3 == 101 - len(held_out) and 0 < len(held_out) < 20
    assert all(prompt.split("\n")[0] not in held_out for prompt in answers)
    assert all(R.tasks.queries.score(query, answers[query["prompt"]]) == 1 for query in real)
    R.measure(R.Args(out=str(out), models=str(micro_run), device="cpu", dtype="float32"))
    lines = (out / "bits_per_byte.md").read_text().splitlines()
    assert lines[0].startswith("| bits per byte | gsm8k (") and len(lines) == 3
    with pytest.raises(InputError, match="none of gsm8k_train.jsonl"):
        R.write(R.Args(real=str(tmp_path / "out"), out=str(out)))


@pytest.mark.slow
def test_the_whole_recipe(micro_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(micro_run, base)
    config = json.loads((base / "config.json").read_text())
    args = L.Args(init=str(base), out=str(tmp_path / "out"), tokens=20_000, more_tokens=10_000,
                  n=1, texts=4, device="cpu", dtype="float32")
    with pytest.raises(InputError, match="trained at 512 tokens, more than 256"):
        L.main(args)
    config["original_max_position_embeddings"] = 128
    (base / "config.json").write_text(json.dumps(config))
    L.main(args)
    results = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(results) == 8 and all(len(r["loss"]) == 4 for r in results.values())
    trained, dca = results["then 512, theta 1e6"], results["and DCA + temperature, 4x"]
    assert dca["loss"][:2] == pytest.approx(trained["loss"][:2], abs=1e-4)  # unchanged up to 512
    assert dca["loss"][3] != trained["loss"][3]
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 12
    for (length, base), before in zip(L.STAGES, ("base", 256, 512, 1024), strict=True):
        stage = tmp_path / "out" / f"stage{length}"
        config = json.loads((stage / "config.json").read_text())
        assert config["rope_theta"] == base and config["max_position_embeddings"] >= length
        init = json.loads((stage / "run.json").read_text())["args"]["init"]
        assert init.endswith(f"{before}")
        ends = json.loads((stage / "run.json").read_text())["result"]["mixture"]
        assert ends["needles, longer"]["share"] == 0.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_post_training_of_a_published_model(micro_run, tmp_path):
    """real_135m.sh through its wrapper, every stage at lengths of seconds: of the demonstrations
    three in four say 3 and one says 4 to the same question, RL's queries pay alike, the test wants
    a 3. Again, and nothing is left to do; an interrupted stage goes on. The equations are solved
    as written, the queries of no two files are the same (but for SVAMP's, here all one)."""
    svamp = write_rows(tmp_path / "svamp.jsonl", [
        {"ID": f"chal-{i}", "Body": "Pick one", "Question": "Which?", "Answer": answer,
         "Equation": f"( ( 8.0 / 2.0 ) - {4.0 - answer} )"}
        for i in range(1, 129) for answer in [4.0 if i <= 64 and i % 4 == 0 else 3.0]])
    sizes = {"N_SFT": 1000, "EPOCHS": 3, "N_RL": 38, "STEPS": 20, "BATCH": 4, "N_TEST": 76,
             "LR": 30}
    env = os.environ | {k: str(v) for k, v in sizes.items()} | {
        "PYTHON": sys.executable, "DTYPE": "float32"}
    command = ["bash", str(ROOT / "recipes" / "qwen2.5_0.5b.sh"), str(micro_run), svamp,
               str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    names = ("base", "sft", "dpo", "grpo")
    metrics = [json.loads((out / "evaluation" / name / "eval.json").read_text())["metrics"]
               for name in names]
    assert [m["greedy"]["total"]["n"] for m in metrics] == [76] * 4
    base, sft, _, best = (m["pass@1"]["SVAMP"]["mean"] for m in metrics)
    assert base < sft < best
    asked = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
             for name in ("sft", "rl", "val", "test")}
    texts = [row["messages"][1]["content"] for row in asked["sft"]]
    worked = "8 / 2 = 4. 4 - 1 = 3. The answer is \\boxed{3}."
    assert 0 < texts.count(worked) < 32 and len(texts) == 932
    prompts = [{row.get("prompt") or row["messages"][0]["content"] for row in rows}
               for rows in asked.values()]
    for one, other in itertools.combinations(prompts, 2):
        assert one & other == {"Pick one. Which?"}
    report = (out / "report.md").read_text()
    assert "| dpo | grpo |" in report and "| base | grpo |" in report
    times = (out / "times.txt").read_text()
    assert len(re.findall(r"^\d[\d.]* s, .* of CPU: ", times, re.M)) == 8

    record = json.loads((out / "grpo" / "run.json").read_text())
    (out / "grpo" / "run.json").write_text(json.dumps(record | {"finished": False}))
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed" in again.stdout and "== reward" not in again.stdout
