"""A NaN or an infinity is traced to the op, the input or the parameter it came from."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.training import NonFiniteLossError

from .support import data, net, trainer, weights

pytestmark = pytest.mark.unvalidated("steps that give NaN on purpose: validation of their passes is not what this is about")


class Model(nn.Module):
    """A linear layer, and a function of its results."""

    def __init__(self, fn):
        self.head = nn.Linear(8, 3, seed=1)
        self.fn = fn

    def __call__(self, x):
        return self.fn(self.head(x))


def failure(model, **more) -> str:
    x, y = data(32)
    t = trainer(model, **more)
    before = weights(t)
    with pytest.raises(NonFiniteLossError) as caught:
        t.fit(x, y, batch_size=32, shuffle=False, verbose=False)
    assert np.array_equal(weights(t), before), "the weights must be those of before the step"
    return str(caught.value)


def test_the_first_op_that_gives_nan_is_named_with_its_operand_and_line():
    text = failure(Model(lambda z: tw.log(z) * 2.0))
    assert "the loss became nan in epoch 1, batch 1 (step 0). It came from op 'log' f32[32, 3]" in text
    assert "test_diagnose.py" in text and "tw.log(z) * 2.0" in text
    assert ", the first to give nan: at [" in text and "from -" in text
    assert "Model and optimiser keep what they held before this step" in text


def test_the_module_is_named():
    class Root(nn.Module):
        def __call__(self, x):
            return tw.sqrt(x)

    text = failure(nn.Sequential(nn.Linear(8, 3, seed=1), Root()))
    assert "op 'sqrt' f32[32, 3] in module 1 (" in text


def test_an_infinity_before_the_nan_is_traced_to_its_origin():
    text = failure(Model(lambda z: tw.exp(tw.abs(z) * 1000.0 + 90.0) / tw.exp(tw.abs(z) * 1000.0 + 90.0)))
    assert "the first to give nan: at" in text and "from inf and inf" in text
    assert "Infinite before it: op 'exp'" in text


def test_an_infinite_loss():
    text = failure(Model(lambda z: z), loss=lambda p, t: tw.sum(tw.exp(tw.square(p) * 1e4)), metrics=[])
    assert "the loss became inf" in text and "op 'exp' f32[32, 3]" in text and "which became infinite" in text


def test_a_mask_of_minus_infinity_is_not_blamed():
    mask = np.where(np.arange(3) == 2, -np.inf, 0).astype(np.float32)
    x, y = data(32)
    t = trainer(Model(lambda z: z + mask))
    t.fit(x, np.minimum(y, 1), batch_size=32, epochs=2, verbose=False)  # a mask alone is no fault
    text = failure(Model(lambda z: tw.log(z) + mask))
    assert "It came from op 'log'" in text


def test_nan_in_the_data_is_found_with_its_example():
    x, y = data(64)
    x[50, 3] = np.nan
    t = trainer()
    with pytest.raises(NonFiniteLossError) as caught:
        t.fit(x, y, batch_size=16, verbose=False)
    assert "The data hold it: input 'x' of the step is nan at [" in str(caught.value)
    assert "(example 50 of the data)" in str(caught.value)


def test_a_parameter_that_holds_nan_is_named():
    model = net()
    model[2].weight.data[1, 5] = np.nan
    x, y = data(32)
    with pytest.raises(NonFiniteLossError, match=r"parameter or state '2.weight' already held nan at \[1, 5\]"):
        trainer(model).fit(x, y, verbose=False)


def test_a_gradient_that_is_not_finite_while_the_loss_is():
    """sqrt has no slope at 0: the loss is 0, its gradient infinite times 0."""
    x, y = data(32)
    model = nn.Sequential(nn.Linear(8, 3, seed=1))
    model[0].weight.data[:] = 0
    model[0].bias.data[:] = 0

    def loss(p, t):
        return tw.sum(tw.sqrt(tw.square(p).sum(axis=1)))

    t = trainer(model, loss=loss, metrics=[], clip_global_norm=1.0)
    with pytest.raises(NonFiniteLossError, match="the gradients are not finite in epoch 1") as caught:
        t.fit(x, y, batch_size=32, verbose=False)
    assert "It came from op '" in str(caught.value) and "tw.sqrt" in str(caught.value)
    assert not model[0].weight.data.any()
    # without a test of the gradients it is seen a step later; the model keeps what it had at the end of the epoch before
    t = trainer(model, loss=loss, metrics=[])
    with pytest.raises(NonFiniteLossError, match="already held nan") as caught:
        t.fit(x, y, batch_size=16, verbose=False)
    assert "the gradient of an earlier step" in str(caught.value) and not model[0].weight.data.any()
    model[0].bias.data[:] = 1
    t.fit(x, y, batch_size=16, verbose=False)  # and can be trained on
    assert np.isfinite(weights(t)).all()


def test_dropout_draws_the_same_again():
    """The NaN appears only where dropout lets a value through: the diagnosis has to see the same draws."""

    class Fragile(nn.Module):
        def __init__(self):
            self.head, self.drop = nn.Linear(8, 3, seed=1), nn.Dropout(0.5)

        def __call__(self, x):
            kept = self.drop(tw.ones(x.shape))
            return self.head(x) + tw.log(1.0 - 0.5 * kept[:1, :3])  # log 0 where it was kept

    assert "op 'log'" in failure(Fragile()) or "Infinite before it: op 'log'" in failure(Fragile())


def test_within_a_loop_the_op_of_the_body_is_named():
    if not hasattr(tw, "scan"):
        pytest.skip("tw.scan is not there yet")

    class Loop(nn.Module):
        def __init__(self):
            self.head = nn.Linear(8, 3, seed=1)

        def __call__(self, x):
            def step(carry, row):
                return tw.log(carry), row

            last, _ = tw.scan(step, self.head(x), tw.zeros((4, 2)))
            return last

    text = failure(Loop())
    assert "op 'log' f32[32, 3]" in text and "of the body" in text and "within op 'scan'" in text
