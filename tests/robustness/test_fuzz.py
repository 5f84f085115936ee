"""Thousands of made-up and damaged inputs (hypothesis): what reads them must read them right or say
InputError. FUZZ=20 tries twenty times as many. Skipped without hypothesis (make test-parity
installs it)."""
import json
import os
import shutil
import time

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st  # noqa: E402

from tasks import benchmarks  # noqa: E402
from tasks import math_answers  # noqa: E402
from lib import files  # noqa: E402
from lib import optim  # noqa: E402
from lib.args import InputError  # noqa: E402
from model import Qwen2  # noqa: E402
from data.pairs import PairFile  # noqa: E402
from sft import Conversations  # noqa: E402
from tokenizer import CONTROL_TOKENS, Tokenizer, clean_text  # noqa: E402

MORE = int(os.environ.get("FUZZ", "1"))


def cases(n):
    """n times FUZZ cases, the same ones in every run."""
    return settings(max_examples=n * MORE, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


# Text as a user may write it: any characters, lone surrogates, and what looks like control tokens.
pieces = st.one_of(st.text(), st.sampled_from([*CONTROL_TOKENS, "<|", "|>", "\n\n", " " * 99, "\r",
                                               "\0", "e\u0301", "\ud800", "assistant\n"]))
texts = st.lists(pieces, max_size=8).map("".join)


@cases(150)
@given(texts)
def test_text_comes_back_and_never_holds_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == clean_text(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == clean_text(text)


@cases(100)
@given(st.binary(max_size=60))
def test_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def turns(roles):
    return st.builds(lambda role, content: {"role": role, "content": content},
                     st.sampled_from(roles), texts)


@cases(100)
@given(st.lists(turns(["user", "assistant", "tool"]), min_size=1, max_size=5))
def test_a_chat_has_the_turns_it_was_given(tokenizer, messages):
    """Whatever the contents say, there are as many turns as messages (one more: the system's; tool
    results in a row share one), and the mask is what the assistant says with its end."""
    ids, mask = tokenizer.render(messages)
    roles = ["system", *("user" if m["role"] == "tool" else m["role"] for m in messages)]
    shared = sum(a["role"] == b["role"] == "tool"
                 for a, b in zip(messages, messages[1:], strict=False))
    for token in (tokenizer.im_start_id, tokenizer.im_end_id):
        assert ids.count(token) == len(roles) - shared
    said = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(said) == "".join(
        clean_text(m["content"]) + "<|im_end|>" for m in messages if m["role"] == "assistant")


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from(["role", "content", "name", "arguments", "function", "x",
                                           "kind", "answer", "tests", "language"]), inner,
                          max_size=4),
                      max_leaves=6)
rows = st.fixed_dictionaries({}, optional=dict.fromkeys(
    ["messages", "prompt", "chosen", "rejected", "check", "domain", "question", "answer", "problem",
     "solution", "text", "code", "test_list", "test", "entry_point", "instruction_id_list",
     "kwargs"], values))


@cases(150)
@given(st.lists(values, min_size=1, max_size=3))
def test_messages_of_any_shape(tokenizer, tmp_path_factory, messages):
    path = tmp_path_factory.getbasetemp() / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    try:
        Conversations(path, tokenizer, 512)
    except InputError as error:
        assert "\n" not in str(error) and "chats.jsonl:1" in str(error)


@cases(200)
@given(st.lists(rows, max_size=3), st.booleans())
def test_rows_of_any_shape(tmp_path_factory, lines, damage):
    """Queries and pairs: what is read has the fields that the stages use."""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = "\n".join(map(json.dumps, lines))
    path.write_text(text[:-3] if damage else text)
    for read in (benchmarks.load_file, PairFile):
        try:
            for row in read(path):
                assert row["prompt"] and isinstance(row["prompt"], (str, list))
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@cases(100)
@given(st.binary(max_size=200), st.booleans())
def test_files_of_any_bytes(tmp_path_factory, data, packed):
    path = tmp_path_factory.getbasetemp() / f"bytes.jsonl{'.gz' * packed}"
    path.write_bytes(data)
    for read in (lambda: list(files.read_jsonl(path)), lambda: files.read_json(path)):
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@cases(200)
@given(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json"]), st.data())
def test_a_damaged_model_directory(micro_run, tmp_path_factory, name, data):
    """Bytes changed, cut out or put in: it loads with the right shapes, or it is refused."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    if not path.exists():
        shutil.copytree(micro_run, path)
    good = (micro_run / name).read_bytes()
    # In the weights themselves every byte is as good as another: damage the header.
    at = data.draw(st.integers(0, min(len(good), 3000)))
    removed = data.draw(st.sampled_from([0, 1, 5, 10**9]))
    bad = good[:at] + data.draw(st.binary(max_size=6)) + good[at + removed:]
    (path / name).write_bytes(bad)
    try:
        model, tokenizer = Qwen2.from_pretrained(path), Tokenizer.from_pretrained(path)
        assert model.model.embed_tokens.weight.shape[1] == model.config.hidden_size
        assert tokenizer.decode(tokenizer.encode("abc")) is not None
    except InputError as error:
        assert "\n" not in str(error), str(error)
    finally:
        (path / name).write_bytes(good)


formulas = st.one_of(texts, st.lists(st.sampled_from(
    list(r"0123456789+-*/^_=(){}[],.;:|!<>%$&~ xyzei") + [
        r"\frac", r"\sqrt", r"\pi", r"\text", r"\boxed", r"\left", r"\right", r"\cup", r"\infty",
        r"\pm", r"\cdot", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "**", "10^9", "9" * 50]),
    max_size=14).map("".join))


@cases(200)
@given(formulas, formulas)
def test_any_two_answers_are_compared(a, b):
    """Never an error, never a long thought; the order does not matter; like is like."""
    started = time.process_time()
    assert math_answers.math_equal(a, b) == math_answers.math_equal(b, a)
    assert math_answers.math_equal(a, a) or not math_answers.normal_text(a)  # blank is no answer
    math_answers.extract_answer(a)
    assert time.process_time() - started < 2


@cases(60)
@given(st.lists(st.lists(st.integers(0, 599), max_size=20), min_size=1, max_size=3))
def test_any_ids_decode(tokenizer, rows):
    for ids in rows:
        assert isinstance(tokenizer.decode(ids), str)
    assert torch.equal(optim.pad_rows([*rows, [1]], 0) != 0,
                       optim.pad_rows([[int(i != 0) for i in r] for r in [*rows, [1]]], 0) == 1)
