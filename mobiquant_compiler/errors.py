"""Every error a user can meet, one class per mistake.

A message says what happened, where, what was got, what was wanted and what to do. The template sits on
the class and the fields come as keyword arguments, so that tests can match classes and messages cannot drift.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MobiQuantError(Exception):
    """Base of all errors of this package; fields fill the class's ``message`` template."""

    message: ClassVar[str] = "{detail}"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.message.format(**fields))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the finished text: compile workers raise across processes, and not every field can follow."""
        plain = {k: v if isinstance(v, str | int | float | None) else str(v) for k, v in self.fields.items()}
        return _rebuild, (type(self), str(self), plain, getattr(self, "__notes__", []))


def _rebuild(cls: type[MobiQuantError], text: str, fields: dict[str, Any], notes: list[str]) -> MobiQuantError:
    error = cls.__new__(cls, text)
    error.fields = fields
    Exception.__init__(error, text)
    for note in notes:
        error.add_note(note)
    return error


# --- configuration -----------------------------------------------------------------------------------


class ConfigError(MobiQuantError):
    """A wrong option, by the user's hand."""


class UnknownOption(ConfigError):
    message = "{where}: unknown option {name!r}; known options are {known}. Remove or rename it."


class BadOption(ConfigError):
    message = "{where}: option {name!r} got {got!r}; wanted {wanted}."


class UnknownPass(ConfigError):
    message = "passes: no pass is named {name!r}; known passes are {known}. `mobiquant passes` lists them."


class BrokenPass(ConfigError):
    message = (
        "passes: {name!r} is registered as {target!r}, which cannot be used: {reason}; wanted 'module:Class' of a "
        "dataclass with `name`, `after` and `run`. Mend or uninstall the plugin that brings it."
    )


class DuplicatePass(ConfigError):
    message = "passes: {name!r} is registered twice, by {first} and by {second}; rename one, names are the only key."


class BadSliceSpec(ConfigError):
    message = "slice spec: {name} got {got!r}; wanted {wanted}."


class NotQuantized(ConfigError):
    message = (
        "{where}: {model} has no elastic linear of its own; call mobiquant_compiler.quantize_(model) first, or give "
        "what you want of a plain model to torch.compile, in `options`."
    )


# --- weights -----------------------------------------------------------------------------------------


class WeightError(MobiQuantError):
    """A weight that cannot become slices."""


class NonFiniteWeight(WeightError):
    message = (
        "{where}: weight has {count} non-finite values (first at row {row}, column {column}); slices need "
        "finite weights. Repair the checkpoint or exclude this layer."
    )


class UnsupportedDtype(WeightError):
    message = "{where}: dtype {got} cannot become slices; wanted one of {wanted}. Cast the layer first."


class BadWeightShape(WeightError):
    message = "{where}: weight has shape {got}; wanted {wanted}."


class GroupTooLarge(WeightError):
    message = (
        "{where}: K={k} is smaller than the group {group}; padding would cost more than it saves. Use "
        "group='auto' or a group of at most {k}, or exclude this layer."
    )


class NothingToQuantize(WeightError):
    message = (
        "quantize_: {model} has no linear layer to quantize ({skipped}). Check `include`/`exclude`, or "
        "pass a model with nn.Linear or Conv1D layers."
    )


# --- budget ------------------------------------------------------------------------------------------


class BudgetError(MobiQuantError):
    """A budget that cannot be had."""


class BudgetOutOfRange(BudgetError):
    message = (
        "{where}: budget {got} bits is out of range; this model can give {low:g} to {high:g} bits per "
        "weight. Ask for a budget in that range{hint}."
    )


class NotElastic(BudgetError):
    message = (
        "{where}: {model} has no elastic linear; call mobiquant_compiler.quantize_(model) or run the "
        "model compiled with backend='mobiquant' once, then set a budget."
    )


class AlreadyFollowed(BudgetError):
    message = (
        "follow_budget: thresholds of {model} already follow a budget ({got} bits); wanted one follower a model. "
        "Call close() on it, or leave its block, first."
    )


class FollowingEnded(BudgetError):
    message = "{where}: this follower of {model} was closed; call mobiquant_compiler.follow_budget(model) anew."


class FullPrefill(BudgetError):
    message = (
        "follow_budget: {where} has prefill={got!r}, so long calls use all slices whatever the thresholds; wanted "
        "{wanted}. Call set_execution(model, prefill={wanted!r}) first, or leave the thresholds to the table."
    )


class MaskTooLong(BudgetError):
    message = (
        "padding_mask: the mask has {got} tokens; at most {wanted} can be told apart. Measure with smaller batches."
    )


# --- graph -------------------------------------------------------------------------------------------


class GraphError(MobiQuantError):
    """The compiler met a graph it will not rewrite."""


class PassFailed(GraphError):
    message = "{name}: failed on graph {graph} at {where}: {reason}.{dump}"


class VerifyError(GraphError):
    message = "verify after {name}: {what} (node {node}); got {got}, wanted {wanted}."


class PassOrder(GraphError):
    message = (
        "pipeline: {name} must run after {after}, which is not before it; the order given is {order}. Reorder `passes`."
    )


class StrictSkip(GraphError):
    message = (
        "strict: {count} linears of graph {graph} were not rewritten: {skips}. Drop strict=True, or exclude or "
        "reshape these layers."
    )


class TrainingGraph(GraphError):
    message = (
        "backend 'mobiquant': this graph needs gradients of {what}; slices cannot be trained. Call model.eval() and "
        "run under torch.no_grad(), or freeze the parameters."
    )


class WeightNotInCheckpoint(GraphError):
    message = (
        "checkpoint {path}: weight {where} ({shape}) matches no linear in it; its contents were quantized from "
        "another model or other weights. Give the checkpoint made from this model, or drop the option."
    )


# --- code generation -----------------------------------------------------------------------------------


class CodegenError(MobiQuantError):
    """A kernel that cannot be emitted."""


class BadKernelSpec(CodegenError):
    message = "kernel {family}: {name} got {got!r}; wanted {wanted}."


class KernelDoesNotFit(CodegenError):
    message = (
        "kernel {family}: no configuration fits {target} for {spec} (least shared memory {got} bytes, limit {wanted}). "
        "Use a smaller group, or report this target."
    )


class TooManyRows(CodegenError):
    message = "{where}: got {got} output rows in one launch; wanted at most {wanted}. Split the weight by rows."


class BadCrossover(CodegenError):
    message = "crossover table {path}: {reason}. Delete it, or measure a new one with `mobiquant tune`."


class CannotTune(CodegenError):
    message = "tune: {reason}; wanted {wanted}."


class TritonMissing(CodegenError):
    message = "CUDA kernels need triton ({reason}); install `triton>=3.6`, or move the model to the CPU."


# --- checkpoints ---------------------------------------------------------------------------------------


class CheckpointError(MobiQuantError):
    """A checkpoint that cannot be read or written."""


class CheckpointMissing(CheckpointError):
    message = "checkpoint {path}: {what} is missing; wanted a directory written by `mobiquant quantize` or save()."


class CheckpointCorrupt(CheckpointError):
    message = "checkpoint {path}: {what} cannot be read ({reason}); copy the file again or quantize anew."


class CheckpointTensor(CheckpointError):
    message = (
        "checkpoint {path}: tensor {tensor} has {name} {got}; wanted {wanted}. The file is of another model or damaged."
    )


class CheckpointMismatch(CheckpointError):
    message = "checkpoint {path}: {what}; got {got}, wanted {wanted}. Load it into the model it was made from."


class CheckpointTooNew(CheckpointError):
    message = (
        "checkpoint {path}: format version {got} is newer than this package reads ({wanted}); "
        "upgrade mobiquant-compiler."
    )


class CheckpointForeign(CheckpointError):
    message = "checkpoint {path}: quant_method is {got!r}; wanted 'mobiquant'. This is not a checkpoint of ours."


class CheckpointInTheWay(CheckpointError):
    message = (
        "checkpoint {path}: not written, something else is there ({got}); wanted a new or empty directory, or "
        "a mobiquant checkpoint to replace. Choose another directory."
    )


# --- calibration ---------------------------------------------------------------------------------------


class CalibrationError(MobiQuantError):
    """A calibration that cannot start or go on."""


class NonFiniteActivations(CalibrationError):
    message = (
        "calibration: the inputs of {where} gave {count} non-finite sums; the model does not run on these tokens in "
        "its dtype. Use float32 or bfloat16, or exclude this layer."
    )


class NoBlocks(CalibrationError):
    message = (
        "calibrate_: {model}: {what}; wanted a chain of blocks in one ModuleList, each fed the output of the one "
        "before. Use quantize_, which needs no blocks."
    )


class CalibrationStateMismatch(CalibrationError):
    message = (
        "calibration state {path}: holds {what}; got {got}, wanted {wanted}. Give the same model, tokens and "
        "configuration to go on, or another directory to start anew."
    )


class CalibrationStateCorrupt(CalibrationError):
    message = "calibration state {path}: cannot be read ({reason}). Delete this file to do the step again."


# --- models and tools ------------------------------------------------------------------------------------


class ModelError(MobiQuantError):
    """A model or text that cannot be used."""


class ModelMissing(ModelError):
    message = "model {path}: {what}; wanted a Hugging Face directory, a mobiquant checkpoint, or 'smollm2'."


class NotAModule(ModelError):
    message = (
        "{where}: the model is of type {got}; wanted a torch.nn.Module. Give the model itself, not its name, class or "
        "state dict."
    )


class BadInput(ModelError):
    message = (
        "{where}: the input has dtype {dtype} and shape {got}; wanted floating point and shape {wanted}. Cast it, or "
        "give it that many columns."
    )


class PackageMissing(ModelError):
    message = "{what} needs the package {package}; install it with `{command}`."


class NotADirectory(ModelError):
    message = "{path}: results go into a folder; got a file. Name a new or existing folder."


class TextTooShort(ModelError):
    message = "{where}: the text gives {got} tokens; wanted at least {wanted}. Use a longer text or shorter windows."


class TextMissing(ModelError):
    message = (
        'text {path}: cannot be read ({reason}); wanted a UTF-8 file (.raw, .txt, .jsonl with a "text" field), '
        "'pydoc' or 'pydoc-calibration'."
    )


class EmptyBatch(ModelError):
    message = "{where}: the batch is empty (shape {got}); wanted at least one token."


class BadTokens(ModelError):
    message = "{where}: tokens have {name} {got}; wanted {wanted}."


class BadSchedule(ModelError):
    message = "--schedule {got!r}: {reason}; wanted 'STEP:BITS,STEP:BITS', as in '0:8,64:3'."
