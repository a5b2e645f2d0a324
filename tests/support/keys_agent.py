"""An agent program that plays ``toy_world`` through the gateway, as the built-in player does: by text, or by chat
(``chat``); with ``changed`` it shortens its history, with ``ids`` it sends token ids."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gateway_client import EPISODE, Refused, post, reward
from toy_world import KeyWorld

MARK = "\n>"


def main(way: str) -> None:
    """Play until the world ends or the gateway refuses."""
    world = KeyWorld()
    seen = world.reset({"seed": EPISODE["number"]}) + MARK
    text, messages = seen, [{"role": "user", "content": seen}]
    while True:
        try:
            if way == "chat":
                reply = post("chat/completions", messages=messages)["choices"][0]["message"]
                said = reply["content"]
            else:
                said = post("completions", prompt=text)["choices"][0]["text"]
        except Refused:
            return
        step = world.step(said.strip())
        reward(step.reward, success=step.success)
        if step.terminated or step.truncated:
            return
        seen = step.observation + MARK
        text += said + "\n" + seen
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": seen}]
        if way == "changed":
            text = text.upper()


main(*sys.argv[1:2] or ["text"])
