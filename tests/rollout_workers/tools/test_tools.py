"""Tools: their schemas, their process, and episodes with calls, by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from configs.checks import cross_field_problems
from configs.schema import Base, Reward, RunConfig, TaskConfig, Tools, Turns
from latent_control.records import Generation
from rollout_workers.engines import DecodeJob
from rollout_workers.episode_player import PlayedEpisode, Player
from rollout_workers.tasks import Score, build_task
from rollout_workers.tasks.encoding import encode_prompt
from rollout_workers.tasks.rewards import reward_hash
from rollout_workers.tools.task import ToolTask
from rollout_workers.tools.worlds import ToolWorlds

FILE = Path(__file__).resolve().parents[2] / "support" / "tools_of_mine.py"
GOOD = ("calculate", "look_up")
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }}</s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def worlds() -> Iterator[ToolWorlds]:
    made = ToolWorlds(Tools(path=str(FILE), functions=(*GOOD, "hang", "leave", "dial", "long"), seconds=2.0))
    yield made
    made.close()


def told(worlds: ToolWorlds, *calls: str) -> list[str]:
    step = worlds.step({0: "".join(calls)})[0]
    return [one["content"] for one in json.loads(step.observation)]  # type: ignore[union-attr]


def test_schemas_come_from_type_hints(worlds: ToolWorlds) -> None:
    function = worlds.schemas[0]["function"]
    assert function["name"] == "calculate" and function["description"] == "Calculate with two whole numbers."  # type: ignore[index]
    parameters = function["parameters"]  # type: ignore[index]
    assert parameters["required"] == ["left", "sign", "right"] and parameters["properties"]["left"]["type"] == "integer"
    assert parameters["properties"]["sign"]["enum"] == ["+", "-", "*"]


def test_results_and_errors_are_told_to_the_model(worlds: ToolWorlds) -> None:
    assert told(worlds, call("calculate", left=3, sign="*", right=4), call("look_up", word="a")) == [
        "12",
        '{"word": "a", "languages": ["en"]}',
    ]
    (wrong,) = told(worlds, call("calculate", left="three", sign="*", right=4))
    assert wrong.startswith("Error: ValueError: left: Input should be a valid integer")
    (missing,) = told(worlds, call("calculate", left=3, sign="*"))
    assert "right: Missing required argument" in missing
    assert len(told(worlds, call("long"))[0]) == 16 << 10
    assert told(worlds, *[call("calculate", left=1, sign="+", right=1)] * 18)[15:] == ["2", *[
        "Error: at most 16 calls in a response"] * 2]  # fmt: skip


def test_no_tool_takes_its_worker_along(worlds: ToolWorlds) -> None:
    assert "no answer within 2 s" in told(worlds, call("hang"))[0]
    assert told(worlds, call("leave"))[0].startswith("Error: the process ended with 3")
    assert "task.tools.network" in told(worlds, call("dial"))[0]
    assert told(worlds, call("calculate", left=3, sign="-", right=4)) == ["-1"]


def test_words_without_a_call_end_an_episode(worlds: ToolWorlds) -> None:
    for text in ("12", "", call("unknown"), '{"a": 1}', "<tool_call>{</tool_call>"):
        assert worlds.step({0: text})[0].terminated, text  # type: ignore[union-attr]


# -- episodes ----------------------------------------------------------------------------------------------------------


class Script:
    """An engine that says the next line."""

    def __init__(self, tokenizer: Any, lines: Sequence[str]) -> None:
        self.tokenizer, self.lines, self.jobs = tokenizer, list(lines), list[DecodeJob]()

    def generate(self, job: DecodeJob) -> Generation:
        self.jobs.append(job)
        ids = [*self.tokenizer.encode(self.lines.pop(0), add_special_tokens=False), self.tokenizer.eos_token_id]
        row = torch.tensor([ids])
        return Generation(
            tokens=row, actions=torch.arange(len(ids))[None], action_logp=torch.full(row.shape, -0.5),
            lengths=torch.tensor([len(ids)]), finish_reasons=("stop",), versions=torch.zeros_like(row),
        )  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: JSON comes back as it went in."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(["<s>", "</s>", *letters])}
    made = Tokenizer(BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def played(tmp_path: Path, *lines: str, **turns: Any) -> tuple[PlayedEpisode, Script, ToolTask]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"what is {i} * 4 ?", "answer": str(4 * i)}) + "\n" for i in range(9))
    )
    options = {"path": str(rows), "verifier": "number", "heldout_share": 0.3}
    task = build_task(TaskConfig(name="jsonl", options=options, chat=True, tools=Tools(path=str(FILE), functions=GOOD)))
    assert isinstance(task, ToolTask)
    engine = Script(byte_tokenizer(), lines)
    player = Player(task=task, worlds=task.worlds, limits=Turns(max_tokens=4000, **turns), reward=Reward(),
                    chat=True, max_prompt_tokens=400)  # fmt: skip
    try:
        (episode,) = player.play(
            engine,  # type: ignore[arg-type]
            [task.prompts("train")[0]],
            DecodeJob(prompts=(), repeats=1, seeds=(0,), max_new_tokens=20),
        )
    finally:
        task.close()
    return episode, engine, task


def test_an_episode_with_a_call(tmp_path: Path) -> None:
    """Prompt with the tools, a call, its result as a tool's message, the answer: the verifier judges that."""
    asked = '<tool_call> {"name": "calculate", "arguments": {"left": 2, "sign": "*", "right": 4}} </tool_call>'
    first, _, _ = played(tmp_path, "0")
    number = int(first.prompt.text.split()[2])
    episode, engine, task = played(tmp_path, asked.replace("2,", f"{number},"), str(4 * number))
    said = engine.tokenizer.decode([*episode.prompt_ids, *episode.row.tokens.tolist()])
    assert said.startswith("calculate look_up <s> user what is")
    seen = [token for token, mine in zip(episode.row.tokens.tolist(), episode.row.generated, strict=True) if not mine]
    assert (
        engine.tokenizer.decode(seen).replace("</s>", " </s>").split()
        == f"<s> tool {4 * number} </s> <s> assistant".split()
    )
    assert list(engine.jobs[1].prompts[0]) == [*episode.prompt_ids, *episode.row.tokens.tolist()[:-2]]
    assert not episode.row.action_logp[~episode.row.generated].any()
    assert isinstance(episode.verdict, Score) and episode.verdict.success and episode.row.finish_reason == "terminated"
    assert episode.verdict.parts["turns"] == -2 and set(task.parts) <= set(episode.verdict.parts)
    assert list(episode.prompt_ids) == encode_prompt(engine.tokenizer, task.prompts("train")[0], chat=True)


def test_an_episode_that_only_calls_is_cut_and_judged(tmp_path: Path) -> None:
    asked = '<tool_call> {"name": "look_up", "arguments": {"word": "4"}} </tool_call>'
    episode, _, _ = played(tmp_path, asked, asked, max_turns=2)
    assert episode.row.finish_reason == "turn_limit" and isinstance(episode.verdict, Score)
    assert episode.verdict.parts["truncated"] == 1.0


# -- settings ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    tools = Tools(path=str(FILE), functions=("bare",))
    with pytest.raises(ValueError, match=r"does not load: TypeError: the parameter left of bare has no"):
        ToolWorlds(tools).schemas  # noqa: B018
    with pytest.raises(ValueError, match=r"does not load: AttributeError"):
        ToolWorlds(tools.model_copy(update={"functions": ("no",)})).schemas  # noqa: B018
    with pytest.raises(ValueError, match=r"task\.tools: environment/toy_world:Keys has several turns"):
        build_task(TaskConfig(name="environment/toy_world:Keys", tools=tools))
    config = RunConfig(base=Base(model="x"), task=TaskConfig(tools=tools))
    assert any(one.startswith("task.tools: needs task.chat: true") for one in cross_field_problems(config))


def test_the_reward_hash_names_the_tools(tmp_path: Path) -> None:
    file = tmp_path / "tools.py"
    file.write_text("def f(a: int) -> int:\n    return a\n")
    task = TaskConfig(tools=Tools(path=str(file), functions=("f",)))
    before = reward_hash(task, Reward())
    file.write_text("def f(a: int) -> int:\n    return -a\n")
    assert len({before, reward_hash(task, Reward()), reward_hash(TaskConfig(), Reward())}) == 3
