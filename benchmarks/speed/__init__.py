"""How fast a study is, beside what people write: `python -m benchmarks.speed --help`.

Contenders live in worker processes of their own, because one process cannot be both JAX as it
comes (one device, all threads) and JAX with a device for each core. They take turns: a round runs
each once while the others idle, a ratio is taken within a round, and what is published is the
median and the quartiles of a round's ratios.
"""
