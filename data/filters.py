"""Cleaning: normalise, then filters that each give a reason."""
import re
import unicodedata
from collections import Counter, defaultdict

from data.language import language

# ---------------------------------------------------------------------------------------------
# cleaning: normalise, then filters that each give a reason

# Gopher (Rae et al. 2021, table A1) and StarCoder (Li et al. 2023, section 3) publish such limits;
# where a value differs it is our choice, made by reading what the built-in corpus lost.
LIMITS = {
    "prose": {"min_bytes": 80, "max_bytes": 1e9,       # Gopher: 50 words; a worked sum has fewer
              "mean_line": 1e9, "max_line": 1e9,       # a paragraph is often one line
              "symbols": 0.30, "digits": 0.40,         # of the non-space characters
              "repeated": 0.20, "top_4gram": 0.16},    # of the characters, as Gopher
    "code": {"min_bytes": 80, "max_bytes": 1e6, "mean_line": 100, "max_line": 1000,  # StarCoder
             "symbols": 0.50, "digits": 0.25, "repeated": 0.50, "top_4gram": 0.30},
    # What damns a web page says nothing about generated questions: sums are all digits.
    "synthetic": {"min_bytes": 1, "max_bytes": 1e9, "mean_line": 1e9, "max_line": 1e9,
                  "symbols": 1, "digits": 1, "repeated": 1, "top_4gram": 1},
}
# Joiners (200C, 200D) carry meaning and stay; a lone surrogate could not be written as UTF-8.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\ud800-\udfff]")
SYMBOL = re.compile(r"[!-/:-@\[-`{-~\u2010-\u2bff]")  # no \W: it would count Indic vowel signs
# U+FFFD, C1 controls, and UTF-8 read as Latin-1 or cp1252 (e-acute becomes two characters).
MOJIBAKE = re.compile("\ufffd|[\x80-\x9f]|[\xc2\xc3][\xa0-\xbf]|\xe2\u20ac")
FURNITURE = re.compile(r"cookie policy|privacy policy|terms of (use|service)|all rights reserved|"
                       r"enable javascript|sign up for|subscribe to|click here|log in to", re.I)
GENERATED = re.compile(r"auto-?\s?generated|generated (by|from|automatically)|do not edit", re.I)


def normalise(text: str) -> str:
    """NFC (as the tokenizer does), newlines only, no control characters (a BOM, a form feed), no
    trailing spaces, at most two blank lines in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t]+$", "", CONTROL.sub("", text), flags=re.M)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def length(text: str, kind: str = "prose") -> str:
    """Bytes, not words: Chinese has no spaces."""
    size = len(text.encode("utf-8", "replace"))
    inside = LIMITS[kind]["min_bytes"] <= size <= LIMITS[kind]["max_bytes"]
    return "" if inside else f"{size} bytes"


def encoding(text: str, kind: str = "prose") -> str:
    """Decoding damage above one character in 1000, so that a page about mojibake survives."""
    damage = len(MOJIBAKE.findall(text))
    return f"{damage} damaged characters" if damage > len(text) / 1000 else ""


def long_lines(text: str, kind: str = "prose") -> str:
    """Minified code and data in code."""
    sizes = [len(line) for line in text.split("\n")]
    longest, mean = max(sizes), sum(sizes) / len(sizes)
    bad = longest > LIMITS[kind]["max_line"] or mean > LIMITS[kind]["mean_line"]
    return f"{mean:.0f} characters a line, at most {longest}" if bad else ""


def symbols(text: str, kind: str = "prose") -> str:
    """Rulers, ASCII art, markup. Spaces do not count: indentation would dilute it in code."""
    ratio = len(SYMBOL.findall(text)) / max(1, len("".join(text.split())))
    return f"{ratio:.0%} symbols" if ratio > LIMITS[kind]["symbols"] else ""


def digits(text: str, kind: str = "prose") -> str:
    """Tables, logs, character maps: nothing to learn but the numbers themselves."""
    ratio = len(re.findall(r"\d", text)) / max(1, len("".join(text.split())))
    return f"{ratio:.0%} digits" if ratio > LIMITS[kind]["digits"] else ""


def repetition(text: str, kind: str = "prose") -> str:
    """Two of Gopher's measures: characters in lines seen before, and characters covered by the most
    frequent 4 words. A phrase counts from its 4th use: in a short text 2 uses are already 16%."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    ratio = 1 - sum(map(len, set(lines))) / max(1, sum(map(len, lines)))
    if ratio > LIMITS[kind]["repeated"]:
        return f"{ratio:.0%} in repeated lines"
    words = text.split()
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
    ratio = count * sum(map(len, gram)) / max(1, sum(map(len, words)))
    bad = count >= 4 and ratio > LIMITS[kind]["top_4gram"]
    return f"{ratio:.0%} is {' '.join(gram)[:40]!r}" if bad else ""


def boilerplate(text: str, kind: str = "prose") -> str:
    """Code: a machine-made file says so at its top. Prose: filler, or page furniture on a tenth of
    the lines (C4 cuts such lines out; a page that consists of them we drop)."""
    if kind == "code":
        found = GENERATED.search("\n".join(text.split("\n", 6)[:6]))
        return f"says {found[0]!r}" if found else ""
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    lines = [line for line in text.split("\n") if line.strip()]
    found = sum(FURNITURE.search(line) is not None for line in lines)
    bad = found > max(1, len(lines) / 10)  # a copyright line alone is harmless
    return f"{found} of {len(lines)} lines are furniture" if bad else ""


def other_language(text: str, kind: str = "prose", wanted=()) -> str:
    """A page where not even one word in twenty is a frequent one of its language is "unknown"."""
    if not wanted or kind != "prose":
        return ""
    found, share = language(text)
    found = found if share > 0.05 else "unknown"
    return "" if found in wanted else f"language {found}"


# The first reason counts, so the counts add up. Gopher's stop-word test is left out: it drops
# every language but English.
FILTERS = {f.__name__: f for f in
           (length, encoding, long_lines, symbols, digits, repetition, boilerplate)}


def run_filters(documents, stages: dict):
    """Yields (document, stage, reason): each document normalised, with the first stage that gives a
    reason to drop it, or ("kept", "")."""
    for doc in documents:
        doc = doc | {"text": normalise(doc["text"])}
        reasons = ((name, f(doc["text"], doc.get("kind", "prose"))) for name, f in stages.items())
        yield doc, *next((pair for pair in reasons if pair[1]), ("kept", ""))


def filter_documents(documents, stages: dict) -> tuple[list[dict], dict]:
    """`verdicts` for lists that fit in memory -> documents kept, report {"kept": n, "dropped":
    {stage: n}, "samples": {stage: [[reason, start of the text], at most 3]}}."""
    kept, dropped, samples = [], Counter(), defaultdict(list)
    for doc, name, reason in run_filters(documents, stages):
        if not reason:
            kept.append(doc)
            continue
        dropped[name] += 1
        samples[name] = (samples[name] + [[reason, doc["text"][:200]]])[:3]
    return kept, {"kept": len(kept), "dropped": dict(dropped), "samples": dict(samples)}
