"""A judge: a chat model that scores a text by the criteria of a rubric, from 1 to 5.

rubrics.json has "documents", for pre-training data (report section 3.1), and "answers": the six
criteria of the report's reward labels (section 4.3). A criterion has a question, the meaning of 1,
3 and 5, and two scored examples. The report does not disclose its own, so all are our choice.

    judge = Judge("runs/demo/grpo")                               # a model directory
    judge = Judge("some-model", "https://api.openai.com/v1")      # a model on a server
    judge.score("documents", text)                                # {"knowledge": 3.2, ...}

A server must speak OpenAI's chat protocol, with log-probabilities; its key is OPENAI_API_KEY.
"""
import json
from concurrent.futures import ThreadPoolExecutor
from math import exp
from pathlib import Path

import torch

from lib.args import require
from lib.vllm_client import VLLMClient
from model import Qwen2
from tokenizer import Tokenizer

RUBRICS = json.loads(Path(__file__).with_name("rubrics.json").read_text("utf-8"))
SCORES = ("1", "2", "3", "4", "5")


def chat(criterion: dict, text: str) -> list[dict]:
    """Return the messages that ask for a score: the examples are earlier turns of the chat."""
    anchors = [f"{score}: {meaning}" for score, meaning in criterion["anchors"].items()]
    task = [criterion["question"], *anchors, "Reply with a number from 1 to 5."]
    messages = [{"role": "system", "content": "\n".join(task)}]
    for example, score in criterion["examples"]:
        messages.append({"role": "user", "content": f"Text: {example}"})
        messages.append({"role": "assistant", "content": score})
    messages.append({"role": "user", "content": f"Text: {text.strip()}"})
    return messages


class Judge:
    """The score of a criterion is the expectation over the tokens 1 to 5. Sampling one digit would
    give five levels; the probabilities rank texts even where a small model always says 3."""

    def __init__(self, name: str, url: str = "", device="cpu", max_chars: int = 4000):
        self.max_chars = max_chars  # of a text; the rest is not read
        self.server = None
        if url:
            self.server = VLLMClient(url, None, "--judge_url")
            self.name = name or self.server.name
        else:
            self.model = Qwen2.from_pretrained(name, device=device)
            self.tokenizer = Tokenizer.from_pretrained(name)

    def score(self, rubric: str, text: str) -> dict[str, float]:
        """Return {criterion: score from 1 to 5} of a text."""
        criteria = RUBRICS[rubric]
        chats = [chat(criterion, text[:self.max_chars]) for criterion in criteria.values()]
        if self.server is None:
            scores = [self.ask_model(messages) for messages in chats]
        else:
            with ThreadPoolExecutor(len(chats)) as pool:
                scores = list(pool.map(self.ask_server, chats))
        return dict(zip(criteria, scores, strict=True))

    def score_document(self, text: str) -> dict[str, float]:
        """Return the scores of a document by the four criteria, and their mean."""
        scores = self.score("documents", text)
        return scores | {"mean": sum(scores.values()) / len(scores)}

    def score_answer(self, question: str, answer: str) -> dict[str, float]:
        """Return the scores of an answer by the six criteria; of a long question only the end."""
        return self.score("answers", f"{question[-1000:]}\nAnswer: {answer}")

    def approves(self, messages: list[dict]) -> bool:
        """Say whether the last message scores at least 3 by every criterion (our choice)."""
        question = "\n".join(message["content"] or "" for message in messages[:-1])
        scores = self.score_answer(question, messages[-1]["content"])
        return min(scores.values()) >= 3

    @torch.no_grad()
    def ask_model(self, messages: list[dict]) -> float:
        prompt = self.tokenizer.render_prompt(messages)
        ids = torch.tensor([prompt], device=self.model.head_weight.device)
        last = self.model.hidden(ids)[0, -1].float()
        digits = [self.tokenizer.encode(digit)[0] for digit in SCORES]
        # No matrix products: autocast would round them to bfloat16, and scores must rank finely.
        logits = (last * self.model.head_weight[digits]).sum(-1)
        probs = logits.softmax(-1).cpu()
        return (probs * torch.arange(1.0, 6.0)).sum().item()

    def ask_server(self, messages: list[dict]) -> float:
        body = {"model": self.name, "messages": messages, "max_tokens": 1, "temperature": 0,
                "logprobs": True, "top_logprobs": 20}
        return self.server.ask("v1/chat/completions", body, expected_score)


def expected_score(reply: dict) -> float:
    """Return the expectation over the digits among the likeliest first tokens of a chat reply."""
    choice = reply["choices"][0]
    total = 0.0
    weighted = 0.0
    for token in choice["logprobs"]["content"][0]["top_logprobs"]:
        digit = token["token"].strip()
        if digit in SCORES:
            prob = exp(token["logprob"])
            total += prob
            weighted += int(digit) * prob
    require(total > 0, "--judge_url: no number from 1 to 5 among the likeliest first words of "
            f"{choice['message']['content']!r}")
    return weighted / total
