"""Math answer matching, and readers of the public benchmark files.

A reward that pays for wrong answers is found and exploited by GRPO, so the matcher is a whitelist:
what its small grammar cannot read is compared as text, nothing is evaluated. Numbers are exact
fractions. Letters and pi stand for fixed arbitrary fractions, and two expressions are equal when
their values are: different polynomials agree at an arbitrary point with probability about
degree / 2^31 (Schwartz-Zippel), so (x-2)(x+2) = x^2-4 needs no algebra system. Roots are floats.

Not covered: functions (sin, log), i*i = -1, equations up to a factor, number bases, intervals as
inequalities, decimal commas, bare lists in another order ("1, 2" is not "2, 1", "{1, 2}" is
"{2, 1}"). Dropped, not compared, as public graders have it: units (5 cm = 5 m) and "x =" in front.
"""
import math
import re
import zlib
from fractions import Fraction

from common import InputError, read_jsonl

# 9^9^9^9 is seven characters of endless arithmetic; these limits keep any input far below 50 ms.
MAX_CHARS, MAX_NESTED, MAX_BITS, MAX_POWER = 300, 50, 4096, 1000
TOLERANCE = 1e-9  # for roots and for float noise such as 17.999999999999996

# ---------------------------------------------------------------------------------------------
# many spellings -> one

UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "，": ",", "&": ",", "²": "^2", "³": "^3",
    "°": "", "€": "", "£": "", "≤": r"\le ", "≥": r"\ge ", "π": r"\pi ", "∞": r"\infty ",
    "√": r"\sqrt ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm "})
NAMES = "frac|sqrt|alpha|beta|theta|lambda|omega|infty|pi"
TEXT = re.compile(r"\\(?:text|mbox|math)(?:rm|bf|it)?\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
NOT_UNIT = (rf"(?:{NAMES}|or|and|not|but|mod|more|less|than|pct|percent|percentage|am|pm"
            r"|[a-z]*illion|hundred|thousand|dozens?|half|halves|thirds?|quarters?|factorial|squared|cubed)\b")
SHORT = "(?:mm|cm|km|kg|mg|ml|mph|lbs?|oz|ft)"
UNIT = rf"(?:{SHORT}|(?!{NOT_UNIT})(?:in|of|[a-z]{{3,}}))"
THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(,\d{3})+(?!,?\d)"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,)(?=\d{3})", ""),     # 10{,}000  32,\!348  10\,000
    # (?<!\\): the row break \\ of a matrix stays whole
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|~", " "),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-z])", ""),
    (r"\\begin\{[pbv]?matrix\}", "["), (r"\\end\{[pbv]?matrix\}", r"\\\\]"), (r"\\\\", ";"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),          # \frac34: TeX takes one digit each
    (r"\\(?:cdot|times|ast)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"),
    (r"\\(l|g)eq(?![a-z])", r"\\\1e"), (r"([_^])\s*\{(\w+)\}", r"\1\2"),
    (r"(?<=\d)\s*hundred\b", "*10^2"), (r"(?<=\d)\s*thousand\b", "*10^3"),
    (r"(?<=\d)\s*million\b", "*10^6"), (r"(?<=\d)\s*billion\b", "*10^9"),
    (r"(?<=\d)\s*(?:percent(?:age)?|pct)\b|\s*\\?%", "%"),
    (r"(?<=[\d})])\s*,?\s+(?:or|and)\s", ","),
    # a unit is words from a number to the end of its element: "5 apples", "60 miles per hour"
    (rf"(?:(?<=[\d)}}])|(?<=\\pi))(?: {UNIT}|{SHORT})(?:(?: | ?/ ?){UNIT}){{0,3}}"
     r"(?:\s*\^\s*\d)?(?=[\s.]*(?:\\?[,)\]}]|$))", ""),
    (r"(?<!\w)\s+|\s+(?!\w)", ""),                         # but never join: "1 2" is not 12
    # 1\frac{4}{5} and 1 4/5 are sums
    (r"(?<![\d.^_])(?<!\d )(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.^_])(?<!\d )(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    # x = 5, f(x) = 5, x \in [5, 6]: the name goes
    (r"(?:^|(?<=,))[a-z](?:_\w|\([a-z]\))?(?:=|\\in(?![a-z]) ?)(?![^,]*=)", ""),
    (r"\.+$", ""))]


def boxes(text: str) -> list[str]:
    """Contents of all closed \\boxed{...} in the order of their last brace: outer after inner."""
    stack, found = [], []
    for match in re.finditer(r"(\\f?box(?:ed)?\s*\{)|\\[{}\\]|([{}])", text):
        if match[1] or match[2] == "{":
            stack.append(match.end() if match[1] else None)
        elif match[2] and stack and (start := stack.pop()) is not None:
            found.append(text[start:match.start()])
    return found


def normal_text(answer: str) -> str:
    """The one spelling that equal text answers share, and that the grammar below reads."""
    def text_command(match):  # \text{} behind a number is a unit and goes; else it is the answer
        is_unit = re.search(r"[\d)}]$|\\pi$", match.string[:match.start()].rstrip())
        keep = not is_unit or re.match(rf"\s*{NOT_UNIT}|.*\d", match[1])
        return f" {match[1].strip()}{match[2] or ''} " if keep else ""

    text = (boxes(answer) or [answer])[-1].casefold().translate(UNICODE)
    if "matrix" not in text:
        text = re.sub(r"\\\\(?=[a-z]{3})", r"\\", text)  # \\frac: escaped once too often
    text = TEXT.sub(text_command, " ".join(text.split())).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # 12,345 is a number; in (12,345) the comma separates
        text = re.sub(THOUSANDS, lambda match: match[0].replace(",", ""), text)
    return text.strip()


# ---------------------------------------------------------------------------------------------
# one value: recursive descent over a whitelist of tokens; anything else is a ValueError

TOKEN = re.compile(rf"\s*(?:(\d+\.?\d*|\.\d+)|\\?({NAMES})(?![a-z])|([a-z](?:_\w)?)|"
                   r"([-+*/^(){}\[\]]))", re.A)
# What counts as worked out. Without it "37*12+5" answers "What is 37*12+5?", and "10/5" 10 : 5.
NUMERAL = re.compile(r"[-+]?\(?[-+]?[\d.]+\)?(?:\*10\^[({]?-?\d+[)}]?)?")
FRACTION = re.compile(r"[-+]?\(?[-+]?(?:\d+\+)?(?:[\d.]+/[-+]?[\d.]+|"
                      r"\\frac\{[-+]?[\d.]+\}\{[-+]?[\d.]+\})\)?")


class Value:
    """`number` (Fraction, or float after a root) of an expression, the `symbols` that occur in it,
    and whether it is worked out (`final`): a numeral, or a fraction that is no integer."""

    def __init__(self, text: str):
        # xy is x*y, but a word is no product: "read" must not equal "dear"
        words = set(re.findall("[a-z]+", text)) - set(NAMES.split("|"))
        self.tokens = [match[match.lastindex] for match in TOKEN.finditer(text)][::-1]  # a stack
        nested = sum(token in ("(", "{", "^", "frac", "sqrt") for token in self.tokens)
        if (TOKEN.sub("", text) or nested > MAX_NESTED
                or any(len(word) > 2 or word == "ln" for word in words)):
            raise ValueError(text)
        self.symbols = set()
        self.number = self.sum()
        if self.tokens:
            raise ValueError(text)
        self.final = bool(NUMERAL.fullmatch(text) or (
            FRACTION.fullmatch(text) and self.number.denominator != 1))

    def take(self, *wanted: str) -> str:
        """Pops the next token if it is one of `wanted`; else returns ''."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def sum(self):
        """sum = product {(+|-) product}"""
        total = self.product()
        while sign := self.take("+", "-"):
            total = _bounded(total + self.product() * (1 if sign == "+" else -1))
        return total

    def product(self):
        """product = factor {[*|/] factor}; without a sign (2x) no number may follow, since a list
        of guesses "1 2 3" must not come out as a number."""
        value = self.factor()
        while self.tokens and re.match(r"[*/({a-z]", self.tokens[-1]):
            sign = self.take("*", "/")
            factor = self.factor()
            value = _bounded(value / factor if sign == "/" else value * factor)
        return value

    def factor(self):
        """factor = {+|-} atom [^ factor]; so -2^2 = -4, as in print"""
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        number = self.atom()
        if self.take("^"):
            number = _power(number, self.factor())
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
            return _bounded(self.atom() / self.atom())
        if token == "sqrt":
            degree = 2
            if self.take("[") and ((degree := self.atom()) not in (2, 3, 4) or not self.take("]")):
                raise ValueError("root")
            return _root(self.atom(), int(degree))
        if not token[:1].isalpha():
            raise ValueError(token)
        self.symbols.add(token)
        return 1 + Fraction(zlib.crc32(token.encode()), 2**31 - 1)  # hash() differs by process


def _bounded(number):
    """Keeps chains of products small, and infinity out (OverflowError): inf == inf would match."""
    if max(part.bit_length() for part in number.as_integer_ratio()) > MAX_BITS:
        raise ValueError("too large")
    return number


def _power(base, exponent):
    """Exact for whole exponents; negative bases with others are complex and refused."""
    whole = exponent == int(exponent)
    if abs(exponent) > MAX_POWER or (base < 0 and not whole):
        raise ValueError("exponent")
    if isinstance(base, float) or not whole:
        return _bounded(float(base) ** float(exponent))
    if max(part.bit_length() for part in base.as_integer_ratio()) * abs(exponent) > MAX_BITS:
        raise ValueError("too large")  # asked before computing, not after
    return base ** int(exponent)


def _root(number, degree: int):
    """Exact where it can be, so that (sqrt 9)^2 is a fraction and needs no tolerance."""
    if number < 0:
        raise ValueError("root of a negative number")
    root = float(number) ** (1 / degree)
    exact = Fraction(root).limit_denominator(10**6)
    return exact if exact ** degree == number else root


# ---------------------------------------------------------------------------------------------
# a whole answer -> a node: ("value", (Value, is percent)), ("text", str), or (kind, nodes), where
# kind is a pair of brackets, or the separator of a list without any

def _split(text: str, separator: str) -> list[str]:
    """Splits outside brackets; [] if they do not close. Any closes any: "(a,b]" is an interval."""
    parts, start, depth = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return []
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i])
            start = i + len(separator)
    return [*parts, text[start:]] if depth == 0 else []


def parse(text: str, level: int = 0):
    """Normal text -> node. What cannot be read stays a text, so nothing raises."""
    kind, parts = "", []
    for separator in (r"\cup", ";", ","):  # ";" ends every row of a matrix
        if not kind and len(parts := _split(text, separator)) > 1:
            kind = separator
            parts = parts[:-1] if kind == ";" else parts
    if not kind and (match := re.fullmatch(r"(\\\{|[{(\[])(.+?)\\?([})\]])", text)):
        parts = _split(match[2], ",")
        if len(parts) > 1 or (parts and match[1] in ("[", r"\{")):  # (x), {x}: mere grouping
            kind = match[1][-1] + match[3]
    if not kind and re.search(r"\\pm(?![a-z])", text):
        kind, parts = "{}", [re.sub(r"\\pm(?![a-z])", sign, text) for sign in "+-"]
    if kind and level < 6:
        nodes = [parse(part, level + 1) for part in parts]
        if kind in (",", "{}") and any(node[0] == "{}" for node in nodes):  # 3, 1 \pm 2
            kind, nodes = "{}", sum((n[1] if n[0] == "{}" else [n] for n in nodes), [])
        return kind, nodes
    number = text.removesuffix("%")
    try:
        if kind or (len(number) > 1 and number.isalpha()):
            raise ValueError("too deep, or a word")
        return "value", (Value(number), text != number)
    except (ValueError, ZeroDivisionError, OverflowError):
        return "text", text


def _same(a, b) -> bool:
    """Prediction a against gold b. The order matters: see `final`."""
    if a[0] == b[0] == "value":
        (x, percent_x), (y, percent_y) = a[1], b[1]
        # echoed arithmetic is no answer; and no number may hit the secret value of a letter
        if (y.final and not x.final) or x.symbols != y.symbols:
            return False
        scale_x, scale_y = (100, 1) if percent_x else (1, 100)
        return _close(x.number, y.number) or (  # "10%" against a bare number may be 10 or 0.1
            percent_x != percent_y and _close(x.number / scale_x, y.number / scale_y))
    if "text" in (a[0], b[0]):
        return a == b
    if "value" in (a[0], b[0]):  # 5 against {5}
        a, b = [("{}", [node]) if node[0] == "value" else node for node in (a, b)]
    if len(a[1]) != len(b[1]) or (a[0] != b[0] and {a[0], b[0]} != {",", "{}"}):
        return False  # but a set may be written without its braces
    if "{}" not in (a[0], b[0]) and a[0] != r"\cup":
        return all(map(_same, a[1], b[1]))
    rest = list(b[1])
    for item in a[1]:
        if (hit := next((other for other in rest if _same(item, other)), None)) is None:
            return False
        rest.remove(hit)
    return True


def _close(a, b) -> bool:
    if a == b or (isinstance(a, Fraction) and isinstance(b, Fraction)
                  and a.denominator == b.denominator == 1):
        return a == b  # tolerance is for decimals: 10^12 is not 10^12 + 1
    return math.isclose(a, b, rel_tol=TOLERANCE) and float(b) != 0  # 0: 10^-400 is not 10^-500


def math_equal(prediction: str, gold: str) -> bool:
    """Do two final answers mean the same? Blank never matches. Never raises, never hangs.

    A worked-out gold wants a worked-out prediction: 2^10 is not 1024, but 1024 is 2^10. Algebra has
    no such test: x(x+1) equals x^2+x, so "expand" and "factor" make bad tasks for this check."""
    if not (isinstance(prediction, str) and isinstance(gold, str)):
        return False
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.split() == gold.split() != []
    prediction, gold = normal_text(prediction), normal_text(gold)
    try:
        return bool(prediction and gold) and (
            prediction == gold or _same(parse(prediction), parse(gold)))
    except OverflowError:  # a root, or a fraction, beside what is beyond all floats
        return False


def parse_failed(answer: str) -> bool:
    """True if a part of the answer is only text to the matcher: a metric of its own (R9.5)."""
    nodes = [parse(normal_text(answer) if len(answer) <= MAX_CHARS else "")]
    for kind, items in nodes:
        if kind == "text":
            return True
        nodes += items if kind != "value" else []  # grows while we walk: breadth first
    return False


ANSWER = re.compile(r"(?:^[ \t]*\**A(?:nswer)?\**[ \t]*[:：]|\b[Aa]nswer\**[ \t]*(?:is|[:：])|"
                    r"答案[是为：:])[ \t:：*]*(?=\S)", re.M)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?!\d)(?:/\d+)?%?")


def extract_answer(text: str, strict: bool = False) -> str | None:
    """The last \\boxed{}, else the line behind ####, else behind the last "A:" or "answer is", else
    (not when `strict`) the last number. None if there is none: a parse failure, to be counted.
    """
    if found := boxes(text):
        answer = found[-1]  # even if empty: no second chance elsewhere
    elif "####" in text:
        answer = text.rsplit("####", 1)[1].strip().partition("\n")[0]
    elif len(found := ANSWER.split(text)) > 1:
        answer = re.split(r"\n|。|\.(?:\s|$)", found[-1])[0].strip("* ")  # to the sentence's end
    else:
        found = [] if strict else NUMBER.findall(text)
        answer = found[-1] if found else ""
    return answer.strip() or None


# ---------------------------------------------------------------------------------------------
# benchmark files -> queries {"prompt", "domain", "check"}

def _query(prompt: str, domain: str, **check) -> dict:
    if not prompt.strip() or not check.get("answer", "-"):
        raise ValueError("the prompt or the answer is empty")
    return {"prompt": prompt.strip(), "domain": domain, "check": check}


def _math(question: str, answer) -> dict:
    if isinstance(answer, float) and answer == int(answer):
        answer = int(answer)  # SVAMP writes 145.0
    return _query(question, "mathematics", kind="math", answer=str(answer).strip())


def _humaneval(row: dict) -> dict:
    """Run prefix + response + tests: a bare body continues the prefix, a whole function defines its
    name again, and both find the prompt's imports and helpers there."""
    prompt = ("Complete the following Python function. Reply with the whole function in one "
              f"```python code block.\n\n```python\n{row['prompt'].strip()}\n```")
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return _query(prompt, "code", kind="code", language="python", tests=tests,
                  prefix=row["prompt"], entry_point=row["entry_point"])


def _mbpp(row: dict) -> dict:
    """The first assert is shown: nothing else names the function."""
    prompt = (f"{row.get('text') or row['prompt']}\nReply with one ```python code block. Your code "
              f"should pass this test:\n\n```python\n{row['test_list'][0]}\n```")
    setup = [*row.get("test_imports", []), row.get("test_setup_code", "")]
    tests = "\n".join([*filter(None, setup), *row["test_list"]]) + "\n"
    return _query(prompt, "code", kind="code", language="python", tests=tests)


def _ifeval(row: dict) -> dict:
    """The copy on the Hugging Face hub lists every argument, null where unused: dropped."""
    pairs = [*zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    kwargs = [{k: v for k, v in (one or {}).items() if v is not None} for _, one in pairs]
    return _query(row["prompt"], "instruction", kind="ifeval",
                  instruction_id_list=[name for name, _ in pairs], kwargs=kwargs)


FORMATS = {  # columns -> reader; the first whose columns are all there
    ("prompt", "domain", "check"): lambda row: row,
    ("question", "answer"): lambda row: _math(row["question"], row["answer"].split("####")[1]),
    ("Body", "Question", "Answer"): lambda row: _math(  # a third of SVAMP lacks this full stop
        f"{row['Body'].strip().rstrip('.')}. {row['Question']}", row["Answer"]),
    ("problem", "solution"): lambda row: _math(
        row["problem"], row["answer"] if "answer" in row else boxes(row["solution"])[-1]),
    ("prompt", "test", "entry_point"): _humaneval,
    ("text", "code", "test_list"): _mbpp,
    ("prompt", "code", "test_list"): _mbpp,  # the sanitized MBPP
    ("prompt", "instruction_id_list", "kwargs"): _ifeval,
}


def load_file(path) -> list[dict]:
    """Queries of a .jsonl or .jsonl.gz in any of FORMATS, told apart by their columns."""
    queries = []
    for line, row in read_jsonl(path):
        read = next((read for columns, read in FORMATS.items() if row.keys() >= {*columns}), None)
        if not read:
            raise InputError(f"{path}:{line}: unknown columns {', '.join(row)}; expected one of "
                             + "; ".join(map(", ".join, FORMATS)))
        try:
            queries.append(read(row))
            if queries[-1]["check"]["kind"] not in ("math", "code", "ifeval"):
                raise ValueError("check.kind is none of math, code, ifeval")
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}:{line}: cannot read this row of columns {', '.join(row)} "
                             f"({type(error).__name__}: {error})") from None
    if not queries:
        raise InputError(f"{path}: holds no rows")
    return queries
