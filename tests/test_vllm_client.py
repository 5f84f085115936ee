"""--rollout_url against a small server that speaks vLLM's /v1/completions and answers by our own
sample.generate: the stages get from it what they get without it, and from a broken one an error."""
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import interrupt_at, letter_queries, log, refuses, stage_args, teach, teach_letters

import dpo
import evaluate
import grpo
import reward
import tasks.__main__
import tasks.benchmarks
import tasks.queries
import sample
from model import Qwen2
from sample import generate, load_policy
from lib.lora import adapters, add_lora
from lib.vllm_client import VLLMClient, rollout_backend, untied

NAN = float("nan")
PROMPTS = [{"prompt": q} for q in ("Pick A.", "Choose A.", "Who?", "Pick A. Choose A.")]


class Peer:
    """A server in a thread. `spoil` changes its answers, `asked` is what it was asked, `keys` what
    it was sent to open it, `loaded` how often it read weights."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.asked, self.loaded = model, tokenizer, [], 0
        self.keys = set()
        self.spoil, self.lock = lambda reply: reply, threading.Lock()
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.path == "/v1/models"
                self.send({"data": [{"id": "the-model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                peer.keys.add(self.headers["Authorization"])
                with peer.lock:
                    if self.path == "/v1/completions":
                        peer.asked.append(body)
                        return self.send(peer.complete(body))
                    if self.path == "/collective_rpc":
                        assert body["method"] == "reload_weights" and len(body) == 2
                        peer.reload(**body["kwargs"])
                        return self.send({"results": [None]})
                    assert self.path == "/reset_prefix_cache" and body == {}
                    self.send({"success": True})

            def send(self, reply):
                reply = peer.spoil(reply)
                status, reply = reply if isinstance(reply, tuple) else (200, reply)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) + 9 * (reply == b"cut")))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass
        ThreadingHTTPServer.handle_error = lambda *args: None  # of a client that gave up
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reload(self, weights_path):
        self.model, self.loaded = Qwen2.from_pretrained(weights_path), self.loaded + 1

    def complete(self, body) -> dict:
        assert body["model"] == "the-model" and body["return_token_ids"] and body["logprobs"] == 0
        padding = {str(i): -100 for i in range(600, 640)}
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
                 "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True,
                 "logit_bias": padding}
        assert plain.items() <= body.items() and body["seed"] >= 0
        done = generate(self.model, [body["prompt"]], body["max_tokens"], body["temperature"],
                        seed=body["seed"], stop_ids=body["stop_token_ids"], n=body["n"],
                        valid_vocab=self.tokenizer.n_vocab)
        return {"choices": [  # in any order
            {"index": i, "token_ids": c.ids, "logprobs": {"token_logprobs": c.logprobs},
             "finish_reason": "stop" if c.finished else "length"}
            for i, c in reversed(list(enumerate(done)))]}


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return teach_letters(tokenizer, tmp_path_factory.mktemp("served") / "policy")


@pytest.fixture
def peer(policy):
    peer = Peer(*load_policy(policy, "cpu"))
    yield peer
    peer.http.shutdown()
    peer.http.server_close()


def test_ids_logprobs_and_order_are_those_of_local_sampling(policy, peer):
    model, tokenizer = load_policy(policy, "cpu")
    there = rollout_backend(peer.url, model, tokenizer)
    assert rollout_backend("", model, tokenizer) is model and isinstance(there, VLLMClient)
    prompts = [tokenizer.render_prompt(query["prompt"]) for query in PROMPTS]
    stops = {"stop_ids": tokenizer.stop_ids, "valid_vocab": tokenizer.n_vocab}
    for max_new_tokens in (12, 2):  # 2: cut
        here = generate(model, prompts, max_new_tokens, 0.0, **stops)
        got = generate(there, prompts, max_new_tokens, 0.0, **stops)
        assert [(c.ids, c.finished) for c in got] == [(c.ids, c.finished) for c in here]
        for a, b in zip(got, here, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    # Drawn: n of each prompt in its order, each request with seeds of its own.
    peer.asked.clear()
    drawn = generate(there, prompts, 12, 1.0, seed=5, n=3, **stops)
    seeds = {tuple(body["prompt"]): body["seed"] for body in peer.asked}
    assert sorted(seeds.values()) == [3 * (5 * 1_000_003 + i) for i in range(4)]
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 12, 1.0, seed=seeds[tuple(prompt)], n=3, **stops)
        assert [c.ids for c in drawn[3 * i:3 * i + 3]] == [c.ids for c in alone]


def test_evaluation_is_the_same(policy, peer, tmp_path):
    """Greedy answers and scores, in a chat and after a worked example."""
    for shots in (0, 1):
        values = {"init": str(policy), "n_queries": 8, "samples": 2, "max_new_tokens": 8,
                  "few_shot": shots, "out": str(tmp_path)}
        here = evaluate.main(stage_args(evaluate, **values))
        rows = (tmp_path / "eval_samples.jsonl").read_text().splitlines()
        peer.asked.clear()
        there = evaluate.main(stage_args(evaluate, **values, rollout_url=peer.url))
        assert there["greedy"] == here["greedy"] and len(peer.asked) == 1 + 8 + 8
        again = (tmp_path / "eval_samples.jsonl").read_text().splitlines()
        for a, b in zip(rows, again, strict=True):
            assert json.loads(a)["greedy"] == json.loads(b)["greedy"]


@pytest.fixture
def few(policy, peer, tmp_path, monkeypatch):
    """Flags of a short run that samples there; the look at samples that ends it is at few too."""
    queries = letter_queries(tmp_path / "queries.jsonl")
    rows = tasks.benchmarks.load_file(queries)
    monkeypatch.setattr(tasks.queries, "builtin", lambda *args: rows)
    return {"init": str(policy), "queries": queries, "max_new_tokens": 8, "rollout_url": peer.url,
            "batch_size": 2, "save_every": 1, "epochs": 3.0}


@pytest.mark.parametrize("stage, values, requests, checks", [
    (dpo, {"responses": 16}, 2, 1),
    (reward, {"responses": 16, "temperatures": "0.5,1"}, 8, 2)])  # and as many held-out queries
def test_the_stages_sample_there(stage, values, requests, checks, few, peer, tmp_path):
    """All answers of the fixed policy come from the server, and nothing else does: the model that
    was trained is not there."""
    stage.main(stage_args(stage, **few, **values, out=str(tmp_path / "run")))
    assert sorted(body["n"] for body in peer.asked) == [8] * checks + [16] * requests
    assert len(log(tmp_path / "run")) >= 3


def test_rejection_sampling_samples_there(few, peer, tmp_path):
    """All answers come from the server, and what passes is kept."""
    path = tmp_path / "passed.jsonl"
    tasks.__main__.rejection(stage_args(
        tasks.__main__, init=few["init"], queries=few["queries"], rollout_url=peer.url,
        responses=16, max_new_tokens=8, out=str(path)))
    assert sorted(body["n"] for body in peer.asked) == [8] + [16] * 2
    answers = [json.loads(row)["messages"][1]["content"] for row in path.read_text().splitlines()]
    assert {"A."} <= set(answers) and all("A" in text for text in answers)


@pytest.mark.parametrize("stage", [dpo, reward])
def test_a_resumed_run_has_the_pairs_that_it_had(stage, few, peer, tmp_path, monkeypatch):
    """A server answers otherwise the second time; so a run that goes on does not ask for them."""
    args = stage_args(stage, **few, responses=16, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, stage, 3)
        stage.main(args)
    pairs = (tmp_path / "run" / "pairs.jsonl").read_text()
    asked = len(peer.asked)
    peer.complete = lambda body, real=peer.complete: real(body | {"seed": body["seed"] + 1})
    stage.main(replace(args, resume=True))
    assert (tmp_path / "run" / "pairs.jsonl").read_text() == pairs
    # The reward model's held-out pairs are drawn again: nothing is learned from them.
    assert len(peer.asked) == asked + (0 if stage is dpo else 1 + 2 * 2)


def one_by_one(model, prompts, *args, seed, n, **kwargs):
    """sample.generate with the seeds that a server gets."""
    return [c for i, p in enumerate(prompts)
            for c in generate(model, [p], *args, seed=(seed * 1_000_003 + i) * n, n=n, **kwargs)]


@pytest.fixture
def online(few, tmp_path):
    """Flags of a short GRPO run that samples there."""
    return {"init": few["init"], "queries": few["queries"], "max_new_tokens": 8, "kl": 0.1,
            "rollout_url": few["rollout_url"], "steps": 4, "batch_queries": 2, "lr": 1e-3,
            "save_every": 1, "out": str(tmp_path / "run")}


def test_grpo_there_is_grpo_here(online, peer, tmp_path, monkeypatch):
    """Each step is answered by the policy of that step, so all that follows is the same: the logs
    of a run here, and of one that is stopped and goes on while the server has later weights."""
    grpo.main(stage_args(grpo, **online))
    there = log(tmp_path / "run")
    assert peer.loaded == 1 + 4
    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", one_by_one)
        grpo.main(stage_args(grpo, **online | {"rollout_url": "", "out": str(tmp_path / "here")}))
    again = stage_args(grpo, **online | {"out": str(tmp_path / "again")})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, grpo, 3)
        grpo.main(again)
    grpo.main(replace(again, resume=True))
    for other in (log(tmp_path / "here"), log(tmp_path / "again")):
        assert len(other) == 4 and all(row["logprob_gap"] < 1e-5 for row in other)
        for a, b in zip(there, other, strict=True):
            assert a["completions"] == b["completions"]
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["grad_norm"]


def test_grpo_sees_a_server_that_keeps_old_weights(online, peer, tmp_path):
    """By how it differs from the policy here, and that it says so itself is not needed."""
    peer.reload = lambda weights_path: None
    refuses(lambda: grpo.main(stage_args(grpo, **online | {"lr": 0.1, "warmup": 0, "steps": 20})),
            "not the model", f"serve {tmp_path / 'run' / 'served'}")
    assert 1 <= len(log(tmp_path / "run")) < 20


@pytest.mark.parametrize("spoil, words, written", [
    (lambda reply: (404, {"detail": "Not Found"}) if "success" in reply else reply,
     ["reset_prefix_cache", "404", "VLLM_SERVER_DEV_MODE=1"], False),  # no development mode
    (lambda reply: {"success": False} if "success" in reply else reply, ["prefix cache"], False),
    (lambda reply: (500, {}) if "results" in reply else reply,
     ["collective_rpc", "500", "same path"], True),
    (lambda reply: {} if "results" in reply else reply, ["KeyError", "results"], True)])
def test_a_server_that_cannot_load_is_told_in_one_line(spoil, words, written, online, peer,
                                                       tmp_path):
    peer.spoil = spoil
    refuses(lambda: grpo.main(stage_args(grpo, **online)), "--rollout_url", *words)
    assert (tmp_path / "run").exists() == written
    refuses(lambda: grpo.main(stage_args(grpo, **online, temperature=0.7)), "--temperature 1")


def edit(change):
    """A reply in which `change` was applied to the first choice."""
    def spoil(reply):
        if "choices" in reply:
            change(reply["choices"][0])
        return reply
    return spoil


def lower(reply, by):
    """A reply in which every log-probability is lower."""
    for choice in reply.get("choices", []):
        logprobs = choice["logprobs"]["token_logprobs"]
        choice["logprobs"]["token_logprobs"] = [logprob - by for logprob in logprobs]
    return reply


BROKEN = [
    ("an error", lambda reply: (500, {"error": {"message": "out of\nmemory"}}),
     ["500", "out of"]),
    ("refused", lambda reply: (400, b"\xff" * 2000), ["400"]),
    ("no JSON", lambda reply: b"<html>", ["JSONDecodeError"]),
    ("not UTF-8", lambda reply: b"\xff\xfe\x00", ["models"]),
    ("nested", lambda reply: b"[" * 100_000, ["RecursionError"]),
    ("empty", lambda reply: b"", ["JSONDecodeError"]),
    ("cut off", lambda reply: b"cut", ["IncompleteRead"]),
    ("an error cut off", lambda reply: (503, b"cut"), ["503"]),
    ("a list", lambda reply: [], ["TypeError"]),
    ("no models", lambda reply: {"data": []}, ["IndexError"]),
    ("no choices", lambda reply: reply if "data" in reply else {"choices": None}, ["TypeError"]),
    ("fewer answers", lambda reply: reply if "data" in reply else {"choices": []}, ["0 answers"]),
    ("no ids", edit(lambda choice: choice.pop("token_ids")), ["KeyError", "token_ids"]),
    ("no ids at all", edit(lambda choice: choice.update(token_ids=[])), ["IndexError"]),
    ("words", edit(lambda choice: choice.update(token_ids=["a"])), ["TypeError"]),
    ("huge", edit(lambda choice: choice.update(token_ids=[2**70])), ["OverflowError"]),
    ("null", edit(lambda choice: choice["logprobs"].update(token_logprobs=[None])), ["TypeError"]),
    ("no logprobs", edit(lambda choice: choice.update(logprobs=None)), ["TypeError"]),
    ("no number", edit(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, NAN)),
     ["not all log-probabilities finite"]),
    ("another vocabulary", edit(lambda choice: choice["token_ids"].__setitem__(0, 605)),
     ["605", "tokenizer"]),
    ("another length", edit(lambda choice: choice["token_ids"].insert(0, 5)), ["tokenizer"]),
    ("another end", edit(lambda choice: (choice["token_ids"].pop(),
                                         choice["logprobs"]["token_logprobs"].pop())),
     ["tokenizer", "stop"]),
    ("an end within", edit(lambda choice: (
        choice["token_ids"].insert(0, choice["token_ids"][-1]),
        choice["logprobs"]["token_logprobs"].insert(0, -1.0))), ["tokenizer"]),
    ("other weights", lambda reply: lower(reply, 0.3), ["not the model", "0.3"]),
    ("weights of some steps ago", lambda reply: lower(reply, 0.101), ["not the model", "0.1"])]


@pytest.mark.parametrize("name, spoil, words", BROKEN, ids=[name for name, *_ in BROKEN])
def test_a_broken_server_is_told_in_one_line(name, spoil, words, policy, peer):
    peer.spoil = spoil
    refuses(lambda: rollout_backend(peer.url, *load_policy(policy, "cpu")), "--rollout_url", *words)


def test_a_server_that_is_late_gone_or_another(policy, peer, tokenizer, tmp_path, monkeypatch):
    model, _ = load_policy(policy, "cpu")
    other, _ = load_policy(teach(tokenizer, tmp_path / "other", [("Who are you?", "B. C.")]), "cpu")
    refuses(lambda: rollout_backend(peer.url, other, tokenizer), "the-model", "not the model")
    there = rollout_backend(peer.url, model, tokenizer)
    monkeypatch.setattr(VLLMClient, "timeout", 0.2)
    peer.spoil = lambda reply: time.sleep(1) or reply
    refuses(lambda: generate(there, [[5]], 8, 0.0), "--rollout_url", "timed out")
    peer.http.shutdown()
    peer.http.server_close()
    refuses(lambda: generate(there, [[5]], 8, 0.0), "--rollout_url", "refused")
    for url in ("localhost:8000", "file:///etc", ""):
        refuses(lambda url=url: VLLMClient(url, tokenizer), "http://HOST:PORT/v1")


def test_a_server_that_was_nearer_before_is_refused(policy, peer, tokenizer):
    """0.02 per token may be bfloat16's rounding, but not behind a server that was 0.001 away."""
    model, _ = load_policy(policy, "cpu")
    there = VLLMClient(peer.url, tokenizer)
    for by, near in ((0.02, True), (0.07, True), (0.0005, True), (0.0015, True), (0.0025, False),
                     (0.02, False)):
        peer.spoil = lambda reply, by=by: lower(reply, by)
        if near:
            there.check(model)
        else:
            refuses(lambda: there.check(model), "not the model")
    for by in (0.0, 0.0009):  # without any rounding, 0.001 is allowed
        peer.spoil = lambda reply, by=by: lower(reply, by)
        there.check(model)


def test_the_directory_for_the_server_has_a_head_of_its_own(policy, peer, tokenizer, tmp_path):
    """vLLM on a CPU does not see the head of tied embeddings change; what it reads is a whole model
    that it can be started from."""
    model, _ = load_policy(policy, "cpu")
    VLLMClient(peer.url, tokenizer).load(model, tmp_path / "served")
    served, its_tokenizer = load_policy(tmp_path / "served", "cpu")
    assert model.config.tie_word_embeddings and not served.config.tie_word_embeddings
    assert its_tokenizer.n_vocab == tokenizer.n_vocab
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids), served(ids))
    add_lora(model, 4, 32.0)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.B)
    assert torch.equal(model(ids), untied(model)(ids)) and not torch.equal(model(ids), served(ids))


def test_a_key_comes_from_the_environment(policy, peer, tokenizer, monkeypatch):
    """Where OpenAI's clients look for it; a server that wants one says 401."""
    monkeypatch.setattr(peer, "spoil", lambda reply: (401, {"error": "Unauthorized"}))
    refuses(lambda: VLLMClient(peer.url, tokenizer), "401", "OPENAI_API_KEY")
    monkeypatch.setattr(peer, "spoil", lambda reply: reply)
    model, _ = load_policy(policy, "cpu")
    for key, sent in ((None, None), ("secret", "Bearer secret")):
        if key is not None:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        peer.keys.clear()
        rollout_backend(peer.url, model, tokenizer)
        assert peer.keys == {sent}


def test_a_frozen_server_is_asked_no_more(policy, tokenizer, monkeypatch):
    """Of 200 prompts 64 wait for their timeout; the others are never sent."""
    asked = []

    class Frozen(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(1)
            time.sleep(1)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    http = Server(("127.0.0.1", 0), Frozen)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(VLLMClient, "ask", lambda client, path, body, read, real=VLLMClient.ask: (
        "name" if body is None else real(client, path, body, read)))
    monkeypatch.setattr(VLLMClient, "timeout", 0.5)
    there = VLLMClient(f"http://127.0.0.1:{http.server_port}/v1", tokenizer)
    refuses(lambda: generate(there, [[5]] * 200, 8, 0.0), "timed out")
    assert len(asked) <= 64
    http.shutdown()
    http.server_close()


def test_a_server_that_drips_has_a_deadline(policy, peer, tokenizer, monkeypatch):
    """Each byte comes in time, the whole reply never would."""
    class Drip(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                time.sleep(0.05)
                self.wfile.write(b" ")

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(VLLMClient, "timeout", 0.5)
    refuses(lambda: VLLMClient(f"http://127.0.0.1:{http.server_port}/v1", tokenizer),
            "no whole reply within 0.5 seconds")
    http.shutdown()
    http.server_close()


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(policy, peer, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert rollout_backend(peer.url, *load_policy(policy, "cpu")).name == "the-model"


def test_where_a_server_makes_no_sense_it_is_refused(policy, tmp_path):
    url = {"init": str(policy), "rollout_url": "http://127.0.0.1:9/v1"}
    refuses(lambda: dpo.main(stage_args(dpo, **url, out=str(tmp_path / "a"), data="x")), "take one")
    refuses(lambda: reward.main(stage_args(reward, **url, out=str(tmp_path / "a"),
                                           policies="a,b")), "one for each")
    refuses(lambda: evaluate.main(stage_args(evaluate, **url, yarn=4.0)), "of the server")
    refuses(lambda: evaluate.main(stage_args(evaluate, **url)), "models", "refused")
