"""Bind a template's constexprs to a `KernelSpec` in its AST, drop what they make dead, and print readable source."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mobiquant_compiler.codegen import toolchain
from mobiquant_compiler.errors import BadKernelSpec
from mobiquant_compiler.spec import Family, KernelSpec, most_parts

Value = int | str | bool | tuple[int, ...]
_HERE = Path(__file__).parent
# Modules of jitted functions that templates call.
_SHARED = (
    *("fragments", "activations", "networks", "operands", "device"),
    *("scaling", "products", "steps", "slice_steps", "chains", "tiles", "one_token", "parts"),
    *("batch_operands", "batch_products", "batch_copies", "batches", "split_columns", "sorted_tiles"),
    *("resident_layout", "shared_memory", "copy_engine", "rings", "held_tokens", "resident_tiles"),
)
_ASSERTS = ("tl.static_assert", "gl.static_assert")
_FOLDABLE = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript)


def bindings(spec: KernelSpec) -> dict[str, Value]:
    """Return the value of every constexpr a template may ask for, by its upper-case name."""
    from mobiquant_compiler.codegen.device import all_shared  # brings triton

    return {
        "WIDTHS": spec.widths,
        "NUM_SLICES": len(spec.widths),
        "GROUP": spec.group,
        "LAYOUT": str(spec.layout),
        "K_PADDED": spec.k,
        "ACTIVATION": str(spec.activation),
        "SORTED_ROWS": spec.sorted_rows,
        "HAS_BIAS": spec.has_bias,
        "PARTS": spec.parts,
        "ROUTE": spec.route,
        "QUANTIZE": spec.quantize,
        "HIDDEN": spec.hidden,
        "OVERLAP": spec.overlap,
        "PREFETCH": spec.prefetch,
        "BLOCK_M": spec.block_m,
        "BLOCK_N": spec.block_n,
        "ROW_TILES": spec.row_tiles,
        "BLOCK_W": spec.block_w,
        "BLOCK_R": spec.block_r,
        "NUM_WARPS": spec.num_warps,
        "COLUMNS": spec.columns,
        "ROW_UNIT": spec.row_unit,
        "ONE": spec.block_m == 1 and bool(all_shared(spec.widths, str(spec.layout), spec.group)),
        "NUM_STAGES": spec.num_stages,
        "CONSUMERS": spec.consumers,
        "TOKEN_ROWS": spec.token_rows,
        "EMULATE": spec.emulate,
        "MOST_PARTS": most_parts(spec.k) if spec.split else 1,
    }


def template_path(family: Family) -> Path:
    """Return the file of a family's template."""
    return _HERE / "templates" / f"{Family(family).value}.py"


@cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def template_digest(family: Family) -> str:
    """Return the hash of a family's template that the header of an emitted file names."""
    return hashlib.sha256(_source(template_path(family)).encode()).hexdigest()[:16]


def modules_digest() -> str:
    """Return the hash of the modules that templates call, which the header of an emitted file names too."""
    texts = (_source(_HERE / f"{name}.py") for name in _SHARED)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def fingerprint(family: Family) -> str:
    """Return the hash of everything but the spec that an emitted kernel's behaviour depends on."""
    texts = (template_digest(family), modules_digest(), toolchain.version())
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def specialise(spec: KernelSpec) -> str:
    """Return the source of the kernel that `spec` asks for.

    The result is a module with a header and the family's functions; parameters that are bound or no longer used are
    gone, as are branches that cannot be taken and functions that nothing calls any more.

    Raises:
        BadKernelSpec: a `static_assert` of the template does not hold.
    """
    path = template_path(spec.family)
    tree = ast.parse(_source(path))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    tree = _Bind(spec, bindings(spec), functions).visit(tree)
    _drop_unused_functions(tree, str(spec.family))
    _drop_unused_parameters(tree)
    ast.fix_missing_locations(tree)
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    kernels = [ast.unparse(n) for n in tree.body if isinstance(n, ast.FunctionDef)]
    docstring = f'"""{ast.get_docstring(tree)}"""'
    return "\n".join([_header(spec, path), docstring, "", *imports, "", "", "\n\n\n".join(kernels), ""])


def _header(spec: KernelSpec, path: Path) -> str:
    from mobiquant_compiler import __version__

    lines = [
        f"Emitted by mobiquant_compiler {__version__} for triton {toolchain.version()}; edits are overwritten.",
        f"template: templates/{path.name}, sha256 {template_digest(spec.family)}",
        f"calls: modules of mobiquant_compiler.codegen, sha256 {modules_digest()}",
        *(f"{name}: {value}" for name, value in spec.describe().items()),
    ]
    return "\n".join(f"# {line}" for line in lines)


class _Bind(ast.NodeTransformer):
    """Replace bound names by constants, fold what becomes constant, and take only the branches that stay."""

    def __init__(self, spec: KernelSpec, values: Mapping[str, Value], functions: set[str]) -> None:
        self.spec = spec
        self.values = values
        self.functions = functions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.args = [a for a in node.args.args if a.arg not in self.values]
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.values and isinstance(node.ctx, ast.Load):
            return ast.parse(repr(self.values[node.id]), mode="eval").body
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in self.functions:
            # A function of the template has lost its bound parameters, so its calls lose the arguments.
            assert not node.args, f"{node.func.id}: a template calls its own functions by keyword"
            node.keywords = [k for k in node.keywords if k.arg not in self.values]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        self.generic_visit(node)
        call = node.value
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) in _ASSERTS):
            return node
        held = _constant(call.args[0])
        if held is None:
            return node  # depends on more than the spec: triton checks it
        if not held:
            wanted = ast.literal_eval(call.args[1])
            raise BadKernelSpec(family=self.spec.family, name="spec", got=self.spec.name, wanted=wanted)
        return None

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        taken = _constant(node.test)
        if taken is None:
            return node
        return node.body if taken else node.orelse

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        taken = _constant(node.test)
        if taken is None:
            return node
        return node.body if taken else node.orelse

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Drop operands that decide nothing, and what stands behind one that decides."""
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        kept: list[ast.expr] = []
        for operand in node.values:
            value = _constant(operand)
            if value is None or bool(value) is decides:
                kept.append(operand)
            if value is not None and bool(value) is decides:
                break
        if not kept:
            return ast.Constant(not decides)
        return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, _FOLDABLE) and (value := _constant(node)) is not None:
            return ast.parse(repr(value), mode="eval").body
        return node


def _constant(node: ast.AST) -> Any:
    """Return the value of an expression made of constants only, None where it is not (no template compares None)."""
    leaves = (ast.Constant, ast.Tuple, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, *_FOLDABLE)
    if not all(isinstance(inner, leaves) for inner in ast.walk(node)):
        return None
    expression = ast.fix_missing_locations(ast.Expression(body=node))  # type: ignore[arg-type]
    return eval(compile(expression, "<template>", "eval"), {"__builtins__": {}})  # constants and operators only


def _drop_unused_functions(tree: ast.Module, kernel: str) -> None:
    """Take out functions that the kernel does not come to; functions stand before those that call them."""
    used = {kernel}
    kept: list[ast.stmt] = []
    for node in reversed(tree.body):
        if isinstance(node, ast.FunctionDef):
            if node.name not in used:
                continue
            used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        kept.insert(0, node)
    tree.body = kept


def _drop_unused_parameters(tree: ast.Module) -> None:
    """Take out parameters that no statement reads any more; functions stand before those that call them."""
    dropped: dict[str, set[str]] = {}
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            gone = dropped.get(ast.unparse(call.func), set())
            call.keywords = [k for k in call.keywords if k.arg not in gone]
        read = {n.id for statement in function.body for n in ast.walk(statement) if isinstance(n, ast.Name)}
        dropped[function.name] = {a.arg for a in function.args.args} - read
        function.args.args = [a for a in function.args.args if a.arg in read]
