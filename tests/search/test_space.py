"""The search space: what it holds, what is refused about it, and every fault at once by dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, config
from hpc_neuro.search import space as spaces
from hpc_neuro.search.config import SearchConfig


@config
class Optim:
    lr: float = Field(default=1e-3, gt=0, lt=1)
    batch: int = Field(default=2, ge=1)


@config
class Small:
    """A stand-in for TrainConfig."""

    rule: Literal["scratch", "average"] = "scratch"
    optim: Optim = Field(default_factory=Optim)
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    size: tuple[int, int] = (1, 1)
    seed: int = Field(default=0, ge=0)


def search(space: object, **more: object) -> SearchConfig:
    tree = {"out": "out", "space": space, "sampler": {"kind": "random"}, "trials": 5, **more}
    return schema.TypeAdapter(SearchConfig).validate_python(tree)


def load(keys: object) -> Small:
    return schema.load(Small, None, list(keys))  # type: ignore[call-overload]


def test_a_grid_is_the_product_and_conditions_leave_dimensions_out():
    cfg = search(
        {
            "rule": {"choice": ["scratch", "average"]},
            "share": {"choice": [0.1, 0.2], "when": {"rule": ["average"]}},
            "optim.batch": {"integer": [1, 3], "step": 2},
        }
    )
    points = spaces.list_grid_points(cfg.space)
    assert len(points) == 2 * 1 + 2 * 2
    assert points[0] == {"rule": "scratch", "optim.batch": 1}
    assert all(("share" in p) == (p["rule"] == "average") for p in points)
    assert len({str(p) for p in points}) == 6
    assert [load(spaces.format_keys(cfg.space, p)).optim.batch for p in points] == [1, 3] * 3


def test_a_bundle_sets_several_keys_of_any_shape():
    cfg = search({"kind": {"bundle": {"a": {"rule": "average", "size": [3, 4]}, "b": {"optim.lr": 1e-5}}}})
    first, second = (load(spaces.format_keys(cfg.space, {"kind": k})) for k in "ab")
    assert (first.rule, first.size) == ("average", (3, 4))
    assert second.optim.lr == 1e-5


@given(st.floats(1e-30, 0.99), st.booleans(), st.text(max_size=8))
def test_values_survive_the_way_through_text(number, flag, word):
    for value in (number, flag, word, [number, word], {"a": flag}, None):
        assert yaml.safe_load(spaces.format_value(value)) == value


def test_every_refused_value_is_named_at_once_by_its_key():
    cfg = search(
        {
            "optim.lr": {"log": [1e-3, 10.0]},
            "optim.lrr": {"range": [0, 1]},
            "rule": {"choice": ["scratch", "centre"]},
            "share": {"range": [0.0, 1.5]},
            "seed": {"choice": [0, -1]},
        }
    )
    faults = "\n".join(spaces.find_value_faults(cfg.space, False, load))
    for expected in ("optim.lr: ", "optim.lr=10.0", "optim.lrr: ", "'centre'", "share=1.5", "seed=-1"):
        assert expected in faults
    assert "share=0.75" not in faults
    assert len(faults.splitlines()) == 5


def test_a_grid_is_checked_at_every_point_and_a_good_space_has_no_faults():
    good = search({"rule": {"choice": ["scratch", "average"]}, "optim.lr": {"choice": [1e-4, 1e-3]}})
    assert spaces.find_value_faults(good.space, True, load) == []

    def picky(keys: object) -> None:
        if {"rule=average", "optim.lr=0.001"} <= set(keys):  # type: ignore[call-overload]
            raise ConfigError("x is not a usable Small:\n  these two do not go together")

    assert spaces.find_value_faults(good.space, True, picky) == [
        "these two do not go together (with rule=average, optim.lr=0.001)"
    ]


def test_covering_shows_each_value_with_its_conditions():
    cfg = search(
        {
            "rule": {"choice": ["scratch", "average"]},
            "share": {"range": [0, 1], "when": {"rule": ["average"]}},
            "optim.batch": {"choice": [1, 2, 4, 8, 16]},
        }
    )
    points = spaces.cover_values(cfg.space)
    assert [p["optim.batch"] for p in points] == [1, 2, 4, 8, 16]
    assert {p["rule"] for p in points} == {"scratch", "average"}
    assert all(("share" in p) == (p["rule"] == "average") for p in points)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"space": {"a": {"lgo": [1, 2]}}}, "'lgo' is not one of 'choice', 'range', 'log', 'integer', 'bundle'"),
        ({"space": {"a": {"log": [0, 1]}}}, "needs values above 0"),
        ({"space": {"a": {"range": [2, 1]}}}, "must go from a lower to a higher value"),
        ({"space": {"a": {"integer": [1, 4], "step": 2}}}, "step 2 does not lead from 1 to 4"),
        ({"space": {"a": {"choice": []}}}, "at least 1 item"),
        ({"space": {}}, "at least 1 item"),
        ({"space": {"a": {"choice": [1], "when": {"b": [1]}}}}, "b is no earlier dimension"),
        ({"space": {"b": {"choice": [1]}, "a": {"choice": [1], "when": {"b": [2]}}}}, "b is never 2"),
        ({"space": {"a": {"choice": [1]}, "x": {"bundle": {"u": {"a": 1}}}}}, "a is already set by a"),
        ({"trials": None}, "trials: the sampler random never ends"),
        ({"recipe": ["train", "evaluate"]}, "must be [train] or [train, infer, evaluate]"),
        ({"objective": {"key": "evaluate.dice"}}, "needs recipe [train, infer, evaluate]"),
        ({"objective": {"key": "dice"}}, "must begin with"),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_a_sentence(tree, message, tmp_path):
    path = tmp_path / "search.yaml"
    whole = {"out": "out", "space": {"rule": {"choice": ["scratch"]}}, "sampler": {"kind": "random"}, "trials": 5}
    path.write_text(yaml.safe_dump(whole | tree, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        schema.load(SearchConfig, path)
    assert message in str(caught.value)


def test_a_grid_of_a_range_is_refused():
    with pytest.raises(ConfigError, match="values that can be counted"):
        spaces.list_grid_points(search({"share": {"range": [0, 1]}}).space)


def test_a_config_survives_the_round_trip(tmp_path: Path):
    cfg = search({"optim.lr": {"log": [1e-4, 1e-2]}, "size": {"choice": [[1, 2], [3, 4]]}})
    (tmp_path / "copy.yaml").write_text(schema.dump(cfg))
    assert schema.load(SearchConfig, tmp_path / "copy.yaml") == cfg
