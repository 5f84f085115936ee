"""Stage 4: the reward model (report section 4.3), a Bradley-Terry scorer of responses.

The language model's head is replaced by one number, read at the last token of the response, and
trained so that the better of two responses scores higher. For k chosen and m rejected responses

    L = - 1/(k m) * sum over chosen c and rejected j of log sigmoid(r(x, y_c) - r(x, y_j)),

for k = m = 1 Bradley-Terry's loss, for all answers to a query (--listwise) Qwen2.5-Math-RM's.

As the report says: responses come from checkpoints of several stages (SFT, DPO, RL) sampled at
several temperatures, the DPO pairs are added, and the queries are those of GRPO. Here the label is
the check's verdict; the report's labels also weigh helpfulness, conciseness and so on, by people
(data/label.py) and models. Not disclosed, so our choice: head, loss, learning rate. The head is one
bias-free row named score.weight, which transformers loads as Qwen2ForSequenceClassification, or
the two layers of Qwen2.5-Math-RM.

    python reward.py --init runs/demo/sft --policies runs/demo/sft,runs/demo/dpo,runs/demo/rl_first
    python reward.py --init Qwen2.5-0.5B-Instruct --pairs mine.jsonl --queries none --held_out ...

Expect: the loss starts at exactly ln 2 (the head starts at zero) and the held-out accuracy reaches
0.7-0.9. Compare it with "the longer one wins", printed beside it for each source of answers: a
model that does not beat that rule has learned length, and GRPO would learn length from it.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import tasks.queries
from data.pairs import pair_responses, read_pairs, tokenize_pairs
from lib.args import cli, parse_value, positive, require
from lib.dist import QUIET, micro_batches, apply_fsdp, all_reduce_sum, full_model
from lib.files import read_json, write_jsonl
from lib.optim import adamw, clip_and_step, epoch_order, lr_at, pad_rows, setup
from lib.run import Run
from lib.vllm_client import rollout_backend
from model import Config, Qwen2
from sample import load_policy, read_prompts, rollout
from tokenizer import Tokenizer

@dataclass
class Args:
    init: str = "runs/sft"           # SFT model whose body the reward model starts from
    out: str = "runs/reward"         # where the run goes
    pairs: str = ""                  # preference pairs to add (JSONL), such as dpo's pairs.jsonl
    held_out: str = ""               # pairs (JSONL) to measure, and not to learn from
    queries: str = "rl"              # query split or file, as for GRPO; "none": only the files
    n_queries: int = 0               # at most so many; 0: all of a file, 256 of a split
    n_held_out: int = 64             # other queries, to measure on
    policies: str = ""               # comma-separated models that answer them; empty: --init
    temperatures: str = "0.7,1.0"    # each policy samples at each of these
    responses: int = 4               # answers sampled to each query, by policy and temperature
    rollout_url: str = ""            # servers that have --policies, http://HOST:PORT/v1,...
    pairs_per_query: int = 4         # at most so many pairs of each query's answers
    max_new_tokens: int = 128        # longest sampled answer
    max_len: int = 1024              # longer prompt + response is dropped
    two_layers: bool = False         # the head of Qwen2.5-Math-RM instead of one row
    listwise: bool = False           # compare all answers of a prompt's pairs: its loss
    epochs: float = 2.0              # passes over the pairs
    batch_size: int = 16             # pairs (listwise: prompts) a step
    micro_batch: int = 32            # pairs (listwise: prompts) a forward pass: memory only
    lr: float = 5e-4                 # peak learning rate
    warmup: int = 5                  # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    max_grad_norm: float = 1.0       # largest gradient norm
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
    on_disk = {f"head.{name}": f"score.{name}"
               for name in ("weight", "0.weight", "0.bias", "2.weight", "2.bias")}

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
        layers = read_json(Path(path) / "config.json").get("architectures")
        kind = TwoLayers if str(layers).endswith("ForRewardModel']") else RewardModel
        reward_model = super(RewardModel, kind).from_pretrained(path, dtype, device)
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
                prompt = self.tokenizer.render_prompt(prompt)
            if isinstance(response, str):
                response = self.tokenizer.encode(response) + [self.tokenizer.im_end_id]
            pairs.append((tuple(prompt), response))
        out, device = torch.zeros(len(pairs)), self.head_weight.device
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
        device = self.head_weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self(pad_rows(rows, 0).to(device), lengths)


class TwoLayers(RewardModel):
    """With the head of the released Qwen2.5-Math-RM."""
    architecture = "ForRewardModel"

    def __init__(self, config: Config):
        super().__init__(config)
        C = config.hidden_size
        self.head = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 1))
        nn.init.zeros_(self.head[2].weight)
        nn.init.zeros_(self.head[2].bias)


def sample_answers(args: Args, temperatures: list[float], device, autocast, queries: list[dict]):
    """-> {source: answers}: of each policy at each temperature."""
    answers, paths = {}, (args.policies or args.init).split(",")
    urls = args.rollout_url.split(",") if args.rollout_url else [""] * len(paths)
    require(len(urls) == len(paths), f"--rollout_url wants one for each of {', '.join(paths)}")
    for path, url in zip(paths, urls, strict=True):
        policy, tokenizer = load_policy(path, device)
        policy = rollout_backend(url, policy, tokenizer)
        for temperature in temperatures:
            with autocast:
                groups = rollout(policy, tokenizer, queries, args.responses, args.max_new_tokens,
                                 temperature, args.seed, tasks.queries.score_many)
            source = f"{path} at temperature {temperature}"
            answers[source] = [answer for group in groups for answer in group]
            rate = sum(a.score for a in answers[source]) / len(queries) / args.responses
            print(f"  {source}: {rate:.1%} pass")
    return answers


# ---------------------------------------------------------------------------------------------
# loss

def preference_loss(chosen, rejected):
    """Rewards (P,), (P,) -> Bradley-Terry losses (P,)."""
    return -F.logsigmoid(chosen - rejected)


def comparisons(model: RewardModel, rows):
    """Each chosen against each rejected answer of a row: their rewards (P,), (P,), and weights (P,)
    that sum to 1 in each row."""
    sizes = [len(row[side]) for side in (0, 1) for row in rows]
    rewards = model.rewards([y for side in (0, 1) for row in rows for y in row[side]]).split(sizes)
    both = [torch.cartesian_prod(c, j)                                     # (k m, 2)
            for c, j in zip(rewards[:len(rows)], rewards[len(rows):], strict=True)]
    weight = torch.cat([torch.full_like(pairs[:, 0], 1 / len(pairs)) for pairs in both])
    return *torch.cat(both).T, weight


@torch.no_grad()
def accuracies(model: RewardModel, rows) -> dict[str, float]:
    """On held-out pairs: how often chosen > rejected, how often the trivial rules "longer wins" and
    "shorter wins" would be right, and how far the score follows the length (R11.3)."""
    parts = [comparisons(model, rows[i:i + 64])[:2] for i in range(0, len(rows), 64)]
    scores = torch.stack([torch.cat(side).cpu() for side in zip(*parts, strict=True)], 1)
    length = torch.tensor([[len(c), len(r)] for (c,), (r,) in rows], dtype=torch.float32)
    follows = torch.corrcoef(torch.stack((scores.flatten(), length.flatten())))[0, 1].item()
    return {"accuracy": (scores[:, 0] > scores[:, 1]).float().mean().item(),
            "longer_wins": (length[:, 0] > length[:, 1]).float().mean().item(),
            "shorter_wins": (length[:, 0] < length[:, 1]).float().mean().item(),
            "score_length_correlation": follows}


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "reward")
    device, autocast = setup(args, args.batch_size)
    positive(args, "n_held_out", "responses", "max_new_tokens", "epochs", "batch_size",
             "micro_batch", "save_every")
    model, tokenizer = load_policy(args.init, device)
    kind = TwoLayers if args.two_layers else RewardModel
    model = kind.from_language_model(model, tokenizer)
    pairs = read_pairs(args.pairs) if args.pairs else []
    held_out = {args.held_out: read_pairs(args.held_out)} if args.held_out else {}
    queries = [] if args.queries == "none" else \
        tasks.queries.load(args.queries, args.n_queries, args.seed, built_in=256)
    require(bool(pairs or queries), "no preference pair to learn from: see --pairs, --queries")
    temperatures = [parse_value("temperatures", part, float)
                    for part in args.temperatures.split(",")]

    # data
    require(queries or tokenize_pairs(pairs, tokenizer, args.max_len, args.listwise),
            f"--pairs {args.pairs}: none fits into --max_len {args.max_len} tokens")
    if queries:
        if run.resumed:  # the pairs that it had: a server answers otherwise each time
            pairs = read_pairs(run.path / "pairs.jsonl")
        else:
            sources = sample_answers(args, temperatures, device, autocast, queries)
            pairs += pair_responses(sum(sources.values(), []), args.pairs_per_query, args.seed)
        queries = tasks.queries.builtin("val", args.n_held_out, args.seed)
        sources = sample_answers(args, temperatures, device, autocast, queries)
        sources = {"all": sum(sources.values(), [])} | sources
        held_out |= {source: pair_responses(answers, args.pairs_per_query, args.seed)
                     for source, answers in sources.items()}
    rows = tokenize_pairs(pairs, tokenizer, args.max_len, args.listwise)
    held_out = {source: tokenize_pairs(some, tokenizer, args.max_len)
                for source, some in held_out.items()}
    require(len(rows) > 0, "no preference pair to learn from: see --pairs, --queries")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(rows)} {'prompts' if args.listwise else 'pairs'}, {steps} steps")

    # optimizer, resume
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, args.lr, args.weight_decay)
    start = run.start_or_resume(model, optimizer)
    write_jsonl(run.path / "pairs.jsonl", pairs)

    # loop
    bar = tqdm(range(start, steps), desc="reward", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        batch.sort(key=lambda i: len(rows[i][0][0]))
        loss = accuracy = 0.0
        for micro in micro_batches(batch, args.micro_batch):
            with autocast:
                chosen, rejected, weight = comparisons(model, [rows[j] for j in micro])
            micro_loss = (preference_loss(chosen, rejected) * weight).sum() / len(batch)
            loss += micro_loss.item()
            accuracy += ((chosen > rejected) * weight).sum().item() / len(batch)
            micro_loss.backward()
        loss, accuracy = map(all_reduce_sum, (loss, accuracy))
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
        run.log(step + 1, steps, bar, batch, loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, with a look at how well it tells other pairs apart
    scorer = full_model(model)
    with autocast:
        by_source = {source: {"pairs": len(some)} | accuracies(scorer, some)
                     for source, some in held_out.items() if some}
    for source, row in by_source.items():
        print(f"held out, {source}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
    result = by_source.get("all", {})
    run.finish(model, tokenizer, **result | {"pairs": len(rows), "by_source": by_source,
                                             "held_out_pairs": result.get("pairs", 0)})
    return by_source


if __name__ == "__main__":
    cli(main, Args)
