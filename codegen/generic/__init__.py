"""Programs for every size: kernels whose extents and strides are read from a table of sizes when they run.

The path beside `codegen.generate`, which knows all sizes: the same graph of fused regions goes in, with symbolic dimensions
left in it, and one object file comes out that serves them all. See docs/decisions.md.
"""

from .contraction import generic_panel
from .generator import check_forms, generate_generic
from .program import GenericProgram

__all__ = ["GenericProgram", "check_forms", "generate_generic", "generic_panel"]
