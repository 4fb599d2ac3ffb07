"""The Protocol of defenses: what a client does to its own text, tensors and gradients before any byte is made.

A defense runs at the client. What it may know is public, but for the client's own data, labels and secret. Shapes: B
rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from cutlayer.noise import Noise
from cutlayer.threat import Target
from cutlayer.values import Batch, Example, Layout

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Leg = Literal["send_activations", "send_gradients"]


@dataclass(frozen=True)
class Ground:
    """What a defense is told of the client before its first batch, all of it public.

    Args:
        layout: which blocks the client holds.
        task: ``causal`` or ``classification``.
        length: the most tokens of a row.
        head_trained: whether the client trains something below step 3.
        tail_trained: whether it trains something above step 7.
        embedding: gives the public input embeddings [V,H]; the same tensor for all clients of a base.
        look: gives the hidden states [B,T,H] of tokens [B,T] as the public head makes them.
        pull: gives the gradient [B,T,H] of the summed loss at hidden states [B,T,H], by the public tail and random
            labels; None where the client has no tail.
        guess: gives logits [B,T,V] of tokens [B,T] by the public head and tail with nothing between them: a poor
            language model, but one that the client has and everybody knows; None where the client has no tail.
        tokens_of: gives the tokens of a piece of text, without special ones.
        measured: gives the norms [B] of single texts' [B,T] gradients at all that the client trains, of the summed loss
            of random labels by the public head and tail with nothing between them; None where it has no tail.
        trunk_trained: says whether something is trained between head and tail, or above the head.
        classes: of a classifier.
        specials: tokens with a task of their own (end of text and the like), and rows of the embedding that are of no
            token.
        seed: the run's, for draws that may be known.
        packed: whether a row has several texts, or parts of them (``data.packing``).
        learned: whether a defense of the run learns at the client.
    """

    layout: Layout
    task: str
    length: int
    head_trained: bool
    tail_trained: bool
    embedding: Callable[[], Tensor]
    look: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor] | None
    guess: Callable[[Tensor], Tensor] | None
    tokens_of: Callable[[str], Sequence[int]]
    measured: Callable[[Tensor], Tensor] | None
    trunk_trained: Callable[[], bool]
    classes: int
    specials: Sequence[int]
    seed: int
    packed: bool = False
    learned: bool = False

    @property
    def labels_sent(self) -> bool:
        """Whether the server gets the labels (the two-part split)."""
        return not self.layout.tail_at_client


@dataclass(frozen=True)
class Shown:
    """What a defense knows of a tensor that is about to leave.

    Args:
        leg: the step that it leaves in.
        batch: the micro-batch that it is made of.
        training: whether it is trained with; else it is evaluated.
        to_sum: what a gradient is multiplied by to be that of the sum, not the mean, over label tokens.
        noise: private randomness that covers these tensors; the same for the same ones.
        noise_of: private randomness of the record in this row; the same in each step that it is in.
        updates: how many optimizer steps what the defenses learn has had.
        gradient: for a penalty at step 10 what came back [B,T,H] for what was shown.
    """

    leg: Leg
    batch: Batch
    training: bool
    to_sum: float
    noise: Callable[..., Noise]
    noise_of: Callable[[int], Noise]
    updates: int = 0
    gradient: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """Which positions [B,T] are no padding."""
        mask, ids = self.batch.attention_mask, self.batch.input_ids
        return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


@dataclass(frozen=True)
class Learned:
    """What a defense trains: a module, of which nothing ever leaves the client, by AdamW with this learning rate."""

    module: nn.Module
    lr: float


@dataclass(frozen=True)
class Sends:
    """How often a record left at most: in training (once an epoch) and for evaluation; other records each."""

    training: int
    evaluation: int

    @property
    def most(self) -> int:
        """The larger of the two."""
        return max(self.training, self.evaluation)


@dataclass(frozen=True)
class Privacy:
    """What a defense has spent.

    ``epsilon`` is None where nothing can be claimed, and ``why`` then says why. ``kind``: ``local`` (of the messages),
    ``central`` (of the trained weights only), ``metric`` (epsilon is of one unit of distance), or ``empirical``.
    ``neighbours`` says what may differ in two inputs that look alike; ``clip`` is the norm that a record was cut to,
    ``sensitivity`` how far two can be apart, ``scale`` the noise's (a Gaussian's standard deviation, a Laplace's b).
    """

    mechanism: str
    kind: Literal["local", "central", "metric", "empirical"]
    protects: Target
    neighbours: str
    releases: int
    epsilon: float | None = None
    delta: float | None = None
    why: str = ""
    clip: float | None = None
    sensitivity: float | None = None
    scale: float | None = None
    not_covered: str = ""

    def told(self) -> dict[str, Any]:
        """As ``summary.json`` has it."""
        return asdict(self)


def spent_in_words(told: Mapping[str, Any]) -> str:
    """What a defense has spent, as ``Privacy.told`` has it with its name, in a sentence."""
    name = f"defense '{told['defense']}'"
    if "mechanism" not in told:
        return f"{name}: nothing is counted"
    if told["epsilon"] is None:
        return f"{name}: {told['mechanism']}; no epsilon is claimed, since {told['why']}"
    if told["kind"] == "metric":
        bound = f"log-odds of at most {told['epsilon']:.3g} a unit of distance (metric privacy, no epsilon)"
    else:
        bound = f"epsilon {told['epsilon']:.3g} (delta {told['delta']:.0e})"
    return (
        f"{name}: {told['mechanism']}; {bound} for "
        f"{told['neighbours']}, after at most {told['releases']} releases of a record. "
        f"Not covered: {told['not_covered']}"
    )


class Defense(Protocol):
    """Family ``defense``: what is perturbed at the client before bytes leave. Subclass it; hooks do nothing by default.

    Several defenses of a run act in the order in which it lists them.
    """

    protects: ClassVar[tuple[Target, ...]]  # what it is there to hide
    two_tails: ClassVar[bool] = False  # a second tail learns the true labels, never leaves the client, and predicts
    by_example: ClassVar[bool] = False  # what the client trains is updated by gradients of single examples
    learning: ClassVar[bool] = False  # it has ``learns``, or a penalty: it needs a step 10 to learn in

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What of a run it cannot work with, a sentence each; asked before a model is read."""
        yield from ()

    def prepare(self, ground: Ground) -> None:
        """Before the first batch: take norms and tables from what is public."""

    def know(self, examples: Sequence[Example]) -> None:
        """Before the first batch, after ``prepare``: what the client trains with, which is private."""

    def learns(self, ground: Ground) -> Learned | None:
        """After ``prepare``, once: what it trains, with its first weights; None: nothing.

        PyTorch's generator is seeded for it by the run's seed. The gradients of the penalty and of what is shown and
        received through the module are its own; it is updated with the client's part of the model, kept in the
        client's checkpoints, and neither merged nor handed on.
        """
        return None

    @property
    def fresh(self) -> bool:
        """Whether ``example`` is to be called anew in each epoch, or once for each."""
        return False

    def example(self, example: Example, noise: Noise) -> Example:
        """Step 2: an example as it is to be trained with, of the same length and with labels at the same places.

        The noise is of this example: it has the same key for the same one, unless ``fresh``, and no other has it.
        """
        return example

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """Steps 3 and 7: what is shown [B,T,H] in place of this; at step 3 on the graph."""
        return shown

    def received(self, hidden: Tensor, about: Shown) -> Tensor:
        """Step 6: what the tail gets [B,T,H] in place of what came; on the graph in training."""
        return hidden

    def penalty(self, hidden: Tensor, about: Shown) -> Tensor | None:
        """A loss that is added to the task's; None: there is none.

        Step 10 (``about.leg`` is ``send_activations``): on the head's output [B,T,H] before any defense. Step 6
        (``send_gradients``): on what came [B,T,H], before ``received``.
        """
        return None

    def coefficients(self, logits: Tensor, labels: Tensor, about: Shown) -> Tensor | None:
        """Step 6: what is backpropagated at the logits in place of the loss's own gradient, of the sum; None: that."""
        return None

    def learned(self, labels: Tensor, about: Shown) -> Tensor | None:
        """Step 6: with ``two_tails``, what the tail that is seen learns, and nothing else, in place of labels.

        Of [B,T], or a classifier's [B], as many for each as one likes: [B,T,M], [B,M]. Each counts alike.
        """
        return None

    def shares(self, norms: Tensor) -> Tensor:
        """Step 10: with ``by_example``, what each example's gradient [B] is multiplied by before they are summed.

        The norms [B] are of all that the client trains, of the sum over an example's labels.
        """
        return torch.ones_like(norms)

    def stirred(self, total: Mapping[str, Tensor], noise: Noise) -> Mapping[str, Tensor]:
        """Step 10: with ``by_example``, the sum of a step's gradients, as it is to be used."""
        return total

    @abstractmethod
    def spent(self, ground: Ground, sends: Sends) -> Privacy | None:
        """What it has spent when a record left so often; None: it hides nothing that could be counted."""
