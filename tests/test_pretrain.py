"""pretrain.py: the loss and its gradient whatever the micro-batches, resuming bit for bit, and that
it learns. Everything goes through main() on a small file. R numbers: docs/requirements.md."""
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import optim
import data.__main__
from data import documents
import kernels
import pretrain
from lib.upcycle import upcycle
from lib.args import InputError
from lib.files import read_jsonl
from lib.optim import rng
from data import mixture
from data.mixture import Tokens, held_out_rows, hold_out_ends, is_held_out
from helpers import tiny_model, wake
from model import PRESETS, Qwen2
from tokenizer import Tokenizer

ROWS, SEQ, STEPS = 4, 32, 20


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert 1 <= sum(map(is_held_out, texts)) < len(texts) / 10
    return path


@pytest.fixture
def args(corpus, micro_run, tmp_path):
    """20 steps of 4 rows of 32 tokens."""
    return pretrain.Args(
        out=str(tmp_path / "run"), data=str(corpus), tokenizer=str(micro_run), model="micro",
        tokens=STEPS * ROWS * (SEQ + 1), seq_len=SEQ, batch_tokens=ROWS * SEQ, micro_batch=4,
        lr=1.5e-3, warmup=4, eval_every=10, save_every=10, device="cpu", dtype="float32")


def pack(train, args):
    weights = dict.fromkeys(train, 1.0)
    return mixture.pack(train, weights, args.tokens, args.seq_len, args.seed, args.long_share)


def log_of(args, drop=("tokens_per_s",)):
    rows = [row for _, row in read_jsonl(Path(args.out) / "log.jsonl")]
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def gradients(args, monkeypatch, step=0):
    """What main hands to the optimizer at `step`, and the model and loss at that point."""
    seen = []

    class Enough(Exception):
        pass

    def spy(model, *rest):
        seen.append({n: p.grad.clone() for n, p in model.named_parameters()})
        if len(seen) > step:
            raise Enough
        return optim.clip_and_step(model, *rest)
    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(pretrain, "clip_and_step", spy)
        pretrain.main(replace(args, overwrite=True))
    return seen[step]


# ---------------------------------------------------------------------------------------------
# the loss

@pytest.mark.parametrize("doc_mask", [False, True])
def test_gradient_does_not_depend_on_the_micro_batch(args, doc_mask, monkeypatch):
    """R4.1: 8 rows as 8, 3 + 3 + 2 (a short last group) and 1 x 8."""
    args = replace(args, batch_tokens=8 * SEQ, doc_mask=doc_mask)
    want = gradients(replace(args, micro_batch=8), monkeypatch)
    for micro_batch in (3, 1):
        got = gradients(replace(args, micro_batch=micro_batch), monkeypatch)
        for name, g in got.items():
            assert (g - want[name]).norm() <= 1e-6 + 1e-5 * want[name].norm(), name


def test_lm_loss_is_the_mean_cross_entropy():
    """Summed over rows / targets of the step; document masks reach the attention."""
    torch.manual_seed(0)
    model = wake(Qwen2(PRESETS["micro"]))
    ids = torch.randint(512, (3, 17))
    segments = torch.tensor([[0] * 5 + [1] * 12, [2] * 17, [3] * 16 + [4]])
    for segment_ids in (None, segments):
        logits = model(ids[:, :-1], segment_ids=None if segment_ids is None else segments[:, :-1])
        want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        got = pretrain.lm_loss(model, ids, segment_ids, ids[:, 1:].numel())
        torch.testing.assert_close(got, want)
    halves = sum(pretrain.lm_loss(model, part, None, 48) for part in ids.split(2))
    torch.testing.assert_close(halves, pretrain.lm_loss(model, ids, None, 48))


def test_held_out_loss_does_not_depend_on_the_batch():
    """R4.9: a fixed set, token-weighted."""
    torch.manual_seed(0)
    model, ids = wake(Qwen2(PRESETS["micro"])), torch.randint(512, (5, 9))
    device, autocast = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    losses = [pretrain.held_out_loss(model, ids, None, n, device, autocast) for n in (1, 2, 5)]
    assert max(losses) - min(losses) < 1e-5
    assert losses[0] == pytest.approx(F.cross_entropy(
        model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-5)


def test_balance_loss_reaches_the_router_through_the_real_loss(args, monkeypatch):
    """R5.1: the gradient is linear in the coefficient, so the difference is the aux loss alone."""
    grads = {}
    for coefficient in (0.0, 1.0):
        preset = replace(PRESETS["micro-moe"], router_aux_loss_coef=coefficient)
        monkeypatch.setitem(PRESETS, "micro-moe", preset)
        grads[coefficient] = gradients(replace(args, model="micro-moe"), monkeypatch)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert (grads[1.0][name] - grads[0.0][name]).norm() > 1e-3
    name = "model.layers.1.mlp.experts.down_proj"  # after the last router: only the language loss
    torch.testing.assert_close(grads[1.0][name], grads[0.0][name])


# ---------------------------------------------------------------------------------------------
# a run

def test_the_log_is_the_truth(args, tmp_path):
    """R4.2, R4.9: starts at ln V, falls, and is the same whatever the micro-batch."""
    logs = {}
    for micro_batch in (3, 4):
        run = replace(args, micro_batch=micro_batch, out=str(tmp_path / str(micro_batch)))
        result = pretrain.main(run)
        logs[micro_batch] = log_of(run)
        assert result["val_loss"] == pytest.approx(logs[micro_batch][-1]["val_loss"], rel=1e-6)
    log = logs[4]
    for a, b in zip(log, logs[3], strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=2e-3) for k in a)
    vocab = json.loads((tmp_path / "4" / "config.json").read_text())["vocab_size"]
    assert abs(log[0]["loss"] / math.log(vocab) - 1) < 0.02
    assert log[-1]["loss"] < log[0]["loss"] - 0.4
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in log] == [n * ROWS * SEQ for n in range(1, STEPS + 1)]
    assert [row["step"] for row in log if "val_loss" in row] == [10, 20]
    assert log[4]["lr"] == args.lr and log[-1]["lr"] == pytest.approx(0.1 * args.lr)
    assert not (tmp_path / "4" / "state").exists()
    model = Qwen2.from_pretrained(tmp_path / "4")  # what was saved is what was measured
    tokenizer = Tokenizer.from_pretrained(tmp_path / "4")
    assert model.config.vocab_size == tokenizer.padded_vocab_size(128)
    record = json.loads((tmp_path / "4" / "run.json").read_text())
    assert record["finished"] and record["result"]["val_loss"] == result["val_loss"]


@pytest.mark.parametrize("model", ["micro", "micro-moe"])
def test_twenty_steps_equal_ten_killed_and_resumed(args, model, tmp_path, monkeypatch):
    """R4.4, bit for bit: weights and every logged number; lines after the state are replaced."""
    whole = replace(args, model=model, out=str(tmp_path / "whole"), doc_mask=True)
    pretrain.main(whole)
    parts = replace(whole, out=str(tmp_path / "parts"))
    done = []

    def killed_at_13(*rest):
        done.append(1)
        if len(done) == 13:
            raise KeyboardInterrupt
        return optim.clip_and_step(*rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "clip_and_step", killed_at_13)
        pretrain.main(parts)
    assert len(log_of(parts)) == 12
    with pytest.raises(InputError, match=r"other arguments: lr 0.0015 -> 0.1$"):
        pretrain.main(replace(parts, resume=True, lr=0.1))
    with pytest.raises(InputError, match="interrupted"):
        pretrain.main(parts)
    torch.manual_seed(99)
    pretrain.main(replace(parts, resume=True))
    assert log_of(parts) == log_of(whole)
    a, b = (Path(r.out, "model.safetensors").read_bytes() for r in (whole, parts))
    assert a == b
    with pytest.raises(InputError, match="a finished run"):
        pretrain.main(parts)


def test_the_same_seed_is_the_same_run_and_another_is_not(args, tmp_path):
    logs = []
    for i, seed in enumerate((0, 0, 1)):
        run = replace(args, seed=seed, out=str(tmp_path / str(i)), tokens=2 * ROWS * (SEQ + 1))
        pretrain.main(run)
        logs.append(log_of(run))
    assert logs[0] == logs[1] != logs[2]


def test_moe_trains_and_logs_expert_load(args, tmp_path):
    """R5.4, in part: fair share is 1, perfect balance k = 2; the step's load, not one pass's."""
    logs = {}
    for micro_batch in (4, 1):
        run = replace(args, model="micro-moe", micro_batch=micro_batch, warmup=1,
                      out=str(tmp_path / str(micro_batch)), tokens=8 * ROWS * (SEQ + 1))
        pretrain.main(run)
        logs[micro_batch] = log_of(run)
    for row in logs[4]:
        for low, high, entropy in zip(row["expert_min"], row["expert_max"], row["router_entropy"],
                                      strict=True):
            assert 0 <= low <= 1 <= high <= 8 / 2
            assert 0.5 < entropy <= math.log(8)
        assert 1.99 <= row["aux"] < 8
        assert len(row["expert_max"]) == 2 and row["dead_experts"] < 5
    assert logs[4][-1]["loss"] < logs[4][0]["loss"] - 0.1
    for name in ("expert_min", "expert_max", "router_entropy"):  # the same forward, cut otherwise
        assert logs[1][0][name] == pytest.approx(logs[4][0][name], abs=2e-4)


def test_starved_experts_are_counted_and_told(args, micro_run, tmp_path, monkeypatch, capsys):
    """R5.4: a forced collapse. Layer 1's router is frozen on experts 2 and 5."""
    args = replace(args, model="micro-moe", lr=1e-50, tokens=104 * ROWS * (SEQ + 1), eval_every=999)
    build = pretrain.Qwen2.__init__

    def collapsed(self, config):
        build(self, config)
        with torch.no_grad():
            self.model.embed_tokens.weight[:, 0] = 0.05  # to route by, 2.4 after the norm
            self.model.layers[1].mlp.gate.weight.zero_()
            self.model.layers[1].mlp.gate.weight[[2, 5], 0] = 50.0
    monkeypatch.setattr(pretrain.Qwen2, "__init__", collapsed)
    pretrain.main(args)
    rows = log_of(args)
    assert all(row["dead_experts"] == 6 for row in rows)
    assert all(row["expert_max"][1] == 4.0 and row["expert_min"][1] == 0.0 for row in rows)
    assert all(row["router_entropy"][1] == pytest.approx(math.log(2), abs=1e-3) for row in rows)
    told = [line for line in capsys.readouterr().out.splitlines() if "tenth of its fair" in line]
    assert [line.split(" got")[0] for line in told] == [
        f"step 100: expert {e} of MoE layer 1" for e in (0, 1, 3, 4, 6, 7)]


def dense_and_preset(inner, **changes):
    dense = tiny_model(intermediate_size=48)
    return dense, replace(dense.config, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=inner, **changes)


@pytest.mark.parity
def test_upcycled_experts_are_the_dense_ffn(compare):
    """Nothing drawn anew, whole copies, normalised weights: exactly the dense model."""
    dense, preset = dense_and_preset(48, norm_topk_prob=True)
    ids = torch.randint(97, (2, 20), generator=rng(0))
    moe = upcycle(dense, preset, seed=0, fresh=0.0)
    compare("upcycling, nothing redrawn: the dense model", moe(ids), dense(ids), 5e-4)
    with_shared = replace(preset, shared_expert_intermediate_size=48, norm_topk_prob=False)
    moe = upcycle(dense, with_shared, seed=0, fresh=0.0)
    for block in moe.model.layers:
        block.mlp.gate.weight.data.zero_()  # exactly uniform
    compare("upcycling, nothing redrawn: the dense model", moe(ids), dense(ids), 5e-4)


def test_upcycled_experts_are_cut_from_shuffled_copies_and_half_redrawn():
    dense, preset = dense_and_preset(18, shared_expert_intermediate_size=20)
    kept = upcycle(dense, preset, seed=3, fresh=0.0)
    half = upcycle(dense, preset, seed=3)
    for layer, block in enumerate(dense.model.layers):
        experts = kept.model.layers[layer].mlp.experts
        same = (experts.gate_up_proj[:, :18, None] == block.mlp.gate_proj.weight).all(-1)
        used = same.long().argmax(-1)  # which dense unit each of the 4 x 18 is
        assert same.any(-1).all()
        counts = used.flatten().bincount(minlength=48)
        assert counts.min() >= 1 and counts.max() <= 2 and counts.sum() == 72  # 1.5 copies
        assert (used.flatten()[:48].sort().values == torch.arange(48)).all()
        assert used[0].tolist() != sorted(used[0].tolist())
        up, down = experts.gate_up_proj[:, 18:], experts.down_proj
        assert torch.equal(up, block.mlp.up_proj.weight[used])
        torch.testing.assert_close(down, block.mlp.down_proj.weight[:, used].transpose(0, 1)
                                   * 4 * 48 / (2 * 18 + 20))
        for a, b in zip(experts.parameters(), half.model.layers[layer].mlp.experts.parameters(),
                        strict=True):
            assert (a == b).float().mean() == pytest.approx(0.5, abs=0.04)
            assert b[a != b].std().item() == pytest.approx(0.02, rel=0.1)
    for name, p in half.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(p, dense.get_parameter(name))


def test_upcycling_from_the_command_line_goes_on_from_the_dense_loss(args):
    """Nearer to it than to a new model's; and the directory is a Qwen2-MoE that loads."""
    dense = replace(args, tokens=150 * ROWS * (SEQ + 1), lr=4e-3, eval_every=150, save_every=999)
    pretrain.main(dense)
    run = replace(args, tokenizer="", init=dense.out, out=dense.out + "-moe", model="micro-moe",
                  upcycle=True, tokens=2 * ROWS * (SEQ + 1), lr=1e-50)
    pretrain.main(run)
    before, after = (log_of(a)[-1]["val_loss"] for a in (dense, run))
    new = math.log(640)
    assert before < new - 1 and before - 0.05 < after < before + 0.3 * (new - before)
    again = Qwen2.from_pretrained(run.out)
    assert again.config.num_experts == 8 and again.config.moe_intermediate_size == 40
    assert json.loads(Path(run.out, "config.json").read_text())["model_type"] == "qwen2_moe"


def test_the_trained_length_is_recorded(args, micro_run):
    """R7.2: what YaRN extends. A longer stage raises it, a shorter one does not."""
    pretrain.main(replace(args, tokens=ROWS * (SEQ + 1)))
    assert Qwen2.from_pretrained(args.out).config.trained_length == SEQ
    for seq_len, length in ((2 * SEQ, 2 * SEQ), (SEQ // 2, SEQ)):
        run = replace(args, tokenizer="", init=args.out, out=f"{args.out}-{seq_len}",
                      seq_len=seq_len, tokens=2 * ROWS * (SEQ + 1))
        pretrain.main(run)
        assert Qwen2.from_pretrained(run.out).config.trained_length == length


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = Qwen2(PRESETS["micro"])
    ids = torch.randint(512, (4, 25), generator=rng(1))
    optimizer = optim.adamw(model, 1e-2, 0.0)
    for _ in range(60):
        loss = pretrain.lm_loss(model, ids, None, 4 * 24)
        loss.backward()
        optim.clip_and_step(model, optimizer, 1e-2, 1.0)
    assert loss.item() < 0.05


def test_bfloat16_keeps_float32_weights(args, micro_run):
    """R4.6: at 1e-6 nearly every weight moves; in pure bfloat16 2% did."""
    run = replace(args, dtype="bfloat16", lr=1e-6, init=str(micro_run), weight_decay=0.0)
    pretrain.main(run)
    before, after = (Qwen2.from_pretrained(path).state_dict() for path in (micro_run, run.out))
    stored = json.loads(Path(run.out, "config.json").read_text())["torch_dtype"]
    moved = [(before[k] != after[k]).float().mean().item() for k in before if before[k].ndim == 2]
    assert stored == "float32" and min(moved) > 0.99


def test_init_and_a_new_rope_base_continue_a_model(args, micro_run):
    """ABF: same weights at step 0, other theta, saved with the model."""
    run = replace(args, tokenizer="", init=str(micro_run), rope_theta=1e6, lr=1e-50,
                  tokens=ROWS * (SEQ + 1))
    pretrain.main(run)
    old, new = Qwen2.from_pretrained(micro_run), Qwen2.from_pretrained(run.out)
    assert (old.config.rope_theta, new.config.rope_theta) == (1e4, 1e6)
    as_before = replace(run, rope_theta=0.0, out=run.out + "-same")
    pretrain.main(as_before)
    assert abs(log_of(run)[0]["loss"] - log_of(as_before)[0]["loss"]) > 1e-5  # it trains with it
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize("attention", ["reference", "fused"])
def test_every_attention_kernel_gives_the_same_gradient(args, attention, monkeypatch):
    old = kernels.set_default_impl()
    try:
        want = gradients(replace(args, doc_mask=True), monkeypatch)
        got = gradients(replace(args, doc_mask=True, attention=attention), monkeypatch)
    finally:
        kernels.set_default_impl(*old)
    for name, g in got.items():
        assert (g - want[name]).norm() <= 1e-6 + 1e-4 * want[name].norm(), name


# ---------------------------------------------------------------------------------------------
# data

def test_held_out_documents_are_never_trained_on(args, texts, tmp_path, tokenizer, monkeypatch):
    """And they are of all sources; from texts in memory as from token files."""
    half, folder = len(texts) // 2, tmp_path / "docs"
    documents.write_sources(folder, ({"text": text, "source": "ab"[i >= half]}
                                for i, text in enumerate(texts)))
    for tokens in ("", args.tokenizer):
        if tokens:
            data.__main__.main(
                data.__main__.Args(
                    out=str(tmp_path / "tokens"), input=str(folder), evals="", tokenizer=tokens
                )
            )
            folder = tmp_path / "tokens"
            texts = [doc["text"] for doc in documents.read_all(str(folder))]
        train, held_out, _ = pretrain.load_tokens(replace(args, data=str(folder)))
        assert list(train) == list(held_out) == ["a", "b"]
        for part, want in ((train, False), (held_out, True)):
            got = {tokenizer.decode(docs.ids[i:j - 1].tolist()) for docs in part.values()
                   for i, j in zip(docs.starts, docs.ends, strict=True)}
            assert got == {text for text in texts if is_held_out(text) is want}
            assert isinstance(part["a"].ids, np.memmap) == bool(tokens)


def test_token_files_train_the_same_model(args, texts, tmp_path):
    """data.py --tokenizer only moves the work: the run is the same bit for bit; a directory of
    another tokenizer's tokens is refused."""
    data.__main__.main(data.__main__.Args(out=str(tmp_path / "docs"), input=args.data, evals="",
                        tokenizer=args.tokenizer))
    mapped = replace(args, data=str(tmp_path / "docs"), tokenizer="", out=str(tmp_path / "a"),
                     tokens=3 * ROWS * (SEQ + 1))
    pretrain.main(mapped)
    for file in (tmp_path / "docs").glob("*.bin"):
        file.unlink()
    read = replace(mapped, tokenizer=args.tokenizer, out=str(tmp_path / "b"))
    pretrain.main(read)
    assert log_of(mapped) == log_of(read)
    a, b = (Path(r.out, "model.safetensors").read_bytes() for r in (mapped, read))
    assert a == b
    other = Tokenizer.train(texts[:50], 300)
    other.save_pretrained(tmp_path / "other")
    data.__main__.main(
        data.__main__.Args(
            out=str(tmp_path / "docs"),
            input=args.data,
            evals="",
            overwrite=True,
            tokenizer=args.tokenizer,
        )
    )
    Tokenizer.train([text[::-1] for text in texts[:50]], 300).save_pretrained(tmp_path / "like")
    with pytest.raises(InputError, match="tokens of another tokenizer"):  # of as many ids
        pretrain.main(replace(mapped, tokenizer=str(tmp_path / "like"), overwrite=True))
    with pytest.raises(InputError, match="tokens of another tokenizer"):
        pretrain.main(replace(mapped, tokenizer=str(tmp_path / "other"), overwrite=True))


def test_long_share_of_the_rows_is_one_piece_each(args, corpus):
    """The Turbo-like stage: 40% of the rows are full length, the others hold shorter documents."""
    args = replace(args, long_share=0.4, tokens=200 * (SEQ + 1))
    train, _, tokenizer = pretrain.load_tokens(args)
    rows, report = pack(train, args)
    _, segments = rows[range(len(rows))]
    one = (segments == segments[:, :1]).all(1)
    assert len(rows) == 200 and one[:80].all() and not one[80:].any()
    assert [report[name]["share"] for name in report] == [1.0, 1.0]
    assert report["docs, longer"]["tokens"] == 80 * (SEQ + 1)
    short = segments[80:].flatten().unique_consecutive(return_counts=True)[1]
    assert short.max() < SEQ + 1
    with pytest.raises(InputError, match="no document is longer than 5001"):
        pack(train, replace(args, seq_len=5000, tokens=10**5))
    pretrain.main(replace(args, tokens=2 * ROWS * (SEQ + 1)))


def test_the_tokenizer_is_trained_here_without_one(args):
    run = replace(args, tokenizer="", vocab_size=400, tokens=ROWS * (SEQ + 1))
    pretrain.main(run)
    assert Tokenizer.from_pretrained(run.out).n_vocab == 400
    assert Qwen2.from_pretrained(run.out).config.vocab_size == 512


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "huge"}, "--model must be one of"),
        ({"attention": "flash"}, "--attention must be one"),
        ({"batch_tokens": 8}, "--batch_tokens 8 is less"),
        ({"seq_len": 0}, "--seq_len must be"),
        ({"micro_batch": 0}, "--micro_batch must be"),
        ({"eval_every": 0}, "--eval_every must be"),
        ({"save_every": 0}, "--save_every must be"),
        ({"tokens": -5}, "--tokens must be"),
        ({"tokens": 40}, "--tokens 40 fills no step of 4 rows of 33 tokens"),
        ({"upcycle": True}, "--upcycle expects a dense --init"),
        ({"data": "/no/such.jsonl"}, "/no/such.jsonl: no such file"),
        ({"tokenizer": "/no/such"}, "/no/such"),
        ({"init": "/no/such"}, "/no/such: no such directory"),
        ({"weights": "other=1"}, r"weights for \['other'\], but the sources are \['docs'\]"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"device": "tpu"}, "--device must be"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change, message, args):
    with pytest.raises(InputError, match=message) as error:
        pretrain.main(replace(args, **change))
    assert "\n" not in str(error.value)
    assert not log_of(args) if Path(args.out, "log.jsonl").exists() else True


@pytest.mark.parametrize("chosen", [False, True])
def test_one_document_is_held_out_by_its_end(args, tmp_path, chosen):
    """The usual first experiment, one text file: the last 2% of its tokens are held out, none of
    them is trained on, and together both are the document. So it is if the document's hash says
    that all of it is held out."""
    numbers = itertools.count()
    words = [f"word{i} " for i in range(5000)]
    while is_held_out(text := f"{next(numbers)} " + "".join(words)) != chosen:
        pass
    (tmp_path / "book.txt").write_text(text)
    args = replace(args, data=str(tmp_path / "book.txt"))
    train, held_out, tokenizer = pretrain.load_tokens(args)
    train, held_out = hold_out_ends(train, held_out, SEQ)
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    (first,), (last,) = ([d for d in part.values() if len(d.starts)] for part in (train, held_out))
    assert (first.starts.tolist(), last.ends.tolist()) == ([0], [len(ids)])
    cut = int(len(ids) * 0.98)
    assert first.ends.tolist() == last.starts.tolist() == [cut] and first.ids.tolist() == ids
    rows, _ = pack(train, replace(args, tokens=2 * cut))
    trained = rows[range(len(rows))][0]
    assert set(trained.flatten().tolist()) <= set(ids[:cut])
    val_ids, _ = held_out_rows(held_out, SEQ, args.tokens)
    assert val_ids.flatten().tolist() == ids[cut:][:val_ids.numel()] and len(val_ids) >= 1
    pretrain.main(replace(args, tokenizer="", vocab_size=300, tokens=2 * ROWS * (SEQ + 1)))
    assert log_of(args)[-1]["val_loss"] > 0


def test_a_few_short_documents_fill_one_held_out_row(args, tmp_path):
    """2% of them would be less than a row: as much as a row takes of each source's end."""
    sources = {name: [f"{name} {i} " + "some words " * 20 for i in range(3)] for name in "ab"}
    documents.write_sources(tmp_path / "few", ({"text": text, "source": name}
                                               for name in "ab" for text in sources[name]))
    train, held_out, _ = pretrain.load_tokens(replace(args, data=str(tmp_path / "few")))
    total = sum(len(docs.ids) for docs in train.values())
    assert 5 * (SEQ + 1) < total < 50 * (SEQ + 1)
    first, last = hold_out_ends(train, held_out, SEQ)
    assert SEQ < sum(docs.sizes.sum() for docs in last.values()) <= SEQ + 3
    assert sum(docs.sizes.sum() for part in (first, last) for docs in part.values()) == total
    assert len(held_out_rows(last, SEQ, args.tokens)[0]) == 1


@pytest.mark.parametrize("tokens,rows", [(SEQ, 1), (59 * SEQ, 5), (60 * SEQ, 6), (10**9, 40)])
def test_held_out_rows_are_at_most_a_tenth_of_the_training_tokens(tokens, rows):
    """Of 41 rows of documents, 40 whole ones with their next token; one row at least; the rows of
    a short run are the first of a long one's."""
    ids = np.arange(41 * (SEQ + 1) - 1)
    held_out = {"a": Tokens(ids, np.array([0]), np.array([len(ids)]))}
    found, _ = held_out_rows(held_out, SEQ, tokens)
    assert len(found) == rows
    assert found.flatten().tolist() == ids[:rows * (SEQ + 1)].tolist()


def test_enough_held_out_documents_stay_as_they_are(args):
    train, held_out, _ = pretrain.load_tokens(args)
    assert hold_out_ends(train, held_out, SEQ) == (train, held_out)


def test_too_little_data_is_explained(args, tmp_path):
    (tmp_path / "note.txt").write_text("A tale of two tokens. " * 3)
    with pytest.raises(InputError, match="--data is too small.* --seq_len 32"):
        pretrain.main(replace(args, data=str(tmp_path / "note.txt")))
    (tmp_path / "nothing.txt").write_text("\n")
    with pytest.raises(InputError, match="no document to train on"):
        pretrain.main(replace(args, data=str(tmp_path / "nothing.txt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no .jsonl or .txt files"):
        pretrain.main(replace(args, data=str(tmp_path / "empty")))
