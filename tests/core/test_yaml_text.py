"""YAML 1.2: what scalars mean, names that look like numbers, and text that readers of both versions read alike."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.core import schema, yaml_text
from hpc_neuro.core.schema import ConfigError, config
from hpc_neuro.core.yaml_text import YamlError

SCALARS = {
    "010": 10,
    "0o10": 8,
    "0x10": 16,
    "+5": 5,
    "0o17": 15,
    "0o18": "0o18",
    "0O17": "0O17",
    "-0o17": "-0o17",
    "017": 17,
    "0x1F": 31,
    "0xfg": "0xfg",
    "0X1F": "0X1F",
    "+0x1F": "+0x1F",
    "0b11": "0b11",
    "-0": 0,
    "1_0": "1_0",
    "1_000": "1_000",
    "1_0.5": "1_0.5",
    "0x1_F": "0x1_F",
    "12:00:00": "12:00:00",
    "190:20:30.15": "190:20:30.15",
    "1e4": 1e4,
    "1E-3": 1e-3,
    ".5": 0.5,
    "5.": 5.0,
    "1.5.2": "1.5.2",
    "yes": "yes",
    "no": "no",
    "on": "on",
    "Off": "Off",
    "y": "y",
    "true": True,
    "FALSE": False,
    "~": None,
    "": None,
    "null": None,
    "2026-11-30": "2026-11-30",
    "=": "=",
    "-": [None],
    ".inf": float("inf"),
    "+.INF": float("inf"),
    "-.inf": float("-inf"),
    ".iNF": ".iNF",
    "inf": "inf",
    "nan": "nan",
    "NaN": "NaN",
    "+.nan": "+.nan",
    ".": ".",
    "1e": "1e",
    "e5": "e5",
    "1.e5": 1e5,
    "+.5e+1": 5.0,
    "1,5": "1,5",
    "1 0": "1 0",
    "Null": None,
    "NULL": None,
    "nULL": "nULL",
    "none": "none",
    "True": True,
    "tRUE": "tRUE",
    "N": "N",
    "YES": "YES",
    "'010'": "010",
    '"1e4"': "1e4",
}


@config
class Names:
    """Texts and numbers."""

    id: str = ""
    ids: tuple[str, ...] = ()
    out: Path = Path("o")
    count: int = 0
    rate: float = 0.0
    either: int | str = 0
    pair: tuple[float, float] = (0.0, 0.0)
    by_id: dict[str, float] | None = None


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_of_yaml_1_2(text: str, value: object) -> None:
    parsed = yaml_text.parse(f"a: {text}" if text != "-" else "a:\n- ")
    assert parsed == {"a": value}
    assert type(parsed["a"]) is type(value)


@pytest.mark.parametrize("text", ["010", "007", "0x1F", "1e4", "1.50", "+5", "0o17", "12", "1.", "089"])
def test_names_stay_as_they_are_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"id: {text}\nids: [{text}, a]\nout: {text}\nby_id: {{{text}: 1e1}}\n")
    for names in (
        schema.load(Names, path),
        schema.load(Names, None, [f"id={text}", f"ids=[{text}, a]", f"out={text}", f"by_id={{{text}: 1e1}}"]),
    ):
        assert (names.id, names.ids, names.out) == (text, (text, "a"), Path(text))
        assert names.by_id == {text: 10.0}
        # The resolved config of a run is read again.
        path.write_text(schema.dump(names))
        assert schema.load(Names, path) == names


def test_numbers_are_numbers(tmp_path: Path) -> None:
    names = schema.load(Names, None, ["count=010", "rate=1e4", "either=010"])
    assert (names.count, names.rate, names.either) == (10, 1e4, 10)
    assert type(names.either) is int
    with pytest.raises(ConfigError, match="count: .*found '12:00:00'"):
        schema.load(Names, None, ["count=12:00:00"])
    with pytest.raises(ConfigError, match="id: .*found True"):
        schema.load(Names, None, ["id=true"])


def test_nan_is_a_number() -> None:
    for text in (".nan", ".NaN", ".NAN"):
        assert math.isnan(yaml_text.parse(text))


NUMBERS: dict[str, tuple[int | None, float | None]] = {
    "10": (10, 10.0),
    "010": (10, 10.0),
    "0o10": (8, 8.0),
    "0x1F": (31, 31.0),
    "+5": (5, 5.0),
    "1e1": (10, 10.0),
    "'10'": (10, 10.0),
    "1.5": (None, 1.5),
    "1_0": (None, None),
    "'1_0'": (None, None),
    "1_0.5": (None, None),
    "0b11": (None, None),
    "-0o10": (None, None),
    "12:30": (None, None),
    ".inf": (None, None),
    "-.inf": (None, None),
    ".nan": (None, None),
    "inf": (None, None),
    "'nan'": (None, None),
    "~": (None, None),
    "yes": (None, None),
    "true": (None, None),
    "1e400": (None, None),
}
"""Text -> what a whole number and a number of a config become; None where they are refused."""


@pytest.mark.parametrize("text", NUMBERS)
@pytest.mark.parametrize("key", ["count", "rate", "pair"])
def test_numbers_of_configs(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "c.yaml"
    shown = f"[{text}, 2]" if key == "pair" else text
    path.write_text(f"{key}: {shown}\n")
    expected = NUMBERS[text][key != "count"]
    for source, keys in ((path, []), (None, [f"{key}={shown}"])):
        if expected is None:
            with pytest.raises(ConfigError, match=key):
                schema.load(Names, source, keys)
        else:
            value = getattr(schema.load(Names, source, keys), key)
            assert value == ((expected, 2) if key == "pair" else expected)


def test_numbers_without_brackets() -> None:
    assert schema.load(Names, None, ["pair=010,1e1"]).pair == (10, 10)
    with pytest.raises(ConfigError, match="pair.*found '1_0'"):
        schema.load(Names, None, ["pair=1_0,2"])


@pytest.mark.parametrize(
    ("text", "value"),
    [(" 10 ", 10), ("1.5e1", 15), ("-.5", -0.5), ("010", 10), ("5.", 5)],
)
def test_decimal_numbers_of_tables(text: str, value: float) -> None:
    assert yaml_text.parse_decimal(text) == value


@pytest.mark.parametrize(
    "text", ["1_0", "0x1F", "0o10", "nan", "inf", ".inf", "1e400", "", "1,5", "\u0661", "9" * 400, "True"]
)
def test_what_is_no_decimal_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no number"):
        yaml_text.parse_decimal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "`a` stands twice"),
        ("010: 1\n'010': 2\n", "`010` stands twice"),
        ("? [1]\n: 2\n", "a key is no plain text"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "[" * 150 + "]" * 150, "nested more than 100 levels"),
        ("a: &a [*a]\n", "nested more than 100 levels"),
        ("a: " + "9" * 5000, "no whole number"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("a: !!timestamp 2026-11-30\n", "could not determine a constructor"),
        ("a: b\n---\na: c\n", "expected a single document"),
        ("a: [1\n", "expected"),
        ("a: \x07\n", "not allowed"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        yaml_text.parse(text)


def make_bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 9) + "]")
    return "\n".join(lines) + "\n"


def test_bombs_of_aliases_are_refused_and_plain_aliases_are_not() -> None:
    with pytest.raises(YamlError, match="aliases repeat more than"):
        yaml_text.parse(make_bomb(12))
    assert yaml_text.parse("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}\n") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    # The value is written out, so that no other program has to follow aliases.
    shared = [1, 2]
    assert "*" not in yaml_text.dump({"a": shared, "b": shared})


def test_long_files_are_not_bombs() -> None:
    rows = yaml_text.parse("".join(f"- {{id: '{i}', size: [1, 2, 3]}}\n" for i in range(3000)))
    assert len(rows) == 3000


def test_files_that_never_end_are_refused(tmp_path: Path) -> None:
    fifo, device, sparse, text = (tmp_path / name for name in ("f.yaml", "d.yaml", "s.yaml", "latin.yaml"))
    os.mkfifo(fifo)
    device.symlink_to("/dev/zero")
    with sparse.open("wb") as handle:
        handle.truncate(1 << 40)
    text.write_bytes(b"id: \xff\n")
    for path, message in (
        (fifo, "no regular file"),
        (device, "no regular file"),
        (sparse, "has more than 16 MiB"),
        (text, "is not UTF-8"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            schema.load(Names, path)


SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from([*SCALARS])
)


@given(
    st.recursive(
        SCALAR,
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
        max_leaves=8,
    )
)
def test_both_versions_read_what_is_written(value: Any) -> None:
    assert yaml_text.parse(yaml_text.dump({"a": value})) == {"a": value}
    assert yaml.safe_load(yaml_text.dump({"a": value})) == {"a": value}
    assert yaml_text.parse(yaml_text.dump_line(value)) == value
