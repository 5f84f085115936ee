"""Sample on a server: --rollout_url of sft.py, dpo.py, reward.py, grpo.py and evaluate.py.

Any server with OpenAI's protocol and vLLM's token ids will do; recipes/multi_gpu.md says how to
start one. For GRPO it must also read new weights at every step, and we check each time that it did.
"""
import http.client
import json
import math
import os
import time
import urllib.parse
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import kernels
from lib.args import InputError, require
from lib.decode import Completion
from lib.dist import RANK, all_gather
from lib.files import disk_errors
from model import Qwen2
from tokenizer import Tokenizer


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
        is_local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        handlers = [urllib.request.ProxyHandler({})] if is_local else []
        self.opener = urllib.request.build_opener(*handlers)
        self.tokenizer = tokenizer
        self.name = self.ask("v1/models", None, lambda reply: reply["data"][0]["id"])

    def check(self, model: Qwen2) -> None:
        """Raise an InputError if the server has other weights than `model`, which its
        log-probabilities of an answer show. Rounding to bfloat16 changes them by about 0.02 per
        token; a checkpoint that is only a few steps away cannot be told apart."""
        prompt = self.tokenizer.render_prompt("Who are you?")
        answer = self.generate([prompt], 16, 0.0, 0, self.tokenizer.stop_ids, 1)[0]
        ids = torch.tensor([prompt + answer.ids], device=model.head_weight.device)
        with torch.no_grad():
            hidden = model.hidden(ids[:, :-1])[0, len(prompt) - 1:]   # predicts the answer's ids
            own = kernels.token_logprobs(hidden, model.head_weight, ids[0, len(prompt):])
        theirs = torch.tensor(answer.logprobs, device=own.device)
        gap = (own - theirs).abs().mean().item()
        require(gap < 0.2, f"--rollout_url {self.url} serves {self.name}, which is not the model "
                f"here: log-probabilities differ by {gap:.2g} per token")

    def load(self, model: Qwen2, path: Path) -> None:
        """Answer with this model from now on. We write its weights to `path`; the server reads them
        there and forgets its keys and values of earlier weights. Both calls belong to vLLM's
        development mode (VLLM_SERVER_DEV_MODE=1)."""
        if RANK == 0:
            self.forget()  # first: without the development mode nothing is written
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
                model.save_pretrained(path)
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}}
            self.ask("collective_rpc", body, lambda reply: reply["results"])
            self.forget()
        all_gather(None)  # the other processes wait
        self.check(model)

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
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
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
            raise OSError(f"{error}: {text}") from None

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int,
                 stop_ids, n: int) -> list[Completion]:
        """Return what sample.generate would: n completions per prompt, in the order of prompts."""
        # A server would take whatever is not set here from the model's generation_config.json, such
        # as Qwen2.5's top_k 20 and repetition penalty. But the answers must be the policy's own.
        # vLLM's log-probabilities are those of temperature 1, and only for `check`.
        body = {"model": self.name, "max_tokens": max_new_tokens, "temperature": temperature,
                "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": n,
                "stop_token_ids": list(stop_ids), "logprobs": 0, "return_token_ids": True}

        def read(reply) -> list[Completion]:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            completions = [self.parse(choice, max_new_tokens, stop_ids) for choice in choices]
            require(len(completions) == n,
                    f"--rollout_url {self.url}: {len(completions)} answers, not {n}")
            return completions

        def answer(i: int) -> list[Completion]:
            # vLLM counts up from a request's seed, so that each of the n has its own.
            request = body | {"prompt": prompts[i], "seed": seed + i * n}
            return self.ask("v1/completions", request, read)

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


def rollout_backend(url: str, model, tokenizer):
    """Return what samples: the model here or, with a --rollout_url, a server that has the same."""
    if not url:
        return model
    server = VLLMClient(url, tokenizer)
    server.check(model)
    return server
