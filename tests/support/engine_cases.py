"""Random decoding calls and what must hold of their results: each row is what it would be alone.

A row is checked by induction: given the tokens written so far, a full pass without cache, batch or padding gives the
distribution from which the next action is drawn with the row's own uniform, its log-probability, the token it emits,
and whether the row ends there. Whatever a row takes from a neighbour breaks that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from latent_control import Generation, LatentActionLM
from latent_control.aliases import unpack
from latent_control.base_lm import BaseLM
from latent_control.decoding import prefill, static_engine
from latent_control.decoding.action_decoder import ActionDecoder, base_actor
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import make_guide
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.decoding.stop_strings import stop_watch
from latent_control.distributions import action_log_probs, uniform_streams
from latent_control.token_policy import token_actor, token_policy

VOCABULARY, CODES, PAD = 48, 8, 0
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_SHAPED: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 16}}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
}
LATENT: dict[str, dict[str, Any]] = {
    "late": {"policy_layers": 1},
    "final": {"policy_layers": 1, "policy_reads": "final"},
    "span 2": {"policy_layers": 1, "span": 2},
    "span 3": {"policy_layers": 1, "span": 3},
    "mlp": {"policy_kind": "mlp"},
    "mlp on both": {"policy_kind": "mlp", "policy_reads": "both", "span": 2},
}
POLICIES = (*LATENT, "last_blocks", "steering", "added_blocks", "mlp", "all", "base")
FIXED = ("all", "base")
"""Have no versions here."""
VERSIONS = 4
PIECES = [a + b + c for a in "xyz" for b in ("", "x", "y", "z") for c in ("", "y", "xy", "zz")]
"""What each token writes, several of them alike: strings are met inside of tokens and across them."""
# Half a nat apart, a fault is a fault; closer than this, float32 may decide either way.
TIE = 1e-4


@dataclass(kw_only=True)
class Subject:
    """A policy on a base, in several versions that share everything but the policy's weights."""

    base: BaseLM
    actor: ActionDecoder
    model: LatentActionLM | None = None
    versions: list[dict[str, torch.Tensor]] = field(default_factory=list)
    tree: PrefixTree = field(default_factory=lambda: PrefixTree(0.05))
    """So small that prefixes leave all the time."""

    @property
    def policy(self) -> torch.nn.Module | None:
        """What changes with a version."""
        head = self.actor.head
        return head if isinstance(head, torch.nn.Module) and self.actor.stack is None else self.actor.stack

    def use(self, version: int) -> None:
        """Take the weights of a version, in place."""
        if self.policy is not None:
            self.policy.load_state_dict(self.versions[version])

    @torch.no_grad()
    def states(self, row: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """([T, D] the base's final states, [T, D] what the policy reads) of one whole row."""
        features = self.base.features(torch.tensor([row]))
        return None if features.final is None else features.final[0], features.read(self.actor.reads)[0]

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[T, N] of the version in use."""
        stack = self.actor.stack
        return self.actor.head(states if stack is None else stack.hidden(states[None])[0])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Writes ``PIECES``, one after the other."""
    backend = Tokenizer(models.WordLevel({f"{n}:{piece}": n for n, piece in enumerate(PIECES)}, unk_token="0:x"))
    numbers = [decoders.Replace(f"{n}:", "") for n in reversed(range(VOCABULARY))]  # 17:yx writes yx
    backend.decoder = decoders.Sequence([*numbers, decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZER = make_tokenizer()


def make_subject(kind: str, policy: str) -> Subject:
    """The tiny random model of this kind, with codes and policies that matter."""
    shape = {**LLAMA_SHAPED, **OTHERS}[kind]
    torch.manual_seed(5)
    settings = shape | {"vocab_size": VOCABULARY, "pad_token_id": PAD} if kind == "gpt2" else SHAPE | shape
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    if policy in LATENT:
        model = LatentActionLM.from_base(
            lm, num_actions=CODES, seed=1, inverse_dynamics_layers=1, **LATENT[policy]
        ).eval()
        assert model.policy is not None
        for weight, std in [(w, 0.3) for w in model.merge.parameters()] + [(model.policy.head.weight, 0.6)]:
            torch.nn.init.normal_(weight, std=std, generator=generator)
        subject = Subject(base=model.base, actor=model.actor(), model=model)
    elif policy == "base":
        base = BaseLM(lm)
        subject = Subject(base=base, actor=base_actor(base))
    else:
        base, tokens = token_policy(lm, policy, 1)  # type: ignore[arg-type]
        if base.late_blocks:
            base.drop_late_blocks()
        subject = Subject(base=base, actor=token_actor(base, tokens))
    if subject.policy is not None:
        start = {name: p.clone() for name, p in subject.policy.state_dict().items()}
        for version in range(VERSIONS):
            noise = {name: torch.randn(p.shape, generator=generator) * 0.1 * (version > 0) for name, p in start.items()}
            subject.versions.append({name: p + noise[name] for name, p in start.items()})
        subject.use(0)
    return subject


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: a subject, a way of keeping the cache, and the arguments."""

    seed: int
    kind: str
    policy: str
    way: str
    prompts: list[list[int]]
    repeats: int
    slots: int
    limits: list[int]
    streams: list[int]
    stops: list[int]
    stop_strings: list[str]
    temperature: float
    top_k: int | None
    aliases: int | None
    keep_features: bool
    shared: bool = False
    """With a prefix tree that earlier cases have filled, and responses kept."""
    codes: list[list[int]] | None
    allowed: list[list[int]] | None
    barred: dict[int, list[int]]
    watched: bool
    changes: list[int]
    """Decoding steps before which the policy becomes the next version."""
    decode: str = "code"
    mixture_codes: int | None = None


def random_case(seed: int) -> Case:
    """Any mixture of everything that a call may ask for; more rows than slots, mostly."""
    draw = np.random.default_rng(seed)

    def chance(share: float) -> bool:
        return bool(draw.random() < share)

    kind = str(draw.choice([*LLAMA_SHAPED, *OTHERS], p=[0.35, 0.3, 0.15, 0.05, 0.15]))
    policies = [p for p in POLICIES if not (kind == "gpt2" and p == "added_blocks")]
    policy = str(draw.choice(policies))
    way = str(draw.choice(["lean", "transformers", "static"])) if kind in LLAMA_SHAPED else "transformers"
    latent, span = policy in LATENT, LATENT.get(policy, {}).get("span", 1)
    prompts = [draw.integers(3, VOCABULARY, draw.integers(1, 15)).tolist() for _ in range(draw.integers(1, 9))]
    repeats = int(draw.integers(1, 7))
    rows = len(prompts) * repeats
    guided = latent and chance(0.3)
    codes = allowed = None
    barred: dict[int, list[int]] = {}
    if guided:
        allowed = [sorted(draw.choice(CODES, draw.integers(3, CODES + 1), replace=False).tolist()) for _ in range(rows)]
        if chance(0.6):
            codes = [
                [int(draw.choice([-1, row[0]])) for _ in range(draw.integers(0, 4)) for _ in range(span)]
                for row in allowed
            ]
            codes = [[row[i - i % span] for i in range(len(row))] for row in codes]
        elif chance(0.6):
            barred = {
                int(place) * span: [int(draw.integers(CODES))]
                for place in draw.choice(4, draw.integers(1, 3), replace=False)
            }
    case = Case(
        seed=seed,
        kind=kind,
        policy=policy,
        way=way,
        prompts=prompts,
        repeats=repeats,
        slots=int(draw.integers(1, rows + 2)) if chance(0.5) else int(draw.integers(1, max(2, rows // 2 + 1))),
        limits=draw.integers(1, 13, rows).tolist() if chance(0.8) else [int(draw.integers(1, 13))] * rows,
        streams=draw.integers(2**62, size=rows).tolist(),
        stops=draw.integers(0, VOCABULARY, draw.integers(1, 8)).tolist() if chance(0.6) else [-1],
        temperature=float(draw.choice([0.0, 0.7, 1.0, 1.6], p=[0.15, 0.2, 0.45, 0.2])),
        top_k=int(draw.integers(1, CODES + 1)) if chance(0.3) else None,
        aliases=int(draw.integers(1, CODES + 1)) if latent and chance(0.3) else None,
        keep_features=chance(0.3),
        codes=codes,
        allowed=allowed,
        barred=barred,
        watched=chance(0.25),
        changes=sorted(draw.choice(20, 3, replace=False).tolist()) if policy not in FIXED and chance(0.35) else [],
        stop_strings=["".join(draw.choice(list("xyz"), draw.integers(1, 6))) for _ in range(draw.integers(1, 3))]
        if chance(0.4)
        else [],
    )
    if latent and chance(0.3):
        codes_summed = int(draw.integers(1, CODES + 1)) if chance(0.7) else None
        case = replace(case, decode="token", mixture_codes=codes_summed, top_k=None, aliases=None)
    return replace(case, shared=policy != "all" and chance(0.4))


def ends_here(row: int, token: int, code: int) -> bool:
    """What the cases' ``watch`` says: a rule that each row can be asked for alone."""
    return (row * 31 + token * 7 + code) % 9 == 0


@contextmanager
def decoded_by(way: str) -> Iterator[None]:
    """The lean blocks, the base's own, or tensors of fixed size, moved to the left often."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "transformers":
            patch.setattr(prefill, "lean_blocks", lambda decoder: None)
        patch.setattr(static_engine, "ROOM", 2)
        patch.setattr(prefill, "SHARED_TOKENS", 1)
        yield


def run(case: Case, subject: Subject, *, slots: int | None = None) -> Generation:
    """The call itself, on ``slots`` rows at once (``None``: the case's own number)."""
    width, rows = max(map(len, case.prompts)), len(case.limits)
    ids = torch.tensor([[17] * (width - len(row)) + row for row in case.prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in case.prompts])
    guide = make_guide(
        case.codes, case.allowed, rows=rows, num_actions=CODES, span=subject.actor.span, barred=case.barred
    )
    asked, version = 0, 0

    def refresh() -> int:
        nonlocal asked, version
        asked += 1
        if asked - 1 in case.changes:  # asked once at the start, then before each step
            version += 1
            subject.use(version)
        return version

    def watch(rows: list[int], tokens: list[int], codes: list[int]) -> list[bool]:
        return [ends_here(*one) for one in zip(rows, tokens, codes, strict=True)]

    subject.use(0)
    with decoded_by(case.way):
        params = SamplingParams(
            max_new_tokens=case.limits,
            temperature=case.temperature,
            top_k=case.top_k,
            batch_size=slots or case.slots,
            stop_token=case.stops,
            repeats=case.repeats,
            row_seeds=case.streams,
            return_features=case.keep_features,
            keep_responses=case.shared,
            aliases=case.aliases,
            decode=case.decode,
            mixture_codes=case.mixture_codes,
            guide=guide,
            watch=stop_watch(TOKENIZER, case.stop_strings, watch if case.watched else None),
        )
        return generate(
            subject.base,
            subject.actor,
            params,
            ids,
            mask,
            refresh=refresh if case.changes else None,
            static=case.way == "static",
            tree=subject.tree if case.shared else None,
        )


@dataclass(kw_only=True)
class Verdict:
    """What was found in the rows of a case."""

    rows: int = 0
    choices: int = 0
    faults: list[str] = field(default_factory=list)
    ties: int = 0
    """Choices that float32 may make either way."""
    gap: float = 0.0
    """Largest difference between a stored log-probability and that of the teacher-forced pass."""


def check(case: Case, subject: Subject, out: Generation) -> Verdict:
    """Every row against a pass over its own tokens alone."""
    verdict = Verdict(rows=len(case.limits))
    for row in range(len(case.limits)):
        _check_row(case, subject, out, row, verdict)
    return verdict


def _check_row(case: Case, subject: Subject, out: Generation, row: int, verdict: Verdict) -> None:
    def fault(place: int, what: str) -> None:
        verdict.faults.append(
            f"case {case.seed} ({case.kind}, {case.policy}, {case.way}), row {row}, place {place}: {what}"
        )

    prompt, length = case.prompts[row // case.repeats], int(out.lengths[row])
    tokens, actions = out.tokens[row].tolist(), out.actions[row].tolist()
    final, states = subject.states([*prompt, *tokens[:length]][:-1])
    start, span = len(prompt) - 1, subject.actor.span
    final, read = None if final is None else final[start:], states
    log_probs = _log_probs(case, subject, read, out.versions[row, :length].tolist(), row, start)
    emitted = subject.actor.emit(final, torch.tensor(actions[:length])).tolist()
    uniforms = uniform_streams([case.streams[row]], length)[0]
    for place in range(length):
        held, action = place % span != 0, actions[place]
        stored = float(out.action_logp[row, place])
        if held:
            if action != actions[place - 1] or stored != 0.0:
                fault(
                    place, f"code {action} with log-probability {stored} inside the span of code {actions[place - 1]}"
                )
        else:
            verdict.choices += 1
            if case.decode == "code":
                expected, near = _drawn(case.temperature, log_probs[place], float(uniforms[place]))
                if action not in near:
                    fault(place, f"action {action}, alone it is {expected}")
                verdict.ties += action != expected
            gap = abs(stored - float(log_probs[place, action]))
            verdict.gap = max(verdict.gap, gap)
            if not gap < TIE:
                fault(place, f"log-probability {stored}, teacher-forced {float(log_probs[place, action])}")
        if case.decode == "token":
            where = (place, float(uniforms[place]))
            verdict.ties += _check_mixture(case, subject, log_probs, final, (tokens, actions), where, fault)
        elif tokens[place] != emitted[place]:
            fault(place, f"token {tokens[place]}, its action emits {emitted[place]}")
        if case.aliases is not None and not held:
            _check_event(case, subject, out, (row, place), log_probs[place], final, fault)
        ends = _ends(case, row, tokens[: place + 1], action)
        if ends != (place == length - 1 and out.finish_reasons[row] == "stop"):
            fault(place, f"ends here: {ends}, but it has {length} tokens and ended by {out.finish_reasons[row]}")
    if out.finish_reasons[row] == "length" and length != case.limits[row]:
        fault(length, f"ended by its limit {case.limits[row]}")
    if any(token != PAD for token in tokens[length:]) or any(action != -1 for action in actions[length:]):
        fault(length, "something follows the end")
    if case.keep_features:
        assert out.features is not None
        found, read = out.features[row], read[len(read) - length if subject.actor.stack is None else 0 :]
        if found.shape != read.shape or not torch.allclose(found.float(), read.float(), rtol=0, atol=1e-3):
            fault(0, "features are not those of the tokens")


def _ends(case: Case, row: int, tokens: list[int], action: int) -> bool:
    """Whether the last of ``tokens`` ends the row: an end token, a stop string's last one, or the watcher's word."""
    text = "".join(PIECES[token] for token in tokens)
    stopped = tokens[-1] in case.stops or any(string in text for string in case.stop_strings)
    return stopped or (case.watched and ends_here(row, tokens[-1], action))


def _log_probs(
    case: Case, subject: Subject, states: torch.Tensor, versions: list[int], row: int, start: int
) -> torch.Tensor:
    """[T, N] at each place, by the version that chose there."""
    by_version = {}
    for version in set(versions):
        if case.changes:
            subject.use(version)
        by_version[version] = subject.logits(states)[start:]
    logits = torch.stack([by_version[version][place] for place, version in enumerate(versions)])
    for place in range(len(logits)):
        forced = case.codes[row][place] if case.codes and place < len(case.codes[row]) else -1
        may = set(case.allowed[row] if case.allowed else range(logits.shape[1])) - set(case.barred.get(place, []))
        may = {forced} if forced != -1 else may
        if case.allowed:
            logits[place, [code for code in range(logits.shape[1]) if code not in may]] = float("-inf")
    return action_log_probs(logits, temperature=case.temperature if case.decode == "code" else 1.0, top_k=case.top_k)


def _check_mixture(
    case: Case,
    subject: Subject,
    log_probs: torch.Tensor,
    final: torch.Tensor | None,
    written: tuple[list[int], list[int]],
    where: tuple[int, float],
    fault: Callable[[int, str], None],
) -> bool:
    """Token and code at a place (with its uniform) against the mixture; whether rounding made the token."""
    (tokens, actions), (place, uniform) = written, where
    choice = mixture_choice(case, subject, log_probs, final, tokens, place, uniform)
    if choice is None:
        return False
    expected, near, codes = choice
    if tokens[place] not in near:
        fault(place, f"token {tokens[place]}, the mixture's is {expected}")
    if place % subject.actor.span == 0 and actions[place] not in codes:
        fault(place, f"code {actions[place]}, responsible are {codes}")
    return tokens[place] != expected


@torch.no_grad()
def mixture_choice(
    case: Case,
    subject: Subject,
    log_probs: torch.Tensor,
    final: torch.Tensor | None,
    tokens: list[int],
    place: int,
    uniform: float,
) -> tuple[int, set[int], set[int]] | None:
    """(the mixture's token, every token that rounding may have made of it, every code that may be the most responsible
    for the token written), in float64 from sum_a pi(a) p(x_1 | a) .. p(x | a) over the span so far; ``None`` where
    rounding decides which codes are summed over."""
    assert subject.model is not None and final is not None
    start, count = place - place % subject.actor.span, log_probs.shape[1]
    order = sorted(range(count), key=lambda code: (-float(log_probs[start, code]), code))
    kept = order[: case.mixture_codes]
    if len(kept) < count:
        last, first_out = (float(log_probs[start, code]) for code in (kept[-1], order[len(kept)]))
        if abs(last - first_out) < TIE:
            return None
    states = final[start : place + 1, None].expand(-1, count, -1)
    world = subject.model.world_logits_from_codes(states, subject.model.codebook).double().log_softmax(-1)  # [s, N, V]
    joint = log_probs[start].double()[:, None] + world[-1]
    for step, token in enumerate(tokens[start:place]):
        joint = joint + world[step, :, token, None]
    mixed = joint[kept].logsumexp(0).log_softmax(0)
    expected, near = _drawn(case.temperature, mixed / (case.temperature or 1.0), uniform)
    shares = joint[kept, tokens[place]].softmax(0)
    return expected, near, {kept[i] for i in (shares > shares.max() - TIE).nonzero().flatten().tolist()}


def _drawn(temperature: float, log_probs: torch.Tensor, uniform: float) -> tuple[int, set[int]]:
    """(the action, every action that rounding may have made of it)"""
    if temperature == 0:
        best = log_probs.max()
        return int(log_probs.argmax()), {int(code) for code in (log_probs > best - TIE).nonzero()}
    cumulative = log_probs.double().exp().cumsum(-1)

    def at(u: float) -> int:
        return min(int((cumulative <= u * cumulative[-1]).sum()), len(cumulative) - 1)

    near = {at(min(max(uniform + shift, 0.0), 1.0 - 1e-12)) for shift in (-1e-5, 0.0, 1e-5)}
    return at(uniform), near


def _check_event(
    case: Case,
    subject: Subject,
    out: Generation,
    where: tuple[int, int],
    log_probs: torch.Tensor,
    final: torch.Tensor | None,
    fault: Callable[[int, str], None],
) -> None:
    """The codes that would have emitted the same token, among the most likely ones."""
    assert out.events is not None and out.event_logp is not None and final is not None and case.aliases is not None
    row, place = where
    action, token = int(out.actions[row, place]), int(out.tokens[row, place])
    order = log_probs[log_probs > -torch.inf].sort(descending=True).values
    if len(order) > 1 and float(order.diff().abs().min()) < TIE:
        return  # which codes are among the most likely ones is up to rounding
    top = log_probs.topk(min(case.aliases, len(order))).indices
    emitted = subject.actor.emit(final[place].expand(len(top), -1), top).tolist()
    among = action in top.tolist()
    event = {action} | (
        {int(code) for code, theirs in zip(top, emitted, strict=True) if theirs == token} if among else set()
    )
    found = set(unpack(out.events[row, place][None], len(log_probs))[0].nonzero().flatten().tolist())
    if found != event:
        fault(place, f"event {found}, alone it is {event}")
    elif abs(float(log_probs[list(event)].logsumexp(0)) - float(out.event_logp[row, place])) > TIE:
        fault(place, f"event log-probability {float(out.event_logp[row, place])}")


class Subjects:
    """Makes each subject once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Subject] = {}

    def __call__(self, case: Case) -> Subject:
        key = (case.kind, case.policy)
        if key not in self._made:
            self._made[key] = make_subject(*key)
        return self._made[key]


def judged(case: Case, subjects: Subjects) -> Verdict:
    """The case run and checked; every tenth also against the same call with one row at a time."""
    subject = subjects(case)
    out = run(case, subject)
    verdict = check(case, subject, out)
    if case.seed % 10 == 0 and not case.changes and not verdict.ties:
        alone = run(case, subject, slots=1)
        differs = (
            (alone.tokens != out.tokens).any(1) | (alone.actions != out.actions).any(1) | (alone.lengths != out.lengths)
        )
        verdict.faults += [
            f"case {case.seed}, row {row}: alone it is another" for row in differs.nonzero().flatten().tolist()
        ]
    return verdict
