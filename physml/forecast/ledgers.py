"""The ledger of a rollout as labelled variables."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from physml.fields import Channel, Spec
from physml.metrics.spectra import shells
from physml.rollout import Bounds, Ledger

QUANTITIES = {
    "finite": "every number of the frame is finite",
    "mean": "area-weighted mean",
    "energy": "half the area-weighted mean square",
    "variance": "area-weighted variance",
    "minimum": "minimum over the cells",
    "maximum": "maximum over the cells",
}
SQUARED = ("energy", "variance")
TIME_STEP = "ledger_time_step"
SPECTRUM_STEP = "spectrum_step"  # dimension of the steps whose energy spectrum is kept; 0 is the initial state


@dataclass(frozen=True)
class Labels:
    """Names and attributes of the ledger; `members` along the batch become a dimension of their own. Of the channels
    those in `held` exist."""

    spec: Spec
    initial: Ledger
    bounds: Bounds
    members: int | None
    held: tuple[int, ...]

    @property
    def channels(self) -> list[tuple[int, Channel]]:
        return [(i, self.spec.channels[i]) for i in self.held]

    @property
    def dims(self) -> tuple[str, ...]:
        return ("trajectory",) if self.members is None else ("member", "trajectory")

    def fold(self, array: np.ndarray) -> np.ndarray:
        return array if self.members is None else array.reshape(self.members, -1, *array.shape[1:])

    def totals(self, ledger: Ledger) -> xr.Dataset:
        """`ledger_QUANTITY_VARIABLE (trajectory, lead)`."""
        variables = {}
        for quantity, meaning in QUANTITIES.items():
            values = np.asarray(getattr(ledger, quantity))
            for i, channel in self.channels:
                attrs: dict[str, Any] = {"long_name": f"{meaning}: {channel.name}"}
                column = self.fold(values[..., i])
                if quantity == "finite":
                    column = column.astype(np.int8)
                else:
                    attrs |= _units(quantity, channel)
                    if self.bounds.scale is not None:
                        attrs |= {"training_center": float(self.bounds.center[i])}
                        attrs |= {"training_scale": float(self.bounds.scale[i])}
                variables[f"ledger_{quantity}_{channel.name}"] = ((*self.dims, "lead"), column, attrs)
        return xr.Dataset(variables)

    def spectra(self, spectrum: np.ndarray) -> xr.Dataset:
        """`ledger_spectrum_VARIABLE (trajectory, spectrum_step, wavenumber)` from `(batch, step, channel, shell)`."""
        plan, variables = shells(self.spec.grid), {}
        for i, channel in self.channels:
            attrs = {"long_name": f"half the mean square by wavenumber shell: {channel.name}"}
            attrs |= {"units": f"({channel.unit})2"} if channel.unit else {}
            dims = (*self.dims, SPECTRUM_STEP, "wavenumber")
            variables[f"ledger_spectrum_{channel.name}"] = (dims, self.fold(spectrum[:, :, i]), attrs)
        about = {"long_name": "wavenumber", "resolved_shells": plan.resolved}
        about |= {"units": plan.unit} if plan.unit else {}
        return xr.Dataset(variables, {"wavenumber": ("wavenumber", plan.wavenumbers, about)})

    def summary(self, good: np.ndarray, step) -> xr.Dataset:
        """`steps_completed (trajectory)`, the ledger of the initial state, `ledger_initial_QUANTITY_VARIABLE
        (trajectory)`, and the lead time of one `step`.
        """
        attrs = {"long_name": "steps before the trajectory diverged (all of them if it did not)"}
        variables: dict[str, Any] = {"steps_completed": (self.dims, self.fold(good.astype(np.int32)), attrs)}
        for quantity in QUANTITIES:
            if quantity == "finite":
                continue
            values = np.asarray(getattr(self.initial, quantity), np.float64)
            for i, channel in self.channels:
                attrs = {"long_name": f"{QUANTITIES[quantity]} of the initial state: {channel.name}"}
                attrs |= _units(quantity, channel)
                variables[f"ledger_initial_{quantity}_{channel.name}"] = (self.dims, self.fold(values[:, i]), attrs)
        variables[TIME_STEP] = ((), step, {"long_name": "lead time of one step"})
        return xr.Dataset(variables)


def _units(quantity: str, channel: Channel) -> dict[str, str]:
    return {"units": f"({channel.unit})2" if quantity in SQUARED else channel.unit} if channel.unit else {}


def spectrum_coordinates(leads: np.ndarray, every: int | None) -> dict[str, xr.Variable]:
    """The steps of the spectra and their lead times; nothing without spectra."""
    if not every:
        return {}
    steps = np.arange(0, len(leads) + 1, every)
    zero = leads[:1] - leads[:1]  # of their type: numbers or time differences
    times = np.concatenate([zero, leads])[steps]
    return {
        SPECTRUM_STEP: xr.Variable((SPECTRUM_STEP,), steps, {"long_name": "step, 0 for the initial state"}),
        "spectrum_lead": xr.Variable((SPECTRUM_STEP,), times, {"long_name": "lead time"}),
    }
