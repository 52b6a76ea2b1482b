"""A look at the global heaps of an HDF5 file, over which the HDF5 library loops forever when they are damaged."""

import struct

from physml.errors import DataError

HEAD = 2**18  # bytes to look at; texts of attributes and lists of dimensions are written first


def check_heaps(head: bytes, path: str) -> None:
    """Raises DataError for a heap in the beginning of a file that holds free space of no size.

    Layout: HDF5 file format specification, section III.E: "GCOL", version, size; then objects of index, references,
    size and content, and free space of index 0.
    """
    start = head.find(b"GCOL\x01")
    while start >= 0:
        if start + 16 <= len(head):
            (size,) = struct.unpack_from("<Q", head, start + 8)
            _check(head[start : start + size], path)
        start = head.find(b"GCOL\x01", start + 5)


def _check(heap: bytes, path: str) -> None:
    at = 16
    while at + 16 <= len(heap):
        index, size = struct.unpack_from("<H6xQ", heap, at)
        length = size if index == 0 else 16 + size + -size % 8
        if length == 0:
            raise DataError(f"{path} cannot be read: it is damaged, a heap is overwritten. Copy or download it again.")
        at += length
