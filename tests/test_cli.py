"""Every stage from its command line: bad input gives exit code 2, one line on stderr, and leaves
what exists as it was; --help; a chain of all stages at the smallest scale.
R numbers: docs/requirements.md."""
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    ENV, letter_queries, log, program, same_weights, stage_args, teach_letters, write_rows)

import lib.args
import dpo
import evaluate
import grpo
import pretrain
import reward
import sample
import sft
from lib.run import Run
from model import Qwen2
from reward import RewardModel
from sample import load_policy
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"pretrain": pretrain, "sft": sft, "dpo": dpo, "reward": reward, "grpo": grpo,
          "evaluate": evaluate, "sample": sample}
WITH_INIT = [name for name in STAGES if name != "pretrain"]
WITH_OUT = ["pretrain", "sft", "dpo", "reward", "grpo"]
# the flag of each stage that names a JSONL file, and a row that is good for it
FILES = {
    "sft": ("data", {"messages": [{"role": "user", "content": "q"},
                                  {"role": "assistant", "content": "a"}]}),
    "dpo": ("data", {"prompt": "p", "chosen": "c", "rejected": "r"}),
    "reward": ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}),
    "grpo": ("queries", {"prompt": "p", "domain": "d", "check": {"kind": "math", "answer": "1"}}),
    "evaluate": ("queries", {"prompt": "p", "domain": "logic",
                             "check": {"kind": "math", "answer": "1"}}),
    "pretrain": ("data", {"text": "t"}),
}


def files(path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(path).rglob("*")) if p.is_file()}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, micro_run):
    """Runs a stage's command line, expects the refusal, returns its line without "error: "."""
    monkeypatch.chdir(tmp_path)  # away from the runs/ of a user who has tried the stages

    def call(stage, *argv, words=()):
        before = files(tmp_path) | files(micro_run)
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            lib.args.cli(STAGES[stage].main, STAGES[stage].Args)
        err = capsys.readouterr().err
        assert stop.value.code == 2
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert all(str(word) in err for word in words), err
        after = files(tmp_path) | files(micro_run)
        assert {name: after.get(name) for name in before} == before
        return lines[0][7:]
    return call


def base(stage, micro_run, tmp_path) -> list:
    """Flags with which nothing else is wrong."""
    argv = [] if stage == "pretrain" else ["--init", micro_run]
    argv += ["--out", tmp_path / "out"] if stage in WITH_OUT else []
    if hasattr(STAGES[stage].Args, "allow_unsafe_code"):  # or a machine without isolation refuses
        argv += ["--allow_unsafe_code"]
    return argv + ["--device", "cpu"]


# ---------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("argv,words", [
    (["--no_such_flag", "1"], ["--no_such_flag"]), (["stray"], ["stray"]), (["--seed"], ["--seed"]),
    (["--seed", "x"], ["--seed", "int", "'x'"]), (["--seed", "1.5"], ["--seed", "int"]),
    (["--seed=1", "--seed=2"], ["--seed", "twice"]), (["--device", "tpu"], ["--device", "tpu"]),
    (["--dtype", "int4"], ["--dtype", "int4"])], ids=lambda v: "-".join(v) if v else "")
def test_bad_flags(stage, argv, words, refused):
    """R14: unknown flags, missing and wrong values: one line that names the flag."""
    refused(stage, *argv, words=words)


@pytest.mark.parametrize("stage", WITH_INIT)
def test_bad_init(stage, refused, tmp_path, micro_run):
    """A directory that is not there, one that holds no model, and a broken config.json."""
    rest = base(stage, micro_run, tmp_path)[2:]
    refused(stage, "--init", tmp_path / "nowhere", *rest, words=["nowhere"])
    (tmp_path / "empty").mkdir()
    refused(stage, "--init", tmp_path / "empty", *rest, words=["empty"])
    broken = tmp_path / "broken"
    Tokenizer.from_pretrained(micro_run).save_pretrained(broken)
    refused(stage, "--init", broken, *rest, words=["broken", "config.json"])
    (broken / "config.json").write_text("{", "utf-8")
    refused(stage, "--init", broken, *rest, words=["broken", "config.json"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", WITH_INIT)
def test_vocabulary_mismatch(stage, refused, tmp_path, micro_run):
    """A tokenizer with more ids than the model has rows: one line, not an index error."""
    from helpers import tiny_model
    tiny_model(vocab_size=128).save_pretrained(tmp_path / "small")
    Tokenizer.from_pretrained(micro_run).save_pretrained(tmp_path / "small")
    more = ["--prompt", "hi", "--max_new_tokens", "8"] if stage == "sample" else []
    refused(stage, "--init", tmp_path / "small", *base(stage, micro_run, tmp_path)[2:], *more,
            words=["small", "600", "128"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", FILES)
def test_bad_files(stage, refused, tmp_path, micro_run):
    """No such file; a broken line, a line that is no object, a row without its columns, bytes that
    are not UTF-8: one line with file:line, and --out is not begun."""
    flag, good = FILES[stage]
    argv = base(stage, micro_run, tmp_path)
    refused(stage, *argv, f"--{flag}", tmp_path / "gone.jsonl", words=["gone.jsonl"])
    bad = tmp_path / "bad.jsonl"
    for line in ('{"prompt": ', "[1, 2]", '{"other": 1}', '"text"'):
        bad.write_text(json.dumps(good) + "\n\n" + line + "\n", "utf-8")
        refused(stage, *argv, f"--{flag}", bad, words=[f"{bad}:3"])
    bad.write_bytes(json.dumps(good).encode() + b'\n{"text": "\xff\xfe"}\n')
    refused(stage, *argv, f"--{flag}", bad, words=["bad.jsonl"])
    bad.write_text("", "utf-8")
    refused(stage, *argv, f"--{flag}", bad, *(
        ["--queries", "none"] if stage == "reward" else []), words=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", WITH_OUT)
def test_finished_run_is_not_overwritten(stage, refused, tmp_path, micro_run):
    """A finished --out needs --overwrite; --resume needs an interrupted one; a file is no --out."""
    flag, good = FILES[stage]
    argv, out = base(stage, micro_run, tmp_path), tmp_path / "out"
    if stage != "pretrain":
        argv += [f"--{flag}", write_rows(tmp_path / "good.jsonl", [good])]
    out.mkdir()
    module = STAGES[stage]
    args = dataclasses.asdict(stage_args(module, out=str(out)))
    (out / "run.json").write_text(json.dumps({"args": args, "finished": True}), "utf-8")
    (out / "model.safetensors").write_text("precious", "utf-8")
    refused(stage, *argv, words=["out", "finished", "--overwrite"])
    refused(stage, *argv, "--resume", words=["resume"])
    (tmp_path / "file").write_text("precious", "utf-8")
    argv[argv.index("--out") + 1] = tmp_path / "file"
    refused(stage, *argv, words=["file"])


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "grpo"])
def test_bad_data_with_overwrite_leaves_the_old_run(stage, refused, tmp_path, micro_run):
    """--overwrite replaces a run by another, not by a refusal: the log of the old one survives."""
    flag, good = FILES[stage]
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"args": {}, "finished": True}), "utf-8")
    (out / "log.jsonl").write_text('{"step": 1}\n', "utf-8")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(good) + "\n{", "utf-8")
    refused(stage, *base(stage, micro_run, tmp_path), "--overwrite", f"--{flag}", bad,
            words=[f"{bad}:2"])


@pytest.mark.parametrize("stage,flag", [
    ("sft", "batch_size"), ("sft", "micro_batch"), ("sft", "save_every"), ("sft", "epochs"),
    ("sft", "max_len"), ("dpo", "batch_size"), ("dpo", "responses"), ("dpo", "temperature"),
    ("reward", "batch_size"), ("grpo", "group"), ("grpo", "inner_steps"), ("evaluate", "samples"),
    ("pretrain", "max_grad_norm"), ("sft", "max_grad_norm"), ("dpo", "max_grad_norm"),
    ("reward", "max_grad_norm"), ("grpo", "max_grad_norm")])
def test_zero_is_refused(stage, flag, refused, tmp_path, micro_run):
    """A size of 0 or less: one line with the flag, not a ZeroDivisionError."""
    for value in (0, -1):
        refused(stage, *base(stage, micro_run, tmp_path), f"--{flag}", value, words=[f"--{flag}"])


def test_reward_model_is_no_policy_and_a_policy_no_reward_model(refused, tmp_path, micro_run):
    """Mixed-up directories are told apart by their weights."""
    tokenizer = Tokenizer.from_pretrained(micro_run)
    model = reward.RewardModel.from_language_model(Qwen2.from_pretrained(micro_run), tokenizer)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    refused("grpo", *base("grpo", micro_run, tmp_path), "--reward_model", micro_run,
            words=["weight"])
    refused("sft", "--init", tmp_path / "rm", "--out", tmp_path / "out", words=["score.weight"])


# ---------------------------------------------------------------------------------------------
# help

@pytest.mark.parametrize("stage", STAGES)
def test_help_text(stage):
    """The text of --help fits 100 columns and two screens, and explains every flag."""
    lines = lib.args.usage(STAGES[stage].Args).splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100, max(lines, key=len)
    for field in dataclasses.fields(STAGES[stage].Args):
        (line,) = [line for line in lines if line.startswith(f"  --{field.name} ")]
        assert len(line.split(")", 1)[1].strip()) > 5


def test_help_exits_0():
    """--help is no failure: exit code 0, the text on stdout so that it can be piped to a pager."""
    result = subprocess.run([sys.executable, str(ROOT / "sft.py"), "--help"], capture_output=True,
                            text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "") and "--init" in result.stdout


@pytest.mark.parametrize("script, flags", [
    ("data", "--help"), ("data", ""), ("tokenizer.py", "show @ --text x")])
def test_output_that_nobody_reads_ends_the_command_in_one_line(script, flags, tmp_path, micro_run):
    """As in `python -m data | head`: the pipe is closed, and the next line cannot go there."""
    reader, writer = os.pipe()
    os.close(reader)
    (tmp_path / "docs.txt").write_text(__doc__)
    argv = flags.replace("@", str(micro_run)).split() or [
        "--input", tmp_path / "docs.txt", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, *program(script), *argv], stdout=writer, text=True,
                          stderr=subprocess.PIPE, env=ENV | {"PYTHONUNBUFFERED": ""})
    os.close(writer)
    assert done.returncode == 141 and done.stderr.splitlines()[-1].startswith("stopped: nobody")
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------
# the chain

def run_stage(stage, *argv, cwd):
    result = subprocess.run([sys.executable, str(ROOT / f"{stage}.py"), *map(str, argv)], cwd=cwd,
                            capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.mark.slow
def test_chain_of_all_stages(tmp_path):
    """R14.5: pretrain -> sft -> dpo -> reward -> grpo -> evaluate -> sample as a user types them,
    on a task small enough to be learned: each leaves a complete run directory for the next."""
    words = ["A", "B", "C"]
    texts = [f"Say {w}. {w}. This is document {i} about {w}." for i in range(400) for w in words]
    write_rows(tmp_path / "docs.jsonl", [{"text": t} for t in texts])
    write_rows(tmp_path / "chats.jsonl", [{"messages": [
        {"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": said}]}
        for w in words for said in (w, w, "no")])
    pairs = [{"prompt": f"Say {w}.", "chosen": w, "rejected": "no"} for w in words]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_rows(tmp_path / "queries.jsonl", [
        {"prompt": f"Say {w}.", "domain": "instruction", "check": {
            "kind": "ifeval", "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": [w]}]}} for w in words])
    small = ("--device", "cpu", "--batch_size", 9, "--warmup", 1)
    run_stage("pretrain", "--model", "micro", "--data", "docs.jsonl", "--vocab_size", 400,
              "--tokens", 4000, "--seq_len", 32, "--batch_tokens", 256, "--out", "p", cwd=tmp_path)
    run_stage("sft", "--init", "p", "--data", "chats.jsonl", "--epochs", 40, "--lr", 3e-3, "--out",
              "s", *small, cwd=tmp_path)
    run_stage("dpo", "--init", "s", "--base", "p", "--data", "pairs.jsonl", "--epochs", 3, "--out",
              "d", "--max_new_tokens", 8, *small, cwd=tmp_path)
    run_stage("reward", "--init", "s", "--policies", "s,d", "--pairs", "pairs.jsonl", "--queries",
              "queries.jsonl", "--max_new_tokens", 8, "--epochs", 5, "--out", "r", *small,
              cwd=tmp_path)
    run_stage("grpo", "--init", "s", "--reward_model", "r", "--queries", "queries.jsonl", "--steps",
              4, "--batch_queries", 3, "--max_new_tokens", 8, "--device", "cpu", "--out", "g",
              cwd=tmp_path)
    run_stage("evaluate", "--init", "g", "--out", "e", "--queries", "queries.jsonl",
              "--max_new_tokens", 8, cwd=tmp_path)
    said = run_stage("sample", "--init", "g", "--prompt", "Say A.", "--max_new_tokens", 8,
                     cwd=tmp_path)
    for name in "psdrg":
        path = tmp_path / name
        record = json.loads((path / "run.json").read_text("utf-8"))
        assert record["finished"] and record["seconds"] > 0 and record["result"]
        rows = log(path)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        for file in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
                     "vocab.json", "merges.txt", "tokenizer_config.json"):
            assert (path / file).is_file(), (name, file)
        assert not (path / "state").exists() and not list(path.rglob("*.tmp"))
        (reward.RewardModel if name == "r" else Qwen2).from_pretrained(path)
    for name in "sdg":
        first = json.loads((tmp_path / name / "samples.jsonl").read_text("utf-8").splitlines()[0])
        assert {"prompt", "response", "score", "finished"} <= first.keys()
    metrics = json.loads((tmp_path / "e" / "eval.json").read_text("utf-8"))["metrics"]
    assert metrics["pass@1"]["total"]["n"] == 3
    assert len(said.splitlines()) >= 2  # the device, and the answer: may be empty at this size


@pytest.mark.parametrize("stage", [sft, dpo, reward, grpo])
def test_a_fault_after_the_loop_leaves_a_whole_model(stage, tokenizer, tmp_path, monkeypatch):
    """Sampling (in reward: the third measure, which follows the last step's) fails: the model is
    that of a run that ends well, --init takes it, and only run.json says that more was to come."""
    policy = teach_letters(tokenizer, tmp_path / "policy")
    chats = write_rows(tmp_path / "chats.jsonl", [{"prompt": "Say", "completion": "so"}] * 4)
    pairs = write_rows(tmp_path / "pairs.jsonl",
                       [{"prompt": "Say", "chosen": "so", "rejected": "no"}] * 4)
    own = {sft: {"data": chats}, dpo: {"data": pairs, "max_new_tokens": 4},
           reward: {"pairs": pairs, "eval_data": pairs, "queries": "none"},
           grpo: {"steps": 2, "max_new_tokens": 4, "n_queries": 0,
                  "queries": letter_queries(tmp_path / "queries.jsonl")}}[stage]
    if stage is not grpo:
        own |= {"batch_size": 2, "epochs": 1}
    args = stage_args(stage, init=str(policy), out=str(tmp_path / "whole"), **own)
    if stage is dpo:
        monkeypatch.setattr(dpo.tasks.queries, "builtin", lambda *args: [])
    stage.main(args)
    module, name = {sft: (sft, "rollout"), dpo: (dpo, "rollout"), reward: (reward, "accuracies"),
                    grpo: (Run, "save_samples")}[stage]
    calls, real = [], getattr(module, name)

    def fails(*args, **kwargs):
        calls.append(1)
        if stage is reward and len(calls) < 3:
            return real(*args, **kwargs)
        raise MemoryError("after the loop")
    monkeypatch.setattr(module, name, fails)
    with pytest.raises(MemoryError):
        stage.main(dataclasses.replace(args, out=str(tmp_path / "fault")))
    assert same_weights(tmp_path / "fault", tmp_path / "whole")
    assert not json.loads((tmp_path / "fault" / "run.json").read_text())["finished"]
    model = RewardModel if stage is reward else Qwen2
    model.from_pretrained(tmp_path / "fault")
    if stage is not reward:
        load_policy(str(tmp_path / "fault"), "cpu")
