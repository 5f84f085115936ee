"""Stage 2: supervised fine-tuning on conversations (report section 4.1).

The pre-training loss on a subset of positions: with m_t = 1 exactly on what the assistant says and
on the <|im_end|> that ends its turn (tokenizer.render is the only place that decides this),

    L = - 1/M_step * sum_t m_t log p(x_t | x_<t),    M_step = sum of m_t over the whole step

The report: over a million conversations, 2 epochs, up to 32,768 tokens, learning rate 7e-6 falling
to 7e-7, weight decay 0.1, gradient norm 1.0. Not disclosed, so our choice: batch size, warm-up,
cosine decay, packing. The report has one rate for all sizes; a power law through it at 7B and our
smallest model's best (LOG.md: 2e-4 at N = 0.8M without embeddings) is lr = 7e-6 (6.5e9 / N)^0.37.
It is no more than a start: at 106M, in 21 steps, its 3.2e-5 was too low and 1e-4 the best of three.

    python sft.py --init runs/demo/pretrain --out runs/demo/sft --lr 2e-4
    python sft.py --init Qwen2.5-7B --data chats.jsonl --n_data 1e6 --lr 7e-6 --max_len 32768 \\
        --pack --batch_size 128 --micro_batch 1 --out ...                   # the report's settings
    python sft.py --init runs/sft --queries rl --responses 8 --out ...        # rejection sampling
    python tokenizer.py show runs/sft --chat chats.jsonl                    # look at the mask

--data: JSONL of {"messages": [{"role", "content"}, ...]}, with "tools" and the assistant's
"tool_calls" where there are some; every turn of the assistant is trained on. With --queries, --init
answers these, and what passes its check is the data. With neither: verified demonstrations.

Expect, with the built-in demonstrations: the loss starts far below pre-training's and falls in a
step at each epoch's end; afterwards more than 95% of answers stop by themselves. (samples.jsonl and
`stopped` are of built-in questions, whatever --data was.) A loss near 0 is no good sign: too high a
rate learns the demonstrations by heart and loses what the base model could do (LOG.md, "SFT above
the base model, DPO above SFT").
"""
import io
import json
import zlib
from array import array
from dataclasses import dataclass

from tqdm import tqdm

import kernels
import tasks.queries
from lib.args import InputError, cli, positive, require
from lib.files import open_text, write_atomic
from lib.optim import adamw, clip_and_step, epoch_order, lr_at, pad_rows, setup
from lib.run import Run
from lib.dist import QUIET, WORLD, micro_batches, apply_fsdp, all_reduce_sum, full_model
from model import Qwen2
from sample import load_policy, rollout
from lib.vllm_client import rollout_backend


@dataclass
class Args:
    init: str = "runs/pretrain"      # model directory to start from
    out: str = "runs/sft"            # where the run goes
    data: str = ""                   # conversations (JSONL); empty: built-in demonstrations
    queries: str = ""                # instead: what --init answers rightly to this split or file
    n_data: int = 0                  # at most so many of them; 0: all of a file, 1000 built-in ones
    responses: int = 8               # answers sampled to each of --queries
    rollout_url: str = ""            # sample them on a server that has --init, http://HOST:PORT/v1
    max_new_tokens: int = 160        # longest of these, and of the samples at the end
    max_len: int = 512               # longer conversations are cut at the end
    pack: bool = False               # rows of max_len tokens, of several conversations (on a GPU)
    epochs: float = 4.0              # passes over the data
    batch_size: int = 16             # conversations a step
    micro_batch: int = 32  # rows a forward pass: memory only
    gradient_checkpointing: bool = (
        False  # activations in the backward pass: less memory, 1/3 more time
    )
    lr: float = 5e-4                 # peak learning rate (the report's models: 7e-6)
    warmup: int = 10                 # steps of linear warm-up, at most half of all
    final_lr: float = 0.1            # last learning rate / peak
    weight_decay: float = 0.1        # on matrices only
    max_grad_norm: float = 1.0       # largest gradient norm
    save_every: int = 200            # steps between resumable states
    seed: int = 0                    # of data and their order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # continue an interrupted run
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# data

class Conversations:
    """(ids, mask) by number, of a JSONL: in memory is only where each line begins. All are read
    once before training: a bad one is refused now; one cut before the assistant's first word is
    dropped and counted, as a step of only such would be 0/0 (R8.5)."""

    def __init__(self, file, tokenizer, max_len: int, n: int, name: str = ""):
        self.file, self.tokenizer, self.max_len = file, tokenizer, max_len
        self.starts, self.dropped, start, number = array("q"), 0, 0, 0
        try:
            for line in file:
                number += 1
                if line.strip() and len(self) + self.dropped < n:
                    learns = any(self.tokens(line)[1][1:])
                    self.starts.extend([start] * learns)
                    self.dropped += not learns
                start += len(line)
        except (ValueError, EOFError, OSError, RecursionError, zlib.error) as error:  # torn .gz too
            reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"{name}:{number}: {' '.join(str(reason).split())}") from None

    def tokens(self, line: bytes) -> tuple[list[int], list[int]]:
        row = json.loads(line)
        require(isinstance(row, dict) and isinstance(row.get("messages"), list),
                'want {"messages": [{"role", "content"}, ...]}')
        ids, mask = self.tokenizer.render(row["messages"], tools=row.get("tools"))
        return ids[:self.max_len], mask[:self.max_len]

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i: int):
        self.file.seek(self.starts[i])
        return self.tokens(self.file.readline())


def rejection_sample(model: Qwen2, tokenizer, args: Args) -> list[dict]:
    """Of several responses to each query those that pass its check, each different one once."""
    policy = rollout_backend(args.rollout_url, model, tokenizer)
    queries = tasks.queries.load(args.queries, args.n_data, args.seed, built_in=1000)
    groups = rollout(policy, tokenizer, queries, args.responses, args.max_new_tokens, 1.0,
                     args.seed, tasks.queries.score_many)
    passed = dict.fromkeys((a.query["prompt"], a.text) for a in sum(groups, []) if a.score)
    return [{"messages": [{"role": "user", "content": prompt},
                          {"role": "assistant", "content": text}]} for prompt, text in passed]


def pack(rows, max_len: int):
    """(ids, mask) of conversations -> fewer, longer rows (ids, mask, number of the conversation):
    the longest first, each into the first row with room for it. The loss stays the same: attention
    and positions keep to a conversation, and its first token, <|im_start|>, is no target."""
    packed = []
    for i, (ids, mask) in enumerate(sorted(rows, key=lambda row: -len(row[0]))):
        row = next((row for row in packed if len(row[0]) + len(ids) <= max_len), None)
        if row is None:
            packed.append(row := ([], [], []))
        for column, new in zip(row, (ids, mask, [i] * len(ids)), strict=True):
            column += new
    while len(packed) % WORLD:  # each process wants as many
        packed.append(([0, 0], [0, 0], [0, 0]))
    return packed


# ---------------------------------------------------------------------------------------------
# loss

def sft_loss(model: Qwen2, ids, mask, count: int, segments=None):
    """Summed loss of ids (B, T) where mask (B, T) is 1, over `count`, the step's supervised tokens.
    Rows are padded on the right: causal attention never looks there, and the mask is 0.
    segments (B, T): which conversation of a packed row a token is of."""
    segments = None if segments is None else segments[:, :-1]
    hidden = model.hidden(ids[:, :-1], segment_ids=segments)
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="sum") / count


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    # set-up
    run = Run(args, "sft")
    device, autocast = setup(args, args.batch_size)
    positive(args, "epochs", "batch_size", "micro_batch", "save_every",
             "responses", "max_new_tokens")
    require(args.max_len >= 8, f"--max_len {args.max_len} is too short for a conversation")
    require(not (args.data and args.queries), "--data and --queries: take one")
    require(args.queries or not args.rollout_url, "--rollout_url wants --queries to ask there")
    model, tokenizer = load_policy(args.init, device)
    longest = model.config.max_position_embeddings
    require(args.max_len <= longest, f"--max_len {args.max_len}: {args.init} has only {longest}")
    # In tiles, a CPU skips what no token may see. On a GPU: one mask, not measured.
    kernels.set_default_impl("fused" if args.pack and device.type == "cpu" else "auto")

    # data
    built = run.path / "data.jsonl"
    if args.data or args.resume and built.exists():
        file = open_text(args.data or built).detach()
    else:
        with autocast:
            found = rejection_sample(model, tokenizer, args) if args.queries else \
                tasks.queries.demonstrations(args.n_data or 1000, args.seed)
        file = io.BytesIO("".join(json.dumps(row) + "\n" for row in found).encode())
    n = args.n_data if args.data and args.n_data else 10**9
    rows = Conversations(file, tokenizer, args.max_len, n, args.data)
    require(len(rows) > 0, f"--data {args.data or args.queries}: {rows.dropped} conversations, none"
            f" with an answer of the assistant within --max_len {args.max_len} tokens")
    steps = max(1, int(args.epochs * len(rows) / args.batch_size))
    print(f"{len(rows)} conversations ({rows.dropped} dropped: no answer within --max_len), "
          f"{steps} steps")

    # optimizer, resume
    model.gradient_checkpointing = args.gradient_checkpointing
    model = apply_fsdp(model, autocast)
    optimizer = adamw(model, args.lr, args.weight_decay)
    start = run.start_or_resume(model, optimizer)
    if isinstance(file, io.BytesIO):
        write_atomic(built, file.getvalue().decode())

    # loop
    bar = tqdm(range(start, steps), desc="sft", initial=start, total=steps, disable=QUIET)
    for step in bar:
        batch = epoch_order(step, args.batch_size, len(rows), args.seed)
        parts = sorted((rows[i] for i in batch), key=lambda row: len(row[0]))  # little padding
        count, loss = sum(sum(mask[1:]) for _, mask in parts), 0.0
        parts = pack(parts, args.max_len) if args.pack else parts
        for micro in micro_batches(parts, args.micro_batch):
            ids, mask, *segments = (pad_rows(column, pad).to(device) for column, pad in zip(
                zip(*micro, strict=True), (tokenizer.pad_id, 0, -1), strict=False))
            with autocast:
                micro_loss = sft_loss(model, ids, mask, count, *segments)
            loss += micro_loss.item()
            micro_loss.backward()
        loss = all_reduce_sum(loss)
        lr = lr_at(step, steps, args.lr, args.warmup, args.final_lr)
        norm = clip_and_step(model, optimizer, lr, args.max_grad_norm, loss)
        run.log(step + 1, steps, bar, batch, loss=loss, lr=lr, grad_norm=norm, targets=count,
                epoch=(step + 1) * args.batch_size / len(rows))
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save_state(step + 1, model, optimizer)

    # save, with a look at what it says now
    with autocast:
        groups = rollout(
            full_model(model),
            tokenizer,
            tasks.queries.builtin("val", 32, args.seed),
            1,
            args.max_new_tokens,
            1.0,
            args.seed,
            tasks.queries.score_many,
        )
    answers = [group[0] for group in groups]
    stopped = sum(a.finished for a in answers) / len(answers)
    print(f"{stopped:.0%} of {len(answers)} sampled answers end by themselves")
    run.save_samples(answers)
    run.finish(model, tokenizer, loss=loss, stopped=stopped, conversations=len(rows))
    return {"loss": loss, "stopped": stopped}


if __name__ == "__main__":
    cli(main, Args)
