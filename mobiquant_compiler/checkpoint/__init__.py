"""Checkpoints of elastic models: plain safetensors, checked tensor by tensor, never pickle."""

from mobiquant_compiler.checkpoint.files import FORMAT_VERSION, is_checkpoint, read_manifest
from mobiquant_compiler.checkpoint.load import load, load_into, read_linears, weight_source
from mobiquant_compiler.checkpoint.save import save

__all__ = [
    "FORMAT_VERSION",
    "is_checkpoint",
    "load",
    "load_into",
    "read_linears",
    "read_manifest",
    "save",
    "weight_source",
]
