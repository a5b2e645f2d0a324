"""Every causal LM architecture of the installed transformers, tiny and random: does it run, or is it refused by name?

Each family is built, saved, judged from its files, given latent actions, decoded by the engine (batched, cached, mixed
lengths, left padded), and compared with transformers' own ``generate`` (greedy) and with a full pass over what was
written. ``--docs`` writes the table of docs/base-models.md.
"""

from __future__ import annotations

import inspect
import logging
import re
import signal
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from common import ROOT, arguments, report

import torch  # isort: skip
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from latent_control import LatentActionLM
from latent_control.bases.loading import BASE, examine

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SECONDS = 90
"""Some multimodal wrappers have no tiny size."""
TOLERANCE = 1e-4
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
VOCABULARY, LENGTHS, LIMITS = 64, (12, 8, 3), (9, 2, 3, 9, 1, 8)
PAGE = ROOT / "docs" / "base-models.md"
MARKS = "<!-- families: begin -->", "<!-- families: end -->"

# Sizes by the names that configs give them; windows are shorter than the sequences here.
SIZES: dict[int, str] = {
    64: "vocab_size intermediate_size max_position_embeddings n_positions n_ctx n_inner max_seq_len ffn_dim "
    "decoder_ffn_dim encoder_ffn_dim d_inner dff ffn_hidden_size dim_ff vocab_size_per_layer_input feed_forward_size "
    "dense_intermediate_size prefix_dense_intermediate_size",
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim d_embed dim_model lru_width",
    16: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head mamba_head_dim expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    8: "head_dim q_lora_rank kv_lora_rank v_head_dim qk_head_dim query_pre_attn_scalar mamba_chunk_size chunk_size "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input dim_head index_head_dim attention_window "
    "global_head_dim swa_head_dim swa_v_head_dim",
    5: "sliding_window attention_chunk_size",
    4: "num_hidden_layers num_attention_heads num_experts num_local_experts n_routed_experts qk_rope_head_dim "
    "qk_nope_head_dim state_size mamba_d_state mamba_n_heads mamba_dt_rank time_step_rank linear_num_value_heads "
    "num_heads ssm_state_size mamba_num_heads n_layer n_head n_layers n_heads decoder_layers decoder_attention_heads "
    "encoder_layers encoder_attention_heads rotary_dim num_layers index_topk moe_num_experts",
    2: "num_key_value_heads num_experts_per_tok moe_topk linear_num_key_heads type_vocab_size index_n_heads "
    "eos_token_id "
    "moe_k",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups n_groups num_dense_layers "
    "bos_token_id "
    "decoder_start_token_id",
    0: "num_kv_shared_layers pad_token_id",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"initializer_range": 0.2, "init_std": 0.2}  # larger than trained ones begin with: what matters shows
RECURRENT = ["linear_attention", "full_attention"] * 2
# What these families want besides.
OWN: dict[str, dict[str, Any]] = {
    "axk2": {"head_dim": 8},
    "bailing_hybrid": {"layer_types": RECURRENT},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": RECURRENT},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4},
    "llama4_text": {"moe_layers": [1, 3], "interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "moshi": {"sliding_window": 64, "audio_vocab_size": 16},  # its blocks attend beyond the window that its cache keeps
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 4, "attention_head_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 10, "shape_vocab_size": 10},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


class Family(NamedTuple):
    """``Family(name="gpt2", result="works", why="", gaps={"log-probabilities": 1e-6})``"""

    name: str
    result: str
    """``works``, ``refused``, ``wrong`` (a gap above the tolerance or an error of ours), or ``not tried``."""
    why: str = ""
    gaps: Mapping[str, float] = MappingProxyType({})


def tiny_config(family: str) -> PreTrainedConfig:
    """A config of the smallest size at which every part of the architecture is there."""
    kind = CONFIG_MAPPING[family]
    return kind(**settings(kind, family))


def settings(kind: type[PreTrainedConfig], family: str) -> dict[str, Any]:
    """Small values for the fields that ``kind`` has, sections included."""
    fields = {"pad_token_id", "bos_token_id", "eos_token_id"}
    for parent in kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]:
        fields |= set(vars(parent).get("__annotations__", {})) | set(inspect.signature(parent.__init__).parameters)
    renamed = kind.attribute_map
    fields |= {name for name, target in renamed.items() if target not in SMALL}
    found = {name: size for name, size in SMALL.items() if name in fields and renamed.get(name) not in SMALL}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        found["num_key_value_heads"] = SMALL["num_attention_heads"]  # keys and values are made for each head
    for name in kind.sub_configs:
        part = getattr(kind(), name, None)
        if isinstance(part, PreTrainedConfig):
            found[name] = {"model_type": part.model_type} | settings(type(part), part.model_type)
    return found | OWN.get(family, {})


def tiny_model(family: str) -> PreTrainedModel:
    """The family with random weights, ready to be read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        lm = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32, trust_remote_code=False)
    return lm.eval().requires_grad_(False)


def prompts() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows of different lengths, and the same left padded with their mask."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    ids = torch.stack([torch.nn.functional.pad(row, (max(LENGTHS) - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(max(LENGTHS)) >= max(LENGTHS) - len(row)).long() for row in rows])
    return rows, ids, mask


@torch.no_grad()
def conformance(oracle: PreTrainedModel, model: LatentActionLM) -> dict[str, float]:
    """How far ``model`` on a copy of ``oracle`` is from it: largest gaps, and rows whose tokens differ."""
    gaps = base_gaps(oracle, model)
    rows, ids, mask = prompts()
    first = rows[0][None]
    features = model.features(first)
    start = model.world_logits(features, torch.zeros_like(first)) - oracle(input_ids=first).logits
    assert features.late is not None and features.final is not None
    gaps["world model at the start"] = float(start.abs().max())
    gaps["late stack at the start"] = float((model.policy.hidden(features.late) - features.final).abs().max())
    changed = first.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY
    later = model.features(changed).final
    assert later is not None
    gaps["states that see the future"] = float((later - features.final)[:, :7].abs().max())
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if name.startswith(("merge", "policy.head")):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    out = model.generate(ids, mask, max_new_tokens=list(LIMITS), seed=0, stop_token=-1, repeats=2, batch_size=4)
    for index, limit in enumerate(LIMITS):
        row = rows[index // 2]
        whole, places = torch.cat([row, out.tokens[index, :limit]])[None], slice(len(row) - 1, len(row) - 1 + limit)
        features, codes = model.features(whole), torch.zeros_like(whole)
        codes[0, places] = out.actions[index, :limit]
        logp = model.policy_logits(features).float().log_softmax(-1)[0, places].gather(-1, codes[0, places, None])[:, 0]
        widen(gaps, "log-probabilities of codes", logp - out.action_logp[index, :limit])
        tokens = model.world_logits(features, codes)[0, places].argmax(-1)
        widen(gaps, "rows whose codes' tokens differ", (tokens != out.tokens[index, :limit]).float())
    return gaps


def base_gaps(oracle: PreTrainedModel, model: LatentActionLM) -> dict[str, float]:
    """The base LM's own decoding against transformers'."""
    gaps: dict[str, float] = {}
    rows, ids, mask = prompts()
    greedy = model.generate(
        ids, mask, level="base", max_new_tokens=9, temperature=0.0, stop_token=-1, batch_size=2
    ).tokens
    for row, mine in zip(rows, greedy, strict=True):
        theirs = oracle.generate(
            input_ids=row[None], do_sample=False, max_new_tokens=9, min_new_tokens=9, eos_token_id=-1, pad_token_id=0
        )[0, len(row) :]
        widen(gaps, "greedy rows that differ", (theirs != mine[:9]).float())
    out = model.generate(
        ids, mask, level="base", max_new_tokens=list(LIMITS), seed=0, stop_token=-1, repeats=2, batch_size=4
    )
    for index, limit in enumerate(LIMITS):
        row, new = rows[index // 2], out.tokens[index, :limit]
        logits = oracle(input_ids=torch.cat([row, new])[None], use_cache=False).logits[0, len(row) - 1 : -1]
        logp = logits.float().log_softmax(-1).gather(-1, new[:, None])[:, 0]
        widen(gaps, "log-probabilities of tokens", logp - out.action_logp[index, :limit])
    return gaps


def widen(gaps: dict[str, float], name: str, differences: torch.Tensor) -> None:
    """The larger of what is known and of ``differences``; one that is not a number counts as infinite."""
    gaps[name] = max(gaps.get(name, 0.0), float(differences.abs().nan_to_num(float("inf")).max()))


def tried(family: str, folder: Path) -> Family:
    """Build, save, examine and load ``family``, and compare its decoding."""
    try:
        lm = tiny_model(family)
        lm(input_ids=torch.randint(3, VOCABULARY, (1, 9)))
    except ERRORS as error:  # whatever transformers says of a size it does not want
        return Family(family, "not tried", f"transformers: {type(error).__name__}: {first_line(error)}")
    try:
        lm.save_pretrained(folder)
        said = of_files(folder)
        try:
            model = LatentActionLM.from_base(folder, num_actions=5, seed=1)
        except ValueError as error:
            why = first_line(error).replace(f"{folder}: ", "").replace(f" at '{folder}'", "")
            return Family(family, "refused" if str(error) == said else "wrong", why)
        if said is not None:
            return Family(family, "wrong", f"loads, though its files are said to be: {first_line(ValueError(said))}")
        gaps = conformance(lm, model)
    except ERRORS as error:
        return Family(family, "wrong", f"{type(error).__name__}: {first_line(error)}")
    wide = ", ".join(f"{name} {gap:.2g}" for name, gap in gaps.items() if gap > TOLERANCE)
    return Family(family, "wrong" if wide else "works", wide, gaps)


def of_files(folder: Path) -> str | None:
    """What ``config check`` says of a saved model."""
    try:
        verdict = examine(folder, BASE, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return "; ".join(verdict.problems) or verdict.unjudged


def first_line(error: Exception) -> str:
    """The message on one line, not too long for a table."""
    return " ".join(str(error).split())[:300]


def try_all(names: tuple[str, ...]) -> list[Family]:
    """Every family in turn, each within ``SECONDS``."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()

    def late(*_: object) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    found = []
    for name in names:
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            found.append(tried(name, Path(folder)))
        signal.alarm(0)
        print(f"{name}: {found[-1].result} {found[-1].why}", flush=True)
    return found


def page(found: list[Family]) -> str:
    """The table for the docs: families by result and reason."""
    works = [family.name for family in found if family.result == "works"]
    lines = [f"Run ({len(works)}): {', '.join(works)}.", ""]
    reasons: dict[str, list[str]] = {}
    for family in found:
        if family.result != "works":
            why = family.why.partition(" is not supported: ")[2].partition("; take a decoder-only")[0] or family.why
            why = re.sub(r"\w+ has no list of \d+", "it has no list of", why).replace("|", "/")
            reasons.setdefault(f"{family.result}: {why}" if family.result != "refused" else why, []).append(family.name)
    table = [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]
    return "\n".join([*lines, "| do not run | reason |", "|---|---|", *table])


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/base-models.md")
    parser.add_argument("families", nargs="*", help="names of config.json's model_type (default: all)")
    options = parser.parse_args()
    few = ("llama", "gpt2", "deepseek_v3", "mamba", "bart")
    found = try_all(tuple(options.families) or (few if options.quick else FAMILIES))
    if options.docs:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n{page(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    rows = [
        {"result": kind, "families": sum(f.result == kind for f in found)}
        for kind in dict.fromkeys(f.result for f in found)
    ]
    raw = [family._asdict() | {"gaps": dict(family.gaps)} for family in found]
    report("base_families", rows, {"families": raw}, options.out)


if __name__ == "__main__":
    main()
