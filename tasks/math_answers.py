r"""When are two mathematical answers the same? And readers of the public benchmark files.

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

A reward that pays for wrong answers is found and exploited by GRPO, so the matcher is a whitelist:
what its small grammar cannot read is compared as text, and nothing is ever evaluated as code. An
answer goes through four steps, each a section below:

    extract_answer   "So \boxed{x = \dfrac12}."  -> "x = \dfrac12"      where is it?
    normal_text      -> "x=\frac{1}{2}"                                 one spelling
    parse            -> Value(1/2), or a text, or (kind, parts)         one tree
    same             compares two trees

Not covered, so compared as text: functions (sin, log, |x|, 5!), number bases, 2x - y = 0 against
y = 2x. i*i is not -1. Upper and lower case are one, and units are dropped, as public graders do, so
5 cm = 5 kg. `python bench/answers.py FILE...` measures how often all this is wrong.
"""
import math
import re
import zlib
from fractions import Fraction

# 9^9^9^9 is seven characters of endless arithmetic; these limits keep any input far below 0.1 s.
MAX_CHARS, MAX_NESTED, MAX_BITS = 300, 50, 4096
TOLERANCE = 1e-9  # for roots and for float noise such as 17.999999999999996

# ---------------------------------------------------------------------------------------------
# 1. where is the answer?

BOX = re.compile(r"(\\{1,2}f?box(?:ed)?\s*\{)|\\[{}\\]|([{}])")
# Between boxes that are one answer: "," "and" ", y =" "or x =". But a mere "or" is a correction
CHAIN = re.compile(r"[\s$]*(?:,|;|\++|,? ?and|,? ?or(?=.*=))[\s$]*(?:[a-z]\s*=\s*)?")
PHRASE = re.compile(r"(?:^[ \t]*\**A(?:nswer)?\**[ \t]*[:：]|\b[Aa]nswer\**[ \t]*(?:is|[:：])|"
                    r"答案[是为：:])[ \t:：*]*(?=\S)", re.M)
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\\\[(.{1,300}?)\\\]|\\\((.{1,300}?)\\\)|"
                     r"\$((?:\\.|[^$\\\n]){1,300})\$(?!\d)", re.S)      # "$5 or $6" is no formula
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?!\d)(?:/\d+)?%?")


def extract_answer(text: str, strict: bool = False) -> str | None:
    r"""The last \boxed{}, else the line behind ####, else behind the last "A:" or "answer is".
    Else, unless `strict`, a text that is an answer itself, the last formula, the last number. None
    if there is none: a parse failure, to be counted."""
    if (answer := last_box(text)) is not None:
        pass  # even if empty: no second chance elsewhere
    elif "####" in text:
        answer = text.rsplit("####", 1)[1].strip().partition("\n")[0]
    elif len(found := PHRASE.split(text)) > 1:
        answer = re.split(r"\n|。|\.(?:\s|$)", found[-1])[0].strip("* ")  # to the sentence's end
    elif strict:
        answer = ""
    elif not re.search(r"[a-z][\s$]+[a-z]", text) and not parse_failed(text):
        answer = text
    else:
        found = [*filter(None, (FORMULA.findall(text) or [[]])[-1])] or NUMBER.findall(text)
        answer = found[-1] if found else ""
    return answer.strip() or None


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each closed \boxed{...}, by last brace: outer after inner."""
    stack, found = [], []
    for match in BOX.finditer(text):
        if match[1] or match[2] == "{":
            stack.append(match)
        elif match[2] and stack and (start := stack.pop())[1]:
            found.append((start.start(), match.end(), text[start.end():match.start()]))
    return found


def last_box(text: str) -> str | None:
    r"""The last box. "\boxed{1} and \boxed{2}" is one answer in two: "1, 2"."""
    start, parts = None, []
    for begin, end, content in boxes(text)[:-11:-1]:  # backwards
        if start is None:
            parts = [content]
        elif end > start:
            continue  # it stands within the box behind it
        elif not CHAIN.fullmatch(text[end:start]):
            break
        elif not math_equal(content, parts[0]):  # "\boxed{1/2}, \boxed{0.5}" says one thing twice
            parts.insert(0, content)
        start = begin
    return ", ".join(parts) if parts else None


# ---------------------------------------------------------------------------------------------
# 2. many spellings -> one

UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "，": ",", "&": ",", "²": "^2", "³": "^3",
    "°": r"^\circ ", "€": "", "£": "", "¥": "", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4"})
NAMES = "frac|sqrt|alpha|beta|theta|lambda|omega|infty|pi"
# Words behind a number that are no unit: without them "5 dozen" would be 5, and "3 or 4" be 3
NOT_UNIT = (rf"(?:{NAMES}|or|and|not|but|mod|more|less|than|pct|percent|percentage|am|pm"
            r"|[a-z]*illion|hundred|thousand|dozens?|half|halves|thirds?|quarters?|factorial"
            r"|squared|cubed)\b")
TEXT = re.compile(r"\\(?:text|mbox|math)(?:rm|bf|it)?\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(,\d{3})+(?!,?\d)")
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # ornament. (?<!\\): the row break \\ of a matrix stays whole
    (r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,)(?=\d{3})", ""),            # 10{,}000  32,\!348  10\,000
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|~", " "),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[cf]\b)?|\\degrees?(?![a-z])", ""),
    # LaTeX
    (r"\\begin\{(?:[pbv]?matrix|array)\}(?:\{[lcr| ]*\})?", "["),  # a matrix is [1,0;0,1;]
    (r"(?:\\\\\s*)?\\end\{(?:[pbv]?matrix|array)\}", ";]"), (r"\\\\", ";"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),                 # \frac34: TeX takes a digit each
    (r"\\(?:cdot|times|ast)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"), (r"\*\*", "^"),
    (r"\\leq?(?:slant)?(?![a-z])|<=", "≤"), (r"\\geq?(?:slant)?(?![a-z])|>=", "≥"),
    (r"\\neq?(?![a-z])", "≠"), (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"), (r"([_^])\s*\{(\w+)\}", r"\1\2"),
    # numbers. 2e-3 is 0.002; 2e - 3, with blanks, has a letter e
    (r"(?<=\d)e([+-]?\d+)\b", r"*10^\1"), (r"(?<=\d)\s*hundred\b", "*10^2"),
    (r"(?<=\d)\s*thousand\b", "*10^3"), (r"(?<=\d)\s*million\b", "*10^6"),
    (r"(?<=\d)\s*billion\b", "*10^9"), (r"(?<=\d)\s*(?:percent(?:age)?|pct)\b|\s*\\?%", "%"),
    # 12,345 is a number; in (12,345) the comma separates. Now, while "1,000, 2,000" has its blank
    (r"^(?!.*(?:[(\[]|\\\{)).*", lambda text: THOUSANDS.sub(
        lambda number: number[0].replace(",", ""), text[0])),
    # lists, then blanks; but never join: "1 2" is not 12
    (r"^(?=.*[<>≤≥])(.*)\bor\b", r"\1\\cup "),                    # x < 1 or x > 2
    (r"(?<=[\d})])\s*,?\s+(?:or|and)\s", ","), (r"(?<!\w)\s+|\s+(?!\w)", ""),
    # 1\frac{4}{5} and 1 4/5 are sums
    (r"(?<![\d.^_])(?<!\d )(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.^_])(?<!\d )(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\.+$", ""))]


def normal_text(answer: str) -> str:
    """The one spelling that equal text answers share, and that the grammar below reads."""
    if found := boxes(answer):
        answer = found[-1][2]
    text = answer.casefold().translate(UNICODE)
    if not re.search("matrix|array", text):
        text = re.sub(r"\\\\(?=[a-z]{2})", r"\\", text)  # \\frac: escaped once too often
    text = TEXT.sub(text_command, " ".join(text.split())).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


def text_command(match) -> str:
    r"""\text{m} behind a number is a unit and goes; elsewhere \text{} holds the answer."""
    behind_number = re.search(r"[\d)}]$|\\pi$", match.string[:match.start()].rstrip())
    if behind_number and not re.match(rf"\s*{NOT_UNIT}|.*\d", match[1]):
        return ""
    return f" {match[1].strip()}{match[2] or ''} "


# ---------------------------------------------------------------------------------------------
# 3a. one value: recursive descent over a whitelist of tokens; anything else is a ValueError

TOKEN = re.compile(rf"\s*(?:(\d+\.?\d*|\.\d+)|\\?({NAMES})(?![a-z])|([a-z](?:_\w)?)|"
                   r"([-+*/^(){}\[\]]))", re.A)
# What counts as worked out. Without it "37*12+5" answers "What is 37*12+5?", and "10/5" 10 : 5.
NUMERAL = re.compile(r"[-+]?\(?[-+]?[\d.]+\)?(?:\*10\^[({]?[-+]?\d+[)}]?)?")
FRACTION = re.compile(r"[-+]?\(?[-+]?(?:\d+\+)?(?:[\d.]+/[-+]?[\d.]+|"
                      r"\\frac\{[-+]?[\d.]+\}\{[-+]?[\d.]+\})\)?")


class Value:
    """An expression: its `number` (Fraction, or float after a root), the `symbols` that occur in
    it, and whether it is worked out (`final`): a numeral, or a fraction that is no integer.

    Letters and pi stand for fixed arbitrary fractions, and two expressions are equal when their
    numbers are: different polynomials agree at an arbitrary point with probability about
    degree / 2^31 (Schwartz-Zippel), so (x-2)(x+2) = x^2-4 needs no algebra system."""

    def __init__(self, text: str, point: str = ""):
        # xy is x*y, but a word is no product: "read" must not equal "dear"
        words = set(re.findall("[a-z]+", text)) - set(NAMES.split("|"))
        self.tokens = [match[match.lastindex] for match in TOKEN.finditer(text)][::-1]  # a stack
        nested = sum(token in ("(", "{", "^", "frac", "sqrt") for token in self.tokens)
        if (TOKEN.sub("", text) or nested > MAX_NESTED
                or any(len(word) > 2 or word == "ln" for word in words)):
            raise ValueError(text)
        self.symbols, self.point = set(), point
        self.number = self.sum()
        if self.tokens:
            raise ValueError(text)
        self.percent = False
        self.final = bool(NUMERAL.fullmatch(text) or (
            FRACTION.fullmatch(text) and self.number.denominator != 1))

    def take(self, *wanted: str) -> str:
        """Pops the next token if it is one of `wanted`; else returns ''."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def sum(self):
        """sum = product {(+|-) product}"""
        total = self.product()
        while sign := self.take("+", "-"):
            total = bounded(total + self.product() * (1 if sign == "+" else -1))
        return total

    def product(self):
        """product = factor {[*|/] factor}; without a sign (2x) no number may follow, since a list
        of guesses "1 2 3" must not come out as a number."""
        value = self.factor()
        while self.tokens and re.match(r"[*/({a-z]", self.tokens[-1]):
            sign = self.take("*", "/")
            factor = self.factor()
            value = bounded(value / factor if sign == "/" else value * factor)
        return value

    def factor(self):
        """factor = {+|-} atom [^ factor]; so -2^2 = -4, as in print"""
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
            degree = Fraction(2)
            if self.take("[") and ((degree := self.atom()) not in (2, 3, 4) or not self.take("]")):
                raise ValueError("root")
            return power(self.atom(), 1 / degree)
        if not token[:1].isalpha():
            raise ValueError(token)
        self.symbols.add(token)  # crc32, since hash() differs by process
        return 1 + Fraction(zlib.crc32((token + self.point).encode()), 2**31 - 1)


def bounded(number):
    """Keeps chains of products small, and infinity out (OverflowError): inf == inf would match."""
    if max(part.bit_length() for part in number.as_integer_ratio()) > MAX_BITS:
        raise ValueError("too large")
    return number


def power(base, exponent):
    """Exact for whole exponents; negative bases with others are complex and refused."""
    whole = exponent == int(exponent)
    if base < 0 and not whole:
        raise ValueError("exponent")
    if isinstance(base, float) or not whole:
        return bounded(float(base) ** float(exponent))
    if max(part.bit_length() for part in base.as_integer_ratio()) * abs(exponent) > MAX_BITS:
        raise ValueError("too large")  # asked before computing, not after
    return base ** int(exponent)


# ---------------------------------------------------------------------------------------------
# 3b. a whole answer -> a node: a Value, a text, or (kind, nodes). The kind is a pair of brackets
# like "(]", or what separates a list without brackets, or the "=" of an equation

NAME = re.compile(r"^(?:\\?[a-z]+(?:_\w+)?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))"  # x  f(x)  (x,y)
                  r"(?:=|\\in(?![a-z]) ?)")
SHORT = "(?:mm|cm|km/h|km|m/s|kg|mg|ml|mph|lbs?|oz|ft)"
UNIT = rf"(?:{SHORT}|(?!{NOT_UNIT})(?:in|of|[a-z]{{3,}}))"
# "5 apples", "60 miles per hour", "\frac{1}{2}cm^2"; but not "3abc", which is a product
UNITS = re.compile(rf"(.*(?:[\d)}}]|\\pi)) ?(?:{SHORT}|(?<=[ )}}]){UNIT})(?:[ /]{UNIT}){{0,3}}"
                   r"(?:\^\d)?\.?")


def parse(text: str):
    """Normal text -> node. What cannot be read stays a text, so nothing raises."""
    text = interval(NAME.sub("", text))
    kind, parts = parts_of(text)
    if not kind:
        return leaf(text)
    nodes = [parse(part) for part in parts]
    return nodes[0] if kind == "()" and len(nodes) == 1 else (kind, nodes)  # (x) is mere grouping


INTERVAL = re.compile(r"(?:([^<>≤≥]+)([<≤]))?(?:\\?[a-z](?:_\w)?|\\[a-z]+)(?:([<≤])([^<>≤≥]+))?")
PLUS_MINUS = re.compile(r"\\pm(?![a-z]) ?")
MIRROR = str.maketrans("<>≤≥", "><≥≤")


def interval(text: str) -> str:
    """x≤5 -> (-\\infty,5]; 2<x≤3 and 3≥x>2 -> (2,3]. Any other text stays as it is."""
    rising = text
    if re.search("[>≥]", text):  # to be read from the right
        rising = "".join(re.split("([<>≤≥])", text)[::-1]).translate(MIRROR)
    match = INTERVAL.fullmatch(rising)
    if not match or not any(match.groups()):
        return text
    low, left, right, high = match.groups()
    low, high = low or r"-\infty", high or r"\infty"
    return f"{'[' if left == '≤' else '('}{low},{high}{']' if right == '≤' else ')'}"


def parts_of(text: str) -> tuple[str, list[str]]:
    """-> kind, texts of the parts; ("", [text]) if it is no list."""
    kind, parts = "", [text]
    if match := re.fullmatch(r"(\\\{|[{(\[])(.+?)\\?([})\]])", text):
        inner = split(match[2], ",")
        if len(inner) > 1 or (inner and match[1] != "{"):  # TeX groups with {x}
            kind, parts = match[1][-1] + match[3], inner
    for separator in (",", ";", r"\cup"):  # the last to be found is the outermost
        if len(found := split(text, separator)) > 1:
            kind, parts = separator, found[:-1] if separator == ";" else found  # a row ends in ;
    if kind in ("", ",", "{}") and PLUS_MINUS.search(text):
        kind = "{}"
        parts = [*dict.fromkeys(PLUS_MINUS.sub(sign, part) for part in parts for sign in "+-")]
    return kind, parts


def split(text: str, separator: str) -> list[str]:
    """Splits outside brackets; [] if they do not close. Any closes any: "(a,b]" is an interval."""
    parts, start, depth = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return []
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i].strip())
            start = i + len(separator)
    return [*parts, text[start:].strip()] if depth == 0 else []


def leaf(text: str):
    """A number with or without its unit or percent sign, an expression, an equation, or a text."""
    number = (match[1] if (match := UNITS.fullmatch(text)) else text).removesuffix("%")
    try:
        if len(number) > 1 and number.isalpha() and number not in NAMES.split("|"):
            raise ValueError("a word")
        if number.count("=") == 1:
            return equation(*number.split("="))
        value = Value(number)
        value.percent = text.endswith("%")
        return value
    except (ValueError, ZeroDivisionError, OverflowError):
        return text


def equation(left: str, right: str):
    """left - right at two points: where two equations have the same ratio at both, one is a
    multiple of the other (with the probability above)."""
    values = [Value(f"({left})-({right})", point) for point in ("", "'")]
    if not values[0].symbols or 0 in (values[0].number, values[1].number):
        raise ValueError("it says nothing")
    return "=", values


# ---------------------------------------------------------------------------------------------
# 4. are two trees the same?

def same(a, b) -> bool:
    """Prediction a against gold b. The order matters only to `final`."""
    if isinstance(a, Value) and isinstance(b, Value):
        return same_value(a, b)
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    if isinstance(a, Value) or isinstance(b, Value):  # 5 against {5}
        a, b = [("{}", [node]) if isinstance(node, Value) else node for node in (a, b)]
    (kind_a, a), (kind_b, b) = a, b
    if kind_a == kind_b == "=":
        (p, q), (r, s) = [[value.number for value in values] for values in (a, b)]
        return a[0].symbols == b[0].symbols and close(p * s, q * r)
    if len(a) != len(b) or (kind_a != kind_b and {kind_a, kind_b} != {",", "{}"}):
        return False  # but a set may be written without its braces
    if "{}" not in (kind_a, kind_b) and kind_a != r"\cup":
        return all(map(same, a, b))
    rest = list(b)
    for item in a:
        if (hit := next((other for other in rest if same(item, other)), None)) is None:
            return False
        rest.remove(hit)
    return True


def same_value(a: Value, b: Value) -> bool:
    """Echoed arithmetic is no answer, and no number may hit the value that stands for a letter."""
    if (b.final and not a.final) or a.symbols != b.symbols:
        return False
    x, y = (value.number / 100 if value.percent else value.number for value in (a, b))
    return close(a.number, b.number) or close(x, y)  # 10% is like 10 and like 0.1


def close(a, b) -> bool:
    """Equal, but for the noise of floats."""
    if a == b or (isinstance(a, Fraction) and isinstance(b, Fraction)
                  and a.denominator == b.denominator == 1):
        return a == b  # tolerance is for decimals: 10^12 is not 10^12 + 1
    return math.isclose(a, b, rel_tol=TOLERANCE) and float(b) != 0  # 0: 10^-400 is not 10^-500


DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
LONE_LETTER = re.compile(r"\(?[a-e]\)?")


def choice(answer: str) -> str:
    r"""The letter of "(B) 12", "b. twelve", \text{(B)}, "option B"; "" if none, or several."""
    text = TEXT.sub(r" \1 ", answer).strip("$ ").casefold()
    letters = {*re.findall(r"(?<![\w\\])([b-e]|a(?=[).]|$))(?![\w^])", text)}  # "a" may be a word
    begins = re.match(r"(?:option |choice )?\(?([a-e])(?:[).](?=\s|$)|$)", text)
    return begins[1] if begins and letters == {begins[1]} else ""


def math_equal(prediction: str, gold: str) -> bool:
    """Do two final answers mean the same? Blank never matches. Never raises, never hangs.

    A worked-out gold wants a worked-out prediction: 2^10 is not 1024, but 1024 is 2^10. Algebra has
    no such test: x(x+1) equals x^2+x, so "expand" and "factor" make bad tasks for this check."""
    if not (isinstance(prediction, str) and isinstance(gold, str)):
        return False
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.split() == gold.split() != []
    a, b = normal_text(prediction), normal_text(gold)
    if not a or not b:
        return False
    if LONE_LETTER.fullmatch(a) or LONE_LETTER.fullmatch(b):
        a, b = choice(prediction) or a, choice(gold) or b
    if DECIMAL_COMMA.fullmatch(a) and "." in b or DECIMAL_COMMA.fullmatch(b) and "." in a:
        a, b = a.replace(",", "."), b.replace(",", ".")  # 1,22 beside 1.22 is no list
    try:
        return a == b or same(parse(a), parse(b))
    except OverflowError:  # a root, or a fraction, beside what is beyond all floats
        return False


def parse_failed(answer: str) -> bool:
    """True if a part of the answer is only text to the matcher: a metric of its own (R9.5)."""
    nodes = [parse(normal_text(answer) if len(answer) <= MAX_CHARS else "")]
    for node in nodes:  # grows while we walk: breadth first
        if isinstance(node, str):
            return True
        nodes += node[1] if isinstance(node, tuple) else []
    return False
