"""The words for what a step does, the same in code, live table, trace, CSV and README."""

STEP_PHASES = ("generate", "mix", "augment", "encode", "loss", "backward", "optimize")
BESIDE = "generate_beside"  # generation on a side stream, beside the other phases: "generate" is then the wait for it
