"""Faults in a JPEG's markers that cost no pixel and that every viewer reads over, repaired so that a strict decoder can
still prove that all pixels are there."""

from __future__ import annotations

import re

_START_OF_SCAN, _END_OF_IMAGE, _JFIF, _ADOBE = 0xDA, 0xD9, 0xE0, 0xEE  # ISO/IEC 10918-1, table B.1
_SEQUENTIAL = (0xC0, 0xC1)
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers of no length
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)  # a restart marker belongs to the scan
_MAX_GAP_BYTES = 64  # more could be a segment whose marker was damaged


def repair_markers(data: bytes) -> bytes:
    """Return the JPEG without bytes between segments, and with a valid JFIF version, colour transform and scan range.

    The compressed pixels stay as they are. A JPEG without these faults comes back unchanged.
    """
    parts, position, is_sequential, has_jfif = [data[:2]], 2, False, False
    while found := _MARKER.search(data, position):
        marker, body = found[1][0], found.end()
        if found.start() - position > _MAX_GAP_BYTES:
            return data
        if marker == _END_OF_IMAGE:
            return b"".join([*parts, data[found.start() :]])
        if marker in _ALONE:
            parts.append(found[0])
            position = body
            continue
        position = body + int.from_bytes(data[body : body + 2], "big")
        segment = data[found.start() : position]
        is_sequential |= marker in _SEQUENTIAL
        if marker == _JFIF and data.startswith(b"JFIF\0", body + 2):
            has_jfif, version = True, len(found[0]) + 7
            segment = segment[:version] + b"\1" + segment[version + 1 :]
        elif marker == _ADOBE and not has_jfif and segment[-1:] not in (b"\0", b"\1", b"\2"):
            continue  # where JFIF states the colours, the transform is not used
        elif marker == _START_OF_SCAN:
            if is_sequential:
                segment = segment[:-3] + b"\x00\x3f\x00"
            after = _AFTER_SCAN.search(data, position)
            end = after.start() if after else len(data)
            segment += data[position:end]
            position = end
        parts.append(segment)
    return b"".join([*parts, data[position:]])
