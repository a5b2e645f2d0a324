"""Reads and writes ``evaluation.parquet``, one row per judged response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluation.outcomes import Outcome
from pipeline.storage.atomic import write_atomic
from pipeline.storage.parquet_fields import field

OUTCOME_SCHEMA = pa.schema(
    [
        field("variant", pa.string(), "the model: base, cloned, finetuned, offline, improved, token_sft, token_level"),
        field("mode", pa.string(), "sampled, greedy (of a latent policy: by code) or greedy_token (by token)"),
        field("prompt_id", pa.string(), "<task>/heldout/<index>"),
        field("sample", pa.int32(), "0 to samples_per_prompt - 1; 0 when greedy"),
        field("success", pa.bool_(), "the verifier's full mark"),
        field("reward", pa.float64(), "the verifier's score; null when it failed", nullable=True),
        field("reward_parts", pa.map_(pa.string(), pa.float64()), "named parts of the score"),
        field("response", pa.string(), "what the model generated, without special tokens"),
        field("prompt", pa.string(), "what the model was given, before the chat template"),
        field("new_tokens", pa.int32(), "generated tokens, the end token included"),
    ]
)


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """The judged responses of an evaluation as one Parquet file (``OUTCOME_SCHEMA``), put at ``path`` whole."""
    columns = {name: [getattr(outcome, name) for outcome in outcomes] for name in OUTCOME_SCHEMA.names}
    columns["reward_parts"] = [list(parts.items()) for parts in columns["reward_parts"]]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=OUTCOME_SCHEMA), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue().to_pybytes())


def read_outcomes(path: Path) -> list[Outcome]:
    """What ``write_outcomes`` wrote; ``ValueError`` when it is no such file."""
    try:
        rows = pq.read_table(path, schema=OUTCOME_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not an evaluation file ({str(error).partition(chr(10))[0]}); make it again: "
            "latent-control evaluate"
        ) from error
    return [Outcome(**row | {"reward_parts": dict(row["reward_parts"])}) for row in rows]
