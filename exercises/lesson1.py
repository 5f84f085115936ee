"""Lesson 1, the tokenizer. Replace each `raise`; `make exercise N=1` checks you."""


def count_pairs(words: dict[tuple, int]) -> dict[tuple, int]:
    """{("a", "b", "a"): 3} -> {("a", "b"): 3, ("b", "a"): 3}: how often each adjacent pair occurs
    in all words, a word counting as often as it occurs."""
    raise NotImplementedError


def merge(word: tuple, pair: tuple, new) -> tuple:
    """Replace each occurrence of the pair, from the left: with the pair ("a", "a") and new "Z",
    ("a", "a", "a") -> ("Z", "a")."""
    raise NotImplementedError


def bits_per_byte(nats_per_token: float, tokens: int, n_bytes: int) -> float:
    """The loss in a unit that tokenizers of any size share."""
    raise NotImplementedError
