"""Arrays saved by numpy.save, local or remote: the header is read at once, rows of numbers when they are asked for."""

import io
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from physml.data import netcdf
from physml.data.place import Place
from physml.errors import DataError, first_line

HEADER = 4096  # bytes that hold the header of any array of plain numbers
PARSING = threading.Lock()  # numpy parses a Python literal, and CPython 3.11 miscounts when threads do so at once
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Npy:
    """One array of floats. Reads are ranges of bytes: no file is mapped, so one that shrinks is a typed error."""

    place: Place
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @staticmethod
    def read(place: Place, axes: Sequence[str]) -> "Npy":
        """Raises DataError unless the file holds exactly one array of float32 or float64 with those axes."""
        head = io.BytesIO(_part(place, 0, HEADER))
        try:
            with PARSING:
                shape, fortran, dtype = HEADERS[np.lib.format.read_magic(head)](head)
        except Exception as error:  # numpy evaluates the header as a Python literal: whatever that raises
            raise DataError(f"{place} is not a numpy array, or its header is damaged. Download it again.") from error
        plain = dtype.kind == "f" and dtype.itemsize in (4, 8) and not fortran
        if not plain or len(shape) != len(axes) or min(shape) < 1:
            raise DataError(
                f"{place} holds {dtype} of shape {shape}{' in Fortran order' if fortran else ''}, but float32 or "
                f"float64 ({', '.join(axes)}) in C order was expected. Save it as such with numpy.save."
            )
        expected, size = head.tell() + math.prod(shape) * dtype.itemsize, place.size()
        if size != expected:
            raise DataError(f"{place} has {size} bytes, but its header needs {expected}. Download it again.")
        return Npy(place, head.tell(), shape, dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Entries start..stop of the first axis."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        content = _part(self.place, self.offset + start * size, self.offset + stop * size)
        if len(content) != (stop - start) * size:
            raise DataError(f"{self.place} became shorter since it was opened. Download it again.")
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


def _part(place: Place, start: int, stop: int) -> bytes:
    system, root = netcdf.file_system(place.path, place.storage_options)
    try:
        return bytes(system.cat_file(root, start, stop))
    except FileNotFoundError as error:
        raise DataError(netcdf.missing(place.path)) from error
    except OSError as error:
        raise DataError(f"{place} cannot be read: {first_line(error)}.") from error
