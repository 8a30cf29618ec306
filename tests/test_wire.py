"""Codecs and messages: what goes in comes out, and what does not belong is refused."""

import io
import json
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common import codec, wire
from common.adapter import Key, State, Update
from common.error import BouquetError
from tests.grid import travelled

TENSORS = {
    Key("model.layers.0.q_proj", "A"): torch.arange(12.0).reshape(3, 4) / 7,
    Key("model.layers.0.q_proj", "B"): torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
}
OFFSET = {Key("model.layers.0.q_proj", "Q"): torch.ones(5, 2), Key("model.layers.0.q_proj", "P"): torch.ones(2, 4)}


@pytest.mark.parametrize(("name", "error"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8)])
@settings(deadline=None)
@given(values=arrays(np.float32, st.integers(1, 50), elements=st.floats(-1000, 1000, width=32)))
def test_a_codec_keeps_its_stated_error_and_bytes(name, error, values):
    array = codec.encode(torch.from_numpy(values.copy()), name)
    assert array.nbytes == codec.CODECS[name].bytes_per_value * len(values)
    back = codec.decode(array, name).numpy()
    normal = np.abs(values) >= 2**-14
    assert (np.abs(back - values)[normal] <= error * np.abs(values)[normal]).all()


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(BouquetError, match=r"wire.codec = 'fp16'\): expected at most 65504, got 70000. Use wire.codec"):
        codec.encode(torch.tensor([70000.0]), "fp16")


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_state_survives_flowers_serialisation(name):
    state = State(TENSORS, scale=2.0, round=3, offset=OFFSET)
    content = travelled(RecordDict({"state": wire.pack_state(state, "fedex-lora", codec=name)}))
    header, back = wire.unpack_state(content.array_records["state"], rule="fedex-lora")
    assert (back.scale, back.round, header.rule, header.codec) == (2.0, 3, "fedex-lora", name)
    for key, tensor in (TENSORS | OFFSET).items():
        torch.testing.assert_close((back.adapter | back.offset)[key], tensor, rtol=2**-7, atol=0)


def test_a_message_is_two_arrays_however_many_tensors():
    tensors = {Key(f"model.layers.{layer}.q_proj", "A"): torch.zeros(8, 64) for layer in range(200)}
    record = wire.pack_update(Update(tensors, 1.0, 1.0), "fedit", 0, "node-000")
    assert set(record) == {"header", "values"}
    assert wire.payload_bytes(record) <= 4 * 200 * 8 * 64 * 1.02


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
    buffer = np.load(io.BytesIO(record["header"].data))
    fields = json.loads(zlib.decompress(buffer.tobytes())) | changes
    packed = zlib.compress(json.dumps(fields).encode())
    record["header"] = Array(np.frombuffer(packed, dtype=np.uint8))
    return record


def pickled() -> ArrayRecord:
    record = good()
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    record["values"] = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
    return record


def bomb() -> ArrayRecord:
    record = good()
    record["header"] = Array(np.frombuffer(zlib.compress(b" " * (wire.MAX_HEADER_BYTES + 10)), dtype=np.uint8))
    return record


def without_values() -> ArrayRecord:
    record = good()
    del record["values"]
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (header_with(kind="state"), "a message of another kind .*expected update, got state"),
        (header_with(rule="flora"), "a message of another rule .*expected fedit, got flora"),
        (header_with(format=9), "a message of another wire format .*expected 1, got 9"),
        (header_with(round=5), "an update of another round .*expected round 4, got round 5"),
        (header_with(tensors=[["l", "A", [2, 2]]]), "a message of the wrong size: expected 4 values, got 27 values"),
        (header_with(tensors=[["l", "A", [27]], ["l", "A", [0]]]), "a message header cannot be read"),
        (header_with(tensors=[["l", "W0", [27]]]), "a message header cannot be read"),
        (header_with(scale=float("nan")), "a message header cannot be read"),
        (header_with(weight=-1.0), "a message header cannot be read"),
        (header_with(surprise=1), "a message header cannot be read"),
        (
            header_with(codec="bf16"),
            "does not hold what its codec says .*flat array of uint16, got 1 dimensions of float32",
        ),
        (pickled(), "an array cannot be read: got Object arrays cannot be loaded"),
        (bomb(), "a message header is too long or cut short"),
        (without_values(), "a message of unknown form: expected the arrays header and values, got header"),
    ],
)
def test_a_malformed_message_is_refused(record, message):
    with pytest.raises(BouquetError, match=message):
        wire.unpack_update(record, rule="fedit", round=4)


def test_a_tensor_named_twice_is_refused():
    tensors = [["l", "A", [3, 4]], ["l", "A", [5, 3]]]
    with pytest.raises(BouquetError, match="a message names one tensor twice"):
        wire.unpack_update(header_with(tensors=tensors), rule="fedit", round=4)
