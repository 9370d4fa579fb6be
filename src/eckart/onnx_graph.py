"""What is done to an ONNX graph before it is written: tidied, and its weights in few bits. No idea what a model is.

Notation: a MatMul has a weight of shape (K, N), K features in and N out; each column is cut into blocks of consecutive
entries, and every block has one scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Quantize = Literal["none", "int8", "int4", "int2"]
BITS: dict[Quantize, int] = {"int8": 8, "int4": 4, "int2": 2}
BLOCKS = {8: (128, 64, 32, 16), 4: (32, 16), 2: (32,)}
"""Lengths of blocks to choose from: in few bits a block of 128 entries costs too much accuracy."""
FINE = 8
"""Bits of what a model cannot bear coarser: tables of embeddings, and corrections of rounded weights."""
CONTRIB = "com.microsoft"


def tidy_(graph: Any) -> None:
    """Take out of a graph what tells of the machine that made it, and turn constant weights as they are multiplied.

    Args:
        graph: A `GraphProto`. Modified. A weight that is read in another place, too (a tied embedding), is kept once,
            as it is, and turned when the file is opened.
    """
    from onnx import helper, numpy_helper

    graph.doc_string = ""
    del graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    uses = Counter(name for node in graph.node for name in node.input)
    held = {tensor.name: tensor for tensor in graph.initializer}
    turned: dict[str, str] = {}
    for node in graph.node:
        tensor = held.get(node.input[0]) if node.op_type == "Transpose" else None
        if tensor is not None and len(tensor.dims) == 2 and uses[tensor.name] == 1:
            turned[node.output[0]] = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).T.copy(), tensor.name))
    kept = [node for node in graph.node if node.output[0] not in turned]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = turned.get(name, name)
    # The exporter turns small weights itself, and so holds a tied one twice.
    tables = _tables(kept) & held.keys()
    again: dict[str, Any] = {}
    for name in sorted(tables):
        table = numpy_helper.to_array(held[name])
        for node in [node for node in kept if node.op_type == "MatMul"]:
            other = held.get(node.input[1])
            if other is None or tuple(other.dims) != table.shape[::-1]:
                continue
            if np.array_equal(numpy_helper.to_array(other).T, table):
                again[name] = helper.make_node("Transpose", [name], [f"{name}.turned"], perm=[1, 0])
                node.input[1] = f"{name}.turned"
    _set_nodes(graph, [*again.values(), *kept])


def share_heads_(graph: Any) -> None:
    """Let attention read keys and values that queries share as they are, where they are first repeated for each query.

    The operator repeats them itself, in the same order, so that the result is the same to the bit; but what is repeated
    in the graph is written out anew for every token, and grows with what was read.

    Args:
        graph: A `GraphProto`, tidied. Modified.
    """
    from onnx import numpy_helper

    held = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}

    def repeated(name: str) -> str | None:
        """What keys or values are repeats of along their heads, the second of their four axes."""
        for kind in ("Reshape", "Expand"):
            node = made.get(name)
            if node is None or node.op_type != kind:
                return None
            name = node.input[0]
        node = made.get(name)
        axes = held.get(node.input[1]) if node is not None and node.op_type == "Unsqueeze" else None
        if node is None or axes is None or numpy_helper.to_array(axes).ravel().tolist() != [2]:
            return None
        return node.input[0]

    for node in graph.node:
        if node.op_type == "Attention" and node.domain == "":
            keys, values = repeated(node.input[1]), repeated(node.input[2])
            if keys is not None and values is not None:
                node.input[1], node.input[2] = keys, values
    _set_nodes(graph, [*graph.node])


def quantize_(model: Any, how: Quantize, fine: Collection[str] = ()) -> None:
    """Keep constant weights as 8-, 4- or 2-bit integers with a scale for every block of a column (or row, of a table).

    A product with one reads its activations as 8-bit integers, too, where the machine has the instructions. Tables of
    embeddings, and weights that are tied to one, stay at 8 bits: they decide the logits. What is no weight of a linear
    layer or table stays float32.

    Args:
        model: A `ModelProto`, tidied. Modified.
        how: `int8`, `int4` or `int2`; `none` does nothing.
        fine: Names of weights that stay at 8 bits, too.
    """
    from onnx import helper, numpy_helper

    if how == "none":
        return
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    turned = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in held
    }
    tables = _tables(graph.node)
    stored: dict[str, tuple[int, int]] = {}

    def store(name: str, rows: NDArray[np.float32], bits: int) -> tuple[int, int] | None:
        """Add the integers and scales of a weight of shape (N, K), once; give its bits and length of blocks."""
        block = block_of(rows.shape[1], bits, table=name in tables)
        if name not in stored and block is not None:
            stored[name] = bits, block
            packed, scales = pack(rows, *stored[name])
            graph.initializer.append(numpy_helper.from_array(packed, f"{name}.integers"))
            graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scales"))
        return stored.get(name)

    nodes = []
    for node in graph.node:
        made = []
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = all(given.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not given.get("transA", 0)
        product = node.op_type == "MatMul" or (node.op_type == "Gemm" and plain)
        source = node.input[1] if product else node.input[0] if node.op_type == "Gather" else ""
        name = turned.get(source, source)
        tensor = held.get(name)
        # Of a table only the rows are stored, which is what a look-up and a turned product read.
        as_rows = not product or source in turned or bool(given.get("transB", 0))
        fits = as_rows or name not in tables if product else name in tables
        if tensor is not None and len(tensor.dims) == 2 and fits:
            array = numpy_helper.to_array(tensor)
            rows = array if as_rows else array.T
            bits = FINE if name in tables or name in fine else BITS[how]
            format_ = store(name, rows, bits) if array.dtype == np.float32 and array.size else None
            if format_ is not None:
                attributes: dict[str, Any] = {"bits": format_[0], "block_size": format_[1]}
                integers, scales = f"{name}.integers", f"{name}.scales"
                if product:
                    attributes |= {"K": rows.shape[1], "N": rows.shape[0], "accuracy_level": 4}
                    inputs = [node.input[0], integers, scales]
                    biased = len(node.input) > 2
                    outputs = [f"{node.output[0]}.product"] if biased else node.output
                    made = [helper.make_node("MatMulNBits", inputs, outputs, domain=CONTRIB, **attributes)]
                    if biased:
                        made.append(helper.make_node("Add", [outputs[0], node.input[2]], node.output))
                else:
                    attributes |= {"gather_axis": 0, "quantize_axis": 1}
                    # The product wants (rows, blocks, block), the look-up (rows, entries).
                    flat, lines = f"{name}.flat", f"{name}.lines"
                    graph.initializer.append(numpy_helper.from_array(np.array([len(rows), -1]), f"{name}.shape"))
                    inputs = [flat, node.input[1], lines]
                    made = [
                        helper.make_node("Reshape", [integers, f"{name}.shape"], [flat]),
                        helper.make_node("Reshape", [scales, f"{name}.shape"], [lines]),
                        helper.make_node("GatherBlockQuantized", inputs, node.output, domain=CONTRIB, **attributes),
                    ]
        nodes += made or [node]
    _set_nodes(graph, nodes)
    if CONTRIB not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def _tables(nodes: Sequence[Any]) -> set[str]:
    """The names of what is looked up by token."""
    tokens = {"input_ids"}
    for node in nodes:
        if node.op_type in ("Reshape", "Cast", "Identity") and node.input[0] in tokens:
            tokens.add(node.output[0])
    return {node.input[0] for node in nodes if node.op_type == "Gather" and node.input[1] in tokens}


def block_of(entries: int, bits: int, *, table: bool = False) -> int | None:
    """Choose the length of the blocks that stores a column in the fewest bytes, its padding and scales counted.

    Args:
        entries: Of a column, or of a table's row.
        bits: Of an integer: 8, 4 or 2.
        table: Rows are read as they lie, so that padding would become part of them.

    Returns:
        One of `BLOCKS`, the longest of equals; None where no block fits a table, which stays as it is.

    >>> block_of(1024, 8), block_of(64, 8), block_of(100, 8, table=True)
    (128, 64, None)
    """
    lengths = [length for length in BLOCKS[bits] if not table or entries % length == 0]
    return min(sorted(lengths, reverse=True), key=lambda length: _column_bytes(entries, bits, length), default=None)


def packed_bytes(shape: tuple[int, int], bits: int) -> int:
    """Count what a weight of shape (N, K) takes as integers and scales.

    >>> packed_bytes((10, 64), 4), packed_bytes((10, 64), 8)
    (400, 680)
    """
    block = block_of(shape[1], bits)
    assert block is not None
    return shape[0] * _column_bytes(shape[1], bits, block)


def _column_bytes(entries: int, bits: int, block: int) -> int:
    return -(-entries // block) * (block * bits // 8 + 4)


def pack(rows: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round a weight to integers, symmetrically about zero, by onnxruntime's own code.

    Args:
        rows: Shape (N, K). Not modified.
        bits: 8, 4 or 2.
        block: Entries that share a scale.

    Returns:
        Integers, shape (N, blocks, block * bits / 8), where 2**(bits - 1) stands for zero and of several in a byte the
        first are the low bits; and scales, shape (N, blocks). The last block is filled up with zeros.
    """
    from onnxruntime.capi import _pybind_state  # what its own quantizer calls

    native: Any = _pybind_state
    count, entries = rows.shape
    blocks = -(-entries // block)
    columns = np.ascontiguousarray(np.pad(rows, ((0, 0), (0, blocks * block - entries))).T)
    packed = np.zeros((count, blocks, block * bits // 8), np.uint8)
    scales = np.zeros((count, blocks), np.float32)
    zeros = np.zeros((count, -(-blocks * bits // 8)), np.uint8)
    quantize = getattr(native, f"quantize_matmul_{bits}bits")
    quantize(packed, columns, scales, zeros, block, count, blocks * block, True)
    return packed, scales


def unpack(packed: NDArray[np.uint8], scales: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Multiply integers with their scales.

    Args:
        packed: From `pack`, shape (N, blocks, bytes). Not modified.
        scales: From `pack`, shape (N, blocks). Not modified.
        bits: As for `pack`.

    Returns:
        Shape (N, blocks * block), with the zeros that the last block was filled up with.
    """
    parts = np.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    values = parts.reshape(*scales.shape, -1).astype(np.float32) - 2 ** (bits - 1)
    return (values * scales[..., None]).reshape(len(scales), -1)


def rounded(rows: NDArray[np.float32], bits: int, *, table: bool = False) -> NDArray[np.float32]:
    """Give the weight that a file computes with, if this one is exported in so many bits.

    What is rounded already is not changed, so that it can be saved and exported later.

    Args:
        rows: Shape (N, K). Not modified.
        bits: 8, 4 or 2.
        table: It is looked up by token.

    Returns:
        Shape (N, K).

    >>> rounded(np.array([[-8.0, 0.2, 3.4]], np.float32), 4)
    array([[-8.,  0.,  3.]], dtype=float32)
    """
    block = block_of(rows.shape[1], bits, table=table)
    return rows if block is None else unpack(*pack(rows, bits, block), bits)[:, : rows.shape[1]]


def _set_nodes(graph: Any, nodes: list[Any]) -> None:
    """Give a graph its nodes, and drop what is not used any more."""
    wanted = {entry.name for entry in graph.output}
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    held = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(held)
