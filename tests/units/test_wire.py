"""Codecs and messages: what goes in comes out, and what does not belong is refused."""

import json
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.adapter.algebra import digest
from common.adapter.values import Key, State, Update
from common.error import BouquetError
from common.wire import codecs
from common.wire import message as wire
from common.wire.blockwise import NF4
from common.wire.header import SMALL_HEADER_BYTES, payload_bytes
from tests.support.grid import travelled
from tests.support.replies import bare

TENSORS: dict[Key, torch.Tensor] = {
    Key("model.layers.0.q_proj", "A"): torch.arange(12.0).reshape(3, 4) / 7,
    Key("model.layers.0.q_proj", "B"): torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
}
OFFSET = {Key("model.layers.0.q_proj", "Q"): torch.ones(5, 2), Key("model.layers.0.q_proj", "P"): torch.ones(2, 4)}


@pytest.mark.parametrize(("name", "error", "size"), [("fp32", 0.0, 4), ("fp16", 2**-11, 2), ("bf16", 2**-8, 2)])
@settings(deadline=None)
@given(values=arrays(np.float32, st.integers(1, 50), elements=st.floats(-1000, 1000, width=32)))
def test_a_codec_keeps_its_stated_error_and_bytes(name, error, size, values):
    array = codecs.encode(torch.from_numpy(values.copy()), name)
    assert array.nbytes == size * len(values) == codecs.size_in_bytes(name, len(values))
    back = codecs.decode(array.tobytes(), name, len(values)).numpy()
    normal = np.abs(values) >= 2**-14
    assert (np.abs(back - values)[normal] <= error * np.abs(values)[normal]).all()


@pytest.mark.parametrize(
    ("name", "error", "block", "size"), [("int8", 1 / 254, 256, 700 + 4 * 3), ("nf4", 0.152, 64, 350 + 4 * 11)]
)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), spread=st.floats(1e-6, 1e6))
def test_a_blockwise_codec_keeps_its_stated_error_and_bytes(name, error, block, size, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = spread * torch.randn(700, generator=generator) * torch.rand(700, generator=generator) ** 4
    values[:block] = 0
    array = codecs.encode(values, name)
    assert array.nbytes == size == codecs.size_in_bytes(name, 700)
    back = codecs.decode(array.tobytes(), name, 700)
    for first in range(0, 700, block):
        part = slice(first, first + block)
        assert (back[part] - values[part]).abs().max() <= error * values[part].abs().max() * (1 + 1e-5)


@pytest.mark.parametrize("name", codecs.CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_made_finite(name, bad):
    values = torch.ones(100)
    values[70] = bad
    assert not torch.isfinite(codecs.decode(codecs.encode(values, name).tobytes(), name, 100)).all()


def test_nf4_is_the_published_code():
    import bitsandbytes.functional

    published = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(NF4, published, rtol=0, atol=0)


def test_zeros_do_not_travel_where_a_bitmap_is_shorter():
    tensor = torch.zeros(100, 100)
    tensor[::4, ::5] = torch.randn(25, 20)
    for name, bytes_per_value in (("fp32", 4), ("bf16", 2)):
        update = Update({Key("l", "B"): tensor}, 1.0, 1.0)
        record = wire.pack_update(update, "flasc", 0, "node-000", codec=name)
        assert set(record) == {"header", "values", "mask"}
        assert payload_bytes(record) <= 500 * bytes_per_value + 10000 / 8 + 600
        _, back = wire.unpack_update(record, rule="flasc", round=0)
        torch.testing.assert_close(back.tensors[Key("l", "B")], tensor, rtol=2**-8, atol=0)
    dense = wire.pack_update(Update({Key("l", "B"): torch.ones(9, 9)}, 1.0, 1.0), "fedit", 0, "node-000")
    assert set(dense) == {"header", "values"}


def test_zeros_arrive_with_their_sign():
    """A start that is computed has some, and both sides hold it to one digest."""
    tensor = torch.eye(100)
    tensor[7, 20:30] = -0.0
    record = wire.pack_update(Update({Key("l", "B"): tensor}, 1.0, 1.0), "fedit", 0, "node-000")
    assert "mask" in record
    _, back = wire.unpack_update(record, rule="fedit", round=0)
    assert digest(back.tensors) == digest({Key("l", "B"): tensor})


def test_a_mask_of_the_wrong_size_is_refused():
    record = wire.pack_update(Update({Key("l", "B"): torch.eye(100)}, 1.0, 1.0), "fedit", 0, "node-000")
    record["mask"] = bare(bytes(9))
    with pytest.raises(BouquetError, match=r"a mask of the wrong size: expected 1,250 bytes, got 9 bytes"):
        wire.unpack_update(record, rule="fedit", round=0)


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "nf4"])
def test_a_lossy_update_travels_as_its_difference(name):
    """A small step from a large start: the error is that of the step."""
    start = {key: 100 * torch.ones_like(tensor) for key, tensor in TENSORS.items()}
    moved = {key: tensor + 1e-4 * TENSORS[key] for key, tensor in start.items()}
    update = Update(moved, 1.0, 1.0)
    record = wire.pack_update(update, "fedit", 4, "node-000", codec=name, received=start)
    _, back = wire.unpack_update(record, rule="fedit", round=4, received=start)
    for key, tensor in moved.items():
        # Of the step, and of float32 at 100.
        allowed = 0.16 * (tensor - start[key]).abs().max() + 1e-5
        assert (back.tensors[key] - tensor).abs().max() <= allowed
    with pytest.raises(
        BouquetError, match="an update is a difference from a state that was never sent: 2 unknown tensors"
    ):
        wire.unpack_update(record, rule="fedit", round=4)


@pytest.mark.parametrize(("largest", "used"), [(65504.0, "fp16"), (65505.0, "bf16")])
def test_what_fp16_cannot_hold_travels_as_bf16_at_the_same_size(largest, used):
    state = State({Key("l", "A"): torch.tensor([[1.0, largest]])}, 1.0)
    record = wire.pack_state(state, "fedit", codec="fp16")
    header, back = wire.unpack_state(record, rule="fedit")
    assert (header.codec, len(record["values"].data)) == (used, 4)
    torch.testing.assert_close(back.adapter, state.adapter, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_state_survives_flowers_serialisation(name):
    state = State(TENSORS, scale=2.0, round=3, offset=OFFSET)
    content = travelled(RecordDict({"state": wire.pack_state(state, "fedex-lora", codec=name)}))
    header, back = wire.unpack_state(content.array_records["state"], rule="fedex-lora")
    assert (back.scale, back.round, header.rule, header.codec) == (2.0, 3, "fedex-lora", name)
    for key, tensor in (TENSORS | OFFSET).items():
        torch.testing.assert_close((back.adapter | back.offset)[key], tensor, rtol=2**-7, atol=0)


def test_a_message_is_two_arrays_however_many_tensors():
    tensors = {Key(f"model.layers.{layer}.q_proj", "A"): torch.ones(8, 64) for layer in range(200)}
    record = wire.pack_update(Update(tensors, 1.0, 1.0), "fedit", 0, "node-000")
    assert set(record) == {"header", "values"}
    assert payload_bytes(record) <= 4 * 200 * 8 * 64 * 1.02


def test_the_receiver_owns_what_it_reads():
    record = wire.pack_state(State(TENSORS, 1.0), "fedit")
    _, one = wire.unpack_state(record, rule="fedit")
    next(iter(one.adapter.values())).zero_()
    _, two = wire.unpack_state(record, rule="fedit")
    assert next(iter(two.adapter.values())).any()


def good() -> ArrayRecord:
    return wire.pack_update(Update(TENSORS, 1.0, 1.0), "fedit", 4, "node-000")


def header_with(**changes: object) -> ArrayRecord:
    record = good()
    fields = json.loads(zlib.decompress(record["header"].data)) | changes
    record["header"] = bare(zlib.compress(json.dumps(fields).encode()))
    return record


def as_numpy() -> ArrayRecord:
    record = good()
    record["values"] = Array(np.zeros(27, dtype=np.float32))
    return record


def trailing() -> ArrayRecord:
    record = good()
    record["header"] = bare(record["header"].data + b"more")
    return record


def bomb() -> ArrayRecord:
    record = good()
    record["header"] = bare(zlib.compress(b" " * (SMALL_HEADER_BYTES + 10_000)))
    return record


def crowded(**fields: bytes) -> ArrayRecord:
    """A message of a few kB whose values allow a header of megabytes."""
    pieces = [b'"%s":[%s]' % (name.encode(), piece) for name, piece in fields.items()]
    head = b'{"kind":"update","rule":"fedit","round":4,"codec":"fp32","scale":1.0,%s}' % b",".join(pieces)
    return ArrayRecord({"header": bare(zlib.compress(head)), "values": bare(bytes(900_000))})


def without_values() -> ArrayRecord:
    record = good()
    del record["values"]
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (header_with(kind="state"), "a message of another kind .*expected update, got state"),
        (header_with(rule="flora"), "a message of another rule .*expected fedit, got flora"),
        (header_with(format=9), "a message of another wire format .*expected 2, got 9"),
        (header_with(round=5), "an update of another round .*expected round 4, got round 5"),
        (
            header_with(tensors=[["l", "A", [2, 2]]]),
            r"a message of the wrong size \(codec fp32\): expected 16 bytes for 4 values, got 108",
        ),
        (header_with(tensors=[["l", "A", [27]], ["l", "A", [0]]]), "a message header cannot be read"),
        (header_with(tensors=[["l", "W0", [27]]]), "a message header cannot be read"),
        (header_with(scale=float("nan")), "a message header cannot be read"),
        (header_with(weight=-1.0), "a message header cannot be read"),
        (header_with(surprise=1), "a message header cannot be read"),
        (
            header_with(codec="bf16"),
            r"a message of the wrong size \(codec bf16\): expected 54 bytes for 27 values, got 108",
        ),
        (header_with(tensors=[["l", "A", [1, 1, 27]]]), "a message header cannot be read"),
        (header_with(tensors=[["l" * 1001, "A", [27]]]), "a message header cannot be read"),
        (header_with(tensors=[["l", "A", [2**30, 2**30]]]), "a message of the wrong size"),
        (as_numpy(), r"an array in an unknown format \(values\): expected bytes, got numpy.ndarray"),
        (trailing(), "a message header is too long or cut short"),
        (bomb(), "a message header is too long or cut short"),
        (
            crowded(tensors=b",".join([b"[]"] * 10**6)),
            "a message header names too many tensors: expected at most 65,536 tensors",
        ),
        (crowded(tensors=b",".join([b"[]"] * 5000)), r"a message header cannot be read \(tensors.0.0\): got Field req"),
        (header_with(**{"x" * 9000: 1}), r"a message header cannot be read \(x{80}\): got Extra inputs are not"),
        (
            without_values(),
            "a message in an unknown format: expected the arrays header and values, and optionally mask, got header",
        ),
    ],
)
def test_a_malformed_message_is_refused(record, message):
    with pytest.raises(BouquetError, match=message):
        wire.unpack_update(record, rule="fedit", round=4)


@pytest.mark.parametrize(
    "fields",
    [
        {"tensors": b",".join([b"[]"] * 300_000)},
        {"slots": b",".join([b"-1"] * 300_000), "tensors": b""},
        {f"x{number}": b"0" for number in range(300_000)},
    ],
)
def test_a_header_of_more_than_the_model_has_is_not_looked_into(fields):
    """A mistake took kilobytes, and there is room for one in three bytes."""
    with pytest.raises(BouquetError, match="a message header names too many tensors: expected at most 4 tensors"):
        wire.unpack_update(crowded(**fields), rule="fedit", round=4, most=4)


@pytest.mark.parametrize(
    "fields", [{"tensors": b",".join([b"[]"] * 5000)}, {"slots": b",".join([b"-1"] * 5000), "tensors": b""}]
)
def test_a_list_is_refused_at_its_first_item_that_is_wrong(fields):
    with pytest.raises(BouquetError, match="a message header cannot be read") as caught:
        wire.unpack_update(crowded(**fields), rule="fedit", round=4)
    assert caught.value.__cause__.error_count() <= 3


def test_a_tensor_named_twice_is_refused():
    tensors = [["l", "A", [3, 4]], ["l", "A", [5, 3]]]
    with pytest.raises(BouquetError, match="a message names one tensor twice"):
        wire.unpack_update(header_with(tensors=tensors), rule="fedit", round=4)
