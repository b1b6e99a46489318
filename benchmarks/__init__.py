"""What the pieces cost, side by side: `python -m benchmarks [--quick]`."""
