"""xarray in, xarray out: labelled forecasts of any length, in memory or streamed to a file."""

from physml.forecast.run import check_forecast, forecast
from physml.forecast.summary import blow_ups, stability

__all__ = ["blow_ups", "check_forecast", "forecast", "stability"]
