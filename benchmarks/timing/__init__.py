"""The parts of the speed benchmark; the command is `benchmarks.speed`."""
