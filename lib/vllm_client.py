"""Sample on a server: --rollout_url of sft.py, dpo.py, reward.py, grpo.py and evaluate.py.

Any server with OpenAI's protocol and vLLM's token ids will do; recipes/multi_gpu.md says how to
start one. For GRPO it must also read new weights at every step, and we check each time that it did.
"""
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import kernels
from lib.args import InputError, require
from lib.decode import Completion
from lib.dist import RANK, all_gather
from lib.lora import merged_state_dict
from model import Qwen2
from tokenizer import Tokenizer

MAX_GAP = 0.1  # mean |difference| of log-probabilities, nats per token
# What to do about an HTTP error: (path, status) -> advice.
ADVICE = {
    ("v1/models", 401): "; set OPENAI_API_KEY to the server's key",
    ("reset_prefix_cache", 404): "; start the server with VLLM_SERVER_DEV_MODE=1",
    ("collective_rpc", 500): "; the server must see --out under the same path as we do; start it "
                             "again, for it may be gone now",
}


class VLLMClient:
    """The same model behind a server, such as `vllm serve DIR` of vLLM 0.10.2 or later, which on a
    GPU answers far more requests per second than sample.py's loop. Ids go out and ids come back:
    text would be tokenised again, and not always into the same ids."""
    timeout = 600  # seconds for one prompt's answers, among all the others

    def __init__(self, url: str, tokenizer: Tokenizer | None, flag: str = "--rollout_url"):
        self.flag = flag
        require(url.startswith(("http://", "https://")),
                f"{self.flag} must be http://HOST:PORT/v1, got {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        # A server on this machine is not behind the http_proxy of the environment.
        is_local = re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/|$)", url)
        handlers = [urllib.request.ProxyHandler({})] if is_local else []
        self.opener = urllib.request.build_opener(*handlers)
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.tokenizer = tokenizer
        self.smallest_gap = math.inf  # of all checks
        self.logit_bias = {}
        self.name = self.ask("v1/models", None, lambda reply: reply["data"][0]["id"])

    def check(self, model: Qwen2, advice: str = "") -> None:
        """Raise an InputError if the server has other weights than `model`, which its
        log-probabilities of eight drawn answers show.

        Rounding to bfloat16 changes them by about 0.02 per token. A server that was near before
        must stay near: 4 times its smallest gap, or 0.001, is a server that kept old weights."""
        # A server would draw the padded rows of the vocabulary too, which no token owns.
        padding = range(self.tokenizer.n_vocab, model.config.vocab_size)
        self.logit_bias = {str(i): -100 for i in padding}
        prompt = self.tokenizer.render_prompt("Who are you?")
        gaps = []
        for answer in self.generate([prompt], 16, 1.0, 0, self.tokenizer.stop_ids, 8):
            ids = torch.tensor([prompt + answer.ids], device=model.head_weight.device)
            with torch.no_grad():
                hidden = model.hidden(ids[:, :-1])[0, len(prompt) - 1:]   # predicts the answer
                own = kernels.token_logprobs(hidden, model.head_weight, ids[0, len(prompt):])
            theirs = torch.tensor(answer.logprobs, device=own.device)
            gaps.append((own - theirs).abs())
        gap = torch.cat(gaps).mean().item()
        limit = min(MAX_GAP, max(4 * self.smallest_gap, 1e-3))
        require(gap < limit, f"--rollout_url {self.url} serves {self.name}, which is not the model "
                f"here: log-probabilities differ by {gap:.2g} per token{advice}")
        self.smallest_gap = min(gap, self.smallest_gap)

    def load(self, model: Qwen2, path: Path) -> None:
        """Answer with this model from now on. We write its weights to `path`; the server reads them
        there and forgets its keys and values of earlier weights. Both calls belong to vLLM's
        development mode (VLLM_SERVER_DEV_MODE=1)."""
        tied = model.config.tie_word_embeddings
        if RANK == 0:
            self.forget()  # first: without the development mode nothing is written
            served = untied(model) if tied else model
            served.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}}
            self.ask("collective_rpc", body, lambda reply: reply["results"])
            self.forget()
        all_gather(None)  # the other processes wait
        advice = ""
        if tied:
            advice = (f"; on a CPU, vLLM keeps the first head of tied embeddings: serve {path}, "
                      "where the head is apart")
        self.check(model, advice)

    def forget(self) -> None:
        """Empty the server's cache of keys and values."""
        done = self.ask("reset_prefix_cache", {}, lambda reply: reply["success"])
        require(done is True, f"--rollout_url {self.url}: it keeps its prefix cache; do others "
                "ask it as well?")

    def ask(self, path: str, body: dict | None, read):
        """Send one request (a GET if there is no body) and return read(the JSON of the reply).
        InputError, in one line, for a server that is gone or late or replies something else."""
        try:
            return read(self.request(path, body))
        except InputError:
            raise
        except (OSError, http.client.HTTPException) as error:  # gone, late, cut off, 4xx, 5xx
            reason = str(error)
        except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
            reason = f"the reply has another form ({type(error).__name__}: {error})"
        reason = " ".join(reason.split())
        raise InputError(f"{self.flag} {self.url}/{path}: {reason}")

    def request(self, path: str, body: dict | None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        if self.key:  # for this server alone
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        deadline = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                content = b""
                while part := reply.read1(2**20):
                    content += part
                    if time.monotonic() > deadline:  # a server may also drip a byte per second
                        raise TimeoutError(f"no whole reply within {self.timeout} seconds")
                if reply.length:  # so many bytes are missing
                    raise http.client.IncompleteRead(content, reply.length)
                return json.loads(content)
        except urllib.error.HTTPError as error:
            text = error.read(300).decode("utf-8", "replace")  # says more than the status
            raise OSError(f"{error}: {text}{ADVICE.get((path, error.code), '')}") from None

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int,
                 stop_ids, n: int) -> list[Completion]:
        """Return what sample.generate would: n completions per prompt, in the order of prompts."""
        # A server would take whatever is not set here from the model's generation_config.json, such
        # as Qwen2.5's top_k 20 and repetition penalty, or an end of its own (ignore_eos: only ours
        # count). But the answers must be the policy's.
        # vLLM's log-probabilities are those of temperature 1, and only for `check`.
        body = {"model": self.name, "max_tokens": max_new_tokens, "temperature": temperature,
                "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": n, "ignore_eos": True,
                "stop_token_ids": list(stop_ids), "logit_bias": self.logit_bias, "logprobs": 0,
                "return_token_ids": True}
        failed = threading.Event()

        def read(reply) -> list[Completion]:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            completions = [self.parse(choice, max_new_tokens, stop_ids) for choice in choices]
            require(len(completions) == n,
                    f"--rollout_url {self.url}: {len(completions)} answers, not {n}")
            return completions

        def answer(i: int) -> list[Completion]:
            if failed.is_set():  # a frozen server would let each request wait for its timeout
                return []
            # vLLM counts up from a request's seed, so that each of the n has its own. Those of the
            # next seed, as in GRPO's next step, begin a million prompts further on. vLLM's seeds
            # end at 2**63, and -1 would be none.
            first_seed = (seed * 1_000_003 + i) * n % 2**62
            request = body | {"prompt": prompts[i], "seed": first_seed}
            try:
                return self.ask("v1/completions", request, read)
            except InputError:
                failed.set()
                raise

        completions = []
        with ThreadPoolExecutor(64) as pool:  # the server batches what comes at the same time
            for group in pool.map(answer, range(len(prompts))):
                completions += group
        return completions

    def parse(self, choice: dict, max_new_tokens: int, stop_ids) -> Completion:
        """Read one answer; InputError if this tokenizer cannot have written it."""
        ids = array("q", choice["token_ids"]).tolist()  # TypeError unless all are integers
        logprobs = array("d", choice["logprobs"]["token_logprobs"]).tolist()
        finished = ids[-1] in stop_ids
        known = min(ids) >= 0 and max(ids) < self.tokenizer.n_vocab
        measured = all(math.isfinite(logprob) for logprob in logprobs)
        stops_early = len(set(ids[:-1]) & set(stop_ids)) > 0
        complete = finished or len(ids) == max_new_tokens
        require(known and measured and complete and not stops_early and len(ids) == len(logprobs),
                f"--rollout_url {self.url}: an answer that cannot be this tokenizer's: {len(ids)} "
                f"ids, among them {max(ids)}, the last {ids[-1]}, {choice.get('finish_reason')}, "
                f"{'all' if measured else 'not all'} log-probabilities finite")
        return Completion(ids, logprobs, finished)


def untied(model: Qwen2) -> Qwen2:
    """Return a model of tied embeddings with a copy of them as its head."""
    with torch.device("meta"):
        copy = Qwen2(replace(model.config, tie_word_embeddings=False))
    head = {"lm_head.weight": model.head_weight.detach().clone()}
    weights = merged_state_dict(model) | head
    copy.load_state_dict(weights, assign=True)
    return copy


def rollout_backend(url: str, model, tokenizer):
    """Return what samples: the model here or, with a --rollout_url, a server that has the same."""
    if not url:
        return model
    server = VLLMClient(url, tokenizer)
    server.check(model)
    return server
