"""One step of SFT, DPO and GRPO: the calls of sft.py, dpo.py and grpo.py, against TRL's trainers.

The small model. The peers' record gives tokens a sample, not how they divide; here SFT has 128 +
128 (prompt + answer, the answer supervised), DPO twice 64 + 64, both with one end of turn more, and
GRPO 64 + 64 sampled ones, eight responses a query, rewarded at random. In both systems DPO's
reference is computed in the step, GRPO has no KL term, AdamW, clipping and learning rate are the
same, and so are the rows of every step: the losses of the first two steps are compared. TRL runs
without gradient checkpointing; ours keeps freed memory, as the stages do.
"""
import random
import statistics
import string
import time

import harness
from harness import memory, timed

TEXTS = {"sft": {"prompt": 128, "completion": 128}, "grpo": {"prompt": 64},  # their tokens
         "dpo": {"prompt": 64, "chosen": 64, "rejected": 64}}
LR, STEPS = 1e-4, 5                                                          # step 1: warm-up


def parse(case):
    """-> algorithm, dtype, batch, rows of texts that have a token a letter."""
    algorithm, dtype, batch = case.split()
    draw, queries = random.Random(0), int(batch) // (8 if algorithm == "grpo" else 1)
    return algorithm, dtype, int(batch), [
        {name: "".join(" " + draw.choice(string.ascii_letters) for _ in range(n))
         for name, n in TEXTS[algorithm].items()} for _ in range(queries)]


def result(algorithm, batch, ticks, losses, before):
    """ticks: (CPU, wall) seconds of each step."""
    cpu, wall = map(statistics.median, zip(*ticks[1:], strict=True))
    out = {"cpu": cpu, "wall": wall, "work": batch,
           "extra": {"s a step": cpu, "MB": memory(peak=True) - before}}
    return out if algorithm == "grpo" else out | {"check": losses[:2]}


def prepare(case):
    harness.save_model("small")
    from tokenizer import Tokenizer
    Tokenizer.train(["".join(f" {c}" for c in string.ascii_letters)], 600).save_pretrained("small")


def ours(case):
    harness.ours()
    import torch

    from lib import optim
    import dpo
    import grpo
    import sft
    from sample import completion_logprobs, generate, load_policy
    algorithm, dtype, batch, texts = parse(case)
    optim.keep_freed_memory()
    model, tokenizer = load_policy("small", "cpu")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    optimizer, end = optim.adamw(model, LR, 0.0), [tokenizer.im_end_id]
    ids = ([tokenizer.encode(text) for text in row.values()] for row in texts)
    prompts, *answers = zip(*ids, strict=True)

    def sft_loss():
        ids = torch.tensor([p + a + end for p, a in zip(prompts, answers[0], strict=True)])
        mask = (torch.arange(ids.shape[1]) >= len(prompts[0])).int().expand(ids.shape)
        with autocast:
            return sft.sft_loss(model, ids, mask, int(mask.sum()))

    def pairs():
        with autocast:
            completions = [a + end for side in answers for a in side]
            return completion_logprobs(model, prompts * 2, completions)[0].sum(-1).chunk(2)

    def dpo_loss():
        with torch.no_grad():  # dpo.py does this once a pair before the loop: part of a step's cost
            reference.append(pairs())
        return dpo.dpo_loss(*pairs(), *reference[0], 0.1)[0].mean()

    def grpo_loss():
        with autocast:
            done = generate(model, prompts, 64, n=8, stop_ids=tokenizer.stop_ids, seed=len(losses))
            logprobs, mask = completion_logprobs(model, [p for p in prompts for _ in range(8)],
                                                 [c.ids for c in done])
        old = torch.zeros_like(logprobs).masked_scatter(mask, torch.tensor(
            [p for c in done for p in c.logprobs]))
        advantages = grpo.group_advantages(torch.rand(len(prompts), 8)).flatten()
        return grpo.grpo_loss(logprobs, old, None, advantages, mask)[0]
    losses, reference, before = [], [], memory(reset=True)

    def step():
        loss = {"sft": sft_loss, "dpo": dpo_loss, "grpo": grpo_loss}[algorithm]()
        loss.backward()
        optim.clip_and_step(model, optimizer, LR, 1.0)
        losses.append(loss.item())
    ticks = [(t["cpu"], t["wall"]) for t in (timed(step, 1, 0) for _ in range(STEPS))]
    return result(algorithm, batch, ticks, losses, before)


def trl(case):
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    algorithm, dtype, batch, texts = parse(case)
    Trainer, Config = (getattr(trl, algorithm.upper() + kind) for kind in ("Trainer", "Config"))
    sampling = {"num_generations": 8, "max_completion_length": 64, "loss_type": "grpo"}
    reward = {"reward_funcs": lambda completions, **_: [random.random() for _ in completions]}
    if algorithm != "grpo":
        sampling = reward = {}
    config = Config(output_dir="trl", use_cpu=True, bf16=dtype == "bf16", max_steps=STEPS,
                    per_device_train_batch_size=batch, learning_rate=LR, max_grad_norm=1.0,
                    lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
                    optim="adamw_torch_fused", gradient_checkpointing=False, logging_steps=1,
                    save_strategy="no", report_to="none", disable_tqdm=True, **sampling)
    model = AutoModelForCausalLM.from_pretrained("small", dtype=torch.float32)
    ends, before = [], memory(reset=True)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append((time.process_time(), time.perf_counter()))
    run = Trainer(model=model, args=config, train_dataset=Dataset.from_list(texts), **reward,
                  processing_class=AutoTokenizer.from_pretrained("small"), callbacks=[Clock()])
    run.train()
    ticks = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(ends[:1] + ends, ends, strict=False)]
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    return result(algorithm, batch, ticks, losses, before)


SYSTEMS = {"ours": (ours, None), "TRL": (trl, "trl")}
CASES = dict.fromkeys(("sft fp32 8", "sft bf16 8", "dpo fp32 8", "dpo bf16 8", "grpo fp32 8",
                       "grpo fp32 32"), ["ours", "TRL"])

if __name__ == "__main__":
    harness.main("Post-training step", "samples", SYSTEMS, CASES, prepare,
                 dict.fromkeys(CASES, 2.5))
