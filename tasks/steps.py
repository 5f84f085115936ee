"""Check the steps of an answer, not only its end: every equation between numbers must hold.

A policy that is paid for right final answers alone may write "16 - 6 = 20. 20 / 2 = 5", if the 5
happens to be right, and such texts would be kept as demonstrations. We read plain arithmetic only.
What cannot be read (letters, powers, units within an expression) is not judged.
"""
import re
from fractions import Fraction
from itertools import pairwise

from tasks.answer_spelling import boxes
from tasks.answer_values import Value
from tasks.math_answers import BOLD

PLAIN = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-",
         r"\left": "", r"\right": "", r"\$": "", "$": "", r"\,": "", r"\!": "",
         r"\(": "", r"\)": "", r"\[": "", r"\]": ""}
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
TERM = rf"[\s(]*{NUMBER}[\s)]*"
EXPRESSION = rf"-?{TERM}(?:[-+*/]\s*-?{TERM})*"
AT_THE_END = re.compile(rf"{EXPRESSION}$")
AT_THE_START = re.compile(rf"\s*{EXPRESSION}")
BOXED = re.compile(r"\\f?box(?:ed)?\s*\{([^{}]*)\}")
# What may stand before and after a whole expression. In "2x + 3 + 4 = 9" nothing is judged, since
# "2x" stands before "3 + 4"; nor in "3 times 2 + 3 = 9", where a word is an operator.
BEFORE = re.compile(
    r"(^|[a-z]{2}|[.,:;!?)\]])(?<!\bof)(?<!times)(?<!plus)(?<!minus)(?<!\bmod)(?<!\bby)(?<!twice)"
    r"(?<!sqrt)\s+$|(^|(?<![\w)])\*\*|\()$", re.IGNORECASE)
AFTER = re.compile(
    r"$|\s+(?!remainder|r\d*\b|mod|x\b|[-+*/\d^%\\])|[.,:;!?)\]*]+(\s|$)", re.IGNORECASE)
BULLET = re.compile(r"^\s*[-*•]\s+")  # of a list; its "-" is no minus
LONGEST = 100  # characters of a side of an equation


def steps_hold(text: str) -> bool:
    """Return whether no equation of a text is false, and each \\boxed{ is closed and not empty."""
    return not false_equations(text) and boxes_are_whole(text)


def false_equations(text: str) -> list[str]:
    """Return the false equations of a text, such as "16 - 6 = 20".

    A decimal number may be rounded or cut: 10 / 3 equals 3.33."""
    text = FRACTION.sub(r"((\1)/(\2))", text)
    text = BOLD.sub(r"\1", BOXED.sub(r"\1", text))
    for symbol, plain in PLAIN.items():
        text = text.replace(symbol, plain)
    text = re.sub(r"[=<>!]=", "?", text)  # these are comparisons
    found = []
    for line in text.splitlines():
        for before, after in pairwise(BULLET.sub("", line).split("=")):
            left = expression_before(before)
            right = expression_after(after)
            has_operator = re.search(r"\d[\s)]*[-+*/]", f"{left} ; {right}")
            if left and right and has_operator and not equal(left, right):
                found.append(f"{left} = {right}")
    return found


def expression_before(text: str) -> str:
    """Return the expression that ends a text, or "" if it is only a part of one."""
    end = text[-LONGEST:].rstrip()
    match = AT_THE_END.search(end)
    if match is None:
        return ""
    expression = match.group().strip()
    while expression.startswith("(") and expression.count("(") > expression.count(")"):
        expression = expression.removeprefix("(").strip()  # as in "(3 + 4 = 7)"
    before = end[:len(end) - len(expression)]
    cut = len(text) > LONGEST and not before
    starts_within = expression.startswith("-") and before.strip()
    if cut or starts_within or not BEFORE.search(before):
        return ""
    return expression


def expression_after(text: str) -> str:
    """Return the expression that begins a text, or "" if it is only a part of one."""
    match = AT_THE_START.match(text[:LONGEST])
    if match is None:
        return ""
    expression = match.group().strip()
    while expression.endswith(")") and expression.count(")") > expression.count("("):
        expression = expression.removesuffix(")").strip()
    after = text[text.index(expression) + len(expression):]
    return expression if AFTER.match(after) else ""


def equal(left: str, right: str) -> bool:
    """Compare two expressions. What cannot be evaluated counts as equal."""
    try:
        numbers = [Value(side.replace(",", "")).number for side in (left, right)]
    except (ValueError, ZeroDivisionError):
        return True
    difference = abs(numbers[0] - numbers[1])
    if difference == 0:
        return True
    decimals = [len(side.rpartition(".")[2]) for side in (left, right)
                if re.fullmatch(r"-?[\d,]+\.\d+", side)]
    return bool(decimals) and difference < Fraction(1, 10 ** min(decimals))


def boxes_are_whole(text: str) -> bool:
    opened = re.findall(r"\\f?box(?:ed)?\s*\{", text)
    filled = [box for box in boxes(text) if box.content.strip()]
    return len(filled) == len(opened)
