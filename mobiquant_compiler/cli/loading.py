"""From a command's arguments to a model on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobiquant_compiler.cli.console import Report, note
from mobiquant_compiler.errors import BadOption

if TYPE_CHECKING:
    from mobiquant_compiler.dump import GraphReport

PLAIN_HELP = "A Hugging Face directory, or 'smollm2'."
MODEL_HELP = "A Hugging Face directory, a mobiquant checkpoint, or 'smollm2'."


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and where it is."""

    model: Any
    tokenizer: Any
    device: Any

    def need_tokenizer(self, source: str) -> Any:
        """Return the tokenizer.

        Raises:
            ModelMissing: the directory holds none.
        """
        from mobiquant_compiler.errors import ModelMissing

        if self.tokenizer is None:
            raise ModelMissing(path=source, what="the directory has no tokenizer")
        return self.tokenizer

    def need_plain(self, source: str) -> None:
        """Refuse a model that is elastic already.

        Raises:
            BadOption: it is.
        """
        from mobiquant_compiler.linear import elastic_linears

        if elastic_linears(self.model):
            wanted = "a model that was not quantized yet; `mobiquant eval` and `generate` take checkpoints"
            raise BadOption(where="command line", name="MODEL", got=source, wanted=wanted)


def pick_device(name: str) -> Any:
    """Return the torch device: "auto" is CUDA where there is one.

    Raises:
        BadOption: unknown, or not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadOption(where="command line", name="--device", got=name, wanted="auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise BadOption(where="command line", name="--device", got=name, wanted="a device of this machine")
    return device


def load(source: str, device: str, dtype: str | None, report: Report | None = None) -> Loaded:
    """Load a model for a command."""
    from mobiquant_compiler.models import load_model, parse_dtype

    where = pick_device(device)
    model, tokenizer = load_model(source, dtype=parse_dtype(dtype) if dtype else None, device=where, progress=report)
    return Loaded(model, tokenizer, where)


def trace(loaded: Loaded, tokens: int, options: Mapping[str, Any]) -> list[GraphReport]:
    """Run the pipeline over the graphs of a model, Inductor left out; plain weights are sliced by it."""
    import torch

    from mobiquant_compiler.backend import dry_run

    ids = torch.zeros(1, tokens, dtype=torch.int64, device=loaded.device)
    cache = {"use_cache": False} if hasattr(loaded.model.config, "use_cache") else {}
    return dry_run(loaded.model, ids, options=options, **cache)


def text_windows(loaded: Loaded, source: str, text: str, windows: int, length: int) -> Any:
    """Return the windows of a text for this model's tokenizer."""
    from mobiquant_compiler.evaluation import load_text, make_windows

    return make_windows(loaded.need_tokenizer(source), load_text(text), windows, length, where=text)


def spread_text_windows(loaded: Loaded, source: str, text: str, windows: int, length: int) -> Any:
    """Return windows spread over a text, fewer where it is short, which is said."""
    from mobiquant_compiler.evaluation import load_text, spread_windows

    found = spread_windows(loaded.need_tokenizer(source), load_text(text), windows, length, where=text)
    if len(found) < windows:
        note(f"{text} holds {len(found)} windows of {length} tokens, not {windows}: calibrating on {len(found)}")
    return found


@dataclass(frozen=True)
class Slicing:
    """How a plain model is quantized on the way to being measured, and what static methods calibrate on.

    Attributes:
        calibration: A text as of `load_text`, or "none".
        windows: Its windows.
        length: Tokens a window.
        group: "auto" or columns a scale.
    """

    calibration: str
    windows: int
    length: int
    group: str

    def config(self) -> Any:
        """Return the SliceConfig.

        Raises:
            BadOption: not a group.
        """
        from mobiquant_compiler.config import SliceConfig

        return SliceConfig(group=int(self.group) if self.group.isdigit() else self.group)

    def tokens(self, loaded: Loaded, source: str) -> Any:
        """Return the calibration windows, None for "none"."""
        if self.calibration == "none":
            return None
        return text_windows(loaded, source, self.calibration, self.windows, self.length)

    def apply(self, loaded: Loaded, source: str, report: Report) -> None:
        """Quantize a plain model in place; leave an elastic one as it is."""
        from mobiquant_compiler.linear import elastic_linears
        from mobiquant_compiler.quantize import quantize_

        if elastic_linears(loaded.model):
            return
        coverage = quantize_(loaded.model, self.config(), calibration=self.tokens(loaded, source), progress=report)
        note(f"{source} has plain weights, sliced for this run (`mobiquant quantize` keeps them): {coverage}")


def compiled(model: Any) -> Any:
    """Compile a model with our backend."""
    import torch

    return torch.compile(model, backend="mobiquant")
