"""The members of a bank folder in a server's memory. They follow the folder: what is added, moved by alias, banned or
removed there holds for the next request, and requests under way end as they began."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from latent_control.policies.bank import BankMember, Blend, PolicyBank, blend
from pipeline.serving.bank import INDEX, LATEST, WORLD, BankIndex, UnknownMember, policy_like, read_index, read_member
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class View:
    """What the folder said when it was last read; replaced whole, so that readers need no lock."""

    index: BankIndex = field(default_factory=BankIndex)
    members: Mapping[str, BankMember] = field(default_factory=dict)
    """By ``NAME@VERSION``; one that is in the index alone could not be read"""

    def listed(self) -> list[dict[str, str]]:
        """The names that a request may give, and what each is: ``{"id": "concise", "root": "concise@2"}``."""
        named = {name if alias == LATEST else f"{name}@{alias}": f"{name}@{number}"
                 for name, own in self.index.aliases.items() for alias, number in own.items()}  # fmt: skip
        return [{"id": name, "root": member} for name, member in named.items() if member in self.members] + [
            {"id": member, "root": member} for member in self.members
        ]

    def blend(self, asked: str | Mapping[str, float]) -> tuple[str, Blend]:
        """What was asked for in full, ``concise@2`` or ``concise@2*0.7+formal@1*0.3``, and its policy.

        Raises:
            UnknownMember: there is none of this name.
            ValueError: a weight cannot be.
        """
        if isinstance(asked, str):
            member = self._resolve(asked)
            return member, blend(self.members, member)
        weights: dict[str, float] = {}
        for name, weight in asked.items():
            if (member := self._resolve(name)) in weights:
                raise ValueError(f"mix: {name!r:.80} is {member}, which it has already: name it once")
            weights[member] = weight
        return "+".join(f"{name}*{weight:g}" for name, weight in weights.items()), blend(self.members, weights)

    def _resolve(self, asked: str) -> str:
        if (member := self.index.resolve(asked)) not in self.members:
            raise UnknownMember(f"{member} could not be read: the server's log says why; add it again")
        return member


class ServedMembers:
    """``members = ServedMembers(bank, "cpu"); members.now().blend("concise")``"""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self.folder, self.like = folder, policy_like(folder / WORLD)
        self.bank = PolicyBank(self.like.to(device))
        self.lock = threading.Lock()
        self.stamp: tuple[int, ...] = ()
        self.view = View(index=read_index(folder))
        self.now()

    def now(self) -> View:
        """The folder's members as they are; they are read again where its index was replaced."""
        if self._found() != self.stamp:
            with self.lock:
                if (found := self._found()) != self.stamp:
                    self._read()
                    self.stamp = found
        return self.view

    def chosen(self, request: Request) -> tuple[str, Blend, tuple[int, ...]]:
        """Of a request: the name of the policy in full, the policy, and the codes that it may not choose.

        Raises:
            RefusedRequest: it names no policy, an unknown one, or a weight that cannot be.
        """
        view, param = self.now(), "model" if request.mix is None else "mix"
        asked = request.model if request.mix is None else request.mix
        if asked is None:
            raise RefusedRequest("model is missing: name a policy of the bank (/v1/models lists them)", param=param)
        try:
            return *view.blend(asked), tuple(view.index.banned)
        except ValueError as error:
            unknown = isinstance(error, UnknownMember)
            code = "model_not_found" if unknown else None
            raise RefusedRequest(str(error), 404 if unknown else 400, param, code=code) from error

    def _found(self) -> tuple[int, ...]:
        """What tells one index from another: it is replaced, never written to."""
        try:
            found = (self.folder / INDEX).stat()
        except OSError:
            return self.stamp  # the folder is away: what is loaded stays
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> None:
        try:
            index = read_index(self.folder)
        except (OSError, ValueError) as error:
            _log.warning("the bank is served as it was: %s", error)
            return
        hashes = index.hashes()
        for member, digest in hashes.items():
            if member not in self.bank.members:
                try:
                    self.bank.put(member, read_member(self.folder, member, digest, self.like))
                except (OSError, ValueError) as error:
                    _log.warning("%s is not served: %s", member, error)
        for member in self.bank.members.keys() - hashes.keys():
            self.bank.remove(member)
        self.view = View(index=index, members=dict(self.bank.members))
