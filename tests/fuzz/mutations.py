"""Mutations of files: of bytes, and of the structures that a checksum or a length would protect from plain flips."""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

_NUMBERS = (0, 1, -1, 2**31 - 1, 2**32 - 1, 2**63, -(2**63), 10**40, 1e308, -0.5, float("nan"), float("inf"))
_TEXTS = (
    "",
    "\0",
    "../../x",
    "/etc/passwd",
    "=1+1",
    "\x1b[2J",
    "\udc80",
    "ü" * 300,
    "x" * 100_000,
    "2024-13-45",
    "塑料",
)


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    """Return a copy of `content`, a file of a kind such as "tar" or "json", with one to four mutations."""
    special = [mutate for pattern, mutate in _SPECIAL if re.fullmatch(pattern, kind)]
    for _ in range(draw.randint(1, 4)):
        mutate = draw.choice([*special, *special, *_PLAIN])
        content = mutate(content, draw)
    return content


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return b"\0"
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 8, 64))):
        changed[draw.randrange(len(changed))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return bytes(changed)


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _remove(content: bytes, draw: random.Random) -> bytes:
    begin, length = draw.randrange(len(content) + 1), draw.choice((1, 4, 100, 512))
    return content[:begin] + content[begin + length :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content) + 1)
    new = draw.choice((bytes(512), b"\xff" * 8, draw.randbytes(16), b"9" * 5000, b"[" * 3000, b"\xef\xbb\xbf"))
    return content[:begin] + new + content[begin:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    begin, length = draw.randrange(len(content) + 1), draw.choice((16, 512, 4096))
    return content[:begin] + content[begin : begin + length] * draw.choice((2, 5)) + content[begin:]


def _swap(content: bytes, draw: random.Random) -> bytes:
    one, other = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[other:] + content[one:other] + content[:one]


def _length(content: bytes, draw: random.Random) -> bytes:
    """Overwrite what may be a length with an extreme one."""
    size, order = draw.choice((2, 4, 8)), draw.choice(("<", ">"))
    value = draw.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
    begin = draw.randrange(max(1, len(content) - size))
    new = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[size], value)
    return content[:begin] + new + content[begin + size :]


def _tar_field(content: bytes, draw: random.Random) -> bytes:
    """Change a field of a header, and correct the header's checksum."""
    headers = [at for at in range(0, len(content) - 511, 512) if content[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return _flip(content, draw)
    at = draw.choice(headers)
    header = bytearray(content[at : at + 512])
    begin, length = draw.choice(((0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155)))
    octal = b"%0*o" % (max(1, length - 1), draw.choice((0, 1, 511, 513, 8**5, 8**10)) % 8 ** max(1, length - 1))
    value = draw.choice(
        (octal, b"\xff" * length, b"\x80" + b"\x7f" * (length - 1), draw.randbytes(length), b"-0000001")
    )
    if length == 1:
        value = draw.choice([bytes([code]) for code in b"0123456xgLKSDNVMA\0\xff"])
    header[begin : begin + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def _zip_field(content: bytes, draw: random.Random) -> bytes:
    """Change a field of a local header, of an entry of the directory, or of its end."""
    places = [
        (found.start(), found.group()) for found in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06)", content)
    ]
    if not places:
        return _flip(content, draw)
    at, mark = draw.choice(places)
    fields = {b"PK\x01\x02": range(4, 46, 2), b"PK\x03\x04": range(4, 30, 2)}.get(mark, range(4, 22, 2))
    begin = at + draw.choice(fields)
    new = draw.choice((b"\0\0", b"\xff\xff", b"\1\0", b"\0\x80", draw.randbytes(2), b"\xff\xff\xff\xff", b"\x63\0"))
    return content[:begin] + new + content[begin + len(new) :]


def _png_chunk(content: bytes, draw: random.Random) -> bytes:
    """Change the data of a chunk, and correct its checksum."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if at + 12 + length > len(content):
            break
        chunks.append((at, length))
        at += 12 + length
    if not chunks:
        return _flip(content, draw)
    at, length = draw.choice(chunks)
    kind = content[at + 4 : at + 8]
    data = _flip(content[at + 8 : at + 8 + length], draw)
    if draw.random() < 0.2:
        kind, data = draw.choice((b"iTXt", b"zTXt", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fdAT")), draw.randbytes(40)
    new = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content[:at] + new + content[at + 12 + length :]


def _jpeg_segment(content: bytes, draw: random.Random) -> bytes:
    """Change the length or a byte of a segment."""
    segments = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", content)]
    if not segments:
        return _flip(content, draw)
    at = draw.choice(segments)
    begin = at + draw.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15))
    return content[:begin] + bytes([draw.choice((0, 1, 0x11, 0x41, 0xFF, draw.randrange(256)))]) + content[begin + 1 :]


def _json_value(content: bytes, draw: random.Random) -> bytes:
    """Replace, remove or add a value anywhere in the tree."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _flip(content, draw)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(tree)
    if not places:
        return json.dumps(_value(draw)).encode("utf-8", "surrogatepass")
    node, key = draw.choice(places)
    if draw.random() < 0.15:
        del node[key]
    elif draw.random() < 0.1 and isinstance(node, dict):
        node[draw.choice(_TEXTS)] = _value(draw)
    else:
        node[key] = _value(draw)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _value(draw: random.Random) -> Any:
    nested: Any = 1
    for _ in range(200):
        nested = [nested]
    choices = (*_NUMBERS, *_TEXTS, None, True, [], {}, [1, "a"], {"a": {"b": []}}, nested, ["a", "a"], [[0]])
    return draw.choice(choices)


def _safetensors_header(content: bytes, draw: random.Random) -> bytes:
    """Change a value of the header, and correct its length."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content):
        return _flip(content, draw)
    header = _json_value(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _onnx_metadata(content: bytes, draw: random.Random) -> bytes:
    """Change a value of the JSON in the metadata."""
    import onnx

    try:
        model = onnx.load_from_string(content)
    except Exception:  # protobuf's errors have no class in common
        return _flip(content, draw)
    if not model.metadata_props:
        return _flip(content, draw)
    entry = draw.choice(model.metadata_props)
    value = entry.value if isinstance(entry.value, bytes) else entry.value.encode()  # bytes if they are not UTF-8
    entry.value = _json_value(value, draw).decode(errors="replace")
    return bytes(model.SerializeToString())


def _line(content: bytes, draw: random.Random) -> bytes:
    """Change a line or a word of a text."""
    lines = content.split(b"\n")
    number = draw.randrange(len(lines))
    words = re.split(rb"([\s,:;\[\]{}]+)", lines[number])
    new = (b"", b"-", b"*a", b"&a", b"!!python/x", b"? ", b"[", b"}", b"\t", b"'", b'"', b"9" * 5000, b"\xff\xfe",
           b"\0", b"~", b"1e999", b".nan", b"0x10", b"<<: {}", b"../..", b"yes", b"\xc3", b"\r")  # fmt: skip
    words[draw.randrange(len(words))] = draw.choice(new)
    action = draw.random()
    lines[number] = b"".join(words)
    if action < 0.2:
        lines.insert(number, lines[draw.randrange(len(lines))])
    elif action < 0.3:
        lines[number] = b"  " + lines[number]
    return b"\n".join(lines)


Mutation = Callable[[bytes, random.Random], bytes]
_PLAIN: tuple[Mutation, ...] = (_flip, _truncate, _remove, _insert, _repeat, _swap, _length)
_SPECIAL: tuple[tuple[str, Mutation], ...] = (
    (r"tar", _tar_field),
    (r"zip|pth", _zip_field),
    (r"png", _png_chunk),
    (r"jpg", _jpeg_segment),
    (r"json|jsonl", _json_value),
    (r"safetensors", _safetensors_header),
    (r"onnx", _onnx_metadata),
    (r"yaml|csv|txt|jsonl|http", _line),
)
