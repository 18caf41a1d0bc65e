"""Typed configs: overrides, faults named all at once, help text, round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, config


@config
class Round:
    """A round thing."""

    kind: Literal["round"] = "round"
    radius: float = 1.0
    """[um] Half its width."""


@config
class Square:
    """A square thing."""

    kind: Literal["square"] = "square"
    side: int = 2
    """[voxel] Edge length."""


Thing = Annotated[Round | Square, Field(discriminator="kind")]


@config
class Section:
    """A group of knobs."""

    steps: int = Field(default=10, ge=1)
    """How often."""
    box: tuple[int, int, int] = (1, 2, 3)


@config
class Root:
    """The whole."""

    out: Path
    """Where to."""
    section: Section = Field(default_factory=Section)
    things: list[Thing] = Field(default_factory=lambda: [Round(), Square(side=5)])
    one: Thing = Field(default_factory=Round)
    maybe: int | None = None

    def __post_init__(self) -> None:
        if self.maybe == 13:
            raise ValueError("maybe: 13 is not allowed; choose another")


def load(*overrides: str) -> Root:
    return schema.load(Root, None, ["out=o", *overrides])


def test_overrides_reach_every_level_and_keep_what_they_do_not_name() -> None:
    cfg = load("section.steps=3", "things.1.side=9", "one.radius=3e-4", "section.box=[4,5,6]")
    assert cfg.section == Section(steps=3, box=(4, 5, 6))
    assert cfg.things == [Round(), Square(side=9)]
    assert cfg.one == Round(radius=3e-4)


def test_another_kind_starts_from_its_own_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("out: o\none: {kind: round, radius: 2}\n")
    assert schema.load(Root, path, ["one.kind=square"]).one == Square()
    assert load("one.kind=square", "one.side=7").one == Square(side=7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["one.side=7", "one.kind=square"], "one.kind=square would undo one.side=7; give it first"),
        (["section.steps=3", "section={box: [1, 1, 1]}"], "would undo section.steps=3; give it first"),
        (["things.1.side=3", "things.1.kind=round"], "would undo things.1.side=3"),
        (["section=null", "section.steps=3"], "section.steps=3 is below section=null"),
    ],
)
def test_an_override_that_would_be_lost_without_a_word_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*keys)
    assert message in str(caught.value)


def test_a_list_that_is_no_yaml_says_what_to_quote() -> None:
    with pytest.raises(ConfigError, match=r"things: \[a=\[1,2\]\] is not YAML; quote an item that holds brackets"):
        load("things=[a=[1,2]]")


def test_switching_off_what_was_set_before_is_meant() -> None:
    assert load("maybe=3", "maybe=null").maybe is None
    assert load("section.steps=3", "section.steps=4").section.steps == 4


def test_a_key_that_stands_twice_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("out: o\nsection: {steps: 3}\nmaybe: 1\nsection: {box: [1, 1, 1]}\n")
    with pytest.raises(ConfigError, match=r"`section` stands twice.*line 4"):
        schema.load(Root, path)


def test_all_faults_come_at_once_by_dotted_key() -> None:
    wrong = ["section.stepps=3", "section.box=[1]", "things.0.kind=rund", "maybe=x", "loose", "things.7.side=1"]
    with pytest.raises(ConfigError) as caught:
        load(*wrong)
    text = str(caught.value)
    for piece in (
        "section.stepps",
        "section.box",
        "'rund' is not one of 'round', 'square'",
        "maybe",
        "'loose'",
        "things.7",
    ):
        assert piece in text
    assert text.startswith("the command line is not a usable Root:")


@pytest.mark.parametrize(
    ("given_", "meant"),
    [("section.stepps", "section.steps"), ("steps", "section.steps"), ("sid", ""), ("things.0.radios", "")],
)
def test_an_unknown_key_comes_with_the_one_that_may_have_been_meant(given_: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"{given_}=1")
    (fault,) = str(caught.value).splitlines()[1:]
    assert fault.endswith(f"Unexpected keyword argument; did you mean {meant}?" if meant else "keyword argument")


def test_a_cross_field_check_is_a_fault_like_any_other() -> None:
    with pytest.raises(ConfigError, match="13 is not allowed; choose another"):
        load("maybe=13")


def test_yaml_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: a\nsection: {steps: 4}\n")
    assert schema.load(Root, file, ["section.steps=5"]).section.steps == 5
    assert schema.load(Root, file).section.steps == 4


@pytest.mark.parametrize("text", ["- 1\n", "a: [1\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="c.yaml"):
        schema.load(Root, file)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        schema.load(Root, Path("/nowhere.yaml"))


@config
class Entry:
    """An entry."""

    image: Path
    """The image. It is read once."""


@config
class Owner:
    """Entries."""

    entries: list[Entry]
    """All of them."""
    out: Path
    """Folder of results."""


def test_a_missing_key_is_explained() -> None:
    with pytest.raises(ConfigError) as caught:
        schema.load(Owner, None, ["entries=[{}]"])
    assert "  entries.0.image: Field required (The image)\n  out: Field required (Folder of results)" in str(
        caught.value
    )


def test_help_lists_every_field_with_default_and_text() -> None:
    fields = {f.key: f for f in schema.describe(Root)}
    assert fields["out"].default == "(required)"
    assert fields["section.steps"].default == "10"
    assert fields["section.steps"].text == "How often."
    assert fields["things.N[square].side"].text.startswith("[voxel]")
    assert fields["one"].type == "round | square"


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().maybe = 3  # type: ignore[misc]


@given(st.integers(1, 1000), st.floats(0, 1e6), st.one_of(st.none(), st.integers(20, 30)))
def test_dump_and_load_are_inverse(steps: int, radius: float, maybe: int | None) -> None:
    cfg = Root(out=Path("x"), section=Section(steps=steps), things=[Round(radius=radius)], maybe=maybe)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        file.write_text(schema.dump(cfg))
        assert schema.load(Root, file) == cfg


@pytest.mark.parametrize("text", ["4,5,6", "4, 5, 6", "[4,5,6]"])
def test_a_list_of_numbers_needs_no_brackets(text: str, tmp_path: Path) -> None:
    assert schema.load(Root, None, ["out=o", f"section.box={text}"]).section.box == (4, 5, 6)
    (tmp_path / "c.yaml").write_text(f"out: o\nsection:\n  box: {text}\n")
    assert schema.load(Root, tmp_path / "c.yaml").section.box == (4, 5, 6)


def test_commas_elsewhere_are_text() -> None:
    assert schema.load(Root, None, ["out=a,b"]).out == Path("a,b")
    with pytest.raises(ConfigError, match=r"section\.box\.1: .*found 'x'"):
        schema.load(Root, None, ["out=o", "section.box=4,x,6"])
    with pytest.raises(ConfigError, match=r"section\.steps: .*found '1,2'"):
        schema.load(Root, None, ["out=o", "section.steps=1,2"])


@pytest.mark.parametrize("name", ["o\udcff", "o\tx", "o\x1b[31m", "o\x7f"])
def test_a_folder_of_results_has_a_name_that_texts_can_hold(name: str) -> None:
    with pytest.raises(ConfigError, match="out: .* holds characters that no text can hold"):
        schema.load(Root, None, [], {"out": name})
    assert schema.load(Root, None, ["out=ö x\u00a0y%j"]).out == Path("ö x\u00a0y%j")


@pytest.mark.parametrize("number", ["nan", "inf", "-.inf", "1e400"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(ConfigError, match=r"one\.radius: -?(nan|inf) is no finite number"):
        schema.load(Root, None, ["out=o", f"one.radius={number}"])


@pytest.mark.parametrize("key", ["maybe", "section.steps", "section.box.1"])
def test_a_yes_is_no_number(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .* found 'true'"):
        schema.load(Root, None, ["out=o", f"{key}=true"])
