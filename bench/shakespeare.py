"""tinyshakespeare in equal time: a character-level GPT in nanoGPT's CPU setting, and pretrain.py.

nanoGPT itself is no package and is not copied here. The GPT below is written anew after the setting
that its README gives for a CPU (`config/train_shakespeare_char.py` with 4 layers, 4 heads, width
128, context 64, batch 12, 2,000 steps, no dropout), for which the README states a validation loss
of 1.88 nats. The estimate printed first is made as nanoGPT makes it, and tells whether this one
reaches the same.

In each round the GPT trains first; pretrain.py then gets as many seconds. Both losses are of the
last tenth of the characters, all of it.

    python bench/shakespeare.py input.txt --rounds 3
"""
import argparse
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import records

LAYERS = 4
HEADS = 4
WIDTH = 128
CONTEXT = 64
BATCH = 12
STEPS = 2000
WARMUP = 100
LR = 1e-3
MIN_LR = 1e-4
EVAL_EVERY = 250
EVAL_BATCHES = 20  # of the training part, and as many of the validation part


class Block(nn.Module):
    """GPT-2's block without biases: attention and a GELU MLP, each behind a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width of a head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2 with learned positions and one matrix for embedding and head."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_stream = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * LAYERS) if into_stream else 1))

    def forward(self, ids):
        x = self.embedding(ids) + self.positions.weight[:ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def loss_of(model, inputs, targets):
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def random_batch(ids):
    starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
    rows = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth at the last step."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def estimate(model, ids) -> float:
    """The mean loss of random batches in nats per character, as nanoGPT estimates it."""
    return statistics.mean(loss_of(model, *random_batch(ids)).item() for _ in range(EVAL_BATCHES))


@torch.no_grad()
def bits_per_character(model, ids, stride: int) -> float:
    """The loss of all characters but the first. A window of CONTEXT starts every `stride`, and the
    last one ends where the text ends; each adds the characters that no earlier one predicted."""
    last = len(ids) - CONTEXT - 1
    starts = torch.tensor([*range(0, last, stride), last])
    rows = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
    nats = 0.0
    counted = 0
    for some_starts, some in zip(starts.split(256), rows.split(256), strict=True):
        logits = model(some[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none")
        for start, row in zip(some_starts.tolist(), losses, strict=True):
            nats += row[counted - start:].sum().item()
            counted = start + CONTEXT
    return nats / counted / math.log(2)


def train_gpt(text: str) -> None:
    """Train the GPT and print its losses."""
    torch.manual_seed(1337)
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([number[character] for character in text])
    cut = len(text) * 9 // 10
    train, validation = ids[:cut], ids[cut:]
    model = GPT(len(alphabet))
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))
    for step in range(STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        if step % EVAL_EVERY == 0:
            losses = estimate(model, train), estimate(model, validation)
        optimizer.zero_grad()
        loss_of(model, *random_batch(train)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    plain = bits_per_character(model, validation, stride=CONTEXT)
    kind = bits_per_character(model, validation, stride=CONTEXT // 2)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters; nats as nanoGPT estimates them: train {losses[0]:.3f}, "
          f"validation {losses[1]:.3f}")
    print(f"bits per character: {plain:.3f}; with half a window before each, {kind:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", help="tinyshakespeare, one text file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpt", action="store_true", help="train the GPT, in this process")
    args = parser.parse_args()
    text = Path(args.text).resolve()
    if args.gpt:
        train_gpt(text.read_text(encoding="utf-8"))
        return
    for number in range(args.rounds):
        print(f"round {number + 1}", flush=True)
        gpt = records.run([Path(__file__).resolve(), text, "--gpt"], threads=2, show=True)
        print(f"    the GPT: {gpt.seconds:.0f} s, {gpt.cpu_seconds:.0f} of CPU", flush=True)
        _, bits, ours = records.shakespeare(text, gpt.seconds)
        print(f"    pretrain.py: {bits} bits per character, {ours.seconds:.0f} s, "
              f"{ours.cpu_seconds:.0f} of CPU: {ours.command}", flush=True)


if __name__ == "__main__":
    main()
