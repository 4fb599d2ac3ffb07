"""Settings of defenses as people write them, such as ``dp-forward(noise=0.3)+clip-noise``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cutlayer import registry
from cutlayer.config import RunConfig, load_config
from cutlayer.config_types import Spec
from cutlayer.config_write import tree_of
from cutlayer.errors import ConfigError

Setting = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
ONE = re.compile(r"\s*([\w./-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def named(specs: Sequence[Spec]) -> str:
    """Defenses that act together, as one name; ``none`` where there is none."""
    return "+".join(_named(spec.name, spec.options) for spec in specs) or "none"


def _named(name: str, options: Mapping[str, Any]) -> str:
    """With the options that are not as they would be by themselves."""
    usual = registry.option_fields(registry.load("defense", name))
    told = [f"{key}={_plain(value)}" for key, value in options.items() if value != usual[key].default]
    return f"{name}({','.join(told)})" if told else name


def _plain(value: Any) -> str:
    """A value as YAML has it in a line."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def listed(text: str) -> list[str]:
    """The settings of a text with commas between them."""
    return [part.strip() for part in _split(text, ",") if part.strip()]


def with_defense(config: RunConfig, setting: Setting) -> RunConfig:
    """The run with these defenses in place of its own.

    Raises:
        ConfigError: the setting cannot be read, or the run cannot have it.
    """
    if isinstance(setting, str):
        chosen: list[Any] = [_read(part) for part in _split(setting, "+")]
    else:
        chosen = [setting] if isinstance(setting, Mapping) else list(setting)
    tree = {key: value for key, value in tree_of(config).items() if value is not None}
    return load_config({**tree, "defense": chosen})


def _read(text: str) -> dict[str, Any]:
    found = ONE.fullmatch(text)
    if not found:
        raise ConfigError(
            [f"'{text}' is no setting of a defense. Write a name, or a name with options: dp-forward(noise=0.3)"],
            "the call",
        )
    options: dict[str, Any] = {"name": found[1]}
    for part in _split(found[2] or "", ","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError([f"'{part}' in '{text}' is no option. Write name=value, such as noise=0.3"], "the call")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError([f"'{value}' in '{text}' cannot be read as a value."], "the call") from error
    return options


def _split(text: str, mark: str) -> list[str]:
    """The parts of a text between marks that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]
