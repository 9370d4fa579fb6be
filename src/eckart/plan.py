"""Plans: which matrices of one model are replaced, and by what. JSON in, JSON out, no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eckart.errors import PlanError
from eckart.results import SCHEMA_VERSION, read_json, to_json, write_text

STRUCTURES = ("monarch", "lowrank+sparse")
"""Kinds of edit that are no cut to a low rank, and are made by `eckart compress` alone."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Edit(_Frozen):
    """One matrix and what replaces it."""

    matrix: str = Field(description="the matrix's name")
    layer: int | None = Field(description="index of its block from 0")
    type: str = Field(description="LASER's word for its place")
    shape: tuple[int, int] = Field(description="(out, in)")
    kind: Literal["low_rank", "zero", "magnitude", "shrink", "monarch", "lowrank+sparse"] = "low_rank"
    rho: float = Field(
        default=1.0, ge=0, le=1, description="kept fraction of the largest rank (of the entries: magnitude)"
    )
    rank: int = Field(ge=0, description="components kept in each block; for magnitude the full rank, for zero 0")
    weighting: Literal["none", "fwsvd", "asvd", "whiten", "double", "propagated"] = Field(
        default="none", description="metric of the cut; all but 'none' need the factors that were made with it"
    )
    basis: Literal["top", "bottom", "random"] = "top"
    blocks: int = Field(default=1, ge=1, description="parts of the rows, each cut by itself")
    clustering: Literal["contiguous", "heads", "subspaces"] = Field(
        default="contiguous", description="which rows form a block"
    )
    svd: Literal["exact", "lowrank"] = Field(default="exact", description="'lowrank' mimics the LASER reference")
    niter: int = Field(default=2, ge=0, le=100, description="subspace iterations of svd 'lowrank'")
    rank_rule: str | None = Field(default=None, description="the rule that chose the rank; null where rho did")
    noise: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="standard deviation of a noise entry, for kind 'shrink'"
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of every random choice in it")
    stack: str = Field(default="", description="path of the list of blocks the matrix lies in")

    @property
    def full_rank(self) -> int:
        """The rank that keeps everything: `min(rows, in)` of the largest of even blocks."""
        return min(-(-self.shape[0] // self.blocks), self.shape[1])

    @model_validator(mode="after")
    def _rank_fits(self) -> Edit:
        if min(self.shape) < 1:
            raise ValueError(f"{self.matrix}: shape {self.shape} is empty")
        if self.blocks > self.shape[0]:
            raise ValueError(f"{self.matrix}: {self.blocks} blocks do not fit {self.shape[0]} rows")
        if (self.kind == "zero") != (self.rank == 0) or self.rank > self.full_rank:
            of = f"shape {self.shape}" if self.blocks == 1 else f"{self.blocks} blocks of shape {self.shape}"
            raise ValueError(f"{self.matrix}: rank {self.rank} does not fit {of} and kind '{self.kind}'")
        if self.kind != "zero" and self.rho == 0:
            raise ValueError(f"{self.matrix}: rho 0 goes with kind 'zero' only")
        if self.svd == "lowrank" and self.basis != "top":
            raise ValueError(f"{self.matrix}: svd 'lowrank' has no basis but 'top'")
        if (self.kind == "shrink") != (self.noise is not None):
            raise ValueError(
                f"{self.matrix}: kind 'shrink' has the noise that it shrinks by, and no other kind has one"
            )
        if self.kind == "shrink" and (self.basis != "top" or self.svd != "exact"):
            raise ValueError(f"{self.matrix}: kind 'shrink' goes with basis 'top' and svd 'exact' only")
        return self

    @model_validator(mode="after")
    def _weighting_fits(self) -> Edit:
        made = self.kind in STRUCTURES
        plain = self.basis == "top" and self.svd == "exact" and self.blocks == 1
        if (self.weighting != "none" or made) and not (plain and (made or self.kind == "low_rank")):
            raise ValueError(
                f"{self.matrix}: a weighting goes with kinds low_rank, {', '.join(STRUCTURES)}, and the latter and it "
                "with basis 'top', svd 'exact', one block"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> Edit:
        plain = self.kind == "low_rank" and self.basis == "top" and self.svd == "exact"
        if self.blocks > 1 and not plain:
            raise ValueError(f"{self.matrix}: several blocks go with kind 'low_rank', basis 'top', svd 'exact' only")
        if self.blocks == 1 and self.clustering != "contiguous":
            raise ValueError(f"{self.matrix}: one block holds all rows, so its clustering is 'contiguous'")
        if self.clustering == "heads" and self.shape[0] % self.blocks:
            raise ValueError(f"{self.matrix}: {self.shape[0]} rows are not {self.blocks} equal heads")
        return self


class PlannedModel(_Frozen):
    """The model that a plan was made for."""

    source: str
    architecture: str
    weights_sha256: str


class MadeBy(_Frozen):
    """What made a plan."""

    eckart: str
    recipe: dict[str, Any] = {}


class Plan(_Frozen):
    """Edits for one model."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: PlannedModel
    edits: tuple[Edit, ...]
    made_by: MadeBy

    @model_validator(mode="after")
    def _one_edit_a_matrix(self) -> Plan:
        names = [edit.matrix for edit in self.edits]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is edited twice")
        return self


def read_plan(path: str | Path) -> Plan:
    """Read a plan from its JSON file.

    Args:
        path: The file, or a run's folder that holds `plan.json`.

    Returns:
        The plan, checked by itself; `eckart.surgery.check_plan` checks it against a model.

    Raises:
        PlanError: The file is missing or is not a plan.
    """
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    if not path.is_file():
        raise PlanError(f"{path} does not exist. A plan is a JSON file written by eckart search. Check the path.")
    try:
        plan = Plan.model_validate(read_json(path))
        to_json(plan.model_dump()).encode()
        return plan
    except UnicodeEncodeError:
        raise PlanError(
            f"{path} holds half of a surrogate pair. Text is Unicode. Correct the escape or make the plan again."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{path} is not a plan of schema version {SCHEMA_VERSION}: {where}: {first['msg']}. "
            "Fields are listed in docs/files.md. Correct it or make it again."
        ) from None


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as JSON, whole or not at all.

    Args:
        path: The file; its folder must exist.
        plan: The plan.

    Raises:
        OutputError: It cannot be written.
    """
    write_text(path, to_json(plan.model_dump(mode="json")))
