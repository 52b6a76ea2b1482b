"""Cuts the North Atlantic out of the yearly NCEP/NCAR Reanalysis 1 files of daily sea level pressure (slp.YYYY.nc, NOAA
PSL).

python datasets/ncep_slp/prepare.py slp.20??.nc --out ncep_slp_natl_daily_2001-2010.nc
"""

import argparse
import datetime
import os
import sys

import numpy as np
import xarray as xr

from physml.data import DataConfig, open_dataset, spec_of, to_window
from physml.errors import DataError, PhysmlError

REGION = {"latitude": (30.0, 70.0), "longitude": (-70.0, 10.0)}
PASCAL = ("Pa", "Pascal", "Pascals", "pascals")


def prepare(paths: list[str], first: str, last: str) -> xr.Dataset:
    """The region of the days `first` to `last`, both included: `slp (time, latitude, longitude)`, Pa, float32.

    Latitude and longitude ascend, longitude in -180..180. Raises DataError when a day is missing or the unit is not
    pascal.
    """
    source = open_dataset(paths if len(paths) > 1 else paths[0])
    if "slp" not in source:
        raise DataError(
            f"{paths[0]} has no variable 'slp', but {sorted(source.data_vars)}. Give the files slp.YYYY.nc."
        )
    if source.slp.attrs.get("units") not in PASCAL:
        raise DataError(f"{paths[0]}: slp is in {source.slp.attrs.get('units')!r}, but pascal was expected.")
    cut = DataConfig(region=REGION).select(source[["slp"]].isel(trajectory=0).sel(time=slice(first, last)))
    days = np.arange(np.datetime64(first, "D"), np.datetime64(last, "D") + 1)
    found = cut.time.values.astype("datetime64[D]")
    if missing := sorted(set(days.tolist()) - set(found.tolist())):
        raise DataError(
            f"{len(missing)} days are missing, the first is {missing[0]}. Add the file slp.{missing[0].year}.nc."
        )
    spec = spec_of(cut, ("slp",))
    values = to_window(cut, spec).frames[0, ..., 0]  # latitude and longitude ascend, whatever the file did
    latitude, longitude = (np.asarray(axis.centers) for axis in spec.grid.axes)
    attrs = {
        "standard_name": "air_pressure_at_mean_sea_level",
        "long_name": "daily mean sea level pressure",
        "units": "Pa",
        "cell_methods": "time: mean",
    }
    coords = {
        "time": ("time", cut.time.values, {"standard_name": "time", "axis": "T"}),
        "latitude": ("latitude", latitude, {"standard_name": "latitude", "units": "degrees_north"}),
        "longitude": ("longitude", longitude, {"standard_name": "longitude", "units": "degrees_east"}),
    }
    return xr.Dataset({"slp": (("time", "latitude", "longitude"), values, attrs)}, coords, _provenance(paths))


def _provenance(paths: list[str]) -> dict[str, str]:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "Conventions": "CF-1.8",
        "title": "NCEP/NCAR Reanalysis 1 daily mean sea level pressure, North Atlantic",
        "source": "NCEP/NCAR Reanalysis 1, NOAA Physical Sciences Laboratory",
        "source_file": ", ".join(os.path.basename(path) for path in paths),
        "license": "public domain",
        "references": "Kalnay et al. 1996, Bull. Amer. Meteor. Soc. 77, 437-471",
        "history": f"{stamp}: region cut by datasets/ncep_slp/prepare.py",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="yearly files slp.YYYY.nc of the NOAA PSL archive")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--first", default="2001-01-01", help="first day")
    parser.add_argument("--last", default="2010-12-31", help="last day")
    options = parser.parse_args()
    try:
        data = prepare(options.files, options.first, options.last)
    except PhysmlError as error:
        print(error, file=sys.stderr)
        return 2
    unfinished = f"{options.out}.part"
    data.to_netcdf(unfinished, encoding={"slp": {"zlib": True, "complevel": 4}})
    os.replace(unfinished, options.out)
    print(f"{options.out}: {data.sizes['time']} days, mean {float(data.slp.astype('f8').mean()):.1f} Pa")
    return 0


if __name__ == "__main__":
    sys.exit(main())
