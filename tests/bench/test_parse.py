"""Option values: lists, ranges, names and pairs."""

from __future__ import annotations

import re

import pytest

from mdnbench.bench.parse import pair_head_dims, parse_choices, parse_int, parse_ints, parse_seconds, split_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", (512,)),
        ("512,2k,8k", (512, 2048, 8192)),
        ("1K,1m", (1024, 1048576)),
        ("1k:64k:x2", (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
        ("1:100:x10", (1, 10, 100)),
        ("3:100:x5", (3, 15, 75)),  # the end is kept only where it is hit
        ("256:1024:256", (256, 512, 768, 1024)),
        ("5:5:1", (5,)),
        ("64, 1:3:1 ,64,2", (64, 1, 2, 3)),  # each once, in the order written
    ],
)
def test_lists_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert parse_ints("--seq-len", text) == expected


def test_repeats_are_kept_on_demand() -> None:
    assert parse_ints("--head-dim", "64,128,64", repeats=True) == (64, 128, 64)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is not a whole number"),
        ("512,", "'' is not a whole number"),
        ("abc", "'abc' is not a whole number"),
        ("1.5k", "'1.5k' is not a whole number"),
        ("-4", "'-4' is not a whole number"),
        ("2g", "'2g' is not a whole number"),
        ("0", "'0' is below 1"),
        ("1k:64k", "'1k:64k' is not a range start:stop:xFACTOR or start:stop:STEP"),
        ("1:2:3:4", "'1:2:3:4' is not a range"),
        ("64k:1k:x2", "the range 64k:1k runs backwards"),
        ("1k:64k:x1", "the factor x1 is below x2"),
        ("1:10:0", "'0' is below 1"),
        ("1:1000000:1", "this is more than 1000 numbers"),
    ],
)
def test_errors_name_option_value_and_a_right_example(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        parse_ints("--seq-len", text)
    message = str(caught.value)
    assert message.startswith(f"--seq-len {text!r}: ")
    assert message.endswith("write for example --seq-len 512,2k,8k or 1k:64k:x2")
    assert "\n" not in message


def test_names_may_repeat_and_be_separated_by_commas() -> None:
    assert split_names(["a, b", "c", "a,"]) == ("a", "b", "c")
    assert parse_choices("--mode", ["forward", "backward,forward"], ("forward", "backward")) == ("forward", "backward")


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        ValueError, match=r"^--dtype 'bfloat' is unknown: did you mean bfloat16\? choose from float32, "
    ):
        parse_choices("--dtype", ["bfloat"], ("float32", "bfloat16"))
    with pytest.raises(ValueError, match=r"^--dtype ',' names nothing: choose from float32"):
        parse_choices("--dtype", [","], ("float32", "bfloat16"))


@pytest.mark.parametrize("text", ["", "1.5", "-1", "x", "0"])
def test_one_whole_number(text: str) -> None:
    assert parse_int("--batch", "8") == 8
    assert parse_int("--seed", "0", least=0) == 0
    with pytest.raises(ValueError, match=f"^--batch {text!r} is not a whole number of at least 1"):
        parse_int("--batch", text)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1s"])
def test_seconds(text: str) -> None:
    assert parse_seconds("--time-limit", "0.25") == 0.25
    with pytest.raises(ValueError, match=f"^--time-limit {text!r} is not a number of seconds above 0"):
        parse_seconds("--time-limit", text)


@pytest.mark.parametrize(
    ("ks", "vs", "pairs"),
    [
        ((64, 128), None, ((64, 64), (128, 128))),
        ((64, 128), (256,), ((64, 256), (128, 256))),
        ((64, 128), (128, 256), ((64, 128), (128, 256))),
        ((128,), (128, 256), ((128, 128), (128, 256))),
        ((64, 64), None, ((64, 64),)),
        ((128, 128), (128, 256), ((128, 128), (128, 256))),
    ],
)
def test_head_dims_are_paired(ks: tuple[int, ...], vs: tuple[int, ...] | None, pairs: tuple) -> None:
    assert pair_head_dims(ks, vs) == pairs


def test_head_dims_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match=r"^--v-head-dim 1,2,3: 3 values for the 2 of --head-dim; give one value, or"):
        pair_head_dims((64, 128), (1, 2, 3))
