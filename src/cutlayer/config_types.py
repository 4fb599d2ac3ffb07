"""The forms that values of a run file may take: a method, several methods, a codec, a profile, a count."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


class Tree(BaseModel):
    """A part of a run: unknown keys and values of another type are mistakes."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, ser_json_inf_nan="constants")


NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # of a client
Count = Annotated[int, Field(ge=1)]
Round = Annotated[int, Field(ge=0)]
Chance = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Format = Literal["text", "prompt-completion", "messages", "classification"]


class Spec(Tree):
    """A chosen method: its id and its options. In YAML ``topk`` or ``{name: topk, ratio: 0.1}``."""

    model_config = ConfigDict(extra="allow")
    name: Text

    @property
    def options(self) -> dict[str, Any]:
        """All options that were given, by name."""
        return dict(self.__pydantic_extra__ or {})


def _spec(value: Any) -> Any:
    if not isinstance(value, str | Mapping | Spec):
        raise ValueError("must be a method's id, or {name: id, option: value}")
    return {"name": value} if isinstance(value, str) else value


def _no_spec(value: Any) -> Any:
    return None if value is None or value == "none" else _spec(value)


def _specs(value: Any) -> Any:
    if value is None or value == "none":
        return []
    return [_spec(v) for v in (value if isinstance(value, list) else [value])]


One = Annotated[Spec, BeforeValidator(_spec)]
Maybe = Annotated[Spec | None, BeforeValidator(_no_spec)]
Many = Annotated[list[Spec], BeforeValidator(_specs)]


class CodecConfig(Tree):
    """The codec of each direction: up from the client to the server, and down."""

    up: Maybe = None
    down: Maybe = None


def _legs(value: Any) -> Any:
    if isinstance(value, CodecConfig):
        return value
    value = _no_spec(value)
    if isinstance(value, Spec) or (isinstance(value, Mapping) and "name" in value):
        return {"up": value, "down": value}
    return {} if value is None else value


def _precision(value: Any) -> Any:
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return short.get(value, value) if isinstance(value, str) else value


def _profile(value: Any) -> Any:
    if value is not None and not isinstance(value, str | Mapping):
        raise ValueError("must be a preset's name, or a mapping of numbers")
    return value


def _profiles(value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError("must not be an empty list; give presets or numbers to draw from")
        return [_profile(one) for one in value]
    return _profile(value)


def _losses(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | list)):
        raise ValueError("must be a probability, or a list of rounds")
    return value


def _counted(value: Any) -> str:
    return "rounds" if isinstance(value, list) else "probability"


Losses = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("probability")] | Annotated[list[Round], Tag("rounds")],
    Discriminator(_counted),
    BeforeValidator(_losses),
]  # a probability, or rounds
Codec = Annotated[CodecConfig, BeforeValidator(_legs)]  # one for all legs, or {up: ..., down: ...}, or none
Precision = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(_precision)]
Profile = Annotated[str | dict[str, Any] | None, BeforeValidator(_profile)]
Profiles = Annotated[str | dict[str, Any] | list[str | dict[str, Any]] | None, BeforeValidator(_profiles)]
