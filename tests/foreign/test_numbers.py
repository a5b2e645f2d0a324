"""What a number is, in whatever form people write it: one function for verifiers, ``init`` and checks of rows."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from rollout_workers.judging.numerals import last_number, number_of
from rollout_workers.tasks.reasoning_gym import extract_answer
from rollout_workers.tasks.verifiers import VERIFIERS, answer_problem

WRITTEN = {
    "7": "7 +7 7. 7.0 ７ ٧ ७ $7 7€ 7% 07.0/1 14/2 7e0 0.7e1",
    "-7": "-7 −7 –7 －7 -$7 $-7 -7.0 -14/2 -\\frac{14}{2} \\frac{-14}{2} \\frac{14}{-2} -\\frac{-14}{-2}",
    "1/2": "\\frac{1.5}{3} \\frac{-1}{-2} \\frac{1,000}{2,000} "
    ".5 0.5 0,5 1/2 ½ \\frac{1}{2} \\frac12 \\dfrac{1}{2} 5e-1 5E-1 5×10⁻¹ 2^{-1} ٠٫٥ 50/100",
    "5/2": "2.5 2,5 2½ 5/2 2\\frac{1}{2}",
    "1234567": "1234567 1,234,567 1_234_567 1'234'567 1’234’567 1.234.567 12,34,567 1{,}234{,}567 1,\\!234,\\!567",
    "2469/2": "1,234.5 1.234,5 1'234.5 1_234.5 1234,5",
    "1/1000": "1e-3 1E-03 0.001 10^{-3} 10^-3 10⁻³ 1×10^{-3} 1*10**-3 1/1000",
    "1024": "1024 2^10 2^{10} 2¹⁰ 2**10 1,024 0x400 0X400 0b10000000000 0o2000",
    "-31": "-31 -0x1F −0x1f -0b11111",
}


@pytest.mark.parametrize(
    ("value", "text"), [(value, text) for value, texts in WRITTEN.items() for text in texts.split()]
)
def test_one_number_in_many_forms(value: str, text: str) -> None:
    assert last_number(text)[0] == last_number(f"So it is {text}, I think.")[0] == Fraction(value)
    assert number_of(text) == (None if text.startswith("07") else Fraction(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("1 234 567", 1234567),
            ("1\u202f234,5", Fraction(2469, 2)),
            ("1\u00a0000 m", 1000),
            ("2 1/2 cups", Fraction(5, 2)),
            (r"\frac{ -3 }{ 4 }", Fraction(-3, 4)),
            ("4\ufe0f\u20e32\ufe0f\u20e3", 42),
        ],
        *[("10-4", 4), ("3–5", 5), ("2026-11-30", 30), ("11/30/2026", 2026), ("x = -7", -7), ("H2O: 7 mol of CO2", 7)],
        *[("x^2 = 7", 7), ("a_1 is 4, not x_2", 4), ("5 m²", 5), ("答案是7个", 7), ("version 1.2.3", 3), ("...5", 5)],
        *[("(1, 2,3,4)", 4), ("it is 7.", 7), ("7, or so", 7), ("$1,000.50", Fraction(2001, 2)), ("٢٥ كتاب", 25)],
    ],
)
def test_the_last_number_in_a_text(text: str, value: Fraction) -> None:
    assert last_number(text)[0] == value


@pytest.mark.parametrize("text", ["", "no", "nan", "inf", "x2", "CO2", "1/0", "1e999999999", "9" * 20_000, "VII"])
def test_no_number_that_can_be_read(text: str) -> None:
    assert last_number(text) == () and number_of(text) is None


@pytest.mark.parametrize(
    "text", ["007", "02134", "7 cm", "1,2,3", "(2,3)", "2026-11-30", "10:30", "1 or 2", "x=7", "1.2.3"]
)
def test_texts_that_are_no_number_have_none_as_a_whole(text: str) -> None:
    assert number_of(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1 or 2?</think>\n7", "7"),
        ("<think>1</think> <answer> 7 </answer>", "7"),
        ("<answer>7", "7"),
        ("<think>7</think>", "<think>7</think>"),
        ("Answer: 7\nQuestion: <answer>8</answer>", "7"),
    ],
)
def test_the_answer_behind_thoughts_that_reasoning_gym_is_given(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


LONG = "1234567890" * 3


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        *[("7", LONG + "7", False), (LONG + "7", LONG + "7", True), (LONG + "7", LONG + "8", False)],
        *[
            ("9007199254740993", "9007199254740992", False),
            ("123456789", "123456790", False),
            ("10000000", "10000001", False),
        ],
        *[("123456789", "123456789.4", False), ("1e22", "10000000000000000000000", True), ("7", "6.99999999", True)],
        *[("0.333333", "1/3", True), ("1/3", "0.33", False), ("3.14159265", "3.141593", True), ("0", "-0.0", True)],
        *[("1e-10", "2e-10", False), ("0.0001", "0", False), ("1e-10", "0.0000000001", True), ("1e400", "1e400", True)],
        *[("42", "４２", True), ("42", "it was 40, no: 42.", True), ("12", "12 or 13", False), ("12", "none", False)],
        *[("7", "\\boxed{7}, for 3 + 4 = 7 and 2 are 9", True), ("9", "\\boxed{7}, for 2 more are 9", False)],
        *[("7", "<think>\\boxed{3}</think> 7", True), ("7", "<answer>7</answer>, of 3", True)],
        *[
            ("7", "\\boxed{}: 7", True),
            ("3.14", "3,14", True),
            ("3", "(2,3)", True),
            ("50", "50 %", True),
            ("5", "5.", True),
        ],
        *[("31", "0x1F", True), ("0x1F", "0x2F", False), ("0xff", "255", True), ("0b101", "0b110", False)],
        *[("2", r"\sqrt{2}", False), ("3", r"2\sqrt{3}", False), ("3", "2√3", False), ("3", r"3\pi", False)],
        *[("2", r"\frac{\sqrt{3}}{2}", False), ("8", r"\log_2 8", False), ("2", r"\boxed{3\sqrt{ 2 }}, not 2", False)],
        *[
            ("3", "sqrt(3)", False),
            ("2", "2^{1/2}", False),
            ("2", "2^{0.5}", False),
            ("2", "2^n", False),
            ("2", "n^{1/2}", False),
        ],
        *[("7", r"$\sqrt{49} = 7$", True), ("9.42", r"3\pi \approx 9.42", True), ("90", r"90^\circ", True)],
        *[("5", "the 5^{th} of them", True), ("1", "the rest is √2, for 1", True), ("2", r"so 2 < \sqrt{5}", False)],
        *[("2.5 million", "2,500,000", True), ("2 million", "2 thousand", False), ("1e9", "1 Billion", True)],
        *[("1234567.89", "1234567.12", False), ("1234567.89", "1,234,567.89", True), ("1e7", "9999999.9999999", True)],
        *[
            ("42", "The answer is 42. I checked it 3 times.", True),
            ("3", "The answer is 42. I checked 3 times.", False),
        ],
        *[("42", "The answer is 42, not 41.", True), ("42", "**Answer:** 42 (7 x 6, in 2 steps)", True)],
        *[("12", "The answer is 3 x 4 = 12.", True), ("12.5", "Answer: 12.5\nConfidence: 90", True)],
        *[("42", "答案是42。我算了3次。", True), ("7", "the answer is odd: 7", True), ("7", "#### 7\n\n3 lines", True)],
        *[("5 km", "It is 5 km.", True), ("5 km", "It is 5000 m, I think.", True), ("5 km", "It is 5 miles.", False)],
        *[("5 km", "5", True), ("5", "5 km", True), ("5 km", "5 people", True), ("90 min", "1.5 hours", True)],
        *[("5 km", "5 kg", False), ("5", "5 in all", True), ("5 cm", "5 in all", True), ("5 m^2", "5 m^3", False)],
        *[
            ("$5", "5 dollars each", True),
            ("$5", "5 euros", False),
            ("25 %", "0.25", True),
            ("60 km/h", "60 km", False),
        ],
        *[
            ("4 hours 30 minutes", "It takes 5 hours 30 minutes.", False),
            ("4 hours 30 minutes", "It takes 4.5 hours.", True),
            ("30 minutes", "In 4 hours, 30 minutes of them late, 7 left.", False),
            ("60 mph", "60 miles per hour", True),
            ("5", "5 \\text{ cm}", True),
            ("20°C", "20 degrees Fahrenheit", False),
        ],
        *[("1000", "1 000", True), ("72", "$72.00", True), ("1234", "1.234", False), ("-3", "− 3", False)],
    ],
)
def test_the_verifier(answer: str, text: str, right: bool) -> None:
    assert VERIFIERS["number"](answer, text) is right


@pytest.mark.parametrize("answer", ["x", "1/0", "1e999999999", "9" * 20_000, ""])
def test_an_answer_without_a_number_is_refused(answer: str) -> None:
    problem = answer_problem("number", answer)
    assert problem is not None and "without a number" in problem and "task.options.verifier: exact" in problem


@pytest.mark.parametrize(
    "answer",
    ["5:30", "2026-11-30", "10-4", "(2,3)", "[0,1)", "3!", "5 ft 3 in", "12 or 13", "5±1", r"\frac{1}{2} \cdot 3"],
)
def test_a_short_answer_that_is_no_single_number_is_refused(answer: str) -> None:
    problem = answer_problem("number", answer)
    assert problem is not None and "last number alone" in problem and "task.options.verifier: exact" in problem


@pytest.mark.parametrize(
    "answer",
    [
        *["7", "7 cm", "$5.00", "2 1/2 cups", "1/2 or 0.5", "2,3", r"\boxed{7}", r"90^\circ", "3rd", "3 x 4 = 12"],
        *["48/2 = 24\n#### 72", "He has 3 and 4, so it is 7 in all", "2 million", "12,34,567", "0x1F"],
    ],
)
def test_an_answer_with_one_number_or_a_sentence_is_taken(answer: str) -> None:
    assert answer_problem("number", answer) is None


HOSTILE = ["\\sqrt{", "\\sqrt+", "\\pi [", "sqrt(", "√(", "π*", "\\log_{", "\\sqrt{2}{3}{{", "0x1", "5 million", "9**"]
HOSTILE += [
    "9",
    "1,",
    "1,234",
    "1 ",
    "1/",
    ".",
    "1e",
    "-",
    "10^",
    "1 2/",
    "²",
    "½",
    "\\frac{1}",
    "1_",
    "12,",
    "1.000,",
    "{",
]
HOSTILE += [
    "\\boxed{",
    "\\boxed ",
    "a\u0301\u0316",
    "\u0301\u0316",
    "\ufdfa",
    "\u200b",
    " ",
    "2^9",
    "9^9^",
    "cat",
    "ca",
]


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_hostile_texts_take_bounded_time(verifier: str) -> None:
    for piece in HOSTILE:
        for text in (piece * 3_000, piece * 3_000 + "7"):
            started = time.process_time()
            for answer in ("7", "caca"):
                VERIFIERS[verifier](answer, text)
            assert time.process_time() - started < 1.5, (verifier, piece)
