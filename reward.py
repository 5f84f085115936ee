"""Stage 4: the reward model (report section 4.3), a Bradley-Terry scorer of responses.

The language model's head is replaced by one that gives a single number, read at the last token of
the response. It is trained so that the better of two responses scores higher:

    L = - log sigmoid(r(x, y_chosen) - r(x, y_rejected))

A pair that is labelled by criteria has a soft label instead of a certain one (`preference_loss`).
The report's responses come from checkpoints of several stages (SFT, DPO, RL; --policies), sampled
at several temperatures. The pairs of DPO are added (--pairs), and the queries are those of GRPO.
Here the check of the query labels the responses. The report's labels also weigh helpfulness,
conciseness and so on, judged by people (data/label.py) and by models. It does not disclose head,
loss or learning rate, so these are our choice. The head is one bias-free row named score.weight,
which transformers loads as Qwen2ForSequenceClassification.

    python reward.py --init runs/demo/sft --policies runs/demo/sft,runs/demo/dpo,runs/demo/rl_first
    python reward.py --init Qwen2.5-0.5B-Instruct --pairs mine.jsonl --queries none --eval_data ...

Expect: the loss starts at exactly ln 2 and the accuracy at 0, since the head starts at zero. The
held-out accuracy comes to 0.7-0.8 from 900 pairs, and stays near a half with 200. Compare it with
the rule "the longer one wins", printed beside it for each source of answers. A model that does not
beat that rule may have learned no more than length, and GRPO would learn length from it.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import ConcatDataset
from tqdm import tqdm

import tasks.queries
from data.pairs import (
    PairFile, PairIds, pair_responses, parse_criteria, read_held_out, tokenize_pairs)
from lib.args import cli, parse_value, positive, require
from lib.checkpoint import NoDraws
from lib.dist import QUIET, all_reduce_sum, apply_fsdp, full_model, micro_batches
from lib.files import write_jsonl
from lib.optim import adamw, clip_and_step, default_lr, epoch_order, lr_at, pad_rows, setup
from lib.router import RouterStats
from lib.run import Run
from lib.vllm_client import rollout_backend
from model import Config, Qwen2
from sample import Rollout, load_policy, read_prompts, rollout
from tokenizer import Tokenizer


@dataclass
class Args:
    init: str = "runs/sft"           # SFT model whose body the reward model starts from
    out: str = "runs/reward"         # run directory
    pairs: str = ""                  # preference pairs to add (JSONL), such as dpo's pairs.jsonl
    weights: str = ""                # of labels: "overall=1,helpfulness=2"; empty: all the same
    eval_data: str = ""              # pairs (JSONL) to measure on, and not to learn from
    queries: str = "rl"              # as for GRPO, joined by commas; "none": only the files
    n_queries: int = 0               # at most this many of each; 0: whole files, 256 of a split
    n_held_out: int = 64             # other queries, to measure on
    policies: str = ""               # comma-separated models that answer them; empty: --init
    temperatures: str = "0.7,1.0"    # each policy samples at each of these
    responses: int = 4               # answers per query, policy and temperature
    allow_unsafe_code: bool = False  # judge code although the sandbox lacks layers of isolation
    rollout_url: str = ""            # servers that have --policies, http://HOST:PORT/v1,...
    pairs_per_query: int = 4         # at most this many pairs per query
    max_new_tokens: int = 128        # longest sampled answer
    max_len: int = 1024              # drop pairs with a longer prompt + response (or than --init's)
    epochs: float = 2.0              # passes over the pairs
    batch_size: int = 16             # pairs per step
    micro_batch: int = 32            # pairs per forward pass (gradient accumulation): memory only
    gradient_checkpointing: bool = False  # recompute activations: less memory, 1/3 more time
    lr: float = 0.0                  # peak learning rate; 0: by the size of the model, and printed
    warmup: int = 5                  # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    max_grad_norm: float = 1.0       # gradients are clipped to this norm
    eval_every: int = 200            # steps between measures of --eval_data; first and last too
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of sampling, pairing and order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    save_dtype: str = ""             # of the saved weights; empty: that of --init
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# the model

class RewardModel(Qwen2):
    """Qwen2 with a head that gives one number instead of the language-model head. The head starts
    at zero: all responses are worth the same until something is learned."""
    architecture = "ForSequenceClassification"
    on_disk = {"head.weight": "score.weight"}

    def __init__(self, config: Config):
        super().__init__(replace(config, tie_word_embeddings=True))  # so that there is no lm_head
        self.head = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.tokenizer: Tokenizer | None = None

    @classmethod
    def from_language_model(cls, model: Qwen2, tokenizer: Tokenizer) -> "RewardModel":
        """Take over the body of a language model, not a copy of it."""
        with NoDraws(), torch.device("meta"):  # without memory for another body
            reward_model = cls(model.config)
        reward_model.model = model.model
        reward_model.tokenizer = tokenizer
        reward_model.head.to_empty(device=model.head_weight.device)
        nn.init.zeros_(reward_model.head.weight)
        return reward_model

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "RewardModel":
        reward_model = super().from_pretrained(path, dtype, device)
        reward_model.tokenizer = Tokenizer.from_pretrained(path)
        return reward_model

    def forward(self, ids, lengths, router=None):
        """Return the rewards (B,) float32 of rows ids (B, T), padded on the right. router: see
        Qwen2.hidden.

        A reward is read at the last real token of its row, found by lengths (B,) and not by looking
        for a padding id, which may also be a real token."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        real = columns < lengths[:, None]
        hidden = self.hidden(ids, router=router, counted=real.flatten())
        return self.read(hidden, lengths)

    def read(self, hidden, lengths):
        """Return the rewards (B,) float32 at the last of `lengths` (B,) tokens of hidden (B, T, C).

        This is head(last) written out: autocast would compute a Linear in bfloat16, in which
        rewards near 4 have steps of 0.03."""
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, lengths - 1]
        return (last.float() * self.head.weight).sum(1)

    def rewards(self, rows: list[list[int]], router=None):
        """Return the rewards (B,) of rows of ids of any lengths."""
        device = self.head.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self(pad_rows(rows, 0).to(device), lengths, router)

    @torch.no_grad()
    def score(self, prompts: list, responses: list, batch_size: int = 64) -> list[float]:
        """Return the rewards of responses to prompts, without gradients.

        A prompt is a text, messages, or token ids. A response is a text or, straight from the
        sampler, token ids. A prompt that comes several times is read once per batch."""
        prompts = [self.prompt_ids(prompt) for prompt in prompts]
        answers = [self.answer_ids(response) for response in responses]
        device = self.head.weight.device
        rewards = torch.zeros(len(answers))

        def by_prompt(i):  # into the same batch; the answers: whatever their order in the input
            return len(prompts[i]), prompts[i], answers[i]

        order = sorted(range(len(answers)), key=by_prompt)
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            some_prompts = [prompts[i] for i in batch]
            some_answers = [answers[i] for i in batch]
            _, cache = read_prompts(self, some_prompts)
            ids = pad_rows(some_answers, 0).to(device)
            hidden = self.hidden(ids, cache=cache)
            lengths = torch.tensor([len(answer) for answer in some_answers], device=device)
            rewards[batch] = self.read(hidden, lengths).cpu()
        return rewards.tolist()

    def prompt_ids(self, prompt) -> tuple[int, ...]:
        if len(prompt) > 0 and isinstance(prompt[0], int):
            return tuple(prompt)
        return tuple(self.tokenizer.render_prompt(prompt))

    def answer_ids(self, response) -> list[int]:
        if isinstance(response, str):
            return self.tokenizer.encode(response) + [self.tokenizer.im_end_id]
        return response


# ---------------------------------------------------------------------------------------------
# loss and accuracy

def preference_loss(chosen, rejected, label=1.0):
    """Return the Bradley-Terry losses (B,) of the rewards (B,) of chosen and rejected answers.

    label (B,) is the probability p that chosen is better: 1/2 for a tie. With d = chosen - rejected
    the cross-entropy is -p log sigmoid(d) - (1 - p) log sigmoid(-d) = -log sigmoid(d) + (1 - p) d
    (conservative DPO, Mitchell 2023). Its minimum is at d = log(p / (1 - p))."""
    difference = chosen - rejected
    return -F.logsigmoid(difference) + (1 - label) * difference


def pair_rewards(model: RewardModel, rows: list[PairIds], router=None):
    """Return the rewards of the chosen (B,) and the rejected answers (B,), in one forward pass."""
    chosen = [row.prompt + row.chosen for row in rows]
    rejected = [row.prompt + row.rejected for row in rows]
    return model.rewards(chosen + rejected, router).chunk(2)


@torch.no_grad()
def accuracies(model: RewardModel, rows: list[PairIds]) -> dict[str, float]:
    """Measure held-out pairs: the loss, how often chosen > rejected, how often the rules "longer
    wins" and "shorter wins" would be right, and the correlation of score and length,
    prompts included."""
    chosen = []
    rejected = []
    for i in range(0, len(rows), 64):
        some_chosen, some_rejected = pair_rewards(model, rows[i:i + 64])
        chosen.append(some_chosen.cpu())
        rejected.append(some_rejected.cpu())
    chosen = torch.cat(chosen)
    rejected = torch.cat(rejected)
    chosen_length = torch.tensor([len(row.prompt) + len(row.chosen) for row in rows])
    rejected_length = torch.tensor([len(row.prompt) + len(row.rejected) for row in rows])
    scores = torch.cat((chosen, rejected))
    lengths = torch.cat((chosen_length, rejected_length)).float()
    correlation = torch.corrcoef(torch.stack((scores, lengths)))[0, 1]
    labels = torch.tensor([row.label for row in rows])
    return {
        "loss": preference_loss(chosen, rejected, labels).mean().item(),
        "accuracy": share(chosen > rejected),
        "longer_wins": share(chosen_length > rejected_length),
        "shorter_wins": share(chosen_length < rejected_length),
        "score_length_correlation": correlation.item(),
    }


def share(condition) -> float:
    return condition.float().mean().item()


def accuracies_by_source(model: RewardModel, held_out: dict, tokenizer: Tokenizer, max_len: int,
                         weights, autocast) -> dict[str, dict]:
    """Print and return the `accuracies` of the held-out pairs of each source."""
    by_source = {}
    for source, pairs in held_out.items():
        rows = tokenize_pairs(pairs, tokenizer, max_len, weights)
        rows = [row for row in rows if row.label > 0.5]  # a tie has no right order
        if rows:
            with autocast:
                by_source[source] = {"pairs": len(rows), **accuracies(model, rows)}
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in by_source[source].items())
            print(f"held out, {source}: {numbers}")
    return by_source


# ---------------------------------------------------------------------------------------------
# data

def sample_answers(args: Args, queries: list[dict], device, autocast) -> dict[str, list[Rollout]]:
    """Let every policy answer the queries at every temperature. Return {source: answers}, where the
    source "all" has those of all the others."""
    paths = (args.policies or args.init).split(",")
    urls = args.rollout_url.split(",") if args.rollout_url else [""] * len(paths)
    require(len(urls) == len(paths), f"--rollout_url needs one for each of {', '.join(paths)}")
    by_source = {"all": []}
    for path, url in zip(paths, urls, strict=True):
        policy, tokenizer = load_policy(path, device)
        policy = rollout_backend(url, policy, tokenizer)
        for temperature in parse_temperatures(args):
            source = f"{path} at temperature {temperature}"
            with autocast:
                groups = rollout(policy, tokenizer, queries, args.responses, args.max_new_tokens,
                                 temperature, args.seed, tasks.queries.score_many)
            answers = [answer for group in groups for answer in group]
            pass_rate = sum(answer.score for answer in answers) / len(answers)
            print(f"  {source}: {pass_rate:.1%} pass")
            by_source[source] = answers
            by_source["all"].extend(answers)
    return by_source


def parse_temperatures(args: Args) -> list[float]:
    return [parse_value("temperatures", part, float) for part in args.temperatures.split(",")]


def load_pairs(args: Args, run: Run, device, autocast):
    """Return the pairs to learn from and, by source, the held-out pairs to measure on."""
    pairs = PairFile(args.pairs) if args.pairs else []
    held_out = {args.eval_data: PairFile(args.eval_data)} if args.eval_data else {}
    if args.queries == "none":
        return pairs, held_out
    queries = tasks.queries.load(args.queries, args.n_queries, args.seed, built_in=256)
    others = tasks.queries.builtin("val", args.n_held_out, args.seed)
    tasks.queries.require_isolation(queries + others, args.allow_unsafe_code)
    if run.resumed:  # they were sampled before the run stopped
        pairs = PairFile(str(run.path / "pairs.jsonl"))
    else:
        answers = sample_answers(args, queries, device, autocast)["all"]
        sampled = pair_responses(answers, args.pairs_per_query, args.seed)
        pairs = ConcatDataset([pairs, sampled])
    by_source = sample_answers(args, others, device, autocast)
    for source, answers in by_source.items():
        held_out[source] = pair_responses(answers, args.pairs_per_query, args.seed)
    return pairs, held_out


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "reward")
    device, autocast = setup(args, args.batch_size)
    positive(args, "responses", "max_new_tokens", "epochs", "batch_size", "micro_batch",
             "eval_every", "save_every", "max_grad_norm")
    if args.queries != "none":
        positive(args, "n_held_out")
    parse_temperatures(args)  # a bad one is refused before anything is sampled
    weights = parse_criteria(args.weights)

    # model
    model, tokenizer = load_policy(args.init, device)
    model = RewardModel.from_language_model(model, tokenizer)
    model.gradient_checkpointing = args.gradient_checkpointing

    # data
    pairs, held_out_by_source = load_pairs(args, run, device, autocast)
    max_len = min(args.max_len, model.config.max_position_embeddings)
    rows = tokenize_pairs(pairs, tokenizer, max_len, weights)
    require(len(rows) > 0, f"no preference pair within --max_len {max_len} tokens to learn "
            "from: see --pairs, --queries")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(rows)} pairs, {steps} steps")
    held_out = read_held_out(args.eval_data, tokenizer, max_len, weights)

    # optimizer, resume
    peak_lr = args.lr or default_lr("reward", model)
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, peak_lr, args.weight_decay)
    start = run.start_or_resume(model, optimizer)
    write_jsonl(run.path / "pairs.jsonl", pairs)

    # loop
    router = RouterStats(model.config)  # of an MoE; a dense model has none
    bar = tqdm(range(start, steps), desc="reward", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        row_of = {i: rows[i] for i in batch}
        # Rows of similar lengths share a micro-batch: little padding.
        batch.sort(key=lambda i: len(row_of[i].prompt) + len(row_of[i].chosen))
        loss = accuracy = 0.0
        for micro in micro_batches(batch, args.micro_batch, model):
            some = [row_of[i] for i in micro]
            labels = torch.tensor([row.label for row in some], device=device)
            with autocast:
                chosen, rejected = pair_rewards(model, some, router)
            micro_loss = preference_loss(chosen, rejected, labels).sum() / len(batch)
            (micro_loss + router.loss(len(micro) / len(batch))).backward()
            loss += micro_loss.item()
            accuracy += (chosen > rejected).sum().item() / len(batch)
        loss = all_reduce_sum(loss)
        accuracy = all_reduce_sum(accuracy)
        lr = lr_at(step, steps, peak_lr, args.warmup, args.final_lr)
        grad_norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
        metrics = {"loss": loss, "accuracy": accuracy, "lr": lr, "grad_norm": grad_norm,
                   **router.end_step(step + 1)}
        if held_out and (step % args.eval_every == 0 or step + 1 == steps):
            with autocast:
                measured = accuracies(full_model(model), held_out)
            metrics |= {"val_loss": measured["loss"], "val_accuracy": measured["accuracy"]}
        run.log(step + 1, steps, bar, batch, **metrics)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, then look at how well the model tells other pairs apart
    run.save(model, tokenizer)
    by_source = accuracies_by_source(full_model(model), held_out_by_source, tokenizer,
                                     max_len, weights, autocast)
    overall = by_source.get("all") or by_source.get(args.eval_data, {})
    result = overall | {"pairs": len(rows), "held_out_pairs": overall.get("pairs", 0)}
    run.finish(**result, by_source=by_source)
    return by_source


if __name__ == "__main__":
    cli(main, Args)
