"""Physics of a frame, projected after each step. `CONSTRAINTS` maps names to config classes with `build(spec)`."""

CONSTRAINTS: dict[str, type] = {}
