"""The published directory format: config.json and safetensors files, in and out.

Names in the files are those of model.py, with one exception: a published MoE stores every expert's
three matrices apart, model.py stacks them. Everything that Qwen2 does not have is refused.
"""
import json
import math
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.args import InputError, require
from lib.files import read_json, atomic_path, write_atomic

SHARD_BYTES = 5 * 10**9  # weights above this are split over several files, as the Hub does

# ---------------------------------------------------------------------------------------------
# the whole directory

def load_model(Model, Config, path: str | Path, dtype, device):
    """Return a `Model` with the configuration and the weights of a directory.

    Raises InputError where config.json describes anything but Qwen2, or where names, shapes or
    kinds of the weights differ from those of the model."""
    config = read_config(path, Config)
    weights = read_weights(path, config)
    for ours, published in Model.on_disk.items():
        if published in weights:
            weights[ours] = weights.pop(published)
    with torch.device("meta"):
        model = Model(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        what = "is missing" if name in expected else "does not belong to this architecture"
        raise InputError(f"{path}: weight {name} {what}")
    for name, tensor in weights.items():
        shape = expected[name].shape
        require(tensor.is_floating_point(),
                f"{path}: weight {name} is {tensor.dtype}, not a floating-point type")
        require(tensor.shape == shape, f"{path}: weight {name} has shape {tuple(tensor.shape)}, "
                f"but config.json implies {tuple(shape)}")
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def save_model(model, path: str | Path) -> None:
    """Write the weights, then config.json; each file replaces an older one in one step."""
    weights = {model.on_disk.get(name, name): w for name, w in model.state_dict().items()}
    write_weights(weights, model.config, path)
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    write_config(model.config, model.architecture, dtype, path)


# ---------------------------------------------------------------------------------------------
# config.json

# What other architectures say in config.json, with the values that change nothing here. Any other
# key is ignored: transformers writes many that the forward pass does not read.
ONLY = {
    "hidden_act": ("silu",), "use_sliding_window": (False, None), "is_causal": (True, None),
    "qkv_bias": (True, None), "attention_bias": (True, None), "mlp_bias": (False, None),
    "qk_norm": (False, None), "use_qk_norm": (False, None), "use_mrope": (False, None),
    "partial_rotary_factor": (1.0, None), "attention_dropout": (0.0, None),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "rope_theta")
MOE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
POSITIVE = ("max_position_embeddings", "rms_norm_eps", "decoder_sparse_step", "yarn_factor")


def read_config(path: str | Path, Config):
    """config.json of a directory -> a Config (model.py's dataclass). InputError for anything that
    Qwen2 does not have: a model that is nearly right would be silently wrong."""
    path = Path(path)
    require(path.is_dir(), f"{path}: no such directory; run the stage that writes it first")
    require((path / "config.json").is_file(), f"{path}: no config.json, so no model "
            "directory (of a run that was stopped? it continues with --resume)")
    raw = read_json(path / "config.json")
    try:
        return config_from_dict(raw, path, Config)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # InputError too
        where = "" if str(path) in str(error) else f"{path}/config.json: "
        raise InputError(f"{where}{error}") from None


def config_from_dict(raw: dict, path, Config):
    kind = raw.get("model_type")
    require(kind in ("qwen2", "qwen2_moe"),
            f"{path}: model_type is {kind!r}, not qwen2 or qwen2_moe")
    for name, allowed in ONLY.items():
        value = raw.get(name, allowed[0])
        require(value in allowed, f"{path}: {name} is {value!r}, Qwen2 has only {allowed[0]!r}")
    require(all(layer == "full_attention" for layer in raw.get("layer_types") or ()),
            f"{path}: layer_types other than full_attention are not Qwen2")
    published = fields(Config)[:-4]  # the others, on long context, have other names there
    values = {f.name: raw[f.name] for f in published if raw.get(f.name) is not None}
    values |= long_context_from_dict(raw, path)
    need = SIZES + (MOE_SIZES if kind == "qwen2_moe" else ())
    for name in need:
        require(values.get(name) is not None, f"{path}/config.json: no {name}")
    values["mlp_only_layers"] = tuple(values.get("mlp_only_layers") or ())
    for f in fields(Config):
        value, kinds = values.get(f.name, f.default), {float: (int, float), int: (int,),
                                                       bool: (bool,)}
        good = type(value) in kinds.get(f.type, (tuple,)) and (
            all(type(layer) is int for layer in value) if type(value) is tuple else
            0 < value < math.inf if f.name in need + POSITIVE else 0 <= value < math.inf)
        require(good, f"{path}/config.json: {f.name} is {value!r}")
    config = Config(**values)
    require(raw.get("head_dim") in (None, config.head_dim), f"{path}: head_dim is "
            f"{raw.get('head_dim')}, Qwen2 has hidden_size / num_attention_heads")
    return config


def long_context_from_dict(raw: dict, path) -> dict:
    """Theta, YaRN and dual chunk attention, in the forms of transformers 4 (rope_theta,
    rope_scaling) and 5 (rope_parameters holds both)."""
    forms = [raw.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    require(all(isinstance(form, dict) and not any(isinstance(v, dict) for v in form.values())
                for form in forms), f"{path}: rope_scaling or rope_parameters is no flat object")
    rope = forms[0] or forms[1]
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "yarn"), f"{path}: rope scaling {kind!r} is not supported, "
            "only yarn")
    thetas = {form.get("rope_theta") for form in (*forms, raw)} - {None}
    require(len(thetas) < 2, f"{path}: several rope_theta {sorted(thetas)}")
    out = {"rope_theta": next(iter(thetas), None)}
    lengths = {raw.get("original_max_position_embeddings")}
    if kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None,
                 "mscale": None, "mscale_all_dim": None}
        for name, value in usual.items():
            require(rope.get(name, value) in (value, None), f"{path}: yarn with {name} "
                    f"{rope.get(name)} is not supported, only {value}")
        require(isinstance(rope.get("factor"), (int, float)), f"{path}: yarn without a factor")
        out["yarn_factor"] = float(rope["factor"])
        lengths.add(rope.get("original_max_position_embeddings"))
    if chunks := raw.get("dual_chunk_attention_config"):
        for name in ("chunk_size", "local_size"):
            require(isinstance(chunks.get(name), int),
                    f"{path}: dual_chunk_attention_config without {name}")
            out[name] = chunks[name]
        lengths.add(chunks.get("original_max_position_embeddings"))
    lengths.discard(None)
    # YaRN over a length that the model was not trained at is silently wrong (R7.2).
    require(len(lengths) < 2, f"{path}: several training lengths {sorted(lengths)} "
            "(original_max_position_embeddings)")
    length = next(iter(lengths), 0)
    # A published model is set to YaRN by adding rope_scaling alone: it then has more positions.
    if kind == "yarn":
        positions = raw.get("max_position_embeddings") or 0
        out["max_position_embeddings"] = max(positions, int(length * out["yarn_factor"]))
    return out | {"original_max_position_embeddings": length}


def write_config(config, architecture: str, dtype: str, path: str | Path) -> None:
    """config.json with the published keys: both rope forms, so old and new readers agree."""
    moe, names = config.num_experts > 0, [f.name for f in fields(config)]
    last = names.index("original_max_position_embeddings" if moe else "num_experts")
    values = {name: getattr(config, name) for name in names[:last]}
    rope, length = {"rope_type": "default"}, config.original_max_position_embeddings
    if length:
        values["original_max_position_embeddings"] = length
    if config.yarn_factor > 1:
        rope = {"rope_type": "yarn", "factor": config.yarn_factor,
                "original_max_position_embeddings": config.trained_length}
        values["rope_scaling"] = rope | {"type": "yarn"}
    if config.chunk_size:
        values["dual_chunk_attention_config"] = {
            "chunk_size": config.chunk_size, "local_size": config.local_size,
            "original_max_position_embeddings": config.trained_length}
    values = {"architectures": [f"Qwen2{'Moe' * moe}{architecture}"],
              "model_type": "qwen2_moe" if moe else "qwen2", **values,
              "hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False,
              "rope_parameters": rope | {"rope_theta": config.rope_theta},
              "torch_dtype": dtype, "use_cache": True}
    write_atomic(Path(path) / "config.json", json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# weights

def read_weights(path: str | Path, config) -> dict[str, torch.Tensor]:
    """All weights of a directory, whole or sharded, under model.py's names. Never a pickle."""
    index = Path(path) / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        where = read_json(index).get("weight_map")
        require(isinstance(where, dict) and all(isinstance(name, str) for name in where.values()),
                f"{index}: no weight_map")
        files = sorted(set(where.values()))
    weights = {}
    for name in files:
        file = Path(path) / name
        require(Path(name).name == name and file.is_file(), f"{path}: no {name}")
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise InputError(f"{file}: not a safetensors file ({error})") from None
    # What has no weights is not built, nor counted to a billion.
    for name in ("num_hidden_layers", "num_experts"):
        require(getattr(config, name) <= len(weights), f"{path}: config.json has {name} "
                f"{getattr(config, name)}, and there are only {len(weights)} tensors")
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return fuse_experts(weights, config)


def write_weights(weights: dict[str, torch.Tensor], config, path: str | Path) -> None:
    """model.safetensors, or shards with an index where they exceed SHARD_BYTES."""
    path = Path(path)
    shards, size = [{}], 0
    for name, tensor in split_experts(weights, config).items():
        tensor = tensor.detach().cpu().contiguous()
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [
        f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards, strict=True):
        with atomic_path(path / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    if n > 1:
        where = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        total = sum(t.nbytes for shard in shards for t in shard.values())
        write_atomic(index, json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    # Of an earlier save in the other layout: readers disagree on which of the two they prefer.
    (index if n == 1 else path / "model.safetensors").unlink(missing_ok=True)


def split_experts(weights: dict, config) -> dict:
    """In memory mlp.experts.{gate_up,down}_proj, on disk mlp.experts.{e}.{gate,up,down}_proj. Where
    there is no shared expert, transformers wants one all the same, of inner size 0."""
    out = {}
    for name, w in weights.items():
        if ".experts." not in name:
            out[name] = w
            continue
        prefix, part = name.rsplit(".", 1)
        for e in range(config.num_experts):
            if part == "gate_up_proj":
                gate, up = w[e].chunk(2)
                out[f"{prefix}.{e}.gate_proj.weight"] = gate.contiguous()
                out[f"{prefix}.{e}.up_proj.weight"] = up.contiguous()
            else:
                out[f"{prefix}.{e}.down_proj.weight"] = w[e].contiguous()
        if part == "down_proj" and not config.shared_expert_intermediate_size:
            shared = prefix.removesuffix("experts") + "shared_expert"
            C = config.hidden_size
            out |= {f"{shared}.gate_proj.weight": w.new_empty(0, C),
                    f"{shared}.up_proj.weight": w.new_empty(0, C),
                    f"{shared}.down_proj.weight": w.new_empty(C, 0),
                    f"{shared}_gate.weight": w.new_zeros(1, C)}
    return out


def fuse_experts(weights: dict, config) -> dict:
    """The inverse of `split_experts`; a missing expert is left for the key check to name."""
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = [[f"{prefix}.{e}.{p}_proj.weight" for e in range(config.num_experts)]
                 for p in ("gate", "up", "down")]
        shared = f"model.layers.{layer}.mlp.shared_expert"
        if config.is_sparse(layer) and not config.shared_expert_intermediate_size:
            weights.pop(f"{shared}_gate.weight", None)
            for name in [f"{shared}.{p}_proj.weight" for p in ("gate", "up", "down")]:
                if name in weights and not weights[name].numel():
                    del weights[name]
        if config.is_sparse(layer) and all(n in weights for part in parts for n in part):
            gate, up, down = (torch.stack([weights.pop(n) for n in part]) for part in parts)
            weights[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
            weights[f"{prefix}.down_proj"] = down
    return weights
