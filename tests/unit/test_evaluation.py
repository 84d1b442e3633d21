"""Texts, windows, perplexity, and generation under a moving budget."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler import evaluation
from mobiquant_compiler.errors import BadOption, BadSchedule, BudgetOutOfRange, EmptyBatch, TextMissing, TextTooShort
from mobiquant_compiler.generation import CACHE_STEP, Schedule, stream, timed
from mobiquant_compiler.linear import elastic_linears
from tests.model_dirs import byte_llama, byte_tokenizer

WINDOWS = torch.arange(96).view(6, 16) * 13 % 257


@pytest.fixture(scope="module")
def elastic() -> nn.Module:
    model = byte_llama(2)
    mq.quantize_(model, calibration=WINDOWS)
    return model


class TestTexts:
    def test_wikitext_keeps_its_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "wiki.test.raw"
        path.write_text(" \n = Head = \n \n Body . \n")
        assert evaluation.load_text(path) == "\n\n = Head = \n\n\n\n\n Body . \n"

    def test_ptb_is_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "ptb.test.txt"
        path.write_text(" no it was n't \n black monday \n")
        assert evaluation.load_text(path) == "no it was n't black monday"

    def test_c4_joins_documents(self, tmp_path: Path) -> None:
        path = tmp_path / "c4.jsonl"
        path.write_text("\n".join(json.dumps({"text": t, "url": "u"}) for t in ("One.\nStill one.", "Two.")) + "\n")
        assert evaluation.load_text(path) == "One.\nStill one. Two."

    def test_plain_text_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text(" a \n\n b\n")
        assert evaluation.load_text(path) == " a \n\n b\n"

    @pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa", b'{"body": 1}\n', b"[1]\n", b"{\n"])
    def test_unreadable(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "c4.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TextMissing, match=r"c4\.jsonl: cannot be read"):
            evaluation.load_text(path)

    def test_builtin_halves_share_no_paragraph(self) -> None:
        first, second = evaluation.load_text("pydoc"), evaluation.load_text("pydoc-calibration")
        assert min(len(first), len(second)) > 100_000
        assert not set(first.split("\n\n")) & set(second.split("\n\n"))


class TestWindows:
    def test_first_tokens_in_order_without_overlap(self) -> None:
        windows = evaluation.make_windows(byte_tokenizer(), "abcdefghij", 3, 3)
        expected = byte_tokenizer()("abcdefghi").input_ids
        assert windows.flatten().tolist() == expected
        assert windows.shape == (3, 3)

    def test_a_prefix_of_a_long_text_gives_the_same(self) -> None:
        tokenizer = byte_tokenizer()
        text = "some words and more of them " * 1000
        assert torch.equal(
            evaluation.make_windows(tokenizer, text, 2, 8), evaluation.make_windows(tokenizer, text[:100], 2, 8)
        )

    def test_too_short(self) -> None:
        with pytest.raises(TextTooShort, match="mine: the text gives 3 tokens; wanted at least 8"):
            evaluation.make_windows(byte_tokenizer(), "abc", 2, 4, where="mine")


class TestSpreadWindows:
    def test_from_the_first_token_to_the_last_without_overlap(self) -> None:
        text = "".join(chr(97 + i % 26) for i in range(100))
        ids = byte_tokenizer()(text).input_ids
        windows = evaluation.spread_windows(byte_tokenizer(), text, 3, 8)
        assert windows.dtype == torch.int64
        assert windows.tolist() == [ids[start : start + 8] for start in (0, 46, 92)]

    def test_a_text_that_just_suffices_is_used_whole(self) -> None:
        windows = evaluation.spread_windows(byte_tokenizer(), "abcdefghijkl", 3, 4)
        assert windows.flatten().tolist() == byte_tokenizer()("abcdefghijkl").input_ids

    @pytest.mark.parametrize(("tokens", "held"), [(4, 1), (7, 1), (8, 2), (23, 5), (24, 6), (1000, 6)])
    def test_a_short_text_gives_fewer(self, tokens: int, held: int) -> None:
        """No token comes twice: each window starts where the one before ends, or later."""
        ids = list(range(tokens))
        windows = evaluation.spread_windows(lambda text, **options: {"input_ids": ids}, "", 6, 4)
        assert windows.shape == (held, 4)
        assert len(windows.unique()) == 4 * held
        assert (windows[0, 0], windows[-1, -1]) == (0, tokens - 1 if held > 1 else 3)

    def test_is_what_published_figures_were_calibrated_on(self) -> None:
        """Windows at these places are in the states of calibrations that are kept."""
        count, length, tokens = 64, 512, 231_357
        windows = evaluation.spread_windows(lambda text, **options: {"input_ids": range(tokens)}, "")
        assert windows[:, 0].tolist() == torch.linspace(0, tokens - length, count).long().tolist()

    def test_too_short(self) -> None:
        with pytest.raises(TextTooShort, match="mine: the text gives 3 tokens; wanted at least 4"):
            evaluation.spread_windows(byte_tokenizer(), "abc", 2, 4, where="mine")

    @pytest.mark.parametrize(("options", "name"), [((0, 4), "count"), ((2, 0), "length")])
    def test_nothing_asked_for(self, options: tuple[int, int], name: str) -> None:
        with pytest.raises(BadOption, match=f"'{name}' got 0; wanted at least 1"):
            evaluation.spread_windows(byte_tokenizer(), "abc", *options)


class TestPerplexity:
    def test_is_that_of_the_definition(self) -> None:
        model = byte_llama()
        with torch.no_grad():
            logs = torch.log_softmax(model(WINDOWS).logits.double(), -1)
        scored = logs[:, :-1].gather(2, WINDOWS[:, 1:, None])
        assert evaluation.perplexity(model, WINDOWS) == pytest.approx(math.exp(-scored.mean()), rel=1e-5)

    def test_of_a_model_that_knows_nothing_is_the_vocabulary(self) -> None:
        class Uniform(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.at = nn.Parameter(torch.zeros(()))

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.at.expand(*ids.shape, 257)

        assert evaluation.perplexity(Uniform(), WINDOWS) == pytest.approx(257)

    @pytest.mark.parametrize("batch", [4, 6, 100])
    def test_batches_do_not_matter(self, batch: int) -> None:
        model, steps = byte_llama(), []
        one = evaluation.perplexity(model, WINDOWS)
        many = evaluation.perplexity(
            model, WINDOWS, batch=batch, progress=lambda done, total: steps.append((done, total))
        )
        assert many == pytest.approx(one, rel=1e-5)
        assert steps[-1] == (6, 6)

    @pytest.mark.parametrize("shape", [(0, 16), (3, 1), (16,)])
    def test_nothing_to_score(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(EmptyBatch, match="perplexity"):
            evaluation.perplexity(byte_llama(), torch.zeros(shape, dtype=torch.int64))


class TestEvaluate:
    def test_a_row_a_budget_and_the_budget_is_restored(self, elastic: nn.Module) -> None:
        stages = set()
        before = mq.get_budget(elastic)
        rows = list(evaluation.evaluate(elastic, WINDOWS, [8, 5.5], progress=lambda stage, d, t: stages.add(stage)))
        assert [row.budget for row in rows] == [8, 5.5]
        assert rows[0].achieved_bits == pytest.approx(8)
        assert rows[1].achieved_bits == pytest.approx(5.5, abs=0.3)
        assert rows[0].tokens == 6 * 15
        assert mq.get_budget(elastic) == before
        assert stages == {"perplexity at 8 bits", "perplexity at 5.5 bits"}

    def test_a_plain_model_gives_one_row(self) -> None:
        (row,) = evaluation.evaluate(byte_llama(), WINDOWS)
        assert (row.budget, row.achieved_bits) == (None, None)

    def test_impossible_budget(self, elastic: nn.Module) -> None:
        with pytest.raises(BudgetOutOfRange, match="2 to 8 bits"):
            list(evaluation.evaluate(elastic, WINDOWS, [9]))

    def test_used_bytes_at_all_slices_are_the_bytes_held(self, elastic: nn.Module) -> None:
        list(evaluation.evaluate(elastic, WINDOWS, [8]))
        held = sum(linear.weight_bytes for linear in elastic_linears(elastic).values())
        assert evaluation.used_bytes(elastic, mq.achieved_bits(elastic)) == held
        list(evaluation.evaluate(elastic, WINDOWS, [2]))
        assert evaluation.used_bytes(elastic, mq.achieved_bits(elastic)) < held / 2


class TestSchedule:
    def test_parses(self) -> None:
        plan = Schedule.parse("0:8, 64:3.5")
        assert (plan.at(0), plan.at(1), plan.at(64)) == (8.0, None, 3.5)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "has no colon"),
            ("8", "has no colon"),
            ("0:8,x:3", "'x:3' is not STEP:BITS"),
            ("0:many", "'0:many' is not"),
            ("-1:8", "step -1 does not rise"),
            ("8:4,8:3", "step 8 does not rise"),
            ("8:4,2:3", "step 2 does not rise"),
        ],
    )
    def test_refuses(self, text: str, reason: str) -> None:
        with pytest.raises(BadSchedule, match=reason):
            Schedule.parse(text)


class TestStream:
    def test_equals_greedy_generation_of_transformers(self) -> None:
        model = byte_llama()
        prompt = WINDOWS[:1]
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
        assert list(stream(model, prompt, max_new_tokens=8)) == expected[0, 16:].tolist()

    def test_stops_before_the_end_token(self) -> None:
        model = byte_llama()
        free = list(stream(model, WINDOWS[:1], max_new_tokens=8))
        cut = free.index(free[-1])
        assert list(stream(model, WINDOWS[:1], max_new_tokens=8, stop=[free[-1]])) == free[:cut]

    def test_temperature_depends_on_the_seed_only(self) -> None:
        model = byte_llama()
        runs = [list(stream(model, WINDOWS[:1], max_new_tokens=12, temperature=2.0, seed=s)) for s in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]

    def test_schedule_moves_the_budget_between_tokens(self, elastic: nn.Module) -> None:
        seen = []
        plan = Schedule.parse("0:8,3:3")
        for _ in stream(elastic, WINDOWS[:1], max_new_tokens=6, schedule=plan):
            seen.append(mq.get_budget(elastic))
        assert seen == [8, 8, 8, 3, 3, 3]
        mq.set_budget(elastic, 8)

    def test_only_later_tokens_run_through_the_step_model(self) -> None:
        model = byte_llama()
        lengths = []

        def step(ids: torch.Tensor, **kwargs: object) -> object:
            lengths.append(ids.shape[1])
            return model(ids, **kwargs)

        list(stream(model, WINDOWS[:1], step_model=step, max_new_tokens=4))
        assert lengths == [1, 1, 1]

    def test_long_prompts_fit_the_cache(self) -> None:
        prompt = torch.ones(1, CACHE_STEP + 1, dtype=torch.int64)
        assert len(list(stream(byte_llama(), prompt, max_new_tokens=2))) == 2

    @pytest.mark.parametrize("shape", [(1, 0), (2, 3), (3,)])
    def test_bad_prompt(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(EmptyBatch, match="prompt"):
            next(stream(byte_llama(), torch.zeros(shape, dtype=torch.int64)))

    def test_timing_counts_steps_after_the_first(self) -> None:
        found, speed = timed(islice(iter(range(100)), 10))
        assert found == list(range(10))
        assert speed.tokens == 10
        assert 0 < speed.step_s < 0.1
