"""An agent with a calculator, by the standard library alone: questions in words, lines that the model writes.

A line ``calculate 12 * 34`` is a call, whose result is the next line; ``A: 408`` is the answer. ``calculator.py texts
300`` writes such conversations, for the codes and the cloned policy of ``configs/calculator.yaml``.
"""

import json
import os
import random
import re
import sys
import urllib.request
from typing import Any

CALL = re.compile(r"calculate (\d{1,9}) ([-+*]) (\d{1,9})")
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
QUESTIONS = [
    ("*", "{a} boxes of {b} pens each. How many pens?"),
    ("*", "Each of {a} pupils has {b} cards. How many cards?"),
    ("+", "Ann had {a} coins and got {b} more. How many coins has she?"),
    ("+", "{a} men and {b} women came. How many people came?"),
    ("-", "Tom had {a} euros and spent {b}. How many are left?"),
    ("-", "{b} of {a} seats are taken. How many are free?"),
]
SHOTS = (
    "Q: 21 rows of 14 trees each. How many trees?\ncalculate 21 * 14\n= 294\nA: 294\n\n"
    "Q: 95 birds sat there and 38 flew away. How many stayed?\ncalculate 95 - 38\n= 57\nA: 57\n\n"
)


def question(draw: random.Random) -> tuple[str, str]:
    """A question in words, and the call that answers it."""
    sign, words = draw.choice(QUESTIONS)
    b = draw.randint(11, 89)
    a = draw.randint(b + 1, 99) if sign == "-" else draw.randint(11, 99)
    return f"{SHOTS}Q: {words.format(a=a, b=b)}\n", f"calculate {a} {sign} {b}"


def result(call: str) -> int | None:
    """What the calculator says to a call; None where it is none."""
    found = CALL.fullmatch(call.strip())
    return None if found is None else SIGNS[found[2]](int(found[1]), int(found[3]))


def texts(count: int) -> None:
    """Write ``count`` conversations, JSON lines."""
    draw = random.Random("texts")
    for _ in range(count):
        asked, call = question(draw)
        print(json.dumps({"text": f"{asked}{call}\n= {result(call)}\nA: {result(call)}\n"}))


def post(path: str, body: dict[str, Any]) -> Any:
    """The reply to a request with the session's key."""
    url, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), {"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as reply:
        return json.loads(reply.read())


def play() -> None:
    """One episode: as many calls as the gateway allows, then an answer."""
    text, call = question(random.Random(os.environ["LATENT_CONTROL_EPISODE"]))
    while True:
        said = post("completions", {"prompt": text})["choices"][0]["text"]
        if (value := result(said)) is None:
            break
        text += f"{said}\n= {value}\n"
    won = said.strip() == f"A: {result(call)}"
    post(f"sessions/{os.environ['LATENT_CONTROL_SESSION']}/reward", {"reward": float(won), "success": won})


if __name__ == "__main__":
    texts(int(sys.argv[2])) if sys.argv[1:2] == ["texts"] else play()
