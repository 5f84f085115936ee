"""lib/lora.py: the formula, freezing, merging, the reference policy, and PEFT as the oracle."""
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    interrupt_at, letter_queries, log, micro_model, refuses, same_weights, stage_args,
    teach_letters, tiny_model, weights, write_rows)
from safetensors.torch import load_file, save_file

import dpo
import grpo
import sft
from lib.args import InputError
from lib.cache import KVCache
from lib.decode import DecodeStep
from lib.checkpoint import merge_adapter
from lib.lora import LowRank, adapters, adapters_off, add_lora, merged_state_dict
from model import Qwen2
from sample import load_policy

IDS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))


def chats(path) -> str:
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."},
                          {"role": "assistant", "content": f"{i}, " * (1 + i % 5) + "done."}]}
            for i in range(10)]
    return write_rows(path, rows)


def with_lora(rank=4, alpha=8.0, awake=True, **changes) -> Qwen2:
    model = tiny_model(**changes)
    add_lora(model, rank, alpha)
    if awake:
        torch.manual_seed(1)
        for adapter in adapters(model).values():
            torch.nn.init.normal_(adapter.B, std=0.1)
    return model


def test_the_sum_by_hand():
    low_rank = LowRank(torch.zeros(2, 3), rank=1, alpha=4.0)
    low_rank.A.data = torch.tensor([[1.0, 2.0, 3.0]])
    low_rank.B.data = torch.tensor([[1.0], [-1.0]])
    weight = torch.full((2, 3), 10.0)
    expected = torch.tensor([[14.0, 18.0, 22.0], [6.0, 2.0, -2.0]])  # 10 + 4/1 * B A
    assert torch.equal(low_rank(weight), expected)
    low_rank.A.data += 1 / 1024  # what is trained under autocast is what is saved: not rounded
    saved = low_rank(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low_rank(weight), saved) and not torch.equal(saved, expected)


def test_the_first_forward_pass_is_the_base_model_bit_for_bit():
    assert torch.equal(with_lora(awake=False)(IDS), tiny_model()(IDS))


def test_only_the_adapters_are_trained():
    model = with_lora(rank=4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Of each of two blocks: q 32x32, k and v 32x16, o 32x32, gate and up 32x48, down 48x32.
    sides = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 48) + (48 + 32)
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * sides
    assert len(adapters(model)) == 14
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_base_model_is_one_switch_away():
    model = with_lora()
    changed = model(IDS)
    with adapters_off(model):
        assert torch.equal(model(IDS), tiny_model()(IDS))
    assert torch.equal(model(IDS), changed) and not torch.equal(changed, tiny_model()(IDS))


def test_merged_weights_give_the_same_logits_under_the_plain_names():
    model, plain = with_lora(), tiny_model(seed=3)
    plain.load_state_dict(merged_state_dict(model))
    assert torch.equal(plain(IDS), model(IDS))


def test_the_fast_decode_step_reads_the_sums():
    """No plain pass and no warning; the same next token's logits as the whole forward pass."""
    model = with_lora()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = KVCache(model.config, 2, 9, "cpu", torch.float32)
        model.hidden(IDS[:, :8], cache=cache)
        step = DecodeStep(model, cache)
        logits = step.logits(step(IDS[:, 8]))
    assert not step.is_plain
    torch.testing.assert_close(logits, model(IDS)[:, -1], rtol=1e-5, atol=1e-4)


def test_of_an_moe_routed_experts_and_router_stay_frozen():
    model = with_lora(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                      shared_expert_intermediate_size=24)
    names = set(adapters(model))
    assert "model.layers.0.mlp.shared_expert.down_proj" in names and len(names) == 14
    assert not any("experts." in name.replace("shared_expert.", "") for name in names)


@pytest.fixture()
def base(tokenizer, tmp_path) -> str:
    path = tmp_path / "base"
    micro_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run_sft(base, out, data, **values):
    return sft.main(stage_args(sft, init=base, out=str(out), data=data, epochs=2, batch_size=4,
                               max_len=128, lora=4, **values))


def test_a_run_directory_is_a_merged_model_beside_its_adapter(base, tmp_path):
    data = chats(tmp_path / "chats.jsonl")
    run_sft(base, tmp_path / "run", data)
    merged, _ = load_policy(str(tmp_path / "run"), "cpu")
    rebuilt, tokenizer = load_policy(str(tmp_path / "run" / "adapter"), "cpu")
    assert merged.state_dict().keys() == Qwen2.from_pretrained(base).state_dict().keys()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], weight, rtol=0, atol=1e-6)
    frozen = weights(base)["model.embed_tokens.weight"]
    assert torch.equal(weights(tmp_path / "run")["model.embed_tokens.weight"], frozen)
    assert log(tmp_path / "run")[-1]["loss"] < log(tmp_path / "run")[0]["loss"]
    sft.main(stage_args(sft, init=base, out=str(tmp_path / "run"), data=data, epochs=0.4,
                        batch_size=4, max_len=128, overwrite=True))
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_can_be_the_base_of_the_next(base, tmp_path):
    """The second adapter's base is the first; a base that comes round again is one line. Each has
    the tokenizer of its run, with its system prompt."""
    data = chats(tmp_path / "chats.jsonl")
    run_sft(base, tmp_path / "one", data, lr=0.01, system="Be brief.")
    first = str(tmp_path / "one" / "adapter")
    run_sft(first, tmp_path / "two", data, lr=0.01)
    whole, _ = load_policy(tmp_path / "two", "cpu")
    rebuilt, tokenizer = load_policy(tmp_path / "two" / "adapter", "cpu")
    assert (Qwen2.from_pretrained(base)(IDS) - whole(IDS)).abs().max() > 0.01
    torch.testing.assert_close(rebuilt(IDS), whole(IDS), rtol=0, atol=1e-5)
    asked = [{"role": "user", "content": "Hi"}]
    for path in (first, tmp_path / "two" / "adapter"):
        _, tokenizer = load_policy(path, "cpu")
        assert "Be brief." in tokenizer.decode(tokenizer.render(asked)[0])
        for file in Path(path).glob("*token*"):  # as PEFT's directories may be: the base's is read
            file.unlink()
    for name in ("vocab.json", "merges.txt"):
        (Path(first) / name).unlink()
    _, tokenizer = load_policy(first, "cpu")
    assert "Be brief." not in tokenizer.decode(tokenizer.render(asked)[0])
    file = Path(first) / "adapter_config.json"
    for base, words in ((str(tmp_path / "two" / "adapter"), "own base"), (None, "does not name")):
        file.write_text(json.dumps(json.loads(file.read_text())
                                   | {"base_model_name_or_path": base}))
        refuses(lambda: load_policy(first, "cpu"), words)


def test_an_interrupted_run_continues_bit_for_bit(base, tmp_path, monkeypatch):
    data = chats(tmp_path / "chats.jsonl")
    run_sft(base, tmp_path / "whole", data)
    interrupt_at(monkeypatch, sft, 3)
    with pytest.raises(KeyboardInterrupt):
        run_sft(base, tmp_path / "cut", data)
    monkeypatch.undo()
    run_sft(base, tmp_path / "cut", data, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_under_bfloat16_the_base_is_frozen_in_bfloat16_and_adapters_are_not(base, tmp_path):
    """The same losses as in float32 up to bfloat16's rounding; the merged model is one to load."""
    data = chats(tmp_path / "chats.jsonl")
    run_sft(base, tmp_path / "fp32", data, lr=0.01)
    run_sft(base, tmp_path / "bf16", data, lr=0.01, dtype="bfloat16")
    for one, two in zip(log(tmp_path / "fp32"), log(tmp_path / "bf16"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
    adapter = load_file(tmp_path / "bf16" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    load_policy(str(tmp_path / "bf16"), "cpu")


def test_dpo_starts_at_ln_2_and_learns(base, tmp_path):
    """The reference policy is the base model, which an adapter with B = 0 leaves as it is."""
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}, done.", "rejected": f"No {i}."}
             for i in range(8)]
    args = stage_args(dpo, init=base, out=str(tmp_path / "run"), epochs=4, batch_size=8, lr=0.01,
                      data=write_rows(tmp_path / "pairs.jsonl", pairs), lora=4, rpo_alpha=0.0)
    dpo.main(args)
    losses = [row["loss"] for row in log(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.69


def test_the_reference_policy_of_grpo_is_the_model_without_its_adapters(tokenizer, tmp_path):
    values = dict(init=str(teach_letters(tokenizer, tmp_path / "policy")), steps=3, lr=0.02,
                  queries=letter_queries(tmp_path / "letters.jsonl"), batch_queries=2, kl=0.1,
                  max_new_tokens=4, query_order="random", warmup=0)
    grpo.main(stage_args(grpo, out=str(tmp_path / "lora"), lora=4, **values))
    kl = [row["kl"] for row in log(tmp_path / "lora")]
    assert kl[0] == 0.0 and kl[2] > 1e-4


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "only plain LoRA"),
    ({"peft_type": "IA3"}, "only plain LoRA"), ({"bias": "all"}, "only plain LoRA"),
    ({"lora_alpha": None}, "lora_alpha is None"), ({"r": 0}, "r is 0, not a positive number")])
def test_an_adapter_of_another_kind_is_refused(base, tmp_path, change, message):
    run_sft(base, tmp_path / "run", chats(tmp_path / "chats.jsonl"))
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        merge_adapter(Qwen2.from_pretrained(base), file.parent)


@pytest.mark.parametrize("change", ["another name", "no B", "another shape", "one row",
                                    "another r", "a vector"])
def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path, change):
    run_sft(base, tmp_path / "run", chats(tmp_path / "chats.jsonl"))
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    if change == "another name":
        weights["base_model.model.lm_head.weight"] = weights.pop(name)
    elif change == "no B":
        del weights[name]
    elif change == "another shape":
        weights[name] = weights[name][:5]
    elif change == "one row":  # which would be added to all rows
        weights[name] = weights[name][:1]
    elif change == "another r":  # which would weaken the adapter
        weights = {n: torch.cat([w, w], int("lora_B" in n)) for n, w in weights.items()}
    else:  # a weight without rows: a norm
        norm = "base_model.model.model.norm.lora_"
        weights |= {f"{norm}{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(weights, file)
    with pytest.raises(InputError, match="does not fit the base model"):
        merge_adapter(Qwen2.from_pretrained(base), file.parent)
    save_file({}, file)
    with pytest.raises(InputError, match="holds no adapter"):
        merge_adapter(Qwen2.from_pretrained(base), file.parent)
    save_file({"x": torch.tensor([[1.0, math.nan]])}, file)
    with pytest.raises(InputError, match="weight x holds NaN or infinity"):
        merge_adapter(Qwen2.from_pretrained(base), file.parent)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match="not a safetensors file"):
        merge_adapter(Qwen2.from_pretrained(base), file.parent)
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        merge_adapter(Qwen2.from_pretrained(base), file.parent)


# ---------------------------------------------------------------------------------------------
# PEFT

@pytest.mark.parity
def test_peft_reads_our_adapter_and_computes_the_same(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    run_sft(base, tmp_path / "run", chats(tmp_path / "chats.jsonl"), lr=0.01)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "run" / "adapter")
    ours, _ = load_policy(str(tmp_path / "run"), "cpu")
    before = Qwen2.from_pretrained(base)(IDS)
    assert (ours(IDS) - before).abs().max() > 0.01  # the adapter matters
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parity
def test_three_steps_lose_as_peft_does_and_its_adapter_can_be_merged(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    theirs = peft.get_peft_model(theirs, config)
    ours = Qwen2.from_pretrained(base)
    add_lora(ours, 4, 32.0)
    peft_weights = theirs.state_dict()
    for name, adapter in adapters(ours).items():
        key = f"base_model.model.{name}.lora_"
        adapter.A.data = peft_weights[f"{key}A.default.weight"].clone()
        adapter.B.data = peft_weights[f"{key}B.default.weight"].clone()
    losses = {}
    for which, model, logits in (("peft", theirs, lambda ids: theirs(ids).logits),
                                 ("ours", ours, ours)):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
        losses[which] = []
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(logits(IDS[:, :-1]).flatten(0, 1),
                                                     IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[which].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["peft"], abs=1e-5)
    assert losses["ours"][2] < losses["ours"][0] - 0.01
    theirs.save_pretrained(tmp_path / "adapter")
    read = Qwen2.from_pretrained(base)
    merge_adapter(read, Path(tmp_path / "adapter"))
    torch.testing.assert_close(read(IDS), theirs(IDS).logits, rtol=0, atol=1e-5)
