"""Models that several threads of a process make at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from cutlayer.models.heads import head_of
from cutlayer.models.loading import Part, load_model, own_tensors
from cutlayer.shapes import shape_of
from spine import model


def test_models_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Transformers changes of itself while it makes a model is as before after several threads made one each."""
    tied = str(model(tie_word_embeddings=True))
    inside, most, seen = 0, 0, threading.Lock()
    real = PreTrainedModel.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal inside, most
        with seen:
            inside, most = inside + 1, max(most, inside + 1)
        try:
            threading.Event().wait(0.01)  # so that the others come to it meanwhile
            real(self, *args, **kwargs)
        finally:
            with seen:
                inside -= 1

    monkeypatch.setattr(PreTrainedModel, "__init__", counted)
    before = PreTrainedModel.tie_weights
    part = Part(0, 1, bottom=True, top=False)
    ways = [
        lambda: load_model(tied),
        lambda: load_model(tied, precision="bfloat16", part=part),
        lambda: shape_of(AutoConfig.from_pretrained(tied)),
        lambda: own_tensors(tied, part),
        lambda: head_of(tied),
    ]
    with ThreadPoolExecutor(10) as pool:
        for one in [pool.submit(way) for way in ways for _ in range(4)]:
            one.result()
    assert most == 1
    assert PreTrainedModel.tie_weights is before
    assert torch.get_default_dtype() == torch.float32
    whole, _ = load_model(tied)
    assert whole.lm_head.weight is whole.get_input_embeddings().weight


def test_a_shape_is_read_without_a_change_of_the_default_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another thread may compute meanwhile; its new tensors are not to become bfloat16."""
    config = AutoConfig.from_pretrained(str(model()))
    config.dtype = torch.bfloat16
    types = []
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: types.append(dtype))
    assert shape_of(config).params > 0
    assert set(types) <= {torch.float32}
