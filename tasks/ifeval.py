r"""Instructions whose following a program can check: the 25 kinds of IFEval (Zhou et al. 2023).

A query names its constraints, "length_constraints:number_words" with {"relation": "at least",
"num_words": 300}, and `follows` says of a response whether it keeps one. Strict is the response as
it stands; loose is right if any of 8 versions of it is: with or without its first line, its last
line and its asterisks (a preamble like "Sure, here it is:" then does no harm). Rewards and the
report's figure are strict, and want all of a prompt's constraints.

    python -m tasks.ifeval FILE...  # responses with constraints: shares kept, agreement by kind

Written from the paper's descriptions and verdicts of the public checker. Known differences:

- The language comes from the script, then from common words (`language`): no library, and the same
  answer every time. A text without letters is in no language; the public checker lets it pass.
- Sentences and words are told apart by the rules below, where the public checker has NLTK's.

The same kinds make prompts for training: `queries` draws one to three constraints that go together
(tests/test_ifeval.py keeps all of them at once) on a subject that no benchmark asks about. A right
answer is not known: let the policy find it (sft.py --queries, dpo.py, grpo.py).
"""
import json
import re
import sys
from itertools import product

from data.language import language
from lib.args import InputError, exit_on_input_error, require
from lib.files import read_jsonl

# ---------------------------------------------------------------------------------------------
# checks

def follows(text: str, kind: str, kw: dict) -> bool:
    """Does the response keep one constraint? An empty one never does. LookupError for an unknown
    kind or a missing argument."""
    bare, low = text.strip(), text.lower()
    if not bare:
        return False
    match kind:
        # words
        case "keywords:existence":
            return all(word.lower() in low for word in kw["keywords"])
        case "keywords:forbidden_words":
            return not any(re.search(rf"\b{re.escape(word.lower())}\b", low)
                           for word in kw["forbidden_words"])
        case "keywords:frequency":
            return related(low.count(kw["keyword"].lower()), kw["relation"], kw["frequency"])
        case "keywords:letter_frequency":
            return related(low.count(kw["letter"].lower()), kw["let_relation"],
                           kw["let_frequency"])
        case "punctuation:no_comma":
            return "," not in text
        # language and case
        case "language:response_language":
            return language(text)[0] == kw["language"]
        case "change_case:english_capital":
            return text.isupper() and language(text)[0] == "en"
        case "change_case:english_lowercase":
            return text.islower() and language(text)[0] == "en"
        case "change_case:capital_word_frequency":
            capital = [word for word in re.findall(r"[^\W_][\w'.&-]*", text) if word.isupper()]
            return related(len(capital), kw["capital_relation"], kw["capital_frequency"])
        # length
        case "length_constraints:number_words":
            return related(len(re.findall(r"\w+", text)), kw["relation"], kw["num_words"])
        case "length_constraints:number_sentences":
            return related(len(sentences(text)), kw["relation"], kw["num_sentences"])
        case "length_constraints:number_paragraphs":
            parts = framed(re.split(r"\s?\*\*\*\s?", text))
            return len(parts) == kw["num_paragraphs"] and all(parts)
        case "length_constraints:nth_paragraph_first_word":
            parts, nth = [part.strip() for part in text.split("\n\n")], kw["nth_paragraph"] - 1
            first = parts[nth].lstrip("'\"").lower() if nth < len(parts) else ""
            return (sum(map(bool, parts)) == kw["num_paragraphs"]
                    and re.match(r"[^\s.,?!'\"]*", first)[0] == kw["first_word"].lower())
        # form
        case "detectable_content:postscript":
            dots = r"\.\s?".join(kw["postscript_marker"].lower().strip(".").split("."))
            return bool(re.search(dots, low))
        case "detectable_content:number_placeholders":
            return len(re.findall(r"\[.*?\]", text)) >= kw["num_placeholders"]
        case "detectable_format:number_bullet_lists":
            bullets = re.findall(r"^\s*(?:\*[^*\n]|-).*$", text, re.M)
            return len(bullets) == kw["num_bullets"]
        case "detectable_format:number_highlighted_sections":
            marked = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
            return sum(bool(part.strip()) for part in marked) >= kw["num_highlights"]
        case "detectable_format:multiple_sections":
            heads = re.findall(rf"{re.escape(kw['section_spliter'])}\s?\d+", text)
            return len(heads) >= kw["num_sections"]
        case "detectable_format:title":
            return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text))
        case "detectable_format:json_format":
            return is_json(re.sub(r"^```(?:json)?|```$", "", bare, flags=re.I))
        case "detectable_format:constrained_response":
            return any(option in text for option in OPTIONS)
        case "combination:two_responses":
            parts = framed(text.split("******"))
            return len(parts) == 2 and all(parts) and parts[0] != parts[1]
        case "combination:repeat_prompt":
            return bare.lower().startswith(kw["prompt_to_repeat"].strip().lower())
        case "startend:end_checker":
            return bare.strip('"').lower().endswith(kw["end_phrase"].strip().lower())
        case "startend:quotation":
            return len(bare) > 1 and bare[0] == bare[-1] == '"'
    raise LookupError(f"unknown constraint {kind}")


OPTIONS = [f"My answer is {word}." for word in ("yes", "no", "maybe")]


def related(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def framed(parts: list[str]) -> list[str]:
    """Stripped parts; before the first and behind the last separator there may be nothing."""
    parts = [part.strip() for part in parts]
    return parts[not parts[0]:len(parts) - (not parts[-1])]


def sentences(text: str) -> list[str]:
    """A sentence ends in . ! ? (or their like) before a blank; not behind a title, an initial, or
    the number of a list, and a line of its own is one, too."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z]|^\s*\d+)\.", r"\1", text,
                  flags=re.M)
    return [part for part in re.split(r"(?<=[.!?])[\"')*]*\s+|[。！？।]|\n+", text)
            if re.search(r"\w", part)]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def loose(text: str, kind: str, kw: dict) -> bool:
    lines = text.split("\n")
    cuts = ["\n".join(lines[a:len(lines) - b]).strip() for a, b in product((0, 1), (0, 1))]
    return any(follows(version, kind, kw)
               for cut in [text, *cuts[1:]] for version in (cut, cut.replace("*", "")))


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

# kind: (what of a response it decides on, the sentence that asks for it, its arguments: which of
# the things drawn below). Kinds that decide on something in common do not go together.
PROMPTS = {
    "keywords:existence": (
        "words", "Use the words {pair[0]} and {pair[1]}.", {"keywords": "pair"}),
    "keywords:forbidden_words": (
        "words", "Do not use the words {pair[0]} or {pair[1]}.", {"forbidden_words": "pair"}),
    "keywords:frequency": (
        "words", "The word {keyword} should appear {relation} {few} times.",
        {"keyword": "keyword", "relation": "relation", "frequency": "few"}),
    "keywords:letter_frequency": (
        "words", "The letter {letter} should appear {relation} {several} times.",
        {"letter": "letter", "let_relation": "relation", "let_frequency": "several"}),
    "punctuation:no_comma": ("comma", "Do not use any commas.", {}),
    "language:response_language": (
        "case words start end length", "Write everything in {language_name}.",
        {"language": "language"}),
    "change_case:english_capital": (
        "case", "Answer in English and in capital letters only.", {}),
    "change_case:english_lowercase": (
        "case", "Answer in English and in small letters only, without any capital.", {}),
    "change_case:capital_word_frequency": (
        "case end", "Words in all capital letters should appear {relation} {few} times.",
        {"capital_relation": "relation", "capital_frequency": "few"}),
    "length_constraints:number_words": (
        "length", "Write {relation} {many} words.", {"relation": "relation", "num_words": "many"}),
    "length_constraints:number_sentences": (
        "length", "Write {relation} {several} sentences.",
        {"relation": "relation", "num_sentences": "several"}),
    "length_constraints:number_paragraphs": (
        "shape length", "Write exactly {few} paragraphs and put *** between two paragraphs.",
        {"num_paragraphs": "few"}),
    "length_constraints:nth_paragraph_first_word": (
        "shape length words start end", "Write exactly {few} paragraphs with an empty line between "
        "two of them; paragraph {nth} must start with the word {keyword}.",
        {"num_paragraphs": "few", "nth_paragraph": "nth", "first_word": "keyword"}),
    "detectable_content:postscript": (
        "case end", "Add a postscript that starts with {marker}", {"postscript_marker": "marker"}),
    "detectable_content:number_placeholders": (
        "marks", "Leave at least {few} placeholders in square brackets to fill in, such as [name].",
        {"num_placeholders": "few"}),
    "detectable_format:number_bullet_lists": (
        "shape", "Include exactly {few} bullet points in markdown, each a line that starts with *",
        {"num_bullets": "few"}),
    "detectable_format:number_highlighted_sections": (
        "marks shape", "Highlight at least {few} parts with markdown, like *this part*.",
        {"num_highlights": "few"}),
    "detectable_format:multiple_sections": (
        "shape case length", "Divide it into {few} sections that begin with {head} 1 and so on.",
        {"section_spliter": "head", "num_sections": "few"}),
    "detectable_format:title": (
        "title", "Give it a title in double angle brackets, such as <<title>>.", {}),
    "detectable_format:json_format": (
        "shape start end comma marks", "The whole answer must be valid JSON.", {}),
    "detectable_format:constrained_response": (
        "case", f"Include one of these phrases: {' '.join(OPTIONS)}", {}),
    "combination:two_responses": (
        "shape start end", "Give two different versions and put six asterisks between them: ******",
        {}),
    "combination:repeat_prompt": (
        "start case words", "First repeat the sentence above word for word, then answer it.",
        {"prompt_to_repeat": "request"}),
    "startend:end_checker": (
        "case end", "Finish with exactly this sentence and nothing after it: {ending}",
        {"end_phrase": "ending"}),
    "startend:quotation": ("start end", "Put the whole answer in double quotation marks.", {})}


def queries(r):
    """Endless queries of one to three constraints, drawn from the random.Random r."""
    while True:
        request = f"Write {r.choice(FORMS)} about {r.choice(SUBJECTS)}."
        texts, kinds, kwargs, taken = [request], [], [], set()
        for kind in r.sample(list(PROMPTS), r.choice([1, 2, 2, 3])):
            places, text, arguments = PROMPTS[kind]
            if taken & {*places.split()}:
                continue
            few, language = r.randint(2, 5), r.choice(list(LANGUAGE_NAMES))
            pair = r.sample(KEYWORDS, 2)
            drawn = {"pair": pair, "keyword": pair[0], "letter": r.choice("jkqvwxz"),
                     "few": few, "several": few + 5, "many": few * 40, "nth": r.randint(1, few),
                     "relation": r.choice(["at least", "less than"]), "language": language,
                     "language_name": LANGUAGE_NAMES[language], "ending": r.choice(ENDINGS),
                     "marker": r.choice(["P.S.", "P.P.S"]), "request": request,
                     "head": r.choice(["Section", "Part", "Chapter"])}
            texts.append(text.format(**drawn))
            kinds.append(kind)
            kwargs.append({name: drawn[what] for name, what in arguments.items()})
            taken |= {*places.split()}
        yield {"prompt": " ".join(texts), "domain": "instruction",
               "check": {"kind": "ifeval", "instruction_id_list": kinds, "kwargs": kwargs}}


# ---------------------------------------------------------------------------------------------
# responses with constraints, and the public checker's verdicts where the file has them

def main(paths: list[str]) -> None:
    require(len(paths) > 0, "name files of responses with constraints")
    rows, strict, relaxed = {}, [], []
    for where, row in ((f"{path}:{n}", row) for path in paths for n, row in read_jsonl(path)):
        try:
            kinds = row.get("instruction_id_list") or [row["instruction_id"]]
            kwargs = row["kwargs"] if "instruction_id_list" in row else [row["kwargs"]]
            labels = row.get("follow_strict") or [row.get("follow")] * len(kinds)
            cases = [*zip(kinds, kwargs, labels, strict=True)]
            verdicts = [[check(row["response"], kind, kw) for check in (follows, loose)]
                        for kind, kw, _ in cases]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: want response, instruction_id_list and kwargs "
                             f"({error!r})") from None
        for (kind, _, label), pair in zip(cases, verdicts, strict=True):
            rows.setdefault(kind, []).append((*pair, label))
        strict.append(all(a for a, _ in verdicts))
        relaxed.append(all(b for _, b in verdicts))
    print(f"{'kind':48}{'n':>5}{'strict':>9}{'loose':>9}{'agree with the verdicts':>26}")
    for kind, got in [*sorted(rows.items()), ("all constraints", sum(rows.values(), []))]:
        labelled = [(a, label) for a, _, label in got if label is not None]
        agree = f"{sum(a == label for a, label in labelled)} of {len(labelled)}"
        print(f"{kind:48}{len(got):5}{sum(a for a, *_ in got) / len(got):9.1%}"
              f"{sum(b for _, b, _ in got) / len(got):9.1%}{agree:>26}")
    print(f"{'prompts with all of theirs kept':48}{len(strict):5}{sum(strict) / len(strict):9.1%}"
          f"{sum(relaxed) / len(relaxed):9.1%}")


if __name__ == "__main__":
    exit_on_input_error(main, sys.argv[1:])
