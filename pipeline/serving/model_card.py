"""The model card of an export: ``README.md`` with the header that the Hugging Face hub reads
(https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from configs.paths import is_hub_id
from configs.yaml_text import YamlProblem, read, write
from latent_control.bases.loading import local_folder
from pipeline.evaluation.modes import MODES
from pipeline.runs.stage_table import ACTIONS, CLONE, FINETUNE, IMPROVE, IMPROVE_OFFLINE

CARD = "README.md"
OFFLINE = (ACTIONS, CLONE, FINETUNE, IMPROVE_OFFLINE)
_LARGEST = 1 << 20
"""Bytes of a base LM's card that are read."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_BODY = Template(
    """
# $title

A policy over $codes latent actions ([CoLA](https://arxiv.org/abs/2503.21383)) on a frozen base language model: at each
token the policy picks a code, and the world model emits that code's token. Codes can be forced or masked.

```python
import latent_control  # registers the class
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", padding_side="left")
```

| | |
|---|---|
| base LM | $base |
| licence of the base LM | $licence |
| codebook | $codes codes, one per $span |
| trained by | $trained |
| data | $data |
| SHA-256 of the base LM, of the replay buffer | `$base_hash`, `$replay_hash` |
| commit of `latent-control` | `$commit` |

## Evaluation

$evaluation

## Limits

- Success was measured on the prompts named above alone; on other prompts, languages or lengths nothing is known.
- The verifier judged whether answers are right. Nobody looked at whether they are harmful, biased or private: what the
  base LM writes, this model may write.
- What a code does was found on the training data; a forced code may do something else elsewhere.
- The licence of the base LM holds for its weights in `base/`, and may bind the policy as well.

`provenance.json` beside this file has the whole config, every number of the evaluation and all hashes.
"""
)


def model_card(about: Mapping[str, Any], source: str, shape: Any) -> str:
    """The card of an export with ``provenance.json`` ``about``, a base LM that was loaded from ``source`` and latent
    actions of ``shape``."""
    config, evaluation = about["config"] or {}, about["evaluation"] or {}
    task, licence = (config.get("task") or {}).get("name"), base_licence(source)
    title = _plain(f"{about['run'] or about['checkpoint']} on {about['base']['name']}")
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header |= {"tags": ["latent-actions", "reinforcement-learning", "latent-control"]}
    header |= {"base_model": source} if is_hub_id(source) and not Path(source).exists() else {}
    header |= {"license": licence} if licence else {}
    if task and (metrics := list(_metrics(evaluation))):
        result = {"task": {"type": "text-generation"}, "dataset": {"name": task, "type": task}, "metrics": metrics}
        header["model-index"] = [{"name": title, "results": [result]}]
    body = _BODY.substitute(
        title=title,
        codes=shape.num_actions,
        span="token" if shape.span == 1 else f"{shape.span} tokens",
        base=_plain(about["base"]["name"]),
        licence=licence or "not named by its folder: look it up before you pass this on",
        trained=", ".join(_stages(config)) or "unknown: not exported from a run",
        data=_plain(_data(config)),
        base_hash=about["base"]["sha256"],
        replay_hash=about["replay_sha256"] or "none",
        commit=about["exported_by"] or "unknown",
        evaluation=_table(evaluation, task) or "The run was not evaluated.",
    )
    return f"---\n{write(header)}---\n{body}"


def base_licence(source: str) -> str:
    """What the card of the base LM names as its licence; "" where it has none that can be read."""
    folder = local_folder(source)
    card = folder / CARD if folder is not None else None
    if card is None or not card.is_file() or card.stat().st_size > _LARGEST:
        return ""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        header = read(found[1])[0] if found else None
    except YamlProblem:
        return ""
    name = header.get("license") if isinstance(header, dict) else None
    return name if isinstance(name, str) and _LICENCE.fullmatch(name) else ""


def _plain(text: object) -> str:
    """What a user named, without what Markdown or a table would read into it."""
    return re.sub(r"[\\`|<>\[\]*_#\s]+", " ", str(text)).strip()[:200]


def _stages(config: Mapping[str, Any]) -> Iterator[str]:
    for name in (*OFFLINE, IMPROVE):
        if section := config.get(name):
            how = section.get("algorithm") or section.get("method") or ""
            yield f"{name}{f' ({how})' if how else ''}, {section['updates']} updates"


def _data(config: Mapping[str, Any]) -> str:
    kinds = {
        source["kind"] + (f" {Path(source['path']).name}" if source.get("path") else "")
        for name in OFFLINE
        for source in (config.get(name) or {}).get("data") or ()
    }
    task = (config.get("task") or {}).get("name")
    return f"{', '.join(sorted(kinds))}; task {task}" if task else "unknown"


def _rows(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, float, list[float]]]:
    """(variant, how it was decoded, success, interval) of each number of success."""
    for variant, row in evaluation.items():
        for mode, words in MODES.items():
            if isinstance(row, Mapping) and isinstance(row.get(f"{mode}_interval"), list):
                yield variant, words, float(row[mode]), row[f"{mode}_interval"]


def _metrics(evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for variant, decoding, success, _ in _rows(evaluation):
        yield {"name": f"success of {variant}, {decoding}", "type": "accuracy", "value": round(success, 4)}


def _table(evaluation: Mapping[str, Any], task: object) -> str:
    rows = [
        f"| {_plain(variant)} | {decoding} | {success:.3f} | {low:.3f} - {high:.3f} |"
        for variant, decoding, success, (low, high) in _rows(evaluation)
    ]
    if not rows:
        return ""
    head = f"Success on {evaluation.get('prompts', '?')} held-out prompts of {_plain(task)}, with 95 % intervals."
    return "\n".join([head, "", "| variant | decoding | success | 95 % interval |", "|---|---|---|---|", *rows])
