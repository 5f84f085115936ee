"""tasks/toy.py: right solutions, right steps, every rule with both verdicts."""
import datetime
import random
import re

import pytest

from tasks import toy
from tasks.toy import follows


def test_every_code_solution_equals_the_reference():
    """The style with a loop and the one-liner agree on every example (ours, so no sandbox)."""
    r = random.Random(1)
    for make in (toy.list_function, toy.string_function, toy.number_function):
        for _ in range(150):
            _, signature, bodies, inputs = make(r)
            name, functions = signature.partition("(")[0], []
            for body in bodies:
                space = {}
                exec(f"def {signature}:\n{body}", space)
                functions.append(space[name])
            for x in inputs:
                values = [f(x) for f in functions]
                same = all(v == values[0] and type(v) is type(values[0]) for v in values)
                assert same, (bodies, x)


def test_steps_of_the_work_shown_are_right():
    """Each "a op b = c" of the mathematics is true, and the last one is the answer."""
    r = random.Random(2)
    makers = [toy.gain_and_loss, toy.boxes, toy.together, toy.change, toy.share,
              toy.perimeter]
    for make in makers * 60:
        _, answer, steps = make(r)
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right), step
        assert int(steps[-1].split(" = ")[1]) == answer > 0


def test_logic_by_its_own_rules():
    """Swaps, by playing them; weekdays, by the calendar; syllogisms, by closing the relation."""
    r = random.Random(3)
    for _ in range(100):
        prompt, answer, _ = toy.swap(r)
        has = dict(re.findall(r"(\w+) has the (\w+)", prompt))
        a, b = re.search(r"(\w+) and (\w+) swap", prompt).groups()
        has[a], has[b] = has[b], has[a]
        assert has[re.search(r"does (\w+) have", prompt)[1]] == answer
    for _ in range(100):
        prompt, answer, _ = toy.weekday(r)
        start = datetime.date(2024, 1, 1)  # a Monday
        while start.strftime("%A") not in prompt:
            start += datetime.timedelta(1)
        days = int(re.search(r"\d+", prompt)[0]) * (-1 if "ago" in prompt else 1)
        assert (start + datetime.timedelta(days)).strftime("%A") == answer
    for _ in range(100):
        prompt, answer, _ = toy.syllogism(r)
        every = dict(re.findall(r"Every (\w+) is a (\w+)", prompt))
        never = dict(re.findall(r"No (\w+) is a (\w+)", prompt))
        kind, asked = re.search(r"(?:^|\. )[A-Z]\w+ is a (\w+)\. Is \w+ a (\w+)\?", prompt).groups()
        known = {kind}
        while known & every.keys() and not known >= {every[k] for k in known & every.keys()}:
            known |= {every[k] for k in known & every.keys()}
        denied = {never[k] for k in known & never.keys()}
        assert answer == ("yes" if asked in known else "no" if asked in denied else "unknown")


@pytest.mark.parametrize("rule,kw,good,bad", [
    ("keywords:existence", {"keywords": ["sea", "Wind"]}, "Wind over the Sea.", "The seas, wind"),
    ("keywords:forbidden_words", {"forbidden_words": ["the"]}, "A theme.", "By THE sea."),
    ("ours:exact_words", {"n": 3}, "Don't stop now!", "Don't stop - right now."),
    ("ours:start_word", {"word": "The"}, '"the sea."', "A the sea."),
    ("startend:end_checker", {"end_phrase": "noon."}, '"Stops at Noon."', "Stops at noon. Really."),
    ("startend:quotation", {}, ' "Yes."\n', '"Yes." he said'),
    ("startend:quotation", {}, '""', '"'),
    ("change_case:english_capital", {}, "ALL 4 OF IT.", "ALL BUT oNE."),
    ("change_case:english_lowercase", {}, "all 4 of it.", "all but One."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "text\n* a", "*\n"),
    ("ours:items", {"category": "fruits", "n": 2}, "Apple, pear.", "apple, apple"),
    ("ours:items", {"category": "fruits", "n": 2}, "* apple\n* PEAR", "apple, pear, plum"),
    ("ours:items", {"category": "fruits", "n": 2}, '"apple, pear"', "apple, cat")])
def test_rules(rule, kw, good, bad):
    """Each constraint, followed and not; never by the empty text."""
    assert follows(good, rule, kw) and not follows(bad, rule, kw)
    assert not follows("", rule, kw) or rule == "keywords:forbidden_words"


def test_unknown_rule_is_not_followed():
    """No reward for a constraint that nobody checks."""
    assert not follows("anything", "combination:two_responses", {})


def test_every_generated_rule_is_known():
    """What `instruction` asks for, `follows` can check: no rule by a name it does not know."""
    r, rules = random.Random(0), set()
    for _ in range(2000):
        _, check, _ = toy.instruction(r)
        rules |= set(check["instruction_id_list"])
    assert len(rules) == 10 and rules <= toy.RULES.keys()
