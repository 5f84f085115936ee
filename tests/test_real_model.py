"""A pretrained language model of 135M parameters in the Qwen2 format, against transformers: greedy
answers token for token, logits, tokenizer, and the chat of sample.py as a user starts it. Minutes
long: `make test-parity`. R numbers: docs/requirements.md."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, chat_text

from model import Qwen2
from sample import generate
from tokenizer import PATTERN, Tokenizer

transformers = pytest.importorskip("transformers", reason="make test-parity installs it")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

N = 64  # tokens of an answer
TEXTS = [  # continued as they are
    "The capital of France is",
    "Water boils at 100 degrees Celsius, but on a high mountain",
    "Once upon a time, in a village by the sea, there lived an old",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "import numpy as np\n\nx = np.linspace(0, 1, 11)\nfor i, value in enumerate(x):\n    print(",
    "SELECT name, COUNT(*) FROM orders WHERE price > 10 GROUP BY",
    "Question: A box holds 12 eggs. How many eggs are in 7 boxes?\nAnswer: 12 * 7 =",
    "If 3x + 5 = 20, then 3x = 15 and x =",
    "1, 1, 2, 3, 5, 8, 13,",
    "Les chats et les chiens sont des animaux",
    "A",
    "Photosynthesis is the process by which green plants turn light into chemical energy. In the "
    "leaves, chlorophyll absorbs mostly red and blue light; water is split, oxygen leaves the "
    "plant, and the energy is kept in small molecules that later drive the making of sugar from "
    "the carbon dioxide of the air. Two things limit how fast this goes:",
]
CHATS = [  # (system prompt or None for Qwen2.5's default, turns)
    (None, ["What is the capital of Italy?"]),
    (None, ["Write a Python function that checks whether a number is prime."]),
    ("Answer in one word.", ["Is the sun a star?"]),
    ("You are a pirate.", ["Who are you?"]),
    (None, ["My name is Ada.", "Nice to meet you, Ada!", "What is my name?"]),
    (None, ["What is 17 + 25?"]),
    (None, ["Translate into French: \"Good morning, my friend.\""]),
    ("You explain things to children.", [
        "Why is the sky blue?", "Because air scatters blue light more than red light.",
        "And why is it red in the evening? Two sentences, please."]),
]


def messages(system, turns) -> list[dict]:
    chat = [{"role": "system", "content": system}] if system else []
    return chat + [{"role": ("user", "assistant")[i % 2], "content": turn}
                   for i, turn in enumerate(turns)]


@pytest.fixture(scope="module")
def ours(real_checkpoint):
    return Qwen2.from_pretrained(real_checkpoint)


@pytest.fixture(scope="module")
def tokens(real_checkpoint):
    return Tokenizer.from_pretrained(real_checkpoint)


@pytest.fixture(scope="module")
def theirs(real_checkpoint):
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tokens):
    ids = [tokens.encode(text) for text in TEXTS]
    ids += [tokens.render(messages(*chat), add_generation_prompt=True)[0] for chat in CHATS]
    assert len(ids) == 20 and len(set(map(len, ids))) >= 15
    return ids


def until_stop(ids: list[int], stop_ids) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[:end + 1]


def their_greedy(hf, prompts, stop_ids, n=N) -> list[list[int]]:
    """One batch of theirs, padded on the left. Their generate reads the stop ids, and sampling
    that do_sample=False switches off, from generation_config.json."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False)
    return [until_stop(row, stop_ids) for row in out[:, longest:].tolist()]


def gap_where_they_part(model, prompt, a, b) -> str:
    """How near a tie the two best tokens are where answers a and b differ first."""
    at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"lengths {len(a)} and {len(b)}"
    with torch.no_grad():
        best = model(torch.tensor([prompt + a[:at]]))[0, -1].topk(2).values
    return f"token {at}: {a[at]} or {b[at]}, the two best logits are {best[0] - best[1]:.2g} apart"


def smallest_gap(model, prompt, answer) -> float:
    with torch.no_grad():
        best = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1:].topk(2).values
    return (best[:, 0] - best[:, 1]).min().item()


# ---------------------------------------------------------------------------------------------

def test_greedy_answers_equal_transformers_token_for_token(ours, theirs, tokens, prompts, compare,
                                                           real_checkpoint, capsys):
    """R3.1, R3.3: 20 prompts, one at a time and as one batch with left padding, both sides."""
    stops = json.loads((real_checkpoint / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == set(tokens.stop_ids)

    def greedy(prompts):
        out = generate(ours, prompts, N, temperature=0, stop_ids=tokens.stop_ids)
        return [c.ids for c in out]
    single = [ids for p in prompts for ids in greedy([p])]
    runs = {"batched": greedy(prompts), "transformers single":
            [ids for p in prompts for ids in their_greedy(theirs, [p], stops)],
            "transformers batched": their_greedy(theirs, prompts, stops)}
    for name, answers in runs.items():
        for i, (prompt, a, b) in enumerate(zip(prompts, single, answers, strict=True)):
            if a != b:
                pytest.fail(f"prompt {i}, {name}: {gap_where_they_part(ours, prompt, a, b)}")
            compare(f"greedy tokens, 135M, single = {name}", a, b)
    lengths = [len(ids) for ids in single]
    assert max(lengths) == N and min(lengths) < N  # cut and stopped answers both occur
    with capsys.disabled():
        print(f"\n135M: {sum(lengths)} greedy tokens for 20 prompts, smallest gap between the two "
              f"best logits {min(map(smallest_gap, [ours] * 20, prompts, single)):.2g}")


def test_logits_of_a_long_text(ours, theirs, tokens, compare):
    text = (ROOT / "LICENSE").read_text("utf-8")
    ids = torch.tensor([tokens.encode(text)[:200]])
    assert ids.shape == (1, 200)
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids)
    assert want.std() > 1
    compare("logits, 135M, 200 tokens", got, want, 1e-3)
    compare("likeliest tokens, 135M, 200 tokens", got.argmax(-1).flatten().tolist(),
            want.argmax(-1).flatten().tolist())


def with_qwens_pre_tokenisation(source, path) -> None:
    """The checkpoint's own cuts differ from Qwen2.5's at line breaks and upper-case 'M."""
    path.mkdir()
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / name, path)
    data = json.loads((source / "tokenizer.json").read_text("utf-8"))
    data["normalizer"] = {"type": "NFC"}
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": PATTERN}
    (path / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), "utf-8")


MORE_TEXTS = ["I'M sure YOU'LL DON'T don't", "a = 1\n\n\n    b  =  2\t# done  \n", "e\u0301 e", " ",
              "世界 and Ünïcödé 🙂\u200d", "12345 + 678", "<|im_start|>user\nhi<|im_end|>\n"]


def test_the_tokenizer_gives_the_ids_of_transformers(real_checkpoint, tokens, tmp_path, compare):
    """PreTrainedTokenizerFast runs tokenizer.json as it stands. AutoTokenizer in transformers 5
    makes a Qwen2Tokenizer for any model of type qwen2: vocabulary and merges of the directory, but
    Qwen2.5's pre-tokenisation whatever the file says. On published files these are the same."""
    with_qwens_pre_tokenisation(real_checkpoint, tmp_path / "qwen")
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(real_checkpoint)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "qwen")
    assert type(auto).__name__ == "Qwen2Tokenizer"
    qwen = Tokenizer.from_pretrained(tmp_path / "qwen")
    chats = [chat_text(tokens, messages(*chat), add_generation_prompt=True) for chat in CHATS]
    for text in TEXTS + chats + MORE_TEXTS:
        for ours_, hf, name in (tokens, fast, "as it stands"), (qwen, auto, "AutoTokenizer"):
            ids = ours_.encode(text, allow_special=True)
            compare(f"token ids, 135M, {name}", ids, hf(text).input_ids)
            compare(f"decoded, 135M, {name}", ours_.decode(ids), hf.decode(ids))
    assert any(tokens.encode(text) != qwen.encode(text) for text in TEXTS)


@pytest.mark.parametrize("system", ["You are a pirate.", "Be brief.\nBe kind."])
def test_a_rendered_chat_is_what_the_checkpoints_template_says(real_checkpoint, tokens, system,
                                                               compare):
    """It writes no default system prompt, ours writes Qwen2.5's: given one, they agree."""
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(real_checkpoint)
    for _, turns in CHATS:
        chat = messages(system, turns)
        compare("chat ids, 135M", tokens.render(chat, add_generation_prompt=True)[0],
                hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


# ---------------------------------------------------------------------------------------------
# sample.py, as typed

def chat(path, *flags, typed=None) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--init", str(path),
                           "--device", "cpu", "--temperature", "0", *flags],
                          capture_output=True, text=True, input=typed, timeout=300)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first.startswith("device cpu, float32")
    return rest


def their_answer(hf, tokens, messages, n) -> str:
    ids = tokens.render(messages, add_generation_prompt=True)[0]
    answer, = their_greedy(hf, [ids], tokens.stop_ids, n)
    return tokens.decode([i for i in answer if i not in tokens.stop_ids])


@pytest.mark.parametrize("prompt, system", [
    ("What is the capital of France?", ""), ("Write one sentence about rain.", ""),
    ("Who are you?", "You are a pirate.")])
def test_one_answer_of_the_chat(real_checkpoint, theirs, tokens, prompt, system, compare):
    flags = ["--prompt", prompt] + ["--system", system] * bool(system)
    said = chat(real_checkpoint, "--max_new_tokens", "80", *flags)
    want = their_answer(theirs, tokens, messages(system, [prompt]), 80)
    compare("answers of sample.py, 135M", said, want + "\n")


def test_a_conversation(real_checkpoint, theirs, tokens, compare):
    """Typed line by line; each answer sees the turns before it. Empty lines are passed over."""
    lines, turns, want = ["My name is Ada.", "What is my name?", "Spell it backwards."], [], ""
    for line in lines:
        turns.append(line)
        turns.append(their_answer(theirs, tokens, messages("", turns), 60))
        want += f"> {turns[-1]}\n"
    typed = "\n".join([lines[0], "", *lines[1:]])
    said = chat(real_checkpoint, "--max_new_tokens", "60", typed=typed)
    assert said
    compare("answers of sample.py, 135M", said.replace("> > ", "> ").removesuffix("> \n"), want)
