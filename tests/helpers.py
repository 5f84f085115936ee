"""What the tests of the stages share: short arguments, logs, weights, an interruption."""
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from lib.args import InputError
from model import PRESETS, Config, Qwen2
from tokenizer import chat_segments

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}  # so that `python -m data` works in any folder


def program(name: str) -> list[str]:
    """What follows `python` to run "sft.py" or the module "data" from any folder, with ENV."""
    return [str(ROOT / name)] if name.endswith(".py") else ["-m", name]


def chat_text(tokenizer, messages, add_generation_prompt=False, tools=None) -> str:
    """The conversation as the chat template writes it. Never encode it: in this string a forged
    <|im_end|> cannot be told from a real one."""
    segments = chat_segments(messages, add_generation_prompt, tools, tokenizer._layout)
    return "".join(segment.text for segment in segments)


TINY = Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
              tie_word_embeddings=True)


def wake(model: Qwen2) -> Qwen2:
    """Give the matrices that start at zero weights: else blocks are the identity, every position
    sees only itself, and a test of attention, cache or padding could not fail."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(0.0, p.shape[-1] ** -0.5)
    return model


def tiny_model(seed=0, scale=5.0, **changes) -> Qwen2:
    """A random model whose logits are of order 1, so that a wrong position is seen in the loss."""
    torch.manual_seed(seed)
    model = wake(Qwen2(replace(TINY, **changes)))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
            else:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def micro_model(tokenizer, seed=0, **changes) -> Qwen2:
    torch.manual_seed(seed)
    vocab_size = tokenizer.padded_vocab_size(128)
    return wake(Qwen2(replace(PRESETS["micro"], vocab_size=vocab_size, **changes)))


def stage_args(module, **values):
    """Args of a stage on the CPU in float32, for machines without isolation of code, too."""
    fixed = {"device": "cpu", "dtype": "float32"}
    if hasattr(module.Args, "allow_unsafe_code"):
        fixed["allow_unsafe_code"] = True
    return module.Args(**fixed | values)


GLOSSARY = {"step"} | {name for line in (ROOT / "docs/metrics.md").read_text("utf-8").splitlines()
                       if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}


def log(path) -> list[dict]:
    """What a stage logged, without its speed; docs/metrics.md explains every number of it,
    and all parts of a reward of one's own as own_NAME."""
    lines = (Path(path) / "log.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = {re.sub("^own_.+", "own_NAME", name) for row in rows for name in row}
    assert found <= GLOSSARY, found - GLOSSARY
    for row in rows:
        row.pop("tokens_per_s", None)
    return rows


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "model.safetensors")


def same_weights(a, b) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def interrupt_at(monkeypatch, module, step: int) -> None:
    """Ctrl-C in the optimizer step number `step` (from 1) of a stage."""
    calls, real = [], module.clip_and_step

    def clip_and_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(module, "clip_and_step", clip_and_step)


def teach(tokenizer, path, talks: list[tuple[str, str]], steps=40, **changes):
    """A micro model directory that answers each question as in `talks`, and mostly stops."""
    from lib.optim import pad_rows
    from sft import sft_loss
    model = micro_model(tokenizer, **changes)
    rows = [tokenizer.render([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
            for q, a in talks]
    ids, mask = (pad_rows([row[k] for row in rows], 0) for k in (0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(steps):
        sft_loss(model, ids, mask, int(mask.sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def teach_letters(tokenizer, path):
    """A policy that says "A." or "B."."""
    return teach(tokenizer, path, [(q, a) for q in ("Pick A.", "Choose A.") for a in ("A.", "B.")])


def letter_queries(path, keyword="A") -> str:
    check = {"kind": "ifeval", "instruction_id_list": ["keywords:existence"],
             "kwargs": [{"keywords": [keyword]}]}
    return write_rows(path, [{"prompt": q, "domain": "instruction", "check": check}
                             for q in ("Pick A.", "Choose A.")])


class Answer:
    """Stands for sampled answers, where a test has no use for real ones."""
    finished, score, text, ids, prompt_ids = True, 0.0, "", [], []
    query = {"prompt": "", "domain": "", "check": {}}


def no_samples(monkeypatch, module) -> None:
    """The look at samples that ends a stage takes longer than its few steps here: skip it."""
    monkeypatch.setattr(module, "rollout", lambda *args, **kwargs: [[Answer()]])
    if hasattr(module, "tasks"):  # sft.py asks its own data instead
        monkeypatch.setattr(module.tasks.queries, "builtin", lambda *args: [])


def refuses(call, *words) -> str:
    """The InputError's message, which must be one line and contain the words."""
    try:
        call()
    except InputError as error:
        message = str(error)
        assert "\n" not in message and all(word in message for word in words), message
        return message
    raise AssertionError("nothing was refused")


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---------------------------------------------------------------------------------------------
# documents

PROSE = ("The council met on Tuesday to discuss the new bridge. Two members asked for a cheaper "
         "plan, but the engineer explained why the river bed needs deeper foundations there.")
CODE = ("import os\n\n\ndef sizes(folder):\n    for name in sorted(os.listdir(folder)):\n"
        "        path = os.path.join(folder, name)\n        yield name, os.path.getsize(path)\n")


def doc(text, **more):
    return {"text": text, **more}


def nonsense(r, n, prefix="w"):
    """n words that occur nowhere else."""
    return [f"{prefix}{r.getrandbits(48):x}" for _ in range(n)]


def filler(shared, n_bytes, seed=0):
    """Documents of about 3 KB: shuffled paragraphs of real text, so that none repeats another."""
    r = random.Random(seed)
    files = ("wikitext2_valid.txt", "sherlock.txt", "wiki_demo.txt", "tinyshakespeare.txt")
    text = " ".join((shared / "text" / name).read_text("utf-8") for name in files)
    lines = [text[i:i + 120] for i in range(0, len(text), 120)]
    while n_bytes > 0:
        document = "\n".join(r.choices(lines, k=25))
        n_bytes -= len(document)
        yield document
