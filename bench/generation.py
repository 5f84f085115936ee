"""Greedy generation, fp32: ours, sample.generate, against transformers generate.

The peers' small model. Their prompt length is not on record; here prompts have 32 random ids and
128 tokens follow each, none of which stops a row: the steps a second of that record agree with 128.
Transformers runs with its dynamic cache, its fastest without compilation. Weights are random, but
awake (no matrix is zero), so that the tokens compared are not all the same one. FLOPs: 2 x weights
a token, attention left out. "Of memory": the time to read the weights, and as many keys and values
as a step sees on average, at the rate at which this process sums the weights, over a step's time.
Ours keeps freed memory, as every script of the project does (optim.setup).
"""
import harness
from harness import SMALL, memory, save_model, timed

NEW, PROMPT = 128, 32


def measure(case, model, generate):
    """generate(prompts) -> rows of new ids."""
    import torch
    batch = int(case.split()[1])
    torch.manual_seed(0)
    prompts = torch.randint(SMALL["vocab_size"], (batch, PROMPT))
    weights = [p.detach() for p in model.parameters() if p.ndim >= 2]
    matmul, read = sum(w.numel() for w in weights), timed(lambda: [w.sum() for w in weights], 50)
    seen = 2 * batch * (PROMPT + NEW / 2) * SMALL["num_hidden_layers"] * 2 * 64  # 2 heads of 64
    before = memory(reset=True)
    out = timed(lambda: generate(prompts.tolist()), repeats=3 if batch < 64 else 2)
    rows = out["result"]
    assert [len(row) for row in rows] == [NEW] * batch, [len(row) for row in rows]
    return out | {"work": batch * NEW, "flops": batch * (NEW + PROMPT) * 2 * matmul,
                  "dtype": "fp32", "check": [token for row in rows for token in row],
                  "extra": {"ms a step": 1e3 * out["cpu"] / NEW,
                            "of memory": read["cpu"] * (1 + seen / matmul) * NEW / out["cpu"],
                            "MB above weights": memory(peak=True) - before}}


def ours(case):
    harness.ours()
    import sample
    from lib.optim import keep_freed_memory
    from model import Qwen2
    keep_freed_memory()
    model = Qwen2.from_pretrained("small")
    return measure(case, model, lambda prompts: [
        c.ids for c in sample.generate(model, prompts, NEW, temperature=0.0)])


def transformers(case):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("small", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts):
        ids = torch.tensor(prompts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                             do_sample=False, pad_token_id=0)
        return out[:, PROMPT:].tolist()
    return measure(case, model, generate)


SYSTEMS = {"ours": (ours, None),
           "transformers, medium": (harness.medium(transformers), "transformers"),
           "transformers": (transformers, "transformers")}
CASES = {f"batch {n}": list(SYSTEMS) for n in (1, 16, 64)}

if __name__ == "__main__":
    harness.main("Generation", "new tokens", SYSTEMS, CASES,
                 lambda case: save_model("small"), dict.fromkeys(CASES, 2))
