"""The engine: tensors only. No model, no paper, no host library."""
