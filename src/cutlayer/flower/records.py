"""What passes between ServerApp and ClientApp in Flower's messages, beside the arrays of step 11."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from cutlayer.errors import NetworkError

OURS = "cutlayer"  # the record that says where our server listens, and for which round
METRICS = "metrics"


def arrays_of(content: Any) -> tuple[str, dict[str, Tensor]]:
    """The one ArrayRecord of a message, with its key, which is the strategy's to choose.

    Raises:
        NetworkError: there is none, or more than one.
    """
    if len(content.array_records) != 1:
        raise NetworkError(
            f"The message has {len(content.array_records)} array records, where a round needs one: the merged part of "
            "the model. Take a strategy that sends one."
        )
    key, record = next(iter(content.array_records.items()))
    return key, dict(record.to_torch_state_dict())


def record_of(state: Mapping[str, Tensor]) -> Any:
    """Tensors as Flower carries them."""
    return ArrayRecord(OrderedDict((name, tensor.detach().cpu()) for name, tensor in state.items()))


def reply_of(key: str, state: Mapping[str, Tensor] | None, metrics: Mapping[str, float]) -> Any:
    """The content of a node's answer."""
    records = {METRICS: MetricRecord(dict(metrics))}
    return RecordDict(records if state is None else {key: record_of(state), **records})


def parts_of(content: Any) -> list[dict[str, Tensor]]:
    """The tensors of a node's answer, by record."""
    return [dict(record.to_torch_state_dict()) for record in content.array_records.values()]


def counts_of(content: Any) -> list[float]:
    """By how much a node's answer weighs, as it says."""
    return [float(record["num-examples"]) for record in content.metric_records.values() if "num-examples" in record]
