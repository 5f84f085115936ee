r"""When do two mathematical answers mean the same?

The report keeps a sampled response if its answer matches the annotated one (section 4.1), and
rewards it for that in reinforcement learning (section 4.3). It does not disclose the matcher; this
one is our choice.

    answer                  against               same?
    1,000                   1000                  yes, but (1,000) is the pair of 1 and 0
    \frac12                 0.5                   yes: numbers are exact fractions
    1/3                     0.33                  no: rounding is an error
    1\frac45                9/5                   yes: a mixed number is a sum
    10%                     0.1                   yes
    10%                     10                    yes too: "what percent?" is answered either way
    $5                      5 apples              yes: currency, units, degrees are dropped
    5 dozen                 5                     no: a word for a number is no unit
    0.\overline{3}          1/3                   yes
    x = 3                   3                     yes: so is the name
    x = 3 = 4               3                     no
    x = 1, y = 2            y = 2, x = 1          yes: a list with names is compared by them
    y = 1, x = 2            (1,2)                 no: x comes before y
    2+3                     5                     no: the sum is still to be worked out
    5                       2+3                   yes
    x^2-4                   (x-2)(x+2)            yes
    \ln(x+x)                \ln 2x                yes
    2x = 4y+2               x - 2y = 1            yes: an equation times a number is the same one
    (1,2)                   (2,1)                 no, nor 1,2 and 2,1
    \{1,2\}                 2, 1                  yes: with a set on either side, order is free
    1 \pm 2                 \{1+2, 1-2\}          yes
    -2 < x \le 7            (-2,7]                yes
    (B) 12                  B                     yes
    1 2 3 4 5               3                     no: a list of guesses

GRPO finds and exploits a reward that pays for wrong answers. So the matcher is a whitelist: what
its small grammar cannot read is compared as text, and nothing is ever evaluated as code. An answer
goes through four steps:

    extract_answer   "So \boxed{x = \dfrac12}."  -> "x = \dfrac12"      find the final answer
    normal_text      -> "x=\frac{1}{2}"     give it one spelling (tasks/answer_spelling.py)
    parse            -> Value(1/2) (tasks/answer_values.py), or a text, or Node(kind, parts)
    same             compare two such trees

Not covered, so compared as text: |x|, 5!, number bases. Of functions we know no laws: \ln 6 is not
\ln 2 + \ln 3. Nor do we solve anything: 2x - y = 0 is not y = 2x, and i*i is not -1. If you need
these, recipes/math_verify.md takes a matcher with an algebra system. As in public graders, upper
and lower case are the same, and units are dropped, so 5 cm = 5 kg. `python bench/answers.py
FILE...` measures how often the matcher is wrong.
"""
import math
import re
from fractions import Fraction
from typing import NamedTuple

from tasks.answer_spelling import COMMANDS, TEXT, WITH_UNITS, boxes, normal_text
from tasks.answer_values import WORD, Value
from tasks.code_blocks import without_thinking

MAX_CHARS = 300  # a longer answer is compared as it stands
TOLERANCE = 1e-9  # for roots and for float noise such as 17.999999999999996

# ---------------------------------------------------------------------------------------------
# 1. find the final answer

BOLD = re.compile(r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]+)\*\*")  # 2**3**2 is a power
PHRASE = re.compile(r"""(?:
    ^[ \t\#*]*A[ \t]*[:：]                                         # A: 18
    |^[ \t\#*]*(?i:(?:the\ )?(?:final\ |correct\ )?answer)[ \t*]*$  # ## Final Answer, then 18 below
    |\b(?i:ans(?:wers?)?|correct\ (?:option|choice))\**[ \t]*      # ANSWER: 18, the answer is 18
     (?:[:：=]|(?i:is(?:\ equal\ to|\ therefore|\ thus)?|are|equals|(?:would|must)\ be)\b)
    |答案[是为：:]
    )[\s:：*]*(?=\S)""", re.M | re.X)
BARE_BOX = re.compile(r"\\boxed\s+(\w)(?=\.?\s*(?:\$|\\[)\]]|$))", re.M)  # \boxed 2
DISPLAY = re.compile(r"\$\$[^$]+\$\$|\\\[.{1,300}?\\\]", re.S)
SENTENCE_END = re.compile(r"\n|。|(?<!\bRs)\.(?:\s|$)")
REASON = re.compile(r",? \(?(?:because|since|as|which|so|where|given|due to|thus|hence|therefore|"
                    r"i\.e|that is)\b.*", re.I)
# Stands between boxes that are one answer: "," "and" ", y =" "or x =". A mere "or" is a correction.
CHAIN = re.compile(r"(?:,|,?and,?|,?or(?=.*=),?) ?(?:\\?[A-Za-z](?:_\w)? ?= ?)?")
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\\\[(.{1,300}?)\\\]|\\\((.{1,300}?)\\\)|"
                     r"\$((?:\\.|[^$\\\n]){1,300})\$(?!\d)", re.S)  # "$5 or $6" is no formula
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?!\d)(?:/\d+)?%?")


def extract_answer(text: str, strict: bool = False) -> str | None:
    r"""Return the final answer of a response. None is a parse failure, which is worth counting.

    Thinking does not count, and nothing counts beside an <answer>. The answer is the last \boxed{},
    else the line behind ####, else what follows the last "A:" or "answer is", else all of <answer>.
    Else, unless `strict`, it is the text itself, its last formula or last number."""
    text = without_thinking(text)
    _, tag, tagged = text.rpartition("<answer>")
    if tag:
        text = tagged.partition("</answer>")[0]
    text = BARE_BOX.sub(r"\\boxed{\1}", text)
    answer = last_box(text)
    if answer is None:  # an empty box gets no second chance elsewhere
        text = BOLD.sub(r"\1", text)
        answer = marked_answer(text)
    if answer is None and tag:
        answer = text
    if answer is None and not strict:
        answer = bare_answer(text)
    return (answer or "").strip() or None


def marked_answer(text: str) -> str | None:
    """Return the answer behind the last #### or behind a phrase such as "the answer is"."""
    if "####" in text:
        behind = text.rsplit("####", 1)[1].strip()
        phrase = PHRASE.match(behind)
        return behind[phrase.end() if phrase else 0:].partition("\n")[0]
    behind = PHRASE.split(text)[1:]
    if not behind:
        return None
    if display := DISPLAY.match(behind[-1]):
        return display[0]
    sentence = SENTENCE_END.split(behind[-1])[0]
    return REASON.sub("", " ".join(sentence.split())).strip("* ").rstrip(" ,;—–-")


def bare_answer(text: str) -> str | None:
    """Return the text if it can be read as an answer itself, else its last formula or number."""
    has_words = re.search(r"[a-z][\s$]+[a-z]", text)
    if not has_words and not parse_failed(text):
        return text
    if formulas := FORMULA.findall(text):
        return "".join(formulas[-1])  # one of four groups, the others are empty
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_box(text: str) -> str | None:
    r"""Return the content of the last box; "\boxed{1} and \boxed{2}" is one answer: "1, 2"."""
    start = None
    parts = []
    for box in boxes(text)[:-11:-1]:  # the last ten, backwards
        if start is None:
            parts = [box.content]
        elif box.end > start:
            continue  # this box stands within the one behind it
        elif not is_chain(text[box.end:start]):
            break
        elif not math_equal(box.content, parts[0]):  # "\boxed{1/2}, \boxed{0.5}" repeats itself
            parts.insert(0, box.content)
        start = box.start
    return ", ".join(parts) if parts else None


def is_chain(between: str) -> bool:
    r"""Return whether the text between two boxes makes them one answer: "\) \text{and} \(y="."""
    plain = re.sub(r"\\q?quad", ",", TEXT.sub(r" \1 ", between))
    plain = re.sub(r"\\[!,;: ()\[\]]|\$", " ", plain)
    plain = re.sub("[ ,;+]*[,;+][ ,;+]*", ",", " ".join(plain.split()))
    return bool(CHAIN.fullmatch(plain))


# ---------------------------------------------------------------------------------------------
# 2. are two answers the same?

DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
LONE_LETTER = re.compile(r"\(?[a-j]\)?")


def math_equal(prediction: str, gold: str) -> bool:
    """Return whether two final answers mean the same. Blank never matches. Never raises or hangs.

    If the gold is worked out, the prediction must be, too: 2^10 is not 1024, but 1024 is 2^10. A
    fraction need not be reduced, and a number times a power of ten is worked out: 10^3 is 1000.
    Algebra has no such test: x(x+1) equals x^2+x, so do not use it for "expand" and "factor"."""
    if not (isinstance(prediction, str) and isinstance(gold, str)):
        return False
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.split() == gold.split() != []
    a, b = normal_text(prediction), normal_text(gold)
    if not a or not b:
        return False
    if LONE_LETTER.fullmatch(a) or LONE_LETTER.fullmatch(b):
        a = choice(prediction) or a
        b = choice(gold) or b
    if (DECIMAL_COMMA.fullmatch(a) and "." in b) or (DECIMAL_COMMA.fullmatch(b) and "." in a):
        a, b = a.replace(",", "."), b.replace(",", ".")  # 1,22 beside 1.22 is no list
    try:
        return a == b or same(parse(a), parse(b))
    except OverflowError:  # a root or a fraction beside a number beyond all floats
        return False


LABEL = re.compile(r"(?<![\w\\])([b-hj]|[ai](?=[).:]|$))(?![\w^])")  # "a" and "i" may be words
# "(B) 12", "B: twelve", "B - a dozen", but not the difference "b - 12"
CHOICE = re.compile(r"(?:option |choice )?\(?([a-j])"
                    rf"(?:\)?[).:](?=\s|$)|\)?$|\)? [-–—(] ?(?:an? )?(?!{WORD})[a-z]{{3}})")


def choice(answer: str) -> str:
    r"""Return the letter of "(B) 12", "b: twelve", \text{(B)}, "option B", "B - a dozen"; or ""."""
    text = TEXT.sub(r" \1 ", answer).strip("$ ").casefold()
    letters = set(LABEL.findall(text))
    begins = CHOICE.match(text)
    return begins[1] if begins and letters == {begins[1]} else ""


def parse_failed(answer: str) -> bool:
    """Return whether a part of the answer is only text to the matcher."""
    return len(answer) > MAX_CHARS or has_text(parse(normal_text(answer)))


def has_text(node) -> bool:
    if isinstance(node, Node):
        return any(has_text(part) for part in node.parts)
    return isinstance(node, str)


# ---------------------------------------------------------------------------------------------
# 3. read a whole answer as a node: a Value, a text, or a Node

NAME = re.compile(r"""  # what may stand before the answer
    (   (?:[a-z]{2,}\ )*                                    # total cost =
        (?:[a-z]*\\(?:angle|triangle|overline\{|sin|cos|tan)\ ?)?   # m\angle abc =
        (?!\\?pi(?![a-z]))\\?[a-z]+\}?(?:_(?:\w+|\{[^{}]*\}))?'*    # x =   x_1 =   \theta =   y' =
        (?:(?:\^\{?-1\}?)?\([\w,]*\))?                      # f^{-1}(x) =
    |   d\w?/d\w | \\frac\{d\w?\}\{d\w\}                    # dy/dx =
    |   p\([^()]*\)                                         # p(a|b) =
    |   \([a-z](?:,[a-z])+\)                                # (x,y) =
    |   (?=[=≈])                                            # =
    )(?:[=≈]|\\in(?![a-z])\ ?)(?=[^=≈])""", re.X)
BOUNDED = re.compile(r"(\\?[a-z](?:_\w)?)[<>≤≥≠]")
# x≠3, or all numbers without 3
HOLE = re.compile(r"\\?[a-z](?:_\w)?≠([^,<>≤≥≠]+)|"
                  r"\(-\\infty,\\infty\)\\(?:setminus|backslash) ?\\?\{([^,]+?)\\?\}")
INTERVAL = re.compile(r"(?:([^<>≤≥]+)([<≤]))?(?:\\?[a-z](?:_\w)?|\\[a-z]+)(?:([<≤])([^<>≤≥]+))?")
BRACKETS = re.compile(r"(\\\{|[{(\[])(.+?)\\?([})\]])")
PLUS_MINUS = re.compile(r"\\pm(?![a-z]) ?")
MIRROR = str.maketrans("<>≤≥", "><≥≤")


class Node(NamedTuple):
    kind: str    # a pair of brackets like "(]"; or what separates a list without brackets; or "="
    parts: list  # of "=": one Value, see `equation`
    names: list = []  # of "x=1,y=2": x and y


def parse(text: str):
    """Return the node of a normal text. What cannot be read stays a text, so nothing raises."""
    text = interval(text)
    kind, texts = parts_of(text)
    if not kind:
        return leaf(text)
    parts = [parse(part) for part in texts]
    if kind == "()" and len(parts) == 1:  # mere grouping
        return parts[0]
    matches = [NAME.match(part) or BOUNDED.match(part) for part in texts]
    names = [match[1] if match else "" for match in matches]
    return named(Node(kind, parts), names)


def named(node, names: list[str]):
    """Return the node with the names of its parts, if each has one. Coordinates x, y, z have their
    own order, so that y=2,x=1 is (1,2)."""
    if not isinstance(node, Node) or "" in names or len(names) != len(node.parts):
        return node
    node = Node(node.kind, node.parts, names)
    return Node(node.kind, by_name(node), sorted(names)) if set(names) <= set("xyz") else node


def by_name(node: Node) -> list:
    """Return the parts in the order of their names."""
    pairs = sorted(zip(node.names, node.parts, strict=True), key=lambda pair: pair[0])
    return [part for _, part in pairs]


def interval(text: str) -> str:
    r"""x≤5 -> (-\infty,5]; 2<x≤3 and 3≥x>2 -> (2,3]; x≠3 -> (-\infty,3)\cup(3,\infty). Any other
    text stays as it is."""
    if match := HOLE.fullmatch(text):
        hole = match[match.lastindex]
        return rf"(-\infty,{hole})\cup({hole},\infty)"
    rising = text
    if re.search("[>≥]", text):  # to be read from the right
        rising = "".join(re.split("([<>≤≥])", text)[::-1]).translate(MIRROR)
    match = INTERVAL.fullmatch(rising)
    if not match or not any(match.groups()):
        return text
    low, left, right, high = match.groups()
    opening = "[" if left == "≤" else "("
    closing = "]" if right == "≤" else ")"
    return opening + (low or r"-\infty") + "," + (high or r"\infty") + closing


def parts_of(text: str) -> tuple[str, list[str]]:
    """Return the kind and the texts of the parts; ("", [text]) if the text is no list."""
    kind, parts = "", [text]
    if match := BRACKETS.fullmatch(text):
        opening, inner, closing = match.groups()
        found = split(inner, ",")
        if found:
            kind, parts = opening[-1] + closing, found
        if len(found) == 1 and opening == "{":  # TeX groups with {x}
            kind = "()"
    for separator in (",", ";", r"\cup"):  # the last to be found is the outermost
        found = split(text, separator)
        if len(found) > 1:
            kind = separator
            parts = found[:-1] if separator == ";" else found  # every row ends in ;
    if kind in ("", ",", "{}") and PLUS_MINUS.search(text):
        kind = "{}"
        signed = [PLUS_MINUS.sub(sign, part) for part in parts for sign in "+-"]
        parts = list(dict.fromkeys(signed))
    return kind, parts


def split(text: str, separator: str) -> list[str]:
    """Split outside brackets; [] if they do not close. Any closes any: "(a,b]" is an interval."""
    parts = []
    start = depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return []
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i].strip())
            start = i + len(separator)
    return parts + [text[start:].strip()] if depth == 0 else []


def leaf(text: str):
    r"""Return a number with or without its unit or percent sign, an expression, an equation, or the
    text itself; or the node behind a name such as "x="."""
    if name := NAME.match(text):
        node = parse(text[name.end():])
        coordinates = re.findall("[a-z]", name[1]) if name[1].startswith("(") else []
        return named(node, coordinates)
    text = text.partition("≈")[0]  # \frac13 ≈ 0.33 is \frac13
    match = WITH_UNITS.fullmatch(text)
    number = (match[1] if match else text).removesuffix("%")
    if len(number) > 1 and number.isalpha() and number not in COMMANDS.split("|"):
        return text  # a word
    try:
        if number.count("=") == 1:
            left, right = number.split("=")
            return equation(left, right)
        value = Value(number)
        value.percent = text.endswith("%")
        return value
    except (ValueError, ZeroDivisionError, OverflowError):
        return text


def equation(left: str, right: str) -> Node:
    """Return the ratio of left - right at two points. If two equations have the same, one is a
    multiple of the other (with the probability of class Value)."""
    value = Value(f"({left})-({right})")
    second = Value(f"({left})-({right})", point="'")
    if not value.symbols or value.number == 0 or second.number == 0:
        raise ValueError("it says nothing")
    value.number /= second.number
    return Node("=", [value])


# ---------------------------------------------------------------------------------------------
# 4. compare two trees

def same(a, b) -> bool:
    """Return whether prediction a means the same as gold b. Their order matters only to `final`."""
    if isinstance(a, Value) and isinstance(b, Value):
        return same_value(a, b)
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    if isinstance(a, Value):  # 5 against {5}
        a = Node("{}", [a])
    if isinstance(b, Value):
        b = Node("{}", [b])
    kinds = {a.kind, b.kind}
    if len(a.parts) != len(b.parts) or not (len(kinds) == 1 or may_be_alike(kinds, a, b)):
        return False
    if a.names and b.names:
        pairs = zip(by_name(a), by_name(b), strict=True)
        return sorted(a.names) == sorted(b.names) and all(same(x, y) for x, y in pairs)
    if "{}" in kinds or kinds == {r"\cup"}:
        return same_in_any_order(a.parts, b.parts)
    return all(same(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def may_be_alike(kinds: set[str], a: Node, b: Node) -> bool:
    """A set may be written without its braces, and a point with names: x=1,y=2 (but x=1,x=2 are two
    solutions)."""
    is_point = any(len(set(node.names)) == len(node.parts) for node in (a, b))
    return kinds == {",", "{}"} or (kinds == {",", "()"} and is_point)


def same_value(a: Value, b: Value) -> bool:
    # Echoed arithmetic is no answer, and no number may hit the value that stands for a letter.
    if (b.final and not a.final) or a.symbols != b.symbols:
        return False
    share_a = a.number / 100 if a.percent else a.number
    share_b = b.number / 100 if b.percent else b.number
    return close(a.number, b.number) or close(share_a, share_b)  # 10% is like 10 and like 0.1


def same_in_any_order(a: list, b: list) -> bool:
    rest = list(b)
    for item in a:
        hit = next((other for other in rest if same(item, other)), None)
        if hit is None:
            return False
        rest.remove(hit)
    return True


def close(a, b) -> bool:
    """Return whether two numbers are equal but for the noise of floats."""
    if a == b:
        return True
    if isinstance(a, Fraction) and isinstance(b, Fraction) and a.denominator == b.denominator == 1:
        return False  # tolerance is for decimals: 10^12 is not 10^12 + 1
    return math.isclose(a, b, rel_tol=TOLERANCE) and float(b) != 0  # 0: 10^-400 is not 10^-500
