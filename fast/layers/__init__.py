"""Layers of models: what is quantized how (config, environment)."""
