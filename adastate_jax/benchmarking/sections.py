"""Names of the benchmark's sections, without JAX."""

# In the order they run: what starts a process of its own must come before this one holds the device.
STREAMING = ("ready", "pass", "chunk", "decode", "end_to_end", "first_image", "prompt_switch")
SECTIONS = (*STREAMING, "training")

# What can be compiled for chips that are not here: a steady chunk, its decoders, the updates of distillation.
TRAINING = ("critic", "student")
PROGRAMS = ("stream", "wan", "tiny", *TRAINING)
