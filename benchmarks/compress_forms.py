"""Weigh joint forms of several matrices against a low rank of each, at equal stored numbers.

    python benchmarks/compress_forms.py SHARED --model stories260K               # errors in the metric
    python benchmarks/compress_forms.py SHARED --model stories260K --perplexity  # and compressed models
    python benchmarks/compress_forms.py --table

An error is the sum of squared errors in both metrics (`double`), of a group of matrices under one number of stored
values (pivoted), which a low rank of each divides in the best way; of 64 windows of 256 tokens. Below 1 the form wins.
Perplexity is that of `eckart compress` on the first 64 validation windows; without the removal of neurons it is the row
`propagated auto pivoted` of `compress.py`.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch

import eckart
from eckart import allocate, neurons
from eckart.allocate import Curve
from eckart.calibration import collect, each_expert, read_windows
from eckart.compression_steps import Steps, ranks_of
from eckart.dataflow import evaluating
from eckart.factoring import factor_
from eckart.matrices import find_matrices, read
from eckart.recipe import CompressSettings
from eckart.scoring import score, summarize
from eckart.spill import Spill
from eckart.tasks import read_text
from eckart.units import edits_of, find_units, joint_cost
from eckart.weighting import shrunk, square_root

RESULTS = Path(__file__).parent / "results"
TEXTS = {"stories260K": "tinystories", "pebble-7m": "books"}
RATIOS = (0.8, 0.6, 0.4)
TYPES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out")
STACKS = {"q, k, v": TYPES[:3], "q, k": TYPES[:2], "k, v": TYPES[1:3], "gate, up": TYPES[4:6]}


def curve_of(squares, shape, dense=None, error=None):
    """Cost and error of a pivoted matrix at every rank; `error` where the tail is not that of `squares`."""
    full = min(shape)
    ranks = np.arange(1, full + 1)
    tails = np.append(squares[::-1].cumsum()[::-1], 0.0)[ranks] if error is None else error
    costs = (ranks * (sum(shape) - ranks)).astype(float)
    dense = float(shape[0] * shape[1]) if dense is None else dense
    allowed = (costs < dense) | (ranks == full)
    costs = np.where(ranks == full, dense, costs)
    return Curve("", ranks[allowed], costs[allowed], tails[allowed])


def named(curves):
    return [Curve(str(n), c.ranks, c.costs, c.errors) for n, c in enumerate(curves)]


def least_error(curves, budget):
    curves = named(curves)
    choice = allocate.water_fill(curves, budget)
    return sum(float(curve.errors[choice[curve.name]]) for curve in curves)


class Forms:
    """Errors of every form in every layer."""

    def __init__(self, model, windows):
        self.matrices = {(m.layer, m.type): m for m in find_matrices(model)}
        moments = collect(model, windows, list(self.matrices.values()))
        self.config = model.config
        self.weights = {key: read(model, m).double() for key, m in self.matrices.items()}
        self.inputs = {key: shrunk(moments[m.name].inputs, 0.1) for key, m in self.matrices.items()}
        self.outputs = {key: shrunk(moments[m.name].gradients, 0.3) for key, m in self.matrices.items()}
        self.left = {key: square_root(metric) for key, metric in self.outputs.items()}
        self.white = {
            key: square_root(self.inputs[key]).after(self.left[key].before(weight))
            for key, weight in self.weights.items()
        }
        self.single = {key: self.low_rank(weight) for key, weight in self.white.items()}
        self.layers = model.config.num_hidden_layers

    def low_rank(self, weighted):
        return curve_of(torch.linalg.svdvals(weighted).square().numpy(), tuple(weighted.shape))

    def stack(self, keys):
        """One `down` for weights that read the same input."""
        return [self.low_rank(torch.cat([self.white[key] for key in keys]))]

    def across(self, keys):
        """One `down` for weights of two layers, from both inputs' metric; each `up` is then the best for its own."""
        pooled = sum(self.inputs[key] / self.inputs[key].trace() for key in keys)
        root = square_root(pooled)
        joined = torch.cat([root.after(self.left[key].before(self.weights[key])) for key in keys])
        down = root.undone_after(torch.linalg.svd(joined, full_matrices=False).Vh)
        full = min(joined.shape)
        errors = np.zeros(full)
        for key in keys:
            basis = torch.linalg.qr(square_root(self.inputs[key]).after(down).T).Q
            found = (self.white[key] @ basis).square().sum(0).cumsum(0)[:full]
            errors += (self.white[key].square().sum() - found).clamp(min=0).numpy()
        errors[-1] = 0.0
        return [curve_of(None, tuple(joined.shape), sum(float(self.single[key].costs[-1]) for key in keys), errors)]

    def value_output(self, layer, own):
        """Fewer dimensions inside each head: one product of value and output, shared by the queries of a group."""
        size, kv = self.config.head_dim, self.config.num_key_value_heads
        group = self.config.num_attention_heads // kv
        weight = self.left[layer, "out_proj"].before(self.weights[layer, "out_proj"])
        moment = self.inputs[layer, "out_proj"]
        squares = []
        for head in range(kv):
            parts = [slice(h * size, (h + 1) * size) for h in range(head * group, (head + 1) * group)]
            root = square_root(sum(moment[part, part] for part in parts) / group)
            squares.append(torch.linalg.svdvals(root.after(torch.cat([weight[:, p] for p in parts]))).square().numpy())
        width = self.config.hidden_size
        ranks = np.arange(1, size + 1)
        # A basis of each head is free, which saves r^2 as pivoting does.
        costs = (ranks * (1 + group) * width - ranks**2).astype(float)
        tails = [np.append(s[::-1].cumsum()[::-1], 0.0)[ranks] for s in squares]
        if own:
            return [Curve("", ranks, costs, tail) for tail in tails]
        return [Curve("", ranks, kv * costs, sum(tails))]

    def query_key(self, layer):
        """Fewer pairs of rotated dimensions in each head: those whose removal from the queries loses least."""
        size, kv = self.config.head_dim, self.config.num_key_value_heads
        group = self.config.num_attention_heads // kv
        key = (layer, "q_proj")
        loss = self.outputs[key] * (self.weights[key] @ self.inputs[key] @ self.weights[key].T)
        pairs = [
            [(head * group + g) * size + d for g in range(group) for d in (pair, pair + size // 2)]
            for head in range(kv)
            for pair in range(size // 2)
        ]
        gone, errors = [], [0.0]
        while len(pairs) > 1:
            losses = [float(loss[gone + pair][:, gone + pair].sum()) for pair in pairs]
            errors.append(max(errors[-1], min(losses)))
            gone += pairs.pop(int(np.argmin(losses)))
        kept = np.arange(1, len(errors) + 1)
        return [Curve("", kept, kept * 2.0 * (1 + group) * self.config.hidden_size, np.array(errors[::-1]))]

    def neurons(self, layer, widths_only):
        keys = [(layer, kind) for kind in TYPES[4:]]
        weights = [self.weights[key] for key in keys]
        metrics = [self.outputs[key] for key in keys]
        moment = self.inputs[keys[-1]]
        if widths_only:
            order = neurons.order_of_removal(self.left[keys[-1]].before(weights[-1]), moment)
            weighted = self.left[keys[-1]].before(weights[-1])
            whole = float((weighted @ moment * weighted).sum())
            counts = np.unique(np.linspace(1, len(order), 60).astype(int))
            errors = []
            for count in counts:
                stays = neurons.stay(order, int(count))
                root = square_root(moment[stays][:, stays])
                errors.append(
                    max(0.0, whole - float(root.after(root.solve_after(weighted @ moment[:, stays])).square().sum()))
                )
            costs = counts * float(sum(w.numel() for w in weights)) / len(order)
            return [Curve("", counts, costs, np.minimum.accumulate(errors))]
        shapes = [tuple(weight.shape) for weight in weights]
        cost = joint_cost(shapes, CompressSettings(ratio=0.5), torch.float32)
        return [neurons.cuts(neurons.prepare(weights, metrics, self.inputs[keys[0]], moment), shapes, cost)[1]]

    def rows(self):
        every = [list(range(layer, layer + 1)) for layer in range(self.layers)]
        pairs = [[layer, layer + 1] for layer in range(0, self.layers - 1, 2)]
        forms = [(f"{name}: one down", kinds, every, lambda keys: self.stack(keys)) for name, kinds in STACKS.items()]
        forms += [(f"{kind} of two layers: one down", (kind,), pairs, lambda keys: self.across(keys)) for kind in TYPES]
        forms += [
            (
                "v, o: dimensions of heads, one number",
                TYPES[2:4],
                every,
                lambda keys: self.value_output(keys[0][0], False),
            ),
            (
                "v, o: dimensions of heads, own numbers",
                TYPES[2:4],
                every,
                lambda keys: self.value_output(keys[0][0], True),
            ),
            ("q, k: pairs of rotated dimensions", TYPES[:2], every, lambda keys: self.query_key(keys[0][0])),
            ("gate, up, down: neurons", TYPES[4:], every, lambda keys: self.neurons(keys[0][0], True)),
            ("gate, up, down: neurons and rank", TYPES[4:], every, lambda keys: self.neurons(keys[0][0], False)),
        ]
        whole = sum(float(curve.costs[-1]) for curve in self.single.values())
        for name, kinds, places, make in forms:
            ratios, made, used = [], [], set()
            for layers in places:
                keys = [(layer, kind) for layer in layers for kind in kinds]
                joint, apart = make(keys), [self.single[key] for key in keys]
                dense = sum(float(curve.costs[-1]) for curve in apart)
                ratios.append([least_error(joint, r * dense) / least_error(apart, r * dense) for r in RATIOS])
                made += joint
                used |= set(keys)
            rest = [curve for key, curve in self.single.items() if key not in used]
            model = [
                least_error(made + rest, r * whole) / least_error(list(self.single.values()), r * whole) for r in RATIOS
            ]
            found = np.array(ratios)
            yield {
                "form": name,
                "median": np.median(found, 0).tolist(),
                "least": found.min(0).tolist(),
                "most": found.max(0).tolist(),
                "model": model,
            }


def perplexities(model, tokenizer, calibration, inside, keys, add):
    for ratio, draw in keys:
        settings = CompressSettings(ratio=ratio)
        windows = read_windows(calibration, tokenizer, length=256, count=64, first=64 * draw)
        units, _ = find_units(model, find_matrices(model), settings)
        steps = Steps(model, tokenizer, settings, windows, units, Spill(None), lambda _: None)
        start = time.process_time()
        with evaluating(model), each_expert(model):
            curves = steps.curves()
            chosen, choice, divergence = steps.choose(curves, steps.budget(curves))
            ranks = ranks_of(curves, choice)
            factors = steps.factors(ranks)
        seconds = time.process_time() - start
        small = copy.deepcopy(model)
        made = factor_(small, edits_of(steps.units, ranks, settings), factors=factors, storage=settings.storage)
        dense = sum(m.shape[0] * m.shape[1] for unit in units for m in unit.matrices)
        found = summarize(inside, score(small, tokenizer, inside))["perplexity"]
        kept = 1 - (made.before.parameters - made.after.parameters) / dense
        add(
            {"ratio": ratio, "draw": draw, "allocation": chosen}
            | {"divergence": {name: value.value for name, value in divergence.items()}}
            | {"kept": kept, "perplexity": found.value, "stderr": found.stderr, "seconds": seconds}
        )


def table() -> None:
    for path in sorted(RESULTS.glob("compress-forms-*.json")):
        held = json.loads(path.read_text())
        print(
            f"\n**{held['model']}**, error at equal numbers over that of a low rank of each: "
            "median of the groups (least, most)\n"
        )
        print("| form | " + " | ".join(map(str, RATIOS)) + " | all matrices, " + ", ".join(map(str, RATIOS)) + " |")
        print("|" + "---|" * (len(RATIOS) + 2))
        for row in held["errors"]:
            cells = [f"{m:.2f} ({a:.2f}, {b:.2f})" for m, a, b in zip(row["median"], row["least"], row["most"])]
            print(
                f"| {row['form']} | " + " | ".join(cells) + " | " + ", ".join(f"{v:.3f}" for v in row["model"]) + " |"
            )
        rows = held["perplexities"]
        if not rows:
            continue
        print(
            "\n| ratio | draw | by rank alone | with neurons removed | divergence alone | with | CPU s with reading |"
        )
        print("|" + "---|" * 7)
        other = RESULTS / f"compress-{held['model']}.json"
        alone = [
            row
            for row in (json.loads(other.read_text())["rows"] if other.exists() else ())
            if [row.get(key) for key in ("method", "allocate", "storage")] == ["propagated", "auto", "pivoted"]
        ]
        for row in sorted(rows, key=lambda row: (-row["ratio"], row["draw"])):
            same = [old for old in alone if (old["ratio"], old["draw"]) == (row["ratio"], row["draw"])]
            before = [f"{old['inside']['value']:.2f}" for old in same] or ["–"]
            diverged = [f"{min(old['divergence'].values()):.3g}" for old in same] or ["–"]
            cells = [f"{row['ratio']:g}", str(row["draw"]), before[0], f"{row['perplexity']:.2f}", diverged[0]]
            cells += [f"{min(row['divergence'].values()):.3g}", f"{row['seconds']:.0f}"]
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", nargs="?", type=Path, help="folder with models/ and text/")
    parser.add_argument("--model", choices=TEXTS, default="stories260K")
    parser.add_argument("--perplexity", action="store_true", help="compress and measure, too")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--ratios", default="0.8,0.6,0.4")
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured")
    given = parser.parse_args()
    if given.table:
        table()
        return
    assert given.shared is not None, "give the folder with models/ and text/"
    path = RESULTS / f"compress-forms-{given.model}.json"
    held = json.loads(path.read_text()) if path.exists() else {"model": given.model, "errors": [], "perplexities": []}
    model, tokenizer = eckart.load(str(given.shared / "models" / given.model))
    text = given.shared / "text"
    calibration = read_text(text / f"{TEXTS[given.model]}_calibration.txt")

    def keep():
        path.write_text(json.dumps(held, indent=1))

    if not held["errors"]:
        windows = read_windows(calibration, tokenizer, length=256, count=64)
        for row in Forms(model, windows).rows():
            print(json.dumps(row), flush=True)
            held["errors"].append(row)
        keep()
    if given.perplexity:
        inside = read_windows(read_text(text / f"{TEXTS[given.model]}_validation.txt"), tokenizer, length=256, count=64)

        def add(row):
            print(json.dumps(row), flush=True)
            held["perplexities"].append(row)
            keep()

        wanted = [(float(word), draw) for word in given.ratios.split(",") for draw in range(given.draws)]
        done = {(row["ratio"], row["draw"]) for row in held["perplexities"]}
        keys = [key for key in wanted if key not in done]
        perplexities(model, tokenizer, calibration, inside, keys, add)


if __name__ == "__main__":
    main()
