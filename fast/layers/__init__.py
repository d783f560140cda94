"""Layers of models: what is quantized how (config, environment), a quantized layer (linear), models quantized in place (online)."""
