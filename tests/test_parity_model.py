"""model.py against transformers, the oracle of `make test-parity`: logits, gradients, directories
both ways, and what must be refused because Qwen2 does not have it.
R numbers: docs/requirements.md."""
import json
import logging
import random
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from test_model import CONFIGS, DENSE, SPARSE, edit_weights, random_ids, scramble

from model import Config, Qwen2, load_balancing_loss

transformers = pytest.importorskip("transformers", reason="make test-parity installs it")
NO_SHARED_EXPERT = "Initializing zero-element tensors"  # torch, of an empty shared expert
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(f"ignore:{NO_SHARED_EXPERT}")]

DENSE_FIELDS = list(vars(DENSE))[:11]


def random_config(seed: int) -> Config:
    """A small Qwen2 (even seeds) or Qwen2-MoE (odd seeds) with everything else drawn."""
    pick = random.Random(seed).choice
    kv, ratio, D = pick([1, 2, 3]), pick([1, 2, 3, 4, 6, 8]), pick([2, 4, 6, 8, 16])
    config = Config(
        vocab_size=pick([50, 101, 257]), hidden_size=kv * ratio * D,
        intermediate_size=pick([8, 30, 64, 101]), num_hidden_layers=pick([2, 3, 4]),
        num_attention_heads=kv * ratio, num_key_value_heads=kv, max_position_embeddings=64,
        rms_norm_eps=pick([1e-6, 1e-5, 1e-3]), rope_theta=pick([100.0, 10_000.0, 5e5, 1e6]),
        tie_word_embeddings=pick([True, False]))
    if seed % 2 == 0:
        return config
    E = pick([1, 3, 8])
    return replace(config, num_experts=E, num_experts_per_tok=min(E, pick([1, 2, 4])),
                   moe_intermediate_size=pick([6, 20, 32]), norm_topk_prob=pick([True, False]),
                   shared_expert_intermediate_size=pick([4, 12, 40]),
                   decoder_sparse_step=pick([1, 2]), mlp_only_layers=pick([(), (0,), (2,)]))


WIDE = replace(DENSE, hidden_size=64, num_attention_heads=8)
HAND = CONFIGS | {
    "8 heads on 8": replace(WIDE, num_key_value_heads=8),
    "8 heads on 4": replace(WIDE, num_key_value_heads=4, rms_norm_eps=1e-5),
    "8 heads on 2": replace(WIDE, num_key_value_heads=2, rope_theta=10_000.0),
    "8 heads on 1": replace(WIDE, num_key_value_heads=1, tie_word_embeddings=True),
    "head size 2": replace(DENSE, num_attention_heads=16, num_key_value_heads=4),
    "head size 64": replace(DENSE, hidden_size=128, num_attention_heads=2, num_key_value_heads=1),
    "moe norm_topk every 2nd": replace(SPARSE, norm_topk_prob=True, decoder_sparse_step=2),
}
EVERY = HAND | {f"random {seed}": random_config(seed) for seed in range(24)}
SOME = {name: HAND[name] for name in ("gqa", "tied", "moe", "moe every 2nd")}
every_config = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY.keys())
some_configs = pytest.mark.parametrize("config", SOME.values(), ids=SOME.keys())


def kind(what: str, config: Config) -> str:
    return f"{what}, {'MoE' if config.num_experts else 'dense'}"


def randomise(model):
    """`scramble`d, and scaled down where it is wide: 1e-5 is meant for logits of order 1."""
    scramble(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.shape[-1] > 32:
                p.mul_((32 / p.shape[-1]) ** 0.5)
    return model


def build(config: Config) -> Qwen2:
    return randomise(Qwen2(config))


def theirs(config: Config):
    """The same architecture, built and initialised by transformers."""
    moe = config.num_experts > 0
    Theirs, TheirConfig = (transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig) if moe \
        else (transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
    values = {k: v for k, v in vars(config).items() if moe or k in DENSE_FIELDS}
    values.pop("torch_dtype", None)  # ours is a note about the files
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    if moe:
        values["mlp_only_layers"] = list(config.mlp_only_layers)
    hf = Theirs._from_config(TheirConfig(**values), attn_implementation="eager",
                             experts_implementation="eager")
    return randomise(hf)


def loaded_by_transformers(path, dtype=torch.float32):
    """-> their model, and everything that loading it complained about."""
    complaints = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", NO_SHARED_EXPERT)
            hf, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, attn_implementation="eager",
                experts_implementation="eager")
    finally:
        logger.removeHandler(handler)
    complaints += [str(w.message) for w in caught]
    return hf, complaints + [f"{k}: {v}" for k, v in info.items() if v]


def to_version_4(path) -> None:
    """Rewrite config.json as transformers 4 wrote it, and the published Qwen2.5 files have it."""
    config = json.loads((path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    for name in ("layer_types", "bos_token_id", "eos_token_id", "pad_token_id"):
        config.pop(name, None)
    config |= {"transformers_version": "4.43.1", "sliding_window": 131072, "max_window_layers": 28,
               "rope_scaling": None, "use_mrope": False, "bos_token_id": 151643}
    (path / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------
# theirs -> ours

@every_config
def test_logits_and_gradients_of_a_directory_written_by_transformers(config, tmp_path, compare):
    """R3.1: logits to 1e-5, gradients to 1e-4, both largest absolute differences."""
    hf, ids = theirs(config), random_ids(2, 17, vocab=config.vocab_size)
    hf.save_pretrained(tmp_path)
    ours = Qwen2.from_pretrained(tmp_path)
    assert ours.config == config
    want, got = hf(ids).logits, ours(ids)
    assert want.std() > 0.1  # else the tolerances would say nothing
    compare(kind("logits", config), got, want, 1e-5)
    for logits in (want, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs_, ours_ = (dict(m.named_parameters()) for m in (hf, ours))
    assert not {k for k, p in theirs_.items() if p.numel() and "lm_head" not in k} - ours_.keys()
    for name, p in ours_.items():
        if ".mlp.gate." not in name or config.num_experts > 1:  # one expert: nothing to choose
            assert p.grad.abs().max() > 0, name
        compare(kind("gradients", config), p.grad, theirs_[name].grad, 1e-4)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@some_configs
def test_both_config_forms_whole_and_sharded(config, sharded, version, tmp_path, compare):
    hf, ids = theirs(config), random_ids(2, 9)
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == sharded
    text = (tmp_path / "config.json").read_text()
    assert '"rope_parameters"' in text and '"rope_theta"' in text and "torch_dtype" not in text
    if version == 4:
        to_version_4(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert '"rope_theta"' in text and "rope_parameters" not in text and "torch_dtype" in text
    ours = Qwen2.from_pretrained(tmp_path)
    assert ours.config == config
    compare(kind(f"logits, transformers {version} config form", config), ours(ids),
            hf(ids).logits, 1e-5)


@some_configs
def test_bfloat16_files_load_as_bfloat16_and_as_float32(config, tmp_path, compare):
    hf, ids = theirs(config).bfloat16(), random_ids(2, 9)
    hf.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    want, their_complaints = loaded_by_transformers(tmp_path)
    assert not their_complaints
    rounded = dict(want.named_parameters())
    for dtype in (torch.float32, torch.bfloat16):
        ours = Qwen2.from_pretrained(tmp_path, dtype=dtype)
        for name, p in ours.named_parameters():
            assert p.dtype == dtype
            compare(kind("weights of bfloat16 files", config), p.float(), rounded[name])
        if dtype == torch.float32:
            compare(kind("logits of bfloat16 files in float32", config), ours(ids),
                    want(ids).logits, 1e-5)


def test_every_key_that_transformers_knows_may_be_written_out(tmp_path):
    """Not only those that differ from the defaults, as save_pretrained does."""
    for config in (DENSE, SPARSE):
        hf = theirs(config)
        hf.save_pretrained(tmp_path)
        full = hf.config.to_dict()
        assert len(full) > 2 * len(DENSE_FIELDS)
        (tmp_path / "config.json").write_text(json.dumps(full, default=str))
        assert Qwen2.from_pretrained(tmp_path).config == config


# ---------------------------------------------------------------------------------------------
# ours -> theirs

@every_config
def test_transformers_reads_what_we_write(config, tmp_path, compare):
    """R3.6: no missing, unexpected or mismatched key, and not a word in its log."""
    model, ids = build(config), random_ids(2, 11, vocab=config.vocab_size)
    model.save_pretrained(tmp_path)
    hf, complaints = loaded_by_transformers(tmp_path)
    assert not complaints
    assert type(hf).__name__ == f"Qwen2{'Moe' * (config.num_experts > 0)}ForCausalLM"
    with torch.no_grad():
        compare(kind("logits of what we write", config), hf(ids).logits, model(ids), 1e-5)


@pytest.mark.parametrize("spoil, word", [
    ({"model.layers.1.mlp.up_proj.weight": None}, "MISSING"),
    ({"model.layers.1.self_attn.o_proj.bias": torch.ones(32)}, "UNEXPECTED"),
    ({"model.norm.weight": torch.ones(31)}, "ize")])  # "size mismatch", an exception
def test_a_complaint_of_transformers_would_be_heard(spoil, word, tmp_path):
    """The test above could pass because nobody listened."""
    build(DENSE).save_pretrained(tmp_path)
    edit_weights(tmp_path, **spoil)
    try:
        _, complaints = loaded_by_transformers(tmp_path)
    except RuntimeError as error:
        complaints = ["", str(error)]
    assert len(complaints) >= 2 and any(word in line for line in complaints), complaints


def test_bfloat16_weights_are_written_as_such(tmp_path, compare):
    model = build(SPARSE).bfloat16()
    model.save_pretrained(tmp_path)
    hf, complaints = loaded_by_transformers(tmp_path, dtype="auto")
    assert not complaints and hf.dtype == torch.bfloat16
    theirs_ = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        compare("weights of bfloat16 files, MoE", theirs_[name].float(), p.float())


# ---------------------------------------------------------------------------------------------
# what Qwen2 does not have

REFUSED = [
    {"model_type": "llama"}, {"model_type": "qwen3"}, {"model_type": "qwen2_vl"},
    {"model_type": None}, {"use_sliding_window": True},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    {"layer_types": ["linear_attention"] * 3}, {"qkv_bias": False}, {"attention_bias": False},
    {"mlp_bias": True}, {"hidden_act": "gelu"}, {"hidden_act": None},
    {"attention_dropout": 0.1}, {"head_dim": 16}, {"qk_norm": True}, {"use_qk_norm": True},
    {"use_mrope": True}, {"partial_rotary_factor": 0.5}, {"is_causal": False},
    {"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"num_key_value_heads": None},
    {"hidden_size": "32"},
]
REFUSED_MOE = [{"num_experts_per_tok": 9}, {"num_experts_per_tok": None}, {"num_experts": None},
               {"moe_intermediate_size": 0}]
HARMLESS = [
    {"use_sliding_window": None, "sliding_window": 32768, "max_window_layers": 2},
    {"layer_types": None}, {"layer_types": ["full_attention"] * 3}, {"head_dim": None},
    {"head_dim": 8}, {"attention_dropout": 0}, {"qkv_bias": True}, {"attention_bias": True},
    {"mlp_bias": False}, {"use_mrope": False}, {"quantization_config": None},
    {"partial_rotary_factor": 1.0}, {"pretraining_tp": 1}, {"use_cache": False},
    {"auto_map": {"AutoModel": "x.Y"}}, {"a_key_of_tomorrow": [1, 2]}, {"dtype": "float16"},
]


def with_edit(path, config, edit) -> None:
    build(config).save_pretrained(path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | edit))


@pytest.mark.parametrize("edit", REFUSED + REFUSED_MOE, ids=str)
def test_what_qwen2_does_not_have_is_refused_in_one_line(edit, tmp_path):
    with_edit(tmp_path, SPARSE if edit in REFUSED_MOE else DENSE, edit)
    name, = edit
    word = {"num_attention_heads": "heads", "num_key_value_heads": "key",
            "num_experts_per_tok": "experts"}.get(name, name)
    refuses(lambda: Qwen2.from_pretrained(tmp_path), word)


@pytest.mark.parametrize("edit", HARMLESS, ids=str)
def test_what_changes_nothing_is_read_past(edit, tmp_path):
    with_edit(tmp_path, DENSE, edit)
    assert Qwen2.from_pretrained(tmp_path).config == DENSE


@pytest.mark.parametrize("extra, word", [
    ("model.layers.0.self_attn.o_proj.bias", "o_proj.bias"),
    ("model.layers.0.self_attn.q_norm.weight", "q_norm"),
    ("model.layers.0.mlp.gate_proj.bias", "gate_proj.bias"),
    ("lm_head.bias", "lm_head.bias")])
def test_weights_that_qwen2_does_not_have_are_refused(extra, word, tmp_path):
    """Also where config.json says nothing about them."""
    build(DENSE).save_pretrained(tmp_path)
    edit_weights(tmp_path, **{extra: torch.ones(32)})
    refuses(lambda: Qwen2.from_pretrained(tmp_path), word, "does not belong")


def test_a_moe_without_a_shared_expert_is_no_qwen2(tmp_path):
    """All published ones have it, and transformers asks for its (empty) weights without it."""
    build(SPARSE).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["shared_expert_intermediate_size"] = 0
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refuses(lambda: Qwen2.from_pretrained(tmp_path), "shared_expert_intermediate_size is 0")
    alone = build(replace(SPARSE, shared_expert_intermediate_size=0))
    refuses(lambda: alone.save_pretrained(tmp_path / "new"), "needs a shared expert")


# ---------------------------------------------------------------------------------------------
# balance

@pytest.mark.parametrize("E, k", [(6, 2), (8, 4), (4, 1)])
def test_balance_loss_equals_transformers(E, k, compare):
    """R5.3: of one layer, with padding and without. Over several layers theirs pools (R5.2) and
    ours averages; pooled by hand, ours gives theirs."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func
    generator = torch.Generator().manual_seed(E)
    layers = [torch.randn(12, E, generator=generator) * 2 for _ in range(3)]
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for mask in (None, valid):
        for logits in (layers[:1], layers):
            want = load_balancing_loss_func(tuple(logits), E, k, mask)
            probs = torch.cat(logits).softmax(-1)
            keep = slice(None) if mask is None else mask.bool().repeat(len(logits), 1).flatten()
            got, *_ = load_balancing_loss([(probs[keep], probs.topk(k).indices[keep])])
            compare("balance loss", got, want, 1e-5)
