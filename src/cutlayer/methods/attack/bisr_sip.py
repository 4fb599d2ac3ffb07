"""SIP, the forward stage of BiSR: an inverter that is trained on public text through the public head.

Chen et al., Unveiling the Vulnerability of Private Fine-Tuning in Split-Based Frameworks for Large Language Models: A
Bidirectionally Enhanced Attack, CCS 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.audit.scores import MISSING, Guesses
from cutlayer.audit.spans import spans_of
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.registry import method
from cutlayer.threat import Threat

DROPPED, DECAY = 0.1, 1e-5  # dropout and weight decay, as in the authors' code
HELD_OUT = 0.1  # of the public texts, on which the best epoch is chosen
Pair = tuple[Tensor, Tensor]  # the states [L,H] of a text, and its tokens [L]


class Inverter(nn.Module):
    """From hidden states [B,T,H] to logits [B,T,V], or to input embeddings [B,T,H] whose nearest row is the token."""

    def __init__(self, kind: str, hidden: int, width: int, vocabulary: int, embedding: Tensor | None) -> None:
        super().__init__()
        layers = {"gru": nn.GRU, "lstm": nn.LSTM}
        self.recurrent = layers[kind](hidden, width, batch_first=True) if kind in layers else None
        out = vocabulary if embedding is None else embedding.shape[1]
        self.drop, self.last = nn.Dropout(DROPPED), nn.Linear(hidden if self.recurrent is None else width, out)
        self.embedding = embedding

    def forward(self, hidden: Tensor) -> Tensor:
        """What it says of each position."""
        if self.recurrent is not None:
            hidden, _ = self.recurrent(hidden)
        said: Tensor = self.last(self.drop(hidden))
        return said

    def loss(self, hidden: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        """Of states [B,T,H] of tokens [B,T], over the real positions [B,T]: without any shift."""
        said, wanted = self(hidden)[real], tokens[real]
        if self.embedding is None:
            loss: Tensor = functional.cross_entropy(said, wanted)
            return loss
        rows = self.embedding[wanted]
        apart: Tensor = functional.mse_loss(said, rows) + (1 - functional.cosine_similarity(said, rows)).mean()
        return apart

    def tokens(self, hidden: Tensor) -> Tensor:
        """The most likely tokens [B,T]."""
        said: Tensor = self(hidden)
        if self.embedding is not None:  # the nearest row
            said = 2 * said @ self.embedding.T - self.embedding.square().sum(-1)
        return said.argmax(-1)


@method(
    "attack",
    paper="Chen et al., BiSR, arXiv:2409.00960",
    needs=["public text with the same tokenizer (--aux)", "a model whose base weights are public"],
)
@dataclass
class BisrSip(Attack):
    """Train an inverter on public text through the public head, and apply it to the private hidden states (SIP).

    A GRU and a linear layer to the vocabulary, as in the authors' code, or the survey's form to input embeddings
    (``output: embedding``, decoded by the nearest row). The states are scaled to unit variance first, which is ours,
    as is the choice of the best epoch by the share of held-out tokens (the authors' is by ROUGE-L).
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations",), knows=("architecture", "weights", "auxiliary"), target="inputs"
    )
    inverter: Literal["gru", "lstm", "linear"] = "gru"
    output: Literal["logits", "embedding"] = "logits"
    width: Annotated[int, Field(ge=1)] = 256  # of the recurrent layer
    epochs: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=1)] = 6  # texts
    lr: Annotated[float, Field(gt=0)] = 1e-3
    texts: Annotated[int, Field(ge=2)] = 1000  # public ones that are used at most

    fitted: Inverter | None = field(init=False, default=None, repr=False)
    scale: float = field(init=False, default=1.0, repr=False)  # of the states
    held_out: float = field(init=False, default=0.0, repr=False)  # the share of public tokens that it finds

    def prepare(self, view: View) -> None:
        """Train the inverter."""
        public = view.public
        texts = [text[: public.longest] for text in view.auxiliary[: self.texts]]
        states = [public.run_head(view.cut, text[None])[0].cpu() for text in texts]
        self.scale = 1 / max(float(torch.cat(states).std()), 1e-12)
        pairs = [(state * self.scale, text) for state, text in zip(states, texts, strict=True)]
        kept = max(1, round(HELD_OUT * len(pairs)))
        generator = view.generator("bisr-sip")
        order = torch.randperm(len(pairs), generator=generator).tolist()
        learned, chosen = [pairs[n] for n in order[kept:]], [pairs[n] for n in order[:kept]]
        self.fitted, self.held_out = self._train(learned, chosen, view)

    def _train(self, pairs: Sequence[Pair], kept: Sequence[Pair], view: View) -> tuple[Inverter, float]:
        """The inverter of the best epoch, and the share of held-out tokens that it finds."""
        public = view.public
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=view.generator("bisr-sip start"))))
            rows = public.embedding.cpu() if self.output == "embedding" else None
            made = Inverter(self.inverter, public.embedding.shape[1], self.width, public.vocabulary, rows)
            optimizer = torch.optim.Adam(made.parameters(), lr=self.lr, weight_decay=DECAY)
            best, score = copy.deepcopy(made.state_dict()), -1.0
            for _ in range(self.epochs):
                made.train()
                order = torch.randperm(len(pairs)).tolist()
                for batch in _padded([pairs[n] for n in order], self.batch):
                    optimizer.zero_grad()
                    made.loss(*batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                made.eval()
                found = _share(made, _padded(kept, self.batch))
                if found > score:
                    best, score = copy.deepcopy(made.state_dict()), found
        made.load_state_dict(best)
        return made.eval(), score

    def finish(self, view: View) -> Guesses:
        """The tokens of all micro-batches that were read."""
        assert self.fitted is not None
        tokens = {}
        for one in view.exchanges:
            hidden = one.hidden("send_activations").float()
            found = torch.full(hidden.shape[:2], MISSING, dtype=torch.int64)
            with torch.no_grad():
                for span in spans_of(hidden, one.about):
                    said = self.fitted.tokens(span.of(hidden)[None] * self.scale)[0]
                    found[span.row, span.start : span.stop] = said
            tokens[one.key] = found
        return Guesses(tokens, notes={"held_out": self.held_out})


def _padded(pairs: Sequence[Pair], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """States [B,T,H], tokens [B,T] and where they are real [B,T], in batches."""
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        states = nn.utils.rnn.pad_sequence([state for state, _ in part], batch_first=True)
        tokens = nn.utils.rnn.pad_sequence([text for _, text in part], batch_first=True, padding_value=MISSING)
        yield states, tokens, tokens != MISSING


def _share(made: Inverter, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The share of tokens that it finds."""
    right = count = 0
    with torch.no_grad():
        for states, tokens, real in batches:
            right += int((made.tokens(states) == tokens)[real].sum())
            count += int(real.sum())
    return right / max(1, count)
