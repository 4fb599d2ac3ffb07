"""Heads that are never shared: clients share the trunk only, and a cache keeps late joiners from erasing the early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from cutlayer.contracts import SHARED, Framework
from cutlayer.methods.framework._cache import Cache, Cached, Micro
from cutlayer.methods.framework._cohort import check_options, cohort, ordered
from cutlayer.registry import method
from cutlayer.seeds import derive

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method("framework", paper="Split Learning without Local Weight Sharing, arXiv:2212.00250")
@dataclass(frozen=True)
class PrivateHeads(Framework):
    """Clients share the trunk and nothing else: parts of the model that they hold are never handed on nor averaged.

    So a server and a client that work together have no copy of a victim's head to invert its activations with. With
    ``form: sequential`` one trunk serves client after client; with ``parallel`` each has a trunk of its own, and the
    trunks are averaged after the round. Every client is evaluated, and saved, with its own part.

    Of published heads each starts from random weights of its own: ``heads: random`` with ``peft: full``. Language
    models start from one public base, and heads stay near it, so the server can invert them without any client: little
    protection is left. ``own-seed`` gives each client its own draw of the LoRA factors (the first has the run's).

    The server caches each client's newest ``cache`` steps: hidden states with labels. When a client that joined later
    trains while earlier ones are away, the trunk learns from its step and an old one of theirs, with weights 1 - w and
    w = ``cache_weight``; the client's own gradient is untouched. In the U-shape the server has no labels. It keeps the
    trunk's output instead, and holds the trunk to it by the relative squared distance. ``keeps: gradient`` trains again
    with the gradient of that output as it then was: a linear loss, which has no minimum. Where a late joiner raised the
    loss of early clients by 0.27, it made that 6.4, and the output 0.003 (60 steps of AdamW, see the test).

    A cached step costs B T (H + 1) numbers of 4 bytes (U-shape 2 B T H), and the cache itself is a store of private
    activations: ``forget`` drops a client's. The paper's: separate heads, both forms, the cache with labels. Ours: the
    U-shape, which old step comes when (in turn), and that it comes only for clients that sit out the round.
    """

    form: Literal["sequential", "parallel"] = "sequential"  # one trunk in turns, or a trunk for each, averaged
    heads: Literal["own-seed", "public", "random"] = "own-seed"  # where the clients' parts start from
    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    order: Literal["random", "listed"] = "listed"  # sequential: random is a new permutation each round
    moments: Literal["keep", "average", "reset"] = "average"  # parallel: of the trunks' optimizers
    cache: int = 4  # optimizer steps of each client that the server keeps; 0: none
    cache_weight: float = 0.5  # of an old step in the trunk's loss
    keeps: Literal["output", "gradient"] = "output"  # U-shape: what the server keeps beside the hidden states
    _cache: Cache = field(init=False, repr=False, compare=False)

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)
        if self.cache < 0:
            raise ValueError(f"cache is {self.cache}; it must be 0 or more")
        if not 0 <= self.cache_weight <= 1:
            raise ValueError(f"cache_weight is {self.cache_weight}; it must be at least 0 and at most 1")
        object.__setattr__(self, "_cache", Cache(self.cache))

    @property
    def merges(self) -> bool:
        """Of several trunks."""
        return self.form == "parallel"

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """One for all, or one for each."""
        return dict.fromkeys(clients, SHARED) if self.form == "sequential" else {client: client for client in clients}

    def start(
        self, client: str, clients: Sequence[str], initial: Mapping[str, Tensor], seed: int
    ) -> Mapping[str, Tensor]:
        """The client's own draw: of LoRA's A, or of every trained matrix of its part."""
        if self.heads == "public" or (self.heads == "own-seed" and client == clients[0]):
            return {}
        drawn = {}
        for name, tensor in initial.items():
            generator = torch.Generator().manual_seed(derive(seed, "start", client, name))
            if self.heads == "random" and tensor.dim() > 1:
                drawn[name] = torch.empty(tensor.shape).normal_(0.0, 0.02, generator=generator)
            elif self.heads == "own-seed" and ".lora_A." in name:  # as PEFT draws it
                bound = 1 / math.sqrt(math.prod(tensor.shape[1:]))
                drawn[name] = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
        return drawn

    async def round(self, run: Run, number: int) -> None:
        """Local steps, in turns or at once; then the trunks' average, where there are several."""
        clients = cohort(run, number, self.participation)
        if self.form == "sequential":
            for client in ordered(run, clients, self.order, number):
                await self._train(run, client, clients)
        else:
            await run.together(lambda client: self._train(run, client, clients), clients)
            await run.merge(clients, heads=False, trunks=True, moments=self.moments)
            for client in run.clients:  # those that sat out go on from there too; all trunks are at the server
                if client not in clients or run.presence.out(client):
                    slot = run.parts.server.slots[client]
                    shapes = {name: tuple(tensor.shape) for name, tensor in slot.get().items()}
                    slot.put(run.federated.aggregator.fit(run.federated.before, shapes))
        if number == 0 and self.cache:
            kept = sum(map(len, self._cache.entries.values()))
            most = self._cache.bytes / max(1, kept) * self.cache * len(run.clients)
            run.progress.note(f"the server's cache of activations will take about {most / 2**20:.1f} MiB")

    async def _train(self, run: Run, client: str, taking: Sequence[str]) -> None:
        joined = {name: one.joins for name, one in run.presence.clients.items()}
        away = [c for c in run.clients if c not in taking and joined[c] < joined[client]]
        for _ in range(min(self.local_steps, run.steps_left(client))):
            beside = self._cache.turn(away, run.counters.steps[client])

            def wrap(stop: Any, old: Sequence[Micro] = beside) -> Cached:
                return Cached(stop, self._cache, client, old, self.cache_weight, keeps=self.keeps)

            await run.step(client, wrap=wrap)

    def forget(self, client: str) -> None:
        """Drop all that the server keeps of a client's activations."""
        self._cache.forget(client)

    def evaluators(self, run: Run) -> Sequence[str]:
        """All: each has a part of its own."""
        return run.clients

    def state(self) -> Mapping[str, Any]:
        """The cache."""
        return self._cache.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state`` gave."""
        self._cache.restore(state)
