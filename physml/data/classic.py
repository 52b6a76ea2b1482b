"""Truncated classic netCDF files, told by the length that their header promises (the C library reads zeros there)."""

import os
import struct

import numpy as np

from physml.errors import DataError


def check_length(path: str) -> None:
    """Raises DataError when a classic netCDF file is shorter than its header says (the C library would read zeros)."""
    with open(path, "rb") as file:
        try:
            expected = _promised(file)
        except (struct.error, ValueError, LookupError, OverflowError) as error:
            raise DataError(f"{path} is truncated inside its header. Copy or download it again.") from error
    size = os.path.getsize(path)
    if size < expected:
        raise DataError(
            f"{path} is truncated: {size} bytes, but its header needs {expected}. Copy or download it again."
        )


def _promised(file) -> int:
    """Bytes that the header of a classic netCDF file (CDF-1, -2, -5) promises; netCDF file format specification."""
    version = file.read(4)[3]
    count_format, offset_format = (">q" if version == 5 else ">i"), (">i" if version == 1 else ">q")
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}

    def number(fmt=count_format):
        return struct.unpack(fmt, file.read(struct.calcsize(fmt)))[0]

    def skip(length):
        padded = length + -length % 4
        if length < 0 or len(file.read(padded)) != padded:
            raise ValueError("header ends early")

    def count():
        size = number()
        if size < 0:  # the C library would take it as billions
            raise ValueError("negative count")
        return range(size)

    def items():
        number(">i")  # tag of the list, or zero when it is absent
        return count()

    def skip_attributes():
        for _ in items():
            skip(number())
            kind = number(">i")
            skip(number() * sizes[kind])

    records = number()
    dims = []
    for _ in items():
        skip(number())
        dims.append(number())
    skip_attributes()
    ends, record_bytes, record_ends = [0], 0, []
    variables = []
    for _ in items():
        skip(number())
        shape = [dims[number()] for _ in count()]
        skip_attributes()
        kind = number(">i")
        number()  # vsize: recomputed below, because it overflows for big variables
        variables.append((shape, sizes[kind], number(offset_format)))
    recorded = [v for v in variables if v[0] and v[0][0] == 0]
    for shape, size, begin in variables:
        if shape and shape[0] == 0:
            slab = int(np.prod(shape[1:], dtype=object)) * size
            record_bytes += slab if len(recorded) == 1 else slab + -slab % 4
            record_ends.append((begin, slab))
        else:
            ends.append(begin + int(np.prod(shape, dtype=object) if shape else 1) * size)
    if records > 0:
        ends += [begin + (records - 1) * record_bytes + slab for begin, slab in record_ends]
    return max(ends)
