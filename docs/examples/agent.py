"""An agent program for `latent-control gateway`: countdown with one more try, by the standard library alone.

Any program that speaks OpenAI's protocol will do; `openai.OpenAI()` finds address and key by itself.
"""

import json
import os
import random
import re
import urllib.request

STEP = re.compile(r"(-?\d+) ([-+*]) (\d+) = (-?\d+)")


def post(path, body):
    """The reply to a request with the session's key."""
    url, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), {"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as reply:
        return json.loads(reply.read())


def reached(text, numbers):
    """What the steps of an answer come to, each number used once; None where a step is wrong."""
    left, value = list(numbers), None
    for step in text.split(","):
        found = STEP.fullmatch(step.strip())
        if not found:
            return None
        a, sign, b, value = int(found[1]), found[2], int(found[3]), int(found[4])
        if {"+": a + b, "-": a - b, "*": a * b}[sign] != value or a not in left:
            return None
        left.remove(a)
        if b not in left:
            return None
        left = [n for i, n in enumerate(left) if i != left.index(b)] + [value]
    return value if len(left) == 1 else None


episode = json.loads(os.environ["LATENT_CONTROL_EPISODE"])  # {"split": "train", "number": 17}
draw = random.Random(str(episode))
numbers = [draw.randint(1, 20) for _ in range(3)]
target = numbers[0] + numbers[1] - numbers[2] if draw.random() < 0.5 else sum(numbers)
question = f"{' '.join(map(str, numbers))} -> {target} :"
text, won = question, False
for _ in range(2):
    said = post("completions", {"prompt": text})["choices"][0]["text"]
    won = reached(said, numbers) == target
    if won:
        break
    text += f"{said} {question}"  # what was replied goes back as it is: see the page
post(f"sessions/{os.environ['LATENT_CONTROL_SESSION']}/reward", {"reward": float(won), "success": won})
