"""The ``optimizer`` of a run: PyTorch's optimizers by PyTorch's argument names, Transformers' schedules."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cutlayer.config_words import sentence, show
from cutlayer.errors import suggest

if TYPE_CHECKING:
    from torch.optim import Optimizer

SCHEDULES = (  # Transformers' SchedulerType, without those that need more than a number of warm-up steps
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
)  # fmt: skip
UNFIT = {
    "lbfgs": "it evaluates the loss several times a step, which a split step cannot",
    "sparseadam": "it needs sparse gradients, which no part of a language model here gives",
}
UNFIT_ARGUMENTS = ("capturable", "differentiable")  # for captured graphs and for gradients through the update


def _warmup(value: float) -> float:
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("must be a whole number of steps, or a fraction of the run below 1")
    return int(value)


class OptimizerConfig(BaseModel):
    """Every party's optimizer; all further keys are arguments of the PyTorch class, by PyTorch's names."""

    model_config = ConfigDict(extra="allow", strict=True, validate_assignment=True)
    name: Annotated[str, AfterValidator(str.lower)] = "adamw"
    lr: Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)] = 2e-4  # PyTorch cannot scale float32 by more
    schedule: str = "constant"
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_warmup)] = 0  # steps; below 1 a fraction

    @property
    def arguments(self) -> dict[str, Any]:
        """What goes to the PyTorch class beside the parameters and ``lr``."""
        given = self.__pydantic_extra__ or {}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

    @property
    def torch_class(self) -> type[Optimizer]:
        """The PyTorch class of that name."""
        return optimizer_classes()[self.name]

    def warmup_steps(self, total: int) -> int:
        """How many of ``total`` optimizer steps are warm-up (a fraction is rounded up, as Transformers does)."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * total)


def optimizer_classes() -> dict[str, type[Optimizer]]:
    """PyTorch's optimizers by lower-case name, without those that cannot drive a split step."""
    from torch import optim

    return {
        name.lower(): value
        for name, value in vars(optim).items()
        if isinstance(value, type)
        and issubclass(value, optim.Optimizer)
        and value is not optim.Optimizer
        and name.lower() not in UNFIT
    }


def optimizer_problems(config: OptimizerConfig) -> list[str]:
    """Everything that is wrong with the name, the arguments, the schedule and the warm-up."""
    problems = _schedule_problems(config)
    known = optimizer_classes()
    if config.name in UNFIT:
        return [*problems, f"optimizer.name is '{config.name}', which does not work here: {UNFIT[config.name]}."]
    if config.name not in known:
        listed = ", ".join(sorted(known))
        return [*problems, f"optimizer.name is '{config.name}'.{suggest(config.name, known)} Allowed: {listed}."]
    found = _argument_problems(config, known[config.name])
    if not found:
        found = _refusal(config, known[config.name])
    return [*problems, *found]


def _schedule_problems(config: OptimizerConfig) -> list[str]:
    if config.schedule not in SCHEDULES:
        near = suggest(config.schedule, SCHEDULES)
        return [f"optimizer.schedule is '{config.schedule}'.{near} Allowed: {', '.join(SCHEDULES)}."]
    if config.schedule == "polynomial" and config.lr <= 1e-7:
        return [f"optimizer.lr is {config.lr}, but the schedule 'polynomial' ends at 1e-7. Take a higher rate."]
    if config.schedule == "constant" and config.warmup:
        return [
            f"optimizer.warmup is {config.warmup}, but the schedule 'constant' has no warm-up. "
            "Take optimizer.schedule: constant_with_warmup."
        ]
    return []


def _argument_problems(config: OptimizerConfig, cls: type[Optimizer]) -> list[str]:
    allowed = [key for key in inspect.signature(cls).parameters if key not in ("params", "lr", *UNFIT_ARGUMENTS)]
    hints = typing.get_type_hints(cls.__init__)
    problems = []
    for key, value in config.arguments.items():
        if key not in allowed:
            near = suggest(key, [*OptimizerConfig.model_fields, *allowed])
            listed = ", ".join([*OptimizerConfig.model_fields, *allowed])
            problems.append(f"optimizer.{key}: '{config.name}' has no such argument.{near} Keys: {listed}.")
            continue
        if (number := hints[key]) in (float, int) and isinstance(value, bool | str):
            kind = "a number" if number is float else "a whole number"
            problems.append(f"optimizer.{key} is {show(value)}: must be {kind}.")
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            said = dict.fromkeys(_said(details) for details in error.errors() if details["type"] != "is_instance_of")
            problems.append(f"optimizer.{key} is {show(config.__pydantic_extra__[key])}: {'; '.join(said)}.")  # type: ignore[index]
    return problems


def _said(details: Mapping[str, Any]) -> str:
    kind = {"float_parsing": "float_type", "int_parsing": "int_type", "bool_parsing": "bool_type"}
    if details["type"] == "tuple_type":
        return "must be a list of numbers"
    if details["type"] in ("missing", "too_long"):
        return f"has too {'few' if details['type'] == 'missing' else 'many'} entries"
    where = [str(part + 1) for part in details["loc"] if isinstance(part, int)]
    said = sentence(kind.get(details["type"], details["type"]), details["msg"], details.get("ctx", {}))
    return f"entry {where[0]} {said}" if where else said


def _refusal(config: OptimizerConfig, cls: type[Optimizer]) -> list[str]:
    """What PyTorch itself says of the values, tried on a parameter of one element."""
    import torch

    try:
        arguments: dict[str, Any] = {"lr": config.lr, **config.arguments}
        cls([torch.nn.Parameter(torch.zeros(1, 1))], **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return [f"optimizer: PyTorch's {cls.__name__} refuses these values: {str(error).rstrip('.')}."]
    return []
