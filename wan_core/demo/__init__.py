"""The demo: moving coloured shapes, a checker that sees them, and a small WAN checkpoint to train on them."""

from wan_core.demo.videos import COLOURS, DIRECTIONS, HELD_OUT, SHAPES, held_out_prompts

__all__ = ["COLOURS", "DIRECTIONS", "HELD_OUT", "SHAPES", "held_out_prompts"]
