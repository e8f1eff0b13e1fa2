"""TFRecord files without TensorFlow: length, its checksum, the record, its checksum.

The framing is that of tensorflow/core/lib/io/record_writer.h: uint64 length, uint32 masked CRC-32C of the length, the
bytes, uint32 masked CRC-32C of the bytes, all little-endian. Checksums are verified, so that a damaged episode is
found where it is read and not by a policy that learns it.
"""

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt32

from vla_jax.errors import UserError

POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
LANE = 512  # bytes that one lane checks, one after the other; all lanes of a record go side by side
HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")


class DamagedRecord(UserError):
    """A TFRecord file ends too early or its checksum is wrong; nothing after that place can be read."""


def read_records(path: str | Path, start: int = 0) -> Iterator[bytes]:
    """The records of a file from number `start` on; those before it are skipped unread.

    Raises:
        DamagedRecord: the file is cut short, or a checksum is wrong.
    """
    with open(path, "rb") as file:
        number = 0
        while header := file.read(HEADER.size):
            if len(header) < HEADER.size:
                raise DamagedRecord(f"{path} is cut short in the header of record {number}: copy it again")
            length, checksum = HEADER.unpack(header)
            if masked_crc(header[:8]) != checksum:
                raise DamagedRecord(f"{path} is damaged in the header of record {number}: copy it again")
            if number < start:
                file.seek(length + FOOTER.size, 1)
            else:
                data, footer = file.read(length), file.read(FOOTER.size)
                if len(footer) < FOOTER.size:
                    raise DamagedRecord(f"{path} is cut short in record {number}: copy it again")
                if masked_crc(data) != FOOTER.unpack(footer)[0]:
                    raise DamagedRecord(f"{path} is damaged in record {number}: copy it again")
                yield data
            number += 1


def frame_record(data: bytes) -> bytes:
    """One record as it lies in a file; a TFRecord file is a row of them."""
    length = struct.pack("<Q", len(data))
    return length + FOOTER.pack(masked_crc(length)) + data + FOOTER.pack(masked_crc(data))


def masked_crc(data: bytes) -> int:
    """The checksum that TFRecord stores: CRC-32C, rotated right by 15 bits, plus a constant."""
    checksum = crc32c(data)
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4) of a byte string, 16 bits of every lane at a time.

    The register of a message of zeros stays zero, so a message is filled up in front to a power of two of lanes; the
    registers of two neighbours join by moving the left one past the right one's bytes, which is linear over GF(2).
    """
    if len(data) < 4:
        return _bytewise(data)
    lanes = 1 << max(0, (len(data) - 1) // LANE).bit_length()
    message = np.zeros(lanes * LANE, np.uint8)
    place = len(message) - len(data)
    message[place:] = np.frombuffer(data, np.uint8)
    message[place : place + 4] ^= 0xFF  # the register begins with ones
    words, table = message.reshape(lanes, LANE).view("<u2").T.astype(np.uint32), _table()
    register = np.zeros(lanes, np.uint32)
    for word in words:
        register = table[(register & 0xFFFF) ^ word] ^ (register >> 16)
    for columns in _moves(lanes.bit_length() - 1):
        register = _apply(columns, register[0::2]) ^ register[1::2]
    return int(register[0]) ^ 0xFFFFFFFF


def _bytewise(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (POLYNOMIAL if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@functools.cache
def _table() -> UInt32[np.ndarray, "65536"]:
    """What 16 bits leave in the register after they have passed."""
    values = np.arange(65536, dtype=np.uint32)
    for _ in range(16):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return values


@functools.cache
def _moves(levels: int) -> list[UInt32[np.ndarray, "32"]]:
    """For each level of the tree, what each bit of a register becomes when 2^level lanes of zeros pass."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(LANE // 2):
        columns = _table()[columns & 0xFFFF] ^ (columns >> 16)
    moves = []
    for _ in range(levels):
        moves.append(columns)
        columns = _apply(columns, columns)
    return moves


def _apply(columns: UInt32[np.ndarray, "32"], registers: UInt32[np.ndarray, "N"]) -> UInt32[np.ndarray, "N"]:
    moved = np.zeros_like(registers)
    for bit, column in enumerate(columns):
        moved ^= np.where((registers >> np.uint32(bit)) & 1, column, np.uint32(0))
    return moved
