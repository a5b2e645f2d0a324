"""An agent of the ``openai-agents`` SDK with two tools, as its documentation writes one. The client finds address and
key in the environment; an episode of the gateway gets its reward."""

from __future__ import annotations

import os

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from gateway_client import reward
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
def times(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


model = OpenAIChatCompletionsModel(model="it", openai_client=AsyncOpenAI(timeout=300))
agent = Agent(name="calculator", instructions="Use the tools.", tools=[add, times], model=model)
said = str(Runner.run_sync(agent, "(2 + 3) * 4?").final_output)
print(said)
if "LATENT_CONTROL_SESSION" in os.environ:
    reward(float("20" in said), success="20" in said)
