"""Names of streams and transitions, without JAX: a command refuses another one at once."""

PRESET_NAMES = (
    "self_forcing",
    "self_forcing_frame",
    "causal_forcing",
    "causal_forcing_frame",
    "causal_forcing_two_step",
    "causal_forcing_one_step",
    "causvid",
    "longlive",
    "longlive_infinity",
    "infinity_rope",
    "rolling_forcing",
    "reward_forcing",
    "memrope",
    "memrope_adaptive",
    "rolling_sink",
    "rolling_sink_fresh_noise",
    "adastate",
)
STRATEGY_NAMES = ("none", "static", "adaptive", "absolute", "ema", "memory", "ping_pong", "restart", "rolling")
STREAM_NAMES = (*PRESET_NAMES, *STRATEGY_NAMES)

# What becomes of a stream's memory where its prompt changes, in a line each; `streaming/prompts.py` has it in full.
TRANSITION_TEXTS = {
    "switch": "the new text alone; the memory still speaks of the old one, which gives it inertia (default)",
    "recache": "what is remembered is read again under the new text (LongLive)",
    "renew": "the stream begins anew from its last frames, read under the new text (LongLive)",
    "flush": "all of the window but its last two frames is forgotten (Infinity-RoPE)",
    "cut": "a new shot, far in time from all that it sees (Infinity-RoPE)",
    "blend": "from the old text to the new one in four steps, or N with blend:N, a chunk each",
    "keep_state": "as switch, for an adaptive anchor alone: its state goes on",
    "reset_state": "an adaptive anchor's state begins again from the newest frames",
}
TRANSITIONS = tuple(TRANSITION_TEXTS)
