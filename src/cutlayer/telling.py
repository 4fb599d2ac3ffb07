"""What makes a client's sketch, in a simulation and at a client in a process of its own."""

from __future__ import annotations

from cutlayer.agreed import AgreedSecret
from cutlayer.arrangement import Arranger
from cutlayer.build import Data, task_of
from cutlayer.config import RunConfig
from cutlayer.models.segment import Base
from cutlayer.seeds import derive
from cutlayer.sketches import Teller, simulated_secrets


def teller_of(
    config: RunConfig, base: Base, data: Data, name: str, *, secret: bytes | None = None,
    agreed: AgreedSecret | None = None,
) -> Teller | None:  # fmt: skip
    """What makes a client's sketch; None where the run's selection asks for none.

    Args:
        config: the run.
        base: the client's own blocks, or more of the model.
        data: the client's, and in a simulation that of all.
        name: the client's.
        secret: of this client alone; None: a simulated client's.
        agreed: what the clients agreed on among themselves, for hashes of clients elsewhere.
    """
    selection = config.build("selection")
    if not isinstance(selection, Arranger):
        return None
    shared: int | None
    if secret is None:
        (shared, own), common = simulated_secrets(config.seed, name), data.evaluation
    else:  # elsewhere: nothing that the server knows, and no text that the others have not
        shared, own, common = agreed_number(agreed), derive("secret of a client", secret.hex()), []
    return Teller(
        selection.asks, name, data.train[name], data.collate,
        int(base.model.config.num_labels) if task_of(config) == "classification" else 0,
        vocabulary=base.model.get_input_embeddings().weight.shape[0], seed=config.seed,
        shared=shared, own=own, common=common,
    )  # fmt: skip


def agreed_number(agreed: AgreedSecret | None) -> int | None:
    """The number from which the clients' projections are drawn; None: they have agreed on no secret."""
    return None if agreed is None else int.from_bytes(agreed.key("projections"), "big")
