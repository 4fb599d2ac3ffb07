"""What can be refused before a row or a weight is read: the device, the folders, and what does not fit the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cutlayer.assembly import check_somebody_trains, party_between, routes_of
from cutlayer.build import layouts_of, open_model, task_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER
from cutlayer.errors import ConfigError, CutlayerError, ModelError, suggest
from cutlayer.models.families import Anatomy, anatomy
from cutlayer.models.loading import class_of, device_named
from cutlayer.models.making import making
from cutlayer.models.verify import refuse_unasked
from cutlayer.outputs import check_places
from cutlayer.presence import Routes


def preflight(config: RunConfig, out: Path | None = None) -> None:
    """Look at all that can be looked at without data and weights.

    Args:
        config: a checked run with absolute paths.
        out: the folder of a new run; None where it goes on in its own.

    Raises:
        CutlayerError: all mistakes found.
    """
    looks: list[Callable[[], Any]] = [lambda: device_named(config.device), lambda: check_model(config)]
    if out is not None:
        looks.append(lambda: check_places(out, config.record_wire))
    _together(looks)


def _together(looks: Sequence[Callable[[], Any]]) -> None:
    """Raise what is found: one mistake as it is, several as one error."""
    found: list[CutlayerError] = []
    for look in looks:
        try:
            look()
        except CutlayerError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        each = [error.problems if isinstance(error, ConfigError) else [str(error)] for error in found]
        raise ConfigError([problem for problems in each for problem in problems], "the run")


def check_model(config: RunConfig) -> tuple[Any, Any, Anatomy]:
    """Refuse a cut, an attention or an adapter that does not fit the model.

    Returns:
        the model's configuration, the model without weights (device meta), and where its parts are.

    Raises:
        CutlayerError: the model is not known or cannot be cut, or something does not fit it.
    """
    found, _ = open_model(config)
    task = task_of(config)
    cls = class_of(config.model, found, task)
    try:
        model = _empty(cls, found)
    except Exception as error:
        raise ModelError(f"The model '{config.model}' cannot be made: {_short(error)}.") from error
    parts = anatomy(model, causal=task == "causal")
    _together([
        lambda: _check_attention(config.attn_implementation, model, found),
        lambda: config.build("peft").check(model, parts, task=task),
        lambda: refuse_unasked(model, parts, when=config.verify),
        lambda: _check_routes(config, parts.num_blocks),
        lambda: _check_engine(config, parts.num_blocks),
    ])  # fmt: skip
    return found, model, parts


def _check_routes(config: RunConfig, num_blocks: int) -> None:
    """Refuse routes that cannot be, that nobody is ever there for, and profiles of parties that are on none."""
    routes = routes_of(config, layouts_of(config, num_blocks))
    _together([lambda: check_somebody_trains(config, routes), lambda: _check_parties(config, routes)])


def _check_engine(config: RunConfig, num_blocks: int) -> None:
    if config.engine.name == "ray":
        from cutlayer.cluster import check

        check(config, num_blocks)


def _check_parties(config: RunConfig, routes: Routes) -> None:
    """Refuse profiles of parties that the run does not have."""
    there = [SERVER, *dict.fromkeys(s.party for stops in routes.values() for s in stops), *party_between(config)]
    known = [name for name in dict.fromkeys(there) if name not in config.client_names]
    wrong = [name for name in config.profiles if name not in known]
    if wrong:
        raise ConfigError(
            [
                f"profiles.{name}: the run has no party '{name}' beside its clients.{suggest(name, known)} It has: "
                f"{', '.join(known)}."
                for name in wrong
            ],
            "the run",
        )


def _empty(cls: Any, found: Any, **options: Any) -> Any:
    with making(), torch.device("meta"):
        return cls._from_config(copy.deepcopy(found), dtype=torch.get_default_dtype(), **options)


def _check_attention(wanted: str | None, model: Any, found: Any) -> None:
    if wanted is None:
        return
    try:
        _empty(type(model), found, attn_implementation=wanted)
    except Exception as error:
        raise ConfigError([f"attn_implementation is '{wanted}'{_why(wanted, model, error)}"], "the run") from error


def _why(wanted: str, model: Any, error: Exception) -> str:
    """Why an attention cannot be had."""
    if wanted in ALL_ATTENTION_FUNCTIONS.valid_keys() or "/" in wanted:
        return f", which cannot be had here: {_short(error)}. Take eager, or leave it out."
    known = ["eager"]
    known += ["sdpa"] if model._supports_sdpa else []
    known += ["flash_attention_2", "flash_attention_3"] if model._supports_flash_attn else []
    known += ["flex_attention"] if model._supports_flex_attn else []
    return f".{suggest(wanted, known)} '{model.config.model_type}' has: {', '.join(known)}."


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".")
