"""Answers from a server: --rollout_url of sft.py, dpo.py, reward.py, grpo.py and evaluate.py.

Any server with OpenAI's protocol and vLLM's token ids: recipes/multi_gpu.md says how to start one.
GRPO's must also read new weights at every step, and is checked each time to have done so.
"""
import http.client
import json
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lib.args import InputError, require
from lib.dist import RANK, all_gather
from lib.files import disk_errors
from model import Qwen2
from sample import Completion, completion_logprobs
from tokenizer import Tokenizer

class VLLMClient:
    """--rollout_url: the same model behind an OpenAI-compatible server, as `vllm serve DIR` of
    vLLM 0.10.2 or later, which on a GPU answers far more requests a second than sample.py's loop.
    Ids go out and ids come back: text would be tokenised again, and sometimes otherwise (R12.5)."""
    timeout = 600  # seconds for one prompt's answers, among all the others

    def __init__(self, url: str, tokenizer: Tokenizer):
        require(url.startswith(("http://", "https://")),
                f"--rollout_url wants http://HOST:PORT/v1, got {url!r}")
        self.url, self.tokenizer = url.rstrip("/").removesuffix("/v1"), tokenizer
        self.name = self.ask("v1/models", None, lambda reply: reply["data"][0]["id"])

    def check(self, model: Qwen2) -> None:
        """Other weights than the model's are seen by what they think of an answer. Rounding to
        bfloat16 is some 0.02; a checkpoint a few steps away is not told from it."""
        prompt = self.tokenizer.render_prompt("Who are you?")
        (answer,) = self.generate([prompt], 16, 0.0, 0, self.tokenizer.stop_ids, 1)
        with torch.no_grad():
            own = completion_logprobs(model, [prompt], [answer.ids])[0].flatten().tolist()
        gap = sum(abs(a - b) for a, b in zip(own, answer.logprobs, strict=True)) / len(own)
        require(gap < 0.2, f"--rollout_url {self.url} serves {self.name}, which is not the model "
                f"here: log-probabilities differ by {gap:.2g} a token")

    def load(self, model: Qwen2, path: Path) -> None:
        """From now on answer with this model: its weights are written to `path`, and read there by
        the server, which keeps no keys and values of the ones before. Both are calls of vLLM's
        development mode (VLLM_SERVER_DEV_MODE=1)."""
        if RANK == 0:
            self.forget()  # without the development mode nothing is written
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
                model.save_pretrained(path)
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}}
            self.ask("collective_rpc", body, lambda reply: reply["results"])
            self.forget()
        all_gather(None)  # the other processes wait
        self.check(model)

    def forget(self) -> None:
        done = self.ask("reset_prefix_cache", {}, lambda reply: reply["success"])
        require(done is True, f"--rollout_url {self.url}: it keeps its prefix cache; do others "
                "ask it as well?")

    def ask(self, path: str, body: dict | None, read):
        """read(the answer's JSON); GET without a body."""
        try:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"{self.url}/{path}", data,
                                             {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return read(json.load(reply))
            except urllib.error.HTTPError as error:  # its text tells more
                raise OSError(f"{error}: {error.read(300).decode('utf-8', 'replace')}") from None
        except InputError:
            raise
        except (OSError, http.client.HTTPException) as error:  # gone, late, cut off, 4xx, 5xx
            reason = str(error)
        except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
            reason = f"no answer of the form wanted ({type(error).__name__}: {error})"
        raise InputError(f"--rollout_url {self.url}/{path}: {' '.join(reason.split())}")

    def generate(self, prompts, max_new_tokens, temperature, seed, stop_ids, n):
        # With all that a server would else take from the model's generation_config.json, such as
        # Qwen2.5's top_k 20 and repetition penalty: the answers must be the policy's own (R12.2).
        # vLLM's log-probabilities are those of temperature 1, and only for the check above.
        body = {"model": self.name, "max_tokens": max_new_tokens, "temperature": temperature,
                "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": n,
                "stop_token_ids": list(stop_ids), "logprobs": 0, "return_token_ids": True}

        def read(reply):
            out = []
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"]):
                ids = array("q", choice["token_ids"]).tolist()  # of integers, or TypeError
                logprobs = array("d", choice["logprobs"]["token_logprobs"]).tolist()
                finished = ids[-1] in stop_ids
                require(0 <= min(ids) and max(ids) < self.tokenizer.n_vocab
                        and len(ids) == len(logprobs) and not set(ids[:-1]) & set(stop_ids)
                        and (finished or len(ids) == max_new_tokens),
                        f"--rollout_url {self.url}: an answer that cannot be this "
                        f"tokenizer's: {len(ids)} ids, among them {max(ids)}, the last {ids[-1]}, "
                        f"{choice.get('finish_reason')}")
                out.append(Completion(ids, logprobs, finished))
            require(len(out) == n, f"--rollout_url {self.url}: {len(out)} answers, not {n}")
            return out

        def answer(i):  # a seed for each of the n, which vLLM counts up from the request's
            more = {"prompt": prompts[i], "seed": seed + i * n}
            return self.ask("v1/completions", body | more, read)
        with ThreadPoolExecutor(64) as pool:  # the server batches what comes at the same time
            return [c for answers in pool.map(answer, range(len(prompts))) for c in answers]


def rollout_backend(url: str, model, tokenizer):
    """What samples: the model here or, with a --rollout_url, a server that has the same one."""
    if not url:
        return model
    server = VLLMClient(url, tokenizer)
    server.check(model)
    return server
