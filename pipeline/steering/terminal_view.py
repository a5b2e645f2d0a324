"""Answers and candidates as lines for a terminal, coloured by code where colours are shown, plain where they are
not."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from configs.plain_text import UNSEEN
from pipeline.steering.records import Candidates, SteeringAnswer, Token

SHOWN_CANDIDATES, LABEL = 12, 8


def printable(text: str) -> str:
    """Without what would move the cursor, hide text or turn it round; as the pages show it."""
    plain = text.replace("\n", "\u23ce").replace("\t", "\u21e5")
    return UNSEEN.sub("\ufffd", plain) or "\u2205"


def colour(code: int) -> str:
    """The colour that stands for a code on the pages, between the dark and the light one."""
    red, green, blue = colorsys.hls_to_rgb((code * 137.508) % 360 / 360, 0.52, 0.7)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def answer_lines(answer: SteeringAnswer, name: str, width: int) -> list[Text]:
    """The text, the verdict, and the tokens over their codes, broken to ``width`` cells."""
    lines = [Text.assemble((f"{name}: ", "bold"), printable(answer.text) if answer.text else "(nothing)")]
    lines += _table(answer.tokens, width)
    lines.append(Text(f"{outcome(answer)}; {len(answer.tokens)} tokens, {ending(answer)}", style="dim"))
    return lines


def outcome(answer: SteeringAnswer) -> str:
    """The verifier's word."""
    found = answer.verdict
    if found is None:
        return "not scored"
    if found.reward is None:
        return f"the verifier could not judge: {printable(found.problem)}"
    return f"reward {found.reward:.2f}, {'success' if found.success else 'no success'}"


def ending(answer: SteeringAnswer) -> str:
    """How it ended."""
    return "stopped (EOS)" if answer.finish_reason == "stop" else "cut at the limit"


def _table(tokens: Sequence[Token], width: int) -> list[Text]:
    """Rows of place, token, code and chance, as many columns as fit."""
    columns = [_column(place, token) for place, token in enumerate(tokens)]
    lines: list[Text] = []
    while columns:
        used, taken = LABEL, 0
        while taken < len(columns) and (taken == 0 or used + columns[taken][0] + 1 <= width):
            used += columns[taken][0] + 1
            taken += 1
        part, columns = columns[:taken], columns[taken:]
        for row, label in enumerate(("at", "token", "code", "P(code)")):
            cells = [cells[row] for _, cells in part]
            if any(cell.plain.strip() for cell in cells):
                lines.append(Text(label.ljust(LABEL), style="dim") + Text(" ").join(cells))
    return lines


def _column(place: int, token: Token) -> tuple[int, list[Text]]:
    """Width in cells, and the four cells."""
    style = "" if token.code is None else f"bold {colour(token.code)}"
    code = "" if token.code is None else f"{token.code}{'!' if token.forced else ''}"
    words = [str(place), printable(token.text), code, "" if token.chance is None else percent(token.chance)]
    width = max(map(cell_len, words))
    styles = ("dim", style, style, "dim")
    return width, [
        Text(word + " " * (width - cell_len(word)), style=one) for word, one in zip(words, styles, strict=True)
    ]


def candidate_lines(found: Candidates, text: str) -> list[Text]:
    """The likeliest codes at a token with what each writes, and the tokens by their chance."""
    lines = [
        Text.assemble((f"token {found.place}, now ", "bold"), printable(text), (f" by code {found.chosen}", "bold"))
    ]
    lines.append(Text("code    P(code)  P(tok)  top token", style="dim"))
    for row in found.codes[:SHOWN_CANDIDATES]:
        mark = "*" if row.code == found.chosen else " " if row.allowed else "x"
        lines.append(
            Text.assemble(
                (f"{row.code}{mark}".ljust(LABEL), colour(row.code)),
                percent(row.chance).ljust(LABEL),
                percent(row.certainty).ljust(LABEL),
            )
            + Text(printable(row.text))
        )
    if len(found.codes) > SHOWN_CANDIDATES:
        lines.append(Text(f"... {len(found.codes) - SHOWN_CANDIDATES} more codes", style="dim"))
    count = {1: "1 code"}
    sums = ", ".join(
        f"{printable(mass.text)} {percent(mass.chance)} ({count.get(mass.codes, f'{mass.codes} codes')})"
        for mass in found.tokens[:6]
    )
    lines.append(Text(f"tokens: {sums}"))
    lines.append(Text("* the code now, x forbidden", style="dim"))
    return lines


def percent(share: float) -> str:
    """``61 %``; what is small with a digit more."""
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"
