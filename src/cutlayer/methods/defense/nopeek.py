"""NoPeek: less distance correlation between the text and what is shown of it (Vepakomma et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.errors import MethodError
from cutlayer.methods.defense._dcor import squared_correlation
from cutlayer.registry import method
from cutlayer.threat import Target


@method("defense", paper="Vepakomma et al., arXiv:2008.09161", needs=["something trained in the client's head"])
@dataclass
class Nopeek(Defense):
    """Add the distance correlation of the input embeddings and the head's output to what the head is trained with.

    The paper's term is ``alpha`` times the correlation, whose best size depends on the loss; its square is taken, as it
    has a smooth gradient. With ``rho`` (ours) it is weighed so that its gradient at the cut has that part of the norm
    of the one that came back, which is alike for all models. Nothing is changed on the wire. On a language model expect
    a weak defense or a ruinous one: the residual stream keeps which token it was.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs",)
    learning: ClassVar[bool] = True
    rho: Annotated[float, Field(ge=0)] | None = 0.1  # of the norm of the gradient that came back; null: alpha counts
    alpha: Annotated[float, Field(ge=0)] | None = None  # the term's weight, where rho is null
    positions: Annotated[int, Field(ge=8)] = 512  # tokens of a micro-batch that are compared, at most

    _embedding: Tensor | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.rho is None) == (self.alpha is None):
            raise ValueError("give one of rho and alpha, and null for the other")

    def prepare(self, ground: Ground) -> None:
        """Take the public embeddings.

        Raises:
            MethodError: nothing below the cut is trained, so that nothing can be pushed away.
        """
        if not ground.head_trained:
            raise MethodError(
                "defense 'nopeek' needs something to train in the client's head, and there is nothing. Give it a block "
                "(partition.head_blocks), or train the embedding (peft: full)."
            )
        self._embedding = ground.embedding()

    def penalty(self, hidden: Tensor, about: Shown) -> Tensor | None:
        """``alpha`` times the squared correlation, or what has ``rho`` times the norm of the gradient; at step 10."""
        strength = self.alpha if self.rho is None else self.rho
        if about.leg != "send_activations" or not strength:
            return None
        assert self._embedding is not None
        real = about.real.flatten().nonzero().squeeze(1)
        if len(real) > self.positions:
            draw = torch.Generator().manual_seed(int(about.batch.input_ids.sum()))  # which are compared is no secret
            real = real[torch.randperm(len(real), generator=draw)[: self.positions]]
        tokens = about.batch.input_ids.flatten()[real].to(self._embedding.device)
        inputs = self._embedding[tokens].to(hidden.device, torch.float32)
        with torch.enable_grad():
            found = squared_correlation(inputs, hidden.flatten(0, 1)[real.to(hidden.device)].float())
        if self.rho is None:
            return strength * found
        assert about.gradient is not None
        (slope,) = torch.autograd.grad(found, hidden, retain_graph=True)
        own = float(slope.float().norm())
        return found * (strength * float(about.gradient.float().norm()) / own) if own > 0 else None

    def spent(self, ground: Ground, sends: Sends) -> Privacy | None:
        """Empirical."""
        why = "it makes what is shown less like the text and bounds nothing"
        return Privacy(
            "a penalty on the distance correlation of text and hidden states", "empirical", "inputs", "none",
            sends.most, why=why, not_covered="all: an attack may find what the correlation does not measure.",
        )  # fmt: skip
