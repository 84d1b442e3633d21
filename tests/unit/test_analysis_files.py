"""What the analyses write: a page that works offline and escapes its text, CSV, JSON, and figures."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mobiquant_compiler.analysis import figures
from mobiquant_compiler.analysis.migration import Migration, TokenErrors
from mobiquant_compiler.analysis.precision import LinearBits
from mobiquant_compiler.analysis.quality import QualityRow
from mobiquant_compiler.analysis.tables import write_csv, write_json
from mobiquant_compiler.analysis.token_bits import TokenBits
from mobiquant_compiler.analysis.token_page import SHADES, shade, token_page, token_texts
from mobiquant_compiler.errors import PackageMissing
from tests.model_dirs import byte_tokenizer

NASTY = ["<script>alert(1)</script>", '"onmouseover="x', "&amp;", " plain\n", "Ünï", "</div>"]


def bits_of(count: int) -> TokenBits:
    counts = torch.linspace(1, 4, count * 2, dtype=torch.float64).view(count, 2)
    return TokenBits(4.0, torch.arange(count), counts.mean(1) * 2, ("0", "1"), counts, 4, ("a<b>",))


class Page(HTMLParser):
    """Collects the coloured tokens of a page, and everything that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self._span: tuple[str, str] | None = None
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.loads += [name for name in values if name in ("src", "href") or name.startswith("on")]
        self._inside = self._inside or values.get("class") == "text"
        if tag == "span" and self._inside:
            self._span = (str(values["class"]), str(values["title"]))

    def handle_data(self, data: str) -> None:
        if self._span:
            self.tokens.append((data, *self._span))

    def handle_endtag(self, tag: str) -> None:
        self._span = None
        self._inside = self._inside and tag != "div"


class TestPage:
    def test_tokens_come_back_as_they_were(self) -> None:
        page = Page(token_page(bits_of(6), NASTY, "a <title> & more"))
        assert [text for text, _, _ in page.tokens] == NASTY
        assert not page.tags & {"script", "link", "img", "iframe", "object", "base"}
        assert page.loads == []

    def test_needs_nothing_but_itself(self) -> None:
        text = token_page(bits_of(6), NASTY, "t")
        assert "://" not in text
        assert "@import" not in text
        assert "url(" not in text
        assert "<title>t</title>" in text
        assert "a&lt;b&gt;" in text, "what was left out is named"

    def test_colour_rises_with_bits_and_hover_tells_the_layers(self) -> None:
        page = Page(token_page(bits_of(6), NASTY, "t"))
        shades = [int(name.removeprefix("s")) for _, name, _ in page.tokens]
        assert shades == sorted(shades)
        assert (shades[0], shades[-1]) == (0, SHADES - 1)
        found = bits_of(6)
        expected = f"{float(found.bits[2]):.2f} bits\nlayer 0: {float(found.counts[2, 0]):.2f}\nlayer 1: "
        assert page.tokens[2][2].startswith(expected)

    def test_one_token_far_off_does_not_take_the_scale(self) -> None:
        bits = torch.cat([torch.tensor([2.0]), torch.linspace(4, 5, 99, dtype=torch.float64)])
        found = TokenBits(4.0, torch.arange(100), bits, ("0",), bits.unsqueeze(1) / 2, 4)
        page = token_page(found, ["x"] * 100, "t")
        shades = [int(name.removeprefix("s")) for _, name, _ in Page(page).tokens]
        assert set(shades) == set(range(SHADES))
        assert "2.00 to 5.00 each" in page
        assert ">up to 4.1" in page
        assert ">from 4.8" in page

    def test_both_themes_have_every_shade(self) -> None:
        light, _, dark = token_page(bits_of(2), ["a", "b"], "t").partition("prefers-color-scheme: dark")
        for number in range(SHADES):
            assert f".s{number} {{" in light
            assert f".s{number} {{" in dark

    def test_text_is_readable_on_every_shade(self) -> None:
        from mobiquant_compiler.analysis import token_page as module

        for ink, shades in (("#14181c", module._LIGHT), ("#e8ecf0", module._DARK)):
            assert len(shades) == SHADES
            assert min(_contrast(ink, color) for color in shades) >= 4.5  # WCAG AA

    def test_shades_of_equal_bits(self) -> None:
        assert shade(4, 4, 4) == 0
        assert shade(8, 2, 8) == shade(9, 2, 8) == SHADES - 1
        assert shade(2, 2, 8) == shade(1, 2, 8) == 0
        page = token_page(
            TokenBits(8.0, torch.arange(1), torch.full((1,), 8.0), ("0",), torch.full((1, 1), 4.0), 4), ["a"], "t"
        )
        assert "8.00 bits" in page

    def test_tokens_as_text(self) -> None:
        tokenizer = byte_tokenizer()
        assert "".join(token_texts(tokenizer, tokenizer("Hi <b>\n").input_ids)) == "Hi <b>\n"


def _contrast(first: str, second: str) -> float:
    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


class TestTables:
    def test_csv(self, tmp_path: Path) -> None:
        path = write_csv(tmp_path / "a.csv", [{"text": 'a,"b"\n', "bits": 2.5}, {"text": "", "bits": None}])
        with path.open(encoding="utf-8", newline="") as file:
            assert list(csv.DictReader(file)) == [{"text": 'a,"b"\n', "bits": "2.5"}, {"text": "", "bits": ""}]

    def test_json_has_no_nan(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "a.json", {"a": [math.nan, {"b": math.inf}, 1.5], "c": ("ü",)})
        assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
            "a": [None, {"b": None}, 1.5],
            "c": ["ü"],
        }


class TestFigures:
    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(figures, "find_spec", lambda name: None)
        with pytest.raises(
            PackageMissing, match=r"matplotlib; install it with `pip install 'mobiquant-compiler\[plots\]'`"
        ):
            figures.draw_tokens(bits_of(3), tmp_path / "a.png")

    def test_every_figure_is_a_picture_and_the_same_twice(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        generator = torch.Generator().manual_seed(0)
        parts = [
            TokenErrors(b, r, b, torch.rand(40, generator=generator, dtype=torch.float64), {})
            for b in (3.0, 4.0)
            for r in (False, True)
        ]
        migration = Migration(0.1, (parts[0], parts[1]), (parts[2], parts[3]))
        precision = [LinearBits(b, f"layers.{i}.up", i, "up", 100, b, (1.0,)) for b in (3.0, 4.0) for i in range(3)] + [
            LinearBits(b, "head", None, "head", 100, math.nan, (1.0,)) for b in (3.0, 4.0)
        ]
        curve = [
            QualityRow("unquantized", None, None, 30.0, 10, 1.0),
            QualityRow("gptq", 4.0, 4.0, 33.0, 10, 1.0, "mobiquant_compiler"),
            QualityRow("mobiquant", 4.0, 4.1, 35.0, 10, 1.0, "mobiquant_compiler"),
            QualityRow("mobiquant", 8.0, 8.0, 30.1, 10, 1.0, "mobiquant_compiler"),
        ]
        drawn = (
            (figures.draw_migration, migration),
            (figures.draw_precision, precision),
            (figures.draw_curve, curve),
            (figures.draw_tokens, bits_of(5)),
        )
        for draw, what in drawn:
            first, second = (draw(what, tmp_path / name, "a title").read_bytes() for name in ("1.png", "2.png"))
            assert first.startswith(b"\x89PNG")
            assert len(first) > 5_000
            assert first == second
