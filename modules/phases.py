"""The names of the phases of a step, used alike in code, live table, trace, CSV and README."""

STEP_PHASES = ("generate", "mix", "augment", "encode", "loss", "backward", "optimize")
BESIDE = "generate_beside"  # generation on a side stream, in parallel; "generate" is then the time spent waiting for it
