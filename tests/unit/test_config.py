"""Options: every unknown or wrong one is refused by name, from Python, from plain data and from the environment."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from mobiquant_compiler import CompileConfig, SliceConfig, SliceSpec
from mobiquant_compiler.config import RuntimeConfig, matches
from mobiquant_compiler.errors import BadKernelSpec, BadOption, BadSliceSpec, UnknownOption
from mobiquant_compiler.spec import Family, KernelSpec, Layout, choose_group


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 48}, "option 'group' got 48"),
        ({"scope": "token"}, "option 'scope' got 'token'"),
        ({"scale_dtype": "int8"}, "option 'scale_dtype' got 'int8'"),
        ({"include": 4}, r"'include' got 4; wanted name patterns, as \('\*\.q_proj', 'lm_head'\)"),
        ({"exclude": ("a", None)}, r"'exclude' got \('a', None\); wanted name patterns"),
        ({"floor": {"*": 2.0}}, r"got 2.0; wanted slice counts from 1 to 4"),
        ({"ceiling": {"*": None}}, r"got None; wanted slice counts from 1 to 4"),
        ({"floor": {"*": 5}}, r"option \"floor\['\*'\]\" got 5; wanted slice counts from 1 to 4"),
        ({"ceiling": {"*": 0}}, r"ceiling.* got 0"),
    ],
)
def test_wrong_slice_options_are_refused_by_name(options, message):
    with pytest.raises(BadOption, match=message):
        SliceConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"widths": ()},
        {"widths": (3, 2)},
        {"widths": (4, 4, 1)},
        {"widths": (0, 2)},
        {"widths": (5,), "layout": "bit_major"},
        {"layout": "diagonal"},
    ],
)
def test_impossible_slices_are_refused(options):
    with pytest.raises(BadSliceSpec, match="slice spec: "):
        SliceConfig(**options)


@pytest.mark.parametrize("make", [SliceConfig, SliceSpec])
@pytest.mark.parametrize("widths", [4, None, np.array(4), (2.0, 2.0), (True, 2)], ids=repr)
def test_widths_are_whole_numbers_in_a_tuple(make, widths):
    wanted = f"widths (slice_major) got {widths!r}; wanted one or more of (1, 2, 4), whole numbers in a tuple"
    with pytest.raises(BadSliceSpec, match=re.escape(wanted)):
        make(widths=widths)


@pytest.mark.parametrize("make", [SliceConfig, SliceSpec])
@pytest.mark.parametrize("widths", [[4, 2], np.array([4, 2])], ids=["list", "array"])
def test_widths_become_plain_numbers(make, widths):
    made = make(widths=widths).widths
    assert made == (4, 2)
    assert {type(width) for width in made} == {int}


def test_three_bits_exist_in_bit_major_only():
    assert SliceConfig(widths=(3, 3, 2), layout="bit_major").spec_for(64).total_bits == 8
    with pytest.raises(BadSliceSpec, match=r"wanted one or more of \(1, 2, 4\)"):
        SliceSpec((3,), 32)
    with pytest.raises(BadSliceSpec, match="wanted one of"):
        SliceSpec((2,), 16)


@pytest.mark.parametrize(
    ("k", "group"), [(4096, 128), (576, 64), (1536, 128), (96, 32), (100, 128), (33, 64), (32, 32)]
)
def test_automatic_group_divides_or_pads_least(k, group):
    assert choose_group(k) == group
    assert SliceConfig().spec_for(k).group == group
    assert SliceConfig(group=64).spec_for(k).group == 64


def test_one_pattern_may_be_given_as_a_string():
    config = SliceConfig(include="*.mlp.*", exclude="*.down_proj")
    assert config.selects("a.mlp.up_proj")
    assert not config.selects("a.mlp.down_proj")
    assert not config.selects("a.attn.q_proj")
    assert matches("lm_head", SliceConfig().exclude)


def test_limits_of_several_patterns_combine():
    config = SliceConfig(floor={"a*": 2, "*b": 3}, ceiling={"*": 4, "ab": 3})
    assert config.limits("ab") == (3, 3)
    assert config.limits("ac") == (2, 4)
    assert config.limits("x") == (1, 4)
    with pytest.raises(BadOption, match=r"SliceConfig for ab: .* wanted floor <= ceiling"):
        SliceConfig(floor={"ab": 3}, ceiling={"ab": 2}).limits("ab")


def test_plain_data_round_trip():
    config = SliceConfig(widths=(4, 2), exclude=("x",), floor={"*.q": 2})
    data = config.to_dict()
    assert data["widths"] == [4, 2]
    assert SliceConfig.from_dict(data) == config
    with pytest.raises(UnknownOption, match=r"SliceConfig: unknown option 'wdths'; known options are widths, group"):
        SliceConfig.from_dict({"wdths": [2]})


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SliceConfig().group = 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompileConfig().strict = True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "'budget' got 0"),
        ({"budget": "4"}, "'budget' got '4'"),
        ({"budget": True}, "'budget' got True"),
        ({"strict": 1}, "'strict' got 1"),
        ({"dump": 3}, "'dump' got 3"),
        ({"activation": "a4"}, r"'activation' got 'a4'; wanted one of \['a16', 'a8'\]"),
        ({"prefill": "fast"}, r"'prefill' got 'fast'; wanted one of \['routed', 'full', 'exact'\]"),
        ({"checkpoint": "no-such-directory"}, "'checkpoint' got 'no-such-directory'; wanted an existing directory"),
        ({"slices": 4}, "'slices' got 4"),
        ({"passes": 4}, "'passes' got 4"),
        ({"inductor": 4}, "'inductor' got 4"),
    ],
)
def test_wrong_backend_options_are_refused_by_name(options, message):
    with pytest.raises(BadOption, match=f"backend 'mobiquant': option {message}"):
        CompileConfig.from_options(options)


def test_unknown_backend_options_are_refused_by_name():
    with pytest.raises(UnknownOption, match="unknown option 'bugdet'; known options are budget, checkpoint, strict"):
        CompileConfig.from_options({"bugdet": 4})
    with pytest.raises(UnknownOption, match=r"options\['slices'\]: unknown option 'wide'"):
        CompileConfig.from_options({"slices": {"wide": 4}})


def test_backend_options_take_plain_data():
    config = CompileConfig.from_options({"slices": {"group": 32, "widths": [2, 2]}, "passes": ["bind-slices"]})
    assert config.slices == SliceConfig(group=32, widths=(2, 2))
    assert tuple(config.passes) == ("bind-slices",)
    assert CompileConfig.from_options({"passes": "a,b"}).passes is not None
    assert CompileConfig.from_options(None) == CompileConfig()


def test_the_environment_is_read_and_options_win():
    environ = {"MOBIQUANT_DUMP": "d", "MOBIQUANT_PASSES": "bind-slices", "MOBIQUANT_STRICT": "1"}
    config = CompileConfig.from_env(environ)
    assert config.dump == "d"
    assert config.strict
    assert config.passes
    with pytest.raises(BadOption, match="environment: option 'MOBIQUANT_STRICT' got 'yes'; wanted 0 or 1"):
        CompileConfig.from_env({"MOBIQUANT_STRICT": "yes"})


def test_options_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("MOBIQUANT_STRICT", "1")
    assert CompileConfig.from_options({}).strict
    assert not CompileConfig.from_options({"strict": False}).strict


def test_settings_of_the_process(tmp_path):
    assert RuntimeConfig.from_env({"MOBIQUANT_CACHE": str(tmp_path)}).cache_dir == tmp_path
    assert RuntimeConfig.from_env({"XDG_CACHE_HOME": str(tmp_path)}).cache_dir == tmp_path / "mobiquant"
    assert RuntimeConfig.from_env({"MOBIQUANT_LOG": "debug"}).log == "debug"
    assert RuntimeConfig.from_env({}).cache_dir.name == "mobiquant"


def test_spec_sizes():
    spec = SliceSpec((2, 2), 64)
    assert (spec.num_slices, spec.total_bits, spec.bits(1), spec.padded(65)) == (2, 4, 2, 128)
    assert spec.packed_shape(3, 65) == (4, 3, 4)
    assert spec.scale_shape(3, 65) == (3, 2)
    assert [SliceSpec((2, 2), 64).unit, SliceSpec((4, 2), 64).unit] == [2, 0]
    assert SliceSpec((4, 2), 64, Layout.BIT_MAJOR).unit == 1
    assert SliceSpec((2,), 32, "bit_major").layout is Layout.BIT_MAJOR


@pytest.mark.parametrize("change", [{"k": 100}, {"block_n": 3}, {"num_warps": 0}, {"block_r": 3}, {"parts": 5}])
def test_impossible_kernels_are_refused(change):
    fields = {"family": Family.SLICED_MMA, "widths": (2, 2), "group": 64, "layout": Layout.SLICE_MAJOR, "k": 128}
    name = next(iter(change))
    with pytest.raises(BadKernelSpec, match=f"kernel sliced_mma: {name} got"):
        KernelSpec(**fields | change)
    assert KernelSpec(**fields).describe()["k"] == "128"
