"""The DeepSeek-V4 engine: the model and nothing about debugging. Start with `model.py`."""
