"""Data: files and arrays in, windows out. Everything that knows xarray, netCDF or zarr lives here."""

from physml.data.arrays import from_array
from physml.data.config import DataConfig
from physml.data.dataset import XarrayDataset
from physml.data.export import save_dataset
from physml.data.formats import FORMATS
from physml.data.labelled import from_frames, spec_of, to_window
from physml.data.loader import Loader
from physml.data.mixture import Mixture, MixtureConfig
from physml.data.opening import open_dataset
from physml.data.sampling import Sample, Samples
from physml.data.summary import describe, fit_normalizer, statistics
from physml.data.synthetic import SyntheticConfig
from physml.files import cache_folder

__all__ = [
    "FORMATS",
    "DataConfig",
    "Loader",
    "Mixture",
    "MixtureConfig",
    "Sample",
    "Samples",
    "SyntheticConfig",
    "XarrayDataset",
    "cache_folder",
    "describe",
    "fit_normalizer",
    "from_array",
    "from_frames",
    "open_dataset",
    "save_dataset",
    "spec_of",
    "statistics",
    "to_window",
]
