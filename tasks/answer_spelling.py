r"""Give one spelling to answers that are written in different ways.

    normal_text(r"\boxed{\dfrac12 \text{ cm}}")  ->  r"\frac{1}{2}"
    normal_text("x ≈ 1.5 × 10⁻³ cm")             ->  "x≈1.5*10^{-3}cm"

The knowledge stands in tables: characters, units, currencies, and REWRITES, which are applied to
every answer from top to bottom. Nothing is computed here but the fraction of a repeating decimal.
"""
import re
import unicodedata
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------
# characters

SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "&": ",", "′": "'",
    "°": r"^\circ ", "∞": r"\infty ", "√": r"\sqrt ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ",
    "∅": r"\emptyset ", "∖": r"\setminus ", "∣": "|", "ℝ": r"\mathbb{R}", "π": r"\pi ",
    "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ", "ω": r"\omega ",
} | dict.fromkeys("€£¥¢₩₦₫₱₹₽₿฿", ""))
RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
LOWERED = re.compile("[₀-₉]+")
VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")


def plain_characters(text: str) -> str:
    """10⁻³ -> 10^{-3}; a₁ -> a_{1}; 1⅝ -> 1 5/8; （Ｂ） -> (b)."""
    text = text.translate(SYMBOLS)
    text = RAISED.sub(r"^{\g<0>}", text)
    text = LOWERED.sub(r"_{\g<0>}", text)
    text = VULGAR_FRACTION.sub(r" \g<0>", text)
    # NFKC writes every variant of a character as the plain one: ⁻³ becomes −3, and ⅝ becomes 5⁄8.
    return unicodedata.normalize("NFKC", text).casefold().translate(SYMBOLS)


# ---------------------------------------------------------------------------------------------
# units

SMALL_NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen "
                 "fourteen fifteen sixteen seventeen eighteen nineteen twenty").split()
NUMBER_WORD = (rf"\b(?:{'|'.join(SMALL_NUMBERS)}|(?:thir|for|fif|six|seven|eigh|nine)ty"
               r"|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|twelf|een|ie|dred|sand)ths?)\b")
COMMANDS = "frac|sqrt|alpha|beta|theta|lambda|omega|infty|pi"
FUNCTIONS = "(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|lg|log|exp"
# Words behind a number that are no unit: otherwise "5 dozen" would be 5, and "3 or 4" be 3.
NOT_UNIT = (rf"(?:{COMMANDS}|sin|cos|tan|ln|log|exp|or|and|not|but|mod|more|less|than|pct|percent"
            r"|percentage|per cent|[ap]\.? ?m|[a-z]*illion|hundred|thousand|lakh|crore|grand|gross"
            r"|dozens?|score|tens|half|halves|thirds?|quarters?|factorial|squared|cubed|plus|minus"
            rf"|negative|below|{NUMBER_WORD})\b")
# These may touch the number: 35cm. Others would look like a product: 3pa. From three letters on,
# any word behind a blank is a unit.
GLUED_UNIT = ("(?:mm|cm|km/h|km|m/s|kg|mg|ml|mph|lbs?|oz|ft|yd|hrs?|min|sec|[kmg]?hz|gb|tb|kwh?)")
UNIT = (rf"(?:{GLUED_UNIT}|(?!{NOT_UNIT})(?:in|of|sq|mi|nm|dm|dl|cl|ha|cc|qt|pt|rs|mb|kb|mw|gw|kj"
        r"|mj|kn|kv|ev|pa|db|μ[gms]|[a-z]{3,}))")
# Chinese words behind a number are one, too: 18美元. No sign of arithmetic or of a number may be
# among them: 5万, 5个半, 3点一刻, 5的平方.
CHINESE_UNIT = ("(?:(?![零〇一二两三四五六七八九十百万亿半几多余折成倍打又加减乘除或和以的负]"
                "|千(?![克米])|分(?!钟)|方(?![米厘分]))[一-鿿]){1,4}")
# "5 apples", "60 miles per hour", "5 dollars an hour", "\frac{1}{2}cm^2", "3 kg/m^3"
WITH_UNITS = re.compile(rf"(.*(?:[\d)}}]|\\pi)) ?(?:{CHINESE_UNIT}|{GLUED_UNIT}|(?<=[ )}}]){UNIT})"
                        rf"(?:[ /](?:an? )?{UNIT}|/[a-z]){{0,3}}(?:\^\d)?\.?")
TEXT = re.compile(r"\\(?:text|mbox|hbox|math)(?:rm|bf|it|sf|tt|normal)?\s*\{([^{}]*)\}"
                  r"(\s*\^\s*\{?\d\}?)?")


def text_command(match) -> str:
    r"""Drop \text{m} behind a number: it is a unit. Elsewhere \text{} holds the answer."""
    before = match.string[:match.start()]
    behind_number = re.search(r"(?:[\d)}]|\\pi)(?:\\[,;:! ]|[~\s])*$", before)
    unit = match[1].strip()
    is_more = re.match(rf"{NOT_UNIT}|.*(?:[\d一-鿿]|{NUMBER_WORD})", unit)
    is_unit = not is_more or re.fullmatch(CHINESE_UNIT, unit)
    if behind_number and is_unit:
        return ""
    return f" {unit}{match[2] or ''} "


# ---------------------------------------------------------------------------------------------
# rewriting

CURRENCY = "(?:usd|us|eur|gbp|inr|rs|cny|rmb|jpy|aud|cad|hkd)"
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(,\d{3})+(?!,?\d)")


def join_thousands(match) -> str:
    return THOUSANDS.sub(lambda number: number[0].replace(",", ""), match[0])


def repeating_decimal(match) -> str:
    r"""0.1\overline{6} -> (\frac{15}{90}): 16 - 1 over a 9 per repeated and a 0 per other digit."""
    whole, once, period = match.groups()
    numerator = int(whole + once + period) - int(whole + once or "0")
    denominator = "9" * len(period) + "0" * len(once)
    return rf"(\frac{{{numerator}}}{{{denominator}}})"


REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # Ornament. (?<!\\) keeps the row break \\ of a matrix whole.
    (r"^([\"'`“‘])(.+)[\"'`”’]$", r"\2"),
    (r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,)(?=\d{3})", ""),  # 10{,}000  32,\!348  10\,000
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"(?:(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|[~\s])+", " "),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[cf]\b)?|\\degrees?(?![a-z])", ""),
    (rf"(?<![a-z\\]){CURRENCY}\.? ?(?=\.?\d)", ""),  # usd 5  rs. 5
    # LaTeX. A matrix becomes [1,0;0,1;]
    (r"\\begin\{(?:[pbv]|small)?matrix\}|[(\[]?\s*\\begin\{array\}(?:\{[lcr| ]*\})?", "["),
    (r"(?:\\\\\s*)?\\end\{(?:(?:[pbv]|small)?matrix\}|array\}\s*[)\]]?)", ";]"),
    (r"\\\\", ";"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac34: TeX takes one digit for each part
    (r"\\(?:cdot|times|ast)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"), (r"\*\*", "^"),
    (r"\\leq?(?:slant)?(?![a-z])|<=", "≤"), (r"\\geq?(?:slant)?(?![a-z])|>=", "≥"),
    (r"\\neq?(?![a-z])", "≠"), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"\\approx(?![a-z])|\\simeq(?![a-z])|^approx(?:imately|\.)? ", "≈"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset"),
    (r"\\mathbb\s*(?:\{r\}|r(?![a-z]))|^all reals?(?: numbers)?$", r"(-\\infty,\\infty)"),
    (r"\\(?:mid|vert)(?![a-z])", "|"),
    (r"log\s*_\s*(\w)", r"log_{\1}"),  # \log_25 is \log_{2}5
    (r"(?<!log)([_^])\s*\{(\w+)\}(?!\d)", r"\1\2"),
    # Numbers. 2e-3 is 0.002, but 2e - 3, with blanks, has a letter e.
    (rf"^(?:{'|'.join(SMALL_NUMBERS)})$", lambda word: str(SMALL_NUMBERS.index(word[0]))),
    (r"(\d{0,99})\.(\d{0,99})\\(?:overline|bar|dot)\s*\{?(\d{1,99})\}?", repeating_decimal),
    (r"(?<=\d)e([+-]?\d+)\b", r"*10^\1"), (r"(?<=\d) x (?=10\^)", "*"),
    (r"(?<=\d)\s*hundred\b", "*10^2"), (r"(?<=\d)\s*thousand\b", "*10^3"),
    (r"(?<=\d)\s*million\b", "*10^6"), (r"(?<=\d)\s*billion\b", "*10^9"),
    (r"(?<=\d)\s*(?:per ?cent(?:age)?|pct)\b|\s*\\?%", "%"),
    # Times of day: 5 p.m. -> 5:00 pm, and 09:05 -> 9:05
    (r"^(\d\d?(?::\d\d)?) ?([ap])\.? ?m\.?$", r"\1 \2m"),
    (r"^(\d\d?)(?= [ap]m$)", r"\1:00"), (r"^0(?=\d:\d\d)", ""),
    # 12,345 is a number, but in (12,345) the comma separates. "1,000, 2,000" still has its blank.
    (r"^(?!.*(?:[(\[]|\\\{)).*", join_thousands),
    (r"^-?\d{1,3}(?: \d{3})+$", lambda number: number[0].replace(" ", "")),
    # Lists, then blanks. Other numbers are never joined: "1 2" is not 12.
    (r"^(?=.*[<>≤≥])(.*)\bor\b", r"\1\\cup "),  # x < 1 or x > 2
    (r"(?<=[\d})]) ?,? or |,? and ", ","),
    (r"(?<!\w)\s+|\s+(?!\w)", ""),
    # \{x|x≥2\}, \{x\in(-\infty,\infty):x≥2\} -> x≥2
    (r"^\\?\{\w(?:\\in[^:|]*)?[:|](?:\w\\in\(-\\infty,\\infty\),)?(.*[<>≤≥≠].*?)\\?\}$", r"\1"),
    # 1\frac{4}{5} and 1 4/5 are sums
    (r"(?<![\d.^_])(?<!\d )(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.^_])(?<!\d )(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\.+$", ""))]


def normal_text(answer: str) -> str:
    """Return the one spelling that equal text answers share, and that the grammar reads."""
    if found := boxes(answer):
        answer = found[-1].content
    text = plain_characters(answer)
    if not re.search("matrix|array", text):
        text = re.sub(r"\\\\(?=[a-z]{2})", r"\\", text)  # \\frac was escaped once too often
    text = re.sub(r"(?<!\\)\\\s", " ", text)  # a blank of TeX
    text = TEXT.sub(text_command, " ".join(text.split())).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


# ---------------------------------------------------------------------------------------------
# boxes

BOX = re.compile(r"(\\{1,2}f?box(?:ed)?\s*\{)|\\[{}\\]|([{}])")


class Box(NamedTuple):
    start: int  # of \boxed{...} in the text
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""Return each closed \boxed{...} in the order of closing: outer boxes after inner ones."""
    opened = []
    found = []
    for match in BOX.finditer(text):
        if match[1] or match[2] == "{":
            opened.append(match)
        elif match[2] and opened:
            start = opened.pop()
            if start[1]:
                content = text[start.end():match.start()]
                found.append(Box(start.start(), match.end(), content))
    return found
