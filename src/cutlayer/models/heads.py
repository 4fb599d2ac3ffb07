"""The classification head that a checkpoint already has: whether there is one, and for which classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cutlayer.errors import ModelError
from cutlayer.models.loading import cannot_load, class_of, load_config
from cutlayer.models.making import making


@dataclass(frozen=True)
class Head:
    """The classes of a trained head.

    ``names`` are in the order of their numbers (``LABEL_0``, ... where nobody named them); ``numbers`` has the number
    of each name that the configuration knows.
    """

    names: Sequence[str]
    numbers: Mapping[str, int]

    @property
    def unnamed(self) -> bool:
        """Whether the names are those that Transformers makes up."""
        return set(self.numbers) == {f"LABEL_{number}" for number in range(len(self.names))}


def head_of(model: str | os.PathLike[str]) -> Head | None:
    """The head of a checkpoint of a classifier, or None where its weights hold none.

    Raises:
        ModelError: it has a head, but one for another task or only a part of one, or names its classes in two ways.
    """
    config = load_config(model)
    cls = class_of(model, config, "classification")
    try:  # on the meta device nothing is read but the names and shapes of the tensors
        with making():
            loaded, info = cls.from_pretrained(
                model, config=config, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
            )
    except Exception as error:
        raise ModelError(cannot_load(model, error)) from error
    own = {name for name, _ in loaded.named_parameters() if not name.startswith(f"{loaded.base_model_prefix}.")}
    if wrong := sorted(info["mismatched_keys"]):
        name, shape, expected = wrong[0]
        raise ModelError(
            f"The checkpoint of '{model}' has '{name}' in the shape {list(shape)}; by its config.json (with "
            f"{config.num_labels} classes) it should be {list(expected)}. Use a checkpoint whose weights and "
            "config.json agree, or one without a classification head."
        )
    found = own - set(info["missing_keys"])
    if not found:
        return None
    made_as = getattr(config, "architectures", None) or [cls.__name__]
    if found != own or cls.__name__ not in made_as:
        raise ModelError(
            f"'{model}' has a head, but not that of a {cls.__name__}: it was saved as {', '.join(made_as)}, with "
            f"{len(found)} of the {len(own)} tensors. Use a checkpoint with a whole classification head, or with none."
        )
    purpose = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if purpose != "single_label_classification":  # one output without a problem_type is a number to Transformers
        raise ModelError(
            f"The head of '{model}' was trained for the problem_type '{purpose}', and here each text has one class of "
            "several. Use a checkpoint without a classification head: it gets a new one."
        )
    return _named(model, config)


def head_by_config(model: str | os.PathLike[str]) -> Head | None:
    """What ``head_of`` finds, as far as the configuration says it: no file of weights is opened.

    Raises:
        ModelError: it names its classes in two ways.
    """
    config = load_config(model)
    cls = class_of(model, config, "classification")
    return _named(model, config) if cls.__name__ in (getattr(config, "architectures", None) or ()) else None


def _named(model: str | os.PathLike[str], config: Any) -> Head:
    names = {int(number): str(name) for number, name in config.id2label.items()}
    told = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    numbers = {name: number for number, name in names.items()}
    if sorted(names) != list(range(len(names))) or any(
        number not in names or numbers.get(name, number) != number for name, number in told.items()
    ):
        raise ModelError(
            f"The config.json of '{model}' contradicts itself: id2label is {names}, label2id is {told}. Correct one."
        )
    return Head([names[number] for number in range(len(names))], {**told, **numbers})
