"""Configs survive the way through JSON and YAML, and every mistake is named with its dotted path."""

import dataclasses
import json
import pathlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from physml.coding import check_fields, from_dict, override, tagged, to_dict
from physml.errors import ConfigError


@dataclass(frozen=True)
class Small:
    width: int = 4
    modes: tuple[int, ...] = (8, 8)
    rate: float = 0.1
    skip: Literal["linear", "none"] = "linear"
    bias: bool = True


@dataclass(frozen=True)
class Large(Small):
    depth: int | None = None
    range: tuple[float, float] | None = None

    def __post_init__(self):
        if self.depth is not None and self.depth < 1:
            raise ConfigError(f"depth is {self.depth}, but at least 1 is needed.")


@dataclass(frozen=True)
class Named:
    name: str
    points: int = 64


REGISTRY = {"large": Large, "small": Small}
SOURCES = {"named": Named}


@dataclass(frozen=True)
class Tree:
    model: Any = tagged(REGISTRY)
    extra: tuple[Any, ...] = tagged(lambda: REGISTRY, default=())
    source: Any = tagged(SOURCES, default=None)
    inner: Small = Small()
    folder: pathlib.Path = pathlib.Path("runs")
    labels: dict[str, float] = dataclasses.field(default_factory=dict)
    choice: int | float | str = 1


TREE = Tree(
    Large(width=2, modes=(1, 2, 3), depth=3, range=(0.0, 1.0)),
    (Small(), Large()),
    Named("ks", 32),
    Small(rate=float("inf")),
    pathlib.Path("a/b"),
    {"x": 1.5},
    2.5,
)


def test_round_trip_through_json_is_exact():
    data = json.loads(json.dumps(to_dict(TREE)))
    assert data["model"]["name"] == "large"
    assert data["source"] == {"type": "named", "name": "ks", "points": 32}  # `name` is a field of its own here
    back = from_dict(Tree, data, "tree")
    assert back == TREE
    assert type(back.model.modes) is tuple
    assert hash(back.model) == hash(TREE.model)


def test_name_and_type_are_read_alike_where_one_can_be_meant():
    """The key changed from section to section, and the error of the wrong one did not say so."""
    assert from_dict(REGISTRY, {"type": "large", "depth": 2}) == Large(depth=2)
    assert from_dict(SOURCES, {"type": "named", "name": "ks", "points": 3}) == Named("ks", 3)
    assert from_dict({**SOURCES, **REGISTRY}, {"name": "small", "width": 3}) == Small(width=3)  # no entry's own name
    for table, said in (
        ({"name": "ks", "points": 3}, "lacks the key 'type'"),  # its own field
        ({"name": "named", "points": 3}, "lacks name, which Named needs"),
    ):
        with pytest.raises(ConfigError, match=said):
            from_dict(SOURCES, table)
    with pytest.raises(ConfigError, match=r"config\.type is 'larg', which is unknown. Did you mean 'large'"):
        from_dict(REGISTRY, {"type": "larg"})
    with pytest.raises(ConfigError, match="has no such field"):
        from_dict(REGISTRY, {"name": "large", "type": "small"})


def test_a_table_without_a_tag_is_what_the_field_says():
    @dataclass(frozen=True)
    class Holder:
        source: Any = tagged({**SOURCES, **REGISTRY}, untagged="small", default=None)

    assert from_dict(Holder, {"source": {"width": 3}}).source == Small(width=3)
    assert from_dict(Holder, {"source": {"type": "named", "name": "ks"}}).source == Named("ks")
    with pytest.raises(ConfigError, match="lacks the key 'type'"):
        from_dict(Holder, {"source": {"name": "ks"}})


def test_round_trip_through_yaml_is_exact():
    import yaml

    assert from_dict(Tree, yaml.safe_load(yaml.safe_dump(to_dict(TREE)))) == TREE
    assert from_dict(Small, yaml.safe_load("rate: 1e-3")).rate == 1e-3  # YAML 1.1 takes 1e-3 for text


def test_registry_target_and_bare_name():
    assert from_dict(REGISTRY, {"name": "small", "width": 7}, "model") == Small(width=7)
    assert from_dict(REGISTRY, "large") == Large()
    assert to_dict(Small(), REGISTRY)["name"] == "small"
    assert to_dict(Small(width=np.int64(3)))["width"] == 3


@pytest.mark.parametrize(
    ("target", "data", "parts"),
    [
        (Tree, {"model": {"name": "small", "widht": 3}}, ["tree.model.widht", "Did you mean 'width'"]),
        (Tree, {"model": {"name": "smal"}}, ["tree.model.name", "Did you mean 'small'"]),
        (Tree, {"model": {"width": 3}}, ["tree.model", "'name'", "large, small"]),
        (Tree, {"model": 3}, ["tree.model is 3"]),
        (Tree, {}, ["tree lacks model"]),
        (Tree, {"model": "small", "extra": ["small", "other"]}, ["tree.extra[1].name", "other"]),
        (Tree, {"model": "small", "extra": "small"}, ["tree.extra", "a list"]),
        (Tree, {"model": "small", "inner": {"width": 2.0}}, ["tree.inner.width", "integer (2)"]),
        (Small, {"width": True}, ["tree.width", "integer"]),
        (Small, {"width": "3"}, ["tree.width", "'3'", "integer"]),
        (Small, {"rate": "fast"}, ["tree.rate", "a number"]),
        (Small, {"bias": 1}, ["tree.bias", "true or false"]),
        (Small, {"modes": 4}, ["tree.modes", "write [4]"]),
        (Small, {"modes": [4, "x"]}, ["tree.modes[1]", "integer"]),
        (Small, {"skip": "linaer"}, ["tree.skip", "Did you mean 'linear'"]),
        (Large, {"range": [1.0]}, ["tree.range", "1 entries", "2 were expected"]),
        (Large, {"depth": 0}, ["tree: depth is 0"]),
        (Large, {"depth": "deep"}, ["tree.depth", "integer"]),
        (Tree, {"model": "small", "labels": {"x": "a"}}, ["tree.labels.x", "a number"]),
        (Tree, {"model": "small", "choice": [1]}, ["tree.choice", "int or float or str"]),
    ],
)
def test_mistakes_are_named_with_their_path(target, data, parts):
    with pytest.raises(ConfigError) as error:
        from_dict(target, data, "tree")
    for part in parts:
        assert part in str(error.value)


def test_unregistered_and_opaque_values_are_refused():
    with pytest.raises(ConfigError, match="config.model is a Named, which is not registered"):
        to_dict(Tree(Named("x")))
    with pytest.raises(ConfigError, match="config.labels.x is a ndarray"):
        to_dict(Tree(Small(), labels={"x": np.zeros(3)}))


def test_overrides_change_one_leaf_and_leave_the_source_alone():
    data = to_dict(TREE)
    changed = override(data, ["model.width=9", "extra.1.modes=[5]", "inner.rate=1e-2", "source.name=burgers"])
    tree = from_dict(Tree, changed)
    assert (tree.model.width, tree.extra[1].modes, tree.inner.rate, tree.source.name) == (9, (5,), 0.01, "burgers")
    assert data == to_dict(TREE)
    assert from_dict(Tree, override(data, ["model=small", "model.width=1"])).model == Small(width=1)
    for bad in ("model.width", "=3", "extra.7=small", "model.width.x=1", "model.width=[1"):
        with pytest.raises(ConfigError):
            override(data, [bad])


def test_dates_in_assignments_stay_text():
    assert override({}, ["data.train=[2019-03-01, 2019-03-25T23]", "start=2019-03-01 06:00:00"]) == {
        "data": {"train": ["2019-03-01", "2019-03-25T23"]},
        "start": "2019-03-01T06:00:00",
    }


def test_fields_are_checked_and_settled():
    @dataclass(frozen=True)
    class Choosing:
        way: Literal["left", "right"] = "left"
        side: Literal[0, 1] = 0
        steps: tuple[int, ...] = ()

        def __post_init__(self):
            check_fields(self)

    settled = Choosing(np.str_("right"), np.int64(1), [1, np.int64(2)])
    assert settled == Choosing("right", 1, (1, 2)) == Choosing("right", 1, range(1, 3))
    assert hash(settled) == hash(Choosing("right", 1, np.array([1, 2])))
    with pytest.raises(ConfigError, match="way is 'rigt'.*Did you mean 'right'. Valid: left, right."):
        Choosing("rigt")
    with pytest.raises(ConfigError, match=r"steps\[1\] is 'many'.*an integer was expected"):
        Choosing(steps=[1, "many"])
