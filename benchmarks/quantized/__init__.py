"""Quantized bases: promises checked on bitsandbytes, and what starts give back of what quantization took."""
