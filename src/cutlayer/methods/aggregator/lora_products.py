"""Adapters of unequal ranks are merged by their products, not by their factors.

Of each adapted matrix client i has A_i [r_i, d_in] and B_i [d_out, r_i] (PEFT's layout; its update is alpha/r B_i A_i).
Averaging the factors gives mean(B) mean(A), with cross terms that nobody trained, and needs equal ranks. The weighted
mean of the products is the product of the concatenated factors, exactly::

    [w_1 B_1 | ... | w_n B_n] [A_1; ...; A_n] = sum_i w_i B_i A_i          rank at most sum_i r_i

and the best that a receiver of rank r can get of it are its r largest singular directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from cutlayer.contracts import Aggregator, State
from cutlayer.methods.aggregator._mean import holders_of, shares_of, weighted_mean
from cutlayer.ranks import balanced, fresh_rows, pairs, product_norm, widened
from cutlayer.registry import method

MOMENTS = "optimizer/"


@method("aggregator", paper="Lin et al., HSplitLoRA, arXiv:2505.02795")
@dataclass
class LoraProducts(Aggregator):
    """The weighted mean of the adapters' products, cut by SVD to the rank of each receiver; ranks may differ.

    From HSplitLoRA: the exact ("noise-free") mean by concatenation, and its truncation from QR factors, so that no
    matrix [d_out, d_in] is ever made. From SplitFT (arXiv:2604.26388): the balanced factors B = U S^1/2 and
    A = S^1/2 V^T, and how a rank grows, with rows drawn after Kaiming for A and zero columns for B. Ours: all is
    computed in float64; the merged state holds the concatenation already in those balanced factors, largest direction
    first, so that it is no larger than the mean's own rank asks for and a receiver's part of it is a slice; directions
    that are numerically zero are replaced as if the rank had grown, since A = 0 and B = 0 would never train again; the
    new rows follow from the tensor's name.

    The scaling alpha/r is taken to be the same for all ranks, as ``peft: lora`` has it for a layer. Everything that is
    no factor is averaged as by ``fedavg``. A factor's directions after a merge are not those before, so optimizer state
    of factors is not merged.
    """

    reconciles: ClassVar[bool] = True

    weight_by: Literal["examples", "tokens", "uniform"] = "examples"
    how: Literal["svd", "pad"] = "svd"  # pad: average the factors, padded with zeros (biased; to compare with)
    discarded: float = field(default=0.0, init=False, compare=False)  # relative Frobenius norm lost in the last fit

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """Pairs of factors by their products, of any rank; the rest by its mean."""
        names = {name for state in states.values() for name in state}
        found = pairs(names)
        factors = {*found, *found.values()}
        plain = {name for name in names if name not in factors and not _is_moment_of(name, factors)}
        merged = weighted_mean(states, weights, plain)
        for a, b in found.items():
            shares = shares_of(holders_of(a, states), weights)
            ups = [states[client][b].double() * share for client, share in shares.items()]
            downs = [states[client][a].double() for client in shares]
            kind = states[next(iter(shares))][a].dtype
            if self.how == "svd":
                up, down = balanced(torch.cat(ups, dim=1), torch.cat(downs, dim=0))
            else:
                rank = max(down.shape[0] for down in downs)
                up = torch.stack([widened(u, 1, rank) for u in ups]).sum(dim=0)
                scaled = [d * share for d, share in zip(downs, shares.values(), strict=True)]
                down = torch.stack([widened(d, 0, rank) for d in scaled]).sum(dim=0)
            merged |= {a: down.to(kind), b: up.to(kind)}
        return merged

    def fit(self, merged: State, shapes: Mapping[str, Sequence[int]]) -> State:
        """The first directions of each pair, as many as the receiver's rank; new ones where there are fewer."""
        fitted = {name: merged[name] for name in shapes if name in merged}
        lost = [0.0]
        for a, b in pairs(fitted).items():
            rank = shapes[a][0]
            down, up = merged[a], merged[b]
            lost.append(product_norm(up[:, rank:], down[rank:]) / (product_norm(up, down) or 1.0))
            live = int(up[:, :rank].ne(0).any(dim=0).sum()) if self.how == "svd" else min(rank, len(down))
            down = down[:live]
            if live < rank:
                down = torch.cat([down, fresh_rows(a, rank, down)])
            fitted |= {a: down.contiguous(), b: widened(up[:, :live], 1, rank).contiguous()}
        self.discarded = max(lost)
        return fitted


def _is_moment_of(name: str, factors: set[str]) -> bool:
    return name.startswith(MOMENTS) and name.removeprefix(MOMENTS).rpartition("/")[0] in factors
