"""``cutlayer verify``: the proof, on a model of your own, that split equals unsplit."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cutlayer.cli.console import console, guarded, hush
from cutlayer.errors import MethodError, suggest

if TYPE_CHECKING:
    from cutlayer.models.verify import Comparison


class Task(StrEnum):
    """What a model is trained for."""

    causal = "causal"
    classification = "classification"


class Precision(StrEnum):
    """The type of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@guarded()
def verify(
    model: Annotated[str, typer.Argument(help="A model's name on the Hub, or a folder.")],
    cut: Annotated[int | None, typer.Option(min=0, help="Blocks of the head; by default several are tried.")] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Blocks of the tail (U-shape only).")] = None,
    partition: Annotated[str | None, typer.Option(help="two-part-split or u-shaped-split; by default both.")] = None,
    precision: Annotated[Precision, typer.Option(help="The type of the weights.")] = Precision.float32,
    attn_implementation: Annotated[str | None, typer.Option(help="As in Transformers: eager, sdpa, ...")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens to compare on.")] = 16,
    task: Annotated[Task, typer.Option(help="What the model is trained for.")] = Task.causal,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
) -> None:
    """Prove that the model, cut, computes what it computes uncut.

    Prints the largest difference of loss, logits and gradients for each cut. Exit code 0 if all are within the
    tolerance, 1 if one is beyond it, 2 if the model or the cut is refused.
    """
    from cutlayer import registry

    known = registry.names("partition")
    if partition is not None and partition not in known:
        raise MethodError(f"There is no partition '{partition}'.{suggest(partition, known)} Known: {', '.join(known)}.")

    from cutlayer.models.verify import verify as compare

    hush()
    compared = compare(
        model,
        cut=cut,
        tail=tail,
        partition=partition,
        precision=precision.value,
        attn_implementation=attn_implementation,
        tokens=tokens,
        task=task.value,
        device=device,
    )
    where = console()
    where.print(comparison_table(compared))
    beyond = [comparison for comparison in compared if not comparison.passed]
    if beyond:
        where.print(
            f"NOT EQUAL: {len(beyond)} of {len(compared)} cuts of {model} differ by more than the tolerance.",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    exact = sum(comparison.exact for comparison in compared)
    where.print(
        f"Split equals unsplit: all {len(compared)} cuts of {model} are within the tolerance, {exact} bit for bit.",
        soft_wrap=True,
    )


def comparison_table(compared: Sequence[Comparison]) -> Table:
    """One row for each cut: its blocks, the largest differences, and the verdict."""
    table = Table("partition", "head", "trunk", "tail", "loss", "logits", "gradients", "tolerance", "")
    for one in compared:
        blocks = [str(count) for count in (one.head_blocks, one.trunk_blocks, one.tail_blocks)]
        numbers = [f"{value:.1e}" if value else "0" for value in (one.loss, one.logits, one.gradients, one.tolerance)]
        table.add_row(one.partition, *blocks, *numbers, "exact" if one.exact else "ok" if one.passed else "DIFFERS")
    return table
