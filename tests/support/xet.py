"""What huggingface_hub's client uploads by the Xet protocol, read back: the files of a shard, from the chunks of xorbs.

The formats: huggingface.co/docs/xet, "Xorb object serialization" and "MDB shard file format".
"""

import hashlib
import struct

XORB_END = b"XETBLOB"
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file in a shard
BOOKEND = b"\xff" * 32  # in place of a file's hash, after the last file


def chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb, unpacked."""
    found, at = [], 0
    while at < len(xorb) and not xorb[at:].startswith(XORB_END):
        packed, size = (int.from_bytes(xorb[at + first : at + first + 3], "little") for first in (1, 5))
        found.append(unpacked(xorb[at + 8 : at + 8 + packed], xorb[at + 4]))
        assert len(found[-1]) == size
        at += 8 + packed
    return found


def unpacked(data: bytes, scheme: int) -> bytes:
    """scheme 0: the bytes as they are; 1: LZ4; 2: LZ4 of every fourth byte, then of those after them, and so on."""
    import pyarrow as pa

    if scheme:
        data = pa.CompressedInputStream(pa.BufferReader(data), "lz4").read()
    if scheme == 2:
        out, at = bytearray(len(data)), 0
        for first in range(4):
            size = len(out[first::4])
            out[first::4] = data[at : at + size]
            at += size
        return bytes(out)
    return data


def files(shard: bytes, xorbs: dict[str, list[bytes]]) -> dict[str, bytes]:
    """The files of a shard by their sha256, which the content must have. xorbs: their chunks by the xorb's hash."""
    found, at = {}, 48  # after the header
    while shard[at : at + 32] != BOOKEND:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        content = b""
        for number in range(count):
            entry = at + 48 * (1 + number)
            _, size, first, end = struct.unpack_from("<IIII", shard, entry + 32)
            segment = b"".join(xorbs[hash_text(shard[entry : entry + 32])][first:end])
            assert len(segment) == size
            content += segment
        at += 48 * (1 + count * (2 if flags & VERIFIED else 1))
        assert flags & WITH_SHA256
        digest = hash_text(shard[at : at + 32])
        assert hashlib.sha256(content).hexdigest() == digest
        found[digest] = content
        at += 48
    return found


def hash_text(raw: bytes) -> str:
    """A hash of 32 bytes as Xet writes it: as four little-endian integers of 64 bits."""
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", raw))
