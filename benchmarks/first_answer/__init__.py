"""What a first and a second answer cost: `python -m benchmarks.first_answer --help`.

`benchmarks.speed` times steps that are compiled already; here tracing and compiling count, as they
do for someone who waits for a first study, or changes something and asks again. Each row is a
ratio, with the target it should keep; nothing is asserted. Both sides of a ratio run in fresh
processes with a device for each core and without JAX's persistent compilation cache, in turns, and
what is published is the median of the rounds' ratios with the least and the greatest.

Rows, of the MLP 64-128-10 on digits unless it says otherwise; a ratio is of CPU seconds (user and
system, all threads) unless it says otherwise, and wall seconds are stored beside them:

- `again`: a study of 8 trials of 60 steps, so that training them weighs little, called a second
  time in its process, over the first call.
- `other_num_steps`, `other_num_trials`, `other_num_seeds`, `other_range`, `equal_optimizer`: the
  second call with one argument changed, over the first. `equal_optimizer` has an optimizer and a
  schedule that are made anew by the same code.
- `over_scan`: the first study of a process over what people write with Optax: `jit` of `vmap` of a
  scan, on one device, evaluated at the same steps. Imports and loading data do not count.
- `tune`: a process that calls `pbx.tune` over one in which Optuna's TPE drives one jitted scan,
  with as many trial-steps. Everything counts, imports too.
- `tune_transformer`: the same for the zoo's transformer over bytes at its default budget. One
  round, as it takes minutes, and none with --quick.
- `programs`: how many programs `tune`'s process compiles that take XLA more than half a second
  each.
- `long_mlp`: wall seconds of the loop people write, one jitted step called for each trial and step,
  its compiling included, over those of a study of as many trials and steps, in a process that has
  run one of another range and length before. The loop stops beginning trials after a minute, and
  what is left out is added from the mean of those that ran; `trials_timed` says how many.

What the engine costs once everything is compiled, features on, over a bare scan on all devices, is
in the part `features` of `benchmarks.speed`: `python -m benchmarks.speed --parts features`.
"""
