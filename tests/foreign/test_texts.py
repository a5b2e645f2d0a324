"""End tokens, prompts as ids and special tokens: whatever a tokenizer, a config, a generation config and a chat
template say, all paths give the same ids as ``transformers.generate`` and stop where it does.

The bases are tiny random models of several families whose greedy continuations are found first, by ``transformers``
alone; then the words of the vocabulary are named, so that the token at one place of the continuation is the end token.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from served import listening
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from configs.loading import dump_config
from configs.schema import RolloutConfig, RunConfig
from latent_control import LatentActionForCausalLM, LatentActionLM
from latent_control.text import encode_text, end_token, end_tokens, load_tokenizer
from pipeline.data.sources import Encoder
from pipeline.serving.export import Source, export
from pipeline.serving.mlflow_model import LatentModel
from pipeline.serving.service import Service
from pipeline.steering.loading import load
from rollout_workers.engines import DecodeJob
from rollout_workers.engines.local import LocalEngine
from rollout_workers.engines.simulated import SimulatedEngine
from rollout_workers.rollouts import HostSpec
from rollout_workers.tasks.encoding import decode_response, encode_observation, encode_prompt
from rollout_workers.tasks.protocol import Demonstration, Prompt

VOCABULARY, NEW, PAD, BOS, EOS, USER, ASSISTANT = 48, 9, 0, 1, 2, 3, 4
SIZES = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "tie_word_embeddings": False}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: LlamaConfig(**WIDE, num_key_value_heads=2, **more),
    "qwen2": lambda **more: Qwen2Config(**WIDE, num_key_value_heads=2, **more),
    "mistral": lambda **more: MistralConfig(**WIDE, num_key_value_heads=2, **more),
    "gpt2": lambda **more: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **more),
    "gpt_neox": lambda **more: GPTNeoXConfig(**WIDE, **more),
}
SAYS = ("tokenizer", "config", "generation_config", "template")
"""Who alone names the end token that the base says."""
WORDS = [f"w{number}" for number in range(VOCABULARY)]
PROMPT = "w9 w12 w7"
CHAT = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }} {{ m.content }} "
    "{% if m.role == 'assistant' %}END {% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base LM's folder, and by hand what is right for ``PROMPT``."""

    folder: Path
    chat: bool
    prompt: list[int]
    said: list[int]
    """The new tokens, the end token included"""
    text: str


def greedy(lm: Any, prompt: Sequence[int], ends: int | list[int] | None) -> list[int]:
    lm.generation_config.eos_token_id = ends
    ids = torch.tensor([list(prompt)])
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=PAD)
    return out[0, len(prompt) :].tolist()


def words(names: dict[int, str], *, closes: bool = False, starts: bool = True, **settings: Any) -> Any:
    """A tokenizer with one token a word; ``names`` are special."""
    vocabulary = {name: number for number, name in enumerate(WORDS)}
    vocabulary = {names.get(number, name): number for name, number in vocabulary.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names.get(VOCABULARY - 1, WORDS[-1])))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{'<s> ' if starts else ''}$A{' </s>' if closes else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    extra = [name for number, name in names.items() if number not in (PAD, BOS, EOS)]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=extra, **settings)


def subject(folder: Path, family: str, says: str, *, pad: bool = True, closes: bool = False) -> Subject:
    """A base whose greedy continuation of ``PROMPT`` says ``<think>`` second, and sixth an end token that only ``says``
    names."""
    chat = says == "template"
    inner = [9, 12, 7]
    prompt = [USER, *inner, ASSISTANT] if chat else [BOS, *inner]
    for seed in range(200):
        torch.manual_seed(seed)
        config = FAMILIES[family](initializer_range=0.4, eos_token_id=EOS, **SIZES)
        lm = AutoModelForCausalLM.from_config(config).eval()
        path = greedy(lm, prompt, None)
        if len(set(path[:6])) == 6 and min(path[:6]) > ASSISTANT and not set(path[:6]) & set(inner):
            break
    else:
        raise AssertionError("no seed gives six different words")
    end = path[5]
    names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", USER: "<|user|>", ASSISTANT: "<|assistant|>"}
    names |= {end: "<end>", path[1]: "<think>"}
    tokenizer = words(
        names,
        closes=closes,
        pad_token="<pad>" if pad else None,
        bos_token="<s>",
        eos_token="<end>" if says == "tokenizer" else "</s>",
    )
    tokenizer.chat_template = CHAT.replace("END", "<end>" if chat else "</s>")
    lm.config.eos_token_id = [EOS, end] if says == "config" else EOS
    lm.generation_config = GenerationConfig(
        eos_token_id=[EOS, end] if says == "generation_config" else EOS, pad_token_id=PAD, bos_token_id=BOS
    )
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = greedy(AutoModelForCausalLM.from_pretrained(folder), prompt, [EOS, end])
    assert said == path[:6]
    text = " ".join(names.get(token, WORDS[token]) for token in said[:-1])
    return Subject(folder=folder, chat=chat, prompt=prompt, said=said, text=text)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    made: dict[Any, Subject] = {}

    def once(*key: Any, **more: Any) -> Subject:
        name = (key, tuple(more.items()))
        if name not in made:
            made[name] = subject(tmp_path_factory.mktemp("base") / "base", *key, **more)
        return made[name]

    return once


def checkpoint_of(it: Subject) -> Path:
    """An untrained model: its merge module passes the base's state on, so that it says what the base says."""
    folder = it.folder.parent / "checkpoint"
    if not folder.exists():
        LatentActionLM.from_base(it.folder, num_actions=4, seed=0, **LAYERS).save_pretrained(folder)
    return folder


LAYERS = {"policy_layers": 1, "merge_layers": 1, "inverse_dynamics_layers": 1}


def exported(it: Subject) -> Path:
    folder = it.folder.parent / "export"
    if not folder.exists():
        export(Source(checkpoint=checkpoint_of(it), run_dir=None), folder)
        if it.chat:  # as the export of a run that trained on chats says
            about = json.loads((folder / "provenance.json").read_text())
            run = RunConfig(base={"model": str(it.folder)}, task={"chat": True})
            about["config"] = run.model_dump(mode="json")
            (folder / "provenance.json").write_text(json.dumps(about))
    return folder


def ask(service: Service, path: str, **body: Any) -> dict[str, Any]:
    reply = asyncio.run(service.respond("POST", path, json.dumps(body).encode()))
    assert reply.status == 200 and isinstance(reply.body, dict), reply.body
    return reply.body


cases = pytest.mark.parametrize(
    ("family", "says"),
    [
        *(("llama", says) for says in SAYS),
        ("gpt2", "tokenizer"),
        ("qwen2", "generation_config"),
        ("mistral", "template"),
        ("gpt_neox", "config"),
    ],
)


@cases
def test_a_model_stops_where_transformers_does(make: Callable[..., Subject], family: str, says: str) -> None:
    it = make(family, says)
    model = LatentActionLM.from_base(it.folder, num_actions=4, seed=0, **LAYERS)
    for level in ("base", "latent"):
        out = model.generate(torch.tensor([it.prompt]), max_new_tokens=NEW, temperature=0.0, level=level)
        assert out.tokens[0, : int(out.lengths[0])].tolist() == it.said
        assert out.finish_reasons == ("stop",)
    assert out.shown(load_tokenizer(it.folder)).texts == [it.text]
    wrapped = LatentActionForCausalLM.wrap(model)
    assert wrapped.generate(torch.tensor([it.prompt]), max_new_tokens=NEW)[0].tolist() == [*it.prompt, *it.said]


@cases
def test_rollouts_stop_there_and_their_text_has_the_special_tokens(
    make: Callable[..., Subject], family: str, says: str
) -> None:
    it = make(family, says)
    for level, folder in (("base", it.folder), ("latent", checkpoint_of(it))):
        spec = HostSpec(level=level, checkpoint=str(folder))
        engine = LocalEngine.load(spec, RolloutConfig(), device=torch.device("cpu"), policy_dtype=torch.float32)
        ids = encode_prompt(engine.tokenizer, Prompt(id="a/train/0", text=PROMPT, metadata={}), chat=it.chat)
        assert ids == it.prompt
        job = DecodeJob(prompts=(tuple(ids),), repeats=1, seeds=(0,), max_new_tokens=NEW, temperature=0.0)
        out = engine.generate(job)
        assert out.tokens[0, : int(out.lengths[0])].tolist() == it.said
        assert out.finish_reasons == ("stop",)
        assert decode_response(engine.tokenizer, it.said) == it.text
        assert "<think>" in it.text


@cases
def test_an_export_and_its_service_stop_there(make: Callable[..., Subject], family: str, says: str) -> None:
    it = make(family, says)
    folder = exported(it)
    named = GenerationConfig.from_pretrained(folder).eos_token_id
    assert {EOS, it.said[-1]} <= set(named)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generate(torch.tensor([it.prompt]), max_new_tokens=NEW)[0].tolist() == [*it.prompt, *it.said]
    service = Service(folder, "it")
    body = {"messages": [{"role": "user", "content": PROMPT}]} if it.chat else {"prompt": PROMPT}
    reply = ask(service, "/v1/chat/completions" if it.chat else "/v1/completions", max_tokens=NEW, **body)
    choice = reply["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == (it.said, "stop")
    assert (choice["message"]["content"] if it.chat else choice["text"]) == it.text
    assert reply["usage"]["prompt_tokens"] == len(it.prompt)


def test_an_export_of_an_older_version_stops_too(make: Callable[..., Subject]) -> None:
    """T1: the tokenizer ends with <end> by fine-tuning, both configs still with </s>; older exports took theirs."""
    it = make("gpt2", "tokenizer")
    folder = exported(it)
    old = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(old))
    choice = ask(Service(folder, "it"), "/v1/completions", prompt=PROMPT, max_tokens=NEW)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (it.text, "stop")


@pytest.mark.parametrize(
    ("family", "says", "tokenizer"),
    [
        ("llama", "tokenizer", {"pad": False}),
        ("gpt2", "generation_config", {"closes": True}),
        ("mistral", "template", {"pad": False, "closes": True}),
    ],
)
def test_all_encode_a_prompt_alike(
    make: Callable[..., Subject], family: str, says: str, tokenizer: dict[str, bool]
) -> None:
    """Tokenizers without a pad token (S6), or that close every text with their end token."""
    it = make(family, says, **tokenizer)
    loaded = load_tokenizer(it.folder)
    demonstration = Demonstration(prompt=Prompt(id="a/train/0", text=PROMPT, metadata={}), response="w12")
    closing = it.said[-1] if says in ("tokenizer", "template") else EOS
    row = Encoder(tokenizer=loaded, chat=it.chat, max_length=32).demonstration(demonstration)
    assert (list(row.ids), row.start) == ([*it.prompt, 12, closing], len(it.prompt))
    assert encode_text(loaded, PROMPT, chat=it.chat) == it.prompt
    assert load(exported(it)).encode(PROMPT) == it.prompt
    served = LatentModel()
    served.load_context(SimpleNamespace(artifacts={"export": str(exported(it))}))
    found = served.predict(None, {"prompt": [PROMPT, "w8"]}, {"max_tokens": NEW})
    assert (found["text"][0], found["finish_reason"][0]) == (it.text, "stop")
    service = Service(exported(it), "it")
    body = {"messages": [{"role": "user", "content": PROMPT}]} if it.chat else {"prompt": PROMPT}
    reply = ask(service, "/v1/chat/completions" if it.chat else "/v1/completions", max_tokens=NEW, **body)
    assert reply["choices"][0]["token_ids"] == it.said


def test_the_openai_client_gets_the_same(make: Callable[..., Subject]) -> None:
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    it = make("mistral", "template")
    with listening(Service(exported(it), "it")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": PROMPT}]
        answer = client.chat.completions.create(model="it", messages=messages, max_tokens=NEW)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (it.text, "stop")
        assert answer.choices[0].token_ids == it.said
        parts = client.chat.completions.create(model="it", messages=messages, max_tokens=NEW, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == it.text


@pytest.mark.slow
def test_a_registered_model_stops_there_in_mlflow_s_own_loader(make: Callable[..., Subject], tmp_path: Path) -> None:
    """S6: no pad token; T1: only the tokenizer knows the end token."""
    import mlflow
    import pandas

    from pipeline.serving.registry import register

    it = make("llama", "tokenizer", pad=False)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    uri = register(exported(it), "it", store=store, experiment="it").uri
    mlflow.set_tracking_uri(store)
    model = mlflow.pyfunc.load_model(uri)
    rows = pandas.DataFrame({"prompt": [PROMPT, "w9"]})
    found = model.predict(rows, params={"max_tokens": NEW})
    assert (found["text"][0], found["finish_reason"][0]) == (it.text, "stop")


TEMPLATES = {
    # what the family's template puts, for [user, assistant] and [user, assistant, user]; then the right end token
    "gemma": (
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "llama 3": (
        "{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
        "</s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "glm": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|user|>",
    ),
    "harmony": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>",
    ),
    "plain": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        None,
    ),
    "one that leaves the assistant out": (
        "<|start|>{% for m in messages if m.role == 'user' %} {{ m.content }}{% endfor %}<|end|>",
        None,
    ),
    "one that writes the assistant otherwise": (
        "<|start|>{% for m in messages %} {{ m.content | replace('\x00', '') }}<|end|>{% endfor %}",
        "<|end|>",
    ),
    "one that raises": ("{{ raise_exception('no chats here') }}", None),
    "one that is broken": ("{% for m in messages %}", None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_ends_with_what_its_template_puts_after_the_assistant_s_turn(name: str) -> None:
    template, end = TEMPLATES[name]
    names = {"<bos>", "<|header|>", "<|/header|>", "<|user|>", "<|assistant|>", "<|start|>", "<|message|>", "<|end|>"}
    names |= {"<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|return|>", "<think>"}
    numbers = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"} | dict(enumerate(sorted(names), 3))
    tokenizer = words(numbers, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = template
    ids = {name: number for number, name in numbers.items()}
    assert set(end_tokens(tokenizer)) == {EOS, ids[end or "</s>"]}
    assert end_token(tokenizer, chat=True) == ids[end or "</s>"]
    assert end_token(tokenizer, chat=False) == EOS
    if not name.startswith("one"):
        # The turn is closed once, by the response itself or for it.
        between = [encode_observation(tokenizer, "w40", chat=True, closed=closed) for closed in (True, False)]
        assert between[1] == [ids[end or "</s>"], *between[0]] and 40 in between[0]
        assert not {ids[token] for token in ("<end_of_turn>", "<|eot_id|>", "<|return|>", "</s>")} & {between[0][0]}
    if name.endswith("leaves the assistant out"):
        with pytest.raises(ValueError, match="leaves out what the assistant said"):
            encode_observation(tokenizer, "w40", chat=True, closed=True)


def test_special_tokens_are_text_but_for_end_start_and_pad(make: Callable[..., Subject]) -> None:
    """T2: a reward that looks for the tags finds them."""
    names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<think>", 4: "</think>", 5: "<answer>", 6: "</answer>"}
    tokenizer = words(names, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    said = [BOS, 3, 17, 4, 5, 14, 6, EOS, PAD, 9]
    assert decode_response(tokenizer, said) == "<think> w17 </think> <answer> w14 </answer>"
    it = make("llama", "generation_config")
    spec = HostSpec(level="base", checkpoint=str(it.folder))
    engine = SimulatedEngine.load(spec, RolloutConfig(engine_options={"tokens_per_second": 1e9, "mean_tokens": 3.0}))
    seeds = tuple(range(32))
    out = engine.generate(DecodeJob(prompts=((BOS, 9),), repeats=32, seeds=seeds, max_new_tokens=4))
    for row, reason in enumerate(out.finish_reasons):
        tokens = out.tokens[row, : int(out.lengths[row])].tolist()
        assert (tokens[-1] in (EOS, it.said[-1])) == (reason == "stop")
        assert not {EOS, it.said[-1]} & set(tokens[:-1])


def test_a_text_that_ends_with_the_end_token_by_its_writer_keeps_it() -> None:
    """Only what the tokenizer itself puts behind texts is taken off."""
    names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    for closes in (False, True):
        tokenizer = words(names, closes=closes, eos_token="</s>", bos_token="<s>")
        assert encode_text(tokenizer, "w9 </s>", chat=False) == [BOS, 9, EOS]
        assert encode_text(tokenizer, "", chat=False) == [BOS]


def test_a_base_with_code_of_its_own_is_not_exported(
    make: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    it = make("llama", "tokenizer")
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(it.folder, base)
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"}, "model_type": "own"}
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | own))
    model = LatentActionLM.from_base(base, trust_remote_code=True, num_actions=4, **LAYERS)
    model.save_pretrained(run / "checkpoints" / "clone")
    config = RunConfig(base={"model": str(base), "trust_remote_code": True})
    (run / "config.yaml").write_text(dump_config(config))
    source = Source(checkpoint=run / "checkpoints" / "clone", run_dir=run)
    with pytest.raises(ValueError, match=r"needs Python code of its own .* not exported; use the policy in Python"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
