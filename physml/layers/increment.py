"""How outputs become the next frame: added to a frame of the input, nothing where a mask says so."""

from jaxtyping import Array, Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature


def check_frame_and_mask(frame: int | None, mask: int | None, signature: Signature) -> None:
    """Raises ConfigError where the inputs have no such channels."""
    if frame is not None and not 0 <= frame <= signature.inputs - signature.outputs:
        raise ConfigError(
            f"frame={frame}: the {signature.outputs} outputs are added to as many inputs from there on, but there are "
            f"{signature.inputs} inputs. Lower frame, or set it to None where outputs stand for themselves."
        )
    if mask is not None and not 0 <= mask < signature.inputs:
        raise ConfigError(f"mask={mask}, but there are {signature.inputs} inputs: it is the number of one of them.")


def add_and_mask(
    outputs: Float[Array, "batch *space outputs"],
    fields: Float[ArrayLike, "batch *space inputs"],
    frame: int | None,
    mask: int | None,
) -> Float[Array, "batch *space outputs"]:
    """`outputs`, plus as many inputs from channel `frame` on, times channel `mask` of the inputs; None: without."""
    if frame is not None:
        outputs = outputs + fields[..., frame : frame + outputs.shape[-1]]
    return outputs if mask is None else outputs * fields[..., mask : mask + 1]
