r"""Read an expression as a number: recursive descent over a whitelist of tokens.

    Value("2+3").number            5, as an exact Fraction
    Value("(x-2)(x+2)").number     a number that Value("x^2-4") has, too
    Value("the cat")               ValueError, as for anything that the grammar does not know
"""
import re
import zlib
from fractions import Fraction

from tasks.answer_spelling import COMMANDS, FUNCTIONS

# 9^9^9^9 is seven characters of endless arithmetic. With these limits no answer takes 0.1 s.
MAX_NESTED = 50
MAX_BITS = 4096

WORD = rf"(?:{COMMANDS}|{FUNCTIONS})"
TOKEN = re.compile(rf"\s*(?:(\d+\.?\d*|\.\d+)|\\?(log_\{{\w+\}}|{WORD}(?![a-z]))|([a-z](?:_\w)?)|"
                   r"([-+*/^(){}\[\]]))", re.A)
# xy is x*y, but a word is no product: "read" must not equal "dear".
NO_PRODUCT = re.compile(rf"(?<![a-z])(?!{WORD}(?![a-z]))[a-z]{{3}}")
FUNCTION = re.compile(rf"{FUNCTIONS}|log_.*")
# What counts as worked out. Otherwise "37*12+5" would answer "What is 37*12+5?", and "10/5" 10 : 5.
PLAIN = r"[({]?[-+]?[\d.]+[)}]?"  # 5, -5, (5), {5}
NUMERAL = re.compile(rf"[-+]?(?:{PLAIN}|(?:{PLAIN}\*)?10\^{PLAIN})")
FRACTION = re.compile(rf"[-+]?\(?[-+]?(?:\d+\+)?(?:{PLAIN}/{PLAIN}|"
                      rf"\\frac\{{{PLAIN}\}}\{{{PLAIN}\}})\)?")


def read_tokens(text: str) -> list[str]:
    """Return the tokens of an expression, then "". ValueError if it holds anything else."""
    tokens = [match[match.lastindex] for match in TOKEN.finditer(text)]
    rest = TOKEN.sub("", text)
    opening = [token for token in tokens
               if token in ("(", "{", "^", "frac", "sqrt") or FUNCTION.fullmatch(token)]
    if rest or len(opening) > MAX_NESTED or NO_PRODUCT.search(text):
        raise ValueError(text)
    return [*tokens, ""]


class Value:
    r"""An expression with its number, its symbols, and whether it is worked out (`final`).

    number: a Fraction, or a float after a root. final: it is a numeral, or a fraction that is no
    integer. Letters and pi stand for fixed arbitrary fractions, and two expressions are equal if
    their numbers are: different polynomials agree at an arbitrary point with a probability of about
    degree / 2^31 (Schwartz-Zippel). So (x-2)(x+2) = x^2-4 needs no algebra system. In the same way
    \sin(2x) stands for a fraction that depends on the function and on the number of its argument:
    it equals \sin(x+x), but of \sin(2x) = 2\sin(x)\cos(x) this class knows nothing."""

    def __init__(self, text: str, point: str = ""):
        self.tokens = read_tokens(text)[::-1]  # a stack: the next token is the last
        self.point = point
        self.symbols = set()
        self.number = self.sum()
        if self.tokens != [""]:
            raise ValueError(text)
        is_fraction = FRACTION.fullmatch(text) and self.number.denominator != 1
        self.final = bool(NUMERAL.fullmatch(text) or is_fraction)
        self.percent = False

    def take(self, *wanted: str) -> str:
        """Pop the next token if it is one of `wanted`, else return ""."""
        return self.tokens.pop() if self.tokens[-1] in wanted else ""

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
        while re.match(r"[*/({a-z]", self.tokens[-1]):
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
        """atom = number | letter | (sum) | {sum} | frac atom atom | root | function"""
        token = self.tokens.pop()
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
        if FUNCTION.fullmatch(token):
            return self.function(token)
        if not token[:1].isalpha():
            raise ValueError(token)
        return self.unknown(token)

    def unknown(self, symbol: str) -> Fraction:
        """Return the number that stands for a symbol: an arbitrary one from 1 to 3."""
        self.symbols.add(symbol)
        checksum = zlib.crc32((symbol + self.point).encode())  # hash() differs by process
        return 1 + Fraction(checksum, 2**31 - 1)

    def root(self):
        """What follows sqrt: [degree] atom"""
        degree = Fraction(2)
        if self.take("["):
            degree = self.atom()
            if degree not in (2, 3, 4) or not self.take("]"):
                raise ValueError("root")
        return power(self.atom(), 1 / degree)

    def function(self, name: str):
        r"""What follows the name: [^ factor] (sum), or [^ factor] factor {factor} as in \sin 2x."""
        exponent = self.factor() if self.take("^") else 1
        if self.tokens[-1] in ("(", "{"):
            argument = self.atom()
        else:
            argument = self.factor()
            while re.match("[a-z]", self.tokens[-1]) and not FUNCTION.fullmatch(self.tokens[-1]):
                argument = bounded(argument * self.factor())
        if name == "exp":
            return power(self.unknown("e"), argument)
        if exponent == -1:  # \sin^{-1} x
            name, exponent = f"arc{name}", 1
        if isinstance(argument, float):
            argument = f"{argument:.12g}"  # without the noise of its last digits
        return power(self.unknown(f"{name}({argument})"), exponent)


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
