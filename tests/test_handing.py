"""A client that gets its part of the model from the server: the same run, only its own tensors, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cutlayer
from apart import LONG, ROWS, Apart, steps
from cutlayer import fetching
from cutlayer.apart import served
from cutlayer.config import RunConfig
from cutlayer.errors import CutlayerError, ModelError, OutputError, PolicyRefused, Refused, WireError
from cutlayer.fetching import Fetch, is_served
from cutlayer.handing import Handing
from cutlayer.joining import join
from cutlayer.links.net.answering import Again
from cutlayer.links.net.handing import LIMITS, hand
from cutlayer.links.net.messages import Type, pack, read
from cutlayer.links.net.session import Session
from cutlayer.models import pieces
from cutlayer.models.loading import Part
from cutlayer.models.pieces import Item, Listing, Source, source_of
from cutlayer.policy import load_policy
from cutlayer.report.progress import reporter
from cutlayer.wire import Header, encode
from network import Raw, echo, serving
from network import run as complete
from spine import TWO, U, model, often
from tiny import make_model

BLOCKS = 4
OWN = Part(0, 1, bottom=True, top=True, also=range(3, 4))  # of the U-shape's client
SOON = Again(first=0.01, most=0.02, give_up=60.0)
Read = Callable[[int, int], bytearray]


def own_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("partition", "tied"),
    often([(p, t) for p in ("two-part", "u-shape") for t in (False, True)], ("u-shape", True)),
    ids=str,
)
def test_a_handed_model_changes_no_number(partition: str, tied: bool, tmp_path: Path) -> None:
    """The same losses, bytes and weights as with a local model, and only the client's own tensors came."""
    kind = {"two-part": TWO, "u-shape": U}[partition]
    whole = str(model(num_hidden_layers=BLOCKS, tie_word_embeddings=tied))
    run = Apart(tmp_path / "apart", partition=kind, model=whole, rounds=2)
    server = run.serve()
    run.ended({**{name: run.join(name, model=False) for name in ROWS}, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one")
    assert run.same(tmp_path / "one")
    assert run.said("server").count("It has the tensors of its part of the model.") == len(ROWS)
    assert steps(run.root / "server") == steps(tmp_path / "one")
    assert run.summary()["bytes"] == alone.summary["bytes"]
    found = own_tensors(run.root / "ann" / "base")
    blocks = {name.split(".")[2] for name in found if ".layers." in name}
    others = {name for name in found if ".layers." not in name}
    assert blocks == ({"0"} if partition == "two-part" else {"0", "3"})
    top = {"model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert others == {"model.embed_tokens.weight"} | (top if partition == "u-shape" else set())
    size = sum(path.stat().st_size for path in (run.root / "ann" / "base").iterdir())
    came = run.summary()["network"]["ann"]["model_bytes"]
    assert 0.9 * size < came < 1.3 * size, "what came is the part, and what it takes to ask for it"
    adapter = json.loads((run.root / "ann" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == Path(whole).name


@pytest.mark.slow
def test_a_handed_model_whose_weights_are_all_trained_is_no_result_yet(tmp_path: Path) -> None:
    """What came and what is trained lie apart: a client that joins again, before the end or after it, goes on."""
    run = Apart(tmp_path / "apart", peft="full", partition=U, rounds=2, framework="sfl-v2")
    server = run.serve()
    ann = run.join("ann", model=False)
    until = time.monotonic() + LONG
    while not (run.root / "ann" / "base").is_dir():
        assert time.monotonic() < until, run.said("ann")
        time.sleep(0.02)
    server.process.terminate()
    assert server.wait() is not None
    ann.kill()
    assert ann.wait() != 0
    assert (run.root / "ann" / "base").is_dir()
    assert not (run.root / "ann" / "model").exists()
    for _ in range(2):
        server = run.serve()
        run.ended({**{name: run.join(name, model=False) for name in ROWS}, "server": server})
    cutlayer.train(run.simulated, out=tmp_path / "one")
    assert run.same(tmp_path / "one")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny model is many pieces."""
    monkeypatch.setattr(pieces, "PIECE", 1500)
    monkeypatch.setattr(fetching, "PIECE", 1500)


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of(model(num_hidden_layers=BLOCKS), OWN)


def the_run(tmp_path: Path) -> RunConfig:
    return served(Apart(tmp_path / "files").tree)


def fetched(
    out: Path,
    config: RunConfig,
    read: Read,
    listing: bytes,
    *,
    until: Callable[[Session], Awaitable[None]] | None = None,
) -> tuple[Path, Fetch, int]:
    """Fetch from a server that reads so; the folder, and the sessions that it took."""
    out.mkdir(exist_ok=True)
    count = 0

    async def on(session: Session) -> None:
        nonlocal count
        count += 1
        if until is not None:
            await until(session)
        await hand(session, read, listing)

    async def whole() -> tuple[Path, Fetch]:
        async with serving(on=on) as there:
            fetch = Fetch(
                lambda hello: there.join(hello["client"], hello=dict(hello), limits=LIMITS), "ann", again=SOON,
                progress=reporter(False),
            )  # fmt: skip
            return await fetch.into(out, await fetch.listing(), config), fetch

    return *complete(whole()), count


def same_as(folder: Path, source: Source) -> bool:
    """Whether a folder has what the source has, and no other tensor."""
    whole = load_file(model(num_hidden_layers=BLOCKS) / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    names = {item.name for item in source.listing.tensors}
    return found.keys() == names and all(torch.equal(found[name], whole[name]) for name in names)


def test_a_part_is_fetched_once(tmp_path: Path, source: Source) -> None:
    """A second start reads what lies there; another model of the server's, or a damaged file, is refused."""
    config, listing = the_run(tmp_path), source.listing.to_json()
    folder, fetch, _ = fetched(tmp_path / "out", config, source.read, listing)
    assert same_as(folder, source)
    assert source.listing.size < fetch.received < 2 * source.listing.size + 100_000

    def never(number: int, start: int) -> bytearray:
        raise AssertionError("asked for again")

    again, fetch, _ = fetched(tmp_path / "out", config, never, listing)
    assert again == folder
    assert fetch.received < len(listing) + 1000
    other = source_of(make_model(tmp_path / "other", "llama", num_hidden_layers=BLOCKS, seed=5), OWN)
    with pytest.raises(OutputError, match="another model than the one that the server hands now"):
        fetched(tmp_path / "out", config, other.read, other.listing.to_json())
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(OutputError, match="is damaged"):
        fetched(tmp_path / "out", config, never, listing)


def test_a_transfer_that_breaks_goes_on(tmp_path: Path, source: Source) -> None:
    """The connection breaks again and again; nothing that has come is sent twice, but for what was under way."""
    asked: list[tuple[int, int]] = []

    async def until(session: Session) -> None:
        async def cut() -> None:
            before = len(asked)
            while len(asked) < before + 20:
                await asyncio.sleep(0.001)
            session.drop("The connection broke.")

        asyncio.get_running_loop().cutting = asyncio.ensure_future(cut())  # type: ignore[attr-defined]

    def read(number: int, start: int) -> bytearray:
        asked.append((number, start))
        return source.read(number, start)

    folder, _, sessions = fetched(tmp_path / "out", the_run(tmp_path), read, source.listing.to_json(), until=until)
    assert same_as(folder, source)
    assert sessions > 4
    assert len(asked) - len(set(asked)) <= 5 * sessions


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_client_goes_on_where_it_was(damaged: bool, tmp_path: Path, source: Source) -> None:
    """What an earlier process left is used if it is sound, and fetched again if it is not."""
    config, listing, asked = the_run(tmp_path), source.listing.to_json(), []

    def failing(number: int, start: int) -> bytearray:
        if len(asked) == 60:
            raise ModelError("the disk died")
        asked.append((number, start))
        return source.read(number, start)

    with pytest.raises(Refused, match="the disk died"):
        fetched(tmp_path / "out", config, failing, listing)
    draft = tmp_path / "out" / ".base.draft" / "model.safetensors"
    assert not (tmp_path / "out" / "base").exists()
    if damaged:
        data = bytearray(draft.read_bytes())
        data[-7] ^= 1
        draft.write_bytes(data)
    first = set(asked)
    asked.clear()
    folder, _, _ = fetched(
        tmp_path / "out", config, lambda n, s: asked.append((n, s)) or source.read(n, s), listing  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert same_as(folder, source)
    longest = max(item.size for item in source.listing.items) // 1500 + 1
    twice = len(first & set(asked))
    assert (0 < twice <= 4 + longest) if damaged else twice <= 4, "but for what was under way, and one damaged tensor"


def test_what_is_not_as_listed_is_refused(tmp_path: Path, source: Source) -> None:
    config, listing = the_run(tmp_path), source.listing.to_json()

    def turned(number: int, start: int) -> bytearray:
        data = source.read(number, start)
        if source.listing.items[number].dtype:
            data[len(data) // 2] ^= 1
        return data

    with pytest.raises(Refused, match="came with another checksum"):
        fetched(tmp_path / "a", config, turned, listing)
    with pytest.raises(WireError, match=r"has \d+ bytes; \d+ were asked for"):
        fetched(tmp_path / "b", config, lambda n, s: source.read(n, s)[:-1], listing)
    with pytest.raises(WireError, match=r"bytes"):
        fetched(tmp_path / "c", config, lambda n, s: bytearray(LIMITS.body_bytes + 1), listing)
    for name in "abc":
        assert not (tmp_path / name / "base").exists()


GOOD = "0" * 64
CONFIG = ["config.json", 10, GOOD]
BAD: list[tuple[Any, str]] = [
    ([["../config.json", 10, GOOD], CONFIG], "no file that may be handed"),
    ([["/etc/passwd", 10, GOOD], CONFIG], "no file that may be handed"),
    ([["modeling_llama.py", 10, GOOD], CONFIG], "no file that may be handed"),
    ([["pytorch_model.bin", 10, GOOD], CONFIG], "no file that may be handed"),
    ([["tokenizer.json", 2**40, GOOD], CONFIG], "at most"),
    ([["tokenizer.json", -1, GOOD], CONFIG], "no sound size"),
    ([["tokenizer.json", 10, "xyz"], CONFIG], "no SHA-256"),
    ([CONFIG, CONFIG], "twice"),
    ([], "no config.json"),
    ([[3, 10, GOOD]], "no name"),
    ([["config.json", True, GOOD]], "no sound size"),
]


@pytest.mark.parametrize(("files", "said"), BAD, ids=[said for _, said in BAD])
def test_a_listing_is_judged_before_anything_is_written(
    files: list[Any], said: str, tmp_path: Path, source: Source
) -> None:
    listing = json.dumps({"files": files, "tensors": []}).encode()
    with pytest.raises(WireError, match=said):
        fetched(tmp_path / "out", the_run(tmp_path), source.read, listing)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "tensor",
    [
        ["../a", "F32", [2], GOOD], ["a", "F33", [2], GOOD], ["a", "F32", [-1], GOOD], ["a", "F32", [2**41], GOOD],
        ["a" * 300, "F32", [2], GOOD], ["a", "F32", [True], GOOD], ["a", "F32", 2, GOOD], ["a", ["F32"], [2], GOOD],
        ["a", "F32", [2**39, 2**39], GOOD], ["a", "F32", [1] * 9, GOOD], ["a", "F32", [2], None], ["a", "F32"], 7,
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_that_cannot_be_is_refused(tensor: Any) -> None:
    good = ["a.b", "BF16", [2, 3], GOOD]
    assert Listing.from_json(json.dumps({"files": [CONFIG], "tensors": [good]}).encode()).tensors[0].size == 12
    with pytest.raises(WireError, match="listing of its model"):
        Listing.from_json(json.dumps({"files": [CONFIG], "tensors": [good, tensor]}).encode())


def with_config(source: Source, **changes: Any) -> tuple[Read, bytes]:
    """A source whose config.json has other keys."""
    number = [item.name for item in source.listing.items].index("config.json")
    tree = json.loads(source.places[number][0].read_bytes()) | changes
    data = json.dumps(tree).encode()
    items = list(source.listing.items)
    items[number] = Item("config.json", len(data), hashlib.sha256(data).hexdigest())

    def read(n: int, start: int) -> bytearray:
        return bytearray(data[start : start + pieces.PIECE]) if n == number else source.read(n, start)

    return read, Listing(tuple(items)).to_json()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoConfig": "evil--config.Evil"}}, "'auto_map'"),
        ({"deep": [{"attn_implementation": "evil/kernel"}]}, "'attn_implementation'"),
        ({"transformers_weights": "other.bin"}, "'transformers_weights'"),
        ({"hidden_size": 8, "head_dim": 2}, "numbers; this client's part has"),
        ({"num_hidden_layers": 2}, "cut|blocks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_that_lead_elsewhere_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, source: Source
) -> None:
    """Before any tensor is asked for."""
    read, listing = with_config(source, **changes)
    asked: list[str] = []

    def noted(number: int, start: int) -> bytearray:
        asked.append(source.listing.items[number].dtype)
        return read(number, start)

    with pytest.raises(CutlayerError, match=said):
        fetched(tmp_path / "out", the_run(tmp_path), noted, listing)
    assert set(asked) == {""}
    assert not (tmp_path / "out" / "base").exists()


def test_tensors_of_others_are_refused(tmp_path: Path) -> None:
    more = source_of(model(num_hidden_layers=BLOCKS), Part(0, 4, bottom=True, top=True))
    with pytest.raises(Refused, match=r"hands 'model\.layers\.1.*not of this client's part"):
        fetched(tmp_path / "out", the_run(tmp_path), more.read, more.listing.to_json())


def test_a_disk_that_is_too_small_is_said(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"which has 1,000\. Make room"):
        fetched(tmp_path / "out", the_run(tmp_path), source.read, source.listing.to_json())


def test_a_disk_that_fills_up_is_said(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when there is room again, it goes on."""
    config, take, left = the_run(tmp_path), fetching._Entry.take, [40]

    def full(entry: Any, data: memoryview) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        take(entry, data)

    monkeypatch.setattr(fetching._Entry, "take", full)
    with pytest.raises(OutputError, match=r"No space left on device.*the same command goes on"):
        fetched(tmp_path / "out", config, source.read, source.listing.to_json())
    folder, _, _ = fetched(tmp_path / "out", config, source.read, source.listing.to_json())
    assert same_as(folder, source)


def test_who_does_not_read_is_in_nobody_s_way(tmp_path: Path, source: Source) -> None:
    """A client asks for pieces and takes none; another gets its part, and a third is answered."""
    config = the_run(tmp_path)
    (tmp_path / "out").mkdir()
    listing = source.listing.to_json()

    async def on(session: Session) -> None:
        await (hand(session, source.read, listing) if session.hello.get("wants") else echo(session))

    async def whole() -> tuple[Path, bool]:
        async with serving(on=on) as there:
            idle = Raw(there.port)
            await idle.greet("idle", wants="model")
            assert read(await idle.call.read()).type is Type.CREDIT
            for turn in range(1, 5):
                values = {"entry": len(source.listing.items) - 1, "start": 0}
                header = Header("partition", "control", "hand", "idle", "server", "idle", turn=turn, values=values)
                await idle.write(pack(Type.FRAME_HEAD, encode(header).head))
            fetch = Fetch(
                lambda hello: there.join(hello["client"], hello=dict(hello), limits=LIMITS), "ann", again=SOON,
                progress=reporter(False),
            )  # fmt: skip
            found = await fetch.into(tmp_path / "out", await fetch.listing(), config), await there.works()
            await idle.close()
            return found

    folder, works = complete(whole())
    assert same_as(folder, source)
    assert works


def test_of_shards_only_own_tensors_are_handed(tmp_path: Path) -> None:
    """The checksum is of the bytes, not of how they are divided into files."""
    whole = model(num_hidden_layers=BLOCKS)
    loaded = AutoModelForCausalLM.from_pretrained(whole)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(whole / name, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    shards, one = source_of(tmp_path / "shards", OWN), source_of(whole, OWN)
    assert shards.listing.checksum == one.listing.checksum
    assert shards.listing.safetensors()[0] == one.listing.safetensors()[0]
    loaded.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "weights.other")
    with pytest.raises(ModelError, match="has no safetensors files"):
        source_of(tmp_path / "bin", OWN)


def test_the_server_knows_whose_model_is_the_same(tmp_path: Path) -> None:
    """A client that was handed another model does not come in, nor one that was handed another part."""
    config = served(Apart(tmp_path / "files", partition=TWO).tree)
    right = source_of(config.model, Part(0, 1, bottom=True, top=False)).listing.checksum

    async def told() -> list[bool]:
        handing = Handing(config)
        wrong = source_of(config.model, OWN).listing.checksum
        models: list[Any] = [{"handed": right}, {"handed": wrong}, {"handed": None}, {}, None, right]
        return [await handing.is_same("ann", one) for one in models]

    assert complete(told()) == [True, False, False, False, False, False]


def test_where_the_model_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = the_run(tmp_path).model_copy(update={"model": "base"})
    monkeypatch.chdir(tmp_path)
    assert is_served("served", config, own=False)
    assert is_served(None, config, own=True)
    assert not is_served(None, config, own=False), "a name on the Hub"
    assert not is_served("elsewhere", config, own=True)
    (tmp_path / "base").mkdir()
    assert not is_served(None, config, own=True), "a folder of that name lies here"


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"served_model": False}, "served_model is false"),
        ({"head_blocks": 1}, "served_model is not given"),
        ({"models": ["base"]}, "served_model is not given"),
        ({"models": ["other"], "served_model": True}, "the server says that its model is 'base'"),
        ({"models": ["sha256:" + "1" * 64]}, "served_model is not given"),
        ({"most": {"rounds": 99}}, None), ({"served_model": True, "head_blocks": 1}, None),
        ({"models": ["base"], "served_model": True}, None), ({"models": ["sha256:" + "0" * 64]}, None),
        ({"models": ["sha256:" + "0" * 64], "served_model": False}, None),
    ],
    ids=str,
)  # fmt: skip
def test_a_policy_says_whether(policy: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    config = the_run(tmp_path).model_copy(update={"model": "base"})
    wrong = load_policy(policy).problems(config, "ann", files={}, served=GOOD)
    assert [said in one for one in wrong] == [True] if said else wrong == []


def test_a_policy_refuses_before_anything_is_fetched(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart")
    server = run.serve()
    try:
        with pytest.raises(PolicyRefused, match=r"Name your copy by --model, or allow .*sha256:[0-9a-f]{64}"):
            join(
                f"localhost:{run.port}", data=run.files["ann"], out=run.root / "ann", name="ann",
                policy="served_model: false\n", progress=False,
            )  # fmt: skip
        assert not (run.root / "ann").exists()
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()
