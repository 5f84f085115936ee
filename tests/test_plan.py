"""lib/plan.py and `scaling.py plan`: the arithmetic of a plan against a counter of FLOPs, what
autograd keeps, and measured memory."""
import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_laws import fit_rows, make_rows, true_lr
from torch.utils.flop_counter import FlopCounterMode

import kernels
import lib.fast
import pretrain
import scaling
from lib.args import InputError
from lib.plan import count, flops, lora_parameters, memory
from model import PRESETS, Qwen2

ROOT = Path(__file__).parents[1]


def plan(laws, **flags):
    return scaling.plan(scaling.Args(**flags), laws)


def test_plan(capsys):
    laws = fit_rows(make_rows(), 5)
    out = plan(laws, model="1e9", tokens="1e11")
    assert out["C"] == pytest.approx(6e20)
    assert out["extrapolates"] and "x the nearest fitted" in capsys.readouterr().out
    inside = plan(laws, model="1e8", tokens="5e9")
    assert not inside["extrapolates"] and "inside the fitted" in capsys.readouterr().out
    assert inside["lr"] == pytest.approx(true_lr(1e8, 5e9), rel=1e-4)
    assert inside["lr_interval"][0] <= inside["lr"] * 1.0001
    for bad in ({}, {"model": "1e8"}, {"tokens": "1e9"}):
        with pytest.raises(InputError, match="needs --model and --tokens"):
            plan(laws, **bad)
    with pytest.raises(InputError, match="--model must be of type float, got '7b'"):
        plan(laws, model="7b", tokens="1e9")


def test_plan_of_a_preset(capsys):
    """Qwen2.5-7B on its 18T tokens: the report's counts, and every assumption printed."""
    out = plan({}, model="7B", tokens="18e12", gpus=64)
    said = capsys.readouterr().out
    assert out["N"] == 6_525_621_760 and out["C"] == pytest.approx(6 * 6_525_621_760 * 18e12)
    assert (out["lr"], out["batch"]) == pytest.approx((2.11e-3, 2.149e7), rel=1e-3)
    assert out["loss_interval"] == pytest.approx((1.9569, 2.0323), abs=1e-4)
    assert len(out["extrapolates"]) == 4 and "loss in D, 56" in said
    seconds = out["training_flops"] / (64 * 989e12 * 0.4)
    assert out["days"] == pytest.approx(seconds / 86400)
    for assumed in ("64 GPUs", "989 TFLOPS", "MFU 0.4", "FSDP over 64", "bf16", "1 x 4096 tokens",
                    "the range of: Step Law"):
        assert assumed in said, assumed
    assert out["memory"]["AdamW"] == 8 * 7_615_616_512 / 64 and "DOES NOT FIT" not in said
    plan({}, model="72B", tokens="18e12", gpus=8)
    assert "DOES NOT FIT" in capsys.readouterr().out
    moe = plan({}, model="Qwen2-57B-A14B", tokens="4.5e12")
    assert moe["N"] == 14_249_270_784 - 2 * 151936 * 3584
    assert "at its total N" in capsys.readouterr().out


def test_memory_of_lora_by_hand(capsys):
    """Qwen2.5-7B with rank 16 and gradient checkpointing, one row of 4,096 tokens on one GPU. C is
    3584, keys and values 512 wide, an MLP 18944, 28 layers: all written out."""
    C, keys, inner, layers, total = 3584, 512, 18944, 28, 7_615_616_512
    trained = 16 * layers * (2 * (C + C) + 2 * (C + keys) + 3 * (C + inner))
    assert lora_parameters(PRESETS["7B"], 16) == trained == 40_370_176
    parts = memory(PRESETS["7B"], 1, 1, 4096, checkpointing=True, lora=16)
    block = 6_525_621_760 // layers
    assert parts == {
        "weights": 2 * total + 4 * trained,                  # bf16 base, float32 adapters
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "activations": 4096 * (4 * C * layers + 8 * C),      # each block's input; the final norm
        "gathered": 2 * block + 8 * C * inner,               # W + B A of one block, in bf16
        "head": 3 * 4 * 2 ** 27}
    assert 20.2e9 < sum(parts.values()) < 20.4e9             # the whole would take 130 GB
    whole = memory(PRESETS["7B"], 1, 1, 4096, checkpointing=True)
    assert whole["weights"] + whole["gradients"] + whole["AdamW"] == 16 * total
    kept = memory(PRESETS["7B"], 1, 1, 4096, lora=16)["gathered"]
    assert kept == 2 * block * layers + 8 * C * inner        # without checkpointing: of all blocks
    moe = PRESETS["Qwen2-57B-A14B"]                          # attention and the shared expert
    per_layer = 2 * (C + C) + 2 * (C + keys) + 3 * (C + 20480)
    assert lora_parameters(moe, 8) == 8 * 28 * per_layer
    plan({}, model="7B", tokens="1e6", gpus=1, lora=16, gradient_checkpointing=True, gpu_gb=24.0)
    said = capsys.readouterr().out
    assert "memory per GPU: 20.3 GB of 24" in said and "DOES NOT FIT" not in said
    assert "bf16 weights, float32 adapters" in said
    with pytest.raises(InputError, match="--lora"):
        plan({}, model="7B", tokens="1e6", lora=-1)


def test_recomputing_the_blocks_costs_a_third_of_their_flops():
    """By hand, of the 0.5B: a token takes 6 N of weights, 6 V C of the head, and 12 L C T."""
    once = plan({}, model="0.5B", tokens="1e6", seq_len=4096)["training_flops"]
    twice = plan({}, model="0.5B", tokens="1e6", seq_len=4096, gradient_checkpointing=True)
    head = 6 * 151_936 * 896 * 1e6
    assert twice["training_flops"] - once == pytest.approx((once - head) / 3)


@pytest.mark.parametrize("name", ["micro", "micro-moe"])
def test_flops_against_a_counter(name, monkeypatch):
    """R6.1: within 1%; what is left are norms and biases, in N but in no matrix product. torch's
    counter knows neither a CPU's fused attention nor grouped matmuls: the reference kernels."""
    monkeypatch.setattr(kernels, "experts", functools.partial(kernels.experts, impl="reference"))
    config, T = PRESETS[name], 128
    model, old = Qwen2(config), kernels.set_default_impl("reference")
    lib.fast.set_cpu_matmul(2**27, 1, torch.device("cpu"))  # the trial is no part of the model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.long))
    kernels.set_default_impl(*old)
    ours = flops(count(config)["N"], T, config, T)
    assert ours == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


def small(moe: bool):
    experts = {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 192} if moe else {}
    return replace(PRESETS["tiny-moe" if moe else "tiny"], vocab_size=512, **experts)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(moe, bf16, monkeypatch):
    """Every tensor saved for the backward pass, counted once a storage; with attention in bf16, as
    on a GPU."""
    monkeypatch.setattr(lib.fast, "set_cpu_matmul", lambda *args: None)
    monkeypatch.setattr(kernels, "experts", functools.partial(kernels.experts, impl="reference"))
    torch.set_float32_matmul_precision("highest")
    config, B, T, kept = small(moe), 4, 256, {}
    model = Qwen2(config)
    shapes = {p.shape[-2:] for p in model.parameters() if p.ndim > 1}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        copy = {tensor.shape[-2:], tensor.mT.shape[-2:] if tensor.ndim > 1 else ()} & shapes
        if storage.data_ptr() not in weights and not copy:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    ids = torch.randint(0, 512, (B, T + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(
            "cpu", torch.bfloat16, enabled=bf16):
        loss = pretrain.lm_loss(model, ids, None, B * T, [] if moe else None)
    ours = memory(config, 1, B, T, bf16)["activations"]
    assert loss.requires_grad and ours == pytest.approx(sum(kept.values()), rel=0.02)


TRAIN = """
import sys
import torch
import lib.dist, lib.fast, lib.lora, lib.optim, lib.plan, lib.run, pretrain
from dataclasses import replace
from model import PRESETS, Qwen2

name, bf16, T = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
recompute = sys.argv[4] == "1"
lora = int(sys.argv[5])

def train(config, rows, T):
    autocast = torch.autocast("cpu", torch.bfloat16 if bf16 else torch.float32, enabled=bf16)
    model = Qwen2(config).to(lib.lora.base_dtype(lora, autocast))
    lib.lora.add_lora(model, lora, 32.0)
    model = lib.dist.apply_fsdp(model, autocast)
    model.gradient_checkpointing = recompute
    optimizer = lib.optim.adamw(model, 1e-3, 0.1)
    for _ in range(2):
        for _ in range(2):
            ids = torch.randint(0, config.vocab_size, (rows, T + 1))
            with autocast:
                router = [] if config.num_experts else None
                pretrain.lm_loss(model, ids, None, 2 * rows * T, router).backward()
        lib.optim.clip_and_step(model, optimizer, 1e-3, 1.0)

config = replace(PRESETS[name], hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
                 vocab_size=2048)
if config.num_experts:
    config = replace(config, moe_intermediate_size=256, shared_expert_intermediate_size=512)
lib.dist.init_distributed()
lib.fast.set_cpu_matmul = lambda *args: None  # oneDNN has memory of its own
train(PRESETS[name.replace("tiny", "micro")], 2, 64)  # the libraries' own memory
before = lib.run.peak_rss_mb()
train(config, 8, T)
need = lib.plan.memory(config, lib.dist.WORLD, 8, T, bf16, False, recompute, lora)
sys.stdout.write(f"{lib.run.peak_rss_mb() - before} {sum(need.values())}\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
@pytest.mark.parametrize("name, bf16, T, processes, recompute, lora", [
    ("tiny", False, 128, 1, 0, 0), ("tiny", True, 128, 1, 0, 0), ("tiny-moe", False, 128, 1, 0, 0),
    ("tiny", False, 128, 2, 0, 0), ("tiny", True, 16, 2, 0, 0), ("tiny", False, 128, 1, 1, 0),
    ("tiny-moe", False, 128, 1, 1, 0), ("tiny", False, 512, 1, 1, 0), ("tiny", False, 128, 2, 1, 0),
    ("tiny", True, 128, 1, 0, 8), ("tiny", True, 128, 1, 1, 8)])
def test_memory_against_a_measured_run(name, bf16, T, processes, recompute, lora):
    """R0.5: two steps of two micro-batches in processes of their own, one or two that share the
    weights (FSDP), within 15% of the peak. Freed memory must go back to the system, or the
    allocator is measured. (Not the MoE in bf16: on a CPU its grouped matmuls take 0.3 GB that
    autograd does not keep.)"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", "--no-python"] * (processes > 1)
    out = subprocess.run([*command, sys.executable, "-c", TRAIN, name, str(bf16), str(T),
                          str(recompute), str(lora)], cwd=ROOT, env=env,
                         capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) == processes
    for measured, predicted in (map(float, line.split()) for line in out.splitlines()):
        assert predicted / 1e6 == pytest.approx(measured, rel=0.15)
