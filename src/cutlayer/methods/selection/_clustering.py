"""Clusters of clients by their sketches: similar clients together, or sets of similar ones to mix from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def units(vectors: np.ndarray) -> np.ndarray:
    """Rows [N,D] at length 1, on which Euclidean distance orders as the cosine does; rows of nothing stay nothing."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths, lengths, 1.0))


def k_means(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The cluster of each point [N], by k-means++ from a fixed seed; no more clusters than there are unlike points."""
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(points.round(12), axis=0)))
    if count == 1:
        return np.zeros(len(points), dtype=int)
    return np.asarray(KMeans(count, n_init=10, random_state=seed % 2**32).fit_predict(points))


def by_silhouette(points: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """k-means with the one of ``counts`` whose clusters lie furthest apart (mean silhouette); the first of equals."""
    from sklearn.metrics import silhouette_score

    found = [k_means(points, count, seed) for count in counts]
    if len(found) == 1:
        return found[0]
    scores = [
        silhouette_score(points, labels) if 1 < len(np.unique(labels)) < len(points) else -1.0 for labels in found
    ]
    return found[int(np.argmax(scores))]


def agglomerated(distances: np.ndarray, *, count: int | None, threshold: float) -> np.ndarray:
    """Average linkage on distances [N,N], cut at ``count`` clusters or, without, where the mean distance exceeds."""
    from sklearn.cluster import AgglomerativeClustering

    if len(distances) == 1:
        return np.zeros(1, dtype=int)
    model = AgglomerativeClustering(
        n_clusters=count, distance_threshold=threshold if count is None else None, metric="precomputed",
        linkage="average",
    )  # fmt: skip
    return np.asarray(model.fit_predict(distances))


def members(clients: Sequence[str], labels: np.ndarray) -> list[list[str]]:
    """The clients of each cluster, in the order of the clients; clusters by their first member."""
    found: dict[int, list[str]] = {}
    for client, label in zip(clients, labels.tolist(), strict=True):
        found.setdefault(label, []).append(client)
    return list(found.values())
