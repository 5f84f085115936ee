"""Instructions whose following a program can check: the 25 kinds of IFEval (Zhou et al. 2023).

The report filters instructions in this way (section 4.1: verification code), and measures IFEval by
its strict accuracy on prompts. A query names its constraints by kind, such as
"length_constraints:number_words" with {"relation": "at least", "num_words": 300}; `follows` decides
one of them. A reward requires all constraints of a prompt.

The checks follow the paper's descriptions and the verdicts of the public checker. We know of these
differences:

- The language comes from the script, then from frequent words (data/language.py): this needs no
  library and gives the same answer every time. A text without letters is in no language; the public
  checker lets it pass.
- Our own rules below tell sentences and words apart, where the public checker uses NLTK.
- A keyword, a forbidden word or a marker stands for itself, so "C++" is not a regular expression.
- An argument that no response could meet, or that we would misread, is an error. The public checker
  draws some value by chance in place of a missing one.
"""
import json
import re

from data.language import SCRIPTS
from data.language import language as language_of
from lib.args import require

# ---------------------------------------------------------------------------------------------
# arguments

RELATIONS = ["less than", "at least"]  # IFEval has no others
LANGUAGES = sorted({name for names in SCRIPTS.values() for name in names.split()})
CHOICES = {"relation": RELATIONS, "let_relation": RELATIONS, "capital_relation": RELATIONS,
           "language": LANGUAGES}
NUMBERS = ("num_words num_sentences num_paragraphs nth_paragraph num_placeholders num_bullets "
           "num_highlights num_sections frequency let_frequency capital_frequency n").split()
LISTS = ["keywords", "forbidden_words"]


def clean_argument(name: str, value):
    """Return the value without blanks around it, and 2.0 as 2. ValueError for a wrong value."""
    if name in LISTS:
        require(isinstance(value, list) and value, f"{name} must be a list of words, not {value!r}")
        return [clean_argument("a word", word) for word in value]
    if name in NUMBERS:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas writes the integers of a column with gaps as floats
        require(type(value) is int and value >= 0,
                f"{name} must be a whole number, not {value!r}")
        return value
    require(isinstance(value, str) and value.strip(), f"{name} must be a text, not {value!r}")
    value = value.strip()
    if name in CHOICES:
        require(value in CHOICES[name],
                f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    return value


# ---------------------------------------------------------------------------------------------
# words and sentences

ABBREVIATIONS = set(
    "mr mrs ms dr prof st rev hon gen sen rep gov col capt cmdr lt sgt maj adm sr jr inc ltd co "
    "corp bros dept jan feb apr jun jul aug sep sept oct nov dec ave ft vs v p cf al approx e.g "
    "i.e a.m p.m ph.d calif conn fla mich minn tenn wis".split())
OPENERS = set(  # words that have a capital only because a sentence begins
    "a an the this that these those here there he she it we they you i my your his her its our "
    "their in on at by for from with to of as after before during since when while where if "
    "although though despite because until once and but or so yet nor then thus however also now "
    "today yesterday finally first next what who why how which whose some many most all both each "
    "every no not one two several another other such is are was were does did can could would "
    "should let please".split())


def has_word(text: str, word: str) -> bool:
    """Return whether the word is in the text, and not within a longer word; it may have signs."""
    return bool(re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()))


def capital_words(text: str) -> int:
    """Count the words in capitals. The small letters of "NASA's" and "I'm" are a word's ending."""
    words = re.findall(r"\w+(?:['’./-]\w+)*", text)
    stems = [re.sub(r"['’](?:s|m|d|ll|re|ve)$", "", word) for word in words]
    return sum(stem.isupper() for stem in stems)


def opens_sentence(word: str) -> bool:
    """Return whether the capital of this word must be that of a sentence: "It", "However,"."""
    stem = re.split("['’]", word.rstrip(",:;"))[0]
    return stem[:1].isupper() and stem.lower() in OPENERS


def ends_sentence(word: str, following: str) -> bool:
    """Return whether a sentence ends with this word; `following` is the word after it."""
    bare = word.rstrip("\"'”’)]}*")
    if bare.endswith(("!", "?", "。", "！", "？", "।")):
        return True
    if not bare.endswith("."):
        return False
    is_certain = bare == word and opens_sentence(following)
    stem = re.split(r"[^\w.'’]", bare[:-1])[-1].strip("'’")
    if stem.endswith(".") or stem.lower() in ABBREVIATIONS:
        return is_certain
    if re.fullmatch(r"[A-Z](\.[A-Z])*", stem) and stem not in ("P.S", "P.P.S"):
        return is_certain  # initials: a name follows them in most texts
    if re.fullmatch(r"[a-z]|etc|\d[\d.,]*", stem):
        return not following[0].islower()
    return True


def sentences(text: str) -> list[str]:
    """Split a text into sentences, nearly as the public checker does with NLTK's Punkt.

    A sentence ends in . ! ? or their like. Lines and blank lines end none, but the number of a list
    item does: "1. Go home." is two sentences. After an abbreviation, an initial or an ellipsis,
    only a word of OPENERS begins a sentence; Punkt has learned from newspapers which words are no
    names. So we join "He took vitamin C. Oranges have it." and split "Dr. No".

    Unlike Punkt, we know "e.g.", "etc." and "Rev.", curly quotes and the full stops of Chinese and
    Hindi, and count no sentence without a letter or a digit."""
    words = re.sub("([。！？।])", r"\1 ", text).split()
    parts = []
    start = 0
    for i, word in enumerate(words, start=1):
        if i == len(words) or ends_sentence(word, words[i]):
            parts.append(" ".join(words[start:i]))
            start = i
    return [part for part in parts if re.search(r"\w", part)]


# ---------------------------------------------------------------------------------------------
# checks

OPTIONS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
POSTSCRIPTS = {"P.S.": r"(?<!\w)p\.\s?s\.", "P.P.S": r"(?<!\w)p\.\s?p\.\s?s(?!\w)"}


def follows(text: str, kind: str, kw: dict) -> bool:
    """Return whether the response follows one constraint; an empty one never does.

    LookupError for an unknown kind, TypeError for missing or unknown arguments, ValueError for a
    wrong value of one."""
    if not text.strip():
        return False
    if kind not in CHECKS:
        raise LookupError(f"unknown constraint {kind}")
    return CHECKS[kind](text, **{name: clean_argument(name, kw[name]) for name in kw})


def related(count: int, relation: str, bound: int) -> bool:
    require(bound > 0 or relation != "less than", "no response has less than 0")
    return count < bound if relation == "less than" else count >= bound


def occurrences(text: str, part: str) -> int:
    return text.lower().count(part.lower())


def framed(parts: list[str]) -> list[str]:
    """Strip the parts; drop an empty first and an empty last part, which frame the separators."""
    parts = [part.strip() for part in parts]
    start = 0 if parts[0] else 1
    end = len(parts) if parts[-1] else len(parts) - 1
    return parts[start:end]


def has_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = framed(re.split(r"\s?\*\*\*\s?", text))
    return len(parts) == num_paragraphs and all(parts)


def paragraph_starts(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    require(1 <= nth_paragraph <= num_paragraphs,
            f"nth_paragraph must be from 1 to {num_paragraphs}, not {nth_paragraph}")
    require(not re.search(r"[\s.,?!'\"]", first_word),
            f"first_word must be one word without signs, not {first_word!r}")
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(part != "" for part in parts) != num_paragraphs:
        return False
    paragraph = parts[nth_paragraph - 1].lstrip("'\"").lower()
    return re.match(r"[^\s.,?!'\"]*", paragraph)[0] == first_word.lower()


def has_postscript(text: str, postscript_marker: str) -> bool:
    """Return whether the marker is a word of the text. IFEval's own two may hold blanks."""
    if postscript_marker in POSTSCRIPTS:
        return bool(re.search(POSTSCRIPTS[postscript_marker], text.lower()))
    return has_word(text, postscript_marker)


def highlights(text: str) -> int:
    parts = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(part.strip() != "" for part in parts)


def has_title(text: str) -> bool:
    """Return whether a line holds <<a title>>. (A pattern would take quadratic time.)"""
    titles = [line.partition("<<")[2].rpartition(">>")[0] for line in text.split("\n")]
    return any(title.strip("<> ") for title in titles)


def is_json(text: str) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.I)
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def has_two_responses(text: str) -> bool:
    parts = framed(text.split("******"))
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def is_quoted(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


CHECKS = {  # kind: the check of a text, whose arguments have IFEval's names
    "keywords:existence": lambda text, keywords:
        all(occurrences(text, word) > 0 for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words:
        not any(has_word(text, word) for word in forbidden_words),
    "keywords:frequency": lambda text, keyword, relation, frequency:
        related(occurrences(text, keyword), relation, frequency),
    "keywords:letter_frequency": lambda text, letter, let_relation, let_frequency:
        related(occurrences(text, letter), let_relation, let_frequency),
    "punctuation:no_comma": lambda text: "," not in text,
    "language:response_language": lambda text, language: language_of(text) == language,
    "change_case:english_capital": lambda text: text.isupper() and language_of(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and language_of(text) == "en",
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency:
        related(capital_words(text), capital_relation, capital_frequency),
    "length_constraints:number_words": lambda text, relation, num_words:
        related(len(re.findall(r"\w+", text)), relation, num_words),
    "length_constraints:number_sentences": lambda text, relation, num_sentences:
        related(len(sentences(text)), relation, num_sentences),
    "length_constraints:number_paragraphs": has_paragraphs,
    "length_constraints:nth_paragraph_first_word": paragraph_starts,
    "detectable_content:postscript": has_postscript,
    "detectable_content:number_placeholders": lambda text, num_placeholders:
        len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders,
    "detectable_format:number_bullet_lists": lambda text, num_bullets:
        len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-).*$", text, re.M)) == num_bullets,
    "detectable_format:number_highlighted_sections": lambda text, num_highlights:
        highlights(text) >= num_highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections:
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections,
    "detectable_format:title": has_title,
    "detectable_format:json_format": is_json,
    "detectable_format:constrained_response": lambda text:
        any(option in text for option in OPTIONS),
    "combination:two_responses": has_two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "startend:end_checker": lambda text, end_phrase:
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": is_quoted}
