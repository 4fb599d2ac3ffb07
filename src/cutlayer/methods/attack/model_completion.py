"""Passive model completion: a head of the attacker's own on what the trained trunk gives, from a few labelled samples.

Fu et al., Label Inference Attacks Against Vertical Federated Learning, USENIX Security 2022; MixMatch: Berthelot et
al., NeurIPS 2019.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.audit.classes import samples_of
from cutlayer.audit.scores import Guesses
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._classes import standardised
from cutlayer.registry import method
from cutlayer.threat import Threat

SHARPER, MIXED = 0.8, 0.75  # MixMatch's temperature, and both parameters of its Beta distribution
LR, AVERAGED = 2e-3, 0.99  # of Adam; how much of the averaged head stays in a step
RAMP = 0.4  # of the steps, over which the weight of unlabelled samples rises


@method(
    "attack",
    paper="Fu et al., https://www.usenix.org/conference/usenixsecurity22/presentation/fu-chong",
    needs=["a U-shaped split, and rows of one label each: a classifier, or completions of one token"],
)
@dataclass
class ModelCompletion(Attack):
    """Train a head on what the trunk gives (step 5), from a few labelled samples and all others without labels.

    By MixMatch: labels of the others are guessed from two views of each (dropout on its state), sharpened, and mixed
    with the known ones. The paper's attacker is a party without labels, with its own part of the model; here it is the
    server, in a U-shaped run. It reads no gradient: what it finds above the same head on an untrained model's states is
    what training put there. Ours: one linear layer on standardised states, and a shorter average of its weights.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "return_activations"), knows=("classes", "labelled"), target="labels",
        tail_at="client", classes="several", labelled=10,
    )  # fmt: skip
    steps: Annotated[int, Field(ge=1)] = 500
    batch: Annotated[int, Field(ge=1)] = 32  # labelled samples in a step, and as many others
    unlabelled: Annotated[float, Field(ge=0)] = 50.0  # weight of the samples without a label; 0: they are not used
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2  # on states

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The class of each sample by the head."""
        found = samples_of(view.exchanges, view.labelled, ["return_activations"])
        states, classes = standardised(found.sent["return_activations"]), torch.tensor(list(view.classes))
        told = (found.known[:, None] == classes[None]).nonzero()  # a labelled sample, and the number of its class
        generator = view.generator("model-completion")
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
            head = self._trained(states, told[:, 0], functional.one_hot(told[:, 1], len(classes)).float())
        with torch.no_grad():
            return found.guesses(classes[head(states).argmax(1)])

    def _trained(self, states: Tensor, told: Tensor, labels: Tensor) -> nn.Module:
        """The averaged head.

        Args:
            states: of all samples, [N,H].
            told: which of them have a label, [M].
            labels: these, as one of K, [M,K].
        """
        others = torch.ones(len(states), dtype=torch.bool)
        others[told] = False
        rest = states[others]
        head = nn.Linear(states.shape[1], labels.shape[1])
        averaged = copy.deepcopy(head)
        optimizer = torch.optim.Adam(head.parameters(), lr=LR)
        for step in range(self.steps):
            chosen = torch.randint(len(told), (self.batch,))
            known, right = self._view(states[told[chosen]]), labels[chosen]
            if self.unlabelled and len(rest):
                some = rest[torch.randint(len(rest), (self.batch,))]
                loss = self._mixmatch(head, known, right, some, min(1.0, step / (RAMP * self.steps)))
            else:
                loss = functional.cross_entropy(head(known), right)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for kept, new in zip(averaged.parameters(), head.parameters(), strict=True):
                    kept.lerp_(new, 1 - AVERAGED)
        return averaged

    def _mixmatch(self, head: nn.Module, known: Tensor, right: Tensor, some: Tensor, ramp: float) -> Tensor:
        """The loss of labelled states with their labels and of others."""
        views = [self._view(some) for _ in range(2)]
        with torch.no_grad():
            guess = torch.stack([head(view).softmax(1) for view in views]).mean(0) ** (1 / SHARPER)
            guess = guess / guess.sum(1, keepdim=True)
        inputs, targets = torch.cat([known, *views]), torch.cat([right, guess, guess])
        share = float(torch.distributions.Beta(MIXED, MIXED).sample())
        share, order = max(share, 1 - share), torch.randperm(len(inputs))
        inputs, targets = (share * one + (1 - share) * one[order] for one in (inputs, targets))
        said, count = head(inputs), len(known)
        loss = functional.cross_entropy(said[:count], targets[:count])
        apart: Tensor = (said[count:].softmax(1) - targets[count:]).square().mean()
        return loss + self.unlabelled * ramp * apart

    def _view(self, states: Tensor) -> Tensor:
        return functional.dropout(states, self.dropout)
