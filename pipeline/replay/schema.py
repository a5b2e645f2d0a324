"""The columns of the replay buffer: one row per rollout, each field with its own description."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa

from pipeline.storage.parquet_fields import field, items

SCHEMA_VERSION = 5
OLDER = {
    2: ("reward_hash", "generated", "turn_rewards", "support"),
    3: ("generated", "turn_rewards", "support"),
    4: ("support",),
}
"""Schema versions that are read too, with the columns that their shards lack."""
ROW_GROUP = 256
MANIFEST = "_manifest.json"
QUARANTINE = "_quarantine"
METADATA = b"latent_control.replay"
SHARD_NAME = re.compile(r"part-([0-9]{8})-([0-9a-f]{8})\.parquet")
SCHEMA = pa.schema(
    [
        field("rollout_id", pa.string(), "unique over all runs; a row delivered twice is stored once"),
        field("group_id", pa.string(), "the rollouts of one prompt in one update share it"),
        field("prompt_id", pa.string(), "<task>/<split>/<index>"),
        field("prompt_text", pa.string(), "what the model was given, before the chat template"),
        field("text", pa.string(), "what it generated, without special tokens"),
        field("prompt_tokens", items(pa.int32()), "token ids of the prompt, chat template included"),
        field(
            "tokens",
            items(pa.int32()),
            "token ids after the prompt, end tokens included: generated, or observed between turns",
        ),
        field(
            "generated",
            items(pa.int8()),
            "1 at each generated token, 0 at observed ones; empty where all were generated",
        ),
        field(
            "actions",
            items(pa.int32()),
            "the code that produced each generated token (the token itself at level token)",
        ),
        field(
            "action_logp",
            items(pa.float32()),
            "natural logarithm of the behaviour policy's probability of each action",
        ),
        field(
            "support",
            items(pa.int32()),
            "the k actions that each was sampled from (rollout.top_k), k for each token; empty where all could be",
        ),
        field("prompt_length", pa.int32(), "tokens of the prompt"),
        field("length", pa.int32(), "tokens after the prompt"),
        field(
            "finish_reason",
            pa.string(),
            "stop, length (cut off); of episodes terminated, *_limit (cut off), lost (no verdict)",
        ),
        field("reward", pa.float64(), "the verifier's score; null when it failed", nullable=True),
        field("turn_rewards", items(pa.float32()), "reward of each turn of an episode; empty for a single response"),
        field("reward_parts", pa.map_(pa.string(), pa.float64()), "named parts of the score"),
        field(
            "reward_hash",
            pa.string(),
            "names the definition of the reward (task, options, tools, weights); empty before schema version 3",
        ),
        field("success", pa.bool_(), "the verifier's full mark"),
        field("failure_kind", pa.string(), "class of the verifier's failure; null when it judged", nullable=True),
        field("failure", pa.string(), "'kind: message' of the verifier's failure; null when it judged", nullable=True),
        field(
            "policy_version", pa.int64(), "learner updates done by the policy that sampled (the oldest one that did)"
        ),
        field("policy_hash", pa.string(), "SHA-256 of that policy's weights"),
        field(
            "action_versions",
            items(pa.int32()),
            "policy version that chose each action; empty where policy_version chose all",
        ),
        field("world_hash", pa.string(), "SHA-256 of codebook and merge module"),
        field("codebook_hash", pa.string(), "SHA-256 of the codebook: what the numbers in actions mean"),
        field("level", pa.string(), "latent (codes sampled), token (baseline) or base (base LM)"),
        field("seed", pa.int64(), "of this rollout's own random stream"),
        field("worker", pa.int32(), "index of the rollout worker"),
        field("created", pa.timestamp("us", tz="UTC"), "when it was finished"),
    ]
)
# A dictionary pays where a row group repeats values; where values are many it costs time and bytes.
_MANY_VALUES = {"rollout_id", "text", "prompt_tokens", "tokens", "action_logp", "seed", "created"}
_LEAVES: dict[str, tuple[str, ...]] = {"reward_parts": ("reward_parts.key_value.key", "reward_parts.key_value.value")}
_LEAVES |= {
    name: (f"{name}.list.element",) for name in ("actions", "action_versions", "generated", "turn_rewards", "support")
}
ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": [
        leaf for name in SCHEMA.names if name not in _MANY_VALUES for leaf in _LEAVES.get(name, (name,))
    ],
    "column_encoding": {"action_logp.list.element": "BYTE_STREAM_SPLIT"},  # floats of one size share their high bytes
}
