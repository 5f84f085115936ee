"""Bad input of every kind to every command: one line that begins with "error:", exit code 2,
nothing written, nothing run, no traceback. A row of the table is a command line; @name stands for
a file that `world` makes, and the words must be in the message. Each row is a test: pytest counts
them. R14, R4."""
import gzip
import json
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENV, program, tiny_model
from safetensors.torch import load_file, save_file

from model import Qwen2
from reward import RewardModel
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
NESTED, LONG_NUMBER = "[" * 100_000, "9" * 5000
GOOD = {
    "chats": {"messages": [{"role": "user", "content": "q"},
                           {"role": "assistant", "content": "a"}]},
    "pairs": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "queries": {"prompt": "p", "domain": "logic", "check": {"kind": "math", "answer": "1"}},
    "docs": {"text": "t"}}

# ---------------------------------------------------------------------------------------------
# the files


def raw_safetensors(header, body=b"", size=None) -> bytes:
    """A file with any header: bytes or JSON; its length may lie."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + body


def bomb(marker: Path) -> bytes:
    """Unpickling it makes a directory."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)
    return pickle.dumps(Evil())


CONFIGS = {  # changes of a good config.json, or its whole text
    "text": "not JSON", "list": "[]", "nested": NESTED,
    "number": f'{{"vocab_size": {LONG_NUMBER}}}',
    "empty": "", "llama": {"model_type": "llama"}, "no_type": {"model_type": None},
    "no_size": {"hidden_size": None}, "word": {"hidden_size": "x"}, "true": {"hidden_size": True},
    "fraction": {"num_hidden_layers": 1.5}, "zero": {"num_attention_heads": 0},
    "negative": {"num_hidden_layers": -1}, "heads": {"num_attention_heads": 3},
    "kv": {"num_key_value_heads": 3}, "layers": {"num_hidden_layers": 10**9},
    "theta": {"rope_theta": float("nan"), "rope_parameters": None},
    "theta_inf": {"rope_theta": float("inf"), "rope_parameters": None},
    "theta_word": {"rope_theta": "x", "rope_parameters": None},
    "two_thetas": {"rope_theta": 5.0}, "eps": {"rms_norm_eps": 0}, "act": {"hidden_act": "gelu"},
    "eps_nan": {"rms_norm_eps": float("nan")}, "act_list": {"hidden_act": ["silu"]},
    "window": {"use_sliding_window": True}, "layer_types": {"layer_types": ["sliding_attention"]},
    "layer_number": {"layer_types": 5}, "only": {"mlp_only_layers": "ab"},
    "only_number": {"mlp_only_layers": 3}, "scaling": {"rope_scaling": [1]},
    "scaling_kind": {"rope_scaling": {"rope_type": "linear", "factor": 2}},
    "yarn": {"rope_scaling": {"rope_type": "yarn"}},
    "yarn_word": {"rope_scaling": {"rope_type": "yarn", "factor": "x"}},
    "yarn_small": {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
    "yarn_nan": {"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}},
    "yarn_inf": {"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}},
    "yarn_length": {"rope_scaling": {"rope_type": "yarn", "factor": 2,
                                     "original_max_position_embeddings": "x"}},
    "positions": {"max_position_embeddings": "x", "rope_scaling": {"rope_type": "yarn",
                                                                   "factor": 2}},
    "chunk": {"dual_chunk_attention_config": {"chunk_size": 8}},
    "chunk_word": {"dual_chunk_attention_config": "x"}, "quantized": {"quantization_config": {}},
    "vocab": {"vocab_size": 10**15}, "head_dim": {"head_dim": 7},
    "experts": {"model_type": "qwen2_moe"}, "tie": {"tie_word_embeddings": "x"}}

WEIGHTS = {  # name -> what model.safetensors becomes; a function of the good weights, or bytes
    "empty": b"", "short": b"\0" * 7, "zeros": bytes(1000), "text": b"weights\n" * 50,
    "huge_header": raw_safetensors(b"{}", size=2**63),
    "long_header": raw_safetensors(b"{}", size=99),
    "big_header": raw_safetensors(b"{}" + b" " * 10, size=120_000_000),
    "no_json": raw_safetensors(b"not json"), "utf16": raw_safetensors("{}".encode("utf-16")),
    "nested": raw_safetensors(NESTED.encode()),
    "list": raw_safetensors([]), "no_dtype": raw_safetensors({"a": {"shape": [1]}}),
    "odd_dtype": raw_safetensors({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}},
                                 bytes(4)),
    "beyond": raw_safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}},
                              bytes(4)),
    "backwards": raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
                                 bytes(4)),
    "overflow": raw_safetensors({"a": {"dtype": "F32", "shape": [2**62, 2**62],
                                       "data_offsets": [0, 4]}}, bytes(4)),
    "none": lambda w: {},
    "missing": lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"},
    "extra": lambda w: w | {"model.layers.9.mlp.up_proj.weight": torch.ones(1)},
    "shape": lambda w: w | {"model.norm.weight": torch.ones(3)},
    "scalar": lambda w: w | {"model.norm.weight": torch.tensor(1.0)},
    "integers": lambda w: w | {"model.norm.weight": w["model.norm.weight"].long()},
    "truncated": None, "pickle": None}

INDEXES = {  # model.safetensors.index.json beside good weights
    "text": "x", "list": "[]", "no_map": "{}", "map_list": '{"weight_map": [1]}',
    "numbers": '{"weight_map": {"a": 1}}', "null": '{"weight_map": {"a": null, "b": "x"}}',
    "lists": '{"weight_map": {"a": ["x"]}}', "gone": '{"weight_map": {"a": "gone.safetensors"}}',
    "up": '{"weight_map": {"a": "../outside.safetensors"}}', "nothing": '{"weight_map": {}}',
    "absolute": '{"weight_map": {"a": "/etc/passwd"}}', "nul": '{"weight_map": {"a": "a\\u0000b"}}',
    "nested": NESTED}

TOKENIZERS = {  # tokenizer.json: its text, or a function that changes a good one
    "empty": "", "text": "x", "list": "[]", "no_model": "{}", "nested": NESTED,
    "number": f'{{"model": {LONG_NUMBER}}}',
    "vocab": lambda t: t["model"].update(vocab=[1]),
    "ids": lambda t: t["model"]["vocab"].update(A=10**6),
    "words": lambda t: t["model"]["vocab"].update(A="x"),
    "twice": lambda t: t["model"]["vocab"].update(A=t["model"]["vocab"]["B"]),
    "negative": lambda t: t["model"]["vocab"].update(A=-1),
    "unprintable": lambda t: t["model"]["vocab"].update({"\u4e16": t["model"]["vocab"].pop("A")}),
    "merges": lambda t: t["model"].update(merges=[["a"]]),
    "merge_number": lambda t: t["model"].update(merges=[5]),
    "merge_word": lambda t: t["model"].update(merges=["abc"]),
    "order": lambda t: t["model"]["merges"].reverse(),
    "pattern": lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(["}),
    "pipeline": lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
    "no_special": lambda t: t.update(added_tokens=[{"id": 0, "content": "x"}]),
    "special_number": lambda t: t["added_tokens"][0].update(content=5),
    "special_list": lambda t: t.update(added_tokens=5)}

LINES = {  # the bad third line of a JSONL file, for any command that reads one
    "broken": b'{"prompt": ', "list": b"[1, 2]", "text": b'"text"', "null": b"null", "nan": b"NaN",
    "latin1": b'{"text": "\xff\xfe"}', "nested": NESTED.encode(), "number": LONG_NUMBER.encode(),
    "columns": b'{"other": 1}', "nul": b"\0\0\0\0", "two": b"{} {}"}

CHATS = {
    "string": "x", "empty": [], "number": [5], "no_role": [{"content": "x"}],
    "role": [{"role": "boss", "content": "x"}], "role_list": [{"role": [], "content": "x"}],
    "null": [{"role": "user", "content": None}], "parts": [{"role": "user", "content": [
        {"type": "image", "image": "x"}]}],
    "calls": [{"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}],
    "calls_number": [{"role": "assistant", "content": "", "tool_calls": 5}],
    "name_only": {"role": "user"}}
PAIRS = {
    "null": {"prompt": None}, "number": {"chosen": 5}, "empty": {"rejected": []},
    "prompt_list": {"prompt": []}, "prompt_role": {"prompt": [{"role": "boss", "content": "x"}]},
    "chosen_null": {"chosen": [{"role": "assistant", "content": None}]},
    "prompt_no_role": {"prompt": [{"content": "x"}]}}
CHECKS = {
    "string": "x", "null": None, "no_kind": {}, "kind": {"kind": "opinion"}, "list": [],
    "no_answer": {"kind": "math"}, "null_answer": {"kind": "math", "answer": None},
    "number": {"kind": "math", "answer": 5}, "no_tests": {"kind": "code", "language": "python"},
    "cobol": {"kind": "code", "language": "cobol", "tests": ""},
    "tests_list": {"kind": "code", "language": "python", "tests": ["x"]},
    "prefix": {"kind": "code", "language": "python", "tests": "", "prefix": 5},
    "no_kwargs": {"kind": "ifeval", "instruction_id_list": ["keywords:existence"]},
    "lengths": {"kind": "ifeval", "instruction_id_list": ["keywords:existence"], "kwargs": []},
    "rule": {"kind": "ifeval", "instruction_id_list": ["no:rule"], "kwargs": [{}]},
    "kwargs": {"kind": "ifeval", "instruction_id_list": ["keywords:existence"],
               "kwargs": [{"words": 3}]}}
QUERIES = {
    "prompt": {"prompt": 5}, "prompt_null": {"prompt": None}, "prompt_list": {"prompt": []},
    "prompt_role": {"prompt": [{"role": "boss", "content": "x"}]}, "domain": {"domain": []},
    "domain_number": {"domain": 5}}
TABLES = {  # of scaling.py fit
    "empty.csv": "", "head.csv": "N,D,lr,batch_tokens,loss\n", "words.csv":
    "N,D,lr,batch_tokens,loss\n1,2,x,4,5\n", "columns.csv": "a,b\n1,2\n", "ragged.csv":
    "N,D,lr,batch_tokens,loss\n1,2\n", "text.json": "x", "numbers.json": "[1]", "object.json":
    "{}", "nested.json": NESTED, "nan.csv": "N,D,lr,batch_tokens,loss\nnan,1,1,1,1\n",
    "zero.csv": "N,D,lr,batch_tokens,loss\n0,0,0,0,0\n", "pairs.json":
    '[{"optimal_pairs": 5, "compute_budget": 1}]', "size.csv": "Model Size\nx\n",
    "latin1.csv": b"N,\xff\n1\n", "number.json": f"[{{\"N\": {LONG_NUMBER}}}]"}


@pytest.fixture(scope="session")
def world(micro_run, tmp_path_factory):
    """A directory of bad files; in it `model`, `scorer`, `chats.jsonl` and so on are good."""
    world = tmp_path_factory.mktemp("world")
    (world / "cwd").mkdir()
    shutil.copytree(micro_run, model := world / "model")
    tokenizer = Tokenizer.from_pretrained(model)
    scorer = RewardModel.from_language_model(Qwen2.from_pretrained(model), tokenizer)
    scorer.save_pretrained(world / "scorer")
    tokenizer.save_pretrained(world / "scorer")
    config = json.loads((model / "config.json").read_text())
    good = load_file(model / "model.safetensors")
    whole = (model / "model.safetensors").read_bytes()
    kinds = (("config", CONFIGS, "config.json"), ("weights", WEIGHTS, "model.safetensors"),
             ("index", INDEXES, "model.safetensors.index.json"),
             ("tokenizer", TOKENIZERS, "tokenizer.json"))
    for kind, cases, file in kinds:
        for name, change in cases.items():
            folder = world / f"{kind}-{name}"
            shutil.copytree(model, folder, copy_function=os.link)
            (path := folder / file).unlink(missing_ok=True)
            if kind == "config" and isinstance(change, dict):
                change = json.dumps(config | change)
            if kind == "tokenizer" and not isinstance(change, str):
                fields = json.loads((model / file).read_text("utf-8"))
                change(fields)
                change = json.dumps(fields)
            if kind == "weights" and change is None:
                change = whole[:-100] if name == "truncated" else bomb(world / "marker")
            if callable(change):
                save_file({k: v.contiguous() for k, v in change(good).items()}, path)
            else:
                path.write_bytes(change if isinstance(change, bytes) else change.encode())
    tiny_model(vocab_size=128).save_pretrained(world / "few-rows")
    tokenizer.save_pretrained(world / "few-rows")
    shutil.copytree(model, world / "no-tokenizer", ignore=shutil.ignore_patterns("*.txt", "tok*"))
    shutil.copytree(model, world / "only-pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    (world / "only-pickle" / "pytorch_model.bin").write_bytes(bomb(world / "marker"))
    for kind, row in GOOD.items():
        line = json.dumps(row).encode() + b"\n"
        (world / f"{kind}.jsonl").write_bytes(line * 3)
        (world / f"{kind}-empty.jsonl").write_bytes(b"")
        (world / f"{kind}-blank.jsonl").write_bytes(b"\n \n")
        (world / f"{kind}-torn.jsonl.gz").write_bytes(gzip.compress(line * 99)[:-9])
        (world / f"{kind}-plain.jsonl.gz").write_bytes(line)
        (world / f"{kind}-utf16.jsonl").write_bytes(line.decode().encode("utf-16"))
        for name, bad in LINES.items():
            (world / f"{kind}-{name}.jsonl").write_bytes(line + b"\n" + bad + b"\n")

    def rows(kind, cases, change):
        for name, value in cases.items():
            text = json.dumps(GOOD[kind]) + "\n\n" + json.dumps(change(value)) + "\n"
            (world / f"{kind}-of-{name}.jsonl").write_text(text)
    rows("chats", CHATS, lambda value: {"messages": value})
    rows("pairs", PAIRS, lambda value: GOOD["pairs"] | value)
    rows("queries", QUERIES, lambda value: GOOD["queries"] | value)
    rows("queries", {f"check-{k}": v for k, v in CHECKS.items()},
         lambda value: GOOD["queries"] | {"check": value})
    for name, text in TABLES.items():
        (world / f"table-{name}").write_bytes(text if isinstance(text, bytes) else text.encode())
    (world / "long.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "x " * 5000}, {"role": "assistant", "content": "a"}]}) + "\n")
    (world / "long-pairs.jsonl").write_text(json.dumps(
        {"prompt": "x " * 5000, "chosen": "a", "rejected": "b"}) + "\n")
    (world / "file").write_text("precious")
    (world / "web.parquet").write_text("PAR1")
    (world / "odd.pdf").write_text("%PDF")
    (world / "latin1.txt").write_bytes("café".encode("latin-1"))
    for name, record in (("finished", {"finished": True, "args": {}}), ("args", {
            "finished": False, "args": 5}), ("list", []), ("begun", {"finished": False,
                                                                     "args": {}})):
        (world / f"run-{name}").mkdir()
        (world / f"run-{name}" / "run.json").write_text(json.dumps(record))
        (world / f"run-{name}" / "log.jsonl").write_text('{"step": 1}\n')
    (world / "run-text").mkdir()
    (world / "run-text" / "run.json").write_text("x")
    (world / "data-done").mkdir()
    (world / "data-done" / "report.json").write_text("{}")
    for name in ("ranks", "rank-words", "rank-twice"):
        (world / f"{name}.tiktoken").write_text({"ranks": "!!! 0\n", "rank-words": "YQ== x\n",
                                                 "rank-twice": "YQ== 0\nYg== 0\n"}[name])
    return world


# ---------------------------------------------------------------------------------------------
# the table: (command line, words of the message)

INIT = {"sft": "", "dpo": "", "reward": "", "grpo": "", "evaluate": "", "sample": "--prompt x"}
FILES = {"sft": ("--data", "chats"), "dpo": ("--data", "pairs"), "grpo": ("--queries", "queries"),
         "reward": ("--queries none --pairs", "pairs"), "evaluate": ("--queries", "queries"),
         "pretrain": ("--data", "docs")}
OUT = ("pretrain", "sft", "dpo", "reward", "grpo")


def good(command) -> str:
    """A command line in which nothing is wrong yet."""
    init = f" --init @model {INIT[command]}" if command in INIT else " --tokenizer @model"
    small = " --tokens 4000" * (command == "pretrain")
    return f"{command}.py --device cpu{small}{init}" + " --out @out" * (command in OUT)


def table():
    for command in (*INIT, "pretrain"):
        line = good(command)
        for flags, *words in (
                ("--no_such_flag 1", "--no_such_flag"), ("stray", "stray"),
                ("--seed", "--seed: expected one argument"),
                ("--seed=1.5", "int"), ("--seed=x", "int"), ("--seed=1 --seed=1", "twice"),
                ("--seed=nan", "--seed"), ("--seed=inf", "--seed"), ("--seed=-1", "--seed"),
                ("--seed=1e30", "--seed"), ("-seed 1", "-seed"), ("--device=", "--device"),
                ("--dtype=int4", "--dtype"), ("--seed=", "--seed"), ("--seed=１e", "--seed")):
            yield f"{line.replace(' --device cpu', '')} {flags}", *words
        for device in ("tpu", "cpu:x", "cuda:999", "cuda:x"):
            yield f"{line.replace('--device cpu', f'--device {device}')}", "--device"
    for command, numbers in {
            "pretrain": "seq_len micro_batch eval_every save_every lr warmup weight_decay "
                        "max_grad_norm final_lr rope_theta vocab_size batch_tokens",
            "sft": "n_data max_len epochs batch_size micro_batch lr warmup weight_decay "
                   "max_grad_norm save_every",
            "dpo": "responses temperature max_len epochs beta rpo_alpha lr merge_alpha "
                   "pairs_per_query",
            "reward": "responses pairs_per_query max_new_tokens lr weight_decay warmup epochs",
            "grpo": "steps batch_queries num_generations temperature inner_steps clip_eps kl "
                    "lr max_grad_norm",
            "evaluate": "samples max_new_tokens few_shot n_queries yarn",
            "sample": "max_new_tokens temperature top_k top_p yarn"}.items():
        for number in numbers.split():
            for value in ("-1", "nan", "inf"):
                yield f"{good(command)} --{number} {value}", f"--{number}"
    for line, *words in (
        ("grpo.py --num_generations 1", "--num_generations"),
        ("grpo.py --loss_type sum", "--loss_type"),
        ("grpo.py --scale_rewards all", "--scale_rewards"),
        ("sample.py --yarn 0.5", "YaRN"),
        ("sample.py --top_p 0", "--top_p"),
        ("sample.py --top_p 2", "--top_p"),
        ("sample.py --max_new_tokens 0", "--max_new_tokens"),
        ("sample.py --max_new_tokens 100000", "positions"),
        ("evaluate.py --window 1 --text @model", "--window"),
        ("evaluate.py --text @model", "--text"),
        ("evaluate.py --queries rm", "rm"),
        ("evaluate.py --out @file", "--out"),
        ("evaluate.py --out @model", "--out"),
        ("dpo.py --reserve 0 --base @model --data @pairs.jsonl", "--reserve"),
        ("dpo.py --merge_alpha 1 --base @model --data @pairs.jsonl", "--merge_alpha"),
        ("dpo.py --base @scorer --data @pairs.jsonl", "scorer"),
        ("dpo.py --max_len 3 --data @pairs.jsonl", "too long"),
        ("dpo.py --data @long-pairs.jsonl", "too long"),
        ("reward.py --temperatures 1,x", "--temperatures"),
        ("reward.py --temperatures nan", "--temperatures"),
        ("reward.py --temperatures -1", "--temperatures"),
        ("reward.py --policies @gone,@model", "gone"),
        ("reward.py --queries none", "--pairs"),
        ("reward.py --queries none --pairs @pairs.jsonl --max_len 3", "pair"),
        ("reward.py --queries none --pairs @long-pairs.jsonl", "pair"),
        ("grpo.py --reward_model @gone", "gone"),
        ("grpo.py --reward_model @model", "weight"),
        *(
            (f"{stage}.py {more}--rollout_url {url}", "--rollout_url", word)
            for stage, more in (
                ("dpo", ""),
                ("evaluate", ""),
                ("reward", "--n_queries 4 "),
            )
            for url, word in (
                ("ftp://h/v1", "http://HOST"),
                ("http://", "http"),
                ("http://127.0.0.1:9/v1", "refused"),
                ("http://[/v1", "IPv6"),
            )
        ),
        ("grpo.py --temperature 0.7 --rollout_url http://127.0.0.1:9/v1", "--temperature 1"),
        ("sft.py --max_len 3", "--max_len"),
        ("sft.py --data @long.jsonl", "--max_len"),
        ("pretrain.py --model huge", "--model"),
        ("pretrain.py --attention magic", "--attention"),
        ("pretrain.py --data @model", "model"),
        ("pretrain.py --data @docs.jsonl", "--data"),
        ("pretrain.py --data @odd.pdf", "odd.pdf"),
        ("pretrain.py --data @latin1.txt", "UTF-8"),
        ("pretrain.py --data @docs.jsonl,@gone.jsonl", "gone"),
        ("pretrain.py --batch_tokens 3", "--batch_tokens"),
        ("pretrain.py --data @docs.jsonl --weights a=x", "--weights"),
        ("pretrain.py --data @docs.jsonl --weights a", "--weights"),
        ("pretrain.py --data @docs.jsonl --weights other=1", "other"),
        ("pretrain.py --data @docs.jsonl --weights docs=-1", "weights"),
        ("pretrain.py --data @docs.jsonl --weights docs=nan", "weights"),
        ("pretrain.py --data @docs.jsonl --upcycle", "--data"),
        ("pretrain.py --data @docs.jsonl --tokenizer @gone", "gone"),
        ("pretrain.py --data @docs.jsonl --tokenizer @file", "file"),
        ("pretrain.py --data @docs.jsonl --tokenizer @ranks.tiktoken", "ranks"),
        ("pretrain.py --data @docs.jsonl --tokenizer @rank-words.tiktoken", "rank-words"),
        ("pretrain.py --data @docs.jsonl --tokenizer @rank-twice.tiktoken", "rank-twice"),
    ):
        command = line.partition(".py")[0]
        extra = line.partition(".py ")[2]
        yield f"{good(command)} {extra}".replace(
            "--tokenizer @model", "" if "--tokenizer" in extra else "--tokenizer @model"), *words
    for command in INIT:
        start = good(command).replace("@model", "{}")
        for name in ("gone", "file", "cwd", "few-rows", "no-tokenizer", "only-pickle",
                     "config-text", "weights-pickle", "tokenizer-text", "index-up"):
            yield start.format("@" + name), name.split("-")[0] if name == "gone" else name
    yield good("sft").replace("@model", "@scorer"), "score.weight"
    for kind, cases in (("config", CONFIGS), ("weights", WEIGHTS), ("index", INDEXES),
                        ("tokenizer", TOKENIZERS)):
        for name in cases:
            yield good("sample").replace("@model", f"@{kind}-{name}"), f"{kind}-{name}"
    for command, (flag, kind) in FILES.items():
        line = f"{good(command)} {flag} "
        for name in ("empty", "blank", *LINES, "utf16"):
            if command == "pretrain" and name in ("empty", "blank"):
                yield f"{line}@{kind}-{name}.jsonl", "--data"
            else:
                yield f"{line}@{kind}-{name}.jsonl", f"{kind}-{name}"
        for name in ("torn", "plain"):
            yield f"{line}@{kind}-{name}.jsonl.gz", f"{kind}-{name}"
        yield f"{line}@gone.jsonl", "gone"
        yield f"{line}@cwd", "cwd"
    for name in CHATS:
        yield f"{good('sft')} --data @chats-of-{name}.jsonl", "messages"
    for name in PAIRS:
        for command in ("dpo", "reward"):
            yield (f"{good(command)} {FILES[command][0]} @pairs-of-{name}.jsonl",
                   "messages" if "role" in name else f"pairs-of-{name}.jsonl:3")
    for name in [*QUERIES, *(f"check-{k}" for k in CHECKS)]:
        for command in ("grpo", "evaluate"):
            yield (f"{good(command)} --queries @queries-of-{name}.jsonl",
                   "messages" if "role" in name else f"queries-of-{name}.jsonl")
    for command in OUT:
        line = good(command).replace("@out", "{}")
        if command in FILES and command != "pretrain":
            line += f" {FILES[command][0]} @{FILES[command][1]}.jsonl"
        for name, flags, *words in (
                ("run-finished", "", "--overwrite"), ("run-finished", "--resume", "finished"),
                ("out", "--resume", "nothing to resume"), ("run-begun", "", "interrupted"),
                ("run-begun", "--resume", "other arguments"), ("run-text", "", "run.json"),
                ("run-list", "", "run.json"), ("run-args", "--resume", "run.json"),
                ("file", "", "--out"), ("file/x", "", "--out")):
            yield line.format("@" + name) + " " + flags, *words
    for flags, *words in (
            ("--no_such_flag", "--no_such_flag"), ("--input @gone.txt", "gone"),
            ("--input @latin1.txt", "UTF-8"), ("--input @odd.pdf", "odd.pdf"),
            ("--input @web.parquet", "parquet"), ("--input @cwd", "cwd"),
            ("--input @docs-empty.jsonl", "no document"), ("--max_mb x", "--max_mb"),
            ("--max_mb -1", "--max_mb"), ("--threshold nan", "--threshold"),
            ("--input ,", "no .jsonl"),
            ("--input @docs.jsonl --evals @gone", "gone"), ("--seed -1", "--seed"),
            ("--input @docs.jsonl --evals @queries-list.jsonl", "queries-list"),
            ("--synthetic_mb inf", "--synthetic_mb")):
        yield f"data --out @out {flags}", *words
    for name in LINES:
        yield f"data --out @out --input @docs-{name}.jsonl", f"docs-{name}"
    yield "data --out @data-done --input @docs.jsonl", "--overwrite"
    yield "data --out @file --input @docs.jsonl", ""
    for line, *words in (
            ("train", "--input"), ("walk", "walk"), ("train --input @gone --out @out", "gone"),
            ("train --input @latin1.txt --out @out", "latin1"), ("show @gone --text x", "gone"),
            ("train --input @cwd --out @out", "cwd"), ("show @file --text x", "file"),
            ("train --input @file --vocab_size x --out @out", "vocab_size"),
            ("train --input @file --vocab_size 5 --out @out", "vocab_size"),
            ("train --input @file --out @model", "another --out"), ("show @model", "--text"),
            ("train --input @file --out @file", "file"), ("--vocab_size 5", "5"),
            ("show @tokenizer-pattern --text x", "tokenizer-pattern")):
        yield f"tokenizer.py {line}", *words
    for line, *words in (
            ("", "files"), ("@gone.jsonl", "gone"), ("@cwd", "cwd"), ("@chats.jsonl", "columns"),
            ("@queries-broken.jsonl", "queries-broken"), ("@queries-empty.jsonl", "rows"),
            ("@queries-latin1.jsonl", "queries-latin1"), ("@queries-nested.jsonl", "nested"),
            ("@queries-of-check-no_answer.jsonl", "no_answer")):
        yield f"bench/answers.py {line}", *words
    for line, *words in (
            ("", "name files"), ("@gone.jsonl", "gone"), ("@queries-broken.jsonl", "broken"),
            ("@chats.jsonl", "chats.jsonl:1", "instruction_id_list")):
        yield f"bench/ifeval.py {line}", *words
    for line, *words in (
            ("train", "train"), ("plan", "plan needs"), ("plan --model 7b", "--model"),
            ("plan --model nan --tokens 1e9", "--model"), ("plan --tokens -1", "--tokens"),
            ("fit --data @gone", "gone"),
            ("plan --model inf", "--model"), ("plan --tokens x", "--tokens"),
            ("plan --model 0.5B --tokens 1e9 --gpus 0", "--gpus"),
            ("plan --mfu nan", "--mfu"),
            ("sweep --sizes 7 --out @out --device cpu", "--sizes"),
            ("sweep --sizes 0x0 --out @out --device cpu", "--sizes"),
            ("sweep --lrs a,b --out @out --device cpu", "--lrs"),
            ("sweep --lrs -1 --out @out --device cpu", "--lrs"),
            ("sweep --batches nan --out @out --device cpu", "--batches"),
            ("sweep --tokens 0 --out @out --device cpu", "--tokens"),
            ("sweep --data @docs.jsonl --out @out --device cpu", "--data"),
            ("sweep --out @file --device cpu", "file"), ("fit --bootstrap 0", "--bootstrap"),
            ("sweep --out @run-finished --device cpu", "--overwrite")):
        yield f"scaling.py {line}", *words
    for name in TABLES:
        yield f"scaling.py fit --data @table-{name}", f"table-{name}"
    for name in ("@gone", "@file", "@cwd", "@run-text"):
        yield f"lib.report --run {name}", name[1:]
    for script in ("attention", "generation", "imports", "posttraining", "sandbox", "tokenizer",
                   "training"):
        for flags in ("--no_such_flag 1", "--core x", "--processes many"):
            yield f"bench/{script}.py {flags}", flags.split()[0]
    yield "bench/attention.py --systems nobody", "nobody"
    yield "bench/attention.py --cases nothing", "nothing"
    yield "bench/attention.py --processes 0", "--processes"
    for flags, *words in (("--n 0", "--n"), ("--init @gone", "gone"), ("--tokens x", "--tokens"),
                          ("--stray", "--stray"), ("--init @config-llama", "llama")):
        yield f"recipes/long_context.py --out @out {flags}", *words


CASES = list(table())


# ---------------------------------------------------------------------------------------------

def contents(world: Path) -> dict:
    """Every folder, and every file with its time of change."""
    found = {}
    for folder, _, files in os.walk(world):
        found[folder] = 0
        found |= {path: os.stat(path).st_mtime_ns for path in (f"{folder}/{f}" for f in files)}
    return found


def check(code, err: str, words) -> None:
    """Exit code 2 and one line; argparse may print its usage before it."""
    assert code == 2, (code, err[-2000:])
    lines = err.splitlines()
    if lines and lines[0].startswith("usage:"):
        lines = lines[-1:]
    assert len(lines) == 1 and "error: " in lines[0], err[-2000:]
    assert all(word in lines[0] for word in words), (words, lines[0])
    assert len(lines[0]) < 1000, lines[0]


def arguments(line: str, world: Path) -> list[str]:
    return [part.replace("@", f"{world}/") for part in line.split(" ") if part]


@pytest.mark.parametrize("line, words", [(line, words) for line, *words in CASES],
                         ids=[line.replace("\0", "NUL") for line, *_ in CASES])
def test_bad_input(line, words, world, monkeypatch, capsys):
    """In this process: the script itself, as python runs it."""
    script, *argv = arguments(line, world)
    shutil.rmtree(world / "out", ignore_errors=True)  # of a row that failed
    before = contents(world)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    monkeypatch.chdir(world / "cwd")
    with pytest.raises(SystemExit) as stop:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    check(stop.value.code, capsys.readouterr().err, words)
    assert contents(world) == before


@pytest.mark.parametrize("line, words", [(line, words) for line, *words in CASES[::400]])
def test_bad_input_in_a_process_of_its_own(line, words, world):
    script, *argv = arguments(line, world)
    shutil.rmtree(world / "out", ignore_errors=True)
    before = contents(world)
    done = subprocess.run([sys.executable, *program(script), *argv], cwd=world / "cwd", env=ENV,
                          capture_output=True, text=True, timeout=120)
    check(done.returncode, done.stderr, words)
    assert contents(world) == before


def test_no_pickle_ran(world):
    """After all the rows above, for which one lay ready in two places."""
    assert not (world / "marker").exists()
    pickle.loads((world / "weights-pickle" / "model.safetensors").read_bytes())
    assert (world / "marker").exists()  # it would have
    (world / "marker").rmdir()
