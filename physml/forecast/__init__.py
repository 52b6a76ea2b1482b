"""xarray in, xarray out: labelled forecasts of any length, in memory or streamed to a file."""

from physml.forecast.run import forecast

__all__ = ["forecast"]
