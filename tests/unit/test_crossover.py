"""Tables that say from how many tokens on a workspace pays: lookup, files, and whose table wins."""

from __future__ import annotations

import json
import logging
from pathlib import Path as FilePath

import pytest

from mobiquant_compiler.codegen import crossover
from mobiquant_compiler.codegen.crossover import NEVER, Crossover, Row, gpu_family, load, read, tuned_path, write
from mobiquant_compiler.errors import BadCrossover
from mobiquant_compiler.spec import Path

H100 = "NVIDIA H100 80GB HBM3"
ROW = {"n": 4096, "k": 4096, "tokens": 256, "fused": 65, "routed": NEVER, "full": 512}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBIQUANT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (H100, "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "rtxa6000"),
        ("Tesla T4", "t4"),
        ("", "unknown"),
        ("NVIDIA", "unknown"),
        ("  ../../etc  ", "etc"),
    ],
)
def test_families_are_short_names_that_files_can_have(name: str, family: str) -> None:
    assert gpu_family(name) == family


@pytest.mark.parametrize(
    ("tokens", "n", "k", "path"),
    [
        (255, 4096, 4096, Path.INTEGER),
        (256, 4096, 4096, Path.WORKSPACE),
        (256, 5000, 3500, Path.WORKSPACE),  # nearest to the square one
        (700, 16000, 4096, Path.INTEGER),  # nearest to the wide one
        (800, 16000, 4096, Path.WORKSPACE),
        (1 << 20, 500, 600, Path.INTEGER),  # nearest to one where a workspace never paid
    ],
)
def test_the_nearest_measured_shape_decides(tokens: int, n: int, k: int, path: Path) -> None:
    rows = (Row(4096, 4096, 256), Row(14336, 4096, 800), Row(576, 576, NEVER))
    for order in (rows, rows[::-1]):
        assert Crossover("test", order).path(tokens, n, k) is path


@pytest.mark.parametrize(
    ("tokens", "fused", "workspace", "full", "path"),
    [
        (99, True, True, False, Path.INTEGER),
        (100, True, True, False, Path.FUSED),
        (100, False, True, False, Path.INTEGER),
        (300, False, True, False, Path.WORKSPACE),
        (999, True, True, False, Path.FUSED),
        (1000, True, True, False, Path.WORKSPACE),
        (1000, True, False, False, Path.FUSED),  # as float16, which has no grouped products
        (1000, False, False, False, Path.INTEGER),
        (65, True, True, True, Path.FUSED),  # integers are no choice
        (500, True, True, True, Path.WORKSPACE),
        (65, False, True, True, Path.WORKSPACE),
    ],
)
def test_each_pair_of_ways_has_its_own_crossing(
    tokens: int, fused: bool, workspace: bool, full: bool, path: Path
) -> None:
    table = Crossover("test", (Row(4096, 4096, tokens=300, fused=100, routed=1000, full=500),))
    assert table.path(tokens, 4096, 4096, full=full, fused=fused, workspace=workspace) is path


def test_form_matters_as_well_as_size() -> None:
    table = Crossover("test", (Row(16384, 1024, 100), Row(1024, 16384, 1000)))
    assert table.path(500, 20000, 1200) is Path.WORKSPACE
    assert table.path(500, 1200, 20000) is Path.INTEGER


def test_what_is_written_is_what_is_read(tmp_path: FilePath) -> None:
    table = Crossover("h100", (Row(4096, 4096, 300), Row(576, 1536, NEVER)))
    path = tmp_path / "new" / "table.json"
    write(table, path)
    assert read(path) == Crossover("h100", table.rows, str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == table.to_dict()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "wanted a table of format 2"),
        ('{"format": 1}', "wanted a table of format 2"),
        ('{"format": 2, "gpu": "h100"}', "wanted at least one row"),
        ('{"format": 2, "rows": []}', "wanted at least one row"),
        ('{"format": 2, "rows": {"n": 1}}', "wanted at least one row"),
        (
            '{"format": 2, "rows": "abc"}',
            "row 0 is 'a'; wanted n, k, tokens, fused, routed, full, whole numbers above 0",
        ),
        *(
            (
                json.dumps({"format": 2, "rows": [ROW, ROW | change]}),
                "row 1 is .* wanted n, k, tokens, fused, routed, full",
            )
            for change in ({"n": 0}, {"k": -1}, {"tokens": 2.5}, {"fused": None}, {"routed": True}, {"full": "4096"})
        ),
    ],
)
def test_a_bad_table_is_refused_by_name(content: str, reason: str, tmp_path: FilePath) -> None:
    path = tmp_path / "crossover.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadCrossover, match=rf"crossover table {path}: .*{reason}.* `mobiquant tune`"):
        read(path)


def test_a_table_that_is_not_text_or_not_there_is_refused(tmp_path: FilePath) -> None:
    path = tmp_path / "crossover.json"
    with pytest.raises(BadCrossover, match="No such file"):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadCrossover, match="can't decode byte"):
        read(path)


def test_shipped_tables_are_tables_of_their_families() -> None:
    shipped = sorted(crossover._SHIPPED.glob("*.json"))
    assert crossover._DEFAULT in [path.stem for path in shipped]
    for path in shipped:
        table = read(path)
        assert table.gpu == path.stem == gpu_family(table.gpu)
        assert len({(row.n, row.k) for row in table.rows}) == len(table.rows), "a shape is measured once"


def test_the_users_table_wins_over_the_shipped_one() -> None:
    shipped = load(H100)
    assert shipped.gpu == "h100"
    assert FilePath(shipped.origin).parent == crossover._SHIPPED
    mine = Crossover("h100", (Row(1, 1, 7),))
    write(mine, tuned_path("h100"))
    assert load(H100) == Crossover("h100", mine.rows, str(tuned_path("h100")))
    tuned_path("h100").write_text("damaged", encoding="utf-8")
    with pytest.raises(BadCrossover, match=r"crossover-h100\.json"):
        load(H100)


def test_an_unknown_gpu_gets_a_known_ones_table_on_record(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert load("Some Accelerator 9000").gpu == crossover._DEFAULT
    assert "no crossover table for someaccelerator" in caplog.text
    assert "`mobiquant tune` measures one" in caplog.text
    caplog.clear()
    write(Crossover("someaccelerator", (Row(1, 1, 7),)), tuned_path("someaccelerator"))
    with caplog.at_level(logging.INFO):
        assert load("Some Accelerator 9000").rows == (Row(1, 1, 7),)
    assert not caplog.text
