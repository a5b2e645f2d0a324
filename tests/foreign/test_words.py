"""``exact`` and ``contains`` on texts of every script: what a person calls the same is the same, and nothing else."""

from __future__ import annotations

import unicodedata

import pytest

from rollout_workers.tasks.verifiers import VERIFIERS, answer_problem

CAFE = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        *[
            ("New York", " new  york\n"),
            ("café", CAFE),
            (CAFE, "CAFÉ"),
            ("Straße", "STRASSE"),
            ("İstanbul", "istanbul"),
            ("４２", "42"),
            ("٧", "7"),
        ],
        *[
            ("−7", "-7"),
            ("ﬁn", "fin"),
            ("it’s “so”", 'it\'s "so"'),
            ("a\u00a0b", "a b"),
            ("o\u200bk", "ok"),
            ("½", "1/2"),
        ],
        *[("Å", "Å"), ("\ufeffyes", "yes"), ("ＡＢＣ", "abc"), ("x²", "x^2"), ("2½", "2 1/2"), ("ｶﾞ", "ガ"), ("İ", "i̇")],
        *[("❤\ufe0f", "❤"), ("葛\U000e0100", "葛"), ("‹a›", "'a'"), ("don´t", "don't"), ("Hawaiʻi", "Hawai’i")],
    ],
)
def test_the_same_in_another_form(answer: str, text: str) -> None:
    assert all(
        VERIFIERS[verifier](one, two)
        for verifier in ("exact", "contains")
        for one, two in [(answer, text), (text, answer)]
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("x²", "x2"),
        ("2½", "21/2"),
        ("cafe", "café"),
        ("Paris", "Paris."),
        ("H₂O", "H2O"),
        ("7", "7.0"),
        ("не", "нё"),
        ("a", ""),
    ],
)
def test_what_differs(answer: str, text: str) -> None:
    assert not VERIFIERS["exact"](answer, text) and not VERIFIERS["exact"](text, answer)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        *[
            ("北京", "答案是北京。", True),
            ("7", "答案是7个", True),
            ("7", "答案是17个", False),
            ("東京", "東京です", True),
        ],
        *[("서울", "정답은 서울입니다", True), ("กรุงเทพ", "คำตอบคือกรุงเทพครับ", True), ("上海", "答案是北京。", False)],
        *[
            ("café", f"the {CAFE} is", True),
            ("cafe", f"the {CAFE} is", False),
            ("42", "it is 4２.", True),
            ("x", "x\u0302 = 1", False),
        ],
        *[
            ("cat", "The CAT sat", True),
            ("cat", "concatenate", False),
            ("cat", "cats", False),
            ("cat", "a cat-like", True),
        ],
        *[
            ("Москва", "это Москва.", True),
            ("Москва", "подМосква", False),
            ("किताब", "यह किताब है", True),
            ("कि", "यह किताब", False),
        ],
        *[("القاهرة", "هي القاهرة.", True), ("don't", "they don’t know", True), ("New York", "in NEW\n york.", True)],
        *[
            ("7", "7.5", False),
            ("7", "-7", False),
            ("-7", "it is −7", True),
            ("1", "1,000", False),
            ("1000", "1,000", True),
        ],
        *[
            ("7", "about 7cm", True),
            ("3", "2,3", True),
            ("2", "2,3", True),
            ("1/2", "½ cup", True),
            ("1/2", "21/2", False),
        ],
        *[
            ("5 cm", "2.5 cm", False),
            ("5 cm", "it is -5 cm", False),
            ("5 cm", "10-5 cm", True),
            ("5 cm", "No.5 cm", True),
            ("version 3.1", "version 3.1.4", False),
            ("version 3.1", "version 3.1.", True),
            ("007", "agent 007", True),
            ("007", "agent 7", False),
            ("C++", "C++ it is", True),
            ("C", "C++ it is", False),
            ("C", "in C#, not C", True),
            ("A", "an A+.", False),
            ("x", "for x+1", True),
            ('"yes"', "he said “yes”", True),
        ],
    ],
)
def test_contains(answer: str, text: str, right: bool) -> None:
    assert VERIFIERS["contains"](answer, text) is right


@pytest.mark.parametrize("answer", ["\u200b", "\ufe0f", "\u3164", "\ufeff \u200d", " "])
def test_an_answer_that_nothing_is_left_of_would_be_in_every_text(answer: str) -> None:
    assert "blank" in (answer_problem("contains", answer) or "") and "blank" in (answer_problem("exact", answer) or "")
