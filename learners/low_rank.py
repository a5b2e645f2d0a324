"""Low-rank adapters of a policy's blocks (LoRA; Hu et al., 2021), by PEFT: the learner trains them, everybody else
holds the merged weights."""

from __future__ import annotations

import torch

from latent_control.decoder_stack import DecoderStack

ADAPTER = "default"


def adapt(policy: DecoderStack, rank: int) -> None:
    """Put adapters of ``rank`` on all linear layers of the blocks, in place; only they are trainable. What the policy
    says is unchanged until they are trained.

    Raises:
        ImportError: PEFT is not installed (extra ``lora``).
    """
    from peft import LoraConfig, inject_adapter_in_model

    policy.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    inject_adapter_in_model(config, policy.decoder, adapter_name=ADAPTER)


def merged(policy: DecoderStack) -> dict[str, torch.Tensor]:
    """The blocks' tensors as ``policy`` would have them without adapters, each adapter's product added to its layer."""
    from peft.tuners.lora import Linear

    learned_positions = {id(p) for p in policy.decoder.parameters()} - {id(p) for p in policy.trainable()}
    found = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in policy.decoder.named_parameters(prefix="decoder")
        if ".lora_" not in name and id(tensor) not in learned_positions
    }
    for path, layer in policy.decoder.named_modules(prefix="decoder"):
        if isinstance(layer, Linear):
            found[f"{path}.weight"] = found[f"{path}.weight"] + layer.get_delta_weight(ADAPTER)
    return found
