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
    x = 3                   3                     yes: so is the name
    x = 3 = 4               3                     no
    2+3                     5                     no: the sum is still to be worked out
    5                       2+3                   yes
    x^2-4                   (x-2)(x+2)            yes
    2x = 4y+2               x - 2y = 1            yes: an equation times a number is the same one
    (1,2)                   (2,1)                 no, nor 1,2 and 2,1
    \{1,2\}                 2, 1                  yes: with a set on either side, order is free
    1 \pm 2                 \{1+2, 1-2\}          yes
    -2 < x \le 7            (-2,7]                yes
    (B) 12                  B                     yes
    1 2 3 4 5               3                     no: a list of guesses

GRPO finds and exploits a reward that pays for wrong answers. So the matcher is a whitelist: what
its small grammar cannot read is compared as text, and nothing is ever evaluated as code. An answer
goes through four steps, each a section below:

    extract_answer   "So \boxed{x = \dfrac12}."  -> "x = \dfrac12"      find the final answer
    normal_text      -> "x=\frac{1}{2}"                                 give it one spelling
    parse            -> Value(1/2), or a text, or Node(kind, parts)     read it as a tree
    same             compare two trees

Not covered, so compared as text: functions (sin, log, |x|, 5!), number bases, 2x - y = 0 against
y = 2x. i*i is not -1. As in public graders, upper and lower case are the same, and units are
dropped, so 5 cm = 5 kg. `python bench/answers.py FILE...` measures how often the matcher is wrong.
"""
import math
import re
import zlib
from fractions import Fraction
from typing import NamedTuple

# 9^9^9^9 is seven characters of endless arithmetic. With these limits no input takes 0.1 s.
MAX_CHARS, MAX_NESTED = 300, 50
MAX_BITS = 4096
TOLERANCE = 1e-9  # for roots and for float noise such as 17.999999999999996

# ---------------------------------------------------------------------------------------------
# 1. find the final answer

BOX = re.compile(r"(\\{1,2}f?box(?:ed)?\s*\{)|\\[{}\\]|([{}])")
# Stands between boxes that are one answer: "," "and" ", y =" "or x =". A mere "or" is a correction.
CHAIN = re.compile(r"[\s$]*(?:,|;|\++|,? ?and|,? ?or(?=.*=))[\s$]*(?:[a-z]\s*=\s*)?")
PHRASE = re.compile(r"(?:^[ \t]*\**A(?:nswer)?\**[ \t]*[:：]|\b[Aa]nswer\**[ \t]*(?:is|[:：])|"
                    r"答案[是为：:])[ \t:：*]*(?=\S)", re.M)
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\\\[(.{1,300}?)\\\]|\\\((.{1,300}?)\\\)|"
                     r"\$((?:\\.|[^$\\\n]){1,300})\$(?!\d)", re.S)  # "$5 or $6" is no formula
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?!\d)(?:/\d+)?%?")


class Box(NamedTuple):
    start: int  # of \boxed{...} in the text
    end: int
    content: str


def extract_answer(text: str, strict: bool = False) -> str | None:
    r"""Return the final answer of a response. None is a parse failure, which is worth counting.

    The answer is the last \boxed{}, else the line behind ####, else what follows the last "A:" or
    "answer is". Else, unless `strict`, it is the text itself, its last formula or last number."""
    answer = last_box(text)
    if answer is None:  # an empty box gets no second chance elsewhere
        answer = marked_answer(text)
    if answer is None and not strict:
        answer = bare_answer(text)
    return (answer or "").strip() or None


def marked_answer(text: str) -> str | None:
    """Return the answer behind the last #### or behind a phrase such as "the answer is"."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().partition("\n")[0]
    parts = PHRASE.split(text)
    if len(parts) == 1:
        return None
    return re.split(r"\n|。|\.(?:\s|$)", parts[-1])[0].strip("* ")  # to the sentence's end


def bare_answer(text: str) -> str | None:
    """Return the text if it can be read as an answer itself, else its last formula or number."""
    has_words = re.search(r"[a-z][\s$]+[a-z]", text)
    if not has_words and not parse_failed(text):
        return text
    if formulas := FORMULA.findall(text):
        return "".join(formulas[-1])  # one of four groups, the others are empty
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def boxes(text: str) -> list[Box]:
    r"""Return each closed \boxed{...} in the order of closing: outer boxes after inner ones."""
    opened, found = [], []
    for match in BOX.finditer(text):
        if match[1] or match[2] == "{":
            opened.append(match)
        elif match[2] and opened:
            start = opened.pop()
            if start[1]:
                content = text[start.end():match.start()]
                found.append(Box(start.start(), match.end(), content))
    return found


def last_box(text: str) -> str | None:
    r"""Return the content of the last box; "\boxed{1} and \boxed{2}" is one answer: "1, 2"."""
    start = None
    parts = []
    for box in boxes(text)[:-11:-1]:  # the last ten, backwards
        if start is None:
            parts = [box.content]
        elif box.end > start:
            continue  # this box stands within the one behind it
        elif not CHAIN.fullmatch(text[box.end:start]):
            break
        elif not math_equal(box.content, parts[0]):  # "\boxed{1/2}, \boxed{0.5}" repeats itself
            parts.insert(0, box.content)
        start = box.start
    return ", ".join(parts) if parts else None


# ---------------------------------------------------------------------------------------------
# 2. give it one spelling

UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "，": ",", "&": ",", "²": "^2", "³": "^3",
    "°": r"^\circ ", "€": "", "£": "", "¥": "", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4"})
COMMANDS = "frac|sqrt|alpha|beta|theta|lambda|omega|infty|pi"
# Words behind a number that are no unit: otherwise "5 dozen" would be 5, and "3 or 4" be 3.
NOT_UNIT = (rf"(?:{COMMANDS}|or|and|not|but|mod|more|less|than|pct|percent|percentage|am|pm"
            r"|[a-z]*illion|hundred|thousand|dozens?|half|halves|thirds?|quarters?|factorial"
            r"|squared|cubed)\b")
TEXT = re.compile(r"\\(?:text|mbox|math)(?:rm|bf|it)?\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(,\d{3})+(?!,?\d)")


def join_thousands(match) -> str:
    return THOUSANDS.sub(lambda number: number[0].replace(",", ""), match[0])


REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # Ornament. (?<!\\) keeps the row break \\ of a matrix whole.
    (r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,)(?=\d{3})", ""),  # 10{,}000  32,\!348  10\,000
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|~", " "),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[cf]\b)?|\\degrees?(?![a-z])", ""),
    # LaTeX. A matrix becomes [1,0;0,1;]
    (r"\\begin\{(?:[pbv]?matrix|array)\}(?:\{[lcr| ]*\})?", "["),
    (r"(?:\\\\\s*)?\\end\{(?:[pbv]?matrix|array)\}", ";]"),
    (r"\\\\", ";"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac34: TeX takes one digit for each part
    (r"\\(?:cdot|times|ast)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"), (r"\*\*", "^"),
    (r"\\leq?(?:slant)?(?![a-z])|<=", "≤"), (r"\\geq?(?:slant)?(?![a-z])|>=", "≥"),
    (r"\\neq?(?![a-z])", "≠"), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"([_^])\s*\{(\w+)\}", r"\1\2"),
    # Numbers. 2e-3 is 0.002, but 2e - 3, with blanks, has a letter e.
    (r"(?<=\d)e([+-]?\d+)\b", r"*10^\1"),
    (r"(?<=\d)\s*hundred\b", "*10^2"), (r"(?<=\d)\s*thousand\b", "*10^3"),
    (r"(?<=\d)\s*million\b", "*10^6"), (r"(?<=\d)\s*billion\b", "*10^9"),
    (r"(?<=\d)\s*(?:percent(?:age)?|pct)\b|\s*\\?%", "%"),
    # 12,345 is a number, but in (12,345) the comma separates. "1,000, 2,000" still has its blank.
    (r"^(?!.*(?:[(\[]|\\\{)).*", join_thousands),
    # Lists, then blanks. Numbers are never joined: "1 2" is not 12.
    (r"^(?=.*[<>≤≥])(.*)\bor\b", r"\1\\cup "),  # x < 1 or x > 2
    (r"(?<=[\d})])\s*,?\s+(?:or|and)\s", ","),
    (r"(?<!\w)\s+|\s+(?!\w)", ""),
    # 1\frac{4}{5} and 1 4/5 are sums
    (r"(?<![\d.^_])(?<!\d )(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.^_])(?<!\d )(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\.+$", ""))]


def normal_text(answer: str) -> str:
    """Return the one spelling that equal text answers share, and that the grammar below reads."""
    if found := boxes(answer):
        answer = found[-1].content
    text = answer.casefold().translate(UNICODE)
    if not re.search("matrix|array", text):
        text = re.sub(r"\\\\(?=[a-z]{2})", r"\\", text)  # \\frac was escaped once too often
    text = TEXT.sub(text_command, " ".join(text.split())).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


def text_command(match) -> str:
    r"""Drop \text{m} behind a number: it is a unit. Elsewhere \text{} holds the answer."""
    before = match.string[:match.start()].rstrip()
    behind_number = re.search(r"[\d)}]$|\\pi$", before)
    if behind_number and not re.match(rf"\s*{NOT_UNIT}|.*\d", match[1]):
        return ""
    return f" {match[1].strip()}{match[2] or ''} "


# ---------------------------------------------------------------------------------------------
# 3a. read one value: recursive descent over a whitelist of tokens; anything else is a ValueError

TOKEN = re.compile(rf"\s*(?:(\d+\.?\d*|\.\d+)|\\?({COMMANDS})(?![a-z])|([a-z](?:_\w)?)|"
                   r"([-+*/^(){}\[\]]))", re.A)
# What counts as worked out. Otherwise "37*12+5" would answer "What is 37*12+5?", and "10/5" 10 : 5.
NUMERAL = re.compile(r"[-+]?\(?[-+]?[\d.]+\)?(?:\*10\^[({]?[-+]?\d+[)}]?)?")
FRACTION = re.compile(r"[-+]?\(?[-+]?(?:\d+\+)?(?:[\d.]+/[-+]?[\d.]+|"
                      r"\\frac\{[-+]?[\d.]+\}\{[-+]?[\d.]+\})\)?")


def read_tokens(text: str) -> list[str]:
    """Return the tokens of an expression. ValueError if it holds anything else."""
    tokens = [match[match.lastindex] for match in TOKEN.finditer(text)]
    rest = TOKEN.sub("", text)
    nested = sum(token in ("(", "{", "^", "frac", "sqrt") for token in tokens)
    if rest or nested > MAX_NESTED:
        raise ValueError(text)
    # xy is x*y, but a word is no product: "read" must not equal "dear".
    for word in re.findall("[a-z]+", text):
        if word not in COMMANDS.split("|") and (len(word) > 2 or word == "ln"):
            raise ValueError(text)
    return tokens


class Value:
    """An expression with its number, its symbols, and whether it is worked out (`final`).

    number: a Fraction, or a float after a root. final: it is a numeral, or a fraction that is no
    integer. Letters and pi stand for fixed arbitrary fractions, and two expressions are equal if
    their numbers are: different polynomials agree at an arbitrary point with a probability of about
    degree / 2^31 (Schwartz-Zippel). So (x-2)(x+2) = x^2-4 needs no algebra system."""

    def __init__(self, text: str, point: str = ""):
        self.tokens = read_tokens(text)[::-1]  # a stack: the next token is the last
        self.point = point
        self.symbols = set()
        self.number = self.sum()
        if self.tokens:
            raise ValueError(text)
        is_fraction = FRACTION.fullmatch(text) and self.number.denominator != 1
        self.final = bool(NUMERAL.fullmatch(text) or is_fraction)
        self.percent = False

    def take(self, *wanted: str) -> str:
        """Pop the next token if it is one of `wanted`, else return ""."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def sum(self):
        """sum = product {(+|-) product}"""
        total = self.product()
        while sign := self.take("+", "-"):
            product = self.product()
            total = bounded(total + product if sign == "+" else total - product)
        return total

    def product(self):
        """product = factor {[*|/] factor}. Without a sign (2x) no number may follow: a list of
        guesses "1 2 3" must not become a number."""
        value = self.factor()
        while self.tokens and re.match(r"[*/({a-z]", self.tokens[-1]):
            sign = self.take("*", "/")
            factor = self.factor()
            value = bounded(value / factor if sign == "/" else value * factor)
        return value

    def factor(self):
        """factor = {+|-} atom [^ factor]. So -2^2 = -4, as in print."""
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        number = self.atom()
        if self.take("^"):
            number = power(number, self.factor())
        return -number if negative else number

    def atom(self):
        """atom = number | letter | (sum) | {sum} | frac atom atom | sqrt [degree] atom"""
        token = self.tokens.pop() if self.tokens else ""
        if re.match(r"[\d.]", token):
            return Fraction(token)
        if token in ("(", "{"):
            value = self.sum()
            if not self.take(")" if token == "(" else "}"):
                raise ValueError("bracket")
            return value
        if token == "frac":
            return bounded(self.atom() / self.atom())
        if token == "sqrt":
            return self.root()
        if not token[:1].isalpha():
            raise ValueError(token)
        self.symbols.add(token)
        checksum = zlib.crc32((token + self.point).encode())  # hash() differs by process
        return 1 + Fraction(checksum, 2**31 - 1)

    def root(self):
        """What follows sqrt: [degree] atom"""
        degree = Fraction(2)
        if self.take("["):
            degree = self.atom()
            if degree not in (2, 3, 4) or not self.take("]"):
                raise ValueError("root")
        return power(self.atom(), 1 / degree)


def bits(number) -> int:
    """Return the length of the longer of numerator and denominator."""
    return max(part.bit_length() for part in number.as_integer_ratio())


def bounded(number):
    """Return the number. ValueError if it is long, OverflowError if it is infinite (inf == inf)."""
    if bits(number) > MAX_BITS:
        raise ValueError("too large")
    return number


def power(base, exponent):
    """Return base^exponent, exact for whole exponents. ValueError for a complex result."""
    is_whole = exponent == int(exponent)
    if base < 0 and not is_whole:
        raise ValueError("exponent")
    if isinstance(base, float) or not is_whole:
        return bounded(float(base) ** float(exponent))
    if bits(base) * abs(exponent) > MAX_BITS:  # asked before computing, not after
        raise ValueError("too large")
    return base ** int(exponent)


# ---------------------------------------------------------------------------------------------
# 3b. read a whole answer as a node: a Value, a text, or a Node

# What may stand before the answer: "x =", "f(x) =", "(x,y) =", "x \in"
LEADING_NAME = re.compile(r"^(?:\\?[a-z]+(?:_\w+)?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))"
                          r"(?:=|\\in(?![a-z]) ?)")
SHORT_UNIT = "(?:mm|cm|km/h|km|m/s|kg|mg|ml|mph|lbs?|oz|ft)"
UNIT = rf"(?:{SHORT_UNIT}|(?!{NOT_UNIT})(?:in|of|[a-z]{{3,}}))"
# "5 apples", "60 miles per hour", "\frac{1}{2}cm^2"; but not "3abc", which is a product
WITH_UNITS = re.compile(rf"(.*(?:[\d)}}]|\\pi)) ?(?:{SHORT_UNIT}|(?<=[ )}}]){UNIT})"
                        rf"(?:[ /]{UNIT}){{0,3}}(?:\^\d)?\.?")
INTERVAL = re.compile(r"(?:([^<>≤≥]+)([<≤]))?(?:\\?[a-z](?:_\w)?|\\[a-z]+)(?:([<≤])([^<>≤≥]+))?")
BRACKETS = re.compile(r"(\\\{|[{(\[])(.+?)\\?([})\]])")
PLUS_MINUS = re.compile(r"\\pm(?![a-z]) ?")
MIRROR = str.maketrans("<>≤≥", "><≥≤")


class Node(NamedTuple):
    kind: str    # a pair of brackets like "(]"; or what separates a list without brackets; or "="
    parts: list  # of "=": the Values of left - right at two points


def parse(text: str):
    """Return the node of a normal text. What cannot be read stays a text, so nothing raises."""
    text = interval(LEADING_NAME.sub("", text))
    kind, texts = parts_of(text)
    if not kind:
        return leaf(text)
    parts = [parse(part) for part in texts]
    if kind == "()" and len(parts) == 1:  # mere grouping
        return parts[0]
    return Node(kind, parts)


def interval(text: str) -> str:
    """x≤5 -> (-\\infty,5]; 2<x≤3 and 3≥x>2 -> (2,3]. Any other text stays as it is."""
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
        if len(found) > 1 or (found and opening != "{"):  # TeX groups with {x}
            kind, parts = opening[-1] + closing, found
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
    """Return a number with or without its unit or percent sign, an expression, an equation, or the
    text itself."""
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
    """Return left - right at two points. If two equations have the same ratio at both, one is a
    multiple of the other (with the probability above)."""
    first = Value(f"({left})-({right})")
    second = Value(f"({left})-({right})", point="'")
    if not first.symbols or first.number == 0 or second.number == 0:
        raise ValueError("it says nothing")
    return Node("=", [first, second])


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
    if kinds == {"="}:
        left, right = a.parts, b.parts
        ratios_agree = close(left[0].number * right[1].number, left[1].number * right[0].number)
        return left[0].symbols == right[0].symbols and ratios_agree
    # A set may be written without its braces.
    if len(a.parts) != len(b.parts) or (len(kinds) == 2 and kinds != {",", "{}"}):
        return False
    if "{}" in kinds or kinds == {r"\cup"}:
        return same_in_any_order(a.parts, b.parts)
    return all(same(x, y) for x, y in zip(a.parts, b.parts, strict=True))


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


DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
LONE_LETTER = re.compile(r"\(?[a-e]\)?")


def choice(answer: str) -> str:
    r"""Return the letter of "(B) 12", "b. twelve", \text{(B)}, "option B"; else ""."""
    text = TEXT.sub(r" \1 ", answer).strip("$ ").casefold()
    letters = set(re.findall(r"(?<![\w\\])([b-e]|a(?=[).]|$))(?![\w^])", text))  # "a" may be a word
    begins = re.match(r"(?:option |choice )?\(?([a-e])(?:[).](?=\s|$)|$)", text)
    return begins[1] if begins and letters == {begins[1]} else ""


def math_equal(prediction: str, gold: str) -> bool:
    """Return whether two final answers mean the same. Blank never matches. Never raises or hangs.

    If the gold is worked out, the prediction must be, too: 2^10 is not 1024, but 1024 is 2^10.
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


def parse_failed(answer: str) -> bool:
    """Return whether a part of the answer is only text to the matcher."""
    return len(answer) > MAX_CHARS or has_text(parse(normal_text(answer)))


def has_text(node) -> bool:
    if isinstance(node, Node):
        return any(has_text(part) for part in node.parts)
    return isinstance(node, str)
