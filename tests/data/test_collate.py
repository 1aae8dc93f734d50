"""Batches of rows of different sizes, compared with loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import ANNOTATED_IMAGES, Graph, pack_graphs, pad, stack

quick = settings(max_examples=60, deadline=None, derandomize=True)


def test_rows_are_stacked_however_deep_they_are():
    rows = [{"a": np.full(2, i), "b": {"c": np.float32(i), "d": np.zeros((i * 0 + 1, 3))}} for i in range(3)]
    batch = stack(rows)
    assert batch["a"].tolist() == [[0, 0], [1, 1], [2, 2]] and batch["b"]["c"].tolist() == [0, 1, 2]
    assert batch["b"]["d"].shape == (3, 1, 3) and stack([np.int32(4), np.int32(5)]).tolist() == [4, 5]


@quick
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 5))
def test_padding_fills_and_cuts_row_by_row(counts, bound):
    rng = np.random.default_rng(0)
    rows = [
        {"id": np.int32(i), "boxes": {"xyxy": rng.random((n, 4), np.float32), "masks": rng.random((n, 2, 3)) > 0.5}}
        for i, n in enumerate(counts)
    ]
    batch = pad(boxes=bound)(rows)
    assert batch["id"].tolist() == list(range(len(counts)))
    assert batch["boxes"]["xyxy"].shape == (len(counts), bound, 4) and batch["boxes"]["masks"].dtype == bool
    for i, n in enumerate(counts):
        assert batch["boxes"]["cut"][i] == max(0, n - bound)
        for j in range(bound):
            assert batch["boxes"]["valid"][i, j] == (j < n)
            for name in ("xyxy", "masks"):
                wanted = rows[i]["boxes"][name][j] if j < n else np.zeros_like(batch["boxes"][name][i, j])
                np.testing.assert_array_equal(batch["boxes"][name][i, j], wanted)


def test_crowded_scenes_fit_into_one_shape():
    source, _ = ANNOTATED_IMAGES.open("builtin:crowded", resolution=32, masks=True)
    rows = [{"image": each.image, "boxes": each.boxes.arrays() | {"masks": each.masks}} for each in (source[i] for i in range(6))]
    batch = pad(boxes=12)(rows)
    assert batch["boxes"]["masks"].shape == (6, 12, 32, 32) and not batch["boxes"]["cut"].any()
    assert batch["boxes"]["valid"].sum(1).tolist() == [len(row["boxes"]["labels"]) for row in rows]


def graph(rng: np.random.Generator, nodes: int, edges: int, number: int) -> Graph:
    return Graph(
        senders=rng.integers(0, nodes, edges).astype(np.int32),
        receivers=rng.integers(0, nodes, edges).astype(np.int32),
        nodes={"features": rng.random((nodes, 3), np.float32), "train": rng.random(nodes) > 0.5},
        edges={"weight": rng.random(edges, np.float32)},
        values={"label": np.int32(number), "target": rng.random(2, np.float32)},
    )


@quick
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 8)), min_size=1, max_size=6),
    st.integers(2, 20), st.integers(0, 20), st.integers(2, 6),
)  # fmt: skip
def test_packed_graphs_pass_the_messages_that_each_passes_alone(sizes, nodes, edges, graphs):
    """What each node receives from its neighbours, by a loop over the graphs that fit, and nothing more is in the batch."""
    rng = np.random.default_rng(0)
    given_graphs = [graph(rng, *size, number) for number, size in enumerate(sizes)]
    batch = pack_graphs(nodes=nodes, edges=edges, graphs=graphs)([each.arrays() for each in given_graphs])
    for name, count in (("node", nodes), ("edge", edges), ("graph", graphs)):
        assert batch[f"{name}_mask"].shape == (count,)
    assert batch["nodes"]["features"].shape == (nodes, 3) and batch["values"]["target"].shape == (graphs, 2)

    received, sums, labels, used = [], [], [], [0, 0]
    for each in given_graphs:
        count = len(each.nodes["train"]), len(each.senders)
        if used[0] + count[0] > nodes - 1 or used[1] + count[1] > edges or len(labels) + 1 > graphs - 1:
            continue
        used = [used[0] + count[0], used[1] + count[1]]
        messages = np.zeros((count[0], 3))
        for sender, receiver, weight in zip(each.senders, each.receivers, each.edges["weight"]):
            messages[receiver] += weight * each.nodes["features"][sender]
        received.append(messages)
        sums.append(each.nodes["features"].sum(0))
        labels.append(int(each.values["label"]))
    assert batch["cut"] == len(sizes) - len(labels)
    assert [int(batch[f"{name}_mask"].sum()) for name in ("node", "edge", "graph")] == [*used, len(labels)]
    assert batch["values"]["label"][batch["graph_mask"]].tolist() == labels

    together = np.zeros((nodes, 3))
    np.add.at(together, batch["receivers"], batch["edges"]["weight"][:, None] * batch["nodes"]["features"][batch["senders"]])
    np.testing.assert_allclose(together[batch["node_mask"]], np.concatenate([np.zeros((0, 3)), *received]), atol=1e-5)
    pooled = np.zeros((graphs, 3))
    np.add.at(pooled, batch["node_graph"], batch["nodes"]["features"])
    np.testing.assert_allclose(pooled[batch["graph_mask"]], np.reshape(sums, (-1, 3)), atol=1e-5)
    assert not pooled[~batch["graph_mask"]].any() and not batch["node_mask"][-1] and not batch["graph_mask"][-1]
    assert (batch["receivers"][~batch["edge_mask"]] == nodes - 1).all() and (
        batch["senders"][~batch["edge_mask"]] == nodes - 1
    ).all()
