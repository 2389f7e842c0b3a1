"""Gradients of plain functions: Newton's method for a minimum, with first and second derivatives compiled into one program.

python examples/grad.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorwright as tw


def rosenbrock(p: Any) -> Any:
    """Rosenbrock's banana valley; its minimum is 0 at (1, 1)."""
    x, y = p[0], p[1]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def newton_step(p: Any) -> tuple[Any, Any, Any]:
    """(value, gradient, p - H^-1 g). The rows of the Hessian H are gradients of the gradient's components."""
    value, g = tw.value_and_grad(rosenbrock)(p)
    (a, b), (c, d) = (tw.grad(lambda q, i=i: tw.grad(rosenbrock)(q)[i])(p) for i in range(2))
    inverse = tw.stack([tw.stack([d, -b]), tw.stack([-c, a])]) / (a * d - b * c)
    return value, g, p - inverse @ g


def main() -> None:
    step = tw.compile(newton_step, tw.spec(2, dtype="f64"))
    p = np.array([-1.2, 1.0])
    for i in range(8):
        value, gradient, p = step(p)
        print(f"step {i}: f = {float(value):.3e}, |gradient| = {np.linalg.norm(gradient):.3e}, next point {p}")
    assert np.allclose(p, 1.0)


if __name__ == "__main__":
    main()
