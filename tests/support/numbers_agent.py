"""An agent program whose policy is rewarded for even numbers: two calls of an episode, the second goes on from the
first."""

from __future__ import annotations

from gateway_client import EPISODE, post, reward

text = " ".join(str((EPISODE["number"] * k) % 9 + 1) for k in (1, 3, 5))
for _ in range(2):
    said = post("completions", prompt=text)["choices"][0]["text"]
    words = said.split()
    share = sum(word.isdigit() and int(word) % 2 == 0 for word in words) / max(1, len(words))
    reward(share / 2, success=share == 1.0)
    text += said + " 4 7"
