"""Stage 4: the reward model (report section 4.3), a Bradley-Terry scorer of responses.

The language model's head is replaced by one number, read at the last token of the response, and
trained so that the better of two responses scores higher (Bradley-Terry):

    L = - log sigmoid(r(x, y_chosen) - r(x, y_rejected))

As the report says: responses come from checkpoints of several stages (SFT, DPO, RL) sampled at
several temperatures, the DPO pairs are added, and the queries are those of GRPO. Here the label is
the check's verdict; the report's labels also weigh helpfulness, conciseness and so on, by people
and models. Not disclosed, so our choice: head, loss, learning rate. The head is one bias-free row
named score.weight, which transformers loads as Qwen2ForSequenceClassification.

    python reward.py --init runs/demo/sft --policies runs/demo/sft,runs/demo/dpo,runs/demo/rl_first
    python reward.py --init Qwen2.5-0.5B-Instruct --pairs preferences.jsonl ...

Expect: the loss starts at exactly ln 2 (the head starts at zero) and the held-out accuracy reaches
0.7-0.9. Compare it with "the longer one wins", printed beside it: a model that does not beat that
rule has learned length, and GRPO would learn to write long or short answers from it.
"""
import random
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import tasks
from common import (
    InputError, Run, adamw, cli, clip_and_step, epoch_order, lr_at, pad_rows, positive,
    read_jsonl, require, setup, write_jsonl)
from distributed import QUIET, micro_batches, sharded, summed, whole
from model import Config, Qwen2
from sample import load_policy, prompt_ids, read_prompts, rollout
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = "runs/sft"           # SFT model whose body the reward model starts from
    policies: str = ""               # comma-separated models that answer the queries; empty: --init
    temperatures: str = "0.7,1.0"    # each policy samples at each of these
    pairs: str = ""                  # preference pairs to add (JSONL), such as dpo's pairs.jsonl
    out: str = "runs/reward"         # where the run goes
    queries: str = "rl"              # query split or file, as for GRPO; "none": only --pairs
    n_queries: int = 128             # how many of them
    responses: int = 4               # answers a query, policy and temperature
    pairs_per_query: int = 4         # at most so many pairs of each query's answers
    max_new_tokens: int = 128        # longest sampled answer
    max_len: int = 1024              # longer prompt + response is dropped
    epochs: float = 1.0              # passes over the pairs
    batch_size: int = 32             # pairs a step
    micro_batch: int = 32            # pairs a forward pass: memory only
    lr: float = 3e-4                 # peak learning rate
    warmup: int = 5                  # steps of linear warm-up
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    clip: float = 1.0                # largest gradient norm
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of sampling, pairing and order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# the model

class RewardModel(Qwen2):
    """Qwen2 without a language-model head, with a scalar one. Starts at zero: every response is
    worth the same until something is learned."""
    architecture = "ForSequenceClassification"
    on_disk = {"head.weight": "score.weight"}

    def __init__(self, config: Config):
        super().__init__(replace(config, tie_word_embeddings=True))  # so that there is no lm_head
        self.head = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.tokenizer: Tokenizer | None = None

    @classmethod
    def from_language_model(cls, model: Qwen2, tokenizer: Tokenizer) -> "RewardModel":
        reward_model = cls(model.config)
        reward_model.model, reward_model.tokenizer = model.model, tokenizer
        return reward_model.to(model.head_weight.device)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "RewardModel":
        reward_model = super().from_pretrained(path, dtype, device)
        reward_model.tokenizer = Tokenizer.from_pretrained(path)
        return reward_model

    def forward(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) -> rewards (B,) float32, read at each row's
        last real token by its length, never by looking for a padding id (R11.1)."""
        hidden = self.hidden(ids)
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        return self.head(last).sum(1).float()  # of one number: FSDP wants no view

    @torch.no_grad()
    def score(self, prompts: list, responses: list, batch_size: int = 64) -> list[float]:
        """Rewards of responses to prompts. A prompt is a string, messages, or token ids; a response
        is a string or, straight from the sampler, token ids."""
        pairs = []
        for prompt, response in zip(prompts, responses, strict=True):
            if not prompt or not isinstance(prompt[0], int):
                prompt = prompt_ids(self.tokenizer, {"prompt": prompt})
            if isinstance(response, str):
                response = self.tokenizer.encode(response) + [self.tokenizer.im_end_id]
            pairs.append((tuple(prompt), response))
        out, device = torch.zeros(len(pairs)), self.head.weight.device
        # Responses to one prompt stay together, so that read_prompts reads it once.
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), pairs[i]))
        for i in range(0, len(pairs), batch_size):
            batch = order[i:i + batch_size]
            _, cache = read_prompts(self, [pairs[j][0] for j in batch])
            answers = [pairs[j][1] for j in batch]
            last = torch.tensor([len(answer) - 1 for answer in answers], device=device)
            hidden = self.hidden(pad_rows(answers, 0).to(device), cache=cache)
            hidden = hidden[torch.arange(len(batch), device=device), last]
            out[batch] = self.head(hidden).flatten().float().cpu()
        return out.tolist()

    def rewards(self, rows: list[list[int]]):
        device = self.head.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self(pad_rows(rows, 0).to(device), lengths)


# ---------------------------------------------------------------------------------------------
# data

def pair_responses(answers: list, per_query: int, seed: int) -> list[dict]:
    """Rollouts -> pairs: passing = chosen, failing = rejected, among all the answers to one query,
    whichever policy gave them. A query whose answers all pass or all fail teaches nothing here and
    gives no pair; equal texts are one answer, and one that was cut is none."""
    r, pairs, by_prompt = random.Random(seed), [], {}
    for answer in answers:
        by_prompt.setdefault(str(answer.query["prompt"]), []).append(answer)
    for group in by_prompt.values():
        query = group[0].query
        passed = sorted({a.text for a in group if a.score == 1})
        failed = sorted({a.text for a in group if a.score < 1 and a.finished})
        k = min(per_query, len(passed), len(failed))
        for chosen, rejected in zip(r.sample(passed, k), r.sample(failed, k), strict=True):
            pairs.append({"prompt": query["prompt"], "chosen": chosen, "rejected": rejected,
                          "domain": query["domain"]})
    return pairs


def read_pairs(path: str) -> list[dict]:
    """JSONL of {"prompt", "chosen", "rejected"}, each a text or messages: TRL's shapes."""
    def readable(side):
        return isinstance(side, str) or (isinstance(side, list) and len(side) > 0 and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in side))
    pairs = []
    for number, row in read_jsonl(path):
        bad = [k for k in ("prompt", "chosen", "rejected") if not readable(row.get(k))]
        require(not bad, f"{path}:{number}: {', '.join(bad)}: want a text or messages, in a row of "
                '"prompt", "chosen", "rejected"')
        pairs.append(row)
    require(len(pairs) > 0, f"{path}: holds no pairs")
    return pairs


def parse_temperatures(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--temperatures wants numbers joined by commas, got {text!r}") from None


def sample_pairs(args: Args, device, autocast, queries: list[dict], seed: int) -> list[dict]:
    answers = []
    for path in (args.policies or args.init).split(","):
        policy, tokenizer = load_policy(path, device)
        for temperature in parse_temperatures(args.temperatures):
            with autocast:
                groups = rollout(policy, tokenizer, queries, args.responses, args.max_new_tokens,
                                 temperature, seed)
            answers += [answer for group in groups for answer in group]
            rate = sum(a.score for group in groups for a in group) / len(queries) / args.responses
            print(f"  {path} at temperature {temperature}: {rate:.1%} pass")
    return pair_responses(answers, args.pairs_per_query, seed)


def tokenize_pair(tokenizer: Tokenizer, pair: dict) -> tuple[list[int], list[int], list[int]]:
    """-> ids of the prompt, of the chosen and of the rejected answer (content + <|im_end|>)."""
    texts = (y if isinstance(y, str) else y[-1]["content"]
             for y in (pair["chosen"], pair["rejected"]))
    return prompt_ids(tokenizer, pair), *(
        tokenizer.encode(text) + [tokenizer.im_end_id] for text in texts)


def tokenize_pairs(pairs: list[dict], tokenizer: Tokenizer, max_len: int):
    """-> rows of (chosen ids, rejected ids), each with the prompt before it."""
    rows = [tokenize_pair(tokenizer, pair) for pair in pairs]
    rows = [(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in rows]
    return [row for row in rows if max(map(len, row)) <= max_len]


# ---------------------------------------------------------------------------------------------
# loss

def preference_loss(chosen, rejected):
    """Rewards (B,), (B,) -> Bradley-Terry losses (B,)."""
    return -F.logsigmoid(chosen - rejected)


@torch.no_grad()
def accuracies(model: RewardModel, rows) -> dict[str, float]:
    """On held-out pairs: how often chosen > rejected, how often the trivial rules "longer wins" and
    "shorter wins" would be right, and how far the score follows the length (R11.3)."""
    chosen, rejected = (torch.cat([model.rewards([row[side] for row in rows[i:i + 64]]).cpu()
                                   for i in range(0, len(rows), 64)]) for side in (0, 1))
    length = torch.tensor([[len(c), len(r)] for c, r in rows], dtype=torch.float32)
    scores = torch.stack((chosen, rejected), 1)
    longer = (length[:, 0] > length[:, 1]).float().mean().item()
    shorter = (length[:, 0] < length[:, 1]).float().mean().item()
    follows = torch.corrcoef(torch.stack((scores.flatten(), length.flatten())))[0, 1].item()
    return {"accuracy": (chosen > rejected).float().mean().item(), "longer_wins": longer,
            "shorter_wins": shorter, "score_length_correlation": follows}


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "reward")
    device, autocast = setup(args, args.batch_size)
    positive(args, "n_queries", "responses", "max_new_tokens", "epochs", "batch_size",
             "micro_batch", "save_every")
    model, tokenizer = load_policy(args.init, device)
    model = RewardModel.from_language_model(model, tokenizer)
    pairs = read_pairs(args.pairs) if args.pairs else []
    queries = [] if args.queries == "none" else tasks.load(args.queries, args.n_queries, args.seed)
    require(bool(pairs or queries), "no preference pair to learn from: see --pairs, --queries")
    parse_temperatures(args.temperatures)

    # data
    if queries:
        pairs += sample_pairs(args, device, autocast, queries, args.seed)
    held_out = sample_pairs(args, device, autocast, tasks.builtin("val", 64, args.seed), args.seed)
    rows = tokenize_pairs(pairs, tokenizer, args.max_len)
    held_out = tokenize_pairs(held_out, tokenizer, args.max_len)
    require(len(rows) > 0, "no preference pair to learn from: see --pairs, --queries")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(rows)} pairs, {len(held_out)} held out (other queries), {steps} steps")

    # optimizer, resume
    model = sharded(model, autocast)
    optimizer = adamw(model, args.lr, args.weight_decay)
    start = run.begin(model, optimizer)
    write_jsonl(run.path / "pairs.jsonl", pairs)

    # loop
    bar = tqdm(range(start, steps), desc="reward", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        batch.sort(key=lambda i: len(rows[i][0]))
        loss_sum = correct = 0.0
        for micro in micro_batches(batch, args.micro_batch):
            with autocast:
                chosen, rejected = model.rewards([rows[j][0] for j in micro]
                                                 + [rows[j][1] for j in micro]).chunk(2)
            loss = preference_loss(chosen, rejected).sum() / len(batch)
            loss_sum += loss.item()
            correct += (chosen > rejected).sum().item() / len(batch)
            loss.backward()
        loss_sum, correct = map(summed, (loss_sum, correct))
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.clip, loss_sum)
        run.log(step + 1, steps, bar, batch, loss=loss_sum, accuracy=correct, lr=lr,
                grad_norm=norm)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save
    result = accuracies(whole(model), held_out) if held_out else {}
    print("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    run.finish(model, tokenizer, pairs=len(rows), held_out_pairs=len(held_out), **result)
    return result


if __name__ == "__main__":
    cli(main, Args)
