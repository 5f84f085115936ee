"""Generation with a KV cache: the rollout engine of DPO, the reward model and GRPO, and a chat.

    python sample.py --init runs/demo/grpo                          # chat in the terminal
    python sample.py --init runs/demo/grpo --prompt "Compute 7 * 8 + 3."

A batch of prompts is padded on the *left*: all rows then end at the same column, and one cache
serves them. The model masks the padding and counts positions from each row's first token
(KVCache.pads), so that a row in a batch equals the row alone. A prompt that needs n answers is read
once, and its cache row is repeated. Finished rows are dropped from the batch once there are enough
of them to pay for copying the cache.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import kernels
from lib.args import cli, positive, require
from lib.checkpoint import adapter_chain, last_with_tokenizer, merge_adapter
from lib.decode import Completion, DecodeStep, rows_to_keep
from lib.dist import RANK, gather_rows, rank_slice
from lib.long_context import extended
from lib.optim import pad_rows, rng, setup
from model import GrowingKVCache, KVCache, Qwen2, padding_mask
from tokenizer import Tokenizer


def load_policy(path, device, dtype=torch.float32) -> tuple[Qwen2, Tokenizer]:
    """Load model and tokenizer of a directory; InputError if the two do not belong together. A
    directory with a LoRA adapter alone gives its base model with the adapter merged, and its own
    tokenizer if it has one, else the base's."""
    base, *adapters = adapter_chain(path)
    model = Qwen2.from_pretrained(base, dtype, device)
    for adapter in adapters:
        merge_adapter(model, adapter)
    tokenizer = Tokenizer.from_pretrained(last_with_tokenizer(base, adapters))
    require(tokenizer.n_vocab <= model.config.vocab_size,
            f"{path}: the tokenizer has {tokenizer.n_vocab} ids, the model only "
            f"{model.config.vocab_size}")
    return model, tokenizer


# --- generation -----------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model: Qwen2, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop_ids=(), n: int = 1,
             valid_vocab: int | None = None, batch_size: int = 512,
             on_tokens=None) -> list[Completion]:
    """Sample n completions per prompt, in prompt order: all n of the first prompt come first.

    temperature 0 is greedy decoding. valid_vocab: how many ids the tokenizer knows; the embedding's
    padded rows above are never drawn. batch_size: rows at a time. on_tokens is called with the
    tokens of each step, to show an answer while it grows. The result depends on the arguments only,
    never on global random state."""
    if not isinstance(model, Qwen2):  # lib/vllm_client.py's VLLMClient
        return model.generate(prompts, max_new_tokens, temperature, seed, stop_ids, n)
    require(all(prompts), "an empty prompt cannot be continued")
    generator = rng(seed, device=model.head_weight.device)

    def draw(logits):
        if valid_vocab is not None:
            logits[:, valid_vocab:] = -torch.inf
        return sample_token(logits, temperature, top_k, top_p, generator)

    completions = []
    prompts_per_batch = max(1, batch_size // n)
    for i in range(0, len(prompts), prompts_per_batch):
        completions += generate_batch(model, prompts[i:i + prompts_per_batch], n, max_new_tokens,
                                      draw, stop_ids, on_tokens)
    return completions


def generate_batch(model, prompts, n, max_new_tokens, draw, stop_ids, on_tokens):
    """Continue each prompt n times, until a stop id or max_new_tokens.

    draw(logits (rows, V)) -> token (rows,), its log-probability (rows,)."""
    hidden, cache = prefill(model, prompts, n, max_new_tokens)
    decode_step = DecodeStep(model, cache)  # model.hidden for one token per row, but faster
    B, device = len(hidden), hidden.device
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    owner = torch.arange(B, device=device)  # which answer each row of the cache belongs to
    running = torch.ones(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token, logprob = draw(decode_step.logits(hidden))
        tokens[owner, step] = token
        logprobs[owner, step] = logprob
        if on_tokens is not None:
            on_tokens(token.tolist())

        running &= ~torch.isin(token, stops)
        n_running = int(running.sum())  # without on_tokens, the only wait for the device
        if n_running == 0 or step + 1 == max_new_tokens:
            break

        keep = rows_to_keep(running, n_running)
        if keep is not None:
            cache.select(keep)
            owner = owner[keep]
            token = token[keep]
            running = running[keep]
        hidden = decode_step(token)
    return cut_at_first_stop(tokens, logprobs, stops)


def left_pad(prompts, device):
    """Return ids (B, T) with each prompt at the right end, and the padding before each, (B,)."""
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    ids = []
    for pad, prompt in zip(pads, prompts, strict=True):
        ids.append([0] * pad + list(prompt))
    return torch.tensor(ids, device=device), torch.tensor(pads, device=device)


def prefill(model, prompts, n: int, max_new_tokens: int):
    """Read the prompts. Return the last hidden state of each prompt, n times (B, C), and a cache
    with as many rows, and with room for the answers."""
    device, dtype = model.head_weight.device, model.head_weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)  # keys and values have it then
    ids, pads = left_pad(prompts, device)
    rows, columns = ids.shape
    cache = KVCache(model.config, rows, columns + max_new_tokens, device, dtype, pads)
    hidden = model.hidden(ids, cache=cache)[:, -1]
    if n > 1:
        repeated = torch.arange(rows, device=device).repeat_interleave(n)
        cache.select(repeated)
        hidden = hidden[repeated]
    return hidden, cache


def cut_at_first_stop(tokens, logprobs, stops) -> list[Completion]:
    """A row that stayed in the batch after its first stop id drew more tokens: drop them."""
    is_stop = torch.isin(tokens, stops).int()
    finished = is_stop.any(1)
    lengths = torch.where(finished, is_stop.argmax(1) + 1, tokens.shape[1])
    completions = []
    for ids, row_logprobs, length, row_finished in zip(
            tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True):
        completions.append(Completion(ids[:length], row_logprobs[:length], row_finished))
    return completions


def sample_token(logits, temperature: float, top_k: int, top_p: float, generator):
    """Draw one token (B,) per row of logits (B, V) float32. Return it and its log-probability (B,)
    under the distribution it was drawn from; with temperature 0, under the model's own."""
    if temperature == 0:
        token = logits.argmax(-1)
        probs = logits.softmax(-1)
    else:
        logits = logits / temperature if temperature != 1 else logits
        if top_k:
            k = min(top_k, logits.shape[-1])
            largest = logits.topk(k).values
            logits = logits.masked_fill(logits < largest[:, -1:], -torch.inf)
        if top_p < 1:
            sorted_logits, index = logits.sort(-1, descending=True)
            sorted_probs = sorted_logits.softmax(-1)
            mass_before = sorted_probs.cumsum(-1) - sorted_probs
            drop = mass_before > top_p  # so the token that crosses p stays
            logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
        probs = logits.softmax(-1)
        # Invert the distribution function: one random number per row. torch.multinomial draws one
        # per token of the vocabulary, which took a quarter of the time at 384 rows. In float64,
        # u * total stays below the total, so a token of probability 0 is never drawn.
        cdf = probs.double().cumsum(-1)
        u = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device, generator=generator)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).flatten()
    prob = probs.gather(-1, token[:, None])
    return token, prob.log().flatten()


# --- log-probabilities of given answers -----------------------------------------------------------

def read_prompts(model: Qwen2, prompts: list, router=None):
    """Return the last hidden state of each prompt (B, 1, C) and a GrowingKVCache, one row each.

    A prompt that occurs several times, as in GRPO's groups and DPO's pairs, is read once. With a
    prompt of 60 tokens and 8 answers of 20, that is 220 tokens per group instead of 640. For
    `router` it counts once per row, whichever process reads it."""
    device = model.model.norm.weight.device
    prompts = [tuple(prompt) for prompt in prompts]
    unique = list(dict.fromkeys(prompts))
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    rows = torch.tensor([row_of[prompt] for prompt in prompts], device=device)
    ids, pads = left_pad(unique, device)
    cache = GrowingKVCache(pads)
    tokens = torch.arange(ids.numel(), device=device).view_as(ids)
    real = padding_mask(pads, ids.shape[1])[:, 0, 0]
    counted = tokens[rows][real[rows]]
    hidden = model.hidden(ids, cache=cache, router=router, counted=counted)[rows, -1:]
    cache.select(rows)
    return hidden, cache


def completion_logprobs(model: Qwen2, prompts: list[list[int]], completions: list[list[int]],
                        temperature: float = 1.0, valid_vocab: int | None = None, router=None):
    """Return the log-probabilities of given completions, with gradients: (B, R) of each id under
    softmax(logits / temperature), 0 beyond a completion's end, and the (B, R) bool mask of its
    length. R is the longest length, but at least 2. router: see model.Qwen2.hidden.

    DPO, GRPO and their reference policies all call this function: DPO's first loss is ln 2 up to
    rounding. GRPO's pi_old is the sampler's, so its first ratio is 1 up to rounding, too."""
    device = model.head_weight.device
    hidden, cache = read_prompts(model, prompts, router)  # predicts the first id
    ids = pad_rows(completions, 0).to(device)
    if ids.shape[1] == 1:  # no pass may be empty, and under FSDP all processes must make both
        ids = F.pad(ids, (0, 1))
    lengths = torch.tensor([len(completion) for completion in completions], device=device)
    columns = torch.arange(ids.shape[1], device=device)
    mask = columns < lengths[:, None]  # by length: any id may be text
    counted = mask[:, 1:].flatten()
    rest = model.hidden(ids[:, :-1], cache=cache, router=router, counted=counted)
    hidden = torch.cat((hidden, rest), dim=1)
    logprobs = kernels.token_logprobs(hidden[mask], model.head_weight, ids[mask], temperature,
                                      valid_vocab=valid_vocab)
    zeros = torch.zeros(mask.shape, device=device)
    return zeros.masked_scatter(mask, logprobs), mask


# --- rollouts -------------------------------------------------------------------------------------

@dataclass
class Rollout:
    query: dict
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    score: float = 0.0     # of the query's check
    parts: dict[str, float] = field(default_factory=dict)  # what else a --reward returned


def rollout(model, tokenizer, queries: list[dict], n: int, max_new_tokens: int,
            temperature: float = 1.0, seed: int = 0, score=None) -> list[list[Rollout]]:
    """Sample n answers per query and score them; return one list of n rollouts per query.

    score(queries, texts, rollouts) -> list of float, such as tasks.queries.score_many; with None
    all scores stay 0.
    There is no top-k or top-p: the log-probabilities must be those of the policy itself. Several
    processes share the queries, and each gets all rollouts."""
    queries = rank_slice(queries)
    prompts = [tokenizer.render_prompt(query["prompt"], query.get("tools")) for query in queries]
    completions = generate(model, prompts, max_new_tokens, temperature, n=n,
                           seed=seed + 1_000_000_007 * RANK, stop_ids=tokenizer.stop_ids,
                           valid_vocab=tokenizer.n_vocab)
    rows = []
    for i, completion in enumerate(completions):
        query = queries[i // n]
        text = answer_text(tokenizer, completion)
        rows.append(Rollout(query, prompts[i // n], completion.ids, completion.logprobs,
                            completion.finished, text))
    if score is not None:
        asked = [row.query for row in rows]
        texts = [row.text for row in rows]
        for row, value in zip(rows, score(asked, texts, rows), strict=True):
            row.score = value
    return gather_rows([rows[i:i + n] for i in range(0, len(rows), n)])


def part_means(answers: list) -> dict[str, float]:
    """Return the means of what a --reward returned besides the reward."""
    values = defaultdict(list)
    for answer in answers:
        for name, value in answer.parts.items():
            values[name].append(value)
    return {name: sum(some) / len(some) for name, some in values.items()}


def answer_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """Decode a completion without its stop id."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids)


# --- chat -----------------------------------------------------------------------------------------

@dataclass
class Args:
    init: str = "runs/demo/grpo"     # model directory to talk to
    prompt: str = ""                 # answer this once; empty: chat
    system: str = ""                 # system prompt; empty: that of --init
    max_new_tokens: int = 256        # longest answer, in tokens
    temperature: float = 0.7         # 0 is greedy; this and the next two are Qwen2.5's defaults
    top_k: int = 20                  # draw among the k likeliest tokens; 0: all
    top_p: float = 0.8               # draw within this share of the probability mass
    yarn: float = 1.0                # reach this many times the training length with YaRN; 1: off
    dca: bool = False                # reach 4 times the training length by dual chunk attention
    seed: int = 0                    # of the draws
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


class Printer:
    """Print one answer while it grows.

    Several tokens can make up one character. Text that ends in half a character is held back until
    the other half has come."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids = []
        self.shown = 0  # characters

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
    require(args.top_p <= 1, f"--top_p must be in (0, 1], got {args.top_p}")
    model, tokenizer = load_policy(args.init, device)
    model.config = extended(model.config, args.yarn, args.dca)
    longest = model.config.max_position_embeddings
    messages = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    turn = 0
    while True:
        try:
            text = args.prompt.strip() or input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        ids, _ = tokenizer.render(messages, add_generation_prompt=True)
        require(len(ids) + args.max_new_tokens <= longest,
                f"the conversation has {len(ids)} tokens; with --max_new_tokens "
                f"{args.max_new_tokens} it outgrows the model's {longest} positions (--dca: 4x)")
        printer = Printer(tokenizer)
        with autocast:
            [answer] = generate(
                model, [ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                seed=args.seed + turn, stop_ids=tokenizer.stop_ids,
                valid_vocab=tokenizer.n_vocab, on_tokens=printer)
        reply = answer_text(tokenizer, answer)
        printer.show(reply + "\n")
        if not answer.finished:
            print(f"(cut at --max_new_tokens {args.max_new_tokens})", file=sys.stderr)
        if args.prompt:
            return
        messages.append({"role": "assistant", "content": reply})
        turn += 1


if __name__ == "__main__":
    cli(main, Args)
