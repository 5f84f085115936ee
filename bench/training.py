"""One optimizer step: forward, backward, clip, AdamW; ours as in pretrain.py, against transformers.

Shapes "small" and "large" are those of the peers' measurements, heads tied. bf16 is autocast over
fp32 weights. "moe" is the small shape with 8 experts, 2 of them active, and a shared one, whose
inner sizes 2 x 176 + 336 are the dense model's 688; its ratios are to our own dense model.
FLOPs a token = 6 x (weights it is multiplied by) + 6 x layers x hidden x T. Memory is the peak of
the resident set above the process with its weights, less AdamW's two moments: gradients,
activations, logits. Both start from the same weights; `check` compares the first loss.
"""
import harness
from harness import SMALL, memory, save_model, timed

SHAPES = {"small": SMALL,
          "large": dict(vocab_size=151936, hidden_size=512, intermediate_size=1376,
                        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2),
          "moe": SMALL | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=176,
                              shared_expert_intermediate_size=336)}
BATCH = {"small": (8, 256), "large": (2, 512), "moe": (8, 256)}


def prepare(case):
    shape = case.split()[0]
    for name in ("moe", "small") if shape == "moe" else (shape,):
        save_model(name, SHAPES[name])


def measure(name, case, model, step):
    """step(ids (B, T+1), autocast) -> loss."""
    import torch
    (B, T), shape, dtype = BATCH[name], SHAPES[name], case.split()[1]
    ids = torch.randint(shape["vocab_size"], (B, T + 1), generator=torch.Generator().manual_seed(0))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    for p in model.parameters():
        p.sum()  # both load weights as maps of the file: resident only once they are touched
    before, parameters = memory(reset=True), sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    matmul = sum(p.numel() for p in model.parameters() if p.ndim >= 2) - idle
    matmul += idle * shape.get("num_experts_per_tok", 0) // shape.get("num_experts", 1)
    flops = 6 * matmul + 6 * shape["num_hidden_layers"] * shape["hidden_size"] * T
    first = step(ids, autocast)
    out = timed(lambda: step(ids, autocast), repeats=2 if name == "large" else 4, warmup=0)
    above = memory(peak=True) - before - 2 * 4 * parameters / 1e6
    return out | {"work": B * T, "flops": B * T * flops, "dtype": dtype, "check": [first],
                  "extra": {"MB above weights + AdamW": above}}


def ours(case, name=None):
    harness.ours()
    import pretrain
    from lib.optim import adamw, clip_and_step, keep_freed_memory
    from model import Qwen2, load_balancing_loss
    name = name or case.split()[0]
    keep_freed_memory()
    model = Qwen2.from_pretrained(name)
    optimizer = adamw(model, 1e-4, 0.1)

    def step(ids, autocast):
        router = [] if model.config.num_experts else None
        with autocast:
            loss = pretrain.lm_loss(model, ids, None, ids[:, 1:].numel(), router)
        value = loss.item()
        if router:
            loss = loss + model.config.router_aux_loss_coef * load_balancing_loss(router)[0]
        loss.backward()
        clip_and_step(model, optimizer, 1e-4, 1.0)
        return value
    return measure(name, case, model, step)


def transformers(case):
    import torch
    from transformers import AutoModelForCausalLM
    name = case.split()[0]
    more = {"experts_implementation": "grouped_mm"} if name == "moe" else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **more).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    router = {"output_router_logits": True} if name == "moe" else {}

    def step(ids, autocast):
        targets = ids[:, 1:].contiguous()
        with autocast:
            out = model(ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False,
                        **router)
        value = out.loss.item()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value
    return measure(name, case, model, step)


def dense(case):
    out = ours(case, "small")
    del out["check"]  # another model, another loss
    return out


SYSTEMS = {"ours": (ours, None),
           "transformers, medium": (harness.medium(transformers), "transformers"),
           "transformers": (transformers, "transformers"), "ours dense": (dense, None)}
CASES = {f"{name} {dtype}": ["ours"] + ["transformers, medium"] * (dtype == "fp32")
         + ["transformers"] + ["ours dense"] * (name == "moe")
         for name in SHAPES for dtype in ("fp32", "bf16") if (name, dtype) != ("large", "fp32")}
TARGETS = {"small fp32": 1.15, "small bf16": 1.5, "large bf16": 1.3, "moe bf16": 0.9}

if __name__ == "__main__":
    harness.main("Training step", "tokens", SYSTEMS, CASES, prepare, TARGETS)
