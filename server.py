"""Answers from a server: --rollout_url of sft.py, dpo.py, reward.py and evaluate.py.

Any server with OpenAI's protocol and vLLM's token ids: recipes/multi_gpu.md says how to start one,
and why grpo.py refuses it (a server goes on answering with the weights that it once read).
"""
import http.client
import json
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor

import torch

from common import InputError, require
from model import Qwen2
from sample import Completion, completion_logprobs, prompt_ids
from tokenizer import Tokenizer


class Server:
    """--rollout_url: the same model behind an OpenAI-compatible server, as `vllm serve DIR` of
    vLLM 0.10.2 or later, which on a GPU answers far more requests a second than the loop above.
    Ids go out and ids come back: text would be tokenised again, and sometimes otherwise (R12.5)."""
    timeout = 600  # seconds for one prompt's answers, among all the others

    def __init__(self, url: str, model: Qwen2, tokenizer: Tokenizer):
        require(url.startswith(("http://", "https://")),
                f"--rollout_url wants http://HOST:PORT/v1, got {url!r}")
        self.url, self.n_vocab = url.rstrip("/"), tokenizer.n_vocab
        self.name = self.ask("models", None, lambda reply: reply["data"][0]["id"])
        # Other weights than --init's are seen by what they think of an answer. Rounding to
        # bfloat16 is some 0.02; a checkpoint a few steps away is not told from it.
        prompt = prompt_ids(tokenizer, {"prompt": "Who are you?"})
        (answer,) = self.generate([prompt], 16, 0.0, 0, tokenizer.stop_ids, 1)
        with torch.no_grad():
            own = completion_logprobs(model, [prompt], [answer.ids])[0].flatten().tolist()
        gap = sum(abs(a - b) for a, b in zip(own, answer.logprobs, strict=True)) / len(own)
        require(gap < 0.2, f"--rollout_url {url} serves {self.name}, which is not the model here: "
                f"log-probabilities differ by {gap:.2g} a token")

    def ask(self, path: str, body: dict | None, read):
        """read(the answer's JSON); GET without a body."""
        try:
            request = urllib.request.Request(f"{self.url}/{path}", body and json.dumps(
                body).encode(), {"Content-Type": "application/json"})
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
                require(0 <= min(ids) and max(ids) < self.n_vocab and len(ids) == len(logprobs)
                        and not set(ids[:-1]) & set(stop_ids)
                        and (finished or len(ids) == max_new_tokens), f"--rollout_url {self.url}: "
                        f"an answer that cannot be this tokenizer's: {len(ids)} ids, among them "
                        f"{max(ids)}, the last {ids[-1]}, {choice.get('finish_reason')}")
                out.append(Completion(ids, logprobs, finished))
            require(len(out) == n, f"--rollout_url {self.url}: {len(out)} answers, not {n}")
            return out

        def answer(i):  # a seed for each of the n, which vLLM counts up from the request's
            more = {"prompt": prompts[i], "seed": seed + i * n}
            return self.ask("completions", body | more, read)
        with ThreadPoolExecutor(64) as pool:  # the server batches what comes at the same time
            return [c for answers in pool.map(answer, range(len(prompts))) for c in answers]


def served(url: str, model, tokenizer):
    """What samples: the model here or, with a --rollout_url, a server that has the same one."""
    return Server(url, model, tokenizer) if url else model
