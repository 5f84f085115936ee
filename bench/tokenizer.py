"""BPE training against the tokenizers library, encoding with Qwen's ranks against tiktoken.

The texts are those of ../shared/data/text, about 24 MB in several languages: .jsonl rows are one
document, other files are cut at blank lines. Both trainers get Qwen's pre-tokenizer pattern and NFC
and make the same number of tokens; they break ties differently and ours adds the chat template's
words, so merges are not compared. Encoding reads the same documents, in NFC already since tiktoken
has no such step (ours takes it again); checked is the number of ids.
"""
import base64
import json
import unicodedata

import harness
from harness import SHARED, memory, timed

RANKS = SHARED / "tokenizer" / "qwen.tiktoken"


def documents():
    for path in sorted((SHARED / "text").glob("*")):
        text = unicodedata.normalize("NFC", path.read_text("utf-8", errors="replace"))
        if path.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in text.splitlines() if line.strip())
        else:
            yield from filter(None, text.replace("\r\n", "\n").split("\n\n"))


def measure(case, train, encoder):
    """train(texts, vocab), or encoder() -> a function of one text."""
    texts = list(documents())
    size, before = sum(len(text.encode()) for text in texts) / 1e6, memory(reset=True)
    if case.startswith("train"):
        vocab = int(case.split()[1].replace(",", ""))
        out = timed(lambda: train(texts, vocab), repeats=1, warmup=0)
    else:
        encode = encoder()
        out = timed(lambda: sum(len(encode(text)) for text in texts), repeats=2)
        out["check"] = [out["result"]]
    return out | {"work": size, "extra": {"CPU s": out["cpu"], "MB": memory(peak=True) - before}}


def ours(case):
    harness.ours()
    from tokenizer import Tokenizer
    return measure(case, Tokenizer.train, lambda: Tokenizer.from_pretrained(RANKS).encode)


PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def tokenizers(case):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def train(texts, vocab):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab - 22, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return measure(case, train, None)


def tiktoken(case):
    import tiktoken

    def encoder():
        lines = map(bytes.split, RANKS.read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={}).encode_ordinary
    return measure(case, None, encoder)


SYSTEMS = {"ours": (ours, None), "tokenizers": (tokenizers, "tokenizers"),
           "tiktoken": (tiktoken, "tiktoken")}
CASES = {"train 4,096": ["ours", "tokenizers"], "train 16,384": ["ours", "tokenizers"],
         "encode": ["ours", "tiktoken"]}

if __name__ == "__main__":
    harness.main("Tokenizer", "MB", SYSTEMS, CASES if RANKS.exists() else {},
                 targets={"train 4,096": 0.67, "train 16,384": 0.67, "encode": 0.9})
