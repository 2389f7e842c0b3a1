"""Linear regression as an explicit loop over one compiled step: a penguin's mass from its bill and flipper.

pip install 'tensorwright[examples]'
python examples/fetch.py tables
python examples/linear_regression.py           # coefficients within 1e-3 of numpy's least squares

Data: the Palmer penguins (PyPI palmerpenguins 0.1.6), 342 with all three measurements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorwright as tw
from support import need, run
from tensorwright import losses

MEASURED = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm"]


def loss(params: Any, x: Any, y: Any) -> Any:
    """Mean squared error of the linear model."""
    return losses.mse(x @ params["weight"] + params["bias"], y)


def step(params: Any, x: Any, y: Any, rate: Any) -> tuple[Any, Any]:
    """One step of gradient descent: (new parameters, loss before it)."""
    value, gradients = tw.value_and_grad(loss)(params, x, y)
    return {name: params[name] - rate * gradients[name] for name in params}, value


def main(data: Path, steps: int = 500, rate: float = 0.2) -> dict[str, Any]:
    table = pd.read_csv(need(data / "tables" / "penguins.csv")).dropna(subset=[*MEASURED, "body_mass_g"])
    x = table[MEASURED].to_numpy()
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)  # one scale for all: gradient descent needs it
    y = (table["body_mass_g"].to_numpy() / 1000).astype(np.float32)  # kg

    params = {"weight": np.zeros(x.shape[1], np.float32), "bias": np.zeros((), np.float32)}
    compiled = tw.compile(
        step, {k: tw.spec(*v.shape) for k, v in params.items()}, tw.spec(*x.shape), tw.spec(*y.shape), tw.spec()
    )
    for i in range(steps):
        params, value = compiled(params, x, y, np.float32(rate))
        if i % 50 == 0:
            print(f"step {i:3d}: mean squared error {float(value):.5f} kg^2")

    ours = np.array([*params["weight"], params["bias"]])
    exact = np.linalg.lstsq(np.c_[x, np.ones(len(x))].astype(np.float64), y.astype(np.float64))[0]
    for name, a, b in zip([*MEASURED, "bias"], ours, exact, strict=True):
        print(f"{name:18s} {a:9.5f} kg a standard deviation; least squares {b:9.5f}")
    return {"max_difference": float(np.abs(ours - exact).max()), "mse": float(value), "steps_run": steps}


if __name__ == "__main__":
    run(main, at_most={"max_difference": 1e-3})
