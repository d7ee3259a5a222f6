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

TRANSITIONS = ("switch", "recache", "renew", "flush", "cut", "blend", "keep_state", "reset_state")
