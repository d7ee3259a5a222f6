"""What a stream can be distilled on: whether its rollouts have the parts that are configured."""

from adastate_jax.config.stages import DistillConfig, num_chunks
from adastate_jax.streaming.prompts import obstacle, plan_of_change
from adastate_jax.streaming.schedule import StreamConfig


def require_parts(config: DistillConfig, stream: StreamConfig) -> None:
    """Raises ValueError, naming the field, if a rollout of this stream has no parts as they are configured."""
    num_chunks(config.rollout_frames, stream)
    if config.cache_gradient == "state" and not stream.anchor.state_frames:
        raise ValueError(f"distill.cache_gradient state needs an adaptive anchor, not {stream.anchor}; choose another")
    if not config.scored_frames and not config.continue_rollout:
        return
    size = stream.chunk_frames
    for field in ("scored_frames", "scored_every", "overlap_frames"):
        frames = getattr(config, field)
        if frames % size:
            raise ValueError(f"distill.{field} {frames} are no whole number of chunks of {size} frames")
    if config.rollout_frames < stream.anchor.frames:
        raise ValueError(
            f"distill.rollout_frames {config.rollout_frames} are fewer than the anchor's {stream.anchor.frames}: "
            "lengthen the rollout"
        )
    if not config.prompt_change:
        return
    if reason := obstacle(config.prompt_change, stream):
        raise ValueError(f"distill.prompt_change {config.prompt_change} {reason}")
    new = (config.clip_frames - config.overlap_frames) // size
    for segment in range(config.segments - 1):
        plan = plan_of_change(config.prompt_change, config.clip_frames // size + segment * new, stream)
        if plan.phase.window_frames is not None:
            raise ValueError(
                f"distill.prompt_change {config.prompt_change} leaves {plan.phase.window_frames} frames of the window; "
                "choose another one"
            )


def window_starts(config: DistillConfig, stream: StreamConfig) -> range:
    """The chunks with which a scored window may begin, see `DistillConfig.scored_every`."""
    size = stream.chunk_frames
    return range(0, (config.rollout_frames - config.clip_frames) // size + 1, max(config.scored_every // size, 1))
