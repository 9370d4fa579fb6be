"""The three steps of a compression.

Read the text and decompose every matrix in its metric; divide the budget among the matrices; cut them block by block,
each for the inputs that the cut blocks before it really give. What is finished is spilled, so that a killed compression
goes on where it was.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart import allocate, neurons
from eckart.allocate import Choice, Curve
from eckart.calibration import STATISTICS_BYTES, Moments, collect, loss_gradients, mixed, moments_bytes, readings
from eckart.dataflow import example_inputs, execution_order
from eckart.elastic import ElasticConfig, size_at
from eckart.elastic_folder import describe, make_elastic_, ratios_of, trimmed, with_allocation
from eckart.embedding import UNIT, Pooling, divergence, embed
from eckart.encoding import Encoded, arrange
from eckart.factoring import Factors, Structure
from eckart.heads import turned
from eckart.mapping import has_memory
from eckart.matrices import Matrix, find_blocks, output_embeddings, part_of, read, write
from eckart.noise import rank_by
from eckart.plan import STRUCTURES
from eckart.prefix import PrefixCache
from eckart.propagation import Inputs, Streams, blended
from eckart.recipe import AT_ONCE, CompressSettings
from eckart.results import Measurement, mean
from eckart.scoring import PREDICTIONS, log_probabilities, score_block
from eckart.spill import Spill
from eckart.structures import errors_of, make, prepare, structure_of
from eckart.truncation import Spectrum
from eckart.units import Unit, costs_of, joint_cost, of_parts, replaced, restored, seconds_of
from eckart.weighting import Root, WeightedSpectrum, as_spectrum, decompose_weighted, diagonal_root, shrunk, square_root

Report = Callable[["Progress"], None]
AUTO = ("uniform", "tail", "measured")
"""Allocations that are compared unless one is asked for."""
MEASURED_AT = (1.0, 0.5)
"""Shares of the budget at which `measured` cuts each matrix alone."""
PROGRAM_BYTES = 350_000_000
"""What Python, PyTorch and transformers take by themselves."""
SENSITIVITY_SHARES = (0.9, 0.7, 0.5, 0.3)
ROUNDS = 2
"""Rounds, at most, in which `auto` moves budget between matrices by what the cut model shows."""
MOVED = 0.25
"""Share of its cost by which a round changes a unit at most."""
PROBED = (0.87, 1.15)
"""Shares of its cost at which a round measures each unit."""


@dataclass(frozen=True)
class Progress:
    """How far a compression is."""

    stage: str
    done: int
    total: int


class Steps:
    """The steps of a compression. Several budgets can be tried with one reading of the text.

    `units` are those given; once `curves` ran, with the cuts of MLPs, which edits are made from.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: CompressSettings,
        windows: Encoded,
        units: Sequence[Unit],
        work: Spill,
        tell: Report,
        stored: torch.dtype | None = None,
        task: Encoded | None = None,
        pooling: Pooling | None = None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.units, self.work, self.tell = list(units), work, tell
        self.dtype = stored or next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        self.windows = self._here(windows)
        self.task = task
        self.pooling = pooling
        # Of sentences, as many as in so many windows.
        few = settings.measured if pooling is None else -(-settings.measured * windows.count // settings.windows)
        self.few = self._here(_first(windows, few))
        self.order = self._order()
        self._hows: list[str] = []
        self._kept: list[str] = []

    def _here(self, windows: Encoded) -> Encoded:
        blocks = tuple(block.mapped(lambda tensor: tensor.to(self.device)) for block in windows.blocks)
        return replace(windows, blocks=blocks)

    def _order(self) -> list[tuple[str, str]]:
        """Blocks in the order in which they run, with their lists."""
        stacks = {path: stack for path, stack, _ in find_blocks(self.model)}
        ran = execution_order(self.model, stacks, example_inputs(self.model))
        return [(path, stacks[path]) for path in ran]

    # Step 1: decompose.

    def spectra(self, unit: Unit) -> list[WeightedSpectrum]:
        """The decompositions of a unit, which `curves` made before."""
        found = self._held(unit)
        return [
            WeightedSpectrum(*(found[f"{part}.{number}"].double() for part in ("left", "S", "right")))
            for number in range(len(unit.matrices))
        ]

    def _held(self, unit: Unit) -> dict[str, Tensor]:
        """What `curves` kept of a unit."""
        found = self.work.tensors(unit.name)
        assert found is not None
        return found

    def curves(self) -> list[Curve]:
        """Decompose every matrix in its metric; give cost and error at every allowed rank."""
        missing = [unit for unit in self.units if self.work.tensors(unit.name) is None]
        for group in readings(self.model, missing, lambda unit: unit.matrices):
            self.tell(Progress("reading", len(self.units) - len(missing), len(self.units)))
            matrices = [matrix for unit in group for matrix in unit.matrices]
            moments: dict[str, Moments] = {}
            if self.settings.method != "svd":
                gradients = self.settings.method in ("fwsvd", "double", "propagated", *STRUCTURES)
                moments = collect(
                    self.model,
                    self.windows,
                    matrices,
                    gradients=gradients,
                    pooling=self.pooling,
                    seed=self.settings.seed,
                )
                if self.task is not None:
                    of_task = collect(self.model, self.task, matrices, gradients=gradients, drawn=False)
                    share = self.settings.task_weight
                    moments = {name: mixed(moments[name], of_task[name], share) for name in moments}
            for unit in group:
                self.tell(Progress("decomposing", self.units.index(unit), len(self.units)))
                self._keep(unit.name, self._decompose(unit, moments))
                for matrix in unit.matrices:
                    moments.pop(matrix.name, None)
        self._kept = [unit.name for unit in self.units]
        return [self._curve(unit) for unit in [*self.units]]

    def _decompose(self, unit: Unit, moments: Mapping[str, Moments]) -> dict[str, Tensor]:
        if unit.joint:
            weights = [read(self.model, matrix) for matrix in unit.matrices]
            metrics = [self._moments(moments[matrix.name]) for matrix in unit.matrices]
            heads = (unit.matrices[0].heads or 0) if unit.joint == "dimensions" else 0
            return neurons.prepare(weights, [left for left, _ in metrics], metrics[0][1], metrics[-1][1], heads=heads)
        if self.settings.method in STRUCTURES:
            (matrix,) = unit.matrices
            return prepare(read(self.model, matrix), moments[matrix.name], self.settings)
        kept: dict[str, Tensor] = {}
        for number, matrix in enumerate(unit.matrices):
            left, right = self._metric(moments.get(matrix.name))
            spectrum = decompose_weighted(read(self.model, matrix), left, right)
            kept[f"left.{number}"], kept[f"right.{number}"] = spectrum.left.float(), spectrum.right.float()
            kept[f"S.{number}"] = spectrum.S
            if left is not None and self.settings.method == "propagated":
                gradients = moments[matrix.name].gradients
                assert gradients is not None
                kept[f"gradients.{number}"] = gradients.float()
        return kept

    def _metric(self, moments: Moments | None) -> tuple[Root | None, Root | None]:
        """The roots of the metric of a matrix, by the method."""
        method, settings = self.settings.method, self.settings
        if method == "svd" or moments is None:
            return None, None
        if method == "fwsvd":
            assert moments.fisher is not None
            return self._noted(diagonal_root(moments.fisher.sqrt())), None
        if method == "asvd":
            return None, self._noted(diagonal_root(moments.magnitude**settings.alpha))
        left, right = self._moments(moments)
        return None if left is None else self._noted(square_root(left)), self._noted(square_root(right))

    def _moments(self, moments: Moments) -> tuple[Tensor | None, Tensor]:
        """The full metrics of the outputs and the inputs of a matrix; None for the identity."""
        if self.settings.method == "whiten":
            return None, moments.inputs
        assert moments.gradients is not None
        left = shrunk(moments.gradients, self.settings.output_shrinkage)
        return left, shrunk(moments.inputs, self.settings.input_shrinkage)

    def _noted(self, root: Root) -> Root:
        self._hows.append(root.how)
        return root

    def _keep(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep what is finished, and before it how its roots were found."""
        self.work.note(f"roots of {key}", self._hows)
        self._hows = []
        self.work.keep(key, tensors)

    def most_bytes(self) -> int:
        """Forecast the peak of memory, weights left out that lie in mapped files."""
        matrices = [matrix for unit in self.units for matrix in unit.matrices]
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        own = sum(parameter.nbytes for parameter in self.model.parameters() if has_memory(parameter.data))
        moments = min(max(STATISTICS_BYTES, weights), moments_bytes(matrices))
        blocks = Counter[tuple[str, int | None]]()
        for matrix in matrices:
            blocks[matrix.stack, matrix.layer] += sum(matrix.shape)
        vocabulary = 0 if self.pooling is not None else vocabulary_of(self.model)
        batch = max(block.inputs["input_ids"].numel() for block in self.windows.blocks)
        width = max(min(matrix.shape) for matrix in matrices)
        # Predictions and their gradients, a few in float64; what enters each block; and all in one, with gradients.
        reading = 2 * 4 * batch * vocabulary + 32 * PREDICTIONS * vocabulary
        reading += 4 * batch * (width * len(self.order) + 2 * max(blocks.values()))
        # A metric, its root and inverse, and what they are made of, in float64.
        decomposing = 8 * moments_bytes([max(matrices, key=lambda matrix: moments_bytes([matrix]))])
        streams = 2 * 4 * sum(self.windows.tokens) * width
        return PROGRAM_BYTES + own + max(moments + max(reading, decomposing), streams + decomposing)

    @property
    def roots(self) -> dict[str, int]:
        """How the roots were found, those of a life before this one included -> how often."""
        return dict(Counter(how for key in self._kept for how in self.work.numbers(f"roots of {key}") or ()))

    def _curve(self, unit: Unit) -> Curve:
        if unit.joint:
            kept = self._held(unit)
            shapes = [matrix.shape for matrix in unit.matrices]
            cost = joint_cost(shapes, self.settings, self.dtype, _ordered_rows(self.model, unit))
            cuts, curve = neurons.cuts(kept, shapes, cost, self.settings.multiple)
            self.units[self.units.index(unit)] = replace(unit, cuts=tuple(cuts))
            return replace(curve, name=unit.name, group=unit.matrices[0].type)
        tails, ranks = self._errors(unit), allocate.allowed_ranks(unit.full(), self.settings.multiple)
        costs = (
            self._seconds(unit, ranks)
            if self.settings.unit == "seconds"
            else costs_of(unit, ranks, self.settings, self.dtype)
        )
        return allocate.make_curve(unit.name, ranks, costs, tails, unit.matrices[0].type)

    def _errors(self, unit: Unit) -> NDArray[np.float64]:
        """The squared error in the metric at every rank from 0."""
        if self.settings.method not in STRUCTURES:
            return allocate.tails_of([spectrum.S.cpu().numpy() for spectrum in self.spectra(unit)], unit.full())
        return np.append(errors_of(self._held(unit))[:-1], 0.0)

    def _structure(self, unit: Unit, rank: int) -> Structure:
        """What a unit becomes under a method that is no plain cut; its weight must be the original one."""
        key = f"{unit.name} at {rank}"
        kept = self.work.tensors(key)
        if kept is None:
            kept = make(read(self.model, unit.matrices[0]), self._held(unit), rank, self.settings)
            self.work.keep(key, kept)
        return structure_of(kept, self.settings)

    def _seconds(self, unit: Unit, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """What a unit takes for one token at every rank; experts as if each took its turn."""
        shape = unit.matrices[0].shape
        key = f"seconds of {shape}"
        points = self.work.numbers(key)
        if points is None:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            points = seconds_of(shape, self.settings, like)
            self.work.note(key, points)
        at, seconds = np.array(points, dtype=np.float64).T
        # More components never take less time; what says so is noise.
        lower = np.minimum.accumulate(seconds[:-1][::-1])[::-1]
        found = np.interp(ranks, at[:-1], lower)
        found[ranks == unit.full()] = seconds[-1]
        return found * len(unit.matrices)

    # Step 2: divide the budget.

    def budget(self, curves: Sequence[Curve]) -> float:
        """What the units may take together."""
        dense = sum(float(curve.costs[-1]) for curve in curves)
        share = self.settings.ratio or self.settings.latency
        if share is not None:
            return share * dense
        assert self.settings.bytes is not None
        whole = sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize
        return self.settings.bytes - (whole - dense)

    def choose(self, curves: list[Curve], budget: float) -> tuple[str, Choice, dict[str, Measurement]]:
        """Try allocations and keep the one that diverges least on calibration windows; uniform is always tried."""
        names = AUTO if self.settings.allocate == "auto" else ("uniform", self.settings.allocate)
        candidates = {name: self.allocation(name, curves, budget) for name in dict.fromkeys(names)}
        reference = self.reference()
        found: dict[str, Measurement] = {}
        for number, (name, choice) in enumerate(candidates.items()):
            self.tell(Progress("comparing allocations", number, len(candidates)))
            ranks = ranks_of(curves, choice)
            found[name] = self._kept_divergence(ranks, reference)
        best = min(found, key=lambda name: (found[name].value, name != "uniform"))
        return best, candidates[best], found

    def elastic(
        self, curves: Sequence[Curve]
    ) -> tuple[ElasticConfig, Callable[..., nn.Module], dict[str, int], dict[str, Measurement]]:
        """Choose one way to divide every budget: the one whose divergences multiplied over several ratios are least.

        Returns:
            What the folder holds, what makes it, the ranks at the largest ratio, and the divergence of each way at
            each ratio.
        """
        names = AUTO if self.settings.allocate == "auto" else ("uniform", self.settings.allocate)
        plain, points = describe(self.model, self.units, self.settings), {}
        dense = sum(float(curve.costs[-1]) for curve in curves)
        ratios = ratios_of(plain.ratio, curves)
        if "measured" in names:
            found = self.alone(curves, [allocate.uniform(curves, ratio * dense) for ratio in ratios])
            points = {
                number: [(int(curve.ranks[index]), float(np.mean(each))) for index, each in found[curve.name]]
                for number, curve in enumerate(curves)
            }
        scales = [torch.stack([spectrum.S for spectrum in self.spectra(unit)]).cpu() for unit in self.units]

        def ranks_at(config: ElasticConfig, ratio: float) -> dict[str, int]:
            ranks = size_at(config, scales, dtype=self.dtype, ratio=ratio).ranks
            return {unit.name: rank for unit, rank in zip(self.units, ranks)}

        reference = self.reference()
        ways = {name: with_allocation(plain, name, points if name == "measured" else None) for name in names}
        tried: dict[str, Measurement] = {}
        for number, (name, ratio) in enumerate(itertools.product(ways, ratios)):
            self.tell(Progress("comparing allocations", number, len(ways) * len(ratios)))
            tried[f"{name} at {ratio:g}"] = self._kept_divergence(ranks_at(ways[name], ratio), reference)
        logs = {name: sum(np.log(max(tried[f"{name} at {ratio:g}"].value, 1e-12)) for ratio in ratios) for name in ways}
        best = ways[min(logs, key=lambda name: (logs[name], name != "uniform"))]
        cuts = {} if self.settings.method in AT_ONCE else {ratio: ranks_at(best, ratio) for ratio in ratios}
        for ranks in cuts.values():
            self._propagated(ranks)

        def spectra(unit: Unit, anchor: int) -> list[WeightedSpectrum]:
            return self._ordered(unit, [*cuts.values()][anchor]) if cuts else self.spectra(unit)

        held = trimmed(best, scales, self.dtype, {ratio: [*ranks.values()] for ratio, ranks in cuts.items()})
        made = partial(make_elastic_, config=held, units=self.units, scales=scales, spectra=spectra)
        return held, made, ranks_at(held, held.ratio), tried

    def _ordered(self, unit: Unit, ranks: Mapping[str, int]) -> list[WeightedSpectrum]:
        """The components of a unit as `_propagated` cut it, with their singular values in them.

        Of one that was not cut, those of the original inputs.
        """
        kept = self.work.tensors(self._cut_key(f"{unit.stack}.{unit.layer}", ranks)) or {}
        if f"up {unit.matrices[0].name}" not in kept:
            return [WeightedSpectrum(each.left * each.S, each.S, each.right) for each in self.spectra(unit)]
        pairs = [(kept[f"up {matrix.name}"], kept[f"down {matrix.name}"]) for matrix in unit.matrices]
        return [WeightedSpectrum(up, torch.ones(len(down)), down) for up, down in pairs]

    def _cut_key(self, path: str, ranks: Mapping[str, int]) -> str:
        return f"factors of {path} at {sorted(ranks.items())}"

    def allocation(self, name: str, curves: Sequence[Curve], budget: float) -> Choice:
        """Divide the budget in the way of this name."""
        floor = self.settings.floor
        if name in ("uniform", "tail"):
            return allocate.divided(name, curves, budget, floor=floor)
        if name == "groups":
            return allocate.within_groups(curves, budget)
        if name == "measured":
            found = self.alone(curves, [allocate.uniform(curves, share * budget) for share in MEASURED_AT])
            points = {key: [(index, float(np.mean(each))) for index, each in pairs] for key, pairs in found.items()}
            return allocate.divided(name, curves, budget, floor=floor, points=points)
        if name == "sensitivity":
            dense = sum(float(curve.costs[-1]) for curve in curves)
            choices = [allocate.uniform(curves, share * dense) for share in SENSITIVITY_SHARES]
            points = self.alone(curves, choices)
            measured = {
                curve.name: [
                    (float(curve.costs[index] / curve.costs[-1]), float(np.mean(values)))
                    for index, values in points[curve.name]
                ]
                for curve in curves
            }
            return allocate.by_sensitivity(curves, budget, measured)
        if name == "signed":
            return allocate.signed_pool(curves, budget, self.slopes())
        ranks = {unit.name: float(np.mean([self._rule(name, m) for m in unit.matrices])) for unit in self.units}
        return allocate.proportional(curves, budget, ranks)

    def _rule(self, name: str, matrix: Matrix) -> int:
        values = torch.linalg.svdvals(read(self.model, matrix).double())
        return max(1, rank_by(name, values, matrix.shape))

    def slopes(self) -> dict[str, NDArray[np.float64]]:
        """The change of the text's loss by removing each component, to the first order."""
        found = {}
        for group in readings(self.model, self.units, lambda unit: unit.matrices):
            matrices = [matrix for unit in group for matrix in unit.matrices]
            gradients = loss_gradients(self.model, self.windows, {matrix.parameter for matrix in matrices})
            for unit in group:
                total = np.zeros(unit.full())
                for matrix, spectrum in zip(unit.matrices, self.spectra(unit)):
                    gradient = part_of(gradients[matrix.parameter], matrix).double()
                    along = ((spectrum.left.T @ gradient) * spectrum.right).sum(1) * spectrum.S
                    total -= along.cpu().numpy()
                found[unit.name] = total
        return found

    @property
    def divergence_unit(self) -> str:
        """What divergence is measured in."""
        return "nats/token" if self.pooling is None else UNIT

    def reference(self) -> list[Tensor]:
        """The original model's predictions (embeddings) of the few windows on which divergence is measured."""
        if self.pooling is not None:
            return [embed(self.model, self.few, index, self.pooling) for index in range(len(self.few.blocks))]
        predictions = (log_probabilities(self.model, self.few, index) for index in range(len(self.few.blocks)))
        return [self.work.lend({"predictions": each})["predictions"] for each in predictions]

    def divergence_of(self, curves: Sequence[Curve], choice: Choice, reference: Sequence[Tensor]) -> list[float]:
        """Divergence of every window with all units cut at once."""
        return self._divergence_at(ranks_of(curves, choice), reference)

    def _kept_divergence(self, ranks: Mapping[str, int], reference: Sequence[Tensor]) -> Measurement:
        """The same, measured once."""
        key = f"divergence at {sorted(ranks.items())}"
        values = self.work.numbers(key)
        if values is None:
            values = self._divergence_at(ranks, reference)
            self.work.note(key, values)
        return mean(np.array(values), self.divergence_unit)

    def _divergence_at(self, ranks: Mapping[str, int], reference: Sequence[Tensor]) -> list[float]:
        with replaced(self.model, (self._weights(unit, ranks[unit.name]) for unit in self.units), self.work):
            return self._divergence(reference)

    def _divergence(self, reference: Sequence[Tensor], forward: Callable[[int], Any] | None = None) -> list[float]:
        found: list[float] = []
        for index, expected in enumerate(reference):
            if self.pooling is not None:
                found += divergence(embed(self.model, self.few, index, self.pooling, forward), expected)
            else:
                scores = score_block(self.model, self.tokenizer, self.few, index, reference=expected, forward=forward)
                found += scores.loss
        return [value if np.isfinite(value) else 1e30 for value in found]

    def _weights(self, unit: Unit, rank: int) -> dict[Matrix, Tensor]:
        """What the matrices of a unit that are cut become, multiplied out, for the inputs that they had."""
        if rank < unit.full() and self.settings.method in STRUCTURES:
            return {unit.matrices[0]: self._structure(unit, rank).dense()}
        return {matrix: found.dense() for matrix, found in self._plain(unit, rank).items()}

    def alone(
        self,
        curves: Sequence[Curve],
        choices: Sequence[Choice],
        *,
        originals: Mapping[str, Tensor] = MappingProxyType({}),
        reference: Sequence[Tensor] | None = None,
        beside: str = "",
    ) -> dict[str, list[tuple[int, list[float]]]]:
        """Measure the divergence with each unit alone cut, as each of some choices has it.

        Args:
            curves: Of all units.
            choices: For each unit.
            originals: Weights by parameter, where the model has others; it is then measured with those beside the unit.
            reference: Predictions of the original model, where this is not it.
            beside: What the others are, which tells these measurements from any other.

        Returns:
            For each unit (choice, divergence of every window), without choices that keep everything.
        """
        reference = self.reference() if reference is None else reference
        by_name = {curve.name: curve for curve in curves}
        found: dict[str, list[tuple[int, list[float]]]] = {unit.name: [] for unit in self.units}
        cache = PrefixCache(self.model, self.order, self.few.blocks)
        for number, unit in enumerate(sorted(self.units, key=self._depth)):
            self.tell(Progress("measuring", number, len(self.units)))
            curve = by_name[unit.name]
            for index in sorted({choice[unit.name] for choice in choices}):
                if index == len(curve.ranks) - 1:
                    continue
                key = f"divergence of {unit.name} at {int(curve.ranks[index])}{beside}"
                values = self.work.numbers(key)
                if values is None:
                    with torch.inference_mode():
                        while cache.depth < self._depth(unit):
                            cache.advance()
                    with restored(self.model, unit.matrices):
                        for matrix in unit.matrices:
                            if matrix.parameter in originals:
                                write(self.model, matrix, part_of(originals[matrix.parameter], matrix))
                        for matrix, weight in self._weights(unit, int(curve.ranks[index])).items():
                            write(self.model, matrix, weight)
                        values = self._divergence(reference, cache.forward)
                    self.work.note(key, values)
                found[unit.name].append((index, values))
        return found

    def _depth(self, unit: Unit) -> int:
        """How many blocks run before a unit."""
        return next((i for i, (path, _) in enumerate(self.order) if path == f"{unit.stack}.{unit.layer}"), 0)

    # Step 3: cut.

    def iterate(
        self, curves: Sequence[Curve], choice: Choice, budget: float
    ) -> tuple[Choice, dict[str, Factors], list[Measurement]]:
        """Cut the model; under `auto` move budget to where the cut model shows that it helps, and cut again.

        In a round every unit alone gets a little less and a little more, beside all the others that are cut. That
        prices its error, and at these prices the budget is divided again, near where it was. A round that does not
        lower the divergence is not kept and is the last one.

        Args:
            curves: Of all units.
            choice: To begin with.
            budget: In the unit of the curves.

        Returns:
            The choice, what every matrix that is cut becomes, and the divergence of the model so cut before the first
            round and after each that was kept; without rounds it is not measured.
        """
        cut = self._joined(ranks_of(curves, choice))
        if self.settings.allocate != "auto" or self.settings.method in STRUCTURES:
            return choice, of_parts(self.units, cut), []
        reference = self.reference()
        now, priced = self._beside(curves, choice, cut, reference)
        rounds = [now]
        for number in range(ROUNDS):
            self.tell(Progress("moving budget", number, ROUNDS))
            near = [allocate.nearby(curve, choice[curve.name], MOVED) for curve in priced()]
            moved = allocate.water_fill([curve for curve, _ in near], budget)
            other = {curve.name: moved[curve.name] + before for curve, before in near}
            again = self._joined(ranks_of(curves, other))
            now, priced = self._beside(curves, other, again, reference)
            if not now.value < rounds[-1].value:
                break
            choice, cut = other, again
            rounds.append(now)
        return choice, of_parts(self.units, cut), rounds

    def _beside(
        self, curves: Sequence[Curve], choice: Choice, cut: Mapping[str, Factors], reference: Sequence[Tensor]
    ) -> tuple[Measurement, Callable[[], list[Curve]]]:
        """The divergence of a cut model, and the curves of the units in units of it, near the choice, when asked."""
        name = str(sorted(ranks_of(curves, choice).items()))

        def cutting() -> AbstractContextManager[dict[str, Tensor]]:
            return replaced(self.model, (_multiplied_out(unit, cut) for unit in self.units), self.work)

        values = self.work.numbers(f"divergence of the cut at {name}")
        if values is None:
            with cutting():
                values = self._divergence(reference)
            self.work.note(f"divergence of the cut at {name}", values)
        now = mean(np.array(values), self.divergence_unit)

        def priced() -> list[Curve]:
            less, more = PROBED
            probes: list[Choice] = [{}, {}]
            for curve in curves:
                at, cost = choice[curve.name], float(curve.costs[choice[curve.name]])
                probes[0][curve.name] = max(0, min(at - 1, curve.most(less * cost)))
                probes[1][curve.name] = min(len(curve.ranks) - 1, max(at + 1, curve.most(more * cost)))
            with cutting() as originals:
                points = self.alone(curves, probes, originals=originals, reference=reference, beside=f" beside {name}")
            means = {key: [(index, float(np.mean(each))) for index, each in pairs] for key, pairs in points.items()}
            return [allocate.repriced(curve, choice[curve.name], now.value, means[curve.name]) for curve in curves]

        return now, priced

    def factors(self, ranks: Mapping[str, int]) -> dict[str, Factors]:
        """What every matrix that is cut becomes, in the model's precision or better."""
        return of_parts(self.units, self._joined(ranks))

    def _joined(self, ranks: Mapping[str, int]) -> dict[str, Factors]:
        """The same, gate and up of an expert as one matrix."""
        if self.settings.method in STRUCTURES:
            cut = [unit for unit in self.units if ranks[unit.name] < unit.full()]
            return {unit.name: self._structure(unit, ranks[unit.name]) for unit in cut}
        return {**(self._propagated(ranks) if self.settings.method == "propagated" else self._at_once(ranks))}

    def _at_once(self, ranks: Mapping[str, int]) -> dict[str, Spectrum]:
        plain = (self._plain(unit, ranks[unit.name]) for unit in self.units)
        return {matrix.name: self._lent(found.spectrum()) for each in plain for matrix, found in each.items()}

    def _lent(self, spectrum: Spectrum) -> Spectrum:
        """The same, out of memory where there is a folder."""
        return Spectrum(**self.work.lend(vars(spectrum)))

    def _plain(self, unit: Unit, rank: int) -> dict[Matrix, _Product]:
        """What the matrices of a unit that are cut become, for the inputs that they had."""
        ranks = unit.ranks(rank)
        if rank == unit.full():
            return {}
        if not unit.joint:
            return {m: _Product(m.shape, *each.factors(rank)) for m, each in zip(unit.matrices, self.spectra(unit))}
        kept = self._held(unit)
        weights = [read(self.model, matrix) for matrix in unit.matrices]
        pairs = neurons.factors(kept, weights, unit.cuts[rank - 1])
        found = zip(unit.matrices, pairs, ranks)
        return {m: _Product(m.shape, *pair, *self._stay(unit, rank, m)) for m, pair, r in found if r is not None}

    def _stay(self, unit: Unit, rank: int, matrix: Matrix) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns of a matrix that stay; None for all."""
        if not unit.joint or unit.keeps(rank) == unit.width:
            return None, None
        rows, columns = neurons.places(self._held(unit), unit.keeps(rank))
        return (None, columns) if matrix is unit.matrices[-1] else (rows, None)

    def _propagated(self, ranks: Mapping[str, int]) -> dict[str, Spectrum]:
        """Cut block by block, for the inputs that the cut model gives."""
        found: dict[str, Spectrum] = {}
        units = {matrix.name: unit for unit in self.units for matrix in unit.matrices}
        wanted = {m.name: r for unit in self.units for m, r in zip(unit.matrices, unit.ranks(ranks[unit.name]))}
        cut = [matrix for unit in self.units for matrix in unit.matrices if wanted[matrix.name] is not None]
        streams = Streams(self.model, self.order, self.windows.blocks)
        of_task = None if self.task is None else Streams(self.model, self.order, self.task.blocks)

        def put(matrix: Matrix, up: Tensor, down: Tensor) -> _Product:
            unit = units[matrix.name]
            product = _Product(matrix.shape, up, down, *self._stay(unit, ranks[unit.name], matrix))
            write(self.model, matrix, product.dense())
            return product

        for depth, (path, _) in enumerate(self.order):
            self.tell(Progress("cutting", depth, len(self.order)))
            mine = [matrix for matrix in cut if matrix.parameter.startswith(f"{path}.")]
            # The streams have passed the blocks before, which need not stay cut.
            with restored(self.model, mine) as originals:
                streams.enter(mine, originals)
                if of_task is not None:
                    of_task.enter(mine, originals)
                key = self._cut_key(path, ranks)
                kept = self.work.tensors(key)
                if kept is None:
                    kept = {}
                    for group in streams.groups():
                        inputs = streams.inputs(group)
                        if of_task is not None:
                            inputs = blended(inputs, of_task.inputs(group), self.settings.task_weight)
                        for matrix in group:
                            unit = units[matrix.name]
                            fitted = self._fit(
                                streams.original(matrix), unit, matrix, inputs[matrix.name], ranks[unit.name]
                            )
                            up, down = fitted.factors(wanted[matrix.name] or 0)
                            put(matrix, up, down)
                            self._turn_output(streams, unit, matrix, ranks[unit.name])
                            kept[f"up {matrix.name}"], kept[f"down {matrix.name}"] = up.float(), down.float()
                    self._keep(key, kept)
                self._kept.append(key)
                for matrix in mine:
                    up, down = (kept[f"{part} {matrix.name}"].double() for part in ("up", "down"))
                    found[matrix.name] = self._lent(put(matrix, up, down).spectrum())
                streams.advance()
                if of_task is not None:
                    of_task.advance()
        for unit in self.units:  # outside the blocks
            if not any(matrix.name in found for matrix in unit.matrices):
                plain = self._plain(unit, ranks[unit.name])
                found |= {matrix.name: self._lent(product.spectrum()) for matrix, product in plain.items()}
        return found

    def _turn_output(self, streams: Streams, unit: Unit, matrix: Matrix, rank: int) -> None:
        """Let the output weight, which is cut later, read values in the basis in which they have been cut."""
        turn = self._turn(unit, rank)
        if turn is not None and matrix is unit.matrices[0]:
            output = unit.matrices[-1]
            write(self.model, output, turned(streams.original(output).double(), turn, 1))

    def _turn(self, unit: Unit, rank: int) -> Tensor | None:
        """The basis in which values and outputs are cut; None where they, or others, are cut as they are."""
        if unit.joint != "dimensions":
            return None
        return neurons.turn_of(self._held(unit), unit.keeps(rank))

    def _fit(self, weight: Tensor, unit: Unit, matrix: Matrix, inputs: Inputs, rank: int) -> WeightedSpectrum:
        """Decompose what stays of a matrix for the inputs it gets: |W x - W' y| in the metric of its outputs."""
        settings, number = self.settings, unit.matrices.index(matrix)
        spilled = self._held(unit)
        rows, columns = self._stay(unit, rank, matrix)
        gradients, target = spilled[f"gradients.{number}"].to(weight.device), weight.double()
        if not unit.joint:
            gradients = shrunk(gradients, settings.output_shrinkage)
        turn = self._turn(unit, rank)
        after, cross, drift, near = inputs.after, inputs.cross, inputs.drift, target
        if rows is not None:
            gradients, target = turned(gradients, turn, 0, 1)[rows][:, rows], turned(target, turn, 0)[rows]
            near = target
        # What the weight is beside inputs in the basis in which it gets them now.
        here = target
        if columns is not None:
            here = turned(target, turn, 1)
            moment = turned(spilled["moment"].to(weight.device).double(), turn, 0, 1)
            near = neurons.made_up(here, moment, columns)
            after, cross = after[columns][:, columns], cross[:, columns]
            drift = None if drift is None else drift[:, columns]
        left = self._noted(square_root(gradients))
        right = self._noted(square_root(after, shrinkage=settings.input_shrinkage))
        if right.how == "identity":
            return decompose_weighted(near, left, right)
        share = settings.input_shrinkage
        seen = inputs.after if columns is None else inputs.after[:, columns]
        before, now = target @ cross, here @ seen
        wanted = (1 - share) * torch.lerp(now, before, settings.propagation)
        wanted += share * after.diagonal().mean() * near
        if drift is not None:
            # What the block's output lacks beside this weight's own part of it is asked of this weight, too.
            wanted += settings.compensation * (1 - share) * (drift - (before - now))
        # W E[x y'] E[y y']^-1 regresses the original outputs on the inputs that there are now.
        return decompose_weighted(right.solve_after(wanted), left, right)


def ranks_of(curves: Sequence[Curve], choice: Choice) -> dict[str, int]:
    """Give the rank of every unit.

    Args:
        curves: All of them.
        choice: For each.

    Returns:
        By the name of the curve.
    """
    return {curve.name: int(curve.ranks[choice[curve.name]]) for curve in curves}


def _ordered_rows(model: nn.Module, unit: Unit) -> list[int]:
    """How many rows are put in order where each matrix of a unit lacks some: all of its parameter's, once."""
    shared = Counter(matrix.parameter for matrix in unit.matrices)
    shapes = [(m, model.get_parameter(m.parameter).shape) for m in unit.matrices]
    return [shape[1 if m.transposed else 0] // shared[m.parameter] for m, shape in shapes]


def vocabulary_of(model: nn.Module) -> int:
    """Count the tokens among which a language model chooses.

    Args:
        model: With output embeddings. Not modified.

    Returns:
        Rows of the output embeddings.
    """
    head = output_embeddings(model)
    assert head is not None
    return next(head.parameters()).shape[0]


@dataclass(frozen=True)
class _Product:
    """Two factors, and the rows and columns of a matrix in which their product stands; zeros in the others."""

    shape: tuple[int, int]
    up: Tensor
    down: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def dense(self) -> Tensor:
        up, down = self._spread(self.up, self.down)
        return up @ down

    def spectrum(self) -> Spectrum:
        found = as_spectrum(self.up, self.down)
        up, down = self._spread(found.U, found.Vh)
        return Spectrum(up.float(), found.S.float(), down.float())

    def _spread(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is not None:
            up = up.new_zeros(self.shape[0], up.shape[1]).index_copy(0, self.rows.to(up.device), up)
        if self.columns is not None:
            down = down.new_zeros(len(down), self.shape[1]).index_copy(1, self.columns.to(down.device), down)
        return up, down


def _multiplied_out(unit: Unit, factors: Mapping[str, Factors]) -> dict[Matrix, Tensor]:
    """What the matrices of a unit become by the factors that there are."""
    pairs = [(matrix, factors.get(matrix.name)) for matrix in unit.matrices]
    return {matrix: (found.U * found.S) @ found.Vh for matrix, found in pairs if isinstance(found, Spectrum)}


def _first(windows: Encoded, count: int) -> Encoded:
    """Some windows, evenly spread."""
    count = min(count, windows.count)
    chosen = [number * windows.count // count for number in range(count)]
    strata = [0 if number in chosen else 1 for number in range(windows.count)]
    kept = arrange(windows, strata=strata)
    blocks = tuple(block for block in kept.blocks if set(block.examples) <= set(chosen))
    return replace(kept, blocks=blocks)
