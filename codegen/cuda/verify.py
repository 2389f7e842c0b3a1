"""Checks what loop IR of a launch must keep besides the rules of all loop IR (codegen/loop_verify.py).

Every value has a *spread*: the same for all threads of the block (BLOCK), for those of each warp (WARP_), or its own in each
thread (THREAD). A barrier stands only where all conditions and loop bounds around it are the block's; a `lane_xor`, or what a
warp does in one instruction, where they are at least the warp's. What memory holds is taken to be each thread's own.
"""

from __future__ import annotations

from typing import Final, NoReturn

from ...ir.errors import CompileError, VerifyError
from ...ir.expr import Expr, postorder
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Kernel, Let, Stmt, Store, Warp, expressions
from ..loop_text import statement_lines
from .machine import STATIC_SHARED, WARP
from .shape import shape_of

BLOCK: Final = 0
WARP_: Final = 1
THREAD: Final = 2


class _Checker:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.spread: dict[Expr, int] = {}
        self.threads: Expr | None = None
        self.shared: dict[str, Buffer] = {}
        self.statement: Stmt | None = None

    def fail(self, message: str) -> NoReturn:
        where = f", in\n    {statement_lines(self.statement)[0]}" if self.statement is not None else ""
        raise VerifyError(f"kernel {self.kernel.name}: {message}{where}")

    def of(self, roots: tuple[Expr, ...], around: int) -> int:
        """The spread of values; `around` is that of the conditions they are computed under."""
        known: dict[Expr, int] = {}
        for e in postorder(roots):
            if e.op == "var":
                known[e] = self.spread.get(e, BLOCK)
            elif e.op == "floordiv" and e.args[0] is self.threads and e.args[1].is_const and int(e.args[1].attr) % WARP == 0:
                known[e] = WARP_
            elif e.op == "load":
                known[e] = THREAD
            else:
                if e.op == "lane_xor" and around > WARP_:
                    self.fail("lanes of a warp are exchanged where not all of them are: a condition around it is a thread's own")
                known[e] = THREAD if e.op == "lane_xor" else max((known[a] for a in e.args), default=BLOCK)
        return max((known[r] for r in roots), default=BLOCK)

    def block(self, body: tuple[Stmt, ...], around: int) -> None:
        for s in body:
            self.statement = s
            spread = self.of(expressions(s), around)
            match s:
                case For() if s.kind == "block":
                    self.spread[s.var] = BLOCK
                    self.block(s.body, around)
                case For() if s.kind == "thread":
                    self.threads = s.var
                    self.spread[s.var] = THREAD
                    self.block(s.body, around)
                case For():
                    self.spread[s.var] = spread
                    self.block(s.body, max(around, spread))
                case Let():
                    self.spread[s.var] = spread
                case If():
                    for branch in (s.then, s.otherwise):
                        self.block(branch, max(around, spread))
                case Warp() if around > WARP_ and "async" not in s.op:
                    self.fail(f"{s.op} stands where not all lanes of a warp are: a condition around it is a thread's own")
                case Barrier():
                    if around > BLOCK:
                        self.fail("a barrier stands where a condition or loop around it is not the whole block's")
                case Alloc() if s.buffer.scope == "shared":
                    self.shared[s.buffer.name] = s.buffer
                case Store() if self.threads is None:
                    self.fail("a store stands outside the loop over threads")

    def run(self) -> None:
        try:
            shape_of(self.kernel)
        except CompileError as error:
            self.fail(str(error))
        self.block(self.kernel.body, BLOCK)
        self.statement = None
        total = 0
        for b in self.shared.values():
            total = -(-total // 16) * 16 + max(b.span, 1) * b.dtype.itemsize
        if total > STATIC_SHARED:
            self.fail(f"{total} bytes of shared memory; a block may declare {STATIC_SHARED}")


def verify_launch(kernel: Kernel) -> None:
    """Raises VerifyError at the first broken rule, with the statement."""
    _Checker(kernel).run()


__all__ = ["verify_launch"]
