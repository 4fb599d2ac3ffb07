"""The lengths of what each label takes off the gradient, ``||J^T W_c||`` for all of a vocabulary, in closed form.

Below the last norm and the head a label ``c`` takes ``J^T W_c`` off the gradient: ``J`` the norm's Jacobian, ``W_c``
the head's row. With weight ``g``, centring ``C`` (of a LayerNorm; nothing of an RMSNorm), ``n = C h / r`` and ``r`` the
root mean square, ``J^T u = C (g u - n mean(n g u)) / r``. Shapes: L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.public import PublicModel

ALIKE = 1e-4  # relative, for a form of norm to be the model's


def squared_lengths(public: PublicModel, hidden: Tensor, logits: Tensor) -> Tensor | None:
    """``||J^T W_c||^2`` [L,V] at states [L,H]; None where the top is no norm and linear head that is known.

    Args:
        public: the base model.
        hidden: what enters the norm.
        logits: what the head gives there, by which it is seen whether the form is the model's.
    """
    rows = public.model.get_output_embeddings()
    weight: Tensor = rows.weight.detach().float()
    bias = getattr(rows, "bias", None)
    for scale, shift, centred, eps in _forms(public):
        entering = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
        size = (entering.square().mean(-1, keepdim=True) + eps).sqrt()
        normed = entering / size
        made = (normed * scale + shift) @ weight.T + (0.0 if bias is None else bias.detach().float())
        if float((made - logits).norm()) > ALIKE * float(logits.norm()):
            continue
        turned = weight * scale  # [V,H]
        if centred:
            turned = turned - turned.mean(-1, keepdim=True)
        width = turned.shape[1]
        missing = 2 - normed.square().sum(-1, keepdim=True) / width  # eps keeps n a little shorter than sqrt(H)
        along = normed @ turned.T
        found: Tensor = (turned.square().sum(-1) - missing * along.square() / width) / size.square()
        return found.clamp_min(0.0)
    return None


def _forms(public: PublicModel) -> Iterator[tuple[Tensor, Tensor, bool, float]]:
    """What the last norm may be: weight [H], bias [H], whether it centres, and its epsilon."""
    model = public.model
    norms = [
        model.get_submodule(path)
        for path in public.base.anatomy.above
        if type(model.get_submodule(path)).__name__.endswith("Norm")
    ]
    if len(norms) != 1:
        return
    (norm,) = norms
    own: Any = norm
    weight = own.weight.detach().float()
    eps = next((float(getattr(own, name)) for name in ("eps", "variance_epsilon") if hasattr(own, name)), 1e-6)
    bias = getattr(own, "bias", None)
    shift = torch.zeros_like(weight) if bias is None else bias.detach().float()
    for centred in (bias is not None, bias is None):
        for scale in (weight, 1 + weight):  # some families store the weight less one
            yield scale, shift, centred, eps
