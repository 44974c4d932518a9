"""What every benchmark shares: real models, real tasks, scoring."""
