"""LoRA adapters as PEFT loads them unaided: of a plan, where what it changes has low rank, and of any corrections.

Notation: W (out, in) becomes W + D; D = B A with A (r, in) and B (out, r), which PEFT calls lora_A and lora_B.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.checkpoint import check_empty, new_folder, write_manifest
from eckart.errors import ModelError, PlanError
from eckart.plan import Plan, write_plan
from eckart.surgery import applied, check_plan

NEGLIGIBLE = 1e-6
"""Singular values of D below this share of the largest of W are rounding."""


@dataclass(frozen=True)
class Adapter:
    """What `export_adapter` wrote."""

    folder: Path
    ranks: dict[str, int]
    """Module's path -> rank of D."""
    numbers: int
    """That the adapter holds."""
    dense_numbers: int
    """That the weights it changes hold."""
    difference: float
    """Largest Frobenius norm of D - B A over that of W."""

    @property
    def pointless(self) -> bool:
        """Whether the changed weights themselves would take no more."""
        return self.numbers >= self.dense_numbers


def export_adapter(model: nn.Module, plan: Plan, folder: str | Path, *, force: bool = False) -> Adapter:
    """Write a plan as a PEFT LoRA adapter.

    A cut that keeps few components changes a weight by nearly all of its rank: then the adapter is larger than the
    weight, which `pointless` tells. It pays where little is removed.

    Args:
        model: The unedited model, in float32 (lower precision would make every change full-rank). Not modified, but
            for a moment.
        plan: Made for it.
        folder: Must not exist, or be empty. It appears whole or not at all; `PeftModel.from_pretrained(model, folder)`
            loads it.
        force: Accept other weights than the plan was made for.

    Returns:
        What was written.

    Raises:
        PlanError: The plan does not fit or changes nothing.
        ModelError: An edited weight is not that of a linear layer; peft is not installed.
    """
    check_peft()
    target = Path(folder)
    check_empty(target)
    before = {path: module.weight.detach().clone() for path, module in _modules(model, plan, force).items()}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    difference, transposed = 0.0, False
    with applied(model, plan, force=force):
        for path, weight in before.items():
            module: Any = model.get_submodule(path)
            transposed = isinstance(module, Conv1D)
            delta = module.weight.detach().double() - weight.double()
            weight = weight.double()
            if transposed:
                delta, weight = delta.T, weight.T
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            least = NEGLIGIBLE * float(torch.linalg.matrix_norm(weight, 2))
            rank = int(S.gt(least).sum())
            if rank:
                root = S[:rank].sqrt()
                pairs[path] = U[:, :rank] * root, root[:, None] * Vh[:rank]
            difference = max(difference, float(S[rank:].norm() / weight.norm()))
    if not pairs:
        raise PlanError("The plan changes no weight. An adapter holds changes. There is nothing to write.")
    with new_folder(target) as temporary:
        write_adapter(temporary, pairs, base=plan.model.source, transposed=transposed)
        write_plan(temporary / "plan.json", plan)
        write_manifest(temporary)
    ranks = {path: down.shape[0] for path, (_, down) in pairs.items()}
    dense = sum(before[path].numel() for path in ranks)
    return Adapter(target, ranks, numbers_of(pairs), dense, difference)


def numbers_of(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """Count the numbers of an adapter."""
    return sum(up.numel() + down.numel() for up, down in pairs.values())


def check_peft() -> None:
    """Refuse where peft is missing, before anything is computed.

    Raises:
        ModelError: It is.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError(
            "peft is not installed. An adapter is written for it. Install it: pip install 'eckart[recover]'."
        ) from None


def write_adapter(
    folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], *, base: str, transposed: bool = False
) -> None:
    """Write products of two factors as a PEFT LoRA adapter that adds them to weights.

    Args:
        folder: Exists; gets `adapter_config.json` and `adapter_model.safetensors`.
        pairs: Module's path -> (B, A), shapes (out, r) and (r, in). Not modified; written in float32.
        base: The model that they are added to, as the adapter names it.
        transposed: The layers store weights as (in, out).
    """
    from peft import LoraConfig

    ranks = {path: down.shape[0] for path, (_, down) in pairs.items()}
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern={path: each for path, each in ranks.items() if each != rank},
        alpha_pattern={path: each for path, each in ranks.items() if each != rank},
        fan_in_fan_out=transposed,
        inference_mode=True,
        base_model_name_or_path=base,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for path, (up, down) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = down.float().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def put_on_(model: nn.Module, folder: str | Path) -> Any:
    """Put a LoRA adapter on a model, beside its weights.

    Args:
        model: Modified: the layers that it adapts are replaced by PEFT's.
        folder: That PEFT wrote, or eckart.

    Returns:
        The `PeftModel` around the model.

    Raises:
        ModelError: The folder holds no LoRA adapter, or not one for this model; peft is not installed.
    """
    check_peft()
    import peft

    named: Any = model
    try:
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            raise ValueError("it has no adapter_model.safetensors.")  # PEFT would open a pickle, or ask the hub
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transposed weights, which PEFT sees to itself
            found = peft.PeftModel.from_pretrained(named, str(folder), is_trainable=False)
        if not isinstance(found.peft_config["default"], peft.LoraConfig):
            raise ValueError(f"it is of type {found.peft_config['default'].peft_type}")
    except Exception as error:  # whatever peft, safetensors and the hub's client raise
        raise ModelError(
            f"{folder} cannot be put on {type(model).__name__}: {str(error).splitlines()[0]} An adapter is a folder "
            "with adapter_config.json and safetensors, of LoRA, made for this model. Give --adapter such a folder."
        ) from error
    return found.eval()


def _modules(model: nn.Module, plan: Plan, force: bool) -> dict[str, Any]:
    """The linear layers that a plan edits."""
    found: dict[str, Any] = {}
    for matrix, _ in check_plan(model, plan, force=force):
        path, _, name = matrix.parameter.rpartition(".")
        module = model.get_submodule(path)
        if name != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
            raise ModelError(
                f"{matrix.name} is held by {type(module).__name__}. PEFT adapts linear layers. "
                "Leave it out of the plan, or use eckart apply."
            )
        found[path] = module
    if any(isinstance(m, Conv1D) for m in found.values()) and any(isinstance(m, nn.Linear) for m in found.values()):
        raise ModelError(
            "The plan edits layers that store weights as (in, out) and others that store (out, in). One adapter has "
            "one order. Divide the plan into two."
        )
    return found
