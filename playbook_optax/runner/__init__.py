"""Floor 5: points in, a `Study` out. `plan` decides, `execute` computes, `run` joins them."""
