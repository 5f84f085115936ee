"""sample.py: a batch equals its rows alone, the sampler equals the scorer, and draws follow the
distribution they claim. R numbers: docs/requirements.md."""
from dataclasses import replace

import pytest
import torch

import sample
from lib.args import InputError
from model import Config, KVCache, Qwen2
from sample import (
    Rollout,
    completion_logprobs,
    sample_token,
    generate,
    rollout,
)

V = 89
CONFIG = Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                rope_theta=10_000.0)
MOE = replace(CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
              shared_expert_intermediate_size=24)


def build(config):
    torch.manual_seed(3)
    model = Qwen2(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


def prompts_of(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=g).tolist() for n in lengths]


PROMPTS = prompts_of(5, 1, 12, 3, 3, 8, 2, 20)
STOPS = tuple(range(0, V, 9))


def greedy(model, prompts, n_tokens=16, **kwargs):
    return generate(model, prompts, n_tokens, temperature=0, **kwargs)


def naive_greedy(model, prompt, n_tokens, stop_ids):
    """No cache, no batch."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
@torch.no_grad()
def test_a_batch_equals_its_rows_alone(config, monkeypatch):
    """R3.3: every mix of prompt and answer lengths, with rows leaving the batch on the way."""
    model, kept, select = build(config), [], KVCache.select

    def spy(self, rows):
        kept.append(len(rows))
        select(self, rows)
    monkeypatch.setattr(KVCache, "select", spy)
    batch = greedy(model, PROMPTS, stop_ids=STOPS)
    monkeypatch.undo()
    want = [naive_greedy(model, p, 16, STOPS) for p in PROMPTS]
    assert [c.ids for c in batch] == want
    assert len({len(ids) for ids in want}) >= 4 and kept and kept == sorted(kept, reverse=True)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        alone, = greedy(model, [prompt], stop_ids=STOPS)
        assert (alone.ids, alone.finished) == (row.ids, row.finished)
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(row.logprobs))
    assert [c.ids for c in greedy(model, PROMPTS, stop_ids=STOPS, batch_size=3)] == want


def test_stop_ids_and_finished(model):
    """R12.5: up to and including the first stop; `finished` only where there is one."""
    free = greedy(model, PROMPTS)
    assert all(len(c.ids) == len(c.logprobs) == 16 and not c.finished for c in free)
    for row, full in zip(greedy(model, PROMPTS, stop_ids=STOPS), free, strict=True):
        end = next((i for i, t in enumerate(full.ids) if t in STOPS), None)
        assert row.finished == (end is not None)
        assert row.ids == full.ids[:16 if end is None else end + 1]
        assert len(row.logprobs) == len(row.ids)
    last = greedy(model, PROMPTS[:1], stop_ids=(free[0].ids[15],))[0]  # at the very last position
    assert last.finished


def test_only_the_first_stop_counts(model):
    """Also in a row that stays in the batch after it: repacking for one of ten does not pay."""
    ends, goes_on = PROMPTS[0], PROMPTS[2]
    a, b = greedy(model, [ends, goes_on])
    stops = set(a.ids) - set(b.ids)
    where = [i for i, token in enumerate(a.ids) if token in stops]
    assert len(where) >= 2
    batch = greedy(model, [ends] + [goes_on] * 9, stop_ids=stops)
    assert batch[0].ids == a.ids[:where[0] + 1] and batch[0].finished
    assert all(c.ids == b.ids and not c.finished for c in batch[1:])


def test_n_responses_equal_the_prompt_repeated(model):
    """In prompt order, all n of the first prompt first; also when a batch holds part of them."""
    for batch_size in (512, 7):
        many = greedy(model, PROMPTS, n=3, stop_ids=STOPS, batch_size=batch_size)
        repeated = greedy(model, [p for p in PROMPTS for _ in range(3)], stop_ids=STOPS)
        assert [c.ids for c in many] == [c.ids for c in repeated]
    drawn = generate(model, PROMPTS[:2], 16, n=4, seed=1)
    assert len({tuple(c.ids) for c in drawn}) == 8


def test_generation_is_a_pure_function_of_the_seed(model):
    torch.manual_seed(0)
    a = generate(model, PROMPTS, 12, seed=5, stop_ids=STOPS)
    torch.manual_seed(1)
    assert generate(model, PROMPTS, 12, seed=5, stop_ids=STOPS) == a
    assert generate(model, PROMPTS, 12, seed=6, stop_ids=STOPS) != a


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_sampler_and_scorer_agree(config, temperature):
    """R12.1, R12.2: to 1e-4, at the temperature of the draw and no other; padded ids excluded."""
    model = build(config)
    out = generate(model, PROMPTS, 24, temperature, seed=2, n=2, stop_ids=STOPS, valid_vocab=80)
    prompts = [p for p in PROMPTS for _ in range(2)]
    got, mask = completion_logprobs(model, prompts, [c.ids for c in out], temperature, 80)
    assert mask.sum(1).tolist() == [len(c.ids) for c in out]
    want = torch.cat([torch.tensor(c.logprobs) for c in out])
    torch.testing.assert_close(got[mask], want, rtol=0, atol=1e-4)
    assert (got[~mask] == 0).all()
    for row, prompt, c in zip(got, prompts, out, strict=True):  # and both equal the formula
        logits = model(torch.tensor([prompt + c.ids]))[0, len(prompt) - 1:-1, :80]
        brute = (logits / temperature).log_softmax(-1)[range(len(c.ids)), c.ids]
        torch.testing.assert_close(row[:len(c.ids)], brute, rtol=0, atol=1e-4)
    other, _ = completion_logprobs(model, prompts, [c.ids for c in out], 2.0, 80)
    assert (other[mask] - want).abs().max() > 0.1


def test_scores_do_not_depend_on_batch_mates_and_carry_gradients(model):
    """R10.2: padding is right of a row and never seen; an empty completion scores nothing."""
    completions = prompts_of(4, 9, 0, 1, 3, 3, 2, 5, seed=7)
    together, mask = completion_logprobs(model, PROMPTS, completions)
    assert together.requires_grad
    for i, (p, c) in enumerate(zip(PROMPTS, completions, strict=True)):
        assert mask[i].sum() == len(c)
        if c:
            alone, _ = completion_logprobs(model, [p], [c])
            torch.testing.assert_close(together[i, :len(c)], alone[0, :len(c)])


def test_short_answers_take_as_many_forward_passes(model, monkeypatch):
    """Under FSDP every process must make every pass, whatever the lengths of its own answers."""
    passes = []
    hidden = Qwen2.hidden
    monkeypatch.setattr(Qwen2, "hidden", lambda *a, **k: passes.append(1) or hidden(*a, **k))
    counts = []
    for lengths in ((1, 1), (1, 4)):
        passes.clear()
        logprobs, mask = completion_logprobs(model, PROMPTS[:2], prompts_of(*lengths, seed=1))
        assert mask.sum(1).tolist() == list(lengths) and (logprobs[~mask] == 0).all()
        counts.append(len(passes))
    assert counts == [2, 2]


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_a_prompt_read_once_for_its_group_changes_nothing(config):
    """Values and gradients of shared prompts, in any order, are those of a plain forward pass over
    every prompt + completion: GRPO's groups and DPO's pairs rest on it."""
    model = build(config)
    prompts = [PROMPTS[i] for i in (1, 0, 1, 2, 1, 0)]
    completions = prompts_of(3, 1, 5, 2, 4, 6, seed=3)
    got, mask = completion_logprobs(model, prompts, completions)
    got.square().sum().backward()
    shared = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = []
    for p, c in zip(prompts, completions, strict=True):
        logprobs = model(torch.tensor([p + c]))[0, len(p) - 1:-1].log_softmax(-1)
        plain.append(logprobs.gather(1, torch.tensor(c)[:, None])[:, 0])
    torch.testing.assert_close(got[mask], torch.cat(plain), atol=1e-5, rtol=1e-4)
    torch.cat(plain).square().sum().backward()
    for a, p in zip(shared, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-3, rtol=1e-3)


def test_padded_vocabulary_is_never_drawn(model):
    """R1.6: greedy or not; and the distribution is renormalised over what is left."""
    for temperature in (0.0, 5.0):
        for c in generate(model, PROMPTS, 40, temperature, valid_vocab=10, n=4):
            assert max(c.ids) < 10
    c, = generate(model, PROMPTS[:1], 8, 1.0, valid_vocab=1)
    assert c.ids == [0] * 8 and c.logprobs == [0.0] * 8


DISTRIBUTION = torch.tensor([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize("temperature, top_k, top_p, want", [
    (1.0, 0, 1.0, [0.1, 0.4, 0.2, 0.3]),
    (1.0, 2, 1.0, [0, 4 / 7, 0, 3 / 7]),
    (1.0, 9, 1.0, [0.1, 0.4, 0.2, 0.3]),        # more than there are
    (1.0, 0, 0.65, [0, 4 / 7, 0, 3 / 7]),       # 0.4 is not enough, 0.4 + 0.3 is
    (1.0, 0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),   # the token that crosses p stays
    (1.0, 0, 0.0, [0, 1, 0, 0]),                # always at least one
    (1.0, 3, 0.5, [0, 4 / 7, 0, 3 / 7]),        # p counts what top-k left: 4/9 < 0.5
    (0.5, 0, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    (0.5, 0, 0.5, [0, 1, 0, 0]),                # temperature comes first, so 16/30 >= 0.5
    (0.0, 0, 1.0, [0, 1, 0, 0])])
def test_draws_follow_the_distribution(temperature, top_k, top_p, want):
    n, want = 20_000, torch.tensor(want, dtype=torch.float32)
    logits = DISTRIBUTION.log().expand(n, 4) + 3.0
    token, logprob = sample_token(
        logits, temperature, top_k, top_p, torch.Generator().manual_seed(0)
    )
    share = torch.bincount(token, minlength=4) / n
    assert ((share - want).abs() <= 4 * (want * (1 - want) / n).sqrt()).all()  # 4 sigma; 0 is 0
    claimed = want if temperature else DISTRIBUTION  # greedy reports the model's own probability
    torch.testing.assert_close(logprob.exp(), claimed[token])


@pytest.mark.parity
def test_greedy_equals_transformers_generate(tmp_path, model, compare):
    """R3.1: 20 tokens, dense. A model that can talk: test_real_model.py."""
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt, ours in zip(PROMPTS, greedy(model, PROMPTS, 20), strict=True):
        ids = torch.tensor([prompt])
        want = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                           do_sample=False, pad_token_id=0, eos_token_id=None)
        compare("greedy tokens, random model", ours.ids, want[0, len(prompt):].tolist())


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(InputError, match="empty prompt"):
        generate(model, [[1], []], 4)
    assert generate(model, [], 4) == []


def test_rollouts_are_grouped_and_only_finished_ones_are_scored(micro_run, tokenizer):
    """Text without the stop token; a response that never ended is no answer."""
    model = Qwen2.from_pretrained(micro_run)
    check = {"kind": "math", "answer": "4"}
    queries = [{"prompt": "Hi", "domain": "a", "check": check},
               {"prompt": [{"role": "user", "content": "2 + 2?"}], "domain": "b", "check": check}]
    groups = rollout(model, tokenizer, queries, n=24, max_new_tokens=60, temperature=2.0,
                     score=lambda queries, texts, rollouts: [row.finished for row in rollouts])
    rows = [row for group in groups for row in group]
    assert [len(group) for group in groups] == [24, 24] and isinstance(rows[0], Rollout)
    assert {row.finished for row in rows} == {True, False}
    for row in rows:
        assert row.query is queries[row in groups[1]]
        assert row.prompt_ids == tokenizer.render_prompt(row.query["prompt"])
        assert row.score == float(row.finished == (row.ids[-1] in tokenizer.stop_ids)
                                  and row.finished)
        assert max(row.ids) < tokenizer.n_vocab
        assert row.text == tokenizer.decode(row.ids[:len(row.ids) - row.finished])


def test_the_chat_answers_one_prompt(micro_run, capsys):
    args = sample.Args(init=str(micro_run), prompt="Hello?", max_new_tokens=5, device="cpu")
    sample.main(args)
    assert "device cpu" in capsys.readouterr().out
    with pytest.raises(InputError, match="outgrows the model's 512 positions"):
        sample.main(replace(args, max_new_tokens=600))


def test_an_answer_is_shown_while_it_grows(micro_run, tokenizer, monkeypatch, capsys):
    """Piece by piece and never half a character; what `on_tokens` saw is the answer."""
    ids = tokenizer.encode("Aé世界🙂!")
    assert len(ids) > 12  # bytes, most of them
    printer, pieces = sample.Printer(tokenizer), []
    for token in [*ids, tokenizer.eos_id]:
        printer([token])
        pieces.append(capsys.readouterr().out)
    assert [piece for piece in pieces if piece] == list("Aé世界🙂!")
    printer([ids[1]])
    assert capsys.readouterr().out == ""
    printer.show(tokenizer.decode(printer.ids) + "\n")  # cut inside a character
    assert capsys.readouterr().out == "\ufffd\n"

    seen, model = [], Qwen2.from_pretrained(micro_run)
    answer, = generate(model, [ids], 9, seed=4, on_tokens=seen.extend)
    assert seen == answer.ids
    typed = iter(["Hello?", "", "Again"])

    def type_(prompt):
        print(prompt, end="")
        try:
            return next(typed)
        except StopIteration:
            raise KeyboardInterrupt from None
    monkeypatch.setattr("builtins.input", type_)
    sample.main(sample.Args(init=str(micro_run), max_new_tokens=4, device="cpu", temperature=0))
    out, err = capsys.readouterr()
    assert err.count("(cut at --max_new_tokens 4)") == out.count("\n> ") - 1 == 2
    query = [{"role": "user", "content": "Hello?"}]
    first, = greedy(model, [tokenizer.render(query, add_generation_prompt=True)[0]], 4,
                    stop_ids=tokenizer.stop_ids, valid_vocab=tokenizer.n_vocab)
    assert f"\n> {tokenizer.decode(first.ids)}\n> > " in out and out.endswith("> \n")
