"""The ops of ONNX, a file for each family. A function registers itself with `@op(name, opset)`; see docs/onnx.md."""
