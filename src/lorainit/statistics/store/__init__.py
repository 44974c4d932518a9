"""Statistics as files: safetensors in shards, symmetric matrices as triangles."""
