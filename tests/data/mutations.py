"""Damaged copies of samples: whatever is wrong with a file, opening ends in a dataset or a typed error."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import physml
from physml.errors import PhysmlError

SEEDS = pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 2040), marks=pytest.mark.slow)], ids=["40", "2000"]
)


def damage(source: Path, target: Path, seed: int) -> Path:
    """A copy of a sample (file or folder) with one random change: bytes, length, a missing or swapped file."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    files = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
    file = dice.choice(files)
    content = bytearray(file.read_bytes())
    match dice.randrange(8):
        case 0:
            file.write_bytes(content[: dice.randrange(len(content) + 1)])
        case 1:
            file.unlink()
        case 2:
            shutil.copy(dice.choice(files), file.with_name("other"))
            (file.with_name("other")).replace(file)
        case 3:
            file.write_bytes(content + dice.randbytes(dice.choice([1, 100, 5000])))
        case 4:  # zeros where numbers were
            at = dice.randrange(len(content) + 1)
            content[at : at + 64] = bytes(len(content[at : at + 64]))
            file.write_bytes(content)
        case _:
            # Headers are what readers decide by: half of the changes hit the first kibibytes.
            reach = len(content) if dice.random() < 0.5 else min(len(content), 4096)
            for _ in range(dice.choice([1, 1, 4, 32])):
                if content:
                    content[dice.randrange(reach)] = dice.randrange(256)
            file.write_bytes(content)
    return target


def survives(path: Path, format: str, **options) -> str:
    """ "opened", or the name of the typed error; anything else that opening or reading raises goes on."""
    try:
        ds = physml.open_dataset(path, format=format, **options)
        for variable in ds.variables.values():
            if variable.nbytes < 2**26:
                np.asarray(variable.values)
    except PhysmlError as error:
        if path.name not in str(error):
            raise AssertionError(f"the error does not name the file: {error}") from error
        return type(error).__name__
    return "opened"
