"""`graphwright bench`: models beside eager, Inductor, ONNX Runtime and OpenVINO, each in a process of its own."""
