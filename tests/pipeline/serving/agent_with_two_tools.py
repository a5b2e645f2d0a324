"""An agent of the ``openai-agents`` SDK with two tools, as its documentation writes one: ``python ... ADDRESS``."""

from __future__ import annotations

import sys

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
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


model = OpenAIChatCompletionsModel(
    model="it", openai_client=AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", timeout=300)
)
agent = Agent(name="calculator", instructions="Use the tools.", tools=[add, times], model=model)
print(Runner.run_sync(agent, "(2 + 3) * 4?").final_output)
