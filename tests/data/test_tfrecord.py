"""TFRecord framing: checksums against published values, and every kind of damage is seen."""

import itertools
from pathlib import Path

import grain
import numpy as np
import pytest

from vla_jax.data.tfrecord import DamagedRecord, crc32c, frame_record, masked_crc, read_records

RECORDS = [b"", b"one", b"x" * 5000, b"last one"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.tfrecord"
    path.write_bytes(b"".join(map(frame_record, RECORDS)))
    return path


def test_crc_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("length", [0, 1, 3, 4, 511, 512, 513, 1024, 1025, 6000])
def test_lanes_equal_one_byte_after_the_other(length):
    data = np.random.default_rng(length).bytes(length)
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(data) == register ^ 0xFFFFFFFF


def test_masked_crc_of_a_file_that_tensorflow_wrote():
    """The header of the first record of Grain's own test file: length 1, checksum 0x41de7501."""
    assert masked_crc((1).to_bytes(8, "little")) == 0x41DE7501


def test_grain_reads_what_is_framed(path):
    assert list(grain.experimental.TFRecordIterDataset(str(path))) == RECORDS


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_reading_starts_anywhere(path, start):
    assert list(read_records(path, start)) == RECORDS[start:]


def readable(path: Path) -> list[bytes]:
    found = []
    with pytest.raises(DamagedRecord) as raised:
        found.extend(itertools.islice(iter_into(read_records(path), found), 10))
    assert str(path) in str(raised.value)
    return found


def iter_into(records, found):
    for record in records:
        found.append(record)
        yield from ()


@pytest.mark.parametrize("cut", [1, 6, 13])
def test_truncated_file_keeps_what_is_whole(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    assert readable(path) == RECORDS[:-1]


def test_truncated_header(path):
    path.write_bytes(path.read_bytes() + b"\x05\x00\x00")
    assert readable(path) == RECORDS


@pytest.mark.parametrize("place, whole", [(16 + 3, 1), (16 + 9, 1), (16 + 12 + 1, 1), (16 + 19 + 12 + 2500, 2)])
def test_one_changed_bit_is_seen(path, place, whole):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))
    assert readable(path) == RECORDS[:whole]
