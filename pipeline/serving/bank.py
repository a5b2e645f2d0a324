"""A bank on disk: one world (base LM, codebook, merge module) and any number of policies for it, each a small file.

    BANK/world/                          an export; the base LM by reference with its hash
    BANK/members/NAME@VERSION.safetensors, .json       a policy's weights; their hash and lineage
    BANK/bank.json                       which members there are, where aliases point, which codes are banned

A member's file is written before the index names it, and both are replaced whole, so a reader (a server that follows
the folder) never sees half of anything. A version's number is never given to another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from safetensors.torch import save

from latent_control.bases.weight_files import read_shapes
from latent_control.config import LatentActionConfig
from latent_control.policies.mlp import MlpPolicy
from latent_control.pretrained import (
    WEIGHTS,
    load_policy,
    read_config,
    read_shape,
    reference,
    weights_hash,
    with_policy,
)
from latent_control.pretrained import world_hash_of as hash_of_world
from latent_control.tensor_files import read_weights, require_tensors
from pipeline.runs.layout import LOCK
from pipeline.serving.export import Source, export, read_provenance
from pipeline.storage import checkpoints
from pipeline.storage.atomic import sealed, unseal, write_atomic
from pipeline.storage.locks import locked

INDEX, WORLD, MEMBERS, LATEST = "bank.json", "world", "members", "latest"
MOST_MEMBERS = 4096
_LARGEST_INDEX, _LARGEST_RECORD, _HEADER = 4 << 20, 1 << 16, 1 << 16

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Word = Annotated[str, Field(pattern=NAME)]
Alias = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$")]
"""No number, as versions are"""
Number = Annotated[StrictInt, Field(ge=1, le=10**9)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class UnknownMember(ValueError):
    """No member of a bank has this name."""


class BankIndex(BaseModel):
    """``BankIndex(members={"concise": {"1": "5f..."}}, last={"concise": 1}, aliases={"concise": {"latest": 1}})``"""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    members: dict[Word, dict[Annotated[int, Field(ge=1, le=10**9)], Hash]] = {}
    """By name and version, the hash of the weights"""
    last: dict[Word, Number] = {}
    """The highest version that a name ever had"""
    aliases: dict[Word, dict[Alias, Number]] = {}
    banned: list[Annotated[StrictInt, Field(ge=0)]] = []
    """Codes that no policy of the bank may choose"""

    def resolve(self, asked: str) -> str:
        """``NAME@VERSION`` of ``NAME`` (its latest), ``NAME@VERSION`` or ``NAME@ALIAS``.

        Raises:
            UnknownMember: there is none.
        """
        name, _, which = asked.partition("@")
        number = self.aliases.get(name, {}).get(which or LATEST)
        if number is None and which.isdecimal() and len(which) < len(str(10**9)):
            number = int(which)
        if number is None or number not in self.members.get(name, {}):
            known = ", ".join([*self.members][:20]) or "none"
            versions = ", ".join(f"{name}@{number}" for number in self.members.get(name, {}))
            raise UnknownMember(f"the model {asked!r:.80} is not in the bank; there are {versions or known}")
        return f"{name}@{number}"

    def hashes(self) -> dict[str, str]:
        """The hash of each ``NAME@VERSION``."""
        return {f"{name}@{number}": value for name, own in self.members.items() for number, value in own.items()}


def is_bank(folder: Path) -> bool:
    """Whether ``create`` wrote ``folder``."""
    return (folder / INDEX).is_file() and (folder / WORLD).is_dir()


def read_index(bank: Path) -> BankIndex:
    """The index of a bank.

    Raises:
        ValueError: ``bank`` is no bank, or its index is damaged or says what cannot be.
    """
    if not is_bank(bank):
        raise ValueError(f"{bank} is not a bank: make one with latent-control bank create {bank} --from RUN")
    try:
        index = BankIndex.model_validate(_unsealed(bank / INDEX, _LARGEST_INDEX))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{bank / INDEX} is damaged: {place:.80}: {first['msg']}; copy it again") from error
    if len(index.hashes()) > MOST_MEMBERS:
        raise ValueError(f"{bank / INDEX} has {len(index.hashes())} members: a bank has {MOST_MEMBERS} at most")
    return index


def create(source: Source, bank: Path, *, base: str | None = None, bundle: bool = False) -> Path:
    """Make the bank of a run's (or checkpoint's) world; it has no members yet.

    Raises:
        ValueError: the policy is no ``mlp``, ``bank`` holds something, or the base LM is not there.
    """
    _require_mlp(source.checkpoint, read_shape(source.checkpoint))
    if bank.exists() and (not bank.is_dir() or any(bank.iterdir())):
        raise ValueError(f"{bank} is there already; give another folder, or add to it: latent-control bank add {bank}")
    export(source, bank / WORLD, base=base, reference=not bundle)
    (bank / MEMBERS).mkdir()
    _write_index(bank, BankIndex())
    return bank


def add(bank: Path, name: str, source: Source, *, alias: str = LATEST) -> str:
    """Add a run's policy as the next version of ``name`` and point ``alias`` at it; returns ``NAME@VERSION``.

    Raises:
        ValueError: the policy is of another world (base LM, codebook, merge module) or shape, or a name is none.
    """
    world, checkpoint = bank / WORLD, source.checkpoint
    _require_same_world(world, checkpoint)
    tensors = {key: tensor.contiguous() for key, tensor in load_policy(checkpoint).state_dict().items()}
    require_tensors(checkpoint, shapes_of(policy_like(world).state_dict()), shapes_of(tensors))
    digest = weights_hash(tensors.items())
    info = checkpoints.read_info(checkpoint) if (checkpoint / checkpoints.MANIFEST).is_file() else {}
    with _changing(bank) as (index, write):
        number, own = index.last.get(name, 0) + 1, index.members.get(name, {})
        parent = own.get(index.aliases.get(name, {}).get(LATEST, 0))
        record = {
            "format": 1, "name": name, "version": number, "sha256": digest, "parent": parent,
            "world_hash": read_provenance(world)["world_hash"], "base_sha256": read_config(world)["base"]["sha256"],
            "run": None if source.run_dir is None else reference(str(source.run_dir), bank),
            "checkpoint": checkpoint.name, "stage": info.get("stage"), "update": info.get("update"),
            "added": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        changed = _checked(
            index,
            members=index.members | {name: own | {number: digest}},
            last=index.last | {name: number},
            aliases=index.aliases | {name: index.aliases.get(name, {}) | {alias: number}},
        )
        write_atomic(file_of(bank, f"{name}@{number}", "safetensors"), save(tensors))
        write_atomic(file_of(bank, f"{name}@{number}", "json"), sealed(record))
        write(changed)
    return f"{name}@{number}"


def remove(bank: Path, asked: str) -> list[str]:
    """Remove ``NAME@VERSION``, or all versions of ``NAME``; aliases of what is gone are gone, ``latest`` falls back to
    the highest version left. Returns what was removed."""
    with _changing(bank) as (index, write):
        name = asked.partition("@")[0]
        gone = [index.resolve(asked)] if "@" in asked else [f"{name}@{n}" for n in index.members.get(name, {})]
        if not gone:
            index.resolve(asked)
        left = {n: digest for n, digest in index.members[name].items() if f"{name}@{n}" not in gone}
        aliases = {alias: n for alias, n in index.aliases.get(name, {}).items() if n in left}
        aliases |= {} if not left or LATEST in aliases else {LATEST: max(left)}
        others = [{key: value for key, value in old.items() if key != name} for old in (index.members, index.aliases)]
        kept = ({name: left}, {name: aliases}) if left else ({}, {})
        write(_checked(index, members=others[0] | kept[0], aliases=others[1] | kept[1]))
        for member in gone:
            for ending in ("json", "safetensors"):
                file_of(bank, member, ending).unlink(missing_ok=True)
    return gone


def point(bank: Path, name: str, alias: str, version: str) -> str:
    """Point ``NAME@ALIAS`` at a version (or at what another alias points at); returns ``NAME@VERSION``."""
    with _changing(bank) as (index, write):
        member = index.resolve(f"{name}@{version}")
        number = int(member.partition("@")[2])
        write(_checked(index, aliases=index.aliases | {name: index.aliases.get(name, {}) | {alias: number}}))
    return member


def ban(bank: Path, codes: Sequence[int]) -> None:
    """Ban these codes, and no others, for all members.

    Raises:
        ValueError: a code does not exist, or none is left.
    """
    count = read_shape(bank / WORLD).num_actions
    if wrong := [code for code in codes if not 0 <= code < count]:
        raise ValueError(f"code {wrong[0]} does not exist: the bank's are 0 to {count - 1}")
    if len(set(codes)) == count:
        raise ValueError(f"all {count} codes are banned: leave one to choose")
    with _changing(bank) as (index, write):
        write(_checked(index, banned=sorted(set(codes))))


def read_record(bank: Path, member: str) -> dict[str, Any]:
    """Hash and lineage of ``NAME@VERSION``."""
    return _unsealed(file_of(bank, member, "json"), _LARGEST_RECORD)


def read_member(bank: Path, member: str, digest: str, like: MlpPolicy) -> dict[str, torch.Tensor]:
    """The weights of ``NAME@VERSION``, which must be those that the index names.

    Raises:
        ValueError: the file is missing, larger than it can be, of another shape or type, or was changed.
    """
    path, wanted = file_of(bank, member, "safetensors"), like.state_dict()
    size = path.stat().st_size if path.is_file() else 0
    if size > (most := sum(tensor.nbytes for tensor in wanted.values()) + _HEADER):
        raise ValueError(f"{path} has {size} bytes, a policy of the bank's shape {most} at most: add it again")
    require_tensors(path, shapes_of(wanted), read_shapes(path))
    tensors = read_weights(path)
    if weights_hash(tensors.items()) != digest:
        raise ValueError(
            f"{path} is not what was added (its hash differs from the index's {digest[:12]}): add it again"
        )
    return tensors


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def policy_like(world: Path) -> MlpPolicy:
    """A policy of the shape of a bank's members."""
    policy = load_policy(world)
    assert isinstance(policy, MlpPolicy), "create takes no other kind"
    return policy


def take(bank: Path, asked: str, out: Path) -> str:
    """Write a member as a checkpoint, which every command takes; returns ``NAME@VERSION``."""
    if out.exists():
        raise ValueError(f"{out} is there already; give another folder with -o")
    index, world = read_index(bank), bank / WORLD
    member = index.resolve(asked)
    weights = read_member(bank, member, index.hashes()[member], policy_like(world))
    arrays: dict[str, np.ndarray] = {key: tensor.numpy() for key, tensor in weights.items()}
    info = {"stage": read_record(bank, member)["stage"], "bank_member": member}
    checkpoints.write(out, files=lambda staging: with_policy(world, staging, arrays), info=info)
    return member


# -- files -------------------------------------------------------------------------------------------------------------


def file_of(bank: Path, member: str, ending: str) -> Path:
    """Where the weights (``safetensors``) or the record (``json``) of ``NAME@VERSION`` lie."""
    return bank / MEMBERS / f"{member}.{ending}"


def _unsealed(path: Path, most: int) -> dict[str, Any]:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size} bytes, at most {most} are read: copy it again")
    return unseal(path)


def _write_index(bank: Path, index: BankIndex) -> None:
    write_atomic(bank / INDEX, sealed(json.loads(index.model_dump_json())))


@contextmanager
def _changing(bank: Path) -> Iterator[tuple[BankIndex, Callable[[BankIndex], None]]]:
    """The index, and how to write its successor, while nobody else changes it."""
    read_index(bank)
    with locked(bank / LOCK):
        yield read_index(bank), lambda changed: _write_index(bank, changed)


def _checked(index: BankIndex, **changes: Any) -> BankIndex:
    """The index with changes; ``ValueError`` where a name cannot be one."""
    try:
        changed = BankIndex.model_validate(index.model_dump() | changes)
    except ValidationError as error:
        word = [part for part in error.errors(include_url=False)[0]["loc"] if part != "[key]"][-1]
        raise ValueError(
            f"{word!r:.80} is not a name: take letters, digits, '.', '_' and '-', at most 64, a letter or digit first "
            "(an alias: a letter)"
        ) from error
    if len(changed.hashes()) > MOST_MEMBERS:
        raise ValueError(f"the bank has {MOST_MEMBERS} members, which is the most: remove some first")
    return changed


def _require_mlp(folder: Path, shape: LatentActionConfig) -> None:
    if shape.policy_kind != "mlp":
        raise ValueError(
            f"the policy in {folder} is of the kind {shape.policy_kind}: members of a bank are mlp policies; train one "
            "with actions.policy_kind: mlp"
        )


def _require_same_world(world: Path, checkpoint: Path) -> None:
    """``ValueError`` unless a checkpoint's policy can be a member."""
    ours, theirs = read_shape(world), read_shape(checkpoint)
    _require_mlp(checkpoint, theirs)
    for name in ("num_actions", "head", "span"):
        if getattr(theirs, name) != getattr(ours, name):
            raise ValueError(
                f"{checkpoint} has {name}={getattr(theirs, name)!r}, the bank {getattr(ours, name)!r}: make a bank of "
                "its own for it"
            )
    bases = [read_config(folder)["base"] for folder in (checkpoint, world)]
    if bases[0]["sha256"] != bases[1]["sha256"]:
        raise ValueError(
            f"{checkpoint} was trained on another base LM (hash {bases[0]['sha256'][:12]}, the bank's "
            f"{bases[1]['sha256'][:12]}): make a bank of its own for it"
        )
    found, wanted = (hash_of_world(read_weights(folder / WEIGHTS)) for folder in (checkpoint, world))
    if found != wanted:
        raise ValueError(
            f"{checkpoint} has another codebook or merge module (world hash {found[:12]}, the bank's {wanted[:12]}), "
            "whose codes mean other tokens: train the policy from the bank's own (actions.init), or make another bank"
        )
