"""Targets, weights, anchors, installing and exporting: everything that knows PEFT."""
