"""Settings: one model for each verb, the same for the command line, the YAML recipe and Python."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from eckart.encoding import BATCH_TOKENS
from eckart.errors import RecipeError
from eckart.matrices import expand_types
from eckart.noise import FITS, RANK_RULES
from eckart.plan import STRUCTURES
from eckart.truncation import rank_of

GUIDED_EXAMPLES = 100
AGREEMENT_POSITIONS = 32
"""Tokens of a window at which predictions are compared."""
RHO = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)

Method = Literal["svd", "fwsvd", "asvd", "whiten", "double", "propagated", "monarch", "lowrank+sparse"]
AT_ONCE = ("svd", "fwsvd", "asvd", "whiten", "double")
"""Methods by which the cut of a matrix does not depend on the others', so that one decomposition serves every rank."""
Allocate = Literal[
    "auto",
    "uniform",
    "tail",
    "measured",
    "sensitivity",
    "groups",
    "signed",
    "mp",
    "tw",
    "gavish-donoho",
    "bema",
    "energy",
    "effective-rank",
]
BY_COST = ("auto", "uniform", "tail", "measured", "sensitivity", "groups")
"""Allocations that ask of a choice what it costs and errs, not which rank it is."""


class Settings(BaseModel):
    """What every verb that scores a task can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of every random choice")
    normalize: Literal["none", "tokens"] = Field(
        default="none", description="compare choices by summed or mean log-likelihood"
    )
    batch_tokens: int = Field(default=BATCH_TOKENS, ge=1, description="most tokens in a batch, padding included")
    overlong: Literal["error", "truncate"] = Field(default="error", description="prompts longer than the context")
    window: int | None = Field(
        default=None, ge=2, description="tokens of a perplexity window; default the context, at most 1024"
    )
    stride: int | None = Field(default=None, ge=1, description="tokens by which windows advance; default half a window")

    @property
    def encoding(self) -> dict[str, Any]:
        """The options of `eckart.encoding.encode`."""
        return {name: getattr(self, name) for name in ("batch_tokens", "overlong", "window", "stride")}


class SearchSettings(Settings):
    """What a search can be told."""

    strategy: Literal["exhaustive", "race", "guided", "laserrmt"] = Field(
        default="race",
        description="measure every edit, stop those that cannot win, measure only the best predicted ones, or try the "
        "noisiest one after the other and keep what helps",
    )
    objective: Literal["task", "perplexity", "agreement"] = Field(
        default="task",
        description="answers of a task; or of text without labels, its perplexity, or agreement with the unedited "
        "model: the smallest model that diverges by no more than `tolerance`",
    )
    tolerance: float = Field(
        default=0.01, gt=0, description="largest mean divergence from the unedited model for 'agreement', in nats/token"
    )
    select: Literal["accuracy", "loss"] = Field(default="accuracy", description="what the best edit is best at")
    shortlist: int = Field(
        default=16,
        ge=1,
        description="edits that 'guided' and 'laserrmt' measure, 'race' measures first and 'compose' combines",
    )
    confidence: float | None = Field(
        default=None, gt=0.5, lt=1, description="let 'race' and 'guided' stop edits by a sequential test, too"
    )
    compose: int = Field(default=1, ge=1, le=64, description="most edits that are made together")
    beam: int = Field(default=1, ge=1, description="sets of edits that 'compose' pursues; 1 is greedy")
    cache_bytes: int | None = Field(
        default=None, ge=0, description="most that the prefix cache of a worker holds; more is computed again"
    )
    guard: Literal["fisher", "none"] = Field(
        default="fisher", description="second order of the prediction: a Fisher term, or none"
    )
    types: tuple[str, ...] = Field(default=("all",), min_length=1, description="types of matrix, or attn, mlp, all")
    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="block indices; negative from the last"
    )
    rho: tuple[float, ...] = Field(default=RHO, min_length=1, description="kept fractions of the largest rank")
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,), min_length=1, description="numbers of blocks of rows, each cut by itself"
    )
    clustering: Literal["contiguous", "heads", "subspaces"] = Field(
        default="contiguous", description="which rows form a block; 'heads' makes one of every attention head"
    )
    rank_rule: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="rules that choose the rank from each spectrum, instead of 'rho'"
    )
    kind: Literal["low_rank", "zero", "magnitude", "shrink"] = Field(
        default="low_rank", description="what replaces a matrix; 'shrink' needs a rank rule that fits noise"
    )
    basis: Literal["top", "bottom", "random"] = Field(default="top", description="singular components that stay")
    svd: Literal["exact", "lowrank"] = Field(default="exact", description="'lowrank' mimics the LASER reference")
    niter: int = Field(default=2, ge=0, le=100, description="subspace iterations of svd 'lowrank'")
    split: float = Field(default=0.2, gt=0, lt=1, description="share of the examples that choose")
    shuffle: bool = Field(default=True, description="shuffle the examples before dividing them")
    examples: int | None = Field(default=None, ge=1, description="at most this many examples choose")
    controls: bool = Field(
        default=False, description="also measure few-shot prompts, LoRA and int8 on the test examples"
    )
    shots: int = Field(default=5, ge=1, description="most worked examples in a prompt of the few-shot control")

    @property
    def choosing(self) -> int | None:
        """At most this many examples choose; None for the share `split` alone."""
        return self.examples or (GUIDED_EXAMPLES if self.strategy == "guided" else None)

    @property
    def encoding(self) -> dict[str, Any]:
        """The options of `eckart.encoding.encode`."""
        # Predictions over a whole vocabulary are kept for every scored token.
        return super().encoding | ({"positions": AGREEMENT_POSITIONS} if self.objective == "agreement" else {})

    @property
    def best_at(self) -> Literal["accuracy", "loss", "size"]:
        """What the best edit is best at, whatever the objective."""
        return "size" if self.objective == "agreement" else self.select

    @property
    def predictable(self) -> bool:
        """Whether a gradient predicts the edits: exact cuts to the top components, and zero."""
        return self.kind != "magnitude" and self.basis == "top" and self.svd == "exact"

    @model_validator(mode="after")
    def _guided_can_predict(self) -> SearchSettings:
        if self.strategy == "guided" and not self.predictable:
            raise ValueError("strategy 'guided' predicts exact cuts to the top components, and zero")
        return self

    @model_validator(mode="after")
    def _blocks_can_be_cut(self) -> SearchSettings:
        several = self.clustering == "heads" or max(self.blocks) > 1
        if several and (self.kind != "low_rank" or self.basis != "top" or self.svd != "exact"):
            raise ValueError(
                "blocks of rows are cut exactly to their top components; another kind takes whole matrices"
            )
        if self.clustering == "heads" and self.blocks != (1,):
            raise ValueError("clustering 'heads' makes one block of every attention head; leave 'blocks' out")
        if self.clustering == "subspaces" and not several:
            raise ValueError("clustering 'subspaces' needs 'blocks' above 1")
        return self

    @model_validator(mode="after")
    def _agreement_can_be_judged(self) -> SearchSettings:
        if self.objective == "agreement" and (self.confidence is not None or self.guard == "none" or self.controls):
            raise ValueError(
                "objective 'agreement' has no sequential test and no controls, and only the second order predicts it"
            )
        return self

    @model_validator(mode="after")
    def _noise_has_an_order(self) -> SearchSettings:
        if self.strategy == "laserrmt":
            if self.compose > 1 or self.confidence is not None:
                raise ValueError(
                    "strategy 'laserrmt' adds edits by itself, without a test; leave compose and confidence"
                )
            if self.kind not in ("low_rank", "shrink") or self.blocks != (1,) or self.clustering != "contiguous":
                raise ValueError("strategy 'laserrmt' orders low-rank edits of whole matrices by their noise")
        return self

    @model_validator(mode="after")
    def _rules_can_choose(self) -> SearchSettings:
        if self.kind == "shrink" and self.rank_rule is None:
            raise ValueError(f"kind 'shrink' needs 'rank_rule': one of {', '.join(FITS)}")
        if self.rank_rule is None:
            return self
        allowed = FITS if self.kind == "shrink" else RANK_RULES
        unknown = [rule for rule in self.rank_rule if rule not in allowed]
        if unknown:
            raise ValueError(
                f"there is no rank rule {unknown[0]!r} for kind '{self.kind}'; rules are {', '.join(allowed)}"
            )
        if self.kind not in ("low_rank", "shrink") or self.svd != "exact":
            raise ValueError("a rank rule goes with kind 'low_rank' or 'shrink' and svd 'exact'")
        if self.kind == "shrink" and self.basis != "top":
            raise ValueError("kind 'shrink' has no basis but 'top'")
        if self.blocks != (1,) or self.clustering != "contiguous":
            raise ValueError("a rank rule looks at whole matrices; leave 'blocks' and 'clustering' out")
        return self

    @field_validator("types")
    @classmethod
    def _known_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        expand_types(types)
        return types

    @field_validator("rho")
    @classmethod
    def _rho_in_range(cls, rho: tuple[float, ...]) -> tuple[float, ...]:
        for value in rho:
            rank_of(value, (1, 1))
        return rho

    @field_validator("svd")
    @classmethod
    def _svd_has_basis(cls, svd: str, info: ValidationInfo) -> str:
        if svd == "lowrank" and info.data.get("basis") != "top":
            raise ValueError("it has no basis but 'top'")
        return svd


class InspectSettings(Settings):
    """What an inspection can be told."""

    types: tuple[str, ...] = Field(default=("all",), min_length=1, description="types of matrix, or attn, mlp, all")
    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="block indices; negative from the last"
    )
    fast: bool = Field(default=False, description="singular values for edges and ranks alone, several times as fast")
    top: float = Field(default=0.25, gt=0, le=1, description="share of each type in unfrozen_parameters.yaml")
    rho: float = Field(default=0.1, gt=0, le=1, description="depth of the cut whose loss is measured on data")
    tokens: int = Field(default=8192, ge=1, description="most tokens that are read to measure importance")

    @field_validator("types")
    @classmethod
    def _known_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        expand_types(types)
        return types


class CompressSettings(Settings):
    """What a compression can be told."""

    ratio: float | None = Field(default=None, gt=0, lt=1, description="kept fraction of the numbers of the matrices")
    bytes: int | None = Field(default=None, ge=1, description="of the whole model, in place of a ratio")
    latency: float | None = Field(
        default=None, gt=0, lt=1, description="kept fraction of the seconds that the matrices take for one token"
    )
    method: Method = Field(
        default="propagated", description="metric in which every matrix is cut, or another structure"
    )
    allocate: Allocate = Field(default="auto", description="how the budget is divided among matrices")
    storage: Literal["pivoted", "factored"] = Field(default="pivoted", description="how a cut matrix is stored")
    windows: int = Field(default=64, ge=1, description="windows of the calibration text that are read")
    measured: int = Field(default=8, ge=1, description="of these, windows on which divergence is measured")
    types: tuple[str, ...] = Field(default=("all",), min_length=1, description="types of matrix, or attn, mlp, all")
    floor: float = Field(default=0.3, ge=0, le=1, description="share of its uniform budget that every matrix gets")
    multiple: int = Field(default=1, ge=1, description="ranks are multiples of it")
    neurons: bool = Field(
        default=True, description="also remove neurons of MLPs and dimensions of heads, where that loses less"
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="power of the mean |x| in method 'asvd'")
    input_shrinkage: float = Field(default=0.1, ge=0, le=1, description="share of the identity in the inputs' metric")
    output_shrinkage: float = Field(default=0.3, ge=0, le=1, description="the same for the outputs' metric")
    propagation: float = Field(
        default=1.0, ge=0, le=1, description="aim of 'propagated': 0 outputs at the inputs it gets, 1 original outputs"
    )

    compensation: float = Field(
        default=1.0, ge=0, le=1, description="share of what a block's output lacks that its last weight makes up for"
    )
    sparse: float = Field(
        default=0.1, gt=0, lt=1, description="share of the numbers that are single entries in method 'lowrank+sparse'"
    )
    task_weight: float = Field(
        default=0.5, ge=0, le=1, description="share of the task in the metrics, where a task is given"
    )
    elastic: bool = Field(
        default=False, description="write one folder from which every ratio up to this one can be loaded"
    )

    @model_validator(mode="after")
    def _elastic_serves_every_ratio(self) -> CompressSettings:
        if self.elastic and self.method not in (*AT_ONCE, "propagated"):
            raise ValueError(
                f"elastic goes with method {', '.join(AT_ONCE)} or propagated, whose components are nested"
            )
        if self.elastic and self.ratio is None:
            raise ValueError("elastic goes with ratio, the largest that can be loaded; bytes are named at loading")
        if self.elastic and self.allocate not in ("auto", "uniform", "tail", "measured"):
            raise ValueError("elastic goes with allocate auto, uniform, tail or measured, which loading can repeat")
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> CompressSettings:
        if sum(budget is not None for budget in (self.ratio, self.bytes, self.latency)) != 1:
            raise ValueError("give one of ratio, bytes and latency")
        return self

    @model_validator(mode="after")
    def _components_exist(self) -> CompressSettings:
        if self.method in STRUCTURES and self.allocate == "signed":
            raise ValueError(
                f"allocation 'signed' scores singular components, which method '{self.method}' has none of"
            )
        return self

    @property
    def unit(self) -> Literal["numbers", "bytes", "seconds"]:
        """What the budget is in."""
        return "bytes" if self.bytes is not None else "seconds" if self.latency is not None else "numbers"

    @property
    def removes_neurons(self) -> bool:
        """Whether MLPs may lose neurons and heads dimensions: where the metric is full and the allocation asks for no
        single ranks."""
        full = self.method in ("whiten", "double", "propagated")
        return self.neurons and full and not self.elastic and self.unit != "seconds" and self.allocate in BY_COST

    @field_validator("types")
    @classmethod
    def _known_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        expand_types(types)
        return types


class RecoverSettings(BaseModel):
    """What a recovery can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["factors", "lora", "repair"] = Field(
        default="factors",
        description="train both factors, or LoRA on each; or round a dense model and correct it in closed form",
    )
    loss: Literal["lm", "kl", "both"] = Field(
        default="both", description="the next token, divergence from the teacher, or their sum"
    )
    lm_weight: float = Field(default=0.2, ge=0, description="weight of the text's next token in loss 'both'")
    init: Literal["zero", "residual", "output-residual"] = Field(
        default="zero",
        description="start from the model as it is, or with its last components replaced by the best correction of "
        "the others towards the teacher's weights, in the metric of weights or of outputs",
    )
    sampled: int = Field(default=0, ge=0, description="windows that the teacher writes, to train on beside the text's")
    rank: int = Field(default=8, ge=1, description="components that 'init' replaces, and rank of 'lora' and 'repair'")
    bits: Literal[8, 4, 2] = Field(default=4, description="of the weights that 'repair' rounds")
    rounds: int = Field(default=4, ge=1, description="roundings and corrections in turn, of 'repair'")
    adapter: bool = Field(default=False, description="leave LoRA beside the model as a PEFT adapter, not merged")
    refine: int = Field(default=0, ge=0, description="passes in which each block first learns the dense block's output")
    refine_lr: float = Field(default=1e-3, gt=0, description="learning rate of 'refine'")
    steps: int = Field(default=600, ge=0, description="steps of the optimizer; 0 only initialises and refines")
    minutes: float | None = Field(default=None, gt=0, description="as many steps as fit, instead of 'steps'")
    lr: float = Field(default=1e-3, gt=0, description="largest learning rate; models of billions want 1e-5 to 1e-4")
    schedule: Literal["cosine", "linear"] = Field(default="cosine", description="how the learning rate falls")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which it rises")
    clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")
    batch: int = Field(default=8, ge=1, description="windows of a step")
    window: int = Field(default=256, ge=2, description="tokens of a window")
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="share of the text that chooses, and that proves")
    evaluations: int = Field(default=10, ge=1, description="looks at the held-out text")
    patience: int | None = Field(default=5, ge=1, description="looks without a better state before it stops")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of products; factors are float32")
    gradient_checkpointing: bool = Field(default=False, description="compute activations twice, to save memory")
    cache_bytes: int = Field(default=2**30, ge=0, description="most that the teacher's predictions may take on disk")
    teacher_top: int | None = Field(default=64, ge=1, description="likeliest tokens that are kept there; None for all")
    batch_tokens: int = Field(default=BATCH_TOKENS, ge=1, description="most tokens that are read at once")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of every random choice")

    @model_validator(mode="after")
    def _options_fit(self) -> RecoverSettings:
        if self.adapter and self.method != "lora":
            raise ValueError("'adapter' goes with method 'lora'; factors are trained themselves")
        return self


SECTIONS: dict[str, type[BaseModel]] = {
    "search": SearchSettings,
    "compress": CompressSettings,
    "recover": RecoverSettings,
}
"""Verb -> its settings, where one recipe holds those of several."""

S = TypeVar("S", bound=BaseModel)


def make_settings(kind: type[S], given: dict[str, Any], recipe: Path | None = None) -> S:
    """Merge a recipe file with settings given by hand, which win, and check them.

    Args:
        kind: The settings' class.
        given: Settings given by hand; None counts as not given.
        recipe: A YAML file with the same names, or with a section of them for each verb (`compress:`, `recover:`), of
            which only that of `kind` is read.

    Returns:
        Complete settings.

    Raises:
        RecipeError: An unknown name or a value out of range.
    """
    found: dict[str, Any] = {}
    if recipe is not None:
        try:
            found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        except Exception as error:  # PyYAML lets ValueError, IndexError, RecursionError and others through
            problem = " ".join(str(error).split())
            raise RecipeError(f"{recipe} cannot be read: {problem}. A recipe is a YAML file. Check it.") from None
        found = {} if found is None else found
        if not isinstance(found, dict):
            raise RecipeError(f"{recipe} is not a list of settings. A recipe has 'name: value' lines. Correct it.")
        if found and set(map(str, found)) <= set(SECTIONS):
            verb = next((verb for verb, settings in SECTIONS.items() if settings is kind), None)
            if verb not in found or not isinstance(found[verb], dict):
                raise RecipeError(
                    f"{recipe} has sections {', '.join(map(str, found))}, and no settings for {verb or 'this verb'}. "
                    "A section is the name of a verb with its settings below. Add one, or give another recipe."
                )
            found = found[verb]
    merged = found | {name: value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "recipe"
        problem = first["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"{name} = {reprlib.repr(first['input'])[:100]}: {problem}. "
            f"Settings are {', '.join(sorted(kind.model_fields))}. Correct it in the recipe or on the command line."
        ) from None


def write_recipe(settings: BaseModel) -> str:
    """Write settings as a YAML recipe that makes the same settings again.

    Args:
        settings: Any settings.

    Returns:
        YAML text.
    """
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
