"""What starts of quantized bases give back of what quantization took."""
