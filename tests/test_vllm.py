"""--rollout_url against a real vLLM on a CPU: `make test-vllm` installs it into .venv-vllm.

One server answers all tests. Its directory has a generation_config.json that would change every
answer, if a request left anything of it in force."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import ENV, ROOT, letter_queries, log, refuses, stage_args, teach

import evaluate
import grpo
import kernels
import sample
from lib.decode import Completion
from lib.vllm_client import VLLMClient, rollout_backend
from sample import generate, load_policy

VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not VLLM.exists(), reason="`make test-vllm` installs vLLM into .venv-vllm")]
QUESTIONS = ("Pick A.", "Choose A.", "Who?", "Pick A. Choose A.")
HOSTILE = {"do_sample": True, "temperature": 0.2, "top_k": 1, "top_p": 0.1, "min_p": 0.9,
           "repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": 2.0,
           "max_new_tokens": 1}


def directory(tokenizer, path, letters) -> Path:
    """A policy that says one of the letters, with an untied head and vLLM's smallest heads, 32."""
    talks = [(question, f"{letter}.") for question in QUESTIONS[:2] for letter in letters]
    teach(tokenizer, path, talks, num_attention_heads=2, num_key_value_heads=1,
          tie_word_embeddings=False)
    ends = tokenizer.encode("A") + tokenizer.encode("B")
    (path / "generation_config.json").write_text(json.dumps(HOSTILE | {"eos_token_id": ends}))
    return path


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return directory(tokenizer, tmp_path_factory.mktemp("vllm") / "policy", "AB")


@pytest.fixture(scope="module")
def url(policy):
    """The address of vLLM with the policy, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    env = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                        "HF_HUB_OFFLINE": "1", "PYTHONPATH": "",
                        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600"}
    with open(policy.parent / "vllm.log", "w+") as said:
        server = subprocess.Popen([VLLM, "serve", policy, "--host", "127.0.0.1", "--port",
                                   str(port), *flags], env=env, stdout=said, stderr=said)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                said.seek(0)
                assert server.poll() is None, said.read()[-3000:]
                time.sleep(2)
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()
        server.wait()


@pytest.fixture
def server(url, policy):
    """The address, behind which the policy is again what it was."""
    model, tokenizer = load_policy(policy, "cpu")
    VLLMClient(url, tokenizer).load(model, policy.parent / "again")
    return url


def distance(url, model, tokenizer) -> float:
    """The mean difference of log-probabilities between the server and a model."""
    client = VLLMClient(url, tokenizer)
    client.check(model)
    return client.smallest_gap


def own_logprobs(model, prompt, answer) -> list[float]:
    """As vLLM reports them: before its logit bias, so over the padded rows as well."""
    ids = torch.tensor([prompt + answer.ids])
    with torch.no_grad():
        hidden = model.hidden(ids[:, :-1])[0, len(prompt) - 1:]
        return kernels.token_logprobs(hidden, model.head_weight, ids[0, len(prompt):]).tolist()


def test_greedy_answers_are_the_same(server, policy):
    """Also the answer to an unknown question, cut at each length."""
    model, tokenizer = load_policy(policy, "cpu")
    there = rollout_backend(server, model, tokenizer)
    prompts = [tokenizer.render_prompt(question) for question in QUESTIONS]
    stops = {"stop_ids": tokenizer.stop_ids, "valid_vocab": tokenizer.n_vocab}
    for max_new_tokens in (16, 2):
        here = generate(model, prompts, max_new_tokens, 0.0, **stops)
        got = generate(there, prompts, max_new_tokens, 0.0, **stops)
        assert [(c.ids, c.finished) for c in got] == [(c.ids, c.finished) for c in here]
        for prompt, answer in zip(prompts, got, strict=True):
            own = own_logprobs(model, prompt, answer)
            assert answer.logprobs == pytest.approx(own, abs=1e-4)


def test_drawn_answers_are_the_policys(server, policy):
    """Each token has the log-probability that it has here, no padded row is drawn, and the two
    letters come about as often as the policy says: sampling was not sharpened."""
    model, tokenizer = load_policy(policy, "cpu")
    there = rollout_backend(server, model, tokenizer)
    prompt = tokenizer.render_prompt(QUESTIONS[0])
    drawn = generate(there, [prompt], 16, 1.0, seed=3, n=64, stop_ids=tokenizer.stop_ids)
    assert len({tuple(answer.ids) for answer in drawn}) > 1
    gaps = []
    for answer in drawn:
        assert max(answer.ids) < tokenizer.n_vocab
        own = own_logprobs(model, prompt, answer)
        gaps += [abs(a - b) for a, b in zip(own, answer.logprobs, strict=True)]
    assert sum(gaps) / len(gaps) < 1e-4
    again = generate(there, [prompt], 16, 1.0, seed=3, n=64, stop_ids=tokenizer.stop_ids)
    assert [answer.ids for answer in again] == [answer.ids for answer in drawn]
    letter = prompt + tokenizer.encode("A")
    p = model(torch.tensor([letter[:-1]]))[0, -1].softmax(-1)[letter[-1]].item()
    share = sum(answer.ids[0] == letter[-1] for answer in drawn) / 64
    assert abs(share - p) < 4 * (p * (1 - p) / 64) ** 0.5


def test_weights_are_read_again_whole(server, policy, tokenizer, tmp_path):
    """A, then B, then A: each time the server is the model that it was told to be, and only it."""
    a, _ = load_policy(policy, "cpu")
    b, _ = load_policy(directory(tokenizer, tmp_path / "other", "CD"), "cpu")
    for model, other in ((b, a), (a, b)):
        VLLMClient(server, tokenizer).load(model, tmp_path / "served")
        assert distance(server, model, tokenizer) < 1e-5
        refuses(lambda other=other: distance(server, other, tokenizer), "not the model")


def test_evaluation_is_the_same(server, policy, tmp_path):
    values = {"init": str(policy), "n_queries": 8, "samples": 2, "max_new_tokens": 8,
              "out": str(tmp_path)}
    here = evaluate.main(stage_args(evaluate, **values))
    there = evaluate.main(stage_args(evaluate, **values, rollout_url=server))
    assert there["greedy"] == here["greedy"]


@pytest.fixture
def online(server, policy, tmp_path):
    """Flags of a short GRPO run that samples there."""
    queries = letter_queries(tmp_path / "queries.jsonl")
    return {"init": str(policy), "queries": queries, "max_new_tokens": 8, "kl": 0.1,
            "rollout_url": server, "steps": 6, "batch_queries": 2, "lr": 1e-3, "save_every": 1,
            "out": str(tmp_path / "run")}


def test_grpo_there_is_grpo_here(online, tmp_path, monkeypatch):
    """The run without a server gets the same answers, with its own log-probabilities."""
    drawn = []
    real = VLLMClient.generate

    def recorded(client, prompts, max_new_tokens, *rest):
        answers = real(client, prompts, max_new_tokens, *rest)
        if max_new_tokens == online["max_new_tokens"]:  # not of a check
            drawn.append(answers)
        return answers

    def replayed(model, prompts, *args, n, **kwargs):
        out = []
        for i, answer in enumerate(drawn.pop(0)):
            own = own_logprobs(model, prompts[i // n], answer)
            out.append(Completion(answer.ids, own, answer.finished))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(VLLMClient, "generate", recorded)
        grpo.main(stage_args(grpo, **online))
    there = log(tmp_path / "run")
    monkeypatch.setattr(sample, "generate", replayed)
    grpo.main(stage_args(grpo, **online | {"rollout_url": "", "out": str(tmp_path / "here")}))
    here = log(tmp_path / "here")
    assert len(there) == 6 and not drawn
    for a, b in zip(there, here, strict=True):
        # The gap itself is the padded rows' share, which training leaves out.
        assert a["logprob_gap"] == pytest.approx(b["logprob_gap"], abs=1e-5)
        assert a["reward"] == b["reward"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-5)
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-5)
    assert any(row["grad_norm"] for row in there)


def test_grpo_goes_on_after_a_kill(online, tmp_path):
    """SIGKILL after the first saved steps; the server has later weights than the state."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--device", "cpu", "--dtype", "float32"]
    for name, value in online.items():
        command += [f"--{name}", str(value)]
    run = subprocess.Popen(command, env=ENV)
    file = tmp_path / "run" / "log.jsonl"
    while not file.exists() or file.read_text().count("\n") < 3:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    subprocess.run([*command, "--resume"], env=ENV, check=True)
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["logprob_gap"] < 1e-3 for row in rows)
