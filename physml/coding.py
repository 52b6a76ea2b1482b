"""Frozen dataclasses <-> plain containers (JSON, YAML), strictly: keys known, types checked, every error with its path.

A config chosen from a registry is tagged: `{"name": "fno", "width": 32}`. Where a class of the registry has a field
called `name` itself, the tag of that registry is written as `type`; `name` and `type` are read alike where only one of
them can be meant. A field is tied to its registry by `tagged`:

    @dataclass(frozen=True)
    class Experiment:
        model: Any = tagged(MODELS)                               # one
        constraints: tuple[Any, ...] = tagged(CONSTRAINTS, default=())   # several
        data: DataConfig = DataConfig()                           # a nested dataclass needs no tag

Nothing is imported or executed from the data: names are looked up in dicts that the program holds.
"""

import dataclasses
import datetime
import enum
import math
import operator
import os
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union

from physml.errors import ConfigError, PhysmlError, suggest

Registry = Mapping[str, type]
_REGISTRY = "registry"
_UNTAGGED = "untagged"
_SCALARS = (bool, int, float, str)


def tagged(registry: Registry | Callable[[], Registry], untagged: str | None = None, **field: Any) -> Any:
    """A dataclass field whose value(s) come from `registry` (or from a function that returns it, to import late).

    `untagged` is the entry that tables without a tag are read as.
    """
    return dataclasses.field(metadata={_REGISTRY: registry, _UNTAGGED: untagged}, **field)


def tag_of(registry: Registry) -> str:
    """The key that is written to name the entry: "name", or "type" where an entry has a field of that name."""
    fields = (f.name for cls in registry.values() if dataclasses.is_dataclass(cls) for f in dataclasses.fields(cls))
    return "type" if "name" in fields else "name"


def name_of(config: Any, registry: Registry, path: str = "config") -> str:
    """The registry name of `config`'s class. Raises ConfigError when the class is not registered."""
    for name, cls in registry.items():
        if type(config) is cls:
            return name
    raise ConfigError(
        f"{path} is a {type(config).__name__}, which is not registered: it could not be read back. "
        f"Use one of {', '.join(sorted(registry))}, or add the class to the registry dict."
    )


def to_dict(config: Any, registry: Registry | None = None, path: str = "config") -> Any:
    """Plain containers of a config; `from_dict(registry or type(config), ...)` gives an equal one back.

    Raises ConfigError for values that have no plain form (arrays, functions, unregistered classes).
    """
    if registry is not None and config is not None:
        registry = _resolve(registry)
        if isinstance(config, (tuple, list)):
            return [to_dict(item, registry, f"{path}[{i}]") for i, item in enumerate(config)]
        if isinstance(config, Mapping):
            return {key: to_dict(value, registry, f"{path}.{key}") for key, value in config.items()}
        return {tag_of(registry): name_of(config, registry, path), **to_dict(config, None, path)}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: to_dict(getattr(config, field.name), field.metadata.get(_REGISTRY), f"{path}.{field.name}")
            for field in dataclasses.fields(config)
            if field.init
        }
    if isinstance(config, Mapping):
        return {_text_key(key, path): to_dict(value, None, f"{path}.{key}") for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(item, None, f"{path}[{i}]") for i, item in enumerate(config)]
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if config is None or type(config) in _SCALARS:
        return config
    if hasattr(config, "item") and getattr(config, "ndim", None) == 0:  # numpy scalars
        return config.item()
    raise ConfigError(
        f"{path} is a {type(config).__name__}, which has no plain form. Use numbers, text or tuples of them."
    )


def check_fields(config: Any) -> None:
    """Checks the fields of a dataclass against their annotations and settles them: lists, ranges and arrays become
    tuples, numpy scalars numbers. Those tied to a registry are left alone. Raises ConfigError as `from_dict`.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if _REGISTRY not in field.metadata:
            value = getattr(config, field.name)
            if isinstance(value, range) or getattr(value, "ndim", 0):
                value = list(value)
            object.__setattr__(config, field.name, from_dict(hints[field.name], value, field.name))


def check_positive(config: Any, *names: str) -> None:
    """Raises ConfigError unless the fields are finite and positive."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} of {type(config).__name__} must be positive, but {name} is {value}.")


def whole_number(name: str, value: Any) -> int:
    """A whole number of any type. Raises ConfigError, about the option `name`, for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}, but a whole number was expected.") from None


def from_dict(target: Any, data: Any, path: str = "config") -> Any:
    """Builds `target` from plain containers.

    `target` is a dataclass, a registry (then `data` is tagged, or just the name), or any annotation made of int, float,
    str, bool, None, Literal, Enum, Path, tuple, list, dict, Optional, Union and dataclasses. Raises ConfigError that
    begins with the dotted path of the culprit, says what came, what was expected, and the nearest valid name.
    """
    if isinstance(target, Mapping):
        return _from_tagged(target, data, path)
    if isinstance(target, type) and dataclasses.is_dataclass(target):
        return _from_fields(target, data, path)
    return _from_annotation(target, data, path)


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `data` with `"model.width=32"`-like assignments put in; values are read as YAML.

    `model=unet` chooses another registry entry with its defaults. `from_dict` checks types and names afterwards.
    """
    result = dict(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(
                f"{assignment!r} is not an assignment. Write it as path.to.field=value, e.g. model.width=32."
            )
        result = _assign(result, keys, _parse(text, assignment), path)
    return result


def _parse(text: str, assignment: str) -> Any:
    import yaml

    try:
        return dates_as_text(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"The value in {assignment!r} is not readable as YAML: {error}. Quote it.") from error


def dates_as_text(value: Any) -> Any:
    """YAML reads 2019-03-01 as a date; fields hold text."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list):
        return [dates_as_text(item) for item in value]
    if isinstance(value, dict):
        return {key: dates_as_text(item) for key, item in value.items()}
    return value


def _assign(data: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(data, (list, tuple)):
        if not key.isdigit() or int(key) >= len(data):
            raise ConfigError(f"{path}: {key!r} does not index a list of {len(data)}. Use 0 to {len(data) - 1}.")
        return [_assign(item, rest, value, path) if i == int(key) else item for i, item in enumerate(data)]
    if isinstance(data, str):  # a bare registry name gets fields
        data = {"name": data}
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: {data!r} has no field {key!r}.")
    return {**data, key: _assign(data.get(key), rest, value, path)}


def _resolve(registry: Registry | Callable[[], Registry]) -> Registry:
    return registry if isinstance(registry, Mapping) else registry()


def _text_key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{path} has the key {key!r}, but keys must be text.")
    return key


def _from_tagged(registry: Registry, data: Any, path: str, untagged: str | None = None) -> Any:
    tag = tag_of(registry)
    if type(data) in registry.values():
        return data
    if isinstance(data, str):
        data = {tag: data}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is {data!r}, but a table with the key {tag!r} was expected." + _choices(registry))
    if tag not in data:
        other = "name" if tag == "type" else "type"
        # `name` may also be the field that an entry has: then it tells the entry only where it is one's name.
        if other in data and (tag == "name" or _is_entry(data[other], registry)):
            tag = other
        elif untagged is not None and other not in data:
            data = {tag: untagged, **data}
        else:
            raise ConfigError(f"{path} lacks the key {tag!r} that says which one it is." + _choices(registry))
    name = data[tag]
    if not _is_entry(name, registry):
        raise ConfigError(f"{path}.{tag} is {name!r}, which is unknown." + suggest(str(name), registry))
    return _from_fields(registry[name], {key: value for key, value in data.items() if key != tag}, path)


def _is_entry(name: Any, registry: Registry) -> bool:
    return isinstance(name, str) and name in registry


def _choices(registry: Registry) -> str:
    return f" Valid: {', '.join(sorted(registry))}."


def _from_fields(cls: type, data: Any, path: str) -> Any:
    if type(data) is cls:
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is {data!r}, but a table of the fields of {cls.__name__} was expected.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: {cls.__name__} has no such field." + suggest(str(key), fields))
    missing = [
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}, which {cls.__name__} needs.")
    hints = typing.get_type_hints(cls)
    values = {key: _field_value(fields[key], hints[key], value, f"{path}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except PhysmlError as error:
        raise type(error)(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {cls.__name__} refuses these values: {error}") from error


def _field_value(field: dataclasses.Field, hint: Any, value: Any, path: str) -> Any:
    if _REGISTRY not in field.metadata:
        return from_dict(hint, value, path)
    registry, untagged = _resolve(field.metadata[_REGISTRY]), field.metadata[_UNTAGGED]
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and (type(None) in members or field.default is None):
        return None
    origins = {typing.get_origin(member) or member for member in members}
    if origins & {tuple, list}:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} is {value!r}, but a list was expected." + _choices(registry))
        items = [_from_tagged(registry, item, f"{path}[{i}]", untagged) for i, item in enumerate(value)]
        return items if list in origins else tuple(items)
    if dict in origins and isinstance(value, Mapping):
        return {key: _from_tagged(registry, item, f"{path}.{key}", untagged) for key, item in value.items()}
    return _from_tagged(registry, value, path, untagged)


def _from_annotation(hint: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return from_dict(typing.get_args(hint)[0], data, path)
    if hint in (Any, object):
        return _frozen(data)
    if origin in (Union, types.UnionType):
        return _from_union(typing.get_args(hint), data, path)
    if origin is Literal:
        return _from_literal(typing.get_args(hint), data, path)
    container = origin or hint
    if container in (tuple, list, Sequence, Iterable):
        return _from_sequence(hint, container, data, path)
    if container in (dict, Mapping):
        return _from_mapping(hint, data, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(_from_literal(tuple(member.value for member in hint), data, path))
    if hint in (None, type(None)):
        return _check(data is None, None, data, path, "null")
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return pathlib.Path(os.fspath(_check(isinstance(data, (str, os.PathLike)), data, data, path, "a path")))
    if hint in _SCALARS:
        return _from_scalar(hint, data, path)
    if isinstance(hint, type) and isinstance(data, hint):
        return data
    raise ConfigError(
        f"{path} is annotated with {hint}, which has no plain form. Use numbers, text, tuples or dataclasses."
    )


def _check(holds: bool, value: Any, data: Any, path: str, expected: str) -> Any:
    if not holds:
        raise ConfigError(f"{path} is {data!r} ({type(data).__name__}), but {expected} was expected.")
    return value


def _from_scalar(hint: type, data: Any, path: str) -> Any:
    data = _number(data)
    if hint is float:
        if isinstance(data, str):  # YAML 1.1 reads 1e-3 and inf as text
            try:
                return float(data)
            except ValueError:
                pass
        number = isinstance(data, (int, float)) and not isinstance(data, bool)
        return float(_check(number, data, data, path, "a number"))
    if hint is int:
        hint_text = "an integer"
        if isinstance(data, float) and math.isfinite(data) and data == int(data):
            hint_text = f"an integer ({int(data)})"
        return _check(type(data) is int, data, data, path, hint_text)
    expected = {bool: "true or false", str: "text (quote it)"}[hint]
    return _check(type(data) is hint, data, data, path, expected)


def _number(data: Any) -> Any:
    """A scalar of numpy as one of Python."""
    return data.item() if hasattr(data, "item") and getattr(data, "ndim", None) == 0 else data


def _from_literal(values: tuple, data: Any, path: str) -> Any:
    data = _number(data)
    for value in values:
        if type(value) is type(data) and value == data:
            return value
    if isinstance(data, str):
        raise ConfigError(f"{path} is {data!r}." + suggest(data, [str(value) for value in values]))
    raise ConfigError(f"{path} is {data!r}, but one of {', '.join(map(repr, values))} was expected.")


def _from_sequence(hint: Any, container: Any, data: Any, path: str) -> Any:
    arguments = typing.get_args(hint)
    if not isinstance(data, (list, tuple)):
        raise ConfigError(f"{path} is {data!r} ({type(data).__name__}), but a list was expected: write [{data}].")
    fixed = container is tuple and arguments and Ellipsis not in arguments
    if fixed and len(arguments) != len(data):
        raise ConfigError(f"{path} has {len(data)} entries, but {len(arguments)} were expected: {_show(hint)}.")
    each = arguments if fixed else (arguments[:1] or (Any,)) * len(data)
    items = [from_dict(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(each, data, strict=True))]
    return items if container is list else tuple(items)


def _from_mapping(hint: Any, data: Any, path: str) -> dict:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is {data!r} ({type(data).__name__}), but a table was expected.")
    kind = (*typing.get_args(hint), Any, Any)[1] if typing.get_args(hint) else Any
    return {_text_key(key, path): from_dict(kind, value, f"{path}.{key}") for key, value in data.items()}


def _from_union(members: tuple, data: Any, path: str) -> Any:
    if data is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    for member in members:  # an exact type first, so that 1 stays an int in `int | float`
        if isinstance(member, type) and type(data) is member:
            return from_dict(member, data, path)
    errors = []
    for member in members:
        try:
            return from_dict(member, data, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError(f"{path} is {data!r}, but {' or '.join(map(_show, members))} was expected.")


def _frozen(data: Any) -> Any:
    return tuple(_frozen(item) for item in data) if isinstance(data, (list, tuple)) else data


def _show(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
