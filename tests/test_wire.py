"""Frames: round trips, lengths, hostile bytes, the meter and the record."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.errors import WireError
from cutlayer.wire import (
    DTYPES,
    KINDS,
    PREFIX,
    STEP_NAMES,
    Header,
    Limits,
    Meter,
    decode,
    encode,
    frame_length,
    keep_lines,
    read_frames,
)

VALUES = {"yes": True, "no": False, "count": -(2**63), "loss": 0.1, "nothing": float("inf"), "word": "żółw\n"}
FULL = Header(
    "send_gradients", "gradient", "tail_step", "server", "klinik-ä", "klinik-ä", "shared", 7, 3, 2**32 - 1, VALUES,
    ("a", "b"),
)  # fmt: skip


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    if dtype == torch.bool:
        return torch.rand(shape, generator=source) > 0.5
    return (torch.randn(shape, generator=source) * 50).abs().to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3, 4), (1,) * 8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = sample(dtype, shape)
    header = Header("send_activations", "activations", names=("x",))
    frame = encode(header, [tensor])
    for data in (frame, frame.bytes(), bytearray(frame.bytes()), memoryview(frame.bytes())):
        found, (back,) = decode(data)
        assert found == header
        assert same(back, tensor)
    assert frame.length == len(frame.bytes()) == frame_length(header, [shape], [dtype])


def test_all_dtypes_that_models_have_are_there() -> None:
    assert len(DTYPES) == 10
    assert {torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool} <= set(DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
def test_non_contiguous_tensors_cross_as_they_read(dtype: torch.dtype) -> None:
    whole = sample(dtype, (6, 4, 5))
    for tensor in (whole.transpose(0, 2), whole[::2, 1:3], whole[0].expand(3, 4, 5), whole[1, 2, 3]):
        _, (back,) = decode(encode(Header("aggregate", "state", names=("x",)), [tensor]).bytes())
        assert same(back, tensor)
        assert back.is_contiguous()


def test_special_numbers_cross_bit_for_bit() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45], dtype=torch.float32)
    _, (back,) = decode(encode(Header("aggregate", names=("x",)), [tensor]).bytes())
    assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


def test_a_tensor_that_needs_a_gradient_leaves_its_graph_behind() -> None:
    leaf = torch.ones(3, requires_grad=True)
    _, (back,) = decode(encode(Header("send_activations", names=("x",)), [leaf * 2]))
    assert not back.requires_grad


def test_header_fields_and_values() -> None:
    found, _ = decode(encode(FULL, [torch.zeros(2), torch.ones(1)]).bytes())
    assert found == FULL
    assert {name: type(value) for name, value in found.values.items()} == {n: type(v) for n, v in VALUES.items()}
    for step in STEP_NAMES:
        for kind in KINDS:
            assert decode(encode(Header(step, kind)).bytes())[0] == Header(step, kind)
    assert len(STEP_NAMES) == 11


def test_a_value_that_must_be_there() -> None:
    assert Header("aggregate", values={"loss": 0.0}).value("loss") == 0.0
    with pytest.raises(WireError, match="a 'state' frame from nobody lacks the value 'loss'".replace("a ", "A ", 1)):
        Header("aggregate", "state").value("loss")


def test_what_fits_no_field_is_refused_at_the_sender() -> None:
    for header in (
        Header("aggregate", step=-1),
        Header("aggregate", values={"n": 2**63}),
        Header("aggregate", "ack", "x" * 70_000),
    ):
        with pytest.raises(WireError, match="does not fit its field"):
            encode(header)
    with pytest.raises(WireError, match=r"'x' is of type torch\.complex64"):
        encode(Header("aggregate", names=("x",)), [torch.zeros(1, dtype=torch.complex64)])


# ---------------------------------------------------------------- lengths and layout


def test_length_does_not_depend_on_the_numbers() -> None:
    def length(number: float, step: int, tensor: torch.Tensor) -> int:
        header = Header(
            "head_backward", "ack", step=step, turn=step, values={"loss": number, "tokens": step}, names=("x",)
        )
        return encode(header, [tensor]).length

    shape = (2, 3)
    seen = {
        length(0.0, 0, torch.zeros(shape)), length(1.23456789012345e-300, 2**31, torch.randn(shape)),
        length(float("nan"), 99_999, torch.full(shape, -1e38)),
    }  # fmt: skip
    assert len(seen) == 1


def test_tensor_bytes_are_contiguous_at_the_end_in_order() -> None:
    tensors = [
        sample(torch.bfloat16, (3, 2)),
        sample(torch.int64, ()),
        sample(torch.float32, (0, 4)),
        sample(torch.bool, (5,)),
    ]
    frame = encode(Header("aggregate", "state", names=("a", "b", "c", "d")), tensors)
    raw = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    assert frame.bytes().endswith(raw)
    assert len(raw) == 3 * 2 * 2 + 8 + 0 + 5
    assert b"".join(bytes(chunk) for chunk in frame.chunks()) == frame.bytes()


def test_sender_and_receiver_share_no_memory() -> None:
    """Without a copy on receive, an in-place operation of the receiver would change the sender's tensor."""
    sent = torch.arange(4.0)
    frame = encode(Header("send_activations", names=("x",)), [sent])
    for data in (frame, frame.bytes()):
        _, (back,) = decode(data)
        back.mul_(-1)
        assert sent.tolist() == [0, 1, 2, 3]
        assert back.data_ptr() % 16 == 0  # memory of PyTorch's own


# ---------------------------------------------------------------- hostile bytes


def forged(data: bytes, fields: bytes, **prefix: Any) -> bytes:
    """A frame with a right checksum around whatever it holds."""
    told = {
        "magic": b"CUTL",
        "version": 1,
        "step": 2,
        "kind": 1,
        "flags": 0,
        "size": len(fields),
        "body": len(data),
        **prefix,
    }
    start = struct.pack("<4sBBBBIQ", *(told[k] for k in ("magic", "version", "step", "kind", "flags", "size", "body")))
    return start + struct.pack("<I", zlib.crc32(start + fields)) + fields + data


def fields_with(tensors: bytes, values: bytes = b"\0\0") -> bytes:
    return b"\0\0" * 5 + struct.pack("<III", 0, 0, 0) + values + tensors


def one_tensor(code: int, *shape: int, dims: int | None = None) -> bytes:
    return struct.pack("<IH1sBB", 1, 1, b"x", code, len(shape) if dims is None else dims) + struct.pack(
        f"<{len(shape)}Q", *shape
    )


def must_refuse(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(WireError) as caught:
        decode(data, limits)
    return str(caught.value)


def test_a_forged_frame_that_is_right_is_read() -> None:
    header, (x,) = decode(forged(b"\1\2", fields_with(one_tensor(DTYPES.index(torch.uint8), 2))))
    assert header == Header("send_activations", "activations", names=("x",))
    assert x.tolist() == [1, 2]


BIG = 2**63
HOSTILE = {
    "one huge dimension": one_tensor(0, 2**60),
    "the largest number": one_tensor(0, 2**64 - 1),
    "a product that wraps to 0 in 64 bits": one_tensor(8, 2**32, 2**32),
    "a product that wraps to 4 in 64 bits": one_tensor(8, 2**62 + 1, 4),
    "empty beside the largest number": one_tensor(0, 0, 2**64 - 1),
    "empty beside 2**63": one_tensor(0, 0, BIG),
    "empty, strides that overflow": one_tensor(0, 0, 2**40, 2**40, 2**40),
    "too many dimensions": one_tensor(0, *([1] * 9)),
    "255 dimensions announced": one_tensor(0, dims=255),
    "unknown dtype": one_tensor(len(DTYPES), 1),
    "dtype 255": one_tensor(255, 1),
    "four billion tensors": struct.pack("<I", 2**32 - 1),
    "one tensor more than there is": struct.pack("<I", 1),
    "a name twice": struct.pack("<I", 2) + 2 * one_tensor(8, 0)[4:],
    "a name that is not UTF-8": struct.pack("<IH1sBB", 1, 1, b"\xff", 8, 0),
    "bytes after the last tensor": one_tensor(8, 0) + b"\0",
}


@pytest.mark.parametrize("tensors", HOSTILE.values(), ids=HOSTILE)
def test_hostile_tensor_headers(tensors: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is allocated, although checksum and lengths are right."""
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    for body in (b"", b"\0" * 4, b"\0" * 4096):
        must_refuse(forged(body, fields_with(tensors)))
    must_refuse(forged(b"\0" * 4, fields_with(tensors), body=2**64 - 1))


def test_hostile_values() -> None:
    none = struct.pack("<I", 0)
    assert "unknown type" in must_refuse(forged(b"", fields_with(none, b"\1\0\1\0xz")))
    must_refuse(forged(b"", fields_with(none, b"\xff\xff")))
    assert "too early" in must_refuse(forged(b"", fields_with(none, b"\1\0\xff\xffx")))
    assert "twice" in must_refuse(forged(b"", fields_with(none, b"\2\0" + 2 * b"\1\0xb\1")))
    header, _ = decode(forged(b"", fields_with(none, b"\1\0\1\0xb\1")))
    assert header.values == {"x": True}


def test_prefix_that_is_wrong() -> None:
    right = fields_with(struct.pack("<I", 0))
    assert "no cutlayer frame" in must_refuse(forged(b"", right, magic=b"HTTP"))
    assert "version 2" in must_refuse(forged(b"", right, version=2))
    for change in ({"step": 11}, {"kind": len(KINDS)}, {"flags": 1}, {"step": 255}):
        assert "do not exist" in must_refuse(forged(b"", right, **change))
    assert "are accepted" in must_refuse(forged(b"", right, size=2**32 - 1))
    assert "are accepted" in must_refuse(forged(b"", right, body=2**64 - 1))
    for change in ({"size": len(right) + 1}, {"size": len(right) - 1}, {"body": 1}):
        must_refuse(forged(b"", right, **change))
    damaged = bytearray(forged(b"", right))
    damaged[-1] ^= 1
    assert "checksum" in must_refuse(bytes(damaged))
    assert "truth values" in must_refuse(forged(b"\2", fields_with(one_tensor(DTYPES.index(torch.bool), 1))))
    for junk in (b"", b"\0" * 10, b"\0" * 100, b"\x80\x04\x95" + b"K" * 50):
        must_refuse(junk)


def test_truncated_at_every_byte_or_with_bytes_to_spare() -> None:
    raw = encode(FULL, [sample(torch.float32, (2, 3)), sample(torch.int32, (4,))]).bytes()
    for size in range(len(raw)):
        must_refuse(raw[:size])
    must_refuse(raw + b"\0")
    must_refuse(raw + raw)


def test_every_flipped_bit_of_prefix_and_header_is_seen() -> None:
    """The tensors' bytes have no checksum (transport has one); a flip there changes a number and nothing else."""
    frame = encode(FULL, [sample(torch.float32, (2, 3)), sample(torch.int32, (4,))])
    raw, head = frame.bytes(), len(frame.head)
    for bit in range(head * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        must_refuse(bytes(damaged))
    damaged = bytearray(raw)
    damaged[head] ^= 1
    assert decode(damaged)[0] == FULL


def test_random_damage_never_gives_another_error() -> None:
    """Bytes changed, cut out, put in, and the checksum made right again: a WireError or a frame, nothing else."""
    draw = random.Random(0)
    raw = encode(FULL, [sample(torch.float32, (2, 3)), sample(torch.bool, (4,))]).bytes()
    read = 0
    for _ in range(4000):
        data = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 8)]
            elif kind == 2:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
            else:
                data[at : at + 8] = draw.choice(
                    [b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 2**40)]
                )
            if not data:
                break
        if len(data) >= PREFIX.size and draw.random() < 0.8:
            data[:4] = b"CUTL"
            size = struct.unpack_from("<I", data, 8)[0]
            if draw.random() < 0.5 and size <= len(data):
                data[12:20] = struct.pack("<Q", max(len(data) - PREFIX.size - size, 0))
            data[20:24] = struct.pack("<I", zlib.crc32(data[:20] + data[24 : 24 + size]))
        try:
            _, tensors = decode(bytes(data), Limits(body_bytes=1 << 20))
        except WireError:
            continue
        read += 1
        assert sum(t.nbytes for t in tensors) <= len(data)
    assert read > 10  # the damage is not always fatal, or this test would look at the checksum only


def test_limits() -> None:
    frame = encode(Header("aggregate", names=("a", "b")), [torch.zeros(8), torch.zeros(1, 1, 1)]).bytes()
    decode(frame, Limits(body_bytes=36, tensors=2, dimensions=3))
    for limits in (Limits(body_bytes=35), Limits(tensors=1), Limits(dimensions=2), Limits(header_bytes=8)):
        must_refuse(frame, limits)


# ---------------------------------------------------------------- meter and record


def frames() -> list[Any]:
    up = Header("send_activations", "activations", "", "c", "server", "c", step=4, names=("hidden", "mask"))
    down = Header("return_gradients", "gradient", "head_backward", "server", "c", "c", step=4, names=("hidden",))
    return [
        encode(Header("partition", verb="set_up", sender="server", receiver="c")),
        encode(up, [sample(torch.bfloat16, (1, 2, 3)), sample(torch.bool, (1, 2))]),
        encode(down, [sample(torch.float32, (1, 2, 3))]),
    ]


KEYS = ["number", "step", "step_name", "sender", "receiver", "kind", "shapes", "dtypes", "offset", "length"]


def test_the_record(tmp_path: Path) -> None:
    sent = frames()
    with Meter(tmp_path / "wire") as meter:
        for frame in sent:
            meter.count(frame)
    lines = [json.loads(line) for line in (tmp_path / "wire" / "frames.jsonl").read_text().splitlines()]
    data = (tmp_path / "wire" / "frames.bin").read_bytes()
    assert [list(line) for line in lines] == [KEYS] * 3
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert lines[1] == {
        "number": 1, "step": 4, "step_name": "send_activations", "sender": "c", "receiver": "server",
        "kind": "activations", "shapes": [[1, 2, 3], [1, 2]], "dtypes": ["bfloat16", "bool"],
        "offset": sent[0].length, "length": sent[1].length,
    }  # fmt: skip
    offset = 0
    for line, frame in zip(lines, sent, strict=True):
        assert line["offset"] == offset
        assert data[offset : offset + line["length"]] == frame.bytes()
        offset += line["length"]
    assert offset == len(data) == sum(meter.by_step.values())
    assert meter.by_step == Counter({frame.header.step_name: frame.length for frame in sent})
    assert (meter.up, meter.down) == (sent[1].length, sent[0].length + sent[2].length)
    for (line, header, tensors), frame in zip(read_frames(tmp_path / "wire"), sent, strict=True):
        assert header == frame.header
        assert [list(t.shape) for t in tensors] == line["shapes"]


def test_a_meter_goes_back_to_a_checkpoint(tmp_path: Path) -> None:
    sent = frames()
    with Meter(tmp_path) as meter:
        meter.count(sent[0])
        state = json.loads(json.dumps(meter.state()))
        meter.count(sent[1])
        meter.flush()
    with Meter(tmp_path) as again:
        again.restore(state)
        again.count(sent[2])
    found = [header for _, header, _ in read_frames(tmp_path)]
    assert found == [sent[0].header, sent[2].header]
    assert again.state()["offset"] == (tmp_path / "frames.bin").stat().st_size
    with Meter(tmp_path) as anew:
        anew.restore(None)
    assert list(read_frames(tmp_path)) == []


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="holds no recorded frames"):
        next(read_frames(tmp_path))
    with Meter(tmp_path) as meter:
        meter.count(frames()[1])
    index, data = (tmp_path / "frames.jsonl").read_text(), (tmp_path / "frames.bin").read_bytes()
    line = json.loads(index)
    for text in ("{\n", "[]\n", "{}\n", json.dumps({**line, "offset": -1}), json.dumps({**line, "length": 2**62})):
        (tmp_path / "frames.jsonl").write_text(text)
        with pytest.raises(WireError, match="Line 1"):
            next(read_frames(tmp_path))
    (tmp_path / "frames.jsonl").write_text(index)
    (tmp_path / "frames.bin").write_bytes(data[:-1])
    with pytest.raises(WireError):
        next(read_frames(tmp_path))


def test_keep_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    keep_lines(path, 3)
    assert not path.exists()
    path.write_text("a\nb\nc\nd")
    for count, left in ((9, "a\nb\nc\nd"), (2, "a\nb\n"), (0, "")):
        keep_lines(path, count)
        assert path.read_text() == left
