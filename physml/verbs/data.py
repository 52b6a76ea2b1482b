"""`physml data ...`: generate, fetch, list, describe, convert."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from physml.verbs.common import Assignments, Common, first_line, progress_of, size_of


@dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Solve an equation for many initial states and store the trajectories; continues where it was interrupted.

    Example: physml data generate kolmogorov --out kolmogorov.nc --trajectories 16 --seed 0
    """

    name: tyro.conf.Positional[str]
    """The equation; `physml data list` shows them."""
    out: Path = tyro.MISSING
    """A .nc file or a .zarr folder."""
    trajectories: int = 16
    """How many."""
    steps: int | None = None
    """Frames per trajectory; the equation's own choice if not given."""
    seed: int = 0
    """The same seed gives the same bytes."""
    split: Literal["train", "valid", "test"] = "train"
    """Splits of one seed never share a trajectory."""
    set: Assignments = ()
    """Override a field of the solver, e.g. --set viscosity=0.002; may be repeated."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> dict[str, Any]:
        from physml import coding
        from physml.data.generate import check_output, generate, recipe_of, resolve
        from physml.solvers import SOLVERS

        config = resolve(self.name, self.set)
        if self.dry_run:
            recipe = recipe_of(config, self.trajectories, self.steps, self.seed, self.split)
            check_output(recipe, self.out, self.overwrite)
            return {
                "would write": str(self.out),
                "trajectories": self.trajectories,
                "steps": recipe.steps,
                "solver": coding.to_dict(config, SOLVERS),
            }
        with progress_of(self, "generating") as progress:
            path = generate(
                config, self.out, self.trajectories, seed=self.seed, steps=self.steps, split=self.split,
                overwrite=self.overwrite, progress=progress,
            )  # fmt: skip
        return {"data": str(path), "trajectories": self.trajectories, "bytes": size_of(Path(path))}


@dataclass(frozen=True, kw_only=True)
class Fetch(Common):
    """Download the files of a dataset card, or of a URL: resumed where it broke off, checked, whole or not at all.

    Example: physml data fetch the_well/shear_flow --out shear_flow --files 'data/train/*'
    Example: physml data fetch https://host/file.nc --out data --sha256 0123...
    """

    source: tyro.conf.Positional[str]
    """A card, a part of a card (card/part), or a URL; `physml data list` shows the cards."""
    out: Path = tyro.MISSING
    """The folder that the files go to; SHA256SUMS in it has their checksums."""
    files: Assignments = ()
    """Fetch only the files that match, e.g. --files 'data/train/*'; may be repeated."""
    sha256: str | None = None
    """What a single URL must hash to."""

    def run(self) -> dict[str, Any]:
        from physml.data.fetch import fetch

        with progress_of(self, "fetching") as progress:
            return fetch(
                self.source, self.out, files=self.files, sha256=self.sha256, progress=progress, dry_run=self.dry_run
            )


@dataclass(frozen=True, kw_only=True)
class DataList(Common):
    """List the equations that can be generated, the formats that can be read, and the dataset cards.

    Example: physml data list
    """

    def run(self) -> dict[str, Any]:
        from physml.data import FORMATS, cards
        from physml.solvers import SOLVERS

        return {
            "generated": {name: first_line(config) for name, config in SOLVERS.items()},
            "formats": {name: first_line(format.open) for name, format in FORMATS.items()},
            "cards": cards.summaries(),
        }


@dataclass(frozen=True, kw_only=True)
class Info(Common):
    """Describe a dataset: variables, units, grid, times, missing values. Or show the card of that name.

    Example: physml data info kolmogorov.nc
    Example: physml data info the_well
    """

    path: tyro.conf.Positional[str]
    """File, folder, URL, or a card."""
    format: str | None = None
    """Detected from the content if not given."""
    option: Assignments = ()
    """An option of the format, e.g. --option split=train; may be repeated."""

    def run(self) -> dict[str, Any]:
        from physml.data import cards, describe

        if not Path(self.path).exists() and self.path in cards.names():
            parts = [name for name in cards.sources() if name.partition("/")[0] == self.path]
            return {"card": self.path, **cards.sections(self.path), "can be fetched": parts}
        return describe(_open(self.path, self.format, self.option))


@dataclass(frozen=True, kw_only=True)
class Stats(Common):
    """Mean, deviation and increment deviation of every channel, in one streaming pass.

    Example: physml data stats kolmogorov.nc --variables vorticity
    """

    path: tyro.conf.Positional[str]
    """File, folder or URL."""
    variables: tuple[str, ...] = ()
    """Channels; all gridded variables if not given."""
    format: str | None = None
    """Detected from the content if not given."""
    option: Assignments = ()
    """An option of the format, e.g. --option split=train; may be repeated."""

    def run(self) -> dict[str, Any]:
        from physml.data import XarrayDataset, labelled, statistics

        dataset = _open(self.path, self.format, self.option)
        data = XarrayDataset(dataset, labelled.spec_of(dataset, variables=self.variables or None))
        if self.dry_run:
            trajectories, frames = len(data.lengths), sum(data.lengths)
            channels = list(data.spec.names)
            return {"would read": self.path, "channels": channels, "trajectories": trajectories, "frames": frames}
        with progress_of(self, "reading") as progress:
            return statistics(data, store=True, progress=progress)


@dataclass(frozen=True, kw_only=True)
class DataConvert(Common):
    """Write a dataset of any readable format as netCDF, zarr, or in the layout of a benchmark, chunk by chunk.

    Example: physml data convert cfdbench/cavity cavity.zarr
    Example: physml data convert kolmogorov.nc kolmogorov --to the_well
    """

    source: tyro.conf.Positional[str]
    """File, folder or URL."""
    out: tyro.conf.Positional[Path]
    """A .nc file, a .zarr folder, or for a benchmark's layout a folder or one .h5 or .hdf5 file."""
    to: Literal["netcdf", "pdearena", "the_well", "zarr"] | None = None
    """netcdf and zarr are told by the suffix if not given."""
    format: str | None = None
    """Of the source; detected from the content if not given."""
    option: Assignments = ()
    """An option of the source's format, e.g. --option split=train; may be repeated."""
    zarr_format: Literal[2, 3] = 3
    """2 for readers that are older than zarr 3."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> dict[str, Any]:
        from physml.data.export import check_layout, check_output, save_dataset

        to = check_output(self.out, self.to, self.overwrite)
        dataset = _open(self.source, self.format, self.option)
        sizes = {str(dim): size for dim, size in dataset.sizes.items()}
        if self.dry_run:
            check_layout(dataset, self.out, to)
            return {
                "would write": str(self.out),
                "as": to,
                "sizes": sizes,
                "variables": list(map(str, dataset.data_vars)),
            }
        path = save_dataset(dataset, self.out, to, zarr_format=self.zarr_format, overwrite=self.overwrite)
        return {"data": str(path), "sizes": sizes, "bytes": size_of(path)}


def _open(path: str, format: str | None, options: Assignments) -> Any:
    from physml import coding
    from physml.data import open_dataset
    from physml.errors import ConfigError

    given = coding.override({}, options)
    if taken := {"path", "format"} & set(given):
        raise ConfigError(f"--option has {min(taken)!r}, which is no option of a format: give it by itself.")
    return open_dataset(path, format, **given)


VERBS = {
    "generate": Generate,
    "fetch": Fetch,
    "list": DataList,
    "info": Info,
    "stats": Stats,
    "convert": DataConvert,
}
