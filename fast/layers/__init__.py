"""Layers of models: what is quantized how (config, environment, inputs, fallback), quantized layers as modules (weight, linear, experts), filled
shard by shard (loader, shards, stacked), and models quantized in place (online)."""
