"""A run written out: every default spelled out, paths made absolute, as a tree and as YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from cutlayer import registry
from cutlayer.config_read import write
from cutlayer.config_types import CodecConfig, Spec

if TYPE_CHECKING:
    from cutlayer.config import ClientConfig, RunConfig


OTHER_KEYS = {"rate": "optimizer"}  # keys that name methods of a family of another name


def family_of(key: str) -> str:
    """The family of a key that names methods: mostly the key itself."""
    return OTHER_KEYS.get(key, key)


def family_keys(cls: type[RunConfig]) -> list[str]:
    """The keys of a run that name methods: those that are called like a family, and ``OTHER_KEYS``."""
    named = [key for key in cls.model_fields if key in registry.FAMILIES or key in OTHER_KEYS]
    return [key for key in named if key not in ("data", "optimizer")]


def mapped(config: RunConfig, change: Callable[[str, Spec], Spec]) -> RunConfig:
    """The run with every chosen method's spec changed by ``change(family, spec)``."""
    update: dict[str, Any] = {}
    for key in family_keys(type(config)):
        value, family = getattr(config, key), family_of(key)
        if isinstance(value, CodecConfig):
            legs = {"up": value.up, "down": value.down}
            update[key] = CodecConfig(**{leg: spec and change(family, spec) for leg, spec in legs.items()})
        elif isinstance(value, list):
            update[key] = [change(family, spec) for spec in value]
        else:
            update[key] = value and change(family, value)
    update["data"] = config.data.model_copy(update={"division": change("data", config.data.division)})
    return config.model_copy(update=update)


def with_files(config: RunConfig, base: Path | None) -> RunConfig:
    """The run with methods that are files named by absolute paths: from the current folder, then from ``base``."""

    def located(_: str, spec: Spec) -> Spec:
        found = _found(spec.name, base) if spec.name.endswith(".py") else None
        return Spec(name=str(found), **spec.options) if found else spec

    return mapped(config, located)


def _found(name: str, base: Path | None) -> Path | None:
    """The absolute path of what exists in the current folder or in ``base``."""
    paths = [Path(os.path.abspath(root / Path(name).expanduser())) for root in (Path.cwd(), base) if root is not None]
    return next((path for path in paths if path.exists()), None)


def filled(config: RunConfig) -> RunConfig:
    """The run with every option of every chosen method spelled out, and its length."""

    def whole(family: str, spec: Spec) -> Spec:
        defaults = {}
        for name, field in registry.option_fields(registry.load(family, spec.name)).items():
            if field.default is not dataclasses.MISSING:
                defaults[name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[name] = field.default_factory()
        return Spec(name=spec.name, **{**to_jsonable_python(defaults), **spec.options})

    return mapped(config, whole).model_copy(update=dict([config.length]))


def resolved(config: RunConfig, base: Path | None) -> RunConfig:
    """The run with absolute paths, so that it can be taken up from any folder.

    Args:
        config: a run whose paths are relative to the current folder or to ``base``.
        base: the run file's folder, or None.

    Raises:
        DataError: a data file is in neither folder and is no Hub data set either.
    """
    from cutlayer.data.sources import resolve_source

    config = with_files(config, base)
    data = config.data
    files = {key: resolve_source(source, base) for key in ("train", "eval") if (source := getattr(data, key))}
    update: dict[str, Any] = {"data": data.model_copy(update=files)}
    folder = _found(config.model, base)
    if folder is not None and folder.is_dir():
        update["model"] = str(folder)
    if isinstance(config.clients, list):
        update["clients"] = [_client_resolved(client, resolve_source, base) for client in config.clients]
    if config.record_wire is not None:
        update["record_wire"] = os.path.abspath(os.path.expanduser(config.record_wire))
    return config.model_copy(update=update)


def _client_resolved(
    client: ClientConfig, resolve: Callable[[str, Path | None], str], base: Path | None
) -> ClientConfig:
    if client.data is None:
        return client
    data = client.data.model_copy(update={"train": resolve(client.data.train, base)})
    return client.model_copy(update={"data": data})


def dump(config: RunConfig) -> str:
    """The YAML of a run with all defaults and all options of its methods; ``load_config`` reads it back as it was."""
    return write(tree_of(filled(config)))


def tree_of(config: RunConfig) -> dict[str, Any]:
    """The run as plain values, in the order of its keys, methods without options by their id alone."""
    tree = config.model_dump(mode="json")
    for family in family_keys(type(config)):
        tree[family] = _plain(tree[family])
    tree["data"]["division"] = _plain(tree["data"]["division"])
    if config.engine == type(config.engine)(name=config.engine.name):
        tree["engine"] = config.engine.name
    codec = {leg: _plain(spec) for leg, spec in tree["codec"].items()}
    tree["codec"] = "none" if list(codec.values()) == ["none", "none"] else codec
    if isinstance(config.clients, list):
        tree["clients"] = [client.model_dump(mode="json", exclude_none=True) for client in config.clients]
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(spec) for spec in value]
    if value is None:
        return "none"
    return value["name"] if list(value) == ["name"] else value
