"""Generation with a KV cache: the rollout engine of DPO, the reward model and GRPO, and a chat.

    python sample.py --init runs/demo/grpo                          # chat in the terminal
    python sample.py --init runs/demo/grpo --prompt "Compute 7 * 8 + 3."

A batch of prompts is padded on the *left*, so that all rows end at the same column and one cache
serves them; the model masks the padding and counts positions from each row's first token
(KVCache.pads), which makes a batched row equal to the row alone (R3.3). A prompt that wants n
responses is read once and its cache rows repeated. Rows that finish leave the batch.
"""
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kernels
from lib.args import InputError, cli, positive, require
from lib.optim import pad_rows, rng, setup
from lib.dist import RANK, gather_rows, rank_slice
from model import KVCache, MoE, GrowingKVCache, Qwen2, rope, apply_rope
from tokenizer import Tokenizer


def load_policy(path, device) -> tuple[Qwen2, Tokenizer]:
    """A model directory -> model and tokenizer, refused where the two do not belong together."""
    model, tokenizer = Qwen2.from_pretrained(path, device=device), Tokenizer.from_pretrained(path)
    require(tokenizer.n_vocab <= model.config.vocab_size, f"{path}: the tokenizer has "
            f"{tokenizer.n_vocab} ids, the model only {model.config.vocab_size}")
    return model, tokenizer


@dataclass
class Completion:
    ids: list[int]         # up to and including the first stop id
    logprobs: list[float]  # log-probability of each id under the distribution it was drawn from
    finished: bool         # False: cut at max_new_tokens


@torch.inference_mode()
def generate(model: Qwen2, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop_ids=(), n: int = 1,
             valid_vocab: int | None = None, batch_size: int = 512,
             watch=None) -> list[Completion]:
    """n completions of each prompt, in prompt order (all n of the first prompt come first).

    temperature 0 is greedy. `valid_vocab`: number of ids the tokenizer knows; the padded rows of
    the embedding above it are never drawn (R1.6). `watch` is called with each step's tokens, to
    show an answer while it grows. A pure function of its arguments."""
    if not isinstance(model, Qwen2):  # lib/vllm_client.py's
        return model.generate(prompts, max_new_tokens, temperature, seed, stop_ids, n)
    require(all(prompts), "an empty prompt cannot be continued")
    out, generator = [], rng(seed, device=model.head_weight.device)
    per_batch = max(1, batch_size // n)
    for i in range(0, len(prompts), per_batch):
        out += generate_batch(model, prompts[i:i + per_batch], max_new_tokens, temperature, top_k,
                              top_p, generator, stop_ids, n, valid_vocab, watch)
    return out


def left_pad(prompts, device):
    """-> ids (B, T) with each prompt at the right end, and pads (B,), the padding before it."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    return (torch.tensor(ids, device=device),
            torch.tensor([longest - len(p) for p in prompts], device=device))


class DecodeStep:
    """model.hidden of one more token a row, written out for speed. Qwen2.hidden is the one to read,
    and what the tests compare with. q, k and v come from one product, gate and up from another; all
    positions' rotations are made once. On a CPU all weights are copies laid out by columns while a
    batch lasts, so they take twice the memory: products of few rows are up to 1.5 times as fast."""

    def __init__(self, model, cache):
        self.model, self.cache, self.layers = model, cache, []
        config, (keys, _) = model.config, cache.layers[0]
        dtype, device = keys.dtype, keys.device
        positions = torch.arange(keys.shape[-2], device=device)[None]
        self.cos, self.sin = (x[0, 0].to(dtype) for x in rope(positions, config))

        def joined(*weights):
            weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)
            return weight.mT.contiguous().mT if device.type == "cpu" else weight
        for block in model.model.layers:
            a, mlp = block.self_attn, block.mlp
            q, k, v = a.q_proj, a.k_proj, a.v_proj
            self.layers.append((
                block, joined(q.weight, k.weight, v.weight),
                torch.cat((q.bias, k.bias, v.bias)).to(dtype), joined(a.o_proj.weight),
                None if isinstance(mlp, MoE) else
                (joined(mlp.gate_proj.weight, mlp.up_proj.weight), joined(mlp.down_proj.weight))))
        self.head = joined(model.head_weight)

    def __call__(self, token):
        """token (B,) -> (B, C), normalised; the cache grows by one column."""
        cache, now = self.cache, self.cache.length
        if self.model.config.chunk_size:
            return self.model.hidden(token[:, None], cache=cache)[:, -1]
        hidden = self.forward(token, now)
        cache.length = now + 1
        return hidden

    def forward(self, token, now):
        model, config, cache = self.model, self.model.config, self.cache
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        kernels.set_cpu_matmul(len(token), config.hidden_size, token.device, least=2**18)
        if cache.pads is not None:
            cos, sin = (x[now - cache.pads][:, None, None] for x in (self.cos, self.sin))
            columns = torch.arange(now + 1, device=token.device)
            mask = (columns >= cache.pads[:, None])[:, None, None]
        else:
            cos, sin, mask = self.cos[now], self.sin[now], None
        new, S = slice(now, now + 1), now + 1
        x = model.model.embed_tokens(token)
        for (block, qkv, bias, out, mlp), (keys, values) in zip(
                self.layers, cache.layers, strict=True):
            heads = F.linear(block.input_layernorm(x).to(qkv.dtype), qkv, bias)
            qk, v = heads.view(-1, H + 2 * K, 1, D).split((H + K, K), dim=1)
            q, k = apply_rope(qk, cos, sin).split((H, K), dim=1)
            keys[:, :, new], values[:, :, new] = k, v
            y = kernels.decode_attention(q, keys[:, :, :S], values[:, :, :S], mask)  # (B, H, 1, D)
            x = x + F.linear(y.flatten(1), out)
            h = block.post_attention_layernorm(x)
            if mlp is None:
                x = x + block.mlp(h)
            else:
                gate, up = F.linear(h.to(out.dtype), mlp[0]).chunk(2, dim=-1)
                x = x + F.linear(F.silu(gate) * up, mlp[1])
        return model.model.norm(x)


def generate_batch(model, prompts, max_new_tokens, temperature, top_k, top_p, generator, stop_ids,
                   n, valid_vocab, watch=None):
    device, dtype = model.head_weight.device, model.head_weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)  # of the keys and values to be cached
    ids, pads = left_pad(prompts, device)
    cache = KVCache(model.config, len(ids), ids.shape[1] + max_new_tokens, device, dtype, pads)
    hidden = model.hidden(ids, cache=cache)[:, -1]
    if n > 1:
        rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
        cache.select(rows)
        hidden = hidden[rows]
    B, advance = len(hidden), DecodeStep(model, cache)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    alive = torch.arange(B, device=device)               # which row each line of the cache is
    running = torch.ones(B, dtype=torch.bool, device=device)  # of the lines in `alive`
    stop = torch.tensor(sorted(stop_ids), device=device)
    for step in range(max_new_tokens):
        logits = F.linear(hidden, advance.head).float()  # (lines, V)
        if valid_vocab is not None:
            logits[:, valid_vocab:] = -torch.inf
        token, logprob = sample_token(logits, temperature, top_k, top_p, generator)
        tokens[alive, step], logprobs[alive, step] = token, logprob
        if watch is not None:
            watch(token.tolist())
        running &= ~torch.isin(token, stop)
        left = int(running.sum())  # the one host sync of a step
        if left == 0 or step + 1 == max_new_tokens:
            break
        # Whole sixteens, since every new shape costs oneDNN some 2 ms; and only when it pays, since
        # repacking copies the cache.
        size = left + -left % 16 if left > 16 else left
        if size <= 0.8 * len(running):
            keep = running.int().argsort(descending=True, stable=True)[:size]
            cache.select(keep)
            alive, token, running = alive[keep], token[keep], running[keep]
        hidden = advance(token)
    stops = torch.isin(tokens, stop).int()               # what follows a row's first one is chance
    finished = stops.any(1)
    lengths = torch.where(finished, stops.argmax(1) + 1, max_new_tokens).tolist()
    return [Completion(t[:k], p[:k], f) for t, p, k, f in
            zip(tokens.tolist(), logprobs.tolist(), lengths, finished.tolist(), strict=True)]


def sample_token(logits, temperature: float, top_k: int, top_p: float, generator):
    """logits (B, V) float32 -> token (B,), its log-probability (B,)."""
    if temperature == 0:
        probs, token = logits.softmax(-1), logits.argmax(-1, keepdim=True)
    else:
        logits = logits / temperature
        if top_k:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if top_p < 1:
            sorted_, index = logits.sort(-1, descending=True)
            mass = sorted_.softmax(-1)
            # Drop what lies beyond the first p of the mass; the token that crosses p stays.
            drop = mass.cumsum(-1) - mass > top_p
            logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
        probs = logits.softmax(-1)
        # Inverse of the distribution function: one random number a row, where torch.multinomial
        # draws one a token (a quarter of all the time at 384 rows). In float64, so that u < 1 stays
        # below the last value and a token of probability 0 is never drawn.
        cdf = probs.double().cumsum(-1)
        u = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device, generator=generator)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return token.flatten(), probs.gather(-1, token).log().flatten()


def read_prompts(model: Qwen2, prompts: list):
    """-> the last hidden state of each prompt (B, 1, C) and a GrowingKVCache with a row for each. A
    prompt that comes several times, as in GRPO's groups and DPO's pairs, is read once: with a
    prompt of 60 tokens and 8 responses of 20, that is 220 tokens a group instead of 640."""
    device = model.model.norm.weight.device
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
    ids, pads = left_pad(list(index), device)
    cache = GrowingKVCache(pads)
    hidden = model.hidden(ids, cache=cache)[rows, -1:]
    cache.select(rows)
    return hidden, cache


def completion_logprobs(model: Qwen2, prompts: list[list[int]], completions: list[list[int]],
                        temperature: float = 1.0, valid_vocab: int | None = None):
    """The sampler's numbers again, with gradients: (B, R) log-probabilities of each completion's
    ids under softmax(logits / temperature), and the (B, R) bool mask of its length. DPO, GRPO and
    their references all call this one, so that step 0 is exactly ln 2 and ratio 1."""
    device = model.head_weight.device
    hidden, cache = read_prompts(model, prompts)                      # predicts the first id
    ids = pad_rows(completions, 0).to(device)
    lengths = torch.tensor([[len(c)] for c in completions], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths        # (B, R), by lengths (R8.3)
    if ids.shape[1] > 1:
        hidden = torch.cat((hidden, model.hidden(ids[:, :-1], cache=cache)), dim=1)
    logprobs = kernels.token_logprobs(hidden[mask], model.head_weight, ids[mask], temperature,
                                      valid_vocab=valid_vocab)
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, logprobs), mask


@dataclass
class Rollout:
    query: dict
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    score: float = 0.0     # of the query's check


def rollout(model, tokenizer, queries: list[dict], n: int, max_new_tokens: int,
            temperature: float = 1.0, seed: int = 0, score=None) -> list[list[Rollout]]:
    """n scored responses to each query: a list of n for each query. No top-k or top-p here: the
    log-probabilities must be those of the policy itself (R12.2). Several processes share the
    queries; each gets all the answers. score(queries, texts) -> list of float, such as
    tasks.queries.score_many; without it every score stays 0."""
    queries, seed = rank_slice(queries), seed + 1_000_000_007 * RANK
    prompts = [tokenizer.render_prompt(query["prompt"]) for query in queries]
    completions = generate(model, prompts, max_new_tokens, temperature, seed=seed, n=n,
                           stop_ids=tokenizer.stop_ids, valid_vocab=tokenizer.n_vocab)
    rows = []
    for i, c in enumerate(completions):
        text = tokenizer.decode(c.ids[:-1] if c.finished else c.ids)
        rows.append(Rollout(queries[i // n], prompts[i // n], c.ids, c.logprobs, c.finished, text))
    # A response that never ended is no answer, whatever it contains.
    ended = [row for row in rows if row.finished]
    if score is not None:
        scores = score([row.query for row in ended], [row.text for row in ended])
        for row, value in zip(ended, scores, strict=True):
            row.score = value
    return gather_rows([rows[i:i + n] for i in range(0, len(rows), n)])


@dataclass
class Args:
    init: str = "runs/demo/grpo"     # model directory to talk to
    prompt: str = ""                 # answer this once; empty: chat
    system: str = ""                 # system prompt; empty: Qwen2.5's default
    max_new_tokens: int = 256        # longest answer, in tokens
    temperature: float = 0.7         # 0 is greedy; this and the next two are Qwen2.5's defaults
    top_k: int = 20                  # draw among the k likeliest tokens; 0: all
    top_p: float = 0.8               # draw within this share of the probability mass
    yarn: float = 1.0                # stretch the context by this factor with YaRN; 1: off
    dca: bool = False                # stretch it 4x with dual chunk attention
    seed: int = 0                    # of the draws
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


class Printer:
    """Prints one answer while it grows. A character can be spread over several tokens: what ends
    in half of one is held back until the rest has come."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, tokens: list[int]) -> None:
        self.ids += [token for token in tokens if token not in self.tokenizer.stop_ids]
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.show(text)

    def show(self, text: str) -> None:
        print(text[self.shown:], end="", flush=True)
        self.shown = len(text)


def main(args: Args) -> None:
    device, autocast = setup(args)
    positive(args, "max_new_tokens", "top_p")
    require(args.top_p <= 1, f"--top_p wants a share in (0, 1], got {args.top_p}")
    model, tokenizer = load_policy(args.init, device)
    model.config = model.config.extended(args.yarn, args.dca)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    turn = 0
    while True:
        try:
            text = args.prompt or input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        ids, _ = tokenizer.render(messages, add_generation_prompt=True)
        if len(ids) + args.max_new_tokens > model.config.max_position_embeddings:
            raise InputError(f"the conversation has {len(ids)} tokens; with --max_new_tokens "
                             f"{args.max_new_tokens} it outgrows the model's "
                             f"{model.config.max_position_embeddings} positions (--dca: 4x)")
        printer = Printer(tokenizer)
        with autocast:
            answer = generate(model, [ids], args.max_new_tokens, args.temperature, args.top_k,
                              args.top_p, args.seed + turn, tokenizer.stop_ids,
                              valid_vocab=tokenizer.n_vocab, watch=printer)[0]
        reply = tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids)
        printer.show(reply + "\n")
        if not answer.finished:
            print(f"(cut at --max_new_tokens {args.max_new_tokens})", file=sys.stderr)
        if args.prompt:
            return
        messages.append({"role": "assistant", "content": reply})
        turn += 1


if __name__ == "__main__":
    cli(main, Args)
