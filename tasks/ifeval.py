"""Instructions whose following a program can check: the 25 kinds of IFEval (Zhou et al. 2023).

The report filters instructions in this way (section 4.1: verification code), and measures IFEval by
its strict accuracy on prompts. A query names its constraints by kind, such as
"length_constraints:number_words" with {"relation": "at least", "num_words": 300}; `follows` decides
one of them. A reward requires all constraints of a prompt.

The checks follow the paper's descriptions and the verdicts of the public checker. We know of two
differences:

- The language comes from the script, then from frequent words (data/language.py): this needs no
  library and gives the same answer every time. A text without letters is in no language; the public
  checker lets it pass.
- Our own rules below tell sentences and words apart, where the public checker uses NLTK.

`queries` makes prompts for training, which is our choice: one to three constraints that go
together, on a subject that no benchmark asks about. No right answer is known in advance, so the
policy has to find it (python -m tasks rejection, dpo.py, grpo.py).
"""
import json
import re
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from data.language import language as language_of

# ---------------------------------------------------------------------------------------------
# checks

OPTIONS = [f"My answer is {word}." for word in ("yes", "no", "maybe")]


def follows(text: str, kind: str, kw: dict) -> bool:
    """Return whether the response follows one constraint; an empty one never does.

    LookupError for an unknown kind, TypeError for missing or unknown arguments."""
    if not text.strip():
        return False
    if kind not in CHECKS:
        raise LookupError(f"unknown constraint {kind}")
    return CHECKS[kind](text, **kw)


def related(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def occurrences(text: str, part: str) -> int:
    return text.lower().count(part.lower())


def has_word(text: str, word: str) -> bool:
    return bool(re.search(rf"\b{re.escape(word.lower())}\b", text.lower()))


def is_in_language(text: str, language: str = "en") -> bool:
    return language_of(text)[0] == language


def capital_words(text: str) -> int:
    words = re.findall(r"[^\W_][\w'.&-]*", text)
    return sum(word.isupper() for word in words)


def sentences(text: str) -> list[str]:
    """Split a text into sentences. A sentence ends in . ! ? (or their like) before a blank, or with
    its line. The full stop of a title, an initial or a list number does not end one."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z]|^\s*\d+)\.", r"\1", text,
                  flags=re.M)
    parts = re.split(r"(?<=[.!?])[\"')*]*\s+|[。！？।]|\n+", text)
    return [part for part in parts if re.search(r"\w", part)]


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
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(part != "" for part in parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    paragraph = parts[nth_paragraph - 1].lstrip("'\"").lower()
    return re.match(r"[^\s.,?!'\"]*", paragraph)[0] == first_word.lower()


def has_postscript(text: str, postscript_marker: str) -> bool:
    letters = postscript_marker.lower().strip(".").split(".")
    return bool(re.search(r"\.\s?".join(letters), text.lower()))


def highlights(text: str) -> int:
    parts = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(part.strip() != "" for part in parts)


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
    "language:response_language": is_in_language,
    "change_case:english_capital": lambda text: text.isupper() and is_in_language(text),
    "change_case:english_lowercase": lambda text: text.islower() and is_in_language(text),
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
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders,
    "detectable_format:number_bullet_lists": lambda text, num_bullets:
        len(re.findall(r"^\s*(?:\*[^*\n]|-).*$", text, re.M)) == num_bullets,
    "detectable_format:number_highlighted_sections": lambda text, num_highlights:
        highlights(text) >= num_highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections:
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections,
    "detectable_format:title": lambda text:
        any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text)),
    "detectable_format:json_format": is_json,
    "detectable_format:constrained_response": lambda text:
        any(option in text for option in OPTIONS),
    "combination:two_responses": has_two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "startend:end_checker": lambda text, end_phrase:
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": is_quoted}


# ---------------------------------------------------------------------------------------------
# prompts for training

FORMS = ("a short story", "a letter", "a blog post", "a speech", "a description", "a review",
         "a diary entry", "an explanation for a child", "a news report", "a product page")
SUBJECTS = ("a lighthouse keeper", "the first snow", "growing tomatoes", "a lost umbrella",
            "night trains", "how bread rises", "a village library", "repairing bicycles",
            "the sound of rain", "learning to swim", "a broken clock", "street markets",
            "keeping bees", "an old map", "the colour green", "a chess tournament",
            "moving house", "a stubborn goat", "tides", "hand-written notes")
KEYWORDS = ("window careful morning bridge silver promise journey quiet market winter candle "
            "garden shadow thunder pocket ladder").split()
ENDINGS = ("That is all for today.", "Thank you for reading.", "What would you do?",
           "And so it goes on.", "I hope this helps.")
LANGUAGE_NAMES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian",
                  "pt": "Portuguese", "ru": "Russian", "hi": "Hindi", "ar": "Arabic",
                  "ko": "Korean", "ja": "Japanese", "vi": "Vietnamese", "fi": "Finnish"}


class Request(NamedTuple):
    """How a prompt asks for one kind of constraint."""
    decides: str      # what it decides about a response; kinds that share a word are not combined
    words: str        # the sentence that asks for it, with the values drawn by `draw_values`
    arguments: dict   # argument of the check: name of the drawn value


PROMPTS = {
    "keywords:existence": Request(
        "words", "Use the words {pair[0]} and {pair[1]}.", {"keywords": "pair"}),
    "keywords:forbidden_words": Request(
        "words", "Do not use the words {pair[0]} or {pair[1]}.", {"forbidden_words": "pair"}),
    "keywords:frequency": Request(
        "words", "The word {keyword} should appear {relation} {few} times.",
        {"keyword": "keyword", "relation": "relation", "frequency": "few"}),
    "keywords:letter_frequency": Request(
        "words", "The letter {letter} should appear {relation} {several} times.",
        {"letter": "letter", "let_relation": "relation", "let_frequency": "several"}),
    "punctuation:no_comma": Request("comma", "Do not use any commas.", {}),
    "language:response_language": Request(
        "case words start end length", "Write everything in {language_name}.",
        {"language": "language"}),
    "change_case:english_capital": Request(
        "case", "Answer in English and in capital letters only.", {}),
    "change_case:english_lowercase": Request(
        "case", "Answer in English and in small letters only, without any capital.", {}),
    "change_case:capital_word_frequency": Request(
        "case end", "Words in all capital letters should appear {relation} {few} times.",
        {"capital_relation": "relation", "capital_frequency": "few"}),
    "length_constraints:number_words": Request(
        "length", "Write {relation} {many} words.", {"relation": "relation", "num_words": "many"}),
    "length_constraints:number_sentences": Request(
        "length", "Write {relation} {several} sentences.",
        {"relation": "relation", "num_sentences": "several"}),
    "length_constraints:number_paragraphs": Request(
        "shape length", "Write exactly {few} paragraphs and put *** between two paragraphs.",
        {"num_paragraphs": "few"}),
    "length_constraints:nth_paragraph_first_word": Request(
        "shape length words start end", "Write exactly {few} paragraphs with an empty line between "
        "two of them; paragraph {nth} must start with the word {keyword}.",
        {"num_paragraphs": "few", "nth_paragraph": "nth", "first_word": "keyword"}),
    "detectable_content:postscript": Request(
        "case end", "Add a postscript that starts with {marker}", {"postscript_marker": "marker"}),
    "detectable_content:number_placeholders": Request(
        "marks", "Leave at least {few} placeholders in square brackets to fill in, such as [name].",
        {"num_placeholders": "few"}),
    "detectable_format:number_bullet_lists": Request(
        "shape", "Include exactly {few} bullet points in markdown, each a line that starts with *",
        {"num_bullets": "few"}),
    "detectable_format:number_highlighted_sections": Request(
        "marks shape", "Highlight at least {few} parts with markdown, like *this part*.",
        {"num_highlights": "few"}),
    "detectable_format:multiple_sections": Request(
        "shape case length", "Divide it into {few} sections that begin with {head} 1 and so on.",
        {"section_spliter": "head", "num_sections": "few"}),
    "detectable_format:title": Request(
        "title", "Give it a title in double angle brackets, such as <<title>>.", {}),
    "detectable_format:json_format": Request(
        "shape start end comma marks", "The whole answer must be valid JSON.", {}),
    "detectable_format:constrained_response": Request(
        "case", f"Include one of these phrases: {' '.join(OPTIONS)}", {}),
    "combination:two_responses": Request(
        "shape start end", "Give two different versions and put six asterisks between them: ******",
        {}),
    "combination:repeat_prompt": Request(
        "start case words", "First repeat the sentence above word for word, then answer it.",
        {"prompt_to_repeat": "request"}),
    "startend:end_checker": Request(
        "case end", "Finish with exactly this sentence and nothing after it: {ending}",
        {"end_phrase": "ending"}),
    "startend:quotation": Request(
        "start end", "Put the whole answer in double quotation marks.", {})}


def draw_values(r: Random, request: str) -> dict:
    """Draw the values that the sentences of PROMPTS may name."""
    few = r.randint(2, 5)
    language = r.choice(list(LANGUAGE_NAMES))
    pair = r.sample(KEYWORDS, 2)
    return {"request": request, "few": few, "several": few + 5, "many": few * 40, "pair": pair,
            "keyword": pair[0], "language": language, "language_name": LANGUAGE_NAMES[language],
            "letter": r.choice("jkqvwxz"), "nth": r.randint(1, few),
            "relation": r.choice(["at least", "less than"]), "ending": r.choice(ENDINGS),
            "marker": r.choice(["P.S.", "P.P.S"]), "head": r.choice(["Section", "Part", "Chapter"])}


def queries(r: Random) -> Iterator[dict]:
    """Yield queries of one to three constraints without end."""
    while True:
        request = f"Write {r.choice(FORMS)} about {r.choice(SUBJECTS)}."
        texts = [request]
        kinds = []
        kwargs = []
        decided = set()
        for kind in r.sample(list(PROMPTS), r.choice([1, 2, 2, 3])):
            decides = set(PROMPTS[kind].decides.split())
            if decided & decides:
                continue
            decided |= decides
            values = draw_values(r, request)
            arguments = PROMPTS[kind].arguments
            texts.append(PROMPTS[kind].words.format(**values))
            kinds.append(kind)
            kwargs.append({name: values[value] for name, value in arguments.items()})
        yield {"prompt": " ".join(texts), "domain": "instruction",
               "check": {"kind": "ifeval", "instruction_id_list": kinds, "kwargs": kwargs}}
