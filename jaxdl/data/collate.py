"""From rows to a batch: by stacking what has one shape, by padding to a bound what has not, and by packing graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = np.ndarray | np.generic | float | dict[str, Any]
"""An array or a number, or a dict of such, of dicts of such …"""
Collate = Callable[[Sequence[Any]], Any]
"""Rows to a batch. Its shapes must not depend on the rows, so that one compiled program serves all batches."""


def stack(rows: Sequence[Row]) -> Row:
    """All rows along a new first axis."""
    if isinstance(rows[0], dict):
        return {name: stack([row[name] for row in rows]) for name in rows[0]}
    return np.stack(rows)


def pad(**bounds: int) -> Collate:
    """`pad(boxes=20)`: in each row `row["boxes"]` is a dict of arrays with one first axis, of any length; in the batch these are filled up with zeros, or cut, to 20. Everything else is stacked.

    `batch["boxes"]` has, beside the arrays `B 20 ...`, `valid` (`B 20` bool), false for padding, and `cut` (`B` int32), how many of a row did not fit.
    """

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = stack([{name: value for name, value in row.items() if name not in bounds} for row in rows])
        return batch | {name: stack([_padded(row[name], bound) for row in rows]) for name, bound in bounds.items()}

    return collate


def _padded(arrays: dict[str, np.ndarray], bound: int) -> dict[str, np.ndarray]:
    (count,) = {len(array) for array in arrays.values()}
    kept = {name: _filled(array, bound) for name, array in arrays.items()}
    return kept | {"valid": np.arange(bound) < count, "cut": np.int32(max(0, count - bound))}


def _filled(array: np.ndarray, bound: int) -> np.ndarray:
    filled = np.zeros((bound, *array.shape[1:]), array.dtype)
    filled[: len(array)] = array[:bound]
    return filled


def pack_graphs(*, nodes: int, edges: int, graphs: int) -> Collate:
    """Graphs, as `Graph.arrays` gives them, to one graph of exactly `nodes` nodes, `edges` edges and `graphs` graphs that are not connected with each other.

    The batch has the fields of `Graph`, with `N = nodes`, `E = edges` and a first axis `G = graphs` in `values`, and:
    - `node_graph` (`N` int32), the number of the graph of each node, for sums over graphs;
    - `node_mask`, `edge_mask`, `graph_mask` (bool), false for padding;
    - `cut` (int32), how many of the graphs were left out because they did not fit. Each is taken while there is room, smaller ones after a larger one too.

    The last node and the last graph are always padding, and padding edges join that node with itself, as in jraph: what is padded never reaches what is real.
    """

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "senders": np.full(edges, nodes - 1, np.int32),
            "receivers": np.full(edges, nodes - 1, np.int32),
            "node_graph": np.full(nodes, graphs - 1, np.int32),
            **{f"{part}_mask": np.zeros(count, bool) for part, count in (("node", nodes), ("edge", edges), ("graph", graphs))},
            **{
                part: {name: np.zeros((count, *array.shape[skip:]), array.dtype) for name, array in rows[0][part].items()}
                for part, count, skip in (("nodes", nodes, 1), ("edges", edges, 1), ("values", graphs, 0))
            },
        }
        node = edge = graph = 0
        for row in rows:
            node_count, edge_count = len(next(iter(row["nodes"].values()))), len(row["senders"])
            if node + node_count >= nodes or edge + edge_count > edges or graph + 1 >= graphs:
                continue
            own_nodes, own_edges = slice(node, node + node_count), slice(edge, edge + edge_count)
            for part, place in (("nodes", own_nodes), ("edges", own_edges), ("values", graph)):
                for name, array in row[part].items():
                    batch[part][name][place] = array
            batch["senders"][own_edges] = row["senders"] + node
            batch["receivers"][own_edges] = row["receivers"] + node
            batch["node_graph"][own_nodes] = graph
            batch["node_mask"][own_nodes] = batch["edge_mask"][own_edges] = batch["graph_mask"][graph] = True
            node, edge, graph = node + node_count, edge + edge_count, graph + 1
        return batch | {"cut": np.int32(len(rows) - graph)}

    return collate
