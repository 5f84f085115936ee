"""Rules that drop bad documents, each with a stated reason (report section 3.1, filtering).

The report filters with Qwen2-Instruct models that score each document (data/quality.py). It
discloses no rules. These come before and are cheap; they follow Gopher (Rae et al. 2021, table A1)
and StarCoder (Li et al. 2023, section 3). Where a limit differs from theirs, it is our choice, made
by reading what the built-in corpus lost.

    for verdict in run_filters(documents, FILTERS):
        print(verdict.stage, verdict.reason)

A stage is any function (text, kind) -> reason, where "" means keep. `python -m data` runs these,
`NearDuplicates` and `Contamination`.
"""
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import NamedTuple


@dataclass(frozen=True)
class Limits:
    """What a document of one kind may have. The defaults let everything pass."""
    min_bytes: int = 1
    max_bytes: float = 1e9
    mean_line: float = inf    # characters per line
    max_line: float = inf     # characters in the longest line
    symbols: float = 1.0      # share of the non-space characters
    digits: float = 1.0       # share of the non-space characters
    repeated: float = 1.0     # share of the characters that stand in repeated lines
    top_4gram: float = 1.0    # share of the characters in the most frequent four words


LIMITS = {
    # Gopher asks for 50 words, but a worked sum has fewer. A paragraph is often one line.
    "prose": Limits(min_bytes=80, symbols=0.30, digits=0.40, repeated=0.20, top_4gram=0.16),
    "code": Limits(min_bytes=80, max_bytes=1e6, mean_line=100, max_line=1000,  # StarCoder's
                   symbols=0.50, digits=0.25, repeated=0.50, top_4gram=0.30),
    # Limits for web pages say nothing about generated questions: a sum consists of digits.
    "synthetic": Limits(),
}

# The joiners U+200C and U+200D carry meaning and stay. A lone surrogate has no UTF-8 form.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\ud800-\udfff]")
DIGIT = re.compile(r"\d")
SYMBOL = re.compile(r"[!-/:-@\[-`{-~\u2010-\u2bff]")  # \W would also match Indic vowel signs
# U+FFFD, C1 controls, and UTF-8 that was read as Latin-1 or cp1252: e-acute becomes two characters.
MOJIBAKE = re.compile("\ufffd|[\x80-\x9f]|[\xc2\xc3][\xa0-\xbf]|\xe2\u20ac")
FURNITURE = re.compile(r"cookie policy|privacy policy|terms of (use|service)|all rights reserved|"
                       r"enable javascript|sign up for|subscribe to|click here|log in to", re.I)
# The end of a sentence, and what the next one begins with: "" at the end of a line, since the next
# line may begin with a name, as of a function.
SENTENCE = re.compile(r"(?<!\.)[.!?][\"'\u2019\u201d)\]]*(?:$|\n| +[\"'\u2018\u201c(\[]*(\w?))")
# Latin, Greek and Cyrillic letters.
CASED = re.compile("[A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u052f\u1e00-\u1eff]")
VOICELESS = re.compile(r"\b[b-df-hj-np-tv-xz]{3,}\b")
GENERATED = re.compile(r"auto-?\s?generated|generated (by|from|automatically)|do not edit", re.I)


def normalise(text: str) -> str:
    """Return the text in NFC (as the tokenizer has it), with \\n for any line end or form feed,
    without controls and trailing spaces, and with at most two blank lines in a row."""
    text = re.sub("\r\n|[\r\x0b\x0c]", "\n", text)
    text = unicodedata.normalize("NFC", CONTROL.sub("", text))  # what a control parted may compose
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


# ---------------------------------------------------------------------------------------------
# the filters: (text, kind) -> the reason to drop the document, or ""

def length(text: str, kind: str = "prose") -> str:
    """Drop what is too short or too long. We count bytes because Chinese has no spaces."""
    size = len(text.encode("utf-8", "replace"))
    if LIMITS[kind].min_bytes <= size <= LIMITS[kind].max_bytes:
        return ""
    return f"{size} bytes"


def encoding(text: str, kind: str = "prose") -> str:
    """Drop text with more than one damaged character in 1000; a page about mojibake survives."""
    damage = len(MOJIBAKE.findall(text))
    return f"{damage} damaged characters" if damage > len(text) / 1000 else ""


def long_lines(text: str, kind: str = "prose") -> str:
    """Drop minified code, and data inside code."""
    sizes = [len(line) for line in text.split("\n")]
    longest = max(sizes)
    mean = sum(sizes) / len(sizes)
    if longest <= LIMITS[kind].max_line and mean <= LIMITS[kind].mean_line:
        return ""
    return f"{mean:.0f} characters a line, at most {longest}"


def visible_share(pattern: re.Pattern, text: str) -> float:
    """Return the share of the characters that match; spaces (indentation) do not count."""
    return len(pattern.findall(text)) / max(1, len("".join(text.split())))


def symbols(text: str, kind: str = "prose") -> str:
    """Drop rulers, ASCII art and markup."""
    share = visible_share(SYMBOL, text)
    return f"{share:.0%} symbols" if share > LIMITS[kind].symbols else ""


def digits(text: str, kind: str = "prose") -> str:
    """Drop tables, logs and character maps: they teach nothing but the numbers themselves."""
    share = visible_share(DIGIT, text)
    return f"{share:.0%} digits" if share > LIMITS[kind].digits else ""


def repetition(text: str, kind: str = "prose") -> str:
    """Drop text of which too much stands in lines seen before, or in one phrase of four words
    (Gopher). A phrase counts from its fourth use: in a short text two already cover 16%."""
    lines = [line.strip() for line in text.split("\n")]
    repeated = 1 - len("".join(set(lines))) / max(1, len("".join(lines)))
    if repeated > LIMITS[kind].repeated:
        return f"{repeated:.0%} in repeated lines"
    words = text.split()
    phrases = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if not phrases:
        return ""
    phrase, uses = phrases.most_common(1)[0]
    share = uses * len("".join(phrase)) / len("".join(words))
    if uses >= 4 and share > LIMITS[kind].top_4gram:
        return f"{share:.0%} is {' '.join(phrase)[:40]!r}"
    return ""


def boilerplate(text: str, kind: str = "prose") -> str:
    """Drop code that says at its top that a program made it. Drop prose that is filler, or that has
    page furniture on a tenth of its lines. (C4 removes such lines; we drop such pages.)"""
    if kind == "code":
        top = "\n".join(text.split("\n", 6)[:6])
        found = GENERATED.search(top)
        return f"says {found[0]!r}" if found else ""
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    lines = [line for line in text.split("\n") if line.strip()]
    furniture = sum(FURNITURE.search(line) is not None for line in lines)
    allowed = max(1, len(lines) / 10)  # a copyright line alone is harmless
    return f"{furniture} of {len(lines)} lines are furniture" if furniture > allowed else ""


def sentences(text: str, kind: str = "prose") -> str:
    """Drop lists of keywords, menus and gibberish, of scripts that have capital letters.

    C4 keeps lines that end in a mark of a sentence and pages with three sentences, Gopher drops
    pages of lines that end in "...". We ask for one sentence in 200 words. Two more rules are ours:
    of shuffled text, most sentences begin with a small letter; gibberish lacks vowels."""
    if kind != "prose" or visible_share(CASED, text) < 0.7:
        return ""
    words = text.split()
    starts = SENTENCE.findall(text)
    if len(words) > 200 * len(starts):
        return f"{len(starts)} sentences in {len(words)} words"
    small = sum(start.islower() for start in starts)
    if small >= 3 and small > len(starts) / 2:
        return f"{small} of {len(starts)} sentences begin with a small letter"
    voiceless = len(VOICELESS.findall(text))
    return f"{voiceless} words without a vowel" if voiceless > len(words) / 5 else ""


# We leave out Gopher's stop-word test: it drops every language but English.
FILTERS = {stage.__name__: stage for stage in (
    length, encoding, long_lines, symbols, digits, repetition, boilerplate, sentences)}


# ---------------------------------------------------------------------------------------------
# running them

class Verdict(NamedTuple):
    document: dict  # with its text normalised
    stage: str      # the stage that drops it, or "kept"
    reason: str     # why; "" if the document is kept


def run_filters(documents, stages: dict):
    """Yield a Verdict for each document. The first stage that gives a reason decides, so the counts
    add up and later stages never see a dropped document."""
    for document in documents:
        document = document | {"text": normalise(document["text"])}
        for name, stage in stages.items():
            reason = stage(document["text"], document.get("kind", "prose"))
            if reason:
                yield Verdict(document, name, reason)
                break
        else:
            yield Verdict(document, "kept", "")
