"""The Protocol of frameworks: who trains when, over which stops, and what is merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cutlayer.values import SERVER, SHARED, Layout, Stop

if TYPE_CHECKING:
    from torch import Tensor

    from cutlayer.arrangement import Arrangement
    from cutlayer.driver import Run


class Framework(Protocol):
    """Family ``framework``: who trains when, against which slot, and what is merged.

    Subclass it: what has a body here is the default.
    """

    # Kinds of frameworks: set them in the class.
    travels: ClassVar[bool] = False  # the clients' parts are handed on, rather than each client keeping its own
    replans: ClassVar[bool] = False  # each round ends in a merge of heads (and of trunk copies), so cuts may move then
    joinable: ClassVar[bool] = False  # all train at once, each with a trunk of its own, which a mixing may make one
    personal: ClassVar[bool] = False  # clients end with parts of their own, so there are as many models
    asynchronous: ClassVar[bool] = False  # nobody waits: as many steps in a round as a client has time for
    moments: str = "keep"  # of trunks' optimizers at a merge: only with "average" do trunks' devices give them
    branches: int = 1  # models that are trained side by side, each by its part of all steps

    # What may depend on a framework's options: an attribute or a property.
    @property
    @abstractmethod
    def local_steps(self) -> int:
        """Optimizer steps of a client in a round."""

    @property
    @abstractmethod
    def participation(self) -> float:
        """The share of the selected clients that a round takes."""

    @property
    def cohort_size(self) -> int | None:
        """How many of the selected clients a round takes, where it is no share of them."""
        return None

    @property
    def pooled(self) -> bool:
        """Whether a slot makes one update for all clients of a step, not one for each."""
        return False

    @property
    def needs_step_tokens(self) -> bool:
        """Whether clients tell the label tokens of a step before the trunk's backward."""
        return False

    @property
    def merges(self) -> bool:
        """Whether the model is a merge, so that it needs an aggregator that makes one."""
        return False

    @property
    def optimizer_travels(self) -> bool:
        """Whether the optimizer's state goes along where a client's part is handed on; only then a client gives it."""
        return False

    @property
    def asks(self) -> Collection[str]:
        """The verbs that it asks clients for by itself, beside steps, merges and hand-overs; they refuse others."""
        return ()

    @property
    def takes(self) -> Collection[str]:
        """What it can follow of a selection's arrangement (``Arranger.gives``)."""
        return ()

    @property
    def needs(self) -> Collection[str]:
        """What of an arrangement a selection must give."""
        return ()

    @property
    def round_steps(self) -> int:
        """Optimizer steps of a client in a round; asynchronous: of the slowest."""
        return self.local_steps

    def layouts(
        self, given: Mapping[str, Layout], num_blocks: int, speeds: Mapping[str, float] | None
    ) -> Mapping[str, Layout]:
        """The cut of each client; by default as the run's partition has it.

        Args:
            given: the partition's, by client.
            num_blocks: of the model.
            speeds: FLOP/s by client, where the run has profiles.

        Raises:
            MethodError: the model or the clients do not fit this framework.
        """
        return given

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """The trunk slot of each client; by default one for all."""
        return dict.fromkeys(clients, SHARED)

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """The stops between the client's head and its tail, in order; by default one at the server.

        Raises:
            MethodError: the model or the clients do not fit this framework.
        """
        return [Stop(SERVER, self.slots(list(layouts))[client], layouts[client].middle)]

    def parties(self, clients: Sequence[str]) -> Sequence[str]:
        """The parties on its routes beside the clients and the server; no client can have the name of one."""
        return ()

    def reach(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """Every stop that the client may come to in the run; more than its route where that changes (``set_route``)."""
        return self.route(client, layouts)

    def following(self, arrangement: Arrangement) -> Framework:
        """This framework with what a selection arranged in the place of its own options."""
        return self

    def rerouted(self, arrangement: Arrangement, layouts: Mapping[str, Layout]) -> Mapping[str, Sequence[Stop]]:
        """The routes that an arrangement changes, by client."""
        return {}

    def start(
        self, client: str, clients: Sequence[str], initial: Mapping[str, Tensor], seed: int
    ) -> Mapping[str, Tensor]:
        """Those of a client's own tensors that start elsewhere than the run's model, whose values are ``initial``."""
        return {}

    def eligible(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """Who may train in round ``number``: the others help, or wait for their turn."""
        return clients

    def trainers(self, clients: Sequence[str]) -> Sequence[str]:
        """Who trains at all in a run."""
        return clients

    def line(self, client: str, clients: Sequence[str]) -> Sequence[str]:
        """The clients among whom this client's part is handed on: their steps are those of one schedule."""
        return clients if self.travels else [client]

    @abstractmethod
    async def round(self, run: Run, number: int) -> None:
        """One round. On return nothing is in flight."""

    @abstractmethod
    def evaluators(self, run: Run) -> Sequence[str]:
        """The clients whose parts, with their trunks, are the model (or the models) at the end of a round."""

    def state(self) -> Mapping[str, Any]:
        """What it must remember between rounds, for checkpoints: tensors, and what JSON can hold, by name."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state`` gave."""
